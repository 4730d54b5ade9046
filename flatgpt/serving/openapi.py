"""
The OpenAPI document, which spectree makes of the routes that are declared with `api`, and its page.

    @routes.post('/tokenize')
    @api.validate(resp=Answers(TokenizeResponse, *BODY_ERRORS), security=KEY)
    def tokenize(json: TokenizeRequest):
        '''The token ids of a text.'''

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
from flatgpt.serving.middleware import read
from flatgpt.serving.schema import ErrorResponse

KEY = [{}, {'key': []}]  # the security of a route that needs the server's key, if it has one
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
    """Reads bodies by our read(), and leaves answers alone: spectree's would use up a stream."""

    def validate(self, view, query, body, *others, **path):
        return view(**path, **({'json': read(body)} if body else {}))

    def get_func_operation_id(self, func, path, method):
        return func.__name__


class Answers(Response):
    """What a route answers: a model, or an example of another media type, and errors.

    stream: whether the model's last example may come as server-sent events.
    """

    def __init__(self, model: type[BaseModel] | None, *errors: int, stream=False, other=None):
        super().__init__(HTTP_200=model, **{f'HTTP_{each}': ErrorResponse for each in errors})
        self.other = other or {}
        if stream:
            example = json.dumps(model.model_config['json_schema_extra']['examples'][-1])
            self.other['text/event-stream'] = f'data: {example}\n\ndata: [DONE]\n\n'

    def add_model(self, *args, **options):
        """Nothing: spectree would have each route answer 422."""

    def generate_spec(self, *args):
        spec = super().generate_spec(*args)
        for status, answer in spec.items():
            if status != '200':
                example = error_body(int(status), *ERRORS[int(status)][1:])
                answer['content']['application/json']['example'] = example
        other = {kind: {'example': example} for kind, example in self.other.items()}
        spec['200']['content'] = spec['200'].get('content', {}) | other
        if '429' in spec:
            after = {'description': 'Seconds to wait.', 'schema': {'type': 'integer'}}
            spec['429']['headers'] = {'Retry-After': after}
        return spec


api = SpecTree(
    backend=Backend,
    mode='strict',  # only routes that are declared
    title='flatGPT',
    version='1',
    description='Completions as OpenAI has them, by a model of your own.',
    security_schemes=[SecurityScheme('key', SecuritySchemeData('http', scheme='bearer'))],
    naming_strategy=lambda model: model.__name__,
    nested_naming_strategy=lambda parent, child: child,
)


def document(app: flask.Flask, title: str) -> dict:
    """The OpenAPI document of an application's routes."""
    with app.app_context():
        return api.spec | {'info': api.spec['info'] | {'title': title}}
