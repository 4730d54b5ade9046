"""The error lines of data/text/prepare.py: each is provoked, and its advice followed."""

import json
from functools import partial
from pathlib import Path

import conftest
import numpy as np
import pytest
from error_lines import case, error_line

from flatgpt.data import text
from flatgpt.data.tokenizer import char_tokenizer
from flatgpt.data.tokenizer import load as load_tokenizer

WORDS = 'The cat sat on the mat, and the dog ran off. '
ROWS = [json.dumps({'text': i, 'body': f'row {i}. '}) + '\n' for i in range(10)]
PAIR = [r'{"text": "a\ud83d"}' + '\n', r'{"text": "b\ud83d"}' + '\n']
FILES = {
    'a.txt': WORDS * 20,
    'b.txt': WORDS,
    'empty.txt': '',
    '1252.txt': ('naïve ' * 50).encode('cp1252'),
    '16le.txt': ('naïve ' * 50).encode('utf-16-le'),
    '16.txt': ('naïve ' * 50).encode('utf-16'),
    'bom8.txt': b'\xef\xbb\xbfna\xefve ' * 50,
    'bom16.txt': 'naïve '.encode('utf-16') + b'\0',
    'bom16-as-utf-8.txt': 'naïve ' * 50,
    'ru.txt': 'Привет, мир. ' * 20,
    'mine/a.txt': WORDS * 20,
    'rows.jsonl': ''.join(ROWS),
    'half.jsonl': ''.join(PAIR),
    'bad.jsonl': '{"text": ',
    'fixed.jsonl': '{"text": "b"}\n{"text": "d"}\n',
    'twice.csv': 'text,text\na,b\nc,d\n',
    'cells.csv': 'text,id\na,b,c\nd,e\n',
    'open.csv': 'text,id\n"a,b\nd,e\n',
    'fixed.csv': 'text,id\na,b\nd,e\n',
    'data/poe/prepare.py': '',
}


TWO = ' --split=document --val_fraction=0.5'  # of two documents, one for each split


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with the files, in which --name=x goes to data/x, and poe is a dataset of ours."""
    monkeypatch.chdir(tmp_path)
    for name in ('flatgpt.data.dataset.DATA', 'flatgpt.data.text.DATA'):
        monkeypatch.setattr(name, Path('data'))
    for name, content in FILES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    char_tokenizer(sorted(set(WORDS))).save('letters.json')


def prepare(argv: str) -> str:
    """Run the command, with bytes for tokens unless told otherwise -> the text it wrote."""
    args = argv.split()
    if '--tokenizer' not in argv:
        args.append('--tokenizer=byte')
    text.main(args)
    folder = next(Path().rglob('meta.json')).parent
    tokenizer = load_tokenizer(folder / 'tokenizer.json')
    ids = [np.fromfile(folder / f'{split}.bin', '<u2') for split in ('train', 'val')]
    return ''.join(map(tokenizer.decode, ids))


refused = partial(conftest.refused, prepare)


@pytest.mark.parametrize(
    ('bad', 'good', 'result'),
    [
        case('both set the output folder', 'a.txt --name=x --out_dir=o', 'a.txt --name=x', WORDS),
        case(
            'both set the output folder', 'a.txt --name=x --out_dir=o', 'a.txt --out_dir=o', WORDS
        ),
        case('add one, for example --name=mine', 'a.txt', 'a.txt --name=mine', WORDS),
        case('. only, the first not', 'a.txt --name=../x', 'a.txt --name=x_1.2-b', WORDS),
        case('comes with flatGPT', 'a.txt --name=poe', 'a.txt --name=mine', WORDS),
        case('comes with flatGPT', 'a.txt --out_dir=data/poe', 'a.txt --out_dir=o', WORDS),
        case('are in the output folder', 'mine --out_dir=mine', 'mine/a.txt --out_dir=mine', WORDS),
        case('are in the output folder', 'mine --out_dir=mine', 'mine --out_dir=o', WORDS),
    ],
)
def test_the_advice_about_the_output_works(bad, good, result):
    message = refused(bad)
    follow(message, bad, good, result)


@pytest.mark.parametrize(
    ('bad', 'good', 'result'),
    [
        case('give files, folders or patterns', 'no/*', 'mine/*', WORDS * 20),
        case('give a file with text', 'empty.txt', 'a.txt', WORDS * 20),
        case('--val includes all', 'a.txt --val=a.txt', 'a.txt b.txt --val=a.txt', WORDS * 21),
        case('without fields', 'a.txt --field=body', 'a.txt', WORDS * 20),
        case('unknown; use an', '1252.txt --encoding=x', '1252.txt --encoding=cp1252', 'naïve'),
        case('unknown; use an', '16le.txt --encoding=x', '16le.txt --encoding=utf-16-le', 'naïve'),
        case('{}: not {} at byte {}; {}', '1252.txt', '1252.txt --encoding=cp1252', 'naïve ' * 50),
        case('{}: not {} at byte {}; {}', '1252.txt', '1252.txt --errors=replace', 'na\ufffdve '),
        case('{}: not {} at byte {}; {}', '1252.txt --encoding=ascii',
             '1252.txt --encoding=ascii --errors=replace', 'na\ufffdve ' * 50),
        case('{}: not {} at byte {}; {}', 'bom8.txt', 'bom8.txt --errors=replace', 'na\ufffdve '),
        case('{}: not {} at byte {}; {}', 'bom16.txt', 'bom16-as-utf-8.txt', 'naïve ' * 50),
        case('byte order mark, but', '16.txt --encoding=cp1252', '16.txt', 'naïve ' * 50),
        case('byte order mark, but', '16.txt --encoding=cp1252',
             '1252.txt --encoding=cp1252', 'naïve ' * 50),
        case('is not supported for it', '16.txt --errors=replace', '16.txt', 'naïve ' * 50),
        case('choose another field', 'rows.jsonl', 'rows.jsonl --field=body', 'row 1. '),
        case('replace it with ? by', 'half.jsonl', 'half.jsonl --errors=replace', 'b?a?'),
        case('; fix it, or read the file', 'bad.jsonl', 'bad.jsonl --plain', FILES['bad.jsonl']),
        case('; fix it, or read the file', 'bad.jsonl', 'fixed.jsonl', 'db'),
        case('two columns have the same name', 'twice.csv', 'twice.csv --plain', 'text,text\n'),
        case('two columns have the same name', 'twice.csv', 'fixed.csv', 'da'),
        case(', but the first line', 'cells.csv', 'cells.csv --plain', FILES['cells.csv']),
        case(', but the first line', 'cells.csv', 'fixed.csv', 'da'),
        case('invalid table', 'open.csv', 'open.csv --plain', FILES['open.csv']),
        case('invalid table', 'open.csv', 'fixed.csv', 'da'),
    ],
)  # fmt: skip
def test_the_advice_about_files_works(bad, good, result):
    message = refused(f'{bad} --out_dir=o')
    options = '--out_dir=o' + TWO * good.startswith(('fixed', 'half'))
    follow(message, bad, f'{good} {options}', result, options)


@pytest.mark.parametrize(
    ('bad', 'good', 'result'),
    [
        case('--val has already chosen', '--val=b.txt --split=document', '--val=b.txt', WORDS * 21),
        case('--val has already chosen', '--val=b.txt --val_fraction=0.2', '--val_fraction=0.2',
             WORDS * 20),
        case('give 1 or more processes', '--workers=0', '--workers=1', WORDS * 20),
        case('give a number above 0', '--val_fraction=0.9', '--val_fraction=0.5', WORDS * 20),
        case('give a number above 0', '--val_fraction=0', '--val_fraction=0.001', WORDS * 20),
        case('no end-of-text token; omit', '--tokenizer=char --read_eot', '--tokenizer=char',
             WORDS * 20),
        case('no end-of-text token; omit', '--tokenizer=char --read_eot',
             '--tokenizer=byte --read_eot', WORDS * 20),
        case('needs --tokenizer=bpe', '--tokenizer=char --vocab_size=300', '--tokenizer=char',
             WORDS * 20),
        case('needs --tokenizer=bpe', '--tokenizer=char --vocab_size=300',
             '--tokenizer=bpe --vocab_size=300', WORDS * 20),
        case('must be at least 258', '--tokenizer=bpe --vocab_size=0',
             '--tokenizer=bpe --vocab_size=258', WORDS * 20),
        case('use another one for a new model', 'ru.txt --tokenizer=letters.json',
             'ru.txt --tokenizer=byte', FILES['ru.txt']),
    ],
)  # fmt: skip
def test_the_advice_about_options_works(bad, good, result):
    file = '' if 'ru.txt' in bad else 'a.txt '
    message = refused(f'{file}{bad} --out_dir=o')
    follow(message, bad, f'{file}{good} --out_dir=o', result, '--out_dir')


def follow(message: str, bad: str, good: str, result: str, given: str = '') -> None:
    """The message has each flag that differs, and the good command writes the text."""
    flags = [{word.partition('=')[0] for word in argv.split()} for argv in (bad, good)]
    for flag in flags[0] ^ flags[1]:
        assert flag in message or flag in given or not flag.startswith('--')
    assert result in prepare(good)


@error_line('FILES --name=mine (see --help)')
def test_the_command_of_the_line_without_files_works():
    command = refused('--name=mine').partition('run ')[2].partition(' (see')[0]
    assert WORDS in prepare(command.replace('FILES', 'a.txt').partition('prepare.py ')[2])
