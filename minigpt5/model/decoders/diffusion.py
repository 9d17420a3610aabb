"""The one face of latent diffusion models: condition in, noise to latents, latents <-> pictures.

A family is a subclass in a file of its own; `load.py` chooses it by the folder's `model_index.json`. Models, samplers
and VAEs are diffusers' own, in its folder layout.

The condition is one tensor (B, Q, D): the states that the denoiser attends to. Where a family also reads one vector of
the whole caption, the last position holds it, with zeros up to D. A position of zeros is padding where a family masks.

Shape letters: B pictures, C latent channels, M moments of the VAE, Y X latent rows and columns, Q condition positions,
D condition width, P width of the vector; of pictures, C = 3 and Y X are pixels.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from minigpt5.errors import InvalidRequest, ModelFolderError
from minigpt5.model.decoders.noise import NoiseProcess
from minigpt5.model.decoders.styles import Styles
from minigpt5.model.libraries import load_whole
from minigpt5.model.weights import stored_dtype
from minigpt5.types import DISTILLED, DISTILLED_FOLDER, DrawSettings

DECODED_PIXELS = 2**21
"""Pixels that the VAE encodes or decodes in one call. A larger picture is decoded in tiles, unless the second decoder
paints it."""
PREVIEWED_LATENTS = 4
"""Smooth random latents that say how a latent's channels look, each PREVIEW_SIDE x PREVIEW_SIDE."""
PREVIEW_SIDE = 16


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """What a model folder must know of its diffusion model."""

    condition_length: int
    condition_width: int
    condition_pooled: int = 0
    """Width of the caption's one vector; 0: the family reads none."""
    image_px: int
    draw: DrawSettings
    """As the family draws best."""

    def __post_init__(self) -> None:
        if self.condition_pooled > self.condition_width:
            raise ModelFolderError(
                f"the vector of a caption is {self.condition_pooled} wide but its states are {self.condition_width}: "
                "this family's folder cannot be used"
            )


class Diffusion(nn.Module, ABC):
    """A latent diffusion model. All parameters are trainable as loaded; callers freeze what they do not train."""

    PIPELINES: ClassVar[tuple[str, ...]] = ()
    """diffusers' pipelines of this family, as `model_index.json` names them."""
    DENOISER: ClassVar[str] = "transformer"
    """Folder of the denoiser."""
    PATCH: ClassVar[int] = 1
    """Sides of a picture's latents are multiples of this."""
    ZERO_IS_EMPTY: ClassVar[bool] = False
    """Whether a position of zeros holds no state of the caption: padding, or an encoder that the folder lacks."""
    PIPELINE_OPTIONS: ClassVar[dict[str, Any]] = {}
    """What the pipeline is asked for beside the caption and the draw settings, to draw as the family does."""

    def __init__(
        self, vae: nn.Module, denoiser: nn.Module, noise: NoiseProcess, distilled: nn.Module | None = None
    ) -> None:
        """`distilled`: a second denoiser, which includes guidance and needs few steps."""
        super().__init__()
        self.vae: Any = vae
        self.denoiser: Any = denoiser
        self.distilled: Any = distilled
        self.noise = noise
        self.dtype = torch.float32
        """What the denoiser takes; see `hold_in`."""
        self.styles: Styles | None = None
        """Adapters of `denoiser`, for inference; None: there are none."""
        self.ip_adapter: Any = None
        """What lets both denoisers attend to pictures (ip_adapter.py), for inference; None: they cannot."""
        self.upscaling: Any = None
        """A second decoder of the VAE's latents (upscaling.py), for inference; None: there is none."""
        self.stand_ins: dict[str, Any] = {}
        """What computes "denoiser", "distilled", "upscaling" or the decoder of "vae" in their place, for inference; by
        backends/choose.py."""
        self._to_rgb: Tensor | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Diffusion:
        """Read the VAE, the denoiser, the schedule and, where there is one, the distilled denoiser as float32."""
        return cls.from_folders(vae=folder, denoiser=folder)

    @classmethod
    def from_folders(
        cls,
        *,
        vae: str | Path,
        denoiser: str | Path,
        distilled: str | Path | None = None,
        keeps_dtype: bool = False,
    ) -> Diffusion:
        """Read the VAE from one folder and all else from another, as float32. `distilled`: the folder that has
        `unet_distilled/`, where that is not the denoiser's. `keeps_dtype`: see `stored_dtype`."""
        return cls(
            load_part(vae, "vae", keeps_dtype=keeps_dtype),
            load_part(denoiser, cls.DENOISER, keeps_dtype=keeps_dtype),
            cls.load_noise(denoiser),
            load_distilled(distilled or denoiser, keeps_dtype=keeps_dtype),
        )

    @classmethod
    @abstractmethod
    def load_noise(cls, folder: str | Path) -> NoiseProcess:
        """Read the noise process in `scheduler/`, whichever sampler it was made for."""

    @classmethod
    @abstractmethod
    def read_sizes(cls, folder: Path) -> DecoderSizes:
        """Sizes from config files alone. Raises ModelFolderError where the folder's kind does not fit."""

    @classmethod
    @abstractmethod
    def load_text_encoder(cls, folder: str | Path, *, num_positions: int) -> nn.Module:
        """The base's own text encoders: a list of captions -> the condition (B, Q, D)."""

    @abstractmethod
    def predict(
        self,
        denoiser: Any,
        latents_BCYX: Tensor,
        timesteps_B: Tensor,
        condition_BQD: Tensor,
        *,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        """Call the denoiser. `guidance_B`: the guidance scales, for a denoiser that takes them as an input."""

    @property
    def samplers(self) -> tuple[str, ...]:
        """Names of the samplers that draw."""
        return tuple(name for name in self.noise.samplers if name != DISTILLED or self.distilled is not None)

    @property
    def noise_schedule(self) -> Any:
        return self.noise.schedule

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square of pixels that one latent stands for."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def multiple(self) -> int:
        """Widths and heights are multiples of this many pixels."""
        return self.PATCH * self.pixels_per_latent

    @property
    def native_px(self) -> int:
        """Side of the square picture that the denoiser was trained to draw, as the VAE paints it."""
        return int(self.denoiser.config.sample_size * self.pixels_per_latent)

    def scale_of(self, draw: DrawSettings) -> int:
        """How many times as large the picture is as the VAE would paint it: the square that the VAE itself paints is
        the only one that the second decoder does not."""
        is_vaes = draw.width == draw.height == self.native_px
        return 1 if self.upscaling is None or is_vaes else int(self.upscaling.config.scale)

    @property
    def latent_channels(self) -> int:
        return int(self.denoiser.config.in_channels)

    def latent_shape(self, draw: DrawSettings) -> tuple[int, int, int]:
        """(C, Y, X) of a picture's latents. Raises InvalidRequest where a side is no multiple."""
        scale = self.scale_of(draw)
        native_px, multiple, per_latent = (
            scale * value for value in (self.native_px, self.multiple, self.pixels_per_latent)
        )
        width, height = draw.width or native_px, draw.height or native_px
        for name, side in (("width", width), ("height", height)):
            if side % multiple:
                raise InvalidRequest(name, f"{name} is {side} but must be a multiple of {multiple} with this model")
        return self.latent_channels, height // per_latent, width // per_latent

    def unpack(self, latents: Tensor, draw: DrawSettings) -> Tensor:
        """Latents as the family's pipeline returns them -> (B, C, Y, X)."""
        return latents

    def is_guided(self, draw: DrawSettings) -> bool:
        """Whether a step needs a second prediction, without the condition."""
        return draw.guidance_scale > 1

    def new_sampler(self, draw: DrawSettings) -> Any:
        """A sampler of one picture, with its timesteps. Raises InvalidRequest where it has no such number of steps."""
        sampler = self.noise.new_sampler(draw.scheduler)
        try:
            self.set_timesteps(sampler, draw)
        except ValueError as error:
            raise InvalidRequest(
                "steps", f"steps is {draw.steps}, which {draw.scheduler} cannot do: {error}"
            ) from error
        return sampler

    def set_timesteps(self, sampler: Any, draw: DrawSettings) -> None:
        sampler.set_timesteps(draw.steps)

    def hold_in(self, dtype: torch.dtype) -> None:
        """Keep the weights in a smaller type, for inference. A VAE that its config says to overflow stays float32."""
        self.dtype = dtype
        parts = [self.denoiser, self.distilled, self.ip_adapter]
        parts += [vae for vae in (self.vae, self.upscaling) if vae is not None and not vae.config.get("force_upcast")]
        for part in parts:
            if part is not None:
                nn.Module.to(part, dtype)  # diffusers' own warns of parts that must stay float32 where there are none

    def denoiser_for(self, sampler: str, style: str = "", *, is_changed: bool = False) -> Any:
        """Return the denoiser that a sampler draws with, or what stands in for it, which cannot take the place of
        one that is changed: by a style, or with `is_changed` in its attention. Styles are in the weights of
        `denoiser` alone. Raises ModelFolderError."""
        if sampler != DISTILLED:
            return self.denoiser if style or is_changed else self.stand_ins.get("denoiser", self.denoiser)
        if self.distilled is None:
            raise ModelFolderError(
                f"scheduler is {sampler!r} but this model has no distilled UNet: use one of {', '.join(self.samplers)}"
            )
        return self.distilled if is_changed else self.stand_ins.get("distilled", self.distilled)

    @property
    def shares_attention(self) -> bool:
        """Whether a picture can attend to another one (shared_attention.py)."""
        return False

    def check_shares_attention(self) -> None:
        """Raises InvalidRequest where a picture cannot attend to another one."""
        if not self.shares_attention:
            raise InvalidRequest(
                "consistency",
                f"consistency is 'story' but a {type(self.denoiser).__name__} ({type(self).__name__}) has no "
                "self-attention that pictures could share: set it to 'off'",
            )

    def load_ip_adapter(self, folder: Path) -> None:
        """Raises ModelFolderError where this family, or this denoiser, cannot use what is in the folder."""
        raise ModelFolderError(
            f"{folder} is an IP-Adapter, and a {type(self.denoiser).__name__} ({type(self).__name__}) cannot use one "
            "here: remove it"
        )

    def attending(self, denoiser: Any, states_of: Mapping[int, Tensor]) -> AbstractContextManager[None]:
        """Let rows of `denoiser`'s calls attend to states of pictures; see IpAdapter."""
        return self.ip_adapter.attending(denoiser, states_of) if states_of else nullcontext()

    def use_style(self, name: str) -> None:
        """Let `denoiser` draw in a style, or in none (""), from now on. Raises ModelFolderError."""
        if self.styles is not None:
            self.styles.use(name)
        elif name:
            raise ModelFolderError(f"there is no style {name!r} in this model: draw without one")

    def to_moments(self, pixels_BCYX: Tensor) -> Tensor:
        """Pictures in [-1, 1] -> the posterior's mean and log variance, as the VAE gives them: (B, M, Y, X)."""
        _, _, rows, columns = pixels_BCYX.shape
        parts = pixels_BCYX.split(max(1, DECODED_PIXELS // (rows * columns)))
        return torch.cat([self.encode(part) for part in parts])

    def encode(self, pixels_BCYX: Tensor) -> Tensor:
        """`to_moments` in one call of the VAE."""
        return self.vae.encode(pixels_BCYX).latent_dist.parameters

    def to_latents(self, pixels_BCYX: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Pictures in [-1, 1] -> normalised latents: the posterior's mode, or a sample where `noise` is given."""
        return self.from_moments(self.to_moments(pixels_BCYX), noise=noise)

    def from_moments(self, moments_BMYX: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """What `to_moments` gives -> normalised latents; see `to_latents`."""
        posterior = DiagonalGaussianDistribution(moments_BMYX.float())
        latents_BCYX = posterior.mode() if noise is None else posterior.mean + posterior.std * noise
        return self.normalise(latents_BCYX)

    def noise_like_latents(self, moments_BMYX: Tensor) -> Tensor:
        """Noise for `from_moments`."""
        return normal_like(moments_BMYX.chunk(2, dim=1)[0].float())

    def normalise(self, latents_BCYX: Tensor) -> Tensor:
        """To the denoiser's scale."""
        mean, std = self._statistics(latents_BCYX)
        return (latents_BCYX - mean) / std

    def denormalise(self, latents_BCYX: Tensor) -> Tensor:
        mean, std = self._statistics(latents_BCYX)
        return latents_BCYX * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The mean, per channel where the VAE's config has statistics, and what a unit of normalised latents is."""
        config = self.vae.config
        if config.get("latents_mean") is None:
            zero = torch.zeros(1, dtype=like.dtype, device=like.device)
            return zero + (config.get("shift_factor") or 0.0), zero + 1 / config.scaling_factor
        mean, std = (
            torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std / (config.get("scaling_factor") or 1.0)

    def to_pixels(self, latents_BCYX: Tensor, *, scale: int = 1) -> Tensor:
        """Normalised latents -> pictures in [-1, 1], some at a time, by the VAE or, where `scale_of` is more than 1, by
        the second decoder."""
        _, _, rows, columns = latents_BCYX.shape
        num_pixels = rows * columns * (scale * self.pixels_per_latent) ** 2
        if scale > 1:
            parts = latents_BCYX.split(max(1, DECODED_PIXELS // num_pixels))
            return torch.cat([self._upscaled(part).clamp(-1, 1) for part in parts])
        tiled = num_pixels > DECODED_PIXELS
        if tiled:
            self.vae.enable_tiling()
        parts = latents_BCYX.split(max(1, DECODED_PIXELS // num_pixels))
        try:
            return torch.cat([self.to_raw_pixels(part).clamp(-1, 1) for part in parts])
        finally:
            if tiled:
                self.vae.disable_tiling()

    def _upscaled(self, latents_BCYX: Tensor) -> Tensor:
        decode = self.stand_ins.get("upscaling", self.upscaling.decode)
        return decode(self.denormalise(latents_BCYX).to(self.upscaling.dtype)).sample.to(latents_BCYX.dtype)

    def to_raw_pixels(self, latents_BCYX: Tensor) -> Tensor:
        """Decode as `to_pixels` does, without cutting values outside of [-1, 1] off: a loss needs them."""
        latents_BCYX = self.denormalise(latents_BCYX)
        is_tiled = getattr(self.vae, "use_tiling", False)
        decode = self.vae.decode if is_tiled else self.stand_ins.get("vae", self.vae.decode)
        return decode(latents_BCYX.to(self.vae.dtype)).sample.to(latents_BCYX.dtype)

    @torch.no_grad()
    def to_preview(self, latents_BCYX: Tensor) -> Tensor:
        """Normalised latents -> small pictures in [-1, 1], one pixel a latent, without the VAE: the linear map from
        channels to colours that fits what the VAE makes of smooth random latents."""
        if self._to_rgb is None:
            self._to_rgb = self._fit_colours(latents_BCYX)
        with_one_BYXC = F.pad(latents_BCYX.float().permute(0, 2, 3, 1), (0, 1), value=1.0)
        return (with_one_BYXC @ self._to_rgb).permute(0, 3, 1, 2).clamp(-1, 1)

    def _fit_colours(self, like: Tensor) -> Tensor:
        """(C + 1, 3): the last row is the colour of no latent."""
        generator = torch.Generator().manual_seed(0)
        shape = (PREVIEWED_LATENTS, self.latent_channels)
        latents_BCYX = torch.zeros(*shape, PREVIEW_SIDE, PREVIEW_SIDE)
        for side in (1, 2, 4, 8):  # as pictures are: more of the coarse than of the fine
            coarse = torch.randn(*shape, side, side, generator=generator) / 2
            latents_BCYX += F.interpolate(coarse, (PREVIEW_SIDE, PREVIEW_SIDE), mode="bilinear")
        pixels_BCYX = self.to_pixels(latents_BCYX.to(like)).float()
        colours_BCYX = F.interpolate(pixels_BCYX, (PREVIEW_SIDE, PREVIEW_SIDE), mode="area").cpu()
        latents_NC = F.pad(latents_BCYX.permute(0, 2, 3, 1), (0, 1), value=1.0).flatten(0, 2)
        fitted = torch.linalg.lstsq(latents_NC, colours_BCYX.permute(0, 2, 3, 1).flatten(0, 2)).solution
        return fitted.to(like.device)

    def training_loss(self, latents_BCYX: Tensor, condition_BQD: Tensor, *, first_timestep: int = 0) -> Tensor:
        """Sample noise and timesteps and return the mean denoising loss.

        With `first_timestep` above 0, sample timesteps from there on and leave out the weights of the loss. What a
        picture shows, and where, is decided while there is much noise.
        """
        timesteps = self.noise.sample_timesteps(len(latents_BCYX), first=first_timestep)
        measure = self.unweighted_loss if first_timestep else self.weighted_loss
        noise = normal_like(latents_BCYX)
        return measure(latents_BCYX, condition_BQD, noise=noise, timesteps=timesteps.to(latents_BCYX.device)).mean()

    def weighted_loss(self, latents_BCYX: Tensor, condition_BQD: Tensor, *, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute the denoising loss with the noise process's weights, one value a picture: (B,)."""
        loss_B = self.unweighted_loss(latents_BCYX, condition_BQD, noise=noise, timesteps=timesteps)
        return loss_B * self.noise.loss_weight(timesteps)

    def unweighted_loss(
        self, latents_BCYX: Tensor, condition_BQD: Tensor, *, noise: Tensor, timesteps: Tensor
    ) -> Tensor:
        """Compute the mean squared error of the prediction, one value a picture: (B,)."""
        noisy_BCYX = self.noise.add_noise(latents_BCYX, noise, timesteps)
        predicted_BCYX = self.predict(self.denoiser, noisy_BCYX, timesteps, condition_BQD)
        target_BCYX = self.noise.target(latents_BCYX, noise, timesteps)
        return F.mse_loss(predicted_BCYX.float(), target_BCYX.float(), reduction="none").mean(dim=(1, 2, 3))

    def predict_x0(
        self,
        latents_BCYX: Tensor,
        condition_BQD: Tensor,
        *,
        noise: Tensor,
        timesteps: Tensor,
        sampler: str = "ddim",
    ) -> Tensor:
        """Add noise to the latents and return the estimate of the clean latents (x0): (B, C, Y, X). The denoiser is
        the one that `sampler` draws with."""
        noisy_BCYX = self.noise.add_noise(latents_BCYX, noise, timesteps)
        predicted_BCYX = self.predict(self.denoiser_for(sampler), noisy_BCYX, timesteps, condition_BQD)
        return self.noise.predict_x0(noisy_BCYX, predicted_BCYX, timesteps)


def split_pooled(condition_BQD: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """A condition -> the states (B, Q - 1, D) and the caption's one vector (B, P); B may be several axes."""
    return condition_BQD[..., :-1, :], condition_BQD[..., -1, :width]


def join_pooled(states_BQD: Tensor, pooled_BP: Tensor) -> Tensor:
    """States and the caption's one vector -> a condition, one position longer."""
    missing = states_BQD.shape[2] - pooled_BP.shape[1]
    return torch.cat([states_BQD, F.pad(pooled_BP, (0, missing))[:, None].to(states_BQD)], dim=1)


def load_part(folder: str | Path, name: str, *, keeps_dtype: bool = False) -> Any:
    """A model of diffusers in a folder, of the class that its config names, as float32. `keeps_dtype`: see
    `stored_dtype`. Raises ModelFolderError."""
    path = Path(folder) / name
    model = getattr(diffusers, str(read_config(path)["_class_name"]), None)
    if model is None or not hasattr(model, "from_pretrained"):
        raise ModelFolderError(f"{path} is a {read_config(path)['_class_name']}, which diffusers does not have")
    dtype = stored_dtype(path) if keeps_dtype else torch.float32
    return load_whole(model, path, torch_dtype=dtype, low_cpu_mem_usage=keeps_dtype)


def load_distilled(folder: str | Path, *, keeps_dtype: bool = False) -> Any | None:
    """The distilled denoiser in `unet_distilled/`, as `load_part` reads it; None where there is none."""
    has_one = (Path(folder) / DISTILLED_FOLDER).is_dir()
    return load_part(folder, DISTILLED_FOLDER, keeps_dtype=keeps_dtype) if has_one else None


def read_config(path: Path) -> dict[str, Any]:
    """A part's config. Raises ModelFolderError where there is none."""
    file = path / ("scheduler_config.json" if path.name == "scheduler" else "config.json")
    if not file.is_file():
        raise ModelFolderError(f"{path.parent} has no {path.name}/: name a model in the layout of diffusers")
    return json.loads(file.read_text())


def normal_like(values: Tensor) -> Tensor:
    """Noise from the CPU's generator: the same numbers on whichever device `values` lie."""
    return torch.randn(values.shape, dtype=values.dtype).to(values.device)
