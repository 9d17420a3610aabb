"""Parameters of a model's parts, what each stage trains, and the memory that serving and training take.

`python -m minigpt5.new` prints them, with `--dry-run` from config files alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minigpt5.combine import Parts
from minigpt5.objective.encoders import fields_read

if TYPE_CHECKING:
    from torch import nn

    from minigpt5.model.language import LanguageModel


def report(parts: Parts) -> str:
    """Parameters, what each stage trains, and memory, as lines of text."""
    sizes, lora, trained = count_parts(parts), count_lora(parts), count_trained(parts)
    lines = ["parameters", *(f"  {name:18}{number:>16,}" for name, number in sizes.items() if number)]
    lines += [f"  {'LoRA':18}{lora:>16,}", "trained by stage"]
    lines += [f"  {stage:18}{number:>16,}" for stage, number in trained.items() if number]
    lines += ["memory in GB, without activations"]
    lines += [f"  {name:41}{gigabytes:8.2f}" for name, gigabytes in memory_gb(parts).items()]
    return "\n".join(lines)


def count_parts(parts: Parts) -> dict[str, int]:
    """Parameters of each part that a new folder has or names."""
    return {
        "language model": _count(parts.language.body) + _head_size(parts.language),
        "vision encoder": _count(parts.vision.encoder),
        "Q-Former": _count(parts.vision.qformer),
        "voken embeddings": _count(parts.language.voken_embeddings),
        "mapper": _count(parts.mapper),
        "denoiser": _count(parts.diffusion.denoiser),
        "VAE": _count(parts.diffusion.vae),
        "text encoder": _count(parts.text_encoder),
    }


def count_trained(parts: Parts) -> dict[str, int]:
    """Parameters that each stage of the published preset trains."""
    vokens, mapper = _count(parts.language.voken_embeddings), parts.mapper
    return {
        "vision": _count(parts.vision.qformer),
        "align": vokens + _count(mapper),
        # As published, learn leaves `fc` and the queries as align made them.
        "learn": vokens + _count(mapper) - _count(mapper.fc) - mapper.queries.numel() + count_lora(parts),
    }


def memory_gb(parts: Parts) -> dict[str, float]:
    """Memory of weights, the KV store and optimizer states, on a CPU (float32) and on a GPU (language and diffusion
    model in bfloat16, and the frozen base models while training). A worker's language model and diffusion model need
    no memory of their own on the host where they are stored in the type that it keeps: their files are mapped."""
    from minigpt5.engine.kv_cache import bytes_per_token
    from minigpt5.limits import ON_CPU

    sizes = count_parts(parts)
    writes = sizes["language model"] + sizes["voken embeddings"]
    sees = sizes["vision encoder"] + sizes["Q-Former"]
    draws = sizes["denoiser"] + sizes["VAE"]
    found = {}
    for place, width in (("CPU", 4), ("GPU", 2)):
        longest = parts.config.context_tokens * bytes_per_token(parts.language.body, width)
        found[f"VokenGenerator on a {place}, weights"] = (width * writes + 4 * sees) / 1e9
        found[f"VokenGenerator on a {place}, longest request"] = longest / 1e9
        found[f"DiffusionDecoder on a {place}, weights"] = (width * draws + 4 * sizes["mapper"]) / 1e9
        if place == "CPU":
            found["VokenGenerator on a CPU, KV store at most"] = ON_CPU.num_slots * longest / 1e9
    for place, width in (("CPU", 4), ("GPU", 2)):
        for stage, number in count_trained(parts).items():
            if number:  # beside the weights: gradients and AdamW's two moments, in float32
                held = _frozen_bytes(parts, stage, width) + 12 * number
                held += 4 * (sizes["Q-Former"] + sizes["voken embeddings"] + sizes["mapper"])
                held += 4 * count_lora(parts) if stage == "learn" else 0
                found[f"{stage} on a {place}, one worker"] = held / 1e9
    return found


def _frozen_bytes(parts: Parts, stage: str, width: int) -> int:
    """Bytes of the base models that a stage of training loads, with matrices of `width` bytes an element: bfloat16
    halves them (training/stages/model.py)."""
    diffusion = parts.diffusion
    frozen = [parts.language.body, parts.language.head, diffusion.denoiser, diffusion.vae, parts.text_encoder]
    if fields_read(stage, reads_pictures=True) != ("moments",):
        frozen.append(parts.vision.encoder)
    parameters = {parameter for part in frozen for parameter in part.parameters()}
    return sum(parameter.numel() * (width if parameter.dim() > 1 else 4) for parameter in parameters)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _head_size(language: LanguageModel) -> int:
    return 0 if language.head.weight is language.embedding else _count(language.head)


def count_lora(parts: Parts) -> int:
    """Parameters of LoRA: its rank times both sides of every adapted matrix."""
    lora, modules = parts.config.lora, parts.language.body.named_modules()
    adapted = [module for name, module in modules if name.rpartition(".")[2] in lora.targets]
    return sum(lora.rank * sum(module.weight.shape) for module in adapted)
