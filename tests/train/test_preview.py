from pathlib import Path

import numpy as np
import pytest

from oneword.export.eager import eager_model
from oneword.export.source import load_source
from oneword.runtime.concept import Concept
from oneword.runtime.model import Model
from oneword.train.evaluation.evaluate import sample
from oneword.train.preview import Previewer, SheetFolders


@pytest.fixture
def concept() -> Concept:
    return Concept("<toy>", {"text_encoder": np.random.default_rng(0).normal(0, 0.1, (1, 32))})


def test_the_modules_draw_what_the_exported_graphs_draw(
    tiny_model_dir: Path, tiny_bundle: Path, concept: Concept
) -> None:
    """Reference: ONNX Runtime on the exported bundle. A value between two grey levels may round either way."""
    drawn = []
    for model in (eager_model(load_source(tiny_model_dir)), Model.open(tiny_bundle, "onnxruntime")):
        model.load(concept)
        drawn.append(sample(model, ["a photo of a <toy>"], 2, 3, seed=5)[0].astype(int))

    assert drawn[0].shape == (2, 64, 64, 3)
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert drawn[0].std() > 1


def test_a_sheet_has_one_row_per_prompt_and_is_saved_by_step(
    tiny_model_dir: Path, concept: Concept, tmp_path: Path
) -> None:
    previewer = Previewer(load_source(tiny_model_dir), ["a photo of a {}", "the {}"])
    folders = SheetFolders({"<toy>": tmp_path / "toy.previews"})

    sheet = previewer.sheet(concept, 7, [])
    folders.keep(sheet)
    (tmp_path / "toy.previews" / "step-final.png").write_bytes(b"the user's")

    assert list(sheet.pictures) == ["a photo of a <toy>", "the <toy>"]
    assert sheet.likeness is None  # this model comes without a judge
    (step,) = folders.images("<toy>")
    image = np.asarray(folders.images("<toy>")[step])
    assert step == 7
    np.testing.assert_array_equal(image[64:, 64:128], sheet.pictures["the <toy>"][1])
    folders.forget()
    assert folders.images("<toy>") == {}
    assert [path.name for path in (tmp_path / "toy.previews").iterdir()] == ["step-final.png"]
    assert previewer.model.words == ()
