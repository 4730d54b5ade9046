"""
Estimate the memory of a run before it starts; memory_report.py prints the estimate.

    peak = estimate(workload_of(config, shape, runtime))  # bytes, by kind

A few steps run on fake tensors, which have shapes but no data, under torch's memory trackers. A
sharded model runs as one rank of a fake process group. The fake step is eager; a step that
torch.compile compiles on a GPU is estimated by arithmetic.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from flatgpt.checkpoint.load import list_checkpoints
from flatgpt.checkpoint.save import SYNC_SAVE_BYTES
from flatgpt.checkpoint.weights import SkipRandom, meta_model
from flatgpt.data.dataset import read_meta, resolve_dataset
from flatgpt.errors import UserError, as_config_error
from flatgpt.inference.kv_cache import cache_dtype
from flatgpt.lora import add_lora
from flatgpt.parallel import apply_fsdp, sync_gradients
from flatgpt.runtime import Runtime, available_host_memory
from flatgpt.training.compiling import ComputeWorkload, compile_pays
from flatgpt.training.loss import loss_of
from flatgpt.training.optim import build_optimizers
from flatgpt.training.reward import is_model
from flatgpt.training.rollout import SLOTS
from flatgpt.training.update import should_capture
from flatgpt.training.validate import global_batch_size
from model import GPT, LOGITS_AT_ONCE, GPTConfig

KINDS = {  # printed name: the names of the trackers; the training state comes first
    'parameters': ('Parameter', 'Buffer', 'Sharded Param'),
    'gradients': ('Gradient', 'Sharded Grad'),
    'optimizer': ('Optstate', 'OptState', 'Inputs'),
    'activations': ('Activation',),
    'temporaries': ('Temp', 'Other'),
    'communication': ('Unsharded Param', 'Unsharded Grad', 'All Gather', 'Reduce Scatter'),
}
SHALLOW, MAX_EXACT_LAYERS = (3, 5), 8  # a deeper model is extrapolated from two shallow ones
# The memory of a CPU process: libraries, plus a multiple (minimum, maximum) of its tensors, from
# (peak memory - libraries) / tensors in 21 runs of 3 to 6 steps with 2M to 85M parameters, glibc
# 2.36 and torch's CPU build. The rest is heap fragmentation; gradient checkpointing and the copies
# of gloo cause more.
LIBRARY_BYTES, LIBRARY_BYTES_RANKS = 260e6, 340e6  # the peak of a tiny model
TENSOR_FACTOR, TENSOR_FACTOR_FRAGMENTED = (1.2, 2.1), (1.7, 2.9)

# What a step compiled for CUDA keeps for its backward pass, in each block and outside the blocks:
# bytes per token and n_embd, in 16 bits. Fitted to peaks of torch's allocator, counted on a stub of
# the CUDA libraries and not measured on a GPU; tests/training/test_memory.py has them.
COMPILED_BLOCK = {'gpt2': 30.7, 'modern': 23.4}  # 'modern': without keys and values
COMPILED_KEYS_VALUES = 8  # 'modern', with as many heads as the queries
COMPILED_ENDS = 20


@dataclass(frozen=True)
class MemoryWorkload:
    """Everything that the memory of one process depends on."""

    shape: GPTConfig
    device: str  # 'cpu', 'cuda' or 'mps'
    dtype: torch.dtype
    optimizer: str
    micro_batch_size: int  # sequences computed at a time
    micro_steps: int = 1  # micro-batches per update
    ranks: int = 1
    shard: bool = False
    offload: bool = False
    gradient_checkpointing: bool = False
    lora: tuple | None = None  # rank and targets of LoRA
    freeze: int | None = None
    objective: str = 'lm'
    sequences: int = 1  # per item of the micro-batch: 2 of a pair, rl_samples of a prompt
    copies: int = 0  # bytes of further models, objective='rl': of rollouts, reference, reward
    soft_targets: int = 0  # bytes of an update's soft targets, with ngram_order
    cache: int = 0  # bytes of the KV cache of rollouts, which is freed before an update
    saves: bool = True  # checkpoints during training, not only at the end
    compiled: bool = False  # by torch.compile

    @property
    def compiled_whole(self) -> bool:
        """Whether compiled_peak() applies: to a model compiled with its loss, for CUDA."""
        others = self.objective not in ('lm', 'sft') or self.freeze is not None
        others = others or self.shard or self.soft_targets
        return self.compiled and self.device == 'cuda' and not others


def workload_of(config: dict, shape: GPTConfig, runtime: Runtime) -> MemoryWorkload:
    """The workload of these settings on this machine."""
    batch, rows = runtime.split_batch(global_batch_size(config), config['batch_size'])
    every = config['eval_interval'], config['save_interval']
    rank, same = config['lora_rank'], ('optimizer', 'shard', 'offload', 'freeze', 'objective')
    copies = cache = 0
    if config['objective'] == 'rl':
        shape = replace(shape, block_size=min(shape.block_size, rollout_length(config, shape)))
        copies = copies_bytes(shape, runtime.dtype, bool(config['rl_kl']))
        copies += reward_model_bytes(config['reward'])
        cache = cache_bytes(shape, runtime)
    if config['objective'] == 'reward':
        shape = replace(shape, score=True)
    soft_targets = 0
    if config['ngram_order']:
        soft_targets = 4 * batch * shape.block_size * shape.vocab_size
    return MemoryWorkload(
        shape=shape,
        soft_targets=soft_targets,
        sequences=sequences_of_each(config),
        copies=copies,
        cache=cache,
        device=runtime.device_type,
        dtype=runtime.dtype,
        micro_batch_size=rows,
        micro_steps=batch // rows,
        ranks=runtime.world_size,
        gradient_checkpointing=config['gradient_checkpointing'],
        lora=(rank, config['lora_targets']) if rank else None,
        saves=any(steps and steps < config['max_iters'] for steps in every),
        compiled=will_compile(config, shape, runtime, rows, batch // rows),
        **{name: config[name] for name in same},
    )


def sequences_of_each(config: dict) -> int:
    """Sequences per pair or prompt."""
    return {'dpo': 2, 'reward': 2, 'rl': config['rl_samples']}.get(config['objective'], 1)


def rollout_length(config: dict, shape: GPTConfig) -> int:
    """Tokens of the longest prompt with its completion; of a dataset that is not here, a guess."""
    with suppress(UserError, KeyError):
        meta = read_meta(resolve_dataset(config['dataset'])[0])
        return meta['rows']['length'] + config['rl_tokens']
    return shape.block_size


def copies_bytes(shape: GPTConfig, dtype: torch.dtype, has_reference: bool) -> int:
    """Bytes of the weights in 16 bits, which complete prompts, and of the reference."""
    parameters = sum(p.numel() for p in meta_model(shape).parameters())
    return parameters * ((dtype != torch.float32) * dtype.itemsize + 4 * has_reference)


def cache_bytes(shape: GPTConfig, runtime: Runtime) -> int:
    """Bytes of the KV cache of rollouts."""
    size = cache_dtype(runtime.dtype, runtime.device_type).itemsize
    head = shape.n_embd // shape.n_head
    return 2 * shape.n_layer * SLOTS * shape.block_size * shape.kv_heads * head * size


def reward_model_bytes(reward: str) -> int:
    """Bytes of the reward's weights, if it is a model."""
    if not is_model(reward):
        return 0
    folder = (list_checkpoints(reward) or [Path(reward)])[-1]
    return sum(file.stat().st_size for file in folder.glob('model*.safetensors'))


def will_compile(
    config: dict, shape: GPTConfig, runtime: Runtime, rows: int, micro_steps: int
) -> bool:
    """Whether a new run of max_iters steps is compiled, as train.py decides."""
    setting = config['compile']
    if setting != 'auto' or not runtime.wants_compile(setting):
        return runtime.wants_compile(setting)
    flops = meta_model(shape).flops_per_token()
    tokens = rows * sequences_of_each(config) * shape.block_size
    passes, shapes = config['max_iters'] * micro_steps, 1 + (config['short_iters'] > 0)
    work = ComputeWorkload(passes, tokens * flops, shape.n_layer, shapes)
    peak_flops = runtime.peak_flops(config['peak_tflops'])
    graphed = should_capture(config, work, peak_flops, runtime)
    return compile_pays(work._replace(graphed=graphed), peak_flops)[0]


def step_peak(workload: MemoryWorkload) -> Counter[str]:
    """Bytes of tensors on the device at the peak of an eager step, by kind."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # a fifth of a second to import

    fake = FakeTensorMode()
    with fake:
        model = build_fake_model(workload)
    with fake_ranks(workload.ranks) if workload.shard else nullcontext():
        if workload.shard:  # not in fake mode: it reads the values of a device mesh
            apply_fsdp(model, Runtime(workload.device, workload.dtype, 0, workload.ranks))
        with fake:
            optimizers, batch = build_fake_optimizers(workload, model), build_fake_batch(workload)
            # before the tracker, which would count these for the step: the optimizers' state, and
            # fake tensors that DTensor keeps from its first step
            if workload.shard:
                run_step(replace(workload, micro_steps=1), model, optimizers, batch)
            else:
                create_state(model, optimizers)
            tracker = build_memory_tracker(workload, model, optimizers)
            with tracker:
                run_step(workload, model, optimizers, batch, tracker.reset_mod_stats)
    (peak,) = (
        {kind.value: size for kind, size in sizes.items() if kind != 'Total'}
        for device, sizes in tracker.get_tracker_snapshot('peak').items()
        if device.type == workload.device
    )
    # fake tensors cannot be pinned: offloaded state is omitted here instead
    kinds = list(KINDS)[3 if workload.offload else 0 :]
    return Counter({kind: sum(peak.get(name, 0) for name in KINDS[kind]) for kind in kinds})


def build_fake_model(workload: MemoryWorkload) -> GPT:
    """The model without random initialization; on device 'meta' without memory."""
    with torch.device(workload.device), SkipRandom():
        model = GPT(workload.shape)
        if workload.lora:
            rank, targets = workload.lora
            add_lora(model, rank, rank, 0.0, targets, workload.freeze or 0)
        elif workload.freeze is not None:
            with as_config_error():
                model.freeze_lower(workload.freeze)
    model.trunk.recompute = workload.gradient_checkpointing
    return model.train()


def build_fake_optimizers(workload: MemoryWorkload, model: GPT) -> list:
    rates = {'learning_rate': 1e-3, 'muon_lr': 1e-3, 'muon_momentum': 0.9, 'weight_decay': 0.0}
    return build_optimizers(workload.optimizer, model, betas=(0.9, 0.95), **rates)


def build_fake_batch(workload: MemoryWorkload) -> dict:
    """The arguments of loss_of() after the model."""
    rows = workload.micro_batch_size * workload.sequences
    idx = torch.zeros(rows, workload.shape.block_size, dtype=torch.long, device=workload.device)
    values = torch.zeros(rows, device=workload.device)
    others = {
        'dpo': {'reference': values, 'beta': 0.1},
        'rl': {'advantages': values},
    }
    if workload.objective == 'reward':
        return {'x': idx, 'ends': values.long()}
    return {'x': idx, 'y': idx} | others.get(workload.objective, {})


def run_step(
    workload: MemoryWorkload, model: GPT, optimizers: list, batch: dict, before=lambda: None
) -> None:
    """One update as in train.py, with at most two micro-batches: more need no more memory."""
    micro_steps = min(workload.micro_steps, 2)
    for micro_step in range(micro_steps):
        before()
        sync_gradients(model, last=micro_step == micro_steps - 1)
        with torch.autocast(
            workload.device, workload.dtype, enabled=workload.dtype != torch.float32
        ):
            loss = loss_of(model, **batch)
        loss.backward()
        del loss
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    apply_update(model, optimizers)


def create_state(model: GPT, optimizers: list) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    apply_update(model, optimizers)


def apply_update(model: GPT, optimizers: list) -> None:
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """A process group with only this rank; its collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build_memory_tracker(workload: MemoryWorkload, model: GPT, optimizers: list):
    """torch's memory tracker, with the tensors that exist before the step."""
    if workload.shard:
        from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

        tracker = FSDPMemTracker(model)  # it takes only one optimizer, and Muon needs two
        tracker.track_inputs([list(s.values()) for opt in optimizers for s in opt.state.values()])
        return tracker
    from torch.distributed._tools.mem_tracker import MemTracker  # imports DTensor: takes a second

    tracker = MemTracker()
    tracker.track_external(model, *optimizers)
    for parameter in model.parameters():
        if not parameter.requires_grad:  # the tracker would hook it, which torch rejects
            tracker._param_to_grad_hook_handles[parameter] = (RemovableHandle(OrderedDict()),) * 2
    return tracker


def eager_peak(workload: MemoryWorkload) -> Counter[str]:
    """step_peak(); that of a deep model is extrapolated, since all blocks need the same."""
    shape, (few, more) = workload.shape, SHALLOW
    if shape.n_layer <= MAX_EXACT_LAYERS or workload.freeze:
        return step_peak(workload)
    low, high = (step_peak(replace(workload, shape=replace(shape, n_layer=n))) for n in SHALLOW)
    times = (shape.n_layer - few) / (more - few)
    return Counter({kind: low[kind] + times * (high[kind] - low[kind]) for kind in low})


def compiled_peak(workload: MemoryWorkload) -> Counter[str]:
    """The same for a step whose model and loss torch.compile has compiled for CUDA.

    The peak is at the start of the backward pass, or at its end, where all gradients are there.
    """
    state, tokens = state_bytes(workload), workload.micro_batch_size * workload.shape.block_size
    activations = round(tokens * compiled_token_bytes(workload))
    at_the_end = state.gradients > activations  # whether the end of the backward pass is the peak
    gradients = (workload.micro_steps > 1) + at_the_end  # of earlier micro-batches, and of this one
    copies = workload.dtype != torch.float32  # of the parameters, in 16 bits
    return Counter(
        parameters=state.parameters,
        gradients=gradients * state.gradients,
        optimizer=state.optimizer,
        activations=0 if at_the_end else activations,
        temporaries=state.parameters // 2 if copies else 0,
    )


def compiled_token_bytes(workload: MemoryWorkload) -> float:
    """Bytes that a compiled step keeps for each token of a micro-batch."""
    shape, size = workload.shape, workload.dtype.itemsize
    modern, bf16 = shape.arch == 'modern', workload.dtype == torch.bfloat16
    residual = 2 if bf16 and (modern or shape.bf16_residual) else 4  # bytes of its numbers
    block = COMPILED_BLOCK[shape.arch] * size / 2  # per n_embd
    if modern:
        block += COMPILED_KEYS_VALUES * size / 2 * shape.kv_heads / shape.n_head
    elif residual > size:
        block += 4  # it is added to twice
    logits = size * shape.vocab_size
    if not workload.gradient_checkpointing:
        return (shape.n_layer * block + COMPILED_ENDS * size / 2) * shape.n_embd + logits
    # the inputs of all blocks, with the logits and their gradient or one block at a time
    inputs = (shape.n_layer * residual + COMPILED_ENDS * size / 4) * shape.n_embd
    return inputs + max((1 + modern) * logits, block * shape.n_embd)


def estimate(workload: MemoryWorkload) -> Counter[str]:
    """Peak bytes of tensors in one process, by kind."""
    if workload.compiled_whole:  # the update is an eager one
        short = replace(workload.shape, block_size=min(16, workload.shape.block_size))
        update = eager_peak(replace(workload, shape=short, micro_batch_size=1))
        peak = max(compiled_peak(workload), update, key=Counter.total)
    else:
        peak = eager_peak(workload)
    state, shards = state_bytes(workload), workload.ranks if workload.shard else 1
    if workload.ranks > 1 and not workload.shard:  # DDP's buckets; at the update, the gradients
        peak['communication'] += state.gradients
    if not workload.offload:  # at the update all gradients exist: the peak of some deep models
        update = dict(zip(KINDS, (size / shards for size in state), strict=False))
        peak = max(peak, Counter(update), key=Counter.total)
    if workload.cache:  # rollouts: no gradients and no activations yet
        rollouts = {'parameters': state.parameters, 'optimizer': state.optimizer}
        rollouts = Counter(rollouts | {'KV cache of rollouts': workload.cache})
        peak = max(peak, rollouts, key=Counter.total)
    peak['further models'] = workload.copies
    peak['soft targets'] = workload.soft_targets
    if workload.device == 'cpu':
        saved = (state.parameters + state.optimizer) / shards
        if workload.saves and saved >= SYNC_SAVE_BYTES:  # the copy is written during training
            peak['copy to save'] = saved
        if workload.shard:  # every rank builds the whole model before sharding
            peak = max(peak, Counter(parameters=state.parameters), key=Counter.total)
    return peak


def process_overhead(workload: MemoryWorkload) -> tuple[float, float, float]:
    """Bytes of libraries, and the minimum and maximum factor from tensors to process memory."""
    if workload.device != 'cpu':
        return 0, 1, 1
    fragmented = workload.gradient_checkpointing or workload.shard
    libraries = LIBRARY_BYTES if workload.ranks == 1 else LIBRARY_BYTES_RANKS
    return libraries, *(TENSOR_FACTOR_FRAGMENTED if fragmented else TENSOR_FACTOR)


def max_bytes(workload: MemoryWorkload) -> float:
    """Upper end of the estimated bytes of one process."""
    libraries, _, most = process_overhead(workload)
    return libraries + most * estimate(workload).total()


class StateBytes(NamedTuple):
    """Bytes of the training state of the whole model, unsharded."""

    parameters: int
    gradients: int
    optimizer: int


def state_bytes(workload: MemoryWorkload) -> StateBytes:
    """Bytes of the training state, by arithmetic."""
    model = build_fake_model(replace(workload, device='meta'))
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    muon = workload.optimizer == 'muon'
    blocks = model.block_matrices() if muon else []
    matrices = sum(p.numel() - p.size(0) for p in blocks)  # which have one moment, and one per row
    count = sum(trained.values())
    whole = sum(p.numel() for p in model.parameters())
    return StateBytes(4 * whole, 4 * count, 8 * count - 4 * matrices)


def checkpoint_size(workload: MemoryWorkload) -> int:
    """Approximate bytes of a checkpoint; save.size_of() counts those of real tensors."""
    state = state_bytes(workload)
    return state.parameters + state.optimizer + 2**22


def min_bytes(workload: MemoryWorkload) -> float:
    """A lower bound in bytes, by arithmetic alone; each run checks it at its start."""
    state, shape = state_bytes(workload), workload.shape
    rows = workload.micro_batch_size * workload.sequences
    logits = 4 * rows * shape.block_size * shape.vocab_size
    if shape.score:  # a reward model has none
        logits = 0
    if workload.device == 'cuda':  # only some of them at a time, or all in 16 bits
        logits = min(logits, 4 * LOGITS_AT_ONCE)
    if workload.offload:
        return logits
    on_cpu = workload.shard and workload.device == 'cpu'
    whole = state.parameters if on_cpu else 0  # built there before sharding
    needed = max(whole, sum(state) / (workload.ranks if workload.shard else 1))
    return logits + needed + workload.copies + workload.soft_targets


def host_memory_problem(workload: MemoryWorkload) -> str | None:
    """The problem with host memory, if any: too little for what is built or offloaded there."""
    if workload.device != 'cuda' or not workload.shard:
        return None
    state, free = state_bytes(workload), available_host_memory()
    offloaded = sum(state) / workload.ranks if workload.offload else 0
    copied = (state.parameters + state.optimizer) / workload.ranks  # while a checkpoint is saved
    need = max(state.parameters, offloaded + copied)  # whole in each process, before sharding
    if free is None or need <= free:
        return None
    return (
        f'each process on this machine needs {need / 1e9:,.1f} GB of main memory for the model and '
        f'can have {free / 1e9:,.1f} GB: start fewer processes per machine or use a smaller model'
    )
