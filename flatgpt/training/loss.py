"""
The losses: on text ('lm'), on assistant messages ('sft'), or on preference pairs ('dpo', Rafailov
et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model").

    loss = loss_of(model, x, y)                         # 'lm', 'sft': -1 in y is not a target
    loss = loss_of(model, x, y, documents=numbers)      # no attention across documents
    loss = loss_of(model, x, y, reference, beta=0.1)    # 'dpo': rows chosen, rejected, chosen, ...

`reference` has the log-probabilities of the same completions under the initial model. All ranks
compute it once; REFERENCE_FILE keeps it for a resumed run.
"""

import hashlib
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.nn import functional as F

from flatgpt.data.dataset import SPLITS, Dataset
from flatgpt.errors import UserError
from flatgpt.files import atomic_file
from flatgpt.runtime import Runtime
from model import GPT

METRIC_NAMES = {
    'lm': ['loss'],
    'sft': ['loss'],
    'dpo': ['loss', 'reward_accuracy', 'reward_margin'],
}
REFERENCE_FILE = 'reference.safetensors'  # in the run directory


def loss_of(model, x, y, reference=None, beta: float | None = None, documents=None):
    """Mean loss of a batch, in nats per target; with a reference, per pair."""
    if reference is None:
        return model(x, y, documents=documents)[1]
    return dpo_loss(completion_logps(model, x, y), reference, beta)[0].mean()


def compute_metrics(model, x, y, reference=None, beta: float | None = None, documents=None):
    """The batch means of METRIC_NAMES, and the number of targets or pairs that they are over."""
    if reference is None:
        return [model(x, y, documents=documents)[1]], (y >= 0).sum()
    losses, margins = dpo_loss(completion_logps(model, x, y), reference, beta)
    means = [values.mean() for values in (losses, (margins > 0).float(), margins)]
    return means, losses.new_tensor(len(losses))


def completion_logps(model, x, y):
    """The sum of the log-probabilities of each row's targets, (B,)."""
    logits = model(x)[0].float().flatten(0, 1)  # (B T, V)
    nats = F.cross_entropy(logits, y.flatten(), ignore_index=-1, reduction='none')
    return -nats.view_as(y).sum(1)


def dpo_loss(logps, reference, beta: float):
    """The loss of each pair (equation 7) and its reward margin.

    The reward of a completion is beta * log(p / p_reference); the margin is that of the chosen one
    minus that of the rejected one. logps, reference: (2 pairs,), chosen and rejected alternating.
    """
    chosen, rejected = (beta * (logps - reference)).view(-1, 2).unbind(1)
    return -F.logsigmoid(chosen - rejected), chosen - rejected


def trim_padding(x: np.ndarray, y: np.ndarray, step: int = 64) -> list[np.ndarray]:
    """The batch without the columns after its last target; its width is a multiple of `step`."""
    last = int(np.flatnonzero((y >= 0).any(0))[-1]) + 1
    width = -(-last // step) * step
    return [np.ascontiguousarray(array[:, :width]) for array in (x, y)]


# -----------------------------------------------------------------------------
# the reference log-probabilities


def reference_fingerprint(model: GPT, dtype: str) -> str:
    """A hash that identifies a reference model: its weights and dtype."""
    digest = hashlib.sha256(dtype.encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def reference_logps(
    model: GPT, data: Dataset, runtime: Runtime, to_device: Callable, pairs_at_once: int
) -> dict[str, np.ndarray]:
    """Log-probabilities of the completions of each split under this model, (pairs, 2)."""
    model.eval()
    logps = {}
    for split in SPLITS:
        windows = data.eval_starts(split)
        found = np.zeros((len(windows), 2), np.float32)
        title = f'reference of {split}'
        for first, mine, count in runtime.rank_batches(windows, pairs_at_once, title):
            x, y = to_device(*trim_padding(*data.eval_batch(split, mine)))
            with runtime.autocast():
                pairs = completion_logps(model, x, y).view(-1, 2).cpu().numpy()
            found[first : first + count] = pairs[:count]
        summed = runtime.all_reduce(found.ravel().tolist())  # each rank has zeros for the others'
        logps[split] = np.array(summed, np.float32).reshape(-1, 2)
    model.train()
    return logps


def find_or_compute_reference(model: GPT, batches, run, config: dict) -> dict[str, np.ndarray]:
    """The reference log-probabilities of each split, (pairs, 2): from the run directory or, for a
    new run, computed by all ranks."""
    path, key, runtime = run.out_dir / REFERENCE_FILE, run.state.reference_key, run.runtime
    logps = runtime.broadcast_from_rank0(lambda: read_reference(path, key))
    if logps is None and run.resume_from:
        raise UserError(
            f'{path}: is missing or does not match the dataset, and the initial model of the run '
            'is not available; start a new run with another --out_dir and '
            f'--init_from={shlex.quote(str(run.out_dir))}'
        )
    if logps is None:
        runtime.print0('computing the log-probabilities of the reference model, once per run ...')
        rows = config['batch_size']
        logps = reference_logps(model, batches.data, runtime, batches.to_device, rows)
    return logps


def read_reference(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """The contents of the file; None if it does not exist or has another key."""
    with suppress(FileNotFoundError, SafetensorError), safe_open(path, framework='np') as file:
        if (file.metadata() or {}).get('key') == key:
            return {split: file.get_tensor(split) for split in SPLITS}
    return None


def write_reference(path: Path, key: str, logps: dict[str, np.ndarray]) -> None:
    try:
        with atomic_file(path) as part:
            save_file(logps, part, metadata={'key': key})
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path}: cannot be written: {error}; choose another --out_dir') from error
