"""
Offline inference: complete a file of prompts in batches; the completions are written in order.

    Batch(settings, sampling_for, names).run(model, tokenizer)

In a .txt file, or one without a suffix, each line is a prompt. In a .jsonl or .ndjson file each
line is an object with a "prompt" and optionally an "id" and sampling settings. The completions are
JSON lines. Until they are complete they are in <out>.part, with a description of the job in
<out>.job, so that a killed batch can be resumed.
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
from flatgpt.errors import UserError, did_you_mean, short_repr
from flatgpt.files import strict_json
from flatgpt.inference.engine import NOT_FINITE, Engine
from flatgpt.inference.grammar import Grammar
from flatgpt.inference.request import Request, TokenOutput
from flatgpt.inference.sampling import SamplingParams
from model import GPT

JSON_LINES = ('.jsonl', '.ndjson')
TEXT_LINES = ('.txt', '.text', '')
LOOKAHEAD = 4096  # maximum number of completions that wait for an earlier one


class Batch:
    """Completes the prompts of the file settings['batch'] into the file settings['out'].

    sampling_for: from a line's own settings, as in JSON, to its SamplingParams; raises UserError.
    names: the settings that a line may have.
    """

    def __init__(
        self, settings: dict, sampling_for: Callable[[dict], SamplingParams], names: Sequence[str]
    ):
        self.settings, self.sampling_for, self.names = settings, sampling_for, names
        self.path, self.out = Path(settings['batch']), settings['out']
        if not self.out:
            raise UserError(f'--batch={self.path}: give a file for the completions as --out')
        if self.path.suffix.lower() not in (*JSON_LINES, *TEXT_LINES):
            raise UserError(
                f'--batch={self.path}: {self.path.suffix} files are not supported; give a .txt '
                'file with a prompt per line, or a .jsonl file'
            )
        self.check_out()
        if not Path(self.out).parent.is_dir():
            raise UserError(f'--out={self.out}: create the folder {Path(self.out).parent} first')
        self.part, self.job = Path(f'{self.out}.part'), Path(f'{self.out}.job')
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(
                f'--batch={self.path}: cannot be read: {error.strerror}; give another file'
            ) from error
        self.lines = content.removesuffix(b'\n').split(b'\n') if content else []
        if not self.lines:
            raise UserError(f'--batch={self.path}: is empty; write a prompt per line')

    def run(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        grammar: Grammar | None = None,
        draft: GPT | str | None = None,
    ) -> None:
        """Complete the prompts that are not complete yet; grammar, draft: see generate()."""
        self.grammar = grammar
        lock = FileLock(f'{self.out}.lock', timeout=0)
        try:
            with lock:
                errors = self.complete_all(model, tokenizer, draft)
        except Timeout:
            raise UserError(
                f'--out={self.out}: another batch is writing it; wait, or choose another file'
            ) from None
        except OSError as error:
            raise UserError(f'--out={self.out}: {error.strerror}') from error
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        print(f'{self.out}: {outcome(len(self.lines), errors)}', file=sys.stderr)
        if errors:
            raise SystemExit(1)

    def complete_all(self, model: GPT, tokenizer: Tokenizer, draft: GPT | str | None) -> list[dict]:
        """Write all completions that are still missing -> those of all that are errors."""
        done = self.resume(model)
        errors = [completion for completion in done if 'error' in completion]
        rows = min(self.settings['rows'], len(self.lines))
        engine = Engine(model, tokenizer, rows, draft=draft)
        bar = tqdm(total=len(self.lines), initial=len(done), unit='prompt', disable=None)
        with self.part.open('ab') as file, bar:
            for completion in self.completions(engine, len(done)):
                errors += [completion] if 'error' in completion else []
                text = json.dumps(completion, ensure_ascii=False)
                # a lone surrogate is written as a JSON escape
                file.write(text.encode(errors='backslashreplace') + b'\n')
                file.flush()
                bar.update()
        self.check_out()
        self.part.rename(self.out)
        self.job.unlink()
        return errors

    def check_out(self) -> None:
        if Path(self.out).exists():
            raise UserError(f'--out={self.out}: already exists; choose another file')

    def resume(self, model: GPT) -> list[dict]:
        """The completions of a killed run of the same job, without a line that was cut off."""
        job = self.description(model)
        if not self.part.exists():
            self.job.write_text(json.dumps(job), encoding='utf-8')
            return []
        if not self.job.exists() or json_or_none(self.job.read_bytes()) != job:
            raise UserError(
                f'{self.part}: belongs to another batch, model or settings; delete it, or choose '
                'another --out'
            )
        done, size = [], 0
        for line in self.part.read_bytes().split(b'\n')[:-1]:
            completion = json_or_none(line)
            if not isinstance(completion, dict) or completion.get('line') != len(done) + 1:
                break
            done.append(completion)
            size += len(line) + 1
        os.truncate(self.part, size)
        print(f'{self.part}: resuming after {len(done)} completions', file=sys.stderr)
        return done

    def description(self, model: GPT) -> dict:
        """What the completions depend on."""
        where = ('out_dir', 'init_from', 'checkpoint', 'dtype', 'quantize', 'tokenizer')
        return {name: self.settings[name] for name in (*self.names, *where)} | {
            'kind': self.path.suffix,
            **({'grammar': self.grammar.text} if self.grammar else {}),
            'model': fingerprint(model),
            'batch': hashlib.sha256(b'\n'.join(self.lines)).hexdigest(),
        }

    def completions(self, engine: Engine, first: int) -> Iterator[dict]:
        """The completions from line `first` on, in order; at most one batch waits in the engine."""
        ready: dict[int, dict] = {}
        number = next_out = first
        while next_out < len(self.lines):
            most = min(len(self.lines), next_out + LOOKAHEAD)
            while number < most and len(engine.waiting) < len(engine.slots):
                ready[number] = self.submit(engine, number)
                number += 1
            engine.step()
            while next_out in ready and ready[next_out].get('finish', 'error'):
                yield ready.pop(next_out)
                next_out += 1

    def submit(self, engine: Engine, number: int) -> dict:
        """Submit line `number` to the engine -> its completion, with a 'finish' once it is done."""
        completion = {'line': number + 1}
        try:
            text, sampling, own = self.parse(self.lines[number])
            ids = engine.tokenizer.encode(text, allow_eot=True)
            if not len(ids):
                raise UserError('the prompt is empty; give it text')
        except UserError as error:
            return completion | {'error': str(error)}
        completion |= {**own, 'text': '', 'tokens': 0, 'finish': None}
        if len(ids) > engine.model.config.block_size:
            completion['prompt_tokens_left_out'] = len(ids) - engine.model.config.block_size
        texts = []

        def on_token(output: TokenOutput) -> None:
            texts.append(output.text)
            completion['tokens'] += 1
            completion['finish'] = output.finish_reason
            if output.finish_reason:
                completion['text'] = ''.join(texts)
            if output.finish_reason == 'error':
                completion['error'] = output.problem or NOT_FINITE

        request = Request(ids, sampling, on_token, index=number, grammar=self.grammar)
        engine.submit(request)
        return completion

    def parse(self, line: bytes) -> tuple[str, SamplingParams, dict]:
        """A line's prompt, its SamplingParams, and the fields that its completion repeats."""
        try:
            text = line.decode('utf-8-sig').removesuffix('\r')
        except UnicodeDecodeError as error:
            raise UserError(
                f'invalid UTF-8 at byte {error.start}; save the line as UTF-8'
            ) from error
        if self.path.suffix.lower() not in JSON_LINES:
            return text, self.sampling_for({}), {'prompt': text}
        try:
            record = strict_json(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f'invalid JSON, give an object with a "prompt": {error}') from error
        if not isinstance(record, dict) or not isinstance(record.get('prompt'), str):
            raise UserError('not a JSON object with a string "prompt"; give one')
        repeated = {key: record.pop(key) for key in ('id', 'prompt') if key in record}
        for name in record:
            if name not in self.names:
                near = did_you_mean(name, self.names).strip()
                hint = near or f'use prompt, id, {", ".join(self.names)}'
                raise UserError(f'unknown setting {short_repr(name)}; {hint}')
        return repeated['prompt'], self.sampling_for(record), repeated


def outcome(lines: int, errors: list[dict]) -> str:
    """What a batch came to; errors: the completions that have one, in order."""
    counts = {'completion': lines - len(errors), 'error': len(errors)}
    summary = ', '.join(f'{n} {name}{"s" * (n != 1)}' for name, n in counts.items())
    if errors:
        summary += f'; the first, line {errors[0]["line"]}: {errors[0]["error"]}'
    return summary


@torch.inference_mode()
def fingerprint(model: GPT) -> str:
    """A hash of the logits after a fixed prompt, to recognize the model."""
    device, c = model.embedding.weight.device, model.config
    idx = torch.arange(min(c.block_size, c.vocab_size, 64), device=device)[None]
    return hashlib.sha256(model(idx)[0][0, -1].float().cpu().numpy().tobytes()).hexdigest()


def json_or_none(text: bytes):
    """The value of a JSON text, None if it is invalid, as after a kill."""
    with suppress(ValueError, RecursionError):
        return strict_json(text)
    return None
