"""Files on disk: written atomically, read strictly."""

import pytest
from error_lines import case, error_line

from flatgpt import files
from flatgpt.errors import CheckpointError, UserError


@error_line('{}: already exists; choose a new folder')
def test_an_existing_folder_is_never_replaced(tmp_path):
    (tmp_path / 'old').mkdir()
    with pytest.raises(UserError, match=r'old: already exists; choose a new folder$'):
        with files.atomic_folder(tmp_path / 'old'):
            raise AssertionError('never entered')
    with files.atomic_folder(tmp_path / 'new') as part:
        (part / 'a.txt').write_text('a')
    assert (tmp_path / 'new' / 'a.txt').read_text() == 'a'


@error_line('{}: cannot be written: {}; choose another folder')
def test_another_folder_is_written_where_one_cannot_be(tmp_path):
    (tmp_path / 'file').write_text('x')
    for folder in (tmp_path / 'file' / 'new', tmp_path / ('x' * 300)):
        with pytest.raises(UserError, match=r'cannot be written.*; choose another folder$'):
            with files.atomic_folder(folder):
                raise AssertionError('never entered')
    with files.atomic_folder(tmp_path / 'another'):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ['another', 'file']


def write_and_fail(path, error):
    with files.atomic_file(path) as part:
        part.write_text('new')
        raise error


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_after_an_error_the_old_file_is_unchanged(tmp_path, error):
    path = tmp_path / 'a.txt'
    path.write_text('old')
    with pytest.raises(type(error)):
        write_and_fail(path, error)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [('a.txt', 'old')]


@pytest.mark.parametrize(
    'content',
    [
        case('cannot be read: {}; provide a valid file', None),
        case('cannot be read: {}; provide a valid file', '{"a": '),
        case('cannot be read: {}; provide a valid file', '[' * 100_000),
        case('it must be a JSON object', '[1]'),
    ],
)
def test_a_json_file_is_read_once_it_is_valid(tmp_path, content):
    path = tmp_path / 'config.json'
    if content:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=r'^my/model: config\.json cannot be read'):
        files.read_json(path, 'my/model')
    path.write_text('{"a": 1}')
    assert files.read_json(path, 'my/model') == {'a': 1}


@pytest.mark.parametrize(
    ('text', 'problem'),
    [
        ('[NaN]', 'NaN is not valid JSON'),
        ('{"a": -Infinity}', '-Infinity is not valid JSON'),
        ('[{"a": 1, "b": 2, "a": 1}]', "duplicate key 'a'"),
    ],
)
def test_json_is_read_strictly(text, problem):
    with pytest.raises(ValueError, match=problem):
        files.strict_json(text)
