"""`python -m minigpt5.new`: tiny random bases of the real classes become a folder that writes, draws and learns."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3NextConfig,
    SiglipConfig,
    SiglipVisionModel,
    T5Config,
)

from examples.own_model.tiny_bases import NUM_PADDING_ROWS, make_bases, make_tokenizer
from minigpt5 import new
from minigpt5.codec import from_json
from minigpt5.combine import sketch
from minigpt5.config import ModelConfig
from minigpt5.engine.generator import VokenGenerator
from minigpt5.errors import InvalidRequest, ModelFolderError
from minigpt5.footprint import count_parts
from minigpt5.model import folder as model_folder
from minigpt5.model.base_sizes import count_heads, find_lora_targets, longest_context
from minigpt5.model.folder_config import check_folder, load_config, write_config
from minigpt5.model.quantised_linear import Bfloat16Linear
from minigpt5.pipeline import MiniGPT5
from minigpt5.types import DrawSettings, InputImage, Sampling, StoryRequest
from tests.helpers.recipe_configs import write_recipe

ROOT = Path(__file__).parent.parent.parent
CONTEXT = 512


def hash_files(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def made(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new folder, made without a change of its bases."""
    folder = tmp_path_factory.mktemp("made") / "mine"
    before = {name: hash_files(base) for name, base in bases.items()}
    new.make_folder(folder, **{name: str(base) for name, base in bases.items()}, context_tokens=CONTEXT)
    assert {name: hash_files(base) for name, base in bases.items()} == before
    return folder


def test_sizes_are_those_of_the_bases(made: Path, bases: dict[str, Path]) -> None:
    config = check_folder(made)
    assert (config.name, config.hidden, config.context_tokens) == ("mine", 32, CONTEXT)
    assert (config.condition_length, config.condition_width, config.image_px) == (77, 32, 32)
    assert (config.max_pixels, config.size_multiple) == (2 * 32 * 32, 4)
    assert (config.vision.num_features, config.vision.encoder_width, config.vision.image_px) == (16, 32, 32)
    assert config.lora.targets == ("q_proj", "v_proj")
    assert {base.id for base in config.bases} == {str(base) for base in bases.values()}
    assert not (made / "decoder").exists() and not (made / "vision" / "model.safetensors").exists()


def test_the_template_is_the_tokenizers_own_unless_another_is_named(
    made: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    own = VokenGenerator.from_pretrained(made)
    assert own.config.template == "chat" and own.template.stop == ()
    parts = {name: str(bases[name]) for name in ("language", "diffusion")}
    published = new.make_folder(tmp_path / "published", **parts, template="published").config
    assert published.template == load_config(tmp_path / "published").template == "published"
    plain = shutil.copytree(bases["language"], tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    assert new.make_folder(tmp_path / "unframed", **{**parts, "language": str(plain)}).config.template == "published"


@pytest.mark.parametrize(
    ("written", "error"),
    [("", "has no chat template"), ("{{ messages[-1].content }}", "cannot be split into turns")],
)
def test_a_chat_template_that_does_not_serve_is_one_line(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], written: str, error: str
) -> None:
    language = shutil.copytree(bases["language"], tmp_path / "language")
    (language / "chat_template.jinja").write_text(written)
    options = ["--language", str(language), "--diffusion", str(bases["diffusion"]), "--out", str(tmp_path / "out")]
    assert new.main([*options, "--template", "chat"]) == 1
    said = capsys.readouterr().err
    assert error in said and "--template published" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_padded_vocabulary_without_bos_keeps_its_logits(made: Path, bases: dict[str, Path]) -> None:
    config, tokenizer, language, _ = model_folder.load_generator_model(made)
    causal = AutoModelForCausalLM.from_pretrained(bases["language"])
    assert causal.get_input_embeddings().weight.shape[0] == config.vocabulary + NUM_PADDING_ROWS
    assert tokenizer.bos_token_id is None
    assert tokenizer.convert_tokens_to_ids("[IMG0]") == language.voken_embeddings.first == config.vocabulary
    ids_1S = torch.tensor([tokenizer.encode("A fox at sea.")])
    with torch.no_grad():
        logits_1ST = language.logits(language.states(language.embed(ids_1S)))
        expected_1ST = causal(ids_1S).logits
    assert logits_1ST.shape[-1] == config.vocabulary + config.num_vokens + 1
    torch.testing.assert_close(logits_1ST[..., : config.vocabulary], expected_1ST[..., : config.vocabulary])


def test_it_writes_reads_and_draws(made: Path) -> None:
    model = MiniGPT5.from_pretrained(made)
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "PNG")
    story = model.write("A fox", pages=2, seed=3, draw=DrawSettings(steps=2))
    assert [page.picture.width for page in story.pages if page.picture] == [32, 32]
    assert model.describe(file.getvalue()) is not None


def test_the_language_model_writes_in_bfloat16(made: Path) -> None:
    generator = VokenGenerator.from_pretrained(made, precision="bfloat16")
    multiplied = [part for part in generator.language.body.modules() if isinstance(part, Bfloat16Linear)]
    assert multiplied and all(part.weight.dtype == torch.bfloat16 for part in multiplied)
    rotary = [value for name, value in generator.language.named_buffers() if name.endswith("inv_freq")]
    assert rotary and all(value.dtype == torch.float32 for value in rotary), "angles of far positions need it"

    async def write() -> list[object]:
        request = StoryRequest(prompt=("A fox",), pages=1, seed=3, sampling=Sampling(max_page_tokens=8))
        return [event async for event in generator.generate(request)]

    vokens = [event for event in asyncio.run(write()) if type(event).__name__ == "Vokens"]
    assert len(vokens) == 1 and vokens[0].hidden_VH.dtype.name == "float32"  # type: ignore[attr-defined]


def test_a_model_without_vision_says_that_it_reads_no_pictures(bases: dict[str, Path], tmp_path: Path) -> None:
    new.make_folder(tmp_path / "blind", language=str(bases["language"]), diffusion=str(bases["diffusion"]))
    generator = VokenGenerator.from_pretrained(tmp_path / "blind")
    request = StoryRequest(prompt=(InputImage(data=b"\x89PNG"), "What is this?"), pages=1, seed=1)
    back = StoryRequest(prompt=("A fox",), pages=2, seed=1, feedback="pictures")
    for asked in (request, back):
        with pytest.raises(InvalidRequest, match="reads no pictures"):
            generator.validate_request(asked)


def test_another_base_than_it_was_made_with_is_refused(made: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["language"], tmp_path / "other")
    torch.manual_seed(1)
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    causal.get_input_embeddings().weight.data.normal_()
    causal.save_pretrained(tmp_path / "other")
    config = json.loads((made / "config.json").read_text())
    for base in config["bases"]:
        if base["id"] == config["language_model"]:
            base["id"] = str(tmp_path / "other")
    config["language_model"] = str(tmp_path / "other")
    shutil.copytree(made, tmp_path / "folder")
    bound = from_json(ModelConfig, config)
    write_config(tmp_path / "folder", bound)
    with pytest.raises(ModelFolderError, match="but .* was made with"):
        model_folder.load_generator_model(tmp_path / "folder")
    config["bases"] = [base for base in config["bases"] if base["id"] != config["language_model"]]
    write_config(tmp_path / "folder", from_json(ModelConfig, config))
    with pytest.raises(ModelFolderError, match="is not among the bases"):
        model_folder.load_generator_model(tmp_path / "folder")


def test_a_folder_whose_bases_moved_is_the_same_model(made: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["language"], tmp_path / "moved")
    shutil.copytree(made, tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    path.write_text(path.read_text().replace(str(bases["language"]), str(tmp_path / "moved")))
    assert model_folder.load_generator_model(tmp_path / "folder")[0].language_model == str(tmp_path / "moved")


def test_a_base_without_safetensors_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["language"], tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match="no safetensors weights"):
        new.make_folder(tmp_path / "out", language=str(tmp_path / "pickled"), diffusion=str(bases["diffusion"]))


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (Phi3Config, ("qkv_proj",)),
        (LlamaConfig, ("q_proj", "v_proj")),
        (GPTNeoXConfig, ("query_key_value",)),
        (DeepseekV3Config, ("q_b_proj", "kv_b_proj")),
    ],
)
def test_lora_finds_the_attention_of_every_family(
    config: type[PretrainedConfig], targets: tuple[str, ...], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config(vocab_size=99, pad_token_id=0, **sizes).save_pretrained(tmp_path)
    assert find_lora_targets(tmp_path) == targets


@pytest.mark.parametrize(("width", "heads"), [(32, 1), (256, 4), (400, 5), (768, 8), (1000, 8), (1024, 8)])
def test_the_heads_of_a_mapper_divide_its_width(width: int, heads: int) -> None:
    assert count_heads(width) == heads
    torch.nn.MultiheadAttention(width, heads)


def test_a_window_does_not_limit_the_context_and_longropes_original_length_does() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 4096, "pad_token_id": 0}
    longrope = Phi3Config(**sizes, rope_parameters=rope, original_max_position_embeddings=1024)
    assert longest_context(longrope) == 1024
    assert longest_context(MistralConfig(**sizes, sliding_window=24)) == 4096
    assert longest_context(Gemma3TextConfig(**sizes, sliding_window=24)) == 4096
    assert longest_context(GPT2Config()) == 1024


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_does_not_fit_is_one_line(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: shutil.copytree(base, tmp_path / name) for name, base in bases.items()}
    T5Config().save_pretrained(tmp_path / "t5")
    make_tokenizer(tmp_path / "linear")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    experts = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    AutoModelForCausalLM.from_config(Qwen3NextConfig(vocab_size=259, **sizes, **experts)).save_pretrained(
        tmp_path / "linear"
    )
    (tmp_path / "empty").mkdir()
    shutil.copytree(places["diffusion"], tmp_path / "xl")
    change_json(tmp_path / "xl" / "unet" / "config.json", addition_embed_type="text_time")
    shutil.copytree(places["diffusion"], tmp_path / "narrow")
    change_json(tmp_path / "narrow" / "text_encoder" / "config.json", hidden_size=64)
    shutil.copytree(places["language"], tmp_path / "vl")
    change_json(tmp_path / "vl" / "config.json", model_type="paligemma", vision_config={})
    shutil.copytree(places["language"], tmp_path / "quantised")
    change_json(tmp_path / "quantised" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    shutil.copytree(places["language"], tmp_path / "wordless")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "wordless" / name).unlink()
    shutil.copytree(places["language"], tmp_path / "widened")
    widened = AutoTokenizer.from_pretrained(tmp_path / "widened")
    widened.add_tokens([f"<more-{number}>" for number in range(NUM_PADDING_ROWS + 1)])
    widened.save_pretrained(tmp_path / "widened")
    shutil.copytree(places["language"], tmp_path / "foreign")
    change_json(tmp_path / "foreign" / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.MineConfig"})
    for part, folder in (("unet", "diffusion"), ("text_encoder", "diffusion"), ("", "vision")):
        place = shutil.copytree(places[folder], tmp_path / f"lacking-{part or folder}") / part
        (file,) = place.glob("*.safetensors")
        weights = load_file(file)
        gone = next(name for name in sorted(weights) if name.endswith(("to_k.weight", "k_proj.weight")))
        save_file({name: value for name, value in weights.items() if name != gone}, file, {"format": "pt"})
    capsys.readouterr()
    for option, place, words in (
        ("language", "empty", "a base model cannot be read"),
        ("language", "linear", "is a qwen3_next, which the KV store cannot serve (some of its layers keep a state"),
        ("language", "t5", "is an encoder-decoder (t5): name a causal language model"),
        ("vision", "own", "has no vision tower of its own: name one with --vision, or none"),
        ("diffusion", "empty", "has no unet/: name a model in the layout of diffusers"),
        ("diffusion", "xl", "is no Stable Diffusion 1.x or 2.x (its UNet has text_time)"),
        ("diffusion", "narrow", "has width 64 but its UNet reads 32"),
        ("language", "quantised", "are quantised (gptq): name the model that is not"),
        ("language", "wordless", "has no tokenizer (the one that was made of its files has"),
        ("language", "widened", "name a model whose embedding was resized"),
        ("language", "foreign", "needs code of its own, which is never run"),
        ("diffusion", "lacking-unet", "lacks the weights"),
        ("diffusion", "lacking-text_encoder", "lacks the weights"),
        ("vision", "lacking-vision", "lacks the weights"),
    ):
        value = place if place == "own" else str(tmp_path / place)
        arguments = {**{name: str(base) for name, base in places.items()}, option: value}
        words_of = [word for name, value in arguments.items() for word in (f"--{name}", value)]
        assert new.main([*words_of, "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err.rpartition("\r")[2].rpartition("it/s]\n")[2]  # after transformers' bars
        assert words in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.*"))
    own = ["--language", str(tmp_path / "vl"), "--diffusion", str(places["diffusion"])]
    assert new.main([*own, "--out", str(tmp_path / "out")]) == 1
    assert "is a vision-language model of type paligemma, whose way to read" in capsys.readouterr().err
    same = [word for name, value in places.items() for word in (f"--{name}", str(value))]
    assert new.main([*same, "--out", str(tmp_path / "empty")]) == 1
    assert "exists: name a new folder with --out" in capsys.readouterr().err
    for context in (4096, 1, 0, -5):
        assert new.main([*same, "--out", str(tmp_path / "out"), "--context", str(context)]) == 1
        assert f"context is {context} but" in capsys.readouterr().err
    assert new.main([*same, "--out", str(tmp_path / "out"), "--image-px", "448"]) == 1
    assert "only own takes a size" in capsys.readouterr().err
    for positions in (0, 78):
        assert new.main([*same, "--out", str(tmp_path / "out"), "--condition", str(positions)]) == 1
        assert f"a condition of {positions} positions was named, but" in capsys.readouterr().err


def test_the_command_prints_sizes_and_memory(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for name, base in bases.items() for word in (f"--{name}", str(base))]
    assert new.main([*options, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for words in ("language model", "trained by stage", "align", "learn", "KV store", "DiffusionDecoder"):
        assert words in said


def keep_configs(base: Path, place: Path) -> Path:
    """A copy of a base as it is before its weights are downloaded."""
    configs = ("config.json", "preprocessor_config.json", "scheduler_config.json")
    for path in base.rglob("*.json"):
        if path.name in configs:
            target = place / path.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return place


def options_of(places: dict[str, Path]) -> list[str]:
    return [word for name, place in places.items() for word in (f"--{name}", str(place))]


@pytest.mark.parametrize("names", [("language", "diffusion", "vision"), ("language", "diffusion")])
def test_a_dry_run_prints_what_the_bases_give(
    names: tuple[str, ...], bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = {name: keep_configs(bases[name], tmp_path / name) for name in names}
    before = hash_files(tmp_path)
    assert new.main([*options_of(configs), "--context", "512", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert hash_files(tmp_path) == before, "it writes nothing"
    assert (
        new.main([*options_of({name: bases[name] for name in names}), "--context", "512", "--out", f"{tmp_path}/o"])
        == 0
    )
    assert capsys.readouterr().out.startswith(said)


def test_a_dry_run_counts_the_vision_half_of_a_whole_siglip(tmp_path: Path, bases: dict[str, Path]) -> None:
    tower = SiglipVisionModel.from_pretrained(bases["vision"])
    SiglipConfig(vision_config=tower.config.to_dict()).save_pretrained(tmp_path / "siglip")
    shutil.copy(bases["vision"] / "preprocessor_config.json", tmp_path / "siglip")
    places = {name: str(bases[name]) for name in ("language", "diffusion")}
    parts = sketch(**places, vision=str(tmp_path / "siglip"))
    assert count_parts(parts)["vision encoder"] == sum(one.numel() for one in tower.parameters())
    assert {one.device.type for one in parts.language.parameters()} == {"meta"}


def test_a_dry_run_of_what_does_not_fit_is_one_line(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    T5Config().save_pretrained(tmp_path / "t5")
    assert new.main([*options_of({**bases, "language": tmp_path / "t5"}), "--dry-run"]) == 1
    error = capsys.readouterr().err
    assert "is an encoder-decoder" in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        new.main([*options_of(bases), "--dry-run", "--out", str(tmp_path / "out")])
    assert "not allowed with" in capsys.readouterr().err


def test_the_figures_of_the_recipe_are_those_of_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/own-models.md shows what its bases print, from their public sizes."""
    assert new.main([*options_of(write_recipe(tmp_path)), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"```text\n{said}```" in (ROOT / "docs" / "own-models.md").read_text(), said
    assert "language model       4,022,468,096" in said, "Qwen3-4B is published with 4.0 B parameters"
