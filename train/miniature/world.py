"""The miniature's world: captioned 64x64 scenes drawn from signed distance functions. Pure NumPy: no models, no files.

A *look* is a shape, two colours and a pattern; a *noun* is a made-up word for one look. A *scene* puts one or two
objects on a *background*, drawn in a *medium* or in a named *style* (a mix of drawing parameters).
`render(scene, seed)` draws a scene, with jitter of position, size, angle and light, and returns its caption. The same
scene and seed always give the same picture.

`sample_scene` never uses `HELD_OUT_LOOKS`, `HELD_OUT_STYLES` and `HELD_OUT_SHAPES`, so a model trained on it has never
seen them. No word names a held-out shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oneword.engines.errors import UsageError

SIZE = 64  # pixels, in both directions

Array = NDArray[Any]
Colour = tuple[float, float, float]

COLOURS: Mapping[str, Colour] = MappingProxyType(
    {
        "red": (0.86, 0.10, 0.12),
        "orange": (1.00, 0.52, 0.05),
        "yellow": (1.00, 0.90, 0.10),
        "lime": (0.62, 0.90, 0.15),
        "green": (0.05, 0.50, 0.16),
        "cyan": (0.15, 0.85, 0.88),
        "blue": (0.10, 0.22, 0.86),
        "purple": (0.50, 0.12, 0.70),
        "pink": (1.00, 0.50, 0.74),
        "brown": (0.45, 0.24, 0.08),
        "white": (0.98, 0.98, 0.98),
        "black": (0.05, 0.05, 0.06),
    }
)
PATTERNS = ("plain", "stripes", "dots", "base")


def _polygon(points: Array) -> Callable[[Array, Array], Array]:
    """Signed distance to a closed polygon (Quilez, "distance to a polygon"); negative inside."""
    vertices = [(float(x), float(y)) for x, y in points]

    def distance(x: Array, y: Array) -> Array:
        nearest = np.full(x.shape, np.inf, np.float32)
        inside = np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(vertices, vertices[-1:] + vertices[:-1], strict=True):
            ex, ey = bx - ax, by - ay
            wx, wy = x - ax, y - ay
            along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
            above, below = wy >= 0, y < by
            left = ex * wy > ey * wx
            inside ^= (above & below & left) | (~above & ~below & ~left)
        return np.where(inside, -1, 1) * np.sqrt(nearest)

    return distance


def _regular(count: int, inner: float, turn: float = 0.0) -> Array:
    """A star polygon with `count` tips, [2 count, 2]; `inner` is the inner radius, the outer radius is 1."""
    angle = np.arange(2 * count) * np.pi / count - np.pi / 2 + turn
    radius = np.where(np.arange(2 * count) % 2 == 0, 1.0, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _moon(x: Array, y: Array) -> Array:
    return np.maximum(np.hypot(x, y) - 1.0, 0.82 - np.hypot(x - 0.52, y + 0.12))


def _heart(x: Array, y: Array) -> Array:
    """Two discs above a square turned by 45 degrees."""
    lobes = np.hypot(np.abs(x) - 0.45, y + 0.35) - 0.52
    return np.minimum(lobes, _HEART_TIP(x, y))


def _flower(x: Array, y: Array) -> Array:
    angle = np.arctan2(y, x)
    return (np.hypot(x, y) - (0.70 + 0.28 * np.cos(5 * angle + np.pi / 2))) * 0.75


_HEART_TIP = _polygon(np.array([(-0.88, -0.06), (-0.45, -0.5), (0, -0.2), (0.45, -0.5), (0.88, -0.06), (0, 0.98)]))

#: Signed distance functions on [-1, 1]^2, y down, one per shape, all of about the same area.
SHAPES: Mapping[str, Callable[[Array, Array], Array]] = MappingProxyType(
    {
        "circle": lambda x, y: np.hypot(x, y) - 0.88,
        "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.76,
        "triangle": _polygon(np.array([(0, -1.0), (1.0, 0.8), (-1.0, 0.8)])),
        "star": _polygon(_regular(5, 0.45) * 1.1),
        "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.68) - 0.30,
        "cross": lambda x, y: np.minimum(
            np.maximum(np.abs(x) - 0.34, np.abs(y) - 0.96), np.maximum(np.abs(x) - 0.96, np.abs(y) - 0.34)
        ),
        "heart": _heart,
        "moon": _moon,
        "diamond": _polygon(np.array([(0, -1.12), (0.66, 0), (0, 1.12), (-0.66, 0)])),
        "arrow": _polygon(
            np.array([(0, -1.05), (0.95, -0.05), (0.4, -0.05), (0.4, 1.0), (-0.4, 1.0), (-0.4, -0.05), (-0.95, -0.05)])
        ),
        "flower": _flower,
        "bolt": _polygon(
            np.array([(0.35, -1.1), (-0.85, 0.25), (-0.15, 0.25), (-0.35, 1.1), (0.85, -0.3), (0.15, -0.3)])
        ),
    }
)


def _outline(size: float, *points: tuple[float, float]) -> Callable[[Array, Array], Array]:
    return _polygon(size * np.array(points))


def _fish(x: Array, y: Array) -> Array:
    return np.minimum(_FISH_BODY(x, y), _FISH_TAIL(x, y))


def _mushroom(x: Array, y: Array) -> Array:
    """Half a disc on a stem."""
    cap = np.maximum(np.hypot(x, y - 0.05) - 1.0, y - 0.05)
    return np.minimum(cap, np.maximum(np.abs(x) - 0.38, np.abs(y - 0.5) - 0.5))


_FISH_BODY = _outline(0.9, *((-0.3 + 0.78 * np.cos(a), 0.62 * np.sin(a)) for a in np.arange(24) * np.pi / 12))
_FISH_TAIL = _outline(0.9, (0.1, 0), (1.1, -0.65), (0.85, 0), (1.1, 0.65))

#: As `SHAPES`: silhouettes that are in no picture of the training set and that no word names.
HELD_OUT_SHAPES: Mapping[str, Callable[[Array, Array], Array]] = MappingProxyType(
    {
        "tee": _outline(
            0.85,
            *((-1, -0.95), (1, -0.95), (1, -0.3), (0.36, -0.3)),
            *((0.36, 1), (-0.36, 1), (-0.36, -0.3), (-1, -0.3)),
        ),
        "ell": _outline(0.85, (-0.85, -1), (-0.15, -1), (-0.15, 0.3), (0.9, 0.3), (0.9, 1), (-0.85, 1)),
        "house": _outline(
            0.93, (0, -1.05), (1, -0.2), (0.75, -0.2), (0.75, 0.95), (-0.75, 0.95), (-0.75, -0.2), (-1, -0.2)
        ),
        "fish": _fish,
        "crown": _outline(0.88, (-1, 0.8), (-1, -0.75), (-0.45, 0), (0, -0.95), (0.45, 0), (1, -0.75), (1, 0.8)),
        "hourglass": _outline(0.85, (-0.9, -1), (0.9, -1), (0.22, 0), (0.9, 1), (-0.9, 1), (-0.22, 0)),
        "mushroom": _mushroom,
        "stairs": _outline(
            0.85,
            *((-1, 0.95), (-1, 0.3), (-0.33, 0.3), (-0.33, -0.3)),
            *((0.33, -0.3), (0.33, -0.95), (1, -0.95), (1, 0.95)),
        ),
    }
)
ALL_SHAPES: Mapping[str, Callable[[Array, Array], Array]] = MappingProxyType({**SHAPES, **HELD_OUT_SHAPES})


@dataclass(frozen=True)
class Background:
    """Two colours from top to bottom, a soft or hard horizon, and a faint texture."""

    phrase: str
    top: Colour
    bottom: Colour
    horizon: float | None = None  # height of a hard horizon, 0 to 1; None is a gradient
    texture: str | None = None  # "stripes", "checks", "waves"
    strength: float = 0.0


BACKGROUNDS: Mapping[str, Background] = MappingProxyType(
    {
        "snow": Background("in the snow", (0.72, 0.82, 0.94), (0.95, 0.97, 1.0), 0.45),
        "night": Background("at night", (0.04, 0.05, 0.18), (0.16, 0.16, 0.40)),
        "meadow": Background("in the meadow", (0.55, 0.80, 0.98), (0.36, 0.70, 0.28), 0.5),
        "desert": Background("in the desert", (0.99, 0.92, 0.72), (0.88, 0.66, 0.36), 0.55),
        "sea": Background("by the sea", (0.80, 0.92, 0.97), (0.12, 0.42, 0.62), 0.4, "waves", 0.10),
        "forest": Background("in the forest", (0.10, 0.28, 0.16), (0.20, 0.36, 0.14), None, "stripes", 0.16),
        "brick": Background("on a brick wall", (0.66, 0.34, 0.28), (0.60, 0.30, 0.25), None, "checks", 0.14),
        "sunset": Background("at sunset", (0.42, 0.22, 0.52), (0.99, 0.62, 0.36)),
        "studio": Background("in the studio", (0.70, 0.70, 0.72), (0.52, 0.52, 0.55)),
        "kitchen": Background("in the kitchen", (0.90, 0.90, 0.80), (0.84, 0.86, 0.76), None, "checks", 0.30),
    }
)


@dataclass(frozen=True)
class Style:
    """How a scene is drawn. Widths are in pixels, everything else is from 0 to 1 unless noted."""

    outline: float = 0.0
    outline_light: float = 0.0  # 0 is black, 1 is white
    shading: float = 0.0
    shadow: float = 0.0
    vignette: float = 0.0
    saturation: float = 1.0
    tint: Colour = (1.0, 1.0, 1.0)
    tint_amount: float = 0.0
    paper: float = 0.0  # how much the background fades to paper
    softness: float = 1.0  # width of an edge
    wobble: float = 0.0  # how far an edge deviates, in pixels
    hatching: float = 0.0
    frame: float = 0.0  # width of a frame
    frame_light: float = 1.0


MEDIA: Mapping[str, Style] = MappingProxyType(
    {
        "photo": Style(shading=0.45, shadow=0.5, vignette=0.35, softness=1.3),
        "drawing": Style(outline=2.0, paper=0.4, saturation=0.85),
        "icon": Style(outline=2.2, outline_light=1.0, frame=4.0, frame_light=0.12),
        "painting": Style(softness=1.8, wobble=0.8, hatching=0.14, tint=(1.0, 0.86, 0.62), tint_amount=0.25),
    }
)


@dataclass(frozen=True)
class Look:
    """A composite look. The `plain` pattern does not show `second_colour`. Raises `UsageError` for unknown names."""

    shape: str
    colour: str
    second_colour: str
    pattern: str

    def __post_init__(self) -> None:
        _known("shape", self.shape, ALL_SHAPES)
        _known("colour", self.colour, COLOURS)
        _known("second colour", self.second_colour, COLOURS)
        _known("pattern", self.pattern, PATTERNS)

    @property
    def words(self) -> str:
        """For example 'red star with blue dots'."""
        if self.pattern == "plain":
            return f"{self.colour} {self.shape}"
        article = "a " if self.pattern == "base" else ""
        return f"{self.colour} {self.shape} with {article}{self.second_colour} {self.pattern}"


@dataclass(frozen=True)
class Thing:
    """An object in a scene: its look, and its name in the caption (None to spell out the look)."""

    look: Look
    name: str | None = None

    @property
    def words(self) -> str:
        return self.name or self.look.words


@dataclass(frozen=True)
class Scene:
    """What `render` draws: one or two things, a background, and a medium or a style.

    `style` is a name in `STYLES` or `HELD_OUT_STYLES`, or a `Style`, which the caption does not name. With a style, the
    medium must be None. With neither, the scene is drawn as a photo, which the caption does not name.
    """

    things: tuple[Thing, ...]
    background: str
    medium: str | None = "photo"
    style: str | Style | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.things) <= 2:
            raise UsageError(f"a scene of {len(self.things)} things: give one or two")
        _known("background", self.background, BACKGROUNDS)
        if self.medium is not None:
            _known("medium", self.medium, MEDIA)
        if self.medium is not None and self.style is not None:
            raise UsageError(f"medium {self.medium!r} and a style: a scene has only one of them, set medium=None")
        if isinstance(self.style, str):
            _known("style", self.style, {**STYLES, **HELD_OUT_STYLES})

    @property
    def drawn_as(self) -> Style:
        if isinstance(self.style, Style):
            return self.style
        if isinstance(self.style, str):
            return STYLES.get(self.style) or HELD_OUT_STYLES[self.style]
        return MEDIA[self.medium or "photo"]


def _known(kind: str, name: str, allowed: Mapping[str, object] | tuple[str, ...]) -> None:
    if name not in allowed:
        raise UsageError(f"unknown {kind} {name!r}: the world has {', '.join(allowed)}")


@dataclass(frozen=True)
class Jitter:
    """Where a thing may be drawn: the ranges of its centre's x and y and of its radius, in pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    radius: tuple[float, float]


#: The jitter of each thing, left to right, by the number of things.
JITTERS: Mapping[int, tuple[Jitter, ...]] = MappingProxyType(
    {
        1: (Jitter((26, 38), (28, 38), (16, 21)),),
        2: (Jitter((15.5, 19.5), (27, 39), (11.5, 13.5)), Jitter((44.5, 48.5), (27, 39), (11.5, 13.5))),
    }
)
TURN = 0.22  # radians, the largest turn of a thing in either direction


def render(spec: Scene, seed: int) -> tuple[Array, str]:
    """Draws a scene: an image [64, 64, 3] uint8 and its caption, for example 'a photo of a red star in the snow'."""
    rng = np.random.default_rng(seed)
    style = spec.drawn_as
    image = _draw_background(BACKGROUNDS[spec.background], style, rng)
    for thing, box in zip(spec.things, _places(len(spec.things), rng), strict=True):
        image = _draw_thing(image, thing.look, box, style, rng)
    image = _finish(image, style)
    return np.round(image * 255).astype(np.uint8), caption(spec)


def render_background(background: str, style: Style, seed: int) -> Array:
    """Draws a background without things: [64, 64, 3] uint8."""
    _known("background", background, BACKGROUNDS)
    image = _draw_background(BACKGROUNDS[background], style, np.random.default_rng(seed))
    return np.round(_finish(image, style) * 255).astype(np.uint8)


def render_flat(rgb: Array, style: Style) -> Array:
    """Draws one colour [3], 0 to 1, with the style's hatching, vignette and frame: [64, 64, 3] uint8."""
    return np.round(_finish(np.broadcast_to(rgb, (SIZE, SIZE, 3)), style) * 255).astype(np.uint8)


def drawn_colour(colour: str, style: Style) -> Array:
    """A colour of `COLOURS` as a style paints it, before shading: [3], 0 to 1."""
    _known("colour", colour, COLOURS)
    return _colour(np.array(COLOURS[colour], np.float32), style)


def caption(spec: Scene) -> str:
    """The scene in words: medium, things, background, style."""
    things = " and ".join(with_article(thing.words) for thing in spec.things)
    opening = f"{with_article(spec.medium)} of {things}" if spec.medium else things
    ending = f" in the style of {spec.style}" if isinstance(spec.style, str) else ""
    return f"{opening} {BACKGROUNDS[spec.background].phrase}{ending}"


def with_article(words: str) -> str:
    """Adds the article: 'a star', 'an icon'."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def _draw_background(background: Background, style: Style, rng: np.random.Generator) -> Array:
    light = rng.uniform(-0.03, 0.03)
    horizon = background.horizon
    if horizon is None:
        mix = _Y / SIZE
    else:
        line = (horizon + rng.uniform(-0.06, 0.06)) * SIZE + 1.5 * np.sin(_X / 11 + rng.uniform(0, 6.28))
        mix = _smooth(_Y - line, style.softness)
    image = _blend(np.array(background.top, np.float32), np.array(background.bottom, np.float32), mix)
    if background.texture is not None:
        wave = _texture(background.texture, rng) * (1 if horizon is None else mix)
        image = image * (1 - background.strength * wave[..., None])
    image = _colour(image + light, style)
    return image * (1 - style.paper) + style.paper * 0.97


def _texture(kind: str, rng: np.random.Generator) -> Array:
    """A faint texture in [0, 1], with periods of about 16 pixels."""
    phase = rng.uniform(0, 16)
    if kind == "stripes":
        return _smooth(np.sin((_X + phase) * 2 * np.pi / 16) * 3, 2.0)
    if kind == "waves":
        return _smooth(np.sin((_Y + 1.5 * np.sin(_X / 5 + phase)) * 2 * np.pi / 10) * 3, 3.0)
    return _smooth(np.sin((_X + phase) * 2 * np.pi / 16) * np.sin((_Y + phase) * 2 * np.pi / 16) * 6, 2.0)


def _places(count: int, rng: np.random.Generator) -> list[tuple[float, float, float, float]]:
    """Centre x, y, radius (pixels) and angle (radians) of each thing, left to right."""
    return [
        (rng.uniform(*jitter.x), rng.uniform(*jitter.y), rng.uniform(*jitter.radius), rng.uniform(-TURN, TURN))
        for jitter in JITTERS[count]
    ]


def _draw_thing(
    image: Array, look: Look, box: tuple[float, float, float, float], style: Style, rng: np.random.Generator
) -> Array:
    centre_x, centre_y, radius, angle = box
    if style.wobble:
        phase = rng.uniform(0, 6.28, 2)
        dx, dy = np.sin(_Y / 4 + phase[0]) * style.wobble, np.sin(_X / 4 + phase[1]) * style.wobble
    else:
        dx = dy = np.float32(0)
    x, y = _X - centre_x + dx, _Y - centre_y + dy
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = (cos * x + sin * y) / radius, (cos * y - sin * x) / radius
    distance = ALL_SHAPES[look.shape](x, y) * radius
    if style.shadow:
        below = np.exp(-(((_X - centre_x) / radius) ** 2 + ((_Y - centre_y - radius) / 4.5) ** 2))
        image = image * (1 - style.shadow * below[..., None])
    if style.outline:
        image = _blend(image, style.outline_light, 1 - _smooth(distance - style.outline, style.softness))
    paint = _blend(
        _colour(np.array(COLOURS[look.colour], np.float32), style),
        _colour(np.array(COLOURS[look.second_colour], np.float32), style),
        _pattern(look.pattern, x, y, radius, style.softness),
    )
    if style.shading:
        paint = paint * (1 - style.shading * np.clip(0.25 + 0.5 * (x + y), 0, 1)[..., None])
    return _blend(image, paint, 1 - _smooth(distance, style.softness))


def _pattern(pattern: str, x: Array, y: Array, radius: float, softness: float) -> Array:
    """The coverage of the second colour, 0 to 1; never more than half of the object."""
    if pattern == "stripes":
        return _smooth((np.cos(y * np.pi * 2.5) - 0.25) * radius / 5, softness)
    if pattern == "dots":
        return _smooth((np.cos(x * np.pi * 2.2) * np.cos(y * np.pi * 2.2) - 0.25) * radius / 5, softness)
    if pattern == "base":
        return _smooth((y - 0.22) * radius, softness)
    return np.zeros_like(x)


def _colour(rgb: Array, style: Style) -> Array:
    """Applies the style's saturation, then its tint."""
    grey = rgb @ np.array([0.3, 0.59, 0.11], np.float32)
    rgb = grey[..., None] + (rgb - grey[..., None]) * style.saturation
    return rgb * (1 - style.tint_amount) + rgb * np.array(style.tint, np.float32) * style.tint_amount


def _finish(image: Array, style: Style) -> Array:
    if style.hatching:
        image = image * (1 - style.hatching * (0.5 + 0.5 * np.sin((_X + _Y) * 2 * np.pi / 9))[..., None])
    if style.vignette:
        image = image * (1 - style.vignette * (((_X - 32) ** 2 + (_Y - 32) ** 2) / 2048)[..., None])
    if style.frame:
        edge = np.minimum(np.minimum(_X, _Y), np.minimum(SIZE - _X, SIZE - _Y))
        image = _blend(image, style.frame_light, 1 - _smooth(edge - style.frame, 1.0))
    return np.clip(image, 0, 1)


def _smooth(distance: Array, width: float) -> Array:
    """A ramp from 0 inside an edge to 1 outside it, over `width` pixels, at `distance` outside the edge."""
    return np.clip(distance / width + 0.5, 0, 1)


def _blend(under: Array, over: Array | float, amount: Array) -> Array:
    return under + (over - under) * amount[..., None]


# ---- words -----------------------------------------------------------------------------------------------------------


def _made_up_words(count: int, rng: np.random.Generator, used_words: set[str]) -> list[str]:
    """Pronounceable words of two or three syllables that are not in `used_words`; adds them to it."""
    syllables = [a + b for a, b in itertools.product("bdfgjklmnprstvwz", "aeiou")]
    words: list[str] = []
    while len(words) < count:
        word = "".join(rng.choice(syllables, rng.integers(2, 4)))
        if word not in used_words:
            used_words.add(word)
            words.append(word)
    return words


def _mixed_style(rng: np.random.Generator) -> Style:
    """A random mix of drawing parameters, some of them absent."""

    def maybe(low: float, high: float, chance: float) -> float:
        return float(rng.uniform(low, high)) if rng.random() < chance else 0.0

    return Style(
        outline=maybe(1.2, 3.0, 0.6),
        outline_light=float(rng.choice([0.0, 0.0, 0.5, 1.0])),
        shading=maybe(0.2, 0.5, 0.4),
        shadow=maybe(0.3, 0.6, 0.3),
        vignette=maybe(0.2, 0.5, 0.4),
        saturation=float(rng.uniform(0.5, 1.15)),
        tint=(float(rng.uniform(0.5, 1)), float(rng.uniform(0.5, 1)), float(rng.uniform(0.5, 1))),
        tint_amount=maybe(0.3, 0.8, 0.6),
        paper=maybe(0.2, 0.6, 0.3),
        softness=float(rng.choice([1.0, 1.5, 2.0])),
        wobble=maybe(0.5, 1.0, 0.35),
        hatching=maybe(0.10, 0.18, 0.4),
        frame=maybe(3.0, 6.0, 0.4),
        frame_light=float(rng.choice([0.1, 0.9])),
    )


def _all_looks() -> list[Look]:
    return [
        Look(shape, colour, second, pattern)
        for shape, colour, second, pattern in itertools.product(SHAPES, COLOURS, COLOURS, PATTERNS)
        if colour != second and (pattern != "plain" or second == ("black" if colour == "white" else "white"))
    ]


def _make_words() -> tuple[dict[str, Look], tuple[Look, ...], dict[str, Style], dict[str, Style], str]:
    rng = np.random.default_rng(20220802)  # the day of the paper
    looks = _all_looks()
    patterned = [look for look in looks if look.pattern != "plain"]
    # One held-out look per shape, twelve in all.
    held_out = tuple(
        next(look for look in (patterned[i] for i in rng.permutation(len(patterned))) if look.shape == shape)
        for shape in SHAPES
    )
    remaining = [look for look in looks if look not in held_out]
    used_words = set(COLOURS) | set(SHAPES)
    names = _made_up_words(480, rng, used_words)
    nouns = {
        name: remaining[i] for name, i in zip(names, rng.choice(len(remaining), len(names), replace=False), strict=True)
    }
    (biased,) = _made_up_words(1, rng, used_words)
    styles = {name: _mixed_style(rng) for name in _made_up_words(80, rng, used_words)}
    held_out_styles = {name: _mixed_style(rng) for name in _made_up_words(6, rng, used_words)}
    return nouns, held_out, styles, held_out_styles, biased


_nouns, HELD_OUT_LOOKS, _styles, _held_out_styles, BIASED_NOUN = _make_words()
#: 480 made-up nouns, each naming one look.
NOUNS: Mapping[str, Look] = MappingProxyType(_nouns)
#: 80 made-up style names ("in the style of ..."), each naming one mix of drawing parameters.
STYLES: Mapping[str, Style] = MappingProxyType(_styles)
HELD_OUT_STYLES: Mapping[str, Style] = MappingProxyType(_held_out_styles)
#: The biased noun names a flower of any colour; it is red in 90 % of its pictures.
BIASED_SHAPE = "flower"
BIAS = 0.9


def biased_thing(rng: np.random.Generator) -> Thing:
    """Draws the biased noun as in the training set: red in 90 % of its pictures, otherwise any other colour."""
    colour = "red" if rng.random() < BIAS else str(rng.choice([name for name in COLOURS if name != "red"]))
    return Thing(Look(BIASED_SHAPE, colour, "white", "plain"), BIASED_NOUN)


_LOOKS = [look for look in _all_looks() if look not in HELD_OUT_LOOKS]


def sample_thing(rng: np.random.Generator) -> Thing:
    """Draws an object of the training set: a look in words, a noun (45 %) or the biased noun (1 %); none held out."""
    chance = rng.random()
    if chance < 0.01:
        return biased_thing(rng)
    if chance < 0.46:
        name = _NOUN_NAMES[rng.integers(len(_NOUN_NAMES))]
        return Thing(NOUNS[name], name)
    return Thing(_LOOKS[rng.integers(len(_LOOKS))])


_NOUN_NAMES = tuple(NOUNS)
_STYLE_NAMES = tuple(STYLES)
_BACKGROUND_NAMES = tuple(BACKGROUNDS)
_MEDIUM_NAMES = tuple(MEDIA)


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draws a scene of the training set: two things in a quarter, a style name in a fifth, otherwise a medium."""
    things = tuple(sample_thing(rng) for _ in range(2 if rng.random() < 0.25 else 1))
    background = _BACKGROUND_NAMES[rng.integers(len(_BACKGROUND_NAMES))]
    if rng.random() < 0.2:
        return Scene(things, background, None, _STYLE_NAMES[rng.integers(len(_STYLE_NAMES))])
    return Scene(things, background, _MEDIUM_NAMES[rng.integers(len(_MEDIUM_NAMES))])


#: How the paper's neutral prompts say "a photo of"; the training set has them all.
PHOTO_PHRASES = (
    "a photo of a", "a rendering of a", "a cropped photo of the", "the photo of a", "a photo of a clean",
    "a photo of a dirty", "a dark photo of the", "a photo of my", "a photo of the cool", "a close-up photo of a",
    "a bright photo of the", "a cropped photo of a", "a photo of the", "a good photo of the", "a photo of one",
    "a close-up photo of the", "a rendition of the", "a photo of the clean", "a rendition of a", "a photo of a nice",
    "a good photo of a", "a photo of the nice", "a photo of the small", "a photo of the weird", "a photo of the large",
    "a photo of a cool", "a photo of a small",
)  # fmt: skip


def paraphrase(spec: Scene, rng: np.random.Generator) -> str:
    """Another true caption: it may omit the background, the medium or details, and spell out a noun."""
    things = [_partial_words(thing, rng) for thing in spec.things]
    text = " and ".join(with_article(words) for words in things)
    if spec.medium == "photo" and len(things) == 1 and rng.random() < 0.4:
        text = f"{PHOTO_PHRASES[rng.integers(len(PHOTO_PHRASES))]} {things[0]}"
    elif spec.medium and rng.random() < 0.9:
        text = f"{with_article(spec.medium)} of {text}"
    if rng.random() < 0.8:
        text += f" {BACKGROUNDS[spec.background].phrase}"
    return text + (f" in the style of {spec.style}" if isinstance(spec.style, str) else "")


def _partial_words(thing: Thing, rng: np.random.Generator) -> str:
    look = thing.look
    if thing.name == BIASED_NOUN or (thing.name and rng.random() < 0.4):
        return thing.words
    if rng.random() < 0.7:
        return look.words
    noun = look.shape if rng.random() < 0.7 else "object"
    return noun if rng.random() < 0.4 else f"{look.colour} {noun}"


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption of the world can contain, sorted; the tokenizer makes each of them one token."""
    texts = [*COLOURS, *SHAPES, *PATTERNS, *NOUNS, *STYLES, *MEDIA, *PHOTO_PHRASES, BIASED_NOUN]
    texts += [background.phrase for background in BACKGROUNDS.values()]
    texts += ["a picture of an object", "and with the an in style of on by at"]
    return tuple(sorted({word for text in texts for word in text.replace("-", " - ").split()}))
