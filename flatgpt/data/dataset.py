"""
The format on disk, and reading a batch by its number.

data/<name>/ holds the ids of each split as raw little-endian uint16 or uint32 in train.bin (or
train-00000.bin, train-00001.bin, ...) and val.bin, the tokenizer.json, and meta.json, written last:
{"format": "flatgpt", "tokenizer", "vocab_size", "dtype",
 "splits": {"train": {"tokens", "bytes", "shards": [{"file", "tokens", "sha256"}]}, "val": ...}}.
A large one is made of parts (see data/parquet.py): then the files are in folders below it.
Conversations (see data/chat/prepare.py) lie in rows of a fixed length: meta.json says "rows":
{"length", "pairs"}, and beside train.bin is train.mask.bin with a byte of flags for each id:
LEARNED, FIRST (of a conversation, or of the padding), PADDING. With pairs, a row with the better
answer comes before one with the worse.
A folder with only nanoGPT's train.bin, val.bin and perhaps meta.pkl is read as well.

    with Writer(folder, tokenizer) as writer:        # nothing is published unless this ends well
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

import filelock
import numpy as np

from flatgpt import ROOT
from flatgpt.data.shard_files import ShardFiles
from flatgpt.data.tokenizer import Tokenizer, from_nanogpt_meta, get_tokenizer, load
from flatgpt.errors import UserError, did_you_mean
from flatgpt.files import new_file

DATA = ROOT / 'data'
SPLITS = ('train', 'val')
TARGET, FIRST, PADDING = 1, 2, 4  # flags of an id in a row
UNFINISHED = '.unfinished'  # there while finished parts take the place of an older dataset
QUICKSTART = 'python train.py config/quickstart.py'


class Writer:
    """
    Writes a dataset folder, in shards of `shard_tokens`. What is written has other names until the
    `with` ends without an error, so that a folder never looks finished when it is not.

    source: what a part of a larger dataset is made from, which its meta.json then tells; a split
    of a part may be empty.
    rows: {'length', 'pairs'} of rows that are written with their flags.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        shard_tokens: int = 2**30,
        source: dict | None = None,
        rows: dict | None = None,
    ):
        self.folder, self.tokenizer, self.shard_tokens = Path(folder), tokenizer, shard_tokens
        self.source, self.rows = source, rows
        if rows:  # none of them, and no pair, in two shards
            unit = row_unit(rows)
            self.shard_tokens = max(1, shard_tokens // unit) * unit
        self.shards: dict[str, list[dict]] = {split: [] for split in SPLITS}
        self.bytes = dict.fromkeys(SPLITS, 0)
        self._files: dict[str, list] = {}  # a split's open shard, and its flags: [(file, sha256)]
        self._byte_lengths = tokenizer.byte_lengths()
        self._lock = filelock.FileLock(self.folder / '.write.lock', timeout=0)

    def __enter__(self) -> 'Writer':
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(f'{self.folder}: another program is writing this dataset now') from None
        except OSError as error:
            raise self._write_error(error) from error
        self._remove_parts()  # of a run that was killed
        return self

    def write(self, split: str, ids: np.ndarray, flags: np.ndarray | None = None) -> None:
        """Append `ids` to a split; rows come with their flags, as many."""
        assert (flags is not None) == bool(self.rows)
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
            raise self._write_error(error) from error

    def include(self, name: str) -> None:
        """Append the shards of a finished part, the folder `name` in this one, where they lie."""
        meta = read_meta(self.folder / name)
        check_files(self.folder / name, meta)
        if (meta['tokenizer'], meta['dtype']) != (self.tokenizer.name, self.tokenizer.dtype.name):
            raise UserError(f'{self.folder / name}: its tokenizer is {meta["tokenizer"]}')
        for split in SPLITS:
            self.bytes[split] += meta['splits'][split]['bytes']
            for shard in meta['splits'][split]['shards']:
                self.shards[split].append(shard | {'file': f'{name}/{shard["file"]}'})

    def _write_error(self, error: OSError) -> UserError:
        return write_error(self.folder, error)

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
            raise self._write_error(failure) from failure
        finally:
            for file, _ in itertools.chain(*self._files.values()):
                with contextlib.suppress(OSError):  # a full disk, again
                    file.close()
            self._remove_parts()
            self._lock.release()

    def _publish(self) -> None:
        for split in list(self._files):
            self._close_shard(split)
        for split in SPLITS:
            if not self.shards[split] and not self.source:
                raise UserError(f'{self.folder}: nothing was left for the {split} split')
        (self.folder / UNFINISHED).touch()
        masks = ('train.mask.bin', 'val.mask.bin')
        metas = ('meta.json', 'meta.pkl')
        for pattern in ('train.bin', 'train-*.bin', 'val.bin', 'val-*.bin', *masks, *metas):
            for old in self.folder.glob(pattern):
                old.unlink()
        for split, shards in self.shards.items():
            for shard in shards:
                part = self.folder / f'{shard["file"]}.part'
                if not part.exists():
                    continue  # of an included part
                mask = self.folder / f'{mask_file(shard["file"])}.part'
                if len(shards) == 1:
                    shard['file'] = f'{split}.bin'  # what nanoGPT's tools look for
                os.replace(part, self.folder / shard['file'])
                if self.rows:
                    os.replace(mask, self.folder / mask_file(shard['file']))
        self.tokenizer.save(self.folder / 'tokenizer.json')
        self._write_meta()
        (self.folder / UNFINISHED).unlink()

    def _write_meta(self) -> None:
        splits = {
            split: {'tokens': self.tokens(split), 'bytes': self.bytes[split], 'shards': shards}
            for split, shards in self.shards.items()
        }
        tokenizer = self.tokenizer
        meta = {'format': 'flatgpt', 'tokenizer': tokenizer.name, 'splits': splits}
        meta |= {'vocab_size': tokenizer.vocab_size, 'dtype': tokenizer.dtype.name}
        if self.source:
            meta['source'] = self.source
        if self.rows:
            meta['rows'] = self.rows
        with new_file(self.folder / 'meta.json') as part:
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


def write_error(folder: Path, error: OSError) -> UserError:
    elsewhere = '; --out_dir=FOLDER writes it elsewhere, for --dataset=./FOLDER'
    hint = elsewhere if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else ''
    return UserError(f'{folder}: the dataset cannot be written: {error.strerror or error}{hint}')


def mask_file(name: str) -> str:
    """The file with the flags of a shard's ids."""
    return f'{name.removesuffix(".bin")}.mask.bin'


def row_unit(rows: dict) -> int:
    """Ids of a row, or of the two rows of a pair."""
    return int(rows['length']) * (2 if rows['pairs'] else 1)


def temporary_files(folder: Path) -> list[Path]:
    patterns = ('train-*.bin.part', 'val-*.bin.part', 'meta.json.part', 'tokenizer.json.part')
    return [part for pattern in patterns for part in folder.glob(pattern)]


class Dataset:
    """
    Batches of a prepared folder, as functions of their numbers alone: the same for every world
    size, in any order of calls, and with nothing to save or restore when training resumes.

    objective: 'lm' for text, whose windows are block_size long; 'sft' for rows of conversations,
    'dpo' for pairs of such, two rows each. Rows keep their length, which becomes block_size, and
    cannot be longer than that was.
    """

    def __init__(
        self, folder: str | Path, block_size: int, seed: int = 1337, objective: str = 'lm'
    ):
        self.folder, self.seed = Path(folder), seed
        self.name, self.parts = self.folder.name, [(1.0, self)]  # a mixture has several
        meta = read_meta(self.folder)
        self.rows: dict | None = meta.get('rows')
        self._check_objective(objective)
        self._check_row(block_size)
        self.block_size = block_size = self.rows['length'] if self.rows else block_size
        self.stride = row_unit(self.rows) if self.rows else block_size
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
        masks = [mask_file(name) for name in names] if self.rows else []
        self._files = ShardFiles(self.folder, names + masks)
        sizes = np.array(lengths['train'])
        self._first_token = self._ends['train'] - sizes
        # A window and the token after it lie in one shard. Where there are several, one less than
        # fit, so that their borders can move by up to a window from epoch to epoch.
        fit = (sizes - 1) // block_size
        self._windows = np.maximum((sizes - block_size) // block_size, np.minimum(fit, 1))
        self._phases = np.minimum(block_size, sizes - self._windows * block_size)
        if self.rows:  # they begin where they begin, and what follows one is not learned
            self._windows, self._phases = sizes // self.stride, np.ones_like(sizes)
        self._last_window = np.cumsum(self._windows)
        self.n_windows = int(self._windows.sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells one preparation from another: the shards' hashes, or else their sizes."""
        made_of = [self._splits, self.rows] if self.rows else self._splits
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the text. nanoGPT folders: meta.pkl's characters, gpt2 without one."""
        if (self.folder / 'meta.json').exists():
            return load(self.folder / 'tokenizer.json')
        pickled = self.folder / 'meta.pkl'
        return from_nanogpt_meta(pickled) if pickled.exists() else get_tokenizer('gpt2')

    def text_bytes(self, split: str) -> int | None:
        """Bytes of text in a split; counted for nanoGPT's folders, None without their tokenizer.

        None for rows, too: only some of their text is a target.
        """
        if self.rows:
            return None
        if self.bytes[split] is None:
            try:
                lengths = self.tokenizer.byte_lengths()
            except UserError:  # asked once: it may have waited for a network
                self.bytes[split] = 0
                return None
            ids = (self._whole_file(name, self._dtype) for name, _ in self._shards[split])
            self.bytes[split] = sum(int(lengths[part[part < len(lengths)]].sum()) for part in ids)
        return self.bytes[split] or None

    @functools.cached_property
    def targets(self) -> np.ndarray:
        """How many targets each window of the training split has, (n_windows,)."""
        return np.concatenate([(flags & TARGET > 0).sum(1) for flags in self._flags()])

    def count_targets(self, first: int, count: int) -> int:
        """The targets that training samples number first..first+count-1 have together."""
        return int(self.targets[self.windows(first, count)].sum())

    @functools.cached_property
    def window_tokens(self) -> float:
        """Tokens of a training window on average, padding left out."""
        if not self.rows:
            return self.block_size
        return sum(int((flags & PADDING == 0).sum()) for flags in self._flags()) / self.n_windows

    def _flags(self) -> Iterator[np.ndarray]:
        """The flags of each shard of the training split, a line for each window."""
        for name, _ in self._shards['train']:
            yield self._whole_file(mask_file(name), np.uint8).reshape(-1, self.stride)

    def _whole_file(self, name: str, dtype: np.dtype) -> np.ndarray:
        with self._files.open(name) as file:
            file.seek(0)
            return np.fromfile(file, dtype)

    def windows(self, first: int, count: int) -> np.ndarray:
        """
        Which windows training samples number first..first+count-1 are, of the endless sequence of
        epochs, each of which has every window once, in an order of its own.
        """
        return self._sample_windows(first, count)[0]

    def _sample_windows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows of samples, and a key of each one's epoch."""
        sample = np.arange(first, first + count, dtype=np.int64)
        epoch = sample // self.n_windows
        key = mix(np.full(count, self.seed % 2**64, np.uint64), epoch.astype(np.uint64))
        return permute(sample % self.n_windows, self.n_windows, key), key

    def batch(self, first: int, count: int, documents: bool = False) -> tuple[np.ndarray, ...]:
        """
        The windows(first, count) -> x, y int64, both (count, block_size), of pairs
        (2 * count, block_size); y is -1 where nothing is to be learned.

        documents: numbers of the same shape as well, which tell each document of a row from its
        neighbours: an end of text, or the first token of a conversation, begins the next.
        """
        window, key = self._sample_windows(first, count)
        shard = np.searchsorted(self._last_window, window, side='right')
        window -= (self._last_window - self._windows)[shard]
        phase = (key % self._phases[shard].astype(np.uint64)).astype(np.int64)
        starts = self._first_token[shard] + phase + window * self.stride
        return self._inputs_and_targets('train', self._sequences(starts), documents)

    def _sequences(self, starts: np.ndarray) -> np.ndarray:
        """First positions of all sequences of the windows that begin at `starts`."""
        return (starts[:, None] + np.arange(0, self.stride, self.block_size)).ravel()

    def _inputs_and_targets(
        self, split: str, starts: np.ndarray, documents: bool
    ) -> tuple[np.ndarray, ...]:
        ids = self._read(split, starts)
        x, y = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
        if self.rows:
            flags = self._read_files(split, starts, np.dtype(np.uint8), mask_file)
            y[flags[:, 1:] & TARGET == 0] = -1
        if not documents:
            return x, y
        begins = flags[:, :-1] & FIRST > 0 if self.rows else x == self.tokenizer.eot
        return x, y, begins.cumsum(1)

    def eval_windows(self, split: str, count: int | None = None) -> np.ndarray:
        """
        First positions of `count` fixed, evenly spaced windows of a split that do not overlap.
        None, or more than there are: all, so that every token but the first is once a target.
        """
        last = self.tokens[split] - (0 if self.rows else 1)
        whole = last // self.stride
        if count is None or count > whole:
            return np.arange(0, last, self.stride)
        return np.arange(count) * whole // count * self.stride

    def eval_batch(
        self, split: str, starts: np.ndarray, documents: bool = False
    ) -> tuple[np.ndarray, ...]:
        """As batch(); beyond the end of the split x is 0 and y is -1."""
        starts = self._sequences(np.asarray(starts, np.int64))
        x, y, *numbers = self._inputs_and_targets(split, starts, documents)
        beyond = starts[:, None] + np.arange(1, self.block_size + 1) >= self.tokens[split]
        x[beyond], y[beyond] = 0, -1
        return x, y, *numbers

    def _read(self, split: str, starts: np.ndarray) -> np.ndarray:
        """block_size + 1 ids from each start, 0 beyond the end of the split."""
        ids = self._read_files(split, starts, self._dtype)
        if ids.max(initial=0) >= self.vocab_size:
            self._raise_invalid_id(split, ids, starts)
        return ids

    def _read_files(
        self, split: str, starts: np.ndarray, dtype: np.dtype, name_of: Callable = str
    ) -> np.ndarray:
        """
        The same of the shards, or of what lies beside each under the name that name_of gives it.

        Read, not mapped: pages seen through a mapping count as this process's memory, up to the
        size of the file, and each short window drags in 128 KB of read-ahead from a cold disk.
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
                        raise UserError(f'{path}: was cut short; prepare it again')
        return ids

    def _rows_by_shard(self, split: str, starts: np.ndarray) -> tuple[list[int], list[int]]:
        """Every row and a shard that it lies in, a row as often as there are such, by shards."""
        ends, last = self._ends[split], starts + self.block_size
        first, last = (np.searchsorted(ends, at, side='right') for at in (starts, last))
        count = np.minimum(last, len(ends) - 1) - first + 1  # 0 beyond the end
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
            f'is outside the vocabulary of {self.vocab_size}; the file is damaged or was made with '
            'another tokenizer: prepare the dataset again (a copy in data_cache: delete it)'
        )

    def _check_objective(self, objective: str) -> None:
        holds = {'lm': 'text', 'sft': 'conversations', 'dpo': 'preference pairs'}
        fits = ('dpo' if self.rows['pairs'] else 'sft') if self.rows else 'lm'
        if objective != fits:
            maker = 'text' if objective == 'lm' else 'chat'
            raise UserError(
                f'{self.folder}: holds {holds[fits]}, for --objective={fits}, and '
                f'objective={objective!r} needs {holds[objective]}, which data/{maker}/prepare.py '
                'prepares'
            )

    def _check_row(self, block_size: int) -> None:
        if self.rows and self.rows['length'] > block_size:
            raise UserError(
                f'{self.folder}: has rows of {self.rows["length"]} tokens, more than block_size='
                f'{block_size}; raise that if the model reads as far, or prepare it again with '
                f'--block_size={block_size}'
            )

    def _check_lengths(self) -> None:
        if self.rows:
            return  # as many as there are
        # What a window can be cut from: a shard to train on, the whole split to evaluate.
        longest = {
            'train': max((tokens for _, tokens in self._shards['train']), default=0),
            'val': self.tokens['val'],
        }
        for split, tokens in longest.items():
            if tokens < self.block_size + 1:
                fits = min(longest.values()) - 1
                fix = f'--block_size={fits} would work' if fits > 0 else 'it needs more text'
                raise UserError(
                    f'{self.folder}: its {split} split has {tokens:,} tokens, too few for '
                    f'block_size {self.block_size}; {fix}'
                )


def mix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A well-scattered uint64 from two (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x + (y + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(position: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """
    A permutation of 0..n-1 for each key, evaluated at `position`, without storing it: a Feistel
    network of four rounds on the smallest even number of bits, walked along its cycles until it
    lands below n (Black and Rogaway 2002).
    """
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    out, todo = position.astype(np.uint64), np.arange(len(position))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for salt in range(4):
            scrambled = mix(key[todo] + np.uint64(salt), right)
            left, right = right, left ^ (scrambled & mask)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def read_meta(folder: Path) -> dict:
    """meta.json of a prepared folder, or one made up for a folder of nanoGPT's."""
    if (folder / UNFINISHED).exists():
        raise UserError(f'{folder}: its preparation was interrupted; prepare the dataset again')
    path = folder / 'meta.json'
    if not path.exists():
        return nanogpt_meta(folder)
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        for split in SPLITS:
            shards = meta['splits'][split]['shards']
            if meta['splits'][split]['tokens'] != sum(shard['tokens'] for shard in shards):
                raise ValueError(f'the shards of {split} do not add up')
        if meta['format'] != 'flatgpt' or meta['dtype'] not in ('uint16', 'uint32'):
            raise ValueError('unknown format or dtype')
        if rows := meta.get('rows'):
            shards = [shard for split in SPLITS for shard in meta['splits'][split]['shards']]
            if any(shard['tokens'] % row_unit(rows) for shard in shards):
                raise ValueError(f'the shards are not in rows of {row_unit(rows)}')
        meta['vocab_size'] = int(meta['vocab_size'])
        return meta
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: not the meta.json of a dataset: {error!r}') from error


def check_files(folder: Path, meta: dict) -> None:
    """Raise UserError unless every shard has the size that meta.json says."""
    for split in SPLITS:
        for shard in meta['splits'][split]['shards']:
            check_size(folder / shard['file'], shard['tokens'] * np.dtype(meta['dtype']).itemsize)
            if meta.get('rows'):
                check_size(folder / mask_file(shard['file']), shard['tokens'])


def check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.exists() else None
    if size != expected:
        found = 'is missing' if size is None else f'has {size:,} bytes'
        raise UserError(
            f'{path}: {found}, and meta.json says {expected:,}; prepare the dataset again'
        )


def nanogpt_meta(folder: Path) -> dict:
    if (folder / 'tokenizer.json').exists():
        raise UserError(f'{folder}: its meta.json is missing; prepare the dataset again')
    for split in SPLITS:
        if not (folder / f'{split}.bin').exists():
            if temporary_files(folder) or any(folder.glob('part-*/')):
                raise UserError(f'{folder}: its preparation did not finish; prepare it again')
            raise UserError(f'{folder}: no dataset here; it has no meta.json and no {split}.bin')
    pickled = folder / 'meta.pkl'
    vocab_size = from_nanogpt_meta(pickled).vocab_size if pickled.exists() else 50257
    splits = {}
    for split in SPLITS:
        tokens = (folder / f'{split}.bin').stat().st_size // 2
        shards = [{'file': f'{split}.bin', 'tokens': tokens}]
        splits[split] = {'tokens': tokens, 'bytes': None, 'shards': shards}
    return {'vocab_size': vocab_size, 'dtype': 'uint16', 'splits': splits}


def find_dataset(name: str) -> Path:
    """
    The dataset in data/<name>, or in the folder `name` if that is a path. One that comes with
    flatGPT and is not there yet is prepared first, unless it is a large download.
    """
    folder, is_path = resolve_dataset(name)
    if not is_prepared(folder):
        if not is_path and prepare_script(folder):  # never a stranger's
            prepare(folder)
        elif not folder.is_dir():
            raise UserError(missing_dataset(name, is_path))
    return folder


def resolve_dataset(name: str) -> tuple[Path, bool]:
    """Where a dataset is or would be, and whether its name is a path."""
    is_path = os.path.basename(name) != name or name in ('', '.', '..')
    return Path(name) if is_path else DATA / name, is_path


def is_prepared(folder: Path) -> bool:
    there = (folder / 'meta.json').exists() or (folder / 'train.bin').exists()
    return there and not (folder / UNFINISHED).exists()


def prepare(folder: Path) -> None:
    """Run the script that prepares a dataset; of several processes one does, the others wait."""
    script, arguments = prepare_script(folder)
    if (size := download_gb(folder)) > 1:
        raise UserError(
            f'dataset {folder.name} is not prepared: `{prepare_command(folder)}` would '
            f'fetch about {size} GB for it; the way to start is `{QUICKSTART}`'
        )
    try:
        folder.mkdir(exist_ok=True)
        held = filelock.FileLock(folder / '.prepare.lock').acquire()
    except OSError as error:  # a checkout that is only to be read
        raise UserError(
            f'{write_error(folder, error)}: {prepare_command(folder)} --out_dir=FOLDER'
        ) from error
    with held:
        if not is_prepared(folder):
            import_script(script).main(arguments)


def download_gb(folder: Path) -> float:
    """What the script that prepares a dataset of ours fetches, where that is much."""
    return getattr(import_script(prepare_script(folder)[0]), 'DOWNLOAD_GB', 0)


def prepare_script(folder: Path) -> tuple[Path, list[str]] | None:
    """The script that prepares a folder's dataset, and its arguments; None if it is none of ours.

    Most have a prepare.py of their own; gutenberg's prepares the sets of books it lists.
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
    """The command that prepares a dataset of ours."""
    script, arguments = prepare_script(folder)
    return ' '.join([f'python data/{script.parent.name}/prepare.py', *arguments])


def import_script(script: Path) -> ModuleType:
    """The module data.<name>.prepare, also where <name> is no Python name."""
    name = f'data.{script.parent.name}.prepare'
    loaded = sys.modules.get(name)
    if loaded and loaded.__file__ == str(script):
        return loaded
    spec = importlib.util.spec_from_file_location(name, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a worker process looks for the module's functions
    spec.loader.exec_module(module)
    return module


def missing_dataset(name: str, is_path: bool) -> str:
    own_text = f'your own text: python data/text/prepare.py FILES --name={Path(name).name}'
    if is_path:
        return f'{name}: no such dataset folder; {own_text}'
    folders = [f.name for f in DATA.iterdir() if is_prepared(f) or (f / 'prepare.py').exists()]
    # these three need to be told more
    names = sorted({*folders, *book_sets()} - {'chat', 'gutenberg', 'text'})
    hint = did_you_mean(name, names)
    return f'no dataset is called {name}; {hint}there are {", ".join(names)}; {own_text}'
