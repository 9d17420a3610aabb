"""What each protocol asks for a row, and the samples that it makes of the answers."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from minigpt5.errors import InvalidRequest
from minigpt5.evaluation.protocols.protocol import (
    Answers,
    Protocol,
    Sample,
    Settings,
    facts_of,
    steps_of,
    true_pixels,
)
from minigpt5.evaluation.protocols.sheets import Sheets
from minigpt5.evaluation.protocols.table import PROTOCOLS
from minigpt5.evaluation.replies import structure
from minigpt5.evaluation.systems.face import Question
from minigpt5.model.image_transforms import fit_drawn
from minigpt5.storybook.captions import Facts, canonical_caption
from minigpt5.types import InputImage, Role
from tests.helpers.evaluation_rows import PNG, row, story_row
from tests.helpers.fakes import make_png
from tests.helpers.painter import Painter, last_text, paint

SETTINGS = Settings(seed=5)


def ask(name: str, asked: dict[str, Any], settings: Settings = SETTINGS) -> dict[str, Question]:
    return PROTOCOLS[name].ask(asked, settings)


def answer(protocol: Protocol, asked: dict[str, Any], settings: Settings = SETTINGS) -> Answers:
    questions = protocol.ask(asked, settings)
    return dict(zip(questions, Painter().answer(list(questions.values())), strict=True))


def collect(name: str, asked: dict[str, Any], settings: Settings = SETTINGS) -> list[Sample]:
    return PROTOCOLS[name].collect(asked, answer(PROTOCOLS[name], asked, settings))


def told(question: Question) -> list[str]:
    """Texts, "#" for a picture, and roles in brackets."""
    return [
        part if isinstance(part, str) else "#" if isinstance(part, InputImage) else f"[{part.name}]"
        for part in question.context
    ]


# Captions


def test_a_caption_is_asked_for_alone_and_compared_with_its_picture() -> None:
    asked = row("caption", "a fox", PNG)
    (question,) = ask("cc3m", asked).values()
    assert (told(question), question.wants, question.is_page) == (["a fox"], "picture", False)
    (sample,) = collect("cc3m", asked)
    assert sample.drawn is not None and sample.true is not None and sample.caption == "a fox"
    assert (sample.drawn == paint("a fox")).all() and tuple(sample.true[0, 0]) == (200, 80, 40)


def test_a_true_picture_is_compared_as_training_draws_it() -> None:
    """Padded to a white square, as the published reference is: what was drawn so differs by nothing."""
    wide = make_png((200, 80, 40), size=(64, 32))
    (sample,) = collect("cc3m", row("caption", "a fox", wide))
    assert sample.true is not None and (sample.true == fit_drawn(wide, 64)).all()
    assert tuple(sample.true[0, 0]) == (255, 255, 255) and tuple(sample.true[32, 32]) == (200, 80, 40)
    assert true_pixels(make_png((1, 2, 3), size=(1400, 700))).shape == (512, 512, 3)


def test_seeds_follow_from_the_row_the_key_and_the_runs_seed() -> None:
    def seed(row_id: str, run_seed: int) -> int:
        (question,) = ask("cc3m", row("caption", "a fox", PNG, row_id=row_id), Settings(seed=run_seed)).values()
        return question.seed

    assert seed("a", 5) == seed("a", 5) and len({seed("a", 5), seed("b", 5), seed("a", 6)}) == 3
    assert 0 <= seed("a", 5) < 2**31


def test_rows_of_another_kind_are_refused() -> None:
    for name in ("cc3m", "vist", "mmdialog", "story", "interleave"):
        with pytest.raises(InvalidRequest, match=f"kind is 'other' but {name} asks rows of"):
            ask(name, row("other", "a", PNG))
    encoded = row("caption", "a", PNG)
    encoded["segments"][1]["picture"] = None
    with pytest.raises(InvalidRequest, match="encoded form alone"):
        ask("cc3m", encoded)


# Steps


def test_each_step_is_asked_after_four_contexts_and_told_after_what_came_before() -> None:
    questions = ask("vist", story_row(3))
    assert {key: told(one) for key, one in questions.items()} == {
        "none/1": ["t1"],
        "none/2": ["t2"],
        "text/2": ["t1", "t2"],
        "picture/2": ["#", "t2"],
        "both/2": ["t1", "#", "t2"],
        "narration/2": ["t1", "#"],
        "none/3": ["t3"],
        "text/3": ["t1", "t2", "t3"],
        "picture/3": ["#", "#", "t3"],
        "both/3": ["t1", "#", "t2", "#", "t3"],
        "narration/3": ["t1", "#", "t2", "#"],
    }
    assert all(one.is_page and one.wants == ("text" if "narr" in key else "picture") for key, one in questions.items())
    assert len({questions[f"{context}/3"].seed for context in ("none", "text", "picture", "both")}) == 1


def test_a_model_that_reads_no_pictures_is_asked_without_them() -> None:
    blind = Settings(reads_pictures=False)
    questions = ask("vist", story_row(2), blind)
    assert {key: told(one) for key, one in questions.items()} == {
        "none/1": ["t1"],
        "none/2": ["t2"],
        "text/2": ["t1", "t2"],
        "narration/2": ["t1"],
    }
    samples = collect("vist", story_row(2), blind)
    groups = {group for sample in samples for group in sample.groups}
    assert groups == {"steps/none", "steps/text", "last/none", "last/text", "narration"}
    sheets = Sheets(PROTOCOLS["vist"])
    for sample in samples:
        sheets.add(sample, {})
    _, chosen = sheets.chosen()
    assert [shown.key for shown in chosen["Random"]] == ["text/2"], "with no last/both there is last/text"


def test_the_first_step_counts_in_all_contexts_and_the_last_one_by_itself() -> None:
    samples = collect("vist", story_row(5))
    by_key = {sample.key: sample for sample in samples}
    assert set(by_key["none/1"].groups) == {"steps/none", "steps/text", "steps/picture", "steps/both"}
    assert by_key["both/3"].groups == ("steps/both",)
    assert by_key["both/5"].groups == ("steps/both", "last/both", "gill")
    assert by_key["text/5"].groups == ("steps/text", "last/text")
    counts = {group: sum(group in one.groups for one in samples) for one in samples for group in one.groups}
    assert counts["steps/picture"] == 5 and counts["last/picture"] == 1 and counts["narration"] == 4
    narrated = by_key["narration/3"]
    assert (narrated.said, narrated.reference) == ("t2", "t3")
    assert by_key["both/4"].true is not None and by_key["both/4"].true[0, 0, 0] == 4
    assert not any("gill" in sample.groups for sample in collect("vist", story_row(4)))


def test_a_page_without_a_picture_is_told_with_the_next_one() -> None:
    asked = row("story", "one", "two", make_png((1, 0, 0)), "three", make_png((2, 0, 0)))
    assert [step.text for step in steps_of(asked)] == ["one two", "three"]
    with pytest.raises(InvalidRequest, match="1 pictures, but vist needs two"):
        ask("vist", row("story", "one", PNG))


# Dialogues

TALK = row("dialogue", "Hello.", "I saw a fox.", "Can I see it?", "Here.", PNG, "Lovely, draw more.", "No.", "Bye.")


def test_a_turn_is_asked_after_the_last_exchange_with_its_own_side_as_the_assistant() -> None:
    questions = ask("mmdialog", TALK)
    assert told(questions["2"]) == ["[user]", "Hello."]
    assert told(questions["4"]) == [*("[user]", "Hello.", "[assistant]", "I saw a fox.", "[user]", "Can I see it?")]
    third = told(questions["3"])
    assert third == ["[assistant]", "Hello.", "[user]", "I saw a fox."]
    # The published window: from the last exchange that is closed, the second one and later.
    assert told(questions["6"])[:3] == ["[user]", "Can I see it?", "[assistant]"] and "#" in told(questions["6"])
    assert told(questions["7"]) == ["[assistant]", "Lovely, draw more.", "[user]", "No."]
    assert "#" not in told(ask("mmdialog", TALK, Settings(reads_pictures=False))["6"])


def test_drawing_is_right_or_wrong_turn_by_turn() -> None:
    samples = {sample.key: sample for sample in collect("mmdialog", TALK)}
    assert samples["2"].values == {}, "it did not draw, and was not to"
    assert samples["4"].values == {"draw_precision": 1, "draw_recall": 1}
    assert samples["6"].values == {"draw_precision": 0}
    missed = collect("mmdialog", row("dialogue", "Hello.", "Here.", PNG))
    assert [sample.values for sample in missed] == [{"draw_recall": 0}]
    assert samples["4"].reference == "Here." and samples["4"].said == "Can I see it?"


def test_a_reply_keeps_the_order_of_its_parts() -> None:
    asked = row("dialogue", "A fox?", "Look.", PNG)
    picture = paint("a fox")
    (sample,) = PROTOCOLS["mmdialog"].collect(asked, {"2": (picture, "Look.", "Nice, is it not?")})
    kinds = ["text" if isinstance(part, str) else "picture" for part in sample.parts]
    assert kinds == ["picture", "text", "text"] and sample.said == "Look. Nice, is it not?"


def test_texts_in_a_row_are_one_of_a_pattern() -> None:
    """Annotators' steps without a picture are texts of their own; an answer has one text between two pictures."""
    golden = ("text", "text", "picture", "text", "text", "picture")
    assert structure(("text", "picture", "text", "picture"), golden) == 1
    assert structure(("text", "picture", "picture", "text"), golden) == 0
    assert structure(("picture", "picture"), ("picture",)) == 0 and structure((), ()) == 1


# Own stories


def test_a_story_is_asked_by_its_prompt_and_its_pages_are_compared_by_distance() -> None:
    asked = story_row(4, prompt="A fox")
    (question,) = ask("story", asked).values()
    assert (told(question), question.wants, question.pages) == (["A fox"], "pages", 4)
    samples = collect("story", asked)
    assert samples[0].values == {"structure": 1}
    distances = [sample.groups[0] for sample in samples if sample.pair]
    assert sorted(distances) == ["distance 1"] * 3 + ["distance 2"] * 2 + ["distance 3"]
    assert (
        sum(sample.drawn is not None for sample in samples) == sum(sample.true is not None for sample in samples) == 4
    )
    assert not any(sample.drawn is not None and sample.true is not None for sample in samples)
    (unprompted,) = ask("story", story_row(2)).values()
    assert told(unprompted) == ["t1"]


def test_a_story_with_a_page_too_few_has_not_the_asked_pattern() -> None:
    samples = PROTOCOLS["story"].collect(story_row(2), {"story": ("a fox", paint("a fox"), "the end")})
    assert samples[0].values == {"structure": 0}


def test_facts_of_own_pages_are_those_that_the_text_names() -> None:
    asked = story_row(1, source="storybook:story")
    answers: Answers = {"story": ("The fox was in the snow.", paint("x"))}
    page = next(one for one in PROTOCOLS["story"].collect(asked, answers) if one.key == "page 1")
    assert page.facts == Facts(who="fox", place="snow")
    elsewhere = PROTOCOLS["story"].collect(story_row(1), answers)
    assert not any(one.facts for one in elsewhere)


# Patterns


def test_each_kind_has_its_pattern() -> None:
    assert [one.values for one in collect("structure", row("caption", "a", PNG))] == [{"structure": 1}]
    assert [one.values for one in collect("structure", story_row(2))] == [{"structure": 1}]
    by_turn = {one.key: one.values["structure"] for one in collect("structure", TALK)}
    assert by_turn == {"2": 1, "3": 1, "4": 1, "5": 1, "6": 0, "7": 1}
    item = row("question", "draw a fox") | {"golden": [{"text": "a"}, {"text": None}, {"text": "b"}]}
    (sample,) = collect("structure", item)
    assert sample.values == {"structure": 0} and sample.asked == "asked: text, picture, text; answered: text, picture"
    assert collect("structure", row("question", "draw a fox") | {"golden": []}) == []


def test_an_item_is_asked_for_as_many_pictures_as_its_golden_answer_has() -> None:
    item = row("question", "how?", PNG) | {"golden": [{"text": "a"}, {"text": None}, {"text": None}]}
    (question,) = ask("interleave", item).values()
    assert (told(question), question.wants, question.pages) == (["how?", "#"], "reply", 2)
    samples = collect("interleave", item)
    assert samples[0].values == {"no_picture": 1, "no_text": 0, "structure": 0}
    assert (samples[0].said, samples[0].reference) == ("how?", "a")
    drawn = PROTOCOLS["interleave"].collect(item, {"answer": ("a fox", Image.new("RGB", (4, 4)))})
    assert [one.caption for one in drawn if one.drawn is not None] == ["a fox"]


# Facts


@pytest.mark.parametrize(
    "facts",
    [
        Facts(who="fox", what="castle", side="left", place="snow", time="rain"),
        Facts(who="fox", what="castle", side="right", place="road"),
        Facts(who="fox"),
        Facts(what="tent", side="left", time="night"),
    ],
)
def test_facts_are_read_back_from_the_caption_that_says_them(facts: Facts) -> None:
    asked = row("caption", "x", PNG, f"#{canonical_caption(facts)}", source="storybook:caption")
    (step,) = steps_of(asked)
    assert facts_of(asked, step) == facts
    assert facts_of(row("caption", "x", PNG, source="cc3m"), step) is None


def test_the_painter_of_these_tests_repeats_what_it_hears() -> None:
    assert last_text(("a", InputImage(data=b""), "b", Role(name="user"))) == "b"
