"""Fetching a dataset's file once, whole and checked."""

import hashlib
import os
import time
from pathlib import Path

import requests
from tqdm import tqdm

from configurator import UserError

ATTEMPTS = 3


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


def download(url: str, part: Path) -> str:
    """Write what `url` holds to `part`; three attempts. -> its sha256"""
    for attempt in range(ATTEMPTS):
        try:
            return stream(url, part)
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else None
            refused = status is not None and status < 500
            if refused or attempt == ATTEMPTS - 1:
                reason = f'HTTP {status}' if status else type(error).__name__
                raise UserError(
                    f'{url} cannot be fetched ({reason}); get the file by other means and put it '
                    f'at {part.with_suffix("")}'
                ) from error
        time.sleep(2**attempt)


def stream(url: str, part: Path) -> str:
    digest = hashlib.sha256()
    with requests.get(url, stream=True, timeout=20) as reply, part.open('wb') as file:
        reply.raise_for_status()
        total = int(reply.headers.get('content-length', 0)) or None
        name = url.rsplit('/', 1)[-1]
        with tqdm(total=total, unit='B', unit_scale=True, desc=name, disable=None) as bar:
            for block in reply.iter_content(2**20):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
    return digest.hexdigest()
