"""
Standard streams that cannot fail: closed streams, missing characters, closed pipes, full disks.

    prepare_streams()           # called by one_line_errors() in every script
    ignore_output_errors()      # train.py: training survives a closed pipe or a full disk
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO


def prepare_streams() -> None:
    """Make the standard streams safe to use.

    A stream that is closed, or None as under pythonw, is replaced by os.devnull. Text is UTF-8
    whatever the locale, unless PYTHONIOENCODING sets another encoding; a character that it lacks
    becomes a question mark.
    """
    encoding = None if os.environ.get('PYTHONIOENCODING') else 'utf-8'
    for number, (name, mode) in enumerate({'stdin': 'r', 'stdout': 'w', 'stderr': 'w'}.items()):
        _open_if_closed(number)
        for each in (name, f'__{name}__'):
            if getattr(sys, each) is None:
                setattr(sys, each, open(os.devnull, mode, encoding='utf-8', errors='replace'))
        errors = 'backslashreplace' if name == 'stderr' else 'replace'
        with suppress(AttributeError, OSError, ValueError):  # a notebook's stream, or one in use
            getattr(sys, name).reconfigure(encoding=encoding, errors=errors)


def _open_if_closed(number: int) -> None:
    """Redirect a closed file descriptor to os.devnull. Otherwise the next file opened would get its
    number, and libraries would print into that file."""
    try:
        os.fstat(number)
    except OSError:
        _redirect_to_devnull(number)


def _redirect_to_devnull(number: int) -> None:
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, number)  # inherited by child processes
    if devnull != number:
        os.close(devnull)
    else:
        os.set_inheritable(number, True)


def silence(stream: TextIO) -> None:
    """Discard what a stream has buffered and everything written to it from now on."""
    with suppress(AttributeError, OSError, ValueError):
        _redirect_to_devnull(stream.fileno())


class BestEffortStream:
    """A stream that ignores a closed pipe and a full disk."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Callable, *arguments) -> None:
        try:
            function(*arguments)
        except BrokenPipeError:  # the reader has exited
            silence(self._stream)
        except (OSError, ValueError):  # a full disk may have room again
            pass


def ignore_output_errors() -> None:
    """Ignore write errors on standard output and standard error from now on."""
    for name in ('stdout', 'stderr'):
        if not isinstance(getattr(sys, name), BestEffortStream):
            setattr(sys, name, BestEffortStream(getattr(sys, name)))
