"""Parameters and FLOPs of the full-size system, counted on the meta device; the memory and time that it takes.

`python -m minigpt5.published sizes`. Nothing is downloaded: the base models' shapes are written down here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minigpt5.config import ModelConfig, minigpt5_7b
from minigpt5.limits import BLOCK, ON_GPU, kv_cache_bytes
from minigpt5.model.mapper import Mapper
from minigpt5.model.vision import Vision
from minigpt5.model.vokens import VokenEmbeddings

GB = 1e9
CARDS = {"24 GB": 24 * 2**30, "40 GB": 40 * 2**30, "80 GB": 80 * 2**30}
"""Bytes of a GPU's memory: RTX 4090 or L4; A100; A100 or H100."""
CUDA_BYTES = int(0.6 * GB)
"""What CUDA itself takes of a GPU. Assumed: nobody has measured it."""
LLAMA_7B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
SD21_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
SD21_TEXT: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
}


@dataclass(frozen=True, kw_only=True)
class FullSizeModel:
    """Every module of the full-size system, without memory."""

    config: ModelConfig
    language: nn.Module
    voken_embeddings: VokenEmbeddings
    vision: Vision
    mapper: Mapper
    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module

    @property
    def lora(self) -> int:
        """Parameters of LoRA: rank times both sides of every adapted matrix."""
        adapted = [
            module
            for name, module in self.language.named_modules()
            if name.rpartition(".")[2] in self.config.lora.targets
        ]
        return sum(self.config.lora.rank * (module.in_features + module.out_features) for module in adapted)

    @property
    def matrices(self) -> int:
        """Both vocabulary matrices, new rows included."""
        config = self.config
        return 2 * (config.vocabulary + config.num_vokens + 1) * config.hidden


def build() -> FullSizeModel:
    """Every module on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

    config = minigpt5_7b()
    with torch.device("meta"):
        return FullSizeModel(
            config=config,
            language=LlamaForCausalLM(LlamaConfig(**LLAMA_7B)),
            voken_embeddings=VokenEmbeddings(config.vocabulary, config.num_vokens, config.hidden),
            vision=Vision(config),
            mapper=Mapper(config),
            unet=UNet2DConditionModel(**SD21_UNET),
            vae=AutoencoderKL(**SD_VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**SD21_TEXT)),
        )


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def counts(parts: FullSizeModel) -> dict[str, int]:
    """Parameters by part, and what each stage trains: as the published code flags them, and as they really move."""
    mapper = parts.mapper
    transformer, fc, queries = count(mapper.transformer), count(mapper.fc), mapper.queries.numel()
    new_rows = count(parts.voken_embeddings)
    return {
        "language model": count(parts.language),
        "vision encoder": count(parts.vision.encoder),
        "Q-Former and projection": count(parts.vision.qformer),
        "mapper": transformer,
        "fc": fc,
        "queries": queries,
        "new vocabulary rows": new_rows,
        "LoRA": parts.lora,
        "UNet": count(parts.unet),
        "VAE": count(parts.vae),
        "text encoder": count(parts.text_encoder),
        "stage 1, flagged as trained": parts.matrices + transformer + fc + queries,
        "stage 1, trained": new_rows + transformer + fc + queries,
        "stage 2, flagged as trained": parts.matrices + transformer + parts.lora,
        "stage 2, trained": new_rows + transformer + parts.lora,
    }


def cache_bytes_per_token(bytes_per_value: int = 2) -> int:
    """Keys and values of one token in every layer of the language model."""
    return 2 * LLAMA_7B["num_hidden_layers"] * LLAMA_7B["hidden_size"] * bytes_per_value


def weight_bytes(sizes: dict[str, int]) -> dict[str, int]:
    """Weights of each deployment on a GPU: the language model with its adapter merged, UNet and VAE in bfloat16, the
    vision path and the mapper in float32."""
    language = sizes["language model"] + sizes["new vocabulary rows"]
    sees = sizes["vision encoder"] + sizes["Q-Former and projection"]
    maps = sizes["mapper"] + sizes["fc"] + sizes["queries"]
    return {
        "VokenGenerator": 2 * language + 4 * sees,
        "DiffusionDecoder": 2 * (sizes["UNet"] + sizes["VAE"]) + 4 * maps,
    }


def kv_blocks(sizes: dict[str, int], *, card_bytes: int) -> int:
    """Blocks of the KV store of a generator that has such a GPU to itself."""
    weights = weight_bytes(sizes)["VokenGenerator"]
    size = kv_cache_bytes(
        ON_GPU, free_bytes=card_bytes - CUDA_BYTES - weights, total_bytes=card_bytes, used_bytes=weights
    )
    return size // (BLOCK * cache_bytes_per_token())


def serving_gb(sizes: dict[str, int], *, card_bytes: int, pictures: int) -> dict[str, dict[str, float]]:
    """Memory of each deployment in GB on such a GPU, which it has to itself.

    Activations are estimated by their widest tensors. Of the generator: a step of the most tokens in a layer, logits
    with what drawing makes of them, and a layer's keys and values that attention gathers, padded to twice their size at
    most. Of the decoder with `pictures` guided pictures of 512 px: feature maps of a UNet call, or of the VAE's last
    level.
    """
    weights, num_blocks = weight_bytes(sizes), kv_blocks(sizes, card_bytes=card_bytes)
    store = num_blocks * BLOCK * cache_bytes_per_token()
    num_tokens = ON_GPU.long_read_tokens + ON_GPU.max_batch
    layer = num_tokens * (6 * LLAMA_7B["hidden_size"] + 3 * LLAMA_7B["intermediate_size"]) * 2
    logits = ON_GPU.max_batch * LLAMA_7B["vocab_size"] * 42  # bytes of a logit: bfloat16, two float32, ids, float64
    gathered = 2 * store // LLAMA_7B["num_hidden_layers"]
    unet = 2 * pictures * 12 * 320 * 64 * 64 * 2  # some twelve maps of the first level are alive at once
    vae = pictures * 4 * 128 * 512 * 512 * 2
    rows = {
        "VokenGenerator": (store, layer + logits + gathered),
        "DiffusionDecoder": (0, max(unet, vae)),
    }
    return {
        name: {
            "CUDA": CUDA_BYTES / GB,
            "weights": weights[name] / GB,
            "KV store": kv / GB,
            "activations": activations / GB,
        }
        for name, (kv, activations) in rows.items()
    }


def training_gb(sizes: dict[str, int], *, zero: int, workers: int) -> dict[str, dict[str, float]]:
    """Memory of one worker in GB, by stage: frozen base models in bf16, all else in float32; what is trained with its
    gradients and AdamW's two moments, which ZeRO 1, 2 and 3 divide among workers (arXiv 1910.02054, 3); frozen parts
    stay whole below ZeRO 3. The first stage reads no pictures. Activations come on top: they depend on the batch."""
    table = {}
    for stage, more_halved, more_kept in (("stage 1", (), ()), ("stage 2", ("vision encoder",), ("LoRA",))):
        trained = sizes[f"{stage}, trained"]
        halved = sum(sizes[name] for name in ("language model", "UNet", "VAE", "text encoder", *more_halved))
        made = ("Q-Former and projection", "mapper", "fc", "queries", "new vocabulary rows", *more_kept)
        kept = sum(sizes[name] for name in made) - trained
        table[stage] = {
            "frozen": (2 * halved + 4 * kept) / GB / (workers if zero == 3 else 1),
            "trained": 4 * trained / GB / (workers if zero == 3 else 1),
            "gradients": 4 * trained / GB / (workers if zero >= 2 else 1),
            "optimizer": 8 * trained / GB / (workers if zero >= 1 else 1),
        }
    return table


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What an estimate of training time rests on besides counted FLOPs and bytes."""

    peak_flops: float = 155e12
    """Speed of a GPU, dense bfloat16 (an A6000's)."""
    utilisation: float = 0.35
    """Share of the peak that is reached."""
    node_gpus: int = 8
    inside_bytes_per_s: float = 25e9
    """Speed of a GPU's link within its node (PCIe 4)."""
    between_bytes_per_s: float = 12.5e9
    """Speed of a node's link to others (100 Gbit/s)."""
    batch: int = 48
    """Samples of a step, all GPUs together; a GPU has at least one."""
    caption_tokens: int = 24
    story_tokens: int = 400
    """Tokens of a sample of the published second stage: a history of a few pages, 32 embeddings a picture."""
    read_pictures: float = 2.0
    """Pictures read in such a sample."""


def forward_flops(parts: FullSizeModel) -> dict[str, float]:
    """FLOPs of one forward pass, counted on the meta device: a picture through each of its parts, a token through the
    language model, a condition through the mapper."""
    from torch.utils.flop_counter import FlopCounterMode

    def count_flops(call: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            call()
        return float(counter.get_total_flops())

    config, tokens = parts.config, 64
    vae: Any = parts.vae
    with torch.device("meta"):
        latents, step = torch.empty(1, 4, 64, 64), torch.zeros(1, dtype=torch.long)
        condition = torch.empty(1, config.condition_length, config.condition_width)
        px = config.vision.image_px
        ids = torch.zeros(1, tokens, dtype=torch.long)
        return {
            "token": count_flops(lambda: parts.language(input_ids=ids)) / tokens,
            "read picture": count_flops(lambda: parts.vision.qformer(parts.vision.encoder(torch.empty(1, 3, px, px)))),
            "mapper": count_flops(lambda: parts.mapper(torch.empty(1, config.num_vokens, config.hidden))),
            "VAE, encode": count_flops(lambda: vae.encode(torch.empty(1, 3, config.image_px, config.image_px))),
            "UNet": count_flops(lambda: parts.unet(latents, step, encoder_hidden_states=condition)),
        }


def sample_flops(flops: dict[str, float], assumed: Assumed) -> dict[str, float]:
    """Compute the FLOP of one training sample. In the backward pass a frozen part costs its forward pass once more, for
    the gradients that pass through it; a trained part costs it twice."""
    drawn = flops["VAE, encode"] + 2 * flops["UNet"] + 3 * flops["mapper"]
    return {
        "stage 1": 2 * assumed.caption_tokens * flops["token"] + drawn,
        "stage 2": 2 * assumed.story_tokens * flops["token"] + assumed.read_pictures * flops["read picture"] + drawn,
    }


def step_s(
    sizes: dict[str, int], flops: dict[str, float], assumed: Assumed, *, gpus: int
) -> dict[str, dict[str, float]]:
    """Seconds of an optimizer step by stage: computing, and averaging float32 gradients in rings, within the nodes and
    then between them, with nothing overlapped."""
    samples = max(1.0, assumed.batch / gpus)
    table = {}
    for stage, cost in sample_flops(flops, assumed).items():
        gradients = 4 * sizes[f"{stage}, trained"]
        inside, nodes = min(gpus, assumed.node_gpus), max(1, gpus // assumed.node_gpus)
        communicate_s = 2 * (inside - 1) / inside * gradients / assumed.inside_bytes_per_s
        communicate_s += 2 * (nodes - 1) / nodes * gradients / assumed.between_bytes_per_s
        compute_s = samples * cost / (assumed.peak_flops * assumed.utilisation)
        table[stage] = {
            "compute": compute_s,
            "communicate": communicate_s,
            "samples/s": samples * gpus / (compute_s + communicate_s),
        }
    return table


def print_tables() -> None:
    parts = build()
    sizes = counts(parts)
    print("parameters")
    for name, number in sizes.items():
        print(f"  {name:28} {number:>15,}")
    print(f"\nKV cache: {cache_bytes_per_token():,} bytes a token at 16 bits")
    for card, card_bytes in CARDS.items():
        num_tokens = kv_blocks(sizes, card_bytes=card_bytes) * BLOCK
        context = parts.config.context_tokens
        print(
            f"\nserving on GPUs of {card}, GB; keys and values of {num_tokens:,} tokens, as of "
            f"{num_tokens / context:.1f} requests of {context:,}; 8 pictures at once"
        )
        _print(serving_gb(sizes, card_bytes=card_bytes, pictures=8))
    for zero in range(4):
        print(f"\ntraining, GB for each of 4 workers with ZeRO {zero}, without activations")
        _print(training_gb(sizes, zero=zero, workers=4))
    flops, assumed = forward_flops(parts), Assumed()
    print("\nTFLOP of a forward pass: " + ", ".join(f"{name} {value / 1e12:.3f}" for name, value in flops.items()))
    samples = sample_flops(flops, assumed)
    print("TFLOP of a training sample: " + ", ".join(f"{name} {value / 1e12:.1f}" for name, value in samples.items()))
    print(f"assumed: {assumed}")
    for gpus in (8, 64):
        print(f"\nestimated seconds of a step on {gpus} GPUs, data parallel, and samples a second")
        _print(step_s(sizes, flops, assumed, gpus=gpus), is_summed=False)


def _print(table: dict[str, dict[str, float]], *, is_summed: bool = True) -> None:
    names = list(next(iter(table.values())))
    print(f"  {'':18}" + "".join(f"{name:>13}" for name in [*names, *(["together"] if is_summed else [])]))
    for row, values in table.items():
        cells = [*values.values(), *([sum(values.values())] if is_summed else [])]
        print(f"  {row:18}" + "".join(f"{value:13.2f}" for value in cells))
