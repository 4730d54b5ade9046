"""
flatGPT, transformers and nanoGPT as bench.py times them, from the same weights.

    program = BUILDERS['transformers'](settings, runtime)
    seconds, work = program.decode(8)

A builder returns an object for the settings' `workload`: 'training' has one method, training();
'generation' has prefill(rows), decode(rows) and the methods for serving. Each call is a
measurement: it returns its seconds and its work, the number of tokens and a result that all
implementations should share.
"""

import contextlib
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from flatgpt.checkpoint.convert import config_json, transformers_tensors
from flatgpt.checkpoint.weights import meta_model
from flatgpt.data.tokenizer import Tokenizer, char_tokenizer
from flatgpt.errors import UserError, as_config_error
from flatgpt.inference.engine import Engine, generate
from flatgpt.inference.kv_cache import KVCache, PackedCache
from flatgpt.inference.quantize import prepare_for_inference
from flatgpt.inference.request import Request, TokenOutput
from flatgpt.inference.sampling import SamplingParams
from flatgpt.runtime import DTYPES, Runtime, synchronize
from flatgpt.training.optim import build_optimizers
from flatgpt.training.validate import uses_bf16_residual
from model import GPT, GPTConfig

SMALL = {'n_layer': 4, 'n_head': 4, 'n_embd': 256, 'vocab_size': 8192, 'n_kv_head': None}
SHAPE_SETTINGS = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
# of every implementation that trains
LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 0.1
OPTIMIZER = {  # ours
    'learning_rate': LEARNING_RATE,
    'betas': BETAS,
    'weight_decay': WEIGHT_DECAY,
    'muon_lr': 1e-3,
    'muon_momentum': 0.95,
}


# -----------------------------------------------------------------------------
# shared by all implementations


def build_random_model(settings: dict) -> GPT:
    """The model whose weights all implementations copy."""
    torch.manual_seed(settings['seed'])
    with as_config_error():
        model = GPT(model_config(settings))
    if settings['arch'] == 'modern':  # its blocks are initialized as the identity
        for name, parameter in model.named_parameters():
            if name.endswith(('o_proj.weight', 'fc2.weight', 'lm_head.weight')):
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def build_meta_model(settings: dict) -> GPT:
    """The same model on the meta device: its parameters have shapes and no values."""
    with as_config_error():
        return meta_model(model_config(settings))


def model_config(settings: dict) -> GPTConfig:
    shape = {name: settings[name] for name in SHAPE_SETTINGS}
    return GPTConfig(arch=settings['arch'], n_kv_head=settings['n_kv_head'], **shape)


def transformers_model(settings: dict):
    """The same model in the class of `transformers`."""
    import transformers

    ours = build_random_model(settings)
    config = config_json(ours, tokenizer=None)
    kind = getattr(transformers, config['architectures'][0])
    model = kind(kind.config_class.from_dict(config))
    model.load_state_dict(transformers_tensors(ours), strict=False)  # without the tied head
    return model.to(settings['device'])


def import_nanogpt(folder: str):
    """nanoGPT's model.py as a module, without changing the import path."""
    path = Path(folder) / 'model.py'
    if not path.is_file() or 'class GPTConfig' not in path.read_text(encoding='utf-8'):
        raise UserError(
            f'nanogpt={folder}: has no model.py of nanoGPT; give the folder of a nanoGPT checkout'
        )
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_precision(model: GPT, kind: str) -> GPT:
    """The model ready to generate, its weights in 'float32', 'bfloat16', 'float16' or 'int8'."""
    quantize = 'int8' if kind == 'int8' else None
    return prepare_for_inference(
        model.to(DTYPES['bfloat16' if quantize else kind]).eval(), quantize
    )


def placeholder_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of one character per id, for a model of random weights."""
    return char_tokenizer([chr(0x10000 + i) for i in range(vocab_size)])


def random_prompts(settings: dict, rows: int) -> torch.Tensor:
    """The same prompts for every implementation: (rows, prompt_tokens)."""
    generator = torch.Generator().manual_seed(settings['seed'])
    shape = (rows, settings['prompt_tokens'])
    return torch.randint(settings['vocab_size'], shape, generator=generator)


def comparable_prefix(tokens: list[int], settings: dict) -> list[int] | None:
    """The first tokens, which all should generate in float32; fewer bits may flip a near tie."""
    return tokens[:16] if settings['format'] == 'float32' else None


class Training:
    """Training steps on one batch. loss_of(x, y): the implementation's own forward pass."""

    def __init__(self, settings: dict, model, loss_of: Callable, optimizers: list, autocast):
        self.model, self.loss_of, self.optimizers = model, loss_of, optimizers
        self.autocast, self.steps, self.device = autocast, settings['steps'], settings['device']
        generator = torch.Generator().manual_seed(settings['seed'])
        shape = (2, settings['batch_size'], settings['block_size'])
        batch = torch.randint(settings['vocab_size'], shape, generator=generator)
        self.x, self.y = batch.to(self.device)  # (B, T) each
        model.eval()
        with torch.no_grad(), autocast():
            self.first_loss = loss_of(self.x, self.y).item()
        model.train()

    def training(self) -> tuple[float, dict]:
        begin = time.perf_counter()
        for _ in range(self.steps):
            self.update()
        synchronize(self.device)
        names = ' and '.join(type(optimizer).__name__ for optimizer in self.optimizers)
        tokens = self.x.numel() * self.steps
        work = {'tokens': tokens, 'result': [self.first_loss], 'optimizer': names}
        return time.perf_counter() - begin, work

    def update(self) -> None:
        with self.autocast():
            loss = self.loss_of(self.x, self.y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)


# -----------------------------------------------------------------------------
# flatGPT


def build_flatgpt(settings: dict, runtime: Runtime):
    if settings['workload'] != 'training':
        return FlatGPTGeneration(settings, runtime)
    model = build_random_model(settings).to(runtime.device)
    model.trunk.bf16_residual = uses_bf16_residual(settings['arch'], runtime)
    compiled = runtime.wants_compile(settings['compile'])
    optimizers = build_optimizers(settings['optimizer'], model, **OPTIMIZER, compile=compiled)
    run = torch.compile(model, dynamic=False) if compiled else model
    return Training(settings, model, lambda x, y: run(x, y)[1], optimizers, runtime.autocast)


def follow_text(forward: Callable, ids: list[int], passes: list) -> Callable:
    """A forward pass whose most likely token after each position of a text is its next one; each
    call is added to `passes`."""
    following = torch.tensor([*ids[1:], ids[0]])

    def followed(idx, cache, **options):
        passes.append(idx.numel())
        logits = forward(idx, cache=cache, **options)
        packed = isinstance(cache, PackedCache)
        at = cache.columns if packed else cache.pos[: len(logits)] - 1
        rows = logits[0] if packed else logits
        rows[torch.arange(len(rows)), following[at.clamp(0, len(ids) - 1)]] += 1e4
        return logits

    return followed


def run_requests(engine: Engine, requests: list[Request]) -> None:
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass


class FlatGPTGeneration:
    def __init__(self, settings: dict, runtime: Runtime):
        self.settings, self.device = settings, runtime.device
        self.model = with_precision(
            build_random_model(settings).to(runtime.device), settings['format']
        )
        self.tokenizer = placeholder_tokenizer(settings['vocab_size'])
        self.sampling = SamplingParams(max_new_tokens=settings['new_tokens'], temperature=0)
        self.engines: dict[int, Engine] = {}

    @torch.inference_mode()
    def prefill(self, rows: int) -> tuple[float, dict]:
        prompts = random_prompts(self.settings, rows).to(self.device)
        begin = time.perf_counter()
        cache = KVCache(self.model, rows, self.settings['prompt_tokens'] + 1)
        logits, _ = self.model(prompts, cache=cache)
        result = logits[0, :8].tolist()
        return time.perf_counter() - begin, {'tokens': prompts.numel(), 'result': result}

    def decode(self, rows: int) -> tuple[float, dict]:
        """From the first new token of every row to the last."""
        prompts = random_prompts(self.settings, rows).tolist()
        outputs, begin = [], None
        for output in generate(self.model, self.tokenizer, prompts, self.sampling):
            outputs.append(output)
            if len(outputs) == rows:
                begin = time.perf_counter()
        seconds = time.perf_counter() - begin
        first_row = [output.token for output in outputs if output.index == 0]
        result = comparable_prefix(first_row, self.settings)
        return seconds, {'tokens': len(outputs) - rows, 'result': result}

    @torch.inference_mode()
    def follow(self, ids: list[int], rows: int, draft: str | None) -> tuple[float, dict]:
        """Complete the prompt at the start of `ids` `rows` times with the rest of them.

        The prompt is in the cache already. draft: see Engine.
        """
        prompt, outputs, passes = ids[: self.settings['prompt_tokens']], [], []
        engine = Engine(self.model, self.tokenizer, rows, max_length=len(ids), draft=draft)
        engine.runner.forward = follow_text(engine.runner.forward, ids, passes)
        run_requests(engine, [Request(prompt, SamplingParams(1), outputs.append)])
        outputs.clear()
        passes.clear()
        sampling = SamplingParams(len(ids) - len(prompt), temperature=0.8, top_k=200)
        begin = time.perf_counter()
        run_requests(engine, [Request(prompt, sampling, outputs.append, i) for i in range(rows)])
        seconds = time.perf_counter() - begin
        result = [output.token for output in outputs if output.index == rows - 1]
        return seconds, {'tokens': len(outputs), 'passes': len(passes), 'result': result}

    def generate(self, rows: int) -> tuple[float, dict]:
        """Prefill and decoding of one batch."""
        prompts = random_prompts(self.settings, rows).tolist()
        begin = time.perf_counter()
        outputs = generate(self.model, self.tokenizer, prompts, self.sampling)
        tokens = sum(1 for _ in outputs)
        return time.perf_counter() - begin, {'tokens': tokens, 'result': []}

    def serve(self, clients: int, requests: int) -> tuple[float, dict]:
        """`clients` that each send their next request after a completion, without HTTP."""
        if clients not in self.engines:
            self.engines[clients] = Engine(self.model, self.tokenizer, clients)
        engine, tokens = self.engines[clients], []
        prompts = random_prompts(self.settings, requests).tolist()

        def on_output(output: TokenOutput) -> None:
            tokens.append(output.token)
            if output.finish_reason and prompts:
                engine.submit(Request(prompts.pop(), self.sampling, on_output))

        begin = time.perf_counter()
        for _ in range(clients):
            engine.submit(Request(prompts.pop(), self.sampling, on_output))
        while engine.step():
            pass
        return time.perf_counter() - begin, {'tokens': len(tokens), 'result': []}


# -----------------------------------------------------------------------------
# transformers, as its documentation uses it


def build_transformers(settings: dict, runtime: Runtime):
    if settings['arch'] == 'modern' and settings['dropout']:
        raise UserError("transformers has no dropout with arch='modern'; use --dropout=0")
    model = transformers_model(settings)
    if settings['workload'] != 'training':
        return TransformersGeneration(settings, model)
    # its Trainer's default optimizer, clipping and autocast
    adamw = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )

    def loss_of(x, y):  # not by passing labels, which transformers shifts, dropping the last token
        logits = model(x, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    return Training(settings, model, loss_of, [adamw], runtime.autocast)


class TransformersGeneration:
    def __init__(self, settings: dict, model):
        self.settings, self.device = settings, settings['device']
        self.model = model.to(DTYPES[settings['format']]).eval()
        new_tokens = settings['new_tokens']
        self.greedy = {'max_new_tokens': new_tokens, 'do_sample': False, 'pad_token_id': 0}

    @torch.inference_mode()
    def prefill(self, rows: int) -> tuple[float, dict]:
        prompts = random_prompts(self.settings, rows).to(self.device)
        begin = time.perf_counter()
        logits = self.model(prompts, use_cache=True, logits_to_keep=1).logits
        result = logits[0, -1, :8].tolist()
        return time.perf_counter() - begin, {'tokens': prompts.numel(), 'result': result}

    def decode(self, rows: int) -> tuple[float, dict]:
        """From the first new token of every row to the last."""
        times = []
        prompts = random_prompts(self.settings, rows).to(self.device)
        output = self.generate_batch_at_once(prompts, streamer=token_timer(times))
        tokens = rows * (output.size(1) - prompts.size(1) - 1)
        result = comparable_prefix(output[0, prompts.size(1) :].tolist(), self.settings)
        # the streamer gets the prompts first
        return times[-1] - times[1], {'tokens': tokens, 'result': result}

    def generate(self, rows: int) -> tuple[float, dict]:
        """generate() of one static batch: prompts of the same length."""
        prompts = random_prompts(self.settings, rows).to(self.device)
        begin = time.perf_counter()
        output = self.generate_batch_at_once(prompts)
        tokens = rows * (output.size(1) - prompts.size(1))
        return time.perf_counter() - begin, {'tokens': tokens, 'result': []}

    @torch.inference_mode()
    def generate_batch_at_once(self, prompts: torch.Tensor, **options) -> torch.Tensor:
        options |= {**self.greedy, 'min_new_tokens': self.settings['new_tokens']}
        return self.model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)

    def serve(self, rows: int) -> tuple[float, dict]:
        """generate_batch(): its continuous batching."""
        from transformers import GenerationConfig

        config = GenerationConfig(**self.greedy, eos_token_id=-1)
        prompts = random_prompts(self.settings, rows).tolist()
        begin = time.perf_counter()
        outputs = self.model.generate_batch(
            inputs=prompts, generation_config=config, progress_bar=False
        )
        tokens = sum(len(output.generated_tokens) for output in outputs.values())
        return time.perf_counter() - begin, {'tokens': tokens, 'result': []}


def token_timer(times: list[float]):
    """A streamer for generate() that records the time of each token."""
    from transformers.generation.streamers import BaseStreamer

    class TokenTimer(BaseStreamer):
        def put(self, tokens):
            times.append(time.perf_counter())

        def end(self):
            pass

    return TokenTimer()


# -----------------------------------------------------------------------------
# nanoGPT


def build_nanogpt(settings: dict, runtime: Runtime) -> Training:
    """The training step of nanoGPT's train.py: no autocast on a CPU, its own AdamW."""
    module = import_nanogpt(settings['nanogpt'])
    shape = {name: settings[name] for name in SHAPE_SETTINGS}
    model = module.GPT(module.GPTConfig(**shape)).to(runtime.device)
    model.load_state_dict(build_random_model(settings).state_dict(), strict=False)
    adamw = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, runtime.device_type)
    autocast = contextlib.nullcontext if runtime.device_type == 'cpu' else runtime.autocast
    run = torch.compile(model) if runtime.wants_compile(settings['compile']) else model
    return Training(settings, model, lambda x, y: run(x, y)[1], [adamw], autocast)


BUILDERS = {
    'flatGPT': build_flatgpt,
    'transformers': build_transformers,
    'nanoGPT': build_nanogpt,
}
