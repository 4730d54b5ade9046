"""
The models of others: `transformers` folders in both directions, nanoGPT's checkpoints.

    model, tokenizer, state = load_foreign('gpt2')               # or a folder, or path/to/ckpt.pt
    export_transformers(model, tokenizer, state, Path('mine'))   # AutoModelForCausalLM reads it

Nothing is unpickled but tensors and plain values, and no code of a model's folder is run.
"""

import json
import os
import re
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from flatgpt import ROOT
from flatgpt.checkpoint.weights import INDEX, WEIGHTS, filled, open_weights, read_tensor
from flatgpt.data.hf_tokenizer import (
    MARKS,
    chat_jinja,
    read_files,
    tokenizer_json,
    with_configured_ends,
    with_marks,
)
from flatgpt.data.tokenizer import Tokenizer, from_nanogpt_meta, get_tokenizer, load
from flatgpt.errors import CheckpointError, did_you_mean
from flatgpt.files import new_folder, read_json
from model import GPT, TRANSPOSED

RELEASED = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2')
# a config.json: what it calls the fields of GPTConfig, and what else model.py computes, and only
# with these values
GPT2_NAMES = {
    'vocab_size': 'vocab_size',
    'n_layer': 'n_layer',
    'n_head': 'n_head',
    'n_embd': 'n_embd',
    'block_size': 'n_positions',
}
GPT2_SETTINGS = {
    'activation_function': ('gelu_new', 'gelu_pytorch_tanh'),
    'layer_norm_epsilon': (1e-5,),
    'scale_attn_weights': (True,),
    'scale_attn_by_inverse_layer_idx': (False,),
    'add_cross_attention': (False,),
    'tie_word_embeddings': (True,),
    'reorder_and_upcast_attn': (False, True),  # the same, rounded less in 16 bits
    'flatgpt_bias': (True, False),
}
NANOCHAT_NAMES = {
    'vocab_size': 'vocab_size',
    'n_layer': 'num_hidden_layers',
    'n_head': 'num_attention_heads',
    'n_kv_head': 'num_key_value_heads',
    'n_embd': 'hidden_size',
    'block_size': 'max_position_embeddings',
}
NANOCHAT_SETTINGS = {
    'hidden_act': ('relu2',),
    'rms_norm_eps': (1e-6,),
    'final_logit_softcapping': (15.0,),
    'attention_bias': (False,),
    'tie_word_embeddings': (False,),
}
ROPE_SETTINGS = {'rope_type': ('default',), 'rope_theta': (10000.0,)}
# what says nothing about the logits: the origin, dropout, training, heads of other kinds, and
# which tokens are chosen; any other field must be empty
HARMLESS = frozenset(
    """
    _name_or_path architectures dtype initializer_range model_type name_or_path torch_dtype
    transformers_version use_cache rope_parameters _attn_implementation attn_implementation
    _attn_implementation_autoset chunk_size_feed_forward gradient_checkpointing return_dict
    output_attentions output_hidden_states output_past model_max_length tokenizer_class
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    attn_pdrop embd_pdrop resid_pdrop attention_dropout hidden_dropout classifier_dropout
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    num_labels _num_labels id2label label2id problem_type finetuning_task task_specific_params
    predict_special_tokens do_sample max_length min_length temperature top_k top_p typical_p
    num_beams num_beam_groups num_return_sequences repetition_penalty length_penalty
    diversity_penalty encoder_no_repeat_ngram_size no_repeat_ngram_size early_stopping prefix
    """.split()
)
HOW_TO_SAMPLE = frozenset(  # in a generation_config.json, beside those above
    """
    max_new_tokens min_p top_h epsilon_cutoff eta_cutoff penalty_alpha max_time
    cache_implementation cache_config return_legacy_cache low_memory output_logits output_scores
    return_dict_in_generate compile_config disable_compile generation_kwargs num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind
    target_lookbehind prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit
    is_assistant trust_remote_code remove_invalid_values prefill_chunk_size
    _from_model_config renormalize_logits
    """.split()
)
GENERATION = 'generation_config.json'
EMPTY = (None, False, '', [], {}, 0)
NANOGPT_SHAPE = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias')
CARD_SETTINGS = ('optimizer', 'learning_rate', 'batch_size', 'gradient_accumulation_steps', 'seed')
GPT2_VOCABULARIES = range(50257, 50305)  # as released, or padded for speed


# -----------------------------------------------------------------------------
# read


def is_foreign(where: str | Path) -> bool:
    """Whether `where` is a transformers or peft folder, a hub's name, or nanoGPT's checkpoint."""
    path = Path(where)
    if path.is_dir():
        files = ('config.json', 'ckpt.pt', 'adapter_config.json')
        return any((path / file).is_file() for file in files)
    if path.suffix == '.pt' or str(where) in RELEASED:
        return True
    if re.fullmatch(r'(distil)?gpt-?2\S*', str(where), re.IGNORECASE):  # a misspelt size, perhaps
        return True
    return re.fullmatch(r'[\w.-]+/[\w.-]+', str(where)) is not None and not path.parent.is_dir()


def load_foreign(
    where: str | Path, dropout: float = 0.0, tokenizer: Tokenizer | None = None
) -> tuple[GPT, Tokenizer | None, dict]:
    """A GPT-2 or NanoChat of `transformers`, or a nanoGPT checkpoint -> model, tokenizer, state.

    tokenizer: to be used instead of what comes with the model, which is then not looked at.
    """
    path, name, state = Path(where), str(where), {}
    if (path / 'ckpt.pt').is_file():
        path /= 'ckpt.pt'
    if path.suffix == '.pt':
        model, state = load_nanogpt(path, dropout)
        dataset = str(state['config'].get('dataset', ''))
        tokenizer = tokenizer or nanogpt_tokenizer(path, dataset, model.config.vocab_size)
    else:
        folder = path if path.is_dir() else download(name)
        model = load_transformers(folder, name, dropout)
        tokenizer = tokenizer or read_tokenizer(folder, name, model.config.vocab_size)
    return model, tokenizer, state


# --- transformers


def load_transformers(folder: Path, name: str, dropout: float) -> GPT:
    """Weights are read from the mapped file one at a time, so that memory holds them once."""
    shape = parse_model_config(read_json(folder / 'config.json', name), name)
    if (folder / GENERATION).is_file():
        check_generation(read_json(folder / GENERATION, name), name)
    files = weight_files(folder, name)
    named = ((own_name(key), read_tensor(path, key)) for key, path in files.items())
    return filled({**shape, 'dropout': dropout}, named, name, TRANSPOSED)


def own_name(key: str) -> str:
    """OpenAI's own files leave out the first part of a name."""
    return key if key.startswith(('transformer.', 'model.', 'lm_head.')) else f'transformer.{key}'


def parse_model_config(config: dict, name: str) -> dict:
    """GPTConfig's fields out of a config.json; refused is what model.py would not compute."""
    kind = config.get('model_type')
    if kind not in ('gpt2', 'nanochat'):
        raise CheckpointError(f'{name} is a {kind} model; GPT-2 and NanoChat are read')
    names = GPT2_NAMES if kind == 'gpt2' else NANOCHAT_NAMES
    shape = {ours: config.get(theirs) for ours, theirs in names.items()}
    for ours, theirs in names.items():
        if not isinstance(shape[ours], int) and ours != 'n_kv_head':  # which may be None
            raise CheckpointError(f'{name}: its config.json has no whole number {theirs!r}')
    if kind == 'gpt2':
        shape |= {'arch': 'gpt2', 'bias': config.get('flatgpt_bias', True)}
        expected = GPT2_SETTINGS | {'n_inner': (None, 4 * shape['n_embd'])}
        expected['n_ctx'] = (shape['block_size'],)  # as older versions call it
    else:
        shape |= {'arch': 'modern'}
        head = shape['n_embd'] // (shape['n_head'] or 1)
        expected = {'intermediate_size': (4 * shape['n_embd'],), 'head_dim': (head,)}
        expected |= NANOCHAT_SETTINGS | ROPE_SETTINGS
        rope = config.get('rope_parameters') or {}  # where older versions have the keys outside it
        config = config | (rope if isinstance(rope, dict) else {'rope_type': rope})
    for key, value in config.items():
        if key in expected and value not in expected[key]:
            raise CheckpointError(f'{name}: {key}={value!r}; only {expected[key][0]!r} is read')
        if key not in {*expected, *HARMLESS, *names.values()} and value not in EMPTY:
            raise CheckpointError(
                f'{name}: {key}={value!r} of its config.json is not known here; remove it if the '
                'model computes the same without'
            )
    return shape


def check_generation(config: dict, name: str) -> None:
    """Refuse a generation_config.json that forces or forbids tokens. What else it says of how to
    sample is for flags to say."""
    for key, value in config.items():
        if key not in {*HARMLESS, *HOW_TO_SAMPLE} and value not in EMPTY:
            raise CheckpointError(
                f'{name}: {key}={value!r} of its {GENERATION} is not done here; remove it there if '
                'the text may be without it'
            )


def weight_files(folder: Path, name: str) -> dict[str, Path]:
    """Every tensor's name and the file it lies in."""
    path = folder / WEIGHTS
    if path.is_file():
        with open_weights(path) as file:
            return dict.fromkeys(file.keys(), path)
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f'{name}: {WEIGHTS} is missing; save the model with save_pretrained()'
        )
    files = read_json(folder / INDEX, name).get('weight_map')
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f'{name}: {INDEX} does not say which file has which tensor')
    for file in sorted(set(files.values())):
        if not (folder / Path(file).name).is_file():
            raise CheckpointError(f'{name}: {file} is missing; fetch it again')
    return {key: folder / Path(file).name for key, file in files.items()}


def repository_of(name: str) -> str:
    if '/' in name:
        return name
    return f'distilbert/{name}' if name == 'distilgpt2' else f'openai-community/{name}'


def is_cached(name: str) -> bool:
    """Whether the weights of a model on the hub are in its cache."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository_of(name), file) for file in (WEIGHTS, INDEX))
    return any(isinstance(path, str) for path in found)


def download(name: str) -> Path:
    """The folder of a model on the hub, from its cache if it is there (HF_HOME, HF_HUB_OFFLINE)."""
    if '/' not in name and name not in RELEASED:
        hint = did_you_mean(name.lower(), RELEASED)
        raise CheckpointError(f'{name}: no such model; {hint}there are {", ".join(RELEASED)}')
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import HFValidationError

    wanted = ['config.json', WEIGHTS, INDEX, 'model-*.safetensors']
    wanted += ['tokenizer.json', 'vocab.json', 'merges.txt', GENERATION]
    wanted += ['tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json']
    try:
        folder = Path(snapshot_download(repository_of(name), allow_patterns=wanted))
        found = [file for file in ('config.json', WEIGHTS, INDEX) if (folder / file).is_file()]
        if len(found) < 2:  # what a fetch for another purpose, or a broken one, leaves
            raise FileNotFoundError(f'of it {found} is there')
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f'{name} is neither a folder, nor whole in the local cache, nor to be had from the hub '
            f'({type(error).__name__}); put config.json, {WEIGHTS} and tokenizer.json of '
            f'{repository_of(name)} into a folder and name that'
        ) from error


# --- nanoGPT


def load_nanogpt(path: Path, dropout: float) -> tuple[GPT, dict]:
    """A ckpt.pt that nanoGPT's train.py wrote, compiled or not. Only tensors are unpickled."""
    if not path.is_file():
        raise CheckpointError(f'{path}: no such checkpoint')
    try:
        with zipfile.ZipFile(path) as archive:  # with a checksum of each of its files
            if part := archive.testzip():
                raise zipfile.BadZipFile(f'{part} is not what was written')
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is not nanoGPT's, or damaged or half fetched: {error}"
        ) from error
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        args = {'bias': True} | saved['model_args']  # without that setting, all had one
        shape = {key: args[key] for key in NANOGPT_SHAPE}
        for key in sorted(args.keys() - {*NANOGPT_SHAPE, 'dropout'}):
            if args[key] not in EMPTY:
                raise ValueError(f'{key}={args[key]!r} is not of its model')
        weights = {re.sub(r'^(_orig_mod\.|module\.)+', '', k): t for k, t in saved['model'].items()}
        if not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
            raise TypeError('its weights are no tensors')
        state = {'step': int(saved.get('iter_num', 0)), 'config': dict(saved.get('config', {}))}
    except Exception as error:  # a broken pickle can raise nearly anything
        if wants := re.search(r'GLOBAL (\S+)', str(error)):
            what = f'is refused: it asks for {wants[1]}, which could run code'
            raise CheckpointError(f'{path} {what}') from error
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:150]
        raise CheckpointError(f'{path}: not a checkpoint of nanoGPT: {reason}') from error
    return filled({**shape, 'dropout': dropout}, weights.items(), path), state


def nanogpt_tokenizer(path: Path, dataset: str, vocab_size: int) -> Tokenizer | None:
    """The characters of its dataset's meta.pkl, looked for beside the checkpoint and among ours."""
    roots = [*path.resolve().parents, ROOT]
    for root in roots if re.fullmatch(r'[\w.-]+', dataset) else ():
        for name, read in (('meta.pkl', from_nanogpt_meta), ('tokenizer.json', load)):
            file = root / 'data' / dataset / name
            if file.is_file() and (found := read(file)).vocab_size == vocab_size:
                return found
    # without a meta.pkl, nanoGPT's own sample.py takes GPT-2's tokens too
    return get_tokenizer('gpt2') if vocab_size in GPT2_VOCABULARIES else None


# --- tokenizers


def read_tokenizer(folder: Path, name: str, vocab_size: int) -> Tokenizer | None:
    """What a transformers folder has for a tokenizer, None if nothing tells."""
    for files in (('tokenizer.json',), ('vocab.json', 'merges.txt')):
        paths = [folder / file for file in files]
        if all(path.is_file() for path in paths):
            return with_marks(read_files(*paths), folder)
    if vocab_size not in GPT2_VOCABULARIES:
        return None
    if os.environ.get('RANK', '0') == '0':
        line = f"{name} has no tokenizer files; by its {vocab_size} ids it is taken for GPT-2's"
        print(line, file=sys.stderr)
    return with_configured_ends(get_tokenizer('gpt2'), folder)


# -----------------------------------------------------------------------------
# write


def export_transformers(model: GPT, tokenizer: Tokenizer | None, state: dict, folder: Path) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load; all of it or nothing."""
    files = {'config.json': config_json(model, tokenizer)}
    files[GENERATION] = end_settings(tokenizer)
    if tokenizer is not None:
        end = tokenizer.eot_text if tokenizer.eot in tokenizer.ends else None
        files['tokenizer.json'] = tokenizer_json(tokenizer)
        files['tokenizer_config.json'] = {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'model_max_length': model.config.block_size,
            'clean_up_tokenization_spaces': False,
            **(dict.fromkeys(('bos_token', 'eos_token'), end) if end else {}),
            **({'chat_template': chat_jinja(tokenizer)} if tokenizer.chat_template else {}),
        }
        if tokenizer.chat_template:  # as it is, too: its Jinja is not read back
            files[MARKS] = tokenizer.chat_template
    with new_folder(folder) as part:
        save_file(transformers_tensors(model), part / WEIGHTS, metadata={'format': 'pt'})
        for name, content in files.items():
            text = json.dumps(content, indent=1, ensure_ascii=False)
            (part / name).write_text(text + '\n', encoding='utf-8')
        (part / 'README.md').write_text(model_card(model, tokenizer, state), encoding='utf-8')


def transformers_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """Parameters as they are there: GPT-2 always has biases, zero where ours has none."""
    tensors = {name: p.detach().cpu() for name, p in model.named_parameters()}
    tensors = {
        name: (tensor.T if name.endswith(TRANSPOSED) else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    if model.config.arch == 'gpt2' and not model.config.bias:
        for name, tensor in list(tensors.items()):
            if name.endswith('.weight') and '.wte.' not in name and '.wpe.' not in name:
                tensors[name.removesuffix('weight') + 'bias'] = torch.zeros(tensor.shape[-1])
    return tensors


def end_settings(tokenizer: Tokenizer | None) -> dict:
    """What begins a text and what ends it: an id, or a list where several do."""
    ends = [] if tokenizer is None else tokenizer.ends_in_order
    end = ends if len(ends) > 1 else next(iter(ends), None)
    return {'bos_token_id': None if tokenizer is None else tokenizer.eot, 'eos_token_id': end}


def config_json(model: GPT, tokenizer: Tokenizer | None) -> dict:
    c, both = model.config, end_settings(tokenizer) | {'dtype': 'float32'}
    if c.arch == 'gpt2':
        return {
            'architectures': ['GPT2LMHeadModel'],
            'model_type': 'gpt2',
            **{theirs: asdict(c)[ours] for ours, theirs in GPT2_NAMES.items()},
            **{key: values[0] for key, values in GPT2_SETTINGS.items()},
            **dict.fromkeys(('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), c.dropout),
            'flatgpt_bias': c.bias,  # False: the biases in the file are zero, and none are ours
            **both,
        }
    return {
        'architectures': ['NanoChatForCausalLM'],
        'model_type': 'nanochat',
        **{theirs: asdict(c)[ours] for ours, theirs in NANOCHAT_NAMES.items()},
        'num_key_value_heads': c.kv_heads,
        'intermediate_size': 4 * c.n_embd,
        'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0},
        **{key: values[0] for key, values in NANOCHAT_SETTINGS.items()},
        'pad_token_id': both['bos_token_id'],
        **both,
    }


def model_card(model: GPT, tokenizer: Tokenizer | None, state: dict) -> str:
    c, settings = model.config, state.get('config', {})
    facts = {
        'architecture': 'GPT-2' if c.arch == 'gpt2' else 'NanoChat',
        'parameters': f'{sum(p.numel() for p in model.parameters()):,}',
        'layers, heads, width': f'{c.n_layer}, {c.n_head}, {c.n_embd}',
        'context': f'{c.block_size} tokens',
        'tokenizer': 'none'
        if tokenizer is None
        else f'{tokenizer.name}, {tokenizer.vocab_size} ids',
        'trained on': settings.get('dataset'),
        'began from': settings.get('init_from'),
        'steps': state.get('step'),
        'training loss': state.get('train_loss'),
        'validation loss': state.get('val_loss'),
        'bits per byte': state.get('val_bpb'),
        **{name: settings.get(name) for name in CARD_SETTINGS},
    }
    rows = [f'| {name} | {value} |' for name, value in facts.items() if value is not None]
    head = '---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n'
    title = f'# {settings.get("dataset", "A model")}, by flatGPT\n\n'
    use = (
        '\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
        "model = AutoModelForCausalLM.from_pretrained('.')\n"
        "tokenizer = AutoTokenizer.from_pretrained('.')\n```\n"
    )
    return head + title + '| | |\n|---|---|\n' + '\n'.join(rows) + '\n' + use
