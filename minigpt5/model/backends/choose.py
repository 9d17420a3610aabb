"""The backend that draws: eager torch, OpenVINO on CPUs, or torch.compile."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt5.errors import MiniGPT5Error
from minigpt5.model.backends.openvino import EXAMPLES, Converted, Unconvertible, convert, one_line
from minigpt5.model.decoders.diffusion import DECODED_PIXELS, Diffusion
from minigpt5.types import DISTILLED, DISTILLED_FOLDER, UPSCALING_FOLDER, DecoderBackend, DrawSettings


def choose(
    diffusion: Diffusion,
    folder: Path,
    null_1QD: Tensor,
    *,
    distilled: Path | None = None,
    upscaling: Path | None = None,
    backend: DecoderBackend,
    device: str,
    num_threads: int,
) -> None:
    """Let calls of the denoisers and of the VAE's decoder go to a backend; with "auto", to OpenVINO on a CPU.

    To be called before anything changes a layer. `folder`: what `diffusion` was read from; `distilled` and
    `upscaling`: the same for its distilled denoiser and its second decoder, where it has them; `null_1QD`: a condition.
    Raises MiniGPT5Error for a backend that the device does not have.
    """
    is_on_cpu = torch.device(device).type == "cpu"
    if backend == "openvino" and not is_on_cpu:
        raise MiniGPT5Error(
            f"decoder_backend is openvino, which draws on CPUs, but the device is {device}: use compile"
        )
    if backend == "compile":
        _compile(diffusion)
    elif is_on_cpu and backend != "eager":
        places = {
            "denoiser": folder / diffusion.DENOISER,
            "vae": folder / "vae",
            "distilled": (distilled or folder) / DISTILLED_FOLDER,
            "upscaling": (upscaling or folder) / UPSCALING_FOLDER,
        }
        _convert(diffusion, places, null_1QD, num_threads=num_threads)


def _compile(diffusion: Diffusion) -> None:
    for name in ("denoiser", "distilled"):
        if (module := getattr(diffusion, name)) is not None:
            diffusion.stand_ins[name] = torch.compile(module)
    diffusion.stand_ins["vae"] = torch.compile(diffusion.vae.decode)
    if diffusion.upscaling is not None:
        diffusion.stand_ins["upscaling"] = torch.compile(diffusion.upscaling.decode)


def _convert(diffusion: Diffusion, places: Mapping[str, Path], null_1QD: Tensor, *, num_threads: int) -> None:
    """Convert each part that there is, or leave it to torch and say so."""

    example, num_decoded = _example(diffusion, null_1QD, EXAMPLES), _num_decoded(diffusion)

    def predict(call: Any) -> Tensor:
        return diffusion.predict(call, **example)

    def decode(call: Any) -> Tensor:
        return call(diffusion.denormalise(example["latents_BCYX"][:num_decoded])).sample

    for name, place in places.items():
        if (module := getattr(diffusion, name)) is None:
            continue
        is_decoder = name in ("vae", "upscaling")
        method, call, num_examples = ("decode", decode, num_decoded) if is_decoder else ("__call__", predict, EXAMPLES)
        try:
            diffusion.stand_ins[name] = convert(
                module, method, place, call, num_threads=num_threads, num_examples=num_examples
            )
        except (Unconvertible, MiniGPT5Error) as error:
            reason = f"{type(module).__name__} is drawn by torch, not by OpenVINO: {error}"
            print(reason, file=sys.stderr, flush=True)


@torch.no_grad()
def warm_up(diffusion: Diffusion, null_1QD: Tensor) -> None:
    """Compile and compare now what the model's own pictures need, rather than with the first of them. Denoisers that
    are not the default follow when they are asked for.

    Raises MiniGPT5Error where torch.compile cannot compile on this machine.
    """
    if not diffusion.stand_ins:
        return
    example = _example(diffusion, null_1QD, EXAMPLES - 1)
    device = next(diffusion.denoiser.parameters()).device
    example = {name: value.to(device, diffusion.dtype) for name, value in example.items()}
    try:
        diffusion.predict(diffusion.denoiser_for(DISTILLED if diffusion.distilled is not None else ""), **example)
        latents_BCYX = example["latents_BCYX"][: max(1, _num_decoded(diffusion) - 1)]
        for scale in {1, diffusion.scale_of(DrawSettings())}:  # previews and smaller pictures are the VAE's own
            diffusion.to_pixels(latents_BCYX, scale=scale)
    except Exception as error:
        if any(isinstance(one, Converted) for one in diffusion.stand_ins.values()):
            raise
        raise MiniGPT5Error(
            f"decoder_backend is compile, but torch cannot compile here: {one_line(error)}. "
            "Install the compiler that it names, or set decoder_backend to eager"
        ) from error


def _num_decoded(diffusion: Diffusion) -> int:
    """Pictures that the VAE decodes in the call that is traced: no more than in any other."""
    side_px = diffusion.native_px * diffusion.scale_of(DrawSettings())
    return min(EXAMPLES, max(1, DECODED_PIXELS // side_px**2))


def _example(diffusion: Diffusion, null_1QD: Tensor, num: int) -> dict[str, Tensor]:
    """Arguments of `predict` for pictures of the model's own size; timesteps are no integers, as some samplers'."""
    generator = torch.Generator().manual_seed(0)
    condition_BQD = torch.randn(num, *null_1QD.shape[1:], generator=generator)
    if diffusion.ZERO_IS_EMPTY:
        condition_BQD[0, null_1QD.shape[1] // 2 : -1] = 0
    return {
        "latents_BCYX": torch.randn(num, *diffusion.latent_shape(DrawSettings()), generator=generator),
        "timesteps_B": torch.linspace(100.5, 700.5, num),
        "condition_BQD": condition_BQD,
        "guidance_B": torch.full((num,), 3.5),
    }
