"""
What only a CUDA GPU can show: it computes what the CPU does, with CUDA graphs, compiled, sharded.

$ python -m pytest -m gpu              # skipped without a GPU
$ bash launch/gpu_day.sh --only=tests  # each test as a row of a table; needs no pytest

The tests take no fixtures, so that launch/gpu_day.sh can call them. The last line that a test
prints is its result in that table. Training runs are processes, several at once: start_runs()
starts all of them.
"""

import atexit
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from flatgpt import ROOT
from flatgpt.benchmarks.baselines import placeholder_tokenizer
from flatgpt.benchmarks.gpu_day import PLAN_TOTAL, last_error
from flatgpt.data.dataset import Writer
from flatgpt.data.tokenizer import char_tokenizer
from flatgpt.files import sha256
from flatgpt.inference.engine import generate
from flatgpt.inference.quantize import prepare_for_inference
from flatgpt.inference.sampling import SamplingParams
from model import GPT, GPTConfig

try:
    import pytest

    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU'),
        pytest.mark.filterwarnings('default'),  # not errors: those of CUDA are not known yet
    ]
except ModuleNotFoundError:  # launch/gpu_day.sh does not need pytest
    pass

# tests that compare nothing that kernels compute
WITHOUT_NUMBERS = ('test_the_memory_plan_is_within_15_percent_of_the_peak',)
VOCAB_SIZE = 100
MODERN = {'arch': 'modern', 'n_kv_head': 2}
TINY = """
dataset = {dataset!r}
block_size = 64
batch_size = 8
gradient_accumulation_steps = 2
n_layer = 2
n_head = 4
n_embd = 64
learning_rate = 1e-2
min_lr = 1e-3
max_iters = 20
warmup_iters = 0
lr_decay_iters = max_iters
eval_interval = None
eval_iters = 2
eval_train = False
sample_tokens = 0
compile = False
"""
MUON = '--arch=modern --n_kv_head=2 --optimizer=muon'
PLANNED = '--n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=32'
SHARDED = f'{MUON} --dtype=float32 --shard'
RUNS = {  # name: flags of train.py
    'gpt2 on the CPU': '--device=cpu --dtype=float32',
    'gpt2': '--dtype=float32',
    'modern on the CPU': f'{MUON} --device=cpu --dtype=float32',
    'modern': f'{MUON} --dtype=float32',
    'eager': f'{MUON} --save_interval=10 --cuda_graph=False',
    'again': f'{MUON} --save_interval=10 --cuda_graph=False',
    'resumed': '--init_from=resume',
    'graphed': f'{MUON} --cuda_graph=True',
    'compiled': f'{MUON} --compile=True',
    'float16': '--dtype=float16 --max_iters=40',
    'sharded': SHARDED,
    'offloaded': f'{SHARDED} --offload',
    'planned': f'{PLANNED} --max_iters=4',
    'plan': f'{PLANNED} --plan',
}
HIGH_SCALE = 2.0**30  # at which the gradients of any model overflow in float16
TRAIN_WITH_HIGH_SCALE = f"""
import functools, runpy, sys, torch
torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale={HIGH_SCALE})
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


# -----------------------------------------------------------------------------
# training runs


@functools.cache
def folder() -> Path:
    """A temporary folder with a dataset and the config of the runs."""
    path = Path(tempfile.mkdtemp(prefix='flatgpt-gpu-'))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    words = 'the cat sat on a mat and saw that the dog ran to his den as rain fell at noon'.split()
    text = ' '.join(np.random.default_rng(0).choice(words, 40_000).tolist())
    tokenizer = char_tokenizer(sorted(set(text)))
    with Writer(path / 'text', tokenizer) as writer:
        writer.write('train', tokenizer.encode(text[:-9000]))
        writer.write('val', tokenizer.encode(text[-9000:]))
    (path / 'tiny.py').write_text(TINY.format(dataset=str(path / 'text')), encoding='utf-8')
    (path / 'high_scale.py').write_text(TRAIN_WITH_HIGH_SCALE, encoding='utf-8')
    return path


@functools.cache
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2))


@functools.cache
def started(name: str) -> Future:
    """A training run that another thread starts."""
    folder()  # before several threads would each make one
    return pool().submit(train, name, started('eager') if name == 'resumed' else None)


def start_runs() -> None:
    for name in RUNS:
        started(name)


def finished(name: str) -> str:
    """What the run printed. RuntimeError with its last line if it failed."""
    return started(name).result()


def train(name: str, before: Future | None) -> str:
    out_dir, script = folder() / name, [str(ROOT / 'train.py')]
    if before:
        before.result()
        shutil.copytree(folder() / 'eager', out_dir)
        (out_dir / 'DONE').unlink()
        shutil.rmtree(out_dir / 'checkpoints' / 'step-00000020')
    if name == 'float16':
        script = [str(folder() / 'high_scale.py'), *script]
    if '--shard' in RUNS[name]:
        script = '-m torch.distributed.run --standalone --nproc_per_node=1'.split() + script
    return run(*script, str(folder() / 'tiny.py'), *RUNS[name].split(), f'--out_dir={out_dir}')


def run(*command: str) -> str:
    """What a Python program prints. RuntimeError with its last line if it failed."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, 'PYTHONPATH': paths, 'HF_HUB_OFFLINE': '1'},
        capture_output=True,
        encoding='utf-8',
    )
    if done.returncode:
        error = last_error(done.stderr or done.stdout)
        raise RuntimeError(f'exit status {done.returncode}: {error}')
    return done.stdout


def logged(name: str, key: str) -> list:
    """The values of each step in metrics.jsonl."""
    finished(name)
    lines = (folder() / name / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [line[key] for line in map(json.loads, lines) if key in line]


def compare_losses(name: str, reference: str, tolerance: float) -> None:
    both = [logged(each, 'loss') for each in (name, reference)]
    both = [[math.nan if loss is None else loss for loss in losses] for losses in both]
    losses, expected = torch.tensor(both)
    assert len(losses) == 20
    apart = ((losses - expected).abs() / expected).max().item()
    print(f'losses apart by at most {apart:.1e}')
    assert apart < tolerance, f'losses of 20 steps are apart by {apart:.1e}'
    assert losses[-1] < 0.9 * losses[0], f'the loss went from {losses[0]:.3f} to {losses[-1]:.3f}'


# -----------------------------------------------------------------------------
# logits and decoding


def models(dtype=torch.float32, **shape) -> tuple[GPT, GPT]:
    """A random model on the CPU in float32 and on the GPU in `dtype`, ready for inference."""
    pair = []
    for device, kind in (('cpu', torch.float32), ('cuda', dtype)):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=VOCAB_SIZE, n_layer=3, n_head=4, n_embd=64, **shape))
        for parameter in model.parameters():  # larger than the initial weights: no near ties
            torch.nn.init.normal_(parameter, std=0.3)
        model.embedding.weight.data *= 0.1  # else GPT-2, which also has it as head, repeats a token
        pair.append(prepare_for_inference(model.eval().to(kind).to(device), None))
    return tuple(pair)


def both_architectures(**options):
    for changes in ({'bias': True}, MODERN):
        yield models(**options, **changes)


def completions(model: GPT, prompts: list[list[int]], new: int, **sampling) -> list[list[int]]:
    found = [[] for _ in prompts]
    params = SamplingParams(new, **{'temperature': 0, **sampling})
    for output in generate(model, placeholder_tokenizer(VOCAB_SIZE), prompts, params):
        found[output.index].append(output.token)
    return found


def random_prompts(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(VOCAB_SIZE, size=length).tolist() for length in lengths]


def compare_completions(*lengths: int, block_size: int, new: int) -> None:
    """Compare greedy completions, and samples, which repeat themselves less."""
    prompts = random_prompts(*lengths)
    for on_cpu, on_gpu in both_architectures(block_size=block_size):
        for sampling in ({}, {'temperature': 1.0}, {'temperature': 1.0, 'top_k': 20, 'top_p': 0.9}):
            expected = completions(on_cpu, prompts, new, **sampling)
            for _ in range(2):  # the second time with the CUDA graphs that the first one kept
                found = completions(on_gpu, prompts, new, **sampling)
                equal = [first_difference(*pair) for pair in zip(found, expected, strict=True)]
                assert found == expected, f'{on_gpu.config.arch}, {sampling}: {equal} tokens equal'
    print(f'{6 * len(prompts)} completions of {new} tokens are equal')


def first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def test_logits_in_float32_are_those_of_the_cpu():
    idx = torch.tensor(random_prompts(128, 128))
    apart = 0.0
    for on_cpu, on_gpu in both_architectures(block_size=128):
        with torch.inference_mode():
            expected, found = on_cpu(idx)[0], on_gpu(idx.cuda())[0].cpu()
        apart = max(apart, ((found - expected).abs().max() / expected.abs().max()).item())
        assert found.isfinite().all(), 'logits are not finite'
    print(f'apart by at most {apart:.1e} of the largest')
    assert apart < 1e-4, f'logits are apart by {apart:.1e} of the largest'


def test_logits_in_16_bits_are_near_those_of_the_cpu():
    idx = torch.tensor(random_prompts(128, 128))
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    apart = 0.0
    for on_cpu, on_gpu in both_architectures(block_size=128, dtype=dtype):
        with torch.inference_mode():
            expected, found = on_cpu(idx)[0], on_gpu(idx.cuda())[0].float().cpu()
        apart = max(apart, ((found - expected).norm() / expected.norm()).item())
    print(f'{dtype}: relative error {apart:.1e}')
    assert apart < 0.1, f'{dtype}: relative error {apart:.1e}'


def test_decoding_by_cuda_graphs_agrees_with_a_forward_pass_of_the_whole_text():
    for _, model in both_architectures(block_size=320):  # more than 256: two graphs
        (prompt,) = random_prompts(5)
        (new,) = completions(model, [prompt], 300)
        with torch.inference_mode():
            logits, _ = model(torch.tensor([prompt + new[:-1]], device='cuda'))
        expected = logits[0, len(prompt) - 1 :].argmax(-1).tolist()
        equal = first_difference(new, expected)
        assert new == expected, f'{model.config.arch}: {equal} of 300 tokens are equal'
    print('300 tokens of each architecture are equal')


def test_one_token_prompts_are_continued_as_on_the_cpu():
    compare_completions(1, block_size=64, new=40)
    compare_completions(1, 1, 1, block_size=64, new=40)


def test_prompts_of_several_lengths_are_continued_as_on_the_cpu():
    compare_completions(3, 50, 17, 1, 8, block_size=128, new=70)


def test_a_full_context_forgets_as_on_the_cpu():
    compare_completions(10, 16, 1, block_size=16, new=80)


# -----------------------------------------------------------------------------
# training


def test_twenty_steps_of_gpt2_have_the_losses_of_the_cpu():
    compare_losses('gpt2', 'gpt2 on the CPU', 5e-3)  # float32 products are TF32 on a GPU


def test_twenty_steps_of_the_modern_architecture_with_muon_have_the_losses_of_the_cpu():
    compare_losses('modern', 'modern on the CPU', 2e-2)  # Muon computes in bfloat16


def test_updates_that_a_cuda_graph_replays_have_the_losses_of_eager_ones():
    printed = finished('graphed')
    failure = [line for line in printed.splitlines() if 'without a CUDA graph' in line]
    assert not failure, failure[0]
    compare_losses('graphed', 'eager', 1e-3)


def test_compiled_training_has_the_losses_of_eager_training():
    printed = finished('compiled')
    failure = [line for line in printed.splitlines() if 'without torch.compile' in line]
    assert not failure, failure[0]
    compare_losses('compiled', 'eager', 2e-2)


def test_float16_skips_updates_that_overflow_and_then_learns():
    norms, losses = logged('float16', 'grad_norm'), logged('float16', 'loss')
    overflows = norms.count(None)
    assert all(norm is None for norm in norms[:overflows]), f'gradient norms: {norms}'
    assert 0 < overflows < 30, f'{overflows} of 40 updates overflowed'
    assert sum(logged('float16', 'skipped')) == 0, 'an overflow was reported as a skipped update'
    states = sorted((folder() / 'float16' / 'checkpoints').glob('*/state.json'))
    scale = json.loads(states[-1].read_text())['scaler']['scale']
    assert scale == HIGH_SCALE / 2**overflows, f'{overflows} overflows, scale {scale}'
    assert losses[-1] < 0.9 * losses[0], f'the loss went from {losses[0]:.3f} to {losses[-1]:.3f}'
    print(f'{overflows} overflows, then {40 - overflows} updates')


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted():
    """Bit for bit, unless two equal runs already differ: then by as little as those."""
    for name in ('eager', 'again', 'resumed'):
        finished(name)
    equal_runs, resumed = deviation('eager', 'again'), deviation('eager', 'resumed')
    if not resumed:
        print('bit for bit' if not equal_runs else 'bit for bit, though two equal runs differ')
    else:
        assert equal_runs, f'two equal runs have the same bits, a resumed one not: {worst(resumed)}'
        assert max(resumed.values()) <= 10 * max(equal_runs.values()), worst(resumed)
        print(f'two equal runs differ: {worst(equal_runs)}; resumed: {worst(resumed)}')


def deviation(a: str, b: str) -> dict[str, float]:
    """{tensor of the weights or the optimizer that differs: largest difference} after 20 steps."""
    from safetensors.torch import load_file

    found = {}
    for file in ('model.safetensors', 'optimizer.safetensors'):
        paths = [folder() / name / 'checkpoints' / 'step-00000020' / file for name in (a, b)]
        if sha256(paths[0]) == sha256(paths[1]):
            continue
        one, other = map(load_file, paths)
        found |= {
            name: (one[name] - other[name]).abs().max().item()
            for name in one
            if not torch.equal(one[name], other[name])
        }
    return found


def worst(differences: dict[str, float]) -> str:
    name = max(differences, key=differences.get)
    return f'{len(differences)} tensors differ, {name} by {differences[name]:.1e}'


def test_a_sharded_run_has_the_losses_of_an_unsharded_one():
    compare_losses('sharded', 'modern', 5e-3)


def test_an_offloaded_run_has_the_losses_of_an_unsharded_one():
    compare_losses('offloaded', 'modern', 5e-3)


def test_a_trained_model_continues_a_prompt_as_on_the_cpu():
    finished('gpt2')
    flags = '--dtype=float32 --temperature=0 --num_samples=1 --max_new_tokens=60'.split()
    flags.append(f'--out_dir={folder() / "gpt2"}')
    program = str(ROOT / 'sample.py'), 'the cat'
    texts = [
        pool().submit(run, *program, *flags, f'--device={device}') for device in ('cpu', 'cuda')
    ]
    on_cpu, on_gpu = (text.result() for text in texts)
    assert on_gpu == on_cpu, f'{on_gpu!r} instead of {on_cpu!r}'
    print('60 tokens are equal')


def test_the_memory_plan_is_within_15_percent_of_the_peak():
    planned, peak = (
        float(re.search(pattern, finished(name))[1].replace(',', ''))
        for name, pattern in (
            ('plan', PLAN_TOTAL),
            ('planned', r'peak memory ([\d,]+) MB'),
        )
    )
    print(f'plan {planned:,.0f} MB, peak {peak:,.0f} MB: {peak / planned - 1:+.0%}')
    assert abs(peak / planned - 1) < 0.15, f'plan {planned:,.0f} MB, peak {peak:,.0f} MB'
