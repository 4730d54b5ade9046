"""Errors that clients of the server get, in the format of OpenAI's API."""

ERRORS = {  # status: type, and an example's message, param and code
    400: ('invalid_request_error', 'n: must be a whole number, not 1.5', 'n', None),
    401: ('authentication_error', 'the API key is missing', None, 'invalid_api_key'),
    403: ('permission_error', 'pages of X may not use this server', None, 'origin_not_allowed'),
    404: ('not_found_error', "model 'other' does not exist; use 'mine'", 'model', None),
    405: ('invalid_request_error', '/tokenize does not accept GET; use POST', None, None),
    413: ('invalid_request_error', 'the body is larger than 4 MiB; send less', None, None),
    415: ('invalid_request_error', 'send JSON, with Content-Type: application/json', None, None),
    429: ('rate_limit_error', '136 completions are running or queued', None, 'queue_full'),
    500: ('server_error', 'the engine failed; see the server log', None, 'engine_stopped'),
    503: ('service_unavailable', 'the server is shutting down', None, 'draining'),
    504: ('timeout_error', 'the request took longer than 600 seconds', None, 'timeout'),
}


def error_body(status: int, message: str, param=None, code=None) -> dict:
    kind = ERRORS.get(status, ERRORS[400])[0]
    return {'error': {'message': message, 'type': kind, 'param': param, 'code': code}}


class APIError(Exception):
    """An error response: its status, its body and its headers."""

    def __init__(self, status: int, message: str, param=None, code=None, headers=()):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers)
        self.body = error_body(status, message, param, code)


def shutting_down(headers=()) -> APIError:
    message = 'the server is shutting down; try again after its restart'
    return APIError(503, message, code='draining', headers=headers)
