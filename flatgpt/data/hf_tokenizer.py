"""
A tokenizer as the library `tokenizers` and with it `transformers` write it, in both directions.

    tokenizer = read_files('tokenizer.json')     # or 'vocab.json', 'merges.txt'
    content = tokenizer_json(tokenizer)          # AutoTokenizer reads it
"""

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import tokenizers

from flatgpt.data.hf_options import (
    EVERY_CHARACTER,
    GPT2_PATTERN,
    pattern_of,
    refuse_model,
    refuse_unknown,
    split_by,
    understood,
)
from flatgpt.data.tokenizer import (
    ASSISTANT,
    EOT,
    AddedToken,
    Tokenizer,
    byte_alphabet,
    byte_tokenizer,
    difficult_text,
    from_nanogpt_meta,
    get_tokenizer,
    load,
    tokenizer_names,
)
from flatgpt.errors import UserError
from flatgpt.files import read_json

LETTERS = byte_alphabet()
ROLES = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')
CHAT_TEMPLATE_FILE = (
    'flatgpt_chat_template.json'  # {role: [before, after]}, in a folder that we export
)


def find_tokenizer(where: str) -> Tokenizer:
    """The tokenizer of a run (its newest checkpoint), of a checkpoint, of prepared data, in a file,
    or with that name. Folders and files are ours, nanoGPT's (meta.pkl) or of `transformers`.

    A name comes first, whatever folder lies there: ./gpt2 is the folder.
    """
    path = Path(where)
    if where in tokenizer_names():
        return get_tokenizer(where)
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
        return with_saved_chat_template(find_tokenizer(str(inside[0])), folder)
    if (folder / 'vocab.json').is_file() and (folder / 'merges.txt').is_file():
        return with_saved_chat_template(
            read_files(folder / 'vocab.json', folder / 'merges.txt'), folder
        )
    raise UserError(f'--tokenizer={folder}: the folder has none, and no checkpoint with one')


def read_files(*paths: str | Path) -> Tokenizer:
    """A tokenizer.json of `tokenizers`, or vocab.json and merges.txt, as one of ours.

    What lies beside them says which tokens are special, and which end a text. UserError unless both
    encode alike: each option is one of those understood, and the merges are those that the tokens
    have. (A trial on text made to be difficult comes last, for what nobody thought of.)
    """
    try:
        if len(paths) == 1:
            refuse_model(read_json(Path(paths[0]), 'tokenizer').get('model') or {})
        theirs = tokenizers.Tokenizer.from_file(str(paths[0])) if len(paths) == 1 else bpe(*paths)
        theirs.no_truncation()
        theirs.no_padding()
        settings = tokenizer_config(Path(paths[0]).parent)
        add_named_tokens(settings, theirs)
        content = json.loads(theirs.to_str())
        refuse_unknown(content, settings)
        own = parse_tokenizer(content, end_ids(Path(paths[0]).parent, settings, theirs))
        text = 'x' + difficult_text()
        if own.kind == 'char':
            text = ''.join(map(bytes.decode, own.token_bytes[: own.vocab_size - len(own.special)]))
        ids = own.encode(text, allow_eot=True).tolist()
        if theirs.encode(text, add_special_tokens=False).ids != ids:
            raise UserError('it encodes text in a way that we do not')
        return own
    except Exception as error:  # those of the library have no class of their own
        plain = isinstance(error, UserError) or type(error) is Exception
        reason = str(error) if plain else repr(error)
        raise UserError(f'{paths[0]}: cannot be used: {reason}') from error


def bpe(vocabulary: str | Path, merges: str | Path) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer with another vocabulary, as `transformers` makes it."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.add_special_tokens([EOT] if theirs.token_to_id(EOT) is not None else [])
    return theirs


# --- what lies beside a tokenizer.json


def json_beside(folder: Path, name: str) -> dict:
    return read_json(folder / name, str(folder)) if (folder / name).is_file() else {}


def tokenizer_config(folder: Path) -> dict:
    """What tokenizer_config.json says, and the two files that came before it."""
    settings = json_beside(folder, 'tokenizer_config.json')
    if 'added_tokens_decoder' not in settings:
        settings |= json_beside(folder, 'special_tokens_map.json')
        words = json_beside(folder, 'added_tokens.json')
        settings['added_tokens_decoder'] = {i: {'content': word} for word, i in words.items()}
    return settings


def add_named_tokens(settings: dict, theirs: tokenizers.Tokenizer) -> None:
    """Add the tokens that `transformers` adds to those of the tokenizer's file, in its order."""
    named = [settings.get(f'{role}_token') for role in ROLES]
    for key in ('additional_special_tokens', 'extra_special_tokens'):
        more = settings.get(key) or []
        named += more.values() if isinstance(more, dict) else more
    named = [token if isinstance(token, dict) else {'content': token} for token in named if token]
    special = {token['content'] for token in named}
    decoder = {int(i): token for i, token in settings['added_tokens_decoder'].items()}
    known = {token.content for token in theirs.get_added_tokens_decoder().values()}
    for token in [decoder[i] for i in sorted(decoder)] + named:
        if (text := token['content']) not in known:
            known.add(text)
            is_special = bool(token.get('special')) or text in special
            flags = {key: bool(token.get(key)) for key in ('lstrip', 'rstrip', 'single_word')}
            flags |= {'normalized': token.get('normalized', not is_special), 'special': is_special}
            theirs.add_tokens([tokenizers.AddedToken(text, **flags)])
    for i, token in decoder.items():
        if (found := theirs.token_to_id(token['content'])) != i:
            what = f'added token {token["content"]!r}'
            raise UserError(f'{what} is {i} in one file and {found} by another')


def end_ids(folder: Path, settings: dict, theirs: tokenizers.Tokenizer) -> list[int] | None:
    """The ids that end a completion, None where nothing says which; the tokenizer is asked last."""
    if ids := configured_ends(folder, lambda i: theirs.id_to_token(i) is not None):
        return ids
    token = settings.get('eos_token')
    token = token.get('content') if isinstance(token, dict) else token
    found = theirs.token_to_id(token) if token else None
    return None if found is None else [found]


def configured_ends(folder: Path, is_known: Callable[[int], bool]) -> list[int]:
    """What eos_token_id is, an id or a list; of the two files the one that `transformers` prefers.

    An id that the vocabulary does not have says nothing.
    """
    for name in ('generation_config.json', 'config.json'):
        value = json_beside(folder, name).get('eos_token_id')
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            raise UserError(f'{name} has eos_token_id={value!r}, neither an id nor a list of ids')
        if ids := [i for i in dict.fromkeys(ids) if i >= 0 and is_known(i)]:
            return ids
    return []


def with_configured_eos_ids(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer of a folder that has none of its own, with the ends that it names."""
    ids = configured_ends(folder, lambda i: i < tokenizer.vocab_size)
    if ids in ([], [tokenizer.eot]):
        return tokenizer
    return Tokenizer.from_dict(tokenizer.to_dict() | {'end_ids': ids})


# --- what a tokenizer.json says


def parse_tokenizer(content: dict, ends: list[int] | None = None) -> Tokenizer:
    """What a tokenizer.json says, if that is byte-level BPE, or our characters."""
    model, added = content['model'], content['added_tokens']
    ids = model['vocab'] | {token['content']: token['id'] for token in added}
    size = max(ids.values()) + 1
    if len({*ids.values()}) < len(ids) or size > 2 * len(ids):
        raise UserError('its ids are not 0, 1, 2 and so on')
    if model['type'] == 'WordLevel':
        return parse_characters(ids, added, ends)
    if lacking := LETTERS.keys() - model['vocab'].keys():
        raise UserError(f'it has no token for {len(lacking)} of the 256 bytes')
    merged = {a + b for a, b in model['merges']} | LETTERS.keys()
    added = [as_added(token, ends or (), merged) for token in added]
    apart = {token.text for token in added}
    tokens: list[bytes | None] = [None] * size
    for text, i in ids.items():
        is_letters = text in merged or (text not in apart and LETTERS.keys() >= {*text})
        tokens[i] = bytes(LETTERS[c] for c in text) if is_letters else text.encode()
    special = {token.text: token.id for token in added if token.special and not token.merged}
    lonely = [text for text in model['vocab'] if text not in merged and text not in apart]
    if lonely and model.get('ignore_merges'):
        raise UserError(f'its token {lonely[0]!r} comes of no merge, and ignore_merges is set')
    special |= {text: ids[text] for text in lonely}  # no text produces them
    check_merges(model, ids)
    pattern = pattern_of(content['pre_tokenizer'])
    added, ends = unless_usual(added, special, ends)
    own = Tokenizer('bpe', 'bpe', tokens, special, pattern, None, added, ends)
    if not model['merges'] and tokens[:256] == byte_tokenizer().token_bytes[:256]:
        own.kind, own.name, own.pattern = 'byte', 'byte', ''
    elif not pattern:
        raise UserError('it splits text in a way that is not understood: not at all')
    elif own.pattern == GPT2_PATTERN and size == 50257:
        own.kind, own.name = 'tiktoken', 'gpt2'
    return own


def check_merges(model: dict, ids: dict[str, int]) -> None:
    """UserError unless merging by pairs, as `tokenizers` does, is merging by what comes of them.

    It is if the merges are in the order of the ids, and each token's own letters become it: what
    they have become before its merge does not depend on what is around them, so that no other pair
    that would make the same token ever stands in a text.
    """
    merged = [a + b for a, b in model['merges']]
    order = [ids[text] for text in merged]
    if order != sorted({*order}):
        raise UserError('its merges are not in the order of its ids')
    pairs = [tuple(pair) for pair in model['merges']]
    alone = tokenizers.Tokenizer(tokenizers.models.BPE(model['vocab'], pairs))
    for text, encoded in zip(merged, alone.encode_batch(merged), strict=True):
        if encoded.ids != [ids[text]]:
            raise UserError(f'its token {text!r} is not what its merges make of its letters')


def parse_characters(ids: dict[str, int], added: list[dict], ends: list[int] | None) -> Tokenizer:
    """A vocabulary of single characters, after which there may be special tokens."""
    special = {token['content']: token['id'] for token in added if token['special']}
    letters = sorted(ids.keys() - special.keys(), key=ids.get)
    if any(len(text) != 1 for text in letters) or sorted(special.values()) != [
        *range(len(letters), len(ids))
    ]:
        raise UserError('its words are not single characters, and special tokens after them')
    tokens = [text.encode() for text in sorted(ids, key=ids.get)]
    added = [as_added(token, ends or (), set()) for token in added]
    return Tokenizer('char', 'char', tokens, special, '', None, *unless_usual(added, special, ends))


def unless_usual(added: list[AddedToken], special: dict[str, int], ends: list[int] | None) -> tuple:
    """The added tokens and the ends; None for what a tokenizer of ours has by itself."""
    usual = [AddedToken(EOT, special[EOT], special=True)] if EOT in special else []
    if added == usual and len(special) == len(usual):
        return None, None if ends == [token.id for token in usual] else ends
    return added, ends


def as_added(token: dict, ends: Iterable[int], merged: Iterable[str]) -> AddedToken:
    """One of added_tokens; those that end a text are special, unless merging gives them too."""
    text, is_merged = token['content'], token['content'] in merged
    special = token['special'] or (token['id'] in ends and not is_merged)
    flags = {key: token[key] for key in ('single_word', 'lstrip', 'rstrip')}
    # without a normalizer it is a matter of order: special ones, alone, have none
    flags['normalized'] = token['normalized'] and not token['special']
    return AddedToken(text, token['id'], special, **flags, merged=is_merged)


# -----------------------------------------------------------------------------
# write

# how others have to write what tiktoken writes for itself, by the name of the encoding
PATTERNS = dict.fromkeys(('gpt2', 'r50k_base', 'p50k_base', 'p50k_edit'), GPT2_PATTERN)
PATTERNS['cl100k_base'] = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The same in the format of `tokenizers`, which AutoTokenizer reads."""
    content = {'version': '1.0', 'truncation': None, 'padding': None}
    content |= {'added_tokens': added_tokens(tokenizer)}
    content |= {'normalizer': None, 'post_processor': None}
    if tokenizer.kind == 'char':
        letters = {token.decode(): i for i, token in enumerate(tokenizer.token_bytes)}
        content['pre_tokenizer'] = EVERY_CHARACTER
        content['decoder'] = {'type': 'Fuse'}
        content['model'] = {'type': 'WordLevel', 'vocab': letters, 'unk_token': '<unk>'}
        return content
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    content['decoder'] = level | {'use_regex': True}
    pattern = PATTERNS.get(tokenizer.name, tokenizer.pattern)
    if pattern == GPT2_PATTERN:
        content['pre_tokenizer'] = level | {'use_regex': True}
    else:
        parts = [split_by(understood(pattern))] if pattern else []
        parts.append(level | {'use_regex': False})
        content['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': parts}
    vocabulary, merges = vocabulary_and_merges(tokenizer)
    # all others, too: the library would count the ids of added tokens on from these
    others = tokenizer.special | {token.text: token.id for token in tokenizer.added or ()}
    content['model'] = {'type': 'BPE', 'vocab': others | vocabulary, 'merges': merges}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    if moved := [text for text, i in others.items() if theirs.token_to_id(text) != i]:
        raise UserError(f'tokenizer {tokenizer.name}: {moved[0]!r} cannot keep its id')
    return content


def added_tokens(tokenizer: Tokenizer) -> list[dict]:
    """What is matched before merging: of ours, the special tokens."""
    added = tokenizer.added
    if added is None:
        added = [AddedToken(text, i, special=True) for text, i in tokenizer.special.items()]
    keys = ('id', 'single_word', 'lstrip', 'rstrip', 'normalized', 'special')
    ordered = sorted(added, key=lambda token: token.id)
    return [{'content': t.text, **{key: getattr(t, key) for key in keys}} for t in ordered]


def vocabulary_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[list[str]]]:
    """Tokens written as letters, and the pair that each is merged from, in the order of the ids."""
    letter = {byte: character for character, byte in byte_alphabet().items()}

    def written(token: bytes) -> str:
        return ''.join(letter[byte] for byte in token)

    ranks = tokenizer.ranks
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:  # as encoding goes, up to the last merge
                joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
                if (lowest := min(joined)) >= rank:
                    raise UserError(f'token {rank} cannot be had by merging two that come before')
                at = joined.index(lowest)
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            merges.append([written(part) for part in parts])
    return {written(token): i for token, i in ranks.items()}, merges


def with_saved_chat_template(tokenizer: Tokenizer | None, folder: Path) -> Tokenizer | None:
    """The tokenizer with the chat template that an export of ours left in the folder, if it did."""
    if tokenizer is None or not (folder / CHAT_TEMPLATE_FILE).is_file():
        return tokenizer
    try:
        marks = json.loads((folder / CHAT_TEMPLATE_FILE).read_text(encoding='utf-8'))
        return Tokenizer.from_dict(tokenizer.to_dict() | {'chat_template': marks})
    except (OSError, ValueError, UserError) as error:
        raise UserError(f'{folder / CHAT_TEMPLATE_FILE}: not a chat template: {error}') from error


CONTENT = (  # a text, or text parts, a line each: see content_text()
    "{% set content = message['content'] %}{% if content is not string %}"
    "{% if content | rejectattr('type', 'equalto', 'text') | list %}"
    "{{ raise_exception('only text parts are read') }}{% endif %}"
    "{% set content = content | map(attribute='text') | join('\\n') %}{% endif %}"
)


def chat_jinja(tokenizer: Tokenizer) -> str:
    """The chat template in the language that `transformers` and llama.cpp have for it."""

    def said(text: str) -> str:
        return '{{ ' + json.dumps(text, ensure_ascii=False) + ' }}'

    turns = ''.join(
        f"{{% elif message['role'] == {json.dumps(role, ensure_ascii=False)} %}}"
        f'{said(before)}{{{{ content }}}}{said(after)}'
        for role, (before, after) in tokenizer.chat_template.items()
    )
    return (
        '{% for message in messages %}'
        + CONTENT
        + '{% '
        + turns.removeprefix('{% el')
        + "{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}{% endfor %}"
        + '{% if add_generation_prompt %}'
        + said(tokenizer.chat_template[ASSISTANT][0])
        + '{% endif %}'
    )
