"""Shared fixtures: a tiny dataset, tiny settings, and ways to run the scripts."""

import functools
import gc
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from error_lines import pattern_of
from forks import Forks

import sample as sample_module
from configurator import configure
from flatgpt import errors, files
from flatgpt.benchmarks import machine
from flatgpt.checkpoint import load, save
from flatgpt.data.dataset import Writer
from flatgpt.data.encode import cores
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer
from flatgpt.errors import UserError
from flatgpt.runtime import available_host_memory
from flatgpt.serving.api_error import APIError
from flatgpt.training import metrics as metrics_module
from flatgpt.training import run as run_module
from flatgpt.training import run_directory
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
# package -> test files that need it, besides the dependencies of torch, transformers and pytest
NEEDED = {
    'flask': ['serving', 'compat', 'launch/test_launch.py', 'scripts/test_serving_docs.py'],
    'bs4': ['data/test_corpora.py'],
    'requests': ['data/test_cache.py', 'data/test_dataset.py', 'data/test_tokenizer.py'],
    'tiktoken': [
        'data/test_prepare.py',
        'data/test_text_advice.py',
        'data/test_tokenizer_advice.py',
    ],
    'lm_eval': ['benchmarks/test_lm_eval.py'],
    'psutil': ['scripts/test_demo.py'],
}
collect_ignore = [name for package in NEEDED if not find_spec(package) for name in NEEDED[package]]
# before a test file imports it
pytest.register_assert_rewrite('benches', 'browser', 'growth', 'hub', 'rl_runs', 'server')
# A shell ignores these signals in background jobs, and tested programs would inherit that
for name in ('SIGINT', 'SIGHUP'):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.default_int_handler)
WORDS = 'the cat sat on a mat and saw that the dog ran to his den as rain fell at noon'.split()
TINY = """
dataset = {dataset!r}
block_size = 16
batch_size = 4
gradient_accumulation_steps = 2
n_layer = 1
n_head = 2
n_embd = 16
learning_rate = 1e-2
min_lr = 1e-3
max_iters = 4
warmup_iters = 0
lr_decay_iters = max_iters
eval_interval = 2
eval_iters = 2
sample_tokens = 0
device = 'cpu'
dtype = 'float32'
compile = False
"""

FOREVER = ('--max_iters=100000', '--eval_interval=100000', '--gradient_accumulation_steps=6')
SHARE = int(os.environ.get('FLATGPT_FAULTS', '100')) / 100  # of the fault suite's iterations
MODERN = ('--arch=modern', '--n_kv_head=1', '--optimizer=muon', '--muon_lr=0.05')

torch.set_num_threads(1)  # more threads are slower for tiny models
os.environ['OMP_NUM_THREADS'] = '1'  # also in other processes
# matplotlib caches its fonts, by default in the user's home directory; its settings are in tests/
os.environ['MPLCONFIGDIR'] = str(Path(tempfile.gettempdir()) / 'flatgpt-tests-matplotlib')
os.environ['MATPLOTLIBRC'] = str(Path(__file__).with_name('matplotlibrc'))


def pytest_xdist_auto_num_workers(config):
    """The number of test processes: one more than cores for the whole suite, otherwise one.

    The suite spends a quarter of its time waiting for other processes. Each test process may take
    2 GiB. The fault and load suites kill processes at given times and therefore run alone.
    """
    whole = config.args_source == config.ArgsSource.TESTPATHS
    if whole and 'not faults and not load' in config.option.markexpr and not config.option.keyword:
        return max(1, min(cores() + 1, int((available_host_memory() or 2**34) / 2**31)))
    config.option.dist = 'no'
    return 0


def pytest_collection_finish():
    """Keep the collected tests and imported packages out of the garbage collector's searches."""
    gc.freeze()


REPORTED = []  # error lines of the running test, if it is marked with some


@pytest.fixture(autouse=True)
def meets_its_error_lines(request, monkeypatch):
    """Check that a test marked with error lines provokes them, see error_lines.py."""
    marks = list(request.node.iter_markers('error_line'))
    if not marks:
        return (yield)
    REPORTED.clear()
    for kind in (UserError, APIError):

        def init(self, *args, _init=kind.__init__, **options):
            _init(self, *args, **options)
            REPORTED.append(str(self))

        monkeypatch.setattr(kind, '__init__', init)
    yield
    for part in (part for mark in marks for part in mark.args):
        met = re.compile(pattern_of(part), re.DOTALL)
        assert any(map(met.search, REPORTED)), f'did not meet {part!r}'


def finish(engine, *requests):
    """Run an engine until it has completed these requests."""
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass


def random_model(vocab_size, block_size=16, seed=0, **changes):
    """An untrained model whose predictions are far from uniform."""
    torch.manual_seed(seed)
    shape = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, **(changes or {'bias': True})}
    model = GPT(GPTConfig(block_size, vocab_size, **shape))
    for parameter in model.parameters():  # larger than the initial weights
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def saved(folder, tokenizer, vocab_size=None, block_size=16):
    """Make a run directory with a checkpoint of a random model -> the directory."""
    model = random_model(vocab_size or tokenizer.vocab_size, block_size)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {'step': 3, 'val_loss': 1.0, 'evaluated': True}
    save.save_checkpoint(folder, model, [optimizer], tokenizer, state)
    return folder


def make_dataset(folder, tokenizer=None, train=4000, val=600, seed=0):
    """Make a dataset of random sentences; sizes in characters -> its directory."""
    chosen = np.random.default_rng(seed).choice(WORDS, train + val)
    text = ' '.join(chosen.tolist())
    tokenizer = tokenizer or char_tokenizer(sorted(set(text)))
    with Writer(folder, tokenizer) as writer:
        writer.write('train', tokenizer.encode(text[:train]))
        writer.write('val', tokenizer.encode(text[train : train + val]))
    return folder


@pytest.fixture(scope='session')
def shared(tmp_path_factory):
    """A directory for files that no test changes."""
    return tmp_path_factory.mktemp('shared')


@pytest.fixture(scope='session')
def dataset(shared):
    return make_dataset(shared / 'letters')


@pytest.fixture(scope='session')
def byte_dataset(shared):
    return make_dataset(shared / 'bytes', byte_tokenizer())


@pytest.fixture(scope='session')
def tiny(shared, dataset):
    """A config file with the smallest model and the shortest run."""
    path = shared / 'tiny.py'
    path.write_text(TINY.format(dataset=str(dataset)), encoding='utf-8')
    return path


@pytest.fixture(scope='session')
def environment(shared):
    """The environment of a subprocess, without the user's home directory and settings."""
    kept = {k: os.environ[k] for k in ('PATH', 'SYSTEMROOT', 'TEMP') if k in os.environ}
    home = shared / 'home'
    home.mkdir(exist_ok=True)
    return {
        **kept,
        'HOME': str(home),
        'USERPROFILE': str(home),
        'MPLCONFIGDIR': os.environ['MPLCONFIGDIR'],
        'OMP_NUM_THREADS': '1',
        'PYTHONPATH': str(ROOT),
        'HF_HUB_OFFLINE': '1',
        'WANDB_MODE': 'offline',
    }


@pytest.fixture(scope='session')
def script(environment, shared):
    """Run a script or module in a process of its own and wait for its end."""

    def program(name):
        return [str(ROOT / name)] if str(name).endswith('.py') else ['-m', name]

    def run(name, *args, cwd=None, env=None, python=(), input=None):
        done = subprocess.run(
            [sys.executable, *python, *program(name), *map(str, args)],
            cwd=cwd or shared,
            env={**environment, **(env or {})},
            input=input,
            capture_output=True,
            encoding='utf-8',
        )
        REPORTED.extend((done.stdout, done.stderr))
        return done

    return run


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    """Run the test in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small_machine(monkeypatch):
    """Measure the machine with small matrices and reads."""
    monkeypatch.setitem(machine.MATRIX_SIZE, 'cpu', 128)
    monkeypatch.setitem(machine.READ_BYTES, 'cpu', 2**20)


@pytest.fixture(scope='session')
def forks(environment, shared):
    if not hasattr(os, 'fork'):
        pytest.skip('needs os.fork')
    forks = Forks(environment, shared)
    yield forks
    forks.close()


@pytest.fixture
def ranks(forks, tiny):
    """Start several ranks of train.py with the tiny settings -> a Crew, killed after the test."""
    yield functools.partial(forks.start, config=tiny)
    forks.clear()


@pytest.fixture
def two_ranks(ranks):
    """Run train.py as two processes, to their end -> what they print."""

    def run(*args):
        crew = ranks(2, *args)
        assert crew.end() == [0, 0], crew.err
        return crew.out

    return run


@pytest.fixture(scope='session')
def run_here(tiny):
    """Run train.py with the tiny settings inside this process, ten times as fast as a subprocess.

    Returns its exit status; an invalid setting raises UserError. Signal handlers, hooks and the
    run's lock are released afterwards.
    """

    def run(*args, config=tiny):
        locks, trackers = [], []

        class Lock(filelock.FileLock):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                locks.append(self)

        class Tracker(metrics_module.Tracker):
            def __init__(self, *args):
                super().__init__(*args)
                trackers.append(self)

        names = ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP')
        names = [name for name in names if hasattr(signal, name)]
        handlers = {name: signal.getsignal(getattr(signal, name)) for name in names}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', ['train.py', str(config), *map(str, args)])
            for name in ('excepthook', 'stdout', 'stderr'):
                patch.setattr(sys, name, getattr(sys, name))
            patch.setattr(run_directory, 'FileLock', Lock)
            patch.setattr(run_module, 'Tracker', Tracker)
            for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
                patch.delenv(name, raising=False)
            try:
                runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')
                return 0
            except SystemExit as end:
                return end.code or 0
            finally:
                for name, handler in handlers.items():
                    signal.signal(getattr(signal, name), handler)
                for lock in locks:
                    lock.release(force=True)
                for tracker in trackers:
                    tracker.close()

    return run


def sample(*args, input=''):
    """Run sample.py inside this process, ten times as fast as a subprocess.

    In float32, where a sample does not depend on the others in its batch.
    """
    streams = [io.TextIOWrapper(io.BytesIO(data)) for data in (input.encode(), b'', b'')]
    arguments, status = ['--dtype=float32', *map(str, args)], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['sample.py', *arguments])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        for name, stream in zip(('stdin', 'stdout', 'stderr'), streams, strict=True):
            patch.setattr(sys, name, stream)
        patch.setattr(sys, '__stderr__', sys.stderr)  # where the hook prints
        try:
            try:
                runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
            except UserError as error:
                sys.excepthook(type(error), error, None)
        except SystemExit as end:
            status = end.code or 0
    written = []
    for stream in streams[1:]:
        stream.flush()
        written.append(stream.buffer.getvalue().decode('utf-8'))
    REPORTED.extend(written)
    return subprocess.CompletedProcess(arguments, status, *written)


def refused(call, *args, error=UserError, **options) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def fails(*args):
    """The error line of sample.py with these arguments."""
    with pytest.raises(UserError) as error:
        sample_module.main(configure(dict(vars(sample_module)), list(args), positional='start'))
    assert '\n' not in str(error.value)
    return str(error.value)


def follow_advice(run, *args):
    """Call run(*args), adding the flag that each out-of-memory error advises -> all advice."""
    advice = []
    while True:
        try:
            run(*args, *(flag for text in advice for flag in text.split()))
            return advice
        except (RuntimeError, MemoryError) as error:
            found = next(filter(None, (explain(error) for explain in errors._explainers)))
            advice.append(str(found).partition('; try ')[2].partition(' or ')[0])


def metrics(out_dir, key='loss'):
    """{step: value} of the lines in metrics.jsonl with this key."""
    lines = (Path(out_dir) / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return {line['step']: line[key] for line in map(json.loads, lines) if key in line}


def steps(out_dir):
    """The steps of the checkpoints in a run directory."""
    return [load.step_of(path) for path in load.list_checkpoints(out_dir)]


def hashes(path):
    """The sha256 of a checkpoint's model and optimizer."""
    return {name: files.sha256(path / name) for name in (load.MODEL_FILE, load.OPTIMIZER_FILE)}
