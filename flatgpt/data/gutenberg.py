"""
Prepare books of Project Gutenberg by their numbers, without what it puts around each.

$ python data/gutenberg/prepare.py 1342 84 --name=novels        # gutenberg.org/ebooks/1342, ...
$ python data/gutenberg/prepare.py poe                          # a set that comes along, or poems
$ python data/gutenberg/prepare.py poe 84 --name=dark --tokenizer=byte

Each book is a document. It is fetched once and kept in data/gutenberg/pages/, so a command that was
stopped goes on where it was. Project Gutenberg's own site is for people, and asks programs to go to
a mirror: --site says which. Line ends become \n. Each book gives its last tenth for validation, or
of ten books and more some are for validation whole.
"""

import argparse
import re
from pathlib import Path

from flatgpt.data import text
from flatgpt.data.dataset import DATA
from flatgpt.data.download import download_folder, fetch_page
from flatgpt.errors import UserError

FOLDER = DATA / 'gutenberg'
SITE = 'https://gutenberg.pglaf.org'  # the mirror that Project Gutenberg runs itself
# made from the newest version of a book, then the places of its older files; digits is 1/34 of 134
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
HEADER_CHARS = 10_000  # characters in which a file says what it is


def main(argv: list[str] | None, sets: dict[str, dict[int, str]]) -> None:
    """sets: books by number, of each set that has a name."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('books', nargs='*', help=f'numbers of books, or {" or ".join(sets)}')
    add('--name', help='what to call the dataset; it goes to data/NAME')
    add('--out_dir', type=Path, help='write here instead')
    add('--site', default=SITE, help='where the books are, default %(default)s')
    text.add_options(parser)
    parser.set_defaults(**text.OWN_FILES)
    args = parser.parse_args(argv)
    text.check_options(args)
    try:
        prepare(args, sets)
    except OSError as error:
        raise UserError(f'{error.filename or FOLDER}: {error.strerror or error}') from error


def prepare(args: argparse.Namespace, sets: dict) -> None:
    folder, recipe = output_and_config(args, sets)
    if not args.site.startswith(('http://', 'https://')):
        raise UserError(f'--site={args.site}: begins with neither http:// nor https://')
    numbers = dict.fromkeys(number for word in args.books for number in numbers_of(word, sets))
    keep = download_folder(FOLDER, folder)
    # all, before any is encoded
    files = [book_file(number, args.site, keep) for number in numbers]
    text.prepare(args, folder, files, [], recipe)


def output_and_config(args: argparse.Namespace, sets: dict) -> tuple[Path, str]:
    """Where the dataset goes, and the config that is made for it."""
    if not args.books:
        raise UserError(f'say which books: {COMMAND} 1342 84 --name=novels (see --help)')
    name = args.books[0] if len(args.books) == 1 and args.books[0] in sets else None
    recipe = f'finetune_{name}' if name and args.tokenizer == 'gpt2' else 'train_text'
    if name and not (args.name or args.out_dir):
        return DATA / name, recipe
    if not (args.name or args.out_dir):
        raise UserError(f'say what to call it: {COMMAND} {args.books[0]} ... --name=novels')
    return text.output_folder(args), recipe


def numbers_of(word: str, sets: dict) -> list[int]:
    if word in sets:
        return list(sets[word])
    if not word.isdecimal():
        raise UserError(f'{word}: is neither the number of a book nor a set: {", ".join(sets)}')
    return [int(word)]


def book_file(number: int, site: str, keep: Path) -> Path:
    """The file with the text of a book alone, made from the page that is kept there or fetched."""
    where = {'n': number, 'digits': '/'.join(str(number)[:-1]) or '0'}
    urls = [f'{site.rstrip("/")}/{place.format(**where)}' for place in URL_PATHS]
    page = fetch_page(urls, keep / 'pages' / f'pg{number}.txt', lambda page: flaw(page, number))
    book = decode_book(page)
    body = strip_boilerplate(book)
    title = TITLE.search(book[:HEADER_CHARS])
    print(f'{number}: {title[1].strip() if title else "no title"}, {len(body):,} characters')
    path = keep / 'books' / f'{number}.txt'
    path.parent.mkdir(exist_ok=True)
    path.write_text(body, encoding='utf-8', newline='')
    return path


def flaw(page: bytes, number: int) -> str | None:
    """Why a page is not the book of this number, if it is not."""
    book = decode_book(page)
    found = NUMBER.search(book[:HEADER_CHARS])
    if found and int(found[1]) != number:
        return f'is book {found[1]}, not {number}'
    if strip_boilerplate(book):
        return None
    kind = 'a web page' if HTML.match(book) else 'no book'
    return f'is {kind}: it has no text between the marks of Project Gutenberg'


def decode_book(raw: bytes) -> str:
    """UTF-8, as the generated files are, or Latin-1, as older ones; line ends become \\n."""
    try:
        book = raw.decode('utf-8-sig')
    except UnicodeDecodeError:
        book = raw.decode('latin-1')
    return book.replace('\r\n', '\n').replace('\r', '\n')


def strip_boilerplate(book: str) -> str:
    """
    The text between the marks of Project Gutenberg, without the line that says who made the file;
    '' where a mark is missing.
    """
    start = START.search(book) or SMALL_PRINT.search(book)
    body = book[start.end() :] if start else ''
    end = END.search(body)
    body = body[: end.start()] if end else body
    old_end = next(reversed([*OLD_END.finditer(body)]), None)  # above the mark, or in its place
    if not (end or old_end):
        return ''
    if old_end and (not end or len(body) - old_end.end() < 200):
        body = body[: old_end.start()]
    credit = CREDIT.match(body)
    body = (body[credit.end() :] if credit else body).strip()
    return body and body + '\n'
