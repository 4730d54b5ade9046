"""
Many texts at once: prompts and new tokens are computed together, and each text comes out as alone.

    engine = Engine(model, tokenizer, rows=8)
    engine.submit(Request(tokenizer.encode('To be'), Sampling(top_p=0.9), print))
    while engine.step():           # or engine.serve() in a thread of its own
        pass

Every text has a row of the KV cache for as long as it is written. A step computes a piece of the
prompts that wait, and one more token of every text whose prompt is done ("continuous batching": Yu
et al. 2022, Orca). A row keeps its keys when its text is finished, so that the next prompt that
begins alike need not compute them again.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError
from flatgpt.inference.cuda_graph import is_recorded, replay
from flatgpt.inference.kv_cache import KVCache
from flatgpt.inference.request import Piece, Request
from flatgpt.inference.sampling import Sampling, banned_ids, choose, edit_logits, scores_of
from model import GPT

SCORED = 128  # of a prompt whose log-probabilities are asked for, each over the vocabulary
WORTHWHILE = 16  # keys of another prompt that are taken over, at least
IDLE = 2048  # tokens of prompts computed at once while no text waits for its next token
NOT_FINITE = (
    'the model gives no finite logits: its weights are broken, or too large for this number '
    'format; try --dtype=float32 or another --checkpoint'
)
MOST_ROWS = 64  # of one generate(): further texts wait for a row


# -----------------------------------------------------------------------------
# texts


# -----------------------------------------------------------------------------
# the engine


class Slot:
    """A row of the cache: whose it is, what it holds, and what is to be computed next.

    A context that is full (block_size tokens) forgets its oldest eighth before it takes another.
    What is left gets new positions, so its keys are computed anew, and that cost is shared by the
    many tokens until the context is full again.
    """

    def __init__(self, row: int):
        self.row = row
        self.request: Request | None = None
        self.keys: list[int] = []  # tokens whose keys the cache holds, also when the text is done
        self.pending: list[int] = []  # tokens that come after them
        self.fresh = False  # whether the keys are still those of the text before
        self.used = 0.0

    def begin(self, request: Request, block_size: int) -> None:
        self.request, self.pending, self.fresh = request, request.prompt[-block_size:], True
        request.began = time.monotonic()

    def append(self, token: int, block_size: int) -> None:
        """Take a chosen token into the context, whose keys are all there."""
        self.pending = [token]
        if len(self.keys) == block_size:
            self.pending = self.keys[max(1, block_size // 8) :] + [token]
            self.keys = []

    def end(self) -> None:
        self.request, self.pending, self.used = None, [], time.monotonic()

    @property
    def decoding(self) -> bool:
        """Whether its next token can be computed together with those of others."""
        return self.request is not None and not self.fresh and len(self.pending) == 1

    @property
    def prefilling(self) -> bool:
        return self.request is not None and not self.decoding


class Engine:
    """Continues the texts of all requests, as many at once as it has rows.

    model: in evaluation mode. rows: texts computed together; further ones wait, first come first
    served. chunk: tokens of prompts between two steps of the texts. length: of the cache, where no
    context will be as long as block_size. deterministic: a request gives the same logits to the
    last bit, whatever else is computed: always all rows, every prompt by itself, no keys of others.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        rows: int = 8,
        chunk: int = 256,
        length: int | None = None,
        deterministic: bool = False,
    ):
        assert not model.training, 'dropout would be on'
        self.model, self.tokenizer, self.chunk = model, tokenizer, chunk
        self.deterministic = deterministic
        self.cache = KVCache(model, rows, length)
        self.slots = [Slot(row) for row in range(rows)]
        powers = [2**i for i in range(rows.bit_length()) if 2**i < rows]
        self.counts = [rows] if deterministic else [*powers, rows]  # rows computed in one step
        self.banned = banned_ids(tokenizer, model)
        self.waiting: deque[Request] = deque()
        self.arrival = threading.Condition()
        self.closed = False
        self.error: BaseException | None = None

    @property
    def running(self) -> int:
        return sum(slot.request is not None for slot in self.slots)

    # --- from any thread

    def submit(self, request: Request) -> None:
        """Have a request computed; its on_piece is called from step()."""
        with self.arrival:
            if self.error or self.closed:
                raise self.error or UserError('the engine is closed')
            self.waiting.append(request)
            self.arrival.notify()

    def serve(self) -> None:
        """step() until close(). An exception ends every request, and is kept in `error`."""
        try:
            while not self.closed:
                if not self.step():
                    with self.arrival:
                        self.arrival.wait_for(lambda: self.waiting or self.closed)
            self.end_all('cancelled')
        except BaseException as error:
            self.error = error
            self.end_all('error')
            raise

    def close(self) -> None:
        """Have serve() end what is open, and return."""
        with self.arrival:
            self.closed = True
            self.arrival.notify()

    def end_all(self, finish: str) -> None:
        with self.arrival:
            left = [*self.waiting, *(slot.request for slot in self.slots if slot.request)]
            self.waiting.clear()
        for slot in self.slots:
            slot.end()
        for request in left:
            request.send(Piece(request.row, None, '', finish))

    # --- one step

    @torch.inference_mode()
    def step(self) -> bool:
        """Compute a piece of the waiting prompts and a token of every text -> whether any did."""
        self.drop_cancelled()
        self.admit()
        prompts = self.prefill()
        return self.decode() or prompts

    def drop_cancelled(self) -> None:
        dropped = [slot for slot in self.slots if slot.request and slot.request.cancelled]
        left = [slot.request for slot in dropped]
        for slot in dropped:
            self.vacate(slot, forget=not slot.request.written)
        if self.waiting:
            with self.arrival:  # others append to it at any moment
                left += [request for request in self.waiting if request.cancelled]
                kept = [request for request in self.waiting if not request.cancelled]
                self.waiting = deque(kept)
        for request in left:
            request.send(Piece(request.row, None, '', 'cancelled'))

    def admit(self) -> None:
        """Give the requests that wait the rows that are free."""
        while self.waiting and (free := [slot for slot in self.slots if slot.request is None]):
            few = self.count_for(self.running + 1)
            near = [slot for slot in free if slot.row < few] or free
            slot = min(near, key=lambda slot: slot.used)  # whose keys are the least likely to serve
            slot.begin(self.waiting.popleft(), self.model.config.block_size)

    def count_for(self, rows: int) -> int:
        return next(count for count in self.counts if count >= rows)

    def prefill(self) -> bool:
        """Compute tokens of the prompt that came first, or all of several -> whether there were."""
        while slots := self.prompts():
            if slots[0].fresh:
                self.reuse_keys(slots[0])
            if slots[0].prefilling:  # else the keys of others were all but its last
                break
        if not slots:
            return False
        alone = self.deterministic or slots[0].keys or slots[0].request.score_prompt
        idle = not (self.deterministic or any(slot.decoding for slot in self.slots))
        room = IDLE if idle else self.chunk
        self.compute(slots[:1] if alone else self.together(slots, room), room)
        return True

    def prompts(self) -> list[Slot]:
        """The rows whose prompt is not done, first come first."""
        slots = [slot for slot in self.slots if slot.prefilling]
        return sorted(slots, key=lambda slot: slot.request.came)

    def reuse_keys(self, slot: Slot) -> None:
        """Begin a prompt with the keys that a row already holds for its first tokens."""
        prompt, best, count = slot.pending, slot, 0
        if not (self.deterministic or slot.request.score_prompt):
            best = max(self.slots, key=lambda other: common(prompt, other.keys))
            count = min(common(prompt, best.keys), len(prompt) - 1)  # the last gives logits
        count = count if count >= WORTHWHILE else 0
        if best is not slot:
            self.cache.copy(best.row, slot.row, count)
        self.cache.pos[slot.row] = count
        slot.keys, slot.pending, slot.fresh = prompt[:count], prompt[count:], False

    def together(self, slots: list[Slot], room: int) -> list[Slot]:
        """Of the prompts, the first and those that can be computed in one pass with it."""
        taken = slots[:1]
        for slot in slots[1:]:
            longest = max(len(each.pending) for each in [*taken, slot])
            shared = any(common(slot.pending, each.pending) >= WORTHWHILE for each in taken)
            if shared or slot.request.score_prompt or longest * (len(taken) + 1) > room:
                continue  # in a later step it may have the keys of one of these
            if slot.fresh:
                self.reuse_keys(slot)
            if slot.prefilling and not slot.keys:
                taken.append(slot)
        return taken

    def compute(self, slots: list[Slot], room: int) -> None:
        """Compute up to `room` next tokens of one prompt, or all of several that have no keys."""
        scored = slots[0].request.score_prompt
        room = min(room, SCORED) if scored else room
        parts = [slot.pending[: room // len(slots)] for slot in slots]
        idx, lengths = pad(parts, self.cache.pos.device)
        cache = self.cache.part([slot.row for slot in slots], span=len(slots[0].keys))
        ragged = len({*map(len, parts)}) > 1
        logits, _ = self.model(idx, cache=cache, lengths=lengths if ragged else None, whole=scored)
        if scored:
            self.score(slots[0], logits[0])
            logits = logits[:, -1]
        for slot, part in zip(slots, parts, strict=True):
            slot.keys, slot.pending = slot.keys + part, slot.pending[len(part) :]
            self.cache.pos[slot.row] = len(slot.keys)
        done = [i for i, slot in enumerate(slots) if not slot.pending]
        self.write([slots[i] for i in done], logits[done])

    def score(self, slot: Slot, logits) -> None:
        """Keep how likely the prompt's tokens were that follow the ones logits (T, V) are of."""
        first, request = len(slot.keys) + 1, slot.request
        following = (slot.keys + slot.pending)[first : first + len(logits)]
        scores = scores_of(logits[: len(following)], following, request.top or 0)
        request.prompt_scores += scores

    def decode(self) -> bool:
        """Compute the next token of every text whose prompt is done -> whether there was any."""
        live = [slot for slot in self.slots if slot.decoding]
        if not live:
            return False
        rows = self.settle(live)
        tokens, lengths = np.zeros((2, rows), np.int64)
        for slot in live:
            tokens[slot.row], lengths[slot.row] = slot.pending[0], 1
        self.cache.span = max(len(slot.keys) for slot in live)
        logits = self.advance(tokens, lengths)
        for slot in live:
            slot.keys.append(slot.pending.pop())
        self.write(live, logits if len(live) == rows else logits[[slot.row for slot in live]])
        return True

    def settle(self, live: list[Slot]) -> int:
        """How many rows to compute, the first ones, after texts have moved to where few are."""
        few = self.count_for(self.running)
        for slot in live:
            if slot.row >= few:
                free = next(other for other in self.slots if other.request is None)
                self.cache.copy(slot.row, free.row, len(slot.keys))
                free.keys = []
                slot.row, free.row = free.row, slot.row
                self.slots[slot.row], self.slots[free.row] = slot, free
        live.sort(key=lambda slot: slot.row)
        return self.count_for(live[-1].row + 1)

    def advance(self, tokens: np.ndarray, lengths: np.ndarray):
        """Logits (R, V) after one more token (R,) of the first rows; lengths (R,): 0 leaves one."""
        given = torch.from_numpy(np.stack((tokens, lengths))).to(self.cache.pos.device)
        if is_recorded(given):
            return replay(self.model, given, self.cache)
        lengths = None if lengths.all() else given[1]
        return self.model(given[0, :, None], cache=self.cache, lengths=lengths)[0]

    def write(self, slots: list[Slot], logits) -> None:
        """Choose the next token of each slot from its row of logits (R, V), and pass it on."""
        writing = []
        for i, slot in enumerate(slots):
            request = slot.request
            if not all(math.isfinite(score) for score, _ in request.prompt_scores[1:]):
                self.pass_on(slot, Piece(request.row, None, '', 'error'))
            elif request.sampling.max_new_tokens == 0:  # the prompt was all that mattered
                self.pass_on(slot, Piece(request.row, None, '', 'length'))
            else:
                writing.append(i)
        if not writing:
            return
        if len(writing) < len(slots):
            slots, logits = [slots[i] for i in writing], logits[writing]
        tokens = self.choose_all(slots, logits)
        scores = self.scores_asked(slots, tokens, logits)
        for slot, token, score in zip(slots, tokens, scores, strict=True):
            self.pass_on(slot, slot.request.take(token, self.tokenizer, *score))

    def scores_asked(self, slots: list[Slot], tokens: list[int], logits) -> list[tuple]:
        """(logprob, top) of each slot's token, (None, ()) where nobody asked."""
        scores: list[tuple] = [(None, ())] * len(slots)
        asked = [i for i, slot in enumerate(slots) if slot.request.top is not None]
        asked = [i for i in asked if tokens[i] >= 0]
        if asked:
            most = max(slots[i].request.top for i in asked)
            found = scores_of(logits[asked], [tokens[i] for i in asked], most)
            for i, (logprob, top) in zip(asked, found, strict=True):
                scores[i] = logprob, top[: slots[i].request.top]
        return scores

    def choose_all(self, slots: list[Slot], logits) -> list[int]:
        """A token for each slot from its row of logits (R, V); those of one rule at once."""
        logits = logits.float().masked_fill(self.banned, -math.inf)
        rules: dict[tuple, list[int]] = {}
        for i, slot in enumerate(slots):
            request = slot.request
            rules.setdefault(request.sampling.rule, []).append(i)
            if request.sampling.edits_logits:
                edit_logits(logits[i], request.sampling, request.prompt, request.written)
        chosen = torch.empty(len(slots), dtype=torch.long, device=logits.device)
        for rows in rules.values():
            draws = [[slots[i].request.random.random(dtype=np.float32)] for i in rows]
            part = logits if len(rows) == len(slots) else logits[rows]
            uniforms = torch.tensor(draws, device=logits.device)
            chosen[rows] = choose(part, slots[rows[0]].request.sampling, uniforms)
        return chosen.tolist()

    def pass_on(self, slot: Slot, piece: Piece) -> None:
        request = slot.request
        if piece.finish:
            self.vacate(slot, forget=piece.finish == 'error')
        else:
            slot.append(piece.token, self.model.config.block_size)
            if not slot.keys:
                self.cache.pos[slot.row] = 0
        request.send(piece)

    def vacate(self, slot: Slot, forget: bool) -> None:
        """Free a row. forget: its keys may not be finite, and those no mask hides from the next."""
        slot.end()
        if forget:
            self.cache.kv[:, :, slot.row], slot.keys = 0, []


def common(a: list[int], b: list[int]) -> int:
    """How many of the first tokens are the same."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))


def pad(parts: list[list[int]], device):
    """Token lists -> ids (R, T), padded on the right, and their lengths (R,)."""
    lengths = torch.tensor([len(part) for part in parts])
    idx = torch.zeros(len(parts), int(lengths.max()), dtype=torch.long)
    for row, part in zip(idx, parts, strict=True):
        row[: len(part)] = torch.tensor(part)
    return idx.to(device), lengths.to(device)


# -----------------------------------------------------------------------------
# a step as a CUDA graph


# -----------------------------------------------------------------------------
# without an engine at hand


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list,
    sampling: Sampling,
    seeds: list | None = None,
) -> Iterator[Piece]:
    """Continue all prompts side by side, yielding each token as it is chosen.

    prompts: token ids, at least one each; the last block_size count. model: in evaluation mode.
    seeds: what seeds each text's random numbers, by default sampling.seed and its number; a text
    depends on nothing else, whatever stands in the other rows. Raises UserError for broken weights.
    """
    pieces: deque[Piece] = deque()
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    length = min(model.config.block_size, longest)
    engine = Engine(model, tokenizer, min(len(prompts), MOST_ROWS) or 1, length=length)
    for row, prompt in enumerate(prompts):
        seed = seeds[row] if seeds else None
        engine.submit(Request(prompt, sampling, pieces.append, row, seed))
    while engine.step():
        while pieces:
            piece = pieces.popleft()
            if piece.finish == 'error':
                raise UserError(NOT_FINITE)
            yield piece


def complete(model: GPT, tokenizer: Tokenizer, texts: list[str], sampling: Sampling) -> list[str]:
    """What the model writes after each text."""
    prompts = [tokenizer.encode(text, allow_eot=True) for text in texts]
    out = [''] * len(texts)
    for piece in generate(model, tokenizer, prompts, sampling):
        out[piece.row] += piece.text
    return out


def write_page(
    model: GPT, tokenizer: Tokenizer, prompt, tokens: int, seed: int, answer: bool = False
) -> str:
    """About `tokens` tokens of text that begin at `prompt`; after a short document, the next.

    answer: the prompt is a question, whose one answer comes after it.
    """
    texts = []
    while tokens > 0:
        sampling = Sampling(tokens, temperature=0.8, top_k=200, seed=seed + len(texts))
        pieces = list(generate(model, tokenizer, [prompt], sampling))
        texts.append(''.join(piece.text for piece in pieces).strip('\n'))
        if answer:
            return tokenizer.decode(prompt) + texts[0]
        tokens -= len(pieces)
    return '\n\n'.join(texts)
