"""
Training data from the dataset setting: one dataset, or a weighted mixture.

    data = open_data('shakespeare:0.7,poems:0.3', block_size=1024)
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

from flatgpt.data.dataset import (
    SPLITS,
    Dataset,
    MixturePart,
    find_or_prepare_dataset,
    hash_uint64,
    permute,
)
from flatgpt.errors import UserError

SHARE_BLOCK = 1000  # samples; every block of so many has exactly the shares


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
    if objective in ('dpo', 'rl'):
        raise UserError(
            f'dataset={name!r}: objective={objective!r} does not support mixtures; choose one '
            'dataset'
        )
    weights = parse_weights(name)
    folders = [local_folder(part, cache, keep_alive) for part in weights]
    parts = [Dataset(folder, block_size, seed, objective) for folder in folders]
    return Mixture(parts, list(weights.values()), seed)


def local_folder(name: str, cache: str | None, keep_alive: Callable) -> Path:
    """The folder that a dataset is read from."""
    if not cache and '://' not in name:
        return find_or_prepare_dataset(name)
    from flatgpt.data.cache import copy_to_cache, is_url  # requests is slow to import

    if is_url(name) and not cache:
        raise UserError(
            f'dataset={name!r}: a URL needs --data_cache=FOLDER, a local folder to copy it to'
        )
    source = name if is_url(name) else find_or_prepare_dataset(name)
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
                "as in 'shakespeare:0.7,poems:0.3'"
            )
        if name in weights:
            raise UserError(
                f'dataset={setting!r}: {name} is listed twice; list it once, with the total weight'
            )
        weights[name] = value
    return weights


def quotas_of(weights: list[float]) -> list[int]:
    """The number of samples of each part in a block, by the largest remainder method."""
    exact = np.array(weights) / sum(weights) * SHARE_BLOCK
    quotas = exact.astype(int)
    most = np.argsort(quotas - exact, kind='stable')  # the largest remainder first
    quotas[most[: SHARE_BLOCK - quotas.sum()]] += 1
    return quotas.tolist()


@functools.lru_cache(maxsize=8)
def block_order(block: int, quotas: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of each sample in a block, and its number there, (SHARE_BLOCK,) each."""
    seeds, blocks = (np.full(SHARE_BLOCK, n, np.uint64) for n in (seed % 2**64, block))
    key = hash_uint64(seeds, blocks)
    parts = np.repeat(np.arange(len(quotas)), quotas)  # sorted by part
    source = parts[permute(np.arange(SHARE_BLOCK), SHARE_BLOCK, key)]
    number = np.empty(SHARE_BLOCK, np.int64)
    begins = np.cumsum(quotas) - quotas
    # number the samples of each part in their order in the block
    number[np.argsort(source, kind='stable')] = np.arange(SHARE_BLOCK) - begins[parts]
    return source, number + block * np.array(quotas)[source]


class Mixture:
    """
    A weighted mixture of datasets with the same tokenizer and objective; used like a Dataset.

    quotas: the number of samples of each part in a block of SHARE_BLOCK. An epoch, n_windows
    samples, ends when every part has completed an epoch; others may have completed several by then.
    """

    def __init__(self, datasets: list[Dataset], weights: list[float], seed: int = 1337):
        self.seed = seed
        self.quotas = tuple(quotas_of(weights))
        self.parts = [
            MixturePart(quota / SHARE_BLOCK, data)
            for quota, data in zip(self.quotas, datasets, strict=True)
        ]
        self._check()
        first = datasets[0]
        self.block_size = first.block_size
        self.is_chat, self.has_pairs = first.is_chat, first.has_pairs
        self.vocab_size, self.tokenizer = first.vocab_size, first.tokenizer
        self.tokens = {split: sum(data.tokens[split] for data in datasets) for split in SPLITS}
        self.name = ', '.join(f'{share:.1%} {data.name}' for share, data in self.parts)

    def _check(self) -> None:
        first = self.parts[0].data
        names = [data.name for _, data in self.parts]
        for share, data in self.parts:
            if not share:
                raise UserError(
                    f'{data.folder}: its weight is below 1/{SHARE_BLOCK} of the total; raise it, '
                    'or omit the dataset'
                )
            if names.count(data.name) > 1:
                raise UserError(
                    f'{data.folder}: another dataset of the mixture is also called {data.name}; '
                    'rename one of the folders'
                )
            if data.tokenizer != first.tokenizer or data.vocab_size != first.vocab_size:
                raise UserError(
                    f'{data.folder} uses the tokenizer {data.tokenizer.name} and {first.folder} '
                    f'{first.tokenizer.name}, with other tokens; prepare both with the same '
                    'tokenizer'
                )
            if data.tokenizer.chat_template != first.tokenizer.chat_template:
                raise UserError(
                    f'{data.folder} and {first.folder} have different chat templates; prepare '
                    'both with the same one'
                )
            if data.block_size != first.block_size:  # the length of their rows
                raise UserError(
                    f'{data.folder} has packed sequences of {data.block_size} tokens, '
                    f'{first.folder} of {first.block_size}; prepare both with the same --block_size'
                )

    @functools.cached_property
    def fingerprint(self) -> str:
        made_of = [
            [quota, part.data.fingerprint]
            for quota, part in zip(self.quotas, self.parts, strict=True)
        ]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    @functools.cached_property
    def window_tokens(self) -> float:
        return sum(share * data.window_tokens for share, data in self.parts)

    @functools.cached_property
    def n_windows(self) -> int:
        windows = [part.data.n_windows for part in self.parts]
        return max(self._samples_until(k, n) for k, n in enumerate(windows))

    def _samples_until(self, k: int, windows: int) -> int:
        """The number of samples of the mixture that contain so many of part k."""
        blocks, rest = divmod(windows - 1, self.quotas[k])
        source, _ = block_order(blocks, self.quotas, self.seed)
        return blocks * SHARE_BLOCK + int(np.flatnonzero(source == k)[rest]) + 1

    def text_bytes(self, split: str) -> int | None:
        """Bytes for as many tokens as the split has, in the proportions of the mixture."""
        sizes = [part.data.text_bytes(split) for part in self.parts]
        if None in sizes:
            return None
        bytes_per_token = sum(
            part.share * size / part.data.tokens[split]
            for part, size in zip(self.parts, sizes, strict=True)
        )
        return round(self.tokens[split] * bytes_per_token)

    def batch(self, first: int, count: int, documents: bool = False) -> tuple[np.ndarray, ...]:
        """Like Dataset.batch(), for count >= 1."""
        batch = None
        for data, rows, number in self._samples_by_part(first, count):
            arrays = data.batch(number, len(rows), documents)
            if batch is None:
                batch = tuple(np.empty((count, self.block_size), np.int64) for _ in arrays)
            for whole, of_part in zip(batch, arrays, strict=True):
                whole[rows] = of_part
        return batch

    def count_targets(self, first: int, count: int) -> int:
        parts = self._samples_by_part(first, count)
        return sum(data.count_targets(number, len(rows)) for data, rows, number in parts)

    def _samples_by_part(self, first: int, count: int):
        """Each part in these samples, its rows of the batch, and its first sample number there."""
        blocks = range(first // SHARE_BLOCK, (first + count - 1) // SHARE_BLOCK + 1)
        orders = [block_order(block, self.quotas, self.seed) for block in blocks]
        window = slice(first % SHARE_BLOCK, first % SHARE_BLOCK + count)
        source, number = (np.concatenate(each)[window] for each in zip(*orders, strict=True))
        for k, part in enumerate(self.parts):
            rows = np.flatnonzero(source == k)
            if len(rows):  # their numbers are consecutive
                yield part.data, rows, int(number[rows[0]])
