"""
What clients send to api.py and what it answers, as pydantic models.

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
from pydantic_core import PydanticCustomError

from flatgpt.data.messages import content_text
from flatgpt.errors import UserError
from flatgpt.inference.sampling import SamplingParams
from flatgpt.serving.unsupported import Body, Unsupported, ignored, only

MOST_STOPS, LONGEST_STOP = 128, 512  # each is looked for after every token
MOST_BIASES = 1024
MOST_LOGPROBS = 20

Id = Annotated[int, Field(ge=0, le=2**31)]
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Id], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[list[Ids], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Stops = Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)]
Bias = Annotated[float, Field(ge=-100, le=100)]

Biases = Annotated[
    dict[Id, Bias],
    BeforeValidator(lambda biases: one_spelling(biases)),
    Field(max_length=MOST_BIASES, json_schema_extra={'propertyNames': {'pattern': '^[0-9]+$'}}),
]


def number(low=None, high=None, above=None, kind: type = float):
    limits = {'ge': low, 'gt': above, 'le': high}
    return Annotated[kind, Field(**{k: v for k, v in limits.items() if v is not None})]


def about(text: str):
    """A field that may be left out or null, which mean the same."""
    return Field(None, description=text)


def refuse(message: str) -> PydanticCustomError:
    return PydanticCustomError('refused', '{message}', {'message': message})


def one_spelling(biases: object) -> object:
    """Token ids as numbers; "05" is left as text, and so refused: "5" could be another bias."""
    if not isinstance(biases, dict):
        return biases
    usual = re.compile('-?(0|[1-9][0-9]{0,9})')
    return {int(i) if usual.fullmatch(str(i)) else i: bias for i, bias in biases.items()}


class StreamOptions(Body):
    include_usage: bool | None = about('Send a last frame with the number of tokens.')
    continuous_usage_stats: only(False) = None
    include_obfuscation: ignored() = None


class Options(Unsupported):
    """What a request for a text says of how it is written."""

    model: str | None = about('There is one; its name is not looked at.')
    n: number(1, 2**16, kind=int) | None = about('Texts for each prompt (default 1).')
    max_tokens: number(0, 2**31, kind=int) | None = about('New tokens in each text at most.')
    stream: bool | None = about('Send text as it is written, as server-sent events.')
    stream_options: StreamOptions | None = about('Of a stream.')
    stop: Stop | Stops | None = about('End a text before this string, or any of these.')
    seed: number(-(2**63), 2**63 - 1, kind=int) | None = about(
        'The same seed gives the same text. Without one, or with -1, every answer is another.'
    )
    temperature: number(0, 1e6) | None = about('0 takes the likeliest token (default 1).')
    top_p: number(above=0, high=1) | None = about(
        'Choose among the likeliest tokens that make up this share (default 1).'
    )
    top_k: number(-1, 2**31, kind=int) | None = about(
        'Choose among this many likeliest tokens (default 0, or -1: all).'
    )
    min_p: number(0, 1) | None = about(
        "Leave out tokens less likely than this share of the likeliest one's probability."
    )
    repetition_penalty: number(0.01, 100) | None = about(
        'Above 1 disfavours what prompt or text already have (default 1).'
    )
    frequency_penalty: number(-100, 100) | None = about(
        "Taken off a token's logit for each time the text has it (default 0)."
    )
    presence_penalty: number(-100, 100) | None = about('And once, if it has it (default 0).')
    logit_bias: Biases | None = about('What is added to the logits of some token ids.')
    best_of: number(1, 2**16, kind=int) | None = about('Not supported: must be 1, or n.')

    @field_validator('best_of')
    def check_best_of(cls, value: int | None, info: ValidationInfo):
        if value not in (None, 1, info.data.get('n')):
            raise refuse('this server does not choose among texts; leave it out, or give 1 or n')
        return value

    def sampling(self) -> SamplingParams:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        chosen = {
            'max_new_tokens': self.max_tokens,
            'top_k': None if self.top_k is None else max(self.top_k, 0),
            'logit_bias': tuple((self.logit_bias or {}).items()),
            'stop': stop,
            **{name: getattr(self, name) for name in ALIKE},
        }
        return SamplingParams(
            **{name: value for name, value in chosen.items() if value is not None}
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
        description='A text, several, the token ids of one, or of several.'
    )
    max_tokens: number(0, 2**31, kind=int) | None = about(
        'New tokens in each text at most (default 16). 0, together with echo, scores the prompt.'
    )
    echo: bool | None = about('Begin each text with its prompt.')
    logprobs: number(0, MOST_LOGPROBS, kind=int) | None = about(
        "Report each token's log-probability, and those of so many likeliest ones."
    )

    def prompts(self) -> list:
        """Its prompts, each a text or token ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt


def as_text(content: object) -> str:
    try:
        return content_text(content)
    except UserError as error:
        raise refuse(str(error)) from None


PART = {
    'type': 'object',
    'properties': {'type': {'const': 'text'}, 'text': {'type': 'string'}},
    'required': ['type', 'text'],
    'additionalProperties': False,
}
PARTS = {'anyOf': [{'type': 'string'}, {'type': 'array', 'items': PART, 'minItems': 1}]}


class Message(Body):
    role: str
    content: Annotated[Any, AfterValidator(as_text), WithJsonSchema(PARTS)]
    type: only('text', 'message') = None
    name: only() = None
    tool_calls: only() = None
    tool_call_id: only() = None
    function_call: only() = None
    refusal: only() = None
    audio: only() = None
    annotations: only() = None
    reasoning: only() = None
    reasoning_content: only() = None
    prefix: only(False) = None
    id: ignored() = None


class ChatRequest(Options):
    model_config = ConfigDict(
        json_schema_extra={
            'examples': [{'messages': [{'role': 'user', 'content': 'To be?'}], 'max_tokens': 32}]
        }
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: number(1, 2**31, kind=int) | None = about(
        'New tokens in each text at most (default: what the context holds).'
    )
    max_completion_tokens: number(1, 2**31, kind=int) | None = about('Another name of it.')
    logprobs: bool | None = about("Report each token's log-probability.")
    top_logprobs: number(0, MOST_LOGPROBS, kind=int) | None = about('And so many likeliest ones.')
    echo: only(False) = None

    @field_validator('max_completion_tokens')
    def check_one_limit(cls, value: int | None, info: ValidationInfo):
        if value and info.data.get('max_tokens') not in (None, value):
            raise refuse('max_tokens is another number; leave out one of them')
        return value

    @field_validator('top_logprobs')
    def check_logprobs(cls, value: int | None, info: ValidationInfo):
        if value and 'logprobs' in info.data and not info.data['logprobs']:
            raise refuse('needs "logprobs": true')
        return value

    def completion(self, ids: list[int], room: int, end: str) -> CompletionRequest:
        """The same as a completion of token ids, for which there is room; end: of a turn."""
        stop = [self.stop] if isinstance(self.stop, str) else [*(self.stop or [])]
        fields = {name: getattr(self, name) for name in Options.__annotations__}
        fields['max_tokens'] = self.max_completion_tokens or self.max_tokens or max(room, 1)
        fields['logprobs'] = (self.top_logprobs or 0) if self.logprobs else None
        fields |= {'prompt': ids, 'stop': stop + [end] * bool(end)}
        # checked already; and the end of a turn may be one stop more, or longer, than clients may
        return CompletionRequest.model_construct(**fields)


ALIKE = (  # in a request and in SamplingParams
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
    model: ignored() = None
    add_special_tokens: ignored() = None  # there are none that a tokenizer here would add
    return_token_strs: only(False) = None


class DetokenizeRequest(Body):
    model_config = ConfigDict(json_schema_extra={'examples': [{'tokens': [1, 2, 3]}]})
    tokens: Annotated[list[Id], Field(fail_fast=True)]
    model: ignored() = None


# -----------------------------------------------------------------------------
# answers


class Logprobs(BaseModel):
    """Of each token, of the prompt's too with echo; the first has nothing to be likely after."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description='In nats; at least -9999.')
    top_logprobs: list[dict[str, float] | None] = Field(
        description='By text. What is no text by itself is named by its bytes, bytes:\\xe4\\xbd, '
        'what would read as another by its id, token_id:7.'
    )
    text_offset: list[int] = Field(description='The character of the text where it begins.')


class Choice(BaseModel):
    index: int = Field(description='Number of the prompt times n, plus number of its text.')
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal['stop', 'length'] | None = Field(
        description='stop: the end of text, or a stop string. null: more of it will follow.'
    )


class ChatToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description='Its own, which may be half a character.')


class ChatScores(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    content: list[ChatScores]


class ChatText(BaseModel):
    role: Literal['assistant'] | None = None
    content: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatText | None = Field(None, description='Of a whole answer.')
    delta: ChatText | None = Field(None, description='Of a frame: what is new.')
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal['stop', 'length'] | None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """An answer, or a frame of a streamed one; its last has no choices but the usage, if asked."""

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
    """An answer, or a frame of a streamed one."""

    model_config = ConfigDict(
        json_schema_extra={
            'examples': [  # whole, and a frame of a stream
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
    max_model_len: int = Field(description='Tokens of prompt and text together at most.')


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
    param: str | None = Field(description='The field that is wrong.')
    code: str | None


class ErrorResponse(BaseModel):
    error: Error
