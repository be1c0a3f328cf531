"""Words with output vectors, drawn from a bundle, against diffusers' UNet with hooks at its key and value inputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from oneword.engines.engine import Binding, Engine
from oneword.engines.errors import ConceptError, EngineError, FeedError, UsageError
from oneword.engines.onnxruntime import OnnxRuntimeBinding
from oneword.engines.open import open_engine
from oneword.runtime import model as model_module
from oneword.runtime.bundle import Bundle
from oneword.runtime.concept import Concept
from oneword.runtime.contexts import Context, EncodedPrompt, context_count
from oneword.runtime.drawing import draw, generate
from oneword.runtime.events import Failed, PictureDone, StepDone
from oneword.runtime.model import Model, TokenizedPrompt, check_clip_skip
from oneword.runtime.request import Request, resolve
from oneword.runtime.row import Row
from oneword.runtime.scheduler import Scheduler
from tests.runtime.test_limits import Limited, limited

LAYERS = 4  # of the tiny model: down, mid, two up
LONG = "a red star and a blue ring in the style of a painting with a blue dog"
"""17 tokens: one place is left in a chunk."""


def word(token: str, count: int, stages: int = 0, layers: int = 1, *, values_only: bool = True) -> Concept:
    random = np.random.default_rng(sum(map(ord, token)))
    rows = {"text_encoder": random.normal(0, 0.5, (count, 32)).astype(np.float32)}
    if not stages:
        return Concept(token, rows)
    out = random.normal(0, 1, (stages, layers, count, 32)).astype(np.float32)
    return Concept(token, rows, {}, {"text_encoder": out}, values_only, {"text_encoder": 3})


WORDS = {
    concept.token: concept
    for concept in (
        word("<toy>", 2, stages=4, layers=LAYERS),
        word("<gem>", 1, stages=1, layers=LAYERS, values_only=False),
        word("<pin>", 1, stages=3),
        word("<plain>", 2),
    )
}
WORDS["<xti>"] = Concept(
    "<xti>",
    {"text_encoder": np.full((2, 32), 0.1, np.float32)},
    layer_rows={"text_encoder": np.random.default_rng(8).normal(0, 0.5, (LAYERS, 2, 32)).astype(np.float32)},
)
WORDS["<zero>"] = Concept(  # as from OneTrainer's files with output vectors
    "<zero>",
    {"text_encoder": np.zeros((1, 32), np.float32)},
    out={"text_encoder": np.random.default_rng(9).normal(0, 1, (1, 1, 1, 32)).astype(np.float32)},
)


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    model = Model.open(tiny_bundle, "onnxruntime", threads=1)
    for concept in WORDS.values():
        model.load(concept)
    return model


@dataclass(frozen=True, eq=False)
class Case:
    """A request, and its prompts by hand: chunks of pieces with their weights."""

    request: Request
    chunks: Sequence[Sequence[tuple[str, float]]]
    negative: Sequence[Sequence[tuple[str, float]]] = ((),)


CASES = {
    "one word, unguided": Case(
        Request("a photo of <toy>", seed=1, steps=6, guidance_scale=1.0), [[("a photo of", 1), ("<toy>", 1)]]
    ),
    "many words and weights": Case(
        Request(
            "a (<toy>:1.3) and (<gem>:0.8) with <pin> on <plain>, (red:1.2) <toy>",
            negative_prompt="<pin> blue",
            seed=2,
            steps=5,
            sampler="euler",
            guidance_scale=3.0,
        ),
        [
            [
                *(("a", 1), ("<toy>", 1.3), ("and", 1), ("<gem>", 0.8), ("with", 1), ("<pin>", 1), ("on", 1)),
                *(("<plain>", 1), (",", 1), ("red", 1.2), ("<toy>", 1)),
            ]
        ],
        [[("<pin>", 1), ("blue", 1)]],
    ),
    "a word moves whole to the next chunk": Case(
        Request(f"{LONG} (<toy>:1.1) cat", seed=3, steps=4, sampler="heun", guidance_scale=2.0),
        [[(LONG, 1)], [("<toy>", 1.1), ("cat", 1)]],
    ),
    "precise words in both prompts": Case(
        Request("<toy>", negative_prompt="<gem> <toy>", seed=4, steps=5, sampler="dpmpp-2m-sde", guidance_scale=4.0),
        [[("<toy>", 1)]],
        [[("<gem>", 1), ("<toy>", 1)]],
    ),
    "two stages of the sampler, an interval of guidance": Case(
        Request("a <pin>", seed=5, steps=6, sampler="dpm2-a", guidance_scale=3.0, guidance_interval=(0.5, 5.0)),
        [[("a", 1), ("<pin>", 1)]],
    ),
    "an ordinary word": Case(
        Request("a photo of <plain>", seed=6, steps=4, eta=0.5, sampler="ddim", guidance_scale=3.0),
        [[("a photo of", 1), ("<plain>", 1)]],
    ),
    "rows for each layer, and OneTrainer's output vectors": Case(
        Request(
            "a (<xti>:1.2) and <toy>",
            negative_prompt="<zero> cat",
            seed=8,
            steps=4,
            sampler="euler",
            guidance_scale=2.0,
        ),
        [[("a", 1), ("<xti>", 1.2), ("and", 1), ("<toy>", 1)]],
        [[("<zero>", 1), ("cat", 1)]],
    ),
    "rows for each layer in the second chunk": Case(
        Request(f"{LONG} <xti>", negative_prompt="<xti>", seed=9, steps=3, sampler="ddim", guidance_scale=2.0),
        [[(LONG, 1)], [("<xti>", 1)]],
        [[("<xti>", 1)]],
    ),
    "negative weights": Case(
        Request("a (<toy>:-0.5) dog", seed=7, steps=3, sampler="unipc", guidance_scale=2.0),
        [[("a", 1), ("<toy>", -0.5), ("dog", 1)]],
    ),
}


class Reference:
    """diffusers' UNet and transformers' encoder, whose vocabulary has the words; output vectors are written by hand."""

    def __init__(self, folder: Path, bundle: Path, words: Mapping[str, Concept] = WORDS) -> None:
        from diffusers import StableDiffusionPipeline

        self.manifest = Bundle.open(bundle).manifest
        self.pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        self.words = words
        self.tokens: dict[str, list[int]] = {}
        encoder = self.pipeline.text_encoder
        for token, concept in words.items():
            rows = concept.vectors["text_encoder"]
            names = [f"<{token.strip('<>')}-{i}>" for i in range(len(rows))]
            self.pipeline.tokenizer.add_tokens(names)
            encoder.resize_token_embeddings(len(self.pipeline.tokenizer), mean_resizing=False)
            self.tokens[token] = self.pipeline.tokenizer.convert_tokens_to_ids(names)
            encoder.get_input_embeddings().weight.data[self.tokens[token]] = torch.tensor(rows)
        order = {"down": 0, "mid": 1, "up": 2}
        named = [(name, m) for name, m in self.pipeline.unet.named_modules() if name.endswith("attn2")]
        attentions = [m for _, m in sorted(named, key=lambda item: order[item[0].split("_")[0]])]
        assert len(attentions) == LAYERS
        self.inputs: list[list[torch.Tensor]] = []
        for layer, attention in enumerate(attentions):
            for kind, projection in enumerate((attention.to_k, attention.to_v)):
                projection.register_forward_pre_hook(
                    lambda module, args, kind=kind, layer=layer: (self.inputs[kind][layer][None],)
                )

    def contexts(
        self, chunks: Sequence[Sequence[tuple[str, float]]], stages: Mapping[str, int]
    ) -> list[list[torch.Tensor]]:
        """The inputs of the keys' and of the values' projections, by layer [T, D]."""
        tokenizer = self.pipeline.tokenizer
        parts: list[list[list[torch.Tensor]]] = []
        for chunk in chunks:
            ids, weights, learned = [tokenizer.bos_token_id], [1.0], [("", 0)]
            for text, weight in chunk:
                new = self.tokens.get(text) or tokenizer(text, add_special_tokens=False).input_ids
                learned += [(text if text in self.words else "", i) for i in range(len(new))]
                ids, weights = ids + new, weights + [weight] * len(new)
            padding = 20 - len(ids)
            ids, weights = ids + [tokenizer.eos_token_id] * padding, weights + [1.0] * padding
            encoded = [self.encoded(ids, weights, layer) for layer in range(LAYERS)]
            written = [[states for states, _ in encoded] for _ in range(2)]
            for position, (token, number) in enumerate(learned):
                concept = self.words.get(token)
                if concept is None or not concept.out:
                    continue
                out = concept.out["text_encoder"][stages[token]]
                for layer, (_, scale) in enumerate(encoded):
                    vector = torch.tensor(out[layer if len(out) > 1 else 0, number]) * weights[position] * scale
                    for kind in (1,) if concept.values_only else (0, 1):
                        written[kind][layer] = written[kind][layer].clone()
                        written[kind][layer][position] = vector
            parts.append(written)
        return [[torch.cat([part[kind][layer] for part in parts]) for layer in range(LAYERS)] for kind in range(2)]

    def encoded(self, ids: list[int], weights: list[float], layer: int) -> tuple[torch.Tensor, float]:
        """The weighted states [T, D] of a chunk for one layer, and the factor that restored their mean."""
        encoder = self.pipeline.text_encoder
        for token, concept in self.words.items():
            for rows in concept.layer_rows.values():
                encoder.get_input_embeddings().weight.data[self.tokens[token]] = torch.tensor(rows[layer])
        with torch.no_grad():
            states = encoder(torch.tensor([ids])).last_hidden_state[0]
        weighted = states * torch.tensor(weights)[:, None]
        low, high = 1 / max(*weights, 1.0), min(10.0, 1 / max(min(weights), 0.1))
        scale = float(torch.clamp(states.mean() / weighted.mean(), low, max(high, 1.0)))
        return weighted * scale, scale

    def predicted(self, x: torch.Tensor, t: float, inputs: list[list[torch.Tensor]]) -> torch.Tensor:
        self.inputs = inputs
        nowhere = torch.full((1, len(inputs[0][0]), 32), torch.nan)  # the hooks replace it
        with torch.no_grad():
            prediction: torch.Tensor = self.pipeline.unet(x[None], t, nowhere).sample[0]
        return prediction

    def latents(self, case: Case) -> npt.NDArray[np.float32]:
        """The final latents. The sampler's numbers are those of its table, which other tests compare with diffusers."""
        schedule = resolve(case.request, self.manifest).schedule
        generator = torch.Generator().manual_seed(case.request.seed)
        x = schedule.init_scale * torch.randn(4, 8, 8, generator=generator)
        previous = previous2 = torch.zeros_like(x)
        for line in range(len(schedule)):
            c = {name: float(column[line]) for name, column in schedule.columns.items()}
            first = line - line % schedule.lines_per_step
            noisiest = 999 - float(schedule.columns["t"][first])
            stages = {
                token: min(max(int(noisiest * concept.stages / 1000), 0), concept.stages - 1)
                for token, concept in self.words.items()
            }
            m = m_uncond = self.predicted(x, c["t"], self.contexts(case.chunks, stages))
            if schedule.guided[line]:
                m_uncond = self.predicted(x, c["t"], self.contexts(case.negative, stages))
                m = m_uncond + c["guidance"] * (m - m_uncond)
            denoised = c["sample_to_denoised"] * x + c["model_to_denoised"] * m
            uncond = c["sample_to_denoised"] * x + c["model_to_denoised"] * m_uncond
            noise = torch.randn(x.shape, generator=generator) if schedule.draws[line] else torch.zeros_like(x)
            x = (
                c["sample"] * x
                + c["denoised"] * denoised
                + c["previous"] * previous
                + c["previous2"] * previous2
                + c["uncond"] * uncond
                + c["noise"] * noise
            )
            previous, previous2 = denoised, previous
        return x.numpy()


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path, tiny_bundle: Path) -> Reference:
    return Reference(tiny_model_dir, tiny_bundle)


def raising(error: Exception) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise error

    return call


def final_latents(model: Model, requests: Sequence[Request], max_rows: int = 16) -> dict[int, npt.NDArray[np.float32]]:
    """The final latents of requests that share their calls, by seed."""
    latents: dict[int, npt.NDArray[np.float32]] = {}
    scheduler = Scheduler(model, max_rows)
    for request in requests:
        scheduler.add(request)
    take = scheduler.denoiser.take

    def record(row: Row) -> npt.NDArray[np.float32]:
        latents[row.seed] = take(row)
        return latents[row.seed]

    scheduler.denoiser.take = record  # type: ignore[method-assign]
    while scheduler:
        assert not [event for event in scheduler.step() if isinstance(event, Failed)]
    return latents


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_latents_are_those_of_diffusers_with_every_layers_keys_and_values_replaced(
    model: Model, reference: Reference, case: Case
) -> None:
    [actual] = final_latents(model, [case.request], max_rows=1).values()
    expected = reference.latents(case)
    assert np.abs(actual - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def test_rows_with_precise_and_ordinary_words_share_calls_and_match_diffusers(
    model: Model, reference: Reference
) -> None:
    together = final_latents(model, [case.request for case in CASES.values()])
    for case in CASES.values():
        expected = reference.latents(case)
        assert np.abs(together[case.request.seed] - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def test_every_part_of_a_word_matters(model: Model) -> None:
    """So that the comparisons above would notice if a stage, a layer, or the split of keys and values were lost."""
    request, toy = Request("a <toy>", seed=1, steps=8, guidance_scale=1.0), WORDS["<toy>"]
    expected = final_latents(model, [request])[1]
    for region in (np.s_[0, 0], np.s_[3, 3], np.s_[1, 2, 1]):
        out = toy.out["text_encoder"].copy()
        out[region] += 1
        changed = replace(toy, out={"text_encoder": out})
        assert np.abs(final_latents(model, [replace(request, words={"<toy>": changed})])[1] - expected).max() > 1e-4
    keys_too = replace(toy, values_only=False)
    assert np.abs(final_latents(model, [replace(request, words={"<toy>": keys_too})])[1] - expected).max() > 1e-4


def test_a_written_vector_is_weighted_and_its_neighbours_are_untouched(model: Model) -> None:
    prompt = "a (<toy>:1.5) and (red:0.7) <gem>"
    [encoded] = model.encode([model.tokenize(prompt)])
    [scale] = encoded.weight_scale["text_encoder"]
    sources = encoded.sources([2, 0], LAYERS)

    assert [len(sources.keys), len(sources.values)] == [LAYERS, LAYERS]
    for layer in range(LAYERS):
        keys, values = sources.keys[layer].hidden_states, sources.values[layer].hidden_states
        expected = encoded.hidden_states.copy()
        expected[6] = WORDS["<gem>"].out["text_encoder"][0, layer, 0] * scale  # bos, a, toy, toy, and, red, gem
        np.testing.assert_allclose(keys, expected, atol=1e-6)
        expected[2:4] = WORDS["<toy>"].out["text_encoder"][2, layer] * np.float32(1.5) * scale
        np.testing.assert_allclose(values, expected, atol=1e-6)
        untouched = [0, 1, 4, 5, *range(7, 20)]
        np.testing.assert_array_equal(values[untouched], encoded.hidden_states[untouched])


def test_contexts_are_repeated_only_where_they_differ(model: Model) -> None:
    counts = {
        "a cat": 1,
        "a <plain>": 1,
        "a <pin>": 2,  # its plain states for keys
        "a <gem>": LAYERS,  # the same for keys and values
        "a <toy> <toy>": 1 + LAYERS,
        "a <pin> and <toy>": 1 + LAYERS,
        "a <gem> and <toy>": 2 * LAYERS,
        "a <xti>": LAYERS,
        "a <xti> and <toy>": 2 * LAYERS,
        "a <xti> and <gem>": LAYERS,
    }
    prompts = model.encode([model.tokenize(text) for text in counts])
    for text, prompt in zip(counts, prompts, strict=True):
        assert len(prompt.sources([0] * len(prompt.insertions), LAYERS).contexts) == counts[text], text
        tokens = model.tokenize(text)
        assert context_count(tokens.precise_words, LAYERS, layered=bool(tokens.layered)) == counts[text]
    [plain, *_] = prompts
    assert plain.sources([], LAYERS).contexts == (Context(plain),)
    assert Context(plain).hidden_states is plain.hidden_states


def test_pictures_of_one_prompt_share_contexts_and_a_stage_writes_only_its_own(model: Model) -> None:
    scheduler = Scheduler(model)
    scheduler.add(Request("a <toy>", num_images=4, steps=8))
    scheduler.step()
    [arena] = scheduler.denoiser._arenas.values()
    writes: list[int] = []
    context: Any = arena._inputs["context"]
    write = context.write
    context.write = lambda region, values: (writes.append(region), write(region, values))

    assert len(arena._pool.slots) == 2 + LAYERS  # the empty prompt, the keys, the values of each layer
    per_step: list[int] = []
    while scheduler:
        before = len(writes)
        scheduler.step()
        per_step.append(len(writes) - before)
    assert per_step[:7] == [0, LAYERS, 0, LAYERS, 0, LAYERS, 0]  # 8 steps in 4 stages


def test_the_stage_follows_the_noise_not_the_number_of_steps(model: Model) -> None:
    """An edit of strength 0.5 begins in the middle of the schedule, so the first stages have no effect on it."""
    image, toy = np.zeros((64, 64, 3), np.uint8), WORDS["<toy>"]
    request = Request("a <toy>", seed=1, steps=8, strength=0.5, image=image)
    early, late = (toy.out["text_encoder"].copy() for _ in range(2))
    early[:2] += 1
    late[2:] += 1
    expected = final_latents(model, [request])[1]
    unchanged, changed = (
        final_latents(model, [replace(request, words={"<toy>": replace(toy, out={"text_encoder": out})})])[1]
        for out in (early, late)
    )
    np.testing.assert_array_equal(unchanged, expected)
    assert np.abs(changed - expected).max() > 1e-4


def test_a_scheduled_prompt_reserves_the_places_that_its_word_needs_later(model: Model) -> None:
    request = Request("a [cat:<toy>:0.5]", seed=3, steps=4, num_images=2)
    scheduler = Scheduler(model)
    scheduler.add(request)
    scheduler.step()
    [arena] = scheduler.denoiser._arenas.values()
    assert len(arena._pool.slots) == 2
    assert arena.reserved_contexts == 2 * (2 + LAYERS)
    pictures = {e.seed: e.image for e in iter_events(scheduler) if isinstance(e, PictureDone)}
    [alone] = draw(model, replace(request, seed=4, num_images=1))
    assert np.abs(pictures[4].astype(int) - alone.image).max() <= 1


def iter_events(scheduler: Scheduler) -> Any:
    while scheduler:
        yield from scheduler.step()


def test_a_slider_between_precise_words_is_drawn(model: Model) -> None:
    other = replace(word("<box>", 2, stages=4, layers=LAYERS))
    words = {"<toy>": WORDS["<toy>"], "<box>": other}
    at_first, first = (
        final_latents(model, [Request(prompt, seed=1, steps=4, words=words)])[1]
        for prompt in ("a {<toy>|<box>:0}", "a <toy>")
    )
    np.testing.assert_allclose(at_first, first, atol=1e-5)
    half = final_latents(model, [Request("a {<toy>|<box>:0.5}", seed=1, steps=4, words=words)])[1]
    assert np.abs(half - first).max() > 1e-3


def with_words(bundle: Path, monkeypatch: pytest.MonkeyPatch, limits: Mapping[str, int]) -> Model:
    model = limited(bundle, monkeypatch, limits)
    for concept in WORDS.values():
        model.load(concept)
    return model


def test_a_row_waits_for_room_for_its_contexts_and_is_not_overtaken(
    tiny_bundle: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = with_words(tiny_bundle, monkeypatch, {"M": 9})  # <toy> needs 6, an ordinary prompt 2
    requests = [Request("a <toy>", seed=1, num_images=2, steps=3), Request("a cat", seed=5, steps=3)]
    scheduler = Scheduler(narrow)
    for request in requests:
        scheduler.add(request)
    scheduler.step()
    assert [row.seed for row in scheduler.denoiser.rows] == [1]
    started: list[int] = []
    while scheduler:
        started += [row.seed for row in scheduler.denoiser.rows if row.seed not in started]
        scheduler.step()

    assert started == [1, 2, 5]
    for picture in draw(narrow, *requests):
        [expected] = draw(model, replace(requests[picture.seed == 5], seed=picture.seed, num_images=1))
        assert np.abs(picture.image.astype(int) - expected.image).max() <= 1


def test_a_word_that_needs_more_contexts_than_the_engine_takes_is_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = with_words(tiny_bundle, monkeypatch, {"M": 5})
    events = [*generate(narrow, [Request("a <toy>", steps=2), Request("a <pin>", seed=3, steps=2)])]
    [failure] = [event for event in events if isinstance(event, Failed)]

    assert isinstance(failure.error, UsageError)
    assert str(failure.error) == (
        "the words of a picture's prompts need 6 contexts, an engine call has room for 5: use fewer words with output "
        "vectors or shorter prompts, or build the plans again, with ti-export and a larger --max-batch"
    )
    assert [event.seed for event in events if isinstance(event, PictureDone)] == [3]


class Planned(Limited):
    """A real engine of the largest sizes that its plans take; each binding needs one plan that takes all its sizes."""

    def __init__(self, engine: Engine, plans: Sequence[Mapping[str, int]]) -> None:
        super().__init__(engine, {axis: max(plan[axis] for plan in plans) for axis in plans[0]})
        self.plans = plans

    def check(self, sizes: Mapping[str, int]) -> None:
        if not any(all(sizes.get(axis, 0) <= most for axis, most in plan.items()) for plan in self.plans):
            raise FeedError(f"{self.name} has no plan for {sizes}")
        super().check(sizes)


def planned(bundle: Path, monkeypatch: pytest.MonkeyPatch, plans: Sequence[Mapping[str, int]]) -> Model:
    def opened(*args: Any) -> Engine:
        engine = open_engine(*args)
        return Planned(engine, plans) if engine.name == "denoise_step" else engine

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "open_engine", opened)
        model = Model.open(bundle, "onnxruntime", threads=1, concepts=[*WORDS.values()])
        model.engine("denoise_step")
    return model


def bound_contexts(model: Model) -> list[int]:
    """M of each binding of the denoiser."""
    engine: Any = model.engine("denoise_step")
    return [sizes["M"] for sizes in engine.bound]


def test_ordinary_pictures_have_two_contexts_each_so_that_plans_of_one_size_take_them(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = planned(tiny_bundle, monkeypatch, [{"B": 8, "N": 16, "M": 48}])
    draw(model, Request("a cat", steps=2), max_rows=1)
    draw(model, Request("a <plain>", steps=2, num_images=2), max_rows=4)

    assert set(bound_contexts(model)) == {2, 4}


def test_a_precise_word_gets_more_contexts_while_ordinary_pictures_go_on(
    tiny_bundle: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = planned(tiny_bundle, monkeypatch, [{"B": 8, "N": 16, "M": 48}])
    requests = [Request("a cat", seed=1, steps=5, sampler="dpmpp-2m-sde"), Request("a <toy>", seed=2, steps=4)]
    scheduler = Scheduler(wide, max_rows=4)
    scheduler.add(requests[0])
    for _ in range(2):
        scheduler.step()
    scheduler.add(requests[1])
    pictures = {event.seed: event.image for event in iter_events(scheduler) if isinstance(event, PictureDone)}

    assert sorted({*bound_contexts(wide)}) == [8, 4 * (2 + LAYERS)]
    for request in requests:
        [alone] = draw(model, request)
        assert np.abs(pictures[request.seed].astype(int) - alone.image).max() <= 1


def test_a_size_whose_plan_takes_two_contexts_per_row_draws_ordinary_pictures(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = 96 // Bundle.open(tiny_bundle).manifest.vae.factor
    plans = [{"B": 4, "N": 8, "M": 8, "h": side - 1}, {"B": 1, "N": 2, "M": 2, "h": side}]
    narrow = planned(tiny_bundle, monkeypatch, plans)
    large = Request("a cat", seed=1, steps=2, size=(96, 96))
    events = [*generate(narrow, [large, replace(large, prompt="a <toy>", seed=2)], max_rows=4)]

    assert [event.seed for event in events if isinstance(event, PictureDone)] == [1]
    [failure] = [event for event in events if isinstance(event, Failed)]
    assert "need 6 contexts, an engine call has room for 2" in str(failure.error)


def test_a_plan_for_fewer_rows_may_have_room_for_more_contexts(
    tiny_bundle: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = 96 // Bundle.open(tiny_bundle).manifest.vae.factor
    plans = [{"B": 4, "N": 8, "M": 24, "h": side - 1}, {"B": 1, "N": 2, "M": 16, "h": side}]
    narrow = planned(tiny_bundle, monkeypatch, plans)
    requests = [Request(f"a {name}", seed=seed, steps=2, size=(96, 96)) for seed, name in enumerate(["cat", "<toy>"])]
    for order in (requests, requests[::-1]):
        pictures = draw(narrow, *order, max_rows=4)
        for picture in pictures:
            [expected] = draw(model, requests[picture.seed])
            assert np.abs(picture.image.astype(int) - expected.image).max() <= 1
    assert {*bound_contexts(narrow)} == {2, 16}


def test_contexts_take_no_more_memory_than_an_arena_may(
    tiny_bundle: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    [encoded] = model.encode([model.tokenize("a cat")])
    monkeypatch.setattr("oneword.runtime.denoiser._MAX_BYTES", 13 * encoded.nbytes)
    wide = planned(tiny_bundle, monkeypatch, [{"B": 8, "N": 16, "M": 48}])
    [picture] = draw(wide, Request("a <toy>", seed=1, steps=2), max_rows=4)
    [expected] = draw(model, Request("a <toy>", seed=1, steps=2))

    assert np.abs(picture.image.astype(int) - expected.image).max() <= 1
    assert max(bound_contexts(wide)) == 13  # of the 24 that four rows may need


def test_a_row_that_is_cancelled_or_fails_gives_its_contexts_to_the_next(
    tiny_bundle: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = with_words(tiny_bundle, monkeypatch, {"M": 9})  # <toy> needs 6
    scheduler = Scheduler(narrow)
    first, second, third = (scheduler.add(Request("a <toy>", seed=seed, steps=6)) for seed in (1, 2, 3))
    scheduler.step()
    scheduler.step()
    assert [row.id for row in scheduler.denoiser.rows] == [first]
    scheduler.cancel(first)
    scheduler.step()
    assert [row.id for row in scheduler.denoiser.rows] == [second]
    [row] = scheduler.denoiser.rows
    row.broken_at = row.line
    events = [*iter_events(scheduler)]

    assert [event.id for event in events if isinstance(event, Failed)] == [second]
    [picture] = [event for event in events if isinstance(event, PictureDone)]
    [expected] = draw(model, Request("a <toy>", seed=3, steps=6))
    assert picture.id == third
    assert np.abs(picture.image.astype(int) - expected.image).max() <= 1


@pytest.mark.parametrize("at", [1, 3])
def test_precise_rows_continue_after_a_failed_step_as_far_as_their_contexts_fit(
    model: Model, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    words = ("a <toy>", "a cat", "<gem> <toy>", "a <xti>", "a <pin>")
    requests = [Request(prompt, seed=seed, steps=5, sampler="euler-a") for seed, prompt in enumerate(words)]
    expected = {request.seed: draw(model, request)[0].image for request in requests}
    run_graph, calls = OnnxRuntimeBinding.run, 0

    def failing(binding: OnnxRuntimeBinding, stream: int | None = None) -> None:
        nonlocal calls
        calls += "sample" in binding.inputs
        if calls >= at and "sample" in binding.inputs and len({*binding.inputs["branch_row"].numpy().tolist()}) > 2:
            raise EngineError("out of memory")
        run_graph(binding, stream)

    monkeypatch.setattr(OnnxRuntimeBinding, "run", failing)
    pictures = {picture.seed: picture.image for picture in draw(model, *requests, max_rows=5)}

    assert pictures.keys() == expected.keys()
    for seed, image in expected.items():
        assert np.abs(pictures[seed].astype(int) - image).max() <= 1


@pytest.mark.parametrize("first", ["a cat", "a <gem>"])  # two contexts, and more
def test_pictures_are_drawn_with_two_contexts_each_if_there_is_no_memory_for_more(
    tiny_bundle: Path, model: Model, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    wide = planned(tiny_bundle, monkeypatch, [{"B": 8, "N": 16, "M": 48}])
    engine: Any = wide.engine("denoise_step")
    bind = engine.bind

    def short(shapes: Mapping[str, Sequence[int]], *arrays: Any) -> Binding:
        if shapes.get("context", (0,))[0] > 8:
            raise EngineError("out of memory")
        bound: Binding = bind(shapes, *arrays)
        return bound

    monkeypatch.setattr(engine, "bind", short)
    scheduler = Scheduler(wide, max_rows=4)
    scheduler.add(Request(first, seed=1, steps=5, sampler="euler-a"))
    scheduler.step()
    scheduler.add(Request("a <toy>", "<toy>", seed=2, steps=3))  # 10 contexts, of 8 that there are
    scheduler.add(Request("a <toy>", seed=3, steps=3))  # 6
    events = [*iter_events(scheduler)]

    [failure] = [event for event in events if isinstance(event, Failed)]
    assert (failure.id, "need 10 contexts, an engine call has room for 8" in str(failure.error)) == (1, True)
    pictures = {event.seed: event.image for event in events if isinstance(event, PictureDone)}
    for request in (Request(first, seed=1, steps=5, sampler="euler-a"), Request("a <toy>", seed=3, steps=3)):
        [expected] = draw(model, request)
        assert np.abs(pictures[request.seed].astype(int) - expected.image).max() <= 1


def test_a_shortage_of_memory_is_named_and_ends_when_there_is_memory_again(
    tiny_bundle: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First there is no memory for any arena, then for one with two contexts per row, then for all of them."""
    wide = planned(tiny_bundle, monkeypatch, [{"B": 8, "N": 16, "M": 48}])
    engine: Any = wide.engine("denoise_step")
    bind, room = engine.bind, [0]

    def short(shapes: Mapping[str, Sequence[int]], *arrays: Any) -> Binding:
        if shapes.get("context", (0,))[0] > room[0]:
            raise EngineError("out of memory")
        bound: Binding = bind(shapes, *arrays)
        return bound

    monkeypatch.setattr(engine, "bind", short)
    scheduler = Scheduler(wide, max_rows=4)
    request = Request("a <toy>", "<toy>", seed=2, steps=3)  # 10 contexts
    errors = []
    for room[0] in (0, 8, 0, 8, 8):
        scheduler.add(request)
        errors += [event.error for event in iter_events(scheduler) if isinstance(event, Failed)]
    room[0] = 48
    scheduler.add(request)
    pictures = [event for event in iter_events(scheduler) if isinstance(event, PictureDone)]

    no_arena = "out of memory"
    two_each = "need 10 contexts, an engine call has room for 8 while memory is short: try again"
    for error, message in zip(errors, (no_arena, two_each, no_arena, two_each, two_each), strict=True):
        assert isinstance(error, EngineError)
        assert message in str(error)
    [expected], [picture] = draw(model, request), pictures
    assert np.abs(picture.image.astype(int) - expected.image).max() <= 1


def test_no_row_overtakes_one_of_its_size_that_waits_for_contexts_behind_another_size(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = with_words(tiny_bundle, monkeypatch, {"M": 9})  # 4 rows; <toy> needs 6 contexts
    large = Request("a cat", seed=1, steps=2, num_images=9, size=(96, 96))
    waiting = Request("a <toy>", seed=21, steps=6)
    scheduler = Scheduler(narrow)
    for request in (large, replace(waiting, seed=20), waiting, Request("a cat", seed=22, steps=2)):
        scheduler.add(request)
    started = [event.id for event in iter_events(scheduler) if isinstance(event, StepDone)]

    assert started.index(2) < started.index(3)


def test_texts_with_rows_for_each_layer_count_once_for_each_layer(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = model.encode([model.tokenize("a cat")])[0].nbytes
    request = Request("a <xti>", steps=2, guidance_scale=1.0)
    monkeypatch.setattr("oneword.runtime.scheduler.MAX_CONTEXT_BYTES", (1 + LAYERS) * size - 1)
    with pytest.raises(UsageError, match=r"the 1 texts? of the prompts?.* MiB when encoded"):
        Scheduler(model).add(request)
    monkeypatch.setattr("oneword.runtime.scheduler.MAX_CONTEXT_BYTES", (1 + LAYERS) * size)
    Scheduler(model).add(request)


def test_a_prompt_with_rows_for_each_layer_is_encoded_over_several_turns(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, calls, encode = Scheduler(model), list[int](), model._encode
    scheduler.add(Request("a dog", seed=1, steps=20))
    scheduler.step()

    def counted(prompts: Sequence[TokenizedPrompt]) -> list[EncodedPrompt]:
        calls.append(len(prompts))
        return encode(prompts)

    monkeypatch.setattr(model, "_encode", counted)
    request = Request(" ".join(["<xti> red"] * 30), seed=2, steps=2)  # of five chunks, eight of which fit into a turn
    cached = len(model._contexts)
    scheduler.add(request)
    pictures = {event.seed: event.image for event in iter_events(scheduler) if isinstance(event, PictureDone)}

    assert calls == [1] * (LAYERS + 1)
    assert len(model._contexts) == cached + 1
    draw(model, request)
    assert len(calls) == LAYERS + 1
    model._contexts.clear()
    [alone] = draw(model, request)
    assert np.abs(pictures[2].astype(int) - alone.image).max() <= 1


def test_a_lone_picture_has_room_for_any_words_in_both_prompts(model: Model) -> None:
    [picture] = draw(model, Request("<gem> <toy>", negative_prompt="<toy> <gem> <pin>", steps=2), max_rows=1)
    assert picture.image.shape == (64, 64, 3)


def test_another_clip_skip_is_refused_in_one_line(model: Model) -> None:
    message = r"^'<toy>' has output vectors of layer 3 of text_encoder, clip_skip 1 reads layer 2: use clip_skip 0$"
    with pytest.raises(UsageError, match=message):
        draw(model, Request("a <toy>", steps=2, clip_skip=1))
    draw(model, Request("a <plain>", steps=2, clip_skip=1))
    second = replace(WORDS["<toy>"], encoder_layers={"text_encoder": 2})
    with pytest.raises(UsageError, match="clip_skip 0 reads layer 3: use clip_skip 1"):
        draw(model, Request("a <toy>", steps=2, words={"<toy>": second}))
    draw(model, Request("a <toy>", steps=2, clip_skip=1, words={"<toy>": second}))
    third = replace(WORDS["<toy>"], encoder_layers={"text_encoder": 4})
    with pytest.raises(UsageError, match="layer 4 of text_encoder, clip_skip 0 reads layer 3: learn the word again"):
        check_clip_skip(third, model.manifest, 0)
    unstated = replace(second, encoder_layers={})
    with pytest.raises(UsageError, match="of layer 3 of text_encoder, clip_skip 1 reads layer 2"):
        draw(model, Request("a <toy>", steps=2, clip_skip=1, words={"<toy>": unstated}))


OUT = WORDS["<toy>"].out["text_encoder"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"out": {"text_encoder": OUT[..., :8]}},
            "of width 8, the states of text_encoder have width 32: learn the word",
        ),
        ({"out": {"text_encoder": OUT[:, :3]}}, "for 3 cross-attention layers, this model has 4: learn the word"),
        ({"encoder_layers": {"text_encoder": 12}}, "of layer 12 of text_encoder, which has 3 to choose from: learn"),
    ],
)
def test_a_word_of_another_model_is_refused_in_one_line(model: Model, changes: dict[str, Any], message: str) -> None:
    other = replace(WORDS["<toy>"], token="<other>", **changes)
    with pytest.raises(ConceptError, match=message) as caught:
        model.load(other)
    assert "\n" not in str(caught.value)


def test_rows_for_other_layers_than_the_model_has_are_refused_in_one_line(model: Model) -> None:
    other = replace(WORDS["<xti>"], token="<other>", layer_rows={"text_encoder": np.full((16, 2, 32), 0.1, np.float32)})
    with pytest.raises(ConceptError, match="has rows for 16 cross-attention layers, this model has 4: learn the word"):
        model.load(other)


def test_a_prompt_with_rows_for_each_layer_is_encoded_once_and_cached_with_all_its_contexts(model: Model) -> None:
    [first] = model.encode([model.tokenize("a <xti> in the style of a painting")])
    [second] = model.encode([model.tokenize("a <xti> in the style of a painting")])
    assert second is first
    assert len(first.layered) == LAYERS
    assert first.nbytes == (1 + LAYERS) * first.hidden_states.nbytes


def test_the_cache_counts_the_output_vectors_that_a_prompt_holds(model: Model) -> None:
    [encoded] = model.encode([model.tokenize("a <toy> and a <gem> on a <toy>")])
    toy, gem = 4 * LAYERS * 2 * 32 * 4, 1 * LAYERS * 1 * 32 * 4  # stages, layers, n, width and bytes
    assert encoded.nbytes == encoded.hidden_states.nbytes + toy + gem


def test_the_time_of_an_encoding_that_fails_is_counted_and_its_chunks_are_not(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([3.0, 5.0])
    monkeypatch.setattr(model_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(model, "_encode", raising(EngineError("out of memory")))
    seconds, chunks = model.encoding_seconds, model.encoded_chunks

    with pytest.raises(EngineError, match="out of memory"):
        model.encode([model.tokenize("a prompt that is not cached")])

    assert (model.encoding_seconds - seconds, model.encoded_chunks) == (2.0, chunks)
