"""
What a run starts from: a new model, the checkpoint to resume from, or a pretrained model.

    path, lock = find_resume_checkpoint(config, runtime)    # None for a new run
    model, tokenizer, data = build(config, run)
    set_trainable(model, config, print)
"""

import secrets
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from filelock import FileLock

from flatgpt.checkpoint.load import (
    MANIFEST_FILE,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model,
    newest_run,
    step_of,
)
from flatgpt.checkpoint.mirror import copy_if_missing, fetch_checkpoint, restore_newest
from flatgpt.checkpoint.save import prune
from flatgpt.data.dataset import Dataset
from flatgpt.data.mixture import open_data
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import ConfigError, UserError, as_config_error
from flatgpt.files import is_same_path, sha256
from flatgpt.lora import add_lora, lora_layers
from flatgpt.runtime import Runtime
from flatgpt.training import run_directory
from flatgpt.training.preflight import early_warnings
from flatgpt.training.state import TrainState
from flatgpt.training.validate import (
    SHAPE,
    check_new_model,
    check_unchanged,
    is_resuming,
    lint_settings,
    new_shape,
    padded_vocab_size,
    validate_data,
)
from flatgpt.training.watchdog import Watchdog
from model import GPT, GPTConfig

# init_from of a new model; 'resume' is one if auto_resume finds no checkpoint
NEW_MODEL = ('scratch', 'resume')


def saved_settings(config: dict) -> dict:
    """The settings of the run to resume, which this command overrides; {} for a new run."""
    if not is_resuming(config) or (config['auto_resume'] and not config['out_dir']):
        return {}
    out_dir = config['out_dir'] or str(newest_run())
    saved = run_directory.saved_settings_in(out_dir) or run_directory.saved_settings_in(
        config['checkpoint_mirror']
    )
    if not saved and config['auto_resume']:
        return {}
    return {**saved, 'out_dir': out_dir, 'checkpoint': None}


# -----------------------------------------------------------------------------
# the checkpoint to resume from


def find_resume_checkpoint(config: dict, runtime: Runtime) -> tuple[Path | None, FileLock | None]:
    """The verified checkpoint to resume from, the same on every rank; None for a new run.

    Rank 0 locks a run directory that has checkpoints. Missing checkpoints are copied from the
    mirror; nothing else changes.
    """
    lock = None

    def find_on_rank_0() -> Path | None:
        nonlocal lock
        out_dir = Path(config['out_dir'])
        if list_checkpoints(out_dir) and not config['eval_only']:
            lock = run_directory.lock(out_dir)
        if is_resuming(config):
            return find_or_restore(out_dir, config, runtime)
        reject_existing_run(out_dir, config)
        return None

    path = runtime.broadcast_from_rank0(find_on_rank_0)
    if path and runtime.world_size > 1:
        copy_to_this_machine(path, config, runtime)
    return path, lock


def reject_existing_run(out_dir: Path, config: dict) -> None:
    """Reject a new run in a directory that has one."""
    if config['eval_only'] and list_checkpoints(out_dir):
        raise ConfigError(
            f'eval_only: {out_dir} has a run; to evaluate it, use --init_from=resume; to evaluate '
            'the model of init_from, choose another --out_dir'
        )
    if not config['overwrite']:
        run_directory.reject_used(out_dir, config['checkpoint_mirror'])


def find_or_restore(out_dir: Path, config: dict, runtime: Runtime) -> Path | None:
    """The checkpoint to resume from; a newer one in the mirror is copied here first."""
    mirror = config['checkpoint_mirror']
    if mirror:
        restore_newest(mirror, out_dir)
    path = run_directory.resume_point(out_dir, config)
    if path and mirror and runtime.world_size > 1 and not config['eval_only']:
        try:
            copy_if_missing(path, mirror)  # other machines copy it from there
        except UserError as error:  # a machine that needs it will report an error
            print(f'warning: {error}', file=sys.stderr)
    return path


def copy_to_this_machine(path: Path, config: dict, runtime: Runtime) -> None:
    """Copy rank 0's checkpoint to this machine, since each rank loads the optimizer state."""
    mirror, reason = config['checkpoint_mirror'], ''
    manifest, rank0_file = runtime.broadcast_from_rank0(
        lambda: (sha256(path / MANIFEST_FILE), file_identity(path))
    )
    on_disk_of_rank_0 = file_identity(path) == rank0_file
    if mirror and runtime.is_local_main and not on_disk_of_rank_0:
        try:
            fetch_checkpoint(Path(mirror, *path.parts[-2:]), path.parents[1], manifest)
            if not config['eval_only']:  # only rank 0 does this on its disk
                run_directory.remove_later_steps(path.parents[1], step_of(path), overwrite=False)
                prune(path.parent, config['always_save_checkpoint'])
        except (OSError, UserError) as error:  # the other ranks wait for this one
            reason = f' ({error})'
    runtime.all_reduce([0])  # wait for the other ranks
    here = sha256(path / MANIFEST_FILE) if (path / MANIFEST_FILE).exists() else None
    if rank := runtime.first_mismatch(here):
        raise UserError(
            f'{path} of rank {rank} is missing on its machine or differs from that of rank 0: use '
            f'an --out_dir or a --checkpoint_mirror that all machines share{reason}'
        )


def file_identity(path: Path) -> tuple[int, int] | None:
    """Equal on two machines only if they see the same file on one disk."""
    with suppress(FileNotFoundError):
        status = (path / MANIFEST_FILE).stat()
        return status.st_ino, status.st_mtime_ns
    return None


# -----------------------------------------------------------------------------
# the model and the data


def build(config: dict, run) -> tuple[GPT, Tokenizer | None, Dataset]:
    """The model to train, on its device, its tokenizer and the data. Sets run.state.

    Sets init_from in config to how the run started, and the shape to that of a loaded model.
    """
    runtime, print0 = run.runtime, run.runtime.print0
    model, tokenizer, saved = load_initial_model(config, run.resume_from)
    run.state = TrainState.from_saved(
        saved, run_id=runtime.broadcast_from_rank0(lambda: secrets.token_hex(8))
    )
    run.first_step = run.state.step
    if saved and any(config[k] != saved['config'].get(k) for k in ('max_iters', 'epochs')):
        run.state.events = []  # the new length of the run counts
    if model and (kept := adopt_model_shape(model, config)):
        where = run.resume_from or config['init_from']
        print0(f'using the {", ".join(kept)} of {where}; the settings are ignored')
    data = open_dataset(config, runtime, run.watchdog)
    if run.resume_from and run.state.data != data.fingerprint:
        print0(
            f'warning: dataset {config["dataset"]} has changed since {run.resume_from.name} '
            'was saved; earlier losses, including the best, are not comparable'
        )
    if saved and config['reward'] != saved['config'].get('reward'):
        print0(
            f'warning: reward={config["reward"]!r} is another than that of {run.resume_from.name}; '
            'earlier rewards, including the best, are not comparable'
        )
    run.state.data = data.fingerprint
    validate_data(config, data)
    shape = model.config if model else new_model_config(data, config, runtime)
    for lint in (early_warnings(shape, config, runtime), lint_settings(config, data)):
        with suppress(OSError):  # free space or memory may be unknown
            for warning in lint:
                print0(f'warning: {warning}')
    model, tokenizer = build_model(model, tokenizer, data, config, runtime)
    if not config['shard']:  # the whole model may not fit on one device
        model.to(runtime.device)
    return model.train(), tokenizer, data


def load_initial_model(
    config: dict, resume_from: Path | None
) -> tuple[GPT | None, Tokenizer | None, dict]:
    """The model to start from, if any, its tokenizer, and state.json of a resumed run.

    Sets init_from in config to how the run started. A pretrained model is cropped to block_size.
    """
    if resume_from:
        model, tokenizer, saved = load_checkpoint(resume_from, config['dropout'])
        check_unchanged(config, saved['config'], model.config, resume_from)
        config['init_from'] = saved['config']['init_from']
    elif config['init_from'] not in NEW_MODEL:
        model, tokenizer = load_pretrained(config)
        saved = {}
    else:
        check_new_model(config)
        return None, None, {}
    config['checkpoint'] = None  # it is of the other run: resuming must not use it
    return model, tokenizer, saved


def load_pretrained(config: dict) -> tuple[GPT, Tokenizer | None]:
    where = config['init_from']
    if config['overwrite'] and is_same_path(where, config['out_dir']):
        raise ConfigError(
            f'init_from={where!r} is also the out_dir, and --overwrite would delete it; '
            'choose another --out_dir'
        )
    if config['checkpoint']:
        config['init_from'] = str(find_checkpoint(where, config['checkpoint']))
    to_score = config['objective'] == 'reward'
    model, tokenizer, _ = load_model(
        config['init_from'], dropout=config['dropout'], reward_model=to_score
    )
    if to_score and not model.config.score:
        model.become_reward_model()
    if config['block_size'] < model.config.block_size:
        model.crop_block_size(config['block_size'])
    return model, tokenizer


def adopt_model_shape(model: GPT, config: dict) -> list[str]:
    """Set the shape in config to the model's -> the names of the settings that differed."""
    kept = [name for name in SHAPE if config[name] != getattr(model.config, name)]
    config |= {name: getattr(model.config, name) for name in SHAPE}
    return kept


def open_dataset(config: dict, runtime: Runtime, watchdog: Watchdog) -> Dataset:
    """The dataset, verified to be the same on all ranks; copied to data_cache first, if set."""
    keep_alive = partial(watchdog.keep_alive, 0, 'copying the dataset')
    keep_alive()
    where = config['dataset'], config['block_size'], config['seed'], config['objective']
    data = runtime.wait_for_all(
        lambda: open_data(*where, config['data_cache'], keep_alive),
        partial(watchdog.keep_alive, 0, 'opening the dataset'),
    )
    watchdog.enter_phase(0, 'setting up')
    if rank := runtime.first_mismatch(data.fingerprint):
        raise UserError(
            f'dataset {config["dataset"]} of rank {rank} differs from that of rank 0: copy it from '
            'one machine to the other'
        )
    return data


def build_model(
    model: GPT | None, tokenizer: Tokenizer | None, data: Dataset, config: dict, runtime: Runtime
) -> tuple[GPT, Tokenizer | None]:
    """The given model, if its tokenizer matches the dataset; a new one for None."""
    dataset, where, print0 = config['dataset'], config['init_from'], runtime.print0
    if where == 'scratch':  # a resumed run
        where = config['out_dir']
    if model is None:
        new = GPT(new_model_config(data, config, runtime))
        return new, dataset_tokenizer(data, print0)
    if tokenizer is None:  # the model came without one
        tokenizer = data.tokenizer
    if tokenizer != data.tokenizer:
        option = f'--tokenizer={shlex.quote(str(where))}'
        kind = 'prompts' if config['objective'] == 'rl' else 'chat' if data.is_chat else 'text'
        raise UserError(
            f'dataset {dataset} has the {data.tokenizer.name} tokenizer, and {where} another one '
            f'({tokenizer.name}): prepare the dataset with {option}, for example python '
            f'data/{kind}/prepare.py FILES {option} '
            '--out_dir=FOLDER, and train with --dataset=./FOLDER'
        )
    if data.vocab_size > model.config.vocab_size:
        raise UserError(
            f'dataset {dataset} has a vocabulary of {data.vocab_size} tokens, and the model of '
            f'{where} only {model.config.vocab_size}: prepare it with the tokenizer of the model'
        )
    if data.tokenizer.chat_template:
        if tokenizer.chat_template not in (None, data.tokenizer.chat_template):
            runtime.print0(
                f'warning: the chat template of dataset {dataset} replaces that of {where}'
            )
        tokenizer = data.tokenizer  # the same, with the chat template for sampling
    return model, tokenizer


def new_model_config(data: Dataset, config: dict, runtime: Runtime) -> GPTConfig:
    shape = new_shape(config, runtime)
    shape |= {'vocab_size': padded_vocab_size(data.vocab_size), 'dropout': config['dropout']}
    with as_config_error():
        return GPTConfig(**shape)


def dataset_tokenizer(data: Dataset, print0: Callable) -> Tokenizer | None:
    try:
        return data.tokenizer
    except UserError as error:  # nanoGPT's datasets need GPT-2's vocabulary, which is downloaded
        print0(f'warning: {error}; until then, the checkpoints have no tokenizer')
        return None


def set_trainable(model: GPT, config: dict, print0: Callable) -> None:
    """Add LoRA adapters, unless the model has them, or freeze the blocks not to be trained."""
    rank, freeze = config['lora_rank'], config['freeze']
    if rank and not lora_layers(model):
        alpha = config['lora_alpha'] or 2 * rank
        add_lora(model, rank, alpha, config['lora_dropout'], config['lora_targets'], freeze or 0)
    elif freeze is not None and not rank:
        with as_config_error():
            model.freeze_lower(freeze)
    if model.config.score:  # also beside adapters
        model.score.requires_grad_(True)
    model.trunk.recompute = config['gradient_checkpointing']
    whole = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained < whole:
        print0(
            f'trained: {trained / 1e6:,.2f}M of {whole / 1e6:,.2f}M parameters with all '
            f'embeddings ({trained / whole:.1%})' + (f', LoRA of rank {rank}' if rank else '')
        )
