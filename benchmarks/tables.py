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
from collections.abc import Callable
from pathlib import Path

from benchmarks.engine_tables import (
    continuous_batching,
    engines_alone,
    engines_load,
    engines_more,
    engines_ratios,
    kernels,
    vllm,
    vllm_speed,
)
from benchmarks.job_tables import (
    autoscaling,
    autoscaling_goals,
    batch_invariance,
    bulk_kills,
    bulk_speed,
    chaos,
    front_change,
    ingress,
    overload,
    own_model,
    server_faults,
    training_curves,
    training_kills,
    training_memory,
    training_rows,
    training_speed,
)
from benchmarks.markdown import Results, interval, table
from benchmarks.quality_tables import (
    alignment_gap,
    consistency,
    consistency_seconds,
    crispness,
    likeness,
    long_stories,
    probe,
    quality_accuracy,
    quality_gate,
    quality_phrasings,
    quality_references,
    quality_sizes,
    quality_targets,
    steps,
    stories,
)
from benchmarks.rival_tables import rival_captions, rival_costs, rival_extract, rival_stories

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", flags=re.S)


def results(found: Results) -> str:
    """The five rows of the README."""
    quality, load = found["quality"], found["engines"]["stories"]["default"]
    shown, pages = quality["held_out_pairs"]["accuracy"]["drawn"]["all"], quality["stories"]["pictures"]
    kills = found["faults"]["rounds"]
    http = load["http"]["16"]["stories_per_s"]
    published = statistics.median(load["published"]["stories_per_s"])
    company = found["company"]["text"]
    rows = [
        ("captions of held-out pairs whose picture shows all five facts", interval(shown)),
        ("pages of self-written stories whose picture shows the character", interval(pages["who"])),
        (
            "stories a second over HTTP, 16 default requests at once",
            f"{http:.2f} ({http / published:.1f} times the published way)",
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


TABLES: dict[str, Callable[[Results], str]] = {
    "results": results,
    "quality-accuracy": quality_accuracy,
    "quality-targets": quality_targets,
    "quality-phrasings": quality_phrasings,
    "quality-sizes": quality_sizes,
    "quality-references": quality_references,
    "quality-gate": quality_gate,
    "crispness": crispness,
    "alignment-gap": alignment_gap,
    "likeness": likeness,
    "stories": stories,
    "long-stories": long_stories,
    "consistency": consistency,
    "consistency-seconds": consistency_seconds,
    "probe": probe,
    "steps": steps,
    "kernels": kernels,
    "continuous-batching": continuous_batching,
    "vllm": vllm,
    "vllm-speed": vllm_speed,
    "engines-load": engines_load,
    "engines-alone": engines_alone,
    "engines-ratios": engines_ratios,
    "engines-more": engines_more,
    "overload": overload,
    "ingress": ingress,
    "front-change": front_change,
    "server-faults": server_faults,
    "chaos": chaos,
    "autoscaling": autoscaling,
    "autoscaling-goals": autoscaling_goals,
    "bulk-kills": bulk_kills,
    "bulk-speed": bulk_speed,
    "own-model": own_model,
    "training-kills": training_kills,
    "training-memory": training_memory,
    "training-rows": training_rows,
    "training-speed": training_speed,
    "training-curves": training_curves,
    "batch-invariance": batch_invariance,
    "rivals": rival_extract,
    "rivals-captions": rival_captions,
    "rivals-stories": rival_stories,
    "rivals-costs": rival_costs,
}


def load_results(folder: Path = RESULTS) -> Results:
    """Read the figures of every results file; books.json is a list of stories."""
    read = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {
        name: content.get("figures", content) if isinstance(content, dict) else content
        for name, content in read.items()
    }


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
