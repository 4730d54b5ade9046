"""
Evaluation during training: the loss on fixed windows of each split, and a generated sample.

    losses = estimate_loss(model, batches, config, runtime, stop_signal)  # {'val_loss': 2.1, ...}
    text = training_sample(model, tokenizer, data, tokens=256, seed=1337)
"""

import math
from itertools import product

import torch

from flatgpt.data.dataset import Dataset
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.inference.engine import generate_sample
from flatgpt.runtime import Runtime
from flatgpt.training.batches import BatchLoader
from flatgpt.training.loss import METRIC_NAMES, compute_metrics
from flatgpt.training.stop_signal import StopSignal
from model import GPT


@torch.no_grad()
def estimate_loss(
    model: GPT, batches: BatchLoader, config: dict, runtime: Runtime, stop_signal: StopSignal
) -> dict[str, float] | None:
    """Mean loss of each split in nats per token (objective='dpo': per pair, with reward metrics),
    over fixed windows split over all ranks. For a mixture, also the loss on each dataset; the total
    is weighted by the mixture's shares.

    None if a signal stopped any rank meanwhile. Uses none of training's random state.
    """
    model.eval()
    data, losses = batches.data, {}
    splits = ('train', 'val') if config['eval_train'] else ('val',)
    for split, (share, part) in product(splits, data.parts):
        sums = sum_losses(model, batches, part, split, share, config, runtime, stop_signal)
        # weight: the number of targets or pairs
        *sums, weight, stopped = runtime.all_reduce([*sums.tolist(), stop_signal.signal])
        weight = weight or math.nan  # without targets there is no loss
        if stopped:
            stop_signal.sync_ranks()
            model.train()
            return None
        names = [f'{split}_{name}' for name in METRIC_NAMES[config['objective']]]
        for name, total in zip(names, sums, strict=True):
            losses[name] = losses.get(name, 0.0) + share * total / weight
        if part is not data:
            losses[f'{split}_loss_on_{part.name}'] = sums[0] / weight
    model.train()
    if text_bytes := data.text_bytes('val'):  # bits per byte are comparable across tokenizers
        tokens_per_byte = data.tokens['val'] / text_bytes
        losses['val_bpb'] = losses['val_loss'] / math.log(2) * tokens_per_byte
    return losses


def sum_losses(model, batches, part, split, share, config, runtime, stop_signal) -> torch.Tensor:
    """This rank's sums over its windows of one dataset: of each metric, times its weight, and of
    the weights, which are the numbers of targets or pairs."""
    batch_size, sharded = config['batch_size'], config['shard']
    count = len(part.eval_starts('val'))  # of the training split, too
    if config['eval_iters'] is not None:
        count = math.ceil(share * config['eval_iters'] * batch_size)
    windows = part.eval_starts(split, count)
    size = len(METRIC_NAMES[config['objective']]) + 1
    total = torch.zeros(size, dtype=runtime.sum_dtype, device=runtime.device)
    for _, mine, count in runtime.rank_batches(windows, batch_size, f'evaluating {split}'):
        batch = batches.eval_batch(part, split, mine)
        with runtime.autocast():
            means, weight = compute_metrics(model, **batch, beta=config['dpo_beta'])
        if count:
            total += torch.stack([mean * weight for mean in means] + [weight])
        if stop_signal.signal and not sharded:
            break
    return total


def training_sample(model: GPT, tokenizer: Tokenizer, data: Dataset, tokens: int, seed: int) -> str:
    """About `tokens` generated tokens. The prompt is end of text, or the first token of the
    validation split; for chat data, the first conversation of that split up to the reply, or the
    first prompt."""
    x, y = data.parts[0].data.eval_batch('val', [0])
    prompt = x[0, :1] if tokenizer.eot is None else [tokenizer.eot]
    if data.is_chat and data.parts[0].data.has_prompts:
        prompt = data.parts[0].data.prompts('val', [0])[0].ids
    elif data.is_chat:  # up to the assistant message
        prompt = x[0, : int((y[0] >= 0).argmax()) + 1]
    return generate_sample(model.eval(), tokenizer, prompt, tokens, seed, answer=data.is_chat)
