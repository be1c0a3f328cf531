"""TensorRT-RTX plans of the whole miniature, built without a GPU."""

from pathlib import Path

import pytest

from oneword.engines.graph import Precision
from oneword.export.write import export_bundle
from tests.plans import rtx_plans


@pytest.mark.plans
@pytest.mark.parametrize("precision", list(Precision))
def test_every_graph_of_the_miniature_becomes_a_plan_for_two_gpus(tmp_path: Path, precision: Precision) -> None:
    """The builder checks each parsed network's inputs, outputs, dtypes and axes against the manifest."""
    pytest.importorskip("tensorrt_rtx")  # skip before the export
    bundle = export_bundle("miniature", tmp_path / "bundle", precision=precision, report=lambda _: None).bundle

    plans = rtx_plans(bundle, "sm89,sm120")

    assert plans.keys() == bundle.manifest.graphs.keys()
    assert all(path.stat().st_size > 1000 for paths in plans.values() for path in paths)
