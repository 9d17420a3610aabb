"""A design -> one HTML file with everything in it, or a folder for a web server. The key lies beside it, never inside.

The page fetches nothing and sends nothing: its Content-Security-Policy names its own script and style by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from minigpt5.errors import StorageError
from minigpt5.evaluation.study.answers import read_key
from minigpt5.evaluation.study.design import Design
from minigpt5.evaluation.study.runs import StudyError
from minigpt5.storage import open_place, write_whole

MAX_BYTES = 2**26
"""Largest page that is written as one file: browsers get slow beyond it."""
ASSETS = Path(__file__).parent
PICTURES = "pictures"
"""The folder of pictures beside index.html."""


def write_study(design: Design, out: Path) -> tuple[Path, Path]:
    """Write FILE.html or FOLDER/index.html; returns the page and the key. Raises StudyError, StorageError."""
    out = out.resolve()
    if not out.name:
        raise StudyError(f"{out} has no name, and the key lies beside it: let --out name a file or a new folder")
    is_file = out.suffix.lower() in (".html", ".htm")
    page, key = out if is_file else out / "index.html", key_path(out)
    if is_file and (size := sum(map(len, design.pictures.values())) * 4 // 3) > MAX_BYTES:
        raise StudyError(
            f"{out} would have {size / 2**20:.0f} MiB of pictures, above {MAX_BYTES // 2**20}: lower --items or "
            "--picture-px, or let --out name a folder for a web server"
        )
    check_key_is_free(key, design.key.study)
    files = {key: design.key.to_json().encode(), page: to_html(design, inline=is_file).encode()}
    if not is_file:
        files |= {out / PICTURES / name: data for name, data in design.pictures.items()}
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(*open_place(path), data)
    except OSError as error:
        raise StorageError(f"{out} cannot be written ({error.strerror}): name another place") from error
    return page, key


def check_key_is_free(path: Path, study: str) -> None:
    """Raises StudyError where the key of another study is there: its answers could never be tallied without it."""
    if path.exists() and read_key(path).study != study:
        raise StudyError(f"{path} is the key of another study: name another --out, or move it")


def key_path(out: Path) -> Path:
    """Where the key of a page or a folder lies: beside it."""
    return out.with_name(f"{out.stem if out.suffix.lower() in ('.html', '.htm') else out.name}.key.json")


def to_html(design: Design, *, inline: bool) -> str:
    """The page, with its pictures as data URIs, or as paths into the folder of pictures."""
    style, script = ((ASSETS / f"study.{kind}").read_text() for kind in ("css", "js"))
    places = {name: _data_uri(data) if inline else f"{PICTURES}/{name}" for name, data in design.pictures.items()}
    policy = (
        f"default-src 'none'; img-src {'data:' if inline else chr(39) + 'self' + chr(39)}; "
        f"script-src {_source(script)}; style-src {_source(style)}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": policy,
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _json({**design.content, "pictures": places}),
    }
    html = (ASSETS / "study.html").read_text()
    before, *rest = html.split("@@")  # text, name, text, name, text: no replaced text is looked into again
    return before + "".join(parts[name] + text for name, text in zip(rest[::2], rest[1::2], strict=True))


def _json(content: dict[str, object]) -> str:
    """JSON that cannot end the script element around it, whatever the texts say."""
    return json.dumps(content).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _source(text: str) -> str:
    """The policy's name of an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data_uri(data: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"
