"""An ordinary prompt in a graph with a context for each layer's keys and values: the numbers of one without."""

from pathlib import Path
from typing import Any

import numpy as np

from oneword.engines.onnxruntime import OnnxRuntimeEngine
from oneword.export.families import Traceable, denoise_graph, family_of
from oneword.export.modules import DenoiseStep, UNet
from oneword.export.source import load_source
from oneword.export.trace import example_feeds
from oneword.export.write import write_graph
from tests.bundles import traced_once


class OneSource(UNet):
    """A UNet all of whose layers attend to one context, as its own forward does."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.num_layers = 1

    def forward(self, sample: Any, t: Any, context: Any, pooled: Any, time_ids: Any, branch_context: Any) -> Any:
        return super().forward(sample, t, context.index_select(0, branch_context[:, 0, 0]), pooled, time_ids)


def engine(graph: Traceable, folder: Path) -> OnnxRuntimeEngine:
    folder.mkdir()
    return OnnxRuntimeEngine(graph.name, write_graph(graph, folder), folder)


def test_an_ordinary_prompt_has_the_step_of_a_graph_with_one_layer_and_one_source(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    source = load_source(tiny_model_dir)
    [graph] = [graph for graph in family_of(source).graphs if graph.name == "denoise_step"]
    with traced_once():
        layered = engine(graph, tmp_path / "layered")
    single_graph = denoise_graph(DenoiseStep(OneSource(source.unet)))
    single = engine(single_graph, tmp_path / "single")
    for seed, sizes in enumerate(
        ({"B": 1, "N": 2, "M": 2, "T": 20, "h": 8, "w": 8}, {"B": 3, "N": 5, "M": 4, "T": 40, "h": 9, "w": 7})
    ):
        feeds = example_feeds(single_graph, sizes, seed)
        indices = feeds["branch_context"][:, :1]
        layers = layered.inputs["branch_context"].axes[2]
        assert layers == 4
        expected = single.run(feeds | {"branch_context": np.repeat(indices, 2, 1)})
        actual = layered.run(feeds | {"branch_context": np.broadcast_to(indices, (sizes["N"], 2, 4)).copy()})
        for name in ("next_sample", "denoised"):
            largest = np.abs(expected[name]).max()
            assert np.abs(actual[name] - expected[name]).max() <= 1e-6 * largest
