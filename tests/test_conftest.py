"""How tests are shared out among processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from xdist.remote import Producer

from tests.conftest import ByModule

COLLECTED = [f"tests/test_{module}.py::test_{number}" for module in "abcdefghij" for number in range(4)]


class Process:
    """What a scheduler asks of a process that runs tests; this one runs none by itself."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.given: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.given += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def test_the_tests_of_a_process_that_dies_are_run_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def end_next(process: Process) -> str:
        index = process.given.pop(0)
        scheduler.mark_test_complete(process, index)
        return COLLECTED[index]

    monkeypatch.setattr(ByModule, "_split_scope", lambda scheduler, nodeid: nodeid.partition("::")[0])
    config: Any = SimpleNamespace(
        getvalue=lambda name: ["popen", "popen"], option=SimpleNamespace(loadscopereorder=False)
    )
    scheduler: Any = ByModule(config, Producer("test", enabled=False))
    dying, living = Process("gw0"), Process("gw1")
    for process in (dying, living):
        scheduler.add_node(process)
        scheduler.add_node_collection(process, COLLECTED)
    scheduler.schedule()
    ended = [end_next(dying) for _ in range(18)]  # four modules and a half
    assert scheduler.remove_node(dying) == COLLECTED[dying.given[0]]
    while len(living.given) > (0 if living.shutting_down else 1):  # pytest-xdist's processes know the next test
        ended.append(end_next(living))
    assert sorted(ended) == sorted(COLLECTED)
