"""What ends a program, with what line and status, and what does not."""

import errno
import sys

import pytest
from conftest import ROOT

from flatgpt.errors import UserError, as_user_error, reason_of, warn_on_failure

PRINTS = """
import sys
sys.path.insert(0, {root!r})
from flatgpt.errors import one_line_errors
one_line_errors()
print('na\\xefve \\u5929 \\udcff')
print(sys.stdin.read() if len(sys.argv) > 1 else '')
"""


@pytest.fixture
def prints(tmp_path):
    program = tmp_path / 'program.py'
    program.write_text(PRINTS.format(root=str(ROOT)), encoding='utf-8')
    return program


@pytest.mark.parametrize(
    ('env', 'line'),
    [
        ({'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}, 'naïve 天 ?'),
        ({'PYTHONIOENCODING': 'utf-8'}, 'naïve 天 ?'),
        ({'PYTHONIOENCODING': 'ascii'}, 'na?ve ? ?'),
        ({'PYTHONIOENCODING': 'ascii:strict'}, 'na?ve ? ?'),
    ],
)
def test_a_character_that_cannot_be_shown_is_replaced(script, prints, env, line):
    done = script(prints, env=env)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.splitlines()[0] == line


def test_text_that_comes_in_is_utf8_whatever_the_locale(script, prints):
    env = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    assert script(prints, 'x', env=env, input='café').stdout.splitlines()[1] == 'café'


def test_without_streams_printing_is_silence(tmp_path, prints, script):
    text = 'import sys\nsys.stdin = sys.stdout = sys.stderr = None\n'
    text += 'sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None\n'  # as under pythonw
    prints.write_text(text + prints.read_text(encoding='utf-8'), encoding='utf-8')
    done = script(prints, 'x')
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_what_fails_is_a_warning_where_a_run_can_do_without_it():
    lines = []
    with warn_on_failure('no picture', lines.append):
        raise ValueError('one\ntwo')
    assert lines == ['warning: no picture: ValueError: one two']
    for not_an_error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(not_an_error), warn_on_failure('no picture', lines.append):
            raise not_an_error


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (ModuleNotFoundError('x', name='bs4'), 'this needs the package bs4: pip install beautiful'),
        (ModuleNotFoundError('x', name='gguf.part'), 'package gguf: pip install gguf'),
        (OSError(errno.ENOSPC, 'full', 'a/b'), 'a/b: full'),
        (PermissionError(errno.EACCES, 'no', 'a/b'), 'a/b: no'),
    ],
)
def test_an_error_of_the_machine_is_one_line(error, line, monkeypatch):
    for name in ('bs4', 'gguf'):
        monkeypatch.delitem(sys.modules, name, raising=False)  # what is there is not missing
    assert line in reason_of(error)
    assert isinstance(as_user_error(error), UserError)


def test_a_fault_of_the_code_keeps_its_traceback():
    for name in ('flatgpt.nothing', 'model', 'a_typing_mistake'):  # pip may have strangers' of it
        assert as_user_error(ModuleNotFoundError('x', name=name)) is None
    assert as_user_error(ModuleNotFoundError('x', name='json.nothing')) is None
    assert as_user_error(KeyError('x')) is None
    assert 'flatgpt' in sys.modules
