"""
Whether a run fits, before it starts: the memory it needs, and what to change if it does not fit.

$ python train.py train_gpt2 --batch_size=4 --plan

    fits, table = verdict(case_of(config, shape, runtime), runtime)

The steps of a run are computed on fake tensors, which have shapes and no numbers, while torch's
memory trackers count. For a sharded model this is one rank of a process group that is fake too.
"""

import json
import subprocess
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from flatgpt import ROOT
from flatgpt.checkpoint.save import SMALL
from flatgpt.checkpoint.weights import SkipRandom
from flatgpt.errors import as_config_error
from flatgpt.lora import add_lora
from flatgpt.parallel import apply_fsdp, sync_gradients
from flatgpt.runtime import Runtime, available_host_memory, available_memory
from flatgpt.training.loss import loss_of
from flatgpt.training.optim import build_optimizers
from model import GPT, GPTConfig

KINDS = {  # what is printed, the state of training first, and the trackers' names for it
    'parameters': ('Parameter', 'Buffer', 'Sharded Param'),
    'gradients': ('Gradient', 'Sharded Grad'),
    'optimizer': ('Optstate', 'OptState', 'Inputs'),
    'activations': ('Activation',),
    'temporaries': ('Temp', 'Other'),
    'communication': ('Unsharded Param', 'Unsharded Grad', 'All Gather', 'Reduce Scatter'),
}
SHALLOW, DEEP = (3, 5), 8  # layers of two models that stand for one of more than 8
# What a CPU process takes: libraries, and so many times its tensors, as (peak memory - libraries) /
# tensors came out in 21 runs of 3 to 6 steps, of 2M to 85M parameters, with glibc 2.36 and torch's
# CPU build. The rest is holes in the heap; gradient checkpointing and gloo's copies leave more.
LIBRARIES, LIBRARIES_RANKS = 260e6, 340e6  # the peak where next to nothing is computed
GROWTH, GROWTH_HOLES = (1.2, 2.1), (1.7, 2.9)


@dataclass(frozen=True)
class Case:
    """Everything the memory of one process depends on."""

    shape: GPTConfig
    device: str  # 'cpu', 'cuda' or 'mps'
    dtype: torch.dtype
    optimizer: str
    rows: int  # sequences computed at a time
    parts: int = 1  # micro-batches per update
    ranks: int = 1
    shard: bool = False
    offload: bool = False
    recompute: bool = False  # gradient checkpointing
    adapt: tuple | None = None  # rank and targets of LoRA
    freeze: int | None = None
    objective: str = 'lm'
    saves: bool = True  # checkpoints during training, not only at the end
    compiled: bool = False  # by torch.compile; step_peak() says what is known of that


def case_of(config: dict, shape: GPTConfig, runtime: Runtime) -> Case:
    """The case of these settings on this machine."""
    batch, rows = runtime.split_batch(
        config['gradient_accumulation_steps'] * config['batch_size'], config['batch_size']
    )
    every = config['eval_interval'], config['save_interval']
    rank, same = config['lora_rank'], ('optimizer', 'shard', 'offload', 'freeze', 'objective')
    return Case(
        shape=shape,
        device=runtime.device_type,
        dtype=runtime.dtype,
        rows=rows,
        parts=batch // rows,
        ranks=runtime.world_size,
        recompute=config['gradient_checkpointing'],
        adapt=(rank, config['lora_targets']) if rank else None,
        saves=any(steps and steps < config['max_iters'] for steps in every),
        compiled=runtime.wants_compile(config['compile']),
        **{name: config[name] for name in same},
    )


def step_peak(case: Case) -> Counter[str]:
    """Bytes of tensors on the device at the peak of a step, by kind.

    The step is eager. Compiled ones keep other activations: once their peaks on CUDA have been
    measured, they are returned here for case.compiled; until then report() says they are not.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # a fifth of a second to import

    fake = FakeTensorMode()
    with fake:
        model = build(case)
    with fake_ranks(case.ranks) if case.shard else nullcontext():
        if case.shard:  # outside the fake mode, as the numbers of a device mesh are read
            apply_fsdp(model, Runtime(case.device, case.dtype, 0, case.ranks))
        with fake:
            optimizers, batch = optimizers_of(case, model), batch_of(case)
            # creates the optimizer's state and fills DTensor's cache of how each op is cut; it
            # learns that on fake tensors, which a tracker would take for the step's own
            run_step(replace(case, parts=1), model, optimizers, batch)
            tracker = tracker_of(case, model, optimizers)
            with tracker:
                run_step(case, model, optimizers, batch, tracker.reset_mod_stats)
    (peak,) = (
        {kind.value: size for kind, size in held.items() if kind != 'Total'}
        for device, held in tracker.get_tracker_snapshot('peak').items()
        if device.type == case.device
    )
    # fake tensors cannot be pinned: what is offloaded is left out here instead
    kinds = list(KINDS)[3 if case.offload else 0 :]
    return Counter({kind: sum(peak.get(name, 0) for name in KINDS[kind]) for kind in kinds})


def build(case: Case) -> GPT:
    """The model, without random numbers; under torch.device('meta') without memory."""
    with torch.device(case.device), SkipRandom():
        model = GPT(case.shape)
        if case.adapt:
            rank, targets = case.adapt
            add_lora(model, rank, rank, 0.0, targets, case.freeze or 0)
        elif case.freeze is not None:
            with as_config_error():
                model.freeze_lower(case.freeze)
    model.trunk.recompute = case.recompute
    return model.train()


def optimizers_of(case: Case, model: GPT) -> list:
    rates = {'learning_rate': 1e-3, 'muon_lr': 1e-3, 'muon_momentum': 0.9, 'weight_decay': 0.0}
    return build_optimizers(case.optimizer, model, betas=(0.9, 0.95), **rates)


def batch_of(case: Case) -> list:
    """What loss_of() takes besides the model."""
    pairs = case.objective == 'dpo'
    rows = case.rows * (1 + pairs)
    idx = torch.zeros(rows, case.shape.block_size, dtype=torch.long, device=case.device)
    return [idx, idx, torch.zeros(rows, device=case.device), 0.1] if pairs else [idx, idx]


def run_step(case: Case, model: GPT, optimizers: list, batch: list, before=lambda: None) -> None:
    """One update as train.py computes it; a third micro-batch would take what the second does."""
    parts = min(case.parts, 2)
    for part in range(parts):
        before()
        sync_gradients(model, part == parts - 1)
        with torch.autocast(case.device, case.dtype, enabled=case.dtype != torch.float32):
            loss = loss_of(model, *batch)
        loss.backward()
        del loss
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """A process group of which only this rank exists; its collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def tracker_of(case: Case, model: GPT, optimizers: list):
    """torch's tracker, knowing what there is before the step."""
    if case.shard:
        from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

        tracker = FSDPMemTracker(model)  # it takes one optimizer, and Muon comes with a second
        tracker.track_inputs([list(s.values()) for each in optimizers for s in each.state.values()])
        return tracker
    from torch.distributed._tools.mem_tracker import MemTracker  # a second: it imports DTensor

    tracker = MemTracker()
    tracker.track_external(model, *optimizers)
    for parameter in model.parameters():
        if not parameter.requires_grad:  # the tracker would hook it, which torch refuses
            tracker._param_to_grad_hook_handles[parameter] = (RemovableHandle(OrderedDict()),) * 2
    return tracker


def estimate(case: Case) -> Counter[str]:
    """Bytes of tensors that one process holds at its peak, by kind."""
    shape, (few, more) = case.shape, SHALLOW
    if shape.n_layer <= DEEP or case.freeze:
        held = step_peak(case)
    else:  # blocks are alike: each adds what the others do
        low, high = (step_peak(replace(case, shape=replace(shape, n_layer=n))) for n in SHALLOW)
        times = (shape.n_layer - few) / (more - few)
        held = Counter({kind: low[kind] + times * (high[kind] - low[kind]) for kind in low})
    state, cut = state_of(case), case.ranks if case.shard else 1
    if not case.offload:  # at the update all gradients are there: the peak of some deep models
        update = dict(zip(KINDS, (size / cut for size in state), strict=False))
        held = max(held, Counter(update), key=Counter.total)
    if case.ranks > 1 and not case.shard:
        held['communication'] += state[1]  # DDP's buckets of gradients
    saved = (state[0] + state[2]) / cut
    if case.device == 'cpu' and case.saves and saved >= SMALL:  # written while training goes on
        held['copy to save'] = saved
    if case.device == 'cpu' and case.shard:  # every rank builds the whole model before it is cut
        held = max(held, Counter(parameters=state[0]), key=Counter.total)
    return held


def beside(case: Case) -> tuple[float, float, float]:
    """Bytes of libraries, and how many times its tensors a process takes: the least, the most."""
    if case.device != 'cpu':
        return 0, 1, 1
    growth = GROWTH_HOLES if case.recompute or case.shard else GROWTH
    return LIBRARIES if case.ranks == 1 else LIBRARIES_RANKS, *growth


def needs(case: Case) -> float:
    """Bytes that one process takes, at the most."""
    libraries, _, most = beside(case)
    return libraries + most * estimate(case).total()


def state_of(case: Case) -> tuple[int, int, int]:
    """Bytes of the parameters, of their gradients and of the optimizer's state, by arithmetic."""
    model = build(replace(case, device='meta'))
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    muon = case.optimizer == 'muon'
    matrices = sum(trained[id(p)] for p in model.block_matrices()) if muon else 0
    count = sum(trained.values())
    return 4 * sum(p.numel() for p in model.parameters()), 4 * count, 8 * count - 4 * matrices


def checkpoint_size(case: Case) -> int:
    """Bytes of a checkpoint, about: what save.size_of() says of the tensors once they are."""
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
    state, free = state_of(case), available_host_memory()
    held = sum(state) / case.ranks if case.offload else 0
    copied = (state[0] + state[2]) / case.ranks  # while it is being saved
    need = max(state[0], held + copied)  # whole in each process, before it is cut
    if free is None or need <= free:
        return None
    return (
        f'each process of this machine takes {need / 1e9:,.1f} GB of main memory for the model, '
        f'and can have {free / 1e9:,.1f} GB: fewer processes on it, or a smaller model'
    )


def savings(case: Case, memory: float, fresh: bool = True) -> list[tuple[str, float]]:
    """Changes that bring a case down to `memory`: the flags, and the bytes then.

    fresh: whether the shape of the model can still be chosen. If no change does, the nearest.
    """
    found, others = [], []

    def attempt(changed: Case) -> bool:
        size = least(changed)
        size = size if size > memory else needs(changed)
        (found if size <= memory else others).append((flags(case, changed), size))
        return size <= memory

    for group in changes(case):  # the smallest change of each kind that is enough
        any(attempt(changed) for changed in group)
    if not found and fresh:
        layers = [replace(case.shape, n_layer=n) for n in halved(case.shape.n_layer)]
        any(attempt(resized(case, 1, recompute=True, shape=shape)) for shape in layers)
    return found or sorted(others, key=lambda each: each[1])[:1]


def changes(case: Case) -> Iterator[list[Case]]:
    """What can be changed, one list for each kind, the smallest change first."""
    batch, shape = case.rows * case.parts, case.shape
    rows = [n for n in halved(case.rows) if batch % n == 0]
    yield [resized(case, n) for n in rows]
    if not case.recompute:
        yield [resized(case, n, recompute=True) for n in (case.rows, *rows)]
    yield [replace(case, shape=replace(shape, block_size=max(1, shape.block_size // 2)))]
    if case.shard and case.device == 'cuda' and not case.offload:
        yield [replace(case, offload=True)]
    if not case.shard:
        counts = [n for n in (2, 4, 8, 16, 32, 64) if batch % n == 0]
        least_rows = replace(case, rows=1, parts=batch, recompute=True)
        tried = [(each, n) for each in (case, least_rows) for n in counts]
        yield [resized(each, each.rows, shard=True, ranks=n) for each, n in tried]


def smaller_model(config: dict) -> str:
    """What to train where the model of these settings does not fit."""
    if config['init_from'] != 'scratch':  # it keeps its shape
        return 'one of fewer parameters, or --shard with torchrun on several GPUs'
    unit = 2 * config['n_head']  # so that rotary positions can turn pairs
    if width := config['n_embd'] // 2 // unit * unit:
        return f'a smaller model, such as --n_embd={width}'
    return f'a smaller model, such as --n_layer={max(1, config["n_layer"] // 2)}'


def halved(n: int) -> list[int]:
    return [n >> by for by in range(1, n.bit_length())]


def resized(case: Case, rows: int, **changed) -> Case:
    """So many rows at a time at most, and as many sequences per update as before."""
    other = replace(case, **changed)
    batch = max(1, case.rows * case.parts * case.ranks // other.ranks)
    return replace(other, rows=min(rows, batch), parts=batch // min(rows, batch))


def flags(before: Case, case: Case) -> str:
    """What to add to the command for another case."""

    def settings(case: Case) -> dict:
        return {
            '--batch_size': case.rows,
            '--gradient_accumulation_steps': case.parts * case.ranks,
            '--gradient_checkpointing': case.recompute,
            '--offload': case.offload,
            '--block_size': case.shape.block_size,
            '--n_layer': case.shape.n_layer,
        }

    was, now = settings(before), settings(case)
    new = {name: value for name, value in now.items() if value != was[name]}
    told = [name if value is True else f'{name}={value}' for name, value in new.items()]
    where = 'GPUs' if case.device == 'cuda' else 'machines like this'
    return ' '.join([f'--shard on {case.ranks} {where}'] * (case.shard > before.shard) + told)


def verdict(case: Case, runtime: Runtime, fresh: bool = True) -> tuple[bool, str]:
    """Whether it fits this device; the table that says so, and what to change if it does not."""
    lack, asked = host_lack(case), (case, str(runtime.device), available_memory(runtime), fresh)
    if dist.is_initialized():  # by torchrun; a fake process group needs a process of its own
        code = 'from flatgpt.training import memory; memory.report_to_parent()'
        case_given = {**asdict(case), 'dtype': runtime.dtype_name}
        given = json.dumps([case_given, *asked[1:]])
        command, pipe = [sys.executable, '-c', code], subprocess.PIPE
        done = subprocess.run(command, input=given, stdout=pipe, text=True, cwd=ROOT, check=True)
        fits, table = json.loads(done.stdout)
    else:
        fits, table = report(*asked)
    return fits and not lack, f'{table}\n{lack}' if lack else table


def report_to_parent() -> None:
    """report() of what comes as JSON on standard input, as JSON on standard output."""
    given, *others = json.load(sys.stdin)
    given |= {'shape': GPTConfig(**given['shape']), 'dtype': getattr(torch, given['dtype'])}
    print(json.dumps(report(Case(**given), *others)))


def report(case: Case, where: str, memory: float | None, fresh: bool) -> tuple[bool, str]:
    held, shape, (libraries, low, high) = estimate(case), case.shape, beside(case)
    whole, trained, _ = (size // 4 for size in state_of(case))
    of = '' if trained == whole else f', {trained / 1e6:,.1f}M of them trained'
    each = f'each of {case.ranks} processes' if case.ranks > 1 else 'one process'
    size = shape.n_embd // shape.n_head  # of a head
    kept = 4 * 2 * shape.n_layer * shape.kv_heads * (shape.block_size + 1) * size
    lines = [
        f'memory of {each} on {where}: {whole / 1e6:,.1f}M parameters{of}; {case.rows} x '
        f'{shape.block_size} tokens at a time, {str(case.dtype).removeprefix("torch.")}',
        *(f'  {name:<28}{size / 1e6:10,.0f} MB' for name, size in held.items() if size),
        f'  {"tensors at the peak, in all":<28}{held.total() / 1e6:10,.0f} MB',
    ]
    if case.device == 'cpu':
        span = ' to '.join(f'{(libraries + by * held.total()) / 1e6:,.0f}' for by in (low, high))
        lines += [
            f'a CPU process was measured to take {low} to {high} times that and '
            f'{libraries / 1e6:.0f} MB of libraries: {span} MB'
        ]
    if case.device == 'cuda':
        lines += ["not counted: the CUDA context, cuBLAS's workspace, and the allocator's holes"]
    if case.compiled:
        lines += ['not counted: where torch.compile is on, it keeps other activations than these']
    lines += [
        f'keys and values of a text of {shape.block_size} tokens: {kept / 1e6:,.1f} MB in float32, '
        'for each that is sampled or served'
    ]
    if memory is None:
        return True, '\n'.join([*lines, f'nobody here says how much memory {where} has'])
    fits = libraries + high * held.total() <= memory
    lines += [
        f'{"fits" if fits else "does not fit"} in the {memory / 1e9:,.1f} GB of {where} that '
        f'{"each process can have" if case.ranks > 1 else "are free"}'
    ]
    if not fits:
        options = savings(case, memory, fresh)
        enough = options and options[0][1] <= memory
        lines += ['what would:' if enough else 'nothing here would; the nearest:']
        lines += [f'  {text:<72}{size / 1e9:8,.1f} GB' for text, size in options]
    return fits, '\n'.join(lines)
