"""A file of prompts: completed in order, each as if alone, and resumed after a kill."""

import copy
import json
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, fails, random_model, sample, saved
from filelock import FileLock

from flatgpt.checkpoint import load
from flatgpt.data.tokenizer import char_tokenizer
from flatgpt.inference.batch import Batch, fingerprint
from flatgpt.inference.engine import generate
from flatgpt.inference.quantize import prepare_for_inference
from flatgpt.inference.request import TextStream
from flatgpt.inference.sampling import SamplingParams

SCRIPT = ROOT / 'sample.py'
LETTERS = '\n abcdefgh'
AS_SAMPLED = {'temperature': 0.8, 'top_k': 200}  # by sample.py's defaults


@pytest.fixture(scope='module')
def out_dir(tmp_path_factory):
    return saved(tmp_path_factory.mktemp('run'), char_tokenizer(LETTERS))


def batch(out_dir, path, *args, **options):
    out = path.with_name('answers.jsonl')
    common = [f'--out_dir={out_dir}', f'--batch={path}', f'--out={out}', '--max_new_tokens=20']
    result = sample(*common, *args, **options)
    lines = out.read_text(encoding='utf-8').splitlines() if out.exists() else []
    return result, [json.loads(line) for line in lines]


def prompt_file(path, count):
    """Prompts of many lengths, in the vocabulary of the tests' model."""
    prompts = [('abcdefgh' * 3)[i % 9 : i % 9 + 1 + i % 13] for i in range(count)]
    path.write_text(''.join(json.dumps({'prompt': text}) + '\n' for text in prompts))
    return prompts


def test_a_batch_is_completed_in_order_each_prompt_as_if_alone(out_dir, tmp_path):
    prompts = prompt_file(tmp_path / 'prompts.jsonl', 40)
    result, answers = batch(out_dir, tmp_path / 'prompts.jsonl', '--rows=3')
    assert result.returncode == 0, result.stderr
    assert 'answers.jsonl: 40 completions, 0 errors\n' in result.stderr
    assert [answer['prompt'] for answer in answers] == prompts
    assert [answer['line'] for answer in answers] == list(range(1, 41))
    model, tokenizer, _ = load.load_model(out_dir)
    for i in range(0, 40, 7):
        ids = [tokenizer.encode(prompts[i])]
        pieces = list(
            generate(model, tokenizer, ids, SamplingParams(20, **AS_SAMPLED), [(1337, i)])
        )
        assert answers[i]['text'] == ''.join(piece.text for piece in pieces)
        assert (answers[i]['tokens'], answers[i]['finish']) == (20, 'length')


def test_each_line_may_have_its_own_settings_and_its_own_error(out_dir, tmp_path):
    lines = [
        '{"prompt": "ab", "id": "first", "max_new_tokens": 3, "temperature": 0}',
        '{"prompt": "abz"}',
        '{"prompt": "ab", "top_p": 7}',
        '{"prompt": "ab", "temprature": 1}',
        '{"prompt": "ab", "max_new_tokens": "many"}',
        '{"prompt": 5}',
        '["ab"]',
        'ab',
        '',
        '{"prompt": ""}',
        '{"prompt": "ab", "stop": ["a", "b", "c", "|"], "temperature": 0}',
        '[' * 100_000,
        '{"prompt": "ab\\ud800"}',
        '{"prompt": "ab", "stop": [5]}',
    ]
    path = tmp_path / 'prompts.jsonl'
    path.write_bytes('\r\n'.join(lines).encode() + b'\r\n\xff\n')
    result, answers = batch(out_dir, path)
    assert result.returncode == 1, result.stderr
    assert 'answers.jsonl: 2 completions, 13 errors; the first, line 2: ' in result.stderr
    assert result.stderr.endswith(f'{answers[1]["error"]}\n')
    assert answers[0].items() >= {'id': 'first', 'tokens': 3, 'finish': 'length'}.items()
    assert answers[10]['finish'] in ('stop', 'length')
    causes = ["'z'", 'top_p=7', 'mean temperature?', 'max_new_tokens', 'not a JSON object']
    for answer, cause in zip(answers[1:], causes, strict=False):
        assert cause in answer['error']
        assert '\n' not in answer['error']
    assert all('error' in answer for answer in answers[1:10])
    assert 'invalid UTF-8 at byte 0' in answers[14]['error']


def test_a_plain_file_has_a_prompt_per_line(out_dir, tmp_path):
    path = tmp_path / 'prompts.txt'
    path.write_text('ab\n"cd\n\n', encoding='utf-8')
    _, answers = batch(out_dir, path)
    assert [answer.get('prompt') for answer in answers] == ['ab', None, None]
    assert [('error' in answer) for answer in answers] == [False, True, True]


def test_a_killed_batch_resumes(out_dir, tmp_path):
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    for folder in (whole, killed):
        folder.mkdir()
        prompt_file(folder / 'prompts.jsonl', 60)
    _, expected = batch(out_dir, whole / 'prompts.jsonl', '--rows=2')
    part = killed / 'answers.jsonl.part'
    command = [sys.executable, str(SCRIPT), f'--out_dir={out_dir}', '--dtype=float32', '--rows=2']
    command += [f'--batch={killed}/prompts.jsonl', f'--out={killed}/answers.jsonl']
    process = subprocess.Popen([*command, '--max_new_tokens=20'])
    deadline = time.monotonic() + 60
    while not part.exists() or part.read_bytes().count(b'\n') < 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert part.exists()
    # as a power cut and a kill in mid-write leave it
    part.write_bytes(part.read_bytes() + b'\0\0\n{"line": 99, "te')
    refused, _ = batch(out_dir, killed / 'prompts.jsonl', '--rows=2', '--temperature=0.1')
    assert 'belongs to another batch, model or settings' in refused.stderr
    result, answers = batch(out_dir, killed / 'prompts.jsonl', '--rows=2')
    assert re.search(r'resuming after \d+ completions', result.stderr)
    assert answers == expected
    assert sorted(path.name for path in killed.iterdir()) == ['answers.jsonl', 'prompts.jsonl']
    again, _ = batch(out_dir, killed / 'prompts.jsonl')
    assert (again.returncode, 'already exists; choose' in again.stderr) == (2, True)


def test_half_a_surrogate_pair_and_a_prompt_that_is_too_long_are_completed(out_dir, tmp_path):
    path = tmp_path / 'prompts.jsonl'
    path.write_text('{"prompt": "ab", "id": "\\ud800"}\n{"prompt": "%s"}\n' % ('ab' * 20))
    result, answers = batch(out_dir, path)
    assert result.returncode == 0, result.stderr
    assert answers[0]['id'] == '\ud800'
    assert answers[1]['prompt_tokens_left_out'] == 24


def test_a_resumed_batch_names_the_first_error_of_all_lines(out_dir, tmp_path):
    path = tmp_path / 'prompts.txt'
    path.write_text('ab\nz\nzz\n')
    _, answers = batch(out_dir, path)
    (tmp_path / 'answers.jsonl').rename(tmp_path / 'answers.jsonl.part')
    with pytest.MonkeyPatch.context() as patch:  # as a kill before the end leaves it
        patch.setattr(Batch, 'description', lambda *args: {})
        (tmp_path / 'answers.jsonl.job').write_text('{}')
        result, _ = batch(out_dir, path)
    assert 'resuming after 3 completions' in result.stderr
    line = f'answers.jsonl: 1 completion, 2 errors; the first, line 2: {answers[1]["error"]}\n'
    assert result.stderr.endswith(line)


def test_the_fingerprint_of_a_model_changes_with_any_weight():
    model = random_model(257, arch='modern')
    before = fingerprint(prepare_for_inference(copy.deepcopy(model)))
    assert fingerprint(prepare_for_inference(copy.deepcopy(model))) == before
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 3] += 0.5
    assert fingerprint(prepare_for_inference(model)) != before


def test_stop_may_be_null_and_must_not_be_a_number(out_dir, tmp_path):
    path = tmp_path / 'prompts.jsonl'
    path.write_text('{"prompt": "ab", "stop": null}\n{"prompt": "ab", "stop": 5}\n')
    _, answers = batch(out_dir, path)
    assert answers[0]['finish'] == 'length'
    assert 'stop: must be a string' in answers[1]['error']


def test_values_in_json_are_not_parsed_like_flags(out_dir, tmp_path):
    lines = [
        '{"prompt": "ab", "stop": ["\\\\n", "a|b"], "seed": 1}',
        '{"prompt": "ab", "stop": "|", "seed": 1}',
        '{"prompt": "ab", "seed": 1, "temperature": null, "id": {"kept": [1]}}',
        '{"prompt": "ab", "top_k": null, "temperature": 1}',
        '{"prompt": "ab", "temperature": "0.5"}',
        '{"prompt": "ab", "top_k": "None"}',
        '{"prompt": "ab", "seed": true}',
        '{"prompt": "ab", "max_new_tokens": 3.0}',
        '{"prompt": "ab", "max_new_tokens": [3]}',
        '{"prompt": "ab", "temperature": 1%s}' % ('0' * 400),
        '{"prompt": "ab", "temperature": 1e999}',
        '{"prompt": "ab", "min_p": NaN}',
        '{"prompt": "ab", "seed": 1, "seed": 2}',
        '{"prompt": "ab", "stop": ["a", ""]}',
        '{"prompt": "ab", "max_tokens": 3}',
        '{"prompt": "ab", "xyzzy": 3}',
    ]
    path = tmp_path / 'prompts.jsonl'
    path.write_text('\n'.join(lines) + '\n')
    _, answers = batch(out_dir, path)
    texts = {answer['text'] for answer in answers[:3]}
    assert len(texts) == 3  # each line has random numbers of its own, and none was stopped
    assert [answer['finish'] for answer in answers[:4]] == ['length'] * 4
    assert answers[2]['id'] == {'kept': [1]}
    causes = [
        "temperature needs a number, not str '0.5'",
        "top_k needs a whole number or None, not str 'None'",
        'seed needs a whole number, not bool True',
        'max_new_tokens needs a whole number, not float 3.0',
        'max_new_tokens needs a whole number, not list [3]',
        'temperature must be between',
        'temperature=inf',
        'NaN is not valid JSON',
        "duplicate key 'seed'",
        'stop',
        'did you mean max_new_tokens?',
        "'xyzzy'; use prompt, id, max_new_tokens",
    ]
    for answer, cause in zip(answers[4:], causes, strict=True):
        assert cause in answer['error']


def test_searching_for_a_long_stop_string_takes_linear_time():
    for stop, piece in (('a' * 50_000 + 'b', b'aaaa'), ('ab' * 25_000 + 'c', b'ab')):
        stream, began, shown = TextStream((stop,)), time.monotonic(), ''
        for _ in range(50_000):
            shown += stream.add(piece, False)[0]
        assert shown + stream.add(b'', True)[0] == piece.decode() * 50_000
        assert time.monotonic() - began < 10  # the square of its length would take hours


def test_a_bar_in_a_json_stop_string_does_not_separate(tmp_path):
    out_dir = saved(tmp_path / 'run', char_tokenizer('ab|'), block_size=64)
    path = tmp_path / 'prompts.jsonl'
    given = {'prompt': 'ab', 'temperature': 0, 'max_new_tokens': 60}
    _, (plain,) = batch(out_dir, write_lines(path, {**given, 'stop': []}))
    text = plain['text']
    (tmp_path / 'answers.jsonl').unlink()
    stop = text[10:13]
    _, answers = batch(out_dir, write_lines(path, {**given, 'stop': f'{stop}|zz'}, given))
    assert answers[0]['text'] == answers[1]['text'] == text


def write_lines(path, *records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


@pytest.mark.parametrize('name', ['prompts.json', 'prompts.csv', 'prompts.jsonl.gz'])
def test_a_file_of_another_type_is_an_error(out_dir, tmp_path, name):
    (tmp_path / name).write_text('[{"prompt": "ab"}]\n')
    result, answers = batch(out_dir, tmp_path / name)
    assert (result.returncode, answers) == (2, [])
    assert f'{name}: {(tmp_path / name).suffix} files are not supported' in result.stderr


def test_two_batches_never_write_one_file(out_dir, tmp_path):
    prompt_file(tmp_path / 'prompts.jsonl', 3)
    with FileLock(tmp_path / 'answers.jsonl.lock'):
        result, answers = batch(out_dir, tmp_path / 'prompts.jsonl')
    assert (result.returncode, answers) == (2, [])
    assert 'another batch is writing it' in result.stderr


def test_invalid_batch_settings_are_one_line(out_dir, tmp_path):
    here, path = f'--out_dir={out_dir}', tmp_path / 'prompts.txt'
    path.touch()
    out = f'--out={tmp_path}/answers.jsonl'
    assert 'as --out' in fails(here, f'--batch={path}')
    assert 'is empty' in fails(here, f'--batch={path}', out)
    assert 'cannot be read' in fails(here, f'--batch={tmp_path}/nowhere.txt', out)
    path.write_text('ab\n')
    assert 'omit the prompt' in fails(here, f'--batch={path}', out, 'hello')
    assert 'rows=0' in fails(here, f'--batch={path}', out, '--rows=0')
    assert '--num_samples' in fails(here, f'--batch={path}', out, '--num_samples=2')
    assert 'needs --batch; to save samples' in fails(here, 'ab', out)
    assert 'create the folder' in fails(here, f'--batch={path}', f'--out={tmp_path}/no/a.jsonl')
