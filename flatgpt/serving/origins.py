"""
Which pages of other addresses may use this server from a browser (CORS).

    origins = Origins(settings)                          # ConfigError for an invalid origin
    headers = origins.headers('http://localhost:3000')   # of a response to such a page

This protects a server without an API key from CSRF and DNS rebinding: any web page could reach a
server on loopback through the browser of whoever opens the page. So without a key only pages of
this machine may use it. Others are rejected by their Origin, which browsers send with every POST
(CSRF). A page can also point its own host name at this machine (DNS rebinding); browsers then send
no Origin with a GET, but the Host header still has that name, and is checked as well.
With an API key any page may: browsers send no key by themselves, so a page must have it.
"""

import re
from collections.abc import Callable

from flatgpt.errors import ConfigError
from flatgpt.serving.api_error import APIError
from flatgpt.serving.service import api_key_of

LOCAL_ORIGINS = 'http://localhost:*,http://127.0.0.1:*,http://[::1]:*'
LOCAL_ORIGINS += ',' + LOCAL_ORIGINS.replace('http:', 'https:')
LOCAL_HOSTS = ('localhost', '127.0.0.1', '[::1]')
PREFLIGHT_HEADER = 'Access-Control-Request-Method'  # an OPTIONS request with it is a preflight
EXPOSED_HEADERS = 'X-Request-Id, Retry-After, X-Should-Retry'  # that a page may read


class Origins:
    """The allowed origins.

    settings['allow_origins'] lists them with commas: '*', or scheme://host with :port if it is not
    the scheme's default, or with :* for any port. None: the default above. settings['host'] is the
    address of the server's own socket; None: another WSGI server listens, under unknown names.
    """

    def __init__(self, settings: dict):
        self.keyless, given = not api_key_of(settings), settings['allow_origins']
        self.host = settings.get('host')
        if given is None:
            given = LOCAL_ORIGINS if self.keyless else '*'
        self.allowed = [each.strip().lower() for each in given.split(',') if each.strip()]
        for each in self.allowed:
            if not re.fullmatch(r'\*|null|[a-z][a-z0-9+.-]*://[^\s/?#*@]+(:\*)?', each):
                raise ConfigError(
                    f'allow_origins: {each!r} is not an origin; give scheme://host, optionally '
                    'with :port or :*, without a path; separate several with commas; * allows all'
                )

    def allows(self, origin: str) -> bool:
        origin = origin.lower()
        without_port = re.sub(r':\d+$', '', origin)
        return bool({'*', origin, f'{without_port}:*'} & {*self.allowed})

    def headers(self, origin: str | None, wanted: str | None = None) -> dict[str, str]:
        """CORS headers of a response. wanted: for a preflight, the headers the page will send."""
        if '*' not in self.allowed and not (origin and self.allows(origin)):
            return {'Vary': 'Origin'}
        if '*' in self.allowed:
            headers = {'Access-Control-Allow-Origin': '*'}
        else:
            headers = {'Access-Control-Allow-Origin': origin, 'Vary': 'Origin'}
        if wanted is None:
            return headers | {'Access-Control-Expose-Headers': EXPOSED_HEADERS}
        return headers | {
            'Access-Control-Allow-Methods': 'GET, POST',
            'Access-Control-Allow-Headers': wanted,
            'Access-Control-Max-Age': '600',
        }

    def response_headers(self, header: Callable[[str], str | None]) -> dict[str, str]:
        """CORS headers of the response to a request. header: from a name to its value in it."""
        wanted = None
        if header(PREFLIGHT_HEADER) is not None:
            wanted = header('Access-Control-Request-Headers') or ''
        return self.headers(header('Origin'), wanted)

    def is_own_host(self, host: str) -> bool:
        """Whether a Host header has a name of this machine, or the configured one."""
        name = re.sub(r':\d+$', '', host.lower())
        return name in LOCAL_HOSTS or (self.host is not None and name == self.host.lower())

    def is_known_host(self, host: str) -> bool:
        """Whether a Host header has a name of this server, or of an allowed origin."""
        allowed = any(self.allows(f'{scheme}://{host}') for scheme in ('http', 'https'))
        return allowed or self.is_own_host(host)

    def is_own_page(self, origin: str, host: str | None) -> bool:
        """Whether this server's own playground sent a request: origin and host are the same."""
        return bool(host) and self.is_own_host(host) and origin.partition('://')[2] == host

    def check(self, origin: str | None, host: str | None = None) -> None:
        """APIError for a page of another origin that is not allowed, unless a key is needed."""
        if self.keyless and self.host and host and not self.is_known_host(host):
            message = (
                f'this server does not accept the host name {host}; start it with '
                f'--allow_origins=http://{host} (or https://), or with --api_key=KEY'
            )
            raise APIError(403, message, code='host_not_allowed')
        allowed = not origin or self.allows(origin) or self.is_own_page(origin, host)
        if self.keyless and not allowed:
            message = (
                f'pages of {origin} may not use this server; start it with '
                f'--allow_origins={origin}, or with --api_key=KEY'
            )
            raise APIError(403, message, code='origin_not_allowed')


def is_preflight(method: str, header: Callable[[str], str | None]) -> bool:
    """Whether a browser asks before it sends a page's request. header: see response_headers()."""
    return method == 'OPTIONS' and header(PREFLIGHT_HEADER) is not None
