"""
bench.py --task: evaluate a model on tasks of lm-evaluation-harness, which computes the scores.

$ python bench.py --task=lambada,cbt --out_dir=gpt2 --limit=100

    task = load_task('lambada', task_index(['lambada']))
    entries = evaluate_task(Scorer(model, tokenizer), 'lambada', task, limit=100)

The score of every item equals that of the harness's own `hf` model with the same weights: the same
tokens, windows and end-of-text token.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
from lm_eval import evaluator, tasks
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from flatgpt.benchmarks import scoring
from flatgpt.data.tokenizer import EOT, Tokenizer
from flatgpt.errors import UserError, counted, did_you_mean
from flatgpt.inference.engine import generate
from flatgpt.inference.sampling import SamplingParams
from model import GPT

TASKS_DIR = Path(__file__).parent / 'tasks'  # tasks that the harness lacks
COMMON_TASKS = ('lambada', 'hellaswag', 'blimp')  # folders that are indexed first
ALIASES = {'lambada': 'lambada_openai'}  # our name -> the harness's
GPT2_SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
SOURCES = 'Radford et al. 2019, table 3; HellaSwag: llm.c, hellaswag.py; BLiMP: its results file'
PUBLISHED = {  # scores of these sizes, from SOURCES
    ('lambada_openai', 'perplexity'): (35.13, 15.60, 10.87, 8.63),
    ('lambada_openai', 'acc'): (0.4599, 0.5548, 0.6012, 0.6324),
    ('cbt_cn', 'acc'): (0.8765, 0.9235, 0.9345, 0.9330),
    ('cbt_ne', 'acc'): (0.834, 0.871, 0.880, 0.8905),
    ('wikitext2', 'word_perplexity'): (29.41, 22.76, 19.93, 18.34),
    ('wikitext103', 'word_perplexity'): (37.50, 26.37, 22.05, 17.48),
    ('hellaswag', 'acc'): (0.2892, None, None, 0.4004),
    ('hellaswag', 'acc_norm'): (0.3114, None, None, 0.5089),
    ('blimp', 'acc'): (None, None, 0.8302, None),
}
BOOTSTRAP = 1000  # resamplings by which the harness estimates the error of a perplexity
MAX_MISTAKES = 3  # examples kept of each task
PROMPT_END = 200  # characters kept of their prompts
PROGRESS_SECONDS = 30  # between lines of progress, where there is no terminal


# -----------------------------------------------------------------------------
# the model


class Scorer(TemplateLM):
    """A model and its tokenizer, with the interface of the harness."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, seed: int = 1337):
        super().__init__()
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.size = model.config.block_size  # tokens
        self._device = model.embedding.weight.device
        self.task = ''  # its name, for progress and errors
        self.truncated = 0  # prompts so far that did not fit and were truncated on the left
        self.screen = sys.stderr  # for progress: while the harness runs, sys.stderr is hidden

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eot

    def tok_encode(self, string: str, add_special_tokens=None, **options) -> list[int]:
        return self.tokenizer.encode(string, allow_eot=True).tolist()

    def _loglikelihood_tokens(self, requests, **options) -> list[tuple[float, bool]]:
        pairs = [self.with_context(context, continuation) for _, context, continuation in requests]
        self.truncated += sum(len(a) + len(b) > self.size + 1 for a, b in pairs)
        return self.score(pairs)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        texts = [self.tok_encode(request.args[0]) for request in requests]
        scores = self.score([self.with_context([self.prefix_token_id], text) for text in texts])
        return [logprob for logprob, _ in scores]

    def with_context(self, context: list, continuation: list[int]) -> tuple[list, list]:
        """Where there is no context, the end-of-text token is; in a vocabulary without one the
        first token is, and is not scored."""
        context = context or [self.prefix_token_id]
        if context == [None]:
            return continuation[:1], continuation[1:]
        return context, continuation

    def score(self, pairs: list[tuple]) -> list[tuple[float, bool]]:
        """(context, continuation) -> as score() of scoring.py."""
        return scoring.score(self.model, pairs, self.with_progress)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        groups, texts = {}, [''] * len(requests)  # requests with the same generation settings
        for number, request in enumerate(requests):
            text, settings = request.args
            groups.setdefault(json.dumps(settings, sort_keys=True), []).append((number, text))
        for settings, numbered in groups.items():
            sampling = self.sampling_params(json.loads(settings))
            prompts = {n: self.prompt(text, sampling.max_new_tokens) for n, text in numbered}
            length = lambda n, p=prompts, s=sampling: len(p[n]) + s.max_new_tokens  # noqa: E731
            for batch in self.with_progress(list(prompts), length):
                for n, text in zip(batch, self.complete(batch, prompts, sampling), strict=True):
                    texts[n] = text
        return texts

    def sampling_params(self, settings: dict) -> SamplingParams:
        """A task's generation settings; UserError for one that is not supported."""
        params = {'temperature': 0.0, **normalize_gen_kwargs(settings)}
        if not params.pop('do_sample'):
            params['temperature'] = 0.0
        ends = ('', EOT, self.tokenizer.eot_text)
        until = tuple(text for text in params.pop('until') if text not in ends)
        params |= {'max_new_tokens': params.pop('max_gen_toks'), 'stop': until, 'seed': self.seed}
        if unknown := set(params) - {field.name for field in fields(SamplingParams)}:
            raise UserError(
                f'task={self.task}: the generation setting {min(unknown)!r} is not supported; '
                'remove it from the task file, or choose another task'
            )
        return SamplingParams(**params)

    def prompt(self, text: str, new_tokens: int) -> list[int]:
        """The end of the text that leaves room for `new_tokens`, if they fit into the context."""
        ids = self.tok_encode(text) or [self.prefix_token_id]
        if ids == [None]:
            raise UserError(
                f'task={self.task}: has an empty prompt, for which this tokenizer has no '
                'end-of-text token; use a model whose tokenizer has one'
            )
        room = self.size - new_tokens if self.size > new_tokens else self.size
        self.truncated += len(ids) > room
        return ids[-room:]

    def complete(self, batch: list[int], prompts: dict, sampling: SamplingParams) -> list[str]:
        seeds = [(self.seed, n) for n in batch]
        texts = [''] * len(batch)
        ids = [prompts[n] for n in batch]
        for output in generate(self.model, self.tokenizer, ids, sampling, seeds):
            texts[output.index] += output.text
        return texts

    def with_progress(self, rows: list, length) -> Iterator[list]:
        """The rows in batches, with a progress bar, or a line now and then without a terminal."""
        total, done = sum(map(length, rows)), 0
        begin = printed = time.perf_counter()
        is_terminal = self.screen.isatty()
        options = {'desc': self.task, 'unit': 'token', 'unit_scale': True, 'leave': False}
        with tqdm(total=total, file=self.screen, disable=not is_terminal, **options) as bar:
            for batch in scoring.batch_by_length(rows, length):
                yield batch
                tokens = sum(map(length, batch))
                bar.update(tokens)
                done += tokens
                now = time.perf_counter()
                if not is_terminal and now - printed > PROGRESS_SECONDS:
                    printed, left = now, (now - begin) * (total - done) / done
                    eta = f'{done / total:.0%}, ETA {tqdm.format_interval(left)}'
                    print(f'{self.task}: {eta}', file=self.screen, flush=True)


# -----------------------------------------------------------------------------
# tasks


def set_up_harness() -> None:
    """Make the harness run in this process, without output and without downloading code."""
    os.environ['DISABLE_MULTIPROC'] = '1'  # or its resampling forks this process, threads and all
    # or some tasks would download and run the code of their metrics
    os.environ.setdefault('HF_EVALUATE_OFFLINE', '1')
    for name in ('lm_eval', 'huggingface_hub'):  # errors are reported in one line
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def task_index(names: list[str]) -> TaskManager:
    """The index of the harness's tasks and ours: the usual ones if they have all names, or all.

    Reading all of the fifteen thousand task files takes seconds.
    """
    folders = [str(Path(tasks.__file__).parent / folder) for folder in COMMON_TASKS]
    usual = TaskManager(include_path=[str(TASKS_DIR), *folders], include_defaults=False)
    if all(ALIASES.get(name, name) in usual.all_tasks for name in names):
        return usual
    return TaskManager(include_path=str(TASKS_DIR))


def check_tasks(names: list[str], manager: TaskManager) -> None:
    """UserError for the first name that is neither a task nor the path of a task file."""
    for name in names:
        if Path(name).suffix in ('.yaml', '.yml'):
            if not Path(name).is_file():
                raise UserError(f'task={name}: no such task file; check the path')
        elif ALIASES.get(name, name) not in manager.all_tasks:
            hint = did_you_mean(name, [*ALIASES, *manager.all_tasks])
            raise UserError(
                f'task={name}: lm-evaluation-harness has no such task; {hint}'
                '`lm_eval ls tasks` lists all; the path of your own task file works, too'
            )


def load_task(name: str, manager: TaskManager) -> dict:
    """A task with its data, from the Hub or its cache -> what the harness's evaluate() takes."""
    try:
        loaded = manager.load([ALIASES.get(name, name)])
    except ModuleNotFoundError as error:
        raise UserError(f'task={name}: needs pip install {error.name}') from error
    except Exception as error:  # whatever its code, its data's library or the network raises
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        raise UserError(
            f'task={name}: cannot be loaded ({reason}); its data is downloaded once from the '
            'Hugging Face Hub: connect, or copy HF_HOME from a machine that has it'
        ) from error
    for task in loaded['tasks'].values():
        if getattr(task, 'UNSAFE_CODE', False):
            raise UserError(f'task={name}: executes model-generated code; choose another task')
        if getattr(task, 'MULTIMODAL', False):
            raise UserError(f'task={name}: has images or sound; choose a task of text alone')
        if task.get_config('num_fewshot') is None:
            task.set_config('num_fewshot', 0)
        task.set_fewshot_seed(1234)  # the harness's own
    return loaded


def evaluate_task(lm: Scorer, name: str, loaded: dict, limit: int | None) -> list[dict]:
    """Score a task -> its entry, or those of its subtasks, followed by their group's.

    limit: how many of each task's examples, the first ones; None: all.
    """
    random.seed(0)  # as the harness does: some tasks draw
    np.random.seed(1234)
    lm.task, lm.truncated = name, 0
    with open(os.devnull, 'w') as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            found = evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=BOOTSTRAP)
    truncated = lm.truncated  # before mistakes(), which counts prompts again
    entries = []
    summed = any('sample_len' in found['results'].get(group, {}) for group in loaded['groups'])
    for task, scores in found['results'].items():
        if 'sample_len' not in scores:  # a group without scores of its own
            continue
        samples = found['samples'].get(task, [])
        if task in loaded['tasks']:
            wrong = mistakes(lm, loaded['tasks'][task], samples)
        else:
            wrong = [example for entry in entries for example in entry['mistakes']]
        entry = {'task': task, 'version': found['versions'].get(task)}
        entry |= {'examples': scores['sample_len'], 'metrics': metrics_of(task, scores, samples)}
        entry['part'] = summed and task in loaded['tasks']
        entries.append(entry | {'mistakes': wrong[:MAX_MISTAKES]})
    entries[-1]['cut'] = truncated
    return entries


def metrics_of(task: str, scores: dict, samples: list[dict]) -> dict:
    """Metric -> its value, its standard error and the published values of GPT-2."""
    metrics = {}
    for key, value in scores.items():
        metric, comma, filter_name = key.partition(',')
        if not comma or metric.endswith('_stderr') or not isinstance(value, (int, float)):
            continue
        stderr = scores.get(f'{metric}_stderr,{filter_name}')
        if not isinstance(stderr, float):
            stderr = ratio_stderr(metric, value, [sample.get(metric) for sample in samples])
        published = dict(zip(GPT2_SIZES, PUBLISHED.get((task, metric), ()), strict=False))
        label = metric if filter_name == 'none' else f'{metric}, {filter_name}'
        metrics[label] = {'value': float(value), 'stderr': stderr, 'published': published}
    return metrics


def ratio_stderr(metric: str, value: float, items: list) -> float | None:
    """Standard error of a perplexity per word or byte, over documents of unequal length.

    items: (log-likelihood, words) of each. The ratio of their sums is linearized (Cochran 1977,
    Sampling Techniques, chapter 6).
    """
    if len(items) < 2 or not all(isinstance(item, tuple) and len(item) == 2 for item in items):
        return None
    logprobs, words = np.array(items, float).T
    residuals = logprobs - words * logprobs.sum() / words.sum()
    error = math.sqrt(len(items) / (len(items) - 1) * (residuals**2).sum()) / words.sum()
    return float(error / math.log(2) if metric == 'bits_per_byte' else value * error)


def mistakes(lm: Scorer, task, samples: list[dict]) -> list[dict]:
    """The first examples that went wrong: end of the prompt, right answer, the model's own."""
    finders = {
        'multiple_choice': wrong_choice,
        'loglikelihood': wrong_word,
        'generate_until': wrong_text,
    }
    find = finders.get(task.OUTPUT_TYPE)
    found = (find(lm, task, sample) for sample in samples if find)
    return [
        {'prompt': prompt[-PROMPT_END:], 'right': right, 'chosen': chosen}
        for prompt, right, chosen in itertools.islice(filter(None, found), MAX_MISTAKES)
    ]


def wrong_choice(lm: Scorer, task, sample: dict) -> tuple | None:
    choices = task.doc_to_choice(sample['doc'])
    pairs = sample['arguments'][: len(choices)]
    gold = task.doc_to_text(sample['doc']) if task.multiple_input else sample['target']
    gold = choices.index(gold) if gold in choices else gold
    likeliest = max(range(len(pairs)), key=lambda i: sample['filtered_resps'][i][0])
    right = gold if isinstance(gold, list) else [gold]
    if likeliest in right or right[0] not in range(len(pairs)):
        return None
    if task.multiple_input:  # the choices are contexts of the same continuation
        return pairs[likeliest][1], pairs[right[0]][0], pairs[likeliest][0]
    return pairs[0][0], pairs[right[0]][1], pairs[likeliest][1]


def wrong_word(lm: Scorer, task, sample: dict) -> tuple | None:
    ((context, right),), ((_, likeliest),) = sample['arguments'], sample['filtered_resps']
    if likeliest:
        return None
    sampling = SamplingParams(max_new_tokens=max(1, len(lm.tok_encode(right))), temperature=0)
    prompts = [lm.prompt(context, sampling.max_new_tokens)]
    return context, right, lm.complete([0], prompts, sampling)[0]


def wrong_text(lm: Scorer, task, sample: dict) -> tuple | None:
    score = sample[sample['metrics'][0]]
    if not isinstance(score, (int, float)) or score > 0:
        return None
    return sample['arguments'][0][0], str(sample['target']), str(sample['filtered_resps'][0])


# -----------------------------------------------------------------------------
# the command


def score_tasks(
    settings: dict, entries: list[dict], load: Callable[[dict], tuple[GPT, Tokenizer]]
) -> None:
    """bench.py --task: score each task, print it and add its entries to `entries`.

    load: loads the model and its tokenizer from the settings. All settings, the model and the data
    are checked before the first task is scored.
    """
    set_up_harness()
    names = [*dict.fromkeys(settings['task'].split(','))]
    index = task_index(names)
    check_tasks(names, index)
    exact = settings['dtype'] == 'auto' and not settings['quantize']
    model, tokenizer = load({**settings, 'dtype': 'float32'} if exact else settings)
    lm = Scorer(model, tokenizer, settings['seed'])
    loaded = {name: load_task(name, index) for name in names}
    print(header(loaded.values()))
    for name, task in loaded.items():
        found = evaluate_task(lm, name, task, settings['limit'])
        entries += found
        print(*rows_of(found), sep='\n', flush=True)


def header(loaded: Iterable[dict]) -> str:
    """The head of the table, with GPT-2's sizes if a task has published scores."""
    title = f'{"task":<16} {"metric":<16} {"value":>8}   {"stderr":<8} {"examples":>8}'
    names = {name for task in loaded for name in [*task['tasks'], *task['groups']]}
    if not names & {task for task, _ in PUBLISHED}:
        return title
    sizes = ''.join(f'{size.removeprefix("gpt2-"):>8}' for size in GPT2_SIZES)
    return f'GPT-2 as published: {SOURCES}\n{title}{sizes}'


def rows_of(entries: list[dict]) -> Iterator[str]:
    """A task's rows: a metric each, then mistakes. The parts of a sum are in the JSON alone."""
    for entry in entries:
        if entry['part']:
            continue
        task = entry['task']
        for metric, score in entry['metrics'].items():
            error = '' if score['stderr'] is None else f'± {format_figure(score["stderr"])}'
            value = f'{format_figure(score["value"]):>8} {error:<10} {entry["examples"]:>8,}'
            published = ''.join(
                f'{format_figure(score["published"].get(size)):>8}' for size in GPT2_SIZES
            )
            yield f'{task:<16} {metric:<16} {value}{published}'.rstrip()
            task = ''
        for wrong in entry['mistakes']:
            prompt, right, chosen = (' '.join(wrong[k].split())[-40:] for k in wrong)
            yield f'  ...{prompt!r} right: {right!r}, chosen: {chosen!r}'
    if cut := entries[-1]['cut']:
        yield f'  truncated on the left, to the context of the model: {counted(cut, "prompt")}'


def format_figure(number: float | None) -> str:
    if number is None:
        return ''
    if abs(number) < 10:
        return f'{number:.4f}'
    return f'{number:.2f}' if number < 1e5 else f'{number:.1e}'
