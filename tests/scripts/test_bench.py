"""bench.py: its settings, its benchmarks, and mistakes, each of which is one line."""

import json
import re
from pathlib import Path

import pytest
from benches import refused, settings

import bench
from configurator import help_text
from flatgpt.errors import UserError

pytest_plugins = ['benches']


def test_help_has_the_meaning_of_every_setting():
    lines = help_text({'__file__': bench.__file__, **vars(bench)}).splitlines()
    listed = [line for line in lines if re.match(r'  \w+ = ', line)]
    assert len(listed) == 45
    meaning = r"  \w+ = ('[^']*'|\S+) +\S"
    assert [line for line in listed if not re.match(meaning, line)] == []


def test_quick_changes_only_what_no_flag_sets():
    flags = ['--n_layer=12', '--rounds=5', '--n_embd=64']  # two of them as by default
    quick = bench.read_settings(['--quick', *flags])
    assert [quick[name] for name in ('n_layer', 'rounds', 'n_embd')] == [12, 5, 64]
    assert (quick['vocab_size'], quick['rows']) == (8192, '1,8')
    assert bench.read_settings(flags)['vocab_size'] == 50304


@pytest.mark.usefixtures('small_machine', 'in_this_process')
def test_implementations_alternate_and_a_training_step_is_profiled(tmp_path, monkeypatch, capsys):
    pytest.importorskip('transformers', reason='transformers is not installed')
    monkeypatch.chdir(tmp_path)
    bench.main(settings('--only=training', '--batch_size=2', '--profile'))
    out = capsys.readouterr().out
    assert 'ms a step, MFU' in out
    assert 'flatGPT is' in out
    assert 'aten::' in out
    assert 'float32' in out or 'bfloat16' in out
    assert json.loads((tmp_path / 'trace_training.json').read_text())['traceEvents']
    results = json.loads((tmp_path / 'bench.json').read_text())['results']
    assert [entry['side'] for entry in results] == ['flatGPT', 'transformers']


@pytest.mark.usefixtures('small_machine')
def test_figures_are_written_even_if_a_later_benchmark_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def broken(*args):
        raise UserError('no text')

    monkeypatch.setitem(bench.BENCHMARKS, 'data', broken)
    assert refused('--only=data') == 'no text'
    assert json.loads((tmp_path / 'bench.json').read_text())['machine']['read_bytes_per_second']


@pytest.mark.parametrize(
    ('flags', 'line'),
    [
        (['--only=decoding'], "only='decoding'"),
        (['--formats=int4'], "formats='int4'"),
        (['--serve', '--serve_format=int4'], "serve_format='int4'"),
        (['--serve', '--clients=0'], 'clients=0'),
        (['--rows=many'], "rows='many'"),
        (['--rows=1,,2'], "rows='1,,2'"),
        (['--prompt_tokens=13'], 'do not fit into block_size=16'),
        (['--nanogpt=nowhere'], 'no model.py of nanoGPT'),
        (['--nanogpt=x', '--arch=modern'], 'only has GPT-2'),
        (['--only=quality'], '--out_dir=RUN'),
        (['--out_dir=nowhere'], 'nowhere: no such run directory'),
        (['--text=nowhere'], 'text=nowhere: no such'),
        (['--json=nowhere/bench.json'], 'json=nowhere'),
        (['--n_layer=8', '--n_embd=65536'], 'GiB'),
        (['--rounds=0'], 'rounds'),
        (['--limit=3'], 'limit=3: is only for --task=; omit it'),
        (['--start=x'], "start='x': is only for --report=; omit it"),
        (['--report=a', '--compare=a'], '--compare and --report: give one of them'),
        (['--only=decode', '--nanogpt=x'], "nanogpt='x': is only for --only=training"),
        (['--only=training', '--text=x'], "text='x': is only for --only=data"),
        (['--serve', '--profile'], 'profile=True: is only for --only=training or --only=prefill'),
        (['--task=cbt', '--nanogpt=x'], "nanogpt='x': is only for --only=training"),
    ],
)
def test_a_mistake_is_one_line(flags, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert line in refused(*flags)


def test_compare_draws_the_losses_of_runs_into_one_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in 'ab':
        Path(name).mkdir()
        line = '{"step": 0, "val_loss": 3.0, "seconds": 0.5}\n'
        (tmp_path / name / 'metrics.jsonl').write_text(line)
    bench.main(settings('--compare=a,b'))
    assert capsys.readouterr().out == 'runs.png\n'
    assert Path('runs.png').read_bytes().startswith(b'\x89PNG')
    assert {path.name for path in tmp_path.iterdir()} == {'a', 'b', 'runs.png'}
    Path('c').mkdir()
    assert refused('--compare=a,c') == 'c: has no metrics.jsonl; give a run directory'
    for runs, missing in (('a,d', 'd'), ('', ''), ('a,', '')):
        assert refused(f'--compare={runs}').startswith(f'compare={missing}: no such run directory')
