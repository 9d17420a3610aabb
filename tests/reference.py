"""`python -m tests.reference FOLDER`: the largest deviation of each quantity from the published system's numbers.

FOLDER holds a tiny world, its vision weights, a checkpoint of each stage, and cases with every intermediate. The
checkpoints are imported as anybody's would be, and the cases go through the classes that serve and train.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from minigpt5.config import ModelConfig, minigpt5_7b
from minigpt5.engine.denoising import Denoising, advance
from minigpt5.engine.kv_cache import SlotCache
from minigpt5.model import folder as model_folder
from minigpt5.model.language import LanguageModel
from minigpt5.model.prompt import IGNORED
from minigpt5.model.vokens import align
from minigpt5.objective.losses import STAGE1, STAGE2
from minigpt5.objective.objective import Objective
from minigpt5.published.checkpoint import import_checkpoint, read_state_dict
from minigpt5.types import DrawSettings

TOLERANCES = {
    **dict.fromkeys(
        ("image_embeds", "last_hidden_state", "voken_hidden", "voken_projected", "condition", "uncondition"), 1e-4
    ),
    **dict.fromkeys(("text_loss", "image_loss", "image_loss_unweighted", "caption_loss", "loss"), 1e-4),
    "burst": 1e-4,
    "draw_image": 2e-3,
}
"""Relative to the largest value for states and conditions, absolute for losses and pixels."""
DRAW = DrawSettings(steps=50, guidance_scale=7.5, scheduler="pndm")


class Stage:
    """One stage's checkpoint, imported, with its cases."""

    def __init__(self, folder: Path, number: int, scratch: Path) -> None:
        self.number = number
        self.cases = load_file(folder / f"stage{number}_cases.safetensors")
        self.told = json.loads((folder / f"stage{number}_cases.json").read_text())["cases"]
        world, scratch = folder / "world", scratch / f"stage{number}"
        self.config = import_checkpoint(
            scratch,
            stage1=read_state_dict(folder / "stage1_checkpoint.safetensors"),
            stage2=read_state_dict(folder / "stage2_checkpoint.safetensors") if number == 2 else None,
            vision=read_state_dict(folder / "vision.safetensors"),
            llm=str(world / "llm"),
            diffusion=str(world / "stable-diffusion"),
            like=told_sizes(json.loads((folder / "config.json").read_text())),
        )
        _, self.mapper, self.diffusion = model_folder.load_decoder_model(scratch)
        self.language, self.vision = model_folder.load_language_and_vision(scratch, self.config)
        self.objective = Objective(
            self.config,
            None,  # type: ignore[arg-type]  # ids are given
            self.language,
            self.vision,
            self.mapper,
            self.diffusion,
            None,  # type: ignore[arg-type]  # and so are the captions' features
        ).eval()

    @torch.no_grad()
    def deviations(self) -> dict[str, float]:
        """The largest of all cases, by quantity."""
        found: dict[str, float] = {}
        for index in range(len(self.told)):
            for name, value in self._case(index).items():
                found[name] = max(found.get(name, 0.0), value)
        null_1QD = self.mapper.null_condition()
        found["uncondition"] = relative(null_1QD, self.cases["uncondition"])
        found["burst"] = self._burst()
        found["draw_image"] = self._draw(null_1QD)
        return found

    def _case(self, index: int) -> dict[str, float]:
        case = {key.partition(".")[2]: value for key, value in self.cases.items() if key.startswith(f"case{index}.")}
        told = self.told[index]["losses"]
        image_NQH = self.vision.qformer(self.vision.encoder(case["images"]))
        ids_1S, labels_1S = self._widen(case["input_ids"][0], case["labels"][0])
        has_slots = bool((ids_1S == self.language.voken_embeddings.placeholder).any())
        states_1SH = self.language.states(self.language.embed(ids_1S, image_NQH if has_slots else None))
        vokens_PVH, where_P2 = align(states_1SH, ids_1S, self.language.voken_embeddings)
        condition_PQD = self.mapper(vokens_PVH)
        draw = {"noise": case["noise"], "timesteps": case["timesteps"]}
        losses = {
            "text": self.objective.text_losses(states_1SH, F.pad(labels_1S[:, 1:], (0, 1), value=IGNORED)).mean(),
            "picture": self.diffusion.weighted_loss(case["latents"], condition_PQD[:1], **draw).mean(),
        }
        if self.number == 1:
            losses["caption"] = self.objective.caption_loss(condition_PQD[:1], case["caption_features"])
        error = self.diffusion.unweighted_loss(case["latents"], condition_PQD[:1], **draw).mean()
        first = int(where_P2[0, 1])
        if (expected := self.told[index]["first_voken_state_index"]) != first:
            raise SystemExit(f"case {index}: the first voken's state is at {first} and not at {expected}")
        found = {
            "image_embeds": relative(image_NQH, case["image_embeds"]),
            "last_hidden_state": relative(states_1SH, case["last_hidden_state"]),
            "voken_hidden": relative(vokens_PVH[:1], case["voken_hidden"]),
            "voken_projected": relative(self.mapper.fc(vokens_PVH[:1]), case["voken_projected"]),
            "condition": relative(condition_PQD[:1], case["condition"]),
            "text_loss": finite((losses["text"] - told["text_loss"]).abs()),
            "image_loss": finite((losses["picture"] - told["image_loss"]).abs()),
            "image_loss_unweighted": finite((error - F.mse_loss(case["model_pred"], case["noise"])).abs()),
            "loss": finite(((STAGE1 if self.number == 1 else STAGE2).total(losses) - told["loss"]).abs()),
        }
        if self.number == 1:
            found["caption_loss"] = finite((losses["caption"] - told["caption_loss"]).abs())
        return found

    def _widen(self, ids_S: Tensor, labels_S: Tensor) -> tuple[Tensor, Tensor]:
        """BOS first, and each slot as many placeholders as a picture has embeddings."""
        num = torch.where(ids_S == self.language.voken_embeddings.placeholder, self.config.vision.num_queries, 1)
        bos = torch.tensor([self.language.body.config.bos_token_id])
        ids = torch.cat([bos, ids_S.repeat_interleave(num)])
        labels = torch.cat([torch.tensor([IGNORED]), labels_S.repeat_interleave(num)])
        return ids[None], labels[None]

    def _burst(self) -> float:
        """All vokens in one step after the prompt, as the generator does it."""
        ids_S = self.cases["case0.input_ids"][0]
        is_prompt = self.cases["case0.labels"][0] == IGNORED
        num_prompt = int((~is_prompt).nonzero()[0])
        ids_1S, _ = self._widen(ids_S[:num_prompt], ids_S[:num_prompt])
        image_NQH = self.vision.qformer(self.vision.encoder(self.cases["case0.images"]))
        return relative(burst(self.language, ids_1S, image_NQH, self.config)[None], self.cases["burst.voken_hidden"])

    def _draw(self, null_1QD: Tensor) -> float:
        picture = Denoising(
            self.diffusion,
            self.mapper(self.cases["case0.voken_hidden"])[0],
            seed=0,
            draw=DRAW,
            guidance_rescale=self.config.guidance_rescale,
            noise_1CYX=self.cases["draw.latents"],
        )
        while picture.num_calls_left:
            advance(self.diffusion, [picture], null_1QD)
        pixels_YXC = (self.diffusion.to_pixels(picture.latents_1CYX)[0].permute(1, 2, 0) + 1) / 2
        return finite((pixels_YXC - self.cases["draw.image"]).abs().max())


def burst(language: LanguageModel, ids_1S: Tensor, image_NQH: Tensor, config: ModelConfig) -> Tensor:
    """The states that condition a picture drawn right after a prompt, through the generator's own cache: (V, H)."""
    cache = SlotCache.for_model(language.body, num_slots=1, num_positions=config.context_tokens)
    embeds_1SH = language.embed(ids_1S, image_NQH)
    before_SH = cache.forward(language.body, embeds_1SH[0], [(0, ids_1S.shape[1])])
    voken_ids_1V = torch.tensor([language.voken_embeddings.ids])
    at_vokens_VH = cache.forward(language.body, language.embed(voken_ids_1V)[0], [(0, config.num_vokens)])
    return torch.cat([before_SH[-1:], at_vokens_VH[:-1]])


def told_sizes(values: dict[str, dict]) -> ModelConfig:  # type: ignore[type-arg]
    """What tensor shapes do not tell: heads, ratios, LoRA's alpha."""
    config = minigpt5_7b()
    assert config.vision.eva is not None
    vit, qformer, lora = values["vit"], values["qformer"], values["lora"]
    return dataclasses.replace(
        config,
        num_vokens=values["vokens"],
        mapper_heads=values["mapper"]["heads"],
        vision=dataclasses.replace(
            config.vision,
            num_heads=qformer["heads"],
            eva=dataclasses.replace(
                config.vision.eva, num_heads=vit["heads"], cross_attention_every=qformer["cross_attention_every"]
            ),
        ),
        lora=dataclasses.replace(config.lora, rank=lora["r"], alpha=lora["alpha"], targets=tuple(lora["targets"])),
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value; infinite where something is no number."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return finite((found - expected).abs().max() / expected.abs().max())


def finite(value: Tensor) -> float:
    return float(value) if value.isfinite() else math.inf


def compare(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Deviation and tolerance of each quantity, by stage."""
    report = {}
    for number in (1, 2):
        with tempfile.TemporaryDirectory() as scratch:
            deviations = Stage(folder, number, Path(scratch)).deviations()
        report[f"stage{number}"] = {
            name: {"deviation": deviations[name], "tolerance": tolerance}
            for name, tolerance in TOLERANCES.items()
            if name in deviations
        }
    return report


def is_within(report: dict[str, dict[str, dict[str, float]]]) -> bool:
    """False for anything beyond its tolerance, or not a number."""
    return all(one["deviation"] <= one["tolerance"] for stage in report.values() for one in stage.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reference", description=__doc__)
    parser.add_argument("folder", type=Path)
    report = compare(parser.parse_args().folder)
    for stage, quantities in report.items():
        for name, one in quantities.items():
            verdict = "" if one["deviation"] <= one["tolerance"] else "  BEYOND"
            print(f"{stage}  {name:22} {one['deviation']:.1e}  of {one['tolerance']:.0e}{verdict}")
    print(json.dumps(report))
    sys.exit(0 if is_within(report) else 1)


if __name__ == "__main__":
    main()
