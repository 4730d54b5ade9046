"""The bench: like is compared with like, and every mistake is one line."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
from configurator import configure
from flatgpt.benchmarks import baselines, decoding
from flatgpt.benchmarks import data as data_module
from flatgpt.benchmarks.report import Report, different
from flatgpt.checkpoint import save
from flatgpt.checkpoint.convert import export_transformers
from flatgpt.data.dataset import Writer
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer
from flatgpt.errors import ConfigError, UserError
from flatgpt.runtime import Runtime
from model import GPT, GPTConfig

SCRIPT = Path(bench.__file__)
TINY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--vocab_size=40', '--block_size=16']
TINY += ['--prompt_tokens=4', '--new_tokens=5', '--rounds=1', '--steps=1', '--device=cpu']


def settings(*flags):
    return configure({'__file__': str(SCRIPT), **vars(bench)}, [*TINY, *map(str, flags)])


def refused(*flags) -> str:
    with pytest.raises(UserError) as caught:
        bench.main(settings(*flags))
    assert '\n' not in str(caught.value)
    return str(caught.value)


def turns(tokens, seconds, result=(1.0, -2.0)):
    return [(s, {'tokens': tokens, 'result': list(result)}, 0) for s in seconds]


@pytest.fixture
def report(tmp_path):
    return Report({'json': str(tmp_path / 'bench.json')}, {})


def test_every_figure_and_ratio_carries_its_spread(report, capsys):
    sides = {'flatGPT': turns(100, [1.0, 2.0, 4.0]), 'peer': turns(100, [3.0, 4.0, 8.0])}
    report.compare('job', sides, {'peer': 'as documented'}, {'peer': {'flatGPT': 0.01}})
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
        (turns(99, [1.0]), '100 against 99 tokens'),
        (turns(100, [1.0], (1.0, -2.5)), 'results differ'),
    ],
)
def test_no_ratio_between_sides_that_did_different_work(report, capsys, theirs, reason):
    sides = {'flatGPT': turns(100, [1.0]), 'peer': theirs}
    report.compare('job', sides, {}, {'peer': {'flatGPT': 0.01}})
    out = capsys.readouterr().out
    assert reason in out
    assert 'times' not in out


def test_results_may_differ_by_the_tolerance_only():
    a, b = {'tokens': 1, 'result': [1.0, 2.0]}, {'tokens': 1, 'result': [1.01, 2.0]}
    assert different(a, b, 0.01) == ''
    assert different(a, b, 0.001)
    assert different(a, {'tokens': 1, 'result': [1.0]}, 1.0)
    assert different(a, {'tokens': 1, 'result': [float('nan'), 2.0]}, 1.0)


@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_the_sides_write_as_many_tokens_from_the_same_weights(arch, tmp_path):
    pytest.importorskip('transformers', reason='transformers is not installed')
    flags = [*TINY, f'--arch={arch}', '--only=prefill,decode', '--rows=1,3', '--formats=float32']
    command = [sys.executable, SCRIPT, *flags]
    ran = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    results = json.loads((tmp_path / 'bench.json').read_text())['results']
    assert [entry['job'] for entry in results[::2]] == [
        'prefill 1 row',
        'prefill 3 rows',
        'decode 1 row',
        'decode 3 rows',
    ]
    for ours, theirs in zip(results[::2], results[1::2], strict=True):
        assert ours['side'] == 'flatGPT float32'
        assert theirs['times as fast is flatGPT float32']['median'] > 0
    assert 'of the limit by' in results[4]['note']


def test_a_training_step_is_compared_with_transformers_and_profiled(tmp_path):
    pytest.importorskip('transformers', reason='transformers is not installed')
    command = [sys.executable, SCRIPT, *TINY, '--only=training', '--batch_size=2', '--profile']
    ran = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert 'ms a step, MFU' in ran.stdout
    assert 'flatGPT is' in ran.stdout
    assert 'aten::' in ran.stdout
    assert 'float32' in ran.stdout or 'bfloat16' in ran.stdout
    assert json.loads((tmp_path / 'trace_training.json').read_text())['traceEvents']


class Pipe:
    """What a side's process says, without a process."""

    def __init__(self, requests=()):
        self.requests, self.said = [*requests, None], []

    def recv(self):
        return self.requests.pop(0)

    def send(self, message):
        self.said.append(message)


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (ModuleNotFoundError("No module named 'x'", name='transformers'), 'is not installed'),
        (UserError('no such thing'), 'no such thing'),
        (torch.OutOfMemoryError('tried to allocate'), 'out of memory'),
        (RuntimeError('something\nlong'), 'RuntimeError: something'),
    ],
)
def test_a_side_that_cannot_be_built_says_why_in_a_line(monkeypatch, error, line):
    def build(settings, runtime):
        raise error

    monkeypatch.setitem(baselines.SIDES, 'transformers', build)
    pipe = Pipe()
    baselines.serve_turns(pipe, 'transformers', {'device': 'cpu', 'dtype': 'float32'})
    assert len(pipe.said) == 1
    assert line in pipe.said[0]
    assert '\n' not in pipe.said[0]


def test_a_side_that_was_killed_is_a_line_and_not_a_broken_pipe():
    side = baselines.Side.__new__(baselines.Side)
    side.pipe, other = multiprocessing.Pipe()
    other.close()
    side.trouble = None
    assert side.turn('decode', 1) is None
    assert 'was killed' in side.trouble


def test_other_optimizers_are_not_compared():
    ours, theirs = ({'tokens': 1, 'result': [1.0], 'optimizer': name} for name in 'ab')
    assert different(ours, theirs, 0.1) == 'a against b'


def test_figures_are_written_even_if_a_later_job_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def broken(*args):
        raise UserError('no text')

    monkeypatch.setattr(bench, 'bench_data', broken)
    assert refused('--only=data') == 'no text'
    assert json.loads((tmp_path / 'bench.json').read_text())['machine']['read_bytes_per_second']


def test_text_is_cut_between_characters(tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'out').mkdir()
    for name in ('a', 'b'):
        (tmp_path / 'in' / name).write_text('日本' * 10, encoding='utf-8')
    texts = data_module.copy_texts(
        {'text': str(tmp_path / 'in'), 'text_bytes': 70}, tmp_path / 'out'
    )
    assert texts == ['日本' * 10, '日本日']


def test_a_missing_peer_is_a_line_of_the_table(report, capsys):
    report.compare(
        'job', {'flatGPT': turns(1, [1.0]), 'peer': []}, {'peer': 'is not installed'}, {}
    )
    assert 'is not installed' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('flags', 'line'),
    [
        (['--only=decoding'], "only='decoding'"),
        (['--formats=int4'], "formats='int4'"),
        (['--rows=many'], "rows='many'"),
        (['--rows=1,,2'], "rows='1,,2'"),
        (['--prompt_tokens=13'], 'do not fit into block_size=16'),
        (['--nanogpt=nowhere'], 'no nanoGPT model.py'),
        (['--nanogpt=x', '--arch=modern'], 'cannot be timed beside'),
        (['--only=quality'], '--out_dir=RUN'),
        (['--out_dir=nowhere'], 'nowhere: no such folder'),
        (['--text=nowhere'], 'text=nowhere: no such'),
        (['--json=nowhere/bench.json'], 'json=nowhere'),
        (['--n_layer=8', '--n_embd=65536'], 'GiB'),
        (['--rounds=0'], 'rounds'),
    ],
)
def test_a_mistake_is_one_line(flags, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert line in refused(*flags)


def test_the_text_in_memory_is_that_of_the_copied_files(tmp_path):
    source, out = tmp_path / 'source', tmp_path / 'out'
    source.mkdir()
    out.mkdir()
    (source / 'a.txt').write_bytes(b'\xef\xbb\xbfmarked')
    (source / 'b.txt').write_text('plain')
    (source / 'c.bin').write_bytes(b'\xff\x00')
    texts = data_module.copy_texts({'text': str(source), 'text_bytes': 1000}, out)
    assert texts == ['marked', 'plain']
    assert [path.read_text() for path in sorted(out.iterdir())] == texts
    with pytest.raises(UserError, match='two files'):
        data_module.copy_texts({'text': str(source / 'b.txt'), 'text_bytes': 1000}, out)


def test_a_dataset_is_prepared_from_a_folder_and_counted_without_the_ends_of_text(tmp_path):
    for name in ('a', 'b', 'c'):
        (tmp_path / f'{name}.txt').write_text(name * 10)
    seconds, work = data_module.prepared('byte', str(tmp_path))
    assert seconds > 0
    assert work == {'tokens': 30, 'result': [10.0 * (97 + 98 + 99)]}


def test_perplexity_in_eight_bits_is_near_that_in_32(tmp_path, monkeypatch, report, capsys):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    with Writer(tmp_path / 'data', tokenizer) as writer:
        for split in ('train', 'val'):
            writer.write(split, np.arange(400) % 97)
    model = GPT(GPTConfig(16, tokenizer.vocab_size, 2, 2, 32))
    state = {'step': 1, 'val_loss': 5.0, 'config': {'dataset': str(tmp_path / 'data')}}
    save.save(tmp_path / 'run', model, [], tokenizer, state, keep_evaluated=False)
    config = settings('--only=quality', f'--out_dir={tmp_path / "run"}')
    decoding.bench_quality(config, Runtime('cpu', torch.float32), report)
    found = {entry['side']: entry['perplexity'] for entry in report.entries}
    assert [*found] == ['float32', 'bfloat16', 'int8']
    assert abs(found['int8'] / found['float32'] - 1) < 0.01
    assert '399 tokens of data' in capsys.readouterr().out

    export_transformers(model, tokenizer, {}, tmp_path / 'theirs')
    assert '--dataset=' in refused('--only=quality', f'--out_dir={tmp_path / "theirs"}')
    flags = [f'--out_dir={tmp_path / "theirs"}', f'--dataset={tmp_path / "data"}']
    again = Report({'json': 'bench.json'}, {})
    decoding.bench_quality(settings(*flags), Runtime('cpu', torch.float32), again)
    assert again.entries[0]['perplexity'] == found['float32']
    with Writer(tmp_path / 'other', char_tokenizer('ab')) as writer:
        for split in ('train', 'val'):
            writer.write(split, np.arange(400) % 2)
    flags[1] = f'--dataset={tmp_path / "other"}'
    with pytest.raises(UserError, match='was not made with the tokenizer'):
        decoding.bench_quality(settings(*flags), Runtime('cpu', torch.float32), again)


def test_a_run_whose_data_is_gone_is_refused(tmp_path):
    with pytest.raises(UserError, match='is not here'):
        decoding.dataset_of({'config': {'dataset': str(tmp_path)}}, None)


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
    assert 'c: there is no metrics.jsonl' in refused('--compare=a,c')


def test_an_unwritable_report_is_one_line(tmp_path):
    report = Report({'json': str(tmp_path)}, {})
    with pytest.raises((UserError, ConfigError), match='cannot be written'):
        report.write()


def test_batches_are_read_from_as_many_files_as_were_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr('flatgpt.benchmarks.data.TOKENS', 200_000)
    data = data_module.cut_into(tmp_path, 20)
    assert len(list(tmp_path.glob('train-*.bin'))) == 20
    assert data.tokens['train'] == 200_000
    turns = data_module.read_batches(data, 2)
    assert len(turns) == 2
    assert all(seconds > 0 and work['tokens'] == 20 * 64 * 1024 for seconds, work, _ in turns)
