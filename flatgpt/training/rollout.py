"""
Rollouts of reinforcement learning: the current weights complete prompts, a reward scores them.

    rollouts = Rollouts(model, tokenizer, data, config, runtime)
    completions = rollouts.sample(prompts, stop_signal, keep_alive)     # with rewards
    micro_batches = rollouts.micro_batches(completions, rows=4)         # of one update
    rollouts.evaluate(stop_signal)                                      # {'val_reward': 0.4, ...}

A completion is a function of the weights, the run's seed, its prompt and its number: not of the
rest of the batch, nor of the number of processes, so that a resumed run samples the same ones
again. Each is used for one update, so there is no importance ratio.
"""

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from flatgpt.data.dataset import Dataset, Prompt
from flatgpt.data.tokenizer import ASSISTANT, Tokenizer
from flatgpt.errors import UserError, short_repr
from flatgpt.inference.engine import Engine
from flatgpt.inference.request import Request, TokenOutput
from flatgpt.inference.sampling import SamplingParams, suppressed_ids
from flatgpt.runtime import Runtime
from flatgpt.training.loss import (
    REFERENCE_FILE,
    kl_estimate,
    read_reference,
    reference_lost,
    token_logps,
)
from flatgpt.training.reward import BatchReward, RewardModel, is_model, load_reward
from flatgpt.training.stop_signal import StopSignal
from model import GPT

SLOTS = 64  # completions at once, on every machine: the rounding depends on it
PASS_REWARD = 1.0  # at least that of a completion that passes, for pass@k
STD_EPSILON = 1e-4  # added to a standard deviation before it divides, as in TRL
SAMPLES_SHOWN = 3  # completions that an evaluation prints
EVALUATION = 1  # in the seeds of an evaluation, between prompt and number; training has none


class Completion(NamedTuple):
    """ids: with the token that ended it, if any. logprobs: of each, as the engine computed it."""

    prompt: Prompt
    ids: list[int]
    logprobs: list[float]
    text: str
    ended: bool  # by the model itself, not by its length
    reward: float = math.nan


class Rollouts:
    """Completes prompts with `model`, which is being trained. rl_samples completions of each."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, data: Dataset, config: dict, runtime: Runtime
    ):
        self.model, self.tokenizer, self.data = model, tokenizer, data
        self.config, self.runtime = config, runtime
        self.samples, self.batch_size = config['rl_samples'], config['batch_size']
        # on a copy, because autocast would convert the weights for every token
        self.copy = None
        if runtime.dtype != torch.float32:
            self.copy = copy.deepcopy(model).to(runtime.dtype).eval()
        end = (tokenizer.chat_template or {}).get(ASSISTANT, ['', ''])[1]
        is_text = end and tokenizer.delimiter_id(end) is None
        self.sampling = SamplingParams(config['rl_tokens'], stop=(end,) if is_text else ())
        self.max_length = data.block_size + config['rl_tokens']
        self.reward: BatchReward | RewardModel
        if is_model(config['reward']):
            self.reward = RewardModel(config['reward'], tokenizer, runtime, self.max_length)
        else:
            self.reward = load_reward(config['reward'])
        self.reference: GPT | None = None  # for the KL penalty
        self.fixed_width = False
        self.deterministic = True  # else a resumed run differs; bench.py measures what it costs
        self.suppressed = suppressed_ids(tokenizer, model)
        self.stats: dict[str, float] = {}  # of the last update
        self.tokens_per_step = 0.0  # sampled in it

    # --- completions

    @torch.no_grad()
    def policy(self) -> GPT:
        """The model that completes, with the current weights."""
        if self.copy is None:
            return self.model.eval()
        for mine, trained in zip(self.copy.parameters(), self.model.parameters(), strict=True):
            mine.copy_(trained)
        return self.copy

    def complete(
        self, prompts: list[Prompt], seeds: list[tuple], keep_going: Callable[[], bool]
    ) -> list[Completion] | None:
        """rl_samples completions of each prompt; None as soon as keep_going() is False.

        seeds: of each prompt; the number of the completion is added.
        """
        engine = Engine(
            self.policy(),
            self.tokenizer,
            SLOTS,
            max_length=self.max_length,
            deterministic=self.deterministic,
            batch_prompts=self.deterministic,
        )
        outputs: deque[TokenOutput] = deque()
        each = zip(prompts, seeds, strict=True)
        jobs = [(prompt, (*seed, k)) for prompt, seed in each for k in range(self.samples)]
        for index, (prompt, seed) in enumerate(jobs):
            engine.submit(
                Request(prompt.ids, self.sampling, outputs.append, index, seed, top_logprobs=0)
            )
        tokens: list[list[TokenOutput]] = [[] for _ in jobs]
        while engine.step():
            while outputs:
                output = outputs.popleft()
                if output.finish_reason == 'error':
                    raise UserError(
                        'the logits of a completion are not finite: an update was too large, or '
                        'the weights are for another dtype; lower --learning_rate and start '
                        'again, or use --dtype=float32'
                    )
                tokens[output.index].append(output)
            if not keep_going():
                self.model.train()
                return None
        self.model.train()
        return [completion_of(prompt, each) for (prompt, _), each in zip(jobs, tokens, strict=True)]

    def complete_and_score(
        self,
        prompts: list[Prompt],
        seeds: list[tuple],
        stop_signal: StopSignal,
        keep_alive: Callable[[], None],
    ) -> list[Completion] | None:
        """The completions with their rewards; None if a signal or an error stopped any rank."""

        def keep_going() -> bool:
            keep_alive()
            return self.runtime.world_size > 1 or not stop_signal.signal  # together or not at all

        completions = None
        try:
            if found := self.complete(prompts, seeds, keep_going):
                completions = self.score(found)
        except UserError as error:
            stop_signal.fail(error)
        if any(self.runtime.all_reduce([stop_signal.signal])):
            stop_signal.sync_ranks()
            return None
        return completions or []  # a rank may have none to evaluate

    def score(self, completions: list[Completion]) -> list[Completion]:
        """The completions with their rewards. UserError if the reward fails."""
        if isinstance(self.reward, RewardModel):
            values = self.reward([[*c.prompt.ids, *c.ids] for c in completions])
        else:
            prompts = [prompt_text(c.prompt, self.tokenizer) for c in completions]
            texts = [c.text for c in completions]
            values = self.reward(prompts, texts, [c.prompt.record for c in completions])
        return [c._replace(reward=value) for c, value in zip(completions, values, strict=True)]

    # --- training

    def sample(
        self,
        micro_batches: list[tuple[dict, float]],
        stop_signal: StopSignal,
        keep_alive: Callable[[], None],
    ) -> list[Completion] | None:
        """rl_samples completions of each prompt of BatchLoader's micro-batches, with rewards; None
        if a signal or a reward that failed stopped any rank."""
        seeds = [(self.config['seed'], n) for batch, _ in micro_batches for n in batch['samples']]
        prompts = [prompt for batch, _ in micro_batches for prompt in batch['prompts']]
        return self.complete_and_score(prompts, seeds, stop_signal, keep_alive)

    def micro_batches(self, completions: list[Completion], rows: int) -> list[tuple[dict, float]]:
        """The micro-batches of an update, as BatchLoader's, of `rows` prompts at most."""
        size = rows * self.samples
        rewards = self.rewards_of(completions)
        total = self.measure(completions, rewards)
        weights = advantages(rewards, self.config['rl_baseline']).flatten().tolist()
        each = list(zip(completions, weights, strict=True))
        if self.reference is None:  # the others have no gradient
            each = [(c, weight) for c, weight in each if weight] or each[:1]
        batches = []
        for first in range(0, len(each), size):
            part, weights = zip(*each[first : first + size], strict=True)
            batch = self.tensors(part, rows=size if self.fixed_width else len(part))
            batch['advantages'] = torch.zeros(len(batch['x']))
            batch['advantages'][: len(part)] = torch.tensor(weights)
            targets = int((batch['y'] >= 0).sum())
            batches.append((self.to_device(batch), total / (targets * self.runtime.world_size)))
        return batches

    def rewards_of(self, completions: list[Completion]) -> torch.Tensor:
        """(prompts, rl_samples)"""
        rewards = torch.tensor([c.reward for c in completions])
        return rewards.view(len(completions) // self.samples, self.samples)

    def tensors(self, completions: Sequence[Completion], rows: int) -> dict[str, torch.Tensor]:
        """x and y (rows, T) of the prompts and completions; only completions are targets."""
        longest = max(len(c.prompt.ids) + len(c.ids) for c in completions) - 1
        width = min(-(-longest // 16) * 16, self.max_length)
        width = self.max_length if self.fixed_width else width
        x, y = np.zeros((2, rows, width), np.int64)
        y -= 1
        for row, c in enumerate(completions):
            ids, start = [*c.prompt.ids, *c.ids], len(c.prompt.ids) - 1
            x[row, : len(ids) - 1] = ids[:-1]
            y[row, start : len(ids) - 1] = c.ids
        return {'x': torch.from_numpy(x), 'y': torch.from_numpy(y)}

    def to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.fixed_width:
            batch = batch | {'at': (batch['y'].flatten() >= 0).nonzero()[:, 0]}
        batch = {name: tensor.to(self.runtime.device) for name, tensor in batch.items()}
        batch['suppressed'] = self.suppressed
        if self.reference is not None:
            with torch.no_grad(), self.runtime.autocast():
                batch['reference'] = self.logps(self.reference, batch)
        return batch

    def logps(self, model: GPT, batch: dict) -> torch.Tensor:
        """Log-probabilities of the completions of a batch, without those that are suppressed."""
        return token_logps(model, batch['x'], batch['y'], batch['suppressed'], batch.get('at'))

    def measure(self, completions: list[Completion], rewards: torch.Tensor) -> float:
        """Set `stats` and `tokens_per_step` -> what the loss is divided by, over all ranks."""
        tokens = [len(c.ids) for c in completions]
        flat = is_flat(rewards).sum().item()
        sums = [len(completions), sum(tokens), sum(not c.ended for c in completions)]
        sums += [rewards.sum().item(), rewards.square().sum().item(), flat, len(rewards)]
        sums += [-sum(map(sum, (c.logprobs for c in completions)))]
        count, tokens, cut, reward, squares, flat, groups, nats = self.runtime.all_reduce(sums)
        mean = reward / count
        self.tokens_per_step = tokens
        self.stats = {
            'reward': mean,
            'reward_std': math.sqrt(max(0.0, squares / count - mean**2)),
            'flat_groups': flat / groups,  # whose rewards are equal: nothing is learned from them
            'completion_tokens': tokens / count,
            'cut_off': cut / count,
            'entropy': nats / tokens,  # nats per token
        }
        return tokens if self.config['rl_normalize'] == 'tokens' else count

    def shapes_to_compile(self) -> list[dict]:
        """A batch as large as any: a compiled model needs one shape."""
        self.fixed_width = True
        x = torch.zeros(self.batch_size * self.samples, self.max_length, dtype=torch.long)
        batch = {'x': x, 'y': x, 'advantages': torch.zeros(len(x))}
        return [self.to_device(batch)]

    # --- evaluation

    def evaluate(self, stop_signal: StopSignal) -> dict[str, float] | None:
        """Rewards on prompts of the validation split, always with the same random numbers; some of
        the completions are printed. None if a signal or an error stopped any rank meanwhile.
        """
        c, runtime = self.config, self.runtime
        count = c['eval_iters'] and c['eval_iters'] * self.batch_size
        numbers = self.data.eval_starts('val', count) // self.data.stride
        mine = numbers[runtime.rank :: runtime.world_size]
        seeds = [(c['seed'], number, EVALUATION) for number in mine.tolist()]
        prompts = self.data.prompts('val', mine)
        completions = self.complete_and_score(prompts, seeds, stop_signal, lambda: None)
        if completions is None:
            return None
        rewards = self.rewards_of(completions)
        passed = rewards >= PASS_REWARD
        gap, divergence = self.compare(completions)
        sums = [rewards.sum(), passed.sum(), passed.any(1).sum(), rewards.numel()]
        sums += [sum(len(c.ids) for c in completions), sum(not c.ended for c in completions)]
        sums = runtime.all_reduce([*map(float, sums), divergence])
        reward, passed, any_passed, count, tokens, cut, divergence = sums
        self.show(completions)
        values = {
            'val_loss': -reward / count,  # lower is better, as of any loss
            'val_reward': reward / count,
        }
        if not isinstance(self.reward, RewardModel):  # whose scores have no threshold
            values['val_pass_at_1'] = passed / count
            values[f'val_pass_at_{self.samples}'] = any_passed / count * self.samples
        values |= {
            'val_completion_tokens': tokens / count,
            'val_cut_off': cut / count,
            'val_logprob_gap': runtime.all_reduce([gap], 'MAX')[0],
        }
        return values | ({'val_kl': divergence / tokens} if self.reference else {})

    @torch.no_grad()
    def compare(self, completions: list[Completion]) -> tuple[float, float]:
        """The largest difference between the log-probabilities of the engine and those of training,
        in nats, and the sum over the tokens of the KL divergence from the reference."""
        gap = divergence = 0.0
        size = self.batch_size * self.samples
        for first in range(0, len(completions), size):
            part = completions[first : first + size]
            batch = self.to_device(self.tensors(part, len(part)))
            x, y = batch['x'], batch['y']
            with self.runtime.autocast():
                logps = token_logps(self.model, x, y)
            ours = torch.tensor([score for c in part for score in c.logprobs])
            gap = max(gap, (logps[y >= 0].cpu() - ours).abs().max().item())
            if self.reference is not None:
                with self.runtime.autocast():
                    logps = self.logps(self.model, batch)
                divergence += kl_estimate(logps, batch['reference']).sum().item()
        return gap, divergence

    def show(self, completions: list[Completion]) -> None:
        """Print the first completion of some prompts with its reward."""
        for each in completions[:: self.samples][:SAMPLES_SHOWN]:
            prompt = prompt_text(each.prompt, self.tokenizer)
            text = f'{short_repr(prompt)} -> {short_repr(each.text)}'
            self.runtime.print0(f'reward {each.reward:g}: {text}')


def completion_of(prompt: Prompt, outputs: list[TokenOutput]) -> Completion:
    ids = [output.token for output in outputs]
    text = ''.join(output.text for output in outputs)
    ended = outputs[-1].finish_reason == 'stop'
    return Completion(prompt, ids, [output.logprob for output in outputs], text, ended)


def prompt_text(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """The record's prompt; of messages, the text that the model sees."""
    text = prompt.record.get('prompt')
    return text if isinstance(text, str) else tokenizer.decode(prompt.ids)


def is_flat(rewards: torch.Tensor) -> torch.Tensor:
    """Whether the rewards of each prompt are equal, (P,)."""
    return (rewards == rewards[:, :1]).all(1)


def advantages(rewards: torch.Tensor, baseline: str) -> torch.Tensor:
    """How much better each completion is than the baseline of its prompt, (P, S) as the rewards.

    baseline: 'mean' of the group (Shao et al. 2024, GRPO, without its division); 'std': also
    divided by the group's standard deviation; 'leave_one_out': the mean of the others (Ahmadian et
    al. 2024, RLOO).
    """
    centered = rewards - rewards.mean(1, keepdim=True)
    centered[is_flat(rewards)] = 0.0  # without the rounding of the mean
    if baseline == 'std':
        return centered / (rewards.std(1, keepdim=True) + STD_EPSILON)
    if baseline == 'leave_one_out':
        return centered * rewards.size(1) / (rewards.size(1) - 1)
    return centered


# -----------------------------------------------------------------------------
# the reference


def load_reference(model: GPT, run) -> tuple[GPT, dict[str, np.ndarray]]:
    """A frozen copy of the initial model, and its weights for the run directory, from where a
    resumed run reads them."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    weights = {name: tensor.cpu().numpy() for name, tensor in reference.state_dict().items()}
    if not run.resume_from:
        return reference, weights
    path, key = run.out_dir / REFERENCE_FILE, run.state.reference_key
    weights = run.runtime.broadcast_from_rank0(lambda: read_reference(path, key))
    if weights is None:
        raise reference_lost(path, run.out_dir)
    reference.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return reference, weights
