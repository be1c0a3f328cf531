"""A model's bundle for a benchmark: exported once, and again when the model's files have changed."""

from pathlib import Path

from oneword.engines.errors import OnewordError
from oneword.export.source import digest_directory, find_model
from oneword.export.write import export_bundle
from oneword.runtime.bundle import Bundle


def exported(model: str, bundle: Path) -> Path:
    """`bundle`, made from `model` as it is now."""
    try:
        if Bundle.open(bundle).manifest.source.digest == digest_directory(find_model(model)[0]):
            return bundle
    except OnewordError:
        pass  # none there yet, or not whole
    export_bundle(model, bundle)
    return bundle
