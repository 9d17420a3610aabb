"""Style adapters of a denoiser: LoRA (arXiv 2106.09685) in diffusers' format, loaded when a picture asks for one.

A style is the file `adapters/<name>/pytorch_lora_weights.safetensors` of a model folder, as diffusers' training scripts
write it. diffusers' own loader reads it, so that the names of other trainers are converted as its pipelines do. Only
the denoiser's part is used: vokens stand where the text encoder was.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minigpt5.errors import ModelFolderError
from minigpt5.types import STYLE_FILE

STYLE_BYTES = 2**30
"""Size of the adapters that a denoiser holds at once, and of one file."""
MAX_RANK = 1024
METADATA = "lora_adapter_metadata"
KEPT_METADATA = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")
"""What a file may say of its adapter: its ranks, its scale and its layers."""
LORA_B = ("lora_B.", "lora_up.", "lora.up.", "_lora.up.")
LORA_A = ("lora_A.", "lora_down.", "lora.down.", "_lora.down.")


class Styles:
    """The adapters of one denoiser; the least recently used ones leave it when the bytes run out. One thread uses it.

    With no adapter active, the denoiser computes what it computes without any.
    """

    def __init__(
        self,
        denoiser: Any,
        folder: Path,
        *,
        pipeline: str,
        prefix: str,
        max_bytes: int = STYLE_BYTES,
        mend: Callable[[Any], None] = lambda denoiser: None,
    ) -> None:
        """`folder` holds a folder for each style. `pipeline`: diffusers' class that knows the format; `prefix`: of the
        denoiser's tensors. `mend` is called with the denoiser when layers have been added to it."""
        self.denoiser, self.folder, self.max_bytes = denoiser, folder, max_bytes
        self._pipeline, self._prefix, self._mend = getattr(diffusers, pipeline), prefix, mend
        self._bytes: OrderedDict[str, int] = OrderedDict()
        self._active = ""

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the styles in the denoiser, the least recently used first."""
        return tuple(self._bytes)

    def use(self, name: str) -> None:
        """Let the denoiser draw in a style, or in none (""), from now on. Raises ModelFolderError."""
        if name and name not in self._bytes:
            self._load(name)
        if name:
            self._bytes.move_to_end(name)
        if name != self._active:
            self._switch(name)
        while len(self._bytes) > 1 and sum(self._bytes.values()) > self.max_bytes:
            oldest, _ = self._bytes.popitem(last=False)
            self.denoiser.delete_adapters(_adapter(oldest))

    def _switch(self, name: str) -> None:
        for layer in self.denoiser.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.set_adapter([_adapter(name)] if name else [], inference_mode=True)
                layer.enable_adapters(enabled=bool(name))
        self._active = name

    def _load(self, name: str) -> None:
        path = self.folder / name / STYLE_FILE
        tensors, alphas, metadata = self._read(path)
        try:
            with _fitting(path), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
                warnings.filterwarnings("ignore", message="Adapter .* was active")  # of a load that fails
                self.denoiser.load_lora_adapter(
                    tensors,
                    prefix=self._prefix,
                    adapter_name=_adapter(name),
                    network_alphas=alphas,
                    metadata=metadata,
                )
        except ModelFolderError:
            self._remove_leftovers(name)
            raise
        self._active = _UNKNOWN  # a new adapter is the active one in the layers that it has
        added = {key: value for key, value in self.denoiser.state_dict().items() if f".{_adapter(name)}." in key}
        num_expected = sum(key.startswith(f"{self._prefix}.") for key in tensors)
        if len(added) != num_expected:
            self._remove_leftovers(name)
            raise _foreign(path, f"{num_expected - len(added)} of its {num_expected} tensors are of no layer here")
        self._mend(self.denoiser)
        self.denoiser.eval()
        self._bytes[name] = sum(value.nbytes for value in added.values())

    def _remove_leftovers(self, name: str) -> None:
        """Take out what a failed load has left, so that the denoiser is as before."""
        self._switch("")
        if _adapter(name) in getattr(self.denoiser, "peft_config", {}):
            self.denoiser.delete_adapters(_adapter(name))

    def _read(self, path: Path) -> tuple[dict[str, Tensor], Any, dict[str, Any] | None]:
        """Tensors by name, the scales that other trainers' files have, and what the file says of its adapter."""
        check_style_file(path)
        options = {"unet_config": self.denoiser.config} if self._prefix == "unet" else {}
        with _fitting(path):
            tensors, *alphas, metadata = self._pipeline.lora_state_dict(
                path.parent,
                weight_name=path.name,
                use_safetensors=True,
                local_files_only=True,
                return_lora_metadata=True,
                **options,
            )
        if not any(key.startswith(f"{self._prefix}.") for key in tensors):
            raise _foreign(path, f"no tensor's name begins with {self._prefix!r}")
        if not isinstance(metadata, dict | None):
            raise _foreign(path, f"its {METADATA} is no object")
        if metadata:
            kept = tuple(f"{self._prefix}.{key}" for key in KEPT_METADATA)
            metadata = {key: value for key, value in metadata.items() if key in kept}
        return tensors, (alphas[0] if alphas else None), metadata or None


_UNKNOWN = "?"
"""No style's name: the next `use` switches in any case."""


def check_style_file(path: Path, *, max_bytes: int = STYLE_BYTES) -> None:
    """Check size, format and ranks by the header alone. Raises ModelFolderError."""
    if not path.is_file():
        raise ModelFolderError(f"there is no file {path}: restore it or ask for another style")
    if (size := path.stat().st_size) > max_bytes:
        raise ModelFolderError(f"{path} has {size} bytes but a style must have at most {max_bytes}: remove it")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            said = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, ValueError) as error:
        raise ModelFolderError(f"{path} is no safetensors file ({error}): convert or remove it") from error
    rank = max([*_ranks_of(shapes), *_ranks_said(said)], default=0)
    if rank > MAX_RANK:
        raise ModelFolderError(f"{path} has an adapter of rank {rank} but must have at most {MAX_RANK}: remove it")


def _ranks_of(shapes: Mapping[str, list[int]]) -> list[int]:
    ranks = []
    for key, shape in shapes.items():
        if len(shape) > 1:
            ranks += [shape[0]] if any(part in key for part in LORA_A) else []
            ranks += [shape[1]] if any(part in key for part in LORA_B) else []
    return ranks


def _ranks_said(metadata: Any) -> list[int]:
    """What the metadata says; layers are made with these ranks before tensors are compared."""
    ranks: list[Any] = []
    for key, value in metadata.items() if isinstance(metadata, dict) else ():
        if key.rpartition(".")[2] == "r":
            ranks.append(value)
        elif key.rpartition(".")[2] == "rank_pattern" and isinstance(value, dict):
            ranks += value.values()
    return [rank for rank in ranks if isinstance(rank, int)]


def _adapter(name: str) -> str:
    """PEFT keeps adapters by name among a module's attributes; no attribute has this name."""
    return f"style_{name}"


@contextlib.contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """diffusers and PEFT raise whatever they stumble over in foreign files. Raises ModelFolderError."""
    try:
        yield
    except Exception as error:
        raise _foreign(path, str(error) or type(error).__name__) from error


def _foreign(path: Path, why: str) -> ModelFolderError:
    return ModelFolderError(f"{path} does not fit the model's denoiser ({why[:300]}): train it on this or remove it")
