"""`python -m deployments.observability`: write the Grafana dashboard and Prometheus' alert rules, or draw the dashboard
from what a Prometheus has."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from deployments.observability.alerts import rules
from deployments.observability.dashboard import dashboard
from deployments.observability.sheet import draw_sheet

FOLDER = Path("cluster")
SAID = """\
# Hardware: any.
# Written by `python -m deployments.observability`: change deployments/observability/alerts.py instead.
"""


def make_files() -> dict[str, str]:
    """Path under `cluster/` -> what is in the file."""
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "minigpt5", "labels": {"app": "minigpt5"}},
        "spec": rules(),
    }
    return {
        "observability/dashboard.json": json.dumps(dashboard(), indent=2) + "\n",
        "observability/alerts.yaml": f"{SAID}{_to_yaml(rules())}",
        "kubernetes/monitoring/prometheusrule.yaml": f"{SAID}{_to_yaml(rule)}",
    }


def _to_yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=10_000)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deployments.observability", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the files (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, help="draw the dashboard into this SVG file instead")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="for --sheet (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="that --sheet shows (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.sheet:
        try:
            args.sheet.write_text(draw_sheet(args.prometheus, minutes=args.minutes))
        except httpx.HTTPError as error:
            message = f"Prometheus at {args.prometheus} does not answer ({error}): name another with --prometheus"
            print(f"error: {message}", file=sys.stderr)
            return 2
        return 0
    for name, text in make_files().items():
        path = args.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
