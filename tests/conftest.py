"""What all tests share: one torch thread a process, one server, one Ray cluster, and who runs beside whom."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from tests.helpers.processes import Cluster, Server, running_cluster, running_server

torch.set_num_threads(1)
# A shell that starts us in the background has us ignore Ctrl-C, and with us all processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

STARTS_RAY_MARK = "pytest.mark.cluster"
STARTS_RAY = ("cluster", "server")
"""Fixtures of processes of their own, in the order in which their tests come."""


class ByModule(LoadScopeScheduling):
    """Tests of a module run in one process, and all modules that start Ray share one.

    pytest-xdist has groups for this, which do nothing with pytest 9.2 (`--dist loadgroup` sets an attribute that its
    nodes no longer have).
    """

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return "ray" if STARTS_RAY_MARK in (self.config.rootpath / module).read_text() else module

    def remove_node(self, node: WorkerController) -> str | None:
        """Hand out again what a crashed process has not ended.

        pytest-xdist (3.8) hands out the modules that it has ended too, and waits for ever for their tests.
        """
        modules = self.assigned_work[node]
        self.assigned_work[node] = {name: tests for name, tests in modules.items() if not all(tests.values())}
        return super().remove_node(node)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A bench that ran in this process has left it with more."""
    torch.set_num_threads(1)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByModule:
    return ByModule(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that start Ray last: a cluster that waits slows down everything else."""

    def place(item: pytest.Item) -> int:
        used = [number for number, name in enumerate(STARTS_RAY) if name in getattr(item, "fixturenames", ())]
        return max(used, default=-1) if item.get_closest_marker("cluster") else -2

    items.sort(key=place)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Ray cluster of our own that takes jobs."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`python -m deployments` with the shipped model."""
    with running_server(tmp_path_factory.mktemp("server")) as found:
        yield found
