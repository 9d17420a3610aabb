"""DiffusionDecoder: vokens -> pictures.

Continuous batching: pictures join and leave between denoising steps, each with its own settings and seed;
`denoising.py` is how they share a call of the denoiser. Finished latents go through the VAE together.

Shape letters: B pictures, V vokens, H language-model width, C latent channels, Y X rows and columns, Q condition
positions, D condition width.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
from collections.abc import AsyncGenerator, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minigpt5.config import ModelConfig, check_sampler
from minigpt5.engine.bounded_cache import BoundedCache
from minigpt5.engine.denoising import Denoising, advance
from minigpt5.engine.engine_loop import EngineLoop, Job, QueuedEngine
from minigpt5.engine.fair_share import FairShare
from minigpt5.engine.threads import Team, single_thread
from minigpt5.errors import FingerprintMismatch, InvalidRequest
from minigpt5.model.decoders.diffusion import Diffusion
from minigpt5.model.mapper import Mapper
from minigpt5.model.pixels import to_pixels
from minigpt5.pictures import resample
from minigpt5.types import (
    DecoderBackend,
    DecoderEvent,
    DrawRequest,
    DrawSettings,
    InputImage,
    Picture,
    Precision,
    Progress,
    Reference,
    Vokens,
)

NOT_FINITE = "the picture's values are not finite: use another decoder_precision, or another model"
PREVIEW_PX = 64
PICTURE_BYTES = 64 * 2**20
"""Size of the finished pictures that are kept."""
CHARACTER_BYTES = 64 * 2**20
"""Size of what an IP-Adapter made of characters' pictures."""


PNG_LEVEL = 4
"""Of zlib: half the time of 6, its default, for files that are 4 % larger."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A finished picture that is no file yet."""

    request: DrawRequest
    pixels_YXC: np.ndarray
    """uint8."""

    def to_picture(self) -> Picture:
        height, width, _ = self.pixels_YXC.shape
        return Picture(
            page=self.request.vokens.page,
            png=to_file(self.pixels_YXC, "PNG"),
            width=width,
            height=height,
            seed=self.request.seed,
            denoise_steps=self.request.settings.steps,
        )


class _Job(Job[DecoderEvent | Drawn]):
    """A picture that is asked for; `denoising` from its first step on."""

    def __init__(self, request: DrawRequest, *, is_guided: bool, relative_pixels: float) -> None:
        self.num_samples = (2 if is_guided else 1) * (2 if request.reference else 1) * relative_pixels
        """Places in a step: one for a prediction of the model's own size, and as many for the reference."""
        super().__init__(key=request.key, cost=request.settings.steps * self.num_samples)
        self.request = request
        self.denoising: Denoising | None = None
        self.shown_step = 0
        """Step of the last preview: samplers with more calls than steps come to a step twice."""


class DiffusionDecoder(QueuedEngine):
    """The engine that draws: the mapper, the denoiser and the VAE behind one thread.

    A job is a picture; its cost is the denoiser samples of the model's own size that it still needs: one for each step,
    two where it is guided. A row of a step is such a sample.
    """

    def __init__(
        self,
        config: ModelConfig,
        mapper: Mapper,
        diffusion: Diffusion,
        *,
        max_batch: int = 8,
        max_jobs: int = 512,
        num_threads: int | None = None,
    ) -> None:
        """At most `max_batch` guided pictures of the model's own size share a step, or as many pixels in larger ones;
        a picture that is larger than that has a step alone. Others wait, and beyond `max_jobs` they are refused.
        `num_threads`: torch threads of a step, at most (default: as many as here)."""
        self.config = config
        self.fingerprint = config.fingerprint
        self.mapper, self.diffusion = mapper.eval(), diffusion.eval()
        self.max_batch = max_batch
        with torch.no_grad(), single_thread():
            self.null_1QD = mapper.null_condition()
            """The condition that guidance leads away from."""
        self.num_denoising_steps = 0
        """Steps of all pictures so far: a step that three share counts three."""
        self._pictures = BoundedCache[Picture](PICTURE_BYTES, size_bytes=lambda picture: len(picture.png))
        self._characters = BoundedCache[tuple[Tensor, Tensor]](
            CHARACTER_BYTES, size_bytes=lambda states: sum(one.nbytes for one in states)
        )
        self._fair = FairShare(2 * max_batch, min_places=2)
        self._team = Team(num_threads or torch.get_num_threads())
        self._loop = EngineLoop[_Job](
            "decoder",
            choose=self._choose,
            advance=self._advance,
            leave=lambda job: None,
            max_jobs=max_jobs,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        num_threads: int | None = None,
        device: str | None = None,
        precision: Precision | None = None,
        backend: DecoderBackend = "auto",
        max_batch: int = 8,
    ) -> DiffusionDecoder:
        """Load a model folder by its path, URI or hub id. `num_threads`: torch threads of a step. `device`: the GPU
        that this process sees where there is one, else the CPU. `precision` of the weights: by default float32 on a
        CPU, and bfloat16 on a GPU, in half the memory. `backend` computes the denoiser and the VAE. `max_batch`:
        guided pictures that share a step."""
        from minigpt5.model.folder import default_device, load_decoder_model

        num_threads = num_threads or torch.get_num_threads()
        with single_thread():
            parts = load_decoder_model(
                folder,
                device=device or default_device(),
                precision=precision,
                backend=backend,
                num_threads=num_threads,
            )
        return cls(*parts, max_batch=max_batch, num_threads=num_threads)

    @property
    def num_styles(self) -> int:
        """Style adapters that the denoiser holds."""
        return len(self.diffusion.styles.loaded) if self.diffusion.styles else 0

    def validate_request(self, request: DrawRequest) -> None:
        """Raise where `request` cannot be drawn: FingerprintMismatch or InvalidRequest."""
        settings = request.settings
        self._check_vokens(request.vokens)
        if request.reference:
            self._check_vokens(request.reference.vokens)
            self.diffusion.check_shares_attention()
        if request.characters:
            self.config.check_characters()
        check_sampler(settings, self.diffusion.samplers)
        if not 1 <= settings.steps <= 100:
            raise InvalidRequest("steps", f"steps is {settings.steps} but must be from 1 to 100")
        self.config.check_size(settings)
        self.config.check_style(settings)
        native = self.config.native(settings)
        self.diffusion.latent_shape(native)
        self.diffusion.new_sampler(native)  # some samplers know fewer steps

    def _check_vokens(self, vokens: Vokens) -> None:
        """Raises FingerprintMismatch or InvalidRequest."""
        if vokens.fingerprint != self.fingerprint:
            raise FingerprintMismatch(
                f"vokens of model {vokens.fingerprint[:12] or '(none)'} cannot be drawn by the decoder of model "
                f"{self.fingerprint[:12]}: start both engines from the same model folder"
            )
        expected = (self.config.num_vokens, self.config.hidden)
        if vokens.hidden_VH.shape != expected:
            raise InvalidRequest("vokens", f"vokens have shape {vokens.hidden_VH.shape} but must have {expected}")

    async def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        """Draw one picture; ends with a Picture, which comes at once where it was drawn before. Closing the iterator
        stops the work at the next step. A size that the model does not draw is resampled from its own.

        Raises what `validate_request` raises, or EngineFull.
        """
        self.validate_request(request)
        native = dataclasses.replace(request, settings=self.config.native(request.settings))
        async with contextlib.aclosing(self._decode_native(native)) as events:
            async for event in events:
                yield await asyncio.to_thread(self._fit, event, request) if isinstance(event, Picture) else event

    async def _decode_native(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        if known := self._pictures.get(content_key(request)):
            yield dataclasses.replace(known, page=request.vokens.page)
            return
        job = _Job(
            request,
            is_guided=self.diffusion.is_guided(request.settings),
            relative_pixels=self.config.relative_pixels(request.settings),
        )
        async with contextlib.aclosing(self._loop.run(job)) as events:
            async for event in events:
                if isinstance(event, Drawn):  # compressing it would keep the engine's thread from the other pictures
                    event = await asyncio.to_thread(event.to_picture)
                    self._pictures.put(content_key(request), event)
                yield event

    @torch.no_grad()
    def draw(self, requests: Sequence[DrawRequest]) -> list[Picture]:
        """Draw pictures in one batch, in this thread."""
        pictures = self._begin(requests)
        while running := [picture for picture in pictures if picture.num_calls_left]:
            advance(self.diffusion, running, self.null_1QD)
        drawn = []
        for request, pixels_YXC in zip(requests, self._paint(pictures), strict=True):
            if isinstance(pixels_YXC, Exception):
                raise pixels_YXC
            drawn.append(self._fit(Drawn(request=request, pixels_YXC=pixels_YXC).to_picture(), request))
        return drawn

    def _choose(self, jobs: list[_Job]) -> list[_Job]:
        return self._fair.choose(jobs, key=lambda job: job.key, cost=lambda job: job.num_samples)

    @torch.no_grad()
    def _advance(self, jobs: list[_Job]) -> None:
        """One denoising step, and the pictures that are finished with it."""
        for job in self._with_style([job for job in jobs if job.denoising is None]):
            try:
                (job.denoising,) = self._begin([job.request])
            except Exception as failure:  # one picture fails, the others go on
                job.fail(failure)
            else:
                job.is_started = True
        running = {id(job.denoising): (job, job.denoising) for job in jobs if job.denoising is not None}

        def fail(failure: Exception, pictures: Sequence[Denoising]) -> None:
            for picture in pictures:
                running.pop(id(picture))[0].fail(failure)

        with self._team.working():
            advance(self.diffusion, [denoising for _, denoising in running.values()], self.null_1QD, fail=fail)
        self.num_denoising_steps += len(running)
        for job, denoising in running.values():
            job.cost = denoising.num_calls_left * job.num_samples
            try:
                self._tell(job, denoising)
            except Exception as failure:  # as above
                job.fail(failure)
        finished = [(job, one) for job, one in running.values() if not (job.is_done or one.num_calls_left)]
        for (job, _), pixels_YXC in zip(finished, self._paint([one for _, one in finished]), strict=True):
            if isinstance(pixels_YXC, Exception):
                job.fail(pixels_YXC)
            else:
                job.put(Drawn(request=job.request, pixels_YXC=pixels_YXC))
                job.is_done = True

    def _with_style(self, jobs: list[_Job]) -> list[_Job]:
        """Those whose style can be loaded, which is done here; the others fail, and no picture beside them."""
        for job in jobs:
            try:
                self.diffusion.use_style(job.request.settings.style)
            except Exception as failure:  # whatever is in the file
                job.fail(failure)
        return [job for job in jobs if not job.is_done]

    def _begin(self, requests: Sequence[DrawRequest]) -> list[Denoising]:
        return [
            self._denoising(request, request.settings, reference=self._begin_reference(request)) for request in requests
        ]

    def _begin_reference(self, request: DrawRequest) -> Denoising | None:
        return self._denoising(request.reference, request.settings) if request.reference else None

    def _denoising(
        self, drawn: DrawRequest | Reference, settings: DrawSettings, *, reference: Denoising | None = None
    ) -> Denoising:
        return Denoising(
            self.diffusion,
            self.condition(drawn.vokens),
            seed=drawn.seed,
            draw=self.config.native(settings),
            guidance_rescale=self.config.guidance_rescale,
            reference=reference,
            characters=self._states(drawn.characters) if drawn.characters else None,
        )

    def _states(self, characters: tuple[InputImage, ...]) -> tuple[Tensor, Tensor]:
        """What the denoiser attends to for these pictures, and for as many of none: all pages of a story have the
        same."""
        key = tuple(hashlib.sha256(one.data).digest() for one in characters)
        states = self._characters.get(key)
        if states is None:
            states = self.diffusion.ip_adapter.states([one.data for one in characters])
            self._characters.put(key, states)
        return states

    def _fit(self, picture: Picture, request: DrawRequest) -> Picture:
        """Resample a picture of the model's own size to what the request asks for, where the model cannot draw it."""
        if not self.config.is_resampled(request.settings):
            return picture
        width, height = self.config.size_of(request.settings)
        png = resample(picture.png, (width, height))
        return dataclasses.replace(picture, png=png, width=width, height=height, is_resampled=True)

    @torch.no_grad()
    def condition(self, vokens: Vokens) -> Tensor:
        """What the UNet reads of a picture's vokens: (Q, D). Each by itself, so that its bits are its own."""
        states_VH = torch.from_numpy(vokens.hidden_VH).float().to(self.null_1QD.device)
        return self.mapper(states_VH[None])[0]

    def _tell(self, job: _Job, denoising: Denoising) -> None:
        step, steps = denoising.step, job.request.settings.steps
        preview = None
        is_new = step > job.shown_step
        if is_new and denoising.num_calls_left and is_shown(step, steps, job.request.num_previews):
            job.shown_step = step
            preview = encode(self._preview(denoising.pred_x0_1CYX), "JPEG", side_px=PREVIEW_PX)[0]
        job.put(Progress(page=job.request.vokens.page, step=step, steps=steps, preview=preview))

    def _preview(self, latents_1CYX: Tensor) -> Tensor:
        """By the VAE where the latents are fewer than the preview's pixels, so that it costs little."""
        is_small = max(latents_1CYX.shape[2:]) < PREVIEW_PX // 2
        return self.diffusion.to_pixels(latents_1CYX) if is_small else self.diffusion.to_preview(latents_1CYX)

    def _paint(self, pictures: Sequence[Denoising]) -> list[np.ndarray | Exception]:
        """Latents -> pixels of each picture, or why there are none. Those of one size go through the VAE together."""
        alike: dict[tuple[int, torch.Size], list[Denoising]] = {}
        painted: dict[int, np.ndarray | Exception] = {}
        for picture in pictures:
            if picture.latents_1CYX.isfinite().all():
                size = self.diffusion.scale_of(picture.draw), picture.latents_1CYX.shape
                alike.setdefault(size, []).append(picture)
            else:
                painted[id(picture)] = FloatingPointError(NOT_FINITE)
        for (scale, _), together in alike.items():
            try:
                latents_BCYX = torch.cat([picture.latents_1CYX for picture in together])
                pixels_BCYX = self.diffusion.to_pixels(latents_BCYX, scale=scale)
                is_finite = pixels_BCYX.isfinite().flatten(1).all(dim=1).tolist()
                pixels_BYXC = to_pixels(pixels_BCYX)
            except Exception as failure:  # such as a size for which the memory is too small
                painted |= {id(picture): failure for picture in together}
            else:
                for picture, pixels_YXC, is_drawn in zip(together, pixels_BYXC, is_finite, strict=True):
                    painted[id(picture)] = pixels_YXC if is_drawn else FloatingPointError(NOT_FINITE)
        return [painted[id(picture)] for picture in pictures]


def content_key(request: DrawRequest) -> Hashable:
    """Requests of one key are the same picture."""
    reference = request.reference and _drawn_key(request.reference)
    return _drawn_key(request), reference, request.settings


def _drawn_key(drawn: DrawRequest | Reference) -> Hashable:
    contents = (drawn.vokens.hidden_VH.tobytes(), *(one.data for one in drawn.characters))
    return tuple(hashlib.sha256(one).digest() for one in contents), drawn.seed


def is_shown(step: int, steps: int, num_previews: int) -> bool:
    """Whether this step of `steps` is one of the `num_previews` that have a preview. The last step counts as one more,
    which shows the picture itself."""
    parts = num_previews + 1
    return step * parts // steps > (step - 1) * parts // steps


def encode(pixels_BCYX: Tensor, file_format: str, *, side_px: int | None = None) -> list[bytes]:
    """Pictures in [-1, 1] -> files, made smaller where `side_px` is given."""
    return [to_file(picture_YXC, file_format, side_px=side_px) for picture_YXC in to_pixels(pixels_BCYX)]


def to_file(pixels_YXC: np.ndarray, file_format: str, *, side_px: int | None = None) -> bytes:
    """As `encode`, of one picture's bytes."""
    picture, file = Image.fromarray(pixels_YXC), io.BytesIO()
    if side_px:
        picture.thumbnail((side_px, side_px))
    picture.save(file, file_format, **({"compress_level": PNG_LEVEL} if file_format == "PNG" else {}))
    return file.getvalue()
