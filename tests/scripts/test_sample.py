"""The command line: prompts, samples, the console."""

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
from conftest import ROOT, fails, follow_advice, random_model, sample, saved
from error_lines import case, error_line

import sample as sample_module
from configurator import configure
from flatgpt.checkpoint import load, save
from flatgpt.data.tokenizer import EOT, Tokenizer, byte_tokenizer, char_tokenizer
from flatgpt.errors import ConfigError, UserError
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


def test_stop_strings_are_separated_by_bars_and_may_have_escapes():
    assert parse_stop('') == ()
    assert parse_stop(r'END|\n\n|a\|b|\t|C:\\n|\d') == ('END', '\n\n', 'a|b', '\t', 'C:\\n', r'\d')


@error_line('out of memory on {}; try {}')
@pytest.mark.parametrize(
    ('args', 'advised'),
    [
        (('--num_samples=200',), ['--num_samples=32', '--num_samples=16', '--num_samples=8']),
        (('--batch={file}', '--rows=20', '--out={file}.out'), ['--rows=10', '--rows=5']),
    ],
)
def test_following_the_advice_of_out_of_memory_errors_ends_in_samples(
    out_dir, tmp_path, monkeypatch, args, advised
):
    (tmp_path / 'prompts').write_text('ab\n' * 30, encoding='utf-8')
    cache = model_runner.KVCache

    def in_little_memory(model, rows, length):
        if rows > 8:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        return cache(model, rows, length)

    monkeypatch.setattr(model_runner, 'KVCache', in_little_memory)
    args = [arg.format(file=tmp_path / 'prompts') for arg in args]
    args += [f'--out_dir={out_dir}', '--device=cpu', '--max_new_tokens=2']
    assert follow_advice(sample, *args) == advised


@pytest.mark.parametrize(('device', 'lines'), [('cpu', 1), ('cuda:0', 2)])
def test_int8_on_a_gpu_is_said_to_save_only_memory(out_dir, monkeypatch, capsys, device, lines):
    monkeypatch.setattr(sample_module, 'pick_device', lambda name: device)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(GPT, 'to', lambda self, *args: self)
    for name in ('check_int8_device', 'on_out_of_memory', 'prepare_for_inference'):
        monkeypatch.setattr(sample_module, name, lambda *args: None)
    monkeypatch.setattr(sample_module, 'pick_dtype', lambda *args: torch.bfloat16)
    settings = {'out_dir': str(out_dir), 'init_from': 'resume', 'checkpoint': None}
    sample_module.load(
        settings | {'tokenizer': None, 'device': device, 'dtype': 'auto', 'quantize': 'int8'}
    )
    assert len(capsys.readouterr().err.splitlines()) == lines


@error_line('has another tokenizer than the model')
def test_a_draft_model_with_the_same_tokenizer_changes_no_text(out_dir, tmp_path):
    saved(tmp_path / 'small', char_tokenizer(LETTERS))
    saved(tmp_path / 'other', byte_tokenizer())
    args = ['abc', f'--out_dir={out_dir}', '--num_samples=3', '--max_new_tokens=30', '--device=cpu']
    refused = fails(*args, f'--draft={tmp_path / "other"}')
    (advised,) = re.findall(r'--draft=\w+$', refused)
    plain = sample(*args, '--draft=None')
    assert plain.returncode == 0
    for draft in (f'--draft={tmp_path / "small"}', advised):
        assert sample(*args, draft).stdout == plain.stdout


def test_a_draft_on_a_gpu_is_said_to_have_no_effect(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(sample_module, 'pick_device', lambda name: 'cuda:0')
    settings = {'draft': 'out/small', 'device': 'auto'}
    assert sample_module.load_draft(settings, tokenizer) is None
    assert capsys.readouterr().err.splitlines() == [sample_module.DRAFT_ON_GPU]
    assert sample_module.load_draft({'draft': 'ngram'}, tokenizer) == 'ngram'


def test_if_one_sample_does_not_fit_the_advice_is_smaller_weights(monkeypatch):
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
    env = {**os.environ, 'PYTHONWARNINGS': 'error', 'PYTHONUTF8': '0'}
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
    assert 'the prompt has 45 tokens; only the last 16 are used' in result.stderr


def test_the_default_prompt_is_the_end_of_text_if_the_vocabulary_has_no_line_break(tmp_path):
    with_end = saved(tmp_path / 'a', char_tokenizer('abc', eot=True))
    result = sample(f'--out_dir={with_end}', '--num_samples=1', '--max_new_tokens=5')
    assert set(result.stdout.strip()) <= set('abc')
    without = saved(tmp_path / 'b', char_tokenizer('abc'))
    assert r"'\n'" in fails(f'--out_dir={without}')


def test_a_mistake_ends_in_one_line(out_dir, tmp_path, monkeypatch):
    here = f'--out_dir={out_dir}'
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9')
    (tmp_path / 'empty.txt').touch()
    assert "character 'z'" in fails('abz', here)
    assert '--start' in fails('--start=', here)
    assert '--start' in fails(f'--start=FILE:{tmp_path}/empty.txt', here)
    assert 'needs the name of a file' in fails('--start=FILE:', here)
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


@pytest.fixture(scope='module')
def byte_run(tmp_path_factory):
    return saved(tmp_path_factory.mktemp('bytes'), byte_tokenizer())


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case(
            '--batch reads its prompts from a file',
            'ab --batch={p} --out={o}',
            '--batch={p} --out={o}',
        ),
        case(
            '--batch writes one completion',
            '--num_samples=2 --batch={p} --out={o}',
            '--batch={p} --out={o}',
        ),
        case('--out={}: needs --batch', '--start=ab --out={o}', '--start=ab'),
        case('the prompt is empty; give some text', '--start=', '--start=Once'),
        case('needs the name of a file', '--start=FILE:', '--start=FILE:{p}'),
        case('cannot be read: {}; give a readable file', '--start=FILE:{p}.no', '--start=FILE:{p}'),
        case('a bar separates stop strings', '--stop=|', r'--stop=\|'),
    ],
)
def test_the_advice_of_an_error_line_works(byte_run, tmp_path, bad, good):
    names = {'p': tmp_path / 'p.txt', 'o': tmp_path / 'o.jsonl'}
    names['p'].write_text('ab')
    common = [f'--out_dir={byte_run}', '--max_new_tokens=2', '--device=cpu']
    fails(*bad.format(**names).split(), *common)
    result = sample(*good.format(**names).split(), *common)
    assert result.returncode == 0, result.stderr
    assert names['o'].exists() if '--batch' in good else result.stdout


@error_line('is not UTF-8 at byte {}; convert it', 'keep only its end')
def test_a_prompt_file_is_bounded_and_utf_8(tmp_path, monkeypatch):
    path = tmp_path / 'prompt.txt'
    for bad, good in ((b'caf\xe9', 'caf\xe9'.encode()), (b'x' * 9 + b'the end', b'the end')):
        monkeypatch.setattr(sample_module, 'MAX_PROMPT_BYTES', 8)
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r'^the prompt file .*prompt\.txt '):
            sample_module.read_prompt(f'FILE:{path}')
        path.write_bytes(good)
        assert sample_module.read_prompt(f'FILE:{path}') == good.decode()
    path.write_bytes(b'a\r\nb\rc')
    assert sample_module.read_prompt(f'FILE:{path}') == 'a\nb\nc'


@pytest.mark.skipif(not os.path.exists('/dev/zero'), reason='needs /dev/zero')
def test_a_prompt_file_without_an_end_is_refused():
    assert 'has more than 16,777,216 bytes' in fails('--start=FILE:/dev/zero')


@error_line('stop: must be a string or a list of strings')
def test_stop_of_a_line_is_a_string_or_a_list_of_strings():
    settings = configure(dict(vars(sample_module)), [], positional='start')
    for bad in (3, ['a', 3]):
        with pytest.raises(ConfigError):
            sample_module.sampling_params_of_line(settings, {'stop': bad})
    for good, stop in (('a', ('a',)), (['a', 'b'], ('a', 'b')), ([], ()), (None, ())):
        assert sample_module.sampling_params_of_line(settings, {'stop': good}).stop == stop


@error_line('has no tokenizer; give the one it was trained with')
def test_a_model_without_a_tokenizer_is_refused_until_one_is_given(tmp_path):
    state = {'step': 1, 'val_loss': 1.0, 'evaluated': True}
    save.save_checkpoint(tmp_path, random_model(257), [], None, state)
    flags = [f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=2', '--device=cpu']
    assert f'{tmp_path} has no tokenizer' in fails(*flags)
    assert sample('ab', *flags, '--tokenizer=byte').stdout.startswith('ab')


def test_a_training_config_selects_the_model_of_its_run(out_dir, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(f'init_from = "gpt2"\nout_dir = {str(out_dir)!r}\n', encoding='utf-8')
    settings = configure(dict(vars(sample_module)), [str(config)], positional='start')
    assert sample_module.load(settings)[0].config.vocab_size == len(LETTERS)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    saved(tmp_path, char_tokenizer(LETTERS), vocab_size=5)
    assert 'the tokenizer has 10 ids and the model 5; give' in fails(f'--out_dir={tmp_path}')


@error_line('--json_schema={}: {}')
def test_samples_replies_and_batches_follow_a_json_schema(tmp_path):
    pytest.importorskip('llguidance', reason='llguidance is not installed')
    run, schema = saved(tmp_path / 'run', byte_tokenizer(), block_size=64), tmp_path / 'a.json'
    flags = (f'--out_dir={run}', f'--json_schema={schema}')
    schema.write_text('{"not": {}}')
    result = sample(*flags)
    assert (result.returncode, 'Unimplemented keys: ["not"]' in result.stderr) == (2, True)
    schema.write_text('{"enum": [{"a": 1}, ["b"]]}')
    allowed = {'{"a":1}', '["b"]'}
    result = sample('x', *flags, '--num_samples=4')
    parts = result.stdout.split('---------------')
    texts = {''.join(part.split()).removeprefix('x') for part in parts}
    assert texts - {''} <= allowed  # after the last separator
    result = sample(*flags, '--chat', input='hello\n')
    assert any(text in ''.join(result.stdout.split()) for text in allowed)
    (tmp_path / 'p.txt').write_text('one\ntwo\n')
    sample(*flags, f'--batch={tmp_path / "p.txt"}', f'--out={tmp_path / "out.jsonl"}')
    lines = (tmp_path / 'out.jsonl').read_text().splitlines()
    assert {''.join(json.loads(line)['text'].split()) for line in lines} <= allowed


def test_help_lists_the_settings_and_importing_parses_nothing():
    result = sample('--help')
    assert '--chat' in result.stdout
    assert re.search(r'min_p = 0\.0 +exclude', result.stdout)
    code = 'import sys; sys.argv += ["--nonsense"]; import sample; print("tiktoken" in sys.modules)'
    imported = subprocess.run(
        [sys.executable, '-c', code], cwd=SCRIPT.parent, capture_output=True, text=True
    )
    assert imported.stdout == 'False\n'


def test_the_shipped_sampling_config_is_valid():
    config = configure(dict(vars(sample_module)), ['sample_shakespeare'])
    assert config['start'] == 'ROMEO:'
    sample_module.sampling_params(config)


# -----------------------------------------------------------------------------
# the console


def chat(out_dir, lines, *args):
    return sample(
        f'--out_dir={out_dir}', '--chat', '--max_new_tokens=6', *args, input='\n'.join(lines) + '\n'
    )


@error_line(
    '{}: unknown command; /help lists',
    '/set needs a name and a value, for example /set temperature 0.5',
    '/set {}: unknown setting; {}/help lists the settings',
)
def test_the_advice_of_the_console_s_errors_works(out_dir):
    lines = ['/nonsense', '/help', '/set temperature', '/set temperature 0.5', '/set tempp 1']
    result = chat(out_dir, [*lines, '/quit', 'ab'])
    assert result.returncode == 0
    assert result.stderr.count('error: ') == 3
    listed = result.stdout
    assert all(f'  {command}' in listed for command in ('/set NAME VALUE', '/reset', '/quit'))
    assert '  temperature = 0.8' in listed
    assert listed.endswith('(temperature = 0.5)\n')


def test_the_console_remembers_until_reset_and_checks_settings(out_dir):
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
    first, _, again = lines.partition('(conversation cleared)\n')
    assert first.split('\n', 1)[1].startswith(again[:6])  # the same words, the same reply
    assert '(temperature = 0.0)' in lines
    assert "  stop = 'e|f'" in lines
    assert '  temperature = 0.0' in lines
    errors = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    causes = ['mean temperature?', 'top_p=7.0', "character 'z'", '/nonsense: unknown', '/set needs']
    assert len(errors) == len(causes)
    assert all(cause in error for cause, error in zip(causes, errors, strict=True))


def test_the_console_uses_the_chat_template(tmp_path):
    tokenizer = char_tokenizer(LETTERS)
    tokenizer.chat_template = {'user': ['a ', '\n'], 'assistant': ['b ', '\n']}
    out_dir = saved(tmp_path, tokenizer)
    result = chat(out_dir, ['cd', 'ef'])
    assert 'has a chat template: it replies' in result.stdout
    model, heard = load.load_model(out_dir)[0], ''
    sampling = SamplingParams(6, **AS_SAMPLED, stop=('\n',))
    for turn, line in enumerate(['cd', 'ef'], 1):
        heard += f'a {line}\nb '
        forgotten = max(0, -(-(len(heard) - 16) // 2) * 2)  # by eighths of the context
        ids = [tokenizer.encode(heard[forgotten:])]
        said = ''.join(p.text for p in generate(model, tokenizer, ids, sampling, [(1337, turn)]))
        assert said + '\n' in result.stdout
        heard += said + '\n'


def test_the_console_ends_a_reply_at_the_end_of_text_token(monkeypatch):
    template = {'user': ['', EOT], 'assistant': ['', EOT]}
    tokens = [*byte_tokenizer().token_bytes[:256], b'</s>']
    tokenizer = Tokenizer('byte', 'byte', tokens, {'</s>': 256}, '', template, end_ids=[256])
    settings = {name: getattr(sample_module, name) for name in sample_module.SAMPLING_SETTINGS}
    console = sample_module.Console(random_model(257), tokenizer, settings, '')
    asked = []
    monkeypatch.setattr(console.engine, 'submit', asked.append)
    console.reply('hi')
    assert asked[0].sampling.stop == ()  # no text to look for
    assert console.ids == [*b'hi', 256, 256]


def test_the_console_starts_with_a_given_prompt(out_dir):
    result = chat(out_dir, ['cd'], '--start=abc')
    assert 'abc\n' in result.stdout
    model, tokenizer, _ = load.load_model(out_dir)
    ids = tokenizer.encode('abc\ncd')
    pieces = generate(model, tokenizer, [ids], SamplingParams(6, **AS_SAMPLED), [(1337, 1)])
    assert ''.join(piece.text for piece in pieces) in result.stdout


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no pseudo-terminals')
def test_ctrl_c_stops_a_reply_and_twice_at_the_prompt_exits(out_dir):
    import pty

    terminal, theirs = pty.openpty()
    command = [sys.executable, str(SCRIPT), f'--out_dir={out_dir}', '--chat']
    env = {**os.environ, 'TERM': 'dumb'}
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
