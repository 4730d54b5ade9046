"""The runs behind config/auto.py: kept in a table, not repeated, and fitted by a law."""

import json
import math

import pytest
import torch
from error_lines import case

from flatgpt.benchmarks import scaling
from flatgpt.benchmarks.report import Report
from flatgpt.errors import UserError
from flatgpt.runtime import Runtime, pick_dtype
from flatgpt.training.scaling import LAW, Law, Text, fit

TRUE = Law(size=7e3, a=0.4, depth=0.4, data=3e4, b=0.35, span=3.0, c=0.8, repeat_decay=10.0)


def made_up_rows():
    """Losses that follow TRUE, on three texts of different sizes, scales and lowest losses."""
    for name, unique, lowest, unit in (
        ('a', 2e7, 0.7, 1.0),
        ('b', 1e6, 1.1, 1.3),
        ('c', 2e5, 0.5, 0.8),
    ):
        for n_layer, n_embd in ((2, 64), (2, 128), (4, 128), (2, 192), (5, 192)):
            for tokens in (3e5, 1e6, 3e6):
                for block_size in (64, 256):
                    parameters = 12 * n_layer * n_embd**2
                    text = Text(int(unique), 257, 1.0)
                    excess = TRUE.predict(parameters, n_layer, tokens, block_size, text)
                    yield {
                        'dataset': name, 'text_tokens': unique, 'text_bytes': unique,
                        'n_layer': n_layer, 'n_embd': n_embd, 'block_size': block_size,
                        'trained': tokens, 'val_loss': lowest + unit * excess,
                    }  # fmt: skip


def test_the_fit_finds_a_law_that_orders_models_as_the_true_one():
    law, texts, error = fit(made_up_rows())
    assert error < 0.003
    assert texts['b'][1] / texts['c'][1] == pytest.approx(1.3 / 0.8, rel=0.15)
    text = Text(20_000_000, 257, 1.0)
    flops = 2e13

    def best(law):
        shapes = [(n, 12 * n * c * c) for n, c in ((2, 64), (2, 128), (4, 128), (5, 160), (6, 256))]
        return min(shapes, key=lambda s: law.predict(s[1], s[0], flops / 6 / s[1], 256, text))

    chosen, right = best(law), best(TRUE)
    losses = [TRUE.predict(n, layers, flops / 6 / n, 256, text) for layers, n in (chosen, right)]
    assert losses[0] - losses[1] < 0.005


def test_the_law_in_the_source_is_the_fit_of_the_table():
    rows = [json.loads(line) for line in scaling.SCALING.read_text().splitlines()]
    law, _, error = fit(rows)
    assert error < 0.02
    assert all(math.isclose(a, b, rel_tol=0.05) for a, b in zip(law, LAW, strict=True)), law


def test_repeated_tokens_count_less_and_less():
    tokens = torch.tensor([0.5, 1, 2, 20, 40, 10_000]) * 1e6
    useful = TRUE.useful_tokens(tokens, torch.tensor(1e6)).tolist()
    assert useful[:2] == [5e5, 1e6]
    assert useful == sorted(useful)
    assert useful[2] < 2e6
    assert useful[5] == pytest.approx(11e6)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Empty tables, a grid of one tiny model, and the runs that are made for them."""
    runs, run_train = [], scaling.run_train

    def count(config, flags):
        runs.append(flags)
        return run_train(config, flags)

    monkeypatch.setattr(scaling, 'run_train', count)
    monkeypatch.setattr(scaling, 'SCALING', tmp_path / 'scaling.jsonl')
    monkeypatch.setattr(scaling, 'GRID', [(9e4, 2, 64, 16), (1e9, 2, 64, 16)])
    monkeypatch.setattr(scaling, 'fit', lambda rows: (LAW, {}, float(len([*rows]))))
    return tmp_path / 'scaling.jsonl', runs


def test_a_run_is_one_row_and_is_not_repeated(table, byte_dataset, tmp_path):
    path, runs = table
    settings = {'dataset': str(byte_dataset), 'max_tokens': 1e5, 'seed': 1, 'json': 'x.json'}
    runtime = Runtime('cpu', pick_dtype('float32', 'cpu'))
    for _ in range(2):
        scaling.bench_scaling(settings, runtime, Report(settings, {}))
        (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(runs) == 2  # training and the evaluation
    assert (row['n_layer'], row['n_embd'], row['block_size']) == (2, 64, 16)
    assert abs(row['trained'] - 9e4) < 3000
    assert 0 < row['val_loss'] < 5


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('rivals are written down for', {'minutes': 3.0}, {'minutes': 1.0}),
    ],
)
def test_only_the_minutes_with_rivals_are_accepted(bad, good, monkeypatch, byte_dataset):
    made = []
    row = {'val_loss': 1.0, 'seconds': 60.0}
    monkeypatch.setattr(scaling, 'train_once', lambda *args: made.append(args) or row)
    settings = {'dataset': str(byte_dataset), 'seed': 1, 'json': 'x.json'}
    runtime = Runtime('cpu', pick_dtype('float32', 'cpu'))
    with pytest.raises(UserError):
        scaling.bench_rivals(settings | bad, runtime, Report(settings, {}))
    assert not made
    scaling.bench_rivals(settings | good, runtime, Report(settings, {}))
    assert len(made) == 2 * 5  # two seeds, auto and four rivals
