"""Start a server on this machine, ask it for a story and keep the book: `python examples/serve_and_call.py [FOLDER]`.

Where a server runs already (`make serve`, or a cluster), `tell` is all that you need: give Client its URL and your key.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from deployments.client import Client


def start(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server on a free port, once it takes requests; and its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "deployments", "--port", str(port), "--storage", str(folder)])
    url = f"http://127.0.0.1:{port}"
    while server.poll() is None:
        time.sleep(1)
        try:
            if httpx.get(f"{url}/readyz", trust_env=False).is_success:
                return server, url
        except httpx.TransportError:  # it is starting
            continue
    raise SystemExit("the server did not start: what it printed above says why")


def tell(url: str, folder: Path) -> None:
    with Client(url) as client:
        for event in client.create("A fox who finds a red balloon", pages=2, seed=7):
            if event.name == "text":
                print(event.data["delta"], end="", flush=True)
            elif event.name == "page":
                print(f"\n    page {event.data['index']} is drawn")
            elif event.name == "done":
                print(client.export(event.data["id"], folder / "story.pdf"))


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "stories")
    folder.mkdir(exist_ok=True)
    server, url = start(folder / "storage")
    try:
        tell(url, folder)
    finally:
        server.terminate()
        server.wait()
