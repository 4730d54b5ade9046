"""A request: its prompt, its sampling parameters, and its completion so far."""

import codecs
import functools
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.inference.grammar import Grammar
from flatgpt.inference.sampling import SamplingParams


class TokenOutput(NamedTuple):
    """The next token of a request."""

    index: int  # of the request among the caller's
    token: int | None  # its id; None: the request ended without one
    text: str  # text to show now: often the token's, '' while a possible stop string is held back
    # 'stop' (end of text, stop string), 'length', 'cancelled' or 'error'
    finish_reason: str | None = None
    # of the token, in nats, before penalties and filters; if requested
    logprob: float | None = None
    top_logprobs: tuple = ()  # the most likely tokens, (id, logprob), if requested
    problem: str = ''  # why it is 'error': of the grammar, or '' if the logits are not finite


class StopString:
    """Searches streamed text for a string in linear time (Knuth, Morris, Pratt 1977)."""

    def __init__(self, text: str):
        self.text, self.borders, self.matched = text, borders(text), 0

    def find(self, new: str) -> int | None:
        """Where the string begins, relative to `new` (negative: before it); None if not found.

        Afterwards the last `matched` characters are a prefix of the string.
        """
        if not self.matched and self.text[0] not in new:
            return None
        for at, character in enumerate(new, 1):
            while self.matched and self.text[self.matched] != character:
                self.matched = self.borders[self.matched - 1]
            self.matched += self.text[self.matched] == character
            if self.matched == len(self.text):
                self.matched = 0
                return at - len(self.text)
        return None


@functools.lru_cache(1024)
def borders(text: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    out = [0] * len(text)
    length = 0
    for at in range(1, len(text)):
        while length and text[at] != text[length]:
            length = out[length - 1]
        length += text[at] == text[length]
        out[at] = length
    return out


class TextStream:
    """Bytes in, text out: complete characters, and nothing that may become a stop string."""

    def __init__(self, stop: tuple[str, ...]):
        self.stop = [StopString(text) for text in stop]
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.held: deque[str] = deque()
        self.length = 0  # of what is held

    def add(self, data: bytes, final: bool) -> tuple[str, bool]:
        """Text to show now, and whether a stop string ended it. final: no bytes follow."""
        new, before = self.decoder.decode(data, final), self.length
        self.held.append(new)
        self.length += len(new)
        found = [at for each in self.stop if (at := each.find(new)) is not None]
        if found:
            return self.release(before + min(found)), True
        kept = 0 if final else max((each.matched for each in self.stop), default=0)
        return self.release(self.length - kept), False

    def release(self, count: int) -> str:
        """The first `count` characters held."""
        parts, self.length = [], self.length - count
        while count:
            part = self.held.popleft()
            if len(part) > count:
                self.held.appendleft(part[count:])
                part = part[:count]
            parts.append(part)
            count -= len(part)
        return ''.join(parts)


class Request:
    """A prompt to complete, and its completion so far.

    prompt: token ids, at least one; the last block_size of them count. on_token: called with each
    TokenOutput, in the thread that runs the engine. seed: of the random numbers, by default
    (sampling.seed, index). top_logprobs: return log-probabilities, of each token and of this many
    most likely ones; None: neither. score_prompt: compute prompt_logprobs, too. grammar: of the
    completion, which ends with it. adapter: of the engine, None for the base model.
    """

    def __init__(
        self,
        prompt,
        sampling: SamplingParams,
        on_token: Callable[[TokenOutput], None],
        index: int = 0,
        seed=None,
        top_logprobs: int | None = None,
        score_prompt: bool = False,
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ):
        self.prompt, self.sampling, self.on_token = list(map(int, prompt)), sampling, on_token
        assert self.prompt, 'the prompt is empty'
        self.index, self.top_logprobs, self.score_prompt = index, top_logprobs, score_prompt
        self.adapter = adapter
        self.random = np.random.default_rng((sampling.seed, index) if seed is None else seed)
        self.uniforms: list[np.float32] = []  # of its tokens, as far as they were needed
        self.stream = TextStream(sampling.stop)
        self.grammar = grammar.start() if grammar else None  # how far the completion is in it
        self.output_ids: list[int] = []
        self.counts: Counter[int] = Counter()  # of the tokens in `output_ids`, for penalties
        self.prompt_logprobs: list[tuple] = [(None, ())]  # (logprob, top_logprobs) per token
        self.cancelled = False
        self.finish_reason: str | None = None
        self.arrival_time = time.monotonic()
        self.admitted_time = self.first_token_time = self.finish_time = None

    @functools.cached_property
    def prompt_tokens(self) -> frozenset[int]:
        """The prompt's distinct tokens."""
        return frozenset(self.prompt)

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether its prompt's log-probabilities are still to be computed."""
        return self.score_prompt and not self.output_ids

    @property
    def tokens_left(self) -> int:
        """How many tokens it may still get."""
        return self.sampling.max_new_tokens - len(self.output_ids)

    def uniform(self, ahead: int = 0) -> np.float32:
        """The random number of its next token, or of the token `ahead` positions later."""
        at = len(self.output_ids) + ahead
        while len(self.uniforms) <= at:
            self.uniforms.append(self.random.random(dtype=np.float32))
        return self.uniforms[at]

    def cancel(self) -> None:
        """Make the engine drop it before its next step. From any thread, at any time."""
        self.cancelled = True

    def ended_by_prompt(self) -> str | None:
        """The reason to finish right after the prompt, None if a token follows."""
        if self.output_ids:
            return None
        if not all(math.isfinite(score) for score, _ in self.prompt_logprobs[1:]):
            return 'error'
        return 'length' if self.sampling.max_new_tokens == 0 else None

    def append_token(
        self, token: int, tokenizer: Tokenizer, logprob=None, top_logprobs=()
    ) -> TokenOutput:
        """Add a sampled token to the completion -> its output."""
        if token < 0:  # logits that are not finite: in float16 it depends on the prompt
            problem = self.grammar.problem if self.grammar else ''
            return TokenOutput(self.index, None, '', 'error', problem=problem)
        self.output_ids.append(token)
        self.counts[token] += 1
        last = len(self.output_ids) == self.sampling.max_new_tokens
        end = token in tokenizer.stop_ids
        complete = end or bool(self.grammar and self.grammar.accept(token))
        new = b'' if end else tokenizer.token_bytes[token]
        text, stopped = self.stream.add(new, final=complete or last)
        finish_reason = 'stop' if complete or stopped else 'length' if last else None
        return TokenOutput(self.index, token, text, finish_reason, logprob, top_logprobs)

    def emit(self, output: TokenOutput) -> None:
        """Call on_token, and record the time."""
        now = time.monotonic()
        self.first_token_time = self.first_token_time or now
        if output.finish_reason:
            # other threads read them in this order
            self.finish_time, self.finish_reason = now, output.finish_reason
        self.on_token(output)
