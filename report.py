"""What bench.py prints and writes of each figure: its median, and between what all of them lie."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np

from configurator import UserError


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
