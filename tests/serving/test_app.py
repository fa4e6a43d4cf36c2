"""Keys, health, numbers and the description of the routes."""

import json
from pathlib import Path

import jsonschema
import pytest
from live_server import live
from prometheus_client.parser import text_string_to_metric_families

from gram_jax.clients import reward_function
from gram_jax.errors import UserError

SCHEMA = json.loads((Path(__file__).parents[1] / "openapi_31_schema.json").read_text())
SCORE = "/gram/v1/score"
GOOD = {"prompt": "What is a list?", "responses": ["A sequence.", "No."]}


@pytest.fixture(scope="module")
def locked(make_scorer):
    with live(make_scorer(batch_rows=1), keys=("first", "sécond")) as found:
        yield found


def test_a_key_opens_and_nothing_else_does(locked):
    body = json.dumps(GOOD).encode()
    opens = [{"Authorization": "Bearer first"}, {"authorization": "bearer first"},
             {"X-API-Key": "first"}, {"X-API-Key": "sécond".encode()}]  # fmt: skip
    closed = [{}, {"Authorization": "first"}, {"Authorization": "Basic first"},
              {"Authorization": "Bearer firs"}, {"X-API-Key": "first2"},
              {"X-API-Key": ""}]  # fmt: skip
    for headers in opens:
        assert locked.request("POST", SCORE, body, headers)[0] == 200, headers
    for headers in closed:
        status, raw, sent = locked.request("POST", SCORE, body, headers)
        assert status == 401, headers
        assert json.loads(raw)["error"]["type"] == "unauthorized"
        assert sent["www-authenticate"] == "Bearer"
    for path in ("/gram/v1/model", "/metrics", "/nowhere"):
        assert locked.request("GET", path)[0] == 401
    for path in ("/", "/health", "/ready", "/docs", "/openapi.json", "/page/docs.css"):
        assert locked.request("GET", path)[0] == 200, path


def test_a_client_of_ours_sends_its_key_as_the_server_reads_it(locked):
    url = f"http://127.0.0.1:{locked.port}/"
    for key in ("first", "sécond", " first\n"):
        assert reward_function(url, api_key=key).kind == "likelihood"
    with pytest.raises(UserError, match="api_key: holds a line's end"):
        reward_function(url, api_key="fir\nst")


def test_browsers_may_load_nothing_from_elsewhere(likelihood):
    for path in ("/", "/docs", "/page/docs.css", "/health", "/nowhere"):
        headers = likelihood.request("GET", path)[2]
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"


def test_metrics_parse_and_count(make_scorer):
    with live(make_scorer(batch_rows=1)) as server:
        server.good(SCORE, GOOD)
        server.post(SCORE, {})
        server.good("/classify", {"input": "A list."})
        status, raw, headers = server.request("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(raw.decode())
        for sample in family.samples
    }
    route = ("route", SCORE)
    assert found["gram_requests_total", route, ("status", "200")] == 1
    assert found["gram_requests_total", route, ("status", "422")] == 1
    assert found["gram_request_seconds_count", route] == 1
    assert found["gram_sequences_total",] == 3
    assert found["gram_texts_without_prompt_total",] == 1
    assert found["gram_places_total",] >= found["gram_tokens_total",] > 0
    assert found["gram_ready",] == 1 and found["gram_waiting_tokens",] == 0
    assert found["process_resident_memory_bytes",] > 0


def test_the_description_is_valid_openapi(likelihood):
    described = json.loads(likelihood.request("GET", "/openapi.json")[1])
    jsonschema.Draft202012Validator(SCHEMA).validate(described)
    for schema in schemas(described):
        jsonschema.Draft202012Validator.check_schema(schema)
    from gram_jax.serving.app import ROUTES

    assert set(ROUTES) < set(described["paths"])


def schemas(described):
    for methods in described["paths"].values():
        for operation in methods.values():
            holders = list(operation["responses"].values())
            holders += [operation["requestBody"]] if "requestBody" in operation else []
            for holder in holders:
                for content in holder["content"].values():
                    yield content["schema"]


BODIES = {
    SCORE: [GOOD, {"items": [GOOD, {"prompt": "x", "response": "y"}], "tokens": True}],
    "/gram/v1/rank": [GOOD | {"top_n": 1}],
    "/gram/v1/compare": [{"prompt": "x", "a": "y", "b": "z", "tokens": True},
                         {"prompt": [{"role": "user", "content": "x"}], "a": "y", "b": "z"}],
    "/get_reward": [{"query": ["ab"], "prompts": ["a"], "labels": [None]}],
    "/classify": [{"input": ["a", "b"]}, {"input": "a"}],
    "/pooling": [{"input": [5, 6, 7]}],
    "/score": [{"text_1": "a", "text_2": ["b", "c"]}],
    "/v1/score": [{"queries": ["a"], "documents": ["b"]}],
    "/rerank": [{"query": "a", "documents": ["b", {"text": "c"}], "top_n": 0}],
    "/v1/rerank": [{"query": "a", "documents": ["b"], "return_documents": False}],
    "/v2/rerank": [{"query": "a", "documents": ["b"]}],
    "/generative_scoring": [{"query": "a", "items": ["b"], "label_token_ids": [5, 6]}],
}  # fmt: skip


def test_every_route_takes_and_gives_what_is_described(likelihood, judge):
    described = json.loads(likelihood.request("GET", "/openapi.json")[1])
    posts = {path for path, methods in described["paths"].items() if "post" in methods}
    assert posts == set(BODIES)
    for path, bodies in BODIES.items():
        operation = described["paths"][path]["post"]
        takes = operation["requestBody"]["content"]["application/json"]["schema"]
        for body in bodies:
            validate(body, takes, described)
            servers = [likelihood] if "tokens" in body or path.endswith("score") else []
            for server in servers or [likelihood, judge]:
                status, answer = server.post(path, body)
                content = operation["responses"][str(status)]["content"]
                validate(answer, content["application/json"]["schema"], described)
                assert status == 200 or server is judge, answer
    status, answer = likelihood.post(SCORE, {"prompt": "x"})
    validate(answer, described["components"]["schemas"]["Error"], described)
    model = described["paths"]["/gram/v1/model"]["get"]["responses"]["200"]["content"]
    answer = json.loads(likelihood.request("GET", "/gram/v1/model")[1])
    validate(answer, model["application/json"]["schema"], described)


def validate(value, schema, described):
    whole = {**schema, "components": described["components"]}
    jsonschema.Draft202012Validator(whole).validate(value)


def test_the_description_is_also_a_page(likelihood):
    status, raw, headers = likelihood.request("GET", "/docs")
    text = raw.decode()
    assert status == 200 and headers["content-type"].startswith("text/html")
    for path in BODIES:
        assert f"POST {path}<" in text
    assert "<script" not in text and "style=" not in text and "http" not in text.split("<body>")[0]
