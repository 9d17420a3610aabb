"""Tables of figures: `python -m benchmarks.tables` writes benchmarks/results/*.json into the Markdown files.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, in README.md, docs/*.md or a model's card. `--check`
changes nothing, names each file whose table differs from the results, and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", flags=re.S)
FACTS = ("who", "what", "side", "place", "time", "all")

Results = dict[str, Any]
"""File name without its suffix -> the figures of that file."""


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Format a Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def interval(figure: dict[str, float]) -> str:
    """Format a share or a mean with its 95 % interval."""
    value = figure["share"] if "share" in figure else figure["mean"]
    return f"{value:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def results(found: Results) -> str:
    """The five rows of the README."""
    quality, load = found["quality"], found["engines"]["by_steps"]
    shown, pages = quality["held_out_pairs"]["accuracy"]["drawn"]["all"], quality["stories"]["pictures"]
    kills = found["faults"]["rounds"]
    http = load["20"]["http"]["16"]["stories_per_s"]
    company = found["company"]["text"]
    rows = [
        ("captions of held-out pairs whose picture shows all five facts", interval(shown)),
        ("pages of self-written stories whose picture shows the character", interval(pages["who"])),
        (
            "stories a second over HTTP, 16 at once, 20 guided steps a picture",
            f"{http:.2f} ({http / load['20']['baseline']['stories_per_s']:.1f} times the baseline)",
        ),
        (
            "random requests with the same text alone and in a batch",
            f"{company['same_text']} of {company['requests']}",
        ),
        (
            f"accepted stories lost in {len(kills)} kills of server processes",
            f"{sum(one['lost'] for one in kills)} of {sum(one['stories'] for one in kills)}",
        ),
    ]
    return table(("measured on two CPU cores", "result"), rows)


def quality_accuracy(found: Results) -> str:
    """What drawn pictures show."""
    quality = found["quality"]
    ways = {
        "drawn, held-out pairs": ("held_out_pairs", "drawn"),
        "drawn, seen pairs": ("seen_pairs", "drawn"),
        "held-out pairs through the text encoder (what vokens are aligned with)": ("held_out_pairs", "base"),
        "VAE reconstructions (the ceiling)": ("held_out_pairs", "reconstructed"),
    }
    rows = (
        (name, *(interval(quality[pairs]["accuracy"][way][fact]) for fact in FACTS))
        for name, (pairs, way) in ways.items()
    )
    return table(("", *FACTS), rows)


def quality_targets(found: Results) -> str:
    """Each figure of the shipped model beside its target and its goal."""
    rows = (
        (
            row["figure"],
            f"{row['value']:.3g} ({row['low']:.3g} to {row['high']:.3g})",
            f"{row['target']:g}",
            reached(row["reached"]),
            "" if row["goal"] is None else f"{row['goal']:g}",
            "" if row["goal"] is None else reached(row["goal_reached"]),
        )
        for row in found["quality"]["goals"]
    )
    return table(("figure", "measured", "target", "reached", "goal", "reached"), rows)


def reached(is_reached: bool) -> str:
    return "yes" if is_reached else "**no**"


def quality_references(found: Results) -> str:
    """Facts that a page names, and facts that it only refers to."""
    ways = {
        "the vokens": "vokens",
        "the vokens after another story's beginning": "vokens_after_another_beginning",
        "the page's text through the text encoder": "page_through_text_encoder",
        "that with as many earlier pages as fit in 32 positions": "page_and_earlier_ones_through_text_encoder",
    }
    reference = found["quality"]["reference"]
    rows = (
        (
            name,
            interval(reference[way]["named"]["all"]),
            interval(reference[way]["referred_to"]["all"]),
            interval(reference[way]["referred_over_named"]),
        )
        for name, way in ways.items()
    )
    return table(("drawn from", "facts that the page names", "facts that it refers to", "second over first"), rows)


def crispness(found: Results) -> str:
    """Crispness of held-out pairs' pictures."""
    held_out = found["quality"]["held_out_pairs"]
    kinds = {"drawn": "drawn", "VAE reconstructions": "reconstructed", "through the text encoder": "base"}
    rows = (
        (
            name,
            *(f"{one['mean']:.3f} ({one['low']:.3f} to {one['high']:.3f})" for one in figures),
        )
        for name, key in {**kinds, "true scenes": "true"}.items()
        for figures in [[held_out[measure][key]["both"] for measure in ("crispness", "crispness_with_colour")]]
    )
    return table(("", "crispness", "crispness with colour"), rows)


def alignment_gap(found: Results) -> str:
    """Points that vokens lose to the text encoder."""
    rows = (
        (name, *(f"{gap['mean']:.1f} ({gap['low']:.1f} to {gap['high']:.1f})" for gap in gaps))
        for name, pairs in (("held-out pairs", "held_out_pairs"), ("seen pairs", "seen_pairs"))
        for gaps in [[found["quality"][pairs]["alignment_gap"][fact] for fact in FACTS]]
    )
    return table(("points lost", *FACTS), rows)


def likeness(found: Results) -> str:
    """How near reconstructions and drawn pictures come to what they should be."""
    rows = []
    for name, pairs in (("held-out pairs", "held_out_pairs"), ("seen pairs", "seen_pairs")):
        quality = found["quality"][pairs]
        psnr, redrawn = quality["reconstruction"]["psnr_db"], quality["lpips_to_redrawn"]
        lpips = (
            f"{one['mean']:.3f} ({one['low']:.3f} to {one['high']:.3f})"
            for one in (quality["reconstruction"]["lpips"], redrawn)
        )
        rows.append((name, f"{psnr['mean']:.1f} dB ({psnr['low']:.1f} to {psnr['high']:.1f})", *lpips))
    head = ("", "PSNR of reconstructions", "LPIPS of reconstructions", "LPIPS of drawn pictures to redrawn sprites")
    return table(head, rows)


def stories(found: Results) -> str:
    """Stories that the model writes itself."""
    summary, books = found["quality"]["stories"], found["books"]
    flawless = sum(not book["wrong"] for book in books)

    def count(figure: dict[str, float]) -> str:
        return f"{round(figure['share'] * figure['num'])} of {figure['num']}"

    rows = [
        ("stories with the cast of their prompt", count(summary["stories_with_the_prompts_cast"])),
        ("stories with all pages and their pictures", count(summary["stories_with_all_pages_and_pictures"])),
        ("stories with nothing wrong", f"{flawless} of {len(books)}"),
        ("share of distinct 4-grams", interval(summary["distinct_4_grams"])),
        (
            "share of sentences that stand in 5,000 stories like the training stories",
            interval(summary["sentences_copied"]),
        ),
    ]
    return table(("", "measured"), rows)


def probe(found: Results) -> str:
    """Linear classifiers on the voken states."""
    rows = (
        (f"{kind}, {pairs.replace('_', ' ').replace('held out', 'held-out')}", *(f"{figures[pairs][fact]['share']:.2f}"
         for fact in FACTS[:-1]))
        for kind, figures in found["probe"].items()
        for pairs in ("seen_pairs", "held_out_pairs")
    )  # fmt: skip
    return table(("", *FACTS[:-1]), rows)


def steps(found: Results) -> str:
    """Accuracy, crispness and seconds of a picture by sampler and number of steps."""
    columns = {
        "UNet, DDIM": ("ddim", 1.0),
        "UNet, DDIM, guidance 3": ("ddim", 3.0),
        "UNet, SDE-DPM-Solver++, guidance 3": ("sde-dpm-solver++", 3.0),
        "distilled UNet": ("distilled", 1.0),
    }
    measured = {(row["scheduler"], row["guidance_scale"], row["steps"]): row for row in found["steps"]["rows"]}

    def cell(key: tuple[str, float], steps: int) -> str:
        row = measured.get((*key, steps))
        if row is None:
            return "-"
        return f"{row['accuracy']['all']:.2f}, {row['crispness']:.2f}, {row['seconds_a_picture']:.2f} s"

    rows = ((num, *(cell(key, num) for key in columns.values())) for num in sorted({key[2] for key in measured}))
    return table(("steps", *columns), rows)


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


def engines_load(found: Results) -> str:
    """Stories a second of the engines, of the server and of what they are compared with."""
    rows: list[tuple[object, ...]] = []
    for num, ways in found["engines"]["by_steps"].items():
        baseline = ways["baseline"]
        rows.append((num, "baseline", f"{baseline['stories_per_s']:.3f}", f"{baseline['story_s']['p50']:.1f}", "", ""))
        rows.append((num, "upper bound", f"{ways['upper_bound']['stories_per_s']:.3f}", "", "", ""))
        for way, name in (("ours", "engines"), ("http", "over HTTP")):
            for load, one in ways[way].items():
                times = [one["story_s"]["p50"], one["first_text_s"]["p50"], one["first_picture_s"]["p50"]]
                rows.append(
                    (
                        num,
                        f"{name}, {load} at once",
                        f"{one['stories_per_s']:.3f}",
                        f"{times[0]:.1f}",
                        f"{times[1]:.2f}",
                        f"{times[2]:.1f}",
                    )
                )
    return table(("steps", "", "stories/s", "story s", "first text s", "first picture s"), rows)


def engines_ratios(found: Results) -> str:
    """Ratios to the baseline and to the upper bound, and their targets."""
    names = {
        "stories_16_vs_baseline": ("stories/s of 16 at once, over the baseline", "at least 2.5"),
        "stories_16_vs_upper_bound": ("the same, over the upper bound", "at least 0.85"),
        "latency_1_vs_baseline": ("seconds of one story, over the baseline", "at most 1.05"),
        "overlap": ("seconds of one story, over the pipeline bound", "at most 1.15"),
    }
    by_steps = found["engines"]["ratios_by_steps"]

    def cell(ratio: str, way: str) -> str:
        return ", ".join(f"{ratios[way][ratio]:.2f}" for ratios in by_steps.values())

    rows = []
    for ratio, (name, target) in names.items():
        bound, value = float(target.split()[-1]), by_steps["20"]["http"][ratio]
        is_reached = value >= bound if target.startswith("at least") else value <= bound
        rows.append((name, cell(ratio, "http"), cell(ratio, "ours"), target, reached(is_reached)))
    return table((f"ratio ({', '.join(by_steps)} steps)", "over HTTP", "engines", "target at 20", "reached"), rows)


def engines_more(found: Results) -> str:
    """A long prompt beside running stories, memory, and the cost of Serve."""
    engines = found["engines"]
    overhead = engines["serve_overhead_s_a_story"]
    cost = f"{', '.join(f'{seconds:.1f}' for seconds in overhead.values())} s"
    gap = engines["long_prompt"]["ratio"]
    tokens = engines["load"]["long_prompt_tokens"]
    rows = [
        (
            f"p95 gap between texts of running stories while a prompt of {tokens:,} tokens joins, over without",
            f"{gap:.2f}",
            "at most 2",
        ),
        ("memory of all processes of a server", f"{engines['server_memory_gib']:.1f} GiB", ""),
        (f"cost of Serve, HTTP and storage for a lone story ({', '.join(overhead)} steps)", cost, ""),
    ]
    return table(("", "measured", "target"), rows)


def server_faults(found: Results) -> str:
    """What kills of a server's processes did to the stories in flight."""
    kinds = {
        "generator": "the generator",
        "decoder": "the decoder",
        "front": "one of two fronts",
        "fronts": "both fronts",
        "ledger": "the fronts' ledger",
        "proxy": "Serve's proxy",
        "serve": "the whole server and its Ray",
        "point": "both fronts, at a failpoint",
    }
    columns = {
        "stories": "stories",
        "in_flight": "in flight",
        "lost": "lost",
        "pages_missing": "pages missing",
        "pages_twice": "pages twice",
        "pictures_changed": "finished pictures changed",
        "pages_told_otherwise": "pages told otherwise",
        "restarts": "text resets",
    }
    rows = []
    for kind, name in kinds.items():
        rounds = [one for one in found["faults"]["rounds"] if one["kind"] == kind]
        rows.append((name, len(rounds), *(sum(one[column] for one in rounds) for column in columns)))
    return table(("killed", "kills", *columns.values()), rows)


def bulk_kills(found: Results) -> str:
    """What kills of a bulk job's processes did to its rows."""
    kinds = {
        "worker": "an engine's process",
        "raylet": "a node's raylet, with its engines",
        "driver": "the driver",
        "job": "the driver and its Ray",
        "point": "the process that reaches a failpoint",
    }
    columns = {
        "rows": "rows",
        "rows_lost": "lost",
        "rows_doubled": "doubled",
        "files_changed": "finished files changed",
        "error_rows": "rows with an error",
    }
    rows = []
    for kind, name in kinds.items():
        jobs = [one for one in found["bulk"]["kills"] if one["kind"] == kind]
        counts = (sum(one[column] for one in jobs) for column in columns)
        rows.append((name, sum(one["kills"] for one in jobs), len(jobs), *counts))
    return table(("killed", "kills", "jobs", *columns.values()), rows)


def bulk_speed(found: Results) -> str:
    """Speed, memory and scaling of bulk jobs."""
    bulk = found["bulk"]
    speed, rates = bulk["speed"], bulk["scaling"]["pictures_per_s"]
    ratio = speed["job_rows_per_s"] / speed["one_process_rows_per_s"]
    busy = max(pool["utilisation"] for pool in speed["pools"].values())
    growth = 100 * bulk["memory"]["growth_after_200"]
    linear = {num: rates[num] / rates["1"] / int(num) for num in rates}
    rows = [
        (
            f"rows/s of a job ({speed['rows']} stories of {speed['pages']} pages, {speed['steps']} steps) "
            "over the same engines in one process at the best fixed batches",
            f"{ratio:.2f} ({speed['job_rows_per_s']:.2f} and {speed['one_process_rows_per_s']:.2f})",
            "at least 0.9",
            reached(ratio >= 0.9),
        ),
        ("busy time of the limiting pool", f"{busy:.2f}", "at least 0.9", reached(busy >= 0.9)),
        (
            f"growth of memory (RSS of all processes and object store) over {bulk['memory']['pictures']} pictures "
            "at 4 steps, from the 400th on, after the generator has ended",
            f"{growth:.1f} %",
            "at most 2 %",
            reached(growth <= 2),
        ),
        (
            f"pictures/s with {', '.join(rates)} simulated decoders of 25 pictures/s each",
            f"{', '.join(f'{rate:g}' for rate in rates.values())}: {linear['2']:.2f} and {linear['4']:.2f} of linear",
            "at least 0.9",
            reached(min(linear.values()) >= 0.9),
        ),
    ]
    return table(("", "measured", "target", "reached"), rows)


def training_kills(found: Results) -> str:
    """What kills of a training run's processes did to its steps and rows."""
    kinds = {"worker": "a worker", "driver": "the driver; Ray lives on", "job": "the whole job and its Ray"}
    rows = (
        (
            name,
            len(one["kills"]),
            one["starts"],
            f"{one['steps_redone']:g}",
            one["rows_lost"],
            one["rows_twice"],
            f"{one['loss_difference']:g}",
        )
        for kind, name in kinds.items()
        for one in [found["training"]["kills"][kind]]
    )
    head = ("killed", "kills", "starts", "steps redone", "rows lost", "rows used twice", "largest loss difference")
    return table(head, rows)


def training_speed(found: Results) -> str:
    """Seconds of a training step, medians over the runs."""
    speed = found["training"]["speed"]
    phases = ("data_s", "forward_s", "backward_s", "optimizer_s", "communication_s")

    def middle(runs: list[dict[str, float]], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    plain = middle(speed["plain, 2 threads"], "steps_per_s")
    rows = []
    for name, runs in speed.items():
        share = "" if name.startswith("learn") else f"{middle(runs, 'steps_per_s') / plain:.2f}"
        rows.append(
            (
                f"{name}, {len(runs)} run{'s' if len(runs) > 1 else ''}",
                f"{middle(runs, 'steps_per_s'):.3g}",
                share,
                *(f"{middle(runs, phase):.3f}" for phase in phases),
                f"{middle(runs, 'peak_mib'):,.0f} MiB",
            )
        )
    names = (phase.removesuffix("_s") for phase in phases)
    return table(("", "steps/s", "of the plain loop", *names, "peak memory of a worker"), rows)


def training_curves(found: Results) -> str:
    """Largest relative difference of a loss from the plain loop of the same precision."""
    curves = found["training"]["curves"]

    def difference(precision: str, stage: int) -> float:
        plain, ours = curves[f"{precision}, plain"], curves[f"{precision}, ZeRO {stage}"]
        return max(abs(a - b) / abs(a) for a, b in zip(plain, ours, strict=True))

    rows = (
        (precision, *(f"{difference(precision, stage):.1e}" for stage in range(4)), target)
        for precision, target in (("float32", "1e-3"), ("bfloat16", "none"))
    )
    return table(("", *(f"ZeRO {stage}" for stage in range(4)), "target"), rows)


def batch_invariance(found: Results) -> str:
    """Results of the same requests alone and in random batches."""
    text, pictures, cancels = (found["company"][key] for key in ("text", "pictures", "cancels"))
    fairness, leaving = found["company"]["fairness"], cancels["leaving_over_a_step"]
    rows = [
        ("requests with the same text", f"{text['same_text']} of {text['requests']}", "all"),
        ("token choices with a margin below 1e-4", text["close_choices"], "reported"),
        ("largest difference of a voken state", f"{text['largest_voken_difference']:.1e}", "reported"),
        ("bit-equal PNGs", f"{pictures['bit_equal']} of {pictures['pictures']}", "reported"),
        ("bit-equal latents", f"{pictures['bit_equal_latents']} of {pictures['pictures']}", "reported"),
        ("largest difference of a latent", f"{pictures['largest_latent_difference']:.1e}", "1e-4"),
        ("largest difference of a pixel, in levels", pictures["largest_difference_levels"], "1"),
        (f"requests in flight after {cancels['cancelled']} random cancels", cancels["in_flight_after"], "0"),
        ("steps until a cancelled request leaves the generator, at most", f"{leaving['generator']['most']:.2f}", ""),
        ("steps until a cancelled request leaves the decoder, at most", f"{leaving['decoder']['most']:.2f}", ""),
        (
            "time of a one-page story beside 16 of another client, over its time alone",
            f"{fairness['ratio']:.2f}",
            "at most 2",
        ),
    ]
    return table(("", "measured", "target"), rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "results": results,
    "quality-accuracy": quality_accuracy,
    "quality-targets": quality_targets,
    "quality-references": quality_references,
    "crispness": crispness,
    "alignment-gap": alignment_gap,
    "likeness": likeness,
    "stories": stories,
    "probe": probe,
    "steps": steps,
    "kernels": kernels,
    "continuous-batching": continuous_batching,
    "engines-load": engines_load,
    "engines-ratios": engines_ratios,
    "engines-more": engines_more,
    "server-faults": server_faults,
    "bulk-kills": bulk_kills,
    "bulk-speed": bulk_speed,
    "training-kills": training_kills,
    "training-speed": training_speed,
    "training-curves": training_curves,
    "batch-invariance": batch_invariance,
}


def load_results(folder: Path = RESULTS) -> Results:
    """Read the figures of every results file; books.json is a list of stories."""
    read = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: content["figures"] if isinstance(content, dict) else content for name, content in read.items()}


def pages() -> list[Path]:
    """List the files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "models").glob("*/*.md"))]


def rewrite(text: str, found: Results) -> str:
    """Fill the marked tables of a page. Raises KeyError for a table that does not exist."""
    return MARKED.sub(lambda match: f"{match[1]}\n{TABLES[match[2]](found)}\n{match[3]}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table differs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    options = parser.parse_args(arguments)
    found, status = load_results(options.results), 0
    for page in pages():
        text = page.read_text()
        if (new := rewrite(text, found)) == text:
            continue
        if options.check:
            print(f"{page.relative_to(ROOT)}: a table differs from benchmarks/results; run python -m benchmarks.tables")
            status = 1
        else:
            page.write_text(new)
            print(f"{page.relative_to(ROOT)}: written")
    return status


if __name__ == "__main__":
    sys.exit(main())
