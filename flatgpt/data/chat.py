"""
Prepare conversations or preference pairs, of which only the assistant's messages are trained on.

$ python data/chat/prepare.py talks.jsonl --name=talks --tokenizer=out/base
$ python train.py train_chat --dataset=talks --init_from=out/base --out_dir=out/chat
$ python data/chat/prepare.py pairs.jsonl --name=pairs --tokenizer=out/chat

Files are JSON Lines: each line is one conversation or one preference pair; a dataset has only one
kind. A .json file can be one array of them. These formats are supported:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
    {"prompt": "Hi", "completion": "Hello!"}      # or question, query; response, output, answer
    {"instruction": "Add", "input": "1 2", "output": "3"}      # or context; input is optional
    {"question": "Who?", "context": "Ada wrote", "answer": "Ada"}
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}  # or whole conversations in both

"messages" may have "tools" beside them, and in them "tool_calls" and the role "tool", as in
OpenAI's API.

A string can also be a list of messages, whose content can be a list of text parts (one per line),
or a dialogue, "\\n\\nHuman: Hi\\n\\nAssistant: Hello!". "system" and "history", a list of
[question, answer] pairs, come first. A line that mixes two formats is an error.

The loss covers the assistant's messages and the delimiter that ends each. It does not cover the
prompt of a preference pair, or a message with "weight": 0, "train": false or "loss_mask": 0. Lines
marked this way, with "label": false, or with an empty prompt or answer are skipped and counted. Any
other field is an error, because it might affect training: --ignore ignores it. --bad=drop skips and
counts invalid lines.

Whole conversations are packed into sequences of --block_size tokens; a preference pair is two
sequences. The default delimiters around messages are plain text and the end-of-text token, so that
the vocabulary stays the base model's; --template sets others.
"""

import argparse
import bisect
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flatgpt.data.dataset import FIRST, PADDING, SPLITS, TARGET, Writer
from flatgpt.data.hf_tokenizer import context_of, find_tokenizer
from flatgpt.data.messages import (
    CONVERSATION_KEYS,
    METADATA_KEYS,
    Message,
    RecordReader,
    SkipRecord,
)
from flatgpt.data.sources import exclude_files, find_files, strip_bom, total_bytes
from flatgpt.data.text import (
    add_output_options,
    check_val_fraction,
    output_folder,
    train_command,
)
from flatgpt.data.tokenizer import ASSISTANT, EOT, Tokenizer
from flatgpt.data.tools import without_tools
from flatgpt.errors import ArgumentParser, UserError, counted, short_repr
from flatgpt.files import strict_json

COMMAND = 'python data/chat/prepare.py'
# Each delimiter is encoded by itself. With exactly one newline on either side of a message, GPT-2's
# tokenizer gives the same ids as for the whole text at once, which a base model was trained on.
TEMPLATE = {
    'system': ['System:\n', '\n'],
    'user': ['User:\n', '\n'],
    ASSISTANT: ['Assistant:\n', EOT],
}
MAX_ERRORS_SHOWN = 5  # of invalid records
JSON_SPACE = re.compile(r'[ \t\r\n]*')
BLANK_LINE = '\n\n'  # ends an answer if the tokenizer has no end of text
DEFAULT_BLOCK_SIZE = 1024  # that of train_chat and train_dpo
MAX_BLOCK_SIZE = 2**20
Sequence = tuple[np.ndarray, np.ndarray]  # ids (T,), loss mask (T,)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    prepare(args, output_folder(args))


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write the dataset folder. args: of arguments()."""
    tokenizer = with_template(find_tokenizer(args.tokenizer), args.template)
    try:
        files, val_files = find_files(args.files), find_files(args.val, flag='--val=')
        files = exclude_files(files, val_files)
        if not files:
            raise UserError('all FILES are also given as --val; add other files to train on')
        train = read_samples(files, args, tokenizer)
        val = read_samples(val_files, args, tokenizer)
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
        help="the base model's: its run directory or a tokenizer.json; or gpt2 (default), byte, a "
        'tiktoken name',
    )
    add(
        '--template',
        type=Path,
        help='a JSON file {"user": ["before a message", "after it"], "assistant": [...]}; default: '
        f"the tokenizer's own, otherwise {json.dumps(TEMPLATE)}",
    )
    add(
        '--block_size',
        type=int,
        help=f'tokens per packed sequence; default: the context of the base model, at most '
        f'{DEFAULT_BLOCK_SIZE}',
    )
    add(
        '--long',
        choices=('drop', 'cut', 'error'),
        default='drop',
        help='conversations longer than a packed sequence: drop skips them (default) and cut '
        'truncates them, and both count them; error stops with an error',
    )
    add(
        '--ignore',
        action='extend',
        type=lambda text: text.split(','),
        default=[],
        metavar='A,B',
        help='fields of lines and messages to ignore, besides those that are always ignored: '
        + ', '.join(METADATA_KEYS),
    )
    add(
        '--bad',
        choices=('error', 'drop'),
        default='error',
        help='invalid lines: error stops with an error (default), drop skips and counts them',
    )
    add(
        '--val',
        action='append',
        default=[],
        help='a file, folder or glob pattern for validation; may be repeated',
    )
    add(
        '--val_fraction',
        type=float,
        default=0.1,
        help='fraction for validation, default %(default)s',
    )
    args = parser.parse_intermixed_args(argv)  # files may also follow flags
    if not args.files:
        raise UserError(f'no FILES; run {COMMAND} FILES --name=talks (see --help)')
    check_val_fraction(args)
    set_block_size(args)
    return args


def set_block_size(args: argparse.Namespace) -> None:
    """Check --block_size; by default, it is the context of the base model."""
    context = context_of(args.tokenizer)
    if args.block_size is None:
        args.block_size = min(context or DEFAULT_BLOCK_SIZE, DEFAULT_BLOCK_SIZE)
    if not 2 <= args.block_size <= MAX_BLOCK_SIZE:
        raise UserError(f'--block_size={args.block_size}: must be between 2 and {MAX_BLOCK_SIZE}')
    if context and args.block_size > context:
        raise UserError(
            f'--block_size={args.block_size}: the context of {args.tokenizer} has only {context} '
            f'tokens; use --block_size={context} or less'
        )


# --- the tokenizer


def with_template(tokenizer: Tokenizer, path: Path | None) -> Tokenizer:
    """The tokenizer with the template in the file, otherwise its own, otherwise TEMPLATE."""
    template = tokenizer.chat_template or TEMPLATE
    if path:
        template = read_template(path)
    elif not tokenizer.chat_template and tokenizer.eot is None:
        template = TEMPLATE | {ASSISTANT: [TEMPLATE[ASSISTANT][0], BLANK_LINE]}
    try:
        tokenizer = Tokenizer.from_dict(tokenizer.to_dict() | {'chat_template': template})
        if not template or not tokenizer.chat_template[ASSISTANT][1]:
            raise UserError("it has no text after the assistant's messages, to end them")
        for before, after in tokenizer.chat_template.values():
            for delimiter in (before, after):
                tokenizer.encode_delimiter(delimiter)  # its characters may be missing
    except UserError as error:
        raise UserError(
            f'{path or f"the chat template for {tokenizer.name}"}: {error}; choose another with '
            '--template=FILE'
        ) from error
    return tokenizer


def read_template(path: Path) -> dict:
    try:
        template = strict_json(path.read_text(encoding='utf-8'))
        if not isinstance(template, dict):
            raise ValueError('it must be a JSON object')
        return template
    except OSError as error:
        raise UserError(f'--template={path}: {error.strerror}; give a JSON file') from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'{path}: not a chat template: {error}; it must look like {json.dumps(TEMPLATE)}'
        ) from error


# --- reading


@dataclass
class Samples:
    """All samples of a split, in memory, in the order of the files. A pair is two sequences, the
    chosen one first."""

    sequences: list[Sequence] = field(default_factory=list)
    pairs: bool | None = None  # None before the first record
    truncated: int = 0
    too_long: int = 0  # skipped
    skipped: Counter = field(default_factory=Counter)  # reason -> records
    errors: list[str] = field(default_factory=list)  # of the records that --bad=drop skipped

    @property
    def count(self) -> int:
        return len(self.sequences) // (2 if self.pairs else 1)

    def all_skipped(self) -> Counter:
        """Reason -> records, except those that were too long."""
        return self.skipped + Counter({'with errors': len(self.errors)})


def read_samples(files: list[Path], args: argparse.Namespace, tokenizer: Tokenizer) -> Samples:
    samples, reader = Samples(), RecordReader(tokenizer.chat_template, args.ignore)
    with tqdm(
        total=total_bytes(files), unit='B', unit_scale=True, desc='reading', disable=None
    ) as bar:
        for path in files:
            for where, block, size in read_records(path):
                try:
                    record = flat_record(parse_record(block), reader)
                    add_sample(samples, reader, record, args, tokenizer)
                except SkipRecord as reason:
                    samples.skipped[str(reason)] += 1
                except UserError as error:
                    if args.bad == 'error':
                        raise UserError(f'{where}: {error}') from error
                    samples.errors.append(f'{where}: {error}')
                bar.update(size)
    return samples


# --- files


def read_records(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """(source, JSON, bytes read) of each record."""
    if path.suffix.lower() == '.json' and not is_json_lines(path):
        yield from read_document(path)
        return
    with path.open('rb') as file:
        for number, line in enumerate(file, 1):
            block = (strip_bom(line)[0] if number == 1 else line).strip()
            if block:
                yield f'{path}, line {number}', block, len(line)


def is_json_lines(path: Path) -> bool:
    """Whether a .json file has one record per line."""
    with path.open('rb') as file:
        lines = (block for line in file if (block := strip_bom(line)[0].strip()))
        first, second = next(lines, b''), next(lines, b'')
    try:
        json.loads(first.decode())  # fails if the value continues on the next line
    except (ValueError, RecursionError):
        return False
    return bool(second)


def read_document(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """The records of a file that is one array or one record, see read_records()."""
    block = strip_bom(path.read_bytes())[0]
    try:
        text = block.decode()
    except UnicodeDecodeError:
        yield str(path), block, len(block)  # parse_record() reports it
        return
    if not text.lstrip().startswith('['):
        yield f'{path}, item 1', block, len(block)
        return
    try:
        for number, (record, item, size) in enumerate(array_items(text), 1):
            if number == 1 and is_message(record):  # the array is one conversation
                yield f'{path}, item 1', block, len(block)
                return
            yield f'{path}, item {number}', item, size
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'{path}: invalid JSON: {error}; write one array, or one conversation or pair per line'
        ) from error


def array_items(text: str) -> Iterator[tuple[object, bytes, int]]:
    """(item, its JSON, bytes read) of each item of a JSON array."""
    decoder, end = json.JSONDecoder(), text.index('[')
    at = JSON_SPACE.match(text, end + 1).end()
    more = text[at : at + 1] != ']'
    while more:
        before = end + 1
        item, end = decoder.raw_decode(text, at)
        yield item, text[at:end].encode(), len(text[before:end].encode())
        end = JSON_SPACE.match(text, end).end()
        if text[end : end + 1] not in (',', ']'):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        more = text[end] == ','
        at = JSON_SPACE.match(text, end + 1).end() if more else end
    if rest := text[at + 1 :].strip():
        raise json.JSONDecodeError('Extra data', text, text.rindex(rest))


def parse_record(block: bytes) -> dict:
    try:
        record = strict_json(block.decode())
    except UnicodeDecodeError as error:
        raise UserError('not UTF-8; save the file as UTF-8 JSON Lines') from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f'invalid JSON: {error}; write one conversation or pair per line, or one array into a '
            '.json file'
        ) from error
    except ValueError as error:  # NaN or a duplicate key
        raise UserError(str(error)) from error
    if isinstance(record, list):
        if any(isinstance(item, dict) and not is_message(item) for item in record):
            raise UserError(
                'is an array of conversations; write one per line, or name the file .json'
            )
        record = {'messages': record}
    if not isinstance(record, dict):
        raise UserError(f'must be an object with "messages", not {short_repr(record)}')
    return record


def flat_record(record: dict, reader: RecordReader) -> dict:
    """A record whose tools, calls and results, if it has any, are text in its messages."""
    key = next((key for key in CONVERSATION_KEYS if isinstance(record.get(key), list)), None)
    tools = None if 'tools' in reader.ignored else record.get('tools')
    if key is None or not all(isinstance(message, dict) for message in record[key]):
        return record
    messages = [reader.without_ignored(message) for message in record[key]]
    if not (
        tools or any(each.get('tool_calls') or each.get('role') == 'tool' for each in messages)
    ):
        return record
    tools = strict_json(tools) if isinstance(tools, str) else tools
    rest = {name: record[name] for name in record if name != 'tools'}
    return rest | {key: without_tools(messages, tools, reader.template)}


def is_message(item: object) -> bool:
    return isinstance(item, dict) and ('role' in item or 'from' in item)


# --- samples


def add_sample(
    samples: Samples,
    reader: RecordReader,
    record: dict,
    args: argparse.Namespace,
    tokenizer: Tokenizer,
) -> None:
    prompt, completions = reader.read(record)
    pairs = len(completions) > 1
    check_same_kind(samples.pairs, pairs)
    samples.pairs, size = pairs, args.block_size
    sequences = [encode_sample(prompt, completion, tokenizer) for completion in completions]
    longest = max(len(ids) for ids, _ in sequences)
    if longest > size and args.long == 'error':
        raise UserError(
            f'{longest} tokens, but a packed sequence holds {size}; --long=drop skips such '
            'conversations, --long=cut truncates them'
        )
    truncated = [(ids[:size], mask[:size]) for ids, mask in sequences]
    useless = not all(mask.any() for _, mask in truncated)
    useless = useless or (pairs and np.array_equal(truncated[0][0], truncated[1][0]))
    if longest > size and (args.long == 'drop' or useless):
        samples.too_long += 1
        return
    samples.truncated += longest > size
    samples.sequences += truncated


def check_same_kind(*pairs: bool | None) -> None:
    if {True, False} <= {*pairs}:
        raise UserError(
            'the files mix conversations and preference pairs; prepare a dataset of each'
        )


def encode_sample(
    prompt: list[Message], completion: list[Message], tokenizer: Tokenizer
) -> Sequence:
    """The ids of a whole sample, and the loss mask, which covers only the completion."""
    ids, masks = [], []
    for number, message in enumerate(prompt + completion):
        message_ids, mask = encode_message(message, number, tokenizer)
        ids.append(message_ids)
        masks.append(mask & (message.in_loss and number >= len(prompt)))
    mask = np.concatenate(masks)
    mask[:1] = False  # the token before it in a packed sequence belongs to another sample
    return np.concatenate(ids), mask


def encode_message(message: Message, number: int, tokenizer: Tokenizer) -> Sequence:
    end = tokenizer.chat_template[ASSISTANT][1]
    is_text = tokenizer.delimiter_id(end) is None
    if is_text and message.role == ASSISTANT and end in message.content:
        raise UserError(
            f"messages[{number}]: the assistant's message contains {end!r}, which ends a turn; "
            'choose another end with --template=FILE'
        )
    return tokenizer.render([{'role': message.role, 'content': message.content}])


# --- writing


def write_dataset(
    args: argparse.Namespace, folder: Path, tokenizer: Tokenizer, train: Samples, val: Samples
) -> None:
    check_same_kind(train.pairs, val.pairs)
    splits = {'train': train.sequences, 'val': val.sequences}
    if not args.val:
        splits = split_validation(train.sequences, args.val_fraction, 2 if train.pairs else 1)
    for split in SPLITS:
        if not splits[split]:
            raise empty_split_error(folder, split, args, {'train': train, 'val': val}[split])
    length, targets = args.block_size, 0
    if train.pairs:  # not packed: the longest pair, rounded up to 64, is enough
        longest = max(len(ids) for ids, _ in train.sequences + val.sequences)
        length = min(length, -(-longest // 64) * 64)
    rows = {'length': length, 'pairs': bool(train.pairs)}
    with Writer(folder, tokenizer, rows=rows) as writer:
        for split in SPLITS:
            packed = [[s] for s in splits[split]] if train.pairs else pack(splits[split], args)
            for sequences in packed:
                ids, flags = join_sequences(sequences, length, tokenizer.eot or 0)
                writer.write(split, ids, flags)
                targets += int((flags & TARGET > 0).sum())
    print_report(args, writer, train, val, targets)


def empty_split_error(
    folder: Path, split: str, args: argparse.Namespace, samples: Samples
) -> UserError:
    if samples.count == 1:
        return UserError('a single sample cannot be split; give validation files with --val=FILE')
    reasons = samples.all_skipped()
    if samples.too_long:
        fix = 'raise it, up to the context' if args.long == 'cut' else '--long=cut truncates them'
        reason = f'longer than --block_size={args.block_size} ({fix})'
        reasons[reason] = samples.too_long
    why = 'the files are blank'
    if reasons:
        counts = ', '.join(
            f'{counted(number, "record")} {reason}' for reason, number in reasons.items()
        )
        first = f' ({samples.errors[0]})' if samples.errors else ''
        why = f'skipped {counts}{first}'
    option = 'FILES' if split == 'train' else '--val files'
    return UserError(f'{folder}: no samples for {split}: {why}; add {option} with others')


def split_validation(
    sequences: list[Sequence], fraction: float, per_sample: int
) -> dict[str, list[Sequence]]:
    """Evenly spaced samples for validation, beginning with the first."""
    splits = {split: [] for split in SPLITS}
    for number in range(len(sequences) // per_sample):
        is_val = math.ceil((number + 1) * fraction) > math.ceil(number * fraction)
        sample = sequences[number * per_sample : (number + 1) * per_sample]
        splits['val' if is_val else 'train'] += sample
    return splits


def pack(sequences: list[Sequence], args: argparse.Namespace) -> list[list[Sequence]]:
    """Pack whole sequences into longer ones, by best-fit decreasing: the longest first, each into
    the one with the least room that holds it."""
    packed: list[list[Sequence]] = []
    by_room: dict[int, list[int]] = {}  # room left -> indices of packed sequences
    rooms: list[int] = []  # the keys of by_room, sorted
    for sequence in sorted(sequences, key=lambda sequence: -len(sequence[0])):
        length = len(sequence[0])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            room, index = args.block_size, len(packed)
            packed.append([])
        else:
            room = rooms[at]
            index = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        packed[index].append(sequence)
        left = room - length
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(index)
    return packed


def join_sequences(
    sequences: list[Sequence], size: int, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """One padded sequence -> its ids (size,), and their flags (size,)."""
    ids, flags = np.full(size, padding), np.full(size, PADDING, np.uint8)
    at = 0
    for sequence, mask in sequences:
        end = at + len(sequence)
        ids[at:end], flags[at:end] = sequence, mask * TARGET
        flags[at] |= FIRST
        at = end
    flags[at : at + 1] |= FIRST
    return ids, flags


def print_report(
    args: argparse.Namespace, writer: Writer, train: Samples, val: Samples, targets: int
) -> None:
    tokens, length = sum(map(writer.tokens, SPLITS)), writer.rows['length']
    used = sum(len(ids) for ids, _ in train.sequences + val.sequences)
    kind, place = (
        ('preference pair', 'sequence') if train.pairs else ('conversation', 'packed sequence')
    )
    print(writer.summary())
    print(
        f'{counted(train.count + val.count, kind)} in {counted(tokens // length, place)} of '
        f'{length:,} tokens, {1 - used / tokens:.1%} padding; {targets:,} tokens to train on'
    )
    truncated, too_long = train.truncated + val.truncated, train.too_long + val.too_long
    print(f'longer than a sequence: {truncated:,} truncated, {too_long:,} skipped')
    for reason, number in (train.all_skipped() + val.all_skipped()).items():
        print(f'skipped: {counted(number, "record")} {reason}')
    for line in (train.errors + val.errors)[:MAX_ERRORS_SHOWN]:
        print(f'    {line}')
    command = train_command(writer.folder, 'train_dpo' if train.pairs else 'train_chat')
    if length <= (1024 if args.tokenizer == 'gpt2' else context_of(args.tokenizer) or 0):
        print(f'Train on it: {command} --init_from={shlex.quote(args.tokenizer)}')
    else:
        print(f'Train on it: {command} --init_from=RUN (RUN: the run directory of the base model)')
