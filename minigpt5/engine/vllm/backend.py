"""vLLM's engine behind our face: a request's script becomes requests to vLLM, and vokens come back.

A text is one request to vLLM, which streams its tokens. A picture's vokens are another one: all tokens so far and the
vokens but the last, which vLLM's prefix cache makes cheap, with a ticket by which the states come back (connector.py).

Shape letters: H hidden width, V vokens of a picture, N input pictures, P their embeddings, S tokens of a prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minigpt5.config import ModelConfig
from minigpt5.engine.engine_loop import Job
from minigpt5.engine.fair_share import Occupancy
from minigpt5.engine.picture_reader import PictureReader
from minigpt5.engine.prompts import Prompt, Prompter
from minigpt5.engine.script import Draw, Say, Take
from minigpt5.engine.turns import Turns
from minigpt5.engine.vllm.exported import Export, load_export
from minigpt5.engine.vllm.launch import explain, find_version, launch, new_params, new_prompt
from minigpt5.engine.vllm.mailbox import Mailbox
from minigpt5.engine.vllm.settings import VllmSettings
from minigpt5.errors import EngineFull, EngineLost, ModelFolderError
from minigpt5.limits import Limits, default_limits
from minigpt5.model.chat_template import protect_control_tokens
from minigpt5.model.folder import load_vision
from minigpt5.model.folder_config import check_folder
from minigpt5.model.libraries import load_base_tokenizer
from minigpt5.model.locate import locate
from minigpt5.model.vision import Vision
from minigpt5.types import GeneratorEvent, Sampling, StoryRequest

MIN_SHARE = 0.25
"""Share of the places that is left to clients without a turn under way, as in the torch engine."""
STATES_TIMEOUT_S = 60.0


class VllmGenerator:
    """The engine that writes, with vLLM. The face of `minigpt5.engine.generator.VokenGenerator`."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        vision: Vision,
        export: Export,
        settings: VllmSettings,
        *,
        limits: Limits,
        max_jobs: int = 512,
        num_threads: int = 1,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        """Start vLLM and compare its states with the torch engine's. `on_death`: called when vLLM's process is gone.

        Raises SettingsError where vLLM does not start, and ModelFolderError where its states are not the model's.
        """
        self.config, self.limits, self.max_jobs = config, limits, max_jobs
        self.fingerprint = config.fingerprint
        self.prompter = Prompter(config, tokenizer, engine=f"vllm {find_version()}")
        self.num_prompt_tokens = self.num_reused_tokens = self.num_generated_tokens = 0
        """Tokens that vLLM read, those of them that its prefix cache had, and tokens drawn so far."""
        self._export, self._settings, self._on_death = export, settings, on_death
        self._jobs: set[Job[GeneratorEvent]] = set()
        self._pictures = PictureReader(vision)
        self._num_steps = self._num_rows = 0.0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True).start()
        self._turns = Turns(limits.max_batch, reserved=int(MIN_SHARE * limits.max_batch))
        self._mailbox = Mailbox((config.num_vokens, config.hidden), on_closed=self._die)
        self._is_serving = False
        try:
            self._call(self._mailbox.open())
            self._llm = self._call(self._launch(num_threads))
            self._call(self._validate_states())
            self._is_serving = True
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        settings: VllmSettings,
        *,
        num_threads: int = 1,
        device: str = "cpu",
        limits: Limits | None = None,
        on_death: Callable[[], None] = lambda: None,
    ) -> VllmGenerator:
        """Load a model folder and what was exported of it. `num_threads`: of vLLM on a CPU. `device`: of the vision
        path. Raises ModelFolderError where the two are not of one model."""
        place = locate(folder)
        config = check_folder(place)
        tokenizer = load_base_tokenizer(settings.folder)
        if config.template == "chat":
            protect_control_tokens(tokenizer)
        return cls(
            config,
            tokenizer,
            load_vision(place, config).to(device),
            load_export(settings.folder, config),
            settings,
            limits=limits or default_limits(device),
            num_threads=num_threads,
            on_death=on_death,
        )

    @property
    def num_running(self) -> int:
        """Texts and vokens that vLLM makes."""
        return self._turns.num_running

    @property
    def num_waiting(self) -> int:
        return self._turns.num_waiting

    @property
    def occupancy(self) -> Occupancy:
        """How full vLLM's steps were, by what they brought: a row is a request."""
        return Occupancy(num_steps=int(self._num_steps), num_rows=self._num_rows, max_rows=self.limits.max_batch)

    @property
    def queued_cost(self) -> float:
        """Tokens that all requests here may still read and write."""
        return sum(job.cost for job in list(self._jobs))

    def validate_request(self, request: StoryRequest) -> None:
        """Raise InvalidRequest where `request` cannot be written."""
        self.prompter.encode(request)

    async def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        """Write one request; ends with Usage. Closing the iterator aborts what vLLM does for it.

        Raises InvalidRequest, EngineFull, or EngineLost where vLLM's process is gone.
        """
        prompt = self.prompter.encode(request)
        if not self._is_serving:
            raise EngineLost("vLLM's process is gone")
        if len(self._jobs) >= self.max_jobs:
            raise EngineFull(f"the generator takes at most {self.max_jobs} requests at once: try again later")
        job: Job[GeneratorEvent] = Job(key=request.key, cost=len(prompt.ids) + prompt.num_new)
        self._jobs.add(job)
        work = asyncio.run_coroutine_threadsafe(self._write(job, prompt), self._loop)
        try:
            while (event := await job.events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            work.cancel()
            self._jobs.discard(job)

    def count_left(self) -> dict[str, int]:
        """What is left of requests where none is under way: each should be 0. Empties vLLM's prefix cache."""
        is_free = self._call(self._llm.reset_prefix_cache())
        return {
            "requests": self._llm.get_num_unfinished_requests() + len(self._jobs),
            "turns": self._turns.num_running + self._turns.num_waiting,
            "tickets": self._mailbox.num_expected,
            "blocks": int(not is_free),  # vLLM says whether any is held, and not how many
        }

    def close(self) -> None:
        """End vLLM's processes; what is under way fails."""
        self._fail_all("this engine is closed")
        with contextlib.suppress(AttributeError):
            self._llm.shutdown()
        self._call(self._mailbox.close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    # In the event loop of this engine's thread

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _launch(self, num_threads: int) -> Any:
        return launch(
            self._export.about,
            self._settings,
            self.limits,
            context_tokens=self.config.context_tokens,
            num_vokens=self.config.num_vokens,
            reads_pictures=self.config.vision.family != "none",
            address=self._mailbox.address,
            num_threads=num_threads,
        )

    async def _validate_states(self) -> None:
        check_VH = self._export.check_VH
        found_VH = await self._states({"prompt_token_ids": list(self._export.about.check_ids)})
        deviation = float(np.abs(found_VH - check_VH).max() / np.abs(check_VH).max())
        most = self._settings.tolerance(self._export.about.dtype)
        if not deviation <= most:
            raise ModelFolderError(
                f"vLLM's states of the check deviate by {deviation:.2g} of the largest from those of the torch engine, "
                f"and {most:.2g} is allowed: export the model again, or use engine=torch"
            )

    def _die(self) -> None:
        """vLLM's process is gone."""
        if not self._is_serving:  # it is still starting, or meant to end
            return
        self._fail_all("vLLM's process died")
        self._on_death()

    def _fail_all(self, why: str) -> None:
        """Requests that are under way, and those that come later."""
        self._is_serving = False
        for job in list(self._jobs):
            job.fail(EngineLost(why))
            job.close()

    async def _write(self, job: Job[GeneratorEvent], prompt: Prompt) -> None:
        """Run a request's script, and tell the job how it ends."""
        try:
            job.is_started = True
            context = _Context(prompt.request)
            if prompt.pictures:
                image_PH, _ = await asyncio.to_thread(self._pictures.read, prompt.pictures)
                context.image_PH = image_PH.cpu()
            script = self.prompter.writer(prompt, job.put).script()
            answer: bool | np.ndarray | None = None
            while True:
                try:
                    asked = script.send(answer)
                except StopIteration:
                    break
                match asked:
                    case Say(ids=ids, start=start):
                        context.ids[len(context.ids) if start is None else start :] = ids
                        answer = None
                    case Take():
                        answer = await self._take(job, context, asked)
                    case Draw():
                        answer = await self._draw(job, context)
        except Exception as failure:  # one request fails, the others go on
            job.fail(explain(failure))
        job.close()

    async def _take(self, job: Job[GeneratorEvent], context: _Context, take: Take) -> bool:
        """Have vLLM write a text; returns whether it opened a picture."""
        if take.limit < 1:
            return False
        first, end_ids = self.prompter.voken_ids.first, self.prompter.end_ids
        stops = [*end_ids, first] if take.may_draw else list(end_ids)
        params = new_params(
            context.request.sampling,
            seed=seed_of(context.request.seed, take.page, len(take.said)),
            max_tokens=take.limit,
            min_tokens=min(take.min_tokens, take.limit),
            stop_token_ids=sorted(stops),
            allowed_token_ids=list(range(first + take.may_draw)),
        )
        opens_picture = is_over = False
        async with self._turns.turn(job.key), contextlib.aclosing(self._ask(self._prompt(context), params)) as outputs:
            async for output in outputs:
                self._count(output)
                for token in output.outputs[0].token_ids:
                    self.num_generated_tokens += 1
                    job.cost = max(0, job.cost - 1)
                    opens_picture = token == first
                    is_over = opens_picture or token in end_ids or take.add(token)
                    if is_over:
                        break
                if is_over and not output.finished:  # a stop string: closing the answer aborts the request
                    break
        context.ids += take.stream.tokens
        return opens_picture

    async def _draw(self, job: Job[GeneratorEvent], context: _Context) -> np.ndarray:
        """The states that predict a picture's vokens: (V, H)."""
        vokens = self.prompter.voken_ids.ids
        async with self._turns.turn(job.key):
            hidden_VH = await self._states(self._prompt(context, vokens[:-1]))
        context.ids += vokens
        job.cost = max(0, job.cost - len(vokens))
        return hidden_VH

    async def _states(self, prompt: Any) -> np.ndarray:
        ticket = uuid.uuid4()
        params = new_params(
            Sampling(temperature=0.0), max_tokens=1, extra_args={"kv_transfer_params": {"ticket": ticket.hex}}
        )
        with self._mailbox.expect(ticket.bytes) as states:
            async with contextlib.aclosing(self._ask(prompt, params)) as outputs:
                async for output in outputs:
                    self._count(output)
            try:
                async with asyncio.timeout(STATES_TIMEOUT_S):
                    return self._export.norm(await states)
            except TimeoutError:
                raise EngineLost(f"vLLM has sent no states within {STATES_TIMEOUT_S:g} s") from None

    def _prompt(self, context: _Context, more: Sequence[int] = ()) -> Any:
        placeholder = self.prompter.voken_ids.placeholder
        return new_prompt([*context.ids, *more], placeholder=placeholder, image_PH=context.image_PH)

    def _ask(self, prompt: Any, params: Any) -> Any:
        return self._llm.generate(prompt, params, str(uuid.uuid4()))

    def _count(self, output: Any) -> None:
        if output.num_cached_tokens is not None and output.prompt_token_ids and output.finished:
            self.num_prompt_tokens += len(output.prompt_token_ids)
            self.num_reused_tokens += output.num_cached_tokens
        self._num_rows += 1
        self._num_steps += 1 / max(1, self._turns.num_running)


class _Context:
    """What a request has read and written so far."""

    def __init__(self, request: StoryRequest) -> None:
        self.request = request
        self.ids: list[int] = []
        self.image_PH: Tensor | None = None
        """Embeddings of the prompt's pictures, placeholder by placeholder."""


def seed_of(seed: int, page: int, num_said: int) -> int:
    """The seed of a text: vLLM draws all its tokens with one generator."""
    digest = hashlib.sha256(f"{seed} {page} {num_said}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
