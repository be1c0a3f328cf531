"""What each layer may import, checked by importing it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("engines", "runtime", "export", "train")

BLOCKED = ("torch", "diffusers", "transformers", "accelerate")
IMPORT_ALL = f"""
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
for package in ("oneword.engines", "oneword.runtime"):
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
        print(module.name)
assert not set({BLOCKED}) & set(sys.modules)
"""


def test_runtime_and_engines_import_completely_with_pytorch_blocked() -> None:
    process = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False)

    assert process.returncode == 0, process.stderr
    modules = {
        f"oneword.{path.parent.name}.{path.stem}" for layer in LAYERS[:2] for path in (ROOT / layer).glob("*.py")
    }
    assert set(process.stdout.split()) == {name for name in modules if not name.endswith(".__init__")}


@pytest.mark.parametrize("package", ["onnxruntime", "openvino", "cuda", "polygraphy"])
def test_an_optional_package_is_imported_in_one_module_and_not_at_import_time(package: str) -> None:
    importers: list[str] = []
    for layer in LAYERS[:2]:
        for path in (ROOT / layer).rglob("*.py"):
            tree = ast.parse(path.read_text())
            at_top = {id(node) for node in tree.body}
            for node in ast.walk(tree):
                if package in _imported(node):
                    importers.append(path.name)
                    assert id(node) not in at_top, f"{path.name} imports {package} at import time"

    assert len(set(importers)) == 1, f"{package} is imported in {sorted(set(importers))}"


def _imported(node: ast.AST) -> set[str]:
    """The top-level packages an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").partition(".")[0]}
    return set()
