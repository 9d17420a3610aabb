"""The language model with its voken rows and, in stage 2, its adapter: embeddings in, last hidden states out.

Shape letters: B sequences, S positions, H hidden width, V vokens, N input pictures, Q embeddings of one picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    DynamicCache,
    PreTrainedTokenizerBase,
)
from transformers.models.gemma3.modeling_gemma3 import (
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)

from minigpt5.config import LoraConfig, ModelConfig
from minigpt5.errors import ModelFolderError
from minigpt5.model import libraries
from minigpt5.model.chat_template import protect_control_tokens
from minigpt5.model.packed_linear import can_pack
from minigpt5.model.packing import CodesByLayer, pack_body, pack_head
from minigpt5.model.positions import grid_positions, last_seen
from minigpt5.model.prefix import AnyPrefix, begin, new_prefix
from minigpt5.model.vision_language import is_vision_language
from minigpt5.model.vokens import PLACEHOLDER, VokenEmbeddings, voken_names
from minigpt5.model.weights import load_quietly, stored_dtype
from minigpt5.types import TextPrecision


def load_tokenizer(folder: str | Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The base tokenizer with the vokens and the placeholder added after its own tokens."""
    tokenizer = libraries.load_base_tokenizer(folder)
    if len(tokenizer) != config.vocabulary:
        raise ModelFolderError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens but the model was made for {config.vocabulary}: "
            "use the base model that config.json names"
        )
    if config.template == "chat":
        protect_control_tokens(tokenizer)
    tokenizer.add_tokens([*voken_names(config.num_vokens), PLACEHOLDER], special_tokens=True)
    first = tokenizer.convert_tokens_to_ids(voken_names(1)[0])
    if first != config.vocabulary:
        raise ModelFolderError(
            f"the tokenizer in {folder} gives [IMG0] the id {first} but its {config.vocabulary} tokens end before: "
            "its ids have gaps, or it has a token of this name"
        )
    return tokenizer


def load_base(folder: str | Path, *, has_weights: bool = True, keeps_dtype: bool = False) -> Any:
    """transformers' own model, frozen, in float32: a causal language model or a vision-language model. Without
    `has_weights` it lies on the meta device, from its config file alone. `keeps_dtype`: see `stored_dtype`."""
    load_quietly()
    auto = AutoModelForImageTextToText if is_vision_language(folder) else AutoModelForCausalLM
    if has_weights:
        dtype = stored_dtype(folder) if keeps_dtype else torch.float32
        base = libraries.load_auto(auto, folder, dtype=dtype)
    else:
        config = libraries.load_base_config(folder)
        with torch.device("meta"):  # where no other way to run a mixture of experts gives shapes
            base = auto.from_config(config, dtype=torch.float32, experts_implementation="batched_mm")
    return base.eval().requires_grad_(False)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill masked positions with."""
    return next((one for one in (tokenizer.eos_token_id, tokenizer.pad_token_id) if one is not None), 0)


class LanguageModel(nn.Module):
    """A causal transformer whose vocabulary is widened by VokenEmbeddings.

    A base model's own embedding and head are called as they are: they may scale, have a bias, or share one matrix.
    Rows that pad the base's matrices beyond its tokenizer are never read or written: the vokens take their ids.
    """

    def __init__(
        self,
        body: nn.Module,
        head: nn.Module,
        voken_embeddings: VokenEmbeddings,
        *,
        grid_side: int = 0,
        sees_whole_pictures: bool = False,
    ) -> None:
        """`grid_side` and `sees_whole_pictures`: as in VisionConfig."""
        super().__init__()
        self.grid_side, self.sees_whole_pictures = grid_side, sees_whole_pictures
        self.body: Any = body
        """The transformer, with or without an adapter around it."""
        self.head: Any = head
        """The base model's output layer, from states to logits."""
        self.voken_embeddings = voken_embeddings
        self.prefix: AnyPrefix | None = None
        """What stands before every sequence, where prefix tuning trained it."""
        self._packed_head: nn.Module | None = None

    @classmethod
    def from_base(cls, folder: str | Path, config: ModelConfig) -> LanguageModel:
        """Read the frozen base model; the voken rows are zero until they are loaded or initialised.

        Raises ModelFolderError where the base model does not have the sizes of `config`.
        """
        return cls.from_causal(load_base(folder), config, folder)

    @classmethod
    def from_causal(cls, causal: Any, config: ModelConfig, folder: str | Path) -> LanguageModel:
        """Widen transformers' own model, which was read from `folder`; of a vision-language model, its text half.

        Raises as `from_base` does.
        """
        rows, hidden = causal.get_input_embeddings().weight.shape
        if rows < config.vocabulary or hidden != config.hidden:
            raise ModelFolderError(
                f"the language model in {folder} has {rows} tokens of width {hidden} but config.json says "
                f"{config.vocabulary} of width {config.hidden}: use the base model that config.json names"
            )
        voken_embeddings = VokenEmbeddings(config.vocabulary, config.num_vokens, config.hidden)
        body = causal.get_decoder() if hasattr(causal.config, "vision_config") else causal.base_model
        return cls(
            body,
            causal.get_output_embeddings(),
            voken_embeddings,
            grid_side=config.vision.grid_side,
            sees_whole_pictures=config.vision.sees_whole_pictures,
        )

    @torch.no_grad()
    def initialise_vokens(self, *, seed: int) -> None:
        """Give the vokens rows like those of other tokens."""
        base_ids = torch.arange(self.voken_embeddings.first, device=self.embedding.device)
        embedded_TH = self.body.get_input_embeddings()(base_ids)
        self.voken_embeddings.initialise(embedded_TH, self.head.weight[base_ids], seed=seed)

    @torch.no_grad()
    def replace_vocabulary(self, embedding_TH: Tensor, head_TH: Tensor) -> None:
        """Other rows than the base model's own: published checkpoints carry theirs, which training has moved."""
        if self.head.weight is self.embedding:
            self.head.weight = nn.Parameter(self.embedding.clone(), requires_grad=False)
        self.embedding[: len(embedding_TH)] = embedding_TH.to(self.embedding)
        self.head.weight[: len(head_TH)] = head_TH.to(self.head.weight)

    @property
    def embedding(self) -> nn.Parameter:
        return self.body.get_input_embeddings().weight

    def add_adapter(self, lora: LoraConfig) -> None:
        """Put a fresh trainable LoRA on the frozen body."""
        peft_config = PeftLoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
        )
        with _peft_is_quiet():
            self.body = get_peft_model(self.body, peft_config)

    def add_prefix(self, num_tokens: int, *, context_tokens: int) -> None:
        """Put a fresh trainable prefix before the frozen body. Raises ModelFolderError where it takes none."""
        if self.sees_whole_pictures:
            raise ModelFolderError(
                "in this language model pictures see all of themselves, and no prefix: train an adapter"
            )
        self.prefix = new_prefix(self.body, num_tokens, context_tokens=context_tokens).to(self.embedding.device)

    @property
    def is_frozen(self) -> bool:
        """Whether nothing that texts are read with is trained; rows of vokens may be."""
        parts = [part for part in (self.body, self.prefix) if part is not None]
        return not any(parameter.requires_grad for part in parts for parameter in part.parameters())

    def num_read(self, cache: Cache) -> int:
        """Tokens that a cache has read, without the prefix."""
        return max(0, cache.get_seq_length() - (self.prefix.num_tokens if self.prefix else 0))

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them (arXiv 1604.06174)."""
        self.body.gradient_checkpointing_enable({"use_reentrant": False})
        self.body.train()  # transformers does so in training mode alone

    def load_adapter(self, folder: Path, *, is_trained: bool = False) -> None:
        """Read an adapter in PEFT's format."""
        with _peft_is_quiet():
            self.body = PeftModel.from_pretrained(self.body, str(folder), is_trainable=is_trained)

    def merge_adapter(self) -> None:
        """Fold the adapter into the body: faster, and no longer to be saved apart."""
        self.body = self.body.merge_and_unload().requires_grad_(False)

    def pack(self, precision: TextPrecision = "float32", codes: CodesByLayer | None = None) -> None:
        """Make it quicker on the CPU, for inference alone: see packing.py. `codes`: the base's own, for "int4"."""
        self.body = pack_body(self.body, precision, codes or {})
        if type(self.head) is nn.Linear and can_pack(self.head.weight):
            rows = slice(self.voken_embeddings.first)
            bias = None if self.head.bias is None else self.head.bias[rows]
            self._packed_head = pack_head(self.head.weight[rows], bias, precision)
            if self.head.weight is not self.embedding:
                self.head = self._packed_head  # float32 rows that nothing reads any more

    def embed(self, ids_BS: Tensor, image_NQH: Tensor | None = None) -> Tensor:
        """Token ids -> embeddings; placeholders take the pictures' embeddings, in reading order: (B, S, H).

        Where those have features for later layers too, the answer is as wide as they are; see `body_inputs`.
        """
        ids_BS = ids_BS.to(self.embedding.device)
        embeds_BSH = self.voken_embeddings.embed(ids_BS, self.body.get_input_embeddings())
        if image_NQH is None:
            return embeds_BSH
        is_placeholder_BS = ids_BS == self.voken_embeddings.placeholder
        embeds_BSH = F.pad(embeds_BSH, (0, image_NQH.shape[-1] - embeds_BSH.shape[-1]))
        return embeds_BSH.masked_scatter(is_placeholder_BS[..., None], image_NQH.flatten(0, 1).to(embeds_BSH))

    def positions(self, is_picture_BS: Tensor) -> Tensor | None:
        """Where embeddings of pictures are -> positions as the body takes them, (3, B, S); None: it counts itself."""
        return grid_positions(is_picture_BS, self.grid_side) if self.grid_side else None

    def last_seen(self, is_picture_BS: Tensor) -> Tensor | None:
        """Where embeddings of pictures are -> the last place that each token sees, (B, S); None: its own."""
        return last_seen(is_picture_BS) if self.sees_whole_pictures else None

    def states(
        self,
        embeds_BSH: Tensor,
        *,
        mask_BS: Tensor | None = None,
        cache: Cache | None = None,
        positions_BS: Tensor | None = None,
        is_picture_BS: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states, after the final norm. A cache is read and extended: `mask_BS` then covers it too.

        `is_picture_BS`: where embeddings of pictures are, in sequences that are read whole.
        """
        if self.prefix:
            cache = DynamicCache() if cache is None else cache
            mask_BS, positions_BS = self._begin(embeds_BSH, mask_BS, cache, positions_BS)
        mask: Any = mask_BS
        positions = positions_BS
        if is_picture_BS is not None:
            positions = positions_BS
            if (on_grid := self.positions(is_picture_BS)) is not None:
                positions = on_grid + (self.prefix.num_tokens if self.prefix else 0)
            mask = self._mask(embeds_BSH, mask_BS, is_picture_BS) if self.sees_whole_pictures else mask_BS
        return self.body(
            **body_inputs(self.body, embeds_BSH),
            attention_mask=mask,
            past_key_values=cache,
            position_ids=positions,
            use_cache=cache is not None,
        ).last_hidden_state

    def _begin(
        self, embeds_BSH: Tensor, mask_BS: Tensor | None, cache: Any, positions_BS: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Put the prefix into an empty cache. Returns the mask with it, and positions after it."""
        assert self.prefix
        (num_sequences, num_positions, _), device = embeds_BSH.shape, embeds_BSH.device
        if not cache.get_seq_length():
            begin(cache, self.prefix(), num_sequences=num_sequences)
        num_read = self.num_read(cache)
        if mask_BS is None:
            mask_BS = torch.ones(num_sequences, num_read + num_positions, dtype=torch.long, device=device)
        if positions_BS is None:
            positions_BS = torch.arange(num_read, num_read + num_positions, device=device).expand(num_sequences, -1)
        num_before = self.prefix.num_tokens
        return F.pad(mask_BS, (num_before, 0), value=1), positions_BS + num_before

    def _mask(self, embeds_BSH: Tensor, mask_BS: Tensor | None, is_picture_BS: Tensor) -> dict[str, Tensor]:
        """The masks of each kind of layer, by transformers' own function: a picture's embeddings see all of it."""
        return create_masks_for_vision_model(
            self.body.config,
            embeds_BSH,
            mask_BS,
            past_key_values=None,
            position_ids=None,
            block_sequence_ids=get_block_sequence_ids_for_mask(is_picture_BS.long(), device=embeds_BSH.device),
        )

    def logits(self, states_BSH: Tensor) -> Tensor:
        """States -> logits of the base's tokens and, after them, of the new ones, as the base model scales them."""
        new = self.voken_embeddings
        old_BST = (self._packed_head or self.head)(states_BSH)[..., : new.first]
        extend = new.extend if self._packed_head is None else new.extend_evenly
        return scale_logits(extend(old_BST, states_BSH), self.body.config)

    def voken_states(self, ids_BS: Tensor, mask_BS: Tensor, *, next_ids: Sequence[int] = ()) -> Tensor:
        """Right-padded texts -> the states that condition the picture after each: (B, V, H). With `next_ids`, the N
        tokens after every picture, the states that predict them follow: (B, V + N, H).

        The same as in the whole sequences, but the text is read without gradients and only what comes after it with
        them: what training with a frozen body needs, and no more. The body is in evaluation mode meanwhile: in
        training mode, with activation checkpointing, transformers ignores the cache.
        """
        after_A = torch.tensor([*self.voken_embeddings.ids, *next_ids], device=mask_BS.device)
        if self.prefix:  # between it and a text there is no padding, which a sliding window would count
            return self._whole_voken_states(ids_BS, mask_BS, after_A)
        cache = DynamicCache()
        lengths_B = mask_BS.sum(dim=1)
        num_positions = ids_BS.shape[1]
        # Padding comes first, so that the vokens follow their text: a sliding window counts padding too.
        places_S = torch.arange(num_positions, device=mask_BS.device)
        positions_BS = places_S - (num_positions - lengths_B)[:, None]
        mask_BS = (positions_BS >= 0).long()
        ids_BS = ids_BS.gather(1, positions_BS % num_positions)
        ids_BA = after_A[:-1].expand(len(ids_BS), -1)
        with evaluating(self.body):
            with torch.no_grad():
                text_BSH = self.states(
                    self.embed(ids_BS), mask_BS=mask_BS, cache=cache, positions_BS=positions_BS.clamp(min=0)
                )
            if not ids_BA.shape[1]:  # one voken, whose state is that of the text
                return text_BSH[:, -1:]
            after_BAH = self.states(
                self.embed(ids_BA),
                mask_BS=torch.cat([mask_BS, torch.ones_like(ids_BA)], dim=1),
                cache=cache,
                positions_BS=lengths_B[:, None] + torch.arange(ids_BA.shape[1], device=mask_BS.device),
            )
        return torch.cat([text_BSH[:, -1:], after_BAH], dim=1)

    def _whole_voken_states(self, ids_BS: Tensor, mask_BS: Tensor, after_A: Tensor) -> Tensor:
        """As `voken_states`, with gradients everywhere."""
        num_after = len(after_A)
        places_BA = mask_BS.sum(dim=1, keepdim=True) + torch.arange(num_after, device=mask_BS.device)
        ids_BS = F.pad(ids_BS, (0, num_after)).scatter(1, places_BA, after_A.expand(len(ids_BS), -1))
        mask_BS = F.pad(mask_BS, (0, num_after)).scatter(1, places_BA, 1)
        with evaluating(self.body):
            states_BSH = self.states(self.embed(ids_BS), mask_BS=mask_BS)
        return states_BSH.take_along_dim(places_BA[..., None] - 1, dim=1)


def body_inputs(body: Any, embeds_BSH: Tensor) -> dict[str, Any]:
    """Embeddings as a transformer takes them.

    What is wider than its states is added to them after its first layers, H features for each layer (DeepStack, arXiv
    2406.04334). Tokens without such features have zeros there.
    """
    embeds_BSH, *for_layers = embeds_BSH.split(body.config.hidden_size, dim=-1)
    if not for_layers:
        return {"inputs_embeds": embeds_BSH}
    return {
        "inputs_embeds": embeds_BSH,
        "visual_pos_masks": torch.ones(embeds_BSH.shape[:2], dtype=torch.bool, device=embeds_BSH.device),
        "deepstack_visual_embeds": [features_BSH.flatten(0, 1) for features_BSH in for_layers],
    }


def scale_logits(logits_BST: Tensor, config: Any) -> Tensor:
    """Do to logits what the base model's own forward does after its head, by its config: Cohere multiplies them,
    Granite divides them, Gemma 2 caps them softly (arXiv 2408.00118, 2)."""
    if factor := getattr(config, "logit_scale", None):
        logits_BST = logits_BST * factor
    if divisor := getattr(config, "logits_scaling", None):
        logits_BST = logits_BST / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits_BST = cap * torch.tanh(logits_BST / cap)
    return logits_BST


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, and back each of its parts that was in training mode."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _peft_is_quiet() -> Iterator[None]:
    """PEFT asks transformers for an attribute by its old name; nothing that a user could act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def like_lengths(lengths: Sequence[int], *, pass_cost: int) -> list[list[int]]:
    """Indices of sequences that are read in one pass each, so that passes cost least: a pass costs its sequences times
    the longest of them, and `pass_cost` positions. Within a pass they are in their order."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    costs, starts = [0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        cost, start = min((costs[start] + (end - start) * longest + pass_cost, start) for start in range(end))
        costs.append(cost)
        starts.append(start)
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[starts[end] : end]))
        end = starts[end]
    return groups[::-1]


def pad(sequences: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    """Sequences -> right-padded ids and their mask: (B, S) each."""
    length = max(map(len, sequences))
    padded = np.full((len(sequences), length), value, np.int64)
    mask = np.zeros_like(padded)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return torch.from_numpy(padded), torch.from_numpy(mask)
