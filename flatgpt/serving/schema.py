"""
The bodies of requests to api.py and of its responses, as pydantic models.

    body = CompletionRequest.model_validate_json(b'{"prompt": "To be"}')
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from flatgpt.data.messages import content_text
from flatgpt.errors import UserError
from flatgpt.inference.sampling import SamplingParams
from flatgpt.serving.unsupported import (
    Body,
    Unsupported,
    field_error,
    ignored_field,
    unsupported_field,
)

MAX_STOPS, MAX_STOP_LENGTH = 128, 512  # each is looked for after every token
MAX_BIASES = 1024
MAX_LOGPROBS = 20

Id = Annotated[int, Field(ge=0, le=2**31)]
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Id], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[list[Ids], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
Bias = Annotated[float, Field(ge=-100, le=100)]

Biases = Annotated[
    dict[Id, Bias],
    BeforeValidator(lambda biases: parse_token_ids(biases)),
    Field(max_length=MAX_BIASES, json_schema_extra={'propertyNames': {'pattern': '^[0-9]+$'}}),
]


def bounded(low=None, high=None, above=None, kind: type = float):
    limits = {'ge': low, 'gt': above, 'le': high}
    return Annotated[kind, Field(**{k: v for k, v in limits.items() if v is not None})]


def nullable(text: str):
    """A field that may be omitted or null, which mean the same."""
    return Field(None, description=text)


def parse_token_ids(biases: object) -> object:
    """Keys as integers. "05" stays a string and is rejected: it would collide with "5"."""
    if not isinstance(biases, dict):
        return biases
    canonical = re.compile('-?(0|[1-9][0-9]{0,9})')
    return {int(i) if canonical.fullmatch(str(i)) else i: bias for i, bias in biases.items()}


Grammars = list[tuple[str, object]]  # (kind, source), see inference/grammar.py
ANY_OBJECT = {'type': 'object'}
GUIDED_FIELDS = {  # vLLM's name: the kind of the grammar
    'guided_json': 'json_schema',
    'guided_regex': 'regex',
    'guided_choice': 'choice',
    'guided_grammar': 'grammar',
}


class StreamOptions(Body):
    include_usage: bool | None = nullable('Report the number of tokens in a last event.')
    continuous_usage_stats: unsupported_field(False) = None
    include_obfuscation: ignored_field() = None


class JsonSchema(Body):
    name: str | None = nullable('Ignored.')
    description: str | None = nullable('Ignored.')
    schema_: dict[str, Any] | None = Field(None, alias='schema', description='The schema.')
    strict: bool | None = nullable('Ignored: a schema is always followed.')


class ResponseFormat(Body):
    type: Literal['text', 'json_object', 'json_schema']
    json_schema: JsonSchema | None = nullable('With the type json_schema.')

    @field_validator('json_schema')
    def check_type(cls, value: JsonSchema | None, info: ValidationInfo):
        if value and info.data.get('type') not in (None, 'json_schema'):
            raise field_error('needs "type": "json_schema"')
        return value

    def grammars(self) -> Grammars:
        """The grammar of this format, if it needs one: see Options.grammars()."""
        if self.type == 'json_schema':
            schema = self.json_schema and self.json_schema.schema_
            return [('json_schema', schema or {})]
        return [('json_schema', ANY_OBJECT)] if self.type == 'json_object' else []


Choices = Annotated[list[str], Field(min_length=1, max_length=4096, fail_fast=True)]


class StructuredOutputs(Body):
    """The grammar of a completion, by vLLM's names. Only one may be given."""

    json_: dict[str, Any] | str | None = Field(None, alias='json', description='A JSON schema.')
    regex: str | None = nullable("In the syntax of Rust's regex.")
    choice: Choices | None = nullable('One of these.')
    grammar: str | None = nullable('In Lark or GBNF.')
    json_object: bool | None = nullable('true: any JSON object.')

    def grammars(self) -> Grammars:
        given = {'json_schema': self.json_, 'regex': self.regex, 'choice': self.choice}
        given |= {'grammar': self.grammar}
        found = [(kind, source) for kind, source in given.items() if source is not None]
        return found + [('json_schema', ANY_OBJECT)] * bool(self.json_object)


class Options(Unsupported):
    """The fields that completions and chat completions share."""

    model: str | None = nullable('The base model or an adapter; ignored if it has none.')
    n: bounded(1, 2**16, kind=int) | None = nullable('Completions per prompt (default 1).')
    max_tokens: bounded(0, 2**31, kind=int) | None = nullable('Maximum tokens in a completion.')
    stream: bool | None = nullable('Stream the completion as server-sent events.')
    stream_options: StreamOptions | None = nullable('Options for streams.')
    stop: Stop | Stops | None = nullable('Stop before this string, or before any of these.')
    seed: bounded(-(2**63), 2**63 - 1, kind=int) | None = nullable(
        'The same seed gives the same completion. Without one, or with -1, it is random.'
    )
    temperature: bounded(0, 1e6) | None = nullable(
        '0 always picks the most likely token (default 1).'
    )
    top_p: bounded(above=0, high=1) | None = nullable(
        'Sample from the most likely tokens whose probabilities add up to this (default 1).'
    )
    top_k: bounded(-1, 2**31, kind=int) | None = nullable(
        'Sample from this many of the most likely tokens (default 0, like -1: all).'
    )
    min_p: bounded(0, 1) | None = nullable(
        "Exclude tokens below this fraction of the most likely token's probability (default 0)."
    )
    repetition_penalty: bounded(0.01, 100) | None = nullable(
        'Above 1 makes tokens of the prompt and the completion less likely (default 1).'
    )
    frequency_penalty: bounded(-100, 100) | None = nullable(
        "Subtracted from a token's logit for each occurrence in the completion (default 0)."
    )
    presence_penalty: bounded(-100, 100) | None = nullable(
        'Subtracted once if the completion has the token (default 0).'
    )
    logit_bias: Biases | None = nullable('Token id -> number added to its logit.')
    response_format: ResponseFormat | None = nullable('The format of each completion.')
    structured_outputs: StructuredOutputs | None = nullable('The grammar of each completion.')
    guided_json: dict[str, Any] | str | None = nullable('A JSON schema for each completion.')
    guided_regex: str | None = nullable('Its regular expression.')
    guided_choice: Choices | None = nullable('Its choices.')
    guided_grammar: str | None = nullable('Its grammar, in Lark or GBNF.')
    best_of: bounded(1, 2**16, kind=int) | None = nullable('Not supported: must be 1 or n.')

    @field_validator('best_of')
    def check_best_of(cls, value: int | None, info: ValidationInfo):
        if value not in (None, 1, info.data.get('n')):
            raise field_error('this server does not support it; omit it, or give 1 or n')
        return value

    def grammars(self) -> list[tuple[str, str, object]]:
        """(field, kind, source) of each grammar that is given; see Grammars.compile()."""
        found = []
        for field in ('response_format', 'structured_outputs'):
            value = getattr(self, field)
            found += [(field, *each) for each in value.grammars()] if value else []
        for field, kind in GUIDED_FIELDS.items():
            value = getattr(self, field)
            found += [] if value is None else [(field, kind, value)]
        return found

    def sampling(self) -> SamplingParams:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        params = {
            'max_new_tokens': self.max_tokens,
            'top_k': None if self.top_k is None else max(self.top_k, 0),
            'logit_bias': tuple((self.logit_bias or {}).items()),
            'stop': stop,
            **{name: getattr(self, name) for name in SAME_NAMES},
        }
        return SamplingParams(
            **{name: value for name, value in params.items() if value is not None}
        )


class CompletionRequest(Options):
    model_config = ConfigDict(
        json_schema_extra={
            'examples': [
                {'prompt': 'To be, or not', 'max_tokens': 32, 'temperature': 0.8, 'seed': 1},
                {'prompt': ['One', 'Two'], 'n': 2, 'stop': ['\n\n'], 'stream': True},
                {'prompt': [[1, 2, 3]], 'max_tokens': 0, 'echo': True, 'logprobs': 1},
            ]
        }
    )
    prompt: Text | Texts | Ids | Prompts = Field(
        description='A string, a list of token ids, or a list of either.'
    )
    max_tokens: bounded(0, 2**31, kind=int) | None = nullable(
        'Maximum tokens in a completion (default 16). 0, with echo, only scores the prompt.'
    )
    echo: bool | None = nullable('Prepend the prompt to each completion.')
    logprobs: bounded(0, MAX_LOGPROBS, kind=int) | None = nullable(
        'Report the log-probabilities of each token and of this many of the most likely ones.'
    )

    tools: unsupported_field() = None
    tool_choice: unsupported_field('none', 'auto') = None
    parallel_tool_calls: ignored_field() = None

    def prompts(self) -> list:
        """Its prompts, each a string or token ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt


def parse_content(content: object, info: ValidationInfo) -> str | None:
    if content is None:
        if info.data.get('tool_calls'):
            return None
        raise field_error('is missing; add it')
    try:
        return content_text(content)
    except UserError as error:
        raise field_error(str(error)) from None


TEXT_PART = {
    'type': 'object',
    'properties': {
        'type': {'const': 'text'},
        'text': {'type': 'string'},
        'prompt_cache_breakpoint': {'description': 'Ignored.'},
    },
    'required': ['type', 'text'],
    'additionalProperties': False,
}
PARTS = {'type': 'array', 'items': TEXT_PART, 'minItems': 1}
CONTENT = {'anyOf': [{'type': 'string'}, PARTS, {'type': 'null'}]}


class CalledFunction(Body):
    name: Text
    arguments: str = Field(description='A JSON object.')


class ToolCall(Body):
    id: str | None = nullable('Ignored: results follow the order of their calls.')
    type: Literal['function'] = 'function'
    function: CalledFunction


class ChatMessage(Body):
    role: str
    tool_calls: list[ToolCall] | None = nullable('Of the assistant.')
    content: Annotated[Any, AfterValidator(parse_content), WithJsonSchema(CONTENT)] = Field(
        None, validate_default=True, description='May be null beside tool_calls.'
    )
    tool_call_id: str | None = nullable('Ignored: results follow the order of their calls.')
    type: unsupported_field('text', 'message') = None
    name: unsupported_field() = None
    function_call: unsupported_field() = None
    refusal: unsupported_field() = None
    audio: unsupported_field() = None
    annotations: unsupported_field() = None
    reasoning: unsupported_field() = None
    reasoning_content: unsupported_field() = None
    prefix: unsupported_field(False) = None
    id: ignored_field() = None


class Function(Body):
    name: Annotated[str, Field(pattern=r'^[\w.-]{1,64}$')]
    description: str | None = nullable('What the model reads about it.')
    parameters: dict[str, Any] | None = nullable('A JSON schema, which calls follow.')
    strict: bool | None = nullable('Ignored: a schema is always followed.')


class Tool(Body):
    type: Literal['function']
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal['function']
    function: FunctionName


class ChatRequest(Options):
    model_config = ConfigDict(
        json_schema_extra={
            'examples': [{'messages': [{'role': 'user', 'content': 'To be?'}], 'max_tokens': 32}]
        }
    )
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: bounded(1, 2**31, kind=int) | None = nullable(
        'Maximum tokens in a completion (default: as many as fit in the context).'
    )
    max_completion_tokens: bounded(1, 2**31, kind=int) | None = nullable('The same as max_tokens.')
    logprobs: bool | None = nullable('Report the log-probability of each token.')
    top_logprobs: bounded(0, MAX_LOGPROBS, kind=int) | None = nullable(
        'And of this many of the most likely ones.'
    )
    echo: unsupported_field(False) = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = nullable('Functions to call.')
    tool_choice: Literal['none', 'auto', 'required'] | NamedTool | None = nullable(
        'Whether to call a function, or which (default auto).'
    )
    parallel_tool_calls: bool | None = nullable(
        'Whether there may be several calls (default true).'
    )

    @field_validator('tool_choice')
    def check_tool_choice(cls, value: str | NamedTool | None, info: ValidationInfo):
        names = [tool.function.name for tool in info.data.get('tools') or []]
        if isinstance(value, NamedTool) and value.function.name not in names:
            raise field_error(f'there is no tool {value.function.name!r}; add it to "tools"')
        if value == 'required' and not names:
            raise field_error('needs "tools" as well')
        return value

    @property
    def calls_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != 'none'

    def tool_grammars(self) -> list[tuple[str, str, object]]:
        """The grammar of calls; see grammars()."""
        if not self.calls_tools:
            return []
        functions = [(tool.function.name, tool.function.parameters) for tool in self.tools]
        if isinstance(self.tool_choice, NamedTool):
            functions = [each for each in functions if each[0] == self.tool_choice.function.name]
        several = self.parallel_tool_calls is not False and not isinstance(
            self.tool_choice, NamedTool
        )
        required = self.tool_choice not in (None, 'auto')
        return [
            ('tools', 'tools', {'functions': functions, 'several': several, 'text': not required})
        ]

    @field_validator('max_completion_tokens')
    def check_one_limit(cls, value: int | None, info: ValidationInfo):
        if value and info.data.get('max_tokens') not in (None, value):
            raise field_error('differs from max_tokens; leave out one of them')
        return value

    @field_validator('top_logprobs')
    def check_logprobs(cls, value: int | None, info: ValidationInfo):
        if value and 'logprobs' in info.data and not info.data['logprobs']:
            raise field_error('needs "logprobs": true as well')
        return value

    def completion(self, ids: list[int], most_new: int, end: str) -> CompletionRequest:
        """The completion request for a chat: its prompt's token ids, the most new tokens that fit,
        and the stop string that ends a turn, or ''."""
        stop = [self.stop] if isinstance(self.stop, str) else [*(self.stop or [])]
        fields = {name: getattr(self, name) for name in Options.__annotations__}
        fields['max_tokens'] = self.max_completion_tokens or self.max_tokens or max(most_new, 1)
        fields['logprobs'] = (self.top_logprobs or 0) if self.logprobs else None
        # a grammar ends a turn by itself, and may have the text that ends others in its strings
        fields |= {'prompt': ids, 'stop': stop + [end] * bool(end and not self.grammars())}
        # already validated, and the end of a turn may exceed the limits for clients' stop strings
        return CompletionRequest.model_construct(**fields)


SAME_NAMES = (  # in requests and in SamplingParams
    'temperature',
    'top_p',
    'min_p',
    'repetition_penalty',
    'frequency_penalty',
    'presence_penalty',
)


class TokenizeRequest(Body):
    model_config = ConfigDict(json_schema_extra={'examples': [{'prompt': 'To be, or not'}]})
    prompt: str
    model: ignored_field() = None
    add_special_tokens: ignored_field() = None  # no tokenizer here adds any
    return_token_strs: unsupported_field(False) = None


class DetokenizeRequest(Body):
    model_config = ConfigDict(json_schema_extra={'examples': [{'tokens': [1, 2, 3]}]})
    tokens: Annotated[list[Id], Field(fail_fast=True)]
    model: ignored_field() = None


# -----------------------------------------------------------------------------
# responses


class Logprobs(BaseModel):
    """Of each token; with echo also of the prompt's, whose first token has null."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description='In nats; at least -9999.')
    top_logprobs: list[dict[str, float] | None] = Field(
        description='By token text. Incomplete UTF-8 is written as bytes:\\xe4\\xbd, and a token '
        'with the same text as another one as token_id:7.'
    )
    text_offset: list[int] = Field(description='The character at which each token begins.')


class Choice(BaseModel):
    index: int = Field(description='Prompt number * n + completion number.')
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal['stop', 'length'] | None = Field(
        description='stop: end-of-text token or stop string. null: the stream continues.'
    )


class ChatToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description='In UTF-8, perhaps a part of a character.')


class ChatScores(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    content: list[ChatScores]


class ChatCall(BaseModel):
    index: int | None = Field(None, description='In streams, which have each call as a whole.')
    id: str
    type: Literal['function']
    function: CalledFunction


class ChatText(BaseModel):
    role: Literal['assistant'] | None = None
    content: str | None = None
    tool_calls: list[ChatCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatText | None = Field(None, description='Without stream.')
    delta: ChatText | None = Field(None, description='With stream: what this event adds.')
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal['stop', 'length', 'tool_calls'] | None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """A response, or an event of a stream; if requested, the last event has the usage alone."""

    model_config = ConfigDict(
        json_schema_extra={
            'examples': [
                {
                    'id': 'cmpl-1',
                    'object': 'text_completion',
                    'created': 1764000000,
                    'model': 'mine',
                    'choices': [
                        {'index': 0, 'text': ' be', 'logprobs': None, 'finish_reason': 'length'}
                    ],
                }
            ]
        }
    )
    id: str
    object: Literal['text_completion']
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ChatResponse(BaseModel):
    """A response, or an event of a stream."""

    model_config = ConfigDict(
        json_schema_extra={
            'examples': [  # a response, and an event of a stream
                {
                    'id': 'chatcmpl-1',
                    'object': 'chat.completion',
                    'created': 1764000000,
                    'model': 'mine',
                    'choices': [
                        {
                            'index': 0,
                            'message': {'role': 'assistant', 'content': 'That is the question.'},
                            'logprobs': None,
                            'finish_reason': 'stop',
                        }
                    ],
                    'usage': {'prompt_tokens': 5, 'completion_tokens': 6, 'total_tokens': 11},
                },
                {
                    'id': 'chatcmpl-1',
                    'object': 'chat.completion.chunk',
                    'created': 1764000000,
                    'model': 'mine',
                    'choices': [
                        {
                            'index': 0,
                            'delta': {'role': 'assistant', 'content': 'That'},
                            'logprobs': None,
                            'finish_reason': 'length',
                        }
                    ],
                },
            ]
        }
    )
    id: str
    object: Literal['chat.completion', 'chat.completion.chunk']
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal['model']
    created: int
    owned_by: str
    max_model_len: int = Field(description='Maximum tokens of a prompt and its completion.')


class ModelList(BaseModel):
    object: Literal['list']
    data: list[Model]


class TokenizeResponse(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeResponse(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    name: str
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: dict[str, list[str]] | None


class Status(BaseModel):
    status: Literal['ok']


class Error(BaseModel):
    message: str
    type: str
    param: str | None = Field(description='The invalid field.')
    code: str | None


class ErrorResponse(BaseModel):
    error: Error
