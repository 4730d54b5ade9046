"""A small server on this machine that speaks HTTP as the Hugging Face Hub does.

    with Hub() as hub:
        hub.repositories['models/owner/name'] = {'main': {'config.json': b'...'}}
        hub.trouble['model.safetensors'] = ['cut', 'fail', wait]

Whatever changes the files of a branch moves it to a new commit. Test files take the fixture `hub`,
which points huggingface_hub and datasets at it, with `pytest_plugins = ['hub']`; `hub.environment`
does that for a process of its own. Redirects, headers and error codes are those that
huggingface_hub reads (file_download.py and utils/_http.py). Files are stored as LFS objects behind
plain HTTP: Xet is a protocol of its own, without which no X-Xet-Hash is sent and every client falls
back to HTTP.
"""

import functools
import hashlib
import http.server
import json
import threading
import time
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

LARGE = ('.safetensors', '.parquet', '.bin', '.gz', '.zst')  # stored as LFS objects
TOKEN = 'hf_of_a_user'
LONG_AGO = '2024-01-01T00:00:00.000Z'


class Hub:
    """The repositories and what a test may change about them, and the server."""

    def __init__(self):
        # 'models/owner/name' or 'datasets/owner/name' -> branch -> file -> content
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.renamed: dict[str, str] = {}  # former name -> present name
        self.private: set[str] = set()  # need the token
        self.gated: dict[str, set[str]] = {}  # repository -> tokens with access
        self.trouble: dict[str, list] = {}  # file -> what happens at each attempt to fetch it
        self.limited: str | None = None  # answer 429 to everything, with this Retry-After
        self.requests: list[str] = []  # 'GET /path'
        self.log: list[str] = []  # names of the files fetched, once per attempt
        self.ranges: list[tuple[str, int]] = []  # (file, first byte) of these attempts
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}  # (repository, commit) -> files

    def __enter__(self):
        handler = functools.partial(Handler, self)
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.server.handle_error = lambda *_: None  # of a client that was killed
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, home) -> dict[str, str]:
        """The variables with which another process uses this hub. home: its cache."""
        return {
            'HF_ENDPOINT': self.url,
            'HF_HOME': str(home),
            'HF_HUB_OFFLINE': '0',
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'NO_PROXY': '*',
        }

    def commit(self, repository: str, revision: str) -> str | None:
        """The commit of a branch or of itself; None if there is none."""
        branches = self.repositories[repository]
        if revision in branches:
            files = branches[revision]
            content = b''.join(name.encode() + sha1(files[name]) for name in sorted(files))
            commit = hashlib.sha1(revision.encode() + content).hexdigest()
            self.commits.setdefault((repository, commit), dict(files))
            return commit
        for branch in branches:
            self.commit(repository, branch)
        return revision if (repository, revision) in self.commits else None


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def __init__(self, hub: Hub, *args):
        self.hub = hub
        super().__init__(*args)

    def do_HEAD(self):
        self.answer()

    do_GET = do_POST = do_HEAD

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.hub.requests.append(f'{self.command} {self.path}')
        path = [unquote(piece) for piece in urlsplit(self.path).path.strip('/').split('/')]
        if self.hub.limited is not None:
            self.reply(429, {'Retry-After': self.hub.limited})
        elif path[0] == 'cdn':
            self.send_file('/'.join(path[1:4]), path[4], '/'.join(path[5:]))
        elif path[:2] == ['api', 'resolve-cache']:
            self.send_file('/'.join(path[2:5]), path[5], '/'.join(path[6:]))
        elif path[:2] in (['api', 'models'], ['api', 'datasets']):
            self.describe(path)
        elif 'resolve' in path:
            self.resolve(path)
        else:
            self.reply(404)

    # --- who may read what

    def find(self, name: str, former: str, content: bool = False) -> str | None:
        """The repository of a name, or None after an answer that says why not.

        former: the piece of the address to replace if the repository was renamed.
        content: for a file, not a list of them, which a gated repository shows to all.
        """
        hub, token = self.hub, (self.headers.get('Authorization') or '').removeprefix('Bearer ')
        if token not in ('', TOKEN):
            wrong = {'X-Error-Message': 'Invalid credentials in Authorization header'}
            return self.reply(401, wrong)
        if name in hub.renamed:
            new = hub.renamed[name].partition('/')[2]
            return self.reply(307, {'Location': self.path.replace(former, new, 1)})
        if name not in hub.repositories or (name in hub.private and not token):
            return self.reply(404 if token else 401, {'X-Error-Code': 'RepoNotFound'})
        if content and name in hub.gated and token not in hub.gated[name]:
            return self.reply(403 if token else 401, {'X-Error-Code': 'GatedRepo'})
        return name

    # --- lists of files

    def describe(self, path: list[str]) -> None:
        """/api/KIND/OWNER/NAME[/revision/R | /tree/R[/FOLDER] | /paths-info/R]

        A name without an owner, as gpt2 had, is only known as a former one.
        """
        verbs = [at for at, piece in enumerate(path) if piece in ('revision', 'tree', 'paths-info')]
        at = verbs[0] if verbs else len(path)
        former = '/'.join(path[2:at])
        repository = self.find('/'.join(path[1:at]), former)
        if repository is None:
            return
        revision = path[at + 1] if at + 1 < len(path) else 'main'
        commit = self.hub.commit(repository, revision)
        if commit is None:
            self.reply(404, {'X-Error-Code': 'RevisionNotFound'})
            return
        files = self.hub.commits[repository, commit]
        entries = {name: entry(name, content) for name, content in sorted(files.items())}
        verb = path[at] if verbs else 'revision'
        if verb == 'tree':
            found = self.tree(entries, '/'.join(path[at + 2 :]))
            if found is None:
                self.reply(404, {'X-Error-Code': 'EntryNotFound'})
                return
        elif verb == 'paths-info':
            wanted = parse_qs(self.body.decode()).get('paths', [])
            all_entries = entries | folders(entries)
            found = [all_entries[name] for name in wanted if name in all_entries]
        else:
            found = {
                'id': former, 'sha': commit, 'private': repository in self.hub.private,
                'gated': 'manual' if repository in self.hub.gated else False, 'disabled': False,
                'lastModified': LONG_AGO, 'createdAt': LONG_AGO, 'tags': [], 'downloads': 0,
                'likes': 0, 'siblings': [*entries.values()],
            }  # fmt: skip
        self.reply(200, {'Content-Type': 'application/json'}, json.dumps(found).encode())

    def tree(self, entries: dict, folder: str) -> list[dict] | None:
        prefix = f'{folder}/' if folder else ''
        all_entries = entries | folders(entries)
        found = {name: each for name, each in all_entries.items() if name.startswith(prefix)}
        if folder and not found:
            return None
        recursive = parse_qs(urlsplit(self.path).query).get('recursive', ['false'])[0]
        if recursive.lower() != 'true':
            found = {name: e for name, e in found.items() if '/' not in name[len(prefix) :]}
        return [*found.values()]

    # --- files

    def resolve(self, path: list[str]) -> None:
        """/[datasets/]OWNER/NAME/resolve/R/FILE: a redirect that has a file's hash and size."""
        at = path.index('resolve')
        kind = 'datasets' if path[0] == 'datasets' else 'models'
        former = '/'.join(path[kind == 'datasets' : at])
        repository = self.find(f'{kind}/{former}', former, content=True)
        if repository is None:
            return
        commit = self.hub.commit(repository, path[at + 1])
        if commit is None:
            self.reply(404, {'X-Error-Code': 'RevisionNotFound'})
            return
        name = '/'.join(path[at + 2 :])
        files, head = self.hub.commits[repository, commit], {'X-Repo-Commit': commit}
        if name not in files:
            self.reply(404, head | {'X-Error-Code': 'EntryNotFound'})
            return
        where = quote(f'{repository}/{commit}/{name}')
        if is_large(name):  # on another host, which must not get the token
            head |= {'X-Linked-Etag': f'"{sha256(files[name])}"'}
            head |= {'X-Linked-Size': str(len(files[name]))}
            head['Location'] = f'http://localhost:{self.server.server_port}/cdn/{where}'
            self.reply(302, head)
        else:
            self.reply(307, head | {'Location': f'/api/resolve-cache/{where}'})

    def send_file(self, repository: str, commit: str, name: str) -> None:
        content = self.hub.commits[repository, commit][name]
        wanted = (self.headers.get('Range') or 'bytes=0-').removeprefix('bytes=')
        begin, last = (int(number) if number else None for number in wanted.split('-'))
        end = len(content) if last is None else min(last + 1, len(content))
        headers = {'ETag': f'"{etag(name, content)}"', 'Accept-Ranges': 'bytes'}
        headers['X-Repo-Commit'] = commit
        if self.command == 'HEAD':
            self.reply(200, headers | {'Content-Length': str(len(content))})
            return
        if is_large(name) and self.headers.get('Authorization'):
            self.reply(400, {'X-Error-Message': 'a token was sent to another host'})
            return
        self.hub.log.append(name.rsplit('/', 1)[-1])
        self.hub.ranges.append((self.hub.log[-1], begin))
        troubles = self.hub.trouble.get(self.hub.log[-1], [])
        trouble = troubles.pop(0) if troubles else None
        if trouble == 'fail':
            self.reply(503)
            return
        if begin >= len(content) > 0:
            self.reply(416, {'Content-Range': f'bytes */{len(content)}'})
            return
        if self.headers.get('Range'):
            headers['Content-Range'] = f'bytes {begin}-{end - 1}/{len(content)}'
        headers['Content-Length'] = str(end - begin)
        self.reply(206 if self.headers.get('Range') else 200, headers)
        half = begin + (end - begin) // 2
        self.wfile.write(content[begin:half])
        if callable(trouble):
            trouble()
        if trouble == 'cut':
            self.close_connection = True
        else:
            self.wfile.write(content[half:end])

    def reply(self, status: int, headers: dict | None = None, body: bytes = b'') -> None:
        self.send_response(status)
        for key, value in {'Content-Length': str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command != 'HEAD':
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def is_large(name: str) -> bool:
    return name.endswith(LARGE)


def sha1(content: bytes) -> bytes:
    return hashlib.sha1(content).hexdigest().encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def pointer(content: bytes) -> bytes:
    """What git stores instead of a large file (Git LFS's pointer file)."""
    version = 'version https://git-lfs.github.com/spec/v1'
    return f'{version}\noid sha256:{sha256(content)}\nsize {len(content)}\n'.encode()


def blob_id(name: str, content: bytes) -> str:
    """The name that git gives a file."""
    stored = pointer(content) if is_large(name) else content
    return hashlib.sha1(b'blob %d\0' % len(stored) + stored).hexdigest()


def etag(name: str, content: bytes) -> str:
    return sha256(content) if is_large(name) else blob_id(name, content)


def entry(name: str, content: bytes) -> dict:
    """A file, in lists of all three kinds."""
    found = {'type': 'file', 'path': name, 'rfilename': name, 'size': len(content)}
    found['oid'] = found['blobId'] = blob_id(name, content)
    if is_large(name):
        digest, size = sha256(content), len(pointer(content))
        found['lfs'] = {'oid': digest, 'sha256': digest, 'size': len(content), 'pointerSize': size}
    return found


def folders(entries: dict) -> dict[str, dict]:
    """The folders of these files."""
    pieces = [name.split('/')[:-1] for name in entries]
    names = {'/'.join(piece[: i + 1]) for piece in pieces for i in range(len(piece))}
    return {
        name: {'type': 'directory', 'path': name, 'oid': sha1(name.encode()).decode(), 'size': 0}
        for name in sorted(names)
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that huggingface_hub and datasets of this process use, without a wait to retry."""
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.setenv('NO_PROXY', '*')
    for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    with Hub() as hub:
        template = hub.url + '/{repo_id}/resolve/{revision}/{filename}'
        monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        yield hub
