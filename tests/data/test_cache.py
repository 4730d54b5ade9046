"""Datasets copied to the local disk, from a folder and from a local web server."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections import namedtuple

import numpy as np
import pytest
import requests
from conftest import ROOT, make_dataset, metrics, refused

from flatgpt.data import cache as cache_module
from flatgpt.data import download
from flatgpt.data.cache import copy_to_cache
from flatgpt.data.dataset import Dataset, Writer
from flatgpt.data.mixture import open_data
from flatgpt.data.tokenizer import byte_tokenizer


@pytest.fixture
def source(tmp_path):
    """A dataset with several shards, some in a subfolder."""
    folder = tmp_path / 'far' / 'mine'
    rng = np.random.default_rng(0)
    with Writer(folder / 'part-00000', byte_tokenizer(), 500, source={'file': 'x'}) as part:
        part.write('train', rng.integers(0, 256, 1200))
    with Writer(folder, byte_tokenizer()) as writer:
        writer.include('part-00000')
        writer.write('val', rng.integers(0, 256, 300))
    return folder


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.server.broken.get(self.path, 0):  # fails so many times
            self.server.broken[self.path] -= 1
            self.send_error(503)
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(source, monkeypatch):
    """A web server with the dataset; it records the requested paths."""
    handler = functools.partial(Handler, directory=str(source.parent))
    monkeypatch.setattr(download.time, 'sleep', lambda _: None)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        server.asked, server.broken = [], {}
        server.url = f'http://127.0.0.1:{server.server_port}/mine'
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=['folder', 'url'])
def place(request, source):
    return request.getfixturevalue('server').url if request.param == 'url' else str(source)


def files(folder):
    found = (path for path in folder.rglob('*') if path.is_file() and path.name[0] != '.')
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def expected(source):
    """The files of a copy: those that the main meta.json lists, without the parts' own."""
    return {k: v for k, v in files(source).items() if k[:4] != 'part' or k.endswith('.bin')}


def test_a_copy_has_every_file_and_gives_the_same_batches(source, place, tmp_path, capsys):
    folder = copy_to_cache(place, tmp_path / 'near')
    assert folder.name == 'mine'
    assert files(folder) == expected(source)
    assert f'{place}: copying 0.00 GB to {folder}' in capsys.readouterr().out
    far, near = Dataset(source, 8), open_data(place, 8, cache=tmp_path / 'near')
    assert near.folder == folder
    assert near.fingerprint == far.fingerprint
    assert all(map(np.array_equal, near.batch(3, 50), far.batch(3, 50)))


def test_a_finished_copy_is_not_made_again(source, server, tmp_path):
    copy_to_cache(server.url, tmp_path / 'near')
    server.asked.clear()
    copy_to_cache(server.url, tmp_path / 'near')
    assert server.asked == ['/mine/meta.json']


def test_an_interrupted_copy_keeps_valid_files_and_fetches_the_rest(source, server, tmp_path):
    folder = copy_to_cache(server.url, tmp_path / 'near')
    (folder / 'meta.json').unlink()  # as if killed: it is written last
    (folder / 'val.bin').unlink()
    damaged = folder / 'part-00000' / 'train-00001.bin'
    damaged.write_bytes(damaged.read_bytes()[:-2] + b'xx')  # the size is right
    cut = folder / 'part-00000' / 'train-00002.bin'
    os.truncate(cut, 10)
    (folder / 'val.bin.part').write_bytes(b'half')
    server.asked.clear()
    assert copy_to_cache(server.url, tmp_path / 'near') == folder
    assert sorted(server.asked) == [
        '/mine/meta.json',
        '/mine/part-00000/train-00001.bin',
        '/mine/part-00000/train-00002.bin',
        '/mine/tokenizer.json',
        '/mine/val.bin',
    ]
    assert files(folder) == expected(source)


def test_a_finished_copy_that_was_truncated_is_repaired(source, place, tmp_path):
    folder = copy_to_cache(place, tmp_path / 'near')
    os.truncate(folder / 'val.bin', 10)
    copy_to_cache(place, tmp_path / 'near')
    assert files(folder) == expected(source)


def test_a_dataset_that_was_prepared_again_gets_a_new_folder(source, place, tmp_path):
    old = copy_to_cache(place, tmp_path / 'near')
    before = files(old)
    shutil.rmtree(source)
    make_dataset(source, byte_tokenizer())
    new = copy_to_cache(place, tmp_path / 'near')
    assert old != new
    assert files(old) == before
    assert files(new) == files(source)


def test_masks_of_conversations_are_copied_too(tmp_path):
    with Writer(tmp_path / 'talks', byte_tokenizer(), rows={'length': 8, 'pairs': False}) as writer:
        for split in ('train', 'val'):
            writer.write(split, np.arange(80), np.ones(80, np.uint8))
    folder = copy_to_cache(tmp_path / 'talks', tmp_path / 'near')
    assert files(folder) == files(tmp_path / 'talks')
    assert 'train.mask.bin' in files(folder)


def test_a_failed_request_is_retried(source, server, tmp_path):
    server.broken = {'/mine/val.bin': 2, '/mine/meta.json': 1}
    folder = copy_to_cache(server.url, tmp_path / 'near')
    assert files(folder) == expected(source)


def test_every_part_of_a_mixture_is_copied(source, server, tmp_path):
    make_dataset(tmp_path / 'words', byte_tokenizer())
    setting = f'{server.url}:0.5,{tmp_path / "words"}:0.5'
    mixture = open_data(setting, 8, cache=tmp_path / 'near')
    assert [part.folder.parts[:-2] for _, part in mixture.parts] == [(tmp_path / 'near').parts] * 2
    assert mixture.name == '50.0% mine, 50.0% words'


def test_only_one_of_several_processes_copies(source, tmp_path):
    code = """
        import sys, time
        from flatgpt.data import cache
        real = cache.copy_files
        def slow(*args):
            time.sleep(0.5)
            real(*args)
        cache.copy_files = slow
        print(cache.copy_to_cache(sys.argv[1], sys.argv[2]))
        """
    command = [sys.executable, '-c', textwrap.dedent(code), str(source), str(tmp_path / 'near')]
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    ranks = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    out = [rank.communicate(timeout=60)[0].splitlines() for rank in ranks]
    assert sorted(map(len, out)) == [1, 1, 2]  # one reports that it copies
    assert len({lines[-1] for lines in out}) == 1


def test_a_slow_copy_reports_progress(source, tmp_path, monkeypatch, capsys):
    signs, real = [], cache_module.copy_file

    def slow(*args):
        real(*args)
        threading.Event().wait(0.3)

    monkeypatch.setattr('flatgpt.data.cache.copy_file', slow)
    monkeypatch.setattr('flatgpt.data.cache.LOG_INTERVAL', 0)
    copy_to_cache(source, tmp_path / 'near', lambda: signs.append(1))
    assert signs
    assert 'copying: 100%, ETA 00:00' in capsys.readouterr().out


# -----------------------------------------------------------------------------
# mistakes


def nothing_whole(cache):
    return not [
        path for path in cache.rglob('*') if path.name == 'meta.json' or '.part' in path.name
    ]


def test_a_file_with_another_hash_is_reported(source, place, tmp_path):
    raw = (source / 'val.bin').read_bytes()
    (source / 'val.bin').write_bytes(b'xx' + raw[2:])
    message = refused(copy_to_cache, place, tmp_path / 'near')
    assert f'{place}/val.bin: has sha256 {hashlib.sha256(b"xx" + raw[2:]).hexdigest()}' in message
    assert nothing_whole(tmp_path / 'near')


def test_a_missing_shard_is_reported(source, place, tmp_path):
    (source / 'part-00000' / 'train-00001.bin').unlink()
    message = refused(copy_to_cache, place, tmp_path / 'near')
    assert f'{place}/part-00000/train-00001.bin' in message
    assert 'HTTP 404' in message or 'No such file' in message
    assert nothing_whole(tmp_path / 'near')


def test_an_unreachable_host_is_reported(tmp_path, monkeypatch):
    def refuse(url, **_):
        raise requests.ConnectionError

    monkeypatch.setattr(download.time, 'sleep', lambda _: None)
    monkeypatch.setattr(requests, 'get', refuse)
    message = refused(copy_to_cache, 'http://nowhere.invalid/mine', tmp_path / 'near')
    assert 'http://nowhere.invalid/mine/meta.json cannot be fetched (no connection)' in message
    assert not (tmp_path / 'near').exists()


def test_a_url_needs_a_cache(source):
    assert '--data_cache' in refused(open_data, 'http://127.0.0.1/mine', 8)
    assert '--data_cache' in refused(open_data, f'{source}:1,https://127.0.0.1/mine:1', 8)


def test_a_disk_with_too_little_space_is_reported_before_copying(
    source, place, tmp_path, monkeypatch
):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(10**9, 10**9, 1000))
    message = refused(copy_to_cache, place, tmp_path / 'near')
    assert 'are free;' in message
    assert not [path for path in (tmp_path / 'near').rglob('*.bin*')]


def test_a_disk_that_fills_up_while_copying_is_one_line(source, place, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    assert 'No space left' in refused(copy_to_cache, place, tmp_path / 'near')
    assert nothing_whole(tmp_path / 'near')


def test_a_cache_that_cannot_be_written_is_one_line(source, tmp_path):
    (tmp_path / 'file').touch()
    assert 'cannot write the copy' in refused(copy_to_cache, source, tmp_path / 'file' / 'near')


@pytest.mark.parametrize(
    'name', ['../up.bin', '/etc/up.bin', 'a/../../up.bin', 'C:\\up.bin', '', 3]
)
def test_a_meta_json_with_files_outside_its_folder_is_refused(source, server, tmp_path, name):
    meta = json.loads((source / 'meta.json').read_text())
    meta['splits']['val']['shards'][0]['file'] = name
    (source / 'meta.json').write_text(json.dumps(meta))
    assert 'not the meta.json of a dataset' in refused(copy_to_cache, server.url, tmp_path / 'near')
    assert not list(tmp_path.rglob('*up.bin*'))


def test_a_page_that_is_not_a_meta_json_is_refused(source, server, tmp_path):
    (source / 'meta.json').write_text('<html>')
    assert 'not the meta.json of a dataset' in refused(copy_to_cache, server.url, tmp_path / 'near')


def test_a_folder_without_a_meta_json_cannot_be_copied(tmp_path):
    for split in ('train', 'val'):
        np.zeros(100, '<u2').tofile(tmp_path / f'{split}.bin')
    assert 'omit --data_cache' in refused(copy_to_cache, tmp_path, tmp_path / 'near')
    (tmp_path / '.unfinished').touch()
    assert 'was interrupted' in refused(copy_to_cache, tmp_path, tmp_path / 'near')


# -----------------------------------------------------------------------------
# training


def test_a_run_reads_only_the_copy(run_here, server, source, tmp_path):
    args = (f'--dataset={server.url}', f'--data_cache={tmp_path / "near"}')
    run_here(f'--out_dir={tmp_path}/a', *args)
    run_here(f'--out_dir={tmp_path}/b', f'--dataset={source}')
    assert metrics(tmp_path / 'a') == metrics(tmp_path / 'b')
    shards = [path for path in server.asked if path.endswith('.bin')]
    assert len(shards) == len(set(shards)) == 4  # each once
