"""
The recipe of config/auto.py: all settings of a run that follow from its size and its length.

    choice = Choice(Shape(n_layer=5, n_head=2, n_embd=160), block_size=256, tokens=4e6)
    settings = settings_of(choice, text, config, given)

The rules follow runs of 0.2 to 13 million tokens on CPUs. Settings that the user gives are kept.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from flatgpt.errors import ConfigError
from flatgpt.training.scaling import Text, fits_text
from flatgpt.training.validate import global_batch_size

# layers and width; widths are multiples of 64, since on CPUs the products of others were up to a
# tenth slower
LADDER = (
    *((2, 64), (2, 128), (3, 128), (4, 128), (5, 128), (3, 192), (4, 192), (5, 192), (6, 192)),
    *((3, 256), (4, 256), (5, 256), (6, 256), (4, 320), (5, 320), (6, 320), (6, 384), (8, 384)),
    *((8, 448), (8, 512), (10, 512), (10, 640), (12, 768), (14, 896), (16, 1024), (20, 1280)),
    *((24, 1536), (28, 1792), (32, 2048)),
)
BLOCK_SIZES = (64, 128, 256, 512, 1024)
SHORT = 0.53  # of the steps use sequences of a quarter of the length: cheaper attention
LEAST_SHORT = 16  # tokens; those of 64, the shortest of BLOCK_SIZES
EVALUATIONS = 4  # and one before the first step
EVALUATION_SHARE = 0.03  # of the time
FORWARD_SHARE = 1 / 3  # of the time of a training step
STATE_BYTES = 24  # of a parameter: its gradient, the optimizer, and the copy that is saved
ACTIVATION_BYTES = 60  # per token, layer and n_embd, at most


class Shape(NamedTuple):
    n_layer: int
    n_head: int
    n_embd: int

    @property
    def parameters(self) -> int:
        """Parameters in the blocks."""
        return 12 * self.n_layer * self.n_embd**2

    def flops_per_token(self, vocab_size: int, block_size: float) -> float:
        """Forward and backward, as GPT.flops_per_token()."""
        head = vocab_size * self.n_embd
        return 6 * (self.parameters + head) + 12 * self.n_layer * self.n_embd * block_size

    def mean_flops(self, vocab_size: int, block_size: int) -> float:
        """flops_per_token() over the whole run, with its short sequences."""
        short, full = (self.flops_per_token(vocab_size, n) for n in (block_size / 4, block_size))
        return SHORT * short + (1 - SHORT) * full


class Choice(NamedTuple):
    """A model, and how many tokens it trains on."""

    shape: Shape
    block_size: int
    tokens: float


def possible_shapes(config: dict, given: dict, text: Text, memory: float) -> Iterator[Shape]:
    """The shapes of LADDER that fit the text and `memory` bytes; those with what is given."""
    pinned = {name: config[name] for name in Shape._fields if name in given}
    sizes = {(n, c): Shape(n, 1, c).parameters for n, c in LADDER}
    shapes = {
        shape
        for shape, size in sizes.items()
        if STATE_BYTES * size < memory and fits_text(size, text.tokens)
    } or {LADDER[0]}
    if pinned.keys() & {'n_layer', 'n_embd'}:
        layers, widths = map(set, zip(*shapes, strict=True))
        layers = {pinned['n_layer']} if 'n_layer' in pinned else layers
        widths = {pinned['n_embd']} if 'n_embd' in pinned else widths
        shapes = product(layers, widths)
    for n_layer, n_embd in sorted(shapes):
        yield Shape(n_layer, pinned.get('n_head', heads(n_embd)), n_embd)


def heads(n_embd: int) -> int:
    """Few wide heads for a small model, since they make attention cheaper; GPT-2's 12 at 768."""
    widest = 96 if n_embd < 512 else 64 if n_embd < 1280 else 128
    even = (n for n in range(1, n_embd + 1) if n_embd % (2 * n) == 0)
    return next((n for n in even if n_embd // n <= widest), 1)


def possible_block_sizes(config: dict, given: dict, text: Text) -> tuple[int, ...]:
    if 'block_size' in given:
        if config['block_size'] >= text.val_tokens:
            raise ConfigError(
                f'block_size={config["block_size"]}: is longer than the validation split of '
                f'{text.val_tokens:,} tokens; use --block_size={text.max_context}'
            )
        return (config['block_size'],)
    return tuple(n for n in BLOCK_SIZES if n <= text.max_context) or (text.max_context,)


def tokens_per_step(tokens: float) -> float:
    """Tokens per step for a run on this many tokens."""
    return max(2048.0, 3072 * (tokens / 2.4e6) ** 0.3)


def dropout_after(epochs: float) -> float:
    """None for a text that is read up to four times, 0.15 if it is read thirteen times."""
    return round(min(0.2, max(0.0, 0.088 * math.log2(max(epochs, 1) / 4))), 2)


def settings_of(
    choice: Choice, text: Text, config: dict, given: dict, ranks: int = 1, memory: float = math.inf
) -> dict:
    """The settings of a run, without those that are given. memory: bytes of each rank."""
    shape, block_size, tokens = choice
    batch = batch_settings(choice, text, config, given, ranks, memory)
    steps = steps_of(choice, batch)
    short_block_size = None if 'short_iters' in given else short_block_size_of(block_size)
    evaluations = EVALUATIONS
    if 'eval_interval' in given:
        evaluations = max(1, steps // (config['eval_interval'] or steps))
    evaluated = EVALUATION_SHARE / FORWARD_SHARE * tokens / (1 + config['eval_train'])  # tokens
    settings = {
        **shape._asdict(),
        'block_size': block_size,
        'short_block_size': short_block_size,
        'short_iters': round(SHORT * steps) if short_block_size else 0,
        **batch,
        'max_iters': steps,
        'lr_decay_iters': None,  # the last step
        **(muon_settings(steps) if config['optimizer'] == 'muon' else {}),
        'warmup_iters': min(10, steps // 150),
        'dropout': dropout_after(tokens / text.tokens),
        'eval_interval': -(-steps // EVALUATIONS),
        'eval_iters': max(1, round(evaluated / evaluations / batch['batch_size'] / block_size)),
        'log_interval': max(1, steps // 100),
    }
    return {name: value for name, value in settings.items() if name not in given}


def short_block_size_of(block_size: int) -> int | None:
    """A quarter of block_size, or the next shorter length that divides it; None if that is less
    than an eighth, or than LEAST_SHORT."""
    least = max(LEAST_SHORT, -(-block_size // 8))
    lengths = range(block_size // 4, least - 1, -1)
    return next((n for n in lengths if block_size % n == 0), None)


def steps_of(choice: Choice, batch: dict[str, int]) -> int:
    """batch: see batch_settings()."""
    return max(1, round(choice.tokens / global_batch_size(batch) / choice.block_size))


def muon_settings(steps: int) -> dict[str, float]:
    """The learning rates of Muon and of the AdamW that trains the rest, and the momentum."""
    muon_lr = min(0.06, max(0.01, 0.04 * (400 / steps) ** 0.3))
    return {
        'muon_lr': float(f'{muon_lr:.2g}'),
        'learning_rate': float(f'{muon_lr / 6:.2g}'),
        'muon_momentum': round(min(0.95, max(0.85, 1 - 0.1 * (775 / steps) ** 0.2)), 3),
    }


def batch_settings(
    choice: Choice, text: Text, config: dict, given: dict, ranks: int, memory: float
) -> dict[str, int]:
    """batch_size and gradient_accumulation_steps, in micro-batches that half the memory holds."""
    shape, block_size, tokens = choice
    rows = max(1, round(tokens_per_step(tokens) / block_size / ranks))  # of each rank
    most = max(1, int(min(memory / 2 / token_bytes(shape, text.vocab_size) / block_size, rows)))
    if 'batch_size' in given:
        size = config['batch_size']
    elif 'gradient_accumulation_steps' in given:
        size = min(most, max(1, round(rows * ranks / config['gradient_accumulation_steps'])))
    else:
        size = -(-rows // -(-rows // most))
    steps = max(1, round(rows / size)) * ranks
    if 'gradient_accumulation_steps' in given:
        steps = config['gradient_accumulation_steps']
    return {'batch_size': size, 'gradient_accumulation_steps': steps}


def token_bytes(shape: Shape, vocab_size: int) -> int:
    """Memory of the activations of a token, at most."""
    return ACTIVATION_BYTES * shape.n_layer * shape.n_embd + 10 * vocab_size
