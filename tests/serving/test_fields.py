"""Every request field of OpenAI's API is one that works, is ignored on purpose, or is rejected."""

import re
import sys
from typing import get_type_hints

import pytest
from conftest import ROOT

from flatgpt.data.messages import PART_KEYS
from flatgpt.serving import schema
from flatgpt.serving.unsupported import Body

PAGE = (ROOT / 'docs' / 'serving.md').read_text(encoding='utf-8')
MESSAGES = ('Developer', 'System', 'User', 'Assistant', 'Tool', 'Function')


@pytest.fixture(scope='module')
def types():
    """OpenAI's types, which take a second to import."""
    for part in ('chat', 'shared_params'):
        pytest.importorskip(f'openai.types.{part}', reason='openai is not installed')
    return sys.modules['openai.types']


def fields_of(*kinds):
    """The fields of OpenAI's types; of a union, those of all parts."""
    parts = [part for kind in kinds for part in getattr(kind, '__args__', (kind,))]
    return {name for part in parts for name in get_type_hints(part)}


def state_of(model: type[Body], name):
    """'ignored', 'rejected' or 'works', as the model of a body has the field."""
    properties = model.model_json_schema()['properties']
    assert name in properties, f'{name} is a new field of OpenAI'
    about = properties[name].get('description', '')
    return {'Ign': 'ignored', 'Not': 'rejected'}.get(about[:3], 'works')


def paragraph(begin):
    """The fields that a paragraph of the page lists first."""
    text = next(part for part in PAGE.split('\n\n') if begin in part)
    listed = re.search(rf'{begin}[^:]*:\s+((`\w+`,?\s*)+)', text)[1]
    return {*re.findall(r'\w+', listed)}


def test_the_page_lists_every_field_of_openai_as_it_is_treated(types):
    states = {'works': set(), 'rejected': set(), 'ignored': set()}
    for model, params in (
        (schema.CompletionRequest, types.CompletionCreateParams),
        (schema.ChatRequest, types.chat.CompletionCreateParams),
    ):
        for name in fields_of(params):
            states[state_of(model, name)].add(name)
    states['works'].add('best_of')  # at the values that need no ranking
    states['rejected'].discard('best_of')
    assert paragraph('these work') == states['works']
    assert paragraph('These are rejected') == states['rejected']
    assert paragraph('These are ignored') == states['ignored']


def test_the_fields_of_messages_and_of_options_are_known(types):
    chat = types.chat
    kinds = [getattr(chat, f'ChatCompletion{kind}MessageParam') for kind in MESSAGES]
    for name in fields_of(*kinds):
        state = state_of(schema.ChatMessage, name)
        assert (state == 'works') == (name in ('role', 'content', 'tool_calls'))
        assert state == 'works' or f'`{name}`' in PAGE
    for name in fields_of(chat.ChatCompletionStreamOptionsParam):
        state_of(schema.StreamOptions, name)
    assert fields_of(chat.ChatCompletionContentPartTextParam) == PART_KEYS


def test_the_fields_of_a_response_format_are_known(types):
    from openai.types.shared_params.response_format_json_schema import JSONSchema

    shared = types.shared_params
    kinds = [getattr(shared, f'ResponseFormat{kind}') for kind in ('Text', 'JSONObject')]
    for name in fields_of(*kinds, shared.ResponseFormatJSONSchema):
        state_of(schema.ResponseFormat, name)
    for name in fields_of(JSONSchema):
        state_of(schema.JsonSchema, name)
