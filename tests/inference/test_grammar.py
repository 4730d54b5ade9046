"""Structured output: what a request with a grammar writes, whatever its model predicts."""

import json
import math
import os
import re
import sys

import pytest
import torch
from conftest import random_model
from error_lines import error_line
from schemas import random_schema

from flatgpt.data.bpe import train_bpe
from flatgpt.data.hf_tokenizer import read_files, tokenizer_json
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer, get_tokenizer
from flatgpt.errors import UserError, reason_of
from flatgpt.inference import decode_graph, model_runner
from flatgpt.inference.engine import Engine, generate
from flatgpt.inference.grammar import Grammars, mask_logits
from flatgpt.inference.request import Request
from flatgpt.inference.sampling import SamplingParams
from flatgpt.inference.speculation import NGRAM

jsonschema = pytest.importorskip('jsonschema', reason='jsonschema is not installed')
pytest.importorskip('llguidance', reason='llguidance is not installed')
PERSON = {
    'type': 'object',
    'properties': {'name': {'type': 'string', 'maxLength': 5}, 'age': {'enum': [1, 22, 333]}},
    'required': ['name', 'age'],
    'additionalProperties': False,
}
ASCII = ''.join(map(chr, range(32, 127)))


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory):
    """A tokenizer of every kind."""
    texts = ['{"name": "one", "age": 1}, {"name": "two"}\n' * 20]
    path = tmp_path_factory.mktemp('hf') / 'tokenizer.json'
    path.write_text(json.dumps(tokenizer_json(train_bpe(texts, 300))), encoding='utf-8')
    return {
        'byte': byte_tokenizer(),
        'char': char_tokenizer(ASCII + '\n', eot=True),
        'char without an end': char_tokenizer(ASCII),
        'bpe': train_bpe(texts, 320),
        'hf': read_files(path),
    }


def write(tokenizer, kind, source, count=4, tokens=300, seed=0, model=None, **sampling):
    """What a random model writes -> (text, finish_reason) of each completion."""
    model = model or random_model(tokenizer.vocab_size + 3, 512, seed)
    grammar = Grammars(tokenizer).compile(kind, source)
    sampling = SamplingParams(tokens, seed=seed, **sampling)
    texts, reasons = [''] * count, [None] * count
    for output in generate(model, tokenizer, [[1]] * count, sampling, grammar=grammar):
        texts[output.index] += output.text
        reasons[output.index] = output.finish_reason
    return list(zip(texts, reasons, strict=True))


@pytest.mark.parametrize('kind', ['byte', 'char', 'char without an end', 'bpe', 'hf'])
def test_a_random_model_writes_json_of_a_schema_with_every_tokenizer(tokenizers, kind):
    for text, reason in write(tokenizers[kind], 'json_schema', PERSON):
        assert reason == 'stop'
        jsonschema.validate(json.loads(text), PERSON)


def test_an_engine_that_guesses_does_not_for_a_request_with_a_grammar(tokenizers):
    tokenizer = tokenizers['byte']
    model = random_model(tokenizer.vocab_size, 512)
    grammar = Grammars(tokenizer).compile('regex', '(again and again, ){20}')
    completions = []
    for draft in (None, NGRAM):
        outputs = generate(model, tokenizer, [[1]] * 3, SamplingParams(400), None, grammar, draft)
        completions.append([(output.index, output.token) for output in outputs])
    assert completions[0] == completions[1]
    assert len(completions[0]) == 3 * len('again and again, ') * 20


@pytest.mark.skipif('TIKTOKEN_CACHE_DIR' not in os.environ, reason='needs the GPT-2 vocabulary')
def test_a_random_model_writes_json_with_the_tokenizer_of_gpt2():
    tokenizer = get_tokenizer('gpt2')
    for text, reason in write(tokenizer, 'json_schema', PERSON):
        assert reason == 'stop'
        jsonschema.validate(json.loads(text), PERSON)
    # the texts that a schema leaves no choice about are written in the tokens of the tokenizer
    model, grammar = random_model(50257), Grammars(tokenizer).compile('choice', ['Hello world'])
    outputs = generate(model, tokenizer, [[1]], SamplingParams(9), grammar=grammar)
    assert [o.token for o in outputs] == tokenizer.encode('Hello world').tolist()


def test_varied_schemas_give_valid_json_or_are_cut_off_by_the_length():
    tokenizer, model, written, refused = byte_tokenizer(), random_model(257, 512), {}, 0
    grammars, engine = Grammars(tokenizer), Engine(model, tokenizer, 16)
    schemas = [random_schema(seed) for seed in range(60)]

    def submit(number, grammar):
        written[number] = texts = []
        request = Request([1], SamplingParams(150), texts.append, number, grammar=grammar)
        engine.submit(request)

    for number, schema in enumerate(schemas):
        try:
            submit(number, grammars.compile('json_schema', schema))
        except UserError:  # a keyword that cannot be expressed
            refused += 1
    while engine.step():
        pass
    reasons = [outputs[-1].finish_reason for outputs in written.values()]
    assert refused < 15
    assert reasons.count('stop') > 40
    assert {*reasons} <= {'stop', 'length'}
    for number, outputs in written.items():
        if outputs[-1].finish_reason == 'stop':
            text = ''.join(output.text for output in outputs)
            jsonschema.Draft202012Validator(schemas[number]).validate(json.loads(text))


@pytest.mark.parametrize(
    ('kind', 'source', 'texts'),
    [
        ('choice', ['yes', 'no', '"né\U0001f600"\n'], {'yes', 'no', '"né\U0001f600"\n'}),
        ('regex', '(ab|c)d', {'abd', 'cd'}),
        ('regex', '', {''}),
        ('grammar', 'start: "x" ("1" | "2")', {'x1', 'x2'}),
        ('grammar', 'root ::= "y" [34]', {'y3', 'y4'}),
        ('json_schema', '{"const": "a"}', {'"a"'}),
    ],
)
def test_every_kind_of_grammar_is_followed(kind, source, texts):
    written = write(byte_tokenizer(), kind, source, count=20, tokens=40)
    assert {reason for _, reason in written} == {'stop'}
    found = {text for text, _ in written}
    assert found <= texts
    assert len(found) > 1 or len(texts) == 1


def test_whitespace_is_limited_so_that_a_model_does_not_write_only_that():
    bias = tuple((ord(space), 100.0) for space in ' \n\t')
    for text, reason in write(byte_tokenizer(), 'json_schema', PERSON, logit_bias=bias):
        assert reason == 'stop'
        assert json.loads(text)


def test_a_completion_that_is_cut_off_says_so():
    ((text, reason),) = write(byte_tokenizer(), 'json_schema', PERSON, count=1, tokens=3)
    assert reason == 'length'
    assert len(text) <= 3


def test_penalties_and_filters_do_not_bring_back_an_excluded_token():
    rules = {'top_k': 3, 'repetition_penalty': 3.0, 'logit_bias': ((ord('q'), 90.0),)}
    for text, reason in write(byte_tokenizer(), 'json_schema', PERSON, temperature=2.0, **rules):
        assert reason == 'stop'
        jsonschema.validate(json.loads(text), PERSON)


def test_a_greedy_completion_takes_the_most_likely_token_that_is_allowed():
    tokenizer, model = byte_tokenizer(), random_model(257)
    logits = model(torch.tensor([[1]]))[0][0, -1]
    best = max('bd', key=lambda letter: logits[ord(letter)].item())
    assert write(tokenizer, 'choice', ['b', 'd'], 1, model=model, temperature=0) == [(best, 'stop')]


def test_rows_without_a_grammar_keep_their_logits():
    grammar = Grammars(byte_tokenizer()).compile('choice', ['a', 'b'])
    logits, state = torch.randn(3, 260), grammar.start()
    before = logits.clone()
    mask_logits(logits, [(1, state)])
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    assert logits[1].isfinite().nonzero()[:, 0].tolist() == [ord('a'), ord('b')]


@pytest.mark.parametrize('graphs', [False, True])
def test_a_completion_does_not_depend_on_the_requests_beside_it(monkeypatch, graphs):
    tokenizer, model = byte_tokenizer(), random_model(257, 64)
    grammar = Grammars(tokenizer).compile('json_schema', PERSON)
    if graphs:
        monkeypatch.setattr(model_runner, 'can_capture', lambda tensor: True)
        monkeypatch.setattr(
            decode_graph, 'capture', lambda compute, device, pool: (compute, compute())
        )

    def run(others):
        engine, texts = Engine(model, tokenizer, 4, deterministic=True), []
        for number in range(others):
            params = SamplingParams(40, logit_bias=((256, -math.inf),))
            engine.submit(Request([number + 2], params, lambda output: None, number))
        request = Request([1], SamplingParams(60), texts.append, 9, top_logprobs=1, grammar=grammar)
        engine.submit(request)
        while engine.step():
            pass
        return texts

    assert run(0) == run(3)


@pytest.mark.parametrize(
    ('kind', 'source', 'says'),
    [
        ('json_schema', {'type': 'array', 'uniqueItems': True}, 'uniqueItems'),
        ('json_schema', {'properties': {'a': {'not': {}}}}, '"not"'),
        ('json_schema', {'type': 'text'}, 'Invalid type: text'),
        ('json_schema', {'$ref': '#/other'}, '/other'),
        ('json_schema', {'oneOf': [{'type': 'integer'}, {'minimum': 3}]}, 'oneOf'),
        ('json_schema', {'oneOf': [{}, {}], 'x-guidance': {'lenient': True}}, 'oneOf'),
        ('regex', 'a(', 'unclosed group'),
        ('regex', '(?=a)b', 'look-ahead'),
    ],
)
@error_line('{}; change the {}')
def test_what_cannot_be_expressed_is_one_line_with_its_name(kind, source, says):
    with pytest.raises(UserError) as error:
        Grammars(byte_tokenizer()).compile(kind, source)
    assert says in str(error.value)
    assert '\n' not in str(error.value)
    assert write(byte_tokenizer(), kind, {} if kind == 'json_schema' else 'ab', 1, 300)


@error_line('{}; correct the {}')
@pytest.mark.parametrize(
    ('kind', 'bad', 'good'),
    [
        ('json_schema', '{"type": ', '{"type": "null"}'),
        ('grammar', 'root ::= other', 'root ::= other\nother ::= "a"'),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(kind, bad, good):
    with pytest.raises(UserError, match=r'; correct the (schema|grammar)$'):
        Grammars(byte_tokenizer()).compile(kind, bad)
    assert write(byte_tokenizer(), kind, good, 1)[0][1] == 'stop'


@error_line('characters; the limit is')
def test_a_source_has_a_limit_which_the_line_says():
    grammars = Grammars(byte_tokenizer())
    with pytest.raises(UserError) as error:
        grammars.compile('choice', ['a' * 300_000])
    limit = int(re.search(r'the limit is ([\d,]+)', str(error.value))[1].replace(',', ''))
    assert grammars.compile('choice', ['a' * (limit - 4)])


def test_a_vocabulary_that_cannot_begin_a_text_is_refused_at_once():
    with pytest.raises(UserError, match=r'no token of this vocabulary .* schema requires'):
        Grammars(char_tokenizer('abc', eot=True)).compile('json_schema', {'type': 'object'})


def test_a_vocabulary_that_cannot_continue_a_text_ends_it_with_an_error():
    tokenizer = char_tokenizer('abx', eot=True)
    with pytest.raises(UserError, match='no token of this vocabulary'):
        write(tokenizer, 'regex', '(a|b)}')
    assert write(tokenizer, 'regex', '(a|b)x', 1)[0][0] in ('ax', 'bx')


@error_line('this needs the package')
def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'llguidance', None)
    with pytest.raises(ModuleNotFoundError) as error:
        Grammars(byte_tokenizer())
    assert 'pip install llguidance' in reason_of(error.value)
