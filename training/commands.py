"""The command `minigpt5-train`."""

from __future__ import annotations

from minigpt5.commands import MODULES, needs_extra


def train() -> int:
    """Run `training.train`. The whole extra is needed from the start: a worker would find out about DeepSpeed late."""
    with needs_extra("minigpt5-train", "train", modules=MODULES["train"], ray="Ray Train"):
        from training.train import main

        return main()
