"""The judge: a CLIP model that embeds pictures and texts in one space. It computes no scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from oneword.engines.errors import FileError, one_line
from oneword.train.evaluation.scores import Embeddings, unit


class Judge:
    """A CLIP model from a directory: maps pictures and texts to unit vectors in one space.

    Pictures are resized as for CLIP and normalised as the preprocessor config says. The tokenizer may be that of the
    diffusers directory that contains the judge. Raises `FileError` if the directory has no CLIP model.
    """

    def __init__(self, folder: Path) -> None:
        tokenizer = next((f for f in (folder, folder.parent / "tokenizer") if list(f.glob("tokenizer*.json"))), None)
        try:
            self.model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).float().eval()
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or folder, local_files_only=True)
            facts = preprocessor(folder)
        except (OSError, ValueError, KeyError) as error:
            raise FileError(
                f"{folder} has no CLIP model with a tokenizer ({one_line(error)}): give the directory of one"
            ) from error
        self.mean, self.std = (torch.tensor(facts[name])[:, None, None] for name in ("image_mean", "image_std"))
        self.side: int = self.model.config.vision_config.image_size

    @torch.no_grad()
    def pictures(self, pictures: Iterable[npt.NDArray[np.uint8]]) -> Embeddings:
        """Embeds N pictures, uint8 [H, W, 3] -> [N, P]."""
        resized = np.stack([self._sized(picture) for picture in pictures])
        pixels = (torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        states = [self.model.vision_model(pixel_values=part).pooler_output for part in pixels.split(64)]
        return unit(self.model.visual_projection(torch.cat(states)).numpy())

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Embeddings:
        """Embeds N texts -> [N, P]."""
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return unit(self.model.text_projection(self.model.text_model(input_ids=ids.input_ids).pooler_output).numpy())

    def _sized(self, picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resizes and crops as CLIP does: the shorter side to `side`, then the centre."""
        height, width, _ = picture.shape
        if (height, width) == (self.side, self.side):
            return picture
        shorter = min(height, width)
        size = (self.side * width // shorter, self.side * height // shorter)
        left, top = ((length - self.side) // 2 for length in size)
        sized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        return sized[top : top + self.side, left : left + self.side]


def preprocessor(folder: Path) -> Mapping[str, Any]:
    """`image_mean` and `image_std` of a CLIP directory, from either of the files that transformers writes."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if path.is_file():
            facts = json.loads(path.read_text())
            return facts[key] if key else facts
    raise FileError(f"{folder} has no preprocessor_config.json: add it, it says how to normalise pixels")
