"""
Tokenizers: characters, bytes, tiktoken encodings and BPE trained on text, in one class.

    tokenizer = get_tokenizer('gpt2')       # or 'byte', 'cl100k_base', ...
    tokenizer.decode(tokenizer.encode('To be, or not'))
    tokenizer.save('tokenizer.json')        # self-contained: load() needs no network
"""

import base64
import functools
import hashlib
import itertools
import json
import os
import pickle
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flatgpt.data.download import network_problem
from flatgpt.errors import UserError, did_you_mean, reason_of
from flatgpt.files import atomic_file

EOT = '<|endoftext|>'
LONG_WORD_BYTES = 2**18  # a longer word is merged in blocks
MERGE_BLOCK_BYTES = 2**16
ASSISTANT = 'assistant'
# as in Unicode; Python has four control characters more
WHITESPACE = '\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000' + ''.join(
    map(chr, range(0x2000, 0x200B))
)
# gigatoken's names for how these encodings split text
GIGATOKEN_SCHEMES = {
    'gpt2': 'gpt2',
    'r50k_base': 'gpt2',
    'cl100k_base': 'gpt4',
    'o200k_base': 'o200k',
}


def self_check_text(seed: int = 0, pieces: int = 5000) -> str:
    """Text that is hard to split: contractions, whitespace, scripts, emoji ... in random order.

    Two implementations of a tokenizer must give the same ids for it.
    """
    parts = [
        *"the and 'll 've 's 'S 'LL don't we're ing 123 4567 3.14 <|endoftext|> _x ... ://".split(),
        *(' ', ' ', '  ', '   ', '\n', '\n\n', '\r\n', ' \n', '\t', '\u00a0', '\u2003', '\u200b'),
        *('é', 'e\u0301', 'ß', 'Ω', 'я', 'ب', 'हिन्दी', 'ไทย', '中文', 'ひ', '한', '١٢', 'Ⅷ', '²'),
        *(
            '\U0001f600',
            '\U0001f468\u200d\U0001f469',
            '\U00010348',
            '\ufeff',
            '\U0010ffff',
            '\x00',
            '\x1f',
        ),
    ]
    random = np.random.default_rng(seed)
    return ''.join(parts[i] for i in random.integers(len(parts), size=pieces))


class AddedToken(NamedTuple):
    """A text that always becomes one token, before the rest is split and merged.

    The fields are those of `tokenizers.AddedToken`. special: only read where encode() allows it;
    single_word: not beside a letter; lstrip, rstrip: includes the whitespace before, after it;
    normalized: matched after all others. One is ours, merged: merging gives the same id, as for a
    word of the vocabulary that was added again.
    """

    text: str
    id: int
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    merged: bool = False


class Tokenizer:
    """
    kind: 'char', 'byte', 'tiktoken' or 'bpe'.     name: its name on the command line.
    token_bytes: the bytes of every id 0..vocab_size-1, None for an unused id.
    special: {text: id} of the special tokens, which encode() only gives where it is told to.
    pattern: the regular expression that splits text before merging (tiktoken and bpe).
    chat_template: {role: [text before a message, text after it]}, None for a base model. A text
        that is a special token or <|endoftext|> is encoded as that token.
    added: tokens that are matched before merging; by default the end-of-text token.
    end_ids: the ids that end a completion (eos_token_id); by default that of <|endoftext|>.
    eot: the end-of-text id, which separates documents: the first special one of end_ids.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        token_bytes: list,
        special: dict,
        pattern: str = '',
        chat_template: dict[str, list[str]] | None = None,
        added: Iterable[AddedToken] | None = None,
        end_ids: Iterable[int] | None = None,
    ):
        self.kind, self.name, self.pattern = kind, name, pattern
        self.chat_template = chat_template
        self.token_bytes: list[bytes | None] = token_bytes
        self.special: dict[str, int] = special
        self.vocab_size = len(token_bytes)
        self.end_ids = None if end_ids is None else list(end_ids)
        special_ends = [i for i in self.end_ids or () if i in special.values()]
        self.eot: int | None = special.get(EOT)
        if special_ends and self.eot not in special_ends:
            self.eot = special_ends[0]
        self.added = None if added is None else [AddedToken(*token) for token in added]
        self.dtype = np.dtype('<u2' if self.vocab_size <= 2**16 else '<u4')
        self._gigatoken = None

    def encode(self, text: str, allow_eot: bool = False) -> np.ndarray:
        """
        The ids of `text`. With allow_eot, a written <|endoftext|> becomes the end-of-text id, and
        the special tokens of a `transformers` tokenizer become theirs; otherwise they are plain
        text. UserError for a character that a char tokenizer does not have.
        """
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, from a shell or a JSON escape
            text = text.encode(errors='replace').decode()
        parts, at = [], 0
        for start, end, token in self.find_added_tokens(text, allow_eot):
            parts += [self._encode(text[at:start], at), [token]]
            at = end
        parts.append(self._encode(text[at:], at))
        ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return ids.astype(self.dtype)

    def find_added_tokens(self, text: str, special: bool) -> list[tuple[int, int, int]]:
        """(start, end, id) of the added tokens in a text; special: including special tokens."""
        found: list[tuple[int, int, int]] = []
        for pattern, tokens in self._added_patterns:
            borders = [0, *(at for start, end, _ in found for at in (start, end)), len(text)]
            for start, end in zip(borders[::2], borders[1::2], strict=True):
                piece = text if (start, end) == (0, len(text)) else text[start:end]
                inside = match_added_tokens(pattern, tokens, piece, special)
                found += [(start + a, start + b, i) for a, b, i in inside]
            found.sort()
        return found

    @functools.cached_property
    def _added_patterns(self) -> list[tuple[re.Pattern, dict[str, AddedToken]]]:
        """(pattern, tokens) of the tokens that are not normalized, and then of those that are."""
        added = self.added
        if added is None:
            added = [] if self.eot is None else [AddedToken(EOT, self.eot, special=True)]
        patterns = []
        for normalized in (False, True):
            tokens = {token.text: token for token in added if token.normalized == normalized}
            longest_first = sorted(tokens, key=len, reverse=True)
            if tokens:
                patterns.append((re.compile('|'.join(map(re.escape, longest_first))), tokens))
        return patterns

    def _encode(self, text: str, position: int = 0) -> np.ndarray:
        if self.kind == 'byte':
            return np.frombuffer(text.encode(), np.uint8)
        if self.kind == 'char':
            return self._encode_characters(text, position)
        if self._gigatoken is not None:
            return self._gigatoken.encode(text)
        if has_long_run(text):
            return self._encode_long_words(text)
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:  # at a word of a million letters; older versions panic
            if not isinstance(error, ValueError) and type(error).__name__ != 'PanicException':
                raise
            return self._encode_long_words(text)

    def _encode_long_words(self, text: str) -> np.ndarray:
        """The ids of text with a word that is too long for tiktoken's own splitting."""
        import regex

        words = (match[0].encode() for match in regex.finditer(self.pattern, text))
        ids = list(map(self._encode_long_word, words))
        return np.fromiter(itertools.chain.from_iterable(ids), np.int64, sum(map(len, ids)))

    def _encode_long_word(self, word: bytes) -> list[int]:
        """The ids of a word, block by block: merging it at once would not take linear time.

        Tokens are those of a word if each two neighbors are the tokens of their joint text. So a
        block may end where its last token and the first of the next block are such neighbors.
        """
        encode, tokens = self._encoding._encode_single_piece, self.token_bytes
        size = MERGE_BLOCK_BYTES
        ids, at, block = [], 0, encode(word[:size])
        while at + size < len(word):
            end = at + size
            for keep in range(len(block) - 1, max(0, len(block) - 64), -1):
                end -= len(tokens[block[keep]])
                following = encode(word[end : end + size])
                pair = [block[keep - 1], following[0]]
                if encode(b''.join(tokens[i] for i in pair)) == pair:
                    break
            else:
                return encode(word)
            ids += block[:keep]
            at, block = end, following
        return ids + block

    def _encode_characters(self, text: str, position: int) -> np.ndarray:
        code_points = np.frombuffer(text.encode('utf-32-le'), '<u4')
        ids = self._id_of_character[np.minimum(code_points, len(self._id_of_character) - 1)]
        unknown = np.flatnonzero(ids < 0)
        if len(unknown):
            at = int(unknown[0])
            known = ''.join(token.decode() for token in self.token_bytes[:80])
            more = ' and more' if self.vocab_size > 80 else ''
            raise UserError(
                f'character {text[at]!r} (U+{ord(text[at]):04X}) at position {position + at}: not '
                f'in the vocabulary; use only {known!r}{more}'
            )
        return ids

    @functools.cached_property
    def _id_of_character(self) -> np.ndarray:
        """Code point -> id, -1 where there is none; the last entry is for all higher ones."""
        characters = self.token_bytes[: self.vocab_size - len(self.special)]
        codes = [ord(character.decode()) for character in characters]
        table = np.full(max(codes, default=0) + 2, -1, np.int32)
        table[codes] = np.arange(len(codes))
        return table

    @functools.cached_property
    def _encoding(self):
        import tiktoken

        return tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={}
        )

    @functools.cached_property
    def ranks(self) -> dict[bytes, int]:
        """{token: rank} of the tokens that merging gives; neither special nor added ones."""
        others = {*self.special.values()} | {t.id for t in self.added or () if not t.merged}
        tokens = enumerate(self.token_bytes)
        return {token: i for i, token in tokens if token is not None and i not in others}

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a completion: the end_ids, and the end of the assistant's turn."""
        turn = self.delimiter_id((self.chat_template or {}).get(ASSISTANT, ['', ''])[1])
        ids = [self.eot] if self.end_ids is None else self.end_ids
        return frozenset(i for i in (*ids, turn) if i is not None)

    @property
    def ordered_stop_ids(self) -> list[int]:
        """The stop ids, the end of text first."""
        return sorted(self.stop_ids, key=lambda i: (i != self.eot, i))

    @property
    def eot_text(self) -> str | None:
        """The text of the end-of-text token."""
        return None if self.eot is None else self.token_bytes[self.eot].decode(errors='replace')

    @functools.cached_property
    def writable(self) -> np.ndarray:
        """Whether a model may generate an id (vocab_size,): text and stop ids only."""
        mask = np.array([token is not None for token in self.token_bytes])
        mask[list(self.special.values())] = False
        mask[list(self.stop_ids)] = True
        return mask

    def render(self, messages: Iterable[dict]) -> tuple[np.ndarray, np.ndarray]:
        """The ids (T,) of a conversation, {'role', 'content'} each, and their loss mask (T,).

        The mask is True for the assistant's content and the end of its turn. Content is plain
        text, even if it spells a special token. UserError for a role that the template does not
        have.
        """
        ids, mask = [np.zeros(0, self.dtype)], [np.zeros(0, bool)]
        for number, message in enumerate(messages):
            if message['role'] not in self.chat_template:
                roles = ', '.join(self.chat_template)
                raise UserError(
                    f'messages[{number}]: unknown role {message["role"]!r}; use {roles}'
                )
            before, after = map(self.encode_delimiter, self.chat_template[message['role']])
            content = np.concatenate([self.encode(message['content']), after])
            is_target = message['role'] == ASSISTANT
            ids += [before, content]
            mask += [np.zeros(len(before), bool), np.full(len(content), is_target)]
        return np.concatenate(ids).astype(self.dtype), np.concatenate(mask)

    def encode_chat(self, messages: Iterable[dict]) -> np.ndarray:
        """The ids of a conversation as a prompt, with the start of the assistant's turn."""
        start = self.encode_delimiter(self.chat_template[ASSISTANT][0])
        return np.concatenate([self.render(messages)[0], start]).astype(self.dtype)

    def encode_delimiter(self, delimiter: str) -> np.ndarray:
        """The ids of a text that the chat template puts before or after a message."""
        token = self.delimiter_id(delimiter)
        return self.encode(delimiter) if token is None else np.array([token])

    def delimiter_id(self, delimiter: str) -> int | None:
        """The id of a delimiter that is a special token; <|endoftext|> is always eot."""
        return self.special.get(delimiter, self.eot if delimiter == EOT else None)

    def accelerate(self) -> str:
        """Use gigatoken from now on, 20 times as fast -> '', or the reason why not.

        It must give the same ids as tiktoken for self_check_text().
        """
        if self.accelerated:
            return ''
        if self.name not in GIGATOKEN_SCHEMES:
            return f'gigatoken does not support {self.name}'
        try:
            from gigatoken.gigatoken_rs import BPETokenizer
        except ImportError:
            return 'gigatoken, which is much faster, is not installed: pip install gigatoken'
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'ranks.tiktoken'
            self.write_ranks(path)
            try:
                fast = BPETokenizer.from_tiktoken(path, GIGATOKEN_SCHEMES[self.name])
                text = self_check_text()
                same = np.array_equal(fast.encode(text), self._encode(text))
            except Exception as error:  # another version may raise anything
                return f'gigatoken failed: {error}'
        if not same:
            return 'this version of gigatoken gives different ids'
        self._gigatoken = fast
        return ''

    def write_ranks(self, path: str | Path) -> None:
        """Write the vocabulary as a .tiktoken file."""
        lines = [base64.b64encode(token) + b' %d\n' % i for token, i in self.ranks.items()]
        Path(path).write_bytes(b''.join(lines))

    @property
    def accelerated(self) -> bool:
        return self._gigatoken is not None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; invalid UTF-8, such as half a character, becomes U+FFFD."""
        return b''.join(self.token_bytes[i] or b'' for i in ids).decode('utf-8', errors='replace')

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text of each id (vocab_size,); 0 for special ids."""
        lengths = np.array([len(token or b'') for token in self.token_bytes], np.int64)
        lengths[list(self.special.values())] = 0
        return lengths

    def __eq__(self, other) -> bool:
        """Whether both encode alike. Patterns are ignored: tiktoken versions differ in them."""
        if not isinstance(other, Tokenizer):
            return NotImplemented
        alike = self.token_bytes == other.token_bytes and self.special == other.special
        return alike and self.added_words == other.added_words

    @property
    def added_words(self) -> set[AddedToken]:
        """The added tokens that are not special."""
        return {token for token in self.added or () if not token.special}

    def __repr__(self) -> str:
        return f'<Tokenizer {self.name}, {self.vocab_size} ids>'

    def to_dict(self) -> dict:
        tokens = [None if t is None else base64.b64encode(t).decode() for t in self.token_bytes]
        fields = {'kind': self.kind, 'name': self.name, 'pattern': self.pattern}
        if self.chat_template:
            fields['chat_template'] = self.chat_template
        if self.added is not None:
            fields['added_tokens'] = [token._asdict() for token in self.added]
        if self.end_ids is not None:
            fields['end_ids'] = self.end_ids
        return fields | {'special_tokens': self.special, 'tokens': tokens}

    @classmethod
    def from_dict(cls, fields: dict) -> 'Tokenizer':
        try:
            tokens = [None if t is None else base64.b64decode(t) for t in fields['tokens']]
            special = {str(text): int(i) for text, i in fields['special_tokens'].items()}
            kind, name, pattern = (str(fields[key]) for key in ('kind', 'name', 'pattern'))
            if kind not in ('char', 'byte', 'tiktoken', 'bpe'):
                raise ValueError(f'kind: {kind!r}')
            if not all(0 <= i < len(tokens) for i in special.values()):
                raise ValueError(f'special_tokens: an id is not below {len(tokens)}')
            chat = fields.get('chat_template') or None
            if any(
                not isinstance(around, list) or list(map(type, around)) != [str, str]
                for around in (chat or {}).values()
            ):
                raise ValueError('chat_template: each role needs two texts')
            if chat and ASSISTANT not in chat:
                raise ValueError('chat_template: needs the role assistant')
            added, end_ids = fields.get('added_tokens'), fields.get('end_ids')
            added = None if added is None else [AddedToken(**token) for token in added]
            ids = [*(end_ids or ()), *(token.id for token in added or ())]
            if not all(type(i) is int and 0 <= i < len(tokens) for i in ids):
                raise ValueError(f'added_tokens or end_ids: an id is not below {len(tokens)}')
            if not all(isinstance(token.text, str) and token.text for token in added or ()):
                raise ValueError('added_tokens: one has no text')
            return cls(kind, name, tokens, special, pattern, chat, added, end_ids)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f'not a tokenizer of flatGPT: {reason_of(error)}') from error

    def save(self, path: str | Path) -> None:
        with atomic_file(path) as part:
            part.write_text(json.dumps(self.to_dict()), encoding='utf-8')


def has_long_run(text: str) -> bool:
    """Whether the text has more than LONG_WORD_BYTES bytes of whitespace, or of other text, in a
    row."""
    if len(text) <= LONG_WORD_BYTES:
        return False
    blank = np.isin(np.frombuffer(text.encode(), np.uint8), tuple(b' \t\n\v\f\r'))
    borders = np.flatnonzero(np.diff(blank, prepend=~blank[0], append=~blank[-1]))
    return bool(np.diff(borders).max() > LONG_WORD_BYTES)


def match_added_tokens(
    pattern: re.Pattern, tokens: dict[str, AddedToken], text: str, special: bool
) -> Iterator[tuple[int, int, int]]:
    """(start, end, id) of the added tokens in a text, by the rules of `tokenizers`."""
    last = 0
    for match in pattern.finditer(text):
        token, (start, end) = tokens[match[0]], match.span()
        beside = text[max(0, start - 1) : start] + text[end : end + 1]
        if token.special > special or (token.single_word and any(map(is_word_character, beside))):
            continue
        while token.lstrip and start > last and text[start - 1] in WHITESPACE:
            start -= 1
        while token.rstrip and end < len(text) and text[end] in WHITESPACE:
            end += 1
        yield start, end, token.id
        last = end


def is_word_character(character: str) -> bool:
    r"""Whether a character is \w in Unicode (UTS 18, annex C); Python's \w differs."""
    kind = unicodedata.category(character)
    if kind[0] in 'LM' or kind in ('Nd', 'Nl', 'Pc') or character in '\u200c\u200d':
        return True
    in_circles = ((0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189))
    return any(first <= ord(character) <= last for first, last in in_circles)


def load(path: str | Path) -> Tokenizer:
    try:
        return Tokenizer.from_dict(json.loads(Path(path).read_text(encoding='utf-8')))
    except FileNotFoundError:
        raise UserError(f'{path}: no such file; prepare the dataset again') from None
    except (OSError, ValueError, UserError) as error:
        raise UserError(
            f'{path}: invalid tokenizer: {error}; create or copy the file again'
        ) from error


def char_tokenizer(characters: Iterable[str], eot: bool = False) -> Tokenizer:
    """An id for each of `characters`, in this order; with `eot` one more for the end of text."""
    tokens = [character.encode() for character in characters]
    special = {EOT: len(tokens)} if eot else {}
    return Tokenizer('char', 'char', tokens + [EOT.encode()] * eot, special)


def byte_tokenizer() -> Tokenizer:
    """An id for each byte of UTF-8 text, and 256 for the end of text; encodes any text."""
    return Tokenizer('byte', 'byte', [bytes([b]) for b in range(256)] + [EOT.encode()], {EOT: 256})


def tiktoken_tokenizer(name: str) -> Tokenizer:
    """A tiktoken encoding by its name; its first use on a machine downloads the vocabulary."""
    encoding = load_encoding(name)
    tokens: list[bytes | None] = [None] * encoding.n_vocab
    for token, i in encoding._mergeable_ranks.items():
        tokens[i] = token
    for text, i in encoding._special_tokens.items():
        tokens[i] = text.encode()
    return Tokenizer('tiktoken', name, tokens, dict(encoding._special_tokens), encoding._pat_str)


def load_encoding(name: str):
    """tiktoken.get_encoding(), except that it fails soon and with advice without a network."""
    import requests
    import tiktoken
    import tiktoken.load

    read_local = tiktoken.load.read_file

    def read_file(url: str) -> bytes:
        if not url.startswith('http'):
            return read_local(url)
        try:
            reply = requests.get(url, timeout=20)  # tiktoken itself has no timeout
            reply.raise_for_status()
            return reply.content
        except requests.RequestException as error:
            folder = os.environ.get('TIKTOKEN_CACHE_DIR') or os.environ.get('DATA_GYM_CACHE_DIR')
            path = Path(folder or Path(tempfile.gettempdir()) / 'data-gym-cache')
            path /= hashlib.sha1(url.encode()).hexdigest()  # as tiktoken names it
            raise UserError(
                f'tokenizer {name}: {url} is not cached and cannot be downloaded '
                f'({network_problem(error)}); save it as {path}, or set TIKTOKEN_CACHE_DIR to a '
                'folder that has it'
            ) from error

    tiktoken.load.read_file = read_file
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f'tokenizer {name}: {" ".join(str(error).split())}; set TIKTOKEN_CACHE_DIR to a folder '
            'that can be written, and try again'
        ) from error
    finally:
        tiktoken.load.read_file = read_local


def byte_alphabet() -> dict[str, int]:
    """{character: byte} of byte-level BPE, which writes each byte as a printable character.

    The inverse of GPT-2's `bytes_to_unicode`.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


def tokenizer_names() -> list[str]:
    import tiktoken

    return ['byte', 'char', 'bpe', *tiktoken.list_encoding_names()]


def get_tokenizer(name: str) -> Tokenizer:
    """A tokenizer that needs no training, by its name."""
    if name == 'byte':
        return byte_tokenizer()
    if name in ('char', 'bpe'):
        raise UserError(
            f'tokenizer {name}: must be made from text; run python data/text/prepare.py FILES '
            f'--name=mine --tokenizer={name}, and use --tokenizer=data/mine'
        )
    names = tokenizer_names()
    if name not in names:
        hint = did_you_mean(name, names)
        raise UserError(
            f'tokenizer {name}: unknown; {hint}use {", ".join(names)}, or the path of a run, a '
            'tokenizer.json or a meta.pkl'
        )
    return tiktoken_tokenizer(name)


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        raise UserError(f'it refers to {module}.{name}, which could run code')


def from_nanogpt_meta(path: str | Path) -> Tokenizer:
    """The characters of nanoGPT's meta.pkl. No code runs: only plain builtins are unpickled."""
    try:
        with open(path, 'rb') as file:
            characters = _SafeUnpickler(file).load()['itos']
        characters = [characters[i] for i in range(len(characters))]
        if any(len(character) != 1 for character in characters):
            raise UserError('its tokens are not single characters')
        return char_tokenizer(characters)
    except Exception as error:  # a broken pickle can raise nearly anything
        raise UserError(
            f'{path}: not the meta.pkl of a character dataset: {error}; create it again with '
            "nanoGPT's prepare.py"
        ) from error
