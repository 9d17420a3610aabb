"""ModelConfig: what a model folder says of itself, and the two presets. No torch here: the HTTP front reads it."""

from __future__ import annotations

import dataclasses
import json
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from numbers import Integral
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from minigpt5.errors import InvalidRequest
from minigpt5.types import (
    DISTILLED,
    MAX_DISTILLED_STEPS,
    MAX_GUIDANCE,
    MAX_LCM_STEPS,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SIDE,
    MIN_WINDOW_PAGES,
    SDE_DPM_SOLVER,
    WHOLE_PAGES,
    Consistency,
    DrawSettings,
    Sampling,
    StoryRequest,
)

MAX_ABOUT_CHARACTERS = 1000
MAX_EXAMPLES = 12
MAX_EXAMPLE_CHARACTERS = 200
TemplateName = Literal["published", "chat"]


@dataclass(frozen=True, kw_only=True)
class BaseHash:
    """The weights of a base model that a model folder was made with."""

    id: str
    """A path or a hub id, perhaps with a revision: owner/name@revision."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class EvaConfig:
    """What only the "eva-clip" family has sizes for."""

    patch_px: int
    num_layers: int
    num_heads: int
    intermediate: int
    qformer_intermediate: int
    cross_attention_every: int
    """Layers of the Q-Former with cross-attention: each so many, from the first."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Picture -> embeddings that the language model reads."""

    family: Literal["efficientnet", "eva-clip", "tower", "own", "none"] = "efficientnet"
    """"tower" is any vision tower of transformers, "own" that of a vision-language model that is the language model; a
    model of "none" reads no pictures."""
    encoder: str
    """Folder of the frozen picture encoder: relative to the model folder, or a base-model id."""
    image_px: int = 224
    encoder_width: int
    """Channels of one of the encoder's features."""
    num_features: int
    """Features of one picture."""
    hidden: int
    """Width of the Q-Former."""
    num_layers: int
    num_heads: int
    num_queries: int = 32
    """Embeddings of one picture."""
    picture: tuple[int, ...] = ()
    """Tokens of one picture in a prompt: ids of the language model's own tokens, and -n for n embeddings. Where it is
    empty, there are only the embeddings."""
    grid_side: int = 0
    """Side of the square of a picture's embeddings, where the language model counts positions by it (M-RoPE); 0: each
    token has the next position."""
    sees_whole_pictures: bool = False
    """Whether each embedding of a picture attends to all of it, as in Gemma 3, and not only to those before it."""
    eva: EvaConfig | None = None

    @property
    def picture_tokens(self) -> tuple[int, ...]:
        """`picture` of any family."""
        return self.picture or (-self.num_queries,)

    @property
    def num_picture_tokens(self) -> int:
        return sum(max(1, -token) for token in self.picture_tokens)

    @property
    def has_qformer(self) -> bool:
        """Whether there are weights between the encoder and the language model, for the stage "vision" to train."""
        return self.family not in ("none", "own")


NO_VISION = VisionConfig(
    family="none", encoder="", encoder_width=0, num_features=0, hidden=0, num_layers=0, num_heads=0, num_queries=0
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapter of the language model (arXiv 2106.09685)."""

    rank: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that training and serving must agree on, and what the folder tells people of itself.

    Raises ValueError, which names the key, where `about` or `examples` cannot be shown.
    """

    name: str
    about: str = ""
    """What the model is for and what it does not know. The first line is a summary; further lines have the details.

    At most MAX_ABOUT_CHARACTERS. Neither results nor the fingerprint depend on it.
    """
    examples: tuple[str, ...] = ()
    """Prompts to try: at most MAX_EXAMPLES, each one line of at most MAX_EXAMPLE_CHARACTERS."""
    language_model: str
    """Base-model id."""
    hidden: int
    """Width of the language model's hidden states."""
    vocabulary: int
    """Tokens of the base tokenizer: vokens are numbered from here."""
    context_tokens: int
    """Longest sequence, prompt and story together."""
    window_pages: int = WHOLE_PAGES
    """Pages that a story of more than WHOLE_PAGES seems to have to the model: at most as many as those of the longest
    stories that it has learnt (minigpt5/model/window.py). From MIN_WINDOW_PAGES to WHOLE_PAGES."""
    vision: VisionConfig
    text_encoder: str
    """Base-model id; its states of a caption are the target of the caption loss."""
    diffusion: str = "decoder"
    """Folder of VAE, UNet and scheduler: relative to the model folder, or a base-model id."""
    num_vokens: int = 8
    condition_length: int
    """Positions of states that the denoiser attends to."""
    condition_width: int
    condition_pooled: int = 0
    """Width of the one vector of a caption that the denoiser reads beside them; 0: none."""
    mapper_width: int = 0
    """Width of the mapper's transformer where it is not `condition_width`."""
    mapper_layers: int = 4
    mapper_heads: int = 8
    image_px: int
    """Side of a picture as the VAE reads and paints it: of those that are drawn, unless a second decoder paints them
    `upscale` times as large."""
    max_pixels: int = 0
    """Largest picture that is drawn at the width and height that a request names; 0: none is, and it is resampled."""
    size_multiple: int = 8
    """Such a width or height is a multiple of this many pixels."""
    schedulers: tuple[str, ...] = ("ddim", "pndm", "dpm-solver++", SDE_DPM_SOLVER, DISTILLED)
    """Samplers of the diffusion model; DISTILLED needs a distilled UNet."""
    guides_in_one_call: bool = False
    """Whether the denoiser takes the guidance scale as an input: a guided step then needs no second prediction."""
    guidance_rescale: float = 0.0
    """How far the guided prediction is scaled back to the spread of the unguided one (arXiv 2305.08891, 3.4)."""
    template: TemplateName = "published"
    """"published": the strings of the paper's code. "chat": the chat template of the language model's tokenizer.

    The fingerprint does not depend on it, but a model writes well only with the one that it was trained with.
    """
    caption_opens: str = ""
    """Text before a caption. A model attends to its first token whatever that is (arXiv 2309.17453), and reads the name
    of a role after a BOS token such as SmolLM2's <|im_start|>. The first word of a caption that stands there is lost to
    the picture; a new line before it keeps it."""
    lora: LoraConfig
    sampling: Sampling = field(default_factory=Sampling)
    draw: DrawSettings = field(default_factory=DrawSettings)
    """With the UNet itself."""
    draw_distilled: DrawSettings | None = None
    """With the distilled UNet, where the model has one."""
    prefers_distilled: bool = False
    """Whether it draws what does not ask for the UNet itself."""
    consistency: Literal["off", "story", "none"] = "off"
    """Default of a story's `consistency`; "none": the denoiser cannot let pictures share their attention."""
    filters: tuple[str, ...] = ()
    """What a server filters by default, "text" and "picture": see minigpt5/story/safety.py."""
    published_quirks: bool = False
    """Repeat the published code's bugs (minigpt5/published/checkpoint.py lists them), to compare with its numbers."""
    licences: tuple[str, ...] = ()
    """Licences of base models and training sets."""
    bases: tuple[BaseHash, ...] = ()
    """The base models outside the folder. A folder made without `minigpt5.new` names none here."""
    styles: tuple[str, ...] = ()
    """Names of the folder's style adapters: read from its `adapters/`, and not written to `config.json`."""
    has_ip_adapter: bool = False
    """Whether the folder has an `ip_adapter/`, which `characters` need; not written to `config.json`."""
    upscale: int = 1
    """How many times as large the folder's `decoder/vae_upscaling/` paints; not written to `config.json`."""
    fingerprint: str = ""
    """Hash of the weights that make vokens and read them; set when the folder is saved."""

    def __post_init__(self) -> None:
        if not MIN_WINDOW_PAGES <= self.window_pages <= WHOLE_PAGES:
            raise ValueError(
                f"window_pages is {self.window_pages} but must be from {MIN_WINDOW_PAGES} to {WHOLE_PAGES}"
            )
        _check_shown("about", self.about, most=MAX_ABOUT_CHARACTERS, allowed="\n")
        if len(self.examples) > MAX_EXAMPLES:
            raise ValueError(f"examples has {len(self.examples)} prompts but must have at most {MAX_EXAMPLES}")
        for index, prompt in enumerate(self.examples):
            _check_shown(f"examples[{index}]", prompt, most=MAX_EXAMPLE_CHARACTERS)
            if not prompt.strip():
                raise ValueError(f"examples[{index}] is {prompt!r} but must be a prompt: remove it or write one")

    @property
    def condition_positions(self) -> int:
        """Positions of the condition; the last one holds the one vector, where there is one."""
        return self.condition_length + bool(self.condition_pooled)

    @property
    def summary(self) -> str:
        """The first line of `about`."""
        return self.about.partition("\n")[0]

    @property
    def default_draw(self) -> DrawSettings:
        return self.draw_distilled if self.prefers_distilled and self.draw_distilled else self.draw

    def drawable(self, draw: DrawSettings) -> DrawSettings:
        """Settings of a story, perhaps begun with a model that had a sampler or a style which this one lacks."""
        draw = dataclasses.replace(draw, style=draw.style if draw.style in self.styles else "")
        if draw.scheduler in self.samplers:
            return draw
        return dataclasses.replace(self.draw, width=draw.width, height=draw.height)

    def resumable(self, request: StoryRequest) -> StoryRequest:
        """The request of a story, perhaps begun with a model that had a sampler or a style which this one lacks."""
        return dataclasses.replace(request, draw=self.drawable(request.draw))

    def fitted(self, request: StoryRequest) -> StoryRequest:
        """The request without the consistency and the characters that this model cannot draw. What is stored keeps
        them, for a model that can."""
        consistency: Consistency = "off" if self.consistency == "none" else request.consistency
        characters = request.characters if self.has_ip_adapter else ()
        return dataclasses.replace(request, consistency=consistency, characters=characters)

    def check_characters(self) -> None:
        """Raises InvalidRequest where the model cannot draw a character as a picture shows it."""
        if not self.has_ip_adapter:
            raise InvalidRequest(
                "characters",
                f"characters need an IP-Adapter, which the folder of {self.name} does not have: leave them out",
            )

    def consistency_of(self, asked: Consistency | None) -> Consistency:
        """What a request asks for, or the model's default. Raises InvalidRequest."""
        if self.consistency == "none":
            if asked == "story":
                raise InvalidRequest(
                    "consistency",
                    f"consistency is {asked!r} but the denoiser of {self.name} has no self-attention that pictures "
                    'could share: set it to "off", or leave it out',
                )
            return "off"
        return asked or self.consistency

    @property
    def samplers(self) -> tuple[str, ...]:
        """Names of the samplers that draw with this model."""
        return tuple(name for name in self.schedulers if name != DISTILLED or self.draw_distilled)

    @property
    def drawn_px(self) -> int:
        """Side of a picture that is drawn where a request asks for no size."""
        return self.image_px * self.upscale

    @property
    def max_drawn_pixels(self) -> int:
        """`max_pixels`, which are the VAE's, counted in drawn ones."""
        return self.max_pixels * self.upscale**2

    @property
    def side_bounds(self) -> tuple[int, int]:
        """Smallest and largest side of a picture that a request may ask for."""
        return min(MIN_SIDE, self.image_px), MAX_SIDE

    def size_of(self, draw: DrawSettings) -> tuple[int, int]:
        """Width and height of the picture that a request gets."""
        return draw.width or self.drawn_px, draw.height or self.drawn_px

    def native(self, draw: DrawSettings) -> DrawSettings:
        """Settings as the diffusion model draws them: of a size that it cannot draw, in its own size (0)."""
        width, height = self.size_of(draw)
        if width == height == self.drawn_px or not (self._is_of_vae(draw) or self._fits(width, height)):
            width = height = 0
        return dataclasses.replace(draw, width=width, height=height)

    def _is_of_vae(self, draw: DrawSettings) -> bool:
        """Whether it is the one size that the VAE itself paints, beside a second decoder."""
        return draw.width == draw.height == self.image_px

    def _fits(self, width: int, height: int) -> bool:
        multiple = self.size_multiple * self.upscale
        return width * height <= self.max_drawn_pixels and not width % multiple and not height % multiple

    def is_resampled(self, draw: DrawSettings) -> bool:
        """Whether a picture is drawn in the model's own size and then resampled."""
        return self.size_of(self.native(draw)) != self.size_of(draw)

    def relative_pixels(self, draw: DrawSettings) -> float:
        """Latents of a picture, by those of one of the model's own size: what a step costs."""
        width, height = self.size_of(self.native(draw))
        return 1.0 if self._is_of_vae(draw) else width * height / self.drawn_px**2

    def draw_settings(self, sent: Mapping[str, Any], *, like: DrawSettings | None = None) -> DrawSettings:
        """The fields of DrawSettings that a request sent, the others as in `like` (default: the model's default).

        Where that is the distilled UNet and the request asks for what only the UNet itself does (another scheduler,
        guidance, a style, more than MAX_DISTILLED_STEPS), the others are as in `draw`. Raises InvalidRequest.
        """
        base = self.drawable(like) if like else self.default_draw
        asked = dataclasses.replace(base, **sent)
        sent = {"width": base.width, "height": base.height, **sent}
        if base.scheduler == DISTILLED and not fits_distilled(asked) and sent.get("scheduler") != DISTILLED:
            asked = dataclasses.replace(self.draw, **sent)
        elif base.scheduler != DISTILLED and asked.scheduler == DISTILLED and self.draw_distilled:
            asked = dataclasses.replace(self.draw_distilled, **sent)
        self.check_draw(asked)
        return asked

    def check_draw(self, draw: DrawSettings) -> None:
        """Raises InvalidRequest where this model has no such sampler, or draws no such size."""
        check_sampler(draw, self.samplers)
        self.check_size(draw)
        self.check_style(draw)

    def check_style(self, draw: DrawSettings) -> None:
        """Raises InvalidRequest."""
        if draw.style and draw.style not in self.styles:
            served = f"but must be one of {', '.join(self.styles)}" if self.styles else "but this model has no styles"
            raise InvalidRequest("style", f"style is {draw.style[:80]!r} {served}, or left out")

    def check_size(self, draw: DrawSettings) -> None:
        """Raises InvalidRequest."""
        low, high = self.side_bounds
        for name, side in (("width", draw.width), ("height", draw.height)):
            if side and not low <= side <= high:
                raise InvalidRequest(name, f"{name} is {side} but must be from {low} to {high}")


def _check_shown(key: str, text: str, *, most: int, allowed: str = "") -> None:
    """Raise ValueError where a text is too long, or has characters that steer a terminal or cannot be encoded."""
    if len(text) > most:
        raise ValueError(f"{key} has {len(text)} characters but must have at most {most}")
    for place, character in enumerate(text):
        if unicodedata.category(character) in ("Cc", "Cs") and character not in allowed:
            raise ValueError(f"{key} has the control character {character!r} at {place}: remove it")


def fits_distilled(draw: DrawSettings) -> bool:
    is_fast = draw.guidance_scale == 1 and draw.steps <= MAX_DISTILLED_STEPS
    return draw.scheduler == DISTILLED and is_fast and not draw.style


def check_sampler(draw: DrawSettings, samplers: tuple[str, ...]) -> None:
    """Raises InvalidRequest for a sampler that is none of the model's `samplers`, for steps and guidance that nothing
    draws with, and where the distilled UNet is asked for what it does not do."""
    names = ", ".join(samplers)
    if draw.scheduler == DISTILLED and DISTILLED not in samplers:
        raise InvalidRequest(
            "scheduler", f"scheduler is {DISTILLED!r} but this model has no distilled UNet: use one of {names}"
        )
    if draw.scheduler not in samplers:
        raise InvalidRequest("scheduler", f"scheduler is {draw.scheduler!r} but must be one of {names}")
    most = MAX_LCM_STEPS if draw.scheduler == "lcm" else MAX_STEPS
    if not (isinstance(draw.steps, Integral) and 1 <= draw.steps <= most):
        message = f"steps is {draw.steps!r} but must be a whole number from 1 to {most} with {draw.scheduler}"
        raise InvalidRequest("steps", message)
    if not 1 <= draw.guidance_scale <= MAX_GUIDANCE:
        message = f"guidance_scale is {draw.guidance_scale} but must be from 1, which is none, to {MAX_GUIDANCE}"
        raise InvalidRequest("guidance_scale", message)
    if draw.scheduler != DISTILLED or fits_distilled(draw):
        return
    if draw.style:
        raise InvalidRequest(
            "style", f"style is {draw.style[:80]!r} but must be none with scheduler {DISTILLED!r}: leave out either"
        )
    name, limit = ("guidance_scale", "1") if draw.guidance_scale != 1 else ("steps", f"at most {MAX_DISTILLED_STEPS}")
    raise InvalidRequest(
        name, f"{name} is {getattr(draw, name):g} but must be {limit} with scheduler {DISTILLED!r}: leave out either"
    )


def storybook() -> ModelConfig:
    """The embedded default: small, CPU, drawn from a picture world of its own."""
    return ModelConfig(
        name="storybook",
        about=(
            "Writes and draws short picture stories in English, each about one character and one object. It knows "
            "30 characters, 24 objects and 6 places; for anything else it draws one of these.\n"
            "Characters: fox, rabbit, penguin, owl, elephant, lion, cat, dog, cow, pig, horse, duck, bird, turtle, "
            "frog, whale, bear, panda, tiger, monkey, mouse, chicken, snail, unicorn, dragon, robot, ghost, princess, "
            "snowman, butterfly.\n"
            "Objects: house, castle, tent, pine tree, palm tree, cactus, mushroom, sunflower, tulip, apple, banana, "
            "balloon, bicycle, car, bus, train, sailboat, rocket, tractor, fire, gift, cake, ball, umbrella.\n"
            "Places: meadow, beach, snow, forest, road, desert. Times: day, sunset, night, rain."
        ),
        examples=(
            "A fox who finds a balloon",
            "A brave penguin and a rocket",
            "A robot who dreams of a sunflower",
            "A dragon with a birthday cake",
            "An owl who finds a tent",
            "A panda who found a train",
        ),
        language_model="smollm2-135m-instruct",
        hidden=576,
        vocabulary=49152,
        context_tokens=1536,
        window_pages=8,
        vision=VisionConfig(
            encoder="efficientnet-lite0",
            encoder_width=1280,
            num_features=49,
            hidden=256,
            num_layers=4,
            num_heads=4,
        ),
        text_encoder="minilm-l6",
        condition_length=32,
        condition_width=384,
        image_px=128,
        guidance_rescale=0.7,
        lora=LoraConfig(
            rank=16,
            alpha=32,
            dropout=0.0,
            targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ),
        sampling=Sampling(temperature=0.7, top_p=0.9, max_page_tokens=64),
        draw=DrawSettings(steps=20, guidance_scale=3.0, scheduler=SDE_DPM_SOLVER),
        prefers_distilled=True,
        filters=("text", "picture"),
        licences=(
            "SmolLM2-135M-Instruct: Apache-2.0",
            "EfficientNet-Lite0: Apache-2.0",
            "all-MiniLM-L6-v2: Apache-2.0",
            "Noto emoji sprites (training pictures): Apache-2.0",
        ),
    )


def minigpt5_7b() -> ModelConfig:
    """The published system (arXiv 2310.02239): Vicuna-7B, EVA-CLIP ViT-g with Q-Former, Stable Diffusion 2.1."""
    return ModelConfig(
        name="minigpt5-7b",
        about=(
            "The published MiniGPT-5 model, for research. It writes text and draws pictures in one reply, taught by "
            "captioned pictures (CC3M), picture stories (VIST) and dialogues (MMDialog)."
        ),
        language_model="Vision-CAIR/vicuna-7b",
        hidden=4096,
        vocabulary=32000,
        context_tokens=2048,
        vision=VisionConfig(
            family="eva-clip",
            encoder="vision",
            encoder_width=1408,
            num_features=257,
            hidden=768,
            num_layers=12,
            num_heads=12,
            eva=EvaConfig(
                patch_px=14,
                num_layers=39,
                num_heads=16,
                intermediate=6144,
                qformer_intermediate=3072,
                cross_attention_every=2,
            ),
        ),
        text_encoder="stabilityai/stable-diffusion-2-1-base",
        diffusion="stabilityai/stable-diffusion-2-1-base",
        condition_length=77,
        condition_width=1024,
        image_px=512,
        lora=LoraConfig(rank=8, alpha=16, dropout=0.05, targets=("q_proj", "v_proj")),
        sampling=Sampling(temperature=1.0, top_p=0.9, repetition_penalty=2.0, max_page_tokens=256),
        draw=DrawSettings(steps=50, guidance_scale=7.5, scheduler="pndm"),
        licences=(
            "Vicuna-7B v0: the LLaMA licence, non-commercial",
            "EVA-CLIP: MIT",
            "BLIP-2 Q-Former: BSD-3-Clause",
            "Stable Diffusion 2.1-base: CreativeML Open RAIL++-M",
            "CC3M, VIST, MMDialog: the licences of their authors, for research",
        ),
    )


def default_model_folder() -> Path:
    """$MINIGPT5_MODEL, else the storybook model of the repository that this package is installed from.

    A copy of the code without models, as a submitted job runs in, uses those of the checkout that its Python has
    installed.
    """
    if named := os.environ.get("MINIGPT5_MODEL"):
        return Path(named).expanduser()
    beside = Path(__file__).resolve().parent.parent / "models" / "storybook"
    installed = None if beside.exists() else _installed_checkout()
    return installed / "models" / "storybook" if installed else beside


def _installed_checkout() -> Path | None:
    """Where `pip install -e` was run, as PEP 610 has it."""
    try:
        origin = json.loads(metadata.distribution("minigpt5").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return None
    url = urlsplit(origin.get("url", ""))
    is_checkout = url.scheme == "file" and origin.get("dir_info", {}).get("editable")
    return Path(unquote(url.path)) if is_checkout else None
