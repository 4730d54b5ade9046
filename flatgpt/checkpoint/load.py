"""
Finds, verifies and reads checkpoints.

    path = find('out/my_run', 'best')                    # or 'last', or the path of one
    model, tokenizer, state = load(path)
    model, tokenizer, state = load_model('out/my_run')   # or what others made: 'gpt2', a folder
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

from flatgpt.checkpoint.convert import RELEASED, is_foreign, load_foreign
from flatgpt.checkpoint.peft import base_of, is_adapter, read_adapter
from flatgpt.checkpoint.weights import filled, open_weights, read_tensor
from flatgpt.data.hf_tokenizer import find_tokenizer, with_marks
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.data.tokenizer import load as load_tokenizer
from flatgpt.errors import CheckpointError, UserError, did_you_mean
from flatgpt.files import sha256
from flatgpt.lora import merge_lora
from flatgpt.parallel import cut_like
from model import GPT, GPTConfig

MODEL, OPTIMIZER, TOKENIZER = 'model.safetensors', 'optimizer.safetensors', 'tokenizer.json'
STATE, MANIFEST, ADAPTER = 'state.json', 'manifest.json', 'adapter'
STEP = re.compile(r'step-(\d{8,})(\.again)?')


def list_checkpoints(out_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first, unverified."""
    paths = [p for p in (Path(out_dir) / 'checkpoints').glob('step-*') if STEP.fullmatch(p.name)]
    return sorted(paths, key=lambda path: (step_of(path), path.name))


def step_of(path: Path) -> int:
    return int(STEP.match(path.name)[1])


def best_first(paths: list[Path]) -> list[Path]:
    """Lowest validation loss first, the later of two equals; those not evaluated come last."""
    return sorted(paths, key=lambda path: (val_loss(path), -step_of(path)))


def val_loss(path: Path) -> float:
    """Validation loss measured at a checkpoint's own step, infinite if there was none or NaN."""
    state = read_state(path) or {}
    loss = state.get('val_loss') if state.get('evaluated') else None
    return loss if isinstance(loss, float) and not math.isnan(loss) else math.inf


def newest_run() -> Path:
    """The folder below out/ with the newest checkpoint."""
    paths = [p for p in Path('out').glob('*/checkpoints/step-*') if STEP.fullmatch(p.name)]
    if not paths:
        raise CheckpointError(
            'there is no trained model in out/; train one (python train.py config/quickstart.py) '
            'or name its folder with --out_dir'
        )
    return max(paths, key=lambda path: path.stat().st_mtime_ns).parents[1]


def find(where: str | Path, which: str = 'best') -> Path:
    """The verified checkpoint that `which` ('last', 'best', or its path) means in a run's folder.

    A damaged one is named on standard error and the next choice is taken: for 'last' the one
    before, for 'best' the next lowest validation loss. CheckpointError if none is left.
    """
    where = Path(where)
    if which not in ('last', 'best'):
        where = Path(which)
    if (where / MANIFEST).is_file() or STEP.fullmatch(where.name):
        verify(where)
        return where
    paths = list_checkpoints(where)
    paths = best_first(paths) if which == 'best' else paths[::-1]
    for path in sorted(paths, key=lambda path: read_state(path) is not None):  # damage is reported
        try:
            verify(path)
            return path
        except CheckpointError as error:
            print(f'warning: {error}; trying another one', file=sys.stderr)
    if paths:
        raise CheckpointError(
            f'{where}: every checkpoint is damaged; start anew in another --out_dir'
        )
    if str(where) == which:
        raise CheckpointError(
            f"{which}: no such checkpoint; give 'last', 'best' or the path of one"
        )
    if is_foreign(where) and (where.exists() or str(where) in RELEASED):
        raise CheckpointError(f'{where}: is not of a run, so leave out --checkpoint')
    if not where.is_dir():
        hint = did_you_mean(str(where).lower(), RELEASED)
        raise CheckpointError(
            f'{where}: no such folder; {hint}--out_dir and --init_from take that of a run'
        )
    raise CheckpointError(
        f'{where} has no checkpoint, which training writes first after --eval_interval steps, '
        'and no config.json of transformers or ckpt.pt of nanoGPT'
    )


def verify(path: Path) -> None:
    """Recompute every hash of a checkpoint; CheckpointError names the first file that differs."""
    if not path.is_dir():
        raise CheckpointError(f'{path}: no such checkpoint')
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding='utf-8'))
        needed = [n for n in (MODEL, OPTIMIZER, STATE) if not parts_of(n, list(manifest))]
        for name, digest in {**dict.fromkeys(needed, ''), **manifest}.items():
            if not (path / name).is_file():
                raise CheckpointError(f'{path} is damaged: {name} is missing')
            if sha256(path / name) != digest:
                raise CheckpointError(f'{path} is damaged: {name} is not what was written')
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise CheckpointError(f'{path} is damaged: {MANIFEST}: {error}') from error
    except OSError as error:  # the disk or the network, not the checkpoint: nobody falls back
        raise UserError(f'{path} cannot be read: {error.strerror}; try again') from error


def read_state(path: Path) -> dict | None:
    """state.json of a checkpoint, None if it cannot be read."""
    try:
        state = json.loads((path / STATE).read_text(encoding='utf-8'))
        return state if isinstance(state, dict) else None
    except (OSError, ValueError):
        return None


def load(path: Path, dropout: float = 0.0) -> tuple[GPT, Tokenizer | None, dict]:
    """The model (float32, on the host), tokenizer and state of a verified checkpoint.

    Adapters are in their places; merge_lora() makes the model one like any other.
    """
    named = read_tensors(path, MODEL)
    model = filled({**shape_in(path), 'dropout': dropout}, named, path / MODEL)
    if is_adapter(path / ADAPTER):
        read_adapter(model, path / ADAPTER, path / MODEL)
    return model, tokenizer_in(path), read_state(path)


def parts_of(name: str, names: list[str]) -> list[str]:
    """Those of `names` that hold `name`: the file itself, or the ranks' parts of it in order."""
    stem, _, suffix = name.partition('.')
    part = re.compile(rf'{stem}-\d+-of-\d+\.{suffix}')
    return sorted(n for n in names if n == name or part.fullmatch(n))


def read_tensors(path: Path, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint's file, one after the other; the rows of all ranks together."""
    files = [path / part for part in parts_of(name, os.listdir(path))]
    with open_weights(files[0]) as file:
        keys = list(file.keys())
    for key in keys:
        pieces = [read_tensor(file, key) for file in files]
        one = len(pieces) == 1 or not pieces[0].dim()  # a count of steps has no rows
        yield key, pieces[0] if one else torch.cat(pieces)


def shape_in(path: Path) -> dict:
    """The fields of GPTConfig in a verified checkpoint."""
    shape = read_state(path)['model']
    unknown = set(shape) - {field.name for field in fields(GPTConfig)}
    if unknown:
        raise CheckpointError(
            f'{path} is of an architecture that this version does not have ({", ".join(unknown)})'
        )
    return shape


def tokenizer_in(path: Path) -> Tokenizer | None:
    return load_tokenizer(path / TOKENIZER) if (path / TOKENIZER).exists() else None


def load_model(
    where: str | Path | None,
    which: str = 'best',
    device: str = 'cpu',
    dropout: float = 0.0,
    tokenizer: str | None = None,
) -> tuple[GPT, Tokenizer | None, dict]:
    """A model ready for evaluation on `device` -> model, tokenizer, state ({} if imported).

    where: a run's folder, a checkpoint, None for the newest run, or what others made: a
    `transformers` folder, a hub's name such as 'gpt2', a nanoGPT checkpoint, a folder of `peft`,
    whose base is found by the name it gives. Adapters are merged. tokenizer: where to find one to
    use instead of what comes with the model, see find_tokenizer().
    """
    where = newest_run() if where is None else where
    named = find_tokenizer(tokenizer) if tokenizer else None
    if which != 'best' and (is_adapter(where) or is_foreign(where)):
        raise CheckpointError(f'{where}: is not of a run, so leave out --checkpoint')
    if is_adapter(where):
        model, found, state = load_adapted(Path(where), dropout, tokenizer)
    elif is_foreign(where):
        model, found, state = load_foreign(where, dropout, named)
    else:
        model, found, state = load(find(where, which), dropout)
    model, found = merge_lora(model), named or found
    if found and found.vocab_size > model.config.vocab_size:
        ids = f'{found.vocab_size} ids, and the model {model.config.vocab_size}'
        raise CheckpointError(f'{where}: its tokenizer has {ids}: one is not made for the other')
    return model.to(device).eval(), found, state


def load_adapted(
    folder: Path, dropout: float, tokenizer: str | None
) -> tuple[GPT, Tokenizer | None, dict]:
    """The base that a folder of `peft` names, with the folder's adapters in their places."""
    base = base_of(folder)
    if is_adapter(base):
        raise CheckpointError(f'{folder}: its base {base} is an adapter too')
    try:
        model, found, _ = load_model(base, dropout=dropout, tokenizer=tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f'{folder} adapts a model that is not there: {error}') from error
    read_adapter(model, folder, base)
    return model, with_marks(found, folder), {}


def load_optimizer(path: Path, model: GPT, optimizers: list[torch.optim.Optimizer]) -> None:
    """Give the optimizers the state a checkpoint holds for each of the model's parameters."""
    states, parameters = {}, dict(model.named_parameters())
    for key, tensor in read_tensors(path, OPTIMIZER):
        name, _, entry = key.rpartition('.')
        # cloned, or it would be a mapping of the file, which prune() could then not remove
        tensor = cut_like(tensor, parameters[name]) if tensor.dim() else tensor
        states.setdefault(name, {})[entry] = tensor.clone()
    names = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        packed = optimizer.state_dict()
        order = [names[p] for group in optimizer.param_groups for p in group['params']]
        packed['state'] = {i: states[name] for i, name in enumerate(order) if name in states}
        optimizer.load_state_dict(packed)
