"""Random JSON schemas, of many shapes and with nearly every keyword."""

import json
import random

PATTERNS = ['^[a-z]{1,3}$', 'b+', '^(yes|no)$', r'^\d{4}-\d{2}$', '^.{0,4}$', '^é+$']
FORMATS = ['date', 'time', 'date-time', 'ipv4', 'uuid', 'email', 'hostname', 'duration']
NAMES = ['a', 'name', 'größe', 'x y', '"', 'id', 'tags', '\n', '0']


def random_schema(seed):
    """The same schema for a seed; about a tenth has a keyword that llguidance cannot express."""
    draw = random.Random(seed)
    schema = any_schema(draw, depth=draw.randrange(1, 4))
    return schema | ({'$defs': {'tree': tree(draw)}} if '$ref' in json.dumps(schema) else {})


def any_schema(draw, depth):
    kinds = [string, number, integer, plain, enum, constant]
    if depth:
        kinds += [array, thing, thing, array, union, both, reference, several_types, mapping]
    return draw.choice(kinds)(draw, depth - 1)


def string(draw, depth):
    low = draw.randrange(4)
    return {
        'type': 'string',
        **draw.choice(
            [
                {},
                {'minLength': low, 'maxLength': low + draw.randrange(5)},
                {'pattern': draw.choice(PATTERNS)},
                {'format': draw.choice(FORMATS)},
                {'description': 'any text', 'title': 'Text', 'default': ''},
            ]
        ),
    }


def number(draw, depth, kind='number'):
    low = draw.randrange(-100, 100)
    limits = [
        {},
        {'minimum': low},
        {'maximum': low},
        {'minimum': low, 'maximum': low + draw.randrange(100)},
        {'exclusiveMinimum': low, 'exclusiveMaximum': low + draw.randrange(2, 100)},
        {'multipleOf': draw.randrange(1, 9)},
    ]
    return {'type': kind, **draw.choice(limits)}


def integer(draw, depth):
    return number(draw, depth, 'integer')


def plain(draw, depth):
    return {'type': draw.choice(['boolean', 'null'])}


def enum(draw, depth):
    values = ['red', 'grün', 1, 2.5, None, True, [1, 'a'], {'k': 'v'}, '"\\"']
    return {'enum': draw.sample(values, draw.randrange(1, 5))}


def constant(draw, depth):
    return {'const': draw.choice(['fixed', 7, None, {'a': [1, 2]}, ''])}


def array(draw, depth):
    low = draw.randrange(3)
    out = {'type': 'array', 'items': any_schema(draw, depth)}
    if draw.random() < 0.6:
        out |= {'minItems': low, 'maxItems': low + draw.randrange(3)}
    if draw.random() < 0.2:
        out |= {'prefixItems': [any_schema(draw, depth)]}
    if draw.random() < 0.1:
        out |= {'uniqueItems': True}
    if draw.random() < 0.05:
        out |= {'contains': {'type': 'null'}}
    return out


def thing(draw, depth):
    names = draw.sample(NAMES, draw.randrange(1, 4))
    out = {
        'type': 'object',
        'properties': {name: any_schema(draw, depth) for name in names},
        'required': draw.sample(names, draw.randrange(len(names) + 1)),
    }
    if draw.random() < 0.7:
        out['additionalProperties'] = False
    if draw.random() < 0.06:
        out['not'] = {'required': ['other']}
    if draw.random() < 0.06:
        out |= {'if': {'required': names[:1]}, 'then': {'maxProperties': 3}}
    if draw.random() < 0.06:
        out['dependentRequired'] = {names[0]: names}
    return out


def mapping(draw, depth):
    kind = draw.choice(['additionalProperties', 'patternProperties', 'propertyNames'])
    value = any_schema(draw, depth)
    if kind == 'patternProperties':
        return {'type': 'object', kind: {'^k[0-9]$': value}, 'additionalProperties': False}
    if kind == 'propertyNames':
        return {'type': 'object', kind: {'maxLength': 3}}
    return {'type': 'object', kind: value, 'maxProperties': 1}


def union(draw, depth):
    parts = [any_schema(draw, depth) for _ in range(draw.randrange(1, 4))]
    return {draw.choice(['anyOf', 'anyOf', 'oneOf']): parts}


def both(draw, depth):
    return {'allOf': [integer(draw, depth), {'minimum': -1000}]}


def several_types(draw, depth):
    return {'type': draw.sample(['string', 'null', 'boolean', 'integer'], 2)}


def reference(draw, depth):
    return {'$ref': '#/$defs/tree'}


def tree(draw):
    return {
        'type': 'object',
        'properties': {'leaf': any_schema(draw, 0), 'next': {'$ref': '#/$defs/tree'}},
        'required': ['leaf'],
        'additionalProperties': False,
    }
