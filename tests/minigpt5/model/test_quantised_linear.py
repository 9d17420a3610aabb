"""Quantised layers multiply by the weights that they say, and a row does not depend on the others."""

from __future__ import annotations

import errno
import itertools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaModel

from minigpt5.errors import ModelFolderError
from minigpt5.model import precision
from minigpt5.model.base_models import load_tensors, resolve
from minigpt5.model.packing import _merge, match_codes
from minigpt5.model.precision import check_precision, choose_precision, measure_precisions
from minigpt5.model.quantised import QUANTISED, Codes, has_codes, load_codes, save_codes
from minigpt5.model.quantised_linear import (
    FBGEMM,
    Avx2Int8Linear,
    Bfloat16Linear,
    Int4Linear,
    LowRank,
    VnniInt8Linear,
    can_multiply_int8,
    has_amx,
    make_int8,
    stack_adapters,
)
from minigpt5.model.weights import save_tensors

needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="a CPU without AVX-512 VNNI")
needs_fbgemm = pytest.mark.skipif(
    FBGEMM not in torch.backends.quantized.supported_engines, reason="a CPU without AVX2, or torch without FBGEMM"
)
INT8_LAYERS = [pytest.param(VnniInt8Linear, marks=needs_vnni), pytest.param(Avx2Int8Linear, marks=needs_fbgemm)]


def some_codes(num_outputs: int, num_inputs: int) -> Codes:
    torch.manual_seed(0)
    return Codes(
        codes_OI=torch.randint(0, 16, (num_outputs, num_inputs), dtype=torch.uint8),
        scales_OK=(torch.rand(num_outputs, num_inputs // 32) * 0.01 + 0.001).half(),
        minima_OK=(-torch.rand(num_outputs, num_inputs // 32) * 0.1).half(),
    )


def test_codes_of_the_shipped_base_are_its_float32_weights() -> None:
    folder = resolve("smollm2-135m-instruct")
    weights, codes = load_tensors(folder), load_codes(folder)
    assert len(codes) == 30 * 7
    for name in list(codes)[::29]:
        assert torch.equal(codes[name].dequantise(), weights[name]), name


def test_codes_are_read_as_they_were_written(tmp_path: Path) -> None:
    codes = some_codes(48, 64)
    save_tensors({"one": codes.dequantise()}, tmp_path / "model.safetensors")
    save_codes({"one": codes}, tmp_path)
    read = load_codes(tmp_path)["one"]
    assert torch.equal(read.codes_OI, codes.codes_OI)
    assert torch.equal(read.dequantise(), codes.dequantise())


def test_codes_of_other_weights_are_left_alone(tmp_path: Path) -> None:
    codes = some_codes(48, 64)
    save_tensors({"one": codes.dequantise()}, tmp_path / "model.safetensors")
    save_codes({"one": codes}, tmp_path)
    assert has_codes(tmp_path)
    save_tensors({"one": codes.dequantise() + 1}, tmp_path / "model.safetensors")
    assert not has_codes(tmp_path)
    assert choose_precision(tmp_path) == "float32"
    with pytest.raises(ModelFolderError, match="made from its float32 weights"):
        check_precision("int4", tmp_path, is_on_cpu=True)
    save_tensors(load_file(tmp_path / QUANTISED), tmp_path / QUANTISED)  # as a version before wrote it
    assert not has_codes(tmp_path)


def test_a_damaged_file_of_codes_says_what_it_lacks(tmp_path: Path) -> None:
    save_tensors(
        {"one.codes": torch.zeros(4, 32, dtype=torch.uint8), "one.scales": torch.zeros(4, 2)}, tmp_path / QUANTISED
    )
    with pytest.raises(ModelFolderError, match=r"one\.minima"):
        load_codes(tmp_path)
    save_tensors(
        {
            "one.codes": torch.zeros(4, 32, dtype=torch.uint8),
            "one.scales": torch.zeros(4, 3),
            "one.minima": torch.zeros(4, 3),
        },
        tmp_path / QUANTISED,
    )
    with pytest.raises(ModelFolderError, match="4 x 64 codes"):
        load_codes(tmp_path)
    (tmp_path / QUANTISED).write_bytes(b"cut")
    with pytest.raises(ModelFolderError, match="make the folder again"):
        has_codes(tmp_path)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_4bit_layer_multiplies_by_the_dequantised_weights(has_bias: bool) -> None:
    codes = some_codes(96, 128)
    bias_O = torch.randn(96) if has_bias else None
    layer, exact = Int4Linear(codes, bias_O), codes.dequantise()
    for shape in ((1, 128), (5, 128), (1, 33, 128)):
        inputs = torch.randn(shape).bfloat16()
        expected = nn.functional.linear(inputs.float(), exact, bias_O)
        # Scales and offsets are rounded to 8 bits, and the result too.
        bound = nn.functional.linear(inputs.float().abs(), exact.abs() + 0.1).amax() / 256
        assert (layer(inputs).float() - expected).abs().max() < bound
        torch.testing.assert_close(layer(inputs.float()), layer(inputs).float())


@pytest.mark.parametrize("make", INT8_LAYERS)
def test_an_8bit_layer_multiplies_by_its_rounded_weights(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    weight_OI, bias_O = torch.randn(96, 128), torch.randn(96)
    layer = make(weight_OI, bias_O)
    steps_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight_OI / steps_O1).round() * steps_O1
    for num_rows in (1, 2, 7, 40):
        inputs = torch.randn(num_rows, 128) * torch.logspace(-3, 3, num_rows)[:, None]
        expected = nn.functional.linear(inputs, rounded, bias_O)
        assert ((layer(inputs) - expected).norm(dim=1) < 2e-4 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("make", INT8_LAYERS)
def test_an_8bit_layer_holds_the_largest_sums_and_zeros(make: Callable[..., nn.Module]) -> None:
    """A product of the largest codes overflows 16 bits where a kernel adds two of 8 bits."""
    layer = make(torch.full((16, 512), 2.0))
    ends = torch.stack([torch.full((512,), 3.0), torch.full((512,), -3.0), torch.zeros(512)])
    torch.testing.assert_close(layer(ends)[:, 0], torch.tensor([3072.0, -3072.0, 0.0]))
    nearly = torch.full((1, 512), 2.9765)  # the low plane is at its end
    nearly[0, 0] = 3.0
    torch.testing.assert_close(layer(nearly)[0, 0], 2 * nearly.sum(), rtol=1e-4, atol=0)


@needs_fbgemm
def test_packing_leaves_the_quantised_engine_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    other = next(name for name in torch.backends.quantized.supported_engines if name not in (FBGEMM, "none"))
    monkeypatch.setattr(torch.backends.quantized, "engine", other)
    Avx2Int8Linear(torch.randn(16, 32))
    assert torch.backends.quantized.engine == other


def _layers() -> list[nn.Module]:
    torch.manual_seed(1)
    weight_OI = torch.randn(96, 128)
    adapter = LowRank(torch.randn(24, 128), torch.randn(96, 24))
    layers: list[nn.Module] = [Int4Linear(some_codes(96, 128)), Int4Linear(some_codes(96, 128), None, adapter)]
    if can_multiply_int8():
        layers.append(make_int8(weight_OI))
    if has_amx():
        layers += [Bfloat16Linear(weight_OI, torch.randn(96)), Bfloat16Linear(torch.randn(1536, 128))]
    return layers


@pytest.mark.parametrize("layer", _layers(), ids=lambda layer: type(layer).__name__)
def test_a_row_has_the_same_bits_in_any_company(layer: nn.Module) -> None:
    rows = torch.randn(100, 128).bfloat16()
    alone = torch.cat([layer(row[None]) for row in rows])
    for num_rows in (2, 3, 5, 16, 24, 33, 64, 100):
        assert torch.equal(layer(rows[:num_rows]), alone[:num_rows])


@pytest.mark.parametrize("layer", _layers(), ids=lambda layer: type(layer).__name__)
def test_inputs_may_lie_in_any_order(layer: nn.Module) -> None:
    inputs = torch.randn(128, 3, 2).bfloat16().permute(2, 1, 0)
    assert torch.equal(layer(inputs), layer(inputs.contiguous()))


def test_stacked_adapters_are_what_merging_makes() -> None:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    attention = get_peft_model(LlamaModel(shape), lora).get_base_model().layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    pairs = [
        (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
        if hasattr(layer, "lora_A")
        else None
        for layer in layers
    ]
    down_RI, up_OR = stack_adapters(pairs, [layer.out_features for layer in layers])
    inputs = torch.randn(3, 32)
    with torch.no_grad():
        bases = torch.cat([getattr(layer, "base_layer", layer)(inputs) for layer in layers], dim=-1)
        beside = bases + inputs @ down_RI.T @ up_OR.T
        merged = torch.cat([_merge(layer)(inputs) for layer in layers], dim=-1)
    torch.testing.assert_close(beside, merged, atol=1e-4, rtol=1e-4)


def test_an_adapter_in_8_bits_is_near_itself() -> None:
    torch.manual_seed(0)
    down_RI, up_OR = torch.randn(24, 128), torch.randn(96, 24)
    inputs = torch.randn(4, 128).bfloat16()
    expected = inputs.float() @ down_RI.T @ up_OR.T
    difference = LowRank(down_RI, up_OR)(inputs).float() - expected
    assert difference.norm() < 0.02 * expected.norm()


def test_a_bfloat16_layer_rounds_its_weights() -> None:
    weight_OI, inputs = torch.randn(8, 16), torch.randn(3, 16)
    expected = inputs.bfloat16().float() @ weight_OI.bfloat16().float().T
    torch.testing.assert_close(Bfloat16Linear(weight_OI)(inputs), expected, atol=0.05, rtol=0.01)


def test_codes_of_other_shapes_are_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    assert match_codes(model, {"0.weight": some_codes(48, 64)}).keys() == {model[0]}
    with pytest.raises(ValueError, match="convert the base model again"):
        match_codes(model, {"0.weight": some_codes(32, 64)})


def test_a_base_without_codes_computes_in_float32(tmp_path: Path) -> None:
    assert not has_codes(tmp_path)
    assert choose_precision(tmp_path) == "float32"
    with pytest.raises(ModelFolderError, match="no quantised weights"):
        check_precision("int4", tmp_path, is_on_cpu=True)
    with pytest.raises(ModelFolderError, match="use bfloat16 or float32"):
        check_precision("int8", tmp_path, is_on_cpu=False)


def test_the_fastest_precision_is_kept_for_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = resolve("smollm2-135m-instruct")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen = choose_precision(folder)
    assert chosen in ("float32", "int4")
    assert f"text is computed in {chosen}" in capsys.readouterr().err
    (kept,) = tmp_path.rglob("precision.json")
    kept.write_text('{"float32": 1.0, "int4": 2.0}')
    assert choose_precision(folder) == "float32"
    kept.write_text('{"float32": 1.19, "int4": 1.0}')
    assert choose_precision(folder) == "float32"
    kept.write_text('{"float32": 1.21, "int4": 1.0}')
    assert choose_precision(folder) == "int4"
    assert not capsys.readouterr().err, "nothing was measured"
    assert min(measure_precisions(512, 512).values()) > 0


def test_other_work_on_the_machine_does_not_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured while others computed is kept for ever: now and then the faster kernel is alone."""
    folder = resolve("smollm2-135m-instruct")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    times = itertools.cycle([9.0, 9.0, 9.0, 9.0, 0.5])
    monkeypatch.setattr(
        precision, "_time", lambda layers, input: next(times) if isinstance(layers[0], Int4Linear) else 1.0
    )
    assert choose_precision(folder) == "int4"


def test_processors_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve("smollm2-135m-instruct")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(precision, "_time", lambda layers, input: 1.0)
    for flags in ("avx2", "avx2 avx512f"):
        with monkeypatch.context() as one:
            one.setattr(precision, "_cpu", lambda flags=flags: ["A CPU", flags])
            choose_precision(folder)
    assert len(list(tmp_path.rglob("precision.json"))) == 2
    cpu = precision._cpu()
    assert all(isinstance(part, str) for part in cpu)
    if Path("/proc/cpuinfo").exists() and platform.machine() == "x86_64":
        name, _, _, _, flags = cpu
        assert name and "fpu" in flags.split()


def test_a_cache_that_cannot_be_written_costs_a_measurement_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = resolve("smollm2-135m-instruct")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root, as in a container, writes in any folder
    assert choose_precision(folder) in ("float32", "int4")
    (line,) = capsys.readouterr().err.splitlines()
    assert "every start measures" in line and "XDG_CACHE_HOME" in line
    assert not list(tmp_path.rglob("precision.json"))


def test_a_base_of_odd_widths_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    LlamaConfig(hidden_size=40, intermediate_size=90, num_attention_heads=2).save_pretrained(tmp_path)
    save_tensors({"one": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_codes({}, tmp_path)
    assert choose_precision(tmp_path) in ("float32", "int4")


def test_a_precision_is_measured_with_the_threads_of_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve("smollm2-135m-instruct")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = set()

    def time_layers(*arguments: Any) -> float:
        seen.add(torch.get_num_threads())
        return 1.0

    monkeypatch.setattr(precision, "_time", time_layers)
    before = torch.get_num_threads()
    for num_threads in (1, 2):
        choose_precision(folder, num_threads=num_threads)
        assert seen == {num_threads} and torch.get_num_threads() == before
        seen.clear()
    assert len(list(tmp_path.rglob("precision.json"))) == 2, "one for each number of threads"
