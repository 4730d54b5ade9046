"""Implementations: processes measured alternately, and one line for each that fails."""

import multiprocessing

import pytest
import torch

from flatgpt.benchmarks import baselines, implementations
from flatgpt.errors import UserError


class Pipe:
    """What an implementation's process sends, without a process."""

    def __init__(self, requests=()):
        self.requests, self.sent = [*requests, None], []

    def recv(self):
        return self.requests.pop(0)

    def send(self, message):
        self.sent.append(message)


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (ModuleNotFoundError("No module named 'x'", name='transformers'), 'is not installed'),
        (UserError('no such thing'), 'no such thing'),
        (torch.OutOfMemoryError('tried to allocate'), 'out of memory'),
        (RuntimeError('something\nlong'), 'RuntimeError: something'),
    ],
)
def test_an_implementation_that_cannot_be_built_reports_why_in_a_line(monkeypatch, error, line):
    def build(settings, runtime):
        raise error

    monkeypatch.setitem(baselines.BUILDERS, 'transformers', build)
    pipe = Pipe()
    implementations.run_implementation(
        pipe, 'transformers', {'device': 'cpu', 'dtype': 'float32', 'workload': 'training'}
    )
    assert len(pipe.sent) == 1
    assert isinstance(pipe.sent[0], implementations.Failure)
    assert line in pipe.sent[0]
    assert '\n' not in pipe.sent[0]


def test_an_implementation_that_was_killed_is_a_line_and_not_a_broken_pipe():
    implementation = implementations.Implementation.__new__(implementations.Implementation)
    implementation.pipe, other = multiprocessing.Pipe()
    other.close()
    implementation.failure = None
    assert implementation.measure('decode', 1) is None
    assert 'was killed' in implementation.failure
