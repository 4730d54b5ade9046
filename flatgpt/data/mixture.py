"""
Training data from the dataset setting: one dataset, or a weighted mixture.

    data = open_data('openwebtext:0.7,text:0.3', block_size=1024)
    x, y = data.batch(first=step * 64, count=64)

Each part has exactly its share of every 1,000 samples, shuffled among them; the samples of a part
come in the same order as without the others, epoch after epoch. So a mixture's batches, like a
dataset's, depend only on their sample numbers.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flatgpt.data.dataset import SPLITS, Dataset, find_dataset, mix, permute
from flatgpt.errors import UserError

BLOCK = 1000  # the shares are exact in each block of so many samples


def open_data(
    name: str,
    block_size: int,
    seed: int = 1337,
    objective: str = 'lm',
    cache: str | None = None,
    keep_alive: Callable = lambda: None,
) -> 'Dataset | Mixture':
    """
    The dataset with this name, path or URL, or the mixture 'NAME:WEIGHT,NAME:WEIGHT'.

    cache: a local folder to copy the data to; for it and `keep_alive` see data/cache.py.
    """
    if not is_mixture(name):
        return Dataset(local_folder(name, cache, keep_alive), block_size, seed, objective)
    if objective == 'dpo':
        raise UserError(
            f"dataset={name!r}: objective='dpo' does not support mixtures; choose one dataset"
        )
    weights = parse_weights(name)
    folders = [local_folder(part, cache, keep_alive) for part in weights]
    parts = [Dataset(folder, block_size, seed, objective) for folder in folders]
    return Mixture(parts, list(weights.values()), seed)


def local_folder(name: str, cache: str | None, keep_alive: Callable) -> Path:
    """The folder that a dataset is read from."""
    if not cache and '://' not in name:
        return find_dataset(name)
    from flatgpt.data.cache import copy_to_cache, is_url  # requests is slow to import

    if is_url(name) and not cache:
        raise UserError(
            f'dataset={name!r}: a URL needs --data_cache=FOLDER, a local folder to copy it to'
        )
    source = name if is_url(name) else find_dataset(name)
    return copy_to_cache(source, cache, keep_alive) if cache else source


def is_mixture(setting: str) -> bool:
    return ',' in setting and not os.path.isdir(setting)


def dataset_names(setting: str) -> list[str]:
    return list(parse_weights(setting)) if is_mixture(setting) else [setting]


def parse_weights(setting: str) -> dict[str, float]:
    """'a:0.7,b:0.3' -> {'a': 0.7, 'b': 0.3}"""
    weights = {}
    for part in setting.split(','):
        name, _, weight = part.strip().rpartition(':')
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not name or not 0 < value < math.inf:
            raise UserError(
                f'dataset={setting!r}: {part.strip()!r} needs a name and a weight above 0, '
                "as in 'openwebtext:0.7,text:0.3'"
            )
        if name in weights:
            raise UserError(
                f'dataset={setting!r}: {name} is listed twice; list it once, with the total weight'
            )
        weights[name] = value
    return weights


def quotas_of(weights: list[float]) -> list[int]:
    """The number of samples of each part in a block, by the largest remainder method."""
    exact = np.array(weights) / sum(weights) * BLOCK
    quotas = exact.astype(int)
    most = np.argsort(quotas - exact, kind='stable')  # the largest remainder first
    quotas[most[: BLOCK - quotas.sum()]] += 1
    return quotas.tolist()


@functools.lru_cache(maxsize=8)
def block_order(block: int, quotas: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of each sample in a block, and its sample number in that part, (BLOCK,) each."""
    key = mix(np.full(BLOCK, seed % 2**64, np.uint64), np.full(BLOCK, block, np.uint64))
    parts = np.repeat(np.arange(len(quotas)), quotas)  # sorted by part
    source = parts[permute(np.arange(BLOCK), BLOCK, key)]
    number = np.empty(BLOCK, np.int64)
    begins = np.cumsum(quotas) - quotas
    # number the samples of each part in their order in the block
    number[np.argsort(source, kind='stable')] = np.arange(BLOCK) - begins[parts]
    return source, number + block * np.array(quotas)[source]


class Mixture:
    """
    A weighted mixture of datasets with the same tokenizer and objective; used like a Dataset.

    parts: [(share of the samples, dataset)]. An epoch, n_windows samples, ends when every part has
    completed an epoch; others may have completed several by then.
    """

    def __init__(self, parts: list[Dataset], weights: list[float], seed: int = 1337):
        self.seed, self.quotas = seed, tuple(quotas_of(weights))
        self.parts = [(q / BLOCK, part) for q, part in zip(self.quotas, parts, strict=True)]
        self._check()
        first = parts[0]
        self.block_size, self.rows = first.block_size, first.rows
        self.vocab_size, self.tokenizer = first.vocab_size, first.tokenizer
        self.tokens = {split: sum(part.tokens[split] for part in parts) for split in SPLITS}
        self.name = ', '.join(f'{share:.1%} {part.name}' for share, part in self.parts)

    def _check(self) -> None:
        first, names = self.parts[0][1], [part.name for _, part in self.parts]
        for share, part in self.parts:
            if not share:
                raise UserError(
                    f'{part.folder}: its weight is below 1/{BLOCK} of the total; raise it, or '
                    'remove the dataset'
                )
            if names.count(part.name) > 1:
                raise UserError(
                    f'{part.folder}: another dataset of the mixture is also called {part.name}; '
                    'rename one of the folders'
                )
            if part.tokenizer != first.tokenizer or part.vocab_size != first.vocab_size:
                raise UserError(
                    f'{part.folder} uses the tokenizer {part.tokenizer.name} and {first.folder} '
                    f'{first.tokenizer.name}, with other tokens; prepare both with the same '
                    'tokenizer'
                )
            if part.tokenizer.chat_template != first.tokenizer.chat_template:
                raise UserError(
                    f'{part.folder} and {first.folder} have different chat templates; prepare '
                    'both with the same one'
                )
            if part.block_size != first.block_size:  # the length of their rows
                raise UserError(
                    f'{part.folder} has rows of {part.block_size} tokens and {first.folder} of '
                    f'{first.block_size}; prepare both with the same --block_size'
                )

    @functools.cached_property
    def fingerprint(self) -> str:
        made_of = [
            [q, part.fingerprint] for q, (_, part) in zip(self.quotas, self.parts, strict=True)
        ]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    @functools.cached_property
    def window_tokens(self) -> float:
        return sum(share * part.window_tokens for share, part in self.parts)

    @functools.cached_property
    def n_windows(self) -> int:
        return max(self._samples_until(k, part.n_windows) for k, (_, part) in enumerate(self.parts))

    def _samples_until(self, k: int, windows: int) -> int:
        """The number of samples of the mixture that contain so many of part k."""
        blocks, rest = divmod(windows - 1, self.quotas[k])
        source, _ = block_order(blocks, self.quotas, self.seed)
        return blocks * BLOCK + int(np.flatnonzero(source == k)[rest]) + 1

    def text_bytes(self, split: str) -> int | None:
        """Bytes for as many tokens as the split has, in the proportions of the mixture."""
        sizes = [part.text_bytes(split) for _, part in self.parts]
        if None in sizes:
            return None
        each = zip(self.parts, sizes, strict=True)
        return round(self.tokens[split] * sum(s * n / p.tokens[split] for (s, p), n in each))

    def batch(self, first: int, count: int, documents: bool = False) -> tuple[np.ndarray, ...]:
        """Like Dataset.batch(), for count >= 1."""
        batch = None
        for part, rows, number in self._samples_by_part(first, count):
            arrays = part.batch(number, len(rows), documents)
            if batch is None:
                batch = tuple(np.empty((count, self.block_size), np.int64) for _ in arrays)
            for whole, some in zip(batch, arrays, strict=True):
                whole[rows] = some
        return batch

    def count_targets(self, first: int, count: int) -> int:
        shared = self._samples_by_part(first, count)
        return sum(part.count_targets(number, len(rows)) for part, rows, number in shared)

    def _samples_by_part(self, first: int, count: int):
        """Each part in these samples, its rows, and the number of its first sample there."""
        blocks = range(first // BLOCK, (first + count - 1) // BLOCK + 1)
        orders = [block_order(block, self.quotas, self.seed) for block in blocks]
        window = slice(first % BLOCK, first % BLOCK + count)
        source, number = (np.concatenate(each)[window] for each in zip(*orders, strict=True))
        for k, (_, part) in enumerate(self.parts):
            rows = np.flatnonzero(source == k)
            if len(rows):  # their numbers are consecutive
                yield part, rows, int(number[rows[0]])
