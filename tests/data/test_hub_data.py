"""Datasets of the hub by name: the `datasets` library streams them from a local server."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import ROOT
from error_lines import error_line
from hub import TOKEN

from flatgpt.data import hub as module
from flatgpt.data.dataset import Dataset, read_meta
from flatgpt.data.tokenizer import EOT, byte_tokenizer

pyarrow = pytest.importorskip('pyarrow')
pytest.importorskip('pyarrow.parquet')
datasets = pytest.importorskip('datasets')
pytest_plugins = ['hub']
NAME = 'owner/stories'
REPOSITORY = f'datasets/{NAME}'
SUBSETS = """---
configs:
- {config_name: easy, data_files: easy.jsonl}
- {config_name: hard, data_files: hard.jsonl}
---
"""


def parquet(texts, **columns) -> bytes:
    file = io.BytesIO()
    table = pyarrow.table({'text': texts, 'stars': [*range(len(texts))], **columns})
    pyarrow.parquet.write_table(table, file, row_group_size=7)
    return file.getvalue()


def stories(first, count) -> list[str]:
    return [
        f'Story {i}. ' + 'The cat sat, and ran. ' * (i % 5) for i in range(first, first + count)
    ]


@pytest.fixture
def hub(hub, tmp_path, monkeypatch):
    """A hub with a dataset of three files and a validation split."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, 'HF_ENDPOINT', hub.url)
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(datasets.config, 'HF_MODULES_CACHE', str(tmp_path / 'modules'))
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'datasets')
    files = {f'data/train-{i:05d}-of-00003.parquet': parquet(stories(20 * i, 20)) for i in range(3)}
    files['data/validation-00000-of-00001.parquet'] = parquet(stories(1000, 4))
    hub.repositories = {REPOSITORY: {'main': {'README.md': b'# Stories', **files}}}
    return hub


def prepare(*argv, name=NAME, out='out') -> Dataset:
    module.main([name, f'--out_dir={out}', '--tokenizer=byte', '--workers=1', *argv])
    return Dataset(out, 1)


refused = partial(conftest.refused, prepare)


def documents(split, out='out') -> list[str]:
    shards = read_meta(Path(out))['splits'][split]['shards']
    ids = np.concatenate([np.fromfile(Path(out, shard['file']), '<u2') for shard in shards])
    return byte_tokenizer().decode(ids).removesuffix(EOT).split(EOT)


def test_the_rows_of_both_splits_are_read_in_order(hub):
    prepare()
    assert documents('train') == stories(0, 60)
    assert documents('val') == stories(1000, 4)


def test_without_a_validation_split_evenly_spaced_documents_are_for_validation(hub, monkeypatch):
    monkeypatch.setattr(module, 'VAL_EVERY', 20)
    monkeypatch.setattr(module, 'PART_BYTES', 700)
    del hub.repositories[REPOSITORY]['main']['data/validation-00000-of-00001.parquet']
    prepare()
    assert len(list(Path('out').glob('part-*'))) > 2
    assert documents('val') == [story for story in stories(0, 60) if story in stories(0, 60)[::20]]
    assert len(documents('train')) == 57


def test_the_parts_and_the_processes_do_not_change_the_documents(hub, monkeypatch):
    prepare('--workers=2')
    monkeypatch.setattr(module, 'PART_BYTES', 300)
    prepare(out='small')
    for split in ('train', 'val'):
        assert documents(split) == documents(split, 'small')


def test_empty_documents_are_skipped_and_counted(hub, capsys):
    files = {'train.parquet': ['one', None, '', 'two'], 'validation.parquet': ['three']}
    hub.repositories[REPOSITORY]['main'] = {name: parquet(files[name]) for name in files}
    prepare()
    assert 'skipped 2 documents without text' in capsys.readouterr().out
    assert documents('train') == ['one', 'two']


def test_lines_of_json_and_another_field_and_fewer_documents(hub, monkeypatch):
    monkeypatch.setattr(module, 'PART_BYTES', 1)  # the last part is empty
    rows = ''.join(json.dumps({'id': i, 'body': f'body {i}'}) + '\n' for i in range(9))
    hub.repositories[REPOSITORY]['main'] = {'a.jsonl': rows.encode()}
    prepare('--field=body', '--limit=4')
    assert documents('val') + documents('train') == [f'body {i}' for i in range(4)]


@pytest.mark.skipif(os.name != 'posix', reason='SIGKILL')
@pytest.mark.parametrize('file', ['train-00001-of-00003.parquet', 'train-00002-of-00003.parquet'])
def test_a_killed_command_resumes_after_its_last_part_with_the_same_revision(hub, file, tmp_path):
    begun, over = threading.Event(), threading.Event()
    hub.trouble = {file: [lambda: (begun.set(), over.wait(60))]}
    code = 'import sys; from flatgpt.data import hub; hub.PART_BYTES = 300; hub.main(sys.argv[1:])'
    command = [sys.executable, '-c', code, NAME, '--out_dir=out', '--tokenizer=byte']
    kept = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
    kept |= hub.environment(tmp_path / 'home') | {'PYTHONPATH': str(ROOT)}
    with subprocess.Popen(command, env=kept) as process:
        assert begun.wait(60)
        os.kill(process.pid, signal.SIGKILL)
    over.set()
    finished = {path.parent.name for path in Path('out').glob('part-*/meta.json')}
    assert finished
    hub.repositories[REPOSITORY]['main']['data/train-00003.parquet'] = parquet(['new'])
    subprocess.run(command, env=kept, check=True)
    assert documents('train') == stories(0, 60)
    assert documents('val') == stories(1000, 4)


def test_a_read_that_breaks_off_is_continued(hub):
    hub.trouble = {f'train-0000{i}-of-00003.parquet': ['cut'] for i in range(3)}
    prepare()
    assert documents('train') == stories(0, 60)


@error_line('cannot be read now')
def test_a_hub_that_is_busy_for_ever_ends_in_one_line_and_the_command_resumes(hub, monkeypatch):
    monkeypatch.setattr(module, 'PART_BYTES', 300)
    hub.limited = '7'
    assert 'HTTP 429, retry after 7' in refused()

    def limit():
        hub.limited = '7'

    hub.limited = None
    hub.trouble = {'train-00001-of-00003.parquet': [limit]}
    assert '429' in refused()
    begun = {path: path.stat().st_mtime_ns for path in Path('out').glob('part-*/meta.json')}
    assert len(begun) > 1
    hub.limited = None
    prepare()
    assert begun == {path: path.stat().st_mtime_ns for path in begun}
    assert documents('train') == stories(0, 60)


def test_a_private_or_gated_dataset_needs_a_login(hub, monkeypatch):
    hub.private.add(REPOSITORY)
    assert 'log in with `hf auth login`' in refused()
    hub.private.clear()
    hub.gated[REPOSITORY] = {TOKEN}
    assert 'log in with `hf auth login`' in refused()
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    assert prepare()


def test_without_a_network_the_line_says_so(hub, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert 'HF_HUB_OFFLINE is set' in refused()
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    assert 'no connection' in refused()


@error_line('has no field')
@pytest.mark.parametrize('field', ['body', 'stars'])
def test_a_field_that_the_line_lists_is_read(hub, field):
    assert refused(f'--field={field}').endswith('text (string), stars (int64)')
    assert prepare('--field=text')


@error_line('has no split')
def test_a_split_that_the_line_lists_is_read(hub):
    assert refused('--split=test').endswith('train, validation')
    prepare('--split=validation')
    assert documents('val') + documents('train') == stories(1000, 4)


@error_line('needs the name of one of its subsets')
@pytest.mark.parametrize('flags', [[], ['--config=esay']])
def test_a_subset_that_the_line_lists_is_read(hub, flags):
    rows = [json.dumps({'text': f'easy {i}'}) for i in range(3)]
    files = {'README.md': SUBSETS.encode(), 'easy.jsonl': '\n'.join(rows).encode()}
    hub.repositories[REPOSITORY]['main'] = {**files, 'hard.jsonl': b'{"text": "hard"}'}
    assert refused(*flags).endswith('easy, hard')
    prepare('--config=easy')
    assert documents('train') == ['easy 1', 'easy 2']


@error_line('--{}={}: give 1 or more')
def test_a_number_of_documents_is_positive(hub):
    assert '--limit=0' in refused('--limit=0')
    prepare('--limit=1')
    assert len(documents('train')) == 1


@error_line('was made from {}, not from {}; choose')
def test_other_settings_need_another_folder(hub):
    prepare()
    assert 'field text' in refused('--field=stars')
    assert prepare(out='another')


@error_line('needs pip install datasets')
def test_the_library_that_is_missing_is_named(hub, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'datasets', None)
        refused()
    assert prepare()
