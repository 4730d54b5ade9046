"""Datasets from parquet files: from folders, and from a local imitation of the hub."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import ROOT
from error_lines import case, error_line

from data.openwebtext import prepare as openwebtext
from flatgpt.data import parquet as parquet_module
from flatgpt.data.dataset import Dataset, Writer, read_meta
from flatgpt.data.tokenizer import EOT, byte_tokenizer, char_tokenizer, get_tokenizer
from flatgpt.errors import UserError

pyarrow = pytest.importorskip('pyarrow')
pytest.importorskip('pyarrow.parquet')

pytest_plugins = ['hub']
BYTES = byte_tokenizer()


@pytest.fixture(autouse=True)
def with_bytes(tmp_path, monkeypatch):
    """Run in an empty folder, with bytes instead of gpt2, whose vocabulary may be unavailable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(openwebtext, 'get_tokenizer', lambda name: byte_tokenizer())


def parquet(path: str | Path, documents: list, **options) -> bytes:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({'text': documents}), path, **options)
    return path.read_bytes()


def stories(first: int, count: int) -> list[str]:
    return [
        f'Story {i} of a cat. ' + 'It sat on the mat, and ran. ' * (i % 7)
        for i in range(first, first + count)
    ]


def prepare(*argv: str, out: str = 'out') -> Dataset:
    openwebtext.main([f'--out_dir={out}', '--workers=1', *argv])
    return Dataset(out, 1)


refused = partial(conftest.refused, prepare)


def text_of(split: str, folder: str = 'out') -> str:
    shards = read_meta(Path(folder))['splits'][split]['shards']
    ids = [np.fromfile(Path(folder, shard['file']), '<u2') for shard in shards]
    return BYTES.decode(np.concatenate(ids))


def content(folder: str) -> dict[str, bytes]:
    paths = sorted(path for path in Path(folder).rglob('*') if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths
        if path.name != '.write.lock'
    }


@pytest.fixture
def source() -> str:
    """Three parquet files -> the flag for their folder."""
    for number in range(3):
        parquet(f'source/plain_text/train-{number}.parquet', stories(60 * number, 60))
    return '--source=source'


# --- from a folder


def test_the_first_document_of_each_file_and_every_nth_after_it_are_for_validation(
    monkeypatch,
):
    monkeypatch.setattr(openwebtext, 'VAL_EVERY', 3)
    parquet('source/a/0.parquet', ['zero', 'one', 'two', 'three'])
    parquet('source/a/1.parquet', ['four', 'five'])
    parquet('source/0.parquet', ['six', 'seven'])
    prepare('--source=source')
    assert text_of('val') == 'six|zero|three|four|'.replace('|', EOT)
    assert text_of('train') == 'seven|one|two|five|'.replace('|', EOT)


def test_a_sample_has_500_of_10000_documents_for_validation():
    parquet('source/0.parquet', [f'{i:04d}' for i in range(10_000)])
    dataset = prepare('--source=source', '--dev')
    assert dataset.bytes == {'train': 4 * 9500, 'val': 4 * 500}
    assert text_of('val').startswith(f'0000{EOT}0020{EOT}')


def test_a_sample_goes_to_a_dataset_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(openwebtext, 'DATA', tmp_path)
    parquet('source/0.parquet', stories(0, 30))
    openwebtext.main(['--source=source', '--dev', '--workers=1'])
    assert Dataset(tmp_path / 'openwebtext_dev', 64).n_windows


def test_a_folder_whose_name_ends_in_parquet_is_not_a_file():
    parquet('source/a.parquet/b.parquet', stories(0, 3))
    assert [file.name for file in parquet_module.local_files(Path('source'))] == [
        'a.parquet/b.parquet'
    ]
    Path('empty/a.parquet').mkdir(parents=True)
    with pytest.raises(UserError, match=r'no \.parquet files'):
        parquet_module.local_files(Path('empty'))


def test_empty_documents_are_skipped_and_counted_and_a_file_may_have_no_documents(capsys):
    parquet('source/0.parquet', ['', 'one', None, 'two'])
    parquet('source/1.parquet', pyarrow.array([], pyarrow.string()))
    parquet('source/2.parquet', ['three'])
    prepare('--source=source')
    assert (text_of('train'), text_of('val')) == (f'one{EOT}two{EOT}', f'three{EOT}')
    assert 'skipped 2 documents whose text is null or empty' in capsys.readouterr().out


def test_documents_stay_intact_across_batches_and_chunks(monkeypatch):
    monkeypatch.setattr('flatgpt.data.parquet.BATCH_ROWS', 7)
    monkeypatch.setattr('flatgpt.data.encode.CHUNK', 50)
    documents = stories(0, 100)
    parquet('source/0.parquet', documents, row_group_size=13)
    prepare('--source=source')
    assert text_of('val') + text_of('train') == ''.join(text + EOT for text in documents)


@pytest.mark.skipif('TIKTOKEN_CACHE_DIR' not in os.environ, reason='it has the gpt2 vocabulary')
def test_tokens_are_gpt2_s_with_an_end_of_text_after_each_document(monkeypatch):
    tokenizer = get_tokenizer('gpt2')
    monkeypatch.setattr(openwebtext, 'get_tokenizer', get_tokenizer)
    documents = stories(0, 50)
    parquet('source/0.parquet', documents)
    dataset = prepare('--source=source')
    expected = [i for text in documents[1:] for i in [*tokenizer.encode(text), 50256]]
    assert np.fromfile('out/part-00000/train.bin', '<u2').tolist() == expected
    assert dataset.tokenizer == tokenizer


def test_two_processes_write_the_same_bytes_as_one(source):
    prepare(source)
    prepare(source, '--workers=2', out='two')
    assert content('two') == content('out')


@error_line('parts are missing')
def test_jobs_that_share_the_files_and_are_merged_write_the_same_bytes_as_one(source, capsys):
    prepare(source, out='one')
    for job in ('3/4', '1/4', '4/4'):
        openwebtext.main([source, '--out_dir=out', '--workers=1', f'--part={job}'])
    assert 'job 4 of 4 is done' in capsys.readouterr().out
    assert 'parts are missing, 1 of 3: part-00001' in refused('--merge')
    openwebtext.main([source, '--out_dir=out', '--workers=1', '--part=2/4'])
    shutil.rmtree('source')
    prepare('--merge')
    assert content('out') == content('one')


@error_line('give the job and the number of jobs')
@pytest.mark.parametrize('share', ['0/4', '5/4', '3', '/', '-1/4', 'a/b'])
def test_an_invalid_share_is_replaced_by_one_like_that_in_the_line(source, capsys, share):
    message = refused(source, f'--part={share}')
    openwebtext.main([source, '--out_dir=out', '--workers=1', message.rpartition(' ')[2]])
    assert 'job 3 of 64 is done' in capsys.readouterr().out


@error_line('no finished parts', 'belong to different datasets')
def test_parts_are_prepared_before_they_are_merged_and_again_if_of_different_datasets(source):
    assert 'run without --merge first' in refused('--merge')
    prepare(source)
    prepare('--merge')
    shutil.rmtree('out/part-00001')
    prepare(source, '--dev', out='dev')
    shutil.copytree('dev/part-00001', 'out/part-00001')
    assert 'delete the part-* folders' in refused('--merge')
    delete_parts()
    assert prepare(source)


def delete_parts():
    for part in Path('out').glob('part-*'):
        shutil.rmtree(part)


@error_line('uses the tokenizer {}, and other')
def test_a_part_with_another_tokenizer_is_deleted_and_its_job_run_again(source):
    prepare(source)
    part, made_of = Path('out/part-00001'), read_meta(Path('out/part-00001'))['source']
    with Writer(part, char_tokenizer(list('ab')), source=made_of) as writer:
        writer.write('train', [0, 1])
    assert 'delete it and run its job again' in refused('--merge')
    shutil.rmtree(part)
    openwebtext.main([source, '--out_dir=out', '--workers=1', '--part=2/3'])
    assert prepare('--merge')


@error_line('--merge only combines')
def test_merge_works_without_the_options_for_writing(source):
    prepare(source)
    message = refused(source, '--merge', '--part=1/2')
    assert message.endswith('omit --source and --part')
    assert prepare('--merge')


def test_a_finished_dataset_is_not_changed(source, monkeypatch):
    prepare(source)
    before = content('out')
    monkeypatch.setattr('flatgpt.data.parquet.write_part', None)
    prepare(source)
    assert content('out') == before


def test_the_result_trains_and_is_evaluated_across_its_parts(source, run_here):
    dataset = prepare(source)
    assert len(read_meta(Path('out'))['splits']['val']['shards']) == 3
    _, targets = dataset.eval_batch('val', dataset.eval_starts('val'))
    assert BYTES.decode(targets[:, 0]) == text_of('val')[1:]
    assert run_here(f'--dataset={Path("out").resolve()}', '--out_dir=run', '--max_iters=1') == 0
    assert list(Path('run/checkpoints').iterdir())


def test_a_log_has_a_line_for_each_file_with_the_remaining_time(source, capsys):
    openwebtext.main([source, '--out_dir=out', '--workers=1', '--part=2/2'])
    prepare(source)
    lines = [line for line in capsys.readouterr().out.splitlines() if ' to go' in line]
    sizes = [path.stat().st_size / 1000 for path in sorted(Path('source').rglob('*.parquet'))]
    total = sum(sizes)
    assert lines[0] == f'{sizes[1]:.2f}kB of {sizes[1]:.2f}kB, 00:00 to go'
    assert lines[1].startswith(f'{sizes[0] + sizes[1]:.2f}kB of {total:.2f}kB, ')
    assert lines[2] == f'{total:.2f}kB of {total:.2f}kB, 00:00 to go'


# --- interrupted and resumed

RUN = """
import os, signal, sys
from flatgpt.data import encode, parquet
from flatgpt.errors import one_line_errors
from data.openwebtext import prepare
from flatgpt.data.tokenizer import byte_tokenizer

def encode_job(*args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

if __name__ == '__main__':
    left = int(sys.argv.pop(1))
    real, parquet.encode_job = parquet.encode_job, encode_job
    encode.CHUNK = 1500  # several jobs a file
    prepare.get_tokenizer = lambda name: byte_tokenizer()
    one_line_errors()
    prepare.main(['--out_dir=out', *sys.argv[1:]])
"""


def start(*argv: str, kill_at: int = 0, **environment: str) -> subprocess.Popen:
    """Prepare in a subprocess, which is killed at its kill_at-th call to encode."""
    Path('run.py').write_text(RUN, encoding='utf-8')
    kept = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
    return subprocess.Popen(
        [sys.executable, 'run.py', str(kill_at), *argv],
        env={**kept, 'PYTHONPATH': str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.skipif(os.name != 'posix', reason='SIGKILL')
@pytest.mark.parametrize(('kill_at', 'finished'), [(2, 0), (6, 1), (7, 1), (11, 2)])
def test_a_killed_run_resumes_with_the_file_it_was_reading(source, monkeypatch, kill_at, finished):
    prepare(source, out='whole')
    process = start(source, '--workers=1', kill_at=kill_at)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    assert len(list(Path('out').glob('part-*/meta.json'))) == finished
    assert list(Path('out').glob('part-*/*.bin.part'))
    with pytest.raises(UserError, match='did not finish'):
        Dataset('out', 1)
    begun = []
    real = parquet_module.write_part
    monkeypatch.setattr(
        'flatgpt.data.parquet.write_part',
        lambda job, tokenizer: begun.append(job) or real(job, tokenizer),
    )
    prepare(source)
    assert len(begun) == 3 - finished
    assert content('out') == content('whole')


@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_ctrl_c_is_one_line_and_finished_parts_are_kept(source):
    parquet('source/plain_text/train-1.parquet', stories(0, 400_000))
    process = start(source, '--workers=2')
    begun = Path('out/part-00001')
    deadline = time.monotonic() + 60
    while not (list(begun.glob('*.bin.part')) and Path('out/part-00000/meta.json').exists()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # to every process, as a terminal does
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, 'interrupted\n')
    assert not (begun / 'meta.json').exists()


def test_a_truncated_part_is_written_again(source):
    prepare(source)
    before = content('out')
    for damage in (lambda path: os.truncate(path, 10), os.unlink):
        damage('out/part-00001/train.bin')
        with pytest.raises(UserError, match='prepare the dataset again'):
            openwebtext.main(['--out_dir=out', '--merge'])
        prepare(source)
        assert content('out') == before


@error_line('choose another --out_dir, or delete')
@pytest.mark.parametrize('what', ['other file', 'other size', 'one more', 'one less', 'other rule'])
def test_a_changed_source_is_refused_and_the_dataset_is_kept(source, what):
    prepare(source)
    before = content('out')
    if what == 'other file':
        os.rename('source/plain_text/train-2.parquet', 'source/plain_text/train-3.parquet')
    elif what == 'other size':
        parquet('source/plain_text/train-1.parquet', stories(0, 9))
    elif what == 'one more':
        parquet('source/plain_text/train-3.parquet', stories(0, 9))
    elif what == 'one less':
        os.unlink('source/plain_text/train-2.parquet')
    flags = [source, *['--dev'] * (what == 'other rule')]
    assert 'was made from file train-' in refused(*flags)
    assert content('out') == before
    prepare(*flags, out='other')
    delete_parts()
    prepare(*flags)
    assert content('out') == content('other')


def test_two_programs_cannot_write_the_same_part(source):
    with Writer('out/part-00000', BYTES, source={'file': 'x'}) as writer:
        assert 'another program' in refused(source)
        writer.write('train', [1])


def test_a_full_disk_is_one_line_and_the_same_command_resumes(source, monkeypatch):
    prepare(source, out='whole')
    synced = []

    def fsync(file):
        synced.append(file)
        if len(synced) > 6:
            raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fsync)
        message = refused(source)
    assert 'part-00001' in message
    assert 'No space left' in message
    assert not list(Path('out').rglob('*.part'))
    prepare(source)
    assert content('out') == content('whole')


# --- invalid files


@error_line('invalid parquet file')
@pytest.mark.parametrize('workers', [1, 2])
@pytest.mark.parametrize('damage', ['head', 'middle', 'cut', 'none', 'empty'])
def test_a_damaged_file_is_reported_and_finished_parts_are_kept(source, damage, workers):
    path = Path('source/plain_text/train-1.parquet')
    whole = parquet(path, stories(60, 60), compression='gzip')
    prepare(source, out='whole')
    half = len(whole) // 2
    path.write_bytes(
        {
            'head': b'PAR2' + whole[4:-4] + b'PAR2',
            'middle': whole[:100] + bytes(half - 100) + whole[half:],
            'cut': whole[:half],
            'none': b'not parquet, but text\n',
            'empty': b'',
        }[damage]
    )
    message = refused(source, f'--workers={workers}')
    assert f'{path}: invalid parquet file' in message
    assert 'replace it' in message
    assert Path('out/part-00000/meta.json').exists()
    assert not Path('out/meta.json').exists()
    path.write_bytes(whole)
    prepare(source)
    assert content('out') == content('whole')


@error_line('needs a string column')
@pytest.mark.parametrize(
    'table', [{'body': ['a']}, {'text': [1]}, {'text': [b'a'], 'id': [1]}, {'text': [['a']]}]
)
def test_a_file_without_a_text_column_is_reported_with_its_columns(table):
    Path('source').mkdir()
    pyarrow.parquet.write_table(pyarrow.table(table), 'source/0.parquet')
    message = refused('--source=source')
    assert 'source/0.parquet: needs a string column called text' in message.replace(os.sep, '/')
    assert list(table)[-1] in message
    parquet('source/0.parquet', ['a', 'b'])
    assert prepare('--source=source')


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='memory is read from /proc')
def test_memory_stays_flat_on_a_file_of_one_row_group():
    parquet('0.parquet', ['abcdefghij' * 100] * 100_000, use_dictionary=False, compression='none')
    assert os.path.getsize('0.parquet') > 100_000_000
    code = """
        import re
        from pathlib import Path
        import pyarrow.parquet
        from flatgpt.data.parquet import read_chunks
        def memory():
            status = Path('/proc/self/status').read_text()
            return int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) / 1024
        before = memory()
        print(sum(1 for _ in read_chunks(Path('0.parquet'), 2, [])), memory() - before)
        """
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)],
        env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, grown = done.stdout.split()
    assert count == '100000'
    assert float(grown) < 100, f'grew by {grown} MB'


def test_other_columns_are_not_read():
    Path('source').mkdir()
    table = {
        'id': [1, 2],
        'text': pyarrow.array(['a', 'b'], pyarrow.large_string()),
        'x': [b'', b''],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), 'source/0.parquet')
    prepare('--source=source')
    assert text_of('train') == f'b{EOT}'


@pytest.mark.parametrize(
    ('what', 'problem'),
    [
        case('no such folder; give one', 'missing', 'no such folder'),
        case('contains no .parquet files', 'without parquet', 'no .parquet files'),
        case('no such folder; give one', 'a file', 'no such folder'),
    ],
)
def test_a_source_without_parquet_files_needs_some(what, problem):
    if what == 'without parquet':
        Path('source').mkdir()
    elif what == 'a file':
        Path('source').touch()
    assert problem in refused('--source=source')
    assert not Path('out').exists()
    parquet('FOLDER/0.parquet', stories(0, 9))
    assert prepare('--source=FOLDER')
    if what == 'without parquet':
        parquet('source/0.parquet', stories(0, 9))
        assert prepare('--source=source')


def test_a_source_too_small_to_split_is_refused():
    parquet('source/0.parquet', ['one'])
    assert 'the train split would be empty' in refused('--source=source')


@error_line('parquet files need pyarrow')
def test_pyarrow_is_required(source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'pyarrow', None)
        patch.delitem(sys.modules, 'pyarrow.parquet')
        assert 'pip install pyarrow' in refused(source)
    assert prepare(source)  # with pyarrow installed


@error_line('--workers={}: must be at least 1')
def test_at_least_one_process_is_needed(source):
    assert '--workers=0' in refused(source, '--workers=0')
    assert prepare(source, '--workers=1')


# --- from the hub


FULL, DEV = f'datasets/{openwebtext.FULL}', f'datasets/{openwebtext.DEV}'


@pytest.fixture
def hub(hub):
    """A hub with both repositories: one has parquet files, the other a converted revision."""
    full = {
        f'plain_text/train-{i:05d}-of-00003.parquet': parquet('p.parquet', stories(60 * i, 60))
        for i in range(3)
    }
    sample = parquet('p.parquet', stories(0, 100))
    os.unlink('p.parquet')
    converted = {'plain_text/train/0000.parquet': sample}
    hub.repositories = {
        FULL: {
            'main': {'.gitattributes': b'', 'README.md': b'# OpenWebText', **full},
            'refs/convert/parquet': converted,
        },
        DEV: {
            'main': {'README.md': b'', 'openwebtext-10k.py': b'raise SystemExit'},
            'refs/convert/parquet': {'.gitattributes': b'', **converted},
        },
    }
    return hub


def prepare_locally(hub, name: str, revision: str, *argv: str) -> dict[str, bytes]:
    """The dataset made from the same files in a folder."""
    for file, raw in hub.repositories[name][revision].items():
        if file.endswith('.parquet'):
            path = Path('local') / Path(file).name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(raw)
    prepare('--source=local', *argv, out='whole')
    return content('whole')


def test_the_full_set_is_read_from_the_files_of_its_main_branch(hub):
    prepare()
    assert hub.log == [f'train-{i:05d}-of-00003.parquet' for i in range(3)]
    assert content('out') == prepare_locally(hub, FULL, 'main')


def test_the_sample_is_read_from_the_hub_s_conversion(hub):
    prepare('--dev')
    expected = prepare_locally(hub, DEV, 'refs/convert/parquet', '--dev')
    assert content('out') == expected


def test_two_processes_read_the_hub_like_one(hub):
    prepare('--workers=2')
    assert content('out') == prepare_locally(hub, FULL, 'main')


def test_only_the_dataset_is_left_on_the_disk(hub):
    prepare()
    assert not [name for name in content('out') if 'fetched' in name or 'huggingface' in name]
    assert not list(Path('cache').rglob('*.parquet'))


def test_an_interrupted_download_is_resumed(hub):
    hub.trouble = {'train-00001-of-00003.parquet': ['cut', 'fail']}
    prepare()
    assert hub.log.count('train-00001-of-00003.parquet') == 3
    assert content('out') == prepare_locally(hub, FULL, 'main')


@error_line('cannot be fetched ({}); run')
@pytest.mark.parametrize('workers', [1, 2])
def test_a_file_that_cannot_be_fetched_is_reported_and_the_same_command_resumes(hub, workers):
    hub.trouble = {'train-00001-of-00003.parquet': ['fail'] * 100}
    message = refused(f'--workers={workers}')
    assert 'plain_text/train-00001-of-00003.parquet cannot be fetched' in message
    assert '503' in message
    hub.trouble, hub.log[:] = {}, []
    prepare()
    assert hub.log == [f'train-{i:05d}-of-00003.parquet' for i in (1, 2)]
    assert content('out') == prepare_locally(hub, FULL, 'main')


@pytest.mark.skipif(os.name != 'posix', reason='SIGKILL')
@pytest.mark.parametrize('workers', [1, 2])
def test_a_run_killed_while_fetching_resumes_with_that_file(hub, workers):
    last = 'train-00002-of-00003.parquet'
    reached, goes_on = threading.Event(), threading.Event()
    hub.trouble = {last: [lambda: (reached.set(), goes_on.wait(30))]}
    process = start(f'--workers={workers}', **hub.environment('home'))
    try:
        assert reached.wait(30), process.communicate()
        deadline = time.monotonic() + 30
        while len(list(Path('out').glob('part-*/meta.json'))) < 2:  # wait for the workers
            assert time.monotonic() < deadline
            threading.Event().wait(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        goes_on.set()
    hub.log.clear()
    prepare()
    assert hub.log == [last]
    assert content('out') == prepare_locally(hub, FULL, 'main')


def test_a_damaged_download_is_not_kept(hub):
    files = hub.repositories[FULL]['main']
    name = 'plain_text/train-00001-of-00003.parquet'
    whole = files[name]
    files[name] = bytes(len(whole))
    assert f'{Path(name).name}: invalid parquet file' in refused()
    files[name] = whole
    prepare()
    assert content('out') == prepare_locally(hub, FULL, 'main')


def test_files_in_the_hub_s_cache_are_not_fetched_and_work_offline(hub, monkeypatch):
    import huggingface_hub

    def download(**options):
        return huggingface_hub.snapshot_download(openwebtext.FULL, repo_type='dataset', **options)

    download()
    hub.log.clear()
    prepare()
    assert hub.log == []
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    prepare(out='offline')
    assert content('offline') == content('out')
    assert len(list(Path(download(local_files_only=True)).rglob('*.parquet'))) == 3


def test_an_incomplete_dataset_in_the_cache_is_not_used(hub, monkeypatch):
    import huggingface_hub

    huggingface_hub.snapshot_download(
        openwebtext.FULL, repo_type='dataset', allow_patterns='*/train-00001-*'
    )
    for tree in Path('cache').glob('*/trees'):  # missing in older versions of the hub's client
        shutil.rmtree(tree)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert 'not cached' in refused()


@error_line('is not cached and cannot be fetched')
@pytest.mark.parametrize('how', ['offline', 'no server', 'no such repository'])
def test_without_hub_and_cache_the_files_can_be_downloaded_by_other_means(hub, monkeypatch, how):
    for file, raw in hub.repositories[FULL]['main'].items():
        path = Path('FOLDER') / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    if how == 'offline':
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    elif how == 'no server':
        monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    else:
        hub.repositories.clear()
    for flags, name in (((), openwebtext.FULL), (('--dev',), openwebtext.DEV)):
        message = refused(*flags)
        assert name in message
        assert '--source=FOLDER' in message
        assert not Path('out').exists()
    assert prepare('--source=FOLDER')


@error_line('no complete set')
def test_an_incomplete_conversion_of_the_hub_is_not_used(hub, monkeypatch):
    branches = hub.repositories[FULL]
    branches['main'].clear()
    converted = branches['refs/convert/parquet']
    converted['plain_text/partial-train/0000.parquet'] = converted.popitem()[1]
    assert '--source=FOLDER' in refused()
    parquet('FOLDER/0.parquet', stories(0, 9))
    assert prepare('--source=FOLDER', out='elsewhere')
    import huggingface_hub

    huggingface_hub.snapshot_download(
        openwebtext.FULL, repo_type='dataset', revision='refs/convert/parquet'
    )
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert 'not cached' in refused()
