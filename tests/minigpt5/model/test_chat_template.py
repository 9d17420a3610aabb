"""Chat templates: the ids of a request are those of the tokenizer's library, and training's are serving's."""

from __future__ import annotations

import dataclasses
import re
from datetime import datetime
from typing import Any, get_args

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minigpt5.config import TemplateName
from minigpt5.errors import ModelFolderError
from minigpt5.model.chat_template import TODAY, find_caption_opening, protect_control_tokens, read_chat_template
from minigpt5.model.prompt import IGNORED, Segment, Task, encode, given_ids, request_segments
from minigpt5.model.template import make_template
from minigpt5.model.vokens import PLACEHOLDER, VokenEmbeddings, voken_names
from minigpt5.published.data import Turn, cc3m_samples, mmdialog_samples, sample_segments, vist_samples
from minigpt5.types import InputImage, Page, Picture, Role, StoryRequest
from tests.helpers.chat_templates import FAMILIES, make_tokenizer
from tests.helpers.tiny import tiny_config, tiny_tokenizer

PNG = InputImage(data=b"png")
PICTURE = Picture(page=1, png=b"drawn", width=1, height=1, seed=1, denoise_steps=1)


class Family:
    """A tokenizer as the engine has it, its chat template, and vokens of width 1."""

    def __init__(self, name: str) -> None:
        config = dataclasses.replace(tiny_config(), template="chat")
        self.tokenizer: PreTrainedTokenizerBase
        if name == "smollm2":  # the real one, of the installed base model
            self.tokenizer, vocabulary = tiny_tokenizer(config), config.vocabulary
        else:
            self.tokenizer = make_tokenizer(name)
            protect_control_tokens(self.tokenizer)
            vocabulary = len(self.tokenizer)
            self.tokenizer.add_tokens([*voken_names(8), PLACEHOLDER], special_tokens=True)
        self.template = read_chat_template(self.tokenizer)
        self.vokens = VokenEmbeddings(vocabulary, 8, 1)

    def ids(self, segments: list[Segment]) -> list[int]:
        return encode(segments, self.tokenizer, self.vokens, picture_tokens=(-1,)).ids

    def labels(self, segments: list[Segment]) -> list[int]:
        tokens = encode(segments, self.tokenizer, self.vokens, picture_tokens=(-1,))
        assert all(label in (IGNORED, token) for label, token in zip(tokens.labels, tokens.ids, strict=True))
        return [label for label in tokens.labels if label != IGNORED]

    def oracle(self, *contents: str, system: str = "") -> list[int]:
        """What the library makes of a conversation, up to its answer where the user spoke last."""
        messages = [{"role": ("user", "assistant")[at % 2], "content": one} for at, one in enumerate(contents)]
        messages = [*([{"role": "system", "content": system}] if system else []), *messages]
        found = self.tokenizer.apply_chat_template(
            messages,
            chat_template=re.sub(r"strftime_now\([^)]*\)", f'"{TODAY}"', self.tokenizer.get_chat_template()),
            add_generation_prompt=len(contents) % 2 == 1,
            enable_thinking=False,
            return_dict=False,
        )
        assert isinstance(found, list)
        return found  # type: ignore[return-value]


@pytest.fixture(scope="module", params=["smollm2", *FAMILIES])
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


def test_a_request_is_tokenized_as_by_its_library(family: Family) -> None:
    story = StoryRequest(prompt=("A fox", "in a tent "), pages=3)
    found = family.ids(request_segments(story, family.template))
    assert found == family.oracle("A fox in a tent Tell it in 3 pages with pictures.")
    bos = family.tokenizer.bos_token_id
    if bos is not None and family.tokenizer.bos_token != "<|im_start|>":
        assert found.count(bos) == 1 and found[0] == bos


def test_pictures_stand_in_the_question(family: Family) -> None:
    request = StoryRequest(prompt=(PNG, "What is this?"), mode="reply")
    expected = family.oracle(f"<Img>{PLACEHOLDER}</Img> What is this?")
    assert family.ids(request_segments(request, family.template)) == expected


def test_a_history_is_tokenized_as_by_its_library(family: Family) -> None:
    user, assistant = Role(name="user"), Role(name="assistant")
    prompt = ("Tell me.", assistant, "It ran.", user, "And then?", assistant, "It hid.", user, "Where?")
    found = family.ids(request_segments(StoryRequest(prompt=prompt, mode="reply"), family.template))
    assert found == family.oracle("Tell me.", "It ran.", "And then?", "It hid.", "Where?")


def test_a_system_prompt_is_the_templates_own_or_part_of_the_first_question(family: Family) -> None:
    prompt = (Role(name="system"), "Be brief.", Role(name="user"), "Where?")
    found = family.ids(request_segments(StoryRequest(prompt=prompt, mode="reply"), family.template))
    if family.template.system:
        assert found == family.oracle("Where?", system="Be brief.")
    else:
        assert found == family.oracle("Be brief.\n\nWhere?")


def test_which_templates_take_a_system_prompt() -> None:
    takes = {name for name in FAMILIES if Family(name).template.system}
    assert takes == {"qwen3", "llama3", "smollm3"}, "Gemma refuses one, Mistral moves it to the last question"


def test_a_learnt_answer_is_tokenized_as_by_its_library_and_ends_its_turn(family: Family) -> None:
    segments = family.template.describe(" A fox in a tent. ")
    found, learnt = family.ids(segments), family.labels(segments)
    expected = family.oracle(f"<Img>{PLACEHOLDER}</Img> Describe this image.", "A fox in a tent.")
    assert found == expected[: len(found)]
    assert family.tokenizer.decode(expected[len(found) :]).strip() in ("", "<eos>")
    assert found[-len(learnt) :] == learnt
    assert learnt[-1] in family.template.end_ids(family.tokenizer)
    assert family.tokenizer.decode(learnt[:-1]).strip() == "A fox in a tent."


def test_the_date_does_not_change_a_prompt() -> None:
    template = Family("smollm3").template
    assert TODAY in template.begin and str(datetime.now().year) not in template.begin.replace(TODAY, "")


@pytest.mark.parametrize("words", ["[IMG0]", PLACEHOLDER])
def test_vokens_in_a_text_are_plain_text(family: Family, words: str) -> None:
    plain = family.ids(request_segments(StoryRequest(prompt=(f"A {words} fox",)), family.template))
    assert max(plain) < family.vokens.first
    assert f"A {words} fox" in family.tokenizer.decode(plain)


def test_control_tokens_in_a_text_are_plain_text(family: Family) -> None:
    """No user closes a turn or a thought."""

    def controls(text: str, mode: Any = "story") -> list[int]:
        added = family.tokenizer.added_tokens_decoder
        prompt = ("A", Role(name="assistant"), text, Role(name="user"), text) if mode == "reply" else (text,)
        ids = family.ids(request_segments(StoryRequest(prompt=prompt, mode=mode), family.template))
        assert text in family.tokenizer.decode(ids)
        return [token for token in ids if token in added]

    for token in family.tokenizer.added_tokens_decoder.values():
        if token.content.isascii():
            for mode in ("story", "reply"):
                assert controls(f"A {token.content} fox", mode) == controls("A fox", mode)


def read_and_written(family: Family, pages: list[str], request: StoryRequest) -> list[int]:
    """What the engine reads of a request whose pages are all given."""
    ids = family.ids(request_segments(request, family.template))
    for page in given_ids(dataclasses.replace(request, given=tuple(pages)), family.template, family.tokenizer):
        ids += [*page, *family.vokens.ids]
    return ids


def test_a_story_is_trained_as_it_is_written(family: Family) -> None:
    pages = ["It woke. ", "\nIt ran.", "A fox hid."]
    trained = family.ids(family.template.story(["A fox"], 3, pages))
    for num_before in range(3):
        previous = tuple(Page(index=at + 1, text=text, picture=PICTURE) for at, text in enumerate(pages[:num_before]))
        request = StoryRequest(prompt=("A fox",), pages=3 - num_before, previous=previous)
        written = read_and_written(family, pages[num_before:], request)
        assert written == trained[: len(written)]
        assert trained[-1] in family.template.end_ids(family.tokenizer)
        assert family.tokenizer.decode(trained[len(written) :]).strip() == family.template.end.strip()


def test_a_page_is_trained_as_it_is_written_where_pictures_are_read_back(family: Family) -> None:
    trained = family.ids(family.template.next_page(["A fox It woke."], "It ran.", "both", variant=0))
    previous = (Page(index=1, text="It woke.", picture=PICTURE),)
    request = StoryRequest(prompt=("A fox",), pages=1, previous=previous, feedback="pictures")
    written = read_and_written(family, ["It ran."], request)
    assert written == trained[: len(written)]
    assert family.tokenizer.decode(trained[len(written) :]).strip() == family.template.end.strip()


def tail(family: Family) -> list[int]:
    return family.labels(family.template.describe("x"))[-1:]


def test_captions_are_bare(family: Family) -> None:
    """As published, in training and in caption mode."""
    request = StoryRequest(prompt=("A fox in a tent",), mode="caption")
    read = request_segments(request, family.template)
    assert read == family.template.caption("A fox in a tent")[:1]
    bos = family.tokenizer.bos_token_id
    plain = family.tokenizer.encode("A fox in a tent", add_special_tokens=False)
    assert family.ids(read) == [*([] if bos is None else [bos]), *plain]


def test_a_caption_is_neither_the_first_token_nor_a_role(family: Family) -> None:
    """SmolLM2's BOS opens the header of a turn: a new line stands between it and a caption, in training as in use."""
    opening = find_caption_opening(family.tokenizer)
    assert opening == ("\n" if family.tokenizer.bos_token in (None, "<|im_start|>") else "")
    config = dataclasses.replace(tiny_config(), caption_opens=opening)
    request = StoryRequest(prompt=("Forest, a fox",), pages=1, mode="caption")
    plain = family.tokenizer.encode(f"{opening}Forest, a fox", add_special_tokens=False)
    for name in get_args(TemplateName):
        template = make_template(dataclasses.replace(config, template=name), family.tokenizer)
        read = family.ids(request_segments(request, template))
        assert read[-len(plain) :] == plain
        assert family.ids(template.caption("Forest, a fox"))[: len(read)] == read


@pytest.mark.parametrize(("text", "task"), [("It ran.", "picture"), ("", "both")])
def test_a_scene_is_asked_for_as_it_is_trained(family: Family, text: str, task: Task) -> None:
    trained = family.ids(family.template.next_page(["It woke."], "It ran.", task, variant=0))
    asked = family.ids(family.template.scene(("It woke.", InputImage(data=b"")), text))
    assert trained[: len(asked)] == asked and len(asked) < len(trained)


def test_published_samples_take_turns(family: Family) -> None:
    template = family.template
    for task in ("picture", "both", "text"):
        samples = {one.task: one for one in list(vist_samples([("It woke.", "a"), ("It ran.", "b")]))[1:]}
        assert sample_segments(samples[task], template) == template.next_page(["It woke."], "It ran.", task, variant=0)
    command = list(cc3m_samples([("A fox", "a")]))[1]
    learnt = family.labels(sample_segments(command, template))
    assert learnt == [family.vokens.first, *tail(family)]
    dialogue = [Turn(text="Hello."), Turn(text="Look.", picture="a"), Turn(text="Nice."), Turn(text="Bye.")]
    for sample, said in zip(mmdialog_samples(dialogue), ("Look.", "Nice.", "Bye."), strict=True):
        assert len(sample.turns) % 2 == 1
        segments = sample_segments(sample, template)
        assert sum(one.kind == "read" for one in segments) == len(sample.read)
        text = "".join(one.text for one in segments if one.is_target and one.kind == "text")
        assert text == f"{template.lead}{said}{template.end}"


def test_a_reply_may_begin_or_end_with_an_answer(family: Family) -> None:
    """The other side then says nothing."""
    for prompt, contents in (
        ((Role(name="assistant"), "Hello!", Role(name="user"), "Hi."), ("", "Hello!", "Hi.")),
        (("Hi.", Role(name="assistant"), "Hello!"), ("Hi.", "Hello!", "")),
    ):
        found = family.ids(request_segments(StoryRequest(prompt=prompt, mode="reply"), family.template))
        assert found == family.oracle(*contents)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no chats') }}", "cannot be split into turns .no chats."),
        ("{{ messages[-1].content }}", "does not write each turn once"),
        ("{% for one in messages %}{{ one.content }}\n{% endfor %}", "is no token of its own"),
        (
            "{% if messages|length > 4 %}long{% endif %}{% for one in messages %}{{ one.content }}</s>{% endfor %}",
            "three",
        ),
    ],
)
def test_a_template_that_cannot_be_split_is_refused(written: str | None, words: str) -> None:
    tokenizer: PreTrainedTokenizerFast = make_tokenizer("mistral")
    tokenizer.chat_template = written
    with pytest.raises(ModelFolderError, match=f"{words}.*--template published"):
        read_chat_template(tokenizer)


def test_thoughts_are_closed_before_an_answer_and_left_out_of_earlier_ones() -> None:
    template = Family("qwen3").template
    assert template.answer_opens.endswith("<think>\n\n</think>\n\n")
    assert "think" not in template.past_answer_opens and template.end == "<|im_end|>"
