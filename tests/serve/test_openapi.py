"""Bodies made from the OpenAPI page, right and wrong: never a server error, and only documented answers."""

import pytest

pytest.importorskip("transformers", minversion="5.20")
schemathesis, hypothesis = pytest.importorskip("schemathesis"), pytest.importorskip("hypothesis")


@pytest.fixture(scope="module")
def served(serving, tiny):
    with serving(adapter_root=tiny.adapters, max_body=100_000) as running:
        yield running


def test_hostile_bodies(served):
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    quiet = list(hypothesis.HealthCheck)
    quick = hypothesis.settings(max_examples=12, deadline=None, database=None, suppress_health_check=quiet)
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.method.upper() == "GET":
            continue

        @hypothesis.seed(0)
        @quick
        @hypothesis.given(case=operation.as_strategy())
        def run(case):
            if isinstance(case.body, dict):
                case.body |= {name: 2 for name in ("max_tokens", "max_completion_tokens") if name in case.body}
            answer = case.call(timeout=60)
            seen.add(answer.status_code)
            case.validate_response(answer, checks=[schemathesis.checks.not_a_server_error])

        run()
    assert 400 in seen and seen <= {200, 400, 404}
