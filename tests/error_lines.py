"""
Every error line of the source, and which tests have an example of it.

    python tests/error_lines.py flatgpt/data         # lists those that no test has an example of

A test that provokes a line, follows its advice and sees that it works is marked with a part of it:

    @error_line('give a file with text')             # from tests/error_lines.py
    def test_an_empty_file_is_refused_until_it_has_text(...): ...

    @pytest.mark.parametrize(('bad', 'good'), [
        case('must be at least', '--n_layer=0', '--n_layer=1'),
    ])

conftest.py sees to it that a marked test really meets the line.
"""

import ast
import re
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ERRORS = 'UserError ConfigError CheckpointError APIError ValueError field_error'.split()
SOURCES = ('*.py', 'flatgpt/**/*.py', 'data/*/*.py')
HOLE = '{}'  # stands for what a line is filled with
TABLES = ('PROBLEMS', 'NEEDS', 'SHAPES')  # dicts of lines, or of parts of them
# Lines without an example, by a part of each: why no test can follow it
WITHOUT = {
    'the client disconnected': 'nobody receives it; it is for the log',
    'startup: {}': 'the last line of another program',
    'serving: {}: {}': 'what made an implementation fail',
    'serving: api.py exited with status': 'the last line of another program',
    'processes: {}': 'an error line of train.py',
    'train.py: {}': 'an error line of train.py',
    'out of main memory while using {}': 'needs a GPU, and main memory that is full',
    'another file could not be copied': 'internal: the error of that file is raised instead',
    'it encodes text differently than': 'no known tokenizer passes all checks but this last one',
}


def error_line(*parts):
    """Mark a test as the example of the lines that these are parts of."""
    return pytest.mark.error_line(*parts)


def case(part, *values):
    """A case of a parametrized test that is the example of a line."""
    return pytest.param(*values, marks=error_line(part), id=part[:40])


@lru_cache
def lines():
    """{an error line, its variable parts as {}: where it stands in the source}"""
    found = {}
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            for number, text in _lines_of(tree_of(path)):
                found.setdefault(text, f'{name}:{number}')
    return found


@lru_cache
def examples():
    """{a part of a line: the tests that are marked with it}"""
    found = {}
    for path in sorted((ROOT / 'tests').rglob('*.py')):
        for call in ast.walk(tree_of(path)):
            if _called(call) in ('error_line', 'case'):
                given = call.args if _called(call) == 'error_line' else call.args[:1]
                for part in given:
                    if isinstance(part, ast.Constant):
                        found.setdefault(part.value, []).append(f'{path.name}:{call.lineno}')
    return found


def without_example():
    parts = {*examples(), *WITHOUT}
    return {text: at for text, at in lines().items() if not any(part in text for part in parts)}


def pattern_of(part):
    """A regular expression for the lines that have this part, as they are printed."""
    texts = [part] if part in lines() else [text for text in lines() if part in text]
    return '|'.join('.*'.join(map(re.escape, text.split(HOLE))) for text in texts) or '(?!)'


@lru_cache
def tree_of(path):
    return ast.parse(path.read_text(encoding='utf-8'))


def _called(node):
    """The name of what a node calls, '' for any other node."""
    function = getattr(node, 'func', None)
    return getattr(function, 'id', getattr(function, 'attr', ''))


def _lines_of(tree):
    for number, text in (*_raised_in(tree), *_listed_in(tree)):
        if len(re.findall('[a-z]', text)) > 5:  # else it only hands on another's
            yield number, text


def _raised_in(tree):
    for scope in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))]:
        for node in ast.walk(scope):
            if _called(node) in ERRORS:
                for text in _texts(node, scope, tree):
                    yield node.lineno, text


def _listed_in(tree):
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in TABLES:
            for value in node.value.values:
                yield value.lineno, re.sub(r'{\w+}', HOLE, text_of(value))


def _texts(error, scope, tree):
    """The texts that an error may be raised with."""
    first = 1 if _called(error) == 'APIError' else 0  # after the status
    for argument in error.args[first : first + 1]:
        if text := text_of(argument):
            yield text
        elif isinstance(argument, ast.Name):  # put together before
            for node in (*ast.walk(scope), *tree.body):
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == argument.id:
                    yield text_of(node.value)
        elif function := _called(argument):  # by a function of the same file
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and node.name == function:
                    returned = [n.value for n in ast.walk(node) if isinstance(n, ast.Return)]
                    yield from map(text_of, filter(None, returned))


def text_of(node):
    """The text of an expression, its variable parts as {}."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return ''.join(HOLE if isinstance(n, ast.FormattedValue) else n.value for n in node.values)
    if isinstance(node, ast.BinOp):
        return (text_of(node.left) or HOLE) + (text_of(node.right) or HOLE)
    return ''


if __name__ == '__main__':
    prefix = sys.argv[1] if len(sys.argv) > 1 else ''
    lacking = {text: at for text, at in without_example().items() if at.startswith(prefix)}
    for text, at in lacking.items():
        print(f'{at}: {text}')
    print(len(lacking), 'of', sum(at.startswith(prefix) for at in lines().values()))
