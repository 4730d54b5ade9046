"""
Export a model as one HTML page that writes text in any browser, without a network or a server.

page.html is the page without a model: it computes the same numbers as model.py with the weights of
inference/quantize.py, 8 bits each with a scale per row.
"""

import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from flatgpt import ROOT
from flatgpt.data.hf_tokenizer import PATTERNS
from flatgpt.data.tokenizer import ASSISTANT, EOT, Tokenizer
from flatgpt.errors import UserError
from flatgpt.files import atomic_file
from flatgpt.inference.quantize import Int8Linear, prepare_for_inference
from model import GPT

MAX_PARAMETERS = 32_000_000  # about 40 MB; the speed of so large a page was not measured
ALIGNMENT = 16  # bytes: a tensor begins at a multiple, where a typed array may
TEMPLATE = Path(__file__).with_name('page.html')
PLAYGROUND = ROOT / 'flatgpt' / 'serving' / 'playground.html'


def export_page(model: GPT, tokenizer: Tokenizer | None, state: dict, path: Path) -> None:
    """Write a page with the model, which is quantized in place. Raises UserError."""
    if tokenizer is None:
        raise UserError(
            'a page needs a tokenizer, and this model has none; give the one it was trained with '
            'as --tokenizer'
        )
    if os.path.lexists(path):
        raise UserError(f'{path} already exists; choose another name for the page')
    check_size(model)
    content = {'name': path.stem, 'model': shape_of(model), 'tokenizer': page_tokenizer(tokenizer)}
    content['tensors'], data = pack(page_tensors(prepare_for_inference(model, 'int8')))
    content['bytes'] = len(data)
    page = fill(content, data)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as part:
            part.write_text(page, encoding='utf-8', newline='\n')
    except OSError as error:
        raise UserError(
            f'{path} cannot be written: {error.strerror or error}; give the page another path'
        ) from error


def check_size(model: GPT) -> None:
    """UserError for a model that a page would load and compute too slowly."""
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > MAX_PARAMETERS:
        raise UserError(
            f'{size / 1e6:.0f}M parameters are too many for a page, which has up to '
            f'{MAX_PARAMETERS / 1e6:.0f}M; serve the model with api.py, or export it with '
            '--format=transformers or gguf'
        )


def shape_of(model: GPT) -> dict:
    names = ('arch', 'block_size', 'vocab_size', 'n_layer', 'n_head', 'kv_heads', 'n_embd')
    return {name: getattr(model.config, name) for name in names} | {'size': model.num_params()}


def playground_style() -> str:
    """The style sheet of the playground, which all our pages share."""
    return re.search(r'<style>\n(.*?)</style>', PLAYGROUND.read_text(encoding='utf-8'), re.S)[1]


def script_json(content: object) -> str:
    """JSON that can stand inside a script element, which ends at the first </script."""
    text = json.dumps(content, ensure_ascii=False, separators=(',', ':'))
    return text.replace('<', '\\u003c')


def fill(content: dict, data: bytes) -> str:
    """The page with its style, the content as JSON, and the tensors in base64."""
    page = TEMPLATE.read_text(encoding='utf-8')
    parts = {
        '/* the playground */': playground_style(),
        '/* its tensors */': base64.b64encode(data).decode('ascii'),
        '/* the model */': script_json(content),  # last: a token may spell one of these
    }
    for place, text in parts.items():
        page = page.replace(place, text)
    return page


# -----------------------------------------------------------------------------
# tensors


def page_tensors(model: GPT) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a model quantized to int8, and everything else in float32."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
    for name, module in model.named_modules():
        for leaf, linear in vars(module).items():
            if isinstance(linear, Int8Linear):
                place = f'{name}.{leaf}'.removeprefix('.')
                yield f'{place}.weight', linear.weight
                yield f'{place}.scale', linear.scale
                if linear.bias is not None:
                    yield f'{place}.bias', linear.bias


def pack(tensors: Iterator[tuple[str, torch.Tensor]]) -> tuple[dict, bytes]:
    """{name: [type, where it begins, its number of elements, its columns]}, and all bytes."""
    places, data = {}, bytearray()
    for name, tensor in tensors:
        array = tensor.cpu().numpy()
        places[name] = [str(array.dtype), len(data), tensor.numel(), tensor.size(-1)]
        data += array.astype(array.dtype.newbyteorder('<')).tobytes()
        data += bytes(-len(data) % ALIGNMENT)
    return places, bytes(data)


# -----------------------------------------------------------------------------
# the tokenizer


def page_tokenizer(tokenizer: Tokenizer) -> dict:
    """A tokenizer for the page, bytes as characters up to U+00FF. UserError if it has others."""
    if tokenizer.added is not None:
        raise UserError(
            f'tokenizer {tokenizer.name}: a page has no added tokens; serve the model with api.py'
        )
    return {
        'kind': tokenizer.kind,
        'tokens': [t if t is None else t.decode('latin-1') for t in tokenizer.token_bytes],
        'special': [*tokenizer.special.values()],
        'stop': sorted(tokenizer.stop_ids),
        'eot': tokenizer.eot,
        'eotText': EOT,
        'pattern': page_pattern(tokenizer),
        'chat': page_chat(tokenizer),
    }


def page_pattern(tokenizer: Tokenizer) -> str:
    """The pattern that splits text, as a regular expression of JavaScript in Unicode mode.

    There, only escapes that mean something are allowed, and whitespace has U+FEFF and lacks U+0085.
    """
    pattern = PATTERNS.get(tokenizer.name, tokenizer.pattern)
    if re.search(r'\(\?i|\\-|(?:[?*+]|\{\d[\d,]*})\+', pattern):  # possessive quantifiers, too
        raise UserError(
            f'tokenizer {tokenizer.name}: a page splits text like byte, char, gpt2 or our own bpe; '
            'serve the model with api.py'
        )
    pattern = pattern.replace(r'\s', r'\p{White_Space}').replace(r'\S', r'\P{White_Space}')
    return pattern.replace(r'\'', "'")


def page_chat(tokenizer: Tokenizer) -> dict | None:
    """The ids around a message of the user and around the answer, and the text that ends it."""
    template = tokenizer.chat_template or {}
    if 'user' not in template:
        return None
    ids = {
        role: [tokenizer.encode_delimiter(text).tolist() for text in template[role]]
        for role in ('user', ASSISTANT)
    }
    end = template[ASSISTANT][1]
    return ids | {'end': end if tokenizer.delimiter_id(end) is None else ''}
