"""Weights for inference: packed with equal numbers, int8 with nearly equal ones."""

import pytest
import torch
from torch import nn

from flatgpt import runtime
from flatgpt.errors import ConfigError
from flatgpt.inference import quantize
from flatgpt.inference.kv_cache import KVCache
from flatgpt.inference.quantize import Int8Linear, PackedLinear, can_pack, prepare_for_inference
from model import GPT, GPTConfig

ARCHITECTURES = [{'bias': True}, {'arch': 'modern', 'n_kv_head': 2}]
packs = pytest.mark.skipif(
    not can_pack(torch.zeros(1)), reason='oneDNN packs no matrices on this machine'
)


def tiny(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 97, n_layer=2, n_head=4, n_embd=64, **changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def kinds(model):
    held = [value for m in model.modules() for value in [*vars(m).values(), *m.children()]]
    return {type(value) for value in held if 'Linear' in type(value).__name__}


@packs
@pytest.mark.parametrize('changes', ARCHITECTURES, ids=['gpt2', 'modern'])
@torch.inference_mode()
def test_packed_matrices_give_the_same_logits_for_any_number_of_rows(changes):
    plain, prepared = tiny(**changes), prepare_for_inference(tiny(**changes))
    assert kinds(prepared) == {PackedLinear}
    for rows, tokens in ((1, 1), (3, 7), (40, 5)):
        idx = torch.randint(97, (rows, tokens))
        torch.testing.assert_close(prepared(idx)[0], plain(idx)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('changes', ARCHITECTURES, ids=['gpt2', 'modern'])
@torch.inference_mode()
def test_a_prepared_models_cache_changes_nothing(changes):
    model, idx = prepare_for_inference(tiny(**changes)), torch.randint(97, (3, 20))
    cache = KVCache(model, rows=3)
    torch.testing.assert_close(model(idx[:, :9], cache=cache)[0], model(idx)[0][:, 8])
    for t in range(9, 20):
        cached, _ = model(idx[:, t : t + 1], cache=cache)
        torch.testing.assert_close(cached, model(idx)[0][:, t], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('bias', [False, True])
@torch.inference_mode()
def test_int8_is_within_half_a_step_of_each_weight_for_few_rows_and_for_many(bias, dtype):
    torch.manual_seed(0)
    plain = nn.Linear(64, 48, bias=bias).to(dtype)
    plain.weight[5] = 0  # an output that needs no scale
    int8 = Int8Linear(plain)
    step = plain.weight.abs().amax(1, keepdim=True).float() / 127
    back = int8.weight * int8.scale[:, None].float()
    assert ((back - plain.weight.float()).abs() <= 0.505 * step).all()
    for rows in (1, 5, quantize.DEQUANTIZE_ROWS, 200):
        x = torch.randn(rows, 64).to(dtype)
        exact = x.float() @ back.T + (plain.bias.float() if bias else 0)
        assert (int8(x).float() - exact).abs().max() < 0.02 * exact.abs().max()
        assert torch.equal(int8(x[None]), int8(x)[None])


@pytest.mark.parametrize('changes', ARCHITECTURES, ids=['gpt2', 'modern'])
@torch.inference_mode()
def test_int8_barely_changes_the_log_probabilities(changes):
    plain, int8 = (
        tiny(torch.bfloat16, **changes),
        prepare_for_inference(tiny(torch.bfloat16, **changes), 'int8'),
    )
    assert kinds(int8) == {Int8Linear}
    idx = torch.randint(97, (4, 64))
    exact, rounded = (model(idx)[0].float().log_softmax(-1) for model in (plain, int8))
    assert 0 < (exact - rounded).abs().mean() < 0.03


@pytest.mark.parametrize('bf16_is_faster', [True, False])
def test_dequantized_weights_are_multiplied_in_what_the_processor_is_fast_in(
    monkeypatch, bf16_is_faster
):
    monkeypatch.setattr(runtime, 'bf16_is_faster', lambda: bf16_is_faster)
    linear = nn.Linear(32, 48).bfloat16()
    x = torch.randn(2, quantize.DEQUANTIZE_ROWS, 32).bfloat16()
    expected, packed, kinds, product = linear(x), Int8Linear(linear), [], quantize.F.linear
    monkeypatch.setattr(quantize.F, 'linear', lambda x, w: kinds.append(x.dtype) or product(x, w))
    y = packed(x)
    assert kinds == [torch.bfloat16 if bf16_is_faster else torch.float32]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)


def test_int8_with_another_dtype_is_an_error():
    with pytest.raises(ConfigError, match=r"'float16'.*--dtype=bfloat16"):
        prepare_for_inference(tiny(torch.float16), 'int8')


def test_int8_on_a_device_without_its_product_is_an_error(monkeypatch):
    monkeypatch.setattr(
        torch._C, '_dispatch_has_kernel_for_dispatch_key', lambda operator, key: False
    )
    with pytest.raises(ConfigError, match='no int8 matmul on cpu'):
        prepare_for_inference(tiny(torch.bfloat16), 'int8')


def test_int8_on_a_gpu_without_bfloat16_is_an_error(monkeypatch):
    monkeypatch.setattr(
        torch._C, '_dispatch_has_kernel_for_dispatch_key', lambda operator, key: True
    )
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **_: False)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Tesla T4')
    with pytest.raises(
        ConfigError, match='Tesla T4 lacks; remove --quantize and use --dtype=float16'
    ):
        quantize.check_int8_device('cuda:0')
    quantize.check_int8_device('cpu')
