"""The server: requests and responses, access control, and recovery from failures."""

import contextlib
import http.client
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import random_model, saved
from server import (
    GOES_ON,
    PATH,
    SCRIPT,
    SIZE,
    VOCABULARY,
    connect,
    figures,
    free_again,
    in_background,
    listening,
    post,
    served,
    serving,
    started,
    wait_until,
    write,
)
from werkzeug.test import Client

import api
from configurator import configure, help_text
from flatgpt.data.tokenizer import EOT, Tokenizer, byte_tokenizer, char_tokenizer
from flatgpt.errors import ConfigError, UserError
from flatgpt.inference.engine import NOT_FINITE, generate
from flatgpt.inference.request import Request, TokenOutput
from flatgpt.inference.sampling import SamplingParams
from flatgpt.serving import schema, unsupported
from flatgpt.serving.api_error import APIError
from flatgpt.serving.choices import ChatBuilder, ChoiceBuilder
from flatgpt.serving.http_server import JsonLines, Server, StartupApp, listen, wait_until_drained
from flatgpt.serving.origins import Origins

pytest_plugins = ['server']
CHAT = '/v1/chat/completions'
TALK = [
    {'role': 'system', 'content': 'be kind'},
    {'role': 'user', 'content': 'hi <|end|>'},  # spelt, which is not the token
]


@pytest.fixture
def app(make_app):
    return make_app(name='tiny')


@pytest.fixture
def client(app):
    return app.test_client()


def service_of(client):
    return client.application.extensions['flatgpt']


def ask(client, status=200, path=PATH, **body):
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.text
    return reply.json


def ask_texts(client, **body):
    return [choice['text'] for choice in ask(client, **body)['choices']]


def stream(client, **body):
    """The events of a streamed answer, without the last one, which only ends it."""
    with client.post(PATH, json={**body, 'stream': True}, buffered=True) as reply:
        assert reply.status_code == 200, reply.text
        return events_of(reply.text)


def events_of(text):
    *events, end, rest = text.split('\n\n')
    assert (end, rest) == ('data: [DONE]', '')
    assert all(event.startswith('data: ') for event in events)
    return [json.loads(event.removeprefix('data: ')) for event in events]


def joined(events):
    """The choices of a whole answer, put together from those of its events."""
    choices = {}
    for event in events:
        for choice in event['choices']:
            whole = choices.setdefault(choice['index'], {**choice, 'text': '', 'logprobs': None})
            assert whole['finish_reason'] is None or not whole['text']
            whole['text'] += choice['text']
            whole['finish_reason'] = choice['finish_reason']
            if choice['logprobs']:
                kept = whole['logprobs'] or {key: [] for key in choice['logprobs']}
                whole['logprobs'] = {k: kept[k] + choice['logprobs'][k] for k in kept}
    return [choices[index] for index in sorted(choices)]


@contextlib.contextmanager
def held(service):
    """Keep the engine from computing anything, for as long as this lasts."""
    step, go = service.engine.step, threading.Event()

    def wait_and_step():
        go.wait(30)
        return step()

    service.engine.step = wait_and_step
    try:
        yield
    finally:
        service.engine.step = step
        go.set()


# -----------------------------------------------------------------------------
# completions


def alone(model, prompt, **choice):
    """What the engine makes of a text by itself."""
    tokenizer = byte_tokenizer()
    pieces = generate(model, tokenizer, [tokenizer.encode(prompt)], SamplingParams(**choice))
    return ''.join(piece.text for piece in pieces)


def test_a_completion_is_what_the_engine_writes(client, model):
    reply = client.post(PATH, json={'prompt': 'To be', 'max_tokens': 9, 'temperature': 0})
    assert reply.status_code == 200
    assert reply.content_type == 'application/json'
    body = reply.json
    assert body.pop('id') == f'cmpl-{reply.headers["X-Request-Id"]}'
    assert abs(body.pop('created') - time.time()) < 60
    text = alone(model, 'To be', max_new_tokens=9, temperature=0)
    choice = {'index': 0, 'text': text, 'logprobs': None, 'finish_reason': 'length'}
    assert body == {
        'object': 'text_completion',
        'model': 'tiny',
        'choices': [choice],
        'usage': {'prompt_tokens': 5, 'completion_tokens': 9, 'total_tokens': 14},
    }


@pytest.mark.parametrize('prompt', ['ab', ['ab'], [97, 98], [[97, 98]]])
def test_a_prompt_is_a_string_or_ids_or_a_list_of_either(client, prompt):
    given = {'temperature': 0, 'max_tokens': 5}
    assert ask_texts(client, prompt=prompt, **given) == ask_texts(client, prompt='ab', **given)


def test_several_prompts_and_n_give_completions_in_order(client):
    given = {'seed': 3, 'max_tokens': 6}
    body = ask(client, prompt=['ab', 'cde'], n=3, **given)
    assert [choice['index'] for choice in body['choices']] == [0, 1, 2, 3, 4, 5]
    texts = [choice['text'] for choice in body['choices']]
    assert len({*texts}) == 6
    assert texts[:3] == ask_texts(client, prompt='ab', n=3, **given)
    assert texts[3] == ask_texts(client, prompt='cde', **given)[0]
    assert body['usage'] == {'prompt_tokens': 5, 'completion_tokens': 36, 'total_tokens': 41}


@pytest.mark.parametrize('exact', ['float32', 'deterministic'])
def test_a_seed_gives_the_same_completion_alone_and_under_load(make_app, exact):
    half = random_model(VOCABULARY, SIZE).bfloat16()
    choice = {} if exact == 'float32' else {'deterministic': True, 'model': half}
    client = make_app(**choice).test_client()
    given = {'prompt': 'abc', 'seed': 11, 'max_tokens': 30, 'temperature': 1.5, 'top_p': 0.9}
    text = ask_texts(client, **given)
    others = [
        in_background(ask_texts, client, prompt=['x' * i, 'y'], n=3, max_tokens=40, top_k=5)
        for i in range(1, 8)
    ]
    assert ask_texts(client, **given) == text
    for other in others:
        other()
    assert ask_texts(client, **{**given, 'seed': 12}) != text


def test_without_a_seed_every_completion_is_different(client):
    assert len({ask_texts(client, prompt='ab', logit_bias=GOES_ON)[0] for _ in range(5)}) == 5


def test_staggered_greedy_requests_get_what_each_gets_alone(client, model):
    prompts = ['abcdefgh'[: 1 + i % 8] + 'xyz'[i % 3] for i in range(24)]
    given = {'max_tokens': 20, 'temperature': 0}
    texts = [in_background(ask_texts, client, prompt=prompt, **given) for prompt in prompts]
    for prompt, text in zip(prompts, texts, strict=True):
        assert text() == [alone(model, prompt, max_new_tokens=20, temperature=0)]


def test_null_is_the_same_as_an_omitted_field(client):
    names = [name for name in schema.CompletionRequest.model_fields if name != 'prompt']
    nulls = dict.fromkeys(names) | {'seed': 5}
    assert ask_texts(client, prompt='ab', **nulls) == ask_texts(client, prompt='ab', seed=5)


def test_sixteen_tokens_are_the_default_and_harmless_fields_are_ignored(client):
    harmless = {'user': 'me', 'metadata': {'a': 'b'}, 'service_tier': 'flex', 'best_of': 1}
    body = ask(client, prompt='ab', model='another', logit_bias=GOES_ON, **harmless)
    assert body['usage']['completion_tokens'] == 16
    assert body['model'] == 'tiny'


def test_minus_one_means_no_seed_and_other_negative_numbers_are_seeds(client):
    given = {'prompt': 'ab', 'logit_bias': GOES_ON}
    assert len({ask_texts(client, **given, seed=-1)[0] for _ in range(4)}) == 4
    assert ask_texts(client, **given, seed=-2) == ask_texts(client, **given, seed=-2)
    assert ask_texts(client, **given, seed=-2) != ask_texts(client, **given, seed=-3)


@pytest.mark.parametrize(
    'choice',
    [
        {'temperature': 0},
        {'top_k': 1},
        {'top_k': -1, 'min_p': 0.3, 'temperature': 2},
        {'repetition_penalty': 1.5, 'frequency_penalty': 0.5, 'presence_penalty': 0.5},
        {'logit_bias': {'97': 30.0}},
    ],
    ids=str,
)
def test_sampling_parameters_reach_the_engine(client, model, choice):
    bias = tuple((int(token), value) for token, value in choice.get('logit_bias', {}).items())
    same = {**choice, 'logit_bias': bias, 'seed': 5, 'top_k': max(0, choice.get('top_k', 0))}
    text = alone(model, 'abc', max_new_tokens=10, **same)
    assert ask_texts(client, prompt='abc', max_tokens=10, seed=5, **choice) == [text]


@pytest.mark.parametrize('extreme', [1, -1])
def test_the_engine_survives_the_limits_of_every_range(client, extreme):
    choice = {
        'temperature': 1e6 if extreme > 0 else 0,
        'top_p': 1 if extreme > 0 else 5e-324,
        'top_k': 2**31 if extreme > 0 else -1,
        'min_p': 1 if extreme > 0 else 0,
        'repetition_penalty': 100 if extreme > 0 else 0.01,
        'frequency_penalty': 100 * extreme,
        'presence_penalty': 100 * extreme,
        'logit_bias': {str(i): 100 * extreme for i in range(VOCABULARY)},
        'seed': 2**63 - 1 if extreme > 0 else -(2**63),
        'logprobs': 20,
        'n': 2,
    }
    ask(client, prompt='ab', max_tokens=30, echo=True, **choice)
    ask(client, prompt='ab', max_tokens=30, **{**choice, 'temperature': 1})
    assert client.get('/ready').status_code == 200


def test_the_end_of_text_token_ends_a_completion_and_is_encoded_in_a_prompt(client):
    body = ask(client, prompt='ab', logit_bias={'256': 100}, logprobs=1)
    choice = body['choices'][0]
    assert (choice['text'], choice['finish_reason']) == ('', 'stop')
    assert choice['logprobs']['tokens'] == [EOT]
    assert body['usage']['completion_tokens'] == 1
    assert ask(client, prompt=f'a{EOT}b')['usage']['prompt_tokens'] == 3


@pytest.mark.parametrize(
    ('stop', 'text', 'finish'),
    [
        ('STOP', 'one S', 'stop'),
        (['never', 'SSTOP', 'ne S'], 'o', 'stop'),
        (['wo é🎉', 'x'], 'one SSTOP t', 'stop'),
        ('é🎉 ', 'one SSTOP two é🎉', 'length'),
        ([], 'one SSTOP two é🎉', 'length'),
    ],
)
def test_stop_strings_may_span_several_tokens(client, stop, text, finish):
    script = 'one SSTOP two é🎉'.encode()
    write(service_of(client), script)
    given = {'prompt': 'a', 'max_tokens': len(script), 'stop': stop}
    choice = ask(client, **given)['choices'][0]
    assert (choice['text'], choice['finish_reason']) == (text, finish)
    assert joined(stream(client, **given)) == [choice]


def test_a_stream_never_splits_characters_of_several_bytes(client, monkeypatch):
    script = 'é🎉ы中👩‍🚀'.encode()
    write(service_of(client), script)
    monkeypatch.setattr('flatgpt.serving.job.EVENT_INTERVAL', 0)
    engine = service_of(client).engine
    step = engine.step
    engine.step = lambda: (time.sleep(0.002), step())[1]
    events = stream(client, prompt='a', max_tokens=len(script))
    texts = [choice['text'] for event in events for choice in event['choices']]
    assert len(texts) > 5
    assert ''.join(texts) == script.decode()


# -----------------------------------------------------------------------------
# streams


def test_a_stream_has_events_a_usage_and_an_end(client):
    reply = client.post(
        PATH,
        json={
            'prompt': 'ab',
            'stream': True,
            'stream_options': {'include_usage': True},
            'logit_bias': GOES_ON,
        },
        buffered=True,
    )
    assert reply.content_type == 'text/event-stream; charset=utf-8'
    assert reply.headers['Cache-Control'] == 'no-cache'
    assert reply.headers['X-Accel-Buffering'] == 'no'
    assert 'Connection' not in reply.headers
    *events, last = events_of(reply.text)
    assert last['choices'] == []
    assert last['usage'] == {'prompt_tokens': 2, 'completion_tokens': 16, 'total_tokens': 18}
    assert all(event['usage'] is None for event in events)
    assert [f['choices'][0]['finish_reason'] for f in events] == [None] * (len(events) - 1) + [
        'length'
    ]
    assert len({event['id'] for event in [*events, last]}) == 1
    for event in [*events, last]:
        schema.CompletionResponse.model_validate(event)


@pytest.mark.parametrize(
    'given',
    [
        {},
        {'logprobs': 2},
        {'echo': True},
        {'echo': True, 'logprobs': 0, 'n': 2},
        {'echo': True, 'logprobs': 3, 'max_tokens': 0},
        {'prompt': ['ab', 'c', 'déf'], 'n': 2, 'logprobs': 1},
        {'logit_bias': {'256': 5}, 'n': 4},
    ],
    ids=str,
)
def test_a_stream_has_the_same_choices_as_a_whole_response(client, given):
    given = {'prompt': 'abc', 'seed': 4, 'max_tokens': 24, **given}
    assert joined(stream(client, **given)) == ask(client, **given)['choices']


def test_the_first_token_is_sent_at_once_and_others_in_batches(client):
    engine, steps = service_of(client).engine, threading.Semaphore(1)
    step = engine.step
    engine.step = lambda: (steps.acquire(), step())[1]
    given = {'prompt': 'ab', 'max_tokens': 60, 'logit_bias': GOES_ON, 'logprobs': 0}
    reply = client.post(PATH, json={**given, 'stream': True})
    first = next(reply.response)  # one step, of the prompt and perhaps of a token after it
    steps.release(1000)
    events = events_of((first + b''.join(reply.response)).decode())
    reply.close()
    lengths = [len(event['choices'][0]['logprobs']['tokens']) for event in events]
    assert lengths[0] in (1, 2)
    assert sum(lengths) == 60
    assert len(lengths) < 30


# -----------------------------------------------------------------------------
# log-probabilities


def test_echo_with_logprobs_scores_prompt_and_completion(client, model):
    given = {'prompt': [1, 2, 3, 4], 'max_tokens': 3, 'temperature': 0, 'echo': True, 'logprobs': 2}
    choice = ask(client, **given)['choices'][0]
    scores = choice['logprobs']
    assert {name: len(values) for name, values in scores.items()} == dict.fromkeys(scores, 7)
    assert scores['token_logprobs'][0] is scores['top_logprobs'][0] is None
    assert scores['text_offset'][:5] == [0, 1, 2, 3, 4]
    greedy = generate(model, byte_tokenizer(), [[1, 2, 3, 4]], SamplingParams(3, temperature=0))
    ids = [1, 2, 3, 4, *(piece.token for piece in greedy)]
    assert scores['tokens'] == [byte_tokenizer().decode([i]) for i in ids]
    expected = model(torch.tensor([ids]))[0][0].log_softmax(-1)
    for i in range(1, 7):
        likeliest, own = scores['top_logprobs'][i], scores['token_logprobs'][i]
        assert own == pytest.approx(expected[i - 1, ids[i]].item(), abs=1e-5)
        assert own <= likeliest[scores['tokens'][i]]
        assert max(likeliest.values()) == pytest.approx(expected[i - 1].max().item(), abs=1e-5)
        # as lm-evaluation-harness asks whether a token was the likeliest
        assert (own == max(likeliest.values())) == (ids[i] == expected[i - 1].argmax())


def test_a_prompt_can_be_scored_without_generating(client):
    body = ask(client, prompt=['abc', 'defg'], max_tokens=0, echo=True, logprobs=0)
    assert [choice['text'] for choice in body['choices']] == ['abc', 'defg']
    assert [len(c['logprobs']['tokens']) for c in body['choices']] == [3, 4]
    assert body['choices'][0]['finish_reason'] == 'length'
    assert body['usage'] == {'prompt_tokens': 7, 'completion_tokens': 0, 'total_tokens': 7}


def test_tokens_with_the_same_text_have_unique_keys_and_infinity_is_a_number():
    request, plain = Request([97], SamplingParams(), print, top_logprobs=3), byte_tokenizer()
    tokens = [*plain.token_bytes, 'é'.encode(), b'a', '\ufffd'.encode(), None]
    tokenizer = Tokenizer('byte', 'byte', tokens, plain.special)
    double, rare, nothing, beyond = 258, 259, 260, 261  # reads as 97; U+FFFD itself; no text
    top = ((0xE9, -1.0), (0xEA, -3.0), (97, -5.0), (double, -6.0))
    odd = ((rare, -1.0), (nothing, -2.0), (beyond, -3.0))
    pieces = [
        TokenOutput(0, 0xEA, '', None, -3.0, top),
        TokenOutput(0, 0xE9, '', None, -4.0, odd),
        TokenOutput(0, 98, 'b', 'length', -math.inf, ()),
    ]
    scores = ChoiceBuilder(request, tokenizer, False).choice(pieces)['logprobs']
    assert scores['tokens'] == ['\ufffd', '\ufffd', 'b']
    assert scores['token_logprobs'] == [-3.0, -4.0, -9999.0]
    assert scores['top_logprobs'] == [
        {'bytes:\\xe9': -1.0, '\ufffd': -3.0, 'a': -5.0, 'token_id:258': -6.0},
        {'token_id:259': -1.0, 'token_id:260': -2.0, 'token_id:261': -3.0, '\ufffd': -4.0},
        {'b': -9999.0},
    ]
    chat = ChatBuilder('message', request, tokenizer, False).choice(pieces)['logprobs']['content']
    assert [score['bytes'] for score in chat] == [[0xEA], [0xE9], [98]]
    assert [each['bytes'] for each in chat[0]['top_logprobs']] == [[0xE9], [0xEA], [97], [97]]
    assert [each['bytes'] for each in chat[1]['top_logprobs']] == [[239, 191, 189], None, None]
    assert chat[2]['logprob'] == -9999.0


# -----------------------------------------------------------------------------
# invalid requests


@pytest.mark.parametrize(
    ('body', 'param', 'says'),
    [
        ({}, 'prompt', 'is missing; add it'),
        ({'prompt': None}, 'prompt', 'must be a string'),
        ({'prompt': ''}, 'prompt', 'empty'),
        ({'prompt': []}, 'prompt', 'empty'),
        ({'prompt': [[]]}, 'prompt', 'empty'),
        ({'prompt': ['a', '']}, 'prompt', 'empty'),
        ({'prompt': ['a', 1]}, 'prompt', 'must be'),
        ({'prompt': [1, [2]]}, 'prompt', 'must be'),
        ({'prompt': [True]}, 'prompt', 'must be'),
        ({'prompt': [1.0]}, 'prompt', 'must be'),
        ({'prompt': [-1]}, 'prompt', 'must be'),
        ({'prompt': {'a': 1}}, 'prompt', 'must be'),
        ({'prompt': [257]}, 'prompt', '257 is not a token id; use 0 to 256'),
        ({'prompt': [[1], [2**40]]}, 'prompt', 'must be'),
        ({'prompt': 'a' * 60, 'max_tokens': 5}, 'max_tokens', '60 tokens, and max_tokens=5'),
        ({'prompt': 'a' * 60}, 'max_tokens', 'max_tokens=16 make 76'),
        ({'prompt': 'a' * 64, 'max_tokens': 1}, 'prompt', 'holds 64'),
        ({'prompt': 'a' * 5000}, 'prompt', '5,000 tokens'),
        ({'prompt': 'a', 'max_tokens': 0}, 'max_tokens', 'echo'),
        ({'prompt': 'a', 'max_tokens': -1}, 'max_tokens', 'must be at least 0, not -1'),
        ({'prompt': 'a', 'max_tokens': 1.5}, 'max_tokens', 'a whole number, not 1.5'),
        ({'prompt': 'a', 'max_tokens': '5'}, 'max_tokens', 'a whole number, not "5"'),
        ({'prompt': 'a', 'max_tokens': True}, 'max_tokens', 'a whole number, not true'),
        ({'prompt': 'a', 'max_tokens': 10**30}, 'max_tokens', 'at most 2147483648, not 10000'),
        ({'prompt': 'a', 'n': 0}, 'n', 'at least 1, not 0'),
        ({'prompt': 'a', 'n': 137}, 'n', '136 completions per request'),
        ({'prompt': ['a'] * 137}, 'prompt', '136 completions'),
        ({'prompt': 'a', 'temperature': -0.1}, 'temperature', 'at least 0, not -0.1'),
        ({'prompt': 'a', 'temperature': 'hot'}, 'temperature', 'a number, not "hot"'),
        ({'prompt': 'a', 'top_p': 0}, 'top_p', 'greater than 0, not 0'),
        ({'prompt': 'a', 'top_p': 1.1}, 'top_p', 'at most 1, not 1.1'),
        ({'prompt': 'a', 'top_k': -2}, 'top_k', 'at least -1, not -2'),
        ({'prompt': 'a', 'min_p': 2}, 'min_p', 'at most 1, not 2'),
        ({'prompt': 'a', 'repetition_penalty': 0}, 'repetition_penalty', 'at least 0.01, not 0'),
        ({'prompt': 'a', 'frequency_penalty': 1e30}, 'frequency_penalty', 'at most 100, not 1e+30'),
        ({'prompt': 'a', 'presence_penalty': []}, 'presence_penalty', 'a number, not a list'),
        ({'prompt': 'a', 'logprobs': True}, 'logprobs', 'a whole number, not true'),
        ({'prompt': 'a', 'logprobs': 21}, 'logprobs', 'at most 20, not 21'),
        ({'prompt': 'a', 'stop': ''}, 'stop', 'a string of 1 to 512 characters'),
        ({'prompt': 'a', 'stop': ['a', '']}, 'stop', 'a list of at most 128'),
        ({'prompt': 'a', 'stop': [1]}, 'stop', 'a list of at most 128'),
        ({'prompt': 'a', 'stop': ['a'] * 129}, 'stop', 'a list of at most 128'),
        ({'prompt': 'a', 'logit_bias': {'257': 1}}, 'logit_bias', '257'),
        ({'prompt': 'a', 'logit_bias': {'a': 1}}, 'logit_bias', 'must have token ids as keys'),
        ({'prompt': 'a', 'logit_bias': {'-1': 1}}, 'logit_bias', 'must have token ids as keys'),
        ({'prompt': 'a', 'logit_bias': {'1': 101}}, 'logit_bias', 'numbers from -100 to 100'),
        ({'prompt': 'a', 'logit_bias': dict.fromkeys(range(2000), 1)}, 'logit_bias', 'send fewer'),
        ({'prompt': 'a', 'model': 10**50}, 'model', 'a string, not 1000000000000000000000000'),
        ({'prompt': 'a', 'logit_bias': [1]}, 'logit_bias', 'an object, not a list'),
        ({'prompt': 'a', 'echo': 'yes'}, 'echo', 'true or false, not "yes"'),
        ({'prompt': 'a', 'stream': 1}, 'stream', 'true or false, not 1'),
        ({'prompt': 'a', 'stream_options': 'all'}, 'stream_options', 'an object, not "all"'),
        ({'prompt': 'a', 'seed': 2**63}, 'seed', 'at most 9223372036854775807'),
        ({'prompt': 'a', 'temprature': 1}, 'temprature', 'did you mean temperature?'),
        ({'prompt': 'a', 'xyzzy': None}, 'xyzzy', 'no such field'),
        ({'prompt': 'a', 'messages': []}, 'messages', 'is a field of /v1/chat/completions'),
        ({'prompt': 'a', 'suffix': 'b'}, 'suffix', 'omit it'),
        ({'prompt': 'a', 'best_of': 2}, 'best_of', 'give 1 or n'),
        ({'prompt': 'a', 'use_beam_search': True}, 'use_beam_search', 'or give false'),
        ({'prompt': 'a', 'min_tokens': 3}, 'min_tokens', 'or give 0'),
        ({'prompt': 'a', 'min_tokens': False}, 'min_tokens', 'or give 0'),
        ({'prompt': 'a', 'prompt_logprobs': 0}, 'prompt_logprobs', 'omit it'),
        ({'prompt': 'a', 'skip_special_tokens': False}, 'skip_special_tokens', 'give true'),
        ({'prompt': 'a', 'stream_options': {'x': 1}}, 'stream_options', 'x: no such field'),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_an_error_reports_the_invalid_field(client, body, param, says):
    error = ask(client, 400, **body)['error']
    assert error.keys() == {'message', 'type', 'param', 'code'}
    assert error['type'] == 'invalid_request_error'
    assert error['param'] == param
    assert says in error['message']
    assert 'should' not in error['message']  # pydantic's word
    assert ask(client, 400, **{**body, 'stream': body.get('stream', True)}).keys() == {'error'}


@pytest.mark.parametrize(
    'body',
    [
        b'',
        b'{',
        b'null',
        b'[]',
        b'"text"',
        b'{"prompt": "a"',
        b'{"prompt": "a"} {}',
        b"{'prompt': 'a'}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "user": "\\udfff"}',
        b'{"prompt": "a\x00b"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e400}',
        b'{"prompt": "a", "logit_bias": {"1": -Infinity}}',
        b'{"prompt": "a", "seed": ' + b'9' * 5000 + b'}',
        b'{"prompt": [' + b'9' * 5000 + b']}',
        b'[' * 100_000,
        b'{"prompt": ' * 100_000,
        b'{"prompt": "a", "other": ' + b'[' * 100_000 + b']' * 100_000 + b'}',
        '{"prompt": "a"}'.encode('utf-16'),
        b'\xef\xbb\xbf{"prompt": "a"}',
        b'\x1f\x8b\x08\x00',
    ],
    ids=lambda body: repr(body[:40]),
)
@pytest.mark.parametrize('path', [PATH, '/tokenize', '/detokenize', '/v1/chat/completions'])
def test_a_body_that_is_not_valid_json_is_400(client, path, body):
    reply = client.post(path, data=body, content_type='application/json')
    ignored = path in ('/tokenize', '/detokenize') and (b'temperature' in body or b'bias' in body)
    assert reply.status_code == 400 or (ignored and reply.json)
    assert reply.json.get('error', {'message': ignored})['message']


@pytest.mark.parametrize('name', unsupported.UNSUPPORTED_FIELDS)
def test_unsupported_fields_are_accepted_at_values_that_request_nothing(chatting, name):
    path, body = (PATH, {'prompt': 'a'}) if name == 'suffix' else (CHAT, {'messages': TALK})
    empty = ([], {}, '')
    for neutral in (None, *empty, *unsupported.UNSUPPORTED_FIELDS[name]):
        asks = name in unsupported.CONSTRAINT_FIELDS and neutral in empty  # any JSON, say
        ask(chatting, 400 if asks else 200, path, max_tokens=1, **body, **{name: neutral})
    error = ask(chatting, 400, path, **body, **{name: {'some': 'thing'}})['error']
    assert error['param'] == name
    assert error['message'].startswith(f'{name}: this server does not support it')


def test_an_accepted_value_is_not_changed():
    (message,) = schema.ChatRequest(messages=[{**TALK[0], 'type': 'text'}]).messages
    assert message.type == 'text'
    assert schema.CompletionRequest(prompt='a', min_tokens=0).min_tokens == 0


@pytest.mark.parametrize(
    ('body', 'says'),
    [
        (b'{"prompt": "a", "seed": 1, "seed": 2}', "duplicate key 'seed'"),
        (b'{"prompt": "a", "metadata": {"b": 1, "b": 1}}', "duplicate key 'b'"),
        (b'{"prompt": "a", "user": NaN}', 'NaN is not valid JSON'),
        (b'{"prompt": "a", "logit_bias": {"5": -100, "05": 3}}', 'logit_bias'),
        (b'{"prompt": "a", "logit_bias": {" 5": 3}}', 'logit_bias'),
        (b'{"prompt": "a", "temperature": 1e400}', 'temperature: must be a number below 1.8e308'),
        (b'{"prompt": "\\ud800"}', 'send valid JSON in UTF-8'),
    ],
)
def test_json_that_only_some_parsers_accept_is_400(client, body, says):
    reply = client.post(PATH, data=body, content_type='application/json')
    assert reply.status_code == 400
    assert says in reply.json['error']['message']


@pytest.mark.parametrize(
    ('path', 'body', 'says'),
    [
        ('/tokenize', {'prompt': ['a']}, 'prompt: must be a string, not a list'),
        ('/tokenize', {'prompt': 'a', 'messages': TALK}, 'messages: no such field'),
        ('/detokenize', {'tokens': [1, 2.5]}, 'tokens[1]: must be a whole number, not 2.5'),
        ('/detokenize', {'tokens': 1}, 'tokens: must be a list, not 1'),
        ('/detokenize', [1], 'the body: must be an object, not a list'),
    ],
)
def test_an_error_has_the_place_and_the_value(client, path, body, says):
    reply = client.post(path, json=body)
    assert (reply.status_code, says in reply.json['error']['message']) == (400, True), reply.text


def test_many_unknown_fields_and_a_very_long_name_are_refused_in_a_line(client):
    for body in ({f'f{i}': 1 for i in range(100_000)}, {'temperature' * 300_000: 1}):
        began = time.thread_time()  # of the processor: others may use it
        message = ask(client, 400, prompt='a', **body)['error']['message']
        assert time.thread_time() - began < 5
        assert len(message) < 200


def test_a_field_in_the_url_is_reported_and_not_ignored(client):
    error = ask(client, 400, f'{PATH}?max_tokens=3', prompt='a')['error']
    assert (error['param'], 'JSON body' in error['message']) == ('max_tokens', True)
    ask(client, path=f'{PATH}?api-version=1', prompt='a')


@pytest.mark.parametrize(
    ('kind', 'coding', 'says'),
    [
        ('application/json; charset=latin-1', None, 'charset=latin-1'),
        ('application/json; charset="UTF-16"', None, 'charset=UTF-16'),
        ('application/json', 'gzip', 'Content-Encoding: gzip'),
        ('application/json', 'br', 'Content-Encoding: br'),
        ('application/json; charset=UTF-8', 'identity', None),
    ],
)
def test_a_body_with_another_encoding_is_415(client, kind, coding, says):
    headers = {'Content-Encoding': coding} if coding else {}
    reply = client.post(PATH, data=b'{"prompt": "a"}', content_type=kind, headers=headers)
    assert reply.status_code == (415 if says else 200)
    assert not says or says in reply.json['error']['message']


def test_a_large_invalid_body_is_refused_without_an_error_for_each_item(client):
    body = b'{"prompt": [' + b'1,' * 1_000_000 + b'"a"]}'
    began = time.monotonic()
    reply = client.post(PATH, data=body, content_type='application/json')
    assert reply.status_code == 400
    assert time.monotonic() - began < 2
    assert len(reply.data) < 500


def test_a_character_outside_the_vocabulary_is_400(make_app):
    client = make_app(char_tokenizer('abc', eot=True), random_model(4, SIZE)).test_client()
    error = ask(client, 400, prompt='abé')['error']
    assert error['param'] == 'prompt'
    assert "'é' (U+00E9)" in error['message']
    assert 'é' in ask(client, 400, path='/tokenize', prompt='é')['error']['message']


@pytest.mark.parametrize(
    'path', ['/nothing', '/v1', '/v1/completions/x', '/docs/../x', '/docs/x.js']
)
def test_an_unknown_path_is_404(client, path):
    reply = client.get(path)
    assert reply.status_code == 404
    assert reply.json['error']['type'] == 'not_found_error'


@pytest.mark.parametrize(
    ('method', 'path', 'allowed'),
    [('get', PATH, 'POST'), ('post', '/health', 'GET'), ('delete', '/tokenize', 'POST')],
)
def test_a_method_that_a_path_does_not_accept_is_405(client, method, path, allowed):
    reply = getattr(client, method)(path)
    assert reply.status_code == 405
    assert allowed in reply.headers['Allow']
    assert path in reply.json['error']['message']


@pytest.mark.parametrize(
    'kind',
    [
        None,
        'text/plain',
        'application/x-www-form-urlencoded',
        'multipart/form-data',
        'application/jsonp',
    ],
)
def test_a_body_without_the_content_type_of_json_is_415(client, kind):
    reply = client.post(PATH, data=b'{"prompt": "a"}', content_type=kind)
    assert reply.status_code == 415
    assert 'Content-Type: application/json' in reply.json['error']['message']


def test_a_body_that_is_too_large_is_413(make_app):
    client = make_app(max_body=0.01).test_client()
    assert (
        ask(client, 413, prompt='a' * 20_000)['error']['message']
        == 'the body is larger than 0.01 MiB, the limit of this server; send less'
    )


def test_the_limits_of_the_server_are_reported(make_app):
    client = make_app(max_prompt_tokens=10, max_new_tokens=20).test_client()
    error = ask(client, 400, prompt='a' * 11)['error']
    assert error['message'] == 'prompt: 11 tokens; this server accepts at most 10'
    error = ask(client, 400, prompt='a', max_tokens=21)['error']
    assert error['message'] == 'max_tokens: 21 tokens; this server accepts at most 20'
    ask(client, prompt='a' * 10, max_tokens=20)


@pytest.fixture
def chatting(make_app):
    """A client of a model whose tokenizer has a chat template, with a token that ends a turn."""
    plain = byte_tokenizer()
    tokens = [*plain.token_bytes, b'<|end|>']
    special = {**plain.special, '<|end|>': VOCABULARY}
    template = {role: [f'{role}: ', '<|end|>'] for role in ('system', 'user', 'assistant')}
    tokenizer = Tokenizer('byte', 'byte', tokens, special, '', template)
    return make_app(tokenizer, random_model(VOCABULARY + 1, SIZE)).test_client()


def test_a_chat_is_the_completion_of_its_template(chatting):
    tokenizer = service_of(chatting).tokenizer
    text = 'system: be kind|user: hi <|end|>|assistant: '
    ids = [VOCABULARY if c == '|' else ord(c) for c in text.replace('<|', '<¦').replace('|>', '¦>')]
    ids = [ord('|') if i == ord('¦') else i for i in ids]
    assert tokenizer.encode_chat(TALK).tolist() == ids
    choice = {'max_tokens': 9, 'seed': 3, 'temperature': 0.5}
    (text,) = ask_texts(chatting, prompt=ids, **choice)
    answer = ask(chatting, path=CHAT, messages=TALK, **choice)
    assert answer['object'] == 'chat.completion'
    assert answer['id'].startswith('chatcmpl-')
    assert answer['choices'][0]['message'] == {'role': 'assistant', 'content': text}
    assert answer['usage']['prompt_tokens'] == len(ids)


def test_a_streamed_chat_has_the_role_first_and_the_content_of_a_whole_response(chatting):
    given = {'messages': TALK, 'max_tokens': 9, 'seed': 3, 'n': 2}
    whole = ask(chatting, path=CHAT, **given)
    with chatting.post(CHAT, json={**given, 'stream': True}, buffered=True) as reply:
        events = events_of(reply.text)
    assert {event['object'] for event in events} == {'chat.completion.chunk'}
    for index, choice in enumerate(whole['choices']):
        deltas = [c for event in events for c in event['choices'] if c['index'] == index]
        assert [delta['delta'].get('role') for delta in deltas[:2]] in (
            ['assistant'],
            ['assistant', None],
        )
        text = ''.join(delta['delta']['content'] for delta in deltas)
        assert text == choice['message']['content']
        assert deltas[-1]['finish_reason'] == choice['finish_reason']


def test_a_turn_ends_at_its_token_or_at_its_text(chatting, make_app):
    write(service_of(chatting), [*b'yes', VOCABULARY, *b'no'])
    answer = ask(chatting, path=CHAT, messages=TALK, logprobs=True, top_logprobs=2)
    assert answer['choices'][0]['message']['content'] == 'yes'
    assert answer['choices'][0]['finish_reason'] == 'stop'
    scores = answer['choices'][0]['logprobs']['content']
    assert [score['token'] for score in scores] == ['y', 'e', 's', '<|end|>']
    assert all(len(score['top_logprobs']) == 2 for score in scores)
    plain = byte_tokenizer()
    plain.chat_template = {role: [f'{role}: ', '\n'] for role in ('user', 'assistant')}
    client = make_app(plain).test_client()
    write(service_of(client), b'yes\nno')
    answer = ask(client, path=CHAT, messages=TALK[1:])
    assert answer['choices'][0]['message']['content'] == 'yes'


@pytest.mark.parametrize(
    ('body', 'says'),
    [
        ({'messages': [{'role': 'judge', 'content': 'x'}]}, "messages[0]: unknown role 'judge'"),
        ({'messages': []}, 'messages: is empty; it needs at least one entry'),
        ({'messages': [{'role': 'user'}]}, 'messages[0].content: is missing; add it'),
        ({'messages': [{'role': 'user', 'content': 'x' * 60}]}, "the model's context holds 64"),
        ({'messages': [TALK[1], 'x']}, 'messages[1]: must be an object, not "x"'),
        ({'messages': [{**TALK[1], 'content': None}]}, 'messages[0].content: '),
        ({'messages': [{**TALK[1], 'content': [{'type': 'image_url'}]}]}, "type 'image_url'"),
        ({'messages': [{**TALK[1], 'name': 'Bob'}]}, 'messages[0].name: '),
        (
            {'messages': [{**TALK[1], 'tool_calls': [{}]}]},
            'messages[0].tool_calls[0].function: is missing',
        ),
        ({'messages': [{**TALK[1], 'other': 1}]}, 'messages[0].other: no such field'),
        ({'messages': TALK, 'max_tokens': 0}, 'max_tokens: must be at least 1, not 0'),
        ({'messages': TALK, 'max_completion_tokens': 0}, 'max_completion_tokens: '),
        (
            {'messages': TALK, 'max_tokens': 1, 'max_completion_tokens': 2},
            'differs from max_tokens',
        ),
        ({'messages': TALK, 'top_logprobs': 2}, 'top_logprobs: needs "logprobs": true'),
        ({'messages': TALK, 'n': 2, 'best_of': 3}, 'best_of: '),
        ({'messages': TALK, 'prompt': 'x'}, 'prompt: is a field of /v1/completions'),
    ],
)
def test_invalid_messages_are_400(chatting, body, says):
    assert says in ask(chatting, 400, CHAT, **body)['error']['message']


def test_text_parts_are_joined(chatting):
    given = {'path': CHAT, 'max_tokens': 5, 'temperature': 0}
    plain = ask(chatting, messages=[{'role': 'user', 'content': 'a\nb'}], **given)
    parts = [{'type': 'text', 'text': text} for text in 'ab']
    # as the openai package sends back a message that it got
    message = {'role': 'user', 'content': parts, 'refusal': None, 'tool_calls': None}
    assert ask(chatting, messages=[message], **given)['choices'] == plain['choices']


def test_a_chat_without_max_tokens_has_the_limit_of_the_server(chatting):
    service_of(chatting).settings['max_new_tokens'] = 7
    answer = ask(chatting, path=CHAT, messages=TALK[1:], logit_bias={'256': -100, '257': -100})
    assert answer['usage']['completion_tokens'] == 7


def test_without_a_chat_template_chat_is_400(client):
    error = ask(client, 400, '/v1/chat/completions', messages=[{'role': 'user', 'content': 'Hi'}])
    assert error['error']['code'] == 'no_chat_template'


@pytest.mark.parametrize('end', ['\n', 'e' * (schema.MAX_STOP_LENGTH + 1)], ids=['short', 'long'])
def test_a_chat_may_have_the_most_stop_strings_besides_the_end_of_a_turn(make_app, end):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {'user': ['', ''], 'assistant': ['', end]}
    client = make_app(tokenizer, random_model(VOCABULARY, 2048)).test_client()
    write(service_of(client), b'yes' + end.encode() + b'no')
    stop = [f'stop {i}' for i in range(schema.MAX_STOPS)]
    given = {'path': CHAT, 'messages': TALK[1:], 'max_tokens': 600, 'stop': stop}
    assert ask(client, **given)['choices'][0]['message']['content'] == 'yes'
    empty = [{'role': 'user', 'content': ''}]
    assert 'no text' in ask(client, 400, path=CHAT, messages=empty)['error']['message']


def test_a_turn_ends_at_the_token_that_the_end_of_text_stands_for(make_app):
    template = {'user': ['', EOT], 'assistant': ['', EOT]}
    tokens, special = [*byte_tokenizer().token_bytes[:256], b'</s>'], {'</s>': 256}
    tokenizer = Tokenizer('byte', 'byte', tokens, special, '', template, end_ids=[256])
    client = make_app(tokenizer).test_client()
    body = schema.ChatRequest(messages=TALK[1:])
    assert service_of(client).encode_messages(body)[1] == ''  # no stop string
    write(service_of(client), [*b'yes ', *EOT.encode(), 256])  # spelt, which is not the token
    answer = ask(client, path=CHAT, messages=TALK[1:], max_tokens=30)
    assert answer['choices'][0]['message']['content'] == f'yes {EOT}'


@pytest.mark.parametrize('best_of', [None, 1, 2])
def test_best_of_is_accepted_if_it_equals_n(chatting, best_of):
    for path, body in ((PATH, {'prompt': 'a'}), (CHAT, {'messages': TALK})):
        answer = ask(chatting, path=path, **body, n=2, best_of=best_of, max_tokens=1)
        assert len(answer['choices']) == 2


# -----------------------------------------------------------------------------
# access control


@pytest.mark.parametrize('key', ['secret', 'clé 🔑'])
def test_an_api_key_protects_the_model_and_its_tokenizer(make_app, key):
    client = make_app(api_key=key).test_client()
    right = {'Authorization': f'Bearer {key}'.encode().decode('latin-1')}
    for path in (
        '/v1/models',
        '/v1/models/x',
        '/tokenizer_info',
        PATH,
        '/tokenize',
        '/detokenize',
        '/v1/none',
    ):
        for wrong, problem in (
            ({}, 'the API key is missing'),
            ({'Authorization': 'Bearer '}, 'the API key is missing'),
            ({'Authorization': 'Bearer secre'}, 'wrong API key'),
            ({'Authorization': 'Basic é'}, 'wrong API key'),
        ):
            reply = client.get(path, headers=wrong)
            assert reply.status_code == 401
            assert reply.headers['WWW-Authenticate'] == 'Bearer'
            assert reply.json['error']['code'] == 'invalid_api_key'
            assert reply.json['error']['message'].startswith(f'{problem}; send')
            assert key not in reply.text
        assert client.get(path, headers=right).status_code in (200, 404, 405)
    assert client.post(PATH, headers=right, json={'prompt': 'a'}).status_code == 200
    for path in ('/health', '/ready', '/metrics', '/docs', '/openapi.json'):
        assert client.get(path).status_code == 200


def test_bearer_is_case_insensitive(make_app):
    client = make_app(api_key='my key').test_client()
    for sent in ('Bearer my key', 'bearer my key', 'BEARER  my key'):
        assert client.get('/v1/models', headers={'Authorization': sent}).status_code == 200
    assert client.get('/v1/models', headers={'Authorization': 'Basic my key'}).status_code == 401


ELSEWHERE = 'https://app.example'
PREFLIGHT = {
    'Access-Control-Request-Method': 'POST',
    'Access-Control-Request-Headers': 'authorization,content-type,x-stainless-os',
}


def allowed(reply):
    return reply.headers.get('Access-Control-Allow-Origin')


def test_with_an_api_key_any_page_may_send_requests_and_read_responses(make_app):
    client = make_app(api_key='secret').test_client()
    page = {'Origin': ELSEWHERE}
    reply = client.options(CHAT, headers={**page, **PREFLIGHT})
    assert (reply.status_code, allowed(reply)) == (200, '*')
    assert 'POST' in reply.headers['Access-Control-Allow-Methods']
    wanted = PREFLIGHT['Access-Control-Request-Headers']
    assert reply.headers['Access-Control-Allow-Headers'] == wanted
    reply = client.post(PATH, json={'prompt': 'a'}, headers=page)
    assert (reply.status_code, allowed(reply)) == (401, '*')
    page['Authorization'] = 'Bearer secret'
    for body, status in (({'prompt': 'a', 'stream': True}, 200), ({}, 400)):
        with client.post(PATH, json=body, headers=page, buffered=True) as reply:
            assert (reply.status_code, allowed(reply)) == (status, '*')
            assert 'X-Request-Id' in reply.headers['Access-Control-Expose-Headers']
    assert allowed(client.get('/nothing', headers=page)) == '*'


@pytest.mark.parametrize(
    ('origin', 'may'),
    [
        ('http://localhost:3000', True),
        ('http://LOCALHOST', True),
        ('https://localhost:8443', True),
        ('http://127.0.0.1:8000', True),
        ('http://[::1]:5173', True),
        (ELSEWHERE, False),
        ('http://rebound.example:8000', False),  # a name that leads here
        ('http://localhost.example:80', False),
        ('http://localhost:80.example', False),
        ('null', False),  # of a sandboxed event
        (None, True),  # no browser's page
    ],
)
def test_without_an_api_key_only_pages_of_this_machine_may_send_requests(client, origin, may):
    page = {'Origin': origin} if origin else {}
    for reply in (
        client.options(PATH, headers={**page, **PREFLIGHT}),
        client.post(PATH, json={'prompt': 'a'}, headers={**page, 'Host': 'rebound.example:8000'}),
    ):
        assert reply.status_code == (200 if may else 403)
        assert allowed(reply) == (origin if may else None)
        assert reply.headers['Vary'] == 'Origin'
        if not may:
            assert f'--allow_origins={origin}' in reply.json['error']['message']


def test_allow_origins_lists_the_allowed_pages(make_app):
    given = f'{ELSEWHERE}, http://10.0.0.1:*,null'
    client = make_app(allow_origins=given).test_client()
    for origin in (ELSEWHERE, 'http://10.0.0.1', 'http://10.0.0.1:81', 'null'):
        assert allowed(client.get('/health', headers={'Origin': origin})) == origin
    for origin in (f'{ELSEWHERE}:81', 'https://other.example', 'http://localhost:3000'):
        assert client.get('/health', headers={'Origin': origin}).status_code == 403
    client = make_app(allow_origins='', api_key='x').test_client()
    reply = client.get('/health', headers={'Origin': ELSEWHERE})
    assert (reply.status_code, allowed(reply)) == (200, None)
    client = make_app(allow_origins='*').test_client()
    assert allowed(client.get('/health', headers={'Origin': ELSEWHERE})) == '*'


@pytest.mark.parametrize(
    ('host', 'given', 'may'),
    [
        ('localhost:8000', {}, True),
        ('LOCALHOST', {}, True),
        ('127.0.0.1:8000', {}, True),
        ('[::1]:8000', {}, True),
        (None, {}, True),  # HTTP/1.0: no browser
        ('box.test:8000', {'host': 'box.test'}, True),  # what it was told to listen at
        ('rebound.example:8000', {}, False),
        ('localhost.example', {}, False),
        ('127.0.0.1.example:8000', {}, False),
        ('rebound.example:8000', {'api_key': 'x'}, True),
        ('rebound.example:8000', {'host': None}, True),  # of another WSGI server
        ('rebound.example:8000', {'allow_origins': '*'}, True),
        ('app.example', {'allow_origins': ELSEWHERE}, True),
        ('app.example:81', {'allow_origins': ELSEWHERE}, False),
        ('localhost:8000', {'allow_origins': ELSEWHERE}, True),
    ],
)
def test_a_server_without_an_api_key_accepts_only_its_own_host_names(host, given, may):
    none = {'host': '127.0.0.1', 'api_key': None, 'allow_origins': None}
    origins = Origins({**none, **given})
    if may:
        origins.check(None, host)
    else:
        with pytest.raises(APIError, match=rf'--allow_origins=http://{host} ') as caught:
            origins.check(None, host)
        assert (caught.value.status, caught.value.code) == (403, 'host_not_allowed')


def test_a_page_with_dns_rebinding_reads_nothing(app):
    app.extensions['origins'] = Origins({**service_of(app.test_client()).settings, 'host': '::1'})
    client = app.test_client()
    for path in ('/v1/models', '/tokenizer_info', '/metrics'):
        assert client.get(path, headers={'Host': 'evil.example:8000'}).status_code == 403
        assert client.get(path, headers={'Host': '[::1]:8000'}).status_code == 200


@pytest.mark.parametrize('wrong', ['app.example', 'https://a/', 'https://*.example', 'https://a/b'])
def test_an_invalid_origin_is_one_line(make_app, wrong):
    with pytest.raises(
        ConfigError, match=r'allow_origins: .* is not an origin; give scheme://host'
    ):
        make_app(allow_origins=f'https://good.example,{wrong}')


def test_the_key_may_come_from_the_environment(make_app, monkeypatch):
    monkeypatch.setenv('FLATGPT_API_KEY', 'from outside')
    client = make_app().test_client()
    assert client.get('/v1/models').status_code == 401
    assert (
        client.get('/v1/models', headers={'Authorization': 'Bearer from outside'}).status_code
        == 200
    )


@pytest.mark.parametrize('host', ['0.0.0.0', '::'])
def test_a_host_that_other_machines_reach_needs_an_api_key(host):
    with pytest.raises(ConfigError, match='FLATGPT_API_KEY'):
        listen({'host': host, 'port': 0, 'api_key': None})
    with (
        listen({'host': '0.0.0.0', 'port': 0, 'api_key': 'x'}),
        listen({'host': 'localhost', 'port': 0, 'api_key': None}),
    ):
        pass


def test_a_port_in_use_and_an_unknown_host_are_one_line():
    with listen({'host': '127.0.0.1', 'port': 0, 'api_key': None}) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f'--port={port}: .*in use'):
            listen({'host': '127.0.0.1', 'port': port, 'api_key': None})
    with pytest.raises(UserError, match=r'--host=no\.such\.host\.invalid'):
        listen({'host': 'no.such.host.invalid', 'port': 0, 'api_key': None})


# -----------------------------------------------------------------------------
# overload, timeouts, failures, shutdown


def test_more_than_the_queue_holds_is_429_until_there_is_room(make_app):
    client = make_app(max_rows=2, max_queue=3).test_client()
    service = service_of(client)
    with held(service):
        first = in_background(ask, client, prompt='a', n=4)
        wait_until(lambda: service.jobs)
        reply = client.post(PATH, json={'prompt': ['b', 'c'], 'stream': True})
        assert reply.status_code == 429
        assert reply.headers['Retry-After'] == '1'
        assert reply.json['error']['type'] == 'rate_limit_error'
        assert client.get('/health').status_code == 200
        last = in_background(ask, client, prompt='b')
        wait_until(lambda: len(service.jobs) == 2)
    assert len(first()['choices']) == 4
    assert len(last()['choices']) == 1
    ask(client, prompt=['b', 'c'])
    assert not service.jobs


def test_a_request_over_the_time_limit_is_cancelled(make_app):
    client = make_app(max_seconds=0.2).test_client()
    service, step = service_of(client), service_of(client).engine.step
    service.engine.step = lambda: (time.sleep(0.05), step())[1]
    error = ask(client, 504, prompt='a', max_tokens=60, logit_bias=GOES_ON)['error']
    assert error['code'] == 'timeout'
    assert error['message'] == (
        'the request took longer than 0.2 seconds, the limit of this server; lower max_tokens'
    )
    events = stream(client, prompt='a', max_tokens=60, logit_bias=GOES_ON)
    assert events[0]['choices']
    assert events[-1] == {'error': error}
    wait_until(lambda: not service.engine.running)


def break_engine(service):
    def step():
        raise RuntimeError('out of memory, say')

    service.engine.step = step


def test_an_exception_in_the_engine_fails_open_and_later_requests(client, caplog):
    service = service_of(client)
    with held(service):
        whole = in_background(client.post, PATH, json={'prompt': 'a'})
        streamed = in_background(
            client.post, PATH, json={'prompt': 'a', 'stream': True}, buffered=True
        )
        waiting = [in_background(client.post, PATH, json={'prompt': 'a', 'n': 3}) for _ in range(9)]
        wait_until(lambda: len(service.engine.waiting) == 2 + 9 * 3)
        service.engine.drop_cancelled = lambda: 1 / 0
    for reply in (whole(), *(each() for each in waiting)):
        assert reply.status_code == 500
        assert reply.json['error'] == {
            'message': 'the engine failed; see the server log, then restart the server',
            'type': 'server_error',
            'param': None,
            'code': 'engine_stopped',
        }
    events = events_of(streamed().text)
    assert events[-1]['error']['code'] == 'engine_stopped'
    assert client.get('/health').status_code == 200
    assert client.get('/ready').status_code == 503
    assert ask(client, 503, prompt='a')['error']['code'] == 'engine_stopped'
    assert client.get('/metrics').status_code == 200
    assert not service.jobs
    wait_until(lambda: 'ZeroDivisionError' in caplog.text)
    failure = next(record for record in caplog.records if 'engine failed' in record.message)
    assert 'ZeroDivisionError' in json.loads(JsonLines().format(failure))['traceback']


@pytest.mark.parametrize(('rows', 'fix'), [(8, '--max_rows=4'), (1, '--quantize=int8, or ')])
def test_memory_that_runs_out_while_serving_is_one_line_of_the_log(make_app, caplog, rows, fix):
    client = make_app(max_rows=rows).test_client()
    break_engine(service_of(client))
    assert client.post(PATH, json={'prompt': 'a'}).status_code == 500
    wait_until(lambda: 'out of memory' in caplog.text)
    (record,) = (each for each in caplog.records if 'out of memory' in each.getMessage())
    text = f'out of memory on cpu; try a restart with {fix}'
    assert record.getMessage().startswith(text)
    assert record.exc_info is None


def test_another_error_is_not_reported_as_out_of_memory(make_app, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError('mat1 and mat2 shapes cannot be multiplied')

    monkeypatch.setattr(api, 'Engine', broken)
    with pytest.raises(RuntimeError, match='mat1'):
        make_app()


def test_a_completion_without_finite_logits_is_an_error_and_the_engine_continues(client, caplog):
    service = service_of(client)
    sample_requests = service.engine.runner.sample_requests
    service.engine.runner.sample_requests = lambda requests, *_: [-1] * len(requests)
    error = ask(client, 500, prompt='a', n=2)['error']
    assert (error['message'], error['code']) == (NOT_FINITE, 'not_finite')
    assert caplog.text.count(NOT_FINITE) == 1
    assert stream(client, prompt='a')[-1] == {'error': error}
    service.engine.runner.sample_requests = sample_requests
    ask(client, prompt='a')


def test_a_client_may_disconnect_before_a_token_is_sent(client):
    service, body = service_of(client), schema.CompletionRequest(prompt='a')
    with held(service):
        job = service.submit(body, lambda: True)
        (request,) = job.requests
        request.admitted_time = request.arrival_time
        request.output_ids += [97, 98]  # as append_token() does, before emit() notes when
        service.release(job)
        assert 'first_token' not in job.log_fields(False)
    assert figures(client)['flatgpt_generation_tokens_total'] == 2


def test_requests_that_a_closed_engine_leaves_open_are_503(make_app):
    client = make_app(model=random_model(VOCABULARY, 4096)).test_client()
    service = service_of(client)
    given = {'prompt': 'a', 'max_tokens': 4000, 'logit_bias': GOES_ON}
    answer = in_background(ask, client, 503, **given)
    wait_until(lambda: service.engine.running)
    service.engine.close()
    assert answer()['error']['code'] == 'draining'


def test_a_draining_server_starts_no_requests_and_finishes_running_ones(client):
    service = service_of(client)
    with held(service):
        running = in_background(ask, client, prompt='a')
        wait_until(lambda: service.jobs)
        service.draining = True
        reply = client.post(PATH, json={'prompt': 'a'})
        assert reply.status_code == 503
        assert reply.headers['Retry-After']
        assert client.get('/ready').status_code == 503
        assert client.get('/health').status_code == 200
    assert running()['choices']


def test_an_unexpected_error_is_500_in_json_and_logged(client, caplog, monkeypatch):
    monkeypatch.setattr(service_of(client), 'to_ids', lambda *args: 1 / 0)
    error = ask(client, 500, '/tokenize', prompt='a')['error']
    assert error['type'] == 'server_error'
    assert 'ZeroDivision' not in json.dumps(error)
    assert 'ZeroDivisionError' in caplog.text


# -----------------------------------------------------------------------------
# models, tokenizer, metrics, log


def test_the_model_is_listed_and_found_by_its_name(client):
    listed = client.get('/v1/models').json
    assert (
        listed['data'][0].items()
        >= {'id': 'tiny', 'max_model_len': SIZE, 'object': 'model'}.items()
    )
    assert client.get('/v1/models/tiny').json == listed['data'][0]
    reply = client.get('/v1/models/other')
    assert (reply.status_code, reply.json['error']['param']) == (404, 'model')


def test_text_is_encoded_and_decoded(client):
    body = ask(client, path='/tokenize', prompt='é', add_special_tokens=False)
    assert body == {'tokens': [0xC3, 0xA9], 'count': 2, 'max_model_len': SIZE}
    assert ask(client, path='/detokenize', tokens=body['tokens']) == {'prompt': 'é'}
    assert ask(client, path='/tokenize', prompt='')['tokens'] == []
    assert ask(client, path='/detokenize', tokens=[]) == {'prompt': ''}
    info = client.get('/tokenizer_info').json
    assert ask(client, path='/tokenize', prompt=info['eos_token'])['tokens'] == [256]
    assert (info['vocab_size'], info['chat_template']) == (VOCABULARY, None)
    assert ask(client, 400, '/detokenize', tokens=[257])['error']['param'] == 'tokens'
    assert ask(client, 400, '/detokenize', tokens='a')['error']['param'] == 'tokens'
    assert ask(client, 400, '/tokenize', prompt=[1])['error']['param'] == 'prompt'


def test_a_vocabulary_without_an_end_of_text_token_has_none(make_app):
    client = make_app(char_tokenizer('abc'), random_model(3, SIZE)).test_client()
    assert client.get('/tokenizer_info').json['eos_token'] is None
    assert len(ask_texts(client, prompt='ab')[0]) == 16


def test_metrics_count_completions_tokens_and_errors(client):
    ask(client, prompt='abc', n=2, max_tokens=5, logit_bias=GOES_ON)
    ask(client, prompt='abc', logit_bias={'256': 100})
    ask(client, 400, prompt='')
    stream(client, prompt='abc', max_tokens=7, logit_bias=GOES_ON)
    seen = figures(client)
    expected = {
        'flatgpt_slots': 8,
        'flatgpt_requests_running': 0,
        'flatgpt_requests_waiting': 0,
        'flatgpt_prompt_tokens_total': 3 * 3,  # once for the n texts, as in `usage`
        'flatgpt_generation_tokens_total': 5 * 2 + 1 + 7,
        'flatgpt_requests_finished_total{reason="length"}': 3,
        'flatgpt_requests_finished_total{reason="stop"}': 1,
        'flatgpt_requests_rejected_total{status="400"}': 1,
        'flatgpt_queue_seconds_count': 4,
        'flatgpt_time_to_first_token_seconds_count': 4,
        'flatgpt_request_seconds_count': 4,
        'flatgpt_inter_token_seconds_count': 3,
    }
    assert {name: seen[name] for name in expected} == expected


def test_metrics_show_running_and_waiting_requests(make_app):
    client = make_app(max_rows=2).test_client()
    service = service_of(client)
    engine, step, go = service.engine, service.engine.step, threading.Event()
    engine.step = lambda: (step(), engine.running == 2 and go.wait(30))[0]
    answer = in_background(ask, client, prompt='a', n=5, max_tokens=30, logit_bias=GOES_ON)
    wait_until(lambda: engine.running == 2 and len(service.engine.waiting) == 3)
    seen = figures(client)
    go.set()
    assert seen['flatgpt_requests_running'] == 2
    assert seen['flatgpt_requests_waiting'] == 3
    answer()


def logged(caplog, path=PATH):
    ours = [record for record in caplog.records if record.name == 'flatgpt']  # not waitress's
    lines = [json.loads(JsonLines().format(record)) for record in ours]
    return [line for line in lines if line.get('path') == path]


def test_a_log_line_has_the_client_and_the_times(client, caplog):
    caplog.set_level(logging.INFO, 'flatgpt')
    reply = client.post(
        PATH,
        json={'prompt': 'my secret', 'max_tokens': 4, 'logit_bias': GOES_ON},
        buffered=True,
    )
    client.get('/health').close()
    (line,) = logged(caplog)
    assert line['id'] == reply.headers['X-Request-Id']
    assert line['seconds'] >= line['first_token'] >= line['queued'] >= 0
    assert (
        line.items()
        >= {
            'level': 'info',
            'method': 'POST',
            'status': 200,
            'client': '127.0.0.1',
            'prompt_tokens': 9,
            'completion_tokens': 4,
            'finish': ['length'],
        }.items()
    )
    assert 'secret' not in json.dumps(line)
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z', line['time'])
    assert logged(caplog, '/health')[0]['status'] == 200


def test_an_error_is_logged_with_its_code(make_app, caplog):
    caplog.set_level(logging.INFO, 'flatgpt')
    client = make_app(api_key='secret', max_seconds=0.001).test_client()
    client.post(PATH, json={'prompt': 'a'}, buffered=True)
    right = {'Authorization': 'Bearer secret'}
    body = {'prompt': 'a', 'max_tokens': 60, 'logit_bias': GOES_ON}
    for streamed in (False, True):
        given = {**body, 'stream': streamed}
        with held(service_of(client)):
            reply = in_background(client.post, PATH, json=given, headers=right, buffered=True)
            time.sleep(0.3)
        assert b'took longer' in reply().data
    assert [line['code'] for line in logged(caplog)] == ['invalid_api_key', 'timeout', 'timeout']


def test_the_log_has_prompts_only_with_log_prompts(make_app, caplog):
    caplog.set_level(logging.INFO, 'flatgpt')
    client = make_app(log_prompts=True).test_client()
    text = joined(stream(client, prompt=['one', 'two'], max_tokens=3, logit_bias={'98': 100}))[0][
        'text'
    ]
    (line,) = logged(caplog)
    assert line['prompts'] == ['one', 'two']
    assert line['answers'] == [text, text] == ['bbb', 'bbb']


@pytest.mark.parametrize(
    ('given', 'kept'),
    [('my-id.1', True), ('a b', False), ('x' * 65, False), ('é', False), ('', False)],
)
def test_a_request_keeps_the_id_it_came_with(client, given, kept):
    reply = client.get('/health', headers={'X-Request-Id': given})
    assert (reply.headers['X-Request-Id'] == given) == kept
    assert re.fullmatch(r'[\w.-]+', reply.headers['X-Request-Id'])


def test_a_line_of_the_log_is_one_line_whatever_is_in_it(client, caplog):
    caplog.set_level(logging.INFO, 'flatgpt')
    client.get('/a%0a{"level":"error"}', buffered=True)
    (record,) = [record for record in caplog.records if record.message == 'request']
    assert '\n' not in JsonLines().format(record)


# -----------------------------------------------------------------------------
# documentation


def test_the_openapi_document_is_valid_and_has_every_path(client, app):
    validate = pytest.importorskip('openapi_spec_validator').validate
    document = client.get('/openapi.json').json
    validate(document)
    assert document['openapi'] == '3.1.0'
    rules = {re.sub('<.*:?model>', '{model}', rule.rule) for rule in app.url_map.iter_rules()}
    assert document['paths'].keys() == rules - {'/', '/docs', '/docs/<file>', '/openapi.json'}
    for path, methods in document['paths'].items():
        for method, operation in methods.items():
            guarded = '401' in operation['responses']
            assert guarded == path.startswith(('/v1', '/tok', '/detok', '/reload'))
            assert ('requestBody' in operation) <= (method == 'post')


def test_the_examples_of_the_documentation_work(client):
    document = client.get('/openapi.json').json
    for path in (PATH, '/tokenize', '/detokenize'):
        reference = document['paths'][path]['post']['requestBody']['content']['application/json'][
            'schema'
        ]['$ref']
        kind = document['components']['schemas'][reference.rpartition('/')[2]]
        answer = document['paths'][path]['post']['responses']['200']['content']['application/json'][
            'schema'
        ]['$ref']
        for example in kind['examples']:
            if not example.get('stream'):
                model = getattr(schema, answer.rpartition('/')[2])
                assert_described(model, ask(client, path=path, **example))
            else:
                assert stream(client, **{**example, 'stream': True})
    for path, kind in (('/v1/models', schema.ModelList), ('/tokenizer_info', schema.TokenizerInfo)):
        assert_described(kind, client.get(path).json)
    assert_described(schema.ErrorResponse, ask(client, 400))


def assert_described(kind, body):
    """Whether an answer has the fields that are documented, of these types, and no other."""
    assert kind.model_validate(body, strict=True).model_dump(exclude_unset=True) == body


def test_the_documentation_page_loads_nothing_from_other_servers(client):
    page = client.get('/docs').text
    assert '://' not in page
    for file in re.findall(r'(?:src|href)="([^"]*)"', page):
        if not file.startswith('data:'):
            reply = client.get(f'/{file}', buffered=True)
            assert reply.status_code == 200
            assert len(reply.data) > 100_000
            assert (
                reply.mimetype
                == {'css': 'text/css', 'js': 'text/javascript'}[file.rpartition('.')[2]]
            )


# -----------------------------------------------------------------------------
# start


def test_every_setting_is_explained(monkeypatch):
    text = help_text(vars(api))
    assert 'python api.py' in text
    assert re.search(r"host = '127.0.0.1' +address to listen on", text)
    for line in text.partition('Settings')[2].splitlines():
        if line.startswith('  '):
            assert re.fullmatch(r'  \w+ = .*\S  .*', line) or len(line) > 46
    settings = configure(vars(api), ['--max_rows=4'])
    assert settings['max_rows'] == 4
    assert 'LOG' not in settings


@pytest.mark.parametrize(
    ('wrong', 'says'),
    [
        (
            {'max_row': 4},
            'create_app.max_row=.: unknown setting .max_row.; did you mean max_rows',
        ),
        ({'max_rows': 0}, 'max_rows=0: must be at least 1'),
        ({'max_queue': -1}, 'max_queue=-1'),
        ({'port': 8000}, 'create_app.port=.: the WSGI server sets its address'),
        ({'max_seconds': 0.0}, 'max_seconds=0.0'),
        (
            {'max_rows': '4'},
            'create_app.max_rows=.: max_rows needs a whole number or None',
        ),
        ({'quantize': 'int8'}, 'create_app.quantize=.: the model is already loaded'),
        ({'device': 'cuda'}, 'create_app.device=.: the model is already loaded'),
    ],
)
def test_invalid_settings_are_one_line(make_app, wrong, says):
    with pytest.raises(ConfigError, match=says):
        make_app(**wrong)


@pytest.mark.parametrize('device', ['cpu', 'auto'])
def test_the_device_of_a_loaded_model_may_be_given(make_app, device):
    assert make_app(device=device).test_client().get('/ready').status_code == 200


def test_a_device_without_an_index_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
    cuda, cpu = torch.device('cuda', 1), torch.device('cpu')
    assert api.is_device('cuda', cuda)
    assert api.is_device('cuda:1', cuda)
    assert not api.is_device('cuda', torch.device('cuda', 0))
    assert not api.is_device('cuda:0', cuda)
    assert not api.is_device('cpu', cuda)
    assert not api.is_device('cuda', cpu)
    assert not api.is_device('GPU', cuda)


def test_graphs_are_captured_before_the_server_is_ready(make_app, monkeypatch, capsys):
    engines = []
    monkeypatch.setattr(api.Engine, 'capture_graphs', lambda self: engines.append(self) or 21)
    service = make_app().extensions['flatgpt']
    assert engines == [service.engine]
    assert re.fullmatch(r'captured 21 CUDA graphs in 0\.\d s\n', capsys.readouterr().err)


def test_more_slots_than_fit_into_memory_are_one_line(make_app):
    with pytest.raises(UserError, match='max_rows=1000000000000: the cache does not fit'):
        make_app(max_rows=10**12)


def test_an_application_for_other_servers_loads_the_model_by_itself(tmp_path):
    saved(tmp_path / 'mine', byte_tokenizer())
    app = api.create_app(out_dir=str(tmp_path / 'mine'), device='cpu', dtype='float32')
    client = app.test_client()
    try:
        assert client.get('/v1/models').json['data'][0]['id'] == 'mine'
        assert len(ask(client, prompt='a', max_tokens=3)['choices']) == 1
    finally:
        service_of(client).close()


# -----------------------------------------------------------------------------
# over a socket


@pytest.mark.parametrize('streamed', [True, False])
@pytest.mark.parametrize('when', ['before the first token', 'midway'])
def test_a_client_that_disconnects_soon_frees_its_slot(make_app, model, streamed, when):
    app = make_app(max_rows=1, model=random_model(VOCABULARY, 4096))
    service = app.extensions['flatgpt']
    endless = {'prompt': 'a', 'max_tokens': 4000, 'logit_bias': GOES_ON}
    with served(app) as port:
        with connect(port, **endless, stream=True) as first:
            first.recv(100)
            waiting = connect(port, **endless, stream=streamed)
            wait_until(lambda: service.engine.waiting)
            if when == 'before the first token':
                waiting.close()
                wait_until(lambda: not service.engine.waiting)
        if when == 'midway':
            wait_until(lambda: service.engine.running == 1 and not service.engine.waiting)
            time.sleep(0.1)
            waiting.close()
        assert free_again(service)
        assert post(port, prompt='a')[0] == 200
    seen = figures(app.test_client())
    assert seen['flatgpt_requests_finished_total{reason="cancelled"}'] == 2
    assert not any('{status="5' in name for name in seen)


def test_the_client_of_a_large_upload_can_read_the_error(app):
    with served(app) as port:
        for length in (2**22 - 14, 2**22, 6_000_000, 20_000_000):
            status, _, body = post(port, prompt='a' * length)
            assert status == 413
            assert json.loads(body)['error']['type'] == 'invalid_request_error'
        assert post(port, prompt='a' * (2**22 - 100))[0] == 400  # in which the prompt is too long


def test_until_the_model_is_loaded_health_is_200_and_other_paths_503(app):
    origins = Origins({'allow_origins': None, 'api_key': 'x'})
    startup, listener = StartupApp(origins=origins), listening()
    server, port = Server(startup, listener, 4), listener.getsockname()[1]
    try:
        seen = {path: get(port, path) for path in ('/health', '/ready', '/v1/models', '/nothing')}
        assert seen.pop('/health') == (200, {'status': 'ok'})
        assert 'Retry-After' not in post(port, '/health')[1]
        assert post(port)[1]['Retry-After'] == '5'
        assert post(port)[1]['Access-Control-Allow-Origin'] == '*'
        for status, body in seen.values():
            assert (status, body['error']['code']) == (503, 'loading')
        startup.app = app
        assert get(port, '/ready') == (200, {'status': 'ok'})
    finally:
        server.close()


def test_a_page_may_learn_that_the_model_is_being_loaded():
    settings = {'allow_origins': None, 'api_key': None, 'host': '127.0.0.1'}
    client = Client(StartupApp(origins=Origins(settings)))
    page = {'Origin': 'http://localhost:3000'}
    reply = client.options(PATH, headers={**page, **PREFLIGHT})
    assert (reply.status_code, allowed(reply)) == (200, page['Origin'])
    wanted = PREFLIGHT['Access-Control-Request-Headers']
    assert reply.headers['Access-Control-Allow-Headers'] == wanted
    reply = client.post(PATH, json={'prompt': 'a'}, headers=page)
    assert (reply.status_code, allowed(reply)) == (503, page['Origin'])
    for stranger in ({'Origin': ELSEWHERE}, {'Host': 'evil.example'}):
        reply = client.options(PATH, headers={**stranger, **PREFLIGHT})
        assert (reply.status_code, allowed(reply)) == (403, None)


def get(port, path):
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
    with contextlib.closing(connection):
        connection.request('GET', path)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())


def test_connections_are_kept_for_the_next_request(app):
    with served(app) as port:
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
        with contextlib.closing(connection):
            for _ in range(3):
                connection.request('GET', '/health')
                assert connection.getresponse().read() == b'{"status":"ok"}\n'
                held_by = connection.sock
            connection.request('GET', '/ready')
            assert connection.getresponse().status == 200
            assert connection.sock is held_by


@pytest.mark.parametrize(
    ('sent', 'status'),
    [
        (b'nonsense\r\n\r\n', 400),
        (b'GET / HTTP/1.1\r\nbad header\r\n\r\n', 400),
        (b'GET / HTTP/1.1\r\nX: ' + b'x' * 300_000 + b'\r\n\r\n', 431),
        (b'POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n', 400),
        (b'POST /tokenize HTTP/1.1\r\nContent-Length: -1\r\n\r\n', 400),
        (b'POST /tokenize HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n', 501),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_malformed_http_gets_an_error_in_json_and_is_logged(app, caplog, sent, status):
    caplog.set_level(logging.INFO, 'flatgpt')
    with served(app) as port, socket.create_connection(('127.0.0.1', port), timeout=30) as client:
        client.sendall(sent.replace(b'\r\n', b'\r\nOrigin: http://localhost:1\r\n', 1))
        with http.client.HTTPResponse(client) as reply:
            reply.begin()
            assert reply.status == status
            assert json.loads(reply.read())['error']['message']
            assert reply.headers['Content-Type'] == 'application/json'
            assert reply.headers['Vary'] == 'Origin'
    (line,) = logged(caplog, None)
    assert (line['client'], line['status']) == ('127.0.0.1', status)
    assert figures(app.test_client())[f'flatgpt_requests_rejected_total{{status="{status}"}}'] == 1


def test_a_body_in_chunks_is_read(app):
    with served(app) as port:
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
        with contextlib.closing(connection):
            body = iter([b'{"prompt":', b' "', 'é'.encode()[:1], 'é'.encode()[1:], b'"}'])
            kind = {'Content-Type': 'application/json'}
            connection.request('POST', '/tokenize', body, kind, encode_chunked=True)
            assert json.loads(connection.getresponse().read())['tokens'] == [0xC3, 0xA9]


def test_the_log_has_the_client_that_a_local_proxy_reports(app, caplog):
    caplog.set_level(logging.INFO, 'flatgpt')
    with served(app) as port:
        for number, named in enumerate(({}, {'X-Forwarded-For': '192.0.2.9'}), 1):
            connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
            with contextlib.closing(connection):
                connection.request('GET', '/health', headers=named)
                assert connection.getresponse().status == 200
            wait_until(lambda number=number: len(logged(caplog, '/health')) == number)
    assert [line['client'] for line in logged(caplog, '/health')] == ['127.0.0.1', '192.0.2.9']


def test_idle_sockets_and_slow_uploads_do_not_starve_others(app):
    with served(app) as port, contextlib.ExitStack() as stack:
        for number in range(150):
            client = stack.enter_context(socket.create_connection(('127.0.0.1', port), timeout=30))
            if number % 2:
                client.sendall(f'POST {PATH} HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{{'.encode())
        began = time.monotonic()
        assert post(port, prompt='a')[0] == 200
        assert time.monotonic() - began < 2


def connect_and_never_read(port, service):
    """A client whose thread soon waits for it to read: its events are larger than any buffer."""
    given = {'prompt': 'a', 'max_tokens': 60, 'n': 2, 'logit_bias': GOES_ON, 'stream': True}
    events = lambda job, envelope: iter([b'x' * 2**24] * 3)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('flatgpt.serving.job.CompletionJob.events', events)
        client = connect(port, **given)
        client.recv(1, socket.MSG_PEEK)
    wait_until(lambda: service.jobs and not any(job.unfinished for job in service.jobs))
    return client


def test_a_client_that_does_not_read_takes_no_slot_and_is_disconnected(make_app, monkeypatch):
    app = make_app(max_rows=1, max_queue=2)
    service = app.extensions['flatgpt']
    with serving(app) as (server, port), connect_and_never_read(port, service):
        assert post(port, prompt='a', n=2)[0] == 200
        assert len(service.jobs) == 1
        monkeypatch.setattr('flatgpt.serving.http_server.STALL_CHECK_INTERVAL', 0.05)
        monkeypatch.setattr('flatgpt.serving.http_server.STALL_TIMEOUT', 0.2)
        wait_until(lambda: not service.jobs)
        wait_until(lambda: not server.busy())


def test_draining_waits_a_limited_time_for_clients_that_do_not_read(make_app, monkeypatch):
    monkeypatch.setattr('flatgpt.serving.http_server.DRAIN_TIMEOUT', 1.0)
    app = make_app()
    service = app.extensions['flatgpt']
    with serving(app) as (server, port):
        client = connect_and_never_read(port, service)
        service.draining, began = True, time.monotonic()
        wait_until_drained(service, server)
        assert 1 <= time.monotonic() - began < 25  # far from the default
    with client:
        wait_until(lambda: not service.jobs)


def test_new_requests_do_not_delay_draining(app):
    service, end = app.extensions['flatgpt'], threading.Event()

    def poll(port):
        while not end.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                get(port, '/v1/models')
                post(port, prompt='a')

    with serving(app) as (server, port):
        pollers = [in_background(poll, port) for _ in range(8)]
        wait_until(lambda: server.busy())
        service.draining, began = True, time.monotonic()
        wait_until_drained(service, server)
        took = time.monotonic() - began
        end.set()
        for poller in pollers:
            poller()
    assert 0.5 <= took < 25


def test_a_response_is_read_to_its_end_while_a_server_drains(make_app):
    app = make_app()
    service = app.extensions['flatgpt']
    with serving(app) as (server, port), connect_and_never_read(port, service) as slow:
        service.draining = True
        drained = threading.Event()
        in_background(lambda: (wait_until_drained(service, server), drained.set()))
        time.sleep(1)
        assert not drained.is_set()
        received = 0
        while received < 3 * 2**24:
            received += len(slow.recv(2**20))
        assert drained.wait(5)


def test_events_arrive_while_the_completion_runs(make_app):
    app = make_app(model=random_model(VOCABULARY, 2048))
    with (
        served(app) as port,
        connect(port, prompt='a', max_tokens=2000, stream=True, logit_bias=GOES_ON) as client,
    ):
        received = b''
        while b'data: {"id"' not in received:
            received += client.recv(10_000)
        assert app.extensions['flatgpt'].engine.running == 1


# -----------------------------------------------------------------------------
# the client of OpenAI's library


@pytest.fixture
def openai_client(make_app):
    openai = pytest.importorskip('openai', reason='openai is not installed')
    app = make_app(name='tiny', api_key='secret')
    with served(app) as port:
        base = f'http://127.0.0.1:{port}/v1'
        with openai.OpenAI(base_url=base, api_key='secret', max_retries=0) as client:
            yield client


def nearly(value):
    """A JSON value whose numbers may differ in their last digits, as those of texts do that are
    computed beside others."""
    if isinstance(value, dict):
        return {name: nearly(each) for name, each in value.items()}
    if isinstance(value, list):
        return [nearly(each) for each in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


def test_openai_completes_with_logprobs(openai_client, app):
    given = {'prompt': ['one', 'two'], 'max_tokens': 6, 'seed': 3, 'n': 2, 'logprobs': 2}
    body = ask(app.test_client(), **given, echo=True, stop=['\n'])
    answer = openai_client.completions.create(model='tiny', **given, echo=True, stop=['\n'])
    assert [choice.text for choice in answer.choices] == [c['text'] for c in body['choices']]
    assert answer.usage.total_tokens == body['usage']['total_tokens']
    for choice, expected in zip(answer.choices, body['choices'], strict=True):
        assert choice.finish_reason == expected['finish_reason']
        assert choice.logprobs.model_dump() == nearly(expected['logprobs'])
    assert answer._request_id == answer.id.removeprefix('cmpl-')


def test_openai_streams_with_logprobs_and_usage(openai_client, app):
    given = {'prompt': 'one', 'max_tokens': 20, 'seed': 3, 'logprobs': 1, 'logit_bias': GOES_ON}
    body = ask(app.test_client(), **given)
    options = {'stream': True, 'stream_options': {'include_usage': True}}
    *events, last = openai_client.completions.create(model='tiny', **given, **options)
    assert ''.join(event.choices[0].text for event in events) == body['choices'][0]['text']
    tokens = [token for event in events for token in event.choices[0].logprobs.tokens]
    assert tokens == body['choices'][0]['logprobs']['tokens']
    assert events[-1].choices[0].finish_reason == 'length'
    assert (last.choices, last.usage.completion_tokens) == ([], 20)


def test_openai_sends_text_parts_and_its_bytes_come_back(chatting):
    openai = pytest.importorskip('openai', reason='openai is not installed')
    write(service_of(chatting), 'né'.encode())
    parts = [{'type': 'text', 'text': 'hi'}]
    given = {'model': '', 'messages': [{'role': 'user', 'content': parts}], 'max_tokens': 3}
    with served(chatting.application) as port:
        base = f'http://127.0.0.1:{port}/v1'
        with openai.OpenAI(base_url=base, api_key='-', max_retries=0) as client:
            answer = client.chat.completions.create(**given, logprobs=True, top_logprobs=20)
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(**given, prediction={'type': 'content'})
    scores = answer.choices[0].logprobs.content
    assert b''.join(bytes(score.bytes) for score in scores) == 'né'.encode()
    assert answer.choices[0].message.content == 'né'
    assert all(len({*map(str, score.top_logprobs)}) == 20 for score in scores)
    assert caught.value.param == 'prediction'


def test_openai_lists_the_model(openai_client):
    assert [model.id for model in openai_client.models.list()] == ['tiny']
    assert openai_client.models.retrieve('tiny').object == 'model'


def test_openai_raises_its_own_error_classes(openai_client):
    import openai

    service, given = openai_client, {'model': 'tiny', 'prompt': 'a'}
    with pytest.raises(openai.BadRequestError) as caught:
        service.completions.create(**given, temperature=-1)
    assert caught.value.param == 'temperature'
    assert caught.value.type == 'invalid_request_error'
    with pytest.raises(openai.BadRequestError, match='no chat template'):
        service.chat.completions.create(model='tiny', messages=[{'role': 'user', 'content': 'a'}])
    with pytest.raises(openai.NotFoundError, match='does not exist'):
        service.models.retrieve('other')
    with pytest.raises(openai.AuthenticationError) as caught:
        service.with_options(api_key='wrong').completions.create(**given)
    assert caught.value.code == 'invalid_api_key'


def test_openai_raises_an_error_in_the_middle_of_a_stream(make_app):
    openai = pytest.importorskip('openai', reason='openai is not installed')
    app = make_app(max_seconds=0.3)
    service, step = app.extensions['flatgpt'], app.extensions['flatgpt'].engine.step
    service.engine.step = lambda: (time.sleep(0.02), step())[1]
    given = {'model': '', 'prompt': 'a', 'max_tokens': 60, 'logit_bias': GOES_ON}
    with served(app) as port:
        base = f'http://127.0.0.1:{port}/v1'
        with openai.OpenAI(base_url=base, api_key='-') as client:
            events = client.completions.create(**given, stream=True)
            assert next(events).choices
            with pytest.raises(openai.APIError, match='took longer than'):
                list(events)
            with pytest.raises(openai.InternalServerError, match='took longer than'):
                client.completions.create(**given)  # which does not try again
    assert figures(app.test_client())['flatgpt_requests_rejected_total{status="504"}'] == 1


# -----------------------------------------------------------------------------
# the script


def begin_many(port):
    """Send many requests at once -> a function that checks that each is answered to its end."""
    answers = [
        in_background(post, port, prompt='a', max_tokens=15, stream=bool(i % 2), n=4, seed=i)
        for i in range(16)
    ]

    def check():
        for answer in answers:
            status, _, body = answer()
            assert status in (200, 503)
            assert status == 503 or b'"finish_reason"' in body
            assert status == 503 or body.endswith((b'[DONE]\n\n', b'}\n'))

    time.sleep(0.02)
    return check


@pytest.mark.skipif(os.name == 'nt', reason='needs POSIX signals')
def test_a_signal_stops_the_server_when_running_requests_are_finished(out_dir, environment):
    with started(out_dir, environment) as (process, port):
        limits = process.stdout.readline()
        assert '8 slots, queue of 128, context of 4096 tokens' in limits
        assert 'no API key' in limits
        for host, status in (('evil.example', 403), (f'localhost:{port}', 200)):
            connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
            with contextlib.closing(connection):
                connection.request('GET', '/v1/models', headers={'Host': host})
                assert connection.getresponse().status == status
        check = begin_many(port)
        process.send_signal(signal.SIGTERM)
        check()
        assert process.wait(10) == 0
        lines = process.stderr.read().splitlines()
        assert all(json.loads(line) for line in lines if 'parameters on' not in line)


@pytest.fixture
def serve_here(out_dir, monkeypatch):
    """Run api.py in this process, to its end; what it sets for a whole process is undone."""
    monkeypatch.setattr(api, 'allow_open_files', lambda count: None)
    monkeypatch.setattr(api, 'log_to_stderr', lambda: None)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    given = [f'--out_dir={out_dir}', '--device=cpu', '--dtype=float32']
    yield lambda *args: api.main(configure(dict(vars(api)), [*given, *args]))
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.skipif(os.name == 'nt', reason='needs POSIX signals')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_either_signal_lets_running_requests_finish(serve_here, monkeypatch, capsys, number):
    listener = listening()
    port = listener.getsockname()[1]
    monkeypatch.setattr(api, 'listen', lambda settings: listener)

    def ask_and_signal():
        wait_until(lambda: get(port, '/ready')[0] == 200)
        check = begin_many(port)
        os.kill(os.getpid(), number)
        check()
        return 'answered'

    result = in_background(ask_and_signal)
    serve_here()
    assert result() == 'answered'
    address, limits, *rest = capsys.readouterr().out.splitlines()
    assert f' at http://127.0.0.1:{port}, ' in address
    assert '8 slots, queue of 128, context of 4096 tokens' in limits
    assert not rest


def test_a_dead_server_thread_is_an_error(app):
    class Dead:
        thread = threading.Thread()

    with pytest.raises(RuntimeError, match='the server failed'):
        wait_until_drained(app.extensions['flatgpt'], Dead())


@pytest.mark.skipif(os.name == 'nt', reason='needs POSIX signals')
def test_a_second_signal_stops_the_server_at_once(out_dir, environment):
    with started(out_dir, environment) as (process, port):
        with connect(port, prompt='a', max_tokens=4000, stream=True, logit_bias=GOES_ON) as client:
            assert client.recv(100)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ('arg', 'says'),
    [
        ('--host=0.0.0.0', 'FLATGPT_API_KEY'),
        ('--max_rows=0', 'max_rows=0'),
        ('--prot=1', 'did you mean port'),
        ('--port=70000', 'port=70000'),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(serve_here, arg, says):
    with pytest.raises(UserError, match=says) as caught:
        serve_here(arg)
    assert '\n' not in str(caught.value)


def test_mistakes_at_the_start_end_the_script_with_one_line(environment):
    command = [sys.executable, str(SCRIPT), '--port=0', '--out_dir=no-such-run']
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1
    assert 'no-such-run' in done.stderr
