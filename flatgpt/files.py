"""Files on disk: atomic writes, fsync, JSON, sha256, free space."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from flatgpt.errors import CheckpointError, UserError, short_repr


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path, which is renamed when the `with` ends.

    The file is synced to disk first. After an error the temporary file is deleted, and a file that
    already had this name is unchanged.
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
    """Write a new folder atomically: yields a temporary one, renamed when the `with` ends."""
    if os.path.lexists(folder):
        raise UserError(f'{folder}: already exists; choose a new folder')
    part = folder.with_name(f'.{folder.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{folder}: cannot be written: {error}; choose another folder') from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fsync(path: Path) -> None:
    """Sync a file, or a folder's list of names, to disk."""
    if path.is_dir() and os.name == 'nt':
        return  # Windows cannot open folders; it writes their names at once
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
    """The object in a JSON file. CheckpointError that begins with `name`, the source of it."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(content, dict):
            raise ValueError('it must be a JSON object')
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f'{name}: {path.name} cannot be read: {error}; provide a valid file'
        ) from error


def strict_json(text: str | bytes):
    """Parse JSON. ValueError for NaN and Infinity, which Python accepts, and for a duplicate key,
    of which Python keeps only the last."""

    def refuse(constant: str):
        raise ValueError(f'{constant} is not valid JSON')

    def unique(pairs: list[tuple]) -> dict:
        found = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f'duplicate key {short_repr(name)}')
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
    """Whether two paths are the same file or folder."""
    return Path(a).resolve() == Path(b).resolve()


def is_utf8_path(path: str | Path) -> bool:
    """Whether a path can be encoded as UTF-8, which safetensors requires."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def nearest_existing(path: str | Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    path = Path(path).absolute()
    return next(each for each in (path, *path.parents) if os.path.exists(each))


def free_bytes(path: str | Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(nearest_existing(path)).free


def check_free_space(folder: Path, need: int) -> None:
    """Raise OSError unless `need` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(f'needs {need / 1e6:,.0f} MB, but only {free / 1e6:,.0f} MB are free')
