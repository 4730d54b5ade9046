"""Measuring the machine, and the formats that suit it."""

from types import SimpleNamespace

import pytest
import torch

from flatgpt import runtime
from flatgpt.benchmarks import machine
from flatgpt.benchmarks.decoding import choose_formats


@pytest.mark.parametrize(('seconds', 'size'), [(0.01, 2048), (64 * 0.1, 512)])
def test_slow_products_are_measured_with_small_matrices(monkeypatch, seconds, size):
    clock, sizes = [0.0], []

    class Matrix:
        """Multiplied in a time that its size determines; the first product takes longer."""

        def __init__(self, size, columns, device):
            sizes.append(size)

        def to(self, dtype):
            return self

        def __matmul__(self, other):
            clock[0] += seconds * (sizes[-1] / 2048) ** 3 + (not clock[0])

    monkeypatch.setattr(torch, 'randn', Matrix)
    monkeypatch.setattr(machine, 'time', SimpleNamespace(perf_counter=lambda: clock[0]))
    flops = machine.measure_matmul('cpu', torch.float32)
    assert sizes[-1] == size
    assert flops == pytest.approx(2 * 2048**3 / seconds)


@pytest.mark.parametrize(
    ('device', 'has_bf16', 'quick', 'formats'),
    [
        ('cpu', True, False, 'float32,bfloat16,int8'),
        ('cpu', False, False, 'float32,int8'),
        ('cpu', True, True, 'bfloat16,int8'),
        ('cpu', False, True, 'float32,int8'),
        ('cuda:0', False, True, 'bfloat16,int8'),
    ],
)
def test_formats_are_chosen_that_are_fast_here(monkeypatch, device, has_bf16, quick, formats):
    monkeypatch.setattr(runtime, 'cpu_has_bf16', lambda: has_bf16)
    monkeypatch.setattr(runtime, 'bf16_is_faster', lambda: False)  # only for training
    settings = {'formats': 'auto', 'serve_format': 'auto', 'quick': quick}
    fast = 'bfloat16' if 'bfloat16' in formats else 'float32'
    assert choose_formats(settings, device) == {'formats': formats, 'serve_format': fast}
    given = {**settings, 'formats': 'int8', 'serve_format': 'int8'}
    assert choose_formats(given, device) == {}
