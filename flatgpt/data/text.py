"""
Prepare your own text: files, folders, patterns and JSON lines, with any tokenizer, on all cores.

$ python data/text/prepare.py novel.txt more/ 'corpus/*.txt' --name=mine --tokenizer=gpt2
$ python data/text/prepare.py posts.jsonl --field=body --name=posts --tokenizer=bpe
$ python train.py config/train_text.py --dataset=mine

A file is one document; in a .jsonl or .ndjson file each line is one, and a blank line none. Of a
folder every file is taken, in folders below it too, except hidden, empty and binary ones (with a
zero byte near the start). The text is UTF-8 and stays as it is, line ends included. Between two
documents comes the end of text.
"""

import argparse
import codecs
import glob
import itertools
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flatgpt.data.dataset import DATA, Writer, recipe_of
from flatgpt.data.encode import BORDER, Chunk, cut, write_chunks
from flatgpt.data.tokenizer import Tokenizer, char_tokenizer, get_tokenizer, train_bpe
from flatgpt.errors import UserError

COMMAND = 'python data/text/prepare.py'
BLOCK = 2**20  # bytes read at a time
BPE_SAMPLE = 100_000_000  # bytes of text that an own BPE is learned from, at most
JSON_LINES = ('.jsonl', '.ndjson')


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    folder = output_folder(args)
    val_files = find_files(args.val)
    own = {identity(path) for path in val_files}
    files = [path for path in find_files(args.files) if not lies_in(path, folder)]
    files = [path for path in files if identity(path) not in own] if own else files
    if not files:
        raise UserError('nothing is left to train on: all the files are given with --val')
    try:
        prepare(args, folder, files, val_files)
    except OSError as error:
        raise UserError(f'{error.filename or folder}: {error.strerror or error}') from error


def prepare(
    args: argparse.Namespace,
    folder: Path,
    files: list[Path],
    val_files: list[Path],
    recipe: str = 'train_text',
) -> None:
    tokenizer = make_tokenizer(args, files, val_files)
    start = time.perf_counter()
    with Writer(folder, tokenizer) as writer:
        total = bytes_of(files + val_files)
        write_chunks(writer, split_chunks(args, files, val_files), args.workers, total)
    print(writer.summary())
    speed = sum(map(writer.tokens, ('train', 'val'))) / (time.perf_counter() - start)
    dataset = folder.name if folder.parent == DATA else folder.resolve()
    print(f'{speed:,.0f} tokens per second')
    print(f'Train on it: python train.py config/{recipe}.py --dataset={dataset}')


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('files', nargs='*', help='files, folders and patterns such as "corpus/**/*.md"')
    add('--name', help='what to call the dataset; it goes to data/NAME')
    add('--out_dir', type=lambda text: Path(text) if text else None, help='write here instead')
    add(
        '--val',
        action='append',
        default=[],
        help='take these files for validation; may be repeated',
    )
    add('--field', default='text', help='key of the text in JSON lines, default %(default)s')
    add(
        '--errors',
        choices=('strict', 'replace'),
        default='strict',
        help='at bytes that are not UTF-8: stop (default), or put U+FFFD in their place',
    )
    add_options(parser)
    args = parser.parse_args(argv)
    if not args.files:
        raise UserError(f'say which text: {COMMAND} FILES --name=mine (see --help)')
    check_options(args)
    return args


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every preparation of text can be asked for."""
    add = parser.add_argument
    add('--tokenizer', default='gpt2', help='gpt2 (default), byte, char, bpe or a tiktoken name')
    add('--vocab_size', type=int, help='ids of an own bpe, learned from the text; default 8192')
    add('--val_fraction', type=float, default=0.1, help='part for validation, default %(default)s')
    add(
        '--split',
        choices=('auto', 'document', 'fraction'),
        default='auto',
        help='validate on whole documents, evenly spaced, or on the last part of each; '
        'auto: on whole ones if there are enough for val_fraction',
    )
    add('--workers', type=int, help='processes; default: one, or one for each core if that pays')


def check_options(args: argparse.Namespace) -> None:
    check_fraction(args)
    if args.vocab_size and args.tokenizer != 'bpe':
        raise UserError(f'--vocab_size is for --tokenizer=bpe; {args.tokenizer} has its own')
    if args.workers is not None and args.workers < 1:
        raise UserError(f'--workers={args.workers}: needs at least 1')


def check_fraction(args: argparse.Namespace) -> None:
    if not 0 < args.val_fraction <= 0.5:
        raise UserError(f'--val_fraction={args.val_fraction}: needs a number above 0, at most 0.5')


def output_folder(args: argparse.Namespace) -> Path:
    if not args.out_dir and not args.name:
        raise UserError(f'say what to call it: {COMMAND} {args.files[0]} ... --name=mine')
    if not args.out_dir and not re.fullmatch(r'\w[\w.-]*', args.name):
        raise UserError(f'--name={args.name}: needs letters, digits, _, - and . only')
    return own_folder(args)


def own_folder(args: argparse.Namespace) -> Path:
    """The folder of a dataset that is not one of flatGPT's."""
    folder = args.out_dir or DATA / args.name
    if recipe_of(folder):
        raise UserError(
            f'{folder.name} is a dataset that comes with flatGPT; choose another --name'
        )
    return folder


# --- which files


def find_files(patterns: list[str]) -> list[Path]:
    """The files that the arguments mean, each once, in the order of the arguments."""
    found = {}
    for pattern in patterns:
        path = Path(pattern)
        matches = [path] if path.exists() else map(Path, sorted(glob.glob(pattern, recursive=True)))
        taken = [p for match in matches for p in (files_in(match) if match.is_dir() else [match])]
        if not taken:
            what = 'has no text files' if path.is_dir() else 'no such file, and nothing matches it'
            raise UserError(f'{pattern}: {what}')
        for path in taken:
            if not path.is_file() or not path.stat().st_size:
                raise UserError(f'{path}: {"is empty" if path.is_file() else "is not a file"}')
        for path in taken:
            found.setdefault(identity(path), path)
    return list(found.values())


def identity(path: Path) -> tuple:
    """What is the same for every name of a file."""
    status = path.stat()
    return status.st_dev, status.st_ino


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a file is of the dataset that an earlier run wrote below its own source."""
    return os.path.abspath(path).startswith(os.path.abspath(folder) + os.sep)


def files_in(folder: Path) -> list[Path]:
    paths = [path for path in sorted(folder.rglob('*')) if path.is_file()]
    taken = [path for path in paths if is_text(path, folder)]
    print(f'{folder}: {len(taken)} files taken, {len(paths) - len(taken)} hidden, empty or binary')
    return taken


def is_text(path: Path, folder: Path) -> bool:
    if any(part.startswith('.') for part in path.relative_to(folder).parts):
        return False
    with path.open('rb') as file:
        head = file.read(8192)
    return bool(head) and b'\0' not in head


# --- reading


def read_chunks(files: list[Path], args: argparse.Namespace) -> Iterator[tuple]:
    """All text: (number of its document, bytes of that document, text, bytes read for it)."""
    number = 0
    for path in files:
        if path.suffix.lower() in JSON_LINES:
            for document, size in read_json_lines(path, args.field, args.errors):
                length = len(document.encode())
                for text in cut([document]):
                    yield number, length, text, size
                    size = 0
                number += 1
        else:
            length = path.stat().st_size
            for text in cut(read_text(path, args.errors)):
                yield number, length, text, len(text.encode())
            number += 1


def read_text(path: Path, errors: str = 'strict') -> Iterator[str]:
    """The text of a file, block by block, without its byte order mark."""
    decoder = codecs.getincrementaldecoder('utf-8')(errors)
    position = 0
    with path.open('rb') as file:  # text mode would change line ends
        while block := file.read(BLOCK):
            block, skipped = without_bom(block) if position == 0 else (block, 0)
            yield decode(decoder, block, path, position + skipped)
            position += skipped + len(block)
    yield decode(decoder, b'', path, position)


def without_bom(block: bytes) -> tuple[bytes, int]:
    stripped = block.removeprefix(codecs.BOM_UTF8)
    return stripped, len(block) - len(stripped)


def decode(decoder: codecs.IncrementalDecoder, block: bytes, path: Path, position: int) -> str:
    """The text of a block that begins at byte `position`; an empty one ends the file."""
    pending = len(decoder.getstate()[0])  # bytes of a character that began in the block before
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        raise undecodable(path, position - pending + error.start) from error


def undecodable(path: Path, position: int) -> UserError:
    with path.open('rb') as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return UserError(f'{path}: is UTF-16; save it as UTF-8')
    return UserError(
        f'{path}: not UTF-8 at byte {position}; --errors=replace puts U+FFFD in place of such bytes'
    )


def read_json_lines(path: Path, field: str, errors: str) -> Iterator[tuple[str, int]]:
    """The text of each line's `field` that has any, and the bytes of the line."""
    position = 0
    with path.open('rb') as file:
        for number, line in enumerate(file, 1):
            block, skipped = without_bom(line) if number == 1 else (line, 0)
            try:
                text = block.decode(errors=errors).strip()
            except UnicodeDecodeError as error:
                raise undecodable(path, position + skipped + error.start) from error
            position += len(line)
            document = json_field(text, field, errors, f'{path}, line {number}') if text else ''
            if document:
                yield document, len(line)


def json_field(line: str, field: str, errors: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f'{where}: not JSON: {error}') from error
    if not isinstance(record, dict) or field not in record:
        keys = ', '.join(record) if isinstance(record, dict) else f'no keys: {line[:40]}'
        raise UserError(f'{where}: no field {field!r}; it has {keys}; choose with --field=')
    if not isinstance(record[field], str):
        raise UserError(f'{where}: field {field!r} is {type(record[field]).__name__}, not text')
    try:
        return record[field].encode(errors=errors).decode()
    except UnicodeEncodeError as error:
        raise UserError(f'{where}: half a surrogate pair; --errors=replace puts ? there') from error


# --- dividing


def split_chunks(
    args: argparse.Namespace, files: list[Path], val_files: list[Path]
) -> Iterator[Chunk]:
    """All chunks with the split that each belongs to."""
    if val_files:
        for split, paths in (('train', files), ('val', val_files)):
            for number, _, text, size in read_chunks(paths, args):
                yield number, split, text, size
        return
    fraction = args.val_fraction
    enough = math.ceil(1 / fraction)
    by_document = args.split == 'document'
    if args.split == 'auto':
        by_document = count_documents(files, enough) >= enough
    chunks = read_chunks(files, args)
    yield from by_whole_document(chunks, fraction) if by_document else by_part(chunks, fraction)


def count_documents(files: list[Path], limit: int) -> int:
    """How many documents there are, or `limit` if it is at least that many."""
    count = 0
    for path in files:
        if path.suffix.lower() in JSON_LINES:
            with path.open('rb') as file:
                documents = (line for line in file if line.strip())
                count += sum(1 for _ in itertools.islice(documents, limit))
        else:
            count += 1
        if count >= limit:
            return limit
    return count


def by_whole_document(chunks: Iterable[tuple], fraction: float) -> Iterator[Chunk]:
    """The first document for validation, and from there on evenly spaced ones."""
    for number, _, text, size in chunks:
        takes_one_more = math.ceil((number + 1) * fraction) > math.ceil(number * fraction)
        yield number, 'val' if takes_one_more else 'train', text, size


def by_part(chunks: Iterable[tuple], fraction: float) -> Iterator[Chunk]:
    """The last part of each document for validation, from a border between words on."""
    current, position = None, 0
    for number, length, text, size in chunks:
        if number != current:
            current, position = number, 0
        raw = text.encode()
        room = max(0, int(length * (1 - fraction)) - position)  # bytes still to train on
        position += len(raw)
        if position <= int(length * (1 - fraction)):
            yield number, 'train', text, size
            continue
        at = border_near(text, len(raw[:room].decode(errors='ignore'))) if room else 0
        if at:
            yield number, 'train', text[:at], size
        yield number, 'val', text[at:], 0 if at else size


def border_near(text: str, at: int) -> int:
    """The first place from `at` on where `text` can be cut, or else the last one before."""
    after = BORDER.search(text, max(0, at - 1))
    if after:
        return after.end()
    return max((border.end() for border in BORDER.finditer(text)), default=at)


# --- tokenizers made from the text


def make_tokenizer(args: argparse.Namespace, files: list[Path], val_files: list[Path]) -> Tokenizer:
    if args.tokenizer not in ('char', 'bpe'):
        return get_tokenizer(args.tokenizer)
    total = bytes_of(files)
    if args.tokenizer == 'bpe':
        every = math.ceil(total / BPE_SAMPLE)
        chunks = watched(read_chunks(files, args), total, 'reading for bpe')
        sample = (text for i, text in enumerate(chunks) if i % every == 0)
        return train_bpe(sample, args.vocab_size or 8192)
    seen = np.zeros(0x110000, bool)
    files = files + val_files
    for text in watched(read_chunks(files, args), bytes_of(files), 'characters'):
        seen[np.frombuffer(text.encode('utf-32-le'), '<u4')] = True
    several = count_documents(files, 2) > 1
    return char_tokenizer(map(chr, np.flatnonzero(seen)), eot=several)


def watched(chunks: Iterable[tuple], total: int, what: str) -> Iterator[str]:
    """The text of each chunk, with a progress bar."""
    with tqdm(total=total, unit='B', unit_scale=True, desc=what, disable=None) as bar:
        for _, _, text, size in chunks:
            yield text
            bar.update(size)


def bytes_of(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)
