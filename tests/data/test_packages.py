"""Files of packages, from local archives and made-up pip, npm, apt-get and dpkg-deb programs."""

import functools
import gzip
import http.server
import io
import os
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from conftest import refused
from error_lines import case, error_line

from data.packages import prepare as packages
from flatgpt.data import download
from flatgpt.data.dataset import Dataset
from flatgpt.data.packages import find_reason, unpacked

WORDS = b'The cat sat on the mat, and the dog ran off. '
DOCS = {f'demo-1.2/docs/{name}': WORDS * 20 for name in ('a.txt', 'b.txt', 'more/c.txt')}
CODE = {'demo-1.2/setup.py': b'raise SystemExit("the code was run")\n', 'demo-1.2/empty.py': b''}
FOUND = '  Found link {} (from https://index/demo/) (requires-python:>=3.10), version: {}\n'
PROGRAMS = {  # each prints or copies the file of a package
    'pip': 'cat {registry}/$3.pip 2>/dev/null || '
    '{{ echo "ERROR: No matching distribution found for $3" >&2; exit 1; }}',
    'npm': 'cp {registry}/${{2##*/}}.tgz . 2>/dev/null || '
    '{{ echo "npm error code E404\nnpm error 404 Not Found - GET $2" >&2; exit 1; }}',
    'apt-get': 'cp {registry}/$2.deb . 2>/dev/null || '
    '{{ echo "E: Unable to locate package $2" >&2; exit 100; }}',
    'dpkg-deb': 'cat $2',
}


@pytest.fixture(autouse=True)
def registry(tmp_path, monkeypatch):
    """The folder of a made-up registry; its programs are first on the PATH, and log their calls."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packages, 'FOLDER', tmp_path / 'packages')
    monkeypatch.setenv('PATH', f'{tmp_path / "bin"}:{os.environ["PATH"]}')
    folder = tmp_path / 'registry'
    for each in (folder, tmp_path / 'bin'):
        each.mkdir()
    for name in PROGRAMS:
        install(name)
    publish_on_pypi(DOCS | CODE)
    return folder


def install(name):
    script = PROGRAMS[name].format(registry=Path('registry').absolute())
    log = Path('registry/log').absolute()
    Path('bin', name).write_text(f'#!/bin/sh\necho {name} "$@" >>{log}\n{script}\n')
    Path('bin', name).chmod(0o755)


def calls():
    return Path('registry/log').read_text().splitlines()


def make_tar(path, files, mode='w:gz'):
    """files: {name: content, or a TarInfo without content}"""
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b'' if isinstance(content, tarfile.TarInfo) else content
            info.name, info.size = name, len(data)
            tar.addfile(info, io.BytesIO(data))


def publish_on_pypi(files, name='demo', version='1.2', place=None):
    archive = Path('registry', f'{name}-{version}.tar.gz').absolute()
    make_tar(archive, files)
    listing = Path('registry', f'{name}.pip')
    older = listing.read_text() if listing.exists() else ''
    url = f'{place or archive.parent.as_uri()}/{archive.name}#sha256=0'
    listing.write_text(f'{FOUND.format(url, version)}Available versions: {version}\n{older}')


def special(kind, target=''):
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def fetched(package='pypi:demo'):
    """{name: content} of the files of a package."""
    folder = unpacked(package, Path('kept'))
    paths = [path for path in folder.rglob('*') if not path.is_dir()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def prepare(*argv, tokenizer='byte'):
    packages.main([*argv, '--out_dir=out', f'--tokenizer={tokenizer}'])
    meta = Dataset('out', 1).tokens
    return meta['train'] + meta['val']


# --- fetching


def test_the_source_archive_of_the_newest_release_is_used():
    publish_on_pypi({'demo-1.3/docs/new.txt': WORDS}, version='1.3')
    assert fetched() == {'docs/new.txt': WORDS}
    assert set(fetched('pypi:demo==1.2')) == {'docs/a.txt', 'docs/b.txt', 'docs/more/c.txt',
                                              'setup.py', 'empty.py'}  # fmt: skip


def test_a_release_without_a_source_archive_is_read_from_its_wheel(registry):
    with zipfile.ZipFile(registry / 'wheel-1-py3-none-any.whl', 'w') as wheel:
        wheel.writestr('wheel/__init__.py', WORDS)
        link = zipfile.ZipInfo('wheel/link.py')
        link.external_attr = 0o120777 << 16
        wheel.writestr(link, '/etc/passwd')
    url = (registry / 'wheel-1-py3-none-any.whl').as_uri()
    listing = FOUND.format(url, '1') + 'Available versions: 1\n'
    (registry / 'wheel.pip').write_text(listing)
    assert fetched('pypi:wheel') == {'wheel/__init__.py': WORDS}


def test_an_archive_is_downloaded_from_the_address_that_pip_prints(monkeypatch, registry):
    monkeypatch.setenv('NO_PROXY', '*')
    monkeypatch.setattr(download, 'ATTEMPTS', 1)
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=registry)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, 'log_message', lambda *_: None)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), serve) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f'http://127.0.0.1:{server.server_port}'
        publish_on_pypi({'far-1/a.txt': WORDS}, 'far', '1', place=address)
        files = fetched('pypi:far')
        server.shutdown()
        thread.join()
    assert files == {'a.txt': WORDS}
    message = refused(unpacked, 'pypi:far', Path('other'))
    assert 'cannot be fetched (no connection); check the address and the network' in message


@pytest.mark.skipif(not shutil.which('pip'), reason='needs pip')
def test_pip_itself_finds_a_source_archive_whose_code_is_not_run(monkeypatch, registry):
    Path('bin/pip').unlink()
    for name, value in dict(CONFIG_FILE=os.devnull, NO_INDEX='1', FIND_LINKS=str(registry)).items():
        monkeypatch.setenv(f'PIP_{name}', value)
    assert fetched('pypi:demo')['docs/a.txt'] == WORDS * 20
    assert 'No matching distribution found for nosuch' in refused(fetched, 'pypi:nosuch')


@pytest.mark.parametrize('package', ['npm:demo@1.2', 'npm:@scope/demo@1.2', 'npm:demo'])
def test_an_npm_package_is_packed_without_its_scripts(registry, package):
    name = package.rpartition('/')[2].removeprefix('npm:')
    make_tar(registry / f'{name}.tgz', {'package/README.md': WORDS})
    assert fetched(package) == {'README.md': WORDS}
    assert f'npm pack {package.removeprefix("npm:")} --ignore-scripts' in calls()[0]


@pytest.mark.parametrize('package', ['debian:demo', 'debian:demo=1:1.2-3+deb~1'])
def test_a_debian_package_is_read_from_its_root(registry, package):
    name = package.partition(':')[2]
    page = gzip.compress(b'.TH DEMO 1\n')
    make_tar(registry / f'{name}.deb', {'./usr/share/man/demo.1.gz': page}, 'w')
    assert fetched(package) == {'usr/share/man/demo.1': b'.TH DEMO 1\n'}


def test_a_package_is_fetched_once():
    for _ in range(2):
        prepare('pypi:demo==1.2', 'pypi:demo==1.2', '--files=docs')
    assert len(calls()) == 1
    assert [path.name for path in Path('packages/files').iterdir()] == ['pypi-demo==1.2']


# --- unpacking


def test_only_regular_files_inside_the_folder_are_unpacked():
    publish_on_pypi({
        'demo-1.2/a.txt': WORDS,
        'demo-1.2/../../up.txt': WORDS,
        'demo-1.2/link.txt': special(tarfile.SYMTYPE, 'a.txt'),
        'demo-1.2/outside': special(tarfile.SYMTYPE, '/tmp'),
        'demo-1.2/outside/b.txt': WORDS,
        'demo-1.2/hard.txt': special(tarfile.LNKTYPE, 'demo-1.2/a.txt'),
        'demo-1.2/pipe': special(tarfile.FIFOTYPE),
        '/absolute/c.txt': WORDS,
    })  # fmt: skip
    assert set(fetched()) == {'a.txt', 'outside/b.txt', 'absolute/c.txt'}
    assert not list(Path('.').rglob('up.txt'))


def test_files_compressed_by_gzip_are_unpacked_and_damaged_ones_are_kept():
    packed = gzip.compress(WORDS * 20)
    kept = {'plain.gz': WORDS, 'cut.gz': packed[:-9], 'b': b'b', 'b.gz': packed}
    files = kept | {'a.1.gz': packed}
    publish_on_pypi({f'demo-1.2/{name}': content for name, content in files.items()})
    assert fetched() == kept | {'a.1': WORDS * 20}


def test_a_damaged_package_is_not_kept(registry):
    archive = registry / 'demo-1.2.tar.gz'
    archive.write_bytes(archive.read_bytes()[:-20])
    refused(unpacked, 'pypi:demo', Path('kept'))
    assert not list(Path('kept').iterdir())


# --- preparing


@pytest.mark.parametrize('files', [
    ['--files=docs/**/*.txt'],
    ['--files=docs'],
    ['--files=docs/*.txt', '--files=docs/more/*'],
    ['--files=docs', '--files=docs/*.txt', '--files=nosuch'],
])  # fmt: skip
def test_files_are_selected_by_patterns_and_folders(files):
    size = sum(map(len, DOCS.values()))
    assert size < prepare('pypi:demo', *files) < size + 10


def test_all_text_files_are_used_by_default(capsys):
    publish_on_pypi(DOCS | CODE | {'demo-1.2/.hidden': WORDS, 'demo-1.2/image.png': b'\x89PNG\0'})
    prepare('pypi:demo')
    assert 'using 4 files, skipping 3 hidden, empty' in capsys.readouterr().out


def test_files_that_are_not_utf8_can_be_read(registry):
    make_tar(registry / 'demo.tgz', {'package/a.txt': 'naïve '.encode('cp1252') * 50})
    message = refused(prepare, 'npm:demo')
    assert '--encoding=cp1252' in message
    prepare('npm:demo', '--encoding=cp1252')


def test_whole_files_are_held_out(registry):
    make_tar(registry / 'demo.tgz', {f'package/{i}.txt': b'%d' % i * 100 for i in range(10)})
    prepare('npm:demo')
    tokens = Dataset('out', 1).tokens
    assert tokens == {'train': 9 * 100 + 8, 'val': 100}  # with end-of-text tokens between files


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('no packages; run', [], ['pypi:demo']),
        case('must begin with a registry', ['demo'], ['pypi:demo']),
        case('not a package name', ['pypi:demo@1.2'], ['pypi:demo==1.2']),
        case('not a package name', ['pypi:-r/etc/passwd'], ['pypi:demo']),
        case('has no file of version', ['pypi:demo==7'], ['pypi:demo==1.2']),
        case('check the name, the version', ['pypi:dmo'], ['pypi:demo']),
        case('check the name, the version', ['npm:dmo'], ['pypi:demo']),
        case('check the name, the version', ['debian:dmo'], ['pypi:demo']),
        case('choose files that it has', ['pypi:demo', '--files=x'], ['pypi:demo']),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_whose_advice_is_followed(bad, good):
    refused(prepare, *bad)
    assert not Path('out').exists()
    prepare(*good)


def test_a_line_shows_the_kinds_of_files_or_the_reason():
    message = refused(prepare, 'pypi:demo', '--files=*.rst')
    assert message == (
        '--files=*.rst: matches no text in pypi-demo; choose files that it has: .txt: 3, .py: 2'
    )
    assert 'npm failed (404 Not Found - GET dmo); check' in refused(prepare, 'npm:dmo')


@pytest.mark.parametrize('package', [
    'npm:./folder', 'npm:../x', 'npm:a/b', 'npm:git+ssh://x/y', 'npm:x@file:y', 'npm:--x',
    'debian:a b', 'debian:./x.deb', 'pypi:x @ https://x', 'pypi:.', 'pypi:', 'pypi:x>=1',
])  # fmt: skip
def test_what_is_no_name_of_a_package_never_reaches_a_program(registry, package):
    assert 'not a package name' in refused(prepare, package)
    assert not (registry / 'log').exists()


@error_line('cannot connect to one of its indexes')
def test_a_file_of_another_index_is_not_used_instead_of_an_unreachable_one(registry):
    listing = (registry / 'demo.pip').read_text()
    lost = 'Could not fetch URL https://index/demo/: connection error: HTTPSConnectionPool(...)'
    (registry / 'demo.pip').write_text(f'{lost} - skipping\n{listing}')
    assert 'PIP_NO_INDEX=1' in refused(prepare, 'pypi:demo')
    missing = 'Could not fetch URL https://other/demo/: 404 Client Error: Not Found for url: https'
    (registry / 'demo.pip').write_text(f'{missing} - skipping\n{listing}')
    prepare('pypi:demo')


@error_line('which is not installed; install it')
def test_a_missing_program_is_one_line(monkeypatch, registry):
    make_tar(registry / 'demo.tgz', {'package/a.txt': WORDS * 20})
    with monkeypatch.context() as context:
        context.setenv('PATH', str(Path('bin').absolute()))
        Path('bin/npm').unlink()
        assert 'npm:demo: needs the program npm' in refused(prepare, 'npm:demo')
    install('npm')
    prepare('npm:demo')


@error_line('is damaged ({}); run the command again')
def test_a_damaged_package_is_fetched_again(registry):
    archive = registry / 'demo-1.2.tar.gz'
    content = archive.read_bytes()
    archive.write_bytes(content[:-20])
    assert 'demo-1.2.tar.gz is damaged' in refused(prepare, 'pypi:demo')
    archive.write_bytes(content)
    prepare('pypi:demo')


@pytest.mark.parametrize(
    ('printed', 'reason'),
    [
        ("WARNING: after connection broken by 'X': /a/\nERROR: No matching\n", 'no connection'),
        ('WARNING: experimental\nERROR: No matching distribution\n', 'No matching distribution'),
        (
            'npm error code E404\nnpm error syscall x\nnpm error network no host\n',
            'network no host',
        ),
        ('npm ERR! code ETARGET\nnpm ERR! notarget No version\n', 'notarget No version'),
        ('W: old list\nE: Unable to locate package a\n', 'Unable to locate package a'),
        ('dpkg-deb: error: not an archive\n', 'dpkg-deb: error: not an archive'),
        ('', 'no message'),
    ],
)
def test_the_reason_of_a_failed_program_is_one_line(printed, reason):
    assert find_reason(printed) == reason
