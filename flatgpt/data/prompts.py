"""
Prepare prompts for reinforcement learning: the model completes them, and a reward scores that.

$ python data/prompts/prepare.py sums.jsonl --name=sums --tokenizer=out/chat
$ python train.py train_rl --dataset=sums --init_from=out/chat --reward=exact

Files are JSON Lines, or a .json file with one array. Each record has a "prompt", or "messages" that
end before the assistant's reply; a "system" message comes first. All other fields are kept for the
reward, which gets the whole record:

    {"prompt": "12+34=", "answer": "46"}
    {"messages": [{"role": "user", "content": "Hi"}], "language": "en"}

A prompt becomes the user's message in the chat template of the tokenizer. With --plain, it is text
that the model continues.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from flatgpt.data.chat import parse_record, read_records, split_validation, with_template
from flatgpt.data.dataset import FIRST, PADDING, SPLITS, Writer
from flatgpt.data.hf_tokenizer import context_of, find_tokenizer
from flatgpt.data.messages import Message, Record, RecordReader, SkipRecord, missing_error
from flatgpt.data.sources import exclude_files, find_files
from flatgpt.data.text import (
    add_output_options,
    check_val_fraction,
    output_folder,
    train_command,
)
from flatgpt.data.tokenizer import ASSISTANT, Tokenizer
from flatgpt.errors import ArgumentParser, UserError, counted, short_repr

COMMAND = 'python data/prompts/prepare.py'
Sample = tuple[np.ndarray, dict]  # ids (T,), the record


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    prepare(args, output_folder(args))


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write the dataset folder. args: of arguments()."""
    tokenizer = find_tokenizer(args.tokenizer)
    if not args.plain:
        tokenizer = with_template(tokenizer, args.template)
    try:
        files, val_files = find_files(args.files), find_files(args.val, flag='--val=')
        files = exclude_files(files, val_files)
        train, val = (read_prompts(paths, args, tokenizer) for paths in (files, val_files))
        write_dataset(args, folder, tokenizer, train, val)
    except OSError as error:
        raise UserError(f'{error.filename or folder}: {error.strerror or error}') from error


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog=COMMAND, description=__doc__)
    add = parser.add_argument
    add('files', nargs='*', help='JSON Lines files, folders and glob patterns')
    add_output_options(parser)
    add(
        '--tokenizer',
        default='gpt2',
        help="the model's: its run directory or a tokenizer.json; or gpt2 (default), byte, a "
        'tiktoken name',
    )
    add('--plain', action='store_true', help='prompts are text, without a chat template')
    add(
        '--template',
        type=Path,
        help="a JSON file with a chat template, see data/chat/prepare.py; default: the tokenizer's",
    )
    add('--val', action='append', default=[], help='a file with prompts to evaluate on')
    add(
        '--val_fraction',
        type=float,
        default=0.1,
        help='fraction to evaluate on without --val, default %(default)s',
    )
    args = parser.parse_intermixed_args(argv)  # files may also follow flags
    if not args.files:
        raise UserError(f'no FILES with prompts; run {COMMAND} FILES --name=sums (see --help)')
    if args.plain and args.template:
        raise UserError('--plain uses no chat template; omit it or --template')
    check_val_fraction(args)
    return args


def read_prompts(files: list[Path], args: argparse.Namespace, tokenizer: Tokenizer) -> list[Sample]:
    samples, longest = [], context_of(args.tokenizer)
    for path in files:
        for where, block, _ in read_records(path):
            try:
                record = parse_record(block)
                ids = encode_plain(record, tokenizer) if args.plain else encode(record, tokenizer)
                if longest and len(ids) >= longest:
                    raise UserError(
                        f'its prompt has {len(ids)} tokens, and the context of {args.tokenizer} '
                        f'only {longest}; shorten or remove it'
                    )
            except SkipRecord as error:
                raise UserError(f'{where}: a message is empty; write one, or remove it') from error
            except UserError as error:
                raise UserError(f'{where}: {error}') from error
            samples.append((ids, record))
    return samples


def encode_plain(record: dict, tokenizer: Tokenizer) -> np.ndarray:
    prompt = record.get('prompt')
    if not isinstance(prompt, str) or not prompt:
        raise UserError(
            f"'prompt' is {short_repr(prompt)}; with --plain, it must be a string that is not empty"
        )
    return tokenizer.encode(prompt)


def encode(record: dict, tokenizer: Tokenizer) -> np.ndarray:
    messages = messages_of(record, tokenizer.chat_template)
    return tokenizer.encode_chat({'role': m.role, 'content': m.content} for m in messages)


def messages_of(fields: dict, template: dict) -> list[Message]:
    """The messages of a record's prompt."""
    reader, record = RecordReader(template), Record(fields)
    if record.find('history'):
        raise UserError("'history' is no part of a prompt; write it into 'messages'")
    given = [key for key in ('messages', 'prompt') if record.take(key)]
    if not given:
        raise missing_error(record, ('prompt', 'messages'), "no 'prompt' or 'messages'")
    if len(given) > 1:
        raise UserError("gives both 'messages' and 'prompt'; remove one of them")
    messages = reader.messages(fields[given[0]], given[0], complete=False)
    messages = reader.with_system(record, messages)
    if messages[-1].role == ASSISTANT:
        raise UserError(
            f'{given[0]!r} ends with a message of the assistant, which the model is to write; '
            'remove it, or move it into another field'
        )
    return messages


def write_dataset(
    args: argparse.Namespace,
    folder: Path,
    tokenizer: Tokenizer,
    train: list[Sample],
    val: list[Sample],
) -> None:
    splits = {'train': train, 'val': val}
    if not args.val:
        splits = split_validation(train, args.val_fraction, 1)
    for split in SPLITS:
        if not splits[split]:
            raise UserError(f'{folder}: no prompts for {split}; add more, or files with --val=FILE')
    longest = max(len(ids) for split in SPLITS for ids, _ in splits[split])
    length = -(-longest // 8) * 8
    with Writer(folder, tokenizer, rows={'length': length, 'pairs': False, 'prompts': True}) as out:
        for split in SPLITS:
            for ids, record in splits[split]:
                row, flags = np.zeros(length, ids.dtype), np.full(length, PADDING, np.uint8)
                row[: len(ids)], flags[: len(ids)] = ids, 0
                flags[0] |= FIRST
                out.write(split, row, flags, json.dumps(record, ensure_ascii=False))
    counts = ', '.join(f'{counted(len(splits[split]), "prompt")} for {split}' for split in SPLITS)
    print(f'{folder}: {counts}, at most {longest:,} tokens ({tokenizer.name})')
    start = args.tokenizer if context_of(args.tokenizer) else 'RUN'  # or no model is there
    command = train_command(folder, 'train_rl')
    print(f'Train on them: {command} --init_from={start} --reward=FILE.py')
