"""Error lines of datasets, mixtures and copies: each is provoked, then its advice is followed."""

import hashlib
import io
import json
import os
import re
import shlex
import shutil
from collections import namedtuple
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import filelock
import numpy as np
import pytest
import requests
from conftest import WORDS, make_dataset, refused
from error_lines import case, error_line

from data.pydocs import prepare as pydocs
from data.shakespeare_char import prepare as shakespeare_char
from flatgpt.data import chat, dataset, download, encode, shakespeare, shard_files, text
from flatgpt.data.cache import copy_to_cache
from flatgpt.data.dataset import FIRST, TARGET, Dataset, Writer
from flatgpt.data.mixture import open_data
from flatgpt.data.tokenizer import byte_tokenizer

STORY = ' '.join(WORDS * 20)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Run in an empty folder, which is also the one with the datasets."""
    monkeypatch.chdir(tmp_path)
    for module in (dataset, text, shakespeare):
        monkeypatch.setattr(module, 'DATA', tmp_path / 'data')
    (tmp_path / 'data').mkdir()
    Path('novel.txt').write_text(STORY)


def flag_in(message, name):
    return re.search(rf'--{name}=[^\s;,)]+', message)[0].partition('=')[2]


def write(folder='mine', train=200, val=100, tokenizer=None, **options):
    with Writer(folder, tokenizer or byte_tokenizer(), **options) as writer:
        writer.write('train', np.arange(train) % 100)
        writer.write('val', np.arange(val) % 100)
    return Path(folder)


def write_rows(folder='talks', length=16, pairs=False, template=None):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with Writer(folder, tokenizer, rows={'length': length, 'pairs': pairs}) as writer:
        for split in ('train', 'val'):
            flags = np.where(np.arange(length * 4) % length == 0, FIRST, TARGET)
            writer.write(split, np.arange(length * 4) % 100, flags.astype(np.uint8))
    return Path(folder)


def read(folder='mine', block_size=8, **options):
    data = Dataset(folder, block_size, **options)
    return data.batch(0, 50), data.eval_batch('val', data.eval_starts('val'))


def prepare_text(message):
    """Run the command in the message, with a file in place of FILES."""
    command = re.search(r'python data/text/prepare\.py FILES (.+)', message)[1]
    text.main(['novel.txt', '--tokenizer=byte', *shlex.split(command, comments=True)])


# -----------------------------------------------------------------------------
# a folder


def change_meta(**changes):
    def change(folder):
        meta = json.loads((folder / 'meta.json').read_text())
        (folder / 'meta.json').write_text(json.dumps(meta | changes))

    return change


def begin_to_write(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / 'train-00000.bin.part').touch()


@pytest.mark.parametrize(
    'damage',
    [
        case(
            'the file is damaged or uses another',
            lambda folder: np.full(200, 9999, '<u2').tofile(folder / 'train.bin'),
        ),
        case('preparation was interrupted', lambda folder: (folder / '.unfinished').touch()),
        case('meta.json expects', lambda folder: os.truncate(folder / 'val.bin', 10)),
        case('meta.json is missing', lambda folder: (folder / 'meta.json').unlink()),
        case('preparation did not finish', begin_to_write),
        case('meta.json of a dataset: {}; prepare', lambda folder: change_meta(splits=3)(folder)),
        case('unknown format or dtype', change_meta(dtype='int8')),
        case('shards do not add up', change_meta(splits={'train': {'tokens': 9, 'shards': []}})),
        case('a shard is not a multiple', change_meta(rows={'length': 7, 'pairs': False})),
    ],
)
def test_preparing_again_repairs_a_damaged_dataset(damage):
    damage(write())
    assert 'prepare the dataset again' in refused(read)
    write()
    assert read()


@error_line('the file is damaged or uses another')
def test_deleting_a_damaged_copy_repairs_it():
    copy = copy_to_cache(write(), 'near')
    np.full(200, 9999, '<u2').tofile(copy / 'train.bin')
    assert 'or delete its copy in data_cache' in refused(read, copy)
    shutil.rmtree(copy)
    assert read(copy_to_cache('mine', 'near'))


@error_line('was truncated')
def test_a_truncated_file_is_prepared_again(monkeypatch):
    monkeypatch.setattr(shard_files, 'file_identity', lambda file: None)
    data = Dataset(write(), 8)
    os.truncate('mine/train.bin', 2)
    assert 'prepare the dataset again' in refused(data.batch, 0, 50)
    write()
    assert read()


@error_line('while in use')
def test_a_dataset_changed_while_in_use_is_prepared_again_and_opened_again():
    data = Dataset(write(), 8)
    np.zeros(200, '<u2').tofile('mine/train.bin')
    assert 'then restart the run' in refused(data.batch, 0, 50)
    write()
    assert read()


@error_line('cannot write the dataset')
def test_a_dataset_that_cannot_be_written_goes_elsewhere():
    command = ['novel.txt', '--tokenizer=byte']
    message = refused(text.main, [*command, '--out_dir=/dev/null/x'])
    text.main([*command, f'--out_dir={flag_in(message, "out_dir")}'])
    assert open_data(flag_in(message, 'dataset'), 8).tokens['train']


@pytest.mark.parametrize('name', ['file', 'file/x'])
@error_line('is a file; write the dataset to another')
def test_a_dataset_is_not_written_to_a_file(name):
    Path('file').touch()
    command = ['novel.txt', '--tokenizer=byte']
    assert 'file is a file; ' in refused(text.main, [*command, f'--out_dir={name}'])
    text.main([*command, '--out_dir=other'])


@pytest.mark.parametrize('path', ['', 'data/'])
@error_line('is the folder of a script, not a dataset')
def test_the_folder_of_a_script_leads_to_the_command_that_prepares_a_dataset(path):
    make_script('text', 0)
    message = refused(open_data, f'{path}text', 8)
    prepare_text(message.replace(', and', ' #'))
    assert open_data(flag_in(message, 'dataset'), 8).tokens['train']


PREPARE = """
from pathlib import Path
from flatgpt.data.dataset import Writer
from flatgpt.data.tokenizer import byte_tokenizer
DOWNLOAD_GB = {size}
def main(argv=None):
    folder = argv[0].partition('=')[2] if argv else Path(__file__).parent
    with Writer(folder, byte_tokenizer()) as writer:
        writer.write('train', range(256))
        writer.write('val', range(256))
"""


def make_script(name, size):
    folder = dataset.DATA / name
    folder.mkdir()
    (folder / 'prepare.py').write_text(PREPARE.format(size=size))


def run_script(command):
    script, *flags = re.search(r'python data/(\S+?)/prepare\.py((?: --[^\s,]+)*)', command).groups()
    dataset.import_script(dataset.DATA / script / 'prepare.py').main(flags[0].split())


@error_line('cannot write the dataset')
def test_in_a_read_only_clone_a_dataset_is_prepared_elsewhere(monkeypatch):
    make_script('fresh_in_read_only', 0)

    def refuse(path):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(filelock, 'FileLock', refuse)
    message = refused(open_data, 'fresh_in_read_only', 8)
    monkeypatch.undo()
    monkeypatch.chdir(Path(message.partition('data/')[0]))
    monkeypatch.setattr(dataset, 'DATA', Path.cwd() / 'data')
    run_script(message)
    assert open_data(flag_in(message, 'dataset'), 8).tokens['train'] == 256


@error_line('is not prepared; run')
def test_a_large_download_is_started_by_its_command():
    make_script('large_download', 54)
    run_script(refused(open_data, 'large_download', 8))
    assert open_data('large_download', 8).tokens['train'] == 256


@pytest.mark.parametrize(
    ('name', 'known'),
    [
        case('choose one of', 'mime', 'mine'),
        case('no such folder; prepare', './mine', None),
        case('it has neither meta.json', './data', None),
    ],
)
def test_an_unknown_dataset_is_prepared_by_the_command_in_the_line(name, known):
    write(dataset.DATA / 'mine')
    message = refused(open_data, name, 8)
    if known:
        assert f'did you mean {known}?' in message
        assert open_data(known, 8)
    prepare_text(message)
    assert open_data(name, 8).tokens['train'] > 1000


@error_line('another program is writing')
def test_a_second_writer_waits_or_goes_elsewhere():
    with Writer('mine', byte_tokenizer()) as writer:
        assert 'another --out_dir' in refused(write)
        assert read(write('other'))
        for split in ('train', 'val'):
            writer.write(split, np.arange(100))
    assert read(write())


@error_line('split would be empty')
def test_an_empty_split_needs_more_text():
    Path('small.txt').write_text('a')
    command = ['--tokenizer=byte', '--out_dir=mine']
    assert 'add more text' in refused(text.main, ['small.txt', *command])
    text.main(['small.txt', 'novel.txt', *command])
    assert read()


@error_line('too few for block_size')
def test_a_short_split_needs_a_smaller_block_size_or_more_text():
    message = refused(read, write(val=30), block_size=64)
    assert read(block_size=int(flag_in(message, 'block_size')))
    assert 'add more text' in refused(read, write(val=1), block_size=64)
    assert read(write(val=100), block_size=64)


# -----------------------------------------------------------------------------
# conversations


def prepare_talks(*flags):
    talk = {'messages': [{'role': r, 'content': 'Hi'} for r in ('user', 'assistant')]}
    Path('talks.jsonl').write_text(f'{json.dumps(talk)}\n' * 20)
    chat.main(['talks.jsonl', '--out_dir=mine', '--tokenizer=byte', *flags])


@error_line('contains {}, for --objective=')
def test_the_objective_must_fit_the_dataset():
    message = refused(read, write(), objective='sft')
    assert read(objective=flag_in(message, 'objective'))
    assert 'data/chat/prepare.py' in message
    prepare_talks('--block_size=64')
    assert read(objective='sft', block_size=64)
    assert 'data/text/prepare.py' in refused(read)


@error_line('exceed block_size=')
def test_long_rows_need_a_larger_block_size_or_shorter_rows():
    prepare_talks('--block_size=64')
    message = refused(read, objective='sft', block_size=32)
    shorter, larger = re.findall(r'--block_size=(\d+)', message)
    assert read(objective='sft', block_size=int(larger))
    prepare_talks(f'--block_size={shorter}')
    assert read(objective='sft', block_size=32)


# -----------------------------------------------------------------------------
# mixtures


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp('parts')
    for name in ('a', 'b', 'sub/a', 'sub/c'):
        write(folder / name)
    make_dataset(folder / 'letters')
    for name, length, template in (('s', 16, 'x'), ('t', 16, 'y'), ('u', 24, 'x'), ('v', 16, 'x')):
        write_rows(folder / name, length, template={'user': [template, ''], 'assistant': ['', '']})
    write_rows(folder / 'pairs', pairs=True)
    return folder


@pytest.mark.parametrize(
    ('bad', 'good', 'objective'),
    [
        case('needs a name and a weight', './a:0.7,./b', './a:0.7,./b:0.3', 'lm'),
        case('is listed twice', './a:1,./b:1,./a:1', './a:2,./b:1', 'lm'),
        case('its weight is below', './a:1,./b:0.0001', './a:1,./b:0.1', 'lm'),
        case('its weight is below', './a:1,./b:0.0001', './a', 'lm'),
        case('is also called', './a:1,./sub/a:1', './a:1,./sub/c:1', 'lm'),
        case('with other tokens', './a:1,./letters:1', './a:1,./b:1', 'lm'),
        case('different chat templates', './s:1,./t:1', './s:1,./v:1', 'sft'),
        case('prepare both with the same --block_size', './s:1,./u:1', './s:1,./v:1', 'sft'),
        case('does not support mixtures', './pairs:1,./b:1', './pairs', 'dpo'),
    ],
)
def test_a_mixture_works_as_its_error_line_says(parts, monkeypatch, bad, good, objective):
    monkeypatch.chdir(parts)
    refused(open_data, bad, 64, objective=objective)
    assert open_data(good, 64, objective=objective).batch(0, 50)


# -----------------------------------------------------------------------------
# copies


@pytest.fixture
def served(monkeypatch):
    """Serve the current folder at http://here/."""

    def get(url, **_):
        path, reply = Path(url.removeprefix('http://here/')), requests.Response()
        reply.status_code = 200 if path.is_file() else 404
        reply.raw = io.BytesIO(path.read_bytes() if path.is_file() else b'')
        return reply

    monkeypatch.setattr(requests, 'get', get)
    monkeypatch.setattr(download.time, 'sleep', lambda seconds: None)


@error_line('a URL needs --data_cache=')
def test_a_url_works_with_a_cache(served):
    write()
    assert '--data_cache=FOLDER' in refused(open_data, 'http://here/mine', 8)
    assert open_data('http://here/mine', 8, cache='FOLDER').batch(0, 9)


@error_line('needs {} GB, and {} GB')
def test_a_full_disk_needs_space_or_another_cache(monkeypatch):
    usage = namedtuple('usage', 'total used free')
    free = {'full': 10, 'other': 10**9}
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage(0, 0, free[Path(p).parts[0]]))
    refused(copy_to_cache, write(), 'full')
    assert read(copy_to_cache('mine', 'other'))
    monkeypatch.setattr(shutil, 'disk_usage', real)
    assert read(copy_to_cache('mine', 'full'))


@error_line('cannot write the copy')
def test_a_cache_that_cannot_be_written_is_replaced_by_another():
    Path('file').touch()
    assert 'another --data_cache' in refused(copy_to_cache, write(), 'file/near')
    assert read(copy_to_cache('mine', 'near'))


@error_line('and --data_cache needs it')
def test_a_nanogpt_folder_is_read_without_a_cache():
    Path('mine').mkdir()
    for split in ('train', 'val'):
        np.zeros(100, '<u2').tofile(f'mine/{split}.bin')
    assert 'omit --data_cache' in refused(open_data, './mine', 8, cache='near')
    assert open_data('./mine', 8).batch(0, 9)


@error_line('invalid file name', 'check the address')
def test_a_meta_json_with_an_invalid_name_is_prepared_again(served):
    meta = json.loads((write() / 'meta.json').read_text())
    meta['splits']['val']['shards'][0]['file'] = '../up.bin'
    Path('mine/meta.json').write_text(json.dumps(meta))
    assert 'prepare the dataset again' in refused(copy_to_cache, 'http://here/mine', 'near')
    write()
    assert read(copy_to_cache('http://here/mine', 'near'))


@error_line('check the address')
def test_another_address_than_that_of_a_page_works(served):
    Path('page').mkdir()
    Path('page/meta.json').write_text('<html>')
    refused(copy_to_cache, 'http://here/page', 'near')
    write()
    assert read(copy_to_cache('http://here/mine', 'near'))


@error_line('and meta.json lists')
def test_a_file_with_another_hash_is_tried_or_prepared_again():
    raw = (write() / 'val.bin').read_bytes()
    Path('mine/val.bin').write_bytes(b'xx' + raw[2:])
    assert 'else prepare it again' in refused(copy_to_cache, 'mine', 'near')
    Path('mine/val.bin').write_bytes(raw)  # as if it had been written just then
    assert read(copy_to_cache('mine', 'near'))
    Path('mine/train.bin').write_bytes(b'xx' + Path('mine/train.bin').read_bytes()[2:])
    refused(copy_to_cache, 'mine', 'other')
    write()
    assert read(copy_to_cache('mine', 'other'))


@error_line('cannot read: {}; make it readable')
def test_a_file_that_cannot_be_read_is_made_readable_or_prepared_again():
    (write() / 'val.bin').rename('mine/kept')
    Path('mine/val.bin').mkdir()
    assert 'val.bin: cannot read: ' in refused(copy_to_cache, 'mine', 'near')
    Path('mine/val.bin').rmdir()
    Path('mine/kept').rename('mine/val.bin')
    assert read(copy_to_cache('mine', 'near'))
    Path('mine/train.bin').unlink()
    refused(copy_to_cache, 'mine', 'other')
    write()
    assert read(copy_to_cache('mine', 'other'))


@error_line('cannot be fetched ({}); {}')
def test_a_shard_that_cannot_be_fetched_is_saved_by_hand(served):
    (write() / 'val.bin').rename('kept')
    message = refused(copy_to_cache, 'http://here/mine', 'near')
    Path('kept').rename(message.rpartition('save it as ')[2])
    Path('mine/val.bin').touch()
    assert read(copy_to_cache('http://here/mine', 'near'))
    assert 'check the address' in refused(copy_to_cache, 'http://here/mime', 'near')


# -----------------------------------------------------------------------------
# what datasets are made from


@error_line('a worker process was killed')
def test_fewer_workers_need_less_memory(monkeypatch):
    class Pool:
        def __init__(self, *_):
            pass

        def submit(self, *_):
            raise BrokenProcessPool

        shutdown = staticmethod(lambda **_: None)

    monkeypatch.setattr(encode, 'ProcessPoolExecutor', Pool)
    command = ['novel.txt', '--tokenizer=byte', '--out_dir=mine']
    message = refused(text.main, [*command, '--workers=3'])
    text.main([*command, f'--workers={flag_in(message, "workers")}'])
    assert read()


@error_line('the downloaded file has sha256')
def test_a_download_with_another_hash_is_saved_by_hand(served):
    Path('changed.txt').write_text('x')
    sha256 = '0' * 64
    message = refused(download.fetch, 'http://here/changed.txt', 'mine/input.txt', sha256)
    Path('novel.txt').rename(message.rpartition('save it as ')[2])
    download.fetch('http://here/changed.txt', 'mine/input.txt', sha256)
    assert Path('mine/input.txt').read_text() == STORY


@error_line('invalid UTF-8 at byte {}; save it as UTF-8')
@pytest.mark.parametrize('fix', ['save', 'delete'])
def test_text_in_another_encoding_is_saved_as_utf8_or_fetched_again(served, monkeypatch, fix):
    script = Path('data/shakespeare_char/prepare.py').absolute()
    monkeypatch.setattr(shakespeare_char, '__file__', str(script))
    monkeypatch.setattr(shakespeare, 'URL', 'http://here/novel.txt')
    monkeypatch.setattr(shakespeare, 'SHA256', hashlib.sha256(STORY.encode()).hexdigest())
    path = script.with_name('input.txt')
    path.parent.mkdir()
    path.write_bytes('Romeo é '.encode('latin-1') * 99)
    message = refused(shakespeare_char.main, [])
    assert message.startswith(f'{path}: ')
    if fix == 'save':
        path.write_text(path.read_text('latin-1'), encoding='utf-8')
    else:
        path.unlink()
    shakespeare_char.main([])
    assert open_data('shakespeare_char', 8).tokenizer.kind == 'char'


@error_line('no standard library source')
def test_a_python_without_a_library_needs_other_text(tmp_path):
    message = refused(lambda: list(pydocs.documents(tmp_path / 'none')))
    prepare_text(message)
    assert open_data('NAME', 8)
    (tmp_path / 'lib').mkdir()
    (tmp_path / 'lib' / 'module.py').write_text('"""Another Python."""')
    assert 'Another Python.' in ''.join(pydocs.documents(tmp_path / 'lib'))
