"""Every command, link, path, setting and figure of README and docs is one that exists."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from benchmarks import tables
from deployments.api import routes
from deployments.api.chat import SERVED, CreateChat, StreamOptions
from deployments.api.images import CreateImages
from deployments.api.openai_body import IGNORED, OpenAIBody
from deployments.application import AppArgs
from deployments.observability.metrics import METRICS
from deployments.schemas import CreateStory
from tests.helpers.cluster_files import job_commands
from training.presets import load_presets, override
from training.storybook.presets import STORYBOOK

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*ROOT.glob("*.md"), *DOCS, *(ROOT / "models").glob("*/*.md")]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.S | re.M)
SHELL = ("", "sh", "bash")
CLUSTER = (". .venv/bin/activate", "export RAY_AUTH_MODE=token", "ray ")
"""Commands of docs/bulk.md that tests/batch_jobs/test_submitted.py runs, or its cluster stands for."""
UPGRADE = ("serve deploy cluster/serve-storybook.yaml",)
"""The command of docs/operations.md that tests/deployments/test_upgrade_live.py runs."""
KUBERNETES = ("kubectl ", "docker build ", "docker tag ", "docker push ", "sed -i ")
"""Commands of docs/kubernetes.md; tests/cluster/test_kubernetes_page.py compares them with the files."""
OURS = re.compile(r"python -m ((?:minigpt5|deployments|training|batch_jobs|benchmarks|tests)[\w.]*)([^`#\n]*)")
PLACEHOLDER = re.compile(r"[A-Z]{3,}|\[.*|key=value")

each_page = pytest.mark.parametrize("page", TEXTS)


def blocks(page: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(TEXTS[page]) if language in languages]


def shell_lines(page: str) -> list[str]:
    """Commands of a page's code blocks, and its inline code."""
    joined = "\n".join(blocks(page, *SHELL)).replace("\\\n", " ")
    prose = FENCE.sub("", TEXTS[page])
    lines = [*joined.splitlines(), *re.findall(r"`([^`]+)`", prose)]
    return [" ".join(line.split(" #")[0].split()) for line in lines]


def commands() -> list[list[str]]:
    """The words after `python -m` of every command without placeholders."""
    found = [
        [module, *shlex.split(rest)]
        for page in TEXTS
        for line in shell_lines(page)
        for module, rest in OURS.findall(line)
    ]
    whole = [words for words in found if not any(PLACEHOLDER.fullmatch(word) for word in words)]
    return [list(words) for words in sorted({tuple(words) for words in whole})]


@each_page
def test_every_line_of_a_shell_block_is_a_command_that_a_test_reads(page: str) -> None:
    starts = (
        "git clone ",
        "make ",
        "curl ",
        ".venv/bin/python -m ",
        "python -m ",
        ".ci/run",
        *CLUSTER,
        *UPGRADE,
        *KUBERNETES,
    )
    lines = "\n".join(blocks(page, *SHELL)).replace("\\\n", " ").splitlines()
    assert not [line for line in lines if line and not line.lstrip().startswith(starts)]


def test_make_targets_and_their_variables_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, flags=re.M))
    lines = [line for page in TEXTS for line in shell_lines(page) for line in line.split("&&")]
    words = [word for line in lines if line.strip().startswith("make ") for word in shlex.split(line)[1:]]
    named = {word for word in words if "=" not in word and "." not in word}
    assert {"serve", "test", "story", "docs"} <= named <= targets
    assert {word.partition("=")[0] for word in words if "=" in word} <= variables


PARSE = """
import argparse, contextlib, io, itertools, json, os, runpy, sys
import batch_jobs.job, deployments.application, tests.helpers.preloaded, training.loop  # once: forks share them

PARSED = 77


def stopping(parse):
    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise SystemExit(PARSED)
    return parse_and_stop


def run(words):
    said, sys.argv = io.StringIO(), words
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return words, end.code, said.getvalue()[-300:]
    except BaseException as failure:
        return words, repr(failure), said.getvalue()[-300:]
    return words, None, said.getvalue()[-300:]


argparse.ArgumentParser.parse_args = stopping(argparse.ArgumentParser.parse_args)
argparse.ArgumentParser.parse_intermixed_args = stopping(argparse.ArgumentParser.parse_intermixed_args)
for _, asked in itertools.groupby(json.load(sys.stdin), key=lambda words: words[0]):
    if not (child := os.fork()):
        for words in asked:
            print(json.dumps(run(list(words))), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def parse_all(asked: list[list[str]]) -> list[tuple[list[str], int | str | None, str]]:
    """Run each command to the end of its parser; 77 says that it parsed."""
    process = subprocess.run(
        [sys.executable, "-c", PARSE], cwd=ROOT, input=json.dumps(sorted(asked)), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-1000:]
    return [tuple(json.loads(line)) for line in process.stdout.splitlines()]


def test_the_options_of_every_command_parse() -> None:
    """Those of the pages, and the entry points of the jobs on Kubernetes."""
    asked = [*commands(), *job_commands().values()]
    assert len(asked) > 25
    wrong = ["batch_jobs.illustrate", "prompts.jsonl", "--outputs-into", "stories"]
    answers = parse_all([*asked, wrong])
    assert len(answers) == len(asked) + 1
    for words, code, said in answers:
        expected = 2 if words == wrong else 0 if "--help" in words else 77
        assert code == expected, (words, code, said)


@each_page
def test_python_modules_exist(page: str) -> None:
    for module, _ in OURS.findall(TEXTS[page]):
        assert importlib.util.find_spec(module.rstrip(".")), f"{page} names {module}, which does not exist"


def test_training_settings_parse() -> None:
    asked = [words for words in commands() if words[0] == "training.train"]
    assert len(asked) > 5
    for words in asked:
        name = words[words.index("--preset") + 1] if "--preset" in words else "published"
        override(load_presets(name)[words[1]], [word for word in words if re.fullmatch(r"[\w.]+=\S+", word)])


def test_settings_of_the_history_are_todays() -> None:
    history = TEXTS["docs/reproduce.md"]
    rows = re.findall(
        r"^\| (vae|unet|align|learn|refine|vision|decoder|distill|sharpen|upscale)\b[^|]*\| (.*)$", history, re.M
    )
    parsed = [
        override(STORYBOOK[stage], re.findall(r"[\w.]+=[^\s`]+", code))
        for stage, row in rows
        for code in re.findall(r"`([^`]+)`", row)
    ]
    assert len(parsed) > 25


def test_the_table_of_training_settings_names_settings() -> None:
    names = {field.name for preset in STORYBOOK.values() for field in dataclasses.fields(preset)}
    names |= {field.name for field in dataclasses.fields(STORYBOOK["align"].optimizer)}
    names |= {f"replay.{name}" for name in ("steps", "batch_size", "min_size", "fill")}
    table = TEXTS["docs/training.md"].split("| setting | meaning |")[1].split("\n\n")[0]
    listed = {name for row in table.splitlines()[2:] for name in re.findall(r"`([\w.]+)`", row.split("|")[1])}
    assert len(listed) > 20 and listed <= names, listed - names


BODIES: dict[str, type[BaseModel]] = {
    "/v1/stories": CreateStory,
    "/v1/images/generations": CreateImages,
    "/v1/chat/completions": CreateChat,
}


def curls() -> list[str]:
    return sorted({line for page in TEXTS for line in shell_lines(page) if line.startswith("curl ") and " -d " in line})


@pytest.mark.parametrize("line", curls())
def test_curl_bodies_are_valid(line: str) -> None:
    words = shlex.split(line)
    url = next(word for word in words if word.startswith("http://"))
    path = url.removeprefix("http://127.0.0.1:8000")
    BODIES[path].model_validate(json.loads(words[words.index("-d") + 1]))


def test_all_curls_are_checked() -> None:
    assert len(curls()) >= 5


@each_page
def test_python_blocks_compile_and_what_they_import_exists(page: str) -> None:
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@each_page
def test_json_and_yaml_blocks_parse(page: str) -> None:
    for body in blocks(page, "json"):
        assert all(json.loads(line) for line in body.splitlines())
    for body in blocks(page, "yaml"):
        assert yaml.safe_load(body)


@each_page
def test_named_paths_exist(page: str) -> None:
    folders = "cluster|deployments|training|models|tests|benchmarks|docs|minigpt5|batch_jobs"
    for path in re.findall(rf"(?<![\w/.$-])(?:{folders})/[\w./-]+", TEXTS[page]):
        assert list(ROOT.glob(path.rstrip("."))), f"{page} names {path}, which does not exist"


# Links


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    words = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text), flags=re.M)}


def links(text: str) -> Iterator[str]:
    """Internal targets of links and images."""
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", text))
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"""(?:src|href)=["']([^"']+)["']""", text):
        if not re.match(r"[a-z]+:", target):
            yield target


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in links(text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.is_file() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


@each_page
def test_every_internal_link_resolves(page: str) -> None:
    assert not broken_links(ROOT / page, TEXTS[page])


@pytest.mark.parametrize("link", ["docs/nowhere.md", "docs/training.md#nowhere", "#nowhere", "docs/assets/nowhere.png"])
def test_a_broken_link_is_seen(link: str) -> None:
    assert broken_links(ROOT / "README.md", f"[here]({link})") == [link]


def test_the_readme_and_the_site_lead_to_every_page() -> None:
    site = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
    listed = set(re.findall(r"[\w-]+\.md", json.dumps(site["nav"])))
    pages = {page.name for page in DOCS}
    assert listed == pages
    linked = {link.partition("#")[0] for link in links(TEXTS["README.md"])}
    assert {f"docs/{name}" for name in pages - {"index.md"}} <= linked


def test_the_api_page_names_objects_that_exist() -> None:
    names = re.findall(r"^::: ([\w.]+)$", TEXTS["docs/python-api.md"], flags=re.M)
    assert len(names) > 15
    for name in names:
        if not importlib.util.find_spec(name.rpartition(".")[0]):
            raise AssertionError(name)
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last), name


# The size of the first pages


def longest_table(text: str) -> int:
    """Rows, without the head."""
    return max((block.count("\n") - 2 for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M)), default=0)


def test_the_readme_is_one_page() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150
    assert longest_table(TEXTS["README.md"]) <= 10
    assert longest_table("| a |\n| --- |\n" + 11 * "| b |\n") == 11


def test_the_model_card_is_one_page() -> None:
    assert len(TEXTS["models/storybook/MODEL_CARD.md"].splitlines()) <= 120


# The server's pages


def test_the_settings_of_a_server_are_listed() -> None:
    table = TEXTS["docs/operations.md"].split("| setting | default | meaning |")[1].split("\n\n")[0]
    listed = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert listed == set(AppArgs.model_fields)


def test_settings_of_serve_run_are_valid() -> None:
    lines = [line for page in TEXTS for line in shell_lines(page) if line.startswith("serve run deployments:app")]
    assert lines
    for line in lines:
        AppArgs.model_validate(dict(word.split("=") for word in line.split()[3:]))


def test_the_fields_of_a_story_are_listed() -> None:
    table = TEXTS["docs/http-api.md"].split("| field | range | default |")[1].split("\n\n")[0]
    listed = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert listed == set(CreateStory.model_fields)


def test_the_routes_are_listed() -> None:
    text = TEXTS["docs/http-api.md"]
    table = text.split("| route | what it does |")[1].split("\n\n")[0]
    named = re.findall(r"`(GET|POST|PATCH|DELETE) ([^`\s?]+)", table + text.split("## OpenAI's format")[1])
    names = ("exports", "stories", "pages", "images", "chat", "models", "operations")
    routers = [getattr(routes, name) for name in names]
    served = {
        (method, re.sub(r"\{\w+:int\}", "{n}", re.sub(r"\{(story|model)_id(:path)?\}", "{id}", route.path)))
        for router in routers
        for route in router.routes
        for method in route.methods
    }
    assert set(named) - served == {("GET", "/docs")}
    books = {("GET", f"/v1/stories/{{id}}{suffix}") for suffix in (".epub", ".pdf")}
    assert served - set(named) - books == {("GET", "/v1/images/{name}"), ("GET", "/studio/{name}")}


def test_the_ignored_and_the_refused_fields_of_openais_routes_are_listed() -> None:
    section = TEXTS["docs/http-api.md"].split("### Fields of other servers")[1].split("\n## ")[0]
    table, refused = section.split("| route | ignored fields |")[1].split("The server refuses")
    named = {
        route.strip(): set(re.findall(r"`([\w.]+)`", cell.partition(";")[0]))
        for _, route, cell, _ in (row.split("|") for row in table.splitlines()[2:] if row)
    }

    def ignored(model: type[BaseModel], prefix: str = "") -> set[str]:
        return {prefix + name for name, field in model.model_fields.items() if IGNORED in field.metadata}

    both = ignored(OpenAIBody)
    assert named["both"] == both
    assert named["images"] == ignored(CreateImages) - both
    chat = ignored(CreateChat) | ignored(StreamOptions, "stream_options.")
    assert named["chat, OpenAI's"] | named["chat, others'"] == chat - both
    assert set(SERVED) <= set(re.findall(r"`(\w+)`", refused))


def test_the_metrics_are_listed() -> None:
    labels = {metric: f"{{{','.join(metric.labels)}}}" if metric.labels else "" for metric in METRICS}
    rows = [f"| `{metric.name}{labels[metric]}` | {metric.kind} | {metric.help} |" for metric in METRICS]
    text = TEXTS["docs/operations.md"]
    assert "\n".join(rows) in text
    assert set(re.findall(r"`(minigpt5_\w+)", text)) == {metric.name for metric in METRICS}


# The tree


def test_the_tree_lists_every_package() -> None:
    """The folders of each package, and the modules right in `minigpt5`."""
    tree = next(body for body in blocks("docs/architecture.md", "text") if body.startswith("minigpt5/ "))
    listed: set[str] = set()
    folder = ""
    for line in tree.splitlines():
        if line.startswith(" " * 21):  # more of the line above
            continue
        names = re.match(r"(?: {2})?((?:[\w/]+(?:\.py)? )+) ", line)
        assert names, line
        if not line.startswith(" "):
            folder = names[1].split("/")[0]
        listed |= {f"{folder}/{name}" if line.startswith(" ") else name for name in names[1].split()}
    for name in listed:
        assert (ROOT / name).exists(), f"the tree names {name}, which does not exist"
    packages = {path.parent for top in ("minigpt5", "deployments", "training") for path in (ROOT / top).glob("*/*.py")}
    modules = set((ROOT / "minigpt5").glob("*.py")) - {ROOT / "minigpt5" / "__init__.py"}
    there = {f"{path.relative_to(ROOT).as_posix()}/" for path in packages}
    there |= {path.relative_to(ROOT).as_posix() for path in modules}
    assert there <= listed, there - listed


# Tables of figures


def test_the_tables_are_those_of_the_results() -> None:
    assert tables.main(["--check"]) == 0


def test_a_changed_figure_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = shutil.copytree(tables.RESULTS, tmp_path / "results")
    content = json.loads((results / "company.json").read_text())
    content["figures"]["text"]["same_text"] -= 1
    (results / "company.json").write_text(json.dumps(content))
    assert tables.main(["--check", "--results", str(results)]) == 1
    said = capsys.readouterr().out
    assert "README.md" in said and "docs/batch-invariance.md" in said and "docs/training.md" not in said


def test_every_table_stands_on_a_page() -> None:
    marked = {name for text in TEXTS.values() for _, name, _ in tables.MARKED.findall(text)}
    assert marked == set(tables.TABLES)


def test_a_table_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(KeyError, match="nowhere"):
        tables.rewrite("<!-- table: nowhere -->\n<!-- end -->\n", {})
