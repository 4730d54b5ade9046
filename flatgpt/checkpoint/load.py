"""
Find, verify and read checkpoints.

    path = find_checkpoint('out/my_run', 'best')         # or 'last', or the path of one
    model, tokenizer, state = load_checkpoint(path)
    model, tokenizer, state = load_model('out/my_run')   # or 'gpt2', a transformers folder ...
"""

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch

from flatgpt.checkpoint.convert import RELEASED, is_external, load_external
from flatgpt.checkpoint.peft import (
    ADAPTER_CONFIG,
    adapter_layers,
    base_of,
    is_adapter,
    read_adapter,
)
from flatgpt.checkpoint.weights import model_from_tensors, open_weights, read_tensor
from flatgpt.data.hf_tokenizer import find_tokenizer, with_saved_chat_template
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.data.tokenizer import load as load_tokenizer
from flatgpt.errors import CheckpointError, UserError, did_you_mean
from flatgpt.files import is_same_path, sha256
from flatgpt.lora import LoRALinear, merge_lora
from flatgpt.parallel import shard_like
from model import GPT, GPTConfig

MODEL_FILE, OPTIMIZER_FILE = 'model.safetensors', 'optimizer.safetensors'
TOKENIZER_FILE, STATE_FILE = 'tokenizer.json', 'state.json'
MANIFEST_FILE, ADAPTER_FOLDER = 'manifest.json', 'adapter'
STEP = re.compile(r'step-(\d{8,})(\.again)?')


def list_checkpoints(out_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first, unverified."""
    paths = [p for p in (Path(out_dir) / 'checkpoints').glob('step-*') if STEP.fullmatch(p.name)]
    return sorted(paths, key=lambda path: (step_of(path), path.name))


def step_of(path: Path) -> int:
    return int(STEP.match(path.name)[1])


def best_first(paths: list[Path]) -> list[Path]:
    """Sort by validation loss, lowest first, then by step, latest first; without one: last."""
    return sorted(paths, key=lambda path: (val_loss(path), -step_of(path)))


def val_loss(path: Path) -> float:
    """The validation loss at the checkpoint's own step; infinite if not measured there, or NaN."""
    state = read_state(path) or {}
    loss = state.get('val_loss') if state.get('evaluated') else None
    return loss if isinstance(loss, float) and not math.isnan(loss) else math.inf


def newest_run() -> Path:
    """The run directory in out/ with the newest checkpoint."""
    paths = [p for p in Path('out').glob('*/checkpoints/step-*') if STEP.fullmatch(p.name)]
    if not paths:
        raise CheckpointError(
            'no trained model in out/; train one (python train.py config/quickstart.py) or give a '
            'run directory as --out_dir'
        )
    return max(paths, key=lambda path: path.stat().st_mtime_ns).parents[1]


def find_checkpoint(where: str | Path, which: str = 'best') -> Path:
    """The verified checkpoint of a run directory: 'last', 'best', or the path of one.

    If it is damaged, prints a warning and takes the next choice: for 'last' the one before, for
    'best' the next lowest validation loss. CheckpointError if none is intact.
    """
    where = Path(where)
    if which not in ('last', 'best'):
        where = Path(which)
    if (where / MANIFEST_FILE).is_file() or STEP.fullmatch(where.name):
        verify_checkpoint(where)
        return where
    paths = list_checkpoints(where)
    paths = best_first(paths) if which == 'best' else paths[::-1]
    # those without a readable state first, so that each gets a warning
    for path in sorted(paths, key=lambda path: read_state(path) is not None):
        damage = find_damage(path)
        if not damage:
            return path
        print(f'warning: {path} is damaged: {damage}; trying another one', file=sys.stderr)
    if paths:
        raise CheckpointError(
            f'{where}: every checkpoint is damaged; start a new run in another --out_dir'
        )
    if str(where) == which:
        raise CheckpointError(
            f"{which}: no such checkpoint; give 'last', 'best' or the path of one"
        )
    if is_external(where) and (where.exists() or str(where) in RELEASED):
        raise CheckpointError(f'{where} is not a run directory; remove --checkpoint')
    if not where.is_dir():
        near = [str(path) for path in where.parent.glob('*/') if path.is_dir()]
        hint = did_you_mean(str(where), [*RELEASED, *near])
        raise CheckpointError(f'{where}: no such run directory; {hint}give the path of a run')
    raise CheckpointError(
        f'{where} has no checkpoint, no config.json of transformers and no ckpt.pt of nanoGPT; '
        'train until the first --eval_interval, or give another folder'
    )


def verify_checkpoint(path: Path) -> None:
    """Recompute every hash of a checkpoint. CheckpointError for the first file that differs."""
    if not path.is_dir():
        raise CheckpointError(f'{path}: no such checkpoint; check the path')
    if damage := find_damage(path):
        raise CheckpointError(f'{path} is damaged: {damage}; give another checkpoint')


def find_damage(path: Path) -> str | None:
    """What is damaged in a checkpoint, None if all of its hashes are right."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding='utf-8'))
        files = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
        needed = [name for name in files if not parts_of(name, list(manifest))]
        for name, digest in {**dict.fromkeys(needed, ''), **manifest}.items():
            if not (path / name).is_file():
                return f'{name} is missing'
            if sha256(path / name) != digest:
                return f'{name} does not match its hash'
    except (FileNotFoundError, ValueError, TypeError) as error:
        return f'{MANIFEST_FILE}: {error}'
    except OSError as error:  # of the disk or the network; the checkpoint may be intact
        raise UserError(f'{path} cannot be read: {error.strerror}; try again') from error
    return None


def read_state(path: Path) -> dict | None:
    """state.json of a checkpoint, None if it cannot be read."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding='utf-8'))
        return state if isinstance(state, dict) else None
    except (OSError, ValueError):
        return None


def load_checkpoint(path: Path, dropout: float = 0.0) -> tuple[GPT, Tokenizer | None, dict]:
    """The model (float32, on the host), tokenizer and state of a verified checkpoint.

    LoRA adapters are in place, not merged.
    """
    tensors = read_tensors(path, MODEL_FILE)
    model = model_from_tensors({**shape_in(path), 'dropout': dropout}, tensors, path / MODEL_FILE)
    if is_adapter(path / ADAPTER_FOLDER):
        read_adapter(model, path / ADAPTER_FOLDER, path / MODEL_FILE)
    return model, tokenizer_in(path), read_state(path)


def parts_of(name: str, names: list[str]) -> list[str]:
    """The files among `names` that hold `name`: the file itself, or the ranks' parts in order."""
    stem, _, suffix = name.partition('.')
    part = re.compile(rf'{stem}-\d+-of-\d+\.{suffix}')
    return sorted(n for n in names if n == name or part.fullmatch(n))


def read_tensors(path: Path, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint's file, one at a time; the rows of all ranks concatenated."""
    files = [path / part for part in parts_of(name, os.listdir(path))]
    with open_weights(files[0]) as file:
        keys = list(file.keys())
    for key in keys:
        parts = [read_tensor(file, key) for file in files]
        is_whole = len(parts) == 1 or not parts[0].dim()  # a step count is a scalar
        yield key, parts[0] if is_whole else torch.cat(parts)


def shape_in(path: Path) -> dict:
    """The fields of GPTConfig in a verified checkpoint."""
    shape = read_state(path)['model']
    unknown = set(shape) - {field.name for field in fields(GPTConfig)}
    if unknown:
        raise CheckpointError(
            f'{path} has unknown model settings ({", ".join(unknown)}); load it with the version '
            'of flatGPT that wrote it'
        )
    return shape


def tokenizer_in(path: Path) -> Tokenizer | None:
    return load_tokenizer(path / TOKENIZER_FILE) if (path / TOKENIZER_FILE).exists() else None


def load_model(
    where: str | Path | None,
    which: str = 'best',
    device: str = 'cpu',
    dropout: float = 0.0,
    tokenizer: str | None = None,
    reward_model: bool = False,
) -> tuple[GPT, Tokenizer | None, dict]:
    """A model ready for evaluation on `device` -> model, tokenizer, state ({} if external).

    where: a run directory, a checkpoint, None for the newest run, or an external model: a
    `transformers` folder, a name on the Hub such as 'gpt2', a nanoGPT checkpoint, a `peft` folder,
    whose config gives its base. Adapters are merged. tokenizer: replaces the model's own, see
    find_tokenizer(). reward_model: accept one, too.
    """
    where = newest_run() if where is None else where
    replacement = find_tokenizer(tokenizer) if tokenizer else None
    if which != 'best' and (is_adapter(where) or is_external(where)):
        raise CheckpointError(f'{where} is not a run directory; remove --checkpoint')
    if is_adapter(where):
        model, found, state = load_adapted(Path(where), dropout, tokenizer)
    elif is_external(where):
        model, found, state = load_external(where, dropout, replacement)
    else:
        model, found, state = load_checkpoint(find_checkpoint(where, which), dropout)
    if not reward_model:
        reject_reward_model(model.config, where)
    model, found = merge_lora(model), replacement or found
    if found and found.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f'{where}: the tokenizer has {found.vocab_size} ids and the model '
            f'{model.config.vocab_size}; give the one it was trained with as --tokenizer'
        )
    return model.to(device).eval(), found, state


def reject_reward_model(shape: GPTConfig, where: str | Path) -> None:
    if shape.score:
        raise CheckpointError(
            f'{where} is a reward model, which cannot generate text; give the model that it '
            f'scores, or train one with --objective=rl --reward={where}'
        )


def load_adapted(
    folder: Path, dropout: float, tokenizer: str | None
) -> tuple[GPT, Tokenizer | None, dict]:
    """The base model of a `peft` folder, with the folder's adapters in place."""
    base = base_of(folder)
    if is_same_path(base, folder):
        raise CheckpointError(
            f'{folder}: {ADAPTER_CONFIG} gives the adapter itself as its base; set '
            'base_model_name_or_path to the base model'
        )
    if is_adapter(base):
        raise CheckpointError(
            f'{folder}: its base {base} is an adapter, too; merge it (python -m flatgpt.checkpoint '
            f'export {base} DIR) and set base_model_name_or_path in {ADAPTER_CONFIG} to DIR'
        )
    try:
        model, found, _ = load_model(base, dropout=dropout, tokenizer=tokenizer)
    except CheckpointError as error:
        raise CheckpointError(
            f'{folder}: set base_model_name_or_path in {ADAPTER_CONFIG} to its base model: {error}'
        ) from error
    read_adapter(model, folder, base)
    return model, with_saved_chat_template(found, folder), {}


def read_adapters(
    paths: dict[str, str], model: GPT, base: str | Path
) -> dict[str, dict[str, LoRALinear]]:
    """{name: its layers} of adapters of a model in float32; base: the model in error lines.

    paths: folders of `peft`, or runs with --lora_rank. CheckpointError if one does not fit.
    """
    return {name: adapter_layers(model, find_adapter(path), base) for name, path in paths.items()}


def find_adapter(path: str) -> Path:
    """The folder of an adapter: the path itself, or inside of the best checkpoint of a run."""
    if is_adapter(path):
        return Path(path)
    folder = find_checkpoint(path) / ADAPTER_FOLDER
    if not is_adapter(folder):
        raise CheckpointError(
            f'there is no LoRA adapter in {path}; train one with --lora_rank, or serve it as '
            '--out_dir'
        )
    return folder


def load_optimizer(path: Path, model: GPT, optimizers: list[torch.optim.Optimizer]) -> None:
    """Load a checkpoint's optimizer state, stored by parameter, into the optimizers."""
    states, parameters = {}, dict(model.named_parameters())
    for key, tensor in read_tensors(path, OPTIMIZER_FILE):
        name, _, entry = key.rpartition('.')
        # cloned: a memory-mapped file could not be removed by prune()
        tensor = shard_like(tensor, parameters[name]) if tensor.dim() else tensor
        states.setdefault(name, {})[entry] = tensor.clone()
    names = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        state = optimizer.state_dict()
        order = [names[p] for group in optimizer.param_groups for p in group['params']]
        state['state'] = {i: states[name] for i, name in enumerate(order) if name in states}
        optimizer.load_state_dict(state)
