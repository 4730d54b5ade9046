"""
Byte-pair encoding (BPE) learned from a lot of text.

    tokenizer = learn_bpe(texts, vocab_size=8192)   # Ctrl-C works, and long words are no slower
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait

import regex

from flatgpt.data.tokenizer import Tokenizer, train_bpe

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
    """train_bpe() that Ctrl-C can interrupt, and that long words do not slow down."""
    stop = threading.Event()
    words = SplitLongWords(itertools.takewhile(lambda _: not stop.is_set(), texts))
    tokenizer = run_interruptibly(stop, train_bpe, words, vocab_size)
    if words.split:
        print(
            f'bpe: split {words.split:,} runs of more than {LONGEST_WORD} letters, signs or spaces '
            f'into {words.pieces:,} pieces'
            + (f'; ignored {words.ignored:,} more pieces' if words.ignored else '')
        )
    return tokenizer


class SplitLongWords:
    """Texts in which long words are split into pieces, and counts of both."""

    def __init__(self, texts: Iterable[str]):
        self.texts, self.split, self.pieces, self.ignored = texts, 0, 0, 0

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
