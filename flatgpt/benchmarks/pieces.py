"""
bench.py's comparison of the pieces that model.py and optim.py write out with torch's own.

$ python bench.py --only=pieces                # in the dtype of this processor
$ ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python bench.py --only=pieces --dtype=float32

Forward and backward of one layer, for the sizes of a small model on a CPU. A ratio above 1 means
that the piece is faster than torch's.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from flatgpt.benchmarks.report import Report, format_spread, print_row, summarize
from flatgpt.runtime import Runtime, synchronize
from flatgpt.training.optim import orthogonalize
from model import dropout, eager_attention, rms_norm, squared_relu

TOKENS, WIDTH, HEADS = 3072, 160, 2
LENGTHS = (64, 256, 512, 1024)  # of sequences, for attention
REPEAT = 5  # passes per measurement


def pieces(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable, Callable, list]]:
    """(name, ours, torch's, the shapes of the inputs)."""
    rows = (TOKENS, WIDTH)
    yield 'RMS norm', rms_norm, lambda x: F.rms_norm(x, (WIDTH,), eps=1e-6), [rows]
    wide = [(TOKENS, 4 * WIDTH)]
    yield 'squared ReLU', squared_relu, lambda x: F.relu(x).square(), wide
    ours, torchs = (lambda x: dropout(x, 0.1, True)), (lambda x: F.dropout(x, 0.1))
    yield 'dropout', ours, torchs, [rows]
    for length in LENGTHS:
        shape = TOKENS // length, HEADS, length, WIDTH // HEADS
        ours = lambda q, k, v: eager_attention(q, k, v, 0.0)  # noqa: E731
        torchs = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
        yield f'attention, {length}', ours, torchs, [shape] * 3


def bench_pieces(settings: dict, runtime: Runtime, report: Report) -> None:
    for name, ours, torchs, shapes in pieces(runtime.dtype, runtime.device):
        inputs = [
            torch.randn(shape, device=runtime.device, dtype=runtime.dtype, requires_grad=True)
            for shape in shapes
        ]
        compare(name, lambda f=ours, x=inputs: both_ways(f, x),
                lambda f=torchs, x=inputs: both_ways(f, x), settings, runtime, report)  # fmt: skip
    stack = torch.randn(20, WIDTH, WIDTH, device=runtime.device)
    compare('Muon: 16 and 32 bits', lambda: orthogonalize(stack, torch.bfloat16),
            lambda: orthogonalize(stack, torch.float32), settings, runtime, report)  # fmt: skip


def both_ways(function: Callable, inputs: list) -> None:
    y = function(*inputs)
    torch.autograd.grad(y, inputs, torch.ones_like(y))


def compare(
    name: str, ours: Callable, other: Callable, settings: dict, runtime: Runtime, report: Report
) -> None:
    times = {ours: [], other: []}
    for number in range(settings['rounds'] + 1):
        for function in times:
            began = time.perf_counter()
            for _ in range(REPEAT):
                function()
            synchronize(runtime.device)
            if number:  # the first is slow
                times[function].append((time.perf_counter() - began) / REPEAT)
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    note = f'{1e3 * min(times[ours]):.2f} and {1e3 * min(times[other]):.2f} ms'
    print_row('pieces', name, f'{format_spread(ratios, ".2f")} times as fast', note)
    report.add('pieces', name, note, times_as_fast=summarize(ratios))
