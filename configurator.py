"""
Settings: a script's defaults, overridden in order by config files and --key=value flags.

$ python train.py config/quickstart.py --max_iters=200    # a path, or just: quickstart
$ python train.py --help                                  # every setting, its default and meaning

A script declares each setting once, as a plain assignment at its top with a comment, then calls

    config = configure(globals(), sys.argv[1:])
    globals().update(config)

A config file is Python code that runs with the current values as its globals, so
`lr_decay_iters = max_iters` works. Its assignments are checked like flags.
"""

import ast
import contextlib
import functools
import inspect
import os
import re
import runpy
import sys
import tokenize
import traceback
from collections.abc import Iterator
from pathlib import Path

from flatgpt import ROOT
from flatgpt.errors import ConfigError, Mistakes, did_you_mean, one_line_errors, short_repr

SCALARS = (bool, int, float, str, type(None))
# An error as a flag, but ignored in a config file: the config.py of an older run has it.
# 'published': a loss from the literature, printed next to the loss of eval_only
REMOVED_SETTINGS = ('published',)
TYPES = {  # type -> how an error line describes it, and an example
    'bool': ('True or False', True),
    'int': ('a whole number', 10),
    'float': ('a number', 0.5),
    'str': ('text', 'text'),
    'NoneType': ('None', None),
}


def configure(
    defaults: dict, argv: list[str], positional: str | None = None, given: dict | None = None
) -> dict:
    """`defaults` overridden by the config files and flags in `argv`, in order.

    defaults: a script's globals(), or any dict of scalars.
    positional: the setting that takes an argument which is neither a flag nor a config: a prompt.
    given: gets {setting: the flag or config that assigns it last}, also with the same value.
    --help prints the settings and exits. All mistakes are raised as one ConfigError, which ends the
    program with a line for each (see one_line_errors).
    """
    one_line_errors()
    script = defaults.get('__file__')
    schema = setting_annotations(script) if script else {k: '' for k in defaults if k[0] != '_'}
    schema = {k: v for k, v in schema.items() if isinstance(defaults.get(k, schema), SCALARS)}
    values = {name: defaults[name] for name in schema}
    types = {name: allowed_types(schema[name], values[name]) for name in values}
    if '--help' in argv or '-h' in argv:
        print(help_text(defaults))
        raise SystemExit(0)
    mistakes, prompt, sources = Mistakes(), None, {} if given is None else given
    for before, arg, after in zip(['', *argv], argv, [*argv[1:], ''], strict=False):
        with mistakes.collect():
            if is_flag(arg, positional):
                values |= (flag := read_flag(arg, types, after))
                sources |= dict.fromkeys(flag, arg)
                prompt = arg if arg.startswith(f'--{positional}=') else prompt
            elif (path := find_config(arg, positional)) is not None:
                ignored = {} if script and Path(script).name == 'train.py' else train_settings()
                assigned = read_config(path, values, types, ignored, mistakes)
                changed = {k: v for k, v in assigned.items() if v != values[k]}
                warn_of_replaced_flags(arg, changed, sources)
                named = assigned.keys() & assigned_names(path)
                sources |= dict.fromkeys(named | changed.keys(), str(path))
                values |= assigned
            elif before.startswith('-') and '=' not in before and mistakes.lines:
                pass  # the value of a flag without =, which is already reported
            elif lacks_dashes(arg, types):
                raise ConfigError(correct_flag(arg, types, after, positional))
            elif positional is None:
                raise ConfigError(unknown_config(arg))
            elif prompt is not None:
                raise ConfigError(f'{arg}: is a second prompt; quote a prompt that contains spaces')
            else:
                values[positional] = prompt = arg
                if hint := prompt_hint(arg, positional):
                    print(f'{arg}: is used as the prompt; {hint}', file=sys.stderr)
    mistakes.raise_all()
    return values


def warn_of_replaced_flags(config: str, changed: dict, sources: dict) -> None:
    """Warn of flags before a config that changes their settings."""
    for name, value in changed.items():
        flag = sources.get(name, '')
        # launch/slurm.sh gives its default for out_dir first
        if flag.startswith('--') and name != 'out_dir':
            change = f'{name} = {short_repr(value)}'
            warn_once(f'{config} follows {flag} and sets {change}; put the config first')


@functools.cache
def warn_once(text: str) -> None:
    """Print a warning, the first time and on rank 0."""
    if os.environ.get('RANK', '0') == '0':
        print(f'warning: {text}', file=sys.stderr)


def is_flag(arg: str, positional: str | None) -> bool:
    """Whether an argument is a flag rather than a prompt such as "-- and so it ended"."""
    is_prompt = positional is not None and re.search(r'\s', arg.partition('=')[0])
    return arg.startswith('--') and not is_prompt


def lacks_dashes(arg: str, settings) -> bool:
    """Whether an argument is -name or -name=value, or name=value with the name of a setting."""
    if arg.startswith('-'):
        return re.fullmatch(r'-[a-zA-Z]\S*', arg.partition('=')[0]) is not None
    return arg.split() == [arg] and '=' in arg and arg.partition('=')[0] in settings


def correct_flag(arg: str, types: dict, after: str, positional: str | None) -> str:
    """The error line for an argument that lacks dashes. after: the next argument."""
    key, equals, _ = arg.lstrip('-').partition('=')
    check_known(key, types, arg)
    needs_value = not equals and 'bool' not in types[key]
    value = f'={example_value(types[key], after)}' if needs_value else ''
    hint = f'; to use it as the prompt: --{positional}={arg}' if positional else ''
    return f'{arg}: a setting needs two dashes: --{arg.lstrip("-")}{value}{hint}'


def prompt_hint(arg: str, positional: str) -> str:
    """What the user of a one-word prompt may have meant instead, '' if nothing."""
    if arg.split() != [arg]:
        return ''
    if os.path.isdir(arg):
        return f'to use the model in this directory: --out_dir={arg}'
    if os.path.isfile(arg):
        return f'to read the prompt from this file: --{positional}=FILE:{arg}'
    names = [path.stem for path in (ROOT / 'config').glob('*.py')]
    return did_you_mean(arg, names).strip() if '_' in arg else ''


def update_settings(script: str, settings: dict, changes: dict, source: str) -> dict:
    """A script's settings with changes given as values, which are checked like flags.

    source: where the changes come from; {} stands for a setting's name.
    """
    types = setting_types(script, settings)
    checked = {k: check_type(k, v, types[k], source.format(k)) for k, v in changes.items()}
    return settings | checked


def setting_types(script: str, settings: dict) -> dict[str, tuple[str, ...]]:
    """The types that each of these settings of a script takes."""
    annotations = setting_annotations(script)
    return {name: allowed_types(annotations[name], settings[name]) for name in settings}


def read_flag(arg: str, types: dict, after: str = '') -> dict:
    """{key: value} of a flag --key=value; for True, --key is enough.

    after: the next argument, which may have been meant as the value.
    """
    key, equals, text = arg[2:].partition('=')
    check_known(key, types, arg)
    if not equals and 'bool' not in types[key]:
        example = f'{arg}={example_value(types[key], after)}'
        raise ConfigError(f'{arg}: needs {describe_types(types[key])}, for example {example}')
    value = parse_value(text, types[key], arg) if equals else True
    return {key: check_type(key, value, types[key], arg)}


def example_value(types: tuple, after: str):
    """A value for a flag without one: the next argument, unless that is a flag."""
    return after if after and after[0] != '-' else TYPES[types[0]][1]


def read_config(path: Path, values: dict, types: dict, ignored: dict, mistakes: Mistakes) -> dict:
    """The settings that a config file changes.

    ignored: settings to skip: those of train.py, if another script reads its config.
    """
    changed = {}
    for key, value in run_config(path, values).items():
        if key not in types and (key in ignored or key in REMOVED_SETTINGS):
            continue
        with mistakes.collect():
            check_known(key, types, str(path), 'a variable of its own must start with _')
            source = f'{path}: {key} = {short_repr(value)}'
            changed[key] = check_type(key, value, types[key], source)
    return changed


def run_config(path: Path, values: dict) -> dict:
    """What a config file assigns, without modules, functions and names that start with _."""
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


def assigned_names(path: Path) -> set[str]:
    """The names that a config file assigns outside functions."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {
        node.id
        for statement in ast.parse(path.read_bytes()).body
        if not isinstance(statement, functions)
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def find_config(arg: str, positional: str | None = None) -> Path | None:
    """The config file that `arg` refers to: a .py path, or the name of a file in config/.

    None if it refers to none. With a `positional` setting, several words that end in .py may be its
    text.
    """
    bare = ROOT / 'config' / f'{arg}.py'
    if arg.endswith('.py'):
        with contextlib.suppress(OSError):  # a prompt can be too long for a file name
            for path in (Path(arg), ROOT / arg):
                if path.is_file():
                    return path
        if positional and arg.split() != [arg]:
            return None
        hint = f'; to use it as the prompt: --{positional}={arg}' if positional else ''
        raise ConfigError(unknown_config(arg) + hint)
    with contextlib.suppress(OSError):
        return bare if arg.isidentifier() and bare.is_file() else None


def unknown_config(arg: str) -> str:
    """The error line for an argument that is neither a flag nor a config."""
    names = sorted(path.stem for path in (ROOT / 'config').glob('*.py'))
    if os.path.isdir(arg):
        return f'{arg}: is a directory, not a config file; did you mean --out_dir={arg}?'
    if os.path.isfile(arg):
        return f'{arg}: is not a config file; give one that ends in .py'
    hint = did_you_mean(Path(arg).stem, names)
    return f'{arg}: no such config file; {hint}config/ has: {", ".join(names)}'


def check_known(key: str, settings, source: str, hint: str = '--help lists all settings') -> None:
    """Raise ConfigError for an unknown setting. hint: the advice if no name is similar."""
    if key in settings:
        return
    if key in REMOVED_SETTINGS:
        raise ConfigError(f'{source}: the setting {key!r} was removed; omit it')
    if source.startswith('-') and key in train_settings():
        hint = 'it is a setting of train.py; omit it here'
    hint = did_you_mean(key, settings).strip() or hint
    raise ConfigError(f'{source}: unknown setting {key!r}; {hint}')


def allowed_types(annotation: str, default) -> tuple[str, ...]:
    """Names of the types that a setting takes: from its annotation, else from its default."""
    if annotation:
        return tuple(p.strip().replace('None', 'NoneType') for p in annotation.split('|'))
    return (type(default).__name__,)


def parse_value(text: str, types: tuple, source: str):
    """The value of a flag. A setting that takes text gets the flag's text verbatim."""
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
    """`value` if it has one of `types`; an int becomes a float where only that is allowed."""
    kind = type(value).__name__
    if kind in types:
        return value
    if kind == 'int' and 'float' in types:
        if abs(value) <= sys.float_info.max:
            return float(value)
        raise ConfigError(f'{source}: {key} must be between -1.7e308 and 1.7e308')
    raise ConfigError(
        f'{source}: {key} needs {describe_types(types)}, not {kind} {short_repr(value)}'
    )


def describe_types(types: tuple) -> str:
    return ' or '.join(TYPES[name][0] for name in types)


def settings_block(script: str) -> list[ast.stmt]:
    """The assignments at the top of a script that declare its settings."""
    block = []
    for node in ast.parse(Path(script).read_text(encoding='utf-8')).body:
        if block and isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If)):
            break
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == 'configure':
                break
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and target.id.islower() and target.id[0] != '_':
                block.append(node)
    return block


def settings_of(script: str, argv: list[str]) -> dict:
    """A script's settings with these arguments, without running it; for launch/slurm.sh."""
    settings = {'__file__': script}
    exec(compile(ast.Module(settings_block(script), []), script, 'exec'), settings)
    return configure(settings, argv)


def setting_name(node: ast.stmt) -> str:
    return (node.target if isinstance(node, ast.AnnAssign) else node.targets[0]).id


@functools.cache
def setting_annotations(script: str) -> dict[str, str]:
    """{setting: its annotation or ''}, read from a script's source without running it."""
    return {
        setting_name(node): ast.unparse(node.annotation) if hasattr(node, 'annotation') else ''
        for node in settings_block(script)
    }


def train_settings() -> dict[str, str]:
    train = ROOT / 'train.py'
    return setting_annotations(str(train)) if train.is_file() else {}


def help_text(defaults: dict) -> str:
    """The script's docstring and its settings in their groups: name, default and meaning."""
    out = [inspect.cleandoc(defaults.get('__doc__') or ''), '', 'Settings, given as --name=value:']
    for name, heading, meaning in setting_comments(defaults['__file__']):
        if heading:
            out.append(f'\n{heading}')
        out.append(f'  {f"{name} = {defaults[name]!r}":<44} {meaning}'.rstrip())
    return '\n'.join(out)


def setting_comments(script: str) -> Iterator[tuple[str, str, str]]:
    """Each setting's name, the heading of the group it opens, and the comment with its meaning.

    The meaning is on a line of the assignment, which a formatter may wrap, or on the line above it;
    the heading of a group is above that.
    """
    with tokenize.open(script) as file:
        tokens = [t for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.COMMENT]
    comments = {t.start[0]: t.string.strip('# ') for t in tokens if t.string.strip('# -')}
    own_line = {t.start[0] for t in tokens if t.start[1] == 0}
    for node in settings_block(script):
        meaning = [comments[n] for n in range(node.lineno, node.end_lineno + 1) if n in comments]
        above, line = [], node.lineno - 1
        while line in comments and line in own_line:
            above.insert(0, comments[line])
            line -= 1
        if not meaning:
            meaning = [above.pop()] if above else []
        yield setting_name(node), ' '.join(above), ' '.join(meaning)
