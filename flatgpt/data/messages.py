"""
What a message of a conversation says, the same for chat data and for the server.

    content_text([{'type': 'text', 'text': 'Hi'}])    # 'Hi'
    template_role('human', tokenizer.chat_template)   # 'user'

What is understood is listed; whatever else could change the meaning is refused by name.
"""

from flatgpt.data.tokenizer import ASSISTANT
from flatgpt.errors import UserError

ROLES = {  # other names for a role, in lower case
    'human': 'user',
    'gpt': ASSISTANT,
    'chatgpt': ASSISTANT,
    'bing': ASSISTANT,
    'bard': ASSISTANT,
    'model': ASSISTANT,
    'bot': ASSISTANT,
    'developer': 'system',  # what OpenAI calls it since o1
}
PART_FIELDS = {'type', 'text'}


def content_text(content: object) -> str:
    """The text of a message's content: a text, or a list of text parts, a line each.

    The line end is what vLLM and llama.cpp put between parts. UserError for anything else.
    """
    if isinstance(content, list) and content:
        return '\n'.join(map(part_text, content))
    if not isinstance(content, str):
        raise UserError(f'the content is {short(content)}; it must be a text or a list of parts')
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise UserError('the content has half a surrogate pair; write the character out') from error
    return content


def part_text(part: object) -> str:
    if not isinstance(part, dict):
        raise UserError(f'a part of the content is {short(part)}; it must be an object')
    if part.get('type') != 'text':
        raise UserError(
            f'a part of the content has type {short(part.get("type"))}; only text is read'
        )
    if unknown := sorted(key for key in part.keys() - PART_FIELDS if part[key] is not None):
        raise UserError(f'a part of the content has {quoted(unknown)}, which is not understood')
    if not isinstance(part.get('text'), str):
        raise UserError(f'the text of a part is {short(part.get("text"))}; it must be a text')
    return content_text(part['text'])


def template_role(role: object, template: dict) -> str:
    """The role of the chat template that a role means; UserError where it has none."""
    if isinstance(role, str):
        for name in (role, role.lower(), ROLES.get(role.lower())):
            if name in template:
                return name
    raise UserError(f'no role {short(role)}; there are {", ".join(template)}')


def short(value: object) -> str:
    """A value as a line of an error shows it."""
    text = repr(value[:41] if isinstance(value, str) else value)
    return text if len(text) <= 43 else f'{text[:40]}...'


def quoted(names: list[str]) -> str:
    """Names in quotes, the first ten of them."""
    more = f' and {len(names) - 10} more' if len(names) > 10 else ''
    return ', '.join(map(short, names[:10])) + more
