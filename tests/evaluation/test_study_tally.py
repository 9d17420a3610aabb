"""From answer files to the tables: right numbers, and clear words about files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from minigpt5.evaluation.study.__main__ import main
from minigpt5.evaluation.study.answers import read_key
from minigpt5.evaluation.study.design import ANSWERS_FORMAT, QUESTIONS, TIE, Key
from tests.helpers.study_runs import make_row, write_run


def make_study(tmp_path: Path, *names: str, num_items: int = 4, pairs: str = "all") -> Path:
    rows = [make_row(f"row-{number}", ["Once"]) for number in range(num_items)]
    runs = [f"{name}={write_run(tmp_path / name, rows)}" for name in names]
    main(["make", *runs, "--out", str(tmp_path / "study.html"), "--seed", "1", "--pairs", pairs])
    return tmp_path / "study.key.json"


def answer(key: Key, path: Path, rater: str, preferred: list[str], *, most: int | None = None) -> Path:
    """Answers of a rater who prefers runs in this order; a run that is not in the order ties."""

    def choose(pair: tuple[str, str]) -> str:
        ranks = {
            name: preferred.index(key.candidates[name].run) for name in pair if key.candidates[name].run in preferred
        }
        return min(ranks, key=lambda name: ranks[name]) if len(ranks) == 2 else TIE

    answers = [
        {"comparison": id, "left": pair[1], "right": pair[0], "choices": dict.fromkeys(QUESTIONS, choose(pair))}
        for id, pair in list(key.comparisons.items())[:most]
    ]
    path.write_text(json.dumps({"format": ANSWERS_FORMAT, "study": key.study, "rater": rater, "answers": answers}))
    return path


def test_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key_file = make_study(tmp_path, "ours", "theirs")
    key = read_key(key_file)
    files = [
        answer(key, tmp_path / "1.json", "r1", ["ours", "theirs"]),
        answer(key, tmp_path / "2.json", "r2", ["ours", "theirs"]),
        answer(key, tmp_path / "3.json", "r3", ["theirs", "ours"], most=2),
        answer(key, tmp_path / "4.json", "r4", [], most=2),
    ]
    capsys.readouterr()
    main(["tally", str(key_file), *map(str, files), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "tally.json").read_text())
    assert [(one["question"], one["first"], one["second"]) for one in found["pairs"]] == [
        (question, "ours", "theirs") for question in QUESTIONS
    ]
    for one in found["pairs"]:  # 2 raters of 4 items, and 2 of 2
        assert [one[share]["value"] for share in ("wins", "ties", "losses")] == pytest.approx([8 / 12, 2 / 12, 2 / 12])
        assert one["wins"]["low"] < 8 / 12 < one["wins"]["high"] and one["num_votes"] == 12
    assert (
        "| Language continuity | ours | theirs | 66.7% [" in said
        and (tmp_path / "out" / "tally.md").read_text() in said
    )
    assert "Rater r3 answered 6 of 12 questions" in said and "Rater r1 " not in said
    assert found["scores"] == {} and "Bradley" not in said
    svg = ElementTree.parse(tmp_path / "out" / "tally.svg").getroot()
    drawn = " ".join(text.text or "" for text in svg.iter("{http://www.w3.org/2000/svg}text"))
    assert "Image quality" in drawn and "ours" in drawn and "67%" in drawn


def test_three_runs_are_ranked_by_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key_file = make_study(tmp_path, "a", "b", "c")
    key = read_key(key_file)
    files = [answer(key, tmp_path / f"{number}.json", f"r{number}", ["c", "a", "b"]) for number in range(3)]
    capsys.readouterr()
    main(["tally", str(key_file), *map(str, files), "--out", str(tmp_path / "out"), "--resamples", "200"])
    found = json.loads((tmp_path / "out" / "tally.json").read_text())
    for question in QUESTIONS:
        scores = {run: one["value"] for run, one in found["scores"][question].items()}
        assert scores["c"] > scores["a"] > scores["b"] and sum(scores.values()) == pytest.approx(0, abs=1e-9)
    assert {one["alpha"] for one in found["pairs"]} == {None}, "all raters say the same"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| Image quality | ")]
    assert [line.split(" | ")[1] for line in lines[-3:]] == ["c", "a", "b"]


def test_alpha_is_said_to_be_undefined_for_one_rater(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key_file = make_study(tmp_path, "a", "b")
    file = answer(read_key(key_file), tmp_path / "1.json", "r1", ["a", "b"])
    main(["tally", str(key_file), str(file)])
    said = capsys.readouterr().out
    assert "| not defined |" in said
    assert "| a | b | 100.0% | 0.0% | 0.0% | 4 | not defined |" in said  # and no interval that holds for certain


def broken(change: str, found: dict[str, Any]) -> dict[str, Any]:
    first = found["answers"][0]
    changes: dict[str, dict[str, Any]] = {
        "study": {"study": "other"},
        "format": {"format": "minigpt5-study-key-1"},
        "no rater": {"rater": ""},
        "no answer": {"answers": []},
        "no choice": {"answers": [first | {"choices": {}}]},
        "twice": {"answers": [first, first]},
        "comparison": {"answers": [first | {"comparison": "c99"}]},
        "no name": {"answers": [first | {"comparison": ["c1"]}]},
        "choice": {"answers": [first | {"choices": {"image": "s12345678"}}]},
        "question": {"answers": [first | {"choices": {"taste": TIE}}]},
        "no object": {"answers": ["c1"]},
    }
    return found | changes[change]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("study", "answers the study 'other', and the key is of"),
        ("format", "holds no answers to a study"),
        ("no rater", "names no rater"),
        ("no answer", "holds no answer: leave it out"),
        ("no choice", "holds no answer: leave it out"),
        ("twice", "answers 'c1' twice"),
        ("comparison", r"an answer that the study does not ask for \('c99'\)"),
        ("no name", "does not ask for"),
        ("choice", "'s12345678' for the question 'image' of 'c1'"),
        ("question", "for the question 'taste'"),
        ("no object", "does not ask for"),
    ],
)
def test_answers_that_do_not_fit_are_refused_by_name(tmp_path: Path, change: str, complaint: str) -> None:
    key_file = make_study(tmp_path, "a", "b", num_items=2)
    file = answer(read_key(key_file), tmp_path / "bad.json", "r1", ["a", "b"])
    file.write_text(json.dumps(broken(change, json.loads(file.read_text()))))
    with pytest.raises(SystemExit, match=f"error: {file}.*{complaint}"):
        main(["tally", str(key_file), str(file)])


def test_damaged_files_and_a_rater_twice_are_refused_by_name(tmp_path: Path) -> None:
    key_file = make_study(tmp_path, "a", "b", num_items=2)
    key = read_key(key_file)
    one, two = (answer(key, tmp_path / f"{name}.json", "r1", ["a", "b"]) for name in ("one", "two"))
    (tmp_path / "cut.json").write_text(one.read_text()[:40])
    (tmp_path / "cut-key.json").write_text(json.dumps({**json.loads(key_file.read_text()), "candidates": 7}))
    for words, complaint in (
        ([key_file, one, two], "two.json and .*one.json are both of the rater 'r1'"),
        ([key_file, tmp_path / "cut.json"], "cut.json is damaged"),
        ([key_file, tmp_path / "none.json"], "none.json cannot be read"),
        ([one, one], "one.json is no key"),
        ([tmp_path / "cut-key.json", one], "cut-key.json is a damaged key"),
    ):
        with pytest.raises(SystemExit, match=complaint):
            main(["tally", *map(str, words)])


def test_few_resamples_give_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tally", "key.json", "a.json", "--resamples", "1"])
    assert "1 gives no interval: at least 100" in capsys.readouterr().err
