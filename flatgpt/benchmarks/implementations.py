"""
The implementations that bench.py compares, each in a process of its own, measured alternately.

    names = [('flatGPT', 'int8'), ('transformers', 'bfloat16')]
    with start_implementations(names, settings, 'generation') as implementations:
        measurements = measure_interleaved(implementations, settings, 'decode', 8)
        measurements['flatGPT int8']                           # [Measurement(...), ...]

An implementation measures its own seconds and reports the work it did, so that only equal work is
compared. One that fails becomes a line of the report; the others continue.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from flatgpt.benchmarks import baselines, cpp_baselines, rl
from flatgpt.benchmarks.machine import reset_peak_memory
from flatgpt.errors import UserError
from flatgpt.runtime import Runtime, init_runtime, is_out_of_memory, pick_dtype


class Measurement(NamedTuple):
    seconds: float
    # tokens; result: numbers that all implementations should share; in training also the optimizer
    work: dict
    memory: int | None = None  # peak bytes, where they are measured

    @property
    def tokens_per_second(self) -> float:
        return self.work['tokens'] / self.seconds


class Failure(str):
    """Why an implementation cannot be measured, in one line."""


class Implementation:
    """A program of baselines.py, cpp_baselines.py or rl.py, in a process of its own."""

    def __init__(self, name: str, settings: dict):
        self.name = name
        self.format = settings['format'] if settings['workload'] == 'generation' else ''
        context = multiprocessing.get_context('spawn')
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=run_implementation, args=(other, name, settings), daemon=True
        )
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
        self.process.start()
        signal.signal(signal.SIGINT, before)
        other.close()
        self.failure: Failure | None = Failure('it is not ready')
        self.about = ''  # its version and build, if it has one to report

    @property
    def label(self) -> str:
        return f'{self.name} {self.format}'.strip()

    def wait_until_ready(self) -> None:
        reply = self.receive()
        self.failure = reply if isinstance(reply, Failure) else None
        self.about = '' if self.failure else reply

    def measure(self, method: str, *arguments) -> Measurement | None:
        """One measurement, by a method of the program; None after a failure."""
        return self.ask(method, arguments, None)

    def profile(self, path: Path, method: str, *arguments) -> str | None:
        """Run it under torch's profiler: a table of the slowest operators, and a trace file."""
        return self.ask(method, arguments, str(path))

    def ask(self, method: str, arguments: tuple, trace: str | None):
        """What measure() returns in the other process; None after a failure."""
        if self.failure is not None:
            return None
        with contextlib.suppress(OSError):  # receive() reports that the process is gone
            self.pipe.send((method, arguments, trace))
        reply = self.receive()
        if isinstance(reply, Failure):
            self.failure = reply
            return None
        return reply

    def receive(self):
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return Failure('its process was killed, perhaps because memory ran out')

    def dismiss(self) -> None:
        """Have the process end, which close() waits for."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)

    def close(self) -> None:
        self.process.join(10)
        self.process.kill()


@contextlib.contextmanager
def start_implementations(
    names: list[tuple], settings: dict, workload: str
) -> Iterator[list[Implementation]]:
    """Start a process for each (program, format of the weights), and end them afterwards.

    workload: 'training', 'generation' or 'rl'.
    """
    implementations = []
    try:
        for name, kind in names:
            implementations.append(
                Implementation(name, {**settings, 'workload': workload, 'format': kind})
            )
        for implementation in implementations:
            implementation.wait_until_ready()
        yield implementations
    finally:
        for implementation in implementations:  # they take a second to end, all in the same one
            implementation.dismiss()
        for implementation in implementations:
            implementation.close()


def measure_interleaved(
    implementations: list[Implementation], settings: dict, method: str, *arguments
) -> dict[str, list[Measurement]]:
    """Measurements of each implementation, alternating, after one warm-up each."""
    measurements = {implementation.label: [] for implementation in implementations}
    for number in range(settings['rounds'] + 1):
        for implementation in implementations:
            measurement = implementation.measure(method, *arguments)
            if measurement and number:
                measurements[implementation.label].append(measurement)
    return measurements


def print_profile(implementation: Implementation, settings: dict, method: str, *arguments) -> None:
    """With --profile, print the slowest operators of the method and write its trace."""
    if not settings['profile'] or implementation.failure is not None:
        return
    path = Path(settings['json']).with_name(f'trace_{method}.json')
    if table := implementation.profile(path, method, *arguments):
        print(table)
        print(f'wrote {path}, for https://ui.perfetto.dev')
    else:
        print(f'{implementation.label} could not be profiled: {implementation.failure}')


# -----------------------------------------------------------------------------
# in the implementation's own process


def run_implementation(pipe, name: str, settings: dict) -> None:
    """Build a program and send what it is; then answer each request with its measurement."""
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            runtime = open_runtime(name, settings)
            generation = {**baselines.BUILDERS, **cpp_baselines.BUILDERS}
            builders = rl.BUILDERS if settings['workload'] == 'rl' else generation
            program = builders[name](settings, runtime)
            pipe.send(getattr(program, 'about', ''))
            while (request := pipe.recv()) is not None:
                pipe.send(measure(program, runtime, *request))
        except (EOFError, BrokenPipeError):  # the parent is gone
            return
        except ImportError as error:
            pipe.send(Failure(f'{error.name or error} is not installed'))
        except UserError as error:
            pipe.send(Failure(error))
        except Exception as error:
            text = f'{type(error).__name__}: {error}'
            cause = 'out of memory' if is_out_of_memory(error) else text
            pipe.send(Failure(cause.splitlines()[0][:200]))


def open_runtime(name: str, settings: dict) -> Runtime:
    device, dtype = settings['device'], settings['dtype']
    if name == 'flatGPT' or device.startswith('cuda'):
        return init_runtime(device, dtype)  # sets up the GPU; on a CPU, how our own memory is kept
    return Runtime(device, pick_dtype(dtype, device, training=True))


def measure(
    program, runtime: Runtime, method: str, arguments: tuple, trace: str | None
) -> Measurement | str:
    """A measurement; with `trace`, a path, the profiler's table instead."""
    gc.collect()
    reset_peak_memory(runtime.device)
    run = getattr(program, method)
    if trace:
        return profiled(lambda: run(*arguments), trace)
    seconds, work = run(*arguments)
    return Measurement(seconds, work, runtime.peak_memory())


def profiled(run: Callable, path: str) -> str:
    """run() under torch's profiler: write its trace -> a table of the slowest operators."""
    from torch.profiler import profile

    with profile() as profiler:
        run()
    profiler.export_chrome_trace(path)
    if not Path(path).is_file():  # the profiler does not raise
        raise UserError(f'{path}: cannot be written; give a --json= in a folder that can')
    by = 'self_device_time_total' if torch.cuda.is_available() else 'self_cpu_time_total'
    return profiler.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=48)
