"""
The choices of a completion or a chat completion, built from the engine's outputs.

    builder = ChoiceBuilder(request, tokenizer, echo=False)
    choice = builder.choice(outputs)                     # all of it, or what a stream adds
"""

import codecs
import secrets

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.data.tools import Call, CallParser
from flatgpt.inference.request import Request, TokenOutput

MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot express


class ChoiceBuilder:
    """One choice of a response, or its part in each event of a stream."""

    def __init__(self, request: Request, tokenizer: Tokenizer, echo: bool):
        self.request, self.tokenizer, self.echo = request, tokenizer, echo
        self.decoder, self.offset = codecs.getincrementaldecoder('utf-8')('replace'), 0

    def choice(self, outputs: list[TokenOutput]) -> dict | None:
        """The choice with the next outputs; None if they add nothing that a client sees."""
        r, finish = self.request, outputs[-1].finish_reason
        text = ''.join(output.text for output in outputs)
        scores = [(o.token, o.logprob, o.top_logprobs) for o in outputs if o.token is not None]
        if self.echo:
            text, self.echo = self.tokenizer.decode(r.prompt) + text, False
            if r.score_prompt:
                pairs = zip(r.prompt, r.prompt_logprobs, strict=True)
                scores[:0] = [(i, *each) for i, each in pairs]
        if not (text or finish or r.top_logprobs is not None):
            return None
        logprobs = None if r.top_logprobs is None else self.logprobs(scores)
        fields = self.text_fields(text)
        return {'index': r.index, **fields, 'logprobs': logprobs, 'finish_reason': finish}

    def text_fields(self, text: str) -> dict:
        return {'text': text}

    def logprobs(self, scores: list[tuple]) -> dict:
        offsets = []
        for token, _, _ in scores:
            offsets.append(self.offset)
            self.offset += len(self.decoder.decode(self.tokenizer.token_bytes[token] or b''))
        return {
            'tokens': [self.token_text(token) for token, _, _ in scores],
            'token_logprobs': [None if p is None else max(p, MIN_LOGPROB) for _, p, _ in scores],
            'top_logprobs': [None if s[1] is None else self.top_logprobs(*s) for s in scores],
            'text_offset': offsets,
        }

    def top_logprobs(self, token: int, logprob: float, top: tuple) -> dict[str, float]:
        """The log-probabilities of the most likely tokens and of the chosen one, by token text.

        Other tokens with the same text get unique keys.
        """
        out, chosen = {}, self.token_text(token)
        for i, p in (dict(top) | {token: logprob}).items():
            key = chosen if i == token else self.token_key(i)
            if i != token and (key in out or key == chosen):
                key = f'token_id:{i}'
            out[key] = max(p, MIN_LOGPROB)
        return out

    def token_key(self, token: int) -> str:
        """A token's text; for incomplete UTF-8 its bytes, spelled as OpenAI's API does."""
        data = self.token_bytes(token)
        if data is None:
            return f'token_id:{token}'
        try:
            return data.decode()
        except UnicodeDecodeError:
            return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)

    def token_text(self, token: int) -> str:
        return (self.token_bytes(token) or b'').decode(errors='replace')

    def token_bytes(self, token: int) -> bytes | None:
        """A token's bytes; None for a token without text, such as one that pads a vocabulary."""
        table = self.tokenizer.token_bytes
        return table[token] if token < len(table) else None


class ChatBuilder(ChoiceBuilder):
    """One choice of a chat completion: part is 'message', or 'delta' in a stream."""

    def __init__(self, part: str, *args):
        super().__init__(*args)
        self.part, self.begun = part, False

    def text_fields(self, text: str) -> dict:
        role = {} if self.begun else {'role': 'assistant'}  # only in a stream's first event
        self.begun = True
        return {self.part: {**role, 'content': text}}

    def logprobs(self, scores: list[tuple]) -> dict:
        def one(token: int, logprob: float) -> dict:
            data = self.token_bytes(token)
            return {
                'token': self.token_text(token),
                'logprob': max(logprob, MIN_LOGPROB),
                'bytes': None if data is None else list(data),
            }

        return {
            'content': [
                {**one(token, logprob), 'top_logprobs': [one(*other) for other in top]}
                for token, logprob, top in scores
            ]
        }


class ToolBuilder(ChatBuilder):
    """A choice of a chat with tools, whose calls are taken from the text.

    In a stream, each call comes as a whole.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.parser, self.calls, self.final = CallParser(), 0, False

    def choice(self, outputs: list[TokenOutput]) -> dict | None:
        self.final = outputs[-1].finish_reason is not None
        choice = super().choice(outputs)
        if choice and self.calls and choice['finish_reason'] == 'stop':
            choice['finish_reason'] = 'tool_calls'
        # text that may be the beginning of a call is held back
        held = choice and choice[self.part] == {'content': ''}
        return None if held and not (self.final or choice['logprobs']) else choice

    def text_fields(self, text: str) -> dict:
        content, calls = self.parser.feed(text, self.final)
        fields = super().text_fields(content)
        if calls:
            fields[self.part]['tool_calls'] = [self.call(each) for each in calls]
        if calls and not content and self.part == 'message':
            fields[self.part]['content'] = None
        return fields

    def call(self, call: Call) -> dict:
        function = {'name': call.name, 'arguments': call.arguments}
        index = {} if self.part == 'message' else {'index': self.calls}
        self.calls += 1
        return {
            **index,
            'id': f'call_{secrets.token_hex(12)}',
            'type': 'function',
            'function': function,
        }
