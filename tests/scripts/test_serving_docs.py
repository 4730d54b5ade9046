"""The examples of docs/serving.md, run against a server."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, saved
from server import (
    documented_paths,
    served,
)

import api
from flatgpt.data.tokenizer import byte_tokenizer

pytest_plugins = ['server']
PAGE = (ROOT / 'docs' / 'serving.md').read_text(encoding='utf-8')
EXAMPLES = re.findall(r'^curl .*$', PAGE, re.M)


@pytest.fixture
def port(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {role: [f'{role}: ', '\n'] for role in ('user', 'assistant')}
    run = saved(tmp_path / 'mine', tokenizer, block_size=1024)
    app = api.create_app(out_dir=str(run), device='cpu', dtype='float32')
    with served(app) as port:
        yield port
    app.extensions['flatgpt'].close()


def run_in_shell(line, port):
    """What a shell prints for a line of the page, after the line that sets its variables."""
    setting = re.search(r'^URL=.*$', PAGE, re.M)[0].replace(':8000', f':{port}')
    environment = {name: value for name, value in os.environ.items() if 'proxy' not in name.lower()}
    done = subprocess.run(
        ['sh', '-c', f'{setting}\n{line}'], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not (shutil.which('curl') and shutil.which('sh')), reason='needs curl')
@pytest.mark.parametrize('line', EXAMPLES)
def test_every_curl_example_works(line, port):
    printed = run_in_shell(line, port)
    if '/metrics' in line:
        assert 'flatgpt_requests_running' in printed
    elif '"stream"' in line:
        *frames, done, end = printed.split('\n\n')
        assert (done, end) == ('data: [DONE]', '')
        assert all(json.loads(frame[6:])['object'] == 'text_completion' for frame in frames)
    else:
        assert 'error' not in json.loads(printed)


def test_every_path_has_an_example():
    shown = {re.search(r'\$URL(\S+)', line)[1] for line in EXAMPLES}
    documented = {path for path in documented_paths() if not path.endswith('{model}')}
    assert shown - {'/openapi.json'} == documented


def test_the_example_for_the_openai_client_works(port):
    pytest.importorskip('openai')
    code = re.search(r'```python\n(.*?)```', PAGE, re.S)[1].replace(':8000', f':{port}')
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue().strip('\n')
