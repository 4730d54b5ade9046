"""
Tools in the text of a chat: the functions that a model may call, its calls and their results.

    messages = without_tools(messages, tools, template)  # messages of a role and text alone
    content, calls = CallParser().feed(text, final=True)

The text is that of Hermes and Qwen. The system message lists the functions, the assistant writes
<tool_call>{"name": "time", "arguments": {}}</tool_call>, and a result is in <tool_response>.
"""

import json
import re
from typing import NamedTuple

from flatgpt.data.messages import content_text
from flatgpt.data.tokenizer import ASSISTANT
from flatgpt.errors import UserError, short_repr

BEGIN, END = '<tool_call>', '</tool_call>'
HEAD = '{"name": %s, "arguments": '  # of a call
LIST = (
    'Call a function, if it helps, as <tool_call>{"name": ..., "arguments": {...}}</tool_call>. '
    'The functions are: '
)
CALL = re.compile(r'\{"name": ("(?:[^"\\]|\\.)*"), "arguments": (.*)', re.DOTALL)


# -----------------------------------------------------------------------------
# messages -> text


def without_tools(messages: list, tools: list | None, template: dict) -> list:
    """Messages in which functions, calls and results are text; others are unchanged.

    UserError for a function or a call that has another form.
    """
    out = [flat_message(message, template) for message in messages]
    if not tools or not out:
        return out
    if not isinstance(tools, list):
        raise UserError(f'tools is {short_repr(tools)}; it must be a list of functions')
    text = LIST + as_text([function_of(tool) for tool in tools])
    if out[0].get('role') in ('system', 'developer'):
        return [out[0] | {'content': joined(out[0].get('content'), text)}, *out[1:]]
    if 'system' in template:
        return [{'role': 'system', 'content': text}, *out]
    return [{**out[0], 'content': joined(text, out[0].get('content'))}, *out[1:]]


def flat_message(message: dict, template: dict) -> dict:
    if message.get('role') == 'tool':
        role = 'tool' if 'tool' in template else 'user'
        text = f'<tool_response>{flat(message.get("content"))}</tool_response>'
        others = {key: message[key] for key in message if key not in ('tool_call_id', 'name')}
        return others | {'role': role, 'content': text}
    calls = message.get('tool_calls')
    if not calls:
        return message
    if not isinstance(calls, list) or message.get('role') != ASSISTANT:
        raise UserError(
            f'tool_calls is {short_repr(calls)}; it must be a list of calls of the assistant'
        )
    text = flat(message.get('content')) + ''.join(map(call_text, calls))
    others = {key: message[key] for key in message if key != 'tool_calls'}
    return others | {'content': text}


def function_of(tool: object) -> dict:
    """The function of a tool: {"type": "function", "function": {...}}, or the function alone."""
    function = tool.get('function', tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get('name'), str):
        raise UserError(
            f'a tool is {short_repr(tool)}; it must be like {{"type": "function", "function": '
            '{"name": "time", "parameters": {...}}}'
        )
    wanted = ('name', 'description', 'parameters')
    return {key: function[key] for key in wanted if function.get(key) is not None}


def call_text(call: object) -> str:
    """The text of a call; its arguments are an object, or one as JSON text."""
    function = call.get('function', call) if isinstance(call, dict) else {}
    name, arguments = function.get('name'), function.get('arguments')
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise UserError(
            f'a tool call is {short_repr(call)}; it must be like {{"type": "function", '
            '"function": {"name": "time", "arguments": "{}"}}'
        )
    return f'{BEGIN}{HEAD % as_text(name)}{as_text(arguments)}}}{END}'


def as_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def flat(content: object) -> str:
    return '' if content is None else content_text(content)


def joined(first: object, second: object) -> str:
    return '\n'.join(filter(None, (flat(first), flat(second))))


# -----------------------------------------------------------------------------
# text -> calls


class Call(NamedTuple):
    name: str
    arguments: str  # JSON, which is cut off if the completion is


class CallParser:
    """Finds the calls in the text of a completion, as it arrives."""

    def __init__(self):
        self.held = ''

    def feed(self, text: str, final: bool) -> tuple[str, list[Call]]:
        """More text -> text that is not of a call, and calls that are complete; the last one may
        not be if the text is final."""
        self.held += text
        content, calls = [], []
        while (at := self.held.find(BEGIN)) >= 0:
            content.append(self.held[:at])
            self.held = self.held[at:]
            body = self.held[len(BEGIN) :]
            size = size_of_object(body)
            whole = size is not None and (final or body[size:].startswith(END))
            if not (whole or final):
                return ''.join(content), calls
            call = CALL.match(body[: size - 1] if whole else body)
            calls += [Call(json.loads(call[1]), call[2])] if call else []
            rest = body[size:].removeprefix(END) if whole else ''
            self.held = '' if final and END.startswith(rest) else rest  # it may be cut off
        kept = 0 if final else length_of_begin(self.held)
        content.append(self.held[: len(self.held) - kept])
        self.held = self.held[len(self.held) - kept :]
        return ''.join(content), calls


def size_of_object(text: str) -> int | None:
    """The length of the JSON that a text begins with, None before its end has arrived."""
    try:
        return json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return None


def length_of_begin(text: str) -> int:
    """How many of a text's last characters may begin a call."""
    return next(n for n in range(len(BEGIN) - 1, -1, -1) if text.endswith(BEGIN[:n]))
