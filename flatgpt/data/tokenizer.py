"""
Tokenizers: characters, bytes, any tiktoken encoding, and an own byte-pair encoding, all one class.

    tokenizer = get_tokenizer('gpt2')       # or 'byte', 'cl100k_base', ...
    tokenizer.decode(tokenizer.encode('To be, or not'))
    tokenizer.save('tokenizer.json')        # self-contained: load() never needs the network
"""

import base64
import functools
import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from flatgpt.errors import UserError, did_you_mean
from flatgpt.files import new_file

EOT = '<|endoftext|>'
ASSISTANT = 'assistant'
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


class Tokenizer:
    """
    kind: 'char', 'byte', 'tiktoken' or 'bpe'.     name: what it is called on a command line.
    token_bytes: text bytes of every id 0..vocab_size-1, None for an id that stands for nothing.
    special: the ids that no text produces by itself, by their written form.
    pattern: the regular expression that splits text before merging (tiktoken and bpe).
    chat_template: what comes before and after a message of each role, None for a model that only
        continues text. A special token, or the end of text, is meant where it stands alone.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        token_bytes: list,
        special: dict,
        pattern: str = '',
        chat_template: dict[str, list[str]] | None = None,
    ):
        self.kind, self.name, self.pattern = kind, name, pattern
        self.chat_template = chat_template
        self.token_bytes: list[bytes | None] = token_bytes
        self.special: dict[str, int] = special
        self.vocab_size = len(token_bytes)
        self.eot: int | None = special.get(EOT)
        self.dtype = np.dtype('<u2' if self.vocab_size <= 2**16 else '<u4')
        self._gigatoken = None

    def encode(self, text: str, allow_eot: bool = False) -> np.ndarray:
        """
        The ids of `text`. With allow_eot a written <|endoftext|> becomes the end-of-text id;
        otherwise it is text like any other. A character that a char tokenizer lacks: UserError.
        """
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, from a shell or a JSON escape
            text = text.encode(errors='replace').decode()
        if not allow_eot or self.eot is None or EOT not in text:
            return self._encode(text).astype(self.dtype)
        ids, position = [], 0
        for part in text.split(EOT):
            ids += [self._encode(part, position), [self.eot]]
            position += len(part) + len(EOT)
        return np.concatenate(ids[:-1]).astype(self.dtype)

    def _encode(self, text: str, position: int = 0) -> np.ndarray:
        if self.kind == 'byte':
            return np.frombuffer(text.encode(), np.uint8)
        if self.kind == 'char':
            return self._encode_characters(text, position)
        if self._gigatoken is not None:
            return self._gigatoken.encode(text)
        return self._encoding.encode_to_numpy(text, disallowed_special=())

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
        table = np.full(max(codes, default=0) + 2, -1, np.int64)
        table[codes] = np.arange(len(codes))
        return table

    @functools.cached_property
    def _encoding(self):
        import tiktoken

        special = set(self.special.values())
        tokens = enumerate(self.token_bytes)
        ranks = {token: i for i, token in tokens if token is not None and i not in special}
        return tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.special
        )

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """The ids that end what a model writes: of the text, and of the assistant's turn."""
        turn = self.special.get((self.chat_template or {}).get(ASSISTANT, ['', ''])[1])
        return frozenset(i for i in (self.eot, turn) if i is not None)

    @functools.cached_property
    def writable(self) -> np.ndarray:
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
        return np.array([self.special[mark]]) if mark in self.special else self.encode(mark)

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
        special = set(self.special.values())
        tokens = [(i, token) for i, token in enumerate(self.token_bytes) if i not in special]
        lines = [base64.b64encode(token) + b' %d\n' % i for i, token in tokens if token is not None]
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
        return self.token_bytes == other.token_bytes and self.special == other.special

    def __repr__(self) -> str:
        return f'<Tokenizer {self.name}, {self.vocab_size} ids>'

    def to_dict(self) -> dict:
        tokens = [None if t is None else base64.b64encode(t).decode() for t in self.token_bytes]
        fields = {'kind': self.kind, 'name': self.name, 'pattern': self.pattern}
        if self.chat_template:
            fields['chat_template'] = self.chat_template
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
            return cls(kind, name, tokens, special, pattern, chat)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f'not a tokenizer of flatGPT: {error!r}') from error

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        with new_file(path) as part:
            part.write_text(json.dumps(self.to_dict()), encoding='utf-8')


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


def get_tokenizer(name: str) -> Tokenizer:
    """A tokenizer that needs no training, by its name."""
    if name == 'byte':
        return byte_tokenizer()
    if name in ('char', 'bpe'):
        raise UserError(f'tokenizer {name}: is made from text, by data/text/prepare.py')
    import tiktoken

    names = tiktoken.list_encoding_names()
    if name not in names:
        hint = did_you_mean(name, ['byte', 'char', 'bpe', *names])
        raise UserError(f'tokenizer {name}: {hint}there are byte, char, bpe, {", ".join(names)}')
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
