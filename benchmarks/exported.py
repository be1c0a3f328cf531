"""A model's bundle for a benchmark: exported once, and again if the model's files have changed."""

from pathlib import Path

from oneword.engines.errors import OnewordError
from oneword.engines.graph import Weights
from oneword.export.source import digest_directory, find_model
from oneword.export.write import export_bundle
from oneword.runtime.bundle import Bundle


def exported(model: str, bundle: Path, weights: Weights = Weights.FLOAT) -> Path:
    """Returns `bundle`, up to date with `model` and with such weights."""
    try:
        manifest = Bundle.open(bundle).manifest
        stored = {graph.weights for graph in manifest.graphs.values()}
        if stored == {weights} and manifest.source.digest == digest_directory(find_model(model)[0]):
            return bundle
    except OnewordError:
        pass  # it does not exist, or is incomplete
    export_bundle(model, bundle, weights=weights)
    return bundle
