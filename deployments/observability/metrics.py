"""Every metric of the application: name, kind, unit, help, labels and their values, buckets.

The code records by these (`recording.py`), and the dashboard, the alert rules and the table in docs/operations.md are
made from them or checked against them. Ray exports a metric as `ray_<name>`, with the labels `application`,
`deployment` and `replica`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
"""Upper ends of the histograms' buckets. Ray takes each value as the middle of its bucket, so that a histogram's sum
is an estimate; its counts are exact."""
ENGINES = ("generator", "decoder")
STAGES = ("text", "queue", "denoise", "encode", "storage")


@dataclass(frozen=True, kw_only=True, eq=False)
class Metric:
    """One metric, as Prometheus names it but for Ray's prefix."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    unit: str
    """The last word of the name, before a counter's `_total`."""
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Label -> its values. No other value is recorded, so that the number of series is bounded."""
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name under which Prometheus finds it."""
        return f"ray_{self.name}"

    @property
    def label_sets(self) -> Iterator[dict[str, str]]:
        """All combinations of the labels' values."""
        return (dict(zip(self.labels, values, strict=True)) for values in product(*self.labels.values()))


# Engines, each of its own replica; flushed once a second

RUNNING_REQUESTS = Metric(
    name="minigpt5_running_requests",
    kind="gauge",
    unit="requests",
    help="Requests that take part in an engine's steps.",
    labels={"engine": ENGINES},
)
QUEUED_REQUESTS = Metric(
    name="minigpt5_queued_requests",
    kind="gauge",
    unit="requests",
    help="Requests inside an engine that wait for their first step.",
    labels={"engine": ENGINES},
)
PENDING_TOKENS = Metric(
    name="minigpt5_pending_tokens",
    kind="gauge",
    unit="tokens",
    help="Tokens that a generator's requests may still read and write.",
)
PENDING_SAMPLES = Metric(
    name="minigpt5_pending_samples",
    kind="gauge",
    unit="samples",
    help="Denoiser samples of the model's own size that a decoder's pictures still need.",
)
STEPS = Metric(
    name="minigpt5_engine_steps_total",
    kind="counter",
    unit="steps",
    help="Steps that an engine has made.",
    labels={"engine": ENGINES},
)
ROWS = Metric(
    name="minigpt5_engine_rows_total",
    kind="counter",
    unit="rows",
    help="Rows of an engine's steps: requests of the generator, samples of the decoder.",
    labels={"engine": ENGINES},
)
MAX_ROWS = Metric(
    name="minigpt5_engine_max_rows",
    kind="gauge",
    unit="rows",
    help="Rows that a step of an engine has room for. Rows / (steps * this) is the batch occupancy.",
    labels={"engine": ENGINES},
)
GENERATED_TOKENS = Metric(
    name="minigpt5_generated_tokens_total",
    kind="counter",
    unit="tokens",
    help="Tokens that a generator has drawn.",
)
PROMPT_TOKENS = Metric(
    name="minigpt5_prompt_tokens_total",
    kind="counter",
    unit="tokens",
    help="Tokens of the prompts of a generator's requests.",
)
REUSED_PROMPT_TOKENS = Metric(
    name="minigpt5_reused_prompt_tokens_total",
    kind="counter",
    unit="tokens",
    help="Prompt tokens that were found in the KV cache.",
)
DENOISING_STEPS = Metric(
    name="minigpt5_denoising_steps_total",
    kind="counter",
    unit="steps",
    help="Denoising steps of all pictures: a step that three pictures share counts three.",
)
DRAWN_PICTURES = Metric(
    name="minigpt5_decoder_pictures_total",
    kind="counter",
    unit="pictures",
    help="Pictures that a decoder was asked for: drawn, found in its cache, stopped by the filter, or failed.",
    labels={"result": ("drawn", "cached", "blocked", "failed")},
)
LOADED_ADAPTERS = Metric(
    name="minigpt5_loaded_adapters",
    kind="gauge",
    unit="adapters",
    help="Style adapters that a decoder holds.",
)

# Fronts

ADMITTED_REQUESTS = Metric(
    name="minigpt5_admitted_requests",
    kind="gauge",
    unit="requests",
    help="Stories and picture requests that a front has accepted and not finished.",
)
HTTP_REQUESTS = Metric(
    name="minigpt5_http_requests_total",
    kind="counter",
    unit="requests",
    help="Requests under /v1/, by how they were answered.",
    labels={
        "result": (
            "answered",
            "abandoned",
            "invalid",
            "unauthorized",
            "not_found",
            "conflict",
            "too_large",
            "rate_limited",
            "overloaded",
            "storage_error",
            "internal_error",
        )
    },
)
STORIES = Metric(
    name="minigpt5_stories_total",
    kind="counter",
    unit="stories",
    help="Stories that have ended at a front, by how.",
    labels={"outcome": ("done", "cancelled", "blocked", "storage_error", "engine_error", "handed_over")},
)
PAGES = Metric(
    name="minigpt5_pages_total",
    kind="counter",
    unit="pages",
    help="Pages that stories have finished: with a picture, without one by design, or with an error in its place.",
    labels={"picture": ("drawn", "none", "failed")},
)
FIRST_TEXT = Metric(
    name="minigpt5_time_to_first_text_seconds",
    kind="histogram",
    unit="seconds",
    help="From a story's acceptance to its first text.",
    buckets=SECONDS,
)
FIRST_PICTURE = Metric(
    name="minigpt5_time_to_first_picture_seconds",
    kind="histogram",
    unit="seconds",
    help="From a story's acceptance to its first picture.",
    buckets=SECONDS,
)
PAGE_INTERVAL = Metric(
    name="minigpt5_page_interval_seconds",
    kind="histogram",
    unit="seconds",
    help="Between two finished pages of a story; the first counts from the story's acceptance.",
    buckets=SECONDS,
)
PAGE_STAGE = Metric(
    name="minigpt5_page_stage_seconds",
    kind="histogram",
    unit="seconds",
    help=(
        "Of a page: its text, from the page before to its picture's slot (text); its picture up to the first step "
        "(queue), the other steps (denoise), VAE, PNG and filter (encode); storing it without vokens (storage)."
    ),
    labels={"stage": STAGES},
    buckets=SECONDS,
)

METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
