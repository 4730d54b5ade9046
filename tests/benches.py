"""What the tests of bench.py and its package share: tiny settings, how a mistake ends,
and implementations in the test's process."""

import conftest
import pytest
import torch

import bench
from configurator import configure
from flatgpt.benchmarks import baselines, implementations
from flatgpt.runtime import Runtime

RUNTIME = Runtime('cpu', torch.float32)
TINY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--vocab_size=40', '--block_size=16']
TINY += ['--prompt_tokens=4', '--new_tokens=5', '--rounds=1', '--steps=1', '--device=cpu']


def settings(*flags):
    return configure({'__file__': bench.__file__, **vars(bench)}, [*TINY, *map(str, flags)])


def refused(*flags) -> str:
    return conftest.refused(bench.main, settings(*flags))


class ImplementationHere(implementations.Implementation):
    """One in this process: importing torch and transformers takes another some seconds."""

    about = ''

    def __init__(self, name, settings):
        self.name, self.format, self.failure = name, settings.get('format', ''), None
        self.program = baselines.BUILDERS[name](settings, RUNTIME)

    def wait_until_ready(self):
        pass

    def ask(self, method, arguments, trace):
        return implementations.measure(self.program, RUNTIME, method, arguments, trace)

    def dismiss(self):
        pass

    def close(self):
        pass


@pytest.fixture
def in_this_process(monkeypatch):
    """Implementations run in the test's process."""
    monkeypatch.setattr(implementations, 'Implementation', ImplementationHere)
