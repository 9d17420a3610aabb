"""What a failed run on Ray tells: our own error as it was raised, else the last line of what Ray says."""

from __future__ import annotations

import pytest
from ray.train import WorkerGroupError

from minigpt5.errors import TrainingError
from training.cluster import check_gpus, reason_of


def test_a_workers_own_error_is_the_reason() -> None:
    failures: dict[int, Exception] = {0: RuntimeError("connection reset"), 1: TrainingError("the disk is full")}
    assert reason_of(WorkerGroupError("long traceback", failures)) == "the disk is full"


def test_another_failure_is_its_last_line() -> None:
    reason = reason_of(WorkerGroupError("Traceback\n  line\nSIGKILL", {0: RuntimeError("died")}))
    assert "more than 3 times" in reason and "SIGKILL" in reason and "Traceback" not in reason


def test_gpus_that_nobody_will_add_are_said() -> None:
    check_gpus(4, 0.0, 0.0)
    check_gpus(2, 0.5, 1.0)
    with pytest.raises(TrainingError, match="2 workers of 1 GPUs do not fit this machine, which has 1: set --gpus"):
        check_gpus(2, 1.0, 1.0)
