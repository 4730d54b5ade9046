"""
Structured output: a request with a grammar samples only tokens that continue a text of it.

    grammars = Grammars(tokenizer)                       # needs the package llguidance
    grammar = grammars.compile('json_schema', {'type': 'object'})       # or a UserError
    Request(prompt, sampling, print, grammar=grammar)

llguidance (Moskal et al. 2025) compiles a grammar and computes the mask of each next token.
"""

import json
import math
import threading

import numpy as np
import torch

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError
from flatgpt.runtime import to_device

KINDS = {'json_schema': 'schema', 'regex': 'regex', 'choice': 'choices', 'grammar': 'grammar'}
# Between the parts of JSON: a space, or a new line and its indentation. Without a limit, a small
# model may write nothing but whitespace.
WHITESPACE = r'( |\n[ \t]{0,32})'
# Of one completion. The library's own limit on states allows half a gigabyte.
LIMITS = {'max_lexer_states': 25_000, 'verbose_errors': False}
DEAD_END = 'no token of this vocabulary continues the text as {} requires; use another model'


class TokenTable:
    """A tokenizer as llguidance reads it.

    One more id than the tokenizer has stands for what it cannot encode. It is never sampled, so
    that a text that needs it ends in an error.
    """

    is_tokenizer_wrapper, bos_token_id = True, None

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.missing = tokenizer, tokenizer.vocab_size
        self.tokens = [*(token or b'' for token in tokenizer.token_bytes), b'']
        special = {*tokenizer.special.values(), *tokenizer.stop_ids, self.missing}
        self.special_token_ids, self.eos_token_id = sorted(special), self.missing

    def __call__(self, text: str) -> list[int]:
        """The ids of a text that the grammar leaves no choice about."""
        try:
            return self.tokenizer.encode(text).tolist()
        except UserError:  # a character outside of the vocabulary
            return [self.missing]


class Grammars:
    """Compiles grammars for a tokenizer. ModuleNotFoundError without llguidance."""

    def __init__(self, tokenizer: Tokenizer):
        import llguidance

        self.library, table = llguidance, TokenTable(tokenizer)
        ends = tokenizer.ordered_stop_ids or [table.missing]
        self.tokenizer = llguidance.LLTokenizer(table, eos_token=ends)
        self.limits = llguidance.LLParserLimits(**LIMITS)
        self.writable = np.packbits(tokenizer.writable, bitorder='little')

    def compile(self, kind: str, source: object) -> 'Grammar':
        """The grammar of a source, or a UserError that says what is not supported.

        kind: 'json_schema' (a dict, true or false, or any of them as JSON text), 'regex' (in the
        syntax of Rust's regex), 'choice' (a list of strings) or 'grammar' (Lark or GBNF).
        """
        try:
            text = self.translate(kind, source)
        except Exception as error:  # the library's converters raise plain Exceptions
            raise UserError(f'{short(error)}; correct the {KINDS[kind]}') from None
        matcher = self.library.LLMatcher(self.tokenizer, text, log_level=0, limits=self.limits)
        if matcher.is_error():
            raise UserError(f'{short(matcher.get_error())}; change the {KINDS[kind]}')
        grammar = Grammar(matcher, text, self.writable, KINDS[kind])
        if problem := grammar.start().first_problem():
            raise UserError(problem)
        return grammar

    def translate(self, kind: str, source: object) -> str:
        """A source in the library's own form; any exception if it has none."""
        matcher, translate = self.library.LLMatcher, self.library.grammar_from
        if kind == 'json_schema':
            options = {'whitespace_pattern': WHITESPACE, 'lenient': False, 'coerce_one_of': False}
            schema = source if isinstance(source, str) else json.dumps(source)
            return matcher.grammar_from_json_schema(schema, overrides=options)
        if kind == 'choice':
            choices = ' | '.join(json.dumps(choice, ensure_ascii=False) for choice in source)
            return matcher.grammar_from_lark(f'start: {choices}')
        return translate(kind, source)


class Grammar:
    """A compiled grammar, from which each completion starts a GrammarState."""

    def __init__(self, matcher, text: str, writable: np.ndarray, name: str):
        self.matcher, self.text, self.writable, self.name = matcher, text, writable, name
        self.lock = threading.Lock()

    def start(self) -> 'GrammarState':
        with self.lock:
            return GrammarState(self, self.matcher.deep_copy())


class GrammarState:
    """How far a completion has come in its grammar. problem: why it cannot continue, if so."""

    def __init__(self, grammar: Grammar, matcher):
        self.grammar, self.matcher, self.problem = grammar, matcher, ''

    def mask(self) -> np.ndarray:
        """The tokens that may follow, as bits (ceil(vocab_size / 8),); none after a problem."""
        writable = self.grammar.writable
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)[: len(writable)] & writable
        if self.matcher.is_error():
            self.problem = f'{short(self.matcher.get_error())}; simplify the {self.grammar.name}'
            return np.zeros_like(bits)
        if not bits.any():
            self.problem = DEAD_END.format(f'the {self.grammar.name}')
        return bits

    def first_problem(self) -> str:
        self.mask()
        return self.problem

    def accept(self, token: int) -> bool:
        """Continue with a token -> whether the text is complete and nothing can follow."""
        self.matcher.consume_token(token)
        return self.matcher.is_stopped() and not self.matcher.is_error()


def mask_logits(logits, rows: list[tuple[int, GrammarState]]) -> None:
    """Set the logits (R, V) of tokens that the grammars of rows exclude to -inf, in place."""
    bits = np.stack([state.mask() for _, state in rows])
    allowed = np.unpackbits(bits, axis=1, count=logits.size(1), bitorder='little')
    blocked = to_device(torch.from_numpy(allowed), logits.device) == 0
    chosen = [row for row, _ in rows]
    if chosen == [*range(len(logits))]:
        logits.masked_fill_(blocked, -math.inf)
    else:
        at = to_device(torch.tensor(chosen), logits.device)
        logits[at] = logits[at].masked_fill_(blocked, -math.inf)


def short(error: object) -> str:
    """What an error of the library says, in one line without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith('error: ')), (lines or [''])[0])
    return reason.removeprefix('error: ').partition('. Enable')[0][:300].rstrip('.;:')
