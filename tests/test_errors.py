"""What a program prints and exits with after an error, and which errors do not end it."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from subprocess import PIPE

import pytest
from conftest import ROOT
from error_lines import case, error_line

from flatgpt import errors
from flatgpt.errors import (
    ConfigError,
    UserError,
    as_user_error,
    counted,
    reason_of,
    short_repr,
    warn_on_failure,
)

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
def test_a_character_that_cannot_be_encoded_is_replaced(script, prints, env, line):
    done = script(prints, env=env)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.splitlines()[0] == line


def test_standard_input_is_utf8_whatever_the_locale(script, prints):
    env = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    assert script(prints, 'x', env=env, input='café').stdout.splitlines()[1] == 'café'


def test_printing_without_streams_does_nothing(tmp_path, prints, script):
    text = 'import sys\nsys.stdin = sys.stdout = sys.stderr = None\n'
    text += 'sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None\n'  # as under pythonw
    prints.write_text(text + prints.read_text(encoding='utf-8'), encoding='utf-8')
    done = script(prints, 'x')
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_a_failure_that_a_run_does_not_depend_on_is_a_warning():
    lines = []
    with warn_on_failure('no picture', lines.append):
        raise ValueError('one\ntwo')
    assert lines == ['warning: no picture: one two']
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
        (OSError(errno.ENAMETOOLONG, 'too long', 'a/b'), 'a/b: too long'),
    ],
)
def test_an_error_of_the_machine_is_one_line(error, line, monkeypatch):
    for name in ('bs4', 'gguf'):
        monkeypatch.delitem(sys.modules, name, raising=False)  # an imported module is not missing
    assert line in reason_of(error)
    assert isinstance(as_user_error(error), UserError)


def test_an_error_of_a_library_is_given_without_the_name_of_its_class():
    assert reason_of(KeyError('dtype')) == "'dtype' is missing"
    assert reason_of(ValueError('one\n two')) == 'one two'


AFTER_THE_END = """
import atexit, sys, time
sys.path.insert(0, {root!r})
from flatgpt.errors import one_line_errors
one_line_errors()
atexit.register(time.sleep, 30)
atexit.register(lambda: print('ended', flush=True))
print('result')
"""


@pytest.mark.skipif(os.name == 'nt', reason='needs SIGINT')
def test_ctrl_c_after_the_last_line_of_a_script_is_one_line(tmp_path, environment):
    program = tmp_path / 'program.py'
    program.write_text(AFTER_THE_END.format(root=str(ROOT)), encoding='utf-8')
    process = subprocess.Popen(
        [sys.executable, program], env=environment, stdout=PIPE, stderr=PIPE, text=True
    )
    assert [process.stdout.readline() for _ in range(2)] == ['result\n', 'ended\n']
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ('', 'interrupted\n')
    assert process.returncode == 130


def test_a_number_has_its_noun_in_the_singular_or_plural():
    assert [counted(n, 'file') for n in (0, 1, 2000)] == ['0 files', '1 file', '2,000 files']


def test_a_long_value_is_cut():
    assert short_repr('a' * 78) == repr('a' * 78)
    assert short_repr('a' * 79) == "'" + 'a' * 76 + '...'
    assert short_repr({'a': None}, json.dumps) == '{"a": null}'


@pytest.mark.parametrize(
    ('number', 'noun', 'text'),
    [
        (1, 'micro-batch', '1 micro-batch'),
        (2, 'micro-batch', '2 micro-batches'),
        (0, 'file', '0 files'),
    ],
)
def test_a_counted_noun_has_its_plural(number, noun, text):
    assert errors.counted(number, noun) == text


def test_a_bug_keeps_its_traceback():
    for name in ('flatgpt.nothing', 'model', 'a_typing_mistake'):  # PyPI may have an unrelated one
        assert as_user_error(ModuleNotFoundError('x', name=name)) is None
    assert as_user_error(ModuleNotFoundError('x', name='json.nothing')) is None
    assert as_user_error(KeyError('x')) is None
    assert 'flatgpt' in sys.modules


@error_line('this needs the package')
def test_the_package_to_install_provides_the_module(monkeypatch):
    providers = metadata.packages_distributions()
    installed = [name for name in errors.PIP_NAMES if name in providers]
    assert len(installed) > 10
    for name in installed:
        monkeypatch.delitem(sys.modules, name, raising=False)
        line = reason_of(ModuleNotFoundError('x', name=name))
        advised = re.search('pip install (.*) [(]all', line)[1]
        assert advised.lower() in [each.lower().replace('_', '-') for each in providers[name]] + [
            each.lower() for each in providers[name]
        ]


@pytest.mark.parametrize(
    ('check', 'setting', 'advice'),
    [
        case('{}={}: must be {}', lambda s: errors.check_range(1, None, s, 'n'), 0, 'at least 1'),
        case(
            '{}={}: must be {}', lambda s: errors.check_range(0, 9, s, 'n'), 10, 'between 0 and 9'
        ),
        case(
            'must be one of {}', lambda s: errors.check_choice((0, 'auto'), s, 'n'), 2, "0, 'auto'"
        ),
    ],
)
def test_a_setting_that_the_line_asks_for_is_accepted(check, setting, advice):
    with pytest.raises(ConfigError, match=f'^n={setting}: must be .*{advice}$'):
        check({'n': setting})
    for value in re.findall(r'\d+', advice):
        check({'n': int(value)})
