"""
Starts train.py quickly: an interpreter that has imported everything forks.

    crew = Forks(environment, folder).start(2, '--shard', config='tiny.py')
    crew.end() -> [0, 0]

Each rank is a separate process in its own process group, and exits like any interpreter. torchrun
takes five seconds for two ranks, most of it imports. `before`: Python code that runs before the
script, to inject a fault. hosts: the network namespace of each rank, as a machine of that
name.
"""

import ctypes
import faulthandler
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000
PORTS = itertools.count(20_000 + 64 * os.getpid() % 10_000)  # test processes have their own


# -----------------------------------------------------------------------------
# the interpreter that forks


def serve() -> dict:
    """Serve requests from standard input; in a forked process, return its task."""
    statuses = {}
    for line in sys.stdin:
        task = json.loads(line)
        if 'poll' in task:
            pid = task['poll']
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            answer = statuses.get(pid)
        else:
            answer = os.fork()
            if answer == 0:
                return task
        print(json.dumps(answer), flush=True)
    os._exit(0)


def become(task: dict) -> None:
    """Set up the forked process for its task, before its script starts."""
    os.setsid()
    out, err = (os.open(task[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in OUTPUTS)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    faulthandler.enable(2)
    os.environ.clear()
    os.environ.update(task['env'])
    if task['host']:
        enter(task['host'])
    sys.argv = [str(ROOT / 'train.py'), *task['args']]


def enter(host: str) -> None:
    """Enter a network namespace and take its name as the hostname."""
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open(f'/run/netns/{host}', os.O_RDONLY)
    if libc.setns(namespace, CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS):
        raise OSError(ctypes.get_errno(), 'cannot enter the namespace')
    socket.sethostname(host)


OUTPUTS = ('out', 'err')


# -----------------------------------------------------------------------------
# the tests' side


class Rank:
    def __init__(self, forks, pid: int, files: dict):
        self.forks, self.pid, self.files = forks, pid, files

    @property
    def out(self) -> str:
        return Path(self.files['out']).read_text(encoding='utf-8')

    @property
    def err(self) -> str:
        return Path(self.files['err']).read_text(encoding='utf-8')

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self.forks.ask({'poll': self.pid})

    def end(self, seconds: float = 100) -> int:
        """Wait for the process -> its exit status."""
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGABRT)  # then it prints where each of its threads is
                time.sleep(1)
                raise AssertionError(f'running: {self.out[-500:]} {self.err[-4000:]}')
            time.sleep(0.01)
        return status

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def says(self, text: str, seconds: float = 60) -> None:
        """Wait until it has printed `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.out:
            gone = self.poll() is not None or time.monotonic() > deadline
            assert not gone or text in self.out, f'{text!r} is missing: {self.err[-2000:]}'
            time.sleep(0.005)


class Crew(list):
    """The ranks of one run."""

    def end(self, seconds: float = 100) -> list[int]:
        return [rank.end(seconds) for rank in self]

    @property
    def out(self) -> str:
        return ''.join(rank.out for rank in self)

    @property
    def err(self) -> str:
        return ''.join(rank.err for rank in self)


class Forks:
    def __init__(self, environment: dict, folder: Path):
        self.environment, self.folder, self.count, self.started = environment, folder, 0, []
        pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, env=environment, cwd=folder, **pipes)

    def ask(self, task: dict):
        self.process.stdin.write(json.dumps(task) + '\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, world: int, *args, config, before='', env=None, hosts=(), port=None) -> Crew:
        """Start `world` ranks of train.py; 0: a single process. Each argument may be a function
        of the rank."""
        meeting = {'MASTER_ADDR': hosts[0].address if hosts else '127.0.0.1'}
        meeting |= {'MASTER_PORT': port or free_port(), 'WORLD_SIZE': world}
        crew = Crew()
        for rank in range(max(1, world)):
            mine = {'RANK': rank, 'LOCAL_RANK': 0 if hosts else rank, **meeting} if world else {}
            own = [of(rank) if callable(of) else of for of in (before, env or {}, config, *args)]
            crew.append(self.fork(*own, mine=mine, host=hosts[rank].name if hosts else ''))
        return crew

    def fork(self, before, env, *args, mine, host) -> Rank:
        self.count += 1
        files = {name: str(self.folder / f'{self.count}.{name}') for name in OUTPUTS}
        for path in files.values():
            Path(path).touch()
        env = {name: str(value) for name, value in {**self.environment, **mine, **env}.items()}
        task = {'args': list(map(str, args)), 'before': before, 'host': host, 'env': env, **files}
        rank = Rank(self, self.ask(task), files)
        self.started.append(rank)
        return rank

    def clear(self) -> None:
        """Kill all remaining processes."""
        for rank in self.started:
            if rank.poll() is None:
                rank.send(signal.SIGKILL)
                rank.end()
        self.started = []

    def close(self) -> None:
        self.clear()
        self.process.communicate()


def free_port() -> int:
    """A port below those that the system gives to connections, which could take it meanwhile."""
    for port in PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(('127.0.0.1', port))
            return port


if __name__ == '__main__':
    import runpy
    import warnings

    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch._dynamo  # which DDP imports: two seconds
    import torch.distributed.device_mesh
    import torch.distributed.fsdp
    import torch.distributed.tensor

    sys.path.insert(0, str(ROOT))
    import sample  # noqa: F401
    from flatgpt.benchmarks import lm_eval  # noqa: F401
    from flatgpt.checkpoint import save  # noqa: F401
    from flatgpt.training import (
        metrics,  # noqa: F401
        watchdog,  # noqa: F401
    )

    torch.set_num_threads(1)
    warnings.filterwarnings('ignore', message='.*fork.*')
    task = serve()
    become(task)
    exec(task['before'])
    runpy.run_path(sys.argv[0], run_name='__main__')
