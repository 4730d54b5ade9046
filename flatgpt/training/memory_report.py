"""
Print the estimated memory of a run, and suggest savings if it does not fit, or a faster batch.

$ python train.py train_gpt2 --batch_size=4 --plan

    fits, table = check_fit(workload_of(config, shape, runtime), runtime)
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch
import torch.distributed as dist

from flatgpt import ROOT
from flatgpt.runtime import Runtime, available_memory
from flatgpt.training.memory import (
    MemoryWorkload,
    estimate,
    host_memory_problem,
    max_bytes,
    min_bytes,
    process_overhead,
    state_bytes,
)
from model import GPTConfig

FASTEST_TOKENS = 48 * 1024  # of a micro-batch on a GPU; more are hardly faster (not measured)


def suggest_savings(
    workload: MemoryWorkload, memory: float, fresh: bool = True
) -> list[tuple[str, float]]:
    """Changes that reduce a workload to `memory` bytes, as their flags and bytes; if none does, the
    one that comes closest.

    fresh: whether the shape of the model can still be changed.
    """
    found, others = [], []

    def add_if_it_fits(changed: MemoryWorkload) -> bool:
        size = min_bytes(changed)
        size = size if size > memory else max_bytes(changed)
        (found if size <= memory else others).append((flags_between(workload, changed), size))
        return size <= memory

    for group in possible_savings(workload):  # the smallest sufficient change of each kind
        any(add_if_it_fits(changed) for changed in group)
    if not found and fresh:
        layers = [replace(workload.shape, n_layer=n) for n in halvings(workload.shape.n_layer)]
        any(
            add_if_it_fits(with_batch_size(workload, 1, gradient_checkpointing=True, shape=shape))
            for shape in layers
        )
    return found or sorted(others, key=lambda other: other[1])[:1]


def suggest_larger_batch(
    workload: MemoryWorkload, memory: float
) -> tuple[MemoryWorkload, float] | None:
    """A larger micro-batch with the same global batch, for speed, and its bytes.

    On CUDA, launching the kernels of a micro-batch and copying the weights to 16 bits take as long
    for few tokens as for many. The suggestion leaves a fifth of the memory free.
    """
    if workload.device != 'cuda':
        return None
    batch = workload.micro_batch_size * workload.micro_steps
    most = min(batch, FASTEST_TOKENS // workload.shape.block_size)
    for rows in range(most, workload.micro_batch_size, -1):
        larger = with_batch_size(workload, rows)
        if batch % rows == 0 and (size := max_bytes(larger)) <= 0.8 * memory:
            return larger, size
    return None


def possible_savings(workload: MemoryWorkload) -> Iterator[list[MemoryWorkload]]:
    """Possible changes, a list for each kind, the smallest first."""
    batch, shape = workload.micro_batch_size * workload.micro_steps, workload.shape
    rows = [n for n in halvings(workload.micro_batch_size) if batch % n == 0]
    yield [with_batch_size(workload, n) for n in rows]
    if not workload.gradient_checkpointing:
        yield [
            with_batch_size(workload, n, gradient_checkpointing=True)
            for n in (workload.micro_batch_size, *rows)
        ]
    if workload.objective == 'rl':  # neither sharded nor cut to a context
        return
    yield [replace(workload, shape=replace(shape, block_size=max(1, shape.block_size // 2)))]
    if workload.shard and workload.device == 'cuda' and not workload.offload:
        yield [replace(workload, offload=True)]
    if not workload.shard:
        counts = [n for n in (2, 4, 8, 16, 32, 64) if batch % n == 0]
        least_rows = replace(
            workload, micro_batch_size=1, micro_steps=batch, gradient_checkpointing=True
        )
        tried = [(each, n) for each in (workload, least_rows) for n in counts]
        yield [
            with_batch_size(each, each.micro_batch_size, shard=True, ranks=n) for each, n in tried
        ]


def suggest_smaller_model(config: dict) -> str:
    """The advice for a model that does not fit."""
    if config['init_from'] != 'scratch':  # a pretrained model keeps its shape
        sharding = ', or --shard with torchrun on several GPUs'
        return 'a smaller model' + sharding * (config['objective'] != 'rl')
    unit = 2 * config['n_head']  # rotary embeddings need an even head size
    if width := config['n_embd'] // 2 // unit * unit:
        return f'a smaller model, such as --n_embd={width}'
    return f'a smaller model, such as --n_layer={max(1, config["n_layer"] // 2)}'


def halvings(n: int) -> list[int]:
    return [n >> by for by in range(1, n.bit_length())]


def with_batch_size(workload: MemoryWorkload, rows: int, **changed) -> MemoryWorkload:
    """The workload with a micro-batch of at most `rows` and the same global batch."""
    other = replace(workload, **changed)
    batch = max(1, workload.micro_batch_size * workload.micro_steps * workload.ranks // other.ranks)
    return replace(other, micro_batch_size=min(rows, batch), micro_steps=batch // min(rows, batch))


def flags_between(before: MemoryWorkload, workload: MemoryWorkload) -> str:
    """The flags that change `before` into `workload`."""

    def settings(workload: MemoryWorkload) -> dict:
        return {
            '--batch_size': workload.micro_batch_size,
            '--gradient_accumulation_steps': workload.micro_steps * workload.ranks,
            '--gradient_checkpointing': workload.gradient_checkpointing,
            '--offload': workload.offload,
            '--block_size': workload.shape.block_size,
            '--n_layer': workload.shape.n_layer,
        }

    was, now = settings(before), settings(workload)
    new = {name: value for name, value in now.items() if value != was[name]}
    changed = [name if value is True else f'{name}={value}' for name, value in new.items()]
    where = 'GPUs' if workload.device == 'cuda' else 'machines like this'
    return ' '.join(
        [f'--shard on {workload.ranks} {where}'] * (workload.shard > before.shard) + changed
    )


def check_fit(workload: MemoryWorkload, runtime: Runtime, fresh: bool = True) -> tuple[bool, str]:
    """Whether the workload fits this device, and the table to print."""
    problem = host_memory_problem(workload)
    arguments = workload, str(runtime.device), available_memory(runtime), fresh
    if dist.is_initialized():  # by torchrun: a fake process group then needs another process
        code = 'from flatgpt.training import memory_report; memory_report.report_to_parent()'
        fields = {**asdict(workload), 'dtype': runtime.dtype_name}
        given = json.dumps([fields, *arguments[1:]])
        command, pipe = [sys.executable, '-c', code], subprocess.PIPE
        done = subprocess.run(command, input=given, stdout=pipe, text=True, cwd=ROOT, check=True)
        fits, table = json.loads(done.stdout)
    else:
        fits, table = tabulate(*arguments)
    return fits and not problem, f'{table}\n{problem}' if problem else table


def report_to_parent() -> None:
    """Run tabulate() with JSON from standard input -> JSON on standard output."""
    given, *others = json.load(sys.stdin)
    given |= {'shape': GPTConfig(**given['shape']), 'dtype': getattr(torch, given['dtype'])}
    print(json.dumps(tabulate(MemoryWorkload(**given), *others)))


def tabulate(
    workload: MemoryWorkload, where: str, memory: float | None, fresh: bool
) -> tuple[bool, str]:
    """Whether the workload fits, and the table to print. fresh: see suggest_savings()."""
    peak, shape = estimate(workload), workload.shape
    libraries, low, high = process_overhead(workload)
    whole, trained, _ = (size // 4 for size in state_bytes(workload))
    trained_part = '' if trained == whole else f', {trained / 1e6:,.1f}M of them trained'
    process = f'each of {workload.ranks} processes' if workload.ranks > 1 else 'one process'
    step = 'a compiled step' if workload.compiled_whole else 'an eager step'
    head_size = shape.n_embd // shape.n_head
    kv_cache = 4 * 2 * shape.n_layer * shape.kv_heads * (shape.block_size + 1) * head_size
    lines = [
        f'memory of {process} on {where}: {whole / 1e6:,.1f}M parameters with all embeddings'
        f'{trained_part}; {workload.micro_batch_size * workload.sequences} x {shape.block_size} '
        f'tokens at a time, {str(workload.dtype).removeprefix("torch.")}',
        *(f'  {name:<36}{size / 1e6:10,.0f} MB' for name, size in peak.items() if size),
        f'  {f"total at the peak of {step}":<36}{peak.total() / 1e6:10,.0f} MB',
    ]
    if workload.device == 'cpu':
        span = ' to '.join(f'{(libraries + by * peak.total()) / 1e6:,.0f}' for by in (low, high))
        lines += [
            f'estimated process memory: {span} MB ({low} to {high} times the total, plus '
            f'{libraries / 1e6:.0f} MB of libraries)'
        ]
    if workload.device == 'cuda':
        lines += ['not included: CUDA context, cuBLAS workspace, fragmentation of the allocator']
    if workload.compiled and not workload.compiled_whole:
        lines += ['an eager step; torch.compile keeps other activations, usually fewer']
    lines += [
        f'KV cache for inference: {kv_cache / 1e6:,.1f} MB per sequence of '
        f'{shape.block_size} tokens in float32'
    ]
    if memory is None:
        return True, '\n'.join([*lines, f'the memory of {where} is unknown'])
    fits = libraries + high * peak.total() <= memory
    lines += [
        f'{"fits" if fits else "does not fit"} in the {memory / 1e9:,.1f} GB '
        f'{"available to each process" if workload.ranks > 1 else "free"} on {where}'
    ]
    if fits and (larger := suggest_larger_batch(workload, memory)):
        lines += [
            f'probably faster, with {larger[1] / 1e9:,.1f} GB: {flags_between(workload, larger[0])}'
        ]
    if not fits:
        options = suggest_savings(workload, memory, fresh)
        enough = options and options[0][1] <= memory
        lines += ['changes that fit:' if enough else 'no change fits; the closest:']
        lines += [f'  {text:<72}{size / 1e9:8,.1f} GB' for text, size in options]
    return fits, '\n'.join(lines)
