"""
The losses: on text ('lm'), on assistant messages ('sft'), on preference pairs ('dpo', Rafailov et
al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", and
'reward', Ouyang et al. 2022, InstructGPT), or on completions with rewards ('rl', Williams 1992,
REINFORCE).

    loss = loss_of(model, x, y)                         # 'lm', 'sft': -1 in y is not a target
    loss = loss_of(model, x, y, documents=numbers)      # no attention across documents
    loss = loss_of(model, x, y, soft_targets=p)         # 'lm': a distribution per token
    loss = loss_of(model, x, y, reference, beta=0.1)    # 'dpo': rows chosen, rejected, chosen, ...
    loss = loss_of(model, x, ends=positions)            # 'reward': the same rows; last tokens
    loss = loss_of(model, x, y, advantages=values)      # 'rl': a value per row

`reference` has the log-probabilities of the same completions under the initial model: for 'dpo' of
whole ones, which all ranks compute once, and REFERENCE_FILE keeps them for a resumed run; for 'rl'
of each token.
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

PAIR_METRICS = ['loss', 'reward_accuracy', 'reward_margin']
METRIC_NAMES = {'lm': ['loss'], 'sft': ['loss'], 'dpo': PAIR_METRICS, 'reward': PAIR_METRICS}
REFERENCE_FILE = 'reference.safetensors'  # in the run directory


def loss_of(
    model,
    x,
    y=None,
    reference=None,
    beta: float | None = None,
    documents=None,
    advantages=None,
    suppressed=None,
    at=None,
    ends=None,
    soft_targets=None,
):
    """Mean loss of a batch, in nats per target; for pairs, per pair. suppressed, at: see
    token_logps(). soft_targets: see soft_loss()."""
    if ends is not None:
        return preference_loss(model(x, ends=ends)[0])[0].mean()
    if advantages is not None:
        return rl_loss(token_logps(model, x, y, suppressed, at), y, advantages, reference, beta)
    if soft_targets is not None:
        return soft_loss(model(x)[0], soft_targets)
    if reference is None:
        return model(x, y, documents=documents)[1]
    return dpo_loss(completion_logps(model, x, y), reference, beta)[0].mean()


def compute_metrics(
    model, x, y=None, reference=None, beta: float | None = None, documents=None, ends=None
):
    """The batch means of METRIC_NAMES, and the number of targets or pairs that they are over."""
    if reference is None and ends is None:
        return [model(x, y, documents=documents)[1]], (y >= 0).sum()
    if ends is not None:
        losses, margins = preference_loss(model(x, ends=ends)[0])
    else:
        losses, margins = dpo_loss(completion_logps(model, x, y), reference, beta)
    means = [values.mean() for values in (losses, (margins > 0).float(), margins)]
    return means, losses.new_tensor(len(losses))


def soft_loss(logits, soft_targets):
    """Mean cross-entropy with a distribution per token. soft_targets (B, T, V) may have fewer
    columns than the logits: a model's vocabulary may be padded."""
    logps = F.log_softmax(logits.float(), dim=-1)[..., : soft_targets.size(-1)]
    return -(soft_targets * logps).sum(-1).mean()


def completion_logps(model, x, y):
    """The sum of the log-probabilities of each row's targets, (B,)."""
    return token_logps(model, x, y).sum(1)


def token_logps(model, x, y, suppressed=None, at=None):
    """The log-probability of each target, 0 where there is none (B, T).

    suppressed (V,): tokens that are never sampled, and have no share of the probability. at (N,):
    the positions of all targets in the flattened y; only their logits are computed.
    """
    if at is None:
        at = torch.arange(y.numel(), device=y.device)
    nats = model(x, y, at=at, suppressed=suppressed)[1]
    return -nats.new_zeros(y.numel()).index_put((at,), nats).view_as(y)


def rl_loss(logps, y, advantages, reference=None, beta: float | None = None):
    """The mean over the targets of -advantage * log p, whose gradient is the policy gradient.

    beta: strength of the KL penalty to the reference. logps, reference (B, T) are of the targets
    in y, 0 elsewhere; advantages (B,).
    """
    loss = -(advantages[:, None] * logps).sum()
    if reference is not None:
        loss = loss + beta * kl_estimate(logps, reference).sum()
    return loss / (y >= 0).sum()


def kl_estimate(logps, reference):
    """An estimate of the KL divergence from the reference at each sampled token, which is never
    negative: k3 of Schulman (2020), "Approximating KL Divergence"."""
    ratio = reference - logps
    return ratio.exp() - 1 - ratio


def dpo_loss(logps, reference, beta: float):
    """preference_loss() of the rewards beta * log(p / p_reference) of the completions (equation 7).

    logps, reference: (2 pairs,), chosen and rejected alternating.
    """
    return preference_loss(beta * (logps - reference))


def preference_loss(rewards):
    """The loss of each pair and its margin, the reward of the chosen completion minus that of the
    rejected one (2 pairs,): minus the log of the probability of the preference, as Bradley and
    Terry (1952) model it."""
    chosen, rejected = rewards.view(-1, 2).unbind(1)
    return -F.logsigmoid(chosen - rejected), chosen - rejected


def trim_padding(x: np.ndarray, y: np.ndarray, step: int = 64) -> list[np.ndarray]:
    """The batch without the columns after its last target in x; its width is a multiple of `step`,
    unless the batch is not."""
    width = -(-int(last_tokens(y).max() + 1) // step) * step
    return [np.ascontiguousarray(array[:, :width]) for array in (x, y)]


def last_tokens(y: np.ndarray) -> np.ndarray:
    """The position in x of each row's last target, one after its position in y (B,)."""
    return y.shape[1] - (y >= 0)[:, ::-1].argmax(1)


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
        raise reference_lost(path, run.out_dir)
    if logps is None:
        runtime.print0('computing the log-probabilities of the reference model, once per run ...')
        rows = config['batch_size']
        logps = reference_logps(model, batches.data, runtime, batches.to_device, rows)
    return logps


def reference_lost(path: Path, out_dir: Path) -> UserError:
    return UserError(
        f'{path}: is missing or belongs to another run; it cannot be computed again, because the '
        'initial model of the run was not kept; start a new run with another --out_dir and '
        f'--init_from={shlex.quote(str(out_dir))}'
    )


def read_reference(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """The contents of the file; None if it does not exist or has another key."""
    with suppress(FileNotFoundError, SafetensorError), safe_open(path, framework='np') as file:
        if (file.metadata() or {}).get('key') == key:
            return {name: file.get_tensor(name) for name in file.keys()}
    return None


def write_reference(path: Path, key: str, logps: dict[str, np.ndarray]) -> None:
    try:
        with atomic_file(path) as part:
            save_file(logps, part, metadata={'key': key})
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path}: cannot be written: {error}; choose another --out_dir') from error
