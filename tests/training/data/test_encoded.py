"""Encoded rows train the encoders' own model alone: another VAE or vision encoder of equal shapes is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import ray
import torch
from diffusers import AutoencoderKL
from pyarrow import parquet
from transformers import SiglipVisionModel

from batch_jobs import precompute
from batch_jobs.prepare import Part, to_parquet, write_part
from examples.own_model.tiny_bases import make_bases
from minigpt5 import new
from minigpt5.errors import InvalidRequest, TrainingError
from minigpt5.model import folder as model_folder
from minigpt5.model.folder_config import load_config, write_config
from minigpt5.objective.encoders import ALL_FIELDS, find_encoders
from minigpt5.objective.stored_example import ROW_SCHEMA
from training.presets import PUBLISHED
from training.train import find_examples, main
from training.weight_sources import WeightSources


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny bases, and under "other-..." siblings of equal shapes with other weights."""
    folder = tmp_path_factory.mktemp("bases")
    found = make_bases(folder)
    for name in ("diffusion", "vision"):
        found[f"other-{name}"] = shutil.copytree(found[name], folder / f"other-{name}")
    for model_class, place in (
        (AutoencoderKL, found["other-diffusion"] / "vae"),
        (SiglipVisionModel, found["other-vision"]),
    ):
        model = model_class.from_pretrained(place)
        next(model.parameters()).data.add_(1)
        model.save_pretrained(place)
    return found


@pytest.fixture(scope="module")
def models(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders of these bases: all share the language model."""
    folder = tmp_path_factory.mktemp("models")
    for name, diffusion, vision in (
        ("own", "diffusion", "vision"),
        ("other-vae", "other-diffusion", "vision"),
        ("other-vision", "diffusion", "other-vision"),
        ("blind", "diffusion", "none"),
    ):
        new.make_folder(
            folder / name,
            language=str(bases["language"]),
            diffusion=str(bases[diffusion]),
            vision=str(bases.get(vision, vision)),
            context_tokens=512,
        )
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plain")
    write_part(Part(number=0, file="", start=0, count=6), layout="storybook:story", uri="", output=str(folder), seed=3)
    return str(folder)


def encode(
    plain: str, output: Path, model: Path, *, keeps_pictures: bool = False, fields: tuple[str, ...] = ALL_FIELDS
) -> Path:
    """What `python -m batch_jobs.precompute` does, in this process."""
    how = {"model": str(model), "keeps_pictures": keeps_pictures, "fields": fields}
    precompute.begin(plain, str(output), **how)
    actor = precompute.Encode(source=plain, output=str(output), num_threads=1, **how)
    for path in sorted((Path(plain) / "rows").iterdir()):
        actor({"file": str(path)})
    return output


@pytest.fixture(scope="module")
def encoded(plain: str, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(plain, tmp_path_factory.mktemp("encoded") / "rows", models["own"])


def start(stage: str, rows: Path, model: Path, *, decoder: Path | None = None) -> None:
    """What training does before it starts workers."""
    preset = dataclasses.replace(PUBLISHED[stage], validation_batches=0)
    find_examples(preset, WeightSources(runs=model.parent / "no-runs", start=model, decoder=decoder), str(rows))


def test_every_stage_takes_the_rows_of_its_own_encoders(
    encoded: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = shutil.copytree(models["own"], tmp_path / "trained")
    config = load_config(trained)
    vision = model_folder.load_vision(trained, config)
    torch.nn.init.normal_(vision.qformer.queries)
    model_folder.save_module(vision.qformer, trained / model_folder.QFORMER)
    write_config(trained, config)
    for stage in ("vision", "align", "learn"):
        start(stage, encoded, trained)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "stages", "words"),
    [
        ("other-vae", {"align", "learn"}, "encoded by another VAE"),
        ("other-vision", {"vision", "learn"}, "encoded by another vision encoder"),
    ],
)
def test_rows_of_another_encoder_are_refused_where_they_are_read(
    model: str, stages: set[str], words: str, encoded: Path, models: dict[str, Path]
) -> None:
    for stage in {"vision", "align", "learn"} - stages:
        start(stage, encoded, models[model])
    for stage in stages:
        with pytest.raises(TrainingError, match=f"{words}.*precompute --model {models[model]}") as caught:
            start(stage, encoded, models[model])
        assert str(encoded) in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_ends_before_any_worker_starts(
    encoded: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["align", "--data", str(encoded), "--start", str(models["other-vae"]), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "another VAE" in error and error.count("\n") == 1
    assert not ray.is_initialized() and not list(out.iterdir())


def test_a_decoder_that_replaces_the_vae_needs_rows_with_pictures(
    encoded: Path, plain: str, models: dict[str, Path], bases: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=f"another VAE.*before precompute.*{bases['other-diffusion']}"):
        start("align", encoded, models["own"], decoder=bases["other-diffusion"])
    start("align", Path(plain), models["own"], decoder=bases["other-diffusion"])
    start("align", encoded, models["own"], decoder=shutil.copytree(bases["diffusion"], tmp_path / "same"))


def test_rows_encoded_without_vision_train_no_stage_that_reads_pictures(
    plain: str, models: dict[str, Path], tmp_path: Path
) -> None:
    rows = encode(plain, tmp_path / "rows", models["blind"])
    start("align", rows, models["own"])
    start("learn", rows, models["blind"])
    for stage in ("vision", "learn"):
        with pytest.raises(TrainingError, match="neither pictures nor what a vision encoder makes of them"):
            start(stage, rows, models["own"])
    kept = encode(plain, tmp_path / "kept", models["blind"], keeps_pictures=True)
    for stage in ("vision", "learn"):
        start(stage, kept, models["own"])


@pytest.mark.parametrize("num_left", [1, 0])
def test_first_rows_without_pictures_are_passed_over(
    num_left: int, encoded: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    rows = shutil.copytree(encoded, tmp_path / "rows")
    (path,) = (rows / "rows").iterdir()
    stored = parquet.read_table(path).to_pylist()
    for row in stored[: len(stored) - num_left]:
        row["segments"] = [one for one in row["segments"] if one["text"] is not None]
    path.write_bytes(to_parquet(stored, ROW_SCHEMA))
    start("learn", rows, models["own"])
    if num_left:
        start("align", rows, models["own"])
        with pytest.raises(TrainingError, match="encoded by another VAE"):
            start("align", rows, models["other-vae"])
    else:
        with pytest.raises(TrainingError, match="have no pictures, which stage align learns from: prepare rows"):
            start("align", rows, models["own"])


def test_pictures_of_another_size_are_refused(encoded: Path, models: dict[str, Path], tmp_path: Path) -> None:
    changed = shutil.copytree(models["own"], tmp_path / "changed")
    values = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(values | {"image_px": 64}))
    with pytest.raises(TrainingError, match="at 32 px.*at 64 px"):
        start("align", encoded, changed)


def test_rows_that_name_no_encoders_are_taken_with_a_warning(
    encoded: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = shutil.copytree(encoded, tmp_path / "earlier")
    plan = json.loads((earlier / "plan.json").read_text())
    del plan["encoders"]
    (earlier / "manifest.json").write_text(json.dumps(plan | {"files": 1, "pictures": 6}))
    start("align", earlier, models["other-vae"])
    said = capsys.readouterr().out
    assert "do not say which VAE encoded them" in said and said.count("\n") == 1
    (earlier / "manifest.json").write_text("{")
    with pytest.raises(TrainingError, match="manifest.json is damaged"):
        start("align", earlier, models["own"])


def test_rows_for_one_stage_hold_what_it_reads_and_no_other_stage_takes_them(
    plain: str, models: dict[str, Path], tmp_path: Path
) -> None:
    rows = encode(plain, tmp_path / "rows", models["own"], fields=("moments",))
    stored = [row for path in sorted((rows / "rows").iterdir()) for row in parquet.read_table(path).to_pylist()]
    pictures = [one for row in stored for one in row["segments"] if one["text"] is None]
    assert pictures and all(one["moments"] and not one["features"] and not one["picture"] for one in pictures)
    start("align", rows, models["own"])
    for stage in ("vision", "learn"):
        with pytest.raises(TrainingError, match="neither pictures nor what a vision encoder makes of them"):
            start(stage, rows, models["own"])
    with pytest.raises(InvalidRequest, match="or for other stages"):
        precompute.begin(plain, str(rows), model=str(models["own"]), keeps_pictures=False)


def test_a_job_goes_on_with_its_own_encoders_alone(
    encoded: Path, plain: str, models: dict[str, Path], tmp_path: Path
) -> None:
    rows = shutil.copytree(encoded, tmp_path / "rows")
    again = {"model": str(models["own"]), "keeps_pictures": False}
    plan = precompute.begin(plain, str(rows), **again)
    assert plan["encoders"]["vae"]["image_px"] == 32
    for model in ("other-vae", "other-vision", "blind"):
        with pytest.raises(InvalidRequest, match="begun from another source or model, or for other stages"):
            precompute.begin(plain, str(rows), model=str(models[model]), keeps_pictures=False)
    earlier = {key: value for key, value in plan.items() if key != "encoders"}
    (rows / "plan.json").write_text(json.dumps(earlier))
    assert precompute.begin(plain, str(rows), **again) == plan == json.loads((rows / "plan.json").read_text())
    (rows / "plan.json").unlink()
    with pytest.raises(InvalidRequest, match="has rows and no plan.json"):
        precompute.begin(plain, str(rows), **again)


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / "rows").iterdir())


def test_pictures_of_another_model_are_not_passed_on_as_this_models(
    encoded: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    """The source holds no pictures, and each model would name its own encoders for them."""
    for model, field in (("other-vae", "moments"), ("other-vision", "features")):
        with pytest.raises(InvalidRequest, match=f"holds no pictures.*others that made its {field}.*before precompute"):
            encode(str(encoded), tmp_path / model, models[model])
        assert not (tmp_path / model).exists()
    earlier = shutil.copytree(encoded, tmp_path / "earlier")
    plan = json.loads((earlier / "plan.json").read_text())
    del plan["encoders"]
    (earlier / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InvalidRequest, match="does not say which encoders made its moments"):
        encode(str(earlier), tmp_path / "out", models["own"])


def test_pictures_that_the_same_model_has_encoded_are_taken_as_they_are(
    encoded: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    again = encode(str(encoded), tmp_path / "again", models["own"])
    assert parquet.read_table(files_of(again)[0]).equals(parquet.read_table(files_of(encoded)[0]))
    start("learn", again, models["own"])
    drawn = encode(str(encoded), tmp_path / "drawn", models["own"], fields=("moments",))
    stored = parquet.read_table(files_of(drawn)[0]).to_pylist()
    pictures = [one for row in stored for one in row["segments"] if one["text"] is None]
    assert pictures and all(one["moments"] and not one["features"] for one in pictures)


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [("other-vae", ALL_FIELDS, "others that made its moments"), ("own", ("moments",), "neither pictures nor moments")],
)
def test_each_picture_that_is_not_there_is_looked_at(
    model: str, fields: tuple[str, ...], words: str, encoded: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    """A plan may say that pictures are kept where only some are."""
    source = shutil.copytree(encoded, tmp_path / "source")
    plan = json.loads((source / "plan.json").read_text())
    (source / "plan.json").write_text(json.dumps({**plan, "keeps_pictures": True}))
    (path,) = files_of(source)
    if model == "own":
        stored = parquet.read_table(path).to_pylist()
        for row in stored:
            for one in row["segments"]:
                one["moments"] = None
        path.write_bytes(to_parquet(stored, ROW_SCHEMA))
    how = {"model": str(models[model]), "keeps_pictures": False, "fields": fields}
    precompute.begin(str(source), str(tmp_path / "out"), **how)
    actor = precompute.Encode(source=str(source), output=str(tmp_path / "out"), num_threads=1, **how)
    assert words in actor({"file": str(path)})["problem"]
    assert not (tmp_path / "out" / "rows").exists()


def test_what_another_model_made_of_a_kept_picture_is_replaced_or_left_out(
    plain: str, models: dict[str, Path], tmp_path: Path
) -> None:
    kept = encode(plain, tmp_path / "kept", models["own"], keeps_pictures=True)
    other = encode(str(kept), tmp_path / "other", models["other-vae"], fields=("moments",), keeps_pictures=True)
    start("align", other, models["other-vae"])
    start("learn", other, models["other-vae"])  # it makes the features itself
    with pytest.raises(TrainingError, match="encoded by another VAE"):
        start("align", other, models["own"])


def test_a_second_run_counts_the_pictures_of_files_that_are_there(
    plain: str, models: dict[str, Path], tmp_path: Path
) -> None:
    how = {"model": str(models["blind"]), "keeps_pictures": True}
    output = tmp_path / "counted"
    precompute.begin(plain, str(output), **how)
    actor = precompute.Encode(source=plain, output=str(output), num_threads=1, **how)
    file = {"file": str(files_of(Path(plain))[0])}
    first, second = actor(file), actor(file)
    assert first["pictures"] == second["pictures"] > 0
    assert (first["files"], second["files"]) == (1, 0)


def test_encoders_are_told_by_their_weights_wherever_they_lie(
    models: dict[str, Path], bases: dict[str, Path], tmp_path: Path
) -> None:
    moved = shutil.copytree(models["own"], tmp_path / "moved")
    path = moved / "config.json"
    for name in ("diffusion", "vision"):
        place = shutil.copytree(bases[name], tmp_path / f"{name}-elsewhere")
        path.write_text(path.read_text().replace(f'"{bases[name]}"', f'"{place}"'))
    here, there = (find_encoders(folder, load_config(folder)) for folder in (models["own"], moved))
    assert here == there
