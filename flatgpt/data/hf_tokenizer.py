"""
A tokenizer as the library `tokenizers` and with it `transformers` write it, in both directions.

    tokenizer = read_files('tokenizer.json')     # or 'vocab.json', 'merges.txt'
    content = tokenizer_json(tokenizer)          # AutoTokenizer reads it
"""

import itertools
import json
from pathlib import Path

import numpy as np
import tokenizers

from flatgpt.data.tokenizer import (
    ASSISTANT,
    EOT,
    Tokenizer,
    byte_letters,
    byte_tokenizer,
    char_tokenizer,
    difficult_text,
    from_nanogpt_meta,
    get_tokenizer,
    load,
)
from flatgpt.errors import UserError
from flatgpt.files import read_json

# how GPT-2 splits text before merging, https://github.com/openai/gpt-2/blob/master/src/encoder.py
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MARKS = 'flatgpt_chat_template.json'  # {role: [before, after]}, in a folder that we export


def find_tokenizer(where: str) -> Tokenizer:
    """The tokenizer of a run (its newest checkpoint), of a checkpoint, of prepared data, in a file,
    or with that name. Folders and files are ours, nanoGPT's (meta.pkl) or of `transformers`.
    """
    path = Path(where)
    if where and path.is_dir():
        return read_folder(path)
    if not path.is_file():
        if not where or len(path.parts) > 1 or path.suffix in ('.json', '.pkl'):
            raise UserError(f'--tokenizer={where}: no such folder or file')
        return get_tokenizer(where)
    if path.suffix == '.pkl':
        return from_nanogpt_meta(path)
    return load(path) if 'kind' in read_json(path, 'tokenizer') else read_files(path)


def read_folder(folder: Path) -> Tokenizer:
    """What a folder has for a tokenizer; UserError if that is nothing."""
    inside = [folder / 'meta.pkl', *sorted(folder.glob('checkpoints/step-*/tokenizer.json'))]
    inside = [file for file in [folder / 'tokenizer.json', *inside[::-1]] if file.is_file()]
    if inside:
        return with_marks(find_tokenizer(str(inside[0])), folder)
    if (folder / 'vocab.json').is_file() and (folder / 'merges.txt').is_file():
        return with_marks(read_files(folder / 'vocab.json', folder / 'merges.txt'), folder)
    raise UserError(f'--tokenizer={folder}: the folder has none, and no checkpoint with one')


def read_files(*paths: str | Path) -> Tokenizer:
    """A tokenizer.json of `tokenizers`, or vocab.json and merges.txt, as one of ours.

    UserError unless both encode alike, which is tried on text made to be difficult.
    """
    try:
        if len(paths) == 1:
            theirs = tokenizers.Tokenizer.from_file(str(paths[0]))
        else:
            theirs = tokenizers.ByteLevelBPETokenizer(*map(str, paths))
            theirs.add_special_tokens([EOT] if theirs.token_to_id(EOT) is not None else [])
        theirs.no_truncation()
        own = parse_tokenizer(json.loads(theirs.to_str()))
        text = 'x' + difficult_text().replace(EOT, '')
        if own.kind == 'char':
            text = ''.join(map(bytes.decode, own.token_bytes[: own.vocab_size - len(own.special)]))
        if theirs.encode(text, add_special_tokens=False).ids != own.encode(text).tolist():
            raise UserError('it encodes text in a way that we do not')
        return own
    except Exception as error:  # those of the library have no class of their own
        reason = str(error) if type(error) in (Exception, UserError) else repr(error)
        raise UserError(f'{paths[0]}: cannot be used: {reason}') from error


def parse_tokenizer(content: dict) -> Tokenizer:
    """What a tokenizer.json says, if that is byte-level BPE, or our characters."""
    model = content['model']
    special = {token['content']: token['id'] for token in content['added_tokens']}
    if model['type'] == 'WordLevel':
        letters = sorted(model['vocab'].keys() - special, key=model['vocab'].get)
        if any(len(text) != 1 for text in letters) or set(special) - {EOT}:
            raise UserError('its words are not single characters')
        return char_tokenizer(letters, eot=EOT in special)
    if model['type'] != 'BPE':
        raise UserError(f'it is of type {model["type"]}; byte-level BPE is read')
    ids, letters = model['vocab'] | special, byte_letters()
    size = max(ids.values()) + 1
    if len({*ids.values()}) < len(ids) or size > 2 * len(ids):
        raise UserError('its ids are not 0, 1, 2 and so on')
    tokens: list[bytes | None] = [None] * size
    for text, i in ids.items():
        tokens[i] = text.encode() if text in special else bytes(letters[c] for c in text)
    if lacking := [byte for byte in range(256) if bytes([byte]) not in tokens]:
        raise UserError(f'it has no token for {len(lacking)} of the 256 bytes')
    merged = [ids[a + b] for a, b in model['merges']]
    if merged != sorted(merged):
        raise UserError('its merges are not in the order of its ids')
    if not merged and tokens[:256] == byte_tokenizer().token_bytes[:256] and size <= 257:
        return Tokenizer('byte', 'byte', tokens, special)
    pattern = pattern_of(content['pre_tokenizer'] or {})
    is_gpt2 = pattern == GPT2_WORDS and size == 50257
    kind, name = ('tiktoken', 'gpt2') if is_gpt2 else ('bpe', 'bpe')
    return Tokenizer(kind, name, tokens, special, pattern)


def pattern_of(split: dict) -> str:
    """The regular expression by which a pre-tokenizer of `tokenizers` splits text."""
    plain = {'type': 'ByteLevel', 'add_prefix_space': False}
    if split.items() >= {**plain, 'use_regex': True}.items():
        return GPT2_WORDS
    first, *rest = split.get('pretokenizers') or [{}]
    if len(rest) == 1 and rest[0].items() >= {**plain, 'use_regex': False}.items():
        pattern = first.get('pattern', {}).get('Regex')
        kept = {'type': 'Split', 'behavior': 'Isolated', 'invert': False}
        if pattern and first.items() >= kept.items():
            return pattern
    raise UserError('it splits text in a way that is not understood')


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


def with_marks(tokenizer: Tokenizer | None, folder: Path) -> Tokenizer | None:
    """The tokenizer with the chat template that an export of ours left in the folder, if it did."""
    if tokenizer is None or not (folder / MARKS).is_file():
        return tokenizer
    try:
        marks = json.loads((folder / MARKS).read_text(encoding='utf-8'))
        return Tokenizer.from_dict(tokenizer.to_dict() | {'chat_template': marks})
    except (OSError, ValueError, UserError) as error:
        raise UserError(f'{folder / MARKS}: not a chat template: {error}') from error


def chat_jinja(tokenizer: Tokenizer) -> str:
    """The chat template in the language that `transformers` and llama.cpp have for it."""

    def said(text: str) -> str:
        return '{{ ' + json.dumps(text, ensure_ascii=False) + ' }}'

    turns = ''.join(
        f"{{% elif message['role'] == {json.dumps(role, ensure_ascii=False)} %}}"
        f"{said(before)}{{{{ message['content'] }}}}{said(after)}"
        for role, (before, after) in tokenizer.chat_template.items()
    )
    return (
        '{% for message in messages %}{% '
        + turns.removeprefix('{% el')
        + "{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}{% endfor %}"
        + '{% if add_generation_prompt %}'
        + said(tokenizer.chat_template[ASSISTANT][0])
        + '{% endif %}'
    )
