"""
The folder of a run: its name, its lock, where a run in it starts, its config.py.

Nothing in it changes before remove_later_steps(), which a run calls when nothing can be wrong with its settings
any more.
"""

import random
import shlex
import shutil
import time
from pathlib import Path

from filelock import FileLock, Timeout

from flatgpt.checkpoint.load import find, listed, read_state, step_of
from flatgpt.checkpoint.save import set_aside
from flatgpt.errors import CheckpointError, UserError
from flatgpt.files import new_file

ADJECTIVES = 'able bold brisk calm clear deft eager fair fond glad keen lucid neat quick sunny warm'
NOUNS = 'badger beaver crane falcon finch heron ibis lark lynx marten otter owl raven robin tern'


def new_name() -> str:
    """A readable, fresh folder such as out/keen_otter-261120-1140: two words, date and time."""
    chance = random.Random()  # of its own: a name must not depend on the training seed
    words = f'{chance.choice(ADJECTIVES.split())}_{chance.choice(NOUNS.split())}'
    return f'out/{words}-{time.strftime("%y%m%d-%H%M")}'


def lock(out_dir: Path) -> FileLock:
    """Make the folder and keep other runs out of it for as long as the lock is held."""
    held = FileLock(out_dir / '.lock', is_singleton=True)  # asked for twice, it is the same
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


def saved_settings_in(out_dir: str | Path | None) -> dict:
    """The settings that the folder's last readable checkpoint was made with, {} without one."""
    states = (read_state(path) for path in reversed(listed(out_dir) if out_dir else []))
    return next((state['config'] for state in states if state), {})


def resume_point(out_dir: Path, config: dict) -> Path | None:
    """The verified checkpoint to go on from; None with auto_resume where none can be loaded."""
    if config['init_from'] == 'resume':
        return find(out_dir, config['checkpoint'] or 'last')
    try:
        return find(out_dir, 'last') if listed(out_dir) else None
    except CheckpointError:
        return None


def refuse_used(*folders: str | Path | None) -> None:
    """Refuse to begin a run in these, of which None is left out, if one has a run in it."""
    for where in filter(None, folders):
        if listed(where):
            raise UserError(
                f'{where} has checkpoints already: continue with --init_from=resume, give another '
                '--out_dir, or delete them with --overwrite'
            )


def remove_later_steps(out_dir: Path, step: int, overwrite: bool) -> None:
    """Make room for the steps past `step`, -1 for a new run, which are now made, or made again.

    Their checkpoints are set aside under another name; a new run with overwrite deletes them.
    mirror.begin_mirror() does the same where nothing can be renamed.
    """
    for path in listed(out_dir):
        if overwrite and step < 0:
            shutil.rmtree(path)
        elif step_of(path) > step:
            try:
                print(f'{path} is set aside as {set_aside(path).name}')
            except OSError as error:
                raise UserError(f'{path} cannot be renamed: {error.strerror}; remove it') from error
    (out_dir / 'DONE').unlink(missing_ok=True)


def write_config(out_dir: Path, config: dict, here: dict) -> None:
    """Write config.py: the settings, as a config that runs. here: what 'auto' came to."""
    lines = [
        f'# continue: python train.py {shlex.quote(str(out_dir / "config.py"))} --init_from=resume',
        'from pathlib import Path\n',
        'out_dir = str(Path(__file__).parent)  # wherever this folder has been moved to',
    ]
    for name, value in config.items():
        if name == 'out_dir':
            continue
        comment = f'  # here {here[name]}' if value == 'auto' and name in here else ''
        lines.append(f'{name} = {value!r}{comment}')
    with new_file(out_dir / 'config.py') as part:  # a folder's name may be in no encoding
        part.write_text('\n'.join(lines) + '\n', encoding='utf-8', errors='replace')
