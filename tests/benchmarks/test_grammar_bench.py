"""The benchmark of structured output, on a tiny model."""

import json
import os

import pytest
from benches import settings

import bench

pytest.importorskip('llguidance', reason='llguidance is not installed')


@pytest.mark.skipif('TIKTOKEN_CACHE_DIR' not in os.environ, reason='needs the GPT-2 vocabulary')
@pytest.mark.usefixtures('small_machine')
def test_the_cost_of_a_grammar_is_measured_beside_steps_without(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench.main(settings('--only=grammar', '--rows=2', '--formats=float32'))
    assert 'of a step' in capsys.readouterr().out
    (result,) = json.loads((tmp_path / 'bench.json').read_text())['results']
    assert result['job'] == 'grammar 2 rows'
    assert result['seconds']['median'] > 0
    assert result['masked_seconds']['median'] > 0
