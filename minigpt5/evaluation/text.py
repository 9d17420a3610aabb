"""Texts against reference texts: BLEU, ROUGE-L, METEOR and S-BERT, and the published code's own forms of two of them.

A metric takes as many references as predictions, one for each. The extra `evaluation` brings the libraries.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from minigpt5.errors import BaseModelNotFound, InvalidRequest
from minigpt5.model.base_models import resolve
from minigpt5.model.libraries import load_auto, load_base_tokenizer

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

SENTENCE_TOKENS = 256
"""Tokens that all-MiniLM-L6-v2 reads of a text, as sentence-transformers sets it."""
WORDNET_FILES = [
    name for part in ("noun", "verb", "adj", "adv") for name in (f"index.{part}", f"data.{part}", f"{part}.exc")
]
NUM_LEXICOGRAPHER_FILES = 45


def check_pairs(predictions: Sized, references: Sized) -> None:
    """Raise InvalidRequest unless there are as many predictions as references, and some."""
    if len(predictions) != len(references) or not len(predictions):
        raise InvalidRequest(
            "predictions",
            f"{len(predictions)} predictions and {len(references)} references: give one for each, at least one",
        )


def bleu(predictions: Sequence[str], references: Sequence[str], *, order: int) -> float:
    """BLEU of a corpus up to n-grams of `order` words, from 0 to 1: sacreBLEU's 13a tokens, no smoothing."""
    from torchmetrics.functional.text import sacre_bleu_score

    check_pairs(predictions, references)
    score = sacre_bleu_score(list(predictions), [[one] for one in references], n_gram=order, tokenize="13a")
    return float(score)


def bleu_published(prediction: str, reference: str, *, order: int) -> float:
    """BLEU as MiniGPT-5's metric.py computes it: of one text, and over its *characters*, since it gives nltk strings
    where nltk takes lists of words. Never compare it with BLEU over words. An empty prediction has 0."""
    from nltk.translate.bleu_score import sentence_bleu

    if not prediction:
        return 0.0
    with warnings.catch_warnings():  # nltk warns that a text without a common n-gram has 0
        warnings.simplefilter("ignore", UserWarning)
        return float(sentence_bleu([reference], prediction, weights=(1 / order,) * order))


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1, from 0 to 1: lower case, letters and digits alone, no stemmer."""
    from torchmetrics.functional.text.rouge import rouge_score

    check_pairs(predictions, references)
    return float(rouge_score(list(predictions), list(references), rouge_keys="rougeL")["rougeL_fmeasure"])


def rouge_l_published(prediction: str, reference: str) -> float:
    """ROUGE-L F1 as the package rouge computes it, which metric.py uses: case and punctuation count, a full stop ends a
    sentence, and a word counts once. It is the summary's form, over the union of all sentences' common words."""
    predicted, true = ([one.split() for one in text.split(".") if one.strip()] for text in (prediction, reference))
    num_predicted, num_true = (len({word for one in text for word in one}) for text in (predicted, true))
    if not num_predicted or not num_true:
        return 0.0
    common = {word for one in true for other in predicted for word in _longest_common(one, other)}
    precision, recall = len(common) / num_predicted, len(common) / num_true
    return 2 * precision * recall / (precision + recall + 1e-8)


def _longest_common(one: Sequence[str], other: Sequence[str]) -> Iterator[str]:
    """Yield the words of a longest common subsequence, the last one first. Of several it is the one that gives up the
    end of `other` first, as the package rouge does."""
    lengths = np.zeros((len(one) + 1, len(other) + 1), int)
    for i, word in enumerate(one, 1):
        for j, again in enumerate(other, 1):
            lengths[i, j] = lengths[i - 1, j - 1] + 1 if word == again else max(lengths[i - 1, j], lengths[i, j - 1])
    i, j = len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            yield one[i]
        elif lengths[i - 1, j] > lengths[i, j - 1]:
            i -= 1
        else:
            j -= 1


def load_wordnet(folder: str | Path = "/usr/share/wordnet") -> WordNetCorpusReader:
    """Open a WordNet database in Princeton's form, for `meteor`; the default is where Debian's wordnet-base has it.
    Raises BaseModelNotFound."""
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    folder = Path(folder).absolute()
    missing = [name for name in WORDNET_FILES if not (folder / name).is_file()]
    if missing:
        raise BaseModelNotFound(
            f"{folder} is no WordNet database, it lacks {', '.join(missing)}: run `apt-get install wordnet-base`, or "
            "give the folder dict/ of Princeton's WordNet 3.0"
        )

    if str(folder) not in nltk.data.path:  # nltk reads from folders of this list alone
        nltk.data.path.append(str(folder))

    class Reader(WordNetCorpusReader):
        """Debian leaves out lexnames, the names of the files that lexicographers wrote. METEOR reads none of them."""

        def open(self, file: str) -> Any:
            if file == "lexnames":
                return io.StringIO("".join(f"{number:02} {number} 0\n" for number in range(NUM_LEXICOGRAPHER_FILES)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """No mapping to another version of WordNet, which only other languages need."""

    with warnings.catch_warnings():  # nltk warns that there are no languages but English
        warnings.simplefilter("ignore", UserWarning)
        return Reader(str(folder), omw_reader=None)


def meteor(predictions: Sequence[str], references: Sequence[str], wordnet: WordNetCorpusReader) -> float:
    """Mean METEOR, from 0 to 1, by nltk (alpha 0.9, beta 3, gamma 0.5): equal words, stems, then WordNet's synonyms.

    nltk looks synonyms up by the *stems* of words, so "auto" is a synonym of "car", and
    "automobile", whose stem is "automobil", is not."""
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score

    check_pairs(predictions, references)
    words = NLTKWordTokenizer().tokenize  # word_tokenize would want a sentence model too
    scores = [
        single_meteor_score(words(true), words(predicted), wordnet=wordnet)
        for predicted, true in zip(predictions, references, strict=True)
    ]
    return float(np.mean(scores))


class SentenceEncoder:
    """all-MiniLM-L6-v2 as S-BERT uses it: the mean of a text's states, of length 1. Raises BaseModelNotFound."""

    def __init__(self, folder: str = "minilm-l6", *, batch_size: int = 32) -> None:
        """`folder`: a base-model id or a folder."""
        from transformers import AutoModel

        path = resolve(folder)
        self.tokenizer: Any = load_base_tokenizer(path)
        model = load_auto(AutoModel, path, may_lack=("pooler.",), dtype=torch.float32)
        self.model: Any = model.eval().requires_grad_(False)
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, D), each of length 1."""
        batches = []
        for start in range(0, len(texts), self.batch_size):
            batch = list(texts[start : start + self.batch_size])
            tokens = self.tokenizer(
                batch, padding=True, truncation=True, max_length=SENTENCE_TOKENS, return_tensors="pt"
            ).to(self.model.device)
            mask_BT1 = tokens["attention_mask"][..., None]
            states_BTD = self.model(**tokens).last_hidden_state * mask_BT1
            batches.append(states_BTD.sum(1) / mask_BT1.sum(1))
        return torch.nn.functional.normalize(torch.cat(batches), dim=-1)


def sbert(predictions: Sequence[str], references: Sequence[str], encoder: SentenceEncoder) -> np.ndarray:
    """S-BERT similarity: the cosine of each prediction with its reference, (B,)."""
    check_pairs(predictions, references)
    return (encoder(predictions) * encoder(references)).sum(-1).double().cpu().numpy()


def published_text(reply: str) -> str:
    """The part of a reply, or of a true one, that metric.py compares: up to the first voken, without "###"; nothing
    where it is punctuation alone."""
    text = reply.replace("###", "").split("[IMG0]")[0].strip()
    return text if re.search(r"[^!-/:-@\[-`{-~]", text) else ""
