"""Programs that people point at a server: OpenAI's for Node, LangChain, LiteLLM, llm.

$ python -m pytest -m clients      # installs each into an environment of its own: some minutes
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import random_model
from server import VOCABULARY, served

from flatgpt.data.tokenizer import byte_tokenizer
from flatgpt.serving import schema

pytest_plugins = ['server']
pytestmark = pytest.mark.clients
POINT = {
    'title': 'Point',
    'description': 'a point',
    'type': 'object',
    'properties': {'x': {'type': 'integer', 'minimum': 0, 'maximum': 9}, 'on': {'enum': ['a']}},
    'required': ['x', 'on'],
    'additionalProperties': False,
}
NODE = """
import OpenAI from 'openai';
const [baseURL, point] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: 'none', maxRetries: 0 });
const given = { model: 'tiny', max_tokens: 8, seed: 1 };
const chat = { ...given, messages: [{ role: 'user', content: 'hi' }] };
const found = { models: (await client.models.list()).data.map((model) => model.id) };
found.text = (await client.completions.create({ ...given, prompt: 'a' })).choices[0].text;
found.chat = (await client.chat.completions.create(chat)).choices[0].message.content;
found.stream = '';
for await (const event of await client.chat.completions.create({ ...chat, stream: true }))
  found.stream += event.choices[0].delta.content ?? '';
const shape = { type: 'json_schema', json_schema: { name: 'p', schema: JSON.parse(point) } };
const parsed = await client.chat.completions.parse(
  { ...chat, max_tokens: 200, response_format: shape });
found.point = JSON.parse(parsed.choices[0].message.content);
try { await client.completions.create({ ...given, prompt: 'a', suffix: 'b' }); }
catch (error) { found.refused = [error.status, error.param]; }
console.log(JSON.stringify(found));
"""
LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI, OpenAI
url, point = sys.argv[1:]
given = dict(model='tiny', base_url=url, api_key='none', max_retries=0, seed=1)
chat = ChatOpenAI(**given, max_tokens=8)
found = {'chat': chat.invoke('hi').content}
found['stream'] = ''.join(part.content for part in chat.stream('hi'))
found['text'] = OpenAI(**given, max_tokens=8).invoke('a')
shaped = ChatOpenAI(**given, max_tokens=200).with_structured_output(
    json.loads(point), method='json_schema')
found['point'] = shaped.invoke('hi')
tools = [{'type': 'function', 'function': {'name': 'point', 'parameters': json.loads(point)}}]
(call,) = ChatOpenAI(**given, max_tokens=200).bind_tools(tools, tool_choice='point').invoke(
    'hi').tool_calls
found['called'] = call['args']
print(json.dumps(found))
"""
LITELLM = """
import json, sys
import litellm
url, point = sys.argv[1:]
given = dict(api_base=url, api_key='none', seed=1)
chat = dict(given, model='openai/tiny', messages=[{'role': 'user', 'content': 'hi'}])
found = {'chat': litellm.completion(**chat, max_tokens=8).choices[0].message.content}
parts = litellm.completion(**chat, max_tokens=8, stream=True)
found['stream'] = ''.join(part.choices[0].delta.content or '' for part in parts)
text = litellm.text_completion(
    **given, model='text-completion-openai/tiny', prompt='a', max_tokens=8)
found['text'] = text.choices[0].text
shape = {'type': 'json_schema', 'json_schema': {'name': 'p', 'schema': json.loads(point)}}
reply = litellm.completion(**chat, max_tokens=200, response_format=shape)
found['point'] = json.loads(reply.choices[0].message.content)
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('clients')


def run(*command, cwd, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ('PYTHONPATH',)}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=kept | environment, capture_output=True, text=True
    )


def install(*command, cwd):
    done = run(*command, cwd=cwd)
    if done.returncode:
        pytest.skip(f'cannot install: {(done.stderr.splitlines() or ["?"])[-1][:200]}')


@pytest.fixture(scope='module')
def python(folder):
    """A function that installs packages into an environment of their own -> its programs."""

    def make(*packages):
        path = folder / packages[0]
        install(sys.executable, '-m', 'venv', path, cwd=folder)
        programs = path / ('Scripts' if os.name == 'nt' else 'bin')
        install(programs / 'python', '-m', 'pip', 'install', '-q', *packages, cwd=folder)
        return programs

    return make


@pytest.fixture
def url(make_app):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {'user': ['U:', '\n'], 'assistant': ['A:', '\n']}
    with served(make_app(tokenizer, random_model(VOCABULARY, 1024), name='tiny')) as port:
        yield f'http://127.0.0.1:{port}/v1'


def check(done):
    """Check what a program printed about its completions."""
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['chat'] == found['stream'] != ''
    assert found['text']
    assert (found['point'].keys(), found['point']['on']) == ({'x', 'on'}, 'a')
    assert 0 <= found['point']['x'] <= 9
    return found


@pytest.fixture(scope='module')
def node(folder):
    if not (shutil.which('node') and shutil.which('npm')):
        pytest.skip('needs node and npm')
    (folder / 'package.json').write_text('{"type": "module"}')
    install(shutil.which('npm'), 'install', 'openai', cwd=folder)
    return folder


def test_openai_for_node(node, url):
    (node / 'main.js').write_text(NODE)
    found = check(run('node', 'main.js', url, json.dumps(POINT), cwd=node))
    assert found['models'] == ['tiny']
    assert found['refused'] == [400, 'suffix']


def test_the_fields_of_openai_for_node_are_known(node):
    types = node / 'node_modules' / 'openai' / 'resources'
    for name, model in (
        ('completions', schema.CompletionRequest),
        ('chat/completions/completions', schema.ChatRequest),
    ):
        text = (types / f'{name}.d.ts').read_text(encoding='utf-8')
        bodies = re.findall(
            r'^export interface \w*CompletionCreateParamsBase {\n(.*?)^}', text, re.M | re.S
        )
        names = {*re.findall(r'^    (\w+)\??:', bodies[0], re.M)}
        assert len(names) > 15
        assert names <= {*model.model_fields}


def test_langchain(python, url, tmp_path):
    program = python('langchain-openai') / 'python'
    found = check(run(program, '-c', LANGCHAIN, url, json.dumps(POINT), cwd=tmp_path))
    assert found['called'].keys() == {'x', 'on'}


def test_litellm(python, url, tmp_path):
    program = python('litellm') / 'python'
    offline = {'LITELLM_LOCAL_MODEL_COST_MAP': 'True'}
    check(run(program, '-c', LITELLM, url, json.dumps(POINT), cwd=tmp_path, **offline))


def test_llm(python, url, tmp_path):
    programs = python('llm')
    (tmp_path / 'extra-openai-models.yaml').write_text(
        f'- model_id: tiny\n  model_name: tiny\n  api_base: {url}\n  supports_schema: true\n'
    )
    ask = (programs / 'llm', '-m', 'tiny', '--key', 'none', '-o', 'seed', '1', '-o', 'max_tokens')
    here = {'cwd': tmp_path, 'LLM_USER_PATH': str(tmp_path)}
    texts = [run(*ask, '8', *flags, 'hi', **here) for flags in ((), ('--no-stream',))]
    assert all(done.returncode == 0 for done in texts), texts
    assert texts[0].stdout.strip() == texts[1].stdout.strip() != ''
    done = run(*ask, '200', '--schema', json.dumps(POINT), 'hi', **here)
    assert json.loads(done.stdout).keys() == {'x', 'on'}, done.stderr
