"""The networks and data that metrics need. What is not here is named, and its metrics are left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minigpt5.errors import MiniGPT5Error
from minigpt5.evaluation.alignment import Clip
from minigpt5.evaluation.frechet import EfficientNetFeatures, Graph
from minigpt5.evaluation.metrics import METRICS
from minigpt5.evaluation.perceptual import Lpips
from minigpt5.evaluation.text import SentenceEncoder, load_wordnet
from minigpt5.storybook.scorer import load_scorer

NEEDS = {
    **dict.fromkeys(("clip_i", "clip_t", "mm_relevance", "clip_f1_published", "clip_consistency"), "clip"),
    **dict.fromkeys(("fid", "fid_published", "story_fid_published"), "inception"),
    "inception_score": "logits",
    **dict.fromkeys(("efficientnet_distance", "efficientnet_consistency"), "efficientnet"),
    "lpips": "lpips",
    "sbert": "sentences",
    "meteor": "wordnet",
    "fact_accuracy": "world",
    "judge": "judge",
}
"""Metrics -> what they need, a key of `Scorers.parts`; the others need nothing."""


@dataclass(kw_only=True)
class Scorers:
    """What is here, and why the rest is not."""

    parts: dict[str, Any] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def has(self, metric: str) -> bool:
        return metric not in NEEDS or NEEDS[metric] in self.parts

    def missing(self, metrics: tuple[str, ...]) -> dict[str, str]:
        """Metrics that are left out, each with the reason."""
        return {name: self.absent.get(NEEDS[name], METRICS[name].needs) for name in metrics if not self.has(name)}


def load_scorers(
    metrics: tuple[str, ...], *, clip: str | None = None, inception: str | None = None, device: str = "cpu"
) -> Scorers:
    """Load what `metrics` need. `clip`: a folder or a hub id; `inception`: an ONNX or OpenVINO file.

    Raises ModelFolderError or BaseModelNotFound for what was named and cannot be used.
    """
    scorers = Scorers()
    needed = {NEEDS[name] for name in metrics if name in NEEDS}
    if clip and "clip" in needed:
        scorers.parts["clip"] = Clip(clip, device=device)
    if inception:
        for part, output in (("inception", 0), ("logits", 1)):
            if part in needed:
                scorers.parts[part] = Graph(inception, output=output)
    scorers.absent |= {"clip": "name a CLIP model with --clip"}
    scorers.absent |= dict.fromkeys(("inception", "logits"), "name an Inception-v3 file with --inception")
    scorers.absent |= {"judge": "name a judge with --judge"}
    found: dict[str, Callable[[], Any]] = {
        "efficientnet": EfficientNetFeatures,
        "lpips": Lpips,
        "sentences": SentenceEncoder,
        "wordnet": load_wordnet,
        "world": load_scorer,
    }
    for part in sorted(needed & found.keys()):
        try:
            scorers.parts[part] = found[part]()
        except MiniGPT5Error as error:
            scorers.absent[part] = str(error)
    return scorers
