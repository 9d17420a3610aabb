"""A key and the raters' files -> votes. A file that does not fit is an error that names it; nothing is passed over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt5.evaluation.study.design import ANSWERS_FORMAT, KEY_FORMAT, QUESTIONS, TIE, Candidate, Key
from minigpt5.evaluation.study.runs import StudyError

SEND_AGAIN = "ask the rater to download the answers once more, and leave the file as it is"


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One rater's answer to one question on two runs. `first` comes before `second` in the key's list of runs.

    Example: Vote(rater="r1", question="image", item="row-7", first="ours", second="theirs", winner="ours")
    """

    rater: str
    question: str
    item: str
    first: str
    second: str
    winner: str | None
    """A run; None for a tie."""


def read_key(path: Path) -> Key:
    """Raises StudyError where the file is no key."""
    found = _read_json(path, "name the .key.json file that `make` wrote beside the page")
    if found.get("format") != KEY_FORMAT:
        raise StudyError(f"{path} is no key of a study: name the .key.json file that `make` wrote beside the page")
    try:
        return Key(
            study=str(found["study"]),
            seed=int(found["seed"]),
            runs=[str(run) for run in found["runs"]],
            candidates={name: Candidate(**one) for name, one in found["candidates"].items()},
            comparisons={id: (pair[0], pair[1]) for id, pair in found["comparisons"].items()},
            left_out=found["left_out"],
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StudyError(f"{path} is a damaged key ({error!r}): take the file as `make` wrote it") from error


def read_votes(key: Key, paths: Sequence[Path]) -> list[Vote]:
    """Read all answer files. Raises StudyError for a damaged or foreign file, and for a rater who is there twice."""
    votes: list[Vote] = []
    raters: dict[str, Path] = {}
    for path in paths:
        found = _read_json(path, SEND_AGAIN)
        if found.get("format") != ANSWERS_FORMAT:
            raise StudyError(f"{path} holds no answers to a study: name the files that the raters downloaded")
        if found.get("study") != key.study:
            raise StudyError(
                f"{path} answers the study {found.get('study')!r}, and the key is of {key.study!r}: "
                "tally it with its own key"
            )
        rater = found.get("rater")
        if not isinstance(rater, str) or not rater:
            raise StudyError(f"{path} names no rater: {SEND_AGAIN}")
        if rater in raters:
            raise StudyError(
                f"{path} and {raters[rater]} are both of the rater {rater!r}: keep the later one; if they are two "
                "people, correct the name in one file"
            )
        raters[rater] = path
        votes += _read_rater(key, path, rater, found.get("answers"))
    return votes


def _read_rater(key: Key, path: Path, rater: str, answers: object) -> list[Vote]:
    if not isinstance(answers, list):
        raise StudyError(f"{path} holds no list of answers: {SEND_AGAIN}")
    votes: list[Vote] = []
    seen: set[str] = set()
    for answer in answers:
        comparison = answer.get("comparison") if isinstance(answer, dict) else None
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(comparison, str) or comparison not in key.comparisons or not isinstance(choices, dict):
            raise StudyError(f"{path} has an answer that the study does not ask for ({comparison!r}): {SEND_AGAIN}")
        if comparison in seen:
            raise StudyError(f"{path} answers {comparison!r} twice: {SEND_AGAIN}")
        seen.add(comparison)
        votes += [_vote(key, path, rater, comparison, *choice) for choice in choices.items()]
    if not votes:
        raise StudyError(f"{path} holds no answer: leave it out, or {SEND_AGAIN}")
    return votes


def _vote(key: Key, path: Path, rater: str, comparison: str, question: str, choice: object) -> Vote:
    pair = key.comparisons[comparison]
    if question not in QUESTIONS or choice not in (*pair, TIE):
        raise StudyError(
            f"{path} has {choice!r} for the question {question!r} of {comparison!r}, which nobody could choose: "
            f"{SEND_AGAIN}"
        )
    first, second = sorted((key.candidates[name] for name in pair), key=lambda one: key.runs.index(one.run))
    winner = None if choice == TIE else key.candidates[str(choice)].run
    return Vote(rater=rater, question=question, item=first.item, first=first.run, second=second.run, winner=winner)


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): name a file that is there") from error
    except ValueError as error:
        raise StudyError(f"{path} is damaged, no JSON ({error}): {advice}") from error
    if not isinstance(found, dict):
        raise StudyError(f"{path} holds no JSON object: {advice}")
    return found
