"""One model over several processes learns what one process would: whole in each, or in rows."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import MODERN, metrics, steps
from safetensors import safe_open
from test_faults import SHARE

from checkpoint import MODEL, find, read_tensors
from configurator import ConfigError
from parallel import check_shard, cut_like, local, settle, sync_gradients, whole
from runtime import Runtime

# 24 sequences a step, 4 at a time: every rank accumulates. The validation split has 37 windows,
# which no number of ranks shares equally. The norm of the gradient is above what it is clipped to.
TWENTY = ('--gradient_accumulation_steps=6', '--max_iters=20', '--grad_clip=0.3')
TWENTY += ('--eval_iters=None', '--eval_interval=10', '--n_layer=2')
ADAMW = ('--arch=modern', '--n_kv_head=1')
MUON = ('--optimizer=muon', '--muon_lr=0.05')
KINDS = {'gpt2': (), 'modern': ADAMW, 'gpt2-muon': MUON, 'modern-muon': MODERN}
# Muon iterates in bfloat16, where a last digit of the gradient can turn a rounding
TOLERANCE = {'gpt2': 1e-5, 'modern': 1e-5, 'gpt2-muon': 1e-4, 'modern-muon': 1e-4}


@pytest.fixture(scope='module')
def alone(run_here, tmp_path_factory):
    """The run of one process, of each kind -> its folder."""
    made = {}

    def run(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp('alone') / kind
            run_here(f'--out_dir={made[kind]}', *TWENTY, *KINDS[kind])
        return made[kind]

    return run


def agree(one, two, tolerance):
    for key in ('loss', 'train_loss', 'val_loss', 'val_bpb'):
        expected, got = metrics(one, key), metrics(two, key)
        assert list(got) == list(expected)
        assert list(got.values()) == pytest.approx(list(expected.values()), rel=tolerance), key


def trains_as_one(ranks, alone, tmp_path, kind, world, *how):
    crew = ranks(world, f'--out_dir={tmp_path}', *TWENTY, *KINDS[kind], *how)
    assert crew.end() == [0] * world, crew.err
    assert crew.err == ''
    assert crew.out.count('validation loss') == 1  # one of them prints
    assert (tmp_path / 'DONE').exists()
    agree(alone(kind), tmp_path, TOLERANCE[kind])
    norms = metrics(tmp_path, 'grad_norm')
    assert list(norms.values()) == pytest.approx(
        list(metrics(alone(kind), 'grad_norm').values()), rel=100 * TOLERANCE[kind]
    )
    assert min(norms.values()) > 0.3  # so that they are clipped


@pytest.mark.parametrize(('world', 'kind'), [(2, 'gpt2'), (3, 'modern-muon')])
def test_a_sharded_model_learns_as_a_whole_one(ranks, alone, tmp_path, world, kind):
    trains_as_one(ranks, alone, tmp_path, kind, world, '--shard')
    assert steps(tmp_path) == [10, 20]
    path = find(tmp_path, 'last')
    parts = sorted(file.name for file in path.glob('model*'))
    assert parts == [f'model-{n:05d}-of-{world:05d}.safetensors' for n in range(1, world + 1)]
    named, expected = (dict(read_tensors(p, MODEL)) for p in (path, find(alone(kind), 'last')))
    assert ('lm_head.weight' in named) == (kind != 'gpt2')  # GPT-2's is the embedding's, saved once
    assert list(named) == list(expected)
    for name, tensor in expected.items():
        assert named[name].shape == tensor.shape
        assert torch.allclose(named[name], tensor, atol=2e-3), name


CASES = [(world, how) for world in (1, 2, 3, 4) for how in ('ddp', 'shard')]


@pytest.mark.faults
@pytest.mark.parametrize(('world', 'how'), CASES)
def test_any_number_of_processes_learns_as_one(ranks, alone, tmp_path, world, how):
    kinds = list(KINDS)
    if SHARE < 1:  # one of the four
        kinds = [kinds[CASES.index((world, how)) % 4]]
    for kind in kinds:
        flags = ('--shard',) if how == 'shard' else ()
        trains_as_one(ranks, alone, tmp_path / kind, kind, world, *flags)


# 5 rows are dealt to 4 ranks as 2, 2, 1 and none
FEW = ('--n_embd=6', '--n_head=1', '--bias', '--max_iters=3', '--gradient_accumulation_steps=6')


@pytest.mark.faults
def test_a_rank_without_rows_trains_and_saves_and_is_read_again(ranks, run_here, tmp_path):
    crew = ranks(4, f'--out_dir={tmp_path}/four', *FEW, '--shard', '--save_interval=1')
    assert crew.end() == [0] * 4, crew.err
    path = find(tmp_path / 'four', 'last')
    with safe_open(path / 'model-00004-of-00004.safetensors', 'pt') as last:
        assert last.get_slice('transformer.ln_f.weight').get_shape() == [0]
    run_here(f'--out_dir={tmp_path}/one', *FEW)
    agree(tmp_path / 'one', tmp_path / 'four', 1e-5)
    more = (*FEW, '--init_from=resume', '--max_iters=5')
    crew = ranks(4, f'--out_dir={tmp_path}/four', *more, '--shard')
    assert crew.end() == [0] * 4, crew.err
    run_here(f'--out_dir={tmp_path}/one', *more)
    agree(tmp_path / 'one', tmp_path / 'four', 1e-5)


# what a run goes through: how many processes, and whether the model is sharded
LEGS = [(0, False), (2, False), (3, True), (1, True), (2, True), (3, False), (0, False)]


@pytest.mark.faults
@pytest.mark.parametrize('kind', ['gpt2', 'modern-muon'])
def test_a_run_goes_from_one_number_of_processes_to_another(ranks, run_here, tmp_path, kind):
    args = ('--gradient_accumulation_steps=6', '--lr_decay_iters=200', '--n_layer=2', *KINDS[kind])
    args += ('--eval_interval=1000', '--eval_iters=None', '--muon_lr=0.02')
    for leg, (world, shard) in enumerate(LEGS):
        if leg:  # as if nothing had changed, for comparison
            shutil.copytree(tmp_path / 'many', tmp_path / str(leg))
        flags = (f'--max_iters={10 * leg + 10}', '--auto_resume')
        run_here(f'--out_dir={tmp_path}/{leg}', *args, *flags, '--shard=False')
        crew = ranks(world, f'--out_dir={tmp_path}/many', *args, *flags, f'--shard={shard}')
        assert crew.end() == [0] * max(1, world), crew.err
        got, expected = metrics(tmp_path / 'many'), metrics(tmp_path / str(leg))
        assert list(got) == list(expected) == list(range(1, 10 * leg + 11))
        assert got == pytest.approx(expected, rel=1e-5 if kind == 'gpt2' else 1e-4)
        assert got[10 * leg + 1] == pytest.approx(expected[10 * leg + 1], rel=1e-6)


@pytest.mark.faults
@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler here')
def test_a_sharded_model_is_compiled_block_by_block(ranks, alone, tmp_path):
    env = {'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache'), 'PATH': os.environ['PATH']}
    args = (*TWENTY, '--shard', '--compile=True')
    crew = ranks(2, f'--out_dir={tmp_path}/run', *args, env=env)
    assert crew.end(300) == [0, 0], crew.err
    assert 'compiling the model' in crew.out
    assert 'which failed' not in crew.out
    agree(alone('gpt2'), tmp_path / 'run', 1e-4)
    names = [name for name, _ in read_tensors(find(tmp_path / 'run', 'last'), MODEL)]
    assert names == [name for name, _ in read_tensors(find(alone('gpt2'), 'last'), MODEL)]


def test_sharding_without_other_processes_says_how_to_start_them(run_here, tmp_path):
    with pytest.raises(ConfigError, match=r'shard=True .*torchrun --standalone') as caught:
        run_here(f'--out_dir={tmp_path}/run', '--shard')
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'run').exists()


def test_offloading_from_the_host_to_the_host_is_refused(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    with pytest.raises(ConfigError, match='offload=True: cpu is the host'):
        check_shard(Runtime('cpu', torch.float32), offload=True)
    check_shard(Runtime('cuda:0', torch.float32), offload=True)


def test_gradients_are_exchanged_once_a_step():
    whole_model, said = SimpleNamespace(), []
    sharded = SimpleNamespace(set_requires_gradient_sync=said.append)
    for last in (False, False, True):
        sync_gradients(whole_model, last)
        assert whole_model.require_backward_grad_sync is last
        sync_gradients(sharded, last)
    assert said == [False, False, True]


def test_what_is_not_sharded_is_left_as_it_is():
    tensor = torch.ones(3)
    assert local(tensor) is whole(tensor) is cut_like(tensor, tensor) is tensor
    settle(torch.nn.Linear(1, 1))
