"""A model's bundle for a benchmark: exported once, and again if the model's files have changed."""

from pathlib import Path

from oneword.engines.errors import OnewordError
from oneword.export.source import digest_directory, find_model
from oneword.export.write import export_bundle
from oneword.runtime.bundle import Bundle


def exported(model: str, bundle: Path) -> Path:
    """Returns `bundle`, up to date with `model`."""
    try:
        if Bundle.open(bundle).manifest.source.digest == digest_directory(find_model(model)[0]):
            return bundle
    except OnewordError:
        pass  # it does not exist, or is incomplete
    export_bundle(model, bundle)
    return bundle
