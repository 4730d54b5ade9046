"""
Prepare Google's two books on site reliability engineering, with GPT-2's tokenizer.

$ python data/sre/prepare.py
$ python train.py config/finetune_sre.py

The chapters are found by the tables of contents. Each page is fetched once, a second after the one
before, if robots.txt allows it, and kept in data/sre/pages/, so a command that was stopped goes on
where it was. Every tenth chapter is for validation. The books are under CC BY-NC-ND 4.0: read them
at https://sre.google/books/, and do not hand the prepared text on.
"""

import argparse
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from tqdm import tqdm

from configurator import UserError, one_line_errors
from data.dataset import Writer
from data.download import fetch_page
from data.tokenizer import EOT, get_tokenizer

FOLDER = Path(__file__).parent
SITE = 'https://sre.google'
CONTENTS = ('/sre-book/table-of-contents/', '/workbook/table-of-contents/')
VAL_EVERY = 10  # of ten chapters, one is for validation
SHORTEST = 200  # characters of a page that has any text to learn from

# <div role="main"> holds a page's own text; around it are menus, and links to the pages beside
BLOCKS = set(
    'address article aside blockquote div dl figure h1 h2 h3 h4 h5 h6 hr main ol p pre section '
    'table ul'.split()
)
LINES = {'br', 'caption', 'dd', 'dt', 'figcaption', 'li', 'tr'}
CELLS = {'td', 'th'}
HIDDEN = {'script', 'style', 'nav', 'header', 'footer', 'noscript', 'svg', 'form', 'template'}
VOID = {'area', 'base', 'br', 'col', 'embed', 'hr', 'img', 'input', 'link', 'meta', 'source', 'wbr'}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out_dir', type=Path, default=FOLDER, help='default: %(default)s')
    parser.add_argument(
        '--tokenizer', default='gpt2', help='gpt2 (default), byte or a tiktoken name'
    )
    args = parser.parse_args(argv)
    tokenizer = get_tokenizer(args.tokenizer)
    try:
        chapters = read_books()  # all of them, before anything is written
    except OSError as error:
        raise UserError(f'{error.filename or FOLDER}: {error.strerror or error}') from error
    with Writer(args.out_dir, tokenizer) as writer:
        for i, chapter in enumerate(chapters):
            split = 'val' if i % VAL_EVERY == VAL_EVERY - 1 else 'train'
            between = EOT if writer.tokens(split) else ''
            writer.write(split, tokenizer.encode(between, allow_eot=True))
            writer.write(split, tokenizer.encode(chapter))
    print(writer.summary())


def read_books() -> list[str]:
    """The text of every chapter of both books, in their order."""
    urls = [url for contents in CONTENTS for url in read_contents(SITE + contents)]
    chapters = []
    for url in tqdm(urls, desc='sre', unit=' pages', disable=None):
        text = parse(url).text()
        if len(text) < SHORTEST:
            raise changed(url, 'has no text where it should be')
        chapters.append(text)
    return chapters


def read_contents(url: str) -> list[str]:
    """The pages that a table of contents lists, each once, in their order."""
    book = url.removesuffix('table-of-contents/')
    found = {}
    for link in parse(url).links:
        target = urljoin(url, link).partition('#')[0].partition('?')[0].rstrip('/') + '/'
        name = target.removeprefix(book)
        if target.startswith(book) and name != 'table-of-contents/' and name.count('/') == 1:
            found[target] = None
    if not found:
        raise changed(url, 'lists no chapters')
    return list(found)


def changed(url: str, what: str) -> UserError:
    return UserError(
        f'{url}: {what}; the site has changed, or {page_of(url)} is damaged: delete that file to '
        'fetch the page again'
    )


def page_of(url: str) -> Path:
    return FOLDER / 'pages' / (urlsplit(url).path.strip('/').replace('/', '_') + '.html')


def parse(url: str) -> 'Page':
    page = Page()
    page.feed(fetch_page(url, page_of(url)).decode('utf-8', errors='replace'))
    page.close()
    return page


class Page(HTMLParser):
    """The text and the links in the main part of a page."""

    def __init__(self):
        super().__init__()
        self.open: list[tuple[str, bool, bool]] = []  # tags: whether in the main part, and hidden
        self.pieces: list[str] = []
        self.links: list[str] = []
        self.preformatted = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        _, main, hidden = self.open[-1] if self.open else ('', False, False)
        main = main or values.get('role') == 'main'
        hidden = hidden or tag in HIDDEN or 'footer' in (values.get('class') or '').split()
        if tag not in VOID:
            self.open.append((tag, main, hidden))
            self.preformatted += tag == 'pre'
        if main and not hidden:
            if tag == 'a' and values.get('href'):
                self.links.append(values['href'])
            self.begin(tag)

    def begin(self, tag: str) -> None:
        if tag in BLOCKS:
            self.pieces.append('\n\n')
        elif tag in LINES:
            self.pieces.append('\n')
        elif tag in CELLS and self.pieces and not self.pieces[-1].endswith('\n'):
            self.pieces.append('\t')

    def handle_endtag(self, tag: str) -> None:
        if not any(tag == name for name, _, _ in self.open):
            return
        name = ''
        while name != tag:  # also what was left open in it
            name, main, hidden = self.open.pop()
            self.preformatted -= name == 'pre'
            if name in BLOCKS and main and not hidden:
                self.pieces.append('\n\n')

    def handle_data(self, data: str) -> None:
        _, main, hidden = self.open[-1] if self.open else ('', False, False)
        if not main or hidden:
            return
        if not self.preformatted:
            data = re.sub(r'\s+', ' ', data)
            if not self.pieces or self.pieces[-1].endswith((' ', '\n', '\t')):
                data = data.removeprefix(' ')
        self.pieces += [data] if data else []

    def text(self) -> str:
        """Paragraphs with an empty line between them, and one line end at the end."""
        lines = [line.rstrip() for line in ''.join(self.pieces).split('\n')]
        text = re.sub(r'\n{3,}', '\n\n', '\n'.join(lines)).strip('\n')
        return text and text + '\n'


if __name__ == '__main__':
    one_line_errors()
    main()
