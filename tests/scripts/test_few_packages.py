"""Scripts with few packages installed: torch, transformers and numpy, as on many rented GPUs."""

import pytest
from conftest import ROOT

README = str(ROOT / 'README.md')  # some text
ABSENT = (
    'flask waitress spectree prometheus_client bs4 datasets lm_eval wandb matplotlib tiktoken '
    'requests pyarrow tensorboard gigatoken gguf peft pydantic'
).split()
BLOCKED = """
import runpy, sys
class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition('.')[0] in {absent!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent)
script = sys.argv[1]
del sys.argv[0]
sys.path.insert(0, {root!r})
if script.endswith('bench.py'):  # measures the machine by less than it takes to fill it
    from flatgpt.benchmarks import machine
    machine.MATRIX_SIZE['cpu'], machine.READ_BYTES['cpu'] = 128, 2**20
runpy.run_path(script, run_name='__main__')
"""


@pytest.fixture(scope='module')
def few(script, tmp_path_factory):
    """Run a script without the packages that only parts of flatGPT need."""
    program = tmp_path_factory.mktemp('few') / 'blocked.py'
    program.write_text(BLOCKED.format(absent=ABSENT, root=str(ROOT)), encoding='utf-8')

    def run(name, *args):
        return script(program, ROOT / name, *args, cwd=program.parent)

    return run


def test_training_and_sampling_need_no_other_packages(few, tiny, byte_dataset):
    data = f'--dataset={byte_dataset}'
    done = few('train.py', tiny, data, '--out_dir=run', '--sample_tokens=5')
    assert (done.returncode, done.stderr) == (0, '')
    assert 'warning: no loss curve: this needs the package matplotlib: pip install' in done.stdout
    assert 'sample:' in done.stdout
    flags = ('--out_dir=run', '--num_samples=1', '--max_new_tokens=5', '--device=cpu')
    done = few('sample.py', 'the cat', *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('the cat')


def test_a_benchmark_needs_no_other_packages(few):
    shape = ('--n_layer=1', '--n_embd=32', '--vocab_size=64', '--block_size=32', '--device=cpu')
    turn = ('--rounds=1', '--steps=1', '--batch_size=1', '--quick', '--only=training')
    done = few('bench.py', *turn, *shape)
    assert done.returncode == 0, done.stderr
    assert 'flatGPT' in done.stdout
    few_lines = few('bench.py', '--help').stdout
    assert '--only=' in few_lines


@pytest.mark.parametrize(
    ('command', 'package'),
    [
        (('api.py', '--help'), 'flask'),
        (('data/sre/prepare.py',), 'beautifulsoup4'),
        (
            ('data/text/prepare.py', str(ROOT / 'README.md'), '--out_dir=x', '--tokenizer=gpt2'),
            'tiktoken',
        ),
        (('bench.py', '--task=lambada', '--out_dir=run'), '"lm_eval'),
        (('train.py', '--wandb_log', '--device=cpu'), '-e ".[all]"'),
    ],
)
def test_a_missing_package_is_reported_with_its_pip_command(few, tiny, command, package):
    if command[0] == 'train.py':
        command = (command[0], str(tiny), *command[1:])
    done = few(*command)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith('error: ')
    assert f'pip install {package}' in line


def test_the_absent_packages_cannot_be_imported(few, tmp_path):
    program = tmp_path / 'program.py'
    program.write_text('import flask\n', encoding='utf-8')
    assert few(program).returncode == 1
