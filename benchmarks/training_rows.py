"""The cost of a stored row, and the size of a reader, by the number of rows: the part `rows` of benchmarks.training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from batch_jobs.precompute import to_npy
from batch_jobs.prepare import GROUP_ROWS
from minigpt5.objective.stored_example import ROW_SCHEMA, SEGMENT

ROOT = Path(__file__).parent.parent
FILE_ROWS = 10_000
NUM_READ = 20_000
READER = """
import json, pickle, sys, time
from minigpt5.config import storybook
from training.data.stored import StoredExamples

uri, num_read, began = sys.argv[1], int(sys.argv[2]), time.perf_counter()
examples = StoredExamples(uri, storybook(), seed=1, stage="align")
opened_s = time.perf_counter() - began
sent = pickle.dumps(examples)
reader, began = pickle.loads(sent), time.perf_counter()  # as a data worker has it
for position in range(num_read):
    reader.example_at(len(reader) + position)
print(json.dumps({
    "us_per_row": 1e6 * (time.perf_counter() - began) / num_read,
    "opened_us_per_row": 1e6 * opened_s / (len(examples) + len(examples.held_out())),
    "sent_mib": len(sent) / 2**20,
}))
"""


def write_rows(folder: Path, num_rows: int) -> None:
    """Captions with encoded pictures of no size, which differ by their ids alone."""
    count = min(num_rows, FILE_ROWS)
    array = np.zeros((8, 2, 2), np.float16)
    picture = {"text": None, "moments": to_npy(array)}
    segments = pa.array([[{"text": "A red fox."}, picture]] * count, pa.list_(SEGMENT))
    (folder / "rows").mkdir(parents=True)
    for start in range(0, num_rows, count):
        ids = pa.array(np.arange(start, start + count)).cast(pa.string())
        columns = {"id": ids, "source": pa.nulls(count, pa.string()), "kind": pa.array(["caption"] * count)}
        columns |= {"prompt": pa.nulls(count, pa.string()), "segments": segments}
        path = folder / "rows" / f"{start:08d}.parquet"
        parquet.write_table(pa.table(columns, schema=ROW_SCHEMA), path, row_group_size=GROUP_ROWS)


def measure(folder: Path, num_rows: int) -> dict[str, float]:
    """Write rows, and read some of them in a process of its own."""
    write_rows(folder, num_rows)
    read = [sys.executable, "-c", READER, str(folder), str(min(NUM_READ, num_rows // 2))]
    return json.loads(subprocess.run(read, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
