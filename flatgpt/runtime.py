"""
The machine a script finds itself on: device, number format, processes, and what they can do.

    runtime = start(device='auto', dtype='auto', backend='auto')
    with runtime.autocast(): ...
"""

import ctypes
import hashlib
import json
import math
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from flatgpt import ROOT
from flatgpt.errors import ConfigError, UserError, explain_errors

CLOCK_SECONDS = 60  # that the clocks of two machines may be apart
DTYPES = {
    'float32': torch.float32,
    'bfloat16': torch.bfloat16,
    'float16': torch.float16,
}

# what says so: torch's allocators for CUDA, Apple GPUs, Linux, Windows; cuBLAS, cuDNN; torch.empty
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|_STATUS_ALLOC_FAILED|"
    r'Storage size calculation overflowed'
)

# Dense 16-bit matrix products, TFLOP/s, from the makers' data sheets. The first name whose words
# the device's own name has counts, so 'H100 PCIe' comes before 'H100'.
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


# What torch.compile is estimated to take and to save, roughly: no GPU was at hand to measure it on
COMPILE_SECONDS, COMPILE_LAYER_SECONDS = 20, 1  # for each width of batch, and each layer in that
SAVED = 1 / 3  # of a run's time
EAGER_SHARE = 0.25  # of the peak, that large models reach without it
EAGER_LAYER_SECONDS = 3e-4  # to launch a layer's 60 kernels, forward and back: small models' limit
ASSUMED_TFLOPS = 50  # of a GPU whose peak is not known


class Workload(NamedTuple):
    """What a process computes in a run."""

    passes: int  # forward and back
    flops: float  # of one of them
    layers: int
    widths: int = 1  # of batches, for each of which torch.compile makes kernels


@dataclass(frozen=True)
class Runtime:
    device: str  # 'cpu', 'mps', 'cuda:0' ...
    dtype: torch.dtype  # of matrix products; parameters stay float32
    rank: int = 0  # of this process among all
    world_size: int = 1  # processes, over all nodes
    store: dist.Store | None = None  # where they leave one another notes; None outside torchrun

    def __str__(self) -> str:
        processes = f', {self.world_size} processes' if self.world_size > 1 else ''
        return f'{self.device}, {self.dtype_name}{processes}'

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix('torch.')

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files: one does, whatever the world size."""
        return self.rank == 0

    @property
    def launch_command(self) -> str:
        """What starts as many processes; what starts other machines, nobody here knows."""
        here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        if self.store is None:
            return 'python'
        many = '--standalone' if here == self.world_size else '...'
        return f'torchrun {many} --nproc_per_node={here}'

    @property
    def is_local_main(self) -> bool:
        """Whether this process acts for its machine, as rank 0 does for all."""
        return int(os.environ.get('LOCAL_RANK', 0)) == 0

    @property
    def is_interactive(self) -> bool:
        """Whether a person watches this process: a progress line then moves."""
        return self.is_main and sys.stderr.isatty()

    @property
    def device_type(self) -> str:
        return self.device.partition(':')[0]

    @property
    def sum_dtype(self) -> torch.dtype:
        """For sums over many values: float64, which Apple GPUs lack."""
        return torch.float32 if self.device_type == 'mps' else torch.float64

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device_type, self.dtype)

    def print0(self, text: str) -> None:
        """Print, once for all processes, above the progress line if there is one."""
        if self.is_main:
            with suppress(OSError):  # a closed pipe or terminal must not end the training
                tqdm.write(text)
                sys.stdout.flush()  # a pipe or a log file gets it now, too

    def seed(self, seed: int, step: int) -> None:
        """Seed torch for one step of this rank, so that a resumed run needs no stored state."""
        torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + self.rank) % 2**63)

    def all_reduce(self, values: list[float], how: str = 'SUM') -> list[float]:
        """`values` combined over all ranks: 'SUM' or 'MAX'. The same on every rank."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=self.sum_dtype, device=self.device)
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, how))
        return tensor.tolist()

    def broadcast_from_rank0(self, decide):
        """What decide() returns on rank 0, on every rank; a UserError there is raised on all."""
        if self.world_size == 1:
            return decide()
        box = [None, None]
        if self.is_main:
            try:
                box[0] = decide()
            except UserError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, device=torch.device(self.device))
        if box[1] is not None:
            raise box[1]
        return box[0]

    def first_mismatch(self, value) -> int:
        """A rank on which value is not what it is on rank 0; 0 if there is none."""
        odd = value != self.broadcast_from_rank0(lambda: value)
        return int(self.all_reduce([self.rank * odd], 'MAX')[0])

    def wait_for_all(self, do: Callable, alive: Callable):
        """What do() returns here, once it has on every rank, however long it takes.

        What fails on one is a UserError on the others. alive() is called while this one waits.
        """
        if self.store is None:
            return do()
        try:
            result = do()
        except BaseException as error:
            kind = '' if isinstance(error, UserError) else f'{type(error).__name__}: '
            with suppress(dist.DistError):  # which may be what failed
                self.store.set('failed', f'rank {self.rank}: {kind}{error}')
                time.sleep(0.5)  # rank 0 may keep the store, where the others look
            raise
        self.store.add('ready', 1)
        while self.store.add('ready', 0) < self.world_size:
            if self.store.check(['failed']):
                raise UserError(self.store.get('failed').decode())
            alive()
            time.sleep(0.1)
        return result

    def peak_flops(self) -> float | None:
        """Peak of this device in FLOP/s for 16-bit matrix products, None if it is not known."""
        if self.device_type != 'cuda' or self.dtype == torch.float32:
            return None
        name = torch.cuda.get_device_name(self.device)
        peaks = (peak for part, peak in PEAK_TFLOPS.items() if re.search(rf'\b{part}\b', name))
        return next((peak * 1e12 for peak in peaks), None)  # an RTX A4000 is no A40

    def peak_memory(self) -> int | None:
        """Most bytes this process has held at once: on its GPU, else in main memory.

        None where nobody counts: on Apple GPUs, and on Windows.
        """
        if self.device_type == 'cuda':
            return torch.cuda.max_memory_allocated(self.device)
        if self.device_type != 'cpu':
            return None
        with suppress(OSError):  # Linux; getrusage would count what the parent held before exec
            status = Path('/proc/self/status').read_text(encoding='utf-8', errors='replace')
            if held := re.search(r'VmHWM:\s+(\d+) kB', status):
                return int(held[1]) * 1024
        with suppress(ImportError):
            import resource

            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return held if sys.platform == 'darwin' else held * 1024
        return None

    def split_batch(self, rows: int, at_once: int) -> tuple[int, int]:
        """Rows of each rank, and of each of the equal parts of `at_once` at most it has."""
        if rows % self.world_size:
            each = self.world_size // math.gcd(self.world_size, at_once)
            near = rows // at_once // each * each
            raise ConfigError(
                f'gradient_accumulation_steps * batch_size is {rows} sequences, which '
                f'{self.world_size} processes cannot share equally; '
                f'take --gradient_accumulation_steps={near + each}'
                + (f' or {near}' if near else '')
            )
        mine = rows // self.world_size
        return mine, next(n for n in range(min(at_once, mine), 0, -1) if mine % n == 0)

    def wants_compile(self, setting: bool | str) -> bool:
        """Whether the setting asks for torch.compile; 'auto' does on CUDA, for what takes long."""
        return setting is True or (setting == 'auto' and self.device_type == 'cuda')

    def decide_compile(
        self, setting: bool | str, work: Workload, peak: float | None, say: Callable
    ) -> bool:
        """Whether to compile for this work, the same on all ranks; of 'auto' on CUDA, say why.

        peak: of the device, in FLOP/s, None if it is not known.
        """
        if setting != 'auto' or not self.wants_compile(setting):
            return self.wants_compile(setting)
        pays, why = self.broadcast_from_rank0(lambda: compile_pays(work, peak))
        say(f'torch.compile: {"on" if pays else "off"}, {why}')
        return pays

    def try_compile(
        self, compile: Callable, model, batches: list, say: Callable, loss_of: Callable
    ):
        """The model compiled by torch.compile and tried on a batch of each shape, and True.

        As it is, and False, where that fails.
        """
        say('compiling the model, about a minute ...')
        try:
            compiled = compile(model, dynamic=False)
            for batch in batches:
                with self.autocast():
                    loss = loss_of(compiled, **batch)
                loss.backward()
            return compiled, True
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [''])[0][:100]
            say(f'training without torch.compile, which failed: {type(error).__name__}: {reason}')
            return model, False
        finally:
            model.zero_grad(set_to_none=True)

    def exit(self, status: int = 0) -> None:
        """End the program. Does not return when there are several processes."""
        if dist.is_initialized():
            # gloo's threads can abort an interpreter that shuts down in the usual way
            dist.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        raise SystemExit(status)


def compile_pays(work: Workload, peak: float | None) -> tuple[bool, str]:
    """Whether torch.compile saves more time than it takes, by estimate, and a line that says so."""
    speed = EAGER_SHARE * (peak or ASSUMED_TFLOPS * 1e12)
    seconds = max(0, work.passes) * max(work.flops / speed, work.layers * EAGER_LAYER_SECONDS)
    takes = work.widths * (COMPILE_SECONDS + work.layers * COMPILE_LAYER_SECONDS)
    pays, short = SAVED * seconds > takes, tqdm.format_interval
    why = f'as the run is estimated to take {short(seconds)} without, and compiling {short(takes)}'
    if not peak:
        why += f' (on a GPU of unknown peak, taken for {ASSUMED_TFLOPS} TFLOP/s; see peak_tflops)'
    return pays, why + ('' if pays else '; --compile=True compiles nevertheless')


class StopSignal:
    """Remembers that a signal asked this process to stop, for the training loop to look at.

    A second Ctrl-C leaves at once; under torchrun, which passes signals on, it is the first again.
    What cannot be read any more stops a run as a signal does: see fail().
    """

    FAILED = 2**10  # in place of a signal's number, and larger than any

    def __init__(self, runtime: Runtime):
        self.signal, self.runtime, self.numbers = 0, runtime, []
        self.error: UserError | None = None  # of this process
        for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP'):
            number = getattr(signal, name, None)  # Windows has but the first two
            under_nohup = name == 'SIGHUP' and number and signal.getsignal(number) == signal.SIG_IGN
            if number and not under_nohup:
                self.numbers.append(number)
                signal.signal(number, self.receive)

    def receive(self, number: int, frame) -> None:
        if self.signal == number == signal.SIGINT and self.runtime.world_size == 1:
            raise KeyboardInterrupt
        if not self.signal and self.runtime.is_main:  # print() is not safe inside a signal handler
            with suppress(OSError):  # the terminal may be what is gone
                os.write(2, b'\nstopping after this step ...\n')
        # torchrun sends one of its own after the first, which is the one to leave with
        if not self.signal or (self.runtime.world_size == 1 and not self.failed):
            self.signal = number

    def fail(self, error: UserError) -> None:
        """Stop because of an error: the update in progress is left out, by all ranks."""
        self.error = self.error or error
        self.signal = self.FAILED

    @property
    def failed(self) -> bool:
        return self.signal == self.FAILED

    def sync_ranks(self) -> None:
        """Have every rank know of the signal that one of them got: all leave with its status."""
        (number,) = self.runtime.all_reduce([self.signal], 'MAX')
        self.signal = int(number)

    @property
    def status(self) -> int:
        """The exit status that a shell expects of a program a signal ended; 0 without one."""
        if self.failed:
            return 2
        return 128 + self.signal if self.signal else 0

    def raise_interrupts(self) -> None:
        """Have a signal raise KeyboardInterrupt: nothing is left to lose, and nothing to finish."""
        for number in self.numbers:
            signal.signal(number, signal.default_int_handler)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of a GPU: only some of what says so has a type."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


def is_host_out_of_memory(error: BaseException) -> bool:
    """Whether it was that of the host which ran out."""
    return isinstance(error, MemoryError) or 'DefaultCPUAllocator' in str(error)


def is_lost_connection(error: BaseException) -> bool:
    """Whether another process is gone, or the network: gloo has no error of its own for it."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and 'gloo' in str(error)
    )


def on_out_of_memory(device: str, cure: Callable[[], str]) -> None:
    """From now on, running out of memory ends the program with one line: what to lower, to what."""
    explain_errors(
        lambda error: out_of_memory(error, device, cure()) if is_out_of_memory(error) else None
    )


def out_of_memory(error: BaseException, device: str, cure: str) -> UserError:
    """The error to report in place of one that is_out_of_memory()."""
    if device != 'cpu' and is_host_out_of_memory(error):  # what takes less of a GPU does not help
        return UserError(
            f'out of main memory, beside {device}; end other programs, start fewer processes '
            'on this machine, or take a smaller model'
        )
    return UserError(f'out of memory on {device}; try {cure}')


def start(
    device: str = 'auto',
    dtype: str = 'auto',
    backend: str = 'auto',
    timeout: float = 600.0,
    facts: dict | None = None,
    offload: bool = False,
) -> Runtime:
    """Choose the device and dtype, and join the process group if torchrun started this process.

    timeout: seconds that a process waits for the others, at the start and whenever they exchange
    something. facts: what has to be the same on all of them, by name; one that differs is named.
    offload: whether they also exchange what lies in the host's memory.
    """
    world_size, local_rank = (
        int(os.environ.get(k, d)) for k, d in (('WORLD_SIZE', 1), ('LOCAL_RANK', 0))
    )
    one_gpu = device.partition(':')[2]  # that all processes of this machine were given
    device = pick_device(device)
    if device == 'cuda' and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f'torchrun started a process for GPU {local_rank}, but this machine has '
            f'{torch.cuda.device_count()}; lower --nproc_per_node'
        )
    if device.startswith('cuda'):
        device = f'cuda:{local_rank}' if device == 'cuda' else device
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 for what autocast leaves in float32
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
    # what 'auto' came to, not the setting
    check_ranks_match(runtime, store, {'code': code_hash(), **(facts or {}), **found})
    here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if kind == 'mps' and world_size > 1:
        raise ConfigError("device='mps': Apple GPUs train in one process; use --device=cpu")
    if one_gpu and here > 1 and pick_backend(backend, device) == 'nccl':
        raise ConfigError(
            f'device={device!r}: torchrun started {here} processes here, and NCCL takes a GPU for '
            'each; use --device=cuda'
        )
    # watchdog.py ends what waits in vain, and knows for whom; this is for what it cannot see
    limit += timedelta(seconds=30)
    backend, where = pick_backend(backend, device), {'rank': runtime.rank, 'world_size': world_size}
    if offload and backend == 'nccl':
        backend = 'cpu:gloo,cuda:nccl'
    dist.init_process_group(backend, store=store, timeout=limit, **where)
    return replace(runtime, store=store)


def code_hash() -> str:
    """What tells one version of these scripts from another."""
    scripts = sorted([*ROOT.glob('*.py'), *ROOT.glob('flatgpt/**/*.py'), *ROOT.glob('data/*/*.py')])
    scripts = [script for script in scripts if script.is_file()]  # Emacs locks by links to nowhere
    return hashlib.sha256(b''.join(script.read_bytes() for script in scripts)).hexdigest()[:12]


def rendezvous(runtime: Runtime, limit: timedelta) -> dist.Store:
    """The store that all processes share, once they have found one another."""
    try:
        store, _, _ = next(dist.rendezvous('env://', timeout=limit))
        store.set_timeout(limit)
        return store
    except (dist.DistError, RuntimeError, ValueError) as error:
        place = f'{os.environ["MASTER_ADDR"]}:{os.environ.get("MASTER_PORT")}'
        reason = str(error).splitlines()[0][:150]
        raise UserError(
            f'the processes cannot meet at {place}: {reason}; the address must be of the first '
            'machine, the port free there and open to the others'
        ) from error


def check_ranks_match(runtime: Runtime, store: dist.Store, facts: dict) -> None:
    """Refuse to start where the processes would not do the same: UserError names rank and fact."""
    host, now, ranks = socket.gethostname(), time.time(), range(runtime.world_size)
    store.set(f'facts/{runtime.rank}', json.dumps([host, now, facts]))
    came = []
    for rank in ranks:
        try:
            came.append(json.loads(store.get(f'facts/{rank}')))
        except dist.DistError:
            raise UserError(
                f'rank {rank} did not come; see what it printed, or start all {runtime.world_size}'
            ) from None
    store.set(f'compared/{runtime.rank}', '')
    if runtime.is_main:  # which may keep the store: it leaves last
        with suppress(dist.DistError):
            store.wait([f'compared/{rank}' for rank in ranks])
    for rank, (other_host, other_now, others) in enumerate(came):
        if rank == 0:
            first_host, first_now, first = other_host, other_now, others
        for name in first:
            if others.get(name) != first[name]:
                raise UserError(
                    f'rank {rank} on {other_host} has {name} {others.get(name)!r}, and rank 0 on '
                    f'{first_host} {first[name]!r}: start the same on all'
                )
        if (
            runtime.is_main
            and abs(other_now - first_now) > CLOCK_SECONDS
            and other_host != first_host
        ):
            print(
                f'warning: the clock of {other_host} (rank {rank}) and that of {first_host} are '
                f'{abs(other_now - first_now):,.0f} s apart, or it came late; set both by NTP',
                file=sys.stderr,
            )


def keep_freed_memory() -> None:
    """Have the C library keep the memory it frees for the next step's activations.

    glibc gives every large block back to the system, which hands it out again zeroed, page by page:
    a fifth of a small model's training step. Elsewhere there is no mallopt, and nothing happens.
    """
    with suppress(OSError, AttributeError, TypeError):  # musl, macOS, Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def pick_device(name: str) -> str:
    """'auto', 'cpu', 'mps', 'cuda' or 'cuda:N' -> a device that is here; ConfigError otherwise."""
    if name == 'auto':
        name = 'mps' if torch.backends.mps.is_available() else 'cpu'
        name = 'cuda' if torch.cuda.is_available() else name
    kind, _, index = name.partition(':')
    if kind not in ('cpu', 'cuda', 'mps') or (index and not index.isdigit()):
        raise ConfigError(f'device={name!r}: give auto, cpu, mps, cuda, or one GPU such as cuda:1')
    if kind == 'cuda' and not torch.cuda.is_available():
        raise ConfigError(
            f'device={name!r}: torch {torch.__version__} sees no CUDA GPU here; '
            'use --device=auto, which takes what there is'
        )
    if kind == 'cuda' and index and int(index) >= torch.cuda.device_count():
        raise ConfigError(
            f'device={name!r}: this machine has {torch.cuda.device_count()} GPU(s), numbered from 0'
        )
    if kind == 'cuda':
        check_architecture(int(index or os.environ.get('LOCAL_RANK', 0)))
    if kind == 'mps' and not torch.backends.mps.is_available():
        raise ConfigError(f'device={name!r}: no Apple GPU here; use --device=auto')
    return name


def check_architecture(index: int) -> None:
    """ConfigError for a GPU that this torch has no kernels for: an old one, with a new torch."""
    if index >= torch.cuda.device_count():  # start() has better words for that
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
            f'capability {major}.{minor}); install its build for an older CUDA, or use --device=cpu'
        )


def pick_dtype(name: str, device: str, training: bool = False) -> torch.dtype:
    """The number format for matrix products; 'auto' is the fastest that is safe on `device`."""
    kind = device.partition(':')[0]
    if name != 'auto' and name not in DTYPES:
        raise ConfigError(f'dtype={name!r}: give auto, {", ".join(DTYPES)}')
    if kind == 'cuda':
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if name == 'bfloat16' and not bf16:
            raise ConfigError(
                f"dtype='bfloat16': {torch.cuda.get_device_name()} has no bfloat16 (that needs an "
                'Ampere GPU or later); use --dtype=float16'
            )
        return DTYPES[('bfloat16' if bf16 else 'float16') if name == 'auto' else name]
    if kind == 'cpu' and name == 'float16' and training:
        raise ConfigError(
            "dtype='float16': training in float16 needs a GPU; "
            'use --dtype=bfloat16 or --dtype=float32'
        )
    if kind == 'cpu' and name == 'auto' and cpu_has_bf16():
        return torch.bfloat16
    return DTYPES['float32' if name == 'auto' else name]


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware; if not, float32 is faster."""
    capabilities = getattr(torch.cpu, 'get_capabilities', dict)()
    return bool(capabilities.get('avx512_bf16') or capabilities.get('amx_bf16'))


def pick_backend(name: str, device: str) -> str:
    if name == 'auto':
        return 'nccl' if device.startswith('cuda') and dist.is_nccl_available() else 'gloo'
    if not dist.is_backend_available(name):
        raise ConfigError(f'backend={name!r}: this torch was built without it; use --backend=auto')
    if name == 'nccl' and not device.startswith('cuda'):
        raise ConfigError(
            f"backend='nccl' needs GPUs, and the device is {device}; use --backend=auto"
        )
    return name


def to_device(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """A tensor of the host on a device; a CUDA GPU copies it while this process goes on.

    That is safe from pinned memory, which torch keeps until it is copied. An Apple GPU would read
    what has taken a freed tensor's place (pytorch issue 189690).
    """
    if torch.device(device).type != 'cuda':
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def available_memory(runtime: Runtime) -> float | None:
    """Bytes that each process of this machine can take in all; None where nobody says."""
    if runtime.device_type == 'cuda':
        free, _ = torch.cuda.mem_get_info(runtime.device)
        return free + torch.cuda.memory_reserved(runtime.device)
    if runtime.device_type == 'mps':
        return torch.mps.recommended_max_memory()
    return available_host_memory()


def available_host_memory() -> float | None:
    """Bytes of main memory that each process of this machine can take in all."""
    free = []
    with suppress(OSError, AttributeError):
        text = Path('/proc/meminfo').read_text(encoding='utf-8')
        free += [int(kb) * 1024 for kb in re.findall(r'MemAvailable:\s+(\d+) kB', text)]
        group = Path('/sys/fs/cgroup')  # of a container
        with suppress(OSError, ValueError):
            used = int((group / 'memory.current').read_text())
            cached = re.search(r'^inactive_file (\d+)', (group / 'memory.stat').read_text(), re.M)
            used -= int(cached[1]) if cached else 0  # what can be had back
            free.append(int((group / 'memory.max').read_text()) - used)
    if not free:
        with suppress(ValueError, OSError, AttributeError):  # Windows has no sysconf
            free.append(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return min(free) / here + resident_memory() if free else None


def resident_memory() -> int:
    """Bytes of main memory that this process takes now, 0 where nobody says."""
    with suppress(OSError):
        return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    return 0
