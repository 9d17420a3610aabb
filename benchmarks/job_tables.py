"""Tables of crashes, bulk jobs, training runs and batch invariance."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.markdown import Results, reached, table


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


def chaos(found: Results) -> str:
    """What a local cluster that broke did to the stories that were asked for meanwhile."""
    names = {
        "nothing": "nothing",
        "generator": "one of two generators",
        "decoder": "one of two decoders",
        "front": "one of two fronts",
        "ledger": "the fronts' ledger",
        "controller": "Serve's controller",
        "proxy": "one of Serve's proxies",
        "raylet": "the raylet of a worker",
        "head": "the whole head, with Redis",
        "drain": "a worker, announced before",
        "disk-full": "no room on the disk",
        "storage-slow": "half of the requests to S3",
        "storage-lost": "every request to S3",
        "overload": "nothing, at five times the capacity",
    }
    rows = []
    for row in found["chaos"]["scenarios"]:
        counts = (row.get(key, "") for key in ("accepted", "finished", "refused", "lost", "doubled"))
        wait = row.get("next_page_s")
        rows.append((names[row["scenario"]], *counts, row.get("reason") or ("" if wait is None else f"{wait:g} s")))
    head = ("what failed", "accepted", "finished", "refused", "lost", "doubled", "to the next page")
    return table(head, rows)


def overload(found: Results) -> str:
    """A server that is asked for several times what it can make."""
    load = found["load"]
    ends = load["ends"]
    others = sum(number for end, number in ends.items() if end not in ("done", "503"))
    rows = [
        ("capacity, stories a second", f"{load['capacity_stories_per_s']:.2f}"),
        ("requests, as a multiple of the capacity", f"{load['times_capacity']:g}, for {load['seconds']:g} s"),
        ("stories made", ends.get("done", 0)),
        ("answers 503", ends.get("503", 0)),
        ("other answers", others),
        ("p50 and p95 of accepted stories", f"{load['accepted_p50_s']:.0f} and {load['accepted_p95_s']:.0f} s"),
        ("promised (`max_wait_s`)", f"{load['max_wait_s']:g} s"),
        ("memory, last quarter over the second", f"{load['memory_growth']:.2f}"),
    ]
    return table(("overload", "measured"), rows)


def autoscaling(found: Results) -> str:
    """The story policy beside Serve's default policy at its best targets, in simulated clusters."""
    rows = []
    for name, load in found["autoscaling"]["loads"].items():
        ours, default = load["ours"], load["default"]
        rows.append(
            (
                name,
                f"{ours['p95_first_picture_s']:.1f} s",
                f"{default['p95_first_picture_s']:.1f} s",
                f"{load['p95_vs_default']:.2f}",
                f"{load['replica_s_vs_default']:.2f}",
            )
        )
    head = ("load", "p95 of the first picture", "default policy", "ratio", "ratio of replica-seconds")
    return table(head, rows)


def autoscaling_goals(found: Results) -> str:
    """What the autoscaling policy, its simulator and the planner were to reach."""
    says = {
        "p95_first_picture_vs_default_policy": "p95 of the first picture over the default policy's, 16-page burst",
        "replica_seconds_vs_default_policy": "replica-seconds over the default policy's, 16-page burst",
        "simulator_vs_live": "simulator and live run: difference of mean first picture or replica-seconds",
        "planner_error": "planner and simulator: largest difference of the mean first picture",
    }
    rows = [
        (says[goal["ratio"]], f"{goal['value']:.2f}", f"at most {goal['bound']:g}", reached(goal["reached"]))
        for goal in found["autoscaling"]["goals"]
    ]
    return table(("figure", "measured", "target", "reached"), rows)


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


def training_rows(found: Results) -> str:
    """The cost of a stored row, by the number of rows."""
    rows = (
        (
            f"{int(num_rows):,}",
            f"{one['us_per_row']:.0f} us",
            f"{one['opened_us_per_row']:.1f} us",
            f"{one['sent_mib']:.2f} MiB",
        )
        for num_rows, one in found["training"]["rows"].items()
    )
    head = ("rows", "an example", "opening, each row", "sent to a data worker")
    return table(head, rows)


def training_memory(found: Results) -> str:
    """The most memory of a training worker, and the seconds of a step, by the number of workers."""
    measured = found["training"]["memory"]

    def cells(way: str) -> list[str]:
        of = {num: measured.get(f"{way}, {num}") for num in (1, 2, 4)}
        held = [f"{one['peak_mib']:,.0f} ({one['private_mib']:,.0f})" if one else "" for one in of.values()]
        steps = [one and one["step_s"] for one in (of[1], of[2])]
        return [*held, *(f"{seconds:.1f} s" if seconds else "" for seconds in steps)]

    ways = dict.fromkeys(name.rpartition(", ")[0] for name in measured)
    head = ("MiB (alone), step", "1 worker", "2 workers", "4 workers", "step of 1", "step of 2")
    return table(head, ((way, *cells(way)) for way in ways))


def own_model(found: Results) -> str:
    """Losses on rows that a model from packages never trained on, before and after each stage."""
    rows = (
        (stage, measured["steps"], f"{measured['minutes']:.0f}", name, f"{loss['before']:.3f}", f"{loss['after']:.3f}")
        for stage, measured in found["own_model"]["stages"].items()
        for name, loss in measured.items()
        if isinstance(loss, dict)
    )
    return table(("stage", "steps", "minutes", "loss", "before", "after"), rows)


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


def ingress(found: Results) -> str:
    """A streamed story by the way in and by stories at once, as medians of the rounds."""
    rounds = found["ingress"]["rounds"]

    def median(way: str, num: str, *keys: str) -> float:
        def read(one: Results) -> float:
            value: Any = one[way][num]
            for key in keys:
                value = value.get(key, 0.0)
            return value

        return statistics.median(read(one) for one in rounds)

    rows = [
        (
            way,
            num,
            f"{median(way, num, 'first_text_s'):.2f} s",
            f"{1000 * median(way, num, 'gap_p50_s'):.0f} and {1000 * median(way, num, 'gap_p95_s'):.0f} ms",
            f"{median(way, num, 'story_s'):.1f} s",
            *(f"{median(way, num, 'cpu_s_per_story', kind):.2f}" for kind in ("proxy", "front", "ray")),
            f"{median(way, num, 'cpu_s_per_story', 'generator') + median(way, num, 'cpu_s_per_story', 'decoder'):.1f}",
        )
        for way in rounds[0]
        for num in rounds[0][way]
    ]
    head = ("way in", "at once", "first text", "gap between events, p50 and p95", "a story")
    return table((*head, "CPU seconds a story: proxy", "front", "Ray", "engines"), rows)


def front_change(found: Results) -> str:
    """Streams whose fronts Serve replaced."""
    rows = [
        (
            mode,
            len(streams),
            sum(bool(one["cuts_s"]) for one in streams),
            ", ".join(f"{cut:.0f} s" for one in streams for cut in one["cuts_s"]) or "never",
            f"{max(one['ended_s'] for one in streams):.0f} s",
            sum(one["is_whole"] for one in streams),
        )
        for mode, streams in found["ingress"]["front_change"].items()
    ]
    return table(("way in", "streams", "cut", "cut after the change", "the last ended after", "whole at the end"), rows)
