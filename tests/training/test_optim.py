"""Muon: its update compared with torch.optim.Muon, and the parameters that it trains."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from flatgpt.errors import ConfigError
from flatgpt.parallel import shard_like
from flatgpt.training.memory import fake_ranks
from flatgpt.training.optim import AdamW, Muon, build_optimizers, orthogonalize
from model import GPT, GPTConfig

SETTINGS = {'lr': 0.02, 'weight_decay': 0.1, 'momentum': 0.95}
SHAPES = [(24, 24), (24, 24), (24, 96), (96, 24), (24, 96), (8, 24)]  # square, wide and tall


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    return parameters, generator


def give_gradients(parameters, generator):
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def model(arch='modern'):
    torch.manual_seed(0)
    shape = {'block_size': 16, 'vocab_size': 31, 'n_layer': 2, 'n_head': 2, 'n_embd': 16}
    return GPT(GPTConfig(arch=arch, **shape))


def test_steps_agree_with_those_of_torch():
    """To bfloat16's rounding, in which both iterate: 2^-8 of entries below 1."""
    (ours, generator), (theirs, _) = matrices(), matrices()
    mine, reference = Muon(ours, **SETTINGS), torch.optim.Muon(theirs, **SETTINGS)
    for _ in range(3):
        before = [p.detach().clone() for p in ours]
        give_gradients(ours, generator)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
        for a, b, start in zip(ours, theirs, before, strict=True):
            moved = (a - start).norm()
            assert (a - b).norm() < 0.01 * moved
            assert moved > 0.01
            b.data.copy_(a)  # each step is compared for itself


def test_a_stack_is_orthogonalised_as_each_matrix_alone():
    stack = torch.randn(5, 16, 40, generator=torch.Generator().manual_seed(0))
    together = orthogonalize(stack)
    for one, alone in zip(together, stack, strict=True):
        assert torch.allclose(one, orthogonalize(alone[None])[0], atol=0.02)
    values = torch.linalg.svdvals(together.float())
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_gradient_of_zero_or_none_moves_nothing():
    (parameters, _) = matrices()
    optimizer = Muon(parameters, **{**SETTINGS, 'weight_decay': 0.0})
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters[1:]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert len(optimizer.state) == len(parameters) - 1


def build(name, model, learning_rate):
    rest = {'betas': (0.9, 0.95), 'muon_lr': 0.02, 'muon_momentum': 0.95, 'weight_decay': 0.1}
    return build_optimizers(name, model, learning_rate=learning_rate, **rest)


def test_adamw_s_steps_are_torchs():
    (ours, generator), (theirs, _) = matrices(), matrices()
    options = {'lr': 0.01, 'betas': (0.8, 0.95), 'weight_decay': 0.1, 'fused': True}
    mine, reference = AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(3):
        give_gradients(ours, generator)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
        assert all(map(torch.equal, ours, theirs))


def test_the_compiler_is_not_imported_to_train_without_it():
    code = """
import sys, torch
from flatgpt.training.optim import AdamW, Muon
one, two = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
for optimizer in (AdamW([one], fused=True), Muon([two], 0.1, 0.1, 0.9)):
    one.grad = two.grad = torch.ones(4, 4)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
sys.exit('torch._dynamo' in sys.modules)
"""
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


@pytest.fixture
def offloaded(monkeypatch):
    """A matrix whose rows lie on the host, of a model on two GPUs; fake, as there may be none."""
    to = torch.Tensor.to

    def to_first(self, device, *others, **options):  # a build without CUDA has no current GPU
        return to(self, 'cuda:0' if str(device) == 'cuda' else device, *others, **options)

    monkeypatch.setattr(torch.Tensor, 'to', to_first)
    meta = TensorMeta(torch.Size((8, 16)), (16, 1), torch.float32)

    def rows():
        spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=meta)
        return DTensor(torch.ones(4, 16), spec, requires_grad=False)

    with fake_ranks(2):
        mesh = init_device_mesh('cuda', (2,))
        with FakeTensorMode():
            parameter = torch.nn.Parameter(rows())
            parameter.grad = rows()
            yield parameter


def test_an_offloaded_matrix_is_orthogonalised_on_the_gpu_and_stays_on_the_host(offloaded):
    optimizer, stacks = Muon([offloaded], **SETTINGS), []
    optimizer.orthogonalize = lambda stack, dtype: stacks.append(stack) or stack
    optimizer.step()
    (stack,) = stacks
    assert (stack.device.type, tuple(stack.shape)) == ('cuda', (1, 8, 16))
    momentum = optimizer.state[offloaded]['momentum_buffer']
    for tensor in (offloaded, momentum, shard_like(torch.ones(8, 16), offloaded)):
        assert tensor.to_local().device.type == 'cpu'
        assert tuple(tensor.to_local().shape) == (4, 16)


@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_muon_takes_the_blocks_matrices_and_adamw_the_rest(arch):
    built = model(arch)
    adamw, muon = build('muon', built, learning_rate=4e-3)
    names = {id(p): name for name, p in built.named_parameters()}
    (group,) = muon.param_groups
    assert len(group['params']) == 2 * (4 if arch == 'gpt2' else 6)
    assert all('.h.' in names[id(p)] or '.layers.' in names[id(p)] for p in group['params'])
    assert group['lr_ratio'] == 5.0
    rest = {names[id(p)] for group in adamw.param_groups for p in group['params']}
    assert len(rest) + len(group['params']) == len(names)
    assert all(group['lr_ratio'] == 1.0 for group in adamw.param_groups)
    assert all(group['weight_decay'] == 0.0 for group in adamw.param_groups)
    assert group['weight_decay'] == 0.1


def test_adamw_alone_takes_everything():
    built = model()
    (adamw,) = build('adamw', built, learning_rate=0.0)
    assert sum(len(g['params']) for g in adamw.param_groups) == len(list(built.parameters()))


def test_muon_without_a_matrix_is_one_line():
    built = model()
    for block in built.blocks:
        block.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"optimizer='muon': the model has no matrix .*=adamw"):
        build('muon', built, learning_rate=1e-3)
    with pytest.raises(ConfigError, match="learning_rate=0: optimizer='muon'"):
        build('muon', model(), learning_rate=0.0)
