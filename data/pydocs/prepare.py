"""
Prepare the documentation that ships with Python, one byte per token, without a download.

$ python data/pydocs/prepare.py

The text is the language reference of `help()` and the docstrings of the standard library, about
2.6 MB for both splits. The library is parsed, not imported.
"""

import ast
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's flatgpt comes first

from flatgpt.data.dataset import Writer
from flatgpt.data.tokenizer import EOT, byte_tokenizer
from flatgpt.errors import ArgumentParser, UserError, one_line_errors

VAL_EVERY = 10  # one in ten documents is for validation
SKIP = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__', '_bundled'}
NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    folder = Path(__file__).parent
    parser.add_argument('--out_dir', type=Path, default=folder, help='default: %(default)s')
    out_dir = parser.parse_args(argv).out_dir
    tokenizer = byte_tokenizer()
    with Writer(out_dir, tokenizer) as writer:
        for i, document in enumerate(documents(Path(sysconfig.get_path('stdlib')))):
            split = 'val' if i % VAL_EVERY == VAL_EVERY - 1 else 'train'
            between = EOT if writer.tokens(split) else ''
            writer.write(split, tokenizer.encode(between, allow_eot=True))
            writer.write(split, tokenizer.encode(document))
    print(writer.summary())


def documents(library: Path) -> Iterator[str]:
    """Each topic of help(), then the docstrings of each library module."""
    topics = library / 'pydoc_data' / 'topics.py'
    paths = sorted(library.rglob('*.py'))
    paths = [path for path in paths if not SKIP & set(path.relative_to(library).parts)]
    if not paths:
        raise UserError(
            f'{library}: this Python has no standard library source; use another Python, or other '
            'text: python data/text/prepare.py FILES --name=NAME'
        )
    tree = parse(topics)
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from (text.strip() + '\n' for text in ast.literal_eval(node.value).values())
    for path in tqdm(paths, desc='pydocs', unit=' modules', disable=None):
        tree = None if path == topics else parse(path)
        names = path.relative_to(library).with_suffix('').parts
        found = list(docstrings(tree, '.'.join(names).removesuffix('.__init__'))) if tree else []
        if found:
            yield '\n\n'.join(found) + '\n'


def parse(path: Path) -> ast.Module | None:
    """The syntax tree of a source file; None for the few that are invalid."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # invalid escapes in old modules
        try:
            return ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            return None


def docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """All docstrings of a module, each below its dotted name and signature."""
    text = ast.get_docstring(node, clean=False)
    if text and text.strip():
        arguments = f'({ast.unparse(node.args)})' if hasattr(node, 'args') else ''
        yield f'{name}{arguments}\n\n{inspect.cleandoc(text)}'
    for child in node.body:
        if isinstance(child, NAMED):
            yield from docstrings(child, f'{name}.{child.name}')


if __name__ == '__main__':
    one_line_errors()
    main()
