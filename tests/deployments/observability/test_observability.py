"""One table makes the metrics, the dashboard, the alert rules and the docs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.common import RequestProtocol
from ray.serve._private.request_ingress_metrics import RequestIngressMetrics

from deployments.observability.__main__ import FOLDER, main, make_files
from deployments.observability.alerts import ALERTS, rules
from deployments.observability.dashboard import PANELS, dashboard
from deployments.observability.metrics import METRICS, STORIES, Metric
from deployments.observability.queries import OF_SERVE, PROXY_ERRORS, PROXY_REQUESTS, REPLICAS, names, series

ROOT = Path(__file__).parents[3]
SUFFIX = {"counter": "_total", "gauge": "", "histogram": ""}
MAX_SERIES = 12
"""Of one metric and replica, buckets aside."""

each_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)


@each_metric
def test_a_metric_has_its_unit_in_its_name_and_a_help_text(metric: Metric) -> None:
    assert metric.name.startswith("minigpt5_")
    assert metric.name.endswith(f"_{metric.unit}{SUFFIX[metric.kind]}")
    assert metric.help.endswith(".") and metric.help[0].isupper()
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))


@each_metric
def test_a_metric_has_few_series(metric: Metric) -> None:
    assert len(list(metric.label_sets)) <= MAX_SERIES


def test_names_are_given_once() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_a_label_that_is_never_recorded_cannot_be_asked_for() -> None:
    assert series(STORIES, outcome="done") == 'ray_minigpt5_stories_total{outcome="done"}'
    with pytest.raises(ValueError, match="outcome='lost'"):
        series(STORIES, outcome="lost")


def test_every_metric_is_on_the_dashboard() -> None:
    shown: set[str] = set()
    for panel in PANELS:
        for expression in panel.expressions.values():
            shown |= names(expression)
    assert shown == {metric.exported for metric in METRICS} | {REPLICAS, PROXY_ERRORS}


def test_serve_counts_requests_under_the_names_that_are_asked_for() -> None:
    """The proxies make these counters; Ray adds `ray_` and `_total`."""
    metrics = RequestIngressMetrics(protocol=RequestProtocol.HTTP, source="proxy", node_id="a", node_ip_address="b")
    names_of_serve = {
        f"ray_{counter.info['name']}_total": counter.info["tag_keys"]
        for counter in (metrics.request_counter, metrics.request_error_counter)
    }
    assert set(names_of_serve) == {PROXY_REQUESTS, PROXY_ERRORS} < OF_SERVE
    assert "error_code" in names_of_serve[PROXY_ERRORS]


def test_the_committed_files_are_what_the_command_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in files}
    assert written == make_files() == {name: (ROOT / FOLDER / name).read_text() for name in written}
    assert len(capsys.readouterr().out.splitlines()) == len(written)


def test_a_prometheus_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.svg"
    assert main(["--sheet", str(sheet), "--prometheus", "http://127.0.0.1:9"]) == 2
    assert "Prometheus at http://127.0.0.1:9 does not answer" in capsys.readouterr().err
    assert not sheet.exists()


def test_grafanas_panels_do_not_overlap_and_have_one_data_source() -> None:
    board = dashboard()
    assert [variable["type"] for variable in board["templating"]["list"]] == ["datasource"]
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells
        assert all(target["datasource"] == panel["datasource"] for target in panel.get("targets", ()))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert json.loads(json.dumps(board)) == board


def test_an_alert_says_how_bad_it_is_and_where_to_read_on() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    anchors = {title.lower() for title in re.findall(r"^### (\w+)$", text, flags=re.M)}
    assert anchors == {alert.anchor for alert in ALERTS}
    found: list[dict[str, Any]] = rules()["groups"][0]["rules"]
    for rule in found:
        assert rule["labels"]["severity"] in ("critical", "warning") and rule["for"]
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["annotations"]["runbook"].split("#")[1] in anchors
        assert names(rule["expr"])
