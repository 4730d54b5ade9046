"""
A dataset from a slow disk or a web server, copied to this machine's own disk before it is read.

    folder = copied('https://example.org/openwebtext', 'scratch/')    # or a folder's path

What is copied is what meta.json lists, to <cache>/<first digits of meta.json's sha256>/<name>: one
that was prepared anew gets a folder of its own, and takes nothing from a run that reads the old.
Each file has another name until its sha256 is found right, and meta.json comes last. So what a
stopped copy has left is gone on with, and nothing looks finished that is not.
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

from flatgpt.data.dataset import SPLITS, check_files, mask_file, read_meta
from flatgpt.data.download import HEADERS, with_retries
from flatgpt.errors import UserError
from flatgpt.files import new_file

PARALLEL_COPIES = 8  # files
CHUNK_BYTES = 2**22  # bytes read at a time
LOG_INTERVAL = 30  # seconds between lines of progress where nobody watches a terminal


class FileEntry(NamedTuple):
    name: str
    size: int  # bytes
    sha256: str


class Progress:
    """Bytes that the threads have copied, or found to be there; and whether they should stop."""

    def __init__(self):
        self.bytes, self.lock, self.stop = 0, threading.Lock(), threading.Event()

    def add(self, count: int) -> None:
        with self.lock:
            self.bytes += count


def is_url(name: str) -> bool:
    return name.startswith(('http://', 'https://'))


def copy_to_cache(source: str | Path, cache: str | Path, alive: Callable = lambda: None) -> Path:
    """
    The folder on this machine's disk that has all of the dataset at `source`, a URL or a folder.
    Of several processes one copies, and the others wait for it.

    alive: called while bytes arrive, or while another process copies.
    """
    source = str(source)
    if not is_url(source):
        read_meta(Path(source))  # refuses a preparation that was interrupted
    raw = read_small_file(source, 'meta.json')
    folder = cache_folder(cache, source, raw)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder, alive):
            if not is_complete(folder):
                copy_dataset(source, folder, raw, alive)
    except OSError as error:
        raise UserError(f'{folder}: cannot be written: {error.strerror or error}') from error
    return folder


def cache_folder(cache: str | Path, source: str | Path, raw: bytes) -> Path:
    """Where the copy is of the dataset at `source` whose meta.json is `raw`."""
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


def lock_folder(folder: Path, alive: Callable):
    """What holds the folder in a `with`, once no other process of this machine copies to it."""
    lock = filelock.FileLock(folder / '.copy.lock')
    while True:
        try:
            return lock.acquire(timeout=1)
        except filelock.Timeout:
            alive()


def is_complete(folder: Path) -> bool:
    """Whether all is there, by the sizes: each file had been found right when it got its name."""
    if not all((folder / name).exists() for name in ('meta.json', 'tokenizer.json')):
        return False
    with contextlib.suppress(UserError):
        check_files(folder, read_meta(folder))
        return True
    return False


def copy_dataset(source: str, folder: Path, raw: bytes, alive: Callable) -> None:
    files = listed_files(source, raw)
    (folder / 'meta.json').unlink(missing_ok=True)
    copy_files(source, folder, files, alive)
    for name, content in (
        ('tokenizer.json', read_small_file(source, 'tokenizer.json')),
        ('meta.json', raw),
    ):
        with new_file(folder / name) as part:
            part.write_bytes(content)


def listed_files(source: str, raw: bytes) -> list[FileEntry]:
    """The files that a meta.json lists, none of which may lie outside its folder."""
    files = []
    try:
        meta = json.loads(raw)
        width = np.dtype(meta['dtype']).itemsize
        for shard in (shard for split in SPLITS for shard in meta['splits'][split]['shards']):
            files.append(FileEntry(shard['file'], shard['tokens'] * width, shard['sha256']))
            if meta.get('rows'):
                mask = mask_file(shard['file'])
                files.append(FileEntry(mask, shard['tokens'], shard['mask_sha256']))
        for file in files:
            if not re.fullmatch(r'([\w-][\w.-]*/)*[\w-][\w.-]*', file.name):
                raise ValueError(f'a file called {file.name!r}')
        return files
    except (ValueError, KeyError, TypeError) as error:
        place = location(source, 'meta.json')
        raise UserError(f'{place}: not the meta.json of a dataset: {error!r}') from error


def copy_files(source: str, folder: Path, files: list[FileEntry], alive: Callable) -> None:
    """Copy what is not there yet, several at a time. The first error ends all."""
    missing = sum(file.size for file in files if file_size(folder / file.name) != file.size)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(
            f'{folder}: the copy of {source} takes {missing / 1e9:.2f} GB more, and '
            f'{free / 1e9:.2f} GB are free there; make room, or give another --data_cache'
        )
    print(f'{source}: copying {missing / 1e9:.2f} GB to {folder}', flush=True)
    count = Progress()
    with ThreadPoolExecutor(PARALLEL_COPIES) as pool:
        jobs = {pool.submit(copy_file, source, folder, file, count) for file in files}
        try:
            show_progress(jobs, count, sum(file.size for file in files), alive)
        finally:
            count.stop.set()
            pool.shutdown(cancel_futures=True)


def show_progress(jobs: set, count: Progress, total: int, alive: Callable) -> None:
    """Show how far the jobs are until all are done. Raises the error of one that fails."""
    began, line_at = time.monotonic(), time.monotonic() + LOG_INTERVAL
    with tqdm(total=total, unit='B', unit_scale=True, desc='copying', disable=None) as bar:
        shown = 0
        while jobs:
            done, jobs = wait(jobs, timeout=0.2, return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()
            now, step = count.bytes, count.bytes - shown
            if step:
                alive()
            bar.update(step)
            shown = now
            if bar.disable and time.monotonic() > line_at:
                left = (time.monotonic() - began) * (total / max(1, now) - 1)
                print(f'copying: {now / total:.0%}, ETA {tqdm.format_interval(left)}', flush=True)
                line_at = time.monotonic() + LOG_INTERVAL


def copy_file(source: str, folder: Path, file: FileEntry, count: Progress) -> None:
    """One file, unless it is there and right."""
    path, place = folder / file.name, location(source, file.name)
    if (
        file_size(path) == file.size
        and write_and_hash(file_chunks(path), None, count) == file.sha256
    ):
        return
    part = Path(f'{path}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_url(source):
            found = with_retries(
                lambda: write_and_hash(url_chunks(place), part, count), place, path
            )
        else:
            found = write_and_hash(file_chunks(Path(place)), part, count)
        if found != file.sha256:
            raise UserError(
                f'{place}: has sha256 {found}, and meta.json says {file.sha256}; it is damaged, or '
                'the dataset was just prepared anew: prepare it again, or try again'
            )
        os.replace(part, path)
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {error.strerror or error}') from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_and_hash(pieces: Iterator[bytes], part: Path | None, count: Progress) -> str:
    """The sha256 of the pieces, which are written to `part` if it is given, and counted."""
    digest, added = hashlib.sha256(), 0
    try:
        with part.open('wb') if part else contextlib.nullcontext() as file:
            for piece in pieces:
                if count.stop.is_set():
                    raise UserError('another file could not be copied')  # which is what is told
                digest.update(piece)
                if part:
                    file.write(piece)
                count.add(len(piece))
                added += len(piece)
            if part:
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        count.add(-added)
        raise
    return digest.hexdigest()


def file_chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open('rb') as file:
            while piece := file.read(CHUNK_BYTES):
                yield piece
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {error.strerror or error}') from error


def url_chunks(url: str) -> Iterator[bytes]:
    import requests

    with requests.get(url, stream=True, timeout=20, headers=HEADERS) as reply:
        reply.raise_for_status()
        yield from reply.iter_content(CHUNK_BYTES)


def read_small_file(source: str, name: str) -> bytes:
    """A small file of the dataset's."""
    place = location(source, name)
    if is_url(source):
        return with_retries(lambda: b''.join(url_chunks(place)), place)
    if not os.path.exists(place):
        raise UserError(f'{place}: is missing, and a copy needs it; leave data_cache at None')
    return b''.join(file_chunks(Path(place)))


def file_size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None
