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
                scores[:0] = [(i, *each) for i, each in zip(r.prompt, r.prompt_scores, strict=True)]
        if not (text or finish or r.top is not None):
            return None
        logprobs = None if r.top is None else self.logprobs(scores)
        return {'index': r.row, 'text': text, 'logprobs': logprobs, 'finish_reason': finish}

    def logprobs(self, scores: list[tuple]) -> dict:
        offsets = []
        for token, _, _ in scores:
            offsets.append(self.offset)
            self.offset += len(self.decoder.decode(self.tokenizer.token_bytes[token] or b''))
        return {
            'tokens': [self.tokenizer.decode([token]) for token, _, _ in scores],
            'token_logprobs': [None if p is None else max(p, LOWEST) for _, p, _ in scores],
            'top_logprobs': [None if s[1] is None else self.likeliest(*s) for s in scores],
            'text_offset': offsets,
        }

    def likeliest(self, token: int, logprob: float, top: tuple) -> dict[str, float]:
        out: dict[str, float] = {}
        for i, p in (*top, (token, logprob)):  # several tokens may read alike
            text = self.tokenizer.decode([i])
            out[text] = max(p, out.get(text, LOWEST))
        return out


class Chat:
    """Choices of completions as those of a chat, with their text as a 'message' or a 'delta'."""

    def __init__(self, part: str):
        self.part, self.begun = part, set()

    def __call__(self, choice: dict) -> dict:
        index, scores = choice['index'], choice['logprobs']
        text = {'content': choice['text']}
        if index not in self.begun:  # the first frame says who speaks
            self.begun.add(index)
            text = {'role': 'assistant', **text}
        logprobs = None if scores is None else {'content': self.tokens(scores)}
        finish = choice['finish_reason']
        return {'index': index, self.part: text, 'logprobs': logprobs, 'finish_reason': finish}

    def tokens(self, scores: dict) -> list[dict]:
        def one(text: str, logprob: float) -> dict:
            return {'token': text, 'logprob': logprob, 'bytes': list(text.encode())}

        each = (scores[name] for name in ('tokens', 'token_logprobs', 'top_logprobs'))
        return [
            {**one(text, logprob), 'top_logprobs': [one(*other) for other in top.items()]}
            for text, logprob, top in zip(*each, strict=True)
        ]
