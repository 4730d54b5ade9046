"""
The OpenAPI document, which spectree generates from the routes declared with `api`, and its page.

    @routes.post('/tokenize')
    @api.validate(resp=Responses(TokenizeResponse, *BODY_ERRORS), security=KEY)
    def tokenize(json: TokenizeRequest):
        '''Encode a string to token ids.'''

A view's argument `json` is the body of the request, as its pydantic model.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import flask
from pydantic import BaseModel
from spectree import Response, SecurityScheme, SecuritySchemeData, SpecTree
from spectree.plugins.flask_plugin import FlaskPlugin

from flatgpt.serving.api_error import ERRORS, error_body
from flatgpt.serving.middleware import read_body
from flatgpt.serving.schema import ErrorResponse

KEY = [{}, {'key': []}]  # the security of a route that needs the server's API key, if it has one
ACCESS_ERRORS = (401, 403)
BODY_ERRORS = (400, *ACCESS_ERRORS, 413, 415)
ENGINE_ERRORS = (429, 500, 503, 504)
SWAGGER = Path(find_spec('flask_openapi3_swagger').origin).parent / 'templates' / 'swagger'
DOCS_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>flatGPT: API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
<body>
<div id="ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script>
SwaggerUIBundle({url: 'openapi.json', dom_id: '#ui', validatorUrl: null, deepLinking: true})
</script>
"""


class Backend(FlaskPlugin):
    """Reads bodies by read_body(), and does not validate responses, which would consume streams."""

    def validate(self, view, query, body, *others, **path):
        return view(**path, **({'json': read_body(body)} if body else {}))

    def get_func_operation_id(self, func, path, method):
        return func.__name__


class Responses(Response):
    """The responses of a route: a model or an example of another media type, and error statuses.

    stream: whether the model's last example may be sent as server-sent events.
    """

    def __init__(self, model: type[BaseModel] | None, *errors: int, stream=False, other=None):
        super().__init__(HTTP_200=model, **{f'HTTP_{each}': ErrorResponse for each in errors})
        self.other = other or {}
        if stream:
            example = json.dumps(model.model_config['json_schema_extra']['examples'][-1])
            self.other['text/event-stream'] = f'data: {example}\n\ndata: [DONE]\n\n'

    def add_model(self, *args, **options):
        """Do nothing: spectree would add a 422 to each route."""

    def generate_spec(self, *args):
        spec = super().generate_spec(*args)
        for status, response in spec.items():
            if status != '200':
                example = error_body(int(status), *ERRORS[int(status)][1:])
                response['content']['application/json']['example'] = example
        other = {kind: {'example': example} for kind, example in self.other.items()}
        spec['200']['content'] = spec['200'].get('content', {}) | other
        if '429' in spec:
            header = {'description': 'Seconds to wait.', 'schema': {'type': 'integer'}}
            spec['429']['headers'] = {'Retry-After': header}
        return spec


api = SpecTree(
    backend=Backend,
    mode='strict',  # only declared routes
    title='flatGPT',
    version='1',
    description="OpenAI's completions API, for your own model.",
    security_schemes=[SecurityScheme('key', SecuritySchemeData('http', scheme='bearer'))],
    naming_strategy=lambda model: model.__name__,
    nested_naming_strategy=lambda parent, child: child,
)


def document(app: flask.Flask, title: str) -> dict:
    """The OpenAPI document of an application's routes."""
    with app.app_context():
        return api.spec | {'info': api.spec['info'] | {'title': title}}
