"""
Scores continuations with a model: how likely they are, and whether they are the likeliest.

    [(logprob, greedy)] = score(model, [(context, continuation)])   # of token ids
"""

from collections.abc import Callable, Iterator

import torch

from flatgpt.errors import UserError
from flatgpt.inference.engine import NOT_FINITE
from flatgpt.inference.model_runner import pad
from model import GPT

BATCH_TOKENS = 8192  # at most, padding included, unless a single sequence is longer
LOGITS_CHUNK = 2048  # predictions whose logits are in memory at once


def windows(context: list[int], continuation: list[int], size: int) -> Iterator[tuple]:
    """(input of at most `size` tokens, the targets of its last positions), in order.

    Every token of the continuation is predicted once. Context that does not fit is cut off on the
    left; a longer continuation is split over several windows, each as full as can be.
    """
    tokens = context + continuation
    for start in range(len(context), len(tokens), size):
        end = min(start + size, len(tokens))
        yield tuple(tokens[max(0, end - 1 - size) : end - 1]), tokens[start:end]


def batch_by_length(rows: list, length=len) -> Iterator[list]:
    """Rows in groups of BATCH_TOKENS at most, or of one; the longest first, for little padding."""
    rows = sorted(rows, key=length, reverse=True)
    at = 0
    while at < len(rows):
        count = max(1, BATCH_TOKENS // length(rows[at]))
        yield rows[at : at + count]
        at += count


@torch.inference_mode()
def score(
    model: GPT, pairs: list[tuple], batches: Callable = batch_by_length
) -> list[tuple[float, bool]]:
    """(context, continuation) -> log-probability of each continuation, and whether all its tokens
    are the likeliest.

    batches: divides rows into batches, as batch_by_length does.
    """
    wanted = {}  # input, which several pairs may share -> (pair, tokens to predict) of each
    for number, (context, continuation) in enumerate(pairs):
        for given, targets in windows(context, continuation, model.config.block_size):
            wanted.setdefault(given, []).append((number, targets))
    total = torch.zeros(len(pairs), dtype=torch.float64)
    misses = torch.zeros(len(pairs), dtype=torch.long)
    for batch in batches(list(wanted), len):
        for owners, logprobs, hits in predict(model, batch, wanted):
            total.index_add_(0, owners, logprobs.cpu().double())
            misses.index_add_(0, owners, (~hits).cpu().long())
    if not total.isfinite().all():
        raise UserError(NOT_FINITE)
    return list(zip(total.tolist(), (misses == 0).tolist(), strict=True))


def predict(model: GPT, batch: list[tuple], wanted: dict) -> Iterator[tuple]:
    """(pairs, log-probabilities, whether the likeliest) of LOGITS_CHUNK predictions or less."""
    idx, _ = pad(batch, model.embedding.weight.device)  # (B, T), padded on the right
    x = model.trunk(idx, torch.arange(idx.size(1), device=idx.device))  # (B, T, C)
    where = [
        (number, row, len(given) - len(targets) + i, target)
        for row, given in enumerate(batch)
        for number, targets in wanted[given]
        for i, target in enumerate(targets)
    ]
    for part in torch.tensor(where).split(LOGITS_CHUNK):
        owners, (rows, columns, targets) = part[:, 0], part[:, 1:].T.to(idx.device)
        logits = model.head(x[rows, columns]).float()  # (N, V)
        chosen = logits.gather(1, targets[:, None])[:, 0]
        yield owners, chosen - logits.logsumexp(1), logits.argmax(1) == targets
