"""
Prepare books of Project Gutenberg by their numbers, without what it puts around each.

$ python data/gutenberg/prepare.py 1342 84 --name=novels        # gutenberg.org/ebooks/1342, ...
$ python data/poe/prepare.py                                    # two sets that come along
$ python data/poems/prepare.py --tokenizer=byte --out_dir=verses

Each book is fetched once and kept in data/gutenberg/pages/. The site itself is for people, and asks
programs to go to a mirror: --site says which. Line ends become \\n. Each book gives its last tenth
for validation, or of ten books and more some are for validation whole.
"""

import argparse
import re
from pathlib import Path

from configurator import UserError, one_line_errors
from data.download import fetch_page
from data.text import prepare as text

FOLDER = Path(__file__).parent
SITE = 'https://gutenberg.pglaf.org'  # Project Gutenberg's own mirror
COMMAND = 'python data/gutenberg/prepare.py'
# *** START OF THE PROJECT GUTENBERG EBOOK X ***; of THIS in older files; X may take a second line
MARK = (
    r'^[ \t]*\*\*\*[ \t]*%s (?:OF )?TH(?:E|IS) PROJECT GUTENBERG\b'
    r'[^\n]*?(?:\*\*\*|\n[^\n*]+\*\*\*|$)[^\n]*'
)
START = re.compile(MARK % 'START', re.M | re.I)
END = re.compile(MARK % 'END', re.M | re.I)
SMALL_PRINT = re.compile(r'^[ \t]*\*END[ *]*THE SMALL PRINT[^\n]*', re.M | re.I)  # before 2003
OLD_END = re.compile(r"^End of (?:the |this )?Project Gutenberg(?:'s|\b)[^\n]*", re.M | re.I)
CREDIT = re.compile(r'\s*(?:Produced|E-?text prepared|Transcribed) by\b.*?\n[ \t]*\n', re.S | re.I)
NUMBER = re.compile(r'\[\s*e(?:book|text)\s*#\s*(\d+)\s*\]', re.I)
TITLE = re.compile(r'^Title:[ \t]*(.+)$', re.M)
HEAD = 10_000  # characters in which a file says what it is


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument(
        'ids', nargs='*', type=int, help='numbers of books, as in gutenberg.org/ebooks/1342'
    )
    parser.add_argument('--name', help='what to call the dataset; it goes to data/NAME')
    args, options = parse(parser, argv)
    if not args.ids:
        raise UserError(f'say which books: {COMMAND} 1342 84 --name=novels (see --help)')
    if not (args.out_dir or args.name):
        raise UserError(f'say what to call it: {COMMAND} {args.ids[0]} ... --name=novels')
    options.name = args.name
    prepare(args.ids, text.output_folder(options), args.site, options)


def prepare_set(argv: list[str] | None, doc: str, folder: Path, books: dict[int, str]) -> None:
    """Write a set of books to its own folder, or to --out_dir."""
    args, options = parse(new_parser(doc), argv)
    prepare(list(books), args.out_dir or folder, args.site, options)


def new_parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog='Also --tokenizer, --vocab_size, --val_fraction, --split and --workers, as in '
        'data/text/prepare.py.',
    )
    parser.add_argument('--out_dir', type=Path, help='write here instead')
    parser.add_argument('--site', default=SITE, help='where the books are, default %(default)s')
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, argparse.Namespace]:
    """-> this script's own options, and those of data/text/prepare.py, which does the rest"""
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if not word.startswith('--')]
    if unknown:
        raise UserError(f'{unknown[0]}: not understood; --help lists the options')
    options = text.arguments(['books', *rest])
    options.out_dir = args.out_dir
    return args, options


def prepare(ids: list[int], folder: Path, site: str, options: argparse.Namespace) -> None:
    try:
        files = [book_file(number, site) for number in dict.fromkeys(ids)]
        text.prepare(options, folder, files, [])
    except OSError as error:
        raise UserError(f'{error.filename or folder}: {error.strerror or error}') from error


def book_file(number: int, site: str = SITE) -> Path:
    """The file with the text of a book alone, made from the page that is kept or fetched."""
    page = FOLDER / 'pages' / f'pg{number}.txt'
    url = f'{site.rstrip("/")}/cache/epub/{number}/pg{number}.txt'
    book = decode(fetch_page(url, page))
    found = NUMBER.search(book[:HEAD])
    if found and int(found[1]) != number:
        raise UserError(f'{page}: is book {found[1]}, not {number}; delete it to fetch it again')
    body = strip(book)
    if not body:
        raise UserError(
            f'{page}: no text between the marks of Project Gutenberg; look at it, and delete it to '
            f'fetch {url} again'
        )
    title = TITLE.search(book[:HEAD])
    print(f'{number}: {title[1].strip() if title else "no title"}, {len(body):,} characters')
    path = FOLDER / 'books' / f'{number}.txt'
    path.parent.mkdir(exist_ok=True)
    path.write_text(body, encoding='utf-8', newline='')
    return path


def decode(raw: bytes) -> str:
    """UTF-8, as the generated files are, or Latin-1, as older ones; line ends become \\n."""
    try:
        book = raw.decode('utf-8-sig')
    except UnicodeDecodeError:
        book = raw.decode('latin-1')
    return book.replace('\r\n', '\n').replace('\r', '\n')


def strip(book: str) -> str:
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


if __name__ == '__main__':
    one_line_errors()
    main()
