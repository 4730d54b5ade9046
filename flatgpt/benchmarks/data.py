"""
bench.py's data benchmark: preparing a dataset from text, and reading batches from many files.

$ python bench.py --only=data                    # on the source of Python's library and packages
$ python bench.py --only=data --text=corpus/     # on your own text
"""

import contextlib
import json
import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flatgpt.benchmarks.implementations import Measurement
from flatgpt.benchmarks.report import Report, print_row
from flatgpt.data import text as prepare
from flatgpt.data.dataset import SPLITS, Dataset, Writer, read_meta
from flatgpt.data.encode import cores
from flatgpt.data.tokenizer import byte_tokenizer, get_tokenizer
from flatgpt.errors import UserError, counted, reason_of
from flatgpt.runtime import Runtime

TOKENIZERS = ('char', 'byte', 'bpe', 'gpt2')
ROUNDS = 3  # of preparing data, at most
SHARDS = (1, 100, 10_000)  # files to read batches from; quick: the first two
SHARD_TOKENS = 50_000_000  # in all of them
BATCHES, ROWS, BLOCK_SIZE = 20, 64, 1024  # of a measurement of reading


def bench_data(settings: dict, runtime: Runtime, report: Report) -> None:
    """Time preparing a dataset from a folder of files, and reading batches of datasets."""
    with tempfile.TemporaryDirectory() as folder:
        texts = copy_texts(settings, Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        print(f'{"data":<16} {size / 1e6:.1f} MB in {counted(len(texts), "file")}')
        for tokenizer in TOKENIZERS:
            try:
                bench_preparing(tokenizer, folder, texts, settings, report)
            except (UserError, ModuleNotFoundError) as error:
                print_row(f'data {tokenizer}', '', '', reason_of(error))
    for shards in SHARDS[:2] if settings['quick'] else SHARDS:
        with tempfile.TemporaryDirectory() as folder:
            measurements = read_batches(write_shards(Path(folder), shards), settings['rounds'])
        variant = counted(shards, 'file')
        note = 'batches of 64 x 1,024, in CPU time of one core'
        report.compare('data reading', {variant: measurements}, {variant: note}, {})


# -----------------------------------------------------------------------------
# text to tokens


def bench_preparing(
    tokenizer: str, folder: str, texts: list[str], settings: dict, report: Report
) -> None:
    """Time data/text/prepare.py; for GPT-2's tokenizer also baselines that only encode."""
    implementations = {'flatGPT': lambda: time_preparation(tokenizer, folder)}
    notes = {'flatGPT': 'read, split, encoded, written, hashed, synced'}
    if tokenizer == 'gpt2':
        gpt2 = get_tokenizer('gpt2')
        slow = gpt2.accelerate()
        notes['flatGPT'] += ', by ' + (f'tiktoken: {slow}' if slow else 'gigatoken')
        add_baselines(implementations, notes, gpt2, texts)
    measurements = {name: [] for name in notes}  # also of one that is not installed
    for _ in range(min(ROUNDS, settings['rounds'])):
        for name, run in implementations.items():
            measurements[name].append(Measurement(*run()))
    tolerances = {name: {'flatGPT': 0.0} for name in implementations if name != 'flatGPT'}
    report.compare(f'data {tokenizer}', measurements, notes, tolerances)


def copy_texts(settings: dict, folder: Path) -> list[str]:
    """Up to text_bytes of UTF-8 files, copied into a folder -> their texts."""
    texts, left = [], settings['text_bytes']
    for path in text_files(settings['text']):
        if left <= 0:
            break
        if text := read_text(path, left):
            (folder / f'{len(texts):06}.txt').write_bytes(text.encode())
            texts.append(text)
            left -= len(text.encode())
    if len(texts) < 2:
        raise UserError(
            f'text={settings["text"]}: needs two files of UTF-8 text within '
            f'text_bytes={settings["text_bytes"]}; add files, or raise --text_bytes'
        )
    return texts


def text_files(folder: str | None) -> list[Path]:
    """The files in a folder, by default the source of Python's library and packages."""
    if folder:
        return sorted(Path(folder).rglob('*'))
    paths = sysconfig.get_paths()
    return [p for name in ('stdlib', 'purelib') for p in sorted(Path(paths[name]).rglob('*.py'))]


def read_text(path: Path, limit: int) -> str:
    """At most `limit` bytes of a file's text; '' for a file that is not text."""
    try:
        if not path.is_file():
            return ''
        with path.open('rb') as file:
            content = file.read(limit)
        cut = len(content) == limit  # perhaps inside a character
        text = content.decode('utf-8-sig', 'ignore' if cut else 'strict')
    except (UnicodeDecodeError, OSError):
        return ''
    return '' if '\0' in text else text


def time_preparation(name: str, folder: str) -> tuple[float, dict]:
    """Run data/text/prepare.py on the folder, without its output."""
    with tempfile.TemporaryDirectory() as out, open(os.devnull, 'w') as nowhere:
        begin = time.perf_counter()
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            prepare.main([folder, f'--out_dir={out}', f'--tokenizer={name}'])
        seconds = time.perf_counter() - begin
        data = Dataset(out, 1)
        parts = [np.fromfile(Path(out) / f'{split}.bin', data.tokenizer.dtype) for split in SPLITS]
    ids = np.concatenate(parts).astype(np.int64)
    ids = ids[ids != data.tokenizer.eot]  # between documents; the baselines add none
    return seconds, {'tokens': len(ids), 'result': [float(ids.sum())]}


def add_baselines(implementations: dict, notes: dict, tokenizer, texts: list[str]) -> None:
    """Add the batch encoders of tiktoken and transformers, on all cores and text in memory."""
    import tiktoken

    gpt2 = tiktoken.get_encoding('gpt2')
    implementations['tiktoken'] = lambda: timed(
        lambda: gpt2.encode_ordinary_batch(texts, num_threads=cores())
    )
    notes['tiktoken'] = notes['transformers'] = 'ids in memory'
    try:
        theirs = transformers_tokenizer(tokenizer)
    except ImportError:
        notes['transformers'] = 'transformers is not installed'
        return
    implementations['transformers'] = lambda: timed(
        lambda: theirs(texts, add_special_tokens=False)['input_ids']
    )


def transformers_tokenizer(tokenizer):
    """GPT-2's tokenizer in transformers, made from the same ranks."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / 'ranks.tiktoken')
        tokenizer.write_ranks(path)
        fast = TikTokenConverter(path, tokenizer.pattern).converted()
    return PreTrainedTokenizerFast(tokenizer_object=fast)


def timed(encode: Callable[[], list[list[int]]]) -> tuple[float, dict]:
    begin = time.perf_counter()
    documents = encode()
    seconds = time.perf_counter() - begin
    total = float(sum(map(sum, documents)))
    return seconds, {'tokens': sum(map(len, documents)), 'result': [total]}


# -----------------------------------------------------------------------------
# batches from many files


def write_shards(folder: Path, shards: int) -> Dataset:
    """A dataset of random ids in `shards` files, copied, which is faster than a Writer."""
    ids = np.random.default_rng(0).integers(0, 256, SHARD_TOKENS // shards)
    with Writer(folder, byte_tokenizer()) as writer:
        for split in SPLITS:
            writer.write(split, ids)
    meta = read_meta(folder)
    names = [f'train-{n:05d}.bin' for n in range(shards)]
    for name in names:
        shutil.copyfile(folder / 'train.bin', folder / name)
    listed = [{'file': name, 'tokens': len(ids)} for name in names]
    meta['splits']['train'] = {'tokens': len(ids) * shards, 'bytes': None, 'shards': listed}
    (folder / 'meta.json').write_text(json.dumps(meta))
    return Dataset(folder, BLOCK_SIZE)


def read_batches(data: Dataset, rounds: int) -> list[Measurement]:
    measurements = []
    for number in range(rounds + 1):
        begin = time.thread_time()
        for batch in range(BATCHES):
            data.batch((BATCHES * number + batch) * ROWS, ROWS)
        work = {'tokens': BATCHES * ROWS * BLOCK_SIZE}
        measurements.append(Measurement(time.thread_time() - begin, work))
    return measurements[1:]  # the first is a warm-up
