"""The playground as people use it: a real Chromium before a real server."""

import contextlib
import itertools
import json
import math
import re

import pytest
from browser import needs_chromium, set_screen, severe_messages
from conftest import random_model
from server import (
    PATH,
    free_again,
    post,
    served,
    wait_until,
    write,
)

from flatgpt.data.bpe import train_bpe
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer

pytest_plugins = ['browser', 'server']
webdriver = pytest.importorskip('selenium.webdriver', reason='needs selenium, of [dev]')
Keys = webdriver.Keys
pytestmark = needs_chromium
DESKTOP, PHONE = (1100, 800), (360, 640)
AS_SHOWN = {'temperature': 0.8, 'top_p': 0.95}  # from the start
WIDTH = 'document.documentElement.scrollWidth'
LETTERS = ' abcdefghijklmnopqrstuvwxyz'  # and no end of text: each has as many tokens as allowed


@pytest.fixture
def visit(chromium, make_app):
    """Open the playground of a new server, which may complain of nothing -> the page."""
    with contextlib.ExitStack() as servers:

        def open_page(size=DESKTOP, scheme='light', tokenizer=None, block_size=1024, **settings):
            tokenizer = tokenizer or char_tokenizer(LETTERS)
            model = random_model(tokenizer.vocab_size, block_size)
            app = make_app(tokenizer, model, name='tiny', **settings)
            port = servers.enter_context(served(app))
            set_screen(chromium, *size, scheme)
            chromium.get(f'http://127.0.0.1:{port}/')
            return Page(chromium, app.extensions['flatgpt'], port)

        yield open_page
        chromium.execute_script('localStorage.clear(); sessionStorage.clear()')
        chromium.get('about:blank')
    assert severe_messages(chromium) == []


class Page:
    """What people do with it, and see."""

    def __init__(self, browser, service, port):
        self.browser, self.service, self.port = browser, service, port
        wait_until(lambda: self['model'].text or self['error'].text)

    def __getitem__(self, id):
        return self.browser.find_element('id', id)

    def script(self, code, *args):
        return self.browser.execute_script(f'return {code}', *args)

    @property
    def text(self):
        return self.script('text.textContent')

    @property
    def busy(self):
        return self['text'].get_attribute('aria-busy') == 'true'

    def tokens(self):
        return self.browser.find_elements('css selector', '#text span')

    def press(self, *keys):
        webdriver.ActionChains(self.browser).send_keys(*keys).perform()

    def point_at(self, element):
        webdriver.ActionChains(self.browser).move_to_element(element).perform()

    def set(self, **knobs):
        for name, value in knobs.items():
            code = 'knobs.find(knob => knob.name === arguments[0]).value = arguments[1]'
            self.script(code, name, value)

    def begin(self, prompt='the ', **knobs):
        self.set(**{'max_tokens': 1000, **knobs})
        self['prompt'].send_keys(prompt)
        self['run'].click()

    def write(self, prompt='the ', **knobs):
        """Run, to the end."""
        self.begin(prompt, **{'max_tokens': 40, **knobs})
        wait_until(lambda: not self.busy)

    def tip(self):
        """How likely a token was, as it is shown: rows of a token and its percentage."""
        rows = self.browser.find_elements('css selector', '#tip div')
        return [row.text.split('\n') for row in rows if row.is_displayed()]

    def colour(self, name):
        """Red, green and blue of a colour of the page, 0 to 255."""
        code = "document.body.style.outlineColor = 'var(--' + arguments[0] + ')'"
        self.script(code, name)
        return rgb(self.script('getComputedStyle(document.body).outlineColor'))


# -----------------------------------------------------------------------------
# a text


def test_text_comes_as_it_is_written_and_is_what_any_client_gets(visit):
    page = visit()
    assert page['model'].text == 'tiny'
    knobs = {'seed': 7, 'temperature': 1.5, 'top_k': 20, 'min_p': 0.01, 'repetition_penalty': 1.2}
    knobs |= {'frequency_penalty': 0.1, 'presence_penalty': -0.5, 'max_tokens': 300, 'top_p': 0.9}
    page.begin(stop='zqzqz\n\\n', **knobs)
    wait_until(lambda: page.text)
    early, busy = page.text, page.busy
    wait_until(lambda: not page.busy)
    assert busy
    assert page.text.startswith(early)
    _, _, body = post(page.port, prompt='the ', stop=['zqzqz', '\n'], **knobs)
    assert page.text == json.loads(body)['choices'][0]['text']
    assert page['status'].text.startswith('300 tokens · ')
    assert ' tokens/s · ' in page['status'].text
    assert page['status'].text.endswith(' · limit reached')


@pytest.mark.parametrize('by', ['button', 'key'])
def test_stopping_midway_frees_the_slot_and_keeps_the_text(visit, by):
    page = visit(block_size=4096)
    page.begin(max_tokens=4000)
    wait_until(lambda: page.text)
    assert page.service.engine.running == 1
    page['run'].click() if by == 'button' else page.press(Keys.ESCAPE)
    assert free_again(page.service)
    wait_until(lambda: not page.busy)
    assert 0 < len(page.text) < 4000
    assert page['status'].text.endswith(' · stopped')
    assert not page['error'].is_displayed()
    page.write(' ', max_tokens=5)
    assert len(page.text) == 5


def test_ctrl_enter_runs_and_continue_extends_the_text(visit):
    page = visit()
    page.set(max_tokens=9)
    focused = page.browser.switch_to.active_element  # the prompt, from the start
    focused.send_keys('once upon', Keys.CONTROL, Keys.ENTER)
    wait_until(lambda: page['continue'].is_displayed())
    first = page.text
    page['continue'].click()
    wait_until(lambda: page['continue'].is_displayed() and not page.busy)
    assert page['prompt'].get_property('value') == 'once upon' + first
    assert len(page.text) == 9


def test_any_text_is_only_text(visit):
    page = visit(tokenizer=byte_tokenizer())
    text = '<img src=x onerror="alert(1)"> é € 😀\n\n&amp; "zq'
    write(page.service, text.encode() + b'\xff!')
    page.write(max_tokens=len(text.encode()) + 2, stop='zz')
    assert page.text == text + '\ufffd!'
    # a character belongs to the last of its bytes
    shown = [each for char in text for each in [''] * (len(char.encode()) - 1) + [char]]
    assert page.script("tokens.map(({span}) => span?.textContent ?? '')") == [*shown, '\ufffd', '!']


def test_a_token_that_looks_like_html_is_only_text(visit):
    word = '<!--'  # as much of it as a token of GPT-2's kind can have
    tokenizer = train_bpe([word * 200], 300)
    (token,) = tokenizer.encode(word).tolist()
    page = visit(tokenizer=tokenizer)
    write(page.service, [token] * 3)
    page.write(max_tokens=3)
    page.point_at(page.tokens()[1])
    assert page.text == word * 3
    assert page.browser.find_element('css selector', '#tip .own b').text == word


# -----------------------------------------------------------------------------
# how likely its tokens were


def test_pointing_at_a_token_shows_its_probability_and_the_likeliest_ones(visit):
    page = visit()
    page.write(seed=1, max_tokens=12)
    assert page.tip() == []
    page.point_at(page.tokens()[3])
    by_pointer = page.tip()
    _, _, body = post(page.port, prompt='the ', seed=1, max_tokens=12, logprobs=5, **AS_SHOWN)
    scores = json.loads(body)['choices'][0]['logprobs']
    top = sorted(scores['top_logprobs'][3].items(), key=lambda pair: -pair[1])
    assert [token for token, _ in by_pointer] == [token.replace(' ', '␣') for token, _ in top]
    for (_, share), (_, logprob) in zip(by_pointer, top, strict=True):
        assert float(share.removesuffix('%')) == pytest.approx(100 * math.exp(logprob), abs=0.51)
    own = page.browser.find_element('css selector', '#tip .own b').text
    assert own == scores['tokens'][3].replace(' ', '␣')

    page.point_at(page['prompt'])
    assert page.tip() == []
    page.script('text.focus()')
    page.press(*[Keys.ARROW_RIGHT] * 4)
    assert page.tip() == by_pointer
    page.press(Keys.ESCAPE)
    assert page.tip() == []


def test_unlikely_tokens_are_marked_unless_that_is_switched_off(visit):
    page = visit()
    page.write(temperature=2)
    marks = 'tokens.map(({span, logprob}) => [getComputedStyle(span).textDecoration, logprob])'
    strength = sorted((logprob, alpha(mark)) for mark, logprob in page.script(marks))
    assert all(a >= b for (_, a), (_, b) in itertools.pairwise(strength))
    assert strength[0][1] > strength[-1][1]
    page['tint'].click()
    assert all('underline' not in mark for mark, _ in page.script(marks))


def alpha(mark):
    """How opaque the colour of a line is: 'underline 3px color(srgb 1 0 0 / 0.5)' has 0.5."""
    return float(re.search(r'/ ([\d.e-]+)\)', mark)[1]) if '/' in mark else 1.0


# -----------------------------------------------------------------------------
# errors


def test_a_prompt_that_is_too_long_is_reported_beside_its_field(visit):
    page = visit(block_size=64)
    assert page.script("knobs.find(knob => knob.name === 'max_tokens').value") == '32'
    page.write('a' * 70, max_tokens=40)
    said = page['error'].text
    assert page['error'].is_displayed()
    assert '70' in said
    assert '64' in said
    assert not set('{}"') & set(said)
    assert page['prompt'].get_attribute('aria-invalid') == 'true'
    page['prompt'].clear()
    page.write('a')
    assert not page['error'].is_displayed()
    assert page['prompt'].get_attribute('aria-invalid') is None


def test_a_wrong_setting_is_unfolded_and_marked(visit):
    page = visit()
    page.write(top_k=-7)
    field = page.browser.find_element('name', 'top_k')
    assert 'top_k' in page['error'].text
    assert field.is_displayed()
    assert field.get_attribute('aria-invalid') == 'true'


def test_a_key_is_asked_for_and_kept_for_this_tab_only(visit):
    page = visit(api_key='wohlan')
    assert page['error'].text == 'The server requires an API key.'
    page.press('wrong', Keys.ENTER)
    wait_until(lambda: 'is wrong' in page['error'].text and not page.busy)
    page['key'].clear()
    page['key'].send_keys('wohlan')
    page.write()
    assert len(page.text) == 40
    assert page['model'].text == 'tiny'
    assert not page['key'].is_displayed()
    assert page.script('Object.values({...localStorage})') == []
    assert page.script('document.cookie') == ''


def test_a_right_key_takes_the_question_away(visit):
    page = visit(api_key='wohlan')
    page['key'].send_keys('wohlan', Keys.TAB)
    wait_until(lambda: page['model'].text == 'tiny')
    assert not page['key'].is_displayed()
    assert not page['error'].is_displayed()


def test_an_engine_that_fails_midway_is_reported_in_words(visit):
    page = visit(block_size=4096)
    page.begin(max_tokens=4000)
    wait_until(lambda: page.text)
    page.service.engine.decode = None  # what calls it fails
    wait_until(lambda: not page.busy)
    assert page['error'].text == 'the engine failed; see the server log, then restart the server'


def test_a_server_that_is_gone_is_reported_in_words(visit):
    page = visit()
    page.browser.set_network_conditions(offline=True, latency=0, throughput=1)
    try:
        page.write()
    finally:
        page.browser.delete_network_conditions()
    assert page['error'].text == 'The server does not respond. Is it still running?'


# -----------------------------------------------------------------------------
# how it looks


def rgb(colour):
    return [int(part) for part in re.findall(r'\d+', colour)[:3]]


def luminance(colour):
    """Of red, green and blue, by WCAG."""
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def brightness(page):
    return max(rgb(page.script('getComputedStyle(document.body).backgroundColor')))


def test_a_phone_scrolls_in_one_direction_only(visit):
    page = visit(PHONE, block_size=64)
    assert not page.browser.find_element('name', 'temperature').is_displayed()
    widths = [page.script(WIDTH)]
    page.begin('a' * 70, max_tokens=40)
    wait_until(lambda: page['error'].is_displayed())
    widths.append(page.script(WIDTH))
    page['prompt'].clear()
    page.write('a')
    page.point_at(page.tokens()[-1])
    widths.append(page.script(WIDTH))
    assert page.tip()
    tip = page['tip'].rect
    assert 0 <= tip['x'] <= 360 - tip['width']
    page.browser.find_element('css selector', '#knobs > summary').click()
    page.browser.find_element('css selector', '#more > summary').click()
    widths.append(page.script(WIDTH))
    assert widths == [360] * 4


def test_dark_and_light_follow_the_system_until_chosen(visit):
    assert brightness(visit(scheme='light')) > 200
    page = visit(scheme='dark')
    assert brightness(page) < 60
    assert page['theme'].text == 'Light'
    page['theme'].click()
    assert brightness(page) > 200
    page.browser.refresh()
    assert brightness(page) > 200
    page['theme'].click()
    assert brightness(page) < 60


@pytest.mark.parametrize('scheme', ['dark', 'light'])
def test_all_text_can_be_told_from_its_ground(visit, scheme):
    page = visit(scheme=scheme)
    for ink in ('ink', 'quiet', 'accent', 'wrong'):
        for ground in ('paper', 'sheet'):
            assert contrast(page.colour(ink), page.colour(ground)) >= 4.5, (ink, ground)
    assert contrast(page.colour('on-accent'), page.colour('accent')) >= 4.5
    assert contrast(page.colour('edge'), page.colour('sheet')) >= 3


def test_nothing_is_loaded_from_other_servers(visit):
    page = visit()
    page.write()
    ours, found = f'http://127.0.0.1:{page.port}', set()
    names = "performance.getEntriesByType('resource').map(({name}) => name)"

    def all_found():
        found.update(name.removeprefix(ours) for name in page.script(names))
        return PATH in found

    wait_until(all_found)
    assert found == {'/v1/models', PATH}
