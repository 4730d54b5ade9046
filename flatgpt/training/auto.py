"""
One dial: the model and the schedule that reach the lowest loss in the given time.

$ python train.py config/auto.py --dataset=mine --minutes=10
$ python train.py config/auto.py --tokens=20_000_000 --n_layer=6

    deadline = choose_settings(config, given, runtime)    # sets them in config

speed.py measures how fast this machine trains. For each shape of model, that gives the tokens that
it could train on in the time, scaling.py predicts the loss after them, and the lowest loss wins.
recipe.py has the settings that follow. With `tokens` or `flops` nothing is measured.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from flatgpt import STARTED
from flatgpt.data.dataset import is_prepared, prepare_command, prepare_script, resolve_dataset
from flatgpt.data.mixture import dataset_names, open_data
from flatgpt.errors import ConfigError, as_config_error, counted
from flatgpt.runtime import Runtime, available_memory
from flatgpt.training.deadline import Deadline
from flatgpt.training.recipe import (
    EVALUATION_SHARE,
    Choice,
    Shape,
    batch_settings,
    possible_block_sizes,
    possible_shapes,
    settings_of,
    steps_of,
    tokens_per_step,
)
from flatgpt.training.resume import reject_existing_run
from flatgpt.training.scaling import FITTED, LAW, Text
from flatgpt.training.speed import Machine, StepCost, closing_seconds, measure, step_cost
from flatgpt.training.validate import (
    DIALS,
    SHAPE,
    check_dial,
    check_resumed_dial,
    global_batch_size,
    padded_vocab_size,
)
from model import GPTConfig

SETUP_SECONDS = 0.5  # to build the model and open the run
LEAST_STEPS = 40  # a run of fewer is refused
LEAST_TOKENS = 2_000  # of a training split
MEASURED_WITH = {'arch': 'modern', 'optimizer': 'muon'}  # all runs of the law


class Chosen(NamedTuple):
    """The settings, and lines to print. Only with minutes: the cost of the steps, and the
    seconds after the last one."""

    settings: dict
    lines: list[str]
    cost: StepCost | None = None
    closing: float = 0.0


def choose_settings(
    config: dict, given: dict, runtime: Runtime, resumed: bool = False
) -> Deadline | None:
    """Set what the dial chooses in config -> the Deadline of a run with `minutes`.

    resumed: whether the settings are those of a run to resume, which were chosen at its start.
    """
    if resumed:
        check_resumed_dial(config, given)
        for flag in (given[dial] for dial in DIALS if given.get(dial, '').startswith('--')):
            runtime.print0(f'auto: {flag} is ignored: the settings were chosen when this run began')
        config |= dict.fromkeys(DIALS)
    dial = check_dial(config, given)
    if not dial:
        return None
    if config['out_dir'] and not (config['check'] or config['plan'] or resumed):
        # before it is measured for a run that cannot start
        runtime.broadcast_from_rank0(lambda: reject_existing_run(Path(config['out_dir']), config))
    value = config[dial]
    chosen = runtime.broadcast_from_rank0(lambda: choose(dial, config, given, runtime))
    for line in chosen.lines:
        runtime.print0(f'auto: {line}')
    # plain settings: a run with them measures nothing
    config |= chosen.settings | dict.fromkeys(DIALS)
    if chosen.cost is None:
        return None
    ends, alone = STARTED + 60 * value - chosen.closing, runtime.world_size == 1
    return Deadline(ends, chosen.cost, config['max_iters'], alone)


def choose(dial: str, config: dict, given: dict, runtime: Runtime) -> Chosen:
    """Measure, compare and choose. ConfigError if the dial allows no run."""
    text, memory = read_text(config), available_memory(runtime) or math.inf
    search = Search(text, config, given, runtime.world_size, memory)
    machine = None
    if dial == 'minutes':
        left = 60 * config['minutes'] - SETUP_SECONDS - (time.perf_counter() - STARTED)
        machine = measure(config, runtime, text.vocab_size, left, memory)
        left -= machine.seconds
        ranked = search.rank(tokens_in_time(left, config['sample_tokens'], text, machine))
    elif dial == 'flops':
        ranked = search.rank(tokens_for_flops(config['flops'], text))
    else:
        ranked = search.rank_for_tokens(config['tokens'])
    if not ranked:
        raise ConfigError(
            f'{dial}={config[dial]:g}: is too little for the {LEAST_STEPS} steps that the smallest '
            f'model needs; use at least --{dial}={search.least(dial, machine):.2g}'
        )
    settings = settings_of(ranked[0], text, config, given, runtime.world_size, memory)
    final = {**config, **settings}
    lines = [*describe_choice(ranked, text, final)]
    if not machine:
        return Chosen(settings, ['nothing is measured without --minutes', *lines])
    shape = ranked[0].shape
    cost = step_cost(final, shape, text, machine)
    closing = closing_seconds(shape, config['sample_tokens'], machine) + cost.evaluation
    return Chosen(settings, [describe_time(machine, final, cost, closing), *lines], cost, closing)


def read_text(config: dict) -> Text:
    """What the prediction needs to know of the dataset. ConfigError if it is too small."""
    check_prepared(config)
    where = config['dataset'], 1, config['seed'], config['objective']
    data = open_data(*where, config['data_cache'])
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
    sizes = [part.data.tokens for part in data.parts]  # each must have a window in each split
    longest = max(1, min(min(size['train'] // 16, size['val'] - 1) for size in sizes))
    # of the short split: of a nanoGPT folder the bytes are counted
    val_tokens = data.tokens['val']
    bytes_per_token = (data.text_bytes('val') or val_tokens) / val_tokens
    return Text(tokens, padded_vocab_size(vocab_size), bytes_per_token, val_tokens, longest)


def check_prepared(config: dict) -> None:
    """Reject --check and --plan, which write nothing, if a dataset has yet to be prepared."""
    for name in dataset_names(config['dataset']) if config['check'] or config['plan'] else ():
        folder, is_path = resolve_dataset(name)
        if not is_path and not is_prepared(folder) and prepare_script(folder):
            raise ConfigError(
                f'dataset={name!r}: is not prepared, and the model is chosen by its size; run '
                f'{prepare_command(folder)}, then --check or --plan'
            )


# -----------------------------------------------------------------------------
# the choice


class Search:
    """The models that the settings allow. ConfigError if there is none, as with n_head=0."""

    def __init__(self, text: Text, config: dict, given: dict, ranks: int, memory: float):
        with as_config_error():
            shapes = valid_shapes(possible_shapes(config, given, text, memory), config)
        self.options = [*product(shapes, possible_block_sizes(config, given, text))]
        self.text, self.config = text, config
        self.split = partial(
            batch_settings, text=text, config=config, given=given, ranks=ranks, memory=memory
        )

    def rank(self, tokens_of: Callable[[Shape, int], float]) -> list[Choice]:
        """The choices of at least LEAST_STEPS steps, the lowest predicted loss first.

        tokens_of(shape, block_size): what each could train on.
        """
        choices = [Choice(shape, size, tokens_of(shape, size)) for shape, size in self.options]
        choices = [c for c in choices if steps_of(c, self.split(c)) >= LEAST_STEPS]
        return sorted(choices, key=lambda choice: predicted_loss(choice, self.text))

    def rank_for_tokens(self, tokens: float) -> list[Choice]:
        """Like rank(), but the largest model for which so many tokens are compute-optimal first."""
        ranked = self.rank(lambda shape, size: tokens)
        for choice in sorted(ranked, key=lambda choice: choice.shape.parameters, reverse=True):
            best = self.rank(tokens_for_flops(flops_of(choice, self.text), self.text))[0]
            if best.shape.parameters >= choice.shape.parameters:
                return [choice, *ranked]
        return ranked

    def least(self, dial: str, machine: Machine | None) -> float:
        """The least value of the dial for LEAST_STEPS steps of the smallest model, and a margin."""
        choices = []
        for shape, size in self.options:
            step = size * global_batch_size(self.split(Choice(shape, size, 1.0)))
            choices.append(Choice(shape, size, LEAST_STEPS * max(step, tokens_per_step(1))))
        best = min(choices, key=lambda choice: flops_of(choice, self.text))
        if dial == 'tokens':
            return 1.1 * min(choice.tokens for choice in choices)
        if dial == 'flops':
            return 1.1 * flops_of(best, self.text)
        training = (1 + EVALUATION_SHARE) * flops_of(best, self.text)
        training /= machine.speed(best.shape.n_embd)
        after = closing_seconds(best.shape, self.config['sample_tokens'], machine)
        return 1.1 / 60 * (time.perf_counter() - STARTED + SETUP_SECONDS + training + after)


def valid_shapes(shapes: Iterable[Shape], config: dict) -> list[Shape]:
    """The shapes that fit the settings. ValueError if none does."""
    valid, errors = [], []
    for shape in shapes:
        try:
            GPTConfig(**{name: config[name] for name in SHAPE} | shape._asdict())
            valid.append(shape)
        except ValueError as error:
            errors.append(error)
    if not valid:
        raise errors[0]
    return valid


def predicted_loss(choice: Choice, text: Text) -> float:
    """The excess loss, see scaling.Law."""
    shape, block_size, tokens = choice
    return LAW.predict(shape.parameters, shape.n_layer, tokens, block_size, text)


def flops_of(choice: Choice, text: Text) -> float:
    """FLOPs of its training."""
    return choice.tokens * choice.shape.mean_flops(text.vocab_size, choice.block_size)


def tokens_for_flops(flops: float, text: Text) -> Callable[[Shape, int], float]:
    return lambda shape, size: max(0.0, flops) / shape.mean_flops(text.vocab_size, size)


def tokens_in_time(
    seconds: float, sample_tokens: int, text: Text, machine: Machine
) -> Callable[[Shape, int], float]:
    """For a run whose training, evaluations and sample take so many seconds."""

    def tokens_of(shape: Shape, block_size: int) -> float:
        left = seconds - closing_seconds(shape, sample_tokens, machine)
        flops = left * machine.speed(shape.n_embd) / (1 + EVALUATION_SHARE)
        return tokens_for_flops(flops, text)(shape, block_size)

    return tokens_of


# -----------------------------------------------------------------------------
# the lines that are printed


def describe_time(machine: Machine, config: dict, cost: StepCost, closing: float) -> str:
    speeds = ', '.join(f'{v / 1e9:,.0f} (width {w})' for w, v in sorted(machine.speeds.items()))
    before = time.perf_counter() - STARTED
    return (
        f'{before:.0f} s to start, of which {machine.seconds:.0f} s to measure {speeds} GFLOP/s; '
        f'{cost.seconds(0, config["max_iters"]):,.0f} s to train; {closing:.0f} s to finish'
    )


def describe_choice(ranked: list[Choice], text: Text, config: dict) -> Iterator[str]:
    best = ranked[0]
    epochs = best.tokens / text.tokens
    yield (
        f'{config["dataset"]}: {text.tokens:,} tokens of {text.bytes_per_token:.2f} bytes, read '
        f'{epochs:,.2g} times; dropout {config["dropout"]}'
    )
    others = '; '.join(compare(other, best, text) for other in runners_up(ranked))
    yield f'model: {describe(best)}' + (f'; predicted loss of others: {others}' if others else '')
    short = f'the first {config["short_iters"]:,} in sequences of {config["short_block_size"]}'
    tokens = global_batch_size(config) * best.block_size
    steps = f'{config["max_iters"]:,} steps of {tokens:,} tokens'
    yield f'schedule: {steps}' + (f', {short}' if config['short_iters'] else '')
    values = {'parameters': best.shape.parameters, 'tokens': best.tokens, 'epochs': epochs}
    outside = [k for k, v in values.items() if not FITTED[k][0] <= v <= FITTED[k][1]]
    if outside:
        what = ', '.join(outside)
        yield f'the prediction is extrapolated: {what} outside the range of the measured runs'
    else:
        yield 'the prediction is interpolated between measured runs, see docs/results.md'
    now = {name: config[name] for name in MEASURED_WITH}
    if now != MEASURED_WITH:
        other, known = (' '.join(f'--{k}={v}' for k, v in c.items()) for c in (now, MEASURED_WITH))
        yield f'warning: the prediction and the settings are for {known}, not for {other}'


def describe(choice: Choice) -> str:
    layers, _, width = choice.shape
    size = choice.shape.parameters / 1e6
    return f'{layers} x {width} ({size:,.1f}M), context {choice.block_size}'


def compare(other: Choice, best: Choice, text: Text) -> str:
    """The difference of their predicted losses, which with --tokens can be bought with time."""
    higher = predicted_loss(other, text) - predicted_loss(best, text)
    cost = flops_of(other, text) / flops_of(best, text)
    after = f' after {cost:.1f} times the operations' if abs(cost - 1) > 0.1 else ''
    return f'{describe(other)} {higher:+.3f}{after}'


def runners_up(ranked: list[Choice]) -> list[Choice]:
    """The best choices of two other shapes."""
    others = {}
    for choice in ranked:
        if choice.shape != ranked[0].shape:
            others.setdefault(choice.shape, choice)
    return [*others.values()][:2]
