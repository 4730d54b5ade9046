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
import secrets
import shlex
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from itertools import chain, product
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import configure
from flatgpt.checkpoint.load import listed, load_model, load_optimizer, newest_run, step_of
from flatgpt.checkpoint.mirror import Mirror, begin_mirror, catch_up, check_mirror, probe_mirror
from flatgpt.checkpoint.save import Saver
from flatgpt.data.mixture import open_data
from flatgpt.errors import ConfigError, UserError, one_of, within
from flatgpt.inference.engine import write_page
from flatgpt.parallel import (
    are_finite,
    check_shard,
    compile_blocks,
    parallelize,
    settle,
    sync_gradients,
    whole,
)
from flatgpt.runtime import StopSignal, is_out_of_memory, on_out_of_memory, start
from flatgpt.training import run_directory
from flatgpt.training.loss import (
    MEASURED,
    REFERENCE,
    find_reference,
    fingerprint,
    loss_of,
    measure,
    reference_logps,
    trim,
    write_reference,
)
from flatgpt.training.metrics import Progress, Tracker, draw_loss
from flatgpt.training.optim import build_optimizers
from flatgpt.training.preflight import doubts, preflight
from flatgpt.training.resume import (
    choose_trained,
    find_model,
    find_start,
    fit_to_data,
    keep_shape,
    new_shape,
)
from flatgpt.training.validate import check_batches, slips, steps_of
from flatgpt.training.watchdog import Watch

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
published: str | None = None  # losses that others measured, to print beside eval_only's
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
compile: bool | str = 'auto'  # 'auto' compiles on a CUDA GPU, where it pays
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
if config['auto_resume'] and not config['out_dir']:
    raise ConfigError('auto_resume=True needs --out_dir, the same at every start')
resuming = config['init_from'] == 'resume' or config['auto_resume']
if resuming:  # the run's own settings come first, this command's after them
    out_dir = config['out_dir'] or str(newest_run())
    saved = run_directory.saved_settings(out_dir) or run_directory.saved_settings(
        config['checkpoint_mirror']
    )
    defaults = {**globals(), **saved, 'out_dir': out_dir}
    config = configure({**defaults, 'checkpoint': None}, sys.argv[1:])
globals().update(config)

within(1, None, config, 'eval_interval', 'eval_iters', 'save_interval', 'log_interval', 'patience')
within(1, None, config, 'batch_size', 'gradient_accumulation_steps')
within(1, None, config, 'block_size', 'short_block_size')
within(0, None, config, 'max_iters', 'epochs', 'short_iters', 'warmup_iters', 'lr_decay_iters')
within(0, None, config, 'learning_rate', 'muon_lr', 'min_lr', 'weight_decay', 'grad_clip')
within(1, None, config, 'lora_rank', 'lora_alpha')
within(0, None, config, 'freeze')
within(0, None, config, 'sample_tokens', 'eval_sample_tokens', 'peak_tflops')
within(0, 2**63 - 1, config, 'seed')
within(1, None, config, 'hang_timeout')
within(0, 1, config, 'cooldown')
within(1e-9, None, config, 'dpo_beta')
within(0, 0.9999999, config, 'lora_dropout', 'beta1', 'beta2', 'muon_momentum')
one_of(('adamw', 'muon'), config, 'optimizer')
one_of(('cosine', 'linear', 'constant'), config, 'lr_schedule')
one_of((True, False, 'auto'), config, 'compile')
one_of(('lm', 'sft', 'dpo'), config, 'objective')

runtime = start(device, dtype, backend, hang_timeout, config, offload)
watch = Watch(runtime, hang_timeout)
check_shard(runtime, shard, offload)
if checkpoint_mirror:
    check_mirror(checkpoint_mirror, out_dir)
on_out_of_memory(runtime.device, lambda: f'a smaller model, such as --n_embd={n_embd // 2}')
if check or plan:
    watch.at(0, 'the check')
    status = preflight(config, runtime, resuming)
    watch.close()
    runtime.leave(status)


def say(text: str) -> None:
    """Print, once for all processes, above the progress line if there is one."""
    if runtime.main:
        with suppress(OSError):  # a closed pipe or terminal must not end the training
            tqdm.write(text)
            sys.stdout.flush()  # a pipe or a log file gets it now, too


# -----------------------------------------------------------------------------
# where to start: nothing here changes a run, so that a mistake costs nothing

out_dir = Path(out_dir or runtime.agree(run_directory.new_name))
config['out_dir'] = str(out_dir)
resume_from, lock = find_start(config, runtime, resuming)

torch.manual_seed(seed)
state = {'step': 0, 'samples': 0, 'evaluated_step': None, 'best_val_loss': None}
state |= {'stale': 0, 'skipped': 0}  # evaluations without a new best, updates left out: in a row
state |= {'usual_norm': 0.0, 'norms': 0}  # of the gradient; how many of them that is the mean of
state |= {'since_log': {'spikes': 0, 'skipped': 0}}  # steps since a line was logged
state |= {'run': runtime.agree(lambda: secrets.token_hex(8))}  # whose checkpoints these are
state |= {'seconds': 0.0}  # since the start, with compilation and evaluation; summed over starts
raw_model, tokenizer, known = find_model(config, resume_from)
state |= known
if raw_model and (kept := keep_shape(raw_model, config)):
    say(f'{resume_from or init_from} keeps its own {", ".join(kept)}, whatever the settings say')
init_from, checkpoint, block_size = (config[k] for k in ('init_from', 'checkpoint', 'block_size'))
copying = partial(watch.together, 0, 'the copying of the data')
copying()
data = runtime.wait_for_all(
    lambda: open_data(dataset, block_size, seed, objective, data_cache, copying),
    partial(watch.together, 0, 'the opening of the data'),
)
watch.at(0, 'the set-up')
if rank := runtime.odd_one(data.fingerprint):
    raise UserError(
        f'dataset {dataset} of rank {rank} is not that of rank 0: copy one to the other'
    )
if resume_from and state['data'] != data.fingerprint:
    say(
        f'warning: dataset {dataset} has changed since {resume_from.name} was saved; losses from '
        'before do not compare, and the best may be one of them'
    )
check_batches(config, data)
shape = raw_model.config if raw_model else new_shape(data, config)
for doubt in chain(doubts(shape, config, runtime), slips(config, data)):
    say(f'warning: {doubt}')
raw_model, tokenizer = fit_to_data(raw_model, tokenizer, data, config, say)
raw_model.train()
if not shard:  # a whole one may not fit there
    raw_model.to(runtime.device)

# -----------------------------------------------------------------------------
# batches: the same global batch at every world size, shared out equally

first_step, first_sample = state['step'], state['samples']  # of this process
AHEAD = 8  # micro-batches read before they are needed, so that a disk may be slow now and then
piece = min(short_block_size or 0, block_size)  # a shorter block_size has nothing to cut
global_rows = gradient_accumulation_steps * batch_size  # sequences per update
rank_rows, micro_rows = runtime.share(global_rows, batch_size)
micro_steps = rank_rows // micro_rows
tokens_per_step = round(global_rows * data.window_tokens)
max_iters = steps_of(config, data)
lr_decay_iters = max_iters if epochs is not None or lr_decay_iters is None else lr_decay_iters
rates = '--learning_rate or --muon_lr' if optimizer == 'muon' else '--learning_rate'
on_out_of_memory(
    runtime.device,  # half as many sequences at a time, and the same global batch
    lambda: (
        f'--batch_size={micro_rows // 2} '
        f'--gradient_accumulation_steps={-(-global_rows // (micro_rows // 2))}'
        if micro_rows > 1
        else '--gradient_checkpointing'
        if not gradient_checkpointing
        else f'--block_size={block_size // 2} or a smaller model'
    ),
)


def to_device(*arrays):
    """numpy int64 (B, T) -> tensors on the device, without waiting for the copy."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if runtime.device_type == 'cuda':
        tensors = [tensor.pin_memory() for tensor in tensors]
    return [tensor.to(runtime.device, non_blocking=True) for tensor in tensors]


def get_batch(number: int) -> tuple[dict, float]:
    """Micro-batch `number` of this rank, counted from where this process starts -> x, y (B, T) and
    what else loss_of() takes; by what to divide its loss, so that a step's sum is the step's mean.
    """
    steps, part = divmod(number, micro_steps)
    first = first_sample + steps * global_rows
    mine = first + runtime.rank * rank_rows + part * micro_rows
    batch, divisor = data.batch(mine, micro_rows, mask_documents), micro_steps
    if first_step + steps < short_iters:
        batch = [array.reshape(-1, piece) for array in batch]
    if objective == 'sft':  # of one row more is learned than of another
        here = data.count_targets(mine, micro_rows)
        divisor = data.count_targets(first, global_rows) / (here * runtime.world_size)
    if objective == 'dpo':
        batch = batch if runtime.wants_compile(compile) else trim(*batch)  # compiled for one shape
        batch = [*batch, reference['train'][data.windows(mine, micro_rows)].ravel()]
    return named(to_device(*batch)), float(divisor)


def named(batch: list) -> dict:
    """x, y and what comes with them, by the names that loss_of() has for them."""
    names = ('x', 'y', 'reference' if objective == 'dpo' else 'documents')
    return dict(zip(names, batch, strict=False))


# -----------------------------------------------------------------------------
# optimizer, compilation, processes

say(
    f'model: {config["arch"]}, {raw_model.num_params() / 1e6:,.2f}M parameters, '
    f'{config["n_layer"]} layers of {config["n_embd"]}, {config["n_head"]} heads, '
    f'context {block_size}; {optimizer}\n'
    f'data: {data.name}, {data.tokens["train"]:,} tokens, {tokens_per_step:,} a step\n'
    f'machine: {runtime}'
)

choose_trained(raw_model, config, say)
if objective == 'dpo' and not resume_from:
    state['reference'] = runtime.agree(lambda: fingerprint(raw_model, runtime.dtype_name))

# raw_model is evaluated, sampled from and saved; model is the same weights, ready for training
model, compiled = raw_model, False
began = time.perf_counter() - state['seconds']
if shard:
    if runtime.wants_compile(compile) and not eval_only:
        compiled = compile_blocks(raw_model, runtime, say)
    model = parallelize(raw_model, runtime, shard, offload)
# what a model says of preference pairs before training is what it is held to from then on
reference = None
if objective == 'dpo':
    if eval_only and not resume_from:
        raise ConfigError(
            "objective='dpo' with eval_only compares a run with what it began with: give its "
            '--out_dir and --init_from=resume'
        )
    reference_key = f'{state["reference"]} {data.fingerprint}'
    reference = find_reference(out_dir, reference_key, runtime, resume_from is not None)
    if reference is None:
        say('reference: the log-probabilities of all answers, once for the run ...')
        reference = reference_logps(raw_model, data, runtime, to_device, batch_size)
if not eval_only and not shard:
    if runtime.wants_compile(compile):
        batch, _ = get_batch(0)
        # short sequences, if they come first, and whole ones
        widths = sorted({batch['x'].size(1), data.block_size})
        batches = [
            {k: v.reshape(-1, T) if v.dim() == 2 else v for k, v in batch.items()} for T in widths
        ]
        trial = partial(loss_of, beta=dpo_beta)
        model, compiled = runtime.compile(model, batches, say, trial)
    model = parallelize(model, runtime, shard)

settle(raw_model)  # the optimizer is to be given each rank's rows, whatever has been computed
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
if resume_from:
    load_optimizer(resume_from, raw_model, optimizers)
    if scaler.is_enabled() and state['scaler']:
        scaler.load_state_dict(state['scaler'])


@torch.no_grad()
def estimate_loss() -> dict[str, float] | None:
    """Mean loss of each split in nats per token, over fixed windows shared out to all ranks; of
    preference pairs, per pair, and what else measure() has of them. Of a mixture, the loss on each
    part, and their mean by the parts' shares.

    None if a signal asked any rank to stop meanwhile. Draws on no random state that training uses.
    """
    raw_model.eval()
    losses = {}
    splits = ('train', 'val') if eval_train else ('val',)
    for split, (share, part) in product(splits, data.parts):
        most = len(part.eval_windows('val'))  # the training split is never looked at for longer
        count = most if eval_iters is None else math.ceil(share * eval_iters * batch_size)
        windows = part.eval_windows(split, count)
        names = [f'{split}_{name}' for name in MEASURED[objective]]
        total = torch.zeros(len(names) + 1, dtype=runtime.wide, device=runtime.device)
        starts = range(0, len(windows), runtime.world_size * batch_size)
        for i in tqdm(starts, f'evaluating {split}', leave=False, disable=not runtime.live):
            mine = windows[i + runtime.rank * batch_size :][:batch_size]
            # of a sharded model every rank has to compute, also where none is left for it
            some = mine if len(mine) else windows[:1]
            batch = part.eval_batch(split, some, mask_documents)
            if objective == 'dpo':
                batch = [*trim(*batch), reference[split][some // data.stride].ravel()]
            with runtime.autocast():
                means, weight = measure(raw_model, **named(to_device(*batch)), beta=dpo_beta)
            if len(mine):
                total += torch.stack([mean * weight for mean in means] + [weight])
            if stop.signal and not shard:
                break
        # of targets, or of pairs
        *sums, weight, asked = runtime.reduce([*total.tolist(), stop.signal])
        if asked:
            stop.share()
            raw_model.train()
            return None
        for name, each in zip(names, sums, strict=True):
            losses[name] = losses.get(name, 0.0) + share * each / weight
        if part is not data:
            losses[f'{split}_loss_on_{part.name}'] = sums[0] / weight
    raw_model.train()
    if text_bytes := data.text_bytes('val'):  # bits per byte compare across tokenizers
        tokens_per_byte = data.tokens['val'] / text_bytes
        losses['val_bpb'] = losses['val_loss'] / math.log(2) * tokens_per_byte
    return losses


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


def is_spike(norm: float) -> bool:
    """Whether a gradient is over three times as large as usual, the mean of some 100 before it."""
    usual, count = state['usual_norm'], state['norms']
    if not math.isfinite(norm):
        return False
    state['norms'] = min(count + 1, 100)
    state['usual_norm'] += (norm - usual) / state['norms']
    return count >= 20 and norm > 3 * usual


def is_finished() -> bool:
    """Whether the last step, or the last evaluation that patience allows, is done and measured."""
    last = step >= max_iters or (patience is not None and state['stale'] >= patience)
    return last and state['evaluated_step'] == step


def save_checkpoint() -> None:
    """Save the run as it stands now; what goes wrong is the saver's news."""
    now = {'step': step, 'samples': samples, 'scaler': scaler.state_dict()}
    now['config'] = {**config, 'overwrite': False}  # a restart is to keep what this one made
    now |= {'data': data.fingerprint, 'seconds': time.perf_counter() - began}
    now['evaluated'] = state['evaluated_step'] == step
    saver.save(raw_model, optimizers, tokenizer, {**state, **now})


def show_sample(tokens: int) -> None:
    """Print and log what the model writes now."""
    if not tokens or tokenizer is None or (shard and not listed(out_dir)):
        return
    # begin as a document begins, or as the validation split does
    x, y = data.parts[0][1].eval_batch('val', [0])
    prompt = x[0, :1] if tokenizer.eot is None else [tokenizer.eot]
    if data.rows:  # or as a conversation does, up to where the assistant answers
        prompt = x[0, : int((y[0] >= 0).argmax()) + 1]
    writer = raw_model
    if shard:  # rank 0 has but its rows; what it has just saved is whole
        saver.wait()
        try:
            writer = load_model(out_dir, 'last', runtime.device)[0]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            say('no sample: the whole model does not fit here beside its rows')
            return
    text = write_page(writer.eval(), tokenizer, prompt, tokens, seed, answer=bool(data.rows))
    raw_model.train()
    tracker.log_text(step, text)
    rule = '-' * 64
    say(f'what it {"answers" if data.rows else "writes"}:\n{rule}\n{text}\n{rule}')


def report_end() -> None:
    """What the run reached, where it lies, and a page of what the model learned to write."""
    bpb = f', {state["val_bpb"]:.4f} bits per byte' if 'val_bpb' in state else ''
    best = f'; best {state["best_val_loss"]:.4f}' if state['stale'] else ''
    spent = f'{tqdm.format_interval(state["seconds"])} after the start'
    unit = 'per pair' if objective == 'dpo' else 'nats per token'
    say(f'validation loss {state["val_loss"]:.4f} {unit}{bpb}{best}, {spent}')
    if peak:
        each = ' in each process' if runtime.world_size > 1 else ''
        say(f'peak memory {peak / 1e6:,.0f} MB{each}')
    show_sample(sample_tokens)
    if not listed(out_dir):
        say(f'no step was trained, so there is no checkpoint in {out_dir}')
    for path in listed(out_dir)[-1:]:
        say(f'checkpoint: {path}')
        say(f'more: python sample.py --out_dir={shlex.quote(str(out_dir))}')


# -----------------------------------------------------------------------------
# the loop

stop = StopSignal(runtime)  # from here on a signal finishes the step, saves and leaves
if eval_only:
    if losses := estimate_loss():
        beside = f' (published: {published})' if published else ''
        say(', '.join(f'{name} {value:.4f}' for name, value in losses.items()) + beside)
    runtime.leave(stop.status)

step, samples = first_step, first_sample
if resume_from and is_finished():
    longer = '--epochs' if epochs else '--max_iters' if step >= max_iters else '--patience'
    longer += ' (and --lr_decay_iters)' if config['lr_decay_iters'] is not None and decay_lr else ''
    if runtime.main:  # a run that was killed on its last way out
        if checkpoint_mirror:
            catch_up(resume_from, checkpoint_mirror)
        if not (out_dir / 'DONE').exists():
            (out_dir / 'DONE').touch()
    say(f'{out_dir} is finished: {step} of {max_iters} steps; a larger {longer} goes on')
    runtime.leave()


def open_folder() -> None:
    """Take the folder for this run. From here on it changes, so whatever can fail comes first."""
    global lock, tracker
    if checkpoint_mirror:
        probe_mirror(checkpoint_mirror)
    lock = run_directory.lock(out_dir)
    tracker = Tracker(out_dir, config, step if resume_from else -1)
    run_directory.begin(out_dir, first_step if resume_from else -1, overwrite)
    if checkpoint_mirror:
        begin_mirror(checkpoint_mirror, first_step if resume_from else -1)
    if reference:
        write_reference(out_dir / REFERENCE, reference_key, reference)
    here = {'device': runtime.device, 'dtype': runtime.dtype_name}
    run_directory.write_config(out_dir, {**config, 'overwrite': False}, here)


runtime.agree(open_folder)
if shard:  # each writes its part of a checkpoint there
    if rank := runtime.odd_one((out_dir / 'config.py').exists()):
        raise UserError(
            f'{out_dir} of rank 0 is not there for rank {rank}: shard=True needs an '
            '--out_dir that all machines see'
        )
mirror = None
if checkpoint_mirror:
    mirror = Mirror(Path(checkpoint_mirror), always_save_checkpoint, state['run'])
saver = Saver(out_dir, runtime, shard, always_save_checkpoint, mirror)
progress = Progress(runtime.live, step, max_iters)
peak_flops = peak_tflops * 1e12 if peak_tflops else runtime.peak_flops()
batches = ThreadPoolExecutor(1)  # reads the next batches while this one is computed
upcoming, number = deque(batches.submit(get_batch, i) for i in range(AHEAD)), 0
stopping = False

while True:
    # evaluate before the update, so that step 0 shows the untrained model
    losses = None
    to_evaluate = step >= max_iters or (eval_interval and step % eval_interval == 0)
    if to_evaluate and state['evaluated_step'] != step and not stopping:
        watch.at(step, 'the evaluation')
        losses = estimate_loss()
        stopping = losses is None
    if losses:
        state |= {'train_loss': None, **losses, 'evaluated_step': step, 'stale': state['stale'] + 1}
        best = math.inf if state['best_val_loss'] is None else state['best_val_loss']
        if losses['val_loss'] < best:
            state |= {'best_val_loss': losses['val_loss'], 'stale': 0}
        shown = [f'{k[:-5]} loss {v:.4f}' for k, v in losses.items() if k.endswith('_loss')]
        shown += [f'on {k[12:]} {v:.4f}' for k, v in losses.items() if k[:12] == 'val_loss_on_']
        shown += [
            f'{k[4:].replace("_", " ")} {losses[k]:.4f}' for k in losses if k[:7] == 'val_rew'
        ]
        say(f'step {step}: {", ".join(shown)}')
        if runtime.main:
            measured = {**losses, 'peak_memory': runtime.peak_memory()}  # in bytes
            tracker.log(step, **measured, seconds=time.perf_counter() - began)
    finished = is_finished()
    stopping = stopping or (runtime.world_size == 1 and stop.signal > 0)

    # save where there is something new: at the end, after an evaluation, every save_interval steps;
    # but no weights whose loss is not finite, for a resumed run could only go on with more of it
    to_save = losses or finished or stopping or (save_interval and step % save_interval == 0)
    new = step > first_step or (losses and step > 0)
    sound = math.isfinite(losses['val_loss']) if losses else not state['skipped']
    if not sound and stopping and not losses:  # the update left out has changed nothing
        sound = are_finite(raw_model, runtime)
    if (runtime.main or shard) and to_save and new and sound:
        watch.at(step, 'the saving')
        save_checkpoint()
    for problem in saver.news():
        say(f'warning: {problem}; training goes on')
    if finished or stopping:
        break
    if runtime.main and losses and sound:
        watch.at(step, 'the sample')
        show_sample(eval_sample_tokens)

    # one update: the gradient of the mean loss over all micro-batches and all ranks
    started = time.perf_counter()
    runtime.seed(seed, step)
    lr = get_lr(step)
    for each in optimizers:
        for group in each.param_groups:
            group['lr'] = lr * group['lr_ratio']
    mean_loss = data_wait = 0.0
    for micro_step in range(micro_steps):
        watch.at(step, 'the data')
        asked = time.perf_counter()
        batch, divisor = upcoming.popleft().result()
        data_wait += time.perf_counter() - asked
        number += 1
        upcoming.append(batches.submit(get_batch, number + AHEAD - 1))
        watch.at(step, 'the gradients')
        if runtime.world_size > 1:  # the ranks exchange them once, with the last micro-batch
            sync_gradients(model, last=micro_step == micro_steps - 1)
        with runtime.autocast():
            loss = loss_of(model, **batch, beta=dpo_beta) / divisor
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    for each in optimizers:
        scaler.unscale_(each)
    watch.at(step, 'the update')
    norm = whole(torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf))
    mean_loss, norm = torch.stack([mean_loss, norm.to(mean_loss)]).tolist()

    # an update that is not finite is left out, by all ranks or none; in float16 the scale may just
    # have been too large, which the scaler notices and mends by itself
    overflow = scaler.is_enabled() and scaler.get_scale() > 1 and math.isfinite(mean_loss)
    finite = math.isfinite(mean_loss + norm)
    bad = not (finite or overflow)
    bad, stopping = (flag > 0 for flag in runtime.reduce([bad, stop.signal], 'MAX'))
    if stopping:
        stop.share()
    if finite and not bad:
        for each in optimizers:
            each.step()
    scaler.update()
    raw_model.zero_grad(set_to_none=True)
    step, samples = step + 1, samples + global_rows
    state['skipped'] = state['skipped'] + 1 if bad else 0
    state['since_log']['skipped'] += bad
    state['since_log']['spikes'] += is_spike(norm)
    progress.advance(time.perf_counter() - started)

    if bad:
        say(f'step {step}: loss {mean_loss} with gradient norm {norm}, update skipped')
    if state['skipped'] == 3:
        raise UserError(
            f'the loss or its gradient was not finite three steps in a row, up to step {step}: '
            f'lower {rates} or --grad_clip'
            + (f'; {out_dir} keeps its last good checkpoint' if listed(out_dir) else '')
        )
    if step % log_interval == 0:
        (mean_loss,) = runtime.reduce([mean_loss / runtime.world_size])
        speed = progress.steps_per_second() * tokens_per_step
        mfu = peak_flops and speed * raw_model.flops_per_token() / (peak_flops * runtime.world_size)
        status = f'loss {mean_loss:.4f}, {speed:,.0f} tokens/s{f", MFU {mfu:.1%}" if mfu else ""}'
        if line := progress.status(status):
            say(line)
        if runtime.main:
            measured = {'lr': lr, 'grad_norm': norm, 'tokens_per_s': speed, 'mfu': mfu}
            measured |= {'data_wait': data_wait, **saver.times(), **state['since_log']}
            tracker.log(step, loss=mean_loss, **measured, seconds=time.perf_counter() - began)
        state['since_log'] = dict.fromkeys(state['since_log'], 0)

# -----------------------------------------------------------------------------
# the end: what was reached, where it lies, and how to go on

state['seconds'] = time.perf_counter() - began
peak = runtime.peak_memory()  # before the picture and the sample
progress.close()
watch.close()  # a mirror may be slow
saver.finish()
for problem in saver.news():
    say(f'warning: {problem}')
batches.shutdown(cancel_futures=True)
if runtime.main:
    with closing(tracker):
        if saver.failure:
            again = 'continue with --init_from=resume' if listed(out_dir) else 'start again'
            raise UserError(f'{saver.failure}; make room and {again}')
        if finished and not math.isfinite(state['val_loss']):
            raise UserError(
                f'the validation loss is {state["val_loss"]} at step {step}, and those weights are '
                f'not saved: lower {rates}'
            )
        if finished:
            (out_dir / 'DONE').touch()
        stop.release()
        with suppress(OSError):  # a full disk
            say(f'loss curve: {draw_loss(out_dir)}')
        if finished:
            report_end()
        elif paths := listed(out_dir):
            config_file = shlex.quote(str(out_dir / 'config.py'))
            command = f'{runtime.launcher} train.py {config_file} --init_from=resume'
            kept = 'is saved' if step_of(paths[-1]) == step else 'is the last that is sound'
            say(f'stopped at step {step}; {paths[-1].name} {kept}, continue with: {command}')
        else:
            say(f'stopped at step {step}, with nothing to save yet; the same command starts again')
runtime.leave(0 if finished else stop.status)
