"""README.md and docs/: their links, the file tree, the messages they quote, their commands."""

import argparse
import ast
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, WORDS, metrics, sample, saved
from error_lines import SOURCES, text_of, tree_of

import bench
import configurator
from configurator import configure
from flatgpt.benchmarks import gpu_day
from flatgpt.benchmarks import validate as bench_rules
from flatgpt.checkpoint import __main__ as checkpoint_command
from flatgpt.data.tokenizer import byte_tokenizer
from flatgpt.training.validate import validate

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
SCRIPTS = ('train.py', 'sample.py', 'bench.py', 'api.py')


def named(path):
    return path.name


def read(path):
    return path.read_text(encoding='utf-8')


def section(page, heading):
    """The text of a page below a heading, to the next one of the same level."""
    return re.search(rf'^## {re.escape(heading)}\n(.*?)(?=^## |\Z)', read(page), re.M | re.S)[1]


# -----------------------------------------------------------------------------
# links, and the file tree


def anchors(path):
    """The anchors that GitHub gives the headings of a page."""
    prose = re.sub(r'^```.*?^```', '', read(path), flags=re.M | re.S)
    titles = re.findall(r'^#+ (.*)$', prose, re.M)
    return {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}


def test_the_tables_list_every_config_and_dataset():
    page = ROOT / 'docs' / 'text.md'
    for heading, paths in (
        ('Configs', (ROOT / 'config').glob('*.py')),
        ('Datasets', (path.parent for path in (ROOT / 'data').glob('*/prepare.py'))),
    ):
        cells = re.findall(r'^\| (`.*?) \|', section(page, heading), re.M)
        listed = [name for cell in cells for name in re.findall(r'`(\w+)`', cell)]
        assert sorted(listed) == sorted(path.stem for path in paths), heading


@pytest.mark.parametrize('page', PAGES, ids=named)
def test_every_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r'\]\(([^)\s]+)\)', read(page))
    for link in (link for link in links if not link.startswith('https://')):
        name, _, anchor = link.partition('#')
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short_and_leads_to_every_page():
    readme = read(ROOT / 'README.md')
    assert len(readme.splitlines()) <= 250
    for page in PAGES[1:]:
        assert f'(docs/{page.name}' in readme


@pytest.mark.parametrize('page', PAGES[1:], ids=named)
def test_every_page_begins_with_its_purpose_and_its_commands(page):
    title, _, purpose = read(page).splitlines()[:3]
    assert title.startswith('# ')
    assert re.match('[A-Z`]', purpose)
    if page.stem != 'architecture':
        assert '```sh' in read(page).partition('\n## ')[0]


def tree():
    """The paths in the README's file tree; of folders, only those without lines of their own."""
    block = re.search(r'```\n(train\.py .*?)```', read(ROOT / 'README.md'), re.S)[1]
    listed, folders = [], []
    for line in block.splitlines():
        indent, names = re.match(r'( *)([^\s,]+(?:, [^\s,]+)*)(?: +\S|$)', line).groups()
        del folders[len(indent) // 2 :]
        for name in names.split(', '):
            listed.append(''.join([*folders, name]))
        if names.endswith('/'):
            folders.append(names)
    return [p for p in listed if not any(q != p and q.startswith(p) for q in listed)]


def test_the_file_tree_lists_every_file_once():
    listed = tree()
    assert len(listed) == len({*listed})
    patterns = ('*.py', '*.ipynb', 'flatgpt/**/*.*', 'data/*/*.py')
    existing = [path for pattern in patterns for path in ROOT.glob(pattern)]
    existing = {path.relative_to(ROOT).as_posix() for path in existing if path.is_file()}
    existing = {p for p in existing if '__pycache__' not in p and '__init__' not in p}
    folders = tuple(p for p in listed if p.endswith('/'))
    assert all((ROOT / folder).is_dir() for folder in folders)
    files = {p for p in listed if p not in folders and '*' not in p}
    patterns = [p for p in listed if '*' in p]
    matched = {p.relative_to(ROOT).as_posix() for each in patterns for p in ROOT.glob(each)}
    assert {p for p in existing if not p.startswith(folders)} == files | matched


# -----------------------------------------------------------------------------
# the messages quoted


def texts_of_the_source():
    """Every string of the source, what it is filled with as {}; one string a line."""
    paths = (path for pattern in SOURCES for path in ROOT.glob(pattern))
    nodes = (node for path in paths for node in ast.walk(tree_of(path)))
    found = (text_of(node) for node in nodes if not isinstance(node, ast.BinOp))
    return '\n'.join(' '.join(text.split()) for text in found if text)


def test_every_message_explained_is_one_that_is_printed():
    printed = texts_of_the_source()
    rows = re.findall(r'^\| `(.*?)`', section(ROOT / 'docs/troubleshooting.md', 'Messages'), re.M)
    assert len(rows) > 5
    for quoted in rows:
        parts = [re.escape(part) for part in re.split(r' ?\.\.\. ?', quoted) if part]
        assert re.search('.*'.join(parts), printed), quoted


# -----------------------------------------------------------------------------
# the commands: their scripts, configs, flags and values


def commands(page):
    """[(line, words of a command)] of the shell blocks and the prose of a page, or of the comments
    of a config, in order."""
    if page.suffix == '.py':
        for line in re.findall(r'^#? ?\$ (.*)$', read(page), re.M):
            yield from ((line, words) for words in split(line))
        return
    for block, inline in re.findall(r'^```sh\n(.*?)^```|`([^`\n]+)`', read(page), re.M | re.S):
        for line in re.sub(r"<<'END'\n.*?^END$", '', block, flags=re.M | re.S).splitlines():
            for words in split(line):
                yield line, words
        if re.match('(python|torchrun) ', inline):
            yield inline, [word for word in shlex.split(inline) if word != '...']


def split(line):
    """The commands of a line of the shell, each as words, without their variables."""
    words = [[]]
    for word in shlex.split(line, comments=True):
        if word in ('&&', '&', '|'):
            words.append([])
        elif words[-1] or not re.match(r'[A-Z_]+=', word):
            words[-1].append(word)
    return [each for each in words if each]


class Parsed(Exception):
    pass


def arguments_of(main, argv):
    """What argparse makes of the arguments of a program that does nothing else here."""

    def parser(parse):
        def parse_and_stop(self, args=None, *rest):
            raise Parsed(parse(self, args, *rest))

        return parse_and_stop

    with pytest.MonkeyPatch.context() as patch:
        for name in ('parse_args', 'parse_intermixed_args'):
            parse = getattr(argparse.ArgumentParser, name)
            patch.setattr(argparse.ArgumentParser, name, parser(parse))
        with pytest.raises(Parsed) as parsed:
            main(argv)
    return parsed.value.args[0]


def settings_of(script, argv):
    """The settings of one of the scripts with these arguments."""
    path = str(ROOT / script)
    block = configurator.settings_block(path)
    scope = {'__file__': path, '__doc__': ''}
    exec(compile(ast.Module(block, []), path, 'exec'), scope)
    return configure(scope, argv, positional='start' if script == 'sample.py' else None)


def check_bench(settings):
    bench_rules.check_modes(settings)
    if not (settings['compare'] or settings['report'] or settings['task']):
        names = bench_rules.requested_benchmarks(
            settings, [*bench.BENCHMARKS], bench.EXTRA_BENCHMARKS
        )
        bench_rules.check_used(settings, ['serve'] if settings['serve'] else names)
        bench_rules.check_values(settings)


CHECKS = {'train.py': validate, 'bench.py': check_bench}  # of the values together


def check_command(words, prepared):
    """Fail for a command that its script would refuse.

    prepared: datasets that earlier lines made; one that this command makes is added.
    """
    at = next((i for i, word in enumerate(words) if word.endswith(('.py', '.sh'))), None)
    if words[:3] == ['python', '-m', 'flatgpt.checkpoint']:
        arguments_of(checkpoint_command.main, words[3:])
    elif at is None or words[0] == 'cat' or words[1:3] == ['-m', 'pytest']:
        pass  # not ours
    elif words[at + 1 :] == ['--help']:
        assert (ROOT / words[at]).is_file()
    elif words[at].endswith('/prepare.py'):
        module = runpy.run_path(str(ROOT / words[at]))
        args = arguments_of(module['main'], words[at + 1 :])
        prepared |= {getattr(args, 'name', None) or Path(words[at]).parent.name}
        prepared |= {'openwebtext_dev'} if getattr(args, 'dev', False) else set()
    elif words[at] == 'launch/gpu_day.sh':
        gpu_day.requested_jobs(arguments_of(gpu_day.main, words[at + 1 :]).only)
    else:
        script = 'train.py' if words[at] == 'launch/slurm.sh' else words[at]
        assert script in SCRIPTS
        argv = [word for word in words[at + 1 :] if not word.startswith('out/')]  # a run's config
        settings = settings_of(script, argv)
        CHECKS.get(script, lambda settings: None)(settings)
        if script == 'train.py':
            check_dataset(settings['dataset'], prepared)


def check_dataset(setting, prepared):
    if '://' in setting:
        return
    books = runpy.run_path(str(ROOT / 'data/gutenberg/prepare.py'))['SETS']
    for name in re.sub(r':[\d.]+', '', setting).split(','):
        script = ROOT / 'data' / name / 'prepare.py'
        assert name in prepared or name in books or script.exists(), f'{name} is not prepared'


@pytest.mark.parametrize('page', [*PAGES, *sorted((ROOT / 'config').glob('*.py'))], ids=named)
def test_every_command_is_accepted_by_its_script(page):
    prepared = set()
    for line, words in commands(page):
        try:
            check_command(words, prepared)
        except BaseException as error:
            raise AssertionError(line) from error


def test_commands_that_would_be_refused_are_found():
    for line in (
        'python train.py quickstart --n_layers=6',
        'python train.py config/quickstar.py',
        'python train.py quickstart --n_layer=six',
        'python train.py quickstart --dataset=unprepared',
        'FLATGPT_API_KEY=secret python api.py --hosts=0.0.0.0',
        'python sample.py --chat=maybe',
        'torchrun --standalone train.py quickstart --optimizer=adam',
        'python data/text/prepare.py novel.txt --nam=mine',
        'python -m flatgpt.checkpoint exports out/mine',
        'sbatch --nodes=2 launch/slurm.sh config/train_gpt3.py',
        'python bench.py --only=speed',
    ):
        (words,) = split(line)
        with pytest.raises((Exception, SystemExit)):
            check_command(words, set())


# -----------------------------------------------------------------------------
# the walk-throughs, run with fewer and smaller steps

TRAIN = '--device=cpu --dtype=float32 --sample_tokens=3 --eval_sample_tokens=0'.split()
SAMPLE = '--device=cpu --max_new_tokens=3'.split()
END = re.compile(r"^cat > (\S+) <<'END'\n(.*?)^END\n", re.M | re.S)


def shell(text):
    """The shell blocks of a text."""
    return ''.join(re.findall(r'^```sh\n(.*?)^```', text, re.M | re.S))


@pytest.fixture
def walk(run_here, tmp_path, monkeypatch):
    """Run commands of a page, in this process and in an empty folder.

    flags: added to those of train.py. Datasets go to that folder, too.
    """
    monkeypatch.chdir(tmp_path)

    def run(commands, flags=''):
        for name, content in END.findall(commands):
            Path(name).write_text(content, encoding='utf-8')
        for line in END.sub('', commands).splitlines():
            line = re.sub('--name=', '--out_dir=data/', line)
            line = re.sub('--dataset=', '--dataset=data/', line)
            for words in split(line):
                step(words, flags.split())

    def step(words, flags):
        program, *args = words[1:]
        if words[0] == 'cp':
            shutil.copy(*words[1:])
        elif words[:3] == ['python', '-m', 'flatgpt.checkpoint']:
            checkpoint_command.main(words[3:])
        elif program == 'train.py':
            assert run_here(*args[1:], *TRAIN, *flags, config=args[0]) == 0
        elif program == 'sample.py':
            bits = ['--dtype=bfloat16'] if '--quantize=int8' in args else []
            done = sample(*args, *bits, *SAMPLE, input='Who are you?\n')
            assert done.returncode == 0, done.stderr
        else:
            runpy.run_path(str(ROOT / program))['main'](args)

    return run


def expected_output():
    """A regular expression for each line that the README says the quickstart prints."""
    block = section(ROOT / 'README.md', 'What you should see').split('```')[1]
    before, _, after = block.split('-' * 64)  # between them, the sample
    words = [line.split() for line in f'{before}{after}'.splitlines() if line not in ('', '...')]
    variable = re.compile(r'.*[\d/].*|(modern|muon|pydocs),?')
    return [
        ' '.join(r'\S+' if variable.fullmatch(word) else re.escape(word) for word in each)
        for each in words
    ]


def test_own_text_is_prepared_learned_and_continued(walk, capsys):
    for name, length in (('novel.txt', 9000), ('more/other.txt', 9000), ('prompt.txt', 40)):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(' '.join(WORDS * 150)[:length], encoding='utf-8')
    Path('prompts.jsonl').write_text('{"prompt": "the cat"}\n{"prompt": "a", "top_k": 1}\n')
    page = ROOT / 'docs' / 'text.md'
    few = (
        '--minutes=None --tokens=90_000 --n_layer=2 --n_embd=48 --n_head=2 --block_size=16 '
        '--log_interval=1 --eval_train=True --eval_iters=1'
    )
    walk(shell(read(page).partition('\n## ')[0]), few)
    printed = capsys.readouterr().out
    for line in expected_output():
        assert re.search(f'^{line}$', printed, re.M), line
    walk(shell(section(page, 'The run directory')))
    walk(shell(section(page, 'Sample')))
    assert len(Path('answers.jsonl').read_text().splitlines()) == 2
    capsys.readouterr()
    exec(re.search(r'```python\n(.*?)```', read(page), re.S)[1], {})
    assert capsys.readouterr().out.strip('\n')


def test_a_model_is_taught_to_chat_and_then_what_is_preferred(walk):
    page = ROOT / 'docs' / 'finetune.md'
    saved(Path('out/mine'), byte_tokenizer(), block_size=128)
    walk(shell(section(page, 'Chat')), '--epochs=15')
    walk(shell(section(page, 'Preferences (DPO)')), '--epochs=40 --learning_rate=1e-4')
    for run in ('out/chat', 'out/preferred'):
        losses = metrics(run, 'val_loss')
        assert losses[max(losses)] < losses[0]
