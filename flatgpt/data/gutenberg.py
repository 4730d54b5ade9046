"""
Prepare books of Project Gutenberg by number, without its headers and footers.

$ python data/gutenberg/prepare.py 1342 84 --name=novels        # gutenberg.org/ebooks/1342, ...
$ python data/gutenberg/prepare.py poe                          # a predefined set: poe or poems
$ python data/gutenberg/prepare.py poe 84 --name=dark --tokenizer=byte

Each book is a document. It is fetched once and kept in data/gutenberg/pages/, so an interrupted
command can resume. Project Gutenberg's own site asks programs to use a mirror: set it with --site.
Line endings become \n. The last tenth of each book is for validation, or with ten books or more
some whole books.
"""

import argparse
import re
from pathlib import Path

from flatgpt.data import text
from flatgpt.data.dataset import DATA
from flatgpt.data.download import download_folder, fetch_page
from flatgpt.errors import ArgumentParser, UserError, counted

FOLDER = DATA / 'gutenberg'
SITE = 'https://gutenberg.pglaf.org'  # Project Gutenberg's own mirror
# the newest version of a book, then its older files; the digits of 134 are 1/3
URL_PATHS = (
    'cache/epub/{n}/pg{n}.txt',
    *(f'{{digits}}/{{n}}/{{n}}{end}.txt' for end in ('-0', '-8', '')),
)
COMMAND = 'python data/gutenberg/prepare.py'
# *** START OF THE PROJECT GUTENBERG EBOOK X ***; of THIS in older files; X may take a second line
MARKER = (
    r'^[ \t]*\*\*\*[ \t]*%s (?:OF )?TH(?:E|IS) PROJECT GUTENBERG\b'
    r'[^\n]*?(?:\*\*\*|\n[^\n*]+\*\*\*|$)[^\n]*'
)
START = re.compile(MARKER % 'START', re.M | re.I)
END = re.compile(MARKER % 'END', re.M | re.I)
SMALL_PRINT = re.compile(r'^[ \t]*\*END[ *]*THE SMALL PRINT[^\n]*', re.M | re.I)  # before 2003
OLD_END = re.compile(r"^End of (?:the |this )?Project Gutenberg(?:'s|\b)[^\n]*", re.M | re.I)
CREDIT = re.compile(r'\s*(?:Produced|E-?text prepared|Transcribed) by\b.*?\n[ \t]*\n', re.S | re.I)
NUMBER = re.compile(r'\[\s*e(?:book|text)\s*#\s*(\d+)\s*\]', re.I)
TITLE = re.compile(r'^Title:[ \t]*(.+)$', re.M)
HTML = re.compile(r'\s*<(?:!doctype|html)\b', re.I)
HEADER_CHARS = 10_000  # characters that may contain the title and number


def main(argv: list[str] | None, sets: dict[str, dict[int, str]]) -> None:
    """sets: {name: {book number: title}}."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('books', nargs='*', help=f'book numbers, or {" or ".join(sets)}')
    text.add_output_options(parser)
    add('--site', default=SITE, help='the mirror to use; default: %(default)s')
    text.add_options(parser)
    parser.set_defaults(**text.PLAIN_TEXT_DEFAULTS)
    args = parser.parse_args(argv)
    text.check_options(args)
    try:
        prepare(args, sets)
    except OSError as error:
        raise UserError(f'{error.filename or FOLDER}: {error.strerror or error}') from error


def prepare(args: argparse.Namespace, sets: dict) -> None:
    folder, recipe = output_and_config(args, sets)
    if not args.site.startswith(('http://', 'https://')):
        raise UserError(f'--site={args.site}: must begin with http:// or https://')
    numbers = dict.fromkeys(number for word in args.books for number in numbers_of(word, sets))
    keep = download_folder(FOLDER, folder)
    # download all before encoding any
    files = [book_file(number, args.site, keep) for number in numbers]
    text.prepare(args, folder, files, [], recipe)


def output_and_config(args: argparse.Namespace, sets: dict) -> tuple[Path, str]:
    """The output folder, and the name of the config that fits."""
    if not args.books:
        raise UserError(f'give book numbers: {COMMAND} 1342 84 --name=novels (see --help)')
    name = args.books[0] if len(args.books) == 1 and args.books[0] in sets else None
    recipe = f'finetune_{name}' if name and args.tokenizer == 'gpt2' else 'auto'
    if name and not (args.name or args.out_dir):
        return DATA / name, recipe
    return text.output_folder(args), recipe


def numbers_of(word: str, sets: dict) -> list[int]:
    if word in sets:
        return list(sets[word])
    if not word.isdecimal():
        raise UserError(f'{word}: give the number of a book, or a set: {", ".join(sets)}')
    return [int(word)]


def book_file(number: int, site: str, keep: Path) -> Path:
    """The file with only the text of a book, extracted from its page, which is fetched once."""
    where = {'n': number, 'digits': '/'.join(str(number)[:-1]) or '0'}
    urls = [f'{site.rstrip("/")}/{place.format(**where)}' for place in URL_PATHS]
    kept = keep / 'pages' / f'pg{number}.txt'
    page = fetch_page(urls, kept, lambda page: find_problem(page, number))
    book = decode_book(page)
    body = strip_boilerplate(book)
    title = TITLE.search(book[:HEADER_CHARS])
    print(
        f'{number}: {title[1].strip() if title else "no title"}, {counted(len(body), "character")}'
    )
    path = keep / 'books' / f'{number}.txt'
    path.parent.mkdir(exist_ok=True)
    path.write_text(body, encoding='utf-8', newline='')
    return path


def find_problem(page: bytes, number: int) -> str | None:
    """Why a page is not the book with this number, or None."""
    book = decode_book(page)
    found = NUMBER.search(book[:HEADER_CHARS])
    if found and int(found[1]) != number:
        return f'is book {found[1]}, not {number}'
    if strip_boilerplate(book):
        return None
    kind = 'a web page' if HTML.match(book) else 'not a book'
    return f'is {kind}: it has no text between the START and END lines of Project Gutenberg'


def decode_book(raw: bytes) -> str:
    """Decode UTF-8, used by newer files, or Latin-1, by older ones; line endings become \\n."""
    try:
        book = raw.decode('utf-8-sig')
    except UnicodeDecodeError:
        book = raw.decode('latin-1')
    return book.replace('\r\n', '\n').replace('\r', '\n')


def strip_boilerplate(book: str) -> str:
    """
    The text between Project Gutenberg's START and END lines, without the credit line; '' if either
    is missing.
    """
    start = START.search(book) or SMALL_PRINT.search(book)
    body = book[start.end() :] if start else ''
    end = END.search(body)
    body = body[: end.start()] if end else body
    old_end = next(reversed([*OLD_END.finditer(body)]), None)  # above END, or instead of it
    if not (end or old_end):
        return ''
    if old_end and (not end or len(body) - old_end.end() < 200):
        body = body[: old_end.start()]
    credit = CREDIT.match(body)
    body = (body[credit.end() :] if credit else body).strip()
    return body and body + '\n'
