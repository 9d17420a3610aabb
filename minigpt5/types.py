"""What crosses a process or a stage: frozen, keyword-only, numpy or bytes.

The way of a story through these types:

    StoryRequest -> TextDelta | Vokens -> DrawRequest -> Progress | Picture -> Page -> Story

Shape letters: V = vokens of one picture (8), H = hidden width of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

MAX_PAGES = 64
"""Pages of a story. One of more than WHOLE_PAGES is read through a window (minigpt5/model/window.py)."""
WHOLE_PAGES = 16
"""Pages of the longest story that is read whole before each page."""
MIN_WINDOW_PAGES = 6
"""The least that a longer story may seem to have to a model: see ModelConfig.window_pages."""
MAX_REPLY_PICTURES = 16
"""Pictures of a reply."""
SDE_DPM_SOLVER = "sde-dpm-solver++"
DISTILLED = "distilled"
DISTILLED_FOLDER = "unet_distilled"
UPSCALING_FOLDER = "vae_upscaling"
STYLE_FILE = "pytorch_lora_weights.safetensors"
"""A style adapter's file, as diffusers names it."""
MIN_SIDE = 64
MAX_SIDE = 4096
"""Pixels of a requested width or height."""
MIN_PENALTY = 0.01
MAX_PENALTY = 100.0
"""Of repetitions. Beyond, the choice of words changes no more, and numbers overflow."""
MAX_CHARACTERS = 4
"""Of a story, that a request shows."""
NUM_PREVIEWS = 3
"""Previews of each picture of a story, where they are asked for."""
MAX_STEPS, MAX_GUIDANCE = 100, 20
MAX_LCM_STEPS = 50
"""As many as a consistency model was distilled over."""
MAX_DISTILLED_STEPS = 8
"""Largest number that was measured (benchmarks/results/steps.json); more steps use the original UNet."""
Precision = Literal["float32", "bfloat16", "float16"]
"""What an engine holds its large model in. In less than float32 a picture depends a little on its batch
(benchmarks/results/company.json)."""
DecoderBackend = Literal["auto", "eager", "openvino", "compile"]
"""What computes the denoiser and the VAE: torch operation by operation ("eager"), OpenVINO, or torch.compile. "auto" is
OpenVINO on a CPU and eager elsewhere."""

Consistency = Literal["off", "story"]
"""Whether a story's pictures are drawn with its first page beside them: see StoryRequest."""
TextEngine = Literal["torch", "vllm"]
"""What runs the language model: our own loop on torch, or vLLM."""
TextPrecision = Literal["float32", "bfloat16", "int8", "int4"]
"""What the language model computes in. int4: with the base model's own 4-bit weights, where its folder has them."""


@dataclass(frozen=True, kw_only=True)
class InputImage:
    """A picture that the language model reads: the file's bytes, which `minigpt5.pictures.open_picture` opens."""

    data: bytes = field(metadata={"json": "image"})


@dataclass(frozen=True, kw_only=True)
class Role:
    """Who says the parts of a reply's prompt after it. What comes before any role, the user says."""

    name: Literal["system", "user", "assistant"] = field(metadata={"json": "role"})


PromptPart = str | InputImage | Role


@dataclass(frozen=True, kw_only=True)
class Character:
    """Somebody whom pages show as `image` does, where they name them."""

    name: str
    image: InputImage


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. A temperature of 0 is greedy."""

    temperature: float = 0.7
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    """What the logits of words so far are divided by, or multiplied by where they are negative."""
    min_page_tokens: int = 4
    """Minimum number of tokens before a page's picture, and before the end of a reply that needs one."""
    max_page_tokens: int = 64
    """Maximum number of tokens of a page, which then gets its picture; of a reply, in all."""


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """How a picture is denoised."""

    steps: int = 20
    """Denoising steps, 1 to 100."""
    guidance_scale: float = 3.0
    """Classifier-free guidance; 1 is none."""
    scheduler: str = "ddim"
    """One of the model's samplers (noise.py). SDE_DPM_SOLVER draws new noise at every step, which corrects some earlier
    errors. DISTILLED draws with the distilled UNet, which includes guidance and needs few steps."""
    width: int = 0
    """Pixels, 64 to MAX_SIDE; 0: as the model was trained to draw. A size that the model does not draw is resampled."""
    height: int = 0
    style: str = ""
    """One of the model's style adapters (ModelConfig.styles); "": none."""


@dataclass(frozen=True, kw_only=True)
class StoryRequest:
    """A story to write and draw, with every default filled in.

    Example: StoryRequest(prompt=("A fox who finds a balloon",), pages=4, seed=7)
    """

    prompt: tuple[PromptPart, ...]
    pages: int = 4
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    draw: DrawSettings = field(default_factory=DrawSettings)
    mode: Literal["story", "caption", "reply", "scene"] = "story"
    """"story": `pages` pages of text, each with a picture. "caption": no text is written,
    the prompt itself is the caption and one picture is drawn from it (page 1 has an empty text).
    "reply": an answer as in a chat, with at most `pages` pictures where the model opens them; a picture ends
    its page, and text after the last picture is a page without one.
    "scene": one page after the prompt's texts and pictures, in the published words of stage 2; with `given`, the
    picture of that text, which is part of the question."""
    pictures: Literal["auto", "none", "forced"] = "auto"
    """For a reply: pictures where the model opens them, none, or at least one, after text."""
    stop: tuple[str, ...] = ()
    """Text ends before the first of these strings, as end-of-text would end it; no part of one is shown."""
    previous: tuple[Page, ...] = ()
    """Pages already written; the story goes on after them."""
    given: tuple[str, ...] = ()
    """Texts of a story's first `pages`, used as they are: the model reads them, and their vokens follow them. It writes
    further pages. Of a scene: its text."""
    feedback: Literal["text", "pictures"] = "text"
    """"pictures": each finished picture is read by the language model before it writes the next page, so that pages
    follow one another; "text": only the texts are, and pictures overlap with later text."""
    num_later: int = 0
    """Pages of a story that other requests will ask for after these."""
    previews: bool = False
    """Whether pictures show themselves on the way, in the Progress of some steps."""
    consistency: Consistency = "off"
    """"story": the first page is drawn once more beside each later one, which attends to it, so that a character stays
    itself. Such a picture costs as much as two."""
    characters: tuple[Character, ...] = ()
    """At most MAX_CHARACTERS, for a model with an IP-Adapter."""
    key: str = ""
    """Name of the client: engines share their time equally among keys."""
    session: str = ""
    """Requests of one session begin alike: where there are several generators, they go to the same one."""

    @property
    def prompt_text(self) -> str:
        """The texts of the prompt, as a story shows them."""
        return " ".join(part for part in self.prompt if isinstance(part, str))


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """A piece of a page's text, in the order of writing."""

    page: int
    text: str


@dataclass(frozen=True, kw_only=True)
class TextReset:
    """The page's text so far is void, and its text starts over: it could not be continued."""

    page: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Vokens:
    """The hidden states of one picture's vokens: what conditions the diffusion model.

    Example: Vokens(page=1, hidden_VH=np.zeros((8, 576), np.float32), fingerprint="3f9c...")
    """

    page: int
    hidden_VH: np.ndarray
    """Last-layer states after the final norm that predict [IMG0]..[IMG7]; float32."""
    fingerprint: str
    """Fingerprint of the model folder that made them: only its own decoder may draw them."""
    engine: str = ""
    """Engine that wrote the text before them, and its version, such as "torch 2.13.0"; "": it is not known."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the text of a request cost, in tokens. Sent once, after the last page."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """A page that another one attends to while it is drawn: what draws that page again."""

    vokens: Vokens
    seed: int
    characters: tuple[InputImage, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawRequest:
    """One picture to draw."""

    vokens: Vokens
    seed: int
    settings: DrawSettings = field(default_factory=DrawSettings)
    reference: Reference | None = None
    """Drawn beside the picture, with the same settings, and not shown. It is of the same model."""
    characters: tuple[InputImage, ...] = ()
    """What the picture's characters look like, for a model with an IP-Adapter."""
    key: str = ""
    """Name of the client: engines share their time equally among keys."""
    num_previews: int = 0
    """Steps whose Progress shows the picture as far as it is, spread evenly; the last step has none."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A denoising step is done."""

    page: int
    step: int
    steps: int
    preview: bytes | None = None
    """The picture as the model expects it by now, a small JPEG: at a few steps, where asked for."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A finished picture."""

    page: int
    png: bytes
    width: int
    height: int
    seed: int
    denoise_steps: int
    is_resampled: bool = False
    """Whether it was drawn in the model's own size, and then resampled to the size of the request."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page of a story. A page whose picture failed has an error instead; a reply may end with text alone."""

    index: int
    """From 1."""
    text: str
    picture: Picture | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class StoryStarted:
    """First event of a story."""

    story_id: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class SlotOpened:
    """A page's text is complete, its picture is coming."""

    page: int


@dataclass(frozen=True, kw_only=True)
class PictureFailed:
    """A page's picture could not be drawn; the story goes on."""

    page: int
    error: str


@dataclass(frozen=True, kw_only=True)
class PageDone:
    """A page has its text and its picture, or the picture's error; the last page of a reply may have neither."""

    page: Page


@dataclass(frozen=True, kw_only=True)
class Story:
    """A finished story. In a notebook it shows itself."""

    id: str
    prompt: str
    """The prompt's text, without its pictures."""
    seed: int
    model: str
    pages: tuple[Page, ...]
    usage: Usage

    @property
    def num_denoise_steps(self) -> int:
        return sum(page.picture.denoise_steps for page in self.pages if page.picture)

    def save(self, path: str) -> str:
        """Write the story as one self-contained file, by its name HTML, EPUB or PDF; returns the path. Raises
        StorageError."""
        from minigpt5.story.export.html import save

        return save(self, path)

    def _repr_html_(self) -> str:
        from minigpt5.story.export.html import to_html_fragment

        return to_html_fragment(self)


GeneratorEvent = TextDelta | TextReset | Vokens | Usage
DecoderEvent = Progress | Picture
StoryEvent = StoryStarted | TextDelta | TextReset | SlotOpened | Progress | Picture | PictureFailed | PageDone | Usage
