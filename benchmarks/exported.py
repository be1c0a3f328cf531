"""A model's bundle for a benchmark: exported once, and again if it is of other files or of an older release."""

from pathlib import Path

from oneword.engines.errors import OnewordError
from oneword.engines.graph import Weights
from oneword.export.source import digest_directory, find_model
from oneword.export.write import export_bundle
from oneword.runtime.bundle import Bundle


def exported(model: str, bundle: Path, weights: Weights = Weights.FLOAT) -> Path:
    """Returns `bundle`, up to date with `model`, with such weights, and with the copies that ONNX Runtime opens."""
    try:
        manifest = Bundle.open(bundle).manifest
        stored = {graph.weights for graph in manifest.graphs.values()}
        has_copies = any(graph.fused for graph in manifest.graphs.values())
        if stored == {weights} and has_copies and manifest.source.digest == digest_directory(find_model(model)[0]):
            return bundle
    except OnewordError:
        pass  # it does not exist, or is incomplete
    export_bundle(model, bundle, weights=weights)
    return bundle
