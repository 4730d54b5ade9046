"""
The training batches of one rank. A batch follows from its number alone, so there is no state to
save.

    batches = BatchLoader(data, state, config, runtime)
    batch, divisor = next(batches)              # loss = loss_of(model, **batch) / divisor

The global batch of an update is the same at every world size; rank r of W gets the r-th of W equal
parts, in micro-batches. A thread prefetches.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property

import torch

from flatgpt.data.dataset import Dataset
from flatgpt.errors import UserError
from flatgpt.runtime import Runtime, to_device
from flatgpt.training.compiling import ComputeWorkload
from flatgpt.training.loss import last_tokens, trim_padding
from flatgpt.training.ngram import NGramModel
from flatgpt.training.state import TrainState
from flatgpt.training.validate import global_batch_size, steps_of
from model import GPT

PREFETCH = 8  # micro-batches read ahead, or one update: a slow read must not stall training


class BatchLoader:
    """Endless micro-batches, starting at state.samples.

    on_read_error: called with the error if the data cannot be read. The last batch is then repeated
    so that this rank stays in step with the others until all stop. If it is None, or there is no
    batch yet, the error is raised.
    reference: {split: (pairs, 2)} log-probabilities for objective='dpo', set before training.
    """

    def __init__(self, data: Dataset, state: TrainState, config: dict, runtime: Runtime):
        self.data, self.config, self.runtime = data, config, runtime
        self.first_step, self.first_sample = state.step, state.samples
        self.global_batch_size = global_batch_size(config)
        self.rank_batch_size, self.micro_batch_size = runtime.split_batch(
            self.global_batch_size, config['batch_size']
        )
        # micro-batches per update
        self.micro_steps = self.rank_batch_size // self.micro_batch_size
        self.tokens_per_step = round(self.global_batch_size * data.window_tokens)
        self.reference: dict | None = None
        self.fixed_width = False  # do not trim batches: a compiled model needs one shape
        self.on_read_error: Callable[[UserError], None] | None = None
        self._last: tuple[dict, float] | None = None
        self._last_eval: dict | None = None
        self._reader = ThreadPoolExecutor(1)
        self._upcoming, self._submitted, self._waited = deque(), 0, 0.0

    def __iter__(self) -> 'BatchLoader':
        return self

    def __next__(self) -> tuple[dict, float]:
        while len(self._upcoming) < max(PREFETCH, self.micro_steps):
            self._submit()
        started = time.perf_counter()
        with self._repeat_last_on_error(self._last):
            self._last = self._upcoming.popleft().result()
        self._waited += time.perf_counter() - started
        self._submit()
        return self._last

    def next_update(self, schedule_step: float) -> list[tuple[dict, float]]:
        """The micro-batches of an update, cut into short sequences up to step short_iters."""
        micro_batches = [next(self) for _ in range(self.micro_steps)]
        if schedule_step < self.config['short_iters']:
            micro_batches = [(with_length(b, self.short_length), d) for b, d in micro_batches]
        return [(self.with_soft_targets(b, schedule_step), d) for b, d in micro_batches]

    @cached_property
    def ngrams(self) -> NGramModel:
        return NGramModel(self.data, self.config['ngram_order'], self.runtime.device)

    def with_soft_targets(self, batch: dict, schedule_step: float) -> dict:
        """The batch and, with ngram_order, soft targets: the next token, mixed with the prediction
        of the n-gram model."""
        if not self.config['ngram_order']:
            return batch
        left = 1.0 - schedule_step / max(1, steps_of(self.config, self.data))
        weight = max(0.0, left) ** self.config['ngram_decay']
        soft = self.ngrams.predict(batch['x']) * weight
        soft.scatter_add_(2, batch['y'][..., None], torch.full_like(soft[..., :1], 1.0 - weight))
        return batch | {'soft_targets': soft}

    @property
    def short_length(self) -> int:
        return min(self.config['short_block_size'], self.data.block_size)

    @contextmanager
    def _repeat_last_on_error(self, last) -> Iterator[None]:
        """Pass a read error to on_read_error, if there is a last batch to repeat."""
        try:
            yield
        except (UserError, OSError) as error:
            if not isinstance(error, UserError):  # a failed disk or a lost server
                error = UserError(
                    f'{self.data.name}: the data cannot be read: {error}; restore access to it and '
                    'resume, or start again'
                )
            if last is None or self.on_read_error is None:
                raise error from None
            self.on_read_error(error)

    def pop_wait_seconds(self) -> float:
        """Seconds spent waiting for batches since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _submit(self) -> None:
        self._upcoming.append(self._reader.submit(self.micro_batch, self._submitted))
        self._submitted += 1

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def micro_batch(self, number: int) -> tuple[dict, float]:
        """Micro-batch `number` of this rank, counted from the first step: the arguments of
        loss_of(), or for objective='rl' prompts, and a divisor. loss / divisor, summed over the
        micro-batches of an update and averaged over the ranks, is the mean.
        """
        c, steps, part = self.config, *divmod(number, self.micro_steps)
        first = self.first_sample + steps * self.global_batch_size
        mine = first + self.runtime.rank * self.rank_batch_size + part * self.micro_batch_size
        if c['objective'] == 'rl':  # see rollout.py
            samples = range(mine, mine + self.micro_batch_size)
            windows = self.data.windows(mine, self.micro_batch_size)
            return {'samples': samples, 'prompts': self.data.prompts('train', windows)}, 1.0
        batch = self.data.batch(mine, self.micro_batch_size, c['mask_documents'])
        divisor = self.micro_steps
        if c['objective'] == 'sft':  # the number of targets differs between conversations
            targets = self.data.count_targets(mine, self.micro_batch_size)
            all_targets = self.data.count_targets(first, self.global_batch_size)
            divisor = all_targets / (targets * self.runtime.world_size)
        if self.data.has_pairs and not self.fixed_width:
            batch = trim_padding(*batch)
        if c['objective'] == 'dpo':
            pairs = self.data.windows(mine, self.micro_batch_size)
            batch = [*batch, self.reference['train'][pairs].ravel()]
        return self.as_kwargs(batch), float(divisor)

    def eval_batch(self, part: Dataset, split: str, windows) -> dict:
        """Windows of a split of one dataset of the mixture -> the arguments of loss_of()."""
        with self._repeat_last_on_error(self._last_eval):
            self._last_eval = self._eval_batch(part, split, windows)
        return self._last_eval

    def _eval_batch(self, part: Dataset, split: str, windows) -> dict:
        batch = part.eval_batch(split, windows, self.config['mask_documents'])
        if part.has_pairs:
            batch = trim_padding(*batch)
        if self.config['objective'] == 'dpo':
            reference = self.reference[split][windows // self.data.stride]
            batch = [*batch, reference.ravel()]
        return self.as_kwargs(batch)

    def as_kwargs(self, arrays) -> dict:
        """Arrays -> the arguments of loss_of(), on the device."""
        names = ('x', 'y', 'reference' if self.config['objective'] == 'dpo' else 'documents')
        if self.config['objective'] == 'reward':
            x, y = arrays
            names, arrays = ('x', 'ends'), (x, last_tokens(y))
        return dict(zip(names, self.to_device(*arrays), strict=False))

    def to_device(self, *arrays) -> list[torch.Tensor]:
        """numpy int64 (B, T) -> tensors on the device."""
        return [to_device(torch.from_numpy(array), self.runtime.device) for array in arrays]

    def shapes_to_compile(self) -> list[dict]:
        """One batch of each sequence length in training: short ones, if any, and full-length."""
        batch, _ = self.micro_batch(0)
        batches = [batch]
        if self.first_step < self.config['short_iters']:
            lengths = sorted({self.short_length, self.data.block_size})
            batches = [with_length(batch, length) for length in lengths]
        return [self.with_soft_targets(b, 0) for b in batches]

    def work(self, model: GPT, max_iters: int) -> ComputeWorkload:
        """The work of this rank up to step max_iters."""
        c, length = self.config, self.data.block_size
        sequences = self.micro_batch_size * (1 + self.data.has_pairs)
        if c['objective'] == 'rl':
            sequences *= c['rl_samples']
            length += c['rl_tokens']
        tokens = sequences * length
        passes = (max_iters - self.first_step) * self.micro_steps
        shapes = 1 + (self.first_step < c['short_iters'])
        return ComputeWorkload(passes, tokens * model.flops_per_token(), len(model.blocks), shapes)

    def suggest_smaller_batch(self) -> str:
        """Flags that reduce memory, if possible with the same global batch."""
        c, half = self.config, self.micro_batch_size // 2
        if rows := next((n for n in range(half, 0, -1) if self.rank_batch_size % n == 0), 0):
            steps = self.global_batch_size // rows
            return f'--batch_size={rows} --gradient_accumulation_steps={steps}'
        if not c['gradient_checkpointing']:
            return '--gradient_checkpointing'
        on_gpu = self.runtime.device_type == 'cuda'
        if c['shard'] and on_gpu and not c['offload']:
            return '--offload'
        if self.first_step:  # a resumed run keeps its shape
            more = ', more GPUs' if c['shard'] else ', or --shard with torchrun on several'
            more *= c['objective'] != 'rl'
            return f'a GPU with more memory{more}' if on_gpu else 'a machine with more memory'
        if c['objective'] == 'rl':  # its prompts are not cut to block_size
            return f'--rl_tokens={max(1, c["rl_tokens"] // 2)} or a smaller model'
        if c['block_size'] == 1:
            return 'a smaller model'
        return f'--block_size={c["block_size"] // 2} or a smaller model'


def with_length(batch: dict, length: int) -> dict:
    """A batch of text (B, T) as more sequences of `length` tokens each."""
    return {name: tensor.reshape(-1, length) for name, tensor in batch.items()}
