"""
The scheduler: which requests are computed next, and in which slot. No tensors here.

A slot is a row of the KV cache. A request has one from its admission to its last token. A step is
one prefill batch, then one more token of every decoding request (continuous batching: Yu et al.
2022, Orca). A slot keeps its KV entries after its request, so that a later prompt with the same
prefix can reuse them.
"""

import time
from collections import deque
from typing import NamedTuple

from flatgpt.inference.request import Request

MIN_PREFIX = 16  # tokens; shorter shared prefixes are computed again
IDLE_PREFILL_TOKENS = 2048  # prompt tokens per batch while no request is decoding
LOGPROB_CHUNK = 128  # tokens per batch if a prompt needs logprobs: each has logits (V,)
PROMPTS_AT_ONCE = 8  # with batch_prompts


class Slot:
    """A row of the cache: its request, its cached tokens, and the tokens to compute next.

    A full context (block_size tokens) drops its oldest eighth. The rest gets new positions, so its
    KV entries are computed again; that cost is amortized over the tokens until it is full again.
    """

    def __init__(self, row: int):
        self.row = row
        self.request: Request | None = None
        self.cached_ids: list[int] = []  # tokens in the cache, kept after the request
        self.uncached_ids: list[int] = []  # the tokens after them
        self.prompt: list[int] = []  # of cached_ids; empty if they begin with something else
        self.is_new = False  # cached_ids are still those of the previous request
        self.last_used = 0.0

    def begin(self, request: Request, block_size: int) -> None:
        self.request, self.uncached_ids, self.is_new = request, request.prompt[-block_size:], True
        request.admitted_time = time.monotonic()

    def append(self, token: int, block_size: int) -> None:
        """Add a sampled token to a context that is completely cached."""
        self.uncached_ids = [token]
        if len(self.cached_ids) == block_size:
            self.uncached_ids = self.cached_ids[max(1, block_size // 8) :] + [token]
            self.cached_ids, self.prompt = [], []

    def mark_cached(self, count: int) -> None:
        """Move the first `count` of uncached_ids to cached_ids."""
        self.cached_ids += self.uncached_ids[:count]
        del self.uncached_ids[:count]

    def end(self) -> None:
        self.request, self.uncached_ids, self.last_used = None, [], time.monotonic()

    @property
    def decoding(self) -> bool:
        """Whether its prompt is complete, so that one token is computed next."""
        return self.request is not None and not self.is_new and len(self.uncached_ids) == 1

    @property
    def prefilling(self) -> bool:
        return self.request is not None and (self.is_new or len(self.uncached_ids) != 1)


class ScheduledBatch(NamedTuple):
    """The input of one forward pass."""

    slots: list[Slot]
    # of each slot: the first of its uncached_ids; in decoding, guesses may follow
    tokens: list[list[int]]
    rows: int  # to compute; for decoding, the first rows of the cache
    copies: list[tuple[int, int, int]]  # (from row, to row, tokens), copied before the pass
    width: int | None = None  # tokens per row, with padding; None: of the longest


class Scheduler:
    """Assigns slots to waiting requests, first come first served, and plans each forward pass.

    prefill_chunk: prompt tokens between two decoding steps. deterministic: every batch has all
    slots, or a single prompt up to its last token, which is decoded: so equal prompts can share
    their KV entries, and no other prefix is shared. batch_prompts: see Engine.
    """

    def __init__(
        self,
        num_slots: int,
        block_size: int,
        prefill_chunk: int,
        deterministic: bool,
        batch_prompts: bool = False,
    ):
        self.block_size, self.prefill_chunk = block_size, prefill_chunk
        self.deterministic, self.batch_prompts = deterministic, batch_prompts
        self.slots = [Slot(row) for row in range(num_slots)]
        self.waiting: deque[Request] = deque()
        self.adapter: str | None = None  # of all requests in the slots
        self.copies: list[tuple[int, int, int]] = []  # for the next batch
        powers = [2**i for i in range(num_slots.bit_length()) if 2**i < num_slots]
        # of decoding
        self.batch_sizes = [num_slots] if deterministic else [*powers, num_slots]

    @property
    def running(self) -> int:
        return sum(slot.request is not None for slot in self.slots)

    # --- slots

    def admit(self) -> None:
        """Assign the free slots to waiting requests."""
        while self.waiting and (free := [slot for slot in self.slots if slot.request is None]):
            if self.waiting[0].adapter != self.adapter and not self.switch_adapter():
                break
            batch_size = self.batch_size_for(self.running + 1)
            preferred = [slot for slot in free if slot.row < batch_size] or free
            # its KV entries are the least likely to be reused
            slot = min(preferred, key=lambda slot: slot.last_used)
            slot.begin(self.waiting.popleft(), self.block_size)

    def switch_adapter(self) -> bool:
        """Use the adapter of the next request once no other runs -> whether it is used now."""
        if self.running:
            return False
        self.adapter = self.waiting[0].adapter
        for slot in self.slots:  # the KV entries are those of other weights
            slot.cached_ids, slot.prompt = [], []
        return True

    def batch_size_for(self, rows: int) -> int:
        return next(size for size in self.batch_sizes if size >= rows)

    def cancelled_slots(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.request and slot.request.cancelled]

    def drop_cancelled(self) -> list[Request]:
        """Remove cancelled requests from the queue."""
        dropped = [request for request in self.waiting if request.cancelled]
        if not dropped:  # the usual case; the queue may be long
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

    # --- batches

    def schedule_prefill(self) -> ScheduledBatch | None:
        """Tokens of the oldest prompt, or of several whole ones; None if there is no prompt."""
        if self.batch_prompts:
            return self.schedule_prompts()
        while slots := self.prefilling_slots():
            if slots[0].is_new:
                self.reuse_prefix(slots[0])
            if slots[0].prefilling:  # else all but its last token were in the cache
                break
        if not slots:
            return None
        oldest = slots[0]
        alone = self.deterministic or oldest.cached_ids or oldest.request.needs_prompt_logprobs
        idle = not (self.deterministic or any(slot.decoding for slot in self.slots))
        token_budget = IDLE_PREFILL_TOKENS if idle else self.prefill_chunk
        slots = slots[:1] if alone else self.group_prompts(slots, token_budget)
        if oldest.request.needs_prompt_logprobs:
            token_budget = min(token_budget, LOGPROB_CHUNK)
        elif self.deterministic:
            token_budget = min(token_budget, len(oldest.uncached_ids) - 1)
        return self.make_batch(slots, len(slots), token_budget // len(slots))

    def schedule_prompts(self) -> ScheduledBatch | None:
        """Different prompts of similar length, each up to its last token; None if there is none.

        The width depends on the length alone, so that a prompt is always computed in one shape.
        """
        taken, width = [], 0
        for slot in self.prefilling_slots():
            if any(slot.uncached_ids == other.uncached_ids for other in taken):
                continue  # it copies the KV entries of that one later
            if taken and padded_width(slot) != width:
                continue
            if slot.is_new:
                self.reuse_prefix(slot)
            if slot.prefilling:
                taken.append(slot)
                width = padded_width(slot)
            if len(taken) == PROMPTS_AT_ONCE:
                break
        if not taken:
            return None
        batch = self.make_batch(taken, PROMPTS_AT_ONCE, width)
        tokens = [slot.uncached_ids[:-1] for slot in taken]
        return batch._replace(tokens=tokens, width=width)

    def prefilling_slots(self) -> list[Slot]:
        """The slots whose prompt is not complete, the oldest request first."""
        slots = [slot for slot in self.slots if slot.prefilling]
        return sorted(slots, key=lambda slot: slot.request.arrival_time)

    def reuse_prefix(self, slot: Slot) -> None:
        """Reuse the KV entries of the longest prefix that a prompt shares with any slot."""
        prompt, scored = slot.uncached_ids, slot.request.needs_prompt_logprobs
        best, count = (slot, 0) if scored else self.find_prefix(slot)
        self.copies.append((best.row, slot.row, count))
        slot.cached_ids, slot.uncached_ids, slot.is_new = prompt[:count], prompt[count:], False
        slot.prompt = [] if scored else prompt  # a scored one is computed in other batches

    def find_prefix(self, slot: Slot) -> tuple[Slot, int]:
        """The slot whose cached tokens share the longest prefix with a new prompt, and its length;
        without the last token, which is needed for logits."""
        prompt, most = slot.uncached_ids, len(slot.uncached_ids) - 1
        if self.deterministic:
            same = (s for s in self.slots if s.prompt == prompt and len(s.cached_ids) >= most)
            best = next(same, None)
            return (best, most) if best else (slot, 0)
        best = max(self.slots, key=lambda other: common_prefix(prompt, other.cached_ids))
        count = min(common_prefix(prompt, best.cached_ids), most)
        return (best, count) if count >= MIN_PREFIX else (slot, 0)

    def group_prompts(self, slots: list[Slot], token_budget: int) -> list[Slot]:
        """The first of these slots and those whose prompts fit in one pass with it."""
        taken = slots[:1]
        for slot in slots[1:]:
            ids, others = slot.uncached_ids, [each.uncached_ids for each in taken]
            longest = max(map(len, [*others, ids]))
            shared = any(common_prefix(ids, other) >= MIN_PREFIX for other in others)
            too_long = longest * (len(taken) + 1) > token_budget
            if shared or slot.request.needs_prompt_logprobs or too_long:
                continue  # if shared, it can reuse the KV entries of one of these later
            if slot.is_new:
                self.reuse_prefix(slot)
            if slot.prefilling and not slot.cached_ids:
                taken.append(slot)
        return taken

    def schedule_decode(self) -> ScheduledBatch | None:
        """One more token of every decoding request; None if there is none."""
        slots = [slot for slot in self.slots if slot.decoding]
        return self.make_batch(slots, self.compact(slots), 1) if slots else None

    def compact(self, slots: list[Slot]) -> int:
        """Move requests to the first rows -> how many rows to compute."""
        batch_size = self.batch_size_for(self.running)
        for slot in slots:
            if slot.row >= batch_size:
                free = next(other for other in self.slots if other.request is None)
                self.copies.append((slot.row, free.row, len(slot.cached_ids)))
                free.cached_ids = []
                slot.row, free.row = free.row, slot.row
                self.slots[slot.row], self.slots[free.row] = slot, free
        slots.sort(key=lambda slot: slot.row)
        return self.batch_size_for(slots[-1].row + 1)

    def make_batch(self, slots: list[Slot], rows: int, limit: int) -> ScheduledBatch:
        """Up to `limit` next tokens of each slot."""
        copies, self.copies = self.copies, []
        return ScheduledBatch(slots, [slot.uncached_ids[:limit] for slot in slots], rows, copies)

    # --- results

    def mark_cached(self, batch: ScheduledBatch) -> None:
        """Move the tokens of a computed batch to cached_ids, without guesses."""
        for slot, tokens in zip(batch.slots, batch.tokens, strict=True):
            slot.mark_cached(len(tokens))

    def append(self, slot: Slot, token: int) -> None:
        """Add a sampled token to a request."""
        slot.append(token, self.block_size)
        if not slot.cached_ids:
            self.copies.append((slot.row, slot.row, 0))  # positions start at 0 again


def padded_width(slot: Slot) -> int:
    """The tokens of a prompt without its last one, rounded up."""
    return max(8, 1 << (len(slot.uncached_ids) - 2).bit_length())


def common_prefix(a: list[int], b: list[int]) -> int:
    """The length of the common prefix."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
