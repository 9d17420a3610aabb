"""Published checkpoints in and out, the full-size system's counts, and the published bugs on demand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from minigpt5 import MiniGPT5
from minigpt5.config import minigpt5_7b
from minigpt5.errors import ModelFolderError
from minigpt5.model import sizes
from minigpt5.model.decoders.stable_diffusion import ClipTextEncoder
from minigpt5.model.folder_config import load_config, write_config
from minigpt5.model.prompt import DRAW_TARGET, IGNORED, encode, text_segment
from minigpt5.model.vokens import VokenEmbeddings
from minigpt5.published import checkpoint as published
from minigpt5.published.__main__ import main
from minigpt5.types import DrawSettings
from tests.helpers.tiny import tiny_config, tiny_tokenizer
from tests.reference import told_sizes
from tests.test_reference import FOLDER

WORLD = FOLDER / "world"
LIKE = told_sizes(json.loads((FOLDER / "config.json").read_text()))


def read(name: str) -> published.Tensors:
    return published.read_state_dict(FOLDER / f"{name}.safetensors")


def bring_in(out: Path, **files: Any) -> Path:
    """Import the reference, with other tensors where `files` says so: stage1, stage2 (None at first), vision."""
    given = {"stage1": read("stage1_checkpoint"), "stage2": None, "vision": read("vision"), **files}
    base = {"llm": str(WORLD / "llm"), "diffusion": str(WORLD / "stable-diffusion"), "like": LIKE}
    published.import_checkpoint(out, **{**base, **given})
    return out


@pytest.mark.parametrize("stage", [1, 2])
def test_an_export_is_the_checkpoint_that_was_imported(tmp_path: Path, stage: int) -> None:
    folder = bring_in(tmp_path / "model", stage2=read("stage2_checkpoint") if stage == 2 else None)
    stage1, stage2, vision = published.export_checkpoint(folder)
    pairs = [(vision, read("vision"))]
    pairs.append((stage1, read("stage1_checkpoint")) if stage == 1 else (stage2 or {}, read("stage2_checkpoint")))
    for found, expected in pairs:
        expected.pop("Qformer.bert.embeddings.position_ids", None)  # a constant
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_import_of_an_export_is_identical(tmp_path: Path) -> None:
    """Through the command line and the published file format."""
    folder = bring_in(tmp_path / "model", stage2=read("stage2_checkpoint"))
    files = [str(tmp_path / name) for name in ("stage1.ckpt", "stage2.ckpt", "vision.ckpt")]
    main(["export", str(folder), "--stage1", files[0], "--stage2", files[1], "--vision", files[2]])
    stage1, stage2, vision = (published.read_state_dict(Path(file)) for file in files)
    again = bring_in(tmp_path / "again", stage1=stage1, stage2=stage2, vision=vision)
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()
    for path in folder.rglob("*.safetensors"):
        assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes()


def test_an_imported_model_writes_and_draws(tmp_path: Path) -> None:
    model = MiniGPT5.from_pretrained(bring_in(tmp_path / "model", stage2=read("stage2_checkpoint")))
    picture = model.draw(model.vokens("dad at the grill"), seed=1, settings=DrawSettings(steps=2, scheduler="pndm"))
    assert (picture.width, picture.height) == (32, 32)


def test_keys_are_named_that_are_missing_too_many_or_of_another_shape(tmp_path: Path) -> None:
    stage1 = read("stage1_checkpoint")
    del stage1["fc.0.bias"]
    stage1["fc.9.bias"] = torch.zeros(1)
    stage1["fc.2.bias"] = torch.zeros(3)
    with pytest.raises(ModelFolderError) as failure:
        bring_in(tmp_path / "model", stage1=stage1)
    for part in ("lacks fc.0.bias", "has fc.9.bias", "fc.2.bias is (3,) and not (32,)"):
        assert part in str(failure.value)
    assert not (tmp_path / "config.json").exists()


def test_what_the_published_code_does_not_read_is_named_and_left_out(tmp_path: Path) -> None:
    """Its files hold one block more than it builds, and BLIP-2's projection to T5."""
    said: list[str] = []
    vision = read("vision")
    eva = load_config(bring_in(tmp_path / "plain")).vision.eva
    assert eva is not None
    last, like = eva.num_layers - 1, dataclasses.replace(LIKE, vision=dataclasses.replace(LIKE.vision, eva=eva))
    more = {
        key.replace(f".{last}.", f".{last + 1}.", 1): value.clone()
        for key, value in vision.items()
        if key.startswith(f"visual_encoder.blocks.{last}.")
    }
    surplus = {**more, "t5_proj.weight": torch.zeros(3), "norm.weight": torch.zeros(3)}
    found = bring_in(tmp_path / "model", vision={**vision, **surplus}, like=like, tell=said.append)
    assert load_config(found).vision.eva == eva
    constant = "Qformer.bert.embeddings.position_ids"
    parts = f"{constant}, norm.weight, t5_proj.weight, visual_encoder.blocks.{last + 1}.*"
    assert said == [f"not read, as in the published code: {parts}"]
    with pytest.raises(ModelFolderError, match="has t6_proj.weight, which nothing is made of"):
        bring_in(tmp_path / "other", vision={**vision, "t6_proj.weight": torch.zeros(3)})


def test_another_alpha_is_part_of_an_export(tmp_path: Path) -> None:
    """The layout has no place for it, and who reads an export takes the published one."""
    folder = bring_in(tmp_path / "model", stage2=read("stage2_checkpoint"))
    config = load_config(folder)
    write_config(
        folder, dataclasses.replace(config, lora=dataclasses.replace(config.lora, alpha=2 * config.lora.alpha))
    )
    _, plain, _ = published.export_checkpoint(bring_in(tmp_path / "same", stage2=read("stage2_checkpoint")))
    _, doubled, _ = published.export_checkpoint(folder)
    assert plain is not None and doubled is not None and plain.keys() == doubled.keys()
    for key, value in plain.items():
        torch.testing.assert_close(doubled[key], 2 * value if "lora_B" in key else value)


def test_a_language_model_that_was_trained_whole_has_no_place_in_an_export(tmp_path: Path) -> None:
    folder = bring_in(tmp_path / "model")
    (folder / "language").mkdir()
    write_config(folder, dataclasses.replace(load_config(folder), language_model="language"))
    with pytest.raises(ModelFolderError, match="has a language model of its own"):
        published.export_checkpoint(folder)


def test_a_file_of_an_older_torch_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"model": {"a": torch.ones(2)}}, path, _use_new_zipfile_serialization=False)
    assert published.read_state_dict(path)["a"].tolist() == [1, 1]


def test_stage_2_needs_stage_1(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="needs its stage-1 checkpoint too: fc and the queries"):
        bring_in(tmp_path / "model", stage1=None, stage2=read("stage2_checkpoint"))
    with pytest.raises(ModelFolderError, match="is it a stage-2 file"):
        bring_in(tmp_path / "model", stage1=read("stage2_checkpoint"))


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"fc.0.bias": torch.zeros(1)}, "hyper_parameters": Path("/")}, path)
    with pytest.raises(ModelFolderError, match="nothing else is ever read"):
        published.read_state_dict(path)


def test_other_sizes_are_read_from_the_tensors(tmp_path: Path) -> None:
    """Another rank and fewer blocks than the reference: nothing is assumed but what shapes cannot tell."""
    stage2, vision = read("stage2_checkpoint"), read("vision")
    stage2 = {
        key: (value[:4] if "lora_A" in key else value[:, :4] if "lora_B" in key else value).clone()
        for key, value in stage2.items()
    }
    vision = {key: value for key, value in vision.items() if ".blocks.1." not in key and ".layer.3." not in key}
    config = load_config(bring_in(tmp_path / "model", stage2=stage2, vision=vision))
    assert config.vision.eva is not None
    assert (config.lora.rank, config.vision.eva.num_layers, config.vision.num_layers) == (4, 1, 3)


def test_the_full_system_has_the_published_counts() -> None:
    counts = sizes.counts(sizes.build())
    published_counts = {
        "mapper": 117_575_680,
        "fc": 5_244_928,
        "queries": 78_848,
        "LoRA": 4_194_304,
        "stage 1, flagged as trained": 385_117_184,
        "stage 2, flagged as trained": 383_987_712,
        "stage 1, trained": 122_973_184,
        "stage 2, trained": 121_843_712,
    }
    assert {name: counts[name] for name in published_counts} == published_counts


def test_every_published_key_has_exactly_one_home() -> None:
    """At full size: 131 and 254 tensors, each name once, none of ours without a name of theirs."""
    config = minigpt5_7b()
    stage1 = published.stage1_shapes(config)
    stage2 = published.stage2_shapes(config, LlamaConfig(**sizes.LLAMA_7B))
    assert (len(stage1), len(stage2)) == (131, 254)
    assert stage1["t2i_decoder_prompt"] == (1, 77, 1024) and stage1["fc.0.weight"] == (1024, 4096)
    assert stage2["model.llama_model.base_model.model.lm_head.modules_to_save.default.weight"] == (32009, 4096)
    vision = published.vision_shapes(config)
    assert vision["visual_encoder.blocks.38.attn.qkv.weight"] == (4224, 1408)
    assert vision["Qformer.bert.encoder.layer.10.crossattention.self.key.weight"] == (768, 1408)
    assert vision["llama_proj.weight"] == (4096, 768) and "visual_encoder.blocks.39.norm1.weight" not in vision


def test_the_label_of_the_last_voken_is_a_published_quirk() -> None:
    config = tiny_config()
    rows = VokenEmbeddings(config.vocabulary, config.num_vokens, config.hidden)
    segments = [text_segment("A fox."), DRAW_TARGET, text_segment(" It ran.", is_target=True), DRAW_TARGET]
    vokens = {}
    for quirks in (False, True):
        tokens = encode(segments, tiny_tokenizer(config), rows, picture_tokens=(-1,), published_quirks=quirks)
        vokens[quirks] = [label - rows.first for label in tokens.labels if label >= rows.first]
        assert tokens.labels[0] == IGNORED
    assert vokens == {False: [0, 0], True: [0, 7, *range(8)]}


def test_the_masked_caption_is_a_published_quirk() -> None:
    cases = load_file(FOLDER / "stage1_cases.safetensors")
    told = json.loads((FOLDER / "stage1_cases.json").read_text())["cases"]
    for index, case in enumerate(told):
        features = {
            quirks: ClipTextEncoder(WORLD / "stable-diffusion", num_positions=77, published_quirks=quirks)(
                [case["caption"]]
            )
            for quirks in (False, True)
        }
        expected = cases[f"case{index}.caption_features"]
        assert torch.allclose(features[True], expected, atol=1e-4)
        difference_Q = (features[False] - expected).abs().amax(dim=(0, 2))
        assert difference_Q[:4].max() < 1e-4 < 0.1 < difference_Q[-4:].max()
