"""The command `minigpt5-client`. `minigpt5-serve` is `__main__.py`: both can say that their extra is missing."""

from __future__ import annotations

from minigpt5.commands import needs_extra


def client() -> int:
    with needs_extra("minigpt5-client", "serve", modules=("httpx", "tqdm")):
        from deployments.client import main

        return main()
