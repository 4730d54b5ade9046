"""Data, as bench.py measures it: what is read, counted and cut."""

import pytest

from flatgpt.benchmarks import data
from flatgpt.errors import UserError


def test_text_is_cut_between_characters(tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'out').mkdir()
    for name in ('a', 'b'):
        (tmp_path / 'in' / name).write_text('日本' * 10, encoding='utf-8')
    texts = data.copy_texts({'text': str(tmp_path / 'in'), 'text_bytes': 70}, tmp_path / 'out')
    assert texts == ['日本' * 10, '日本日']


def test_the_text_in_memory_is_that_of_the_copied_files(tmp_path):
    source, out = tmp_path / 'source', tmp_path / 'out'
    source.mkdir()
    out.mkdir()
    (source / 'a.txt').write_bytes(b'\xef\xbb\xbfmarked')
    (source / 'b.txt').write_text('plain')
    (source / 'c.bin').write_bytes(b'\xff\x00')
    texts = data.copy_texts({'text': str(source), 'text_bytes': 1000}, out)
    assert texts == ['marked', 'plain']
    assert [path.read_text() for path in sorted(out.iterdir())] == texts
    with pytest.raises(UserError, match='two files'):
        data.copy_texts({'text': str(source / 'b.txt'), 'text_bytes': 1000}, out)


def test_a_dataset_is_prepared_from_a_folder_and_counted_without_the_ends_of_text(tmp_path):
    for name in ('a', 'b', 'c'):
        (tmp_path / f'{name}.txt').write_text(name * 10)
    seconds, work = data.time_preparation('byte', str(tmp_path))
    assert seconds > 0
    assert work == {'tokens': 30, 'result': [10.0 * (97 + 98 + 99)]}


def test_batches_are_read_from_as_many_files_as_were_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr('flatgpt.benchmarks.data.SHARD_TOKENS', 200_000)
    dataset = data.write_shards(tmp_path, 20)
    assert len(list(tmp_path.glob('train-*.bin'))) == 20
    assert dataset.tokens['train'] == 200_000
    measurements = data.read_batches(dataset, 2)
    assert len(measurements) == 2
    assert all(
        seconds > 0 and work['tokens'] == 20 * 64 * 1024 for seconds, work, _ in measurements
    )
