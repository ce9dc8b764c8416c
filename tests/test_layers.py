"""Who may import whom, and what an import may cost."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "runtime", "report", "host", "nodes", "demo")
HOST = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server", "nodes")
ALLOWED = {
    "kernels": (),
    "runtime": ("kernels",),
    "report": (),
    "host": ("runtime", "comfy", "folder_paths", "server"),
    "nodes": ("host", "runtime", "report", "comfy_api", "demo"),
    "demo": ("kernels", "runtime", "comfy", "comfy_api"),
}


def imports(path):
    """(top-level name, importing function or None) of every import; the pack's own folders by their name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1]
            parts = [*base, *(node.module or "").split(".")]
            yield parts[0] if parts[0] else next(alias.name for alias in node.names)


FILES = [p for layer in LAYERS for p in sorted((ROOT / layer).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layers_import_only_what_they_may(path):
    layer = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        if name == layer or name not in (*LAYERS, *HOST):
            continue
        assert name in ALLOWED[layer], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name in ("kernels", "runtime")],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_triton_is_imported_in_its_own_files_only(path):
    if "triton" in imports(path):
        assert path.name in ("triton_tile_lists.py", "triton_attention.py", "triton_int8.py", "triton_pooled.py",
                             "triton_launch.py", "triton_hopper.py", "triton_hopper_launch.py")


def test_the_root_imports_nothing():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert not [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests",
                          env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})


BLOCK = """
import sys
sys.path.insert(0, {tools!r})
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
from load_pack import load_pack
load_pack()
"""


def test_kernels_and_runtime_work_without_triton_and_comfyui():
    code = BLOCK.format(tools=str(ROOT / "tools"), blocked=("triton", *HOST)) + """
import torch
from liteattention.kernels import SkipMask, lite_attention
import liteattention.runtime
q = torch.randn(1, 2, 300, 64)
mask = SkipMask.full(1, 2, 300)
out = lite_attention(q, q, q, mask, threshold=-4.0)
assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, q, q), atol=1e-2)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_a_worker_of_raylight_imports_the_pack_without_the_server_and_without_raylight():
    """There is no server in it, and the top of the pack is not run."""
    done = run(BLOCK.format(tools=str(ROOT / "tools"), blocked=("server", "comfy_api", "nodes", "ray", "raylight",
                                                                "xfuser")) + """
import liteattention.runtime
import liteattention.host.raylight.worker, liteattention.host.raylight.actors
""")
    assert done.returncode == 0, done.stderr


def test_importing_the_kernels_does_not_import_triton():
    done = run(BLOCK.format(tools=str(ROOT / "tools"), blocked=()) + """
import liteattention.kernels, liteattention.runtime
assert "triton" not in sys.modules, "triton was imported"
assert "torch._dynamo" not in sys.modules, "torch._dynamo was imported"
""")
    assert done.returncode == 0, done.stderr


def pack_modules():
    """Module name: (path, whether it is a package) of every module of the pack, `liteattention` in front."""
    paths = [ROOT / "__init__.py", *FILES]
    names = {path: ("liteattention", *path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {".".join(name[:-1] if name[-1] == "__init__" else name): (path, name[-1] == "__init__")
            for path, name in names.items()}


MODULES = pack_modules()


def imported_modules(name):
    """Modules of the pack that a module imports, in functions and under TYPE_CHECKING as well."""
    path, is_package = MODULES[name]
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(package[:len(package) - node.level + 1])
            base = f"{base}.{node.module}" if node.module else base
            # A submodule, or a name that the package defines.
            yield from (f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names)


def circles(graph):
    """Each group of modules that import one another, directly or through others."""
    def reached(start):
        found, todo = set(), list(graph[start])
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo += graph[name]
        return found

    reach = {name: reached(name) for name in graph}
    return {frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]}


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}, "e": {"a"}}) == {frozenset("bc"), frozenset("d")}
    assert set(imported_modules("liteattention.host.families")) >= {"liteattention.host.model_call",
                                                                    "liteattention.host.block_numbers"}


def test_no_module_imports_itself_through_others():
    graph = {name: set(imported_modules(name)) for name in MODULES}
    assert all(imported <= MODULES.keys() for imported in graph.values())
    assert not [" <-> ".join(sorted(circle)) for circle in circles(graph)]
