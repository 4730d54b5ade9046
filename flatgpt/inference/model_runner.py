"""
The forward passes and the sampling of an engine.

A pass computes a ScheduledBatch, in which every slot is a row of the KV cache, and returns the
logits of each slot's next token.
"""

import math
from itertools import chain

import numpy as np
import torch

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.inference.cuda_graph import can_capture, replay
from flatgpt.inference.kv_cache import KVCache
from flatgpt.inference.request import Request
from flatgpt.inference.sampling import apply_penalties, logprobs_of, sample_tokens, suppressed_ids
from flatgpt.inference.scheduler import ScheduledBatch, Slot
from flatgpt.runtime import to_device
from model import GPT


class ModelRunner:
    """Computes batches. max_length None: the model's block_size."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, num_slots: int, max_length: int | None):
        self.model, self.cache = model, KVCache(model, num_slots, max_length)
        self.suppressed = suppressed_ids(tokenizer, model)

    def clear_row(self, row: int) -> None:
        """Overwrite a row whose entries may not be finite: a mask does not hide NaN."""
        self.cache.kv[:, :, row] = 0

    def copy_rows(self, batch: ScheduledBatch) -> None:
        for source, target, count in batch.copies:
            self.cache.copy(source, target, count)

    # --- forward passes

    def prefill(self, batch: ScheduledBatch):
        """Compute tokens of one prompt, or of several uncached ones -> logits (R, V)."""
        self.copy_rows(batch)
        slots, scored = batch.slots, batch.slots[0].request.needs_prompt_logprobs
        idx, lengths = pad(batch.tokens, self.cache.pos.device)
        cache = self.cache.view([slot.row for slot in slots], max_pos=len(slots[0].cached_ids))
        ragged = len({*map(len, batch.tokens)}) > 1
        logits, _ = self.model(
            idx, cache=cache, lengths=lengths if ragged else None, all_positions=scored
        )
        if scored:
            self.score_prompt(slots[0], logits[0])
            logits = logits[:, -1]
        for slot, tokens in zip(slots, batch.tokens, strict=True):
            self.cache.set_pos(slot.row, len(slot.cached_ids) + len(tokens))
        return logits

    def decode(self, batch: ScheduledBatch):
        """Compute one more token of each slot -> logits (R, V)."""
        self.copy_rows(batch)
        tokens, lengths = np.zeros((2, batch.rows), np.int64)
        rows = [slot.row for slot in batch.slots]
        tokens[rows], lengths[rows] = [token for (token,) in batch.tokens], 1
        self.cache.max_pos = max(len(slot.cached_ids) for slot in batch.slots)
        logits = self.forward_one_token(tokens, lengths)
        return take_rows(logits, rows)

    def forward_one_token(self, tokens: np.ndarray, lengths: np.ndarray):
        """Logits (R, V) after one more token (R,) of the first rows; lengths (R,): 0 skips one."""
        inputs = to_device(torch.from_numpy(np.stack((tokens, lengths))), self.cache.pos.device)
        if can_capture(inputs):
            return replay(self.model, inputs, self.cache)
        lengths = None if lengths.all() else inputs[1]
        return self.model(inputs[0, :, None], cache=self.cache, lengths=lengths)[0]

    # --- log-probabilities and sampling

    def score_prompt(self, slot: Slot, logits) -> None:
        """Store the log-probabilities of the prompt tokens that logits (T, V) predict."""
        first, request = len(slot.cached_ids) + 1, slot.request
        following = (slot.cached_ids + slot.uncached_ids)[first : first + len(logits)]
        scores = logprobs_of(logits[: len(following)], following, request.top_logprobs or 0)
        request.prompt_logprobs += scores

    def sample_with_logprobs(
        self, requests: list[Request], logits
    ) -> tuple[list[int], list[tuple]]:
        """Each request's next token from its row of logits (R, V), and requested_logprobs()."""
        tokens = self.sample_requests(requests, logits)
        return tokens, self.requested_logprobs(requests, tokens, logits)

    def sample_requests(self, requests: list[Request], logits) -> list[int]:
        """A token for each request from its row of logits (R, V), batched by equal filters."""
        logits = logits.float().masked_fill(self.suppressed, -math.inf)
        groups: dict[tuple, list[int]] = {}
        for i, r in enumerate(requests):
            groups.setdefault(r.sampling.filters, []).append(i)
            if r.sampling.has_penalties:
                apply_penalties(logits[i], r.sampling, r.prompt_tokens, r.counts)
        parts = []
        for group in groups.values():
            draws = [[requests[i].random.random(dtype=np.float32)] for i in group]
            uniforms = to_device(torch.tensor(draws), logits.device)
            sampling = requests[group[0]].sampling
            parts.append(sample_tokens(take_rows(logits, group), sampling, uniforms))
        tokens = torch.cat(parts).tolist()  # the only wait for a GPU
        in_order = sorted(zip(chain(*groups.values()), tokens, strict=True))
        return [token for _, token in in_order]

    def requested_logprobs(self, requests: list[Request], tokens: list[int], logits) -> list[tuple]:
        """(logprob, top_logprobs) of each request's token, (None, ()) if not requested."""
        scores: list[tuple] = [(None, ())] * len(requests)
        asked = [i for i, request in enumerate(requests) if request.top_logprobs is not None]
        asked = [i for i in asked if tokens[i] >= 0]
        if asked:
            most = max(requests[i].top_logprobs for i in asked)
            found = logprobs_of(take_rows(logits, asked), [tokens[i] for i in asked], most)
            for i, (logprob, top) in zip(asked, found, strict=True):
                scores[i] = logprob, top[: requests[i].top_logprobs]
        return scores


def pad(parts: list[list[int]], device):
    """Token lists -> ids (R, T), padded on the right, and their lengths (R,)."""
    lengths = torch.tensor([len(part) for part in parts])
    idx = torch.zeros(len(parts), int(lengths.max()), dtype=torch.long)
    for row, part in zip(idx, parts, strict=True):
        row[: len(part)] = torch.tensor(part)
    return to_device(idx, device), to_device(lengths, device)


def take_rows(tensor, rows: list[int]):
    """Some rows of a tensor; the tensor itself if these are all, in order."""
    if rows == [*range(len(tensor))]:
        return tensor
    return tensor[to_device(torch.tensor(rows), tensor.device)]
