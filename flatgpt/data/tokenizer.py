"""
Tokenizers: characters, bytes, any tiktoken encoding, and an own byte-pair encoding, all one class.

    tokenizer = get_tokenizer('gpt2')       # or 'byte', 'cl100k_base', ...
    tokenizer.decode(tokenizer.encode('To be, or not'))
    tokenizer.save('tokenizer.json')        # self-contained: load() never needs the network
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

from flatgpt.errors import UserError, did_you_mean
from flatgpt.files import new_file

EOT = '<|endoftext|>'
LONG, BLOCK = 2**18, 2**16  # bytes of a long word, and how many of it are merged at once
ASSISTANT = 'assistant'
WHITE_SPACE = '\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000' + ''.join(
    map(chr, range(0x2000, 0x200B))
)  # by Unicode; Python counts four controls more
# Where an own BPE may not merge: between words (a contraction belongs to its word), between words,
# numbers of up to three digits and other signs; a space goes with what follows it.
WORDS = (
    r" ?[\p{L}\p{M}]+(?:'\p{L}{1,2}(?!\p{L}))?"
    r'| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+'
)


# what gigatoken calls the ways in which these encodings split text into words
GIGATOKEN_SCHEMES = {
    'gpt2': 'gpt2',
    'r50k_base': 'gpt2',
    'cl100k_base': 'gpt4',
    'o200k_base': 'o200k',
}


def difficult_text(seed: int = 0, pieces: int = 5000) -> str:
    """Contractions, runs of white space, scripts, marks, emoji and controls in random order."""
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
    """A text that is one token wherever it stands, before anything else is split or merged.

    The fields are those of the class of this name in `tokenizers`, whose ids these give: special
    ones are only meant where encode() is told so; single_word: not beside a letter; lstrip, rstrip:
    white space before, after it belongs to it; normalized: found after all others. merged: merging
    gives the same id, as for a word of the vocabulary that was added again.
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
    kind: 'char', 'byte', 'tiktoken' or 'bpe'.     name: what it is called on a command line.
    token_bytes: text bytes of every id 0..vocab_size-1, None for an id that stands for nothing.
    special: the ids that no text produces by itself, by their written form.
    pattern: the regular expression that splits text before merging (tiktoken and bpe).
    chat_template: what comes before and after a message of each role, None for a model that only
        continues text. A special token, or the end of text, is meant where it stands alone.
    added: what is matched before merging; by default the end of text, where it is allowed.
    end_ids: the ids that end a completion; by default that of <|endoftext|>.
    eot: the end of text, which stands between documents: the first special one of end_ids.
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
        ends = [i for i in self.end_ids or () if i in special.values()]
        self.eot: int | None = special.get(EOT)
        if ends and self.eot not in ends:
            self.eot = ends[0]
        self.added = None if added is None else [AddedToken(*token) for token in added]
        self.dtype = np.dtype('<u2' if self.vocab_size <= 2**16 else '<u4')
        self._gigatoken = None

    def encode(self, text: str, allow_eot: bool = False) -> np.ndarray:
        """
        The ids of `text`. With allow_eot a written <|endoftext|> becomes the end-of-text id, and so
        does any other special token of a tokenizer of `transformers`; otherwise it is text like any
        other. A character that a char tokenizer lacks: UserError.
        """
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, from a shell or a JSON escape
            text = text.encode(errors='replace').decode()
        ids, at = [], 0
        for start, end, token in self.find_added(text, allow_eot):
            ids += [self._encode(text[at:start], at), [token]]
            at = end
        ids.append(self._encode(text[at:], at))
        whole = ids[0] if len(ids) == 1 else np.concatenate(ids)
        return whole.astype(self.dtype)

    def find_added(self, text: str, special: bool) -> list[tuple[int, int, int]]:
        """(start, end, id) of the added tokens in a text, with or without the special ones."""
        found: list[tuple[int, int, int]] = []
        for pattern, tokens in self._added_patterns:
            borders = [0, *(at for start, end, _ in found for at in (start, end)), len(text)]
            for start, end in zip(borders[::2], borders[1::2], strict=True):
                piece = text if (start, end) == (0, len(text)) else text[start:end]
                inside = matches(pattern, tokens, piece, special)
                found += [(start + a, start + b, i) for a, b, i in inside]
            found.sort()
        return found

    @functools.cached_property
    def _added_patterns(self) -> list[tuple[re.Pattern, dict[str, AddedToken]]]:
        """What finds the longest token at a place, and the tokens: first those not normalized."""
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
        except BaseException as error:  # a word of a million letters; older versions panic
            if not isinstance(error, ValueError) and type(error).__name__ != 'PanicException':
                raise
            return self._encode_long_words(text)

    def _encode_long_words(self, text: str) -> np.ndarray:
        """The ids of text with a word that is too long for the way in which tiktoken finds it."""
        import regex

        words = (match[0].encode() for match in regex.finditer(self.pattern, text))
        ids = list(map(self._encode_long_word, words))
        return np.fromiter(itertools.chain.from_iterable(ids), np.int64, sum(map(len, ids)))

    def _encode_long_word(self, word: bytes) -> list[int]:
        """The ids of a word, block by block: merging all of it at once takes more than its length.

        Tokens are those of a word if each two neighbors are those of the text that they make up. So
        a block ends before a token if the last one is what it is beside the next block's first.
        """
        encode, tokens = self._encoding._encode_single_piece, self.token_bytes
        ids, at, block = [], 0, encode(word[:BLOCK])
        while at + BLOCK < len(word):
            end = at + BLOCK
            for keep in range(len(block) - 1, max(0, len(block) - 64), -1):
                end -= len(tokens[block[keep]])
                following = encode(word[end : end + BLOCK])
                pair = [block[keep - 1], following[0]]
                if encode(b''.join(tokens[i] for i in pair)) == pair:
                    break
            else:
                return encode(word)
            ids += block[:keep]
            at, block = end, following
        return ids + block

    def _encode_characters(self, text: str, position: int) -> np.ndarray:
        codes = np.frombuffer(text.encode('utf-32-le'), '<u4')
        ids = self._id_of_character[np.minimum(codes, len(self._id_of_character) - 1)]
        unknown = np.flatnonzero(ids < 0)
        if len(unknown):
            at = int(unknown[0])
            known = ''.join(token.decode() for token in self.token_bytes[:80])
            raise UserError(
                f'character {text[at]!r} (U+{ord(text[at]):04X}) at position {position + at}: '
                f'not among the {self.vocab_size - len(self.special)} characters of this '
                f'vocabulary: {known!r}{" and more" if self.vocab_size > 80 else ""}'
            )
        return ids

    @functools.cached_property
    def _id_of_character(self) -> np.ndarray:
        """Character code -> id, -1 where there is none; the last entry is for all codes beyond."""
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
        """The tokens that merging gives, and in which order: neither special nor added."""
        others = {*self.special.values()} | {t.id for t in self.added or () if not t.merged}
        tokens = enumerate(self.token_bytes)
        return {token: i for i, token in tokens if token is not None and i not in others}

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """The ids that end what a model writes: of the text, and of the assistant's turn."""
        turn = self.mark_id((self.chat_template or {}).get(ASSISTANT, ['', ''])[1])
        ids = [self.eot] if self.end_ids is None else self.end_ids
        return frozenset(i for i in (*ids, turn) if i is not None)

    @property
    def ends_in_order(self) -> list[int]:
        """The same, the end of text first."""
        return sorted(self.ends, key=lambda i: (i != self.eot, i))

    @property
    def eot_text(self) -> str | None:
        """How the end of text is written."""
        return None if self.eot is None else self.token_bytes[self.eot].decode(errors='replace')

    @functools.cached_property
    def samplable(self) -> np.ndarray:
        """Whether a model may write an id (vocab_size,): text and what ends it, no other."""
        text = np.array([token is not None for token in self.token_bytes])
        text[list(self.special.values())] = False
        text[list(self.ends)] = True
        return text

    def render(self, messages: Iterable[dict]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a conversation, {'role', 'content'} each, and what of them is the assistant's.

        That is a mask, True for the words of the assistant and for the mark that ends its turn.
        What a message says is text, also where it spells a special token. UserError for a role that
        the template lacks.
        """
        ids, mask = [np.zeros(0, self.dtype)], [np.zeros(0, bool)]
        for number, message in enumerate(messages):
            if message['role'] not in self.chat_template:
                roles = ', '.join(self.chat_template)
                raise UserError(
                    f'messages[{number}]: no role {message["role"]!r}; there are {roles}'
                )
            before, after = map(self.encode_mark, self.chat_template[message['role']])
            said = np.concatenate([self.encode(message['content']), after])
            ids += [before, said]
            mask += [np.zeros(len(before), bool), np.full(len(said), message['role'] == ASSISTANT)]
        return np.concatenate(ids).astype(self.dtype), np.concatenate(mask)

    def encode_chat(self, messages: Iterable[dict]) -> np.ndarray:
        """The ids of a conversation, as render() has them, up to where the assistant answers."""
        answer = self.encode_mark(self.chat_template[ASSISTANT][0])
        return np.concatenate([self.render(messages)[0], answer]).astype(self.dtype)

    def encode_mark(self, mark: str) -> np.ndarray:
        """The ids of what the template puts around a message."""
        token = self.mark_id(mark)
        return self.encode(mark) if token is None else np.array([token])

    def mark_id(self, mark: str) -> int | None:
        """The id of a mark that is a special token; <|endoftext|> is the end, whatever its name."""
        return self.special.get(mark, self.eot if mark == EOT else None)

    def accelerate(self) -> str:
        """From now on encode by gigatoken, 20 times as fast -> '', or why that cannot be done.

        It must give the same ids as tiktoken for text made to be difficult.
        """
        if self.accelerated:
            return ''
        if self.name not in GIGATOKEN_SCHEMES:
            return f'gigatoken does not know {self.name}'
        try:
            from gigatoken.gigatoken_rs import BPETokenizer
        except ImportError:
            return 'gigatoken, many times as fast, is not installed: pip install gigatoken'
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'ranks.tiktoken'
            self.write_ranks(path)
            try:
                fast = BPETokenizer.from_tiktoken(path, GIGATOKEN_SCHEMES[self.name])
                text = difficult_text()
                same = np.array_equal(fast.encode(text), self._encode(text))
            except Exception as error:  # of another version, whatever it is
                return f'gigatoken cannot be used: {error}'
        if not same:
            return 'this version of gigatoken gives other ids'
        self._gigatoken = fast
        return ''

    def write_ranks(self, path: str | Path) -> None:
        """The vocabulary as a .tiktoken file: a line for each token that text produces."""
        lines = [base64.b64encode(token) + b' %d\n' % i for token, i in self.ranks.items()]
        Path(path).write_bytes(b''.join(lines))

    @property
    def accelerated(self) -> bool:
        return self._gigatoken is not None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return b''.join(self.token_bytes[i] or b'' for i in ids).decode('utf-8', errors='replace')

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for; 0 for the end of text and other special ids."""
        lengths = np.array([len(token or b'') for token in self.token_bytes], np.int64)
        lengths[list(self.special.values())] = 0
        return lengths

    def __eq__(self, other) -> bool:
        """Whether both encode alike. The pattern is left out: tiktoken rewrites it to be faster."""
        if not isinstance(other, Tokenizer):
            return NotImplemented
        alike = self.token_bytes == other.token_bytes and self.special == other.special
        return alike and self.words == other.words

    @property
    def words(self) -> set[AddedToken]:
        """The added tokens that are none of the special ones."""
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
                raise ValueError(f'kind {kind!r}')
            if not all(0 <= i < len(tokens) for i in special.values()):
                raise ValueError(f'special ids past {len(tokens)} tokens')
            chat = fields.get('chat_template') or None
            if any(
                not isinstance(marks, list) or list(map(type, marks)) != [str, str]
                for marks in (chat or {}).values()
            ):
                raise ValueError('chat_template: a role has no two texts')
            if chat and ASSISTANT not in chat:
                raise ValueError('chat_template: has no assistant')
            added, ends = fields.get('added_tokens'), fields.get('end_ids')
            added = None if added is None else [AddedToken(**token) for token in added]
            ids = [*(ends or ()), *(token.id for token in added or ())]
            if not all(type(i) is int and 0 <= i < len(tokens) for i in ids):
                raise ValueError(f'added tokens or ends past {len(tokens)} tokens')
            if not all(isinstance(token.text, str) and token.text for token in added or ()):
                raise ValueError('an added token without a text')
            return cls(kind, name, tokens, special, pattern, chat, added, ends)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f'not a tokenizer of flatGPT: {error!r}') from error

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        with new_file(path) as part:
            part.write_text(json.dumps(self.to_dict()), encoding='utf-8')


def has_long_run(text: str) -> bool:
    """Whether more than LONG bytes follow each other that are all blank, or all not."""
    if len(text) <= LONG:
        return False
    blank = np.isin(np.frombuffer(text.encode(), np.uint8), tuple(b' \t\n\v\f\r'))
    borders = np.flatnonzero(np.diff(blank, prepend=~blank[0], append=~blank[-1]))
    return bool(np.diff(borders).max() > LONG)


def matches(
    pattern: re.Pattern, tokens: dict[str, AddedToken], text: str, special: bool
) -> Iterator[tuple[int, int, int]]:
    """(start, end, id) of the added tokens in a text, by the rules of `tokenizers`."""
    last = 0
    for match in pattern.finditer(text):
        token, (start, end) = tokens[match[0]], match.span()
        beside = text[max(0, start - 1) : start] + text[end : end + 1]
        if token.special > special or (token.single_word and any(map(is_word, beside))):
            continue
        while token.lstrip and start > last and text[start - 1] in WHITE_SPACE:
            start -= 1
        while token.rstrip and end < len(text) and text[end] in WHITE_SPACE:
            end += 1
        yield start, end, token.id
        last = end


def is_word(character: str) -> bool:
    r"""Whether a character is \w for Unicode (UTS 18, annex C), which Python sees otherwise."""
    kind = unicodedata.category(character)
    if kind[0] in 'LM' or kind in ('Nd', 'Nl', 'Pc') or character in '\u200c\u200d':
        return True
    in_circles = ((0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189))
    return any(first <= ord(character) <= last for first, last in in_circles)


def load(path: str | Path) -> Tokenizer:
    try:
        return Tokenizer.from_dict(json.loads(Path(path).read_text(encoding='utf-8')))
    except FileNotFoundError:
        raise UserError(f'{path}: no such tokenizer file') from None
    except (OSError, ValueError, UserError) as error:
        raise UserError(f'{path}: cannot be read as a tokenizer: {error}') from error


def char_tokenizer(characters: Iterable[str], eot: bool = False) -> Tokenizer:
    """One id for each of `characters`, in their order; with `eot` one more for the end of text."""
    tokens = [character.encode() for character in characters]
    special = {EOT: len(tokens)} if eot else {}
    return Tokenizer('char', 'char', tokens + [EOT.encode()] * eot, special)


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes of UTF-8 text, and 256 for the end of text: any text, nothing to train."""
    return Tokenizer('byte', 'byte', [bytes([b]) for b in range(256)] + [EOT.encode()], {EOT: 256})


def tiktoken_tokenizer(name: str) -> Tokenizer:
    """A tiktoken encoding by its name; the first use on a machine fetches its vocabulary."""
    encoding = load_encoding(name)
    tokens: list[bytes | None] = [None] * encoding.n_vocab
    for token, i in encoding._mergeable_ranks.items():
        tokens[i] = token
    for text, i in encoding._special_tokens.items():
        tokens[i] = text.encode()
    return Tokenizer('tiktoken', name, tokens, dict(encoding._special_tokens), encoding._pat_str)


def load_encoding(name: str):
    """tiktoken.get_encoding, except that without a network it says what to do, and at once."""
    import requests
    import tiktoken
    import tiktoken.load

    read_local = tiktoken.load.read_file

    def read_file(url: str) -> bytes:
        if not url.startswith('http'):
            return read_local(url)
        try:
            reply = requests.get(url, timeout=20)  # tiktoken itself would wait for ever
            reply.raise_for_status()
            return reply.content
        except requests.RequestException as error:
            folder = os.environ.get('TIKTOKEN_CACHE_DIR') or os.environ.get('DATA_GYM_CACHE_DIR')
            path = Path(folder or Path(tempfile.gettempdir()) / 'data-gym-cache')
            path /= hashlib.sha1(url.encode()).hexdigest()  # tiktoken's rule
            raise UserError(
                f'tokenizer {name}: {url} is neither cached here nor can it be fetched '
                f'({type(error).__name__}); save it as {path}, or set TIKTOKEN_CACHE_DIR to a '
                'folder in which tiktoken cached it'
            ) from error

    tiktoken.load.read_file = read_file
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise UserError(f'tokenizer {name}: {" ".join(str(error).split())}') from error
    finally:
        tiktoken.load.read_file = read_local


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """
    Byte-pair encoding learned from `texts`: the 256 bytes, then merges from frequent to rare, then
    the end of text. Shorter than vocab_size when the texts have fewer pairs to merge.
    """
    if vocab_size < 258:
        raise UserError(f'vocab_size {vocab_size}: 256 bytes, a merge and the end of text are 258')
    import tokenizers

    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), 'isolated')
    to_letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_letters])
    alphabet = byte_letters()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=list(alphabet), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    vocabulary = bpe.get_vocab()
    merged = [token for token in sorted(vocabulary, key=vocabulary.get) if len(token) > 1]
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes(alphabet[letter] for letter in token) for token in merged]
    return Tokenizer('bpe', 'bpe', tokens + [EOT.encode()], {EOT: len(tokens)}, WORDS)


def byte_letters() -> dict[str, int]:
    """The printable letter by which byte-level BPE writes each byte (GPT-2, `bytes_to_unicode`)."""
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
        raise UserError(f'tokenizer {name}: is made from text, by data/text/prepare.py')
    names = tokenizer_names()
    if name not in names:
        hint = did_you_mean(name, names)
        raise UserError(
            f'tokenizer {name}: {hint}there are {", ".join(names)}, and that '
            'of a run, a tokenizer.json or a meta.pkl by its path'
        )
    return tiktoken_tokenizer(name)


class _NoObjects(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        raise UserError(f'it asks for {module}.{name}, which could run code')


def from_nanogpt_meta(path: str | Path) -> Tokenizer:
    """The characters in nanoGPT's meta.pkl. Only plain builtins are unpickled, so nothing runs."""
    try:
        with open(path, 'rb') as file:
            characters = _NoObjects(file).load()['itos']
        characters = [characters[i] for i in range(len(characters))]
        if any(len(character) != 1 for character in characters):
            raise UserError('its tokens are not single characters')
        return char_tokenizer(characters)
    except Exception as error:  # a broken pickle can raise nearly anything
        raise UserError(f'{path}: not the meta.pkl of a character dataset: {error}') from error
