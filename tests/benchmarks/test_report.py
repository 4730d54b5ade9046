"""The report: like is compared with like, and every figure has its spread."""

import json
from pathlib import Path

import pytest

from flatgpt.benchmarks.implementations import Measurement
from flatgpt.benchmarks.report import Report, difference
from flatgpt.errors import ConfigError, UserError


def measurements(tokens, seconds, result=(1.0, -2.0)):
    return [Measurement(s, {'tokens': tokens, 'result': list(result)}) for s in seconds]


@pytest.fixture
def report(tmp_path):
    return Report({'json': str(tmp_path / 'bench.json')}, {})


def test_every_figure_and_ratio_carries_its_spread(report, capsys):
    variants = {
        'flatGPT': measurements(100, [1.0, 2.0, 4.0]),
        'other': measurements(100, [3.0, 4.0, 8.0]),
    }
    report.compare('training', variants, {'other': 'as documented'}, {'other': {'flatGPT': 0.01}})
    out = capsys.readouterr().out
    assert '50 (25 to 100)' in out
    assert 'flatGPT is 2.00 (2.00 to 3.00) times as fast' in out
    report.write()
    entry = json.loads(Path(report.path).read_text())['results'][1]
    assert entry['times as fast is flatGPT'] == {'median': 2.0, 'low': 2.0, 'high': 3.0}
    assert entry['note'] == 'as documented'


@pytest.mark.parametrize(
    ('theirs', 'reason'),
    [
        (measurements(99, [1.0]), '100 against 99 tokens'),
        (measurements(100, [1.0], (1.0, -2.5)), 'results differ'),
    ],
)
def test_no_ratio_between_variants_that_did_different_work(report, capsys, theirs, reason):
    variants = {'flatGPT': measurements(100, [1.0]), 'other': theirs}
    report.compare('training', variants, {}, {'other': {'flatGPT': 0.01}})
    out = capsys.readouterr().out
    assert reason in out
    assert 'times' not in out


def test_results_may_differ_by_the_tolerance_only():
    a, b = {'tokens': 1, 'result': [1.0, 2.0]}, {'tokens': 1, 'result': [1.01, 2.0]}
    assert difference(a, b, 0.01) == ''
    assert difference(a, b, 0.001)
    assert difference(a, {'tokens': 1, 'result': [1.0]}, 1.0)
    assert difference(a, {'tokens': 1, 'result': []}, 1.0)
    assert difference(a, {'tokens': 1, 'result': None}, 0.001) == ''  # ids in fewer bits
    assert difference(a, {'tokens': 1, 'result': [float('nan'), 2.0]}, 1.0)


def test_other_optimizers_are_not_compared():
    ours, theirs = ({'tokens': 1, 'result': [1.0], 'optimizer': name} for name in 'ab')
    assert difference(ours, theirs, 0.1) == 'a against b'


def test_a_missing_baseline_is_a_row_of_the_table(report, capsys):
    variants = {'flatGPT': measurements(1, [1.0]), 'other': []}
    report.compare('training', variants, {'other': 'is not installed'}, {})
    assert 'is not installed' in capsys.readouterr().out


def test_an_unwritable_report_is_one_line(tmp_path):
    report = Report({'json': str(tmp_path)}, {})
    with pytest.raises((UserError, ConfigError), match='cannot be written'):
        report.write()
