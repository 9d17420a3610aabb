"""Metrics of texts, against formulas written out here, values of other libraries, and hand-made cases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from minigpt5.errors import BaseModelNotFound, InvalidRequest
from minigpt5.evaluation.text import (
    WORDNET_FILES,
    SentenceEncoder,
    bleu,
    bleu_published,
    load_wordnet,
    meteor,
    published_text,
    rouge_l,
    rouge_l_published,
    sbert,
)

PREDICTED = "the cat sat on the mat"
TRUE = "the cat lay on a mat today"


def bleu_by_hand(predicted: Sequence[str], true: Sequence[str], order: int) -> float:
    """Papineni's formula for one text and one reference."""
    logs = []
    for n in range(1, order + 1):
        counts, true_counts = (Counter(zip(*(one[i:] for i in range(n)), strict=False)) for one in (predicted, true))
        logs.append(math.log((counts & true_counts).total() / counts.total()))
    return min(1.0, math.exp(1 - len(true) / len(predicted))) * math.exp(sum(logs) / order)


@pytest.mark.parametrize("order", [1, 2])
def test_bleu_is_papinenis(order: int) -> None:
    assert bleu([PREDICTED], [TRUE], order=order) == pytest.approx(bleu_by_hand(PREDICTED.split(), TRUE.split(), order))


def test_bleu_counts_over_the_corpus_and_parts_punctuation() -> None:
    """Four of five words over both, never the mean of two texts; "b!" is two words."""
    assert bleu(["a b!", "c d"], ["a b!", "c e"], order=1) == pytest.approx(4 / 5)


@pytest.mark.parametrize("order", [1, 2])
def test_published_bleu_is_over_characters(order: int) -> None:
    expected = bleu_by_hand(list(PREDICTED), list(TRUE), order)
    assert bleu_published(PREDICTED, TRUE, order=order) == pytest.approx(expected)
    assert expected > bleu([PREDICTED], [TRUE], order=order)


def test_published_bleu_of_nothing_is_zero() -> None:
    assert bleu_published("", TRUE, order=1) == 0
    assert bleu_published("z", "abc", order=1) == 0


def test_rouge_l_is_f1_of_the_longest_common_subsequence() -> None:
    """the cat on mat: 4 of 6 and of 7 words; case and punctuation do not count."""
    assert rouge_l([PREDICTED], [TRUE]) == pytest.approx(2 * 4 / (6 + 7))
    assert rouge_l(["The CAT.", "x"], ["the cat", "y"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        ("the cat sat on the mat. It was happy.", "The cat lay on a mat. it was happy today.", 0.555555550617284),
        ("a b c d a b", "b a d c a", 0.4999999950000001),
        ("x", "x", 0.999999995),
        ("the quick fox. jumps over the dog", "over the dog jumps the quick. fox", 0.8333333283333335),
    ],
)
def test_published_rouge_l_is_that_of_the_package_rouge(predicted: str, true: str, expected: float) -> None:
    """The values are those of `Rouge().get_scores` of rouge 1.0.1, which metric.py calls."""
    assert rouge_l_published(predicted, true) == pytest.approx(expected, abs=1e-12)


def test_published_rouge_l_of_nothing_is_zero() -> None:
    assert rouge_l_published("...", TRUE) == 0


@pytest.fixture
def wordnet_folder(tmp_path: Path) -> Path:
    """A database of one set of synonyms, in Princeton's form."""
    for name in WORDNET_FILES:
        (tmp_path / name).write_text("")
    (tmp_path / "data.noun").write_text("00000000 06 n 02 car 0 auto 0 000 | a vehicle  \n")
    (tmp_path / "index.noun").write_text("auto n 1 0 1 0 00000000  \ncar n 1 0 1 0 00000000  \n")
    return tmp_path


@pytest.mark.parametrize(
    ("predicted", "true", "chunks", "matches"),
    [
        ("the auto", "the car", 1, 2),
        ("runs car", "car running", 2, 2),  # stems
    ],
)
def test_meteor_counts_synonyms_and_stems(
    wordnet_folder: Path, predicted: str, true: str, chunks: int, matches: int
) -> None:
    """All words match, so the score is the penalty's: 1 - 0.5 (chunks / matches)^3."""
    wordnet = load_wordnet(wordnet_folder)
    assert meteor([predicted], [true], wordnet) == pytest.approx(1 - 0.5 * (chunks / matches) ** 3)


def test_meteor_weighs_recall_nine_to_one(wordnet_folder: Path) -> None:
    """One of two words predicted: P 1, R 1/2, one chunk of one match, which halves it. The mean is over texts."""
    f_mean = 1 * 0.5 / (0.9 * 1 + 0.1 * 0.5)
    scores = meteor(["car", "sky"], ["car park", "sea"], load_wordnet(wordnet_folder))
    assert scores == pytest.approx(f_mean * 0.5 / 2)


def test_a_folder_without_wordnet_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(BaseModelNotFound, match="lacks index.noun.*apt-get install wordnet-base"):
        load_wordnet(tmp_path)


def test_sbert_finds_what_is_meant() -> None:
    """The cosine that two publishers' MiniLM give; batches and padding change nothing."""
    encoder = SentenceEncoder(batch_size=2)
    near, far, same = sbert(
        ["A cat sits on a mat.", "A cat sits on a mat.", "a"],
        ["A kitten lies on a rug.", "The stock market fell sharply on Tuesday.", "a"],
        encoder,
    )
    assert near > 0.5 > 0.2 > far
    assert same == pytest.approx(1)
    alone = sbert(["A cat sits on a mat."], ["A kitten lies on a rug."], encoder)
    assert alone[0] == pytest.approx(near, abs=1e-5)


def test_published_text_ends_at_the_first_voken() -> None:
    assert published_text("A fox. [IMG0][IMG1] ###") == "A fox."
    assert published_text(" ... ###") == published_text("[IMG0]") == ""


@pytest.mark.parametrize(("predicted", "true"), [([], []), (["a"], ["a", "b"])])
def test_pairs_must_be_pairs(predicted: list[str], true: list[str]) -> None:
    with pytest.raises(InvalidRequest, match=f"{len(predicted)} predictions and {len(true)} references"):
        rouge_l(predicted, true)
