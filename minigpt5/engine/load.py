"""The generator with the engine that is asked for. Neither torch nor vLLM is loaded before it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt5.engine.vllm.settings import VllmSettings
from minigpt5.limits import Limits
from minigpt5.types import TextPrecision

if TYPE_CHECKING:
    from minigpt5.engine.generator import VokenGenerator
    from minigpt5.engine.vllm.backend import VllmGenerator


def load_engine(
    folder: str | Path,
    *,
    num_threads: int,
    device: str,
    limits: Limits,
    precision: TextPrecision | None = None,
    vllm: VllmSettings | None = None,
    on_death: Callable[[], None] = lambda: None,
) -> VokenGenerator | VllmGenerator:
    """A model folder's generator: with `vllm` that engine, whose precision the exported folder says; else torch.

    `on_death`: called when an engine's own process is gone.
    """
    if vllm is None:
        from minigpt5.engine.generator import VokenGenerator

        return VokenGenerator.from_pretrained(
            folder, num_threads=num_threads, device=device, precision=precision, limits=limits
        )
    from minigpt5.engine.vllm.backend import VllmGenerator

    return VllmGenerator.from_pretrained(
        folder, vllm, num_threads=num_threads, device=device, limits=limits, on_death=on_death
    )
