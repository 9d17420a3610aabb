"""Both engines on a GPU: bfloat16, keys and values in blocks, tokens drawn on the device, compiled and quantised parts.

"cpu" follows the same code in bfloat16 with the GPU's ways; nothing of that shows that a GPU computes it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minigpt5.config import default_model_folder
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.generator import VokenGenerator, new_cache
from minigpt5.engine.kv_cache import SlotCache
from minigpt5.engine.sampling import TokenDraw, draw_token, draw_tokens
from minigpt5.errors import ModelFolderError
from minigpt5.limits import BLOCK, KV_CACHE_SHARE, default_limits
from minigpt5.model.folder import load_generator_model
from minigpt5.model.language import LanguageModel
from minigpt5.types import (
    DrawRequest,
    DrawSettings,
    GeneratorEvent,
    InputImage,
    Picture,
    Sampling,
    StoryRequest,
    TextDelta,
    TextPrecision,
    Vokens,
)
from tests.helpers.streams import run_together
from tests.helpers.tiny import (
    HIDDEN,
    save_tiny,
    tiny_config,
    tiny_diffusion,
    tiny_language,
    tiny_tokenizer,
    tiny_vision,
)

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SAMPLINGS = [Sampling(temperature=0), Sampling(top_p=0.5), Sampling(repetition_penalty=1.3), Sampling(temperature=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return folder


def png(colour: str) -> InputImage:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return InputImage(data=file.getvalue())


def in_bfloat16(language: LanguageModel) -> LanguageModel:
    """As `load_generator_model` has it on a GPU."""
    for parameter in language.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return language


def write(generator: VokenGenerator, requests: list[StoryRequest]) -> list[list[GeneratorEvent]]:
    return run_together(generator.generate, requests)


@DEVICES
def test_a_bfloat16_generator_writes_many_stories_in_blocks(device: str) -> None:
    config = tiny_config()
    limits = default_limits("cuda", kv_cache_gib=0.002, num_slots=40)
    generator = VokenGenerator(
        config,
        tiny_tokenizer(config),
        in_bfloat16(tiny_language(config)).to(device),
        tiny_vision(config).to(device),
        limits=limits,
        draws_on_device=True,
    )
    assert generator.language.embedding.device.type == device
    assert generator._cache.stored_keys[0].dtype == torch.bfloat16
    requests = [
        StoryRequest(prompt=("A fox", png("red")) if seed % 3 else ("An owl",), pages=1 + seed % 2, seed=seed)
        for seed in range(8 if device == "cpu" else 30)
    ]
    for events in write(generator, requests):
        assert any(isinstance(event, TextDelta) for event in events)
        vokens = [event for event in events if isinstance(event, Vokens)]
        assert vokens and all(np.isfinite(event.hidden_VH).all() for event in vokens)
        assert vokens[0].hidden_VH.dtype == np.float32
    blocks = generator._cache.blocks
    assert blocks and blocks.num_available(generator._free_slots) == blocks.num_blocks


@DEVICES
@torch.no_grad()
def test_states_in_bfloat16_are_near_float32s(device: str) -> None:
    exact, rounded = tiny_language(tiny_config()), in_bfloat16(tiny_language(tiny_config())).to(device)
    counts = [(0, 40), (1, 3), (2, 1)]
    ids_1T = torch.arange(44)[None] * 7
    found = []
    for language, num_shared_blocks in ((exact, None), (rounded, 12)):
        cache = SlotCache.for_model(language.body, num_slots=3, num_positions=64, num_shared_blocks=num_shared_blocks)
        for slot in range(3):
            cache.take(slot, 64, idle=[])
        cache.forward(language.body, language.embed(ids_1T)[0], counts)
        single = [(slot, 1) for slot in range(3)]
        found.append(cache.forward(language.body, language.embed(ids_1T[:, :3])[0], single).float().cpu())
    assert (found[0] - found[1]).abs().max() < 0.1 * found[0].abs().max()


@DEVICES
def test_tokens_drawn_on_the_device_are_the_cpus(device: str) -> None:
    rng = np.random.default_rng(0)
    logits_RT = rng.normal(size=(64, 32_000)).astype(np.float32) * 3
    draws = [
        TokenDraw(
            sampling=SAMPLINGS[row % 4], seed=row, page=1, position=row, seen=[1, 2, row], closed=[row], is_rushed=False
        )
        for row in range(64)
    ]
    found = draw_tokens(torch.from_numpy(logits_RT).to(device), draws, first_voken=31_990)
    expected = [draw_token(logits_T, draw, first_voken=31_990) for logits_T, draw in zip(logits_RT, draws, strict=True)]
    firm = [row for row in range(64) if expected[row].margin > 1e-7]
    assert len(firm) > 50 and [found[row] for row in firm] == [expected[row].token for row in firm]


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@torch.no_grad()
def test_a_step_of_the_language_model_never_waits_for_the_gpu() -> None:
    language = tiny_language(tiny_config()).to("cuda")
    cache = SlotCache.for_model(language.body, num_slots=4, num_positions=64, num_shared_blocks=8)
    for slot in range(4):
        cache.take(slot, 64, idle=[])
    for counts in ([(0, 20), (1, 3)], [(0, 1), (1, 1), (2, 9)], [(0, 1), (1, 1), (2, 1)]):
        embeds_TH = torch.zeros(sum(num for _, num in counts), HIDDEN, device="cuda")
        with no_waiting():
            cache.forward(language.body, embeds_TH, counts)


@pytest.mark.gpu
def test_the_kv_store_is_all_that_is_allocated_and_within_its_share() -> None:
    language = tiny_language(tiny_config()).to("cuda")
    free, _ = torch.cuda.mem_get_info()
    before = torch.cuda.memory_allocated()
    limits = default_limits("cuda", num_slots=10_000)
    cache = new_cache(language, limits, num_positions=600)
    stored = sum(store.nbytes for store in (*cache.stored_keys, *cache.stored_values))
    assert cache.blocks and cache.stored_keys[0].shape[2] == cache.blocks.num_blocks * BLOCK
    assert stored <= KV_CACHE_SHARE * free
    assert torch.cuda.memory_allocated() - before < stored + 2**24


@DEVICES
def test_a_bfloat16_decoder_draws_a_batch(folder: Path, device: str) -> None:
    decoder = DiffusionDecoder.from_pretrained(folder, device=device, precision="bfloat16")
    config = decoder.config
    rng = np.random.default_rng(0)
    requests = [
        DrawRequest(
            vokens=Vokens(
                page=1,
                hidden_VH=rng.normal(size=(config.num_vokens, config.hidden)).astype(np.float32),
                fingerprint=config.fingerprint,
            ),
            settings=DrawSettings(steps=3),
            seed=seed,
        )
        for seed in range(5)
    ]
    pictures: list[Picture] = decoder.draw(requests)
    assert [(picture.width, picture.height) for picture in pictures] == [(config.image_px, config.image_px)] * 5
    assert len({picture.png for picture in pictures}) == 5
    exact = DiffusionDecoder.from_pretrained(folder, device="cpu", precision="float32").draw(requests)
    levels = [np.asarray(Image.open(io.BytesIO(picture.png)), np.int16) for picture in (pictures[0], exact[0])]
    assert np.abs(levels[0] - levels[1]).mean() < 16


@pytest.mark.gpu
@torch.no_grad()
def test_a_compiled_denoiser_predicts_what_the_eager_one_does() -> None:
    unet = tiny_diffusion(tiny_config()).denoiser.to("cuda")
    compiled = torch.compile(unet)
    for num in (1, 4):
        states: Tensor = torch.randn(num, 6, 16, device="cuda")
        arguments = (torch.randn(num, 4, 8, 8, device="cuda"), torch.full((num,), 500, device="cuda"))
        found, expected = (one(*arguments, encoder_hidden_states=states).sample for one in (compiled, unet))
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_shipped_model_writes_in_the_precisions_of_a_gpu(precision: TextPrecision) -> None:
    parts = load_generator_model(default_model_folder(), device="cuda", precision=precision)
    (events,) = write(VokenGenerator(*parts), [StoryRequest(prompt=("A fox",), pages=2)])
    assert sum(isinstance(event, Vokens) for event in events) == 2


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_precisions_of_cpus_are_refused_on_a_gpu_before_weights_are_read(precision: TextPrecision) -> None:
    with pytest.raises(ModelFolderError, match="on a GPU use bfloat16 or float32"):
        load_generator_model(default_model_folder(), device="cuda", precision=precision)
