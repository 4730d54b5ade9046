"""Errors of the server: each is provoked, its advice is followed, and then the request works."""

import logging
import re
import time

import pytest
from conftest import random_model, saved
from error_lines import case, error_line
from server import GOES_ON, PATH, SIZE, VOCABULARY, wait_until

import api
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer
from flatgpt.errors import UserError
from flatgpt.serving.api_error import APIError
from flatgpt.serving.http_server import listen
from flatgpt.serving.origins import Origins

pytest_plugins = ['server']
CHAT = '/v1/chat/completions'
ABC = {'messages': [{'role': 'user', 'content': 'abc'}], 'max_tokens': 1}


@pytest.fixture
def client(make_app):
    return make_app(name='tiny').test_client()


@pytest.fixture
def chat_client(make_app):
    """A client of a model with a chat template, whose vocabulary is three letters."""
    tokenizer = char_tokenizer('abc', eot=True)
    tokenizer.chat_template = {'user': ['', ''], 'assistant': ['', '']}
    return make_app(tokenizer, random_model(4, SIZE)).test_client()


def message_of(reply, status):
    assert reply.status_code == status, reply.text
    return reply.json['error']['message']


def send(client, body, path=PATH):
    return client.post(path, json=body)


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('needs "echo": true', {'max_tokens': 0}, {'max_tokens': 0, 'echo': True}),
        case('are the limit of this server; send fewer', {'n': 137}, {'n': 2}),
        case('is not a token id; use 0 to', {'prompt': [257]}, {'prompt': [256]}),
        case('model\'s context holds', {'max_tokens': 64}, {'max_tokens': 63}),
        case('does not support it; omit it{}', {'suffix': 'b'}, {}),
        case('does not support it; omit it{}', {'min_tokens': 3}, {'min_tokens': 0}),
        case('omit it, or give 1 or n', {'best_of': 2}, {'best_of': 1}),
        case('must be a string, a list of token ids', {'prompt': ['']}, {'prompt': ['b']}),
        case('must be a string of 1 to', {'stop': ['']}, {'stop': ['b']}),
        case('must have token ids as keys', {'logit_bias': {'a': 1}}, {'logit_bias': {'97': 1}}),
        case('entries; send fewer', {'logit_bias': dict.fromkeys(range(1025), 1)}, {}),
        case('a whole number', {'n': 1.5}, {'n': 1}),
        case('a number', {'temperature': '1'}, {'temperature': 1}),
        case('true or false', {'echo': 1}, {'echo': True}),
        case('a string', {'model': 1}, {'model': 'tiny'}),
        case('an object', {'stream_options': True}, {'stream_options': {'include_usage': None}}),
        case('greater than {}', {'top_p': 0}, {'top_p': 0.1}),
        case('at least {}', {'n': 0}, {'n': 1}),
        case('at most {}', {'top_p': 1.5}, {'top_p': 1}),
    ],
)  # fmt: skip
def test_the_advice_for_a_field_is_right(client, bad, good):
    error = message_of(send(client, {'prompt': 'a', **bad}), 400)
    assert '; ' in error or ': ' in error
    assert send(client, {'prompt': 'a', **good}).json['choices']


def test_the_advice_for_lengths_and_biases_has_the_right_number(client):
    error = message_of(send(client, {'prompt': 'a' * 60}), 400)
    (limit,) = re.findall(r'lower it to (\d+)$', error)
    assert send(client, {'prompt': 'a' * 60, 'max_tokens': int(limit)}).json['choices']
    assert message_of(send(client, {'prompt': 'a' * 64}), 400).endswith('shorten the prompt')
    assert send(client, {'prompt': 'a' * 63, 'max_tokens': 1}).json['choices']
    error = message_of(send(client, {'prompt': 'a', 'logit_bias': {'300': 1}}), 400)
    (last,) = re.findall(r'use 0 to (\d+)$', error)
    assert send(client, {'prompt': 'a', 'logit_bias': {last: 1}}).json['choices']


@error_line('this server accepts at most')
@pytest.mark.parametrize('bad', [{'prompt': 'a' * 9}, {'max_tokens': 9}], ids=str)
def test_a_limit_of_the_server_is_reported_and_can_be_kept(make_app, bad):
    client = make_app(max_prompt_tokens=8, max_new_tokens=8).test_client()
    body = {'prompt': 'a', 'max_tokens': 2, **bad}
    (limit,) = re.findall(r'at most (\d+)$', message_of(send(client, body), 400))
    field = next(iter(bad))
    body[field] = body[field][: int(limit)] if field == 'prompt' else int(limit)
    assert send(client, body).json['choices']


@error_line('{}; send valid JSON in UTF-8')
@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        (b'{"prompt": "a", "n": 1, "n": 2}', b'{"prompt": "a", "n": 2}'),
        (b'{"prompt": "a", "user": NaN}', b'{"prompt": "a", "user": null}'),
        (b'{"prompt": "\xe9"}', b'{"prompt": "\xc3\xa9"}'),
        (b"{'prompt': 'a'}", b'{"prompt": "a"}'),
        (b'{"prompt": "\\ud83d"}', b'{"prompt": "\\ud83d\\ude00"}'),
    ],
)
def test_an_invalid_body_is_accepted_once_it_is_valid(client, bad, good):
    message_of(client.post(PATH, data=bad, content_type='application/json'), 400)
    assert client.post(PATH, data=good, content_type='application/json').json['choices']


@pytest.mark.parametrize(
    ('bad', 'status'),
    [
        case('with the header "Content-Type', {'Content-Type': 'text/plain'}, 415),
        case(
            'Content-Type: charset={} is',
            {'Content-Type': 'application/json; charset=latin-1'},
            415,
        ),
        case('send the JSON uncompressed', {'Content-Encoding': 'gzip'}, 415),
        case('into the JSON body, not into the URL', {}, 400),
        case("{}; send this server's key in the header", {'Authorization': ''}, 401),
        case("{}; send this server's key in the header", {'Authorization': 'Bearer OLD'}, 401),
    ],
)  # fmt: skip
def test_a_request_works_with_the_headers_that_an_error_asks_for(make_app, bad, status):
    client = make_app(api_key='KEY').test_client()
    path = f'{PATH}?n=2' if status == 400 else PATH
    good = {'Content-Type': 'application/json', 'Authorization': 'Bearer KEY'}
    error = message_of(client.post(path, data='{"prompt": "é"}', headers={**good, **bad}), status)
    for header in re.findall('"(.*?)"', error):
        assert header in [f'{name}: {value}' for name, value in good.items()]
    reply = client.post(PATH, data='{"prompt": "é", "n": 2}'.encode(), headers=good)
    assert len(reply.json['choices']) == 2


@error_line('the body: {}')
def test_a_body_of_fewer_levels_is_accepted(client):
    for levels, status in ((10_000, 400), (500, 400), (50, 200)):
        data = f'{{"prompt": "a", "user": {"[" * levels + "]" * levels}}}'
        reply = client.post(PATH, data=data, content_type='application/json')
        assert reply.status_code == status
        assert status == 200 or reply.json['error']['message'].endswith('use fewer levels')


@error_line('the body: has a number of too many digits; send a shorter one')
def test_a_shorter_number_is_accepted(client):
    message_of(
        client.post(
            PATH,
            data=f'{{"prompt": "a", "metadata": {"9" * 5000}}}',
            content_type='application/json',
        ),
        400,
    )
    assert send(client, {'prompt': 'a', 'metadata': 99}).json['choices']


@error_line('is a field of {}; send the request there, or omit it')
@pytest.mark.parametrize('sent_to', [PATH, CHAT])
def test_a_request_to_the_wrong_path_works_at_the_one_that_an_error_gives(chat_client, sent_to):
    body = ABC if sent_to == PATH else {'prompt': 'abc', 'max_tokens': 1}
    error = message_of(send(chat_client, body, sent_to), 400)
    (path,) = re.findall('is a field of (.*?);', error)
    assert send(chat_client, body, path).json['choices']
    both = {**ABC, 'prompt': 'abc'}
    for path in (PATH, CHAT):
        field = message_of(send(chat_client, both, path), 400).partition(':')[0]
        right = {name: value for name, value in both.items() if name != field}
        assert send(chat_client, right, path).json['choices']


@error_line('no such field; {}')
def test_an_unknown_field_is_found_in_the_documentation(chat_client):
    message = {**ABC['messages'][0], 'text': 'abc'}
    error = message_of(send(chat_client, {**ABC, 'messages': [message]}, CHAT), 400)
    assert error == 'messages[0].text: no such field; /docs lists the fields'
    documented = chat_client.get('/openapi.json').json['components']['schemas']['ChatMessage']
    assert 'content' in documented['properties']
    assert 'text' not in documented['properties']
    assert send(chat_client, ABC, CHAT).json['choices']


@pytest.mark.parametrize(
    ('bad', 'status'),
    [
        case('no text in them; add some', {'role': 'user', 'content': ''}, 400),
        case('messages[{}]: {}', {'role': 'judge', 'content': 'abc'}, 400),
        case('messages: {}', {'role': 'user', 'content': 'abcd'}, 400),
    ],
)
def test_messages_are_completed_once_they_are_as_an_error_asks(chat_client, bad, status):
    error = message_of(send(chat_client, {**ABC, 'messages': [bad]}, CHAT), status)
    good = dict(bad)
    if 'add some' in error:
        good['content'] = 'abc'
    elif 'user' in error:  # among the roles that there are
        good['role'] = 'user'
    else:
        assert "'d'" in error
        good['content'] = bad['content'].replace('d', '')
    assert send(chat_client, {**ABC, 'messages': [good]}, CHAT).json['choices']


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('needs "logprobs": true', {'top_logprobs': 1}, {'logprobs': True, 'top_logprobs': 1}),
        case('differs from max_tokens; leave out', {'max_completion_tokens': 2}, {}),
    ],
)
def test_the_advice_for_a_field_of_a_chat_is_right(chat_client, bad, good):
    message_of(send(chat_client, {**ABC, **bad}, CHAT), 400)
    assert send(chat_client, {**ABC, **good}, CHAT).json['choices']


@error_line('is missing; add it', 'is empty; it needs at least one entry')
def test_a_missing_field_is_added_and_an_empty_one_gets_an_entry(chat_client):
    assert message_of(send(chat_client, {}, CHAT), 400) == 'messages: is missing; add it'
    body = {'messages': [], 'max_tokens': 1}
    assert message_of(send(chat_client, body, CHAT), 400).startswith('messages: is empty')
    assert send(chat_client, ABC, CHAT).json['choices']


@error_line('has no chat template; use /v1/completions')
def test_without_a_chat_template_prompts_are_completed(client):
    (path,) = re.findall('use (.*)$', message_of(send(client, ABC, CHAT), 400))
    assert send(client, {'prompt': 'abc'}, path).json['choices']


@error_line('model {} does not exist; use {}')
def test_the_model_has_the_name_that_an_error_advises(client):
    error = message_of(client.get('/v1/models/other'), 404)
    assert client.get(f'/v1/models/{re.findall("use .(.*).$", error)[0]}').json['id'] == 'tiny'


def test_paths_methods_and_sizes_have_advice_that_works(make_app):
    client = make_app(max_body=0.001).test_client()
    assert '/docs lists the paths' in message_of(client.get('/completions'), 404)
    assert PATH in client.get('/openapi.json').json['paths']
    error = message_of(client.get(PATH), 405)
    method = error.rpartition(' ')[2].lower()
    assert getattr(client, method)(PATH, json={'prompt': 'a'}).status_code == 200
    assert message_of(send(client, {'prompt': 'a' * 2000}), 413).endswith('; send less')
    assert message_of(send(client, {'prompt': 'a' * 200}), 400).startswith('the prompt has 200')


@error_line('completions are running or queued; try again')
def test_a_full_queue_is_free_again_later(make_app):
    client = make_app(max_rows=1, max_queue=1).test_client()
    service = client.application.extensions['flatgpt']
    service.jobs.add(other := type('Job', (), {'unfinished': 2}))
    reply = send(client, {'prompt': 'a'})
    assert message_of(reply, 429).endswith('try again')
    assert reply.headers['Retry-After'] == '1'
    service.jobs.remove(other)
    assert send(client, {'prompt': 'a'}).json['choices']


@error_line('the limit of this server; lower max_tokens')
def test_a_request_over_the_time_limit_is_in_time_with_fewer_tokens(make_app):
    client = make_app(model=random_model(VOCABULARY, 4096), max_seconds=0.5).test_client()
    service = client.application.extensions['flatgpt']
    step = service.engine.step
    service.engine.step = lambda: (time.sleep(0.002), step())[1]
    body = {'prompt': 'a', 'logit_bias': GOES_ON}
    assert 'lower max_tokens' in message_of(send(client, {**body, 'max_tokens': 4000}), 504)
    service.settings['max_seconds'] = 60  # a slow machine's first token may take longer
    assert send(client, {**body, 'max_tokens': 1}).json['choices']


@error_line(
    'the engine failed; see the server log, then restart',
    'the engine has stopped; see the server log, then restart',
    'is shutting down; try again after its restart',
)
def test_what_a_server_cannot_do_any_more_it_does_after_a_restart(make_app, caplog):
    client = make_app().test_client()
    service = client.application.extensions['flatgpt']
    service.draining = True
    message_of(send(client, {'prompt': 'a'}), 503)
    service.draining = False
    service.engine.drop_cancelled = lambda: 1 / 0
    message_of(send(client, {'prompt': 'a'}), 500)
    wait_until(lambda: 'ZeroDivisionError' in caplog.text)
    message_of(send(client, {'prompt': 'a'}), 503)
    assert send(make_app().test_client(), {'prompt': 'a'}).json['choices']


@error_line('internal error; the server log has the traceback')
def test_an_internal_error_is_in_the_log(client, caplog, monkeypatch):
    caplog.set_level(logging.ERROR, 'flatgpt')
    monkeypatch.setattr(client.application.extensions['flatgpt'], 'to_ids', lambda *args: 1 / 0)
    message_of(send(client, {'prompt': 'a'}, '/tokenize'), 500)
    assert 'Traceback' in caplog.text


# -----------------------------------------------------------------------------
# who may use it


def with_flag(settings, error, number):
    """The settings with one of the flags that an error advises."""
    name, value = re.findall(r'--(\w+)=(\S+?)[,;]?(?= |$)', error)[number]
    return {**settings, name: value}


SETTINGS = {'host': '127.0.0.1', 'port': 0, 'api_key': None, 'allow_origins': None}


@pytest.mark.parametrize('number', [0, 1])
@pytest.mark.parametrize(
    ('origin', 'host'),
    [
        case('does not accept the host name', None, 'box.example:8000'),
        case('pages of {} may not use', 'https://app.example', 'localhost:8000'),
        case('pages of {} may not use', 'null', 'localhost:8000'),
    ],
)
def test_a_page_or_a_host_name_is_accepted_with_either_flag(origin, host, number):
    with pytest.raises(APIError) as caught:
        Origins(SETTINGS).check(origin, host)
    settings = with_flag(SETTINGS, str(caught.value), number)
    Origins(settings).check(origin, host)
    own = 'http://127.0.0.1:8000'  # the playground's
    Origins(settings).check(own, '127.0.0.1:8000')


def test_the_playground_may_use_its_server_whatever_other_pages_may():
    for given in ('', 'https://app.example', 'null'):
        origins = Origins({**SETTINGS, 'allow_origins': given})
        for own in ('localhost:8000', '127.0.0.1:8000', '[::1]:80'):
            origins.check(f'http://{own}', own)
        for origin, host in (
            ('http://localhost:3000', 'localhost:8000'),
            ('http://rebound.example', 'rebound.example'),
        ):
            with pytest.raises(APIError):
                origins.check(origin, host)


@error_line('is not an origin; give scheme://host')
@pytest.mark.parametrize('good', ['http://a:80', 'http://a:*', 'https://b,http://a:80', '*'])
def test_an_origin_of_the_advised_form_is_accepted(good):
    with pytest.raises(UserError):
        Origins({**SETTINGS, 'allow_origins': 'http://a/path'})
    assert Origins({**SETTINGS, 'allow_origins': good}).allows('http://a:80')


@error_line('so clients must send an API key')
@pytest.mark.parametrize('number', [0, 1, 2])
def test_other_machines_may_reach_a_server_with_a_key(monkeypatch, number):
    settings = {**SETTINGS, 'host': '0.0.0.0'}
    with pytest.raises(UserError) as caught:
        listen(settings)
    if number == 2:
        (name,) = re.findall('set ([A-Z_]+)', str(caught.value))
        monkeypatch.setenv(name, 'KEY')
    else:
        settings = with_flag(settings, str(caught.value), number)
    listen(settings).close()


@error_line('use another host or port')
def test_another_port_or_host_can_be_listened_at():
    with listen(SETTINGS) as taken:
        settings = {**SETTINGS, 'port': taken.getsockname()[1]}
        with pytest.raises(UserError, match='--port=0') as caught:
            listen(settings)
        (port,) = re.findall(r'--port=(\d+): any', str(caught.value))
        listen({**settings, 'port': int(port)}).close()


# -----------------------------------------------------------------------------
# start


@pytest.mark.parametrize(
    'bad',
    [
        case('the WSGI server sets its address; omit it', {'port': 8000}),
        case('the model is already loaded; omit it', {'quantize': 'int8'}),
    ],
)
def test_an_application_is_made_without_what_it_cannot_use(make_app, bad):
    with pytest.raises(UserError):
        make_app(**bad)
    assert send(make_app().test_client(), {'prompt': 'a'}).json['choices']


@error_line('computes tokens one by one; omit one')
def test_a_deterministic_server_has_no_draft_model(make_app):
    with pytest.raises(UserError):
        make_app(draft='out/small', deterministic=True)
    assert send(make_app(deterministic=True).test_client(), {'prompt': 'a'}).json['choices']


@error_line('the cache does not fit in memory; try')
def test_fewer_slots_fit_into_memory(tmp_path, monkeypatch):
    class SmallEngine(api.Engine):
        def __init__(self, model, tokenizer, rows, *args, **options):
            if rows > 2 or model.int8 is False:
                raise MemoryError
            super().__init__(model, tokenizer, rows, *args, **options)

    monkeypatch.setattr(api, 'Engine', SmallEngine)
    model = random_model(VOCABULARY, SIZE)
    model.int8 = True
    settings = {'device': 'cpu', 'deterministic': False, 'chunk': 8, 'max_rows': 8}
    settings |= {'adapters': None, 'name': None, 'draft': None}
    for expected in (4, 2):
        with pytest.raises(UserError) as caught:
            api.build_engine((model, byte_tokenizer()), settings)
        (rows,) = re.findall(r'--max_rows=(\d+)$', str(caught.value))
        assert int(rows) == expected
        settings['max_rows'] = int(rows)
    assert len(api.build_engine((model, byte_tokenizer()), settings).slots) == 2
    model.int8, settings['max_rows'] = False, 1
    with pytest.raises(UserError) as caught:
        api.build_engine((model, byte_tokenizer()), settings)
    (kind,) = re.findall('--quantize=(\\w+),', str(caught.value))
    saved(tmp_path / 'run', byte_tokenizer())
    monkeypatch.undo()
    app = api.create_app(out_dir=str(tmp_path / 'run'), device='cpu', quantize=kind, max_rows=1)
    try:
        assert send(app.test_client(), {'prompt': 'a', 'max_tokens': 1}).json['choices']
    finally:
        app.extensions['flatgpt'].close()
