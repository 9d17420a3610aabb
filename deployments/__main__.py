"""`python -m deployments`: what `make serve` runs. `serve run deployments:app` on loopback in a Ray of its own,
with a port, checks beforehand and a clean end."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

from deployments import loopback
from minigpt5.commands import check_default_model, needs_extra
from minigpt5.config import ModelConfig, default_model_folder
from minigpt5.engine.vllm.settings import VLLM_PYTHON

DEFAULT_PORT = 8000
READY_TIMEOUT_S = 300.0
VLLM_READY_TIMEOUT_S = 1200.0
"""vLLM starts three processes, and may compile in them."""
END_TIMEOUT_S = 10.0
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns of a coming change
}
FEWER_HOPS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}
"""Serve's settings for one machine: an event crosses fewer threads, and the controller looks around less often."""


class StartError(Exception):
    """The server cannot start; the message says what to do."""


def main() -> int:
    args = parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell that starts us in the background has us ignore the first
        signal.signal(number, _interrupt)
    try:
        with needs_extra("minigpt5-serve", "serve", modules=("ray", "fastapi"), ray="Ray Serve"):
            serve_until_interrupted(args)
    except KeyboardInterrupt:
        return 0
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_args() -> argparse.Namespace:
    from minigpt5.story.store import default_storage

    parser = argparse.ArgumentParser(prog="python -m deployments", description="Serve stories over HTTP; Ctrl-C ends.")
    parser.add_argument("--host", default="127.0.0.1", help="(default: %(default)s, this machine alone)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="(default: %(default)s)")
    parser.add_argument("--api-keys", default="", help="file of API keys; needed where others can reach the server")
    parser.add_argument("--filters", help="text,picture, one of them, or none (default: as the model says)")
    parser.add_argument("--fronts", type=int, default=1, help="HTTP fronts (default: %(default)s)")
    parser.add_argument("--model", default=str(default_model_folder()), help="model folder (default: the shipped one)")
    parser.add_argument("--storage", default=default_storage(), help="folder or URI (default: %(default)s)")
    parser.add_argument("--max-wait-s", type=float, help="a request that would take longer is answered with 503")
    parser.add_argument("--vllm", metavar="FOLDER", help="vLLM writes, with what was exported of the model")
    parser.add_argument("--vllm-python", default=str(VLLM_PYTHON), help="its interpreter (default: %(default)s)")
    parser.add_argument("--metrics-port", type=int, help="port for Prometheus (default: a free one)")
    parser.add_argument("--traces", type=float, default=0.0, help="share of requests to trace (default: %(default)s)")
    return parser.parse_args()


def serve_until_interrupted(args: argparse.Namespace) -> None:
    """Raises StartError, or KeyboardInterrupt at the end, when nothing of ours runs any more."""
    started_at = time.monotonic()
    set_up_ray()
    check_keys(args.host, args.api_keys)
    check_port(args.host, args.port)
    if args.metrics_port is not None:
        check_port(loopback.ADDRESS, args.metrics_port, option="--metrics-port ")
    config = check_model(args.model)
    check_storage(args.storage)
    if args.vllm:
        check_vllm(args.vllm, args.vllm_python, config)
    print("starting ...", flush=True)
    try:
        start(args)
        wait_until_ready(args.host, args.port, timeout_s=VLLM_READY_TIMEOUT_S if args.vllm else READY_TIMEOUT_S)
        startup_s = time.monotonic() - started_at
        said = describe_server(args, config, startup_s=startup_s, metrics_port=find_metrics_port(), logs=find_logs())
        print(said, flush=True)
        while True:
            time.sleep(3600)
    finally:
        end()


def set_up_ray() -> None:
    """Set the variables of Ray and of its processes that are not set. Ray reads some of them when it is imported."""
    from deployments.proxy import CALLBACK, CALLBACK_VARIABLE

    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)  # its processes run this code, wherever it lies
    for name, value in {**QUIET, **loopback.VARIABLES, CALLBACK_VARIABLE: CALLBACK, **FEWER_HOPS}.items():
        os.environ.setdefault(name, value)


def check_keys(host: str, api_keys: str) -> None:
    """Raises StartError."""
    from deployments.auth import KeysError, check_host, load_keys

    try:
        check_host(host, load_keys(api_keys or None))
    except KeysError as error:
        raise StartError(str(error)) from None


def check_port(host: str, port: int, *, option: str = "make serve PORT=") -> None:
    """Serve itself, and Ray's agent, would only say so in a log file. `option` sets the port."""
    if not 1 <= port <= 65535:
        raise StartError(f"port is {port} but must be from 1 to 65535: {option}{DEFAULT_PORT}")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise StartError(
                f"port {port} cannot be used ({error.strerror}): choose another one, such as {option}{port % 65535 + 1}"
            ) from None


def check_model(folder: str) -> ModelConfig:
    """Hash the weights and find the base models: an engine that fails to load says so much later and less clearly."""
    from minigpt5.errors import MiniGPT5Error
    from minigpt5.model.folder import load_example_pictures
    from minigpt5.model.folder_config import check_folder
    from minigpt5.model.locate import check_bases, locate

    try:
        check_default_model(folder)
        local = locate(folder)
        config = check_folder(local)
        load_example_pictures(local, config)
        check_bases(local, config)
    except MiniGPT5Error as error:
        raise StartError(str(error)) from None
    return config


def check_vllm(folder: str, python: str, config: ModelConfig) -> None:
    """Raises StartError where vLLM would write with another model, or has no environment."""
    from minigpt5.engine.vllm.exported import load_export
    from minigpt5.errors import MiniGPT5Error

    if not os.access(python, os.X_OK):
        raise StartError(f"there is no interpreter {python}: make install-vllm, or name one with --vllm-python")
    try:
        load_export(folder, config)
    except MiniGPT5Error as error:
        raise StartError(str(error)) from None


def check_storage(uri: str) -> None:
    from minigpt5.errors import StorageError
    from minigpt5.story.store import StoryStore

    try:
        StoryStore(uri)
    except StorageError as error:
        raise StartError(str(error)) from None


def start(args: argparse.Namespace) -> None:
    """A Ray of our own, then the application in it. Raises StartError."""
    import ray
    from ray import serve

    from deployments.observability.tracing import tracing_config
    from minigpt5.errors import SettingsError

    try:
        traces = tracing_config(args.traces)
    except SettingsError as error:
        raise StartError(str(error)) from None
    context = ray.init(
        address="local",  # never join a Ray that somebody else has started on this machine
        namespace="serve",
        num_cpus=max(2, os.cpu_count() or 2),
        object_store_memory=256 * 2**20,  # what crosses processes here is small
        include_dashboard=False,  # its processes take CPU time from the engines; the node's agent exports metrics
        runtime_env={"worker_process_setup_hook": loopback.HOOK},
        _metrics_export_port=args.metrics_port,
        log_to_driver=False,
        logging_level="ERROR",
    )
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray has put its own in the place of ours
        signal.signal(number, _interrupt)
    serve.start(
        http_options={"host": args.host, "port": args.port}, logging_config={"encoding": "JSON"}, tracing_config=traces
    )
    try:
        deploy(args)
    except RuntimeError as error:
        logs = f"{context.address_info['session_dir']}/logs/serve"
        raise StartError(
            f"the application did not start: {str(error).strip().splitlines()[-1]}; logs: {logs}"
        ) from None


def find_metrics_port() -> int:
    """The port on which Ray's agent of this node answers Prometheus."""
    import ray

    [node] = ray.nodes()
    return node["MetricsExportPort"]


def deploy(args: argparse.Namespace) -> None:
    """The application, in the Ray that runs; another one is replaced. Raises RuntimeError where it does not start."""
    from ray import serve

    from deployments.application import AppArgs, app

    arguments = AppArgs(
        model=args.model,
        storage=args.storage,
        api_keys=args.api_keys,
        filters=args.filters,
        front_replicas=args.fronts,
        **({} if args.max_wait_s is None else {"max_wait_s": args.max_wait_s}),
        engine="vllm" if args.vllm else "torch",
        vllm=vllm_values(args) if args.vllm else {},
    )
    serve.run(app(arguments), name="default", route_prefix="/")


def vllm_values(args: argparse.Namespace) -> dict[str, str]:
    return {"folder": str(Path(args.vllm).absolute()), "python": str(Path(args.vllm_python).absolute())}


def find_logs() -> str:
    """The folder of Serve's log files."""
    import ray

    context = ray.get_runtime_context()
    return f"{context.get_temp_dir()}/{context.get_session_name()}/logs/serve"


def wait_until_ready(host: str, port: int, *, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Raises StartError."""
    reason = "no answer"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy need not reach this machine
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with direct.open(f"http://{reachable(host)}:{port}/readyz", timeout=10):
                return
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")
        except OSError as error:
            reason = str(error)
        time.sleep(0.2)
    raise StartError(f"not ready within {timeout_s:g} s: {reason}")


def reachable(host: str) -> str:
    """An address that this machine reaches the server under."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)


def describe_server(
    args: argparse.Namespace, config: ModelConfig, *, startup_s: float, metrics_port: int, logs: str
) -> str:
    url = f"http://{reachable(args.host)}:{args.port}"
    body = shlex.quote(json.dumps({"prompt": next(iter(config.examples), "A story")}, ensure_ascii=False))
    about = f"           {config.summary}\n" if config.summary else ""
    return (
        f"\nready after {startup_s:.0f} s: {url}\n"
        f"  curl {url}/v1/stories -H 'Content-Type: application/json' -d {body}\n"
        f"  model    {config.name}, {args.model}\n"
        f"{about}"
        f"  stories  {args.storage}\n"
        f"  metrics  http://127.0.0.1:{metrics_port}/metrics\n"
        f"  logs     {logs}\n"
        "Ctrl-C ends it.\n"
    )


def end() -> None:
    """End every process of our Ray. Finished pages are stored; a story under way stops where it is."""
    import psutil
    import ray

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    processes = psutil.Process().children(recursive=True)
    ray.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=END_TIMEOUT_S)
    for process in alive:
        process.kill()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
