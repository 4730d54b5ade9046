"""
Prepare your own text: files, folders and glob patterns, with any tokenizer, on all cores.

$ python data/text/prepare.py novel.txt more/ 'corpus/*.txt' --name=mine --tokenizer=gpt2
$ python data/text/prepare.py posts.jsonl --field=body --name=posts --tokenizer=bpe
$ python train.py config/auto.py --dataset=mine

A plain-text file is one document. So is each line of a JSON Lines file (.jsonl or .ndjson; blank
lines are skipped), each item of a .json array and each row of a .csv or .tsv file; --field names
the key or column that has the text, and --plain reads such files as plain text. A folder stands for
all files in it and below, including linked ones. Hidden, empty and binary files are skipped and
counted. Files must be UTF-8 or have a byte order mark, unless --encoding is given. The text, line
endings included, is not altered. The end-of-text token separates documents; with --read_eot, it is
also read where it is written in the text.

To continue training a model of yours, give its run directory, so that the text gets the same
tokens:

$ python data/text/prepare.py more.txt --name=more --tokenizer=out/mine
"""

import argparse
import codecs
import itertools
import math
import re
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flatgpt.data.bpe import learn_bpe
from flatgpt.data.dataset import DATA, Writer, prepare_script
from flatgpt.data.encode import BOUNDARY, Chunk, split_text, write_chunks
from flatgpt.data.hf_tokenizer import context_of, find_tokenizer
from flatgpt.data.sources import Reader, exclude_files, find_files, total_bytes
from flatgpt.data.tokenizer import EOT, Tokenizer, char_tokenizer
from flatgpt.errors import ArgumentParser, UserError, counted

COMMAND = 'python data/text/prepare.py'
BPE_SAMPLE = 100_000_000  # maximum bytes of text to learn a BPE from
# the flags that only data/text/prepare.py has, for plain text that flatGPT itself wrote
PLAIN_TEXT_DEFAULTS = dict(field=None, errors='strict', encoding=None, plain=True, read_eot=False)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    folder = output_folder(args)
    try:
        val_files = find_files(args.val, args.encoding, flag='--val=')
        found = find_files(args.files, args.encoding, folder)
        if not found:
            raise UserError(
                f'{folder}: the text files are in the output folder; give each file by its name, '
                f'or choose another {output_flag(args)}'
            )
        files = exclude_files(found, val_files)
        if not files:
            raise UserError('--val includes all files; add files to train on')
        check_field(args, files + val_files)
        prepare(args, folder, files, val_files)
    except OSError as error:
        raise UserError(f'{error.filename or folder}: {error.strerror or error}') from error


def prepare(
    args: argparse.Namespace,
    folder: Path,
    files: list[Path],
    val_files: list[Path],
    recipe: str = 'auto',
) -> None:
    tokenizer = make_tokenizer(args, files, val_files)
    if args.read_eot and tokenizer.eot is None:
        raise UserError(
            f'--read_eot: the tokenizer {tokenizer.name} has no end-of-text token; omit '
            '--read_eot, or use --tokenizer=byte, for example'
        )
    reader = make_reader(args)
    start = time.perf_counter()
    with Writer(folder, tokenizer) as writer:
        total = total_bytes(files + val_files)
        chunks = split_chunks(reader, args, files, val_files)
        kept = DropUnknownCharacters(chunks, tokenizer, args.read_eot)
        write_chunks(writer, kept, args.workers, total, args.read_eot)
    for line in [*reader.notes(), *kept.notes()]:
        print(line)
    print(writer.summary())
    speed = sum(map(writer.tokens, ('train', 'val'))) / (time.perf_counter() - start)
    print(f'{speed:,.0f} tokens per second')
    command = train_command(folder, f'config/{recipe}.py')
    if context_of(args.tokenizer):  # the learning rate of the config is for a new model
        command += f' --init_from={shlex.quote(args.tokenizer)} --learning_rate=3e-4'
    print(f'Train on it: {command}')


def train_command(folder: Path, config: str) -> str:
    """The command that trains on the dataset in a folder."""
    dataset = folder.name if folder.parent == DATA else str(folder.resolve())
    return f'python train.py {config} --dataset={shlex.quote(dataset)}'


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog=COMMAND, description=__doc__)
    add = parser.add_argument
    add('files', nargs='*', help='files, folders and glob patterns, such as "corpus/**/*.md"')
    add_output_options(parser)
    add(
        '--val',
        action='append',
        default=[],
        help='a file, folder or glob pattern to use for validation; may be repeated',
    )
    add(
        '--field',
        help='key or column that has the text in JSON, JSON Lines, CSV and TSV; default text',
    )
    add('--plain', action='store_true', help='read JSON, JSON Lines, CSV and TSV as plain text')
    add_decoding_options(parser)
    add(
        '--read_eot',
        action='store_true',
        help=f'read a written {EOT} as the end-of-text token; by default it is plain text',
    )
    add_options(parser)
    args = parser.parse_intermixed_args(argv)  # files may also follow flags
    if not args.files:
        raise UserError(f'no files; run {COMMAND} FILES --name=mine (see --help)')
    check_options(args)
    return args


def normalize_encoding(name: str) -> str:
    """Python's name for a text encoding."""
    with suppress(LookupError):
        with suppress(UnicodeError):
            b'text'.decode(name)  # LookupError for codecs that do not decode to text, such as rot13
        codecs.getincrementaldecoder(name)
        return codecs.lookup(name).name
    raise UserError(
        f'--encoding={name}: unknown; use an encoding that Python has, such as cp1252, latin-1 or '
        'utf-16-le'
    )


def check_field(args: argparse.Namespace, files: list[Path]) -> None:
    """UserError for a --field when all files are plain text."""
    reader = make_reader(args)
    if args.field is not None and all(reader.layout(path) == 'text' for path in files):
        raise UserError(
            f'--field={args.field}: all files are plain text, without fields; omit --field'
        )


def make_reader(args: argparse.Namespace) -> Reader:
    return Reader(args.field, args.errors, args.encoding, args.plain)


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags for bytes that are not UTF-8."""
    add = parser.add_argument
    add(
        '--errors',
        choices=('strict', 'replace'),
        default='strict',
        help='invalid bytes: strict stops with an error (default), replace inserts U+FFFD',
    )
    add('--encoding', help='encoding of files that are not UTF-8: cp1252, latin-1, utf-16-le ...')


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all commands which prepare text share."""
    add = parser.add_argument
    add(
        '--tokenizer',
        default='gpt2',
        help='gpt2 (default), byte, char, bpe, a tiktoken name, or the path of a run, a checkpoint '
        'or a tokenizer.json',
    )
    add('--vocab_size', type=int, help='vocabulary size for --tokenizer=bpe; default 8192')
    add('--val_fraction', type=float, help='fraction of the text used for validation; default 0.1')
    add(
        '--split',
        choices=('auto', 'document', 'fraction'),
        help='for validation, use evenly spaced whole documents (document) or the last fraction of '
        'each (fraction); auto (default): document, if there are enough for val_fraction',
    )
    add('--workers', type=int, help='processes; default: one, or one per core where that is faster')


def check_options(args: argparse.Namespace) -> None:
    for option, value in (('val_fraction', args.val_fraction), ('split', args.split)):
        if value is not None and getattr(args, 'val', None):
            raise UserError(
                f'--{option}={value}: --val has already chosen the validation files; omit '
                f'--{option} or --val'
            )
    args.val_fraction = 0.1 if args.val_fraction is None else args.val_fraction
    args.split = args.split or 'auto'
    check_val_fraction(args)
    if args.encoding is not None:
        args.encoding = normalize_encoding(args.encoding)
    if args.vocab_size is not None and args.tokenizer != 'bpe':
        raise UserError(
            f'--vocab_size={args.vocab_size}: needs --tokenizer=bpe, not {args.tokenizer}; omit '
            '--vocab_size, or use --tokenizer=bpe'
        )
    if args.vocab_size is None:
        args.vocab_size = 8192
    if args.workers is not None and args.workers < 1:
        raise UserError(f'--workers={args.workers}: give 1 or more processes')


def check_val_fraction(args: argparse.Namespace) -> None:
    if not 0 < args.val_fraction <= 0.5:
        raise UserError(f'--val_fraction={args.val_fraction}: give a number above 0 and up to 0.5')


def add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--name', help='name of the dataset; it is written to data/NAME')
    parser.add_argument(
        '--out_dir',
        type=lambda text: Path(text) if text else None,
        help='write the dataset to this folder instead',
    )


def output_folder(args: argparse.Namespace) -> Path:
    """The folder that --name or --out_dir chooses."""
    if args.name and args.out_dir:
        raise UserError(
            f'--name={args.name} and --out_dir={args.out_dir} both set the output folder; give one'
        )
    if not args.out_dir and not args.name:
        raise UserError('no name for the dataset; add one, for example --name=mine')
    if not args.out_dir and not re.fullmatch(r'\w[\w.-]*', args.name):
        raise UserError(
            f'--name={args.name}: use letters, digits, _, - and . only, the first not - or .'
        )
    folder = args.out_dir or DATA / args.name
    if prepare_script(folder):
        raise UserError(
            f'{folder.name} is a dataset that comes with flatGPT; choose another '
            f'{output_flag(args)}'
        )
    return folder


def output_flag(args: argparse.Namespace) -> str:
    return '--out_dir' if args.out_dir else '--name'


# --- splitting


def split_chunks(
    reader: Reader, args: argparse.Namespace, files: list[Path], val_files: list[Path]
) -> Iterator[Chunk]:
    """All chunks, each with its split."""
    if val_files:
        for split, paths in (('train', files), ('val', val_files)):
            for number, _, text, size in read_chunks(paths, reader):
                yield number, split, text, size
        return
    fraction = args.val_fraction
    enough = math.ceil(1 / fraction)
    by_document = args.split == 'document'
    if args.split == 'auto':
        by_document = count_documents(files, make_reader(args), enough) >= enough
    chunks = read_chunks(files, reader)
    split = split_by_document if by_document else split_by_fraction
    yield from split(chunks, fraction)


def read_chunks(files: list[Path], reader: Reader) -> Iterator[tuple]:
    """Chunks of text: (document number, bytes of the document, text, bytes read for the chunk)."""
    documents = itertools.chain.from_iterable(map(reader.documents, files))
    for number, (blocks, length, size) in enumerate(documents):
        for text in split_text(blocks):
            yield number, length, text, len(text.encode()) if size is None else size
            size = size and 0  # a known size is counted with the first chunk


def count_documents(files: list[Path], reader: Reader, limit: int) -> int:
    """The number of documents, at most `limit`."""
    documents = itertools.chain.from_iterable(map(reader.documents, files))
    return sum(1 for _ in itertools.islice(documents, limit))


def split_by_document(chunks: Iterable[tuple], fraction: float) -> Iterator[Chunk]:
    """The first document and, evenly spaced, later ones are for validation."""
    for number, _, text, size in chunks:
        is_val = math.ceil((number + 1) * fraction) > math.ceil(number * fraction)
        yield number, 'val' if is_val else 'train', text, size


def split_by_fraction(chunks: Iterable[tuple], fraction: float) -> Iterator[Chunk]:
    """The last fraction of each document, from a word boundary on, is for validation."""
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
        at = boundary_near(text, len(raw[:room].decode(errors='ignore'))) if room else 0
        if at:
            yield number, 'train', text[:at], size
        yield number, 'val', text[at:], 0 if at else size


def boundary_near(text: str, at: int) -> int:
    """The first place at or after `at` where `text` can be split, else the last one before."""
    after = BOUNDARY.search(text, max(0, at - 1))
    if after:
        return after.end()
    return max((border.end() for border in BOUNDARY.finditer(text)), default=at)


# --- characters that the tokenizer does not have


class DropUnknownCharacters:
    """Chunks without the characters that the tokenizer does not have; these are counted."""

    def __init__(self, chunks: Iterable[Chunk], tokenizer: Tokenizer, read_eot: bool):
        self.chunks, self.tokenizer, self.read_eot = chunks, tokenizer, read_eot
        self.known = known_characters(tokenizer)
        self.dropped = np.zeros(0x110000, np.int64)  # how often, by code point
        self.characters = self.documents = 0
        self.written_eots = 0  # occurrences of <|endoftext|>

    def __iter__(self) -> Iterator[Chunk]:
        for number, split, text, size in self.chunks:
            self.documents = max(self.documents, number + 1)
            self.written_eots += text.count(EOT)
            parts = text.split(EOT) if self.read_eot else [text]
            yield number, split, EOT.join(map(self._drop, parts)), size
        dropped = int(self.dropped.sum())
        if dropped > self.characters / 2:
            raise UserError(
                f'the tokenizer does not have {dropped / self.characters:.0%} of the characters in '
                f'the text, such as {self._examples()}; use another one for a new model, for '
                'example --tokenizer=byte'
            )

    def _drop(self, text: str) -> str:
        if self.known is None:
            return text
        codes = np.frombuffer(text.encode('utf-32-le'), '<u4')
        self.characters += len(codes)
        known = self.known[codes]
        if known.all():
            return text
        unknown, counts = np.unique(codes[~known], return_counts=True)
        self.dropped[unknown] += counts
        return codes[known].tobytes().decode('utf-32-le')

    def _examples(self) -> str:
        most = np.argsort(-self.dropped, kind='stable')[:10]
        return ', '.join(repr(chr(code)) for code in most if self.dropped[code])

    def notes(self) -> list[str]:
        """Lines to print about the text."""
        lines = []
        if self.dropped.any():
            dropped = int(self.dropped.sum())
            lines.append(
                f'warning: dropped {counted(dropped, "character")} '
                f'({dropped / self.characters:.1%}) that the tokenizer does not have: '
                f'{self._examples()}'
            )
        if self.written_eots and not self.read_eot:
            lines.append(
                f'{EOT} occurs {counted(self.written_eots, "time")} in the text and was read as '
                'plain text; --read_eot reads it as the end-of-text token'
            )
        if self.documents > 1 and self.tokenizer.eot is None:
            lines.append('nothing separates documents: the tokenizer has no end-of-text token')
        return lines


def known_characters(tokenizer: Tokenizer) -> np.ndarray | None:
    """Whether a char tokenizer has each code point (0x110000,); None for others, which have all."""
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
        return learn_bpe(sample_for_bpe(args, files), args.vocab_size)
    if args.tokenizer == 'char':
        return collect_characters(args, files + val_files)
    return find_tokenizer(args.tokenizer)


def collect_characters(args: argparse.Namespace, files: list[Path]) -> Tokenizer:
    seen, written_eots = np.zeros(0x110000, bool), 0
    chunks = read_chunks(files, make_reader(args))
    for text in with_progress(chunks, total_bytes(files), 'characters'):
        written_eots += args.read_eot and text.count(EOT)
        text = text.replace(EOT, '') if args.read_eot else text
        seen[np.frombuffer(text.encode('utf-32-le'), '<u4')] = True
    has_eot = written_eots or count_documents(files, make_reader(args), 2) > 1
    return char_tokenizer(map(chr, np.flatnonzero(seen)), eot=bool(has_eot))


def sample_for_bpe(args: argparse.Namespace, files: list[Path]) -> Iterator[str]:
    """At most BPE_SAMPLE bytes of the text, in evenly spaced chunks."""
    total = total_bytes(files)
    every = math.ceil(total / BPE_SAMPLE)
    chunks = with_progress(read_chunks(files, make_reader(args)), total, 'reading for bpe')
    sample = (text for i, text in enumerate(chunks) if i % every == 0)
    if args.read_eot:
        sample = (part for text in sample for part in text.split(EOT))
    return sample


def with_progress(chunks: Iterable[tuple], total: int, what: str) -> Iterator[str]:
    """The text of each chunk, with a progress bar."""
    with tqdm(total=total, unit='B', unit_scale=True, desc=what, disable=None) as bar:
        for _, _, text, size in chunks:
            yield text
            bar.update(size)
