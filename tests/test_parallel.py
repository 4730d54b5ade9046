"""Several processes learn the same as one, with DDP and with FSDP."""

import os
import re
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
from conftest import MODERN, SHARE, make_dataset, metrics, steps
from safetensors import safe_open

from flatgpt.checkpoint.load import MODEL_FILE, find_checkpoint, read_tensors
from flatgpt.errors import ConfigError
from flatgpt.parallel import (
    MatrixExchange,
    full_tensor,
    reshard,
    rows_per_rank,
    shard_like,
    sync_gradients,
    to_local,
)
from flatgpt.runtime import Runtime
from flatgpt.training import optim
from flatgpt.training.validate import validate_machine

# 24 sequences per step in micro-batches of 4: every rank accumulates. The validation split has 37
# windows, which no number of ranks divides. The gradient norm exceeds grad_clip.
TWENTY = ('--gradient_accumulation_steps=6', '--max_iters=20', '--grad_clip=0.3')
TWENTY += ('--eval_iters=None', '--eval_interval=10', '--n_layer=2')
ADAMW = ('--arch=modern', '--n_kv_head=1')
MUON = ('--optimizer=muon', '--muon_lr=0.05')
KINDS = {'gpt2': (), 'modern': ADAMW, 'gpt2-muon': MUON, 'modern-muon': MODERN}
# Muon iterates in bfloat16: a last-bit difference in the gradient can change a rounding
TOLERANCE = {'gpt2': 1e-5, 'modern': 1e-5, 'gpt2-muon': 3e-4, 'modern-muon': 3e-4}


@pytest.fixture(scope='module')
def alone(run_here, tmp_path_factory):
    """Returns the run directory of one process, for each kind."""
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
    assert crew.out.count('validation loss') == 1  # only rank 0 prints
    assert (tmp_path / 'DONE').exists()
    agree(alone(kind), tmp_path, TOLERANCE[kind])
    norms = metrics(tmp_path, 'grad_norm')
    assert list(norms.values()) == pytest.approx(
        list(metrics(alone(kind), 'grad_norm').values()), rel=100 * TOLERANCE[kind]
    )
    assert min(norms.values()) > 0.3  # they are all clipped


@pytest.mark.parametrize(('world', 'kind'), [(2, 'gpt2'), (3, 'modern-muon')])
def test_a_sharded_model_learns_like_a_model_in_one_process(ranks, alone, tmp_path, world, kind):
    trains_as_one(ranks, alone, tmp_path, kind, world, '--shard')
    assert steps(tmp_path) == [10, 20]
    path = find_checkpoint(tmp_path, 'last')
    parts = sorted(file.name for file in path.glob('model*'))
    assert parts == [f'model-{n:05d}-of-{world:05d}.safetensors' for n in range(1, world + 1)]
    named, expected = (
        dict(read_tensors(p, MODEL_FILE)) for p in (path, find_checkpoint(alone(kind), 'last'))
    )
    assert ('lm_head.weight' in named) == (kind != 'gpt2')  # GPT-2's is tied and saved once
    assert list(named) == list(expected)
    for name, tensor in expected.items():
        assert named[name].shape == tensor.shape
        assert torch.allclose(named[name], tensor, atol=2e-3), name


CASES = [(world, how) for world in (1, 2, 3, 4) for how in ('ddp', 'shard')]


@pytest.mark.faults
@pytest.mark.parametrize(('world', 'how'), CASES)
def test_any_number_of_processes_learns_like_one(ranks, alone, tmp_path, world, how):
    kinds = list(KINDS)
    if SHARE < 1:  # one of the four
        kinds = [kinds[CASES.index((world, how)) % 4]]
    for kind in kinds:
        flags = ('--shard',) if how == 'shard' else ()
        trains_as_one(ranks, alone, tmp_path / kind, kind, world, *flags)


# 5 rows are sharded over 4 ranks as 2, 2, 1 and 0
FEW = ('--n_embd=6', '--n_head=1', '--bias', '--max_iters=3', '--gradient_accumulation_steps=6')


@pytest.mark.faults
def test_a_rank_without_rows_trains_saves_and_resumes(ranks, run_here, tmp_path):
    crew = ranks(4, f'--out_dir={tmp_path}/four', *FEW, '--shard', '--save_interval=1')
    assert crew.end() == [0] * 4, crew.err
    path = find_checkpoint(tmp_path / 'four', 'last')
    with safe_open(path / 'model-00004-of-00004.safetensors', 'pt') as last:
        assert last.get_slice('transformer.ln_f.weight').get_shape() == [0]
    run_here(f'--out_dir={tmp_path}/one', *FEW)
    agree(tmp_path / 'one', tmp_path / 'four', 1e-5)
    more = (*FEW, '--init_from=resume', '--max_iters=5')
    crew = ranks(4, f'--out_dir={tmp_path}/four', *more, '--shard')
    assert crew.end() == [0] * 4, crew.err
    run_here(f'--out_dir={tmp_path}/one', *more)
    agree(tmp_path / 'one', tmp_path / 'four', 1e-5)


# (number of processes, sharded) of each leg of a run
LEGS = [(0, False), (2, False), (3, True), (1, True), (2, True), (3, False), (0, False)]


@pytest.mark.faults
@pytest.mark.parametrize('kind', ['gpt2', 'modern-muon'])
def test_a_run_resumes_with_another_number_of_processes(
    ranks, run_here, tmp_path, monkeypatch, kind
):
    # in bfloat16, Muon's products let the losses drift apart within tens of steps
    monkeypatch.setattr(optim, 'product_dtype', lambda device: torch.float32)
    precise = 'import torch\nfrom flatgpt.training import optim\n'
    precise += 'optim.product_dtype = lambda device: torch.float32\n'
    args = ('--gradient_accumulation_steps=6', '--lr_decay_iters=200', '--n_layer=2', *KINDS[kind])
    args += ('--eval_interval=1000', '--eval_iters=None', '--muon_lr=0.02')
    for leg, (world, shard) in enumerate(LEGS):
        if leg:  # the reference run
            shutil.copytree(tmp_path / 'many', tmp_path / str(leg))
        flags = (f'--max_iters={10 * leg + 10}', '--auto_resume')
        run_here(f'--out_dir={tmp_path}/{leg}', *args, *flags, '--shard=False')
        flags += (f'--out_dir={tmp_path}/many', f'--shard={shard}')
        crew = ranks(world, *args, *flags, before=precise)
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
    names = [
        name for name, _ in read_tensors(find_checkpoint(tmp_path / 'run', 'last'), MODEL_FILE)
    ]
    assert names == [
        name for name, _ in read_tensors(find_checkpoint(alone('gpt2'), 'last'), MODEL_FILE)
    ]


def test_sharding_in_one_process_suggests_torchrun(run_here, tmp_path):
    with pytest.raises(ConfigError, match=r'shard=True .*torchrun --standalone') as caught:
        run_here(f'--out_dir={tmp_path}/run', '--shard')
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'run').exists()


def test_offloading_on_cpu_is_refused(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    settings = {'shard': True, 'offload': True, 'cuda_graph': 'auto'}
    with pytest.raises(ConfigError, match='offload=True needs a CUDA GPU, not cpu'):
        validate_machine(settings, Runtime('cpu', torch.float32))
    validate_machine(settings, Runtime('cuda:0', torch.float32))


def test_gradients_are_synchronized_once_per_step():
    whole_model, said = SimpleNamespace(), []
    sharded = SimpleNamespace(set_requires_gradient_sync=said.append)
    for last in (False, False, True):
        sync_gradients(whole_model, last)
        assert whole_model.require_backward_grad_sync is last
        sync_gradients(sharded, last)
    assert said == [False, False, True]


def test_an_unsharded_tensor_is_unchanged():
    tensor = torch.ones(3)
    assert to_local(tensor) is full_tensor(tensor) is shard_like(tensor, tensor) is tensor
    reshard(torch.nn.Linear(1, 1))


class Matrix(SimpleNamespace):
    """What MatrixExchange asks of a matrix that is sharded over `ranks`."""

    def __init__(self, shape, ranks, rank):
        mesh = SimpleNamespace(
            size=lambda: ranks, get_local_rank=lambda: rank, get_group=lambda: 'all'
        )
        super().__init__(shape=shape, size=lambda dim: shape[dim], device_mesh=mesh)


def all_to_all(sent):
    """[(flat, sizes)] of all ranks -> what each of them receives."""
    parts = [flat.split(sizes) for flat, sizes in sent]
    return [torch.cat(of_rank) for of_rank in zip(*parts, strict=True)]


@pytest.mark.parametrize('ranks', [1, 2, 3, 4, 9])
def test_each_rank_gets_whole_matrices_and_gives_the_rows_back(ranks):
    """5 rows over 4 ranks are 2, 2, 1 and 0; there are 6 matrices, for 9 ranks too few."""
    shapes = [(5, 3), (5, 3), (5, 3), (8, 3), (8, 3), (2, 8)]
    wholes = [torch.randn(shape) for shape in shapes]
    numbered = list(zip(shapes, wholes, strict=True))
    exchanges = [MatrixExchange([Matrix(s, ranks, r) for s in shapes]) for r in range(ranks)]
    order = [i for rank in range(ranks) for i in range(rank, len(shapes), ranks)]
    chunks = [w.split(-(-len(w) // ranks)) for w in wholes]  # by rows, in equal chunks rounded up
    rows = [
        torch.cat(
            [chunks[i][rank].flatten() for i in order if rank < len(chunks[i])]
            or [wholes[0][0][:0]]
        )
        for rank in range(ranks)
    ]
    received = iter(all_to_all([(flat, e.rows) for flat, e in zip(rows, exchanges, strict=True)]))
    stacks = []
    for rank, exchange in enumerate(exchanges):
        exchange._exchange = lambda flat, sizes, expected: next(received)
        stacks.append(exchange.gather(rows[rank]))
        mine = [whole for shape, whole in numbered[rank::ranks]]
        assert all(map(torch.equal, [m for stack in stacks[-1] for m in stack], mine))
        assert len([m for stack in stacks[-1] for m in stack]) == len(mine)
    sent = []
    for exchange, flat, stack in zip(exchanges, rows, stacks, strict=True):
        exchange._exchange = lambda flat, sizes, expected: sent.append((flat, sizes))
        exchange.scatter(stack, like=flat)
    assert all(map(torch.equal, all_to_all(sent), rows))


def test_rows_are_sharded_in_equal_chunks_rounded_up():
    assert rows_per_rank(5, 4) == [2, 2, 1, 0]
    assert rows_per_rank(8, 4) == [2, 2, 2, 2]
    assert rows_per_rank(1, 3) == [1, 0, 0]


# -----------------------------------------------------------------------------
# mistakes: each rank reports one line


def only(rank, code):
    """`before` for one rank."""
    return lambda each: code if each == rank else ''


OTHER_CODE = "from flatgpt import runtime; runtime.code_hash = lambda: 'abc'"
OTHER_DEVICE = "from flatgpt import runtime; runtime.pick_device = lambda name: 'mps'"
OTHER_PRODUCTS = "from flatgpt import runtime; runtime.product_dtype = lambda device: 'float8'"
OTHER_TORCH = "import torch; torch.__version__ = '2.0'"
ON_APPLE = "from flatgpt import runtime; runtime.pick_device = lambda name: 'mps'"
ON_ONE_GPU = """
import os, torch
from flatgpt import runtime
os.environ['LOCAL_WORLD_SIZE'] = '2'
runtime.pick_device = lambda name: name
runtime.pick_dtype = lambda *args, **options: torch.float32
runtime.dist.is_nccl_available = lambda: True
torch.cuda.set_device = lambda device: None
"""
UNLIKE = [
    ((), ON_APPLE, "device='mps': Apple GPUs train in one process; use --device=cpu"),
    (('--device=cuda:1',), ON_ONE_GPU, "device='cuda:1': torchrun started 2 .* --device=cuda$"),
    ((lambda rank: f'--seed={rank}',), '', r'rank 1 on \S+ has seed 1, but rank 0 on \S+ has 0'),
    ((), only(1, OTHER_CODE), r'rank 1 on \S+ runs another version of the code than rank 0'),
    ((), only(1, OTHER_DEVICE), r"rank 1 on \S+ has device 'mps', but rank 0 on \S+ has 'cpu'"),
    ((), only(0, OTHER_TORCH), r"rank 1 on \S+ has torch '2\.\S+', but rank 0 on \S+ has '2\.0'"),
    (
        ('--optimizer=muon',),
        only(1, OTHER_PRODUCTS),
        r"rank 1 on \S+ has dtype of products 'float8', but rank 0 on \S+ has 'torch\.\w+'",
    ),
    (
        ('--batch_size=3', '--gradient_accumulation_steps=1'),
        '',
        'batch_size is 3 .*_steps=2$',
    ),
    (('--checkpoint_mirror=/dev/null/mirror',), '', 'checkpoint_mirror=.* cannot be written'),
    (('--offload', '--shard'), '', 'offload=True needs a CUDA GPU, not cpu'),
    (('--offload',), '', 'offload=True needs a sharded model: add --shard'),
]


@pytest.mark.parametrize(('args', 'before', 'text'), UNLIKE)
def test_a_mistake_is_one_line_on_each_rank_and_creates_no_folder(
    ranks, tmp_path, args, before, text
):
    crew = ranks(2, f'--out_dir={tmp_path}/run', *args, before=before)
    assert crew.end(30) == [2, 2]
    for n, rank in enumerate(crew):
        assert re.search(rf'^error{" .rank 1." if n else ""}: .*{text}', rank.err, re.M), rank.err
    assert crew.err.count('\n') == 2
    assert not (tmp_path / 'run').exists()


def test_a_dataset_missing_on_one_rank_is_reported_and_the_others_exit(ranks, dataset, tmp_path):
    there, elsewhere = tmp_path / 'there', tmp_path / 'elsewhere'
    shutil.copytree(dataset, there / 'letters')
    elsewhere.mkdir()
    crew = ranks(
        2,
        *(f'--out_dir={tmp_path}/run', '--dataset=./letters', '--hang_timeout=4'),
        before=lambda rank: f'import os; os.chdir({str(elsewhere if rank else there)!r})',
    )
    assert crew.end(30) == [2, 2]
    assert re.match(r'error \(rank 1\): .*letters', crew[1].err)
    assert re.match(r'error: rank 1: .*letters', crew[0].err)
    assert crew.err.count('\n') == 2
    assert not (tmp_path / 'run').exists()


def test_a_dataset_that_differs_on_one_rank_is_refused_by_all(ranks, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / '0' / 'letters')
    make_dataset(tmp_path / '1' / 'letters', seed=1)
    crew = ranks(
        2,
        *(f'--out_dir={tmp_path}/run', '--dataset=./letters'),
        before=lambda rank: f'import os; os.chdir({str(tmp_path / str(rank))!r})',
    )
    assert crew.end(30) == [2, 2]
    assert crew.err.count('dataset ./letters of rank 1 differs from that of rank 0') == 2
    assert not (tmp_path / 'run').exists()


@pytest.mark.faults
def test_a_missing_rank_is_reported(ranks, tmp_path):
    args = (f'--out_dir={tmp_path}/run', '--hang_timeout=1')
    crew = ranks(2, *args, before=only(1, 'raise SystemExit(3)'))
    assert crew.end(30) == [2, 3]
    assert 'error: ' in crew[0].err
    assert 'start all 2' in crew[0].err or 'cannot connect' in crew[0].err
    assert 'Traceback' not in crew[0].err


def test_a_port_in_use_is_reported(ranks, tmp_path):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        crew = ranks(1, f'--out_dir={tmp_path}/run', '--hang_timeout=1', port=port)
        assert crew.end(30) == [2]
    line = crew.err.splitlines()[-1]
    assert line.startswith(f'error: the processes cannot connect to 127.0.0.1:{port}: ')
    assert 'a port that is free there' in line
    assert 'Traceback' not in crew.err


CLOCK = """
import socket, time
now = time.time
time.time = lambda: now() + 100
socket.gethostname = lambda: 'late.host'
"""


def test_different_clocks_are_a_warning(ranks, tmp_path):
    crew = ranks(2, f'--out_dir={tmp_path}', before=only(1, CLOCK))
    assert crew.end() == [0, 0], crew.err
    assert re.fullmatch(
        r'warning: the clocks of late\.host \(rank 1\) and \S+ differ by \d+ s, .*NTP\n',
        crew.err,
    )


@pytest.mark.faults
@pytest.mark.parametrize('shard', [False, True])
def test_a_checkpoint_missing_on_one_machine_is_reported(ranks, tmp_path, shard):
    """Two machines without a shared disk: each rank has its own folder."""
    for name in 'ab':
        (tmp_path / name).mkdir()
    where = lambda rank: (  # noqa: E731
        f'import os; os.environ["LOCAL_RANK"] = "0"; os.chdir({str(tmp_path / "ab"[rank])!r})'
    )
    args = ('--out_dir=run', '--hang_timeout=4', f'--shard={shard}')
    crew = ranks(2, *args, before=where)
    if shard:  # detected before anything is written
        assert crew.end(30) == [2, 2]
        assert crew.err.count('run of rank 0 does not exist for rank 1: shard=True needs') == 2
        return
    assert crew.end(30) == [0, 0], crew.err
    crew = ranks(2, *args, '--init_from=resume', '--max_iters=6', before=where)
    assert crew.end(30) == [2, 2]
    assert crew.err.count('step-00000004 of rank 1 is missing on its machine') == 2
    mirror = f'--checkpoint_mirror={tmp_path}/mirror'
    shutil.copytree(tmp_path / 'a' / 'run', tmp_path / 'mirror')
    args = (*args, mirror, '--init_from=resume', '--max_iters=6')
    crew = ranks(2, *args, before=where)
    assert crew.end(30) == [0, 0], crew.err
    assert steps(tmp_path / 'a' / 'run')[-1] == 6
    # a checkpoint on that machine is verified, and copied again if it is damaged
    last = find_checkpoint(tmp_path / 'a' / 'run', 'last')
    shutil.copytree(last, tmp_path / 'b' / 'run' / 'checkpoints' / last.name)
    (tmp_path / 'b' / 'run' / 'checkpoints' / last.name / 'optimizer.safetensors').write_bytes(b'')
    crew = ranks(2, *args[:-1], '--max_iters=8', before=where)
    assert crew.end(30) == [0, 0], crew.err
    assert f'{last.name}.aside1' in os.listdir(tmp_path / 'b' / 'run' / 'checkpoints')
