"""
Generate text with a trained model: samples, a chat console, or completions for a file of prompts.

$ python sample.py                                   # from the newest run in out/
$ python sample.py "To be, or not" --num_samples=3   # three continuations of a prompt
$ python sample.py --start=FILE:prompt.txt --temperature=0 --max_new_tokens=100
$ python sample.py --out_dir=out/my_run --chat       # a console that remembers the conversation
$ python sample.py --batch=prompts.jsonl --out=answers.jsonl
$ python sample.py --json_schema=person.json         # every sample is JSON of this schema

An argument that starts with -- is a setting. A .py file or the name of a config is a config. Any
other argument is the prompt; --start= accepts every prompt, even one such as -x or seed=1.

A .txt batch file has one prompt per line. A .jsonl or .ndjson file has one object per line: a
"prompt", optionally an "id", and sampling settings for this prompt, where "stop" is a string or a
list of strings without escapes. The output is JSON Lines in the order of the prompts; a prompt that
fails gets an "error". To resume a killed batch, run the same command again.

From Python: load() here, and generate(), complete() or an Engine of flatgpt/inference/engine.py.
"""

import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from flatgpt.errors import (
    ConfigError,
    UserError,
    check_choice,
    check_range,
    did_you_mean,
    one_line_errors,
)

if __name__ == '__main__':
    one_line_errors()  # also for Ctrl-C during the slow imports below

import torch

from configurator import configure, read_flag, setting_types, update_settings
from flatgpt.checkpoint.load import load_model, newest_run
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.files import read_json
from flatgpt.inference.batch import Batch
from flatgpt.inference.engine import MAX_GENERATE_SLOTS, Engine, generate, run_and_drain
from flatgpt.inference.grammar import Grammar, Grammars
from flatgpt.inference.quantize import check_int8_device, prepare_for_inference
from flatgpt.inference.request import Request, TokenOutput
from flatgpt.inference.sampling import SamplingParams
from flatgpt.inference.speculation import NGRAM
from flatgpt.runtime import keep_freed_memory, on_out_of_memory, pick_device, pick_dtype
from model import GPT

# -----------------------------------------------------------------------------
# model
out_dir: str | None = None  # run directory or other model; None: that of init_from
init_from = 'resume'  # without out_dir: 'resume' (the newest run in out/), a run, or gpt2 ...
checkpoint: str | None = None  # None or 'best' (lowest validation loss), 'last', or a path
tokenizer: str | None = None  # replaces the model's own: a name, tokenizer.json or meta.pkl
device = 'auto'  # 'cpu', 'mps', 'cuda', 'cuda:1' ...; 'auto': a GPU if there is one
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; 'auto': the fastest that is safe on the device
# 'int8': weights in half the memory of 16 bits; faster on a CPU for few samples, not on a GPU
quantize: str | None = None
# guesses tokens, to compute several at once with the same result: 'ngram' from the text itself, a
# run from a smaller model with the same tokenizer; None: no guesses; without effect on a GPU
draft: str | None = None
# generation
start = '\n'  # the prompt; FILE:prompt.txt reads a file; may contain <|endoftext|>
chat = False  # an interactive console instead of samples
batch: str | None = None  # file of prompts to complete, one per line
out: str | None = None  # file for the completions of the batch
rows = 16  # prompts of the batch that are computed at once
num_samples = 10  # samples, computed as one batch
max_new_tokens = 500  # maximum tokens per sample
json_schema: str | None = None  # file with a JSON schema that each sample or reply follows
stop = ''  # a sample ends before this string; '|' separates several; escapes: \n, \t, \| and \\
# sampling
seed = 1337  # the same seed gives the same samples
temperature = 0.8  # below 1: less random; above 1: more random; 0: always the most likely token
top_k: int | None = 200  # sample from this many most likely tokens; None or 0: from all
top_p = 1.0  # sample from the fewest most likely tokens whose probabilities sum to this
min_p = 0.0  # exclude tokens less likely than this fraction of the most likely one's probability
repetition_penalty = 1.0  # above 1: tokens that are already in the text become less likely
frequency_penalty = 0.0  # subtracted from a token's logit for each time it was generated
presence_penalty = 0.0  # subtracted from a token's logit if it was generated at all
# -----------------------------------------------------------------------------

DEFAULT_START, DEFAULT_NUM_SAMPLES = start, num_samples
CONTROL_CODES = (*range(9), *range(11, 32), *range(127, 160))
CONTROL_CHARACTERS = dict.fromkeys(CONTROL_CODES, '\N{REPLACEMENT CHARACTER}')
MAX_PROMPT_BYTES = 2**24
# torch's kernel computes each output in one thread; this has not been measured
INT8_ON_GPU = '--quantize=int8: on a GPU this saves memory; bfloat16 is probably faster'
DRAFT_ON_GPU = '--draft: has no effect on a GPU'
# settings that a line of a batch file and the console can change
SAMPLING_SETTINGS = [f.name for f in fields(SamplingParams) if f.name in globals()]
HELP = """Type text, and the model continues it. It remembers the conversation as far as its context
reaches. Ctrl-C stops a reply.
  /set NAME VALUE   change a setting, for example /set temperature 0.5
  /reset            forget the conversation
  /quit             exit; so does Ctrl-D, or Ctrl-C twice"""


# -----------------------------------------------------------------------------
# settings and prompts


def sampling_params(settings: dict) -> SamplingParams:
    """The SamplingParams of these settings, whose `stop` is one string."""
    check_range(1, None, settings, 'max_new_tokens')
    chosen = {name: settings[name] for name in SAMPLING_SETTINGS}
    return SamplingParams(**{**chosen, 'stop': parse_stop(settings['stop'])})


def sampling_params_of_line(settings: dict, line: dict) -> SamplingParams:
    """The SamplingParams of a line of a batch file, which has settings as JSON values."""
    # null means the command's setting, except for top_k, where it means all tokens
    line = {name: line[name] for name in line if line[name] is not None or name == 'top_k'}
    stop = line.pop('stop', None)
    sampling = sampling_params(update_settings(__file__, settings, line, 'this line'))
    if stop is None:
        return sampling
    stops = [stop] if isinstance(stop, str) else stop
    if not (isinstance(stops, list) and all(isinstance(each, str) for each in stops)):
        raise ConfigError('stop: must be a string or a list of strings')
    return replace(sampling, stop=tuple(stops) if stop else ())


def parse_stop(text: str) -> tuple[str, ...]:
    """The setting `stop`, such as 'END|\\n\\n' -> its strings, here 'END' and a blank line."""
    escapes = {'n': '\n', 't': '\t', '|': '|', '\\': '\\'}
    parts = re.findall(r'(?:\\.|[^|])+', text, re.DOTALL)
    if text and not parts:
        raise ConfigError(
            f'stop={text!r}: a bar separates stop strings; to stop at a bar, write \\|'
        )
    return tuple(re.sub(r'\\(.)', lambda m: escapes.get(m[1], m[0]), part) for part in parts)


def read_prompt(text: str) -> str:
    """The prompt that --start= specifies: its text, or that of FILE:path."""
    path = text.removeprefix('FILE:')
    if path != text:
        text = read_prompt_file(path)
    if not text:
        raise UserError('the prompt is empty; give some text, for example --start="Once upon"')
    return text


def read_prompt_file(path: str) -> str:
    if not path:
        raise UserError('--start=FILE: needs the name of a file, as in --start=FILE:prompt.txt')
    try:
        with open(path, 'rb') as file:
            content = file.read(MAX_PROMPT_BYTES + 1)  # /dev/zero has no end
        if len(content) > MAX_PROMPT_BYTES:
            raise UserError(
                f'the prompt file {path} has more than {MAX_PROMPT_BYTES:,} bytes; keep only its '
                'end, since the model reads no more than its context'
            )
        return content.decode('utf-8-sig').replace('\r\n', '\n').replace('\r', '\n')
    except OSError as error:
        raise UserError(
            f'the prompt file {path} cannot be read: {error.strerror}; give a readable file'
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f'the prompt file {path} is not UTF-8 at byte {error.start}; convert it to UTF-8'
        ) from error


def prompt_ids(tokenizer: Tokenizer, prompt: str):
    """The prompt's token ids, and its text. The default prompt, a line break, becomes the
    end-of-text token if the vocabulary has no line break."""
    try:
        return tokenizer.encode(prompt, allow_eot=True), prompt
    except UserError:
        if prompt != DEFAULT_START or tokenizer.eot is None:
            raise
        return [tokenizer.eot], ''


def compile_schema(schema: dict | None, tokenizer: Tokenizer, path: str | None) -> Grammar | None:
    """The grammar of --json_schema; None without it."""
    if schema is None:
        return None
    try:
        return Grammars(tokenizer).compile('json_schema', schema)
    except UserError as error:
        raise UserError(f'--json_schema={path}: {error}') from None


def print_text(text: str) -> None:
    """Print text immediately. On a terminal, control characters are replaced."""
    sys.stdout.write(text.translate(CONTROL_CHARACTERS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_samples(outputs: Iterator[TokenOutput], prompt: str, samples: int) -> None:
    """Print samples in order: the first as it is generated, later ones once it is their turn."""
    ready = [[prompt] for _ in range(samples)]  # text not yet printed
    finished = [False] * samples
    current = 0
    for output in outputs:
        ready[output.index].append(output.text)
        finished[output.index] = output.finish_reason is not None
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
    """A conversation. With a chat template, the model replies to messages; without one, messages
    and replies form one text that the model continues."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        settings: dict,
        initial_prompt: str,
        grammar: Grammar | None = None,
        draft: GPT | str | None = None,
    ):
        self.engine = Engine(model, tokenizer, num_slots=1, draft=draft)
        self.tokenizer, self.initial_prompt, self.grammar = tokenizer, initial_prompt, grammar
        self.settings = {name: settings[name] for name in SAMPLING_SETTINGS}
        self.block_size = model.config.block_size
        self.reset()
        try:
            self.tokenizer.encode('\n')
            self.newline = '\n'
        except UserError:
            self.newline = ''

    def reset(self) -> None:
        self.ids = self.encode(self.initial_prompt)  # the conversation
        self.context_start = 0  # index of the first token in the context
        self.turn = 0  # number of replies

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, allow_eot=True).tolist()

    def run(self) -> None:
        if self.tokenizer.chat_template:
            print('This model has a chat template: it replies to messages.', end=' ')
        else:
            print('This model has no chat template: it continues what you type.', end=' ')
        print('/help lists the commands.', flush=True)
        if self.initial_prompt:
            print_text(self.initial_prompt + '\n')
        while (line := self.read_line()) not in (None, '/quit', '/exit'):
            try:
                if line.startswith('/'):
                    self.run_command(*line.split(maxsplit=1))
                elif line:
                    self.reply(line)
            except UserError as error:
                print(f'error: {error}', file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                print_text('\n(stopped)\n')

    def read_line(self) -> str | None:
        """The next line, None at the end. Ctrl-C cancels a line; pressed twice, it exits."""
        prompt = '> ' if sys.stdin.isatty() else ''
        for notice in ('\n(Ctrl-C again, Ctrl-D or /quit to exit)\n', '\n'):
            try:
                return input(prompt)
            except EOFError:
                return print_text('\n' if prompt else '')
            except KeyboardInterrupt:
                print_text(notice)
        return None

    def run_command(self, name: str, arguments: str = '') -> None:
        if name == '/help':
            values = [f'  {name} = {value!r}' for name, value in self.settings.items()]
            print(HELP, 'Settings:', *values, sep='\n', flush=True)
        elif name == '/reset':
            self.reset()
            print('(conversation cleared)', flush=True)
        elif name == '/set':
            self.change_setting(*arguments.partition(' ')[::2])
        else:
            raise UserError(f'{name}: unknown command; /help lists the commands, and /quit exits')

    def change_setting(self, name: str, value: str) -> None:
        if not value:
            raise UserError('/set needs a name and a value, for example /set temperature 0.5')
        if name not in self.settings:
            hint = did_you_mean(name, self.settings)
            raise UserError(f'/set {name}: unknown setting; {hint}/help lists the settings')
        types = setting_types(__file__, self.settings)
        settings = self.settings | read_flag(f'--{name}={value}', types)
        sampling_params(settings)  # raises if the value is out of range
        self.settings = settings
        print(f'({name} = {settings[name]!r})', flush=True)

    def reply(self, line: str) -> None:
        sampling, template = sampling_params(self.settings), self.tokenizer.chat_template
        if template:
            ids = self.tokenizer.encode_chat([{'role': 'user', 'content': line}]).tolist()
            end = template['assistant'][1]
            # a grammar ends a reply by itself, and may have this text in its strings
            if end and self.tokenizer.delimiter_id(end) is None and not self.grammar:
                sampling = replace(sampling, stop=(*sampling.stop, end))
        else:
            ids = self.encode((self.newline if self.ids else '') + line)
        self.ids, self.turn = self.ids + ids, self.turn + 1
        # drop eighths of the context, as the engine does (scheduler.Slot)
        while len(self.ids) - self.context_start > self.block_size:
            self.context_start += max(1, self.block_size // 8)
        # a seed for each reply, so that equal messages get different replies
        outputs, prompt = deque(), self.ids[self.context_start :]
        seed = sampling.seed, self.turn
        request = Request(prompt, sampling, outputs.append, seed=seed, grammar=self.grammar)
        before, printed = len(self.ids), ''
        self.engine.submit(request)
        try:
            for output in run_and_drain(self.engine, outputs):
                # only what was printed is remembered, even after Ctrl-C
                printed += output.text
                print_text(output.text)
                if output.finish_reason != 'stop':
                    self.ids.append(output.token)
                elif output.token not in self.tokenizer.stop_ids:  # a stop string is not printed
                    self.ids[before:] = self.encode(printed)
        finally:
            request.cancel()
            if template:
                self.ids += self.tokenizer.encode_delimiter(end).tolist()
        print_text('\n')


# -----------------------------------------------------------------------------
# the model


def checkpoint_source(settings: dict) -> tuple[str | Path, str]:
    """What load_model() loads: a run, model name or checkpoint, and 'best' or 'last' of a run."""
    # in the config of a training run, out_dir is its model and init_from the model it started from
    where, which = settings['out_dir'] or settings['init_from'], settings['checkpoint'] or 'best'
    if which not in ('best', 'last'):
        where = which
    elif where in ('resume', 'scratch'):
        where = newest_run()
    return where, which


def load(
    settings: dict, inspect: Callable[[GPT], object] = lambda model: None
) -> tuple[GPT, Tokenizer]:
    """The model, ready for inference, and the tokenizer that the settings specify.

    inspect: gets the model as it was stored, in float32.
    """
    device = pick_device(settings['device'])
    if device == 'cpu':
        keep_freed_memory()
    elif device.startswith('cuda:'):
        torch.cuda.set_device(device)
    check_choice((None, 'int8'), settings, 'quantize')
    if settings['quantize']:
        check_int8_device(device)
    is_bfloat16 = settings['quantize'] and settings['dtype'] == 'auto'
    dtype = pick_dtype('bfloat16' if is_bfloat16 else settings['dtype'], device)
    where, which = checkpoint_source(settings)
    on_out_of_memory(device, lambda: smaller_weights(device, dtype))
    model, tokenizer, state = load_model(where, which, tokenizer=settings['tokenizer'])
    if tokenizer is None:
        raise UserError(
            f'{where} has no tokenizer; give the one it was trained with, as --tokenizer=NAME'
        )
    step = f', step {state["step"]}' if 'step' in state else ''
    print(f'{where}{step}: {model.num_params() / 1e6:.2f}M parameters on {device}', file=sys.stderr)
    if settings['quantize'] and device.startswith('cuda'):
        print(INT8_ON_GPU, file=sys.stderr)
    inspect(model)
    model.to(dtype).to(device)  # in this order: float32 takes twice the memory there
    return prepare_for_inference(model, settings['quantize']), tokenizer


def load_draft(settings: dict, tokenizer: Tokenizer) -> GPT | str | None:
    """What guesses tokens (see Engine), as the settings specify."""
    source = settings['draft']
    if source in (None, NGRAM):
        return source
    if pick_device(settings['device']).startswith('cuda'):
        print(DRAFT_ON_GPU, file=sys.stderr)
        return None
    model, own = load({**settings, 'out_dir': source, 'checkpoint': None})
    if own != tokenizer:
        raise UserError(
            f'draft={source}: has another tokenizer than the model; give a run that was trained '
            'with the same one, or use --draft=ngram'
        )
    return model


def smaller_weights(device: str, dtype: torch.dtype) -> str:
    """Advice if the weights do not fit in memory."""
    if device == 'cpu':  # where they are read in float32
        return 'a smaller model'
    if dtype != torch.float32:
        return 'a smaller model, or --device=cpu'
    try:
        pick_dtype('bfloat16', device)
    except ConfigError:  # an older GPU
        return '--dtype=float16'
    return '--dtype=bfloat16'


def fewer_samples(settings: dict, model: GPT) -> str:
    """Advice if so many samples do not fit in memory."""
    name = 'rows' if settings['batch'] else 'num_samples'
    fewer = min(settings[name], MAX_GENERATE_SLOTS) // 2
    if fewer and not settings['chat']:
        return f'--{name}={fewer}'
    weight = model.embedding.weight
    if weight.dtype == torch.bfloat16 and settings['quantize'] is None:
        return '--quantize=int8'
    return smaller_weights(str(weight.device), weight.dtype)


# -----------------------------------------------------------------------------
# the command line


def main(settings: dict) -> None:
    sampling, samples = sampling_params(settings), settings['num_samples']
    check_range(1, None, settings, 'num_samples')
    if settings['batch']:
        if settings['chat'] or settings['start'] != DEFAULT_START:
            raise UserError('--batch reads its prompts from a file; omit the prompt and --chat')
        if samples not in (1, DEFAULT_NUM_SAMPLES):
            raise UserError('--batch writes one completion per prompt; omit --num_samples')
        check_range(1, None, settings, 'rows')
        batch = Batch(settings, partial(sampling_params_of_line, settings), SAMPLING_SETTINGS)
    else:
        if settings['out']:
            out = settings['out']
            raise UserError(
                f'--out={out}: needs --batch; to save samples, omit --out and add > {out}'
            )
        prompt = read_prompt(settings['start'])
    path = settings['json_schema']
    schema = None if path is None else read_json(Path(path), '--json_schema')
    model, tokenizer = load(settings)
    grammar, draft = compile_schema(schema, tokenizer, path), load_draft(settings, tokenizer)
    device = str(model.embedding.weight.device)
    on_out_of_memory(device, lambda: fewer_samples(settings, model))
    if settings['batch']:
        return batch.run(model, tokenizer, grammar, draft)
    if settings['chat']:
        with suppress(ImportError):
            import readline  # noqa: F401 - line editing and history, if the platform has it
        prompt = '' if prompt == DEFAULT_START else prompt
        return Console(model, tokenizer, settings, prompt, grammar, draft).run()
    ids, prompt = prompt_ids(tokenizer, prompt)
    size = model.config.block_size
    if len(ids) > size:
        print(f'the prompt has {len(ids)} tokens; only the last {size} are used', file=sys.stderr)
    outputs = generate(model, tokenizer, [ids] * samples, sampling, grammar=grammar, draft=draft)
    print_samples(outputs, prompt, samples)


if __name__ == '__main__':
    main(configure(globals(), sys.argv[1:], positional='start'))
