"""
Whether a run fits, before it starts: what it will need of memory, and what to change if that is not
there.

$ python train.py train_gpt2 --batch_size=4 --plan

    fits, table = verdict(case_of(config, shape, runtime), runtime)
"""

import math
import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from exchange import outline
from model import GPTConfig
from rehearsal import Case, Heap, parameters, rehearse
from runtime import Runtime

KINDS = ('parameters', 'gradients', 'optimizer', 'activations', 'copy to save')
LATER = 60e6  # bytes that libraries take between here and the end of a run, measured on Linux
LATER_RANKS = 75e6  # and more of them where there are several processes


def case_of(config: dict, shape: GPTConfig, runtime: Runtime) -> Case:
    """The case of these settings on this machine."""
    batch, rows = runtime.share(
        config['gradient_accumulation_steps'] * config['batch_size'], config['batch_size']
    )
    every = [config[name] for name in ('eval_interval', 'save_interval') if config[name]]
    rank = config['lora_rank']
    return Case(
        shape=shape,
        device=runtime.device_type,
        dtype=runtime.dtype,
        optimizer=config['optimizer'],
        rows=rows,
        parts=batch // rows,
        ranks=runtime.world_size,
        shard=config['shard'],
        offload=config['offload'],
        recompute=config['gradient_checkpointing'],
        adapt=(rank, config['lora_targets']) if rank else None,
        freeze=config['freeze'],
        objective=config['objective'],
        saves=min(every, default=math.inf) < config['max_iters'],
    )


def needs(case: Case, here: float | None = None) -> dict[str, float]:
    """Bytes that one process takes at its peak, by what they are for; they add up.

    here: what this process takes now; None asks the system.
    """
    parts = {}
    if case.device == 'cpu':
        taken = resident() if here is None else here
        parts['Python, torch and the code'] = taken + LATER + LATER_RANKS * (case.ranks > 1)
    shape, few = case.shape, (6, 8)
    if shape.n_layer <= 2 * few[1] or case.freeze:
        return parts | computed(case)
    # blocks are alike: what two of them add is added for all that are not rehearsed
    less, more = (computed(replace(case, shape=replace(shape, n_layer=n))) for n in few)
    times = (shape.n_layer - few[0]) / (few[1] - few[0])
    return parts | {name: less[name] + times * (more[name] - less[name]) for name in less}


def computed(case: Case) -> dict[str, float]:
    """Bytes of what is computed with."""
    ledger = rehearse(case)
    held = {kind: ledger.most[kind] for kind in KINDS}
    if case.device == 'cpu':
        held['holes between them'] = max(0, Heap().play(ledger.events) - ledger.most.total())
    return held


def total(case: Case, here: float | None = None) -> float:
    return sum(needs(case, here).values())


def kv_row(shape: GPTConfig, itemsize: int = 4) -> int:
    """Bytes of keys and values of one row as long as the context."""
    size = shape.n_embd // shape.n_head
    return 2 * shape.n_layer * shape.kv_heads * (shape.block_size + 1) * size * itemsize


def least(case: Case) -> float:
    """Bytes below which it cannot be, by arithmetic alone: the real run asks this at its start."""
    model = outline(case.shape)
    count = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.block_matrices()) if case.optimizer == 'muon' else 0
    state = 4 * count
    if case.adapt is None and case.freeze is None:
        state += 4 * count + 8 * (count - matrices) + 4 * matrices
    held = 4 * count if case.shard and case.device == 'cpu' else 0  # whole, before it is cut
    state = max(held, state / case.ranks if case.shard else state)
    return state + 4 * case.rows * case.shape.block_size * case.shape.vocab_size


def resident() -> int:
    """Bytes of main memory that this process takes now, 0 where nobody says."""
    with suppress(OSError):
        return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    return 0


def room(runtime: Runtime) -> float | None:
    """Bytes that each process of this machine can take in all; None where nobody says."""
    if runtime.device_type == 'cuda':
        free, _ = torch.cuda.mem_get_info(runtime.device)
        return free + torch.cuda.memory_reserved(runtime.device)
    if runtime.device_type == 'mps':
        return torch.mps.recommended_max_memory()
    free = []
    with suppress(OSError, AttributeError):
        text = Path('/proc/meminfo').read_text(encoding='utf-8')
        free += [int(kb) * 1024 for kb in re.findall(r'MemAvailable:\s+(\d+) kB', text)]
        group = Path('/sys/fs/cgroup')  # of a container
        with suppress(OSError, ValueError):
            used = int((group / 'memory.current').read_text())
            free.append(int((group / 'memory.max').read_text()) - used)
    if not free:
        with suppress(ValueError, OSError, AttributeError):  # Windows has no sysconf
            free.append(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return min(free) / here + resident() if free else None


def cures(case: Case, memory: float, fresh: bool = True) -> list[tuple[str, float]]:
    """Changes that would bring a case down to `memory`, the least first: what to say, and bytes.

    fresh: whether the shape of the model is still to be chosen. With none that does, the one that
    comes nearest, alone.
    """
    found, others = [], []

    def attempt(text: str, changed: Case) -> bool:
        if least(changed) > memory:
            others.append((text, least(changed)))
            return False
        size = total(changed)
        (found if size <= memory else others).append((text, size))
        return size <= memory

    def fewer(start: Case, before: str = '') -> bool:
        """The most sequences at a time that fit, for the same number per update."""
        for rows in range(start.rows // 2, 0, -1):
            if start.batch() % rows == 0 and (rows & rows - 1 == 0 or rows == 1):
                steps = start.batch() // rows * start.ranks
                text = f'{before}--batch_size={rows} --gradient_accumulation_steps={steps}'
                changed = replace(start, rows=rows, parts=start.batch() // rows)
                if attempt(text, changed):
                    return True
        return False

    fewer(case)
    again = replace(case, recompute=True)
    if not case.recompute and not attempt('--gradient_checkpointing', again):
        fewer(again, '--gradient_checkpointing ')
    if not case.shard:
        places = 'GPUs' if case.device == 'cuda' else 'machines of this size'
        for ranks in (2, 4, 8, 16, 32, 64):
            parts = max(1, case.parts * case.ranks // ranks)
            spread = replace(case, shard=True, ranks=ranks, parts=parts)
            if ranks > case.ranks and attempt(f'--shard with {ranks} {places}', spread):
                break
    elif case.device == 'cuda' and not case.offload:
        attempt('--offload', replace(case, offload=True))
    block, shape = case.shape.block_size // 2, case.shape
    if block >= 128:
        attempt(f'--block_size={block}', replace(case, shape=replace(shape, block_size=block)))
    layers = shape.n_layer // 2
    while not found and fresh and layers:  # then it has to be a smaller model
        attempt(f'--n_layer={layers}', replace(case, shape=replace(shape, n_layer=layers)))
        layers //= 2
    return found or sorted(others, key=lambda each: each[1])[:1]


def verdict(case: Case, runtime: Runtime, fresh: bool = True) -> tuple[bool, str]:
    """Whether it fits this device; the table that says so, and what to change if it does not."""
    parts, memory, where = needs(case), room(runtime), runtime.device
    whole, trained = parameters(case)
    of = '' if trained == whole else f', {trained / 1e6:,.1f}M of them trained'
    each = f'each of {case.ranks} processes' if case.ranks > 1 else 'one process'
    rows = f'{case.rows} x {case.shape.block_size} tokens at a time'
    lines = [
        f'memory of {each} on {where}: {whole / 1e6:,.1f}M parameters{of}; '
        f'{rows}, {runtime.dtype_name}'
    ]
    lines += [f'  {name:<28}{size / 1e6:10,.0f} MB' for name, size in parts.items() if size]
    size = sum(parts.values())
    lines += [f'  {"at the peak, in all":<28}{size / 1e6:10,.0f} MB']
    lines += [
        f'keys and values of a text of {case.shape.block_size} tokens: '
        f'{kv_row(case.shape) / 1e6:,.1f} MB in float32, for each that is sampled or served'
    ]
    if case.device == 'cuda':
        lines += ["not counted: the CUDA allocator's rounding and holes, which were not measured"]
    if memory is None:
        return True, '\n'.join([*lines, f'nobody here says how much memory {where} has'])
    fits = size <= memory
    lines += [
        f'{"fits" if fits else "does not fit"} in the {memory / 1e9:,.1f} GB of {where} that '
        f'{"each process can have" if case.ranks > 1 else "are free"}'
    ]
    if not fits:
        changes = cures(case, memory, fresh)
        enough = changes and changes[0][1] <= memory
        lines += ['what would:' if enough else 'nothing here would; the nearest:']
        lines += [f'  {text:<56}{size / 1e9:8,.1f} GB' for text, size in changes]
    return fits, '\n'.join(lines)
