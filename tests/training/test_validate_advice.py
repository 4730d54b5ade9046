"""Settings that train.py rejects, and that the advice of each line works."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from error_lines import case, error_line

from configurator import settings_of
from flatgpt import runtime
from flatgpt.errors import UserError
from flatgpt.training import validate as rules
from flatgpt.training.memory import fake_ranks
from model import GPTConfig

CPU = runtime.Runtime('cpu', torch.float32)


@pytest.fixture
def configured(monkeypatch):
    """The settings of train.py after these flags."""
    for name in ('excepthook', 'stdout', 'stderr'):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    return lambda *flags: settings_of(str(ROOT / 'train.py'), list(flags))


def rejected(check, *args):
    with pytest.raises(UserError) as caught:
        check(*args)
    return str(caught.value)


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('is not valid UTF-8; choose', '--out_dir=run\udcff', ['--out_dir=run']),
        case('is a file; choose another', f'--out_dir={__file__}', ['--out_dir=out/a']),
        case('is a file; choose another', f'--out_dir={__file__}/run', ['--out_dir=out/a']),
        case('is a file; choose another', f'--data_cache={__file__}', ['--data_cache=a']),
        case('that is the same at every', '--auto_resume', ['--auto_resume --out_dir=out/a']),
        case(
            'omit one of them',
            '--overwrite --init_from=resume',
            ['--overwrite', '--init_from=resume'],
        ),
        case(
            'a new model has no checkpoint',
            '--checkpoint=last',
            ['--checkpoint=last --init_from=out/a', '--checkpoint=last --init_from=resume'],
        ),
        case(
            'a new model has no checkpoint',
            '--checkpoint=out/b',
            ['--checkpoint=out/b --init_from=out/b', '--checkpoint=out/b --init_from=resume'],
        ),
        case(
            'does not train on; use',
            '--ngram_order=5 --objective=sft',
            ['--ngram_order=None --objective=sft', '--ngram_order=5'],
        ),
        case(
            'the n-grams cross documents',
            '--ngram_order=5 --mask_documents',
            ['--ngram_order=None --mask_documents', '--ngram_order=5 --mask_documents=False'],
        ),
        case('needs a sharded model', '--offload', ['--offload --shard', '']),
        case(
            'an update cannot be captured with',
            '--cuda_graph=True --gradient_checkpointing',
            ['--cuda_graph=auto --gradient_checkpointing'],
        ),
        case(
            "objective='dpo' with eval_only",
            '--objective=dpo --eval_only --init_from=out/sft',
            ['--objective=dpo --eval_only --init_from=resume --out_dir=out/a'],
        ),
        case(
            ' needs {}: give --init_from=RUN_DIRECTORY',
            '--objective=dpo',
            ['--objective=dpo --init_from=out/sft'],
        ),
        case(
            'would keep random weights',
            '--freeze=1',
            ['--freeze=1 --init_from=gpt2', '--freeze=1 --init_from=out/a'],
        ),
        case(
            'needs a pretrained model',
            '--lora_rank=4',
            ['--lora_rank=4 --init_from=gpt2', '--lora_rank=4 --init_from=out/a'],
        ),
    ],
)
def test_a_rejected_setting_is_accepted_once_its_advice_is_followed(configured, bad, good):
    assert '\n' not in rejected(rules.validate, configured(*bad.split()))
    for flags in good:
        rules.validate(configured(*flags.split()))


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('start them with torchrun', '--shard', '--shard=False'),
        case('needs a CUDA GPU, not', '--shard --offload', '--shard'),
    ],
)
def test_what_this_machine_cannot_do_is_accepted_without_the_setting(configured, bad, good):
    sharded = '--offload' in bad
    if sharded:  # as under torchrun
        with fake_ranks(2):
            rejected(rules.validate_machine, configured(*bad.split()), CPU)
            rules.validate_machine(configured(*good.split()), CPU)
    else:
        command = rejected(rules.validate_machine, configured(bad), CPU)
        assert '--nproc_per_node=2 train.py' in command
        rules.validate_machine(configured(good), CPU)
        with fake_ranks(2):  # what torchrun does
            rules.validate_machine(configured(bad), CPU)


@pytest.mark.error_line('needs one process with a CUDA GPU')
def test_a_graph_without_a_gpu_is_refused_and_auto_accepted(configured):
    rejected(rules.validate_machine, configured('--cuda_graph=True'), CPU)
    rules.validate_machine(configured('--cuda_graph=auto'), CPU)


CHARACTERS = SimpleNamespace(name='char', eot=None)
TEXT = SimpleNamespace(is_chat=False, vocab_size=65, tokenizer=CHARACTERS)
GPT2 = SimpleNamespace(is_chat=False, vocab_size=50257)
CHAT = SimpleNamespace(is_chat=True, tokenizer=SimpleNamespace(name='byte', eot=256))


@pytest.mark.parametrize(
    ('bad', 'good', 'data'),
    [
        case('cannot be cut;', '--short_iters=9 --short_block_size=8', '--short_iters=0', CHAT),
        case(
            'a sequence is one conversation',
            '--mask_documents --objective=dpo',
            '--mask_documents=False --objective=dpo',
            CHAT,
        ),
        case('nothing separates the', '--mask_documents', '--mask_documents=False', TEXT),
        case('is too high for a vocabulary of', '--ngram_order=5', '--ngram_order=4', GPT2),
        case('is too high for a vocabulary of', '--ngram_order=12', '--ngram_order=10', TEXT),
    ],
)
def test_a_setting_that_does_not_suit_the_dataset_is_accepted_once_it_is_changed(
    configured, bad, good, data
):
    line = rejected(rules.validate_data, configured(*bad.split()), data)
    assert good.split()[0] in line
    rules.validate_data(configured(*good.split()), data)


@error_line('must divide block_size={}; try')
@pytest.mark.parametrize(('block', 'short'), [(1024, None), (3, None), (96, 36), (7, 5)])
def test_the_short_block_size_that_is_suggested_divides_the_block_size(configured, block, short):
    flags = ('--short_iters=1', f'--short_block_size={short}')
    line = rejected(rules.check_short_blocks, configured(*flags), block)
    rules.check_short_blocks(
        configured(*flags, re.search(r'--short_block_size=\d+', line)[0]), block
    )


PATH = Path('out/my run/checkpoints/step-00000009')


@pytest.mark.parametrize(
    ('bad', 'again', 'new'),
    [
        case('keeps its shape; to resume', '--n_layer=3', '--n_layer=12', '--init_from=scratch'),
        case(
            'for a new run from its weights',
            '--optimizer=muon',
            '--optimizer=adamw',
            "--init_from='out/my run'",
        ),
    ],
)
def test_what_a_resumed_run_cannot_change_is_named_with_two_ways_out(configured, bad, again, new):
    before = configured()
    shape = GPTConfig(**{name: before[name] for name in rules.SHAPE})
    line = rejected(rules.check_unchanged, configured(bad), before, shape, PATH)
    assert f'use {again};' in line
    assert f'use {new} and another --out_dir' in line
    rules.check_unchanged(configured(again), before, shape, PATH)
    started = configured(bad, *shlex.split(new), '--out_dir=out/new')
    rules.validate(started)
    assert not rules.is_resuming(started)
