"""
bench.py's benchmark of structured output: what the masks of a grammar add to decoding steps.

$ python bench.py --only=grammar --rows=16 --block_size=256
"""

import itertools
import time
from statistics import median

from flatgpt.benchmarks.baselines import build_random_model, with_precision
from flatgpt.benchmarks.decoding import formats_of
from flatgpt.benchmarks.report import Report, format_spread, print_row, summarize
from flatgpt.data.tokenizer import Tokenizer, get_tokenizer
from flatgpt.errors import counted
from flatgpt.inference.engine import Engine
from flatgpt.inference.grammar import Grammar, Grammars
from flatgpt.inference.request import Request
from flatgpt.inference.sampling import SamplingParams
from flatgpt.runtime import Runtime, synchronize
from model import GPT

PERSON = {
    'type': 'object',
    'properties': {
        'name': {'type': 'string', 'minLength': 3},
        'age': {'type': 'integer', 'minimum': 0, 'maximum': 150},
        'email': {'type': 'string', 'format': 'email'},
        'tags': {'type': 'array', 'items': {'enum': ['red', 'green', 'blue']}},
    },
    'required': ['name', 'age', 'email', 'tags'],
    'additionalProperties': False,
}
PEOPLE = {'type': 'array', 'items': PERSON, 'minItems': 1000}  # longer than any completion


def bench_grammar(settings: dict, runtime: Runtime, report: Report) -> None:
    """Decoding steps with GPT-2's vocabulary, with and without a JSON schema, interleaved."""
    tokenizer = get_tokenizer('gpt2')
    grammar = Grammars(tokenizer).compile('json_schema', PEOPLE)
    shape = {**settings, 'vocab_size': max(settings['vocab_size'], tokenizer.vocab_size)}
    for kind, rows in itertools.product(formats_of(settings), settings['rows'].split(',')):
        model = with_precision(build_random_model(shape).to(runtime.device), kind)
        found: dict[bool, list[float]] = {False: [], True: []}
        for constrained in [False, True] * (settings['rounds'] + 1):
            given = grammar if constrained else None
            found[constrained].append(step_seconds(model, tokenizer, int(rows), settings, given))
        plain, masked = found[False][1:], found[True][1:]  # the first round warms up
        share = median(masked) / median(plain) - 1
        name, note = f'grammar {counted(int(rows), "row")}', f'{share:+.1%} of a step'
        print_row(name, kind, f'{format_spread(plain, ".4f")} seconds', 'a step without a grammar')
        print_row(name, kind, f'{format_spread(masked, ".4f")} seconds', f'with one: {note}')
        report.add(name, kind, note, seconds=summarize(plain), masked_seconds=summarize(masked))


def step_seconds(
    model: GPT, tokenizer: Tokenizer, rows: int, settings: dict, grammar: Grammar | None
) -> float:
    """The median time of a decoding step of `rows` completions."""
    engine = Engine(model, tokenizer, rows)
    endless = tuple((i, -100.0) for i in tokenizer.stop_ids)
    sampling = SamplingParams(settings['new_tokens'], logit_bias=endless)
    prompt = tokenizer.encode('one ' * settings['prompt_tokens'])[: settings['prompt_tokens']]
    for index in range(rows):
        engine.submit(Request(prompt, sampling, lambda output: None, index, grammar=grammar))
    seconds = []
    while engine.waiting or engine.running:
        begin = time.perf_counter()
        engine.step()
        synchronize(settings['device'])
        seconds.append(time.perf_counter() - begin)
    return median(seconds)
