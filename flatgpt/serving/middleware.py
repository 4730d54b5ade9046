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
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import HTTPException

from flatgpt.serving.api_error import APIError
from flatgpt.serving.service import Service, key_of

LOG = logging.getLogger('flatgpt')
blueprint = flask.Blueprint('middleware', __name__)


def current_service() -> Service:
    return flask.current_app.extensions['flatgpt']


def read(model: type[BaseModel]) -> BaseModel:
    """The body of this HTTP request, checked.

    By pydantic's own parser, which answers any bytes with an error; json.loads, and so Flask's
    request.json, fails on deep nesting with a RecursionError and lets lone surrogates through.
    """
    if flask.request.mimetype != 'application/json':
        raise APIError(415, 'send JSON, with the header "Content-Type: application/json"')
    try:
        return model.model_validate_json(flask.request.get_data(cache=False))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message, param = first['msg'], '.'.join(map(str, first['loc'][:1])) or None
    if param == 'prompt' and first['type'] != 'missing':
        message = 'must be a text, token ids, or a list of either, none of them empty'
    raise APIError(400, f'{param or "the body"}: {message}', param)


# -----------------------------------------------------------------------------
# before and after


@blueprint.before_app_request
def enter():
    """Name the request, and let it in if it needs no key or has it."""
    g, headers = flask.g, flask.request.headers
    given = headers.get('X-Request-Id', '')
    g.id = given if re.fullmatch(r'[\w.-]{1,64}', given, re.ASCII) else secrets.token_hex(12)
    g.began, g.job, g.code = time.monotonic(), None, None
    guarded = flask.request.path.startswith(('/v1/', '/tokenize', '/detokenize'))
    key = key_of(current_service().settings)
    sent = headers.get('Authorization', '').removeprefix('Bearer ')
    if key and guarded and not hmac.compare_digest(sent.encode('latin-1', 'replace'), key.encode()):
        message = 'send the key of this server, as in "Authorization: Bearer KEY"'
        challenge = {'WWW-Authenticate': 'Bearer'}
        raise APIError(401, message, code='invalid_api_key', headers=challenge)


@blueprint.after_app_request
def leave(response: flask.Response):
    """Add the headers that every answer has, and have it logged when it is sent."""
    g, request, with_text = flask.g, flask.request, current_service().settings['log_prompts']
    response.direct_passthrough = False  # which would never be closed
    response.headers['X-Request-Id'] = g.id
    response.headers['X-Content-Type-Options'] = 'nosniff'
    response.headers['Content-Security-Policy'] = "default-src 'self' 'unsafe-inline' data:"
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
