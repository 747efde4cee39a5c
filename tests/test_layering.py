"""The project's shape: what may import what, how long a file may be, and what must not exist."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module imports its own row and lower ones; __init__.py collects the public names and is above them all.
ROWS = (
    ("kernels", "_C"),
    ("backends",),
    ("ops",),
    ("nn",),
    ("model", "tasks", "checkpoint", "experts", "explain"),
    ("compose", "mixture", "dynamic", "serve", "integrations"),
    ("cli", "__main__"),
)
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
STRANGERS = {ROW["kernels"], ROW["compose"]}  # rows whose modules do not know each other
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 300, 50, 90
# of the package, and of the application that is installed with it
TOTAL_LINES, SERVE_LINES = 10_000, 1_600
TORCH = ("torch/", "ATen/", "c10/")
CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}


@cache
def files():
    """Paths of the code files that git knows or would add."""
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [p for p in map(Path, listed) if p.suffix in CODE and (ROOT / p).exists()]


def package_of(path):
    """The dotted module name of a file of the package, in the installed layout."""
    parts = path.with_suffix("").parts
    places = {("kernels", "triton"): "kernels", ("examples", "serve"): "serve"}
    return ("fastlora", places[parts[:2]], *parts[2:]) if parts[:2] in places else parts


def imports(path):
    """Dotted names inside fastlora that a file imports, `from fastlora import x` as fastlora.x."""
    here = package_of(path)
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")) for a in node.names if a.name.split(".")[0] == "fastlora")
        elif isinstance(node, ast.ImportFrom):
            depth = len(here) - node.level if node.level else 0
            base = (*here[:depth], *(node.module.split(".") if node.module else ()))
            if base[:1] == ("fastlora",):
                yield from ((*base, a.name) for a in node.names)


def violations(path):
    own = package_of(path)[1]
    for name in imports(path):
        target = name[1] if len(name) > 1 else None
        if target is None and ROW[own] == len(ROWS) - 1:
            continue
        if target not in ROW:
            yield f"{path} imports {'.'.join(name)}: not a module of a row"
        elif ROW[target] > ROW[own] or (ROW[target] == ROW[own] and target != own and ROW[own] in STRANGERS):
            yield f"{path} (row {ROW[own]}) imports {'.'.join(name)} (row {ROW[target]})"


def test_imports_point_down():
    found = []
    for path in files():
        package = package_of(path)
        if path.suffix == ".py" and package[0] == "fastlora" and package != ("fastlora", "__init__"):
            assert package[1] in ROW, f"{path} has no row"
            found += violations(path)
    assert not found


def test_file_lengths():
    long = {str(p): n for p in files() if (n := len((ROOT / p).read_text().splitlines())) > FILE_LINES}
    assert not long


def test_total_length():
    def total(*folders):
        counted = (p for p in files() if any(p.is_relative_to(folder) for folder in folders))
        return sum(len((ROOT / p).read_text().splitlines()) for p in counted)

    assert total("fastlora", "kernels", "csrc") <= TOTAL_LINES
    assert total("examples/serve") <= SERVE_LINES


def test_function_lengths():
    long = []
    for path in files():
        if path.suffix != ".py" or path.parts[0] == "tests":
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                jitted = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
                if node.end_lineno - node.lineno + 1 > (KERNEL_LINES if jitted else FUNCTION_LINES):
                    long.append(f"{path}:{node.lineno} {node.name}")
    assert not long


def included(path, seen):
    """Every name that a C++ file includes, through the project's own headers."""
    if path in seen:
        return set()
    seen.add(path)
    names = set()
    for opened, name in re.findall(r'^\s*#include\s*([<"])([^>"]+)', path.read_text(), re.MULTILINE):
        names.add(name)
        if opened == '"':
            own = next(f for f in (path.parent / name, ROOT / "csrc" / name) if f.exists())
            names |= included(own, seen)
    return names


def instruction_set_files():
    return [p for p in files() if p.suffix == ".cpp" and re.search(r"^// flags:", (ROOT / p).read_text(), re.MULTILINE)]


def test_instruction_set_files_define_nothing_that_others_may_link():
    """An inline function of torch or of the standard library compiled with -mavx512f may be the copy that is kept."""
    paths = instruction_set_files()
    assert {p.stem for p in paths} >= {"avx2", "avx512", "avx512_bf16"}
    for path in paths:
        # the headers of C, unlike <vector> and its like, hold no inline functions
        foreign = [n for n in included(ROOT / path, set()) if not n.endswith(".h") or n.startswith(TORCH)]
        assert not foreign, f"{path} includes {foreign}"


def test_device_code_does_not_include_torch():
    for path in files():
        if path.is_relative_to("tests/cuda/kernels"):
            assert not [n for n in included(ROOT / path, set()) if n.startswith(TORCH)], path


def test_nothing_shadows_other_packages():
    """kernels/__init__.py would hide Hugging Face's `kernels`; the others would put the root on sys.path."""
    names = {str(p) for p in files()}
    assert not names & {"kernels/__init__.py", "tests/__init__.py", "conftest.py"}


def test_a_planted_violation_is_found(tmp_path, monkeypatch):
    (tmp_path / "fastlora" / "ops").mkdir(parents=True)
    planted = Path("fastlora/ops/planted.py")
    source = "from fastlora.nn import Linear\nfrom .check import x\nfrom fastlora import backends"
    (tmp_path / planted).write_text(source)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert list(violations(planted)) == ["fastlora/ops/planted.py (row 2) imports fastlora.nn.Linear (row 3)"]
