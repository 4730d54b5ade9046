"""Settings: config files and flags in order, the same checks for both, one line per mistake."""

import re
import subprocess
import sys
from dataclasses import fields
from functools import partial

import conftest
import pytest
from conftest import ROOT
from error_lines import case, error_line

import configurator
from configurator import configure, setting_annotations, setting_comments
from flatgpt.errors import ConfigError, UserError
from model import GPTConfig

SCRIPT = '''"""
Do a thing.

$ python thing.py --steps=3
"""
import sys
from configurator import configure

# -----------------------------------------------------------------------------
# the run
steps = 10  # how often
rate = 1e-3  # how fast
name = 'plain'  # what it is called
loud = False
limit: int | None = None  # none: no limit
share: float | None = 0.5
mode: bool | str = 'auto'  # 'auto', True or False
# shape
# channels
width = 8
_scratch = [1, 2]
LIMITS = {'a': 1}
# -----------------------------------------------------------------------------
config = configure(globals(), sys.argv[1:])
globals().update(config)
later = 3


def main():
    inner = 1


print(config)
'''


@pytest.fixture
def thing(tmp_path):
    """configure() as a script with the settings above calls it."""
    path = tmp_path / 'thing.py'
    path.write_text(SCRIPT, encoding='utf-8')

    def run(*args, positional=None):
        code = SCRIPT.partition('config = configure')[0]
        scope = {'__file__': str(path), '__doc__': SCRIPT.split('"""')[1]}
        exec(compile(code, str(path), 'exec'), scope)
        return configure(scope, list(map(str, args)), positional)

    return run


@pytest.fixture(autouse=True)
def hook(monkeypatch):
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # configure() replaces it


@pytest.fixture
def config(tmp_path):
    """Write a config file -> its path."""

    def write(text, name='mine.py'):
        path = tmp_path / name
        path.write_text(text, encoding='utf-8')
        return path

    return write


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with an empty config/, seen from another working directory."""
    root = tmp_path / 'project'
    (root / 'config').mkdir(parents=True)
    monkeypatch.setattr(configurator, 'ROOT', root)
    monkeypatch.chdir(tmp_path)
    return root


refused = partial(conftest.refused, error=ConfigError)


# -----------------------------------------------------------------------------
# values in effect


def test_the_settings_are_the_scalars_above_the_call(thing):
    assert thing() == {
        'steps': 10,
        'rate': 1e-3,
        'name': 'plain',
        'loud': False,
        'limit': None,
        'share': 0.5,
        'mode': 'auto',
        'width': 8,
    }


def test_config_files_and_flags_apply_in_order(thing, config):
    one, two = config('steps = 1\nwidth = 1', 'one.py'), config('steps = 2', 'two.py')
    assert thing(one, two)['steps'] == 2
    assert thing(two, one)['steps'] == 1
    assert thing(one, '--steps=5')['steps'] == 5
    assert thing('--steps=5', one)['steps'] == 1
    assert thing(one, '--steps=5', two)['width'] == 1


def test_a_flag_that_a_later_config_replaces_has_a_warning(thing, config, capsys):
    path = config('steps = 1', 'later.py')
    thing('--steps=1', path, '--steps=5')
    assert capsys.readouterr().err == ''
    thing('--steps=5', path)
    assert f'{path} follows --steps=5 and sets steps = 1' in capsys.readouterr().err


def test_a_config_starts_with_the_current_values(thing, config):
    path = config('width = steps\nrate = rate / 10')
    assert thing(path)['width'] == 10
    settings = thing('--steps=7', path, '--steps=9')
    assert (settings['width'], settings['steps'], settings['rate']) == (7, 9, 1e-4)


def test_a_name_is_found_in_config_and_a_path_from_any_directory(thing, project):
    (project / 'config' / 'fast.py').write_text('steps = 4')
    assert thing('fast')['steps'] == 4
    assert thing('config/fast.py')['steps'] == 4  # the working directory has no config/
    assert thing(project / 'config' / 'fast.py')['steps'] == 4


def test_a_config_in_the_working_directory_wins_over_the_project_s(thing, project, tmp_path):
    (project / 'config' / 'fast.py').write_text('steps = 4')
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config' / 'fast.py').write_text('steps = 5')
    assert thing('config/fast.py')['steps'] == 5


def test_a_boolean_flag_may_omit_its_value(thing):
    assert thing('--loud')['loud'] is True
    assert thing('--loud=true')['loud'] is True
    assert thing('--loud=True', '--loud=false')['loud'] is False
    assert thing('--loud', '--loud=False')['loud'] is False


def test_an_int_is_accepted_as_a_float(thing, config):
    for settings in (thing('--rate=1'), thing(config('rate = 1'))):
        assert settings['rate'] == 1.0
        assert type(settings['rate']) is float
    assert thing('--rate=3e-4')['rate'] == 3e-4
    assert thing('--steps=-5')['steps'] == -5
    share = thing('--share=1')['share']
    assert (share, type(share)) == (1.0, float)


def test_none_is_accepted_only_where_it_is_allowed(thing, config):
    assert thing('--limit=3')['limit'] == 3
    assert thing('--limit=3', '--limit=None')['limit'] is None
    assert thing('--share=None')['share'] is None
    assert thing(config('limit = None\nshare = None'))['share'] is None
    assert thing('--name=None')['name'] == 'None'  # text is taken verbatim
    assert 'a whole number' in refused(thing, '--steps=None')
    assert 'needs text' in refused(thing, config('name = None'))


def test_text_is_taken_verbatim(thing):
    for text in ('a=b=c', '', '3', 'True', "'quoted'", '  spaces ', '--x', 'ünï', 'a\nb', '[1]'):
        assert thing(f'--name={text}')['name'] == text


def test_a_setting_of_two_types_takes_both(thing, config):
    assert thing('--mode=False')['mode'] is False
    assert thing('--mode')['mode'] is True
    assert thing('--mode=auto')['mode'] == 'auto'
    assert thing(config('mode = True'))['mode'] is True
    assert 'True or False or text' in refused(thing, config('mode = 3'))


def test_modules_functions_classes_and_private_names_in_a_config_are_ignored(thing, config):
    path = config(
        'import math, os.path\nfrom pathlib import Path\n_half = 0.5\n'
        'def helper(x):\n    inner = x\n    return inner\n'
        'class Thing:\n    pass\n'
        'square = lambda x: x * x\n'
        'steps = helper(int(math.sqrt(49)))\nrate = _half\n'
    )
    settings = thing(path)
    assert (settings['steps'], settings['rate']) == (7, 0.5)
    assert set(settings) == set(thing())


def test_a_dict_of_defaults_needs_no_script():
    assert configure({'a': 1, '_b': 2}, ['--a=3']) == {'a': 3}


# -----------------------------------------------------------------------------
# mistakes


def test_the_error_for_a_misspelled_flag_suggests_the_nearest_setting(thing):
    text = refused(thing, '--widht=3')
    assert text.startswith('--widht=3: ')
    assert "'widht'; did you mean width?" in text
    assert '--help' in refused(thing, '--qqqq=3')
    for arg in ('--', '--=3', '---steps=3'):
        refused(thing, arg)


def test_the_error_for_a_misspelled_setting_in_a_config_contains_its_path(thing, config):
    path = config('stesp = 3')
    text = refused(thing, path)
    assert text.startswith(f'{path}: ')
    assert 'did you mean steps?' in text


@pytest.mark.parametrize('source', ['[1]', '(1, 2)', 'Path("x")', '{}'])
def test_a_public_variable_in_a_config_is_refused_until_it_starts_with_an_underscore(
    thing, config, source
):
    text = f'from pathlib import Path\nwords = {source}'
    assert "'words'; a variable of its own must start with _" in refused(thing, config(text))
    assert thing(config(text.replace('words', '_words'))) == thing()


@pytest.mark.parametrize(
    ('flag', 'need'),
    [
        ('--steps=ten', 'a whole number'),
        ('--steps=1.5', 'a whole number'),
        ('--steps=True', 'a whole number'),
        ('--steps=', 'a whole number'),
        ('--steps', 'a whole number'),
        ('--steps=__import__("os")', 'a whole number'),
        ('--steps={[]:1}', 'a whole number'),
        ('--steps=' + '(' * 500, 'a whole number'),
        ('--rate=fast', 'a number'),
        ('--rate', 'a number'),
        ('--loud=1', 'True or False'),
        ('--loud=maybe', 'True or False'),
        ('--limit=x', 'a whole number or None'),
        ('--name', 'text'),
    ],
)
def test_the_error_for_a_wrong_type_contains_the_right_one(thing, flag, need):
    text = refused(thing, flag)
    assert text.startswith(flag)
    assert f'needs {need}' in text


@pytest.mark.parametrize(
    'line', ['steps = 1.5', 'steps = "3"', 'loud = 1', 'rate = None', 'name = 3', 'steps = [3]']
)
def test_the_error_for_a_wrong_type_in_a_config_contains_path_setting_and_value(
    thing, config, line
):
    path = config(line)
    text = refused(thing, path)
    assert text.startswith(f'{path}: {line.partition(" ")[0]} = ')


def test_a_number_too_large_for_a_float_is_refused_and_a_long_value_is_shortened(thing, config):
    assert 'rate must be between' in refused(thing, '--rate=1' + '0' * 400)
    assert len(refused(thing, config('steps = "x" * 10_000'))) < 400


def test_a_syntax_error_in_a_config_is_reported_with_path_and_line(thing, config):
    path = config('steps = 3\nrate = = 2\n')
    assert f'{path}, line 2: ' in refused(thing, path)


def test_an_exception_in_a_config_is_reported_with_path_line_and_text(thing, config):
    path = config('steps = 3\n\ndef f():\n    return {}["key"]\n\nrate = f()\n')
    assert f"{path}, line 4: KeyError: 'key'" in refused(thing, path)
    path = config('import no_such_module_anywhere\n')
    assert f'{path}, line 1: ModuleNotFoundError' in refused(thing, path)
    path = config('raise ValueError("one\\ntwo")\n')
    assert 'ValueError: one' in refused(thing, path)


@error_line('is a directory, not a config file')
def test_a_directory_in_place_of_a_config_is_suggested_as_out_dir(tmp_path):
    with pytest.raises(ConfigError, match=f'did you mean --out_dir={tmp_path}') as caught:
        configure({'out_dir': ''}, [str(tmp_path)])
    flag = re.search(r'--out_dir=[^?]+', str(caught.value))[0]
    assert configure({'out_dir': ''}, [flag]) == {'out_dir': str(tmp_path)}


@pytest.mark.parametrize(
    ('bad', 'good', 'settings'),
    [
        case('{}: unknown setting {}; {}', '--widht=3', '--width=3', {'width': 3}),
        case('{}: needs {}, for example', '--steps', '--steps=10', {'steps': 10}),
        case('needs {}, not {} {}', '--steps=True', '--steps=10', {'steps': 10}),
        case('must be between -1.7e308', f'--rate={10**400}', '--rate=1.7e308', {'rate': 1.7e308}),
        case('no such config file; {}config/ has', 'fasst', 'fast', {'steps': 4}),
        case('a setting needs two dashes', '-steps=3', '--steps=3', {'steps': 3}),
    ],
)
def test_the_advice_of_an_error_line_works(thing, project, bad, good, settings):
    (project / 'config' / 'fast.py').write_text('steps = 4')
    refused(thing, bad)
    assert thing(good) == thing() | settings


@error_line('is not a config file; give one that ends in .py')
def test_a_file_with_another_suffix_is_a_config_once_renamed(thing, project):
    (project.parent / 'fast.txt').write_text('steps = 4')
    refused(thing, 'fast.txt')
    (project.parent / 'fast.txt').rename(project.parent / 'fast.py')
    assert thing('fast.py') == thing() | {'steps': 4}


def test_the_value_after_a_flag_is_part_of_the_advice(thing):
    line = '--steps: needs a whole number, for example --steps=7'
    assert refused(thing, '--steps', '7') == line


@error_line('the setting {} was removed; omit it')
def test_a_removed_setting_is_refused_as_a_flag_and_ignored_in_a_config(thing, config):
    refused(thing, '--published', '--steps=3')
    assert thing('--steps=3')['steps'] == 3
    assert thing(config('published = True\nsteps = 3'))['steps'] == 3


@error_line('is a second prompt; quote a prompt that contains spaces')
def test_two_prompts_are_refused_and_a_quoted_one_is_accepted(thing):
    refused(thing, 'To', 'be', positional='name')
    assert thing('To be', positional='name')['name'] == 'To be'


def test_the_error_for_a_missing_config_lists_the_existing_ones(thing, project):
    for name in ('quickstart', 'train_text'):
        (project / 'config' / f'{name}.py').touch()
    text = refused(thing, 'quikstart')
    assert 'did you mean quickstart?' in text
    assert 'quickstart, train_text' in text
    assert 'did you mean quickstart?' in refused(thing, 'config/quikstart.py')
    assert 'quickstart, train_text' in refused(thing, 'nowhere/at_all.py')


def test_a_flag_without_dashes_is_recognized(thing):
    assert '--steps=3' in refused(thing, 'steps=3')
    assert '-x' in refused(thing, '-x')


# -----------------------------------------------------------------------------
# help, positional arguments, other scripts' settings


def test_help_prints_docstring_names_defaults_and_comments(thing, capsys):
    for flag in ('--help', '-h'):
        with pytest.raises(SystemExit) as end:
            thing(flag)
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith('Do a thing.\n\n$ python thing.py --steps=3\n')
        assert re.search(r'^  steps = 10 +how often$', text, re.M)
        assert re.search(r"^  name = 'plain' +what it is called$", text, re.M)
        assert re.search(r'^  limit = None +none: no limit$', text, re.M)
        assert re.search(r'^  loud = False$', text, re.M)
        assert 'the run\n  steps' in text
        assert re.search(r'shape\n  width = 8 +channels$', text)
        for name in ('_scratch', 'LIMITS', 'later', 'inner', 'config'):
            assert name not in text


def test_an_argument_that_is_no_config_becomes_the_prompt(thing, project):
    (project / 'config' / 'fast.py').write_text('steps = 4')
    for text in ('To be, or not', 'ROMEO:', 'fast lane', '', 'a=b', '-5', '-'):
        assert thing(text, positional='name')['name'] == text
    assert thing('fast', positional='name')['steps'] == 4
    assert thing('fast', 'Once', '--width=1', positional='name')['name'] == 'Once'
    assert 'no such config' in refused(thing, 'typo.py', positional='name')


@pytest.mark.parametrize(
    'text',
    [
        'To install it, run setup.py',
        'see a/b.py',
        '-- and so',
        '--- x=1',
        'x' * 5000 + ' .py',
        'a/b',
        '-well, x=1',
        'steps=3 and more',
    ],
)
def test_a_prompt_may_look_like_a_file_or_a_flag(thing, project, capsys, text):
    assert thing(text, positional='name')['name'] == text
    assert capsys.readouterr().err == ''
    with pytest.raises(ConfigError):
        thing(text)


@pytest.mark.parametrize(
    ('text', 'hint'),
    [
        ('out', '--out_dir=out'),
        ('prompt.txt', '--name=FILE:prompt.txt'),
        ('train_txet', 'did you mean train_text?'),
    ],
)
def test_an_ambiguous_word_becomes_the_prompt_and_prints_a_hint(
    thing, project, tmp_path, capsys, text, hint
):
    (project / 'config' / 'train_text.py').touch()
    (tmp_path / 'out').mkdir()
    (tmp_path / 'prompt.txt').touch()
    assert thing(text, positional='name')['name'] == text
    err = capsys.readouterr().err
    assert err.startswith(f'{text}: is used as the prompt; ')
    assert hint in err
    assert err.count('\n') == 1


@pytest.mark.parametrize('positional', [None, 'name'])
@pytest.mark.parametrize(
    ('args', 'problem'),
    [
        (['-steps=3'], 'a setting needs two dashes: --steps=3'),
        (['-steps', '3'], 'a setting needs two dashes: --steps=3'),
        (['steps=3'], 'a setting needs two dashes: --steps=3'),
        (['-name=one two'], 'a setting needs two dashes: --name=one two'),
        (['-loud'], 'a setting needs two dashes: --loud'),
        (['-stesp=3'], "unknown setting 'stesp'; did you mean steps?"),
        (['-x'], "unknown setting 'x'; --help lists all settings"),
    ],
)
def test_a_setting_with_too_few_dashes_is_refused_with_its_spelling(
    thing, args, problem, positional
):
    line = refused(thing, *args, positional=positional)
    assert line.startswith(f'{args[0]}: {problem}')
    if positional and 'unknown' not in problem:
        assert line.endswith(f'; to use it as the prompt: --name={args[0]}')
        assert thing(f'--name={args[0]}', positional='name')['name'] == args[0]


def test_a_word_ending_in_py_is_a_config_or_refused_with_advice_for_a_prompt(thing, config):
    path = config('name = "from the config"', 'with blanks.py')
    assert thing(path, positional='name')['name'] == 'from the config'
    assert thing(path, 'given', positional='name')['name'] == 'given'
    assert 'to use it as the prompt: --name=typo.py' in refused(thing, 'typo.py', positional='name')
    assert thing('--name=typo.py', positional='name')['name'] == 'typo.py'
    for two in (('--name=a', 'b'), ('a', 'b')):
        assert 'is a second prompt' in refused(thing, *two, positional='name')


def test_other_scripts_ignore_the_settings_of_train_py_in_a_config_but_not_typos(thing, config):
    settings = thing(config('steps = 3\nn_layer = 2\nwandb_log = True\nweight_decay = 0.1'))
    assert settings['steps'] == 3
    assert 'n_layer' not in settings
    path = config('n_layr = 2')
    assert str(path) in refused(thing, path)
    assert 'it is a setting of train.py' in refused(thing, '--n_layer=2')


def settings_of(name, *args):
    """The settings of one of the scripts, without running it."""
    path = ROOT / f'{name}.py'
    code = path.read_text(encoding='utf-8').partition('# ---')[2].partition('\n# ---')[0]
    scope = {'__file__': str(path), '__doc__': ''}
    exec(compile(f'#{code}', str(path), 'exec'), scope)
    positional = 'start' if name == 'sample' else None
    return configure(scope, list(map(str, args)), positional)


SHIPPED = sorted((ROOT / 'config').glob('*.py'))


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads_under_its_script(path):
    script = 'sample' if path.stem.startswith('sample') else 'train'
    settings = settings_of(script, path.stem)
    assert settings != settings_of(script)
    if script == 'train':
        shape = {f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings}
        GPTConfig(**shape)  # raises if no such model can be built
        settings_of('sample', path)  # also accepts a training config


NANOGPT = """
# train a miniature character-level shakespeare model

import time

out_dir = 'out-shakespeare-char'
eval_interval = 250 # keep frequent because we'll overfit
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False # override via command line if you like
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-' + str(time.time())
init_from = 'gpt2-xl'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 5 * 8
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
bias = True

learning_rate = 1e-3
max_iters = 5000
weight_decay = 1e-1
lr_decay_iters = 5000
decay_lr = False
min_lr = 1e-4
beta2 = 0.99
grad_clip = 1
warmup_iters = 100

backend = 'nccl'
device = 'cpu'
dtype = 'bfloat16'
compile = False
"""


def test_a_nanogpt_config_loads_unchanged(config):
    path = config(NANOGPT)
    settings = settings_of('train', path)
    assert settings['wandb_run_name'].startswith('mini-gpt-')
    assert (settings['device'], settings['compile']) == ('cpu', False)
    assert (settings['gradient_accumulation_steps'], settings['grad_clip']) == (40, 1.0)
    assert settings_of('sample', path)['out_dir'] == 'out-shakespeare-char'


def test_the_defaults_are_nanogpt_s():
    settings = settings_of('train')
    theirs = {
        'eval_interval': 2000,
        'log_interval': 1,
        'eval_iters': 200,
        'eval_only': False,
        'always_save_checkpoint': True,
        'init_from': 'scratch',
        'wandb_log': False,
        'wandb_project': 'owt',
        'wandb_run_name': 'gpt2',
        'dataset': 'openwebtext',
        'gradient_accumulation_steps': 40,
        'batch_size': 12,
        'block_size': 1024,
        'n_layer': 12,
        'n_head': 12,
        'n_embd': 768,
        'dropout': 0.0,
        'bias': False,
        'learning_rate': 6e-4,
        'max_iters': 600000,
        'weight_decay': 1e-1,
        'beta1': 0.9,
        'beta2': 0.95,
        'grad_clip': 1.0,
        'decay_lr': True,
        'warmup_iters': 2000,
        'lr_decay_iters': 600000,
        'min_lr': 6e-5,
        'backend': 'auto',
        'device': 'auto',
        'dtype': 'auto',
        'compile': 'auto',
    }
    assert {name: settings[name] for name in theirs} == theirs


# -----------------------------------------------------------------------------
# how an error ends a script


@pytest.mark.parametrize(
    ('error', 'status', 'text'),
    [
        ('UserError("fix it")', 2, 'error: fix it\n'),
        ('ConfigError("fix it")', 2, 'error: fix it\n'),
        ('KeyboardInterrupt()', 130, 'interrupted\n'),
        ("PermissionError(13, 'Permission denied', 'x')", 2, 'error: x: Permission denied\n'),
    ],
)
def test_a_user_error_is_one_line_and_status_2(environment, error, status, text):
    code = f'from flatgpt.errors import *\none_line_errors()\nraise {error}'
    done = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr, done.stdout) == (status, text, '')


def test_the_line_is_printed_even_if_another_hook_captures_standard_error(environment):
    code = """
import contextlib, io, sys
from flatgpt.errors import UserError, one_line_errors
one_line_errors()
hook = sys.excepthook

def capturing(*args):  # like torch.distributed
    with contextlib.redirect_stderr(io.StringIO()):
        hook(*args)

sys.excepthook = capturing
raise UserError("fix it")
"""
    done = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, 'error: fix it\n')


def test_any_other_error_keeps_its_traceback(environment):
    code = 'from flatgpt.errors import *\none_line_errors()\nraise ValueError("a bug")'
    done = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert 'Traceback' in done.stderr


def test_configurator_needs_no_torch(environment):
    code = 'import configurator, sys; print("torch" in sys.modules)'
    done = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True
    )
    assert done.stdout == 'False\n', done.stderr


@pytest.mark.parametrize('name', ['train.py', 'sample.py'])
def test_a_mistake_ends_a_script_with_one_line_on_standard_error(script, name):
    done = script(name, '--sede=1')
    assert done.returncode == 2
    assert done.stdout == ''
    assert done.stderr.startswith('error: --sede=1: ')
    assert 'did you mean seed?' in done.stderr
    assert done.stderr.count('\n') == 1


@pytest.mark.parametrize(
    ('name', 'settings'),
    [
        ('train.py', {'out_dir', 'dataset', 'max_iters', 'learning_rate', 'n_layer', 'seed'}),
        ('sample.py', {'out_dir', 'start', 'num_samples', 'temperature', 'chat', 'batch'}),
        ('bench.py', {'only', 'batch_size', 'device', 'dtype'}),
        ('api.py', {'out_dir', 'host', 'port', 'api_key', 'max_rows', 'max_queue'}),
    ],
)
def test_each_script_s_settings_are_found(name, settings):
    assert settings <= {*setting_annotations(str(ROOT / name))}


@pytest.mark.parametrize('name', ['train.py', 'sample.py', 'bench.py', 'api.py'])
def test_every_setting_has_a_meaning_in_the_help(name):
    path = str(ROOT / name)
    meanings = {setting: meaning for setting, _, meaning in setting_comments(path)}
    assert [*meanings] == [*setting_annotations(path)]
    assert [setting for setting, meaning in meanings.items() if not meaning] == []


WRAPPED = """
# -----
# group
a = (
    'a value # of text'  # on its own line
)
b = (  # on the first line
    2
)
c: dict | int = (
    3
)  # on the last line
# another group
# on the line above
d = 4
# third group
e = 5  # on the line
f = 6
"""


def test_a_meaning_is_found_wherever_a_formatter_moves_it(tmp_path):
    (tmp_path / 'thing.py').write_text(WRAPPED, encoding='utf-8')
    assert [*setting_comments(str(tmp_path / 'thing.py'))] == [
        ('a', 'group', 'on its own line'),
        ('b', '', 'on the first line'),
        ('c', '', 'on the last line'),
        ('d', 'another group', 'on the line above'),
        ('e', 'third group', 'on the line'),
        ('f', '', ''),
    ]


def test_train_help_starts_with_its_docstring_and_lists_every_setting(script):
    done = script('train.py', '--help')
    assert done.returncode == 0
    assert done.stdout.startswith('Train a GPT')
    assert len(re.findall(r'^  \w+ = ', done.stdout, re.M)) == len(settings_of('train'))
    for name in settings_of('train'):
        assert re.search(rf'^  {name} = .+ \S', done.stdout, re.M), name


@pytest.mark.parametrize('name', ['train.py', 'sample.py', 'bench.py', 'api.py'])
def test_ctrl_c_during_the_imports_ends_in_one_line(script, tmp_path, name):
    for package in ('torch', 'flask'):
        (tmp_path / f'{package}.py').write_text('raise KeyboardInterrupt\n')
    done = script(name, env={'PYTHONPATH': str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, '', 'interrupted\n')


def test_error_classes_are_related():
    assert issubclass(ConfigError, UserError)


def test_given_has_what_flags_and_configs_assign_also_with_the_same_value(tmp_path):
    path = tmp_path / 'some.py'
    lines = 'steps = 10\n_scratch = rate\nexec("width = 9")\ndef f():\n    depth = 3\n'
    path.write_text(lines, encoding='utf-8')
    defaults, given = {'steps': 10, 'rate': 0.1, 'width': 8, 'depth': 2, 'loud': False}, {}
    configure(defaults, [str(path), '--loud=False', '--steps=12'], given=given)
    assert given == {'steps': '--steps=12', 'width': str(path), 'loud': '--loud=False'}
