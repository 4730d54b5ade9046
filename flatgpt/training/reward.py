"""
Rewards for reinforcement learning: plain Python functions, built-in ones, and reward models.

    reward = load_reward('rewards.py:shorter')          # or 'exact', 'regex', 'length'
    values = reward(prompts, completions, records)      # a float each
    reward = RewardModel('out/reward_model', tokenizer, runtime, longest=256)
    values = reward(sequences)                          # of ids, each a prompt with its completion

A file has def reward(prompt: str, completion: str, row: dict) -> float; with the parameters
prompts, completions and rows it gets a list of each, and returns a list. `row` is the record that
the prompt was prepared from.
"""

import inspect
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from numbers import Real
from pathlib import Path
from types import ModuleType

import torch

from flatgpt import ROOT
from flatgpt.checkpoint.load import load_model
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import ConfigError, UserError, did_you_mean, reason_of, short_repr
from flatgpt.runtime import Runtime
from model import GPT

ONE, MANY = ('prompt', 'completion', 'row'), ('prompts', 'completions', 'rows')
LARGEST = 1e18  # its square is finite in float32
BatchReward = Callable[[list[str], list[str], list[dict]], list[float]]


# -----------------------------------------------------------------------------
# built-in rewards


def exact(prompt: str, completion: str, row: dict) -> float:
    """1 if the completion is the record's "answer", apart from space around it, otherwise 0."""
    return float(completion.strip() == str(row['answer']).strip())


def regex(prompt: str, completion: str, row: dict) -> float:
    """1 if the regular expression in the record's "pattern" matches the whole completion."""
    return float(re.fullmatch(row['pattern'], completion.strip(), re.DOTALL) is not None)


def length(prompt: str, completion: str, row: dict) -> float:
    """1 if the completion has as many characters as the record's "length", less by the difference
    relative to it."""
    wanted = float(row['length'])
    return 1 - abs(len(completion.strip()) - wanted) / max(1.0, wanted)


BUILT_IN = {function.__name__: function for function in (exact, regex, length)}


# -----------------------------------------------------------------------------
# loading


def load_reward(name: str) -> BatchReward:
    """The reward with this name, or FILE.py, or FILE.py:function. ConfigError if there is none."""
    file = re.fullmatch(r'(.+\.py)(?::(\w*))?', name)
    if not file:
        if name not in BUILT_IN:
            hint = did_you_mean(name, BUILT_IN)
            raise ConfigError(
                f'reward={name!r}: unknown; {hint}use {", ".join(BUILT_IN)}, the directory of a '
                'reward model, or FILE.py:function with def function(prompt, completion, row)'
            )
        return checked(BUILT_IN[name], name)
    path, function_name = Path(file[1]), file[2] or 'reward'
    if not path.exists() and (ROOT / path).exists():
        path = ROOT / path  # in data/, from another folder
    return checked(find_function(path, function_name, name), name)


def find_function(path: Path, name: str, setting: str) -> Callable:
    """The function in a file of Python, which is executed as a module."""
    module = ModuleType(f'reward_{path.stem}')  # its own name may be that of another module
    module.__file__, namespace = str(path), vars(module)
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # for modules next to the file
    try:
        exec(compile(path.read_bytes(), str(path), 'exec'), namespace)
    except OSError as error:
        raise ConfigError(
            f'reward={setting!r}: {path} cannot be opened: {error.strerror}; correct the path'
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f'reward={setting!r}: {path}: {describe(error)}; correct it') from error
    function = namespace.get(name)
    if not callable(function):
        names = [key for key, value in namespace.items() if inspect.isfunction(value)]
        hint = did_you_mean(name, names)
        raise ConfigError(
            f'reward={setting!r}: {path} has no function {name}; {hint}write '
            f'def {name}(prompt, completion, row)'
        )
    return function


def checked(function: Callable, name: str) -> BatchReward:
    """The function for a batch, which checks what it returns."""
    try:
        parameters = tuple(inspect.signature(function).parameters)
    except ValueError:  # of some functions written in C
        parameters = ('?',)
    if parameters not in (ONE, MANY):
        raise ConfigError(
            f'reward={name!r}: takes ({", ".join(parameters)}); it must take ({", ".join(ONE)}), '
            f'or lists ({", ".join(MANY)})'
        )

    def one_by_one(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
        return [
            number_of(lambda each=each: function(*each), name, *each[:2])
            for each in zip(prompts, completions, rows, strict=True)
        ]

    def at_once(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
        try:
            values = function(prompts, completions, rows)
            found = list(values)
        except (Exception, SystemExit) as error:
            raise reward_error(name, f'raised {describe(error)}') from error
        if len(found) != len(prompts):
            raise reward_error(name, f'returned {len(found)} values for {len(prompts)} completions')
        each = zip(found, prompts, completions, strict=True)
        return [number_of(lambda value=value: value, name, *texts) for value, *texts in each]

    return one_by_one if parameters == ONE else at_once


def number_of(compute: Callable[[], object], name: str, prompt: str, completion: str) -> float:
    """A reward as a float. UserError if it is none, or not finite, or raises."""
    try:
        value = compute()
    except (Exception, SystemExit) as error:
        raise reward_error(name, f'raised {describe(error)}', prompt, completion) from error
    with suppress(AttributeError, ValueError, RuntimeError):  # no number of numpy or torch
        value = value.item()
    if not isinstance(value, Real) or not abs(value) <= LARGEST:
        raise reward_error(name, f'returned {short_repr(value)}', prompt, completion)
    return float(value)


def reward_error(name: str, problem: str, *texts: str) -> UserError:
    where = ''.join(
        f', {label} {short_repr(text)}'
        for label, text in zip(('prompt', 'completion'), texts, strict=False)
    )
    return UserError(
        f'reward={name}{where}: {problem}; it must return a finite number, at most {LARGEST:g}'
    )


def describe(error: BaseException) -> str:
    """An error as one short line, with the name of its class."""
    return f'{type(error).__name__}: {reason_of(error)}'


# -----------------------------------------------------------------------------
# reward models


def is_model(name: str) -> bool:
    """Whether a reward is a model: a run directory, or a folder of transformers."""
    return name not in BUILT_IN and Path(name).is_dir()


def load_reward_model(where: str, device: str = 'cpu') -> tuple[GPT, Tokenizer | None]:
    """ConfigError if it is not a reward model."""
    model, tokenizer, _ = load_model(where, device=device, reward_model=True)
    if not model.config.score:
        raise ConfigError(
            f'reward={where!r}: is not a reward model; train one with --objective=reward '
            f'--init_from={where}, or give a function'
        )
    return model.requires_grad_(False), tokenizer


class RewardModel:
    """A model of objective='reward', frozen: it gives a prompt with its completion a score.

    tokenizer: of the model that writes; longest: tokens of a prompt with its completion, at most.
    ConfigError if it does not fit them.
    """

    def __init__(self, where: str, tokenizer: Tokenizer, runtime: Runtime, longest: int):
        self.model, own = load_reward_model(where, runtime.device)
        self.runtime, config = runtime, self.model.config
        if own is not None and own != tokenizer:
            raise ConfigError(
                f'reward={where!r}: uses the {own.name} tokenizer, and the model that it scores '
                f'another one ({tokenizer.name}); train a reward model from that model'
            )
        if config.block_size < longest:
            raise ConfigError(
                f'reward={where!r}: has a context of {config.block_size} tokens, and a prompt with '
                f'its completion may have {longest}; lower --rl_tokens, or train one with a longer '
                'context'
            )

    @torch.no_grad()
    def __call__(self, sequences: list[list[int]], at_once: int = 64) -> list[float]:
        """The score of each sequence of ids."""
        scores = []
        for first in range(0, len(sequences), at_once):
            part = sequences[first : first + at_once]
            x = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
            for row, ids in zip(x, part, strict=True):
                row[: len(ids)] = torch.tensor(ids)
            ends = torch.tensor([len(ids) - 1 for ids in part])
            with self.runtime.autocast():
                found, _ = self.model(x.to(self.runtime.device), ends=ends.to(self.runtime.device))
            scores += found.tolist()
        return scores
