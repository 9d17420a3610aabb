"""A module's calls by OpenVINO on a CPU: converted once into the user's cache, and compared with torch before use.

A converted module stands for a denoiser or a VAE's `decode`: it takes the same arguments, whichever the family gives.
Its tensors are the converted model's inputs, in the order of the arguments.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from minigpt5.model.backends.folded_upsampling import folded_upsampling
from minigpt5.model.cache import hash_file, keep_in_cache

EXAMPLES = 3
"""Pictures of the call that is traced, or fewer where they would not be drawn in one call."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest deviation from torch, as a share of the largest value: a wrong graph is off by more, rounding by less."""
HINTS = {torch.bfloat16: ("bf16", "BF16"), torch.float16: ("f16", "FP16")}
"""Precision of the weights -> OpenVINO's hint to compute in it, and the capability of a CPU that can; else float32."""
FORMAT = 1
"""A higher number has everybody convert again."""
FAILURES = (RuntimeError, ValueError, MemoryError)
"""Of a call of OpenVINO."""
MODEL, FAILURE = "model.xml", "failure.txt"


class Unconvertible(Exception):
    """OpenVINO is not installed, or cannot compute the module."""


class Converted:
    """Stands for `module.method`, for inference. Sizes that OpenVINO does not compute as torch does are torch's."""

    def __init__(
        self, module: nn.Module, method: str, path: Path, *, num_threads: int, num_examples: int = EXAMPLES
    ) -> None:
        """`path`: the converted model; `num_threads`: OpenVINO's threads for a call; `num_examples`: pictures of the
        call that was traced."""
        self._module, self._eager = module, getattr(module, method)
        self._path, self._num_threads, self._num_examples = path, num_threads, num_examples
        self._is_right: dict[Hashable, bool] = {}
        self._lock = threading.Lock()

    @property
    def config(self) -> Any:
        return self._module.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors, kind = flatten(args, kwargs, self._num_examples)
        with self._lock:  # a compiled model has one request
            if kind not in self._is_right:
                expected = self._eager(*args, **kwargs)
                if not expected.sample.isfinite().all():  # one broken picture says nothing of OpenVINO
                    return expected
                self._is_right[kind] = self._compare(expected.sample, tensors)
            if self._is_right[kind]:
                try:
                    return SimpleNamespace(sample=self._infer(tensors))
                except FAILURES as error:
                    self._is_right[kind] = False
                    self._say_torch(tensors, one_line(error))
        return self._eager(*args, **kwargs)

    def _infer(self, tensors: Sequence[Tensor]) -> Tensor:
        arrays = [
            tensor.to(getattr(torch, port.get_element_type().to_dtype().name)).contiguous().numpy()
            for tensor, port in zip(tensors, self._compiled.inputs, strict=True)
        ]
        return torch.from_numpy(self._compiled(arrays, share_inputs=True)[0]).to(tensors[0].dtype)

    def _compare(self, expected: Tensor, tensors: Sequence[Tensor]) -> bool:
        """Whether OpenVINO computes what torch does, which stderr says where it does not."""
        try:
            found = self._infer(tensors)
            deviation = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        except FAILURES as error:
            reason = one_line(error)
        else:
            if deviation <= TOLERANCE.get(self._precision, TOLERANCE[torch.bfloat16]):
                return True
            reason = f"its values deviate by {deviation:.1g}"
        self._say_torch(tensors, reason)
        return False

    def _say_torch(self, tensors: Sequence[Tensor], reason: str) -> None:
        sizes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        _say(f"torch computes {type(self._module).__name__} for inputs of {sizes}, not OpenVINO: {reason}")

    @property
    def _precision(self) -> torch.dtype:
        return next(self._module.parameters()).dtype

    @functools.cached_property
    def _compiled(self) -> Any:
        """Compiled at its first call, with threads that are not bound to cores: other engines have theirs there."""
        hint, capability = HINTS.get(self._precision, ("f32", "FP32"))
        is_capable = capability in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        options = {
            "INFERENCE_PRECISION_HINT": hint if is_capable else "f32",
            "INFERENCE_NUM_THREADS": self._num_threads,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }
        return core().compile_model(self._path, "CPU", options)


def convert(
    module: nn.Module,
    method: str,
    folder: Path,
    call: Callable[[Any], object],
    *,
    num_threads: int,
    num_examples: int = EXAMPLES,
) -> Converted:
    """Convert `module.method`, or find it in the cache. `folder` has the module's config and weights. `call` is given
    something to call as the module is called, with `num_examples` pictures. Raises Unconvertible, or MiniGPT5Error
    where the cache cannot be written."""
    import_openvino()

    def fill(partial: Path) -> None:
        print(f"converting {type(module).__name__} for OpenVINO, once ...", end="", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            _write(module, method, call, partial / MODEL)
        except (OSError, MemoryError):  # the next start tries again
            raise
        except Exception as error:  # of any other kind: the next start does not
            (partial / FAILURE).write_text(one_line(error))
        print(f" {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    try:
        kept = keep_in_cache(f"openvino/{_key(folder, num_examples)}", fill)
    except (OSError, MemoryError) as error:
        raise Unconvertible(one_line(error)) from error
    if (failure := kept / FAILURE).is_file():
        raise Unconvertible(failure.read_text())
    return Converted(module, method, kept / MODEL, num_threads=num_threads, num_examples=num_examples)


def _write(module: nn.Module, method: str, call: Callable[[Any], object], path: Path) -> None:
    """Trace the module and write OpenVINO's model, with weights as they are."""
    openvino = import_openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    recorder = _Recorder(module, method)
    frontend = FrontEndManager().load_by_framework("pytorch")
    with torch.no_grad(), folded_upsampling(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: what a trace gets wrong, the comparison with torch finds
        call(recorder)
        args, kwargs = recorder.calls[0]
        traced = TorchScriptPythonDecoder(
            _Traced(module, method, args, kwargs), example_input=tuple(flatten(args, kwargs, EXAMPLES)[0])
        )
        openvino.save_model(frontend.convert(frontend.load(traced)), path, compress_to_fp16=False)


class _Recorder:
    """Stands in for a module, and keeps what its method is called with."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.config, self._module, self._method = module.config, module, method
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return getattr(self._module, self._method)(*args, **kwargs)


class _Traced(nn.Module):
    """`module.method` of tensors alone; all other arguments are those of an example."""

    def __init__(self, module: nn.Module, method: str, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.module, self.method = module, method
        self._leaves, self._spec = tree_flatten((args, kwargs))

    def forward(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return getattr(self.module, self.method)(*args, **kwargs).sample


def flatten(args: Any, kwargs: Any, num_examples: int) -> tuple[list[Tensor], Hashable]:
    """The tensors of a call, and what calls have in common that a conversion may treat alike: all but the number of
    pictures. That of the traced example is told apart, for a trace may have fixed it."""
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = tuple(str(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
    is_example = len(tensors[0]) == num_examples
    return tensors, (str(spec), others, is_example, *(tensor.shape[1:] for tensor in tensors))


def _key(folder: Path, num_examples: int) -> str:
    """Of all that a converted model depends on. Raises Unconvertible where a version is not known."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    try:
        versions = {name: metadata.version(name) for name in ("openvino", "torch", "diffusers")}
    except metadata.PackageNotFoundError as error:
        raise Unconvertible(f"no package named {error.name} is installed: pip install {error.name}") from error
    text = json.dumps([FORMAT, num_examples, versions, [[path.name, hash_file(path)] for path in files]])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def import_openvino() -> Any:
    """openvino, without its statistics. Raises Unconvertible.

    `import openvino` (2026.4) sends an event to Google Analytics from a thread of openvino_telemetry, and writes an id
    to ~/intel, unless the user has opted out or CI=true is set. Without that package it has a stub that sends nothing.
    """
    # None makes the import fail (docs.python.org, the import system, 5.3.1); typeshed knows of modules alone.
    cast("dict[str, ModuleType | None]", sys.modules).setdefault("openvino_telemetry", None)
    try:
        import openvino
    except ImportError as error:
        raise Unconvertible(f"there is no openvino here ({error}): pip install openvino") from error
    return openvino


@functools.cache
def core() -> Any:
    """The process's one Core, which is never let go.

    Its CPU plugin (2026.4) gives the thread that asks first a stack for signals, and unmaps it at the plugin's end. In
    another thread, that is before the first one has its old stack back: its next signal, Ctrl-C, ends the process.
    """
    return import_openvino().Core()


def one_line(error: Exception) -> str:
    """The end of a message, which says most in OpenVINO's."""
    return " ".join(str(error).split())[-300:] or type(error).__name__


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
