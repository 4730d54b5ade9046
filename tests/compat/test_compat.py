"""
Compatibility: files written by the code before the move into flatgpt/ still work.

make.py made the folder made_by_7300f54 with that code; its expected.json has what that code
computes from it. The tests use only paths and commands that users of the old version know.
"""

import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metrics
from make import BATCH, GREEDY, MADE, NEW_RUNS, PROMPT, RESUME, RUNS

import api
from flatgpt.checkpoint.__main__ import main as look
from flatgpt.checkpoint.load import load_model

EXPECTED = json.loads((MADE / 'expected.json').read_text(encoding='utf-8'))
CLOSE = 1e-4  # relative; processors round differently
CLOSE_WITH_MUON = 1e-3  # whose update has changed since
LAST = 'checkpoints/step-00000020'


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A copy of the old folder, as the current folder."""
    folder = shutil.copytree(MADE, tmp_path / 'made')
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def sample(monkeypatch, capsys):
    """Run sample.py as a command -> what it prints."""

    def run(*args):
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'argv', ['sample.py', *args])
            patch.setattr(sys, 'excepthook', sys.excepthook)
            patch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO()))
            runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
        return capsys.readouterr().out

    return run


def check_losses(name, out_dir):
    close = CLOSE_WITH_MUON if 'modern' in name else CLOSE
    for key, expected in EXPECTED['losses'][name].items():
        found = metrics(out_dir, key)
        for step, loss in expected.items():
            assert found[int(step)] == pytest.approx(loss, rel=close), (key, step)


def test_the_old_folder_is_small_and_intact(made, capsys):
    assert sum(path.stat().st_size for path in made.rglob('*') if path.is_file()) < 300_000
    for name in RUNS:
        look(['verify', f'runs/{name}'])
        assert capsys.readouterr().out.count(' ok\n') == 1


@pytest.mark.parametrize('name', RUNS)
def test_a_run_resumes_with_the_losses_of_the_old_code(name, made, run_here):
    """With its config.py, which must be accepted although a setting may no longer exist."""
    assert run_here(*RESUME, config=Path('runs') / name / 'config.py') == 0
    check_losses(f'runs/{name}', made / 'runs' / name)
    assert (made / 'runs' / name / 'DONE').exists()


def test_an_old_config_starts_another_run(made, run_here, tmp_path):
    config = made / 'runs/modern/config.py'
    text = config.read_text(encoding='utf-8')
    assert 'published = None' in text
    config.write_text(text.replace('published = None', "published = 'loss 3.29'"), encoding='utf-8')
    flags = ('--max_iters=1', '--eval_interval=1', f'--out_dir={tmp_path / "other"}')
    assert run_here(*flags, config=config) == 0
    assert [*metrics(tmp_path / 'other')] == [1]


@pytest.mark.parametrize('name', NEW_RUNS)
def test_a_new_run_starts_from_an_old_model_and_dataset(name, made, run_here):
    out_dir = made / 'new' / name
    assert run_here(f'--out_dir={out_dir}', *NEW_RUNS[name], config=made / 'settings.py') == 0
    check_losses(name, out_dir)


@pytest.mark.parametrize('name', EXPECTED['logits'])
def test_a_model_computes_the_old_logits(name, made):
    logits = load_model(name)[0](torch.arange(16)[None])[0][0, -1]
    expected = torch.tensor(EXPECTED['logits'][name])
    torch.testing.assert_close(logits, expected, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize('name', EXPECTED['text'])
def test_a_model_generates_the_old_text(name, made, sample):
    flag = '--init_from' if name == 'export' else '--out_dir'
    assert sample(PROMPT, *GREEDY, f'{flag}={name}') == EXPECTED['text'][name]


def test_a_model_generates_with_the_config_of_its_run(made, sample):
    text = sample('runs/gpt2/config.py', PROMPT, *GREEDY)
    assert text == EXPECTED['text']['runs/gpt2']


@pytest.mark.parametrize('name', RUNS)
def test_a_model_is_served(name, made):
    app = api.create_app(out_dir=f'runs/{name}', dtype='float32')
    body = {'prompt': PROMPT, 'max_tokens': 24, 'temperature': 0}
    try:
        reply = app.test_client().post('/v1/completions', json=body)
    finally:
        app.extensions['flatgpt'].close()
    expected = EXPECTED['text'][f'runs/{name}']
    assert PROMPT + reply.json['choices'][0]['text'] + '\n' == expected


def test_a_killed_batch_is_resumed(made, sample, monkeypatch):
    # a batch identifies its model by the bits of its logits, which depend on the processor
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'unlink', lambda path: None)
        sample(*BATCH, *GREEDY, '--out=today.jsonl')
    today = json.loads(Path('today.jsonl.job').read_text(encoding='utf-8'))
    job = Path('answers.jsonl.job')
    known = json.loads(job.read_text(encoding='utf-8'))
    assert {**known, 'model': today['model']} == today
    job.write_text(json.dumps(today), encoding='utf-8')

    part = Path('answers.jsonl.part')
    before = part.read_text(encoding='utf-8')
    changed = before.replace(EXPECTED['answers'][0]['text'], 'written before the kill')
    part.write_text(changed, encoding='utf-8')
    sample(*BATCH, *GREEDY)
    answers = map(json.loads, Path('answers.jsonl').read_text(encoding='utf-8').splitlines())
    first = {**EXPECTED['answers'][0], 'text': 'written before the kill'}
    assert [*answers] == [first, *EXPECTED['answers'][1:]]
    assert not part.exists()
    assert not job.exists()
