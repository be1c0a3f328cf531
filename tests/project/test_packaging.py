"""The package as users install it: version, commands, wheel, and a README that only names what exists."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest

import oneword

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()


def test_version_is_the_same_in_package_metadata_and_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()

    assert version("oneword") == oneword.__version__
    assert re.search(rf"^## \[{re.escape(oneword.__version__)}\]", changelog, re.M)


@pytest.mark.parametrize("name", sorted(PYPROJECT["project"]["scripts"]))
def test_each_command_loads_and_is_in_the_readme(name: str) -> None:
    (script,) = entry_points(group="console_scripts", name=name)

    assert callable(script.load())
    assert name in README


def test_readme_names_no_command_or_target_that_does_not_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    shown = "\n".join(re.findall(r"^```(?:sh|console|bash)?\n(.*?)^```", README, re.M | re.S))
    files = {f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (benchmarks\.\w+)", README)}
    files |= set(re.findall(r"\]\((?!http|#)([^)#]+)", README))

    assert set(re.findall(r"^ *(?:\$ )?(ti-[a-z]+)", shown, re.M)) <= set(PYPROJECT["project"]["scripts"])
    assert set(re.findall(r"\bmake ([a-z-]+)", shown)) <= targets
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []


def test_every_pinned_version_is_within_its_range_in_pyproject() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {_plain(name): tuple(map(int, pin.split("."))) for name, pin in pins.items()}
    ranges = [re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line) for line in requires("oneword") or []]
    floors = {_plain(match[1]): tuple(map(int, match[2].split("."))) for match in ranges if match}

    assert "torch" in pins
    assert {name for name, floor in floors.items() if pins.get(name, floor) < floor} == set()
    assert floors["transformers"] >= (5, 3)  # CVE-2026-4372


def test_default_install_brings_neither_pytorch_nor_an_engine() -> None:
    required = {re.match(r"[\w-]+", line)[0] for line in requires("oneword") or [] if "extra ==" not in line}  # type: ignore[index]

    assert required.isdisjoint({"torch", "diffusers", "transformers", "onnxruntime", "openvino", "tensorrt", "ray"})


def test_wheel_contains_every_package_and_the_miniature_and_nothing_else(tmp_path: Path) -> None:
    copy = tmp_path / "copy"  # setuptools leaves a build folder, whose files the next wheel would contain
    ignored = shutil.ignore_patterns(".*", "build", "demo-output", "*.egg-info")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, copy], check=True
    )

    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"oneword/{path.relative_to(ROOT)}" for top in ("engines", "runtime", "export", "train")
               for path in (ROOT / top).rglob("*.py")}  # fmt: skip
    weights = {
        f"oneword/{path.relative_to(ROOT / 'src/oneword')}"
        for path in (ROOT / "src/oneword/miniature").rglob("*")
        if path.is_file()
    }
    assert sources | weights <= names
    assert any(name.endswith("model_index.json") for name in weights)
    assert {name.split("/")[0] for name in names} == {"oneword", f"oneword-{oneword.__version__}.dist-info"}


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
