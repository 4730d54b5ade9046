"""
Write checkpoints at once, or in the background: training then waits only for a copy of the tensors.

    path = save_checkpoint(out_dir, model, optimizers, tokenizer, state)

    saver = Saver(out_dir, runtime, mirror=Mirror(Path('/bucket/my_run')))
    saver.save(model, optimizers, tokenizer, state)
    for warning in saver.pop_warnings(): ...
    saver.finish()

A checkpoint is written under a temporary name, flushed to the disk and renamed, so that a folder
called step-... is complete even after a power cut. None is overwritten: if a step was saved without
evaluation and is saved again after it, the second is step-00002000.again.
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
    ADAPTER_FOLDER,
    MANIFEST_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    TOKENIZER_FILE,
    best_first,
    list_checkpoints,
    read_state,
    step_of,
    val_loss,
)
from flatgpt.checkpoint.peft import adapter_files
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError
from flatgpt.files import as_json, check_free_space, fsync, fsync_tree, sha256
from flatgpt.lora import lora_layers
from flatgpt.parallel import reshard, to_local
from flatgpt.runtime import Runtime
from model import GPT

PART_TIMEOUT = 600  # seconds that rank 0 waits for the files of another rank
SYNC_SAVE_BYTES = 2**26  # bytes; smaller checkpoints are written at once, in about 0.05 s


# -----------------------------------------------------------------------------
# write


def save_checkpoint(
    out_dir: str | Path,
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    tokenizer: Tokenizer | None,
    state: dict,
    keep_evaluated: bool = False,
) -> Path:
    """Write checkpoints/step-<state['step']> and prune the others -> its path.

    state: plain values for state.json. 'step' names the folder, the lowest 'val_loss' (None before
    the first evaluation) is the best, 'evaluated' is whether the loss is of this step.
    keep_evaluated: see prune(). OSError if the disk fails or is full; the earlier checkpoints stay.

    For one process. A Saver works with several, and in the background.
    """
    if path := saved_before(out_dir, state):
        return path
    final, tensors = checkpoint_path(out_dir, state), tensors_of(model, optimizers)
    make_temp_folder(final, size_of(tensors))
    write_checkpoint(final, tensors, small_files_of(model, tokenizer, state), keep_evaluated)
    return final


def saved_before(out_dir: str | Path, state: dict) -> Path | None:
    """The checkpoint of this step, if there is one that would be equal."""
    for path in list_checkpoints(out_dir):
        if step_of(path) == state['step']:
            saved = read_state(path) or {}
            if saved.get('evaluated') == state['evaluated']:
                return path
    return None


def checkpoint_path(out_dir: str | Path, state: dict) -> Path:
    """Where to write the checkpoint of a step, which may have one already."""
    path = Path(out_dir) / 'checkpoints' / f'step-{state["step"]:08d}'
    return path.with_name(f'{path.name}.again') if path.exists() else path


def tensors_of(model: GPT, optimizers) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each file; of a sharded model, this rank's rows. Nothing is copied."""
    reshard(model)
    return {MODEL_FILE: model_tensors(model), OPTIMIZER_FILE: optimizer_tensors(model, optimizers)}


def model_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """Parameters by name, without adapters and with tied matrices once."""
    parameters = {name: p for name, p in model.named_parameters() if '.lora_' not in name}
    return {name: to_local(p.detach()).contiguous() for name, p in parameters.items()}


def optimizer_tensors(model: GPT, optimizers) -> dict[str, torch.Tensor]:
    """The optimizers' state of every parameter, as <parameter>.<key>."""
    tensors, states = {}, {p: state for each in optimizers for p, state in each.state.items()}
    for name, parameter in model.named_parameters():
        for key, value in states.get(parameter, {}).items():
            tensors[f'{name}.{key}'] = to_local(torch.as_tensor(value).detach()).contiguous()
    return tensors


def small_files_of(model: GPT, tokenizer: Tokenizer | None, state: dict) -> dict[str, bytes]:
    """{name: content} of a checkpoint's small files. Collective if the model is sharded."""
    base = state.get('config', {}).get('init_from')
    files = adapter_files(model, base) if lora_layers(model) else {}
    small_files = {f'{ADAPTER_FOLDER}/{name}': content for name, content in files.items()}
    if tokenizer is not None:
        small_files[TOKENIZER_FILE] = as_json(tokenizer.to_dict())
    shape = asdict(model.config)
    if not shape['bf16_residual']:  # as earlier versions wrote it, which can load the checkpoint
        del shape['bf16_residual']
    return small_files | {STATE_FILE: as_json({**state, 'model': shape})}


def size_of(tensors: dict) -> int:
    """About how many bytes a checkpoint of these takes."""
    return sum(t.nbytes for by_name in tensors.values() for t in by_name.values()) + 2**22


def make_temp_folder(final: Path, need: int) -> None:
    """Make the empty folder that becomes the checkpoint `final`. OSError without room for it."""
    final.parent.mkdir(parents=True, exist_ok=True)
    check_free_space(final.parent, need)
    for leftover in final.parent.glob('.*'):  # of a killed save or removal
        shutil.rmtree(leftover, ignore_errors=True)
    temp_path(final).mkdir()


def temp_path(path: Path) -> Path:
    """The hidden name of a checkpoint that is being written or removed."""
    return path.with_name(f'.{path.name}')


def write_checkpoint(
    final: Path,
    tensors: dict[str, dict[str, torch.Tensor]],
    small_files: dict[str, bytes],
    keep_evaluated: bool,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Write one rank's tensors to the folder that make_temp_folder() made; rank 0 publishes all.

    The ranks communicate by files, so that each can call this in a thread.
    """
    temp = temp_path(final)
    if rank > 0:
        return write_rank_files(temp, tensors, rank, ranks)
    try:
        hashes = write_tensors(temp, tensors, rank, ranks)
        for name, content in small_files.items():
            (temp / name).parent.mkdir(exist_ok=True)
            (temp / name).write_bytes(content)
            hashes[name] = sha256(temp / name)
        for other in range(1, ranks):
            hashes |= wait_for_rank_files(temp, other)
        (temp / MANIFEST_FILE).write_bytes(as_json(hashes))
        fsync_tree(temp)
    except BaseException as error:
        shutil.rmtree(temp, ignore_errors=True)  # the disk may be full
        if isinstance(error, SafetensorError):  # raised by safetensors instead of OSError
            raise OSError(str(error)) from error
        raise
    publish(final, keep_evaluated)


def write_tensors(temp: Path, tensors: dict, rank: int, ranks: int) -> dict[str, str]:
    """Write the files of one rank -> {name: sha256}"""
    hashes = {}
    for file, by_name in tensors.items():
        part = temp / rank_file_name(file, rank, ranks)
        save_file({k: t.cpu() for k, t in by_name.items()}, part, metadata={'format': 'pt'})
        hashes[part.name] = sha256(part)
    return hashes


def rank_file_name(name: str, rank: int, ranks: int) -> str:
    """model.safetensors, or for several ranks model-00001-of-00004.safetensors."""
    stem, suffix = name.split('.')
    return name if ranks == 1 else f'{stem}-{rank + 1:05d}-of-{ranks:05d}.{suffix}'


def write_rank_files(temp: Path, tensors: dict, rank: int, ranks: int) -> None:
    """Write the files of a rank other than 0, then their hashes, which rank 0 waits for."""
    try:
        report = write_tensors(temp, tensors, rank, ranks)
        for name in report:
            fsync(temp / name)
    except (OSError, SafetensorError) as error:
        for name in tensors:  # the disk may be full: make room for the report
            (temp / rank_file_name(name, rank, ranks)).unlink(missing_ok=True)
        report = {'error': f'rank {rank}: {error}'}
    (temp / f'rank-{rank}.part').write_bytes(as_json(report))
    (temp / f'rank-{rank}.part').rename(temp / f'rank-{rank}')
    if 'error' in report:
        raise OSError(report['error'])


def wait_for_rank_files(temp: Path, rank: int) -> dict[str, str]:
    """Wait for the report of write_rank_files(), and remove it -> {name: sha256}"""
    path, deadline = temp / f'rank-{rank}', time.monotonic() + PART_TIMEOUT
    while not path.exists():
        if time.monotonic() > deadline:
            raise OSError(f'rank {rank} did not write its part within {PART_TIMEOUT} s')
        time.sleep(0.01)
    report = json.loads(path.read_text(encoding='utf-8'))
    path.unlink()
    if 'error' in report:
        raise OSError(report['error'])
    return report


def publish(final: Path, keep_evaluated: bool) -> None:
    """Rename a complete checkpoint to its final name, and prune the others."""
    temp_path(final).rename(final)
    fsync(final.parent)
    try:
        prune(final.parent, keep_evaluated)
    except OSError as error:
        print(f'warning: an old checkpoint cannot be removed: {error}', file=sys.stderr)


def prune(folder: Path, keep_evaluated: bool, remove: Callable | None = None) -> None:
    """Remove all but the last two, the best and, with keep_evaluated, the evaluated ones."""
    paths = list_checkpoints(folder.parent)
    last = list({step_of(path): path for path in paths}.values())  # of each step
    keep = {*last[-2:], *best_first(last)[:1]}
    if keep_evaluated:
        keep |= {path for path in last if val_loss(path) < math.inf}
    for path in paths:
        if path not in keep:
            (remove or remove_atomically)(path)


def remove_atomically(path: Path) -> None:
    """Remove a checkpoint: rename it first, since the removal is not atomic."""
    path.rename(temp_path(path))
    shutil.rmtree(temp_path(path), ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that it is no longer listed and its step can be written again."""
    number = 1
    while (aside := path.with_name(f'{path.name}.aside{number}')).exists():
        number += 1
    return path.rename(aside)


# -----------------------------------------------------------------------------
# in the background


class Saver:
    """Writes the checkpoints of one run in the background, one after the other.

    mirror: a Mirror of mirror.py, which gets a copy of each. failure: why the last checkpoint could
    not be written, None if it could.
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
        self._warnings: list[str] = []
        self._copies: dict[tuple[str, str], torch.Tensor] = {}  # reused: allocating is slow
        self._writer = ThreadPoolExecutor(1, initializer=lower_priority)
        self._sender = ThreadPoolExecutor(1, initializer=lower_priority)
        self._writing: Future | None = None

    def save(self, model, optimizers, tokenizer, state: dict) -> None:
        """Save a checkpoint of the current state; see save_checkpoint().

        Called by all ranks if the model is sharded, otherwise by rank 0.
        """
        started = time.perf_counter()
        self.wait()
        tensors = tensors_of(model, optimizers)
        try:
            final = self._on_rank0(lambda: self._prepare(state, size_of(tensors) * self.ranks))
        except UserError as error:
            final = self._fail(state['step'], error)
        if final:
            small = size_of(tensors) < SYNC_SAVE_BYTES
            tensors = tensors if small else self._copy(tensors)
            small_files = small_files_of(model, tokenizer, state)
            self._writing = self._writer.submit(self._write, started, final, tensors, small_files)
            if small:
                self.wait()
        self._times['save_pause'] = time.perf_counter() - started

    def _on_rank0(self, decide):
        return self.runtime.broadcast_from_rank0(decide) if self.ranks > 1 else decide()

    def _prepare(self, state: dict, need: int) -> Path | None:
        """Make the temporary folder -> the checkpoint's path, None if it already exists."""
        try:
            if saved_before(self.out_dir, state):
                return None
            final = checkpoint_path(self.out_dir, state)
            make_temp_folder(final, need)
        except OSError as error:
            raise UserError(str(error)) from error
        return final

    def _copy(self, tensors: dict) -> dict:
        """Copy the tensors to memory of the host that training does not change."""
        copies = {file: {} for file in tensors}
        for file, by_name in tensors.items():
            for name, tensor in by_name.items():
                copy = self._copies.get((file, name))
                if copy is None:
                    pinned = tensor.device.type == 'cuda'
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                copies[file][name] = self._copies[file, name] = copy
                copy.copy_(tensor, non_blocking=tensor.is_cuda)
        if self.runtime.device_type == 'cuda':
            torch.cuda.synchronize()
        return copies

    def _write(self, started: float, final: Path, tensors, small_files) -> None:
        try:
            write_checkpoint(
                final, tensors, small_files, self.keep_evaluated, self.rank, self.ranks
            )
        except OSError as error:
            return self._fail(step_of(final), error)
        self.failure, self._times['save_seconds'] = None, time.perf_counter() - started
        if self.mirror:
            self._sender.submit(self._send, final)

    def _fail(self, step: int, why) -> None:
        self.failure = f'checkpoint of step {step} not written: {why}; the earlier ones are intact'
        self._warnings.append(self.failure)

    def _send(self, final: Path) -> None:
        try:
            self.mirror.send(final)
        except Exception as error:  # a thread would swallow it
            if final.exists():  # else it was pruned meanwhile, and a newer one is next
                self._warnings.append(f'{final.name} not copied to {self.mirror}: {error}')

    def pop_warnings(self) -> list[str]:
        """The warnings since the last call."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def times(self) -> dict[str, float]:
        """New timings in seconds: 'save_pause' that training waited, 'save_seconds' in total."""
        times, self._times = self._times, {}
        return times

    def wait(self) -> None:
        """Wait until the checkpoint is on the disk; the mirror may lag behind."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def finish(self) -> None:
        """Wait for the disk and the mirror."""
        self.wait()
        self._writer.shutdown()
        self._sender.shutdown()


def lower_priority() -> None:
    """Give this thread the lowest CPU priority, so that it does not slow down training."""
    if sys.platform == 'linux':  # where priorities are per thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
