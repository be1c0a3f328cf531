"""Learned words and their files: `Concept`, `save_concept`, `load_concept`.

A file is safetensors, at most 1 MiB, and is parsed by this module itself: the header's length is checked before the
header is parsed, and the header before any tensor is read; nothing is ever unpickled. Not covered: pickled files
(`.pt`, `.bin`), A1111 pictures and LoRA bundles, which `ti-concept` reads with `oneword.runtime.layouts`.

    one encoder     {token: [n, D]}                             read by diffusers, A1111 and ComfyUI
    two encoders    {"clip_l": [n, 768], "clip_g": [n, 1280]}   read by all three for SDXL
    with T5         also or instead {"t5xxl": [n, 4096]}        read by ComfyUI for SD3 and FLUX.1
    with Qwen3      {"qwen3_4b": [n, 2560]}, {"qwen3_8b": [n, 4096]}      read by ComfyUI for FLUX.2
    precise         also {"<token>.out.<encoder>": [stages, layers, n, Dh]}, with `stages`, `layers`, `values_only` and
                    `encoder_layer.<encoder>` in the metadata
    XTI             also {"<token>.rows.<encoder>": [layers, n, D]}, or the 16 keys of kohya's files

Rows are written as float32; vectors for layers as float16 if that keeps every number, else as float32.
"""

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from oneword.engines.errors import ConceptError, OnewordError, UsageError, counted, one_of
from oneword.engines.files import write_whole

Vectors: TypeAlias = npt.NDArray[np.float32]

MAX_FILE_BYTES: Final = 1 << 20
MAX_HEADER_BYTES: Final = 64 << 10
MAX_VECTORS: Final = 75  # CLIP's 77 positions without BOS and EOS
MAX_TOKEN_LENGTH: Final = 64
MAX_TEXT: Final = 200  # characters
MAX_NORM: Final = 300.0  # norms are about 0.4 in a vocabulary and can exceed 20 when learned, never this
MAX_T5_NORM: Final = 30_000.0  # T5 starts from rows of norm sqrt(D) = 64
MAX_OUT_NORM: Final = 30_000.0  # of a vector in an encoder's output, where a few columns may be in the hundreds
MAX_STAGES: Final = 100
MAX_LAYERS: Final = 100  # SDXL has 11 cross-attention layers, SD 1 has 16; also of an encoder's own layers
ENCODER_KEYS: Final = {
    "text_encoder": "clip_l",
    "text_encoder_2": "clip_g",
    "text_encoder_3": "t5xxl",
    "text_encoder_qwen3": "qwen3_4b",
}
"""The name of each encoder's vectors in a file for several encoders. ComfyUI reads no other names for T5 and Qwen3."""

KEY_ENCODERS: Final = {key: encoder for encoder, key in ENCODER_KEYS.items()} | {
    "t5": "text_encoder_3",  # OneTrainer, diffusers
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
    "qwen3_8b": "text_encoder_qwen3",
}
_OTHER_ENCODERS: Final = {
    "gemma": 2304,
    "llama": 4096,
    "qwen3_06b": 1024,
    "qwen25_7b": 3584,
}
"""The keys of other text encoders in files of OneTrainer and ComfyUI, with their widths."""
_CLIP_L_WIDTH: Final = 768
_QWEN3_8B_WIDTH: Final = 4096
_FILE_NAME_KEYS: Final = ("emb_params", "emp_params")  # kohya, OneTrainer: the file's name is the token
_FILE_NAME_OUT_KEYS: Final = tuple(f"{key}_out" for key in _FILE_NAME_KEYS)
_RESERVED: Final = frozenset({*KEY_ENCODERS, *_FILE_NAME_KEYS, *_FILE_NAME_OUT_KEYS, "__metadata__"})
"""The keys in files that cannot be the name of a word."""
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
}
XTI_KEYS: Final = (
    *("IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"),
    *("OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11"),
)
"""kohya's names of the cross-attention layers of SD 1 and 2, in the order in which they run."""
_PART_KEY: Final = re.compile(rf"(.+)\.(out|rows)\.({'|'.join(ENCODER_KEYS)})")
_ENCODER_LAYER: Final = "encoder_layer."
PNG: Final = b"\x89PNG\r\n\x1a\n"
FUSE: Final = "fuse it when you export, with ti-export --lora FILE:0.8"
"""What to do with a LoRA, at the end of an error."""
MAX_LORA_HEADER: Final = 16 << 20
_LORA_TENSOR: Final = re.compile(
    rb"[._](?:lora_(?:down|up|A|B)|lora\.(?:down|up)|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)"
    rb"(?:(?:\.\w{1,64})?\.(?:weight|bias))?\"\s{0,8}:\s{0,8}\{"
)
"""The end of a tensor's name in the header of a LoRA of kohya, diffusers, PEFT or LyCORIS, to the brace of its entry.
Metadata never match: their values are strings, in which a quote is escaped."""
_MAX_AXES: Final = 4
_TOKEN: Final = re.compile(r"<[\w.+*@#!~&$%^=-]+>|[\w.+*@#!~&$%^=-]+")


@dataclass(frozen=True)
class Concept:
    """A learned word: `vectors[encoder]` is float32 [n, D], one row per token id of the word.

    A precise word also has output vectors, which replace an encoder's hidden states at the word's n places:
    `out[encoder]` is float32 [stages, layers, n, Dh], for each stage of the noise schedule, from the noisiest, and each
    cross-attention layer. One stage or layer stands for all. With `values_only` the layers' keys still come from the
    replaced states. `encoder_layers[encoder]` is the layer of the encoder whose states the vectors replace (the graph's
    input `layer`); without an entry it is the model's default.

    A word of extended textual inversion (XTI, arXiv 2303.09522) has rows for each cross-attention layer instead:
    `layer_rows[encoder]` is float32 [layers, n, D]; `vectors` stand for them where there is one row only.

    The provenance of a word with output vectors leaves out what its file's metadata states about them.

    Raises ConceptError if the word is not safe to serve: token, shape, count, finiteness, norm.
    """

    token: str
    vectors: Mapping[str, Vectors]
    provenance: Mapping[str, str] = field(default_factory=dict[str, str])
    out: Mapping[str, Vectors] = field(default_factory=dict[str, Vectors])
    values_only: bool = False
    encoder_layers: Mapping[str, int] = field(default_factory=dict[str, int])
    layer_rows: Mapping[str, Vectors] = field(default_factory=dict[str, Vectors])

    def __post_init__(self) -> None:
        _check_safe(self.token, "token")
        if not self.vectors:
            raise ConceptError(f"{self.token!r} has no vectors: a word is 1 to {MAX_VECTORS} vectors for an encoder")
        checked = {
            encoder: _checked(self.token, encoder, value, zero=encoder in self.out)
            for encoder, value in self.vectors.items()
        }
        out = {encoder: _checked_out(self.token, encoder, value, checked) for encoder, value in self.out.items()}
        if len({value.shape[:2] for value in out.values()}) > 1:
            shapes = " and ".join(str(list(value.shape)) for value in out.values())
            raise ConceptError(
                f"{self.token!r} has output vectors {shapes}: stages and layers must be equal for every encoder"
            )
        _check_provenance(self.token, self.provenance)
        if self.values_only and not out:
            raise ConceptError(f"{self.token!r} has values_only and no output vectors: leave it out")
        if not self.encoder_layers.keys() <= out.keys():
            raise ConceptError(
                f"{self.token!r} has an encoder layer for {_listed(self.encoder_layers)} and output vectors for "
                f"{_listed(out) or 'none'}: each needs output vectors"
            )
        for encoder, layer in self.encoder_layers.items():
            if not 1 <= layer <= MAX_LAYERS:
                raise ConceptError(
                    f"{self.token!r} ({encoder}) has output vectors of the encoder's layer {layer}, but the layer "
                    f"must be 1 to {MAX_LAYERS}"
                )
        layer_rows = {name: _checked_layers(self.token, name, rows, checked) for name, rows in self.layer_rows.items()}
        if layer_rows and out:
            raise ConceptError(f"{self.token!r} has rows for each layer and output vectors: a word has one of the two")
        if len({len(rows) for rows in layer_rows.values()}) > 1:
            shapes = " and ".join(str(list(rows.shape)) for rows in layer_rows.values())
            raise ConceptError(f"{self.token!r} has rows {shapes}: layers must be equal for every encoder")
        for name, value in (
            ("layer_rows", layer_rows),
            ("vectors", checked),
            ("provenance", {k: v for k, v in self.provenance.items() if not (out and _states_output(k))}),
            ("out", out),
            ("encoder_layers", dict(self.encoder_layers)),
        ):
            object.__setattr__(self, name, MappingProxyType(value))

    @property
    def text(self) -> str:
        """What stands for the word in the prompt of an encoder for which it has no vectors: `text` in its file's
        metadata, or `init`, the class word that learning started from, unless that was `random` or a file; else
        nothing."""
        init = self.provenance.get("init", "")
        return self.provenance.get("text", "" if init == "random" or "." in init else init)[:MAX_TEXT]

    @property
    def stages(self) -> int:
        """The stages of the noise schedule for which it has output vectors of their own; 1 if it has none."""
        return next((value.shape[0] for value in self.out.values()), 1)

    @property
    def layers(self) -> int:
        """The cross-attention layers for which it has output vectors of their own; 1 if it has none."""
        return next((value.shape[1] for value in self.out.values()), 1)

    @cached_property
    def identity(self) -> str:
        """Hex sha256 of all that a picture depends on: the encoders, sorted, each with its shape and float32 rows; then
        rows of layers and output vectors in the same form, and what the file's metadata says about output vectors."""
        digest = hashlib.sha256()
        for encoder, vectors in sorted(self.vectors.items()):
            digest.update(f"{encoder} {list(vectors.shape)}\n".encode())
            digest.update(np.ascontiguousarray(vectors, "<f4").tobytes())
        for kind, parts in (("rows", self.layer_rows), ("out", self.out)):
            for encoder, vectors in sorted(parts.items()):
                digest.update(f"{kind} {encoder} {list(vectors.shape)}\n".encode())
                digest.update(np.ascontiguousarray(vectors, "<f4").tobytes())
        if self.out:
            digest.update("".join(f"{key} {value}\n" for key, value in sorted(_output_facts(self).items())).encode())
        return digest.hexdigest()

    @cached_property
    def by_layer(self) -> "tuple[Concept, ...]":
        """The ordinary word of each layer, if it has rows for each; else nothing."""
        count = next((len(rows) for rows in self.layer_rows.values()), 0)
        return tuple(
            Concept(self.token, {**self.vectors, **{name: rows[layer] for name, rows in self.layer_rows.items()}})
            for layer in range(count)
        )

    def rows_only(self) -> "Concept":
        """The word with `vectors` only. Raises ConceptError if they are zeros, as in some files of OneTrainer."""
        return replace(self, out={}, values_only=False, encoder_layers={}, layer_rows={})


def save_concept(concept: Concept, path: str | os.PathLike[str]) -> None:
    """Writes the word's file, whole or not at all; provenance becomes the file's metadata.

    Raises ConceptError for a word that `load_concept` would refuse, FileError if it cannot be written.
    """
    write_whole(Path(path), concept_bytes(concept, str(path)))


def concept_bytes(concept: Concept, name: str = "the file") -> bytes:
    """The content of the word's file. `name` is the file's, for errors.

    Raises ConceptError for a word that `load_concept` would refuse, or read as another word.
    """
    tensors: dict[str, npt.NDArray[np.floating[Any]]]
    if set(concept.vectors) == {"text_encoder"}:
        check_token(concept.token)
        tensors = {concept.token: concept.vectors["text_encoder"]}
    else:
        tensors = {_file_key(encoder, value.shape[1]): value for encoder, value in concept.vectors.items()}
    for kind, parts in (("out", concept.out), ("rows", concept.layer_rows)):
        tensors |= {f"{concept.token}.{kind}.{encoder}": _smallest(value) for encoder, value in parts.items()}
    metadata = {"format": "pt", **concept.provenance, **_output_facts(concept), "token": concept.token}
    data = safetensors.numpy.save({key: np.ascontiguousarray(value) for key, value in tensors.items()}, metadata)
    if len(data) > MAX_FILE_BYTES:
        raise ConceptError(
            f"{name} would have {len(data)} bytes, but at most {MAX_FILE_BYTES} are allowed (1 MiB): learn fewer "
            "vectors, stages or layers"
        )
    written = concept_of(*read_safetensors(data, name), name)  # never write what load_concept would refuse
    if (written.token, written.identity) != (concept.token, concept.identity):
        raise ConceptError(f"{name} would be read as another word than {concept.token!r}: rename the word")
    return data


def check_size(token: str, numbers: int) -> None:
    """Raises ConceptError if the file of a word of so many float32 numbers, with any provenance, may be too large."""
    room = MAX_FILE_BYTES - MAX_HEADER_BYTES
    if 4 * numbers > room:
        raise ConceptError(
            f"{token!r} would have {4 * numbers} bytes of vectors, its file has room for {room}: use fewer vectors, "
            "stages, layers or encoders"
        )


def load_concept(path: str | os.PathLike[str]) -> Concept:
    """Reads one word from any tool's safetensors file, with all checks.

    Raises UsageError if there is no such file, ConceptError if it is refused.
    """
    name = str(path)
    return concept_of(*read_safetensors(read_limited(Path(path)), name), name)


def concept_of(
    tensors: Mapping[str, Vectors], metadata: Mapping[str, str], name: str, new_token: str | None = None
) -> Concept:
    """The word in a file's tensors. `name` is the file's name, and names the word if the file does not; `new_token`
    replaces its name, which may then be one that a word may not have."""
    rows, parts = parted(tensors)
    token, fields = _named_rows(rows, metadata, name)
    if tokens := sorted({other for other, _, _ in parts if other != token}):
        raise ConceptError(
            f"{name} has vectors for layers of {tokens[0][:80]!r} and the word {token[:80]!r}: names must agree"
        )
    provenance = {key: value for key, value in metadata.items() if key not in ("format", "token")}
    for (_, kind, encoder), value in parts.items():
        field_name = "out" if kind == "out" else "layer_rows"
        if encoder in fields.get(field_name, {}):
            raise ConceptError(f"{name} has {kind} of {encoder} twice, under keys of two tools: leave out one")
        fields[field_name] = {**fields.get(field_name, {}), encoder: value}
    if any(kind == "out" for _, kind, _ in parts):
        fields |= _read_output_facts(provenance, fields["out"], name)
    return Concept(new_token or token, provenance=provenance, **fields)


def parted(tensors: Mapping[str, Vectors]) -> tuple[dict[str, Vectors], dict[tuple[str, str, str], Vectors]]:
    """A file's tensors without those for layers, and those by token, kind (out or rows) and encoder."""
    keys = {key: match for key in tensors if len(tensors) > 1 and (match := _PART_KEY.fullmatch(key))}
    rows = {key: value for key, value in tensors.items() if key not in keys}
    return rows, {(match[1], match[2], match[3]): tensors[key] for key, match in keys.items()}


def _read_output_facts(provenance: dict[str, str], vectors: Mapping[str, Vectors], name: str) -> dict[str, Any]:
    """Fields of a Concept: what a file's metadata says about its output vectors, which is removed from it."""
    stages, layers = (_count(provenance.pop(key, None), key, name) for key in ("stages", "layers"))
    for encoder, value in vectors.items():
        if value.ndim != _MAX_AXES or value.shape[:2] != (stages, layers):
            raise ConceptError(
                f"{name} has output vectors {list(value.shape)} for {encoder}, its metadata says "
                f"{counted(stages, 'stage')} and {counted(layers, 'layer')}: the vectors must be [stages, layers, n, D]"
            )
    match provenance.pop("values_only", None):
        case "true" | "false" as text:
            values_only = text == "true"
        case text:
            shown = None if text is None else text[:20]
            raise ConceptError(f"{name} has values_only = {shown!r} in its metadata, but it must be 'true' or 'false'")
    stated = {key: provenance.pop(key) for key in [*provenance] if key.startswith(_ENCODER_LAYER)}
    encoder_layers = {key.removeprefix(_ENCODER_LAYER): _count(value, key, name) for key, value in stated.items()}
    return {"values_only": values_only, "encoder_layers": encoder_layers}


def _check_provenance(token: str, provenance: Mapping[str, str]) -> None:
    for key, value in provenance.items():
        try:
            f"{key}{value}".encode()
        except UnicodeEncodeError:
            raise ConceptError(
                f"{token!r} has {key[:80]!r} = {value[:80]!r} in its metadata, which is not valid Unicode: it contains "
                "half of a surrogate pair"
            ) from None


def _count(text: str | None, key: str, name: str) -> int:
    if text is None or not re.fullmatch("[1-9][0-9]{0,2}", text):
        raise ConceptError(
            f"{name} has {key[:80]} = {text if text is None else text[:20]!r} in its metadata, output vectors need a "
            "number from 1 to 999"
        )
    return int(text)


def _states_output(key: str) -> bool:
    """Whether a key of a file's metadata is about output vectors."""
    return key in ("stages", "layers", "values_only") or key.startswith(_ENCODER_LAYER)


def _output_facts(concept: Concept) -> dict[str, str]:
    """What a file's metadata says about output vectors."""
    if not concept.out:
        return {}
    return {
        "stages": str(concept.stages),
        "layers": str(concept.layers),
        "values_only": "true" if concept.values_only else "false",
        **{_ENCODER_LAYER + encoder: str(layer) for encoder, layer in concept.encoder_layers.items()},
    }


def _named_rows(tensors: Mapping[str, Vectors], metadata: Mapping[str, str], name: str) -> tuple[str, dict[str, Any]]:
    """The token and the fields of the Concept in a file's tensors, in the layout of any tool."""
    stem = token_from_stem(name)
    if other := [key for key, value in tensors.items() if value.shape[-1:] == (_OTHER_ENCODERS.get(key),)]:
        raise ConceptError(
            f"{name} has vectors for {other[0]}, a text encoder of no supported model: "
            f"the encoder must be {one_of(sorted(KEY_ENCODERS))}"
        )
    if set(tensors) == set(XTI_KEYS):
        if len({value.shape for value in tensors.values()}) > 1 or tensors["MID"].ndim != 2:
            raise ConceptError(
                f"{name} has rows of different shapes for its 16 layers, but must have the same [n, D] for each"
            )
        layers = np.stack([tensors[key] for key in XTI_KEYS])
        rows = {"text_encoder": layers.mean(axis=0)}
        return metadata.get("token", stem), {"vectors": rows, "layer_rows": {"text_encoder": layers}}
    if any(key in KEY_ENCODERS for key in tensors):
        vectors = _by_encoder({key: tensors[key] for key in tensors if key in KEY_ENCODERS}, tensors, name)
        other = [key for key in tensors if key not in KEY_ENCODERS]
        if any(not key.endswith("_out") or key.removesuffix("_out") not in tensors for key in other):
            raise ConceptError(
                f"{name} mixes {_listed(tensors)}: besides the keys of encoders, only their output vectors (_out) are "
                "allowed"
            )
        outs = {key.removesuffix("_out"): _shared(tensors[key]) for key in other}
        out = _by_encoder(outs, tensors, name)
        return metadata.get("token", stem), {"vectors": vectors, "out": out}
    for key in _FILE_NAME_OUT_KEYS:
        if key in tensors and key.removesuffix("_out") not in tensors:
            raise ConceptError(f"{name} has {key} and no {key.removesuffix('_out')}: output vectors need rows")
    words = {key: value for key, value in tensors.items() if key not in _FILE_NAME_OUT_KEYS}
    if len(words) != 1:
        raise ConceptError(
            f"{name} holds {len(words)} tensors ({_listed(words)}), a word's file holds one: run ti-concept convert"
        )
    [(key, value)] = words.items()
    token = metadata.get("token", stem) if key in _FILE_NAME_KEYS else key
    out = {"text_encoder": _shared(tensors[f"{key}_out"])} if f"{key}_out" in tensors else {}
    return token, {"vectors": {"text_encoder": value}, "out": out}


def _by_encoder(keyed: Mapping[str, Vectors], tensors: Mapping[str, Vectors], name: str) -> dict[str, Vectors]:
    """Tensors under keys of encoders, by encoder; two keys of one encoder must hold the same numbers."""
    by_encoder: dict[str, Vectors] = {}
    for key, value in keyed.items():
        other = by_encoder.setdefault(_encoder_of(key, tensors), value)
        if not np.array_equal(other, value):
            raise ConceptError(f"{name} has two different tensors for {_encoder_of(key, tensors)}: leave out one")
    return by_encoder


def _smallest(vectors: Vectors) -> npt.NDArray[np.float16] | Vectors:
    """The vectors as float16 if that keeps every number; else as they are."""
    with np.errstate(over="ignore"):
        half = vectors.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), vectors) else vectors


def _shared(vectors: Vectors) -> Vectors:
    """OneTrainer's output vectors [n, Dh], for keys and values of all stages and layers: [1, 1, n, Dh]."""
    return vectors[None, None] if vectors.ndim == 2 else vectors[None, None, None]


def check_token(token: str, noun: str = "token") -> None:
    """Raises ConceptError for a token that could escape a folder, break a prompt or mislead a reader, or that a file of
    the word could not have: tools read it as the name of something else. `noun` is what the message calls it."""
    _check_safe(token, noun)
    if token in _RESERVED:
        raise ConceptError(
            f"{noun} {token!r} is a key that has a meaning of its own in files of words, such as a text encoder's "
            f"name: rename the word, for example <{token}>"
        )


def _check_safe(token: str, noun: str) -> None:
    if "/" in token or "\\" in token or ".." in token:
        raise ConceptError(f"{noun} {token[:80]!r} looks like a path: rename the word, for example <toy>")
    if len(token) > MAX_TOKEN_LENGTH:
        raise ConceptError(
            f"{noun} {token[:20]!r}... has {len(token)} characters, but may have at most {MAX_TOKEN_LENGTH}: use fewer"
        )
    if not _TOKEN.fullmatch(token) or unicodedata.normalize("NFC", token) != token:
        raise ConceptError(
            f"{noun} {token!r} is not safe in a prompt: use only letters, digits and . + * @ # ! ~ & $ % ^ = - _ , "
            "bare or in <>, for example <toy>"
        )


def token_from_stem(name: str) -> str:
    """A token from a file's name, without folder and suffix; characters that a token may not have become _."""
    stem = unicodedata.normalize("NFC", Path(name).stem)
    bare = re.sub(r"[^\w.+*@#!~&$%^=-]+|\.{2,}", "_", stem).strip("_")[: MAX_TOKEN_LENGTH - 2]
    return f"<{bare}>" if stem.startswith("<") and stem.endswith(">") else bare or "word"


def read_limited(path: Path) -> bytes:
    """The file's bytes, at most MAX_FILE_BYTES.

    Raises UsageError if there is no such file, ConceptError if it is unreadable, too large, or of a known other kind.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
            unread = 8 + int.from_bytes(data[:8], "little") - len(data)
            if data[8:9] == b"{" and 0 < unread <= MAX_LORA_HEADER:  # a LoRA's tensors are named after its metadata
                data += file.read(unread)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise unreadable(path, error) from error
    refuse_other_kinds(data, str(path))
    if len(data) > MAX_FILE_BYTES:
        raise ConceptError(f"{path} has {max(size, len(data))} bytes, but at most {MAX_FILE_BYTES} are allowed (1 MiB)")
    return data


def unreadable(path: Path, error: OSError) -> OnewordError:
    """What to raise if a word's file cannot be read: UsageError if there is none, else ConceptError."""
    if isinstance(error, FileNotFoundError):
        return UsageError(f"there is no file {path}")
    if isinstance(error, IsADirectoryError):
        return UsageError(f"{path} is a folder: give a word's file")
    return ConceptError(f"cannot read {path}: {error.strerror}")


def refuse_other_kinds(data: bytes, name: str) -> None:
    """Raises ConceptError for the beginning of a picture or a LoRA, which users take for a word's file."""
    if data.startswith(PNG):
        raise ConceptError(
            f"{name} is a picture, not a word's file; if A1111 stored a word in it, run ti-concept convert first"
        )
    if data.startswith((b"\xff\xd8\xff", b"GIF8")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        raise ConceptError(f"{name} is a picture, not a word's file: learn a word from pictures with ti-train")
    length = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or length > MAX_LORA_HEADER:
        return
    header = data[8 : 8 + length]
    lora_tensors = [*islice(_LORA_TENSOR.finditer(header), 2)]
    if len(lora_tensors) < 2:  # a LoRA has two or more for each layer; one can be a word's name, such as x_lora_A
        return
    if b'"bundle_emb.' in header:
        raise ConceptError(f"{name} is a LoRA with words in it: ti-concept convert writes these as files")
    raise ConceptError(f"{name} is a LoRA, not a word's file: {FUSE}")


def read_safetensors(data: bytes, name: str) -> tuple[dict[str, Vectors], dict[str, str]]:
    """Tensors (as float32) and metadata of a safetensors file, read strictly. Raises ConceptError, also for a LoRA.

    Source: the format documented in huggingface/safetensors. Stricter than that library: floats only, at most 4-D, no
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
            raise ConceptError(f"{name}: key {key[:80]!r} looks like a path, but must be a word such as <toy>")
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
        raise ConceptError(
            f"{name} has {len(data)} bytes, too few for a safetensors file: convert .pt and .bin with ti-concept"
        )
    refuse_other_kinds(data[:MAX_FILE_BYTES], name)  # of uploads, which may be larger
    length = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" and (data[:4] == b"PK\x03\x04" or data[:1] == b"\x80"):
        raise ConceptError(f"{name} is a pickle (.pt, .bin), but must be safetensors: run ti-concept convert first")
    if length > MAX_HEADER_BYTES:
        if data[8:9] != b"{":
            raise ConceptError(f"{name} is not a safetensors file: give one of a word, such as ti-train writes")
        raise ConceptError(
            f"{name} has a header of {length} bytes, but at most {MAX_HEADER_BYTES} are allowed (64 KiB)"
        )
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
        raise ConceptError(f"{name}: {key[:80]!r} is {dtype[:20]!r}, but must be {one_of(_DTYPES)}")
    sizes = [size for size in shape if type(size) is int and 0 < size <= MAX_FILE_BYTES]
    if len(sizes) != len(shape) or not 1 <= len(shape) <= _MAX_AXES:
        raise ConceptError(f"{name}: {key[:80]!r} has shape {shape}, a word is [n, D], 1 <= n <= {MAX_VECTORS}"[:300])
    if not 0 <= first <= last <= len(data) or last - first != math.prod(sizes) * _DTYPES[dtype].itemsize:
        raise ConceptError(f"{name}: {key[:80]!r}, {dtype} {shape}, does not fill bytes {first} to {last}"[:300])
    raw = np.frombuffer(data[first:last], _DTYPES[dtype]).reshape(sizes)
    value = (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else _narrowed(raw)
    return value, (first, last)


def _narrowed(value: npt.NDArray[Any]) -> Vectors:
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which _checked reports
        return value.astype(np.float32)


def _checked(token: str, encoder: str, value: npt.ArrayLike, zero: bool) -> Vectors:
    """A word's rows; those of zeros are allowed only for a word whose output vectors replace what becomes of them."""
    name, largest = f"{token!r} ({encoder})", MAX_T5_NORM if encoder == "text_encoder_3" else MAX_NORM
    vectors = _narrowed(np.asarray(value))
    if vectors.ndim == 1:  # diffusers once wrote one vector as [D]
        vectors = vectors[None]
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ConceptError(f"{name} has shape {list(vectors.shape)}, a word is [n, D]")
    if not 1 <= len(vectors) <= MAX_VECTORS:
        raise ConceptError(f"{name} has {len(vectors)} vectors, but must have 1 to {MAX_VECTORS}")
    if not np.isfinite(vectors).all():
        raise ConceptError(f"{name} holds NaN or infinity: its training failed, train it again")
    norm = float(np.linalg.norm(vectors.astype(np.float64), axis=1).max())
    if not (norm > 0 or zero) or norm > largest:
        raise ConceptError(f"{name} has norm {norm:.3g}, a plausible vector has one above 0 and at most {largest:g}")
    vectors.flags.writeable = False
    return vectors


def _checked_out(token: str, encoder: str, value: npt.ArrayLike, rows: Mapping[str, Vectors]) -> Vectors:
    name, out = f"{token!r} ({encoder})", _narrowed(np.asarray(value))
    if encoder not in rows:
        raise ConceptError(f"{name} has output vectors and no rows: a word needs rows for the same encoder")
    if out.ndim != _MAX_AXES or 0 in out.shape or out.shape[2] != len(rows[encoder]):
        raise ConceptError(
            f"{name} has output vectors {list(out.shape)} for {counted(len(rows[encoder]), 'row')}, but must have "
            "[stages, layers, n, D] with as many vectors as rows"
        )
    if out.shape[0] > MAX_STAGES or out.shape[1] > MAX_LAYERS:
        raise ConceptError(
            f"{name} has output vectors for {counted(out.shape[0], 'stage')} and {counted(out.shape[1], 'layer')}, "
            f"but at most {MAX_STAGES} and {MAX_LAYERS} are allowed"
        )
    if not np.isfinite(out).all():
        raise ConceptError(f"{name} has output vectors with NaN or infinity: its training failed, train it again")
    norm = float(np.linalg.norm(out.astype(np.float64), axis=-1).max())
    if norm > MAX_OUT_NORM:
        raise ConceptError(f"{name} has an output vector of norm {norm:.3g}, but at most {MAX_OUT_NORM:g} is allowed")
    out.flags.writeable = False
    return out


def _checked_layers(token: str, encoder: str, value: npt.ArrayLike, rows: Mapping[str, Vectors]) -> Vectors:
    name, layers = f"{token!r} ({encoder})", _narrowed(np.asarray(value))
    if encoder not in rows or layers.ndim != 3 or layers.shape[1:] != rows[encoder].shape:
        expected = list(rows[encoder].shape) if encoder in rows else "none"
        raise ConceptError(
            f"{name} has rows {list(layers.shape)} for each layer and {expected} for all, but must have [layers, n, D] "
            "and [n, D]"
        )
    if not 1 <= len(layers) <= MAX_LAYERS:
        raise ConceptError(f"{name} has rows for {len(layers)} layers, but must have them for 1 to {MAX_LAYERS}")
    for layer in layers:
        _checked(token, encoder, layer, zero=False)
    layers.flags.writeable = False
    return layers


def _encoder_of(key: str, tensors: Mapping[str, Vectors]) -> str:
    """The encoder of a file's key. Older files of OneTrainer for FLUX.1 have CLIP-L's vectors as clip_g."""
    if key == "clip_g" and "clip_l" not in tensors and tensors[key].shape[-1:] == (_CLIP_L_WIDTH,):
        return "text_encoder"
    return KEY_ENCODERS[key]


def _file_key(encoder: str, width: int) -> str:
    """ComfyUI has a key for each size of Qwen3."""
    if encoder == "text_encoder_qwen3" and width == _QWEN3_8B_WIDTH:
        return "qwen3_8b"
    if encoder not in ENCODER_KEYS:
        raise ConceptError(f"encoder {encoder!r} has no key in a file: it must be {one_of(ENCODER_KEYS)}")
    return ENCODER_KEYS[encoder]


def _listed(keys: Mapping[str, object]) -> str:
    return ", ".join(repr(key[:40]) for key in list(keys)[:5]) + (", ..." if len(keys) > 5 else "")
