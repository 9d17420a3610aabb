"""Votes -> one result, as a Markdown table, JSON and a plot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from minigpt5.errors import StorageError
from minigpt5.evaluation.study.answers import Vote
from minigpt5.evaluation.study.design import QUESTIONS, Key
from minigpt5.evaluation.study.plot import plot
from minigpt5.evaluation.study.statistics import (
    LEVEL,
    NUM_RESAMPLES,
    Estimate,
    PairResult,
    compare_pairs,
    resample,
    score_runs,
)


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What a study found."""

    study: str
    runs: list[str]
    num_items: int
    num_comparisons: int
    votes_of_rater: dict[str, int]
    complete_votes: int
    """Votes of a rater who answered everything."""
    pairs: list[PairResult]
    scores: dict[str, dict[str, Estimate] | None]
    """Bradley-Terry scores by question and run, for more than two runs; None where the votes do not connect them."""
    left_out: dict[str, dict[str, int]]


def count(key: Key, votes: Sequence[Vote], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Tally:
    """Compute everything that `tally` reports. `seed` draws the bootstrap's resamples."""
    order = {question: number for number, question in enumerate(QUESTIONS)}
    votes = sorted(
        votes, key=lambda vote: (order[vote.question], key.runs.index(vote.first), key.runs.index(vote.second))
    )
    weights_SV = resample(votes, num_resamples=num_resamples, seed=seed)
    numbers = {
        question: [number for number, vote in enumerate(votes) if vote.question == question]
        for question in QUESTIONS
        if any(vote.question == question for vote in votes)
    }
    of_question = {question: [votes[number] for number in chosen] for question, chosen in numbers.items()}
    return Tally(
        study=key.study,
        runs=key.runs,
        num_items=len({one.item for one in key.candidates.values()}),
        num_comparisons=len(key.comparisons),
        votes_of_rater=dict(Counter(vote.rater for vote in votes)),
        complete_votes=len(key.comparisons) * len(QUESTIONS),
        pairs=compare_pairs(votes, weights_SV),
        scores={
            question: score_runs(chosen, key.runs, weights_SV[:, numbers[question]])
            for question, chosen in of_question.items()
            if len(key.runs) > 2
        },
        left_out=key.left_out,
    )


def write_tally(tally: Tally, out: Path) -> list[Path]:
    """Write tally.md, tally.json and tally.svg into a folder. Raises StorageError."""
    files = {
        "tally.md": to_markdown(tally),
        "tally.json": json.dumps(asdict(tally), indent=1) + "\n",
        "tally.svg": plot(tally.pairs, tally.scores),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (out / name).write_text(text)
    except OSError as error:
        raise StorageError(f"{out} cannot be written ({error.strerror}): name another folder") from error
    return [out / name for name in files]


def to_markdown(tally: Tally) -> str:
    """Tables of the win rates and, for more than two runs, of the scores; then what the raters answered."""
    lines = [
        f"Study {tally.study}: {_some(tally.num_items, 'item')}, {_some(tally.num_comparisons, 'comparison')}, "
        f"{_some(len(tally.votes_of_rater), 'rater')}. Intervals hold {LEVEL:.0%} of a bootstrap by item and rater; "
        "votes that are all alike, or one alone, have none.",
        "",
        "| question | first | second | first wins | tie | second wins | votes | alpha |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pair in tally.pairs:
        shares = " | ".join(_with_interval(one, ".1%") for one in (pair.wins, pair.ties, pair.losses))
        lines.append(
            f"| {QUESTIONS[pair.question][0]} | {pair.first} | {pair.second} | {shares} | {pair.num_votes} | "
            f"{'not defined' if pair.alpha is None else f'{pair.alpha:.2f}'} |"
        )
    if tally.scores:
        lines += ["", "| question | run | Bradley-Terry score |", "| --- | --- | --- |"]
    for question, scores in tally.scores.items():
        name = QUESTIONS[question][0]
        if scores is None:
            lines.append(f"| {name} | all | the votes do not connect all runs |")
            continue
        ranked = sorted(scores.items(), key=lambda pair: -pair[1].value)
        lines += [f"| {name} | {run} | {_with_interval(one, '+.2f')} |" for run, one in ranked]
    lines += ["", *_remarks(tally)]
    return "\n".join(lines).rstrip() + "\n"


def _remarks(tally: Tally) -> list[str]:
    """Say what is not in the tables: raters who stopped early, rows that were left out."""
    partial = {rater: votes for rater, votes in tally.votes_of_rater.items() if votes < tally.complete_votes}
    remarks = [
        f"- Rater {rater} answered {votes} of {tally.complete_votes} questions; they count."
        for rater, votes in partial.items()
    ]
    for reason, counts in tally.left_out.items():
        remarks += [f"- {run}: {rows} rows {reason}, not in the study." for run, rows in counts.items() if rows]
    return remarks


def _with_interval(one: Estimate, form: str) -> str:
    """The ends of a bootstrap of values that are all alike are that value: they say nothing of other votes."""
    return f"{one.value:{form}}" + ("" if one.low == one.high else f" [{one.low:{form}}, {one.high:{form}}]")


def _some(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
