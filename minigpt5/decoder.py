"""DiffusionDecoder: vokens -> picture. Requests that wait together and ask for the same settings share a batch.

Shape letters: B pictures, C latent channels, Y X latent rows and columns, Q condition positions, D condition width.
"""

from __future__ import annotations

import asyncio
import io
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minigpt5.config import ModelConfig
from minigpt5.diffusion import SCHEDULERS, Diffusion
from minigpt5.errors import FingerprintMismatch, InvalidRequest
from minigpt5.mapper import Mapper
from minigpt5.types import DecoderEvent, DrawRequest, DrawSettings, Picture, Progress

OnStep = Callable[[int, int], bool]
"""(step, steps) -> whether to go on."""


class Cancelled(Exception):
    """Nobody waits for this batch any more."""


@torch.no_grad()
def denoise(
    diffusion: Diffusion,
    condition_BQD: Tensor,
    null_1QD: Tensor,
    *,
    seeds: list[int],
    draw: DrawSettings,
    guidance_rescale: float = 0.0,
    on_step: OnStep = lambda step, steps: True,
) -> Tensor:
    """Draw one picture for each condition: (B, 3, pixels, pixels) in [-1, 1].

    A picture depends on its own condition and seed only, not on its company in the batch. Guidance follows
    arXiv 2207.12598, rescaled as in arXiv 2305.08891, section 3.4; a scale of 1 costs no second UNet call.
    """
    unet = diffusion.unet
    scheduler = SCHEDULERS[draw.scheduler].from_config(diffusion.scheduler.config)
    scheduler.set_timesteps(draw.steps)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents_BCYX = torch.stack(noise).to(condition_BQD) * scheduler.init_noise_sigma
    guided = draw.guidance_scale != 1
    if guided:
        null_BQD = null_1QD.expand(len(condition_BQD), -1, -1)
        condition_BQD = torch.cat([null_BQD, condition_BQD])
    num_calls = len(scheduler.timesteps)  # one more than asked for with PNDM
    for call, timestep in enumerate(scheduler.timesteps):
        latents_in = torch.cat([latents_BCYX] * 2) if guided else latents_BCYX
        latents_in = scheduler.scale_model_input(latents_in, timestep)
        predicted = unet(latents_in, timestep, encoder_hidden_states=condition_BQD).sample
        if guided:
            unconditional, conditional = predicted.chunk(2)
            predicted = unconditional + draw.guidance_scale * (conditional - unconditional)
            if guidance_rescale:
                spread = conditional.std(dim=(1, 2, 3), keepdim=True) / predicted.std(dim=(1, 2, 3), keepdim=True)
                predicted = predicted * (guidance_rescale * spread + 1 - guidance_rescale)
        latents_BCYX = scheduler.step(predicted, timestep, latents_BCYX).prev_sample
        if not on_step(min((call + 1) * draw.steps // num_calls, draw.steps), draw.steps):
            raise Cancelled
    return diffusion.to_pixels(latents_BCYX)


@dataclass(eq=False)
class _Job:
    request: DrawRequest
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[DecoderEvent | Exception] = field(default_factory=asyncio.Queue)
    is_cancelled: bool = False

    def put(self, event: DecoderEvent | Exception) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class DiffusionDecoder:
    """The engine that draws: the mapper, the UNet and the VAE behind one queue."""

    def __init__(self, config: ModelConfig, mapper: Mapper, diffusion: Diffusion, *, max_batch: int = 8) -> None:
        self.config = config
        self.fingerprint = config.fingerprint
        self.mapper, self.diffusion = mapper.eval(), diffusion.eval()
        self.max_batch = max_batch
        with torch.no_grad():
            self._null_1QD = mapper.null_condition()
        self._waiting: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._held: list[_Job] = []
        self._thread: threading.Thread | None = None
        self._start = threading.Lock()

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, num_threads: int | None = None) -> DiffusionDecoder:
        """Load from a model folder. `num_threads`: torch threads of this process."""
        from minigpt5.model_folder import load_decoder_parts

        if num_threads:
            torch.set_num_threads(num_threads)
        return cls(*load_decoder_parts(folder))

    def check(self, request: DrawRequest) -> None:
        """Raise where `request` cannot be drawn: FingerprintMismatch or InvalidRequest."""
        vokens, settings = request.vokens, request.settings
        if vokens.fingerprint != self.fingerprint:
            raise FingerprintMismatch(
                f"vokens of model {vokens.fingerprint[:12] or '(none)'} cannot be drawn by the decoder of model "
                f"{self.fingerprint[:12]}: start both engines from the same model folder"
            )
        expected = (self.config.num_vokens, self.config.hidden)
        if vokens.hidden_VH.shape != expected:
            raise InvalidRequest("vokens", f"vokens have shape {vokens.hidden_VH.shape} but must have {expected}")
        if settings.scheduler not in SCHEDULERS:
            raise InvalidRequest(
                "scheduler", f"scheduler is {settings.scheduler!r} but must be one of {', '.join(SCHEDULERS)}"
            )
        if not 1 <= settings.steps <= 100:
            raise InvalidRequest("steps", f"steps is {settings.steps} but must be from 1 to 100")

    async def decode(self, request: DrawRequest) -> AsyncIterator[DecoderEvent]:
        """Draw one picture; ends with a Picture. Closing the iterator stops the work at the next step."""
        self.check(request)
        with self._start:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="decoder", daemon=True)
                self._thread.start()
        job = _Job(request, asyncio.get_running_loop())
        self._waiting.put(job)
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Picture):
                    return
        finally:
            job.is_cancelled = True

    def draw(self, requests: list[DrawRequest], *, on_step: OnStep = lambda step, steps: True) -> list[Picture]:
        """Draw pictures of equal settings in one batch, in this thread."""
        settings = requests[0].settings
        states_BVH = torch.stack([torch.from_numpy(request.vokens.hidden_VH).float() for request in requests])
        with torch.no_grad():
            pixels_BCYX = denoise(
                self.diffusion,
                self.mapper(states_BVH),
                self._null_1QD,
                seeds=[request.seed for request in requests],
                draw=settings,
                guidance_rescale=self.config.guidance_rescale,
                on_step=on_step,
            )
        pixels = ((pixels_BCYX + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        pictures = []
        for request, picture_YXC in zip(requests, pixels, strict=True):
            file = io.BytesIO()
            Image.fromarray(picture_YXC).save(file, "PNG")
            pictures.append(
                Picture(
                    page=request.vokens.page,
                    png=file.getvalue(),
                    width=picture_YXC.shape[1],
                    height=picture_YXC.shape[0],
                    seed=request.seed,
                    denoise_steps=settings.steps,
                )
            )
        return pictures

    def _work(self) -> None:
        while True:
            batch = self._next_batch()

            def on_step(step: int, steps: int, batch: list[_Job] = batch) -> bool:
                for job in batch:
                    job.put(Progress(page=job.request.vokens.page, step=step, steps=steps))
                return any(not job.is_cancelled for job in batch)

            try:
                pictures = self.draw([job.request for job in batch], on_step=on_step)
            except Cancelled:
                continue
            except Exception as failure:  # the batch fails, the engine lives on
                for job in batch:
                    job.put(failure)
                continue
            for job, picture in zip(batch, pictures, strict=True):
                job.put(picture)

    def _next_batch(self) -> list[_Job]:
        """The oldest waiting request and all others of the same settings, at most `max_batch`."""
        if not self._held:
            self._held.append(self._waiting.get())
        while not self._waiting.empty():
            self._held.append(self._waiting.get())
        self._held = [job for job in self._held if not job.is_cancelled]
        if not self._held:
            return self._next_batch()
        settings = self._held[0].request.settings
        batch = [job for job in self._held if job.request.settings == settings][: self.max_batch]
        self._held = [job for job in self._held if job not in batch]
        return batch
