"""Parameter-efficient fine-tuning: LoRA, frozen blocks and gradient checkpointing."""

import json
import re
import shutil
import signal

import pytest
import torch
from conftest import MODERN, ROOT, hashes, metrics, random_model, refused
from error_lines import case, error_line
from safetensors.torch import load_file, save_file

import model as model_module
from flatgpt import files, runtime
from flatgpt.checkpoint import load as load_module
from flatgpt.checkpoint import peft as peft_module
from flatgpt.checkpoint.__main__ import main
from flatgpt.checkpoint.convert import export_transformers
from flatgpt.checkpoint.load import find_checkpoint, load_checkpoint, load_model
from flatgpt.checkpoint.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from flatgpt.inference.quantize import prepare_for_inference
from flatgpt.lora import LoRALinear, add_lora, linear_layers, lora_layers, merge_lora
from flatgpt.training import metrics as metrics_module

SHAPES = {'gpt2': {'bias': True}, 'modern': {'arch': 'modern', 'n_kv_head': 1}}
both = pytest.mark.parametrize('arch', SHAPES)
FIXED = ('--lr_decay_iters=100', '--dropout=0.2', '--lora_dropout=0.2')


def adapters_of(model, rank=4, targets='all', dropout=0.0, freeze=0):
    """A model with adapters that are not zero."""
    add_lora(model, rank, 8, dropout, targets, freeze)
    for module in lora_layers(model).values():
        torch.nn.init.normal_(module.lora_B.weight, std=0.3)
    return model


def text(seed=0):
    return torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module', params=SHAPES)
def base(request, run_here, tmp_path_factory):
    """The run directory of a base model; no test changes it."""
    out_dir = tmp_path_factory.mktemp('base') / request.param
    settings = MODERN if request.param == 'modern' else ('--bias',)
    run_here(f'--out_dir={out_dir}', *settings, '--n_layer=2', '--max_iters=10')
    return out_dir


@pytest.fixture(scope='module')
def tuned(base, run_here, tmp_path_factory):
    """The run directory of rank-2 adapters on the base."""
    out_dir = tmp_path_factory.mktemp('tuned') / base.name
    run_here(f'--out_dir={out_dir}', f'--init_from={base}', '--lora_rank=2', *FIXED)
    return out_dir


# -----------------------------------------------------------------------------
# layers


@both
def test_an_adapter_starts_at_zero_and_is_a_product_of_two_matrices(arch):
    model = random_model(50, **SHAPES[arch])
    before = model(text())[0]
    weights = {name: linear.weight.clone() for name, linear in linear_layers(model).items()}
    add_lora(model, 4, 8, 0.0, 'all')
    torch.testing.assert_close(model(text())[0], before)
    adapters_of(merge_lora(model))
    for name, module in lora_layers(model).items():
        x = torch.randn(5, module.weight.size(1))
        low = x @ module.lora_A.weight.T @ module.lora_B.weight.T
        expected = torch.nn.functional.linear(x, weights[name], module.bias) + 8 / 4 * low
        torch.testing.assert_close(module(x), expected)
    assert set(lora_layers(model)) == set(weights)
    assert not torch.allclose(model(text())[0], before, atol=0.1)


@both
def test_merging_gives_a_plain_model_with_the_same_outputs(arch):
    model = adapters_of(random_model(50, **SHAPES[arch]))
    with torch.no_grad():
        before = model(text())[0]
        merged = merge_lora(model)
        torch.testing.assert_close(merged(text())[0], before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            prepare_for_inference(merged)(text())[0], before, rtol=1e-4, atol=1e-4
        )
    assert not [name for name, _ in merged.named_parameters() if 'lora' in name]


def test_a_merged_model_can_be_trained_whole():
    merged = merge_lora(adapters_of(random_model(50)))
    assert all(p.requires_grad for p in merged.parameters())
    assert merged.num_params(trained=True) == random_model(50).num_params()


@pytest.mark.parametrize('leaf', ['q_proj', 'v_proj'])
def test_one_of_the_projections_alone_can_be_adapted(leaf):
    model = adapters_of(random_model(50, **SHAPES['modern']), targets=leaf)
    assert {name.split('.')[-1] for name in lora_layers(model)} == {leaf}
    before = model(text())[0]
    torch.testing.assert_close(merge_lora(model)(text())[0], before, rtol=1e-4, atol=1e-4)


def test_dropout_is_only_for_training():
    module = LoRALinear(torch.nn.Linear(64, 8), 4, 1.0, dropout=0.5)
    torch.nn.init.ones_(module.lora_B.weight)
    x = torch.ones(1, 64)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_targets_are_names_as_in_peft_and_blocks_can_be_excluded():
    names = {
        'all': ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'],
        'c_proj': ['attn.c_proj', 'mlp.c_proj'],
        'mlp.c_proj, c_attn': ['attn.c_attn', 'mlp.c_proj'],
    }
    for targets, inside in names.items():
        model = adapters_of(random_model(50), targets=targets)
        assert sorted(lora_layers(model)) == [
            f'transformer.h.{i}.{n}' for i in (0, 1) for n in inside
        ]
    model = adapters_of(random_model(50), freeze=1)
    assert {name[:15] for name in lora_layers(model)} == {'transformer.h.1'}


@pytest.mark.parametrize(
    ('targets', 'parts'),
    [
        ('q_prj', ["'q_prj'", 'did you mean q_proj?', 'self_attn.q_proj, self_attn.k_proj']),
        ('q_proj,', ["''", 'mlp.fc1, mlp.fc2', "'all'"]),
        ('proj', ["'proj' is not a linear layer of a block"]),
        ('lm_head', ["'lm_head'"]),
    ],
)
def test_the_error_for_an_unknown_target_lists_the_valid_names(targets, parts):
    said = refused(add_lora, random_model(50, arch='modern'), 4, 8, 0.0, targets)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ('name', 'bad', 'advice'),
    [
        case('freezes every block', 'freeze', 2, r'use --freeze=(\d+)'),
        case('is not a linear layer', 'targets', 'q_prj', r'did you mean (\w+)\?'),
        case('is not a linear layer', 'targets', 'lm_head', r'choose from ([\w.]+)'),
        case('is not a linear layer', 'targets', 'lm_head', r"or '(all)'"),
        case('adds nothing', 'rank', 500, r'use --lora_rank=(\d+)'),
    ],
)
def test_adapters_are_added_as_the_error_line_says(name, bad, advice):
    args = {'rank': 4, 'alpha': 8, 'dropout': 0.0, 'targets': 'all'}
    model = random_model(50, arch='modern', n_kv_head=1, n_head=4)
    said = refused(add_lora, model, **args | {name: bad})
    good = re.search(advice, said)[1]
    add_lora(model, **args | {name: int(good) if good.isdecimal() else good})
    assert lora_layers(model)


# -----------------------------------------------------------------------------
# what is trained


def test_only_the_adapters_are_trained_and_the_base_is_saved_unchanged(base, tuned):
    source, path = find_checkpoint(base), find_checkpoint(tuned, 'last')
    assert hashes(source)[load_module.MODEL_FILE] == hashes(path)[load_module.MODEL_FILE]
    states = load_file(path / load_module.OPTIMIZER_FILE)
    assert states
    assert all('.lora_A.' in key or '.lora_B.' in key for key in states)
    for key, tensor in load_file(path / 'adapter' / ADAPTER_WEIGHTS).items():
        assert tensor.any(), key  # B is no longer zero
        assert tensor.size(0 if '.lora_A.' in key else 1) == 2


def test_the_run_s_losses_equal_those_of_the_merged_model(tuned, run_here, capsys):
    measured = metrics(tuned, 'val_loss')
    step = min(measured, key=measured.get)  # the best checkpoint, the default elsewhere
    assert measured[4] < measured[0]
    capsys.readouterr()
    run_here(f'--init_from={tuned}', '--eval_only')
    assert f'val_loss {measured[step]:.4f}' in capsys.readouterr().out


def test_adapters_are_merged_for_inference_but_not_for_resuming(tuned):
    apart = load_checkpoint(find_checkpoint(tuned, 'last'))[0].eval()
    merged, tokenizer, state = load_model(tuned, 'last')
    assert len(lora_layers(apart)) > 0 == len(lora_layers(merged))
    ids = text() % merged.config.vocab_size
    torch.testing.assert_close(merged(ids)[0], apart(ids)[0], rtol=1e-4, atol=1e-5)
    assert (tokenizer.kind, state['step']) == ('char', 4)


@pytest.mark.parametrize('settings', [(), ('--optimizer=muon', '--muon_lr=0.002')], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one(base, run_here, tmp_path, monkeypatch, settings):
    whole, halves = tmp_path / 'whole', tmp_path / 'halves'
    args = (f'--init_from={base}', '--lora_rank=2', *FIXED, *settings, '--max_iters=8')
    run_here(f'--out_dir={whole}', *args)
    log = metrics_module.Tracker.log

    def log_and_stop(self, step, **values):
        log(self, step, **values)
        if step == 5 and 'loss' in values:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metrics_module.Tracker, 'log', log_and_stop)
        assert run_here(f'--out_dir={halves}', *args) == 128 + signal.SIGTERM
    assert run_here('--init_from=resume', config=halves / 'config.py') == 0
    ends = [find_checkpoint(path, 'last') for path in (whole, halves)]
    assert hashes(ends[0]) == hashes(ends[1])
    adapters = [files.sha256(path / 'adapter' / ADAPTER_WEIGHTS) for path in ends]
    assert adapters[0] == adapters[1]
    for key in ('loss', 'val_loss', 'grad_norm'):
        assert metrics(whole, key) == metrics(halves, key)
    assert metrics(whole, 'val_loss')[8] < metrics(whole, 'val_loss')[0]


def test_new_adapters_are_added_on_top_of_merged_ones(tuned, run_here, tmp_path, capsys):
    target = 'fc2' if tuned.name == 'modern' else 'mlp.c_proj'
    args = (
        '--lora_rank=3',
        f'--lora_targets={target}',
        '--freeze=1',
        '--learning_rate=0',
        '--min_lr=0',
    )
    assert run_here(f'--out_dir={tmp_path}', f'--init_from={tuned}', *args) == 0
    out = capsys.readouterr().out
    said = re.search(r'trained: 0.00M of 0.01M parameters with .* \((.*)%\), LoRA of rank 3', out)
    model = load_model(tuned)[0]
    count = 3 * (4 * 16 + 16)  # in one of two blocks
    whole = sum(p.numel() for p in model.parameters()) + count
    assert float(said[1]) == pytest.approx(100 * count / whole, abs=0.051)
    ids = text() % model.config.vocab_size
    assert torch.equal(load_model(tmp_path)[0](ids)[0], model(ids)[0])


def test_embeddings_and_first_blocks_can_be_frozen(base, run_here, tmp_path, capsys):
    run_here(f'--out_dir={tmp_path}', f'--init_from={base}', '--freeze=1')
    before, after = (
        load_file(find_checkpoint(path, 'last') / load_module.MODEL_FILE)
        for path in (base, tmp_path)
    )
    best = load_file(find_checkpoint(base) / load_module.MODEL_FILE)
    stayed = {name for name in after if torch.equal(after[name], best[name])}
    kept = {name for name in after if 'wte' in name or 'wpe' in name or 'embed_tokens' in name}
    assert stayed == kept | {name for name in after if '.h.0.' in name or '.layers.0.' in name}
    assert before.keys() == after.keys()
    assert 'parameters with all embeddings (' in capsys.readouterr().out.split('trained: ')[1]


@both
def test_the_flops_of_a_step_exclude_frozen_parameters(arch):
    model, (T, C) = random_model(50, **SHAPES[arch]), (16, 32)
    head = model.lm_head.weight.numel()
    block = sum(p.numel() for p in model.blocks[0].parameters())
    norm = 0 if arch == 'modern' else 2 * C
    assert model.flops_per_token() == 6 * (head + norm + 2 * block) + 12 * 2 * C * T
    model.freeze_lower(1)
    head *= 4 if arch == 'gpt2' else 6  # in GPT-2 the embedding, which is frozen
    assert model.flops_per_token() == head + 6 * norm + (2 + 6) * block + (4 + 12) * C * T


# -----------------------------------------------------------------------------
# gradient checkpointing


@pytest.mark.parametrize('part', [(), ('--lora_rank=2', '--lora_dropout=0.2')], ids=['all', 'lora'])
def test_gradient_checkpointing_changes_no_bit(base, run_here, tmp_path, monkeypatch, part):
    calls = []
    kind = model_module.GPT2Block if base.name == 'gpt2' else model_module.ModernBlock
    forward = kind.forward

    def count(self, *args, **options):
        calls[-1] += torch.is_grad_enabled()
        return forward(self, *args, **options)

    monkeypatch.setattr(kind, 'forward', count)
    for number, flag in enumerate(('--gradient_checkpointing=False', '--gradient_checkpointing')):
        calls.append(0)
        args = (f'--init_from={base}', '--dropout=0.2', *part, flag)
        run_here(f'--out_dir={tmp_path}/{number}', *args)
    assert calls == [4 * 2 * 2, 2 * 4 * 2 * 2]  # steps, micro-batches, blocks
    for key in ('loss', 'grad_norm', 'val_loss'):
        assert metrics(tmp_path / '0', key) == metrics(tmp_path / '1', key)
    one, two = (find_checkpoint(tmp_path / number, 'last') for number in '01')
    assert hashes(one) == hashes(two)


def test_gradient_checkpointing_keeps_the_graph_of_one_block_at_a_time():
    """In a deep model, most saved activations are gone."""
    held = []
    for recompute in (False, True):
        model = random_model(50, n_layer=8).train()
        model.trunk.recompute = recompute
        kept = []
        pack = lambda t, kept=kept: kept.append(t.numel()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(text(), text(1))
        held.append(sum(kept))
    assert held[1] < held[0] / 4


def test_gradient_checkpointing_is_suggested_if_one_sequence_does_not_fit(
    run_here, tmp_path, monkeypatch
):
    fixes = []
    monkeypatch.setattr(runtime, 'on_out_of_memory', lambda device, fix: fixes.append(fix()))
    args = (f'--out_dir={tmp_path}', '--batch_size=1', '--max_iters=0')
    run_here(*args)
    run_here(*args, '--gradient_checkpointing')
    assert fixes[1] == '--gradient_checkpointing'
    assert fixes[3].startswith('--block_size=8 ')


# -----------------------------------------------------------------------------
# processes and memory


@pytest.mark.parametrize('base', ['gpt2'], indirect=True)
def test_two_processes_train_adapters_as_one(base, two_ranks, run_here, tmp_path):
    args = (f'--init_from={base}', '--lora_rank=2', '--gradient_checkpointing')
    run_here(f'--out_dir={tmp_path}/one', *args)
    printed = two_ranks(f'--out_dir={tmp_path}/two', *args)
    for key in ('loss', 'val_loss', 'grad_norm'):
        one, two = metrics(tmp_path / 'one', key), metrics(tmp_path / 'two', key)
        assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5), key
    assert re.search(r'^peak memory [1-9][\d,]* MB in each process$', printed, re.M)


def test_peak_memory_is_printed_at_the_end_and_logged(run_here, tmp_path, capsys):
    run_here(f'--out_dir={tmp_path}')
    peak = metrics(tmp_path, 'peak_memory')
    assert list(peak) == [0, 2, 4]
    said = re.search(r'^peak memory ([\d,]+) MB$', capsys.readouterr().out, re.M)[1]
    assert 50e6 < peak[0] <= peak[4] <= int(said.replace(',', '')) * 1e6 + 1e6


def test_peak_memory_includes_freed_memory(tmp_path, script):
    code = (
        'import torch\nfrom flatgpt.runtime import Runtime\n'
        "machine = Runtime('cpu', torch.float32)\nbefore = machine.peak_memory()\n"
        'torch.ones(100_000_000)\nprint(machine.peak_memory() - before)\n'
    )
    (tmp_path / 'peak.py').write_text(code.replace('\\n', '\n'))
    grown = int(script(tmp_path / 'peak.py').stdout)
    assert 350e6 < grown < 450e6


# -----------------------------------------------------------------------------
# the recipe


def test_the_recipe_for_shakespeare_runs_from_a_local_gpt2(run_here, tmp_path, capsys, dataset):
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    shape = {'vocab_size': 50, 'n_positions': 16, 'n_embd': 16, 'n_layer': 1, 'n_head': 2}
    config = transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / 'gpt2')
    recipe = ROOT / 'config' / 'finetune_shakespeare.py'
    args = (f'--init_from={tmp_path}/gpt2', f'--dataset={dataset}', '--device=cpu')
    assert run_here(f'--out_dir={tmp_path}/run', *args, '--sample_tokens=0', config=recipe) == 0
    assert 'data: letters, 4,000 tokens, 512 per step' in capsys.readouterr().out
    losses = metrics(tmp_path / 'run', 'val_loss')
    assert list(losses) == [0, 5, 10, 15, 20]
    assert losses[20] < losses[0]
    assert set(metrics(tmp_path / 'run', 'lr').values()) == {3e-5}


# -----------------------------------------------------------------------------
# peft


@pytest.fixture(scope='module')
def peft():
    pytest.importorskip('transformers', reason='transformers is not installed')
    return pytest.importorskip('peft', reason='peft is not installed')


theirs_to_warn = pytest.mark.filterwarnings('ignore')  # differs between versions


@theirs_to_warn
@torch.no_grad()
def test_peft_loads_a_run_s_adapter_over_the_exported_base(base, tuned, peft, tmp_path):
    from transformers import AutoModelForCausalLM

    main(['export', str(base), str(tmp_path / 'base')])
    main(['export', str(tuned), str(tmp_path / 'merged')])
    main(['export', str(tuned), str(tmp_path / 'adapter'), '--format=peft'])
    model, _, _ = load_model(tuned)
    ids = text() % model.config.vocab_size
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
    assert not torch.allclose(theirs(ids).logits, model(ids)[0], atol=1e-3)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / 'adapter').eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids)[0], rtol=1e-4, atol=1e-5)
    merged = theirs.merge_and_unload().state_dict()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / 'merged').state_dict()
    for name, tensor in exported.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)


@theirs_to_warn
@torch.no_grad()
def test_peft_adapts_exactly_the_same_blocks_and_matrices(peft, tmp_path):
    from transformers import AutoModelForCausalLM

    model = random_model(50)
    export_transformers(model, None, {}, tmp_path / 'base')
    adapters_of(model, targets='mlp.c_proj,c_attn', freeze=1)
    (tmp_path / 'adapter').mkdir()
    for name, content in peft_module.adapter_files(model, str(tmp_path / 'base')).items():
        (tmp_path / 'adapter' / name).write_bytes(content)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / 'adapter').eval()
    assert sum('lora_A' in name for name, _ in theirs.named_parameters()) == 2
    torch.testing.assert_close(theirs(text()).logits, model(text())[0], rtol=1e-4, atol=1e-4)


def theirs(peft, folder, arch, **changes):
    """A base in folder/base and an adapter by peft in folder/adapter."""
    import transformers

    if arch == 'gpt2':
        shape = {'vocab_size': 50, 'n_positions': 16, 'n_embd': 32, 'n_layer': 2, 'n_head': 2}
        config = transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None)
        model, targets = transformers.GPT2LMHeadModel(config), ['c_attn', 'mlp.c_proj']
    else:
        shape = {'vocab_size': 50, 'max_position_embeddings': 16, 'hidden_size': 32}
        shape |= {'intermediate_size': 128, 'num_hidden_layers': 2, 'num_attention_heads': 2}
        config = transformers.NanoChatConfig(**shape, num_key_value_heads=1)
        model, targets = transformers.NanoChatForCausalLM(config), ['q_proj', 'v_proj', 'fc1']
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / 'base')
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / 'base')
    settings = {'r': 3, 'lora_alpha': 12, 'target_modules': targets, 'init_lora_weights': False}
    settings = peft.LoraConfig(task_type='CAUSAL_LM', **{**settings, **changes})
    model = peft.get_peft_model(model, settings).eval()
    for name, parameter in model.named_parameters():  # as if trained
        if '.lora_' in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / 'adapter')
    return model


@theirs_to_warn
@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'use_rslora': True, 'layers_to_transform': [1]},
        {'rank_pattern': {'c_attn': 2, r'.*\.1\.mlp\.fc1': 4}, 'alpha_pattern': {'v_proj': 5}},
        {'rank_pattern': {'1.attn.c_attn': 4}, 'use_rslora': True, 'alpha_pattern': {'c_attn': 3}},
        {'exclude_modules': ['1.attn.c_attn', 'v_proj']},
        {'target_modules': r'.*\.1\..*(c_fc|fc2)'},
        {'init_lora_weights': 'gaussian'},
        {'init_lora_weights': 'orthogonal', 'r': 4},
        {'init_lora_weights': 'mica'},
    ],
    ids=str,
)
@both
def test_an_adapter_made_by_peft_gives_the_same_logits(peft, tmp_path, arch, changes):
    expected = theirs(peft, tmp_path, arch, **changes)
    model, _, state = load_model(tmp_path / 'adapter')
    with torch.no_grad():
        logits = expected(text()).logits
        torch.testing.assert_close(model(text())[0], logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(load_model(tmp_path / 'base')[0](text())[0], logits, atol=0.1)
    assert (state, lora_layers(model)) == ({}, {})


@error_line('has an unsupported {}={}; call merge_and_unload()')
@theirs_to_warn
@pytest.mark.parametrize('changes', [{'init_lora_weights': 'pissa'}, {'use_dora': True}], ids=str)
def test_an_adapter_that_is_not_supported_is_merged_by_peft(peft, tmp_path, changes):
    changed = theirs(peft, tmp_path, 'gpt2', **changes)
    assert 'merge_and_unload' in refused(load_model, tmp_path / 'adapter')
    changed.merge_and_unload().save_pretrained(tmp_path / 'merged')
    with torch.no_grad():
        logits = changed(text()).logits
        torch.testing.assert_close(
            load_model(tmp_path / 'merged')[0](text())[0], logits, rtol=1e-4, atol=1e-4
        )


@error_line('instead of a lora_A and a lora_B')
@theirs_to_warn
def test_an_adapter_of_the_embedding_is_merged_by_peft(peft, tmp_path):
    adapted = theirs(peft, tmp_path, 'gpt2', target_modules=['wpe'])
    refused(load_model, tmp_path / 'adapter')
    adapted.merge_and_unload().save_pretrained(tmp_path / 'merged')
    with torch.no_grad():
        logits = load_model(tmp_path / 'merged')[0](text())[0]
        torch.testing.assert_close(logits, adapted(text()).logits, rtol=1e-4, atol=1e-4)


@theirs_to_warn
def test_an_adapter_made_by_peft_can_be_trained_further(peft, tmp_path, run_here, dataset):
    theirs(peft, tmp_path, 'gpt2')
    args = (f'--out_dir={tmp_path}/run', f'--init_from={tmp_path}/adapter', '--lora_rank=2')
    assert run_here(*args, '--max_iters=2') == 0
    model, tokenizer, _ = load_model(tmp_path / 'run')
    assert (model.config.vocab_size, tokenizer.kind) == (50, 'char')


@theirs_to_warn
@pytest.mark.parametrize(
    ('changes', 'parts'),
    [
        ({'use_dora': True}, ['use_dora=True']),
        ({'bias': 'all'}, ["bias='all'", 'merge_and_unload']),
        ({'init_lora_weights': 'pissa'}, ["init_lora_weights='pissa'", 'merge_and_unload']),
        ({'init_lora_weights': 'olora'}, ["init_lora_weights='olora'"]),
        ({'alora_invocation_tokens': [5, 6]}, ['alora_invocation_tokens=[5, 6]']),
        ({'modules_to_save': ['wte']}, ["modules_to_save=['wte']"]),
        ({'trainable_token_indices': [1]}, ['trainable_token_indices=']),
        ({'lora_bias': True}, ['lora_bias=True']),
        ({'target_modules': ['wte']}, ['wte', 'merge_and_unload']),
        ({'target_modules': ['lm_head']}, ['lm_head', 'merge_and_unload']),
    ],
    ids=str,
)
def test_a_peft_feature_that_is_not_supported_is_one_line(peft, tmp_path, changes, parts):
    theirs(peft, tmp_path, 'gpt2', **changes)
    said = refused(load_model, tmp_path / 'adapter')
    assert all(part in said for part in [str(tmp_path / 'adapter'), *parts]), said


# -----------------------------------------------------------------------------
# an adapter and a base that do not match


@pytest.fixture
def apart(base, tuned, tmp_path):
    """The adapter of a run, without its base."""
    main(['export', str(tuned), str(tmp_path / 'apart'), '--format=peft'])
    return tmp_path / 'apart'


def rewrite(folder, **changes):
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | changes))


def test_an_adapter_without_its_base_finds_it_by_name(base, tuned, apart):
    assert peft_module.base_of(apart) == str(base)
    ids = text() % load_model(base)[0].config.vocab_size
    assert torch.equal(load_model(apart)[0](ids)[0], load_model(tuned)[0](ids)[0])


def test_a_base_that_was_trained_further_does_not_match(apart, tuned):
    rewrite(apart, base_model_name_or_path=str(tuned))
    assert refused(load_model, apart) == (
        f'{apart}: {tuned} is not its base: the weights differ; correct base_model_name_or_path '
        f'in {ADAPTER_CONFIG}'
    )


def test_a_base_of_another_shape_does_not_match(apart, base, run_here, tmp_path):
    wider = [*(MODERN if base.name == 'modern' else ()), '--n_layer=2', '--n_embd=32']
    for name, args in (('wide', wider), ('flat', [*wider[:-2], '--n_embd=16'])):
        run_here(f'--out_dir={tmp_path}/{name}', *args, '--max_iters=1', '--eval_interval=1')
        rewrite(apart, base_model_name_or_path=str(tmp_path / name))
        said = refused(load_model, apart)
        assert said.startswith(f'{apart}: {tmp_path / name} is not its base: ')
        assert 'the adapter needs (' in said


@pytest.mark.parametrize(
    ('changes', 'part'),
    [
        ({'base_model_name_or_path': None}, 'has no base_model_name_or_path; set it'),
        (
            {'base_model_name_or_path': 'nowhere'},
            'in adapter_config.json to its base model: nowhere',
        ),
        ({'peft_type': 'IA3'}, "peft_type='IA3'"),
        ({'lora_alpha': 'much'}, "lora_alpha='much'"),
        ({'r': 5}, 'the rank 5, its matrices have 2; correct r'),
        ({'layer_replication': [[0, 2]]}, 'layer_replication=[[0, 2]]'),
        ({'r': 0}, 'has an invalid rank or pattern: division by zero'),
        (
            {'target_modules': ['nothing']},
            'which adapter_config.json excludes; correct target_modules',
        ),
        ({'layers_to_transform': [7]}, 'or layers_to_transform'),
        ({'exclude_modules': r'.*\.0\..*'}, 'exclude_modules or'),
        ({'alpha_pattern': {'(': 3}}, 'has an invalid rank or pattern'),
        ({'rank_pattern': 3}, 'has an invalid rank or pattern'),
        ({'revision': 'v2'}, "revision='v2'"),
        ({'layers_pattern': 'blocks'}, "layers_pattern='blocks'"),
        ({'use_qalora': True}, 'use_qalora=True'),
        ({'init_lora_weights': 'pissa_niter_16'}, "init_lora_weights='pissa_niter_16'"),
        ({'init_lora_weights': 'lora_ga'}, "init_lora_weights='lora_ga'"),
        ({'target_parameters': ['x']}, "target_parameters=['x']"),
        (
            {'of_next_year': {'on': 1}},
            "unsupported of_next_year={'on': 1}; call merge_and_unload()",
        ),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_used_is_one_line(apart, changes, part):
    rewrite(apart, **changes)
    said = refused(load_model, apart)
    assert part in said
    assert str(apart) in said


def test_an_adapter_of_an_adapter_and_half_a_pair_are_one_line(apart):
    rewrite(apart, base_model_name_or_path=str(apart))
    assert 'gives the adapter itself as its base' in refused(load_model, apart)
    (apart / ADAPTER_WEIGHTS).unlink()
    rewrite(apart, base_model_name_or_path='nowhere')
    assert 'nowhere' in refused(load_model, apart)


def test_weights_that_are_missing_or_half_there_are_one_line(apart):
    tensors = load_file(apart / ADAPTER_WEIGHTS)
    key = next(iter(tensors))
    del tensors[key]
    save_file(tensors, apart / ADAPTER_WEIGHTS)
    assert 'instead of a lora_A and a lora_B' in refused(load_model, apart)
    (apart / ADAPTER_WEIGHTS).unlink()
    assert str(apart / ADAPTER_WEIGHTS) in refused(load_model, apart)


def test_damage_to_an_adapter_is_detected_like_damage_to_weights(tuned, tmp_path):
    path = shutil.copytree(find_checkpoint(tuned, 'last'), tmp_path / 'step-00000004')
    content = bytearray((path / 'adapter' / ADAPTER_WEIGHTS).read_bytes())
    content[-1] ^= 1
    (path / 'adapter' / ADAPTER_WEIGHTS).write_bytes(content)
    assert f'adapter/{ADAPTER_WEIGHTS} does not match its hash' in refused(
        load_module.verify_checkpoint, path
    )
    shutil.rmtree(path / 'adapter')
    assert 'adapter/adapter_config.json is missing' in refused(load_module.verify_checkpoint, path)


def test_inspect_reports_the_base_and_only_adapters_are_exported(base, tuned, tmp_path, capsys):
    main(['inspect', str(tuned)])
    assert f'LoRA of {base}' in capsys.readouterr().out
    said = refused(main, ['export', str(base), str(tmp_path / 'x'), '--format=peft'])
    assert said == f'{base} has no LoRA adapter; export it without --format=peft'
    said = refused(main, ['export', str(tuned), str(tmp_path), '--format=peft'])
    assert said == f'{tmp_path}: already exists; choose a new folder'
    assert list(tmp_path.iterdir()) == []


# -----------------------------------------------------------------------------
# settings


@pytest.mark.parametrize('base', ['gpt2'], indirect=True)
@pytest.mark.parametrize(
    ('args', 'parts'),
    [
        (['--init_from=scratch', '--lora_rank=4'], ['lora_rank=4', '--init_from=gpt2']),
        (['--init_from=scratch', '--freeze=1'], ['freeze=1', '--init_from=gpt2']),
        (['--lora_rank=0'], ['lora_rank=0']),
        (['--lora_rank=500'], ['lora_rank=500', 'adds nothing']),
        (['--lora_rank=4', '--lora_alpha=0'], ['lora_alpha=0']),
        (['--lora_rank=4', '--lora_dropout=1'], ['lora_dropout=1']),
        (['--lora_rank=4', '--lora_targets=attn'], ["'attn'", 'attn.c_attn, attn.c_proj']),
        (['--lora_rank=4', '--freeze=2'], ['freeze=2', 'every block']),
        (['--freeze=3'], ['freeze=3', 'n_layer=2']),
        (['--freeze=-1'], ['freeze=-1']),
        (['--freeze=2', '--optimizer=muon'], ["optimizer='muon'", 'no matrix']),
    ],
    ids=' '.join,
)
def test_a_mistake_is_one_line_and_creates_no_directory(base, run_here, tmp_path, args, parts):
    said = refused(run_here, f'--out_dir={tmp_path}/new', f'--init_from={base}', *args)
    assert all(part in said for part in parts), said
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
    'change', ['lora_rank=3', 'lora_rank=None', 'lora_alpha=9', 'lora_targets=c_fc', 'freeze=0']
)
@pytest.mark.parametrize('base', ['gpt2'], indirect=True)
def test_a_resumed_run_keeps_its_adapters(tuned, run_here, change):
    said = refused(run_here, f'--out_dir={tuned}', '--init_from=resume', f'--{change}')
    name, _, value = change.partition('=')
    given = f'{value!r}' if name == 'lora_targets' else value
    path = find_checkpoint(tuned, 'last')
    ours = f'{path} was trained with another {name}; to resume, use --{name}='
    assert said.startswith(f'{name}={given}: {ours}')
    assert f'--init_from={tuned} and another --out_dir' in said


def test_a_resumed_run_may_unfreeze_blocks(base, run_here, tmp_path):
    run_here(f'--out_dir={tmp_path}', f'--init_from={base}', '--freeze=2')
    args = ('--init_from=resume', '--freeze=1', '--max_iters=6')
    assert run_here(*args, config=tmp_path / 'config.py') == 0
    before, after = (
        load_checkpoint(path)[0].state_dict()
        for path in (find_checkpoint(base), find_checkpoint(tmp_path, 'last'))
    )
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert any('.1.' in name for name in changed)
    assert not any('.0.' in name for name in changed)


def test_adapter_settings_without_a_rank_are_reported(base, run_here, tmp_path, capsys):
    args = (f'--init_from={base}', '--max_iters=0')
    run_here(f'--out_dir={tmp_path}/a', *args, '--lora_targets=fc1')
    assert 'ignored without --lora_rank=8: --' in capsys.readouterr().out
    run_here(f'--out_dir={tmp_path}/b', *args)
    assert 'lora' not in capsys.readouterr().out
