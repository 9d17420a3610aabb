"""The published samples: their strings and their counts."""

from __future__ import annotations

from minigpt5.model.prompt import READ_AND_TELL
from minigpt5.published.data import (
    DRAWN,
    READ_AND_TALK,
    Turn,
    cc3m_samples,
    clean_caption,
    first_turn,
    mmdialog_samples,
    sample_segments,
    vist_samples,
)

STORY = [(f"text {number}", f"picture {number}") for number in range(5)]


def test_captions_are_cleaned() -> None:
    assert clean_caption('A "Dog" (brown), on #grass: *wow*; ok~ .') == "a dog brown , on grass wow ok"


def test_cc3m_is_bare_captions_and_some_commands() -> None:
    rows = [(f"Caption {number}.", f"{number}.jpg") for number in range(201)]
    samples = list(cc3m_samples(rows))
    assert len(samples) == 201 + 3
    assert (samples[0].source, samples[0].target) == ("caption 0", f"{DRAWN} ###")
    assert samples[1].source == (
        "You will be able to generate image according to command.###Human: generate image with caption: caption 0 "
        "###Assistant:"
    )
    assert samples[1].caption == "caption 0" and samples[1].drawn == "0.jpg"
    commands = {sample.source.split(" ###")[0].split("###Human: ")[1] for sample in samples if sample.task == "command"}
    assert commands == {
        "generate image with caption: caption 0",
        "can you give me the image with caption: caption 100",
        "help me to generate this image: caption 200",
    }
    assert len(list(cc3m_samples(rows, is_training=False))) == 201


def test_a_story_of_five_steps_gives_13_samples_and_5_to_test() -> None:
    samples = list(vist_samples(STORY))
    assert [sample.task for sample in samples] == ["picture", *["picture", "both", "text"] * 4]
    assert len(list(vist_samples(STORY, is_training=False))) == 5


def test_the_strings_of_a_story() -> None:
    first, second, both, words = list(vist_samples(STORY))[:4]
    assert first.source == (
        f"{READ_AND_TELL}###Human: Generate an image with the scene description: text 0 ###Assistant:"
    )
    history = f"{READ_AND_TELL}###Human:text 0<Img><ImageHere></Img>\n"
    assert second.source == f"{history} Generate an image with the scene description: text 1 ###Assistant:"
    assert second.target == f"{DRAWN} ###" and second.read == ("picture 0",) and second.drawn == "picture 1"
    assert both.source == f"{history} Tell me the next scene with image. ###Assistant:"
    assert both.target == f"text 1 {DRAWN} ###"
    assert words.source == (
        f"{history} Tell me the next scene description by this image: <Img><ImageHere></Img> ###Assistant:"
    )
    assert words.target == "text 1 ###" and words.drawn is None
    assert words.read == ("picture 0", "picture 1") and words.caption is None


def test_other_wordings() -> None:
    samples = list(vist_samples(STORY, variant=lambda count: count - 1))
    assert samples[1].source.endswith(" the scene description: text 1 ###Assistant:")
    assert samples[2].source.endswith(" What should happen then? ###Assistant:")
    assert samples[3].source.endswith(" What happen in the next scene image: <Img><ImageHere></Img> ###Assistant:")


def test_a_dialogue_predicts_every_turn_but_the_first() -> None:
    turns = [Turn(text="hello"), Turn(text="look", picture="p1"), Turn(text="nice"), Turn(text="bye", picture="p3")]
    samples = list(mmdialog_samples(turns))
    assert [sample.target for sample in samples] == [f"look {DRAWN} ###", "nice ###", f"bye {DRAWN} ###"]
    assert samples[0].source == f"{READ_AND_TALK} ###Human: hello ###Assistant:"
    assert samples[1].source == (f"{READ_AND_TALK} ###Human: hello ###Assistant: look <Img><ImageHere></Img> ###Human:")
    assert samples[2].read == ("p1",) and samples[2].drawn == "p3"


def test_the_history_holds_at_most_one_closed_exchange_and_a_question() -> None:
    assert [first_turn(index) for index in range(1, 9)] == [0, 0, 0, 2, 2, 4, 4, 6]
    turns = [Turn(text=f"turn{number}") for number in range(8)]
    for index, sample in enumerate(mmdialog_samples(turns), 1):
        assert sample.source.count("turn") == index - first_turn(index) <= 3


def test_a_dialogue_ends_before_what_cannot_be_used() -> None:
    good, long = Turn(text="fine"), Turn(text="word " * 51)
    for bad in (Turn(text=" "), Turn(text="see a.jpg"), Turn(text="look", picture="lost"), long):
        turns = [good, good, bad, good]
        samples = list(mmdialog_samples(turns, has_picture=lambda picture: picture != "lost"))
        assert len(samples) == 1
    assert len(list(mmdialog_samples([good, long, good], is_training=False))) == 2


def test_samples_become_segments_of_the_one_template() -> None:
    both = list(vist_samples(STORY))[2]
    segments = sample_segments(both)
    assert [segment.kind for segment in segments] == ["text", "read", "text", "text", "draw", "text"]
    assert [segment.is_target for segment in segments] == [False, False, False, True, True, True]
    assert segments[3].text == "text 1 " and segments[5].text == " ###"
