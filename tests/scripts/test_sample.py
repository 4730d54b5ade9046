"""The command line: prompts, files of prompts, the console."""

import copy
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from conftest import ROOT, random_model, saved
from filelock import FileLock

import sample as sample_module
from configurator import configure
from flatgpt.checkpoint import load
from flatgpt.data.tokenizer import char_tokenizer
from flatgpt.errors import UserError
from flatgpt.inference.engine import complete, generate
from flatgpt.inference.quantize import freeze
from flatgpt.inference.sampling import Sampling
from sample import main, split_stop

SCRIPT = ROOT / 'sample.py'
LETTERS = '\n abcdefgh'
AS_SAMPLED = {'temperature': 0.8, 'top_k': 200}  # by sample.py's defaults


@pytest.fixture
def tokenizer():
    return char_tokenizer(LETTERS, eot=True)


# -----------------------------------------------------------------------------
# the command line


@pytest.fixture(scope='module')
def out_dir(tmp_path_factory):
    return saved(tmp_path_factory.mktemp('run'), char_tokenizer(LETTERS))


def test_stop_strings_are_spelt_with_bars_and_escapes():
    assert split_stop('') == ()
    assert split_stop(r'END|\n\n|a\|b|\t|C:\\n|\d') == ('END', '\n\n', 'a|b', '\t', 'C:\\n', r'\d')


def sample(*args, **options):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'error', 'PYTHONUTF8': '0'}
    return subprocess.run(
        # in float32, in which equal texts are equal whatever stands beside them
        [sys.executable, str(SCRIPT), '--dtype=float32', *map(str, args)],
        **{'env': env, 'capture_output': True, 'encoding': 'utf-8', 'timeout': 60, **options},
    )


def fails(*args):
    """The one line that these arguments end sample.py with."""
    with pytest.raises(UserError) as error:
        main(configure(dict(vars(sample_module)), list(args), positional='start'))
    assert '\n' not in str(error.value)
    return str(error.value)


def test_samples_are_printed_in_order_with_separators(out_dir, tokenizer):
    args = ['abc', f'--out_dir={out_dir}', '--num_samples=3', '--max_new_tokens=30', '--device=cpu']
    result = sample(*args)
    assert result.returncode == 0, result.stderr
    texts = result.stdout.split('\n---------------\n')
    assert texts.pop() == ''
    assert [len(text) for text in texts] == [33] * 3
    assert all(text.startswith('abc') for text in texts)
    model, tokenizer, _ = load.load_model(out_dir)
    assert texts[0] == 'abc' + complete(model, tokenizer, ['abc'], Sampling(30, **AS_SAMPLED))[0]
    assert re.search(r'step 3.*M parameters on cpu', result.stderr)
    assert sample(*args).stdout == result.stdout


def test_one_sample_has_no_separator_and_the_prompt_may_come_from_a_file(out_dir, tmp_path):
    prompt = tmp_path / 'prompt.txt'
    prompt.write_text('ab\ncd' * 9, encoding='utf-8')
    common = ['--num_samples=1', '--max_new_tokens=5', '--checkpoint=last']
    result = sample(f'--start=FILE:{prompt}', f'--init_from={out_dir}', *common)
    assert result.stdout.startswith('ab\ncd' * 9)
    assert len(result.stdout) == 45 + 5 + 1
    assert 'the prompt has 45 tokens; the last 16 are used' in result.stderr


def test_the_default_prompt_gives_way_where_the_vocabulary_has_no_line_break(tmp_path):
    with_end = saved(tmp_path / 'a', char_tokenizer('abc', eot=True))
    result = sample(f'--out_dir={with_end}', '--num_samples=1', '--max_new_tokens=5')
    assert set(result.stdout.strip()) <= set('abc')
    without = saved(tmp_path / 'b', char_tokenizer('abc'))
    assert r"'\n'" in fails(f'--out_dir={without}')


def test_mistakes_end_in_one_line(out_dir, tmp_path, monkeypatch):
    here = f'--out_dir={out_dir}'
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9')
    (tmp_path / 'empty.txt').touch()
    assert "character 'z'" in fails('abz', here)
    assert '--start' in fails('--start=', here)
    assert '--start' in fails(f'--start=FILE:{tmp_path}/empty.txt', here)
    assert 'nowhere.txt cannot be read' in fails('--start=FILE:nowhere.txt', here)
    assert 'not UTF-8 at byte 3' in fails(f'--start=FILE:{tmp_path}/latin.txt', here)
    assert 'did you mean temperature?' in fails('--temprature=1', here)
    assert 'top_p=1.5' in fails('--top_p=1.5', here)
    assert 'num_samples=0' in fails('--num_samples=0', here)
    assert 'no checkpoint' in fails(f'--out_dir={tmp_path}')
    monkeypatch.chdir(tmp_path)
    assert 'no trained model' in fails()
    result = sample('abz', here)
    assert result.returncode == 2
    assert re.fullmatch(r".+ parameters on \w+\nerror: character 'z' .+\n", result.stderr)
    assert result.stdout == ''


def test_a_training_config_means_the_model_it_made(out_dir, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(f'init_from = "gpt2"\nout_dir = {str(out_dir)!r}\n', encoding='utf-8')
    settings = configure(dict(vars(sample_module)), [str(config)], positional='start')
    assert sample_module.load(settings)[0].config.vocab_size == len(LETTERS)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    saved(tmp_path, char_tokenizer(LETTERS), vocab_size=5)
    assert 'its tokenizer has 10 ids, and the model 5' in fails(f'--out_dir={tmp_path}')


def test_help_lists_the_settings_and_importing_parses_nothing():
    result = sample('--help')
    assert '--chat' in result.stdout
    assert re.search(r'min_p = 0\.0 +leave out', result.stdout)
    code = 'import sys; sys.argv += ["--nonsense"]; import sample; print("tiktoken" in sys.modules)'
    imported = subprocess.run(
        [sys.executable, '-c', code], cwd=SCRIPT.parent, capture_output=True, text=True
    )
    assert imported.stdout == 'False\n'


def test_the_shipped_sampling_config_fits():
    config = configure(dict(vars(sample_module)), ['sample_shakespeare'])
    assert config['start'] == 'ROMEO:'
    sample_module.sampling_of(config)


# -----------------------------------------------------------------------------
# a file of prompts


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


def test_a_batch_is_answered_in_order_each_as_if_alone(out_dir, tmp_path):
    prompts = prompt_file(tmp_path / 'prompts.jsonl', 40)
    result, answers = batch(out_dir, tmp_path / 'prompts.jsonl', '--rows=3')
    assert result.returncode == 0, result.stderr
    assert 'answers.jsonl: 40 answers, 0 of them errors\n' in result.stderr
    assert [answer['prompt'] for answer in answers] == prompts
    assert [answer['line'] for answer in answers] == list(range(1, 41))
    model, tokenizer, _ = load.load_model(out_dir)
    for i in range(0, 40, 7):
        ids = [tokenizer.encode(prompts[i])]
        pieces = list(generate(model, tokenizer, ids, Sampling(20, **AS_SAMPLED), [(1337, i)]))
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
    assert f'{len(lines) + 1} answers, 13 of them errors' in result.stderr
    assert answers[0].items() >= {'id': 'first', 'tokens': 3, 'finish': 'length'}.items()
    assert answers[10]['finish'] in ('stop', 'length')
    causes = ["'z'", 'top_p=7', 'mean temperature?', 'max_new_tokens', 'not a JSON object']
    for answer, cause in zip(answers[1:], causes, strict=False):
        assert cause in answer['error']
        assert '\n' not in answer['error']
    assert all('error' in answer for answer in answers[1:10])
    assert 'not UTF-8 at byte 0' in answers[14]['error']


def test_a_plain_file_has_a_prompt_a_line(out_dir, tmp_path):
    path = tmp_path / 'prompts.txt'
    path.write_text('ab\n"cd\n\n', encoding='utf-8')
    _, answers = batch(out_dir, path)
    assert [answer.get('prompt') for answer in answers] == ['ab', None, None]
    assert [('error' in answer) for answer in answers] == [False, True, True]


def test_a_killed_batch_goes_on_where_it_was(out_dir, tmp_path):
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    for folder in (whole, killed):
        folder.mkdir()
        prompt_file(folder / 'prompts.jsonl', 60)
    _, expected = batch(out_dir, whole / 'prompts.jsonl', '--rows=2')
    part = killed / 'answers.jsonl.part'
    command = [sys.executable, str(SCRIPT), f'--out_dir={out_dir}', '--dtype=float32', '--rows=2']
    command += [f'--batch={killed}/prompts.jsonl', f'--out={killed}/answers.jsonl']
    process = subprocess.Popen(
        [*command, '--max_new_tokens=20'], env={**os.environ, 'OMP_NUM_THREADS': '1'}
    )
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
    assert 'is of another batch, model or settings' in refused.stderr
    result, answers = batch(out_dir, killed / 'prompts.jsonl', '--rows=2')
    assert re.search(r'goes on after \d+ answers', result.stderr)
    assert answers == expected
    assert sorted(path.name for path in killed.iterdir()) == ['answers.jsonl', 'prompts.jsonl']
    again, _ = batch(out_dir, killed / 'prompts.jsonl')
    assert (again.returncode, 'is there already' in again.stderr) == (2, True)


def test_half_a_surrogate_and_a_prompt_too_long_are_answered_and_said(out_dir, tmp_path):
    path = tmp_path / 'prompts.jsonl'
    path.write_text('{"prompt": "ab", "id": "\\ud800"}\n{"prompt": "%s"}\n' % ('ab' * 20))
    result, answers = batch(out_dir, path)
    assert result.returncode == 0, result.stderr
    assert answers[0]['id'] == '\ud800'
    assert answers[1]['prompt_tokens_left_out'] == 24


def test_a_batch_of_another_model_is_known_by_any_of_its_weights():
    tell = sample_module.fingerprint
    model = random_model(257, arch='modern')
    before = tell(freeze(copy.deepcopy(model)))
    assert tell(freeze(copy.deepcopy(model))) == before
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 3] += 0.5
    assert tell(freeze(model)) != before


def test_no_stop_string_is_none_and_what_is_no_text_is_an_error(out_dir, tmp_path):
    path = tmp_path / 'prompts.jsonl'
    path.write_text('{"prompt": "ab", "stop": null}\n{"prompt": "ab", "stop": 5}\n')
    _, answers = batch(out_dir, path)
    assert answers[0]['finish'] == 'length'
    assert 'stop: needs a text' in answers[1]['error']


def test_two_batches_never_write_one_file(out_dir, tmp_path):
    prompt_file(tmp_path / 'prompts.jsonl', 3)
    with FileLock(tmp_path / 'answers.jsonl.lock'):
        result, answers = batch(out_dir, tmp_path / 'prompts.jsonl')
    assert (result.returncode, answers) == (2, [])
    assert 'another batch is writing it now' in result.stderr


def test_a_batch_that_cannot_be_is_one_line(out_dir, tmp_path):
    here, path = f'--out_dir={out_dir}', tmp_path / 'prompts.txt'
    path.touch()
    out = f'--out={tmp_path}/answers.jsonl'
    assert 'with --out=' in fails(here, f'--batch={path}')
    assert 'is empty' in fails(here, f'--batch={path}', out)
    assert 'cannot be read' in fails(here, f'--batch={tmp_path}/nowhere.txt', out)
    path.write_text('ab\n')
    assert 'leave out the prompt' in fails(here, f'--batch={path}', out, 'hello')
    assert 'rows=0' in fails(here, f'--batch={path}', out, '--rows=0')
    assert 'there is no folder' in fails(here, f'--batch={path}', f'--out={tmp_path}/no/a.jsonl')


# -----------------------------------------------------------------------------
# the console


def chat(out_dir, lines, *args):
    return sample(
        f'--out_dir={out_dir}', '--chat', '--max_new_tokens=6', *args, input='\n'.join(lines) + '\n'
    )


def test_the_console_remembers_until_reset_and_checks_what_is_set(out_dir):
    result = chat(
        out_dir,
        ['ab', 'cd', '/reset', 'ab', '/set temprature 1', '/set top_p 7', '/set temperature 0']
        + ['/set stop e|f', 'z', '/nonsense', '/set temperature', '', '/help', '/quit', 'ab'],
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout
    assert 'no chat template' in lines
    model, tokenizer, _ = load.load_model(out_dir)
    sampling, heard = Sampling(6, **AS_SAMPLED), 'ab'
    for turn, line in enumerate(['\ncd', ''], 1):
        ids = [tokenizer.encode(heard)]
        answer = ''.join(p.text for p in generate(model, tokenizer, ids, sampling, [(1337, turn)]))
        assert answer + '\n' in lines
        heard += answer + line
    first, _, again = lines.partition('(the conversation is forgotten)\n')
    assert first.split('\n', 1)[1].startswith(again[:6])  # the same words, the same reply
    assert '(temperature = 0.0)' in lines
    assert "  stop = 'e|f'" in lines
    assert '  temperature = 0.0' in lines
    errors = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    causes = ['mean temperature?', 'top_p=7.0', "character 'z'", '/nonsense: no such', '/set needs']
    assert len(errors) == len(causes)
    assert all(cause in error for cause, error in zip(causes, errors, strict=True))


def test_the_console_speaks_by_the_chat_template(tmp_path):
    tokenizer = char_tokenizer(LETTERS)
    tokenizer.chat_template = {'user': ['a ', '\n'], 'assistant': ['b ', '\n']}
    out_dir = saved(tmp_path, tokenizer)
    result = chat(out_dir, ['cd', 'ef'])
    assert 'has a chat template: it answers' in result.stdout
    model, heard = load.load_model(out_dir)[0], ''
    sampling = Sampling(6, **AS_SAMPLED, stop=('\n',))
    for turn, line in enumerate(['cd', 'ef'], 1):
        heard += f'a {line}\nb '
        forgotten = max(0, -(-(len(heard) - 16) // 2) * 2)  # by eighths of the context
        ids = [tokenizer.encode(heard[forgotten:])]
        said = ''.join(p.text for p in generate(model, tokenizer, ids, sampling, [(1337, turn)]))
        assert said + '\n' in result.stdout
        heard += said + '\n'


def test_the_console_begins_with_a_given_prompt(out_dir):
    result = chat(out_dir, ['cd'], '--start=abc')
    assert 'abc\n' in result.stdout
    model, tokenizer, _ = load.load_model(out_dir)
    ids = tokenizer.encode('abc\ncd')
    pieces = generate(model, tokenizer, [ids], Sampling(6, **AS_SAMPLED), [(1337, 1)])
    assert ''.join(piece.text for piece in pieces) in result.stdout


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no pseudo-terminals')
def test_ctrl_c_stops_the_answer_and_twice_at_the_prompt_the_program(out_dir):
    import pty

    terminal, theirs = pty.openpty()
    command = [sys.executable, str(SCRIPT), f'--out_dir={out_dir}', '--chat']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'TERM': 'dumb'}
    process = subprocess.Popen(
        [*command, '--max_new_tokens=100000000'],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=env,
        start_new_session=True,
    )
    os.close(theirs)
    shown = ''

    def wait_for(done, again=lambda: None):
        nonlocal shown
        deadline = time.monotonic() + 30
        while not done():
            assert time.monotonic() < deadline, shown
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 65536).decode()
            else:
                again()

    def interrupt(reply):
        # a signal in the instant between the prompt and the wait for a key goes unnoticed until
        # the next one: press again, as people do
        def press():
            os.killpg(process.pid, signal.SIGINT)

        press()
        wait_for(lambda: reply in shown, again=press)

    try:
        wait_for(lambda: '> ' in shown)
        os.write(terminal, b'abc\n')
        wait_for(lambda: len(shown.partition('abc\r\n')[2]) > 100)  # an endless answer
        interrupt('(stopped)')
        wait_for(lambda: shown.count('> ') == 2)
        os.write(terminal, b'/set max_new_tokens 3\n')
        wait_for(lambda: '(max_new_tokens = 3)' in shown)
        wait_for(lambda: shown.count('> ') == 3)
        interrupt('Ctrl-C again')
        wait_for(lambda: shown.count('> ') == 4)
        for _ in range(6):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_two_prompts_are_refused(out_dir):
    assert 'a second prompt' in fails(f'--out_dir={out_dir}', 'ab', 'cd')
