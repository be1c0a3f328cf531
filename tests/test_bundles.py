"""The cache of exported models that the tests share."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from oneword.engines.graph import Precision, Weights
from oneword.export.families import Traceable, family_of
from oneword.export.source import load_source
from tests import bundles, conftest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (tmp_path / "model" / "unet" / "weights").write_bytes(b"1")
    return tmp_path / "model"


def test_a_changed_file_name_or_option_is_another_export(model: Path, tmp_path: Path) -> None:
    options = {"precision": Precision.FP32}
    first = bundles.key(model, options)
    assert bundles.key(shutil.copytree(model, tmp_path / "copy" / "model"), options) == first

    keys = {first, bundles.key(model, {}), bundles.key(model, {"precision": Precision.FP16})}
    keys.add(bundles.key(model, {**options, "preview": model}))
    keys.add(bundles.key(shutil.copytree(model, tmp_path / "renamed"), options))
    (model / "unet" / "weights").write_bytes(b"2")
    keys.add(bundles.key(model, options))
    assert len(keys) == 6


def test_an_option_outside_the_key_is_refused(model: Path) -> None:
    with pytest.raises(TypeError, match=r"options \['config'\] are not in the cache's key"):
        bundles.key(model, {"config": model / "model_index.json"})


def test_another_version_of_a_package_is_another_export(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    for version in ("1.0", "1.1"):
        bundles.code_digest.cache_clear()
        monkeypatch.setattr(bundles, "version", lambda package, version=version: version)
        digests.add(bundles.code_digest())
    bundles.code_digest.cache_clear()
    assert len(digests) == 2


def test_exports_of_code_that_was_not_used_for_days_and_of_the_oldest_of_many_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ages = {"week-old": 8, **{f"code-{i}": i / 2 for i in range(9)}}  # in days
    for name, age in ages.items():
        (tmp_path / name / "bundle").mkdir(parents=True)
        os.utime(tmp_path / name, (time.time() - age * 86_400,) * 2)

    bundles.drop_unused(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"code-{i}" for i in range(8)}

    monkeypatch.setattr(bundles, "MOST_DAYS", 1.25)
    bundles.drop_unused(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"code-0", "code-1", "code-2"}


def test_an_export_drops_what_is_unused_and_a_use_keeps_its_code(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    old, current = cache / "old", cache / bundles.code_digest()
    for folder in (old, current):
        folder.mkdir(parents=True)
        os.utime(folder, (0, 0))
    monkeypatch.setattr(bundles, "CACHE", cache)

    def export(model: Path, bundle: Path) -> Any:
        raise InterruptedError

    monkeypatch.setattr(bundles, "export_bundle", export)
    with pytest.raises(InterruptedError):
        bundles.export_once(model, tmp_path / "bundle")
    assert [*cache.iterdir()] == [current]


def changed_weight(graph: Traceable) -> Traceable:
    with torch.no_grad():
        next(graph.module.parameters()).view(-1)[0] += 1
    return graph


def changed_setting(graph: Traceable) -> Traceable:
    next(module for module in graph.module.modules() if isinstance(module, torch.nn.GroupNorm)).eps *= 2
    return graph


@pytest.mark.parametrize(
    "change",
    [
        changed_weight,
        changed_setting,
        lambda graph: replace(graph, limits={**graph.limits, "T": 19}),
        lambda graph: replace(graph, inputs=graph.inputs[::-1]),
        lambda graph: replace(graph, module=graph.module.half()),
    ],
)
def test_a_changed_module_or_signature_is_another_graph(
    tiny_model_dir: Path, change: Callable[[Traceable], Traceable]
) -> None:
    def denoise_step(model: Path) -> Traceable:
        graphs = family_of(load_source(str(model), torch.float32)).graphs
        return next(graph for graph in graphs if graph.name == "denoise_step")

    first = bundles.graph_key(denoise_step(tiny_model_dir), Weights.FLOAT)
    assert bundles.graph_key(change(denoise_step(tiny_model_dir)), Weights.FLOAT) != first


def test_the_same_module_in_another_folder_is_the_same_graph(tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model_dir, tmp_path / "elsewhere" / "copy")
    graphs = [family_of(load_source(str(model), torch.float32)).graphs for model in (tiny_model_dir, copy)]
    configs = [getattr(module, "config", {}) for graph in graphs[1] for module in graph.module.modules()]
    unsorted = [config["_use_default_values"] for config in configs if "_use_default_values" in config]
    assert any(len(names) > 1 for names in unsorted)
    for names in unsorted:
        names.reverse()  # diffusers' order differs from process to process
    first, second = ([bundles.graph_key(graph, Weights.FLOAT) for graph in model] for model in graphs)
    assert first == second
    assert len({*first, *(bundles.graph_key(graph, Weights.INT8) for graph in graphs[0])}) == 2 * len(first)


def test_the_files_that_run_first_exist() -> None:
    folder = Path(__file__).parent
    assert {name for name in conftest.LONG if not any(folder.rglob(name))} == set()
