import contextlib
import gc
import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import filelock
import numpy as np
import pytest
import requests
import tiktoken
from conftest import ROOT, refused

from flatgpt.data import dataset as dataset_module
from flatgpt.data import shard_files
from flatgpt.data.dataset import Dataset, Writer, hash_uint64, permute
from flatgpt.data.mixture import open_data
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer
from flatgpt.errors import UserError

CHARS = char_tokenizer([chr(0x4E00 + i) for i in range(20000)])  # ids up to 19,999


def make(folder, train=1000, val=200, block_size=8, shard_tokens=2**30, seed=1337) -> Dataset:
    """A dataset whose ids are their own positions: train from 0, val from 0."""
    with Writer(folder, CHARS, shard_tokens) as writer:
        writer.write('train', np.arange(train))
        writer.write('val', np.arange(val))
    return Dataset(folder, block_size, seed)


def refusal(folder, block_size=8) -> str:
    return refused(lambda: Dataset(folder, block_size).batch(0, 500))


def run(code: str, *args) -> subprocess.CompletedProcess:
    code = textwrap.dedent(code)
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-c', code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


# --- batches


@pytest.mark.parametrize('world_size', [1, 2, 3, 4, 8])
def test_every_world_size_trains_on_the_same_global_batches(tmp_path, world_size):
    dataset, rows = make(tmp_path, shard_tokens=300), 24
    for step in range(20):
        x, y = dataset.batch(step * rows, rows)
        ends = [rank * rows // world_size for rank in range(world_size + 1)]
        parts = [dataset.batch(step * rows + a, b - a) for a, b in itertools.pairwise(ends)]
        assert np.array_equal(x, np.concatenate([part[0] for part in parts]))
        assert np.array_equal(y, np.concatenate([part[1] for part in parts]))


def test_targets_are_the_inputs_shifted_by_one(tmp_path):
    x, y = make(tmp_path).batch(5, 50)
    assert x.dtype == y.dtype == np.int64
    assert x.shape == y.shape == (50, 8)
    assert np.array_equal(y, x + 1)


@pytest.mark.parametrize('shard_tokens', [2**30, 137])
def test_every_window_comes_once_an_epoch(tmp_path, shard_tokens):
    dataset = make(tmp_path, shard_tokens=shard_tokens)
    orders = []
    for epoch in range(4):
        x, _ = dataset.batch(epoch * dataset.n_windows, dataset.n_windows)
        assert len(np.unique(x)) == x.size, 'windows overlap'
        assert x.size >= 0.9 * dataset.tokens['train'] - 16 * len(dataset._shards['train'])
        orders.append(x[:, 0].tolist())
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] != sorted(orders[0])


def test_window_boundaries_shift_from_epoch_to_epoch(tmp_path):
    dataset = make(tmp_path)
    first = {int(dataset.batch(e * dataset.n_windows, 1)[0][0, 0]) % 8 for e in range(100)}
    assert first == set(range(8))


def test_a_batch_may_span_two_epochs(tmp_path):
    dataset = make(tmp_path)
    end = dataset.n_windows
    x, _ = dataset.batch(end - 3, 6)
    assert np.array_equal(x[:3], dataset.batch(end - 3, 3)[0])
    assert np.array_equal(x[3:], dataset.batch(end, 3)[0])


def test_batches_do_not_depend_on_earlier_calls(tmp_path):
    dataset = make(tmp_path)
    ids = [7, 100000, 3, 7, 0, 12345678901]
    batches = [dataset.batch(i, 4)[0] for i in ids]
    dataset.eval_batch('val', dataset.eval_starts('val', 3))
    for i, x in reversed(list(zip(ids, batches, strict=True))):
        assert np.array_equal(Dataset(tmp_path, 8).batch(i, 4)[0], x)
        assert np.array_equal(dataset.batch(i, 4)[0], x)


def test_the_seed_changes_the_order(tmp_path):
    dataset = make(tmp_path)
    for seed in (0, -1, 2**63):
        other = Dataset(tmp_path, 8, seed)
        assert not np.array_equal(dataset.batch(0, 50)[0], other.batch(0, 50)[0])


def test_windows_never_cross_shards(tmp_path):
    dataset = make(tmp_path, train=1003, shard_tokens=50)
    x, y = dataset.batch(0, 10 * dataset.n_windows)
    assert np.array_equal(x // 50, np.repeat(x[:, :1] // 50, 8, axis=1))
    assert np.array_equal(y // 50, x // 50)


def test_a_single_window_is_enough_to_train_on(tmp_path):
    dataset = make(tmp_path, train=9, val=9)
    assert dataset.n_windows == 1
    assert dataset.batch(0, 3)[0].tolist() == [list(range(8))] * 3


def test_the_permutation_visits_every_position_once():
    for n in [*range(1, 70), 1000, 4097]:
        for seed in range(3):
            key = hash_uint64(np.full(n, seed, np.uint64), np.arange(1, dtype=np.uint64))
            assert sorted(permute(np.arange(n), n, key)) == list(range(n))


def test_the_permutation_separates_neighbors():
    n = 10000
    key = hash_uint64(np.full(n, 1337, np.uint64), np.zeros(n, np.uint64))
    steps = np.abs(np.diff(permute(np.arange(n), n, key)))
    assert abs(steps.mean() / n - 1 / 3) < 0.01  # as for a uniform shuffle
    assert (steps == 1).mean() < 0.001


@pytest.mark.parametrize('shards', [1, 20, 500])
def test_a_batch_opens_no_more_files_than_it_has_rows(tmp_path, monkeypatch, shards):
    dataset, opened = make(tmp_path, train=40 * shards, shard_tokens=40), []
    real = open
    monkeypatch.setattr(
        'builtins.open', lambda *args, **k: opened.append(args[0]) or real(*args, **k)
    )
    x, _ = dataset.batch(0, 30)
    shards_read = set((x[:, 0] // 40).tolist())
    assert len(opened) == len(set(opened)) <= len(shards_read) <= min(30, shards)


def test_an_end_of_text_begins_the_document_after_it(tmp_path):
    tokenizer = byte_tokenizer()
    ids = np.random.default_rng(0).choice([1, 2, 3, tokenizer.eot], 60 * 16 + 1)
    with Writer(tmp_path, tokenizer, shard_tokens=100) as writer:
        for split in ('train', 'val'):
            writer.write(split, ids)
    dataset = Dataset(tmp_path, 16)
    starts = dataset.eval_starts('val')
    for read, args in ((dataset.batch, (3, 40)), (dataset.eval_batch, ('val', starts))):
        x, y, numbers = read(*args, documents=True)
        assert numbers.shape == x.shape
        for row, number in zip(x.tolist(), numbers.tolist(), strict=True):
            for t in range(1, 16):
                assert (number[t] != number[t - 1]) == (row[t] == tokenizer.eot)
        assert all(map(np.array_equal, (x, y), read(*args)))


# --- evaluation


@pytest.mark.parametrize('tokens', [9, 16, 17, 18, 200, 203])
@pytest.mark.parametrize('shard_tokens', [2**30, 37])
def test_every_token_but_the_first_of_a_whole_split_is_a_target_once(
    tmp_path, tokens, shard_tokens
):
    dataset = make(tmp_path, val=tokens, shard_tokens=shard_tokens)
    for count in (None, 10**6):
        x, y = dataset.eval_batch('val', dataset.eval_starts('val', count))
        assert y[y >= 0].tolist() == list(range(1, tokens))
        assert np.array_equal(x[y >= 0] + 1, y[y >= 0])
        assert not x[y < 0].any()
        assert set(y[y < 0]) <= {-1}


def test_fixed_windows_are_evenly_spaced_and_do_not_overlap(tmp_path):
    dataset = make(tmp_path, val=1001)
    for count in (1, 2, 7, 124, 125):
        starts = dataset.eval_starts('val', count)
        gaps = np.diff(starts)
        assert len(starts) == count
        assert (gaps >= 8).all()
        assert gaps.max(initial=8) - gaps.min(initial=10**6 if count > 1 else 8) <= 8
        assert (dataset.eval_batch('val', starts)[1] >= 0).all()
        assert np.array_equal(starts, dataset.eval_starts('val', count))


def test_the_train_split_can_be_evaluated_too(tmp_path):
    dataset = make(tmp_path, shard_tokens=300)
    x, _ = dataset.eval_batch('train', dataset.eval_starts('train', 5))
    assert x[:, 0].tolist() == dataset.eval_starts('train', 5).tolist()


# --- writing


def test_one_shard_is_train_bin_and_several_are_numbered(tmp_path):
    make(tmp_path, train=1000, val=100, shard_tokens=400)
    assert sorted(path.name for path in tmp_path.glob('*.*') if path.name[0] != '.') == [
        'meta.json', 'tokenizer.json',
        'train-00000.bin', 'train-00001.bin', 'train-00002.bin', 'val.bin',
    ]  # fmt: skip
    raw = b''.join(path.read_bytes() for path in sorted(tmp_path.glob('train-*')))
    assert raw == np.arange(1000, dtype='<u2').tobytes()


def test_meta_describes_the_files(tmp_path):
    dataset = make(tmp_path, train=1000, val=100, shard_tokens=400)
    meta = json.loads((tmp_path / 'meta.json').read_text(encoding='utf-8'))
    assert meta['format'] == 'flatgpt'
    assert (meta['dtype'], meta['vocab_size'], meta['tokenizer']) == ('uint16', 20000, 'char')
    train = meta['splits']['train']
    assert (train['tokens'], train['bytes']) == (1000, 3000)  # three bytes a character
    for shard in train['shards']:
        raw = (tmp_path / shard['file']).read_bytes()
        assert shard['tokens'] == len(raw) // 2
        assert shard['sha256'] == hashlib.sha256(raw).hexdigest()
    assert dataset.tokens == {'train': 1000, 'val': 100}
    assert dataset.bytes == {'train': 3000, 'val': 300}
    assert dataset.tokenizer == CHARS


def test_ids_above_65535_are_stored_as_uint32(tmp_path):
    tokenizer = char_tokenizer([chr(c) for c in range(0x10000, 0x10000 + 70000)])
    with Writer(tmp_path, tokenizer) as writer:
        writer.write('train', np.arange(69000, 70000))
        writer.write('val', tokenizer.encode(chr(0x10000 + 66000) * 20))
    dataset = Dataset(tmp_path, 8)
    assert (tmp_path / 'train.bin').stat().st_size == 4000
    assert dataset.batch(0, 100)[0].min() >= 69000
    assert set(dataset.eval_batch('val', np.array([0]))[0][0]) == {66000}


def test_writing_again_replaces_what_was_there(tmp_path):
    make(tmp_path, train=1000, shard_tokens=100)
    (tmp_path / 'notes.txt').write_text('mine')
    dataset = make(tmp_path, train=50, val=30)
    assert dataset.tokens == {'train': 50, 'val': 30}
    assert len(list(tmp_path.glob('*.bin'))) == 2
    assert (tmp_path / 'notes.txt').exists()


def test_an_error_while_writing_keeps_the_older_dataset(tmp_path):
    make(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with contextlib.suppress(ZeroDivisionError), Writer(tmp_path, byte_tokenizer()) as writer:
        writer.write('train', [1, 2, 3])
        raise ZeroDivisionError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_empty_split_is_not_published(tmp_path):
    with pytest.raises(UserError, match='val split'):
        make(tmp_path, val=0)
    assert [path.name for path in tmp_path.iterdir()] == ['.write.lock']
    assert 'not a dataset' in refusal(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='No space left') as error:
        make(tmp_path)
    assert '\n' not in str(error.value)
    assert not list(tmp_path.glob('*.part'))
    assert not list(tmp_path.glob('*.bin'))


def test_two_writers_in_one_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match='another program'), Writer(tmp_path, CHARS):
        make(tmp_path)


def test_the_folder_of_a_killed_writer_does_not_look_finished(tmp_path):
    done = run(
        """
        import os, sys
        from flatgpt.data.dataset import Writer
        from flatgpt.data.tokenizer import byte_tokenizer
        with Writer(sys.argv[1], byte_tokenizer(), shard_tokens=10) as writer:
            writer.write('train', range(25))
            writer.write('val', range(25))
            os._exit(9)
        """,
        tmp_path,
    )
    assert done.returncode == 9, done.stderr
    assert list(tmp_path.glob('*.part'))
    assert 'did not finish' in refusal(tmp_path)
    assert make(tmp_path).n_windows
    assert not list(tmp_path.glob('*.part'))


@pytest.mark.parametrize('step', range(10))
def test_a_dataset_whose_writer_was_killed_while_publishing_is_refused_until_it_is_written_again(
    tmp_path, step
):
    make(tmp_path, train=500)
    done = run(
        """
        import os, sys
        from pathlib import Path
        from flatgpt.data.dataset import Writer
        from flatgpt.data.tokenizer import byte_tokenizer
        left = int(sys.argv[2])
        def counted(real):
            def call(*args, **kwargs):
                global left
                if left == 0:
                    os._exit(9)
                left -= 1
                return real(*args, **kwargs)
            return call
        with Writer(sys.argv[1], byte_tokenizer()) as writer:
            writer.write('train', [1] * 100)
            writer.write('val', [1] * 100)
            os.replace, Path.unlink = counted(os.replace), counted(Path.unlink)
        """,
        tmp_path,
        step,
    )
    # Removes three files, renames two, writes the tokenizer and meta.json, removes the marker.
    assert done.returncode == (9 if step < 8 else 0), done.stderr
    if step < 8:
        assert 'interrupted' in refusal(tmp_path)
        make(tmp_path)
    assert Dataset(tmp_path, 8).batch(0, 1)


# --- invalid folders


def test_the_error_for_a_short_split_suggests_a_block_size_that_works(tmp_path):
    make(tmp_path, train=1000, val=30)
    message = refusal(tmp_path, block_size=64)
    assert 'val split has 30 tokens' in message
    assert '--block_size=29' in message
    assert Dataset(tmp_path, 29).batch(0, 1)
    assert len(Dataset(tmp_path, 29).eval_starts('val')) == 1
    assert '--block_size=29' in refusal(tmp_path, block_size=30)


def test_short_shards_count_as_a_short_split(tmp_path):
    make(tmp_path, train=1000, val=500, shard_tokens=20)
    assert '--block_size=19' in refusal(tmp_path, block_size=64)
    assert Dataset(tmp_path, 19).n_windows


def test_a_split_too_short_for_any_block_size_needs_more_text(tmp_path):
    with Writer(tmp_path, CHARS) as writer:
        writer.write('train', [1])
        writer.write('val', [1])
    assert 'add more text' in refusal(tmp_path)


@pytest.mark.parametrize('shard_tokens', [2**30, 300])
def test_an_id_outside_the_vocabulary_is_reported_with_file_and_offset(tmp_path, shard_tokens):
    make(tmp_path, shard_tokens=shard_tokens)
    path = max(tmp_path.glob('train*.bin'))
    ids = np.fromfile(path, '<u2')
    ids[50] = 20000
    ids.tofile(path)
    assert f'{path}: token id 20000 at byte 100 ' in refusal(tmp_path)


def test_a_truncated_or_missing_file_is_reported(tmp_path):
    make(tmp_path)
    os.truncate(tmp_path / 'val.bin', 100)
    assert 'val.bin: has 100 bytes; meta.json expects 400' in refusal(tmp_path)
    (tmp_path / 'val.bin').unlink()
    assert 'val.bin: is missing' in refusal(tmp_path)


@pytest.mark.parametrize('content', ['', '{}', '[]', '{"format": "flatgpt", "splits": {}}'])
def test_a_damaged_meta_is_reported(tmp_path, content):
    make(tmp_path)
    (tmp_path / 'meta.json').write_text(content)
    assert 'meta.json: not the meta.json of a dataset' in refusal(tmp_path)


# --- nanoGPT's folders


def nanogpt_folder(folder, meta):
    for split, tokens in (('train', 500), ('val', 100)):
        (np.arange(tokens) % 65).astype(np.uint16).tofile(folder / f'{split}.bin')
    if meta:
        itos = {i: chr(48 + i) for i in range(65)}
        stoi = {c: i for i, c in itos.items()}
        raw = pickle.dumps({'vocab_size': 65, 'itos': itos, 'stoi': stoi})
        (folder / 'meta.pkl').write_bytes(raw)


def test_a_nanogpt_folder_with_characters_is_read(tmp_path):
    nanogpt_folder(tmp_path, meta=True)
    dataset = Dataset(tmp_path, 8)
    assert dataset.vocab_size == 65
    assert dataset.tokens == {'train': 500, 'val': 100}
    assert dataset.bytes == {'train': None, 'val': None}
    assert dataset.tokenizer.decode([0, 1, 2]) == '012'
    x, y = dataset.batch(0, 10)
    assert np.array_equal((x + 1) % 65, y)


def test_a_nanogpt_folder_without_meta_is_gpt2_and_trains_offline(tmp_path, monkeypatch):
    def refuse(url, **_):
        raise requests.ConnectionError

    monkeypatch.setattr(requests, 'get', refuse)
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))
    nanogpt_folder(tmp_path, meta=False)
    dataset = Dataset(tmp_path, 8)
    assert dataset.vocab_size == 50257
    assert dataset.batch(0, 4)[0].shape == (4, 8)
    with pytest.raises(UserError, match='tokenizer gpt2'):
        _ = dataset.tokenizer


def test_a_nanogpt_pickle_that_would_run_code_is_refused(tmp_path):
    nanogpt_folder(tmp_path, meta=False)
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'itos': print}))
    assert 'could run code' in refusal(tmp_path)


# --- finding a dataset


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setattr('flatgpt.data.dataset.DATA', tmp_path)
    return tmp_path


def test_a_dataset_is_found_by_name_and_by_path(data_folder, monkeypatch):
    make(data_folder / 'mine')
    monkeypatch.chdir(data_folder)
    for name in ('mine', './mine', 'mine/', str(data_folder / 'mine')):
        assert open_data(name, 8).tokens['train'] == 1000


def test_an_unknown_name_lists_near_ones_and_how_to_prepare_text(data_folder):
    make(data_folder / 'novels')
    for name in ('nobels', './nobels'):
        with pytest.raises(UserError) as error:
            open_data(name, 8)
        assert 'python data/text/prepare.py FILES --' in str(error.value)
        assert '\n' not in str(error.value)
    with pytest.raises(UserError, match=r'did you mean novels\?'):
        open_data('nobels', 8)


PREPARE = """
import time
from pathlib import Path
from flatgpt.data.dataset import Writer
from flatgpt.data.tokenizer import byte_tokenizer

def main(argv=None):
    folder = Path(__file__).parent
    with (folder / 'log').open('a') as log:
        log.write('prepared\\n')
    time.sleep(0.3)
    with Writer(folder, byte_tokenizer()) as writer:
        writer.write('train', range(256))
        writer.write('val', range(256))
"""


def test_a_missing_dataset_is_prepared_by_one_of_several_processes(tmp_path):
    (tmp_path / 'fresh').mkdir()
    (tmp_path / 'fresh' / 'prepare.py').write_text(PREPARE)
    code = """
        import sys, pathlib
        from flatgpt.data import dataset, mixture
        dataset.DATA = pathlib.Path(sys.argv[1])
        print(mixture.open_data('fresh', 8).tokens['train'])
        """
    command = [sys.executable, '-c', textwrap.dedent(code), str(tmp_path)]
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    ranks = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == ['256\n'] * 3
    assert (tmp_path / 'fresh' / 'log').read_text() == 'prepared\n'


def test_an_interrupted_preparation_is_run_again(data_folder):
    make(data_folder / 'fresh')
    (data_folder / 'fresh' / 'prepare.py').write_text(PREPARE)
    (data_folder / 'fresh' / '.unfinished').touch()
    assert open_data('fresh', 8).tokens['train'] == 256


def test_a_large_download_is_not_started_automatically(data_folder):
    (data_folder / 'huge').mkdir()
    (data_folder / 'huge' / 'prepare.py').write_text('DOWNLOAD_GB = 54\ndef main(argv): 1 / 0')
    with pytest.raises(UserError) as error:
        open_data('huge', 8)
    message = str(error.value)
    assert '54 GB' in message
    assert 'python data/huge/prepare.py' in message
    assert 'config/quickstart.py' in message
    assert '\n' not in message


def test_openwebtext_is_a_large_download():
    if (ROOT / 'data' / 'openwebtext' / 'meta.json').exists():
        pytest.skip('openwebtext is prepared here')
    with pytest.raises(UserError, match='24 GB'):
        open_data('openwebtext', 1024)


def test_the_name_text_leads_to_the_command_that_prepares_text():
    with pytest.raises(UserError, match=r'python data/text/prepare\.py FILES --name=mine'):
        open_data('text', 8)


# --- speed and memory


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='memory is read from /proc')
def test_memory_stays_flat_on_a_file_of_gigabytes(tmp_path):
    nanogpt_folder(tmp_path, meta=False)
    with (tmp_path / 'train.bin').open('wb') as file:
        file.truncate(6 * 2**30)  # a hole: it takes no space on the disk
    done = run(
        """
        import re, sys
        from pathlib import Path
        from flatgpt.data.dataset import Dataset
        def memory():
            status = Path('/proc/self/status').read_text()
            return int(re.search(r'VmRSS:\\s+(\\d+)', status)[1]) / 1024
        dataset = Dataset(sys.argv[1], 64)
        dataset.batch(0, 4096)
        before = memory()
        for step in range(1, 40):  # 160,000 windows: 640 MB of pages, were they kept
            dataset.batch(step * 4096, 4096)
        print(memory() - before)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 30, f'grew by {done.stdout} MB'


def test_a_prepare_script_outside_this_clone_is_not_run(tmp_path):
    (tmp_path / 'theirs').mkdir()
    (tmp_path / 'theirs' / 'prepare.py').write_text('raise SystemExit("it ran")')
    with pytest.raises(UserError, match='not a dataset'):
        open_data(str(tmp_path / 'theirs'), 8)


def batches_of(dataset):
    """All training and evaluation batches of a run."""
    read = [dataset.batch(0, 40), dataset.eval_batch('val', dataset.eval_starts('val'))]
    return np.concatenate([array.ravel() for arrays in read for array in arrays]).tolist()


@pytest.mark.skipif(os.name == 'nt', reason='Windows keeps files that are open')
@pytest.mark.parametrize('shard_tokens', [2**30, 100])
@pytest.mark.parametrize('change', ['prepared again', 'removed', 'moved aside'])
def test_an_open_dataset_does_not_change(tmp_path, monkeypatch, change, shard_tokens):
    monkeypatch.setattr(shard_files, 'OPEN_BUDGET', [None] * 64)  # other tests may keep files open
    dataset, folder = make(tmp_path / 'd', shard_tokens=shard_tokens), tmp_path / 'd'
    before = batches_of(dataset)
    if change == 'prepared again':
        with Writer(folder, CHARS, shard_tokens) as writer:
            writer.write('train', np.arange(1000)[::-1])
            writer.write('val', np.arange(200)[::-1])
        assert batches_of(Dataset(folder, 8)) != before
    elif change == 'removed':
        for path in folder.iterdir():
            path.unlink()
    else:
        folder.rename(tmp_path / 'elsewhere')
    assert batches_of(dataset) == before


def test_a_file_that_is_modified_while_in_use_is_reported(tmp_path):
    dataset = make(tmp_path)
    np.arange(1000, dtype='<u2')[::-1].tofile(tmp_path / 'train.bin')  # as nanoGPT's scripts do
    with pytest.raises(
        UserError,
        match=r'train\.bin: was changed while in use; prepare',
    ):
        dataset.batch(0, 1)
    dataset.eval_batch('val', [0])


@pytest.mark.parametrize(
    ('change', 'found'),
    [
        (os.remove, 'removed'),
        (lambda path: Path(f'{path}.new').rename(path), 'changed'),
    ],
)
def test_a_change_is_detected_in_files_that_are_not_kept_open(tmp_path, monkeypatch, change, found):
    monkeypatch.setattr(shard_files, 'OPEN_BUDGET', [None])
    dataset, val = make(tmp_path), tmp_path / 'val.bin'
    Path(f'{val}.new').write_bytes(val.read_bytes())
    dataset.eval_batch('val', [0])
    change(val)
    dataset.batch(0, 1)  # the first is kept open
    with pytest.raises(
        UserError,
        match=rf'val\.bin: was {found} while in use; ',
    ):
        dataset.eval_batch('val', [0])


def test_an_unused_dataset_closes_its_files(tmp_path, monkeypatch):
    more = [None, None]
    monkeypatch.setattr(shard_files, 'OPEN_BUDGET', more)
    dataset = make(tmp_path)
    assert not more
    del dataset
    gc.collect()
    assert len(more) == 2


def test_the_lock_of_a_preparation_is_released(tmp_path, monkeypatch):
    (tmp_path / 'prepare.py').write_text('def main(arguments):\n    pass\n')
    locks, make = [], filelock.FileLock  # keep a reference: collecting a lock releases it
    monkeypatch.setattr(filelock, 'FileLock', lambda path: locks.append(make(path)) or locks[-1])
    dataset_module.prepare(tmp_path)
    assert [lock.is_locked for lock in locks] == [False]
