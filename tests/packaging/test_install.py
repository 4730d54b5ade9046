"""
Each script runs its own clone's code, whatever is installed or lies in the current directory.

The tests install like pip: they unpack the wheel that setuptools builds into the site-packages of a
small virtual environment. Tests marked `faults` run pip itself.
"""

import functools
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest
from conftest import ROOT, WORDS

RUN = ROOT / 'tests' / 'compat' / 'made_by_7300f54' / 'runs' / 'gpt2'
TRAIN = '--dataset=words --n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --max_iters=1'
TRAIN += ' --batch_size=1 --gradient_accumulation_steps=1 --eval_iters=1 --device=cpu'
TRAIN += ' --sample_tokens=0 --out_dir=run'
# top-level names of the root, and those that versions before flatgpt/ installed
NAMES = 'api bench check checkpoint config configurator data docs engine exchange flatgpt folder'
NAMES += ' harness launch linear load lora model objective optim origin parallel peers plan'
NAMES += ' rehearsal report runtime sample sampling saver scaling schema server service tests track'
NAMES += ' train watch web'
FIND = """
import importlib.util, sys
print(*filter(importlib.util.find_spec, sys.argv[1].split()))
"""


def copied(folder):
    """A clone as made by git."""
    skipped = shutil.ignore_patterns('__pycache__')
    for name in ('flatgpt', 'config'):
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    names = ['pyproject.toml', 'README.md', 'LICENSE', 'data/text/prepare.py']
    for name in [*names, *(path.name for path in ROOT.glob('*.py'))]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def poison(folder):
    """Make every Python file in the folder fail when it runs."""
    for path in folder.rglob('*.py'):
        path.write_text(f'raise RuntimeError("a file of {folder.name}")\n', encoding='utf-8')
    return folder


def built(clone, kind):
    """Build an 'editable' wheel, a 'wheel' or an 'sdist' with setuptools -> its path."""
    build = f'from setuptools import build_meta; print(build_meta.build_{kind}("."))'
    command = [sys.executable, '-W', 'ignore', '-c', build]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return clone / done.stdout.splitlines()[-1]


class Environment:
    """A virtual environment with the packages of this one, except for flatgpt: that of `wheel`."""

    def __init__(self, folder, wheel=None):
        venv.create(folder, symlinks=os.name != 'nt')
        self.python = next(path for path in folder.glob('*/python*') if path.stem == 'python')
        (site,) = folder.rglob('site-packages')
        # .pth files, which may point to an editable flatgpt, are not read there
        packages = [path for path in sys.path if path.endswith(('site-packages', 'dist-packages'))]
        (site / 'packages.pth').write_text('\n'.join(packages), encoding='utf-8')
        if wheel:
            with zipfile.ZipFile(wheel) as file:
                file.extractall(site)

    def run(self, *args, cwd):
        kept = {k: os.environ[k] for k in ('PATH', 'SYSTEMROOT', 'MPLCONFIGDIR') if k in os.environ}
        return subprocess.run(
            [self.python, *map(str, args)],
            cwd=cwd,
            env={**kept, 'HOME': str(cwd), 'OMP_NUM_THREADS': '1'},
            capture_output=True,
            encoding='utf-8',
        )


@pytest.fixture(scope='module')
def mine(tmp_path_factory):
    return copied(tmp_path_factory.mktemp('clones') / 'mine')


@pytest.fixture(scope='module')
def environment(mine, tmp_path_factory):
    """Make an environment: 'bare', with 'other', a second checkout, or with 'mine'."""
    folder = tmp_path_factory.mktemp('environments')

    @functools.cache
    def make(what):
        if what == 'bare':
            return Environment(folder / what)
        if what == 'other':
            other = copied(folder / 'other checkout')
            wheel = built(other, 'editable')
            poison(other)
            return Environment(folder / what, wheel)
        return Environment(folder / what, built(mine, 'editable'))

    return make


@pytest.fixture
def nanogpt(tmp_path):
    """Another project's directory, whose files must not run."""
    for name in ('model', 'configurator', 'train', 'sample', 'bench', 'api'):
        (tmp_path / f'{name}.py').touch()
    for name in ('data/__init__', 'data/shakespeare/prepare', 'config/__init__', 'config/train'):
        (tmp_path / f'{name}.py').parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f'{name}.py').touch()
    return poison(tmp_path)


def test_an_editable_install_exposes_one_name(environment, tmp_path):
    without = environment('bare').run('-c', FIND, NAMES, cwd=tmp_path).stdout.split()
    exposed = environment('mine').run('-c', FIND, NAMES, cwd=tmp_path).stdout.split()
    assert {*exposed} - {*without} == {'flatgpt'}


@pytest.mark.parametrize('installed', ['bare', 'other'])
def test_a_script_runs_and_writes_in_its_own_clone(installed, mine, environment, tmp_path):
    """It is started by its path from another directory, whatever is installed."""
    text = tmp_path / 'words.txt'
    text.write_text(' '.join(WORDS * 20), encoding='utf-8')
    shutil.rmtree(mine / 'data' / 'words', ignore_errors=True)
    prepare = (mine / 'data/text/prepare.py', text, '--name=words', '--tokenizer=char')
    python = environment(installed)
    for command in (prepare, (mine / 'train.py', *TRAIN.split())):
        done = python.run(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (mine / 'data' / 'words' / 'meta.json').exists()
    assert {path.name for path in tmp_path.iterdir()} >= {'run', 'words.txt'}
    assert not [*tmp_path.rglob('meta.json')]


@pytest.mark.faults  # the test above covers the mechanism with two scripts
@pytest.mark.parametrize('script', ['sample.py', 'bench.py', 'api.py', 'data/text/prepare.py'])
def test_every_script_runs_its_own_clone(script, mine, environment, nanogpt):
    done = environment('other').run(mine / script, '--help', cwd=nanogpt)
    assert done.returncode == 0, done.stderr


def test_the_library_is_ours_in_another_project_s_directory(environment, nanogpt):
    done = environment('mine').run('-m', 'flatgpt.checkpoint', 'inspect', RUN, cwd=nanogpt)
    assert done.returncode == 0, done.stderr
    assert 'gpt2, ' in done.stdout


def test_model_is_ours_once_flatgpt_is_imported(mine, environment, nanogpt):
    run = functools.partial(environment('mine').run, '-c', cwd=nanogpt)
    done = run('import flatgpt, model; print(model.__file__)')
    assert done.stdout.strip() == str(mine / 'model.py'), done.stderr
    (nanogpt / 'model.py').write_text('', encoding='utf-8')
    done = run('import model, flatgpt')
    assert done.stderr.splitlines()[-1] == (
        f'ImportError: import flatgpt before another module called model ({nanogpt / "model.py"})'
    )


def test_a_non_editable_install_is_refused_in_one_line(mine, environment, tmp_path):
    python = Environment(tmp_path / 'plain', built(mine, 'wheel'))
    done = python.run('-m', 'flatgpt.checkpoint', 'inspect', RUN, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith('`pip install -e .` in the clone)')
    done = python.run('-c', 'import flatgpt', cwd=tmp_path)
    assert done.stderr.splitlines()[-1].startswith('ImportError: flatgpt runs from a clone, and ')
    done = python.run(mine / 'sample.py', '--help', cwd=tmp_path)  # a clone still works
    assert done.returncode == 0, done.stderr


def test_builds_contain_one_package(mine):
    with zipfile.ZipFile(built(mine, 'wheel')) as file:
        roots = {name.split('/')[0] for name in file.namelist()}
    assert {name for name in roots if not name.endswith('.dist-info')} == {'flatgpt'}
    with tarfile.open(built(mine, 'sdist')) as file:
        names = [name.partition('/')[2] for name in file.getnames()]
    assert [name for name in names if name.endswith('.py') and name[:8] != 'flatgpt/'] == []


@pytest.mark.faults
@pytest.mark.parametrize('flags', [(), ('-e',)])
def test_pip_installs_the_one_name(flags, mine, tmp_path):
    venv.create(tmp_path / 'venv', symlinks=os.name != 'nt', with_pip=True)
    python = next(p for p in (tmp_path / 'venv').glob('*/python*') if p.stem == 'python')
    install = [python, '-m', 'pip', 'install', '-q', '--no-deps', *flags, str(mine)]
    subprocess.run(install, check=True)
    command = [python, '-c', FIND, NAMES]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ['flatgpt']
    command = [python, '-c', 'import flatgpt']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    refused = 'ImportError: flatgpt runs from a clone' in done.stderr
    assert (done.returncode, refused) == ((0, False) if flags else (1, True))
