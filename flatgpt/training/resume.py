"""
What a run begins with: a model made new, that of a run that goes on, or one from elsewhere.

    resume_from, lock = find_start(config, runtime, resuming)
    model, tokenizer, saved = find_model(config, resume_from)       # None, None, {} to make one
    model, tokenizer = fit_to_data(model, tokenizer, data, config, say)
    choose_trained(model, config)
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from flatgpt import files
from flatgpt.checkpoint.load import MANIFEST, find, listed, load, load_model, step_of
from flatgpt.checkpoint.mirror import catch_up, fetch, restore
from flatgpt.checkpoint.save import prune
from flatgpt.data.dataset import Dataset
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import ConfigError, UserError, as_config_error
from flatgpt.files import sha256
from flatgpt.lora import adapted, add_lora
from flatgpt.runtime import Runtime
from flatgpt.training import run_directory
from flatgpt.training.validate import LORA, NEW, SHAPE, check_new, check_same
from model import GPT, GPTConfig


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
            lock = run_directory.lock(out_dir)
        if config['eval_only'] and not resuming and listed(out_dir):
            raise ConfigError(
                f'eval_only: {out_dir} has a run; --init_from=resume evaluates that, another '
                '--out_dir what init_from names'
            )
        if not resuming:
            if not config['overwrite']:
                run_directory.check_free(out_dir, mirror)
            return None
        if mirror:
            restore(mirror, out_dir)
        path = run_directory.resume_point(out_dir, config)
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
                run_directory.begin(path.parents[1], step_of(path), overwrite=False)
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
        if config['overwrite'] and files.is_same(config['init_from'], config['out_dir']):
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
    with as_config_error():
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
        with as_config_error():
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
