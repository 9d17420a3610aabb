"""The filters on their real weights: what they stop, and that they let the picture world through."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt5.errors import Blocked
from minigpt5.model.joblib_file import read_joblib
from minigpt5.story.safety import MAX_TEXT_SCORE, PictureFilter, TextFilter
from minigpt5.storybook.scenes import draw_scene, scene_at
from minigpt5.storybook.stories import story_at


@pytest.fixture(scope="module")
def text_filter() -> TextFilter:
    return TextFilter()


def test_stories_of_the_world_pass(text_filter: TextFilter) -> None:
    for index in range(300):
        story = story_at(index, seed=9, split="heldout", held_out_pairs=None)
        for text in (story.prompt, *(page.text for page in story.pages)):
            assert text_filter.score(text) < MAX_TEXT_SCORE, text
    text_filter.check_text("", "prompt")
    text_filter.check_text("Η αλεπού", "prompt")


@pytest.mark.parametrize("words", ["you are a stupid idiot", "Shit happens!", "You fucking fox."])
def test_an_insult_is_stopped_wherever_it_stands(text_filter: TextFilter, words: str) -> None:
    with pytest.raises(Blocked, match="page 2 was stopped by the text filter"):
        text_filter.check_text(words, "page 2")
    story = " ".join(page.text for page in story_at(1, seed=9).pages)
    with pytest.raises(Blocked):
        text_filter.check_text(f"{story} {words} {story}", "prompt")


def test_a_piece_of_each_word_is_read(text_filter: TextFilter) -> None:
    for length in range(1, 30):
        words = ["fox"] * length
        read = [len(piece) for piece in text_filter._pieces(" ".join(words))]
        assert max(read) <= 6 and sum(read) >= length


def test_scores_are_those_of_the_model_itself(text_filter: TextFilter) -> None:
    """The expected scores were computed by scikit-learn 1.9.1 from the package's own files."""
    known = {"you are a stupid idiot": 1.0, "A pig and a rocket.": 0.89999, "A fox who finds a red balloon": 0.02864}
    for text, score in known.items():
        assert text_filter.score(text) == pytest.approx(score, abs=1e-5), text


def test_scenes_of_the_world_pass_the_picture_filter() -> None:
    picture_filter = PictureFilter()
    scores = []
    for index in range(24):
        file = io.BytesIO()
        Image.fromarray(draw_scene(scene_at(index, seed=9))).save(file, "PNG")
        picture_filter.check_picture(file.getvalue())
        scores.append(picture_filter.score(file.getvalue()))
    assert len({round(score, 5) for score in scores}) > 12  # it looks at them
    assert max(scores) < 0.5


def test_a_picture_beyond_the_threshold_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    picture_filter = PictureFilter()
    monkeypatch.setattr(picture_filter, "score", lambda data: 0.81)
    with pytest.raises(Blocked, match="picture filter"):
        picture_filter.check_picture(b"")


def test_a_foreign_pickle_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "evil.joblib").write_bytes(pickle.dumps({"a": Evil(), "n": np.float64(2)}))
    parts = read_joblib(tmp_path / "evil.joblib")
    assert not (tmp_path / "ran").exists()
    assert isinstance(parts["a"], dict) and parts["n"] == 2
    assert json.dumps({key: str(value) for key, value in parts.items()})
