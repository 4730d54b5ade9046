"""
The files of published packages of PyPI, npm and Debian. No code of a package is run.

    folder = unpacked('pypi:django==5.2.8', Path('kept'))

The registry's own program finds and downloads a package. Only its regular files are unpacked, and
only inside the folder. A file compressed by gzip is unpacked too and loses its .gz.
"""

import gzip
import re
import shutil
import stat
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO
from urllib.parse import unquote, urldefrag, urlsplit
from urllib.request import url2pathname

from flatgpt.data.download import stream_to_file, with_retries
from flatgpt.errors import UserError

SPECS = {  # registry -> how it writes a package and its version
    'pypi': (re.compile(r'([A-Za-z0-9][\w.-]*)(?:==([\w.+!]+))?'), 'pypi:django==5.2.8'),
    'npm': (re.compile(r'((?:@\w[\w.-]*/)?\w[\w.-]*)(?:@(\w[\w.+-]*))?'), 'npm:typescript@5.9.3'),
    'debian': (re.compile(r'([a-z0-9][a-z0-9.+-]+)(?:=([\w.+:~-]+))?'), 'debian:debian-policy'),
}
# what `pip index versions -vv` prints of each file that fits this machine
FOUND_LINK = re.compile(r'Found link (\S+?)(?: \(.*\))?, version: (\S+)$', re.M)
UNREACHABLE = re.compile(r'Could not fetch URL .*?: (?:connection error|timed out)')
AVAILABLE = re.compile(r'^Available versions: (.*)', re.M)
NO_CONNECTION = re.compile(
    r'connection broken by|problem confirming the ssl certificate|Could not connect|'
    r'Temporary failure resolving|\b(?:ECONNREFUSED|ENOTFOUND|EAI_AGAIN|ETIMEDOUT)\b'
)
# a network that is down is reported within seconds, not minutes
NPM_FLAGS = ['--ignore-scripts', '--fetch-retries=1', '--fetch-retry-mintimeout=2000']
ERROR_LINE = re.compile(r'^(?:ERROR: |E: |npm (?:error|ERR!) (?!code|errno|syscall))(.*)', re.M)
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error, LZMAError)


def unpacked(package: str, keep: Path) -> Path:
    """The folder with the files of a package, which is fetched once and kept in `keep`.

    package: pypi:NAME==VERSION, npm:NAME@VERSION or debian:NAME=VERSION, or without a version.
    """
    registry, name, version = parse(package)
    folder = keep / re.sub('[/:]', '-', package)
    if folder.is_dir():
        return folder
    fetch = {'pypi': fetch_from_pypi, 'npm': fetch_from_npm, 'debian': fetch_from_debian}
    keep.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=keep, prefix='.') as temporary:
        archive = fetch[registry](name, version, Path(temporary))
        print(f'{package}: {archive.name}', flush=True)
        files = Path(temporary, 'files')
        try:
            unpack(archive, files)
        except DAMAGED as error:
            raise UserError(
                f'{package}: {archive.name} is damaged ({error}); run the command again'
            ) from error
        if not folder.is_dir():  # another process may have been faster
            files.rename(folder)
    return folder


def parse(package: str) -> tuple[str, str, str | None]:
    """(registry, name, version) of REGISTRY:NAME, with or without a version."""
    registry, _, rest = package.partition(':')
    if registry not in SPECS:
        examples = ', '.join(example for _, example in SPECS.values())
        raise UserError(f'{package}: must begin with a registry, as in {examples}')
    pattern, example = SPECS[registry]
    if not (found := pattern.fullmatch(rest)):
        raise UserError(f'{package}: not a package name; write it as in {example}')
    return registry, found[1], found[2]


# --- fetching


def fetch_from_pypi(name: str, version: str | None, folder: Path) -> Path:
    """The source archive of a release, or a wheel if it has none.

    pip only finds the file: `pip download` would run the build script of a source archive.
    """
    options = ['-vv', '--ignore-requires-python', *(['--pre'] if version else [])]
    listing = run(f'pypi:{name}', folder, ['pip', 'index', 'versions', name, *options])
    if UNREACHABLE.search(listing):  # a file from another index may be older, or only a wheel
        raise UserError(
            f'pypi:{name}: pip cannot connect to one of its indexes; check the network, or set '
            'PIP_NO_INDEX=1 for what is in PIP_FIND_LINKS'
        )
    released = AVAILABLE.search(listing)[1].split(', ')
    wanted = version or released[0]
    urls = [urldefrag(url).url for url, each in FOUND_LINK.findall(listing) if each == wanted]
    if not urls:
        raise UserError(
            f'pypi:{name}: has no file of version {wanted}; choose another version: '
            f'{", ".join(released[:5])}'
        )
    url = min(urls, key=lambda url: url.endswith('.whl'))
    archive = folder / unquote(urlsplit(url).path.rpartition('/')[2])
    if url.startswith('file:'):
        shutil.copyfile(url2pathname(urlsplit(url).path), archive)
    else:
        with_retries(lambda: stream_to_file(url, archive), url)
    return archive


def fetch_from_npm(name: str, version: str | None, folder: Path) -> Path:
    wanted = f'{name}@{version}' if version else name
    run(f'npm:{wanted}', folder, ['npm', 'pack', wanted, *NPM_FLAGS])
    return next(folder.glob('*.tgz'))


def fetch_from_debian(name: str, version: str | None, folder: Path) -> Path:
    wanted = f'{name}={version}' if version else name
    run(f'debian:{wanted}', folder, ['apt-get', 'download', wanted])
    return next(folder.glob('*.deb'))


def run(package: str, folder: Path, command: list[str], stdout=subprocess.PIPE) -> str:
    """What a registry's program prints when it is run in a folder, unless stdout is a file."""
    program = shutil.which(command[0])
    if program is None:
        raise UserError(
            f'{package}: needs the program {command[0]}, which is not installed; install it, or '
            f'use another registry: {", ".join(SPECS)}'
        )
    done = subprocess.run(
        [program, *command[1:]],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding='utf-8',
        errors='replace',
    )
    if done.returncode:
        raise UserError(
            f'{package}: {command[0]} failed ({find_reason(done.stderr)}); check the name, '
            'the version and the network'
        )
    return done.stdout


def find_reason(messages: str) -> str:
    """Why pip, npm, apt-get or dpkg-deb failed, from what it printed."""
    if NO_CONNECTION.search(messages):
        return 'no connection'
    errors = [line.strip() for line in ERROR_LINE.findall(messages)]
    lines = [line.strip() for line in messages.splitlines()]
    return next(filter(None, errors + lines), 'no message')[:200]


# --- unpacking


def unpack(archive: Path, folder: Path) -> None:
    """Write the regular files of an archive into a new folder."""
    folder.mkdir()
    root = folder.resolve()
    top = 0 if archive.suffix in ('.whl', '.deb') else 1  # all files are in django-5.2.8/
    for name, stream in members(archive):
        path = root.joinpath(*PurePosixPath(name).parts[top:])
        if path == root or not path.resolve().is_relative_to(root):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open('wb') as file:
            shutil.copyfileobj(stream, file)
        if path.suffix == '.gz':
            gunzip(path)


def members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The regular files of an archive: not folders, links or devices."""
    if archive.suffix in ('.whl', '.zip'):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
                    yield info.filename, zipped.open(info)
        return
    if archive.suffix == '.deb':
        package, archive = archive.name, archive.with_suffix('.tar')
        with archive.open('wb') as file:
            run(package, archive.parent, ['dpkg-deb', '--fsys-tarfile', package], file)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isreg():
                yield member.name, tar.extractfile(member)


def gunzip(path: Path) -> None:
    """Unpack a file that is compressed by gzip, without .gz in the name; keep a damaged one."""
    content = path.with_suffix('')
    if content.exists():
        return
    try:
        with gzip.open(path) as source, content.open('wb') as file:
            shutil.copyfileobj(source, file)
        path.unlink()
    except DAMAGED:
        content.unlink()
