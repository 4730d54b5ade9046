"""
What a run begins with: a model made new, that of a run that goes on, or one from elsewhere.

    resume_from, lock = find_start(config, runtime, resuming)
    model, tokenizer, saved = find_model(config, resume_from)       # None, None, {} to make one
    model, tokenizer = fit_to_data(model, tokenizer, data, config, say)
    choose_trained(model, config)
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

import folder
from checkpoint import MANIFEST, find, listed, load, load_model, prune, sha256, step_of
from configurator import ConfigError, UserError
from data.dataset import Dataset
from data.tokenizer import Tokenizer
from lora import adapted, add_lora
from model import GPT, GPTConfig
from runtime import Runtime
from saver import catch_up, fetch, restore

SHAPE = ('arch', 'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'bias')
LORA = {'lora_rank': None, 'lora_alpha': None, 'lora_dropout': 0.0, 'lora_targets': 'all'}
FIXED = {'optimizer': 'adamw', 'objective': 'lm', **LORA}  # of a run that goes on; older: as here
NEW = ('scratch', 'resume')  # a run that starts anew, 'resume' where auto_resume finds nothing


def find_start(
    config: dict, runtime: Runtime, resuming: bool
) -> tuple[Path | None, FileLock | None]:
    """The verified checkpoint to resume from, the same on every rank; None for a new run.

    A folder that has a run in it is locked from here on, by rank 0. What is missing here comes from
    the mirror; nothing else changes.
    """
    out_dir, mirror = Path(config['out_dir']), config['checkpoint_mirror']
    lock = None

    def find_on_rank_0() -> Path | None:
        nonlocal lock
        if listed(out_dir) and not config['eval_only']:
            lock = folder.lock(out_dir)
        if config['eval_only'] and not resuming and listed(out_dir):
            raise ConfigError(
                f'eval_only: {out_dir} has a run; --init_from=resume evaluates that, another '
                '--out_dir what init_from names'
            )
        if not resuming:
            if not config['overwrite']:
                folder.check_free(out_dir, mirror)
            return None
        if mirror:
            restore(mirror, out_dir)
        path = folder.resume_point(out_dir, config)
        if path and mirror and runtime.world_size > 1 and not config['eval_only']:
            try:
                catch_up(path, mirror)  # a machine with another disk has it from there
            except UserError as error:  # if there is one, it will say so
                print(f'warning: {error}', file=sys.stderr)
        return path

    path = runtime.agree(find_on_rank_0)
    if path and runtime.world_size > 1:
        bring_here(path, config, runtime)
    return path, lock


def bring_here(path: Path, config: dict, runtime: Runtime) -> None:
    """Have rank 0's checkpoint on this machine, too: each rank reads the optimizer's state."""
    mirror, trouble = config['checkpoint_mirror'], ''
    manifest, stamp = runtime.agree(lambda: (sha256(path / MANIFEST), stamp_of(path)))
    if mirror and runtime.first_here and stamp_of(path) != stamp:  # a disk of its own
        try:
            fetch(Path(mirror, *path.parts[-2:]), path.parents[1], manifest)
            if not config['eval_only']:  # nobody else clears up there
                folder.begin(path.parents[1], step_of(path), overwrite=False)
                prune(path.parent, config['always_save_checkpoint'])
        except (OSError, UserError) as error:  # the others wait
            trouble = f' ({error})'
    runtime.reduce([0])  # until the others have theirs
    here = sha256(path / MANIFEST) if (path / MANIFEST).exists() else None
    if rank := runtime.odd_one(here):
        raise UserError(
            f'{path} of rank {rank} is missing on its machine, or not that of rank 0: give an '
            f'--out_dir or a --checkpoint_mirror that all machines see{trouble}'
        )


def stamp_of(path: Path) -> tuple[int, int] | None:
    """What a checkpoint has in common on two machines only if they see the same disk."""
    with suppress(FileNotFoundError):
        status = (path / MANIFEST).stat()
        return status.st_ino, status.st_mtime_ns
    return None


def find_model(config: dict, resume_from: Path | None) -> tuple[GPT | None, Tokenizer | None, dict]:
    """The model that there is already, its tokenizer, and what a resumed run knows of itself.

    Sets in config the model's shape, and how the run began.
    """
    if resume_from:
        model, tokenizer, saved = load(resume_from, config['dropout'])
        check_same(config, saved['config'], model.config, resume_from)
        config['init_from'] = saved['config']['init_from']
    elif config['init_from'] not in NEW:
        if config['overwrite'] and folder.is_same(config['init_from'], config['out_dir']):
            raise ConfigError(
                f'init_from={config["init_from"]!r} is the out_dir, which --overwrite would empty; '
                'give another --out_dir'
            )
        if config['checkpoint']:
            config['init_from'] = str(find(config['init_from'], config['checkpoint']))
        model, tokenizer, _ = load_model(config['init_from'], dropout=config['dropout'])
        saved = {}
        if config['block_size'] < model.config.block_size:
            model.crop_block_size(config['block_size'])
    else:
        check_new(config)
        return None, None, {}
    config['checkpoint'] = None  # of the other run; a resumed one would take it for its own
    return model, tokenizer, saved


def check_new(config: dict) -> None:
    """Refuse what a model that knows nothing cannot be used for."""
    if config['objective'] == 'dpo':
        raise ConfigError("objective='dpo' needs a model that answers: give --init_from")
    if config['freeze'] is not None:
        raise ConfigError(
            f'freeze={config["freeze"]}: would keep random numbers; give --init_from=gpt2, or the '
            'folder of a run'
        )
    if config['lora_rank']:
        raise ConfigError(
            f'lora_rank={config["lora_rank"]}: adapters need a model that knows something; '
            'give --init_from=gpt2, or the folder of a run'
        )


def check_batches(config: dict, data: Dataset) -> None:
    """Refuse what cannot be done with the rows of this dataset."""
    name = config['dataset']
    if config['short_iters'] and data.rows:
        raise ConfigError(
            f'short_iters={config["short_iters"]}: the rows of {name} are not cut; leave it at 0'
        )
    check_pieces(config, config['block_size'])
    if not config['mask_documents']:
        return
    if config['objective'] == 'dpo':
        raise ConfigError(
            'mask_documents=True: a row of a pair is one conversation; leave it False'
        )
    if not data.rows and data.tokenizer.eot is None:
        raise ConfigError(
            f'mask_documents=True: nothing divides the documents of {name}, whose '
            f'{data.tokenizer.name} tokenizer has no end of text; leave it at False'
        )


def steps_of(config: dict, data: Dataset) -> int:
    """Updates of the run in all: as many as its epochs take, where it has them."""
    if config['epochs'] is None:
        return config['max_iters']
    rows = config['gradient_accumulation_steps'] * config['batch_size']
    return math.ceil(config['epochs'] * data.n_windows / rows)


def slips(config: dict, data: Dataset) -> Iterator[str]:
    """What is allowed, and hardly meant."""
    steps, lr, min_lr = steps_of(config, data), config['learning_rate'], config['min_lr']
    if steps > config['max_iters']:
        yield (
            f'epochs={config["epochs"]} are {steps} steps, and that counts, not '
            f'max_iters={config["max_iters"]}; --epochs=None leaves it to that'
        )
    if config['decay_lr'] and config['lr_schedule'] != 'constant' and min_lr > lr:
        yield f'min_lr={min_lr} is above learning_rate={lr}: the rate will rise'
    if config['decay_lr'] and 0 < steps <= (warmup := config['warmup_iters']):
        yield f'warmup_iters={warmup} outlasts the {steps} steps of the run'
    if 0 < steps <= (short := config['short_iters']):
        yield f'short_iters={short} leaves no step of {steps} for whole sequences'


def check_pieces(config: dict, block_size: int) -> None:
    """Refuse short sequences that whole ones cannot be cut into."""
    short, iters = config['short_block_size'], config['short_iters']
    piece = min(short or 0, block_size)  # a shorter block_size has nothing to cut
    if iters and (not piece or block_size % piece):
        fits = math.gcd(short or block_size // 4, block_size)
        raise ConfigError(
            f'short_iters={iters}: short_block_size={short} does not cut block_size={block_size} '
            f'into equal pieces; try --short_block_size={fits}'
        )


def check_same(config: dict, before: dict, shape: GPTConfig, path: Path) -> None:
    """Refuse what a resumed run cannot change."""
    for name in SHAPE if before['init_from'] == 'scratch' else ():
        if config[name] != getattr(shape, name):
            raise ConfigError(
                f'{name}={config[name]}: {path} was trained with {name}={getattr(shape, name)}, '
                'and a resumed run keeps its shape'
            )
    freeze = {'freeze': None} if config['lora_rank'] else {}  # whole blocks may thaw
    for name, default in {**FIXED, **freeze}.items():
        if config[name] != before.get(name, default):
            raise ConfigError(
                f'{name}={config[name]!r}: {path} was trained with {name}='
                f'{before.get(name, default)!r}; for a new run from its weights, give '
                f'--init_from={path.parents[1]} and another --out_dir'
            )


def keep_shape(model: GPT, config: dict) -> list[str]:
    """Set the shape in config to the model's -> the settings that said otherwise."""
    kept = [name for name in SHAPE if config[name] != getattr(model.config, name)]
    config |= {name: getattr(model.config, name) for name in SHAPE}
    return kept


def fit_to_data(
    model: GPT | None, tokenizer: Tokenizer | None, data: Dataset, config: dict, say: Callable
) -> tuple[GPT, Tokenizer | None]:
    """A model for the data: the one there is, if both have the same tokens, or a new one."""
    dataset, where = config['dataset'], config['init_from']
    if where == 'scratch':  # of a run that goes on
        where = config['out_dir']
    if model is None:
        return GPT(new_shape(data, config)), tokenizer_of(data, say)
    if tokenizer is None:  # of a model that came without one
        tokenizer = data.tokenizer
    if tokenizer != data.tokenizer:
        raise UserError(
            f'dataset {dataset} was made with the {data.tokenizer.name} tokenizer, and {where} '
            f'with another ({tokenizer.name}): prepare '
            + (f'it with --tokenizer={where}' if data.rows else 'the text with that')
        )
    if data.vocab_size > model.config.vocab_size:
        raise UserError(
            f'dataset {dataset} has {data.vocab_size} different tokens, and the model of {where} '
            f'only {model.config.vocab_size}'
        )
    if data.tokenizer.chat_template:
        if tokenizer.chat_template not in (None, data.tokenizer.chat_template):
            say(f'warning: the chat template of dataset {dataset} replaces that of {where}')
        tokenizer = data.tokenizer  # the same, with the template that sampling will follow
    return model, tokenizer


def new_shape(data: Dataset, config: dict) -> GPTConfig:
    vocab_size = data.vocab_size
    if vocab_size > 1024:  # rounded up, which makes for faster matrix products
        vocab_size = -(-vocab_size // 64) * 64
    shape = {name: config[name] for name in SHAPE}
    return GPTConfig(vocab_size=vocab_size, dropout=config['dropout'], **shape)


def tokenizer_of(data: Dataset, say: Callable) -> Tokenizer | None:
    try:
        return data.tokenizer
    except UserError as error:  # nanoGPT's folders do not bring GPT-2's vocabulary with them
        say(f'warning: {error}; until then, the checkpoints have no tokenizer')
        return None


def choose_trained(model: GPT, config: dict, say: Callable) -> None:
    """Give the model its adapters, unless it has them, or freeze what is not to be trained."""
    rank, freeze = config['lora_rank'], config['freeze']
    if rank and not adapted(model):
        alpha = config['lora_alpha'] or 2 * rank
        add_lora(model, rank, alpha, config['lora_dropout'], config['lora_targets'], freeze or 0)
    elif freeze is not None and not rank:
        model.freeze_lower(freeze)
    if not rank and any(config[name] != default for name, default in LORA.items()):
        say('warning: lora_alpha, lora_dropout and lora_targets do nothing without lora_rank')
    model.trunk.recompute = config['gradient_checkpointing']
    counts = [p.numel() for p in model.parameters()]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained < sum(counts):
        say(
            f'trained: {trained / 1e6:,.2f}M of {sum(counts) / 1e6:,.2f}M parameters '
            f'({trained / sum(counts):.1%})' + (f', LoRA of rank {rank}' if rank else '')
        )
