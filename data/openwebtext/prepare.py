"""
Prepare OpenWebText, GPT-2's kind of training data: 8 million documents, 9 billion tokens, 18 GB.

$ pip install datasets
$ python data/openwebtext/prepare.py                       # fetches about 54 GB
$ python data/openwebtext/prepare.py --source=parquet/     # its .parquet files, fetched before
"""

import argparse
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from configurator import UserError, one_line_errors
from data.dataset import Writer
from data.encode import Chunk, cut, write_chunks
from data.tokenizer import get_tokenizer

DOWNLOAD_GB = 54
NAME = 'Skylion007/openwebtext'
VAL_EVERY = 2000  # one document of so many is for validation: nanoGPT's 0.0005


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path(__file__).parent
    parser.add_argument('--out_dir', type=Path, default=folder, help='default: %(default)s')
    parser.add_argument('--source', type=Path, help='folder of parquet files, instead of fetching')
    parser.add_argument('--workers', type=int, help='processes; default: as many as pay')
    args = parser.parse_args(argv)
    tokenizer = get_tokenizer('gpt2')
    with Writer(args.out_dir, tokenizer) as writer:
        write_chunks(writer, read_chunks(documents(args.source)), args.workers)
    print(writer.summary())


def documents(source: Path | None) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise UserError('openwebtext needs: pip install datasets') from None
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # it tells of every new attempt
    files = sorted(map(str, source.rglob('*.parquet'))) if source else None
    if files == []:
        raise UserError(f'{source}: no .parquet files there')
    try:
        where = {'path': 'parquet', 'data_files': files} if files else {'path': NAME}
        rows = datasets.load_dataset(**where, split='train', streaming=True)
        yield from (row['text'] for row in rows)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
        cure = (
            '' if source else '; its parquet files can be fetched elsewhere and given as --source='
        )
        raise UserError(f'{source or NAME} cannot be read ({reason}){cure}') from error


def read_chunks(documents: Iterable[str]) -> Iterator[Chunk]:
    for number, document in enumerate(documents):
        for text in cut([document]):
            yield number, 'train' if number % VAL_EVERY else 'val', text, len(text.encode())


if __name__ == '__main__':
    one_line_errors()
    main()
