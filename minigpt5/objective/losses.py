"""A batch -> losses: text, picture and caption, one module for every stage of the model (arXiv 2310.02239, 3.3).

Shape letters: B sequences, S positions, H hidden width, P pictures, V vokens, Q condition positions, D condition width,
E width of a caption's one vector.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase

from minigpt5.config import ModelConfig
from minigpt5.model import prompt
from minigpt5.model.decoders.diffusion import Diffusion, normal_like, split_pooled
from minigpt5.model.language import LanguageModel, pad, padding_id
from minigpt5.model.mapper import Mapper
from minigpt5.model.pixels import to_tensor
from minigpt5.model.prompt import IGNORED, Segment
from minigpt5.model.vision import NoEncoder, Vision
from minigpt5.model.vokens import align
from minigpt5.objective.example import Example

WORD_SHARPNESS = 8.0
"""Distances are in units of a word's own size, so that an embedding at its word is e^8 times as near as at none."""
CONTRAST_SHARPNESS = 40.0
"""One fact changes some hundredths to a fifth of a caption's mean squared features."""
WHITENING_RIDGE = 0.1
WHITENING_GAIN = 3.0
"""Gain of a direction that the caption embeddings explain fully."""
WHITENING_RANK = 128
"""Dimensions of the captions' states that the whitening uses."""
REPLAYED_PICTURES = 16
REPLAY_CAPACITY = 24_576
"""Pictures whose states are kept for replay: 70 KB each in the storybook preset, 200 KB with contrasts."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the losses."""

    text: float
    picture: float
    caption: float
    contrast: float = 0.0
    """Weight of telling a picture's caption from those that differ in one fact."""

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of those that there are."""
        return torch.stack([getattr(self, name) * loss for name, loss in losses.items()]).sum()


STAGE1 = LossWeights(text=0.01, picture=1.0, caption=0.1)
STAGE2 = LossWeights(text=0.01, picture=1.0, caption=0.0)


@dataclass(frozen=True, kw_only=True)
class Replayable:
    """What the losses of one drawn picture are computed from, without a pass of the language model."""

    states_VH: Tensor
    target_QD: Tensor
    others_KQD: Tensor | None
    """bfloat16; None without contrasts."""
    latents_CYX: Tensor | None
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
        self.calls_alike = False
        """Every batch calls the same parts in the same order, as workers must that share out weights (ZeRO 3)."""
        self.blanks: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
        """With `calls_alike`: pictures in the form in which the data has those that are read and drawn. Stored features
        and moments do not call the encoders, and what is added must not either."""
        self.keeps_replay = keeps_replay
        self._replay_buffer: list[Replayable] = []
        self._num_replayable_ever = 0
        self._whitening: RemovableHandle | None = None
        self._whiten_HH: Tensor
        self._voken_mean_H: Tensor
        self.register_buffer("caption_scale_D", torch.ones(config.condition_width), persistent=False)
        self.register_buffer("pooled_scale_E", torch.ones(config.condition_pooled), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.mapper.queries.device

    @torch.no_grad()
    def standardise_captions(self, captions: list[str], *, start_there: bool = False) -> None:
        """Take the spread of each feature from `captions`: unscaled, predicting the mean is already a small loss.

        Positions without a state do not count, and the captions' one vectors have a spread of their own.
        `start_there`: what a fresh mapper writes begins at the features' mean and spread.
        """
        states_BQD, pooled_BE = self._split(self.text_encoder(captions).float())
        states_ND = states_BQD.flatten(0, 1)
        if self.diffusion.ZERO_IS_EMPTY:
            states_ND = states_ND[states_ND.any(dim=1)]
        self.caption_scale_D = _spread(states_ND)
        if len(captions) == 1:  # one vector has no spread
            pooled_BE = None
        if pooled_BE is not None:
            self.pooled_scale_E = _spread(pooled_BE)
        if start_there:
            self.mapper.begin_at(states_ND, pooled_BE)

    def _split(self, condition_BQD: Tensor) -> tuple[Tensor, Tensor | None]:
        """A condition -> its states, and the caption's one vector where the model has one."""
        width = self.config.condition_pooled
        return split_pooled(condition_BQD, width) if width else (condition_BQD, None)

    def forward(self, examples: list[Example], weights: LossWeights) -> dict[str, Tensor]:
        """Losses by name; "loss" is their weighted sum."""
        examples, has_pictures = self._complete(examples)
        takes_short_cut = self.body_is_frozen and not self.calls_alike
        bare = [example for example in examples if takes_short_cut and example.is_caption]
        whole = [example for example in examples if not (takes_short_cut and example.is_caption)]
        read = [self._read_captions(bare)] if bare else []
        read += [self.read(whole)] if whole else []
        examples = [*bare, *whole]
        vokens_PVH = torch.cat([vokens for vokens, _ in read]).float()
        losses = {"text": torch.stack([text for _, text in read]).mean()}
        if len(vokens_PVH):
            pictures = self._picture_losses(examples, vokens_PVH, weights, is_kept=has_pictures)
            losses |= pictures if has_pictures else {name: 0 * loss for name, loss in pictures.items()}
        else:  # what is trained takes part in every step, or those who share its gradients would wait for ever
            losses["text"] = losses["text"] + 0 * self.mapper.null_condition().sum()
        return {"loss": weights.total(losses), **losses}

    def _complete(self, examples: list[Example]) -> tuple[list[Example], bool]:
        """Add examples without a loss for pictures that no example reads or draws, where all workers must call the same
        parts. Returns whether an original example draws a picture."""
        has_pictures = any(example.drawn for example in examples)
        if not self.calls_alike:
            return examples, has_pictures
        px = self.config.vision.image_px, self.config.image_px
        black = [np.zeros((side, side, 3), np.uint8) for side in px]
        black = [own if own is not None else other for own, other in zip(self.blanks, black, strict=True)]
        reads = Example(segments=[prompt.text_segment("."), prompt.READ], read=[black[0]], drawn=[], captions=[])
        draws = Example(segments=[prompt.text_segment("."), prompt.DRAW], read=[], drawn=[black[1]], captions=[""])
        completed = list(examples)
        reads_pictures = not isinstance(self.vision.encoder, NoEncoder)
        needs_read = reads_pictures and not any(example.read for example in examples)
        completed += [reads] if needs_read else []
        completed += [] if has_pictures else [draws]
        return completed, has_pictures

    def outer_parameters(self) -> list[nn.Parameter]:
        """Those that are read by other modules than their own."""
        return [self.language.embedding, *self.language.voken_embeddings.parameters()]  # type: ignore[list-item]

    def whiten_vokens(self, states_PVH: Tensor, conditions_PQD: Tensor, *, noise: float = 0.0) -> None:
        """Let `fc` see voken states of unit covariance while it is trained, but for the directions that go with the
        conditions that are to come out, which are larger. What sets one voken apart from another, and one phrasing
        from another, is so much more than what one scene does that the mapper would hardly learn the latter. Its
        function stays what it was; `settle` folds the whitening in.

        `noise`, in units of that spread, is added wherever gradients flow: it is to the mapper what a ridge is to a
        linear regression, and keeps it from learning few captions by heart."""
        states_NH = states_PVH.flatten(0, 1).double()
        mean_H = states_NH.mean(dim=0)
        variance_H, axes_HH = torch.linalg.eigh(torch.cov(states_NH.T))
        variance_H = variance_H + WHITENING_RIDGE * variance_H.median()
        whiten_HH = axes_HH @ (axes_HH / variance_H.sqrt()).T
        white_PVH = (states_PVH.double() - mean_H) @ whiten_HH
        gain_HH = _gain(white_PVH, conditions_PQD)
        self.register_buffer("_whiten_HH", (whiten_HH @ gain_HH).float(), persistent=False)
        self.register_buffer("_voken_mean_H", mean_H.float(), persistent=False)
        unwhiten_HH = torch.linalg.inv(whiten_HH @ gain_HH).float()
        first: nn.Linear = self.mapper.fc[0]  # type: ignore[assignment]
        with torch.no_grad():
            first.bias.add_(first.weight @ self._voken_mean_H)
            first.weight.copy_(first.weight @ unwhiten_HH.T)

        def whiten(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            with exactly(self.device):
                states_PVH = (inputs[0].float() - self._voken_mean_H) @ self._whiten_HH
            return states_PVH + noise * normal_like(states_PVH) if torch.is_grad_enabled() else states_PVH

        self._whitening = first.register_forward_pre_hook(whiten)

    def settle(self) -> Mapper:
        """A copy of the mapper that takes voken states as they are."""
        mapper = Mapper(self.config).to(self.device)
        mapper.load_state_dict(self.mapper.state_dict())
        if self._whitening:
            first: nn.Linear = mapper.fc[0]  # type: ignore[assignment]
            with torch.no_grad():
                first.weight.copy_(first.weight @ self._whiten_HH.T)
                first.bias.sub_(first.weight @ self._voken_mean_H)
        return mapper

    @property
    def body_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.language.body.parameters())

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
        """Bare captions under a frozen body: gradients at the vokens only, and one position of logits."""
        first = self.language.voken_embeddings.first
        whole = [self._tokens_of(example)[0] for example in examples]
        ids_BS, mask_BS = self._pad([ids[: ids.index(first)] for ids in whole], padding_id(self.tokenizer))
        states_BVH = self.language.voken_states(ids_BS, mask_BS)
        first_B = torch.full((len(examples),), first, device=self.device)
        return states_BVH, F.cross_entropy(self.language.logits(states_BVH[:, 0]), first_B)

    def read(self, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """Read whole sequences: the voken states of their pictures (P, V, H), and the text loss. Logits are computed at
        the learnt positions only."""
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
        return vokens_PVH, self.text_loss(states_BSH, labels_BS)

    def _pad(self, sequences: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
        ids_BS, mask_BS = pad(sequences, value)
        return ids_BS.to(self.device), mask_BS.to(self.device)

    def _see(self, pictures: list[np.ndarray]) -> Tensor:
        """Pictures, or their features -> (N, Q, H)."""
        has_pixels = pictures[0].dtype == np.uint8
        return self.vision(pictures) if has_pixels else self.vision.embed_features(np.stack(pictures))

    def text_loss(self, states_BSH: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross-entropy of the next token where it is learnt; logits are computed there only."""
        next_BS = F.pad(labels_BS[:, 1:], (0, 1), value=IGNORED)
        is_learnt_BS = next_BS != IGNORED
        return F.cross_entropy(self.language.logits(states_BSH[is_learnt_BS]), next_BS[is_learnt_BS])

    def _picture_losses(
        self, examples: list[Example], vokens_PVH: Tensor, weights: LossWeights, *, is_kept: bool
    ) -> dict[str, Tensor]:
        """`is_kept`: for the replay buffer, where there is one."""
        captions = [caption for example in examples for caption in example.captions]
        is_null_P = (torch.rand(len(captions)) < (self.guidance_dropout if self.training else 0.0)).to(self.device)
        condition_PQD = self.mapper(vokens_PVH.masked_fill(is_null_P[:, None, None], 0))
        losses: dict[str, Tensor] = {}
        latents_PCYX = None
        if weights.picture:
            latents_PCYX = self.to_latents(examples)
            losses["picture"] = self.diffusion.training_loss(
                latents_PCYX, condition_PQD, first_timestep=self.first_timestep
            )
        keeps = self.training and self.keeps_replay and is_kept
        if weights.caption or keeps:
            target_PQD = self.text_encoder(captions)
            has_contrasts = weights.contrast and all(example.contrasts for example in examples if example.drawn)
            others_PKQD = self._encode_contrasts(examples) if has_contrasts else None
            losses |= self._caption_losses(condition_PQD, target_PQD, others_PKQD, is_null_P)
            if keeps:
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

    def words(self, examples: list[Example]) -> dict[str, Tensor]:
        """Teach each embedding of a read picture to be that of a word of what the picture shows, in order.

        A picture then reads like a text; the tokens of the batch are what each one is told apart from.
        """
        image_NQH = self.vision([picture for example in examples for picture in example.read]).float()
        filler = self.tokenizer.encode(".", add_special_tokens=False)[:1] * image_NQH.shape[1]
        said = [self.tokenizer.encode(text, add_special_tokens=False) for example in examples for text in example.shown]
        ids_NQ = torch.tensor([(ids + filler)[: image_NQH.shape[1]] for ids in said], device=self.device)
        seen_W, target_NQ = ids_NQ.unique(return_inverse=True)
        words_WH = self.language.embed(seen_W[None])[0].detach().float()
        distance_NQW = (image_NQH[:, :, None] - words_WH).square().sum(-1) / words_WH.square().sum(-1).mean()
        chosen = F.cross_entropy(-WORD_SHARPNESS * distance_NQW.flatten(0, 1), target_NQ.flatten())
        near = distance_NQW.gather(2, target_NQ[..., None]).mean()
        return {"loss": chosen + near, "words": chosen, "distance": near}

    @property
    def num_replayable(self) -> int:
        return len(self._replay_buffer)

    def replay(self, num_pictures: int, weights: LossWeights) -> dict[str, Tensor]:
        """All losses but the text's on remembered states of earlier batches, the picture loss on the first few.

        A step of the mapper costs a tenth of one of the language model, whose vokens move slowly enough for its states
        to stay true for a while. The buffer is not checkpointed: a resumed run fills it again."""
        chosen = [self._replay_buffer[i] for i in torch.randint(len(self._replay_buffer), (num_pictures,)).tolist()]
        is_null_P = (torch.rand(num_pictures) < self.guidance_dropout).to(self.device)
        states_PVH = torch.stack([one.states_VH for one in chosen])
        condition_PQD = self.mapper(states_PVH.masked_fill(is_null_P[:, None, None], 0))
        others = [one.others_KQD for one in chosen if one.others_KQD is not None]
        has_contrasts = weights.contrast and len(others) == num_pictures
        others_PKQD = torch.stack(others).float() if has_contrasts else None
        target_PQD = torch.stack([one.target_QD for one in chosen])
        losses = self._caption_losses(condition_PQD, target_PQD, others_PKQD, is_null_P)
        if weights.picture:
            # The picture loss may count from a later step on: pictures remembered before have no latents.
            drawn = [(at, one.latents_CYX) for at, one in enumerate(chosen) if one.latents_CYX is not None]
            drawn = drawn[:REPLAYED_PICTURES]
            losses["picture"] = (
                self.diffusion.training_loss(
                    torch.stack([latents for _, latents in drawn]),
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
            losses["contrast"] = self._contrast_loss(*told)
        return losses

    def _encode_contrasts(self, examples: list[Example]) -> Tensor:
        """The text encoder's states of what each picture does not show: (P, K, Q, D)."""
        contrasts = [captions for example in examples for captions in example.contrasts]
        states_NQD = self.text_encoder([caption for captions in contrasts for caption in captions])
        return states_NQD.unflatten(0, (len(contrasts), -1))

    def _contrast_loss(self, condition_PQD: Tensor, target_PQD: Tensor, others_PKQD: Tensor) -> Tensor:
        """Cross-entropy of the nearest caption being the right one: a mean squared error is content with a blend of
        captions that share most of their words, and a single word is what the picture depends on."""
        candidates = torch.cat([target_PQD[:, None], others_PKQD], dim=1)
        errors = self._squared_errors(condition_PQD[:, None], candidates)
        distance_PK = torch.stack([error.mean(dim=tuple(range(2, error.ndim))) for error in errors]).mean(dim=0)
        right_P = torch.zeros(len(distance_PK), dtype=torch.long, device=self.device)
        return F.cross_entropy(-CONTRAST_SHARPNESS * distance_PK, right_P)

    def store_for_replay(
        self, vokens_PVH: Tensor, target_PQD: Tensor, others_PKQD: Tensor | None, latents_PCYX: Tensor | None
    ) -> None:
        """Keep a batch's pictures in the place of the oldest."""
        vokens_PVH = vokens_PVH.detach()
        for at in range(len(vokens_PVH)):
            one = Replayable(
                states_VH=vokens_PVH[at],
                target_QD=target_PQD[at],
                others_KQD=None if others_PKQD is None else others_PKQD[at].bfloat16(),
                latents_CYX=None if latents_PCYX is None else latents_PCYX[at].float(),
            )
            place = self._num_replayable_ever % REPLAY_CAPACITY
            self._replay_buffer[place : place + 1] = [one]
            self._num_replayable_ever += 1

    def caption_loss(self, condition_PQD: Tensor, target_PQD: Tensor) -> Tensor:
        """Mean squared error to the text encoder's states of the caption; plain, as published, until standardised.

        Where the caption has one vector too, the mean of the states' error and the vector's. Positions of zeros count:
        the mapper learns to write next to nothing there.
        """
        return torch.stack([error.mean() for error in self._squared_errors(condition_PQD, target_PQD)]).mean()

    def _squared_errors(self, condition_PQD: Tensor, target_PQD: Tensor) -> list[Tensor]:
        """Of the states and, where there is one, of the caption's one vector, each in units of its spread."""
        states_PQD, pooled_PE = self._split(condition_PQD)
        true_states_PQD, true_pooled_PE = self._split(target_PQD)
        errors = [((states_PQD - true_states_PQD) / self.caption_scale_D).square()]
        if pooled_PE is not None and true_pooled_PE is not None:
            errors.append(((pooled_PE - true_pooled_PE) / self.pooled_scale_E).square())
        return errors


def _spread(values_ND: Tensor) -> Tensor:
    """The standard deviation of each feature, at least a tenth of the median of those that vary: a feature may be
    constant, as half of Stable Diffusion 3's are without T5."""
    spread_D = values_ND.std(dim=0)
    varying = spread_D[spread_D > 0]
    return spread_D.clamp(min=0.1 * float(varying.median()) if len(varying) else 1.0)


def exactly(device: torch.device) -> AbstractContextManager[None]:
    """Without autocast, on a device that has it."""
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else nullcontext()


def _gain(white_PVH: Tensor, conditions_PQD: Tensor) -> Tensor:
    """Stretches white voken states by 1 + WHITENING_GAIN times their canonical correlation (Hotelling, 1936) with the
    conditions: (H, H)."""
    num_pictures, num_vokens, width = white_PVH.shape
    centred_PN = conditions_PQD.flatten(1).double()
    centred_PN = centred_PN - centred_PN.mean(dim=0)
    scores_PK = torch.linalg.svd(centred_PN, full_matrices=False).U[:, :WHITENING_RANK] * num_pictures**0.5
    together_HK = torch.einsum("pvh,pk->hk", white_PVH, scores_PK) / (num_pictures * num_vokens)
    axes_HK, correlation_K, _ = torch.linalg.svd(together_HK, full_matrices=False)
    stretch_K = WHITENING_GAIN * correlation_K.clamp(max=1)
    return torch.eye(width, dtype=torch.float64) + axes_HK @ (axes_HK * stretch_K).T
