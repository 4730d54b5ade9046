"""
Let a trained model write.

$ python sample.py                                   # from the newest run below out/
$ python sample.py "To be, or not" --num_samples=3   # continue a text, three times
$ python sample.py --start=FILE:prompt.txt --temperature=0 --max_new_tokens=100
$ python sample.py --out_dir=out/my_run --chat       # a console that remembers the conversation

From Python: complete(model, tokenizer, ['To be'], Sampling(top_p=0.9)), or generate() for a stream.
"""

import codecs
import math
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from checkpoint import load_model, newest_run
from configurator import ConfigError, UserError, configure, did_you_mean, one_of
from data.tokenizer import Tokenizer
from linear import freeze
from model import GPT, KVCache
from runtime import keep_freed_memory, pick_device, pick_dtype

# -----------------------------------------------------------------------------
# model
out_dir: str | None = None  # folder of the run; None is the newest run below out/
init_from = 'resume'  # without out_dir: a run's folder, or gpt2, gpt2-xl ...
checkpoint: str | None = None  # None or 'best' (lowest validation loss), 'last', or a path
tokenizer: str | None = None  # for a model that came without: a name, tokenizer.json or meta.pkl
device = 'auto'  # 'cpu', 'mps', 'cuda', 'cuda:1' ...
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'
quantize: str | None = None  # 'int8': half the bytes of 16 bits; on a CPU faster for few texts
# text
start = '\n'  # the prompt; FILE:prompt.txt reads it from a file; <|endoftext|> is understood
chat = False  # an interactive console in place of samples
num_samples = 10  # texts, written side by side as one batch
max_new_tokens = 500  # tokens in each at most
stop = ''  # end a text before this string; | separates several; \n, \t, \| and \\ are understood
# choice of each token
seed = 1337  # the same seed gives the same texts
temperature = 0.8  # below 1 keeps to what is likely, above 1 is wilder, 0 takes the likeliest
top_k: int | None = 200  # choose among this many likeliest tokens; None or 0: all
top_p = 1.0  # choose among the likeliest tokens that make up this share of the probability
min_p = 0.0  # leave out tokens less likely than this share of the likeliest one's probability
repetition_penalty = 1.0  # above 1 disfavours every token that the text already has
# -----------------------------------------------------------------------------

DRAWS = 256  # random numbers a row draws at a time
HEAD = 1024  # likeliest tokens among which top_p is looked for first
CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], '\N{REPLACEMENT CHARACTER}')
HELP = """Type text, and the model continues it. The conversation is remembered, as far as the
model's context reaches, until you clear it. Ctrl-C stops an answer.
  /set NAME VALUE   change a setting, for example /set temperature 0.5
  /reset            forget the conversation
  /quit             leave; so does Ctrl-D, or Ctrl-C twice"""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a text ends, checked. The settings above say what each is."""

    max_new_tokens: int = max_new_tokens
    temperature: float = temperature
    top_k: int | None = top_k
    top_p: float = top_p
    min_p: float = min_p
    repetition_penalty: float = repetition_penalty
    stop: tuple[str, ...] = ()
    seed: int = seed

    def __post_init__(self):
        for name, good, need in (
            ('max_new_tokens', self.max_new_tokens >= 1, 'at least 1'),
            ('temperature', 0 <= self.temperature < math.inf, 'at least 0 (0 is greedy)'),
            ('top_k', (self.top_k or 0) >= 0, 'at least 1, or 0 or None for all'),
            ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1'),
            ('min_p', 0 <= self.min_p <= 1, 'between 0 and 1'),
            ('repetition_penalty', 0 < self.repetition_penalty < math.inf, 'above 0 (1 is off)'),
            ('stop', '' not in self.stop, 'text, not an empty string'),
            ('seed', self.seed >= 0, 'at least 0'),
        ):
            if not good:
                raise ConfigError(f'{name}={getattr(self, name)!r}: must be {need}')


class Piece(NamedTuple):
    """One more token of one row."""

    row: int  # place of its prompt in the batch
    token: int  # its id; the end-of-text id if that ended the row
    text: str  # what may be shown now: often the token's text, '' while something is held back
    finish: str | None  # None; at a row's last token 'stop' (end of text, stop string) or 'length'


# -----------------------------------------------------------------------------
# the choice of a token


def candidates(logits, sampling: Sampling, seen=None):
    """Logits (R, V) -> those over the temperature of K tokens, -inf if left out, and their ids.

    Both (R, K), the likeliest first where top_k or top_p ask for an order. seen (R, V): tokens a
    row already has. Rules and order are those of `transformers`: repetition penalty (Keskar et al.
    2019, CTRL), temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024).
    """
    s, size = sampling, logits.size(-1)
    if seen is not None:
        penalty = torch.where(logits < 0, s.repetition_penalty, 1 / s.repetition_penalty)
        logits = torch.where(seen, logits * penalty, logits)
    if s.temperature < 1e-6:
        return logits.max(-1, keepdim=True)
    k = min(s.top_k or size, size)
    if k == size and s.top_p == 1:
        values, ids = logits, torch.arange(size, device=logits.device).expand_as(logits)
    else:
        # sorting all of a large vocabulary on a CPU takes as long as a small model's step
        few = min(k, HEAD) if k == size and logits.device.type == 'cpu' else k
        values, ids = logits.topk(few)
    top = logits.amax(-1, keepdim=True)  # (R, 1)
    values = (values - top) / s.temperature  # the likeliest at 0, so that no temperature overflows
    if s.top_p < 1:  # a token stays if those before it do not yet make up top_p
        whole = values if values.size(-1) == k else (logits - top) / s.temperature
        probs = (values - whole.logsumexp(-1, keepdim=True)).exp()
        short = probs.sum(-1) < s.top_p
        if values.size(-1) < k and short.any():  # these rows need all; no row sees another's
            rest = size - values.size(-1)
            values, probs = F.pad(values, (0, rest), value=-math.inf), F.pad(probs, (0, rest))
            ids = F.pad(ids, (0, rest))
            values[short], ids[short] = whole[short].sort(descending=True)
            probs[short] = values[short].softmax(-1)
        values = values.masked_fill(probs.cumsum(-1) - probs >= s.top_p, -math.inf)
    if s.min_p:
        values = values.masked_fill(values < math.log(s.min_p), -math.inf)
    return values, ids


def choose(logits, sampling: Sampling, uniforms, seen=None):
    """Next token of each row (R,) by the inverse CDF of `uniforms` (R, 1); -1 for broken logits."""
    values, ids = candidates(logits, sampling, seen)
    broken = ~values.amax(-1, keepdim=True).isfinite()
    if ids.size(-1) == 1:
        return ids.masked_fill(broken, -1)[:, 0]
    cdf = values.softmax(-1).cumsum(-1)
    # the first above a number that lies below cdf's end: never one of probability 0
    at = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)
    ids = ids.gather(-1, at.clamp(max=ids.size(-1) - 1))  # past the end if the logits are broken
    return ids.masked_fill(broken, -1)[:, 0]


# -----------------------------------------------------------------------------
# logits of the next token, with a cache or without
#
# One rule for both: a row whose context is full (block_size tokens) forgets its oldest block_size/8
# before it takes another. What is left gets new positions, so its keys are computed anew, and that
# cost is shared by the many tokens until the context is full again.


def pad(contexts, device):
    """Token lists -> ids (R, T), padded on the right, and their lengths (R,)."""
    lengths = torch.tensor([len(context) for context in contexts])
    idx = torch.zeros(len(contexts), int(lengths.max()), dtype=torch.long)
    for row, context in zip(idx, contexts, strict=True):
        row[: len(context)] = torch.tensor(context)
    return idx.to(device), lengths.to(device)


def uncached(model: GPT, contexts):
    """Logits (R, V) after each context, from scratch: what the cache is measured against."""
    idx, lengths = pad(contexts, model.embedding.weight.device)
    logits, _ = model(idx)
    return logits[torch.arange(len(contexts)), lengths - 1]


def prefill(model: GPT, contexts, length: int | None):
    """Logits (R, V) after each context, and a cache for `length` tokens, None for no cache."""
    if length is None:
        return uncached(model, contexts), None
    unique = {context: i for i, context in enumerate(dict.fromkeys(map(tuple, contexts)))}
    cache = KVCache(model, len(contexts), length)
    idx, lengths = pad(unique, cache.pos.device)
    logits, _ = model(idx, cache=cache, lengths=lengths)
    rows = [unique[tuple(context)] for context in contexts]  # samples of one prompt share the work
    cache.keep(rows)
    return logits[rows], cache


def advance(model: GPT, contexts, tokens, cache: KVCache | None):
    """Append a token to each context, which may slide -> logits (R, V) after it."""
    size = model.config.block_size
    full = [i for i, context in enumerate(contexts) if len(context) == size]
    for i in full:
        del contexts[i][: max(1, size // 8)]
    if cache is not None:
        if full:
            refill(model, [contexts[i] for i in full], full, cache)
        cache.span = max(map(len, contexts))
    for context, token in zip(contexts, tokens, strict=True):
        context.append(token)
    if cache is None:
        return uncached(model, contexts)
    idx = torch.tensor(tokens)[:, None].to(cache.pos.device)
    return replay(model, idx, cache) if is_recorded(idx) else model(idx, cache=cache)[0]


def is_recorded(idx) -> bool:
    return idx.is_cuda


def replay(model: GPT, idx, cache: KVCache):
    """model(idx, cache=cache) for one more token a row (R, 1), as a CUDA graph.

    Launching its hundreds of small kernels one by one takes longer than computing them. There is
    one graph for each power of two of rows and each number of columns, recorded when first needed,
    which takes as long as a few steps; rows between R and the power of two are computed in vain.
    """
    rows = min(2 ** (len(idx) - 1).bit_length(), len(cache.pos))
    key = rows, cache.columns(1)
    if key not in cache.graphs:
        pos, span = cache.pos.clone(), cache.span
        given = torch.zeros(rows, 1, dtype=torch.long, device=idx.device)

        def step():
            cache.span = span
            return model(given, cache=cache)[0]

        undo = lambda: cache.pos.copy_(pos)  # noqa: E731
        cache.graphs[key] = given, *record(step, undo, idx.device)
        cache.span = span
    given, again, logits = cache.graphs[key]
    given[: len(idx)] = idx
    again()
    cache.span += 1
    return logits[: len(idx)]


RECORDING = threading.Lock()


def record(step, undo, device):
    """Record what step() does on a GPU -> a function that does it again, and its result.

    undo(): takes back what step() changed, since libraries must run once to set themselves up.
    """
    with RECORDING, torch.cuda.device(device):
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
        torch.cuda.current_stream().wait_stream(aside)
        undo()
        with torch.cuda.graph(graph, stream=aside, capture_error_mode='thread_local'):
            result = step()
        return graph.replay, result


def refill(model: GPT, contexts, rows: list[int], cache: KVCache) -> None:
    """Compute some rows of a cache anew; their contexts are all of one length."""
    part = KVCache(model, len(rows), len(contexts[0]))
    if contexts[0]:  # with a block_size of 1, nothing is left
        model(torch.tensor(contexts, device=cache.pos.device), cache=part)
    cache.replace(rows, part)


# -----------------------------------------------------------------------------
# generation


class TextStream:
    """Bytes in, text out: whole characters only, and nothing that may yet become a stop string."""

    def __init__(self, stop: tuple[str, ...]):
        self.stop = stop
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.held = ''

    def add(self, data: bytes, final: bool) -> tuple[str, bool]:
        """Text to show now, and whether a stop string ended it. final: nothing follows."""
        self.held += self.decoder.decode(data, final)
        ends = [self.held.find(s) for s in self.stop if s in self.held]
        if ends:
            return self.held[: min(ends)], True
        show = len(self.held) if final else self.safe()
        text, self.held = self.held[:show], self.held[show:]
        return text, False

    def safe(self) -> int:
        """How many held characters come before anything that a stop string could begin with."""
        longest = max(map(len, self.stop), default=1)
        for at in range(max(0, len(self.held) - longest + 1), len(self.held)):
            if any(s.startswith(self.held[at:]) for s in self.stop):
                return at
        return len(self.held)


@torch.inference_mode()
def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list,
    sampling: Sampling,
    seeds: list | None = None,
    cached: bool = True,
) -> Iterator[Piece]:
    """Continue all prompts as one batch, yielding each token as it is chosen.

    prompts: token ids, at least one each; the last block_size count. model: in evaluation mode.
    seeds: what seeds each row's random numbers, by default sampling.seed and the row's number; a
    row's text depends on nothing else, whatever stands in the other rows.
    cached=False computes every token from scratch, for tests. Raises UserError for broken weights.
    """
    assert not model.training, 'dropout would be on'
    assert all(len(prompt) for prompt in prompts), 'there is nothing to continue'
    seeds = seeds or [(sampling.seed, number) for number in range(len(prompts))]
    size = model.config.block_size
    rows = [Row(i, p[-size:], sampling, seeds[i]) for i, p in enumerate(prompts)]
    contexts = [row.context for row in rows]
    banned = banned_ids(tokenizer, model)
    seen = seen_ids(contexts, banned) if sampling.repetition_penalty != 1 else None
    length = min(size, max(map(len, contexts)) + sampling.max_new_tokens)
    logits, cache = prefill(model, contexts, length if cached else None)
    for step in range(sampling.max_new_tokens):
        if step % DRAWS == 0:
            drawn = np.stack([row.random.random(DRAWS, np.float32) for row in rows])
            drawn = torch.from_numpy(drawn).to(logits.device)  # (R, DRAWS)
        logits = logits.float().masked_fill(banned, -math.inf)
        ids = choose(logits, sampling, drawn[:, step % DRAWS, None], seen)
        if seen is not None:
            seen.scatter_(1, ids.clamp(min=0)[:, None], True)
        last = step == sampling.max_new_tokens - 1
        chosen = zip(rows, ids.tolist(), strict=True)
        pieces = [row.take(token, tokenizer, last) for row, token in chosen]
        yield from pieces
        going = [i for i, piece in enumerate(pieces) if piece.finish is None]
        if not going:
            return
        if len(going) < len(rows):
            rows, drawn = [rows[i] for i in going], drawn[going]
            seen = seen if seen is None else seen[going]
            if cache is not None:
                cache.keep(going)
        tokens = [pieces[i].token for i in going]
        logits = advance(model, [row.context for row in rows], tokens, cache)


class Row:
    """One text in the making."""

    def __init__(self, number: int, prompt, sampling: Sampling, seed):
        self.number = number  # its place among the prompts
        self.context = [int(token) for token in prompt]  # what the model sees, block_size at most
        self.random = np.random.default_rng(seed)
        self.stream = TextStream(sampling.stop)

    def take(self, token: int, tokenizer: Tokenizer, last: bool) -> Piece:
        if token < 0:
            raise UserError(
                'the model gives no finite logits: its weights are broken, or too large for this '
                'number format; try --dtype=float32 or another --checkpoint'
            )
        end = token == tokenizer.eot
        text, stopped = self.stream.add(b'' if end else tokenizer.token_bytes[token], end or last)
        finish = 'stop' if end or stopped else 'length' if last else None
        return Piece(self.number, token, text, finish)


def banned_ids(tokenizer: Tokenizer, model: GPT):
    """Ids that stand for no text (V,): a padded vocabulary's, gaps, special tokens but the end."""
    banned = torch.ones(model.config.vocab_size, dtype=torch.bool)
    banned[: tokenizer.vocab_size] = torch.from_numpy(~tokenizer.writable)
    return banned.to(model.embedding.weight.device)


def seen_ids(contexts, banned):
    """Which tokens each context has, (R, V)."""
    seen = torch.zeros(len(contexts), len(banned), dtype=torch.bool)
    for row, context in zip(seen, contexts, strict=True):
        row[context] = True
    return seen.to(banned.device)


def complete(model: GPT, tokenizer: Tokenizer, texts: list[str], sampling: Sampling) -> list[str]:
    """What the model writes after each text."""
    prompts = [tokenizer.encode(text, allow_eot=True) for text in texts]
    out = [''] * len(texts)
    for piece in generate(model, tokenizer, prompts, sampling):
        out[piece.row] += piece.text
    return out


# -----------------------------------------------------------------------------
# the command line


def sampling_of(settings: dict) -> Sampling:
    """The Sampling that settings describe; they spell its stop strings as one text."""
    chosen = {f.name: settings[f.name] for f in fields(Sampling)}
    return Sampling(**{**chosen, 'stop': split_stop(settings['stop'])})


def split_stop(text: str) -> tuple[str, ...]:
    """'END|\\n\\n' -> ('END', a blank line)."""
    escapes = {'n': '\n', 't': '\t', '|': '|', '\\': '\\'}
    parts = re.findall(r'(?:\\.|[^|])+', text, re.DOTALL)
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
    """--chat: what the user types and what the model answers are one text, which it continues."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, settings: dict, opening: str):
        self.model, self.tokenizer, self.opening = model, tokenizer, opening
        self.settings = {f.name: settings[f.name] for f in fields(Sampling)}
        self.text, self.turn = opening, 0
        try:
            self.tokenizer.encode('\n')
            self.newline = '\n'
        except UserError:
            self.newline = ''

    def run(self) -> None:
        print('This model has no chat template: it continues what you type. /help lists commands.')
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
            self.text, self.turn = self.opening, 0
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
        text = self.text + (self.newline if self.text else '') + line
        ids = self.tokenizer.encode(text, allow_eot=True)
        sampling = sampling_of(self.settings)
        self.text, self.turn = text, self.turn + 1
        seeds = [(sampling.seed, self.turn)]  # every answer has its own random numbers
        for piece in generate(self.model, self.tokenizer, [ids], sampling, seeds):
            self.text += piece.text  # what was shown is what is remembered, also after Ctrl-C
            write(piece.text)
        write('\n')


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
    # In a training run's config, out_dir is the model it made, and init_from what that came from
    where, which = settings['out_dir'] or settings['init_from'], settings['checkpoint'] or 'best'
    if which not in ('best', 'last'):
        where = which
    elif where in ('resume', 'scratch'):
        where = newest_run()
    model, tokenizer, state = load_model(where, which, device, tokenizer=settings['tokenizer'])
    if tokenizer is None:
        raise UserError(
            f'{where} came without a tokenizer; say which it was made with --tokenizer='
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        ids = f'{tokenizer.vocab_size} ids, and the model {model.config.vocab_size}'
        raise UserError(f'{where}: its tokenizer has {ids}: one is not made for the other')
    at = f', step {state["step"]}' if 'step' in state else ''
    print(f'{where}{at}: {model.num_params() / 1e6:.2f}M parameters on {device}', file=sys.stderr)
    return freeze(model.to(dtype), settings['quantize']), tokenizer


def main(settings: dict) -> None:
    sampling, samples = sampling_of(settings), settings['num_samples']
    if samples < 1:
        raise ConfigError(f'num_samples={samples}: must be at least 1')
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
