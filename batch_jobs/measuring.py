"""Answers that lie in a job's output -> metrics.json, report.html, judgements and submissions beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from batch_jobs.asking import answers_of
from batch_jobs.evaluation_rows import Row, RowReader
from batch_jobs.outputs import RowSink
from minigpt5.errors import MiniGPT5Error
from minigpt5.evaluation.bootstrap import LEVEL, RESAMPLES
from minigpt5.evaluation.judge import MAX_PICTURES, Judge, JudgeError, judge, shrink
from minigpt5.evaluation.protocols.interleave import KEY
from minigpt5.evaluation.protocols.items import file_name, submit
from minigpt5.evaluation.protocols.measure import Measures
from minigpt5.evaluation.protocols.protocol import Protocol, Sample, Settings
from minigpt5.evaluation.protocols.report import to_html
from minigpt5.evaluation.protocols.scorers import Scorers
from minigpt5.evaluation.protocols.sheets import Sheets
from minigpt5.evaluation.systems.face import AnswerPart
from minigpt5.pictures import open_picture
from minigpt5.storage import open_place, read_json, write_whole

MAX_REASONS = 20
"""Kinds of errors that are listed."""
JUDGED_AT_ONCE = 4
MAX_JUDGE_FAILURES = 5


def measure(
    protocol: Protocol,
    scorers: Scorers,
    sink: RowSink,
    reader: RowReader,
    folder: str,
    *,
    settings: Settings,
    about: dict[str, Any],
    judging: Judging | None = None,
) -> dict[str, Any]:
    """Measure all answers; returns the content of metrics.json. Raises StorageError, JudgeError."""
    unjudged: Counter[str] = Counter()
    if judging:
        unjudged = judging.judge_all(sink, reader, folder)
        scorers.parts["judge"] = judging.judge
    measures, sheets = Measures(protocol, scorers, seed=settings.seed), Sheets(protocol, seed=settings.seed)
    measures.on_measured = sheets.add
    errors: Counter[str] = Counter()
    num_rows = num_measured = 0
    for stored in sink.rows():
        num_rows += 1
        if stored["error"] is not None:
            errors[stored["error"][:200]] += 1
            continue
        samples = protocol.collect(reader[stored["id"]], answers_of(stored))
        measures.add(judging.with_marks(samples, folder) if judging else samples)
        num_measured += 1
    metrics = {
        "protocol": protocol.name,
        "about": protocol.about,
        **about,
        "seed": settings.seed,
        "draw": dataclasses.asdict(settings.draw),
        "sampling": dataclasses.asdict(settings.sampling),
        "rows": {"asked": num_rows, "measured": num_measured, "errors": num_rows - num_measured},
        "errors": dict(errors.most_common(MAX_REASONS)),
        "unjudged": dict(unjudged),
        "interval": {"level": LEVEL, "resamples": RESAMPLES, "unit": "row"},
        "metrics": measures.results(),
        "missing": scorers.missing(protocol.metrics + protocol.of_rows),
    }
    ranked_by, chosen = sheets.chosen()
    files, path = open_place(folder)
    write_whole(files, f"{path}/report.html", to_html(metrics, chosen, ranked_by=ranked_by).encode())
    write_whole(files, f"{path}/metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False).encode())
    return metrics


@dataclass(frozen=True, kw_only=True)
class Judging:
    """A judge, and how many answers it may be asked about. What it said is kept in DIR/judgements/MODEL."""

    judge: Judge
    limit: int

    def judge_all(self, sink: RowSink, reader: RowReader, folder: str) -> Counter[str]:
        """Ask about each answer that has no marks yet, the first `limit` ones by the hash of their ids.

        Returns how many have none then, by the reason. Raises JudgeError where the judge has failed more often than
        MAX_JUDGE_FAILURES; what it said stays. A question that cannot be shown to it would fail again, and ends
        nothing: such as one with a damaged picture, which a system need not have opened."""
        files, _ = open_place(folder)
        ids = [row_id for row_id, error in sink.written().items() if error is None]
        wanted = set(sorted(ids, key=lambda row_id: hashlib.sha256(row_id.encode()).digest())[: self.limit])
        failures: list[JudgeError] = []
        lasting: list[MiniGPT5Error] = []
        places = threading.BoundedSemaphore(2 * JUDGED_AT_ONCE)  # questions with their pictures are not piled up

        def ask(row_id: str, question: list[AnswerPart], answer: tuple[AnswerPart, ...]) -> None:
            try:
                marks = judge(question, answer, self.judge)
                write_whole(files, self._place(row_id, folder), json.dumps(marks).encode())
            except JudgeError as failure:
                failures.append(failure)
            finally:
                places.release()

        with ThreadPoolExecutor(JUDGED_AT_ONCE) as threads:
            tasks = []
            for stored in sink.rows():
                if len(failures) > MAX_JUDGE_FAILURES:
                    break
                if stored["id"] in wanted and read_json(files, self._place(stored["id"], folder)) is None:
                    try:
                        question, answer = question_parts(reader[stored["id"]]), answers_of(stored)[KEY]
                    except MiniGPT5Error as failure:
                        lasting.append(failure)
                        continue
                    places.acquire()
                    tasks.append(threads.submit(ask, stored["id"], question, answer))
        for task in tasks:
            task.result()
        if len(failures) > MAX_JUDGE_FAILURES:
            raise JudgeError(f"{len(failures)} answers were not judged, the same command asks again: {failures[0]}")
        return Counter(str(one)[:200] for one in (*failures, *lasting))

    def with_marks(self, samples: list[Sample], folder: str) -> list[Sample]:
        """The samples of an answer with its marks, where it has some."""
        files, _ = open_place(folder)
        marks = read_json(files, self._place(samples[0].row, folder)) or {}
        first = dataclasses.replace(samples[0], values={**samples[0].values, **marks})
        return [first, *samples[1:]]

    def _place(self, row_id: str, folder: str) -> str:
        _, path = open_place(folder)
        return f"{path}/judgements/{file_name(self.judge.model)}/{file_name(row_id)}.json"


def question_parts(row: Row) -> list[AnswerPart]:
    """What a judge is shown of a question, each picture as small as it is sent."""
    parts: list[AnswerPart] = []
    num_pictures = 0
    for segment in row["segments"]:
        if segment["text"] is not None:
            parts.append(segment["text"])
        elif num_pictures < MAX_PICTURES:
            parts.append(shrink(open_picture(segment["picture"])))
            num_pictures += 1
    return parts


def write_submission(sink: RowSink, reader: RowReader, folder: str, *, model: str) -> str:
    """Write all answers in their benchmark's form; returns the folder. Raises StorageError."""
    files, path = open_place(f"{folder}/submission")
    entries: dict[str, dict[str, str]] = {}
    for stored in sink.rows():
        if stored["error"] is not None:
            continue
        row = reader[stored["id"]]
        made = submit(row["source"], row["id"], json.loads(row["item"]), answers_of(stored)[KEY], model=model)
        own = f"{path}/{row['source']}" + (f"/{file_name(model)}_output" if made.file else "")
        for name, data in made.pictures.items():
            write_whole(files, f"{own}/{name}", data)
        if made.file:
            write_whole(files, f"{own}/{made.file}", json.dumps(made.entry, ensure_ascii=False, indent=4).encode())
        else:
            entries.setdefault(row["source"], {})[stored["id"]] = json.dumps(made.entry, ensure_ascii=False)
    for form, lines in entries.items():
        ordered = [lines[row_id] for row_id in sorted(lines)]
        text = "\n".join(ordered) + "\n" if form == "isg" else "[" + ",\n".join(ordered) + "]\n"
        write_whole(files, f"{path}/{form}/{'output.jsonl' if form == 'isg' else 'data.json'}", text.encode())
    return f"{folder}/submission"
