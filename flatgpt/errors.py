"""
Errors that are the user's to fix, and how a program ends with one line of them.

    one_line_errors()                                  # at the start of a script
    raise UserError('novel.txt: is empty; give a file with text')
    explain_errors(lambda error: UserError('...') if isinstance(error, MemoryError) else None)
    with warn_on_failure('no picture', print): ...            # a warning, if it fails
"""

import difflib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from flatgpt.streams import prepare_streams, silence

DISK_TROUBLE = {errno.ENOSPC, errno.EROFS, getattr(errno, 'EDQUOT', errno.ENOSPC)}
PACKAGES = {  # module -> what pip calls it; of no other name is it said what to install
    name.replace('-', '_'): name
    for name in """torch numpy safetensors filelock tqdm matplotlib tiktoken regex tokenizers
    requests huggingface-hub flask waitress pydantic spectree prometheus-client
    flask-openapi3-swagger gigatoken gguf transformers pyarrow wandb tensorboard
    lm_eval""".split()
} | {'bs4': 'beautifulsoup4'}


class UserError(Exception):
    """A mistake the user can fix: its text says where it came from, what is wrong and the fix."""


class ConfigError(UserError):
    """A setting, a flag or a config file that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint, ours or of others, that is missing, damaged, or does not fit."""


@contextmanager
def as_config_error() -> Iterator[None]:
    """Turn a ValueError, which model.py raises for a shape it cannot have, into a ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


# -----------------------------------------------------------------------------
# the end of a program

_explainers: list[Callable[[BaseException], UserError | None]] = []


def one_line_errors() -> None:
    """Let a UserError end the program with one line on standard error and status 2.

    Ctrl-C and a closed pipe end it without a traceback, with the status a shell reports for them.
    What a program prints never ends it, see prepare_streams().
    """
    prepare_streams()
    _explainers.clear()
    sys.excepthook = _report


def explain_errors(explain: Callable[[BaseException], UserError | None]) -> None:
    """Have `explain` look at what ends the program, before those asked to earlier.

    It returns the UserError to report in its place, or None where it knows nothing better.
    """
    _explainers.insert(0, explain)


def as_user_error(error: BaseException) -> UserError | None:
    """The line for an error of the machine that every user can fix, None for any other."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
        return UserError(f'{error.filename or "output"}: {error.strerror}')
    if isinstance(error, PermissionError) and error.filename:
        return UserError(f'{error.filename}: {error.strerror}')
    return None


def missing_package(error: ModuleNotFoundError) -> UserError | None:
    """The line for a package that is not installed, None for any other module."""
    name = (error.name or '').partition('.')[0]
    if name not in PACKAGES or sys.modules.get(name):
        return None
    return UserError(
        f'this needs the package {name}: pip install {PACKAGES[name]} '
        '(all packages: pip install -e .)'
    )


def reason_of(error: BaseException) -> str:
    """What an error says, in one short line."""
    if known := as_user_error(error):
        return str(known)
    text = ' '.join(str(error).split())[:200]
    return f'{type(error).__name__}: {text}' if text else type(error).__name__


@contextmanager
def warn_on_failure(what: str, report: Callable[[str], object]) -> Iterator[None]:
    """Report as a warning what fails in the `with`: a run can do without it.

    what: begins the line, such as 'no sample'.
    """
    try:
        yield
    except Exception as error:
        report(f'warning: {what}: {reason_of(error)}')


def _report(kind, error, trace) -> None:
    error = next(filter(None, (explain(error) for explain in _explainers)), error)
    if known := as_user_error(error):
        _end_with(known)
    if isinstance(error, KeyboardInterrupt):
        _print_last('interrupted')
        raise SystemExit(130)  # what a shell reports for Ctrl-C
    if isinstance(error, BrokenPipeError):  # piped into `head`, which has seen enough
        silence(sys.stdout)
        raise SystemExit(141)  # and what it reports for that
    sys.__excepthook__(kind, error, trace)


def _end_with(error: UserError) -> None:
    """Print the line and end with status 2, since 1 is for crashes; a hook may end the program."""
    rank = os.environ.get('RANK', '0')
    _print_last(f'error{"" if rank == "0" else f" (rank {rank})"}: {error}')
    if 'RANK' in os.environ:  # gloo's threads can abort a process that ends as usual
        if rank == '0':  # which may keep the store, and the others come to report the same
            time.sleep(1)
        os._exit(2)
    raise SystemExit(2)


def _print_last(line: str) -> None:
    with suppress(OSError, ValueError):  # the status tells it where the stream is gone, too
        # not sys.stderr: torch.distributed holds it back while a hook runs, and would lose it
        print(line, file=sys.__stderr__, flush=True)
    for stream in (sys.stdout, sys.__stderr__):
        try:
            stream.flush()
        except (OSError, ValueError):  # which would change the status when Python tries it at last
            silence(stream)


# -----------------------------------------------------------------------------
# checks of settings


class Mistakes:
    """Collects the ConfigErrors of several checks, to report them together, a line each."""

    def __init__(self):
        self.lines: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            self.lines.append(str(error))

    def raise_all(self) -> None:
        if self.lines:
            raise ConfigError('\nerror: '.join(self.lines))


def within(low: float, high: float | None, settings: dict, *names: str) -> None:
    """Raise ConfigError for a setting below `low` or above `high`; None is in every range."""
    for name in names:
        value = settings[name]
        if value is not None and not low <= value <= (sys.float_info.max if high is None else high):
            need = f'at least {low}' if high is None else f'between {low} and {high}'
            raise ConfigError(f'{name}={value}: must be {need}')


def one_of(choices: tuple, settings: dict, name: str) -> None:
    """Raise ConfigError for a setting that is none of the choices."""
    if settings[name] not in choices:
        raise ConfigError(f'{name}={settings[name]!r}: give {", ".join(map(repr, choices))}')


def did_you_mean(word: str, names) -> str:
    """'did you mean train? ' for the name nearest to `word`, '' where none is near."""
    near = difflib.get_close_matches(word, names, 1)
    return f'did you mean {near[0]}? ' if near else ''
