"""A tokenizer's own chat template -> the segments of each task.

The template is rendered with marks for contents and cut at the marks: no family is spelt out here. The wordings of the
tasks are the published ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minigpt5.errors import ModelFolderError
from minigpt5.model.prompt import (
    ASKS_FOR_BOTH,
    DRAW,
    DRAW_TARGET,
    READ,
    READ_AND_TELL,
    Segment,
    Task,
    ask_for,
    control_tokens,
    join_texts,
    merge_text_parts,
    text_segment,
)
from minigpt5.types import InputImage, Page, PromptPart, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = "26 Jul 2024"
"""The date for templates that write one (Llama 3, SmolLM3): a prompt must not depend on the day."""
FIXED_DATE = f"{{%- macro strftime_now(format) -%}}{TODAY}{{%- endmacro -%}}"
SYSTEM, FIRST, ANSWER, SECOND, REPLY, THIRD = (f"Qmark{number}Q" for number in range(6))
"""Contents that no template changes: without white space, and no tag."""
TURNS = (FIRST, ANSWER, SECOND, REPLY, THIRD)
INSTEAD = "make the model folder with --template published"
PICTURE = (text_segment("<Img>"), READ, text_segment("</Img>"))


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A `Template` that puts texts and pictures into the turns of a chat."""

    begin: str
    """Before the first question: BOS, a system prompt of the template's own, and the user's header."""
    system: tuple[str, str] | None
    """Before a system prompt, and between it and the first question; None where the template takes none."""
    answer_opens: str
    """Between a question and the answer that the model writes."""
    past_answer_opens: str
    """Between a question and an earlier answer."""
    question_opens: str
    """Between an earlier answer and the next question."""
    lead: str
    """White space that an answer begins with."""
    end: str
    """What ends an answer: white space, if any, and a control token."""
    stop: tuple[str, ...] = ()
    caption_opens: str = ""
    picture: tuple[Segment, ...] = PICTURE
    """A picture that is read, in its frame. A vision-language model has markers of its own and needs no frame."""

    def end_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """The tokenizer's own end, and the control token that ends an answer."""
        ends = [tokenizer.convert_tokens_to_ids(self.end.strip()), tokenizer.eos_token_id]
        return frozenset(token for token in ends if token is not None)

    def page(self, text: str, *, begins_answer: bool) -> str:
        """A text after a picture has one space before it."""
        return f"{self.lead if begins_answer else ' '}{text.strip()}"

    def caption(self, caption: str) -> list[Segment]:
        """As published, without the template: the picture must follow from the caption alone."""
        return [text_segment(f"{self.caption_opens}{caption}"), DRAW_TARGET, frame(self.end, is_target=True)]

    def describe(self, description: str) -> list[Segment]:
        return [*self.turns([[*self.picture, text_segment(" Describe this image.")]]), *self.answer(description)]

    def story(self, prompt: Sequence[PromptPart], num_pages: int, pages: Sequence[str]) -> list[Segment]:
        asked = text_segment(f" Tell it in {num_pages} pages with pictures.")
        segments = self.turns([[*self._content(prompt), asked]])
        for at, page in enumerate(pages):
            segments += [text_segment(self.page(page, begins_answer=not at), is_target=True), DRAW_TARGET]
        return [*segments, frame(self.end, is_target=True)] if len(pages) == num_pages else segments

    def reply(self, prompt: Sequence[PromptPart], pages: Sequence[Page]) -> list[Segment]:
        turns: list[list[Segment]] = []
        system: list[Segment] = []
        for role, parts in _by_role(prompt):
            if role == "system" and not turns:
                system += self._content(parts)
                continue
            if (role == "assistant") != len(turns) % 2:  # a side that says nothing has an empty turn
                turns.append([])
            turns.append(self._content(parts))
        segments = self.turns(turns if len(turns) % 2 else [*turns, []], system=system)
        for at, page in enumerate(pages):
            segments.append(text_segment(self.page(page.text, begins_answer=not at)))
            segments += [DRAW] if page.picture else []
        return segments

    def next_page(self, history: Sequence[str], page: str, task: Task, *, variant: int) -> list[Segment]:
        question = [text_segment(READ_AND_TELL)]
        for past in history:
            question += [text_segment(f" {past.strip()}"), *self.picture]
        question.append(text_segment(f"\n{ask_for(task, variant).strip()}"))
        picture, text = [text_segment(" "), *self.picture], [text_segment(f" {page.strip()}")]
        question += {"text": picture, "picture": text, "both": []}[task]
        said = "" if task == "picture" else page
        return [*self.turns([question]), *self.answer(said, draws=task != "text")]

    def scene(self, context: Sequence[PromptPart], text: str) -> list[Segment]:
        question = [text_segment(READ_AND_TELL)]
        for part in context:
            if isinstance(part, InputImage):
                question += self.picture
            elif isinstance(part, str):
                question.append(text_segment(f" {part.strip()}"))
        ask = f"{ask_for('picture', 0).strip()} {text.strip()}" if text else ask_for("both", 0).strip()
        return self.turns([[*question, text_segment(f"\n{ask}")]])

    def read_back(self, prompt: Sequence[PromptPart], pages: Sequence[Page]) -> list[Segment]:
        question = [text_segment(f"{READ_AND_TELL} "), *self._content(prompt)]
        for page in pages:
            question += [text_segment(f" {page.text.strip()}"), *(self.picture if page.picture else [])]
        return self.turns([[*question, text_segment(f"\n{ASKS_FOR_BOTH[0].strip()}")]])

    def turns(self, turns: Sequence[list[Segment]], *, system: Sequence[Segment] = ()) -> list[Segment]:
        """A conversation up to the answer that is written. User and assistant take turns; the user has the first and
        the last. A system prompt joins the first question where the template takes none."""
        segments = [frame(self.begin)]
        if system and self.system:
            segments = [frame(self.system[0]), *_strip(system), frame(self.system[1])]
        elif system:
            turns = [[*system, text_segment("\n\n"), *turns[0]], *turns[1:]]
        for at, turn in enumerate(turns):
            if at:
                segments.append(frame(self.past_answer_opens if at % 2 else self.question_opens))
            segments += _strip(turn)
        return join_texts([*segments, frame(self.answer_opens)])

    def answer(self, text: str, *, draws: bool = False) -> list[Segment]:
        """What is learnt: a text, or none, and perhaps a picture after it."""
        said = [text_segment(self.page(text, begins_answer=True), is_target=True)] if text.strip() else []
        return [*said, *([DRAW_TARGET] if draws else []), frame(self.end, is_target=True)]

    def _content(self, prompt: Sequence[PromptPart]) -> list[Segment]:
        """Texts and pictures of one side, with a space between them."""
        segments: list[Segment] = []
        for part in merge_text_parts([part for part in prompt if not isinstance(part, Role)]):
            segments += [text_segment(" ")] if segments else []
            segments += self.picture if isinstance(part, InputImage) else [text_segment(part.strip())]
        return segments


def frame(text: str, *, is_target: bool = False) -> Segment:
    """Text of the template itself."""
    return Segment(kind="text", text=text, is_target=is_target, frames=((0, len(text)),))


def _by_role(prompt: Sequence[PromptPart]) -> list[tuple[str, list[PromptPart]]]:
    said: list[tuple[str, list[PromptPart]]] = []
    for part in prompt:
        if isinstance(part, Role):
            said.append((part.name, []))
        else:
            said = said or [("user", [])]
            said[-1][1].append(part)
    return said


def _strip(turn: Sequence[Segment]) -> list[Segment]:
    """A turn without white space around it: some templates remove it."""
    segments = join_texts(turn)
    if segments and segments[0].kind == "text":
        segments[0] = text_segment(segments[0].text.lstrip())
    if segments and segments[-1].kind == "text":
        segments[-1] = text_segment(segments[-1].text.rstrip())
    return segments


def protect_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make every added token that the chat template names a special one: what a user writes never becomes such a token
    (some tokenizers have their turns' tokens as plain added ones). Raises as `read_chat_template` does."""
    from tokenizers import AddedToken

    written = _source(tokenizer)
    named = [
        token
        for token in tokenizer.added_tokens_decoder.values()
        if not token.special and token.content.strip() and token.content in written
    ]
    special = [
        AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=token.normalized, special=True)
        for token in named
    ]
    tokenizer.add_tokens(special, special_tokens=True)


def read_chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Cut the tokenizer's chat template. Raises ModelFolderError where it has none, or one that cannot be cut."""
    from jinja2 import TemplateError

    _source(tokenizer)
    try:
        return _read(tokenizer)
    except (TemplateError, ValueError, TypeError) as error:
        raise ModelFolderError(
            f"the chat template of {tokenizer.name_or_path} cannot be split into turns ({error}): {INSTEAD}"
        ) from error


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        written = tokenizer.get_chat_template()
    except ValueError:  # none, or several and no default
        written = ""
    if not written.strip():
        raise ModelFolderError(f"{tokenizer.name_or_path} has no chat template: {INSTEAD}")
    return written


def _read(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    begin, asked = _cut(_render(tokenizer, FIRST), FIRST)
    _, last_opens, end = _cut(_render(tokenizer, FIRST, ANSWER), FIRST, ANSWER)
    _, past_opens, question_opens, _ = _cut(_render(tokenizer, FIRST, ANSWER, SECOND), FIRST, ANSWER, SECOND)
    opens, lead = asked, ""
    if last_opens.startswith(asked):  # an answer may begin with more than it is asked with: " ", or a control token
        more = last_opens.removeprefix(asked)
        opens, lead = asked + more.rstrip(" "), more[len(more.rstrip(" ")) :]
    ends = re.match(rf"\s*(?:{control_tokens(tokenizer)})", end)
    if not ends:
        raise ValueError(f"an answer ends with {end[:40]!r}, which is no token of its own")
    template = ChatTemplate(
        begin=begin,
        system=None,
        answer_opens=opens,
        past_answer_opens=past_opens,
        question_opens=question_opens,
        lead=lead,
        end=ends.group(),
    )
    if _render(tokenizer, *TURNS) != _spell(template, begin, asked):
        raise ValueError("it does not frame three questions as it frames two")
    return dataclasses.replace(template, system=_read_system(tokenizer, template, asked))


def _read_system(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, asked: str) -> tuple[str, str] | None:
    """How the template frames a system prompt; None where it refuses one, or moves it as a conversation goes on."""
    from jinja2 import TemplateError

    try:
        before, between, _ = _cut(_render(tokenizer, FIRST, system=SYSTEM), SYSTEM, FIRST)
        whole = _render(tokenizer, *TURNS, system=SYSTEM)
    except (TemplateError, ValueError):
        return None
    return (before, between) if whole == _spell(template, f"{before}{SYSTEM}{between}", asked) else None


def _spell(template: ChatTemplate, begin: str, asked: str) -> str:
    """The conversation of TURNS as the cut template has it."""
    between = ["", *(template.past_answer_opens, template.question_opens) * 2]
    return begin + "".join(before + turn for before, turn in zip(between, TURNS, strict=True)) + asked


def _render(tokenizer: PreTrainedTokenizerBase, *turns: str, system: str = "") -> str:
    """A conversation as the template writes it, without thoughts; up to its answer where the user has the last turn.

    Templates of vision-language models may want contents as lists of parts.
    """
    roles = itertools.cycle(("user", "assistant"))
    messages: list[dict[str, Any]] = [{"role": next(roles), "content": turn} for turn in turns]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    written = _apply(tokenizer, messages)
    if all(turn in written for turn in turns):
        return written
    return _apply(tokenizer, [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages])


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    return tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=messages[-1]["role"] == "user",
        chat_template=FIXED_DATE + _source(tokenizer),
        enable_thinking=False,
        thinking=False,
        date_string=TODAY,
    )


def _cut(rendered: str, *marks: str) -> list[str]:
    """What stands around the marks. Raises ValueError where one is not there once, or not in order."""
    pieces = re.split("|".join(marks), rendered)
    if re.findall("|".join(marks), rendered) != list(marks):
        raise ValueError("it does not write each turn once, in order")
    return pieces


def find_caption_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """`ModelConfig.caption_opens` for a language model: a new line where the caption would stand first, or where a
    role's name follows the BOS token."""
    from jinja2 import TemplateError

    if not tokenizer.bos_token:
        return "\n"
    try:
        chat = _render(tokenizer, FIRST) if tokenizer.chat_template else ""
    except (TemplateError, ValueError, TypeError):
        return ""
    return "\n" if any(f"{tokenizer.bos_token}{role}" in chat for role in ("system", "user")) else ""
