"""The one place where vLLM is imported: its engine with our settings, its requests, and its version."""

from __future__ import annotations

import dataclasses
import os
import sys
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from minigpt5.engine.vllm.exported import Exported
from minigpt5.engine.vllm.settings import VllmSettings
from minigpt5.errors import EngineLost, InvalidRequest, SettingsError
from minigpt5.limits import Limits
from minigpt5.types import Sampling

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
"""Variables of vLLM's processes, where nobody has set them."""
CPU_KV_CACHE_GIB = 1.0
PACKAGES = ("vllm", "vllm-cpu")


def find_version() -> str:
    """vLLM's version. Raises SettingsError where this environment has none."""
    for package in PACKAGES:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    raise SettingsError(
        f"{sys.executable} has no vLLM: make install-vllm, and name its python under vllm.python; under "
        "ray_actor_options of a Serve config, which replace ours, as runtime_env: { py_executable: PYTHON } too"
    )


def launch(
    exported: Exported,
    settings: VllmSettings,
    limits: Limits,
    *,
    context_tokens: int,
    num_vokens: int,
    reads_pictures: bool,
    address: str,
    num_threads: int,
) -> Any:
    """An AsyncLLM, whose processes hand over states at `address`. It must be called in the event loop that it lives in.

    Raises SettingsError where it does not start.
    """
    find_version()
    for name, value in {**ENVIRONMENT, "OMP_NUM_THREADS": str(num_threads)}.items():
        os.environ.setdefault(name, value)
    import vllm.platforms
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    is_on_cpu = vllm.platforms.current_platform.is_cpu()
    kv_cache_gib = limits.kv_cache_gib or (CPU_KV_CACHE_GIB if is_on_cpu else None)
    layers = {"eagle_aux_hidden_state_layer_ids": [exported.num_layers]}
    try:
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=settings.folder,
                dtype=exported.dtype,
                max_model_len=context_tokens,
                max_num_seqs=limits.max_batch,
                tensor_parallel_size=settings.tensor_parallel_size,
                pipeline_parallel_size=settings.pipeline_parallel_size,
                # The replica's placement group has the GPUs of a divided model.
                distributed_executor_backend="ray" if settings.num_gpus > 1 else None,
                quantization=settings.quantization,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                kv_cache_memory_bytes=None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
                enforce_eager=is_on_cpu,
                # On a CPU, vLLM cannot take back what a part of a prompt has drawn with a request's own seed.
                enable_chunked_prefill=not is_on_cpu,
                max_num_batched_tokens=max(context_tokens, limits.long_read_tokens) + 2 * limits.max_batch,
                enable_prompt_embeds=reads_pictures,
                generation_config="vllm",
                disable_log_stats=True,
                speculative_config={
                    "method": "extract_hidden_states",
                    "num_speculative_tokens": 1,
                    "draft_model_config": {"hf_config": layers},
                },
                kv_transfer_config={
                    "kv_connector": "VokenConnector",
                    "kv_connector_module_path": "minigpt5.engine.vllm.connector",
                    "kv_role": "kv_producer",
                    "kv_connector_extra_config": {"address": address, "num_vokens": num_vokens},
                },
            )
        )
    except Exception as error:  # whatever vLLM raises, it does not start with these settings
        raise SettingsError(f"vLLM does not start with {settings}: {error}") from error


def new_params(sampling: Sampling, *, max_tokens: int, **given: Any) -> Any:
    """vLLM's SamplingParams, for tokens as they come. Raises InvalidRequest where vLLM refuses them."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = without_zero_top_p(sampling)
    try:
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=max_tokens,
            ignore_eos=True,  # the template's own ends are given
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            **given,
        )
    except ValueError as error:
        raise InvalidRequest("sampling", f"vLLM refuses these settings: {error}") from error


def without_zero_top_p(sampling: Sampling) -> Sampling:
    """The same choices by numbers that vLLM takes: a top_p of 0 keeps the best token alone, as greedy sampling does."""
    return dataclasses.replace(sampling, temperature=0.0, top_p=1.0) if sampling.top_p == 0 else sampling


def new_prompt(ids: list[int], *, placeholder: int, image_PH: Tensor | None) -> dict[str, Any]:
    """Token ids as vLLM takes them; `image_PH`: the embeddings that stand at the placeholders, in reading order."""
    if image_PH is None:
        return {"prompt_token_ids": ids}
    is_picture_S = torch.tensor(ids) == placeholder
    embeds_SH = image_PH.new_zeros(len(ids), image_PH.shape[1])
    embeds_SH[is_picture_S] = image_PH
    return {"prompt_token_ids": ids, "prompt_embeds": embeds_SH, "prompt_is_token_ids": (~is_picture_S).tolist()}


def explain(failure: Exception) -> Exception:
    """What a failure of vLLM is to a caller: EngineLost where its process is gone, InvalidRequest where it refuses."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(failure, EngineDeadError):
        return EngineLost(f"vLLM's process died: {failure}")
    if isinstance(failure, VLLMClientError):
        return InvalidRequest("prompt", f"vLLM refuses this request: {failure}")
    return failure
