"""How fast the engines are: `python -m benchmarks.engines [--model FOLDER] [--serve] [--quick]`.

Stories of 4 pages with 48 tokens of text each: default requests, and pictures of 20 and 50 guided steps. Compared are

  ours       both engines in one process; over HTTP with `--serve`, asked by another process
  published  a loop as published: one story at a time, token by token, diffusers' own pipeline for each picture
  limit      the same tokens and steps in lockstep with no engine around them, at the best of a sweep of batch sizes
  llamacpp   llama.cpp on the base model's GGUF file: text alone, where `make install-peers` has installed it
  vllm       vLLM on the CPU with our merged model: text alone, likewise
  eager      our own decoder in float32 with torch's own kernels: pictures alone
  pipeline   diffusers' own pipeline: pictures alone

on the same cores, in one run and in turns, each in a process of its own. The machine's own peak stands beside them. The
figures so far are written after every round, beside the file as engines.json.partial: a run that fails has measured
something.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals, ratios
from benchmarks.http_load import REFUSES_NOTHING, HttpLoads, running_server
from benchmarks.load import LOADS, Load
from benchmarks.quality import machine
from benchmarks.rounds import Figures, Programs, measure
from benchmarks.turns import Program, running
from minigpt5.config import default_model_folder
from minigpt5.model.folder_config import load_config
from minigpt5.model.weight_packages import WEIGHT_PACKAGES

PEERS = Path(".venv-peers")
"""The environment that `make install-peers` makes."""


@contextlib.contextmanager
def running_programs(options: argparse.Namespace, missing: dict[str, str]) -> Iterator[Programs]:
    """Every way, loaded. `missing` gets the peers that cannot be started, and why."""
    with contextlib.ExitStack() as stack:
        way = [sys.executable, "-m", "benchmarks.ways"]
        given = ["--model", str(options.model), "--load", options.load, "--cores", str(options.cores)]
        names = ("published", "limit", "text", "pictures", "eager", "ours")
        started = {name: stack.enter_context(running([*way, name, *given])) for name in names}
        peers: dict[str, Program] = {}
        exported = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, command in peer_commands(options, exported, missing).items():
            try:
                peers[name] = stack.enter_context(running(command))
            except RuntimeError as error:
                missing[name] = str(error)
        http = None
        if options.serve:
            url, server = stack.enter_context(running_server(options.model, REFUSES_NOTHING))
            http = HttpLoads(url, server, model=options.model, load=options.load)
        yield Programs(**started, peers=peers, http=http)


def peer_commands(options: argparse.Namespace, folder: Path, missing: dict[str, str]) -> dict[str, list[str]]:
    """The peers' programs. The model is exported for vLLM into `folder`."""
    python = options.peers / "bin" / "python"
    if not python.is_file():
        missing |= dict.fromkeys(("llamacpp", "vllm"), f"there is no {options.peers}: run make install-peers")
        return {}
    commands = {}
    if gguf := find_gguf(options.model):
        commands["llamacpp"] = [str(python), "-m", "benchmarks.peers.llamacpp", str(gguf), str(options.cores)]
    else:
        missing["llamacpp"] = "the base model has no GGUF file"
    subprocess.run(
        [sys.executable, "-m", "minigpt5.engine.vllm.export", str(options.model), str(folder)],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    commands["vllm"] = [str(python), "-m", "benchmarks.peers.vllm", str(folder)]
    return commands


def find_gguf(model: Path) -> Path | None:
    """The GGUF file of a model folder's base model, where a weight package carries one."""
    package = WEIGHT_PACKAGES.get(load_config(model).language_model)
    spec = importlib.util.find_spec(package.module) if package else None
    if package is None or spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / package.folder
    return next((folder / name for name in package.sha256 if name.endswith(".gguf")), None)


def measure_long_prompt(options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.ways", "long", "--model", str(options.model)]
    with running([*command, "--load", options.load, "--cores", str(options.cores)]) as program:
        return program.measure("gaps")


def report_of(figures: Figures, load: Load, missing: Mapping[str, str]) -> dict[str, Any]:
    """What is written, without the machine and the command."""
    found = ratios.compute(figures)
    return {
        "ratios": found,
        "figures": {
            "load": dataclasses.asdict(load),
            **dataclasses.asdict(figures),
            "goals": goals.compare_ratios(found),
            "not_measured": dict(missing),
        },
    }


def show(report: Mapping[str, Any]) -> None:
    """A table of stories, one of text and pictures, and the ratios, on the terminal."""
    figures = report["figures"]
    print(f"{'pictures':<9} {'way':<12} {'stories/s':>9}  {'story s':>8}  {'first text s':>12}  {'picture s':>9}")
    for pictures, ways in figures["stories"].items():
        for name in ("published", "limit"):
            print(f"{pictures:<9} {name:<12} " + " ".join(f"{rate:9.4f}" for rate in ways[name]["stories_per_s"]))
        print(f"{pictures:<9} {'bound':<12} " + " ".join(f"{seconds:7.2f} s" for seconds in ways["bound_s"]))
        for name in ("ours", "http"):
            for num, row in ways[name].items():
                times = [row[f"{what}_s"]["p50"] for what in ("story", "first_text", "first_picture")]
                rate = f"{row['stories_per_s']:9.4f}"
                print(
                    f"{pictures:<9} {f'{name}, {num}':<12} {rate}  {times[0]:8.2f}  {times[1]:12.2f}  {times[2]:9.2f}"
                )
    for what, unit in (("text", "tokens/s"), ("pictures", "s a picture")):
        for name, by_num in figures[what].items():
            values = (f"{num}: {' '.join(f'{value:.3f}' for value in rounds)}" for num, rounds in by_num.items())
            print(f"{what}, {name}, {unit}, at once  {'; '.join(values)}")
    for name, rounds in figures["peak"].items():
        print(f"peak, {name}  {' '.join(f'{value:.1f}' for value in rounds)}")
    print(goals.ratios_to_text(report["ratios"]))
    for name, why in figures["not_measured"].items():
        print(f"not measured: {name}: {why}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model_folder())
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="that every way has (default: all)")
    parser.add_argument("--serve", action="store_true", help="also over HTTP, from a server that is started for it")
    parser.add_argument(
        "--quick", dest="load", action="store_const", const="quick", help="one round of the least, in 5 minutes"
    )
    parser.add_argument("--tiny", dest="load", action="store_const", const="tiny", help="a check that the bench runs")
    parser.add_argument("--peers", type=Path, default=PEERS, help="environment of llama.cpp and vLLM")
    parser.add_argument("--out", type=Path, default=Path("benchmarks") / "results" / "engines.json")
    parser.set_defaults(load="full")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    load, began = LOADS[options.load], time.perf_counter()
    given = sys.argv[1:] if arguments is None else arguments
    about = {"machine": machine(), "command": " ".join(["python -m benchmarks.engines", *given])}
    missing: dict[str, str] = {}

    partial = options.out.with_name(f"{options.out.name}.partial")

    def write(path: Path, report: dict[str, Any]) -> None:
        report["figures"]["seconds"] = round(time.perf_counter() - began)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**report, **about}, indent=2) + "\n")

    def keep(figures: Figures, num_rounds: int) -> None:
        print(f"round {num_rounds} of {load.rounds} is measured", flush=True)
        rest = f"the run ended after {num_rounds} of {load.rounds} rounds"
        write(partial, report_of(figures, load, {**missing, "rest": rest}))

    with running_programs(options, missing) as programs:
        figures = measure(programs, load, keep)
    report = report_of(figures, load, missing)
    if load.long_prompt_tokens:
        report["figures"]["long_prompt"] = measure_long_prompt(options)
    write(options.out, report)
    partial.unlink(missing_ok=True)
    show(report)


if __name__ == "__main__":
    main()
