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

from flatgpt.runtime import Runtime
from flatgpt.training.rehearsal import Case, Heap, build, rehearse
from model import GPTConfig

KINDS = ('parameters', 'gradients', 'optimizer', 'activations', 'copy to save')
LATER = 60e6  # bytes that libraries take between here and the end of a run, measured on Linux
GROWS = 0.08  # of the activations, by which holes grow in later steps; sharded, twice as much
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
        holes = Heap().play(ledger.events) - ledger.most.total()
        held['holes between them'] = max(0, holes) + GROWS * held['activations'] * (1 + case.shard)
    return held


def total(case: Case, here: float | None = None) -> float:
    return sum(needs(case, here).values())


def kv_row(shape: GPTConfig, itemsize: int = 4) -> int:
    """Bytes of keys and values of one row as long as the context."""
    size = shape.n_embd // shape.n_head
    return 2 * shape.n_layer * shape.kv_heads * (shape.block_size + 1) * size * itemsize


def state_of(case: Case) -> tuple[int, int, int]:
    """Bytes of the parameters, of their gradients and of the optimizer's state, by arithmetic."""
    model = build(replace(case, device='meta'))
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    muon = case.optimizer == 'muon'
    matrices = sum(trained[id(p)] for p in model.block_matrices()) if muon else 0
    count = sum(trained.values())
    return 4 * sum(p.numel() for p in model.parameters()), 4 * count, 8 * count - 4 * matrices


def checkpoint_size(case: Case) -> int:
    """Bytes of a checkpoint, about: what checkpoint.size_of() says of the tensors once they are."""
    parameters, _, optimizer = state_of(case)
    return parameters + optimizer + 2**22


def least(case: Case) -> float:
    """Bytes below which it cannot be, by arithmetic alone: the real run asks this at its start."""
    state = state_of(case)
    held = state[0] if case.shard and case.device == 'cpu' else 0  # whole, before it is cut
    kept = 0 if case.offload else max(held, sum(state) / (case.ranks if case.shard else 1))
    return kept + 4 * case.rows * case.shape.block_size * case.shape.vocab_size  # the logits


def host_lack(case: Case) -> str | None:
    """What is wrong with the main memory beside the GPUs; None if nothing is."""
    if case.device != 'cuda' or not case.shard:
        return None
    state, free = state_of(case), host_room()
    built = state[0]  # whole in each process, before it is cut
    held = sum(state) / case.ranks if case.offload else 0
    copied = (state[0] + state[2]) / case.ranks  # while it is being saved
    need = max(built, held + copied)
    if free is None or need <= free:
        return None
    return (
        f'each process of this machine takes {need / 1e9:,.1f} GB of main memory for the model, '
        f'and can have {free / 1e9:,.1f} GB: fewer processes on it, or a smaller model'
    )


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
    return host_room()


def host_room() -> float | None:
    """Bytes of main memory that each process of this machine can take in all."""
    free = []
    with suppress(OSError, AttributeError):
        text = Path('/proc/meminfo').read_text(encoding='utf-8')
        free += [int(kb) * 1024 for kb in re.findall(r'MemAvailable:\s+(\d+) kB', text)]
        group = Path('/sys/fs/cgroup')  # of a container
        with suppress(OSError, ValueError):
            used = int((group / 'memory.current').read_text())
            cached = re.search(r'^inactive_file (\d+)', (group / 'memory.stat').read_text(), re.M)
            used -= int(cached[1]) if cached else 0  # what can be had back
            free.append(int((group / 'memory.max').read_text()) - used)
    if not free:
        with suppress(ValueError, OSError, AttributeError):  # Windows has no sysconf
            free.append(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return min(free) / here + resident() if free else None


def cures(case: Case, memory: float, fresh: bool = True) -> list[tuple[str, float]]:
    """Changes that would bring a case down to `memory`: what to say, and the bytes then.

    fresh: whether the shape of the model is still to be chosen. With none that does, the nearest.
    """
    found, others = [], []

    def attempt(changed: Case) -> bool:
        size = least(changed)
        size = size if size > memory else total(changed)
        (found if size <= memory else others).append((flags(case, changed), size))
        return size <= memory

    for group in changes(case):  # of each kind the least that does
        any(attempt(changed) for changed in group)
    if not found and fresh:
        any(attempt(changed) for changed in smaller(tight(case)))
    return found or sorted(others, key=lambda each: each[1])[:1]


def changes(case: Case) -> list[list[Case]]:
    """What can be changed, one list for each kind, the least change first."""
    again = replace(case, recompute=True)
    block = replace(case.shape, block_size=max(1, case.shape.block_size // 2))
    groups = [fewer(case), [replace(case, shape=block)]]
    if not case.recompute:
        groups.insert(1, [again, *fewer(again)])
    if case.shard and case.device == 'cuda' and not case.offload:
        groups.append([replace(case, offload=True)])
    if not case.shard:
        counts = [n for n in (2, 4, 8, 16, 32, 64) if case.rows * case.parts % n == 0]
        groups.append([spread(each, n) for each in (case, tight(case)) for n in counts])
    return groups


def fewer(case: Case) -> list[Case]:
    """Fewer sequences at a time, and as many per update."""
    rows = [case.rows >> n for n in range(1, case.rows.bit_length())]
    batch = case.rows * case.parts
    return [replace(case, rows=n, parts=batch // n) for n in rows if batch % n == 0]


def tight(case: Case) -> Case:
    """The same computation with the fewest activations."""
    return replace(case, rows=1, parts=case.rows * case.parts, recompute=True)


def spread(case: Case, ranks: int) -> Case:
    """Sharded among so many, and as many sequences per update."""
    batch = max(1, case.rows * case.parts * case.ranks // ranks)
    rows = min(case.rows, batch)
    return replace(case, shard=True, ranks=ranks, rows=rows, parts=batch // rows)


def smaller(case: Case) -> list[Case]:
    layers = [case.shape.n_layer >> n for n in range(1, case.shape.n_layer.bit_length())]
    return [replace(case, shape=replace(case.shape, n_layer=n)) for n in layers]


def flags(before: Case, case: Case) -> str:
    """What to add to the command for another case."""
    told = []
    if case.shard > before.shard:
        places = 'GPUs' if case.device == 'cuda' else 'machines like this'
        told.append(f'--shard on {case.ranks} {places}')
    if case.rows != before.rows:
        steps = case.parts * case.ranks
        told.append(f'--batch_size={case.rows} --gradient_accumulation_steps={steps}')
    for flag in ('recompute', 'offload'):
        if getattr(case, flag) > getattr(before, flag):
            told.append('--gradient_checkpointing' if flag == 'recompute' else '--offload')
    for name in ('block_size', 'n_layer'):
        if getattr(case.shape, name) != getattr(before.shape, name):
            told.append(f'--{name}={getattr(case.shape, name)}')
    return ' '.join(told)


def verdict(case: Case, runtime: Runtime, fresh: bool = True) -> tuple[bool, str]:
    """Whether it fits this device; the table that says so, and what to change if it does not."""
    parts, memory, where = needs(case), room(runtime), runtime.device
    whole, trained, _ = (size // 4 for size in state_of(case))
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
        lines += [f'  {text:<72}{size / 1e9:8,.1f} GB' for text, size in changes]
    lack = host_lack(case)
    lines += [lack] if lack else []
    return fits and not lack, '\n'.join(lines)
