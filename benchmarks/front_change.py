"""Streamed stories while Serve replaces the fronts: `python -m benchmarks.front_change`.

In each mode of `benchmarks.ingress` a server of two fronts streams long stories. Meanwhile a setting changes, for which
Serve replaces both fronts. A stream that is cut resumes after its last event. The figures go into
benchmarks/results/ingress.json, beside those of `benchmarks.ingress`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from benchmarks.ingress import MODES, RESULTS
from benchmarks.load import WHAT, WHO
from deployments.__main__ import deploy, end, set_up_ray, start, wait_until_ready
from deployments.sse import read_events
from minigpt5.config import default_model_folder

PORT = 8192
NUM_STORIES = 4
LONG = {"pages": 8, "steps": 20}
"""Stories of about a minute, four at once on two cores."""
HEAD_START_S = 5.0
HARD_STOP_S = 20
"""After a reload, HAProxy's old process ends with all of its streams; Serve's own default is 120 s. Shorter here than a
story, as 120 s are than a longer one."""


def follow(url: str, index: int, began: float) -> dict[str, Any]:
    """Stream a story to its end, resuming after its last event where it is cut. Returns the seconds of the cuts and of
    the end since `began`, and whether the text that was told is that of the story."""
    body = {"prompt": f"A {WHO[index]} who finds a {WHAT[index]}", "seed": 600_000 + index, **LONG, "stream": True}
    texts: defaultdict[int, str] = defaultdict(str)
    cuts: list[float] = []
    story, after = "", ""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        while True:
            ask = {"url": f"/v1/stories/{story}/events", "headers": {"Last-Event-ID": after}}
            request = (
                client.build_request("GET", **ask) if after else client.build_request("POST", "/v1/stories", json=body)
            )
            try:
                reply = client.send(request, stream=True)
                for event in read_events(reply.iter_bytes()):
                    after, data = event.id, json.loads(event.data)
                    if event.name == "story":
                        story = data["id"]
                    elif event.name == "text":
                        texts[data["page"]] += data["delta"]
                    elif event.name == "restart":
                        texts[data["page"]] = ""
                    elif event.name in ("done", "error"):
                        told = [texts[page["index"]].strip() == page["text"] for page in data["pages"]]
                        is_whole = event.name == "done" and len(told) == LONG["pages"] and all(told)
                        return {"cuts_s": cuts, "ended_s": time.perf_counter() - began, "is_whole": is_whole}
            except httpx.TransportError:
                pass
            cuts.append(time.perf_counter() - began)
            time.sleep(0.5)


def change_here(storage: str) -> list[dict[str, Any]]:
    """Serve in this process's mode, and replace the fronts. Returns what `follow` says of each story."""
    args = argparse.Namespace(host="127.0.0.1", port=PORT, model=str(default_model_folder()), storage=storage)
    args.api_keys, args.filters, args.fronts, args.max_wait_s = "", None, 2, 600.0
    set_up_ray()
    try:
        start(args)
        wait_until_ready(args.host, args.port)
        with ThreadPoolExecutor(NUM_STORIES) as pool:
            began = time.perf_counter() + HEAD_START_S
            stories = [
                pool.submit(follow, f"http://{args.host}:{args.port}", index, began) for index in range(NUM_STORIES)
            ]
            time.sleep(HEAD_START_S)
            args.max_wait_s += 1
            deploy(args)
            return [story.result() for story in stories]
    finally:
        end()


def change_in(mode: str) -> list[dict[str, Any]]:
    """The same in a process of its own, whose variables choose the mode."""
    variables = {**MODES[mode], "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(HARD_STOP_S)}
    command = [sys.executable, "-m", "benchmarks.front_change", "--here"]
    with tempfile.TemporaryDirectory() as storage:
        finished = subprocess.run(
            [*command, storage], env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True
        )
    return json.loads(finished.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.front_change", description=__doc__)
    parser.add_argument("--here", metavar="STORAGE", help="serve in this process and print the figures")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(change_here(options.here)))
        return
    report = json.loads(options.out.read_text())
    report["figures"]["front_change"] = {mode: change_in(mode) for mode in MODES}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["figures"]["front_change"]))


if __name__ == "__main__":
    main()
