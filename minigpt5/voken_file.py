"""Vokens <-> safetensors bytes: what is stored with a page, and what a client or a batch job reads."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import load, save

from minigpt5.types import Vokens


def pack(vokens: Vokens) -> bytes:
    """One tensor, `hidden_VH`; the fingerprint is in the header."""
    return save({"hidden_VH": np.ascontiguousarray(vokens.hidden_VH)}, {"fingerprint": vokens.fingerprint})


def unpack(data: bytes, *, page: int) -> Vokens:
    """The inverse of `pack`, for bytes that this project wrote."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return Vokens(page=page, hidden_VH=load(data)["hidden_VH"], fingerprint=header["__metadata__"]["fingerprint"])
