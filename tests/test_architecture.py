"""The import rules, held by reading every file's syntax tree.

A rule is a function (file, tree) -> complaints. Each runs on all files, and on small sources that break it.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("minigpt5", "deployments", "training", "batch_jobs")
TOP_LEVEL_FOLDERS = {*PACKAGES, "cluster", "tests", "models", "benchmarks", "docs", "examples"}
LIGHT_MODULES = (
    "types",
    "errors",
    "config",
    "limits",
    "pictures",
    "model.image_transforms",
    "story.state",
    "story.stream",
    "story.store",
    "story.export.html",
    "engine.script",
    "engine.prompts",
    "engine.load",
    "engine.vllm.exported",
)

Rule = Callable[[str, ast.Module], list[str]]


STAR = ("engine", "objective", "published", "story", "storybook")
"""Sub-packages of minigpt5 that import its root's files and `model`, and never each other."""
BELOW = ("types", "errors", "config", "codec", "commands", "blocking", "limits", "progress", "pictures", "storage")
"""The root's files that everything may import."""
ABOVE = ("combine", "evaluation", "footprint", "new", "parity", "pipeline", "__main__")
"""What may import all of them."""


def the_package_is_a_star(file: str, tree: ast.Module) -> list[str]:
    """minigpt5: the root's files below, then model, then the points of the star, then what joins them."""
    if not file.startswith("minigpt5/"):
        return []
    own = file.removeprefix("minigpt5/").removesuffix(".py").split("/")[0]
    allowed = {
        **dict.fromkeys(BELOW, set(BELOW)),
        "model": {*BELOW, "model"},
        **{point: {*BELOW, "model", point} for point in STAR},
        "base_models": {"model"},
    }.get(own, {*BELOW, *STAR, *ABOVE, "model"})
    if file == "minigpt5/types.py":  # Story.save and _repr_html_ look their exporter up
        tree = without_functions(tree)
    found = {name.split(".")[1] for name in imports(file, tree) if name.startswith("minigpt5.")}
    return [f"imports minigpt5.{name}" for name in sorted(found - allowed - {"MiniGPT5"})]


def the_types_look_up_the_exporter_alone(file: str, tree: ast.Module) -> list[str]:
    if file != "minigpt5/types.py":
        return []
    inside = set(imports(file, tree)) - set(imports(file, without_functions(tree)))
    return [f"imports {name}" for name in inside if not name.startswith("minigpt5.story.export.html.")]


def sub_packages_are_empty(file: str, tree: ast.Module) -> list[str]:
    """Else the HTTP front, which imports one module of them, would load all of it, torch too."""
    is_sub_package = (
        file.endswith("/__init__.py") and file.count("/") > 1 and not file.startswith("minigpt5/storybook/")
    )
    return ["is not empty"] if is_sub_package and tree.body else []


def packages_keep_apart(file: str, tree: ast.Module) -> list[str]:
    """deployments, training and batch_jobs import minigpt5 and never each other; minigpt5 imports none."""
    own = file.split("/")[0]
    allowed = {own, "minigpt5"}
    forbidden = {*PACKAGES, "tests", "benchmarks"} - allowed
    return [f"imports {name}" for name in imports(file, tree) if name.split(".")[0] in forbidden]


def the_model_knows_no_framework(file: str, tree: ast.Module) -> list[str]:
    frameworks = {"ray", "deepspeed", "fastapi", "pydantic", "starlette", "uvicorn"}
    if not file.startswith("minigpt5/"):
        return []
    return [f"imports {name}" for name in imports(file, tree) if name.split(".")[0] in frameworks]


def nothing_imports_torchvision(file: str, tree: ast.Module) -> list[str]:
    """There is none that fits the CPU build of torch, and an install without it must work."""
    return [f"imports {name}" for name in imports(file, tree) if name.split(".")[0] == "torchvision"]


def only_the_application_binds(file: str, tree: ast.Module) -> list[str]:
    """One file wires the deployments. A socket's bind takes an address, which is a pair."""
    if file == "deployments/application.py":
        return []
    return [
        f"line {call.lineno} calls .bind"
        for call in calls(tree)
        if isinstance(call.func, ast.Attribute) and call.func.attr == "bind"
        if not (len(call.args) == 1 and isinstance(call.args[0], ast.Tuple))
    ]


def only_zero_imports_deepspeed(file: str, tree: ast.Module) -> list[str]:
    if file == "training/zero.py":
        return []
    return [f"imports {name}" for name in imports(file, tree) if name.split(".")[0] == "deepspeed"]


def few_files_touch_weights(file: str, tree: ast.Module) -> list[str]:
    """safetensors.numpy's save and load are free, and their error: they make the bytes of vokens, not weight files."""
    if file in (
        "minigpt5/engine/vllm/export.py",
        "minigpt5/evaluation/perceptual.py",
        "minigpt5/model/decoders/styles.py",
        "minigpt5/model/folder.py",
        "minigpt5/model/weights.py",
        "minigpt5/model/base_models.py",
        "minigpt5/model/joblib_file.py",
        "minigpt5/model/weight_packages.py",
        "minigpt5/published/checkpoint.py",
        "training/checkpoint.py",
    ):
        return []
    wire = {"safetensors.numpy", "safetensors.numpy.save", "safetensors.numpy.load", "safetensors.SafetensorError"}
    complaints = [
        f"imports {name}"
        for name in imports(file, tree)
        if (name.split(".")[0] in ("safetensors", "pickle", "joblib") and name not in wire)
        or name in ("torch.load", "torch.save")
    ]
    for call in calls(tree):
        name = ast.unparse(call.func)
        if name in ("torch.load", "torch.save", "numpy.load", "np.load") or name.endswith(
            (".save_file", ".load_file", ".save_pretrained")
        ):
            complaints.append(f"line {call.lineno} calls {name}")
    return complaints


def nothing_unpickles_code(file: str, tree: ast.Module) -> list[str]:
    """torch.load runs what it reads unless it is told weights_only=True."""
    return [
        f"line {call.lineno} calls torch.load without weights_only=True"
        for call in calls(tree)
        if ast.unparse(call.func) == "torch.load"
        if not any(
            keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            for keyword in call.keywords
        )
    ]


OPEN_THEIR_OWN = {
    "minigpt5/storybook/scenes.py": "sprites, whose transparency is used",
    "training/storybook/sprite_sheet.py": "sprites that rsvg-convert has just drawn, with their transparency",
    "training/storybook/scorer.py": "JPEGs that it has just made, of pictures to train on",
    "batch_jobs/books.py": "the size of pictures that the model drew",
    "deployments/api/images.py": "pictures that the model drew",
}
"""Files that open pictures which nobody sent, and those pictures."""


def one_function_opens_pictures(file: str, tree: ast.Module) -> list[str]:
    """minigpt5.pictures.open_picture: else a file would look one way to one reader and another way to the next."""
    if file == "minigpt5/pictures.py" or file in OPEN_THEIR_OWN:
        return []
    return [f"line {call.lineno} calls Image.open" for call in calls(tree) if ast.unparse(call.func) == "Image.open"]


BROKEN: list[tuple[Rule, str, str]] = [
    (one_function_opens_pictures, "minigpt5/model/vision.py", "pixels = Image.open(file).convert('RGB')"),
    (the_package_is_a_star, "minigpt5/types.py", "from minigpt5.model import folder"),
    (the_package_is_a_star, "minigpt5/config.py", "def f():\n    from minigpt5.story.store import StoryStore"),
    (the_package_is_a_star, "minigpt5/model/folder.py", "from minigpt5.engine.generator import VokenGenerator"),
    (the_package_is_a_star, "minigpt5/engine/decoder.py", "def f():\n    from minigpt5.story.stream import page_seed"),
    (the_package_is_a_star, "minigpt5/story/state.py", "import minigpt5.storybook.scenes"),
    (the_package_is_a_star, "minigpt5/objective/losses.py", "from minigpt5.pipeline import MiniGPT5"),
    (the_package_is_a_star, "minigpt5/published/data.py", "from minigpt5.objective import losses"),
    (
        the_types_look_up_the_exporter_alone,
        "minigpt5/types.py",
        "def f():\n    from minigpt5.story.store import StoryStore",
    ),
    (sub_packages_are_empty, "minigpt5/engine/__init__.py", "from minigpt5.engine.generator import VokenGenerator"),
    (sub_packages_are_empty, "deployments/api/__init__.py", "import os"),
    (packages_keep_apart, "training/loop.py", "from benchmarks.quality import machine"),
    (packages_keep_apart, "minigpt5/story/stream.py", "from deployments.api.routes import app"),
    (packages_keep_apart, "minigpt5/story/stream.py", "def f():\n    import training.loop"),
    (packages_keep_apart, "minigpt5/storybook/world.py", "from ...batch_jobs import stages"),
    (packages_keep_apart, "deployments/api/routes.py", "import batch_jobs"),
    (
        packages_keep_apart,
        "training/train.py",
        "import importlib\nimportlib.import_module('deployments.api.routes')",
    ),
    (packages_keep_apart, "batch_jobs/illustrate.py", "from tests.reference import compare"),
    (the_model_knows_no_framework, "minigpt5/pipeline.py", "import ray"),
    (the_model_knows_no_framework, "minigpt5/config.py", "from pydantic import BaseModel"),
    (
        the_model_knows_no_framework,
        "minigpt5/story/stream.py",
        "try:\n    from ray import serve\nexcept ImportError: ...",
    ),
    (the_model_knows_no_framework, "minigpt5/story/stream.py", "__import__('fastapi')"),
    (nothing_imports_torchvision, "minigpt5/model/vision.py", "from torchvision import transforms"),
    (only_the_application_binds, "deployments/api/routes.py", "app = Ingress.bind(generator)"),
    (only_the_application_binds, "training/train.py", "Worker.options(num_cpus=1).bind()"),
    (only_zero_imports_deepspeed, "training/loop.py", "import deepspeed"),
    (only_zero_imports_deepspeed, "training/train.py", "def f():\n    from deepspeed import initialize"),
    (few_files_touch_weights, "minigpt5/model/mapper.py", "from safetensors.torch import load_file"),
    (few_files_touch_weights, "minigpt5/model/vision.py", "import torch\ntorch.load('x.pth', weights_only=True)"),
    (few_files_touch_weights, "training/loop.py", "import torch\ntorch.save({}, 'x.pt')"),
    (few_files_touch_weights, "minigpt5/story/store.py", "from safetensors.numpy import save_file"),
    (few_files_touch_weights, "training/loop.py", "model.unet.save_pretrained('x')"),
    (few_files_touch_weights, "minigpt5/metrics.py", "import pickle"),
    (nothing_unpickles_code, "minigpt5/published/checkpoint.py", "import torch\ntorch.load('x.pth')"),
    (nothing_unpickles_code, "minigpt5/published/checkpoint.py", "import torch\ntorch.load('x', weights_only=False)"),
]

KEPT: list[tuple[Rule, str, str]] = [
    (one_function_opens_pictures, "minigpt5/pictures.py", "picture = Image.open(file)"),
    (the_package_is_a_star, "minigpt5/types.py", "def f():\n    from minigpt5.story.export.html import save"),
    (
        the_types_look_up_the_exporter_alone,
        "minigpt5/types.py",
        "def f():\n    from minigpt5.story.export.html import save",
    ),
    (the_package_is_a_star, "minigpt5/engine/decoder.py", "import minigpt5.model.mapper\nfrom .threads import Team"),
    (the_package_is_a_star, "minigpt5/pipeline.py", "import minigpt5.engine.decoder\nimport minigpt5.story.stream"),
    (sub_packages_are_empty, "minigpt5/__init__.py", "x = 1"),
    (sub_packages_are_empty, "minigpt5/engine/__init__.py", ""),
    (packages_keep_apart, "deployments/api/routes.py", "from minigpt5 import flow\nfrom .schemas import Story"),
    (packages_keep_apart, "minigpt5/storybook/world.py", "from ..types import Story"),
    (the_model_knows_no_framework, "deployments/api/routes.py", "import ray, fastapi"),
    (only_the_application_binds, "deployments/application.py", "app = Ingress.bind()"),
    (only_the_application_binds, "deployments/__main__.py", "listener.bind((host, port))"),
    (only_zero_imports_deepspeed, "training/zero.py", "import deepspeed"),
    (few_files_touch_weights, "minigpt5/model/folder.py", "from safetensors.torch import save_file"),
    (
        few_files_touch_weights,
        "minigpt5/story/store.py",
        "from safetensors import SafetensorError\nfrom safetensors.numpy import load, save",
    ),
    (nothing_unpickles_code, "minigpt5/model/weight_packages.py", "import torch\ntorch.load('x', weights_only=True)"),
]


@functools.cache
def syntax_trees() -> dict[str, ast.Module]:
    """Of all files, by their paths. Rules read them and change none."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert files
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(), filename=str(path)) for path in files}


RULES = list(dict.fromkeys(rule for rule, _, _ in BROKEN))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: Rule) -> None:
    complaints = [f"{file}: {complaint}" for file, tree in syntax_trees().items() for complaint in rule(file, tree)]
    assert not complaints, "\n".join(complaints)


def test_no_module_imports_itself_by_a_detour() -> None:
    """Imports inside functions count, but for the exporter that types.py looks up."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    edges = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        found = set(imports(path.relative_to(ROOT).as_posix(), without_functions(tree) if name == LOOKS_UP else tree))
        found |= {one.rpartition(".")[0] for one in found}
        edges[name] = (found & modules.keys()) - {name, *PACKAGES}  # a package's __init__ looks up what it exports
    assert sum(map(len, edges.values())) > 200
    assert not circles(edges), circles(edges)


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


LOOKS_UP = "minigpt5.types"


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    reached = {name: set(targets) for name, targets in edges.items()}
    for _ in edges:
        grown = {name: found.union(*(reached.get(one, ()) for one in found)) for name, found in reached.items()}
        if grown == reached:
            break
        reached = grown
    groups = {tuple(sorted(one for one in reached[name] if name in reached.get(one, ()))) for name in edges}
    return sorted(list(group) for group in groups if group)


def without_functions(tree: ast.Module) -> ast.Module:
    """A module as it is when it is imported: without the bodies of its functions."""

    class Emptied(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:  # noqa: N802
            return None

    return Emptied().visit(ast.parse(ast.unparse(tree)))


NAMED = re.compile(r"-m ((?:minigpt5|deployments|training|batch_jobs|benchmarks|tests)[\w.]*\w)")
CLUSTER = [path for path in (ROOT / "cluster").rglob("*") if path.is_file()]
PAGES = (ROOT / "README.md", ROOT / "Makefile", *CLUSTER, *(ROOT / "docs").glob("*.md"))
DOORS = {"minigpt5.base_models", "minigpt5.published", "deployments.auth", "training.scorer", "tests.reference"}
"""Commands that kept their names when their files moved."""


HELP = """
import contextlib, io, json, os, runpy, sys
import batch_jobs.job, deployments.application, tests.helpers.preloaded, training.loop  # once: forks share them

for module in sys.argv[1:]:
    readable, writable = os.pipe()
    if not os.fork():
        said, code = io.StringIO(), None
        sys.argv = [module, "--help"]
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
        except BaseException as failure:
            code = repr(failure)
        os.write(writable, json.dumps([module, code, said.getvalue()[:2000]]).encode())
        os._exit(0)
    os.close(writable)
    os.wait()
    print(os.read(readable, 2**16).decode(), flush=True)
"""


def test_every_command_that_is_named_says_what_it_does() -> None:
    """The commands of README, Makefile, cluster/ and docs/."""
    modules = sorted({*DOORS, *(name for page in PAGES for name in NAMED.findall(page.read_text()))})
    process = subprocess.run([sys.executable, "-c", HELP, *modules], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-1000:]
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    assert [module for module, *_ in answers] == modules and len(modules) > 15
    for module, code, said in answers:
        assert code in (0, None) and "usage:" in said, (module, code, said)


@pytest.mark.parametrize(("rule", "file", "source"), BROKEN)
def test_a_broken_rule_is_seen(rule: Rule, file: str, source: str) -> None:
    assert rule(file, ast.parse(source))


@pytest.mark.parametrize(("rule", "file", "source"), KEPT)
def test_a_kept_rule_is_no_complaint(rule: Rule, file: str, source: str) -> None:
    assert not rule(file, ast.parse(source))


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_the_light_modules_start_without_torch(module: str) -> None:
    assert not loads_torch(f"minigpt5.{module}")


def test_the_package_itself_starts_without_torch() -> None:
    assert not loads_torch("minigpt5")
    assert not loads_torch("minigpt5.model.base_models")
    assert not loads_torch("minigpt5.codec")


def test_a_module_that_loads_torch_by_a_detour_is_seen() -> None:
    assert loads_torch("safetensors.torch")


def test_the_top_level_holds_what_the_readme_names_and_nothing_else() -> None:
    assert not strangers(ROOT)
    assert not list(ROOT.glob("*.py"))


def test_a_stranger_at_the_top_level_is_seen(tmp_path: Path) -> None:
    for name in ("minigpt5", ".venv", "minigpt5.egg-info", "runs", "utils"):
        (tmp_path / name).mkdir()
    assert strangers(tmp_path) == {"utils"}


def strangers(root: Path) -> set[str]:
    """Folders that are neither part of the layout nor hidden nor made by a run or an installation."""
    made = {"runs", "build", "__pycache__"}
    names = {path.name for path in root.iterdir() if path.is_dir()}
    return {
        name for name in names - TOP_LEVEL_FOLDERS - made if not name.startswith(".") and not name.endswith(".egg-info")
    }


def loads_torch(module: str) -> bool:
    """Whether a fresh process that imports the module has torch loaded afterwards."""
    code = f"import sys, {module}; print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip() == "True"


def imports(file: str, tree: ast.Module) -> Iterator[str]:
    """Full names of all that a file imports, at any depth: `from a.b import c` gives a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # The first dot drops the file's own name, each further one a folder; so does it in __init__.py.
            parents = file.split("/")[: -node.level] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}".strip(".") for alias in node.names)
    for call in calls(tree):
        if ast.unparse(call.func) in ("importlib.import_module", "import_module", "__import__") and call.args:
            name = call.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value


def calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_shipped_models_name_no_folder_of_a_machine() -> None:
    for path in (ROOT / "models").rglob("*.json"):
        assert not re.search(r'": "/', path.read_text()), f"{path} holds an absolute path"


def test_one_module_imports_openvino() -> None:
    """So that it sends no statistics, and that one Core lives as long as the process."""
    imports = re.compile(r"^\s*(import|from) openvino\b(?!\.frontend)", re.MULTILINE)
    paths = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py") if imports.search(path.read_text())]
    assert [path.relative_to(ROOT).as_posix() for path in paths] == ["minigpt5/model/backends/openvino.py"]


def test_two_modules_import_vllm() -> None:
    """One of the backend and the one that vLLM loads: the seam is small, and no other process needs it."""
    imports = re.compile(r"^\s*(import|from) vllm\b", re.MULTILINE)
    paths = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py") if imports.search(path.read_text())]
    found = sorted(path.relative_to(ROOT).as_posix() for path in paths)
    assert found == ["minigpt5/engine/vllm/connector.py", "minigpt5/engine/vllm/launch.py"]


def test_one_module_opens_file_systems() -> None:
    """So that every request to an object store waits for it."""
    opens = re.compile(r"\.from_uri\(|\b(S3|Gcs|Azure|Hadoop|Local|Py)FileSystem\(|_resolve_filesystem")
    paths = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py") if opens.search(path.read_text())]
    assert [path.relative_to(ROOT).as_posix() for path in paths] == ["minigpt5/storage.py"]
