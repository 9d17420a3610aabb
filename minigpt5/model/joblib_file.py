"""A joblib file without joblib, and without running what it names."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class _Parts(dict):
    """Stands for an object of any class: what it would have set, and nothing that it would have run."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)


class _Wrapped:
    """Stands for joblib's wrapper of an array."""

    array: np.ndarray


class _Plain(io.FileIO):
    """A file without `peek`: an unpickler reads no further in it than it has come."""


class _JoblibUnpickler(pickle.Unpickler):
    """joblib writes an array behind the opcode that sets its wrapper's state, aligned to 16 bytes: the wrapper that
    stands for joblib's reads it then."""

    _NUMPY = ("ndarray", "dtype", "float64", "int64")

    def __init__(self, file: _Plain) -> None:
        super().__init__(file)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        if module == "numpy" and name in self._NUMPY:
            return getattr(np, name)
        if (module, name) == ("numpy._core.multiarray", "scalar"):
            return lambda dtype, data: np.frombuffer(data, dtype)[0]
        if name != "NumpyArrayWrapper":
            return type(name, (_Parts,), {})
        file = self._file

        class Wrapper(_Wrapped):
            def __setstate__(self, state: dict[str, Any]) -> None:
                file.read(file.read(1)[0])
                count = int(np.prod(state["shape"], dtype=int))
                flat = np.frombuffer(file.read(count * state["dtype"].itemsize), state["dtype"])
                self.array = flat.reshape(state["shape"], order=state["order"])

        return Wrapper


def read_joblib(path: Path) -> Any:
    """The file's objects as dicts of what they hold, its arrays as arrays. Raises pickle.UnpicklingError."""
    with _Plain(path) as file:
        return _unwrap(_JoblibUnpickler(file).load())


def _unwrap(value: Any) -> Any:
    """The array in the place of what wrapped it, at any depth."""
    if isinstance(value, _Wrapped):
        return value.array
    if isinstance(value, dict):
        return {key: _unwrap(one) for key, one in value.items()}
    return [_unwrap(one) for one in value] if isinstance(value, list) else value
