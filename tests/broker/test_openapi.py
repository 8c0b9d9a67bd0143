"""The description is that of the routes, and of what they do."""

import jsonschema

from broker.http import client_routes
from broker.openapi import OPERATIONS, document
from broker.routes.admin import operator_routes
from broker.routes.dashboard import dashboard_routes
from tests.broker.rig import open_rig


async def test_every_route_is_described_and_nothing_else():
    async with open_rig() as rig:
        routes = [*dashboard_routes(), *client_routes(rig.port), *operator_routes(rig.port)]
        served = {
            (method, route.path.replace(":path", ""))
            for route in routes
            for method in route.methods - {"HEAD"}
        }
    described = [(operation.method, operation.path) for operation in OPERATIONS]
    assert len(described) == len(set(described))
    assert set(described) == served


async def test_it_is_served_with_a_key_and_its_schemas_are_schemas():
    async with open_rig("auth.keys=['k']") as rig:
        assert (await rig.browser().request("GET", "/openapi.json")).status == 401
        answer = await rig.browser().request("GET", "/openapi.json", x_api_key="k")
    assert answer.json["openapi"].startswith("3.1")
    bodies = [operation.body for operation in OPERATIONS if operation.body is not None]
    for body in bodies:
        jsonschema.Draft202012Validator.check_schema(body)


async def test_every_operations_refusal_has_the_shape_that_is_described():
    told = document("0")["paths"]
    async with open_rig("auth.keys=['k']") as rig:
        for operation in OPERATIONS:
            path = operation.path.replace("{", "").replace("}", "")
            answer = await rig.browser().request("PATCH", path, x_api_key="k")
            assert answer.status == 405, path
            described = told[operation.path][operation.method.lower()]["responses"]["default"]
            schema = described["content"]["application/json"]["schema"]
            jsonschema.validate(answer.json, schema)
