"""
The open files of a dataset.

    files = ShardFiles(folder, ['train.bin', 'val.bin'])
    with files.open('train.bin') as file:
        file.seek(0)

Files stay open, so a run is not affected if its dataset is prepared again in the same folder or
removed (Windows refuses to replace open files). If a dataset has too many files to keep open, a
replaced file is detected and reported instead, as is any file that is modified in place.
"""

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from flatgpt.errors import UserError

OPEN_BUDGET = [None] * 256  # one item per file that may stay open; the usual limit is 1,024


class ShardFiles:
    def __init__(self, folder: Path, names: list[str]):
        self.folder = folder
        self._open_files: dict[str, FileIO] = {}
        self._identities: dict[str, tuple] = {}
        self._lock = threading.Lock()  # threads share a file's position
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
        """The file, unbuffered, for one thread at a time. UserError if it has changed."""
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
        return UserError(
            f'{path}: was {how} while in use; prepare the dataset again, then restart the run'
        )


def file_identity(file: FileIO) -> tuple:
    """Changes if a file is replaced or modified."""
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def close(files: dict[str, FileIO], may_open: list) -> None:
    for file in files.values():
        file.close()
        may_open.append(None)  # atomic: the garbage collector may call this anywhere
