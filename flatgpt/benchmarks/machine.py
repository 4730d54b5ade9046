"""The machine that bench.py runs on: its peak speeds, its memory counter, its clock."""

import contextlib
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flatgpt.errors import counted
from flatgpt.runtime import Runtime, synchronize

# Sizes of the measurements: large enough to saturate the device
READ_BYTES = {'cpu': 2**29, 'gpu': 2**32}
MATRIX_SIZE = {'cpu': 2048, 'gpu': 8192}
MATRIX_SECONDS = 0.5  # matrices are smaller where a product takes longer: bfloat16 on many CPUs


def measure_machine(runtime: Runtime) -> dict:
    """The limits of any program: memory bandwidth in bytes/s, matrix multiplication in FLOP/s."""
    device = runtime.device
    found = {'device': device, 'python': platform.python_version(), 'torch': torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found['transformers'] = importlib.metadata.version('transformers')
    found['threads'] = torch.get_num_threads() if device == 'cpu' else None
    on_cuda = runtime.device_type == 'cuda'
    found['name'] = torch.cuda.get_device_name(device) if on_cuda else processor_name()
    found['read_bytes_per_second'] = measure_bandwidth(device)
    for dtype in {torch.float32, torch.bfloat16, runtime.dtype}:
        found[f'flops_{str(dtype).removeprefix("torch.")}'] = measure_matmul(device, dtype)
    print_machine(found)
    return found


def measure_bandwidth(device: str) -> float:
    """Bytes per second of reading memory."""
    numbers = torch.ones(READ_BYTES['cpu' if device == 'cpu' else 'gpu'] // 4, device=device)
    return numbers.numel() * 4 / time_repeatedly(numbers.sum, device)


def measure_matmul(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of multiplying square matrices."""
    largest = MATRIX_SIZE['cpu' if device == 'cpu' else 'gpu']
    size = min(256, largest)
    while True:
        a = torch.randn(size, size, device=device).to(dtype)
        # the median of three: the first also starts threads and libraries
        seconds = time_repeatedly(lambda a=a: a @ a, device, times=3)
        if size == largest or 8 * seconds > MATRIX_SECONDS:  # of the next size
            return 2 * size**3 / time_repeatedly(lambda a=a: a @ a, device)
        size *= 2


def print_machine(found: dict) -> None:
    flops = {name: found[name] / 1e9 for name in sorted(found) if name.startswith('flops_')}
    matmul = ', '.join(f'{name.removeprefix("flops_")} {n:,.0f}' for name, n in flops.items())
    threads = f', {counted(found["threads"], "thread")}' if found['threads'] else ''
    print(f'{found["name"]}{threads}, torch {torch.__version__}')
    bandwidth = found['read_bytes_per_second'] / 1e9
    print(f'memory bandwidth {bandwidth:.0f} GB/s; matmul GFLOP/s: {matmul}')


def processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def time_repeatedly(run: Callable, device: str, times: int = 9) -> float:
    """Median seconds of run()."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def reset_peak_memory(device: str) -> None:
    """Restart the counter of Runtime.peak_memory(), where the system allows it."""
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux: resets the high-water mark
        Path('/proc/self/clear_refs').write_text('5')
