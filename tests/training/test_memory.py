"""The memory estimate of a run, and the report of --plan."""

import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, follow_advice, make_dataset
from torch._subclasses.fake_tensor import FakeTensorMode

from configurator import settings_of
from flatgpt.checkpoint.load import list_checkpoints, verify_checkpoint
from flatgpt.checkpoint.save import size_of, tensors_of
from flatgpt.data.tokenizer import byte_tokenizer
from flatgpt.inference.kv_cache import KVCache
from flatgpt.runtime import Runtime
from flatgpt.training import memory as memory_module
from flatgpt.training import memory_report
from flatgpt.training.batches import BatchLoader
from flatgpt.training.loss import loss_of
from flatgpt.training.memory import (
    MemoryWorkload,
    build_fake_batch,
    build_fake_model,
    build_fake_optimizers,
    cache_bytes,
    copies_bytes,
    step_peak,
)
from flatgpt.training.rollout import SLOTS
from model import GPT, GPTConfig

TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
XL = GPTConfig(vocab_size=50257, n_layer=48, n_head=25, n_embd=1600, bias=True)
SEVEN_B = GPTConfig(2048, 65536, arch='modern', n_layer=32, n_head=32, n_embd=4096)
SMALL = MemoryWorkload(
    GPTConfig(64, 256, n_layer=2, n_head=2, n_embd=64), 'cpu', torch.float32, 'adamw', 4
)
CPU = Runtime('cpu', torch.float32)


def count(workload):
    return sum(p.numel() for p in build_fake_model(replace(workload, device='meta')).parameters())


# --- a step on fake tensors


def test_parameters_gradients_and_optimizer_are_counted_to_the_byte():
    wide = replace(SMALL, shape=replace(SMALL.shape, n_embd=256), micro_batch_size=1, saves=False)
    peak, bytes_of_all = step_peak(wide), 4 * count(wide)
    assert peak['parameters'] == bytes_of_all
    assert peak['gradients'] <= bytes_of_all  # at the peak not all of them need be there
    assert 2 * bytes_of_all <= peak['optimizer'] <= 2 * bytes_of_all + 1000  # and counts of steps


def test_activations_grow_with_the_rows_and_shrink_with_gradient_checkpointing():
    deep = replace(SMALL, shape=replace(SMALL.shape, n_layer=4))
    peaks = {
        rows: step_peak(replace(deep, micro_batch_size=rows))['activations'] for rows in (8, 16)
    }
    assert 1.9 < peaks[16] / peaks[8] < 2.1
    assert (
        step_peak(replace(deep, micro_batch_size=16, gradient_checkpointing=True))['activations']
        < peaks[16] / 2
    )


@pytest.mark.parametrize('changed', [{'lora': (4, 'all')}, {'freeze': 1}], ids=['lora', 'freeze'])
def test_a_step_of_a_model_that_is_partly_frozen_is_counted(changed):
    workload = replace(SMALL, **changed)
    parameters, gradients, optimizer = memory_module.state_bytes(workload)
    # the second micro-batch meets the first's gradients
    peak = step_peak(replace(workload, micro_steps=2))
    assert (peak['parameters'], peak['gradients']) == (parameters, gradients)
    assert optimizer <= peak['optimizer'] <= optimizer + 1000


def test_what_is_frozen_has_neither_gradient_nor_state():
    all_of_it = memory_module.state_bytes(SMALL)
    adapted = memory_module.state_bytes(replace(SMALL, lora=(4, 'all')))
    assert adapted[0] > all_of_it[0]  # the adapters are beside it
    assert adapted[1] < all_of_it[1] / 4
    assert adapted[2] == 2 * adapted[1]
    assert memory_module.state_bytes(replace(SMALL, optimizer='muon'))[2] < all_of_it[2]


def test_a_sharded_rank_holds_its_share():
    workload = replace(SMALL, shard=True, saves=False, micro_batch_size=1)
    two, eight = (step_peak(replace(workload, ranks=ranks)) for ranks in (2, 8))
    assert two['parameters'] == pytest.approx(2 * count(workload), rel=0.01)
    assert eight['optimizer'] < 0.3 * two['optimizer']
    assert two['communication'] == eight['communication'] > 0
    assert not torch.distributed.is_initialized()


def test_blocks_that_are_not_computed_are_as_the_others():
    deep = replace(SMALL, shape=replace(SMALL.shape, n_layer=9), saves=False)
    assert memory_module.estimate(deep).total() == pytest.approx(step_peak(deep).total(), rel=1e-4)


def test_a_deep_model_has_its_peak_at_the_update_where_a_shallow_one_has_not():
    deep = replace(
        SMALL,
        shape=replace(SMALL.shape, n_layer=48),
        gradient_checkpointing=True,
        micro_batch_size=1,
    )
    assert memory_module.estimate(deep).total() >= sum(memory_module.state_bytes(deep))


def test_main_memory_beside_gpus_is_looked_at_where_the_model_goes_through_it(monkeypatch):
    monkeypatch.setattr(memory_module, 'available_host_memory', lambda: 20e9)
    large = replace(SMALL, shape=SEVEN_B, device='cuda', ranks=8)
    assert memory_module.host_memory_problem(large) is None
    assert 'needs 27.9 GB of main memory' in memory_module.host_memory_problem(
        replace(large, shard=True)
    )
    few = replace(large, shape=replace(SEVEN_B, n_layer=16), shard=True)
    assert memory_module.host_memory_problem(few) is None
    assert 'needs 52.6 GB' in memory_module.host_memory_problem(replace(few, ranks=2, offload=True))


def test_a_preference_pair_is_two_rows():
    pair = step_peak(replace(SMALL, objective='dpo', sequences=2))['activations']
    assert pair > 1.8 * step_peak(SMALL)['activations']


def test_each_completion_of_a_prompt_is_a_row():
    prompts = replace(SMALL, objective='rl', sequences=4)
    assert step_peak(prompts)['activations'] > 3.5 * step_peak(SMALL)['activations']


def test_a_reward_model_computes_two_rows_of_a_pair_and_no_logits():
    shape = replace(SMALL.shape, vocab_size=4096)
    pair = replace(SMALL, shape=replace(shape, score=True), objective='reward', sequences=2)
    text = replace(SMALL, shape=shape, micro_batch_size=8)
    assert 0 < step_peak(pair)['activations'] < step_peak(text)['activations'] / 2


@pytest.mark.parametrize('shape', [SMALL.shape, replace(SMALL.shape, arch='modern', n_kv_head=1)])
def test_the_cache_and_the_copies_of_rollouts_are_counted(shape):
    model = GPT(shape)
    weights = sum(p.numel() for p in model.parameters())
    cache = KVCache(model, SLOTS).kv.nbytes  # the cache has one more column
    assert cache_bytes(shape, CPU) == pytest.approx(cache, rel=0.02)
    assert copies_bytes(shape, torch.float32, has_reference=False) == 0
    assert copies_bytes(shape, torch.bfloat16, has_reference=True) == (2 + 4) * weights


def test_the_cache_of_rollouts_is_freed_before_an_update():
    prompts = replace(SMALL, objective='rl', sequences=4)
    update = memory_module.estimate(prompts).total()
    assert memory_module.estimate(replace(prompts, cache=1000)).total() == update
    held = sum(memory_module.state_bytes(prompts)) - memory_module.state_bytes(prompts).gradients
    assert memory_module.estimate(replace(prompts, cache=10**9)).total() == held + 10**9
    assert memory_module.estimate(replace(prompts, copies=1000)).total() == update + 1000


def test_what_reinforcement_learning_refuses_is_not_advised():
    prompts = replace(SMALL, objective='rl', sequences=4, micro_batch_size=8)
    advised = ' '.join(text for text, _ in memory_report.suggest_savings(prompts, 1, fresh=False))
    tried = [flags for group in memory_report.possible_savings(prompts) for flags in group]
    assert tried
    assert not any(each.shard for each in tried)
    assert '--batch_size' in advised
    assert '--block_size' not in advised


def test_what_a_process_holds_beside_a_step_is_added():
    alone = replace(SMALL, saves=False)
    held = memory_module.estimate(replace(alone, ranks=2))  # DDP has the gradients twice
    assert held['communication'] == 4 * count(alone)


# --- a compiled step

GPT2, MODERN = GPTConfig(bf16_residual=True), GPTConfig(arch='modern')
COMPILED = MemoryWorkload(GPT2, 'cuda', torch.bfloat16, 'adamw', 12, compiled=True)
MUON = replace(COMPILED, shape=MODERN, optimizer='muon')
# torch's allocator at the peak of a step that torch 2.11 compiled for an H100, GB. Its CUDA
# libraries were a stub, which allocates and computes nothing: no GPU was used.
ALLOCATED = {
    'gpt2': (COMPILED, {}, 6.80),
    'float32 residual': (COMPILED, {'bf16_residual': False}, 7.27),
    'many rows': (replace(COMPILED, micro_batch_size=32), {}, 15.00),
    'few tokens': (
        replace(COMPILED, micro_batch_size=4),
        {'block_size': 256, 'bf16_residual': False},
        2.36,
    ),
    'recomputed': (replace(COMPILED, gradient_checkpointing=True), {}, 3.20),
    'medium': (
        replace(COMPILED, micro_batch_size=8),
        {'n_layer': 24, 'n_head': 16, 'n_embd': 1024},
        12.45,
    ),
    'characters': (
        replace(COMPILED, micro_batch_size=64),
        {'block_size': 256, 'vocab_size': 256, 'n_layer': 6, 'n_head': 6, 'n_embd': 384}
        | {'bf16_residual': False},
        1.65,
    ),
    'accumulated': (replace(COMPILED, micro_steps=2), {'n_layer': 4}, 3.85),
    'float16': (replace(COMPILED, dtype=torch.float16), {'n_layer': 4}, 3.75),
    'float32': (replace(COMPILED, dtype=torch.float32), {'n_layer': 4}, 5.93),
    'lora': (replace(COMPILED, lora=(8, 'all')), {'n_layer': 4}, 2.95),
    'modern': (replace(MUON, optimizer='adamw'), {}, 7.28),
    'modern, muon': (MUON, {}, 6.93),
    'modern, few tokens': (replace(MUON, micro_batch_size=4), {'block_size': 256}, 2.88),
    'modern, recomputed': (replace(MUON, gradient_checkpointing=True), {}, 4.49),
    'modern, grouped': (
        replace(MUON, micro_batch_size=8),
        {'n_layer': 24, 'n_head': 16, 'n_embd': 1024, 'n_kv_head': 4},
        10.61,
    ),
}


@pytest.mark.parametrize('name', ALLOCATED)
def test_the_estimate_of_a_compiled_step_is_near_what_it_allocated(name):
    workload, shape, allocated = ALLOCATED[name]
    workload = replace(workload, shape=replace(workload.shape, **shape))
    assert workload.compiled_whole
    peak = memory_module.compiled_peak(workload).total() / 1e9
    assert peak == pytest.approx(allocated, rel=0.11)  # of few tokens, Muon's update is the peak


def test_the_update_of_a_compiled_step_is_counted_too(monkeypatch):
    asked = []

    def update(workload):
        asked.append((workload.micro_batch_size, workload.shape.block_size))
        return Counter(parameters=1, temporaries=20e9)

    monkeypatch.setattr(memory_module, 'eager_peak', update)
    assert memory_module.estimate(COMPILED).total() == 1 + 20e9
    assert asked == [(1, 16)]  # hardly any activations


@pytest.mark.parametrize(
    'changed', [{'compiled': False}, {'device': 'cpu'}, {'objective': 'dpo'}, {'shard': True}]
)
def test_another_step_is_estimated_as_an_eager_one(changed, monkeypatch):
    monkeypatch.setattr(memory_module, 'eager_peak', lambda workload: Counter(parameters=1))
    workload = replace(COMPILED, offload=True, **changed)
    assert memory_module.estimate(workload)['parameters'] == 1
    _, table = memory_report.tabulate(workload, 'cuda:0', None, fresh=True)
    assert 'total at the peak of an eager step' in table
    assert ('torch.compile keeps' in table) == workload.compiled


SHORT = '--max_iters=12000 --batch_size=1 --gradient_accumulation_steps=1'


@pytest.mark.parametrize(
    ('flags', 'device', 'compiled'),
    [
        ('', 'cuda:0', True),
        ('--max_iters=5', 'cuda:0', False),  # over before it is compiled
        ('--max_iters=5 --compile=True', 'cuda:0', True),
        ('--compile=False', 'cuda:0', False),
        (SHORT, 'cuda:0', False),  # a CUDA graph launches its kernels
        (f'{SHORT} --cuda_graph=False', 'cuda:0', True),
        ('', 'cpu', False),
    ],
)
def test_the_plan_is_of_a_compiled_step_where_the_run_will_compile(flags, device, compiled):
    config = settings_of(str(ROOT / 'train.py'), ['--peak_tflops=989', *flags.split()])
    runtime = Runtime(device, torch.bfloat16)
    assert memory_module.workload_of(config, GPT2, runtime).compiled == compiled


def test_the_plan_counts_the_soft_targets_of_an_update():
    peaks = []
    for order in ('None', '4'):
        flags = ['--batch_size=2', '--gradient_accumulation_steps=3', f'--ngram_order={order}']
        config = settings_of(str(ROOT / 'train.py'), flags)
        peaks.append(
            memory_module.estimate(memory_module.workload_of(config, SMALL.shape, CPU)).total()
        )
    assert peaks[1] - peaks[0] == 4 * 2 * 3 * SMALL.shape.block_size * SMALL.shape.vocab_size


@pytest.mark.parametrize(
    ('memory', 'rows'),
    [(85e9, 48), (24e9, 40), (16e9, 24), (9e9, None), (7.5e9, None)],
)
def test_a_larger_micro_batch_is_suggested_where_it_fits_with_room(memory, rows, monkeypatch):
    monkeypatch.setattr(memory_module, 'eager_peak', lambda workload: Counter())
    fits, table = memory_report.tabulate(
        replace(COMPILED, micro_steps=40), 'cuda:0', memory, fresh=True
    )
    assert fits
    found = re.search(
        r'faster, .* GB: --batch_size=(\d+) --gradient_accumulation_steps=(\d+)', table
    )
    assert (found and int(found[1])) == rows
    assert not found or rows * int(found[2]) == 480  # the same global batch


def test_no_larger_micro_batch_is_suggested_where_it_would_not_be_faster(monkeypatch):
    monkeypatch.setattr(memory_module, 'eager_peak', lambda workload: Counter())
    for workload in (
        replace(COMPILED, micro_batch_size=48, micro_steps=10),
        COMPILED,  # a single micro-batch
        replace(COMPILED, device='cpu', micro_steps=40),
    ):
        assert memory_report.suggest_larger_batch(workload, 1e12) is None


def test_on_a_gpu_only_some_logits_are_there_at_a_time():
    assert (
        memory_module.min_bytes(COMPILED)
        < 2.5e9
        < memory_module.min_bytes(replace(COMPILED, device='cpu'))
    )


# --- what it comes to


MEASURED = (  # one process or two, and the settings
    (1, '--n_layer=6 --n_embd=384 --batch_size=8 --dtype=float32 --arch=modern'),
    (1, '--n_layer=6 --n_embd=384 --batch_size=8 --dtype=bfloat16'),
    (2, '--n_layer=4 --n_embd=512 --batch_size=8 --dtype=float32 --shard'),
)


@pytest.mark.faults  # for their length
@pytest.mark.parametrize(('ranks', 'flags'), MEASURED)
def test_a_run_takes_what_the_plan_says(script, tmp_path, ranks, flags):
    data = make_dataset(tmp_path / 'data', byte_tokenizer(), train=20_000, val=4000)
    flags = f'{flags} --n_head=4 --block_size=256 --dataset={data} --out_dir={tmp_path / "run"}'
    flags += f' --max_iters=4 --gradient_accumulation_steps={ranks} --eval_interval=None'
    flags += ' --eval_iters=1 --sample_tokens=0 --device=cpu --compile=False --warmup_iters=0'
    python = TORCHRUN if ranks > 1 else ()
    planned, done = (
        script('train.py', *flags.split(), *more, python=python) for more in (['--plan'], [])
    )
    assert planned.returncode == done.returncode == 0, planned.stderr + done.stderr
    low, high = re.search(r'process memory: ([\d,]+) to ([\d,]+) MB', planned.stdout).groups()
    took = float(re.search(r'peak memory ([\d,]+) MB', done.stdout)[1].replace(',', ''))
    low, high = (float(text.replace(',', '')) for text in (low, high))
    assert 0.9 * low <= took <= 1.1 * high  # the same command varies, and processors do


def test_what_does_not_fit_gets_changes_that_do(monkeypatch):
    for name in ('LIBRARY_BYTES', 'LIBRARY_BYTES_RANKS'):  # more here than all the rest
        monkeypatch.setattr(memory_module, name, 0)
    workload = replace(SMALL, micro_batch_size=16, micro_steps=1, saves=False)
    memory = 0.6 * memory_module.max_bytes(workload)
    found = memory_report.suggest_savings(workload, memory)
    assert all(size <= memory for _, size in found)
    texts = [text for text, _ in found]
    fewer = next(text for text in texts if text.startswith('--batch_size'))
    rows, steps = map(int, re.findall(r'=(\d+)', fewer))
    assert rows * steps == 16  # the same global batch
    assert any('--shard' in text for text in texts)


MPS = 'MPS backend out of memory (MPS allocated: 8.97 GiB, max allowed: 9.07 GiB).'


@pytest.mark.parametrize('room', [40, 8, 4])
@pytest.mark.parametrize(('rows', 'steps'), [(12, 1), (5, 3)])
def test_following_the_advice_of_each_lack_of_memory_ends_in_a_run(
    run_here, tmp_path, monkeypatch, room, rows, steps
):
    forward = GPT.forward

    def in_a_small_room(self, idx, *others, **options):
        # the tokens whose activations are kept at once; half as much if they are computed twice
        if self.training and idx.numel() > (2 if self.trunk.recompute else 1) * room:
            raise RuntimeError(MPS)
        return forward(self, idx, *others, **options)

    monkeypatch.setattr(GPT, 'forward', in_a_small_room)
    batch = f'--batch_size={rows}', f'--gradient_accumulation_steps={steps}'
    args = f'--out_dir={tmp_path}', '--overwrite', '--eval_interval=None', *batch
    advice = follow_advice(run_here, *args)
    settings = dict(flag.split('=') for text in advice for flag in text.split() if '=' in flag)
    fewer, more = settings['--batch_size'], settings['--gradient_accumulation_steps']
    assert int(fewer) * int(more) == rows * steps
    assert ('--gradient_checkpointing' in advice) == (room < 16)
    assert ('--block_size=8' in advice) == (room < 8)


def test_a_resumed_run_is_not_advised_to_change_its_shape(monkeypatch):
    settings = {'batch_size': 1, 'gradient_accumulation_steps': 4, 'block_size': 64}
    settings |= {'gradient_checkpointing': True, 'shard': False, 'offload': False}
    settings |= {'objective': 'lm', 'rl_tokens': 16}
    data, state = SimpleNamespace(window_tokens=64), SimpleNamespace(step=3, samples=0)

    def advice(device, **changes):
        config = {**settings, **changes}
        return BatchLoader(
            data, state, config, Runtime(device, torch.float32)
        ).suggest_smaller_batch()

    assert advice('cpu') == 'a machine with more memory'
    assert '--shard with torchrun' in advice('cuda:0')
    assert advice('cuda:0', objective='rl') == 'a GPU with more memory'
    assert advice('cuda:0', shard=True) == '--offload'
    assert advice('cuda:0', shard=True, offload=True) == 'a GPU with more memory, more GPUs'
    state.step = 0
    assert advice('cpu').startswith('--block_size=32 ')
    assert advice('cpu', block_size=1) == 'a smaller model'
    assert advice('cpu', objective='rl') == '--rl_tokens=8 or a smaller model'


def test_a_model_that_does_not_fit_is_followed_by_one_that_can_be():
    config = {'init_from': 'scratch', 'n_head': 6, 'n_embd': 100, 'n_layer': 9, 'arch': 'modern'}
    config |= {'objective': 'lm'}
    assert memory_report.suggest_smaller_model(config) == 'a smaller model, such as --n_embd=48'
    GPTConfig(arch='modern', n_head=6, n_embd=48)
    few = memory_report.suggest_smaller_model({**config, 'n_embd': 12})
    assert few == 'a smaller model, such as --n_layer=4'
    assert '--n_' not in memory_report.suggest_smaller_model({**config, 'init_from': 'gpt2-xl'})


def test_where_nothing_fits_the_nearest_is_named():
    (only,) = memory_report.suggest_savings(SMALL, memory=1e6)
    assert only[1] > 1e6


@pytest.mark.parametrize('shape', [XL, SEVEN_B], ids=['gpt2-xl', '7B'])
def test_a_large_model_is_refused_with_a_change_that_fits(shape, monkeypatch):
    monkeypatch.setattr(memory_report, 'available_memory', lambda runtime: 24e9)
    workload = MemoryWorkload(
        shape, 'cpu', torch.bfloat16, 'adamw', micro_batch_size=1, saves=False
    )
    assert memory_module.min_bytes(workload) > 24e9
    monkeypatch.setattr(
        memory_report, 'possible_savings', lambda workload: []
    )  # each takes a second
    fits, table = memory_report.check_fit(workload, CPU)
    assert not fits
    assert 'does not fit in the 24.0 GB free on cpu' in table
    assert '--n_layer=' in table


@pytest.mark.parametrize('shape', [XL, SEVEN_B], ids=['gpt2-xl', '7B'])
def test_a_large_model_is_built_steps_and_has_a_checkpoint_without_memory(shape):
    optimizer = 'adamw' if shape.arch == 'gpt2' else 'muon'
    workload = MemoryWorkload(shape, 'cpu', torch.bfloat16, optimizer, micro_batch_size=1)
    with FakeTensorMode():
        model = build_fake_model(workload)
        optimizers = build_fake_optimizers(workload, model)
        with torch.autocast('cpu', torch.bfloat16):
            loss_of(model, **build_fake_batch(workload)).backward()
        for each in optimizers:
            each.step()
        tensors = tensors_of(model, optimizers)
        assert size_of(tensors) == pytest.approx(memory_module.checkpoint_size(workload), rel=1e-5)
    assert {name: len(named) for name, named in tensors.items()} == {
        'model.safetensors': 580 if shape is XL else 194,
        'optimizer.safetensors': 3 * 580 if shape is XL else 2 * 192 + 3 * 2,
    }


@pytest.mark.faults  # for its length
def test_a_model_as_wide_as_gpt2_xl_trains_sharded_and_saves(script, dataset, tmp_path):
    shape = '--n_layer=1 --n_head=25 --n_embd=1600 --bias --block_size=32'.split()
    run = f'--batch_size=1 --gradient_accumulation_steps=2 --dataset={dataset} --max_iters=1'
    run += ' --eval_iters=1 --sample_tokens=0 --device=cpu --dtype=float32 --warmup_iters=0'
    where = tmp_path / 'run'
    done = script(
        'train.py', *shape, *run.split(), '--shard', f'--out_dir={where}', python=TORCHRUN
    )
    assert done.returncode == 0, done.stderr
    (path,) = list_checkpoints(where)
    verify_checkpoint(path)
    assert len(list(path.glob('model-*-of-00002.safetensors'))) == 2
