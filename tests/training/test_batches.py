"""A read error of the data stops a run as a signal does: it saves a checkpoint."""

import errno

import pytest
from conftest import hashes
from error_lines import error_line

from flatgpt.data.dataset import Dataset
from flatgpt.errors import UserError


@pytest.fixture
def fails_from(monkeypatch):
    """Reading fails from a training sample on, or in the evaluation number `evaluation`."""

    def start(sample=10**9, evaluation=10**9):
        batch, eval_batch, seen = Dataset.batch, Dataset.eval_batch, set()

        def read(self, first, *args):
            if first >= sample:
                raise OSError(errno.EIO, 'Input/output error')
            return batch(self, first, *args)

        def read_to_evaluate(self, split, starts, *args):
            if not starts[0]:
                seen.add(len(seen))
            if len(seen) > evaluation:
                raise OSError(errno.EIO, 'Input/output error')
            return eval_batch(self, split, starts, *args)

        monkeypatch.setattr(Dataset, 'batch', read)
        monkeypatch.setattr(Dataset, 'eval_batch', read_to_evaluate)

    return start


ARGS = ('--max_iters=6', '--eval_interval=2', '--eval_train=False')


@error_line('the data cannot be read: {}; restore')
# in the middle of the fourth step, and in the evaluation after it
@pytest.mark.parametrize(('fault', 'step'), [({'sample': 3 * 8 + 4}, 3), ({'evaluation': 2}, 4)])
def test_a_run_whose_data_is_lost_saves_says_so_and_resumes_as_if_nothing_had_been(
    run_here, fails_from, tmp_path, capsys, monkeypatch, fault, step
):
    whole, lost = tmp_path / 'whole', tmp_path / 'lost'
    assert run_here(f'--out_dir={whole}', *ARGS) == 0
    fails_from(**fault)
    with pytest.raises(UserError, match=r'the data cannot be read: .*Input/output error; restore'):
        run_here(f'--out_dir={lost}', *ARGS)
    said = f'stopped at step {step}; step-{step:08d} is saved, resume with'
    assert said in capsys.readouterr().out
    monkeypatch.undo()
    assert run_here(f'--out_dir={lost}', *ARGS, '--init_from=resume') == 0
    last = [folder / 'checkpoints' / 'step-00000006' for folder in (whole, lost)]
    assert hashes(last[0]) == hashes(last[1])


def test_what_is_missing_before_the_first_update_ends_the_run_at_once(
    run_here, fails_from, tmp_path
):
    fails_from(sample=0)
    with pytest.raises(UserError, match='Input/output'):
        run_here(f'--out_dir={tmp_path}/run', *ARGS)


def test_where_one_rank_gets_no_data_all_save_and_leave(ranks, tmp_path):
    fault = """
from flatgpt.data.dataset import Dataset
read = Dataset.batch
def fails(self, first, *args):
    if first >= 3 * 8:
        raise OSError(5, 'Input/output error')
    return read(self, first, *args)
Dataset.batch = fails
"""
    args = (f'--out_dir={tmp_path}/run', '--max_iters=6')
    crew = ranks(2, *args, before=lambda rank: fault if rank else '')
    assert crew.end(30) == [2, 2]
    assert (
        crew[1].err
        == 'error (rank 1): letters: the data cannot be read: [Errno 5] Input/output error; '
        'restore access to it and resume, or start again\n'
    )
    assert 'stopped at step 3; step-00000003 is saved' in crew[0].out
    assert crew[0].err == ''
