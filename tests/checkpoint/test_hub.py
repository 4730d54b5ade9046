"""Models of the hub: the real client against a small server that speaks the hub's HTTP."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_model, refused
from error_lines import error_line
from hub import TOKEN

from flatgpt.checkpoint.convert import export_transformers
from flatgpt.checkpoint.load import load_model
from flatgpt.checkpoint.weights import WEIGHTS
from flatgpt.data.tokenizer import byte_tokenizer

pytest.importorskip('huggingface_hub')
pytest_plugins = ['hub']
NAME, GPT2 = 'models/owner/name', 'models/openai-community/gpt2'


def files_of(folder, seed):
    """The files of a repository with a random model, and some that must not be fetched."""
    export_transformers(random_model(257, seed=seed), byte_tokenizer(), {}, folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {'pytorch_model.bin': b'a pickle', 'onnx/model.onnx': b'another format'}


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    return files_of(tmp_path_factory.mktemp('exported') / 'model', 0)


@pytest.fixture
def hub(hub, exported):
    hub.repositories = {NAME: {'main': dict(exported)}, GPT2: {'main': dict(exported)}}
    hub.renamed = {'models/gpt2': GPT2, 'models/former/name': NAME}
    return hub


def logits(where):
    with torch.no_grad():
        return load_model(where)[0](torch.arange(16)[None])[0]


@pytest.fixture
def expected(tmp_path, exported):
    folder = tmp_path / 'expected'
    folder.mkdir()
    for name in ('config.json', WEIGHTS, 'tokenizer.json'):
        (folder / name).write_bytes(exported[name])
    return logits(folder)


@pytest.mark.parametrize('where', ['owner/name', 'former/name', 'gpt2'])
def test_a_model_is_downloaded_once_under_its_present_or_former_name(hub, expected, where):
    assert torch.equal(logits(where), expected)
    assert {WEIGHTS, 'config.json'} <= {*hub.log}
    assert not {'pytorch_model.bin', 'model.onnx', 'README.md'} & {*hub.log}
    hub.log.clear()
    assert torch.equal(logits(where), expected)
    assert hub.log == []


def test_a_downloaded_model_works_offline_and_without_the_server(hub, expected, monkeypatch):
    logits('owner/name')
    hub.requests.clear()
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert torch.equal(logits('owner/name'), expected)
    assert hub.requests == []
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    assert torch.equal(logits('owner/name'), expected)


def test_the_newest_commit_is_used_and_only_its_new_files_are_fetched(hub, expected, tmp_path):
    logits('owner/name')
    hub.repositories[NAME]['main'] = files_of(tmp_path / 'newer', 1)
    hub.log.clear()
    assert not torch.equal(logits('owner/name'), expected)
    assert hub.log == [WEIGHTS]


def test_an_interrupted_body_is_resumed_where_it_ended(hub, exported, expected, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE', 1024)
    hub.trouble = {WEIGHTS: ['cut', 'cut']}
    assert torch.equal(logits('owner/name'), expected)
    begins = [begin for name, begin in hub.ranges if name == WEIGHTS]
    assert begins[0] == 0 < begins[1] < begins[2] < len(exported[WEIGHTS])


def test_a_server_that_fails_for_ever_ends_in_one_line(hub, expected):
    hub.trouble = {WEIGHTS: ['fail'] * 99}
    assert 'HTTP 503' in refused(load_model, 'owner/name')
    hub.trouble = {}
    assert torch.equal(logits('owner/name'), expected)


@pytest.mark.skipif(os.name != 'posix', reason='SIGKILL')
def test_a_download_that_was_killed_halfway_is_completed_by_the_same_command(hub, tmp_path):
    begun, over = threading.Event(), threading.Event()
    hub.trouble = {WEIGHTS: [lambda: (begun.set(), over.wait(60))]}
    command = [sys.executable, ROOT / 'sample.py', 'ab', '--init_from=owner/name', '--device=cpu']
    command += ['--num_samples=1', '--max_new_tokens=2']
    kept = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING'))}
    options = {'env': {**kept, **hub.environment(tmp_path / 'home')}, 'cwd': tmp_path}
    with subprocess.Popen(command, **options) as process:
        assert begun.wait(60)
        os.kill(process.pid, signal.SIGKILL)
    over.set()
    assert list((tmp_path / 'home').rglob('*.incomplete'))
    done = subprocess.run(command, **options, capture_output=True, text=True, check=True)
    assert done.stdout.startswith('ab')
    assert hub.log.count(WEIGHTS) == 2


@pytest.mark.parametrize('how', ['environment', 'file'])
def test_a_private_model_needs_the_token_that_the_line_asks_for(
    hub, expected, tmp_path, monkeypatch, how
):
    hub.private.add(NAME)
    assert 'a private one: check the name, or log in' in refused(load_model, 'owner/name')
    if how == 'environment':
        monkeypatch.setenv('HF_TOKEN', TOKEN)
    else:  # where `hf auth login` writes it
        (tmp_path / 'token').write_text(TOKEN)
    assert torch.equal(logits('owner/name'), expected)


def test_a_token_that_the_hub_does_not_know_is_reported_as_that(hub, expected, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_old')
    assert 'the token is not valid' in refused(load_model, 'owner/name')
    monkeypatch.delenv('HF_TOKEN')
    assert torch.equal(logits('owner/name'), expected)


def test_a_gated_model_needs_a_token_and_access(hub, expected, monkeypatch):
    hub.gated[NAME] = set()
    assert 'it is gated: request access on its page and log in' in refused(load_model, 'owner/name')
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    assert 'it is gated: request access on its page' in refused(load_model, 'owner/name')
    hub.gated[NAME].add(TOKEN)
    assert torch.equal(logits('owner/name'), expected)


@error_line('nor available from the Hub')
def test_a_hub_that_is_always_busy_ends_in_one_line_and_the_same_command_resumes(hub, expected):
    hub.limited = '7'
    assert 'HTTP 429, retry after 7' in refused(load_model, 'owner/name')
    assert len(hub.requests) < 10
    hub.limited = None
    assert torch.equal(logits('owner/name'), expected)


def test_a_hub_that_becomes_busy_between_two_files_keeps_the_first(hub, expected):
    limited = threading.Event()

    def limit():
        hub.limited = '7'
        limited.set()

    def cut_when_limited():  # files are fetched at the same time
        limited.wait(60)
        raise ConnectionError

    hub.trouble = {'config.json': [limit], WEIGHTS: [cut_when_limited]}
    assert 'HTTP 429, retry after 7' in refused(load_model, 'owner/name')
    hub.limited = None
    assert torch.equal(logits('owner/name'), expected)
    assert hub.log.count('config.json') == 1


def test_a_model_that_does_not_exist_and_one_without_weights_are_told_apart(hub):
    assert 'no such repository' in refused(load_model, 'owner/nothing')
    del hub.repositories[NAME]['main'][WEIGHTS]
    assert 'only a part of it' in refused(load_model, 'owner/name')


def test_transformers_reads_the_same_model_from_the_same_cache(hub, expected):
    transformers = pytest.importorskip('transformers')
    logits('owner/name')
    hub.log.clear()
    model = transformers.AutoModelForCausalLM.from_pretrained('owner/name')
    with torch.no_grad():
        theirs = model(torch.arange(16)[None]).logits
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=1e-4)
    assert WEIGHTS not in hub.log
    assert Path(transformers.AutoTokenizer.from_pretrained('former/name').name_or_path)


# -----------------------------------------------------------------------------
# the scripts, from the first byte to the last line

LAMBADA = """---
configs:
- config_name: default
  data_files: [{split: test, path: data/lambada_test_en.jsonl}]
---
"""


@pytest.fixture
def run(hub, script, tmp_path):
    """Run a script with an empty cache of the hub -> what it prints."""

    def run(name, *args):
        environment = hub.environment(tmp_path / 'home') | {'PYTHONWARNINGS': 'error'}
        done = script(name, *args, '--device=cpu', cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_gpt2_is_evaluated_with_its_loss_on_a_dataset(run, byte_dataset):
    dataset = f'--dataset={byte_dataset}'
    printed = run('train.py', 'eval_gpt2', dataset, '--eval_iters=2', '--block_size=16')
    assert 'val_loss' in printed


def test_gpt2_is_finetuned_by_the_recipe_of_shakespeare(run, byte_dataset, tmp_path):
    short = ['--max_iters=1', '--eval_iters=1', '--block_size=16', '--sample_tokens=0']
    run('train.py', 'finetune_shakespeare', f'--dataset={byte_dataset}', *short, '--out_dir=tuned')
    assert list(tmp_path.glob('tuned/checkpoints/*/model.safetensors'))


def test_a_model_of_the_hub_is_finetuned_by_its_former_name(run, byte_dataset, tmp_path):
    flags = ['--max_iters=1', '--eval_iters=1', '--block_size=16', '--sample_tokens=0']
    flags += ['--out_dir=tuned', '--batch_size=1', '--gradient_accumulation_steps=1']
    run('train.py', '--init_from=former/name', f'--dataset={byte_dataset}', *flags)
    assert list(tmp_path.glob('tuned/checkpoints/*/model.safetensors'))


def test_a_model_of_the_hub_is_scored_on_lambada_from_the_hub(hub, run):
    for package in ('lm_eval', 'datasets'):
        pytest.importorskip(package)
    texts = [{'text': f'{i} cats sat on the mat and then {i} dogs ran'} for i in range(3)]
    lines = ''.join(json.dumps(text) + '\n' for text in texts)
    hub.repositories['datasets/EleutherAI/lambada_openai'] = {
        'main': {'README.md': LAMBADA.encode(), 'data/lambada_test_en.jsonl': lines.encode()}
    }
    printed = run('bench.py', '--task=lambada', '--out_dir=gpt2')
    assert 'lambada_openai' in printed
    assert 'wrote bench.json' in printed
