"""One engine writes what it is asked: `python -m benchmarks.writer torch|vllm MODEL EXPORT THREADS`.

The program is the same in both environments, and answers questions as `turns.py` says: requests and vokens cross as
JSON, the states in base64.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import psutil

from benchmarks.turns import Measurements, answer_questions
from minigpt5.codec import from_json, to_json
from minigpt5.errors import EngineLost, InvalidRequest
from minigpt5.limits import default_limits
from minigpt5.types import Sampling, StoryRequest, TextDelta, Usage, Vokens

MAX_BATCH = 64


def load() -> Measurements:
    from minigpt5.engine.load import load_engine
    from minigpt5.engine.vllm.settings import VllmSettings

    kind, model, export, threads = sys.argv[1:]
    deaths: list[str] = []
    engine: Any = load_engine(
        model,
        num_threads=int(threads),
        device="cpu",
        limits=default_limits("cpu", num_slots=MAX_BATCH, max_batch=MAX_BATCH),
        precision="float32" if kind == "torch" else None,
        vllm=VllmSettings(folder=export) if kind == "vllm" else None,
        on_death=lambda: deaths.append(kind),
    )
    writer = Writer(engine, deaths)
    return {
        "version": lambda: engine.prompter.engine,
        "write": writer.write,
        "speed": writer.measure_speed,
        "cancel": writer.cancel,
        "refuse": writer.refuse,
        "die": writer.die,
    }


class Writer:
    """What the bench asks an engine for."""

    def __init__(self, engine: Any, deaths: list[str]) -> None:
        """`deaths` grows when the engine says that its process is gone."""
        self.engine, self.deaths = engine, deaths
        self._num_asked = 0

    def write(self, requests: Sequence[Any], at_once: bool) -> list[dict[str, Any]]:
        """Texts by page, the states of each picture, and the close choices where they are counted and requests come
        one by one."""
        asked = [from_json(StoryRequest, request) for request in requests]

        async def write_all() -> list[dict[str, Any]]:
            if at_once:
                return list(await asyncio.gather(*map(self._write, asked)))
            return [await self._write(request) for request in asked]

        return asyncio.run(write_all())

    async def _write(self, request: StoryRequest) -> dict[str, Any]:
        before = getattr(self.engine, "num_close_choices", 0)
        texts: dict[str, str] = {}
        states: dict[str, str] = {}
        usage: Any = None
        async for event in self.engine.generate(request):
            if isinstance(event, TextDelta):
                texts[str(event.page)] = texts.get(str(event.page), "") + event.text
            elif isinstance(event, Vokens):
                states[str(event.page)] = base64.b64encode(event.hidden_VH.tobytes()).decode()
            elif isinstance(event, Usage):
                usage = to_json(event)
        close = getattr(self.engine, "num_close_choices", 0) - before
        return {"texts": texts, "states": states, "usage": usage, "close": close}

    def measure_speed(self, num: int, tokens: int) -> dict[str, float]:
        """Tokens a second of `num` texts at once, and pictures' states a second of `num` captions at once."""
        sampling = Sampling(temperature=0.7, min_page_tokens=tokens, max_page_tokens=tokens)

        async def write_all(mode: Any) -> tuple[float, int]:
            first, self._num_asked = self._num_asked, self._num_asked + num
            requests = [
                StoryRequest(
                    prompt=(f"A fox counts {number} stars in the sky",),
                    mode=mode,
                    pages=1,
                    pictures="none" if mode == "reply" else "auto",
                    seed=number,
                    sampling=sampling,
                )
                for number in range(first, first + num)
            ]
            began = time.perf_counter()
            written = await asyncio.gather(*map(self._write, requests))
            return time.perf_counter() - began, sum(one["usage"]["completion_tokens"] for one in written)

        text_s, num_tokens = asyncio.run(write_all("reply"))
        states_s, _ = asyncio.run(write_all("caption"))
        return {"tokens_per_s": num_tokens / text_s, "states_per_s": num / states_s}

    def cancel(self, num: int, seed: int) -> dict[str, int]:
        """Begin `num` stories and close each at a random moment; returns what is left of them."""
        rng = random.Random(seed)
        files = set(os.listdir("/dev/shm"))

        async def one(number: int) -> None:
            await asyncio.sleep(rng.random() * num / 40)
            request = StoryRequest(prompt=(f"A fox and {number} owls",), pages=2, seed=number, key=str(number % 3))
            with contextlib.suppress(TimeoutError):
                async with (
                    asyncio.timeout(rng.random() * 4),
                    contextlib.aclosing(self.engine.generate(request)) as events,
                ):
                    async for _ in events:
                        pass

        async def all_of_them() -> None:
            await asyncio.gather(*map(one, range(num)))
            await asyncio.sleep(2)

        asyncio.run(all_of_them())
        return {**self.engine.count_left(), "files": len(set(os.listdir("/dev/shm")) - files)}

    def refuse(self) -> str:
        """The error of a request that is refused while another one is written."""
        ok = StoryRequest(prompt=("A fox",), pages=1, sampling=Sampling(temperature=0.0))
        bad = StoryRequest(prompt=("A fox",), pages=1, sampling=Sampling(temperature=0.5, top_p=7.0))

        async def both() -> str:
            writing = asyncio.ensure_future(self._write(ok))
            try:
                await self._write(bad)
                said = ""
            except InvalidRequest as error:
                said = str(error)
            assert (await writing)["states"]
            return said

        return asyncio.run(both())

    def die(self) -> dict[str, Any]:
        """Kill vLLM's process under a story: the error of the story, how often the death was told, and the processes
        that are left of it."""
        [core] = [one for one in psutil.Process().children() if one.cmdline()[:1] == ["VLLM::EngineCore"]]
        family = [core, *core.children(recursive=True)]

        async def story() -> str:
            try:
                async for event in self.engine.generate(StoryRequest(prompt=("A fox",), pages=8)):
                    if isinstance(event, TextDelta):
                        core.kill()
            except EngineLost as error:
                return str(error)
            return ""

        said = asyncio.run(story())
        _, alive = psutil.wait_procs(family, timeout=30)
        return {"error": said, "told": len(self.deaths), "processes_left": len(alive)}


if __name__ == "__main__":
    answer_questions(load)
