"""The report of bench.py, printed and as JSON: each figure's median, lowest and highest value."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np

from flatgpt.benchmarks.implementations import Measurement
from flatgpt.errors import UserError


class Report:
    """Prints figures as they arrive, and writes all of them as JSON."""

    def __init__(self, settings: dict, machine: dict):
        self.path, self.machine = settings['json'], machine
        self.entries: list[dict] = []
        self.settings = {name: settings[name] for name in settings if name != 'json'}
        self.command = ' '.join(['python bench.py', *sys.argv[1:]])

    def add(self, benchmark: str, variant: str, note: str = '', **figures) -> None:
        # the names of the file format
        self.entries.append({'job': benchmark, 'side': variant, 'note': note, **figures})

    def compare(
        self,
        benchmark: str,
        measurements: dict[str, list[Measurement]],
        notes: dict,
        tolerances: dict,
    ):
        """Print and store a benchmark's rows: the speed of each variant, and ratios to others.

        A variant is an implementation, with its number format, or the size of the workload.
        tolerances: variant -> {another variant: the relative tolerance of their results}.
        """
        for variant, own in measurements.items():
            note = notes.get(variant) or ''
            figures = {}
            speeds = [measurement.tokens_per_second for measurement in own]
            if own:
                figures['tokens_per_second'] = summarize(speeds)
                figures['milliseconds'] = summarize(
                    [measurement.seconds * 1e3 for measurement in own]
                )
            print_row(benchmark, variant, format_spread(speeds, ',.0f') if own else '', note)
            for other, tolerance in tolerances.get(variant, {}).items():
                if own and measurements.get(other):
                    figures |= compare_with(other, measurements[other], own, tolerance)
            self.add(benchmark, variant, note, **figures)

    def write(self) -> None:
        content = {'command': self.command, 'settings': self.settings, 'machine': self.machine}
        content['results'] = self.entries
        try:
            Path(self.path).write_text(json.dumps(content, indent=1) + '\n')
        except OSError as error:
            text = f'json={self.path}: cannot be written ({error.strerror}); give another --json='
            raise UserError(text) from error
        print(f'wrote {self.path}')


def compare_with(
    other: str, others: list[Measurement], own: list[Measurement], tolerance: float
) -> dict:
    """Print how many times as fast another variant is, or why there is no ratio -> the figure."""
    if reason := difference(others[0].work, own[0].work, tolerance):
        print(f'{"":<16} no ratio to {other}: {reason}', flush=True)
        return {f'no ratio to {other}': reason}
    ratios = [mine.seconds / its.seconds for its, mine in zip(others, own, strict=False)]
    print(f'{"":<16} {other} is {format_spread(ratios, ".2f")} times as fast', flush=True)
    return {f'times as fast is {other}': summarize(ratios)}


def difference(a: dict, b: dict, tolerance: float) -> str:
    """What differs between the work of two measurements or its results, '' if nothing does."""
    if a['tokens'] != b['tokens']:
        return f'{a["tokens"]:,} against {b["tokens"]:,} tokens'
    if a.get('optimizer') != b.get('optimizer'):
        return f'{a["optimizer"]} against {b["optimizer"]}'
    if a['result'] is None or b['result'] is None:  # ids in fewer bits
        return ''
    x, y = np.array(a['result'], float), np.array(b['result'], float)
    limit = tolerance * np.abs(y).max(initial=0)
    near = x.shape == y.shape and bool((np.abs(x - y) <= limit).all())
    return '' if near else 'the results differ'


def summarize(values: list[float]) -> dict[str, float]:
    return {'median': statistics.median(values), 'low': min(values), 'high': max(values)}


def format_spread(values: list[float], spec: str) -> str:
    """'12.1 (11.8 to 12.2)': the median, the lowest and the highest."""
    return f'{statistics.median(values):{spec}} ({min(values):{spec}} to {max(values):{spec}})'


def print_row(benchmark: str, variant: str, figures: str, note: str) -> None:
    print(f'{benchmark:<16} {variant:<23} {figures:<40} {note}'.rstrip(), flush=True)
