"""Stage "distill" on every Stable Diffusion: its targets against diffusers, and a run on own rows."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from batch_jobs import precompute
from batch_jobs.prepare import Part, write_part
from examples.own_model.tiny_bases import make_qwen3
from minigpt5 import MiniGPT5, new
from minigpt5.engine.denoising import Denoising, advance
from minigpt5.errors import TrainingError
from minigpt5.model.decoders.load import find_family, load_diffusion
from minigpt5.model.decoders.multistep_scheduler import NUM_LEVELS
from minigpt5.model.folder import DISTILLED_DRAW, find_addition, load_decoder_model
from minigpt5.model.folder_config import DECODER, check_folder, load_config
from minigpt5.objective.example import Example
from minigpt5.objective.replay_buffer import ReplayBuffer, TensorBatch
from minigpt5.types import DISTILLED, DISTILLED_FOLDER, DrawSettings
from training import presets
from training.data.batches import Batch
from training.data.replay import remember
from training.presets import DistillPreset, ReplayConfig
from training.stages.distill import DistillObjective
from training.stages.model import find_decoder
from training.train import main
from training.weight_sources import WeightSources

MODELS = {
    "noise": ("stable_diffusion", {}),
    "velocity": ("stable_diffusion", {"prediction_type": "v_prediction"}),
    "xl": ("stable_diffusion_xl", {}),
}
GUIDANCE = 3.0
TEACHER_STEPS = 5
STEPS = ["--workers", "0", "batch_size=2", "num_threads=1", "warmup_steps=1", "validation_batches=1", "log_every=1"]


def make(name: str, folder: Path) -> Path:
    family, options = MODELS.get(name, (name, {}))
    maker: Any = importlib.import_module(f"tests.helpers.pipelines.{family}")
    if name not in MODELS:
        options = next(iter(maker.VARIANTS.values()))
    maker.make(folder, **options)
    return folder


def new_objective(folder: Path, **options: Any) -> DistillObjective:
    preset = presets.load_presets("published")["distill"]
    assert isinstance(preset, DistillPreset)
    preset = dataclasses.replace(preset, teacher_steps=TEACHER_STEPS, **options)
    diffusion, student = load_diffusion(folder), load_diffusion(folder).denoiser
    diffusion.distilled = student
    length = find_family(folder).read_sizes(folder).condition_length
    text_encoder = find_family(folder).load_text_encoder(folder, num_positions=length)
    return DistillObjective(diffusion, text_encoder, preset, guidance_scale=GUIDANCE, guidance_rescale=0.0)


def batch(size: int = 3) -> Batch[Example]:
    rng = np.random.default_rng(0)
    examples = [
        Example(
            segments=[], read=[], drawn=[rng.integers(0, 256, (32, 32, 3), np.uint8)], captions=[f"a field {number}"]
        )
        for number in range(size)
    ]
    return Batch(examples=examples, ids=list(range(size)))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_target_leads_where_diffusers_guided_ddim_steps_lead(name: str, tmp_path: Path) -> None:
    """From both levels: one DDIM step of the target ends where `teacher_steps` guided steps of diffusers' end."""
    objective = new_objective(make(name, tmp_path))
    diffusion = objective.diffusion
    trailing = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    teacher, student = (DDIMScheduler.from_config(diffusion.noise_schedule.config, **trailing) for _ in range(2))
    teacher.set_timesteps(NUM_LEVELS * TEACHER_STEPS)
    student.set_timesteps(NUM_LEVELS)
    condition_BQD = torch.cat([objective.text_encoder(["a red field"]), objective.text_encoder([""])])
    latents_BCYX = torch.randn(1, 4, 8, 8)
    for level in range(NUM_LEVELS):
        begin_BCYX = latents_BCYX
        for timestep in teacher.timesteps[level * TEACHER_STEPS : (level + 1) * TEACHER_STEPS]:
            both = diffusion.predict(
                diffusion.denoiser, torch.cat([latents_BCYX] * 2), timestep.expand(2), condition_BQD
            )
            conditional, unconditional = both.chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            latents_BCYX = teacher.step(guided, timestep, latents_BCYX).prev_sample
        index_B = torch.tensor([level * TEACHER_STEPS])
        end_BCYX = objective.run_teacher(begin_BCYX, condition_BQD[:1], index_B)
        scale = latents_BCYX.abs().max()
        assert (end_BCYX - latents_BCYX).abs().max() <= 1e-4 * scale
        target_BCYX = objective.target(begin_BCYX, end_BCYX, index_B)
        assert diffusion.noise_schedule.alphas_cumprod[999] > 0, "as Stable Diffusion's own, not the picture world's"
        stepped_BCYX = student.step(target_BCYX, student.timesteps[level], begin_BCYX).prev_sample
        assert (stepped_BCYX - latents_BCYX).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_student_that_meets_its_targets_draws_what_its_teacher_draws(name: str, tmp_path: Path) -> None:
    """The sampler that serves: it begins at the last timestep and ends at clean latents, then adds noise again."""
    objective = new_objective(make(name, tmp_path))
    diffusion = objective.diffusion
    condition_QD, null_1QD = objective.text_encoder(["a red field"])[0], objective.text_encoder([""])
    picture = Denoising(diffusion, condition_QD, seed=1, draw=DISTILLED_DRAW, guidance_rescale=0.0)
    assert picture.sampler.timesteps.tolist() == [999, 499, 499, 499]
    expected = picture.latents_1CYX
    for level in range(NUM_LEVELS):
        index_B = torch.tensor([level * TEACHER_STEPS])
        expected = objective.run_teacher(expected, condition_QD[None], index_B)
        picture.take(objective.target(picture.latents_1CYX, expected, index_B), None)
        assert (picture.pred_x0_1CYX if level else picture.latents_1CYX).allclose(expected, atol=1e-3)
    alpha_bar = diffusion.noise_schedule.alphas_cumprod[499]
    noise = (picture.latents_1CYX - alpha_bar.sqrt() * expected) / (1 - alpha_bar).sqrt()
    assert abs(noise.mean().item()) < 0.3 and abs(noise.std().item() - 1) < 0.2, "clean latents under new noise"
    while picture.num_calls_left:
        advance(diffusion, [picture], null_1QD)
    assert picture.latents_1CYX.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_velocitys_and_training_lowers_it(name: str, tmp_path: Path) -> None:
    objective = new_objective(make(name, tmp_path))
    torch.manual_seed(0)
    taught = objective._ask_teacher(batch())
    begin, timesteps = taught.begin_BCYX, taught.timesteps_B
    with torch.no_grad():
        predicted = objective.diffusion.predict(objective.student, begin, timesteps, taught.condition_BQD)
        velocities = []
        for prediction in (predicted, taught.target_BCYX):
            alpha_bar = objective.noise.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            clean = objective.noise.predict_x0(begin, prediction, timesteps)
            velocities.append((alpha_bar.sqrt() * begin - clean) / (1 - alpha_bar).sqrt())
    torch.manual_seed(0)
    loss = objective(batch(), 0.0)["loss"].item()
    assert loss == pytest.approx((velocities[0] - velocities[1]).square().mean().item(), rel=1e-3)

    optimizer = torch.optim.AdamW(objective.student.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        torch.manual_seed(0)
        found = objective(batch(), 0.0)["loss"]
        found.backward()
        losses.append(found.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0], losses
    assert all(parameter.grad is None for parameter in objective.diffusion.denoiser.parameters())


def test_xl_is_guided_away_from_zeros_as_its_pipeline_is(tmp_path: Path) -> None:
    objective = new_objective(make("xl", tmp_path))
    assert json.loads((tmp_path / "model_index.json").read_text())["force_zeros_for_empty_prompt"]
    assert not objective.text_encoder([""]).any() and objective.text_encoder(["a field"]).any()


def test_an_unguided_teacher_is_called_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = new_objective(make("noise", tmp_path))
    objective.guidance_scale = 1.0
    sizes: list[int] = []
    objective.diffusion.denoiser.register_forward_pre_hook(lambda unet, inputs: sizes.append(len(inputs[0])))
    objective._ask_teacher(batch())
    assert sizes == [3] * TEACHER_STEPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remembered(TensorBatch):
    values_BN: torch.Tensor
    others_BN: torch.Tensor


def test_the_replay_buffer_is_bounded_in_bytes() -> None:
    buffer: ReplayBuffer[Remembered] = ReplayBuffer(max_bytes=10_000)
    for number in range(5):
        buffer.extend(Remembered(values_BN=torch.full((2, 500), float(number)), others_BN=torch.zeros(2, 100)))
    assert len(buffer) == 10_000 // 2_400
    assert {sample.values_BN[0, 0].item() for sample in buffer.sample(50)} == {3.0, 4.0}, "the newest"
    newest = Remembered(values_BN=torch.full((1, 500), 9.0), others_BN=torch.zeros(1, 100))
    remember(buffer, newest, ReplayConfig(steps=1, min_size=4))
    assert {sample.values_BN[0, 0].item() for sample in buffer.sample(50)} == {3.0, 4.0, 9.0}
    with pytest.raises(TrainingError, match="min_size is 5 but 4 samples of this model fit"):
        remember(buffer, newest, ReplayConfig(steps=1, min_size=5))
    empty: ReplayBuffer[Remembered] = ReplayBuffer(max_bytes=10_000)
    remember(empty, newest, ReplayConfig(steps=0))
    assert not len(empty), "nothing is replayed"


def make_folder(name: str, folder: Path) -> Path:
    make_qwen3(folder / "qwen3")
    bases = ["--language", str(folder / "qwen3"), "--diffusion", str(make(name, folder / "base"))]
    assert new.main([*bases, "--context", "1024", "--out", str(folder / "made")], show=lambda text: None) == 0
    return folder / "made"


def make_rows(folder: Path, *, model: Path, is_encoded: bool) -> Path:
    part = Part(number=0, file="", start=0, count=120)
    write_part(part, layout="storybook:caption", uri="", output=str(folder / "rows"), seed=3)
    if not is_encoded:
        return folder / "rows"
    encode = precompute.Encode(
        model=str(model),
        source=str(folder / "rows"),
        output=str(folder / "encoded"),
        keeps_pictures=False,
        num_threads=1,
    )
    for rows in (folder / "rows" / "rows").iterdir():
        encode({"file": str(rows)})
    return folder / "encoded"


@pytest.mark.parametrize(("name", "is_encoded"), [("noise", False), ("velocity", True), ("xl", True)])
def test_a_folder_is_distilled_on_own_rows_and_draws(name: str, is_encoded: bool, tmp_path: Path) -> None:
    made = make_folder(name, tmp_path)
    rows = make_rows(tmp_path, model=made, is_encoded=is_encoded)
    run = ["distill", "--data", str(rows), "--start", str(made), "--out", str(tmp_path / "run"), *STEPS]
    run += ["steps=10", "teacher_steps=2", "replay.min_size=2", "learning_rate=1e-3"]
    assert main(run) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert any("validation_loss" in line for line in lines) and (tmp_path / "run" / "sheet.png").is_file()

    model = tmp_path / "run" / "model"
    before, config = load_config(made), check_folder(model)
    assert config == dataclasses.replace(
        before,
        draw_distilled=DISTILLED_DRAW,
        schedulers=(*before.schedulers, DISTILLED),
        fingerprint=config.fingerprint,
    )
    assert config.fingerprint != before.fingerprint and config.diffusion == before.diffusion
    assert [path.name for path in (model / DECODER).iterdir()] == [DISTILLED_FOLDER], "no copy of VAE and UNet"
    for part in ("mapper.safetensors", "vokens.safetensors"):
        assert (model / part).read_bytes() == (made / part).read_bytes()
    weights = load_file(model / DECODER / DISTILLED_FOLDER / "diffusion_pytorch_model.safetensors")
    denoiser = load_diffusion(tmp_path / "base").denoiser.state_dict()
    assert any(not value.float().allclose(denoiser[name], atol=1e-3) for name, value in weights.items()), "it moved"

    served = MiniGPT5.from_pretrained(model)
    vokens = served.vokens("A red field")
    pictures = [served.draw(vokens, seed=1, settings=draw) for draw in (DISTILLED_DRAW, DrawSettings(steps=2))]
    assert pictures[0].png != pictures[1].png

    sources = WeightSources(runs=tmp_path, start=model)
    found = find_decoder(model, config, sources)
    assert not found.is_own and found.parts[DISTILLED_FOLDER] == model / DECODER
    again = ["align", "--data", str(rows), "--start", str(model), "--out", str(tmp_path / "align"), *STEPS, "steps=1"]
    assert main([*again, "draws_samples=false"]) == 0
    aligned = tmp_path / "align" / "model"
    assert load_config(aligned).draw_distilled == DISTILLED_DRAW
    assert find_addition(DISTILLED_FOLDER, tmp_path / "base", aligned) == aligned / DECODER, "later stages keep it"
    assert load_decoder_model(aligned)[2].distilled is not None


def test_a_folder_is_distilled_again_from_its_distilled_denoiser(tmp_path: Path) -> None:
    """With a decoder of its own inside the folder, and styles that stay with it."""
    made = make_folder("noise", tmp_path)
    rows = make_rows(tmp_path, model=made, is_encoded=False)
    run = ["distill", "--data", str(rows), "--decoder", str(tmp_path / "base"), *STEPS, "draws_samples=false"]
    run += ["steps=1", "teacher_steps=1", "replay.steps=0"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*run, "--start", str(made), "--out", str(first)]) == 0
    parts = {path.name for path in (first / "model" / DECODER).iterdir()}
    assert parts == {"vae", "unet", "scheduler", "model_index.json", DISTILLED_FOLDER}
    assert check_folder(first / "model").diffusion == DECODER

    (style := first / "model" / "adapters" / "ink").mkdir(parents=True)
    (style / "pytorch_lora_weights.safetensors").write_bytes(b"")
    run = [word for word in run if word not in ("--decoder", str(tmp_path / "base"))]
    assert main([*run, "--start", str(first / "model"), "--out", str(second), "learning_rate=0"]) == 0
    assert check_folder(second / "model").styles == ("ink",)
    weights = [
        load_file(place / "model" / DECODER / DISTILLED_FOLDER / "diffusion_pytorch_model.safetensors")
        for place in (first, second)
    ]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items()), "it starts from the last one"


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_two_workers_distill_under_zero_3(tmp_path: Path) -> None:
    made = make_folder("xl", tmp_path)
    rows = make_rows(tmp_path, model=made, is_encoded=True)
    command = [sys.executable, "-m", "training.train", "distill", "--data", str(rows), "--start", str(made)]
    command += ["--out", str(tmp_path / "run"), *STEPS, "--workers", "2", "steps=3", "teacher_steps=2"]
    done = subprocess.run(
        [*command, "zero_stage=3", "ema_decay=0", "replay.min_size=2"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert load_decoder_model(tmp_path / "run" / "model")[2].distilled is not None


def test_another_family_is_refused_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_folder("stable_diffusion_3", tmp_path)
    rows = make_rows(tmp_path, model=made, is_encoded=False)
    assert main(["distill", "--data", str(rows), "--start", str(made), "--out", str(tmp_path / "run"), *STEPS]) == 1
    assert "is a StableDiffusion3, whose noise is a RectifiedFlow" in capsys.readouterr().err
    assert main(["distill", "--data", str(rows), "--out", str(tmp_path / "run"), "--runs", str(tmp_path), *STEPS]) == 1
    assert "name a model folder with --start" in capsys.readouterr().err
