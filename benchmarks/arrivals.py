"""Mixed requests and their arrival times, deterministic per seed. No models, engines or clocks.

No two requests are alike. They differ in prompt, learned word, negative prompt, guidance, sampler, steps (4 to 50,
log-uniform), number of pictures (1, 2 or 4) and seed; a quarter of them are masked edits. Every prompt fits into one
chunk. A request has guidance on all of its steps or on none, so that its work is known in advance.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SAMPLERS = ("ddim", "ddpm", "euler", "euler-a", "dpmpp-2m", "dpmpp-2m-karras", "dpmpp-2m-sde", "lcm")
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "black")
PLACES = ("in the snow", "in the forest", "on the beach", "at sunset", "on a brick wall")
NEGATIVES = ("a red ring", "a drawing", "a blue star at sunset")
WORDS = 8
STEPS = (4, 50)

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, eq=False)
class Order:
    """The keyword arguments of a `Request` (the sampler by name), and how much work it is."""

    settings: Mapping[str, Any]
    size: Size
    pictures: int
    steps: int
    """Steps that run for each picture: an edit skips the first ones."""
    branches: int
    """Branch evaluations per step: 2 with guidance, 1 without."""

    @property
    def work(self) -> int:
        """Branch evaluations of all pictures."""
        return self.pictures * self.steps * self.branches


def word(number: int) -> str:
    """The token of a learned word."""
    return f"<w{number}>"


def orders(seed: int, sizes: Sequence[Size]) -> Iterator[Order]:
    """Endless requests, cycling through the sizes."""
    rng = np.random.default_rng(seed)
    number = 0
    while True:
        yield _order(rng, number, sizes[number % len(sizes)])
        number += 1


def _order(rng: np.random.Generator, number: int, size: Size) -> Order:
    low, high = np.log(STEPS)
    steps = round(float(np.exp(rng.uniform(low, high))))
    guided = rng.random() < 0.7
    pictures = int(rng.choice([1, 2, 4], p=[0.7, 0.2, 0.1]))
    token = word(int(rng.integers(WORDS)))
    weight = 1 + (number % 1000) / 2000  # makes every prompt unique
    settings: dict[str, Any] = {
        "prompt": f"a photo of a ({rng.choice(COLOURS)}:{weight:.4f}) {token} {rng.choice(PLACES)}",
        "negative_prompt": str(rng.choice(NEGATIVES)) if guided and rng.random() < 0.5 else None,
        "seed": 1000 * number,
        "num_images": pictures,
        "steps": steps,
        "sampler": str(rng.choice(SAMPLERS)),
        "guidance_scale": round(float(rng.uniform(2, 9)), 2) if guided else 1.0,
        "size": size,
    }
    if rng.random() < 0.25:
        width, height = size
        strength = round(float(rng.uniform(0.3, 1)), 2)
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 :, : width // 2] = 255
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        settings |= {"image": image, "mask": mask, "strength": strength}
        steps = int(steps * strength)
    return Order(settings, size, pictures, steps, 2 if guided else 1)


def open_loop(source: Iterator[Order], work: float, seconds: float, seed: int) -> list[tuple[float, Order]]:
    """Requests that add up to at least `work`, each with its arrival time within `seconds`: a Poisson process
    conditioned on the number of its arrivals."""
    chosen: list[Order] = []
    while sum(order.work for order in chosen) < work:
        chosen.append(next(source))
    times = np.sort(np.random.default_rng(seed).uniform(0, seconds, len(chosen)))
    return list(zip(times.tolist(), chosen, strict=True))
