"""The cache of exported models that the tests share."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from oneword.engines.graph import Precision
from tests import bundles


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
