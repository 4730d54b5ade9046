"""
A second copy of a run's checkpoints, in a folder that may be a mounted bucket of an object store:
renames are not atomic there, and nothing is flushed.

    send_checkpoint(path, mirror, keep_evaluated=False)   # manifest last: without it, incomplete
    restore_newest(mirror, out_dir)                       # copy the newest back to an empty disk
"""

import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

from flatgpt.checkpoint.load import (
    MANIFEST_FILE,
    find_damage,
    list_checkpoints,
    read_state,
    step_of,
)
from flatgpt.checkpoint.save import make_temp_folder, prune, set_aside, temp_path
from flatgpt.errors import ConfigError, UserError
from flatgpt.files import fsync, fsync_tree, is_same_path, sha256

# files of a run directory that a resumed run needs, in addition to a checkpoint
BESIDE_CHECKPOINTS = ('config.py', 'metrics.jsonl', 'reference.safetensors')


@dataclass(frozen=True)
class Mirror:
    """The mirror of one run. run: its id in state.json; another run's mirror is not written."""

    folder: Path
    keep_evaluated: bool = False  # keep every evaluated checkpoint
    run: str | None = None

    def __str__(self) -> str:
        return str(self.folder)

    def send(self, path: Path) -> None:
        send_checkpoint(path, self.folder, self.keep_evaluated, self.run)


def send_checkpoint(path: Path, mirror: Path, keep_evaluated: bool, run: str | None = None) -> None:
    """Copy a checkpoint, with BESIDE_CHECKPOINTS, to the mirror, and prune the mirror.

    run: the id of its run. UserError if the mirror is another run's, OSError if it cannot be
    written.
    """
    target = mirror / 'checkpoints' / path.name
    if run:
        check_one_run(mirror, {run, *map(run_id, list_checkpoints(mirror))})
    for other in list_checkpoints(mirror):
        if other == target or not (other / MANIFEST_FILE).is_file():  # incomplete
            remove_mirrored(other)
    try:
        copy_checkpoint(target, path)
    except OSError:
        if not path.exists():  # pruned meanwhile
            remove_mirrored(target)
        raise
    prune(target.parent, keep_evaluated, remove_mirrored)


def copy_checkpoint(target: Path, path: Path) -> None:
    """Copy the files of a checkpoint, its manifest last."""
    target.mkdir(parents=True, exist_ok=True)
    for name in BESIDE_CHECKPOINTS:  # a copy per checkpoint: one file for all could be truncated
        with suppress(FileNotFoundError):
            shutil.copyfile(path.parents[1] / name, target / name)
    files = [file for file in path.rglob('*') if file.is_file()]
    if not files:
        raise FileNotFoundError(f'{path} has been pruned meanwhile')
    for file in sorted(files, key=lambda file: file.name == MANIFEST_FILE):
        copy = target / file.relative_to(path)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def run_id(path: Path) -> str | None:
    """The id of the run that wrote a checkpoint, None for older ones."""
    return (read_state(path) or {}).get('run')


def check_one_run(mirror: str | Path, runs: set[str | None]) -> None:
    if len(runs - {None}) > 1:
        raise UserError(
            f'checkpoint_mirror={str(mirror)!r} has checkpoints of another run; give each run its '
            'own --checkpoint_mirror'
        )


def copy_if_missing(path: Path, mirror: str | Path) -> None:
    """Copy a checkpoint to the mirror, if a killed run had not done so yet."""
    if not (Path(mirror) / 'checkpoints' / path.name / MANIFEST_FILE).is_file():
        try:
            send_checkpoint(path, Path(mirror), keep_evaluated=True, run=run_id(path))
        except OSError as error:
            raise UserError(
                f'{path} cannot be copied to {mirror}: {error}; make room or give another '
                '--checkpoint_mirror'
            ) from error


def remove_mirrored(path: Path) -> None:
    """Remove a mirrored checkpoint; the manifest first, so that it is never half valid."""
    with suppress(OSError):
        (path / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def check_mirror(mirror: str, out_dir: str | Path | None) -> None:
    """ConfigError for a mirror that is a URL or the run directory itself."""
    if '://' in mirror:
        raise ConfigError(
            f'checkpoint_mirror={mirror!r} is a URL; mount the bucket and give its folder'
        )
    if out_dir and is_same_path(mirror, out_dir):
        raise ConfigError(f'checkpoint_mirror={mirror!r} is the out_dir; give another folder')


def probe_mirror(mirror: str | Path) -> None:
    """UserError unless the mirror can be written."""
    probe = Path(mirror) / '.write'
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f'checkpoint_mirror={str(mirror)!r} cannot be written: {error.strerror}; give another '
            'folder, or remove it'
        ) from error


def remove_later(mirror: str | Path, step: int) -> None:
    """Remove the checkpoints after `step`, -1 for a new run: they will be written again."""
    for path in list_checkpoints(mirror):
        if step_of(path) > step:
            remove_mirrored(path)


def restore_newest(mirror: str | Path, out_dir: str | Path) -> None:
    """Copy the mirror's newest checkpoint to out_dir, unless out_dir has an intact one as new."""
    mirrored = [path for path in list_checkpoints(mirror) if (path / MANIFEST_FILE).is_file()]
    local = next((path for path in reversed(list_checkpoints(out_dir)) if is_intact(path)), None)
    check_one_run(mirror, {run_id(path) for path in [*mirrored, *([local] if local else [])]})
    for path in reversed(mirrored):
        if local and (step_of(path), path.name) <= (step_of(local), local.name):
            return
        if fetch_checkpoint(path, Path(out_dir)):
            return


def is_intact(path: Path) -> bool:
    return find_damage(path) is None


def fetch_checkpoint(path: Path, out_dir: Path, manifest: str | None = None) -> bool:
    """Copy a checkpoint with BESIDE_CHECKPOINTS from the mirror -> whether it is intact.

    manifest: the hash of its manifest. A local checkpoint of that name is set aside if it has
    another one or is damaged.
    """
    final = out_dir / 'checkpoints' / path.name
    final.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out_dir / '.fetch.lock'):  # several machines may share the disk
        if is_intact(final) and manifest in (None, sha256(final / MANIFEST_FILE)):
            return True
        try:
            if final.exists():
                set_aside(final)
            make_temp_folder(final, sum(file.stat().st_size for file in path.iterdir()))
            shutil.copytree(path, temp_path(final), dirs_exist_ok=True)
            if damage := find_damage(temp_path(final)):
                print(f'warning: {path} is damaged: {damage}; trying another one', file=sys.stderr)
                return False
            fsync_tree(temp_path(final))
        except OSError as error:
            raise UserError(
                f'{path} cannot be copied to {out_dir}: {error}; make room or give another '
                '--out_dir'
            ) from error
        for beside in (temp_path(final) / name for name in BESIDE_CHECKPOINTS):
            if beside.exists():
                beside.replace(out_dir / beside.name)
        temp_path(final).rename(final)
        fsync(final.parent)
        return True
