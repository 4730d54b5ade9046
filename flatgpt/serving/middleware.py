"""
Around every request of api.py: its id, its key, its body, its errors, its line in the log.

    app.register_blueprint(middleware.blueprint)
    body = read(CompletionRequest)                       # in a route; or an APIError
"""

import hmac
import logging
import re
import secrets
import time

import flask
from pydantic import ValidationError
from werkzeug.exceptions import HTTPException

from flatgpt.errors import did_you_mean
from flatgpt.files import strict_json
from flatgpt.serving.api_error import APIError
from flatgpt.serving.origins import Origins
from flatgpt.serving.service import Service, key_of
from flatgpt.serving.unsupported import Body, Unsupported

LOG = logging.getLogger('flatgpt')
LISTED = '/docs lists them'
blueprint = flask.Blueprint('middleware', __name__)


def current_service() -> Service:
    return flask.current_app.extensions['flatgpt']


def current_origins() -> Origins:
    return flask.current_app.extensions['origins']


def read(model: type[Body]) -> Body:
    """The body of this HTTP request, checked.

    Two parsers must agree on it: Python's finds a name that stands twice, pydantic's refuses lone
    surrogates and whatever is not UTF-8, and tells 1 from 1.0 and true.
    """
    check_headers()
    data = flask.request.get_data(cache=False)
    try:
        content = strict_json(data)
    except (ValueError, RecursionError) as error:
        raise APIError(400, f'the body: {error}') from None
    # first, since pydantic has an error for each of them, of which there may be very many
    for name in content if isinstance(content, dict) else ():
        if name not in model.model_fields:
            name = name[:99]
            near = did_you_mean(name, model.model_fields.keys() - Unsupported.model_fields.keys())
            raise APIError(400, f'{name}: no such field; {near or LISTED}'.strip(), name)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise APIError(400, *explain(first)) from None


def check_headers() -> None:
    """APIError for a body that is not plain JSON, or a field that is not in it."""
    request = flask.request
    if request.mimetype != 'application/json':
        raise APIError(415, 'send JSON, with the header "Content-Type: application/json"')
    charset = request.mimetype_params.get('charset', 'utf-8')
    if charset.lower() not in ('utf-8', 'utf8', 'us-ascii'):
        raise APIError(415, f'Content-Type: charset={charset} is not read; send UTF-8')
    coding = request.headers.get('Content-Encoding', 'identity')
    if coding.lower() != 'identity':
        raise APIError(415, f'Content-Encoding: {coding} is not read; send the JSON as it is')
    for name in request.args.keys() - {'api-version'}:  # which Azure's clients add
        raise APIError(400, f'{name}: fields go into the JSON body, not into the address', name)


def explain(error: dict) -> tuple[str, str | None]:
    """What is wrong, by pydantic's error, and the field's name."""
    (param, *inner), message = error['loc'] or (None,), error['msg']
    if param == 'prompt' and error['type'] != 'missing':
        message = 'must be a text, token ids, or a list of either, none of them empty'
    if error['type'] == 'extra_forbidden':
        message = f'no such field; {LISTED}'
    # within other fields, pydantic's path has names of types, too
    path = inner if param in ('messages', 'stream_options') else ()
    where = ''.join(f'[{each}]' if isinstance(each, int) else f'.{each[:99]}' for each in path)
    return f'{param or "the body"}{where}: {message}', param


# -----------------------------------------------------------------------------
# before and after


@blueprint.before_app_request
def enter():
    """Name the request, and let it in if it needs no key or has it, from a page that may."""
    g, headers = flask.g, flask.request.headers
    given = headers.get('X-Request-Id', '')
    g.id = given if re.fullmatch(r'[\w.-]{1,64}', given, re.ASCII) else secrets.token_hex(12)
    g.began, g.job, g.code = time.monotonic(), None, None
    current_origins().check(headers.get('Origin'), headers.get('Host'))
    if 'Access-Control-Request-Method' in headers and flask.request.method == 'OPTIONS':
        return flask.Response()  # a preflight, which brings no key; leave() says what it asks
    guarded = flask.request.path.startswith(('/v1/', '/tokenize', '/detokenize'))
    key = key_of(current_service().settings)
    sent = re.sub('(?i)^bearer +', '', headers.get('Authorization', ''))
    if key and guarded and not hmac.compare_digest(sent.encode('latin-1', 'replace'), key.encode()):
        message = 'send the key of this server, as in "Authorization: Bearer KEY"'
        challenge = {'WWW-Authenticate': 'Bearer'}
        raise APIError(401, message, code='invalid_api_key', headers=challenge)
    return None


@blueprint.after_app_request
def leave(response: flask.Response):
    """Add the headers that every answer has, and have it logged when it is sent."""
    g, request, with_text = flask.g, flask.request, current_service().settings['log_prompts']
    response.direct_passthrough = False  # which would never be closed
    response.headers['X-Request-Id'] = g.id
    response.headers['X-Content-Type-Options'] = 'nosniff'
    response.headers['Content-Security-Policy'] = "default-src 'self' 'unsafe-inline' data:"
    wanted = None
    if 'Access-Control-Request-Method' in request.headers:
        wanted = request.headers.get('Access-Control-Request-Headers', '')
    response.headers.update(current_origins().headers(request.headers.get('Origin'), wanted))
    line = {
        'id': g.id,
        'client': request.remote_addr,
        'method': request.method,
        'path': request.path,
        'status': response.status_code,
        **({'code': g.code} if g.code else {}),
    }

    @response.call_on_close
    def write_line(job=g.job, began=g.began):
        took = {'seconds': round(time.monotonic() - began, 4)}
        fields = line | took | (job.record(with_text) if job else {})
        LOG.info('request', extra={'fields': fields})

    return response


# -----------------------------------------------------------------------------
# errors


@blueprint.app_errorhandler(APIError)
def answer_error(error: APIError):
    current_service().metrics.rejected.labels(error.status).inc()
    flask.g.code = error.code  # for the log
    return error.body, error.status, error.headers


@blueprint.app_errorhandler(HTTPException)
def answer_http_error(error: HTTPException):
    said = {
        404: f'there is no {flask.request.path}; /docs shows what there is',
        405: f'{flask.request.path} does not take {flask.request.method}',
        413: f'the body has more than {current_service().settings["max_body"]:g} MiB',
    }
    allow = {name: value for name, value in error.get_headers() if name == 'Allow'}
    message = said.get(error.code, error.description)
    return answer_error(APIError(error.code, message, headers=allow))


@blueprint.app_errorhandler(Exception)
def answer_unforeseen(error: Exception):
    LOG.error('%s %s', flask.request.method, flask.request.path, exc_info=error)
    return answer_error(APIError(500, 'this should not have happened; the log has the details'))
