"""Every example runs as a newcomer runs it, in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from minigpt5.model.folder_config import check_folder

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


def run(name: str, *arguments: str) -> str:
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return process.stdout


def test_every_example_has_a_test() -> None:
    here = Path(__file__).read_text()
    names = {
        path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb") or (path / "walk.py").exists()
    }
    assert len(names) == 5 and all(f'"{name}"' in here for name in names), names


def test_the_notebook_is_stored_without_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells run in the kernel's event loop."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in one.get("data", {}) for one in shown) == 3
    story = next(one.data["text/html"] for one in shown if "text/html" in one.get("data", {}))
    assert story.count("data:image/png") == 2
    assert {path.suffix for path in (tmp_path / "stories").iterdir()} == {".html", ".epub", ".pdf"}


@pytest.mark.slow
@pytest.mark.cluster
def test_a_server_is_started_and_called(tmp_path: Path) -> None:
    said = run("serve_and_call.py", str(tmp_path))
    assert "page 2 is drawn" in said and (tmp_path / "story.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
@pytest.mark.cluster
def test_a_file_is_illustrated(tmp_path: Path) -> None:
    said = run("bulk.py", str(tmp_path))
    assert "mine 2 It finds a key. (" in said and "fox 2 " in said
    assert any((tmp_path).rglob("*.epub"))


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_own_bases_become_a_model_that_is_trained_and_illustrates(tmp_path: Path) -> None:
    """The walk of "own_model": tiny random bases of the real classes, none of whose files changes."""
    said = run("own_model/walk.py", str(tmp_path))
    assert "could not be drawn" not in said and "trained by stage" in said
    sheet = Image.open(tmp_path / "learn" / "sheet.png")
    assert sheet.size == (8 * 32, 3 * 32), "eight pictures: true, by text, by vokens"
    assert (tmp_path / "learn" / "story.html").read_text().count("data:image/png") == 2
    assert (tmp_path / "story.html").read_text().count("data:image/png") == 2
    assert list((tmp_path / "books").rglob("*.parquet"))
    config = check_folder(tmp_path / "distill" / "model")
    assert config.draw_distilled is not None
    assert config.bases and config.template == "chat", "the tokenizer of the language model has a chat template"


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_shipped_model_is_trained_on_a_folder(tmp_path: Path) -> None:
    said = run("train_on_your_folder.py", str(tmp_path), "2")
    assert f"make serve MODEL={tmp_path / 'align' / 'model'}" in said
    assert json.loads((tmp_path / "align" / "model" / "config.json").read_text())["name"] == "storybook"


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_bases_that_packages_carry_learn_from_stamps_and_campaigns(tmp_path: Path) -> None:
    """The real bases, with drawings of this test in the places where Debian's packages have theirs."""
    data, place = tmp_path / "data", tmp_path / "run"
    stamps, campaigns = data / "usr/share/tuxpaint/stamps", data / "usr/share/games/wesnoth/1.16/data/campaigns/One"
    (campaigns / "images/story").mkdir(parents=True)
    stamps.mkdir(parents=True)
    for number in range(90):
        Image.new("RGB", (40, 40), (number, 90, 160)).save(stamps / f"{number}.png")
        (stamps / f"{number}.txt").write_text(f"A blue square of {number}.")
    Image.new("RGB", (60, 40), (90, 160, 30)).save(campaigns / "images/story/field.png")
    parts = '[part]\nstory= _ "The men came to a field."\nbackground=story/field.png\n[/part]\n' * 2
    (campaigns / "1.cfg").write_text(f"[story]\n{parts}[/story]\n" * 60)
    arguments = ("own_model/from_packages.py", str(place), "--data", str(data), "--scale", "0.001")
    arguments += ("--workers", "0", "--threads", "1")
    assert "-m training.train align" in run(*arguments)
    page = (place / "report.html").read_text()
    assert page.count("data:image/png") == 2
    links = re.findall(r'href="([^"]+)"', page)
    assert "books.books/index.html" in links and all((place / link).is_file() for link in links)
    figures = json.loads((place / "figures.json").read_text())["figures"]
    assert figures["data"]["stamps"]["rows"] == 90 and figures["stages"]["align"]["steps"] == 2
    assert {"before", "after"} == set(figures["stages"]["learn"]["picture"])
    assert "python -m" not in run(*arguments), "all is done"
