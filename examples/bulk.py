"""Illustrate a file of prompts and read the result: `python examples/bulk.py [FOLDER]`.

The same command runs on a cluster through `ray job submit`, with URIs in the place of paths. A job that was stopped
resumes when it is started again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pyarrow import dataset

from batch_jobs import illustrate

if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "stories")
    folder.mkdir(exist_ok=True)
    rows = [
        {"id": "fox", "prompt": "A fox who finds a red balloon", "pages": 2, "seed": 7},  # is written and drawn
        {"id": "mine", "pages_text": ["A bear sits in the snow.", "It finds a key."]},  # its text stays, pictures come
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = illustrate.main([str(folder / "prompts.jsonl"), "--output", str(folder / "bulk"), "--books"])
    for story in dataset.dataset(folder / "bulk").to_table().to_pylist() if code == 0 else []:
        for page in story["pages"]:
            print(story["id"], page["index"], page["text"], f"({len(page['png'])} bytes of PNG)")
    sys.exit(code)
