"""Keeps the ports of a Ray of one machine on 127.0.0.1: `python -m deployments` opens its HTTP port alone.

Ray runs the code that its ports are sent, for callers that have the cluster's token.
"""

from __future__ import annotations

ADDRESS = "127.0.0.1"
VARIABLES = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Make it the node's address, as on macOS: with any other one Ray's ports listen on all addresses. `ray.init` does not
take it as an argument (`resolve_ip_for_localhost` replaces it). Read when Ray is imported."""
HOOK = "deployments.loopback.bind_replicas"


def bind_replicas() -> None:
    """Called in each of Ray's processes before its work. The port on which Serve's replicas hear each other otherwise
    listens on all addresses, whatever the node's is (`ReplicaBase._on_initialized`)."""
    from ray.serve._private import replica

    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", ADDRESS))
