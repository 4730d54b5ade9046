"""
The streams a program prints to: nothing that happens to them ends its work.

    prepare_streams()           # every script, by one_line_errors()
    ignore_output_errors()      # train.py: a closed pipe or a full disk behind them is no matter
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO


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


class BestEffortStream:
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


def ignore_output_errors() -> None:
    """From now on the program does its work whatever becomes of its standard output and error."""
    for name in ('stdout', 'stderr'):
        if not isinstance(getattr(sys, name), BestEffortStream):
            setattr(sys, name, BestEffortStream(getattr(sys, name)))
