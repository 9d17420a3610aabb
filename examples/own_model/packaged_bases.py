"""Real base models and data that packages carry: nothing comes from a model hub.

The language model, the vision encoder and the text encoder lie in the packages that `make install` brings. The
diffusion model is the VAE and the UNet of the shipped model, which drew nothing but its picture world so far. Data come
from Debian: stamps with captions, and campaigns whose pages have paintings. Both are under GPL-2 or later.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from minigpt5.model.base_models import resolve

STORYBOOK = Path(__file__).parents[2] / "models" / "storybook"
CAMPAIGNS = "did dm dw ei httt l low nr sof sota sotbe thot trow tsg ttb utbs"
PACKAGES = ["tuxpaint-stamps-default", "wesnoth-1.16-data", *(f"wesnoth-1.16-{name}" for name in CAMPAIGNS.split())]
TOOLS = ("apt-get", "dpkg-deb", "rsvg-convert")
STAMPS, WESNOTH = "usr/share/tuxpaint/stamps", "usr/share/games/wesnoth/1.16"
NO_PICTURES = ("symbols", "military")
"""Folders of stamps that are letters, money and flags, or that are not for a child."""


def make_diffusion_base(folder: Path) -> Path:
    """A folder in diffusers' layout: the shipped VAE, UNet and schedule, and MiniLM as its text encoder."""
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        for part in ("vae", "unet", "scheduler"):
            shutil.copytree(STORYBOOK / "decoder" / part, partial / part)
        shutil.copytree(resolve("minilm-l6"), partial / "text_encoder")
        partial.rename(folder)
    return folder


def fetch_data(folder: Path) -> None:
    """Unpack the Debian packages into a folder, without installing them, and draw the stamps that are SVG. Exits where
    a tool is missing or apt-get cannot bring the packages."""
    if folder.exists():
        return
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        sys.exit(
            f"error: there is no {', '.join(missing)}: on Debian, apt-get install librsvg2-bin; or name unpacked "
            "packages with --data"
        )
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "deb").mkdir(parents=True)
    if subprocess.run(["apt-get", "download", "-qq", *PACKAGES], cwd=partial / "deb").returncode:
        sys.exit("error: apt-get could not bring all packages: run apt-get update, or name them with --data")
    for package in sorted((partial / "deb").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, partial], check=True)
    shutil.rmtree(partial / "deb")
    for name in NO_PICTURES:
        shutil.rmtree(partial / STAMPS / name)
    for drawing in sorted((partial / STAMPS).rglob("*.svg")):
        subprocess.run(["rsvg-convert", "-h", "256", drawing, "-o", drawing.with_suffix(".png")], check=False)
    partial.rename(folder)
