"""
A second place for a run's checkpoints: a folder that may be an object store, such as a mounted
bucket, which has no renaming and no flushing.

    send(path, mirror, keep_evaluated=False, run='...')   # its manifest last: without, it is none
    restore(mirror, out_dir)                              # the newest, back to a disk that is empty
"""

import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

from flatgpt.checkpoint.load import MANIFEST, list_checkpoints, read_state, step_of, verify
from flatgpt.checkpoint.save import make_temp_folder, prune, set_aside, temp_path
from flatgpt.errors import CheckpointError, ConfigError, UserError
from flatgpt.files import flush, flush_all, is_same, sha256

# what a run goes on with, besides its checkpoints
BESIDE_CHECKPOINTS = ('config.py', 'metrics.jsonl', 'reference.safetensors')


@dataclass(frozen=True)
class Mirror:
    """The mirror of one run. run: as state.json calls it; the mirror of another is left alone."""

    folder: Path
    keep_evaluated: bool = False  # every checkpoint that was evaluated, as in the run's own folder
    run: str | None = None

    def __str__(self) -> str:
        return str(self.folder)

    def send(self, path: Path) -> None:
        send(path, self.folder, self.keep_evaluated, self.run)


def send(path: Path, mirror: Path, keep_evaluated: bool, run: str | None = None) -> None:
    """Copy a checkpoint, and what lies beside the checkpoints, to the mirror.

    run: of whom it has to be, if it is of anybody. OSError where it is not, or cannot be written.
    """
    target = mirror / 'checkpoints' / path.name
    if run and {run_of(other) for other in list_checkpoints(mirror)} - {None, run}:
        raise OSError('it has checkpoints of another run: give each a --checkpoint_mirror')
    for other in list_checkpoints(mirror):
        if other == target or not (other / MANIFEST).is_file():  # of a process that was killed
            remove(other)
    try:
        fill(target, path)
    except OSError:
        if not path.exists():  # pruned meanwhile: half of it would never count
            remove(target)
        raise
    prune(target.parent, keep_evaluated, remove)


def fill(target: Path, path: Path) -> None:
    """Copy the files of a checkpoint, its manifest last."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (
        BESIDE_CHECKPOINTS
    ):  # with each, as of its step: a file that is written anew can be cut short
        with suppress(FileNotFoundError):
            shutil.copyfile(path.parents[1] / name, target / name)
    files = [file for file in path.rglob('*') if file.is_file()]
    if not files:
        raise FileNotFoundError(f'{path} has been pruned meanwhile')
    for file in sorted(files, key=lambda file: file.name == MANIFEST):
        copy = target / file.relative_to(path)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def run_of(path: Path) -> str | None:
    """What tells the checkpoints of one run from those of another; of older ones, None."""
    return (read_state(path) or {}).get('run')


def copy_if_missing(path: Path, mirror: str | Path) -> None:
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


def remove_later(mirror: str | Path, step: int) -> None:
    """Drop the checkpoints past `step`, -1 for a new run, which are now made, or made again."""
    for path in list_checkpoints(mirror):
        if step_of(path) > step:
            remove(path)


def restore(mirror: str | Path, out_dir: str | Path) -> None:
    """Bring the mirror's newest checkpoint to out_dir, unless one as new is there, and whole."""
    there = [path for path in list_checkpoints(mirror) if (path / MANIFEST).is_file()]
    here = next((path for path in reversed(list_checkpoints(out_dir)) if is_whole(path)), None)
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
            make_temp_folder(final, sum(file.stat().st_size for file in path.iterdir()))
            shutil.copytree(path, temp_path(final), dirs_exist_ok=True)
            verify(temp_path(final))
            flush_all(temp_path(final))
        except CheckpointError as error:
            print(f'warning: {path}: {error}; trying another one', file=sys.stderr)
            return False
        except OSError as error:
            raise UserError(f'{path} cannot be brought to {out_dir}: {error}') from error
        for beside in (temp_path(final) / name for name in BESIDE_CHECKPOINTS):
            if beside.exists():
                beside.replace(out_dir / beside.name)
        temp_path(final).rename(final)
        flush(final.parent)
        return True
