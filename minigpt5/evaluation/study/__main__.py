"""A human study of two or more bulk runs.

`make` turns runs into a page for raters and a key; `tally` turns the key and the raters' answers into a result.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minigpt5.errors import MiniGPT5Error
from minigpt5.evaluation.study.answers import read_key, read_votes
from minigpt5.evaluation.study.design import PAIRINGS, PICTURE_PX, make_design
from minigpt5.evaluation.study.page import write_study
from minigpt5.evaluation.study.runs import find_common, open_runs
from minigpt5.evaluation.study.statistics import MIN_RESAMPLES, NUM_RESAMPLES
from minigpt5.evaluation.study.tally import count, to_markdown, write_tally


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minigpt5.evaluation.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    makes = commands.add_parser("make", help="runs -> a page for raters, and a key")
    makes.add_argument(
        "runs", nargs="+", metavar="RUN", help="an --output of batch_jobs.illustrate: a folder or URI, or NAME=PLACE"
    )
    makes.add_argument("--out", type=Path, required=True, help="FILE.html, or a folder for a web server")
    makes.add_argument("--items", type=_positive, help="rows to draw at random (default: all that the runs share)")
    makes.add_argument("--seed", type=int, help="of the draw; the key keeps it (default: a new one each time)")
    makes.add_argument(
        "--pairs",
        choices=PAIRINGS,
        default="balanced",
        help="for more than two runs: one pair an item in turn, all pairs on each item, or the first run with each",
    )
    makes.add_argument("--picture-px", type=_positive, default=PICTURE_PX, help="longest side (default %(default)s)")
    tallies = commands.add_parser("tally", help="a key and answers -> win rates, scores, agreement")
    tallies.add_argument("key", type=Path, metavar="KEY")
    tallies.add_argument("answers", type=Path, nargs="+", metavar="ANSWERS")
    tallies.add_argument("--out", type=Path, help="a folder for tally.md, tally.json and tally.svg")
    tallies.add_argument("--resamples", type=_many, default=NUM_RESAMPLES, help="default %(default)s")
    tallies.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    options = parser.parse_args(arguments)
    try:
        {"make": _make, "tally": _tally}[options.command](options)
    except MiniGPT5Error as error:
        sys.exit(f"error: {error}")


def _make(options: argparse.Namespace) -> None:
    runs = open_runs(options.runs)
    common = find_common(runs)
    design = make_design(
        runs,
        common,
        num_items=options.items,
        pairing=PAIRINGS[options.pairs],
        seed=options.seed,
        picture_px=options.picture_px,
    )
    page, key = write_study(design, options.out)
    num_items = len({one.item for one in design.key.candidates.values()})
    print(f"{page}: study {design.key.study}, {num_items} items, {len(design.key.comparisons)} comparisons")
    print(f"{key}: the key, which is not for raters")
    if options.items and options.items > num_items:
        print(f"--items asks for {options.items}, and the runs share {num_items}")
    for reason, counts in design.key.left_out.items():
        for run, rows in counts.items():
            if rows:
                print(f"left out: {rows} rows that {run} {'lacks' if reason == 'missing' else 'failed at'}")


def _tally(options: argparse.Namespace) -> None:
    key = read_key(options.key)
    tally = count(key, read_votes(key, options.answers), num_resamples=options.resamples, seed=options.seed)
    print(to_markdown(tally), end="")
    for path in write_tally(tally, options.out) if options.out else []:
        print(path)


def _many(text: str) -> int:
    if (number := _positive(text)) < MIN_RESAMPLES:
        raise argparse.ArgumentTypeError(f"{number} gives no interval: at least {MIN_RESAMPLES}")
    return number


def _positive(text: str) -> int:
    if not text.isdecimal() or not (number := int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return number


if __name__ == "__main__":
    main()
