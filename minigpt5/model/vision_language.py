"""Vision-language models taken apart: their text half writes, and their own tower and projector read pictures.

Pictures are squares of one size, so that each becomes the same tokens: the model's own markers, and a fixed number of
embeddings. `FAMILIES` has what transformers' processors would do for a family; the processors themselves cannot be
loaded, because their video halves need torchvision.

Shape letters: N pictures, Q embeddings of one picture, H language-model width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from minigpt5.config import VisionConfig
from minigpt5.errors import ModelFolderError
from minigpt5.model.libraries import load_base_config, load_image_processor

UNREAD = ("num_crops", "rows", "cols")
"""What image processors tell the text processors alone."""


class Family(Protocol):
    """What a family of vision-language models does with a square picture."""

    unit_px: int
    """Sides of pictures are multiples of it."""
    max_units: int | None
    """None: as many as the context has room for."""
    default_px: int
    has_grid: bool
    """Whether the language model counts positions by rows and columns of a picture."""
    sees_whole_pictures: bool
    """Whether embeddings of a picture attend to all of it."""
    marked_by: str
    """Argument of transformers' own model that marks embeddings of pictures, or none."""

    def options(self, px: int) -> dict[str, Any]:
        """What the image processor is called with."""

    def text(self, px: int, image_token: str, num_embeddings: int) -> str:
        """The text of a picture in a prompt, with `image_token` for each embedding."""

    def embed(self, model: Any, pixels: Tensor, facts: dict[str, Tensor]) -> Any:
        """Embeddings of N pictures, (Q, H) each, as the model's own forward has them.

        `pixels` is what the processor makes of each picture, stacked; `facts` is what else it says of one picture.
        """


class QwenVL:
    """Qwen2-VL and Qwen2.5-VL: pictures of any size, one embedding for each square of 28 pixels."""

    has_grid, sees_whole_pictures, max_units, marked_by = True, False, None, "mm_token_type_ids"

    def __init__(self, config: Any, processor: Any) -> None:
        self.unit_px = processor.patch_size * processor.merge_size
        self.default_px = 12 * self.unit_px

    def options(self, px: int) -> dict[str, Any]:
        return {"size": {"shortest_edge": px * px, "longest_edge": px * px}}

    def text(self, px: int, image_token: str, num_embeddings: int) -> str:
        return f"<|vision_start|>{image_token * num_embeddings}<|vision_end|>"

    def embed(self, model: Any, pixels: Tensor, facts: dict[str, Tensor]) -> Any:
        grid_N3 = facts["image_grid_thw"].expand(len(pixels), -1)
        return model.get_image_features(pixels.flatten(0, 1), image_grid_thw=grid_N3).pooler_output


class Qwen3VL(QwenVL):
    """Qwen3-VL: beside the embeddings, features of earlier layers of the tower for the first layers of the language
    model (DeepStack, arXiv 2406.04334). They lie after each embedding: a picture is (Q, H and H more for each layer).
    """

    def embed(self, model: Any, pixels: Tensor, facts: dict[str, Tensor]) -> Any:
        grid_N3 = facts["image_grid_thw"].expand(len(pixels), -1)
        found = model.get_image_features(pixels.flatten(0, 1), image_grid_thw=grid_N3)
        return [
            torch.cat(layers, dim=-1) for layers in zip(found.pooler_output, *found.deepstack_features, strict=True)
        ]


class Idefics3:
    """Idefics3 and SmolVLM: one tile, or several row by row and the whole picture after them, as one tile too."""

    has_grid, sees_whole_pictures, max_units, marked_by = False, False, None, ""

    def __init__(self, config: Any, processor: Any) -> None:
        self.unit_px = self.default_px = processor.max_image_size["longest_edge"]

    def options(self, px: int) -> dict[str, Any]:
        return {"do_image_splitting": px > self.unit_px, "size": {"longest_edge": px}}

    def text(self, px: int, image_token: str, num_embeddings: int) -> str:
        side = px // self.unit_px if px > self.unit_px else 0
        fake, tile = "<fake_token_around_image>", image_token * (num_embeddings // (side * side + 1))
        rows = [
            "".join(f"{fake}<row_{row}_col_{column}>{tile}" for column in range(1, side + 1)) + "\n"
            for row in range(1, side + 1)
        ]
        return "".join([*rows, "\n" if side else "", f"{fake}<global-img>{tile}{fake}"])

    def embed(self, model: Any, pixels: Tensor, facts: dict[str, Tensor]) -> Any:
        return model.get_image_features(pixels.flatten(0, 1)).pooler_output


class LlavaOnevision:
    """LLaVA-OneVision: one tile and a newline, as it reads each of several pictures; a picture that is alone is no
    exception here."""

    has_grid, sees_whole_pictures, max_units, marked_by = False, False, 1, ""

    def __init__(self, config: Any, processor: Any) -> None:
        self.unit_px = self.default_px = config.vision_config.image_size

    def options(self, px: int) -> dict[str, Any]:
        return {"image_grid_pinpoints": [[px, px]]}

    def text(self, px: int, image_token: str, num_embeddings: int) -> str:
        return image_token * num_embeddings

    def embed(self, model: Any, pixels: Tensor, facts: dict[str, Tensor]) -> Any:
        first_tiles = pixels[:, 0, :1]  # of a picture that is alone, the processor makes others after it
        sizes_N2 = facts["image_sizes"].expand(len(pixels), -1)
        is_one_of_many = torch.tensor([len(pixels) + 1])
        found = model.get_image_features(first_tiles, image_sizes=sizes_N2, batch_num_images=is_one_of_many)
        return found.pooler_output


class Gemma3:
    """Gemma 3: pictures of one size, whose embeddings attend to each other in both directions."""

    has_grid, sees_whole_pictures, max_units, marked_by = False, True, 1, "token_type_ids"

    def __init__(self, config: Any, processor: Any) -> None:
        self.unit_px = self.default_px = config.vision_config.image_size

    def options(self, px: int) -> dict[str, Any]:
        return {"do_pan_and_scan": False}

    def text(self, px: int, image_token: str, num_embeddings: int) -> str:
        return f"\n\n<start_of_image>{image_token * num_embeddings}<end_of_image>\n\n"

    def embed(self, model: Any, pixels: Tensor, facts: dict[str, Tensor]) -> Any:
        return model.get_image_features(pixels.flatten(0, 1)).pooler_output


FAMILIES: dict[str, type] = {
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": Qwen3VL,
    "idefics3": Idefics3,
    "smolvlm": Idefics3,
    "llava_onevision": LlavaOnevision,
    "gemma3": Gemma3,
}
"""By the `model_type` of the base's config."""


def is_vision_language(folder: str | Path) -> bool:
    """Tell whether a base model has a vision tower of its own."""
    return hasattr(load_base_config(folder), "vision_config")


def find_family(folder: str | Path) -> str:
    """The key of FAMILIES that a base model has. Raises ModelFolderError where it has none."""
    kind = load_base_config(folder).model_type
    if kind not in FAMILIES:
        raise ModelFolderError(
            f"{folder} is a vision-language model of type {kind}, whose way to read pictures is not known here: name "
            f"one of type {', '.join(FAMILIES)}, or leave its tower out with --vision none"
        )
    return kind


class OwnEncoder(nn.Module):
    """A vision-language model's tower and projector with its image processor, frozen.

    `prepare` and `forward` are as in the other encoders, but that `forward` gives what the language model reads.
    """

    def __init__(self, model: Any, folder: str | Path, *, image_px: int | None = None) -> None:
        """`model`: transformers' own, which `load_base` reads; its text half stays in it until `drop_text_half`.

        Raises ModelFolderError where its family is none of FAMILIES, or cannot read pictures of `image_px`.
        """
        super().__init__()
        self.network: Any = model.base_model
        self.processor: Any = load_image_processor(folder)
        self.family: Family = FAMILIES[find_family(folder)](model.config, self.processor)
        self.image_px = image_px or self.family.default_px
        num_units, rest = divmod(self.image_px, self.family.unit_px)
        if rest or num_units > (self.family.max_units or num_units):
            sizes = f"{self.family.unit_px}" if self.family.max_units == 1 else f"a multiple of {self.family.unit_px}"
            raise ModelFolderError(f"image_px is {self.image_px} but {folder} reads pictures of {sizes} pixels")
        self.facts = self.process(torch.zeros(1, 3, self.image_px, self.image_px))
        self.facts.pop("pixel_values")
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> OwnEncoder:
        return super().train(False)

    def drop_text_half(self) -> None:
        """Leave the text half to the LanguageModel that was made of it, which may put it elsewhere."""
        text_half = self.network.get_decoder()
        for name, module in self.network.named_children():
            if module is text_half:
                setattr(self.network, name, None)

    def process(self, pixels_1CYX: Tensor) -> dict[str, Tensor]:
        """A square of pixels from 0 to 255, as the model's own processor scales and cuts it."""
        picture = Image.fromarray(pixels_1CYX[0].byte().permute(1, 2, 0).cpu().numpy())
        if picture.width != self.image_px:
            picture = picture.resize((self.image_px, self.image_px), self.processor.resample)
        options = self.family.options(self.image_px)
        return dict(self.processor(images=np.asarray(picture), return_tensors="pt", **options))

    def prepare(self, pixels_NCYX: Tensor) -> Tensor:
        return torch.stack([self.process(pixels_CYX[None])["pixel_values"] for pixels_CYX in pixels_NCYX])

    @torch.no_grad()
    def forward(self, prepared: Tensor) -> Tensor:
        """What `prepare` gives for N pictures -> (N, Q, H)."""
        facts = {name: value.to(prepared.device) for name, value in self.facts.items()}
        return torch.stack(tuple(self.family.embed(self.network, prepared, facts)))

    @torch.no_grad()
    def own_states(self, model: Any, ids_1S: Tensor, pictures: Sequence[np.ndarray], *, placeholder: int) -> Tensor:
        """Last hidden states of transformers' own model, which reads the pictures itself: (1, S, H)."""
        return model.base_model(**self.own_inputs(ids_1S, pictures, placeholder=placeholder)).last_hidden_state

    def own_inputs(self, ids_1S: Tensor, pictures: Sequence[np.ndarray], *, placeholder: int) -> dict[str, Tensor]:
        """What transformers' own model takes for one sequence; its pictures are squares of `image_px`."""
        is_picture_1S = ids_1S == placeholder
        inputs = dict(
            self.processor(images=[list(pictures)], return_tensors="pt", **self.family.options(self.image_px))
        )
        inputs["input_ids"] = ids_1S.masked_fill(is_picture_1S, self.network.config.image_token_id)
        inputs["attention_mask"] = torch.ones_like(ids_1S)
        if self.family.marked_by:
            inputs[self.family.marked_by] = is_picture_1S.int()
        return {name: value for name, value in inputs.items() if name not in UNREAD}

    def vision_config(self, base_id: str, tokenizer: PreTrainedTokenizerBase) -> VisionConfig:
        """Sizes and the tokens of a picture, from one look at a black one. Raises ModelFolderError where the tokenizer
        lacks the model's image token."""
        _, num_embeddings, width = self(self.prepare(torch.zeros(1, 3, self.image_px, self.image_px))).shape
        return VisionConfig(
            family="own",
            encoder=base_id,
            image_px=self.image_px,
            encoder_width=width,
            num_features=num_embeddings,
            hidden=0,
            num_layers=0,
            num_heads=0,
            num_queries=num_embeddings,
            picture=self._picture_tokens(tokenizer, num_embeddings),
            grid_side=math.isqrt(num_embeddings) if self.family.has_grid else 0,
            sees_whole_pictures=self.family.sees_whole_pictures,
        )

    def _picture_tokens(self, tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> tuple[int, ...]:
        image_id = self.network.config.image_token_id
        text = self.family.text(self.image_px, tokenizer.convert_ids_to_tokens(image_id), num_embeddings)
        ids = tokenizer.encode(text, add_special_tokens=False)
        runs = [(token, len(list(run))) for token, run in itertools.groupby(ids)]
        if sum(num for token, num in runs if token == image_id) != num_embeddings:
            raise ModelFolderError(
                f"the tokenizer does not know its model's image token {image_id}: use the tokenizer that came with it"
            )
        return tuple(
            itertools.chain.from_iterable([-num] if token == image_id else [token] * num for token, num in runs)
        )
