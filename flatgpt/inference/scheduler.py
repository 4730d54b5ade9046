"""
Which requests are computed next, and in which slot: no tensors here.

A slot is a row of the KV cache. A request has one from when it is admitted to its last token. A
step is one batch of prompts, then one more token of every request whose prompt is done ("continuous
batching": Yu et al. 2022, Orca). A slot keeps its keys when its request is finished, so that the
next prompt that begins alike need not compute them again.
"""

import time
from collections import deque
from typing import NamedTuple

from flatgpt.inference.request import Request

MIN_PREFIX = 16  # tokens that a prompt must share with another for its keys to be copied
IDLE_PREFILL_TOKENS = 2048  # of prompts, computed at once while no request awaits its next token
LOGPROB_CHUNK = 128  # tokens of a prompt to be scored: each has logits over the vocabulary


class Slot:
    """A row of the cache: whose it is, what it holds, and what is to be computed next.

    A context that is full (block_size tokens) forgets its oldest eighth before it takes another.
    What is left gets new positions, so its keys are computed anew, and that cost is shared by the
    many tokens until the context is full again.
    """

    def __init__(self, row: int):
        self.row = row
        self.request: Request | None = None
        self.cached_ids: list[int] = []  # tokens whose keys the cache holds, also after the request
        self.uncached_ids: list[int] = []  # tokens that come after them
        self.fresh = False  # whether the keys are still those of the request before
        self.used = 0.0

    def begin(self, request: Request, block_size: int) -> None:
        self.request, self.uncached_ids, self.fresh = request, request.prompt[-block_size:], True
        request.admitted_time = time.monotonic()

    def append(self, token: int, block_size: int) -> None:
        """Take a sampled token into the context, whose keys are all there."""
        self.uncached_ids = [token]
        if len(self.cached_ids) == block_size:
            self.uncached_ids = self.cached_ids[max(1, block_size // 8) :] + [token]
            self.cached_ids = []

    def end(self) -> None:
        self.request, self.uncached_ids, self.used = None, [], time.monotonic()

    @property
    def decoding(self) -> bool:
        """Whether its next token can be computed together with those of others."""
        return self.request is not None and not self.fresh and len(self.uncached_ids) == 1

    @property
    def prefilling(self) -> bool:
        return self.request is not None and (self.fresh or len(self.uncached_ids) != 1)


class ScheduledBatch(NamedTuple):
    """What one forward pass computes."""

    slots: list[Slot]
    tokens: list[list[int]]  # of each slot: the first of its uncached_ids
    rows: int  # computed: those of the slots, or to decode so many of the cache's first ones
    copies: list[tuple[int, int, int]]  # (from row, to row, tokens): to be copied before it


class Scheduler:
    """Gives waiting requests the slots, first come first served, and plans each forward pass.

    chunk: tokens of prompts between two tokens of the other requests. deterministic: every batch
    has all rows, or one prompt by itself, and no prompt takes keys of others.
    """

    def __init__(self, rows: int, block_size: int, chunk: int, deterministic: bool):
        self.block_size, self.chunk, self.deterministic = block_size, chunk, deterministic
        self.slots = [Slot(row) for row in range(rows)]
        self.waiting: deque[Request] = deque()
        self.copies: list[tuple[int, int, int]] = []  # that the next batch begins with
        powers = [2**i for i in range(rows.bit_length()) if 2**i < rows]
        self.counts = [rows] if deterministic else [*powers, rows]  # rows computed in one step

    @property
    def running(self) -> int:
        return sum(slot.request is not None for slot in self.slots)

    # --- who has a slot

    def admit(self) -> None:
        """Give the requests that wait the slots that are free."""
        while self.waiting and (free := [slot for slot in self.slots if slot.request is None]):
            few = self.count_for(self.running + 1)
            near = [slot for slot in free if slot.row < few] or free
            slot = min(near, key=lambda slot: slot.used)  # whose keys are the least likely to serve
            slot.begin(self.waiting.popleft(), self.block_size)

    def count_for(self, rows: int) -> int:
        return next(count for count in self.counts if count >= rows)

    def cancelled_slots(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.request and slot.request.cancelled]

    def drop_cancelled(self) -> list[Request]:
        """Take the cancelled ones off the queue."""
        dropped = [request for request in self.waiting if request.cancelled]
        if not dropped:  # as at nearly every step, of what may be a long queue
            return dropped
        self.waiting = deque(request for request in self.waiting if not request.cancelled)
        return dropped

    def drop_all(self) -> list[Request]:
        """Empty the queue and the slots."""
        dropped = [*self.waiting, *(slot.request for slot in self.slots if slot.request)]
        self.waiting.clear()
        for slot in self.slots:
            slot.end()
        return dropped

    # --- what is computed

    def schedule_prefill(self) -> ScheduledBatch | None:
        """Tokens of the prompt that came first, or all of several; None where no prompt waits."""
        while slots := self.prompts():
            if slots[0].fresh:
                self.reuse_prefix(slots[0])
            if slots[0].prefilling:  # else the keys of others were all but its last
                break
        if not slots:
            return None
        first = slots[0]
        alone = self.deterministic or first.cached_ids or first.request.scoring
        idle = not (self.deterministic or any(slot.decoding for slot in self.slots))
        room = IDLE_PREFILL_TOKENS if idle else self.chunk
        slots = slots[:1] if alone else self.together(slots, room)
        room = min(room, LOGPROB_CHUNK) if first.request.scoring else room
        return self.batch(slots, len(slots), room // len(slots))

    def prompts(self) -> list[Slot]:
        """The slots whose prompt is not done, first come first."""
        slots = [slot for slot in self.slots if slot.prefilling]
        return sorted(slots, key=lambda slot: slot.request.arrival_time)

    def reuse_prefix(self, slot: Slot) -> None:
        """Begin a prompt with the keys that a slot already holds for its first tokens."""
        prompt, best, count = slot.uncached_ids, slot, 0
        if not (self.deterministic or slot.request.scoring):
            best = max(self.slots, key=lambda other: common_prefix(prompt, other.cached_ids))
            shared = common_prefix(prompt, best.cached_ids)
            count = min(shared, len(prompt) - 1)  # the last gives logits
        count = count if count >= MIN_PREFIX else 0
        self.copies.append((best.row, slot.row, count))
        slot.cached_ids, slot.uncached_ids, slot.fresh = prompt[:count], prompt[count:], False

    def together(self, slots: list[Slot], room: int) -> list[Slot]:
        """Of the prompts, the first and those that can be computed in one pass with it."""
        taken = slots[:1]
        for slot in slots[1:]:
            ids, others = slot.uncached_ids, [each.uncached_ids for each in taken]
            longest = max(map(len, [*others, ids]))
            shared = any(common_prefix(ids, other) >= MIN_PREFIX for other in others)
            if shared or slot.request.scoring or longest * (len(taken) + 1) > room:
                continue  # in a later step it may have the keys of one of these
            if slot.fresh:
                self.reuse_prefix(slot)
            if slot.prefilling and not slot.cached_ids:
                taken.append(slot)
        return taken

    def schedule_decode(self) -> ScheduledBatch | None:
        """One more token of every request whose prompt is done; None where there is none."""
        slots = [slot for slot in self.slots if slot.decoding]
        return self.batch(slots, self.compact(slots), 1) if slots else None

    def compact(self, slots: list[Slot]) -> int:
        """How many rows to compute, the first ones, after requests have moved to where few are."""
        few = self.count_for(self.running)
        for slot in slots:
            if slot.row >= few:
                free = next(other for other in self.slots if other.request is None)
                self.copies.append((slot.row, free.row, len(slot.cached_ids)))
                free.cached_ids = []
                slot.row, free.row = free.row, slot.row
                self.slots[slot.row], self.slots[free.row] = slot, free
        slots.sort(key=lambda slot: slot.row)
        return self.count_for(slots[-1].row + 1)

    def batch(self, slots: list[Slot], rows: int, most: int) -> ScheduledBatch:
        """Up to `most` next tokens of each slot."""
        copies, self.copies = self.copies, []
        return ScheduledBatch(slots, [slot.uncached_ids[:most] for slot in slots], rows, copies)

    # --- what became of it

    def mark_cached(self, batch: ScheduledBatch) -> None:
        """The cache now holds the keys of these tokens."""
        for slot, tokens in zip(batch.slots, batch.tokens, strict=True):
            slot.cached_ids += tokens
            del slot.uncached_ids[: len(tokens)]

    def append(self, slot: Slot, token: int) -> None:
        """A request goes on after a sampled token."""
        slot.append(token, self.block_size)
        if not slot.cached_ids:
            self.copies.append((slot.row, slot.row, 0))  # its positions start from 0 again


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many of the first tokens are the same."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
