"""Where a stage finds the weights that it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from minigpt5.config import ModelConfig, storybook
from minigpt5.errors import TrainingError
from minigpt5.model.decoders.diffusion import load_distilled, load_part
from minigpt5.model.decoders.stable_diffusion import StableDiffusion
from minigpt5.model.folder_config import DECODER, load_config
from minigpt5.model.locate import locate
from training.devices import own_device
from training.presets import Preset

PREVIOUS = {"vision": "start", "align": "vision", "learn": "align", "refine": "learn", "retrieve": "learn"}
"""The stage whose model folder a stage starts from, where `start` names no other."""

DIFFUSION_STAGES = {
    "vae": (),
    "unet": ("vae",),
    "distill": ("unet", "vae"),
    "decoder": ("distill", "unet", "vae"),
    "sharpen": ("decoder", "distill", "unet", "vae"),
    "upscale": ("sharpen", "decoder", "distill", "unet", "vae"),
}
"""The stages whose parts a stage of the latent diffusion model starts from, newest first; other stages use all."""


@dataclass(frozen=True, kw_only=True)
class WeightSources:
    """Folders of weights: `decoder` comes before `start`, and `start` before what earlier stages left under `runs`."""

    runs: Path
    start: str | Path | None = None
    """A model folder by its path, URI or hub id. Every worker locates it for itself."""
    decoder: Path | None = None
    """A folder in diffusers' layout that replaces the whole decoder of `start`, or a part of it."""

    def __post_init__(self) -> None:
        """Raise TrainingError where `decoder` holds nothing to replace a part with."""
        parts = ("vae", "unet", "transformer")
        if self.decoder and not any((self.decoder / part).is_dir() for part in parts):
            hint = f": did you mean {self.decoder / DECODER}" if (self.decoder / DECODER).is_dir() else ""
            raise TrainingError(f"--decoder {self.decoder} has none of {', '.join(parts)} in diffusers' layout{hint}")

    @property
    def start_folder(self) -> Path | None:
        """The start as a folder of this machine. Raises ModelFolderError."""
        return locate(self.start) if self.start else None

    def need_model(self, stage: str) -> Path:
        """The model folder that `stage` starts from. Raises TrainingError where there is none."""
        folder = self.start_folder or (self.runs / PREVIOUS[stage] / "model" if stage in PREVIOUS else None)
        if folder is None or not (folder / "config.json").is_file():
            raise TrainingError(
                f"there is no model in {folder or self.runs} to start from: name a model folder with --start, "
                "such as one that python -m minigpt5.new made"
            )
        return folder

    def find(self, part: str, *, stage: str = "") -> Path | None:
        """Find the first folder that has `part`, such as "vae", from the stages before `stage`; None where there is
        none."""
        stages = DIFFUSION_STAGES.get(stage, ("upscale", "sharpen", "decoder", "distill", "unet", "vae"))
        trained = (self.runs / earlier / "model" for earlier in stages)
        folders = [self.decoder, self.start_folder / "decoder"] if self.start_folder else [self.decoder, *trained]
        return next((folder for folder in folders if folder and (folder / part).is_dir()), None)

    def need(self, part: str, *, stage: str) -> Path:
        """Find a part as `find` does. Raises TrainingError where there is none."""
        if folder := self.find(part, stage=stage):
            return folder
        raise TrainingError(f"no {part} to start from: train one first, or name a model folder with --start")

    def diffusion(self, *, stage: str, is_distilled: bool = True) -> StableDiffusion:
        """The latent diffusion model that `stage` starts from, with the distilled UNet beside its UNet. Raises
        TrainingError where there is none, unless `is_distilled` is False."""
        unet_of = self.need("unet", stage=stage)
        distilled = load_distilled(unet_of)
        if distilled is None and is_distilled:
            raise TrainingError(f"no distilled UNet beside the one in {unet_of}: run stage distill first")
        vae = load_part(self.need("vae", stage=stage), "vae")
        return StableDiffusion(vae, load_part(unet_of, "unet"), StableDiffusion.load_noise(unet_of), distilled)

    def config(self) -> ModelConfig:
        """The config of `start`, else the built-in one of the picture world. Raises ModelFolderError."""
        return load_config(self.start_folder) if self.start_folder else storybook()


def prepare_unet(denoiser: nn.Module, preset: Preset) -> None:
    """Make a UNet quicker to train: in bfloat16 on a CPU the backward pass of torch's fused attention is slow. A
    transformer's attention takes other inputs, and stays as it is."""
    if preset.bf16 and own_device().type == "cpu" and isinstance(denoiser, UNet2DConditionModel):
        denoiser.set_attn_processor(AttnProcessor())
