"""
Tokenizes text of any length to disk on all cores, with a few chunks in memory at a time. With
gigatoken, one core is faster than a dozen without it. A document is given as blocks of text.

    chunks = ((0, 'train', text, len(text)) for text in split_text(document))
    with Writer(folder, tokenizer) as writer:
        write_chunks(writer, chunks)
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.synchronize
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

from flatgpt.data.dataset import Writer
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError

CHUNK = 2**20  # characters encoded at a time
# characters of a chunk without a boundary: BPE takes O(n log n) for a word
MAX_CHUNK = CHUNK + CHUNK // 8
# Every tokenizer's pre-tokenization splits between a letter or digit and one of these characters,
# so encoding a text in chunks gives the same ids as encoding it at once.
# The last three are the Chinese comma, enumeration comma and full stop.
BOUNDARY = re.compile(r'[^\W_](?=[\s,.;:!?\uff0c\u3001\u3002])')
MIN_PARALLEL_BYTES = 16_000_000  # for less text, starting processes takes longer than it saves

Chunk = tuple[int, str, str, int]  # document number, split, text, bytes read for it


def cores() -> int:
    allowed = getattr(os, 'sched_getaffinity', None)  # respects limits of a container or scheduler
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def split_text(blocks: Iterable[str]) -> Iterator[str]:
    """The text of the blocks, in chunks that can be encoded separately."""
    text = ''
    for block in blocks:
        searched = len(text) - 1  # the next block decides whether the last letter is a boundary
        text += block
        start = 0
        while len(text) - start > CHUNK:
            border = BOUNDARY.search(text, max(start + CHUNK - 1, searched), start + MAX_CHUNK)
            if not border and len(text) - start < MAX_CHUNK:
                break
            end = border.end() if border else start + MAX_CHUNK
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


def write_chunks(
    writer: Writer,
    chunks: Iterable[Chunk],
    workers: int | None = None,
    total: int | None = None,
    read_eot: bool = False,
) -> None:
    """Encode chunks and write them in order; `total` bytes are expected.

    workers: number of processes, None for the fastest.
    read_eot: encode a literal end-of-text marker as that token.
    """
    tokenizer = writer.tokenizer
    small = total is not None and total < MIN_PARALLEL_BYTES
    if tokenizer.kind == 'tiktoken' and workers in (None, 1):
        why_not = tokenizer.accelerate()
        if why_not and not small:
            print(f'encoding with tiktoken: {why_not}', flush=True)
    if workers is None:  # one, if it encodes faster than text can be sent to others
        fast = tokenizer.accelerated or tokenizer.kind in ('char', 'byte')
        workers = 1 if fast or small else cores()
    with tqdm(total=total, unit='B', unit_scale=True, desc='encoding', disable=None) as bar:
        encode = functools.partial(encode_job, read_eot=read_eot)
        encoded = map_in_processes(encode, group_chunks(chunks), tokenizer, workers, ahead=workers)
        for size, ids in encoded:
            for split, part in ids.items():
                writer.write(split, part)
            bar.update(size)


def group_chunks(chunks: Iterable[Chunk]) -> Iterator[tuple[int, list]]:
    """Chunks in lists large enough for another process, with the bytes read for each list."""
    last: dict[str, int] = {}  # split -> document number
    job, characters, bytes_read = [], 0, 0
    for number, split, text, size in chunks:
        is_new = last.get(split, number) != number  # the first document of a split is not
        last[split] = number
        job.append((split, is_new, text))
        characters += len(text)
        bytes_read += size
        if characters >= CHUNK:
            yield bytes_read, job
            job, characters, bytes_read = [], 0, 0
    if job:
        yield bytes_read, job


def encode_job(
    job: tuple[int, list], tokenizer: Tokenizer, read_eot: bool = False
) -> tuple[int, dict[str, np.ndarray]]:
    """-> bytes read, ids by split, with the end-of-text token before each new document"""
    size, chunks = job
    separator = np.array([] if tokenizer.eot is None else [tokenizer.eot], tokenizer.dtype)
    parts: dict[str, list] = {}
    for split, is_new, text in chunks:
        ids = parts.setdefault(split, [])
        ids += [separator] * is_new + [tokenizer.encode(text, allow_eot=read_eot)]
    return size, {split: np.concatenate(ids) for split, ids in parts.items()}


def map_in_processes(
    function: Callable, jobs: Iterable, tokenizer: Tokenizer, workers: int, ahead: int
) -> Iterator:
    """
    function(job, tokenizer) for each job, in order. At most `ahead` jobs are queued beyond those
    in progress. With workers=1 this process does the work.
    """
    if workers == 1:
        yield from (function(job, tokenizer) for job in jobs)
        return
    spawn = multiprocessing.get_context('spawn')
    stop = spawn.Event()
    arguments = (tokenizer.to_dict(), tokenizer.accelerated, stop)
    pool = ProcessPoolExecutor(workers, spawn, start_worker, arguments)
    waiting = deque()
    try:
        for job in jobs:
            with block_interrupts():  # submit() starts the processes
                waiting.append(pool.submit(run_job, function, job))
            if len(waiting) > workers + ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            'a worker process was killed, probably because memory ran out; use '
            f'--workers={workers // 2}'
        ) from error
    except KeyboardInterrupt:
        stop.set()  # not terminate(): it hangs on a half-written result
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def block_interrupts() -> Iterator[None]:
    """Block SIGINT: processes that are started within never get a Ctrl-C of the terminal."""
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# set in each worker process
_tokenizer: Tokenizer | None = None
_stop: multiprocessing.synchronize.Event | None = None


def start_worker(fields: dict, accelerate: bool, stop: multiprocessing.synchronize.Event) -> None:
    global _tokenizer, _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=exit_with_parent, daemon=True).start()
    _tokenizer = Tokenizer.from_dict(fields)
    if accelerate:
        _tokenizer.accelerate()


def run_job(function: Callable, job):
    return function(job, _tokenizer)


def check_interrupt() -> None:
    """Raise KeyboardInterrupt in a worker if the parent got Ctrl-C; long jobs call this."""
    if _stop and _stop.is_set():
        raise KeyboardInterrupt


def exit_with_parent() -> None:
    """Exit when the parent does, which cannot stop its workers if it is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)
