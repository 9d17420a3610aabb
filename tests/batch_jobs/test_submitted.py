"""Jobs as `ray job submit --working-dir .` runs them: what is uploaded, and the commands of the pages."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from pyarrow import dataset, parquet
from ray import cloudpickle
from ray._private.runtime_env.packaging import create_package

from batch_jobs import describe, evaluate, illustrate, precompute, prepare, redraw
from batch_jobs.prepare import Part, write_part
from minigpt5.commands import check_kept
from minigpt5.config import default_model_folder
from minigpt5.errors import StorageError
from tests.helpers.fakes import make_png
from tests.helpers.processes import ROOT, SUBMIT, Cluster
from tests.test_words import tracked

MAX_UPLOAD = 20 * 2**20
LEFTOVERS = (
    ".git/objects/pack/pack-1.pack",
    ".venv/lib/libtorch.so",
    ".env",
    "models/mine/vokens.safetensors",
    "runs/align/checkpoint-00000002/state",
    "stories/part-1.parquet",
    "stories.pictures/1.png",
    "rows/rows/part-000000.parquet",
    "cc3m.tar",
)
"""What work leaves in a clone."""


def test_the_working_directory_that_ray_uploads_is_the_code_alone(tmp_path: Path) -> None:
    clone, package = tmp_path / "clone", tmp_path / "package.zip"
    files = tracked("*", ".rayignore", ".gitignore")
    for file in files:
        (clone / file).parent.mkdir(parents=True, exist_ok=True)
        (clone / file).symlink_to(ROOT / file)
    for name in LEFTOVERS:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        with (clone / name).open("wb") as file:
            file.truncate(MAX_UPLOAD)
    create_package(str(clone), package, include_gitignore=True)
    packed = set(zipfile.ZipFile(package).namelist())
    assert package.stat().st_size < MAX_UPLOAD
    code = {file.as_posix() for file in files if file.parts[0] in ("minigpt5", "training", "batch_jobs", "deployments")}
    assert len(code) > 150 and code <= packed
    assert not packed & set(LEFTOVERS) and not [name for name in packed if name.startswith(("models/", "tests/"))]


def test_a_relative_output_of_a_submitted_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_kept("stories", option="--output")
    copy = tmp_path / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    for place in (str(tmp_path), "s3://bucket/stories"):
        check_kept(place, option="--output")
    with pytest.raises(StorageError, match="--output is stories, but a submitted job runs in a copy"):
        check_kept("stories", option="--output")


def documented(page: str, module: str, data: Path) -> list[str]:
    """A page's command that submits `module`, as words after `python`; `/data` is a folder of this machine."""
    [line] = re.findall(rf"^ray job submit .*-m {module} .*$", (ROOT / "docs" / page).read_text(), flags=re.M)
    words = shlex.split(line)
    assert tuple(words[: len(SUBMIT)]) == SUBMIT
    return [word.replace("/data", str(data), 1) if word.startswith("/data/") else word for word in words[len(SUBMIT) :]]


def succeed(cluster: Cluster, *command: str) -> str:
    job = cluster.submit(*command)
    assert job.returncode == 0, (job.stdout + job.stderr)[-4000:]
    return job.stdout


@pytest.mark.parametrize("module", [describe, evaluate, illustrate, precompute, prepare, redraw])
def test_classes_of_a_command_can_be_sent(module: ModuleType) -> None:
    """Run by `python -m`, a module is `__main__`, and Ray sends its classes whole."""
    classes = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        copies = [cloudpickle.loads(cloudpickle.dumps(one)) for one in classes]
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    assert [one.__name__ for one in copies] == [one.__name__ for one in classes]


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_commands_of_the_pages_run_as_submitted_jobs(tmp_path: Path, cluster: Cluster) -> None:
    """From the repository's folder, so that each finds the shipped model on the cluster's side."""
    (tmp_path / "my-stories").mkdir()
    (tmp_path / "my-stories" / "1.png").write_bytes(make_png())
    (tmp_path / "my-stories" / "story.jsonl").write_text(json.dumps({"caption": "a fox", "picture": "1.png"}))
    said = succeed(cluster, *documented("bulk.md", "batch_jobs.prepare", tmp_path))
    assert "1 rows with 1 pictures" in said
    assert parquet.read_table(tmp_path / "rows" / "rows" / "part-000000.parquet")["id"].to_pylist() == ["story.jsonl:1"]

    prompts = [{"prompt": f"A fox who finds a {thing}", "pages": 1, "steps": 2} for thing in ("balloon", "boat")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    illustrate = documented("bulk.md", "batch_jobs.illustrate", tmp_path)
    assert "2 rows, 0 already there, 0 errors, 2 pictures" in succeed(cluster, *illustrate)
    assert dataset.dataset(tmp_path / "stories").to_table()["error"].to_pylist() == [None, None]
    missing = cluster.submit(*illustrate[:-1], str(tmp_path / "others"), "--model", str(tmp_path / "none"))
    assert missing.returncode != 0 and f"error: {tmp_path / 'none'} is not a model folder" in missing.stdout

    (tmp_path / "storybook").symlink_to(default_model_folder())
    shutil.rmtree(tmp_path / "rows")
    for number, kind in enumerate(("caption", "story")):
        part = Part(number=number, file="", start=0, count=12)
        write_part(part, layout=f"storybook:{kind}", uri="", output=str(tmp_path / "rows"), seed=3)
    no_gpus = ("--gpus", "0")  # the page's cluster has some, this one has none
    encode = documented("training.md", "batch_jobs.precompute", tmp_path)
    assert "pictures encoded, 2 files" in succeed(cluster, *encode, *no_gpus)
    train = documented("training.md", "training.train", tmp_path)
    succeed(cluster, *train, *no_gpus, "steps=2", "batch_size=2", "num_threads=1", "replay.steps=0", "ema_decay=0")
    assert (tmp_path / "align" / "model" / "config.json").is_file()
