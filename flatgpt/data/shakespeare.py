"""Prepares nanoGPT's Shakespeare text, for data/shakespeare/ and data/shakespeare_char/."""

from collections.abc import Callable
from pathlib import Path

from flatgpt.data.dataset import DATA, Writer
from flatgpt.data.download import download_folder, fetch
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import ArgumentParser, UserError

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def prepare(
    argv: list[str] | None, doc: str, folder: Path, make_tokenizer: Callable[[str], Tokenizer]
) -> None:
    """Write Shakespeare's text with the tokenizer make_tokenizer(text)."""
    parser = ArgumentParser(description=doc)
    parser.add_argument('--out_dir', type=Path, default=folder, help='default: %(default)s')
    out_dir = parser.parse_args(argv).out_dir
    text = read_input(folder, out_dir)
    tokenizer = make_tokenizer(text)
    border = int(len(text) * 0.9)  # as nanoGPT, so that losses are comparable
    with Writer(out_dir, tokenizer) as writer:
        writer.write('train', tokenizer.encode(text[:border]))
        writer.write('val', tokenizer.encode(text[border:]))
    print(writer.summary())


def read_input(folder: Path, out_dir: Path) -> str:
    """The text of input.txt, from this folder, the other dataset's, or the web."""
    own = download_folder(folder, out_dir) / 'input.txt'
    others = [DATA / name / 'input.txt' for name in ('shakespeare_char', 'shakespeare')]
    path = next((path for path in (own, folder / 'input.txt', *others) if path.exists()), own)
    fetch(URL, path, SHA256)
    try:
        return path.read_bytes().decode()  # text mode changes line endings
    except UnicodeDecodeError as error:
        raise UserError(
            f'{path}: invalid UTF-8 at byte {error.start}; save it as UTF-8, or delete it to fetch '
            'it again'
        ) from error
