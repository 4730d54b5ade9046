"""
A step of reinforcement learning, by flatGPT and by the GRPOTrainer of TRL, as bench.py times it.

    program = BUILDERS['TRL'](settings, runtime)
    seconds, work = program.step()

Both start from the same random weights: 64 prompts get 8 completions each of settings['new_tokens']
tokens, which are rewarded by their text; one update follows, in micro-batches of 64 completions.
"""

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from flatgpt.benchmarks.baselines import (
    BETAS,
    LEARNING_RATE,
    OPTIMIZER,
    build_random_model,
    placeholder_tokenizer,
    random_prompts,
    transformers_model,
)
from flatgpt.checkpoint.convert import export_transformers
from flatgpt.data.dataset import Prompt
from flatgpt.data.tokenizer import byte_tokenizer
from flatgpt.runtime import Runtime, synchronize
from flatgpt.training.loss import loss_of
from flatgpt.training.optim import build_optimizers
from flatgpt.training.rollout import Rollouts
from flatgpt.training.stop_signal import StopSignal

PROMPTS, SAMPLES, AT_ONCE = 64, 8, 8  # AT_ONCE: prompts of a micro-batch


def rewards_of(texts: list[str]) -> list[float]:
    """Rewards that hardly ever are equal, so that each completion has a gradient."""
    return [sum(map(ord, text)) % 9973 / 9973 for text in texts]


class FlatGPTStep:
    """A step as in train.py."""

    def __init__(self, settings: dict, runtime: Runtime):
        self.runtime, self.tokens = runtime, PROMPTS * SAMPLES * settings['new_tokens']
        self.model = build_random_model(settings).to(runtime.device)
        (self.optimizer,) = build_optimizers('adamw', self.model, **OPTIMIZER)
        config = {'rl_samples': SAMPLES, 'rl_tokens': settings['new_tokens'], 'reward': 'length'}
        config |= {'rl_baseline': 'mean', 'rl_normalize': 'tokens', 'batch_size': AT_ONCE}
        data = SimpleNamespace(block_size=settings['prompt_tokens'])
        # it has no end-of-text token, so every completion has its full length
        tokenizer = placeholder_tokenizer(settings['vocab_size'])
        config['seed'] = settings['seed']
        self.rollouts = Rollouts(self.model, tokenizer, data, config, runtime)
        self.rollouts.reward = lambda prompts, texts, rows: rewards_of(texts)
        prompts = [
            Prompt(number, ids, {'prompt': ''})
            for number, ids in enumerate(random_prompts(settings, PROMPTS).tolist())
        ]
        self.asked = [
            ({'samples': range(n, n + AT_ONCE), 'prompts': prompts[n : n + AT_ONCE]}, 1.0)
            for n in range(0, PROMPTS, AT_ONCE)
        ]
        self.stop_signal = StopSignal(runtime)

    def step(self) -> tuple[float, dict]:
        begin = time.perf_counter()
        completions = self.rollouts.sample(self.asked, self.stop_signal, lambda: None)
        batches = self.rollouts.micro_batches(completions, AT_ONCE)
        synchronize(self.runtime.device)
        completed = time.perf_counter()
        for batch, divisor in batches:
            with self.runtime.autocast():
                loss = loss_of(self.model, **batch) / divisor
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.runtime.device)
        end = time.perf_counter()
        share = (completed - begin) / (end - begin)
        return end - begin, {'tokens': self.tokens, 'result': [], 'rollouts': share}

    def completions(self, deterministic: bool) -> tuple[float, dict]:
        """The rollouts alone; deterministic: as in training."""
        self.rollouts.deterministic = deterministic
        begin = time.perf_counter()
        prompts = [prompt for batch, _ in self.asked for prompt in batch['prompts']]
        self.rollouts.complete(prompts, [(prompt.number,) for prompt in prompts], lambda: True)
        self.rollouts.deterministic = True
        return time.perf_counter() - begin, {'tokens': self.tokens, 'result': []}


class TRLStep:
    """A step of GRPOTrainer, with the generate() of transformers."""

    def __init__(self, settings: dict, runtime: Runtime):
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        self.folder = tempfile.TemporaryDirectory()
        self.tokens = PROMPTS * SAMPLES * settings['new_tokens']
        words = Path(self.folder.name, 'tokenizer')
        export_transformers(build_random_model(settings), byte_tokenizer(), {}, words)
        tokenizer = AutoTokenizer.from_pretrained(words)
        tokenizer.pad_token = tokenizer.eos_token
        letters = random_prompts({**settings, 'vocab_size': 26}, PROMPTS) + ord('a')
        prompts = [bytes(row).decode() for row in letters.tolist()]
        cpu = runtime.device == 'cpu'
        config = GRPOConfig(
            output_dir=self.folder.name,
            per_device_train_batch_size=AT_ONCE * SAMPLES,
            gradient_accumulation_steps=PROMPTS // AT_ONCE,
            num_generations=SAMPLES,
            max_completion_length=settings['new_tokens'],
            generation_kwargs={'min_new_tokens': settings['new_tokens']},
            max_steps=1,
            beta=0.0,
            loss_type='dapo',
            learning_rate=LEARNING_RATE,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            bf16=runtime.dtype == torch.bfloat16,
            use_cpu=cpu,
            dataloader_pin_memory=not cpu,
            report_to='none',
            save_strategy='no',
            logging_strategy='no',
            disable_tqdm=True,
        )
        self.timer = step_timer()
        self.trainer = GRPOTrainer(
            model=transformers_model(settings),
            reward_funcs=lambda completions, **_: rewards_of(completions),
            args=config,
            train_dataset=Dataset.from_dict({'prompt': prompts}),
            processing_class=tokenizer,
            callbacks=[self.timer],
        )

    def step(self) -> tuple[float, dict]:
        self.trainer.train()
        return self.timer.seconds, {'tokens': self.tokens, 'result': []}


def step_timer():
    """A callback of a Trainer that measures its last step."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        began = seconds = 0.0

        def on_step_begin(self, args, state, control, **others):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **others):
            self.seconds = time.perf_counter() - self.began

    return StepTimer()


BUILDERS = {'flatGPT': FlatGPTStep, 'TRL': TRLStep}
