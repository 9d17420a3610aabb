"""What a failed run on Ray tells: our own error as it was raised, else the last line of what Ray says."""

from __future__ import annotations

from ray.train import WorkerGroupError

from minigpt5.errors import TrainingError
from training.cluster import reason_of


def test_a_workers_own_error_is_the_reason() -> None:
    failures: dict[int, Exception] = {0: RuntimeError("connection reset"), 1: TrainingError("the disk is full")}
    assert reason_of(WorkerGroupError("long traceback", failures)) == "the disk is full"


def test_another_failure_is_its_last_line() -> None:
    reason = reason_of(WorkerGroupError("Traceback\n  line\nSIGKILL", {0: RuntimeError("died")}))
    assert "more than 3 times" in reason and "SIGKILL" in reason and "Traceback" not in reason
