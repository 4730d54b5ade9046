"""Muon: its update compared with a plain one, and the parameters that it trains."""

import math
import subprocess
import sys
from collections import Counter
from itertools import chain

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils._python_dispatch import TorchDispatchMode

from flatgpt.checkpoint.load import load_optimizer
from flatgpt.checkpoint.save import save_checkpoint
from flatgpt.errors import ConfigError
from flatgpt.parallel import shard_like
from flatgpt.training import optim
from flatgpt.training.memory import fake_ranks
from flatgpt.training.optim import (
    POLAR_EXPRESS,
    AdamW,
    Muon,
    build_optimizers,
    make_buckets,
    orthogonalize,
)
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


def plain_step(p, mean, square, lr, weight_decay, momentum, beta2=0.95):
    """A step of one matrix, as the papers write it; changes p, mean and square in place."""
    R, C = p.shape
    mean.lerp_(p.grad, 1 - momentum)
    x = torch.lerp(p.grad, mean, momentum)
    x = x.mT if R > C else x
    x = x / (1.02 * x.norm())
    for a, b, c in POLAR_EXPRESS[:3]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if R > C else x
    square.lerp_(x.square().mean(1, keepdim=True), 1 - beta2)
    x = x * (square.mean() / square).sqrt()
    p.data -= lr * weight_decay * p.data + lr * max(1, R / C) ** 0.5 * x


@pytest.mark.parametrize(('dtype', 'error'), [(torch.float32, 1e-4), (torch.bfloat16, 0.08)])
def test_steps_agree_with_plain_ones_of_single_matrices(monkeypatch, dtype, error):
    """To the rounding of the products."""
    monkeypatch.setattr(optim, 'product_dtype', lambda device: dtype)
    (ours, generator), (theirs, _) = matrices(), matrices()
    mine = Muon(ours, **SETTINGS)
    state = [(torch.zeros_like(p), torch.zeros(p.size(0), 1)) for p in theirs]
    for _ in range(3):
        before = [p.detach().clone() for p in ours]
        give_gradients(ours, generator)
        mine.step()
        for a, b, start, (mean, square) in zip(ours, theirs, before, state, strict=True):
            b.grad = a.grad.clone()
            plain_step(b, mean, square, **SETTINGS)
            moved = (a - start).norm()
            assert (a - b).norm() < error * moved
            assert moved > 0.01
            b.data.copy_(a)  # each step is compared for itself


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_stack_is_orthogonalised_as_each_matrix_alone(dtype):
    stack = 1e-6 * torch.randn(5, 16, 40, generator=torch.Generator().manual_seed(0))
    together = orthogonalize(stack, dtype=dtype)
    for one, alone in zip(together, stack, strict=True):
        assert torch.allclose(one, orthogonalize(alone[None], dtype=dtype)[0], atol=0.02)
    values = torch.linalg.svdvals(together.float())
    assert values.min() > 0.1
    assert values.max() < 2.0


def test_the_singular_values_of_a_large_matrix_end_near_1():
    stack = torch.randn(1, 520, 640, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(stack, dtype=torch.float32))
    assert values.min() > 0.7
    assert values.max() < 1.2


def test_a_gpu_without_bfloat16_multiplies_in_float16(monkeypatch):
    cuda = torch.device('cuda')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        supported = lambda including_emulation, has=has_bf16: has or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', supported)
        assert optim.product_dtype(cuda) == dtype


class CountOperations(TorchDispatchMode):
    """Counts what is computed; views are not."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.counts[str(function)] += 1
        return function(*args, **kwargs or {})

    def __enter__(self):
        self.counts = Counter()
        return super().__enter__()


def test_the_number_of_operations_does_not_grow_with_the_number_of_matrices():
    counts = []
    for times in (1, 10):
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES * times]
        optimizer = Muon(parameters, **SETTINGS)
        for _ in range(2):
            give_gradients(parameters, None)
            with CountOperations() as operations:
                optimizer.step()
        counts.append(operations.counts)
    assert counts[0] == counts[1]
    products = sum(n for name, n in counts[0].items() if 'bmm' in name)
    assert products == 3 * 9  # stacks of three shapes


def test_buckets_bound_the_elements_updated_at_once_and_change_no_bit(monkeypatch):
    ends = []
    for size in (2**27, 2 * 24 * 96, 1):
        monkeypatch.setattr(optim, 'BUCKET_SIZE', size)
        parameters, generator = matrices()
        buckets = make_buckets(parameters)
        assert sorted(map(id, chain(*buckets))) == sorted(map(id, parameters))
        for bucket in buckets:
            assert len(bucket) == 1 or sum(p.numel() for p in bucket) <= size
        optimizer = Muon(parameters, **SETTINGS)
        for _ in range(2):
            give_gradients(parameters, generator)
            optimizer.step()
        ends.append(parameters)
    assert all(map(torch.equal, ends[0], ends[1]))
    assert all(map(torch.equal, ends[0], ends[2]))


def test_a_large_stack_is_divided_equally(monkeypatch):
    monkeypatch.setattr(optim, 'BUCKET_SIZE', 4 * 64)
    squares = [torch.empty(8, 8) for _ in range(6)]
    assert [len(bucket) for bucket in make_buckets(squares)] == [3, 3]  # not 4 and 2


# -----------------------------------------------------------------------------
# skipped and captured updates


def state_of(optimizers):
    """Copies of all that a step changes: the parameters, then the state of each."""
    pairs = [(p, each) for each in optimizers for g in each.param_groups for p in g['params']]
    states = [sorted(each.state.get(p, {}).items()) for p, each in pairs]
    tensors = [p for p, _ in pairs] + [value for state in states for _, value in state]
    return [tensor.detach().clone() for tensor in tensors]


def give_model_gradients(built, generator, value=None):
    for parameter in built.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        if value is not None:
            parameter.grad.view(-1)[::3] = value


@pytest.mark.parametrize('capturable', [False, True])
@pytest.mark.parametrize('value', [math.nan, math.inf, 1.0])
def test_a_step_with_found_inf_changes_nothing(capturable, value):
    built, generator = model(), torch.Generator().manual_seed(0)
    optimizers = build('muon', built, 1e-3, capturable=capturable)
    found_inf = torch.ones(())
    for optimizer in optimizers:
        optimizer.found_inf = found_inf
    before = state_of(optimizers)  # the first step creates more
    for skip in (1.0, 0.0, 1.0):
        found_inf.fill_(skip)
        give_model_gradients(built, generator, value if skip else None)
        for optimizer in optimizers:
            optimizer.step()
        assert all(map(torch.equal, before, state_of(optimizers))) == bool(skip)
        before = state_of(optimizers)


def test_found_inf_of_zero_changes_no_bit():
    ends = []
    for found_inf in (None, torch.zeros(())):
        built, generator = model(), torch.Generator().manual_seed(0)
        optimizers = build('muon', built, 1e-3)
        for _ in range(3):
            give_model_gradients(built, generator)
            for optimizer in optimizers:
                optimizer.found_inf = found_inf
                optimizer.step()
        ends.append(state_of(optimizers))
    assert all(map(torch.equal, *ends))


def test_a_sharded_step_with_found_inf_changes_nothing():
    with fake_ranks(2):
        mesh = init_device_mesh('cpu', (2,))
        meta = TensorMeta(torch.Size((8, 16)), (16, 1), torch.float32)
        spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=meta)
        parameter = torch.nn.Parameter(DTensor(torch.ones(4, 16), spec, requires_grad=False))
        parameter.grad = DTensor(torch.full((4, 16), math.nan), spec, requires_grad=False)
        for optimizer in (AdamW([parameter], fused=True), Muon([parameter], **SETTINGS)):
            optimizer.found_inf = torch.ones(())
            optimizer.step()
            assert torch.equal(parameter.to_local(), torch.ones(4, 16))
            assert all(isinstance(v, DTensor) for v in [*optimizer.state[parameter].values()][-1:])


def test_learning_rates_of_a_captured_update_are_filled_in_place():
    """The steps agree to float32's rounding of the learning rate."""
    eager, captured = model(), model()
    generators = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    one, two = build('muon', eager, 1e-3), build('muon', captured, 1e-3, capturable=True)
    for step in range(3):
        for group, same in zip(
            (group for each in one for group in each.param_groups),
            (group for each in two for group in each.param_groups),
            strict=True,
        ):
            group['lr'] = group['lr_ratio'] * 1e-3 / (step + 1)
            assert same['lr_ratio'] == group['lr_ratio']
            same['lr'].fill_(group['lr'])
        give_model_gradients(eager, generators[0])
        give_model_gradients(captured, generators[1])
        for optimizer in (*one, *two):
            optimizer.step()
    for a, b in zip(eager.parameters(), captured.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize('before', [False, True])
def test_a_checkpoint_of_a_captured_run_and_another_are_alike(tmp_path, before):
    """Each resumes the other; no learning rate is saved."""
    tokenizer, state = None, {'step': 1, 'evaluated': False, 'val_loss': None}
    ends = []
    for resumed in (False, True):
        built, generator = model(), torch.Generator().manual_seed(0)
        optimizers = build('muon', built, 1e-3, capturable=before)
        for step in range(4):
            if step == 2 and resumed:
                path = save_checkpoint(tmp_path, built, optimizers, tokenizer, state)
                optimizers = build('muon', built, 1e-3, capturable=not before)
                load_optimizer(path, built, optimizers)
                lrs = [g['lr'] for each in optimizers for g in each.param_groups]
                assert all(isinstance(lr, torch.Tensor) != before for lr in lrs)
            give_model_gradients(built, generator)
            for optimizer in optimizers:
                optimizer.step()
        ends.append(state_of(optimizers))
    for a, b in zip(*ends, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_a_cuda_graph_of_a_step_computes_what_the_step_does():
    built = [model().cuda() for _ in range(2)]
    eager, captured = (build('muon', each, 1e-3, capturable=True) for each in built)
    found_inf = torch.zeros((), device='cuda')
    for each in built:
        give_model_gradients(each, torch.Generator().manual_seed(0))
    for optimizer in (*eager, *captured):
        optimizer.found_inf = found_inf
        optimizer.step()  # creates the state
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for optimizer in captured:
            optimizer.step()
    for skip in (0.0, 1.0, 0.0):
        found_inf.fill_(skip)
        for optimizer in eager:
            optimizer.step()
        graph.replay()
        for a, b in zip(*(each.parameters() for each in built), strict=True):
            assert torch.equal(a.cpu(), b.cpu())


# -----------------------------------------------------------------------------
# which optimizer trains what


def test_a_gradient_of_zero_or_none_moves_nothing():
    (parameters, _) = matrices()
    optimizer = Muon(parameters, **{**SETTINGS, 'weight_decay': 0.0})
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters[1:]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert len(optimizer.state) == len(parameters) - 1


def build(name, model, learning_rate, **options):
    rest = {'betas': (0.9, 0.95), 'muon_lr': 0.02, 'muon_momentum': 0.95, 'weight_decay': 0.1}
    return build_optimizers(name, model, learning_rate=learning_rate, **rest, **options)


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


@pytest.mark.parametrize('compile', [False, True])
def test_neurons_are_divided_by_their_usual_size_compiled_or_not(monkeypatch, compile):
    monkeypatch.setattr(torch, 'compile', lambda function, dynamic: 'compiled')
    _, muon = build('muon', model(), learning_rate=4e-3, compile=compile)
    assert muon.param_groups[0]['beta2'] == 0.95
    assert (muon.orthogonalize == 'compiled') == compile


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
