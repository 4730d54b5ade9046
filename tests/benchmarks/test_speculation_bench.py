"""bench.py --only=speculation: prescribed texts with and without guesses."""

import json

import pytest
import torch
from benches import settings

import bench
from flatgpt.benchmarks.baselines import FlatGPTGeneration
from flatgpt.benchmarks.speculation import texts
from flatgpt.inference.speculation import NGRAM
from flatgpt.runtime import Runtime

pytest_plugins = ['benches']


@pytest.fixture
def shape():
    flags = '--prompt_tokens=60', '--new_tokens=60', '--block_size=120', '--vocab_size=300'
    return {**settings(*flags, '--device=cpu'), 'workload': 'generation', 'format': 'float32'}


def test_the_engine_writes_the_prescribed_text(shape):
    program = FlatGPTGeneration(shape, Runtime('cpu', torch.float32))
    for name, ids in texts(shape).items():
        assert len(ids) == 120
        for rows in (1, 2):
            _, plain = program.follow(ids, rows, None)
            _, guessed = program.follow(ids, rows, NGRAM)
            assert plain['result'] == guessed['result'] == ids[60:]
            assert plain['tokens'] == guessed['tokens'] == 60 * rows
            if name in ('edit', 'JSON'):
                assert guessed['passes'] < plain['passes'] * 0.8
            if name == 'random':
                assert guessed['passes'] == plain['passes']


@pytest.mark.usefixtures('small_machine', 'in_this_process')
def test_guesses_are_compared_with_none_for_each_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = '--prompt_tokens=40', '--new_tokens=30', '--block_size=70', '--vocab_size=300'
    bench.main(
        settings('--only=speculation', '--formats=float32', '--rows=1', '--device=cpu', *flags)
    )
    out = capsys.readouterr().out
    assert out.count('float32 ngram is') == 4
    assert 'no ratio' not in out
    results = json.loads((tmp_path / 'bench.json').read_text())['results']
    assert len(results) == 8
    assert 'tokens per pass' in results[0]['note']
