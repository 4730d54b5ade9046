"""Downloads for datasets: files verified by sha256, web pages as robots.txt allows."""

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

from flatgpt.errors import UserError, reason_of
from flatgpt.files import atomic_file, nearest_existing

ATTEMPTS = 3
USER_AGENT = 'flatGPT'  # our name in robots.txt
HEADERS = {'User-Agent': f'{USER_AGENT}/0.1 (prepares a text dataset; each page is fetched once)'}
REQUEST_DELAY = 1.0  # seconds before each request for a page, unless robots.txt asks for more
LOG_IN = 'log in with `hf auth login`, or set HF_TOKEN'
NETWORK_PROBLEMS = {  # part of the name of an exception or of its bases
    'GatedRepo': f'it is gated: request access on its page and {LOG_IN}',
    'DatasetNotFound': f'it is gated or private, or does not exist: check the name, or {LOG_IN}',
    'RepositoryNotFound': f'no such repository, or a private one: check the name, or {LOG_IN}',
    'Timeout': 'no answer in time',
    'SSL': 'its certificate is not accepted',
    'Offline': 'HF_HUB_OFFLINE is set',
    'Connect': 'no connection',
    'Chunked': 'the connection was lost',
    'LocalEntryNotFound': 'no connection, or HF_HUB_OFFLINE is set',
}
MAX_RETRY_DELAY = 120  # seconds; give up if a server asks for more


def download_folder(own: Path, out_dir: Path) -> Path:
    """Where to keep downloads: the dataset's own folder, or in a read-only clone the folder that
    the dataset is written to."""
    return own if os.access(nearest_existing(own), os.W_OK) else out_dir


def fetch(url: str, path: str | Path, sha256: str) -> None:
    """
    Download `url` to `path`, with a temporary name until its sha256 is verified. An existing file
    is kept. Without a network: UserError that says where to put the file.
    """
    path = Path(path)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part:
        found = download(url, part)
        if found != sha256:
            raise UserError(
                f'{url}: the downloaded file has sha256 {found}, not the expected {sha256}; get '
                f'it by other means and save it as {path}'
            )


def fetch_page(
    urls: list[str],
    path: str | Path,
    find_problem: Callable[[bytes], str | None] = lambda page: None,
) -> bytes:
    """
    The page at the first of `urls` that exists. It is fetched once, as the site's robots.txt
    allows, and kept at `path`; an existing file there is used instead.

    find_problem: returns what is wrong with a page, or None. Such a page is not kept. UserError
    then, or if no page exists, or if it has moved.
    """
    path = Path(path)
    if path.exists():
        page = path.read_bytes()
        if wrong := find_problem(page):
            raise UserError(f'{path}: {wrong}; delete it to fetch it again from {urls[0]}')
        return page
    path.parent.mkdir(parents=True, exist_ok=True)
    page = with_retries(lambda: get_page(urls, find_problem), urls[0], path)
    with atomic_file(path) as part:
        part.write_bytes(page)
    return page


def get_page(urls: list[str], find_problem: Callable) -> bytes:
    import requests

    url, *others = urls
    rules = robots(urljoin(url, '/robots.txt'))
    if not rules.can_fetch(USER_AGENT, url):
        raise PermanentError('robots.txt disallows it')
    time.sleep(max(REQUEST_DELAY, rules.crawl_delay(USER_AGENT) or 0))
    with requests.get(url, timeout=20, headers=HEADERS) as reply:
        if reply.status_code == 404 and others:
            return get_page(others, find_problem)
        reply.raise_for_status()
        if normalized_address(reply.url) != normalized_address(url):
            raise PermanentError(f'it has moved to {reply.url}')
        if wrong := find_problem(reply.content):
            raise PermanentError(f'it {wrong}')
        return reply.content


@functools.cache
def robots(url: str) -> RobotFileParser:
    """The rules of a site; without a robots.txt everything is allowed (RFC 9309, 2.3.1.3)."""
    import requests

    rules = RobotFileParser(url)
    time.sleep(REQUEST_DELAY)
    with requests.get(url, timeout=20, headers=HEADERS) as reply:
        if reply.status_code == 429 or reply.status_code >= 500:
            reply.raise_for_status()
        rules.parse(reply.text.splitlines() if reply.ok else [])
    return rules


def normalized_address(url: str) -> tuple[str, str, str]:
    """The address without scheme, www. and trailing slash, which a server may add."""
    parts = urlsplit(url)
    return parts.netloc.removeprefix('www.'), parts.path.rstrip('/'), parts.query


class PermanentError(Exception):
    """An error that a retry would not fix."""


def download(url: str, part: Path) -> str:
    """Download `url` to the file `part` -> its sha256"""
    return with_retries(lambda: stream_to_file(url, part), url, part.with_suffix(''))


def with_retries(request: Callable, url: str, path: Path | None = None):
    """What `request` returns, with up to three attempts. UserError says how to do without it.

    path: where the user may save the file instead.
    """
    import requests  # slow, and not installed with torch and transformers

    for attempt in range(ATTEMPTS):
        try:
            return request()
        except (requests.RequestException, PermanentError) as error:
            wait = None
            if not isinstance(error, PermanentError):
                wait = retry_delay(error.response, 2**attempt)
            if wait is None or attempt == ATTEMPTS - 1:
                fix = 'check the address and the network'
                if path:
                    fix = f'get the file by other means and save it as {path}'
                raise UserError(
                    f'{url} cannot be fetched ({network_problem(error)}); {fix}'
                ) from error
        time.sleep(wait)


def retry_delay(response, usual: float) -> float | None:
    """Seconds before the next attempt; None if a retry would not help. See RFC 9110, 10.2.3.

    response: a requests.Response, None without one.
    """
    if response is None:
        return usual
    if response.status_code < 500 and response.status_code != 429:
        return None
    asked = response.headers.get('Retry-After', '')
    wait = int(asked) if asked.isdecimal() else usual
    with contextlib.suppress(TypeError, ValueError):
        wait = (parsedate_to_datetime(asked) - datetime.now(timezone.utc)).total_seconds()
    return max(wait, usual) if wait <= MAX_RETRY_DELAY else None


def network_problem(error: Exception) -> str:
    """Why a request of requests, httpx or huggingface_hub failed, without the name of a class."""
    cause = error
    while cause is not None and not hasattr(cause, 'response'):
        cause = cause.__cause__
    error = cause or error  # the answer of the server, if there was one
    kinds = ' '.join(kind.__name__ for kind in type(error).__mro__)
    found = next((text for name, text in NETWORK_PROBLEMS.items() if name in kinds), None)
    response = getattr(error, 'response', None)
    if found is None and response is not None:
        return response_problem(response)
    return found or reason_of(error)


def response_problem(response) -> str:
    """What a server answered: 'HTTP 429, retry after 60', or that it does not know the token."""
    if 'Invalid credentials' in response.headers.get('X-Error-Message', ''):
        return f'the token is not valid: {LOG_IN}'
    asked = response.headers.get('Retry-After')
    return f'HTTP {response.status_code}' + (f', retry after {asked}' if asked else '')


def stream_to_file(url: str, part: Path) -> str:
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
