"""
The models of others, in both directions: `transformers` folders, nanoGPT's checkpoints, GGUF.

    model, tokenizer, state = load_foreign('gpt2')               # or a folder, or path/to/ckpt.pt
    export_transformers(model, tokenizer, state, Path('mine'))   # AutoModelForCausalLM reads it
    export_gguf(model, tokenizer, state, Path('mine.gguf'))      # llama.cpp and Ollama run it

Nothing is unpickled but tensors and plain values, and no code of a model's folder is run.
"""

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configurator import ConfigError, UserError, did_you_mean
from data.tokenizer import (
    EOT,
    Tokenizer,
    byte_letters,
    char_tokenizer,
    from_nanogpt_meta,
    get_tokenizer,
)
from model import GPT, TRANSPOSED, GPTConfig

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
RELEASED = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2')
# how GPT-2 splits text before merging, https://github.com/openai/gpt-2/blob/master/src/encoder.py
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_VOCABULARIES = range(50257, 50305)  # as released, or padded for speed


class CheckpointError(UserError):
    """A checkpoint, ours or of others, that is missing, damaged, or does not fit."""


# -----------------------------------------------------------------------------
# read


def is_foreign(where: str | Path) -> bool:
    """Whether `where` is a transformers folder, a hub's name, or a nanoGPT checkpoint."""
    path = Path(where)
    if path.is_dir():
        return (path / 'config.json').is_file() or (path / 'ckpt.pt').is_file()
    if path.suffix == '.pt' or str(where) in RELEASED:
        return True
    if re.fullmatch(r'(distil)?gpt-?2\S*', str(where), re.IGNORECASE):  # a misspelt size, perhaps
        return True
    return re.fullmatch(r'[\w.-]+/[\w.-]+', str(where)) is not None and not path.parent.is_dir()


def load_foreign(
    where: str | Path, dropout: float = 0.0, tokenizer: str | None = None
) -> tuple[GPT, Tokenizer | None, dict]:
    """A GPT-2 or NanoChat of `transformers`, or a nanoGPT checkpoint -> model, tokenizer, state.

    tokenizer: the name, tokenizer.json or meta.pkl to use instead of what comes with the model.
    """
    path = Path(where)
    if (path / 'ckpt.pt').is_file():
        path /= 'ckpt.pt'
    if path.suffix == '.pt':
        model, found, state = load_nanogpt(path, dropout)
    else:
        folder = path if path.is_dir() else download(str(where))
        model, found, state = load_transformers(folder, str(where), dropout)
    return model, read_named_tokenizer(tokenizer) if tokenizer else found, state


def empty_model(config: GPTConfig) -> GPT:
    """A model whose parameters are yet to be filled: starting values would take time and memory."""
    with torch.device('meta'):
        model = GPT(config)
    model.to_empty(device='cpu')
    model.tie()
    return model


@torch.no_grad()
def fill(model: GPT, named: Iterable, where: str | Path, transposed: tuple = TRANSPOSED) -> None:
    """Copy (name, tensor) pairs into a model, those in `transposed` the other way round.

    Left out are the tied head, causal masks, and biases that are known to be zero.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in named:
        if (parameter := parameters.pop(name, None)) is None:
            continue
        tensor = tensor.T if name.endswith(transposed) else tensor
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f'{where}: {name} has shape {tuple(tensor.shape)}, and the model needs '
                f'{tuple(parameter.shape)}: another architecture'
            )
        parameter.copy_(tensor)
    if parameters:
        raise CheckpointError(f'{where} lacks {min(parameters)}: another architecture')


def load_transformers(
    folder: Path, name: str, dropout: float
) -> tuple[GPT, Tokenizer | None, dict]:
    """Weights are read from the mapped file one at a time, so that memory holds them once."""
    config = read_json(folder / 'config.json', name)
    model = empty_model(GPTConfig(dropout=dropout, **shape_of(config, name)))
    files = weight_files(folder, name)
    fill(model, ((own_name(key), read_tensor(path, key)) for key, path in files.items()), name)
    return model, read_tokenizer(folder, name, model.config.vocab_size), {}


def own_name(key: str) -> str:
    """OpenAI's own files leave out the first part of a name."""
    return key if key.startswith(('transformer.', 'model.', 'lm_head.')) else f'transformer.{key}'


def shape_of(config: dict, name: str) -> dict:
    """GPTConfig's fields out of a config.json; refused is what model.py would not compute."""
    kind = config.get('model_type')
    try:
        if kind == 'gpt2':
            expected = GPT2_SETTINGS | {'n_inner': (None, 4 * config['n_embd'])}
            shape = {key: config[key] for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd')}
            shape |= {'block_size': config['n_positions'], 'arch': 'gpt2'}
            shape['bias'] = config.get('flatgpt_bias', True)
        elif kind == 'nanochat':
            expected = NANOCHAT_SETTINGS | {'intermediate_size': (4 * config['hidden_size'],)}
            shape = {ours: config[theirs] for ours, theirs in NANOCHAT_NAMES.items()}
            shape['arch'] = 'modern'
            rope = config.get('rope_parameters') or config
            if rope.get('rope_theta', 10000.0) != 10000.0:
                raise CheckpointError(
                    f'{name}: rope_theta={rope["rope_theta"]}; only 10,000 is read'
                )
        else:
            raise CheckpointError(f'{name} is a {kind} model; GPT-2 and NanoChat are read')
    except KeyError as error:
        raise CheckpointError(f'{name}: its config.json has no {error}') from error
    for key, values in expected.items():
        if config.get(key, values[0]) not in values:
            raise CheckpointError(f'{name}: {key}={config[key]!r}; only {values[0]!r} is read')
    return shape


GPT2_SETTINGS = {
    'activation_function': ('gelu_new', 'gelu_pytorch_tanh'),
    'layer_norm_epsilon': (1e-5,),
    'scale_attn_weights': (True,),
    'scale_attn_by_inverse_layer_idx': (False,),
    'add_cross_attention': (False,),
    'tie_word_embeddings': (True,),
}
NANOCHAT_SETTINGS = {
    'hidden_act': ('relu2',),
    'rms_norm_eps': (1e-6,),
    'final_logit_softcapping': (15.0,),
    'attention_bias': (False,),
    'tie_word_embeddings': (False,),
}
NANOCHAT_NAMES = {
    'vocab_size': 'vocab_size',
    'n_layer': 'num_hidden_layers',
    'n_head': 'num_attention_heads',
    'n_kv_head': 'num_key_value_heads',
    'n_embd': 'hidden_size',
    'block_size': 'max_position_embeddings',
}


def weight_files(folder: Path, name: str) -> dict[str, Path]:
    """Every tensor's name and the file it lies in."""
    if (folder / INDEX).is_file():
        files = read_json(folder / INDEX, name).get('weight_map', {})
        for file in sorted(set(files.values())):
            if not (folder / Path(file).name).is_file():
                raise CheckpointError(f'{name}: {file} is missing; fetch it again')
        return {key: folder / Path(file).name for key, file in files.items()}
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f'{name}: {WEIGHTS} is missing; save the model with save_pretrained()'
        )
    try:
        with safe_open(path, framework='pt') as file:
            return dict.fromkeys(file.keys(), path)
    except SafetensorError as error:
        raise CheckpointError(f'{path} is damaged or half fetched: {error}') from error


def read_tensor(path: Path, key: str) -> torch.Tensor:
    """One tensor; the file is mapped for it alone, or all that was read would stay in memory."""
    try:
        with safe_open(path, framework='pt') as file:
            return file.get_tensor(key)
    except SafetensorError as error:
        raise CheckpointError(f'{path} is damaged or half fetched: {error}') from error


def read_json(path: Path, name: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(content, dict):
            raise ValueError('it is no object')
        return content
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{name}: {path.name} cannot be read: {error}') from error


def download(name: str) -> Path:
    """The folder of a model on the hub, from its cache if it is there (HF_HOME, HF_HUB_OFFLINE)."""
    if '/' not in name and name not in RELEASED:
        hint = did_you_mean(name, RELEASED)
        raise CheckpointError(f'{name}: no such model; {hint}there are {", ".join(RELEASED)}')
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import HFValidationError

    wanted = ['config.json', WEIGHTS, INDEX, 'model-*.safetensors']
    wanted += ['tokenizer.json', 'vocab.json', 'merges.txt']
    repository = name
    if '/' not in name:
        repository = f'distilbert/{name}' if name == 'distilgpt2' else f'openai-community/{name}'
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f'{name} is neither a folder, nor in the local cache, nor to be had from the hub '
            f'({type(error).__name__}); put config.json, {WEIGHTS} and tokenizer.json of '
            f'{repository} into a folder and name that'
        ) from error


# --- nanoGPT


def load_nanogpt(path: Path, dropout: float) -> tuple[GPT, Tokenizer | None, dict]:
    """A ckpt.pt that nanoGPT's train.py wrote, compiled or not. Only tensors are unpickled."""
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        shape = {key: saved['model_args'][key] for key in NANOGPT_SHAPE}
        weights, config = saved['model'], saved.get('config', {})
    except FileNotFoundError:
        raise CheckpointError(f'{path}: no such checkpoint') from None
    except Exception as error:  # a broken pickle can raise nearly anything
        if 'weights_only' in str(error).lower():
            what = 'is refused: it holds more than weights and numbers, and could run code'
            raise CheckpointError(f'{path} {what}') from error
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:150]
        raise CheckpointError(f'{path}: not a checkpoint of nanoGPT: {reason}') from error
    model = empty_model(GPTConfig(dropout=dropout, **shape))
    named = ((key.removeprefix('_orig_mod.'), tensor) for key, tensor in weights.items())
    fill(model, named, path, transposed=())
    state = {'step': int(saved.get('iter_num', 0)), 'config': config}
    return model, nanogpt_tokenizer(path, config, model.config.vocab_size), state


NANOGPT_SHAPE = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias')


def nanogpt_tokenizer(path: Path, config: dict, vocab_size: int) -> Tokenizer | None:
    """The characters of its dataset's meta.pkl, looked for beside the checkpoint and among ours."""
    dataset = str(config.get('dataset', ''))
    roots = [*path.resolve().parents, Path(__file__).resolve().parent]
    for root in roots if re.fullmatch(r'[\w.-]+', dataset) else ():
        folder = root / 'data' / dataset
        if (folder / 'meta.pkl').is_file():
            return fitting(from_nanogpt_meta(folder / 'meta.pkl'), vocab_size)
        if (folder / 'tokenizer.json').is_file() and (folder / 'meta.json').is_file():
            return fitting(read_named_tokenizer(str(folder / 'tokenizer.json')), vocab_size)
    # without a meta.pkl, nanoGPT's own sample.py takes GPT-2's tokens too
    return get_tokenizer('gpt2') if vocab_size in GPT2_VOCABULARIES else None


def fitting(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer | None:
    return tokenizer if tokenizer.vocab_size <= vocab_size else None


# --- tokenizers


def read_named_tokenizer(name: str) -> Tokenizer:
    """--tokenizer=: an encoding's name, a nanoGPT meta.pkl, or a tokenizer.json of either kind."""
    path = Path(name)
    if path.suffix == '.pkl':
        return from_nanogpt_meta(path)
    if path.suffix != '.json':
        return get_tokenizer(name)
    content = read_json(path, name)
    return Tokenizer.from_dict(content) if 'kind' in content else parse_tokenizer(content, name)


def read_tokenizer(folder: Path, name: str, vocab_size: int) -> Tokenizer | None:
    """What a transformers folder has for a tokenizer, None if nothing tells."""
    if (folder / 'tokenizer.json').is_file():
        return parse_tokenizer(read_json(folder / 'tokenizer.json', name), name)
    if (folder / 'vocab.json').is_file() and (folder / 'merges.txt').is_file():
        lines = (folder / 'merges.txt').read_text(encoding='utf-8').splitlines()
        merges = [line for line in lines if line and not line.startswith('#version')]
        model = {'type': 'BPE', 'vocab': read_json(folder / 'vocab.json', name), 'merges': merges}
        special = [{'content': EOT, 'id': model['vocab'][EOT]}] if EOT in model['vocab'] else []
        split = {'type': 'ByteLevel', 'add_prefix_space': False}
        content = {'model': model, 'added_tokens': special, 'pre_tokenizer': split}
        return parse_tokenizer(content, name)
    if vocab_size in GPT2_VOCABULARIES:
        print(f"{name} has no tokenizer files; by its {vocab_size} ids it is taken for GPT-2's")
        return get_tokenizer('gpt2')
    return None


def parse_tokenizer(content: dict, name: str) -> Tokenizer:
    """A tokenizer.json of `tokenizers`: byte-level BPE, or our characters; UserError otherwise."""
    try:
        model = content['model']
        special = {token['content']: token['id'] for token in content.get('added_tokens', [])}
        if model['type'] == 'WordLevel':
            ordered = sorted(model['vocab'], key=model['vocab'].get)
            letters = [text for text in ordered if text not in special]
            if any(len(text) != 1 for text in letters) or set(special) - {EOT}:
                raise UserError('its words are not single characters')
            return char_tokenizer(letters, eot=EOT in special)
        if model['type'] != 'BPE':
            raise UserError(f'it is of type {model["type"]}; byte-level BPE is read')
        letters = byte_letters()
        size = max([*model['vocab'].values(), *special.values()]) + 1
        tokens: list[bytes | None] = [None] * size
        for text, i in model['vocab'].items():
            tokens[i] = text.encode() if text in special else bytes(letters[c] for c in text)
        for text, i in special.items():
            tokens[i] = text.encode()
        pairs = [pair.split(' ') if isinstance(pair, str) else pair for pair in model['merges']]
        merged = [model['vocab'][a + b] for a, b in pairs]
        if merged != sorted(merged):
            raise UserError('its merges are not in the order of its ids')
        if not pairs and len(tokens) <= 257:
            return Tokenizer('byte', 'byte', tokens, special)
        pattern = pattern_of(content.get('pre_tokenizer') or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f'{name}: its tokenizer.json is not understood: {error!r}') from error
    except UserError as error:
        raise CheckpointError(f'{name}: its tokenizer.json cannot be used: {error}') from error
    own = Tokenizer('bpe', 'bpe', tokens, special, pattern)
    if pattern == GPT2_WORDS and len(tokens) == 50257:
        own.kind, own.name = 'tiktoken', 'gpt2'
    return own


def pattern_of(split: dict) -> str:
    """The regular expression by which a pre-tokenizer of `tokenizers` splits text."""
    if split.get('type') == 'ByteLevel' and split.get('use_regex', True):
        if split.get('add_prefix_space'):
            raise UserError('it puts a space before the text')
        return GPT2_WORDS
    if split.get('type') == 'Sequence':
        parts = split['pretokenizers']
        regexes = [p['pattern']['Regex'] for p in parts if p.get('type') == 'Split']
        levels = [p for p in parts if p.get('type') == 'ByteLevel']
        if len(regexes) == 1 and len(levels) == 1 and len(parts) == 2:
            return regexes[0]
    raise UserError('it splits text in a way that is not understood')


# -----------------------------------------------------------------------------
# write


def export_transformers(model: GPT, tokenizer: Tokenizer | None, state: dict, folder: Path) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load; all of it or nothing."""
    files = {'config.json': config_json(model, tokenizer)}
    end = None if tokenizer is None else tokenizer.eot
    files['generation_config.json'] = {'bos_token_id': end, 'eos_token_id': end}
    if tokenizer is not None:
        files['tokenizer.json'] = tokenizer_json(tokenizer)
        files['tokenizer_config.json'] = {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'model_max_length': model.config.block_size,
            'clean_up_tokenization_spaces': False,
            **({'bos_token': EOT, 'eos_token': EOT} if tokenizer.eot is not None else {}),
        }
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f'{folder} is there already; name a new folder')
    part = folder.with_name(f'.{folder.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        save_file(transformers_tensors(model), part / WEIGHTS, metadata={'format': 'pt'})
        for name, content in files.items():
            text = json.dumps(content, indent=1, ensure_ascii=False)
            (part / name).write_text(text + '\n', encoding='utf-8')
        (part / 'README.md').write_text(model_card(model, tokenizer, state), encoding='utf-8')
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{folder}: cannot be written: {error}') from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def transformers_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """Parameters as they are there: GPT-2 always has biases, zero where ours has none."""
    tensors = {name: p.detach().cpu() for name, p in model.named_parameters()}
    tensors = {
        name: (tensor.T if name.endswith(TRANSPOSED) else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    if model.config.arch == 'gpt2' and not model.config.bias:
        for name, tensor in list(tensors.items()):
            if name.endswith('.weight') and '.wte.' not in name and '.wpe.' not in name:
                tensors[name.removesuffix('weight') + 'bias'] = torch.zeros(tensor.shape[-1])
    return tensors


def config_json(model: GPT, tokenizer: Tokenizer | None) -> dict:
    c, end = model.config, None if tokenizer is None else tokenizer.eot
    both = {
        'vocab_size': c.vocab_size,
        'bos_token_id': end,
        'eos_token_id': end,
        'dtype': 'float32',
    }
    if c.arch == 'gpt2':
        return {
            'architectures': ['GPT2LMHeadModel'],
            'model_type': 'gpt2',
            'n_positions': c.block_size,
            'n_embd': c.n_embd,
            'n_layer': c.n_layer,
            'n_head': c.n_head,
            **{key: values[0] for key, values in GPT2_SETTINGS.items()},
            **dict.fromkeys(('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), c.dropout),
            'flatgpt_bias': c.bias,  # False: the biases in the file are zero, and none are ours
            **both,
        }
    return {
        'architectures': ['NanoChatForCausalLM'],
        'model_type': 'nanochat',
        **{theirs: asdict(c)[ours] for ours, theirs in NANOCHAT_NAMES.items()},
        'num_key_value_heads': c.kv_heads,
        'intermediate_size': 4 * c.n_embd,
        'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0},
        **{key: values[0] for key, values in NANOCHAT_SETTINGS.items()},
        'pad_token_id': end,
        **both,
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The same in the format of `tokenizers`, which AutoTokenizer reads."""
    special = [
        {
            **{'id': i, 'content': text, 'special': True},
            **dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False),
        }
        for text, i in sorted(tokenizer.special.items(), key=lambda item: item[1])
    ]
    content = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': special}
    content |= {'normalizer': None, 'post_processor': None}
    if tokenizer.kind == 'char':
        letters = {token.decode(): i for i, token in enumerate(tokenizer.token_bytes)}
        every = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated'}
        content['pre_tokenizer'] = every | {'invert': False}
        content['decoder'] = {'type': 'Fuse'}
        content['model'] = {'type': 'WordLevel', 'vocab': letters, 'unk_token': '<unk>'}
        return content
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    content['decoder'] = level | {'use_regex': True}
    if tokenizer.name in ('gpt2', 'r50k_base'):
        content['pre_tokenizer'] = level | {'use_regex': True}  # which is GPT-2's
    else:
        split = {'type': 'Split', 'pattern': {'Regex': tokenizer.pattern}, 'behavior': 'Isolated'}
        parts = [split | {'invert': False}] if tokenizer.pattern else []
        parts.append(level | {'use_regex': False})
        content['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': parts}
    vocabulary, merges = letters_and_merges(tokenizer)
    content['model'] = {'type': 'BPE', 'vocab': vocabulary, 'merges': merges}
    return content


def letters_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[list[str]]]:
    """Tokens written as letters, and the pair that each is merged from, in the order of the ids."""
    letter = {byte: character for character, byte in byte_letters().items()}

    def written(token: bytes) -> str:
        return ''.join(letter[byte] for byte in token)

    special = set(tokenizer.special.values())
    ranks = {
        token: i
        for i, token in enumerate(tokenizer.token_bytes)
        if token is not None and i not in special
    }
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:  # as encoding goes, up to the last merge
                joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
                at = int(np.argmin(joined))
                if joined[at] >= rank:
                    raise UserError(f'token {rank} cannot be had by merging two that come before')
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            merges.append([written(part) for part in parts])
    return {written(token): i for token, i in ranks.items()}, merges


def model_card(model: GPT, tokenizer: Tokenizer | None, state: dict) -> str:
    c, settings = model.config, state.get('config', {})
    facts = {
        'architecture': 'GPT-2' if c.arch == 'gpt2' else 'NanoChat',
        'parameters': f'{sum(p.numel() for p in model.parameters()):,}',
        'layers, heads, width': f'{c.n_layer}, {c.n_head}, {c.n_embd}',
        'context': f'{c.block_size} tokens',
        'tokenizer': 'none'
        if tokenizer is None
        else f'{tokenizer.name}, {tokenizer.vocab_size} ids',
        'trained on': settings.get('dataset'),
        'began from': settings.get('init_from'),
        'steps': state.get('step'),
        'training loss': state.get('train_loss'),
        'validation loss': state.get('val_loss'),
        'bits per byte': state.get('val_bpb'),
        **{name: settings.get(name) for name in CARD_SETTINGS},
    }
    rows = [f'| {name} | {value} |' for name, value in facts.items() if value is not None]
    head = '---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n'
    title = f'# {settings.get("dataset", "A model")}, by flatGPT\n\n'
    use = (
        '\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
        "model = AutoModelForCausalLM.from_pretrained('.')\n"
        "tokenizer = AutoTokenizer.from_pretrained('.')\n```\n"
    )
    return head + title + '| | |\n|---|---|\n' + '\n'.join(rows) + '\n' + use


CARD_SETTINGS = ('optimizer', 'learning_rate', 'batch_size', 'gradient_accumulation_steps', 'seed')


def export_gguf(model: GPT, tokenizer: Tokenizer | None, state: dict, path: Path) -> None:
    """A file for llama.cpp and what is built on it: GPT-2, matrices in 16 bits."""
    try:
        import gguf
    except ImportError:
        raise UserError('writing GGUF needs: pip install gguf') from None
    c = model.config
    if c.arch != 'gpt2':
        raise ConfigError(f"arch={c.arch!r}: llama.cpp has no such model; only 'gpt2' goes to GGUF")
    if (
        tokenizer is None
        or tokenizer.kind not in ('tiktoken', 'byte')
        or tokenizer.name
        not in (
            'gpt2',
            'byte',
        )
    ):
        name = None if tokenizer is None else tokenizer.name
        raise UserError(f"tokenizer {name}: llama.cpp does not split text so; it has GPT-2's way")
    if path.exists():
        raise UserError(f'{path} is there already; name a new file')
    part = path.with_name(f'.{path.name}.part')
    writer = gguf.GGUFWriter(part, 'gpt2')
    writer.add_name(str(state.get('config', {}).get('dataset', path.stem)))
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_gguf_vocabulary(writer, gguf, tokenizer, c.vocab_size)
    for name, tensor in gguf_tensors(model).items():
        matrix = tensor.dim() == 2 and name != 'position_embd.weight'
        writer.add_tensor(name, tensor.to(torch.float16 if matrix else torch.float32).numpy())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, path)
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {error.strerror or error}') from error
    finally:
        part.unlink(missing_ok=True)


def add_gguf_vocabulary(writer, gguf, tokenizer: Tokenizer, vocab_size: int) -> None:
    vocabulary, merges = letters_and_merges(tokenizer)
    words = [f'[unused{i}]' for i in range(vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * vocab_size
    for word, i in vocabulary.items():
        words[i], kinds[i] = word, gguf.TokenType.NORMAL
    for word, i in tokenizer.special.items():
        words[i], kinds[i] = word, gguf.TokenType.CONTROL
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('gpt-2')
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    # llama.cpp insists on a merge; the byte 255 is in no text, let alone twice
    never = [next(letter for letter, byte in byte_letters().items() if byte == 255)] * 2
    writer.add_token_merges([' '.join(pair) for pair in merges or [never]])
    if tokenizer.eot is not None:
        writer.add_bos_token_id(tokenizer.eot)
        writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)


GGUF_NAMES = {
    'transformer.wte': 'token_embd',
    'transformer.wpe': 'position_embd',
    'transformer.ln_f': 'output_norm',
    'ln_1': 'attn_norm',
    'attn.c_attn': 'attn_qkv',
    'attn.c_proj': 'attn_output',
    'ln_2': 'ffn_norm',
    'mlp.c_fc': 'ffn_up',
    'mlp.c_proj': 'ffn_down',
}


def gguf_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """Parameters under llama.cpp's names; it too wants every bias, and has matrices as ours are."""
    tensors = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition('.')
        layer = re.match(r'transformer\.h\.(\d+)\.(.*)', module)
        own = f'blk.{layer[1]}.{GGUF_NAMES[layer[2]]}' if layer else GGUF_NAMES[module]
        tensors[f'{own}.{leaf}'] = parameter.detach().cpu().float()
        if not model.config.bias and not own.endswith('_embd'):
            tensors[f'{own}.bias'] = torch.zeros(parameter.size(0))
    return tensors
