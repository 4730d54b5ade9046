"""
Pydantic's validation errors as sentences for clients: the field, what it must be, what was sent.

    try:
        body = CompletionRequest.model_validate_json(data)
    except ValidationError as error:
        message, param = first_error(error)   # 'n: must be a whole number, not 1.5', 'n'
"""

import json

from pydantic import ValidationError

from flatgpt.serving.schema import MAX_STOP_LENGTH, MAX_STOPS

SEE_DOCS = '/docs lists the fields'
TOO_DEEP = 'is nested too deeply; use fewer levels'
PROBLEMS = {  # type of pydantic's error: what to say of the field
    'missing': 'is missing; add it',
    'extra_forbidden': f'no such field; {SEE_DOCS}',
    'too_short': 'is empty; it needs at least one entry',
    'too_long': 'has more than {max_length} entries; send fewer',
    'json_invalid': '{error}; send valid JSON in UTF-8',
    'refused': '{text}',
}
NEEDS = {  # likewise, for values of the wrong type or size
    'int_type': 'a whole number',
    'float_type': 'a number',
    'finite_number': 'a number below 1.8e308',
    'bool_type': 'true or false',
    'literal_error': '{expected}',
    'string_pattern_mismatch': 'text like {pattern}',
    'string_type': 'a string',
    'list_type': 'a list',
    'dict_type': 'an object',
    'model_type': 'an object',
    'greater_than': 'greater than {gt}',
    'greater_than_equal': 'at least {ge}',
    'less_than_equal': 'at most {le}',
}
OBJECTS = 'messages stream_options tokens response_format structured_outputs tools'.split()
SHAPES = {  # fields for whose parts pydantic reports errors: all types that are allowed, and items
    'prompt': 'must be a string, a list of token ids, or a list of either; none may be empty',
    'stop': f'must be a string of 1 to {MAX_STOP_LENGTH} characters, or a list of at most '
    f'{MAX_STOPS} of them',
    'logit_bias': 'must have token ids as keys and numbers from -100 to 100 as values',
}


def first_error(error: ValidationError) -> tuple[str, str | None]:
    """The first error's message, and the name of the field that a request has it in."""
    first = error.errors(include_url=False)[0]
    (param, *inner), kind = first['loc'] or (None,), first['type']
    limits = {name: whole(limit) for name, limit in first.get('ctx', {}).items()}
    if inner and param in SHAPES:
        return f'{param}: {SHAPES[param]}', param
    if 'recursion' in str(limits.get('error')):
        problem = TOO_DEEP
    elif kind in NEEDS:
        problem = f'must be {NEEDS[kind].format(**limits)}, not {sent_value(first["input"])}'
    else:
        problem = PROBLEMS[kind].format(**limits) if kind in PROBLEMS else first['msg']
    # pydantic's path in other fields has names of types, too
    path = inner if param in OBJECTS else ()
    where = ''.join(f'[{each}]' if isinstance(each, int) else f'.{each[:99]}' for each in path)
    return f'{param or "the body"}{where}: {problem}', param


def whole(limit):
    """Limits of numbers without .0"""
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit


def sent_value(value) -> str:
    """What was sent, as JSON if it is short."""
    if isinstance(value, (list, dict)):
        return 'a list' if isinstance(value, list) else 'an object'
    text = json.dumps(value[:40] if isinstance(value, str) else value, ensure_ascii=False)
    return text if len(text) < 40 else f'{text[:37]}...'
