"""Rows that precompute.py encoded are learnt from only with the encoders that made them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from minigpt5.codec import from_json
from minigpt5.errors import TrainingError
from minigpt5.objective.encoders import Encoders
from training.data.stored import StoredExamples, open_place

ENCODER_NAMES = {"moments": "VAE", "features": "vision encoder"}
"""What fills each field of a stored picture."""
PROBED_ROWS = 64
"""Rows that are looked through for a picture."""


def check_encoders(examples: StoredExamples, find_own: Callable[[], Encoders], *, remedy: str) -> None:
    """Check that this run's encoders would make of the pictures what is stored of them, as far as its stage reads it.

    Rows of an earlier version do not say what encoded them; one printed line says so. Raises TrainingError, which ends
    with `remedy`.
    """
    picture = _first_picture(examples)
    if picture is None:
        if examples.stage == "learn":  # text alone is learnt too
            return
        raise TrainingError(
            f"the first {PROBED_ROWS} rows in {examples.uri} have no pictures, which stage {examples.stage} learns "
            "from: prepare rows with pictures, or leave these out"
        )
    for field in examples.fields_read:
        name = ENCODER_NAMES[field]
        if picture[field] is None:
            if picture["picture"] is None:
                raise TrainingError(
                    f"the rows in {examples.uri} have neither pictures nor what a {name} makes of them, which stage "
                    f"{examples.stage} learns from: {remedy}"
                )
            continue  # the run encodes the pictures itself
        stored = load_encoders(examples.uri)
        if stored is None:
            print(
                f"the rows in {examples.uri} do not say which {name} encoded them: it must be the model's", flush=True
            )
            continue
        theirs, own = stored.maker_of(field), find_own().maker_of(field)
        if theirs != own:
            seen, expected = (
                "none" if one is None else f"{one.sha256[:12]} at {one.image_px} px" for one in (theirs, own)
            )
            raise TrainingError(
                f"the rows in {examples.uri} were encoded by another {name} ({seen}) than this run's "
                f"({expected}): {remedy}"
            )


def _first_picture(examples: StoredExamples) -> dict[str, Any] | None:
    rows = (examples.stored(position) for position in range(min(PROBED_ROWS, len(examples))))
    return next((one for row in rows for one in row["segments"] if one["text"] is None), None)


def load_encoders(uri: str) -> Encoders | None:
    """The encoders that a data set names: in its manifest, or in its plan while the job that writes it is not done.
    None where it names none. Raises TrainingError where they cannot be read."""
    files, folder = open_place(uri)
    for name in ("manifest.json", "plan.json"):
        path = f"{folder}/{name}"
        try:
            with files.open_input_stream(path, compression=None) as file:
                values = json.loads(file.read())
            return from_json(Encoders, values["encoders"]) if "encoders" in values else None
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError) as error:
            raise TrainingError(f"{uri}/{name} is damaged ({error}): encode the rows again") from error
    return None
