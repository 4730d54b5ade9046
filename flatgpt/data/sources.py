"""
Which files a command means, what they are, and the documents in them.

    files = find_files(['novel.txt', 'more/', 'corpus/**/*.md'])
    for document in Reader(field='body').documents(files[0]): ...

A file is one document of plain text. Each line of a .jsonl or .ndjson file is one, each record of a
.json file that is a list of records, and each row of a .csv or .tsv file. What is no text, such as
a PDF or a compressed file, is refused by its name; in a folder it is left out and counted.
"""

import codecs
import csv
import glob
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from flatgpt.errors import UserError
from flatgpt.files import strict_json

BLOCK = 2**20  # bytes read at a time
HEAD = 8192  # bytes that show what a file is
JSON_LINES = ('.jsonl', '.ndjson')
TABLES = {'.csv': ',', '.tsv': '\t'}
BOMS = (  # those of UTF-32 first: one begins as one of UTF-16 does
    (codecs.BOM_UTF32_LE, 'utf-32'),
    (codecs.BOM_UTF32_BE, 'utf-32'),
    (codecs.BOM_UTF16_LE, 'utf-16'),
    (codecs.BOM_UTF16_BE, 'utf-16'),
    (codecs.BOM_UTF8, 'utf-8'),
)
SIGNATURES = (  # how files begin that are no text, what they are, and what to do
    (b'\x1f\x8b', 'compressed by gzip', 'unpack it first: gunzip -k {}'),
    (b'BZh', 'compressed by bzip2', 'unpack it first: bunzip2 -k {}'),
    (b'\xfd7zXZ\0', 'compressed by xz', 'unpack it first: unxz -k {}'),
    (b'\x28\xb5\x2f\xfd', 'compressed by Zstandard', 'unpack it first: unzstd {}'),
    (b'%PDF-', 'a PDF', 'give its text: pdftotext {}'),
    (b'{\\rtf', 'a document in RTF', 'save it as plain text'),
    (b'PK\x03\x04', 'a zip archive, or a .docx, .xlsx, .odt or .epub', 'give the text in it'),
    (b'\xd0\xcf\x11\xe0', 'an old .doc, .xls or .ppt', 'save it as plain text'),
    (b"7z\xbc\xaf'\x1c", 'a 7-Zip archive', 'give the text in it'),
    (b'Rar!', 'a RAR archive', 'give the text in it'),
    (
        b'PAR1',
        'a parquet file',
        'python data/openwebtext/prepare.py --source=FOLDER --out_dir=OTHER reads a folder of such',
    ),
    (b'SQLite format 3\0', 'a SQLite database', 'export its text as JSON lines'),
    (b'\x89PNG', 'a picture', 'give text'),
    (b'\xff\xd8\xff', 'a picture', 'give text'),
    (b'GIF8', 'a picture', 'give text'),
)
BROKEN = 'broken links'
CHAT_FIELDS = {'messages', 'conversations', 'instruction', 'prompt', 'chosen'}


# --- which files


def find_files(
    patterns: list[str], encoding: str | None = None, output: Path | None = None
) -> list[Path]:
    """The files that the arguments mean, each once, in the order of the arguments.

    What lies in the output's folder, as an earlier run's dataset does, has to be named itself.
    """
    found = {}
    for pattern in patterns:
        path = Path(pattern)
        matches = [path] if path.exists() else map(Path, sorted(glob.glob(pattern, recursive=True)))
        taken = [
            p
            for match in matches
            for p in (files_in(match, encoding) if match.is_dir() else [match])
        ]
        if not taken:
            what = 'has no text files' if path.is_dir() else 'no such file, and nothing matches it'
            raise UserError(f'{pattern}: {what}')
        if output and not path.is_file():
            taken = [each for each in taken if not lies_in(each, output)]
        for path in taken:
            if not path.is_file() or not path.stat().st_size:
                raise UserError(f'{path}: {"is empty" if path.is_file() else "is not a file"}')
        for path in taken:
            found.setdefault(file_id(path), path)
    return list(found.values())


def file_id(path: Path) -> tuple:
    """What is the same for every name of a file."""
    status = path.stat()
    return status.st_dev, status.st_ino


def total_bytes(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a file is of the dataset that an earlier run wrote below its own source."""
    return os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)


def files_in(folder: Path, encoding: str | None = None) -> list[Path]:
    """The text files in a folder and those below it, linked ones too."""
    paths, skipped = walk(folder)
    reasons = {path: why_not_taken(path, folder, encoding) for path in paths}
    taken = [path for path, reason in reasons.items() if reason is None]
    others = Counter(reason for reason in reasons.values() if reason is not None)
    broken = others.pop(BROKEN, 0)
    print(f'{folder}: {len(taken)} files taken, {others.total()} hidden, empty or binary', end='')
    kinds = ', '.join(f'{kind}: {count}' for kind, count in sorted(others.items()) if kind)
    print(f' ({kinds})' if kinds else '', end='')
    again = 'linked folders that lead back to one of these'
    links = ((BROKEN, broken), (again, skipped))
    print(''.join(f'; {what}: {count}' for what, count in links if count))
    return taken


def walk(folder: Path) -> tuple[list[Path], int]:
    """All files in a folder and below, also behind links, and how many folders come again."""

    def fail(error: OSError) -> None:
        raise error

    paths, seen, again = [], set(), 0
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        hidden = is_hidden(Path(place), folder)  # a visible link may lead there, too
        if (hidden, file_id(Path(place))) in seen:
            again += 1
            folders.clear()
            continue
        seen.add((hidden, file_id(Path(place))))
        folders.sort()
        paths += [Path(place, name) for name in names]
    return sorted(path for path in paths if path.is_file() or path.is_symlink()), again


def is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith('.') for part in path.relative_to(folder).parts)


def why_not_taken(path: Path, folder: Path, encoding: str | None) -> str | None:
    """None for a text file; '' where it needs no mention; else what it is."""
    if is_hidden(path, folder):
        return ''
    if not path.is_file():
        return BROKEN
    head = head_of(path)
    if not head:
        return ''
    if what := what_if_no_text(head, encoding):
        return '' if what[0] == 'binary' else what[0]
    return None


# --- what they are


def head_of(path: Path) -> bytes:
    with path.open('rb') as file:
        return file.read(HEAD)


def bom_of(head: bytes) -> tuple[bytes, str]:
    """A byte order mark at the beginning, and the encoding it stands for; b'', '' without one."""
    return next((bom for bom in BOMS if head.startswith(bom[0])), (b'', ''))


def strip_bom(block: bytes) -> tuple[bytes, int]:
    """The beginning of a UTF-8 file without its byte order mark, and the bytes that had."""
    stripped = block.removeprefix(codecs.BOM_UTF8)
    return stripped, len(block) - len(stripped)


def what_if_no_text(head: bytes, encoding: str | None) -> tuple[str, str] | None:
    """What a file is that begins so, and what to do about it; None for text."""
    if bom_of(head)[0]:
        return None
    known = next((each for each in SIGNATURES if head.startswith(each[0])), None)
    if known and (not is_utf8(head) or known[0] in (b'%PDF-', b'{\\rtf')):
        return known[1:]
    if encoding and encoding.startswith(('utf-16', 'utf-32')):
        return None
    if wide := wide_encoding(head):
        name = wide.upper().removesuffix('-LE').removesuffix('-BE')
        return f'{name} without a byte order mark', f'--encoding={wide} reads it'
    if b'\0' in head:
        return 'binary', 'it has zero bytes; give text'
    return None


def is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder('utf-8')().decode(head)  # whose end may cut a character
    except UnicodeDecodeError:
        return False
    return b'\0' not in head


def wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 that bytes look like, by where the zeros of plain letters lie."""
    quarter, zeros = len(head) // 4, [head[i::4].count(0) for i in range(4)]
    if quarter and min(zeros[2:]) > 0.9 * quarter > 9 * zeros[0]:
        return 'utf-32-le'
    if quarter and min(zeros[:2]) > 0.9 * quarter > 9 * zeros[3]:
        return 'utf-32-be'
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    name = 'utf-16-le' if odd > even else 'utf-16-be'
    text = head[: len(head) // 2 * 2].decode(name, errors='replace')
    letters = sum(each.isprintable() or each.isspace() for each in text)
    many = max(even, odd) > max(0.1 * len(head), 10 * min(even, odd))
    return name if many and letters > 0.97 * len(text) else None


# --- reading


class Document(NamedTuple):
    blocks: Iterable[str]
    length: int  # bytes of the text in UTF-8
    size: int | None  # bytes of its file that were read for it; None: those of its text


class Reader:
    """Reads the documents of files, and counts what it leaves out.

    field: key or column of the text in JSON lines and tables, None for 'text'.
    errors: 'replace' puts U+FFFD in place of bytes that are not of the encoding.
    encoding: of files without a byte order mark; None is UTF-8.
    plain: takes JSON lines, JSON and tables as the text that they are, too.
    """

    def __init__(
        self,
        field: str | None = None,
        errors: str = 'strict',
        encoding: str | None = None,
        plain: bool = False,
    ):
        self.field, self.errors = field or 'text', errors
        self.encoding, self.plain = encoding, plain
        self.without_text = 0  # rows
        self.json_as_text = 0  # files
        self.unused: dict[str, None] = {}  # fields of rows, in the order met

    def documents(self, path: Path) -> Iterator[Document]:
        head = head_of(path)
        if what := what_if_no_text(head, self.encoding):
            raise UserError(f'{path}: is {what[0]}; {what[1].format(path)}')
        self._check_encoding(path, bom_of(head)[1])
        layout = self.layout(path)
        if layout == 'text':
            self.json_as_text += path.suffix.lower() == '.json' and not self.plain
            yield Document(self.text(path), self._length(path, bom_of(head)[1]), None)
            return
        rows = {'lines': self._json_lines, 'records': self._json_records, 'table': self._table}
        for where, record, size in rows[layout](path):
            if text := self._text_of(record, where):
                yield Document([text], len(text.encode()), size)

    def layout(self, path: Path) -> str:
        """'text', or in what its documents lie: 'lines' of JSON, 'records' or a 'table'."""
        suffix = path.suffix.lower()
        if self.plain or suffix not in (*JSON_LINES, '.json', *TABLES):
            return 'text'
        if suffix in JSON_LINES:
            return 'lines'
        if suffix in TABLES:
            return 'table'
        if self._is_json_lines(path):
            return 'lines'
        return 'records' if self._has_records(path) else 'text'

    def notes(self) -> list[str]:
        """What to tell of the rows."""
        lines = []
        if self.without_text:
            lines.append(
                f'{self.without_text:,} rows left out: their {self.field} is null or empty'
            )
        if self.unused:
            names = list(self.unused)
            more = f' and {len(names) - 20} more' if len(names) > 20 else ''
            lines.append(f'of each row {self.field} was taken, not {", ".join(names[:20])}{more}')
        if self.json_as_text:
            lines.append(
                f'{self.json_as_text:,} .json files are no records with a field {self.field}, and '
                'were taken as the text that they are'
            )
        return lines

    def text(self, path: Path) -> Iterator[str]:
        """The text of a file, block by block, without its byte order mark."""
        mark, encoding = bom_of(head_of(path))
        if encoding != 'utf-8' and mark:
            mark = b''  # which the decoder takes off, having learned the order from it
        encoding = encoding or self.encoding or 'utf-8'
        decoder = codecs.getincrementaldecoder(encoding)(self.errors)
        position = len(mark)
        with path.open('rb') as file:  # text mode would change line ends
            file.seek(position)
            for block in itertools.chain(iter(lambda: file.read(BLOCK), b''), [b'']):
                yield self._decode(decoder, block, path, position, encoding)
                position += len(block)

    def _decode(self, decoder, block: bytes, path: Path, position: int, encoding: str) -> str:
        """The text of a block that begins at byte `position`; an empty one ends the file."""
        pending = len(decoder.getstate()[0])  # bytes of a character that began in the block before
        try:
            return decoder.decode(block, final=not block)
        except UnicodeError as error:
            at = position - pending + getattr(error, 'start', 0)
            other = '' if self.encoding else 'give the encoding it has, such as --encoding=cp1252; '
            raise UserError(
                f'{path}: not {encoding.upper()} at byte {at}; {other}--errors=replace puts U+FFFD '
                'in place of such bytes'
            ) from error

    def _check_encoding(self, path: Path, marked: str) -> None:
        if marked and self.encoding and not self.encoding.startswith(marked):
            raise UserError(
                f'{path}: is {marked.upper()}, by its byte order mark, and not {self.encoding}; '
                'prepare it without --encoding, or save it as that'
            )
        if marked not in ('', 'utf-8') and self.errors == 'replace':
            raise UserError(
                f'{path}: is {marked.upper()}, by its byte order mark, and is read as that; leave '
                'out --errors=replace, which is for damaged text'
            )

    def _length(self, path: Path, marked: str) -> int:
        """Bytes that the text of a file has in UTF-8."""
        if (marked or self.encoding or 'utf-8') == 'utf-8':
            return path.stat().st_size
        return sum(len(block.encode()) for block in self.text(path))

    # --- rows

    def _has_records(self, path: Path) -> bool:
        """Whether a .json file is a list of records, or one: an object with the field.

        A list of other things, or settings such as package.json, have none.
        """
        try:
            content = json.loads(''.join(self.text(path)))
        except (ValueError, RecursionError):
            return False
        if isinstance(content, dict):
            return self.field in content
        is_list = isinstance(content, list) and bool(content)
        return is_list and all(isinstance(each, dict) for each in content)

    def _is_json_lines(self, path: Path) -> bool:
        """Whether a .json file has a record on its first line and begins another on the next."""
        lines = filter(None, map(str.strip, lines_of(self.text(path))))
        first, second = next(lines, ''), next(lines, '')
        try:
            return second.startswith('{') and isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            return False

    def _json_lines(self, path: Path) -> Iterator[tuple]:
        for number, line in enumerate(lines_of(self.text(path)), 1):
            if line.strip():
                where = f'{path}, line {number}'
                yield where, parse_json(line, where), len(line.encode())

    def _json_records(self, path: Path) -> Iterator[tuple]:
        size = path.stat().st_size
        content = parse_json(''.join(self.text(path)), str(path))
        for number, record in enumerate(content if isinstance(content, list) else [content], 1):
            yield f'{path}, record {number}', record, size if number == 1 else 0

    def _table(self, path: Path) -> Iterator[tuple]:
        csv.field_size_limit(2**31 - 1)  # a cell may be a whole text
        lines = lines_of(self.text(path))
        header = next(lines, '')
        delimiter = TABLES[path.suffix.lower()]
        if delimiter == ',' and ',' not in header and ';' in header:
            delimiter = ';'
        rows = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            if len(set(names)) < len(names):
                raise UserError(f'{path}: two of its columns have one name: {", ".join(names)}')
            for row in filter(None, rows):
                where = f'{path}, line {rows.line_num}'
                if len(row) != len(names):
                    raise UserError(
                        f'{where}: {len(row)} cells, and the first line has {len(names)}; '
                        '--plain takes the file as it is'
                    )
                yield where, dict(zip(names, row, strict=True)), sum(map(len, row)) + len(row)
        except csv.Error as error:
            raise UserError(
                f'{path}, line {rows.line_num}: not a table ({error}); --plain takes it as it is'
            ) from error

    def _text_of(self, record, where: str) -> str:
        """The text of a row; '' where it has none, which is counted."""
        if not isinstance(record, dict) or self.field not in record:
            raise UserError(f'{where}: {self._no_field(record)}')
        self.unused |= dict.fromkeys(name for name in record if name != self.field)
        text = record[self.field]
        if text is None or text == '':
            self.without_text += 1
            return ''
        if not isinstance(text, str):
            raise UserError(
                f'{where}: field {self.field!r} is {type(text).__name__}, not text; choose another '
                'with --field='
            )
        try:
            return text.encode(errors=self.errors).decode()
        except UnicodeEncodeError as error:
            raise UserError(
                f'{where}: half a surrogate pair; --errors=replace puts ? there'
            ) from error

    def _no_field(self, record) -> str:
        keys = ', '.join(record) if isinstance(record, dict) else f'no keys: {str(record)[:40]}'
        hint = 'choose with --field=, or take the file as plain text with --plain'
        if isinstance(record, dict) and CHAT_FIELDS & record.keys():
            hint += '; conversations are prepared by data/chat/prepare.py'
        return f'no field {self.field!r}; it has {keys}; {hint}'


def lines_of(blocks: Iterable[str]) -> Iterator[str]:
    """Lines with their ends, of which \\n alone is one, in time that grows with their length."""
    begun: list[str] = []
    for block in blocks:
        *whole, rest = block.split('\n')
        for line in whole:
            yield ''.join([*begun, line, '\n'])
            begun = []
        begun.append(rest)
    if last := ''.join(begun):
        yield last


def parse_json(text: str, where: str):
    try:
        return strict_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: not JSON: {error}') from error
