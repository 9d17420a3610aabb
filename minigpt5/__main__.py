"""`python -m minigpt5 "A fox who finds a balloon"`: a story without a server, as an HTML storybook.

Without a prompt it says what the model is for, and what to try.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import get_args

from minigpt5.commands import check_default_model
from minigpt5.config import default_model_folder
from minigpt5.engine.prompts import check_text
from minigpt5.errors import InvalidRequest, MiniGPT5Error
from minigpt5.model.folder_config import load_config
from minigpt5.model.locate import locate
from minigpt5.story.export.book_file import check_place
from minigpt5.types import MAX_PAGES, MAX_SIDE, MIN_SIDE, Consistency, PageDone, StoryEvent, TextDelta

PROGRAM = "python -m minigpt5"


class Teller:
    """Shows a story on a terminal while it is written; pictures are said to be done between pages."""

    def __init__(self) -> None:
        self._page = 0
        self._finished: list[str] = []

    def tell(self, event: StoryEvent) -> None:
        if isinstance(event, TextDelta):
            if event.page != self._page:
                self._end_page()
                self._page = event.page
                print(f"[{event.page}] ", end="")
            print(event.text, end="", flush=True)
        elif isinstance(event, PageDone):
            page = event.page
            outcome = f"has no picture: {page.error}" if page.error else "is drawn"
            self._finished.append(f"    page {page.index} {outcome}")

    def end(self) -> None:
        self._end_page()

    def _end_page(self) -> None:
        if self._page:
            print()
        for line in self._finished:
            print(line)
        self._finished.clear()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("prompt", nargs="?", help="what the story is about; else $MINIGPT5_PROMPT")
    parser.add_argument("--pages", type=int, default=4, help=f"1 to {MAX_PAGES} (default %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="the same seed, the same story (default %(default)s)")
    low, high = MIN_SIDE, MAX_SIDE
    parser.add_argument(
        "--width", type=int, default=0, help=f"of a picture, {low} to {high} pixels (default: the model's)"
    )
    parser.add_argument("--height", type=int, default=0, help="as --width")
    parser.add_argument(
        "--consistency",
        choices=get_args(Consistency),
        help="story: pages are drawn with the first one beside them (default: the model's)",
    )
    parser.add_argument("--out", default="story.html", help="the storybook: .html, .epub or .pdf (default %(default)s)")
    parser.add_argument(
        "--model", default=str(default_model_folder()), help="model folder, URI or hub id (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    prompt = options.prompt if options.prompt is not None else os.environ.get("MINIGPT5_PROMPT", "")
    try:
        if not prompt.strip():
            print(describe(options.model), file=sys.stderr)
        print(
            write(
                prompt,
                pages=options.pages,
                seed=options.seed,
                out=options.out,
                model=options.model,
                width=options.width,
                height=options.height,
                consistency=options.consistency,
            )
        )
    except MiniGPT5Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def describe(model: str) -> str:
    """Text for a person who gave no prompt: the model's name, what it is for, and commands to try."""
    check_default_model(model)
    config = load_config(locate(model))
    commands = "".join(f"\n  {PROGRAM} {shlex.quote(prompt)}" for prompt in config.examples)
    return f"{config.name}: {config.about or 'its folder does not say what it is for'}" + (
        f"\nTry one of these:{commands}" if commands else ""
    )


def write(
    prompt: str,
    *,
    pages: int,
    seed: int,
    out: str,
    model: str,
    width: int = 0,
    height: int = 0,
    consistency: Consistency | None = None,
) -> str:
    """Write the storybook and return its path. What can be refused at once is, before the model is loaded."""
    if not prompt.strip():
        raise InvalidRequest("prompt", "prompt is empty: say what the story is about")
    check_text("prompt", prompt)
    if not 1 <= pages <= MAX_PAGES:
        raise InvalidRequest("pages", f"pages is {pages} but must be from 1 to {MAX_PAGES}")
    if seed < 0:
        raise InvalidRequest("seed", f"seed is {seed} but must be 0 or more")
    check_place(out)
    check_default_model(model)
    config = load_config(locate(model))
    if config.summary:
        print(config.summary, file=sys.stderr)
    draw = config.draw_settings({"width": width, "height": height})
    consistency = config.consistency_of(consistency)
    if config.is_resampled(draw):
        own = f"{config.drawn_px}x{config.drawn_px}"
        print(f"pictures are drawn in the model's own size, {own}, and resampled", file=sys.stderr)
    from minigpt5 import MiniGPT5

    teller = Teller()
    story = MiniGPT5.from_pretrained(model).write(
        prompt, pages=pages, seed=seed, draw=draw, consistency=consistency, on_event=teller.tell, progress=False
    )
    teller.end()
    return story.save(out)


if __name__ == "__main__":
    sys.exit(main())
