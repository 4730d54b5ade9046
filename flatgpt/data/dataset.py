"""
The dataset format on disk, and random access to batches by sample number.

data/<name>/ holds the token ids of each split as raw little-endian uint16 or uint32 in train.bin
(or train-00000.bin, train-00001.bin, ...) and val.bin, the tokenizer.json, and meta.json, which is
written last:
{"format": "flatgpt", "tokenizer", "vocab_size", "dtype",
 "splits": {"train": {"tokens", "bytes", "shards": [{"file", "tokens", "sha256"}]}, "val": ...}}.
The shards of a large dataset are in the folders of its parts (see data/parquet.py).
Conversations (see data/chat/prepare.py) are packed into sequences of fixed length, here called
rows: meta.json has "rows": {"length", "pairs"}, and train.mask.bin beside train.bin has one byte of
flags per id: TARGET, FIRST (of a conversation, or of the padding), PADDING. With pairs, the row of
the chosen completion precedes that of the rejected one. Prompts for reinforcement learning (see
data/prompts/prepare.py) have one row each, and a line with the record in
train.records.jsonl.
A nanoGPT folder with only train.bin, val.bin and perhaps meta.pkl can be read, too.

    with Writer(folder, tokenizer) as writer:        # publishes nothing if this raises
        writer.write('train', ids)
    x, y = Dataset(folder, block_size=256).batch(first=step * 64, count=64)
"""

import contextlib
import errno
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import filelock
import numpy as np

from flatgpt import ROOT
from flatgpt.data.shard_files import ShardFiles
from flatgpt.data.tokenizer import Tokenizer, from_nanogpt_meta, get_tokenizer
from flatgpt.data.tokenizer import load as load_tokenizer
from flatgpt.errors import DISK_ERRORS, UserError, counted, did_you_mean, reason_of
from flatgpt.files import atomic_file, is_same_path, nearest_existing

DATA = ROOT / 'data'
SPLITS = ('train', 'val')
TARGET, FIRST, PADDING = 1, 2, 4  # flags of an id in a row of chat data
UNFINISHED = '.unfinished'  # exists while new files replace an older dataset
QUICKSTART = 'python train.py config/quickstart.py'
TEXT_COMMAND = 'python data/text/prepare.py FILES'
# folders with only a script, which prepares a dataset elsewhere: its arguments
SCRIPT_FOLDERS = {
    'chat': 'talks.jsonl --name=talks',
    'gutenberg': '1342 84 --name=novels',
    'hub': 'roneneldan/TinyStories --name=tinystories',
    'packages': 'pypi:click --name=click',
    'prompts': 'sums.jsonl --name=sums',
    'text': 'FILES --name=mine',
}


class Writer:
    """
    Writes a dataset folder, in shards of `shard_tokens`. The files have temporary names until the
    `with` ends without an error, so an unfinished folder never looks finished.

    source: what a part of a larger dataset is made from, recorded in its meta.json; a split of a
    part may be empty.
    rows: {'length', 'pairs'} for chat data, whose rows are written with their flags; None for text.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        shard_tokens: int = 2**30,
        source: dict | None = None,
        rows: dict | None = None,
    ):
        self.folder, self.tokenizer = Path(folder), tokenizer
        self.shard_tokens = shard_tokens
        self.source, self.rows = source, rows
        if rows:  # no row or pair may cross shards
            unit = row_unit(rows)
            self.shard_tokens = max(1, shard_tokens // unit) * unit
        self.shards: dict[str, list[dict]] = {split: [] for split in SPLITS}
        self.bytes = dict.fromkeys(SPLITS, 0)
        self.records: dict[str, list[bytes]] = {split: [] for split in SPLITS}
        # split -> [(file, sha256)] of the open shard and its flags
        self._files: dict[str, list] = {}
        self._byte_lengths = tokenizer.byte_lengths()
        self._lock = filelock.FileLock(self.folder / '.write.lock', timeout=0)

    def __enter__(self) -> 'Writer':
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f'{self.folder}: another program is writing this dataset; wait until it has '
                'finished, or choose another --out_dir'
            ) from None
        except OSError as error:
            raise write_error(self.folder, error) from error
        self._remove_parts()  # of a killed run
        return self

    def write(
        self, split: str, ids: np.ndarray, flags: np.ndarray | None = None, record: str = ''
    ) -> None:
        """Append `ids` to a split; rows need one flag per id, and those of prompts a record."""
        assert (flags is not None) == bool(self.rows)
        if record:
            # a lone surrogate is written as a JSON escape
            self.records[split].append(record.encode(errors='backslashreplace') + b'\n')
        if not len(ids):
            return
        self.bytes[split] += int(self._byte_lengths[ids].sum())
        streams = [np.asarray(ids).astype(self.tokenizer.dtype)]
        if self.rows:
            streams.append(np.asarray(flags, np.uint8))
        try:
            while len(streams[0]):
                if split not in self._files:
                    self._open_shard(split)
                shard = self.shards[split][-1]
                room = self.shard_tokens - shard['tokens']
                for (file, digest), stream in zip(self._files[split], streams, strict=True):
                    raw = stream[:room].tobytes()
                    file.write(raw)
                    digest.update(raw)
                shard['tokens'] += len(streams[0][:room])
                streams = [stream[room:] for stream in streams]
                if shard['tokens'] == self.shard_tokens:
                    self._close_shard(split)
        except OSError as error:
            raise write_error(self.folder, error) from error

    def include(self, name: str) -> None:
        """Append the shards of a finished part, the subfolder `name`, without moving them."""
        meta = read_meta(self.folder / name)
        check_files(self.folder / name, meta)
        if (meta['tokenizer'], meta['dtype']) != (self.tokenizer.name, self.tokenizer.dtype.name):
            raise UserError(
                f'{self.folder / name}: uses the tokenizer {meta["tokenizer"]}, and other parts '
                f'{self.tokenizer.name}; delete it and run its job again'
            )
        for split in SPLITS:
            self.bytes[split] += meta['splits'][split]['bytes']
            for shard in meta['splits'][split]['shards']:
                self.shards[split].append(shard | {'file': f'{name}/{shard["file"]}'})

    def _open_shard(self, split: str) -> None:
        name = f'{split}-{len(self.shards[split]):05d}.bin'
        self.shards[split].append({'file': name, 'tokens': 0})
        self._files[split] = []
        for stream in (name, mask_file(name)) if self.rows else (name,):
            file = (self.folder / f'{stream}.part').open('wb')
            self._files[split].append((file, hashlib.sha256()))

    def _close_shard(self, split: str) -> None:
        for key, (file, digest) in zip(('', 'mask_'), self._files.pop(split), strict=False):
            with file:
                file.flush()
                os.fsync(file.fileno())
            self.shards[split][-1][f'{key}sha256'] = digest.hexdigest()

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._publish()
        except OSError as failure:
            raise write_error(self.folder, failure) from failure
        finally:
            for file, _ in itertools.chain(*self._files.values()):
                with contextlib.suppress(OSError):  # the disk is still full
                    file.close()
            self._remove_parts()
            self._lock.release()

    def _publish(self) -> None:
        for split in list(self._files):
            self._close_shard(split)
        for split in SPLITS:
            if not self.shards[split] and not self.source:
                raise UserError(f'{self.folder}: the {split} split would be empty; add more text')
        (self.folder / UNFINISHED).touch()
        masks = ('train.mask.bin', 'val.mask.bin', *map(records_file, SPLITS))
        metas = ('meta.json', 'meta.pkl')
        for pattern in ('train.bin', 'train-*.bin', 'val.bin', 'val-*.bin', *masks, *metas):
            for old in self.folder.glob(pattern):
                old.unlink()
        for split, shards in self.shards.items():
            for shard in shards:
                part = self.folder / f'{shard["file"]}.part'
                if not part.exists():
                    continue  # it belongs to an included part
                mask = self.folder / f'{mask_file(shard["file"])}.part'
                if len(shards) == 1:
                    shard['file'] = f'{split}.bin'  # the name that nanoGPT's tools expect
                os.replace(part, self.folder / shard['file'])
                if self.rows:
                    os.replace(mask, self.folder / mask_file(shard['file']))
        for split in SPLITS if has_records(self.rows) else ():
            with atomic_file(self.folder / records_file(split)) as part:
                part.write_bytes(b''.join(self.records[split]))
        self.tokenizer.save(self.folder / 'tokenizer.json')
        self._write_meta()
        (self.folder / UNFINISHED).unlink()

    def _write_meta(self) -> None:
        splits = {
            split: {'tokens': self.tokens(split), 'bytes': self.bytes[split], 'shards': shards}
            for split, shards in self.shards.items()
        }
        for split in SPLITS if has_records(self.rows) else ():
            content = b''.join(self.records[split])
            digest = hashlib.sha256(content).hexdigest()
            splits[split]['records'] = {'bytes': len(content), 'sha256': digest}
        tokenizer = self.tokenizer
        meta = {'format': 'flatgpt', 'tokenizer': tokenizer.name, 'splits': splits}
        meta |= {'vocab_size': tokenizer.vocab_size, 'dtype': tokenizer.dtype.name}
        if self.source:
            meta['source'] = self.source
        if self.rows:
            meta['rows'] = self.rows
        with atomic_file(self.folder / 'meta.json') as part:
            part.write_text(json.dumps(meta, indent=1), encoding='utf-8')

    def _remove_parts(self) -> None:
        for part in temporary_files(self.folder):
            part.unlink()

    def tokens(self, split: str) -> int:
        return sum(shard['tokens'] for shard in self.shards[split])

    def summary(self) -> str:
        counts = ', '.join(f'{self.tokens(split):,} {split}' for split in SPLITS)
        per_token = sum(self.bytes.values()) / max(1, sum(map(self.tokens, SPLITS)))
        name = self.tokenizer.name
        return f'{self.folder}: {counts} tokens ({name}, {per_token:.2f} bytes of text per token)'


def write_error(folder: Path, error: OSError, command: str = '') -> UserError:
    """The line for a dataset that cannot be written. command: its prepare script, if known."""
    if (path := nearest_existing(folder)).is_file():
        return UserError(f'{folder}: {path} is a file; write the dataset to another --out_dir')
    full = error.errno in DISK_ERRORS - {errno.EROFS}
    fix = 'free some space' if full else 'make the folder writable'
    return UserError(
        f'{folder}: cannot write the dataset: {error.strerror or error}; {fix}, or write it '
        f'elsewhere: {command}--out_dir=FOLDER, then train with --dataset=./FOLDER'
    )


def mask_file(name: str) -> str:
    """The file with the flags of a shard."""
    return f'{name.removesuffix(".bin")}.mask.bin'


def records_file(split: str) -> str:
    """The file with the records of prompts, a line each."""
    return f'{split}.records.jsonl'


def has_records(rows: dict | None) -> bool:
    return bool(rows and rows.get('prompts'))


def row_unit(rows: dict) -> int:
    """Tokens per row, or per pair of rows."""
    return int(rows['length']) * (2 if rows['pairs'] else 1)


def temporary_files(folder: Path) -> list[Path]:
    patterns = ('train-*.bin.part', 'val-*.bin.part', 'meta.json.part', 'tokenizer.json.part')
    return [part for pattern in patterns for part in folder.glob(pattern)]


class Prompt(NamedTuple):
    """A prompt for reinforcement learning: its number in the split, and the record it is from."""

    number: int
    ids: list[int]
    record: dict


class MixturePart(NamedTuple):
    share: float  # of the samples
    data: 'Dataset'


class Dataset:
    """
    Batches of a prepared folder. A batch depends only on its sample numbers: it is the same for
    every world size and order of calls, and resuming needs no saved state.

    objective: 'lm' for text, in windows of block_size; 'sft' for rows of conversations, 'dpo' and
    'reward' for pairs of rows, 'rl' for prompts, a row each. Rows keep their length, which must be
    at most block_size and replaces it.
    A window is what one sample is read from: block_size tokens, or a row or pair of chat data.
    """

    def __init__(
        self, folder: str | Path, block_size: int, seed: int = 1337, objective: str = 'lm'
    ):
        self.folder, self.seed = Path(folder), seed
        self.name = self.folder.name
        self.parts = [MixturePart(1.0, self)]  # like those of a Mixture
        meta = read_meta(self.folder)
        self._rows: dict | None = meta.get('rows')
        self._check_objective(objective)
        self._check_row(block_size)
        self.block_size = block_size = self._rows['length'] if self.is_chat else block_size
        self.stride = row_unit(self._rows) if self.is_chat else block_size  # tokens per window
        self.vocab_size: int = meta['vocab_size']
        self._dtype = np.dtype(meta['dtype']).newbyteorder('<')
        self._splits = splits = {split: meta['splits'][split] for split in SPLITS}
        self.tokens: dict[str, int] = {s: splits[s]['tokens'] for s in SPLITS}
        self.bytes: dict[str, int | None] = {s: splits[s].get('bytes') for s in SPLITS}
        self._shards = {s: [(d['file'], d['tokens']) for d in splits[s]['shards']] for s in SPLITS}
        lengths = {s: [tokens for _, tokens in self._shards[s]] for s in SPLITS}
        self._ends = {s: np.cumsum(lengths[s], dtype=np.int64) for s in SPLITS}
        check_files(self.folder, meta)
        self._check_lengths()
        names = [name for split in SPLITS for name, _ in self._shards[split]]
        masks = [mask_file(name) for name in names] if self.is_chat else []
        self._files = ShardFiles(self.folder, names + masks)
        sizes = np.array(lengths['train'])
        self._first_token = self._ends['train'] - sizes
        # A window and the token after it are in one shard. If several fit, use one less, so that
        # the window boundaries can shift by up to a window from epoch to epoch.
        fit = (sizes - 1) // block_size
        self._windows = np.maximum((sizes - block_size) // block_size, np.minimum(fit, 1))
        self._offsets = np.minimum(block_size, sizes - self._windows * block_size)  # their number
        if self.is_chat:  # fixed boundaries, and no target after the last token
            self._windows, self._offsets = sizes // self.stride, np.ones_like(sizes)
        self._last_window = np.cumsum(self._windows)
        self.n_windows = int(self._windows.sum())

    @property
    def is_chat(self) -> bool:
        """Whether the samples are conversations, pairs or prompts, in rows of fixed length."""
        return bool(self._rows)

    @property
    def has_pairs(self) -> bool:
        """Whether the samples are preference pairs."""
        return self.is_chat and bool(self._rows['pairs'])

    @property
    def has_prompts(self) -> bool:
        """Whether the samples are prompts for reinforcement learning."""
        return has_records(self._rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the content: a hash of the shards' hashes, or of their sizes (nanoGPT)."""
        made_of = [self._splits, self._rows] if self.is_chat else self._splits
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The dataset's tokenizer; of a nanoGPT folder, meta.pkl's characters or else gpt2."""
        if (self.folder / 'meta.json').exists():
            return load_tokenizer(self.folder / 'tokenizer.json')
        pickled = self.folder / 'meta.pkl'
        return from_nanogpt_meta(pickled) if pickled.exists() else get_tokenizer('gpt2')

    def text_bytes(self, split: str) -> int | None:
        """Bytes of text in a split; for nanoGPT folders counted with their tokenizer.

        None if that is unavailable, and for chat data, since only part of its text is a target.
        """
        if self.is_chat:
            return None
        if self.bytes[split] is None:
            try:
                lengths = self.tokenizer.byte_lengths()
            except UserError:
                self.bytes[split] = 0  # do not retry: it may have waited for a network
                return None
            ids = (self._whole_file(name, self._dtype) for name, _ in self._shards[split])
            self.bytes[split] = sum(int(lengths[part[part < len(lengths)]].sum()) for part in ids)
        return self.bytes[split] or None

    @functools.cached_property
    def targets(self) -> np.ndarray:
        """The number of targets in each window of the training split, (n_windows,)."""
        return np.concatenate([(flags & TARGET > 0).sum(1) for flags in self._flags()])

    def count_targets(self, first: int, count: int) -> int:
        """The number of targets in training samples first..first+count-1."""
        return int(self.targets[self.windows(first, count)].sum())

    @functools.cached_property
    def window_tokens(self) -> float:
        """The mean number of tokens in a training window, without padding."""
        if not self.is_chat:
            return self.block_size
        return sum(int((flags & PADDING == 0).sum()) for flags in self._flags()) / self.n_windows

    def prompts(self, split: str, windows: np.ndarray) -> list[Prompt]:
        """The prompts in these windows of a split."""
        starts = np.asarray(windows, np.int64) * self.stride
        ids = self._read(split, starts)[:, : self.stride]
        flags = self._read_files(split, starts, np.dtype(np.uint8), mask_file)[:, : self.stride]
        records = self._records[split]
        return [
            Prompt(int(window), row[flag & PADDING == 0].tolist(), json.loads(records[window]))
            for window, row, flag in zip(windows, ids, flags, strict=True)
        ]

    @functools.cached_property
    def _records(self) -> dict[str, list[bytes]]:
        """The lines of the records of each split."""
        return {s: (self.folder / records_file(s)).read_bytes().splitlines() for s in SPLITS}

    def _flags(self) -> Iterator[np.ndarray]:
        """The flags of each shard of the training split, (windows, stride)."""
        for name, _ in self._shards['train']:
            yield self._whole_file(mask_file(name), np.uint8).reshape(-1, self.stride)

    def _whole_file(self, name: str, dtype: np.dtype, count: int = -1) -> np.ndarray:
        """The items of a file, or the first `count` of them."""
        with self._files.open(name) as file:
            file.seek(0)
            return np.fromfile(file, dtype, count)

    def first_tokens(self, count: int) -> np.ndarray:
        """The first `count` tokens of the training split."""
        found = [np.empty(0, self._dtype)]
        for name, tokens in self._shards['train']:
            found.append(self._whole_file(name, self._dtype, min(count, tokens)))
            count -= len(found[-1])
        ids = np.concatenate(found)
        if ids.max(initial=0) >= self.vocab_size:
            self._raise_invalid_id('train', ids[None], np.zeros(1, np.int64))
        return ids

    def windows(self, first: int, count: int) -> np.ndarray:
        """
        The window of each of the training samples first..first+count-1. Samples are numbered over
        an endless sequence of epochs; each epoch has every window once, in a different order.
        """
        return self._sample_windows(first, count)[0]

    def _sample_windows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The window of each sample, and the random key of its epoch."""
        sample = np.arange(first, first + count, dtype=np.int64)
        epoch = sample // self.n_windows
        key = hash_uint64(np.full(count, self.seed % 2**64, np.uint64), epoch.astype(np.uint64))
        return permute(sample % self.n_windows, self.n_windows, key), key

    def batch(self, first: int, count: int, documents: bool = False) -> tuple[np.ndarray, ...]:
        """
        Training samples first..first+count-1 -> x, y int64, both (count, block_size), for pairs
        (2 * count, block_size); y is -1 where there is no target.

        documents: also return document numbers of the same shape. A new document begins at an
        end-of-text token, or at the first token of a conversation.
        """
        window, key = self._sample_windows(first, count)
        shard = np.searchsorted(self._last_window, window, side='right')
        window -= (self._last_window - self._windows)[shard]
        offset = (key % self._offsets[shard].astype(np.uint64)).astype(np.int64)
        starts = self._first_token[shard] + offset + window * self.stride
        return self._inputs_and_targets('train', self._sequences(starts), documents)

    def _sequences(self, starts: np.ndarray) -> np.ndarray:
        """The first positions of all sequences in the windows that begin at `starts`."""
        return (starts[:, None] + np.arange(0, self.stride, self.block_size)).ravel()

    def _inputs_and_targets(
        self, split: str, starts: np.ndarray, documents: bool
    ) -> tuple[np.ndarray, ...]:
        ids = self._read(split, starts)
        x, y = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
        if self.is_chat:
            flags = self._read_files(split, starts, np.dtype(np.uint8), mask_file)
            y[flags[:, 1:] & TARGET == 0] = -1
        if not documents:
            return x, y
        begins = flags[:, :-1] & FIRST > 0 if self.is_chat else x == self.tokenizer.eot
        return x, y, begins.cumsum(1)

    def eval_starts(self, split: str, count: int | None = None) -> np.ndarray:
        """
        The first token positions of `count` fixed, evenly spaced, disjoint windows of a split.
        None, or more than exist: all, so that every token but the first is a target once.
        """
        end = self.tokens[split] - (0 if self.is_chat else 1)
        full_windows = end // self.stride
        if count is None or count > full_windows:
            return np.arange(0, end, self.stride)
        return np.arange(count) * full_windows // count * self.stride

    def eval_batch(
        self, split: str, starts: np.ndarray, documents: bool = False
    ) -> tuple[np.ndarray, ...]:
        """Like batch(); beyond the end of the split x is 0 and y is -1."""
        starts = self._sequences(np.asarray(starts, np.int64))
        x, y, *numbers = self._inputs_and_targets(split, starts, documents)
        beyond = starts[:, None] + np.arange(1, self.block_size + 1) >= self.tokens[split]
        x[beyond], y[beyond] = 0, -1
        return x, y, *numbers

    def _read(self, split: str, starts: np.ndarray) -> np.ndarray:
        """block_size + 1 ids from each start, 0 beyond the end: (len(starts), block_size + 1)."""
        ids = self._read_files(split, starts, self._dtype)
        if ids.max(initial=0) >= self.vocab_size:
            self._raise_invalid_id(split, ids, starts)
        return ids

    def _read_files(
        self, split: str, starts: np.ndarray, dtype: np.dtype, name_of: Callable = str
    ) -> np.ndarray:
        """
        Like _read(), from the shards or from the file name_of(shard) beside each.

        Not memory-mapped: mapped pages count as this process's memory, up to the size of the file,
        and each short window triggers 128 KB of read-ahead from a cold disk.
        """
        width = self.block_size + 1
        ids = np.zeros((len(starts), width), dtype)
        size = ids.itemsize
        rows, shards = self._rows_by_shard(split, starts)
        for shard, group in itertools.groupby(zip(shards, rows, strict=True), itemgetter(0)):
            name, tokens = self._shards[split][shard]
            first = int(self._ends[split][shard]) - tokens
            with self._files.open(name_of(name)) as file:
                for _, row in group:
                    start = int(starts[row]) - first
                    begin, end = max(start, 0), min(start + width, tokens)
                    file.seek(begin * size)
                    if file.readinto(ids[row, begin - start : end - start]) < (end - begin) * size:
                        path = f'{self.folder}/{name_of(name)}'
                        raise UserError(f'{path}: was truncated; prepare the dataset again')
        return ids

    def _rows_by_shard(self, split: str, starts: np.ndarray) -> tuple[list[int], list[int]]:
        """Pairs of a row and a shard that it overlaps, sorted by shard."""
        ends, last = self._ends[split], starts + self.block_size
        first, last = (np.searchsorted(ends, at, side='right') for at in (starts, last))
        count = np.minimum(last, len(ends) - 1) - first + 1  # 0 if beyond the end
        rows = np.repeat(np.arange(len(starts)), count)
        shards = first[rows] + np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
        order = np.argsort(shards, kind='stable')
        return rows[order].tolist(), shards[order].tolist()

    def _raise_invalid_id(self, split: str, ids: np.ndarray, starts: np.ndarray) -> None:
        row, column = np.argwhere(ids >= self.vocab_size)[0]
        position = int(starts[row] + column)
        shard = int(np.searchsorted(self._ends[split], position, side='right'))
        name, tokens = self._shards[split][shard]
        position -= int(self._ends[split][shard]) - tokens
        raise UserError(
            f'{self.folder / name}: token id {ids[row, column]} at byte {position * ids.itemsize} '
            f'is outside the vocabulary of {self.vocab_size}; the file is damaged or uses another '
            'tokenizer: prepare the dataset again (or delete its copy in data_cache)'
        )

    def _check_objective(self, objective: str) -> None:
        holds = {'lm': 'text', 'sft': 'conversations', 'dpo': 'preference pairs', 'rl': 'prompts'}
        fits = 'dpo' if self.has_pairs else 'rl' if self.has_prompts else 'sft'
        fits = fits if self.is_chat else 'lm'
        needed = 'dpo' if objective == 'reward' else objective
        if needed != fits:
            script = {'lm': 'text', 'rl': 'prompts'}.get(objective, 'chat')
            raise UserError(
                f'{self.folder}: contains {holds[fits]}, for --objective={fits}; '
                f'objective={objective!r} needs {holds[needed]}: prepare them with '
                f'data/{script}/prepare.py'
            )

    def _check_row(self, block_size: int) -> None:
        if self.has_prompts:
            return  # validate.py also wants room for a completion
        if self.is_chat and self._rows['length'] > block_size:
            length = self._rows['length']
            raise UserError(
                f'{self.folder}: its packed sequences of {length} tokens exceed block_size='
                f'{block_size}; prepare the dataset again with --block_size={block_size}, or use '
                f'a model with --block_size={length}'
            )

    def _check_lengths(self) -> None:
        if self.is_chat:
            return  # rows have a fixed length
        # A training window must fit in a shard, an evaluation window in the whole split.
        longest = {
            'train': max((tokens for _, tokens in self._shards['train']), default=0),
            'val': self.tokens['val'],
        }
        for split, tokens in longest.items():
            if tokens < self.block_size + 1:
                fits = min(longest.values()) - 1
                fix = f'use --block_size={fits}' if fits > 0 else 'add more text'
                raise UserError(
                    f'{self.folder}: its {split} split has {counted(tokens, "token")}, too few for '
                    f'block_size {self.block_size}; {fix}'
                )


def hash_uint64(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Hash two uint64 into one (the finalizer of SplitMix64, Steele et al. 2014)."""
    x = (x + (y + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(position: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """
    The value at `position` of a pseudorandom permutation of 0..n-1 for each key, without storing
    the permutation: a four-round Feistel network on the smallest even number of bits, with cycle
    walking until the value is below n (Black and Rogaway 2002).
    """
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    out, todo = position.astype(np.uint64), np.arange(len(position))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for salt in range(4):
            scrambled = hash_uint64(key[todo] + np.uint64(salt), right)
            left, right = right, left ^ (scrambled & mask)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def read_meta(folder: Path) -> dict:
    """The meta.json of a prepared folder, or its equivalent for a nanoGPT folder."""
    if (folder / UNFINISHED).exists():
        raise UserError(f'{folder}: preparation was interrupted; prepare the dataset again')
    path = folder / 'meta.json'
    if not path.exists():
        return nanogpt_meta(folder)
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        for split in SPLITS:
            shards = meta['splits'][split]['shards']
            if meta['splits'][split]['tokens'] != sum(shard['tokens'] for shard in shards):
                raise ValueError(f'the tokens of the {split} shards do not add up')
        if meta['format'] != 'flatgpt' or meta['dtype'] not in ('uint16', 'uint32'):
            raise ValueError('unknown format or dtype')
        if rows := meta.get('rows'):
            shards = [shard for split in SPLITS for shard in meta['splits'][split]['shards']]
            if any(shard['tokens'] % row_unit(rows) for shard in shards):
                raise ValueError(f'a shard is not a multiple of {row_unit(rows)} tokens')
        meta['vocab_size'] = int(meta['vocab_size'])
        return meta
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path}: not the meta.json of a dataset: {reason_of(error)}; prepare the dataset again'
        ) from error


def check_files(folder: Path, meta: dict) -> None:
    """Raise UserError unless every shard has the size recorded in meta.json."""
    for split in SPLITS:
        for shard in meta['splits'][split]['shards']:
            check_size(folder / shard['file'], shard['tokens'] * np.dtype(meta['dtype']).itemsize)
            if meta.get('rows'):
                check_size(folder / mask_file(shard['file']), shard['tokens'])
        if has_records(meta.get('rows')):
            check_size(folder / records_file(split), meta['splits'][split]['records']['bytes'])


def check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.exists() else None
    if size != expected:
        found = 'is missing' if size is None else f'has {size:,} bytes'
        raise UserError(
            f'{path}: {found}; meta.json expects {expected:,} bytes: prepare the dataset again'
        )


def nanogpt_meta(folder: Path) -> dict:
    if (folder / 'tokenizer.json').exists():
        raise UserError(f'{folder}: meta.json is missing; prepare the dataset again')
    for split in SPLITS:
        if not (folder / f'{split}.bin').exists():
            if temporary_files(folder) or any(folder.glob('part-*/')):
                raise UserError(f'{folder}: preparation did not finish; prepare the dataset again')
            raise UserError(
                f'{folder}: not a dataset: it has neither meta.json nor {split}.bin; prepare your '
                f'own text: {TEXT_COMMAND} --out_dir={folder}'
            )
    pickled = folder / 'meta.pkl'
    vocab_size = from_nanogpt_meta(pickled).vocab_size if pickled.exists() else 50257
    splits = {}
    for split in SPLITS:
        tokens = (folder / f'{split}.bin').stat().st_size // 2
        shards = [{'file': f'{split}.bin', 'tokens': tokens}]
        splits[split] = {'tokens': tokens, 'bytes': None, 'shards': shards}
    return {'vocab_size': vocab_size, 'dtype': 'uint16', 'splits': splits}


def find_or_prepare_dataset(name: str) -> Path:
    """
    The folder of a dataset: data/<name>, or `name` if that is a path. A dataset that comes with
    flatGPT is prepared if necessary, unless it is a large download.
    """
    folder, is_path = resolve_dataset(name)
    if not is_prepared(folder):
        reject_script_folder(folder)
        if not is_path and prepare_script(folder):  # only our own scripts are run
            prepare(folder)
        elif not folder.is_dir():
            raise UserError(missing_dataset(name, is_path))
    return folder


def resolve_dataset(name: str) -> tuple[Path, bool]:
    """The folder of a dataset, which need not exist, and whether its name is a path."""
    is_path = os.path.basename(name) != name or name in ('', '.', '..')
    if is_path and os.path.isdir(name) and is_same_path(Path(name).resolve().parent, DATA):
        name, is_path = Path(name).resolve().name, False  # data/pydocs is the dataset pydocs
    return Path(name) if is_path else DATA / name, is_path


def reject_script_folder(folder: Path) -> None:
    """UserError for a folder with only the script that prepares other datasets."""
    if folder.parent == DATA and (example := SCRIPT_FOLDERS.get(folder.name)):
        raise UserError(
            f'{folder}: is the folder of a script, not a dataset; prepare one: '
            f'python data/{folder.name}/prepare.py {example}, and train with '
            f'--dataset={example.partition("--name=")[2]}'
        )


def is_prepared(folder: Path) -> bool:
    has_data = (folder / 'meta.json').exists() or (folder / 'train.bin').exists()
    return has_data and not (folder / UNFINISHED).exists()


def prepare(folder: Path) -> None:
    """Run the script that prepares a dataset, in one process; others wait for it."""
    script, arguments = prepare_script(folder)
    if (size := download_gb(folder)) > 1:
        raise UserError(
            f'dataset {folder.name} is not prepared; run `{prepare_command(folder)}`, which '
            f'downloads about {size} GB, or start small with `{QUICKSTART}`'
        )
    try:
        folder.mkdir(exist_ok=True)
        lock = filelock.FileLock(folder / '.prepare.lock').acquire()
    except OSError as error:  # a read-only clone
        raise write_error(folder, error, f'{prepare_command(folder)} ') from error
    with lock:
        if not is_prepared(folder):
            import_script(script).main(arguments)


def download_gb(folder: Path) -> float:
    """The download size of one of our datasets; 0 if small."""
    return getattr(import_script(prepare_script(folder)[0]), 'DOWNLOAD_GB', 0)


def prepare_script(folder: Path) -> tuple[Path, list[str]] | None:
    """The script that prepares one of our datasets, and its arguments; None for other folders.

    Most have their own prepare.py; that of gutenberg prepares the book sets that it lists.
    """
    if (folder / 'prepare.py').exists():
        return folder / 'prepare.py', []
    if folder.parent == DATA and folder.name in book_sets():
        return DATA / 'gutenberg' / 'prepare.py', [folder.name]
    return None


def book_sets() -> list[str]:
    script = DATA / 'gutenberg' / 'prepare.py'
    return list(import_script(script).SETS) if script.exists() else []


def prepare_command(folder: Path) -> str:
    """The command that prepares one of our datasets."""
    script, arguments = prepare_script(folder)
    return ' '.join([f'python data/{script.parent.name}/prepare.py', *arguments])


def import_script(script: Path) -> ModuleType:
    """The module data.<name>.prepare, even if <name> is not a valid identifier."""
    name = f'data.{script.parent.name}.prepare'
    loaded = sys.modules.get(name)
    if loaded and loaded.__file__ == str(script):
        return loaded
    spec = importlib.util.spec_from_file_location(name, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # worker processes import functions from here
    spec.loader.exec_module(module)
    return module


def missing_dataset(name: str, is_path: bool) -> str:
    if is_path:
        return f'{name}: no such folder; prepare your own text: {TEXT_COMMAND} --out_dir={name}'
    folders = [f.name for f in DATA.iterdir() if is_prepared(f) or (f / 'prepare.py').exists()]
    names = sorted({*folders, *book_sets()} - {*SCRIPT_FOLDERS})
    hint = did_you_mean(name, names)
    return (
        f'unknown dataset {name}; {hint}choose one of {", ".join(names)}, or prepare your own '
        f'text: {TEXT_COMMAND} --name={name}'
    )
