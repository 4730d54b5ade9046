"""
Settings: a script's defaults, overridden by executed config files and --key=value flags, in order.

$ python train.py config/quickstart.py --max_iters=200    # a path, or just: quickstart
$ python train.py --help                                  # every setting, its default and meaning

A script declares each setting once, as a plain assignment at its top, and then says

    config = configure(globals(), sys.argv[1:])
    globals().update(config)

A config file is Python that starts with the current values as its globals, so
`lr_decay_iters = max_iters` works. What it assigns passes the same check as a flag.
"""

import ast
import contextlib
import functools
import inspect
import os
import re
import runpy
import sys
import traceback
from pathlib import Path

from flatgpt import ROOT
from flatgpt.errors import ConfigError, Mistakes, did_you_mean, one_line_errors

SCALARS = (bool, int, float, str, type(None))
# settings of versions before 2026-11-28, accepted and ignored in the config.py of an old run
RETIRED = ('published',)
TYPE_NAMES = {
    'bool': 'True or False',
    'int': 'a whole number',
    'float': 'a number',
    'str': 'text',
    'NoneType': 'None',
}


def configure(defaults: dict, argv: list[str], positional: str | None = None) -> dict:
    """Settings in force: `defaults` overridden by the config files and flags in `argv`, in order.

    defaults: a script's globals(), or any dict of scalars.
    positional: the setting that takes an argument which is neither a flag nor a config: its text.
    Prints the settings and leaves for --help. A mistake raises ConfigError, which from here on
    ends the program with one line (see one_line_errors).
    """
    one_line_errors()
    script = defaults.get('__file__')
    schema = read_settings(script) if script else {k: '' for k in defaults if k[0] != '_'}
    schema = {k: v for k, v in schema.items() if isinstance(defaults.get(k, schema), SCALARS)}
    values = {name: defaults[name] for name in schema}
    types = {name: allowed_types(schema[name], values[name]) for name in schema}
    if '--help' in argv or '-h' in argv:
        print(help_text(defaults))
        raise SystemExit(0)
    mistakes, prompt = Mistakes(), None
    for before, arg in zip(['', *argv], argv, strict=False):
        with mistakes.collect():
            if is_flag(arg, positional):
                values |= read_flag(arg, types)
                prompt = arg if arg.startswith(f'--{positional}=') else prompt
            elif (path := find_config(arg, positional)) is not None:
                elsewhere = {} if script and Path(script).name == 'train.py' else train_settings()
                values |= read_config(path, values, types, elsewhere, mistakes)
            elif before.startswith('--') and '=' not in before and mistakes.lines:
                pass  # the value of a flag that lacks its =, which is a mistake already
            elif positional is None:
                raise ConfigError(unknown_config(arg, types))
            elif prompt is not None:
                raise ConfigError(f'{arg}: a second prompt; put one text with spaces into quotes')
            else:
                values[positional] = prompt = arg
                if other := prompt_hint(arg, types, positional):
                    print(f'{arg}: is taken as the prompt; {other}', file=sys.stderr)
    mistakes.raise_all()
    return {
        k: float(v) if types[k][0] == 'float' and v is not None else v for k, v in values.items()
    }


def is_flag(arg: str, positional: str | None) -> bool:
    """Whether an argument is a flag, and not a prompt such as "-- and so it ended"."""
    is_prompt = positional is not None and re.search(r'\s', arg.partition('=')[0])
    return arg.startswith('--') and not is_prompt


def prompt_hint(arg: str, settings, positional: str) -> str:
    """What else a prompt of one word may have been meant as, '' if nothing."""
    if arg.split() != [arg]:
        return ''
    if '=' in arg and arg.lstrip('-').partition('=')[0] in settings:
        return f'a setting needs two dashes: --{arg.lstrip("-")}'
    if os.path.isdir(arg):
        return f'for the model in that folder, --out_dir={arg}'
    if os.path.isfile(arg):
        return f'for what the file says, --{positional}=FILE:{arg}'
    names = [path.stem for path in (ROOT / 'config').glob('*.py')]
    return did_you_mean(arg, names).strip() if '_' in arg else ''


def update_settings(script: str, settings: dict, changes: dict, source: str) -> dict:
    """The settings of a script after changes: values, not text, with the types that flags have.

    source: where they are from, with {} for a setting's name.
    """
    annotations, changed = read_settings(script), dict(settings)
    for name, value in changes.items():
        types = allowed_types(annotations[name], settings[name])
        value = check_type(name, value, types, source.format(name))
        changed[name] = float(value) if types[0] == 'float' and value is not None else value
    return changed


def read_flag(arg: str, types: dict) -> dict:
    """The setting that --key=value means; a switch may leave out its value."""
    key, equals, text = arg[2:].partition('=')
    check_known(key, types, arg)
    if not equals and 'bool' not in types[key]:
        raise ConfigError(f'{arg}: needs {describe_types(types[key])}, as in {arg}=...')
    value = parse_value(text, types[key], arg) if equals else True
    return {key: check_type(key, value, types[key], arg)}


def read_config(path: Path, values: dict, types: dict, elsewhere: dict, mistakes: Mistakes) -> dict:
    """The settings that a config file changes. elsewhere: settings of train.py that this script has
    no use for."""
    changed = {}
    for key, value in run_config(path, values).items():
        if key in types:
            with mistakes.collect():
                changed[key] = check_type(
                    key, value, types[key], f'{path}: {key} = {shorten(value)}'
                )
        elif key not in elsewhere and key not in RETIRED:
            with mistakes.collect():
                check_known(key, types, str(path))
    return changed


def run_config(path: Path, values: dict) -> dict:
    """What a config file assigns: names without a leading _, and no modules or functions."""
    try:
        namespace = runpy.run_path(str(path), init_globals=dict(values))
    except SyntaxError as error:
        raise ConfigError(f'{path}, line {error.lineno}: {error.msg}') from error
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = frames[-1].lineno if frames else '?'
        text = ' '.join(str(error).split())
        raise ConfigError(f'{path}, line {line}: {type(error).__name__}: {text}') from error
    return {
        key: value
        for key, value in namespace.items()
        if not key.startswith('_') and not inspect.ismodule(value) and not callable(value)
    }


def find_config(arg: str, positional: str | None = None) -> Path | None:
    """The config file that `arg` means: a .py path, or a bare name found in config/.

    None for what is no config. Where there is a `positional` setting, words that end in .py may be
    its text, if there is no such file.
    """
    bare = ROOT / 'config' / f'{arg}.py'
    if arg.endswith('.py'):
        with contextlib.suppress(OSError):  # a prompt can be longer than a file's name
            for path in (Path(arg), ROOT / arg):
                if path.is_file():
                    return path
        if positional and arg.split() != [arg]:
            return None
        hint = f'; if it is the prompt, --{positional}={arg}' if positional else ''
        raise ConfigError(unknown_config(arg, {}) + hint)
    with contextlib.suppress(OSError):
        return bare if arg.isidentifier() and bare.is_file() else None


def unknown_config(arg: str, settings) -> str:
    names = sorted(path.stem for path in (ROOT / 'config').glob('*.py'))
    if arg.lstrip('-').partition('=')[0] in settings:
        return f'{arg}: a setting needs two dashes: --{arg.lstrip("-")}'
    if os.path.isdir(arg):
        return f'{arg}: is a folder, and no config; did you mean --out_dir={arg}?'
    hint = did_you_mean(Path(arg).stem, names)
    return f'{arg}: no such config file; {hint}config/ has: {", ".join(names)}'


def check_known(key: str, settings, source: str) -> None:
    if key in settings:
        return
    if key in RETIRED:
        raise ConfigError(f'{source}: the setting {key!r} is no longer there; leave it out')
    near = did_you_mean(key, settings).strip()
    hint = near or '--help lists them all'
    if not near and not source.startswith('--'):
        hint += '; a name of your own begins with _'
    if not near and source.startswith('--') and key in train_settings():
        hint = 'it belongs to train.py'
    raise ConfigError(f'{source}: no setting is called {key!r}; {hint}')


def allowed_types(annotation: str, default) -> tuple[str, ...]:
    """Names of the types a setting takes: its annotation's, otherwise its default's."""
    if annotation:
        return tuple(p.strip().replace('None', 'NoneType') for p in annotation.split('|'))
    return (type(default).__name__,)


def parse_value(text: str, types: tuple, source: str):
    """The value that a flag's text means. A setting that takes text gets it verbatim."""
    if 'NoneType' in types and text == 'None':
        return None
    if 'bool' in types and text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    if 'str' in types:
        return text
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise ConfigError(f'{source}: needs {describe_types(types)}') from None


def check_type(key: str, value, types: tuple, source: str):
    """`value`, if it has one of the types `types`; an int serves where a float is asked for."""
    kind = type(value).__name__
    if kind in types:
        return value
    if kind == 'int' and 'float' in types:
        if abs(value) <= sys.float_info.max:
            return value
        raise ConfigError(f'{source}: {key} is too large for a number')
    raise ConfigError(f'{source}: {key} needs {describe_types(types)}, not {kind} {shorten(value)}')


def shorten(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'


def describe_types(types: tuple) -> str:
    return ' or '.join(TYPE_NAMES[kind] for kind in types)


def settings_block(script: str) -> tuple[list[ast.stmt], list[str]]:
    """The assignments at the top of a script that declare its settings, and its source lines."""
    source = Path(script).read_text(encoding='utf-8')
    block = []
    for node in ast.parse(source).body:
        if block and isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If)):
            break
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == 'configure':
                break
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and target.id.islower() and target.id[0] != '_':
                block.append(node)
    return block, source.splitlines()


def settings_of(script: str, argv: list[str]) -> dict:
    """What the settings of a script would be with these arguments, of which nothing else runs."""
    block, _ = settings_block(script)
    settings = {'__file__': script}
    exec(compile(ast.Module(block, []), script, 'exec'), settings)
    return configure(settings, argv)


def setting_name(node: ast.stmt) -> str:
    return (node.target if isinstance(node, ast.AnnAssign) else node.targets[0]).id


@functools.cache
def read_settings(script: str) -> dict[str, str]:
    """Setting -> annotation ('' without one), read from the script's source without running it."""
    block, _ = settings_block(script)
    return {
        setting_name(n): ast.unparse(n.annotation) if hasattr(n, 'annotation') else ''
        for n in block
    }


def train_settings() -> dict[str, str]:
    train = ROOT / 'train.py'
    return read_settings(str(train)) if train.is_file() else {}


def help_text(defaults: dict) -> str:
    """The script's docstring and its settings: name, default and comment, in their groups."""
    block, lines = settings_block(defaults['__file__'])
    out = [inspect.cleandoc(defaults.get('__doc__') or ''), '', 'Settings, given as --name=value:']
    last = block[0].lineno - 2 if block else 0
    for node in block:
        for line in lines[last : node.lineno - 1]:
            if line.startswith('#') and line.strip('# -'):
                out.append(f'\n{line.strip("# ")}')
        last = node.end_lineno
        comment = lines[last - 1][node.end_col_offset :].strip().lstrip('# ')
        name = setting_name(node)
        out.append(f'  {f"{name} = {defaults[name]!r}":<44} {comment}'.rstrip())
    return '\n'.join(out)
