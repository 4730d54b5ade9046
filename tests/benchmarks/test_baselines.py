"""flatGPT and transformers do the same work from the same weights."""

import pytest
from benches import RUNTIME, settings

from flatgpt.benchmarks import baselines, decoding
from flatgpt.benchmarks.decoding import bench_generation
from flatgpt.benchmarks.machine import measure_machine
from flatgpt.benchmarks.report import Report

pytest_plugins = ['benches']


@pytest.mark.usefixtures('small_machine', 'in_this_process')
@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_all_implementations_generate_as_many_tokens_from_the_same_weights(arch, monkeypatch):
    pytest.importorskip('transformers', reason='transformers is not installed')
    monkeypatch.setattr(decoding, 'installed_baselines', lambda *args: ([], []))
    config = settings(f'--arch={arch}', '--rows=1,3', '--formats=float32')
    report = Report(config, measure_machine(RUNTIME))
    bench_generation({**config, 'benchmarks': ['prefill', 'decode']}, RUNTIME, report)
    results = report.entries
    assert [entry['job'] for entry in results[::2]] == [
        'prefill 1 row',
        'prefill 3 rows',
        'decode 1 row',
        'decode 3 rows',
    ]
    for ours, theirs in zip(results[::2], results[1::2], strict=True):
        assert ours['side'] == 'flatGPT float32'
        assert theirs['times as fast is flatGPT float32']['median'] > 0
    assert results[4]['note'].endswith(('of the memory-bandwidth limit', 'of the compute limit'))


def test_the_engine_alone_completes_every_request_of_its_clients():
    config = settings() | {'workload': 'generation', 'format': 'float32'}
    program = baselines.BUILDERS['flatGPT'](config, RUNTIME)
    for _ in range(2):  # the engine is kept
        _, work = program.serve(clients=2, requests=5)
        assert work['tokens'] == 5 * config['new_tokens']
