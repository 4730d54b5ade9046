"""
Train a GPT: from scratch, from where a run stopped, from an own checkpoint or from GPT-2.

$ python train.py config/quickstart.py                        # three minutes on a laptop
$ python train.py train_shakespeare_char --batch_size=32      # a config by name, then overrides
$ python train.py out/my_run/config.py --init_from=resume     # go on where a run stopped
$ torchrun --standalone --nproc_per_node=8 train.py train_gpt2
$ torchrun --nnodes=2 --nproc_per_node=8 --rdzv_endpoint=HOST:29500 --rdzv_backend=c10d \
      train.py train_gpt2                                     # on both nodes

The run's folder gets config.py, metrics.jsonl, loss.png and checkpoints/. Ctrl-C saves and stops.
"""

import math
import sys
import time
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel

from configurator import configure
from flatgpt.parallel import apply_fsdp, compile_blocks, settle, sync_gradients, whole
from flatgpt.runtime import StopSignal, on_out_of_memory, start
from flatgpt.streams import make_output_optional
from flatgpt.training.batches import BatchLoader
from flatgpt.training.evaluate import estimate_loss
from flatgpt.training.finish import finish
from flatgpt.training.loss import find_or_compute_reference, fingerprint, loss_of
from flatgpt.training.memory import suggest_smaller_model
from flatgpt.training.metrics import format_losses, format_setup
from flatgpt.training.optim import build_optimizers
from flatgpt.training.preflight import preflight
from flatgpt.training.resume import build, saved_settings, set_trainable
from flatgpt.training.run import Run
from flatgpt.training.validate import steps_of, validate, validate_machine
from flatgpt.training.watchdog import Watchdog

# -----------------------------------------------------------------------------
# the run
out_dir: str | None = None  # folder of the run; None makes a fresh one, out/<name>
init_from = 'scratch'  # 'scratch', 'resume', the folder of another run, or gpt2 and its sizes
checkpoint: str | None = None  # 'last', 'best' or a path; None: to resume the last, else the best
auto_resume = False  # resume if out_dir has a checkpoint, otherwise start from init_from
overwrite = False  # let a new run delete the checkpoints that its folder has
seed = 1337  # of the initial weights, the data order and dropout
# evaluation and saving
eval_interval: int | None = 2000  # steps between evaluations, each saved; None: only at the end
eval_iters: int | None = 200  # batches per evaluation and split; None: the whole validation split
eval_train = True  # evaluate the training split too, on as many windows
eval_only = False  # evaluate once, print, write nothing
save_interval: int | None = None  # steps between checkpoints besides those of the evaluations
always_save_checkpoint = True  # keep every evaluation's checkpoint, not just the last two and best
checkpoint_mirror: str | None = None  # a second folder for them, such as a mounted bucket
patience: int | None = None  # stop after so many evaluations without a new best; None: never
log_interval = 1  # steps between lines in metrics.jsonl
sample_tokens = 256  # length of the text to print at the end; 0: none
eval_sample_tokens = 0  # length of one at each evaluation before that; 0: none
# trackers
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
tensorboard_log = False  # to tb/ in the run's folder
# data
dataset = 'openwebtext'  # a folder in data/, a path or URL, or a mixture: 'a:0.7,b:0.3'
data_cache: str | None = None  # a folder on this machine's own disk to copy it to first
gradient_accumulation_steps = 5 * 8  # with batch_size, the sequences per update over all processes
batch_size = 12  # sequences, or pairs of them, that one process computes at a time
block_size = 1024  # tokens per sequence
short_block_size: int | None = None  # cut sequences into such pieces at first: cheaper attention
short_iters = 0  # steps on those pieces
mask_documents = False  # no attention across an end of text, or from conversation to conversation
# what to learn
objective = 'lm'  # text; 'sft': the answers in conversations; 'dpo': which of two is better
dpo_beta = 0.1  # how dearly a model pays for leaving what it was before: more keeps it nearer
# model; the defaults are GPT-2 124M
arch = 'gpt2'  # or 'modern': rotary positions, RMS norms, squared ReLU, as in NanoChat
n_layer = 12
n_head = 12
n_embd = 768
n_kv_head: int | None = None  # heads of keys and values, arch='modern'; None: n_head
dropout = 0.0  # 0 for pretraining; 0.1 and more for fine-tuning and small data
bias = False  # in Linear and LayerNorm, arch='gpt2'
# fine-tuning a part of a model
lora_rank: int | None = None  # train adapters of this rank, and nothing else (LoRA); None: none
lora_alpha: int | None = None  # what they add counts lora_alpha / lora_rank; None: twice the rank
lora_dropout = 0.0  # of what they are given
lora_targets = 'all'  # the blocks' matrices that have one, such as 'c_attn,mlp.c_proj'
freeze: int | None = None  # keep the embeddings and so many first blocks as they are
# optimizer
optimizer = 'adamw'  # or 'muon': Muon for the matrices in the blocks, AdamW for the rest
learning_rate = 6e-4  # AdamW's at its highest
muon_lr = 0.02  # Muon's at its highest; it rises and falls as AdamW's does
muon_momentum = 0.95
max_iters = 600000  # updates in all
epochs: float | None = None  # passes over the training data; sets max_iters and lr_decay_iters
weight_decay = 1e-1  # of matrices and embeddings; with Muon, of the matrices in the blocks
beta1 = 0.9  # AdamW's
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0.0 does not clip
# learning rate
decay_lr = True  # False keeps it constant
lr_schedule = 'cosine'  # 'constant', or 'linear': constant, then straight down at the end
warmup_iters = 2000  # steps of linear rise at the start
lr_decay_iters: int | None = 600000  # step at which min_lr is reached; None: max_iters
min_lr = 6e-5
cooldown = 0.4  # part of lr_decay_iters over which 'linear' comes down
# machine
device = 'auto'  # 'auto', 'cpu', 'mps', 'cuda' or 'cuda:1'
dtype = 'auto'  # 'auto', 'float32', 'bfloat16' or 'float16'
gradient_checkpointing = False  # compute activations twice instead of keeping them: less memory
compile: bool | str = 'auto'  # 'auto' compiles on a CUDA GPU, for a long run
backend = 'auto'  # of torch.distributed: 'auto', 'nccl' or 'gloo'
shard = False  # each process holds its rows of the model (FSDP2), instead of all of it (DDP)
offload = False  # keep those rows, and the optimizer, in the host's memory
hang_timeout = 600.0  # seconds until one that keeps the others waiting is named, and all end
peak_tflops: float | None = None  # of one device, for the MFU; None looks it up, or shows no MFU
# before a long run
check = False  # look at everything that it needs, say go or no-go, and leave
plan = False  # say what memory it will need, and what to change if that is not there, and leave
# -----------------------------------------------------------------------------
config = configure(globals(), sys.argv[1:])
if saved := saved_settings(config):  # of the run to resume: they come first, this command's after
    config = configure({**globals(), **saved}, sys.argv[1:])
validate(config)
globals().update(config)
make_output_optional()  # no pipe that closes, no full disk behind a log file ends the training

# -----------------------------------------------------------------------------
# set-up: until run.open() nothing changes on the disk, so that a mistake costs nothing

runtime = start(device, dtype, backend, hang_timeout, config, offload)
watchdog = Watchdog(runtime, hang_timeout)
validate_machine(config, runtime)
on_out_of_memory(runtime.device, lambda: suggest_smaller_model(config))
if check or plan:
    watchdog.at(0, 'the check')
    status = preflight(config, runtime)
    watchdog.close()
    runtime.leave(status)

run = Run(config, runtime, watchdog)  # its directory, and the checkpoint to resume from
torch.manual_seed(seed)
raw_model, tokenizer, data = build(config, run)
globals().update(config)  # with the shape of a model that was loaded, and how its run began
state = run.state
batches = BatchLoader(data, state, config, runtime)
on_out_of_memory(runtime.device, batches.suggest_smaller_batch)  # better advice than the one above
max_iters = steps_of(config, data)
lr_decay_iters = max_iters if epochs is not None or lr_decay_iters is None else lr_decay_iters
runtime.print0(format_setup(config, raw_model, data, runtime, batches.tokens_per_step))
set_trainable(raw_model, config, runtime.print0)
if objective == 'dpo' and not run.resume_from:
    state.reference = runtime.agree(lambda: fingerprint(raw_model, runtime.dtype_name))
state.start_clock()  # of the seconds in the log, which count compilation and evaluation

# raw_model is evaluated, sampled from and saved; model is the same weights, ready for training
model, compiled = raw_model, False
peak_flops = peak_tflops * 1e12 if peak_tflops else runtime.peak_flops()
work = batches.work(raw_model, max_iters)
to_compile = not eval_only and runtime.decide_compile(compile, work, peak_flops, runtime.print0)
batches.fixed_width = to_compile
if shard:  # FSDP2: each block by itself, then cut into rows
    if to_compile:
        compiled = compile_blocks(raw_model, runtime, runtime.print0)
    model = apply_fsdp(raw_model, runtime, offload)
if objective == 'dpo':  # what the model gives the answers before training
    batches.reference = find_or_compute_reference(raw_model, batches, run, config)
if to_compile and not shard:
    trial, shapes = partial(loss_of, beta=dpo_beta), batches.shapes_to_compile()
    model, compiled = runtime.try_compile(
        torch.compile, raw_model, shapes, runtime.print0, trial
    )  # as it is, where that fails
if runtime.world_size > 1 and not shard and not eval_only:
    gpu = [runtime.device] if runtime.device_type == 'cuda' else None
    model = DistributedDataParallel(model, device_ids=gpu)

settle(raw_model)  # the optimizer has to be given each rank's rows, whatever has been computed
optimizers = build_optimizers(
    optimizer,
    raw_model,
    learning_rate=learning_rate,
    betas=(beta1, beta2),
    muon_lr=muon_lr,
    muon_momentum=muon_momentum,
    weight_decay=weight_decay,
    compile=compiled,
)
# float16 alone needs its loss scaled: bfloat16 has the range of float32
scaler = torch.amp.GradScaler(runtime.device_type, enabled=runtime.dtype == torch.float16)
if run.resume_from:
    run.restore(raw_model, optimizers, scaler)


def get_lr(step: int) -> float:
    """Learning rate of an update: linear warm-up, then what lr_schedule says."""
    if not decay_lr:
        return learning_rate
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if lr_schedule == 'constant':
        return learning_rate
    if step >= lr_decay_iters:
        share = 0.0
    elif lr_schedule == 'linear':
        share = min(1.0, (lr_decay_iters - step) / max(1.0, cooldown * lr_decay_iters))
    else:
        ratio = (step - warmup_iters) / (lr_decay_iters - warmup_iters)  # 0 to 1
        share = 0.5 * (1.0 + math.cos(math.pi * ratio))  # 1 to 0
    return min_lr + share * (learning_rate - min_lr)


# -----------------------------------------------------------------------------
# the loop

stop = StopSignal(runtime)  # from here on a signal finishes the step, saves and exits
if eval_only:
    if losses := estimate_loss(raw_model, batches, config, runtime, stop):
        runtime.print0(', '.join(f'{name} {value:.4f}' for name, value in losses.items()))
    runtime.leave(stop.status)
run.exit_if_finished(max_iters)
run.open(max_iters, batches.reference)
batches.on_read_error = stop.fail  # data that can be read no more ends the run as a signal does
stopping = False

while True:
    # once in a while: evaluate, before the update, so that step 0 shows the untrained model
    losses, step = None, state.step
    to_evaluate = step >= max_iters or (eval_interval and step % eval_interval == 0)
    if to_evaluate and not state.is_evaluated and not stopping:
        watchdog.at(step, 'the evaluation')
        losses = estimate_loss(raw_model, batches, config, runtime, stop)
        stopping = losses is None
    if losses:
        state.record_evaluation(losses)
        runtime.print0(format_losses(step, losses))
        run.log_evaluation(losses)
    finished = state.is_finished(max_iters, patience)
    # of several ranks, all learn of a signal together: at the end of an update
    stopping = stopping or (runtime.world_size == 1 and stop.signal > 0)

    # once in a while: save, and show a sample
    sound = run.weights_are_finite(raw_model, losses, stopping)
    if sound and run.is_due_to_save(losses, last=finished or stopping):
        watchdog.at(step, 'the saving')
        run.save(raw_model, optimizers, tokenizer, scaler)
    run.report_problems('; training goes on')
    if finished or stopping:
        break
    if runtime.main and losses and sound:
        watchdog.at(step, 'the sample')
        run.show_sample(raw_model, tokenizer, data, eval_sample_tokens)

    # one update: the gradient of the mean loss over all micro-batches and all ranks
    started = time.perf_counter()
    runtime.seed(seed, step)
    lr = get_lr(step)
    for each in optimizers:
        for group in each.param_groups:
            group['lr'] = lr * group['lr_ratio']  # 1, or muon_lr / learning_rate
    mean_loss = 0.0
    for micro_step in range(batches.micro_steps):
        watchdog.at(step, 'the data')
        batch, divisor = next(batches)  # with which the sum over all ranks is the mean
        watchdog.at(step, 'the gradients')
        if runtime.world_size > 1:  # the ranks exchange them once, with the last micro-batch
            sync_gradients(model, last=micro_step == batches.micro_steps - 1)
        with runtime.autocast():
            loss = loss_of(model, **batch, beta=dpo_beta) / divisor
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    for each in optimizers:
        scaler.unscale_(each)
    watchdog.at(step, 'the update')
    norm = whole(torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf))
    mean_loss, norm = torch.stack([mean_loss, norm.to(mean_loss)]).tolist()

    # an update that is not finite is skipped, by all ranks or none; in float16 the scale may just
    # have been too large, which the scaler notices and corrects by itself
    overflow = scaler.is_enabled() and scaler.get_scale() > 1 and math.isfinite(mean_loss)
    finite = math.isfinite(mean_loss + norm)
    skip = not (finite or overflow)
    skip, stopping = (flag > 0 for flag in runtime.reduce([skip, stop.signal], 'MAX'))
    if stopping:
        stop.share()
    if stop.failed:
        continue  # there was no batch to make this update of
    if finite and not skip:
        for each in optimizers:
            each.step()
    scaler.update()
    raw_model.zero_grad(set_to_none=True)
    state.record_update(norm, skip, batches.global_batch_size)
    run.progress.advance(time.perf_counter() - started)
    data_wait = batches.pop_wait_seconds()
    if skip:
        run.report_skipped(mean_loss, norm)

    # once in a while: log
    if state.step % log_interval == 0:
        (mean_loss,) = runtime.reduce([mean_loss / runtime.world_size])
        speed = run.progress.steps_per_second() * batches.tokens_per_step
        mfu = peak_flops and speed * raw_model.flops_per_token() / (peak_flops * runtime.world_size)
        measured = {'lr': lr, 'grad_norm': norm, 'tokens_per_s': speed, 'mfu': mfu}
        run.log_update(loss=mean_loss, **measured, data_wait=data_wait)

batches.close()
finish(run, raw_model, tokenizer, data, stop, finished)
