"""Books of Project Gutenberg and the SRE books, from a local server with made-up pages."""

import http.server
import os
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, metrics, random_model, refused
from error_lines import case, error_line

from data.gutenberg import prepare as books
from data.sre import prepare as sre
from flatgpt.checkpoint.convert import export_transformers
from flatgpt.data import download, gutenberg
from flatgpt.data.dataset import Dataset
from flatgpt.data.download import fetch_page
from flatgpt.data.mixture import open_data
from flatgpt.data.tokenizer import byte_tokenizer

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
    pages, requests = None, None  # {path: page}, requests received

    def do_GET(self):
        Server.requests.append((self.path, self.headers['User-Agent']))
        page = self.pages.get(self.path, (404, ''))
        if isinstance(page, list):  # its answers to successive requests
            page = page.pop(0)
        status, content, *headers = (200, page) if isinstance(page, (str, bytes)) else page
        body = content if isinstance(content, bytes) else content.encode()
        self.send_response(status)
        if status in (301, 302):
            self.send_header('Location', content)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def naps(monkeypatch):
    """Record sleeps instead of sleeping."""
    slept = []
    monkeypatch.setattr(time, 'sleep', slept.append)
    return slept


@pytest.fixture
def site(monkeypatch, naps, tmp_path):
    """The address of a site with Server.pages; downloads are kept in tmp_path."""
    monkeypatch.setenv('NO_PROXY', '*')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gutenberg, 'FOLDER', tmp_path / 'gutenberg')
    monkeypatch.setattr(sre, 'FOLDER', tmp_path / 'sre')
    download.robots.cache_clear()
    Server.pages, Server.requests = {}, []
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()
        thread.join()
    download.robots.cache_clear()


def asked():
    return [path for path, _ in Server.requests]


def text_of(split, folder='out'):
    dataset = Dataset(folder, 1)
    paths = sorted(Path(folder).glob(f'{split}*.bin'))
    ids = np.concatenate([np.fromfile(path, dataset._dtype) for path in paths])
    return dataset.tokenizer.decode(ids)


def test_a_page_is_fetched_once_with_our_user_agent_and_after_a_delay(site, naps, tmp_path):
    Server.pages = {'/a': 'text of a', '/b': 'text of b'}
    for _ in range(2):
        assert fetch_page([f'{site}/a'], tmp_path / 'kept' / 'a') == b'text of a'
    fetch_page([f'{site}/b'], tmp_path / 'kept' / 'b')
    assert asked() == ['/robots.txt', '/a', '/b']
    assert all(agent.startswith('flatGPT/') for _, agent in Server.requests)
    assert naps == [download.REQUEST_DELAY] * 3  # one before every request


def test_robots_txt_is_obeyed(site, tmp_path):
    Server.pages = {
        '/robots.txt': 'User-agent: *\nDisallow: /private',
        '/private/a': 'x',
        '/b': 'y',
    }
    message = refused(fetch_page, [f'{site}/private/a'], tmp_path / 'a')
    assert message == (
        f'{site}/private/a cannot be fetched (robots.txt disallows it); get the file by '
        f'other means and save it as {tmp_path / "a"}'
    )
    assert fetch_page([f'{site}/b'], tmp_path / 'b') == b'y'
    assert asked() == ['/robots.txt', '/b']


def test_a_moved_page_is_one_line_with_its_new_address(site, tmp_path):
    Server.pages = {'/old/': (301, '/new/'), '/new/': 'another page'}
    message = refused(fetch_page, [f'{site}/old/'], tmp_path / 'old')
    assert f'{site}/old/ cannot be fetched (it has moved to {site}/new/)' in message
    assert str(tmp_path / 'old') in message
    assert not list(tmp_path.glob('old*'))


def test_a_redirect_that_only_adds_a_slash_is_followed(site, tmp_path):
    Server.pages = {'/a': (301, '/a/'), '/a/': 'the page'}
    assert fetch_page([f'{site}/a'], tmp_path / 'a') == b'the page'


def test_server_errors_are_retried_but_client_errors_are_not(site, tmp_path):
    Server.pages = {'/busy': (503, ''), '/gone': (404, '')}
    assert '(HTTP 503)' in refused(fetch_page, [f'{site}/busy'], tmp_path / 'busy')
    assert '(HTTP 404)' in refused(fetch_page, [f'{site}/gone'], tmp_path / 'gone')
    assert asked() == ['/robots.txt'] + ['/busy'] * 3 + ['/gone']


def test_retry_after_is_obeyed(site, naps, tmp_path):
    later = datetime.now(timezone.utc) + timedelta(seconds=50)
    Server.pages['/a'] = [
        (429, '', ('Retry-After', '7')),
        (503, '', ('Retry-After', format_datetime(later, usegmt=True))),
        'the page',
    ]
    assert fetch_page([f'{site}/a'], tmp_path / 'a') == b'the page'
    pauses = [nap for nap in naps if nap != download.REQUEST_DELAY]
    assert pauses[0] == 7
    assert 40 < pauses[1] <= 50


def test_a_long_retry_after_ends_the_attempts(site, naps, tmp_path):
    Server.pages['/a'] = (429, '', ('Retry-After', '3600'))
    message = refused(fetch_page, [f'{site}/a'], tmp_path / 'a')
    assert '(HTTP 429, retry after 3600)' in message
    assert asked() == ['/robots.txt', '/a']
    assert sum(naps) < 10


def test_the_crawl_delay_in_robots_txt_is_obeyed(site, naps, tmp_path):
    Server.pages = {'/robots.txt': 'User-agent: *\nCrawl-delay: 9', '/a': 'x'}
    fetch_page([f'{site}/a'], tmp_path / 'a')
    assert naps == [download.REQUEST_DELAY, 9]


def test_the_next_address_is_tried_if_the_first_has_no_page(site, tmp_path):
    Server.pages = {'/b': 'the page', '/busy': (503, '')}
    urls = [f'{site}/{name}' for name in 'abc']
    assert fetch_page(urls, tmp_path / 'b') == b'the page'
    assert asked() == ['/robots.txt', '/a', '/b']
    assert '(HTTP 503)' in refused(fetch_page, [f'{site}/busy', urls[1]], tmp_path / 'c')


@error_line('delete it to fetch it again from')
def test_an_invalid_page_is_not_kept_and_a_kept_one_is_not_deleted(site, tmp_path):
    Server.pages = {'/a': 'sign in'}
    problem = lambda page: 'is nothing to read' if page != b'a page' else None  # noqa: E731
    args = ([f'{site}/a'], tmp_path / 'a', problem)
    assert f'{site}/a cannot be fetched (it is nothing to read)' in refused(fetch_page, *args)
    assert not list(tmp_path.glob('a*'))
    (tmp_path / 'a').write_text('mine')
    assert refused(fetch_page, *args) == (
        f'{tmp_path / "a"}: is nothing to read; delete it to fetch it again from {site}/a'
    )
    assert (tmp_path / 'a').read_text() == 'mine'
    (tmp_path / 'a').unlink()
    Server.pages = {'/a': 'a page'}
    assert fetch_page(*args) == b'a page'


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
def test_project_gutenberg_s_header_and_footer_are_removed(start, end):
    assert gutenberg.strip_boilerplate(book(start=start, end=end)) == STORY


def test_asterisks_and_the_project_s_name_within_a_book_are_kept():
    text = STORY + '\n* * *\n\n*** A note of Project Gutenberg: produced by hand.\n\n' + STORY
    assert gutenberg.strip_boilerplate(book(text=text)) == text


@pytest.mark.parametrize('damaged', ['', STORY, book()[:900], book(text=' ')])
def test_a_book_without_start_or_end_line_is_empty(damaged):
    assert gutenberg.strip_boilerplate(damaged) == ''


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'latin-1'])
def test_a_book_is_decoded_from_utf8_or_latin1(encoding):
    assert gutenberg.decode_book('Café\r\nnoir\r\n'.encode(encoding)) == 'Café\nnoir\n'


def serve(*numbers):
    for number in numbers:
        Server.pages[f'/cache/epub/{number}/pg{number}.txt'] = book(
            number, text=STORY.replace('plain', f'{number}')
        ).replace('\n', '\r\n')


def test_books_are_prepared_by_number(site, capsys):
    serve(7, 12)
    argv = ['7', '12', '--out_dir=out', '--tokenizer=byte', f'--site={site}']
    books.main(argv)
    assert text_of('train').startswith('A PLAIN NIGHT\n\nIt was a 7 night')
    assert '<|endoftext|>A PLAIN NIGHT\n\nIt was a 12 night' in text_of('train')
    assert 'a 7 night' in text_of('val')  # the end of each book
    assert 'a 12 night' in text_of('val')
    assert 'Gutenberg' not in text_of('train') + text_of('val')
    assert '7: A Plain Night, ' in capsys.readouterr().out
    books.main(argv)
    assert len(asked()) == 3  # robots.txt and two books: nothing is fetched again


def test_a_missing_book_is_reported_and_fetched_books_are_kept(site):
    serve(7)
    argv = ['7', '12', '--out_dir=out', '--tokenizer=byte', f'--site={site}/']
    message = refused(books.main, argv)
    assert f'{site}/cache/epub/12/pg12.txt cannot be fetched (HTTP 404)' in message
    assert str(gutenberg.FOLDER / 'pages' / 'pg12.txt') in message
    assert not Path('out').exists()
    serve(12)
    books.main(argv)
    assert asked().count('/cache/epub/7/pg7.txt') == 1


def test_an_older_book_is_found_at_its_old_address(site):
    Server.pages['/1/3/134/134-8.txt'] = book(134).replace('plain', 'plaîn').encode('latin-1')
    Server.pages['/0/7/7.txt'] = book(7)
    books.main(['134', '7', '--out_dir=out', '--tokenizer=byte', f'--site={site}'])
    assert 'It was a plaîn night' in text_of('train')
    assert asked()[1:4] == ['/cache/epub/134/pg134.txt', '/1/3/134/134-0.txt', '/1/3/134/134-8.txt']


@pytest.mark.parametrize(
    ('page', 'problem'),
    [
        (book(7), 'it is book 7, not 8'),
        ('<!DOCTYPE html><html>please prove that you are human</html>', 'it is a web page'),
        ('Books are down for the night', 'it is not a book'),
        (book(8)[:1500], 'it is not a book: it has no text between the START and END lines of'),
    ],
)
def test_a_page_that_is_not_the_book_is_refused_and_not_kept(site, page, problem):
    Server.pages['/cache/epub/8/pg8.txt'] = page
    message = refused(books.main, ['8', '--out_dir=out', f'--site={site}'])
    assert message.startswith(f'{site}/cache/epub/8/pg8.txt cannot be fetched ({problem}')
    assert str(gutenberg.FOLDER / 'pages' / 'pg8.txt') in message
    assert not Path('out').exists()
    assert not list((gutenberg.FOLDER / 'pages').iterdir())


def test_a_kept_file_that_is_not_the_book_is_reported(site):
    page = gutenberg.FOLDER / 'pages' / 'pg8.txt'
    page.parent.mkdir(parents=True)
    page.write_text('nothing', encoding='utf-8')
    message = refused(books.main, ['8', '--out_dir=out', f'--site={site}'])
    assert message.startswith(f'{page}: is not a book')
    assert f'delete it to fetch it again from {site}/cache/epub/8/pg8.txt' in message


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ([], 'give book numbers: python data/gutenberg/prepare.py 1342 84 --name=novels'),
        (['7'], 'no name for the dataset; add one, for example --name='),
        (['poe', '7'], 'no name for the dataset; add one, for example --name='),
        (['po', '--name=x'], 'po: give the number of a book, or a set: poe, poems'),
        (['7', '--name=poe'], 'poe is a dataset that comes with flatGPT'),
        (['7', '--name=x', '--val_fraction=2'], '--val_fraction=2.0: give'),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_fetched(site, argv, message):
    assert message in refused(books.main, argv)
    assert not asked()


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('give book numbers', [], ['1342', '84', '--name=novels']),
        case('no name for the dataset', ['7', '12'], ['7', '12', '--name=novels']),
        case('give the number of a book', ['po', '--name=x'], ['7', '--name=x']),
        case('give the number of a book', ['po', '--name=x'], ['poems', '--name=x']),
        case('must begin with http', ['7', '--name=x', '--site=here'], ['7', '--name=x']),
    ],
)
def test_books_are_prepared_by_the_command_in_the_line(site, monkeypatch, bad, good):
    for module in (gutenberg, gutenberg.text):
        monkeypatch.setattr(module, 'DATA', Path('data'))
    message = refused(books.main, bad)
    if 'python' in message:
        assert f'prepare.py {" ".join(good)}' in message
    serve(7, 12, 84, 1342, *books.SETS['poems'])
    books.main([*good, '--tokenizer=byte', f'--site={site}'])
    name = good[-1].partition('=')[2]
    assert 'night' in text_of('train', f'data/{name}')


@pytest.mark.parametrize('name', books.SETS)
def test_a_set_is_prepared_by_its_name(site, name, monkeypatch):
    monkeypatch.setattr(gutenberg, 'DATA', Path('data'))
    serve(*books.SETS[name])
    books.main([name, '--tokenizer=byte', f'--site={site}'])
    assert len(asked()) == 1 + len(books.SETS[name])
    for number in books.SETS[name]:
        assert f'a {number} night' in text_of('train', f'data/{name}')


@needs_gpt2
def test_the_name_of_a_set_is_enough_for_training(site, tmp_path, monkeypatch):
    folder = tmp_path / 'data' / 'gutenberg'
    folder.mkdir(parents=True)
    script = Path(books.__file__).read_text(encoding='utf-8')
    (folder / 'prepare.py').write_text(script, encoding='utf-8')
    for module in ('dataset', 'gutenberg'):
        monkeypatch.setattr(f'flatgpt.data.{module}.DATA', tmp_path / 'data')
    monkeypatch.setattr(gutenberg, 'SITE', site)
    monkeypatch.setitem(sys.modules, 'data.gutenberg.prepare', books)  # and restored at the end
    serve(*books.SETS['poe'])
    assert open_data('poe', 16).tokenizer.name == 'gpt2'
    message = refused(open_data, 'poee', 16)
    assert 'did you mean poe?' in message


def test_a_set_can_be_combined_with_book_numbers(site):
    serve(*books.SETS['poe'], 7)
    books.main(['poe', '7', '2147', '--out_dir=out', '--tokenizer=byte', f'--site={site}'])
    assert len(list((gutenberg.FOLDER / 'books').iterdir())) == 6
    assert text_of('train').count('a 2147 night') < 40  # once


# --- the SRE books

PAGE = """<!DOCTYPE html>
<html lang="en"><head><title>Google SRE - {title}</title>
<style>p {{ color: red }}</style><script>var hidden = "<p>script</p>";</script></head>
<body><header class="top"><a href="/books/">Books</a> Menu</header>
<main>
<div class="header"><nav><ul><li><a href="{book}table-of-contents/">Table of Contents</a></li>
<li><a href="/resources/">Menu</a></li></ul></nav></div>
<div id="maia-main" role="main">
<div class="maia-teleport" id="content"></div>
<div class="content">
{content}
</div>
</div>
<div class="footer"><a href="{book}index/">Next</a>
<p>Copyright 2017. Licensed under CC BY-NC-ND 4.0</p></div>
</main><script>end()</script></body></html>
"""
CHAPTER = """<section data-type="chapter" id="c{number}">
<h1 class="heading">Chapter {number} of
  Plain&nbsp;Things</h1>
<p class="byline author">Written by Some Body</p>
<p>Hope is   not a <em>plan</em>,
and <a href="/sre-book/elsewhere/">a link</a> is text<sup><a data-type="noteref"
href="#note">1</a></sup> &amp; more. {filler}</p><!-- a comment -->
<section data-type="sect1"><h2>A Part</h2>
<ul><li>one</li>
<li><p>two<br>and a half, set <code>x = 1</code></p>
<ol><li>first</li><li>second</li></ol></li></ul>
<table><tr><th>Budget</th><th>Days</th></tr>
<tr><td>99%</td><td>3.65</td></tr></table>
<pre data-type="programlisting">for <code>x</code> in y:

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
    return sre.markdown(PAGE.format(title='x', book='/sre-book/', content=content).encode())


def test_a_chapter_becomes_markdown():
    assert (
        parsed(CHAPTER.format(number=1, filler=''))
        == """# Chapter 1 of Plain Things

Written by Some Body

Hope is not a plan, and a link is text & more.

## A Part

- one
- two and a half, set `x = 1`
  1. first
  2. second

| Budget | Days |
| 99% | 3.65 |

```
for x in y:

    print(x)
```

Figure 1. A thing
"""
    )


def test_text_outside_paragraphs_and_unclosed_tags_are_parsed():
    assert parsed('loose <b>text</b><p>one<p>two<ul><li>three<li>four</ul></i><p>five') == (
        'loose text\n\none\n\ntwo\n\n- three\n  - four\n\nfive\n'
    )


def test_a_page_that_is_not_html_has_no_text():
    assert [sre.markdown(page) for page in (b'', b'index.html', b'<?xml version="1.0"?><a/>')] == [
        ''
    ] * 3


def test_a_deeply_nested_page_is_one_line():
    assert 'is damaged' in sre.chapter_problem(b'<div role="main">' + b'<p>deeper' * 5000)


def test_both_books_are_read_from_their_tables_of_contents(site, monkeypatch):
    monkeypatch.setattr(sre, 'SITE', site)
    serve_books()
    sre.main(['--out_dir=out', '--tokenizer=byte'])
    pages = [f'{book}{name}/' for book, names in NAMES.items() for name in names]
    tables = [f'{book}table-of-contents/' for book in NAMES]
    assert asked() == ['/robots.txt', *tables, *pages]
    assert text_of('val').startswith('# Chapter chapter-0 of Plain Things\n\n')  # one in ten
    assert text_of('train').startswith('# Chapter chapter-1 of Plain Things\n\n')
    assert text_of('train').count('<|endoftext|># Chapter ') == 8
    for stray in ('Menu', 'Licensed', 'script', 'Next', 'end()'):
        assert stray not in text_of('train')
    sre.main(['--out_dir=out', '--tokenizer=byte'])
    assert len(asked()) == 13


def test_a_moved_chapter_is_one_line_and_the_others_are_kept(site, monkeypatch):
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
    kept.write_text(Server.pages['/workbook/b/'], encoding='utf-8')  # as the line advises
    sre.main(['--out_dir=out', '--tokenizer=byte'])
    assert asked()[before:] == ['/workbook/d/']


def test_a_table_of_contents_without_chapters_is_one_line(site, monkeypatch):
    monkeypatch.setattr(sre, 'SITE', site)
    Server.pages['/sre-book/table-of-contents/'] = PAGE.format(title='', book='/', content='<p>new')
    message = refused(sre.main, ['--out_dir=out', '--tokenizer=byte'])
    assert message.startswith(
        f'{site}/sre-book/table-of-contents/ cannot be fetched (it lists no chapters; the site '
        'may have changed)'
    )
    assert str(sre.FOLDER / 'pages' / 'sre-book_table-of-contents.html') in message
    assert not list((sre.FOLDER / 'pages').iterdir())


def test_a_chapter_without_text_is_one_line(site, monkeypatch):
    monkeypatch.setattr(sre, 'SITE', site)
    serve_books()
    whole = Server.pages['/sre-book/chapter-2/']
    Server.pages['/sre-book/chapter-2/'] = '<html><div>Loading ...</div></html>'
    message = refused(sre.main, ['--out_dir=out', '--tokenizer=byte'])
    assert f'{site}/sre-book/chapter-2/ cannot be fetched (it has no text in its main' in message
    assert not Path('out').exists()
    Server.pages['/sre-book/chapter-2/'] = whole
    before = len(asked())
    sre.main(['--out_dir=out', '--tokenizer=byte'])
    assert asked()[before] == '/sre-book/chapter-2/'  # those before it are kept


@needs_gpt2
@pytest.mark.parametrize(('argv', 'recipe'), [([], 'finetune_poe'), (['--tokenizer=byte'], 'auto')])
def test_the_matching_config_is_suggested(site, argv, recipe, capsys):
    serve(*books.SETS['poe'])
    books.main(['poe', '--out_dir=out', f'--site={site}', *argv])
    assert f'Train on it: python train.py config/{recipe}.py --dataset=' in capsys.readouterr().out


@needs_gpt2
def test_the_name_of_the_dataset_is_enough(site, tmp_path, monkeypatch):
    folder = tmp_path / 'data' / 'sre'
    folder.mkdir(parents=True)
    script = Path(sre.__file__).read_text(encoding='utf-8')
    (folder / 'prepare.py').write_text(script.replace(sre.SITE, site), encoding='utf-8')
    monkeypatch.setattr('flatgpt.data.dataset.DATA', tmp_path / 'data')
    monkeypatch.setitem(sys.modules, 'data.sre.prepare', sre)  # and restored at the end
    serve_books()
    assert open_data('sre', 16).tokenizer.name == 'gpt2'
    assert (folder / 'pages' / 'workbook_intro.html').exists()


# --- training on them

SMALLER = ('--batch_size=2', '--gradient_accumulation_steps=1', '--eval_interval=2',
           '--sample_tokens=0', '--eval_sample_tokens=0', '--device=cpu', '--dtype=float32',
           '--compile=False')  # fmt: skip


@pytest.fixture
def gpt2(tmp_path):
    """A tiny GPT-2 on bytes, exported for transformers."""
    folder, tokenizer = tmp_path / 'tiny-gpt2', byte_tokenizer()
    model = random_model(tokenizer.vocab_size, 256, n_layer=1, n_head=2, n_embd=16, bias=True)
    export_transformers(model, tokenizer, {}, folder)
    return folder


@pytest.mark.parametrize('name', ['sre', 'poe', 'poems'])
def test_gpt2_is_fine_tuned_on_them_and_its_console_continues_text(
    name, site, gpt2, run_here, script, monkeypatch
):
    monkeypatch.setattr(sre, 'SITE', site)
    serve_books()
    if name == 'sre':
        sre.main(['--out_dir=out', '--tokenizer=byte'])
    else:
        serve(*books.SETS[name])
        books.main([name, '--out_dir=out', '--tokenizer=byte', f'--site={site}'])
    config = ROOT / 'config' / f'finetune_{name}.py'
    args = [f'--init_from={gpt2}', '--dataset=./out', '--out_dir=run', '--epochs=0.5', *SMALLER]
    assert run_here(*args, config=config) == 0
    losses = list(metrics('run', 'val_loss').values())
    assert losses[-1] < losses[0]
    if name == 'sre':
        chat = script(
            *('sample.py', '--out_dir=run', '--chat', '--max_new_tokens=8'),
            cwd=Path.cwd(), input='What is an error budget?\n/quit\n',
        )  # fmt: skip
        greeting, _, answer = chat.stdout.partition('\n')
        assert chat.returncode == 0, chat.stderr
        assert 'it continues what you type' in greeting
        assert answer.strip('\n')
