"""Reads learned words from the embedding files of all tools. Only for `ti-concept`: serving reads safetensors only.

    diffusers            {token: [n, D]}, .safetensors or .bin; a folder of sd-concepts-library
    SDXL, SD3, FLUX.1    clip_l, clip_g, t5 or t5xxl, text_encoders_0 and _1; two files of diffusers, one per encoder
    FLUX.2               qwen3_4b or qwen3_8b
    A1111                .pt: string_to_param with `name`, the file's name is the token; pictures: `sd-ti-embedding`;
                         `bundle_emb.<name>.string_to_param.*` inside a LoRA
    Gal et al.           .pt: string_to_param in a ParameterDict, one word per placeholder
    kohya, OneTrainer    emb_params, emp_params, and `bundle_emb.<name>.<key>` inside a LoRA
    oneword              rows in a layout above, beside output vectors or rows of layers, as in `runtime.concept`
    OneTrainer           the keys above, with output vectors under the same keys and _out
    kohya XTI            IN01 ... OUT11: rows for each of 16 layers

`.pt` and `.bin` are read without PyTorch, and more strictly than with its `weights_only`: every opcode is checked
before anything is unpickled, and only a few names are allowed, which build tensors and plain containers and cannot
reach other code. Not covered: PyTorch's files from before 2020, vectors hidden in the pixels of A1111's old pictures.
"""

import base64
import binascii
import collections
import io
import json
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from oneword.engines.errors import ConceptError
from oneword.runtime.concept import (
    KEY_ENCODERS,
    MAX_FILE_BYTES,
    MAX_LORA_HEADER,
    PNG,
    XTI_KEYS,
    Concept,
    Vectors,
    concept_of,
    parse_header,
    parse_tensor,
    parted,
    read_limited,
    read_safetensors,
    token_from_stem,
    unreadable,
)

_MAX_LORA_WORDS: Final = 8 * MAX_FILE_BYTES
_MAX_PICTURE_TEXT: Final = 8 << 20
_MAX_PICKLED: Final = 8 * MAX_FILE_BYTES
_MAX_ZIP_ENTRIES: Final = 200
_MAX_OPCODES: Final = 5_000
_MAX_BUNDLED_KEY: Final = 1_000
_PICKLES: Final = (".pt", ".bin", ".pth", ".ckpt")


@dataclass(frozen=True)
class FoundConcept:
    """A word, and the layout of the file that holds it."""

    layout: str
    concept: Concept


def read_concepts(path: Path, new_token: str | None = None) -> list[FoundConcept]:
    """All words in a file of any tool, or in a folder of sd-concepts-library.

    `new_token` replaces the name of each, which may then be one that a word may not have. Raises UsageError if there is
    no such file, ConceptError.
    """
    name = str(path)
    if path.is_dir():
        return _library_folder(path, new_token)
    if path.suffix.lower() == ".png":
        return _from_dict("A1111 picture", _picture(path), name, new_token)
    if path.suffix.lower() in _PICKLES:
        return _from_dict("pickle", _pickled(read_limited(path), name), name, new_token)
    if path.suffix.lower() != ".safetensors":
        raise ConceptError(
            f"{name} is not an embedding file: give a .safetensors, .pt, .bin or .png file, or a word's folder"
        )
    if bundled := _lora(path, new_token):
        return bundled
    return _from_tensors("safetensors", *read_safetensors(read_limited(path), name), name, new_token)


def paired(words: Sequence[FoundConcept]) -> Concept:
    """One word for two encoders from diffusers' two SDXL files, narrower first. Raises ConceptError."""
    concepts = [word.concept for word in words]
    vectors = [value for concept in concepts for value in concept.vectors.values()]
    if any(concept.out or concept.layer_rows for concept in concepts):
        raise ConceptError("words with vectors for layers are not a pair: their file already holds every encoder")
    if len(concepts) != 2 or len(vectors) != 2 or len({concept.token for concept in concepts}) != 1:
        listed = ", ".join(repr(concept.token) for concept in concepts)
        raise ConceptError(f"words {listed} are not a pair: pass two files of the same word, one per encoder")
    first, second = sorted(vectors, key=lambda value: value.shape[1])
    if len(first) != len(second) or first.shape[1] == second.shape[1]:
        raise ConceptError(f"vectors {list(first.shape)} and {list(second.shape)} are not a pair for two encoders")
    return Concept(concepts[0].token, {"text_encoder": first, "text_encoder_2": second}, concepts[0].provenance)


def _library_folder(path: Path, new_token: str | None) -> list[FoundConcept]:
    for name in ("learned_embeds.safetensors", "learned_embeds.bin"):
        if (path / name).is_file():
            return [
                FoundConcept(f"sd-concepts-library, {word.layout}", word.concept)
                for word in read_concepts(path / name, new_token)
            ]
    raise ConceptError(f"{path} holds neither learned_embeds.safetensors nor learned_embeds.bin: pass the file itself")


def _from_dict(container: str, content: Any, name: str, new_token: str | None) -> list[FoundConcept]:
    """The words of a pickled or JSON dictionary."""
    if not isinstance(content, Mapping):
        raise ConceptError(f"{name} holds a {type(content).__name__}, an embedding file holds a dictionary")
    parameters = content.get("string_to_param")
    if parameters is None:
        tensors = {key: value for key, value in content.items() if isinstance(value, np.ndarray)}
        if not tensors or len(tensors) != len(content) or not all(isinstance(key, str) for key in content):
            raise ConceptError(f"{name} has no known layout: its keys are {_shown(content)}")
        return _from_tensors(container, tensors, {}, name, new_token)
    if not isinstance(parameters, Mapping) or not parameters:
        raise ConceptError(f"{name}: string_to_param is {type(parameters).__name__}, not a dictionary of vectors")
    facts = _facts(content)
    if "name" not in content:
        if not all(isinstance(key, str) for key in parameters):
            raise ConceptError(f"{name}: string_to_param has the keys {_shown(parameters)}, but they must be names")
        return [
            FoundConcept("Gal et al.", Concept(new_token or key, {"text_encoder": _array(value, name)}, facts))
            for key, value in parameters.items()
        ]
    picture = container == "A1111 picture"
    if picture and not isinstance(content["name"], str):
        raise ConceptError(f"{name}: the word's name is a {type(content['name']).__name__}, not text")
    token = new_token or token_from_stem(f"{content['name']}.x" if picture else name)
    vectors = _array(next(iter(parameters.values())), name)
    return [FoundConcept(container if picture else "A1111", Concept(token, {"text_encoder": vectors}, facts))]


def _facts(content: Mapping[Any, Any]) -> dict[str, str]:
    """The provenance in A1111's dictionary."""
    values = {key: content.get(key) for key in ("step", "sd_checkpoint", "sd_checkpoint_name")}
    return {key: str(value)[:200] for key, value in values.items() if isinstance(value, str | int | float) and value}


def _shown(keys: Mapping[Any, Any]) -> str:
    """The keys of an untrusted dictionary, in a few words: a nested key can be too deep to be printed."""
    first = [repr(key[:40]) if isinstance(key, str) else f"a {type(key).__name__}" for key in list(keys)[:5]]
    return ", ".join(first) + (", ..." if len(keys) > 5 else "")


def _from_tensors(
    container: str,
    tensors: Mapping[str, Vectors],
    metadata: Mapping[str, str],
    name: str,
    new_token: str | None,
) -> list[FoundConcept]:
    """The words in a flat mapping of tensors."""
    if parted(tensors)[1]:
        layout = "oneword"
    elif set(tensors) == set(XTI_KEYS):
        layout = "kohya XTI"
    elif any(key in ("emb_params", "emp_params") for key in tensors):
        layout = "kohya or OneTrainer"
    elif any(key in KEY_ENCODERS for key in tensors):
        layout = "a key for each encoder"
    else:
        return [
            FoundConcept(f"diffusers, {container}", concept_of({key: value}, metadata, name, new_token))
            for key, value in tensors.items()
        ]
    return [FoundConcept(layout, concept_of(tensors, metadata, name, new_token))]


def _lora(path: Path, new_token: str | None) -> list[FoundConcept]:
    """The words bundled in a LoRA; only the header and their bytes are read from the file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 8 < length <= MAX_LORA_HEADER:
                return []
            head = file.read(length)
            if b"bundle_emb." not in head:
                return []
            words: dict[str, dict[str, Vectors]] = {}
            size = 0
            for key, entry in parse_header(head, str(path)).items():
                stem, name = _bundled(key, str(path))
                if stem and name != "string_to_token":  # A1111's ids of the words' names
                    first, last = _offsets(entry, key, str(path))
                    size += last - first  # entries may share bytes
                    if size > _MAX_LORA_WORDS:
                        raise ConceptError(f"{path}: its words have more than {_MAX_LORA_WORDS} bytes (8 MiB) in all")
                    file.seek(8 + length + first)
                    local = entry | {"data_offsets": [0, last - first]}
                    value, _ = parse_tensor(memoryview(file.read(last - first)), key, local, str(path))
                    tensors = words.setdefault(stem, {})
                    name = "emb_params" if name in ("*", "string_to_param") else name  # the word is called as the stem
                    if name in tensors:
                        raise ConceptError(f"{path}: {stem[:80]!r} has two tensors in {name}, but may have only one")
                    tensors[name] = value
    except OSError as error:
        raise unreadable(path, error) from error
    return [
        FoundConcept("LoRA bundle", word.concept)
        for stem, tensors in words.items()
        for word in _from_tensors("LoRA bundle", tensors, {}, f"{token_from_stem(f'{stem}.x')}.safetensors", new_token)
    ]


def _bundled(key: str, name: str) -> tuple[str, str]:
    """The name of a word in a LoRA and the key of its tensor, or nothing for another tensor's key. Raises ConceptError.

    A1111 has a dictionary in string_to_param, whose keys are ignored.
    """
    if not key.startswith("bundle_emb."):
        return "", ""
    if len(key) > _MAX_BUNDLED_KEY:
        raise ConceptError(
            f"{name}: key {key[:80]!r}... has {len(key)} characters, but a word's key may have at most "
            f"{_MAX_BUNDLED_KEY}"
        )
    path = key.removeprefix("bundle_emb.")
    for dictionary in ("string_to_param", "string_to_token"):
        stem, found, _ = f"{path}.".partition(f".{dictionary}.")
        if stem and found:
            return stem, dictionary
    stem, _, tensor = path.rpartition(".")
    return (stem, tensor) if tensor else ("", "")


def _offsets(entry: Any, key: str, name: str) -> tuple[int, int]:
    match entry:
        case {"data_offsets": [int(first), int(last)]} if 0 <= first <= last <= first + MAX_FILE_BYTES:
            return first, last
        case _:
            raise ConceptError(f"{name}: {key[:80]!r} has no plausible data_offsets")


def _picture(path: Path) -> Any:
    """The JSON in a PNG's text chunk `sd-ti-embedding`; its tensors become arrays. Source: A1111's webui."""
    try:
        with path.open("rb") as file:
            for kind, data in _chunks(file, str(path)):
                if kind == b"tEXt" and data.startswith(b"sd-ti-embedding\0"):
                    text = base64.b64decode(data.split(b"\0", 1)[1], validate=True)
                    return json.loads(text, object_hook=_torch_tensor)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, TypeError, OverflowError, RecursionError, binascii.Error, struct.error):
        raise ConceptError(f"{path} is a damaged picture: its embedding cannot be read") from None
    raise ConceptError(f"{path} holds no embedding: A1111 stores it in the text chunk sd-ti-embedding")


def _chunks(file: io.BufferedReader, name: str) -> Iterator[tuple[bytes, bytes]]:
    """The text chunks of a PNG; other chunks are skipped unread."""
    if file.read(8) != PNG:
        raise ConceptError(f"{name} is not a PNG")
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind != b"tEXt":
            file.seek(length + 4, io.SEEK_CUR)
            continue
        if length > _MAX_PICTURE_TEXT:
            raise ConceptError(
                f"{name} has a text chunk of {length} bytes, but at most {_MAX_PICTURE_TEXT} are allowed"
            )
        data = file.read(length)
        if zlib.crc32(kind + data).to_bytes(4, "big") != file.read(4):
            raise ConceptError(f"{name} is a damaged picture: a text chunk's checksum is wrong")
        yield kind, data


def _torch_tensor(entry: dict[str, Any]) -> Any:
    return np.asarray(entry["TORCHTENSOR"], np.float64) if set(entry) == {"TORCHTENSOR"} else entry


def _pickled(data: bytes, name: str) -> Any:
    """The content of a file of torch.save, with tensors as arrays. Raises ConceptError for all but plain data."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _TorchUnpickler(archive, name).content
    except zipfile.BadZipFile:
        raise ConceptError(
            f"{name} is not a file of torch.save, or from before 2020: then load and save it with a newer PyTorch"
        ) from None
    except ConceptError:
        raise
    except Exception as error:  # a damaged pickle can raise anything, but it cannot run code
        raise ConceptError(f"{name} is damaged ({type(error).__name__}): it cannot be read") from None


class _ParameterDict:
    """nn.ParameterDict as data: its pickled state holds `_parameters`."""

    def __init__(self) -> None:
        self.parameters: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.parameters = dict(state.get("_parameters") or {})


class _TorchUnpickler(pickle.Unpickler):
    """Unpickles an archive of torch.save with a few allowed names, over the archive's own storages."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self._archive, self._name = archive, name
        entries = archive.infolist()
        if len(entries) > _MAX_ZIP_ENTRIES:
            raise ConceptError(
                f"{name} is an archive of {len(entries)} files, but at most {_MAX_ZIP_ENTRIES} are allowed"
            )
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > MAX_FILE_BYTES:
                raise ConceptError(f"{name} is a compressed archive, which torch.save never writes: refused as a bomb")
        pickles = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConceptError(f"{name} holds {len(pickles)} files data.pkl, torch.save writes one")
        self._folder = pickles[0].removesuffix("data.pkl")
        data = archive.read(pickles[0])
        _check_opcodes(data, name)
        super().__init__(io.BytesIO(data))
        # Created again for each file: a pickle can set attributes on these objects.
        self._names: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: self._rebuilt(*arguments),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch.nn.modules.container", "ParameterDict"): type("ParameterDict", (_ParameterDict,), {}),
            ("builtins", "set"): set,  # ParameterDict's state holds an empty one
            ("__builtin__", "set"): set,
        }
        self._storages: dict[str, npt.NDArray[Any]] = {}
        self._rebuilt_bytes = 0
        self.content = _plain(self.load())

    def find_class(self, module: str, name: str) -> Any:
        """The object for an allowed name. Raises ConceptError for any other."""
        if module == "torch" and name in _STORAGES:
            return name
        if (module, name) not in self._names:
            raise ConceptError(
                f"{self._name} refers to {f'{module}.{name}'[:80]!r}, which is not data: refused, since unpickling "
                "could run code"
            )
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> npt.NDArray[Any]:
        """A storage: the numbers in one file of the archive."""
        match pid:
            case ("storage", str(kind), str(key), str(), int()) if kind in _STORAGES and key.isdecimal():
                if key not in self._storages:
                    data = self._archive.read(f"{self._folder}data/{key}")
                    self._storages[key] = np.frombuffer(data, _STORAGES[kind])
                return self._storages[key]
            case _:
                raise ConceptError(f"{self._name}: {str(pid)[:80]!r} is not a storage of torch.save")

    def _rebuilt(self, *arguments: Any) -> npt.NDArray[Any]:
        """A tensor. Their total size is limited, since tensors may share a storage."""
        value = _tensor(*arguments)
        self._rebuilt_bytes += value.nbytes
        if self._rebuilt_bytes > _MAX_PICKLED:
            raise ConceptError(f"{self._name}: its tensors have more than {_MAX_PICKLED >> 20} MiB in all")
        return value


def _check_opcodes(data: bytes, name: str) -> None:
    """Raises ConceptError for opcodes torch.save does not write, such as all that allocate memory before they read."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in _OPCODES or count > _MAX_OPCODES:
            raise ConceptError(f"{name}: opcode {opcode.name} (number {count}) is not what torch.save writes")
        if opcode.name.endswith("PUT") and int(argument or 0) > _MAX_OPCODES:
            raise ConceptError(f"{name}: memo entry {argument} is not what torch.save writes")


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> npt.NDArray[Any]:
    """torch._utils._rebuild_tensor_v2 on an array, with every index checked."""
    values = np.asarray(storage)
    sizes, strides = [int(x) for x in size], [int(x) for x in stride]
    last = int(offset) + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if values.ndim != 1 or len(sizes) > 2 or min([*sizes, 1]) < 1 or min([*strides, int(offset)]) < 0:
        raise ConceptError(f"a tensor of shape {sizes} is not an embedding")
    if last >= len(values) or np.prod(sizes, dtype=np.float64) > len(values):
        raise ConceptError(f"a tensor of shape {sizes} reads past its {len(values)} numbers")
    view = np.lib.stride_tricks.as_strided(values[int(offset) :], sizes, [s * values.itemsize for s in strides])
    if values.dtype == _BFLOAT16:
        return (view.astype(np.uint32) << 16).view(np.float32)
    return view.copy()


_BFLOAT16: Final = np.dtype("<u2")
_STORAGES: Final[dict[str, np.dtype[Any]]] = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "DoubleStorage": np.dtype("<f8"),
    "BFloat16Storage": _BFLOAT16,
    "LongStorage": np.dtype("<i8"),
}
_OPCODES: Final = frozenset(
    {"PROTO", "STOP", "MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET", "ADDITEMS", "APPEND", "APPENDS"}
    | {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "SETITEM", "SETITEMS", "BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT"}
    | {"BININT", "BININT1", "BININT2", "LONG1", "NONE", "NEWTRUE", "NEWFALSE", "GLOBAL", "BINPERSID", "REDUCE"}
    | {"BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "NEWOBJ", "BUILD"}
)


def _plain(content: Any) -> Any:
    """The content with every ParameterDict as a dictionary."""
    if isinstance(content, _ParameterDict):
        return content.parameters
    if isinstance(content, Mapping):
        return {key: _plain(value) if isinstance(value, _ParameterDict) else value for key, value in content.items()}
    return content


def _array(value: Any, name: str) -> Vectors:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise ConceptError(f"{name}: string_to_param holds a {type(value).__name__}, not vectors")
    with np.errstate(over="ignore"):  # a number beyond float32 becomes inf, which Concept refuses
        return value.astype(np.float32)
