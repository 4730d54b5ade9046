"""Speculation: the same texts in fewer forward passes."""

import math
import random
from itertools import pairwise

import pytest
import torch
from conftest import finish, random_model

from flatgpt.data.tokenizer import char_tokenizer
from flatgpt.inference import model_runner
from flatgpt.inference.engine import Engine
from flatgpt.inference.request import Request
from flatgpt.inference.sampling import SamplingParams
from flatgpt.inference.speculation import MAX_PASS_TOKENS, NGRAM, NGramDraft, NGrams, Pace
from model import GPT

LETTERS = '\n abcdefgh'
TOKENIZER = char_tokenizer(LETTERS, eot=True)
PATTERN = [1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 1] * 3


class Passes(list):
    """The number of tokens in each forward pass of an engine."""

    def __init__(self, engine):
        self.forward, engine.runner.forward = engine.runner.forward, self.count
        self.with_guesses = []

    def count(self, idx, **options):
        self.append(idx.numel())
        if options.get('all_positions'):
            self.with_guesses.append(idx.numel())
        return self.forward(idx, **options)


class Certain(NGramDraft):
    """Guesses `right` tokens of a known continuation, and then a wrong one."""

    def __init__(self, prompt, text, right):
        super().__init__()
        self.prompt, self.text, self.right, self.results = prompt, text, right, []

    def guess_one(self, request, most):
        done = len(request.output_ids)
        following = self.text[done : done + self.right + 1]
        if len(following) > self.right:
            following[-1] = (following[-1] + 1) % 10
        return following[:most]

    def record(self, request, guessed, right):
        self.results.append((guessed, right))


def engine_with(model, draft, slots):
    """An engine; draft: as in Engine, or an object that guesses."""
    known = draft is None or draft == NGRAM or isinstance(draft, GPT)
    engine = Engine(model, TOKENIZER, slots, draft=draft if known else None)
    engine.draft = engine.draft if known else draft
    return engine


def complete(model, prompts, sampling, draft=None, slots=4, **options):
    """The outputs of each prompt, and the tokens of each pass."""
    engine, outputs = engine_with(model, draft, slots), []
    passes = Passes(engine)
    settings = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
    requests = zip(prompts, settings, strict=True)
    finish(
        engine, *(Request(p, s, outputs.append, i, **options) for i, (p, s) in enumerate(requests))
    )
    return [[each for each in outputs if each.index == i] for i in range(len(prompts))], passes


def ids_of(outputs):
    return [output.token for output in outputs]


@pytest.mark.parametrize('seed', range(30))
def test_texts_are_those_without_guesses(seed):
    draw = random.Random(seed)
    arch = draw.choice([{}, {'arch': 'modern', 'n_kv_head': 1}])
    model = random_model(len(LETTERS) + 1, draw.choice([16, 48, 200]), seed, **arch)
    rows = draw.choice([1, 1, 3, 9])
    prompts = [[draw.randrange(10) for _ in range(draw.choice([1, 5, 40]))] for _ in range(rows)]
    settings = [
        SamplingParams(
            draw.choice([1, 30, 80]),
            temperature=draw.choice([0, 0.3, 0.7, 1]),
            top_k=draw.choice([None, 5]),
            top_p=draw.choice([1, 0.8]),
            frequency_penalty=draw.choice([0, 0.5]),
            repetition_penalty=draw.choice([1, 1.2]),
            logit_bias=draw.choice([(), ((10, -math.inf),)]),
            stop=draw.choice([(), ('ab', 'cde')]),
            seed=seed,
        )
        for _ in range(rows)
    ]
    plain, _ = complete(model, prompts, settings, slots=draw.choice([1, 4]))
    guessed, _ = complete(model, prompts, settings, NGRAM, slots=draw.choice([1, 4]))
    assert guessed == plain


@pytest.mark.parametrize('temperature', [0, 0.5])
@pytest.mark.parametrize('rows', [1, 3])
def test_a_text_that_repeats_itself_needs_few_passes(rows, temperature):
    model = random_model(len(LETTERS) + 1, 200)
    for number in range(20):  # a text that turns in a circle
        sampling = SamplingParams(
            100, temperature=temperature / 5, seed=number, logit_bias=((10, -math.inf),)
        )
        prompts = [[number % 10] * (row + 1) for row in range(rows)]
        plain, one_by_one = complete(model, prompts, sampling)
        guessed, passes = complete(model, prompts, sampling, NGRAM)
        assert guessed == plain
        if len(passes) < len(one_by_one) / 2:
            return
    pytest.fail('no text was guessed')


@pytest.mark.parametrize('right', [0, 1, 5])
def test_guesses_are_accepted_up_to_the_first_wrong_one(right):
    model, prompt = random_model(len(LETTERS) + 1, 100), [1, 2, 3]
    sampling = SamplingParams(60, temperature=0.8, logit_bias=((10, -math.inf),))
    (plain,), _ = complete(model, [prompt], sampling)
    draft = Certain(prompt, ids_of(plain), right)
    (guessed,), passes = complete(model, [prompt], sampling, draft)
    assert guessed == plain
    assert {n for _, n in draft.results[:-1]} == {right}
    assert len(passes) == math.ceil((60 - 1) / (right + 1)) + 1


def test_log_probabilities_are_those_without_guesses():
    model, prompt = random_model(len(LETTERS) + 1, 100), [1, 2, 3]
    sampling = SamplingParams(40, presence_penalty=0.3, logit_bias=((10, -math.inf),))
    options = {'top_logprobs': 3, 'score_prompt': True}
    (plain,), _ = complete(model, [prompt], sampling, **options)
    draft = Certain(prompt, ids_of(plain), 4)
    (guessed,), passes = complete(model, [prompt], sampling, draft, **options)
    assert len(passes) < 15
    for one, other in zip(guessed, plain, strict=True):
        assert one[:4] == other[:4]
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert dict(one.top_logprobs) == pytest.approx(dict(other.top_logprobs), abs=1e-4)


def test_rejected_guesses_leave_the_cache():
    model = random_model(len(LETTERS) + 1, 100)
    engine = engine_with(model, Certain([1], [0] * 90, 3), 2)
    for row in range(2):
        sampling = SamplingParams(50, seed=row, logit_bias=((10, -math.inf),))
        engine.submit(Request([row + 1] * 9, sampling, lambda output: None, row))
    while engine.step():
        for slot in engine.slots:
            if slot.request:
                text = slot.request.prompt + slot.request.output_ids
                assert slot.cached_ids + slot.uncached_ids == text
                assert engine.runner.cache.pos[slot.row] == len(slot.cached_ids)


def test_a_later_prompt_reuses_what_was_guessed_right():
    model, prompt = random_model(len(LETTERS) + 1, 200), PATTERN[:20]
    sampling = SamplingParams(30, temperature=0.5, logit_bias=((10, -math.inf),))
    (plain,), _ = complete(model, [prompt], sampling)
    draft = Certain(prompt, ids_of(plain), 4)
    engine, outputs = engine_with(model, draft, 1), []
    finish(engine, Request(prompt, sampling, outputs.append))
    engine.draft, passes, again = None, Passes(engine), []
    following = prompt + ids_of(plain) + [1, 2, 3]
    finish(engine, Request(following, sampling, again.append))
    (anew,), _ = complete(model, [following], sampling)
    assert again == anew
    assert passes[0] <= 3 + 1  # the last token of the text is not in the cache


def test_a_request_cancelled_by_a_token_gets_no_more():
    model, prompt, outputs = random_model(len(LETTERS) + 1, 100), [1, 2, 3], []
    sampling = SamplingParams(60, temperature=0.8, logit_bias=((10, -math.inf),))
    (plain,), _ = complete(model, [prompt], sampling)

    def cancel_after_five(output):
        outputs.append(output)
        if len(outputs) == 5:
            request.cancel()

    request = Request(prompt, sampling, cancel_after_five)
    finish(engine_with(model, Certain(prompt, ids_of(plain), 7), 1), request)
    assert ids_of(outputs) == [*ids_of(plain[:5]), None]
    assert outputs[-1].finish_reason == 'cancelled'


def test_a_guess_whose_logits_are_not_finite_changes_nothing():
    model = random_model(len(LETTERS) + 1, 100, arch='modern', n_kv_head=1)
    with torch.no_grad():
        model.embedding.weight[9] = math.inf
    sampling = SamplingParams(40, logit_bias=((9, -math.inf), (10, -math.inf)))
    plain, _ = complete(model, [[1, 2], [3]], sampling)

    class Broken(NGramDraft):
        def guess_one(self, request, most):
            return [9, 9][:most]

        def record(self, request, guessed, right):
            assert right == 0

    guessed, passes = complete(model, [[1, 2], [3]], sampling, Broken())
    assert max(passes.with_guesses) == 2 * 3
    assert guessed == plain


def test_a_pass_is_bounded_however_many_guess():
    model = random_model(len(LETTERS) + 1, 200)
    prompts = [PATTERN + [row % 10] + PATTERN for row in range(20)]
    sampling = SamplingParams(60, temperature=0, logit_bias=((10, -math.inf),))
    plain, _ = complete(model, prompts, sampling, slots=20)
    guessed, passes = complete(model, prompts, sampling, NGRAM, slots=20)
    assert guessed == plain
    assert 20 < max(passes.with_guesses) <= MAX_PASS_TOKENS


@pytest.mark.parametrize('how', ['deterministic', 'captured'])
def test_some_engines_do_not_guess(how, monkeypatch):
    if how == 'captured':
        monkeypatch.setattr(model_runner, 'can_capture', lambda tensor: True)
    model = random_model(len(LETTERS) + 1)
    deterministic = how == 'deterministic'
    assert Engine(model, TOKENIZER, deterministic=deterministic, draft=NGRAM).draft is None
    monkeypatch.undo()
    assert Engine(model, TOKENIZER, draft=NGRAM).draft


def test_a_text_is_guessed_from_the_latest_occurrence_of_its_end():
    text = NGrams([*range(10), 77, *range(3, 8), 88, 3, 4])
    assert text.guess(4) == []  # two tokens are too few
    text.extend([5])
    assert text.guess(2) == [6, 7]
    text.extend([6, 7])
    assert text.guess(3) == [88, 3, 4]


def test_a_text_in_a_circle_is_guessed_beyond_its_end():
    text = NGrams([9, 1, 2, 1, 2, 1, 2, 1])
    text.extend([])
    text.paces[6].count = text.paces[3].count = 5
    assert text.guess(9) == [2, 1, 2, 1, 2]


def test_guesses_that_are_wrong_are_soon_rare():
    pace, tokens = Pace(), 0
    for _ in range(2000):
        if count := pace.next_count():
            pace.record(count, 0)
        tokens += count
    assert tokens < 0.03 * 2000


def test_guesses_that_are_right_become_more_and_start_again_after_a_pause():
    pace, counts = Pace(), []
    for right in (*[True] * 5, *[False] * 20, *[True] * 80):
        counts.append(pace.next_count())
        if counts[-1]:
            pace.record(counts[-1], counts[-1] * right)
    assert all(a <= b for a, b in pairwise(counts[:5]))
    assert counts[4] > counts[0]
    assert counts[10:25].count(0) > 10
    assert counts[-1] == counts[4]


@pytest.mark.parametrize('seed', range(8))
def test_a_draft_model_guesses_from_the_same_random_numbers(seed):
    draw, arch = random.Random(seed), [{}, {'arch': 'modern', 'n_kv_head': 1}][seed % 2]
    model = random_model(len(LETTERS) + 1, 48, seed, **arch)
    same = random_model(len(LETTERS) + 1, 48, seed, **arch)
    rows = draw.choice([1, 4])
    prompts = [[draw.randrange(10) for _ in range(draw.choice([1, 20, 70]))] for _ in range(rows)]
    options = [
        {'temperature': draw.choice([0, 1.5]), 'presence_penalty': draw.choice([0, 0.5])}
        for _ in range(rows)
    ]
    biases = ((10, -math.inf),)  # so that none ends early
    settings = [SamplingParams(40, seed=3, logit_bias=biases, **each) for each in options]
    plain, one_by_one = complete(model, prompts, settings)
    guessed, passes = complete(model, prompts, settings, same)
    assert guessed == plain
    assert len(passes) < len(one_by_one)


@pytest.mark.parametrize('block_size', [1, 8, 30, 200])
def test_a_draft_model_may_have_another_context_and_be_wrong(block_size):
    model = random_model(len(LETTERS) + 1, 100)
    other = random_model(len(LETTERS) + 5, block_size, seed=9)
    sampling = SamplingParams(90, logit_bias=((10, -math.inf),))
    prompts = [[1], PATTERN, [2] * 50, PATTERN[:5], [3]]
    plain, _ = complete(model, prompts, sampling)
    guessed, _ = complete(model, prompts, sampling, other)
    assert guessed == plain


def test_a_draft_model_computes_each_token_of_a_text_once():
    model, sampling = random_model(len(LETTERS) + 1, 200), SamplingParams(60, temperature=0)
    engine = engine_with(model, random_model(len(LETTERS) + 1, 200), 1)
    passes = Passes(engine.draft)
    finish(engine, Request(PATTERN, sampling, lambda output: None))
    assert sum(passes) <= len(PATTERN) + 60


def test_a_draft_model_whose_logits_are_not_finite_guesses_nothing():
    model, broken = (random_model(len(LETTERS) + 1, 100) for _ in range(2))
    with torch.no_grad():
        broken.embedding.weight[:] = math.nan
    plain, one_by_one = complete(model, [[1], [2]], SamplingParams(20))
    guessed, passes = complete(model, [[1], [2]], SamplingParams(20), broken)
    assert guessed == plain
    assert passes == one_by_one
