"""How good a word is, as the paper scores it: likeness and editability, from pictures that the runtime makes.

Gal et al. 2022, section 5: likeness is the mean cosine in CLIP's space between 64 samples of "A photo of S*" and the
training pictures; editability is the cosine between the mean embedding of a prompt's 64 samples and the prompt's text
without S*, averaged over prompts. The released scorer averages the samples' cosines instead (`Formula.RELEASE`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from oneword.engines.errors import FileError
from oneword.runtime.batch import Failed, PictureDone
from oneword.runtime.generate import generate
from oneword.runtime.model import Model
from oneword.runtime.request import Request
from oneword.runtime.samplers import Sampler

Pictures = npt.NDArray[np.uint8]  # [N, H, W, 3]
Embeddings = npt.NDArray[np.float32]  # [N, P], of length 1

SAMPLES = 64
STEPS = 50
PLACE = "{}"
LIKENESS_PROMPT = "a photo of a {}"
STYLE_LIKENESS_PROMPT = "a picture in the style of {}"
TRAINING, WORDLESS = "training pictures", "prompt without the word"  # the bounds

PAPER_PROMPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "background": ("a photo of a {} on the moon", "a photo of a {} on the beach", "a photo of a {} in the snow"),
        "style": ("an oil painting of a {}", "a watercolor painting of a {}", "a drawing of a {}"),
        "composition": ("a photo of a {} on a table", "a photo of Elmo holding a {}", "a photo of a {} and a dog"),
    }
)
MINIATURE_PROMPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "background": ("a photo of a {} in the snow", "a photo of a {} at night", "a photo of a {} in the desert"),
        "style": ("a drawing of a {}", "an icon of a {}", "a painting of a {}"),
        "composition": ("a photo of a {} and a blue ring", "a photo of a red star and a {}"),
    }
)
PAPER_STYLE_PROMPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "object": ("a cat in the style of {}", "a house in the style of {}", "a sailing boat in the style of {}"),
        "background": ("the moon in the style of {}", "a beach in the style of {}", "a city in the style of {}"),
    }
)
MINIATURE_STYLE_PROMPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "object": (
            "a red star in the style of {}",
            "a blue ring in the style of {}",
            "a green heart in the style of {}",
        ),
        "background": ("a white moon at night in the style of {}", "a pink arrow in the snow in the style of {}"),
    }
)


class Formula(Enum):
    """Editability of a prompt: cosine of its samples' mean embedding (paper), or mean of their cosines (its code)."""

    PAPER = "paper"
    RELEASE = "release"


@dataclass(frozen=True)
class Scores:
    """One word's scores; `editability` by prompt group. All are cosines."""

    likeness: float
    editability: Mapping[str, float]

    @property
    def mean_editability(self) -> float:
        """Over the groups."""
        return float(np.mean(list(self.editability.values())))


class Judge:
    """A CLIP model from a directory: pictures and texts to unit vectors of one space.

    Pictures are resized and normalised as its preprocessor says; its tokenizer may be that of the diffusers directory
    it travels in. Raises `FileError` where the directory holds no CLIP model.
    """

    def __init__(self, folder: Path) -> None:
        tokenizer = next((f for f in (folder, folder.parent / "tokenizer") if list(f.glob("tokenizer*.json"))), None)
        try:
            self.model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).float().eval()
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or folder, local_files_only=True)
            facts = preprocessor(folder)
        except (OSError, ValueError, KeyError) as error:
            raise FileError(f"{folder} is no CLIP model with a tokenizer: {str(error).splitlines()[0]}") from error
        self.mean, self.std = (torch.tensor(facts[name])[:, None, None] for name in ("image_mean", "image_std"))
        self.side: int = self.model.config.vision_config.image_size

    @torch.no_grad()
    def pictures(self, pictures: Iterable[npt.NDArray[np.uint8]]) -> Embeddings:
        """N pictures, uint8 [H, W, 3] -> [N, P]."""
        sized = np.stack([self._sized(picture) for picture in pictures])
        pixels = (torch.from_numpy(sized).permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        states = [self.model.vision_model(pixel_values=part).pooler_output for part in pixels.split(64)]
        return unit(self.model.visual_projection(torch.cat(states)).numpy())

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Embeddings:
        """N texts -> [N, P]."""
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return unit(self.model.text_projection(self.model.text_model(input_ids=ids.input_ids).pooler_output).numpy())

    def _sized(self, picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """CLIP's: the shorter side to size, then the centre."""
        height, width, _ = picture.shape
        if (height, width) == (self.side, self.side):
            return picture
        scale = self.side / min(height, width)
        size = (int(width * scale), int(height * scale))
        left, top = ((length - self.side) // 2 for length in size)
        sized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        return sized[top : top + self.side, left : left + self.side]


def preprocessor(folder: Path) -> Mapping[str, Any]:
    """`image_mean` and `image_std` of a CLIP directory, from either of the files that transformers has written."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if path.is_file():
            facts = json.loads(path.read_text())
            return facts[key] if key else facts
    raise FileError(f"{folder} has no preprocessor_config.json: without it nobody knows what pixels this model takes")


def evaluate(
    model: Model,
    judge: Judge,
    token: str,
    training: Pictures,
    prompts: Mapping[str, Sequence[str]] = MINIATURE_PROMPTS,
    *,
    samples: int = SAMPLES,
    steps: int = STEPS,
    seed: int = 0,
    formula: Formula = Formula.PAPER,
    likeness_prompt: str = LIKENESS_PROMPT,
) -> tuple[Scores, dict[str, Pictures]]:
    """The scores of a word that `model` has loaded, and every prompt's samples [samples, H, W, 3]."""
    flat = [likeness_prompt, *(prompt for group in prompts.values() for prompt in group)]
    pictures = dict(
        zip(flat, sample(model, [p.replace(PLACE, token) for p in flat], samples, steps, seed), strict=True)
    )
    embedded = {prompt: judge.pictures(some) for prompt, some in pictures.items()}
    scores = Scores(
        likeness(embedded[likeness_prompt], judge.pictures(training)),
        _editabilities(embedded, _texts(judge, prompts), prompts, formula),
    )
    return scores, pictures


def bounds(
    model: Model,
    judge: Judge,
    training: Sequence[Pictures],
    prompts: Mapping[str, Sequence[str]],
    *,
    samples: int = SAMPLES,
    steps: int = STEPS,
    seed: int = 0,
    formula: Formula = Formula.PAPER,
    likeness_prompt: str = LIKENESS_PROMPT,
) -> list[dict[str, Scores]]:
    """The paper's two ends for each set of training pictures [N, H, W, 3].

    The pictures themselves as if they were every prompt's samples (left out where there is only one), and the prompts
    without the word.
    """
    texts = _texts(judge, prompts)
    bare = {prompt: without_word(prompt) for prompt in [likeness_prompt, *texts]}
    drawn = sample(model, list(bare.values()), samples, steps, seed)
    wordless = {prompt: judge.pictures(some) for prompt, some in zip(bare, drawn, strict=True)}
    found = []
    for pictures in training:
        seen = judge.pictures(pictures)
        ends = {WORDLESS: (likeness(wordless[likeness_prompt], seen), wordless)}
        if len(seen) > 1:
            ends[TRAINING] = (likeness_within(seen), dict.fromkeys(texts, seen))
        found.append(
            {name: Scores(like, _editabilities(shown, texts, prompts, formula)) for name, (like, shown) in ends.items()}
        )
    return found


def sample(
    model: Model, prompts: Sequence[str], count: int, steps: int, seed: int, guidance_scale: float | None = None
) -> list[Pictures]:
    """`count` pictures of each prompt by DDIM, with the seeds seed, seed + 1, ... Raises what made one of them fail."""
    how: dict[str, Any] = {"num_images": count, "steps": steps, "guidance_scale": guidance_scale}
    requests = [Request(prompt, seed=seed, sampler=Sampler.DDIM, **how) for prompt in prompts]
    done: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}
    for event in generate(model, requests, listen=False):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, PictureDone):
            done[event.id, event.index] = event.image
    return [np.stack([done[number, index] for index in range(count)]) for number in range(len(prompts))]


def likeness(samples: Embeddings, training: Embeddings) -> float:
    """Mean pairwise cosine of samples [S, P] with training pictures [N, P]."""
    return float((samples @ training.T).mean())


def likeness_within(training: Embeddings) -> float:
    """The upper bound: the training pictures' likeness to one another, none to itself. NaN for one picture."""
    cosines = training @ training.T
    return float(cosines[~np.eye(len(training), dtype=bool)].mean()) if len(training) > 1 else float("nan")


def editability(samples: Embeddings, text: Embeddings, formula: Formula = Formula.PAPER) -> float:
    """How far a prompt's samples [S, P] show what its text [P] without the word says."""
    if formula is Formula.RELEASE:
        return float((samples @ text).mean())
    return float(unit(samples.mean(0, keepdims=True))[0] @ text)


def _texts(judge: Judge, prompts: Mapping[str, Sequence[str]]) -> dict[str, Embeddings]:
    """Every prompt's text without the word, [P]."""
    return {prompt: judge.texts([without_word(prompt)])[0] for group in prompts.values() for prompt in group}


def _editabilities(
    samples: Mapping[str, Embeddings],
    texts: Mapping[str, Embeddings],
    prompts: Mapping[str, Sequence[str]],
    formula: Formula,
) -> dict[str, float]:
    """The mean of each group."""
    return {
        name: float(np.mean([editability(samples[prompt], texts[prompt], formula) for prompt in group]))
        for name, group in prompts.items()
    }


def without_word(prompt: str) -> str:
    """A prompt's text without the word, as in the paper: 'a photo of a {} in the snow' -> 'a photo of in the snow'."""
    words = prompt.replace(f" in the style of {PLACE}", " ").replace(f"a {PLACE}", " ").replace(PLACE, " ").split()
    return " ".join(words)


def unit(vectors: npt.NDArray[np.float32]) -> Embeddings:
    """Rows of length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
