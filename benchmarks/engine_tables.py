"""Tables of speed: stories, text, pictures, and the machine beside them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.goals import RATIO_GOALS, is_reached
from benchmarks.markdown import Results, reached, table

WAYS = {"ours": "engines", "http": "over HTTP"}
WRITERS = {"ours": "ours", "llamacpp": "llama.cpp, the base model's GGUF file", "vllm": "vLLM on the CPU, bfloat16"}
DRAWERS = {"ours": "ours", "eager": "ours, float32 with torch's own kernels", "pipeline": "diffusers' pipeline"}


def kernels(found: Results) -> str:
    """Milliseconds of a UNet sample."""
    times = found["kernels"]["unet_ms_a_sample_by_threads"]
    rows = (
        (threads, kernel, *(f"{batches[size]:.1f}" for size in ("2", "4", "8", "16")))
        for threads, by_kernel in times.items()
        for kernel, batches in by_kernel.items()
    )
    return table(("threads", "kernel", "batch of 2", "4", "8", "16"), rows)


def continuous_batching(found: Results) -> str:
    """Tokens a second of concurrent requests."""
    ways = found["continuous_batching"]["ways"]
    rows = (
        (name, f"{way['tokens_per_s']:.0f}", f"{min(way['seconds']):.2f} to {max(way['seconds']):.2f}")
        for name, way in ways.items()
    )
    return table(("way", "tokens a second", "seconds of a round"), rows)


def vllm(found: Results) -> str:
    """What vLLM writes beside the torch engine, and how fast."""
    figures = found["vllm"]
    likeness, cancels = figures["likeness"], figures["cancels"]
    rows = [
        ("requests with the same greedy text", f"{likeness['num_equal']} of {likeness['num_texts']}"),
        ("of the others, after a close choice", likeness["num_close"]),
        (
            "largest difference of a state, of the largest",
            f"{likeness['states_deviation']:.1e} of {likeness['largest_state']:.0f}",
        ),
        ("largest difference of a pixel, in levels", figures["pictures_levels"]),
        ("sampled requests alike alone and in company", figures["sampled_alike_in_company"]),
        ("processes left where vLLM is killed under a story", figures["death"]["processes_left"]),
        (f"left after {cancels['num']} cancels, of all kinds", sum(cancels["left"].values())),
    ]
    return table(("", "measured"), rows)


def vllm_speed(found: Results) -> str:
    """Tokens and pictures' states a second of both engines."""
    rows = (
        (num, *(f"{rates[name][f'{what}_per_s']:.1f}" for what in ("tokens", "states") for name in ("torch", "vllm")))
        for num, rates in found["vllm"]["speed"].items()
    )
    return table(("rows", "tokens/s, torch", "tokens/s, vLLM", "pictures' states/s, torch", "vLLM"), rows)


def middle(rounds: Sequence[float]) -> float:
    return statistics.median(rounds)


def engines_load(found: Results) -> str:
    """Stories a second of the engines, of the server and of what they are compared with."""
    rows: list[tuple[object, ...]] = []
    for pictures, ways in found["engines"]["stories"].items():
        kind = pictures if pictures == "default" else f"{pictures} steps"
        published = ways["published"]
        rates = [middle(ways[way]["stories_per_s"]) for way in ("published", "limit")]
        rows.append((kind, "published way", f"{rates[0]:.3f}", f"{middle(published['story_s']):.1f}", "", ""))
        rows.append((kind, "limit", f"{rates[1]:.3f}", "", "", ""))
        rows.append((kind, "pipeline bound", "", f"{middle(ways['bound_s']):.1f}", "", ""))
        rows += [
            (kind, f"{name}, {num} at once", *story_cells(one))
            for way, name in WAYS.items()
            for num, one in sorted(ways[way].items(), key=lambda pair: int(pair[0]))
        ]
    return table(("pictures", "", "stories/s", "story s", "first text s", "first picture s"), rows)


def story_cells(one: dict[str, Any]) -> tuple[str, ...]:
    story_s, text_s, picture_s = (one[f"{what}_s"]["p50"] for what in ("story", "first_text", "first_picture"))
    return f"{one['stories_per_s']:.3f}", f"{story_s:.1f}", f"{text_s:.2f}", f"{picture_s:.1f}"


def engines_alone(found: Results) -> str:
    """Text without pictures and pictures without text, of ours and of the peers."""
    engines = found["engines"]
    rows = [
        (f"{what}, {name}", *cells(engines[key].get(who, {}), digits))
        for what, key, names, digits in (
            ("text, tokens/s", "text", WRITERS, 0),
            ("pictures, s a picture", "pictures", DRAWERS, 3),
        )
        for who, name in names.items()
    ]
    return table(("", "1 at once", "8", "16"), rows)


def cells(by_num: dict[str, list[float]], digits: int) -> tuple[str, ...]:
    return tuple(f"{middle(by_num[num]):.{digits}f}" if num in by_num else "-" for num in ("1", "8", "16"))


def engines_ratios(found: Results) -> str:
    """Ratios to the peers, to the limit and to the machine, and their targets."""
    rows = []
    values = {row["ratio"]: row["value"] for row in found["engines"]["goals"]}
    for goal in RATIO_GOALS:
        value = values[goal.ratio]
        bound = "none" if goal.bound is None else f"{'at most' if goal.is_most else 'at least'} {goal.bound:g}"
        met = "" if value is None or goal.bound is None else reached(is_reached(goal, value))
        rows.append((goal.says, "not measured" if value is None else f"{value:.2f}", bound, met))
    return table(("ratio", "measured", "target", "reached"), rows)


def engines_more(found: Results) -> str:
    """The machine, a server's memory and idle cores, and a long prompt beside running stories."""
    engines = found["engines"]
    peak, server = engines["peak"], engines["server"]
    names = {
        "float32_gflops_per_s": "the machine: GFLOP/s in float32",
        "bfloat16_gflops_per_s": "the machine: GFLOP/s in bfloat16",
        "read_gb_per_s": "the machine: GB/s read",
        "copy_gb_per_s": "the machine: GB/s read and written by a copy",
    }
    rows = [(name, f"{middle(peak[key]):.0f}", "") for key, name in names.items()]
    rows.append(("memory of all processes of a server", f"{server['memory_gib']:.1f} GiB", ""))
    rows.append(("cores that a server keeps busy while nobody asks", f"{sum(server['idle_cores'].values()):.2f}", ""))
    if gap := engines.get("long_prompt"):
        tokens = engines["load"]["long_prompt_tokens"]
        text = f"p95 gap between texts of running stories while a prompt of {tokens:,} tokens joins, over without"
        rows.append((text, f"{gap['ratio']:.2f}", "at most 2"))
    return table(("", "measured", "target"), rows)
