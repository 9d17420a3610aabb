"""The command `minigpt5-illustrate`."""

from __future__ import annotations

from minigpt5.commands import MODULES, needs_extra


def illustrate() -> int:
    with needs_extra("minigpt5-illustrate", "batch", modules=MODULES["batch"], ray="Ray Data"):
        from batch_jobs.illustrate import main

        return main()
