"""Dependencies point one way: a module imports only from its own layer and those above it in CONTRIBUTING's tree.

And the kernels: lines within the formatter's width, which it does not apply to comments, and a file per op.
"""

import ast
import re
from pathlib import Path

import mfac
from mfac import _build

PACKAGE = Path(mfac.__file__).parent
REPO = Path(__file__).parents[1]
LAYERS = [
    {"checks", "extras", "interrupts", "progress"},
    {"settings", "_build", "files"},
    {"ops"},
    {"distributed"},
    {"model"},
    {"gradients"},
    {"fisher"},
    {"sharded_fisher"},
    {"sparse"},
    {"pruning"},
    {"export"},
    {"recipe"},
    {"integrations"},
    {"tutorial"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path):
    """Names of the modules of mfac that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mfac":
            if node.module == "mfac":
                yield from (f"mfac.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("mfac."))


def test_nothing_lower_imports_anything_higher():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if part in ("__init__", "__main__", "csrc", "recipes"):
            continue
        seen.add(part)
        for name in imports(path):
            other = name.split(".")[1]
            if other in LEVEL:
                same = part == other
                assert same or LEVEL[other] < LEVEL[part], f"{path.relative_to(PACKAGE)} imports {name}"
    assert seen == set(LEVEL)


def test_no_circles():
    """Not even within a layer: the modules of a folder have an order too."""
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("mfac", *path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] not in ("__init__", "__main__"):
            graph[".".join(parts)] = set(imports(path))
    state = {}

    def visit(name, trail):
        assert state.get(name) != "open", " -> ".join([*trail, name])
        if name in state:
            return
        state[name] = "open"
        for other in graph.get(name, ()):
            visit(other, [*trail, name])
        state[name] = "done"

    for name in graph:
        visit(name, [])


def test_lines_of_the_kernels_are_within_the_formatters_width():
    """clang-format leaves comments as they are."""
    width = int(re.search(r"ColumnLimit: (\d+)", (REPO / ".clang-format").read_text())[1])
    for folder in (_build.sources_root(), REPO / "tests"):
        for path in (p for p in folder.rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh"}):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                assert len(line) <= width, f"{path.name}:{number} has {len(line)} columns, not {width} at most"


def test_every_op_has_its_files():
    """One stem everywhere; joint_update is joint_step without the diagonal."""
    root = _build.sources_root()
    ops = set(re.findall(r'"(\w+)\(Tensor', (root / "schemas.h").read_text(encoding="utf-8")))
    assert {"block_factor", "joint_step", "select_smallest"} <= ops
    for op in ops - {"joint_update"}:
        assert (root / "cpu" / f"{op}.cpp").exists() and (root / "cuda" / f"{op}.h").exists(), op
    for device in ("cpu/bindings.h", "cuda/bindings.cpp"):
        assert set(re.findall(r'm\.impl\("(\w+)"', (root / device).read_text(encoding="utf-8"))) == ops


def test_every_op_of_sparse_inference_has_its_files():
    """A kernel, tests and a benchmark of its stem."""
    root = _build.sources_root() / "sparse"
    ops = set(re.findall(r'"(\w+)\(Tensor', (root / "schemas.h").read_text(encoding="utf-8")))
    assert ops == set(re.findall(r'm\.impl\("(\w+)"', (root / "bindings.h").read_text(encoding="utf-8")))
    for op in ops:
        assert (root / f"{op}.cpp").exists() and (REPO / "tests" / f"test_sparse_{op}.py").exists(), op
        assert (REPO / "benchmarks" / f"bench_sparse_{op}.py").exists(), op


def test_sparse_inference_stands_alone():
    """It knows no pruning: only the build, the choice of a backend, files and checks."""
    for path in (PACKAGE / "sparse").glob("*.py"):
        others = {name.split(".")[1] for name in imports(path)} - {"sparse"}
        assert others <= {"_build", "checks", "files", "ops"}, path.name
