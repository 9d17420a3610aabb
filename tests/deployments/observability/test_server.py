"""What an operator sees of a running server: metrics as Prometheus scrapes them, and logs of one story."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from deployments.observability.alerts import ALERTS
from deployments.observability.dashboard import PANELS
from deployments.observability.metrics import DRAWN_PICTURES, GENERATED_TOKENS, HTTP_REQUESTS, METRICS, PAGES, STORIES
from deployments.observability.queries import names
from tests.helpers.processes import MODEL, Server

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no model is shipped in {MODEL}"),
]
EXPORT_S = 60
"""Ray's processes send their metrics to the node's agent every 10 s."""
OF_RAY = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "application", "deployment", "replica"}
"""Labels that Ray and Serve add: one value for each process."""
DEPLOYMENTS = ("Ingress", "VokenGenerator", "DiffusionDecoder")


def scrape(server: Server) -> dict[str, Family]:
    """Metric -> its samples, as the server's node exports them."""
    text = httpx.get(server.metrics_url, trust_env=False).text
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict[str, Family], name: str, **labels: str) -> float:
    """The sum of the samples with these labels."""
    samples = families[name.removesuffix("_total")].samples if name.removesuffix("_total") in families else []
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())


def wait_for(server: Server, holds: Callable[[dict[str, Family]], bool]) -> dict[str, Family]:
    deadline = time.monotonic() + EXPORT_S
    while not holds(families := scrape(server)):
        assert time.monotonic() < deadline, sorted(name for name in families if "minigpt5" in name)
        time.sleep(1)
    return families


def test_a_scrape_has_every_metric_of_the_table_the_dashboard_and_the_rules(server: Server) -> None:
    before = scrape(server)  # what a test before this one has made may come in later
    body = {"prompt": "A fox who finds a red balloon", "pages": 2, "seed": 11, "steps": 4}
    # The second story reuses what the first has read of the prompt. Without AVX-512 the last bits of its states differ,
    # so that the third is the first whose pictures are surely kept.
    for _ in range(3):
        assert server.client.post("/v1/stories", json=body).status_code == 201
    assert server.client.post("/v1/stories", json={"prompt": ""}).status_code == 422
    waiting = {"prompt": "A bear", "pages": 8, "seed": 12, "wait": False}
    cancelled = server.client.post("/v1/stories", json=waiting).json()["id"]
    server.client.post(f"/v1/stories/{cancelled}/cancel")

    expressions = [expression for panel in PANELS for expression in panel.expressions.values()]
    asked = set().union(*map(names, [*expressions, *(alert.expression for alert in ALERTS)]))

    def exported(families: dict[str, Family]) -> set[str]:
        return set(families) | {f"{name}_total" for name, one in families.items() if one.type == "counter"}

    def grown(families: dict[str, Family], name: str, **labels: str) -> float:
        return value(families, name, **labels) - value(before, name, **labels)

    families = wait_for(
        server,
        lambda families: (
            grown(families, STORIES.exported, outcome="cancelled") >= 1
            and grown(families, DRAWN_PICTURES.exported, result="cached") >= 2
            and grown(families, GENERATED_TOKENS.exported) > 0
            and asked <= exported(families)  # Ray tells of its proxies' errors in its own time
        ),
    )
    assert grown(families, STORIES.exported, outcome="done") >= 2
    assert grown(families, PAGES.exported, picture="drawn") >= 4
    assert grown(families, HTTP_REQUESTS.exported, result="invalid") >= 1
    assert grown(families, HTTP_REQUESTS.exported, result="answered") >= 4
    for metric in METRICS:
        family = families[metric.exported.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        for sample in family.samples:
            of_otel = {label for label in sample.labels if label.startswith("otel_")}
            assert set(sample.labels) - OF_RAY - of_otel - {"le"} == set(metric.labels)
            assert all(sample.labels[label] in values for label, values in metric.labels.items())


def read_log(server: Server, deployment: str) -> Iterator[dict[str, Any]]:
    [path] = server.logs.glob(f"replica_default_{deployment}_*.log")
    for line in path.read_text().splitlines():
        yield json.loads(line)


def test_a_story_is_in_the_logs_of_all_deployments_under_its_id_and_its_requests(server: Server) -> None:
    body = {"prompt": "A secret owl who finds a lamp", "pages": 2, "seed": 13, "steps": 4}
    reply = server.client.post("/v1/stories", json=body, headers={"X-Request-Id": "look-here"})
    story_id = reply.json()["id"]
    messages: dict[str, set[str]] = {}
    for deployment in DEPLOYMENTS:
        lines = list(read_log(server, deployment))
        of_story = [line for line in lines if line.get("story_id") == story_id]
        of_request = [line for line in lines if line.get("request_id") == "look-here"]
        assert of_story == of_request
        messages[deployment] = {line["message"] for line in of_story}
        text = "".join(map(json.dumps, lines))
        assert "secret" not in text and all(page["text"] not in text for page in reply.json()["pages"])
    assert messages["Ingress"] == {"story begins", "story ends", "POST /v1/stories 201"}
    assert {"writing"} < messages["VokenGenerator"] and {"drawing"} < messages["DiffusionDecoder"]
    [ended] = [line for line in read_log(server, "Ingress") if line.get("outcome") and line["story_id"] == story_id]
    assert ended["outcome"] == "done" and ended["seconds"] > 0
