"""A real Prometheus, Debian's: it loads the rules, scrapes a server, and answers what the dashboard asks for."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from deployments.observability.__main__ import FOLDER, main
from deployments.observability.alerts import DEPLOYMENTS
from deployments.observability.dashboard import PANELS, WINDOW
from deployments.observability.metrics import RUNNING_REQUESTS
from tests.helpers.processes import MODEL, ROOT, Server, answers, find_free_port

RULES = ROOT / FOLDER / "observability" / "alerts.yaml"
START_S = 30
SCRAPE_S = 2
LOAD_S = 45
"""Several exports of Ray, which come every 10 s: two of them give a rate."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("promtool")),
        reason="prometheus or promtool is not on the PATH: apt-get install prometheus",
    ),
]


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_takes_the_rules() -> None:
    assert "8 rules found" in promtool("check", "rules", str(RULES))


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """Refusals for half an hour beside probes that all pass, a decoder that goes away after ten minutes, and generators
    that are not scraped; meanwhile another server, with the same deployments, has none of it."""
    healthy = "ray_serve_deployment_replica_healthy"
    asked = 'application="default",route="/v1/stories"'
    requests, errors = "ray_serve_num_http_requests_total", "ray_serve_num_http_error_requests_total"
    unit = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": f'{requests}{{status_code="201",{asked}}}', "values": "0+80x30"},
                    {"series": f'{requests}{{status_code="503",{asked}}}', "values": "0+10x30"},
                    {"series": f'{requests}{{status_code="404",{asked}}}', "values": "0+10x30"},
                    {
                        "series": f'{requests}{{status_code="200",application="",route="/-/healthz"}}',
                        "values": "0+900x30",
                    },
                    {"series": f'{errors}{{error_code="503",{asked}}}', "values": "0+10x30"},
                    {"series": f'{errors}{{error_code="404",{asked}}}', "values": "0+10x30"},
                    {
                        "series": f'{healthy}{{application="default",deployment="Ingress",replica="a"}}',
                        "values": "1x30",
                    },
                    {
                        "series": f'{healthy}{{application="default",deployment="VokenGenerator",replica="b"}}',
                        "values": "1x30",
                    },
                    {
                        "series": f'{healthy}{{application="default",deployment="DiffusionDecoder",replica="c"}}',
                        "values": "1x10 0x20",
                    },
                    *[
                        {
                            "series": f'{healthy}{{application="other",deployment="{name}",replica="d"}}',
                            "values": "2x30",
                        }
                        for name in DEPLOYMENTS
                    ],
                    {"series": f'{RUNNING_REQUESTS.exported}{{application="other"}}', "values": "1x30"},
                    {
                        "series": f'{requests}{{application="other",route="/readyz",status_code="503"}}',
                        "values": "0+10x30",
                    },
                    {
                        "series": f'{errors}{{application="other",route="/readyz",error_code="503"}}',
                        "values": "0+10x30",
                    },
                ],
                "alert_rule_test": [
                    expect("RequestsRefused", "9m", None),
                    expect(
                        "RequestsRefused",
                        "15m",
                        {"severity": "warning", "application": "default"},
                        "10% of the requests are refused with 503.",
                    ),
                    expect("NoReplica", "10m", None),
                    expect(
                        "NoReplica",
                        "20m",
                        {"severity": "critical", "application": "default", "deployment": "DiffusionDecoder"},
                        "DiffusionDecoder has no replica that passes its health checks.",
                    ),
                    expect(
                        "MetricsMissing",
                        "6m",
                        {"severity": "warning", "application": "default"},
                        "Prometheus finds no metrics of the engines.",
                    ),
                ],
            }
        ],
    }
    path = tmp_path / "unit.yaml"
    path.write_text(yaml.safe_dump(unit))
    promtool("test", "rules", str(path))


def expect(name: str, at: str, labels: dict[str, str] | None, summary: str = "") -> dict[str, Any]:
    """What promtool expects of an alert at a time: with these labels, or with None that it is silent."""
    annotations = {"summary": summary, "runbook": f"docs/operations.md#{name.lower()}"}
    found = [] if labels is None else [{"exp_labels": labels, "exp_annotations": annotations}]
    return {"eval_time": at, "alertname": f"MiniGPT5{name}", "exp_alerts": found}


@pytest.fixture
def prometheus(server: Server, tmp_path: Path) -> Iterator[httpx.Client]:
    """A Prometheus with the rules that scrapes the server."""
    target = {"targets": [urlsplit(server.metrics_url).netloc]}
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "ray", "static_configs": [target]}],
    }
    path, address = tmp_path / "prometheus.yaml", f"127.0.0.1:{find_free_port()}"
    path.write_text(yaml.safe_dump(config))
    promtool("check", "config", str(path))
    command = ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with (tmp_path / "log").open("wb") as output:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_S
        while not answers(f"http://{address}/-/ready"):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        with httpx.Client(base_url=f"http://{address}", timeout=30, trust_env=False) as client:
            yield client
    finally:
        process.terminate()
        process.wait(START_S)


@pytest.mark.cluster
@pytest.mark.timeout(400)
@pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no model is shipped in {MODEL}")
def test_prometheus_answers_every_panel_and_evaluates_every_rule(
    server: Server, prometheus: httpx.Client, tmp_path: Path
) -> None:
    until = time.monotonic() + LOAD_S
    seed = 100
    while time.monotonic() < until:
        seed += 1
        body = {"prompt": "A fox who finds a kite", "pages": 2, "seed": seed // 2, "steps": 4}
        assert server.client.post("/v1/stories", json=body).status_code == 201
        assert server.client.get("/v1/stories/none").status_code == 404
    empty = []
    for panel in PANELS:
        for expression in panel.expressions.values():
            reply = prometheus.get("/api/v1/query", params={"query": expression.replace(WINDOW, "1m")}).json()
            assert reply["status"] == "success", (expression, reply)
            if not reply["data"]["result"]:
                empty.append(panel.title)
    assert not empty
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == 8
    assert {(rule["health"], rule["state"]) for rule in rules} == {("ok", "inactive")}, json.dumps(rules, indent=1)
    sheet = tmp_path / "sheet.svg"
    assert main(["--sheet", str(sheet), "--prometheus", str(prometheus.base_url), "--minutes", "1"]) == 0
    assert all(panel.title in sheet.read_text() for panel in PANELS)
