"""What the tests of bench.py and its package share: tiny settings, and how a mistake ends."""

import pytest

import bench
from configurator import configure
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
