"""
The files of a dataset, as they were when it was opened.

    files = ShardFiles(folder, ['train.bin', 'val.bin'])
    with files.open('train.bin') as file:
        file.seek(0)

They stay open, so that a dataset prepared anew in the same folder, or removed, changes nothing for
a run that reads the old one (Windows does not let go of a file that is open). Of thousands of files
those that are not kept open, and any file that is written to where it lies, are noticed instead.
"""

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from flatgpt.errors import UserError

OPEN_BUDGET = [None] * 256  # one for each more file to keep open: a process has 1,024 as a rule


class ShardFiles:
    def __init__(self, folder: Path, names: list[str]):
        self.folder = folder
        self._open_files: dict[str, FileIO] = {}
        self._identities: dict[str, tuple] = {}
        self._lock = threading.Lock()  # a file has one position, and two threads may read it
        weakref.finalize(self, close, self._open_files, OPEN_BUDGET)
        for name in names:
            file = open(f'{folder}/{name}', 'rb', buffering=0)
            self._identities[name] = file_identity(file)
            if OPEN_BUDGET:
                OPEN_BUDGET.pop()
                self._open_files[name] = file
            else:
                file.close()

    @contextmanager
    def open(self, name: str) -> Iterator[FileIO]:
        """The file, unbuffered, for one thread at a time. UserError if it is another one by now."""
        with self._lock:
            kept = self._open_files.get(name)
            file = kept or self._open_again(name)
            try:
                if file_identity(file) != self._identities[name]:
                    raise self._read_error(name, 'changed')
                yield file
            finally:
                if not kept:
                    file.close()

    def _open_again(self, name: str) -> FileIO:
        try:
            return open(f'{self.folder}/{name}', 'rb', buffering=0)
        except FileNotFoundError:
            raise self._read_error(name, 'removed') from None

    def _read_error(self, name: str, how: str) -> UserError:
        path = f'{self.folder}/{name}'
        return UserError(f'{path}: was {how} while it was being read; prepare the dataset again')


def file_identity(file: FileIO) -> tuple:
    """What tells a file from one that took its place, and from itself with other content."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def close(files: dict[str, FileIO], may_open: list) -> None:
    for file in files.values():
        file.close()
        may_open.append(None)  # without a lock: the garbage collector calls at any time
