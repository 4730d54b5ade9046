"""
Train a GPT from scratch, or fine-tune a checkpoint or GPT-2; resume a run.

$ python train.py config/quickstart.py                        # a small model of real text
$ python train.py train_shakespeare_char --batch_size=32      # a config by name, then overrides
$ python train.py out/my_run/config.py --init_from=resume     # resume a run
$ torchrun --standalone --nproc_per_node=8 train.py train_gpt2
$ torchrun --nnodes=2 --nproc_per_node=8 --rdzv_endpoint=HOST:29500 --rdzv_backend=c10d \\
      train.py train_gpt2                                     # run this on both nodes

The run directory gets config.py, metrics.jsonl, loss.png and checkpoints/. Ctrl-C saves and stops.
"""

import math
import sys
import time
from collections import deque
from functools import partial

from flatgpt.errors import one_line_errors

if __name__ == '__main__':
    one_line_errors()  # also for Ctrl-C during the slow imports below

import torch
from torch.nn.parallel import DistributedDataParallel

from configurator import configure
from flatgpt.parallel import apply_fsdp, compile_blocks, full_tensor, reshard, sync_gradients
from flatgpt.runtime import init_runtime, on_out_of_memory
from flatgpt.streams import ignore_output_errors
from flatgpt.training.auto import choose_settings
from flatgpt.training.batches import BatchLoader
from flatgpt.training.compiling import decide_compile
from flatgpt.training.evaluate import estimate_loss
from flatgpt.training.finish import finish
from flatgpt.training.loss import find_or_compute_reference, loss_of, reference_fingerprint
from flatgpt.training.memory_report import suggest_smaller_model
from flatgpt.training.metrics import format_losses, format_setup
from flatgpt.training.optim import build_optimizers, set_lr
from flatgpt.training.preflight import preflight
from flatgpt.training.resume import build, saved_settings, set_trainable
from flatgpt.training.rollout import Rollouts, load_reference
from flatgpt.training.run import Run
from flatgpt.training.stop_signal import StopSignal
from flatgpt.training.update import GraphedUpdate, PendingNumbers, should_capture
from flatgpt.training.validate import steps_of, validate, validate_machine
from flatgpt.training.watchdog import Watchdog

# -----------------------------------------------------------------------------
# run
out_dir: str | None = None  # run directory; None: a new one, out/<name>
init_from = 'scratch'  # or 'resume' (out_dir or the newest run), a run directory, 'gpt2' ...
checkpoint: str | None = None  # 'last', 'best' or a path; None: last to resume, best to fine-tune
auto_resume = False  # resume if out_dir has a checkpoint, otherwise start from init_from
overwrite = False  # delete the checkpoints in out_dir when a new run starts
seed = 1337  # for the initial weights, data order and dropout
# evaluation and checkpoints
eval_interval: int | None = 2000  # steps between evaluations (which save); None: only at the end
eval_iters: int | None = 200  # batches per split and evaluation; None: the whole validation split
eval_train = True  # also evaluate the training split, on the same number of batches
eval_only = False  # evaluate once, print the loss and exit; writes nothing
save_interval: int | None = None  # steps between additional checkpoints; None: only at evaluations
# keep every evaluated checkpoint; False: only the last two and the best
always_save_checkpoint = True
checkpoint_mirror: str | None = None  # second directory for checkpoints: a mounted bucket ...
patience: int | None = None  # stop after this many evaluations without a new best; None: never
log_interval = 1  # steps between lines in metrics.jsonl
sample_tokens = 256  # tokens to generate and print at the end; 0: none
eval_sample_tokens = 0  # tokens to generate and print at each earlier evaluation; 0: none
# trackers
wandb_log = False  # log to Weights & Biases (wandb)
wandb_project = 'owt'  # name of the project on wandb
wandb_run_name = 'gpt2'  # name of the run on wandb
tensorboard_log = False  # write TensorBoard logs to tb/ in the run directory
# data
dataset = 'openwebtext'  # a name in data/, a path or URL, or a mixture: 'poe:0.7,poems:0.3'
data_cache: str | None = None  # local directory to copy the dataset to first
gradient_accumulation_steps = 5 * 8  # micro-batches per update, summed over all processes
batch_size = 12  # micro-batch size per process: sequences ('dpo', 'reward': pairs; 'rl': prompts)
block_size = 1024  # tokens per sequence
short_block_size: int | None = None  # sequence length during the first short_iters steps
short_iters = 0  # steps with short_block_size; cheaper, since attention is shorter
mask_documents = False  # no attention across documents or conversations
# budget, at most one: the model, the batch and the schedule are chosen for it, see config/auto.py
minutes: float | None = None  # choose them so that the command takes this long
tokens: float | None = None  # choose them so that the model trains on this many tokens
flops: float | None = None  # choose them so that training takes this many operations
# loss
# 'lm': text; 'sft': assistant messages; 'dpo': preference pairs; 'reward': a reward model, from
# preference pairs; 'rl': completions with rewards
objective = 'lm'
# 'lm': mix the next tokens with the predictions of an n-gram model of the training split
ngram_order: int | None = None  # tokens per n-gram, 5 for characters; None: next tokens alone
ngram_decay = 2.0  # its weight is (1 - step / max_iters) ** ngram_decay; 0: 1, for very short runs
dpo_beta = 0.1  # strength of the KL penalty: larger stays closer to the initial model
# reinforcement learning, objective='rl'
# FILE.py:function, 'exact', 'regex' or 'length', or the run directory of a reward model
reward: str | None = None
rl_samples = 8  # completions per prompt; their mean reward is the baseline
rl_tokens = 64  # maximum tokens per completion
rl_baseline = 'mean'  # of a prompt's rewards; 'std': divide by their spread, too; 'leave_one_out'
rl_normalize = 'tokens'  # the loss is the mean over a step's tokens; or over its 'completions'
rl_kl = 0.0  # strength of the KL penalty to the initial model; 0: none, and no copy of it
# model (defaults: GPT-2 124M)
arch = 'gpt2'  # or 'modern': rotary embeddings, RMSNorm, squared ReLU, as in nanochat
n_layer = 12  # blocks
n_head = 12  # attention heads
n_embd = 768  # width: a multiple of n_head
n_kv_head: int | None = None  # key/value heads, arch='modern'; None: n_head
dropout = 0.0  # 0 for pretraining; 0.1 or more for fine-tuning and small datasets
bias = False  # use biases in Linear and LayerNorm, arch='gpt2'
# parameter-efficient fine-tuning
lora_rank: int | None = None  # train only LoRA adapters of this rank; None: no LoRA
lora_alpha: int | None = None  # the adapters' scale is lora_alpha / lora_rank; None: 2 * lora_rank
lora_dropout = 0.0  # dropout of the adapters' input
lora_targets = 'all'  # matrices to adapt, such as 'c_attn,mlp.c_proj' (modern: 'q_proj,mlp.fc2')
freeze: int | None = None  # freeze the embeddings and the first `freeze` blocks; None: nothing
# optimizer
optimizer = 'adamw'  # or 'muon': Muon for the matrices of the blocks, AdamW for the rest
learning_rate = 6e-4  # maximum learning rate of AdamW
muon_lr = 0.02  # maximum learning rate of Muon, with the same schedule
muon_momentum = 0.95  # Muon: Nesterov momentum
max_iters = 600000  # total number of updates (steps)
epochs: float | None = None  # passes over the training data; overrides max_iters and lr_decay_iters
# applied to matrices and embeddings; with optimizer='muon', to the matrices of the blocks
weight_decay = 1e-1
beta1 = 0.9  # AdamW: decay rate of the first moment
beta2 = 0.95  # AdamW: decay rate of the second moment
grad_clip = 1.0  # maximum gradient norm; 0.0: no clipping
# learning rate schedule
decay_lr = True  # False: constant, without warmup
lr_schedule = 'cosine'  # or 'constant', or 'linear' (constant, then a linear decay)
warmup_iters = 2000  # steps of linear warmup
lr_decay_iters: int | None = 600000  # step at which min_lr is reached; None: max_iters
min_lr = 6e-5  # final learning rate of AdamW; Muon's decays by the same factor
cooldown = 0.4  # lr_schedule='linear': fraction of lr_decay_iters over which it decays
# machine
device = 'auto'  # 'cpu', 'mps', 'cuda', 'cuda:1' ...; 'auto': a GPU if there is one
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; 'auto': the fastest that is safe on the device
gradient_checkpointing = False  # recompute activations in the backward pass: less memory
compile: bool | str = 'auto'  # torch.compile; 'auto': on CUDA, for long runs
cuda_graph: bool | str = 'auto'  # an update as one CUDA graph; 'auto': on CUDA, for tiny models
backend = 'auto'  # of torch.distributed: 'nccl' or 'gloo'; 'auto': nccl on CUDA
shard = False  # shard parameters, gradients and optimizer (FSDP2); False: DDP
offload = False  # with shard: keep parameters and optimizer state in host memory
hang_timeout = 600.0  # seconds a rank may stall before it is reported and the job stops
peak_tflops: float | None = None  # peak speed of one device, for MFU; None: known GPUs only
# before a long run
check = False  # check everything the run needs, report go or no-go, exit
plan = False  # estimate memory, suggest savings, exit
# -----------------------------------------------------------------------------
# given: the settings that this command sets, and where
config = configure(globals(), sys.argv[1:], given=(given := {}))
if saved := saved_settings(config):  # of the run to resume; this command overrides them
    config = configure({**globals(), **saved}, sys.argv[1:])
validate(config)
globals().update(config)
ignore_output_errors()  # a closed pipe or a full disk behind a log file must not stop training

# -----------------------------------------------------------------------------
# setup: no checkpoint or log is overwritten before run.open(), so a mistake costs nothing

runtime = init_runtime(device, dtype, backend, hang_timeout, config, offload)
watchdog = Watchdog(runtime, hang_timeout)
validate_machine(config, runtime)
on_out_of_memory(runtime.device, lambda: suggest_smaller_model(config))
deadline = choose_settings(config, given, runtime, resumed=bool(saved))  # None without minutes
globals().update(config)
if check or plan:
    watchdog.enter_phase(0, 'running the checks')
    status = preflight(config, runtime)
    watchdog.close()
    runtime.exit(status)

run = Run(config, runtime, watchdog)  # finds the checkpoint to resume from
torch.manual_seed(seed)
raw_model, tokenizer, data = build(config, run)
globals().update(config)  # build() sets the shape and init_from of a loaded model
state = run.state
batches = BatchLoader(data, state, config, runtime)
on_out_of_memory(runtime.device, batches.suggest_smaller_batch)  # replaces the advice above
schedule_iters = steps_of(config, data)  # the length of the schedule, which events stretch
max_iters = state.max_iters(schedule_iters)
if epochs is not None or lr_decay_iters is None:
    lr_decay_iters = schedule_iters
runtime.print0(format_setup(config, raw_model, data, runtime, batches.tokens_per_step))
set_trainable(raw_model, config, runtime.print0)
if (objective == 'dpo' or (objective == 'rl' and rl_kl)) and not run.resume_from:
    state.reference = runtime.broadcast_from_rank0(
        lambda: reference_fingerprint(raw_model, runtime.dtype_name)
    )
state.start_clock()  # the logged seconds include compilation and evaluation

# raw_model is evaluated, sampled from and saved; model shares its weights and is trained
model, compiled = raw_model, False
peak_flops = runtime.peak_flops(peak_tflops)
work = batches.work(raw_model, max_iters)
use_graph = should_capture(config, work, peak_flops, runtime)
work = work._replace(graphed=use_graph)
should_compile = not eval_only and decide_compile(compile, work, peak_flops, runtime)
batches.fixed_width = should_compile
if shard:  # FSDP2: compile each block, then shard
    if should_compile:
        compiled = compile_blocks(raw_model, runtime, runtime.print0)
    model = apply_fsdp(raw_model, runtime, offload)
if objective == 'dpo':  # log-probabilities before training
    batches.reference = find_or_compute_reference(raw_model, batches, run, config)
rollouts = None
if objective == 'rl':
    rollouts = Rollouts(raw_model, tokenizer, data, config, runtime)
    if rl_kl:
        rollouts.reference, batches.reference = load_reference(raw_model, run)
if should_compile and not shard:
    trial_loss, shapes = partial(loss_of, beta=dpo_beta), batches.shapes_to_compile()
    if rollouts:
        shapes = rollouts.shapes_to_compile()
    # (raw_model, False) if that fails
    model, compiled = runtime.try_compile(raw_model, shapes, runtime.print0, trial_loss)
if runtime.world_size > 1 and not shard and not eval_only:
    gpu = [runtime.device] if runtime.device_type == 'cuda' else None
    # the gradients lie in the buffers that are reduced, instead of being copied out of them
    model = DistributedDataParallel(model, device_ids=gpu, gradient_as_bucket_view=True)

reshard(raw_model)  # the optimizer needs the shards; a forward pass may have gathered the root
optimizers = build_optimizers(
    optimizer,
    raw_model,
    learning_rate=learning_rate,
    betas=(beta1, beta2),
    muon_lr=muon_lr,
    muon_momentum=muon_momentum,
    weight_decay=weight_decay,
    compile=compiled,
    capturable=use_graph,
)
# only float16 needs loss scaling: bfloat16 has the range of float32
scaler = torch.amp.GradScaler(runtime.device_type, enabled=runtime.dtype == torch.float16)
if run.resume_from:
    run.restore(raw_model, optimizers, scaler)


def get_lr(step: float) -> float:
    """Learning rate of a step of the schedule: linear warmup, then lr_schedule."""
    if not decay_lr:
        return learning_rate
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if lr_schedule == 'constant':
        return learning_rate
    if step >= lr_decay_iters:
        decay = 0.0
    elif lr_schedule == 'linear':
        decay = min(1.0, (lr_decay_iters - step) / max(1.0, cooldown * lr_decay_iters))
    else:
        ratio = (step - warmup_iters) / (lr_decay_iters - warmup_iters)  # 0 to 1
        decay = 0.5 * (1.0 + math.cos(math.pi * ratio))  # 1 to 0
    return min_lr + decay * (learning_rate - min_lr)


def update(micro_batches: list, signals) -> torch.Tensor:
    """One update of the weights; if the loss or the gradient is not finite, all ranks skip it.

    Returns a tensor on the device, so that the host need not wait for it: the gradient norm, the
    loss scale, the mean loss, and with several ranks the sum of their StopSignal.to_device().
    """
    mean_loss = 0.0
    for number, (batch, divisor) in enumerate(micro_batches, 1):
        if runtime.world_size > 1:  # all-reduce once, with the last micro-batch
            sync_gradients(model, last=number == len(micro_batches))
        with runtime.autocast():
            # summed over micro-batches and averaged over ranks, this is the mean
            loss = loss_of(model, **batch, beta=rl_kl if rollouts else dpo_beta) / divisor
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    for opt in optimizers:
        scaler.unscale_(opt)
    watchdog.enter_phase(step, 'updating the weights')
    norm = full_tensor(
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    )
    mean_loss = mean_loss.to(signals) / runtime.world_size
    sums = runtime.sum_over_ranks(torch.cat([mean_loss[None], signals]))
    norm, scale = norm.to(sums), scaler.scale(torch.ones_like(sums[0]))
    found_inf = (sums + norm).isfinite().all().logical_not().float()
    for opt in optimizers:  # not scaler.step(), which would decide on each rank whether to skip
        opt.found_inf = found_inf  # 1: leave weights and optimizer as they are
        opt.step()
    scaler.update()
    raw_model.zero_grad(set_to_none=True)
    return torch.cat([torch.stack([norm, scale]), sums])


def discard_update() -> None:
    """Drop the gradients of an update that stopped halfway, and what the scaler noted of them."""
    raw_model.zero_grad(set_to_none=True)
    scaler.update(scaler.get_scale())  # does not change the scale


def read_update(lr: float, started: float, numbers: PendingNumbers) -> bool:
    """Count, report and log an update -> whether a rank received a signal to stop."""
    norm, scale, mean_loss, *signals = numbers.read()
    if any(signals):
        stop_signal.sync_ranks()
    if math.isnan(sum(signals)):
        return True  # a rank had no batch for this update
    # in float16 it may be an overflow, which the scaler handles by lowering the scale
    overflow = scaler.is_enabled() and scale > 1 and math.isfinite(mean_loss)
    skipped = not (math.isfinite(mean_loss + norm) or overflow)
    state.record_update(norm, skipped, batches.global_batch_size)
    run.progress.advance(started)
    data_wait = batches.pop_wait_seconds()
    if skipped:
        run.report_skipped(mean_loss, norm)
    if state.step % log_interval == 0:
        tokens = rollouts.tokens_per_step if rollouts else batches.tokens_per_step
        speed = run.progress.steps_per_second() * tokens
        mfu = peak_flops and speed * raw_model.flops_per_token() / (peak_flops * runtime.world_size)
        values = {'lr': lr, 'grad_norm': norm, 'tokens_per_s': speed, 'mfu': mfu}
        values |= rollouts.stats if rollouts else {}
        run.log_update(loss=mean_loss, **values, data_wait=data_wait)
    return any(signals)


launch = GraphedUpdate(update, discard_update, runtime.print0) if use_graph else update

# -----------------------------------------------------------------------------
# the loop

stop_signal = StopSignal(runtime)  # from here on a signal finishes the step, saves and exits
evaluate = partial(estimate_loss, raw_model, batches, config, runtime)
if rollouts:
    evaluate = rollouts.evaluate
if eval_only:
    if losses := evaluate(stop_signal):
        runtime.print0(', '.join(f'{name} {value:.4f}' for name, value in losses.items()))
    if stop_signal.error:  # of the reward
        raise stop_signal.error
    runtime.exit(stop_signal.status)
run.exit_if_finished(max_iters)
run.open(max_iters, batches.reference)
batches.on_read_error = stop_signal.fail  # a read error stops the run as a signal does
stopping = False
in_flight = deque()  # updates whose results were not read yet: on a GPU, the last one

while True:
    # once in a while: evaluate, before the update, so step 0 is the untrained model
    step = state.step + len(in_flight)
    # several ranks learn of each other's signals from the result of an update
    stopping = stopping or (runtime.world_size == 1 and stop_signal.signal > 0)
    should_evaluate = step >= max_iters or (eval_interval and step % eval_interval == 0)
    if should_evaluate or stopping or (save_interval and step % save_interval == 0):
        while in_flight:  # no checkpoint contains an update whose loss was not read
            stopping |= read_update(*in_flight.popleft())
    losses, step = None, state.step + len(in_flight)
    if should_evaluate and not state.is_evaluated and not stopping:
        watchdog.enter_phase(step, 'evaluating')
        losses = evaluate(stop_signal)
        stopping = losses is None
    if losses:
        state.record_evaluation(losses)
        runtime.print0(format_losses(step, losses))
        run.log_evaluation(losses)
    finished = state.is_finished(max_iters, patience)

    # once in a while, with --minutes: adjust the number of steps to the speed of the machine
    if deadline and deadline.is_due(step) and not (finished or stopping):
        max_iters = run.refit(deadline, step, max_iters)

    # once in a while: save a checkpoint, print a sample
    can_save = not in_flight and run.can_save(raw_model, losses, stopping)
    if can_save and run.is_due_to_save(losses, last=finished or stopping):
        watchdog.enter_phase(step, 'saving a checkpoint')
        run.save(raw_model, optimizers, tokenizer, scaler)
    run.report_problems('; training continues')
    if finished or stopping:
        break
    if runtime.is_main and losses and can_save:
        watchdog.enter_phase(step, 'generating a sample')
        run.show_sample(raw_model, tokenizer, data, eval_sample_tokens)

    # one update: on a GPU its result is read while the next one is computed
    watchdog.enter_phase(step, 'reading data')
    started = time.perf_counter()
    schedule_step = state.schedule_step(step, schedule_iters)
    micro_batches = batches.next_update(schedule_step)
    if stop_signal.failed and runtime.world_size == 1:
        continue
    if rollouts:  # complete the prompts, score the completions
        keep_alive = partial(watchdog.keep_alive, step, 'completing prompts')
        completions = rollouts.sample(micro_batches, stop_signal, keep_alive)
        if completions is None:  # a signal, or the reward failed
            stopping = True
            continue
        micro_batches = rollouts.micro_batches(completions, batches.micro_batch_size)
    watchdog.enter_phase(step, 'computing gradients')
    runtime.seed(seed, step)
    lr = get_lr(schedule_step)
    for opt in optimizers:
        for group in opt.param_groups:
            set_lr(group, lr * group['lr_ratio'])  # 1, or muon_lr / learning_rate
    numbers = PendingNumbers(launch(micro_batches, stop_signal.to_device()))
    in_flight.append((lr, started, numbers))
    # completions wait for the weights, and so for the result
    while len(in_flight) > (0 if rollouts else runtime.max_in_flight):
        stopping |= read_update(*in_flight.popleft())

batches.close()
finish(run, raw_model, tokenizer, data, stop_signal, finished)
