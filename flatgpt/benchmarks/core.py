"""
bench.py --task=core: DCLM's CORE metric, as nanochat reports it.

$ python bench.py --task=core --out_dir=out/mine
$ python bench.py --task=core --out_dir=gpt2 --core_data=eval_bundle.zip --limit=500

CORE is the mean of 22 accuracies, each centered so that 0 is guessing and 1 is perfect (Li et al.
2024, DataComp-LM, arXiv 2406.11794, section 3.5). The tasks and their data are those of nanochat,
and so is the score of every example: the same order, few-shot examples, prompts and tokens.
"""

import csv
import functools
import hashlib
import json
import math
import random
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from tqdm import tqdm

from flatgpt.benchmarks.scoring import score
from flatgpt.data.dataset import DATA
from flatgpt.data.download import download, download_folder
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError, counted, reason_of
from flatgpt.files import atomic_file
from flatgpt.inference.batch import fingerprint
from model import GPT

URL = 'https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip'
FOLDER = 'eval_bundle'  # inside the zip file
GPT2 = {'124M': 0.1139, '355M': 0.1849, '774M': 0.2146, '1558M': 0.2565}  # nanochat's figures
KINDS = ('multiple_choice', 'schema', 'language_modeling')
GROUP = 100  # examples that are scored and kept together
PROGRESS_SECONDS = 30  # between lines of progress, where there is no terminal


# -----------------------------------------------------------------------------
# the tasks


@dataclass(frozen=True)
class CoreTask:
    label: str
    kind: str  # of KINDS
    file: str  # of its examples, in eval_data/
    shots: int  # solved examples before each question
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of guessing

    def centered(self, accuracy: float) -> float:
        return (accuracy - self.baseline) / (1 - self.baseline)


class Bundle:
    """nanochat's evaluation bundle: a folder, or the zip file, which is not unpacked.

    where: its path; None for data/core/, where it is downloaded once.
    """

    def __init__(self, where: str | None):
        self.path = Path(where) if where else fetch_bundle()
        if self.path.is_dir() and (self.path / FOLDER).is_dir():
            self.path /= FOLDER
        try:
            table = csv.DictReader(self.read('eval_meta_data.csv').decode().splitlines())
            self.baselines = {row['Eval Task']: float(row['Random baseline']) for row in table}
            self.tasks = [self.task(fields) for fields in self.task_list()]
        except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(
                f'core_data={self.path}: not an evaluation bundle ({reason_of(error)}); give the '
                f'folder or the zip file of {URL}'
            ) from error

    def read(self, name: str) -> bytes:
        """OSError or KeyError for a file that does not exist."""
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(f'{FOLDER}/{name}')

    def task_list(self) -> list[dict]:
        import yaml

        try:
            return yaml.safe_load(self.read('core.yaml'))['icl_tasks']
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error

    def task(self, fields: dict) -> CoreTask:
        kind = fields['icl_task_type']
        if kind not in KINDS:
            raise ValueError(f'core.yaml has an unknown icl_task_type {kind}')
        return CoreTask(
            fields['label'], kind, fields['dataset_uri'], fields['num_fewshot'][0],
            fields.get('continuation_delimiter', ' '), self.baselines[fields['label']] / 100,
        )  # fmt: skip

    def examples(self, task: CoreTask, limit: int | None) -> list[dict] | None:
        """The examples in nanochat's order; None if their file is missing."""
        try:
            lines = self.read(f'eval_data/{task.file}').splitlines()
        except (OSError, KeyError):
            return None
        try:
            examples = [json.loads(line) for line in lines]  # of bytes: text has more line ends
        except ValueError as error:
            raise UserError(
                f'core_data={self.path}: {task.file} is damaged ({reason_of(error)}); get {URL} '
                'again'
            ) from error
        random.Random(1337).shuffle(examples)
        return examples[:limit]


def fetch_bundle() -> Path:
    path = download_folder(DATA / 'core', Path('core_data')) / 'eval_bundle.zip'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as part:
            download(URL, part)
    return path


# -----------------------------------------------------------------------------
# an example


def few_shot_examples(examples: list[dict], number: int, shots: int) -> list[dict]:
    """Other examples, drawn with a seed of their own for each number."""
    chosen = random.Random(1234 + number).sample(range(len(examples) - 1), shots)
    return [examples[i + (i >= number)] for i in chosen]


def render(task: CoreTask, example: dict, shots: list[dict]) -> list[str]:
    """One prompt for each choice; for language modeling, the prompt without and with the answer."""
    head = ''.join(f'{solved(task, shot)}\n\n' for shot in shots)
    if task.kind == 'multiple_choice':
        ends = [f'{example["query"]}{task.delimiter}{choice}' for choice in example['choices']]
    elif task.kind == 'schema':
        answer = f'{task.delimiter}{example["continuation"]}'
        ends = [f'{context}{answer}' for context in example['context_options']]
    else:
        question = f'{head}{example["context"].strip()}{task.delimiter}'
        return [question.strip(), f'{question}{example["continuation"]}']
    return [head + end for end in ends]


def solved(task: CoreTask, example: dict) -> str:
    if task.kind == 'multiple_choice':
        question, answer = example['query'], example['choices'][example['gold']]
    elif task.kind == 'schema':
        question = example['context_options'][example['gold']]
        answer = example['continuation']
    else:
        question, answer = example['context'].strip(), example['continuation']
    return f'{question}{task.delimiter}{answer}'


def common_prefix(rows: list[list[int]]) -> int:
    """How many ids at the beginning all rows share."""
    columns = zip(*rows, strict=False)
    shared = (len(set(ids)) == 1 for ids in columns)
    return next((n for n, same in enumerate(shared) if not same), min(map(len, rows)))


def pairs_of(task: CoreTask, rows: list[list[int]], size: int) -> list[tuple[list, list]]:
    """(context, continuation to score) of each prompt, at most `size` ids, cut on the left.

    Choices are scored where they differ from one another, and contexts by what follows them.
    """
    if task.kind == 'schema':
        suffix = common_prefix([row[::-1] for row in rows])
        starts = [len(row) - suffix for row in rows]
    else:
        starts = [common_prefix(rows)] * len(rows)
    if task.kind == 'language_modeling':
        rows, starts = rows[1:], starts[1:]
    pairs = []
    for row, start in zip(rows, starts, strict=True):
        cut = max(0, len(row) - size)
        start = max(1, start - cut)  # the first id has nothing before it
        pairs.append((row[cut:][:start], row[cut:][start:]))
    return pairs


def is_right(task: CoreTask, example: dict, pairs: list, scores: list[tuple]) -> bool:
    """Whether the answer is the likeliest: token by token, or of the choices by its mean loss."""
    if task.kind == 'language_modeling':
        return scores[0][1]
    losses = [
        -logprob / len(answer) if answer else math.nan
        for (_, answer), (logprob, _) in zip(pairs, scores, strict=True)
    ]
    return losses.index(min(losses)) == example['gold']


# -----------------------------------------------------------------------------
# all of them


class Scored:
    """What was scored so far, of any model, in a file of JSON lines."""

    def __init__(self, path: Path):
        self.path, self.found = path, {}
        for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a killed command
                continue
            self.found[record['key'], record['first']] = record

    def group(self, key: str, first: int, compute: Callable[[], dict]) -> dict:
        """The record of a group of examples, computed if it is new."""
        if (key, first) not in self.found:
            self.found[key, first] = record = {'key': key, 'first': first, **compute()}
            with self.path.open('a', encoding='utf-8') as file:
                file.write(f'\n{json.dumps(record)}')  # below a line that was cut off
        return self.found[key, first]


def score_group(
    model: GPT, tokenizer: Tokenizer, task: CoreTask, examples: list[dict], first: int
) -> dict:
    """Whether each example of the group at `first` is right, and how many prompts were cut."""
    size, cut, pairs = model.config.block_size, 0, []
    group = examples[first : first + GROUP]
    for number, example in enumerate(group, first):
        texts = render(task, example, few_shot_examples(examples, number, task.shots))
        rows = [[tokenizer.eot, *tokenizer.encode(text).tolist()] for text in texts]
        pairs.append(pairs_of(task, rows, size))
        cut += sum(len(row) > size for row in rows)
    scores = iter(score(model, [pair for each in pairs for pair in each]))
    right = [
        is_right(task, example, each, [next(scores) for _ in each])
        for example, each in zip(group, pairs, strict=True)
    ]
    return {'right': right, 'cut': cut}


def score_task(
    model: GPT, tokenizer: Tokenizer, task: CoreTask, examples: list[dict], key: str, scored: Scored
) -> dict:
    """A task's entry of the report."""
    records = []
    firsts = range(0, len(examples), GROUP)
    for first in with_progress(firsts, task.label):
        compute = functools.partial(score_group, model, tokenizer, task, examples, first)
        records.append(scored.group(key, first, compute))
    right = [each for record in records for each in record['right']]
    accuracy = sum(right) / len(right)
    error = math.sqrt(accuracy * (1 - accuracy) / len(right))
    metrics = {
        'acc': {'value': accuracy, 'stderr': error, 'published': {}},
        'centered': {'value': task.centered(accuracy), 'published': {}},
    }
    cut = sum(record['cut'] for record in records)
    return {'task': task.label, 'examples': len(right), 'cut': cut, 'metrics': metrics}


def with_progress(firsts: range, label: str) -> Iterator[int]:
    """The groups of a task, with a bar, or a line now and then without a terminal."""
    printed = time.perf_counter()
    with tqdm(firsts, desc=label, unit=f'x{GROUP}', leave=False, disable=None) as bar:
        for done, first in enumerate(bar):
            if bar.disable and time.perf_counter() - printed > PROGRESS_SECONDS:
                printed = time.perf_counter()
                print(f'{label}: {done / len(firsts):.0%}', file=sys.stderr, flush=True)
            yield first


def score_core(
    settings: dict, entries: list[dict], load: Callable[[dict], tuple[GPT, Tokenizer]]
) -> None:
    """bench.py --task=core: score and print each task, then CORE, and add their entries.

    load: loads the model and its tokenizer from the settings.
    """
    bundle = Bundle(settings['core_data'])
    exact = settings['dtype'] == 'auto' and not settings['quantize']
    model, tokenizer = load({**settings, 'dtype': 'float32'} if exact else settings)
    if tokenizer.eot is None:
        raise UserError(
            'task=core: each prompt begins with the end-of-text token, which the tokenizer '
            f'{tokenizer.name} lacks; evaluate a model whose tokenizer has one'
        )
    found = {task: bundle.examples(task, settings['limit']) for task in bundle.tasks}
    check_shots(found, settings['limit'])
    scored = Scored(Path(settings['json']).with_suffix('.core.jsonl'))
    identity = [fingerprint(model), json.dumps(tokenizer.to_dict(), default=str)]
    print(f'{"task":<36} {"accuracy":>8} {"stderr":>7} {"centered":>8} {"examples":>8}', flush=True)
    for task, examples in found.items():
        if not examples:
            entries.append({'task': task.label, 'not run': f'{task.file} is missing'})
        else:
            key = digest_of([*identity, astuple(task), examples])
            entries.append(score_task(model, tokenizer, task, examples, key, scored))
        print(row_of(entries[-1]), flush=True)
    entries.append(core_entry(entries, found))
    print(*summary(entries), sep='\n')


def check_shots(found: dict[CoreTask, list[dict] | None], limit: int | None) -> None:
    for task, examples in found.items():
        if examples and len(examples) <= task.shots:
            raise UserError(
                f'limit={limit}: {task.label} has {task.shots} solved examples before each '
                f'question; use --limit={task.shots + 1} or more, or omit it'
            )


def digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def core_entry(entries: list[dict], found: dict) -> dict:
    """CORE, unless a task was not run."""
    scores = [entry['metrics']['centered']['value'] for entry in entries if 'metrics' in entry]
    missing = len(entries) - len(scores)
    if missing:
        return {'task': 'core', 'not run': f'{counted(missing, "task")} not run'}
    metrics = {'core': {'value': sum(scores) / len(scores), 'published': GPT2}}
    return {'task': 'core', 'tasks': len(scores), 'metrics': metrics}


def row_of(entry: dict) -> str:
    if 'metrics' not in entry:
        return f'{entry["task"]:<36} not run: {entry["not run"]}'
    acc, centered = (entry['metrics'][name] for name in ('acc', 'centered'))
    figures = f'{acc["value"]:>8.4f} {acc["stderr"]:>7.4f} {centered["value"]:>8.4f}'
    return f'{entry["task"]:<36} {figures} {entry["examples"]:>8,}'


def summary(entries: list[dict]) -> Iterator[str]:
    core = entries[-1]
    if 'metrics' in core:
        published = ', '.join(f'{size} {value}' for size, value in GPT2.items())
        figure = core['metrics']['core']['value']
        yield f'CORE {figure:.4f}; GPT-2 as nanochat measured it: {published}'
    else:
        yield f'CORE: {core["not run"]}'
    if cut := sum(entry.get('cut', 0) for entry in entries):
        yield f'truncated on the left, to the context of the model: {counted(cut, "prompt")}'
