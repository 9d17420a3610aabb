"""The published checkpoints (arXiv 2310.02239): `python -m minigpt5.published import|export|sizes`.

A published file is a Lightning checkpoint that holds what its stage trained: stage 1 `fc`, the queries, the mapper and
both vocabulary matrices; stage 2 the mapper, both matrices again and LoRA, so that it needs its stage-1 file beside
it. Every key has one home in a model folder, and no key is skipped in silence.

Where the published code has a bug, ours does the right thing, and repeats the bug with `published_quirks` in the
config (the numbers are of our list of differences):

D4   the label of [IMG7] is learnt, and every label of a target's second picture (prompt.encode)
D8   captions are encoded with their padding masked, unlike in Stable Diffusion (text_encoder.ClipTextEncoder)
D11  a forced picture comes before any text, and not at all where the logits are negative (engine.script)
D14  a reply has one picture at most (engine.script)
D6   the old rows of the vocabulary shrink by weight decay: only new rows are trained here, with or without the flag;
     what an imported checkpoint has of it is kept (`vocabulary.safetensors`)
"""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig

from minigpt5.config import LoraConfig, ModelConfig, VisionConfig, minigpt5_7b
from minigpt5.errors import ModelFolderError
from minigpt5.model import libraries
from minigpt5.model.base_models import pin, resolve
from minigpt5.model.folder import PREFIX, new_folder
from minigpt5.model.folder_config import check_folder, write_config
from minigpt5.model.locate import contains
from minigpt5.model.mapper import Mapper
from minigpt5.model.vision import Vision

Tensors = dict[str, Tensor]

_LLM = "model.llama_model."
_STAGE1 = {"embedding": f"{_LLM}model.embed_tokens.weight", "head": f"{_LLM}lm_head.weight"}
_STAGE2 = {
    "embedding": f"{_LLM}base_model.model.model.embed_tokens.modules_to_save.default.weight",
    "head": f"{_LLM}base_model.model.lm_head.modules_to_save.default.weight",
}
_LORA = re.compile(rf"{re.escape(_LLM)}base_model\.model\.model\.(layers\.\d+\.\w+\.\w+\.lora_[AB])\.default\.weight")
_ENCODER_NAMES = {
    "post_layernorm.": "ln_vision.",
    "embeddings.class_embedding": "visual_encoder.cls_token",
    "embeddings.position_embedding": "visual_encoder.pos_embed",
    "embeddings.patch_embedding.": "visual_encoder.patch_embed.proj.",
    "encoder.layers.": "visual_encoder.blocks.",
    ".layer_norm": ".norm",
    ".self_attn.projection.": ".attn.proj.",
    ".self_attn.": ".attn.",
}
_QFORMER_NAMES = {
    "queries": "query_tokens",
    "projection.": "llama_proj.",
    "layers.layernorm.": "Qformer.bert.embeddings.LayerNorm.",
    "layers.encoder.": "Qformer.bert.encoder.",
    "attention.attention.": "attention.self.",
}
_UNREAD = re.compile(r"Qformer\.bert\.embeddings\.position_ids|t5_proj\.|(visual_encoder\.)?(norm|fc_norm|head)\.")
"""What the published code's own files hold of the vision path and it builds nothing of: a constant, BLIP-2's projection
to T5, and what follows the encoder's blocks. It drops the last block too."""


def import_checkpoint(
    out: Path,
    *,
    stage1: Tensors | None,
    stage2: Tensors | None = None,
    vision: Tensors,
    llm: str,
    diffusion: str,
    like: ModelConfig | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> ModelConfig:
    """Published state dicts -> a model folder. Sizes are read from the tensors; what they do not tell, from `like`, and
    that the encoder has no more blocks than it has there. `tell` is called with what is left out.

    Raises ModelFolderError naming every key that is missing, too many or of the wrong shape, or where `out` is taken.
    """
    out = Path(out).expanduser().absolute()
    if out.exists():
        raise ModelFolderError(f"{out} exists: name a new folder")
    like = like or minigpt5_7b()
    if stage1 is None:
        raise ModelFolderError(
            "a stage-2 checkpoint needs its stage-1 checkpoint too: fc and the queries are trained in stage 1 and "
            "kept as they are in stage 2, whose file does not hold them; give --stage1"
        )
    if unread := sorted(key for key in vision if _is_unread(key, like.vision)):
        parts = dict.fromkeys(re.sub(r"(blocks\.\d+\.).*", r"\1*", key) for key in unread)
        tell(f"not read, as in the published code: {', '.join(parts)}")
        vision = {key: value for key, value in vision.items() if key not in unread}
    config = _config_of(stage1, stage2, vision, llm=llm, diffusion=diffusion, like=like)
    _validate_shapes("the stage-1 checkpoint", stage1, stage1_shapes(config))
    if stage2 is not None:
        base = libraries.load_base_config(resolve(llm))
        _validate_shapes("the stage-2 checkpoint", stage2, stage2_shapes(config, base))
    _validate_shapes("the vision weights", vision, vision_shapes(config))

    newest, names = (stage1, _STAGE1) if stage2 is None else (stage2, _STAGE2)
    with torch.device("meta"):
        mapper_keys = Mapper(config).state_dict().keys()
    mapper = {key: (stage1 | newest)[published_mapper_key(key)] for key in mapper_keys}
    rows = {part: newest[key] for part, key in names.items()}
    encoder, qformer = _split_vision(vision, config)
    with new_folder(out) as folder:
        save_file(_contiguous(mapper), folder / "mapper.safetensors")
        save_file(_contiguous({k: v[config.vocabulary :] for k, v in rows.items()}), folder / "vokens.safetensors")
        save_file(_contiguous({k: v[: config.vocabulary] for k, v in rows.items()}), folder / "vocabulary.safetensors")
        if stage2 is not None:
            lora = {
                f"base_model.model.{m[1]}.weight": value for key, value in stage2.items() if (m := _LORA.fullmatch(key))
            }
            place = folder / "adapter"
            place.mkdir()
            save_file(_contiguous(lora), place / "adapter_model.safetensors", metadata={"format": "pt"})
            (place / "adapter_config.json").write_text(json.dumps(_adapter_config(config), indent=2) + "\n")
        (folder / "vision").mkdir()
        save_file(_contiguous(encoder), folder / "vision" / "model.safetensors")
        save_file(_contiguous(qformer), folder / "vision" / "qformer.safetensors")
        return write_config(folder, config)


def export_checkpoint(folder: Path) -> tuple[Tensors, Tensors | None, Tensors]:
    """A model folder -> the published layout: stage 1, stage 2 (None without an adapter), vision.

    The stage-1 file of a model that has been through stage 2 has the mapper and rows of stage 2.
    """
    config = check_folder(folder)
    if config.vision.family != "eva-clip":
        raise ModelFolderError(f"{folder} is no published model: its vision family is {config.vision.family!r}")
    if (folder / PREFIX).is_file():
        raise ModelFolderError(f"{folder} has a prefix, for which the published layout has no place: train an adapter")
    if contains(folder, config.language_model):
        raise ModelFolderError(
            f"{folder} has a language model of its own, for which the published layout has no place: train an adapter"
        )
    mapper, rows = load_file(folder / "mapper.safetensors"), load_file(folder / "vokens.safetensors")
    old = load_file(folder / "vocabulary.safetensors")
    whole = {part: torch.cat([old[part].to(rows[part]), rows[part]]) for part in rows}
    stage1 = {published_mapper_key(key): value for key, value in mapper.items()}
    stage1 |= {_STAGE1[part]: value for part, value in whole.items()}
    stage2 = None
    if (folder / "adapter").is_dir():
        stage2 = {key: value for key, value in stage1.items() if key.startswith("llm_to_t2i_mapping.")}
        stage2 |= {_STAGE2[part]: value for part, value in whole.items()}
        for key, value in load_file(folder / "adapter" / "adapter_model.safetensors").items():
            name = key.removeprefix("base_model.model.").removesuffix(".weight")
            if "lora_B" in name:  # the layout has no place for alpha, and who reads it takes the published one
                value = value * (config.lora.alpha / minigpt5_7b().lora.alpha)
            stage2[f"{_LLM}base_model.model.model.{name}.default.weight"] = value
    vision = folder / "vision"
    return (
        stage1,
        stage2,
        _join_vision(load_file(vision / "model.safetensors"), load_file(vision / "qformer.safetensors")),
    )


def drift(folder: Path, llm: str) -> dict[str, float]:
    """How far a checkpoint's old vocabulary rows are from the base model's, relative to their size.

    They were meant to be frozen; weight decay reached them all the same (D6).
    """
    from minigpt5.model.language import LanguageModel

    config = check_folder(folder)
    base = LanguageModel.from_base(resolve(llm), config)
    rows = load_file(folder / "vocabulary.safetensors")
    pairs = {"embedding": base.embedding, "head": base.head.weight}
    own = {part: value[: config.vocabulary] for part, value in pairs.items()}
    return {part: float((rows[part] - value).norm() / value.norm()) for part, value in own.items()}


def stage1_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every key of a stage-1 checkpoint: 131 at full size, and as many at any other."""
    with torch.device("meta"):
        mapper = Mapper(config).state_dict()
    matrix = (config.vocabulary + config.num_vokens + 1, config.hidden)
    shapes = {published_mapper_key(key): tuple(value.shape) for key, value in mapper.items()}
    return shapes | dict.fromkeys(_STAGE1.values(), matrix)


def stage2_shapes(config: ModelConfig, llm: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every key of a stage-2 checkpoint: 126 and four for each layer of the language model."""
    with torch.device("meta"):
        body = AutoModel.from_config(llm)
    shapes = {key: shape for key, shape in stage1_shapes(config).items() if key.startswith("llm_to_t2i_mapping.")}
    shapes |= dict.fromkeys(_STAGE2.values(), (config.vocabulary + config.num_vokens + 1, config.hidden))
    for name, module in body.named_modules():
        if name.rpartition(".")[2] in config.lora.targets:
            prefix = f"{_LLM}base_model.model.model.{name}.lora_"
            shapes[f"{prefix}A.default.weight"] = (config.lora.rank, module.in_features)
            shapes[f"{prefix}B.default.weight"] = (module.out_features, config.lora.rank)
    return shapes


def vision_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every key of the vision path, under the names of the files that the published code loads it from."""
    with torch.device("meta"):
        vision = Vision(config)
    joined = _join_vision(vision.encoder.network.state_dict(), vision.qformer.state_dict())
    return {key: tuple(value.shape) for key, value in joined.items()}


def _config_of(
    stage1: Tensors, stage2: Tensors | None, vision: Tensors, *, llm: str, diffusion: str, like: ModelConfig
) -> ModelConfig:
    needed = ("t2i_decoder_prompt", *_STAGE1.values())
    if missing := [key for key in needed if key not in stage1]:
        raise ModelFolderError(
            f"the stage-1 checkpoint has no {', '.join(missing)}: is it a stage-2 file? fc, the queries and plain "
            "embed_tokens are in stage 1 only"
        )
    layers = _count(stage1, r"llm_to_t2i_mapping\.encoder\.layers\.(\d+)\.")
    total, hidden = stage1[_STAGE1["embedding"]].shape
    _, condition_length, condition_width = stage1["t2i_decoder_prompt"].shape
    rank = next((value.shape[0] for key, value in (stage2 or {}).items() if "lora_A" in key), like.lora.rank)
    targets = {match[1].split(".")[3] for key in stage2 or {} if (match := _LORA.fullmatch(key))}
    base = libraries.load_base_config(resolve(llm))
    unet, vae = (json.loads((resolve(diffusion) / part / "config.json").read_text()) for part in ("unet", "vae"))
    return dataclasses.replace(
        like,
        language_model=pin(llm, resolve(llm)),
        hidden=hidden,
        vocabulary=total - like.num_vokens - 1,
        context_tokens=base.max_position_embeddings,
        vision=_vision_config(vision, like.vision),
        text_encoder=pin(diffusion, resolve(diffusion)),
        diffusion=pin(diffusion, resolve(diffusion)),
        condition_length=condition_length,
        condition_width=condition_width,
        mapper_layers=layers,
        image_px=unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1),
        lora=LoraConfig(
            rank=rank,
            alpha=like.lora.alpha,
            dropout=like.lora.dropout,
            targets=tuple(sorted(targets)) or like.lora.targets,
        ),
    )


def _vision_config(vision: Tensors, like: VisionConfig) -> VisionConfig:
    if like.eva is None or "visual_encoder.patch_embed.proj.weight" not in vision or "query_tokens" not in vision:
        raise ModelFolderError(
            "the vision weights need visual_encoder.*, ln_vision.*, Qformer.bert.*, query_tokens and llama_proj.*, as "
            "the published code names them"
        )
    width, _, patch_px, _ = vision["visual_encoder.patch_embed.proj.weight"].shape
    num_features = vision["visual_encoder.pos_embed"].shape[1]
    cross = sorted(
        {int(m[1]) for key in vision if (m := re.match(r"Qformer\.bert\.encoder\.layer\.(\d+)\.cross", key))}
    )
    return dataclasses.replace(
        like,
        encoder="vision",
        image_px=round((num_features - 1) ** 0.5) * patch_px,
        encoder_width=width,
        num_features=num_features,
        hidden=vision["query_tokens"].shape[2],
        num_queries=vision["query_tokens"].shape[1],
        num_layers=_count(vision, r"Qformer\.bert\.encoder\.layer\.(\d+)\."),
        eva=dataclasses.replace(
            like.eva,
            patch_px=patch_px,
            num_layers=_count(vision, r"visual_encoder\.blocks\.(\d+)\."),
            intermediate=vision["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
            qformer_intermediate=vision["Qformer.bert.encoder.layer.0.intermediate_query.dense.weight"].shape[0],
            cross_attention_every=cross[1] - cross[0] if len(cross) > 1 else max(1, like.eva.cross_attention_every),
        ),
    )


def _is_unread(key: str, like: VisionConfig) -> bool:
    block = re.match(r"visual_encoder\.blocks\.(\d+)\.", key)
    return bool(_UNREAD.match(key) or (block and like.eva and int(block[1]) >= like.eva.num_layers))


def _count(tensors: Iterable[str], pattern: str) -> int:
    return 1 + max((int(match[1]) for key in tensors if (match := re.match(pattern, key))), default=-1)


def _validate_shapes(what: str, found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    wrong = [
        f"{key} is {tuple(found[key].shape)} and not {shape}"
        for key, shape in sorted(expected.items())
        if key in found and tuple(found[key].shape) != shape
    ]
    problems = [f"lacks {', '.join(missing)}"] if missing else []
    problems += [f"has {', '.join(extra)}, which nothing is made of"] if extra else []
    problems += wrong
    if problems:
        raise ModelFolderError(f"{what} does not fit: {'; '.join(problems)}")


def published_mapper_key(key: str) -> str:
    """A key of mapper.safetensors -> its name in the published checkpoint."""
    if key == "queries":
        return "t2i_decoder_prompt"
    return key.replace("transformer.", "llm_to_t2i_mapping.", 1)


def published_vision_key(key: str, names: Mapping[str, str]) -> str:
    """A key of the encoder or the Q-Former -> its published name."""
    for ours, theirs in names.items():
        key = key.replace(ours, theirs)
    return key


def _split_vision(vision: Tensors, config: ModelConfig) -> tuple[Tensors, Tensors]:
    """Published names -> the encoder's and the Q-Former's. The published attention has no bias on its keys."""
    with torch.device("meta"):
        built = Vision(config)
    encoder = {}
    for key in built.encoder.network.state_dict():
        name = published_vision_key(key, _ENCODER_NAMES)
        if name.endswith(".qkv.bias"):
            q_bias, v_bias = (vision[name.replace("qkv.bias", part)] for part in ("q_bias", "v_bias"))
            encoder[key] = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        else:
            encoder[key] = vision[name]
    return encoder, {key: vision[published_vision_key(key, _QFORMER_NAMES)] for key in built.qformer.state_dict()}


def _join_vision(encoder: Tensors, qformer: Tensors) -> Tensors:
    """The inverse of `_split_vision`."""
    vision = {published_vision_key(key, _QFORMER_NAMES): value for key, value in qformer.items()}
    for key, value in encoder.items():
        name = published_vision_key(key, _ENCODER_NAMES)
        if name.endswith(".qkv.bias"):
            width = len(value) // 3
            vision[name.replace("qkv.bias", "q_bias")] = value[:width]
            vision[name.replace("qkv.bias", "v_bias")] = value[2 * width :]
        else:
            vision[name] = value
    return vision


def _adapter_config(config: ModelConfig) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": config.language_model,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "target_modules": list(config.lora.targets),
        "bias": "none",
        "inference_mode": True,
    }


def _contiguous(tensors: Tensors) -> Tensors:
    return {key: value.contiguous().clone() for key, value in tensors.items()}


def read_state_dict(path: Path) -> Tensors:
    """A `.ckpt` or `.safetensors` file's tensors; nothing but tensors is ever unpickled. Raises ModelFolderError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ModelFolderError(
            f"{path} cannot be read as tensors alone ({error}); nothing else is ever read"
        ) from error
    tensors = loaded.get("state_dict", loaded.get("model", loaded)) if isinstance(loaded, dict) else None
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ModelFolderError(f"{path} holds no state dict of tensors")
    return dict(tensors)


def write_checkpoint(tensors: Tensors, path: Path) -> None:
    """A state dict as `.safetensors`, or as the published `.ckpt` under "state_dict"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(_contiguous(tensors), path)
    else:
        torch.save({"state_dict": tensors}, path)


def published_file_key(key: str) -> str:
    """The published code loads the vision path from three files, the encoder's without a prefix."""
    if key.startswith(("cls_token", "pos_embed", "patch_embed.", "blocks.")):
        return f"visual_encoder.{key}"
    return key.removeprefix("model.")
