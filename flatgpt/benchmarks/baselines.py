"""
flatGPT and what bench.py times it beside, each in a process of its own.

    side = Side('transformers', settings)         # begins to build it there, from the same weights
    side.trouble = side.receive()
    seconds, work, memory = side.turn('decode', 8)

A turn measures its own seconds, and `work` says what it did and came to, so that only like is
compared with like.
"""

import contextlib
import functools
import gc
import importlib.util
import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from flatgpt.checkpoint.convert import config_json, transformers_tensors
from flatgpt.data.tokenizer import char_tokenizer
from flatgpt.errors import UserError, as_config_error
from flatgpt.inference.engine import Engine, generate
from flatgpt.inference.kv_cache import KVCache
from flatgpt.inference.quantize import prepare_for_inference
from flatgpt.inference.request import Request, TokenOutput
from flatgpt.inference.sampling import SamplingParams
from flatgpt.runtime import DTYPES, Runtime, is_out_of_memory, pick_dtype, start
from flatgpt.training.optim import build_optimizers
from model import GPT, GPTConfig

SMALL = {'n_layer': 4, 'n_head': 4, 'n_embd': 256, 'vocab_size': 8192, 'n_kv_head': None}


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    kind = device.partition(':')[0]
    if kind == 'cuda':
        torch.cuda.synchronize(device)
    elif kind == 'mps':
        torch.mps.synchronize()


def build_model(c: dict) -> GPT:
    """The model that all sides take their weights from."""
    torch.manual_seed(c['seed'])
    names = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
    shape = {name: c[name] for name in names}
    with as_config_error():
        model = GPT(GPTConfig(arch=c['arch'], n_kv_head=c['n_kv_head'], **shape))
    if c['arch'] == 'modern':  # its blocks begin as the identity; have them do something
        for name, parameter in model.named_parameters():
            if name.endswith(('o_proj.weight', 'fc2.weight', 'lm_head.weight')):
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def transformers_model(c: dict):
    """The same in the class that `transformers` has for it."""
    import transformers

    ours = build_model(c)
    settings = config_json(ours, tokenizer=None)
    kind = getattr(transformers, settings['architectures'][0])
    model = kind(kind.config_class.from_dict(settings))
    model.load_state_dict(transformers_tensors(ours), strict=False)  # without the tied head
    return model.to(c['device'])


def in_format(model: GPT, kind: str) -> GPT:
    """The model ready to write, its weights in 'float32', 'bfloat16', 'float16' or 'int8'."""
    quantize = 'int8' if kind == 'int8' else None
    return prepare_for_inference(
        model.to(DTYPES['bfloat16' if quantize else kind]).eval(), quantize
    )


def import_nanogpt(folder: str):
    """nanoGPT's model.py as a module, without a place on the import path."""
    path = Path(folder) / 'model.py'
    if not path.is_file() or 'class GPTConfig' not in path.read_text(encoding='utf-8'):
        raise UserError(f'nanogpt={folder}: there is no nanoGPT model.py in that folder')
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training(model, loss_of, optimizers, autocast, c: dict):
    """A turn of `steps` updates on one batch; loss_of(x, y) is the side's own way to its loss."""
    generator = torch.Generator().manual_seed(c['seed'])
    shape = (2, c['batch_size'], c['block_size'])
    x, y = torch.randint(c['vocab_size'], shape, generator=generator).to(c['device'])
    model.eval()
    with torch.no_grad(), autocast():
        first = loss_of(x, y).item()
    model.train()
    optimizer = ' and '.join(type(one).__name__ for one in optimizers)

    def turn():
        begin = time.perf_counter()
        for _ in range(c['steps']):
            with autocast():
                loss = loss_of(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for one in optimizers:
                one.step()
            model.zero_grad(set_to_none=True)
        synchronize(c['device'])
        work = {'tokens': x.numel() * c['steps'], 'result': [first], 'optimizer': optimizer}
        return time.perf_counter() - begin, work

    return turn


def flatgpt(c: dict, runtime: Runtime) -> dict:
    """What flatGPT can be asked for -> {job: turn}."""
    model = build_model(c).to(runtime.device)
    if c['job'] == 'training':
        compiled = runtime.wants_compile(c['compile'])
        rates = {'learning_rate': 1e-4, 'muon_lr': 1e-3, 'weight_decay': 0.1}
        momenta = {'betas': (0.9, 0.95), 'muon_momentum': 0.95}
        optimizers = build_optimizers(c['optimizer'], model, **rates, **momenta, compile=compiled)
        wrapped = torch.compile(model, dynamic=False) if compiled else model
        loss_of = lambda x, y: wrapped(x, y)[1]  # noqa: E731
        return {'training': training(model, loss_of, optimizers, runtime.autocast, c)}
    model = in_format(model, c['format'])
    tokenizer = char_tokenizer([chr(0x10000 + i) for i in range(c['vocab_size'])])

    @torch.inference_mode()
    def prefill(rows: int):
        prompts = prompts_of(c, rows).to(runtime.device)
        begin = time.perf_counter()
        logits, _ = model(prompts, cache=KVCache(model, rows, c['prompt_tokens'] + 1))
        result = logits[0, :8].tolist()
        return time.perf_counter() - begin, {'tokens': prompts.numel(), 'result': result}

    def decode(rows: int):
        """From the first new token of every row to the last."""
        sampling = SamplingParams(max_new_tokens=c['new_tokens'], temperature=0)
        pieces, begin = [], None
        for piece in generate(model, tokenizer, prompts_of(c, rows).tolist(), sampling):
            pieces.append(piece)
            if len(pieces) == rows:
                begin = time.perf_counter()
        seconds = time.perf_counter() - begin
        written = [piece.token for piece in pieces if piece.row == 0]
        return seconds, {'tokens': len(pieces) - rows, 'result': exact(written, c)}

    def whole(rows: int):
        """Prompts and texts, submitted at once."""
        sampling = SamplingParams(max_new_tokens=c['new_tokens'], temperature=0)
        prompts, begin = prompts_of(c, rows).tolist(), time.perf_counter()
        count = sum(1 for _ in generate(model, tokenizer, prompts, sampling))
        return time.perf_counter() - begin, {'tokens': count, 'result': []}

    engines: dict[int, Engine] = {}

    def served(clients: int, requests: int):
        """What `clients` get who each ask again when they have their answer, without HTTP."""
        if clients not in engines:
            engines[clients] = Engine(model, tokenizer, clients)
        engine = engines[clients]
        left, tokens = prompts_of(c, requests).tolist(), []
        sampling = SamplingParams(max_new_tokens=c['new_tokens'], temperature=0)

        def take(piece: TokenOutput) -> None:
            tokens.append(piece.token)
            if piece.finish and left:
                engine.submit(Request(left.pop(), sampling, take))

        begin = time.perf_counter()
        for _ in range(clients):
            engine.submit(Request(left.pop(), sampling, take))
        while engine.step():
            pass
        return time.perf_counter() - begin, {'tokens': len(tokens), 'result': []}

    return {'prefill': prefill, 'decode': decode, 'whole': whole, 'served': served}


def transformers(c: dict, runtime: Runtime) -> dict:
    """What `transformers` can be asked for, as its documentation has it done."""
    from transformers.generation.streamers import BaseStreamer

    if c['arch'] == 'modern' and c['dropout']:
        raise UserError('its NanoChat has no dropout')
    model = transformers_model(c)
    if c['job'] == 'training':
        # its Trainer's default optimizer, clipping and autocast
        betas, decay = (0.9, 0.95), {'weight_decay': 0.1}
        adamw = torch.optim.AdamW(model.parameters(), 1e-4, betas, fused=True, **decay)

        def loss_of(x, y):  # given labels, it would shift them and leave out the last token
            logits = model(x, use_cache=False).logits
            return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())

        return {'training': training(model, loss_of, [adamw], runtime.autocast, c)}
    model = model.to(DTYPES[c['format']]).eval()

    class Clock(BaseStreamer):
        """The moments at which tokens came."""

        def __init__(self):
            self.ticks = []

        def put(self, tokens):
            self.ticks.append(time.perf_counter())

        def end(self):
            pass

    @torch.inference_mode()
    def prefill(rows: int):
        prompts = prompts_of(c, rows).to(runtime.device)
        begin = time.perf_counter()
        logits = model(prompts, use_cache=True, logits_to_keep=1).logits
        result = logits[0, -1, :8].tolist()
        return time.perf_counter() - begin, {'tokens': prompts.numel(), 'result': result}

    @torch.inference_mode()
    def decode(rows: int):
        prompts, clock = prompts_of(c, rows).to(runtime.device), Clock()
        count = {'max_new_tokens': c['new_tokens'], 'min_new_tokens': c['new_tokens']}
        how = {'attention_mask': torch.ones_like(prompts), 'do_sample': False, 'pad_token_id': 0}
        written = model.generate(prompts, streamer=clock, **count, **how)
        tokens = rows * (written.size(1) - prompts.size(1) - 1)
        result = exact(written[0, prompts.size(1) :].tolist(), c)
        return clock.ticks[-1] - clock.ticks[1], {'tokens': tokens, 'result': result}

    fixed = {'max_new_tokens': c['new_tokens'], 'do_sample': False, 'pad_token_id': 0}

    @torch.inference_mode()
    def whole(rows: int):
        """generate() of one static batch: prompts of one length that come together."""
        prompts = prompts_of(c, rows).to(runtime.device)
        mask, begin = torch.ones_like(prompts), time.perf_counter()
        at_least = {'min_new_tokens': c['new_tokens']}
        written = model.generate(prompts, attention_mask=mask, **fixed, **at_least)
        tokens = rows * (written.size(1) - prompts.size(1))
        return time.perf_counter() - begin, {'tokens': tokens, 'result': []}

    def batched(rows: int):
        """generate_batch(): its continuous batching."""
        from transformers import GenerationConfig

        how = GenerationConfig(**fixed, eos_token_id=-1)
        begin = time.perf_counter()
        written = model.generate_batch(
            inputs=prompts_of(c, rows).tolist(), generation_config=how, progress_bar=False
        )
        tokens = sum(len(text.generated_tokens) for text in written.values())
        return time.perf_counter() - begin, {'tokens': tokens, 'result': []}

    return {'prefill': prefill, 'decode': decode, 'whole': whole, 'batched': batched}


def nanogpt_side(c: dict, runtime: Runtime) -> dict:
    """nanoGPT's training step as its train.py makes it: no autocast on a CPU, its own AdamW."""
    module = import_nanogpt(c['nanogpt'])
    names = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
    model = module.GPT(module.GPTConfig(**{name: c[name] for name in names})).to(runtime.device)
    model.load_state_dict(build_model(c).state_dict(), strict=False)
    adamw = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), runtime.device_type)
    autocast = contextlib.nullcontext if runtime.device_type == 'cpu' else runtime.autocast
    wrapped = torch.compile(model) if runtime.wants_compile(c['compile']) else model
    return {'training': training(model, lambda x, y: wrapped(x, y)[1], [adamw], autocast, c)}


def exact(written: list[int], c: dict) -> list[int]:
    """The first tokens, the same in float32 on every side; fewer bits may turn a near tie."""
    return written[:16] if c['format'] == 'float32' else []


def prompts_of(c: dict, rows: int):
    generator = torch.Generator().manual_seed(c['seed'])
    return torch.randint(c['vocab_size'], (rows, c['prompt_tokens']), generator=generator)


SIDES = {'flatGPT': flatgpt, 'transformers': transformers, 'nanoGPT': nanogpt_side}


def serve_turns(pipe, side: str, c: dict) -> None:
    """A side's process: build it, then make each turn that is asked for and report on it."""
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            runtime = Runtime(c['device'], pick_dtype(c['dtype'], c['device'], training=True))
            if side == 'flatGPT' or runtime.device_type == 'cuda':
                runtime = start(c['device'], c['dtype'])  # sets up the GPU; on a CPU, our memory
            turns = SIDES[side](c, runtime)
            pipe.send(None)
            while (request := pipe.recv()) is not None:
                job, arguments, trace = request
                gc.collect()
                reset_peak(c['device'])
                if trace:
                    pipe.send([profiled(functools.partial(turns[job], *arguments), trace)])
                    continue
                seconds, work = turns[job](*arguments)
                pipe.send((seconds, work, peak_memory(c['device'])))
        except (EOFError, BrokenPipeError):  # the parent is gone
            return
        except ImportError as error:
            pipe.send(f'{error.name or error} is not installed')
        except UserError as error:
            pipe.send(str(error))
        except Exception as error:
            said = f'{type(error).__name__}: {error}'
            cause = 'out of memory' if is_out_of_memory(error) else said
            pipe.send(cause.splitlines()[0][:200])


def profiled(turn, path: str) -> str:
    """Run one turn under torch's profiler, write its trace -> a table of the top operators."""
    from torch.profiler import profile

    with profile() as watch:
        turn()
    watch.export_chrome_trace(path)
    if not Path(path).is_file():  # its failure is silent
        raise UserError(f'{path} cannot be written')
    cuda = torch.cuda.is_available()
    by = 'self_device_time_total' if cuda else 'self_cpu_time_total'
    return watch.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=48)


def reset_peak(device: str) -> None:
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux: the high-water mark begins anew
        Path('/proc/self/clear_refs').write_text('5')


def peak_memory(device: str) -> int:
    """Bytes: of the GPU, or of this process in RAM."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path('/proc/self/status').read_text().splitlines():
            if line.startswith('VmHWM'):
                return int(line.split()[1]) * 1024
    return 0


class Side:
    """Another process that makes turns.

    `trouble` says in a line why it cannot, None if it can: what receive() returns first.
    """

    def __init__(self, name: str, c: dict):
        self.name, self.format = name, c['format'] if c['job'] != 'training' else ''
        context = multiprocessing.get_context('spawn')
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve_turns, args=(other, name, c), daemon=True)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
        self.process.start()
        signal.signal(signal.SIGINT, before)
        other.close()
        self.trouble: str | None = 'it is not ready'

    @property
    def label(self) -> str:
        return f'{self.name} {self.format}'.strip()

    def receive(self):
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return 'its process was killed, perhaps for want of memory'

    def turn(self, job: str, *arguments, trace: str = ''):
        """(seconds, work, bytes), with `trace` [the table of operators], None after trouble."""
        if self.trouble is not None:
            return None
        with contextlib.suppress(OSError):  # receive() says that it is gone
            self.pipe.send((job, arguments, trace))
        reply = self.receive()
        if isinstance(reply, str):
            self.trouble = reply
            return None
        return reply

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)
        self.process.kill()


@contextlib.contextmanager
def opened(names: list[tuple], c: dict, job: str):
    """The processes of (side, format), ended afterwards."""
    sides = []
    try:
        for name, kind in names:
            sides.append(Side(name, {**c, 'job': job, 'format': kind}))
        for side in sides:
            side.trouble = side.receive()
        yield sides
    finally:
        for side in sides:
            side.close()
