"""Requests made from the server's own OpenAPI schema, right ones and wrong ones: whatever comes, never a 5xx."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from research.core.config.schema import ServeConfig
from tests.core.serve.fake_engine import FakeEngine

EXAMPLES = 5  # of each operation, right and wrong


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    with start(FakeEngine(length_limit=256), ServeConfig(adapter_folder=str(folder))) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False], ids=["as the schema says", "against the schema"])
def test_no_request_that_can_be_made_of_the_schema_is_a_5xx(server, right):
    schemathesis = pytest.importorskip("schemathesis", reason="makes requests of an OpenAPI schema")
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    mode = schemathesis.GenerationMode.POSITIVE if right else schemathesis.GenerationMode.NEGATIVE
    seen: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        if not right and not operation.body:
            continue  # there is nothing in it that could be wrong

        @seed(20)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            response = case.call(timeout=20)
            seen.setdefault(case.operation.label, set()).add(response.status_code)
            assert response.status_code < 500, f"{case.method} {case.path} {case.body}: {response.text}"
            if response.status_code >= 400:
                error = response.json()["error"]
                assert isinstance(error, str) or set(error) == {"message", "type", "param", "code"}

        ask()
    answered = {label for label, statuses in seen.items() if 200 in statuses}
    refused = {label for label, statuses in seen.items() if statuses & {400, 422}}
    assert {"POST /v1/completions", "POST /v1/embeddings", "POST /generate"} <= (answered if right else refused), seen
    assert server.service.ready and server.service.open == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("messages", "prompt", "temperature", "stop", "tools", "tool_choice", "response_format", "stream_options", "n")


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), st.sampled_from(["chat/completions", "completions"]))
@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_any_json_in_any_field_is_an_answer_or_a_400(server, fields, path):
    import json
    import urllib.error
    import urllib.request

    whole = {"messages": [{"role": "user", "content": "x"}]} if path.startswith("chat") else {"prompt": "x"}
    data = json.dumps(whole | {"max_tokens": 2} | fields).encode()
    request = urllib.request.Request(f"{server.url}/v1/{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.status == 200
    except urllib.error.HTTPError as error:
        assert error.code == 400, error.read()
