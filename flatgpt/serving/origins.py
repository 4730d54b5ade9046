"""
Which pages of other addresses may use this server from a browser (CORS).

    origins = Origins(settings)                          # ConfigError for what is no origin
    headers = origins.headers('http://localhost:3000')   # of an answer to such a page

With a key every page may, since a browser adds no key by itself: who has it may use it anywhere.
Without one only pages of this machine may: a stranger's page would reach a server on loopback
through the browser of whoever opens it. Such a page is refused by its Origin, which a browser
sends with every POST. Where the page's own name was made to lead here (DNS rebinding), it sends
none with a GET; what it cannot change is the Host, its own name, and that is refused as well.
"""

import re

from flatgpt.errors import ConfigError
from flatgpt.serving.api_error import APIError
from flatgpt.serving.service import key_of

HERE = 'http://localhost:*,http://127.0.0.1:*,http://[::1]:*'
HERE += ',' + HERE.replace('http:', 'https:')
LOCAL = ('localhost', '127.0.0.1', '[::1]')
READABLE = 'X-Request-Id, Retry-After, X-Should-Retry'  # headers that a page may look at


class Origins:
    """The pages that settings['allow_origins'] lists with commas: '*', or those at scheme://host,
    with :port where it is not the scheme's, or :* for any. None: as above. settings['host'] is
    what it listens at; without one another server does, and whose names those are is unknown."""

    def __init__(self, settings: dict):
        self.keyless, given = not key_of(settings), settings['allow_origins']
        self.host = settings.get('host')
        if given is None:
            given = HERE if self.keyless else '*'
        self.allowed = [each.strip().lower() for each in given.split(',') if each.strip()]
        for each in self.allowed:
            if not re.fullmatch(r'\*|null|[a-z][a-z0-9+.-]*://[^\s/?#*@]+(:\*)?', each):
                raise ConfigError(
                    f'allow_origins: {each!r} is no origin; give scheme://host, or with :port or '
                    ':*, without a path; several with commas, or * for all'
                )

    def allows(self, origin: str) -> bool:
        origin = origin.lower()
        without_port = re.sub(r':\d+$', '', origin)
        return bool({'*', origin, f'{without_port}:*'} & {*self.allowed})

    def headers(self, origin: str | None, wanted: str | None = None) -> dict[str, str]:
        """Headers of an answer to a page; wanted: those it asks to send, if this is a preflight."""
        if '*' not in self.allowed and not (origin and self.allows(origin)):
            return {'Vary': 'Origin'}
        if '*' in self.allowed:
            headers = {'Access-Control-Allow-Origin': '*'}
        else:
            headers = {'Access-Control-Allow-Origin': origin, 'Vary': 'Origin'}
        if wanted is None:
            return headers | {'Access-Control-Expose-Headers': READABLE}
        return headers | {
            'Access-Control-Allow-Methods': 'GET, POST',
            'Access-Control-Allow-Headers': wanted,
            'Access-Control-Max-Age': '600',
        }

    def knows(self, host: str) -> bool:
        """Whether a Host header has a name of this machine, or of a page that is allowed."""
        name = re.sub(r':\d+$', '', host.lower())
        if name in (*LOCAL, self.host.lower()):
            return True
        return any(self.allows(f'{scheme}://{host}') for scheme in ('http', 'https'))

    def check(self, origin: str | None, host: str | None = None) -> None:
        """APIError for a stranger's page, where no key keeps it out."""
        if self.keyless and self.host and host and not self.knows(host):
            message = (
                f'this server is not known as {host}; start it with '
                f'--allow_origins=http://{host} (or https://), or with a key (--api_key)'
            )
            raise APIError(403, message, code='host_not_allowed')
        if self.keyless and origin and not self.allows(origin):
            message = (
                f'pages of {origin} may not use this server; start it with '
                f'--allow_origins={origin}, or with a key (--api_key)'
            )
            raise APIError(403, message, code='origin_not_allowed')
