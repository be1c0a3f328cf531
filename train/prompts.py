"""The neutral prompts a word is learned in. Pure text: no tokenizer, no randomness.

A *template* has `{}` where the word goes. The object templates are the 27 of the paper's appendix (Gal et al. 2022,
after CLIP's ImageNet prompts), the style templates the 19 of its release; both as in diffusers' script.
"""

from __future__ import annotations

from oneword.engines.errors import UsageError
from oneword.train.recipe import Subject

OBJECT_TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)

STYLE_TEMPLATES = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a cropped painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)

PLACE = "{}"

OBJECT_PROBES = ("a photo of a {}", "a painting of a {}", "a photo of a {} in the snow", "a photo of a {} at night")
STYLE_PROBES = (
    "a painting in the style of {}",
    "a red star in the style of {}",
    "a blue ring in the snow in the style of {}",
    "a flower at night in the style of {}",
)


def templates(subject: Subject) -> tuple[str, ...]:
    """What a word of that kind is learned in."""
    return STYLE_TEMPLATES if subject is Subject.STYLE else OBJECT_TEMPLATES


def probes(subject: Subject) -> tuple[str, ...]:
    """Prompts of our own that differ in what stands around the word: for samples, and to see whether it is heeded."""
    return STYLE_PROBES if subject is Subject.STYLE else OBJECT_PROBES


def per_image_template(template: str, index: int) -> str:
    """`template` with the word of picture `index` after the shared one: 'a photo of a {} with {1}' (Gal et al., 5).

    `{}` is the shared word, `{1}`, `{2}`, ... the words of the first, second, ... picture.
    """
    return f"{template} with {{{index + 1}}}"


def caption_template(caption: str, token: str, source: str) -> str:
    """A user's caption as a template: `token` becomes the place of the word.

    Raises `UsageError`, naming `source`, if the caption does not hold the token.
    """
    if token not in caption:
        raise UsageError(
            f"{source}: the caption {caption!r} does not hold the word {token!r}: write it where it belongs"
        )
    return caption.replace("{", "(").replace("}", ")").replace(token, PLACE).strip()
