"""The house rules of DESIGN.md, section 3, read off the imports.

A module imports only from lines below its own; modules of one line do not import each other; each outside dependency
has one owner; only engine compiles or captures; nothing imports tests or benchmarks.
"""

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the top down.
LINES = [
    ["cli"],
    ["doctor", "bench", "reproduce"],
    ["recipes"],
    ["train"],
    ["evaluate"],
    ["recipe"],
    ["engine"],
    ["step"],
    ["sharpness", "selection"],
    ["attacks", "losses", "sam", "peft", "optimizers"],
    ["models", "data"],
    ["schedule", "averaging", "checkpoint", "distributed", "profiling", "plots", "report", "layers", "store", "modes",
     "seeds", "progress", "scaler", "precision", "perturbed"],
    ["ops"],
    ["kernels"],
    ["_C"],
]  # fmt: skip
LEVEL = {module: -i for i, line in enumerate(LINES) for module in line}
ENTRANCES = {"__init__", "__main__"}  # names for users; they import from everywhere, and nobody imports them

OWNERS = {
    "timm": "models",
    "torchvision": "data",
    "peft": "peft",
    "triton": "kernels",
    "torch.distributed": "distributed",
    "matplotlib": "plots",
    "typer": "cli",
    "rich": "progress",
    "nvtx": "profiling",
    "sklearn": "data",
    "safetensors": "checkpoint",
    "yaml": "recipe",
    "apex": "optimizers",
}
COMPILES = ("torch.compile", "torch.cuda.graph", "torch.cuda.graphs", "torch.cuda.CUDAGraph",
            "torch.cuda.make_graphed_callables", "torch._dynamo", "torch._inductor", "torch.jit")  # fmt: skip


class Source(NamedTuple):
    """A file of the package: the module (top level) that it belongs to, and the package its relative imports mean."""

    path: Path
    module: str
    package: tuple[str, ...]
    tree: ast.Module


def sources():
    found = []
    for folder, prefix in ((ROOT / "safer_fast", ("safer_fast",)), (ROOT / "kernels", ("safer_fast", "kernels"))):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).parts
            if folder.name == "safer_fast" and parts[0] == "kernels":
                continue  # the symlink: kernels/ is read once
            package = (*prefix, *parts[:-1])
            module = (*package, path.stem)[1]
            found.append(Source(path, module, package, ast.parse(path.read_text())))
    return found


def imports(source):
    """Every dotted name that a file imports, relative ones made absolute, wherever in the file they stand."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = source.package[: len(source.package) - node.level + 1] if node.level else ()
            home = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{home}.{alias.name}" for alias in node.names)


def attributes(source):
    """Every dotted name that a file uses, such as torch.cuda.graph."""
    for node in ast.walk(source.tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            yield ".".join([node.id, *reversed(parts)])


def begins(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def complaints(source):
    """Sentences, one a breach."""
    me = source.module
    for name in imports(source):
        for outside, owner in OWNERS.items():
            if begins(name, outside) and me != owner:
                yield f"{me} may not import {outside}: only {owner} does"
        if name.split(".")[0] in ("tests", "benchmarks", "conftest"):
            yield f"{me} may not import {name}: nothing imports tests or benchmarks"
        if name.startswith("safer_fast.") and me not in ENTRANCES:
            yield from complaint_of_order(me, name.split(".")[1])
    if me != "engine":
        for name in {*attributes(source), *imports(source)}:
            for door in COMPILES:
                if begins(name, door):
                    yield f"{me} may not use {door}: only engine compiles or captures"


def complaint_of_order(me, other):
    if other == me or other.startswith("__"):
        return
    if other not in LEVEL:
        yield f"{me} imports {other}, which has no line in the table: give it one"
    elif me in LEVEL and LEVEL[other] == LEVEL[me]:
        yield f"{me} may not import {other}: they stand on one line"
    elif me in LEVEL and LEVEL[other] > LEVEL[me]:
        yield f"{me} may not import {other}: it stands above"


SOURCES = sources()


def test_there_is_something_to_read():
    assert {"attacks", "step", "train", "kernels", "ops"} <= {s.module for s in SOURCES}


def test_every_module_has_its_line():
    lost = {s.module for s in SOURCES} - set(LEVEL) - ENTRANCES
    assert not lost, f"no line in the table for {', '.join(sorted(lost))}: add it to LINES and to DESIGN.md"


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: str(s.path.relative_to(ROOT)))
def test_a_module_imports_only_what_it_may(source):
    found = sorted(set(complaints(source)))
    assert not found, "; ".join(found)


@pytest.mark.parametrize(
    ("module", "text", "sentence"),
    [
        ("attacks", "import timm", "attacks may not import timm: only models does"),
        ("train", "def f():\n    import timm.models", "train may not import timm: only models does"),
        ("step", "from torch.distributed import all_reduce", "step may not import torch.distributed: only distributed does"),
        ("step", "from . import train", "step may not import train: it stands above"),
        ("losses", "from .sam import SAM", "losses may not import sam: they stand on one line"),
        ("seeds", "from . import layers as l", "seeds may not import layers: they stand on one line"),
        ("step", "import torch\nf = torch.compile(g)", "step may not use torch.compile: only engine compiles or captures"),
        ("step", "from torch import compile", "step may not use torch.compile: only engine compiles or captures"),
        ("train", "from benchmarks import roofline", "train may not import benchmarks.roofline: nothing imports tests or benchmarks"),
        ("step", "from . import helpers", "step imports helpers, which has no line in the table: give it one"),
    ],
)  # fmt: skip
def test_a_breach_is_said_in_a_sentence(module, text, sentence):
    assert list(complaints(Source(ROOT, module, ("safer_fast",), ast.parse(text)))) == [sentence]


@pytest.mark.parametrize(
    ("module", "package", "text"),
    [
        ("models", ("safer_fast",), "import timm"),
        ("engine", ("safer_fast",), "import torch\nf = torch.compile(g)\nfrom .step import Step"),
        ("attacks", ("safer_fast", "attacks"), "from .threat import L2\nfrom .. import ops\nfrom ..modes import eval_mode"),
        ("cli", ("safer_fast",), "import typer\nfrom .train import finetune"),
    ],
)  # fmt: skip
def test_what_is_right_is_not_complained_of(module, package, text):
    assert list(complaints(Source(ROOT, module, package, ast.parse(text)))) == []


def test_importing_the_package_is_quick():
    """`import safer_fast` does not import torch: names load on first use."""
    import subprocess
    import sys

    code = "import sys, safer_fast; assert 'torch' not in sys.modules; assert safer_fast.PGD; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_name_of_the_front_door_opens():
    import safer_fast

    for name in safer_fast.__all__:
        assert getattr(safer_fast, name) is not None
    assert callable(safer_fast.evaluate)  # the function, not the module of that name
