"""A worker's batches through Ray Data: those that it needs, and none before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import json, os, sys
from types import SimpleNamespace
import ray
from tests.helpers.toy_stage import TOY
from training.data.batches import ray_batches

class Source:
    def example_at(self, position):
        open(os.path.join(sys.argv[1], str(position)), "w").close()
        return position, SimpleNamespace(position=position)  # no type of Arrow's, as real examples

ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=2**27)
found = [list(map(int, batch.ids)) for batch in ray_batches(Source(), TOY, rank=1, num_workers=2)(47)]
print("FOUND", json.dumps(found))
"""


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_worker_that_resumes_makes_no_example_of_an_earlier_step(tmp_path: Path) -> None:
    code = WORKER.replace("sys.argv[1]", repr(str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[5:])
    expected = [list(range(8 * step + 4, 8 * step + 8)) for step in (47, 48, 49)]  # the second half of each batch
    assert found == expected
    assert "Failed to convert" not in done.stdout + done.stderr
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == sum(expected, [])
