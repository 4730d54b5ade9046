"""Structured output over HTTP: response_format, and the fields of vLLM."""

import json
import sys
from typing import Literal

import pytest
from conftest import random_model
from error_lines import case, error_line
from pydantic import BaseModel
from server import PATH, VOCABULARY, served

from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer

jsonschema = pytest.importorskip('jsonschema', reason='jsonschema is not installed')
pytest.importorskip('llguidance', reason='llguidance is not installed')
pytest_plugins = ['server']
CHAT = '/v1/chat/completions'
TALK = {'messages': [{'role': 'user', 'content': 'hi'}]}
POINT = {
    'type': 'object',
    'properties': {'x': {'type': 'integer', 'minimum': 0, 'maximum': 99}, 'on': {'enum': ['a']}},
    'required': ['x', 'on'],
    'additionalProperties': False,
}
FORMAT = {'type': 'json_schema', 'json_schema': {'name': 'point', 'strict': True, 'schema': POINT}}
WAYS = [
    {'response_format': FORMAT},
    {'guided_json': POINT},
    {'guided_json': json.dumps(POINT)},
    {'structured_outputs': {'json': POINT}},
]


@pytest.fixture
def client(make_app):
    """A client of a model with a chat template, whose turns end at a new line."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {'user': ['U:', '\n'], 'assistant': ['A:', '\n']}
    return make_app(tokenizer, random_model(VOCABULARY, 512), name='tiny').test_client()


def ask(client, status=200, path=PATH, **body):
    given = TALK if path == CHAT else {'prompt': 'a'}
    reply = client.post(path, json={'max_tokens': 200, 'seed': 1, **given, **body})
    assert reply.status_code == status, reply.text
    return reply.json


def texts(client, path=PATH, **body):
    choices = ask(client, 200, path, **body)['choices']
    assert {choice['finish_reason'] for choice in choices} == {'stop'}
    return [choice['message']['content'] if path == CHAT else choice['text'] for choice in choices]


@pytest.mark.parametrize('way', WAYS, ids=str)
@pytest.mark.parametrize('path', [PATH, CHAT])
def test_all_completions_of_a_request_follow_its_schema(client, path, way):
    found = texts(client, path, n=4, **way)
    assert len({*found}) > 1
    for text in found:
        jsonschema.validate(json.loads(text), POINT)


@pytest.mark.parametrize('path', [PATH, CHAT])
def test_a_stream_has_the_text_of_a_whole_response(client, path):
    given = TALK if path == CHAT else {'prompt': 'a'}
    body = {'max_tokens': 200, 'seed': 1, 'n': 2, 'response_format': FORMAT, **given}
    with client.post(path, json={**body, 'stream': True}, buffered=True) as reply:
        events = [json.loads(each[6:]) for each in reply.text.split('\n\n')[:-2]]
    streamed = ['', '']
    for choice in (event['choices'][0] for event in events):
        part = choice['delta'].get('content', '') if path == CHAT else choice['text']
        streamed[choice['index']] += part
    assert streamed == texts(client, path, n=2, response_format=FORMAT)


@pytest.mark.parametrize(
    ('field', 'value', 'allowed'),
    [
        ('response_format', {'type': 'json_schema', 'json_schema': {'schema': {'const': 1}}}, '1'),
        ('guided_regex', '[ab]c', 'ac bc'),
        ('guided_choice', ['yes', 'no'], 'yes no'),
        ('guided_grammar', 'start: "a" | "b"', 'a b'),
        ('structured_outputs', {'regex': 'ab?'}, 'a ab'),
        ('structured_outputs', {'choice': ['yes', 'no']}, 'yes no'),
        ('structured_outputs', {'grammar': 'root ::= "c" | "d"'}, 'c d'),
    ],
)
def test_every_field_with_a_grammar_is_followed(client, field, value, allowed):
    assert {*texts(client, n=8, **{field: value})} <= {*allowed.split()}


@pytest.mark.parametrize('field', ['response_format', 'structured_outputs'])
def test_a_json_object_has_any_names(client, field):
    value = {'type': 'json_object'} if field == 'response_format' else {'json_object': True}
    answers = ask(client, n=8, **{field: value})['choices']
    ended = [answer['text'] for answer in answers if answer['finish_reason'] == 'stop']
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)


def test_text_and_null_ask_for_no_grammar(client):
    for given in ({'type': 'text'}, None):
        body = {'response_format': given, 'guided_json': None, 'structured_outputs': {}}
        assert ask(client, **body)['choices'] == ask(client)['choices']


def test_a_completion_that_is_cut_off_has_the_reason_length(client):
    (choice,) = ask(client, max_tokens=2, response_format=FORMAT)['choices']
    assert choice['finish_reason'] == 'length'


def test_log_probabilities_are_those_of_the_model(client):
    (choice,) = ask(client, guided_choice=['a'], logprobs=0)['choices']
    (free,) = ask(client, logit_bias={'97': 100}, max_tokens=1, logprobs=0)['choices']
    scores = choice['logprobs']['token_logprobs']
    assert scores == pytest.approx(free['logprobs']['token_logprobs'])


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('{}; change the {}', {'guided_json': {'not': {}}}, {'guided_json': {}}),
        case('{}; correct the {}', {'guided_json': '{'}, {'guided_json': '{}'}),
        case(
            'a completion has one grammar; give only one',
            {'guided_regex': 'a', 'response_format': FORMAT},
            {'guided_regex': 'a'},
        ),
        case(
            'needs "type": "json_schema"',
            {'response_format': {'type': 'json_object', 'json_schema': {}}},
            {'response_format': {'type': 'json_object'}},
        ),
    ],
)
def test_the_advice_for_a_grammar_is_right(client, bad, good):
    error = ask(client, 400, **bad)['error']
    assert error['param'] in bad
    assert error['message'].startswith(error['param'])
    assert ask(client, **good)['choices']


@pytest.mark.parametrize(
    ('body', 'says'),
    [
        ({'response_format': {'type': 'xml'}}, "response_format.type: must be 'text', 'json_o"),
        ({'response_format': {}}, 'response_format.type: is missing'),
        ({'response_format': 'json'}, 'response_format: must be an object'),
        ({'response_format': {'type': 'text', 'x': 1}}, 'response_format.x: no such field'),
        ({'structured_outputs': {'structural_tag': {}}}, 'structural_tag: no such field'),
        ({'guided_choice': []}, 'guided_choice: is empty'),
        ({'guided_choice': 'a'}, 'guided_choice: must be a list, not "a"'),
        ({'guided_regex': 'a('}, 'guided_regex: unclosed group'),
        ({'guided_json': {'uniqueItems': True, 'type': 'array'}}, 'uniqueItems'),
    ],
    ids=str,
)
def test_a_format_that_is_not_understood_is_400_with_its_name(client, body, says):
    assert says in ask(client, 400, **body)['error']['message']


def test_a_vocabulary_without_the_characters_of_json_is_400(make_app):
    client = make_app(char_tokenizer('abc{"', eot=True), random_model(6, 64)).test_client()
    for way in ({'response_format': FORMAT}, {'guided_regex': '(a|b)}'}):
        error = ask(client, 400, max_tokens=20, **way)['error']
        assert 'no token of this vocabulary' in error['message']
    reply = client.post(PATH, json={'prompt': 'a', 'guided_regex': '(a|b)}', 'stream': True})
    assert 'no token of this vocabulary' in reply.text
    assert ask(client, guided_regex='(a|b)c', max_tokens=9)['choices']  # the engine continues


@error_line('this needs the package')
def test_without_the_package_a_request_for_json_says_how_to_get_it(client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'llguidance', None)
        error = ask(client, 400, response_format=FORMAT)['error']
        assert error['message'].startswith('response_format: this needs the package llguidance')
        assert ask(client)['choices']
    assert ask(client, response_format=FORMAT)['choices']


def test_openai_parses_a_completion_into_a_model(client):
    openai = pytest.importorskip('openai', reason='openai is not installed')

    class Point(BaseModel):
        on: bool
        color: Literal['red', 'green'] | None

    with served(client.application) as port:
        remote = openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='none')
        completion = remote.chat.completions.parse(
            model='tiny', messages=TALK['messages'], response_format=Point, seed=3
        )
    assert isinstance(completion.choices[0].message.parsed, Point)
