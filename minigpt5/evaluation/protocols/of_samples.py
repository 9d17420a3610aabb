"""Metrics of one sample at a time, or of a row's samples together, and the features that sets are compared by.

Each function takes samples that have what it compares, and returns one value for each; names after a slash are parts
of a metric ("fact_accuracy/who").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from minigpt5.errors import InvalidRequest
from minigpt5.evaluation import alignment, consistency, frechet, text
from minigpt5.evaluation.protocols.protocol import Sample
from minigpt5.evaluation.protocols.scorers import Scorers
from minigpt5.evaluation.world import facts_shown

WORLD_PX = 128
Values = list[dict[str, float]]


def _named(name: str, values: Sequence[float] | np.ndarray) -> Values:
    return [{name: float(value)} for value in values]


def _drawn(samples: list[Sample]) -> list[np.ndarray]:
    return [s.drawn for s in samples if s.drawn is not None]


def _true(samples: list[Sample]) -> list[np.ndarray]:
    return [s.true for s in samples if s.true is not None]


def _clip_i(samples: list[Sample], clip: Any) -> Values:
    return _named("clip_i", alignment.clip_i(_drawn(samples), _true(samples), clip))


def _clip_t(samples: list[Sample], clip: Any) -> Values:
    return _named("clip_t", alignment.clip_t(_drawn(samples), [s.caption for s in samples], clip))


def _lpips(samples: list[Sample], lpips: Any) -> Values:
    """At 256 px, as GILL compares pictures."""
    pairs = zip(_drawn(samples), _true(samples), strict=True)
    return [alignment.gill_vist([drawn], [true], None, lpips) for drawn, true in pairs]


def _facts(samples: list[Sample], scorer: Any) -> Values:
    """Of the facts that a caption says, whether the picture shows each; "all": it shows all of these."""
    pixels = np.stack([_resized(s.drawn, WORLD_PX) for s in samples if s.drawn is not None])
    asked = [s.facts for s in samples if s.facts is not None]
    shown = facts_shown(pixels, asked, scorer)
    values = []
    for index, facts in enumerate(asked):
        said = {name: float(shown[name][index]) for name, value in vars(facts).items() if value is not None}
        parts = {f"fact_accuracy/{name}": value for name, value in said.items()}
        values.append({"fact_accuracy": min(said.values()), **parts} if said else {})
    return values


def _resized(pixels: np.ndarray | None, px: int) -> np.ndarray:
    assert pixels is not None
    if pixels.shape[:2] == (px, px):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((px, px), Image.Resampling.LANCZOS))


def _clip_consistency(samples: list[Sample], clip: Any) -> Values:
    pairs = [s.pair for s in samples if s.pair]
    found = consistency.clip_consistency([one for one, _ in pairs], [other for _, other in pairs], clip)
    return _named("clip_consistency", found)


def _efficientnet_consistency(samples: list[Sample], network: Any) -> Values:
    pairs = [s.pair for s in samples if s.pair]
    ones, others = [one for one, _ in pairs], [other for _, other in pairs]
    return _named("efficientnet_consistency", consistency.efficientnet_consistency(ones, others, network))


def _texts(name: str, measure: Callable[[str, str, Any], float]) -> Callable[[list[Sample], Any], Values]:
    def values(samples: list[Sample], part: Any) -> Values:
        return _named(name, [measure(str(s.said), str(s.reference), part) for s in samples])

    return values


def _published(name: str, measure: Callable[[str, str], float]) -> Callable[[list[Sample], Any], Values]:
    def values(samples: list[Sample], part: Any) -> Values:
        return _named(name, [measure(*_published_texts(s)) for s in samples])

    return values


def _published_texts(sample: Sample) -> tuple[str, str]:
    """What metric.py compares of a reply and of the true one."""
    return text.published_text(sample.said_first or ""), text.published_text(sample.reference or "")


def _sbert(samples: list[Sample], encoder: Any) -> Values:
    return _named("sbert", text.sbert([str(s.said) for s in samples], [str(s.reference) for s in samples], encoder))


def _has_pictures(sample: Sample) -> bool:
    return sample.drawn is not None and sample.true is not None


def _has_texts(sample: Sample) -> bool:
    return sample.said is not None and sample.reference is not None


def _has_published_texts(sample: Sample) -> bool:
    """metric.py leaves out what has no true text."""
    return sample.said_first is not None and bool(_published_texts(sample)[1])


def _has_caption(sample: Sample) -> bool:
    return sample.drawn is not None and bool(sample.caption)


def _has_facts(sample: Sample) -> bool:
    return sample.drawn is not None and sample.facts is not None


def _has_pair(sample: Sample) -> bool:
    return sample.pair is not None


Compare = Callable[[list[Sample], Any], Values]
OF_SAMPLES: dict[str, tuple[Callable[[Sample], bool], Compare]] = {
    "clip_i": (_has_pictures, _clip_i),
    "clip_t": (_has_caption, _clip_t),
    "lpips": (_has_pictures, _lpips),
    "fact_accuracy": (_has_facts, _facts),
    "clip_consistency": (_has_pair, _clip_consistency),
    "efficientnet_consistency": (_has_pair, _efficientnet_consistency),
    "rouge_l": (_has_texts, _texts("rouge_l", lambda said, true, _: text.rouge_l([said], [true]))),
    "rouge_l_published": (_has_published_texts, _published("rouge_l_published", text.rouge_l_published)),
    "bleu_1_published": (_has_published_texts, _published("bleu_1_published", partial(text.bleu_published, order=1))),
    "bleu_2_published": (_has_published_texts, _published("bleu_2_published", partial(text.bleu_published, order=2))),
    "meteor": (_has_texts, _texts("meteor", lambda said, true, words: text.meteor([said], [true], words))),
    "sbert": (_has_texts, _sbert),
}
"""Metrics -> which samples they compare, and how."""


def of_row(metric: str, samples: Sequence[Sample], scorers: Scorers) -> dict[str, float]:
    """A metric of all samples of a row, by group. MM-Relevance's has one value a turn, and its mean is returned."""
    values: dict[str, float] = {}
    for group in dict.fromkeys(group for sample in samples for group in sample.groups):
        own = [sample for sample in samples if group in sample.groups]
        if metric == "story_fid_published":
            drawn = [s.drawn for s in own if s.drawn is not None and s.true is not None]
            true = [s.true for s in own if s.drawn is not None and s.true is not None]
            if len(drawn) > 1:
                values[group] = frechet.story_fid_published([drawn], [true], scorers.parts["inception"])
        elif metric == "clip_f1_published":
            texts = [_published_texts(s) for s in own]
            said = [alignment.Turn(text=one, picture=s.drawn) for (one, _), s in zip(texts, own, strict=True)]
            references = [alignment.Turn(text=one, picture=s.true) for (_, one), s in zip(texts, own, strict=True)]
            values[group] = alignment.clip_f1_published(said, references, scorers.parts["clip"])
        elif metric == "mm_relevance":
            clip = scorers.parts["clip"]
            scores = [one for s in own for one in alignment.mm_relevance(*_parts(s), clip)]
            values |= {group: float(np.mean(scores))} if scores else {}
        else:
            raise InvalidRequest("metric", f"metric is {metric!r}, which is none of a row's")
    return values


def _parts(sample: Sample) -> tuple[list[alignment.Part], list[alignment.Part]]:
    """A reply as it was given, and the true one as MMDialog has it: the text, then the picture."""
    true: list[alignment.Part] = [sample.reference] if sample.reference else []
    if sample.true is not None:
        true.append(sample.true)
    return [part for part in sample.parts if len(part)], true
