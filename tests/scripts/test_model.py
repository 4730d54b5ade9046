"""Both architectures: their numbers against `transformers`, their cache against no cache."""

import math

import pytest
import torch
from error_lines import case, error_line
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import model as model_module
from flatgpt.checkpoint.weights import SkipRandom
from flatgpt.errors import ConfigError, as_config_error
from flatgpt.inference.kv_cache import KVCache
from model import GPT, TRANSPOSED, GPTConfig

BLOCK, VOCAB = 32, 101
MODERN, GROUPED = {'arch': 'modern'}, {'arch': 'modern', 'n_kv_head': 2}


@pytest.fixture(params=[{'bias': True}, MODERN, GROUPED], ids=['gpt2', 'modern', 'grouped'])
def model(request):
    return tiny(**request.param)


def tiny(**changes):
    torch.manual_seed(0)
    shape = {'block_size': BLOCK, 'vocab_size': VOCAB, 'n_layer': 3, 'n_head': 4, 'n_embd': 64}
    model = GPT(GPTConfig(**{**shape, **changes})).eval()
    for parameter in model.parameters():  # larger than at the start, so that attention is not flat
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def tokens(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


def assert_close(a, b):
    assert (a - b).abs().max().item() <= 1e-5


def test_logits_equal_those_of_transformers():
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    shape = {'n_positions': BLOCK, 'vocab_size': VOCAB, 'n_layer': 3, 'n_head': 4, 'n_embd': 64}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    ours, weights = tiny(bias=True), theirs.state_dict()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            # biases and gains too: as initialised they are 0 and 1, and would hide a mistake
            weights[name].normal_(std=0.3)
            parameter.copy_(weights[name].T if name.endswith(TRANSPOSED) else weights[name])
        idx = tokens(4, BLOCK)
        logits, loss = ours(idx)[0], ours(idx, idx)[1]
        assert logits.abs().max() > 1
        assert_close(logits, theirs(idx).logits)
        assert_close(loss, F.cross_entropy(theirs(idx).logits.flatten(0, 1), idx.flatten()))


def nanochat(n_kv_head):
    """The same shape as `transformers` builds it, with the weights of random, large numbers."""
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    shape = {'hidden_size': 64, 'num_hidden_layers': 3, 'num_attention_heads': 4}
    shape |= {'intermediate_size': 256, 'max_position_embeddings': BLOCK, 'vocab_size': VOCAB}
    torch.manual_seed(1)
    theirs = transformers.NanoChatForCausalLM(
        transformers.NanoChatConfig(num_key_value_heads=n_kv_head, **shape)
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return theirs


@pytest.mark.parametrize('n_kv_head', [1, 2, 4])
@pytest.mark.parametrize('direction', ['ours to theirs', 'theirs to ours'])
@torch.no_grad()
def test_modern_logits_equal_those_of_nanochat(n_kv_head, direction):
    theirs, ours = nanochat(n_kv_head), tiny(arch='modern', n_kv_head=n_kv_head)
    giver, taker = (ours, theirs) if direction == 'ours to theirs' else (theirs, ours)
    taker.load_state_dict(giver.state_dict())  # strict: the same names and shapes
    idx = tokens(4, BLOCK)
    expected, logits, loss = theirs(idx).logits, ours(idx)[0], ours(idx, idx)[1]
    assert logits.abs().max() > 3  # where the cap on the logits counts
    assert_close(logits, expected)
    assert_close(loss, F.cross_entropy(expected.flatten(0, 1), idx.flatten()))

    cache = KVCache(ours, rows=4)  # theirs has another name from version to version
    assert_close(ours(idx[:, :20], cache=cache)[0], expected[:, 19])
    for t in range(20, BLOCK):
        logits, _ = ours(idx[:, t : t + 1], cache=cache)
        assert_close(logits, expected[:, t])


def test_grouped_heads_shrink_the_cache():
    assert KVCache(tiny(**GROUPED), rows=1).kv.shape == (3, 2, 1, 2, BLOCK + 1, 16)


def test_the_rms_norm_has_the_gradient_of_torch_s():
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) * 3
    x[0, 0] = 0  # where only the epsilon keeps it finite
    gradients = []
    for norm in (model_module.rms_norm, lambda x: F.rms_norm(x, (8,), eps=1e-6)):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        (y * torch.arange(8)).sum().backward()
        gradients.append((y.detach(), leaf.grad))
    (y, grad), (expected_y, expected_grad) = gradients
    assert_close(y, expected_y)
    assert torch.allclose(grad, expected_grad, rtol=1e-4, atol=1e-4)


def test_the_squared_relu_has_its_gradient():
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model_module.squared_relu, x)
    assert torch.equal(model_module.squared_relu(x), F.relu(x).square())


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_eager_attention_equals_torch_s(groups):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 12, 8), *torch.randn(2, 2, 4 // groups, 12, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close(model_module.eager_attention(q, k, v, 0.0), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ('capability', 'dtype', 'masked', 'shared'),
    [
        ((8, 0), torch.bfloat16, False, True),
        ((9, 0), torch.float16, False, True),
        ((7, 5), torch.float16, False, False),  # no flash attention
        ((9, 0), torch.float32, False, False),  # nor here
        ((9, 0), torch.bfloat16, True, False),  # it has no mask
    ],
)
def test_heads_share_keys_on_a_gpu_only_where_flash_attention_runs(
    capability, dtype, masked, shared, monkeypatch
):
    calls = []

    def record(q, k, v, *args, is_causal, enable_gqa):
        calls.append((k.size(1), v.size(1), is_causal, enable_gqa))
        return q

    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', record)
    with FakeTensorMode(), torch.device('cuda'):
        q, k = torch.empty(1, 4, 8, 16, dtype=dtype), torch.empty(1, 2, 8, 16, dtype=dtype)
        mask = torch.empty(1, 1, 8, 8, dtype=torch.bool) if masked else None
        model_module.attention(q, k, k, mask=mask)
    heads = 2 if shared else 4
    assert calls == [(heads, heads, not masked, shared)]


class OnApple(torch.Tensor):
    """A tensor that claims to be on an Apple GPU."""

    device = torch.device('mps')


def apple_attention(q, k, v, *args, **options):
    """Torch before 2.12 on an Apple GPU, which assumed contiguous heads in each row."""
    in_a_run = (
        t.as_strided(t.shape, (t.size(1) * t.stride(1), *t.stride()[1:]), t.storage_offset())
        for t in (q, k, v)
    )
    return scaled_dot_product_attention(*in_a_run, *args, **options)


scaled_dot_product_attention = F.scaled_dot_product_attention


@torch.no_grad()
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_rows_are_not_mixed_up_on_apple_gpus(groups, monkeypatch):
    shape = {'n_layer': 1, 'n_head': 4, 'n_kv_head': 4 // groups}
    config = GPTConfig(16, VOCAB, arch='modern', n_embd=32, **shape)

    def results(kind):
        torch.manual_seed(0)
        cache, found = KVCache(GPT(config), rows=3), []
        for T in (5, 1, 2):  # a prompt, a token, a piece of a prompt
            qkv = torch.randn(3, T, 4 + 2 * (4 // groups), 8).as_subclass(kind)
            parts = qkv.split((4, 4 // groups, 4 // groups), dim=2)
            q, k, v = (t.transpose(1, 2) for t in parts)
            mask = torch.ones(3, 1, T, T, dtype=torch.bool).tril()
            found += [model_module.attention(q, k, v), model_module.attention(q, k, v, mask=mask)]
            cache.extend(3, T)
            found += [model_module.attention(q, k, v, cache=cache, layer=0)]
        return found

    expected = results(torch.Tensor)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', apple_attention)
    for got, right in zip(results(OnApple), expected, strict=True):
        assert_close(got, right)


@torch.no_grad()
def test_bfloat16_autocast_stays_near_float32(model):
    idx = tokens(2, BLOCK)
    exact, _ = model(idx)
    with torch.autocast('cpu', torch.bfloat16):
        rounded, _ = model(idx)
    assert 0 < (exact - rounded).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    ('shape', 'autocast', 'residual'),
    [
        ({}, torch.bfloat16, torch.float32),
        ({'bf16_residual': True}, torch.bfloat16, torch.bfloat16),
        ({'bf16_residual': True}, torch.float16, torch.float32),  # which could overflow
        ({'bf16_residual': True}, None, torch.float32),
        (MODERN, torch.bfloat16, torch.bfloat16),
        (MODERN, torch.float16, torch.float32),
    ],
)
def test_the_residual_stream_is_bfloat16_only_under_its_autocast(shape, autocast, residual):
    model, seen = tiny(**shape), set()
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, x: seen.update((args[0].dtype, x.dtype)))
    with torch.autocast('cpu', autocast, enabled=autocast is not None):
        model(tokens(2, BLOCK))
    assert seen == {residual}


@torch.no_grad()
def test_cached_logits_equal_uncached_ones_for_rows_of_different_lengths(model):
    idx, lengths = tokens(4, 20), torch.tensor([20, 5, 11, 1])
    rows = [row[:n].tolist() for row, n in zip(idx, lengths, strict=True)]
    cache = KVCache(model, rows=4)
    logits, _ = model(idx, cache=cache, lengths=lengths)
    for step in range(8):
        alone = [model(torch.tensor([row]))[0][0, -1] for row in rows]
        assert_close(logits, torch.stack(alone))
        new = tokens(4, 8)[:, step, None]
        rows = [row + token for row, token in zip(rows, new.tolist(), strict=True)]
        logits, _ = model(new, cache=cache)
    assert cache.pos.tolist() == [28, 13, 19, 9]


@torch.no_grad()
def test_a_prompt_can_be_cached_in_chunks(model):
    idx, cache = tokens(2, 24), KVCache(model, rows=2, max_length=24)
    for chunk in idx.split([10, 1, 13], dim=1):
        logits, _ = model(chunk, cache=cache)
    assert_close(logits, model(idx)[0][:, -1])
    with pytest.raises(AssertionError, match='full'):
        model(idx[:, :1], cache=cache)


@torch.no_grad()
def test_padding_does_not_affect_the_logits(model):
    idx, lengths, new = tokens(2, 12), torch.tensor([12, 4]), tokens(2, 1)
    results = []
    for padding in (0, VOCAB - 1):
        idx[1, 4:] = padding
        cache = KVCache(model, rows=2)
        first, _ = model(idx, cache=cache, lengths=lengths)
        cache.kv[:, :, 1, :, 4:] = 1e4 * padding  # whatever lies in columns the row has not reached
        second, _ = model(new, cache=cache)
        results.append((first, second))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@torch.no_grad()
def test_no_token_attends_to_a_later_one(model):
    idx = tokens(1, BLOCK)
    logits, _ = model(idx)
    idx[0, 20:] = 0
    assert_close(model(idx)[0][:, :20], logits[:, :20])


@torch.no_grad()
def test_the_loss_ignores_targets_of_minus_one(model):
    idx, targets = tokens(2, 16), tokens(2, 17)[:, 1:].clone()
    targets[0, 5:] = -1
    logits, no_loss = model(idx)
    no_logits, loss = model(idx, targets)
    kept = targets != -1
    assert_close(loss, F.cross_entropy(logits[kept], targets[kept]))
    assert no_loss is None
    assert no_logits is None  # autograd would keep them


@pytest.mark.parametrize('rows', [1, 7, 32])
def test_the_loss_in_chunks_has_the_value_and_the_gradients_of_the_whole(model, rows):
    idx, targets = tokens(2, 16), tokens(2, 17)[:, 1:].clone()
    targets[0, 5:] = -1  # some chunks have no target
    _, whole = model(idx, targets)
    whole.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    x = model.trunk(idx, torch.arange(16)).flatten(0, 1)
    loss = model_module.chunked_loss(model.head, x, targets.flatten(), rows)
    loss.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_loss_in_chunks_keeps_no_logits():
    head, x = torch.nn.Linear(8, 50, bias=False), torch.randn(64, 8, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model_module.chunked_loss(head, x, torch.zeros(64, dtype=torch.long), rows=16)
    assert not [shape for shape in kept if 50 in shape and shape != head.weight.shape]


@torch.no_grad()  # torch for CPUs has no backward pass on fake CUDA tensors
@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_only_an_eager_cuda_loss_of_many_logits_is_computed_in_chunks(device, monkeypatch):
    made, chunked = [], model_module.chunked_loss

    def count(head, x, targets, rows):
        made.append(rows)
        return chunked(head, x, targets, rows)

    monkeypatch.setattr(model_module, 'chunked_loss', count)
    monkeypatch.setattr(model_module, 'LOGITS_AT_ONCE', 32 * VOCAB)
    with FakeTensorMode(), torch.device(device), SkipRandom():
        model, idx = GPT(GPTConfig(BLOCK, VOCAB, 1, 2, 16)), torch.zeros(1, BLOCK, dtype=torch.long)
        model(idx, idx)
        assert made == []
        idx = idx.expand(3, BLOCK)
        model(idx, idx)
        assert made == ([32] if device == 'cuda' else [])
        made.clear()
        monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
        model(idx, idx)
        assert made == []


@torch.no_grad()
@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_dropout_is_active_only_in_training(arch):
    model, idx = tiny(dropout=0.5, arch=arch), tokens(2, 16)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize('p', [0.01, 0.3, 0.9])
def test_dropout_drops_its_fraction_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(7, 1001, 13, requires_grad=True)  # no multiple of the four elements of a word
    y = model_module.dropout(x, p, training=True)
    zero, kept = y.unique().tolist()
    assert (zero, kept) == (0.0, pytest.approx(1 / (1 - p), rel=1e-3))
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    y.sum().backward()
    assert torch.equal(x.grad, y)  # the gradient takes the same way
    columns = (y.detach()[..., :12].reshape(-1, 4).T == 0).float()
    assert (torch.corrcoef(columns) - torch.eye(4)).abs().max() < 0.03
    assert model_module.dropout(x, p, training=False) is x
    torch.manual_seed(0)
    assert torch.equal(model_module.dropout(x, p, training=True), y)


@torch.no_grad()
def test_cropping_the_context_keeps_the_logits_of_shorter_texts(model):
    idx = tokens(2, 8)
    logits, _ = model(idx)
    model.crop_block_size(8)
    assert torch.equal(model(idx)[0], logits)
    assert model.config.block_size == 8
    if model.config.arch == 'gpt2':
        assert model.transformer.wpe.weight.shape == (8, 64)
        assert model.transformer.wpe.weight.requires_grad
    assert KVCache(model, rows=1).max_length == 8


def test_block_matrices_are_all_matrices_of_the_blocks(model):
    names = {id(p): name for name, p in model.named_parameters()}
    held = [names[id(p)] for p in model.block_matrices()]
    assert len(set(held)) == len(held) == 3 * (4 if model.config.arch == 'gpt2' else 6)
    assert all('.h.' in name or '.layers.' in name for name in held)
    left = model.param_groups(0.1, exclude=model.block_matrices())
    left = {id(p) for group in left for p in group['params']}
    assert left | {id(p) for p in model.block_matrices()} == set(names)
    assert len(left) + len(held) == len(names)
    model.requires_grad_(False)
    assert model.block_matrices() == []


@pytest.mark.parametrize('bias', [True, False])
def test_param_groups_have_every_parameter_once_and_decay_only_matrices(bias):
    model = tiny(bias=bias)
    decay, rest = model.param_groups(0.1)
    assert (decay['weight_decay'], rest['weight_decay']) == (0.1, 0.0)
    held = [id(p) for p in decay['params'] + rest['params']]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() == 2 for p in decay['params'])
    assert all(p.dim() == 1 for p in rest['params'])
    assert any(name.endswith('.bias') for name, _ in model.named_parameters()) is bias


def test_sizes_are_those_of_gpt2():
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=50257, bias=True))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert model.num_params() == 124_439_808 - 1024 * 768
    # 6 for each parameter, 12 T for each channel of a layer: 742 + 113 MFLOP
    assert model.flops_per_token() == 6 * 123_653_376 + 12 * 12 * 768 * 1024


def test_parameters_have_the_names_of_transformers():
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    with torch.device('meta'):
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        ours = GPT(GPTConfig(vocab_size=50257, bias=True))
    shapes = {
        name: tuple(p.shape)[::-1] if name.endswith(TRANSPOSED) else tuple(p.shape)
        for name, p in theirs.named_parameters()
    }
    assert {name: tuple(p.shape) for name, p in ours.named_parameters()} == shapes


def test_initial_weights_have_the_std_of_gpt2():
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=64, vocab_size=512, n_layer=8, n_head=4, n_embd=128, bias=True)
    )
    for name, parameter in model.named_parameters():
        if name.endswith('.bias'):
            assert parameter.eq(0).all(), name
        elif '.ln_' in name:
            assert parameter.eq(1).all(), name
        else:  # what is added to the residual stream 2 * n_layer times starts smaller
            std = 0.02 / math.sqrt(16) if name.endswith('c_proj.weight') else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
    idx = torch.randint(512, (4, 64))
    _, loss = model(idx, torch.randint(512, (4, 64)))
    assert loss.item() == pytest.approx(math.log(512), rel=0.02)  # untrained


def test_modern_blocks_start_as_the_identity_and_all_tokens_equally_likely():
    torch.manual_seed(0)
    shape = {'block_size': 64, 'vocab_size': 512, 'n_layer': 3, 'n_head': 4, 'n_embd': 128}
    model = GPT(GPTConfig(arch='modern', **shape))
    for name, parameter in model.named_parameters():
        if name.endswith(('o_proj.weight', 'fc2.weight')):
            assert parameter.eq(0).all(), name
        elif '.layers.' in name:
            assert parameter.std().item() == pytest.approx(128**-0.5, rel=0.05), name
    idx = torch.randint(512, (4, 64))
    assert model(idx, idx)[1].item() == pytest.approx(math.log(512), rel=0.01)


def test_modern_sizes_count_the_multiplied_parameters():
    with torch.device('meta'):
        model = GPT(GPTConfig(arch='modern', vocab_size=50304, n_kv_head=4))
    blocks = 12 * (2 * 768**2 + 2 * 768 * 256 + 8 * 768**2)
    assert model.num_params() == blocks + 50304 * 768  # the head, not the embedding
    assert sum(p.numel() for p in model.parameters()) == blocks + 2 * 50304 * 768
    assert model.flops_per_token() == 6 * model.num_params() + 12 * 12 * 768 * 1024


def test_gpt2_ties_the_embedding_and_the_head():
    model = tiny()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert 'lm_head.weight' not in dict(model.named_parameters())


@pytest.mark.parametrize(
    ('bad', 'message', 'good'),
    [
        case(
            'cannot be split over n_head={} heads; use',
            {'n_embd': 100, 'n_head': 12},
            *('n_embd=100 .* n_head=12 .* use n_embd=96$', {'n_embd': 96, 'n_head': 12}),
        ),
        case(
            'cannot be split over n_head={} heads; use',
            {'n_embd': 4, 'n_head': 6},
            *('use n_embd=6$', {'n_embd': 6, 'n_head': 6}),
        ),
        case(
            'cannot be split over n_head={} heads; use',
            {**MODERN, 'n_embd': 34, 'n_head': 12},
            *('use n_embd=24$', {**MODERN, 'n_embd': 24, 'n_head': 12}),
        ),
        case('must be at least 1 and whole', {'n_layer': 0}, 'n_layer=0: must', {'n_layer': 1}),
        case('must be at least 1 and whole', {'n_layer': 1.5}, 'n_layer=1.5', {'n_layer': 1}),
        case('must be at least 0 and below 1', {'dropout': 1.0}, 'dropout=1.0', {'dropout': 0.0}),
        case("arch={}: must be 'gpt2' or", {'arch': 'llama'}, "arch='llama': must be", MODERN),
        case(
            "arch='modern' has no biases",
            {**MODERN, 'bias': True},
            *('bias=True: .* use --bias=False', {**MODERN, 'bias': False}),
        ),
        case(
            'rotary embeddings need an even',
            {**MODERN, 'n_head': 4, 'n_embd': 36},
            *('heads of 9, .* use n_embd=32$', {**MODERN, 'n_head': 4, 'n_embd': 32}),
        ),
        case(
            'cannot serve n_head={} heads',
            {**MODERN, 'n_kv_head': 5},
            *('n_head=12 .* use one of 1, 2, 3, 4, 6, 12$', {**MODERN, 'n_kv_head': 6}),
        ),
        case("use n_kv_head=None or arch='modern'", {'n_kv_head': 4}, 'n_kv_head=4: ', {}),
        case(
            "use n_kv_head=None or arch='modern'",
            {'n_kv_head': 4},
            *('always has n_head=12', {**MODERN, 'n_kv_head': 4}),
        ),
    ],
)
def test_an_invalid_shape_is_refused_and_the_advised_one_is_valid(bad, message, good):
    with pytest.raises(ConfigError, match=message) as error, as_config_error():
        GPTConfig(**bad)
    assert '\n' not in str(error.value)
    GPTConfig(**good)


@error_line('the model has n_layer={}; use less')
def test_no_more_blocks_can_be_frozen_than_there_are(model):
    with pytest.raises(ConfigError, match='freeze=4: the model has n_layer=3'):
        with as_config_error():
            model.freeze_lower(4)
    model.freeze_lower(2)
    trained = [any(p.requires_grad for p in block.parameters()) for block in model.blocks]
    assert trained == [False, False, True]


# --- documents


ROW = torch.tensor([[0] * 9 + [1] * 11 + [2] * 12, [3] * 32])  # document numbers, (2, BLOCK)


def use_eager_attention(monkeypatch):
    """Have float32 take the path that bfloat16 takes on a CPU."""
    by_products = model_module.eager_attention

    def attend(q, k, v, mask=None, dropout_p=0.0, **options):
        return by_products(q, k, v, dropout_p, mask)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', attend)


@pytest.mark.parametrize('path', ['torch', 'eager', 'recomputed'])
def test_no_information_leaks_between_documents(model, path, monkeypatch):
    if path == 'eager':
        use_eager_attention(monkeypatch)
    model.trunk.recompute = path == 'recomputed'
    seen = []
    model.embedding.register_forward_hook(lambda *args: seen.append(args[2]))
    for documents in (ROW, None):
        logits, _ = model(tokens(2, BLOCK), documents=documents)
        seen[-1].retain_grad()
        loss = F.cross_entropy(logits[0, 9:20], tokens(2, BLOCK)[0, 9:20])  # of the second
        loss.backward()
    masked, plain = (x.grad[0].abs().amax(1) for x in seen)
    assert not masked[:9].any()
    assert not masked[20:].any()
    assert (masked[9:20] > 1e-6).all()
    assert (plain[:9] > 1e-6).all()  # what leaked without the mask


@torch.no_grad()
def test_a_document_gives_the_same_logits_as_it_does_alone(model, monkeypatch):
    idx = tokens(2, BLOCK)
    masked = model(idx, documents=ROW)[0]
    assert_close(masked[1], model(idx)[0][1])  # one document is the whole row
    assert_close(masked[0, :9], model(idx)[0][0, :9])
    pos = torch.arange(9, 20)
    if model.config.arch == 'modern':  # whose positions are relative: where it stands is the same
        pos -= 9
    alone = model.head(model.trunk(idx[:1, 9:20], pos))[0]
    assert_close(masked[0, 9:20], alone)
    use_eager_attention(monkeypatch)
    assert_close(masked, model(idx, documents=ROW)[0])


@torch.no_grad()
def test_only_the_equality_of_document_numbers_matters(model):
    idx = tokens(2, BLOCK)
    assert torch.equal(model(idx, documents=ROW)[0], model(idx, documents=7 - ROW)[0])


def test_the_mask_of_bfloat16_is_that_of_float32(model):
    idx = tokens(2, BLOCK)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        logits = model(idx, documents=ROW)[0]
        other = model(torch.cat([tokens(3, 9)[2:], idx[:1, 9:]], 1), documents=ROW[:1])[0]
    assert torch.equal(logits[0, 9:], other[0, 9:])  # whatever the first document says
    assert not torch.equal(logits[0, :9], other[0, :9])
