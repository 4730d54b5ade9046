"""
The loss of a model after training, predicted from its size, its context and its tokens.

    predict_loss(parameters, tokens, block_size, Text(tokens=2.5e6, vocab_size=257, ...))
"""

import math
from typing import NamedTuple


class Text(NamedTuple):
    """What the prediction knows of a dataset."""

    tokens: int  # of the training split
    vocab_size: int
    bytes_per_token: float
    max_block_size: int = 2**20  # so that both splits have a whole sequence


FITTED = {'parameters': (1e5, 5e6), 'tokens': (2e5, 2e7), 'epochs': (0, 40)}


def effective_tokens(tokens: float, unique: float) -> float:
    """Repeated tokens are worth less than new ones (Muennighoff et al. 2023, equation 5)."""
    repeats = max(0.0, tokens / unique - 1)
    return min(tokens, unique) + unique * 15.0 * (1 - math.exp(-repeats / 15.0))


def predict_loss(parameters: float, tokens: float, block_size: int, text: Text) -> float:
    context = block_size * text.bytes_per_token
    return (
        0.8
        + 9.0 / parameters**0.25
        + 60.0 / effective_tokens(tokens, text.tokens) ** 0.4
        + 3.0 / context
    )
