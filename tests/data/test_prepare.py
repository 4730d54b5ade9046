import hashlib
import http.server
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, refused
from error_lines import error_line
from tiktoken_ext import openai_public as public

from data.pydocs import prepare as pydocs
from flatgpt.data import bpe, encode, sources, text
from flatgpt.data import dataset as dataset_module
from flatgpt.data import shakespeare as shakespeare_char
from flatgpt.data.bpe import train_bpe
from flatgpt.data.dataset import Dataset
from flatgpt.data.download import fetch
from flatgpt.data.tokenizer import EOT, Tokenizer, byte_tokenizer, char_tokenizer
from flatgpt.errors import UserError

SCRIPTS = (
    *('gutenberg', 'openwebtext', 'packages', 'pydocs', 'shakespeare', 'shakespeare_char', 'sre'),
    'text',
)
WORDS = 'The cat sat on the mat, and the dog ran off. '
pytestmark = pytest.mark.usefixtures('in_empty_folder')
needs_gpt2 = pytest.mark.skipif(
    'TIKTOKEN_CACHE_DIR' not in os.environ, reason='TIKTOKEN_CACHE_DIR has the gpt2 vocabulary'
)
needs_shakespeare = pytest.mark.skipif(
    'FLATGPT_SHAKESPEARE' not in os.environ, reason='FLATGPT_SHAKESPEARE is the path of input.txt'
)


def write(path: str, content: str | bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def small_chunks(monkeypatch, characters: int) -> None:
    monkeypatch.setattr('flatgpt.data.encode.CHUNK', characters)
    monkeypatch.setattr(sources, 'BLOCK', characters)


def prepare_text(*argv: str) -> Dataset:
    text.main([*argv, '--out_dir=out'])
    return Dataset('out', 1)


def ids_of(split: str, folder: str = 'out') -> np.ndarray:
    dataset = Dataset(folder, 1)
    paths = sorted(Path(folder).glob(f'{split}*.bin'))
    return np.concatenate([np.fromfile(path, dataset._dtype) for path in paths])


def text_of(split: str, folder: str = 'out') -> str:
    return Dataset(folder, 1).tokenizer.decode(ids_of(split, folder))


@pytest.mark.parametrize('name', SCRIPTS)
def test_every_script_explains_itself(name, capsys):
    module = importlib.import_module(f'data.{name}.prepare')
    with pytest.raises(SystemExit) as end:
        module.main(['--help'])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f'$ python data/{name}/prepare.py' in out
    assert '--out_dir' in out


@pytest.mark.parametrize('name', SCRIPTS)
@pytest.mark.parametrize('flag', ['--out_di=out', '-out_dir=out', '-out_dir'])
@error_line('--help lists the arguments')
def test_a_part_of_a_flag_or_one_dash_is_one_line_that_names_the_flag(name, flag, capsys):
    module = importlib.import_module(f'data.{name}.prepare')
    with pytest.raises(UserError) as error:
        module.main([flag])
    line = f'unrecognized arguments: {flag}; did you mean --out_dir? --help lists the'
    assert str(error.value).startswith(line)
    with pytest.raises(SystemExit):
        module.main(['--help'])
    assert '--out_dir' in capsys.readouterr().out
    assert not Path('out').exists()


def test_a_script_run_from_elsewhere_ends_a_mistake_with_one_line():
    done = run_script()
    assert done.returncode == 2
    assert done.stderr == (
        'error: no files; run python data/text/prepare.py FILES --name=mine (see --help)\n'
    )


def run_script(*argv: str) -> subprocess.CompletedProcess:
    process = start_script(*argv)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_script(*argv: str) -> subprocess.Popen:
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    return subprocess.Popen(
        [sys.executable, ROOT / 'data' / 'text' / 'prepare.py', *argv],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


# --- fetching


class Server(http.server.BaseHTTPRequestHandler):
    content, failures, requests = b'to be\r\nor not\n' * 1000, 0, 0

    def do_GET(self):
        Server.requests += 1
        missing = self.path == '/missing'
        self.send_response(404 if missing else 503 if Server.requests <= Server.failures else 200)
        self.send_header('Content-Length', str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '*')
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    Server.failures = Server.requests = 0
    with http.server.HTTPServer(('127.0.0.1', 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f'http://127.0.0.1:{server.server_port}/input.txt'
        server.shutdown()
        thread.join()


@pytest.fixture
def closed_url(monkeypatch):
    """An address where nothing listens, as when there is no network."""
    monkeypatch.setenv('NO_PROXY', '*')
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    with http.server.HTTPServer(('127.0.0.1', 0), Server) as server:
        port = server.server_port
    return f'http://127.0.0.1:{port}/input.txt'


SHA256 = hashlib.sha256(Server.content).hexdigest()


def test_a_file_is_fetched_byte_for_byte(url):
    fetch(url, 'below/input.txt', SHA256)
    assert Path('below/input.txt').read_bytes() == Server.content
    assert [path.name for path in Path('below').iterdir()] == ['input.txt']


def test_a_file_already_there_is_not_fetched(url):
    write('input.txt', 'mine')
    fetch(url, 'input.txt', SHA256)
    assert Server.requests == 0
    assert Path('input.txt').read_text() == 'mine'


def test_fetching_is_tried_again_when_the_server_fails(url):
    Server.failures = 2
    fetch(url, 'input.txt', SHA256)
    assert Server.requests == 3
    assert Path('input.txt').exists()


def test_a_refused_request_is_not_repeated(url):
    message = refused(fetch, url.replace('input.txt', 'missing'), 'input.txt', SHA256)
    assert 'HTTP 404' in message
    assert Server.requests == 1


def test_a_file_with_another_content_is_not_kept(url):
    message = refused(fetch, url, 'input.txt', '0' * 64)
    assert SHA256 in message
    assert not list(Path().iterdir())


def test_offline_names_the_address_and_where_to_put_the_file(closed_url):
    message = refused(fetch, closed_url, 'below/input.txt', SHA256)
    assert closed_url in message
    assert str(Path('below/input.txt')) in message
    assert not list(Path('below').iterdir())


# --- pydocs


def test_pydocs_has_about_two_megabytes_of_documents(tmp_path, capsys):
    before = set(sys.modules)
    pydocs.main([f'--out_dir={tmp_path}'])
    dataset = Dataset(tmp_path, 256)
    assert dataset.tokenizer == byte_tokenizer()
    assert 1_000_000 < dataset.tokens['train'] < 10_000_000
    assert dataset.tokens['val'] > 50_000
    train, val = text_of('train', tmp_path), text_of('val', tmp_path)
    assert 'json.dumps(' in train + val
    assert 'The "if" statement is used for conditional execution' in train + val
    assert train.count(EOT) > 5 * val.count(EOT) > 100
    assert not train.startswith(EOT)
    assert not train.endswith(EOT)
    assert not {'antigravity', 'this', 'turtle'} & (set(sys.modules) - before), 'imported'


def test_pydocs_reads_what_it_can_and_skips_the_rest(tmp_path):
    write('pydoc_data/topics.py', 'topics = {"if": "\\nThe if statement.\\n", "for": "A loop."}')
    write('b/__init__.py', '"""Package b."""\n1 / 0\n')
    write('b/c.py', 'class D:\n    def e(self, x=1):\n        """Do e.\n\n        Slowly."""\n')
    write('broken.py', 'def (')
    write('latin.py', b'"""\xe9"""')
    write('escape.py', '"""An old \\d escape."""')
    write('silent.py', 'x = 1')
    write('test/test_b.py', '"""Not this."""')
    write('site-packages/other.py', '"""Nor this."""')
    assert list(pydocs.documents(tmp_path)) == [
        'The if statement.\n',
        'A loop.\n',
        'b\n\nPackage b.\n',
        'b.c.D.e(self, x=1)\n\nDo e.\n\nSlowly.\n',
        'escape\n\nAn old \\d escape.\n',
    ]


# --- Shakespeare


def prepare_shakespeare(folder: Path, out_dir: str) -> Dataset:
    shakespeare_char.prepare(
        [f'--out_dir={out_dir}'], '', folder, lambda play: char_tokenizer(sorted(set(play)))
    )
    return Dataset(out_dir, 1)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare_char, 'DATA', tmp_path / 'data')
    for name in ('shakespeare', 'shakespeare_char'):
        (tmp_path / 'data' / name).mkdir(parents=True)
    return tmp_path / 'data'


def test_an_input_already_there_is_used_as_it_is(folders):
    play = 'é first line\r\nsecond\n' * 10
    write(folders / 'shakespeare_char' / 'input.txt', play)
    dataset = prepare_shakespeare(folders / 'shakespeare_char', 'out')
    assert text_of('train') + text_of('val') == play
    assert dataset.tokens['train'] == int(len(play) * 0.9)
    assert [dataset.tokenizer.decode([i]) for i in range(dataset.vocab_size)] == sorted(set(play))


@pytest.mark.parametrize('has', ['shakespeare', 'shakespeare_char'])
def test_the_two_datasets_share_their_input(folders, has):
    write(folders / has / 'input.txt', WORDS)
    for name in ('shakespeare', 'shakespeare_char'):
        prepare_shakespeare(folders / name, 'out')
        assert text_of('train') + text_of('val') == WORDS
    assert len(list(folders.glob('*/input.txt'))) == 1


def test_shakespeare_offline_is_one_line(folders, monkeypatch, closed_url):
    monkeypatch.setattr(shakespeare_char, 'URL', closed_url)
    message = refused(prepare_shakespeare, folders / 'shakespeare', 'out')
    assert closed_url in message
    assert str(folders / 'shakespeare' / 'input.txt') in message
    assert not list(Path('out').glob('*'))


def test_an_input_that_is_not_utf8_is_one_line(folders):
    write(folders / 'shakespeare' / 'input.txt', b'abc\xff')
    assert 'byte 3' in refused(prepare_shakespeare, folders / 'shakespeare', 'out')


@needs_shakespeare
def test_shakespeare_characters_and_split_are_nanogpts(folders):
    play = Path(os.environ['FLATGPT_SHAKESPEARE']).read_bytes()
    assert hashlib.sha256(play).hexdigest() == shakespeare_char.SHA256
    write(folders / 'shakespeare_char' / 'input.txt', play)
    dataset = prepare_shakespeare(folders / 'shakespeare_char', 'out')
    assert dataset.vocab_size == 65
    assert dataset.tokens == {'train': 1003854, 'val': 111540}


@needs_shakespeare
@needs_gpt2
def test_shakespeare_in_gpt2_tokens_has_nanogpts_counts(folders, monkeypatch):
    module = importlib.import_module('data.shakespeare.prepare')
    write(
        folders / 'shakespeare' / 'input.txt', Path(os.environ['FLATGPT_SHAKESPEARE']).read_bytes()
    )
    module.main(['--out_dir=out'])
    assert Dataset('out', 1).tokens == {'train': 301966, 'val': 36059}


# --- own text: files and splits


def test_a_novel_is_split_into_its_beginning_and_its_end():
    write('novel.txt', WORDS * 100)
    dataset = prepare_text('novel.txt', '--tokenizer=byte')
    assert text_of('train') + text_of('val') == WORDS * 100
    assert dataset.tokens['val'] == pytest.approx(450, abs=20)
    assert dataset.bytes == dataset.tokens


def test_many_documents_are_split_by_document_evenly():
    for i in range(40):
        write(f'more/{i:02d}.txt', f'document {i:02d}')
    prepare_text('more', '--tokenizer=byte')
    assert text_of('val') == EOT.join(f'document {i}' for i in ('00', 10, 20, 30))
    assert text_of('train').split(EOT) == [f'document {i:02d}' for i in range(40) if i % 10]


def test_of_few_documents_each_gives_its_end_for_validation():
    write('a.txt', WORDS * 20)
    write('b.txt', WORDS.upper() * 20)
    prepare_text('a.txt', 'b.txt', '--tokenizer=byte')
    for split in ('train', 'val'):
        first, second = text_of(split).split(EOT)
        assert 'the' in first
        assert 'THE' not in first
        assert second == second.upper()


def test_the_kind_of_split_can_be_set():
    write('a.txt', WORDS)
    write('b.txt', WORDS.upper())
    prepare_text('a.txt', 'b.txt', '--tokenizer=byte', '--split=document')
    assert (text_of('train'), text_of('val')) == (WORDS.upper(), WORDS)


def test_files_for_validation_are_not_trained_on():
    write('more/a.txt', 'train this')
    write('more/b.txt', 'validate this')
    write('c.txt', 'and this')
    prepare_text('more', '--val=more/b.txt', '--val=c.txt', '--tokenizer=byte')
    assert text_of('train') == 'train this'
    assert text_of('val') == f'validate this{EOT}and this'


def test_files_for_validation_only_are_one_line():
    write('a.txt', WORDS)
    assert '--val includes all files' in refused(prepare_text, 'a.txt', '--val=a.txt')


def test_files_may_follow_flags():
    write('a.txt', 'train this')
    write('b.txt', 'validate this')
    prepare_text('--tokenizer=byte', '--split=document', 'b.txt', '--val_fraction=0.5', 'a.txt')
    assert text_of('train') == 'train this'
    assert text_of('val') == 'validate this'


def test_a_file_given_twice_is_read_once():
    write('more/a.txt', WORDS)
    prepare_text('more/a.txt', 'more', 'more/*.txt', '--tokenizer=byte')
    assert text_of('train') + text_of('val') == WORDS


def test_hidden_empty_and_binary_files_of_a_folder_are_skipped(capsys):
    write('more/deep/er/b.md', 'text b')
    write('more/a', 'text a')
    write('more/.hidden', 'x')
    write('more/.git/config', 'x')
    write('more/empty.txt', '')
    write('more/picture.png', b'\x89PNG\0\0')
    prepare_text('more', '--val=more/a', '--tokenizer=byte')
    assert (text_of('train'), text_of('val')) == ('text b', 'text a')
    assert 'more: using 2 files, skipping 4 hidden, empty or binary' in capsys.readouterr().out


def test_a_pattern_finds_files_in_folders_below():
    write('more/a.txt', 'a')
    write('more/deep/b.txt', 'b')
    write('more/deep/c.log', 'cc')
    prepare_text('more/**/*.txt', '--val=more/deep/c.log', '--tokenizer=byte')
    assert text_of('train') == f'a{EOT}b'


def test_the_last_line_printed_is_the_next_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(text, 'DATA', tmp_path / 'data')
    write('novel.txt', WORDS * 100)
    text.main(['novel.txt', '--name=mine', '--tokenizer=byte'])
    out = capsys.readouterr().out
    assert out.endswith('Train on it: python train.py config/auto.py --dataset=mine\n')
    assert ' tokens per second' in out
    assert (tmp_path / 'data' / 'mine' / 'meta.json').exists()


# --- own text: tokenizers


def test_a_char_tokenizer_has_the_texts_characters_in_order():
    write('novel.txt', 'héllo wörld ' * 50)
    dataset = prepare_text('novel.txt', '--tokenizer=char')
    assert dataset.tokenizer == char_tokenizer(sorted(set('héllo wörld ')))
    assert text_of('train') + text_of('val') == 'héllo wörld ' * 50


def test_a_char_tokenizer_has_an_end_of_text_token_only_for_several_documents():
    write('a.txt', 'abc ' * 50)
    write('val.txt', 'xyz')
    dataset = prepare_text('a.txt', 'a.txt', '--val=val.txt', '--tokenizer=char')
    assert dataset.tokenizer == char_tokenizer(sorted('abcxyz '), eot=True)


def test_a_bpe_is_learned_with_the_requested_vocabulary_size():
    write('novel.txt', WORDS * 500)
    dataset = prepare_text('novel.txt', '--tokenizer=bpe', '--vocab_size=280')
    assert dataset.vocab_size == 280
    assert text_of('train') + text_of('val') == WORDS * 500
    assert dataset.tokens['train'] < len(WORDS) * 450 / 1.5


def test_a_bpe_is_learned_from_a_bounded_even_sample(monkeypatch):
    taken = []
    small_chunks(monkeypatch, 1000)
    monkeypatch.setattr(text, 'BPE_SAMPLE', 10_000)
    monkeypatch.setattr(
        bpe, 'train_bpe', lambda texts, size: taken.extend(texts) or byte_tokenizer()
    )
    write('novel.txt', ''.join(f'{i:06d} ' for i in range(20_000)))
    prepare_text('novel.txt', '--tokenizer=bpe')
    assert 8_000 < len(''.join(taken)) < 12_000
    places = [int(part.split()[1]) for part in taken]
    assert places[0] < 200
    assert places[-1] > 18_000


@needs_gpt2
def test_gpt2_is_the_default():
    write('novel.txt', WORDS * 100)
    dataset = prepare_text('novel.txt')
    assert dataset.tokenizer.name == 'gpt2'
    expected = tiktoken.get_encoding('gpt2').encode_ordinary(WORDS * 100)
    assert [*ids_of('train'), *ids_of('val')] == expected


# --- own text: chunks and processes


def pattern_of(name: str, monkeypatch) -> str:
    """The regular expression of a tiktoken encoding, without loading its vocabulary."""
    if name == 'bpe':
        return train_bpe(['a b'], 260).pattern
    for loader in ('load_tiktoken_bpe', 'data_gym_to_mergeable_bpe_ranks'):
        monkeypatch.setattr(public, loader, lambda *_, **__: {})
    return public.ENCODING_CONSTRUCTORS[name]()['pat_str']


@pytest.mark.parametrize('name', ['gpt2', 'cl100k_base', 'o200k_base', 'bpe'])
def test_chunks_give_the_ids_of_the_whole_text(name, monkeypatch):
    """Over a vocabulary in which every pair of a text's bytes may merge, if the pattern lets it."""
    rng = random.Random(0)
    alphabet = "aBé字\u0301 \n\r\t.,'1_-\u00a0。\uff0c²" + "ab  '\n"
    ranks = [bytes([b]) for b in range(256)]
    characters = sorted(set(alphabet))
    ranks += sorted({(a + b).encode() for a in characters for b in characters})
    ranks += sorted({(a + b + c).encode() for a in 'aB ,\n' for b in 'aB ,\n' for c in 'aB ,\n'})
    ranks += [c.encode() for c in characters if len(c.encode()) > 1]
    tokens = list(dict.fromkeys(ranks))
    tokenizer = Tokenizer('tiktoken', name, tokens, {}, pattern_of(name, monkeypatch))
    chunks = 0
    for _ in range(1500):
        whole = ''.join(rng.choices(alphabet, k=rng.randrange(1, 60)))
        small_chunks(monkeypatch, rng.randrange(1, 12))
        pieces = list(encode.split_text([whole[:9], whole[9:]]))
        chunks += len(pieces)
        assert ''.join(pieces) == whole
        ids = np.concatenate([tokenizer.encode(piece) for piece in pieces])
        assert ids.tolist() == tokenizer.encode(whole).tolist(), (whole, pieces)
    assert chunks > 3000


def test_text_without_a_word_boundary_is_cut_anyway(monkeypatch):
    small_chunks(monkeypatch, 10)
    monkeypatch.setattr('flatgpt.data.encode.MAX_CHUNK', 100)
    pieces = list(encode.split_text('-' * 37 for _ in range(30)))
    assert ''.join(pieces) == '-' * 37 * 30
    assert max(map(len, pieces)) == 100


def test_several_processes_write_the_same_as_one(monkeypatch):
    monkeypatch.setattr('flatgpt.data.encode.MIN_PARALLEL_BYTES', 0)
    small_chunks(monkeypatch, 3000)
    for i in range(20):
        write(f'more/{i:02d}.txt', f'{i} {WORDS}' * 40)
    written = []
    for workers in (1, 2):
        prepare_text('more', '--tokenizer=bpe', '--vocab_size=300', f'--workers={workers}')
        written.append({path.name: path.read_bytes() for path in Path('out').glob('*.bin')})
    assert written[0] == written[1]
    assert text_of('val').split(EOT)[1] == f'10 {WORDS}' * 40


def wait_for(condition, seconds=20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)


def running_script() -> subprocess.Popen:
    """A preparation by two processes that has begun to write, and would go on for a while."""
    with open('long.txt', 'wb') as file:
        for _ in range(300):
            file.write(WORDS.encode() * 2**14)
    process = start_script('long.txt', '--tokenizer=byte', '--out_dir=out', '--workers=2')
    wait_for(lambda: process.poll() is not None or list(Path('out').glob('*.part')))
    assert process.poll() is None, process.communicate()
    return process


@pytest.mark.skipif(os.name != 'posix', reason='signals')
@pytest.mark.parametrize('delay', [0.0, 0.5])
def test_ctrl_c_is_one_line_and_leaves_nothing(delay):
    process = running_script()
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == 'interrupted\n'
    assert [path.name for path in Path('out').iterdir()] == ['.write.lock']
    assert 'not a dataset' in refused(Dataset, 'out', 8)


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='children are read from /proc')
def test_a_killed_preparation_leaves_no_processes_behind():
    process = running_script()
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    assert len(children) >= 2
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not any(Path(f'/proc/{child}/cwd').exists() for child in children))
    assert 'did not finish' in refused(Dataset, 'out', 8)


# --- own text: bytes and lines


def test_line_ends_and_odd_characters_are_not_altered():
    content = 'one\r\ntwo\rthree\n\n\x0c\u2028four\u0085 \ufefffive\t' * 30
    write('a.txt', content)
    prepare_text('a.txt', '--tokenizer=byte')
    assert text_of('train') + text_of('val') == content


def test_a_byte_order_mark_is_not_part_of_the_text():
    write('a.txt', b'\xef\xbb\xbfabc' + WORDS.encode())
    write('b.jsonl', b'\xef\xbb\xbf{"text": "xyz"}\n')
    prepare_text('a.txt', '--val=b.jsonl', '--tokenizer=byte')
    assert (text_of('train'), text_of('val')) == ('abc' + WORDS, 'xyz')


@pytest.mark.parametrize('offset', [0, 4, 99, 100, 101, 199, 350])
@pytest.mark.parametrize('bad', [b'\xff', b'\xe5\xad.', b'\xc3'])
def test_an_undecodable_byte_is_reported_with_file_and_offset(monkeypatch, offset, bad):
    small_chunks(monkeypatch, 100)
    content = bytearray(('é' * 200).encode())
    content[offset // 2 * 2 : offset // 2 * 2] = bad
    write('a.txt', bytes(content))
    message = refused(prepare_text, 'a.txt', '--tokenizer=byte')
    assert f'a.txt: not UTF-8 at byte {offset // 2 * 2};' in message
    assert '--errors=replace' in message


def test_the_offset_counts_a_byte_order_mark():
    write('a.txt', b'\xef\xbb\xbfab\xff')
    assert 'at byte 5;' in refused(prepare_text, 'a.txt', '--tokenizer=byte')


def test_undecodable_bytes_can_be_replaced():
    write('a.txt', b'abc\xff ' * 100 + b'\xc3')
    prepare_text('a.txt', '--tokenizer=char', '--errors=replace')
    assert text_of('train') + text_of('val') == 'abc\ufffd ' * 100 + '\ufffd'


def test_each_json_line_is_a_document():
    lines = [
        json.dumps({'id': i, 'body': f'döc {i}\n'}, ensure_ascii=i % 2 == 0) for i in range(20)
    ]
    write('a.jsonl', '\n\n'.join(lines) + '\n' + json.dumps({'body': ''}))
    prepare_text('a.jsonl', '--field=body', '--tokenizer=byte')
    assert text_of('val') == f'döc 0\n{EOT}döc 10\n'
    assert text_of('train') == EOT.join(f'döc {i}\n' for i in range(20) if i % 10)


def test_a_long_json_document_is_cut_into_chunks(monkeypatch):
    small_chunks(monkeypatch, 100)
    write('a.jsonl', json.dumps({'text': WORDS * 100}))
    prepare_text('a.jsonl', '--tokenizer=byte')
    assert text_of('train') + text_of('val') == WORDS * 100
    assert EOT not in text_of('train') + text_of('val')


@pytest.mark.parametrize(
    ('line', 'problem'),
    [
        (b'{"text": ', 'invalid JSON'),
        (b'{"body": "x", "id": 1}', "no field 'text'; it has body, id; choose one with --field="),
        (b'["x"]', "no field 'text'"),
        (b'{"text": 3}', "field 'text' is int, not text"),
        (b'{"text": "\\ud83d"}', 'surrogate'),
    ],
)
def test_an_invalid_json_line_is_reported_with_file_and_line(line, problem):
    write('a.jsonl', b'{"text": "fine"}\n\n' + line + b'\n')
    message = refused(prepare_text, 'a.jsonl', '--tokenizer=byte')
    assert 'a.jsonl, line 3: ' in message
    assert problem in message


def test_an_undecodable_byte_in_a_json_line_is_reported_with_its_offset():
    write('a.jsonl', b'{"text": "fine"}\n{"text": "b\xffd"}\n')
    message = refused(prepare_text, 'a.jsonl', '--tokenizer=byte')
    assert 'a.jsonl: not UTF-8 at byte 28;' in message
    prepare_text('a.jsonl', '--tokenizer=byte', '--errors=replace', '--split=document')
    assert (text_of('val'), text_of('train')) == ('fine', 'b\ufffdd')


# --- own text: mistakes


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['absent.txt'], 'absent.txt: no such file or match'),
        (['*.none'], 'no such file or match'),
        (['empty.txt'], 'empty.txt: is empty'),
        (['bare'], 'bare: has no text files'),
        (['a.txt', '--val=absent.txt'], 'absent.txt: no such file'),
        (['a.txt', '--tokenizer=gtp2'], r'did you mean gpt2\?'),
        (['a.txt', '--tokenizer=byte', '--vocab_size=300'], '--vocab_size=300: needs'),
        (['a.txt', '--tokenizer=bpe', '--vocab_size=100'], '--vocab_size=100: must'),
        (['a.txt', '--val_fraction=0.9'], '--val_fraction=0.9: give'),
        (['a.txt', '--workers=0'], '--workers=0: give'),
        (['one.txt', '--tokenizer=byte'], 'split would be empty; add more text'),
    ],
)
def test_a_mistake_is_one_line(argv, message):
    write('a.txt', WORDS)
    write('one.txt', 'x')
    write('empty.txt', '')
    write('bare/.hidden', 'x')
    with pytest.raises(UserError, match=message) as error:
        prepare_text(*argv)
    assert '\n' not in str(error.value)
    assert not list(Path('.').glob('out/*.bin'))


def test_an_unreadable_file_is_one_line(monkeypatch):
    def denied(self, *args, **options):
        raise PermissionError(13, 'Permission denied', str(self))

    write('a.txt', WORDS)
    monkeypatch.setattr(Path, 'open', denied)
    assert 'a.txt: Permission denied' in refused(prepare_text, 'a.txt', '--tokenizer=byte')


@pytest.mark.parametrize('name', ['../x', '.x', 'a b', '-x', ''])
def test_an_invalid_name_is_refused(name):
    write('a.txt', WORDS)
    refused(text.main, ['a.txt', f'--name={name}'])


@pytest.mark.parametrize('name', SCRIPTS)
def test_the_datasets_that_come_with_flatgpt_are_not_overwritten(name):
    write('a.txt', WORDS)
    message = refused(text.main, ['a.txt', f'--name={name}', '--tokenizer=byte'])
    assert 'comes with flatGPT' in message
    message = refused(text.main, ['a.txt', f'--out_dir={dataset_module.DATA / name}'])
    assert 'comes with flatGPT' in message


def test_a_dataset_inside_its_source_folder_is_not_read_as_text():
    write('src/a.txt', 'one text\n' * 50)
    write('src/b.txt', 'another text\n' * 50)
    sizes = []
    for _ in range(2):
        text.main(['src', '--out_dir=src/out', '--tokenizer=byte'])
        sizes.append(Path('src/out/train.bin').stat().st_size)
    assert sizes[0] == sizes[1]


def test_an_empty_out_dir_is_refused():
    write('a.txt', 'one text\n')
    assert 'no name for the dataset' in refused(text.main, ['a.txt', '--out_dir='])
