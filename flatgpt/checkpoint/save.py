"""
Writes checkpoints: at once, or while training goes on and waits only for a copy of the tensors.

    path = save(out_dir, model, optimizers, tokenizer, state)

    saver = Saver(out_dir, runtime, mirror=Mirror(Path('/bucket/my_run')))
    saver.save(model, optimizers, tokenizer, state)
    for problem in saver.news(): ...
    saver.finish()

A checkpoint is written under a temporary name, flushed to the disk and then renamed, so a folder
called step-... is whole whenever the power went. None is ever overwritten: one that was saved on
the way out, and is evaluated only now, becomes step-00002000.again.
"""

import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from flatgpt.checkpoint.load import (
    ADAPTER,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    TOKENIZER,
    best_first,
    listed,
    read_state,
    step_of,
    val_loss,
)
from flatgpt.checkpoint.peft import adapter_files
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError
from flatgpt.files import as_json, check_space, flush, flush_all, sha256
from flatgpt.lora import adapted
from flatgpt.parallel import local, settle
from flatgpt.runtime import Runtime
from model import GPT

PART_SECONDS = 600  # that rank 0 waits for the files of another
SMALL = 2**26  # bytes that are written at once: in a twentieth of a second, and none is lost to it


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

    By one process, at once; a Saver does the same with several, and in the background.
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
# while training goes on


class Saver:
    """Writes the checkpoints of one run in the background, one after the other.

    mirror: a Mirror of mirror.py, which is sent each finished checkpoint. failure: why the last one
    is missing, None if it is not.
    """

    def __init__(
        self,
        out_dir: str | Path,
        runtime: Runtime,
        sharded: bool = False,
        keep_evaluated: bool = False,
        mirror=None,
    ):
        self.out_dir, self.runtime, self.keep_evaluated = Path(out_dir), runtime, keep_evaluated
        self.rank, self.ranks = (runtime.rank, runtime.world_size) if sharded else (0, 1)
        self.mirror = mirror if runtime.is_main else None
        self.failure: str | None = None
        self._times: dict[str, float] = {}
        self._news: list[str] = []
        self._copies: dict[tuple[str, str], torch.Tensor] = {}  # kept: fresh memory is slow
        self._writer = ThreadPoolExecutor(1, initializer=give_way)
        self._sender = ThreadPoolExecutor(1, initializer=give_way)
        self._writing: Future | None = None

    def save(self, model, optimizers, tokenizer, state: dict) -> None:
        """Save the run as it stands; see save(). All ranks call it of a sharded model,
        otherwise rank 0 alone."""
        started = time.perf_counter()
        self.wait()
        tensors = tensors_of(model, optimizers)
        try:
            final = self._agree(lambda: self._make_room(state, size_of(tensors) * self.ranks))
        except UserError as error:
            final = self._fail(state['step'], error)
        if final:
            small = size_of(tensors) < SMALL
            tensors = tensors if small else self._copy(tensors)
            documents = documents_of(model, tokenizer, state)
            self._writing = self._writer.submit(self._write, started, final, tensors, documents)
            if small:
                self.wait()
        self._times['save_pause'] = time.perf_counter() - started

    def _agree(self, decide):
        return self.runtime.broadcast_from_rank0(decide) if self.ranks > 1 else decide()

    def _make_room(self, state: dict, need: int) -> Path | None:
        """Make room -> where the checkpoint goes, None if it is there already."""
        try:
            if saved_before(self.out_dir, state):
                return None
            final = place(self.out_dir, state)
            clear(final, need)
        except OSError as error:
            raise UserError(str(error)) from error
        return final

    def _copy(self, tensors: dict) -> dict:
        """The tensors on the host, in memory that no training step touches."""
        copies = {file: {} for file in tensors}
        for file, named in tensors.items():
            for name, tensor in named.items():
                copy = self._copies.get((file, name))
                if copy is None:
                    pinned = tensor.device.type == 'cuda'
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                copies[file][name] = self._copies[file, name] = copy
                copy.copy_(tensor, non_blocking=tensor.is_cuda)
        if self.runtime.device_type == 'cuda':
            torch.cuda.synchronize()
        return copies

    def _write(self, started: float, final: Path, tensors, documents) -> None:
        try:
            write(final, tensors, documents, self.keep_evaluated, self.rank, self.ranks)
        except OSError as error:
            return self._fail(step_of(final), error)
        self.failure, self._times['save_seconds'] = None, time.perf_counter() - started
        if self.mirror:
            self._sender.submit(self._send, final)

    def _fail(self, step: int, why) -> None:
        self.failure = (
            f'checkpoint of step {step} not written: {why}; the ones before are untouched'
        )
        self._news.append(self.failure)

    def _send(self, final: Path) -> None:
        try:
            self.mirror.send(final)
        except Exception as error:  # in a thread, where nobody would hear of it
            if final.exists():  # else it has been pruned meanwhile, and a newer one is next
                self._news.append(f'{final.name} is not copied to {self.mirror}: {error}')

    def news(self) -> list[str]:
        """What went wrong since this was last asked."""
        news, self._news = self._news, []
        return news

    def times(self) -> dict[str, float]:
        """Seconds, once each: 'save_pause' that the training waited, 'save_seconds' in all."""
        times, self._times = self._times, {}
        return times

    def wait(self) -> None:
        """Wait until what was saved is on the disk; the mirror may be behind."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def finish(self) -> None:
        """Wait for the disk and the mirror."""
        self.wait()
        self._writer.shutdown()
        self._sender.shutdown()


def give_way() -> None:
    """Let the training have the processor first: its threads wait for the slowest of them."""
    if sys.platform == 'linux':  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
