"""The model as one HTML page: a real Chromium opens the file and computes the same tokens."""

import json
import re
import time

import pytest
import torch
from browser import needs_chromium, set_screen, severe_messages
from conftest import random_model, refused
from error_lines import case, error_line

from flatgpt.checkpoint.__main__ import main
from flatgpt.checkpoint.load import load_model
from flatgpt.checkpoint.page import MAX_PARAMETERS, export_page
from flatgpt.checkpoint.save import save_checkpoint
from flatgpt.data.bpe import train_bpe
from flatgpt.data.hf_options import GPT2_PATTERN
from flatgpt.data.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer, self_check_text
from flatgpt.inference.engine import generate
from flatgpt.inference.quantize import prepare_for_inference
from flatgpt.inference.sampling import SamplingParams
from model import GPT, GPTConfig

pytest_plugins = ['browser']
TEXT = "the cat's 12345 dogs ran, and it said: «Grüße»; the end of the cat and the dogs. " * 3
CHARACTERS = sorted(set(TEXT) | {'\n'})
CLOSE = 1e-4  # logits nearer than this may be ordered either way
TEMPLATE = {'user': ['User: ', '\n'], 'assistant': ['Bot: ', '\n']}


def bpe(**fields):
    return Tokenizer.from_dict(train_bpe([TEXT], 300).to_dict() | fields)


MODELS = {  # tokenizer, shape
    'gpt2, bytes': (byte_tokenizer, {'bias': True}),
    'gpt2, characters': (lambda: char_tokenizer(CHARACTERS, eot=True), {'bias': False}),
    'gpt2, odd width': (
        lambda: bpe(pattern=GPT2_PATTERN),
        {'bias': True, 'n_embd': 36, 'n_head': 3},
    ),
    'modern, bytes': (byte_tokenizer, {'arch': 'modern', 'n_embd': 64}),
    'modern, grouped': (bpe, {'arch': 'modern', 'n_embd': 64, 'n_head': 4, 'n_kv_head': 2}),
}
PROMPTS = [
    't',
    ';',
    '\n',
    'the cat',
    "12345 cat's",
    ' and  the end',
    'Grüße',
    '5',
    'dog',
    TEXT[:60],
]


@pytest.fixture
def run(tmp_path):
    """Write a run directory with one checkpoint -> its path."""

    def run(model, tokenizer, name='run'):
        state = {'step': 1, 'evaluated': False, 'config': {}}
        save_checkpoint(tmp_path / name, model, [], tokenizer, state)
        return tmp_path / name

    return run


@pytest.fixture
def visit(chromium, tmp_path):
    """Write the page of a model, and open it -> the browser. No page may report an error."""

    def visit(model, tokenizer, name='mine'):
        path = tmp_path / f'{name}.html'
        export_page(model, tokenizer, {}, path)
        return open_page(chromium, path)

    yield visit
    chromium.get('about:blank')
    assert severe_messages(chromium) == []


def open_page(browser, path):
    set_screen(browser, 1100, 800)
    browser.get(path.as_uri())
    assert browser.find_element('id', 'error').text == ''
    return browser


def wait_until_written(page):
    end = time.monotonic() + 60
    while page.find_element('id', 'text').get_attribute('aria-busy') == 'true':
        assert time.monotonic() < end
        time.sleep(0.01)


def written_by(page, ids, tokens, stop=()):
    """The ids that the page writes after a prompt, the most likely first."""
    code = """return complete(arguments[0], {temperature: 0, maxTokens: arguments[1], seed: 1,
        stop: arguments[2]}).then(result => result.written)"""
    return page.execute_script(code, list(map(int, ids)), tokens, list(stop))


def ties(model, tokenizer, prompt, ours, theirs):
    """0 if both are equal, 1 if they differ first where two logits are nearly equal; else fails."""
    if ours == theirs:
        return 0
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    context = [*map(int, prompt)][-model.config.block_size :]
    for id in ours[:at]:  # as scheduler.Slot
        if len(context) == model.config.block_size:
            context = context[max(1, len(context) // 8) :]
        context.append(id)
    with torch.inference_mode():
        logits = model(torch.tensor([context]))[0][0, -1]
    assert abs(logits[ours[at]] - logits[theirs[at]]) < CLOSE, (at, ours, theirs)
    return 1


# -----------------------------------------------------------------------------
# the page


@needs_chromium
@pytest.mark.parametrize('product', ['simd', 'plain'])
@pytest.mark.parametrize('name', MODELS)
def test_a_page_writes_the_ids_of_sample_py_past_its_context(visit, name, product, capsys):
    make, shape = MODELS[name]
    tokenizer = make()
    page = visit(random_model(tokenizer.vocab_size, 32, **shape), tokenizer)
    assert page.execute_script('return fastProduct !== null')
    if product == 'plain':
        page.execute_script('fastProduct = null')
    model = prepare_for_inference(random_model(tokenizer.vocab_size, 32, **shape), 'int8')
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = [[] for _ in prompts]
    for output in generate(model, tokenizer, prompts, SamplingParams(40, temperature=0)):
        expected[output.index].append(output.token)
    found = [written_by(page, prompt, 40) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) > 1
    close = [ties(model, tokenizer, *each) for each in zip(prompts, expected, found, strict=True)]
    with capsys.disabled():
        print(f'\n{name}, {product}: {len(close)} prompts, {sum(close)} differ at a tie')


@needs_chromium
@pytest.mark.parametrize('name', MODELS)
def test_a_page_encodes_and_decodes_text_as_the_tokenizer_does(visit, name):
    make, shape = MODELS[name]
    tokenizer = make()
    page = visit(random_model(tokenizer.vocab_size, **shape), tokenizer)
    texts = [TEXT, '', 'the <|endoftext|> end']
    if tokenizer.kind == 'char':
        texts[2] = texts[2].replace('<|endoftext|>', '')
    else:
        texts += [self_check_text(pieces=300), 'a' * 3000, '\ufeffa\u0085b \u2003 c\x1f\x1e']
    for text in texts:
        ids = tokenizer.encode(text, allow_eot=True).tolist()
        assert page.execute_script('return encode(arguments[0])', text) == ids
        code = """const stream = new TextStream([]), ids = arguments[0]
            return ids.map((id, i) => stream.add(id, i === ids.length - 1)).join('')"""
        plain = tokenizer.encode(text).tolist()
        assert page.execute_script(code, plain) == text


@needs_chromium
def test_a_page_shows_what_it_writes_and_stops(visit):
    tokenizer = char_tokenizer('<b>&x')  # any sample looks like HTML
    page = visit(random_model(5, 16), tokenizer, 'a<b>&')
    assert page.find_element('id', 'model').text.startswith('a<b>& · ')
    assert page.title == 'a<b>&'
    prompt, run = (page.find_element('id', name) for name in ('prompt', 'run'))
    text, status = (page.find_element('id', name) for name in ('text', 'status'))
    prompt.send_keys('<b>')
    run.click()
    wait_until_written(page)
    assert len(text.text) == 300
    assert {*'<b>&x'} == {*text.text}
    assert text.find_elements('css selector', '*') == []
    assert '300 tokens' in status.text
    assert 'limit reached' in status.text
    first = text.text
    set_knobs(page, stop=first[3:5], temperature=0.8, seed=7, maxTokens=100000)
    again = []
    for _ in range(2):
        run.click()
        wait_until_written(page)
        again.append(text.text)
    assert again[0] == again[1]  # the same seed
    assert first[3:5] not in again[0]
    assert 'complete' in status.text
    set_knobs(page, stop='')
    run.click()
    run.click()
    wait_until_written(page)
    assert 'stopped' in status.text
    prompt.send_keys('y')
    run.click()
    wait_until_written(page)
    assert '"y"' in page.find_element('id', 'error').text


def set_knobs(page, **knobs):
    code = 'knobs.find(knob => knob.name === arguments[0]).value = arguments[1]'
    for name, value in knobs.items():
        page.execute_script(code, name, value)


@needs_chromium
def test_a_page_samples_from_the_most_likely_tokens(visit):
    page = visit(random_model(257), byte_tokenizer())
    code = """const random = randomNumbers(arguments[2]), counts = {}
        for (let i = 0; i < 2000; i++) {
            const id = sample(Float32Array.from(arguments[0]), arguments[1], random)
            counts[id] = (counts[id] ?? 0) + 1
        }
        return counts"""
    logits = [-9.0] * 257
    logits[65:69] = [0.0, 1.0, 2.0, 3.0]
    counts = page.execute_script(code, logits, {'temperature': 0.5, 'topK': 2}, 1)
    assert counts.keys() == {'67', '68'}
    assert abs(counts['68'] / 2000 - 1 / (1 + 2.718281828**-2)) < 0.03
    assert counts != page.execute_script(code, logits, {'temperature': 0.5, 'topK': 2}, 2)
    assert page.execute_script(code, logits, {'temperature': 0, 'topK': 0}, 1) == {'68': 2000}


@needs_chromium
def test_a_page_of_a_chat_model_wraps_messages_as_the_console_does(visit):
    tokenizer = Tokenizer.from_dict(byte_tokenizer().to_dict() | {'chat_template': TEMPLATE})
    page = visit(random_model(257, 64), tokenizer)
    set_knobs(page, temperature=0, maxTokens=5)
    ids = []
    for message in ('Hi <b>', 'You?'):
        page.find_element('id', 'prompt').send_keys(message)
        page.find_element('id', 'run').click()
        wait_until_written(page)
        ids += tokenizer.encode_chat([{'role': 'user', 'content': message}]).tolist()
        found = page.execute_script('return conversation')
        assert found[: len(ids)] == ids
        assert found[-1:] == [10]
        ids = found
    shown = page.find_elements('css selector', '#text .message')
    assert [each.text for each in shown] == ['Hi <b>', 'You?']
    page.find_element('id', 'continue').click()
    assert page.execute_script('return conversation') == []


@needs_chromium
def test_the_quickstart_s_shape_is_small_and_fast(visit, tmp_path, capsys):
    shape = {'n_layer': 5, 'n_head': 2, 'n_embd': 160, 'arch': 'modern'}
    page = visit(random_model(257, 256, **shape), byte_tokenizer())
    assert (tmp_path / 'mine.html').stat().st_size < 3e6
    code = """const began = performance.now()
        const settings = {temperature: 0.8, topK: 200, maxTokens: 120, seed: 1, stop: []}
        return complete(encode('The '), settings).then(({written}) =>
            [written.length, 1000 * written.length / (performance.now() - began)])"""
    rates = []
    for product in ('fastProduct', 'null'):
        count, rate = page.execute_script(f'fastProduct = {product}; {code}')
        rates.append(rate)
    with capsys.disabled():
        print(f'\nquickstart: {rates[0]:.0f} tokens/s with SIMD, {rates[1]:.0f} without')
    assert count > 1


@needs_chromium
def test_a_page_cut_short_says_so(visit, chromium, tmp_path):
    visit(random_model(257), byte_tokenizer())
    whole = (tmp_path / 'mine.html').read_text(encoding='utf-8')
    (tmp_path / 'cut.html').write_text(whole[:-2000], encoding='utf-8')
    chromium.get((tmp_path / 'cut.html').as_uri())
    assert 'incomplete' in chromium.find_element('id', 'error').text
    assert not chromium.find_element('id', 'run').is_enabled()


# -----------------------------------------------------------------------------
# the file


def test_a_page_is_one_file_without_links_that_no_token_can_break(run, tmp_path, capsys):
    tokens = byte_tokenizer().to_dict()
    tokens['special_tokens'] = {'</script><b>/* its tensors */': 256}
    where, path = run(random_model(257), Tokenizer.from_dict(tokens)), tmp_path / 'mine.html'
    main(['export', str(where), str(path)])
    assert f'written to {path}' in capsys.readouterr().out
    page = path.read_text(encoding='utf-8')
    assert page.count('</script>') == 3
    assert not re.search(r'(src|href)=(?!"data:)', page)
    assert 'innerHTML' not in page
    content = json.loads(re.search('application/json">(.*?)</script>', page, re.S)[1])
    assert content['name'] == 'mine'
    assert load_model(where)[0].num_params() == content['model']['size']
    main(['export', str(where), str(tmp_path / 'mine'), '--format=page'])
    assert (tmp_path / 'mine').read_text(encoding='utf-8') == page


@error_line(
    'choose another name for the page', 'give the page another path', 'a page needs a tokenizer'
)
def test_a_page_is_written_to_a_new_path_and_with_a_tokenizer(run, tmp_path):
    where, good = str(run(random_model(257), None)), str(tmp_path / 'm.html')
    refused(main, ['export', where, good])
    (tmp_path / 'file.html').touch()
    for bad in ('file.html', 'file.html/m.html'):
        refused(main, ['export', where, str(tmp_path / bad), '--tokenizer=byte'])
    main(['export', where, good, '--tokenizer=byte'])


def test_a_reward_model_has_no_page(run, tmp_path):
    judge = random_model(257)
    judge.become_reward_model()
    where = str(run(judge, byte_tokenizer()))
    assert 'is a reward model' in refused(main, ['export', where, str(tmp_path / 'm.html')])


@error_line('are too many for a page')
def test_a_model_too_large_for_a_page_is_exported_otherwise(run, tmp_path, monkeypatch):
    where = str(run(random_model(257), byte_tokenizer()))
    monkeypatch.setattr('flatgpt.checkpoint.page.MAX_PARAMETERS', 1000)
    refused(main, ['export', where, str(tmp_path / 'm.html')])
    main(['export', where, str(tmp_path / 'm'), '--format=transformers'])
    assert sum(p.numel() for p in GPT(GPTConfig(64, 257, 5, 2, 160)).parameters()) < MAX_PARAMETERS


END = {'text': '<|endoftext|>', 'id': 256, 'special': True}


@pytest.mark.parametrize(
    'fields',
    [
        case('a page has no added tokens', {'added_tokens': [END, {'text': 'A', 'id': 65}]}),
        case('a page splits text like', {'kind': 'bpe', 'pattern': r'(?i:x)|\s|\S'}),
    ],
)
def test_a_tokenizer_that_a_page_has_not_is_for_the_server(run, tmp_path, fields):
    tokenizer = Tokenizer.from_dict(byte_tokenizer().to_dict() | fields)
    where = str(run(random_model(257), tokenizer))
    refused(main, ['export', where, str(tmp_path / 'm.html')])
    assert load_model(where)[1].stop_ids == {256}  # as api.py does
