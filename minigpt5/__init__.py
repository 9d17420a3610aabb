"""MiniGPT-5: a language model that writes and draws in one go.

from minigpt5 import MiniGPT5
story = MiniGPT5.from_pretrained("models/storybook").write("A fox who finds a balloon", pages=4, seed=7)
story.save("story.html")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minigpt5.pipeline import MiniGPT5

__all__ = ["MiniGPT5"]
__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    """Load the pipeline, and torch with it, only when it is asked for."""
    if name == "MiniGPT5":
        from minigpt5.pipeline import MiniGPT5

        return MiniGPT5
    raise AttributeError(f"module 'minigpt5' has no attribute {name!r}")
