"""
Saves a run while it trains: a step waits only until the tensors have been copied.

    saver = Saver(out_dir, runtime, mirror='/bucket/my_run')
    saver.save(model, optimizers, tokenizer, state)
    for problem in saver.news(): ...
    saver.finish()

The mirror is a second place, such as a mounted bucket, that is given every finished checkpoint, its
manifest last: without one it does not count there. restore() brings the newest back to a disk that
is empty.
"""

import os
import shutil
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import filelock
import torch

from checkpoint import (
    MANIFEST,
    CheckpointError,
    clear,
    documents_of,
    flush,
    flush_all,
    hidden,
    listed,
    place,
    prune,
    read_state,
    saved_before,
    set_aside,
    sha256,
    size_of,
    step_of,
    tensors_of,
    verify,
    write,
)
from configurator import ConfigError, UserError
from folder import is_same
from runtime import Runtime

SMALL = 2**26  # bytes that are written at once: in a twentieth of a second, and none is lost to it
# what a run goes on with, besides its checkpoints
BESIDE = ('config.py', 'metrics.jsonl', 'reference.safetensors')


class Saver:
    """Writes the checkpoints of one run, one after the other.

    failure: why the last one is missing, None if it is not.
    """

    def __init__(
        self,
        out_dir: str | Path,
        runtime: Runtime,
        sharded: bool = False,
        keep_evaluated: bool = False,
        mirror: str | Path | None = None,
        run: str | None = None,
    ):
        self.out_dir, self.runtime, self.keep_evaluated = Path(out_dir), runtime, keep_evaluated
        self.rank, self.ranks = (runtime.rank, runtime.world_size) if sharded else (0, 1)
        self.mirror = Path(mirror) if mirror and runtime.main else None
        self.run = run  # as state.json calls it: the mirror of another is left alone
        self.failure: str | None = None
        self._times: dict[str, float] = {}
        self._news: list[str] = []
        self._copies: dict[tuple[str, str], torch.Tensor] = {}  # kept: fresh memory is slow
        self._writer = ThreadPoolExecutor(1, initializer=give_way)
        self._sender = ThreadPoolExecutor(1, initializer=give_way)
        self._writing: Future | None = None

    def save(self, model, optimizers, tokenizer, state: dict) -> None:
        """Save the run as it stands; see checkpoint.save(). All ranks call it of a sharded model,
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
        return self.runtime.agree(decide) if self.ranks > 1 else decide()

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
            send(final, self.mirror, self.keep_evaluated, self.run)
        except Exception as error:  # in a thread, where nobody would hear of it
            if final.exists():
                self._news.append(f'{final.name} is not copied to {self.mirror}: {error}')
            else:  # it has been pruned meanwhile, and a newer one is next
                remove(self.mirror / 'checkpoints' / final.name)

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


# -----------------------------------------------------------------------------
# the mirror: a folder that may be an object store, which has no renaming and no flushing


def send(path: Path, mirror: Path, keep_evaluated: bool, run: str | None = None) -> None:
    """Copy a checkpoint, and what lies beside the checkpoints, to the mirror.

    run: of whom it has to be, if it is of anybody. OSError where it is not, or cannot be written.
    """
    target = mirror / 'checkpoints' / path.name
    if run and {run_of(other) for other in listed(mirror)} - {None, run}:
        raise OSError('it has checkpoints of another run: give each a --checkpoint_mirror')
    for other in listed(mirror):
        if other == target or not (other / MANIFEST).is_file():  # of a process that was killed
            remove(other)
    target.mkdir(parents=True, exist_ok=True)
    for name in BESIDE:  # with each, as of its step: a file that is written anew can be cut short
        with suppress(FileNotFoundError):
            shutil.copyfile(path.parents[1] / name, target / name)
    files = [file for file in path.rglob('*') if file.is_file()]
    if not files:
        raise FileNotFoundError(f'{path} has been pruned meanwhile')
    for file in sorted(files, key=lambda file: file.name == MANIFEST):
        copy = target / file.relative_to(path)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    prune(target.parent, keep_evaluated, remove)


def run_of(path: Path) -> str | None:
    """What tells the checkpoints of one run from those of another; of older ones, None."""
    return (read_state(path) or {}).get('run')


def catch_up(path: Path, mirror: str | Path) -> None:
    """Have the mirror hold a checkpoint that a killed run had not copied yet."""
    if not (Path(mirror) / 'checkpoints' / path.name / MANIFEST).is_file():
        try:
            send(path, Path(mirror), keep_evaluated=True, run=run_of(path))
        except OSError as error:
            raise UserError(f'{path} cannot be copied to {mirror}: {error}') from error


def remove(path: Path) -> None:
    """Remove a mirrored checkpoint; it stops to count first."""
    with suppress(OSError):
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def check_mirror(mirror: str, out_dir: str | Path | None) -> None:
    """Refuse what cannot be a second place."""
    if '://' in mirror:
        raise ConfigError(
            f'checkpoint_mirror={mirror!r}: mount the bucket, and give the folder it is mounted at'
        )
    if out_dir and is_same(mirror, out_dir):
        raise ConfigError(f'checkpoint_mirror={mirror!r} is the out_dir: give a second folder')


def probe_mirror(mirror: str | Path) -> None:
    """Raise UserError unless the mirror can be written."""
    probe = Path(mirror) / '.write'
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f'checkpoint_mirror={str(mirror)!r}: cannot be written: {error.strerror}; give another '
            'folder, or leave it out'
        ) from error


def begin_mirror(mirror: str | Path, step: int) -> None:
    """Drop the checkpoints past `step`, -1 for a new run, which are now made, or made again."""
    for path in listed(mirror):
        if step_of(path) > step:
            remove(path)


def restore(mirror: str | Path, out_dir: str | Path) -> None:
    """Bring the mirror's newest checkpoint to out_dir, unless one as new is there, and whole."""
    there = [path for path in listed(mirror) if (path / MANIFEST).is_file()]
    here = next((path for path in reversed(listed(out_dir)) if is_whole(path)), None)
    runs = {run_of(path) for path in [*there, *([here] if here else [])]}
    if len(runs - {None}) > 1:
        raise UserError(
            f'checkpoint_mirror={str(mirror)!r} has checkpoints of another run than {out_dir}: '
            'give each a --checkpoint_mirror'
        )
    for path in reversed(there):
        if here and (step_of(path), path.name) <= (step_of(here), here.name):
            return
        if fetch(path, Path(out_dir)):
            return


def is_whole(path: Path) -> bool:
    try:
        return verify(path) is None
    except CheckpointError:
        return False


def fetch(path: Path, out_dir: Path, manifest: str | None = None) -> bool:
    """Copy a checkpoint from the mirror, if it is whole, with what lies beside the checkpoints.

    manifest: the hash of its manifest. A checkpoint of that name that is here with another one, or
    is damaged, is set aside.
    """
    final = out_dir / 'checkpoints' / path.name
    final.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out_dir / '.fetch.lock'):  # several machines may share the disk
        if is_whole(final) and manifest in (None, sha256(final / MANIFEST)):
            return True
        try:
            if final.exists():
                set_aside(final)
            clear(final, sum(file.stat().st_size for file in path.iterdir()))
            shutil.copytree(path, hidden(final), dirs_exist_ok=True)
            verify(hidden(final))
            flush_all(hidden(final))
        except CheckpointError as error:
            print(f'warning: {path}: {error}; trying another one', file=sys.stderr)
            return False
        except OSError as error:
            raise UserError(f'{path} cannot be brought to {out_dir}: {error}') from error
        for beside in (hidden(final) / name for name in BESIDE):
            if beside.exists():
                beside.replace(out_dir / beside.name)
        hidden(final).rename(final)
        flush(final.parent)
        return True
