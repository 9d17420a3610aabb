"""What a running server opens to others: the HTTP port where --host says so, and nothing of Ray."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import grpc
import psutil
import pytest

from deployments.auth import add_key
from tests.helpers.processes import MODEL, Server, running_server

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no model is shipped in {MODEL}"),
]


def open_to_others(server: Server) -> set[tuple[str, int]]:
    return {(ip, port) for ip, port in server.listening() if not ipaddress.ip_address(ip).is_loopback}


def test_nothing_is_open_to_others_by_default(server: Server) -> None:
    assert ("127.0.0.1", server.port) in server.listening()
    assert not open_to_others(server)


def test_replicas_take_no_call_without_the_clusters_token(server: Server) -> None:
    """Serve unpickles what this port is sent, and other users of the machine reach it."""
    front = psutil.Process(server.replica("Ingress").pid)
    ports = [one.laddr.port for one in front.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert ports
    refusals = set()
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refusal:
                call(b"", timeout=20)
            refusals.add(refusal.value.code())
    assert grpc.StatusCode.UNAUTHENTICATED in refusals
    assert refusals <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}


@pytest.mark.slow
def test_the_http_port_alone_is_open_to_others(tmp_path: Path) -> None:
    add_key(tmp_path / "keys.json", "alice", per_minute=60, concurrent=8)
    with running_server(tmp_path, "--host", "0.0.0.0", "--api-keys", str(tmp_path / "keys.json")) as server:
        assert server.client.get("/readyz").status_code == 200
        assert server.client.get("/v1/stories").status_code == 401
        assert open_to_others(server) == {("0.0.0.0", server.port)}
