"""
Prepare your own text: files, folders, patterns and JSON lines, with any tokenizer, on all cores.

$ python data/text/prepare.py novel.txt more/ 'corpus/*.txt' --name=mine --tokenizer=gpt2
$ python data/text/prepare.py posts.jsonl --field=body --name=posts --tokenizer=bpe
$ python train.py config/train_text.py --dataset=mine

A file is one document; in a .jsonl or .ndjson file each line is one, and a blank line none, in a
.json file each record of its list, in a .csv or .tsv file each row: --field says where its text is,
--plain takes such files as they are. Of a folder every file is taken, in folders below it too,
linked ones as well, except hidden, empty and binary ones, which are counted. The text is UTF-8 or
has a byte order mark (--encoding for others), and stays as it is, line ends included. Between two
documents comes the end of text; where the text spells it, --read_eot takes that for it as well.

To go on with a model of your own, give its run, so that the text gets the same tokens:

$ python data/text/prepare.py more.txt --name=more --tokenizer=out/mine
"""

import argparse
import codecs
import itertools
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path

import numpy as np
import regex
from tqdm import tqdm

from flatgpt.data.dataset import DATA, Writer, prepare_script
from flatgpt.data.encode import BOUNDARY, Chunk, split_text, write_chunks
from flatgpt.data.hf_tokenizer import find_tokenizer
from flatgpt.data.sources import Reader, bytes_of, find_files, identity
from flatgpt.data.tokenizer import EOT, Tokenizer, char_tokenizer, train_bpe
from flatgpt.errors import UserError

COMMAND = 'python data/text/prepare.py'
BPE_SAMPLE = 100_000_000  # bytes of text that an own BPE is learned from, at most
# Learning takes time with the square of a word's length: of longer ones pieces are learned from.
LONGEST_WORD = 256
LONG_WORD = regex.compile(
    '|'.join(
        rf'{kind}{{{LONGEST_WORD + 1},}}+'
        for kind in (r'[\p{L}\p{M}]', r'[^\s\p{L}\p{M}\p{N}]', r'\s')
    )
)
PIECES = 2**14  # of all long words together
# of text that flatGPT has made itself: the options that only data/text/prepare.py has
OWN_FILES = dict(field=None, errors='strict', encoding=None, plain=True, read_eot=False)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    folder = output_folder(args)
    try:
        val_files = find_files(args.val, args.encoding)
        own = {identity(path) for path in val_files}
        found = find_files(args.files, args.encoding, folder)
        if not found:
            raise UserError(
                f'nothing to train on: all the files lie in {folder}, where the dataset goes; name '
                'each that is meant, or choose another folder'
            )
        files = [path for path in found if identity(path) not in own]
        if not files:
            raise UserError('nothing is left to train on: all the files are given with --val')
        check_field(args, files + val_files)
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
    if args.read_eot and tokenizer.eot is None:
        raise UserError(f'--read_eot: the tokenizer {tokenizer.name} has no end of text')
    start, reader = time.perf_counter(), reader_of(args)
    with Writer(folder, tokenizer) as writer:
        total = bytes_of(files + val_files)
        fitted = Fitted(split_chunks(reader, args, files, val_files), tokenizer, args.read_eot)
        write_chunks(writer, fitted, args.workers, total, args.read_eot)
    for line in [*reader.notes(), *fitted.notes()]:
        print(line)
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
    add('--field', help='key of the text in JSON lines, column of it in tables; default text')
    add('--plain', action='store_true', help='take JSON lines, JSON and tables as they are')
    add(
        '--errors',
        choices=('strict', 'replace'),
        default='strict',
        help='at bytes that are not UTF-8: stop (default), or put U+FFFD in their place',
    )
    add('--encoding', help='of files that are not UTF-8, such as cp1252, latin-1, utf-16-le')
    add(
        '--read_eot',
        action='store_true',
        help=f'take a written {EOT} for the end of text; without it, it is text as any other',
    )
    add_options(parser)
    args = parser.parse_args(argv)
    if not args.files:
        raise UserError(f'say which text: {COMMAND} FILES --name=mine (see --help)')
    check_options(args)
    if args.name and args.out_dir:
        raise UserError(
            f'--name={args.name} and --out_dir={args.out_dir} both say where to write; give one'
        )
    args.encoding = encoding_named(args.encoding) if args.encoding is not None else None
    return args


def encoding_named(name: str) -> str:
    """Python's own name of a text encoding."""
    with suppress(LookupError):
        with suppress(UnicodeError):
            b'text'.decode(name)  # refuses those that are not of text
        codecs.getincrementaldecoder(name)
        return codecs.lookup(name).name
    raise UserError(
        f'--encoding={name}: no such encoding; there are cp1252, latin-1, utf-16-le ...'
    )


def check_field(args: argparse.Namespace, files: list[Path]) -> None:
    """Refuse a --field that nothing has."""
    reader = reader_of(args)
    if args.field is not None and all(reader.layout(path) == 'text' for path in files):
        raise UserError(
            f'--field={args.field}: all the files are plain text, and have no fields; leave it out'
        )


def reader_of(args: argparse.Namespace) -> Reader:
    return Reader(args.field, args.errors, args.encoding, args.plain)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every preparation of text can be asked for."""
    add = parser.add_argument
    add(
        '--tokenizer',
        default='gpt2',
        help='gpt2 (default), byte, char, bpe or a tiktoken name; or that of a model: the folder '
        'of its run or of a checkpoint, or a tokenizer.json',
    )
    add('--vocab_size', type=int, help='ids of an own bpe, learned from the text; default 8192')
    add('--val_fraction', type=float, help='part for validation, default 0.1')
    add(
        '--split',
        choices=('auto', 'document', 'fraction'),
        help='validate on whole documents, evenly spaced, or on the last part of each; '
        'auto: on whole ones if there are enough for val_fraction',
    )
    add('--workers', type=int, help='processes; default: one, or one for each core if that pays')


def check_options(args: argparse.Namespace) -> None:
    for option, value in (('val_fraction', args.val_fraction), ('split', args.split)):
        if value is not None and getattr(args, 'val', None):
            raise UserError(
                f'--{option}={value} divides the files, and --val has said which validate; give '
                'one of the two'
            )
    args.val_fraction = 0.1 if args.val_fraction is None else args.val_fraction
    args.split = args.split or 'auto'
    check_fraction(args)
    if args.vocab_size is not None and args.tokenizer != 'bpe':
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
    if prepare_script(folder):
        raise UserError(
            f'{folder.name} is a dataset that comes with flatGPT; choose another --name'
        )
    return folder


# --- dividing


def split_chunks(
    reader: Reader, args: argparse.Namespace, files: list[Path], val_files: list[Path]
) -> Iterator[Chunk]:
    """All chunks with the split that each belongs to."""
    if val_files:
        for split, paths in (('train', files), ('val', val_files)):
            for number, _, text, size in read_chunks(paths, reader):
                yield number, split, text, size
        return
    fraction = args.val_fraction
    enough = math.ceil(1 / fraction)
    by_document = args.split == 'document'
    if args.split == 'auto':
        by_document = count_documents(files, reader_of(args), enough) >= enough
    chunks = read_chunks(files, reader)
    yield from by_whole_document(chunks, fraction) if by_document else by_part(chunks, fraction)


def read_chunks(files: list[Path], reader: Reader) -> Iterator[tuple]:
    """All text: (number of its document, bytes of that document, text, bytes read for it)."""
    documents = itertools.chain.from_iterable(map(reader.documents, files))
    for number, (blocks, length, size) in enumerate(documents):
        for text in split_text(blocks):
            yield number, length, text, len(text.encode()) if size is None else size
            size = size and 0


def count_documents(files: list[Path], reader: Reader, limit: int) -> int:
    """How many documents there are, or `limit` if it is at least that many."""
    documents = itertools.chain.from_iterable(map(reader.documents, files))
    return sum(1 for _ in itertools.islice(documents, limit))


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
    after = BOUNDARY.search(text, max(0, at - 1))
    if after:
        return after.end()
    return max((border.end() for border in BOUNDARY.finditer(text)), default=at)


# --- fitting the text to the tokenizer


class Fitted:
    """Chunks without the characters that the tokenizer lacks, which are counted."""

    def __init__(self, chunks: Iterable[Chunk], tokenizer: Tokenizer, read_eot: bool):
        self.chunks, self.tokenizer, self.read_eot = chunks, tokenizer, read_eot
        self.known = known_characters(tokenizer)
        self.missing = np.zeros(0x110000, np.int64)  # times that each was left out
        self.characters, self.documents, self.marks = 0, 0, 0

    def __iter__(self) -> Iterator[Chunk]:
        for number, split, text, size in self.chunks:
            self.documents = max(self.documents, number + 1)
            self.marks += text.count(EOT)
            parts = text.split(EOT) if self.read_eot else [text]
            yield number, split, EOT.join(map(self._fit, parts)), size
        lacking = int(self.missing.sum())
        if lacking > self.characters / 2:
            raise UserError(
                f'{lacking / self.characters:.0%} of the text are characters that the tokenizer '
                f'lacks, such as {self._examples()}: prepare it with another tokenizer, for a new '
                'model'
            )

    def _fit(self, text: str) -> str:
        if self.known is None:
            return text
        codes = np.frombuffer(text.encode('utf-32-le'), '<u4')
        self.characters += len(codes)
        lacks = ~self.known[codes]
        if not lacks.any():
            return text
        which, counts = np.unique(codes[lacks], return_counts=True)
        self.missing[which] += counts
        return codes[~lacks].tobytes().decode('utf-32-le')

    def _examples(self) -> str:
        most = np.argsort(-self.missing, kind='stable')[:10]
        return ', '.join(repr(chr(code)) for code in most if self.missing[code])

    def notes(self) -> list[str]:
        """What to tell of how the text was fitted."""
        lines = []
        if self.missing.any():
            lacking = int(self.missing.sum())
            lines.append(
                f'warning: {lacking:,} characters ({lacking / self.characters:.1%}) were left out, '
                f'since the tokenizer lacks them: {self._examples()}'
            )
        if self.marks and not self.read_eot:
            lines.append(
                f'{EOT} is written {self.marks:,} times in the text, and was taken for text as any '
                'other; --read_eot takes it for the end of text'
            )
        if self.documents > 1 and self.tokenizer.eot is None:
            lines.append('nothing marks where a document ends: the tokenizer has no end of text')
        return lines


def known_characters(tokenizer: Tokenizer) -> np.ndarray | None:
    """Whether a tokenizer of characters has each one; None for others, which have all."""
    if tokenizer.kind != 'char':
        return None
    known = np.zeros(0x110000, bool)
    special = set(tokenizer.special.values())
    letters = [token for i, token in enumerate(tokenizer.token_bytes) if i not in special]
    known[[ord(letter.decode()) for letter in letters]] = True
    return known


# --- tokenizers made from the text


def make_tokenizer(args: argparse.Namespace, files: list[Path], val_files: list[Path]) -> Tokenizer:
    if args.tokenizer == 'bpe':
        return learn_bpe(args, files)
    if args.tokenizer == 'char':
        return collect_characters(args, files + val_files)
    return find_tokenizer(args.tokenizer)


def collect_characters(args: argparse.Namespace, files: list[Path]) -> Tokenizer:
    seen, marks = np.zeros(0x110000, bool), 0
    chunks = read_chunks(files, reader_of(args))
    for text in watched(chunks, bytes_of(files), 'characters'):
        marks += args.read_eot and text.count(EOT)
        text = text.replace(EOT, '') if args.read_eot else text
        seen[np.frombuffer(text.encode('utf-32-le'), '<u4')] = True
    several = marks or count_documents(files, reader_of(args), 2) > 1
    return char_tokenizer(map(chr, np.flatnonzero(seen)), eot=bool(several))


def learn_bpe(args: argparse.Namespace, files: list[Path]) -> Tokenizer:
    total, stop = bytes_of(files), threading.Event()
    every = math.ceil(total / BPE_SAMPLE)
    chunks = watched(read_chunks(files, reader_of(args)), total, 'reading for bpe')
    sample = (text for i, text in enumerate(chunks) if i % every == 0)
    if args.read_eot:
        sample = (part for text in sample for part in text.split(EOT))
    words = ShortWords(itertools.takewhile(lambda _: not stop.is_set(), sample))
    tokenizer = interruptible(stop, train_bpe, words, args.vocab_size or 8192)
    if words.cut:
        print(
            f'bpe: {words.cut:,} runs of more than {LONGEST_WORD} letters, signs or blanks without '
            f'a border were learned from in {words.pieces:,} pieces'
            + (f', and {words.left_out:,} more pieces were not' if words.left_out else '')
        )
    return tokenizer


class ShortWords:
    """Texts to learn words from, divided within words too long for that; how many of those."""

    def __init__(self, texts: Iterable[str]):
        self.texts, self.cut, self.pieces, self.left_out = texts, 0, 0, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            end = 0
            for word in LONG_WORD.finditer(text):
                yield text[end : word.start()]
                yield from self._pieces(word[0])
                end = word.end()
            if end < len(text):
                yield text[end:]

    def _pieces(self, word: str) -> Iterator[str]:
        self.cut += 1
        for start in range(0, len(word), LONGEST_WORD):
            if self.pieces < PIECES:
                self.pieces += 1
                yield word[start : start + LONGEST_WORD]
            else:
                self.left_out += 1


def interruptible(stop: threading.Event, function: Callable, *args):
    """function(*args), which a library computes without looking for Ctrl-C: that ends it here.

    stop: set then, for what `function` reads to end.
    """
    done = Future()

    def work() -> None:
        try:
            done.set_result(function(*args))
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while not wait([done], 0.2).done:
            pass
    except KeyboardInterrupt:
        stop.set()
        thread.join(0.5)  # a thread that Python is asked for at the end of the program aborts it
        raise
    return done.result()


def watched(chunks: Iterable[tuple], total: int, what: str) -> Iterator[str]:
    """The text of each chunk, with a progress bar."""
    with tqdm(total=total, unit='B', unit_scale=True, desc=what, disable=None) as bar:
        for _, _, text, size in chunks:
            yield text
            bar.update(size)
