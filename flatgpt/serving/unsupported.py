"""
Fields that other servers understand and this one does not act upon.

    class Options(Unsupported): ...                      # Body, with them
    name: only('a', 'b') = None                          # a field that is refused at other values

Those that would change an answer are refused by name, but for the values that ask for nothing.
Those that would not change it are ignored. What is in neither list, a typing mistake say, is
refused too.
"""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

NOTHING = (None, '', [], {})
REFUSED = {  # name: values that ask for nothing, beside those
    # what an answer is made of
    'response_format': ({'type': 'text'},),
    'text_format': (),
    'guided_json': (),
    'guided_regex': (),
    'guided_choice': (),
    'guided_grammar': (),
    'guided_whitespace_pattern': (),
    'structured_outputs': (),
    'json_schema': (),
    'regex': (),
    'ebnf': (),
    'grammar': (),
    'format': (),
    'modalities': (['text'],),
    'audio': (),
    'prediction': (),
    'verbosity': ('medium',),
    'reasoning_effort': ('none',),
    'reasoning': (),
    'thinking': ({'type': 'disabled'},),
    'web_search_options': (),
    'tools': (),
    'tool_choice': ('none', 'auto'),
    'functions': (),
    'function_call': ('none', 'auto'),
    'store': (False,),
    # what the prompt becomes
    'suffix': (),
    'system': (),
    'template': (),
    'chat_template': (),
    'chat_template_kwargs': (),
    'documents': (),
    'add_generation_prompt': (True,),
    'continue_final_message': (False,),
    'truncate_prompt_tokens': (),
    'mm_processor_kwargs': (),
    'images': (),
    # how a text is chosen
    'use_beam_search': (False,),
    'length_penalty': (1,),
    'early_stopping': (False,),
    'no_repeat_ngram_size': (0,),
    'repeat_penalty': (1,),
    'do_sample': (True,),
    'bad_words': (),
    'allowed_token_ids': (),
    'typical_p': (1,),
    'typ_p': (1,),
    'tfs_z': (1,),
    'top_a': (0,),
    'top_n_sigma': (0, -1),
    'epsilon_cutoff': (0,),
    'eta_cutoff': (0,),
    'dynatemp_range': (0,),
    'smoothing_factor': (0,),
    'mirostat': (0,),
    'mirostat_mode': (0,),
    'xtc_probability': (0,),
    'dry_multiplier': (0,),
    'samplers': (),
    'logits_processors': (),
    'vllm_xargs': (),
    'options': (),
    # where it ends
    'ignore_eos': (False,),
    'min_tokens': (0,),
    'stop_token_ids': (),
    'include_stop_str_in_output': (False,),
    'no_stop_trim': (False,),
    # what is reported
    'skip_special_tokens': (True,),
    'prompt_logprobs': (),
    'n_probs': (0,),
    'return_tokens': (False,),
    'return_tokens_as_token_ids': (False,),
    'return_token_ids': (False,),
}
CONSTRAINTS = """response_format text_format guided_json guided_regex guided_choice guided_grammar
structured_outputs json_schema regex ebnf grammar""".split()  # of them an empty one asks, too
IGNORED = """user metadata safety_identifier prompt_cache_key prompt_cache_retention service_tier
parallel_tool_calls include_reasoning request_id session_id priority cache_prompt cache_salt id_slot
keep_alive kv_transfer_params guided_decoding_backend add_special_tokens
spaces_between_special_tokens mirostat_tau mirostat_eta xtc_threshold dry_base dry_allowed_length
dry_penalty_last_n dry_sequence_breakers dynatemp_exponent smoothing_curve""".split()


def only(*neutral, empty: bool = True):
    """The type of a field that must be null, one of these, or `empty`; anything else is refused."""
    allowed = (*(NOTHING if empty else NOTHING[:1]), *neutral)
    hint = f', or give {" or ".join(map(json.dumps, neutral))}' if neutral else ''

    def check(value):
        # 0 is equal to False, and they are not the same
        same = (value == v and isinstance(value, bool) == isinstance(v, bool) for v in allowed)
        if not any(same):
            raise PydanticCustomError(
                'unsupported', 'this server does not support it; leave it out{hint}', {'hint': hint}
            )
        return value

    described = {'enum': list(allowed), 'description': 'Not supported: refused where it asks.'}
    return Annotated[Any, AfterValidator(check), WithJsonSchema(described)]


def ignored():
    return Annotated[Any, Field(description='Ignored.')]


class Body(BaseModel):
    """Numbers are not taken for text, nor 1.0 for 1; a field that is not known here is refused."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra='forbid')


Unsupported = create_model(
    'Unsupported',
    __base__=Body,
    **{
        name: (only(*neutral, empty=name not in CONSTRAINTS), None)
        for name, neutral in REFUSED.items()
    },
    **{name: (ignored(), None) for name in IGNORED},
)
