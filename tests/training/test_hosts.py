"""Several machines, as network namespaces of this one: they train as one, and one of them is lost.

Making them needs root and the ip command; elsewhere these tests are skipped.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
from conftest import FOREVER, ROOT, metrics, steps

pytestmark = pytest.mark.faults
PLAIN = ('--gradient_accumulation_steps=6', '--max_iters=12', '--eval_interval=6')


class Host(NamedTuple):
    name: str
    address: str

    def run(self, *command, **options):
        return subprocess.Popen(['ip', 'netns', 'exec', self.name, *command], **options)

    def link(self, state: str) -> None:
        """Plug its network cable in or out: 'up' or 'down'."""
        ip('-n', self.name, 'link', 'set', 'eth0', state)


def ip(*args, check=True):
    return subprocess.run(['ip', *args], check=check, capture_output=True, text=True)


@pytest.fixture
def hosts(environment):
    """Three hosts at one switch, which is a namespace too: nothing of this machine changes."""
    if not shutil.which('ip') or not hasattr(os, 'geteuid') or os.geteuid() != 0:
        pytest.skip('network namespaces need root and the ip command')
    switch, *names = (f'flatgpt{os.getpid()}-{name}' for name in ('switch', 'a', 'b', 'c'))
    if (made := ip('netns', 'add', switch, check=False)).returncode:
        pytest.skip(f'network namespaces are not allowed here: {made.stderr.strip()}')
    try:
        ip('-n', switch, 'link', 'add', 'bridge', 'type', 'bridge')
        ip('-n', switch, 'link', 'set', 'bridge', 'up')
        made = [Host(name, f'10.77.0.{n}') for n, name in enumerate(names, 1)]
        for n, host in enumerate(made):
            ip('netns', 'add', host.name)
            ends = ('eth0', 'netns', host.name, 'type', 'veth', 'peer', f'port{n}', 'netns', switch)
            ip('link', 'add', *ends)
            ip('-n', switch, 'link', 'set', f'port{n}', 'master', 'bridge', 'up')
            ip('-n', host.name, 'address', 'add', f'{host.address}/24', 'dev', 'eth0')
            for device in ('lo', 'eth0'):
                ip('-n', host.name, 'link', 'set', device, 'up')
        yield made
    finally:
        for name in (switch, *names):
            ip('netns', 'delete', name, check=False)


def own(text):
    """The lines that are not torch's, which has warnings about hosts that have no names."""
    return [line for line in text.splitlines() if not re.match(r'\[W|frame #|$', line)]


WIRED = {'GLOO_SOCKET_IFNAME': 'eth0'}


@pytest.mark.parametrize(('world', 'shard'), [(2, True), (3, False)])
def test_hosts_train_as_one(ranks, run_here, hosts, tmp_path, world, shard):
    flags = (*PLAIN, f'--shard={shard}')
    crew = ranks(world, f'--out_dir={tmp_path}/many', *flags, hosts=hosts, env=WIRED)
    assert crew.end() == [0] * world, crew.err
    assert own(crew.err) == []
    run_here(f'--out_dir={tmp_path}/one', *PLAIN)
    for key in ('loss', 'val_loss'):
        one, many = (metrics(tmp_path / name, key) for name in ('one', 'many'))
        assert many == pytest.approx(one, rel=1e-5), key


@pytest.mark.parametrize('how', ['killed', 'link cut'])
@pytest.mark.parametrize('which', [0, 2])
def test_of_a_lost_host_the_others_say_so_and_leave(ranks, hosts, tmp_path, how, which):
    args = (f'--out_dir={tmp_path}', *FOREVER, '--hang_timeout=4')
    crew = ranks(3, *args, hosts=hosts, env=WIRED)
    crew[0].says('step 3/')
    started = time.monotonic()
    if how == 'killed':
        crew[which].send(signal.SIGKILL)
    else:
        hosts[which].link('down')
    others = [rank for n, rank in enumerate(crew) if n != which]
    assert [rank.end(30) for rank in others] == [1, 1]
    assert time.monotonic() - started < 4 + 5
    said = '\n'.join(line for rank in others for line in own(rank.err))
    assert 'Traceback' not in said
    if which == 0:  # which keeps the store
        line = r'rank 0 on 10\.77\.0\.1, or the network to it, does not answer'
    else:
        line = rf'rank 2 \(process {crew[2].pid} on {hosts[2].name}\) sends no heartbeat'
    assert re.search(rf'^error \(rank [01]\): .*{line}', said, re.M), said
    if how == 'link cut':
        assert crew[which].end(30) == 1  # alone on its side, it does not stay either
        said = own(crew[which].err)
        assert said[0].startswith(f'error (rank {which}): '), said


def torchrun(host, out_dir, config, environment, *args):
    """One host's part of an elastic run: one host or two, and started again if one is lost."""
    options = ['--nnodes=1:2', '--nproc_per_node=1', '--max-restarts=5', '--rdzv_backend=c10d']
    options += ['--rdzv_endpoint=10.77.0.1:29500', f'--local-addr={host.address}']
    keeps = f'is_host={int(host.address == "10.77.0.1")}'  # the store; there are no names to tell
    options += [f'--rdzv_conf={keeps},join_timeout=30,last_call_timeout=2,keep_alive_interval=1']
    env = {**environment, **WIRED, 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}
    command = [sys.executable, '-m', 'torch.distributed.run', *options, ROOT / 'train.py', config]
    command = [*command, f'--out_dir={out_dir}', '--auto_resume', *args]
    with open(out_dir.with_suffix(f'.{host.address}'), 'wb') as log:
        pipes = {'stdout': log, 'stderr': log, 'start_new_session': True}
        return host.run(*map(str, command), env=env, **pipes)


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize('how', ['killed', 'link cut'])
def test_a_host_of_two_is_lost_and_the_other_trains_on_within_half_a_minute(
    hosts, run_here, tmp_path, tiny, environment, how
):
    first, second = hosts[:2]
    out_dir = tmp_path / 'run'
    args = ('--gradient_accumulation_steps=6', '--eval_interval=100000', '--save_interval=5')
    args += ('--hang_timeout=5', '--lr_decay_iters=1000')
    args += ('--max_iters=100000',)
    nodes = [torchrun(host, out_dir, tiny, environment, *args) for host in (first, second)]
    log = out_dir.with_suffix(f'.{first.address}')
    try:
        until(lambda: out_dir.exists() and len(steps(out_dir)) > 1, 60)
        assert '2 processes' in log.read_text()
        if how == 'killed':
            for pid in ip('netns', 'pids', second.name).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
        else:
            second.link('down')
        lost, started = time.monotonic(), len(log.read_text())
        alone = re.compile(r'machine: cpu, float32\n(.*\n)*step \d+/')
        until(lambda: alone.search(log.read_text(), started), 60)
        assert time.monotonic() - lost < 30
    finally:
        for node in nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
        for host in (first, second):
            for pid in ip('netns', 'pids', host.name).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for node in nodes:
            node.wait()
