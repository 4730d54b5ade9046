"""
Trains byte-pair encoding (BPE) on a lot of text.

    tokenizer = learn_bpe(texts, vocab_size=8192)   # Ctrl-C works, and long words are no slower
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait

import regex

from flatgpt.data.tokenizer import EOT, Tokenizer, byte_alphabet
from flatgpt.errors import UserError, counted

# How this BPE splits text before merging: words with their contractions, numbers of up to three
# digits, other signs; each with the space before it.
BPE_PATTERN = (
    r" ?[\p{L}\p{M}]+(?:'\p{L}{1,2}(?!\p{L}))?"
    r'| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+'
)
# Training time grows with the square of a word's length, so longer words are split into pieces.
LONGEST_WORD = 256
LONG_WORD = regex.compile(
    '|'.join(
        rf'{kind}{{{LONGEST_WORD + 1},}}+'
        for kind in (r'[\p{L}\p{M}]', r'[^\s\p{L}\p{M}\p{N}]', r'\s')
    )
)
MAX_PIECES = 2**14  # of all long words together


def learn_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """train_bpe(), but Ctrl-C interrupts it, and long words do not slow it down."""
    stop = threading.Event()
    words = SplitLongWords(itertools.takewhile(lambda _: not stop.is_set(), texts))
    tokenizer = run_interruptibly(stop, train_bpe, words, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        print(
            f'bpe: {tokenizer.vocab_size:,} tokens instead of {vocab_size:,}: the text has no more '
            'pairs to merge'
        )
    if words.split:
        print(
            f'bpe: split {counted(words.split, "run")} of more than {LONGEST_WORD} letters, '
            f'signs or spaces into {counted(words.pieces, "piece")}'
            + (f'; ignored {counted(words.ignored, "more piece")}' if words.ignored else '')
        )
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """
    BPE trained on `texts`. Its ids: the 256 bytes, then merges from frequent to rare, then the end
    of text. Fewer than vocab_size if the texts have fewer pairs to merge.
    """
    if vocab_size < 258:
        raise UserError(
            f'--vocab_size={vocab_size}: must be at least 258: 256 bytes, a merge, the end of text'
        )
    import tokenizers

    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(BPE_PATTERN), 'isolated')
    to_alphabet = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_alphabet])
    alphabet = byte_alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=list(alphabet), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    vocabulary = bpe.get_vocab()
    merged = [token for token in sorted(vocabulary, key=vocabulary.get) if len(token) > 1]
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes(alphabet[letter] for letter in token) for token in merged]
    return Tokenizer('bpe', 'bpe', tokens + [EOT.encode()], {EOT: len(tokens)}, BPE_PATTERN)


class SplitLongWords:
    """The texts, with long words split into pieces."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.split = 0  # words
        self.pieces = 0  # of them
        self.ignored = 0  # pieces beyond MAX_PIECES

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            end = 0
            for word in LONG_WORD.finditer(text):
                yield text[end : word.start()]
                yield from self._pieces(word[0])
                end = word.end()
            if end < len(text):
                yield text[end:]

    def _pieces(self, word: str) -> Iterator[str]:
        self.split += 1
        for start in range(0, len(word), LONGEST_WORD):
            if self.pieces < MAX_PIECES:
                self.pieces += 1
                yield word[start : start + LONGEST_WORD]
            else:
                self.ignored += 1


def run_interruptibly(stop: threading.Event, function: Callable, *args):
    """function(*args) of a library that ignores Ctrl-C; here Ctrl-C raises KeyboardInterrupt.

    stop: is set on Ctrl-C, to end the input of `function`.
    """
    done = Future()

    def work() -> None:
        try:
            done.set_result(function(*args))
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while not wait([done], 0.2).done:
            pass
    except KeyboardInterrupt:
        stop.set()
        thread.join(0.5)  # a thread that calls Python while the interpreter exits aborts it
        raise
    return done.result()
