"""The bundle: a folder with one compiled model, described to the runtime by `bundle.json` alone.

    bundle/
      bundle.json        written last; a folder without it is not a bundle
      tokenizer*/ ...    files of the encoders' tokenizers
      *.onnx (+ data)    the graphs
      *.safetensors      the encoders' base embedding tables
      .verified.json     the hashed files, with their size, mtime and inode at that time; may be deleted
      plans/             a cache of compiled plans; may be deleted

Not covered: opening the graphs.
"""

import contextlib
import glob
import itertools
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Annotated, Any, Self

import msgspec

from oneword.engines.errors import BundleError, FileError, UsageError, one_line, one_of
from oneword.engines.files import file_digest, from_json, lock_folder, read_stamps, stamp, sync, write_stamps
from oneword.engines.graph import Graph, digest_of
from oneword.engines.plans import PlanCache
from oneword.runtime.schedule import ScheduleKind

FORMAT_VERSION = 2
MANIFEST = "bundle.json"
VERIFIED = ".verified.json"
PLANS = "plans"
TOKENIZER = "tokenizer.json"
_MAX_MANIFEST_BYTES = 8 << 20
_PARTIAL, _OLD = ".partial", ".old"
"""How the names of folders beside a bundle end while it is written, and of the bundle that it replaces."""

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
"""A count in a manifest. The limit is beyond any model, and keeps a bad manifest from exhausting memory."""
TokenId = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The origin of the weights."""

    id: str
    """A directory's name or a Hub id."""
    digest: str
    """sha256 of the weights."""
    revision: str | None = None
    license: str | None = None
    """As named in the model card."""


class Encoder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One text encoder: its graph, its base embedding table, its tokenizer."""

    graph: str
    """Name of its graph, and of the encoder in concept files: `text_encoder`, `text_encoder_2`."""
    table: str
    """Safetensors file with one tensor, `embedding_table` [vocab_size, width], in the dtype of the graph's input."""
    tokenizer: str
    """Folder with the tokenizer's `tokenizer.json`."""
    vocab_size: Count
    width: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    """D of the embedding table: the width of a learned vector."""
    hidden_width: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] | None
    """D of `hidden_states`; None for an encoder that only pools."""
    length: Annotated[int, msgspec.Meta(ge=3, le=1 << 16)]
    """Tokens of one chunk, bos and eos included."""
    bos_id: TokenId | None
    eos_id: TokenId
    pad_id: TokenId
    layers: tuple[int, ...]
    """Allowed values of the graph's `layer` input, the number of transformer layers to run. Empty if it has none."""
    default_layer: int | None
    pooled_width: int | None = None
    """P if the encoder pools (its graph then takes `eos_index` and returns `pooled`), else None."""
    masks_padding: bool = False
    """Whether its attention leaves out the tokens after eos. Its graph then takes `eos_index`, like one that pools."""
    word_optional: bool = False
    """Whether a concept may lack vectors for this encoder, whose prompt then contains the concept's text instead."""
    weighs_tokens: bool = True
    """Whether prompts may have weights. If not, they are refused, and its graph has no `token_weights` and no
    `weight_scale`."""
    prefix: Annotated[str, msgspec.Meta(max_length=1000)] = ""
    """The text before the prompt in each chunk: the start of a chat template."""
    suffix: Annotated[str, msgspec.Meta(max_length=1000)] = ""
    """The text after the prompt in each chunk, in place of eos; the chunk's eos is its last token."""


class MissingNegative(StrEnum):
    """What replaces a missing negative prompt."""

    EMPTY = "empty"  # the empty prompt, encoded
    ZEROS = "zeros"  # a context (and pooled vector) of zeros


class Conditioning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the encoders' outputs become the denoiser's context."""

    context: tuple[tuple[str, ...], ...]
    """Blocks of encoders. Within a block, hidden states are concatenated along the columns and zero-padded to the
    context's width; blocks are concatenated along the tokens."""
    pooled: tuple[str, ...] = ()
    """Encoders whose concatenated `pooled` vectors are the denoiser's `pooled` input."""
    missing_negative: MissingNegative = MissingNegative.EMPTY
    repeatable: bool = True
    """Whether a context may be repeated whole to fill T: exact in cross-attention, wrong in joint attention."""
    attended_padding: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)] | None = None
    """How many tokens of padding after a chunk's eos the denoiser attends to, by its input `context_mask` [M, T]; None
    means all, and no such input."""
    time_ids: tuple[str, ...] = ()
    """The columns of `time_ids`, from TIME_IDS."""
    width: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] | None = None
    """D of the context; None means that of the widest block."""
    zero_tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)] = 0
    """Tokens of zeros after the blocks, in place of an encoder that was left out at export."""


TIME_IDS = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width")


class Vae(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Facts about the autoencoder. Scale and shift are inside the graphs, and recorded here for information only; None
    if each channel has its own."""

    scale: float | None
    shift: float | None
    factor: Annotated[int, msgspec.Meta(ge=1, le=1 << 10)]
    """Pixels per latent along one side."""
    latent_channels: Annotated[int, msgspec.Meta(ge=1, le=1 << 10)]
    draws_posterior: bool = True
    """Whether the latents of a given picture are drawn from the encoder's posterior; else they are its mean."""


class Preview(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear map from a latent [C] to RGB in 0..1: latent @ weights + bias. Fitted to decodes at export."""

    weights: tuple[tuple[float, float, float], ...]
    """[C, 3]"""
    bias: tuple[float, float, float]


class Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of requests that do not set them."""

    width: Count
    height: Count
    steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 50
    guidance_scale: Annotated[float, msgspec.Meta(ge=0, le=100)] = 7.5
    embedded_guidance: Annotated[float, msgspec.Meta(ge=0, le=50)] | None = None
    """The guidance that a guidance-distilled network takes as an input; None for other networks."""
    sampler: str = "ddim"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`bundle.json`. Graphs: one per encoder, denoise_step, vae_decoder; optionally vae_encoder and vae_preview."""

    source: Provenance
    graphs: dict[str, Graph]
    encoders: tuple[Encoder, ...]
    conditioning: Conditioning
    columns: tuple[str, ...]
    """The columns of denoise_step's `schedule`, in order; see `oneword.runtime.samplers.COLUMNS`."""
    scheduler: dict[str, Any]
    """The scheduler's config, verbatim, `_class_name` included; null in place of infinity and NaN."""
    vae: Vae
    defaults: Defaults
    schedule: ScheduleKind = ScheduleKind.BETAS
    """The kind of noise schedule that `scheduler` describes."""
    size_multiple: Annotated[int, msgspec.Meta(ge=1, le=1 << 10)] = 8
    """Width and height of a picture must be multiples of it."""
    max_side: Count | None = None
    """The longest allowed side of a picture in pixels, if the model has such a limit."""
    preview: Preview | None = None
    files: dict[str, str] = {}
    """Relative path -> sha256 of every file of the bundle. Filled in by `write_bundle`."""
    created_by: str = "oneword"
    format_version: int = FORMAT_VERSION

    def encoder(self, name: str) -> Encoder:
        """The encoder whose graph has this name. Raises KeyError."""
        return next(encoder for encoder in self.encoders if encoder.graph == name)

    @property
    def has_preview_decoder(self) -> bool:
        """Whether there is a small decoder for previews and drafts, the graph `vae_preview`."""
        return "vae_preview" in self.graphs

    @property
    def context_width(self) -> int:
        """D of the denoiser's context."""
        return self.conditioning.width or self.widest_block

    @property
    def widest_block(self) -> int:
        """Columns of the widest block of encoders, before it is padded to D."""
        return max(sum(self.encoder(name).hidden_width or 0 for name in block) for block in self.conditioning.context)

    @property
    def layers(self) -> int:
        """L: the cross-attention layers that may each have a context of their own. Raises BundleError."""
        axes = next((spec.axes for spec in self.graphs["denoise_step"].inputs if spec.name == "branch_context"), ())
        match axes:
            case (_, 2, int(layers)) if layers > 0:
                return layers
        raise BundleError(f"denoise_step has branch_context {list(axes)}, not [N, 2, layers]: export the model again")

    def max_contexts(self, rows: int) -> int:
        """M of the denoiser for so many rows: two contexts and one for each layer's values per row, and at least what a
        single row can need, other keys and other values in every layer of both of its prompts."""
        return max(rows * (2 + self.layers), 4 * self.layers)

    @property
    def pooled_width(self) -> int:
        """P of the denoiser's pooled input; 0 if it has none."""
        return sum(self.encoder(name).pooled_width or 0 for name in self.conditioning.pooled)


class Bundle(msgspec.Struct, frozen=True):
    """A bundle on disk, complete and unchanged since it was written."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Reads the manifest and checks every file against it.

        A file is hashed once; after that its size, mtime and inode must be unchanged, or it is hashed again.

        Raises:
            UsageError: there is no bundle at `path`.
            BundleError: the bundle is broken, incomplete, changed, or of another version.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        _check_references(folder, manifest)
        _check_files(folder, manifest)
        return cls(folder, manifest)

    def file(self, relative: str) -> Path:
        """Absolute path of a file of the bundle."""
        return (self.path / relative).resolve()

    def check_unchanged(self) -> None:
        """Raises BundleError if the folder no longer holds this bundle, because ti-export has replaced it for example;
        FileError if its manifest cannot be read."""
        try:
            unchanged = _read_manifest(self.path) == self.manifest
        except (UsageError, BundleError):
            unchanged = False
        if not unchanged:
            raise BundleError(f"the bundle {self.path} was replaced or removed after it was opened: open it again")

    def graph(self, name: str) -> Graph:
        """The graph called `name`. Raises UsageError if the bundle does not have it."""
        try:
            return self.manifest.graphs[name]
        except KeyError:
            raise UsageError(
                f"the bundle {self.path} has no graph {name!r}, it has {', '.join(sorted(self.manifest.graphs))}: "
                "export the model again with ti-export"
            ) from None


def check_target(path: str | Path) -> None:
    """Raises UsageError or FileError if `write_bundle` cannot write a bundle to `path`. Nothing is created."""
    path = _target(path)
    try:
        _refuse_to_overwrite(path)
        folder = next(parent for parent in path.parents if parent.exists())
    except OSError as error:
        raise FileError(f"cannot write the bundle {path}: {error.strerror}") from error
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise FileError(f"cannot write the bundle {path}: {folder} is not a folder that you may write to")


def write_bundle(path: str | Path, fill: Callable[[Path], Manifest]) -> Bundle:
    """Writes a bundle, whole or not at all: `fill(folder)` writes the files into a folder beside `path` and returns the
    manifest (its `files` may be empty); everything is hashed, bundle.json is written last, and the folder is renamed.

    An older bundle at `path` is replaced, except for the plans of unchanged graphs, which stay valid. Any other
    non-empty folder, a bundle with foreign files in it, a file and a mount point are refused. What a killed process
    left beside `path` is deleted, and an older bundle that it had moved away is put back. A link stays, and the folder
    that it leads to is replaced.
    """
    path = _target(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _recover(path)
        _refuse_to_overwrite(path)
        staging, lock = _new_staging(path)
    except OSError as error:
        raise FileError(f"cannot write the bundle {path}: {error.strerror}") from error
    try:
        staging.chmod(0o755)
        manifest = fill(staging)
        relative = sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
        for name in relative:
            (staging / name).chmod(0o644)  # safetensors makes its files readable by their owner only
        stats = {name: (staging / name).stat() for name in relative}
        files = {name: file_digest(staging / name) for name in relative}
        manifest = msgspec.structs.replace(manifest, files=files)
        _check_references(staging, manifest)
        write_stamps(staging / VERIFIED, {name: stamp(digest, stats[name]) for name, digest in files.items()})
        for name in relative:
            sync(staging / name)
        (staging / MANIFEST).write_bytes(_encoded(manifest))
        sync(staging / MANIFEST)
        sync(staging)
        _move_into_place(staging, path)
        for index in (path / PLANS).glob("*/index.json"):
            with contextlib.suppress(FileError):  # plans of graphs that are gone only take space
                PlanCache(index.parent).keep_graphs({graph.digest for graph in manifest.graphs.values()})
    except OSError as error:
        raise FileError(f"cannot write the bundle {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)
    return Bundle.open(path)


def _target(path: str | Path) -> Path:
    """The absolute path of the folder itself, if `path` is a link to it."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path).absolute()


def _encoded(manifest: Manifest) -> bytes:
    """The content of bundle.json; infinity and NaN become null. Raises BundleError if it could not be read again."""
    try:
        data = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        from_json(data, Manifest)
    except ValueError as error:
        raise BundleError(
            f"the manifest would not be valid ({one_line(error)}): check the configs of the model that is exported"
        ) from error
    return data + b"\n"


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is larger than {_MAX_MANIFEST_BYTES >> 20} MiB: it is not a manifest")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{folder} is not a bundle (no {MANIFEST}): make one with ti-export MODEL {folder}") from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from error
    try:
        version = from_json(data, _Version).format_version
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{path} has format version {version}, this oneword reads {FORMAT_VERSION}: "
                f"export the model again with ti-export MODEL {folder}"
            )
        return from_json(data, Manifest)
    except ValueError as error:
        raise BundleError(
            f"{path} is not a valid manifest ({one_line(error)}): export the model to a new folder with ti-export"
        ) from error


class _Version(msgspec.Struct):
    format_version: int


class _Listing(_Version):
    """What is read of a manifest of any format before it is replaced."""

    files: dict[str, str]


def _check_references(folder: Path, manifest: Manifest) -> None:
    """Raises BundleError if the manifest refers to a file, graph or encoder that it does not have."""
    graphs, encoders = manifest.graphs, {encoder.graph: encoder for encoder in manifest.encoders}
    for required in ("denoise_step", "vae_decoder", *encoders):
        if required not in graphs:
            raise _invalid(f"the bundle {folder} has no graph {required!r}")
    conditioning = manifest.conditioning
    for name in (*itertools.chain.from_iterable(conditioning.context), *conditioning.pooled):
        if name not in encoders:
            raise _invalid(f"the bundle {folder} conditions on {name!r}, which is not one of its encoders")
    if any(encoders[name].hidden_width is None for block in conditioning.context for name in block):
        raise _invalid(f"the bundle {folder} has an encoder without hidden states in its context")
    if any(encoders[name].pooled_width is None for name in conditioning.pooled):
        raise _invalid(f"the bundle {folder} pools an encoder that does not pool")
    if not conditioning.context or not all(conditioning.context):
        raise _invalid(f"the bundle {folder} has no context, or a block of it without encoders")
    if conditioning.width is not None and conditioning.width < manifest.widest_block:
        raise _invalid(f"the bundle {folder} has a block of encoders that is wider than its context")
    masked = any(spec.name == "context_mask" for spec in graphs["denoise_step"].inputs)
    if masked != (conditioning.attended_padding is not None):
        raise _invalid(f"the bundle {folder} has attended_padding without a context_mask, or the reverse")
    if unknown := set(conditioning.time_ids) - set(TIME_IDS):
        raise _invalid(f"the bundle {folder} has the time id {min(unknown)!r}, but each must be {one_of(TIME_IDS)}")
    for name, graph in graphs.items():
        if not graph.files:
            raise _invalid(f"graph {name!r} of the bundle {folder} has no file")
        if len(set(graph.files)) != len(graph.files):
            raise _invalid(f"graph {name!r} of the bundle {folder} names a file twice")
    listed = [name for graph in graphs.values() for name in graph.all_files]
    tokenizers = (f"{encoder.tokenizer}/{TOKENIZER}" for encoder in manifest.encoders)
    for name in [*listed, *(encoder.table for encoder in manifest.encoders), *tokenizers]:
        if name not in manifest.files:
            raise _invalid(f"{name} is not among the hashed files of the bundle {folder}")
    steps = [spec for spec in graphs["denoise_step"].inputs if spec.name == "schedule"]
    if steps and steps[0].axes[-1:] != (len(manifest.columns),):
        raise _invalid(f"the bundle {folder} names {len(manifest.columns)} columns, its schedule is {steps[0]}")
    if manifest.preview is not None and len(manifest.preview.weights) != manifest.vae.latent_channels:
        raise _invalid(f"the bundle {folder} has a preview whose channels differ from its latents'")
    if manifest.size_multiple % manifest.vae.factor:
        raise _invalid(f"the bundle {folder} has sizes in multiples of {manifest.size_multiple} pixels, not latents")
    for encoder in manifest.encoders:
        widths = {spec.name: spec.axes[-1:] for spec in graphs[encoder.graph].outputs}
        for output, width in (("hidden_states", encoder.hidden_width), ("pooled", encoder.pooled_width)):
            if widths.get(output, (width,)) != (width,):
                raise _invalid(
                    f"encoder {encoder.graph!r} of the bundle {folder} has {output} whose width is not {width}"
                )
        if (encoder.default_layer is None) != (not encoder.layers):
            raise _invalid(
                f"encoder {encoder.graph!r} of the bundle {folder} has layers without a default, or the reverse"
            )
        if encoder.layers and encoder.default_layer not in encoder.layers:
            raise _invalid(f"encoder {encoder.graph!r} of the bundle {folder} has no layer {encoder.default_layer}")
    for name in (*manifest.files, *(encoder.tokenizer for encoder in manifest.encoders)):
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or ":" in name:
            raise _invalid(f"the bundle {folder} names {name!r}, which is outside it")


def _invalid(problem: str) -> BundleError:
    return BundleError(f"{problem}: export the model again with ti-export")


def _check_files(folder: Path, manifest: Manifest) -> None:
    root = folder.resolve()
    if stray := next(_strays(folder, manifest.files), None):
        raise BundleError(f"{folder / stray} is not part of the bundle but could pass for it: move it elsewhere")
    in_graphs = {name for graph in manifest.graphs.values() for name in graph.all_files}
    remembered = read_stamps(folder / VERIFIED)
    stamps = {}
    for name, digest in manifest.files.items():
        path = folder / name
        if not Path(os.path.realpath(path)).is_relative_to(root):  # Path.resolve raises if links go round in circles
            raise BundleError(f"{path} is a link that leaves the bundle: copy the file itself")
        try:
            stat = path.stat()
            stamps[name] = stamp(digest, stat)  # taken before the hash: a change during it is noticed next time
            if not S_ISREG(stat.st_mode):
                raise BundleError(f"{path} is not a file: copy or export the bundle again")
            if name in in_graphs and stat.st_nlink > 1:
                raise BundleError(
                    f"{path} is hard-linked, so it can change through another path: copy it (cp --no-preserve=links)"
                )
            if remembered.get(name) != stamps[name] and file_digest(path) != digest:
                raise BundleError(f"{path} has changed since it was exported (sha256 differs): copy or export it again")
        except FileNotFoundError:
            raise BundleError(f"{path} is missing: the bundle is incomplete, copy or export it again") from None
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror}") from error
    for name, graph in manifest.graphs.items():
        if digest_of(manifest.files[file] for file in graph.files) != graph.digest:
            raise BundleError(f"graph {name!r} of the bundle {folder} does not match its digest: export it again")
    if stamps != remembered:
        write_stamps(folder / VERIFIED, stamps)


def _strays(folder: Path, files: Iterable[str]) -> Iterator[str]:
    """Files and links to folders that are not part of a bundle with these files; its plans are ignored."""
    expected = {*files, MANIFEST}
    for root, folders, names in os.walk(folder):
        inside = Path(root).relative_to(folder)
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        if root == os.fspath(folder):
            folders[:] = [name for name in folders if name != PLANS]
        for name in sorted((*names, *links)):
            relative = (inside / name).as_posix()
            if relative not in expected and not relative.startswith(VERIFIED):
                yield relative


def _refuse_to_overwrite(path: Path) -> None:
    if os.path.ismount(path):
        raise UsageError(f"{path} is a mount point, which cannot be replaced: choose a folder in it")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        files = from_json((path / MANIFEST).read_bytes(), _Listing).files
    except (OSError, ValueError):
        raise UsageError(f"{path} exists and is not a bundle: choose a new folder") from None
    if stray := next(_strays(path, files), None):
        raise UsageError(f"{path} holds {stray}, which is not part of the bundle: move it, or choose a new folder")


def _new_staging(path: Path) -> tuple[Path, int | None]:
    """A folder beside a bundle to write it in, and the descriptor of its lock; None where there are no locks."""
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.{_host()}-", suffix=_PARTIAL, dir=path.parent))
        try:
            lock = lock_folder(staging)
        except FileNotFoundError:
            continue
        except OSError:
            return staging, None
        if lock is not None:  # else another process found it before it was locked, and deletes it
            return staging, lock


def _recover(path: Path) -> None:
    """Deletes what killed processes left of bundles that they wrote to `path`, and puts back what they replaced.

    Folders of other hosts, whose locks may not be seen here, are left alone.
    """
    for partial in _beside(path, f"{_host()}-*", _PARTIAL):
        with contextlib.suppress(OSError):  # it is gone, or cannot be locked
            if (lock := lock_folder(partial)) is not None:  # else it is being written
                shutil.rmtree(partial, ignore_errors=True)
                os.close(lock)
    for old in _beside(path, "*", _OLD):
        if old.with_suffix(_PARTIAL).exists():
            continue
        if path.exists():
            _discard(old, path)
        else:
            os.rename(old, path)


def _beside(path: Path, stem: str, suffix: str) -> list[Path]:
    """The folders beside a bundle with such names. Those of another bundle, such as sd1.5 beside sd1, have a dot."""
    start = f".{path.name}."
    found = path.parent.glob(f"{glob.escape(start)}{stem}{suffix}")
    return [folder for folder in found if "." not in folder.name.removeprefix(start).removesuffix(suffix)]


def _host() -> str:
    """This host's name, as a part of a file's name without dots."""
    return re.sub(r"\W", "_", socket.gethostname())[:40]


def _move_into_place(staging: Path, path: Path) -> None:
    old = staging.with_suffix(_OLD)
    if not path.exists():
        os.rename(staging, path)
    else:
        os.rename(path, old)
        try:
            os.rename(staging, path)
        except OSError:
            os.rename(old, path)
            raise
    sync(path.parent)
    if old.exists():
        _discard(old, path)


def _discard(old: Path, path: Path) -> None:
    """Deletes a bundle that another one has replaced, which gets its plans."""
    if (old / PLANS).is_dir() and not (old / PLANS).is_symlink():
        with contextlib.suppress(OSError):  # a process that opened the new bundle has made plans already
            os.rename(old / PLANS, path / PLANS)
    shutil.rmtree(old, ignore_errors=True)
