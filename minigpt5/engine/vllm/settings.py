"""What an operator says of vLLM. Neither torch nor vLLM here: the front reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minigpt5.errors import SettingsError

VLLM_PYTHON = Path(".venv-vllm") / "bin" / "python"
"""What `make install-vllm` makes, in the project's folder. An image has none."""


Dtype = Literal["float32", "bfloat16", "float16"]
TOLERANCES: dict[Dtype, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}
"""Largest deviation of the start's check, as a part of the largest state, by precision."""
QUANTISED_TOLERANCE = 0.3


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """Settings of the generator's second engine. Raises SettingsError where one makes no sense."""

    folder: str
    """What `python -m minigpt5.engine.vllm.export` made of the model; each node of a generator has it there."""
    python: str = ""
    """Interpreter of the environment with vLLM, on each node of a generator; "": that of the replica's image."""
    tensor_parallel_size: int = 1
    """GPUs that share each layer. Each is a bundle of the replica's placement group."""
    pipeline_parallel_size: int = 1
    quantization: str | None = None
    """As vLLM names it, such as "fp8"; None: as the exported folder is."""
    gpu_memory_utilization: float = 0.85
    """Part of each GPU's memory that vLLM takes, where `generator_kv_cache_gib` does not say the size of the store."""
    max_deviation: float | None = None
    """Largest deviation of the check's states from the stored ones, as a part of the largest; None: by precision."""

    def __post_init__(self) -> None:
        if not self.folder:
            raise SettingsError(
                "vllm.folder is not set: export the model with python -m minigpt5.engine.vllm.export MODEL FOLDER, "
                "and name that folder"
            )
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if (value := getattr(self, name)) < 1:
                raise SettingsError(f"vllm.{name} is {value} but must be 1 or more")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise SettingsError(f"vllm.gpu_memory_utilization is {self.gpu_memory_utilization} but must be from 0 to 1")

    def tolerance(self, dtype: Dtype) -> float:
        """Largest deviation of the check's states, as a part of the largest."""
        if self.max_deviation is not None:
            return self.max_deviation
        return QUANTISED_TOLERANCE if self.quantization else TOLERANCES[dtype]

    @property
    def num_gpus(self) -> int:
        """GPUs of a replica that has any."""
        return self.tensor_parallel_size * self.pipeline_parallel_size
