"""A progress bar of a story, on a terminal or in a notebook."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from minigpt5.types import PageDone, Progress, SlotOpened, StoryEvent, StoryRequest, TextDelta


def is_watched() -> bool:
    """Tell whether a person sees the bar: stderr is a terminal, or this is a notebook's kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return sys.stderr.isatty() or (shell is not None and "IPKernelApp" in shell.config)


class StoryProgress:
    """Counts denoising steps, and says which page is written or drawn."""

    def __init__(self, *, pages: int, steps: int) -> None:
        """`steps`: of one picture."""
        from tqdm import TqdmWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmWarning)  # a notebook without widgets gets the bar in text
            from tqdm.auto import tqdm
        self._pages, self._steps = pages, steps
        self._done: dict[int, int] = {}
        self._bar: Any = tqdm(total=pages * steps, unit="step", desc="page 1: writing")

    def observe(self, event: StoryEvent) -> None:
        if isinstance(event, TextDelta):
            self._bar.set_description(f"page {event.page}: writing")
        elif isinstance(event, SlotOpened):
            self._bar.set_description(f"page {event.page}: drawing")
        elif isinstance(event, Progress):
            self._count(event.page, event.step)
        elif isinstance(event, PageDone):
            self._count(event.page.index, self._steps)

    def close(self) -> None:
        self._bar.close()

    def _count(self, page: int, step: int) -> None:
        """`step` of a page's picture is done."""
        self._bar.update(max(0, step - self._done.get(page, 0)))
        self._done[page] = max(step, self._done.get(page, 0))


@contextlib.contextmanager
def shown_progress(
    progress: bool | None, request: StoryRequest, on_event: Callable[[StoryEvent], None]
) -> Iterator[Callable[[StoryEvent], None]]:
    """Yield `on_event`, with a bar before it where `progress` says so, or is None and a person sees it."""
    if not (is_watched() if progress is None else progress):
        yield on_event
        return
    bar = StoryProgress(pages=request.pages, steps=request.draw.steps)

    def observe(event: StoryEvent) -> None:
        bar.observe(event)
        on_event(event)

    try:
        yield observe
    finally:
        bar.close()
