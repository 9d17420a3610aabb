"""A model folder of a run -> a page that the engines which serve it write and draw."""

from __future__ import annotations

from pathlib import Path

PROMPT = "A fox who finds a red balloon"
NUM_PAGES, SEED = 2, 7


def write_sample(model: Path) -> bytes:
    """A story as HTML, always of the same prompt and seed."""
    from minigpt5.pipeline import MiniGPT5
    from minigpt5.story.export.html import to_html

    return to_html(MiniGPT5.from_pretrained(model).write(PROMPT, pages=NUM_PAGES, seed=SEED, progress=False)).encode()
