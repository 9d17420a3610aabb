"""The language of a book is no more than its letters tell."""

from __future__ import annotations

import pytest

from minigpt5.story.export.language import language_of
from minigpt5.types import Page, Story, Usage


def story(prompt: str, *texts: str) -> Story:
    pages = tuple(Page(index=number, text=text) for number, text in enumerate(texts, 1))
    usage = Usage(prompt_tokens=0, completion_tokens=0)
    return Story(id="story_1", prompt=prompt, seed=7, model="storybook", pages=pages, usage=usage)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The fox walks far, and it sees a balloon.", "en"),
        ("Der Fuchs sieht einen Ballon, und er lacht.", "und-Latn"),
        ("Le renard trouve un ballon dans la neige.", "und-Latn"),
        ("小狐狸在雪地里找到一个红气球。", "zh"),
        ("狐は雪の中で「赤い風船」を見つけました。", "ja"),
        ("赤い風船と狐", "ja"),
        ("小狐狸の红气球在雪地里飞得很高很远。", "zh"),
        ("여우가 눈 속에서 빨간 풍선을 찾았어요.", "ko"),
        ("Лиса нашла в снегу красный шарик.", "und-Cyrl"),
        ("Η αλεπού βρήκε ένα κόκκινο μπαλόνι.", "el"),
        ("השועל מצא 3 בלונים אדומים.", "he"),
        ("وجد الثعلب بالونًا أحمر في الثلج.", "und-Arab"),
        ("एक लोमड़ी को लाल गुब्बारा मिला।", "und-Deva"),
        ("🦊🎈 1, 2, 3 ...", "und"),
        ("ᚠᚢᚦ", "und"),
        ("", "und"),
    ],
)
def test_language_of_a_text(text: str, language: str) -> None:
    assert language_of(story(text)) == language


def test_pages_outweigh_a_prompt_of_another_language() -> None:
    assert language_of(story("一只狐狸", "The fox walks far.", "It sees the balloon.")) == "en"


def test_one_foreign_name_does_not_change_the_language() -> None:
    assert language_of(story("The fox Λ and the балун", "The fox and the owl.")) == "en"
