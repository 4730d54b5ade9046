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
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import folder
from checkpoint import (
    find,
    listed,
    load,
    load_model,
    load_optimizer,
    newest_run,
    save,
)
from configurator import ConfigError, UserError, configure
from data.dataset import open_dataset
from model import GPT, GPTConfig
from runtime import start
from sample import Sampling, generate
from track import Tracker, draw_loss

# -----------------------------------------------------------------------------
# the run
out_dir: str | None = None  # folder of the run; None makes a fresh one, out/<name>
init_from = 'scratch'  # 'scratch', 'resume', the folder of another run, or gpt2 and its sizes
checkpoint: str | None = None  # 'last', 'best' or a path; None: to resume the last, else the best
auto_resume = False  # resume if out_dir has a checkpoint, otherwise start from init_from
overwrite = False  # let a new run delete the checkpoints that its folder has
seed = 1337  # of the initial weights, the data order and dropout
# evaluation and saving
eval_interval = 2000  # steps between evaluations; each also saves a checkpoint
eval_iters: int | None = 200  # batches per evaluation and split; None: the whole validation split
eval_only = False  # evaluate once, print, write nothing
save_interval: int | None = None  # steps between checkpoints besides those of the evaluations
always_save_checkpoint = True  # keep every evaluation's checkpoint, not just the last two and best
patience: int | None = None  # stop after so many evaluations without a new best; None: never
log_interval = 1  # steps between lines in metrics.jsonl
sample_tokens = 256  # length of the text to print at the end; 0: none
# trackers
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
tensorboard_log = False  # to tb/ in the run's folder
# data
dataset = 'openwebtext'  # a folder in data/, or the path of one
gradient_accumulation_steps = 5 * 8  # with batch_size, the sequences per update over all processes
batch_size = 12  # sequences that one process computes at a time
block_size = 1024  # tokens per sequence
# model; the defaults are GPT-2 124M
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining; 0.1 and more for fine-tuning and small data
bias = False  # in Linear and LayerNorm
# AdamW
learning_rate = 6e-4  # at its highest
max_iters = 600000  # updates in all
epochs: float | None = None  # passes over the training split; sets max_iters and lr_decay_iters
weight_decay = 1e-1  # of matrices and embeddings
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0.0 does not clip
# learning rate
decay_lr = True  # False keeps it constant
lr_schedule = 'cosine'  # or 'linear': constant, then straight down over the last part
warmup_iters = 2000  # steps of linear rise at the start
lr_decay_iters = 600000  # step at which min_lr is reached
min_lr = 6e-5
cooldown = 0.4  # part of lr_decay_iters over which 'linear' comes down
# machine
device = 'auto'  # 'auto', 'cpu', 'mps', 'cuda' or 'cuda:1'
dtype = 'auto'  # 'auto', 'float32', 'bfloat16' or 'float16'
compile: bool | str = 'auto'  # 'auto' compiles on a CUDA GPU, where it pays
backend = 'auto'  # of torch.distributed: 'auto', 'nccl' or 'gloo'
peak_tflops: float | None = None  # of one device, for the MFU; None looks it up, or shows no MFU
# -----------------------------------------------------------------------------
COUNTS = ('eval_interval', 'eval_iters', 'save_interval', 'patience', 'log_interval')
COUNTS += ('batch_size', 'gradient_accumulation_steps', 'block_size')
AMOUNTS = ('seed', 'max_iters', 'learning_rate', 'min_lr', 'weight_decay', 'grad_clip')
AMOUNTS += ('warmup_iters', 'sample_tokens')
RULE = '-' * 64  # above and below the sample
BAR = 'step {n}/{total} |{bar:24}| {desc}, ETA {remaining}'
config = configure(globals(), sys.argv[1:])
if config['auto_resume'] and not config['out_dir']:
    raise ConfigError('auto_resume=True needs --out_dir, the same at every start')
resuming = config['init_from'] == 'resume' or config['auto_resume']
if resuming:  # the run's own settings come first, this command's after them
    run = Path(config['out_dir'] or newest_run())
    own = [str(path) for path in [run / 'config.py'] if path.exists()]
    config = configure(globals(), [*own, *sys.argv[1:], f'--out_dir={run}'])
globals().update(config)

for name, good, need in (
    *((n, config[n] is None or config[n] >= 1, 'at least 1') for n in COUNTS),
    *((n, config[n] >= 0, 'at least 0') for n in AMOUNTS),
    *((n, 0 <= config[n] < 1, 'at least 0 and below 1') for n in ('beta1', 'beta2')),
    ('epochs', epochs is None or epochs > 0, 'above 0'),
    ('cooldown', 0 <= cooldown <= 1, 'between 0 and 1'),
    ('lr_schedule', lr_schedule in ('cosine', 'linear'), 'cosine or linear'),
    ('compile', compile in (True, False, 'auto'), 'auto, True or False'),
):
    if not good:
        raise ConfigError(f'{name}={config[name]!r}: must be {need}')

runtime = start(device, dtype, backend)


def say(text: str) -> None:
    """Print a line, once for all processes, above the progress line if there is one."""
    if runtime.main:
        tqdm.write(text)
        sys.stdout.flush()  # a pipe or a log file gets it now, too


def on_crash(kind, error, trace) -> None:
    """Out of memory is a matter of settings: say which to lower, and by how much."""
    if kind in (MemoryError, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        text = f'out of memory on {runtime.device}'
        cure = f'--n_embd={n_embd // 2} or a smaller --n_layer'
        if 'micro_steps' in globals():  # the model itself found its place
            text += f' with {micro_rows} sequences of {block_size} tokens at a time'
            cure = f'--block_size={block_size // 2} or a smaller model'
            if micro_rows > 1:  # the same global batch in twice as many parts
                parts = -(-global_rows // (micro_rows // 2))
                cure = f'--batch_size={micro_rows // 2} --gradient_accumulation_steps={parts}'
        kind, error = UserError, UserError(f'{text}; lower it: {cure}')
    one_line_hook(kind, error, trace)


one_line_hook, sys.excepthook = sys.excepthook, on_crash

# -----------------------------------------------------------------------------
# the run's folder: one run at a time, and nothing deleted unasked

out_dir = Path(out_dir or runtime.agree(folder.new_name))
config['out_dir'] = str(out_dir)


def find_checkpoint() -> Path | None:
    """The checkpoint to resume from; None with auto_resume where there is none."""
    global lock
    if init_from == 'resume' and (eval_only or not listed(out_dir)):
        return find(out_dir, checkpoint or 'last')  # touches nothing, raises where there is none
    lock = folder.lock(out_dir)
    which = checkpoint if init_from == 'resume' else None  # else it is one of init_from's
    return folder.resume_point(out_dir, which or 'last', or_start=init_from != 'resume')


def claim_folder() -> None:
    global lock
    lock = folder.lock(out_dir)
    folder.clear(out_dir, overwrite)


resume_from = runtime.agree(find_checkpoint) if resuming else None

# -----------------------------------------------------------------------------
# model and data: a model from elsewhere brings its shape and its tokenizer

SHAPE = ('block_size', 'n_layer', 'n_head', 'n_embd', 'bias')
torch.manual_seed(seed)
state = {'step': 0, 'best_val_loss': None, 'evaluated_step': None, 'stale': 0, 'skipped': 0}
raw_model = None
if resume_from:
    raw_model, tokenizer, state = load(resume_from, dropout)
    config |= {'init_from': state['config']['init_from'], 'checkpoint': None}  # how the run began
    for name in SHAPE:
        if config[name] != getattr(raw_model.config, name):
            raise ConfigError(
                f'{name}={config[name]}: {resume_from} was trained with {name}='
                f'{getattr(raw_model.config, name)}, and a resumed run keeps its shape'
            )
elif init_from != 'scratch':
    if checkpoint:  # of that run; in this run's config.py it would be taken for one of its own
        init_from, checkpoint = str(find(init_from, checkpoint)), None
    raw_model, tokenizer, _ = load_model(init_from, dropout=dropout)
    if block_size < raw_model.config.block_size:
        raw_model.crop_block_size(block_size)
    config |= {'init_from': init_from, 'checkpoint': checkpoint}
    config |= {name: getattr(raw_model.config, name) for name in SHAPE}
    block_size = raw_model.config.block_size

data = open_dataset(dataset, block_size, seed)
if raw_model is None:
    try:
        tokenizer = data.tokenizer
    except UserError as error:  # nanoGPT's folders do not bring GPT-2's vocabulary with them
        say(f'warning: {error}; until then, the checkpoints have no tokenizer')
        tokenizer = None
    # rounded up where it is large, which makes for compiled matrix products
    vocab_size = -(-data.vocab_size // 64) * 64 if data.vocab_size > 1024 else data.vocab_size
    shape = {name: config[name] for name in SHAPE}
    raw_model = GPT(GPTConfig(vocab_size=vocab_size, dropout=dropout, **shape))
elif tokenizer is not None and tokenizer != data.tokenizer:
    raise UserError(
        f'dataset {dataset} was made with the {data.tokenizer.name} tokenizer, and '
        f'{resume_from or init_from} with another ({tokenizer.name}): prepare the text with that'
    )
raw_model.train().to(runtime.device)

# -----------------------------------------------------------------------------
# batches: the same global batch at every world size, this rank's share of it in equal parts

global_rows = gradient_accumulation_steps * batch_size
if global_rows % runtime.world_size:
    near = global_rows // runtime.world_size * runtime.world_size
    raise ConfigError(
        f'gradient_accumulation_steps={gradient_accumulation_steps} times batch_size={batch_size} '
        f'is {global_rows} sequences, which {runtime.world_size} processes cannot share equally; '
        f'make it {near or runtime.world_size} or {near + runtime.world_size}'
    )
rank_rows = global_rows // runtime.world_size
micro_rows = next(n for n in range(min(batch_size, rank_rows), 0, -1) if rank_rows % n == 0)
micro_steps = rank_rows // micro_rows
tokens_per_step = global_rows * block_size
if epochs is not None:
    max_iters = lr_decay_iters = math.ceil(epochs * data.n_windows / global_rows)
if not resuming and not eval_only:  # late, when nothing can be wrong with the settings any more
    runtime.agree(claim_folder)


def to_device(*arrays):
    """numpy int64 (B, T) -> tensors on the device, without waiting for the copy."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if runtime.device_type == 'cuda':
        tensors = [tensor.pin_memory() for tensor in tensors]
    return [tensor.to(runtime.device, non_blocking=True) for tensor in tensors]


def get_batch(number: int):
    """Micro-batch `number` of this rank, counted from the start of training -> x, y (B, T)."""
    step, part = divmod(number, micro_steps)
    first = step * global_rows + runtime.rank * rank_rows + part * micro_rows
    return to_device(*data.batch(first, micro_rows))


# -----------------------------------------------------------------------------
# optimizer, compilation, processes

optimizer = torch.optim.AdamW(
    raw_model.param_groups(weight_decay),
    lr=learning_rate,
    betas=(beta1, beta2),
    fused=runtime.device_type in ('cuda', 'cpu', 'mps'),  # one kernel for all parameters
)
# float16 alone needs its loss scaled: bfloat16 has the range of float32
scaler = torch.amp.GradScaler(runtime.device_type, enabled=runtime.dtype == torch.float16)
if resume_from:
    load_optimizer(resume_from, raw_model, optimizer)
    scaler.load_state_dict(state['scaler'])


def compile_or_not(model):
    """The compiled model, tried on one batch, or the model as it is where compiling fails."""
    say('compiling the model, about a minute ...')
    try:
        compiled = torch.compile(model)
        with runtime.autocast():
            compiled(*get_batch(0))[1].backward()
        return compiled
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:100] if str(error) else ''
        say(f'training without torch.compile, which failed: {type(error).__name__}: {reason}')
        return model
    finally:
        model.zero_grad(set_to_none=True)


shape, number_format = raw_model.config, str(runtime.dtype).removeprefix('torch.')
parameters = f'{raw_model.num_params() / 1e6:,.2f}M parameters'
ranks = f', {runtime.world_size} processes' if runtime.world_size > 1 else ''
say(
    f'model: {parameters}, {shape.n_layer} layers of {shape.n_embd}, {shape.n_head} heads, '
    f'context {block_size}\n'
    f'data: {data.folder.name}, {data.tokens["train"]:,} tokens, {tokens_per_step:,} a step\n'
    f'machine: {runtime.device}, {number_format}{ranks}'
)

# raw_model is evaluated, sampled from and saved; model is the same weights, wrapped for training
model = raw_model
if not eval_only:
    if compile is True or (compile == 'auto' and runtime.device_type == 'cuda'):
        model = compile_or_not(model)
    if runtime.world_size > 1:
        gpu = [runtime.device] if runtime.device_type == 'cuda' else None
        model = DistributedDataParallel(model, device_ids=gpu)


@torch.no_grad()
def estimate_loss() -> dict[str, float] | None:
    """Mean loss of each split in nats per token, over fixed windows shared out to all ranks.

    None if a signal asked to stop meanwhile. Draws on no random state that training uses.
    """
    raw_model.eval()
    losses = {}
    # of the training split, no more than the validation split has
    count = eval_iters * batch_size if eval_iters else len(data.eval_windows('val'))
    for split in ('train', 'val'):
        windows = data.eval_windows(split, count)
        starts = range(runtime.rank * batch_size, len(windows), runtime.world_size * batch_size)
        total = torch.zeros(2, dtype=runtime.wide, device=runtime.device)  # losses' sum, targets
        for i in tqdm(starts, f'evaluating {split}', leave=False, disable=not live):
            x, y = to_device(*data.eval_batch(split, windows[i : i + batch_size]))
            with runtime.autocast():
                loss = raw_model(x, y)[1]
            targets = (y >= 0).sum()
            total += torch.stack([loss * targets, targets])
            if stop_signal and runtime.world_size == 1:
                break
        nats, targets = runtime.reduce(total.tolist())
        losses[f'{split}_loss'] = nats / targets
    raw_model.train()
    if stop_signal and runtime.world_size == 1:
        return None
    if data.bytes['val']:  # bits per byte of text, which compare across tokenizers
        tokens_per_byte = data.tokens['val'] / data.bytes['val']
        losses['val_bpb'] = losses['val_loss'] / math.log(2) * tokens_per_byte
    return losses


def get_lr(step: int) -> float:
    """Learning rate of an update: linear warm-up, then cosine, or constant and a linear end."""
    if not decay_lr:
        return learning_rate
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if step >= lr_decay_iters:
        return min_lr
    if lr_schedule == 'linear':
        part = min(1.0, (lr_decay_iters - step) / max(1.0, cooldown * lr_decay_iters))
    else:
        ratio = (step - warmup_iters) / (lr_decay_iters - warmup_iters)  # 0 to 1
        part = 0.5 * (1.0 + math.cos(math.pi * ratio))  # 1 to 0
    return min_lr + part * (learning_rate - min_lr)


def is_finished() -> bool:
    """Whether the last step, or the last evaluation that patience allows, is done and measured."""
    last = step >= max_iters or (patience is not None and state['stale'] >= patience)
    return last and state['evaluated_step'] == step


def save_checkpoint() -> str | None:
    """Save the run as it stands now -> None, or why the disk did not take it."""
    now = {
        'step': step,
        'evaluated': step == state['evaluated_step'],
        'scaler': scaler.state_dict(),
        'tokens': step * tokens_per_step,
        'config': config,
    }
    try:
        save(out_dir, raw_model, optimizer, tokenizer, {**state, **now}, always_save_checkpoint)
    except OSError as error:
        return f'checkpoint of step {step} not written: {error}; the ones before are untouched'


def report_end() -> None:
    """What the run reached, where it lies, and a page of what the model learned to write."""
    text = f'validation loss {state["val_loss"]:.4f} nats per token'
    if 'val_bpb' in state:
        text += f', {state["val_bpb"]:.4f} bits per byte'
    say(f'{text}; best {state["best_val_loss"]:.4f}')
    if listed(out_dir):
        say(f'checkpoint: {listed(out_dir)[-1]}')
    if sample_tokens > 0 and tokenizer is not None:
        raw_model.eval()
        # begin as a document begins, or as the validation split does
        prompt = data.eval_batch('val', [0])[0][0, :1] if tokenizer.eot is None else [tokenizer.eot]
        pieces = generate(raw_model, tokenizer, [prompt], Sampling(max_new_tokens=sample_tokens))
        say(f'what it writes:\n{RULE}\n{"".join(piece.text for piece in pieces)}\n{RULE}')
    say(f'more: python sample.py --out_dir={out_dir}')


# -----------------------------------------------------------------------------
# signals: finish the step, save, leave

stop_signal = 0


def request_stop(number, frame) -> None:
    """Ask the loop to stop at the next step; a second Ctrl-C leaves at once, saving nothing."""
    global stop_signal
    if stop_signal == number == signal.SIGINT and runtime.world_size == 1:
        raise KeyboardInterrupt
    if not stop_signal and runtime.main:  # print() is not safe inside a signal handler
        os.write(2, b'\nstopping after this step ...\n')
    stop_signal = number


for name in ('SIGINT', 'SIGTERM', 'SIGUSR1'):
    if hasattr(signal, name):  # Windows has no SIGUSR1
        signal.signal(getattr(signal, name), request_stop)

# -----------------------------------------------------------------------------
# the loop

live = runtime.main and sys.stderr.isatty()  # a progress line that moves, or plain lines
if eval_only:
    losses = estimate_loss() or {}
    say(', '.join(f'{name} {value:.4f}' for name, value in losses.items()))
    runtime.leave(128 + stop_signal if stop_signal else 0)

step = first_step = state['step']
if resume_from and is_finished():
    say(f'{out_dir} is finished: {step} of {max_iters} steps; a larger --max_iters goes on')
    runtime.leave()
if runtime.main:
    here = {'device': runtime.device, 'dtype': number_format}
    folder.write_config(out_dir, {**config, 'overwrite': False}, here)
    (out_dir / 'DONE').unlink(missing_ok=True)
    tracker = Tracker(out_dir, config, step if resume_from else -1)
progress = tqdm(total=max_iters, initial=step, disable=not live, bar_format=BAR, desc='...')
peak_flops = peak_tflops * 1e12 if peak_tflops else runtime.peak_flops()
batches = ThreadPoolExecutor(1)  # reads the next batch while this one is computed
upcoming = batches.submit(get_batch, step * micro_steps)
stopping, seconds, done, failure = 0, 0.0, 0, None

while True:
    # evaluate before the update, so that step 0 shows the untrained model
    if (step % eval_interval == 0 or step >= max_iters) and state['evaluated_step'] != step:
        losses = None if stopping else estimate_loss()
        if losses:
            state |= {**losses, 'evaluated_step': step, 'stale': state['stale'] + 1}
            if state['best_val_loss'] is None or losses['val_loss'] < state['best_val_loss']:
                state |= {'best_val_loss': losses['val_loss'], 'stale': 0}
            say(
                f'step {step}: train loss {losses["train_loss"]:.4f}, '
                f'val loss {losses["val_loss"]:.4f}'
            )
            if runtime.main:
                tracker.log(step, **losses)
    finished = is_finished()
    stopping = stopping or (stop_signal if runtime.world_size == 1 else 0)

    # save where there is something new: at the end, after an evaluation, every save_interval steps;
    # but no weights whose loss is not finite, for a resumed run could only go on with more of it
    evaluated = state['evaluated_step'] == step
    due = evaluated or finished or stopping or (save_interval and step % save_interval == 0)
    sound = math.isfinite(state['val_loss']) if evaluated else not state['skipped']
    if runtime.main and step > first_step and due and sound:
        failure = save_checkpoint()
        if failure:
            say(f'warning: {failure}; training goes on')
    if finished or stopping:
        break

    # one update: the gradient of the mean loss over all micro-batches and all ranks
    started = time.perf_counter()
    runtime.seed(seed, step)
    lr = get_lr(step)
    for group in optimizer.param_groups:
        group['lr'] = lr
    mean_loss = 0.0
    for micro in range(micro_steps):
        x, y = upcoming.result()
        upcoming = batches.submit(get_batch, step * micro_steps + micro + 1)
        if runtime.world_size > 1:  # the ranks exchange gradients once, with the last micro-batch
            model.require_backward_grad_sync = micro == micro_steps - 1
        with runtime.autocast():
            loss = model(x, y)[1] / micro_steps
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    mean_loss, norm = torch.stack([mean_loss, norm]).tolist()

    # an update that is not finite is skipped, by all ranks or none; a scaler whose scale is too
    # large leaves it out by itself, and lowers the scale
    bad = not math.isfinite(mean_loss) or not (math.isfinite(norm) or scaler.get_scale() > 1)
    bad, stopping = runtime.reduce([bad, stop_signal], 'MAX')
    if not bad:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    state['skipped'] = state['skipped'] + 1 if bad else 0
    step += 1
    seconds, done = seconds + time.perf_counter() - started, done + 1
    progress.update()

    if bad:
        say(f'step {step}: loss {mean_loss} with gradient norm {norm}, update skipped')
        if state['skipped'] == 3:
            raise UserError(
                f'the loss or its gradient was not finite three steps in a row, up to step {step}: '
                f'lower --learning_rate or --grad_clip; {out_dir} keeps its last good checkpoint'
            )
    if step % log_interval == 0:
        (mean_loss,) = runtime.reduce([mean_loss / runtime.world_size])
        speed = done * tokens_per_step / seconds
        mfu = peak_flops and speed * raw_model.flops_per_token() / (peak_flops * runtime.world_size)
        eta = tqdm.format_interval((max_iters - step) * seconds / done)
        status = f'loss {mean_loss:.4f}, {speed:,.0f} tokens/s'
        status += f', MFU {mfu:.1%}' if mfu else ''
        progress.set_description_str(status, refresh=False)
        if not live:
            say(f'step {step}/{max_iters}: {status}, ETA {eta}')
        if runtime.main:
            measured = {'lr': lr, 'grad_norm': norm, 'tokens_per_s': speed, 'mfu': mfu}
            tracker.log(step, loss=mean_loss, **measured)
        seconds, done = 0.0, 0

# -----------------------------------------------------------------------------
# the end: what was reached, where it lies, and how to go on

progress.close()
batches.shutdown(cancel_futures=True)
for name in ('SIGINT', 'SIGTERM'):  # nothing is left to lose
    signal.signal(getattr(signal, name), signal.SIG_DFL)
if runtime.main:
    tracker.close()
    if failure:
        raise UserError(f'{failure}; make room and continue with --init_from=resume')
    if step > 0:
        say(f'loss curve: {draw_loss(out_dir)}')
    if finished:
        (out_dir / 'DONE').touch()
        report_end()
    else:
        say(
            f'stopped at step {step}; continue with: '
            f'python train.py {out_dir / "config.py"} --init_from=resume'
        )
runtime.leave(0 if finished else 128 + int(stopping))
