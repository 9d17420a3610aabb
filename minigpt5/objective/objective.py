"""A batch -> losses: text, picture and caption, one module for every stage of the model (arXiv 2310.02239, 3.3).

Shape letters: B sequences, S positions, H hidden width, P pictures, V vokens, A vokens and what a template writes
after them, N learnt tokens, K captions that are not true of a picture, Q condition positions, D condition width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from minigpt5.config import ModelConfig
from minigpt5.model import prompt
from minigpt5.model.decoders.diffusion import Diffusion
from minigpt5.model.language import LanguageModel, like_lengths, pad, padding_id
from minigpt5.model.mapper import Mapper
from minigpt5.model.pixels import to_tensor
from minigpt5.model.prompt import IGNORED, Segment, Tokens
from minigpt5.model.vision import Vision
from minigpt5.model.vokens import align
from minigpt5.objective.dummy_examples import DummyExamples
from minigpt5.objective.example import Example
from minigpt5.objective.losses import CaptionLoss, LossWeights
from minigpt5.objective.replay_buffer import ReplayBuffer, TensorBatch
from minigpt5.objective.whitening import Whitening

PASS_COST = 64
"""Positions that one more pass of the language model costs as much as, on a CPU."""
REPLAYED_PICTURES = 16
REPLAY_CAPACITY = 24_576
"""Pictures whose states are kept for replay: 70 KB each in the storybook preset, 200 KB with contrasts."""


@dataclass(frozen=True, kw_only=True)
class ReplayedPictures(TensorBatch):
    """What the losses of drawn pictures are computed from, without a pass of the language model."""

    states_PVH: Tensor
    target_PQD: Tensor
    others_PKQD: Tensor | None
    """bfloat16; None without contrasts."""
    latents_PCYX: Tensor | None
    """None where the picture loss did not count yet."""


class Objective(nn.Module):
    """The whole model under its losses. What is trained is decided by requires_grad, outside."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        language: LanguageModel,
        vision: Vision,
        mapper: Mapper,
        diffusion: Diffusion,
        text_encoder: nn.Module,
        *,
        first_timestep: int = 0,
        samples_latents: bool = False,
        keeps_replay: bool = False,
        guidance_dropout: float = 0.1,
    ) -> None:
        """`guidance_dropout`: the share of pictures whose vokens are zeroed, so that the null condition is learnt.
        `samples_latents`: pictures are drawn from the VAE's posterior, as published, not its mode.
        `keeps_replay`: what `replay` learns from is kept, at most REPLAY_CAPACITY pictures.
        `first_timestep`: the picture loss is of this much noise and more, and unweighted. What a picture shows is
        decided there, and min-SNR weights all but drop these steps where the velocity is predicted."""
        super().__init__()
        self.first_timestep, self.samples_latents = first_timestep, samples_latents
        self.guidance_dropout = guidance_dropout
        self.config, self.tokenizer = config, tokenizer
        self.language, self.vision, self.mapper = language, vision, mapper
        self.diffusion, self.text_encoder = diffusion, text_encoder
        self.diffusion.requires_grad_(False)
        self.caption_loss = CaptionLoss(config)
        self.whitening: Whitening | None = None
        self.dummies: DummyExamples | None = None
        """Where workers share out weights: without them a batch skips the parts that none of its examples needs."""
        self.keeps_replay = keeps_replay
        self.replay_buffer: ReplayBuffer[ReplayedPictures] = ReplayBuffer(max_samples=REPLAY_CAPACITY)

    @property
    def device(self) -> torch.device:
        return self.mapper.queries.device

    @torch.no_grad()
    def standardise_captions(self, captions: list[str], *, start_there: bool = False) -> None:
        """Count the caption loss in units of the spread that each feature has over `captions`.

        Positions without a state do not count. `start_there`: what a fresh mapper writes begins at the features' mean
        and spread.
        """
        states_BQD, pooled_BE = self.caption_loss.split(self.text_encoder(captions).float())
        states_ND = states_BQD.flatten(0, 1)
        if self.diffusion.ZERO_IS_EMPTY:
            states_ND = states_ND[states_ND.any(dim=1)]
        if len(captions) == 1:  # one vector has no spread
            pooled_BE = None
        self.caption_loss.standardise(states_ND, pooled_BE)
        if start_there:
            self.mapper.begin_at(states_ND, pooled_BE)

    def forward(self, examples: list[Example], weights: LossWeights) -> dict[str, Tensor]:
        """Losses by name; "loss" is their weighted sum."""
        has_pictures = any(example.drawn for example in examples)
        if self.dummies:
            examples = self.dummies.complete(examples)
        takes_short_cut = self.language.is_frozen and not self.dummies
        bare = [example for example in examples if takes_short_cut and example.is_caption]
        whole = [example for example in examples if not (takes_short_cut and example.is_caption)]
        read = [self._read_captions(bare)] if bare else []
        if whole:
            whole, vokens_PVH, texts_N = self._read_by_length(whole)
            read.append((vokens_PVH, texts_N))
        examples = [*bare, *whole]
        vokens_PVH = torch.cat([vokens for vokens, _ in read]).float()
        texts_N = torch.cat([texts for _, texts in read])
        losses = {"text": texts_N.float().sum() / max(1, len(texts_N))}
        if len(vokens_PVH):
            pictures = self._picture_losses(examples, vokens_PVH, weights, is_kept=has_pictures)
            losses |= pictures if has_pictures else {name: 0 * loss for name, loss in pictures.items()}
        else:  # what is trained takes part in every step, or those who share its gradients would wait for ever
            losses["text"] = losses["text"] + 0 * self.mapper.null_condition().sum()
        return {"loss": weights.total(losses), **losses}

    def outer_parameters(self) -> list[nn.Parameter]:
        """Those that are read by other modules than their own."""
        return [self.language.embedding, *self.language.voken_embeddings.parameters()]

    def whiten_vokens(self, states_PVH: Tensor, conditions_PQD: Tensor, *, noise: float = 0.0) -> None:
        """Train the mapper on white voken states, as `Whitening` has it; `settle` folds it in."""
        self.whitening = Whitening(self.mapper.first_layer, states_PVH, conditions_PQD, noise=noise)

    def settle(self) -> Mapper:
        """A copy of the mapper that takes voken states as they are."""
        mapper = Mapper(self.config).to(self.device)
        mapper.load_state_dict(self.mapper.state_dict())
        if self.whitening:
            self.whitening.fold_into(mapper.first_layer)
        return mapper

    def encode(self, segments: list[Segment]) -> tuple[list[int], list[int]]:
        tokens = prompt.encode(
            segments,
            self.tokenizer,
            self.language.voken_embeddings,
            picture_tokens=self.config.vision.picture_tokens,
            published_quirks=self.config.published_quirks,
        )
        return tokens.ids, tokens.labels

    def _tokens_of(self, example: Example) -> tuple[list[int], list[int]]:
        """Ids and labels."""
        return (example.tokens.ids, example.tokens.labels) if example.tokens else self.encode(example.segments)

    def _read_captions(self, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """As `read`, for bare captions under a frozen body: gradients at the vokens and after them only."""
        encoded = [self._tokens_of(example) for example in examples]
        starts = [ids.index(self.language.voken_embeddings.first) for ids, _ in encoded]
        (ids, labels), start = encoded[0], starts[0]
        ends = {tuple(ids[start:]) for (ids, _), start in zip(encoded, starts, strict=True)}
        assert len(ends) == 1, "all captions end in the picture and what the template writes after it"
        texts = [ids[:start] for (ids, _), start in zip(encoded, starts, strict=True)]
        ids_BS, mask_BS = self._pad(texts, padding_id(self.tokenizer))
        num_vokens = self.config.num_vokens
        states_BAH = self.language.voken_states(ids_BS, mask_BS, next_ids=ids[start + num_vokens :])
        labels_BA = torch.tensor(labels[start:], device=self.device).expand(len(examples), -1)
        return states_BAH[:, :num_vokens], self.text_losses(states_BAH, labels_BA)

    def _read_by_length(self, examples: list[Example]) -> tuple[list[Example], Tensor, Tensor]:
        """`read` with less padding: in several passes where lengths differ much. Returns the examples in the order in
        which they were read, too.

        On a GPU, where nobody has measured it, it is one pass; so it is where workers share out weights, for they call
        every module together.
        """
        if self.device.type != "cpu" or self.dummies:
            return examples, *self.read(examples)
        encoded = [self._tokens_of(example) for example in examples]
        examples = [
            dataclasses.replace(example, tokens=Tokens(ids=ids, labels=labels))
            for example, (ids, labels) in zip(examples, encoded, strict=True)
        ]
        groups = like_lengths([len(ids) for ids, _ in encoded], pass_cost=PASS_COST)
        read = [self.read([examples[index] for index in group]) for group in groups]
        ordered = [examples[index] for group in groups for index in group]
        return ordered, torch.cat([vokens for vokens, _ in read]), torch.cat([texts for _, texts in read])

    def read(self, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """Read whole sequences: the voken states of their pictures (P, V, H), and the losses of their learnt tokens
        (N,)."""
        encoded = [self._tokens_of(example) for example in examples]
        ids_BS, mask_BS = self._pad([ids for ids, _ in encoded], padding_id(self.tokenizer))
        labels_BS, _ = self._pad([labels for _, labels in encoded], IGNORED)
        labels_BS = labels_BS.masked_fill(mask_BS == 0, IGNORED)
        pictures = [picture for example in examples for picture in example.read]
        image_NQH = self._see(pictures) if pictures else None
        embeds_BSH = self.language.embed(ids_BS, image_NQH)
        is_picture_BS = ids_BS == self.language.voken_embeddings.placeholder
        states_BSH = self.language.states(
            embeds_BSH, mask_BS=mask_BS, is_picture_BS=None if image_NQH is None else is_picture_BS
        )
        vokens_PVH, _ = align(states_BSH, ids_BS, self.language.voken_embeddings)
        return vokens_PVH, self.text_losses(states_BSH, F.pad(labels_BS[:, 1:], (0, 1), value=IGNORED))

    def _pad(self, sequences: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
        ids_BS, mask_BS = pad(sequences, value)
        return ids_BS.to(self.device), mask_BS.to(self.device)

    def _see(self, pictures: list[np.ndarray]) -> Tensor:
        """Pictures, or their features -> (N, Q, H)."""
        has_pixels = pictures[0].dtype == np.uint8
        return self.vision(pictures) if has_pixels else self.vision.embed_features(np.stack(pictures))

    def text_losses(self, states_BSH: Tensor, next_BS: Tensor) -> Tensor:
        """Cross-entropy of each next token that is learnt (N,), in reading order; logits are computed there only."""
        is_learnt_BS = next_BS != IGNORED
        return F.cross_entropy(self.language.logits(states_BSH[is_learnt_BS]), next_BS[is_learnt_BS], reduction="none")

    def _picture_losses(
        self, examples: list[Example], vokens_PVH: Tensor, weights: LossWeights, *, is_kept: bool
    ) -> dict[str, Tensor]:
        """`is_kept`: for the replay buffer, where there is one. Workers that share out weights compute the same for a
        batch that is not kept, or the others would wait."""
        captions = [caption for example in examples for caption in example.captions]
        is_null_P = (torch.rand(len(captions)) < (self.guidance_dropout if self.training else 0.0)).to(self.device)
        condition_PQD = self.mapper(vokens_PVH.masked_fill(is_null_P[:, None, None], 0))
        losses: dict[str, Tensor] = {}
        latents_PCYX = None
        keeps = self.training and self.keeps_replay
        if weights.picture or (keeps and self.dummies):  # later, no worker may lack latents to replay
            latents_PCYX = self.to_latents(examples)
        if weights.picture and latents_PCYX is not None:
            losses["picture"] = self.diffusion.training_loss(
                latents_PCYX, condition_PQD, first_timestep=self.first_timestep
            )
        if weights.caption or (keeps and (is_kept or self.dummies)):
            target_PQD = self.text_encoder(captions)
            has_contrasts = weights.contrast and all(example.contrasts for example in examples if example.drawn)
            others_PKQD = self._encode_contrasts(examples) if has_contrasts else None
            if self.dummies and weights.contrast and not has_contrasts:
                self.text_encoder([""])  # other workers call it for their contrasts, and would wait
            losses |= self._caption_losses(condition_PQD, target_PQD, others_PKQD, is_null_P)
            if keeps and is_kept:
                self.store_for_replay(vokens_PVH, target_PQD, others_PKQD, latents_PCYX)
        return losses

    @torch.no_grad()
    def to_latents(self, examples: list[Example]) -> Tensor:
        """The latents of all pictures that examples draw: (P, C, Y, X)."""
        drawn = torch.from_numpy(np.stack([picture for example in examples for picture in example.drawn])).to(
            self.device
        )
        if drawn.dtype == torch.uint8:
            drawn = self.diffusion.to_moments(to_tensor(drawn))
        noise = self.diffusion.noise_like_latents(drawn) if self.samples_latents else None
        return self.diffusion.from_moments(drawn, noise=noise)

    def replay(self, num_pictures: int, weights: LossWeights) -> dict[str, Tensor]:
        """All losses but the text's on remembered states of earlier batches, the picture loss on the first few.

        A step of the mapper costs a tenth of one of the language model, whose vokens move slowly enough for its states
        to stay true for a while."""
        chosen = self.replay_buffer.sample(num_pictures)
        is_null_P = (torch.rand(num_pictures) < self.guidance_dropout).to(self.device)
        states_PVH = torch.cat([one.states_PVH for one in chosen])
        condition_PQD = self.mapper(states_PVH.masked_fill(is_null_P[:, None, None], 0))
        others = [one.others_PKQD for one in chosen if one.others_PKQD is not None]
        has_contrasts = weights.contrast and len(others) == num_pictures
        others_PKQD = torch.cat(others).float() if has_contrasts else None
        target_PQD = torch.cat([one.target_PQD for one in chosen])
        losses = self._caption_losses(condition_PQD, target_PQD, others_PKQD, is_null_P)
        if weights.picture:
            # The picture loss may count from a later step on: pictures remembered before have no latents.
            drawn = [(at, one.latents_PCYX) for at, one in enumerate(chosen) if one.latents_PCYX is not None]
            drawn = drawn[:REPLAYED_PICTURES]
            losses["picture"] = (
                self.diffusion.training_loss(
                    torch.cat([latents for _, latents in drawn]).contiguous(),
                    condition_PQD[[at for at, _ in drawn]],
                    first_timestep=self.first_timestep,
                )
                if drawn
                else 0 * condition_PQD.sum()
            )
        # What is trained takes part in every step: see `forward`.
        losses["caption"] = losses["caption"] + 0 * sum(
            parameter.sum() for parameter in self.language.voken_embeddings.parameters()
        )
        return {"loss": weights.total(losses), **{f"replayed {name}": value for name, value in losses.items()}}

    def _caption_losses(
        self, condition_PQD: Tensor, target_PQD: Tensor, others_PKQD: Tensor | None, is_null_P: Tensor
    ) -> dict[str, Tensor]:
        """Towards the caption's states, or those of no caption; away from those of captions that are not true."""
        null_1QD = self.text_encoder([""])
        losses = {"caption": self.caption_loss(condition_PQD, target_PQD.where(~is_null_P[:, None, None], null_1QD))}
        if others_PKQD is not None and not is_null_P.all():
            told = (states[~is_null_P] for states in (condition_PQD, target_PQD, others_PKQD))
            losses["contrast"] = self.caption_loss.contrast(*told)
        return losses

    def _encode_contrasts(self, examples: list[Example]) -> Tensor:
        """The text encoder's states of what each picture does not show: (P, K, Q, D)."""
        contrasts = [captions for example in examples for captions in example.contrasts]
        states_NQD = self.text_encoder([caption for captions in contrasts for caption in captions])
        return states_NQD.unflatten(0, (len(contrasts), -1))

    def store_for_replay(
        self, vokens_PVH: Tensor, target_PQD: Tensor, others_PKQD: Tensor | None, latents_PCYX: Tensor | None
    ) -> None:
        """Keep a batch's pictures in the place of the oldest."""
        self.replay_buffer.extend(
            ReplayedPictures(
                states_PVH=vokens_PVH.detach(),
                target_PQD=target_PQD,
                others_PKQD=None if others_PKQD is None else others_PKQD.bfloat16(),
                latents_PCYX=None if latents_PCYX is None else latents_PCYX.float(),
            )
        )
