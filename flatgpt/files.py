"""Files on disk: written whole or not at all, flushed, hashed; and how much room there is."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from flatgpt.errors import CheckpointError, UserError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """The path to write a file under, which gets its own name when the `with` ends well.

    By then the disk has all of it. After an error nothing of it is left, and what had that name
    before is still there.
    """
    path = Path(path)
    part = path.with_name(f'{path.name}.part')
    try:
        yield part
        fsync(part)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when the `with` ends: all of it or nothing."""
    if os.path.lexists(folder):
        raise UserError(f'{folder} is there already; name a new folder')
    part = folder.with_name(f'.{folder.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{folder}: cannot be written: {error}') from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fsync(path: Path) -> None:
    """Have the disk hold a file, or a folder's list of names, before anything relies on it."""
    if path.is_dir() and os.name == 'nt':
        return  # Windows does not open folders, and writes their names through
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob('*'), folder]:
        fsync(path)


def as_json(value) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + '\n').encode()


def read_json(path: Path, name: str) -> dict:
    """The object in a JSON file. CheckpointError that begins with `name`, what the file is of."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(content, dict):
            raise ValueError('it is no object')
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f'{name}: {path.name} cannot be read: {error}') from error


def strict_json(text: str | bytes):
    """The value of a JSON text. ValueError for what Python would read and JSON has not, such as
    NaN, and for a name that stands twice in an object, of which Python would drop the first."""

    def refuse(constant: str):
        raise ValueError(f'{constant} is no JSON')

    def unique(pairs: list[tuple]) -> dict:
        found = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f'{name[:40]!r} stands twice in one object')
            found[name] = value
        return found

    return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)


def sha256(path: Path) -> str:
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
        return digest.hexdigest()


def is_same_path(a: str | Path, b: str | Path) -> bool:
    """Whether two paths mean one file or folder."""
    return Path(a).resolve() == Path(b).resolve()


def is_utf8_path(path: str | Path) -> bool:
    """Whether the name of a file or a folder is text: safetensors opens no other."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def nearest_existing(path: str | Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    path = Path(path).absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def free_bytes(path: str | Path) -> int:
    """Bytes that are free on the disk where a folder is, or will be."""
    return shutil.disk_usage(nearest_existing(path)).free


def check_free_space(folder: Path, need: int) -> None:
    """Raise OSError unless `need` bytes are free there."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(f'needs {need / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free')
