"""
The runtime of a script: device, dtype, process group and collectives.

    runtime = init_runtime(device='auto', dtype='auto', backend='auto')
    with runtime.autocast(): ...
"""

import ctypes
import hashlib
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from flatgpt import ROOT
from flatgpt.errors import ConfigError, UserError, explain_errors

CLOCK_SECONDS = 60  # largest tolerated difference between the clocks of two machines
DTYPES = {
    'float32': torch.float32,
    'bfloat16': torch.bfloat16,
    'float16': torch.float16,
}

# messages of torch's allocators (CUDA, MPS, Linux, Windows), cuBLAS, cuDNN and torch.empty
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|_STATUS_ALLOC_FAILED|"
    r'Storage size calculation overflowed'
)

# Dense 16-bit matrix products, TFLOP/s, from the vendors' data sheets. The first entry that is part
# of the device's name counts, so 'H100 PCIe' comes before 'H100'.
PEAK_TFLOPS = {
    'B300': 2250,
    'B200': 2250,
    'GB200': 2500,
    'H200': 989,
    'H100 PCIe': 756,
    'H100 NVL': 835,
    'H100': 989,
    'GH200': 989,
    'H20': 148,
    'A100': 312,
    'A800': 312,
    'A40': 150,
    'A30': 165,
    'A10G': 70,
    'A10': 125,
    'L40S': 362,
    'L40': 181,
    'L4': 121,
    'T4': 65,
    'V100': 125,
    'RTX PRO 6000': 500,
    'RTX 6000 Ada': 364,
    'RTX A6000': 155,
    'RTX 5090': 210,
    'RTX 4090': 165,
    'RTX 4080': 97,
    'RTX 3090': 71,
    'RTX 3080': 60,
    'MI325X': 1307,
    'MI300X': 1307,
    'MI250X': 383,
}


@dataclass(frozen=True)
class Runtime:
    device: str  # 'cpu', 'mps', 'cuda:0' ...
    dtype: torch.dtype  # of matrix products; parameters stay float32
    rank: int = 0  # of this process
    world_size: int = 1  # processes on all nodes
    store: dist.Store | None = None  # key-value store of all ranks; None outside torchrun

    def __str__(self) -> str:
        processes = f', {self.world_size} processes' if self.world_size > 1 else ''
        return f'{self.device}, {self.dtype_name}{processes}'

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix('torch.')

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes files."""
        return self.rank == 0

    @property
    def launch_command(self) -> str:
        """The command that starts as many processes; ... stands for multi-node flags."""
        if self.store is None:
            return 'python'
        here = local_world_size()
        flags = '--standalone' if here == self.world_size else '...'
        return f'torchrun {flags} --nproc_per_node={here}'

    @property
    def is_local_main(self) -> bool:
        """Whether this process is the first on its machine."""
        return int(os.environ.get('LOCAL_RANK', 0)) == 0

    @property
    def is_interactive(self) -> bool:
        """Whether this process shows a progress bar: rank 0 on a terminal."""
        return self.is_main and sys.stderr.isatty()

    @property
    def device_type(self) -> str:
        return self.device.partition(':')[0]

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype for sums over many values: float64, which Apple GPUs lack."""
        return torch.float32 if self.device_type == 'mps' else torch.float64

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device_type, self.dtype)

    def print0(self, text: str) -> None:
        """Print on rank 0 only, above the progress bar if there is one."""
        if self.is_main:
            with suppress(OSError):  # a closed pipe or terminal must not stop the training
                tqdm.write(text)
                sys.stdout.flush()  # so that a pipe or log file gets it now

    def seed(self, seed: int, step: int) -> None:
        """Seed torch for one step of this rank, so that a checkpoint needs no RNG state."""
        torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + self.rank) % 2**63)

    def all_reduce(self, values: list[float], op: str = 'SUM') -> list[float]:
        """`values` reduced over all ranks by 'SUM' or 'MAX'."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=self.sum_dtype, device=self.device)
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op))
        return tensor.tolist()

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place and without waiting for a GPU."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_from_rank0(self, function: Callable):
        """The result, on every rank, of calling function() on rank 0; or its UserError."""
        if self.world_size == 1:
            return function()
        outcome = [None, None]  # result, error
        if self.is_main:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, device=torch.device(self.device))
        result, error = outcome
        if error is not None:
            raise error
        return result

    def first_mismatch(self, value) -> int:
        """The first rank whose value differs from rank 0's; 0 if there is none."""
        differs = value != self.broadcast_from_rank0(lambda: value)
        distance = self.all_reduce([(self.world_size - self.rank) * differs], 'MAX')[0]
        return (self.world_size - int(distance)) % self.world_size

    def wait_for_all(self, function: Callable, keep_alive: Callable):
        """The result of function(), once it has returned on every rank, however long that takes.

        An error on one rank is a UserError on the others. keep_alive() is called while this rank
        waits.
        """
        if self.store is None:
            return function()
        try:
            result = function()
        except BaseException as error:
            kind = '' if isinstance(error, UserError) else f'{type(error).__name__}: '
            with suppress(dist.DistError):  # the store itself may have failed
                self.store.set('failed', f'rank {self.rank}: {kind}{error}')
                time.sleep(0.5)  # rank 0 may host the store, which the others still read
            raise
        self.store.add('ready', 1)
        while self.store.add('ready', 0) < self.world_size:
            if self.store.check(['failed']):
                raise UserError(self.store.get('failed').decode())
            keep_alive()
            time.sleep(0.1)
        return result

    def peak_flops(self, peak_tflops: float | None = None) -> float | None:
        """Peak FLOP/s of this device for 16-bit matrix products, None if unknown.

        peak_tflops: the setting, which replaces the table.
        """
        if peak_tflops:
            return peak_tflops * 1e12
        if self.device_type != 'cuda' or self.dtype == torch.float32:
            return None
        name = torch.cuda.get_device_name(self.device)
        peaks = (peak for part, peak in PEAK_TFLOPS.items() if re.search(rf'\b{part}\b', name))
        return next((peak * 1e12 for peak in peaks), None)

    def peak_memory(self) -> int | None:
        """Peak memory of this process in bytes, on its GPU or else in main memory.

        None on Apple GPUs and on Windows, which do not report it.
        """
        if self.device_type == 'cuda':
            return torch.cuda.max_memory_allocated(self.device)
        if self.device_type != 'cpu':
            return None
        with suppress(OSError):  # Linux, where getrusage includes the parent's memory before exec
            status = Path('/proc/self/status').read_text(encoding='utf-8', errors='replace')
            if peak := re.search(r'VmHWM:\s+(\d+) kB', status):
                return int(peak[1]) * 1024
        with suppress(ImportError):
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == 'darwin' else peak * 1024
        return None

    def rank_batches(self, windows, batch_size: int, title: str) -> Iterator[tuple]:
        """This rank's batches of `windows`, with a progress bar: (index of the first, windows of
        the batch, how many of them count).

        Every rank gets as many batches, since with a sharded model all must compute: one that has
        none left gets the first window, with a count of 0.
        """
        starts = range(0, len(windows), self.world_size * batch_size)
        for start in tqdm(starts, title, leave=False, disable=not self.is_interactive):
            first = start + self.rank * batch_size
            mine = windows[first : first + batch_size]
            yield first, mine if len(mine) else windows[:1], len(mine)

    def split_batch(self, rows: int, batch_size: int) -> tuple[int, int]:
        """Rows per rank, and rows of its equal micro-batches, at most batch_size.

        rows: sequences in a batch over all ranks.
        """
        if rows % self.world_size:
            multiple = self.world_size // math.gcd(self.world_size, batch_size)
            lower = rows // batch_size // multiple * multiple
            raise ConfigError(
                f'gradient_accumulation_steps * batch_size is {rows} sequences, which cannot be '
                f'split equally over {self.world_size} processes; '
                f'use --gradient_accumulation_steps={lower + multiple}'
                + (f' or {lower}' if lower else '')
            )
        mine = rows // self.world_size
        return mine, next(n for n in range(min(batch_size, mine), 0, -1) if mine % n == 0)

    @property
    def max_in_flight(self) -> int:
        """How many updates may be launched before the result of the first is read."""
        return int(self.device_type == 'cuda')

    def wants_compile(self, setting: bool | str) -> bool:
        """Whether `compile` allows torch.compile: True, or 'auto' on CUDA."""
        return setting is True or (setting == 'auto' and self.device_type == 'cuda')

    def try_compile(self, model, batches: list, print0: Callable, loss_of: Callable):
        """(the compiled model, True) after a pass over each batch; (model, False) if one fails."""
        print0('compiling the model, which takes about a minute ...')
        try:
            compiled = torch.compile(model, dynamic=False)
            for batch in batches:
                with self.autocast():
                    loss = loss_of(compiled, **batch)
                loss.backward()
            return compiled, True
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [''])[0][:100]
            print0(
                f'training without torch.compile, which failed: {type(error).__name__}: {reason}'
            )
            return model, False
        finally:
            model.zero_grad(set_to_none=True)

    def exit(self, status: int = 0) -> None:
        """Exit the program, without Python's shutdown if there are several processes."""
        if dist.is_initialized():
            # gloo's threads can abort an interpreter during its normal shutdown
            dist.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        raise SystemExit(status)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a GPU: many such errors are plain RuntimeErrors."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


def is_host_out_of_memory(error: BaseException) -> bool:
    """Whether it was the memory of the host."""
    return isinstance(error, MemoryError) or 'DefaultCPUAllocator' in str(error)


def is_lost_connection(error: BaseException) -> bool:
    """Whether the connection to a process was lost; gloo raises a plain RuntimeError for it."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and 'gloo' in str(error)
    )


def on_out_of_memory(device: str, advice: Callable[[], str]) -> None:
    """From now on, an out-of-memory error ends the program with one line that contains advice()."""
    explain_errors(
        lambda error: out_of_memory(error, device, advice()) if is_out_of_memory(error) else None
    )


def out_of_memory(error: BaseException, device: str, advice: str) -> UserError:
    """The UserError to report instead of an out-of-memory error."""
    if device != 'cpu' and is_host_out_of_memory(error):  # smaller batches would not help
        return UserError(
            f'out of main memory while using {device}; close other programs, start fewer processes '
            'on this machine, or use a smaller model'
        )
    return UserError(f'out of memory on {device}; try {advice}')


def init_runtime(
    device: str = 'auto',
    dtype: str = 'auto',
    backend: str = 'auto',
    timeout: float = 600.0,
    facts: dict | None = None,
    offload: bool = False,
) -> Runtime:
    """Choose device and dtype, and join the process group if torchrun started this process.

    timeout: seconds to wait for other processes, at the start and in collectives.
    facts: values that must be equal on all ranks, by name, for example the settings.
    offload: whether collectives also run on tensors in the host's memory.
    """
    world_size, local_rank = (
        int(os.environ.get(k, d)) for k, d in (('WORLD_SIZE', 1), ('LOCAL_RANK', 0))
    )
    one_gpu = device.partition(':')[2]  # the same for all processes of this machine
    device = pick_device(device)
    if device == 'cuda' and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f'torchrun started a process for GPU {local_rank}, but the GPUs of this machine end at '
            f'{torch.cuda.device_count() - 1}; use --nproc_per_node={torch.cuda.device_count()}'
        )
    if device.startswith('cuda'):
        device = f'cuda:{local_rank}' if device == 'cuda' else device
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 for float32 products
    if device == 'cpu':
        keep_freed_memory()
    dtype = pick_dtype(dtype, device, training=True)
    if not {'RANK', 'WORLD_SIZE', 'MASTER_ADDR'} <= os.environ.keys():
        return Runtime(device, dtype)
    runtime = Runtime(device, dtype, int(os.environ['RANK']), world_size)
    limit = timedelta(seconds=timeout)
    store = rendezvous(runtime, limit)
    kind = device.partition(':')[0]
    found = {'device': kind, 'dtype': runtime.dtype_name, 'backend': backend}
    found |= {'torch': torch.__version__}
    if (facts or {}).get('optimizer') == 'muon':  # otherwise the ranks' weights would drift apart
        found['dtype of products'] = str(product_dtype(torch.device(device)))
    # `found` has the values that 'auto' resolved to
    check_ranks_match(runtime, store, {'code': code_hash(), **(facts or {}), **found})
    here = local_world_size()
    if kind == 'mps' and world_size > 1:
        raise ConfigError(
            "device='mps': Apple GPUs train in one process; use --device=cpu or omit torchrun"
        )
    if one_gpu and here > 1 and pick_backend(backend, device) == 'nccl':
        raise ConfigError(
            f'device={device!r}: torchrun started {here} processes here, and NCCL needs a GPU for '
            'each; use --device=cuda'
        )
    # watchdog.py stops hung ranks first and reports which one hangs; this timeout is the fallback
    limit += timedelta(seconds=30)
    backend, where = pick_backend(backend, device), {'rank': runtime.rank, 'world_size': world_size}
    if offload and backend == 'nccl':
        backend = 'cpu:gloo,cuda:nccl'
    dist.init_process_group(backend, store=store, timeout=limit, **where)
    return replace(runtime, store=store)


def local_world_size() -> int:
    """Processes that torchrun started on this machine; 1 without torchrun."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def code_hash() -> str:
    """A hash of the source, which differs between versions."""
    scripts = sorted([*ROOT.glob('*.py'), *ROOT.glob('flatgpt/**/*.py'), *ROOT.glob('data/*/*.py')])
    scripts = [script for script in scripts if script.is_file()]  # not Emacs's broken links
    return hashlib.sha256(b''.join(script.read_bytes() for script in scripts)).hexdigest()[:12]


def rendezvous(runtime: Runtime, limit: timedelta) -> dist.Store:
    """The store that all processes share."""
    try:
        store, _, _ = next(dist.rendezvous('env://', timeout=limit))
        store.set_timeout(limit)
        return store
    except (dist.DistError, RuntimeError, ValueError) as error:
        place = f'{os.environ["MASTER_ADDR"]}:{os.environ.get("MASTER_PORT")}'
        reason = str(error).splitlines()[0][:150]
        raise UserError(
            f'the processes cannot connect to {place}: {reason}; the address must be that of the '
            'first machine, with a port that is free there and reachable from the others'
        ) from error


def check_ranks_match(runtime: Runtime, store: dist.Store, facts: dict) -> None:
    """Raise UserError if a rank differs from rank 0 in one of the facts, or does not start."""
    host, now, ranks = socket.gethostname(), time.time(), range(runtime.world_size)
    store.set(f'facts/{runtime.rank}', json.dumps([host, now, facts]))
    received = []
    for rank in ranks:
        try:
            received.append(json.loads(store.get(f'facts/{rank}')))
        except dist.DistError:
            raise UserError(
                f'rank {rank} did not start; check its output, and start all {runtime.world_size} '
                'processes'
            ) from None
    store.set(f'compared/{runtime.rank}', '')
    if runtime.is_main:  # which may host the store and must exit last
        with suppress(dist.DistError):
            store.wait([f'compared/{rank}' for rank in ranks])
    for rank, (other_host, other_now, others) in enumerate(received):
        if rank == 0:
            first_host, first_now, first = other_host, other_now, others
        for name in first:
            if others.get(name) != first[name] and name == 'code':
                raise UserError(
                    f'rank {rank} on {other_host} runs another version of the code than rank 0 on '
                    f'{first_host}; run the same version on all ranks'
                )
            if others.get(name) != first[name]:
                raise UserError(
                    f'rank {rank} on {other_host} has {name} {others.get(name)!r}, but rank 0 on '
                    f'{first_host} has {first[name]!r}; use the same on all ranks'
                )
        if (
            runtime.is_main
            and abs(other_now - first_now) > CLOCK_SECONDS
            and other_host != first_host
        ):
            print(
                f'warning: the clocks of {other_host} (rank {rank}) and {first_host} differ by '
                f'{abs(other_now - first_now):,.0f} s, or it started late; synchronize them by NTP',
                file=sys.stderr,
            )


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step's activations.

    By default it returns every large block to the system, which zeroes it again page by page: a
    fifth of a small model's training step. Other C libraries have no mallopt and are not changed.
    """
    with suppress(OSError, AttributeError, TypeError):  # musl, macOS, Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def pick_device(name: str) -> str:
    """'auto', 'cpu', 'mps', 'cuda' or 'cuda:N' -> an available device; ConfigError otherwise."""
    if name == 'auto':
        name = 'mps' if torch.backends.mps.is_available() else 'cpu'
        name = 'cuda' if torch.cuda.is_available() else name
    kind, _, index = name.partition(':')
    if kind not in ('cpu', 'cuda', 'mps') or (index and not index.isdigit()):
        raise ConfigError(
            f'device={name!r}: must be auto, cpu, mps, cuda, or one GPU such as cuda:0'
        )
    if kind == 'cuda' and not torch.cuda.is_available():
        raise ConfigError(
            f'device={name!r}: torch {torch.__version__} finds no CUDA GPU; use --device=auto'
        )
    if kind == 'cuda' and index and int(index) >= torch.cuda.device_count():
        raise ConfigError(
            f'device={name!r}: no such GPU; the last one is cuda:{torch.cuda.device_count() - 1}'
        )
    if kind == 'cuda':
        check_architecture(int(index or os.environ.get('LOCAL_RANK', 0)))
    if kind == 'mps' and not torch.backends.mps.is_available():
        raise ConfigError(f'device={name!r}: torch finds no Apple GPU; use --device=auto')
    return name


def check_architecture(index: int) -> None:
    """ConfigError for an old GPU that this torch has no kernels for."""
    if index >= torch.cuda.device_count():  # init_runtime() reports that
        return
    major, minor = torch.cuda.get_device_capability(index)
    # kernels run on later GPUs of their generation; only NVIDIA's are named like this
    built = [re.match(r'(sm|compute)_(\d+)(\d)', name) for name in torch.cuda.get_arch_list()]
    built = [(found[1], int(found[2]), int(found[3])) for found in built if found]
    fits = [(kind == 'compute' or m == major) and (m, n) <= (major, minor) for kind, m, n in built]
    if built and not any(fits):
        name = torch.cuda.get_device_name(index)
        raise ConfigError(
            f"device='cuda': torch {torch.__version__} has no kernels for {name} (compute "
            f'capability {major}.{minor}); install a torch build for an older CUDA, or use '
            '--device=cpu'
        )


def pick_dtype(name: str, device: str, training: bool = False) -> torch.dtype:
    """The dtype for matrix products; 'auto' is the fastest that is safe on `device`.

    A CPU with bfloat16 instructions generates in bfloat16 even if it trains faster in float32,
    since decoding waits for the weights to be read.
    """
    kind = device.partition(':')[0]
    if name != 'auto' and name not in DTYPES:
        raise ConfigError(f'dtype={name!r}: must be auto, {", ".join(DTYPES)}')
    if kind == 'cuda':
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if name == 'bfloat16' and not bf16:
            raise ConfigError(
                f"dtype='bfloat16': {torch.cuda.get_device_name()} has no bfloat16, which needs an "
                'Ampere GPU or later; use --dtype=float16'
            )
        return DTYPES[('bfloat16' if bf16 else 'float16') if name == 'auto' else name]
    if kind == 'cpu' and name == 'float16' and training:
        raise ConfigError(
            "dtype='float16': training in float16 needs a GPU; "
            'use --dtype=bfloat16 or --dtype=float32'
        )
    if kind == 'cpu' and name == 'auto':
        name = 'bfloat16' if (bf16_is_faster() if training else cpu_has_bf16()) else 'float32'
    return DTYPES['float32' if name == 'auto' else name]


def product_dtype(device: torch.device) -> torch.dtype:
    """The dtype of products that 16 bits are enough for: bfloat16, where it is fast.

    On other CPUs it is float32, and float16 on GPUs before Ampere, where bfloat16 is emulated.
    """
    if device.type == 'cpu':
        return torch.bfloat16 if bf16_is_faster() else torch.float32
    if device.type != 'cuda' or not torch.cuda.is_available():  # --plan has fake CUDA tensors
        return torch.bfloat16
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware."""
    capabilities = cpu_capabilities()
    return bool(capabilities.get('avx512_bf16') or capabilities.get('amx_bf16'))


def bf16_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32.

    With AMX it does. With AVX512-BF16 alone, bfloat16 takes half as long as float32 on AMD's
    processors, and twice as long on Intel's (bench.py measures both). It is not timed here: all
    ranks and all parts of a resumed run must find the same.
    """
    capabilities = cpu_capabilities()
    is_intel = 'Intel' in capabilities.get('cpu_name', '')
    return bool(capabilities.get('amx_bf16')) if is_intel else cpu_has_bf16()


def cpu_capabilities() -> dict:
    """The processor's instructions and name; empty if torch does not report them."""
    return getattr(torch.cpu, 'get_capabilities', dict)()


def pick_backend(name: str, device: str) -> str:
    if name == 'auto':
        return 'nccl' if device.startswith('cuda') and dist.is_nccl_available() else 'gloo'
    if not dist.is_backend_available(name):
        raise ConfigError(f'backend={name!r}: this torch does not have it; use --backend=auto')
    if name == 'nccl' and not device.startswith('cuda'):
        raise ConfigError(
            f"backend='nccl': needs CUDA GPUs, but the device is {device}; use --backend=auto"
        )
    return name


def to_device(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Copy a tensor of the host to a device, asynchronously to a CUDA GPU.

    That is safe from pinned memory, which torch keeps until the copy is done. An Apple GPU could
    read memory that was freed and reused (pytorch issue 189690).
    """
    if torch.device(device).type != 'cuda':
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def synchronize(device: str) -> None:
    """Wait until the device has finished its work."""
    kind = device.partition(':')[0]
    if kind == 'cuda':
        torch.cuda.synchronize(device)
    elif kind == 'mps':
        torch.mps.synchronize()


def available_memory(runtime: Runtime) -> float | None:
    """Bytes of device memory that each local process can use in total, None if unknown."""
    if runtime.device_type == 'cuda':
        free, _ = torch.cuda.mem_get_info(runtime.device)
        return free + torch.cuda.memory_reserved(runtime.device)
    if runtime.device_type == 'mps':
        return torch.mps.recommended_max_memory()
    return available_host_memory()


def available_host_memory() -> float | None:
    """Bytes of main memory that each local process can use in total, None if unknown."""
    free = []
    with suppress(OSError, AttributeError):
        text = Path('/proc/meminfo').read_text(encoding='utf-8')
        free += [int(kb) * 1024 for kb in re.findall(r'MemAvailable:\s+(\d+) kB', text)]
        group = Path('/sys/fs/cgroup')  # of a container
        with suppress(OSError, ValueError):
            used = int((group / 'memory.current').read_text())
            cached = re.search(r'^inactive_file (\d+)', (group / 'memory.stat').read_text(), re.M)
            used -= int(cached[1]) if cached else 0  # reclaimable
            free.append(int((group / 'memory.max').read_text()) - used)
    if not free:
        with suppress(ValueError, OSError, AttributeError):  # Windows has no sysconf
            free.append(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    return min(free) / local_world_size() + resident_memory() if free else None


def resident_memory() -> int:
    """Bytes of main memory that this process uses now, 0 if unknown."""
    with suppress(OSError):
        return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    return 0
