"""
Prepare files of published packages of PyPI, npm or Debian: documentation, manual pages, source.

$ python data/packages/prepare.py pypi:django==5.2.8 --files='docs/**/*.txt' --name=django_docs
$ python data/packages/prepare.py npm:typescript@5.9.3 --files='**/*.ts' --name=ts --tokenizer=bpe
$ python data/packages/prepare.py debian:manpages-fr --files=usr/share/man --name=pages
$ python train.py config/auto.py --dataset=django_docs

Give the version to get the same text again. pip, npm or apt-get finds the package, and no code of
it is run: of PyPI, the source archive is read, or a wheel if there is none. A package is fetched
once and kept in data/packages/files/, where its files can be seen.

Each file is a document. --files selects them by a glob pattern or a folder, without the top folder
of the archive and without .gz: compressed files are unpacked. Hidden, empty and binary files are
skipped and counted.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's flatgpt comes first

from flatgpt.data import text
from flatgpt.data.download import download_folder
from flatgpt.data.packages import parse, unpacked
from flatgpt.data.sources import text_files_in
from flatgpt.errors import ArgumentParser, UserError, one_line_errors

FOLDER = Path(__file__).parent
COMMAND = 'python data/packages/prepare.py'


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    folder = text.output_folder(args)
    try:
        keep = download_folder(FOLDER, folder) / 'files'
        folders = [unpacked(package, keep) for package in args.packages]  # before encoding any
        files = [path for each in folders for path in selected(each, args)]
        text.prepare(args, folder, files, [])
    except OSError as error:
        raise UserError(f'{error.filename or FOLDER}: {error.strerror or error}') from error


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('packages', nargs='*', help='pypi:NAME==VERSION, npm:NAME@VERSION or debian:NAME=VERSION')
    add(
        '--files',
        action='append',
        help='glob pattern or folder of the files to use; may be repeated; default: all files',
    )
    text.add_output_options(parser)
    text.add_decoding_options(parser)
    text.add_options(parser)
    parser.set_defaults(**text.PLAIN_TEXT_DEFAULTS)
    args = parser.parse_intermixed_args(argv)  # packages may also follow flags
    if not args.packages:
        raise UserError(f'no packages; run {COMMAND} pypi:django --name=mine (see --help)')
    args.packages = list(dict.fromkeys(args.packages))  # each once
    for package in args.packages:
        parse(package)
    text.check_options(args)
    return args


def selected(folder: Path, args: argparse.Namespace) -> list[Path]:
    """The text files of a package that --files matches."""
    patterns = args.files or ['.']
    files = text_files_in(folder, args.encoding, patterns)
    if not files:
        kinds = Counter(path.suffix or path.name for path in folder.rglob('*') if path.is_file())
        listed = ', '.join(f'{kind}: {count}' for kind, count in kinds.most_common(12))
        raise UserError(
            f'--files={" --files=".join(patterns)}: matches no text in {folder.name}; '
            f'choose files that it has: {listed}'
        )
    return files


if __name__ == '__main__':
    one_line_errors()
    main()
