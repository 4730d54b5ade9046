"""The runtime: choice of device, dtype and backend, collectives, and errors of the machine."""

import re
import socket
import threading
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial

import conftest
import pytest
import torch
from error_lines import case, error_line

from flatgpt import ROOT, runtime
from flatgpt.errors import ConfigError, UserError
from flatgpt.runtime import (
    Runtime,
    init_runtime,
    pick_backend,
    pick_device,
    pick_dtype,
    to_device,
)

CPU = Runtime('cpu', torch.float32)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)


@pytest.fixture
def gpus(monkeypatch):
    """Pretend to have two GPUs, with or without bfloat16."""

    def pretend(name='NVIDIA A100-SXM4-80GB', bf16=True, capability=(8, 0), built=('sm_80',)):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: name)
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **_: bf16)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda: [*built])
        monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
        monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda precision: None)

    return pretend


refused = partial(conftest.refused, error=ConfigError)


def test_auto_selects_the_best_available_device(no_gpu, gpus, monkeypatch):
    assert pick_device('auto') == 'cpu'
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert pick_device('auto') == 'mps'
    gpus()
    assert pick_device('auto') == 'cuda'


@pytest.mark.parametrize('name', ['cuda', 'cuda:0', 'mps'])
def test_a_missing_device_is_refused_with_advice(no_gpu, name):
    text = refused(pick_device, name)
    assert text.startswith(f'device={name!r}: ')
    assert '--device=auto' in text


def test_a_gpu_number_beyond_the_last_is_refused(gpus):
    gpus()
    assert pick_device('cuda:1') == 'cuda:1'
    assert 'the last one is cuda:1' in refused(pick_device, 'cuda:2')


CU13 = ('sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120', 'compute_120')


@pytest.mark.parametrize('device', ['auto', 'cuda', 'cuda:1'])
@pytest.mark.parametrize(
    ('capability', 'built', 'runs'),
    [
        ((7, 0), CU13, False),  # V100
        ((7, 5), CU13, True),  # T4
        ((8, 9), CU13, True),  # RTX 4090, by the kernels of 8.6
        ((9, 0), ('sm_90a',), True),
        ((8, 0), ('sm_86',), False),
        ((13, 0), CU13, True),  # compiled by the driver
        ((13, 0), ('sm_120',), False),
        ((9, 4), ('gfx90a', 'gfx942'), True),  # AMD
        ((7, 0), (), True),  # unknown
    ],
)
def test_a_gpu_without_kernels_in_this_torch_is_refused(gpus, capability, built, runs, device):
    gpus('Tesla V100-SXM2-16GB', capability=capability, built=built)
    if runs:
        assert pick_device(device).startswith('cuda')
    else:
        text = refused(pick_device, device)
        assert 'Tesla V100' in text
        assert '--device=cpu' in text


@pytest.mark.parametrize('name', ['gpu', 'CPU', 'cuda:x', 'cuda:-1', 'tpu', ''])
def test_an_unknown_device_is_refused(gpus, name):
    gpus()
    assert 'must be auto, cpu, mps, cuda' in refused(pick_device, name)


def test_the_auto_dtype_is_the_fastest_safe_one(gpus, monkeypatch):
    gpus()
    assert pick_dtype('auto', 'cuda:0') == torch.bfloat16
    gpus(bf16=False)
    assert pick_dtype('auto', 'cuda:0') == torch.float16
    assert pick_dtype('auto', 'mps') == torch.float32
    assert pick_dtype('bfloat16', 'cpu', training=True) == torch.bfloat16


INTEL, AMD = {'cpu_name': 'Intel Xeon'}, {'cpu_name': 'AMD EPYC'}
AVX512_BF16 = {'avx512_bf16': True}


@pytest.mark.parametrize(
    ('processor', 'trains_in', 'generates_in'),
    [
        ({}, torch.float32, torch.float32),
        (INTEL, torch.float32, torch.float32),
        (AMD | AVX512_BF16, torch.bfloat16, torch.bfloat16),
        (INTEL | AVX512_BF16, torch.float32, torch.bfloat16),
        (INTEL | AVX512_BF16 | {'amx_bf16': True}, torch.bfloat16, torch.bfloat16),
        (AVX512_BF16, torch.bfloat16, torch.bfloat16),  # of a torch that does not name it
    ],
)
def test_training_uses_bfloat16_where_it_is_faster(monkeypatch, processor, trains_in, generates_in):
    monkeypatch.setattr(runtime, 'cpu_capabilities', lambda: processor)
    assert pick_dtype('auto', 'cpu', training=True) == trains_in
    assert runtime.product_dtype(torch.device('cpu')) == trains_in
    assert pick_dtype('auto', 'cpu') == generates_in


def test_an_unsupported_dtype_is_refused_with_an_alternative(gpus):
    gpus('Tesla T4', bf16=False)
    text = refused(pick_dtype, 'bfloat16', 'cuda:0')
    assert 'Tesla T4' in text
    assert '--dtype=float16' in text
    assert '--dtype=float32' in refused(pick_dtype, 'float16', 'cpu', True)
    assert 'bfloat16' in refused(pick_dtype, 'fp8', 'cpu')


def test_a_backend_fits_the_device(gpus):
    gpus()
    assert pick_backend('auto', 'cpu') == 'gloo'
    assert pick_backend('gloo', 'cuda:0') == 'gloo'
    assert '--backend=auto' in refused(pick_backend, 'no_such', 'cpu')
    assert '--backend=auto' in refused(pick_backend, 'nccl', 'cpu')


def test_start_without_torchrun_is_one_process(no_gpu, monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    machine = init_runtime('cpu', 'float32')
    assert (machine.device, machine.rank, machine.world_size) == ('cpu', 0, 1)
    assert machine.is_main


def test_more_processes_than_gpus_are_refused(gpus, monkeypatch):
    gpus()
    monkeypatch.setenv('LOCAL_RANK', '2')
    monkeypatch.setenv('WORLD_SIZE', '3')
    assert '--nproc_per_node' in refused(init_runtime, 'cuda')


def test_each_process_gets_its_gpu(gpus, monkeypatch):
    gpus()
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert init_runtime('auto', 'float32').device == 'cuda:1'
    assert init_runtime('cuda:0', 'float32').device == 'cuda:0'


def test_collectives_of_one_process_return_its_own_values():
    assert CPU.all_reduce([1.5, 2]) == [1.5, 2]
    assert CPU.all_reduce([1.5], 'MAX') == [1.5]
    assert CPU.broadcast_from_rank0(lambda: 'yes') == 'yes'

    def refuse():
        raise UserError('no')

    with pytest.raises(UserError, match='no'):
        CPU.broadcast_from_rank0(refuse)


def test_one_process_exits_with_its_status():
    with pytest.raises(SystemExit) as end:
        CPU.exit(3)
    assert end.value.code == 3


def test_random_numbers_depend_on_seed_step_and_rank_only():
    def draw(seed, step, rank=0):
        Runtime('cpu', torch.float32, rank, 2).seed(seed, step)
        return torch.rand(4).tolist()

    assert draw(1, 5) == draw(1, 5)
    assert len({tuple(draw(*args)) for args in ((1, 5), (2, 5), (1, 6), (1, 5, 1))}) == 4
    draw(2**40, 10**9)  # large values work too
    draw(-1, 0)


def test_autocast_is_on_only_for_16_bit_dtypes():
    assert isinstance(CPU.autocast(), nullcontext)
    with Runtime('cpu', torch.bfloat16).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ('name', 'tflops'),
    [
        ('NVIDIA H100 PCIe', 756),
        ('NVIDIA H100 80GB HBM3', 989),
        ('NVIDIA H100 NVL', 835),
        ('NVIDIA H200', 989),
        ('NVIDIA H20', 148),
        ('NVIDIA GH200 480GB', 989),
        ('NVIDIA B200', 2250),
        ('NVIDIA GB200', 2500),
        ('NVIDIA A100-SXM4-80GB', 312),
        ('NVIDIA A100-PCIE-40GB', 312),
        ('NVIDIA A10G', 70),
        ('NVIDIA A10', 125),
        ('NVIDIA A40', 150),
        ('NVIDIA L4', 121),
        ('NVIDIA L40', 181),
        ('NVIDIA L40S', 362),
        ('Tesla T4', 65),
        ('Tesla V100-SXM2-16GB', 125),
        ('NVIDIA RTX 6000 Ada Generation', 364),
        ('NVIDIA GeForce RTX 4090', 165),
        ('AMD Instinct MI300X', 1307),
        ('NVIDIA RTX A4000', None),  # not the A40
        ('NVIDIA RTX A1000', None),  # not the A100
        ('NVIDIA RTX A3000 Laptop GPU', None),
        ('NVIDIA T400 4GB', None),
        ('NVIDIA Future X1', None),
    ],
)
def test_the_peak_is_that_of_the_exact_gpu_model(gpus, name, tflops):
    gpus(name)
    peak = Runtime('cuda:0', torch.bfloat16).peak_flops()
    assert peak == (tflops and tflops * 1e12)


def test_the_peak_is_unknown_for_a_cpu_and_for_float32(gpus):
    gpus()
    assert CPU.peak_flops() is None
    assert Runtime('cpu', torch.bfloat16).peak_flops() is None
    assert Runtime('cuda:0', torch.float32).peak_flops() is None


def test_freed_memory_is_kept_if_the_c_library_supports_it(monkeypatch):
    asked = []

    class Library:
        def mallopt(self, name, value):
            asked.append((name, value))

    monkeypatch.setattr(runtime.ctypes, 'CDLL', lambda name: Library())
    runtime.keep_freed_memory()
    assert asked == [(-4, 0), (-1, 2**31 - 1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    monkeypatch.setattr(runtime.ctypes, 'CDLL', lambda name: object())  # musl, macOS
    runtime.keep_freed_memory()


@pytest.mark.parametrize(
    ('device', 'copies'),
    [
        ('cpu', [('cpu', {})]),
        ('mps', [('mps', {})]),  # pageable memory may be freed before an Apple GPU has read it
        ('cuda:1', ['pinned', ('cuda:1', {'non_blocking': True})]),
    ],
)
def test_only_copies_to_cuda_are_asynchronous_and_from_pinned_memory(device, copies):
    done = []

    class Double(torch.Tensor):
        def pin_memory(self):
            done.append('pinned')
            return self

        def to(self, device, **how):
            done.append((str(device), how))
            return self

    for name in (device, torch.device(device)):
        done.clear()
        to_device(torch.ones(2).as_subclass(Double), name)
        assert done == copies


def test_only_these_files_copy_asynchronously():
    files = [*ROOT.glob('*.py'), *ROOT.glob('flatgpt/**/*.py'), *ROOT.glob('data/*/*.py')]
    asking = {str(path.relative_to(ROOT)) for path in files if 'non_blocking' in path.read_text()}
    assert asking == {
        'flatgpt/checkpoint/save.py',
        'flatgpt/inference/decode_graph.py',
        'flatgpt/runtime.py',
        'flatgpt/training/update.py',
    }


MPS = 'MPS backend out of memory (MPS allocated: 8.97 GiB, other allocations: 1 MiB, max ...)'
CUBLAS = 'CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'
CPU_FULL = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you"
WINDOWS = '[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you'
OF_THE_DEVICE = [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'),
    *map(RuntimeError, (MPS, CUBLAS, 'CUDA error: out of memory', 'CUDNN_STATUS_ALLOC_FAILED')),
]
OF_THE_HOST = [MemoryError(), *map(RuntimeError, (CPU_FULL, WINDOWS))]


@pytest.mark.parametrize('error', [*OF_THE_DEVICE, *OF_THE_HOST], ids=lambda error: str(error)[:40])
def test_every_out_of_memory_error_is_recognized(error):
    assert runtime.is_out_of_memory(error)
    text = str(runtime.out_of_memory(error, 'cuda:0', '--batch_size=2'))
    assert '\n' not in text
    if error in OF_THE_DEVICE:
        assert text == 'out of memory on cuda:0; try --batch_size=2'
    else:  # smaller batches would not help
        assert text.startswith('out of main memory while using cuda:0; ')
        assert '--batch_size' not in text
    text = str(runtime.out_of_memory(error, 'cpu', '--batch_size=2'))
    assert text == 'out of memory on cpu; try --batch_size=2'


@pytest.mark.parametrize(
    'error',
    [ValueError('out of memory'), RuntimeError('mat1 and mat2 shapes cannot be multiplied')],
)
def test_other_errors_are_not_taken_for_out_of_memory_errors(error):
    assert not runtime.is_out_of_memory(error)


@pytest.mark.parametrize('fails', [False, True])
def test_a_rank_waits_for_the_slowest_or_raises_its_error(fails):
    distributed = pytest.importorskip('torch.distributed', reason='torch was built without it')
    store, ends, alive = distributed.HashStore(), {}, []

    def copy(rank):
        if rank == 0:
            while not alive:  # until the other one waits
                time.sleep(0.01)
            if fails:
                raise UserError('the disk is full')
        return rank

    def run(rank):
        there = Runtime('cpu', torch.float32, rank, 2, store)
        try:
            ends[rank] = there.wait_for_all(lambda: copy(rank), lambda: alive.append(rank))
        except UserError as error:
            ends[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert ends == (
        {0: 'the disk is full', 1: 'rank 0: the disk is full'} if fails else {0: 0, 1: 1}
    )
    assert 1 in alive


# -----------------------------------------------------------------------------
# error lines, and what follows from their advice


@pytest.mark.parametrize(
    ('gpu', 'function', 'bad', 'good', 'result'),
    [
        case('finds no CUDA GPU', None, pick_device, ['cuda'], ['auto'], 'cpu'),
        case('finds no Apple GPU', None, pick_device, ['mps'], ['auto'], 'cpu'),
        case('or one GPU such as cuda:0', {}, pick_device, ['gpu'], ['cuda:0'], 'cuda:0'),
        case('the last one is cuda:', {}, pick_device, ['cuda:2'], ['cuda:1'], 'cuda:1'),
        case('has no kernels for', {'built': ['sm_90']}, pick_device, ['cuda'], ['cpu'], 'cpu'),
        case('dtype={}: must', None, pick_dtype, ['fp8', 'mps'], ['auto', 'mps'], torch.float32),
        case(
            'training in float16 needs a GPU',
            *(None, pick_dtype, ['float16', 'cpu', True], ['bfloat16', 'cpu', True]),
            torch.bfloat16,
        ),
        case(
            'has no bfloat16, which',
            *({'bf16': False}, pick_dtype, ['bfloat16', 'cuda'], ['float16', 'cuda']),
            torch.float16,
        ),
        case(
            'this torch does not have', None, pick_backend, ['no', 'cpu'], ['auto', 'cpu'], 'gloo'
        ),
        case('needs CUDA GPUs, but', None, pick_backend, ['nccl', 'cpu'], ['auto', 'cpu'], 'gloo'),
    ],
)
def test_the_advice_for_device_dtype_and_backend_works(
    no_gpu, gpus, monkeypatch, gpu, function, bad, good, result
):
    monkeypatch.setattr(runtime.dist, 'is_backend_available', lambda name: name == 'nccl')
    if gpu is not None:
        gpus(**gpu)
    refused(function, *bad)
    assert function(*good) == result


@pytest.fixture
def torchrun(monkeypatch):
    """Pretend that torchrun started this process as rank 0 of two."""
    for name in ('rendezvous', 'check_ranks_match'):
        monkeypatch.setattr(runtime, name, lambda *args: None)
    monkeypatch.setattr(runtime.dist, 'init_process_group', lambda *args, **options: None)
    monkeypatch.setattr(runtime.dist, 'is_nccl_available', lambda: True)
    monkeypatch.setattr(runtime.dist, 'is_backend_available', lambda name: True)
    for name, value in {'RANK': 0, 'LOCAL_RANK': 0, 'WORLD_SIZE': 2, 'LOCAL_WORLD_SIZE': 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')


@error_line('Apple GPUs train in one process; use --device=cpu')
def test_several_processes_on_an_apple_gpu_are_refused_until_they_use_the_cpu(
    no_gpu, torchrun, monkeypatch
):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    refused(init_runtime, 'mps')
    assert init_runtime('cpu', 'float32').world_size == 2
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name)
    assert init_runtime('mps').device == 'mps'


@error_line('NCCL needs a GPU for each; use --device=cuda')
def test_several_processes_on_one_gpu_are_refused_until_each_uses_its_own(torchrun, gpus):
    gpus()
    refused(init_runtime, 'cuda:1', 'float32')
    assert init_runtime('cuda', 'float32').device == 'cuda:0'


@error_line('torchrun started a process for GPU {}')
def test_following_the_advice_each_process_has_a_gpu(gpus, monkeypatch):
    gpus()
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setenv('LOCAL_RANK', '2')
    processes = int(re.search(r'--nproc_per_node=(\d+)', refused(init_runtime, 'cuda'))[1])
    for rank in range(processes):
        monkeypatch.setenv('LOCAL_RANK', str(rank))
        assert init_runtime('cuda', 'float32').device == f'cuda:{rank}'


@error_line('which cannot be split equally over {} processes')
def test_the_advised_batches_can_be_split():
    for world_size, batch_size, steps in ((3, 4, 2), (6, 4, 7), (4, 2, 9)):
        ranks = Runtime('cpu', torch.float32, 0, world_size)
        text = refused(ranks.split_batch, steps * batch_size, batch_size)
        advised = re.search(r'--gradient_accumulation_steps=(\d+)(?: or (\d+))?$', text).groups()
        for count in map(int, filter(None, advised)):
            mine, rows = ranks.split_batch(count * batch_size, batch_size)
            assert mine * world_size == count * batch_size
            assert mine % rows == 0


@error_line('the processes cannot connect to {}: {}; the address must')
def test_a_port_in_use_is_refused_and_a_free_one_works(monkeypatch):
    pytest.importorskip('torch.distributed', reason='torch was built without it')
    for name, value in {'MASTER_ADDR': '127.0.0.1', 'RANK': '0', 'WORLD_SIZE': '1'}.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as used:
        used.bind(('127.0.0.1', 0))
        used.listen()
        monkeypatch.setenv('MASTER_PORT', str(used.getsockname()[1]))
        with pytest.raises(UserError, match='cannot connect to'):
            runtime.rendezvous(CPU, timedelta(seconds=5))
    store = runtime.rendezvous(CPU, timedelta(seconds=5))
    store.set('key', 'value')
    assert store.get('key') == b'value'


@error_line(
    'rank {} on {} has {} {}, but rank 0 on {} has {}; use the same on all ranks',
    'runs another version of the code than',
    'rank {} did not start; check its output, and start all',
)
def test_ranks_must_all_start_with_the_same_facts():
    distributed = pytest.importorskip('torch.distributed', reason='torch was built without it')

    def check(facts, name='seed'):
        store, errors = distributed.HashStore(), []
        store.set_timeout(timedelta(seconds=5 if len(facts) == 2 else 0.05))

        def run(rank):
            try:
                ranks = Runtime('cpu', torch.float32, rank, 2)
                runtime.check_ranks_match(ranks, store, {name: facts[rank]})
            except UserError as error:
                errors.append(str(error))

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(facts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return errors

    (line,) = check(['a'])
    assert 'rank 1 did not start' in line
    lines = check(['a', 'b'])
    assert len(lines) == 2
    assert all("has seed 'b', but rank 0" in line for line in lines)
    lines = check(['a', 'b'], 'code')
    assert len(lines) == 2
    assert all('runs another version of the code than rank 0' in line for line in lines)
    assert check(['a', 'a'], 'code') == check(['a', 'a']) == []


def test_the_first_mismatch_is_the_lowest_rank_that_differs(monkeypatch):
    def first(*values):
        seen, size = [], len(values)
        monkeypatch.setattr(Runtime, 'broadcast_from_rank0', lambda self, decide: values[0])
        monkeypatch.setattr(
            Runtime, 'all_reduce', lambda self, own, op: seen.append(own[0]) or [max(seen)]
        )
        ranks = [Runtime('cpu', torch.float32, rank, size) for rank in range(size)]
        found = [rank.first_mismatch(value) for rank, value in zip(ranks, values, strict=True)]
        return found[-1]  # the last rank has seen what all others gave

    assert first(1, 1, 1) == 0
    assert first(1, 1, 2, 3) == 2
    assert first(1, 0, 2) == 1
