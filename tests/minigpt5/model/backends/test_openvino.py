"""OpenVINO beside eager torch: every family of diffusion models at tiny random size, real classes."""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import save_file
from torch import Tensor, nn

from minigpt5.errors import MiniGPT5Error
from minigpt5.model.backends import openvino
from minigpt5.model.backends.choose import choose, warm_up
from minigpt5.model.backends.folded_upsampling import FoldedUpsample, folded_upsampling
from minigpt5.model.backends.openvino import Converted, Unconvertible, convert
from minigpt5.parity.pictures import Pair
from minigpt5.types import DecoderBackend, DrawSettings
from tests.helpers import pipelines

ROOT = Path(__file__).parents[4]
MAKERS = {
    module.name: maker
    for module in pkgutil.iter_modules(pipelines.__path__)
    if hasattr(maker := importlib.import_module(f"{pipelines.__name__}.{module.name}"), "make")
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The family's first variant."""
    maker = MAKERS[request.param]
    maker.make(tmp_path / "model", **next(iter(maker.VARIANTS.values())))
    yield tmp_path / "model"


def use(pair: Pair, folder: Path, backend: DecoderBackend = "openvino", device: str = "cpu") -> None:
    with torch.no_grad():
        choose(pair.ours, folder, pair.null_1QD, backend=backend, device=device, num_threads=1)
    warm_up(pair.ours, pair.null_1QD)


def levels(one_BCYX: Tensor, other_BCYX: Tensor) -> float:
    pixels, others = (((pictures + 1) * 127.5).round() for pictures in (one_BCYX, other_BCYX))
    return float((pixels - others).abs().max())


def test_pictures_of_all_families_are_those_of_torch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guided and not, square and not, alone and beside one another, and without a word of torch's drawing."""
    pair = Pair(folder)
    draws = [draw for draw in pair.cases(steps=3) if draw.scheduler == pair.ours.samplers[0]]
    with torch.no_grad():
        expected = [pair.ours.to_pixels(pair.draw([draw], seed=3)[0]) for draw in draws]
        use(pair, folder)
        used: list[str] = []
        for module in (pair.ours.denoiser, pair.ours.vae.decoder):
            module.register_forward_hook(lambda module, inputs, output: used.append(type(module).__name__))
        alone = [pair.ours.to_pixels(pair.draw([draw], seed=3)[0]) for draw in draws]
        together = [pair.ours.to_pixels(latents) for latents in pair.draw(draws, seed=3)]
        num_compared = len(used)
        pair.draw(draws, seed=4)
    assert isinstance(pair.ours.denoiser_for(draws[0].scheduler), Converted)
    assert pair.ours.denoiser_for(draws[0].scheduler, "a style") is pair.ours.denoiser
    assert max(map(levels, expected, alone)) <= 1
    assert max(map(levels, alone, together)) == 0
    assert 2 <= num_compared <= 4 and len(used) == num_compared, "torch has computed what is compared, once each"
    assert "torch" not in capsys.readouterr().err


def test_a_model_is_converted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    MAKERS["stable_diffusion"].make(folder, **next(iter(MAKERS["stable_diffusion"].VARIANTS.values())))
    pair = Pair(folder)
    use(pair, folder)
    assert capsys.readouterr().err.count("converting ") == 2
    use(Pair(folder), folder)
    assert "converting" not in capsys.readouterr().err
    with torch.no_grad():
        next(iter(pair.ours.vae.parameters())).add_(1)
    pair.ours.vae.save_pretrained(folder / "vae")
    use(Pair(folder), folder)
    assert capsys.readouterr().err.count("converting AutoencoderKL") == 1


CTRL_C = """
import os, signal, threading
import openvino
from openvino import opset13
from minigpt5.model.backends.openvino import core

given = opset13.parameter([1])
compiled = [core().compile_model(openvino.Model([opset13.relu(given)], [given]), "CPU")]
thread = threading.Thread(target=compiled.clear)
thread.start()
thread.join()
try:
    os.kill(os.getpid(), signal.SIGINT)
    thread.join()
except KeyboardInterrupt:
    print("heard")
"""


def test_ctrl_c_is_heard_after_another_thread_has_let_the_last_model_go() -> None:
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.run([sys.executable, "-c", CTRL_C], cwd=ROOT, capture_output=True, text=True, **listening)
    assert process.stdout == "heard\n", (process.returncode, process.stderr[-1000:])


@pytest.mark.parametrize(
    ("num_allowed", "num_traced"),
    [(0.5, 1), pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow), (8, 3)],
)
def test_tracing_decodes_no_more_pictures_at_once_than_drawing(
    num_allowed: float, num_traced: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "model"
    MAKERS["stable_diffusion"].make(folder, **next(iter(MAKERS["stable_diffusion"].VARIANTS.values())))
    pair = Pair(folder)
    native_px = pair.ours.native_px
    for place in ("decoders.diffusion", "backends.choose"):
        monkeypatch.setattr(f"minigpt5.model.{place}.DECODED_PIXELS", int(num_allowed * native_px**2))
    nums: list[int] = []
    pair.ours.vae.decoder.register_forward_hook(lambda module, inputs, output: nums.append(len(inputs[0])))
    latents_BCYX = torch.randn(4, *pair.ours.latent_shape(DrawSettings()), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pair.ours.to_pixels(latents_BCYX)
        nums.clear()
        use(pair, folder)
        assert max(nums) == num_traced
        assert levels(expected, pair.ours.to_pixels(latents_BCYX)) <= 1
    assert "torch" not in capsys.readouterr().err


def test_eager_is_left_alone_and_openvino_needs_a_cpu(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    MAKERS["stable_diffusion"].make(folder, **next(iter(MAKERS["stable_diffusion"].VARIANTS.values())))
    pair = Pair(folder)
    use(pair, folder, "eager")
    use(pair, folder, "auto", device="cuda")
    assert not pair.ours.stand_ins and pair.ours.denoiser_for("ddim") is pair.ours.denoiser
    with pytest.raises(MiniGPT5Error, match="openvino, which draws on CPUs, but the device is cuda"):
        use(pair, folder, "openvino", device="cuda")


def test_an_unwritable_cache_leaves_the_drawing_to_torch(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    MAKERS["stable_diffusion"].make(folder, **next(iter(MAKERS["stable_diffusion"].VARIANTS.values())))

    def refuse(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    pair = Pair(folder)
    monkeypatch.setattr(Path, "mkdir", refuse)
    use(pair, folder)
    assert not pair.ours.stand_ins
    assert capsys.readouterr().err.count("is drawn by torch, not by OpenVINO: cannot keep") == 2


class Branching(nn.Module):
    """What a trace gets wrong: it fixes the branch that the example takes."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.layer = nn.Linear(4, 4)

    def forward(self, input: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.layer(input) if input.mean() > 0 else -self.layer(input))


class Sampled(Branching):
    """What OpenVINO computes as torch does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.layer(input))


class Foreign(Branching):
    """What OpenVINO does not have."""

    def forward(self, input: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=torch.linalg.eigvalsh(self.layer(input)))


def converted(module: nn.Module, folder: Path) -> Converted:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(module.state_dict(), folder / "model.safetensors")
    return convert(module, "__call__", folder, lambda call: call(torch.ones(3, 4, 4)), num_threads=1)


def test_a_trace_that_is_wrong_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Branching().eval()
    stand_in = converted(module, tmp_path / "part")
    input = -torch.ones(2, 4, 4)
    with torch.no_grad():
        assert torch.equal(stand_in(input).sample, module(input).sample)
        assert torch.equal(stand_in(input).sample, module(input).sample)
    err = capsys.readouterr().err
    assert err.count("torch computes Branching for inputs of (2, 4, 4), not OpenVINO: its values deviate by") == 1


def test_one_broken_picture_leaves_its_size_to_openvino(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = nn.Linear(4, 4).eval()
    stand_in = converted(Sampled(module).eval(), tmp_path / "part")
    with torch.no_grad():
        assert stand_in(torch.full((2, 4, 4), torch.nan)).sample.isnan().all()
        torch.testing.assert_close(stand_in(torch.ones(2, 4, 4)).sample, module(torch.ones(2, 4, 4)))
    assert list(stand_in._is_right.values()) == [True] and "torch computes" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "capabilities", "hint"),
    [
        (torch.float32, ["FP32", "BF16", "FP16"], "f32"),
        (torch.bfloat16, ["FP32", "BF16"], "bf16"),
        (torch.bfloat16, ["FP32"], "f32"),
        (torch.float16, ["FP32", "BF16"], "f32"),  # and not bfloat16, in which a picture in a style is not drawn
        (torch.float16, ["FP32", "BF16", "FP16"], "f16"),
    ],
)
def test_openvino_computes_in_the_precision_of_the_weights_where_the_cpu_can(
    dtype: torch.dtype, capabilities: list[str], hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}
    there = SimpleNamespace(
        get_property=lambda *names: capabilities,
        compile_model=lambda path, device, asked: options.update(asked),
    )
    monkeypatch.setattr(openvino, "core", lambda: there)
    _ = Converted(nn.Linear(1, 1).to(dtype), "forward", Path("model.xml"), num_threads=1)._compiled
    assert options["INFERENCE_PRECISION_HINT"] == hint


def test_what_cannot_be_converted_is_not_tried_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Foreign().eval()
    for _ in range(2):
        with pytest.raises(Unconvertible, match="not supported|Conversion is failed"):
            converted(module, tmp_path / "part")
    assert capsys.readouterr().err.count("converting Foreign") == 1


class Failing(Branching):
    """Cannot be traced on a machine without room, the first time."""

    failure: BaseException | None = None

    def forward(self, input: Tensor) -> SimpleNamespace:
        if self.failure:
            raise self.failure
        return super().forward(input)


@pytest.mark.parametrize("failure", [MemoryError(), OSError(5, "Input/output error"), OSError(28, "No space left")])
def test_what_fails_for_want_of_room_is_tried_again(failure: BaseException, tmp_path: Path) -> None:
    module = Failing().eval()
    module.failure = failure
    with pytest.raises((Unconvertible, MiniGPT5Error), match="MemoryError|Input/output|No space"):
        converted(module, tmp_path / "part")
    module.failure = None
    assert converted(module, tmp_path / "part")


def test_a_call_that_fails_later_is_torchs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Branching().eval()
    stand_in, input = converted(module, tmp_path / "part"), torch.ones(2, 4, 4)

    def fail(tensors: list[Tensor]) -> Tensor:
        raise RuntimeError("out of memory")

    with torch.no_grad():
        stand_in(input)
        assert True in stand_in._is_right.values()
        monkeypatch.setattr(stand_in, "_infer", fail)
        for _ in range(2):
            assert torch.equal(stand_in(input).sample, module(input).sample)
    assert capsys.readouterr().err.count("for inputs of (2, 4, 4), not OpenVINO: out of memory") == 1


def test_an_openvino_of_another_name_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version is part of what a converted model is known by."""
    known = metadata.version

    def version(name: str) -> str:
        return known("openvino-of-another-name" if name == "openvino" else name)

    monkeypatch.setattr("minigpt5.model.backends.openvino.metadata.version", version)
    with pytest.raises(Unconvertible, match="no package named openvino-of-another-name is installed"):
        converted(Branching().eval(), tmp_path / "part")


def test_folded_upsampling_computes_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Upsample2D(6, use_conv=True, out_channels=5), Upsample2D(5, use_conv=False))
    input = torch.randn(2, 6, 5, 7)
    with torch.no_grad():
        expected = model(input)
        with folded_upsampling(model):
            assert isinstance(model[0], FoldedUpsample) and type(model[1]) is Upsample2D
            torch.testing.assert_close(model(input), expected)
        assert torch.equal(model(input), expected)


def test_openvino_sends_no_statistics(tmp_path: Path) -> None:
    """A plain import of it starts a thread that does, and writes an id to ~/intel."""
    program = (
        "import sys, threading; from minigpt5.model.backends.openvino import import_openvino; import_openvino();"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry.')], threading.active_count())"
    )
    settings = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.stdout.strip() == "[] 1", done.stderr
    assert not (tmp_path / "intel").exists()


@pytest.mark.slow
def test_compiled_pictures_are_those_of_torch(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    MAKERS["stable_diffusion"].make(folder, **next(iter(MAKERS["stable_diffusion"].VARIANTS.values())))
    pair = Pair(folder)
    draw = pair.cases(steps=2)[0]
    with torch.no_grad():
        expected = pair.ours.to_pixels(pair.draw([draw], seed=3)[0])
        use(pair, folder, "compile")
        found = pair.ours.to_pixels(pair.draw([draw], seed=3)[0])
    assert set(pair.ours.stand_ins) == {"denoiser", "vae"} and levels(expected, found) <= 1


@pytest.mark.slow
def test_a_machine_without_a_compiler_says_so_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    MAKERS["stable_diffusion"].make(folder, **next(iter(MAKERS["stable_diffusion"].VARIANTS.values())))
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    with pytest.raises(MiniGPT5Error, match="decoder_backend is compile, but torch cannot compile here: .*to eager"):
        use(Pair(folder), folder, "compile")
