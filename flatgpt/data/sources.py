"""
Find text files from a command's arguments, detect their format, and read their documents.

    files = find_files(['novel.txt', 'more/', 'corpus/**/*.md'])
    for document in Reader(field='body').documents(files[0]): ...

A plain-text file is one document. So is each line of a .jsonl or .ndjson file, each record of a
.json file that is a list of records, and each row of a .csv or .tsv file. A file that is not text,
such as a PDF or a compressed file, is an error; in a folder it is skipped and counted.
"""

import codecs
import csv
import glob
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from flatgpt.errors import UserError, counted, short_repr
from flatgpt.files import strict_json

BLOCK = 2**20  # bytes read at a time
HEAD = 8192  # bytes read to detect the format of a file
JSON_LINES = ('.jsonl', '.ndjson')
TABLES = {'.csv': ',', '.tsv': '\t'}
BOMS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, 'utf-32'),
    (codecs.BOM_UTF32_BE, 'utf-32'),
    (codecs.BOM_UTF16_LE, 'utf-16'),
    (codecs.BOM_UTF16_BE, 'utf-16'),
    (codecs.BOM_UTF8, 'utf-8'),
)
SIGNATURES = (  # first bytes of files that are not text, their format, and how to get text
    (b'\x1f\x8b', 'compressed by gzip', 'unpack it first: gunzip -k {}'),
    (b'BZh', 'compressed by bzip2', 'unpack it first: bunzip2 -k {}'),
    (b'\xfd7zXZ\0', 'compressed by xz', 'unpack it first: unxz -k {}'),
    (b'\x28\xb5\x2f\xfd', 'compressed by Zstandard', 'unpack it first: unzstd {}'),
    (b'%PDF-', 'a PDF', 'give its text: pdftotext {}'),
    (b'{\\rtf', 'a document in RTF', 'save it as plain text'),
    (b'PK\x03\x04', 'a zip archive, or a .docx, .xlsx, .odt or .epub', 'give a text file from it'),
    (b'\xd0\xcf\x11\xe0', 'an old .doc, .xls or .ppt', 'save it as plain text'),
    (b"7z\xbc\xaf'\x1c", 'a 7-Zip archive', 'give a text file from it'),
    (b'Rar!', 'a RAR archive', 'give a text file from it'),
    (
        b'PAR1',
        'a parquet file',
        'read its folder: python data/openwebtext/prepare.py --source=FOLDER --out_dir=OTHER',
    ),
    (b'SQLite format 3\0', 'a SQLite database', 'export its text as JSON lines'),
    (b'\x89PNG', 'an image', 'give a text file'),
    (b'\xff\xd8\xff', 'an image', 'give a text file'),
    (b'GIF8', 'an image', 'give a text file'),
)
# files of a prepared dataset, see dataset.py
TOKEN_FILE = re.compile(r'(train|val)(-\d{5})?(\.mask)?\.bin')
PREPARED = 'a prepared dataset (token ids), not a text'
BROKEN_LINK = 'broken links'
CHAT_FIELDS = {'messages', 'conversations', 'instruction', 'prompt', 'chosen'}


# --- which files


def find_files(
    patterns: list[str],
    encoding: str | None = None,
    output: Path | None = None,
    flag: str = '',
) -> list[Path]:
    """The files that these paths and glob patterns match, each once, in the order of the arguments.

    Files in the output folder, such as an earlier dataset, must be given by their names.
    flag: the one that the patterns were given with, for example '--val='.
    """
    found = {}
    for pattern in patterns:
        if not pattern:
            raise UserError(f'{flag}"": the name of a file is empty; give files or folders')
        path = Path(pattern)
        matches = [path] if path.exists() else map(Path, sorted(glob.glob(pattern, recursive=True)))
        taken = [
            p
            for match in matches
            for p in (text_files_in(match, encoding) if match.is_dir() else [match])
        ]
        if not taken:
            what = 'has no text files' if path.is_dir() else 'no such file or match'
            raise UserError(
                f'{flag}{pattern}: {what}; give files, folders or patterns that have text'
                + (', or --val_fraction=0.1 instead' if flag == '--val=' else '')
            )
        if output and not path.is_file():
            taken = [each for each in taken if not is_inside(each, output)]
        for path in taken:
            if not path.is_file() or not path.stat().st_size:
                what = 'is empty' if path.is_file() else 'is not a file'
                raise UserError(f'{path}: {what}; give a file with text')
        for path in taken:
            found.setdefault(file_id(path), path)
    return list(found.values())


def file_id(path: Path) -> tuple:
    """The same for all links to a file: device and inode."""
    status = path.stat()
    return status.st_dev, status.st_ino


def exclude_files(files: list[Path], excluded: list[Path]) -> list[Path]:
    """The files that are not among `excluded`, under any name."""
    ids = {file_id(path) for path in excluded}
    return [path for path in files if file_id(path) not in ids]


def total_bytes(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file is in a folder or below it."""
    return os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)


def text_files_in(
    folder: Path, encoding: str | None = None, patterns: list[str] | None = None
) -> list[Path]:
    """The text files in a folder and below it, including linked ones; prints what it skips.

    patterns: glob patterns in the folder; only the files and folders that they match are read.
    """
    paths, repeated = list_files(folder)
    if patterns is not None:
        found = {
            Path(folder, match)
            for pattern in patterns
            for match in glob.glob(pattern, root_dir=folder, recursive=True)
        }
        paths = [path for path in paths if found & {path, *path.parents}]
    reasons = {path: skip_reason(path, folder, encoding) for path in paths}
    taken = [path for path, reason in reasons.items() if reason is None]
    others = Counter(reason for reason in reasons.values() if reason is not None)
    broken = others.pop(BROKEN_LINK, 0)
    print(
        f'{folder}: using {counted(len(taken), "file")}, skipping {others.total()} hidden, empty '
        'or binary',
        end='',
    )
    kinds = ', '.join(f'{kind}: {count}' for kind, count in sorted(others.items()) if kind)
    print(f' ({kinds})' if kinds else '', end='')
    links = ((BROKEN_LINK, broken), ('links to folders already read', repeated))
    print(''.join(f'; {what}: {count}' for what, count in links if count))
    return taken


def list_files(folder: Path) -> tuple[list[Path], int]:
    """All files in a folder and below, following links; and how many folders were reached again."""

    def fail(error: OSError) -> None:
        raise error

    paths, repeated = [], 0
    seen = set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        hidden = is_hidden(Path(place), folder)  # a visible link may lead to the same folder
        if (hidden, file_id(Path(place))) in seen:
            repeated += 1
            folders.clear()
            continue
        seen.add((hidden, file_id(Path(place))))
        folders.sort()
        paths += [Path(place, name) for name in names]
    return sorted(path for path in paths if path.is_file() or path.is_symlink()), repeated


def is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith('.') for part in path.relative_to(folder).parts)


def skip_reason(path: Path, folder: Path, encoding: str | None) -> str | None:
    """Why a file is skipped: None for a text file, '' where no reason is printed."""
    if is_hidden(path, folder):
        return ''
    if not path.is_file():
        return BROKEN_LINK
    head = read_head(path)
    if not head:
        return ''
    pair = [path.with_name(name) for name in ('meta.json', 'tokenizer.json')]
    if path in pair and all(file.is_file() for file in pair):
        return PREPARED
    if what := non_text_format(path, head, encoding):
        return '' if what[0] == 'binary' else what[0]
    return None


# --- formats


def read_head(path: Path) -> bytes:
    with path.open('rb') as file:
        return file.read(HEAD)


def find_bom(head: bytes) -> tuple[bytes, str]:
    """The byte order mark and its encoding; (b'', '') without one."""
    return next((bom for bom in BOMS if head.startswith(bom[0])), (b'', ''))


def strip_bom(block: bytes) -> tuple[bytes, int]:
    """The beginning of a UTF-8 file without its byte order mark, and the length of the mark."""
    stripped = block.removeprefix(codecs.BOM_UTF8)
    return stripped, len(block) - len(stripped)


def non_text_format(path: Path, head: bytes, encoding: str | None) -> tuple[str, str] | None:
    """(format, how to get text) of a file that is not text, by its first bytes; None for text."""
    if TOKEN_FILE.fullmatch(path.name) and not is_utf8(head):
        folder = path.parent.resolve()
        return PREPARED, f'give the text that it was made from, or train with --dataset={folder}'
    if find_bom(head)[0]:
        return None
    known = next((each for each in SIGNATURES if head.startswith(each[0])), None)
    if known and (not is_utf8(head) or known[0] in (b'%PDF-', b'{\\rtf')):
        return known[1:]
    if encoding and encoding.startswith(('utf-16', 'utf-32')):
        return None
    if wide := guess_wide_encoding(head):
        name = wide.upper().removesuffix('-LE').removesuffix('-BE')
        return f'{name} without a byte order mark', f'add --encoding={wide}'
    if b'\0' in head:
        return 'binary', 'it has zero bytes; give a text file'
    return None


def is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder('utf-8')().decode(head)  # may end inside a character
    except UnicodeDecodeError:
        return False
    return b'\0' not in head


def guess_wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, guessed from the positions of zero bytes; None for neither."""
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
    size: int | None  # bytes of the file read for it; None: as many as the text has


class Reader:
    """Reads the documents of files, and counts what it skips.

    field: key or column of the text in JSON lines and tables, None for 'text'.
    errors: 'strict', or 'replace' to replace invalid bytes with U+FFFD.
    encoding: of files without a byte order mark; None is UTF-8.
    plain: reads JSON lines, JSON and tables as plain text, too.
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
        self.unused: dict[str, None] = {}  # other fields of rows, in the order they were first seen

    def documents(self, path: Path) -> Iterator[Document]:
        head = read_head(path)
        if what := non_text_format(path, head, self.encoding):
            raise UserError(f'{path}: is {what[0]}; {what[1].format(path)}')
        self._check_encoding(path, find_bom(head)[1])
        layout = self.layout(path)
        if layout == 'text':
            self.json_as_text += path.suffix.lower() == '.json' and not self.plain
            yield Document(self.text(path), self._length(path, find_bom(head)[1]), None)
            return
        rows = {'lines': self._json_lines, 'records': self._json_records, 'table': self._table}
        for where, record, size in rows[layout](path):
            if text := self._text_of(record, where):
                yield Document([text], len(text.encode()), size)

    def layout(self, path: Path) -> str:
        """The layout of a file: 'text', 'lines' of JSON, JSON 'records' or a 'table'."""
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
        """Lines to print about the rows."""
        lines = []
        if self.without_text:
            lines.append(
                f'skipped {counted(self.without_text, "row")} whose {self.field} is null or empty'
            )
        if self.unused:
            names = list(self.unused)
            more = f' and {len(names) - 20} more' if len(names) > 20 else ''
            lines.append(f'used {self.field} of each row, not {", ".join(names[:20])}{more}')
        if self.json_as_text:
            lines.append(
                f'read {counted(self.json_as_text, ".json file")} as plain text: no records with a '
                f'field {self.field}'
            )
        return lines

    def text(self, path: Path) -> Iterator[str]:
        """The text of a file, block by block, without its byte order mark."""
        mark, encoding = find_bom(read_head(path))
        if encoding != 'utf-8' and mark:
            mark = b''  # the decoder needs the mark, and removes it
        encoding = encoding or self.encoding or 'utf-8'
        decoder = codecs.getincrementaldecoder(encoding)(self.errors)
        position = len(mark)
        with path.open('rb') as file:  # text mode would change line endings
            file.seek(position)
            for block in itertools.chain(iter(lambda: file.read(BLOCK), b''), [b'']):
                yield self._decode(decoder, block, path, position, encoding)
                position += len(block)

    def _decode(self, decoder, block: bytes, path: Path, position: int, encoding: str) -> str:
        """The text of a block that begins at byte `position`; an empty block ends the file."""
        pending = len(decoder.getstate()[0])  # bytes of a character begun in the block before
        try:
            return decoder.decode(block, final=not block)
        except UnicodeError as error:
            at = position - pending + getattr(error, 'start', 0)
            raise UserError(
                f'{path}: not {encoding.upper()} at byte {at}; {self._fix_encoding(path)}'
            ) from error

    def _fix_encoding(self, path: Path) -> str:
        """How to read a file with invalid bytes."""
        bom_encoding = find_bom(read_head(path))[1]
        if bom_encoding not in ('', 'utf-8'):
            return 'save the file again as UTF-8'
        known = self.encoding or bom_encoding
        other = '' if known else 'give its encoding, such as --encoding=cp1252, or '
        return f'{other}replace invalid bytes with --errors=replace'

    def _check_encoding(self, path: Path, bom_encoding: str) -> None:
        if bom_encoding and self.encoding and not self.encoding.startswith(bom_encoding):
            raise UserError(
                f'{path}: has a {bom_encoding.upper()} byte order mark, but --encoding='
                f'{self.encoding}; omit --encoding, or convert the file'
            )
        if bom_encoding not in ('', 'utf-8') and self.errors == 'replace':
            raise UserError(
                f'{path}: is {bom_encoding.upper()} with a byte order mark, and --errors=replace '
                'is not supported for it; omit --errors=replace'
            )

    def _length(self, path: Path, bom_encoding: str) -> int:
        """Bytes of the text of a file in UTF-8."""
        if (bom_encoding or self.encoding or 'utf-8') == 'utf-8':
            return path.stat().st_size
        return sum(len(block.encode()) for block in self.text(path))

    # --- rows

    def _has_records(self, path: Path) -> bool:
        """Whether a .json file is a list of objects, or one object that has the field.

        Settings such as package.json, and lists of other values, are plain text.
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
        """Whether the first line of a .json file is an object, and the next begins another one."""
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
        csv.field_size_limit(2**31 - 1)  # a cell may be a whole document
        lines = lines_of(self.text(path))
        header = next(lines, '')
        delimiter = TABLES[path.suffix.lower()]
        if delimiter == ',' and ',' not in header and ';' in header:
            delimiter = ';'
        rows = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            if len(set(names)) < len(names):
                raise UserError(
                    f'{path}: two columns have the same name: {", ".join(names)}; rename one, or '
                    'read the file as plain text with --plain'
                )
            for row in filter(None, rows):
                where = f'{path}, line {rows.line_num}'
                if len(row) != len(names):
                    raise UserError(
                        f'{where}: {counted(len(row), "cell")}, but the first line has '
                        f'{len(names)}; fix the line, or read the file as plain text with --plain'
                    )
                yield where, dict(zip(names, row, strict=True)), sum(map(len, row)) + len(row)
        except csv.Error as error:
            raise UserError(
                f'{path}, line {rows.line_num}: invalid table ({error}); fix the line, or read the '
                'file as plain text with --plain'
            ) from error

    def _text_of(self, record, where: str) -> str:
        """The text of a row; '' if it has none, which is counted."""
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
                'field with --field='
            )
        try:
            return text.encode(errors=self.errors).decode()
        except UnicodeEncodeError as error:
            raise UserError(
                f'{where}: has half a surrogate pair; replace it with ? by --errors=replace'
            ) from error

    def _no_field(self, record) -> str:
        keys = ', '.join(record) if isinstance(record, dict) else f'no keys: {short_repr(record)}'
        hint = 'choose one with --field=, or read the file as plain text with --plain'
        if isinstance(record, dict) and CHAT_FIELDS & record.keys():
            hint += '; for conversations, run data/chat/prepare.py'
        return f'no field {self.field!r}; it has {keys}; {hint}'


def lines_of(blocks: Iterable[str]) -> Iterator[str]:
    """Lines with their \\n, which alone ends a line; linear in the length of the text."""
    parts: list[str] = []
    for block in blocks:
        *whole, rest = block.split('\n')
        for line in whole:
            yield ''.join([*parts, line, '\n'])
            parts = []
        parts.append(rest)
    if last := ''.join(parts):
        yield last


def parse_json(text: str, where: str):
    try:
        return strict_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'{where}: invalid JSON: {error}; fix it, or read the file as plain text with --plain'
        ) from error
