"""
A file of prompts: many are computed at once, and the answers are written in their order.

    Batch(settings, sampling_for, names).run(model, tokenizer)

Each line of a .txt file, or of one without an ending, is a prompt. In a .jsonl or .ndjson file it
is an object with a "prompt", and perhaps an "id" and settings of its own. The answers are JSON
lines. Until all are there they are in <out>.part, and <out>.job records what they answer, so that a
killed batch can be resumed.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError, did_you_mean
from flatgpt.files import strict_json
from flatgpt.inference.engine import NOT_FINITE, Engine
from flatgpt.inference.request import Request, TokenOutput
from flatgpt.inference.sampling import SamplingParams
from model import GPT

JSON_LINES = ('.jsonl', '.ndjson')
TEXT_LINES = ('.txt', '.text', '')
LOOKAHEAD = 4096  # answers kept at most while they wait for a slow one before them


class Batch:
    """Answers the prompts of the file settings['batch'] in the file settings['out'].

    sampling_for: the SamplingParams of a line that has these settings of its own, as JSON has them;
    raises UserError.
    names: the settings that a line may have.
    """

    def __init__(
        self, settings: dict, sampling_for: Callable[[dict], SamplingParams], names: Sequence[str]
    ):
        self.settings, self.sampling_for, self.names = settings, sampling_for, names
        self.path, self.out = Path(settings['batch']), settings['out']
        if not self.out:
            raise UserError(f'--batch={self.path}: say where the answers go, with --out=')
        if self.path.suffix.lower() not in (*JSON_LINES, *TEXT_LINES):
            raise UserError(
                f'--batch={self.path}: files that end in {self.path.suffix} are not read; give a '
                '.txt file with a prompt a line, or a .jsonl file'
            )
        self.check_free()
        if not Path(self.out).parent.is_dir():
            raise UserError(f'--out={self.out}: there is no folder {Path(self.out).parent}')
        self.part, self.job = Path(f'{self.out}.part'), Path(f'{self.out}.job')
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f'--batch={self.path}: cannot be read: {error.strerror}') from error
        self.lines = content.removesuffix(b'\n').split(b'\n') if content else []
        if not self.lines:
            raise UserError(f'--batch={self.path}: is empty; it takes a prompt a line')

    def run(self, model: GPT, tokenizer: Tokenizer) -> None:
        held = FileLock(f'{self.out}.lock', timeout=0)
        try:
            with held:
                errors = self.answer_all(model, tokenizer)
        except Timeout:
            raise UserError(f'--out={self.out}: another batch is writing it now') from None
        except OSError as error:
            raise UserError(f'--out={self.out}: {error.strerror}') from error
        with suppress(OSError):
            Path(held.lock_file).unlink()
        print(f'{self.out}: {len(self.lines)} answers, {errors} of them errors', file=sys.stderr)
        if errors:
            raise SystemExit(1)

    def answer_all(self, model: GPT, tokenizer: Tokenizer) -> int:
        """Write all answers that are not there yet -> how many of all are errors."""
        done = self.begun(model)
        errors = sum('error' in answer for answer in done)
        engine = Engine(model, tokenizer, min(self.settings['rows'], len(self.lines)))
        bar = tqdm(total=len(self.lines), initial=len(done), unit='text', disable=None)
        with self.part.open('ab') as file, bar:
            for answer in self.answers(engine, len(done)):
                errors += 'error' in answer
                text = json.dumps(answer, ensure_ascii=False)
                # half a surrogate pair is written as JSON's escape for it
                file.write(text.encode(errors='backslashreplace') + b'\n')
                file.flush()
                bar.update()
        self.check_free()
        self.part.rename(self.out)
        self.job.unlink()
        return errors

    def check_free(self) -> None:
        if Path(self.out).exists():
            raise UserError(f'--out={self.out}: is there already; name another file')

    def begun(self, model: GPT) -> list[dict]:
        """The answers that an earlier start of the same job left, without what a kill cut off."""
        job = self.description(model)
        if not self.part.exists():
            self.job.write_text(json.dumps(job), encoding='utf-8')
            return []
        if not self.job.exists() or json_or_none(self.job.read_bytes()) != job:
            raise UserError(
                f'{self.part}: is of another batch, model or settings; delete it, or name another '
                '--out'
            )
        done, size = [], 0
        for line in self.part.read_bytes().split(b'\n')[:-1]:
            answer = json_or_none(line)
            if not isinstance(answer, dict) or answer.get('line') != len(done) + 1:
                break
            done.append(answer)
            size += len(line) + 1
        os.truncate(self.part, size)
        print(f'{self.part}: goes on after {len(done)} answers', file=sys.stderr)
        return done

    def description(self, model: GPT) -> dict:
        """What the answers depend on."""
        where = ('out_dir', 'init_from', 'checkpoint', 'dtype', 'quantize', 'tokenizer')
        return {name: self.settings[name] for name in (*self.names, *where)} | {
            'kind': self.path.suffix,
            'model': fingerprint(model),
            'batch': hashlib.sha256(b'\n'.join(self.lines)).hexdigest(),
        }

    def answers(self, engine: Engine, first: int) -> Iterator[dict]:
        """The answers from line `first` on, in order; the engine is kept full, and little more."""
        ready: dict[int, dict] = {}
        number = next_out = first
        while next_out < len(self.lines):
            most = min(len(self.lines), next_out + LOOKAHEAD)
            while number < most and len(engine.waiting) < len(engine.slots):
                ready[number] = self.begin(engine, number)
                number += 1
            engine.step()
            while next_out in ready and ready[next_out].get('finish', 'error'):
                yield ready.pop(next_out)
                next_out += 1

    def begin(self, engine: Engine, number: int) -> dict:
        """Hand line `number` to the engine -> its answer, which has a 'finish' once it is there."""
        answer = {'line': number + 1}
        try:
            text, sampling, own = self.parse(self.lines[number])
            ids = engine.tokenizer.encode(text, allow_eot=True)
            if not len(ids):
                raise UserError('the prompt is empty')
        except UserError as error:
            return answer | {'error': str(error)}
        answer |= {**own, 'text': '', 'tokens': 0, 'finish': None}
        if len(ids) > engine.model.config.block_size:
            answer['prompt_tokens_left_out'] = len(ids) - engine.model.config.block_size
        texts = []

        def take(output: TokenOutput) -> None:
            texts.append(output.text)
            answer['tokens'] += 1
            answer['finish'] = output.finish
            if output.finish:
                answer['text'] = ''.join(texts)
            if output.finish == 'error':
                answer['error'] = NOT_FINITE

        engine.submit(Request(ids, sampling, take, row=number))
        return answer

    def parse(self, line: bytes) -> tuple[str, SamplingParams, dict]:
        """A line's prompt, how it is to be answered, and what its answer repeats."""
        try:
            text = line.decode('utf-8-sig').removesuffix('\r')
        except UnicodeDecodeError as error:
            raise UserError(f'not UTF-8 at byte {error.start}') from error
        if self.path.suffix.lower() not in JSON_LINES:
            return text, self.sampling_for({}), {'prompt': text}
        try:
            record = strict_json(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f'not a JSON object with a "prompt" that is text: {error}') from error
        if not isinstance(record, dict) or not isinstance(record.get('prompt'), str):
            raise UserError('not a JSON object with a "prompt" that is text')
        repeated = {key: record.pop(key) for key in ('id', 'prompt') if key in record}
        for name in record:
            if name not in self.names:
                near = did_you_mean(name, self.names).strip()
                hint = near or f'there are prompt, id, {", ".join(self.names)}'
                raise UserError(f'no setting is called {name[:40]!r}; {hint}')
        return repeated['prompt'], self.sampling_for(record), repeated


@torch.inference_mode()
def fingerprint(model: GPT) -> str:
    """A hash of the logits after a fixed prompt: other weights give other logits."""
    device, c = model.embedding.weight.device, model.config
    idx = torch.arange(min(c.block_size, c.vocab_size, 64), device=device)[None]
    return hashlib.sha256(model(idx)[0][0, -1].float().cpu().numpy().tobytes()).hexdigest()


def json_or_none(text: bytes):
    """The value of a JSON text, None where a kill has cut it off."""
    with suppress(ValueError, RecursionError):
        return strict_json(text)
    return None
