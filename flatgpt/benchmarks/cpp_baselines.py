"""
llama.cpp and CTranslate2 as bench.py times them, on a CPU, from the same GPT-2 weights.

    program = BUILDERS['llama.cpp'](settings, runtime)       # settings['format']: q8_0 ...
    seconds, work = program.decode(8)

llama.cpp gets a GGUF file of ours, and CTranslate2 its own kind of file. Both use as many threads
as torch. For the processor's own instructions, llama.cpp must be built on it:

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python gguf
    pip install ctranslate2
"""

import ctypes
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from flatgpt.benchmarks.baselines import build_random_model, comparable_prefix, random_prompts
from flatgpt.checkpoint.gguf import export_gguf
from flatgpt.data.tokenizer import byte_tokenizer
from flatgpt.runtime import Runtime
from model import GPT

# the formats of each that are compared with one of ours
FORMATS = {
    'llama.cpp': {'bfloat16': ['f16'], 'float16': ['f16'], 'int8': ['q8_0', 'q4_0']},
    'CTranslate2': {'float32': ['float32'], 'int8': ['int8']},
}
MODULES = {'llama.cpp': 'llama_cpp', 'CTranslate2': 'ctranslate2'}


def installed_baselines(settings: dict, formats: list[str]) -> tuple[list[tuple], list[str]]:
    """The (program, format) pairs to compare with, and the programs that are not installed."""
    if settings['arch'] != 'gpt2' or settings['device'] != 'cpu':
        return [], []
    missing = [name for name, module in MODULES.items() if not find_spec(module)]
    pairs = [
        (name, theirs)
        for name, table in FORMATS.items()
        for ours in formats
        for theirs in table.get(ours, ())
        if name not in missing
    ]
    return [*dict.fromkeys(pairs)], missing


# -----------------------------------------------------------------------------
# llama.cpp


def check(succeeded, task: str) -> None:
    if not succeeded:
        raise RuntimeError(f'llama.cpp cannot {task}')


class LlamaCpp:
    """llama.cpp by its C interface; several texts are decoded as one batch."""

    def __init__(self, settings: dict, runtime: Runtime):
        import llama_cpp

        self.settings, self.api = settings, llama_cpp
        self.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'f16.gguf'
            export_gguf(build_random_model(settings), byte_tokenizer(), {}, path)
            if settings['format'] != 'f16':
                path = self.quantize(path)
            options = llama_cpp.llama_model_default_params()
            options.use_mmap = False
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        check(self.model, 'load the GGUF file')
        self.contexts: dict[int, tuple] = {}
        system = llama_cpp.llama_print_system_info().decode().strip()
        self.about = f'llama-cpp-python {llama_cpp.__version__}: {system}'

    def quantize(self, path: Path) -> Path:
        options, out = self.api.llama_model_quantize_default_params(), path.with_name('quantized')
        options.ftype = getattr(self.api, f'LLAMA_FTYPE_MOSTLY_{self.settings["format"].upper()}')
        status = self.api.llama_model_quantize(str(path).encode(), str(out).encode(), options)
        check(not status, 'quantize the GGUF file')
        return out

    def context(self, rows: int) -> tuple:
        """An empty context for so many texts, and a batch."""
        if rows not in self.contexts:
            s, options = self.settings, self.api.llama_context_default_params()
            options.n_ctx = rows * -(-(s['prompt_tokens'] + s['new_tokens']) // 256) * 256
            options.n_batch, options.n_seq_max = rows * s['prompt_tokens'], rows
            options.n_threads = options.n_threads_batch = torch.get_num_threads()
            context = self.api.llama_init_from_model(self.model, options)
            check(context, 'create a context')
            batch = self.api.llama_batch_init(rows * s['prompt_tokens'], 0, 1)
            self.contexts[rows] = context, batch
        context, batch = self.contexts[rows]
        self.api.llama_memory_clear(self.api.llama_get_memory(context), False)
        return context, batch

    def forward(self, context, batch, tokens: np.ndarray, start: int) -> np.ndarray:
        """Logits (R, V) after tokens (R, T) of each text, which has `start` already."""
        rows, length = tokens.shape
        batch.n_tokens = tokens.size
        for i, token in enumerate(tokens.ravel().tolist()):
            row, at = divmod(i, length)
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + at, 1
            batch.seq_id[i][0], batch.logits[i] = row, at == length - 1
        check(not self.api.llama_decode(context, batch), 'compute a batch')
        logits = self.api.llama_get_logits(context)
        return np.ctypeslib.as_array(logits, (rows, self.settings['vocab_size']))

    def prefill(self, rows: int) -> tuple[float, dict]:
        prompts = random_prompts(self.settings, rows).numpy()
        context, batch = self.context(rows)
        begin = time.perf_counter()
        result = self.forward(context, batch, prompts, 0)[0, :8].tolist()
        return time.perf_counter() - begin, {'tokens': prompts.size, 'result': result}

    def decode(self, rows: int) -> tuple[float, dict]:
        """From the first new token of every row to the last."""
        prompts, steps = random_prompts(self.settings, rows).numpy(), self.settings['new_tokens']
        context, batch = self.context(rows)
        tokens = self.forward(context, batch, prompts, 0).argmax(-1)  # (R,)
        begin = time.perf_counter()
        for step in range(steps - 1):
            start = prompts.shape[1] + step
            tokens = self.forward(context, batch, tokens[:, None], start).argmax(-1)
        return time.perf_counter() - begin, {'tokens': rows * (steps - 1), 'result': None}


# -----------------------------------------------------------------------------
# CTranslate2


class CTranslate2:
    def __init__(self, settings: dict, runtime: Runtime):
        import ctranslate2

        self.settings = settings
        self.words = [f'<{i}>' for i in range(settings['vocab_size'])]
        with tempfile.TemporaryDirectory() as folder:
            spec = ctranslate2_spec(build_random_model(settings), self.words)
            spec.save(folder)
            threads = torch.get_num_threads()
            self.generator = ctranslate2.Generator(
                folder, 'cpu', compute_type=settings['format'], intra_threads=threads
            )
        self.about = f'ctranslate2 {ctranslate2.__version__}, {self.generator.compute_type}'

    def generate(self, rows: int, new_tokens: int, **options) -> list:
        prompts = [
            [self.words[i] for i in ids] for ids in random_prompts(self.settings, rows).tolist()
        ]
        options |= {'max_length': new_tokens, 'min_length': new_tokens, 'sampling_topk': 1}
        return self.generator.generate_batch(prompts, include_prompt_in_result=False, **options)

    def prefill(self, rows: int) -> tuple[float, dict]:
        begin = time.perf_counter()
        results = self.generate(rows, 1, return_logits_vocab=True)
        result = np.array(results[0].logits[0][0])[:8].tolist()
        tokens = rows * self.settings['prompt_tokens']
        return time.perf_counter() - begin, {'tokens': tokens, 'result': result}

    def decode(self, rows: int) -> tuple[float, dict]:
        """From the first new token of every row to the last."""
        times, new_tokens = [], self.settings['new_tokens']

        def on_token(step) -> bool:
            times.append(time.perf_counter())
            return False

        results = self.generate(rows, new_tokens, callback=on_token)
        result = comparable_prefix(results[0].sequences_ids[0], self.settings)
        tokens = sum(len(each.sequences_ids[0]) for each in results) - rows
        return times[-1] - times[rows - 1], {'tokens': tokens, 'result': result}


def ctranslate2_spec(model: GPT, words: list[str]):
    """The model as CTranslate2's converter describes a GPT-2."""
    from ctranslate2 import specs

    c, parameters = model.config, model.state_dict()
    activation = specs.common_spec.Activation.GELUTanh
    spec = specs.TransformerDecoderModelSpec.from_config(
        c.n_layer, c.n_head, pre_norm=True, activation=activation
    )
    array = lambda name: parameters[name].float().numpy()  # noqa: E731

    def linear(target, name: str) -> None:
        target.weight = array(f'{name}.weight')
        if c.bias and name != 'lm_head':
            target.bias = array(f'{name}.bias')

    def norm(target, name: str) -> None:
        target.gamma = array(f'{name}.weight')
        target.beta = array(f'{name}.bias') if c.bias else np.zeros(c.n_embd, np.float32)

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = array('transformer.wte.weight')
    decoder.position_encodings.encodings = array('transformer.wpe.weight')
    norm(decoder.layer_norm, 'transformer.ln_f')
    linear(decoder.projection, 'lm_head')
    for number, layer in enumerate(decoder.layer):
        block = f'transformer.h.{number}'
        norm(layer.self_attention.layer_norm, f'{block}.ln_1')
        linear(layer.self_attention.linear[0], f'{block}.attn.c_attn')
        linear(layer.self_attention.linear[1], f'{block}.attn.c_proj')
        norm(layer.ffn.layer_norm, f'{block}.ln_2')
        linear(layer.ffn.linear_0, f'{block}.mlp.c_fc')
        linear(layer.ffn.linear_1, f'{block}.mlp.c_proj')
    spec.register_vocabulary(words)
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = words[-1]
    spec.validate()
    spec.optimize()
    return spec


BUILDERS = {'llama.cpp': LlamaCpp, 'CTranslate2': CTranslate2}
