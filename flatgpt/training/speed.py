"""
Measures the training speed of this machine in a few seconds; predicts how long a run takes.

    machine = measure(config, runtime, vocab_size=257, seconds=600)   # of the run
    cost = step_cost(settings, shape, text, machine)
    cost.seconds(0, 100)                                # of the first 100 steps
"""

import math
import statistics
import time
from bisect import bisect
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flatgpt.runtime import Runtime, synchronize
from flatgpt.training.optim import build_optimizers
from flatgpt.training.recipe import (
    FORWARD_SHARE,
    STATE_BYTES,
    Shape,
    heads,
    token_bytes,
)
from flatgpt.training.scaling import Text
from flatgpt.training.validate import global_batch_size
from model import GPT, GPTConfig

PROBES = (64, 128, 256, 512, 1024, 2048)  # widths of the models whose speed is measured
PROBE_LENGTH = 128  # tokens of a sequence
PROBE_TOKENS, PROBE_TOKENS_GPU = 3072, 16384  # of a step
PROBE_STEPS, PROBE_SECONDS = 3, 0.2  # at least, after a step to warm up
PROBE_SHARE = 0.02  # of the time of the run: a probe that takes longer is of no use to it
LONGEST_PROBE = 15.0  # seconds, however long the run is
RANKS_SHARE = 0.9  # of the speed of each rank is left when they train together; a guess
PLOT_SECONDS = 1.0  # to save the last checkpoint, draw the loss and exit


@dataclass(frozen=True)
class Machine:
    """FLOP/s of training steps, by the width of the model, and the seconds that measuring took."""

    speeds: dict[int, float]
    seconds: float

    def speed(self, width: int) -> float:
        """Interpolated on a log-log scale; constant beyond what was measured."""
        widths = sorted(self.speeds)
        width = min(max(width, widths[0]), widths[-1])
        if width in self.speeds:
            return self.speeds[width]
        low, high = widths[(i := bisect(widths, width)) - 1], widths[i]
        share = math.log(width / low) / math.log(high / low)
        return self.speeds[low] ** (1 - share) * self.speeds[high] ** share


class StepCost(NamedTuple):
    """Seconds of a step with short and with full-length sequences, and of an evaluation."""

    short: float
    full: float
    short_iters: float
    evaluation: float
    eval_interval: int | None

    def seconds(self, first: int, last: int) -> float:
        """Seconds of the steps from `first` to `last`, with the evaluations before them."""
        short = max(0, min(last, self.short_iters) - first)
        steps = short * self.short + (last - first - short) * self.full
        if not self.eval_interval:
            return steps
        evaluations = -(-last // self.eval_interval) - -(-first // self.eval_interval)
        return steps + evaluations * self.evaluation

    def stretched(self, step: int, factor: float) -> 'StepCost':
        """The cost if the steps after `step`, short ones included, are multiplied by `factor`."""
        short = max(0, self.short_iters - step)
        return self._replace(short_iters=self.short_iters + short * (factor - 1))


def measure(
    config: dict, runtime: Runtime, vocab_size: int, seconds: float, memory: float = math.inf
) -> Machine:
    """Time training steps of small models, the wider ones only if the run could use them.

    seconds: that the run may take. memory: bytes that it may use.
    """
    began, speeds = time.perf_counter(), {}
    tokens = PROBE_TOKENS if runtime.device_type == 'cpu' else PROBE_TOKENS_GPU
    ranks = runtime.world_size * RANKS_SHARE if runtime.world_size > 1 else 1.0
    for width in PROBES:
        shape = Shape(2, heads(width), width)
        flops = tokens * shape.flops_per_token(vocab_size, PROBE_LENGTH)
        expected = flops / max(speeds.values(), default=math.inf) * ranks
        weights = shape.parameters + 2 * vocab_size * width
        needed = STATE_BYTES * weights + tokens * token_bytes(shape, vocab_size)
        too_long = expected * (1 + PROBE_STEPS) > min(PROBE_SHARE * seconds, LONGEST_PROBE)
        if speeds and (too_long or needed > memory):
            break
        speeds[width] = ranks * flops / time_step(config, runtime, vocab_size, shape, tokens)
    return Machine(speeds, time.perf_counter() - began)


def time_step(config: dict, runtime: Runtime, vocab_size: int, shape: Shape, tokens: int) -> float:
    """Seconds of a training step of one rank, without its data."""
    fields = {**shape._asdict(), 'block_size': PROBE_LENGTH, 'vocab_size': vocab_size}
    model = GPT(GPTConfig(**fields, arch=config['arch'])).to(runtime.device).train()
    rates = {'learning_rate': 1e-3, 'muon_lr': 1e-3, 'muon_momentum': 0.9}
    optimizers = build_optimizers(
        config['optimizer'], model, **rates, betas=(0.9, 0.95), weight_decay=0.1
    )
    rows = tokens // PROBE_LENGTH
    x = torch.randint(vocab_size, (rows, PROBE_LENGTH), device=runtime.device)
    train_step(model, optimizers, x, runtime)
    times = []
    while len(times) < PROBE_STEPS or sum(times) < PROBE_SECONDS:
        times.append(train_step(model, optimizers, x, runtime))
    return statistics.median(times)


def train_step(model: GPT, optimizers: list, x, runtime: Runtime) -> float:
    """Train on x -> the seconds it took."""
    began = time.perf_counter()
    with runtime.autocast():
        _, loss = model(x, x)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    synchronize(runtime.device)
    return time.perf_counter() - began


def step_cost(config: dict, shape: Shape, text: Text, machine: Machine) -> StepCost:
    """What the steps and evaluations of a run with these settings take."""
    speed, length = machine.speed(shape.n_embd), config['block_size']
    tokens = global_batch_size(config) * length
    short, full = (
        tokens * shape.flops_per_token(text.vocab_size, n) / speed
        for n in (config['short_block_size'] or length, length)
    )
    evaluated = text.val_tokens
    if config['eval_iters'] is not None:
        evaluated = min(evaluated, config['eval_iters'] * config['batch_size'] * length)
    evaluation = evaluated * (1 + config['eval_train']) / tokens * full * FORWARD_SHARE
    return StepCost(short, full, config['short_iters'], evaluation, config['eval_interval'])


def closing_seconds(shape: Shape, sample_tokens: int, machine: Machine) -> float:
    """What comes after the last evaluation, roughly: the checkpoint, the plot, the sample."""
    a_token = 2.5e-4 * shape.n_layer + 160 * shape.parameters / machine.speed(shape.n_embd)
    return PLOT_SECONDS + sample_tokens * a_token
