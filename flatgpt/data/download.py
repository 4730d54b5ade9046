"""Fetching what a dataset is made from: a file once, whole and checked; a site's pages politely."""

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urljoin, urlsplit
from urllib.robotparser import RobotFileParser

from tqdm import tqdm

from flatgpt.errors import UserError
from flatgpt.files import atomic_file, nearest_existing

ATTEMPTS = 3
AGENT = 'flatGPT'  # what robots.txt may call us
HEADERS = {'User-Agent': f'{AGENT}/0.1 (prepares a text dataset; each page is fetched once)'}
PAUSE = 1.0  # seconds before each request for a page, if robots.txt does not ask for more
LONGEST_WAIT = 120  # seconds, if a server says when to ask again


def place_to_keep(own: Path, out_dir: Path) -> Path:
    """Where to keep what is fetched: a dataset's own folder, or of a checkout that is only to be
    read, the folder that the dataset is written to."""
    return own if os.access(nearest_existing(own), os.W_OK) else out_dir


def fetch(url: str, path: str | Path, sha256: str) -> None:
    """
    Download `url` to `path`, under another name until its sha256 is found right. A file already
    at `path` is left as it is. Without a network: UserError that says where to put the file.
    """
    path = Path(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part:
        found = download(url, part)
        if found != sha256:
            raise UserError(
                f'{url}: what was fetched has sha256 {found}, not the expected {sha256}; get the '
                f'file by other means and put it at {path}'
            )


def fetch_page(
    urls: list[str], path: str | Path, flaw: Callable[[bytes], str | None] = lambda page: None
) -> bytes:
    """
    The page at the first of the addresses where there is one. It is fetched once, as the site's
    robots.txt allows, and kept at `path`, where it is looked for first.

    flaw: says what is wrong with a page, if anything is; such a page is not kept. UserError then,
    and where there is no page, or only one that says where it has moved to.
    """
    path = Path(path)
    if path.exists():
        page = path.read_bytes()
        if wrong := flaw(page):
            raise UserError(f'{path}: {wrong}; delete it, and it is fetched again from {urls[0]}')
        return page
    path.parent.mkdir(parents=True, exist_ok=True)
    page = with_patience(lambda: get_page(urls, flaw), urls[0], path)
    with atomic_file(path) as part:
        part.write_bytes(page)
    return page


def get_page(urls: list[str], flaw: Callable) -> bytes:
    import requests

    url, *others = urls
    rules = robots(urljoin(url, '/robots.txt'))
    if not rules.can_fetch(AGENT, url):
        raise Refused('robots.txt asks programs not to')
    time.sleep(max(PAUSE, rules.crawl_delay(AGENT) or 0))
    with requests.get(url, timeout=20, headers=HEADERS) as reply:
        if reply.status_code == 404 and others:
            return get_page(others, flaw)
        reply.raise_for_status()
        if address(reply.url) != address(url):
            raise Refused(f'it has moved to {reply.url}')
        if wrong := flaw(reply.content):
            raise Refused(f'it {wrong}')
        return reply.content


@functools.cache
def robots(url: str) -> RobotFileParser:
    """The rules of a site; one without robots.txt allows everything (RFC 9309, 2.3.1.3)."""
    import requests

    rules = RobotFileParser(url)
    time.sleep(PAUSE)
    with requests.get(url, timeout=20, headers=HEADERS) as reply:
        if reply.status_code == 429 or reply.status_code >= 500:
            reply.raise_for_status()
        rules.parse(reply.text.splitlines() if reply.ok else [])
    return rules


def address(url: str) -> tuple[str, str, str]:
    """What stays the same where a server only adds www, https or the last slash."""
    parts = urlsplit(url)
    return parts.netloc.removeprefix('www.'), parts.path.rstrip('/'), parts.query


class Refused(Exception):
    """Why asking again would not help."""


def download(url: str, part: Path) -> str:
    """Write what `url` holds to `part` -> its sha256"""
    return with_patience(lambda: stream(url, part), url, part.with_suffix(''))


def with_patience(request: Callable, url: str, path: Path | None = None):
    """What `request` returns, in three attempts. UserError says where else to put the file."""
    import requests  # slow, and on no machine that brings torch and transformers alone

    for attempt in range(ATTEMPTS):
        try:
            return request()
        except (requests.RequestException, Refused) as error:
            wait = None
            if not isinstance(error, Refused):
                wait = seconds_to_wait(error.response, 2**attempt)
            if wait is None or attempt == ATTEMPTS - 1:
                cure = f'; get the file by other means and put it at {path}' if path else ''
                raise UserError(f'{url} cannot be fetched ({reason(error)}){cure}') from error
        time.sleep(wait)


def seconds_to_wait(response, usual: float) -> float | None:
    """Before asking again; None if that would not help. Retry-After is of RFC 9110, 10.2.3.

    response: of requests, None if there was no answer.
    """
    if response is None:
        return usual
    if response.status_code < 500 and response.status_code != 429:
        return None
    asked = response.headers.get('Retry-After', '')
    wait = int(asked) if asked.isdecimal() else usual
    with contextlib.suppress(TypeError, ValueError):
        wait = (parsedate_to_datetime(asked) - datetime.now(timezone.utc)).total_seconds()
    return max(wait, usual) if wait <= LONGEST_WAIT else None


def reason(error: Exception) -> str:
    if isinstance(error, Refused):
        return str(error)
    if error.response is None:
        return type(error).__name__
    asked = error.response.headers.get('Retry-After')
    return f'HTTP {error.response.status_code}' + (f', to be tried after {asked}' if asked else '')


def stream(url: str, part: Path) -> str:
    import requests

    digest = hashlib.sha256()
    with (
        requests.get(url, stream=True, timeout=20, headers=HEADERS) as reply,
        part.open('wb') as file,
    ):
        reply.raise_for_status()
        total = int(reply.headers.get('content-length', 0)) or None
        name = url.rsplit('/', 1)[-1]
        with tqdm(total=total, unit='B', unit_scale=True, desc=name, disable=None) as bar:
            for block in reply.iter_content(2**20):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
    return digest.hexdigest()
