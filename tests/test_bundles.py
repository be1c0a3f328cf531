"""The cache of exported models that the tests share."""

import shutil
from pathlib import Path

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
