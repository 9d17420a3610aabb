"""What all tests share: one torch thread a process, one server, one Ray cluster, and who runs beside whom."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.helpers.processes import Cluster, Server, running_cluster, running_server

torch.set_num_threads(1)

STARTS_RAY = ("cluster", "server")
"""Fixtures of processes of their own, in the order in which their tests come."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Run a module's tests in one process (`-n 2 --dist loadgroup`), and all that start Ray in one process."""
    item.add_marker(pytest.mark.xdist_group("ray" if item.get_closest_marker("cluster") else item.location[0]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that start Ray last: a cluster that waits slows down everything else."""

    def place(item: pytest.Item) -> int:
        used = [number for number, name in enumerate(STARTS_RAY) if name in getattr(item, "fixturenames", ())]
        return max(used, default=-1) if item.get_closest_marker("cluster") else -2

    items.sort(key=place)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A Ray cluster of our own that takes jobs. Its agent needs Ray's usual port: no other Ray may run meanwhile."""
    with running_cluster() as found:
        yield found


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`python -m deployments` with the shipped model."""
    with running_server(tmp_path_factory.mktemp("server")) as found:
        yield found
