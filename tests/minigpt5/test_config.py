"""What a model folder says of itself to people: bounded, printable, and for the shipped one true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minigpt5.codec import from_json, to_json
from minigpt5.config import MAX_ABOUT_CHARACTERS, ModelConfig, minigpt5_7b, storybook
from minigpt5.model.folder_config import load_config
from minigpt5.storybook.captions import facts_in, name_of
from minigpt5.storybook.scenes import CHARACTERS, OBJECTS, PLACES, TIMES

SHIPPED = Path(__file__).parents[2] / "models" / "storybook"


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"about": "x" * 1001}, "about has 1001 characters but must have at most 1000"),
        ({"about": "Stories\x1b[2J"}, r"about has the control character '\x1b' at 7: remove it"),
        ({"about": "Stories\r\n"}, r"about has the control character '\r' at 7"),
        ({"about": "\ud800"}, r"about has the control character '\ud800' at 0"),
        ({"about": 3}, "about is '3' but must be str"),
        ({"about": None}, "about is 'None' but must be str"),
        ({"examples": "A fox"}, "examples is 'A fox' but must be"),
        ({"examples": ["A fox", 3]}, "examples[1] is '3' but must be str"),
        ({"examples": ["A fox"] * 13}, "examples has 13 prompts but must have at most 12"),
        ({"examples": ["A fox", "x" * 201]}, "examples[1] has 201 characters but must have at most 200"),
        ({"examples": ["A fox\nand a bear"]}, r"examples[0] has the control character '\n' at 5"),
        ({"examples": ["A fox", " "]}, "examples[1] is ' ' but must be a prompt"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_its_key(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError) as refusal:
        from_json(ModelConfig, to_json(storybook()) | values)
    assert complaint in str(refusal.value)


@pytest.mark.parametrize(
    "about", ["", "x" * MAX_ABOUT_CHARACTERS, "会写也会画。\n只会中文。", "می\u200cنویسد", "A \u00a0 B"]
)
def test_a_text_of_any_language_survives(about: str) -> None:
    values = to_json(minigpt5_7b()) | {"about": about, "examples": ["A" * 200] * 12}
    config = from_json(ModelConfig, json.loads(json.dumps(values)))
    assert config.about == about and config.summary == about.split("\n")[0] and to_json(config) == values


def test_the_shipped_folder_says_what_its_preset_says() -> None:
    shipped, preset = load_config(SHIPPED), storybook()
    assert (shipped.about, shipped.examples) == (preset.about, preset.examples)


@pytest.mark.parametrize("text", [storybook().about, (SHIPPED / "MODEL_CARD.md").read_text()], ids=["about", "card"])
def test_the_storybook_model_names_all_that_it_knows(text: str) -> None:
    for title, keys in (("Characters", CHARACTERS), ("Objects", OBJECTS), ("Places", PLACES), ("Times", TIMES)):
        listed = re.search(rf"{title}: ([^.]+)\.", text.replace("\n  ", " "))
        assert listed and listed[1].split(", ") == [name_of(key) for key in keys]
    assert f"{len(CHARACTERS)} characters, {len(OBJECTS)} objects and {len(PLACES)} places" in text


@pytest.mark.parametrize("prompt", storybook().examples)
def test_an_example_is_about_what_the_storybook_model_knows(prompt: str) -> None:
    facts = facts_in(prompt)
    assert facts.who and facts.what
