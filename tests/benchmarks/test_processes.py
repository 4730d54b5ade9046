"""Two processes beside two: what is taken from their runs, and a run that fails."""

import json
import subprocess
import sys

import pytest

from flatgpt.benchmarks import training
from flatgpt.errors import UserError


def test_the_speed_of_a_run_is_the_median_after_its_warm_up(tmp_path):
    speeds = [1, 1, 10, 30, 20]
    lines = [{'step': 0, 'val_loss': 3.0}]
    lines += [{'step': n, 'tokens_per_s': speed} for n, speed in enumerate(speeds, 1)]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    assert training.tokens_per_second(tmp_path) == 20


def test_the_mistake_of_a_run_is_one_line():
    command = [sys.executable, '-S', '-c', 'import sys; sys.exit("first\\nerror: no room\\nlast")']
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with pytest.raises(UserError, match=r'^processes: error: no room$'):
        training.wait_for([started])
