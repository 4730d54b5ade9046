"""When torch.compile is estimated to pay."""

import runpy
from types import SimpleNamespace

import pytest
import torch

from flatgpt import ROOT
from flatgpt.runtime import Runtime
from flatgpt.training import compiling
from flatgpt.training.batches import BatchLoader
from flatgpt.training.compiling import ComputeWorkload, compile_pays, decide_compile
from model import GPT, GPTConfig


def work_of(config, steps):
    """The ComputeWorkload of a process in `steps` steps of a shipped config."""
    declared = (ROOT / 'train.py').read_text(encoding='utf-8').split('config = configure')[0]
    c: dict = {}
    exec(declared[declared.index('out_dir: str') :], c)
    c |= runpy.run_path(ROOT / 'config' / f'{config}.py')
    shape = {name: c[name] for name in ('arch', 'block_size', 'n_layer', 'n_head', 'n_embd')}
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=65, **shape))
    sizes = {'block_size': c['block_size'], 'window_tokens': c['block_size']}
    data = SimpleNamespace(**sizes, has_pairs=False)
    state = SimpleNamespace(step=0, samples=0)
    return BatchLoader(data, state, c, Runtime('cpu', torch.float32)).work(
        model, steps or c['max_iters']
    )


@pytest.mark.parametrize(
    ('config', 'steps', 'pays'),
    [
        ('train_gpt2', None, True),
        ('train_gpt2', 1, False),
        ('speedrun_shakespeare_char_cpu', None, False),  # which trains for seconds
        ('speedrun_shakespeare_char_cpu', 10**6, True),  # whose kernels are short, but many
    ],
)
@pytest.mark.parametrize('name', ['NVIDIA H100 80GB HBM3', 'Tesla T4', 'NVIDIA Future X1'])
def test_auto_compiles_long_runs_only(monkeypatch, name, config, steps, pays, capsys):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: name)
    machine = Runtime('cuda:0', torch.bfloat16)
    work, peak = work_of(config, steps), machine.peak_flops()
    assert decide_compile('auto', work, peak, machine) == pays
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f'torch.compile: {"on" if pays else "off"}, since the run would take about'
    )
    assert ('--peak_tflops' in line) == (peak is None)
    assert ('--compile=True' in line) == (not pays)


def test_compiling_saves_no_launches_that_a_cuda_graph_saves():
    tiny = ComputeWorkload(passes=100_000, flops=1e9, layers=6)
    assert compile_pays(tiny, 989e12)[0]
    assert not compile_pays(tiny._replace(graphed=True), 989e12)[0]


def test_compiling_pays_sooner_on_a_slower_gpu():
    middling = ComputeWorkload(passes=2000, flops=1e12, layers=6)
    assert not compile_pays(middling, 989e12)[0]
    assert compile_pays(middling, 65e12)[0]
    assert not compile_pays(middling._replace(batch_shapes=6), 65e12)[0]
    past_the_end = middling._replace(passes=-5)
    assert not compile_pays(past_the_end, None)[0]


@pytest.mark.parametrize(
    # processor seconds of torch 2.11 for an H100, with an empty cache: 'gpt2', then 'modern'
    ('layers', 'seconds'),
    [(2, 7.4), (6, 9.8), (12, 15.3), (2, 12.0), (6, 15.3), (12, 23.7)],
)
def test_compiling_is_assumed_to_take_about_as_long_as_it_took(layers, seconds):
    takes = compiling.COMPILE_SECONDS + layers * compiling.COMPILE_LAYER_SECONDS
    assert 0.9 < takes / seconds < 1.7
    # on a GPU of unlimited speed a run is as long as its launches
    passes = takes / compiling.COMPILE_SAVING / (layers * compiling.EAGER_LAYER_SECONDS)
    for factor, pays in ((0.9, False), (1.1, True)):
        work = ComputeWorkload(round(factor * passes), flops=1e6, layers=layers)
        assert compile_pays(work, 1e18)[0] == pays


def test_nothing_is_estimated_without_auto_or_cuda(capsys):
    work = work_of('train_gpt2', None)
    for device, setting, compiles in (
        *(('cpu', 'auto', False), ('mps', 'auto', False), ('cpu', True, True)),
        *(('cuda:0', True, True), ('cuda:0', False, False)),
    ):
        machine = Runtime(device, torch.float32)
        assert decide_compile(setting, work, None, machine) == compiles
    assert not capsys.readouterr().out
