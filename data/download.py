"""Fetching what a dataset is made from: a file once, whole and checked; a site's pages politely."""

import functools
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urljoin, urlsplit
from urllib.robotparser import RobotFileParser

import requests
from tqdm import tqdm

from configurator import UserError

ATTEMPTS = 3
AGENT = 'flatGPT'  # what robots.txt may call us
HEADERS = {'User-Agent': f'{AGENT}/0.1 (prepares a text dataset; each page is fetched once)'}
PAUSE = 1.0  # seconds before each request for a page


def fetch(url: str, path: str | Path, sha256: str) -> None:
    """
    Download `url` to `path`, under another name until its sha256 is found right. A file already
    at `path` is left as it is. Without a network: UserError that says where to put the file.
    """
    path = Path(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f'{path}.part')
    try:
        found = download(url, part)
        if found != sha256:
            raise UserError(
                f'{url}: what was fetched has sha256 {found}, not the expected {sha256}; get the '
                f'file by other means and put it at {path}'
            )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def fetch_page(url: str, path: str | Path) -> bytes:
    """
    What `url` holds. It is fetched once, one request at a time, if the site's robots.txt allows it,
    and kept at `path`, where it is looked for first. UserError if it is not there, or has moved.
    """
    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        content = with_patience(lambda: get_page(url), url, path)
        part = Path(f'{path}.part')
        part.write_bytes(content)
        os.replace(part, path)
    return path.read_bytes()


def get_page(url: str) -> bytes:
    if not robots(urljoin(url, '/robots.txt')).can_fetch(AGENT, url):
        raise Refused('robots.txt asks programs not to')
    time.sleep(PAUSE)
    with requests.get(url, timeout=20, headers=HEADERS) as reply:
        reply.raise_for_status()
        if address(reply.url) != address(url):
            raise Refused(f'it has moved to {reply.url}')
        return reply.content


@functools.cache
def robots(url: str) -> RobotFileParser:
    """The rules of a site; one without robots.txt allows everything (RFC 9309, 2.3.1.3)."""
    rules = RobotFileParser(url)
    time.sleep(PAUSE)
    with requests.get(url, timeout=20, headers=HEADERS) as reply:
        if reply.status_code >= 500:
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


def with_patience(request: Callable, url: str, path: Path):
    """What `request` returns, in three attempts. UserError says where else to put the file."""
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except (requests.RequestException, Refused) as error:
            response = getattr(error, 'response', None)
            status = response.status_code if response is not None else None
            final = isinstance(error, Refused) or (status is not None and status < 500)
            if final or attempt == ATTEMPTS - 1:
                reason = f'HTTP {status}' if status else type(error).__name__
                reason = str(error) if isinstance(error, Refused) else reason
                raise UserError(
                    f'{url} cannot be fetched ({reason}); get the file by other means and put it '
                    f'at {path}'
                ) from error
        time.sleep(2**attempt)


def stream(url: str, part: Path) -> str:
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
