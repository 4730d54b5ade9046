"""Data, for bench.py: text to tokens on disk, and batches out of many files."""

import contextlib
import os
import shutil
import sysconfig
import tempfile
import time
from json import dumps
from pathlib import Path

import numpy as np

from flatgpt.benchmarks.report import (
    Report,
    line,
)
from flatgpt.data import text as prepare
from flatgpt.data.dataset import SPLITS, Dataset, Writer, read_meta
from flatgpt.data.encode import cores
from flatgpt.data.tokenizer import byte_tokenizer, get_tokenizer
from flatgpt.errors import UserError
from flatgpt.runtime import Runtime

TOKENS = 50_000_000  # to read batches from


def bench_data(c: dict, runtime: Runtime, report: Report) -> None:
    """From a folder of files to a finished dataset, beside what only turns text into ids."""
    with tempfile.TemporaryDirectory() as folder:
        texts = copy_texts(c, Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        print(f'{"data":<16} {size / 1e6:.1f} MB in {len(texts):,} files')
        for name in ('char', 'byte', 'bpe', 'gpt2'):
            sides = {'flatGPT': lambda name=name: prepared(name, folder)}
            notes = {'flatGPT': 'read, split, encoded, written, sealed'}
            try:
                if name == 'gpt2':
                    tokenizer = get_tokenizer('gpt2')
                    slow = tokenizer.accelerate()
                    notes['flatGPT'] += ', by ' + (f'tiktoken: {slow}' if slow else 'gigatoken')
                    add_peers(sides, notes, tokenizer, texts)
                turns = {side: [] for side in sides}
                for _ in range(min(3, c['rounds'])):
                    for side, run in sides.items():
                        turns[side].append((*run(), 0))
            except UserError as error:
                line(f'data {name}', '', '', str(error))
                continue
            against = {side: {'flatGPT': 0.0} for side in sides if side != 'flatGPT'}
            turns |= {side: [] for side in notes if side not in turns}  # what is not installed
            report.compare(f'data {name}', turns, notes, against)
    for shards in (1, 100) if c['quick'] else (1, 100, 10_000):
        with tempfile.TemporaryDirectory() as folder:
            turns = read_batches(cut_into(Path(folder), shards), c['rounds'])
        side, note = f'{shards:,} files', 'batches of 64 x 1,024, in time of one core'
        report.compare('data reading', {side: turns}, {side: note}, {})


def cut_into(folder: Path, shards: int) -> Dataset:
    """Random ids in so many files, without an fsync for each."""
    ids = np.random.default_rng(0).integers(0, 256, TOKENS // shards)
    with Writer(folder, byte_tokenizer()) as writer:
        for split in SPLITS:
            writer.write(split, ids)
    meta = read_meta(folder)
    names = [f'train-{n:05d}.bin' for n in range(shards)]
    for name in names:
        shutil.copyfile(folder / 'train.bin', folder / name)
    listed = [{'file': name, 'tokens': len(ids)} for name in names]
    meta['splits']['train'] = {'tokens': len(ids) * shards, 'bytes': None, 'shards': listed}
    (folder / 'meta.json').write_text(dumps(meta))
    return Dataset(folder, 1024)


def read_batches(data: Dataset, rounds: int) -> list[tuple[float, dict, int]]:
    turns = []
    for number in range(rounds + 1):
        begin = time.thread_time()
        for step in range(20):
            data.batch((20 * number + step) * 64, 64)
        turns.append((time.thread_time() - begin, {'tokens': 20 * 64 * 1024}, 0))
    return turns[1:]


def copy_texts(c: dict, folder: Path) -> list[str]:
    """Up to text_bytes of UTF-8 files, copied into a folder -> their texts."""
    paths = sysconfig.get_paths()
    roots = [Path(c['text'])] if c['text'] else [Path(paths['stdlib']), Path(paths['purelib'])]
    texts, left = [], c['text_bytes']
    for root in roots:
        pattern = '*' if c['text'] else '*.py'
        for path in sorted(root.rglob(pattern)):
            try:
                content = b''
                if left > 0 and path.is_file():
                    with path.open('rb') as file:
                        content = file.read(left)
                cut = len(content) == left  # perhaps within a character
                text = content.decode('utf-8-sig', 'ignore' if cut else 'strict')
            except (UnicodeDecodeError, OSError):
                continue
            if text and '\0' not in text:
                (folder / f'{len(texts):06}.txt').write_bytes(text.encode())
                texts.append(text)
                left -= len(text.encode())
    if len(texts) < 2:
        raise UserError(f'text={c["text"]}: needs two files of UTF-8 text at least')
    return texts


def prepared(name: str, folder: str) -> tuple[float, dict]:
    """data/text/prepare.py on the folder, with its output held back."""
    with tempfile.TemporaryDirectory() as out, open(os.devnull, 'w') as nowhere:
        begin = time.perf_counter()
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            prepare.main([folder, f'--out_dir={out}', f'--tokenizer={name}'])
        seconds = time.perf_counter() - begin
        data = Dataset(out, 1)
        parts = [np.fromfile(Path(out) / f'{split}.bin', data.tokenizer.dtype) for split in SPLITS]
    ids = np.concatenate(parts).astype(np.int64)
    ids = ids[ids != data.tokenizer.eot]  # between documents, which the others know nothing of
    return seconds, {'tokens': len(ids), 'result': [float(ids.sum())]}


def add_peers(sides: dict, notes: dict, tokenizer, texts: list[str]) -> None:
    """Add tiktoken's and transformers' own batch calls, with all cores, on text in memory."""
    import tiktoken

    encoding = tiktoken.get_encoding('gpt2')

    def timed(encode) -> tuple[float, dict]:
        begin = time.perf_counter()
        batches = encode()
        seconds = time.perf_counter() - begin
        total = float(sum(map(sum, batches)))
        return seconds, {'tokens': sum(map(len, batches)), 'result': [total]}

    sides['tiktoken'] = lambda: timed(
        lambda: encoding.encode_ordinary_batch(texts, num_threads=cores())
    )
    notes['tiktoken'] = 'ids in memory'
    try:
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError:
        notes['transformers'] = 'transformers is not installed'
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / 'ranks.tiktoken')
        tokenizer.write_ranks(path)
        fast = TikTokenConverter(path, tokenizer.pattern).converted()
    theirs = PreTrainedTokenizerFast(tokenizer_object=fast)
    sides['transformers'] = lambda: timed(
        lambda: theirs(texts, add_special_tokens=False)['input_ids']
    )
    notes['transformers'] = 'ids in memory'
