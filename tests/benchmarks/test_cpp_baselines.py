"""llama.cpp and CTranslate2 beside flatGPT: the same weights, and the same tokens in float32."""

import pytest
import torch
from benches import settings

import bench
from flatgpt.benchmarks import cpp_baselines
from flatgpt.benchmarks.baselines import FlatGPTGeneration
from flatgpt.runtime import Runtime

pytest_plugins = ['benches']
RUNTIME = Runtime('cpu', torch.float32)


@pytest.fixture
def shape():
    flags = '--bias=True', '--vocab_size=300', '--prompt_tokens=6', '--new_tokens=9'
    shape = settings(*flags, '--device=cpu')
    return {**shape, 'workload': 'generation', 'format': 'float32'}


@pytest.mark.parametrize(
    ('name', 'kind', 'tolerance'),
    [
        ('llama.cpp', 'f16', 0.02),
        ('llama.cpp', 'q8_0', 0.1),
        ('llama.cpp', 'q4_0', 1.0),
        ('CTranslate2', 'float32', 1e-3),
        ('CTranslate2', 'int8', 0.2),
    ],
)
def test_a_baseline_does_the_same_work_with_the_same_weights(shape, name, kind, tolerance):
    module = cpp_baselines.MODULES[name]
    pytest.importorskip(module, reason=f'{module} is not installed')
    if name == 'llama.cpp':
        pytest.importorskip('gguf', reason='gguf is not installed')
    program = cpp_baselines.BUILDERS[name]({**shape, 'format': kind}, RUNTIME)
    ours = FlatGPTGeneration(shape, RUNTIME)
    assert program.about
    for rows in (1, 3, 1):
        for method in ('prefill', 'decode'):
            work, expected = (getattr(each, method)(rows)[1] for each in (program, ours))
            assert work['tokens'] == expected['tokens']
            if method == 'prefill':
                assert work['result'] == pytest.approx(expected['result'], abs=tolerance)
            elif kind == 'float32':
                assert work['result'] == expected['result']


@pytest.mark.usefixtures('small_machine', 'in_this_process')
def test_a_baseline_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cpp_baselines, 'find_spec', lambda module: None)
    bench.main(settings('--only=prefill', '--formats=float32,int8', '--rows=1', '--device=cpu'))
    lines = capsys.readouterr().out.splitlines()
    for name in cpp_baselines.MODULES:
        assert [line.split()[-2:] for line in lines if name in line] == [['not', 'installed']]


def test_each_format_is_compared_with_its_nearest(shape, monkeypatch):
    monkeypatch.setattr(cpp_baselines, 'find_spec', lambda module: module)
    pairs, missing = cpp_baselines.installed_baselines(shape, ['float32', 'bfloat16', 'int8'])
    assert missing == []
    llama = [('llama.cpp', kind) for kind in ('f16', 'q8_0', 'q4_0')]
    assert pairs == [*llama, ('CTranslate2', 'float32'), ('CTranslate2', 'int8')]
    assert cpp_baselines.installed_baselines({**shape, 'arch': 'modern'}, ['int8']) == ([], [])
    assert cpp_baselines.installed_baselines({**shape, 'device': 'cuda'}, ['int8']) == ([], [])
