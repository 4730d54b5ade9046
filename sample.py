"""
Let a trained model write.

$ python sample.py                                   # from the newest run below out/
$ python sample.py "To be, or not" --num_samples=3   # continue a text, three times
$ python sample.py --start=FILE:prompt.txt --temperature=0 --max_new_tokens=100
$ python sample.py --out_dir=out/my_run --chat       # a console that remembers the conversation
$ python sample.py --batch=prompts.jsonl --out=answers.jsonl

An argument that begins with -- is a setting, and one that is a file ending in .py, or the name of a
config, is that; any other is the prompt. --start= takes whatever comes after it.

A batch file has a prompt a line (.txt), or in a .jsonl or .ndjson file an object a line, with a
"prompt" and, where they differ, settings of the texts, perhaps an "id". There "stop" is a text or
a list of them, in which | and \\n are no signs. The answers are JSON lines in the order of the
prompts; a line that cannot be answered says why under "error". Killed, the same command goes on
where it was.

From Python: load() here, and generate(), complete() or an Engine of flatgpt/inference/engine.py.
"""

import re
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch

from configurator import configure, update_settings
from flatgpt.checkpoint.load import load_model, newest_run
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import ConfigError, UserError, did_you_mean, one_of, within
from flatgpt.inference.batch import Batch
from flatgpt.inference.engine import MAX_GENERATE_ROWS, NOT_FINITE, Engine, generate
from flatgpt.inference.quantize import check_int8_device, prepare_for_inference
from flatgpt.inference.request import Request, TokenOutput
from flatgpt.inference.sampling import SamplingParams
from flatgpt.runtime import keep_freed_memory, on_out_of_memory, pick_device, pick_dtype
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

CONTROL_CHARACTERS = dict.fromkeys(
    [*range(9), *range(11, 32), *range(127, 160)], '\N{REPLACEMENT CHARACTER}'
)
SAMPLING_SETTINGS = [
    f.name for f in fields(SamplingParams) if f.name in globals()
]  # settings of each text
DOES = {'a': 'answers what you type', 'no': 'continues what you type'}
HELP = """Type text, and the model continues it. The conversation is remembered, as far as the
model's context reaches, until you clear it. Ctrl-C stops an answer.
  /set NAME VALUE   change a setting, for example /set temperature 0.5
  /reset            forget the conversation
  /quit             leave; so does Ctrl-D, or Ctrl-C twice"""


# -----------------------------------------------------------------------------
# settings and prompts


def sampling_params(settings: dict) -> SamplingParams:
    """The SamplingParams that settings describe; they spell its stop strings as one text."""
    chosen = {name: settings[name] for name in SAMPLING_SETTINGS}
    if chosen['max_new_tokens'] < 1:
        raise ConfigError(f'max_new_tokens={chosen["max_new_tokens"]}: must be at least 1')
    return SamplingParams(**{**chosen, 'stop': parse_stop(settings['stop'])})


def sampling_params_of_line(settings: dict, own: dict) -> SamplingParams:
    """The SamplingParams of a line in a batch file, with settings of its own: values, not text."""
    # null is as if it had not been said, but for top_k, where it means all
    own = {name: own[name] for name in own if own[name] is not None or name == 'top_k'}
    stop = own.pop('stop', None)
    sampling = sampling_params(update_settings(__file__, settings, own, 'this line'))
    if stop is None:
        return sampling
    stops = [stop] if isinstance(stop, str) else stop
    if not (isinstance(stops, list) and all(isinstance(each, str) for each in stops)):
        raise ConfigError('stop: needs a text, or a list of texts')
    return replace(sampling, stop=tuple(stops) if stop else ())


def changed(settings: dict, changes: dict) -> dict:
    """The settings after changes, which are checked as flags are."""
    flags = [f'--{name}={value}' for name, value in changes.items()]
    # __file__ has configure read the settings' types where they are declared
    return configure({'__file__': __file__, **settings}, flags)


def parse_stop(text: str) -> tuple[str, ...]:
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


def print_text(text: str) -> None:
    """Print text at once. On a terminal, characters that would steer it are made harmless."""
    sys.stdout.write(text.translate(CONTROL_CHARACTERS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_samples(outputs: Iterator[TokenOutput], prompt: str, samples: int) -> None:
    """Show the first sample as it is written, and each other one from when its turn has come."""
    ready = [[prompt] for _ in range(samples)]  # text not yet shown
    finished = [False] * samples
    current = 0
    for output in outputs:
        ready[output.row].append(output.text)
        finished[output.row] = output.finish is not None
        while current < samples:
            print_text(''.join(ready[current]))
            ready[current].clear()
            if not finished[current]:
                break
            print_text('\n---------------\n' if samples > 1 else '\n')
            current += 1


# -----------------------------------------------------------------------------
# the chat console


class Console:
    """A conversation by the tokenizer's chat template. Without one, what the user types and
    what the model answers are one text, which it continues."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, settings: dict, opening: str):
        self.engine, self.tokenizer, self.opening = Engine(model, tokenizer, 1), tokenizer, opening
        self.settings = {name: settings[name] for name in SAMPLING_SETTINGS}
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
            print_text(self.opening + '\n')
        while (line := self.read_line()) not in (None, '/quit', '/exit'):
            try:
                if line.startswith('/'):
                    self.command(*line.split(maxsplit=1))
                elif line:
                    self.answer(line)
            except UserError as error:
                print(f'error: {error}', file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                print_text('\n(stopped)\n')

    def read_line(self) -> str | None:
        """The next line, None at the end. Ctrl-C drops a line; a second one in a row leaves."""
        prompt = '> ' if sys.stdin.isatty() else ''
        for reply in ('\n(Ctrl-C again, Ctrl-D or /quit leaves)\n', '\n'):
            try:
                return input(prompt)
            except EOFError:
                return print_text('\n' if prompt else '')
            except KeyboardInterrupt:
                print_text(reply)
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
        settings = changed(self.settings, {name: value})
        sampling_params(settings)  # raises if the value is out of range
        self.settings = settings
        print(f'({name} = {settings[name]!r})', flush=True)

    def answer(self, line: str) -> None:
        sampling, template = sampling_params(self.settings), self.tokenizer.chat_template
        if template:
            ids = self.tokenizer.encode_chat([{'role': 'user', 'content': line}]).tolist()
            end = template['assistant'][1]
            if end and self.tokenizer.mark_id(end) is None:
                sampling = replace(sampling, stop=(*sampling.stop, end))
        else:
            ids = self.encode((self.newline if self.ids else '') + line)
        self.ids, self.turn = self.ids + ids, self.turn + 1
        while len(self.ids) - self.start > self.size:  # by eighths, as the engine forgets
            self.start += max(1, self.size // 8)
        # every answer has its own random numbers
        outputs, prompt = deque(), self.ids[self.start :]
        request = Request(prompt, sampling, outputs.append, seed=(sampling.seed, self.turn))
        before, shown = len(self.ids), ''
        self.engine.submit(request)
        try:
            while self.engine.step():
                while outputs:  # what was shown is what is remembered, also after Ctrl-C
                    output = outputs.popleft()
                    if output.finish == 'error':
                        raise UserError(NOT_FINITE)
                    shown += output.text
                    print_text(output.text)
                    if output.finish != 'stop':
                        self.ids.append(output.token)
                    elif output.token not in self.tokenizer.ends:  # some of what came is not shown
                        self.ids[before:] = self.encode(shown)
        finally:
            request.cancel()
            if template:
                self.ids += self.tokenizer.encode_mark(end).tolist()
        print_text('\n')


# -----------------------------------------------------------------------------
# the model


def checkpoint_source(settings: dict) -> tuple[str | Path, str]:
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
    if settings['quantize']:
        check_int8_device(device)
    by_itself = settings['quantize'] and settings['dtype'] == 'auto'
    dtype = pick_dtype('bfloat16' if by_itself else settings['dtype'], device)
    where, which = checkpoint_source(settings)
    on_out_of_memory(device, lambda: smaller_weights(device, dtype))
    model, tokenizer, state = load_model(where, which, tokenizer=settings['tokenizer'])
    if tokenizer is None:
        raise UserError(
            f'{where} came without a tokenizer; say which it was made with --tokenizer='
        )
    at = f', step {state["step"]}' if 'step' in state else ''
    print(f'{where}{at}: {model.num_params() / 1e6:.2f}M parameters on {device}', file=sys.stderr)
    model.to(dtype).to(device)  # in this order: float32 takes twice the memory there
    return prepare_for_inference(model, settings['quantize']), tokenizer


def smaller_weights(device: str, dtype: torch.dtype) -> str:
    """What to load where these weights do not fit."""
    if device == 'cpu':  # which reads them in float32
        return 'a smaller model'
    if dtype != torch.float32:
        return 'a smaller model, or --device=cpu'
    try:
        pick_dtype('bfloat16', device)
    except ConfigError:  # of an older GPU
        return '--dtype=float16'
    return '--dtype=bfloat16'


def fewer_samples(settings: dict, model: GPT) -> str:
    """What takes less memory than to write these texts side by side."""
    many = 'rows' if settings['batch'] else 'num_samples'
    fewer = min(settings[many], MAX_GENERATE_ROWS) // 2
    if fewer and not settings['chat']:
        return f'--{many}={fewer}'
    weight = model.embedding.weight
    if weight.dtype == torch.bfloat16 and settings['quantize'] is None:
        return '--quantize=int8'
    return smaller_weights(str(weight.device), weight.dtype)


# -----------------------------------------------------------------------------
# the command line


def main(settings: dict) -> None:
    sampling, samples = sampling_params(settings), settings['num_samples']
    if samples < 1:
        raise ConfigError(f'num_samples={samples}: must be at least 1')
    if settings['batch']:
        if settings['chat'] or settings['start'] != start:
            raise UserError('--batch has prompts of its own: leave out the prompt, and --chat')
        if samples not in (1, num_samples):
            raise UserError('--batch has one answer for each prompt: leave out --num_samples')
        within(1, None, settings, 'rows')
        batch = Batch(settings, partial(sampling_params_of_line, settings), SAMPLING_SETTINGS)
    else:
        if settings['out']:
            out = settings['out']
            raise UserError(f'--out={out}: is for the answers to a --batch; use > instead')
        prompt = read_prompt(settings['start'])
    model, tokenizer = load(settings)
    device = str(model.embedding.weight.device)
    on_out_of_memory(device, lambda: fewer_samples(settings, model))
    if settings['batch']:
        return batch.run(model, tokenizer)
    if settings['chat']:
        with suppress(ImportError):
            import readline  # noqa: F401 - line editing and history, where the platform has it
        return Console(model, tokenizer, settings, '' if prompt == start else prompt).run()
    ids, prompt = prompt_ids(tokenizer, prompt)
    size = model.config.block_size
    if len(ids) > size:
        print(f'the prompt has {len(ids)} tokens; the last {size} are used', file=sys.stderr)
    print_samples(generate(model, tokenizer, [ids] * samples, sampling), prompt, samples)


if __name__ == '__main__':
    main(configure(globals(), sys.argv[1:], positional='start'))
