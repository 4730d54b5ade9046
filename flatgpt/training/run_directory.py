"""
The run directory: its name, its lock, the checkpoint to resume from, its config.py.

Nothing in it changes before remove_later_steps(), which a run calls once its settings are valid.
"""

import random
import shlex
import shutil
import time
from pathlib import Path

from filelock import FileLock, Timeout

from flatgpt.checkpoint.load import find_checkpoint, list_checkpoints, read_state, step_of
from flatgpt.checkpoint.save import set_aside
from flatgpt.errors import CheckpointError, UserError
from flatgpt.files import atomic_file, is_same_path

ADJECTIVES = 'able bold brisk calm clear deft eager fair fond glad keen lucid neat quick sunny warm'
NOUNS = 'badger beaver crane falcon finch heron ibis lark lynx marten otter owl raven robin tern'


def new_name() -> str:
    """A new, readable name such as out/keen_otter-261120-1140: two words, date and time."""
    rng = random.Random()  # a separate one: the name must not depend on the training seed
    words = f'{rng.choice(ADJECTIVES.split())}_{rng.choice(NOUNS.split())}'
    return f'out/{words}-{time.strftime("%y%m%d-%H%M")}'


def lock(out_dir: Path) -> FileLock:
    """Create the directory and keep other runs out of it while the lock is held."""
    # a singleton: a second call returns the same lock
    file_lock = FileLock(out_dir / '.lock', is_singleton=True)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        file_lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f'{out_dir}: another run is writing here; wait for its end or choose another --out_dir'
        ) from None
    except OSError as error:
        raise UserError(
            f'{out_dir}: cannot be written: {error.strerror}; choose another --out_dir'
        ) from error
    return file_lock


def saved_settings_in(out_dir: str | Path | None) -> dict:
    """The settings saved with the last readable checkpoint in a run directory; {} if none."""
    states = (read_state(path) for path in reversed(list_checkpoints(out_dir) if out_dir else []))
    return next((state['config'] for state in states if state), {})


def resume_point(out_dir: Path, config: dict) -> Path | None:
    """The verified checkpoint to resume from; None with auto_resume if none can be loaded."""
    if config['init_from'] == 'resume':
        path = find_checkpoint(out_dir, config['checkpoint'] or 'last')
        reject_other_run(path, out_dir, config)
        return path
    try:
        return find_checkpoint(out_dir, 'last') if list_checkpoints(out_dir) else None
    except CheckpointError:
        return None


def reject_other_run(path: Path, out_dir: Path, config: dict) -> None:
    """Reject resuming a run from a checkpoint outside its directory and its mirror."""
    run, mirror = path.parents[1], config['checkpoint_mirror']
    if not any(is_same_path(run, own) for own in (out_dir, mirror) if own):
        raise UserError(
            f'checkpoint={config["checkpoint"]!r}: is not of {out_dir}, the run to resume; to '
            f'resume its own run, use --out_dir={shlex.quote(str(run))}; to start a new run from '
            f'it, use --init_from={shlex.quote(str(path))} and another --out_dir'
        )


def reject_used(out_dir: str | Path, mirror: str | Path | None) -> None:
    """Reject a new run if its run directory or its mirror already has checkpoints."""
    for where, flag in ((out_dir, '--out_dir'), (mirror, '--checkpoint_mirror')):
        if where and list_checkpoints(where):
            raise UserError(
                f'{where} has checkpoints already: resume with --init_from=resume, choose another '
                f'{flag}, or delete them with --overwrite'
            )


def remove_later_steps(out_dir: Path, step: int, overwrite: bool) -> None:
    """Rename the checkpoints after `step` (-1: a new run), whose steps will be trained again.

    A new run with overwrite deletes them. mirror.remove_later() does this for a mirror, where
    nothing can be renamed.
    """
    for path in list_checkpoints(out_dir):
        if overwrite and step < 0:
            shutil.rmtree(path)
        elif step_of(path) > step:
            try:
                print(f'{path} is renamed to {set_aside(path).name}')
            except OSError as error:
                raise UserError(
                    f'{path} cannot be renamed: {error.strerror}; move or delete it'
                ) from error
    (out_dir / 'DONE').unlink(missing_ok=True)


def write_config(out_dir: Path, config: dict, here: dict) -> None:
    """Write config.py, which starts the run again. here: what 'auto' stands for on this machine."""
    lines = [
        f'# resume: python train.py {shlex.quote(str(out_dir / "config.py"))} --init_from=resume',
        'from pathlib import Path\n',
        'out_dir = str(Path(__file__).parent)  # also after this directory was moved',
    ]
    for name, value in config.items():
        if name == 'out_dir':
            continue
        comment = f'  # here {here[name]}' if value == 'auto' and name in here else ''
        lines.append(f'{name} = {value!r}{comment}')
    with atomic_file(out_dir / 'config.py') as part:  # a path may not be valid in any encoding
        part.write_text('\n'.join(lines) + '\n', encoding='utf-8', errors='replace')
