"""
Read and write tokenizers in the format of `tokenizers` and `transformers`.

    tokenizer = read_files('tokenizer.json')     # or 'vocab.json', 'merges.txt'
    content = tokenizer_json(tokenizer)          # AutoTokenizer reads it
"""

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import tokenizers

from flatgpt.data.hf_options import (
    CHARACTER_SPLIT,
    GPT2_PATTERN,
    check_model,
    check_regex,
    check_supported,
    regex_split,
    split_pattern,
)
from flatgpt.data.tokenizer import (
    ASSISTANT,
    EOT,
    AddedToken,
    Tokenizer,
    byte_alphabet,
    byte_tokenizer,
    from_nanogpt_meta,
    get_tokenizer,
    self_check_text,
    tokenizer_names,
)
from flatgpt.data.tokenizer import (
    load as load_tokenizer,
)
from flatgpt.errors import UserError, reason_of
from flatgpt.files import read_json

ALPHABET = byte_alphabet()
TOKEN_ROLES = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')
CHAT_TEMPLATE_FILE = 'flatgpt_chat_template.json'  # {role: [before, after]}, in our exports


def find_tokenizer(where: str) -> Tokenizer:
    """The tokenizer with this name, or of a run (its newest checkpoint), a checkpoint, a dataset or
    a file. Folders and files are ours, nanoGPT's (meta.pkl) or those of `transformers`.

    A name has precedence over a folder: use ./gpt2 for a folder named gpt2.
    """
    path = Path(where)
    if where in tokenizer_names():
        return get_tokenizer(where)
    if where and path.is_dir():
        return read_folder(path)
    if not path.is_file():
        if not where or len(path.parts) > 1 or path.suffix in ('.json', '.pkl'):
            raise UserError(
                f'--tokenizer={where}: no such folder or file; give a path that exists, or a name '
                'such as gpt2 or byte'
            )
        return get_tokenizer(where)
    if path.suffix == '.pkl':
        return from_nanogpt_meta(path)
    return load_tokenizer(path) if 'kind' in read_json(path, 'tokenizer') else read_files(path)


def read_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a folder; UserError if it has none."""
    inside = [folder / 'meta.pkl', *sorted(folder.glob('checkpoints/step-*/tokenizer.json'))]
    inside = [file for file in [folder / 'tokenizer.json', *inside[::-1]] if file.is_file()]
    if inside:
        return with_saved_chat_template(find_tokenizer(str(inside[0])), folder)
    if (folder / 'vocab.json').is_file() and (folder / 'merges.txt').is_file():
        return with_saved_chat_template(
            read_files(folder / 'vocab.json', folder / 'merges.txt'), folder
        )
    raise UserError(
        f'--tokenizer={folder}: the folder has no tokenizer and no checkpoint; give that of a run '
        'or one that has a tokenizer.json'
    )


def context_of(where: str) -> int | None:
    """The context (block_size) of the model of a run, a checkpoint or a `transformers` folder.

    None if there is no such model.
    """
    folder = Path(where)
    states = [folder / 'state.json', *sorted(folder.glob('checkpoints/step-*/state.json'))]
    shapes = [read_json(path, where).get('model', {}) for path in states[-1:] if path.is_file()]
    shapes.append(read_optional_json(folder, 'config.json'))
    keys = ('block_size', 'n_positions', 'max_position_embeddings')
    return next((shape[key] for shape in shapes for key in keys if key in shape), None)


def read_files(*paths: str | Path) -> Tokenizer:
    """A tokenizer.json of `tokenizers`, or vocab.json and merges.txt, as one of our tokenizers.

    Other files in the folder have the special tokens and eos_token_id. UserError unless both encode
    alike: all options must be supported, and the merges must follow from the tokens. Last, both
    encode self_check_text(), in case of differences that no option shows.
    """
    try:
        if len(paths) == 1:
            raw = read_json(Path(paths[0]), 'tokenizer')
            check_model(raw.get('model') or {})
            check_ids(ids_of(raw))  # the library counts up to the largest
            hf = tokenizers.Tokenizer.from_file(str(paths[0]))
        else:
            hf = gpt2_style(*paths)
        hf.no_truncation()
        hf.no_padding()
        settings = tokenizer_config(Path(paths[0]).parent)
        add_configured_tokens(settings, hf)
        content = json.loads(hf.to_str())
        check_supported(content, settings)
        own = parse_tokenizer(content, find_eos_ids(Path(paths[0]).parent, settings, hf))
        text = 'x' + self_check_text()
        if own.kind == 'char':
            text = ''.join(map(bytes.decode, own.token_bytes[: own.vocab_size - len(own.special)]))
        ids = own.encode(text, allow_eot=True).tolist()
        if hf.encode(text, add_special_tokens=False).ids != ids:
            raise UserError('it encodes text differently than flatGPT does; use another tokenizer')
        return own
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f'{paths[0]}: unsupported tokenizer: {reason_of(error)}') from error


def gpt2_style(vocabulary: str | Path, merges: str | Path) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer with another vocabulary, as `transformers` creates it."""
    hf = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.add_special_tokens([EOT] if hf.token_to_id(EOT) is not None else [])
    return hf


# --- other files in the folder of a tokenizer.json


def read_optional_json(folder: Path, name: str) -> dict:
    return read_json(folder / name, str(folder)) if (folder / name).is_file() else {}


def tokenizer_config(folder: Path) -> dict:
    """The settings in tokenizer_config.json and in the two files that preceded it."""
    settings = read_optional_json(folder, 'tokenizer_config.json')
    if 'added_tokens_decoder' not in settings:
        settings |= read_optional_json(folder, 'special_tokens_map.json')
        words = read_optional_json(folder, 'added_tokens.json')
        settings['added_tokens_decoder'] = {i: {'content': word} for word, i in words.items()}
    return settings


def add_configured_tokens(settings: dict, hf: tokenizers.Tokenizer) -> None:
    """Add the tokens that `transformers` adds to the tokenizer, in the same order."""
    named = [settings.get(f'{role}_token') for role in TOKEN_ROLES]
    for key in ('additional_special_tokens', 'extra_special_tokens'):
        more = settings.get(key) or []
        named += more.values() if isinstance(more, dict) else more
    named = [token if isinstance(token, dict) else {'content': token} for token in named if token]
    special = {token['content'] for token in named}
    decoder = {int(i): token for i, token in settings['added_tokens_decoder'].items()}
    known = {token.content for token in hf.get_added_tokens_decoder().values()}
    for token in [decoder[i] for i in sorted(decoder)] + named:
        if (text := token['content']) not in known:
            known.add(text)
            is_special = bool(token.get('special')) or text in special
            flags = {key: bool(token.get(key)) for key in ('lstrip', 'rstrip', 'single_word')}
            flags |= {'normalized': token.get('normalized', not is_special), 'special': is_special}
            hf.add_tokens([tokenizers.AddedToken(text, **flags)])
    for i, token in decoder.items():
        if (found := hf.token_to_id(token['content'])) != i:
            raise UserError(
                f'added token {token["content"]!r} has the id {i} in one file and {found} in '
                'another; give it the same id in both'
            )


def find_eos_ids(folder: Path, settings: dict, hf: tokenizers.Tokenizer) -> list[int] | None:
    """The ids that end a completion: eos_token_id, else eos_token; None without either."""
    if ids := configured_eos_ids(folder, lambda i: hf.id_to_token(i) is not None):
        return ids
    token = settings.get('eos_token')
    token = token.get('content') if isinstance(token, dict) else token
    found = hf.token_to_id(token) if token else None
    return None if found is None else [found]


def configured_eos_ids(folder: Path, is_known: Callable[[int], bool]) -> list[int]:
    """The ids in eos_token_id, from the file that `transformers` prefers; [] without any.

    Ids that the vocabulary does not have are ignored.
    """
    for name in ('generation_config.json', 'config.json'):
        value = read_optional_json(folder, name).get('eos_token_id')
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            raise UserError(f'{name} has eos_token_id={value!r}; give an id or a list of ids')
        if ids := [i for i in dict.fromkeys(ids) if i >= 0 and is_known(i)]:
            return ids
    return []


def with_configured_eos_ids(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer, with the eos_token_id of the folder of a model without its own tokenizer."""
    ids = configured_eos_ids(folder, lambda i: i < tokenizer.vocab_size)
    if ids in ([], [tokenizer.eot]):
        return tokenizer
    return Tokenizer.from_dict(tokenizer.to_dict() | {'end_ids': ids})


# --- parsing


def parse_tokenizer(content: dict, ends: list[int] | None = None) -> Tokenizer:
    """The tokenizer of a tokenizer.json of byte-level BPE, or of single characters."""
    model, added = content['model'], content['added_tokens']
    ids = ids_of(content)
    check_ids(ids)
    size = max(ids.values()) + 1
    if model['type'] == 'WordLevel':
        return parse_char_tokenizer(ids, added, ends)
    if missing := ALPHABET.keys() - model['vocab'].keys():
        raise UserError(
            f'it has no token for {len(missing)} of the 256 bytes; train it with '
            'initial_alphabet=ByteLevel.alphabet()'
        )
    merged = {a + b for a, b in model['merges']} | ALPHABET.keys()
    added = [as_added_token(token, ends or (), merged) for token in added]
    added_texts = {token.text for token in added}
    tokens: list[bytes | None] = [None] * size
    for text, i in ids.items():
        is_bytes = text in merged or (text not in added_texts and ALPHABET.keys() >= {*text})
        tokens[i] = bytes(ALPHABET[c] for c in text) if is_bytes else text.encode()
    special = {token.text: token.id for token in added if token.special and not token.merged}
    used = merged | added_texts
    unmerged = [text for text in model['vocab'] if text not in used]
    if unmerged and model.get('ignore_merges'):
        raise UserError(
            f'its token {unmerged[0]!r} has no merge, which ignore_merges=true does not allow; set '
            'ignore_merges to false'
        )
    special |= {text: ids[text] for text in unmerged}  # no text produces them
    check_merges(model, ids)
    pattern = split_pattern(content['pre_tokenizer'])
    added, ends = none_if_default(added, special, ends)
    own = Tokenizer('bpe', 'bpe', tokens, special, pattern, None, added, ends)
    if not model['merges'] and tokens[:256] == byte_tokenizer().token_bytes[:256]:
        own.kind, own.name, own.pattern = 'byte', 'byte', ''
    elif not pattern:
        raise UserError('its pre_tokenizer does not split text; set its use_regex to true')
    elif own.pattern == GPT2_PATTERN and size == 50257:
        own.kind, own.name = 'tiktoken', 'gpt2'
    return own


def ids_of(content: dict) -> dict[str, int]:
    """Every token of a tokenizer.json, with its id."""
    added = {token['content']: token['id'] for token in content.get('added_tokens') or []}
    return content['model']['vocab'] | added


def check_ids(ids: dict[str, int]) -> None:
    if len({*ids.values()}) < len(ids) or max(ids.values()) >= 2 * len(ids):
        raise UserError('its ids are not unique, or mostly unused; use the ids 0, 1, 2 and so on')


def check_merges(model: dict, ids: dict[str, int]) -> None:
    """UserError unless merging by pairs (`tokenizers`) equals merging by token rank (tiktoken).

    It does if the merges are in the order of the ids and each token is what its own bytes merge
    to: their merges do not depend on the surrounding text, so that no other pair that would make
    the same token occurs.
    """
    merged = [a + b for a, b in model['merges']]
    order = [ids[text] for text in merged]
    if order != sorted({*order}):
        raise UserError(
            'its merges are not in the order of its ids; sort them by the id of the merged token'
        )
    pairs = [tuple(pair) for pair in model['merges']]
    alone = tokenizers.Tokenizer(tokenizers.models.BPE(model['vocab'], pairs))
    for text, encoded in zip(merged, alone.encode_batch(merged), strict=True):
        if encoded.ids != [ids[text]]:
            raise UserError(
                f'its token {text!r} is not what its merges make of these bytes; remove the token '
                'and its merge'
            )


def parse_char_tokenizer(
    ids: dict[str, int], added: list[dict], ends: list[int] | None
) -> Tokenizer:
    """A vocabulary of single characters, which may end with special tokens."""
    special = {token['content']: token['id'] for token in added if token['special']}
    characters = sorted(ids.keys() - special.keys(), key=ids.get)
    if any(len(text) != 1 for text in characters) or sorted(special.values()) != [
        *range(len(characters), len(ids))
    ]:
        raise UserError(
            'its tokens are not all single characters; use those as the first ids, and special '
            'tokens after them'
        )
    tokens = [text.encode() for text in sorted(ids, key=ids.get)]
    added = [as_added_token(token, ends or (), set()) for token in added]
    return Tokenizer(
        'char', 'char', tokens, special, '', None, *none_if_default(added, special, ends)
    )


def none_if_default(
    added: list[AddedToken], special: dict[str, int], ends: list[int] | None
) -> tuple:
    """(added tokens, end ids), None for those that our tokenizers have by default."""
    usual = [AddedToken(EOT, special[EOT], special=True)] if EOT in special else []
    if added == usual and len(special) == len(usual):
        return None, None if ends == [token.id for token in usual] else ends
    return added, ends


def as_added_token(token: dict, ends: Iterable[int], merged: Iterable[str]) -> AddedToken:
    """An entry of added_tokens; eos tokens are special, unless merging gives them, too."""
    text, is_merged = token['content'], token['content'] in merged
    special = token['special'] or (token['id'] in ends and not is_merged)
    flags = {key: token[key] for key in ('single_word', 'lstrip', 'rstrip')}
    # without a normalizer it only changes the order, and special tokens come first
    flags['normalized'] = token['normalized'] and not token['special']
    return AddedToken(text, token['id'], special, **flags, merged=is_merged)


# -----------------------------------------------------------------------------
# writing

# patterns of tiktoken encodings, in a form that both libraries read
PATTERNS = dict.fromkeys(('gpt2', 'r50k_base', 'p50k_base', 'p50k_edit'), GPT2_PATTERN)
PATTERNS['cl100k_base'] = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """A tokenizer in the format of `tokenizers`, which AutoTokenizer reads."""
    content = {'version': '1.0', 'truncation': None, 'padding': None}
    content |= {'added_tokens': added_tokens(tokenizer)}
    content |= {'normalizer': None, 'post_processor': None}
    if tokenizer.kind == 'char':
        characters = {token.decode(): i for i, token in enumerate(tokenizer.token_bytes)}
        content['pre_tokenizer'] = CHARACTER_SPLIT
        content['decoder'] = {'type': 'Fuse'}
        content['model'] = {'type': 'WordLevel', 'vocab': characters, 'unk_token': '<unk>'}
        return content
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    content['decoder'] = level | {'use_regex': True}
    pattern = PATTERNS.get(tokenizer.name, tokenizer.pattern)
    if pattern == GPT2_PATTERN:
        content['pre_tokenizer'] = level | {'use_regex': True}
    else:
        parts = [regex_split(check_regex(pattern))] if pattern else []
        parts.append(level | {'use_regex': False})
        content['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': parts}
    vocabulary, merges = vocabulary_and_merges(tokenizer)
    # with the added tokens: otherwise the library gives them the ids after these
    others = tokenizer.special | {token.text: token.id for token in tokenizer.added or ()}
    content['model'] = {'type': 'BPE', 'vocab': others | vocabulary, 'merges': merges}
    hf = tokenizers.Tokenizer.from_str(json.dumps(content))
    if moved := [text for text, i in others.items() if hf.token_to_id(text) != i]:
        raise UserError(
            f'tokenizer {tokenizer.name}: special token {moved[0]!r} is also a plain token; '
            'rename it'
        )
    return content


def added_tokens(tokenizer: Tokenizer) -> list[dict]:
    """The added tokens, or by default the special ones, in the format of `tokenizers`."""
    added = tokenizer.added
    if added is None:
        added = [AddedToken(text, i, special=True) for text, i in tokenizer.special.items()]
    keys = ('id', 'single_word', 'lstrip', 'rstrip', 'normalized', 'special')
    ordered = sorted(added, key=lambda token: token.id)
    return [{'content': t.text, **{key: getattr(t, key) for key in keys}} for t in ordered]


def vocabulary_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[list[str]]]:
    """{token: id} and the pair that each token is merged from, in the byte-level alphabet."""
    alphabet = {byte: character for character, byte in ALPHABET.items()}

    def written(token: bytes) -> str:
        return ''.join(alphabet[byte] for byte in token)

    ranks = tokenizer.ranks
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:  # merge as encoding does, up to the last pair
                joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
                if (lowest := min(joined)) >= rank:
                    raise UserError(
                        f'tokenizer {tokenizer.name}: token {rank} is not a merge of two earlier '
                        'tokens; use another tokenizer'
                    )
                at = joined.index(lowest)
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            merges.append([written(part) for part in parts])
    return {written(token): i for token, i in ranks.items()}, merges


def with_saved_chat_template(tokenizer: Tokenizer | None, folder: Path) -> Tokenizer | None:
    """The tokenizer, with the chat template that our export saved in the folder, if any."""
    if tokenizer is None or not (folder / CHAT_TEMPLATE_FILE).is_file():
        return tokenizer
    try:
        template = json.loads((folder / CHAT_TEMPLATE_FILE).read_text(encoding='utf-8'))
        return Tokenizer.from_dict(tokenizer.to_dict() | {'chat_template': template})
    except (OSError, ValueError, UserError) as error:
        raise UserError(
            f'{folder / CHAT_TEMPLATE_FILE}: invalid chat template: {error}; fix or delete the file'
        ) from error


CONTENT_JINJA = (  # a text, or a list of text parts, joined by line feeds: see content_text()
    "{% set content = message['content'] %}{% if content is not string %}"
    "{% if content | rejectattr('type', 'equalto', 'text') | list %}"
    "{{ raise_exception('only text parts are read') }}{% endif %}"
    "{% set content = content | map(attribute='text') | join('\\n') %}{% endif %}"
)


def chat_jinja(tokenizer: Tokenizer) -> str:
    """The chat template in Jinja, as `transformers` and llama.cpp read it."""

    def literal(text: str) -> str:
        return '{{ ' + json.dumps(text, ensure_ascii=False) + ' }}'

    turns = ''.join(
        f"{{% elif message['role'] == {json.dumps(role, ensure_ascii=False)} %}}"
        f'{literal(before)}{{{{ content }}}}{literal(after)}'
        for role, (before, after) in tokenizer.chat_template.items()
    )
    return (
        '{% for message in messages %}'
        + CONTENT_JINJA
        + '{% '
        + turns.removeprefix('{% el')
        + "{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}{% endfor %}"
        + '{% if add_generation_prompt %}'
        + literal(tokenizer.chat_template[ASSISTANT][0])
        + '{% endif %}'
    )
