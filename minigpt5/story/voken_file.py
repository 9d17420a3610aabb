"""Vokens <-> safetensors bytes: what is stored with a page, and what a client or a batch job reads."""

from __future__ import annotations

import json

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from minigpt5.errors import InvalidRequest
from minigpt5.types import Vokens


def pack(vokens: Vokens) -> bytes:
    """One tensor, `hidden_VH`; the fingerprint is in the header."""
    return save({"hidden_VH": np.ascontiguousarray(vokens.hidden_VH)}, {"fingerprint": vokens.fingerprint})


def unpack(data: bytes, *, page: int) -> Vokens:
    """The inverse of `pack`. Raises InvalidRequest where `data` is anything else; whether a decoder can draw it is
    the decoder's to say."""
    try:
        hidden_VH = load(data)["hidden_VH"]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        fingerprint = header["__metadata__"]["fingerprint"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(
            "vokens",
            f"vokens ({len(data)} bytes) must be a safetensors file with a tensor hidden_VH and a fingerprint, as "
            f"GET /v1/stories/{{id}}/pages/{{n}}/vokens gives it: {type(error).__name__} {str(error)[:80]}",
        ) from error
    if hidden_VH.ndim != 2 or hidden_VH.dtype != np.float32 or not np.isfinite(hidden_VH).all():
        raise InvalidRequest(
            "vokens",
            f"vokens have shape {hidden_VH.shape} and type {hidden_VH.dtype} but must be finite float32 in two "
            "dimensions",
        )
    return Vokens(page=page, hidden_VH=hidden_VH, fingerprint=fingerprint)
