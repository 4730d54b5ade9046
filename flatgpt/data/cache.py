"""
Copies a dataset from a slow disk or a web server to the local disk before it is read.

    folder = copy_to_cache('https://example.org/openwebtext', 'scratch/')    # or a folder's path

The files that meta.json lists are copied to <cache>/<first digits of meta.json's sha256>/<name>. A
dataset that was prepared again gets a new folder, so runs that read the old copy are not affected.
Each file has a temporary name until its sha256 is verified, and meta.json is copied last. So an
interrupted copy can be resumed and never looks finished.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path, PurePath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import filelock
import numpy as np
from tqdm import tqdm

from flatgpt.data.dataset import (
    SPLITS,
    check_files,
    has_records,
    mask_file,
    read_meta,
    records_file,
)
from flatgpt.data.download import HEADERS, with_retries
from flatgpt.errors import UserError, reason_of
from flatgpt.files import atomic_file

PARALLEL_COPIES = 8  # files
CHUNK_BYTES = 2**22  # bytes read at a time
LOG_INTERVAL = 30  # seconds between progress lines without a terminal


class FileEntry(NamedTuple):
    name: str
    size: int  # bytes
    sha256: str


class Progress:
    """Bytes copied or verified by all threads, and whether they should stop."""

    def __init__(self):
        self.bytes = 0
        self.lock = threading.Lock()
        self.stop = threading.Event()

    def add(self, count: int) -> None:
        with self.lock:
            self.bytes += count


def is_url(name: str) -> bool:
    return name.startswith(('http://', 'https://'))


def copy_to_cache(
    source: str | Path, cache: str | Path, keep_alive: Callable = lambda: None
) -> Path:
    """
    Copy the dataset at `source`, a URL or a folder -> the copy's folder. One process copies; others
    on this machine wait for it.

    keep_alive: called while bytes arrive, or while another process copies.
    """
    source = str(source)
    if not is_url(source):
        read_meta(Path(source))  # raises if its preparation was interrupted
    raw = read_small_file(source, 'meta.json')
    folder = cache_folder(cache, source, raw)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder, keep_alive):
            if not is_complete(folder):
                copy_dataset(source, folder, raw, keep_alive)
    except OSError as error:
        raise copy_error(folder, error) from error
    return folder


def copy_error(path: Path, error: OSError) -> UserError:
    return UserError(
        f'{path}: cannot write the copy: {error.strerror or error}; free some space and make it '
        'writable, or choose another --data_cache'
    )


def cache_folder(cache: str | Path, source: str | Path, raw: bytes) -> Path:
    """The folder for a copy of the dataset at `source`, whose meta.json is `raw`."""
    return Path(cache) / hashlib.sha256(raw).hexdigest()[:12] / safe_name(str(source))


def safe_name(source: str) -> str:
    path = unquote(urlsplit(source).path) if is_url(source) else str(Path(source).resolve())
    name = re.sub(r'[^\w.-]', '_', PurePath(path).name)
    return name if name.strip('.') else 'dataset'


def location(source: str, name: str) -> str:
    if not is_url(source):
        return str(Path(source) / name)
    url = urlsplit(source)
    return url._replace(path=f'{url.path.rstrip("/")}/{name}').geturl()


def lock_folder(folder: Path, keep_alive: Callable):
    """Wait for a lock on the folder -> a context manager that releases it."""
    lock = filelock.FileLock(folder / '.copy.lock')
    while True:
        try:
            return lock.acquire(timeout=1)
        except filelock.Timeout:
            keep_alive()


def is_complete(folder: Path) -> bool:
    """Whether all files exist with the right sizes; their hashes were verified when copied."""
    if not all((folder / name).exists() for name in ('meta.json', 'tokenizer.json')):
        return False
    with contextlib.suppress(UserError):
        check_files(folder, read_meta(folder))
        return True
    return False


def copy_dataset(source: str, folder: Path, raw: bytes, keep_alive: Callable) -> None:
    files = listed_files(source, raw)
    (folder / 'meta.json').unlink(missing_ok=True)
    copy_files(source, folder, files, keep_alive)
    for name, content in (
        ('tokenizer.json', read_small_file(source, 'tokenizer.json')),
        ('meta.json', raw),
    ):
        with atomic_file(folder / name) as part:
            part.write_bytes(content)


def listed_files(source: str, raw: bytes) -> list[FileEntry]:
    """The files that a meta.json lists. UserError if any is outside the folder."""
    files = []
    try:
        meta = json.loads(raw)
        width = np.dtype(meta['dtype']).itemsize
        for shard in (shard for split in SPLITS for shard in meta['splits'][split]['shards']):
            files.append(FileEntry(shard['file'], shard['tokens'] * width, shard['sha256']))
            if meta.get('rows'):
                mask = mask_file(shard['file'])
                files.append(FileEntry(mask, shard['tokens'], shard['mask_sha256']))
        for split in SPLITS if has_records(meta.get('rows')) else ():
            records = meta['splits'][split]['records']
            files.append(FileEntry(records_file(split), records['bytes'], records['sha256']))
        for file in files:
            if not re.fullmatch(r'([\w-][\w.-]*/)*[\w-][\w.-]*', file.name):
                raise ValueError(f'invalid file name {file.name!r}')
        return files
    except (ValueError, KeyError, TypeError) as error:
        place = location(source, 'meta.json')
        raise UserError(
            f'{place}: not the meta.json of a dataset: {reason_of(error)}; check the address, or '
            'prepare the dataset again'
        ) from error


def copy_files(source: str, folder: Path, files: list[FileEntry], keep_alive: Callable) -> None:
    """Copy missing files in parallel. The first error stops all."""
    missing = sum(file.size for file in files if file_size(folder / file.name) != file.size)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(
            f'{folder}: copying {source} needs {missing / 1e9:.2f} GB, and {free / 1e9:.2f} GB '
            'are free; free some space, or choose another --data_cache'
        )
    print(f'{source}: copying {missing / 1e9:.2f} GB to {folder}', flush=True)
    progress = Progress()
    with ThreadPoolExecutor(PARALLEL_COPIES) as pool:
        jobs = {pool.submit(copy_file, source, folder, file, progress) for file in files}
        try:
            show_progress(jobs, progress, sum(file.size for file in files), keep_alive)
        finally:
            progress.stop.set()
            pool.shutdown(cancel_futures=True)


def show_progress(jobs: set, progress: Progress, total: int, keep_alive: Callable) -> None:
    """Show progress until all jobs are done. Raises the error of a failed job."""
    began = time.monotonic()
    next_line = began + LOG_INTERVAL
    with tqdm(total=total, unit='B', unit_scale=True, desc='copying', disable=None) as bar:
        shown = 0
        while jobs:
            done, jobs = wait(jobs, timeout=0.2, return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()
            now = progress.bytes
            if now != shown:
                keep_alive()
            bar.update(now - shown)
            shown = now
            if bar.disable and time.monotonic() > next_line:
                left = (time.monotonic() - began) * (total / max(1, now) - 1)
                print(f'copying: {now / total:.0%}, ETA {tqdm.format_interval(left)}', flush=True)
                next_line = time.monotonic() + LOG_INTERVAL


def copy_file(source: str, folder: Path, file: FileEntry, progress: Progress) -> None:
    """Copy one file, unless it exists with the right content."""
    path, place = folder / file.name, location(source, file.name)
    if (
        file_size(path) == file.size
        and write_and_hash(file_chunks(path), None, progress) == file.sha256
    ):
        return
    part = Path(f'{path}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_url(source):
            found = with_retries(
                lambda: write_and_hash(url_chunks(place), part, progress), place, path
            )
        else:
            found = write_and_hash(file_chunks(Path(place)), part, progress)
        if found != file.sha256:
            raise UserError(
                f'{place}: has sha256 {found}, and meta.json lists {file.sha256}; try again if the '
                'dataset is being prepared now, else prepare it again'
            )
        os.replace(part, path)
    except OSError as error:
        raise copy_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_and_hash(chunks: Iterator[bytes], part: Path | None, progress: Progress) -> str:
    """The sha256 of the chunks, which are written to `part` if given. Updates `progress`."""
    digest, added = hashlib.sha256(), 0
    try:
        with part.open('wb') if part else contextlib.nullcontext() as file:
            for chunk in chunks:
                if progress.stop.is_set():
                    raise UserError('another file could not be copied')  # that error is reported
                digest.update(chunk)
                if part:
                    file.write(chunk)
                progress.add(len(chunk))
                added += len(chunk)
            if part:
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        progress.add(-added)
        raise
    return digest.hexdigest()


def file_chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open('rb') as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise UserError(
            f'{path}: cannot read: {error.strerror or error}; make it readable, or prepare the '
            'dataset again'
        ) from error


def url_chunks(url: str) -> Iterator[bytes]:
    import requests

    with requests.get(url, stream=True, timeout=20, headers=HEADERS) as reply:
        reply.raise_for_status()
        yield from reply.iter_content(CHUNK_BYTES)


def read_small_file(source: str, name: str) -> bytes:
    """The content of a small file of the dataset."""
    place = location(source, name)
    if is_url(source):
        return with_retries(lambda: b''.join(url_chunks(place)), place)
    if not os.path.exists(place):
        raise UserError(f'{place}: is missing, and --data_cache needs it; omit --data_cache')
    return b''.join(file_chunks(Path(place)))


def file_size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None
