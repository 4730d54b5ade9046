"""launch/skypilot.yaml: SkyPilot's own check, and its commands on two "machines" without it."""

import ast
import contextlib
import glob
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, hashes, steps
from packaging.requirements import Requirement

from flatgpt.checkpoint.load import find_checkpoint

TASK = ROOT / 'launch' / 'skypilot.yaml'
# SkyPilot holds some packages to older versions than ours, so it may live in another environment
SKYPILOT = os.environ.get('FLATGPT_SKYPILOT') or (find_spec('sky') and sys.executable)
CHECK = """
import json, sys
import sky

task = sky.Task.from_yaml(sys.argv[1])
kinds = sorted({(str(each.cloud), each.use_spot) for each in task.resources})
mounts = {path: [each.name, each.mode.value] for path, each in task.storage_mounts.items()}
print(json.dumps([task.num_nodes, kinds, mounts]))
"""


def checked(path, environment):
    command = [SKYPILOT, '-c', CHECK, str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(not SKYPILOT, reason='needs SkyPilot: FLATGPT_SKYPILOT, the python that has it')
def test_skypilot_takes_the_task_as_it_is_meant(environment, tmp_path):
    done = checked(TASK, environment)
    assert done.returncode == 0, done.stderr
    nodes, kinds, mounts = json.loads(done.stdout.splitlines()[-1])
    assert nodes == 2
    assert kinds == [['AWS', True], ['GCP', True], ['Lambda', False], ['Nebius', True]]
    assert mounts == {'/checkpoints': ['flatgpt-checkpoints', 'MOUNT']}

    text = TASK.read_text(encoding='utf-8')
    wrong = tmp_path / 'wrong.yaml'
    wrong.write_text(text.replace('job_recovery', 'job_recover'), encoding='utf-8')
    assert 'job_recover' in checked(wrong, environment).stderr


# -----------------------------------------------------------------------------
# what the machines get: .skyignore as rsync reads it, for `sky launch`, and as SkyPilot itself
# does, for a bucket or its server

SENT = ('*.py', 'flatgpt/**/*.py', 'data/*/prepare.py', 'config/*.py', 'launch/*')
SENT += ('flatgpt/checkpoint/page.html', 'flatgpt/serving/playground.html')
SENT += ('flatgpt/benchmarks/tasks/*',)
SENT += ('pyproject.toml', 'README.md', 'LICENSE')  # which setuptools reads
KEPT_HERE = """
    .git/config .venv/bin/python venv/bin/python __pycache__/train.pyc data/__pycache__/encode.pyc
    flatgpt.egg-info/PKG-INFO out/mine/config.py out-poe/checkpoints/step-00000001/model.safetensors
    wandb/run/log bench.json data/openwebtext/train.bin data/openwebtext/part-00000/train.bin
    data/mine/meta.json data/mine/pages/1.html data/mine/.lock data/poe/input.txt
    data/sre/__pycache__/prepare.pyc
"""


def by_rsync(folder):
    command = ['rsync', '-a', '--filter=dir-merge,- .skyignore', f'{folder}/', f'{folder}-there']
    subprocess.run(command, check=True)
    return files_of(Path(f'{folder}-there'))


def by_glob(folder):
    excluded = set()
    for line in (folder / '.skyignore').read_text(encoding='utf-8').splitlines():
        if line and line[0] != '#':
            pattern = f'{folder}{line}' if line[0] == '/' else f'{folder}/**/{line}'
            excluded |= {Path(path) for path in glob.glob(pattern, recursive=True)}
    kept = [each for each in folder.rglob('*') if not excluded & {each, *each.parents}]
    return files_of(folder) & {each.relative_to(folder) for each in kept}


def files_of(folder):
    return {path.relative_to(folder) for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('reader', [by_rsync, by_glob])
def test_the_machines_get_all_scripts_and_neither_data_nor_runs(reader, tmp_path):
    if reader is by_rsync and not shutil.which('rsync'):
        pytest.skip('needs rsync')
    sent = {path.relative_to(ROOT) for pattern in SENT for path in ROOT.glob(pattern)}
    here = tmp_path / 'here'
    for path in {*sent, *map(Path, KEPT_HERE.split())}:
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).touch()
    shutil.copy(ROOT / '.skyignore', here)
    assert reader(here) - {Path('.skyignore')} == sent


def path_of(name, end='.py'):
    return ROOT / (name.replace('.', '/') + end)


def imports(script):
    """The modules that a script requires, without optional imports."""
    tree = ast.parse(script.read_text(encoding='utf-8'))
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    tried = {each for node in tries for each in ast.walk(node)}
    for node in ast.walk(tree):
        if node not in tried and isinstance(node, ast.ImportFrom):
            inside = [f'{node.module}.{each.name}' for each in node.names]
            ours = [name for name in inside if path_of(name).is_file()]
            yield from ours if path_of(node.module, '').is_dir() else [node.module]
        if node not in tried and isinstance(node, ast.Import):
            yield from (each.name for each in node.names)


def test_setup_installs_what_it_prepares_the_data_with():
    tomllib = pytest.importorskip('tomllib', reason='needs Python 3.11')
    yaml = pytest.importorskip('yaml')
    task = yaml.safe_load(TASK.read_text(encoding='utf-8'))
    scripts, packages = [ROOT / task['envs']['PREPARE'].split()[1]], set()
    for script in scripts:  # to which are added those of ours that they import
        for name in imports(script):
            ours = path_of(name)
            if not ours.is_file():
                packages.add(name.split('.')[0])
            elif ours not in scripts:
                scripts.append(ours)

    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    named = re.search(r'uv pip install -q -e \. (.*)', task['setup'])[1]
    named = [*project['dependencies'], *shlex.split(named, comments=True)]
    installed = {Requirement(each).name.replace('-', '_') for each in named}
    assert packages - sys.stdlib_module_names <= installed
    assert {'pyarrow', 'tiktoken', 'huggingface_hub'} <= packages


# -----------------------------------------------------------------------------
# two machines: network namespaces of this one, each with a folder as its disk

ADDRESSES = ('10.77.0.1', '10.77.0.2')
NAMES = [f'flatgpt-{os.getpid()}-{number}' for number in range(2)]


def ip(*args):
    subprocess.run(['ip', *args], check=True, capture_output=True)


@pytest.fixture(scope='module')
def network():
    """Two network namespaces with a cable between them."""
    if not shutil.which('ip') or not hasattr(os, 'geteuid') or os.geteuid() != 0:
        pytest.skip('needs root and iproute2, for network namespaces')
    with contextlib.ExitStack() as stack:
        try:
            for name in NAMES:
                ip('netns', 'add', name)
                stack.callback(ip, 'netns', 'delete', name)
            ends = ('name', 'eth0', 'netns')
            ip('link', 'add', *ends, NAMES[0], 'type', 'veth', 'peer', *ends, NAMES[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f'no network namespaces here: {error.stderr.decode().strip()}')
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip('-n', name, 'address', 'add', f'{address}/24', 'dev', 'eth0')
            ip('-n', name, 'link', 'set', 'eth0', 'up')
            ip('-n', name, 'link', 'set', 'lo', 'up')
        yield


@pytest.fixture
def machines(network, environment, tmp_path):
    """Start the task's commands on both machines with these settings -> the two processes."""
    yaml = pytest.importorskip('yaml')
    run = yaml.safe_load(TASK.read_text(encoding='utf-8'))['run']
    assert '"/checkpoints/' in run
    run = run.replace('"/checkpoints/', f'"{tmp_path}/bucket/')
    started = []

    def start(*settings):
        for rank, name in enumerate(NAMES):
            disk = make_disk(tmp_path / f'machine{rank}')
            task = {'RUN': 'mine', 'SETTINGS': ' '.join(map(str, settings))}
            told = {'SKYPILOT_NODE_IPS': '\n'.join(ADDRESSES), 'SKYPILOT_NODE_RANK': str(rank)}
            told |= {'SKYPILOT_NUM_NODES': '2', 'SKYPILOT_NUM_GPUS_PER_NODE': '1'}
            # gloo would look up this machine's own name, which is none of the two addresses
            env = {**environment, **task, **told, 'GLOO_SOCKET_IFNAME': 'eth0'}
            command = ['ip', 'netns', 'exec', name, 'bash', '-c', run]
            pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
            process = subprocess.Popen(command, cwd=disk, env=env, **pipes)
            started.append(process)
        return started[-2:]

    yield start
    take_away()
    for process in started:
        process.wait()
        process.stdout.close()


def make_disk(folder):
    """Create what SkyPilot's workdir and the task's setup leave on a machine."""
    folder.mkdir(exist_ok=True)
    (folder / '.venv' / 'bin').mkdir(parents=True, exist_ok=True)
    activate = f'PATH="{os.path.dirname(sys.executable)}:$PATH"\n'
    (folder / '.venv' / 'bin' / 'activate').write_text(activate, encoding='utf-8')
    with contextlib.suppress(FileExistsError):
        (folder / 'train.py').symlink_to(ROOT / 'train.py')
    return folder


def take_away():
    """Kill whatever runs on the machines."""
    for name in NAMES:
        found = subprocess.run(['ip', 'netns', 'pids', name], capture_output=True, text=True)
        for pid in map(int, found.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def finish(processes):
    """The output of each process, once it has ended."""
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], '\n'.join(texts)
    return texts


FIXED = ('--dropout=0.2', '--lr_decay_iters=1000', '--eval_interval=100000', '--save_interval=5')


@pytest.mark.faults
def test_on_another_machine_a_run_resumes_from_the_bucket(machines, script, tiny, tmp_path):
    first = machines(tiny, *FIXED, '--max_iters=100000')
    bucket, deadline = tmp_path / 'bucket' / 'mine', time.monotonic() + 60
    while not (bucket / 'checkpoints').is_dir() or not steps(bucket):
        assert time.monotonic() < deadline
        assert [process.poll() for process in first] == [None, None]
        time.sleep(0.1)
    take_away()
    for rank, process in enumerate(first):
        process.wait()
        shutil.rmtree(tmp_path / f'machine{rank}')

    last = steps(bucket)[-1] + 10
    text, _ = finish(machines(tiny, *FIXED, f'--max_iters={last}'))
    assert f'step {last}/' in text
    assert 'step 1/' not in text
    out_dir = tmp_path / 'machine0' / 'out' / 'mine'
    assert (out_dir / 'DONE').exists()
    python = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
    whole = (tiny, *FIXED, f'--out_dir={tmp_path}/whole', f'--max_iters={last}')
    assert script('train.py', *whole, python=python).returncode == 0
    assert hashes(find_checkpoint(out_dir, 'last')) == hashes(
        find_checkpoint(tmp_path / 'whole', 'last')
    )
