"""Training rows -> training rows whose pictures are read and encoded already, as a Ray Data job.

    python -m batch_jobs.precompute /data/vist --model models/storybook --output /data/vist-encoded
    python -m batch_jobs.precompute /data/cc3m --model /data/own --output /data/cc3m-encoded --stages align --gpus 1

Each picture is replaced by the VAE's moments and the vision encoder's features, both float16: what training would
compute from it at every epoch. With `--stages` rows hold what those stages read and no more: `align` needs no features.
Both are as the encoders give them: training draws from the moments, and normalises what it has drawn. A file that is
written is never written again: the same command resumes where it stopped. Pictures that the source holds encoded only
are taken as they are, where the source names the same encoders; else the job is refused.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pyarrow import fs, parquet

from batch_jobs.pipeline import ENGINE_CPUS, check_capacity, connect
from batch_jobs.prepare import to_parquet
from minigpt5.codec import from_json, to_json
from minigpt5.commands import check_default_model, check_kept
from minigpt5.errors import InvalidRequest, MiniGPT5Error
from minigpt5.model.image_transforms import fit_drawn, fit_read
from minigpt5.objective.encoders import ALL_FIELDS, Encoders, fields_read, find_encoders
from minigpt5.objective.stored_example import ROW_SCHEMA
from minigpt5.storage import open_place, read_json, write_whole

if TYPE_CHECKING:
    from torch import Tensor

BATCH_PICTURES = 16
STAGES = ("vision", "align", "learn", "refine", "distill")
"""Stages of training that read what is encoded."""


class Encode:
    """Files of rows -> files of encoded rows; holds the two encoders."""

    def __init__(
        self,
        *,
        model: str,
        source: str,
        output: str,
        keeps_pictures: bool,
        num_threads: int,
        fields: tuple[str, ...] = ALL_FIELDS,
        device: str = "cpu",
    ) -> None:
        """`fields`: which of ALL_FIELDS it makes."""
        import torch

        from minigpt5.model.decoders.load import load_diffusion
        from minigpt5.model.folder import load_vision
        from minigpt5.model.folder_config import load_config
        from minigpt5.model.locate import find_part, locate

        torch.set_num_threads(num_threads)
        folder = self._model = locate(model)
        self.config = load_config(folder)
        self.fields = fields
        self._encoders: Encoders | None = None
        self.vision = self.diffusion = None
        if "features" in fields and self.config.vision.family != "none":
            self.vision = load_vision(folder, self.config).eval().to(device)
        if "moments" in fields:
            base = find_part(folder, self.config, self.config.diffusion)
            self.diffusion = load_diffusion(base, has_denoiser=False).eval()
            self.diffusion.vae.to(device)
        self.device = device
        self.keeps_pictures = keeps_pictures
        self._source, self._output = source, output

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        """Write one file. `problem` says why its rows cannot be encoded; then no file is written."""
        files, folder = open_place(self._output)
        path = f"{folder}/rows/{row['file'].rpartition('/')[2]}"
        if files.get_file_info(path).type == fs.FileType.File:
            with files.open_input_file(path) as file:
                return {"pictures": count_pictures(file), "files": 0, "problem": ""}
        source, _ = open_place(self._source)
        with source.open_input_file(row["file"]) as file:
            rows = parquet.read_table(file).to_pylist()
        pictures = [one for stored in rows for one in stored["segments"] if one["text"] is None]
        segments = [one for one in pictures if one["picture"] is not None]
        try:
            self._take([one for one in pictures if one["picture"] is None])
        except InvalidRequest as problem:
            return {"pictures": 0, "files": 0, "problem": str(problem)}
        for start in range(0, len(segments), BATCH_PICTURES):
            self._encode(segments[start : start + BATCH_PICTURES])
        write_whole(files, path, to_parquet(rows, ROW_SCHEMA))
        return {"pictures": len(pictures), "files": 1, "problem": ""}

    def _take(self, segments: list[dict[str, Any]]) -> None:
        """Keep of segments without pictures what this job would make. Raises InvalidRequest where another model made
        it, or it is not there."""
        if not segments:
            return
        own = self._find_encoders()
        check_taken(self._source, own)
        for segment in segments:
            for field in ALL_FIELDS:
                if own.maker_of(field) is None:
                    segment[field] = None
                elif segment[field] is None:
                    raise InvalidRequest("source", f"{self._source} has rows with neither pictures nor {field}")

    def _find_encoders(self) -> Encoders:
        # Not a cached_property: Ray copies the class, and that of Python 3.11 holds a lock.
        if self._encoders is None:
            self._encoders = find_encoders(self._model, self.config, fields=self.fields)
        return self._encoders

    def _encode(self, segments: list[dict[str, Any]]) -> None:
        import torch

        for segment in segments:
            segment.update(dict.fromkeys(ALL_FIELDS))  # another model may have made them
        with torch.no_grad():
            if self.diffusion:
                self._store("moments", segments, self._encode_drawn(segments))
            if self.vision:
                read = [fit_read(one["picture"], self.config.vision.image_px) for one in segments]
                self._store("features", segments, self.vision.encode(read))
        for segment in segments:
            if not self.keeps_pictures:
                segment["picture"] = None

    def _encode_drawn(self, segments: list[dict[str, Any]]) -> Tensor:
        from minigpt5.model.pixels import to_tensor

        drawn = np.stack([fit_drawn(one["picture"], self.config.image_px) for one in segments])
        assert self.diffusion
        return self.diffusion.to_moments(to_tensor(drawn).to(self.device))

    def _store(self, field: str, segments: list[dict[str, Any]], encoded: Tensor) -> None:
        for segment, array in zip(segments, encoded.half().cpu().numpy(), strict=True):
            segment[field] = to_npy(array)


def count_pictures(file: Any) -> int:
    """The pictures of a file of rows, encoded or not: its segments that are no text."""
    stored = parquet.ParquetFile(file)
    paths = [stored.schema.column(index).path for index in range(len(stored.schema.names))]
    texts = next(path for path in paths if path.startswith("segments.") and path.endswith(".text"))
    segments = stored.read(columns=[texts])["segments"].combine_chunks().flatten()
    return int(segments.field("text").null_count)


def to_npy(array: np.ndarray) -> bytes:
    """An array in NumPy's own format, as training reads it."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def precompute(
    source: str,
    output: str,
    *,
    model: str,
    keeps_pictures: bool,
    workers: int,
    num_threads: int,
    stages: Sequence[str] = STAGES,
    num_gpus: float = 0.0,
) -> dict[str, Any]:
    """The whole job; returns the manifest. `num_gpus` of each worker. Raises InvalidRequest, also where OUTPUT holds
    another data set."""
    import ray

    from minigpt5.model.locate import shared_name

    check_kept(output, option="--output")
    check_default_model(model)
    connect(workers)
    check_capacity(workers, num_gpus)
    files, folder = open_place(source)
    infos = files.get_file_info(fs.FileSelector(f"{folder}/rows", allow_not_found=True))
    names = sorted(info.path for info in infos if info.path.endswith(".parquet"))
    if not names:
        raise InvalidRequest("source", f"no rows under {source}/rows: make them with python -m batch_jobs.prepare")
    read = {field for stage in stages for field in fields_read(stage, reads_pictures=True)}
    fields = tuple(field for field in ALL_FIELDS if field in read)
    asked = begin(source, output, model=model, keeps_pictures=keeps_pictures, fields=fields)
    done = ray.data.from_items([{"file": name} for name in names], override_num_blocks=len(names)).map(
        Encode,
        fn_constructor_kwargs={
            "model": shared_name(model),  # actors have another working folder
            "source": absolute(source),
            "output": absolute(output),
            "keeps_pictures": keeps_pictures,
            "num_threads": num_threads,
            "fields": fields,
            "device": "cuda" if num_gpus else "cpu",
        },
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=ENGINE_CPUS,
        num_gpus=num_gpus or None,
    )
    num_pictures = 0
    for count in done.iter_rows():
        if count["problem"]:
            raise InvalidRequest("source", count["problem"])
        num_pictures += int(count["pictures"])
    manifest = {**asked, "files": len(names), "pictures": num_pictures}
    target, place = open_place(output)
    write_whole(target, f"{place}/manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def begin(
    source: str, output: str, *, model: str, keeps_pictures: bool, fields: tuple[str, ...] = ALL_FIELDS
) -> dict[str, Any]:
    """Write OUTPUT/plan.json, which says what the rows are encoded from and by, and return it. Raises InvalidRequest
    where OUTPUT was begun otherwise, or the source was encoded by another model and holds no pictures."""
    from minigpt5.model.folder_config import load_config
    from minigpt5.model.locate import locate

    folder = locate(model)
    config = load_config(folder)
    own = find_encoders(folder, config, fields=fields)
    asked = {"source": source, "model": config.fingerprint, "encoders": to_json(own), "keeps_pictures": keeps_pictures}
    files, place = open_place(output)
    begun = read_json(files, f"{place}/plan.json")
    if begun is None and files.get_file_info(f"{place}/rows").type != fs.FileType.NotFound:
        raise InvalidRequest("output", f"{output} has rows and no plan.json, which says what made them: name another")
    if begun is not None and {**asked, **begun} != asked:  # an earlier version noted no encoders
        raise InvalidRequest(
            "output", f"{output} was begun from another source or model, or for other stages: name another"
        )
    if noted_of(source).get("keeps_pictures") is False:
        check_taken(source, own)
    write_whole(files, f"{place}/plan.json", json.dumps(asked).encode())
    return asked


def check_taken(source: str, own: Encoders) -> None:
    """Raise InvalidRequest where what a source holds of pictures is not known to be of these encoders."""
    noted = noted_of(source).get("encoders")
    made_by = from_json(Encoders, noted) if noted else None
    for field in ALL_FIELDS:
        if own.maker_of(field) and (made_by is None or made_by.maker_of(field) != own.maker_of(field)):
            whose = "does not say which encoders made" if made_by is None else "was encoded by others that made"
            raise InvalidRequest(
                "source",
                f"{source} holds no pictures, and {whose} its {field}: name the rows as they were before precompute",
            )


def noted_of(source: str) -> dict[str, Any]:
    """What an earlier job wrote of a data set in its plan and its manifest."""
    files, folder = open_place(source)
    return {
        key: value
        for name in ("plan.json", "manifest.json")
        for key, value in (read_json(files, f"{folder}/{name}") or {}).items()
    }


def absolute(uri: str) -> str:
    """A path that means the same in every process; URIs are that already."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def make_parser() -> argparse.ArgumentParser:
    from minigpt5.config import default_model_folder

    parser = argparse.ArgumentParser(
        prog="python -m batch_jobs.precompute",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="what batch_jobs.prepare has written, path or URI")
    parser.add_argument("--model", default=str(default_model_folder()), help="folder with the encoders to use")
    parser.add_argument("--output", required=True, help="folder or URI")
    parser.add_argument("--keep-pictures", action="store_true", help="beside what is made of them")
    parser.add_argument("--workers", type=int, default=1, help="encoders at once (default %(default)s)")
    parser.add_argument("--gpus", type=float, default=0.0, help="of each encoder (default %(default)g)")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=STAGES,
        metavar="STAGE",
        help="encode only what these stages of training read (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each (default %(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        manifest = precompute(
            options.source,
            options.output,
            model=options.model,
            keeps_pictures=options.keep_pictures,
            workers=options.workers,
            num_threads=options.threads,
            stages=options.stages,
            num_gpus=options.gpus,
        )
    except MiniGPT5Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{manifest['pictures']} pictures encoded, {manifest['files']} files in {options.output}/rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
