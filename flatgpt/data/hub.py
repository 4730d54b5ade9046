"""
Prepare any text dataset of the Hugging Face Hub by its name. It is streamed, not downloaded first.

$ pip install datasets
$ python data/hub/prepare.py roneneldan/TinyStories --field=text --name=tinystories
$ python data/hub/prepare.py HuggingFaceFW/fineweb-edu --config=sample-10BT --name=fineweb
$ python data/hub/prepare.py roneneldan/TinyStories --limit=10000 --name=some_stories
$ python train.py config/auto.py --dataset=tinystories

A row is a document. The rows of a split called validation are for validation; without one, every
200th document is. For a private or gated dataset, first log in with `hf auth login`.

The dataset is written in parts of 200 MB of text. After an interruption, run the same command to
resume after the last complete part, with the same revision of the dataset. The output depends
neither on interruptions nor on the number of processes.
"""

import argparse
import contextlib
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flatgpt.data.dataset import SPLITS, Writer, read_meta
from flatgpt.data.download import network_problem
from flatgpt.data.encode import cores, encode_job, group_chunks, map_in_processes, split_text
from flatgpt.data.hf_tokenizer import find_tokenizer
from flatgpt.data.parquet import open_parquet, texts
from flatgpt.data.parts import combine, is_finished, part_name
from flatgpt.data.text import add_output_options, output_folder, train_command
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import ArgumentParser, UserError, counted, did_you_mean

COMMAND = 'python data/hub/prepare.py'
PART_BYTES = 200_000_000  # of text in a part
VAL_EVERY = 200  # one in so many documents is for validation, in a dataset without such a split
VALIDATION = 'validation'  # the usual name of the split on the Hub
FETCHED = 2**25  # bytes of a parquet file fetched at a time
TEXT_TYPES = ('string', 'large_string')


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    folder = output_folder(args)
    tokenizer = find_tokenizer(args.tokenizer)
    if tokenizer.kind == 'tiktoken' and (why_not := tokenizer.accelerate()):
        print(f'encoding with tiktoken: {why_not}', flush=True)
    source = {'dataset': args.repository, 'config': args.config, 'split': args.split}
    source |= {'field': args.field, 'limit': args.limit, 'tokenizer': tokenizer.name}
    parts = finished_parts(folder, source)
    prepare_libraries()
    source['revision'] = parts[-1]['revision'] if parts else newest_revision(args.repository)
    streams = open_streams(args, source['revision'])
    write_parts(folder, parts, streams, tokenizer, source, args.workers)
    print(combine(folder, [part_name(number) for number in range(len(parts))]))
    print(f'Train on it: {train_command(folder, "config/auto.py")}')


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog=COMMAND, description=__doc__)
    add = parser.add_argument
    add('repository', help='name of the dataset on the Hub: OWNER/NAME')
    add('--field', default='text', help='column that has the text; default text')
    add('--config', help='name of the subset, for a dataset that has several')
    add('--split', default='train', help='split to train on; default train')
    add('--limit', type=int, help='use only this many documents of each split, the first')
    add_output_options(parser)
    add('--tokenizer', default='gpt2', help='gpt2 (default), byte, a tiktoken name, or a path')
    add('--workers', type=int, help='processes; default: one, or one per core where it is faster')
    args = parser.parse_args(argv)
    for option in ('limit', 'workers'):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f'--{option}={value}: give 1 or more')
    return args


# -----------------------------------------------------------------------------
# the streams


def prepare_libraries() -> None:
    """Their errors are reported in one line, and there is one progress bar for all files."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(f'{COMMAND}: needs pip install datasets') from None
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # it reports every retry


@contextlib.contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Raise whatever the libraries raise, of any class, as a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f'{repository} cannot be read now ({network_problem(error)}); run the same command '
            'again to resume'
        ) from error


def newest_revision(repository: str) -> str:
    """The commit of the main branch, so that a resumed command reads the same files."""
    from huggingface_hub import HfApi

    with hub_errors(repository):
        return HfApi().dataset_info(repository, timeout=20).sha


def open_streams(args: argparse.Namespace, revision: str) -> dict:
    """{'val': the validation split, if there is one, 'train': the split to train on}, as streams of
    rows that have only the field."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    with hub_errors(args.repository):
        configs = datasets.get_dataset_config_names(args.repository, revision=revision)
    config = choose_config(args, configs)
    with hub_errors(args.repository):
        builder = datasets.load_dataset_builder(args.repository, config, revision=revision)
        found = builder.as_streaming_dataset()
    if args.split not in found:
        raise UserError(
            f'{args.repository}: has no split {args.split}; choose one with --split=: '
            f'{", ".join(found)}'
        )
    streams = {'train': found[args.split]}
    if VALIDATION in found and args.split != VALIDATION:
        streams = {'val': found[VALIDATION], **streams}
    for stream in streams.values():
        check_field(args, stream)
    if isinstance(builder.config, ParquetConfig):
        files = builder.config.data_files
        return {
            name: ParquetRows(files[stream.split], args.field) for name, stream in streams.items()
        }
    return {name: stream.select_columns([args.field]) for name, stream in streams.items()}


def choose_config(args: argparse.Namespace, configs: list[str]) -> str:
    config = args.config
    if config is None and (len(configs) == 1 or 'default' in configs):
        config = configs[0] if len(configs) == 1 else 'default'
    if config not in configs:
        raise UserError(
            f'{args.repository}: needs the name of one of its subsets; '
            f'{did_you_mean(config or "", configs)}choose one with --config=: {", ".join(configs)}'
        )
    return config


def check_field(args: argparse.Namespace, stream) -> None:
    """UserError unless the rows of a stream have the field, and it is text."""
    with hub_errors(args.repository):
        features = stream.features
        if features is None:  # of files without a schema: what the first row has
            features = {name: None for row in stream.take(1) for name in row}
    kinds = {name: getattr(kind, 'dtype', 'unknown') for name, kind in features.items()}
    if kinds.get(args.field) not in (*TEXT_TYPES, 'unknown'):
        raise UserError(
            f'{args.repository}: has no field {args.field} with text; choose one with --field=: '
            f'{", ".join(f"{name} ({kind})" for name, kind in kinds.items())}'
        )


class ParquetRows:
    """The rows of parquet files: a stream like those of `datasets`, which read whole row groups.

    For files of one row group of 200 MB, those took 1.4 GB of memory and this takes 0.5 GB.
    """

    def __init__(self, files: list[str], field: str):
        self.files, self.field, self.file, self.row = files, field, 0, 0

    def __iter__(self) -> Iterator[dict]:
        from huggingface_hub import HfFileSystem

        system = HfFileSystem()
        while self.file < len(self.files):
            with (
                system.open(self.files[self.file], block_size=FETCHED) as file,
                open_parquet(file) as rows,
            ):
                for text in islice(texts(rows, self.field), self.row, None):
                    self.row += 1
                    yield {self.field: text}
            self.file, self.row = self.file + 1, 0

    def state_dict(self) -> dict:
        return {'file': self.file, 'row': self.row}

    def load_state_dict(self, state: dict) -> None:
        self.file, self.row = state['file'], state['row']


class Documents:
    """The documents of a stream, a part of them at a time.

    resumed: what the last part of this stream recorded, None for a new stream.
    """

    def __init__(self, stream, source: dict, resumed: dict | None):
        self.repository, self.field, self.limit = (
            source[key] for key in ('dataset', 'field', 'limit')
        )
        self.stream, self.number, self.ended, self.empty = stream, 0, False, 0
        if resumed:
            self.number = resumed['next']
            stream.load_state_dict(resumed['state'])
        self.rows = iter(stream)

    def part(self) -> Iterator[tuple[int, str]]:
        """(its number, its text) of each document of the next PART_BYTES."""
        size = 0
        while size < PART_BYTES:
            row = None
            if self.number != self.limit:
                with hub_errors(self.repository):
                    row = next(self.rows, None)
            if row is None:
                self.ended = True
                return
            text = row[self.field] or ''
            self.empty += not text
            size += len(text.encode())
            yield self.number, text
            self.number += 1

    def position(self) -> dict:
        """What a part records: the number of the next document, and the state of the stream there.

        state: None at the end of the stream.
        """
        return {'next': self.number, 'state': None if self.ended else self.stream.state_dict()}


# -----------------------------------------------------------------------------
# the parts


def finished_parts(folder: Path, source: dict) -> list[dict]:
    """What the finished parts recorded, in order, up to the first that is missing."""
    parts = []
    while is_finished(folder / part_name(len(parts)), source):
        parts.append(read_meta(folder / part_name(len(parts)))['source'])
    return parts


def write_parts(
    folder: Path,
    parts: list[dict],
    streams: dict,
    tokenizer: Tokenizer,
    source: dict,
    workers: int | None,
) -> None:
    """Write the missing parts, each of one stream, and append what they record to `parts`."""
    if workers is None:
        fast = tokenizer.accelerated or tokenizer.kind in ('char', 'byte')
        workers = 1 if fast else cores()
    ended = {part['stream'] for part in parts if part['state'] is None}
    with tqdm(unit='B', unit_scale=True, desc=source['dataset'], disable=None) as bar:
        for name in [name for name in streams if name not in ended]:
            resumed = parts[-1] if parts and parts[-1]['stream'] == name else None
            documents = Documents(streams[name], source, resumed)
            val_every = VAL_EVERY if len(streams) == 1 else {'val': 1, 'train': None}[name]
            while not documents.ended:
                recorded = source | {'stream': name}
                with Writer(folder / part_name(len(parts)), tokenizer, source=recorded) as writer:
                    encode_part(writer, documents, val_every, workers, bar)
                    recorded |= documents.position()
                parts.append(recorded)
                if bar.disable:
                    print(f'{part_name(len(parts) - 1)}: {name}, to document {documents.number:,}')
            if documents.empty:
                print(f'skipped {counted(documents.empty, "document")} without text')


def encode_part(
    writer: Writer, documents: Documents, val_every: int | None, workers: int, bar: tqdm
) -> None:
    """Write the next documents. val_every: one in so many is for validation, None for none."""

    def chunks() -> Iterator[tuple]:
        for number, text in documents.part():
            split = 'val' if val_every and number % val_every == 0 else 'train'
            for piece in split_text([text]):
                yield number, split, piece, len(piece.encode())

    tokenizer, jobs = writer.tokenizer, group_chunks(chunks())
    for size, ids in map_in_processes(encode_job, jobs, tokenizer, workers, ahead=workers):
        for split, part in ids.items():
            writer.write(split, part)
        bar.update(size)
    for split in SPLITS:
        if writer.tokens(split) and tokenizer.eot is not None:  # separates it from the next part
            writer.write(split, np.array([tokenizer.eot]))
