"""
The forward passes and the sampling of an engine.

A pass computes a ScheduledBatch, in which every slot is a row of the KV cache, and returns the
logits of each slot's next token.
"""

import math
from collections import Counter
from contextlib import nullcontext
from itertools import chain, islice, product
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.inference.decode_graph import DecodeGraphs, Step, can_capture
from flatgpt.inference.grammar import mask_logits
from flatgpt.inference.kv_cache import KVCache, PackedCache
from flatgpt.inference.request import Request
from flatgpt.inference.sampling import (
    ARGMAX,
    DRAW,
    SORT,
    apply_penalties,
    logprobs_of,
    sample_tokens,
    suppressed_ids,
)
from flatgpt.inference.scheduler import ScheduledBatch, Slot
from flatgpt.runtime import to_device
from model import GPT

# On Hopper, torch uses cuDNN for the attention of 16-bit tensors, which makes a plan for each new
# prompt length and for each decoding step that is captured. False: torch's other kernels, which
# need no plan. Which is faster has not been measured; launch/gpu_day.sh --only=prefill times both.
CUDNN_ATTENTION = True
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Sample(NamedTuple):
    """A sampled token, and if requested the log-probabilities of a TokenOutput."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple = ()


class ModelRunner:
    """Computes batches. max_length None: the model's block_size. graphs: of an earlier runner.

    adapters: by name, the models that use() chooses from besides `model`.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        num_slots: int,
        max_length: int | None,
        graphs: DecodeGraphs | None = None,
        adapters: dict[str, GPT] | None = None,
    ):
        self.model = model
        self.cache = graphs.cache if graphs else KVCache(model, num_slots, max_length)
        self.suppressed = suppressed_ids(tokenizer, model)
        self.graphs = None
        if can_capture(self.cache.kv):
            self.graphs = graphs or DecodeGraphs(model, self.cache)
            self.graphs.suppress(self.suppressed)
        self.variants = {None: (model, self.graphs)}
        for name, adapted in (adapters or {}).items():
            own = None
            if self.graphs:
                own = DecodeGraphs(adapted, self.cache)
                own.suppress(self.suppressed)
            self.variants[name] = adapted, own

    def use(self, adapter: str | None) -> None:
        """Compute the next batches with this adapter; None: with the base model."""
        self.model, self.graphs = self.variants[adapter]

    def clear_row(self, row: int) -> None:
        """Overwrite a row whose entries may not be finite: a mask does not hide NaN."""
        self.cache.kv[:, :, row] = 0

    def copy_rows(self, batch: ScheduledBatch) -> None:
        for source, target, count in batch.copies:
            self.cache.copy(source, target, count)

    # --- batches

    def prefill(self, batch: ScheduledBatch) -> list[list[Sample]]:
        """Compute tokens of one prompt, or of several uncached ones -> the next token of each slot;
        none if its prompt is not complete yet, or if its request ends with the prompt."""
        self.copy_rows(batch)
        logits, samples = self.forward_prompts(batch), [[] for _ in batch.slots]
        sampled = [
            i
            for i, (slot, tokens) in enumerate(zip(batch.slots, batch.tokens, strict=True))
            if len(tokens) == len(slot.uncached_ids) and not slot.request.ended_by_prompt()
        ]
        if sampled:
            requests = [batch.slots[i].request for i in sampled]
            found = self.sample_with_logprobs(requests, take_rows(logits, sampled))
            for i, sample in zip(sampled, found, strict=True):
                samples[i] = [sample]
        return samples

    def decode(self, batch: ScheduledBatch) -> list[list[Sample]]:
        """Compute one more token of each slot, and guesses of those after it -> the next one, and
        those after each guess that was right."""
        self.copy_rows(batch)
        if any(len(tokens) > 1 for tokens in batch.tokens):
            return self.verify_guesses(batch)
        return [[sample] for sample in self.decode_one_token(batch)]

    def decode_one_token(self, batch: ScheduledBatch) -> list[Sample]:
        rows, requests = zip(*((slot.row, slot.request) for slot in batch.slots), strict=True)
        given = [token for (token,) in batch.tokens]
        self.cache.max_pos = max(len(slot.cached_ids) for slot in batch.slots)
        if self.graphs:
            self.graphs.upload(rows, settings_of(requests), given)
            return self.replay(requests, rows, batch.rows, self.cache.columns(1))
        tokens, lengths = np.zeros((2, batch.rows), np.int64)
        tokens[[*rows]], lengths[[*rows]] = given, 1
        logits = self.forward_one_token(tokens, lengths)
        return self.sample_with_logprobs(requests, take_rows(logits, rows))

    def verify_guesses(self, batch: ScheduledBatch) -> list[list[Sample]]:
        """Compute each slot's token and its guesses in one pass -> samples up to the first that
        differs from its guess (Leviathan et al. 2023). The later guesses leave the cache.

        A sample follows from the logits and the random number of its position (sample_tokens()), so
        it is accepted if and only if it would be sampled without guesses.
        """
        counts = [len(tokens) for tokens in batch.tokens]
        places = [(slot.row, len(slot.cached_ids)) for slot in batch.slots]
        logits = self.forward_packed(places, batch.tokens)
        requests = [
            slot.request for slot, n in zip(batch.slots, counts, strict=True) for _ in range(n)
        ]
        guessed = [tokens[1 : 1 + t] for tokens in batch.tokens for t in range(len(tokens))]
        samples = iter(self.sample_with_logprobs(requests, logits, guessed))
        accepted = []
        for slot, tokens in zip(batch.slots, batch.tokens, strict=True):
            own, start = [*islice(samples, len(tokens))], len(slot.cached_ids)
            if len(tokens) > 1 and any(sample.token < 0 for sample in own):
                own = self.decode_without_guesses(batch, slot, tokens)
            else:
                right = [s.token == guess for s, guess in zip(own, tokens[1:], strict=False)]
                own = own[: 1 + [*right, False].index(False)]
                self.cache.set_pos(slot.row, start + len(own))
            accepted.append(own)
        return accepted

    def decode_without_guesses(
        self, batch: ScheduledBatch, slot: Slot, tokens: list[int]
    ) -> list[Sample]:
        """Compute a slot again, in whose pass logits were not finite: a guess may be the cause."""
        start = len(slot.cached_ids)
        self.cache.clear_columns(slot.row, start, start + len(tokens))
        self.cache.set_pos(slot.row, start)
        return self.decode_one_token(batch._replace(slots=[slot], tokens=[tokens[:1]]))

    # --- forward passes

    def forward(self, *args, **options):
        """Logits of the model."""
        with nullcontext() if CUDNN_ATTENTION else sdpa_kernel(WITHOUT_CUDNN):
            return self.model(*args, **options)[0]

    def forward_prompts(self, batch: ScheduledBatch):
        """Logits (R, V) after the last of each slot's tokens; see prefill()."""
        slots, scored = batch.slots, batch.slots[0].request.needs_prompt_logprobs
        rows, tokens = [slot.row for slot in slots], batch.tokens
        width = batch.width and min(batch.width, self.cache.max_length)
        if width:  # rows of padding, which write nothing
            padding = batch.rows - len(slots)
            rows, tokens = rows + rows[:1] * padding, tokens + [[]] * padding
        idx, lengths = pad(tokens, self.cache.pos.device, width)
        cache = self.cache.view(rows, max_pos=len(slots[0].cached_ids))
        ragged = width or len({*map(len, tokens)}) > 1
        lengths = lengths if ragged else None
        logits = self.forward(idx, cache=cache, lengths=lengths, all_positions=scored)
        if scored:
            self.score_prompt(slots[0], logits[0])
            logits = logits[:, -1]
        for slot, tokens in zip(slots, batch.tokens, strict=True):
            self.cache.set_pos(slot.row, len(slot.cached_ids) + len(tokens))
        return logits

    def forward_one_token(self, tokens: np.ndarray, lengths: np.ndarray):
        """Logits (R, V) after one more token (R,) of the first rows; lengths (R,): 0 skips one."""
        inputs = to_device(torch.from_numpy(np.stack((tokens, lengths))), self.cache.pos.device)
        lengths = None if lengths.all() else inputs[1]
        return self.forward(inputs[0, :, None], cache=self.cache, lengths=lengths)

    def forward_packed(self, places: list[tuple[int, int]], tokens: list[list[int]]):
        """Logits (N, V) after each of the N tokens of some rows; places: (row, tokens in it)."""
        idx = to_device(torch.tensor([[*chain(*tokens)]]), self.cache.pos.device)
        cache = PackedCache(self.cache, places, [*map(len, tokens)])
        return self.forward(idx, cache=cache, all_positions=True)[0]

    def forward_row(self, row: int, start: int, tokens: list[int]):
        """Logits (1, V) after some tokens of a row that holds `start` tokens."""
        idx = to_device(torch.tensor([tokens]), self.cache.pos.device)
        return self.forward(idx, cache=self.cache.view([row], max_pos=start))

    # --- CUDA graphs

    def replay(
        self, requests: list[Request], rows: list[int], size: int, columns: int
    ) -> list[Sample]:
        """Decode and sample the first `size` rows, whose inputs are uploaded, by one graph; by two
        if the logits are edited in between. columns 0: the logits are computed already."""
        graphs, work = self.graphs, max(request.sampling.work for request in requests)
        logits = graphs.logits[:size]
        if any(request.sampling.has_penalties or request.grammar for request in requests):
            if columns:
                graphs.replay(self.forward, Step(size, columns, work=None))
            if any(request.top_logprobs is not None for request in requests):
                logits = logits.clone()  # log-probabilities are of logits before these
            edit_logits(graphs.logits, requests, rows)
            columns = 0
        graphs.replay(self.forward, Step(size, columns, work))
        tokens = graphs.read_tokens(rows)
        return self.add_logprobs(requests, rows, tokens, logits)

    def capture_common(self, batch_sizes: list[int]) -> int:
        """Capture the steps of short contexts -> the number of graphs, 0 without a GPU."""
        if not self.graphs:
            return 0
        self.cache.max_pos = 0
        # (1, 0): the sampling after the prompt of one request
        shapes = [(1, 0), *((size, self.cache.columns(1)) for size in batch_sizes)]
        for (size, columns), work in product(shapes, (ARGMAX, DRAW, SORT)):
            self.graphs.capture(self.forward, Step(size, columns, work))
        return len(self.graphs.graphs)

    # --- log-probabilities and sampling

    def score_prompt(self, slot: Slot, logits) -> None:
        """Store the log-probabilities of the prompt tokens that logits (T, V) predict."""
        first, request = len(slot.cached_ids) + 1, slot.request
        following = (slot.cached_ids + slot.uncached_ids)[first : first + len(logits)]
        scores = logprobs_of(logits[: len(following)], following, request.top_logprobs or 0)
        request.prompt_logprobs += scores

    def sample_with_logprobs(
        self, requests: list[Request], logits, guessed: list[list[int]] | None = None
    ) -> list[Sample]:
        """Each request's next token from its row of logits (R, V); guessed: see below."""
        rows = [*range(len(requests))]
        if self.graphs:
            size = min(2 ** (len(rows) - 1).bit_length(), len(self.graphs.logits))
            self.graphs.logits[: len(rows)] = logits
            self.graphs.upload(rows, settings_of(requests))
            return self.replay(requests, rows, size, columns=0)
        tokens = self.sample_requests(requests, logits, guessed)
        return self.add_logprobs(requests, rows, tokens, logits)

    def sample_requests(
        self, requests: list[Request], logits, guessed: list[list[int]] | None = None
    ) -> list[int]:
        """A token for each request from its row of logits (R, V), batched by equal filters.

        guessed: for each row, tokens that are assumed to follow the request's output.
        """
        guessed = guessed or [[]] * len(requests)
        logits = logits.float().masked_fill(self.suppressed, -math.inf)
        edit_logits(logits, requests, range(len(requests)), guessed)
        groups: dict[tuple, list[int]] = {}
        for i, r in enumerate(requests):
            groups.setdefault(r.sampling.filters, []).append(i)
        parts = []
        for group in groups.values():
            draws = [[requests[i].uniform(len(guessed[i]))] for i in group]
            uniforms = to_device(torch.tensor(draws), logits.device)
            sampling = requests[group[0]].sampling
            parts.append(sample_tokens(take_rows(logits, group), sampling, uniforms))
        tokens = torch.cat(parts).tolist()
        in_order = sorted(zip(chain(*groups.values()), tokens, strict=True))
        return [token for _, token in in_order]

    def add_logprobs(
        self, requests: list[Request], rows: list[int], tokens: list[int], logits
    ) -> list[Sample]:
        """The tokens, with log-probabilities, if requested, from their rows of logits."""
        samples = [*map(Sample, tokens)]
        asked = [i for i, request in enumerate(requests) if request.top_logprobs is not None]
        asked = [i for i in asked if tokens[i] >= 0]
        if asked:
            most = max(requests[i].top_logprobs for i in asked)
            own = take_rows(logits, [rows[i] for i in asked])
            found = logprobs_of(own, [tokens[i] for i in asked], most)
            for i, (logprob, top) in zip(asked, found, strict=True):
                samples[i] = Sample(tokens[i], logprob, top[: requests[i].top_logprobs])
        return samples


def settings_of(requests: list[Request]) -> np.ndarray:
    """The settings of sample_rows() (NUM_SETTINGS, R), with each request's next random number."""
    columns = [(r.uniform(), *r.sampling.row_settings) for r in requests]
    return np.array(columns, np.float32).T


def edit_logits(
    logits, requests: list[Request], rows: list[int], guessed: list[list[int]] | None = None
) -> None:
    """Apply the grammars, and then the penalties, to rows of logits (R, V), in place.

    guessed: see sample_requests(); of a request with a grammar, none.
    """
    states = [(row, r.grammar) for row, r in zip(rows, requests, strict=True) if r.grammar]
    if states:
        mask_logits(logits, states)
    guessed = guessed or [[]] * len(requests)
    edits = [
        (row, r.sampling, r.prompt_tokens, r.counts + Counter(ids) if ids else r.counts)
        for row, r, ids in zip(rows, requests, guessed, strict=True)
        if r.sampling.has_penalties
    ]
    apply_penalties(logits, edits)


def pad(parts: list[list[int]], device, width: int | None = None):
    """Token lists -> ids (R, T), padded on the right, and their lengths (R,)."""
    lengths = torch.tensor([len(part) for part in parts])
    idx = torch.zeros(len(parts), width or int(lengths.max()), dtype=torch.long)
    for row, part in zip(idx, parts, strict=True):
        row[: len(part)] = torch.tensor(part)
    return to_device(idx, device), to_device(lengths, device)


def take_rows(tensor, rows: list[int]):
    """Some rows of a tensor; the tensor itself if these are all, in order."""
    if [*rows] == [*range(len(tensor))]:
        return tensor
    return tensor[to_device(torch.tensor(rows), tensor.device)]
