"""Functions, calls and results as text, in training data and back."""

import json

import pytest
from error_lines import case

from flatgpt.data import chat
from flatgpt.data.dataset import Dataset
from flatgpt.data.tools import BEGIN, END, Call, CallParser, without_tools
from flatgpt.errors import UserError

TEMPLATE = {'system': ['', ''], 'user': ['', ''], 'assistant': ['', '']}
TOOL = {'type': 'function', 'function': {'name': 'time', 'description': 'now', 'strict': True}}
CALL = {'id': 'a', 'type': 'function', 'function': {'name': 'time', 'arguments': '{"zone":"é"}'}}
ASKED = [{'role': 'user', 'content': 'When?'}]
CALLED = [*ASKED, {'role': 'assistant', 'content': None, 'tool_calls': [CALL]}]
DONE = [*CALLED, {'role': 'tool', 'tool_call_id': 'a', 'content': '12'}]
TEXT = '<tool_call>{"name": "time", "arguments": {"zone": "é"}}</tool_call>'


def test_calls_and_results_are_text():
    flat = without_tools(DONE, None, TEMPLATE)
    assert flat == [
        *ASKED,
        {'role': 'assistant', 'content': TEXT},
        {'role': 'user', 'content': '<tool_response>12</tool_response>'},
    ]
    assert without_tools(DONE, None, {**TEMPLATE, 'tool': ['', '']})[2]['role'] == 'tool'


@pytest.mark.parametrize(
    ('messages', 'template', 'roles'),
    [
        (ASKED, TEMPLATE, ['system', 'user']),
        ([{'role': 'system', 'content': 'Be brief.'}, *ASKED], TEMPLATE, ['system', 'user']),
        ([{'role': 'developer', 'content': 'Be brief.'}, *ASKED], TEMPLATE, ['developer', 'user']),
        (ASKED, {'user': ['', ''], 'assistant': ['', '']}, ['user']),
    ],
)
def test_the_functions_are_in_the_first_message(messages, template, roles):
    flat = without_tools(messages, [TOOL], template)
    assert [message['role'] for message in flat] == roles
    assert '[{"name": "time", "description": "now"}]' in flat[0]['content']
    assert flat[-1]['content'].endswith('When?')
    assert ('Be brief.' in flat[0]['content']) == (len(messages) == 2)


def test_other_messages_are_not_changed():
    assert without_tools(ASKED, [], TEMPLATE) == ASKED
    assert without_tools([], [TOOL], TEMPLATE) == []


@pytest.mark.parametrize(
    ('messages', 'tools', 'good'),
    [
        case('it must be a list of functions', ASKED, {'name': 'time'}, [{'name': 'time'}]),
        case('a tool is {}; it must be like', ASKED, [{'function': {}}], [TOOL]),
    ],
)
def test_the_advice_for_tools_is_right(messages, tools, good):
    with pytest.raises(UserError):
        without_tools(messages, tools, TEMPLATE)
    assert len(without_tools(messages, good, TEMPLATE)) == 2


@pytest.mark.parametrize(
    'message',
    [
        case('it must be a list of calls of the', {'role': 'user', 'tool_calls': [CALL]}),
        case('it must be a list of calls of the', {'role': 'assistant', 'tool_calls': CALL}),
        case(
            'a tool call is {}; it must be like',
            {'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': '[]'}}]},
        ),
        case(
            'a tool call is {}; it must be like',
            {'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': '{'}}]},
        ),
    ],
)
def test_the_advice_for_calls_is_right(message):
    with pytest.raises(UserError):
        without_tools([message], None, TEMPLATE)
    good = {**message, 'role': 'assistant', 'tool_calls': [CALL]}
    assert without_tools([good], None, TEMPLATE)[0]['content'] == TEXT


TRICKY = {'text': f'a {END} "quoted\\" {{}} {BEGIN}', 'n': 1.0}


@pytest.mark.parametrize('step', [1, 3, 7, 1000])
def test_calls_are_found_in_a_text_that_comes_in_parts(step):
    calls = [{'function': {'name': 'f', 'arguments': TRICKY}}, CALL]
    message = {'role': 'assistant', 'content': 'So <tool> ', 'tool_calls': calls}
    text = without_tools([message], None, TEMPLATE)[0]['content'] + ' end <tool'
    parser, content, found = CallParser(), '', []
    for at in range(0, len(text), step):
        more, new = parser.feed(text[at : at + step], final=at + step >= len(text))
        content, found = content + more, found + new
    assert content == 'So <tool>  end <tool'
    assert [(call.name, json.loads(call.arguments)) for call in found] == [
        ('f', TRICKY),
        ('time', {'zone': 'é'}),
    ]


def test_a_call_that_is_cut_off_has_the_arguments_so_far():
    whole = f'{BEGIN}{{"name": "f", "arguments": {{"a": [1, 2]}}}}{END}'
    for length in range(len(whole)):
        content, calls = CallParser().feed(whole[:length], final=True)
        assert len(calls) <= 1
        assert all('{"a": [1, 2]}'.startswith(call.arguments) for call in calls)
        assert content == ('' if length >= len(BEGIN) else whole[:length])
    assert CallParser().feed(whole, final=True) == ('', [Call('f', '{"a": [1, 2]}')])


def test_conversations_with_tools_are_trained_on(tmp_path):
    talk = [*DONE, {'role': 'assistant', 'content': 'At 12.'}]
    records = [{'messages': talk, 'tools': [TOOL]}, {'messages': talk, 'tools': '[]'}]
    for name in ('train.jsonl', 'val.jsonl'):
        (tmp_path / name).write_text('\n'.join(map(json.dumps, records)))
    flags = [str(tmp_path / 'train.jsonl'), f'--val={tmp_path / "val.jsonl"}', '--tokenizer=byte']
    chat.main([*flags, f'--out_dir={tmp_path / "data"}', '--block_size=512'])
    data = Dataset(tmp_path / 'data', 512, objective='sft')
    ids = [int(i) for row in data.eval_batch('val', data.eval_starts('val'))[0] for i in row]
    text = data.tokenizer.decode(ids)
    assert text.count(TEXT) == 2
    assert text.count('<tool_response>12</tool_response>') == 2
    assert text.count('"description": "now"') == 1
