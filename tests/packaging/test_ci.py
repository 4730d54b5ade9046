"""Warnings in CI: deprecations are only shown, all others are errors."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = """
import warnings

def announce(category, stacklevel=1):
    warnings.warn('will be removed', category, stacklevel=stacklevel)
"""
SAMPLE = """
import package

def call(category):
    package.announce(category, stacklevel=2)
"""
TESTS = """
import package, pytest, sample

CHANGES = [DeprecationWarning, PendingDeprecationWarning, FutureWarning]

@pytest.mark.parametrize('category', CHANGES)
def test_a_package_announces_a_change(category):
    package.announce(category)

@pytest.mark.parametrize('category', CHANGES)
def test_our_code_uses_what_will_change(category):
    sample.call(category)

@pytest.mark.parametrize('category', [UserWarning, ResourceWarning])
def test_other_warnings_are_errors(category):
    package.announce(category)
"""


@pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
def test_deprecation_warnings_do_not_fail_ci(tmp_path):
    script = (ROOT / '.ci' / 'run').read_text(encoding='utf-8')
    rule = re.search(r"^export PYTEST_ADDOPTS='.*?'$", script, re.MULTILINE | re.DOTALL)[0]
    for name, text in {'package': PACKAGE, 'sample': SAMPLE, 'test_it': TESTS}.items():
        (tmp_path / f'{name}.py').write_text(text, encoding='utf-8')
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    (warnings,) = re.findall(r'^filterwarnings = .*', project, re.MULTILINE)
    (tmp_path / 'pyproject.toml').write_text(
        f'[tool.pytest.ini_options]\n{warnings}\n', encoding='utf-8'
    )

    environment = {**os.environ, 'PYTEST_DISABLE_PLUGIN_AUTOLOAD': '1'}  # others' take seconds

    def outcome(setting):
        command = f'{setting}\n"{sys.executable}" -m pytest -q -p no:cacheprovider'
        done = subprocess.run(
            ['bash', '-c', command], cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        return re.sub(r' in .*', '', done.stdout.splitlines()[-1])

    assert outcome('unset PYTEST_ADDOPTS') == '8 failed'
    assert outcome(rule) == '2 failed, 6 passed, 6 warnings'
