"""
What training minimises: the loss on text ('lm'), on the answers in conversations ('sft'), or on
pairs of a better answer and a worse ('dpo', Rafailov et al. 2023, "Direct Preference Optimization:
Your Language Model is Secretly a Reward Model").

    loss = loss_of(model, x, y)                         # 'lm', 'sft': -1 in y is not a target
    loss = loss_of(model, x, y, documents=numbers)      # and none attends to another document
    loss = loss_of(model, x, y, reference, beta=0.1)    # 'dpo': rows better, worse, better, ...

`reference` is what the model gave the same answers before training. It is computed once, by all
ranks together, and kept in the run's folder, where a resumed run finds it.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.nn import functional as F
from tqdm import tqdm

from flatgpt.data.dataset import SPLITS, Dataset
from flatgpt.errors import UserError
from flatgpt.files import new_file
from flatgpt.runtime import Runtime
from model import GPT

METRIC_NAMES = {
    'lm': ['loss'],
    'sft': ['loss'],
    'dpo': ['loss', 'reward_accuracy', 'reward_margin'],
}
REFERENCE = 'reference.safetensors'  # in the run's folder


def loss_of(model, x, y, reference=None, beta: float | None = None, documents=None):
    """The mean loss of a batch: in nats per target or, with a reference, per pair."""
    if reference is None:
        return model(x, y, documents=documents)[1]
    return dpo(completion_logps(model, x, y), reference, beta)[0].mean()


def compute_metrics(model, x, y, reference=None, beta: float | None = None, documents=None):
    """What METRIC_NAMES names, as means over a batch, and over how many targets, or pairs, they are."""
    if reference is None:
        return [model(x, y, documents=documents)[1]], (y >= 0).sum()
    losses, margins = dpo(completion_logps(model, x, y), reference, beta)
    means = [each.mean() for each in (losses, (margins > 0).float(), margins)]
    return means, losses.new_tensor(len(losses))


def completion_logps(model, x, y):
    """The log-probability of each row's targets together, (B,)."""
    logits = model(x)[0].float().flatten(0, 1)  # (B T, V)
    nats = F.cross_entropy(logits, y.flatten(), ignore_index=-1, reduction='none')
    return -nats.view_as(y).sum(1)


def dpo(logps, reference, beta: float):
    """
    The loss of each pair (equation 7), and its margin: by how much the reward of the better answer,
    beta * log(p / p_reference), is above that of the worse. logps, reference: (2 pairs,), better
    and worse in turn.
    """
    chosen, rejected = (beta * (logps - reference)).view(-1, 2).unbind(1)
    return -F.logsigmoid(chosen - rejected), chosen - rejected


def trim_padding(x: np.ndarray, y: np.ndarray, step: int = 64) -> list[np.ndarray]:
    """A batch without the columns after its last target, which change nothing; in whole steps."""
    last = int(np.flatnonzero((y >= 0).any(0))[-1]) + 1
    width = -(-last // step) * step
    return [np.ascontiguousarray(array[:, :width]) for array in (x, y)]


# -----------------------------------------------------------------------------
# the reference


def fingerprint(model: GPT, dtype: str) -> str:
    """What tells one reference model from another: its weights, and in what it computes."""
    digest = hashlib.sha256(dtype.encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def reference_logps(
    model: GPT, data: Dataset, runtime: Runtime, to_device: Callable, pairs_at_once: int
) -> dict[str, np.ndarray]:
    """What the model as it is now gives the answers of each split: (pairs, 2) log-probabilities."""
    model.eval()
    logps = {}
    for split in SPLITS:
        windows = data.eval_windows(split)
        found = np.zeros((len(windows), 2), np.float32)
        starts = range(0, len(windows), runtime.world_size * pairs_at_once)
        for i in tqdm(starts, f'reference of {split}', leave=False, disable=not runtime.live):
            first = i + runtime.rank * pairs_at_once
            mine = windows[first:][:pairs_at_once]
            # of a sharded model every rank has to compute, also where none is left for it
            x, y = to_device(
                *trim_padding(*data.eval_batch(split, mine if len(mine) else windows[:1]))
            )
            with runtime.autocast():
                answers = completion_logps(model, x, y).view(-1, 2).cpu().numpy()
            found[first : first + len(mine)] = answers[: len(mine)]
        every = runtime.reduce(found.ravel().tolist())  # each rank knows its own, and 0 elsewhere
        logps[split] = np.array(every, np.float32).reshape(-1, 2)
    model.train()
    return logps


def find_or_compute_reference(model: GPT, batches, run, config: dict) -> dict[str, np.ndarray]:
    """The reference of a run, from its folder, or computed by all ranks at its beginning."""
    path, key, runtime = run.out_dir / REFERENCE, run.state.reference_key, run.runtime
    logps = runtime.agree(lambda: read_reference(path, key))
    if logps is None and run.resume_from:
        raise UserError(
            f'{path}: is missing or not of the dataset as it is now, and the model that '
            f'the run began with is gone; start a new one with --init_from={run.out_dir} and '
            'another --out_dir'
        )
    if logps is None:
        runtime.print0('reference: the log-probabilities of all answers, once for the run ...')
        rows = config['batch_size']
        logps = reference_logps(model, batches.data, runtime, batches.to_device, rows)
    return logps


def read_reference(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """What a file holds, None unless it is there and of that key."""
    with suppress(FileNotFoundError, SafetensorError), safe_open(path, framework='np') as file:
        if (file.metadata() or {}).get('key') == key:
            return {split: file.get_tensor(split) for split in SPLITS}
    return None


def write_reference(path: Path, key: str, logps: dict[str, np.ndarray]) -> None:
    try:
        with new_file(path) as part:
            save_file(logps, part, metadata={'key': key})
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path}: cannot be written: {error}') from error
