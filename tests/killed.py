"""
Saves checkpoints in processes that are killed, each one file operation later.

$ python tests/killed.py background|again|part-0|part-1|mirror|mirror-again FOLDER

Prints a JSON line for each kill: the step being saved, the last step that can be loaded afterwards,
and the contents of the checkpoint directory after the next save. Damaged checkpoints would be
reported on standard error.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from flatgpt.checkpoint import load, mirror
from flatgpt.checkpoint import save as save_module
from flatgpt.runtime import Runtime
from model import GPT, GPTConfig

WHAT, FOLDER = sys.argv[1], Path(sys.argv[2])
AGAIN, MIRRORED = WHAT.endswith('again'), WHAT.startswith('mirror')
OUT_DIR, MIRROR = FOLDER / 'run', FOLDER / 'mirror'
model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16))
optimizer = torch.optim.AdamW(model.parameters())
operations, kill_at = 0, None


def hook(event, args):
    global operations
    if kill_at and (event == 'open' or event.startswith(('os.', 'shutil.'))):
        operations += 1
        if operations == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def forked(work, *args, at=None) -> int:
    """Fork a process that runs `work` and is killed at its file operation `at` -> its pid."""
    global kill_at
    child = os.fork()
    if child == 0:
        kill_at = at
        work(*args)
        os._exit(0)
    return child


def killed(child: int) -> bool:
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def state_of(step, evaluated=True):
    return {'step': step, 'val_loss': 1.0 + step, 'evaluated': evaluated}


def in_background(step):
    run = save_module.Saver(OUT_DIR, Runtime('cpu', torch.float32))
    run.save(model, [optimizer], None, state_of(step))
    time.sleep(0.01)  # training continues
    run.finish()


def write_part(step, rank):
    """One of two ranks: write the first or the second half of each tensor."""

    def half(tensor):
        return tensor[len(tensor) // 2 :] if rank else tensor[: len(tensor) // 2]

    tensors = save_module.tensors_of(model, [optimizer])
    mine = {file: {k: half(t) for k, t in named.items()} for file, named in tensors.items()}
    documents = save_module.small_files_of(model, None, state_of(step))
    final = save_module.checkpoint_path(OUT_DIR, state_of(step))
    save_module.write_checkpoint(final, mine, documents, False, rank, 2)


def in_parts(step, at, victim):
    save_module.make_temp_folder(save_module.checkpoint_path(OUT_DIR, state_of(step)), 0)
    ranks = [forked(write_part, step, rank, at=at if rank == victim else None) for rank in (0, 1)]
    died = killed(ranks[victim])
    if died and victim == 1:  # torchrun ends the other one
        os.kill(ranks[0], signal.SIGKILL)
    killed(ranks[1 - victim])
    return died


def save(step, at=None) -> bool:
    """Save a step in the way of WHAT -> whether it was killed at file operation `at`."""
    for parameter in model.parameters():
        parameter.data += 0.01
    if AGAIN:  # first as a stopped run does, then as the resumed one evaluates it
        path = save_module.save_checkpoint(OUT_DIR, model, [optimizer], None, state_of(step, False))
        if MIRRORED:
            mirror.send_checkpoint(path, MIRROR, False)
    if WHAT in ('background', 'again'):
        return killed(forked(in_background, step, at=at))
    if WHAT.startswith('part'):
        return in_parts(step, at, victim=int(WHAT[-1]))
    path = save_module.save_checkpoint(OUT_DIR, model, [optimizer], None, state_of(step))
    return killed(forked(mirror.send_checkpoint, path, MIRROR, False, at=at))


def last_step(number) -> int:
    """The step of the checkpoint that a new process would resume from."""
    where = OUT_DIR
    if MIRRORED:
        where = FOLDER / f'new-{number}'
        mirror.restore_newest(MIRROR, where)
    model_, _, state = load.load_checkpoint(load.find_checkpoint(where, 'last'))
    assert all(parameter.isfinite().all() for parameter in model_.parameters())
    shutil.rmtree(FOLDER / f'new-{number}', ignore_errors=True)
    return state['step']


torch.set_num_threads(1)
save_module.SYNC_SAVE_BYTES = 0
sys.addaudithook(hook)
for number in (1, 2, 3):
    save(number)
died, at = True, 0
while died and at < 999:
    at, number = at + 1, number + 1
    died = save(number, at)
    reached = last_step(number)
    number += 1
    save(number)
    left = sorted(path.name for path in load.list_checkpoints(MIRROR if MIRRORED else OUT_DIR))
    print(json.dumps([number - 1, reached, left]))
