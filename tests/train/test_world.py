"""The miniature's world: its guarantees about words, pictures and captions."""

import numpy as np
import pytest
import torch

from oneword.engines.errors import UsageError
from oneword.train.miniature import claims, readback, world
from oneword.train.miniature.tokenizer import LENGTH, make_tokenizer
from oneword.train.miniature.world import Look, Scene, Thing

RED_CIRCLE = Look("circle", "red", "white", "plain")


def _scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng) for _ in range(count)]


def test_the_world_has_the_promised_size() -> None:
    assert len(world.SHAPES) >= 12
    assert len(world.COLOURS) >= 12
    assert len(world.PATTERNS) >= 4
    assert len(world.MEDIA) >= 4
    assert len(world.NOUNS) >= 300
    assert len(world.STYLES) >= 60
    assert len(set(world.HELD_OUT_LOOKS)) == 12
    assert len(world.HELD_OUT_STYLES) == 6
    assert len(world.HELD_OUT_SHAPES) == 8
    assert not world.HELD_OUT_SHAPES.keys() & {*world.vocabulary()}


def test_held_out_shapes_are_as_large_as_the_others_and_no_word_names_them() -> None:
    y, x = (np.mgrid[0:400, 0:400] + 0.5) / 160 - 1.25
    areas = {name: float((shape(x, y) <= 0).mean()) * 6.25 for name, shape in world.ALL_SHAPES.items()}
    named = [area for name, area in areas.items() if name in world.SHAPES]

    assert len(world.HELD_OUT_SHAPES) >= 8
    assert not world.HELD_OUT_SHAPES.keys() & {*world.vocabulary()}
    assert all(min(named) <= areas[name] <= max(named) for name in world.HELD_OUT_SHAPES), areas


def test_the_training_set_never_shows_a_held_out_look_or_style() -> None:
    scenes = _scenes(20_000)
    looks = {thing.look for scene in scenes for thing in scene.things}
    assert looks.isdisjoint(world.HELD_OUT_LOOKS)
    assert {scene.style for scene in scenes}.isdisjoint(world.HELD_OUT_STYLES)
    assert not set(world.NOUNS.values()) & set(world.HELD_OUT_LOOKS)


def test_a_quarter_of_the_scenes_has_two_things_and_one_noun_is_biased() -> None:
    scenes = _scenes(20_000)
    assert np.mean([len(scene.things) == 2 for scene in scenes]) == pytest.approx(0.25, abs=0.02)
    rng = np.random.default_rng(1)
    colours = [world.biased_thing(rng).look.colour for _ in range(2_000)]
    assert colours.count("red") / 2_000 == pytest.approx(0.9, abs=0.03)


def test_the_same_scene_and_seed_give_the_same_picture() -> None:
    scene = _scenes(1)[0]
    first, words = world.render(scene, 7)
    again, _ = world.render(scene, 7)
    different, _ = world.render(scene, 8)
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - different.astype(int)).max() > 10
    assert words == world.caption(scene)


def test_captions_by_hand() -> None:
    blue_dots = Look("star", "red", "blue", "dots")
    green_base = Look("arrow", "orange", "green", "base")
    assert world.caption(Scene((Thing(RED_CIRCLE),), "snow")) == "a photo of a red circle in the snow"
    assert world.caption(Scene((Thing(blue_dots), Thing(green_base)), "night", "icon")) == (
        "an icon of a red star with blue dots and an orange arrow with a green base at night"
    )
    style, noun = next(iter(world.STYLES)), next(iter(world.NOUNS))
    assert world.caption(Scene((Thing(world.NOUNS[noun], noun),), "sea", None, style)) == (
        f"a {noun} by the sea in the style of {style}"
    )


def test_an_unshaded_object_has_exactly_the_colour_named() -> None:
    for name, rgb in world.COLOURS.items():
        scene = Scene(
            (Thing(Look("square", name, "white" if name != "white" else "black", "plain")),), "studio", "icon"
        )
        centre = world.render(scene, 3)[0][30:36, 29:35].reshape(-1, 3)
        expected = np.broadcast_to(np.array(rgb) * 255, centre.shape)
        np.testing.assert_allclose(centre, expected, atol=1)  # rounding


def test_the_area_of_a_circle_matches_its_radius() -> None:
    """The circle's distance function has a radius of 0.88 times the drawn radius, which is 16 to 21 pixels."""
    flat = world.Style()
    scene = Scene((Thing(RED_CIRCLE),), "studio", None, flat)
    areas = []
    for seed in range(40):
        image = world.render(scene, seed)[0].astype(int)
        areas.append((image[..., 0] - image[..., 1] > 90).sum())
    radii = np.sqrt(np.array(areas) / np.pi) / 0.88
    assert radii.min() > 15.8
    assert radii.max() < 21.2


def test_unknown_names_are_refused_with_the_known_names_listed() -> None:
    with pytest.raises(UsageError, match="unknown shape 'blob': the world has circle, square"):
        Look("blob", "red", "white", "plain")
    with pytest.raises(UsageError, match="unknown background 'moon'"):
        Scene((Thing(RED_CIRCLE),), "moon")
    with pytest.raises(UsageError, match="a scene of 3 things"):
        Scene((Thing(RED_CIRCLE),) * 3, "snow")
    with pytest.raises(UsageError, match="set medium=None"):
        Scene((Thing(RED_CIRCLE),), "snow", "photo", next(iter(world.STYLES)))


def test_every_word_of_the_world_is_one_token() -> None:
    tokens = make_tokenizer()
    for word in world.vocabulary():
        assert len(tokens(word).input_ids) == 3, word


def test_every_caption_fits_the_text_encoder() -> None:
    tokens = make_tokenizer()
    rng = np.random.default_rng(5)
    captions = [world.caption(scene) for scene in _scenes(500)] + [world.paraphrase(s, rng) for s in _scenes(500)]
    assert max(len(tokens(words).input_ids) for words in captions) <= LENGTH
    unknown = {word for words in captions for word in words.replace("-", " - ").split()} - set(world.vocabulary())
    assert not unknown


def test_a_claim_is_true_of_its_scene_and_false_if_a_value_differs() -> None:
    rng = np.random.default_rng(2)
    for scene in _scenes(500):
        assert claims.sample_claim(scene, rng).holds(scene)
    red = Scene((Thing(RED_CIRCLE),), "snow")
    blue = Scene((Thing(Look("circle", "blue", "white", "plain")),), "snow")
    claim = claims.Claim((None, "red", None, None), None, None, "snow", None)
    assert claim.words == "a red object in the snow"
    assert claim.holds(red)
    assert not claim.holds(blue)
    assert not claims.Claim((None, None, None, None), None, "icon", None, None).holds(red)


def test_the_contrastive_loss_is_clips_if_each_picture_has_one_true_caption() -> None:
    """Reference: the symmetric cross-entropy of Radford et al. (2021), written out."""
    torch = pytest.importorskip("torch")
    logits = torch.tensor([[2.0, 0.5], [-1.0, 1.0]])
    expected = (
        torch.nn.functional.cross_entropy(logits, torch.arange(2))
        + torch.nn.functional.cross_entropy(logits.T, torch.arange(2))
    ) / 2
    torch.testing.assert_close(claims.contrastive_loss(logits, torch.eye(2, dtype=torch.bool)), expected)


def test_background_and_colour_are_read_back_from_real_renders() -> None:
    rng = np.random.default_rng(3)
    background, colour = [], []
    while len(colour) < 40:
        scene = world.sample_scene(rng)
        if len(scene.things) == 1 and scene.medium:
            image, _ = world.render(scene, len(colour))
            background.append(readback.read_background(image, scene.drawn_as) == scene.background)
            shares = readback.read_colours(image, scene.background, scene.drawn_as)
            assert sum(shares.values()) == pytest.approx(1)
            colour.append(shares[scene.things[0].look.colour] >= 0.3)
    assert np.mean(background) >= 0.95
    assert np.mean(colour) >= 0.9


def test_questions_are_worded_like_captions_of_the_world() -> None:
    assert claims.QUESTIONS["shape"]["arrow"] == "an arrow"
    assert claims.QUESTIONS["colour"]["red"] == "a red object"
    assert claims.QUESTIONS["background"]["snow"] == "an object in the snow"
    assert claims.QUESTIONS["medium"]["icon"] == "an icon of an object"
    assert claims.QUESTIONS["pattern"]["base"] == "an object with a base"
    assert claims.QUESTIONS["pattern"]["plain"] == "a plain object"


def test_a_batch_has_every_question_and_the_right_answers() -> None:
    _, ids, truth = claims.sample_batch(np.random.default_rng(3), 6, make_tokenizer())
    count = sum(len(values) for values in claims.QUESTIONS.values())
    assert ids.shape == (6 + count, 32)
    assert truth.shape == (6, 6 + count)
    assert truth[:, :6].diagonal().all()  # each picture's own claim
    backgrounds = truth[:, 6:].split([len(values) for values in claims.QUESTIONS.values()], 1)[2]
    assert (backgrounds.sum(1) == 1).all()  # one background per scene


def test_a_question_without_an_answer_does_not_count() -> None:
    """By hand: equal logits, two claims, and one row whose shape is known; shapes have four times the weight."""
    counts = [len(values) for values in claims.QUESTIONS.values()]
    truth = torch.zeros(2, 2 + sum(counts), dtype=torch.bool)
    truth[:, :2] = torch.eye(2, dtype=torch.bool)
    truth[0, 2] = True  # the first picture's shape is known, and nothing else about either picture
    loss = claims.judge_loss(torch.zeros(2, 2 + sum(counts)), truth)
    torch.testing.assert_close(loss, torch.tensor(np.log(2) + 4 * np.log(counts[0]), dtype=torch.float32))
