"""Questions become requests in the words of training; folders become systems."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigpt5.errors import InvalidRequest, ModelFolderError
from minigpt5.evaluation.systems.face import Question
from minigpt5.evaluation.systems.load import read_system
from minigpt5.evaluation.systems.ours import to_request
from minigpt5.published.data import READ_AND_TALK
from minigpt5.types import DrawSettings, InputImage, Role, Sampling

PICTURE = InputImage(data=b"png")


def test_a_lone_caption_is_asked_for_as_in_stage_1_and_a_page_as_in_stage_2() -> None:
    caption = to_request(Question(context=("a fox",), wants="picture", seed=3))
    assert (caption.mode, caption.prompt, caption.pages, caption.seed) == ("caption", ("a fox",), 1, 3)
    page = to_request(Question(context=("a fox",), wants="picture", is_page=True))
    assert (page.mode, page.prompt, page.given) == ("scene", (), ("a fox",))
    later = to_request(Question(context=("a", PICTURE, "b"), wants="picture"))
    assert (later.mode, later.prompt, later.given) == ("scene", ("a", PICTURE), ("b",))


def test_a_picture_of_no_text_is_refused() -> None:
    for context in ((), ("a", PICTURE)):
        with pytest.raises(InvalidRequest, match="does not end with a text"):
            to_request(Question(context=context, wants="picture"))


def test_texts_stories_and_replies() -> None:
    page = to_request(Question(context=("a", PICTURE), wants="text", is_page=True))
    assert (page.mode, page.given, page.pictures) == ("scene", (), "auto")
    answer = to_request(Question(context=("What?",), wants="text"))
    assert (answer.mode, answer.pictures) == ("reply", "none")
    settings = {"sampling": Sampling(temperature=0.0), "draw": DrawSettings(steps=2)}
    story = to_request(Question(context=("a fox",), wants="pages", pages=3, **settings))  # type: ignore[arg-type]
    assert (story.mode, story.pages, story.sampling, story.draw) == ("story", 3, *settings.values())
    user, assistant = Role(name="user"), Role(name="assistant")
    chat = to_request(Question(context=(user, "Hi.", assistant, "Hello.", user, "Show me."), wants="reply"))
    assert chat.mode == "reply" and chat.prompt[:3] == (user, READ_AND_TALK, "Hi.")
    begun = to_request(Question(context=(assistant, "Hello.", user, "Show me."), wants="reply"))
    assert begun.prompt[:3] == (user, READ_AND_TALK, assistant)
    assert to_request(Question(context=("Show me.",), wants="reply")).prompt == ("Show me.",)


def test_a_system_is_read_by_its_config(tmp_path: Path) -> None:
    folder = str(Path(__file__).parents[2] / "models" / "storybook")
    info = read_system(folder, {"steps": 3})
    assert (info.name, len(info.version), info.draw.steps) == ("storybook", 64, 3) and "reply" in info.kinds
    with pytest.raises(InvalidRequest, match="scheduler"):
        read_system(folder, {"scheduler": "magic"})
    (tmp_path / "config.json").write_text(json.dumps({"system": "oracle"}))
    with pytest.raises(ModelFolderError, match="'oracle' but the known ones are"):
        read_system(str(tmp_path))
    with pytest.raises(ModelFolderError, match="config.json"):
        read_system(str(tmp_path / "none"))
