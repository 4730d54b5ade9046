"""
Checkpoints: the only place that knows how a trained model lies on disk.

$ python checkpoint.py inspect out/my_run     # a table of its checkpoints
$ python checkpoint.py verify out/my_run      # recompute every hash
$ python checkpoint.py export out/my_run DIR  # for transformers; --format=gguf for llama.cpp,
                                              # --format=peft for the adapter alone

A run's folder holds checkpoints/step-00002000/ and so on, each complete in itself:

    model.safetensors       parameters, float32, under model.py's names
    optimizer.safetensors   the optimizer's state, as <parameter>.<key>
    tokenizer.json          the vocabulary, so that sampling never needs data/
    state.json              step, losses, the model's shape, the settings
    adapter/                of a run with lora_rank, as peft loads it; model.safetensors is its base
    manifest.json           sha256 of every file above, written last

A sharded run writes its tensors in parts, model-00001-of-00004.safetensors and so on, the rows that
each rank holds; together they are the same parameters, and any number of processes can go on.
A checkpoint is written under a temporary name, flushed to the disk and then renamed, so a folder
called step-... is whole whenever the power went. None is ever overwritten: one that was saved on
the way out, and is evaluated only now, becomes step-00002000.again. No pickle anywhere.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configurator import UserError, did_you_mean, one_line_errors
from data.huggingface import MARKS, with_marks
from data.tokenizer import Tokenizer
from data.tokenizer import load as load_tokenizer
from exchange import (
    RELEASED,
    CheckpointError,
    export_gguf,
    export_transformers,
    filled,
    is_foreign,
    load_foreign,
    new_folder,
    open_weights,
    outline,
    read_named_tokenizer,
    read_tensor,
)
from lora import adapted, adapter_files, base_of, is_adapter, merge_lora, read_adapter
from model import GPT, GPTConfig
from parallel import cut_like, local, settle

MODEL, OPTIMIZER, TOKENIZER = 'model.safetensors', 'optimizer.safetensors', 'tokenizer.json'
STATE, MANIFEST, ADAPTER = 'state.json', 'manifest.json', 'adapter'
LOSSES = ('train_loss', 'val_loss')  # that an evaluation can have measured
STEP = re.compile(r'step-(\d{8,})(\.again)?')
PART_SECONDS = 600  # that rank 0 waits for the files of another


# -----------------------------------------------------------------------------
# write


def save(
    out_dir: str | Path,
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    tokenizer: Tokenizer | None,
    state: dict,
    keep_evaluated: bool = False,
) -> Path:
    """Write checkpoints/step-<state['step']> and drop what is no longer needed -> its path.

    state: plain values for state.json. 'step' names the folder; 'val_loss' (None before the first
    evaluation) decides which checkpoint is the best; 'evaluated' says whether it is of this step.
    Kept are the last two, the best, and with keep_evaluated every one that was evaluated.
    Raises OSError if the disk fails or is full; what was there before is then still there.

    By one process, at once; saver.py does the same with several, and in the background.
    """
    if path := saved_before(out_dir, state):
        return path
    final, tensors = place(out_dir, state), tensors_of(model, optimizers)
    clear(final, size_of(tensors))
    write(final, tensors, documents_of(model, tokenizer, state), keep_evaluated)
    return final


def saved_before(out_dir: str | Path, state: dict) -> Path | None:
    """The checkpoint of this step of this run, if there is one that would be equal."""
    for path in listed(out_dir):
        if step_of(path) == state['step']:
            there = read_state(path) or {}
            if there.get('evaluated') == state['evaluated']:
                return path
    return None


def place(out_dir: str | Path, state: dict) -> Path:
    """Where the checkpoint of a step will be: beside what is there of it already."""
    path = Path(out_dir) / 'checkpoints' / f'step-{state["step"]:08d}'
    return path.with_name(f'{path.name}.again') if path.exists() else path


def tensors_of(model: GPT, optimizers) -> dict[str, dict[str, torch.Tensor]]:
    """What each file will hold; of a sharded model, this rank's rows. Nothing is copied."""
    settle(model)
    return {MODEL: model_tensors(model), OPTIMIZER: optimizer_tensors(model, optimizers)}


def model_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """Parameters by name, without adapters. named_parameters() gives a tied matrix once."""
    named = {name: p for name, p in model.named_parameters() if '.lora_' not in name}
    return {name: local(p.detach()).contiguous() for name, p in named.items()}


def optimizer_tensors(model: GPT, optimizers) -> dict[str, torch.Tensor]:
    """The state of every parameter, which one of the optimizers holds, as <parameter>.<key>."""
    named, states = {}, {p: state for each in optimizers for p, state in each.state.items()}
    for name, parameter in model.named_parameters():
        for key, value in states.get(parameter, {}).items():
            named[f'{name}.{key}'] = local(torch.as_tensor(value).detach()).contiguous()
    return named


def documents_of(model: GPT, tokenizer: Tokenizer | None, state: dict) -> dict[str, bytes]:
    """The small files of a checkpoint, by name. Of a sharded model every rank has to ask."""
    base = state.get('config', {}).get('init_from')
    files = adapter_files(model, base) if adapted(model) else {}
    documents = {f'{ADAPTER}/{name}': content for name, content in files.items()}
    if tokenizer is not None:
        documents[TOKENIZER] = as_json(tokenizer.to_dict())
    return documents | {STATE: as_json({**state, 'model': asdict(model.config)})}


def size_of(tensors: dict) -> int:
    """Bytes that a checkpoint of these takes, about."""
    return sum(t.nbytes for named in tensors.values() for t in named.values()) + 2**22


def clear(final: Path, need: int) -> None:
    """Make an empty folder for what becomes the checkpoint `final`; OSError without room for it.

    Refused before anything is written: a half-written file helps nobody.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    check_space(final.parent, need)
    for leftover in final.parent.glob('.*'):  # of a save or a removal that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    hidden(final).mkdir()


def check_space(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(f'needs {need / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free')


def hidden(path: Path) -> Path:
    """The name of a checkpoint that does not count: not whole yet, or being removed."""
    return path.with_name(f'.{path.name}')


def write(
    final: Path,
    tensors: dict[str, dict[str, torch.Tensor]],
    documents: dict[str, bytes],
    keep_evaluated: bool,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Write the tensors of one of `ranks` to the folder that clear() made; rank 0 publishes it all.

    The ranks tell one another by files, not by messages, so that each can do this in a thread.
    """
    parts = hidden(final)
    if rank > 0:
        return write_part(parts, tensors, rank, ranks)
    try:
        hashes = write_tensors(parts, tensors, rank, ranks)
        for name, content in documents.items():
            (parts / name).parent.mkdir(exist_ok=True)
            (parts / name).write_bytes(content)
            hashes[name] = sha256(parts / name)
        for other in range(1, ranks):
            hashes |= hashes_of_part(parts, other)
        (parts / MANIFEST).write_bytes(as_json(hashes))
        flush_all(parts)
    except BaseException as error:
        shutil.rmtree(parts, ignore_errors=True)  # a full disk needs its space back
        if isinstance(error, SafetensorError):  # its word for an OSError
            raise OSError(str(error)) from error
        raise
    publish(final, keep_evaluated)


def write_tensors(parts: Path, tensors: dict, rank: int, ranks: int) -> dict[str, str]:
    """Write the files of one rank -> the hash of each."""
    hashes = {}
    for name, named in tensors.items():
        name = part_name(name, rank, ranks)
        save_file({k: t.cpu() for k, t in named.items()}, parts / name, metadata={'format': 'pt'})
        hashes[name] = sha256(parts / name)
    return hashes


def part_name(name: str, rank: int, ranks: int) -> str:
    """model.safetensors, or of several ranks model-00001-of-00004.safetensors."""
    stem, suffix = name.split('.')
    return name if ranks == 1 else f'{stem}-{rank + 1:05d}-of-{ranks:05d}.{suffix}'


def write_part(parts: Path, tensors: dict, rank: int, ranks: int) -> None:
    """Write the files of a rank other than 0, then what rank 0 waits for: their hashes."""
    try:
        report = write_tensors(parts, tensors, rank, ranks)
        for name in report:
            flush(parts / name)
    except (OSError, SafetensorError) as error:
        for name in tensors:  # a full disk needs room for what rank 0 waits for
            (parts / part_name(name, rank, ranks)).unlink(missing_ok=True)
        report = {'error': f'rank {rank}: {error}'}
    (parts / f'rank-{rank}.part').write_bytes(as_json(report))
    (parts / f'rank-{rank}.part').rename(parts / f'rank-{rank}')
    if 'error' in report:
        raise OSError(report['error'])


def hashes_of_part(parts: Path, rank: int) -> dict[str, str]:
    """Wait for what write_part() says, and take it away."""
    path, deadline = parts / f'rank-{rank}', time.monotonic() + PART_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise OSError(f'rank {rank} did not write its part within {PART_SECONDS} s')
        time.sleep(0.01)
    report = json.loads(path.read_text(encoding='utf-8'))
    path.unlink()
    if 'error' in report:
        raise OSError(report['error'])
    return report


def publish(final: Path, keep_evaluated: bool) -> None:
    """Let a checkpoint that is whole count, and drop what is no longer needed."""
    hidden(final).rename(final)
    flush(final.parent)
    try:
        prune(final.parent, keep_evaluated)
    except OSError as error:
        print(f'warning: an old checkpoint cannot be removed: {error}', file=sys.stderr)


def as_json(value) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + '\n').encode()


def sha256(path: Path) -> str:
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
        return digest.hexdigest()


def flush_all(folder: Path) -> None:
    for path in [*folder.rglob('*'), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Have the disk hold a file, or a folder's list of names, before anything relies on it."""
    if path.is_dir() and os.name == 'nt':
        return  # Windows does not open folders, and writes their names through
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(folder: Path, keep_evaluated: bool, remove: Callable | None = None) -> None:
    """Remove all but the last two, the best and, if asked for, the evaluated ones."""
    paths = listed(folder.parent)
    last = list({step_of(path): path for path in paths}.values())  # of each step
    keep = {*last[-2:], *best_first(last)[:1]}
    if keep_evaluated:
        keep |= {path for path in last if val_loss(path) < math.inf}
    for path in paths:
        if path not in keep:
            (remove or remove_at_once)(path)


def remove_at_once(path: Path) -> None:
    """Remove a checkpoint: the rename is atomic, which the removal is not."""
    path.rename(hidden(path))
    shutil.rmtree(hidden(path), ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that it no longer counts and its step can be written again."""
    number = 1
    while (aside := path.with_name(f'{path.name}.aside{number}')).exists():
        number += 1
    return path.rename(aside)


# -----------------------------------------------------------------------------
# find and verify


def listed(out_dir: str | Path) -> list[Path]:
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
    paths = best_first(listed(where)) if which == 'best' else listed(where)[::-1]
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


# -----------------------------------------------------------------------------
# read


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
    whose base is found by the name it gives. Adapters are merged. tokenizer: the name,
    tokenizer.json or meta.pkl of one to use instead of what comes with the model.
    """
    where = newest_run() if where is None else where
    named = read_named_tokenizer(tokenizer) if tokenizer else None
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


# -----------------------------------------------------------------------------
# command line


def report(paths: list[Path]) -> bool:
    """Print one line a checkpoint (step, losses, size, integrity) -> whether all are whole."""
    print(f'{"checkpoint":<16}{"train loss":>12}{"val loss":>12}{"MB":>9}  integrity')
    whole, last = True, None
    for path in paths:
        state = read_state(path) or {}
        losses = [state.get(k) if state.get('evaluated') else None for k in LOSSES]
        cells = ''.join(f'{"-":>12}' if loss is None else f'{loss:12.4f}' for loss in losses)
        size = sum(file.stat().st_size for file in path.rglob('*') if file.is_file()) / 1e6
        try:
            verify(path)
            integrity, last = 'ok', path
        except CheckpointError as error:
            integrity, whole = str(error).partition('is ')[2], False
        print(f'{path.name:<16}{cells}{size:9.1f}  {integrity}')
    if last:
        adapter = f'; LoRA of {base_of(last / ADAPTER)}' if is_adapter(last / ADAPTER) else ''
        print(describe(GPTConfig(**shape_in(last)), tokenizer_in(last)) + adapter)
    return whole


def describe(config: GPTConfig, tokenizer: Tokenizer | None) -> str:
    parameters = sum(p.numel() for p in outline(config).parameters())
    shape = f'{config.n_layer} layers of {config.n_embd}, {config.n_head} heads'
    name = tokenizer.name if tokenizer else 'none'
    return (
        f'{config.arch}, {parameters / 1e6:.2f}M parameters, {shape}, '
        f'context {config.block_size}; tokenizer {name}'
    )


def export(where: str, which: str, to: Path, kind: str, tokenizer: str | None) -> None:
    if kind == 'peft':
        return export_adapter(where, which, to)
    model, tokens, state = load_model(where, which, tokenizer=tokenizer)
    {'transformers': export_transformers, 'gguf': export_gguf}[kind](model, tokens, state, to)
    at = f', step {state["step"]}' if 'step' in state else ''
    print(f'{where}{at}: written to {to}{"" if tokens else ", without a tokenizer"}')


def export_adapter(where: str, which: str, to: Path) -> None:
    """The adapter of a run as a folder of its own, for `peft` and the base it names."""
    path = None if is_foreign(where) else find(where, which)
    if path is None or not is_adapter(path / ADAPTER):
        if is_adapter(where):
            raise UserError(f'{where} is an adapter already; without --format=peft it is merged')
        raise UserError(f'{where} has no adapter, which a run with --lora_rank makes')
    if is_adapter(base_of(path / ADAPTER)):
        raise UserError(
            f'{where}: its base {base_of(path / ADAPTER)} is an adapter too; without --format=peft '
            'the export has all of them merged'
        )
    tokenizer = tokenizer_in(path)
    with new_folder(to) as part:
        shutil.copytree(path / ADAPTER, part, dirs_exist_ok=True)
        if tokenizer and tokenizer.chat_template:
            (part / MARKS).write_bytes(as_json(tokenizer.chat_template))
    print(f'{path}: the adapter is written to {to}; its base is {base_of(to)}')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('command', choices=['inspect', 'verify', 'export'])
    parser.add_argument('out_dir', help="a run's folder, or what else --init_from takes")
    parser.add_argument('to', type=Path, nargs='?', help='export: the folder or file to write')
    parser.add_argument(
        '--format', choices=['transformers', 'gguf', 'peft'], default='transformers'
    )
    parser.add_argument('--checkpoint', default='best', help="'best', 'last', or the path of one")
    parser.add_argument('--tokenizer', help='a name, tokenizer.json or meta.pkl to use instead')
    args = parser.parse_args(argv)
    if args.command == 'export':
        if args.to is None:
            raise UserError(f'say where to: python checkpoint.py export {args.out_dir} DIR')
        return export(args.out_dir, args.checkpoint, args.to, args.format, args.tokenizer)
    if is_foreign(args.out_dir):
        model, tokenizer, _ = load_model(args.out_dir, tokenizer=args.tokenizer)
        return print(f'{describe(model.config, tokenizer)}; read whole, there are no hashes')
    paths = listed(args.out_dir) or [find(args.out_dir)]  # one, or what says that there is none
    if not report(paths) and args.command == 'verify':
        raise CheckpointError(f'{args.out_dir} has damaged checkpoints')


if __name__ == '__main__':
    one_line_errors()
    main()
