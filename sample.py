"""
Let a trained model write.

$ python sample.py                                   # from the newest run below out/
$ python sample.py "To be, or not" --num_samples=3   # continue a text, three times
$ python sample.py --start=FILE:prompt.txt --temperature=0 --max_new_tokens=100
$ python sample.py --out_dir=out/my_run --chat       # a console that remembers the conversation
$ python sample.py --batch=prompts.jsonl --out=answers.jsonl

A batch file has a prompt a line; in a .jsonl or .ndjson file each line is an object with a
"prompt" and, where they differ, settings of the texts ("stop" may be a list). The answers are JSON
lines in the order of the prompts; a line that cannot be answered says why under "error". Killed,
the same command goes on where it was.

From Python: load() here, and generate(), complete() or an Engine of engine.py.
"""

import hashlib
import json
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from configurator import configure
from flatgpt.checkpoint.load import load_model, newest_run
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import ConfigError, UserError, did_you_mean, one_of, within
from flatgpt.inference.engine import NOT_FINITE, Engine, generate
from flatgpt.inference.quantize import freeze
from flatgpt.inference.request import Piece, Request
from flatgpt.inference.sampling import Sampling
from flatgpt.runtime import keep_freed_memory, pick_device, pick_dtype
from model import GPT

# -----------------------------------------------------------------------------
# model
out_dir: str | None = None  # folder of the run; None is the newest run below out/
init_from = 'resume'  # without out_dir: a run's folder, or gpt2, gpt2-xl ...
checkpoint: str | None = None  # None or 'best' (lowest validation loss), 'last', or a path
tokenizer: str | None = None  # not the model's own: a name, tokenizer.json or meta.pkl
device = 'auto'  # 'cpu', 'mps', 'cuda', 'cuda:1' ...
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'
quantize: str | None = None  # 'int8': half the bytes of 16 bits; on a CPU faster for few texts
# text
start = '\n'  # the prompt; FILE:prompt.txt reads it from a file; <|endoftext|> is understood
chat = False  # an interactive console in place of samples
batch: str | None = None  # a file with a prompt a line, all to be answered
out: str | None = None  # the file for the answers
rows = 16  # texts of a batch file that are computed at once
num_samples = 10  # texts, written side by side as one batch
max_new_tokens = 500  # tokens in each at most
stop = ''  # end a text before this string; | separates several; \n, \t, \| and \\ are understood
# choice of each token
seed = 1337  # the same seed gives the same texts
temperature = 0.8  # below 1 keeps to what is likely, above 1 is wilder, 0 takes the likeliest
top_k: int | None = 200  # choose among this many likeliest tokens; None or 0: all
top_p = 1.0  # choose among the likeliest tokens that make up this share of the probability
min_p = 0.0  # leave out tokens less likely than this share of the likeliest one's probability
repetition_penalty = 1.0  # above 1 disfavours every token that prompt or text already have
frequency_penalty = 0.0  # taken off a token's logit for each time the new text has it
presence_penalty = 0.0  # and once, if it has it at all
# -----------------------------------------------------------------------------

JSON_LINES = ('.jsonl', '.ndjson')
AHEAD = 4096  # answers of a batch file that wait for a slow one before them, at most
CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], '\N{REPLACEMENT CHARACTER}')
CHOICES = [f.name for f in fields(Sampling) if f.name in globals()]  # settings of each text
DOES = {'a': 'answers what you type', 'no': 'continues what you type'}
HELP = """Type text, and the model continues it. The conversation is remembered, as far as the
model's context reaches, until you clear it. Ctrl-C stops an answer.
  /set NAME VALUE   change a setting, for example /set temperature 0.5
  /reset            forget the conversation
  /quit             leave; so does Ctrl-D, or Ctrl-C twice"""


# -----------------------------------------------------------------------------
# the command line


def sampling_of(settings: dict) -> Sampling:
    """The Sampling that settings describe; they spell its stop strings as one text."""
    chosen = {name: settings[name] for name in CHOICES}
    if chosen['max_new_tokens'] < 1:
        raise ConfigError(f'max_new_tokens={chosen["max_new_tokens"]}: must be at least 1')
    return Sampling(**{**chosen, 'stop': split_stop(settings['stop'])})


def split_stop(text: str) -> tuple[str, ...]:
    """'END|\\n\\n' -> ('END', a blank line)."""
    escapes = {'n': '\n', 't': '\t', '|': '|', '\\': '\\'}
    parts = re.findall(r'(?:\\.|[^|])+', text, re.DOTALL)
    if text and not parts:
        raise ConfigError(f'stop={text!r}: a bar separates stop strings; write \\| to stop at one')
    return tuple(re.sub(r'\\(.)', lambda m: escapes.get(m[1], m[0]), part) for part in parts)


def read_prompt(text: str) -> str:
    """The prompt that --start means: its text, or that of the file it names."""
    path = text.removeprefix('FILE:')
    if path != text:
        try:
            text = Path(path).read_text(encoding='utf-8-sig')
        except OSError as error:
            raise UserError(f'the prompt file {path} cannot be read: {error.strerror}') from error
        except UnicodeDecodeError as error:
            raise UserError(f'the prompt file {path} is not UTF-8 at byte {error.start}') from error
    if not text:
        raise UserError('the prompt is empty; give some text, as --start="Once upon a time"')
    return text


def prompt_ids(tokenizer: Tokenizer, prompt: str):
    """The prompt's ids, and its text for showing. The default may begin at the end of text."""
    try:
        return tokenizer.encode(prompt, allow_eot=True), prompt
    except UserError:
        if prompt != start or tokenizer.eot is None:
            raise
        return [tokenizer.eot], ''


def write(text: str) -> None:
    """Print text at once. On a terminal, characters that would steer it are made harmless."""
    sys.stdout.write(text.translate(CONTROL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_samples(pieces: Iterator[Piece], prompt: str, samples: int) -> None:
    """Show the first sample as it is written, and each other one from when its turn has come."""
    ready = [prompt] * samples  # text not yet shown
    finished = [False] * samples
    current = 0
    for piece in pieces:
        ready[piece.row] += piece.text
        finished[piece.row] = piece.finish is not None
        while current < samples:
            write(ready[current])
            ready[current] = ''
            if not finished[current]:
                break
            write('\n---------------\n' if samples > 1 else '\n')
            current += 1


class Console:
    """--chat: a conversation by the tokenizer's chat template. Without one, what the user types and
    what the model answers are one text, which it continues."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, settings: dict, opening: str):
        self.engine, self.tokenizer, self.opening = Engine(model, tokenizer, 1), tokenizer, opening
        self.settings = {name: settings[name] for name in CHOICES}
        self.size, self.start = model.config.block_size, 0
        self.ids, self.turn = self.encode(opening), 0  # the conversation
        try:
            self.tokenizer.encode('\n')
            self.newline = '\n'
        except UserError:
            self.newline = ''

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, allow_eot=True).tolist()

    def run(self) -> None:
        has = 'a' if self.tokenizer.chat_template else 'no'
        print(f'This model has {has} chat template: it {DOES[has]}. /help lists commands.')
        if self.opening:
            write(self.opening + '\n')
        while (line := self.read_line()) not in (None, '/quit', '/exit'):
            try:
                if line.startswith('/'):
                    self.command(*line.split(maxsplit=1))
                elif line:
                    self.answer(line)
            except UserError as error:
                print(f'error: {error}', file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                write('\n(stopped)\n')

    def read_line(self) -> str | None:
        """The next line, None at the end. Ctrl-C drops a line; a second one in a row leaves."""
        prompt = '> ' if sys.stdin.isatty() else ''
        for reply in ('\n(Ctrl-C again, Ctrl-D or /quit leaves)\n', '\n'):
            try:
                return input(prompt)
            except EOFError:
                return write('\n' if prompt else '')
            except KeyboardInterrupt:
                write(reply)
        return None

    def command(self, name: str, rest: str = '') -> None:
        if name == '/help':
            values = [f'  {name} = {value!r}' for name, value in self.settings.items()]
            print(HELP, 'Settings:', *values, sep='\n', flush=True)
        elif name == '/reset':
            self.ids, self.turn, self.start = self.encode(self.opening), 0, 0
            print('(the conversation is forgotten)', flush=True)
        elif name == '/set':
            self.set(*rest.partition(' ')[::2])
        else:
            raise UserError(f'{name}: no such command; /help lists them, and /quit leaves')

    def set(self, name: str, value: str) -> None:
        if not value:
            raise UserError('/set needs a name and a value, for example /set temperature 0.5')
        if name not in self.settings:
            hint = did_you_mean(name, self.settings)
            raise UserError(f'/set {name}: no such setting; {hint}/help lists them')
        # __file__ has configure read the settings' types where they are declared
        defaults = {'__file__': __file__, **self.settings}
        changed = configure(defaults, [f'--{name}={value}'])
        sampling_of(changed)  # raises if the value is out of range
        self.settings = changed
        print(f'({name} = {changed[name]!r})', flush=True)

    def answer(self, line: str) -> None:
        sampling, template = sampling_of(self.settings), self.tokenizer.chat_template
        if template:
            ids = self.tokenizer.encode_chat([{'role': 'user', 'content': line}]).tolist()
            end = template['assistant'][1]
            if end and end not in self.tokenizer.special:
                sampling = replace(sampling, stop=(*sampling.stop, end))
        else:
            ids = self.encode((self.newline if self.ids else '') + line)
        self.ids, self.turn = self.ids + ids, self.turn + 1
        while len(self.ids) - self.start > self.size:  # by eighths, as the engine forgets
            self.start += max(1, self.size // 8)
        # every answer has its own random numbers
        pieces, prompt = deque(), self.ids[self.start :]
        request = Request(prompt, sampling, pieces.append, seed=(sampling.seed, self.turn))
        before, shown = len(self.ids), ''
        self.engine.submit(request)
        try:
            while self.engine.step():
                while pieces:  # what was shown is what is remembered, also after Ctrl-C
                    piece = pieces.popleft()
                    if piece.finish == 'error':
                        raise UserError(NOT_FINITE)
                    shown += piece.text
                    write(piece.text)
                    if piece.finish != 'stop':
                        self.ids.append(piece.token)
                    elif piece.token not in self.tokenizer.ends:  # some of what came is not shown
                        self.ids[before:] = self.encode(shown)
        finally:
            request.cancel()
            if template:
                self.ids += self.tokenizer.encode_mark(end).tolist()
        write('\n')


# -----------------------------------------------------------------------------
# a file of prompts


class Batch:
    """Answers the prompts of a file. Until all are answered, the answers lie in <out>.part, and
    <out>.job says to what."""

    def __init__(self, settings: dict):
        self.settings, self.path, self.out = settings, Path(settings['batch']), settings['out']
        if not self.out:
            raise UserError(f'--batch={self.path}: say where the answers go, with --out=')
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
        names = (*CHOICES, 'out_dir', 'init_from', 'checkpoint', 'dtype', 'quantize', 'tokenizer')
        job = {name: self.settings[name] for name in names} | {'kind': self.path.suffix}
        job |= {'model': fingerprint(model)}
        job |= {'batch': hashlib.sha256(b'\n'.join(self.lines)).hexdigest()}
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

    def answers(self, engine: Engine, first: int) -> Iterator[dict]:
        """The answers from line `first` on, in order, of which a few lines are in the engine."""
        ready: dict[int, dict] = {}
        number = next_out = first
        while next_out < len(self.lines):
            most = min(len(self.lines), next_out + AHEAD)
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

        def take(piece: Piece) -> None:
            answer['text'] += piece.text
            answer['tokens'] += 1
            answer['finish'] = piece.finish
            if piece.finish == 'error':
                answer['error'] = NOT_FINITE

        engine.submit(Request(ids, sampling, take, row=number))
        return answer

    def parse(self, line: bytes) -> tuple[str, Sampling, dict]:
        """A line's prompt, how it is to be answered, and what is repeated in its answer."""
        try:
            text = line.decode('utf-8-sig').removesuffix('\r')
        except UnicodeDecodeError as error:
            raise UserError(f'not UTF-8 at byte {error.start}') from error
        if self.path.suffix.lower() not in JSON_LINES:
            return text, sampling_of(self.settings), {'prompt': text}
        record = json_or_none(text)
        if not isinstance(record, dict) or not isinstance(record.get('prompt'), str):
            raise UserError('not a JSON object with a "prompt" that is text')
        kept = ('prompt', 'id')
        chosen = {k: v for k, v in record.items() if k not in kept and (k, v) != ('stop', None)}
        own = {key: record[key] for key in ('id', 'prompt') if key in record}
        for key in chosen:
            if key not in CHOICES:
                hint = did_you_mean(key, CHOICES).strip() or f'there are {", ".join(CHOICES)}'
                raise UserError(f'no setting is called {key!r}; {hint}')
        stops = None if isinstance(chosen.get('stop', ''), str) else chosen.pop('stop')
        flags = [f'--{key}={value}' for key, value in chosen.items()]
        sampling = sampling_of(configure({'__file__': __file__, **self.settings}, flags))
        if stops is not None:
            if not (isinstance(stops, list) and all(isinstance(stop, str) for stop in stops)):
                raise UserError('stop: needs a text, or a list of texts')
            sampling = replace(sampling, stop=tuple(stops))
        return record['prompt'], sampling, own


@torch.inference_mode()
def fingerprint(model: GPT) -> str:
    """What a model answers to all its tokens in a row: other weights give other logits."""
    device, c = model.embedding.weight.device, model.config
    idx = torch.arange(min(c.block_size, c.vocab_size, 64), device=device)[None]
    return hashlib.sha256(model(idx)[0][0, -1].float().cpu().numpy().tobytes()).hexdigest()


def json_or_none(text: str | bytes):
    def refuse(constant: str):
        raise ValueError(f'{constant} is no JSON')

    with suppress(ValueError, RecursionError):
        return json.loads(text, parse_constant=refuse)
    return None


def source(settings: dict) -> tuple[str | Path, str]:
    """The folder, name or checkpoint that the settings mean, and which of its checkpoints."""
    # In a training run's config, out_dir is the model it made, and init_from what that came from
    where, which = settings['out_dir'] or settings['init_from'], settings['checkpoint'] or 'best'
    if which not in ('best', 'last'):
        where = which
    elif where in ('resume', 'scratch'):
        where = newest_run()
    return where, which


def load(settings: dict) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer that the settings name, ready to write."""
    device = pick_device(settings['device'])
    if device == 'cpu':
        keep_freed_memory()
    elif device.startswith('cuda:'):
        torch.cuda.set_device(device)
    one_of((None, 'int8'), settings, 'quantize')
    by_itself = settings['quantize'] and settings['dtype'] == 'auto'
    dtype = pick_dtype('bfloat16' if by_itself else settings['dtype'], device)
    where, which = source(settings)
    model, tokenizer, state = load_model(where, which, device, tokenizer=settings['tokenizer'])
    if tokenizer is None:
        raise UserError(
            f'{where} came without a tokenizer; say which it was made with --tokenizer='
        )
    at = f', step {state["step"]}' if 'step' in state else ''
    print(f'{where}{at}: {model.num_params() / 1e6:.2f}M parameters on {device}', file=sys.stderr)
    return freeze(model.to(dtype), settings['quantize']), tokenizer


def main(settings: dict) -> None:
    sampling, samples = sampling_of(settings), settings['num_samples']
    if samples < 1:
        raise ConfigError(f'num_samples={samples}: must be at least 1')
    if settings['batch']:
        if settings['chat'] or settings['start'] != start:
            raise UserError('--batch has prompts of its own: leave out the prompt, and --chat')
        within(1, None, settings, 'rows')
        batch = Batch(settings)
        return batch.run(*load(settings))
    prompt = read_prompt(settings['start'])
    model, tokenizer = load(settings)
    if settings['chat']:
        with suppress(ImportError):
            import readline  # noqa: F401 - line editing and history, where the platform has it
        return Console(model, tokenizer, settings, '' if prompt == start else prompt).run()
    ids, prompt = prompt_ids(tokenizer, prompt)
    size = model.config.block_size
    if len(ids) > size:
        print(f'the prompt has {len(ids)} tokens; the last {size} are used', file=sys.stderr)
    write_samples(generate(model, tokenizer, [ids] * samples, sampling), prompt, samples)


if __name__ == '__main__':
    for stream in filter(None, (sys.stdin, sys.stdout)):  # whatever the locale says
        stream.reconfigure(encoding='utf-8', errors='replace')
    main(configure(globals(), sys.argv[1:], positional='start'))
