"""From a user's rows to a model that is served: prepared, encoded, trained on a cluster, and loaded as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pyarrow import parquet

from batch_jobs import precompute
from batch_jobs.prepare import Part, write_part
from examples.own_model.tiny_bases import make_bases
from minigpt5 import MiniGPT5, new
from minigpt5.config import default_model_folder
from minigpt5.types import DrawSettings
from tests.helpers.processes import Cluster
from training.train import main

MODEL = str(default_model_folder())
QUICK = ["batch_size=2", "num_threads=1", "warmup_steps=1", "log_every=1", "validation_batches=1"]
QUICK += ["draws_samples=false", "checkpoint_every_s=0"]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions, stories and dialogues, with what the encoders make of their pictures."""
    folder = tmp_path_factory.mktemp("rows")
    for number, kind in enumerate(("caption", "story", "dialogue")):
        part = Part(number=number, file="", start=0, count=12 if kind == "caption" else 4)
        write_part(part, layout=f"storybook:{kind}", uri="", output=str(folder / "plain"), seed=3)
    encode = precompute.Encode(
        model=MODEL,
        source=str(folder / "plain"),
        output=str(folder / "encoded"),
        keeps_pictures=False,
        num_threads=2,
    )
    for path in sorted((folder / "plain" / "rows").iterdir()):
        assert encode({"file": str(path)})["files"] == 1
        assert encode({"file": str(path)})["files"] == 0  # it is there
    return folder / "encoded"


def test_encoded_rows_have_no_pictures_left(encoded: Path) -> None:
    rows = [row for path in sorted((encoded / "rows").iterdir()) for row in parquet.read_table(path).to_pylist()]
    pictures = [one for row in rows for one in row["segments"] if one["text"] is None]
    assert len(pictures) > 20
    assert all(one["picture"] is None and one["moments"] and one["features"] for one in pictures)


@pytest.mark.timeout(600)
def test_both_stages_train_on_them_and_the_model_writes(encoded: Path, tmp_path: Path) -> None:
    """The README's walk: the picture loss of "align" begins late, with pictures in the replay buffer from before."""
    data = ["--preset", "storybook", "--data", str(encoded), "--workers", "0"]
    align, learn = tmp_path / "align", tmp_path / "learn"
    assert main(["align", *data, "--start", MODEL, "--out", str(align), "steps=4", *QUICK, "replay.steps=1"]) == 0
    settings = ["steps=2", *QUICK, "draws_samples=true"]
    assert main(["learn", *data, "--start", str(align / "model"), "--out", str(learn), *settings]) == 0
    lines = [json.loads(line) for line in (learn / "log.jsonl").read_text().splitlines()]
    assert any("validation_loss" in line for line in lines) and any("text" in line for line in lines)
    assert "A story of the model that came out" in (learn / "report.html").read_text()
    story = MiniGPT5.from_pretrained(learn / "model").write("A fox", pages=1, seed=1, draw=DrawSettings(steps=1))
    assert story.pages[0].text and story.pages[0].picture


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_submitted_job_trains_with_two_workers(tmp_path: Path, cluster: Cluster) -> None:
    places = [word for name, place in make_bases(tmp_path / "bases").items() for word in (f"--{name}", str(place))]
    made, rows, out = tmp_path / "made", tmp_path / "rows", tmp_path / "align"
    assert new.main([*places, "--context", "512", "--out", str(made)]) == 0
    write_part(Part(number=0, file="", start=0, count=12), layout="storybook:caption", uri="", output=str(rows), seed=3)
    command = ["-m", "training.train", "align", "--data", str(rows), "--start", str(made), "--out", str(out)]
    command += ["--workers", "2", "steps=2", "zero_stage=2", "ema_decay=0", *QUICK]
    job = cluster.submit(*command)
    assert job.returncode == 0, (job.stdout + job.stderr)[-4000:]
    assert (out / "model" / "config.json").is_file() and (out / "report.html").is_file()
    assert (out / "checkpoint-00000002" / "position.json").is_file()
    told = re.findall(r"^\S*\(RayTrainWorker pid=\d+\)\S* \{'loss': ", job.stdout, flags=re.M)
    assert len(told) == 2, "each step once"


def test_what_cannot_be_is_said_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", "--data", str(tmp_path), "--start", MODEL, "--out", str(tmp_path / "o")]) == 1
    assert "python -m batch_jobs.prepare" in capsys.readouterr().err
    for arguments, words in (
        (["align"], "examples are missing"),
        (["vae"], "has no stage vae"),
        (["vae", "--preset", "storybook", "--data", str(tmp_path)], "leave out --data"),
        (["align", "--data", str(tmp_path), "colour=1"], "unknown setting 'colour=1'"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, "--out", str(tmp_path / "o")])
        assert words in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert (
        main(["align", "--data", "x", "--start", MODEL, "--out", str(tmp_path / "file" / "x"), "--workers", "0"]) == 1
    )
    assert "cannot be written" in capsys.readouterr().err
