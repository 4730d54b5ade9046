"""
Errors that are the user's to fix, how a program ends with one line of them, and what ends none.

    one_line_errors()                                  # at the start of a script
    raise UserError('novel.txt: is empty; give a file with text')
    explain_errors(lambda error: UserError('...') if isinstance(error, MemoryError) else None)
    with optional('no picture', print): ...            # a warning, if it fails
"""

import difflib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

DISK_TROUBLE = {errno.ENOSPC, errno.EROFS, getattr(errno, 'EDQUOT', errno.ENOSPC)}
PACKAGES = {'bs4': 'beautifulsoup4', 'yaml': 'pyyaml'}  # where the module has another name


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
    """The line for a package that is not installed; None if what is missing is a module of one."""
    name = (error.name or '').partition('.')[0]
    if not name or name in sys.stdlib_module_names or sys.modules.get(name):
        return None
    package = PACKAGES.get(name, name)
    return UserError(
        f'this needs the package {name}: pip install {package} (all packages: pip install -e .)'
    )


def reason_of(error: BaseException) -> str:
    """What an error says, in one short line."""
    if known := as_user_error(error):
        return str(known)
    text = ' '.join(str(error).split())[:200]
    return f'{type(error).__name__}: {text}' if text else type(error).__name__


@contextmanager
def optional(what: str, report: Callable[[str], object]) -> Iterator[None]:
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
# what a program prints


def prepare_streams() -> None:
    """Let no script fail for want of a stream or of a character.

    A stream that is closed, or None as under pythonw, becomes silence. Text is UTF-8 whatever the
    locale says, unless PYTHONIOENCODING asks for another encoding; a character that it lacks
    becomes a question mark.
    """
    encoding = None if os.environ.get('PYTHONIOENCODING') else 'utf-8'
    for number, (name, mode) in enumerate({'stdin': 'r', 'stdout': 'w', 'stderr': 'w'}.items()):
        _open_if_closed(number)
        for each in (name, f'__{name}__'):
            if getattr(sys, each) is None:
                setattr(sys, each, open(os.devnull, mode, encoding='utf-8', errors='replace'))
        errors = 'backslashreplace' if name == 'stderr' else 'replace'
        with suppress(AttributeError, OSError, ValueError):  # a notebook's, one in use
            getattr(sys, name).reconfigure(encoding=encoding, errors=errors)


def _open_if_closed(number: int) -> None:
    """Point a closed file descriptor nowhere: else the next file opened would get its number, and
    with it what libraries print."""
    try:
        os.fstat(number)
    except OSError:
        _point_nowhere(number)


def _point_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, number)  # which the programs that are started inherit
    if nowhere != number:
        os.close(nowhere)
    else:
        os.set_inheritable(number, True)


def silence(stream: TextIO) -> None:
    """Send what a stream still holds, and what is written to it from now on, nowhere."""
    with suppress(AttributeError, OSError, ValueError):
        _point_nowhere(stream.fileno())


class OptionalStream:
    """A stream for which no error is raised where its reader has gone or its disk is full."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, do: Callable, *arguments) -> None:
        try:
            do(*arguments)
        except BrokenPipeError:  # nobody will read it any more
            silence(self._stream)
        except (OSError, ValueError):  # a full disk may have room again
            pass


def make_output_optional() -> None:
    """From now on the program does its work whatever becomes of its standard output and error."""
    for name in ('stdout', 'stderr'):
        if not isinstance(getattr(sys, name), OptionalStream):
            setattr(sys, name, OptionalStream(getattr(sys, name)))


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
