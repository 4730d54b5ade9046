"""
What surrounds every request of api.py: its id, API key, body, errors and log line.

    app.extensions |= {'flatgpt': service, 'origins': origins}
    app.register_blueprint(blueprint)
    body = read_body(CompletionRequest)                  # in a request; or an APIError
"""

import hmac
import re
import secrets
import time

import flask
from pydantic import ValidationError
from werkzeug.exceptions import HTTPException

from flatgpt.errors import did_you_mean
from flatgpt.files import strict_json
from flatgpt.serving.api_error import APIError
from flatgpt.serving.job import LOG
from flatgpt.serving.origins import Origins, is_preflight
from flatgpt.serving.service import Service, api_key_of
from flatgpt.serving.unsupported import Body, Unsupported
from flatgpt.serving.validation import SEE_DOCS, TOO_DEEP, first_error

PATHS = {'prompt': '/v1/completions', 'messages': '/v1/chat/completions'}  # of these fields
blueprint = flask.Blueprint('middleware', __name__)


def current_service() -> Service:
    return flask.current_app.extensions['flatgpt']


def current_origins() -> Origins:
    return flask.current_app.extensions['origins']


def read_body(model: type[Body]) -> Body:
    """The validated body of this HTTP request, or an APIError.

    It is parsed twice. Python's parser detects duplicate keys. Pydantic's rejects lone surrogates
    and invalid UTF-8, and distinguishes 1 from 1.0 and true.
    """
    check_headers()
    data = flask.request.get_data(cache=False)
    try:
        content = strict_json(data)
    except (ValueError, RecursionError) as error:
        raise APIError(400, json_error(error)) from None
    # before pydantic, which would make an error object for each of very many unknown fields
    for name in content if isinstance(content, dict) else ():
        if name not in model.model_fields:
            name = name[:99]
            if issubclass(model, Unsupported) and name in PATHS:
                message = f'{name}: is a field of {PATHS[name]}; send the request there, or omit it'
                raise APIError(400, message, name)
            near = did_you_mean(name, model.model_fields.keys() - Unsupported.model_fields.keys())
            raise APIError(400, f'{name}: no such field; {near or SEE_DOCS}'.strip(), name)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise APIError(400, *first_error(error)) from None


def check_headers() -> None:
    """APIError for a body that is not plain JSON, or a field in the URL."""
    request = flask.request
    if request.mimetype != 'application/json':
        raise APIError(415, 'send JSON, with the header "Content-Type: application/json"')
    charset = request.mimetype_params.get('charset', 'utf-8')
    if charset.lower() not in ('utf-8', 'utf8', 'us-ascii'):
        raise APIError(415, f'Content-Type: charset={charset} is not supported; send UTF-8')
    encoding = request.headers.get('Content-Encoding', 'identity')
    if encoding.lower() != 'identity':
        message = f'Content-Encoding: {encoding} is not supported; send the JSON uncompressed'
        raise APIError(415, message)
    for name in request.args.keys() - {'api-version'}:  # clients of Azure add that one
        raise APIError(400, f'{name}: put fields into the JSON body, not into the URL', name)


def json_error(error: Exception) -> str:
    """The message for a body that Python's JSON parser rejects."""
    if isinstance(error, RecursionError):
        return f'the body: {TOO_DEEP}'
    if 'set_int_max_str_digits' in str(error):  # Python advises to change its limit
        return 'the body: has a number of too many digits; send a shorter one'
    return f'the body: {error}; send valid JSON in UTF-8'


# -----------------------------------------------------------------------------
# before and after


@blueprint.before_app_request
def before_request():
    """Give the request an id, and check its origin and its API key."""
    g, headers = flask.g, flask.request.headers
    given = headers.get('X-Request-Id', '')
    g.id = given if re.fullmatch(r'[\w.-]{1,64}', given, re.ASCII) else secrets.token_hex(12)
    g.began, g.job, g.code = time.monotonic(), None, None
    current_origins().check(headers.get('Origin'), headers.get('Host'))
    if is_preflight(flask.request.method, headers.get):
        return flask.Response()  # a preflight has no key; after_request() adds the CORS headers
    guarded = flask.request.path.startswith(('/v1/', '/tokenize', '/detokenize', '/reload'))
    key = api_key_of(current_service().settings)
    sent = re.sub('(?i)^bearer +', '', headers.get('Authorization', ''))
    if key and guarded and not hmac.compare_digest(sent.encode('latin-1', 'replace'), key.encode()):
        problem = 'wrong API key' if sent else 'the API key is missing'
        message = f'{problem}; send this server\'s key in the header "Authorization: Bearer KEY"'
        challenge = {'WWW-Authenticate': 'Bearer'}
        raise APIError(401, message, code='invalid_api_key', headers=challenge)
    return None


@blueprint.after_app_request
def after_request(response: flask.Response):
    """Add the common headers, and log the request when its response has been sent."""
    g, request, with_text = flask.g, flask.request, current_service().settings['log_prompts']
    response.direct_passthrough = False  # which would never be closed
    response.headers['X-Request-Id'] = g.id
    response.headers['X-Content-Type-Options'] = 'nosniff'
    response.headers['Content-Security-Policy'] = "default-src 'self' 'unsafe-inline' data:"
    response.headers.update(current_origins().response_headers(request.headers.get))
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
        fields = line | took | (job.log_fields(with_text) if job else {})
        LOG.info('request', extra={'fields': fields})

    return response


# -----------------------------------------------------------------------------
# errors


@blueprint.app_errorhandler(APIError)
def error_response(error: APIError):
    current_service().metrics.rejected.labels(error.status).inc()
    flask.g.code = error.code  # for the log
    return error.body, error.status, error.headers


@blueprint.app_errorhandler(HTTPException)
def http_error_response(error: HTTPException):
    """The response to what werkzeug rejects, such as an unknown path."""
    path, method = flask.request.path, flask.request.method
    allow = {name: value for name, value in error.get_headers() if name == 'Allow'}
    methods = ' or '.join(sorted(set(allow.get('Allow', '').split(', ')) - {'HEAD', 'OPTIONS'}))
    max_body = current_service().settings['max_body']
    messages = {
        404: f'{path} does not exist; /docs lists the paths',
        405: f'{path} does not accept {method}; use {methods}',
        413: f'the body is larger than {max_body:g} MiB, the limit of this server; send less',
    }
    message = messages.get(error.code, error.description)
    return error_response(APIError(error.code, message, headers=allow))


@blueprint.app_errorhandler(Exception)
def unexpected_error_response(error: Exception):
    LOG.error('%s %s', flask.request.method, flask.request.path, exc_info=error)
    return error_response(APIError(500, 'internal error; the server log has the traceback'))
