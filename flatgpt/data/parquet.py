"""
Tokenizes parquet files, from a folder or the Hugging Face Hub, to one part per file.

    files = hub_files('Skylion007/openwebtext')  # or local_files(folder)
    write_parts(plan_parts(folder, files, val_every=2000), tokenizer)
    merge(folder)

part-00000/, part-00001/, ... are datasets, each made from one file only. So any number of processes
and machines can write them in any order, and an interrupted run resumes with the first missing
part. merge() writes the meta.json that combines them into one dataset.
"""

import contextlib
import functools
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from flatgpt.data.dataset import SPLITS, Writer, is_prepared, read_meta
from flatgpt.data.download import ATTEMPTS, network_problem
from flatgpt.data.encode import (
    Chunk,
    check_interrupt,
    cores,
    encode_job,
    group_chunks,
    map_in_processes,
    split_text,
)
from flatgpt.data.parts import combine, describe_source, is_finished, part_name
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError, counted, reason_of

# the dataset's own files, and the Hub's conversion of other formats
REVISIONS = ('main', 'refs/convert/parquet')
COLUMN = 'text'
BATCH_ROWS = 1000  # documents read at a time
BUFFER = 2**20  # bytes read at a time; the default reads the whole file
DOWNLOAD_FOLDER = 'fetched'  # the subfolder of a part for its file while it is read


class SourceFile(NamedTuple):
    name: str
    size: int  # bytes
    get: Callable[[Path], Path]  # its path, after fetching it to the given folder if needed


class Part(NamedTuple):
    folder: Path
    file: SourceFile
    source: dict  # recorded in meta.json; must be the same to resume

    def is_done(self) -> bool:
        return is_finished(self.folder, self.source)


# --- which files


def local_files(folder: Path) -> list[SourceFile]:
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder; give one with .parquet files: --source=FOLDER')
    found = [path for path in folder.rglob('*.parquet') if path.is_file()]
    paths = {path.relative_to(folder).as_posix(): path for path in found}
    if not paths:
        raise UserError(f'{folder}: contains no .parquet files; add some or change --source')
    return [
        SourceFile(name, path.stat().st_size, functools.partial(local_path, path))
        for name, path in sorted(paths.items())
    ]


def local_path(path: Path, folder: Path) -> Path:
    return path


def hub_files(repository: str) -> list[SourceFile]:
    """The parquet files of a dataset on the Hub, or offline those in the Hub's cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # it reports every retry
    disable_progress_bars()  # there is one for all files
    for revision in REVISIONS:
        try:
            info = HfApi().dataset_info(
                repository, revision=revision, files_metadata=True, timeout=20
            )
        except Exception as error:  # the HTTP library depends on the version
            return cached_files(repository, error)
        get = functools.partial(fetch_from_hub, repository, info.sha)
        names = {file.rfilename: file.size for file in info.siblings}
        files = [
            SourceFile(name, size, functools.partial(get, name))
            for name, size in sorted(names.items())
            if name.endswith('.parquet')
        ]
        if files and not is_partial(files):
            return files
    raise UserError(
        f'{repository}: the Hub has no complete set of .parquet files; get them elsewhere and use '
        '--source=FOLDER'
    )


def is_partial(files: list[SourceFile]) -> bool:
    """Whether files are missing: the Hub converts only the first 5 GB of a large dataset."""
    return any('partial-' in file.name for file in files)


def cached_files(repository: str, error: Exception) -> list[SourceFile]:
    from huggingface_hub import constants, snapshot_download

    for revision in REVISIONS:
        with contextlib.suppress(OSError, UserError):
            folder = snapshot_download(
                repository, repo_type='dataset', revision=revision, local_files_only=True,
                allow_patterns='*.parquet',
            )  # fmt: skip
            files = local_files(Path(folder))
            count = re.search(r'-of-(\d+)\.parquet$', files[0].name)
            if not is_partial(files) and (not count or int(count[1]) == len(files)):
                return files
    raise UserError(
        f'{repository} is not cached and cannot be fetched from {constants.ENDPOINT} '
        f'({network_problem(error)}); download its .parquet files by other means, from the '
        f'revision main or {REVISIONS[1]}, and use --source=FOLDER'
    ) from error


def fetch_from_hub(repository: str, revision: str, name: str, folder: Path) -> Path:
    """Fetch a file from the Hub, or copy it from the Hub's cache, to `folder` -> its path."""
    from huggingface_hub import hf_hub_download

    for attempt in range(ATTEMPTS):
        try:
            path = hf_hub_download(
                repository, name, repo_type='dataset', revision=revision, local_dir=folder
            )
            return Path(path)
        except Exception as error:
            if attempt == ATTEMPTS - 1:
                raise UserError(
                    f'{repository}: {name} cannot be fetched ({network_problem(error)}); run the '
                    'same command again to resume'
                ) from error
        time.sleep(2**attempt)


# --- parts


def plan_parts(folder: Path, files: list[SourceFile], val_every: int) -> list[Part]:
    """val_every: every val_every-th document is for validation, from the first of each file on."""
    parts = []
    for number, file in enumerate(files):
        name = file.name.rsplit('/', 1)[-1]
        source = {'file': name, 'bytes': file.size, 'files': len(files), 'val_every': val_every}
        parts.append(Part(folder / part_name(number), file, source))
    return parts


def write_parts(parts: list[Part], tokenizer: Tokenizer, workers: int | None = None) -> None:
    """Write the missing parts. workers: number of processes, None for one per core."""
    todo = [part for part in parts if not part.is_done()]
    if not todo:
        return
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError('parquet files need pyarrow: pip install pyarrow') from None
    why_not = tokenizer.kind == 'tiktoken' and tokenizer.accelerate()
    if why_not:
        print(f'encoding with tiktoken: {why_not}', flush=True)
    workers = min(workers or cores(), len(todo))
    files = ((part, part.file.get(part.folder / DOWNLOAD_FOLDER)) for part in todo)
    written = map_in_processes(write_part, files, tokenizer, workers, ahead=1)
    sizes = [part.file.size for part in parts]
    done = show_progress(written, sizes, [part.file.size for part in todo])
    if empty := sum(done):
        print(f'skipped {counted(empty, "document")} whose {COLUMN} is null or empty')


def show_progress(
    written: Iterable[tuple[int, int]], sizes: list[int], todo: list[int]
) -> Iterator[int]:
    """Show a progress bar over the bytes of all files, or without a terminal a line per file.

    -> the number of empty documents in each file
    """
    total = sum(sizes)
    before = done = total - sum(todo)
    start = time.perf_counter()
    with tqdm(total=total, initial=done, unit='B', unit_scale=True, disable=None) as bar:
        for size, empty in written:
            bar.update(size)
            done += size
            if bar.disable:
                line = tqdm.format_meter(
                    done, total, time.perf_counter() - start, initial=before, unit_scale=True,
                    bar_format='{n_fmt}B of {total_fmt}B, {remaining} to go',
                )  # fmt: skip
                print(line, flush=True)
            yield empty


def write_part(job: tuple[Part, Path], tokenizer: Tokenizer) -> tuple[int, int]:
    """Encode a file into its part -> bytes of the file, number of empty documents"""
    part, path = job
    empty: list[int] = []
    with Writer(part.folder, tokenizer, source=part.source) as writer:
        try:
            for chunks in group_chunks(read_chunks(path, part.source['val_every'], empty)):
                check_interrupt()
                for split, ids in encode_job(chunks, tokenizer)[1].items():
                    writer.write(split, ids)
        finally:  # before the part is published: nothing cleans up afterwards
            shutil.rmtree(part.folder / DOWNLOAD_FOLDER, ignore_errors=True)
        for split in SPLITS:
            if writer.tokens(split):  # separates it from the next part
                writer.write(split, np.array([tokenizer.eot]))
    return part.file.size, len(empty)


def read_chunks(path: Path, val_every: int, empty: list[int]) -> Iterator[Chunk]:
    """The chunks of a file; the numbers of its empty documents are added to `empty`."""
    for number, document in enumerate(read_documents(path)):
        if not document:
            empty.append(number)
        split = 'train' if number % val_every else 'val'
        for text in split_text([document or '']):
            yield number, split, text, 0


def read_documents(path: Path) -> Iterator[str | None]:
    import pyarrow

    try:
        with open_parquet(path) as file:
            columns = {field.name: str(field.type) for field in file.schema_arrow}
            if columns.get(COLUMN) not in ('string', 'large_string'):
                raise UserError(
                    f'{path}: needs a string column called {COLUMN}, and has '
                    f'{", ".join(f"{name} ({kind})" for name, kind in columns.items())}; rename or '
                    'convert a column'
                )
            yield from texts(file, COLUMN)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(
            f'{path}: invalid parquet file ({reason_of(error)}); replace it and run the same '
            'command again to resume'
        ) from error


def open_parquet(source):
    """A ParquetFile of a path or an open file, which is not read as a whole.

    By default a column of a whole row group is read at once, which may be all of the file.
    """
    from pyarrow.parquet import ParquetFile

    return ParquetFile(source, pre_buffer=False, buffer_size=BUFFER)


def texts(file, column: str) -> Iterator[str | None]:
    for batch in file.iter_batches(BATCH_ROWS, columns=[column]):
        yield from batch.column(0).to_pylist()


def merge(folder: Path) -> str:
    """Combine the parts in `folder` into one dataset, without moving them -> its summary"""
    done = sorted(path for path in folder.glob('part-*') if is_prepared(path))
    if not done:
        raise UserError(f'{folder}: no finished parts; run without --merge first')
    sources = [read_meta(path).get('source') or {} for path in done]
    for source in sources:
        if any(source.get(key) != sources[0].get(key) for key in ('files', 'val_every')):
            raise UserError(
                f'{folder}: its parts belong to different datasets: one was made from '
                f'{describe_source(sources[0])}, another from {describe_source(source)}; delete '
                'the part-* folders and prepare the dataset again'
            )
    names = [part_name(i) for i in range(sources[0].get('files', 0))]
    missing = sorted(set(names) - {path.name for path in done})
    if missing:
        some = f'{", ".join(missing[:3])}{" ..." * (len(missing) > 3)}'
        raise UserError(
            f'{folder}: parts are missing, {len(missing)} of {len(names)}: {some}; run their jobs '
            'first'
        )
    return combine(folder, names)
