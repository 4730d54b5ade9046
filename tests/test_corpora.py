"""Books of Project Gutenberg and the SRE books, from a server here with pages written here."""

import http.server
import importlib
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import data.dataset
import data.download
from configurator import UserError
from data.dataset import Dataset, open_dataset
from data.download import fetch_page
from data.gutenberg import prepare as gutenberg
from data.sre import prepare as sre

needs_gpt2 = pytest.mark.skipif(
    'TIKTOKEN_CACHE_DIR' not in os.environ, reason='TIKTOKEN_CACHE_DIR has the gpt2 vocabulary'
)
LINE = 'It was a plain night and nothing much happened in it.\n'
STORY = 'A PLAIN NIGHT\n\n' + LINE * 40
HEADER = """The Project Gutenberg eBook of A Plain Night

This ebook is for the use of anyone anywhere.

Title: A Plain Night

Author: Nobody

Release date: May 1, 2001 [eBook #%d]
                Most recently updated: May 2, 2021

Language: English

"""
LICENCE = '\n\n\nUpdated editions will replace the previous one.\n'


def book(number=7, start='*** START OF THE PROJECT GUTENBERG EBOOK A PLAIN NIGHT ***',
         end='*** END OF THE PROJECT GUTENBERG EBOOK A PLAIN NIGHT ***', text=STORY):  # fmt: skip
    return f'{HEADER % number}{start}\n\n\n\n{text}\n\n\n{end}{LICENCE}'


# --- a site


class Server(http.server.BaseHTTPRequestHandler):
    pages, requests = None, None  # what it has, what it was asked for

    def do_GET(self):
        Server.requests.append((self.path, self.headers['User-Agent']))
        page = self.pages.get(self.path, (404, ''))
        status, content = (200, page) if isinstance(page, (str, bytes)) else page
        body = content if isinstance(content, bytes) else content.encode()
        self.send_response(status)
        if status in (301, 302):
            self.send_header('Location', content)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def naps(monkeypatch):
    """What was slept, without sleeping."""
    slept = []
    monkeypatch.setattr(time, 'sleep', slept.append)
    return slept


@pytest.fixture
def site(monkeypatch, naps, tmp_path):
    """The address of a site with Server.pages; what is fetched from it is kept in tmp_path."""
    monkeypatch.setenv('NO_PROXY', '*')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gutenberg, 'FOLDER', tmp_path / 'gutenberg')
    monkeypatch.setattr(sre, 'FOLDER', tmp_path / 'sre')
    data.download.robots.cache_clear()
    Server.pages, Server.requests = {}, []
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()
        thread.join()
    data.download.robots.cache_clear()


def asked():
    return [path for path, _ in Server.requests]


def refused(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert '\n' not in str(error.value)
    return str(error.value)


def text_of(split, folder='out'):
    dataset = Dataset(folder, 1)
    paths = sorted(Path(folder).glob(f'{split}*.bin'))
    ids = np.concatenate([np.fromfile(path, dataset._dtype) for path in paths])
    return dataset.tokenizer.decode(ids)


def test_a_page_is_fetched_once_with_our_name_and_after_a_pause(site, naps, tmp_path):
    Server.pages = {'/a': 'text of a', '/b': 'text of b'}
    for _ in range(2):
        assert fetch_page(f'{site}/a', tmp_path / 'kept' / 'a') == b'text of a'
    fetch_page(f'{site}/b', tmp_path / 'kept' / 'b')
    assert asked() == ['/robots.txt', '/a', '/b']
    assert all(agent.startswith('flatGPT/') for _, agent in Server.requests)
    assert naps == [data.download.PAUSE] * 3  # one before every request


def test_robots_txt_is_obeyed(site, tmp_path):
    Server.pages = {
        '/robots.txt': 'User-agent: *\nDisallow: /private',
        '/private/a': 'x',
        '/b': 'y',
    }
    message = refused(fetch_page, f'{site}/private/a', tmp_path / 'a')
    assert message == (
        f'{site}/private/a cannot be fetched (robots.txt asks programs not to); get the file by '
        f'other means and put it at {tmp_path / "a"}'
    )
    assert fetch_page(f'{site}/b', tmp_path / 'b') == b'y'
    assert asked() == ['/robots.txt', '/b']


def test_a_page_that_moved_is_one_line_with_its_new_address(site, tmp_path):
    Server.pages = {'/old/': (301, '/new/'), '/new/': 'another page'}
    message = refused(fetch_page, f'{site}/old/', tmp_path / 'old')
    assert f'{site}/old/ cannot be fetched (it has moved to {site}/new/)' in message
    assert str(tmp_path / 'old') in message
    assert not list(tmp_path.glob('old*'))


def test_a_slash_that_the_server_adds_is_no_move(site, tmp_path):
    Server.pages = {'/a': (301, '/a/'), '/a/': 'the page'}
    assert fetch_page(f'{site}/a', tmp_path / 'a') == b'the page'


def test_a_page_is_tried_again_when_the_server_fails_but_not_when_it_refuses(site, tmp_path):
    Server.pages = {'/busy': (503, ''), '/gone': (404, '')}
    assert '(HTTP 503)' in refused(fetch_page, f'{site}/busy', tmp_path / 'busy')
    assert '(HTTP 404)' in refused(fetch_page, f'{site}/gone', tmp_path / 'gone')
    assert asked() == ['/robots.txt'] + ['/busy'] * 3 + ['/gone']


# --- books


THE, THIS = (f'{word} PROJECT GUTENBERG EBOOK' for word in ('THE', 'THIS'))
SMALL_PRINT = 'THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*'
CREDIT = 'Produced by A. Person and the Online\nTeam at https://www.pgdp.net\n\n'
OLD = 'End of the Project Gutenberg EBook of X, by Y'


@pytest.mark.parametrize(
    ('start', 'end'),
    [
        (f'*** START OF {THE} X ***', f'*** END OF {THE} X ***'),
        (f'*** START OF {THIS} X ***', f'*** END OF {THIS} X ***'),
        (f'***START OF {THE} X***', f'***END OF {THE} X***'),
        (f'*** START OF {THE} A\nLONG TITLE ***', f'*** END OF {THE} A\nLONG TITLE ***'),
        (f'*** START OF {THIS} X', f'*** END OF {THIS} X'),
        (f'*** START OF {THIS} X ***\n\n{CREDIT}', f'{OLD}\n\n*** END OF {THIS} X ***'),
        (f'*END*{SMALL_PRINT}', 'End of The Project Gutenberg Etext of X'),
        (f'*END {SMALL_PRINT}', "End of Project Gutenberg's X, by Y"),
    ],
)
def test_what_project_gutenberg_puts_around_a_book_is_taken_off(start, end):
    assert gutenberg.strip(book(start=start, end=end)) == STORY


def test_stars_and_the_name_of_the_project_within_a_book_stay():
    text = STORY + '\n* * *\n\n*** A note of Project Gutenberg: produced by hand.\n\n' + STORY
    assert gutenberg.strip(book(text=text)) == text


@pytest.mark.parametrize('damaged', ['', STORY, book()[:900], book(text=' ')])
def test_a_book_without_its_marks_gives_nothing(damaged):
    assert gutenberg.strip(damaged) == ''


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'latin-1'])
def test_a_book_is_read_in_the_encodings_there_are(encoding):
    assert gutenberg.decode('Café\r\nnoir\r\n'.encode(encoding)) == 'Café\nnoir\n'


def serve(*numbers):
    for number in numbers:
        Server.pages[f'/cache/epub/{number}/pg{number}.txt'] = book(
            number, text=STORY.replace('plain', f'{number}')
        ).replace('\n', '\r\n')


def test_books_are_prepared_by_number(site, capsys):
    serve(7, 12)
    argv = ['7', '12', '--out_dir=out', '--tokenizer=byte', f'--site={site}']
    gutenberg.main(argv)
    assert text_of('train').startswith('A PLAIN NIGHT\n\nIt was a 7 night')
    assert '<|endoftext|>A PLAIN NIGHT\n\nIt was a 12 night' in text_of('train')
    assert 'a 7 night' in text_of('val')  # each book gives its end
    assert 'a 12 night' in text_of('val')
    assert 'Gutenberg' not in text_of('train') + text_of('val')
    assert '7: A Plain Night, ' in capsys.readouterr().out
    gutenberg.main(argv)
    assert len(asked()) == 3  # robots.txt and two books: nothing is fetched again


def test_a_book_that_is_not_there_leaves_nothing_but_those_fetched(site):
    serve(7)
    argv = ['7', '12', '--out_dir=out', '--tokenizer=byte', f'--site={site}/']
    message = refused(gutenberg.main, argv)
    assert f'{site}/cache/epub/12/pg12.txt cannot be fetched (HTTP 404)' in message
    assert str(gutenberg.FOLDER / 'pages' / 'pg12.txt') in message
    assert not Path('out').exists()
    serve(12)
    gutenberg.main(argv)
    assert asked().count('/cache/epub/7/pg7.txt') == 1


def test_another_book_under_a_number_is_refused(site):
    Server.pages['/cache/epub/8/pg8.txt'] = book(7)
    message = refused(gutenberg.main, ['8', '--out_dir=out', f'--site={site}'])
    assert 'is book 7, not 8' in message


def test_a_page_without_a_book_is_refused(site):
    Server.pages['/cache/epub/8/pg8.txt'] = '<html>please prove that you are human</html>'
    message = refused(gutenberg.main, ['8', '--out_dir=out', f'--site={site}'])
    assert 'no text between the marks' in message
    assert not Path('out').exists()


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ([], 'say which books: python data/gutenberg/prepare.py 1342 84 --name=novels'),
        (['7'], 'say what to call it: python data/gutenberg/prepare.py 7 ... --name=novels'),
        (['7', '--name=poe'], 'poe is a dataset that comes with flatGPT'),
        (['7', '--name=x', '--val_fraction=2'], '--val_fraction=2.0: needs'),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_fetched(site, argv, message):
    assert message in refused(gutenberg.main, argv)
    assert not asked()


@pytest.mark.parametrize('name', ['poe', 'poems'])
def test_a_set_is_prepared_from_its_books(site, name):
    module = importlib.import_module(f'data.{name}.prepare')
    serve(*module.BOOKS)
    module.main(['--out_dir=out', '--tokenizer=byte', f'--site={site}'])
    assert len(asked()) == 1 + len(module.BOOKS)
    for number in module.BOOKS:
        assert f'a {number} night' in text_of('train')
    assert '7: not understood' in refused(module.main, ['7'])


# --- the SRE books

PAGE = """<!DOCTYPE html>
<html lang="en"><head><title>Google SRE - {title}</title>
<style>p {{ color: red }}</style><script>var hidden = "<p>script</p>";</script></head>
<body><header class="top"><a href="/books/">Books</a> Menu</header>
<main>
<div class="header"><nav><ul><li><a href="{book}table-of-contents/">Table of Contents</a></li>
<li><a href="{book}a-page-of-the-menu/">Menu</a></li></ul></nav></div>
<div id="maia-main" role="main">
<div class="maia-teleport" id="content"></div>
<div class="content">
{content}
</div>
</div>
<div class="footer"><a href="{book}previous/">Previous</a>
<p>Copyright 2017. Licensed under CC BY-NC-ND 4.0</p></div>
</main><script>end()</script></body></html>
"""
CHAPTER = """<section data-type="chapter" id="c{number}">
<h1 class="heading">Chapter {number} of
  Plain&nbsp;Things</h1>
<p class="byline author">Written by Some Body</p>
<p>Hope is   not a <em>plan</em>,
and <a href="/sre-book/elsewhere/">a link</a> is text &amp; more. {filler}</p>
<section data-type="sect1"><h2>A Part</h2>
<ul><li>one</li>
<li>two<br>and a half</li></ul>
<table><tr><th>Budget</th><th>Days</th></tr>
<tr><td>99%</td><td>3.65</td></tr></table>
<pre data-type="programlisting">for x in y:
    print(x)
</pre>
<figure><img src="a.png" alt="x"><figcaption>Figure 1. A thing</figcaption></figure>
</section></section>"""


def contents(book, names):
    items = ''.join(f'<li><a href="{book}{name}/">{name}</a></li>\n' for name in names)
    extra = (
        f'<li><a href="{book}{names[0]}/#sec">its section</a></li>'
        f'<a href="{book}table-of-contents/">itself</a>'
        '<a href="https://elsewhere.example/sre-book/x/">elsewhere</a><a href="/books/">books</a>'
    )
    content = f'<h1>Table of Contents</h1><ul>{items}{extra}</ul>'
    return PAGE.format(title='Contents', book=book, content=content)


NAMES = {'/sre-book/': [f'chapter-{i}' for i in range(6)], '/workbook/': ['intro', 'b', 'c', 'd']}


def serve_books():
    for book, names in NAMES.items():
        Server.pages[f'{book}table-of-contents/'] = contents(book, names)
        for name in names:
            chapter = CHAPTER.format(number=name, filler='Plain words. ' * 20)
            Server.pages[f'{book}{name}/'] = PAGE.format(title=name, book=book, content=chapter)


def parsed(content):
    page = sre.Page()
    page.feed(PAGE.format(title='x', book='/sre-book/', content=content))
    page.close()
    return page.text()


def test_a_chapter_becomes_paragraphs():
    assert parsed(CHAPTER.format(number=1, filler='')) == (
        'Chapter 1 of Plain Things\n\nWritten by Some Body\n\n'
        'Hope is not a plan, and a link is text & more.\n\n'
        'A Part\n\none\ntwo\nand a half\n\nBudget\tDays\n99%\t3.65\n\n'
        'for x in y:\n    print(x)\n\nFigure 1. A thing\n'
    )


def test_tags_left_open_do_no_harm():
    assert parsed('<p>one<p>two<ul><li>three<li>four</ul></i><p>five') == (
        'one\n\ntwo\n\nthree\nfour\n\nfive\n'
    )


def test_both_books_are_read_by_their_tables_of_contents(site, monkeypatch):
    monkeypatch.setattr(sre, 'SITE', site)
    serve_books()
    sre.main(['--out_dir=out', '--tokenizer=byte'])
    pages = [f'{book}{name}/' for book, names in NAMES.items() for name in names]
    tables = [f'{book}table-of-contents/' for book in NAMES]
    assert asked() == ['/robots.txt', *tables, *pages]
    assert text_of('train').startswith('Chapter chapter-0 of Plain Things\n\n')
    assert text_of('train').count('<|endoftext|>Chapter ') == 8
    assert text_of('val').startswith('Chapter d of Plain Things\n\n')  # the tenth
    for stray in ('Menu', 'Licensed', 'script', 'Previous', 'end()'):
        assert stray not in text_of('train')
    sre.main(['--out_dir=out', '--tokenizer=byte'])
    assert len(asked()) == 13


def test_a_chapter_that_moved_is_one_line_and_the_others_are_kept(site, monkeypatch):
    monkeypatch.setattr(sre, 'SITE', site)
    serve_books()
    Server.pages['/workbook/c/'] = (302, '/books/')
    Server.pages['/books/'] = 'all books'
    message = refused(sre.main, ['--out_dir=out', '--tokenizer=byte'])
    kept = sre.FOLDER / 'pages' / 'workbook_c.html'
    assert f'{site}/workbook/c/ cannot be fetched (it has moved to {site}/books/)' in message
    assert str(kept) in message
    assert not Path('out').exists()
    before = len(asked())
    kept.write_text(Server.pages['/workbook/b/'], encoding='utf-8')  # as the line says
    sre.main(['--out_dir=out', '--tokenizer=byte'])
    assert asked()[before:] == ['/workbook/d/']


def test_a_table_of_contents_without_chapters_is_one_line(site, monkeypatch):
    monkeypatch.setattr(sre, 'SITE', site)
    Server.pages['/sre-book/table-of-contents/'] = PAGE.format(title='', book='/', content='<p>new')
    message = refused(sre.main, ['--out_dir=out', '--tokenizer=byte'])
    assert f'{site}/sre-book/table-of-contents/: lists no chapters; the site has changed' in message
    assert 'sre-book_table-of-contents.html' in message


def test_a_chapter_without_text_is_one_line(site, monkeypatch):
    monkeypatch.setattr(sre, 'SITE', site)
    serve_books()
    Server.pages['/sre-book/chapter-2/'] = '<html><div>Loading ...</div></html>'
    message = refused(sre.main, ['--out_dir=out', '--tokenizer=byte'])
    assert f'{site}/sre-book/chapter-2/: has no text where it should be' in message
    assert not Path('out').exists()


@needs_gpt2
def test_the_name_of_the_dataset_is_enough(site, tmp_path, monkeypatch):
    folder = tmp_path / 'data' / 'sre'
    folder.mkdir(parents=True)
    script = Path(sre.__file__).read_text(encoding='utf-8')
    (folder / 'prepare.py').write_text(script.replace(sre.SITE, site), encoding='utf-8')
    monkeypatch.setattr(data.dataset, 'DATA', tmp_path / 'data')
    monkeypatch.setitem(sys.modules, 'data.sre.prepare', sre)  # and back in the end
    serve_books()
    assert open_dataset('sre', 16).tokenizer.name == 'gpt2'
    assert (folder / 'pages' / 'workbook_intro.html').exists()
