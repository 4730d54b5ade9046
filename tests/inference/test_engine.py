"""The engine: sampling, the KV cache, continuous batching, determinism."""

import gc
import math
import random
import threading
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import finish, random_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flatgpt import cuda_graph
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer
from flatgpt.errors import ConfigError, UserError
from flatgpt.inference import decode_graph, model_runner
from flatgpt.inference.decode_graph import DecodeGraphs
from flatgpt.inference.engine import Engine, complete, generate, generate_sample
from flatgpt.inference.kv_cache import KVCache
from flatgpt.inference.model_runner import ModelRunner
from flatgpt.inference.quantize import prepare_for_inference
from flatgpt.inference.request import Request, TextStream
from flatgpt.inference.sampling import (
    ARGMAX,
    DRAW,
    SORT,
    SamplingParams,
    apply_penalties,
    filter_logits,
    sample_rows,
    sample_tokens,
)
from flatgpt.inference.scheduler import Scheduler, Slot
from flatgpt.lora import add_lora

BLOCK = 16
LETTERS = '\n abcdefgh'
ALL = {'top_k': None, 'temperature': 1.0}  # no filter at all


@pytest.fixture(params=[{}, {'arch': 'modern', 'n_kv_head': 1}], ids=['gpt2', 'grouped'])
def model(request):
    return random_model(len(LETTERS) + 1, **request.param)


@pytest.fixture
def tokenizer():
    return char_tokenizer(LETTERS, eot=True)


def run(*args, **options):
    return list(generate(*args, **options))


def ids_of(pieces, row=0):
    return [piece.token for piece in pieces if piece.index == row]


# -----------------------------------------------------------------------------
# sampling


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize(
    'settings',
    [
        {'temperature': 0.7},
        {'top_k': 5},
        {'top_k': 1},
        {'top_p': 0.6},
        {'top_p': 0.01},
        {'min_p': 0.1},
        {'min_p': 1.0},
        {'repetition_penalty': 1.3},
        {'repetition_penalty': 0.8},
        {'temperature': 1.7, 'top_k': 20, 'top_p': 0.8, 'min_p': 0.05, 'repetition_penalty': 1.2},
    ],
)
def test_filtered_distributions_equal_those_of_transformers(settings, seed):
    processors = pytest.importorskip('transformers', reason='transformers is not installed')
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, 50, generator=generator)
    context = torch.randint(50, (4, 12), generator=generator)
    chain = [
        processors.RepetitionPenaltyLogitsProcessor(settings.get('repetition_penalty', 1.0)),
        processors.TemperatureLogitsWarper(settings.get('temperature', 1.0)),
    ]
    if 'top_k' in settings:
        chain.append(processors.TopKLogitsWarper(settings['top_k']))
    if 'top_p' in settings:
        chain.append(processors.TopPLogitsWarper(settings['top_p']))
    if 'min_p' in settings:
        chain.append(processors.MinPLogitsWarper(settings['min_p']))
    theirs = logits
    for processor in chain:
        theirs = processor(context, theirs)
    sampling, edited = SamplingParams(**{**ALL, **settings}), logits.clone()
    texts = enumerate(context.tolist())
    apply_penalties(edited, [(row, sampling, text[:5], text[5:]) for row, text in texts])
    values, ids = filter_logits(edited, sampling)
    ours = torch.full_like(logits, -math.inf).scatter(-1, ids, values)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-5, atol=1e-7)
    assert torch.equal(ours == -math.inf, theirs == -math.inf)


@pytest.mark.parametrize('spread', [1, 8], ids=['flat', 'peaked'])
@pytest.mark.parametrize('settings', [{'top_p': 0.9}, {'top_p': 0.9, 'top_k': 2000}, {'top_k': 3}])
def test_a_large_vocabulary_is_filtered_as_transformers_does(settings, spread):
    processors = pytest.importorskip('transformers', reason='transformers is not installed')
    logits = spread * torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    theirs = logits
    if 'top_k' in settings:
        theirs = processors.TopKLogitsWarper(settings['top_k'])(None, theirs)
    if 'top_p' in settings:
        theirs = processors.TopPLogitsWarper(settings['top_p'])(None, theirs)
    values, ids = filter_logits(logits, SamplingParams(**{**ALL, **settings}))
    if spread == 8 and settings == {'top_p': 0.9}:
        assert values.size(-1) < 4000  # the few likeliest were enough
    ours = torch.full_like(logits, -math.inf).scatter(-1, ids, values)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-4, atol=1e-7)


def test_the_likeliest_token_stays_however_small_top_p_is():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for share in (5e-324, 1e-40, 1e-9):
        chosen = sample_tokens(
            logits, SamplingParams(**{**ALL, 'top_p': share}), torch.full((3, 1), 0.99)
        )
        assert torch.equal(chosen, logits.argmax(-1))


def test_a_row_of_a_large_vocabulary_does_not_depend_on_other_rows():
    generator = torch.Generator().manual_seed(0)
    peaked = (4 * torch.randn(50, 5000, generator=generator)).bfloat16().float()  # many ties
    flat = 0.01 * torch.randn(1, 5000, generator=generator)
    sampling, uniforms = (
        SamplingParams(**{**ALL, 'top_p': 0.9}),
        torch.rand(51, 1, generator=generator),
    )
    alone = sample_tokens(peaked, sampling, uniforms[:50])
    beside = sample_tokens(torch.cat((peaked, flat)), sampling, uniforms)
    assert torch.equal(alone, beside[:50])


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([[1.0, 0.0, -math.inf, 2.0]]).expand(1000, 4)
    uniforms = (torch.arange(1000)[:, None] + 0.5) / 1000
    counts = sample_tokens(logits, SamplingParams(**ALL), uniforms).bincount(minlength=4)
    assert (counts / 1000 - logits[0].softmax(-1)).abs().max() < 0.002


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]]).expand(3, 5)
    uniforms = torch.tensor([[0.0], [0.5], [1 - 2**-24]])
    assert sample_tokens(logits, SamplingParams(**ALL), uniforms).tolist() == [1, 3, 3]


def test_temperature_zero_takes_the_likeliest_and_a_tiny_one_overflows_nothing():
    logits, uniforms = 50 * torch.randn(8, 30), torch.rand(8, 1)
    for temperature in (0.0, 1e-30, 1e-5):
        sampling = SamplingParams(temperature=temperature)
        assert torch.equal(sample_tokens(logits, sampling, uniforms), logits.argmax(-1))


@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_broken_weights_end_in_one_line(model, tokenizer, temperature, bad):
    model.lm_head.weight.data.fill_(bad)
    with pytest.raises(UserError, match='logits are not finite'):
        run(model, tokenizer, [[0]], SamplingParams(temperature=temperature))


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('temperature', -0.1),
        ('temperature', math.nan),
        ('temperature', math.inf),
        ('top_k', -1),
        ('top_p', 0.0),
        ('top_p', 1.1),
        ('min_p', -0.5),
        ('min_p', 2.0),
        ('repetition_penalty', 0.0),
        ('max_new_tokens', -1),
        ('frequency_penalty', math.inf),
        ('seed', -1),
        ('stop', ('',)),
    ],
)
def test_a_sampling_setting_out_of_range_is_one_line_with_its_name(name, value):
    with pytest.raises(ConfigError, match=rf'^{name}=.*: must be .+') as error:
        SamplingParams(**{name: value})
    assert '\n' not in str(error.value)


# -----------------------------------------------------------------------------
# the cache


@torch.no_grad()
def from_scratch(model, prompt, tokens):
    """Logits before each of `tokens`, without a cache; the context is that of Slot."""
    size, context = model.config.block_size, list(prompt[-model.config.block_size :])
    for token in tokens:
        yield model(torch.tensor([context]))[0][0, -1]
        if len(context) == size:
            del context[: max(1, size // 8)]
        context.append(token)


def record_logits(monkeypatch):
    """Record the logits that tokens are sampled from, by request."""
    seen, sample_requests = {}, ModelRunner.sample_requests

    def watch(self, requests, logits, guessed=None):
        for request, row in zip(requests, logits, strict=True):
            seen.setdefault(request.index, []).append(row.clone())
        return sample_requests(self, requests, logits, guessed)

    monkeypatch.setattr(ModelRunner, 'sample_requests', watch)
    return seen


@pytest.mark.parametrize('block_size', [1, 2, 7, 16, 40])
def test_cached_logits_equal_uncached_ones_past_block_size_for_unequal_rows(
    block_size, monkeypatch
):
    model, tokenizer = random_model(50, block_size), byte_tokenizer()
    tokenizer.token_bytes, tokenizer.vocab_size, tokenizer.eot = (
        tokenizer.token_bytes[:50],
        50,
        None,
    )
    tokenizer.special = {}
    prompts = [[1], [2] * min(5, block_size), [3] * block_size, [2] * min(5, block_size)]
    seen = record_logits(monkeypatch)
    pieces = run(model, tokenizer, prompts, SamplingParams(max_new_tokens=60))
    for row, prompt in enumerate(prompts):
        expected = torch.stack([*from_scratch(model, prompt, ids_of(pieces, row))])
        assert len(expected) == 60
        assert (torch.stack(seen[row]) - expected).abs().max() < 1e-5


def test_a_full_context_drops_its_oldest_eighth():
    slot = Slot(0)
    slot.cached_ids = list(range(BLOCK))
    slot.append(40, BLOCK)
    assert (slot.cached_ids, slot.uncached_ids) == ([], [*range(2, BLOCK), 40])
    slot.cached_ids = [1, 2]
    slot.append(41, BLOCK)
    assert (slot.cached_ids, slot.uncached_ids) == ([1, 2], [41])


def test_a_row_depends_on_its_seed_and_not_on_other_rows(model, tokenizer):
    prompts = [[1, 2, 3], [4], [5, 6], list(range(9)) * 3]
    sampling = SamplingParams(max_new_tokens=3 * BLOCK, **ALL)
    together = run(model, tokenizer, prompts, sampling)
    for row, prompt in enumerate(prompts):
        alone = run(model, tokenizer, [prompt], sampling, seeds=[(sampling.seed, row)])
        assert ids_of(alone) == ids_of(together, row)


def test_the_same_seed_gives_the_same_texts_and_another_one_others(model, tokenizer):
    prompts, sampling = [[1]] * 3, SamplingParams(max_new_tokens=20)
    first = run(model, tokenizer, prompts, sampling)
    assert first == run(model, tokenizer, prompts, sampling)
    assert first != run(model, tokenizer, prompts, SamplingParams(max_new_tokens=20, seed=1))
    assert len({tuple(ids_of(first, row)) for row in range(3)}) == 3  # rows differ among themselves


def test_only_the_end_of_a_long_prompt_counts(model, tokenizer):
    prompt, sampling = np.arange(40, dtype=np.uint16) % 9, SamplingParams(max_new_tokens=20)
    assert run(model, tokenizer, [prompt], sampling) == run(
        model, tokenizer, [prompt[-BLOCK:].tolist()], sampling
    )


# -----------------------------------------------------------------------------
# ids, ends and text


def test_ids_without_text_are_never_sampled():
    tokenizer = byte_tokenizer()
    tokenizer.token_bytes[100:256] = [None] * 156  # gaps
    tokenizer.special['<|other|>'] = 7  # a special token that no training text has
    model = random_model(300)  # padded: 257..299 stand for nothing
    sampling = SamplingParams(temperature=20.0, top_k=0, max_new_tokens=60)
    pieces = run(model, tokenizer, [[1]] * 20, sampling)
    produced = {piece.token for piece in pieces}
    assert produced <= {*range(100), 256} - {7}
    assert len(produced) > 90


def test_end_of_text_ends_its_row_only(model, tokenizer):
    pieces = run(model, tokenizer, [[i] for i in range(9)], SamplingParams(max_new_tokens=3, **ALL))
    reasons = set()
    for row in range(9):
        mine = [piece for piece in pieces if piece.index == row]
        assert [piece.finish_reason for piece in mine[:-1]] == [None] * (len(mine) - 1)
        assert tokenizer.eot not in ids_of(mine[:-1], row)
        ended = mine[-1].token == tokenizer.eot
        assert mine[-1].finish_reason == ('stop' if ended else 'length')
        assert ended or len(mine) == 3
        reasons.add(mine[-1].finish_reason)
    assert reasons == {'stop', 'length'}


def test_a_stop_string_ends_a_text_and_is_not_shown(model):
    tokenizer = char_tokenizer(LETTERS)
    prompts, settings = [[1], [2]], {**ALL, 'max_new_tokens': 60, 'seed': 3}
    free = run(model, tokenizer, prompts, SamplingParams(**settings))
    for row in range(2):
        text = tokenizer.decode(ids_of(free, row))
        stop = text[4:7]
        cut = run(model, tokenizer, prompts, SamplingParams(**settings, stop=(stop,)))
        mine = [piece for piece in cut if piece.index == row]
        shown = ''.join(piece.text for piece in mine)
        assert shown == text[: text.index(stop)]
        assert mine[-1].finish_reason == 'stop'


@pytest.mark.parametrize('stop', [(), ('ab', 'bca'), ('é!', '€')])
def test_streamed_text_is_the_text_in_whole_characters(stop):
    draw = random.Random(0)
    for _ in range(200):
        pieces = [draw.choice('abc!é€🙂').encode() for _ in range(draw.randrange(20))]
        data = b''.join(pieces) + draw.choice([b'', b'\xf0\x9f'])
        text = data.decode(errors='replace')
        cuts = sorted(draw.randrange(len(data) + 1) for _ in range(6))
        stream, shown, stopped = TextStream(stop), '', False
        for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True):
            if not stopped:
                piece, stopped = stream.add(data[a:b], b == len(data))
                shown += piece
                assert not any(s in shown for s in stop)
        found = [text.index(s) for s in stop if s in text]
        assert stopped == bool(found)
        assert shown == (text[: min(found)] if found else text)


def test_text_is_held_back_only_while_it_could_become_a_stop_string():
    stream = TextStream(('\nUser:',))
    assert stream.add(b'Hi\nUs', False) == ('Hi', False)
    assert stream.add(b'ually', False) == ('\nUsually', False)
    assert stream.add(b'\nUse', True) == ('\nUse', False)


def test_complete_returns_a_text_for_each_prompt(model, tokenizer):
    sampling = SamplingParams(max_new_tokens=12)
    texts = complete(model, tokenizer, ['ab', 'c<|endoftext|>d'], sampling)
    assert len(texts) == 2
    assert texts[0] == complete(model, tokenizer, ['ab'], sampling)[0]
    assert set(''.join(texts)) <= set(LETTERS)


# -----------------------------------------------------------------------------
# captured steps


class Recording(TorchDispatchMode):
    """What a CUDA graph keeps of a step, on a CPU: its operations, the memory they read and write,
    and every number that came from Python. replay() is those operations, on what is there then."""

    WAITS = ('item', '_local_scalar_dense', 'nonzero', 'equal', 'is_nonzero', 'lift_fresh')

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f'{name} waits for the device, or for the host'
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
        made = [t.untyped_storage().data_ptr() not in given for t in tensors_in(result)]
        if any(made) or func._schema.is_mutable:  # else it is a view, which stays what it is
            self.operations.append((func, args, kwargs or {}, result, made))
        return result

    def replay(self):
        for func, args, kwargs, result, made in self.operations:
            again = func(*args, **kwargs)
            if any(made):  # else it has written into what was there
                pairs = zip(tensors_in(result), tensors_in(again), made, strict=True)
                for memory, now, is_new in pairs:
                    if is_new:
                        memory.copy_(now)


def tensors_in(tree):
    if isinstance(tree, torch.Tensor):  # as most results; tree_leaves() takes much longer
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def capture_on_cpu(step, device, pool):
    with Recording() as recording:
        result = step()
    return recording.replay, result


@pytest.fixture
def captured(monkeypatch):
    """Steps are captured, on a CPU -> those captured, in order."""
    steps, capture = [], DecodeGraphs.capture

    def listed(self, forward, step):
        steps.append(step)
        capture(self, forward, step)

    monkeypatch.setattr(DecodeGraphs, 'capture', listed)
    monkeypatch.setattr(decode_graph, 'capture', capture_on_cpu)
    monkeypatch.setattr(model_runner, 'can_capture', lambda tensor: True)
    decode_graph.KEPT.clear()
    return steps


def test_a_capture_keeps_the_decisions_of_python():
    given, held = torch.ones(2), 3
    with Recording() as recording:
        result = given * 2 + held
    given += 1
    held = 100
    recording.replay()
    assert result.tolist() == [7, 7]
    with pytest.raises(AssertionError, match='waits'), Recording():
        float(given.sum())


LONG = [i % 10 for i in range(60)]
SCENES = {  # prompts that come together, round after round
    'one token': [[[3]]],
    'rows of one token': [[[3], [4]]],
    'a long prompt': [[LONG]],
    'unequal prompts': [[[1, 2, 3], [4], [5, 6], LONG[:9], [8, 1]]],
    'slots used again': [[[3]], [LONG, [4]], [[5], LONG[:30] + [9], LONG[:20]], [[6]]],
    'more than there are slots': [[[i % 10] * (1 + i % 7) for i in range(11)]],
}


def outputs_of_scene(model, tokenizer, scene, scored, deterministic):
    """The outputs of each request, the odd ones with all log-probabilities."""
    engine, row, outputs = Engine(model, tokenizer, 4, 8, deterministic=deterministic), 0, []
    for prompts in SCENES[scene]:
        requests = []
        for prompt in prompts:
            odd, third = row % 2, row % 3
            rules = {'top_p': 1 - third / 4, 'presence_penalty': odd / 2}
            biases = ((tokenizer.eot, -math.inf),)  # so that none ends early
            sampling = SamplingParams(18 + 2 * third, odd, logit_bias=biases, **rules)
            top = model.config.vocab_size if row % 4 else None
            request = Request(
                prompt, sampling, outputs.append, row, top_logprobs=top, score_prompt=scored
            )
            requests.append(request)
            row += 1
        finish(engine, *requests)
    return [[output for output in outputs if output.index == i] for i in range(row)]


@pytest.mark.parametrize('scene', SCENES)
@pytest.mark.parametrize('scored', [False, True])
@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('block_size', [1, 16, 70])  # contexts are forgotten; columns are crossed
def test_captured_steps_compute_the_same(
    model, tokenizer, request, block_size, deterministic, scored, scene
):
    shape = {name: getattr(model.config, name) for name in ('arch', 'bias', 'n_kv_head')}
    model = random_model(len(LETTERS) + 1, block_size, **shape, n_layer=2, n_head=2, n_embd=32)
    how = model, tokenizer, scene, scored, deterministic
    computed = outputs_of_scene(*how)
    captured = request.getfixturevalue('captured')
    replayed = outputs_of_scene(*how)
    assert captured
    for ours, theirs in zip(replayed, computed, strict=True):
        assert [output[:4] for output in ours] == [output[:4] for output in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert dict(one.top_logprobs) == pytest.approx(dict(other.top_logprobs), abs=1e-4)


@pytest.mark.parametrize('deterministic', [False, True])
def test_a_request_for_no_tokens_ends_also_if_its_prompt_is_in_the_cache(tokenizer, deterministic):
    model, outputs = random_model(len(LETTERS) + 1, 70), []
    engine = Engine(model, tokenizer, 2, 8, deterministic=deterministic)
    for index, tokens in enumerate((0, 3, 0, 0)):
        for prompt in (LONG[:40], [1]):  # of one token, there is nothing to compute before it
            finish(engine, Request(prompt, SamplingParams(tokens), outputs.append, index))
    scored = Request([1], SamplingParams(0), outputs.append, top_logprobs=1, score_prompt=True)
    finish(engine, scored)
    none = [(each.token, each.finish_reason) for each in outputs if each.index != 1]
    assert none == [(None, 'length')] * 7


def rows_of_any_filters(draw, rows):
    """As many different filters, and uniform numbers."""
    filters = [
        SamplingParams(
            temperature=draw.choice([0, 0.3, 1, 1.7]),
            top_k=draw.choice([None, 1, 5, 40, 100]),
            top_p=draw.choice([1.0, 0.9, 0.5, 1e-9]),
            min_p=draw.choice([0.0, 0.0, 0.1, 1.0]),
        )
        for _ in range(rows)
    ]
    return filters, torch.tensor([[draw.random()] for _ in range(rows)])


def sample_by_rows(logits, filters, uniforms, work=SORT):
    settings = torch.tensor([each.row_settings for each in filters])  # (R, 4)
    return sample_rows(logits, torch.cat((uniforms, settings), 1).T, work)


@pytest.mark.parametrize('seed', range(4))
def test_rows_of_different_filters_are_sampled_as_each_alone(seed):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(200, 60, generator=generator)
    filters, uniforms = rows_of_any_filters(draw, 200)
    together = sample_by_rows(logits, filters, uniforms)
    for i, each in enumerate(filters):
        row = logits[i : i + 1], each, uniforms[i : i + 1]
        assert together[i] == sample_tokens(*row)
        alone = sample_by_rows(logits[i : i + 1], [each], uniforms[i : i + 1], each.work)
        assert together[i] == alone  # also if it needs less work


def test_rows_of_logits_that_are_not_finite_have_no_token():
    logits = torch.zeros(6, 5)
    logits[1, 2], logits[3, 1], logits[4] = math.nan, math.inf, -math.inf
    for work, filters in ((ARGMAX, {'temperature': 0}), (DRAW, {}), (SORT, {'top_p': 0.5})):
        tokens = sample_by_rows(logits, [SamplingParams(**filters)] * 6, torch.rand(6, 1), work)
        assert (tokens < 0).tolist() == [False, True, False, True, True, False]


def test_one_captured_step_serves_requests_of_any_filters(model, tokenizer, captured):
    prompts = [[1], [2], [3], [4]]
    for options in ({'top_k': 5}, {'top_p': 0.7}, {'top_k': 3, 'temperature': 0.5, 'min_p': 0.1}):
        run(model, tokenizer, prompts, SamplingParams(9, **options))
    assert len(captured) == len({*captured})
    assert {step.work for step in captured} == {SORT}
    before = len(captured)
    run(model, tokenizer, prompts, SamplingParams(9, temperature=0))
    assert {step.work for step in captured[before:]} == {ARGMAX}


def test_generating_again_with_a_model_captures_nothing(model, captured):
    tokenizer, sampling = char_tokenizer(LETTERS), SamplingParams(9, seed=3)  # no text ends early
    first = run(model, tokenizer, [[1, 2], [3]], sampling)
    count = len(captured)
    assert count
    assert run(model, tokenizer, [[1, 2], [3]], sampling) == first
    assert len(captured) == count
    with torch.no_grad():  # as an optimizer does
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    changed = run(model, tokenizer, [[1, 2], [3]], sampling)
    assert len(captured) == count
    assert changed != first
    other = char_tokenizer(LETTERS[:5], eot=False)  # whose ids are fewer
    assert {*ids_of(run(model, other, [[1], [2]], SamplingParams(40, 5.0)))} <= {*range(5)}
    decode_graph.free_graphs(model)
    assert run(model, tokenizer, [[1, 2], [3]], sampling) == changed
    assert len(captured) > count


@pytest.mark.parametrize(
    'change',
    [
        lambda model: model.double().float(),
        lambda model: add_lora(model, 2, 2.0, 0.0, 'all'),
    ],
    ids=['moved', 'with adapters'],
)
def test_graphs_of_weights_that_are_elsewhere_now_are_not_used(model, tokenizer, captured, change):
    first = run(model, tokenizer, [[1]], SamplingParams(5, temperature=0))
    count = len(captured)
    change(model)
    assert ids_of(run(model.eval(), tokenizer, [[1]], SamplingParams(5, temperature=0))) == ids_of(
        first
    )
    assert len(captured) == 2 * count


def test_graphs_of_weights_that_were_quantized_are_not_used(captured):
    model = random_model(len(LETTERS) + 1).bfloat16()
    graphs = DecodeGraphs(model, KVCache(model, 1))
    decode_graph.keep_graphs(model, graphs)
    prepare_for_inference(model, 'int8')
    assert decode_graph.take_graphs(model, 1, 1) is None


def test_a_kept_cache_does_not_keep_its_model(tokenizer, captured):
    model = random_model(len(LETTERS) + 1)
    run(model, tokenizer, [[1]], SamplingParams(3))
    assert len(decode_graph.KEPT) == 1
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert len(decode_graph.KEPT) == 0


def test_a_sample_of_training_keeps_no_memory(model, tokenizer, captured):
    generate_sample(model, tokenizer, [1], 30, seed=1)
    assert captured
    assert len(decode_graph.KEPT) == 0


def test_the_first_steps_of_requests_are_captured_ahead(model, tokenizer, captured):
    engine, outputs = Engine(model, tokenizer, 4), []
    assert engine.capture_graphs() == len(captured) == 3 * 4
    for options in ({}, {'top_k': 3}, {'temperature': 0}):
        finish(engine, Request([1, 2], SamplingParams(9, **options), outputs.append))
    assert len(captured) == 3 * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize(
    'options',
    [{'temperature': 0}, ALL, {'top_k': 5}, {'top_p': 0.8, 'min_p': 0.02}, {'presence_penalty': 1}],
)
def test_a_gpu_computes_the_same_tokens_with_and_without_graphs(
    model, tokenizer, monkeypatch, options
):
    model, sampling, prompts = model.cuda(), SamplingParams(60, **options), [[1], [2, 3], [4]]
    with_graphs = [run(model, tokenizer, prompts, sampling) for _ in range(2)]  # captured, kept
    monkeypatch.setattr(model_runner, 'can_capture', lambda tensor: False)
    decode_graph.free_graphs(model)
    without = run(model, tokenizer, prompts, sampling)
    assert with_graphs == [without, without]


def test_nothing_is_captured_on_a_cpu(model, tokenizer):
    assert Engine(model, tokenizer, 4).capture_graphs() == 0


@pytest.mark.parametrize('cudnn', [True, False])
def test_attention_can_do_without_cudnn(model, captured, monkeypatch, cudnn):
    monkeypatch.setattr(model_runner, 'CUDNN_ATTENTION', cudnn)
    allowed, forward = [], model.forward
    monkeypatch.setattr(
        model,
        'forward',
        lambda *args, **options: (
            allowed.append(torch.backends.cuda.cudnn_sdp_enabled()) or forward(*args, **options)
        ),
    )
    run(model, char_tokenizer(LETTERS), [[1, 2, 3]], SamplingParams(2))
    assert allowed == [cudnn] * 2  # the prompt, and the step that is captured
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_captures_share_a_stream_since_libraries_keep_memory_per_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: object())
    cuda_graph.capture_stream.cache_clear()
    one, two = (cuda_graph.capture_stream(torch.device('cuda', i)) for i in range(2))
    assert one is cuda_graph.capture_stream(torch.device('cuda', 0))
    assert one is not two
    cuda_graph.capture_stream.cache_clear()


class Waits(TorchDispatchMode):
    """Counts operations that would wait for a GPU, as far as a CPU shows them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ('_local_scalar_dense', 'item', 'nonzero', 'equal', '_unique2', 'unique_dim'):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('graphs', [False, True])
def test_a_step_waits_once_for_its_tokens(model, tokenizer, monkeypatch, request, graphs):
    if graphs:
        request.getfixturevalue('captured')
    engine, lists = Engine(model, tokenizer, 4), []
    tolist = torch.Tensor.tolist
    biases = ((tokenizer.eot, -math.inf), (3, 1.0))
    for row in range(3):
        rules = {'frequency_penalty': row, 'repetition_penalty': 1 + row, 'logit_bias': biases}
        engine.submit(Request([row + 1], SamplingParams(9, **rules), lambda output: None, row))
    for _ in range(3):
        engine.step()
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda self: lists.append(1) or tolist(self))
    with Waits() as waits:
        engine.step()
    assert (waits.names, lists) == ([], [1])


# -----------------------------------------------------------------------------
# many requests


def letters(random, most=30):
    return [random.randrange(len(LETTERS)) for _ in range(random.randrange(1, most))]


def staggered(engine, requests, random):
    """Run an engine to the end, with requests that arrive a few at a time."""
    left = list(requests)
    while left or engine.waiting or engine.running:
        for _ in range(random.randrange(3)):
            if left:
                engine.submit(left.pop(0))
        engine.step()


def as_one_text(request, pieces):
    return [piece for piece in pieces if piece.index == request.index]


@pytest.mark.parametrize('deterministic', [False, True])
def test_48_staggered_requests_get_the_same_completions_as_alone(model, tokenizer, deterministic):
    draw, pieces = random.Random(0), []
    requests = [
        Request(
            letters(draw), SamplingParams(1 + i % 30, temperature=i % 2), pieces.append, index=i
        )
        for i in range(48)
    ]
    staggered(Engine(model, tokenizer, 5, 8, deterministic=deterministic), requests, draw)
    for request in requests:
        mine, alone = as_one_text(request, pieces), []
        engine = Engine(model, tokenizer, 1)
        engine.submit(Request(request.prompt, request.sampling, alone.append, request.index))
        while engine.step():
            pass
        assert mine == alone
        assert mine[-1].finish_reason == request.finish_reason


@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'int8'])
@pytest.mark.parametrize(
    'changes', [{}, {'arch': 'modern', 'n_kv_head': 2}], ids=['gpt2', 'modern']
)
@pytest.mark.parametrize('batch_prompts', [False, True])
def test_deterministic_logits_are_bit_identical_alone_in_a_batch_and_in_any_slot(
    kind, changes, batch_prompts, monkeypatch
):
    # a context that is no multiple of the cache's stride
    model = random_model(len(LETTERS), 94, n_head=4, n_embd=64, n_layer=2, **changes)
    model = model if kind == 'float32' else model.bfloat16()
    try:
        model = prepare_for_inference(model, 'int8' if kind == 'int8' else None)
    except ConfigError as error:
        pytest.skip(str(error))
    tokenizer, draw = char_tokenizer(LETTERS), random.Random(0)
    prompts = [letters(draw, 90) for _ in range(12)]

    def logits_of(numbers):
        seen = record_logits(monkeypatch)
        engine = Engine(model, tokenizer, 4, 8, deterministic=True, batch_prompts=batch_prompts)
        for slot in engine.slots:  # what a row was left with must not matter
            engine.runner.cache.kv[:, :, slot.row] = 1e4 * draw.random()
        requests = [Request(prompts[i], SamplingParams(25), lambda piece: None, i) for i in numbers]
        staggered(engine, requests, draw)
        monkeypatch.undo()
        return {row: torch.stack(logits) for row, logits in seen.items()}

    crowd = logits_of(range(12))
    shuffled = logits_of(draw.sample(range(12), 12))
    for i in range(12):
        alone = logits_of([i])
        assert torch.equal(alone[i], crowd[i])
        assert torch.equal(shuffled[i], crowd[i])


def test_what_free_rows_hold_changes_nothing(model, tokenizer):
    sampling, prompts = SamplingParams(20), [[1, 2, 3], [4], [5, 6]]

    def texts(poison):
        engine, pieces = Engine(model, tokenizer, 8), []
        engine.runner.cache.kv.fill_(poison)
        for row, prompt in enumerate(prompts):
            engine.submit(Request(prompt, sampling, pieces.append, row))
        while engine.step():
            pass
        return pieces

    assert texts(0.0) == texts(1e20)


def test_requests_move_to_the_first_rows_when_few_are_left(model):
    tokenizer = char_tokenizer(LETTERS)
    engine, pieces, rows = Engine(model, tokenizer, 4), [], []
    for row, limit in enumerate([2, 2, 2, 60]):
        sampling = SamplingParams(limit, temperature=0)
        engine.submit(Request([row + 1] * 3, sampling, pieces.append, row))
    runner, advance = engine.runner, engine.runner.forward_one_token
    runner.forward_one_token = lambda tokens, lengths: (
        rows.append(len(tokens)) or advance(tokens, lengths)
    )
    while engine.step():
        pass
    assert rows == [4] + [1] * (len(rows) - 1)
    alone = run(model, tokenizer, [[4] * 3], SamplingParams(60, temperature=0))
    assert ids_of(pieces, 3) == ids_of(alone)


def count_computed(engine):
    """A list that gets the number of tokens of each pass of the model."""
    counts, forward = [], engine.model.forward

    def counted(idx, *args, **options):
        counts.append(idx.numel())
        return forward(idx, *args, **options)

    engine.model.forward = counted
    return counts


@pytest.mark.parametrize('rows', [1, 3])
def test_a_prompt_reuses_the_prefix_it_shares_with_an_earlier_one(rows):
    tokenizer = char_tokenizer(LETTERS)
    model, draw = random_model(len(LETTERS), 100), random.Random(0)
    engine, first = Engine(model, tokenizer, rows), []
    prompt = [draw.randrange(10) for _ in range(40)]
    finish(engine, Request(prompt, SamplingParams(10), first.append))
    conversation = prompt + ids_of(first)[:-1] + [1, 2, 3]
    counts, again, anew = count_computed(engine), [], []
    finish(engine, Request(conversation, SamplingParams(8, temperature=0), again.append))
    assert counts[0] == 3  # the last token of the text before is not in the cache: 9 + 3
    assert sum(counts) < 3 + 8 + 1
    finish(
        Engine(model, tokenizer, 1),
        Request(conversation, SamplingParams(8, temperature=0), anew.append),
    )
    assert again == anew


def test_samples_of_one_prompt_share_its_computation():
    tokenizer, model = char_tokenizer(LETTERS), random_model(len(LETTERS), 100)
    engine, pieces = Engine(model, tokenizer, 4), []
    counts = count_computed(engine)
    prompt, sampling = [i % 10 for i in range(50)], SamplingParams(5)
    finish(engine, *(Request(prompt, sampling, pieces.append, row) for row in range(4)))
    assert counts[0] == 50
    assert sum(counts) < 50 + 4 * 6
    assert pieces != []
    alone = [ids_of(run(model, tokenizer, [prompt], sampling, [(1337, row)])) for row in range(4)]
    assert [ids_of(pieces, row) for row in range(4)] == alone


def test_a_long_prompt_does_not_block_other_requests(model, tokenizer):
    model, order = random_model(len(LETTERS) + 1, 100), []
    engine = Engine(model, tokenizer, 2, prefill_chunk=8)
    engine.submit(Request([1], SamplingParams(60, logit_bias=((10, -math.inf),)), order.append, 0))
    engine.step()
    engine.submit(Request([2] * 80, SamplingParams(1), order.append, 1))
    while not any(piece.index == 1 for piece in order):
        engine.step()
    assert 9 <= len(order) <= 12  # a token of the text for each of ten pieces of the prompt


def test_a_cancelled_request_frees_its_slot_before_the_next_step(model, tokenizer):
    engine, pieces = Engine(model, tokenizer, 1), []
    requests = [Request([row], SamplingParams(10**6), pieces.append, row) for row in range(3)]
    for request in requests:
        engine.submit(request)
    engine.step()
    requests[0].cancel()
    requests[1].cancel()  # still waiting
    engine.step()
    ended = {piece.index: piece.finish_reason for piece in pieces if piece.finish_reason}
    assert ended == {0: 'cancelled', 1: 'cancelled'}
    assert engine.slots[0].request is requests[2]
    requests[2].cancel()
    while engine.step():
        pass
    assert engine.running == len(engine.waiting) == 0


def test_requests_can_be_submitted_while_the_engine_drops_cancelled_ones(model, tokenizer):
    engine, pieces, threads = Engine(model, tokenizer, 1), [], []

    class Meddling(Request):
        @property
        def cancelled(self):  # another thread submits just when this is looked at
            other = Request([1], SamplingParams(1), pieces.append, 1)
            if len(threads) < 3:
                threads.append(threading.Thread(target=engine.submit, args=(other,)))
                threads[-1].start()
                threads[-1].join(0.1)
            return False

        @cancelled.setter
        def cancelled(self, value):
            pass

    for _ in range(2):
        engine.submit(Meddling([1], SamplingParams(1), pieces.append, 0))
    while engine.step():
        pass
    for thread in threads:
        thread.join()
    while engine.step():
        pass
    assert len(pieces) == 2 + len(threads) == 5


def test_an_exception_ends_every_request_and_is_raised_for_the_next(model, tokenizer):
    engine, pieces = Engine(model, tokenizer, 1), []
    model.forward = lambda *args, **options: 1 // 0
    for row in range(3):
        engine.submit(Request([row], SamplingParams(5), pieces.append, row))
    with pytest.raises(ZeroDivisionError):
        engine.serve()
    assert sorted((piece.index, piece.finish_reason) for piece in pieces) == [
        (i, 'error') for i in range(3)
    ]
    with pytest.raises(ZeroDivisionError):
        engine.submit(Request([1], SamplingParams(5), pieces.append))


def test_logits_that_are_not_finite_end_only_their_own_request():
    model = random_model(len(LETTERS), arch='modern', n_kv_head=1)
    with torch.no_grad():
        model.embedding.weight[9] = math.inf
    engine, pieces = Engine(model, char_tokenizer(LETTERS), 2), []
    sampling = SamplingParams(3, temperature=0, logit_bias=((9, -math.inf),))
    for row, prompt in enumerate([[1, 2, 9], [1, 2, 3], [9] * 7, [1, 2, 3], [1, 2, 3]]):
        engine.submit(Request(prompt, sampling, pieces.append, row))
    while engine.step():
        pass
    assert [piece.finish_reason for piece in pieces if piece.index in (0, 2)] == ['error', 'error']
    assert ids_of(pieces, 1) == ids_of(pieces, 3) == ids_of(pieces, 4)
    assert len(ids_of(pieces, 1)) == 3


def test_a_scored_prompt_that_is_not_finite_is_an_error_and_its_keys_are_cleared():
    model = random_model(len(LETTERS), arch='modern', n_kv_head=1)
    with torch.no_grad():
        model.embedding.weight[9] = math.inf
    engine, pieces = Engine(model, char_tokenizer(LETTERS), 1), []
    finish(engine, Request([1, 9, 2, 3], SamplingParams(0), pieces.append, 0, None, 0, True))
    cancelled = Request([9] * 5, SamplingParams(5), pieces.append, 1)
    finish(engine, Request([1, 2], SamplingParams(3, temperature=0), pieces.append, 2))
    assert [piece.finish_reason for piece in pieces if piece.index == 0] == ['error']
    assert len(ids_of(pieces, 2)) == 3
    engine.submit(cancelled)
    engine.scheduler.admit()
    engine.prefill()  # its keys are there, its first token is not
    cancelled.cancel()
    finish(engine, Request([1, 2], SamplingParams(3, temperature=0), pieces.append, 3))
    assert ids_of(pieces, 3) == ids_of(pieces, 2)


def test_a_closed_engine_cancels_its_requests_and_accepts_no_more(model, tokenizer):
    engine, pieces = Engine(model, tokenizer, 1), []
    for row in range(2):
        engine.submit(Request([row], SamplingParams(10**6), pieces.append, row))
    engine.step()
    engine.close()
    engine.serve()
    assert {
        piece.index: piece.finish_reason for piece in pieces if piece.finish_reason
    } == dict.fromkeys((0, 1), 'cancelled')
    with pytest.raises(UserError, match='closed'):
        engine.submit(Request([1], SamplingParams(5), pieces.append))


def test_an_engine_in_its_own_thread_serves_requests_of_other_threads(model, tokenizer):
    engine, done = Engine(model, tokenizer, 2), threading.Event()
    thread = threading.Thread(target=engine.serve)
    thread.start()
    try:
        pieces = []
        take = lambda piece: (pieces.append(piece), piece.finish_reason and done.set())  # noqa: E731
        engine.submit(Request([1, 2], SamplingParams(5, temperature=0), take))
        assert done.wait(30)
    finally:
        engine.close()
        thread.join(30)
    assert not thread.is_alive()
    assert pieces == run(model, tokenizer, [[1, 2]], SamplingParams(5, temperature=0))


# -----------------------------------------------------------------------------
# log-probabilities and penalties


def test_log_probabilities_are_of_the_logits_before_penalties_and_filters(model, tokenizer):
    pieces, prompt = [], [1, 2, 3, 4, 5]
    sampling = SamplingParams(8, temperature=3, top_k=3, frequency_penalty=1)
    request = Request(prompt, sampling, pieces.append, top_logprobs=3, score_prompt=True)
    finish(Engine(model, tokenizer, 1, prefill_chunk=2), request)
    tokens = ids_of(pieces)
    expected = torch.stack([*from_scratch(model, prompt, tokens)]).log_softmax(-1)
    for piece, scores in zip(pieces, expected, strict=True):
        assert piece.logprob == pytest.approx(scores[piece.token].item(), abs=1e-5)
        values, ids = scores.topk(3)
        assert [i for i, _ in piece.top_logprobs] == ids.tolist()
        assert [value for _, value in piece.top_logprobs] == pytest.approx(
            values.tolist(), abs=1e-5
        )
    scores = model(torch.tensor([prompt]))[0][0].log_softmax(-1)
    assert request.prompt_logprobs[0] == (None, ())
    assert len(request.prompt_logprobs) == len(prompt)
    for i, (score, top) in enumerate(request.prompt_logprobs[1:]):
        assert score == pytest.approx(scores[i, prompt[i + 1]].item(), abs=1e-5)
        assert top[0][0] == scores[i].argmax()


def test_a_request_for_no_token_only_scores_its_prompt(model, tokenizer):
    pieces = []
    requests = [
        Request([1, 2, 3], SamplingParams(0), pieces.append, row, top_logprobs=0, score_prompt=True)
        for row in range(3)
    ]
    finish(Engine(model, tokenizer, 2), *requests)
    assert [(p.index, p.token, p.finish_reason) for p in pieces] == [
        (i, None, 'length') for i in range(3)
    ]
    assert all(len(request.prompt_logprobs) == 3 for request in requests)


def test_a_prompt_is_scored_once_however_long_the_text_becomes(model, tokenizer):
    sampling = SamplingParams(60, logit_bias=((tokenizer.eot, -math.inf),))
    request = Request([1, 2, 3], sampling, lambda piece: None, 0, top_logprobs=0, score_prompt=True)
    finish(Engine(model, tokenizer, 1), request)
    assert len(request.output_ids) == 60
    assert len(request.prompt_logprobs) == 3


def test_penalties_and_biases_are_those_of_the_api_they_come_from():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 2.0, 0.0], [1.0, -1.0, 2.0, 0.0]])
    openai = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((3, 7.0),))
    ctrl = SamplingParams(repetition_penalty=2.0)
    apply_penalties(logits, [(1, openai, [1], [0, 0, 2]), (2, ctrl, [1], [2])])
    assert logits[0].tolist() == [0.0] * 4
    assert logits[1].tolist() == [1.0 - 2 * 0.5 - 0.25, -1.0, 2.0 - 0.5 - 0.25, 7.0]
    assert logits[2].tolist() == [1.0, -2.0, 1.0, 0.0]


def test_penalties_take_a_set_and_a_counter_of_tokens():
    sampling = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=1.3)
    prompt, written = [1, 5, 5, 1], [7, 2, 7, 7, 3, 2]
    text = torch.linspace(-2, 2, 9)[None].clone()
    counted = text.clone()
    apply_penalties(text, [(0, sampling, prompt, written)])
    apply_penalties(counted, [(0, sampling, frozenset(prompt), Counter(written))])
    assert torch.equal(text, counted)


def test_a_request_counts_its_tokens(model, tokenizer):
    request = Request([1, 2, 3, 3], SamplingParams(40, frequency_penalty=0.1), lambda piece: None)
    finish(Engine(model, tokenizer, 1), request)
    assert request.counts == Counter(request.output_ids)
    assert request.prompt_tokens == {1, 2, 3}


def test_a_queue_without_cancelled_requests_stays_as_it_is():
    scheduler, sampling = Scheduler(1, 16, 8, False), SamplingParams()
    requests = [Request([1], sampling, lambda piece: None, row) for row in range(3)]
    scheduler.waiting.extend(requests)
    queue = scheduler.waiting
    assert scheduler.drop_cancelled() == []
    assert scheduler.waiting is queue
    requests[1].cancel()
    assert scheduler.drop_cancelled() == [requests[1]]
    assert [*scheduler.waiting] == [requests[0], requests[2]]
