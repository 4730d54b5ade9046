"""
What a client reads: the engine's pieces of text as choices of a completion or of a chat.

    builder = ChoiceBuilder(request, tokenizer, echo=False)
    choice = builder.choice(pieces)                      # whole, or what is new
"""

import codecs

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.inference.request import Request, TokenOutput

LOWEST = -9999.0  # stands for a log-probability of minus infinity, which JSON has not


class ChoiceBuilder:
    """One text of an answer: all of it, or what a frame has of it."""

    def __init__(self, request: Request, tokenizer: Tokenizer, echo: bool):
        self.request, self.tokenizer, self.echo = request, tokenizer, echo
        self.decoder, self.offset = codecs.getincrementaldecoder('utf-8')('replace'), 0

    def choice(self, pieces: list[TokenOutput]) -> dict | None:
        """The next pieces as a client reads them; None while there is nothing to read."""
        r, finish = self.request, pieces[-1].finish
        text = ''.join(piece.text for piece in pieces)
        scores = [(p.token, p.logprob, p.top) for p in pieces if p.token is not None]
        if self.echo:
            text, self.echo = self.tokenizer.decode(r.prompt) + text, False
            if r.score_prompt:
                pairs = zip(r.prompt, r.prompt_logprobs, strict=True)
                scores[:0] = [(i, *each) for i, each in pairs]
        if not (text or finish or r.top is not None):
            return None
        logprobs = None if r.top is None else self.logprobs(scores)
        said = self.said(text)
        return {'index': r.row, **said, 'logprobs': logprobs, 'finish_reason': finish}

    def said(self, text: str) -> dict:
        return {'text': text}

    def logprobs(self, scores: list[tuple]) -> dict:
        offsets = []
        for token, _, _ in scores:
            offsets.append(self.offset)
            self.offset += len(self.decoder.decode(self.tokenizer.token_bytes[token] or b''))
        return {
            'tokens': [self.text(token) for token, _, _ in scores],
            'token_logprobs': [None if p is None else max(p, LOWEST) for _, p, _ in scores],
            'top_logprobs': [None if s[1] is None else self.likeliest(*s) for s in scores],
            'text_offset': offsets,
        }

    def likeliest(self, token: int, logprob: float, top: tuple) -> dict[str, float]:
        """The likeliest tokens, and the one that was chosen under its text. Others that would read
        the same have names of their own."""
        out, own = {}, self.text(token)
        for i, p in (dict(top) | {token: logprob}).items():
            name = own if i == token else self.name(i)
            if i != token and (name in out or name == own):
                name = f'token_id:{i}'
            out[name] = max(p, LOWEST)
        return out

    def name(self, token: int) -> str:
        """A token's text; where its bytes are none by themselves, these, in OpenAI's spelling."""
        data = self.bytes_of(token)
        if data is None:
            return f'token_id:{token}'
        try:
            return data.decode()
        except UnicodeDecodeError:
            return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)

    def text(self, token: int) -> str:
        return (self.bytes_of(token) or b'').decode(errors='replace')

    def bytes_of(self, token: int) -> bytes | None:
        """None for a token that stands for nothing, as those that pad a vocabulary."""
        known = self.tokenizer.token_bytes
        return known[token] if token < len(known) else None


class ChatBuilder(ChoiceBuilder):
    """One answer of a chat, with its text as a 'message' or a 'delta'."""

    def __init__(self, part: str, *given):
        super().__init__(*given)
        self.part, self.begun = part, False

    def said(self, text: str) -> dict:
        role = {} if self.begun else {'role': 'assistant'}  # the first frame says who speaks
        self.begun = True
        return {self.part: {**role, 'content': text}}

    def logprobs(self, scores: list[tuple]) -> dict:
        def one(token: int, logprob: float) -> dict:
            data = self.bytes_of(token)
            return {
                'token': self.text(token),
                'logprob': max(logprob, LOWEST),
                'bytes': None if data is None else list(data),
            }

        return {
            'content': [
                {**one(token, logprob), 'top_logprobs': [one(*other) for other in top]}
                for token, logprob, top in scores
            ]
        }
