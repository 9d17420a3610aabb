"""ZeRO 0 to 3 on two local processes: the plain loop's losses, and checkpoints that any of them goes on from."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import dataclasses, datetime, json, sys
from pathlib import Path
import torch
from torch import distributed
from tests.training.toy import ToyStage, batches, TOY
from training import loop
from training.run_folder import RunFolder

folder, zero_stage, steps, losses = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), []
torch.set_num_threads(1)
distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
preset = dataclasses.replace(TOY, zero_stage=zero_stage)

class Enough(Exception): pass

def report(metrics):
    if "loss" in metrics:
        losses.append(metrics["loss"])
    if metrics["step"] == steps < preset.steps:
        raise Enough

try:
    share = batches(distributed.get_rank(), distributed.get_world_size())
    loop.fit(ToyStage(), preset, RunFolder(folder), share, report=report)
except Enough:
    pass
total = torch.tensor(losses, dtype=torch.float64)
distributed.all_reduce(total)
if distributed.get_rank() == 0:
    print("LOSSES", json.dumps((total / distributed.get_world_size()).tolist()))
"""


def train(folder: Path, zero_stage: int, *, workers: int = 2, steps: int = 50) -> list[float]:
    """The losses, means over the workers, of the steps that this run makes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(workers)}
    command = [sys.executable, "-c", WORKER, str(folder), str(zero_stage), str(steps)]
    running = [
        subprocess.Popen(
            command,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(workers)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(workers)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return json.loads(next(line for line in outputs[0].splitlines() if line.startswith("LOSSES"))[7:])


def largest_difference(curve: list[float], other: list[float]) -> float:
    """Relative."""
    return max(abs(one - two) / abs(two) for one, two in zip(curve, other, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_stage_has_the_plain_curve(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", -1)
    assert len(plain) == 50 and plain[-1] < 0.7 * plain[0]
    for zero_stage in (0, 1, 2, 3):
        assert largest_difference(train(tmp_path / str(zero_stage), zero_stage), plain) < 1e-3, zero_stage


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_workers_checkpoint_goes_on_with_one_and_with_four(tmp_path: Path, zero_stage: int) -> None:
    whole = train(tmp_path / "whole", -1)
    for workers in (1, 4):
        folder = tmp_path / str(workers)
        first = train(folder, zero_stage, steps=20)
        rest = train(folder, zero_stage, workers=workers)
        assert largest_difference(first + rest, whole) < 1e-3
