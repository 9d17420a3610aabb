"""Starting the server: what can be wrong is said before Ray starts."""

from __future__ import annotations

import dataclasses
import json
import shlex
import socket
from argparse import Namespace
from pathlib import Path

import pytest

from deployments.__main__ import StartError, check_keys, check_model, check_port, check_storage, describe_server
from deployments.application import AppArgs
from deployments.auth import KeysError, add_key, check_host, load_keys
from minigpt5.codec import to_json
from minigpt5.config import storybook
from minigpt5.model.folder_config import compute_fingerprint


def test_a_taken_port_is_named_with_what_to_do() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(StartError, match=rf"port {port} .*make serve PORT=\d+"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("port", [0, 65536, -1])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(StartError, match=f"port is {port}"):
        check_port("127.0.0.1", port)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no config.json"):
        check_model(str(tmp_path))


def test_the_start_says_what_the_model_is_for_and_asks_for_its_first_example() -> None:
    args = Namespace(host="0.0.0.0", port=8123, model="runs/bears/model", storage="stories")
    config = dataclasses.replace(storybook(), name="bears", about="Draws bears.\nNo foxes.", examples=("A bear's den",))
    said = describe_server(args, config, startup_s=3.2, metrics_port=8999, logs="session/logs/serve")
    assert "  model    bears, runs/bears/model\n           Draws bears.\n  stories  stories\n" in said
    [curl] = [line for line in said.splitlines() if "curl" in line]
    assert json.loads(shlex.split(curl)[-1]) == {"prompt": "A bear's den"}
    silent = describe_server(
        args, dataclasses.replace(config, about="", examples=()), startup_s=3.2, metrics_port=8999, logs=""
    )
    assert "bears, runs/bears/model\n  stories" in silent and '{"prompt": "A story"}' in silent


def test_an_example_picture_that_is_no_webp_stops_the_start(tmp_path: Path) -> None:
    config = dataclasses.replace(storybook(), fingerprint=compute_fingerprint(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "1.webp").write_bytes(b"GIF89a")
    with pytest.raises(StartError, match="no WebP picture"):
        check_model(str(tmp_path))


def test_storage_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(StartError, match="/proc/version"):
        check_storage("/proc/version/stories")


def test_an_address_that_others_can_reach_needs_keys(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="python -m deployments.auth"):
        check_keys("0.0.0.0", "")
    with pytest.raises(StartError, match="cannot be read"):
        check_keys("127.0.0.1", str(tmp_path / "keys.json"))
    add_key(tmp_path / "keys.json", "alice", per_minute=1, concurrent=1)
    check_keys("0.0.0.0", str(tmp_path / "keys.json"))
    check_keys("127.0.0.1", "")


def test_arguments_of_the_builder_are_typed() -> None:
    args = AppArgs.model_validate({"model": "x", "decoder_max_replicas": "3", "generator_num_cpus": "0.5"})
    assert (args.decoder_max_replicas, args.generator_num_cpus) == (3, 0.5)
    assert args.decoder_precision is None, "the engine chooses by its device"
    assert AppArgs.model_validate({"decoder_precision": "float16"}).decoder_precision == "float16"
    with pytest.raises(ValueError, match="decoder_precision"):
        AppArgs.model_validate({"decoder_precision": "int8"})
    with pytest.raises(ValueError, match="colour"):
        AppArgs.model_validate({"colour": "red"})
    with pytest.raises(ValueError, match="decoder_min_replicas is 3"):
        AppArgs.model_validate({"decoder_min_replicas": 3, "decoder_max_replicas": 2})


def test_an_address_that_others_reach_needs_keys(tmp_path: Path) -> None:
    """Whichever command binds it: the front itself refuses to start."""
    add_key(tmp_path / "keys.json", "alice", per_minute=1, concurrent=1)
    keys = load_keys(str(tmp_path / "keys.json"))
    for host in ("127.0.0.1", "localhost", "::1"):
        check_host(host, None)
    for host in ("0.0.0.0", "", "::", "10.0.0.1"):
        check_host(host, keys)
        with pytest.raises(KeysError, match="python -m deployments.auth keys.json NAME"):
            check_host(host, None)


@pytest.mark.parametrize(
    ("filters", "is_good"), [("text", True), ("none", True), ("text,picture", True), ("words", False)]
)
def test_only_filters_that_there_are_can_be_asked_for(filters: str, is_good: bool) -> None:
    if is_good:
        assert AppArgs(filters=filters).filters == filters
    else:
        with pytest.raises(ValueError, match="there is no 'words'"):
            AppArgs(filters=filters)


def test_two_cpus_have_room_for_one_replica_of_each_engine() -> None:
    args = AppArgs()
    room = 2 - 0.1 - args.generator_num_cpus - args.decoder_num_cpus
    assert 0 <= room < min(args.generator_num_cpus, args.decoder_num_cpus)
    assert Path(args.model).is_absolute()


def test_the_builder_wires_three_deployments_of_fixed_names(tmp_path: Path) -> None:
    from deployments import app

    (tmp_path / "config.json").write_text(json.dumps(to_json(storybook())))
    application = app(AppArgs(model=str(tmp_path), storage=str(tmp_path)))
    names = {application._bound_deployment.name}
    names |= {argument._bound_deployment.name for argument in application._bound_deployment.init_args[:2]}
    assert names == {"Ingress", "VokenGenerator", "DiffusionDecoder"}
