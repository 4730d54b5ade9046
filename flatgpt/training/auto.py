"""
One dial: the model and the schedule that reach the lowest loss in the given time.

$ python train.py config/auto.py --dataset=mine --minutes=10
$ python train.py config/auto.py --tokens=20_000_000 --n_layer=6     # what is given stays

    deadline = choose_settings(config, given, runtime)         # sets them in config

The speed of this machine is measured on a few small models, for some seconds. scaling.py predicts
the loss of each size of model after the tokens that it could train on in the time; the lowest one
is chosen. With `tokens` or `flops` nothing is measured. Only rank 0 measures and chooses.
"""

import math
import statistics
import time
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch

from flatgpt import STARTED
from flatgpt.data.mixture import open_data
from flatgpt.errors import ConfigError, as_config_error, counted
from flatgpt.runtime import Runtime, available_memory
from flatgpt.training.deadline import Deadline
from flatgpt.training.optim import build_optimizers
from flatgpt.training.scaling import FITTED, LAW, Text
from flatgpt.training.validate import (
    DIALS,
    SHAPE,
    check_dial,
    check_resumed_dial,
    padded_vocab_size,
)
from model import GPT, GPTConfig

# layers and width; the ratio of both changes the loss little, and few wide layers are faster
LADDER = (
    *((2, 64), (2, 96), (2, 128), (3, 128), (4, 128), (4, 160), (5, 160), (5, 192), (6, 192)),
    *((6, 224), (6, 256), (7, 288), (8, 320), (8, 384), (10, 448), (10, 512), (12, 640), (12, 768)),
    *((16, 896), (16, 1024), (20, 1280), (24, 1536), (28, 1792), (32, 2048)),
)
BLOCK_SIZES = (64, 128, 256, 512, 1024)
SHORT = 0.53  # of the steps use sequences of a quarter of the length
PROBES = (64, 128, 256, 512, 1024, 2048)  # widths of the models whose speed is measured
PROBE_STEPS = 3  # measured after one to warm up
PROBE_SHARE = 0.02  # of the time: the next wider probe must be faster
EVALUATIONS = 4  # and one before the first step
EVALUATION_SHARE = 0.03  # of the time
FORWARD_SHARE = 1 / 3  # of the time of a training step
SETUP_SECONDS = 0.5  # to build the model and open the run
LEAST_STEPS = 40  # a run of fewer is refused
LEAST_TOKENS = 2_000  # of a training split
ACTIVATION_BYTES = 60  # per token, layer and n_embd, at most
PLOT_SECONDS = 1.0  # to draw the loss, save the checkpoint and exit


class Shape(NamedTuple):
    n_layer: int
    n_head: int
    n_embd: int

    @property
    def block_parameters(self) -> int:
        return 12 * self.n_layer * self.n_embd**2

    def flops_per_token(self, vocab_size: int, length: int) -> float:
        """Forward and backward, as GPT.flops_per_token()."""
        head = vocab_size * self.n_embd
        attention = 12 * self.n_layer * self.n_embd * length
        return 6 * (self.block_parameters + head) + attention


@dataclass(frozen=True)
class Machine:
    """What was measured: FLOP/s of a training step, by the width of the model."""

    speeds: dict[int, float]
    seconds: float  # that measuring took

    def speed(self, width: int) -> float:
        """Interpolated on a log-log scale; constant beyond what was measured."""
        widths = sorted(self.speeds)
        if width <= widths[0] or width >= widths[-1]:
            return self.speeds[widths[0] if width <= widths[0] else widths[-1]]
        high = widths[bisect(widths, width)]
        low = widths[bisect(widths, width) - 1]
        share = math.log(width / low) / math.log(high / low)
        return self.speeds[low] ** (1 - share) * self.speeds[high] ** share


@dataclass(frozen=True)
class Candidate:
    """A model, its context, how many tokens it trains on, and the loss to expect."""

    shape: Shape
    block_size: int
    tokens: float
    loss: float


class StepCost(NamedTuple):
    """Seconds of a step with short and with full-length sequences, and of an evaluation."""

    short: float
    full: float
    short_iters: int
    evaluation: float
    eval_interval: int

    def seconds(self, first: int, last: int) -> float:
        """Of the steps from `first` to `last`, with the evaluations before them."""
        short = max(0, min(last, self.short_iters) - first)
        evaluations = -(-last // self.eval_interval) - -(-first // self.eval_interval)
        steps = short * self.short + (last - first - short) * self.full
        return steps + evaluations * self.evaluation


# -----------------------------------------------------------------------------
# the rules


def candidate_shapes(config: dict, given: dict) -> Iterator[Shape]:
    """The shapes to choose from; what is given stays."""
    pinned = {name: config[name] for name in Shape._fields if name in given}
    shapes = set(LADDER)
    if pinned.keys() & {'n_layer', 'n_embd'}:
        depths, widths = ({shape[i] for shape in LADDER} for i in (0, 1))
        depths = {pinned['n_layer']} if 'n_layer' in pinned else depths
        widths = {pinned['n_embd']} if 'n_embd' in pinned else widths
        shapes = product(depths, widths)
    for n_layer, n_embd in sorted(shapes):
        yield Shape(n_layer, pinned.get('n_head', heads(n_embd)), n_embd)


def heads(n_embd: int) -> int:
    """As few heads of at most 96 as divide the width: wide heads make attention cheaper on a CPU,
    and at 768 there are 12 of 64 as usual."""
    most = 96 if n_embd < 512 else 64 if n_embd < 1280 else 128
    return next(n for n in range(1, n_embd + 1) if n_embd % (2 * n) == 0 and n_embd // n <= most)


def candidate_block_sizes(config: dict, given: dict, text: Text) -> tuple[int, ...]:
    if 'block_size' in given:
        return (config['block_size'],)
    longest = min(text.tokens // 16, text.val_tokens - 1)
    return tuple(size for size in BLOCK_SIZES if size <= longest) or (longest,)


def tokens_per_step(tokens: float) -> float:
    """Tokens of a step of a run on so many tokens, from runs of 0.2 to 13 million tokens."""
    return max(2048.0, 3072 * (tokens / 2.4e6) ** 0.3)


def dropout_rule(epochs: float) -> float:
    """From runs of up to 40 epochs."""
    return round(min(0.3, max(0.0, 0.15 * math.log2(max(epochs, 1) / 4) / 1.7)), 2)


def settings_of(
    choice: Candidate, text: Text, config: dict, given: dict, ranks: int = 1, memory=math.inf
) -> dict:
    """The settings of a run, all that follows from its size and length. What is given stays.

    memory: bytes that each rank may use.
    """
    block_size, shape = choice.block_size, choice.shape
    if 'batch_size' in given:
        micro_rows, steps = config['batch_size'], tokens_per_step(choice.tokens) / block_size
        micro_steps = max(1, round(steps / micro_rows / ranks)) * ranks
    else:
        rows = max(1, round(tokens_per_step(choice.tokens) / block_size / ranks))
        token_bytes = ACTIVATION_BYTES * shape.n_layer * shape.n_embd + 10 * text.vocab_size
        most = max(1, int(min(memory, 2**60) / 2 / token_bytes / block_size))
        micro_steps = -(-rows // most) * ranks
        micro_rows = max(1, round(rows * ranks / micro_steps))
    if 'gradient_accumulation_steps' in given:
        micro_steps = config['gradient_accumulation_steps']
    rows = micro_rows * micro_steps
    steps = max(1, round(choice.tokens / (rows * block_size)))
    muon_lr = min(0.06, max(0.01, 0.03 * (775 / steps) ** 0.3))
    chosen = {
        **shape._asdict(),
        'block_size': block_size,
        'short_block_size': max(1, block_size // 4),
        'short_iters': round(SHORT * steps),
        'gradient_accumulation_steps': micro_steps,
        'batch_size': micro_rows,
        'max_iters': steps,
        'lr_decay_iters': None,  # the last step
        'muon_lr': float(f'{muon_lr:.2g}'),
        'learning_rate': float(f'{muon_lr / 5:.2g}'),
        'muon_momentum': round(min(0.95, max(0.85, 1 - 0.1 * (775 / steps) ** 0.2)), 3),
        'warmup_iters': min(10, steps // 150),
        'dropout': dropout_rule(choice.tokens / text.tokens),
        'eval_interval': max(1, -(-steps // EVALUATIONS)),
        'log_interval': max(1, steps // 100),
    }
    share = EVALUATION_SHARE / FORWARD_SHARE / (1 + config['eval_train'])
    evaluated = share * choice.tokens / EVALUATIONS  # tokens
    chosen['eval_iters'] = max(1, round(evaluated / micro_rows / block_size))
    return {name: value for name, value in chosen.items() if name not in given}


# -----------------------------------------------------------------------------
# the speed of this machine


def measure(config: dict, runtime: Runtime, vocab_size: int, seconds: float) -> Machine:
    """Time training steps of small models, the wider ones only if the run could use them.

    seconds: that the run may take.
    """
    began, speeds = time.perf_counter(), {}
    length, tokens = 128, 3072 if runtime.device_type == 'cpu' else 16384
    for width in PROBES:
        shape = Shape(2, heads(width), width)
        flops = tokens * shape.flops_per_token(vocab_size, length)
        if speeds and flops / [*speeds.values()][-1] * (PROBE_STEPS + 1) > PROBE_SHARE * seconds:
            break
        speeds[width] = flops / time_step(config, runtime, vocab_size, shape, length, tokens)
    return Machine(speeds, time.perf_counter() - began)


def time_step(
    config: dict, runtime: Runtime, vocab_size: int, shape: Shape, length: int, tokens: int
) -> float:
    """Seconds of a training step, without its data."""
    gpt = GPTConfig(
        **shape._asdict(), block_size=length, vocab_size=vocab_size, arch=config['arch']
    )
    model = GPT(gpt).to(runtime.device).train()
    optimizers = build_optimizers(
        config['optimizer'],
        model,
        learning_rate=1e-3,
        betas=(0.9, 0.95),
        muon_lr=1e-3,
        muon_momentum=0.9,
        weight_decay=0.1,
    )
    x = torch.randint(vocab_size, (tokens // length, length), device=runtime.device)
    taken = []
    for _ in range(1 + PROBE_STEPS):
        synchronize(runtime)
        began = time.perf_counter()
        with runtime.autocast():
            _, loss = model(x, x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        synchronize(runtime)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def synchronize(runtime: Runtime) -> None:
    if runtime.device_type != 'cpu':
        getattr(torch, runtime.device_type).synchronize()


# -----------------------------------------------------------------------------
# the choice


def mean_flops(shape: Shape, block_size: int, vocab_size: int) -> float:
    """FLOPs of a token, over short and full-length sequences."""
    short, full = (shape.flops_per_token(vocab_size, n) for n in (block_size / 4, block_size))
    return SHORT * short + (1 - SHORT) * full


def candidates(config: dict, given: dict, text: Text, tokens_in) -> list[Candidate]:
    """All candidates, the best first. tokens_in(shape, block_size): what each could train on."""
    found = []
    for shape in candidate_shapes(config, given):
        for block_size in candidate_block_sizes(config, given, text):
            tokens = tokens_in(shape, block_size)
            steps = tokens / tokens_per_step(max(tokens, 1))
            if steps >= LEAST_STEPS:
                loss = LAW.predict(shape.block_parameters, tokens, block_size, text)
                found.append(Candidate(shape, block_size, tokens, loss))
    return sorted(found, key=lambda candidate: candidate.loss)


def closing_seconds(shape: Shape, sample_tokens: int, machine: Machine) -> float:
    """An estimate of what comes after the last evaluation: the checkpoint, plot and sample."""
    a_token = 2.5e-4 * shape.n_layer + 160 * shape.block_parameters / machine.speed(shape.n_embd)
    return PLOT_SECONDS + sample_tokens * a_token


def choose_in_time(
    config: dict, given: dict, text: Text, machine: Machine, seconds: float
) -> list[Candidate]:
    """The candidates for a run whose training, evaluations and sample take so many seconds."""

    def tokens_in(shape: Shape, block_size: int) -> float:
        left = seconds - closing_seconds(shape, config['sample_tokens'], machine)
        flops = max(0.0, left) * machine.speed(shape.n_embd) / (1 + EVALUATION_SHARE)
        return flops / mean_flops(shape, block_size, text.vocab_size)

    return candidates(config, given, text, tokens_in)


def choose_for_flops(config: dict, given: dict, text: Text, flops: float) -> list[Candidate]:
    def tokens_in(shape: Shape, block_size: int) -> float:
        return flops / mean_flops(shape, block_size, text.vocab_size)

    return candidates(config, given, text, tokens_in)


def choose_for_tokens(config: dict, given: dict, text: Text, tokens: float) -> list[Candidate]:
    """The largest model for which so many tokens are the best use of its operations."""
    found = candidates(config, given, text, lambda shape, block_size: tokens)
    for candidate in sorted(found, key=lambda c: c.shape.block_parameters, reverse=True):
        flops = tokens * mean_flops(candidate.shape, candidate.block_size, text.vocab_size)
        best = choose_for_flops(config, given, text, flops)[0]
        if best.shape.block_parameters >= candidate.shape.block_parameters:
            return [candidate, *found]
    return found


def read_text(config: dict) -> Text:
    """What the prediction needs to know of the dataset. ConfigError if it is too small."""
    data = open_data(config['dataset'], 1, config['seed'], config['objective'])
    tokens, vocab_size = data.tokens['train'], data.vocab_size
    if tokens < LEAST_TOKENS:
        raise ConfigError(
            f'dataset={config["dataset"]!r}: has {counted(tokens, "token")} to train on, and a '
            f'model needs at least {LEAST_TOKENS:,}; prepare more text'
        )
    if tokens < vocab_size:
        raise ConfigError(
            f'dataset={config["dataset"]!r}: its {data.tokenizer.name} tokenizer has '
            f'{vocab_size:,} tokens, more than the text ({tokens:,}); prepare it with '
            '--tokenizer=byte, or with --tokenizer=bpe and a small --vocab_size'
        )
    text_bytes = data.text_bytes('train') or tokens
    vocab_size, val_tokens = padded_vocab_size(vocab_size), data.tokens['val']
    return Text(tokens, vocab_size, text_bytes / tokens, val_tokens)


def choose_settings(
    config: dict, given: dict, runtime: Runtime, resumed: bool = False
) -> Deadline | None:
    """Set what the dial chooses in config -> the Deadline of a run with `minutes`.

    resumed: whether the settings are those of a run to resume, which were chosen at its start.
    """
    if resumed:
        check_resumed_dial(config, given)
        config |= dict.fromkeys(DIALS)
    dial = check_dial(config, given)
    if not dial:
        return None
    chosen, cost, closing, lines = runtime.broadcast_from_rank0(
        lambda: choose(dial, config, given, runtime)
    )
    for line in lines:
        runtime.print0(f'auto: {line}')
    ends = STARTED + 60 * config['minutes'] - closing if dial == 'minutes' else None
    config |= chosen | {dial: None}  # plain settings: a resumed run does not measure
    if ends is None:
        return None
    return Deadline(ends, cost.seconds, config['max_iters'], alone=runtime.world_size == 1)


def step_cost(config: dict, shape: Shape, text: Text, machine: Machine | None) -> StepCost:
    """What the steps and evaluations of a run cost, by what was measured."""
    speed = machine.speed(shape.n_embd) if machine else math.inf
    rows = config['batch_size'] * config['gradient_accumulation_steps']
    tokens, length = rows * config['block_size'], config['block_size']
    short, full = (
        tokens * shape.flops_per_token(text.vocab_size, n) / speed
        for n in (config['short_block_size'], length)
    )
    evaluated = text.val_tokens
    if config['eval_iters'] is not None:
        evaluated = min(evaluated, config['eval_iters'] * config['batch_size'] * length)
    evaluation = evaluated * (1 + config['eval_train']) / tokens * full * FORWARD_SHARE
    interval = config['eval_interval'] or config['max_iters']
    return StepCost(short, full, config['short_iters'], evaluation, interval)


def least_value(dial: str, config: dict, given: dict, text: Text, machine: Machine | None) -> float:
    """The least value of the dial for LEAST_STEPS steps of the smallest candidate."""
    tokens = LEAST_STEPS * tokens_per_step(1)
    shape = min(candidate_shapes(config, given), key=lambda shape: shape.block_parameters)
    block_size = min(candidate_block_sizes(config, given, text))
    flops = tokens * mean_flops(shape, block_size, text.vocab_size)
    if dial == 'minutes':
        closing = closing_seconds(shape, config['sample_tokens'], machine)
        training = flops / machine.speed(shape.n_embd) * (1 + EVALUATION_SHARE)
        return 1.1 * (time.perf_counter() - STARTED + SETUP_SECONDS + training + closing) / 60
    return 1.1 * (flops if dial == 'flops' else tokens)


def describe(
    config: dict,
    found: list[Candidate],
    text: Text,
    machine: Machine | None,
    cost: StepCost,
    closing: float,
    spent: float,
) -> Iterator[str]:
    """Five lines: the machine, the text, the model, the schedule, and how far the fits reach."""
    best, tokens = found[0], config['batch_size'] * config['block_size']
    tokens *= config['gradient_accumulation_steps']
    if machine:
        speeds = ', '.join(f'{v / 1e9:,.0f} (width {w})' for w, v in sorted(machine.speeds.items()))
        yield f'this machine trains at {speeds} GFLOP/s, measured in {machine.seconds:.1f} s'
    else:
        yield 'nothing is measured without --minutes'
    yield (
        f'{config["dataset"]} has {text.tokens:,} tokens to train on, of '
        f'{text.bytes_per_token:.2f} bytes; the run reads them '
        f'{best.tokens / text.tokens:,.2g} times'
    )
    yield (
        f'model: {format_candidate(best)}, dropout {config["dropout"]}; '
        f'next: {"; ".join(format_candidate(other) for other in runners_up(found))}'
    )
    steps = config['max_iters']
    schedule = (
        f'{steps:,} steps of {tokens:,} tokens, the first {config["short_iters"]:,} in sequences '
        f'of {config["short_block_size"]}'
    )
    if machine:
        training = cost.seconds(0, steps)
        schedule += f': {training:,.0f} s, after {spent:.0f} s and before {closing:.0f} s'
    yield schedule
    yield reach(best, text)


def format_candidate(candidate: Candidate) -> str:
    shape = candidate.shape
    return (
        f'{shape.n_layer} x {shape.n_embd} ({shape.block_parameters / 1e6:,.1f}M), context '
        f'{candidate.block_size}, loss {candidate.loss:.3f}'
    )


def runners_up(found: list[Candidate]) -> list[Candidate]:
    """The best candidates of two other shapes."""
    others = {}
    for candidate in found:
        if candidate.shape != found[0].shape:
            others.setdefault(candidate.shape, candidate)
    return [*others.values()][:2]


def reach(best: Candidate, text: Text) -> str:
    """Whether the prediction lies within the runs that it was fitted to."""
    values = {
        'parameters': best.shape.block_parameters,
        'tokens': best.tokens,
        'epochs': best.tokens / text.tokens,
    }
    outside = [name for name, value in values.items() if not within(value, FITTED[name])]
    if not outside:
        return 'the loss is interpolated between runs of this kind (docs/results.md)'
    return f'the loss is extrapolated: no run had such a number of {" and ".join(outside)}'


def within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def choose(
    dial: str, config: dict, given: dict, runtime: Runtime
) -> tuple[dict, StepCost, float, list[str]]:
    """The chosen settings, what steps cost, the seconds after training, and what to print."""
    text, machine = read_text(config), None
    if dial == 'minutes':
        left = 60 * config['minutes'] - SETUP_SECONDS - (time.perf_counter() - STARTED)
        machine = measure(config, runtime, text.vocab_size, left)
        found = choose_in_time(config, given, text, machine, left - machine.seconds)
    else:
        function = choose_for_tokens if dial == 'tokens' else choose_for_flops
        found = function(config, given, text, config[dial])
    if not found:
        least = least_value(dial, config, given, text, machine)
        raise ConfigError(
            f'{dial}={config[dial]:g}: is too little for the {LEAST_STEPS} steps that the smallest '
            f'model needs; use at least --{dial}={least:.2g}'
        )
    best = found[0]
    memory = available_memory(runtime) or math.inf
    chosen = settings_of(best, text, config, given, runtime.world_size, memory)
    final = {**config, **chosen}
    with as_config_error():
        GPTConfig(**{name: final[name] for name in ('arch', *SHAPE)}, vocab_size=text.vocab_size)
    cost = step_cost(final, best.shape, text, machine)
    closing = 0.0
    if machine:
        closing = closing_seconds(best.shape, config['sample_tokens'], machine) + cost.evaluation
    lines = [*describe(final, found, text, machine, cost, closing, time.perf_counter() - STARTED)]
    return chosen, cost, closing, lines
