"""Error lines of bench.py: each is provoked, its advice is followed, and then it works."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from benches import settings
from conftest import refused
from error_lines import case, error_line

import bench
from flatgpt.benchmarks import baselines, data, decoding, implementations, load_test, validate
from flatgpt.benchmarks.report import Report
from flatgpt.checkpoint import save
from flatgpt.data.dataset import Writer
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer
from flatgpt.runtime import Runtime
from model import GPT, GPTConfig

RUNTIME = Runtime('cpu', torch.float32)
NANOGPT = 'class GPTConfig:\n    pass\n'


def check(*flags):
    """The checks that bench.py makes before it measures."""
    config = settings(*flags)
    validate.check_modes(config)
    names = validate.requested_benchmarks(config, [*bench.BENCHMARKS], bench.EXTRA_BENCHMARKS)
    validate.check_used(config, ['serve'] if config['serve'] else names)
    validate.check_benchmark_settings(config, names)
    validate.check_writable(config)
    validate.check_memory(config, RUNTIME, names)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with a run, its dataset, a checkout of nanoGPT and a folder of text."""
    monkeypatch.chdir(tmp_path)
    for name in ('nanogpt', 'empty', 'texts'):
        Path(name).mkdir()
    Path('nanogpt/model.py').write_text(NANOGPT)
    dataset(Path('data'), byte_tokenizer())
    state = {'step': 1, 'config': {'dataset': str(tmp_path / 'data')}}
    for name, kept in (('run', state), ('bare', {'step': 1})):
        model = GPT(GPTConfig(16, byte_tokenizer().vocab_size, 1, 2, 16))
        save.save_checkpoint(Path(name), model, [], byte_tokenizer(), kept, keep_evaluated=False)
    return tmp_path


def dataset(folder, tokenizer):
    with Writer(folder, tokenizer) as writer:
        for split in ('train', 'val'):
            writer.write(split, np.arange(200) % min(97, tokenizer.vocab_size))


@pytest.mark.usefixtures('here')
@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('--{} and --{}: give one of them', '--serve --only=data', '--serve'),
        case('measures random weights of the given', '--serve --out_dir=run', '--serve'),
        case('not a file that can be written', '--json=no/x.json', '--json=x.json'),
        case('needs a trained model; give', '--only=quality', '--only=quality --out_dir=run'),
        case('trains on a dataset', '--only=scaling', '--only=scaling --dataset=words'),
        case('trains on a dataset', '--only=rivals', '--only=rivals --dataset=words'),
        case('no such folder; give an existing', '--text=no', '--text=texts'),
        case('do not fit into block_size', '--prompt_tokens=13', '--prompt_tokens=11'),
        case('GiB free; lower --n_layer', '--n_layer=9 --n_embd=65536', '--n_embd=64'),
        case('GiB free; lower --n_layer', '--serve --block_size=2000000000', '--serve'),
        case('is only for {}; omit it', '--limit=3', ''),
        case('is only for {}; omit it', '--only=data --profile', '--only=decode --profile'),
        case('use --arch=gpt2, or omit', '--nanogpt=nanogpt --arch=modern', '--arch=modern'),
        case(
            'use --arch=gpt2, or omit',
            '--nanogpt=nanogpt --arch=modern',
            '--nanogpt=nanogpt --arch=gpt2',
        ),
        case('give batch sizes, such as', '--rows=1,,8', '--rows=1,8,32'),
        case('no model.py of nanoGPT; give', '--nanogpt=empty', '--nanogpt=nanogpt'),
        case('no record of its dataset', '--out_dir=bare', '--out_dir=bare --dataset=data'),
        case('no prepared dataset', '--out_dir=run --dataset=no', '--out_dir=run --dataset=data'),
    ],
)
def test_the_advice_for_a_flag_is_right(bad, good):
    refused(check, *bad.split())
    check(*good.split())


@error_line('do not fit into block_size={}; lower')
def test_the_context_length_that_an_error_advises_is_enough():
    (flag,) = re.findall('--block_size=.*$', refused(check, '--new_tokens=30'))
    check('--new_tokens=30', flag)


@error_line('--serve: api.py needs pip install {}')
def test_serving_works_once_its_packages_are_installed(monkeypatch):
    installed = {name: name != 'waitress' for name in validate.SERVING}
    monkeypatch.setattr(validate, 'find_spec', installed.get)
    (name,) = re.findall(r'pip install (\w+)$', refused(check, '--serve'))
    installed[name] = True
    check('--serve')


@error_line('task={}: needs pip install "lm_eval')
def test_tasks_run_once_the_harness_is_installed(monkeypatch, here):
    import sys
    import types

    from flatgpt import benchmarks

    flags = settings('--task=lambada', '--out_dir=run')
    monkeypatch.delattr(benchmarks, 'lm_eval', raising=False)
    monkeypatch.setitem(sys.modules, 'flatgpt.benchmarks.lm_eval', None)
    assert 'pip install "lm_eval>=0.4.13"' in refused(bench.main, flags)
    done = types.SimpleNamespace(
        score_tasks=lambda settings, entries, load: entries.append({'task': 1})
    )
    monkeypatch.setitem(sys.modules, 'flatgpt.benchmarks.lm_eval', done)
    monkeypatch.setattr(benchmarks, 'lm_eval', done, raising=False)
    monkeypatch.setattr(bench.importlib.metadata, 'version', lambda name: '0.4.13')
    bench.main(flags)
    assert '"task": 1' in Path('bench.json').read_text()


@error_line("no dropout with arch='modern'")
def test_transformers_is_compared_without_dropout(monkeypatch):
    monkeypatch.setattr(baselines, 'transformers_model', lambda settings: torch.nn.Linear(1, 1))
    monkeypatch.setattr(baselines, 'Training', lambda *args: 'built')
    config = {**settings('--arch=modern', '--dropout=0.1'), 'workload': 'training'}
    (flag,) = re.findall('--dropout=.*$', refused(baselines.build_transformers, config, RUNTIME))
    config |= {'dropout': settings(flag)['dropout']}
    assert baselines.build_transformers(config, RUNTIME) == 'built'


@error_line('needs two files of UTF-8 text within')
@pytest.mark.parametrize('fix', ['add files', 'raise --text_bytes'])
def test_two_files_of_text_are_enough(tmp_path, fix):
    text, out = tmp_path / 'text', tmp_path / 'out'
    text.mkdir()
    out.mkdir()
    (text / 'a.txt').write_text('one and two')
    if fix != 'add files':
        (text / 'b.txt').write_text('three')
    limits = {'text': str(text), 'text_bytes': 1000 if fix == 'add files' else 5}
    assert fix in refused(data.copy_texts, limits, out)
    (text / 'b.txt').write_text('three')
    assert data.copy_texts({**limits, 'text_bytes': 1000}, out) == ['one and two', 'three']


@error_line('was not prepared with the tokenizer of')
def test_quality_is_measured_on_data_with_the_tokenizer_of_the_model(here):
    dataset(Path('other'), char_tokenizer('ab'))
    report = Report({'json': 'x.json'}, {})
    flags = ['--out_dir=run', '--formats=float32', '--dataset=other']
    error = refused(decoding.bench_quality, settings(*flags), RUNTIME, report)
    assert error.endswith('--dataset=')
    decoding.bench_quality(settings(*flags, '--dataset=data'), RUNTIME, report)
    assert report.entries[0]['perplexity'] > 1


@error_line('no such run directory; give existing ones, separated by commas')
def test_runs_that_exist_are_compared(tmp_path):
    refused(validate.compared_runs, {'report': f'{tmp_path}/a'}, 'report')
    (tmp_path / 'a').mkdir()
    assert validate.compared_runs({'report': f'{tmp_path}/a,{tmp_path}'}, 'report')


@error_line('requests failed; lower --clients')
def test_fewer_clients_may_all_get_their_completions():
    done, lost = load_test.Completion(200, tokens=3), load_test.Completion(0)
    assert '1 of 3' in refused(load_test.check_all_complete, [done, lost, done])
    load_test.check_all_complete([done, done])


@error_line('cannot be written ({}); give another')
def test_a_report_is_written_to_another_path(tmp_path):
    report = Report({'json': str(tmp_path)}, {})
    assert refused(report.write).endswith('--json=')
    Report({'json': str(tmp_path / 'x.json')}, {}).write()
    assert (tmp_path / 'x.json').exists()


@error_line('give a --json= in a folder that can')
def test_a_trace_is_written_beside_the_report(tmp_path, monkeypatch):
    class Profile:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def export_chrome_trace(self, path):
            if Path(path).parent.is_dir():
                Path(path).write_text('{}')

        def key_averages(self):
            return self

        def table(self, **options):
            return 'aten::mm'

    monkeypatch.setattr(torch.profiler, 'profile', Profile)
    refused(implementations.profiled, print, str(tmp_path / 'no' / 'trace.json'))
    assert implementations.profiled(print, str(tmp_path / 'trace.json')) == 'aten::mm'
