"""Sampling: the choice of tokens, the cache, what is shown, the command line and the console."""

import math
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import sample as sample_module
from configurator import ConfigError, UserError, configure
from data.tokenizer import byte_tokenizer, char_tokenizer
from model import GPT, GPTConfig, KVCache
from sample import (
    Sampling,
    TextStream,
    advance,
    candidates,
    choose,
    complete,
    generate,
    main,
    prefill,
    split_stop,
    uncached,
)

SCRIPT = Path(__file__).parent.parent / 'sample.py'
BLOCK = 16
LETTERS = '\n abcdefgh'
ALL = {'top_k': None, 'temperature': 1.0}  # no filter at all


def tiny(vocab_size, block_size=BLOCK, seed=0, **changes):
    torch.manual_seed(seed)
    shape = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, **(changes or {'bias': True})}
    model = GPT(GPTConfig(block_size, vocab_size, **shape))
    for parameter in model.parameters():  # larger than at the start: clear preferences
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(params=[{}, {'arch': 'modern', 'n_kv_head': 1}], ids=['gpt2', 'grouped'])
def model(request):
    return tiny(len(LETTERS) + 1, **request.param)


@pytest.fixture
def tokenizer():
    return char_tokenizer(LETTERS, eot=True)


def run(*args, **options):
    return list(generate(*args, **options))


def ids_of(pieces, row=0):
    return [piece.token for piece in pieces if piece.row == row]


# -----------------------------------------------------------------------------
# the choice of a token


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize(
    'settings',
    [
        {'temperature': 0.7},
        {'top_k': 5},
        {'top_k': 1},
        {'top_p': 0.6},
        {'top_p': 0.01},
        {'min_p': 0.1},
        {'min_p': 1.0},
        {'repetition_penalty': 1.3},
        {'repetition_penalty': 0.8},
        {'temperature': 1.7, 'top_k': 20, 'top_p': 0.8, 'min_p': 0.05, 'repetition_penalty': 1.2},
    ],
)
def test_filtered_distributions_equal_those_of_transformers(settings, seed):
    processors = pytest.importorskip('transformers', reason='transformers is not installed')
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, 50, generator=generator)
    context = torch.randint(50, (4, 12), generator=generator)
    chain = [
        processors.RepetitionPenaltyLogitsProcessor(settings.get('repetition_penalty', 1.0)),
        processors.TemperatureLogitsWarper(settings.get('temperature', 1.0)),
    ]
    if 'top_k' in settings:
        chain.append(processors.TopKLogitsWarper(settings['top_k']))
    if 'top_p' in settings:
        chain.append(processors.TopPLogitsWarper(settings['top_p']))
    if 'min_p' in settings:
        chain.append(processors.MinPLogitsWarper(settings['min_p']))
    theirs = logits
    for processor in chain:
        theirs = processor(context, theirs)
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, context, True)
    values, ids = candidates(logits, Sampling(**{**ALL, **settings}), seen)
    ours = torch.full_like(logits, -math.inf).scatter(-1, ids, values)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-5, atol=1e-7)
    assert torch.equal(ours == -math.inf, theirs == -math.inf)


@pytest.mark.parametrize('spread', [1, 8], ids=['flat', 'peaked'])
@pytest.mark.parametrize('settings', [{'top_p': 0.9}, {'top_p': 0.9, 'top_k': 2000}, {'top_k': 3}])
def test_a_large_vocabulary_is_filtered_as_transformers_does(settings, spread):
    processors = pytest.importorskip('transformers', reason='transformers is not installed')
    logits = spread * torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    theirs = logits
    if 'top_k' in settings:
        theirs = processors.TopKLogitsWarper(settings['top_k'])(None, theirs)
    if 'top_p' in settings:
        theirs = processors.TopPLogitsWarper(settings['top_p'])(None, theirs)
    values, ids = candidates(logits, Sampling(**{**ALL, **settings}))
    if spread == 8 and settings == {'top_p': 0.9}:
        assert values.size(-1) < 4000  # the few likeliest were enough
    ours = torch.full_like(logits, -math.inf).scatter(-1, ids, values)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-4, atol=1e-7)


def test_a_row_of_a_large_vocabulary_sees_nothing_of_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    peaked = (4 * torch.randn(50, 5000, generator=generator)).bfloat16().float()  # many ties
    flat = 0.01 * torch.randn(1, 5000, generator=generator)
    sampling, uniforms = Sampling(**{**ALL, 'top_p': 0.9}), torch.rand(51, 1, generator=generator)
    alone = choose(peaked, sampling, uniforms[:50])
    beside = choose(torch.cat((peaked, flat)), sampling, uniforms)
    assert torch.equal(alone, beside[:50])


@pytest.mark.parametrize('stride', [4, 256])
def test_recorded_steps_write_what_computed_ones_do(model, tokenizer, monkeypatch, stride):
    """Without a GPU: a recorded step is computed anew, with the host's numbers of its recording."""

    def pretend(step, undo, device):
        result = step()
        undo()
        return (lambda: result.copy_(step())), result

    monkeypatch.setattr(sample_module, 'record', pretend)
    columns = lambda self, T: min(self.length, -(-(self.span + T) // stride) * stride)  # noqa: E731
    monkeypatch.setattr(KVCache, 'columns', columns)
    prompts, sampling = [[1, 2, 3], [4], [5, 6], [7] * 9, [8, 1]], Sampling(max_new_tokens=40)
    computed = run(model, tokenizer, prompts, sampling)

    def advance_by_graph(model, contexts, tokens, cache):
        monkeypatch.setattr(sample_module, 'is_recorded', lambda idx: True)
        return advance(model, contexts, tokens, cache)

    monkeypatch.setattr(sample_module, 'advance', advance_by_graph)
    recorded = run(model, tokenizer, prompts, sampling)
    assert len({len(ids_of(recorded, row)) for row in range(5)}) > 1  # rows end at different times
    assert recorded == computed


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits = torch.tensor([[1.0, 0.0, -math.inf, 2.0]]).expand(1000, 4)
    uniforms = (torch.arange(1000)[:, None] + 0.5) / 1000
    counts = choose(logits, Sampling(**ALL), uniforms).bincount(minlength=4)
    assert (counts / 1000 - logits[0].softmax(-1)).abs().max() < 0.002


def test_a_token_of_no_probability_is_never_drawn_even_by_extreme_random_numbers():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]]).expand(3, 5)
    uniforms = torch.tensor([[0.0], [0.5], [1 - 2**-24]])
    assert choose(logits, Sampling(**ALL), uniforms).tolist() == [1, 3, 3]


def test_temperature_zero_takes_the_likeliest_and_a_tiny_one_overflows_nothing():
    logits, uniforms = 50 * torch.randn(8, 30), torch.rand(8, 1)
    for temperature in (0.0, 1e-30, 1e-5):
        sampling = Sampling(temperature=temperature)
        assert torch.equal(choose(logits, sampling, uniforms), logits.argmax(-1))


@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_broken_weights_end_in_one_line(model, tokenizer, temperature, bad):
    model.lm_head.weight.data.fill_(bad)
    with pytest.raises(UserError, match='no finite logits'):
        run(model, tokenizer, [[0]], Sampling(temperature=temperature))


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('temperature', -0.1),
        ('temperature', math.nan),
        ('temperature', math.inf),
        ('top_k', -1),
        ('top_p', 0.0),
        ('top_p', 1.1),
        ('min_p', -0.5),
        ('min_p', 2.0),
        ('repetition_penalty', 0.0),
        ('max_new_tokens', 0),
        ('seed', -1),
        ('stop', ('',)),
    ],
)
def test_a_sampling_setting_out_of_range_is_one_line_naming_it(name, value):
    with pytest.raises(ConfigError, match=rf'^{name}=.*: must be .+') as error:
        Sampling(**{name: value})
    assert '\n' not in str(error.value)


# -----------------------------------------------------------------------------
# the cache


@pytest.mark.parametrize('block_size', [1, 2, 7, 16, 40])
@torch.no_grad()
def test_cached_logits_equal_uncached_ones_past_block_size_for_unequal_rows(block_size):
    model, steps = tiny(50, block_size), 60
    new = np.random.default_rng(0).integers(50, size=(steps, 4)).tolist()
    starts = [[1], [2] * min(5, block_size), [3] * block_size, [2] * min(5, block_size)]
    contexts, reference = [list(s) for s in starts], [list(s) for s in starts]
    logits, cache = prefill(model, contexts, block_size)
    for tokens in new:
        assert (logits - uncached(model, reference)).abs().max() < 1e-5
        logits = advance(model, contexts, tokens, cache)
        advance(model, reference, tokens, None)
        assert contexts == reference
        assert max(map(len, contexts)) <= block_size
    assert [context[-1] for context in contexts] == new[-1]


def test_a_full_context_forgets_its_oldest_eighth():
    model = tiny(50)
    contexts = [list(range(BLOCK)), [1, 2]]
    advance(model, contexts, [40, 41], None)
    assert contexts == [[*range(2, BLOCK), 40], [1, 2, 41]]


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_cached_and_uncached_generation_give_the_same_tokens(model, tokenizer, temperature):
    prompts = [[1, 2, 3], [4], list(range(9)) * 3]
    sampling = Sampling(max_new_tokens=3 * BLOCK, temperature=temperature, repetition_penalty=1.1)
    assert run(model, tokenizer, prompts, sampling) == run(
        model, tokenizer, prompts, sampling, cached=False
    )


def test_a_row_depends_on_its_seed_and_not_on_its_neighbours(model, tokenizer):
    prompts = [[1, 2, 3], [4], [5, 6], list(range(9)) * 3]
    sampling = Sampling(max_new_tokens=3 * BLOCK, **ALL)
    together = run(model, tokenizer, prompts, sampling)
    for row, prompt in enumerate(prompts):
        alone = run(model, tokenizer, [prompt], sampling, seeds=[(sampling.seed, row)])
        assert ids_of(alone) == ids_of(together, row)


def test_the_same_seed_gives_the_same_texts_and_another_one_others(model, tokenizer):
    prompts, sampling = [[1]] * 3, Sampling(max_new_tokens=20)
    first = run(model, tokenizer, prompts, sampling)
    assert first == run(model, tokenizer, prompts, sampling)
    assert first != run(model, tokenizer, prompts, Sampling(max_new_tokens=20, seed=1))
    assert len({tuple(ids_of(first, row)) for row in range(3)}) == 3  # rows differ among themselves


def test_only_the_end_of_a_long_prompt_counts(model, tokenizer):
    prompt, sampling = np.arange(40, dtype=np.uint16) % 9, Sampling(max_new_tokens=20)
    assert run(model, tokenizer, [prompt], sampling) == run(
        model, tokenizer, [prompt[-BLOCK:].tolist()], sampling
    )


# -----------------------------------------------------------------------------
# what is produced and shown


def test_ids_that_stand_for_nothing_are_never_produced():
    tokenizer = byte_tokenizer()
    tokenizer.token_bytes[100:256] = [None] * 156  # gaps
    tokenizer.special['<|other|>'] = 7  # a special token that no training text has
    model = tiny(300)  # padded: 257..299 stand for nothing
    sampling = Sampling(temperature=20.0, top_k=0, max_new_tokens=60)
    pieces = run(model, tokenizer, [[1]] * 20, sampling)
    produced = {piece.token for piece in pieces}
    assert produced <= {*range(100), 256} - {7}
    assert len(produced) > 90


def test_end_of_text_ends_its_row_only(model, tokenizer):
    pieces = run(model, tokenizer, [[i] for i in range(9)], Sampling(max_new_tokens=3, **ALL))
    reasons = set()
    for row in range(9):
        mine = [piece for piece in pieces if piece.row == row]
        assert [piece.finish for piece in mine[:-1]] == [None] * (len(mine) - 1)
        assert tokenizer.eot not in ids_of(mine[:-1], row)
        ended = mine[-1].token == tokenizer.eot
        assert mine[-1].finish == ('stop' if ended else 'length')
        assert ended or len(mine) == 3
        reasons.add(mine[-1].finish)
    assert reasons == {'stop', 'length'}


def test_a_stop_string_ends_a_text_and_is_not_shown(model):
    tokenizer = char_tokenizer(LETTERS)
    prompts, settings = [[1], [2]], {**ALL, 'max_new_tokens': 60, 'seed': 3}
    free = run(model, tokenizer, prompts, Sampling(**settings))
    for row in range(2):
        text = tokenizer.decode(ids_of(free, row))
        stop = text[4:7]
        cut = run(model, tokenizer, prompts, Sampling(**settings, stop=(stop,)))
        mine = [piece for piece in cut if piece.row == row]
        shown = ''.join(piece.text for piece in mine)
        assert shown == text[: text.index(stop)]
        assert mine[-1].finish == 'stop'


@pytest.mark.parametrize('stop', [(), ('ab', 'bca'), ('é!', '€')])
def test_streamed_text_is_the_text_in_whole_characters(stop):
    draw = random.Random(0)
    for _ in range(200):
        pieces = [draw.choice('abc!é€🙂').encode() for _ in range(draw.randrange(20))]
        data = b''.join(pieces) + draw.choice([b'', b'\xf0\x9f'])
        text = data.decode(errors='replace')
        cuts = sorted(draw.randrange(len(data) + 1) for _ in range(6))
        stream, shown, stopped = TextStream(stop), '', False
        for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True):
            if not stopped:
                piece, stopped = stream.add(data[a:b], b == len(data))
                shown += piece
                assert not any(s in shown for s in stop)
        found = [text.index(s) for s in stop if s in text]
        assert stopped == bool(found)
        assert shown == (text[: min(found)] if found else text)


def test_text_is_held_back_only_while_it_could_become_a_stop_string():
    stream = TextStream(('\nUser:',))
    assert stream.add(b'Hi\nUs', False) == ('Hi', False)
    assert stream.add(b'ually', False) == ('\nUsually', False)
    assert stream.add(b'\nUse', True) == ('\nUse', False)


def test_stop_strings_are_spelt_with_bars_and_escapes():
    assert split_stop('') == ()
    assert split_stop(r'END|\n\n|a\|b|\t|C:\\n|\d') == ('END', '\n\n', 'a|b', '\t', 'C:\\n', r'\d')


def test_complete_returns_a_text_for_each_prompt(model, tokenizer):
    sampling = Sampling(max_new_tokens=12)
    texts = complete(model, tokenizer, ['ab', 'c<|endoftext|>d'], sampling)
    assert len(texts) == 2
    assert texts[0] == complete(model, tokenizer, ['ab'], sampling)[0]
    assert set(''.join(texts)) <= set(LETTERS)


# -----------------------------------------------------------------------------
# the command line


@pytest.fixture(scope='module')
def out_dir(tmp_path_factory):
    return saved(tmp_path_factory.mktemp('run'), char_tokenizer(LETTERS))


def saved(folder, tokenizer, vocab_size=None):
    model = tiny(vocab_size or tokenizer.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {'step': 3, 'val_loss': 1.0, 'evaluated': True}
    checkpoint.save(folder, model, [optimizer], tokenizer, state)
    return folder


def sample(*args, **options):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'error', 'PYTHONUTF8': '0'}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)],
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
    model, tokenizer, _ = checkpoint.load_model(out_dir)
    assert texts[0] == 'abc' + complete(model, tokenizer, ['abc'], Sampling(max_new_tokens=30))[0]
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
    model, tokenizer, _ = checkpoint.load_model(out_dir)
    sampling, heard = Sampling(max_new_tokens=6), 'ab'
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


def test_the_console_begins_with_a_given_prompt(out_dir):
    result = chat(out_dir, ['cd'], '--start=abc')
    assert 'abc\n' in result.stdout
    model, tokenizer, _ = checkpoint.load_model(out_dir)
    ids = tokenizer.encode('abc\ncd')
    pieces = generate(model, tokenizer, [ids], Sampling(max_new_tokens=6), [(1337, 1)])
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
