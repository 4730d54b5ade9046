"""
Prepare Google's two books on site reliability engineering, with GPT-2's tokenizer.

$ python data/sre/prepare.py
$ python train.py config/finetune_sre.py

The chapters are read from the tables of contents. Each page is fetched once, one per second, if
robots.txt allows it, and kept in data/sre/pages/, so an interrupted command can resume. The text is
written to data/sre/chapters/; every tenth chapter is for validation.

The books belong to Google and O'Reilly, under CC BY-NC-ND 4.0: free to read at
https://sre.google/books/, but not to sell or to share in another form. flatGPT contains no part of
them.
"""

import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's flatgpt comes first

from flatgpt.data import text
from flatgpt.data.download import download_folder, fetch_page
from flatgpt.errors import ArgumentParser, UserError, one_line_errors

if __name__ == '__main__':
    one_line_errors()  # before an import that may fail

from bs4 import BeautifulSoup, NavigableString, Tag

FOLDER = Path(__file__).parent
SITE = 'https://sre.google'
CONTENTS = ('/sre-book/table-of-contents/', '/workbook/table-of-contents/')
NO_CHAPTERS = {'table-of-contents', 'index', 'bibliography'}  # no prose

# The text of a page is in <div role="main">, without these elements
HIDDEN = (
    'script, style, noscript, template, svg, form, button, nav, footer, .header, .footer, '
    '[data-type=noteref], [data-type=indexterm]'
)
OPEN_TAGS = 'is damaged: it has unclosed tags'
HEADINGS = ('h1', 'h2', 'h3', 'h4', 'h5', 'h6')
LISTS = ('ul', 'ol', 'dl')
BLOCKS = [
    *HEADINGS, *LISTS, 'address', 'article', 'aside', 'blockquote', 'caption', 'dd', 'div', 'dt',
    'figcaption', 'figure', 'header', 'hr', 'li', 'main', 'p', 'pre', 'section', 'table',
]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('--out_dir', type=Path, default=FOLDER, help='default: %(default)s')
    text.add_options(parser)
    parser.set_defaults(**text.PLAIN_TEXT_DEFAULTS)
    args = parser.parse_args(argv)
    text.check_options(args)
    try:
        keep = download_folder(FOLDER, args.out_dir)
        chapters = read_books(keep)  # download all before encoding any
        recipe = 'finetune_sre' if args.tokenizer == 'gpt2' else 'auto'
        text.prepare(args, args.out_dir, chapters, [], recipe)
    except OSError as error:
        raise UserError(f'{error.filename or FOLDER}: {error.strerror or error}') from error


def read_books(keep: Path) -> list[Path]:
    """The files with the text of every chapter of both books, in order."""
    urls = [url for contents in CONTENTS for url in read_contents(SITE + contents, keep)]
    paths = []
    for url in tqdm(urls, desc='sre', unit=' pages', disable=None):
        page = fetch_page([url], page_of(url, keep), chapter_problem)
        path = keep / 'chapters' / page_of(url, keep).with_suffix('.txt').name
        path.parent.mkdir(exist_ok=True)
        path.write_text(markdown(page), encoding='utf-8', newline='')
        paths.append(path)
    return paths


def read_contents(url: str, keep: Path) -> list[str]:
    """The pages that a table of contents lists, each once, in order."""
    page = fetch_page([url], page_of(url, keep), lambda page: contents_problem(page, url))
    return chapters(page, url)


def chapters(page: bytes, url: str) -> list[str]:
    """The linked pages directly below the address of the book."""
    book = url.removesuffix('table-of-contents/')
    found = {}
    for link in soup(page).select('a[href]'):
        target = urljoin(url, link['href']).partition('#')[0].partition('?')[0].rstrip('/')
        name = target.removeprefix(book)
        if target.startswith(book) and '/' not in name and name not in NO_CHAPTERS:
            found[f'{target}/'] = None
    return list(found)


def contents_problem(page: bytes, url: str) -> str | None:
    """What is wrong with a table of contents, or None."""
    if has_open_tags(page):
        return OPEN_TAGS
    return None if chapters(page, url) else 'lists no chapters; the site may have changed'


def has_open_tags(page: bytes) -> bool:
    """Whether many tags are unclosed: html.parser takes minutes for a few kilobytes of them."""
    return any(part.count(b'<') > 200 for part in page.split(b'>'))


def chapter_problem(page: bytes) -> str | None:
    """What is wrong with the page of a chapter, or None."""
    if has_open_tags(page):
        return OPEN_TAGS
    try:
        found = markdown(page)
    except RecursionError:
        return 'is damaged: its elements are nested too deeply'
    return None if found else 'has no text in its main part; the site may have changed'


def page_of(url: str, keep: Path) -> Path:
    return keep / 'pages' / (urlsplit(url).path.strip('/').replace('/', '_') + '.html')


# --- from HTML to Markdown


def soup(page: bytes) -> BeautifulSoup:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # for pages that are not HTML
        return BeautifulSoup(page.decode('utf-8', errors='replace'), 'html.parser')


def markdown(page: bytes) -> str:
    """The main part of a page as Markdown; '' if it has none."""
    main = soup(page).select_one('[role=main]')
    if main is None:
        return ''
    for hidden in main.select(HIDDEN):
        hidden.extract()
    for line_end in main.select('br'):
        line_end.string = '\n'
    for code in main.select('code'):
        if not code.find_parent('pre'):
            code.string = f'`{code.get_text()}`'
    return ''.join(f'{block}\n\n' for block in blocks(main)).removesuffix('\n')


def blocks(parent: Tag) -> Iterator[str]:
    """The headings, paragraphs, lists, tables and code blocks in an element."""
    loose = ''  # text outside of these
    for child in parent.children:
        if isinstance(child, Tag) and (child.name in BLOCKS or child.find(BLOCKS)):
            yield from filter(None, [one_line(loose), *block(child)])
            loose = ''
        elif isinstance(child, Tag) or type(child) is NavigableString:  # not a comment
            loose += child.get_text()
    yield from filter(None, [one_line(loose)])


def block(tag: Tag) -> Iterator[str]:
    if tag.name in HEADINGS:
        words = one_line(tag.get_text())
        yield words and f'{"#" * int(tag.name[1])} {words}'
    elif tag.name == 'pre':
        code = tag.get_text().strip('\n').rstrip()
        yield code and f'```\n{code}\n```'
    elif tag.name in LISTS:
        for number, item in enumerate(tag.find_all('li', recursive=False), 1):
            item['number'] = number
        yield '\n'.join(blocks(tag))
    elif tag.name == 'li':
        mark = f'{tag["number"]}.' if tag.parent.name == 'ol' else '-'
        words = textwrap.indent('\n'.join(blocks(tag)), ' ' * (len(mark) + 1)).strip()
        yield words and f'{mark} {words}'
    elif tag.name == 'table':
        yield from table(tag)
    else:
        yield from blocks(tag)


def table(tag: Tag) -> Iterator[str]:
    yield one_line(tag.caption.get_text()) if tag.caption else ''
    rows = []
    for row in tag.find_all('tr'):
        if row.find_parent('table') is not tag:
            continue  # a nested table is part of its cell's text
        inside = row.find_all(['th', 'td'], recursive=False)
        cells = [one_line(cell.get_text(' ')) for cell in inside]
        rows.append(f'| {" | ".join(cells)} |')
    yield '\n'.join(rows)


def one_line(words: str) -> str:
    return re.sub(r'\s+', ' ', words).strip()


if __name__ == '__main__':
    main()
