"""Tables of what the shipped model writes and draws."""

from __future__ import annotations

from benchmarks.markdown import Results, interval, reached, table

FACTS = ("who", "what", "side", "place", "time", "all")


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


def quality_phrasings(found: Results) -> str:
    """What pictures show, and descriptions name, when people ask in other words than the world's own."""
    quality = found["quality"]
    ways = (
        ("drawn, phrasings of seen families", "phrasings", "seen"),
        ("drawn, with a part of an unseen family", "phrasings", "unseen"),
        ("described, eight questions that were trained on", "questions", "seen"),
        ("described, two that were not", "questions", "unseen"),
    )
    rows = (
        (name, *(interval(shares[fact]) if fact in shares else "" for fact in FACTS))
        for name, part, kind in ways
        for shares in (quality[part][kind],)
    )
    return table(("", *FACTS), rows)


def quality_sizes(found: Results) -> str:
    """Pictures of the second decoder beside the VAE's own."""
    larger = found["quality"]["upscaling"]
    side_px = larger["side_px"]

    def spread(one: Results) -> str:
        return f"{one['mean']:.3f} ({one['low']:.3f} to {one['high']:.3f})"

    rows = (
        (f"crispness of drawn pictures, {side_px} px", spread(larger["crispness"])),
        (f"LPIPS of encoded scenes to the scenes at {side_px} px", spread(larger["lpips"]["upscaled"])),
        ("the same of the VAE's own pictures, enlarged", spread(larger["lpips"]["enlarged"])),
        ("first over second", f"{larger['lpips_vs_enlarged']:.2f}"),
        (f"seconds a picture, {side_px} px", f"{larger['seconds']['upscaled']:.3f}"),
        (f"seconds a picture, {side_px // 2} px", f"{larger['seconds']['own']:.3f}"),
        ("first over second", f"{larger['seconds_vs_own']:.2f}"),
    )
    return table(("", "measured"), rows)


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


def quality_gate(found: Results) -> str:
    """What each figure of the gate does by itself, and the least that passes."""
    rows = (
        (name, f"{one['mean']:.3f}", f"{one['deviation']:.4f}", f"{one['least']:.3f}", str(one["num"]))
        for name, one in found["gate"].items()
    )
    return table(("figure", "mean", "standard deviation", "least that passes", "answers"), rows)


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


def long_stories(found: Results) -> str:
    """Stories of many pages, by page numbers."""
    heads = {
        "new_4_grams": "new 4-grams",
        "cast_kept": "about its character",
        "cast_named": "names it",
        "who_shown": "picture shows the character",
        "what_shown": "picture shows the object",
    }
    bins = found["long_stories"]["bins"]
    rows = ((one["pages"], *(interval(one[name]) if name in one else "" for name in heads)) for one in bins)
    return table(("pages", *heads.values()), rows)


def consistency(found: Results) -> str:
    """Pages of one story with and without a reference."""
    figures = found["consistency"]
    ways = {"off": figures["off"], "story": figures["story"]}
    rows = [
        *(
            (f"later pages that show their {fact}", *(interval(way["pages"][fact]) for way in ways.values()))
            for fact in figures["off"]["pages"]
        ),
        *(
            (f"{name}, distance {distance}", *(interval(way["distances"][distance][key]) for way in ways.values()))
            for key, name in (("same_who", "one character on both"), ("likeness", "likeness by EfficientNet"))
            for distance in figures["off"]["distances"]
        ),
    ]
    return table(("", *ways), rows)


def consistency_seconds(found: Results) -> str:
    """What a page with a reference costs."""
    seconds = found["consistency"]["seconds"]
    ratios = {name.removeprefix("story over "): value for name, value in seconds["ratios"].items()}
    rows = (
        (name, f"{value:.2f}", f"{ratios[name]:.1f}" if name in ratios else "")
        for name, value in seconds["cpu_seconds"].items()
    )
    return table(("picture", "CPU seconds", "with a reference it takes so many times as long"), rows)


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
