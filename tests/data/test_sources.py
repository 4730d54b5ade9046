"""File formats, which files are read, and their documents; and that no input takes forever."""

import bz2
import contextlib
import gzip
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import saved
from error_lines import error_line
from growth import check_growth
from test_prepare import (
    WORDS,
    ids_of,
    prepare_text,
    refused,
    small_chunks,
    start_script,
    text_of,
    wait_for,
    write,
)

from data.sre import prepare as sre
from flatgpt.data import bpe, download, gutenberg, shakespeare, sources, text
from flatgpt.data.bpe import train_bpe
from flatgpt.data.dataset import Writer, find_or_prepare_dataset
from flatgpt.data.tokenizer import EOT, byte_tokenizer, char_tokenizer
from flatgpt.errors import UserError

pytestmark = pytest.mark.usefixtures('in_empty_folder')


def both(folder='out'):
    return text_of('train', folder) + text_of('val', folder)


# --- files that are not text


@pytest.mark.parametrize('extra', [[], ['--errors=replace'], ['--encoding=latin-1']])
@pytest.mark.parametrize(
    ('name', 'content', 'what'),
    [
        (
            'a.jsonl.gz',
            gzip.compress(WORDS.encode(), mtime=0),
            'compressed by gzip; unpack it first: gunzip',
        ),
        ('a.bz2', bz2.compress(WORDS.encode()), 'compressed by bzip2; unpack it first: bunzip2'),
        ('a.pdf', b'%PDF-1.7\n' + b'1 0 obj\n' * 50, 'a PDF; give its text: pdftotext'),
        ('a.docx', b'PK\x03\x04\x14\0\xff' * 50, 'a zip archive'),
        ('a.parquet', b'PAR1\x15\0\xff' * 50, 'parquet'),
        ('a.sqlite', b'SQLite format 3\0' * 50, 'SQLite'),
        ('a.jpg', b'\xff\xd8\xff\xe0' * 50, 'an image'),
        ('a.bin', bytes(range(256)) * 8, 'binary'),
        ('train.bin', b'\1\0' * 99, 'a prepared dataset (token ids), not a text; give the text'),
        ('val-00001.mask.bin', b'\1\0' * 99, 'a prepared dataset (token ids), not a text'),
        ('16.txt', (WORDS * 9).encode('utf-16-le'), 'UTF-16 without a byte order mark'),
        ('16be.txt', (WORDS * 9).encode('utf-16-be'), 'add --encoding=utf-16-be'),
        ('32.txt', (WORDS * 9).encode('utf-32-le'), 'add --encoding=utf-32-le'),
        ('32be.txt', (WORDS * 9).encode('utf-32-be'), 'add --encoding=utf-32-be'),
        ('ru.txt', ('Привет, мир. ' * 20).encode('utf-16-le'), 'add --encoding=utf-16-le'),
    ],
)
def test_a_file_that_is_not_text_is_refused_with_its_format(name, content, what, extra):
    write(name, content)
    message = refused(prepare_text, name, '--tokenizer=byte', *extra)
    assert message.startswith(f'{name}: is ')
    assert what in message
    assert 'errors=replace' not in message


@pytest.mark.parametrize('head', ['BZh is a sound.', 'PAR1 of golf.', 'GIF89a is a format.'])
def test_plain_text_that_begins_as_a_format_does_is_text(head):
    write('a.txt', head + WORDS * 20)
    prepare_text('a.txt', '--tokenizer=byte')
    assert both() == head + WORDS * 20


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-32'])
def test_a_byte_order_mark_sets_the_encoding(encoding, monkeypatch):
    small_chunks(monkeypatch, 101)
    write('a.txt', ('Zoë, Привет. ' * 50).encode(encoding))
    prepare_text('a.txt', '--tokenizer=byte')
    assert both() == 'Zoë, Привет. ' * 50
    message = refused(prepare_text, 'a.txt', '--tokenizer=byte', '--errors=replace')
    assert f'is {encoding.upper()} with a byte order mark' in message
    assert 'omit --encoding' in refused(
        prepare_text, 'a.txt', '--tokenizer=byte', '--encoding=cp1252'
    )


@pytest.mark.parametrize('encoding', ['cp1252', 'latin-1', 'utf-16-le', 'utf-32-be', 'shift_jis'])
def test_another_encoding_is_read_with_the_encoding_flag(encoding):
    words = 'これは本です。' if encoding == 'shift_jis' else 'Zoë is not naïve. '
    write('a.txt', (words * 50).encode(encoding))
    write('b.jsonl', (json.dumps({'text': words}, ensure_ascii=False) + '\n').encode(encoding))
    dataset = prepare_text('a.txt', '--tokenizer=byte', f'--encoding={encoding}')
    assert both() == words * 50
    assert 0.05 < dataset.tokens['val'] / dataset.tokens['train'] < 0.2
    prepare_text('a.txt', '--val=b.jsonl', '--tokenizer=byte', f'--encoding={encoding}')
    assert text_of('val') == words


def test_the_line_for_bytes_that_are_not_utf8_has_both_flags():
    write('a.txt', 'naïve '.encode('cp1252') * 50)
    message = refused(prepare_text, 'a.txt', '--tokenizer=byte')
    assert '--encoding=cp1252' in message
    assert '--errors=replace' in message
    for name in ('cp1252x', 'rot13', ''):
        assert 'unknown; use an encoding' in refused(prepare_text, 'a.txt', f'--encoding={name}')


# --- folders


def test_linked_folders_are_followed_and_loops_are_counted(capsys):
    write('disk/b.txt', 'text b')
    write('more/a.txt', 'text a')
    os.symlink('../disk', 'more/linked')
    os.symlink('..', 'disk/back')
    os.symlink('.', 'more/itself')
    os.symlink('nowhere', 'more/broken')
    prepare_text('more', '--val=disk/b.txt', '--tokenizer=byte')
    assert (text_of('train'), text_of('val')) == ('text a', 'text b')
    out = capsys.readouterr().out
    assert 'files, skipping 0 hidden, empty or binary; broken links: 1' in out
    assert 'links to folders already read: ' in out


def test_files_of_a_folder_that_are_not_text_are_counted_by_format(capsys):
    for i in range(3):
        write(f'more/{i}.txt', WORDS)
    write('more/a.gz', gzip.compress(WORDS.encode(), mtime=0))
    write('more/b.pdf', b'%PDF-1.7\n')
    write('more/c.txt', (WORDS * 9).encode('utf-16-le'))
    prepare_text('more', '--tokenizer=byte')
    out = capsys.readouterr().out
    assert 'more: using 3 files, skipping 3 hidden, empty or binary (' in out
    for part in ('a PDF: 1', 'compressed by gzip: 1', 'UTF-16 without a byte order mark: 1'):
        assert part in out


def test_a_dataset_inside_a_linked_source_folder_is_not_read_as_text():
    write('disk/a.txt', WORDS * 20)
    write('disk/b.txt', WORDS * 20)
    os.symlink('disk', 'linked')
    sizes = []
    for _ in range(2):
        text.main(['linked', '--out_dir=disk/out', '--tokenizer=byte'])
        sizes.append(Path('disk/out/train.bin').stat().st_size)
    assert sizes[0] == sizes[1]


# --- rows


def test_rows_without_text_are_skipped_and_counted_and_other_fields_listed(capsys):
    rows = [{'text': None if i % 3 == 0 else f'row {i}', 'url': 'x', 'n': i} for i in range(30)]
    write('a.jsonl', '\n'.join(map(json.dumps, rows)) + '\n\n\n')
    prepare_text('a.jsonl', '--tokenizer=byte')
    assert both().count('row') == 20
    out = capsys.readouterr().out
    assert 'skipped 10 rows whose text is null or empty' in out
    assert 'used text of each row, not url, n' in out


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('a.json', json.dumps([{'body': f'row {i}'} for i in range(30)], indent=1)),
        ('b.json', ''.join(json.dumps({'body': f'row {i}'}) + '\n' for i in range(30))),
        ('a.csv', 'id,body\n' + ''.join(f'{i},"row {i}"\n' for i in range(30))),
        ('b.csv', 'id;body\n' + ''.join(f'{i};row {i}\n' for i in range(30))),
        ('a.tsv', 'id\tbody\n' + ''.join(f'{i}\trow {i}\n' for i in range(30))),
    ],
)
def test_records_and_tables_are_read_by_their_field(name, content):
    write(name, content)
    prepare_text(name, '--tokenizer=byte', '--field=body')
    assert text_of('val') == f'row 0{EOT}row 10{EOT}row 20'
    assert text_of('train').split(EOT) == [f'row {i}' for i in range(30) if i % 10]
    message = refused(prepare_text, name, '--tokenizer=byte')
    assert "no field 'text'; it has " in message
    assert 'choose one with --field=' in message
    prepare_text(name, '--tokenizer=byte', '--plain')
    assert both() == content


def test_a_cell_of_a_table_may_have_commas_quotes_and_lines():
    write('a.csv', 'text,id\n"one, ""two""\nthree",1\n' + ''.join(f'row {i},2\n' for i in range(9)))
    prepare_text('a.csv', '--tokenizer=byte')
    assert text_of('val') == 'one, "two"\nthree'


@pytest.mark.parametrize(
    ('content', 'problem'),
    [
        ('text,id\na,b,c\n', 'line 2: 3 cells, but the first line has 2'),
        ('text,text\na,b\n', 'two columns have the same name'),
        ('text,id\n"a,b\n', 'invalid table'),
    ],
)
def test_an_invalid_table_is_refused_and_read_as_text_with_plain(content, problem):
    write('a.csv', content)
    message = refused(prepare_text, 'a.csv', '--tokenizer=byte')
    assert problem in message
    text.main(['a.csv', '--out_dir=out', '--tokenizer=byte', '--plain'])
    ids = np.concatenate([np.fromfile(f'out/{split}.bin', '<u2') for split in ('train', 'val')])
    assert byte_tokenizer().decode(ids) == content


def test_json_that_is_not_a_list_of_records_is_text_and_counted(capsys):
    for i in range(5):
        write(f'more/{i}.json', json.dumps({'name': i, 'list': [1, 2]}, indent=1))
    write('more/words.json', json.dumps(['a', 'b']))
    prepare_text('more', '--tokenizer=byte', '--split=fraction')
    assert (
        'read 6 .json files as plain text: no records with a field text' in capsys.readouterr().out
    )
    write('one.json', json.dumps({'text': WORDS * 20}, indent=1))
    prepare_text('one.json', '--tokenizer=byte')
    assert both() == WORDS * 20


def test_the_line_for_conversations_has_the_command_that_prepares_them():
    write('a.jsonl', json.dumps({'messages': []}))
    message = refused(prepare_text, 'a.jsonl', '--tokenizer=byte')
    assert 'for conversations, run data/chat/prepare.py' in message


def test_json_hundreds_of_levels_deep_is_one_line():
    write('a.jsonl', '{"text": "a", "x": ' + '[' * 100_000)
    assert 'a.jsonl, line 1: invalid JSON' in refused(prepare_text, 'a.jsonl', '--tokenizer=byte')


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--field=body'], '--field=body: all files are plain text'),
        (['--val=b.txt', '--val_fraction=0.2'], '--val_fraction=0.2: --val has already'),
        (['--val=b.txt', '--split=document'], '--split=document: --val has already'),
        (['--name=mine'], 'both set the output folder'),
        (['--tokenizer=byte', '--vocab_size=0'], '--vocab_size=0: needs'),
        (
            ['--tokenizer=char', '--read_eot'],
            '--read_eot: the tokenizer char has no end-of-text token',
        ),
    ],
)
def test_an_option_without_effect_is_refused(flags, message):
    write('a.txt', WORDS * 20)
    write('b.txt', WORDS)
    assert message in refused(prepare_text, 'a.txt', *flags)


# --- the end of text, written


@pytest.mark.parametrize('kind', ['byte', 'char', 'bpe'])
def test_a_written_end_of_text_is_counted_or_read(kind, capsys):
    write('a.txt', EOT.join([WORDS * 20] * 4))
    prepare_text('a.txt', f'--tokenizer={kind}')
    assert f'{EOT} occurs 3 times in the text and was read as plain text' in capsys.readouterr().out
    tokenizer = prepare_text('a.txt', f'--tokenizer={kind}', '--read_eot').tokenizer
    assert 'occurs' not in capsys.readouterr().out
    assert sum((ids_of(split) == tokenizer.eot).sum() for split in ('train', 'val')) == 3
    assert both() == EOT.join([WORDS * 20] * 4)
    assert kind != 'char' or b'|' not in tokenizer.token_bytes


# --- the tokenizer of a model


def test_text_gets_the_tokens_of_a_run_a_checkpoint_and_a_file():
    bpe = train_bpe([WORDS * 50], 280)
    saved(Path('run'), bpe)
    write('b.txt', WORDS.upper() * 40)
    checkpoint = next(Path('run/checkpoints').glob('step-*'))
    for where in ('run', checkpoint, checkpoint / 'tokenizer.json'):
        assert prepare_text('b.txt', f'--tokenizer={where}').tokenizer == bpe
        assert both() == WORDS.upper() * 40


def test_the_command_at_the_end_fine_tunes_the_run_that_gave_the_tokenizer(capsys):
    write('b.txt', WORDS * 40)
    saved(Path('my run'), byte_tokenizer())
    text.main(['b.txt', '--out_dir=o', '--tokenizer=my run'])
    assert capsys.readouterr().out.endswith(" --init_from='my run' --learning_rate=3e-4\n")
    text.main(['b.txt', '--out_dir=o', '--tokenizer=o'])  # a dataset, which has no model
    assert '--init_from' not in capsys.readouterr().out


def test_the_files_of_a_dataset_are_not_read_as_text(capsys):
    write('more/a.txt', WORDS * 40)
    prepare_text('more', '--tokenizer=byte')
    text.main(['more/a.txt', '--out_dir=more', '--tokenizer=byte'])
    before = both()
    capsys.readouterr()
    prepare_text('more', '--tokenizer=byte')
    assert both() == before
    assert 'more: using 1 file, skipping' in capsys.readouterr().out


@error_line('the name of a file is empty', 'give files, folders or patterns')
def test_the_line_for_files_for_validation_has_their_flag():
    write('b.txt', WORDS * 40)
    for number in ('0', ''):
        message = refused(text.main, ['b.txt', '--out_dir=o', f'--val={number}'])
        assert message.startswith(f'--val={number or chr(34) * 2}: ')
    text.main(['b.txt', '--out_dir=o', '--tokenizer=byte', '--val_fraction=0.1'])


def test_characters_that_the_tokenizer_does_not_have_are_dropped_and_counted(capsys):
    char_tokenizer(sorted(set(WORDS))).save('tokenizer.json')
    write('b.txt', WORDS.replace('cat', 'Zoë') * 40)
    prepare_text('b.txt', '--tokenizer=tokenizer.json')
    assert both() == WORDS.replace('cat', 'o') * 40
    out = capsys.readouterr().out
    assert "warning: dropped 80 characters (4.4%) that the tokenizer does not have: 'Z', 'ë'" in out
    write('c.txt', 'Привет, мир. ' * 40)
    assert 'in the text, such as' in refused(prepare_text, 'c.txt', '--tokenizer=tokenizer.json')


def test_documents_that_nothing_separates_are_reported(capsys):
    char_tokenizer(sorted(set(WORDS))).save('tokenizer.json')
    write('a.txt', WORDS * 20)
    write('b.txt', WORDS * 30)
    prepare_text('a.txt', 'b.txt', '--tokenizer=tokenizer.json')
    assert 'nothing separates documents' in capsys.readouterr().out


# --- a read-only checkout


def denied(*_, **__):
    raise OSError(30, 'Read-only file system')


def test_a_folder_that_cannot_be_written_leads_to_out_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, 'mkdir', denied)
    with pytest.raises(UserError) as error, Writer(tmp_path / 'x', byte_tokenizer()):
        pass
    assert 'write it elsewhere: --out_dir=FOLDER' in str(error.value)


def test_a_dataset_of_ours_that_cannot_be_prepared_in_its_place_names_the_command(
    tmp_path, monkeypatch
):
    monkeypatch.setattr('flatgpt.data.dataset.DATA', tmp_path)
    write('fresh/prepare.py', 'def main(argv): 1 / 0')
    monkeypatch.setattr(Path, 'mkdir', denied)
    with pytest.raises(UserError, match=r'python data/fresh/prepare\.py --out_dir=FOLDER'):
        find_or_prepare_dataset('fresh')


def test_what_is_fetched_is_kept_beside_the_dataset_where_the_checkout_is_read_only(monkeypatch):
    own, out = Path('own').absolute(), Path('out').absolute()
    assert download.download_folder(own, out) == own
    monkeypatch.setattr(os, 'access', lambda *_: False)
    assert download.download_folder(own, out) == out
    monkeypatch.setattr(shakespeare, 'fetch', lambda url, path, sha256: write(path, WORDS))
    assert shakespeare.read_input(own, out) == WORDS
    assert (out / 'input.txt').exists()


def test_a_source_in_the_output_folder_is_read_if_given_by_name():
    write('mine/input.txt', WORDS)
    for _ in range(2):  # the second time the dataset lies there, too
        text.main(['mine/input.txt', '--out_dir=mine', '--tokenizer=byte'])
        assert both('mine') == WORDS
    for pattern in ('mine', 'mine/*.txt'):
        assert 'mine: the text files are in the output folder' in refused(
            text.main, [pattern, '--out_dir=mine', '--tokenizer=byte']
        )


@pytest.mark.parametrize('zeros', [1, 3])
def test_a_few_zero_bytes_are_not_utf_16(zeros):
    write('a.txt', 'ab' * 200 + '\0b' * zeros + 'ab' * 200)
    assert 'is binary; it has zero bytes' in refused(text.main, ['a.txt', '--out_dir=out'])


@pytest.mark.parametrize('between', ['\n', '\r\n\n'])
def test_a_first_record_may_be_longer_than_a_block(monkeypatch, between):
    monkeypatch.setattr(sources, 'BLOCK', 50)
    write('a.json', between.join(json.dumps({'text': WORDS * 3}) for _ in range(2)))
    prepare_text('a.json', '--tokenizer=byte', '--split=document', '--val_fraction=0.5')
    assert {text_of(split).replace(EOT, '') for split in ('train', 'val')} == {WORDS * 3}


@pytest.mark.parametrize('wrong', ['"text": "a", "text": "b"', '"text": "a", "score": NaN'])
@pytest.mark.parametrize(
    ('name', 'layout'),
    [('a.jsonl', '{}'), ('a.json', '{}'), ('a.json', '[{}]'), ('a.json', '{}\n{{"text": "c"}}')],
)
def test_invalid_json_is_refused_and_never_read_as_text(name, layout, wrong):
    write(name, layout.format(f'{{{wrong}}}'))
    message = refused(text.main, [name, '--out_dir=out', '--tokenizer=byte'])
    assert message.startswith(name)
    assert 'invalid JSON: ' in message


# --- very long words


def test_a_bpe_is_learned_from_pieces_of_a_very_long_word(capsys, monkeypatch):
    monkeypatch.setattr(bpe, 'MAX_PIECES', 8)
    run = ''.join(random.Random(0).choices('ACGT', k=10_000))
    write('a.txt', WORDS * 20 + run + ' ' * 5000 + WORDS * 20)
    prepare_text('a.txt', '--tokenizer=bpe', '--vocab_size=300')
    assert both() == WORDS * 20 + run + ' ' * 5000 + WORDS * 20
    assert (
        'bpe: split 2 runs of more than 256 letters, signs or spaces into 8 pieces'
        in capsys.readouterr().out
    )


def test_a_bpe_smaller_than_requested_is_reported_with_its_reason(capsys):
    write('a.txt', WORDS * 40)
    dataset = prepare_text('a.txt', '--tokenizer=bpe', '--vocab_size=1000')
    line = f'bpe: {dataset.vocab_size} tokens instead of 1,000: the text has no more pairs to merge'
    assert line in capsys.readouterr().out


def test_only_long_words_are_split_for_training():
    long, texts = 'x' * 600, [WORDS, f'{WORDS}{"y" * 256} {"-" * 300}']
    words = bpe.SplitLongWords([*texts, long])
    assert ''.join(words) == ''.join([*texts, long])
    assert words.split == 2


@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_ctrl_c_ends_the_training_of_a_bpe():
    write('a.txt', ' '.join(f'{random.getrandbits(64):x}' for _ in range(1_000_000)))
    process = start_script('a.txt', '--tokenizer=bpe', '--out_dir=out', '--vocab_size=60000')
    wait_for(lambda: process.poll() is not None or threads_of(process.pid) > 3)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, 'interrupted\n')


def threads_of(pid: int) -> int:
    return len(list(Path(f'/proc/{pid}/task').glob('*'))) if Path('/proc').exists() else 9


# --- the worst input of a few megabytes


def nested(unit: str):
    return lambda n: unit * (n // len(unit))


START = '*** START OF THE PROJECT GUTENBERG EBOOK X ***\n'
END = '\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\n'
TEXTS = {  # file's name, content of n bytes, flags
    'one line': ('a.txt', nested('x'), ['--tokenizer=byte']),
    'blanks': ('a.txt', nested(' '), ['--tokenizer=char']),
    'signs, bpe': ('a.txt', nested('='), ['--tokenizer=bpe', '--vocab_size=300']),
    'marks, bpe': ('a.txt', nested('e\u0301'), ['--tokenizer=bpe', '--vocab_size=300']),
    'ends of text': ('a.txt', nested(EOT), ['--tokenizer=byte', '--read_eot']),
    'blank lines': ('a.jsonl', lambda n: '\n' * n + '{"text": "a b"}\n' * 3, ['--tokenizer=byte']),
    'tiny rows': ('a.jsonl', nested('{"text": "a b"}\n'), ['--tokenizer=byte']),
    'a long row': ('a.jsonl', lambda n: json.dumps({'text': 'x' * n}), ['--tokenizer=byte']),
    'a list': ('a.json', lambda n: json.dumps([{'text': 'a b'}] * (n // 16)), ['--tokenizer=byte']),
    'a deep list': ('a.json', nested('['), ['--tokenizer=byte']),
    'a table': ('a.csv', lambda n: 'text,id\n' + 'a b,1\n' * (n // 6), ['--tokenizer=byte']),
    'an open cell': ('a.csv', lambda n: 'text\n"' + 'a,\n' * (n // 3), ['--tokenizer=byte']),
}
BOOKS = ['*** ', '***\n', ' \t', '\n', '[ ', '*END* * ', 'End of Project Gutenberg\n',
         'Produced by\n', '*** START OF THE PROJECT GUTENBERG EBOOK X\n']  # fmt: skip
PAGES = ['<div>', '<', '<a ', '&amp;', '&a', '<li>x</li>', '<li>x', '<p>x</p>', '<table><tr><td>x',
         '<!--', '<br>', '<td>x</td>']  # fmt: skip
WORST = {
    **{name: lambda n, case=case: prepare_worst(n, *case) for name, case in TEXTS.items()},
    **{
        f'a book of {unit!r}': lambda n, unit=unit: gutenberg.find_problem(
            (START + unit * (n // len(unit)) + END).encode(), 7
        )
        for unit in BOOKS
    },
    **{
        f'a page of {unit!r}': lambda n, unit=unit: sre.chapter_problem(
            ('<div role="main"><ol>' + unit * (n // 5 // len(unit))).encode()
        )
        for unit in PAGES
    },
}


def prepare_worst(n: int, name: str, content, flags: list[str]) -> None:
    write(name, content(n))
    with contextlib.suppress(UserError):
        text.main([name, '--out_dir=out', '--workers=1', *flags])


@pytest.mark.parametrize('name', WORST)
def test_the_worst_input_of_a_few_kilobytes_is_read(name):
    WORST[name](20_000)


@pytest.mark.load
@pytest.mark.parametrize('name', WORST)
def test_time_grows_with_the_length_of_the_worst_input(name):
    """1 and 4 MB (pages a fifth of that)."""
    check_growth(lambda megabytes: WORST[name](megabytes * 1_000_000))


@pytest.mark.load
def test_learning_a_bpe_from_a_long_run_takes_seconds():
    for number, run in enumerate((''.join(random.choices('ACGT', k=4_000_000)), ' ' * 4_000_000)):
        write(f'{number}.txt', WORDS * 100 + run + WORDS * 100)
        start = time.perf_counter()
        prepare_text(f'{number}.txt', '--tokenizer=bpe', '--vocab_size=600')
        assert time.perf_counter() - start < 60
