"""
Request fields that other servers have and this one does not support.

    class Options(Unsupported): ...                      # a Body with these fields
    name: unsupported_field('a', 'b') = None             # null, 'a' and 'b' are accepted

Fields that would change the response are rejected, except at values that request nothing. Fields
that would not change it are ignored. Any other field, such as a typo, is rejected.
"""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

UNSET = (None, '', [], {})
UNSUPPORTED_FIELDS = {  # name: values that request nothing, besides UNSET
    # the format of the response
    'text_format': (),
    'guided_whitespace_pattern': (),
    'json_schema': (),
    'regex': (),
    'ebnf': (),
    'grammar': (),
    'format': (),
    'modalities': (['text'],),
    'audio': (),
    'prediction': (),
    'moderation': (),
    'verbosity': ('medium',),
    'reasoning_effort': ('none',),
    'reasoning': (),
    'thinking': ({'type': 'disabled'},),
    'web_search_options': (),
    'functions': (),
    'function_call': ('none', 'auto'),
    'store': (False,),
    # the prompt
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
    # sampling
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
    # the end of a completion
    'ignore_eos': (False,),
    'min_tokens': (0,),
    'stop_token_ids': (),
    'include_stop_str_in_output': (False,),
    'no_stop_trim': (False,),
    # the fields of the response
    'skip_special_tokens': (True,),
    'prompt_logprobs': (),
    'n_probs': (0,),
    'return_tokens': (False,),
    'return_tokens_as_token_ids': (False,),
    'return_token_ids': (False,),
}
# an empty value is a request, too: any JSON, for example
CONSTRAINT_FIELDS = 'text_format json_schema regex ebnf grammar'.split()
IGNORED_FIELDS = """user metadata safety_identifier prompt_cache_key prompt_cache_retention
prompt_cache_options service_tier include_reasoning request_id session_id priority cache_prompt
cache_salt id_slot keep_alive kv_transfer_params guided_decoding_backend add_special_tokens
spaces_between_special_tokens mirostat_tau mirostat_eta xtc_threshold dry_base dry_allowed_length
dry_penalty_last_n dry_sequence_breakers dynatemp_exponent smoothing_curve""".split()


def field_error(message: str) -> PydanticCustomError:
    """The error that a validator raises to report this message."""
    return PydanticCustomError('refused', '{text}', {'text': message})


def unsupported_field(*neutral, empty: bool = True):
    """The type of a field that must be null or one of `neutral`, or with `empty` one of UNSET."""
    allowed = (*(UNSET if empty else UNSET[:1]), *neutral)
    hint = f', or give {" or ".join(map(json.dumps, neutral))}' if neutral else ''

    def check(value):
        # 0 == False in Python, but not in JSON
        same = (value == v and isinstance(value, bool) == isinstance(v, bool) for v in allowed)
        if not any(same):
            raise field_error(f'this server does not support it; omit it{hint}')
        return value

    described = {'enum': list(allowed), 'description': 'Not supported.'}
    return Annotated[Any, AfterValidator(check), WithJsonSchema(described)]


def ignored_field():
    return Annotated[Any, Field(description='Ignored.')]


class Body(BaseModel):
    """A JSON object without type conversions, such as 1.0 to 1, and without unknown fields."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra='forbid')


Unsupported = create_model(
    'Unsupported',
    __base__=Body,
    **{
        name: (unsupported_field(*neutral, empty=name not in CONSTRAINT_FIELDS), None)
        for name, neutral in UNSUPPORTED_FIELDS.items()
    },
    **{name: (ignored_field(), None) for name in IGNORED_FIELDS},
)
