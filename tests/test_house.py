"""The house: each room imports only what stands below it, and files of jit code hold nothing else.

A room is a wing (a folder of the package) or a file beside the wings.
"""

import ast
import itertools
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "triton_tied"
ROOMS = [  # from the ground up
    "version",
    "tracing",
    "rounding",
    "memory_format",
    "geometry",
    "cached_weights",
    "packing",
    "reference",
    "dispatch",
    "kernels",
    "autotune",
    "operators",
    "functional",
    "prepare",
    "linear",
    "operations",
    "spectral_norm",
    "argument_checks",
    "exponential",
    "read_only_weight",
    "nearest",
    "dense_layers",
    "modules",
    "skew_orthogonal",
    "antisymmetric",
    "convert",
    "init",
    "check",
    "inspection",
    "benchmark",
    "cli",
    "__init__",
    "__main__",
]
WINGS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    """The parts of a module's name below the package: ("kernels", "launch")."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts


MODULES = {name_of(path) for path in FILES}


def imported(path):
    """Names of the package's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (
            node.level or node.module.startswith("triton_tied")
        ):
            folder = path.relative_to(PACKAGE).parent.parts
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            module = (node.module or "").removeprefix("triton_tied").strip(".")
            base += tuple(module.split(".")) if module else ()
            for alias in node.names:
                whole = (*base, alias.name)
                yield whole if whole in MODULES else base or ("__init__",)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("triton_tied"), f"{path}: import it from its room"


def test_every_room_has_its_floor():
    assert {name[0] for name in MODULES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(name_of(path)))
def test_a_room_imports_only_what_stands_below_it(path):
    here = name_of(path)[0]
    for name in imported(path):
        assert name[0] == here or ROOMS.index(name[0]) < ROOMS.index(here), (
            f"{'/'.join(name_of(path))} imports {'/'.join(name)}, which stands above it"
        )


@pytest.mark.parametrize("wing", WINGS)
def test_files_of_a_wing_import_each_other_in_no_circle(wing):
    below = {
        name_of(path): {name for name in imported(path) if name[0] == wing}
        for path in FILES
        if name_of(path)[0] == wing
    }
    while below:
        ground = {name for name, others in below.items() if not others & below.keys() - {name}}
        assert ground, f"a circle among {sorted(below)}"
        below = {name: others for name, others in below.items() if name not in ground}


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_says_what_it_is_for_what_it_imports_and_what_to_open(wing):
    text = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text()))
    assert "Imports" in text and "Open" in text and len(text.splitlines()) <= 4
    wings_below = {name[0] for path in (PACKAGE / wing).glob("*.py") for name in imported(path)}
    for other in wings_below & set(WINGS) - {wing}:
        assert f"``{other}``" in text or "everything" in text, f"{wing} imports {other}"


def is_jit(node):
    """A function that Triton compiles, or calls as it compiles."""
    return isinstance(node, ast.FunctionDef) and any(
        jit in ast.unparse(decorator)
        for decorator in node.decorator_list
        for jit in ("triton.jit", "gluon.jit", "gluon.constexpr_function")
    )


JIT_FILES = [path for path in FILES if re.search(r"\n@(triton|gluon)\.jit", path.read_text())]


@pytest.mark.parametrize("path", JIT_FILES, ids=lambda path: path.stem)
def test_a_file_of_jit_code_holds_nothing_else(path):
    for node in ast.parse(path.read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        assert is_docstring or is_import or is_jit(node), ast.unparse(node)
    assert all(name in map(name_of, JIT_FILES) for name in imported(path))


def masked_loads(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "gl.load"):
            given = {keyword.arg for keyword in node.keywords}
            if "mask" in given:
                yield node, given


def test_every_masked_load_says_what_is_read_elsewhere():
    loads = list(itertools.chain.from_iterable(map(masked_loads, JIT_FILES)))
    assert loads and all("other" in given for _, given in loads)


def test_the_map_names_every_file():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    for path in FILES:
        assert path.name.startswith("__") or f"`{path.name}`" in text, path
    for wing in WINGS:
        assert f"`{wing}/`" in text, wing
