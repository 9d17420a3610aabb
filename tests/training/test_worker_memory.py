"""What a process holds over its baseline, with half a gigabyte of weights: as `minigpt5.new --dry-run` and
`minigpt5.published sizes` say, and less where workers share it out."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.training_memory import LIVE_PARAMETERS, WAYS, Made, Memory, make_model, run_workers
from minigpt5.combine import Parts, sketch
from minigpt5.footprint import count_lora, count_parts, count_trained, memory_gb
from minigpt5.model.sizes import training_gb

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TOLERANCE = 0.15


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_model(tmp_path_factory.mktemp("large"))


def sketched(model: Path) -> Parts:
    bases = model.parent
    return sketch(language=str(bases / "language"), diffusion=str(bases / "diffusion"), context_tokens=512)


def peaks(made: Made, out: Path, way: str, num_workers: int) -> list[Memory]:
    return run_workers(made, out / f"{way}-{num_workers}", WAYS[way], num_workers=num_workers)


def published_gb(parts: Parts, *, zero: int, workers: int) -> float:
    """What `minigpt5.published sizes` would say of these parts."""
    sizes, mapper = count_parts(parts), parts.mapper
    fc, queries = sum(one.numel() for one in mapper.fc.parameters()), mapper.queries.numel()
    named = {
        **sizes,
        "Q-Former and projection": sizes["Q-Former"],
        "mapper": sizes["mapper"] - fc - queries,
        "fc": fc,
        "queries": queries,
        "new vocabulary rows": sizes["voken embeddings"],
        "LoRA": count_lora(parts),
        "UNet": sizes["denoiser"],
        "stage 1, trained": count_trained(parts)["align"],
        "stage 2, trained": count_trained(parts)["learn"],
    }
    return sum(training_gb(named, zero=zero, workers=workers)["stage 1"].values())


def test_a_worker_holds_what_the_reports_say(made: Made, tmp_path: Path) -> None:
    parts = sketched(made.model)
    assert count_parts(parts)["language model"] * 2 >= 500e6
    said = memory_gb(parts)
    for way, place in (("bfloat16, mapped", "GPU"), ("float32", "CPU")):
        (found,) = peaks(made, tmp_path, way, 1)
        assert found.proportional / 1e9 == pytest.approx(said[f"align on a {place}, one worker"], rel=TOLERANCE)
    assert said["align on a GPU, one worker"] == pytest.approx(published_gb(parts, zero=0, workers=1), rel=0.01)


def test_workers_share_mapped_weights_and_zero_3_shares_them_out(made: Made, tmp_path: Path) -> None:
    parts = sketched(made.model)
    weights_bytes = 2 * count_parts(parts)["language model"]
    mapped = {workers: peaks(made, tmp_path, "bfloat16, mapped", workers) for workers in (1, 2)}
    for workers, found in mapped.items():
        for one in found:
            assert one.private < 0.5 * weights_bytes, "the weights lie in their file"
            assert one.proportional > 0.9 * weights_bytes / workers
    assert max(one.proportional for one in mapped[2]) < 0.75 * mapped[1][0].proportional
    for one in peaks(made, tmp_path, "bfloat16, mapped, ZeRO 0", 2):
        assert one.private < 0.5 * weights_bytes, "DeepSpeed writes to no frozen weight"
    found = {workers: peaks(made, tmp_path, "bfloat16, mapped, ZeRO 3", workers) for workers in (1, 2, 4)}
    held = {workers: max(one.private for one in some) for workers, some in found.items()}
    # A single worker reads its own part. Several also hold what is gathered at once, and fetched ahead of it.
    gathered_bytes = 1.25 * 2 * LIVE_PARAMETERS
    assert held[1] - held[2] == pytest.approx(weights_bytes / 2 - gathered_bytes, rel=0.25), "each of two holds half"
    assert held[2] - held[4] == pytest.approx(weights_bytes / 4, rel=0.25), "each of four holds a quarter"
