"""
The programs that bench.py compares, each in a process of its own, measured in turns.

    names = [('flatGPT', 'int8'), ('transformers', 'bfloat16')]
    with open_sides(names, settings, 'generation') as sides:
        turns = take_turns(sides, settings, 'decode', 8)     # {'flatGPT int8': [Turn(...)], ...}

A side measures its turn's seconds itself and reports the work it did, so that only equal work is
compared. A side that fails becomes a line of the report; the others continue.
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

from flatgpt.benchmarks.baselines import BUILDERS
from flatgpt.benchmarks.machine import reset_peak_memory
from flatgpt.errors import UserError
from flatgpt.runtime import Runtime, init_runtime, is_out_of_memory, pick_dtype


class Turn(NamedTuple):
    seconds: float
    work: dict  # tokens; result: numbers to compare between sides; in training also the optimizer
    memory: int | None = None  # peak bytes, where they are measured

    @property
    def tokens_per_second(self) -> float:
        return self.work['tokens'] / self.seconds


class SideFailure(str):
    """Why a side cannot take a turn, in one line."""


class Side:
    """A program in a process of its own."""

    def __init__(self, name: str, settings: dict):
        self.name = name
        self.format = settings['format'] if settings['job'] != 'training' else ''
        context = multiprocessing.get_context('spawn')
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=run_side, args=(other, name, settings), daemon=True)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
        self.process.start()
        signal.signal(signal.SIGINT, before)
        other.close()
        self.failure: SideFailure | None = SideFailure('it is not ready')

    @property
    def label(self) -> str:
        return f'{self.name} {self.format}'.strip()

    def wait_until_ready(self) -> None:
        reply = self.receive()
        self.failure = reply if isinstance(reply, SideFailure) else None

    def turn(self, job: str, *arguments) -> Turn | None:
        """One turn; None where there is failure."""
        return self.ask(job, arguments, None)

    def profile(self, path: Path, job: str, *arguments) -> str | None:
        """One turn under torch's profiler: a table of the slowest operators, and a trace file."""
        return self.ask(job, arguments, str(path))

    def ask(self, job: str, arguments: tuple, trace: str | None):
        """What run_turn() returns in the side's process; None where there is failure."""
        if self.failure is not None:
            return None
        with contextlib.suppress(OSError):  # receive() reports that the process is gone
            self.pipe.send((job, arguments, trace))
        reply = self.receive()
        if isinstance(reply, SideFailure):
            self.failure = reply
            return None
        return reply

    def receive(self):
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return SideFailure('its process was killed, perhaps because memory ran out')

    def dismiss(self) -> None:
        """Have the process end, which close() waits for."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)

    def close(self) -> None:
        self.process.join(10)
        self.process.kill()


@contextlib.contextmanager
def open_sides(names: list[tuple], settings: dict, job: str) -> Iterator[list[Side]]:
    """Start a process for each (program, format of the weights), and end them afterwards.

    job: 'training' or 'generation'.
    """
    sides = []
    try:
        for name, kind in names:
            sides.append(Side(name, {**settings, 'job': job, 'format': kind}))
        for side in sides:
            side.wait_until_ready()
        yield sides
    finally:
        for side in sides:  # they take a second to end, all in the same one
            side.dismiss()
        for side in sides:
            side.close()


def take_turns(sides: list[Side], settings: dict, job: str, *arguments) -> dict[str, list[Turn]]:
    """Every side's turns, alternating, after one warm-up turn each."""
    turns = {side.label: [] for side in sides}
    for number in range(settings['rounds'] + 1):
        for side in sides:
            turn = side.turn(job, *arguments)
            if turn and number:
                turns[side.label].append(turn)
    return turns


def profile_turn(side: Side, settings: dict, job: str, *arguments) -> None:
    """With --profile, print the slowest operators of a turn and write its trace."""
    if not settings['profile'] or side.failure is not None:
        return
    path = Path(settings['json']).with_name(f'trace_{job}.json')
    if table := side.profile(path, job, *arguments):
        print(table)
        print(f'written: {path}, for https://ui.perfetto.dev')
    else:
        print(f'{side.label} could not be profiled: {side.failure}')


# -----------------------------------------------------------------------------
# in the side's own process


def run_side(pipe, name: str, settings: dict) -> None:
    """Build a side and send None; then run each requested turn and send it back."""
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            runtime = open_runtime(name, settings)
            program = BUILDERS[name](settings, runtime)
            pipe.send(None)
            while (request := pipe.recv()) is not None:
                pipe.send(run_turn(program, runtime, *request))
        except (EOFError, BrokenPipeError):  # the parent is gone
            return
        except ImportError as error:
            pipe.send(SideFailure(f'{error.name or error} is not installed'))
        except UserError as error:
            pipe.send(SideFailure(error))
        except Exception as error:
            text = f'{type(error).__name__}: {error}'
            cause = 'out of memory' if is_out_of_memory(error) else text
            pipe.send(SideFailure(cause.splitlines()[0][:200]))


def open_runtime(name: str, settings: dict) -> Runtime:
    device, dtype = settings['device'], settings['dtype']
    if name == 'flatGPT' or device.startswith('cuda'):
        return init_runtime(device, dtype)  # sets up the GPU; on a CPU, how our own memory is kept
    return Runtime(device, pick_dtype(dtype, device, training=True))


def run_turn(
    program, runtime: Runtime, job: str, arguments: tuple, trace: str | None
) -> Turn | str:
    """A turn; with `trace`, a path, the profiler's table instead."""
    gc.collect()
    reset_peak_memory(runtime.device)
    run = getattr(program, job)
    if trace:
        return profiled(lambda: run(*arguments), trace)
    seconds, work = run(*arguments)
    return Turn(seconds, work, runtime.peak_memory())


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
