"""Learned words and their files: `Concept`, `save_concept`, `load_concept`.

A file is safetensors, at most 1 MiB, and is parsed by this module itself: the header's length is checked before the
header is parsed, and the header before any tensor is read; nothing is ever unpickled. Not covered: pickled files
(`.pt`, `.bin`), A1111 pictures and LoRA bundles, which `ti-concept` reads with `oneword.runtime.layouts`.

    one encoder     {token: [n, D]}                             read by diffusers, A1111 and ComfyUI
    two encoders    {"clip_l": [n, 768], "clip_g": [n, 1280]}   read by all three for SDXL
    with T5         also or instead {"t5xxl": [n, 4096]}        read by ComfyUI for SD3 and FLUX.1
"""

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from oneword.engines.errors import ConceptError
from oneword.engines.files import write_whole

Vectors: TypeAlias = npt.NDArray[np.float32]

MAX_FILE_BYTES: Final = 1 << 20
MAX_HEADER_BYTES: Final = 64 << 10
MAX_VECTORS: Final = 75  # CLIP's 77 positions without BOS and EOS
MAX_TOKEN_LENGTH: Final = 64
MAX_TEXT: Final = 200  # characters
MAX_NORM: Final = 300.0  # norms are about 0.4 in a vocabulary and can exceed 20 when learned, never this
MAX_T5_NORM: Final = 30_000.0  # T5 starts from rows of norm sqrt(D) = 64
ENCODER_KEYS: Final = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
"""The name of each encoder's vectors in a file for several encoders. ComfyUI reads no other name for T5."""

KEY_ENCODERS: Final = {key: encoder for encoder, key in ENCODER_KEYS.items()} | {
    "t5": "text_encoder_3",  # OneTrainer, diffusers
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
_CLIP_L_WIDTH: Final = 768
_FILE_NAME_KEYS: Final = ("emb_params", "emp_params")  # kohya, OneTrainer: the file's name is the token
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
}
_TOKEN: Final = re.compile(r"<[\w.+*@#!~&$%^=-]+>|[\w.+*@#!~&$%^=-]+")


@dataclass(frozen=True)
class Concept:
    """A learned word: `vectors[encoder]` is float32 [n, D], one row per token id of the word.

    Raises ConceptError if the word is not safe to serve: token, shape, count, finiteness, norm.
    """

    token: str
    vectors: Mapping[str, Vectors]
    provenance: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        check_token(self.token)
        if not self.vectors:
            raise ConceptError(f"{self.token!r} has no vectors: a word is 1 to {MAX_VECTORS} vectors for an encoder")
        checked = {encoder: _checked(self.token, encoder, value) for encoder, value in self.vectors.items()}
        object.__setattr__(self, "vectors", MappingProxyType(checked))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    @property
    def text(self) -> str:
        """What stands for the word in the prompt of an encoder for which it has no vectors: `text` in its file's
        metadata, or `init`, the class word that learning started from, unless that was `random` or a file; else
        nothing."""
        init = self.provenance.get("init", "")
        return self.provenance.get("text", "" if init == "random" or "." in init else init)[:MAX_TEXT]

    @cached_property
    def identity(self) -> str:
        """Hex sha256 of all that a prompt depends on: the encoders, sorted, each with its shape and float32 rows."""
        digest = hashlib.sha256()
        for encoder, vectors in sorted(self.vectors.items()):
            digest.update(f"{encoder} {list(vectors.shape)}\n".encode())
            digest.update(np.ascontiguousarray(vectors, "<f4").tobytes())
        return digest.hexdigest()


def save_concept(concept: Concept, path: str | os.PathLike[str]) -> None:
    """Writes the word's file, whole or not at all; provenance becomes the file's metadata.

    Raises ConceptError for a word that `load_concept` would refuse, FileError if it cannot be written.
    """
    write_whole(Path(path), concept_bytes(concept, str(path)))


def concept_bytes(concept: Concept, name: str = "the file") -> bytes:
    """The content of the word's file. `name` is the file's, for errors.

    Raises ConceptError for a word that `load_concept` would refuse.
    """
    if set(concept.vectors) == {"text_encoder"}:
        tensors = {concept.token: concept.vectors["text_encoder"]}
    else:
        tensors = {_file_key(encoder): value for encoder, value in concept.vectors.items()}
    metadata = {"format": "pt", **concept.provenance, "token": concept.token}
    data = safetensors.numpy.save({key: np.ascontiguousarray(value) for key, value in tensors.items()}, metadata)
    concept_of(*read_safetensors(data, name), name)  # never write what load_concept would refuse
    return data


def load_concept(path: str | os.PathLike[str]) -> Concept:
    """Reads one word from any tool's safetensors file, with all checks. Raises ConceptError."""
    name = str(path)
    return concept_of(*read_safetensors(read_limited(Path(path)), name), name)


def concept_of(tensors: Mapping[str, Vectors], metadata: Mapping[str, str], name: str) -> Concept:
    """The word in a file's tensors. `name` is the file's name, and names the word if the file does not."""
    provenance = {key: value for key, value in metadata.items() if key not in ("format", "token")}
    stem = token_from_stem(name)
    if any(key in KEY_ENCODERS for key in tensors):
        vectors = {_encoder_of(key, tensors): tensors[key] for key in tensors if key in KEY_ENCODERS}
        if any(key not in KEY_ENCODERS and key.removesuffix("_out") not in KEY_ENCODERS for key in tensors):
            raise ConceptError(f"{name} mixes {_listed(tensors)}: allowed beside keys of encoders are their _out rows")
        return Concept(metadata.get("token", stem), vectors, provenance)
    words = {key: value for key, value in tensors.items() if key not in ("emb_params_out", "emp_params_out")}
    if len(words) != 1:
        raise ConceptError(
            f"{name} holds {len(words)} tensors ({_listed(words)}), a word's file holds one: run ti-concept convert"
        )
    [(key, value)] = words.items()
    token = metadata.get("token", stem) if key in _FILE_NAME_KEYS else key
    return Concept(token, {"text_encoder": value}, provenance)


def check_token(token: str) -> None:
    """Raises ConceptError for a token that could escape a folder, break a prompt or mislead a reader."""
    if "/" in token or "\\" in token or ".." in token:
        raise ConceptError(f"token {token[:80]!r} looks like a path: rename the word, for example <toy>")
    if len(token) > MAX_TOKEN_LENGTH:
        raise ConceptError(f"token {token[:20]!r}... has {len(token)} characters, allowed are {MAX_TOKEN_LENGTH}")
    if not _TOKEN.fullmatch(token) or unicodedata.normalize("NFC", token) != token:
        raise ConceptError(
            f"token {token!r} is not safe in a prompt: allowed are letters, digits and . + * @ # ! ~ & $ % ^ = - _ , "
            "bare or in <>, for example <toy>"
        )


def token_from_stem(name: str) -> str:
    """A token from a file's name, without folder and suffix; characters that a token may not have become _."""
    stem = unicodedata.normalize("NFC", Path(name).stem)
    bare = re.sub(r"[^\w.+*@#!~&$%^=-]+|\.{2,}", "_", stem).strip("_")[: MAX_TOKEN_LENGTH - 2]
    return f"<{bare}>" if stem.startswith("<") and stem.endswith(">") else bare or "word"


def read_limited(path: Path) -> bytes:
    """The file's bytes, at most MAX_FILE_BYTES. Raises ConceptError if it is missing, unreadable or too large."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ConceptError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConceptError(f"{path} has {max(size, len(data))} bytes, allowed are {MAX_FILE_BYTES} (1 MiB)")
    return data


def read_safetensors(data: bytes, name: str) -> tuple[dict[str, Vectors], dict[str, str]]:
    """Tensors (as float32) and metadata of a safetensors file, read strictly. Raises ConceptError.

    Source: the format documented in huggingface/safetensors. Stricter than that library: floats only, at most 2-D, no
    duplicate keys, no gaps, no empty tensors, no keys that look like paths.
    """
    header, start = _header(data, name)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConceptError(f"{name}: __metadata__ must map names to strings")
    tensors: dict[str, Vectors] = {}
    regions: list[tuple[int, int]] = []
    for key, entry in header.items():
        if "/" in key or "\\" in key or ".." in key:
            raise ConceptError(f"{name}: key {key[:80]!r} looks like a path, allowed is a word such as <toy>")
        tensors[key], region = parse_tensor(memoryview(data)[start:], key, entry, name)
        regions.append(region)
    end = 0
    for first, last in sorted(regions):
        if first != end:
            raise ConceptError(f"{name}: tensors overlap or leave gaps in the file's data at byte {first}")
        end = last
    if end != len(data) - start:
        raise ConceptError(f"{name}: {len(data) - start - end} bytes after the last tensor")
    return tensors, metadata


def _header(data: bytes, name: str) -> tuple[dict[str, Any], int]:
    if len(data) < 8:
        raise ConceptError(f"{name} has {len(data)} bytes, no safetensors file: convert .pt and .bin with ti-concept")
    length = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" and (data[:4] == b"PK\x03\x04" or data[:1] == b"\x80"):
        raise ConceptError(f"{name} is a pickle (.pt, .bin), allowed is safetensors: run ti-concept convert first")
    if length > MAX_HEADER_BYTES:
        raise ConceptError(f"{name} has a header of {length} bytes, allowed are {MAX_HEADER_BYTES} (64 KiB)")
    if 8 + length > len(data):
        raise ConceptError(f"{name} is truncated: its header of {length} bytes does not fit into {len(data)} bytes")
    return parse_header(data[8 : 8 + length], name), 8 + length


def parse_header(text: bytes, name: str) -> dict[str, Any]:
    """A safetensors header: a JSON object with unique keys. Raises ConceptError."""
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique_pairs)
    except _DuplicateKeyError as error:
        raise ConceptError(f"{name}: key {str(error)[:80]!r} appears twice in the header") from None
    except (ValueError, RecursionError):
        raise ConceptError(f"{name}: the header is not JSON, so this is not a safetensors file") from None
    if not isinstance(header, dict):
        raise ConceptError(f"{name}: the header is {type(header).__name__}, not a table of tensors")
    return header


class _DuplicateKeyError(ValueError):
    pass


def _unique_pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result


def parse_tensor(data: memoryview, key: str, entry: Any, name: str) -> tuple[Vectors, tuple[int, int]]:
    """The tensor that a header's entry describes, as float32, and its range of bytes. Raises ConceptError."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(first), int(last)]} if len(entry) == 3:
            pass
        case _:
            raise ConceptError(f"{name}: {key[:80]!r} is not described by dtype, shape and data_offsets")
    if dtype not in _DTYPES:
        raise ConceptError(f"{name}: {key[:80]!r} is {dtype}, allowed are {', '.join(_DTYPES)}")
    sizes = [size for size in shape if type(size) is int and 0 < size <= MAX_FILE_BYTES]
    if len(sizes) != len(shape) or not 1 <= len(shape) <= 2:
        raise ConceptError(f"{name}: {key[:80]!r} has shape {shape}, a word is [n, D], 1 <= n <= {MAX_VECTORS}"[:300])
    if not 0 <= first <= last <= len(data) or last - first != math.prod(sizes) * _DTYPES[dtype].itemsize:
        raise ConceptError(f"{name}: {key[:80]!r}, {dtype} {shape}, does not fill bytes {first} to {last}"[:300])
    raw = np.frombuffer(data[first:last], _DTYPES[dtype]).reshape(sizes)
    value = (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else _narrowed(raw)
    return value, (first, last)


def _narrowed(value: npt.NDArray[Any]) -> Vectors:
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which _checked reports
        return value.astype(np.float32)


def _checked(token: str, encoder: str, value: npt.ArrayLike) -> Vectors:
    name, largest = f"{token!r} ({encoder})", MAX_T5_NORM if encoder == "text_encoder_3" else MAX_NORM
    vectors = _narrowed(np.asarray(value))
    if vectors.ndim == 1:  # diffusers once wrote one vector as [D]
        vectors = vectors[None]
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ConceptError(f"{name} has shape {list(vectors.shape)}, a word is [n, D]")
    if not 1 <= len(vectors) <= MAX_VECTORS:
        raise ConceptError(f"{name} has {len(vectors)} vectors, allowed are 1 to {MAX_VECTORS}")
    if not np.isfinite(vectors).all():
        raise ConceptError(f"{name} holds NaN or infinity: its training failed, train it again")
    norm = float(np.linalg.norm(vectors.astype(np.float64), axis=1).max())
    if not 0 < norm <= largest:
        raise ConceptError(f"{name} has norm {norm:.3g}, a plausible vector has one above 0 and at most {largest:g}")
    vectors.flags.writeable = False
    return vectors


def _encoder_of(key: str, tensors: Mapping[str, Vectors]) -> str:
    """The encoder of a file's key. Older files of OneTrainer for FLUX.1 have CLIP-L's vectors as clip_g."""
    if key == "clip_g" and "clip_l" not in tensors and tensors[key].shape[-1] == _CLIP_L_WIDTH:
        return "text_encoder"
    return KEY_ENCODERS[key]


def _file_key(encoder: str) -> str:
    if encoder not in ENCODER_KEYS:
        raise ConceptError(f"encoder {encoder!r} has no key in a file, allowed are {', '.join(ENCODER_KEYS)}")
    return ENCODER_KEYS[encoder]


def _listed(keys: Mapping[str, object]) -> str:
    return ", ".join(repr(key[:40]) for key in list(keys)[:5]) + (", ..." if len(keys) > 5 else "")
