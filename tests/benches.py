"""
What the tests of bench.py and its package share: tiny settings, a machine that is measured fast.

A test file takes the fixture with `pytest_plugins = ['benches']`, and imports the rest.
"""

import pytest

import bench
from configurator import configure
from flatgpt.benchmarks import machine
from flatgpt.errors import UserError

TINY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--vocab_size=40', '--block_size=16']
TINY += ['--prompt_tokens=4', '--new_tokens=5', '--rounds=1', '--steps=1', '--device=cpu']


def settings(*flags):
    return configure({'__file__': bench.__file__, **vars(bench)}, [*TINY, *map(str, flags)])


def refused(*flags) -> str:
    with pytest.raises(UserError) as caught:
        bench.main(settings(*flags))
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def small_machine(monkeypatch):
    """Measure the machine by less than it takes to fill it."""
    monkeypatch.setitem(machine.MATRIX_SIZE, 'cpu', 128)
    monkeypatch.setitem(machine.READ_BYTES, 'cpu', 2**20)
