"""
Lossless speculation: guess the next tokens of a text, and compute them all in one forward pass.

    engine = Engine(model, tokenizer, draft=NGRAM)           # guesses from the text itself
    engine = Engine(model, tokenizer, draft=small_model)     # by a model with the same tokenizer

Each token is drawn by one random number of its own, so a guess is right if the same number draws it
(model_runner.py), and the text is the one without guesses. The method is that of Leviathan et al.
2023 ("Fast Inference from Transformers via Speculative Decoding"), with random numbers that are
shared instead of a rejection step.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.inference.model_runner import ModelRunner, take_rows
from flatgpt.inference.request import Request
from flatgpt.inference.scheduler import common_prefix
from model import GPT

NGRAM = 'ngram'

MAX_PASS_TOKENS = 32  # tokens of a pass with guesses: beyond, a guess costs as much as a row
MAX_GUESSES = 12  # per request and pass
FIRST_GUESSES = 3
MAX_PAUSE = 64  # occasions
PREFILL_TOKENS = 256  # of a prompt, per pass of a draft model
# lengths of the n-grams that are looked up: long ones find the passage that is copied, short ones
# find it again soon after a change
NGRAM_SIZES = (6, 3)


class Pace:
    """How many tokens to guess next, and when: decided by how many were right so far.

    Guesses that are all right double the number, others lower it. If fewer than half are right, it
    pauses, each time twice as long: a text that cannot be guessed is soon computed as if there were
    no draft.
    Only counts decide, no times, so that a text is computed in the same way on each occasion.
    """

    def __init__(self):
        self.count, self.pause, self.wait = FIRST_GUESSES, 1, 0

    def next_count(self) -> int:
        """How many tokens to guess now."""
        if self.wait:
            self.wait -= 1
            return 0
        return self.count

    def record(self, guessed: int, right: int) -> None:
        if right == guessed:
            self.count, self.pause = min(max(self.count, 2 * guessed), MAX_GUESSES), 1
        elif 2 * right >= guessed:
            self.count, self.pause = max(right, 2), 1
        else:
            self.count = max(1, self.count // 2)
            self.wait, self.pause = self.pause, min(2 * self.pause, MAX_PAUSE)


class NGrams:
    """Guesses that a text goes on as it did after the latest occurrence of its last tokens."""

    def __init__(self, prompt: list[int]):
        self.ids, self.indexed = [*prompt], 0
        # for each size: an n-gram -> the position after its latest occurrence but the last tokens'
        self.index: dict[int, dict[tuple, int]] = {size: {} for size in NGRAM_SIZES}
        self.paces = {size: Pace() for size in NGRAM_SIZES}
        self.used = NGRAM_SIZES[0]  # size of the last guess

    def extend(self, ids: Sequence[int]) -> None:
        self.ids += ids
        for size, index in self.index.items():
            for end in range(max(self.indexed, size), len(self.ids)):
                index[tuple(self.ids[end - size : end])] = end
        self.indexed = len(self.ids)

    def guess(self, most: int) -> list[int]:
        """At most `most` tokens after the text."""
        for size in NGRAM_SIZES:
            begin = self.index[size].get(tuple(self.ids[-size:]))
            if begin and (count := min(most, self.paces[size].next_count())) > 0:
                self.used = size
                period = len(self.ids) - begin  # a text that repeats its end goes on to do so
                return [self.ids[begin + i % period] for i in range(count)]
        return []

    def record(self, guessed: int, right: int) -> None:
        self.paces[self.used].record(guessed, right)


class NGramDraft:
    """Guesses from the text itself: for code, JSON, or edits of a passage in the prompt."""

    def __init__(self):
        self.texts: weakref.WeakKeyDictionary[Request, NGrams] = weakref.WeakKeyDictionary()

    def guess(self, requests: list[Request], most: list[int]) -> list[list[int]]:
        """For each request, some tokens that may follow its output, at most `most`."""
        return [self.guess_one(r, n) for r, n in zip(requests, most, strict=True)]

    def guess_one(self, request: Request, most: int) -> list[int]:
        if request not in self.texts:
            self.texts[request] = NGrams(request.prompt)
        text = self.texts[request]
        text.extend(request.output_ids[len(text.ids) - len(request.prompt) :])
        return text.guess(most)

    def record(self, request: Request, guessed: int, right: int) -> None:
        """How many of a request's guesses were right, before one that was not."""
        self.texts[request].record(guessed, right)


@dataclass
class Continuation:
    """A row of the draft's cache: the text that it continues, and its guesses."""

    row: int
    request: Request | None = None
    begin: int = 0  # index in the text of the first token in the cache
    cached_ids: list[int] = field(default_factory=list)
    uncached_ids: list[int] = field(default_factory=list)
    known: int = 0  # how many of cached_ids are those of the text
    count: int = 0  # of tokens to guess
    guesses: list[int] = field(default_factory=list)

    def start(self, request: Request, count: int, block_size: int) -> None:
        """Find the part of a text that is not in the cache, at least its last token."""
        if self.request is not request:
            self.request, self.begin, self.known = request, 0, 0
        text, self.count, self.guesses = request.prompt + request.output_ids, count, []
        if len(text) + count > self.begin + block_size:
            self.begin, self.known = len(text) - (block_size - count + 1) // 2, 0
        rest = text[self.begin + self.known : -1]
        self.known += common_prefix(rest, self.cached_ids[self.known :])
        del self.cached_ids[self.known :]
        self.uncached_ids = text[self.begin + self.known :]

    def mark_cached(self, count: int) -> None:
        self.cached_ids += self.uncached_ids[:count]
        del self.uncached_ids[:count]

    def append(self, token: int) -> None:
        """Add a guess; -1 if the logits were not finite."""
        if token < 0:
            self.count = len(self.guesses)
        else:
            self.guesses.append(token)
            self.uncached_ids = [token]


class ModelDraft:
    """Guesses by a smaller model.

    It samples with the request's own parameters and random numbers, so that at any temperature a
    guess is right where the two models agree.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, num_slots: int):
        self.runner = ModelRunner(model, tokenizer, num_slots, None)
        self.block_size = model.config.block_size
        self.rows = [Continuation(row) for row in range(num_slots)]
        self.paces: weakref.WeakKeyDictionary[Request, Pace] = weakref.WeakKeyDictionary()

    def guess(self, requests: list[Request], most: list[int]) -> list[list[int]]:
        """For each request, some tokens that may follow its output, at most `most`."""
        share = (MAX_PASS_TOKENS - len(requests)) // len(requests)
        started = {}
        for request, room in zip(requests, most, strict=True):
            count = self.paces.setdefault(request, Pace()).next_count()
            if (count := min(room, share, count, self.block_size // 2)) > 0:
                started[request] = self.row_of(request, requests)
                started[request].start(request, count, self.block_size)
                self.prefill(started[request])
        active = [*started.values()]
        while active:
            self.guess_one_token(active)
            active = [row for row in active if len(row.guesses) < row.count]
        return [started[request].guesses if request in started else [] for request in requests]

    def row_of(self, request: Request, requests: list[Request]) -> Continuation:
        """The row of a request, or one of a request that is not among these."""
        own = (row for row in self.rows if row.request is request)
        return next(own, None) or next(row for row in self.rows if row.request not in requests)

    def prefill(self, row: Continuation) -> None:
        """Compute all of a text but its last tokens."""
        while (count := len(row.uncached_ids) - 1) > MAX_GUESSES:
            count = min(count, PREFILL_TOKENS)
            self.runner.forward_row(row.row, len(row.cached_ids), row.uncached_ids[:count])
            row.mark_cached(count)

    def guess_one_token(self, rows: list[Continuation]) -> None:
        """Compute the tokens of some rows that are not cached -> one more guess of each."""
        tokens = [row.uncached_ids for row in rows]
        places = [(row.row, len(row.cached_ids)) for row in rows]
        logits = self.runner.forward_packed(places, tokens)
        ends = [end - 1 for end in accumulate(map(len, tokens))]
        requests, guesses = zip(*((row.request, row.guesses) for row in rows), strict=True)
        sampled = self.runner.sample_requests(requests, take_rows(logits, ends), guesses)
        for row, token in zip(rows, sampled, strict=True):
            row.mark_cached(len(row.uncached_ids))
            row.append(token)

    def record(self, request: Request, guessed: int, right: int) -> None:
        """How many of a request's guesses were right, before one that was not."""
        self.paces[request].record(guessed, right)


def build_draft(
    draft: GPT | str | None, tokenizer: Tokenizer, num_slots: int
) -> NGramDraft | ModelDraft | None:
    """What guesses tokens for an engine: NGRAM, or a model with the same tokenizer."""
    if draft is None:
        return None
    return NGramDraft() if draft == NGRAM else ModelDraft(draft, tokenizer, num_slots)
