"""Export GPT-2 models to GGUF, the format of llama.cpp, which has no NanoChat (0.3.36)."""

import os
import re
from pathlib import Path

import torch

from flatgpt.data.hf_options import GPT2_PATTERN
from flatgpt.data.hf_tokenizer import PATTERNS, chat_jinja, vocabulary_and_merges
from flatgpt.data.tokenizer import Tokenizer, byte_alphabet
from flatgpt.errors import ConfigError, UserError
from flatgpt.files import atomic_file
from model import GPT, GPTConfig


def export_gguf(model: GPT, tokenizer: Tokenizer | None, state: dict, path: Path) -> None:
    """Write a GGUF file with matrices in float16 and the tokenizer. Raises UserError."""
    try:
        import gguf
    except ImportError:
        raise UserError('GGUF export needs the package gguf: pip install gguf') from None
    check_gguf(model, tokenizer)
    c = model.config
    if os.path.lexists(path):
        raise UserError(f'{path} already exists; choose another file')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as part:
            writer = gguf.GGUFWriter(part, 'gpt2')
            writer.add_name(str(state.get('config', {}).get('dataset', path.stem)))
            add_gguf_shape(writer, gguf, c)
            add_gguf_vocabulary(writer, gguf, tokenizer, c.vocab_size)
            for name, tensor in gguf_tensors(model).items():
                matrix = tensor.dim() == 2 and name != 'position_embd.weight'
                kind = torch.float16 if matrix else torch.float32
                writer.add_tensor(name, tensor.to(kind).numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'{path} cannot be written: {reason}; choose another path') from error


def check_gguf(model: GPT, tokenizer: Tokenizer | None) -> None:
    """UserError for an architecture or a tokenizer that llama.cpp cannot reproduce."""
    arch = model.config.arch
    if arch != 'gpt2':
        raise ConfigError(
            f'arch={arch!r}: llama.cpp does not support it; export without --format=gguf'
        )
    if tokenizer is None:
        raise UserError(
            'a GGUF file needs a tokenizer, and this model has none; give the one it was trained '
            'with as --tokenizer'
        )
    pattern = PATTERNS.get(tokenizer.name, tokenizer.pattern)
    if tokenizer.kind not in ('byte', 'char') and pattern != GPT2_PATTERN:
        raise UserError(
            f"tokenizer {tokenizer.name}: llama.cpp splits text like 'gpt2', 'byte' or 'char'; "
            'export without --format=gguf'
        )
    for token in tokenizer.added or ():
        if token.single_word or token.lstrip or token.rstrip:
            raise UserError(
                f'added token {token.text!r}: a GGUF file has no single_word, lstrip and rstrip; '
                'export without --format=gguf'
            )
    if len(tokenizer.stop_ids) > 3:
        raise UserError(
            f'{len(tokenizer.stop_ids)} end-of-text tokens: a GGUF file has three at most; export '
            'without --format=gguf'
        )


def add_gguf_shape(writer, gguf, c: GPTConfig) -> None:
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def add_gguf_vocabulary(writer, gguf, tokenizer: Tokenizer, vocab_size: int) -> None:
    is_char = tokenizer.kind == 'char'
    vocabulary, merges = (characters_and_merges if is_char else vocabulary_and_merges)(tokenizer)
    words = [f'[unused{i}]' for i in range(vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * vocab_size
    for word, i in vocabulary.items():
        words[i], kinds[i] = word, gguf.TokenType.NORMAL
    for word, i in tokenizer.special.items():
        words[i], kinds[i] = word, gguf.TokenType.CONTROL
    for token in tokenizer.added_words:
        words[token.id], kinds[token.id] = token.text, gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('gpt-2')
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    # llama.cpp needs at least one merge; the byte 255 is in no UTF-8 text
    unused_merge = [next(letter for letter, byte in byte_alphabet().items() if byte == 255)] * 2
    writer.add_token_merges([' '.join(pair) for pair in merges or [unused_merge]])
    if tokenizer.eot is not None:
        writer.add_bos_token_id(tokenizer.eot)
    # in llama.cpp each of them ends a completion
    setters = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, i in zip(setters, tokenizer.ordered_stop_ids, strict=False):
        add(i)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(chat_jinja(tokenizer))


def characters_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[list[str]]]:
    """{character: id} in the byte-level alphabet, and merges that join the bytes of each.

    llama.cpp merges bytes to what need not be a token, such as the first two of three.
    """
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    words = {''.join(letters[b] for b in token): i for token, i in tokenizer.ranks.items()}
    merges = dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word)))
    return words, [list(pair) for pair in merges]


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
    """Parameters under llama.cpp's names. It needs every bias; its matrices are (out, in)."""
    tensors = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition('.')
        layer = re.match(r'transformer\.h\.(\d+)\.(.*)', module)
        own = f'blk.{layer[1]}.{GGUF_NAMES[layer[2]]}' if layer else GGUF_NAMES[module]
        tensors[f'{own}.{leaf}'] = parameter.detach().cpu().float()
        if not model.config.bias and not own.endswith('_embd'):
            tensors[f'{own}.bias'] = torch.zeros(parameter.size(0))
    return tensors
