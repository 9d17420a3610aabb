"""IP-Adapter (arXiv 2308.06721): a UNet that attends to pictures beside its condition, and draws what they show.

`ip_adapter/` of a model folder has `ip_adapter.safetensors`, in the format of the authors and of diffusers, and the
frozen `image_encoder/`, in transformers' layout. diffusers' own classes hold the weights. They are put into the UNet
for one call, and concern the rows alone that have pictures to attend to.

Shape letters: B rows of a call, N positions of one layer, K pictures, T embeddings of one picture, D condition width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection, IPAdapterFullImageProjection, IPAdapterPlusImageProjection
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from minigpt5.errors import ModelFolderError
from minigpt5.model.libraries import load_whole
from minigpt5.model.weights import load_tensors
from minigpt5.pictures import open_picture

MAX_RATIO = 2
"""Of a picture's sides, as the encoder's processor gets it: that resizes the short one and then cuts, so that a line of
1 x 4,000 pixels would take gigabytes. What is beyond has no part in the middle that is left."""
WEIGHTS = "ip_adapter.safetensors"
ENCODER = "image_encoder"
SCALE = 0.6
"""How much a picture counts beside the condition: the authors advise 0.5 to 0.6 where there is a text, too."""


def _middle(picture: bytes) -> Image.Image:
    """A picture file, cut to a middle of MAX_RATIO. Raises BadPicture."""
    found = open_picture(picture)
    longest = MAX_RATIO * min(found.size)
    left, top = (max(0, side - longest) // 2 for side in found.size)
    return found.crop((left, top, found.width - left, found.height - top))


class IpAdapter(nn.Module):
    """The adapter of one denoiser, for inference. One thread uses it."""

    def __init__(self, encoder: Any, projection: nn.Module, processors: Mapping[str, nn.Module]) -> None:
        """`processors`: of the denoiser's layers of cross-attention, by the names of the layers."""
        super().__init__()
        self.encoder, self.projection = encoder, projection
        self.processors = nn.ModuleList(processors.values())
        self._names = list(processors)
        side = encoder.config.image_size
        self._prepare: Any = CLIPImageProcessorPil(size=side, crop_size=side)  # the other one needs torchvision
        self.set_scale(SCALE)

    @classmethod
    def from_folder(cls, folder: Path, denoiser: Any) -> IpAdapter:
        """Read an adapter of `denoiser`, as float32. Raises ModelFolderError where it does not fit."""
        weights: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for name, value in load_tensors(folder / WEIGHTS).items():
            part, _, rest = name.partition(".")
            weights.get(part, {})[rest] = value.float()
        try:
            projection = denoiser._convert_ip_adapter_image_proj_to_diffusers(weights["image_proj"], False)
            found = denoiser._convert_ip_adapter_attn_to_diffusers([weights], False)
            encoder = load_whole(CLIPVisionModelWithProjection, folder / ENCODER, dtype=torch.float32)
            processors = {
                name.removesuffix(".processor"): processor
                for name, processor in found.items()
                if isinstance(processor, nn.Module)
            }
            adapter = cls(encoder, projection, processors).eval()
            adapter.to(denoiser.device)
            adapter._project(torch.zeros(1, 3, encoder.config.image_size, encoder.config.image_size))
        except (OSError, KeyError, IndexError, RuntimeError, ValueError) as error:
            raise ModelFolderError(
                f"{folder} is no IP-Adapter of this model's {type(denoiser).__name__} ({str(error)[:300]}): add one "
                "that was trained for it, with its own image_encoder/, or remove it"
            ) from error
        return adapter

    def set_scale(self, scale: float) -> None:
        """How much pictures count beside the condition, from now on."""
        processors: Iterable[Any] = self.processors
        for processor in processors:
            processor.scale = [scale]

    @torch.no_grad()
    def states(self, pictures: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """What the UNet attends to for picture files, and for as many of none: (K T, D) both. Raises BadPicture."""
        pixels = [self._prepare(_middle(picture), return_tensors="pt").pixel_values for picture in pictures]
        none_TD = self._project(torch.zeros_like(pixels[0]), is_none=True)
        return torch.cat([self._project(one) for one in pixels]), none_TD.repeat(len(pictures), 1)

    def _project(self, pixels_1CYX: Tensor, *, is_none: bool = False) -> Tensor:
        """(T, D), as diffusers' pipelines do: no picture is an embedding of zeros, or the states of a picture of
        zeros."""
        pixels_1CYX = pixels_1CYX.to(self.encoder.device, self.encoder.dtype)
        if isinstance(self.projection, ImageProjection):
            embeds_1D = self.encoder(pixels_1CYX).image_embeds
            return self.projection(torch.zeros_like(embeds_1D) if is_none else embeds_1D)[0]
        if not isinstance(self.projection, IPAdapterPlusImageProjection | IPAdapterFullImageProjection):
            raise ValueError(f"a {type(self.projection).__name__} needs more than an image encoder")
        return self.projection(self.encoder(pixels_1CYX, output_hidden_states=True).hidden_states[-2])[0]

    @contextmanager
    def attending(self, denoiser: Any, states_of: Mapping[int, Tensor]) -> Iterator[None]:
        """Within it, rows of `denoiser`'s calls attend to these states (K T, D) too; where there are none, nothing is
        changed. `denoiser`: the adapter's, or another one with the same layers."""
        layers = dict(denoiser.named_modules()) if states_of else {}
        changed = {
            layers[name]: processor for name, processor in zip(self._names, self.processors, strict=True) if layers
        }
        plain = {layer: layer.processor for layer in changed}
        for layer, processor in changed.items():
            layer.processor = _Attending(plain[layer], processor, states_of)
        try:
            yield
        finally:
            for layer, processor in plain.items():
                layer.processor = processor


class _Attending:
    """Stands for the `plain` processor of one cross-attention, during one call of the denoiser."""

    def __init__(self, plain: Any, adapted: Any, states_of: Mapping[int, Tensor]) -> None:
        self._plain, self._adapted, self._states_of = plain, adapted, states_of

    def __call__(
        self, attention: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, **options: Any
    ) -> Tensor:
        """(B, N, C) -> (B, N, C). Rows without pictures are computed as they are without this processor."""
        result_BNC = torch.empty_like(hidden_states)
        others = [row for row in range(len(hidden_states)) if row not in self._states_of]
        if others:
            result_BNC[others] = self._plain(
                attention, hidden_states[others], encoder_hidden_states=encoder_hidden_states[others], **options
            )
        for num in {len(states) for states in self._states_of.values()}:
            rows = [row for row, states in self._states_of.items() if len(states) == num]
            shown = torch.stack([self._states_of[row] for row in rows]).to(hidden_states.dtype)
            result_BNC[rows] = self._adapted(
                attention,
                hidden_states[rows],
                encoder_hidden_states=(encoder_hidden_states[rows], [shown]),
                **options,
            )
        return result_BNC
