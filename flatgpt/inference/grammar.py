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
from flatgpt.data.tools import BEGIN, END, HEAD
from flatgpt.errors import UserError
from flatgpt.runtime import to_device

KINDS = {
    **{'json_schema': 'schema', 'regex': 'regex', 'choice': 'choices', 'grammar': 'grammar'},
    'tools': 'tools',
}
# Between the parts of JSON: a space, or a new line and its indentation. Without a limit, a small
# model may write nothing but whitespace.
WHITESPACE = r'( |\n[ \t]{0,32})'
# Of one completion. The library's own limit on states allows half a gigabyte.
LIMITS = {'max_lexer_states': 25_000, 'verbose_errors': False}
MAX_SOURCE = 2**16  # characters of a grammar: the time to compile a regex is quadratic, up to 2 s
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
        syntax of Rust's regex), 'choice' (a list of strings), 'grammar' (Lark or GBNF), or 'tools'
        (the arguments of tool_grammar()).
        """
        given = source if isinstance(source, str) else json.dumps(source, ensure_ascii=False)
        if len(given) > MAX_SOURCE:
            raise UserError(
                f'the {KINDS[kind]} has {len(given):,} characters; the limit is {MAX_SOURCE:,}'
            )
        try:
            text = self.translate(kind, given)
        except Exception as error:  # the library's converters raise plain Exceptions
            raise UserError(f'{short(error)}; correct the {KINDS[kind]}') from None
        matcher = self.library.LLMatcher(self.tokenizer, text, log_level=0, limits=self.limits)
        if matcher.is_error():
            raise UserError(f'{short(matcher.get_error())}; change the {KINDS[kind]}')
        grammar = Grammar(matcher, text, self.writable, KINDS[kind])
        if problem := grammar.start().first_problem():
            raise UserError(problem)
        return grammar

    def translate(self, kind: str, source: str) -> str:
        """A source (choices and schemas as JSON) in the library's form, or any exception."""
        matcher, translate = self.library.LLMatcher, self.library.grammar_from
        if kind == 'json_schema':
            options = {'whitespace_pattern': WHITESPACE, 'lenient': False, 'coerce_one_of': False}
            return matcher.grammar_from_json_schema(source, overrides=options)
        if kind == 'choice':
            choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(source))
            return matcher.grammar_from_lark(f'start: {" | ".join(choices)}')
        if kind == 'tools':
            return matcher.grammar_from_lark(tool_grammar(**json.loads(source)))
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


def tool_grammar(functions: list, several: bool, text: bool) -> str:
    """The calls of functions in the form of data/tools.py, in Lark.

    functions: (name, JSON schema of its arguments, or None) each. several: of calls. text: whether
    there may be text before calls, after them, and instead of them.
    """
    bodies = []
    for name, schema in functions:
        # as json.dumps() writes it
        options = {'whitespace_flexible': False, 'item_separator': ', ', 'key_separator': ': '}
        schema = {'type': 'object', **(schema or {}), 'x-guidance': options}
        head = json.dumps(HEAD % json.dumps(name, ensure_ascii=False), ensure_ascii=False)
        bodies.append(f'{head} %json {json.dumps(schema)} {json.dumps("}" + END)}')
    begin, call = json.dumps(BEGIN), f'({" | ".join(bodies)})'
    if not text:
        return f'start: call{"+" * several}\ncall: {begin} {call}'
    start = 'call* rest' if several else 'call | rest'
    return (
        f'start: {start}\nrest: TEXT\nTEXT: /(.|\\n)*/\n'
        f'begin[lazy]: TEXT {begin}\ncall: begin {call}'
    )


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
