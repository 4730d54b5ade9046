"""The command line: prompts, samples, the console."""

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
from conftest import ROOT, fails, follow_advice, random_model, sample, saved

import sample as sample_module
from configurator import configure
from flatgpt.checkpoint import load
from flatgpt.data.tokenizer import EOT, Tokenizer, byte_tokenizer, char_tokenizer
from flatgpt.errors import ConfigError
from flatgpt.inference import model_runner
from flatgpt.inference.engine import complete, generate
from flatgpt.inference.sampling import SamplingParams
from model import GPT, GPTConfig
from sample import parse_stop

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
    assert parse_stop('') == ()
    assert parse_stop(r'END|\n\n|a\|b|\t|C:\\n|\d') == ('END', '\n\n', 'a|b', '\t', 'C:\\n', r'\d')


@pytest.mark.parametrize(
    ('args', 'advised'),
    [
        (('--num_samples=200',), ['--num_samples=32', '--num_samples=16', '--num_samples=8']),
        (('--batch={file}', '--rows=20', '--out={file}.out'), ['--rows=10', '--rows=5']),
    ],
)
def test_following_the_advice_of_each_lack_of_memory_ends_in_samples(
    out_dir, tmp_path, monkeypatch, args, advised
):
    (tmp_path / 'prompts').write_text('ab\n' * 30, encoding='utf-8')
    cache = model_runner.KVCache

    def in_a_small_room(model, rows, length):
        if rows > 8:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        return cache(model, rows, length)

    monkeypatch.setattr(model_runner, 'KVCache', in_a_small_room)
    args = [arg.format(file=tmp_path / 'prompts') for arg in args]
    args += [f'--out_dir={out_dir}', '--device=cpu', '--max_new_tokens=2']
    assert follow_advice(sample, *args) == advised


def test_one_text_that_does_not_fit_is_advised_to_take_lighter_weights(monkeypatch):
    settings = {'batch': None, 'chat': True, 'num_samples': 10, 'rows': 16, 'quantize': None}
    with torch.device('meta'):
        model = GPT(GPTConfig(8, 8, 1, 1, 8))
    assert sample_module.fewer_samples(settings, model) == '--dtype=bfloat16'
    settings['num_samples'] = 1
    assert sample_module.fewer_samples(settings, model.bfloat16()) == '--quantize=int8'
    settings['quantize'] = 'int8'
    assert sample_module.fewer_samples(settings, model) == 'a smaller model, or --device=cpu'

    def no_bfloat16(name, device):
        raise ConfigError('no bfloat16')

    monkeypatch.setattr(sample_module, 'pick_dtype', no_bfloat16)
    assert sample_module.smaller_weights('cuda:0', torch.float32) == '--dtype=float16'
    assert sample_module.smaller_weights('cpu', torch.float32) == 'a smaller model'


def in_a_process(*args):
    """sample.py as its user starts it; conftest's sample() runs it inside this process."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'error', 'PYTHONUTF8': '0'}
    return subprocess.run(
        [sys.executable, str(SCRIPT), '--dtype=float32', *map(str, args)],
        env=env,
        capture_output=True,
        encoding='utf-8',
        timeout=60,
    )


def test_samples_are_printed_in_order_with_separators(out_dir, tokenizer):
    args = ['abc', f'--out_dir={out_dir}', '--num_samples=3', '--max_new_tokens=30', '--device=cpu']
    result = in_a_process(*args)
    assert result.returncode == 0, result.stderr
    texts = result.stdout.split('\n---------------\n')
    assert texts.pop() == ''
    assert [len(text) for text in texts] == [33] * 3
    assert all(text.startswith('abc') for text in texts)
    model, tokenizer, _ = load.load_model(out_dir)
    assert (
        texts[0] == 'abc' + complete(model, tokenizer, ['abc'], SamplingParams(30, **AS_SAMPLED))[0]
    )
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
    result = in_a_process('abz', here)
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
    sample_module.sampling_params(config)


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
    sampling, heard = SamplingParams(6, **AS_SAMPLED), 'ab'
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
    sampling = SamplingParams(6, **AS_SAMPLED, stop=('\n',))
    for turn, line in enumerate(['cd', 'ef'], 1):
        heard += f'a {line}\nb '
        forgotten = max(0, -(-(len(heard) - 16) // 2) * 2)  # by eighths of the context
        ids = [tokenizer.encode(heard[forgotten:])]
        said = ''.join(p.text for p in generate(model, tokenizer, ids, sampling, [(1337, turn)]))
        assert said + '\n' in result.stdout
        heard += said + '\n'


def test_the_console_ends_a_turn_at_the_token_that_the_end_of_text_stands_for(monkeypatch):
    template = {'user': ['', EOT], 'assistant': ['', EOT]}
    tokens = [*byte_tokenizer().token_bytes[:256], b'</s>']
    tokenizer = Tokenizer('byte', 'byte', tokens, {'</s>': 256}, '', template, end_ids=[256])
    settings = {name: getattr(sample_module, name) for name in sample_module.SAMPLING_SETTINGS}
    console = sample_module.Console(random_model(257), tokenizer, settings, '')
    asked = []
    monkeypatch.setattr(console.engine, 'submit', asked.append)
    console.answer('hi')
    assert asked[0].sampling.stop == ()  # no text to look for
    assert console.ids == [*b'hi', 256, 256]


def test_the_console_begins_with_a_given_prompt(out_dir):
    result = chat(out_dir, ['cd'], '--start=abc')
    assert 'abc\n' in result.stdout
    model, tokenizer, _ = load.load_model(out_dir)
    ids = tokenizer.encode('abc\ncd')
    pieces = generate(model, tokenizer, [ids], SamplingParams(6, **AS_SAMPLED), [(1337, 1)])
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
    assert 'is a second prompt' in fails(f'--out_dir={out_dir}', 'ab', 'cd')
