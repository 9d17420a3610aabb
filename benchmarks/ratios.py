"""Figures of the engines' bench -> its ratios, by name; None where a figure was not measured.

A ratio is the median of its values in each round, in which both of its figures were measured one soon after the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.load import DEFAULT
from benchmarks.rounds import Figures

GUIDED = "20"
"""Guided steps of the pictures of the ratios that name none."""

Rounds = Sequence[float] | None


def compute(figures: Figures) -> dict[str, float | None]:
    """All ratios. Stories are those over HTTP, or of the engines where no server was measured."""
    text, pictures = figures.text, figures.pictures
    return {
        "stories_16_vs_published": _vs(figures, GUIDED, "16", "published"),
        "stories_16_vs_limit": _vs(figures, GUIDED, "16", "limit"),
        "latency_1_vs_published": _inverse(_vs(figures, GUIDED, "1", "published")),
        "overlap": over(_seconds(figures, GUIDED), figures.stories.get(GUIDED, {}).get("bound_s")),
        "default_16_http_vs_limit": over(_rates(figures, DEFAULT, "16", ("http",)), _rate(figures, DEFAULT, "limit")),
        "default_1_http_vs_bound": over(
            _seconds(figures, DEFAULT, ("http",)), figures.stories.get(DEFAULT, {}).get("bound_s")
        ),
        "default_16_vs_published": _vs(figures, DEFAULT, "16", "published"),
        "tokens_1_vs_llamacpp": over(_of(text, "ours", "1"), _of(text, "llamacpp", "1")),
        "tokens_1_vs_vllm": over(_of(text, "ours", "1"), _of(text, "vllm", "1")),
        "tokens_16_vs_vllm": over(_of(text, "ours", "16"), _of(text, "vllm", "16")),
        "picture_seconds_1_vs_eager": over(_of(pictures, "ours", "1"), _of(pictures, "eager", "1")),
        "picture_seconds_8_vs_eager": over(_of(pictures, "ours", "8"), _of(pictures, "eager", "8")),
        "peak_share_unet": over(unet_gflops_per_s(figures), peak_gflops_per_s(figures)),
        "bandwidth_share_tokens": over(weights_gb_per_s(figures), figures.peak.get("read_gb_per_s")),
    }


def over(above: Rounds, below: Rounds) -> float | None:
    """The median of the ratios of all rounds that have both."""
    if not above or not below:
        return None
    return statistics.median(a / b for a, b in zip(above, below, strict=False))


def unet_gflops_per_s(figures: Figures) -> Rounds:
    """What the denoiser computes, alone and with all threads."""
    return [figures.unet["flops_a_sample"] / seconds / 1e9 for seconds in figures.unet.get("seconds_a_sample", ())]


def peak_gflops_per_s(figures: Figures) -> Rounds:
    """The machine's peak in the precision in which it is highest."""
    by_precision = [figures.peak.get(f"{name}_gflops_per_s", ()) for name in ("float32", "bfloat16")]
    return [max(both) for both in zip(*by_precision, strict=True)]


def weights_gb_per_s(figures: Figures) -> Rounds:
    """What a lone text reads of the weights."""
    return [figures.weight_bytes * rate / 1e9 for rate in _of(figures.text, "ours", "1") or ()]


def _vs(figures: Figures, pictures: str, num: str, way: str) -> float | None:
    return over(_rates(figures, pictures, num), _rate(figures, pictures, way))


def _rates(figures: Figures, pictures: str, num: str, ways: Sequence[str] = ("http", "ours")) -> Rounds:
    """Stories a second in each round, of the first way that was measured."""
    measured = figures.stories.get(pictures, {})
    return next((measured[way][num]["stories_per_s_of_rounds"] for way in ways if num in measured.get(way, {})), None)


def _seconds(figures: Figures, pictures: str, ways: Sequence[str] = ("http", "ours")) -> Rounds:
    """Seconds of a lone story."""
    return [1 / rate for rate in _rates(figures, pictures, "1", ways) or ()]


def _rate(figures: Figures, pictures: str, way: str) -> Rounds:
    return figures.stories.get(pictures, {}).get(way, {}).get("stories_per_s")


def _of(figures: dict[str, dict[str, list[float]]], who: str, num: str) -> Rounds:
    return figures.get(who, {}).get(num)


def _inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value
