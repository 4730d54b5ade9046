"""
Soft targets: the predictions of an n-gram model of the training text. A next token is one sample;
these show the whole distribution, from which a small model learns faster.

    ngrams = NGramModel(data, order=5, device=device)   # counts the training split
    targets = ngrams.predict(x)                         # (B, T) -> probabilities (B, T, V)

Malagutti et al. 2024, "The Role of n-gram Smoothing in the Age of Neural Networks". The smoothing
is that of Witten and Bell (1991), "The Zero-Frequency Problem", with more weight on the shorter
context:

    p(token | context) = (count + w * p(token | shorter context)) / (total + w)

where w is BACKOFF times the number of different tokens seen after the context.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from flatgpt.data.dataset import Dataset

BACKOFF = 4  # 1 in the paper; on Shakespeare's characters, 4 predicts the validation split better
MAX_TOKENS = 20_000_000  # counted, which takes some seconds


class Contexts(NamedTuple):
    """The contexts of one length, and the tokens seen after each, all in ascending order."""

    keys: torch.Tensor  # (contexts,), the tokens of the context as the digits of one number
    backoff: torch.Tensor  # (contexts,), the weight of the prediction from a shorter context
    offset: torch.Tensor  # (contexts,), its first entry below
    kinds: torch.Tensor  # (contexts,), the number of its entries
    tokens: torch.Tensor  # (entries,)
    added: torch.Tensor  # (entries,), the probability that the counts add to the token's


class NGramModel:
    """An n-gram model of the training split, or of its first MAX_TOKENS tokens; of a mixture, of
    the parts of the split in the mixture's shares.

    order: tokens per n-gram, the predicted one included; at most max_order(data.vocab_size).
    """

    def __init__(self, data: Dataset, order: int, device: str | torch.device = 'cpu'):
        self.vocab_size = data.vocab_size
        total = min(MAX_TOKENS, *(part.data.tokens['train'] / part.share for part in data.parts))
        parts = [part.data.first_tokens(int(total * part.share)) for part in data.parts]
        grams = np.concatenate([self._keys(ids.astype(np.int64), order) for ids in parts])
        grams, counts = np.unique(grams, return_counts=True)
        self.levels: list[Contexts] = []  # the shortest contexts first
        for _ in range(order):
            level, grams, counts = self._level(grams, counts)
            self.levels.insert(0, Contexts(*(torch.from_numpy(a).to(device) for a in level)))
        # without a context all positions are alike: computed once
        self.unigram = torch.full((1, self.vocab_size), 1.0 / self.vocab_size, device=device)
        level = self.levels.pop(0)
        self._refine(self.unigram, torch.zeros(1, dtype=torch.long, device=device), level)

    def _keys(self, ids: np.ndarray, order: int) -> np.ndarray:
        """The n-grams of a text as the digits of one number each, the oldest token first."""
        keys = np.zeros(max(0, len(ids) - order + 1), np.int64)
        for place in range(order):
            keys = keys * self.vocab_size + ids[place : place + len(keys)]
        return keys

    def _level(
        self, grams: np.ndarray, counts: np.ndarray
    ) -> tuple[Contexts, np.ndarray, np.ndarray]:
        """The contexts of sorted n-grams; also as the n-grams of the next shorter order."""
        keys, offset, kinds = np.unique(
            grams // self.vocab_size, return_index=True, return_counts=True
        )
        totals = np.add.reduceat(counts, offset)
        scale = 1.0 / (totals + BACKOFF * kinds)
        backoff, added = BACKOFF * kinds * scale, counts * scale.repeat(kinds)
        backoff, added = backoff.astype(np.float32), added.astype(np.float32)
        level = Contexts(keys, backoff, offset, kinds, grams % self.vocab_size, added)
        return level, keys, totals

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """The distribution of the token after each token of x (B, T), given those before it in its
        row, as probabilities (B, T, V)."""
        B, T = x.shape
        p = self.unigram.repeat(B * T, 1)
        keys = torch.zeros_like(x)
        for age, level in enumerate(self.levels):
            # the context grows by an older token; at the start of a row there is none
            older = x.new_full((B, min(T, age)), -1)
            older = torch.cat([older, x[:, : max(0, T - age)]], dim=1)
            known = (older >= 0) & (keys >= 0)
            keys = torch.where(known, keys + older * self.vocab_size**age, -1)
            self._refine(p, keys.flatten(), level)
        return p.view(B, T, -1)

    def _refine(self, p: torch.Tensor, keys: torch.Tensor, level: Contexts) -> None:
        """Turn the predictions (N, V) from shorter contexts into those from these, where seen."""
        if not len(level.keys):  # the text is shorter than an n-gram
            return
        at = torch.searchsorted(level.keys, keys).clamp_(max=len(level.keys) - 1)
        seen = level.keys[at] == keys
        p *= torch.where(seen, level.backoff[at], 1.0)[:, None]
        rows = seen.nonzero()[:, 0]
        at = at[rows]
        kinds = level.kinds[at]
        entries = torch.arange(int(kinds.sum()), device=p.device)
        entries += (level.offset[at] - kinds.cumsum(0) + kinds).repeat_interleave(kinds)
        places = (rows * self.vocab_size).repeat_interleave(kinds) + level.tokens[entries]
        p.view(-1).index_add_(0, places, level.added[entries])


def max_order(vocab_size: int) -> int:
    """The highest order whose n-grams fit in 63 bits."""
    return int(63 / math.log2(max(2, vocab_size)))
