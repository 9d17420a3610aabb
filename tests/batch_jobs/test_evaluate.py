"""The evaluation job: rows are asked once, whatever dies; bad ones become errors; answers are measured."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from batch_jobs import evaluate, evaluation_rows, failpoints, measuring
from batch_jobs.asking import ANSWER_SCHEMA, Ask, answers_of, to_part
from batch_jobs.evaluation_rows import EVALUATION_ROW, Fetch, RowReader, blocks_of, open_rows
from batch_jobs.job import Output, work
from batch_jobs.measuring import MAX_JUDGE_FAILURES, Judging, measure, write_submission
from batch_jobs.monitor import Monitor
from batch_jobs.prepare import Part, write_part
from batch_jobs.report import Report
from batch_jobs.stages import Row
from minigpt5.errors import InvalidRequest, MiniGPT5Error, StorageError
from minigpt5.evaluation import judge as judge_module
from minigpt5.evaluation.judge import ASPECTS, Judge, JudgeError
from minigpt5.evaluation.protocols import items as items_module
from minigpt5.evaluation.protocols.protocol import Settings
from minigpt5.evaluation.protocols.scorers import Scorers
from minigpt5.evaluation.protocols.table import PROTOCOLS
from minigpt5.objective.stored_example import ROW_SCHEMA
from tests.evaluation.test_items import ISG, MMIE, OPENING
from tests.evaluation.test_judge import Server
from tests.helpers.evaluation_rows import PNG, row, story_row
from tests.helpers.fakes import make_png
from tests.helpers.painter import BREAKS, REFUSED, Painter, paint

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "models" / "storybook")
SETTINGS = Settings(seed=1)


def prepared(folder: Path, *rows: dict[str, Any]) -> str:
    """Rows in two files of groups of two, as `batch_jobs.prepare` lays them out."""
    (folder / "rows").mkdir(parents=True)
    empty = {"moments": None, "features": None}
    stored = [
        {name: one[name] for name in ROW_SCHEMA.names} | {"segments": [part | empty for part in one["segments"]]}
        for one in rows
    ]
    half = (len(stored) + 1) // 2
    for number, some in enumerate((stored[:half], stored[half:])):
        table = pa.Table.from_pylist(some, schema=ROW_SCHEMA)
        parquet.write_table(table, folder / "rows" / f"part-{number}.parquet", row_group_size=2)
    return str(folder)


def captions(*texts: str) -> list[dict[str, Any]]:
    return [row("caption", text, make_png((number, 9, 9)), row_id=f"row-{number}") for number, text in enumerate(texts)]


class Run:
    """One protocol over one data set in this process, without Ray."""

    def __init__(self, folder: Path, protocol: str, data: str) -> None:
        self.protocol, self.folder, self.painter = PROTOCOLS[protocol], str(folder / "out"), Painter()
        self.source = open_rows(data)
        self.index = self.source.index()
        self.output = Output.at(f"{self.folder}/answers", ANSWER_SCHEMA, {"job": "evaluate", "protocol": protocol})

    def ask(self, *, dies_after: int | None = None) -> Report:
        stage = Ask(lambda: self.painter, protocol=self.protocol.name, settings=SETTINGS, watch=Monitor())

        def make(rows: list[evaluate.Asked], report: Report) -> Iterator[Row]:
            blocks = blocks_of(self.index, [one.id for one in rows])
            for number, table in enumerate(Fetch(source=self.source).tables(blocks)):
                if number == dies_after:
                    raise RuntimeError("the cluster is gone")
                for answered in stage(table):
                    yield from answered.to_pylist()

        return work([evaluate.Asked(one) for one in self.index], self.output, make, say=lambda line: None)

    def measure(self, judging: Judging | None = None) -> dict[str, Any]:
        return measure(
            self.protocol,
            Scorers(absent={"clip": "name a CLIP model with --clip"}),
            self.output.sink,
            RowReader(self.source, self.index),
            self.folder,
            settings=SETTINGS,
            about={"system": {"name": "painter", "version": "1"}, "data": "rows"},
            judging=judging,
        )

    def rows(self) -> dict[str, Row]:
        return {one["id"]: one for one in self.output.sink.rows()}


def test_rows_become_answers_and_bad_ones_errors(tmp_path: Path) -> None:
    rows = [*captions("a fox", REFUSED, BREAKS, "an owl"), row("dialogue", "Hello.", "Hi.", row_id="other")]
    run = Run(tmp_path, "cc3m", prepared(tmp_path / "data", *rows))
    report = run.ask()
    assert (report.rows, report.stories, report.pictures) == (5, 2, 2)
    assert report.kinds == {"input": 2, "answering": 1}
    found = run.rows()
    assert found["row-1"]["error"] == "this is refused" and found["row-2"]["error"] == "answering failed: out of paint"
    assert found["other"]["error"].startswith("kind is 'dialogue' but cc3m asks rows of caption")
    (picture,) = answers_of(found["row-0"])["picture"]
    assert not isinstance(picture, str) and picture.size == (16, 16)
    metrics = run.measure()
    assert metrics["rows"] == {"asked": 5, "measured": 2, "errors": 3}
    assert metrics["errors"]["this is refused"] == 1 and set(metrics["missing"]) >= {"clip_i", "clip_t", "fid"}


def test_a_run_that_was_killed_asks_what_is_left(tmp_path: Path) -> None:
    data = prepared(tmp_path / "data", *captions("a", "b", "c", "d", "e"))
    first = Run(tmp_path, "cc3m", data)
    with pytest.raises(RuntimeError, match="the cluster is gone"):
        first.ask(dies_after=3)
    assert len(first.rows()) == 3 and len(first.painter.asked) == 3
    second = Run(tmp_path, "cc3m", data)
    report = second.ask()
    assert (report.skipped, report.done) == (3, 2)
    assert [one.context for one in second.painter.asked] == [("d",), ("e",)]
    whole = Run(tmp_path / "whole", "cc3m", data)
    whole.ask()
    keys = ("answers", "error")
    assert {name: [one[key] for key in keys] for name, one in second.rows().items()} == {
        name: [one[key] for key in keys] for name, one in whole.rows().items()
    }
    third = Run(tmp_path, "cc3m", data)
    assert third.ask().done == 0 and not third.painter.asked
    assert third.measure()["metrics"] == whole.measure()["metrics"]


def test_a_row_with_two_files_of_one_id_is_asked_once(tmp_path: Path) -> None:
    rows = captions("a", "b", "c")
    rows[2]["id"] = "row-0"
    run = Run(tmp_path, "cc3m", prepared(tmp_path / "data", *rows))
    assert run.ask().rows == 2
    assert [one.context for one in run.painter.asked] == [("a",), ("b",)]


def test_the_questions_of_a_long_row_are_asked_in_parts(tmp_path: Path) -> None:
    asked: list[int] = []

    class Counting(Painter):
        def answer(self, questions: Any) -> Any:
            asked.append(len(questions))
            return super().answer(questions)

    stage = Ask(Counting, protocol="vist", settings=SETTINGS, watch=Monitor())
    answered = stage.ask(story_row(9))
    assert asked == [32, 9] and len(answered["answers"]) == 41 and answered["num_pictures"] == 33


def test_a_report_and_metrics_lie_in_the_output(tmp_path: Path) -> None:
    talk = row("dialogue", "Hello.", "Can I see it?", "Here.", PNG, row_id="talk")
    run = Run(tmp_path, "mmdialog", prepared(tmp_path / "data", talk))
    run.ask()
    run.measure()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    found = {one["metric"]: one["mean"] for one in metrics["metrics"]}
    assert found["draw_precision"] == 1 and found["draw_recall"] == 1 and found["rouge_l"] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Precision of drawing" in page and "name a CLIP model with --clip" in page


# Items of benchmarks


def items(folder: Path) -> str:
    folder.mkdir()
    for name in ("images/Report/5-i-1.png", "images/0.png", "images/1.png", "images/0000_q1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)
    lost = {**MMIE, "id": "lost", "question": [{"text": "draw", "image": "../outside.png"}]}
    (folder.parent / "outside.png").write_bytes(PNG)
    opening: Any = copy.deepcopy(OPENING)
    isg: Any = copy.deepcopy(ISG)
    opening["conversations"][0]["input"][1]["text"] = "Then draw it."
    isg["Query"][0]["content"] = "Let me see two."
    (folder / "items.jsonl").write_text("\n".join(json.dumps(one) for one in (opening, MMIE, isg, lost)))
    return str(folder / "items.jsonl")


def test_answers_are_submitted_in_the_forms_of_their_benchmarks(tmp_path: Path) -> None:
    run = Run(tmp_path, "interleave", items(tmp_path / "bench"))
    assert run.ask().kinds == {"input": 1}
    assert "leads out of" in run.rows()["lost"]["error"]
    folder = Path(write_submission(run.output.sink, RowReader(run.source, run.index), run.folder, model="painter"))
    opening = json.loads((folder / "opening" / "painter_output" / "0302005.json").read_text())
    assert opening["conversations"][1]["output"] == [{"text": "Then draw it.", "image": "0302005-o-0.jpg"}]
    (mmie,) = json.loads((folder / "mmie" / "data.json").read_text())
    assert mmie["model"] == "painter" and mmie["answer"] == [{"text": "What comes next?", "image": None}]
    (isg,) = [json.loads(line) for line in (folder / "isg" / "output.jsonl").read_text().splitlines()]
    assert isg["id"] == "0000" and isg["output"] == [
        {"type": "text", "content": "Let me see two."},
        {"type": "image", "content": "images/0000-1.png"},
    ]
    with Image.open(folder / "isg" / "images" / "0000-1.png") as picture:
        assert picture.tobytes() == paint("Let me see two.").tobytes()
    with Image.open(folder / "opening" / "painter_output" / "0302005-o-0.jpg") as picture:
        assert (picture.format, picture.size) == ("JPEG", (16, 16))
    metrics = {one["metric"]: one["mean"] for one in run.measure()["metrics"]}
    assert metrics["no_picture"] == pytest.approx(1 / 3) and metrics["no_text"] == 0
    assert metrics["structure"] == pytest.approx(1 / 3), "MMIE's answer is a text alone"


def test_a_judge_is_asked_once_about_each_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "PAUSE_S", 0.0)
    run = Run(tmp_path, "interleave", items(tmp_path / "bench"))
    run.ask()
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    marks = json.dumps(dict.fromkeys(ASPECTS, 3))
    judging = Judging(judge=Judge(url=server.url, model="org/critic"), limit=2)
    server.answers = [(200, marks), (401, "no")]
    measured = run.measure(judging)
    assert [one["n"] for one in measured["metrics"] if one["metric"] == "judge"] == [1]
    ((reason, count),) = measured["unjudged"].items()
    assert "HTTP Error 401" in reason and count == 1
    with monkeypatch.context() as strict:
        strict.setattr(measuring, "MAX_JUDGE_FAILURES", 0)
        server.answers = [(401, "no")]
        with pytest.raises(JudgeError, match="1 answers were not judged, the same command asks again"):
            run.measure(judging)
    server.answers = [(200, marks)]
    found = {one["metric"]: one for one in run.measure(judging)["metrics"]}
    assert (found["judge"]["mean"], found["judge"]["n"], len(server.asked)) == (3, 2, 4)
    assert found["judge/helpfulness"]["mean"] == 3 and MAX_JUDGE_FAILURES == 5
    server.shutdown()
    server.server_close()


def test_a_question_with_a_damaged_picture_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that reads no pictures has answered it."""
    run = Run(tmp_path, "interleave", items(tmp_path / "bench"))
    run.ask()
    (tmp_path / "bench" / "images" / "0.png").write_bytes(b"broken")
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.answers = [(200, json.dumps(dict.fromkeys(ASPECTS, 3)))] * 2
    measured = run.measure(Judging(judge=Judge(url=server.url, model="critic"), limit=3))
    assert [one["n"] for one in measured["metrics"] if one["metric"] == "judge"] == [2]
    ((reason, count),) = measured["unjudged"].items()
    assert "picture" in reason and count == 1
    monkeypatch.setattr(measuring, "MAX_JUDGE_FAILURES", 0)  # it would be damaged for ever
    assert run.measure(Judging(judge=Judge(url=server.url, model="critic"), limit=3))["unjudged"] == {reason: 1}
    server.shutdown()
    server.server_close()


def test_a_judge_sees_small_pictures_and_no_more_than_are_sent() -> None:
    large = io.BytesIO()
    Image.new("RGB", (600, 300), "red").save(large, "PNG")
    picture = {"text": None, "picture": large.getvalue()}
    parts = measuring.question_parts({"segments": [{"text": "Look.", "picture": None}, *[picture] * 25]})
    assert parts[0] == "Look." and len(parts) == 1 + 20
    assert {part.size for part in parts[1:]} == {(512, 256)}  # type: ignore[union-attr]


def test_a_file_of_items_is_read_to_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, lengths = items(tmp_path / "bench"), list[int]()
    parse = evaluation_rows.parse_items

    def parse_and_count(data: bytes, *, name: str) -> Any:
        lengths.append(len(data))
        return parse(data, name=name)

    monkeypatch.setattr(evaluation_rows, "parse_items", parse_and_count)
    for module in (evaluation_rows, items_module):
        monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    evaluation_rows._items.cache_clear()
    with pytest.raises(InvalidRequest, match="more than 100 bytes: split it"):
        open_rows(place).index()
    assert lengths == [101]


# Rows


def test_a_place_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no rows"):
        open_rows(str(tmp_path))
    (tmp_path / "rows").mkdir()
    parquet.write_table(pa.table({"id": ["a"]}), tmp_path / "rows" / "part-0.parquet")
    source = open_rows(str(tmp_path))
    (block,) = source.index().values()
    with pytest.raises(StorageError, match="has no kind, prompt, segments, source"):
        source.load(block)
    (tmp_path / "rows" / "part-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageError, match="cannot be read"):
        source.index()


def test_other_rows_have_another_digest(tmp_path: Path) -> None:
    one, same = (open_rows(prepared(tmp_path / name, *captions("a"))).digest() for name in ("one", "same"))
    assert one == same != open_rows(prepared(tmp_path / "more", *captions("a", "b"))).digest()
    sizes, digests = set(), set()
    for name, texts in (("other", ("a red fox", "an owl")), ("texts", ("a big dog", "my owl"))):
        place = prepared(tmp_path / name, *captions(*texts))
        sizes.add(sum(path.stat().st_size for path in Path(place).rglob("*.parquet")))
        digests.add(open_rows(place).digest())
    assert len(sizes) == 1 and len(digests) == 2, "files of one size with other texts"


def test_rows_of_the_picture_world_are_read(tmp_path: Path) -> None:
    part = Part(number=0, file="", start=0, count=3)
    write_part(part, layout="storybook:story", uri="", output=str(tmp_path), seed=1)
    source = open_rows(str(tmp_path))
    reader = RowReader(source, source.index())
    asked = reader["story-1-2"]
    assert set(asked) == set(EVALUATION_ROW.names) and asked["source"] == "storybook:story" and asked["prompt"]
    assert PROTOCOLS["story"].ask(asked, SETTINGS)


def test_parts_are_stored_without_loss() -> None:
    picture = paint("a")
    words, again = answers_of({"answers": [{"key": "a", "parts": [to_part("x"), to_part(picture)]}]})["a"]
    assert words == "x" and not isinstance(again, str) and again.tobytes() == picture.tobytes()


# The command


def command(*words: str) -> argparse.Namespace:
    return evaluate.make_parser().parse_args([*words])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--guidance", "30"], "--guidance is 30"),
        (["--judge", "http://127.0.0.1/v1"], "--judge needs the protocol interleave"),
        (["--clip", "/nowhere/clip"], "/nowhere/clip"),
        (["--inception", "/nowhere/i.xml"], "there is no file /nowhere/i.xml"),
        (["--model", "/nowhere/model"], "/nowhere/model is not a model folder"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    tmp_path: Path, words: list[str], reason: str
) -> None:
    data = prepared(tmp_path / "data", *captions("a"))
    options = command("cc3m", "--data", data, "--out", str(tmp_path / "out"), "--model", MODEL, *words)
    with pytest.raises(MiniGPT5Error, match=reason):
        evaluate.run(options, failpoints.no_failpoint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--limit", "--judge-limit"])
def test_a_limit_is_a_number_from_1(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for number in ("0", "-1"):
        with pytest.raises(SystemExit):
            command("cc3m", "--data", "rows", "--out", "out", option, number)
        assert f"{number} but must be 1 or more" in capsys.readouterr().err


def test_a_system_that_does_not_answer_a_protocol_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = evaluate.read_system(MODEL)
    silent = dataclasses.replace(info, kinds=frozenset({"text"}))
    monkeypatch.setattr(evaluate, "read_system", lambda folder, draw: silent)
    options = command("vist", "--data", "rows", "--out", str(tmp_path / "out"))
    with pytest.raises(InvalidRequest, match="vist asks for picture, which storybook does not answer"):
        evaluate.run(options, failpoints.no_failpoint)


def test_rivals_of_one_model_folder_are_not_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info, plans = evaluate.read_system(MODEL), list[dict[str, Any]]()

    def take_plan(rows: list[evaluate.Asked], output: Output, make: Any, **options: Any) -> Report:
        plans.append(output.plan)
        return Report(left=len(rows))

    monkeypatch.setattr(evaluate, "work", take_plan)
    options = command("cc3m", "--data", prepared(tmp_path / "data", *captions("a")), "--out", str(tmp_path / "out"))
    for kind in (None, "gill", "divter"):
        one = dataclasses.replace(info, kind=kind)
        monkeypatch.setattr(evaluate, "read_system", lambda folder, draw, one=one: one)
        evaluate.run(options, failpoints.no_failpoint)
    ours, gill, divter = plans
    assert ours != gill != divter and gill | {"kind": "divter"} == divter


def story_data(folder: Path, kind: str, count: int) -> str:
    write_part(
        Part(number=0, file="", start=0, count=count), layout=f"storybook:{kind}", uri="", output=str(folder), seed=7
    )
    return str(folder)


@pytest.mark.cluster
@pytest.mark.slow
def test_the_shipped_model_is_measured_on_ray(tmp_path: Path) -> None:
    import ray

    try:
        data = story_data(tmp_path / "data", "caption", 2)
        words = ["cc3m", "--data", data, "--model", MODEL, "--out", str(tmp_path / "out"), "--steps", "1"]
        assert evaluate.main(words) == 0
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        found = {one["metric"]: one for one in metrics["metrics"]}
        assert found["lpips"]["n"] == 2 and 0 < found["lpips"]["mean"] < 1.5 and found["fact_accuracy"]["n"] == 2
        assert set(metrics["missing"]) == {"clip_i", "clip_t", "fid", "fid_published", "inception_score"}
        assert metrics["draw"]["steps"] == 1 and metrics["system"]["name"] == "storybook"
        before = (tmp_path / "out" / "metrics.json").read_bytes()
        assert evaluate.main(words) == 0, "measured again, asked nothing"
        assert (tmp_path / "out" / "metrics.json").read_bytes() == before
    finally:
        ray.shutdown()


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "kind"), [("vist", "story"), ("mmdialog", "dialogue"), ("story", "story")])
def test_every_protocol_runs_with_the_shipped_model(tmp_path: Path, protocol: str, kind: str) -> None:
    data = story_data(tmp_path / "data", kind, 8)  # the first dialogues have no picture, and no row
    words = [protocol, "--data", data, "--model", MODEL, "--out", str(tmp_path / "out"), "--steps", "1"]
    assert evaluate.main([*words, "--limit", "2"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["rows"]["measured"] == 2 and metrics["metrics"]


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("point", ["mid-row", "part-hidden", "part-written"])
def test_a_process_may_be_killed_at_any_point(tmp_path: Path, point: str) -> None:
    """In the actor a death costs nothing; in the driver the same command goes on."""
    data = story_data(tmp_path / "data", "caption", 4)
    words = ["cc3m", "--data", data, "--model", MODEL, "--steps", "1", "--flush-seconds", "1"]

    def run(out: Path, more: dict[str, str]) -> int:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
        asked = [sys.executable, "-m", "batch_jobs.evaluate", *words, "--out", str(out)]
        return subprocess.run(asked, env=environment, capture_output=True).returncode

    code = run(tmp_path / "out", {failpoints.VARIABLE: f"{point}:{tmp_path / 'marker'}"})
    assert (tmp_path / "marker").exists() and code == (0 if point == "mid-row" else -signal.SIGKILL)
    assert run(tmp_path / "out", {}) == 0 and run(tmp_path / "whole", {}) == 0
    one, other = (leaves(json.loads((tmp_path / name / "metrics.json").read_text())) for name in ("out", "whole"))
    assert one.keys() == other.keys()
    for path, value in one.items():  # in another batch a pixel may be one level off
        assert value == (pytest.approx(other[path], rel=1e-3) if isinstance(value, float) else other[path]), path


def leaves(value: Any, at: str = "") -> dict[str, Any]:
    """The values of nested JSON by their paths."""
    if not isinstance(value, dict | list):
        return {at: value}
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: leaf for key, one in inner for path, leaf in leaves(one, f"{at}/{key}").items()}
