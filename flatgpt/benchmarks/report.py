"""What bench.py prints and writes of each figure: its median, and between what all of them lie."""

import contextlib
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from flatgpt.benchmarks.baselines import (
    Side,
    synchronize,
)
from flatgpt.errors import UserError
from flatgpt.runtime import Runtime


class Report:
    """Prints each figure as it comes, and writes all of them as JSON."""

    def __init__(self, c: dict, machine: dict):
        self.path, self.machine, self.entries = c['json'], machine, []
        self.settings = {name: c[name] for name in c if name != 'json'}
        self.command = ' '.join(['python bench.py', *sys.argv[1:]])

    def add(self, job: str, side: str, note: str = '', **figures) -> None:
        self.entries.append({'job': job, 'side': side, 'note': note, **figures})

    def compare(self, job: str, turns: dict[str, list], notes: dict, against: dict) -> None:
        """Print and keep a job's lines: the speed of each side, and how it compares with others.

        against: side -> {another side: how far apart, relatively, their results may be}.
        """
        for side, results in turns.items():
            note, figures = notes.get(side) or '', {}
            if results:
                speeds = [work['tokens'] / seconds for seconds, work, _ in results]
                figures['tokens_per_second'] = spread(speeds)
                figures['milliseconds'] = spread([seconds * 1e3 for seconds, _, _ in results])
            line(job, side, shown(speeds, ',.0f') if results else '', note)
            for other, tolerance in against.get(side, {}).items():
                if not results or not turns.get(other):
                    continue
                reason = different(turns[other][0][1], results[0][1], tolerance)
                times = [t[0] / o[0] for o, t in zip(turns[other], results, strict=False)]
                if reason:
                    print(f'{"":<16} no ratio to {other}: {reason}', flush=True)
                    figures[f'no ratio to {other}'] = reason
                else:
                    beside = f'{other} is {shown(times, ".2f")} times as fast'
                    print(f'{"":<16} {beside}', flush=True)
                    figures[f'times as fast is {other}'] = spread(times)
            self.add(job, side, note, **figures)

    def write(self) -> None:
        content = {'command': self.command, 'settings': self.settings, 'machine': self.machine}
        content['results'] = self.entries
        try:
            Path(self.path).write_text(json.dumps(content, indent=1) + '\n')
        except OSError as error:
            raise UserError(f'json={self.path}: cannot be written: {error.strerror}') from error
        print(f'written: {self.path}')


def spread(values: list[float]) -> dict:
    return {'median': statistics.median(values), 'low': min(values), 'high': max(values)}


def shown(values: list[float], how: str) -> str:
    """'12.1 (11.8 to 12.2)': the median, and between what all lie."""
    return f'{statistics.median(values):{how}} ({min(values):{how}} to {max(values):{how}})'


def line(job: str, side: str, figures: str, note: str) -> None:
    print(f'{job:<16} {side:<23} {figures:<40} {note}'.rstrip(), flush=True)


def different(ours: dict, theirs: dict, tolerance: float) -> str:
    """'' if two sides did the same work with the same result, else what differs."""
    if ours['tokens'] != theirs['tokens']:
        return f'{ours["tokens"]:,} against {theirs["tokens"]:,} tokens'
    if ours.get('optimizer') != theirs.get('optimizer'):
        return f'{ours["optimizer"]} against {theirs["optimizer"]}'
    a, b = np.array(ours['result'], float), np.array(theirs['result'], float)
    limit = tolerance * np.abs(b).max(initial=0)
    near = a.shape == b.shape and bool((np.abs(a - b) <= limit).all())
    return '' if near else 'the results differ'


def take_turns(sides: list[Side], c: dict, job: str, *arguments) -> dict[str, list]:
    """Every side's turns, alternating, after one each that does not count."""
    turns = {side.label: [] for side in sides}
    for number in range(c['rounds'] + 1):
        for side in sides:
            result = side.turn(job, *arguments)
            if result and number:
                turns[side.label].append(result)
    return turns


def measure_machine(runtime: Runtime) -> dict:
    """What bounds everything else: bytes/s of reading memory, FLOP/s of matrix products."""
    device, gib = runtime.device, 2**30
    found = {'device': device, 'python': platform.python_version(), 'torch': torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found['transformers'] = importlib.metadata.version('transformers')
    found['threads'] = torch.get_num_threads() if device == 'cpu' else None
    name = torch.cuda.get_device_name(device) if runtime.device_type == 'cuda' else processor()
    found['name'] = name
    big = torch.ones(gib // 8 if device == 'cpu' else gib, device=device)
    seconds = time_often(big.sum, device)
    found['read_bytes_per_second'] = big.numel() * 4 / statistics.median(seconds)
    for kind in {torch.float32, torch.bfloat16, runtime.dtype}:
        size = 2048 if device == 'cpu' else 8192
        a = torch.randn(size, size, device=device).to(kind)
        seconds = time_often(lambda a=a: a @ a, device)
        found[f'flops_{str(kind)[6:]}'] = 2 * size**3 / statistics.median(seconds)
    flops = ', '.join(f'{k[6:]} {v / 1e9:,.0f}' for k, v in sorted(found.items()) if 'flops' in k)
    threads = f', {found["threads"]} threads' if found['threads'] else ''
    print(f'{name}{threads}, torch {torch.__version__}')
    print(f'reads {found["read_bytes_per_second"] / 1e9:.0f} GB/s; products, GFLOP/s: {flops}')
    return found


def processor() -> str:
    with contextlib.suppress(OSError):
        for line_ in Path('/proc/cpuinfo').read_text().splitlines():
            if line_.startswith('model name'):
                return line_.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def time_often(run, device: str, times: int = 9) -> list[float]:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds
