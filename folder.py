"""
The folder of a run: its name, its lock, what may be in it at the start, its config.py.
"""

import random
import shutil
import time
from pathlib import Path

from filelock import FileLock, Timeout

from checkpoint import CheckpointError, find, listed, set_aside, step_of
from configurator import UserError

ADJECTIVES = 'able bold brisk calm clear deft eager fair fond glad keen lucid neat quick sunny warm'
NOUNS = 'badger beaver crane falcon finch heron ibis lark lynx marten otter owl raven robin tern'


def new_name() -> str:
    """A readable, fresh folder such as out/keen_otter-261120-1140: two words, date and time."""
    chance = random.Random()  # of its own: a name must not depend on the training seed
    words = f'{chance.choice(ADJECTIVES.split())}_{chance.choice(NOUNS.split())}'
    return f'out/{words}-{time.strftime("%y%m%d-%H%M")}'


def lock(out_dir: Path) -> FileLock:
    """Make the folder and keep other runs out of it for as long as the lock is held."""
    held = FileLock(out_dir / '.lock')
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f'{out_dir}: another run is writing here; wait for it or give another --out_dir'
        ) from None
    except OSError as error:
        raise UserError(f'{out_dir}: cannot be written: {error.strerror}') from error
    return held


def clear(out_dir: Path, overwrite: bool) -> None:
    """Make room for a run that starts anew; checkpoints are only deleted if asked to."""
    if listed(out_dir) and not overwrite:
        raise UserError(
            f'{out_dir} has checkpoints already: continue with --init_from=resume, give another '
            '--out_dir, or delete them with --overwrite'
        )
    for path in listed(out_dir):
        shutil.rmtree(path)
    (out_dir / 'metrics.jsonl').unlink(missing_ok=True)


def resume_point(out_dir: Path, which: str, or_start: bool) -> Path | None:
    """The checkpoint to go on from. Those of later steps are set aside: they are made again.

    or_start: where none can be loaded, set all aside and return None instead of raising.
    """
    path, kept = None, -1
    try:
        path = find(out_dir, which)
        kept = step_of(path)
    except CheckpointError:
        if not or_start:
            raise
    for later in [p for p in listed(out_dir) if step_of(p) > kept]:
        print(f'{later} is set aside as {set_aside(later).name}')
    return path


def write_config(out_dir: Path, config: dict, here: dict) -> None:
    """Write config.py: the settings, as a config that runs. here: what 'auto' came to."""
    lines = [f'# continue: python train.py {out_dir / "config.py"} --init_from=resume']
    for name, value in config.items():
        comment = f'  # here {here[name]}' if value == 'auto' and name in here else ''
        lines.append(f'{name} = {value!r}{comment}')
    (out_dir / 'config.py').write_text('\n'.join(lines) + '\n', encoding='utf-8')
