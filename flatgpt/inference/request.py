"""A text to continue: its prompt, how it is asked for, and what has been written of it."""

import codecs
import functools
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.inference.sampling import SamplingParams


class TokenOutput(NamedTuple):
    """One more token of one text."""

    row: int  # place of its prompt among those of its caller
    token: int | None  # its id, that of an end if that ended the text; None: no more came
    text: str  # what may be shown now: often the token's text, '' while something is held back
    finish: str | None = None  # 'stop' (end of text, stop string), 'length', 'cancelled', 'error'
    logprob: float | None = None  # of the token, in nats, before any rule; where asked for
    top: tuple = ()  # the likeliest tokens there, (id, logprob), where asked for


class StopString:
    """Looks for a string in text that comes piece by piece (Knuth, Morris, Pratt 1977).

    Each character is looked at once, however long the string is: comparing the end of the text
    with every beginning of the string would take the square of its length.
    """

    def __init__(self, text: str):
        self.text, self.borders, self.matched = text, borders(text), 0

    def find(self, new: str) -> int | None:
        """Where the string begins, from the start of `new` (negative: before it), once it is whole.

        Afterwards the last `matched` characters are how it begins.
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
    """For each beginning of a text, how much of it is also its end (but not all of it)."""
    out = [0] * len(text)
    length = 0
    for at in range(1, len(text)):
        while length and text[at] != text[length]:
            length = out[length - 1]
        length += text[at] == text[length]
        out[at] = length
    return out


class TextStream:
    """Bytes in, text out: whole characters only, and nothing that may yet become a stop string."""

    def __init__(self, stop: tuple[str, ...]):
        self.stop = [StopString(text) for text in stop]
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.held: deque[str] = deque()
        self.length = 0  # of what is held

    def add(self, data: bytes, final: bool) -> tuple[str, bool]:
        """Text to show now, and whether a stop string ended it. final: nothing follows."""
        new, before = self.decoder.decode(data, final), self.length
        self.held.append(new)
        self.length += len(new)
        found = [at for each in self.stop if (at := each.find(new)) is not None]
        if found:
            return self.release(before + min(found)), True
        kept = 0 if final else max((each.matched for each in self.stop), default=0)
        return self.release(self.length - kept), False

    def release(self, count: int) -> str:
        """The first characters of what is held."""
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
    """A text to continue, and what has become of it so far.

    prompt: token ids, at least one; the last block_size of them count. on_token: is given each
    TokenOutput as it comes, in the thread that runs the engine. seed: of the random numbers, by
    default sampling.seed and row. top: report each token's log-probability, and those of so many
    likeliest ones; None: no. score_prompt: the prompt's, too, in prompt_logprobs.
    """

    def __init__(
        self,
        prompt,
        sampling: SamplingParams,
        on_token: Callable[[TokenOutput], None],
        row: int = 0,
        seed=None,
        top: int | None = None,
        score_prompt: bool = False,
    ):
        self.prompt, self.sampling, self.on_token = list(map(int, prompt)), sampling, on_token
        assert self.prompt, 'there is nothing to continue'
        self.row, self.top, self.score_prompt = row, top, score_prompt
        self.random = np.random.default_rng((sampling.seed, row) if seed is None else seed)
        self.stream = TextStream(sampling.stop)
        self.written: list[int] = []
        self.counts: Counter[int] = Counter()  # of each token in it: what penalties look at
        self.prompt_logprobs: list[tuple] = [(None, ())]  # (logprob, top) per token
        self.cancelled = False
        self.finish: str | None = None
        self.arrival_time = time.monotonic()
        self.admitted_time = self.first_token_time = self.finish_time = None

    @functools.cached_property
    def prompt_tokens(self) -> frozenset[int]:
        """The tokens that its prompt has, each once."""
        return frozenset(self.prompt)

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of its prompt are to be computed now."""
        return self.score_prompt and not self.written

    def cancel(self) -> None:
        """Have the engine drop it before its next step. From any thread, at any time."""
        self.cancelled = True

    def ended_by_prompt(self) -> str | None:
        """Why no token follows the prompt, if none does."""
        if self.written:
            return None
        if not all(math.isfinite(score) for score, _ in self.prompt_logprobs[1:]):
            return 'error'
        return 'length' if self.sampling.max_new_tokens == 0 else None

    def take(self, token: int, tokenizer: Tokenizer, logprob=None, top=()) -> TokenOutput:
        """The output that a sampled token makes."""
        if token < 0:  # no finite logits, as float16 may have after one prompt and not others
            return TokenOutput(self.row, None, '', 'error')
        self.written.append(token)
        self.counts[token] += 1
        last, end = len(self.written) == self.sampling.max_new_tokens, token in tokenizer.ends
        text, stopped = self.stream.add(b'' if end else tokenizer.token_bytes[token], end or last)
        finish = 'stop' if end or stopped else 'length' if last else None
        return TokenOutput(self.row, token, text, finish, logprob, top)

    def send(self, output: TokenOutput) -> None:
        now = time.monotonic()
        self.first_token_time = self.first_token_time or now
        if output.finish:
            # other threads read them in this order
            self.finish_time, self.finish = now, output.finish
        self.on_token(output)
