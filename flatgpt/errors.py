"""
Errors that the user can fix, reported in one line.

    one_line_errors()                                  # at the start of a script
    raise UserError('novel.txt: is empty; choose a file with text')
    explain_errors(lambda error: UserError('...') if isinstance(error, MemoryError) else None)
    with warn_on_failure('no picture', print): ...     # prints a warning if it fails
"""

import argparse
import difflib
import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from flatgpt.streams import prepare_streams, silence

DISK_ERRORS = {errno.ENOSPC, errno.EROFS, getattr(errno, 'EDQUOT', errno.ENOSPC)}
PIP_NAMES = {  # module -> its name on PyPI; no other missing module gets a pip command
    name.replace('-', '_'): name
    for name in """torch numpy safetensors filelock tqdm matplotlib tiktoken regex tokenizers
    requests huggingface-hub flask waitress pydantic spectree prometheus-client
    flask-openapi3-swagger gigatoken gguf transformers pyarrow wandb tensorboard
    datasets lm_eval llguidance""".split()
} | {'bs4': 'beautifulsoup4'}


class UserError(Exception):
    """A mistake the user can fix. The text has its source, the problem and the fix."""


class ConfigError(UserError):
    """An invalid setting, flag or config file."""


class CheckpointError(UserError):
    """A checkpoint, ours or third-party, that is missing, damaged or incompatible."""


@contextmanager
def as_config_error() -> Iterator[None]:
    """Turn a ValueError, which model.py raises for an invalid shape, into a ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


# -----------------------------------------------------------------------------
# reporting

_explainers: list[Callable[[BaseException], UserError | None]] = []


def one_line_errors() -> None:
    """Make a UserError print one line on standard error and exit with status 2.

    Ctrl-C and a closed pipe exit without a traceback, with the status a shell reports for them.
    Also makes the standard streams safe, see prepare_streams().
    """
    prepare_streams()
    _explainers.clear()
    sys.excepthook = _excepthook
    if sys.unraisablehook is sys.__unraisablehook__:  # pytest has its own
        sys.unraisablehook = _unraisablehook


def explain_errors(explain: Callable[[BaseException], UserError | None]) -> None:
    """Register `explain` for uncaught errors; the last one registered is called first.

    It returns the UserError to report instead, or None for an error that it does not explain.
    """
    _explainers.insert(0, explain)


def as_user_error(error: BaseException) -> UserError | None:
    """The UserError for a missing package, a full disk, a denied permission or a name that is too
    long; else None."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if isinstance(error, OSError) and error.errno in {*DISK_ERRORS, errno.ENAMETOOLONG}:
        return UserError(f'{error.filename or "output"}: {error.strerror}')
    if isinstance(error, PermissionError) and error.filename:
        return UserError(f'{error.filename}: {error.strerror}')
    return None


def missing_package(error: ModuleNotFoundError) -> UserError | None:
    """The UserError for a package that is not installed, None for any other module."""
    name = (error.name or '').partition('.')[0]
    if name not in PIP_NAMES or sys.modules.get(name):
        return None
    return UserError(
        f'this needs the package {name}: pip install {PIP_NAMES[name]} '
        '(all packages: pip install -e .)'
    )


def reason_of(error: BaseException) -> str:
    """An error as one short line, without the name of its class."""
    if known := as_user_error(error):
        return str(known)
    text = ' '.join(str(error).split())[:200]
    if isinstance(error, KeyError):  # its text is only the key
        return f'{text} is missing'
    return text or type(error).__name__


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake as a UserError: argparse itself prints its usage, several lines.

    Keeps the line breaks of the description, and takes no abbreviated flags.
    """

    def __init__(self, **options):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message: str):
        flags = [flag for action in self._actions for flag in action.option_strings]
        word = re.search(r'(?<!\S)--?(\w+)', message)
        unknown = message.startswith('unrecognized') and word
        hint = did_you_mean(f'--{word[1]}', flags) if unknown else ''
        raise UserError(f'{message}; {hint}--help lists the arguments')


@contextmanager
def warn_on_failure(what: str, report: Callable[[str], object]) -> Iterator[None]:
    """Report an error in the `with` as a warning, for work that a run does not depend on.

    what: the beginning of the warning, such as 'no sample'.
    """
    try:
        yield
    except Exception as error:
        report(f'warning: {what}: {reason_of(error)}')


def _excepthook(kind, error, trace) -> None:
    error = next(filter(None, (explain(error) for explain in _explainers)), error)
    if known := as_user_error(error):
        _exit_with(known)
    if isinstance(error, KeyboardInterrupt):
        _print_and_flush('interrupted')
        raise SystemExit(130)  # what a shell reports for Ctrl-C
    if isinstance(error, BrokenPipeError):  # for example piped into `head`
        silence(sys.stdout)
        raise SystemExit(141)  # what a shell reports for SIGPIPE
    sys.__excepthook__(kind, error, trace)


def _unraisablehook(unraisable) -> None:
    """Ctrl-C in a destructor or after the last line of a script, where an exception is ignored."""
    if unraisable.exc_type is KeyboardInterrupt:
        _print_and_flush('interrupted')
        os._exit(130)
    sys.__unraisablehook__(unraisable)


def _exit_with(error: UserError) -> None:
    """Print the line and exit with status 2; status 1 is for crashes."""
    rank = os.environ.get('RANK', '0')
    _print_and_flush(f'error{"" if rank == "0" else f" (rank {rank})"}: {error}')
    if 'RANK' in os.environ:  # gloo's threads can abort a process that exits normally
        if rank == '0':  # it may host the store: give the other ranks time to report
            time.sleep(1)
        os._exit(2)
    raise SystemExit(2)


def _print_and_flush(line: str) -> None:
    with suppress(OSError, ValueError):  # a closed stream: the exit status still reports it
        # not sys.stderr: torch.distributed replaces it while a hook runs, and loses the text
        print(line, file=sys.__stderr__, flush=True)
    for stream in (sys.stdout, sys.__stderr__):
        try:
            stream.flush()
        except (OSError, ValueError):  # else Python flushes at exit, fails and changes the status
            silence(stream)


# -----------------------------------------------------------------------------
# checking settings


class Mistakes:
    """Collects the ConfigErrors of several checks and reports them together, one per line."""

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


def check_range(low: float, high: float | None, settings: dict, *names: str) -> None:
    """Raise ConfigError for a setting below `low` or above `high`; None is in every range."""
    for name in names:
        value = settings[name]
        if value is not None and not low <= value <= (sys.float_info.max if high is None else high):
            need = f'at least {low}' if high is None else f'between {low} and {high}'
            raise ConfigError(f'{name}={value}: must be {need}')


def check_choice(choices: tuple, settings: dict, name: str) -> None:
    """Raise ConfigError for a setting that is not one of the choices."""
    if settings[name] not in choices:
        raise ConfigError(
            f'{name}={settings[name]!r}: must be one of {", ".join(map(repr, choices))}'
        )


# -----------------------------------------------------------------------------
# words


def counted(number: int, noun: str) -> str:
    """'1 file', '2,000 files', '3 batches': a number and its noun."""
    plural = 'es' if noun.endswith('ch') else 's'
    return f'{number:,} {noun}{"" if number == 1 else plural}'


def short_repr(value: object, show: Callable[[object], str] = repr) -> str:
    """A value for an error line, cut after 80 characters. show: how to write it."""
    text = show(value)
    return text if len(text) <= 80 else f'{text[:77]}...'


def did_you_mean(word: str, names) -> str:
    """'did you mean train? ' for the name closest to `word`, '' if none is close."""
    near = difflib.get_close_matches(word, names, 1)
    return f'did you mean {near[0]}? ' if near else ''
