"""
Reads records of chat data, and the messages of chat data and of server requests.

    content_text([{'type': 'text', 'text': 'Hi'}])    # 'Hi'
    template_role('human', tokenizer.chat_template)   # 'user'
    prompt, completions = RecordReader(template).read({'prompt': 'Hi', 'response': 'Yo'})

The supported fields are listed here. Any other field that might affect training is an error.
"""

import re
import shlex
from dataclasses import dataclass, field
from itertools import takewhile

from flatgpt.data.tokenizer import ASSISTANT
from flatgpt.errors import UserError, did_you_mean, short_repr

ROLE_ALIASES = {  # in lower case
    'human': 'user',
    'gpt': ASSISTANT,
    'chatgpt': ASSISTANT,
    'bing': ASSISTANT,
    'bard': ASSISTANT,
    'model': ASSISTANT,
    'bot': ASSISTANT,
    'developer': 'system',  # OpenAI's name for it since o1
}
PART_KEYS = {'type', 'text', 'prompt_cache_breakpoint'}  # OpenAI's, of the price: ignored
CONVERSATION_KEYS = ('messages', 'conversations', 'conversation')
PROMPT_KEYS = ('prompt', 'instruction', 'question', 'query', 'input')
CONTEXT_KEYS = ('input', 'context')  # 'input' only beside 'instruction'
COMPLETION_KEYS = ('completion', 'response', 'output', 'answer')
PAIR_KEYS = ('chosen', 'rejected')
SYSTEM_KEYS = ('system', 'system_prompt')
# Whether the loss covers a message or record: OpenAI's and Mistral's key, axolotl's, that of others
LOSS_KEYS = ('weight', 'train', 'loss_mask')
FORMAT_KEYS = {
    *CONVERSATION_KEYS,
    *PROMPT_KEYS,
    *CONTEXT_KEYS,
    *COMPLETION_KEYS,
    *PAIR_KEYS,
    *SYSTEM_KEYS,
    'history',
}
METADATA_KEYS = """id idx index uid uuid hash row_id prompt_id question_id message_id
conversation_id source src origin url dataset dataset_name subset category topic subject domain task
tags difficulty lang language license author date timestamp created_at model model_name generator
version metadata meta num_turns num_tokens""".split()  # of records and messages, always ignored
DIALOGUE_TURN = re.compile(r'\n\n(Human|Assistant):')  # of a dialogue in one string, as in hh-rlhf
EMPTY = 'with empty text'
EXCLUDED = 'marked as excluded from training'


class SkipRecord(Exception):
    """A valid record with nothing to train on; its text is the reason."""


@dataclass
class Message:
    role: str  # one of the chat template
    content: str
    in_loss: bool = field(default=True, compare=False)


# -----------------------------------------------------------------------------
# one message


def content_text(content: object) -> str:
    """The text of a message's content: a string, or a list of text parts joined by newlines.

    vLLM and llama.cpp join parts the same way. UserError for anything else.
    """
    if isinstance(content, list) and content:
        return '\n'.join(map(part_text, content))
    if not isinstance(content, str):
        raise UserError(
            f'the content is {short_repr(content)}; it must be a string or a list of text parts'
        )
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            'the content has half a surrogate pair; remove it or write the whole character'
        ) from error
    return content


def part_text(part: object) -> str:
    if not isinstance(part, dict):
        raise UserError(
            f'a content part is {short_repr(part)}; it must be an object like '
            '{"type": "text", "text": "Hi"}'
        )
    if part.get('type') != 'text':
        raise UserError(
            f'a content part has type {short_repr(part.get("type"))}; only "text" is supported'
        )
    if unknown := sorted(key for key in part.keys() - PART_KEYS if part[key] is not None):
        raise UserError(f'a content part has unknown fields: {quoted(unknown)}; remove them')
    if not isinstance(part.get('text'), str):
        raise UserError(
            f'the text of a content part is {short_repr(part.get("text"))}; it must be a string'
        )
    return content_text(part['text'])


def template_role(role: object, template: dict) -> str:
    """The role of the chat template for a role or its alias; UserError if there is none."""
    if isinstance(role, str):
        for name in (role, role.lower(), ROLE_ALIASES.get(role.lower())):
            if name in template:
                return name
    raise UserError(f'unknown role {short_repr(role)}; use one of {", ".join(template)}')


def unquoted(name: str) -> str:
    return short_repr(name, lambda name: repr(name)[1:-1])


def quoted(names: list[str]) -> str:
    """The first ten names, in quotes."""
    more = f' and {len(names) - 10} more' if len(names) > 10 else ''
    return ', '.join(map(short_repr, names[:10])) + more


def is_blank(value: object) -> bool:
    return value in (None, [], {}) or (isinstance(value, str) and not value.strip())


# -----------------------------------------------------------------------------
# records


class Record:
    """The fields of a record, and which of them have been used."""

    def __init__(self, fields: dict):
        self.fields = fields
        self.used: list[str] = []

    def find(self, *names: str) -> str | None:
        """The first of these fields that is not blank."""
        return next((name for name in names if not is_blank(self.fields.get(name))), None)

    def take(self, *names: str) -> str | None:
        """Like find(), and marks the field as used."""
        name = self.find(*names)
        self.used += [name] if name else []
        return name

    def has(self, *names: str) -> bool:
        """Whether the record has one of these fields, blank or not."""
        return any(name in self.fields for name in names)

    def check_all_used(self) -> None:
        """UserError for a field that is not blank and was not used."""
        left = [name for name in self.fields if name not in self.used and self.find(name)]
        if rivals := [name for name in left if name in FORMAT_KEYS]:
            raise UserError(
                f'mixes two formats, {self.used[0]!r} and {rivals[0]!r}; '
                + (
                    f'move the text of {rivals[0]!r} into a message'
                    if rivals[0] in CONTEXT_KEYS
                    else f'--ignore={rivals[0]} uses only the first'
                )
            )
        refuse_unknown(left)


def refuse_unknown(names: list[str]) -> None:
    if not names:
        return
    exact = [name for name in names[:10] if unquoted(name) == name and ',' not in name]
    fix = 'remove them from the file'
    if exact:
        fix = 'if not, add ' + shlex.quote(f'--ignore={",".join(exact)}')
    raise UserError(f'has unknown fields that might affect training: {quoted(names)}; {fix}')


def read_loss_flag(fields: dict, names: tuple = LOSS_KEYS, values: str = '0 or 1') -> bool | None:
    """Whether the loss covers a message or a record; None if no field is set. They must agree."""
    given = {name: fields[name] for name in names if not is_blank(fields.get(name))}
    for name, value in given.items():
        numbers = (bool, int, float) if values == '0 or 1' else bool
        if not isinstance(value, numbers) or value not in (0, 1):
            raise UserError(
                f'{name!r} is {short_repr(value)}; it must be {values}; --ignore={name} trains '
                'regardless of it'
            )
    if len(set(given.values())) > 1:
        first, *others = given
        raise UserError(
            f'{quoted(list(given))} contradict each other; --ignore={",".join(others)} uses only '
            f'{first!r}'
        )
    return bool(next(iter(given.values()))) if given else None


class RecordReader:
    """Reads records into messages with the roles of a chat template.

    `ignored`: fields of records and messages to ignore, in addition to METADATA_KEYS.
    """

    def __init__(self, template: dict, ignored: tuple | list = ()):
        self.template = template
        self.ignored = {*METADATA_KEYS, *ignored}

    def read(self, record: dict) -> tuple[list[Message], list[list[Message]]]:
        """-> (prompt, completions): for a preference pair two completions, the chosen one first;
        for a conversation no prompt, and one completion with all messages.

        UserError for an invalid record, SkipRecord for one with nothing to train on.
        """
        record = Record(self.without_ignored(record))
        is_pair = record.find(*PAIR_KEYS) or (
            record.has(*PAIR_KEYS) and not record.find(*CONVERSATION_KEYS, *COMPLETION_KEYS)
        )
        in_loss = [read_loss_flag(record.fields)]
        if not is_pair:
            in_loss.append(read_loss_flag(record.fields, ('label',), 'true or false'))
        if False in in_loss:
            raise SkipRecord(EXCLUDED)
        prompt, completions = self.pair(record) if is_pair else ([], [self.conversation(record)])
        record.used += [*LOSS_KEYS, *([] if is_pair else ['label'])]
        record.check_all_used()
        if not all(any(message.in_loss for message in messages) for messages in completions):
            raise SkipRecord(EXCLUDED)
        return prompt, completions

    def without_ignored(self, fields: dict) -> dict:
        return {name: value for name, value in fields.items() if name not in self.ignored}

    # --- conversations

    def conversation(self, record: Record) -> list[Message]:
        if key := record.take(*CONVERSATION_KEYS):
            messages = self.messages(record.fields[key], key)
            prompt_key = record.find(*PROMPT_KEYS)
            if prompt_key and prompt_key != 'instruction':  # UltraChat repeats the first message
                prompt = self.messages(record.fields[prompt_key], prompt_key)
                if prompt in (m[: len(prompt)] for m in (messages, without_system(messages))):
                    record.take(prompt_key)
        elif prompt := self.prompt(record):
            key = record.take(*COMPLETION_KEYS)
            if not key:
                problem = f"{record.used[0]!r} has no 'completion' or 'response'"
                raise missing_error(record, COMPLETION_KEYS, problem)
            messages = prompt + self.messages(record.fields[key], key, ASSISTANT)
        else:
            names = (*CONVERSATION_KEYS, *PROMPT_KEYS)
            raise missing_error(record, names, "no 'messages', 'conversations' or 'prompt'")
        messages = self.with_system(record, messages)
        if not any(message.role == ASSISTANT for message in messages):
            raise UserError(
                'no message of the assistant, so there is nothing to train on; add one, or skip '
                'such records with --bad=drop'
            )
        return messages

    def prompt(self, record: Record) -> list[Message]:
        """The history and the prompt; empty if the record has no field for a prompt."""
        key = record.take(*PROMPT_KEYS)
        if key is None:
            return []
        value = record.fields[key]
        if extra := record.take(*(CONTEXT_KEYS if key == 'instruction' else CONTEXT_KEYS[1:])):
            value = [value, record.fields[extra]]
            if not all(isinstance(text, str) and not parse_dialogue(text) for text in value):
                raise UserError(
                    f'{key!r} and {extra!r} must both be plain strings; or move the text of '
                    f'{extra!r} into a message'
                )
            value = '\n\n'.join(value)
        elif key == 'instruction' and not isinstance(value, str):
            raise UserError(f"'instruction' is {short_repr(value)}; it must be a string")
        return self.history(record) + self.messages(value, key, complete=False)

    def history(self, record: Record) -> list[Message]:
        """Earlier turns: a list of [question, answer] pairs, or of messages."""
        if not record.fields.get(record.take('history')):
            return []
        turns = record.fields['history']
        if not isinstance(turns, list):
            raise UserError(
                f"'history' is {short_repr(turns)}; it must be a list of [question, answer] pairs"
            )
        if not any(isinstance(turn, list) for turn in turns):
            return self.messages(turns, 'history')
        messages = []
        for number, turn in enumerate(turns):
            if not isinstance(turn, list) or len(turn) != 2:
                raise UserError(f'history[{number}]: must be a [question, answer] pair')
            for text, role in zip(turn, ('user', ASSISTANT), strict=True):
                messages += self.messages([{'role': role, 'content': text}], f'history[{number}]')
        return messages

    def system(self, record: Record) -> list[Message]:
        key = record.take(*SYSTEM_KEYS)
        if not key:
            return []
        if not isinstance(record.fields[key], str):
            raise UserError(f'{key!r} is {short_repr(record.fields[key])}; it must be a string')
        return self.messages([{'role': 'system', 'content': record.fields[key]}], key)

    def with_system(self, record: Record, messages: list[Message]) -> list[Message]:
        """The messages after the record's system prompt, unless they begin with the same one."""
        system, first = self.system(record), messages[:1]
        if not system or first == system:
            return messages
        if first and first[0].role == 'system':
            key = record.find(*SYSTEM_KEYS)
            raise UserError(
                f'has two system prompts, {short_repr(system[0].content)} in {key!r} and '
                f'{short_repr(first[0].content)} in the first message; --ignore={key} uses only '
                'the second'
            )
        return system + messages

    # --- preference pairs

    def pair(self, record: Record) -> tuple[list[Message], list[list[Message]]]:
        for key in PAIR_KEYS:
            if key not in record.fields:
                problem = f"no {key!r}; a preference pair needs 'chosen' and 'rejected'"
                raise field_missing(record.fields, PAIR_KEYS, problem)
            if not record.take(key):
                raise SkipRecord(EMPTY)
        completions = [self.messages(record.fields[key], key, ASSISTANT) for key in PAIR_KEYS]
        if completions[0] == completions[1]:
            raise UserError("'chosen' and 'rejected' are the same; --bad=drop skips such records")
        self.check_scores(record)
        key = record.find(*CONVERSATION_KEYS)
        if key and self.messages(record.fields[key], key) == completions[0]:  # as in UltraFeedback
            record.take(key)
            key = None
        prompt = self.prompt(record)
        if key and not prompt:
            prompt = self.messages(record.fields[record.take(key)], key)
        return split_pair(self.with_system(record, prompt), completions)

    def check_scores(self, record: Record) -> None:
        scores = [record.fields.get(record.take(f'score_{key}')) for key in PAIR_KEYS]
        if all(isinstance(score, int | float) for score in scores) and scores[0] < scores[1]:
            raise UserError(
                f"'score_chosen' is below 'score_rejected' ({scores[0]} < {scores[1]}); swap "
                "'chosen' and 'rejected', or keep them with --ignore=score_chosen,score_rejected"
            )

    # --- messages

    def messages(
        self, value: object, key: str, role: str = 'user', complete: bool = True
    ) -> list[Message]:
        """The messages under a key: a list, one object, a dialogue in one string, or a plain string
        of that role. A dialogue that is not complete may end with an empty assistant turn."""
        if isinstance(value, str):
            value = parse_dialogue(value, complete) or [{'role': role, 'content': value}]
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list) or not value:
            raise UserError(f'{key!r} must be a string or a list of messages')
        messages = []
        for number, message in enumerate(value):
            try:
                messages += self.message(message)
            except UserError as error:
                raise UserError(f'{key}[{number}]: {error}') from error
        return messages

    def message(self, message: object) -> list[Message]:
        """The message in a list, which is empty for a blank system message."""
        fields = self.without_ignored(message) if isinstance(message, dict) else {}
        role, content = get_either(fields, 'role', 'from'), get_either(fields, 'content', 'value')
        known = ('role', 'from', 'content', 'value', *LOSS_KEYS)
        left = [name for name in fields if name not in known]
        refuse_unknown([name for name in left if fields[name] not in (None, '', [], {})])
        try:
            role = template_role(role, self.template)
        except UserError as error:
            raise UserError(f'{error}, or add the role with --template=FILE') from error
        in_loss = read_loss_flag(fields)
        if in_loss and role != ASSISTANT:
            names = [name for name in LOSS_KEYS if fields.get(name)]
            raise UserError(
                f'{quoted(names)} is set on a message of {role!r}, but only messages of the '
                'assistant are trained on; remove it there'
            )
        text = '' if content is None else content_text(content)
        if is_blank(text):
            if role == 'system':
                return []
            raise SkipRecord(EMPTY)
        return [Message(role, text, role == ASSISTANT and in_loss is not False)]


def missing_error(record: Record, names: tuple, problem: str) -> Exception:
    """SkipRecord if one of these fields exists but is blank, else UserError."""
    return SkipRecord(EMPTY) if record.has(*names) else field_missing(record.fields, names, problem)


def field_missing(fields: dict, names: tuple, problem: str) -> UserError:
    """For a record or message with none of these fields, but perhaps a misspelled one."""
    for name in fields:
        if hint := name not in FORMAT_KEYS and did_you_mean(name, names):
            return UserError(f'unknown field {short_repr(name)}; {hint}--help shows the formats')
    found = ', '.join(map(unquoted, list(fields)[:10])) or 'none'
    return UserError(f'{problem}; its fields are {found}; --help shows the formats')


def get_either(fields: dict, name: str, alias: str) -> object:
    """The value of a message's field that has two possible names."""
    found = [key for key in (name, alias) if fields.get(key) is not None]
    if len(found) > 1:
        raise UserError(f'has both {name!r} and {alias!r}; --ignore={alias} uses only {name!r}')
    if not found and name not in fields and alias not in fields:
        problem = f"has no {name!r}; each message needs a 'role' and a 'content'"
        raise field_missing(fields, (name, alias), problem)
    return fields[found[0]] if found else None


def parse_dialogue(text: str, complete: bool = False) -> list[dict]:
    """The turns of a dialogue in one string, as in hh-rlhf; empty for any other string."""
    if not text.startswith('\n\nHuman:'):
        return []
    _, *parts = DIALOGUE_TURN.split(text)
    turns = [
        {'role': 'user' if speaker == 'Human' else ASSISTANT, 'content': content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    ends_open = not complete and turns[-1] == {'role': ASSISTANT, 'content': ''}
    return turns[:-1] if ends_open else turns


def without_system(messages: list[Message]) -> list[Message]:
    """The messages after the system messages at the beginning."""
    first = next((i for i, message in enumerate(messages) if message.role != 'system'), None)
    return [] if first is None else messages[first:]


def split_pair(
    prompt: list[Message], completions: list[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """The prompt and the completions, which may repeat the prompt or hold all of it."""
    if all(messages and messages[0].role != ASSISTANT for messages in completions):
        equal = takewhile(lambda both: both[0] == both[1], zip(*completions, strict=False))
        shared = [message for message, _ in equal]
        asked, repeated = without_system(prompt), without_system(shared)
        system = prompt[: len(prompt) - len(asked)]
        shared_system = shared[: len(shared) - len(repeated)]
        asked = asked or repeated
        same_system = system == shared_system or not system or not shared_system
        if repeated[: len(asked)] == asked and same_system:
            prompt = (system or shared_system) + asked
            start = len(shared_system) + len(asked)
            completions = [messages[start:] for messages in completions]
    if not without_system(prompt) or any(
        not messages or messages[0].role != ASSISTANT for messages in completions
    ):
        raise UserError(
            "'chosen' and 'rejected' are not two replies of the assistant to one prompt; put the "
            "messages before them into 'prompt', or the whole conversation into both"
        )
    return prompt, completions
