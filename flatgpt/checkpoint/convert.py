"""
Load external models (`transformers` folders, nanoGPT's checkpoints); export to `transformers`.

    model, tokenizer, state = load_external('gpt2')              # or a folder, or path/to/ckpt.pt
    export_transformers(model, tokenizer, state, Path('mine'))   # AutoModelForCausalLM reads it

Only tensors and plain values are unpickled, and no code of a model's folder is run.
"""

import json
import os
import re
import sys
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from flatgpt import ROOT
from flatgpt.checkpoint.weights import INDEX, WEIGHTS, model_from_tensors, open_weights, read_tensor
from flatgpt.data.download import network_problem
from flatgpt.data.hf_tokenizer import (
    CHAT_TEMPLATE_FILE,
    chat_jinja,
    read_files,
    tokenizer_json,
    with_configured_eos_ids,
    with_saved_chat_template,
)
from flatgpt.data.tokenizer import Tokenizer, from_nanogpt_meta, get_tokenizer
from flatgpt.data.tokenizer import load as load_tokenizer
from flatgpt.errors import CheckpointError, did_you_mean
from flatgpt.files import atomic_folder, read_json
from model import GPT, TRANSPOSED

REWARD_MODEL = 'GPT2ForSequenceClassification'
RELEASED = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2')
# Of a config.json: its names for the fields of GPTConfig, and the values of other fields that
# model.py computes
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
    'reorder_and_upcast_attn': (False, True),  # equal but for rounding in 16 bits
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
# Fields that do not affect the logits: origin, dropout, training, other heads, sampling
IGNORED_CONFIG = frozenset(
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
IGNORED_GENERATION = IGNORED_CONFIG | frozenset(  # of a generation_config.json
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
OFF = (None, False, '', [], {}, 0)
NANOGPT_SHAPE = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias')
CARD_SETTINGS = ('optimizer', 'learning_rate', 'batch_size', 'gradient_accumulation_steps', 'seed')
GPT2_VOCABULARIES = range(50257, 50305)  # as released, or padded for speed


# -----------------------------------------------------------------------------
# read


def is_external(where: str | Path) -> bool:
    """Whether it is a transformers or peft folder, a name on the Hub, or a nanoGPT checkpoint."""
    path = Path(where)
    if path.is_dir():
        files = ('config.json', 'ckpt.pt', 'adapter_config.json')
        return any((path / file).is_file() for file in files)
    if path.suffix == '.pt' or str(where) in RELEASED:
        return True
    if re.fullmatch(r'(distil)?gpt-?2\S*', str(where), re.IGNORECASE):  # probably a typo
        return True
    return re.fullmatch(r'[\w.-]+/[\w.-]+', str(where)) is not None and not path.parent.is_dir()


def load_external(
    where: str | Path, dropout: float = 0.0, tokenizer: Tokenizer | None = None
) -> tuple[GPT, Tokenizer | None, dict]:
    """A GPT-2 or NanoChat of `transformers`, or a nanoGPT checkpoint -> model, tokenizer, state.

    tokenizer: replaces the model's own, which is then not read.
    """
    path, name, state = Path(where), str(where), {}
    if (path / 'ckpt.pt').is_file():
        path /= 'ckpt.pt'
    if path.suffix == '.pt':
        model, state = load_nanogpt(path, dropout)
        dataset = str(state['config'].get('dataset', ''))
        tokenizer = tokenizer or find_nanogpt_tokenizer(path, dataset, model.config.vocab_size)
    else:
        folder = path if path.is_dir() else download_model(name)
        model = load_transformers(folder, name, dropout)
        tokenizer = tokenizer or read_tokenizer(folder, name, model.config.vocab_size)
    return model, tokenizer, state


# --- transformers


def load_transformers(folder: Path, name: str, dropout: float) -> GPT:
    """Reads one tensor at a time from a mapped file, so that memory holds the weights once."""
    shape = parse_model_config(read_json(folder / 'config.json', name), name)
    if (folder / GENERATION).is_file():
        check_generation(read_json(folder / GENERATION, name), name)
    files = weight_files(folder, name)
    tensors = ((parameter_name(key), read_tensor(path, key)) for key, path in files.items())
    return model_from_tensors({**shape, 'dropout': dropout}, tensors, name, TRANSPOSED)


def parameter_name(key: str) -> str:
    """The name of a parameter here; OpenAI's files lack the prefix."""
    prefixes = ('transformer.', 'model.', 'lm_head.', 'score.')
    return key if key.startswith(prefixes) else f'transformer.{key}'


def parse_model_config(config: dict, name: str) -> dict:
    """GPTConfig's fields from a config.json. CheckpointError for what model.py does not compute."""
    kind = config.get('model_type')
    if kind not in ('gpt2', 'nanochat'):
        raise CheckpointError(f'{name} is a {kind} model; give a GPT-2 or NanoChat model')
    names = GPT2_NAMES if kind == 'gpt2' else NANOCHAT_NAMES
    shape = {ours: config.get(theirs) for ours, theirs in names.items()}
    for ours, theirs in names.items():
        if not isinstance(shape[ours], int) and ours != 'n_kv_head':  # which may be None
            raise CheckpointError(f'{name}: config.json needs an integer {theirs!r}')
    if kind == 'gpt2':
        shape |= {'arch': 'gpt2', 'bias': config.get('flatgpt_bias', True)}
        shape |= {'score': gives_a_score(config, name)}
        expected = GPT2_SETTINGS | {'n_inner': (None, 4 * shape['n_embd'])}
        expected['n_ctx'] = (shape['block_size'],)  # its name in older versions
    else:
        shape |= {'arch': 'modern'}
        head = shape['n_embd'] // (shape['n_head'] or 1)
        expected = {'intermediate_size': (4 * shape['n_embd'],), 'head_dim': (head,)}
        expected |= NANOCHAT_SETTINGS | ROPE_SETTINGS
        rope = config.get('rope_parameters') or {}  # older versions: its keys at top level
        config = config | (rope if isinstance(rope, dict) else {'rope_type': rope})
    for key, value in unsupported_fields(config, expected, {*IGNORED_CONFIG, *names.values()}):
        if key in expected:
            raise CheckpointError(
                f'{name}: config.json has {key}={value!r}; give a model with {expected[key][0]!r}'
            )
        raise CheckpointError(
            f'{name}: config.json has an unknown field {key}={value!r}; remove it if the logits do '
            'not depend on it'
        )
    return shape


def gives_a_score(config: dict, name: str) -> bool:
    """Whether a config.json is of a reward model."""
    if config.get('architectures') != [REWARD_MODEL]:
        return False
    labels = config.get('num_labels', len(config.get('id2label') or (0, 1)))
    if labels != 1:
        raise CheckpointError(
            f'{name} is a {REWARD_MODEL} with {labels} labels; give one with num_labels=1, whose '
            'only output is the score'
        )
    return True


def unsupported_fields(
    config: dict, supported: dict[str, tuple], ignored: Collection[str]
) -> Iterator[tuple[str, object]]:
    """The fields of a config that may change the result in a way that is not implemented here.

    supported: the possible values of a field. ignored: fields that may have any value. All others
    must be empty.
    """
    for key, value in config.items():
        if key not in ignored and value not in supported.get(key, OFF):
            yield key, value


def check_generation(config: dict, name: str) -> None:
    """CheckpointError if generation_config.json forces or forbids tokens.

    Its sampling settings are ignored: flags set those.
    """
    for key, value in unsupported_fields(config, {}, IGNORED_GENERATION):
        raise CheckpointError(
            f'{name}: {GENERATION} has an unsupported field {key}={value!r}; remove it to generate '
            'without it'
        )


def weight_files(folder: Path, name: str) -> dict[str, Path]:
    """{tensor name: its file}"""
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
        raise CheckpointError(
            f'{name}: {INDEX} has no map from tensors to files; save the model again with '
            'save_pretrained()'
        )
    for file in sorted(set(files.values())):
        if not (folder / Path(file).name).is_file():
            raise CheckpointError(f'{name}: {file} is missing; download it again')
    return {key: folder / Path(file).name for key, file in files.items()}


def repository_of(name: str) -> str:
    if '/' in name:
        return name
    return f'distilbert/{name}' if name == 'distilgpt2' else f'openai-community/{name}'


def is_cached(name: str) -> bool:
    """Whether the weights of a model on the Hub are in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository_of(name), file) for file in (WEIGHTS, INDEX))
    return any(isinstance(path, str) for path in found)


def download_model(name: str) -> Path:
    """The folder of a model on the Hub: downloaded, or cached (HF_HOME, HF_HUB_OFFLINE)."""
    if '/' not in name and name not in RELEASED:
        hint = did_you_mean(name.lower(), RELEASED)
        raise CheckpointError(f'{name}: no such model; {hint}give one of {", ".join(RELEASED)}')
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import HFValidationError

    wanted = ['config.json', WEIGHTS, INDEX, 'model-*.safetensors']
    wanted += ['tokenizer.json', 'vocab.json', 'merges.txt', GENERATION]
    wanted += ['tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json']
    try:
        folder = Path(snapshot_download(repository_of(name), allow_patterns=wanted))
        found = [file for file in ('config.json', WEIGHTS, INDEX) if (folder / file).is_file()]
        if len(found) < 2:  # the cache has a part of it, of a broken download or for other use
            raise FileNotFoundError('the cache has only a part of it')
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f'{name} is neither a folder, nor complete in the local cache, nor available from the '
            f'Hub ({network_problem(error)}); put config.json, {WEIGHTS} and tokenizer.json of '
            f'{repository_of(name)} into a folder and give its path'
        ) from error


# --- nanoGPT


def load_nanogpt(path: Path, dropout: float) -> tuple[GPT, dict]:
    """A ckpt.pt of nanoGPT's train.py, compiled or not. Only tensors and plain values are
    unpickled."""
    if not path.is_file():
        raise CheckpointError(f'{path}: no such checkpoint; check the path')
    try:
        with zipfile.ZipFile(path) as archive:  # it has a checksum per file
            if part := archive.testzip():
                raise zipfile.BadZipFile(f'{part} does not match its checksum')
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is not nanoGPT's, or is damaged or incomplete: {error}; copy it again"
        ) from error
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        args = {'bias': True} | saved['model_args']  # before this setting, all had biases
        shape = {key: args[key] for key in NANOGPT_SHAPE}
        for key in sorted(args.keys() - {*NANOGPT_SHAPE, 'dropout'}):
            if args[key] not in OFF:
                raise ValueError(f'model_args has an unknown setting {key}={args[key]!r}')
        weights = {re.sub(r'^(_orig_mod\.|module\.)+', '', k): t for k, t in saved['model'].items()}
        if not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
            raise TypeError('its weights are not tensors')
        state = {'step': int(saved.get('iter_num', 0)), 'config': dict(saved.get('config', {}))}
    except Exception as error:  # a broken pickle can raise nearly anything
        if wants := re.search(r'GLOBAL (\S+)', str(error)):
            raise CheckpointError(
                f'{path}: its pickle loads {wants[1]}, which could run code; save only tensors and '
                'plain values'
            ) from error
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:150]
        raise CheckpointError(
            f"{path} is not a nanoGPT checkpoint: {reason}; give one of nanoGPT's train.py"
        ) from error
    return model_from_tensors({**shape, 'dropout': dropout}, weights.items(), path), state


def find_nanogpt_tokenizer(path: Path, dataset: str, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of its dataset in data/, of a folder above the checkpoint or of this clone."""
    roots = [*path.resolve().parents, ROOT]
    for root in roots if re.fullmatch(r'[\w.-]+', dataset) else ():
        for name, read in (('meta.pkl', from_nanogpt_meta), ('tokenizer.json', load_tokenizer)):
            file = root / 'data' / dataset / name
            if file.is_file() and (found := read(file)).vocab_size == vocab_size:
                return found
    # without a meta.pkl, nanoGPT's sample.py also uses GPT-2's tokenizer
    return get_tokenizer('gpt2') if vocab_size in GPT2_VOCABULARIES else None


# --- tokenizers


def read_tokenizer(folder: Path, name: str, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a transformers folder, None if it has none and is not GPT-2."""
    for files in (('tokenizer.json',), ('vocab.json', 'merges.txt')):
        paths = [folder / file for file in files]
        if all(path.is_file() for path in paths):
            return with_saved_chat_template(read_files(*paths), folder)
    if vocab_size not in GPT2_VOCABULARIES:
        return None
    if os.environ.get('RANK', '0') == '0':
        line = f"{name} has no tokenizer files; for its {vocab_size} ids, GPT-2's is used"
        print(line, file=sys.stderr)
    return with_configured_eos_ids(get_tokenizer('gpt2'), folder)


# -----------------------------------------------------------------------------
# write


def export_transformers(model: GPT, tokenizer: Tokenizer | None, state: dict, folder: Path) -> None:
    """Write a folder that AutoModelForCausalLM, or of a reward model
    AutoModelForSequenceClassification, and AutoTokenizer load: all of it or nothing."""
    if model.config.score and model.config.arch == 'modern':
        raise CheckpointError(
            'transformers has no class for a reward model of NanoChat; export one with arch=gpt2'
        )
    files = {'config.json': config_json(model, tokenizer)}
    if not model.config.score:
        files[GENERATION] = bos_and_eos(tokenizer)
    if tokenizer is not None:
        end = tokenizer.eot_text if tokenizer.eot in tokenizer.stop_ids else None
        files['tokenizer.json'] = tokenizer_json(tokenizer)
        files['tokenizer_config.json'] = {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'model_max_length': model.config.block_size,
            'clean_up_tokenization_spaces': False,
            **(dict.fromkeys(('bos_token', 'eos_token'), end) if end else {}),
            **({'chat_template': chat_jinja(tokenizer)} if tokenizer.chat_template else {}),
        }
        if model.config.score and unused_id(model, tokenizer):
            files['tokenizer_config.json']['pad_token'] = '<|padding|>'
        if tokenizer.chat_template:  # Jinja cannot be converted back
            files[CHAT_TEMPLATE_FILE] = tokenizer.chat_template
    with atomic_folder(folder) as part:
        save_file(transformers_tensors(model), part / WEIGHTS, metadata={'format': 'pt'})
        for name, content in files.items():
            text = json.dumps(content, indent=1, ensure_ascii=False)
            (part / name).write_text(text + '\n', encoding='utf-8')
        (part / 'README.md').write_text(model_card(model, tokenizer, state), encoding='utf-8')


def transformers_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """Parameters under the names of transformers, whose GPT-2 always has biases: zero if ours
    has none."""
    tensors = {name: p.detach().cpu() for name, p in model.named_parameters()}
    tensors = {
        name: (tensor.T if name.endswith(TRANSPOSED) else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    if model.config.arch == 'gpt2' and not model.config.bias:
        without = ('wte.weight', 'wpe.weight', 'score.weight')
        for name, tensor in list(tensors.items()):
            if name.endswith('.weight') and not name.endswith(without):
                tensors[name.removesuffix('weight') + 'bias'] = torch.zeros(tensor.shape[-1])
    return tensors


def bos_and_eos(tokenizer: Tokenizer | None) -> dict:
    """bos_token_id and eos_token_id; a list if several ids end a text."""
    ends = [] if tokenizer is None else tokenizer.ordered_stop_ids
    end = ends if len(ends) > 1 else next(iter(ends), None)
    return {'bos_token_id': None if tokenizer is None else tokenizer.eot, 'eos_token_id': end}


def unused_id(model: GPT, tokenizer: Tokenizer | None) -> int | None:
    """The first id after the tokenizer's, for padding: a reward model of transformers scores the
    last token of a row that is no padding. None if there is none; then it takes one row at a time.
    """
    if tokenizer is None or tokenizer.vocab_size >= model.config.vocab_size:
        return None
    return tokenizer.vocab_size


def config_json(model: GPT, tokenizer: Tokenizer | None) -> dict:
    c, both = model.config, bos_and_eos(tokenizer) | {'dtype': 'float32'}
    if c.arch == 'gpt2':
        return {
            'architectures': [REWARD_MODEL if c.score else 'GPT2LMHeadModel'],
            **({'num_labels': 1, 'pad_token_id': unused_id(model, tokenizer)} if c.score else {}),
            'model_type': 'gpt2',
            **{theirs: asdict(c)[ours] for ours, theirs in GPT2_NAMES.items()},
            **{key: values[0] for key, values in GPT2_SETTINGS.items()},
            **dict.fromkeys(('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), c.dropout),
            'flatgpt_bias': c.bias,  # False: all biases in the file are zero
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
        'initialized from': settings.get('init_from'),
        'steps': state.get('step'),
        'training loss': state.get('train_loss'),
        'validation loss': state.get('val_loss'),
        'bits per byte': state.get('val_bpb'),
        **{name: settings.get(name) for name in CARD_SETTINGS},
    }
    rows = [f'| {name} | {value} |' for name, value in facts.items() if value is not None]
    task, kind = 'text-generation', 'AutoModelForCausalLM'
    if c.score:
        task, kind = 'text-classification', 'AutoModelForSequenceClassification'
    head = f'---\nlibrary_name: transformers\npipeline_tag: {task}\n---\n\n'
    title = f'# {settings.get("dataset", "A model")}, by flatGPT\n\n'
    use = (
        f'\n```python\nfrom transformers import {kind}, AutoTokenizer\n\n'
        f"model = {kind}.from_pretrained('.')\n"
        "tokenizer = AutoTokenizer.from_pretrained('.')\n```\n"
    )
    return head + title + '| | |\n|---|---|\n' + '\n'.join(rows) + '\n' + use
