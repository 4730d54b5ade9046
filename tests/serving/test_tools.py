"""Chats with tools: what is called, and how it is reported."""

import json

import pytest
from conftest import random_model
from error_lines import case
from server import VOCABULARY, served

from flatgpt.data.tokenizer import byte_tokenizer

jsonschema = pytest.importorskip('jsonschema', reason='jsonschema is not installed')
pytest.importorskip('llguidance', reason='llguidance is not installed')
pytest_plugins = ['server']
CHAT = '/v1/chat/completions'
ARGUMENTS = {
    'type': 'object',
    'properties': {'zone': {'enum': ['UTC', 'é']}, 'n': {'type': 'integer', 'maximum': 99}},
    'required': ['zone', 'n'],
    'additionalProperties': False,
}
EMPTY = {'type': 'object', 'properties': {}, 'additionalProperties': False}


def tool(name, parameters):
    return {'type': 'function', 'function': {'name': name, 'parameters': parameters}}


TOOLS = [tool('time', ARGUMENTS), tool('stop', EMPTY)]
SCHEMAS = {'time': ARGUMENTS, 'stop': EMPTY}
NAMED = {'type': 'function', 'function': {'name': 'time'}}
MESSAGES = [{'role': 'user', 'content': 'When?'}]
USED = {'type': 'function', 'function': {'name': 'time', 'arguments': '{"n": 1}'}}
CALL = '<tool_call>{"name": "time", "arguments": {"zone": "UTC", "n": 1}}</tool_call>'


@pytest.fixture
def app(make_app):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {'user': ['U:', '\n'], 'assistant': ['A:', '\n']}
    return make_app(tokenizer, random_model(VOCABULARY, 2048), name='tiny')


@pytest.fixture
def client(app):
    return app.test_client()


def ask(client, status=200, **body):
    given = {'messages': MESSAGES, 'tools': TOOLS, 'max_tokens': 300, 'seed': 1}
    reply = client.post(CHAT, json={**given, **body})
    assert reply.status_code == status, reply.text
    return reply.json


def calls_of(choice):
    """The names and arguments of a choice's calls."""
    assert choice['finish_reason'] == 'tool_calls'
    assert choice['message']['content'] is None
    calls = choice['message']['tool_calls']
    assert len({call['id'] for call in calls}) == len(calls)
    return [(c['function']['name'], json.loads(c['function']['arguments'])) for c in calls]


def written(client, text, **body):
    """The choice for a text that the engine is made to write."""
    service = client.application.extensions['flatgpt']
    service.engine.runner.sample_requests = lambda requests, *_: [
        [*text.encode(), 256][len(request.output_ids)] for request in requests
    ]
    return ask(client, **body)['choices'][0]


@pytest.mark.parametrize('choice', ['required', NAMED], ids=str)
def test_calls_that_are_required_follow_their_schema(client, choice):
    reply = ask(client, n=6, tool_choice=choice, parallel_tool_calls=False)
    found = [calls_of(each) for each in reply['choices']]
    assert all(len(calls) == 1 for calls in found)
    for ((name, arguments),) in found:
        jsonschema.validate(arguments, SCHEMAS[name])
    names = {name for ((name, _),) in found}
    assert names <= ({'time'} if choice == NAMED else {'time', 'stop'})


def test_there_may_be_several_calls(client):
    bias = {str(ord('<')): 30, '256': -30}  # another call is likelier than the end
    reply = ask(client, tool_choice='required', logit_bias=bias, max_tokens=400)
    (choice,) = reply['choices']
    assert choice['finish_reason'] == 'length'
    calls = choice['message']['tool_calls']
    assert len(calls) > 2
    for call in calls[:-1]:
        function = call['function']
        jsonschema.validate(json.loads(function['arguments']), SCHEMAS[function['name']])


def test_a_model_may_write_text_calls_or_both(client):
    choice = written(client, 'No.')
    assert (choice['message'], choice['finish_reason']) == (
        {'role': 'assistant', 'content': 'No.'},
        'stop',
    )
    assert calls_of(written(client, CALL)) == [('time', {'zone': 'UTC', 'n': 1})]
    choice = written(client, 'So: ' + CALL)
    assert choice['message']['content'] == 'So: '
    assert len(choice['message']['tool_calls']) == 1


def test_text_that_begins_a_call_becomes_a_call_of_the_schema(client):
    bias = {str(byte): -100 for byte in range(256)}  # whatever is allowed is equally unlikely
    service = client.application.extensions['flatgpt']
    sample, begin = service.engine.runner.sample_requests, b'Hm <tool_call>'

    def begun(requests, logits, guessed):
        tokens = sample(requests, logits)
        at = len(requests[0].output_ids)
        return [begin[at]] if at < len(begin) else tokens

    service.engine.runner.sample_requests = begun
    (choice,) = ask(client, logit_bias=bias | {'256': 100})['choices']
    assert choice['message']['content'] == 'Hm '
    (call,) = choice['message']['tool_calls']
    jsonschema.validate(
        json.loads(call['function']['arguments']), SCHEMAS[call['function']['name']]
    )


def test_with_the_choice_none_nothing_is_called(client):
    choice = written(client, CALL, tool_choice='none')
    assert choice['message']['content'] == CALL
    assert choice['finish_reason'] == 'stop'


def test_a_stream_has_the_calls_of_a_whole_response(client):
    body = {'messages': MESSAGES, 'tools': TOOLS, 'max_tokens': 300, 'seed': 1, 'n': 3}
    body |= {'tool_choice': 'required', 'parallel_tool_calls': False}
    whole = client.post(CHAT, json=body).json['choices']
    with client.post(CHAT, json={**body, 'stream': True}, buffered=True) as reply:
        events = [json.loads(each[6:])['choices'][0] for each in reply.text.split('\n\n')[:-2]]
    for choice in whole:
        own = [event for event in events if event['index'] == choice['index']]
        (call,) = [c for event in own for c in event['delta'].get('tool_calls', ())]
        assert call['index'] == 0
        assert call['function'] == choice['message']['tool_calls'][0]['function']
        assert not any(event['delta'].get('content') for event in own)
        assert own[0]['delta']['role'] == 'assistant'
        assert own[-1]['finish_reason'] == 'tool_calls'


def test_calls_and_results_are_in_the_prompt(client, app):
    talk = [
        *MESSAGES,
        {'role': 'assistant', 'content': None, 'tool_calls': [{'id': 'a', **USED}]},
        {'role': 'tool', 'tool_call_id': 'a', 'content': [{'type': 'text', 'text': '12'}]},
    ]
    prompts, submit = [], app.extensions['flatgpt'].submit
    app.extensions['flatgpt'].submit = lambda body, *args: (
        prompts.append(body) or submit(body, *args)
    )
    ask(client, messages=talk, max_tokens=1)
    text = byte_tokenizer().decode(prompts[0].prompt)
    assert '"name": "time"' in text
    assert 'A:<tool_call>{"name": "time", "arguments": {"n": 1}}</tool_call>\n' in text
    assert 'U:<tool_response>12</tool_response>\nA:' in text


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('there is no tool {}; add', {'tool_choice': NAMED, 'tools': TOOLS[1:]}, {}),
        case('needs "tools" as well', {'tool_choice': 'required', 'tools': None}, {}),
        case(
            'a completion has one grammar; give only one',
            {'guided_regex': 'a'},
            {'guided_regex': None},
        ),
        case('{}; change the {}', {'tools': [tool('f', {'not': {}})]}, {'tools': TOOLS}),
        case('text like {}', {'tools': [tool('a b', {})]}, {'tools': [tool('a-b', {})]}),
    ],
)
def test_the_advice_for_tools_is_right(client, bad, good):
    ask(client, 400, **bad)
    ask(client, max_tokens=1, **{**bad, 'tools': TOOLS, **good})


@pytest.mark.parametrize(
    ('body', 'says'),
    [
        ({'tools': [{'type': 'custom'}]}, "tools[0].type: must be 'function'"),
        ({'tools': [{'type': 'function'}]}, 'tools[0].function: is missing'),
        ({'tools': [tool('a b', {})]}, 'tools[0].function.name'),
        ({'tool_choice': 'any'}, 'tool_choice'),
        ({'functions': [{'name': 'f'}]}, 'functions: this server does not support it'),
        ({'messages': [{'role': 'assistant', 'content': None}]}, 'content: is missing'),
        ({'messages': [{**MESSAGES[0], 'tool_calls': [USED]}]}, 'of the assistant'),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_not_understood_is_400(client, body, says):
    assert says in ask(client, 400, **body)['error']['message']


def test_completions_have_no_tools(client):
    reply = client.post('/v1/completions', json={'prompt': 'a', 'tools': TOOLS})
    assert reply.status_code == 400
    assert reply.json['error']['param'] == 'tools'


def test_openai_reads_the_calls(app):
    openai = pytest.importorskip('openai', reason='openai is not installed')
    given = {'model': 'tiny', 'messages': MESSAGES, 'tools': TOOLS, 'tool_choice': NAMED, 'seed': 1}
    with served(app) as port:
        client = openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='none')
        (call,) = client.chat.completions.create(**given).choices[0].message.tool_calls
        with client.chat.completions.stream(**given) as stream:
            (same,) = stream.get_final_completion().choices[0].message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), ARGUMENTS)
    assert (same.function.name, same.function.arguments) == ('time', call.function.arguments)
