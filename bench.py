"""
Time the model: training steps and generation, if asked beside a nanoGPT checkout.

$ python bench.py                                                     # GPT-2 124M on this machine
$ python bench.py train_shakespeare_char_cpu --vocab_size=65          # the model of a config
$ python bench.py train_shakespeare_char_cpu --vocab_size=65 --nanogpt=../nanoGPT

Both sides get the same random tokens and take turns, so that a machine whose speed drifts does not
favour either. Each side runs as its own train.py runs on this device. Figures are medians over the
rounds, with the lowest and highest in brackets.
"""

import importlib.util
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from configurator import UserError, configure, one_of, within
from data.tokenizer import char_tokenizer
from model import GPT, GPTConfig
from optim import build_optimizers
from runtime import start
from sample import Sampling, generate

# -----------------------------------------------------------------------------
# what is timed
rounds = 5  # turns of each side
steps = 10  # training steps in a round
new_tokens = 64  # tokens each row writes in a round of generation
rows = 8  # texts written side by side
nanogpt: str | None = None  # folder of a nanoGPT checkout to time beside
# model; the defaults are GPT-2 124M
arch = 'gpt2'  # or 'modern'; a nanoGPT beside it is GPT-2 of the same shape
optimizer = 'adamw'  # or 'muon'
batch_size = 4
block_size = 256
vocab_size = 50304
n_layer = 12
n_head = 12
n_embd = 768
n_kv_head: int | None = None  # arch='modern'
dropout = 0.0
bias = False
# machine
device = 'auto'  # 'auto', 'cpu', 'mps', 'cuda' or 'cuda:1'
dtype = 'auto'  # 'auto', 'float32', 'bfloat16' or 'float16'
compile: bool | str = 'auto'  # 'auto' compiles on a CUDA GPU, as train.py does
seed = 1337
# -----------------------------------------------------------------------------


def import_nanogpt(folder: str):
    """nanoGPT's model.py as a module, without a place on the import path."""
    path = Path(folder) / 'model.py'
    if not path.is_file() or 'nanoGPT' not in path.read_text(encoding='utf-8') + folder:
        raise UserError(f'nanogpt={folder}: there is no nanoGPT model.py in that folder')
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training_step(model, optimizers, autocast, batch):
    """A function that makes one update of `model` on `batch` and waits until it is done."""
    x, y = batch

    def step():
        with autocast():
            loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def take_turns(sides: dict, times: int, rounds: int) -> dict[str, list[float]]:
    """Seconds that each side took to run `times` times, one entry a round, after a warm-up."""
    for run in sides.values():
        run()
        run()
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            begin = time.perf_counter()
            for _ in range(times):
                run()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def show(job: str, tokens: int, seconds: dict[str, list[float]], note: str = '') -> None:
    """One line a side: tokens/s; for the first also how many times faster than each other."""
    for name, spent in seconds.items():
        speeds = [tokens / s for s in spent]
        line = f'{job:<12}{name:<10}{statistics.median(speeds):>12,.0f} tokens/s '
        print(
            f'{line}({min(speeds):,.0f} to {max(speeds):,.0f}){note if name == "flatGPT" else ""}'
        )
    ours = seconds['flatGPT']
    for name in list(seconds)[1:]:
        ratios = [theirs / own for own, theirs in zip(ours, seconds[name], strict=True)]
        spread = f'({min(ratios):.2f} to {max(ratios):.2f})'
        print(f'{job:<12}{"":<10}{statistics.median(ratios):>12.2f} times {name} {spread}')


def bench_training(config: dict, runtime) -> GPT:
    """Time training steps -> the model."""
    c = config
    shape = {k: c[k] for k in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')}
    shape |= {'dropout': c['dropout'], 'bias': c['bias']}
    torch.manual_seed(c['seed'])
    batch = torch.randint(c['vocab_size'], (2, c['batch_size'], c['block_size']))
    batch = batch.to(runtime.device)
    config = GPTConfig(arch=c['arch'], n_kv_head=c['n_kv_head'], **shape)
    model = GPT(config).to(runtime.device)
    compiled = runtime.wants_compile(c['compile'])
    rates = {'learning_rate': 1e-4, 'muon_lr': 1e-3, 'weight_decay': 0.1}
    momenta = {'betas': (0.9, 0.95), 'muon_momentum': 0.95}
    optimizers = build_optimizers(c['optimizer'], model, **rates, **momenta, compile=compiled)
    wrapped = torch.compile(model) if compiled else model
    sides = {'flatGPT': training_step(wrapped, optimizers, runtime.autocast, batch)}
    if c['nanogpt']:
        module = import_nanogpt(c['nanogpt'])
        peer = module.GPT(module.GPTConfig(**shape)).to(runtime.device)
        # as its train.py does: no autocast on a CPU, its own choice of fused AdamW
        peer_optimizer = peer.configure_optimizers(0.1, 1e-4, (0.9, 0.95), runtime.device_type)
        autocast = nullcontext if runtime.device_type == 'cpu' else runtime.autocast
        peer = torch.compile(peer) if compiled else peer
        sides['nanoGPT'] = training_step(peer, [peer_optimizer], autocast, batch)
    seconds = take_turns(sides, c['steps'], c['rounds'])
    tokens = c['steps'] * c['batch_size'] * c['block_size']
    peak, speed = runtime.peak_flops(), tokens / statistics.median(seconds['flatGPT'])
    mfu = f', MFU {speed * model.flops_per_token() / peak:.1%}' if peak else ''
    show('training', tokens, seconds, mfu)
    return model


def bench_generation(config: dict, model: GPT) -> None:
    """Time generation from a one-token prompt, over the KV cache and without one."""
    tokenizer = char_tokenizer([chr(0x10000 + i) for i in range(config['vocab_size'])])
    count = min(config['new_tokens'], config['block_size'] - 1)
    prompts = [[1]] * config['rows']
    sampling = Sampling(max_new_tokens=count)

    def side(cached: bool):
        return lambda: list(generate(model, tokenizer, prompts, sampling, cached=cached))

    sides = {'flatGPT': side(True), 'no cache': side(False)}
    show('generation', count * config['rows'], take_turns(sides, 1, config['rounds']))


def main(config: dict) -> None:
    within(1, None, config, 'rounds', 'steps', 'new_tokens', 'rows', 'batch_size')
    within(2, None, config, 'block_size', 'vocab_size')
    one_of((True, False, 'auto'), config, 'compile')
    one_of(('adamw', 'muon'), config, 'optimizer')
    runtime = start(config['device'], config['dtype'])
    threads = f', {torch.get_num_threads()} threads' if runtime.device_type == 'cpu' else ''
    print(f'torch {torch.__version__} on {runtime.device}{threads}, {runtime.dtype_name}')
    model = bench_training(config, runtime)
    bench_generation(config, model.eval())


if __name__ == '__main__':
    main(configure(globals(), sys.argv[1:]))
