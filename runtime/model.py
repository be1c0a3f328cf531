"""A bundle made ready: tokenizers, embedding tables and engines behind `tokenize`, `encode`, `decode`.

An engine is opened when it is first needed, and once. Loading a concept writes rows of a table; no engine notices.
Not here: who is denoised together with whom (`oneword.runtime.batch`).
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors

from oneword.engines.bundle import Bundle, Encoder, MissingNegative
from oneword.engines.engine import Array, Binding, Engine, NumpyArray
from oneword.engines.errors import BundleError, ConceptError, NotFinite, UsageError
from oneword.engines.loop import Loop
from oneword.engines.open import Backend, open_engine, queue_of
from oneword.runtime.concept import Concept
from oneword.runtime.prompt import PromptTokens, Tokenizer, Vocabulary, encode_ids
from oneword.runtime.request import Image
from oneword.runtime.table import DEFAULT_CAPACITY, EmbeddingTable

_BINDINGS = 8
_CONTEXTS = 256

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Tokens:
    """A tokenized prompt: ids and weights for every encoder, and how many of the encoders' last layers are skipped.

    The ids of learned words are held in the tables until `Model.release` is called.
    """

    per_encoder: Mapping[str, PromptTokens]
    clip_skip: int
    key: bytes
    """Equal keys are equal contexts, as long as no word is unloaded."""


@dataclass(frozen=True, eq=False)
class Context:
    """An encoded prompt: what the denoiser attends to."""

    hidden_states: npt.NDArray[np.float32]  # [chunks * T, D]
    pooled: npt.NDArray[np.float32] | None  # [P]
    finite: bool


@dataclass(eq=False)
class StepBinding:
    """The loop over `denoise_step` at some sizes, and notes of its users on what its buffers hold."""

    loop: Loop
    written: object = None
    user: object = None


class Model:
    """One bundle, ready to encode prompts, denoise and decode. Not to be called from two threads at once."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend = Backend.ONNXRUNTIME,
        threads: int | None = None,
        capacity: int = DEFAULT_CAPACITY,
    ) -> None:
        """`capacity` is the number of learned vectors that can be loaded at a time; a host pays for what is used."""
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.backend = backend
        self.opened: dict[str, float] = {}
        """Seconds that opening each engine took, in the order they were opened; an engine is opened once."""
        self._threads = threads
        self._engines: dict[str, Engine] = {}
        self._queue = queue_of(backend)
        self._steps: OrderedDict[tuple[int, ...], StepBinding] = OrderedDict()
        self._encoders: OrderedDict[tuple[str, int], Binding] = OrderedDict()
        self._contexts: OrderedDict[bytes, Context] = OrderedDict()
        self._words: dict[str, dict[str, tuple[int, ...]]] = {encoder.graph: {} for encoder in self.manifest.encoders}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._tables: dict[str, EmbeddingTable] = {}
        for encoder in self.manifest.encoders:
            self._tokenizers[encoder.graph] = Tokenizer(bundle.file(encoder.tokenizer), encoder)
            self._tables[encoder.graph] = EmbeddingTable(
                _base_table(bundle.file(encoder.table)), capacity, self._queue.put
            )

    @classmethod
    def open(
        cls,
        path: str | Path,
        backend: Backend = Backend.ONNXRUNTIME,
        threads: int | None = None,
        capacity: int = DEFAULT_CAPACITY,
    ) -> Self:
        """Opens the bundle at `path`. Raises UsageError where there is none, BundleError where it is broken."""
        return cls(Bundle.open(path), backend, threads, capacity)

    @property
    def words(self) -> tuple[str, ...]:
        """The learned words that prompts may use now."""
        return tuple(next(iter(self._words.values())))

    @property
    def gpu_mib(self) -> int | None:
        """MiB of the GPU's memory in use now, by whomever; None where the back end has no GPU."""
        used = self._queue.memory_in_use()
        return None if used is None else used >> 20

    def engine(self, name: str) -> Engine:
        """The engine of a graph, opened at the first call."""
        if name not in self._engines:
            start = time.perf_counter()
            self._engines[name] = open_engine(self.bundle, name, self.backend, self._threads)
            self.opened[name] = time.perf_counter() - start
        return self._engines[name]

    def load(self, concept: Concept) -> None:
        """Makes a word usable in prompts from now on. Raises ConceptError where it was made for another model."""
        missing = self._tables.keys() - concept.vectors.keys()
        if missing or concept.vectors.keys() - self._tables.keys():
            raise ConceptError(
                f"{concept.token!r} has vectors for {', '.join(sorted(concept.vectors))}, "
                f"this model's encoders are {', '.join(sorted(self._tables))}: learn the word for this model"
            )
        for encoder in self.manifest.encoders:
            width = concept.vectors[encoder.graph].shape[1]
            if width != encoder.width:
                raise ConceptError(
                    f"{concept.token!r} has vectors {width} wide, {encoder.graph} of this model takes {encoder.width}: "
                    "learn the word for this model"
                )
        for name, table in self._tables.items():
            table.check(concept.token, concept.vectors[name])  # in all, before any is written
        for name, table in self._tables.items():
            self._words[name][concept.token] = tuple(table.load(concept.token, concept.vectors[name]))
        self._contexts.clear()

    def unload(self, token: str) -> None:
        """Frees a word's rows once no prompt that uses them waits to be encoded. Raises UsageError if it is unknown."""
        if any(token not in words for words in self._words.values()):
            raise UsageError(f"no word {token!r} is loaded; loaded are {', '.join(self.words) or 'none'}")
        for name, table in self._tables.items():
            table.unload(token)
            del self._words[name][token]
        self._contexts.clear()

    def tokenize(self, prompt: str, clip_skip: int = 0) -> Tokens:
        """Splits a prompt at the known words and holds their rows. Raises UsageError for a word that is not loaded."""
        for encoder in self.manifest.encoders:
            if encoder.default_layer - clip_skip not in encoder.layers:
                most = encoder.default_layer - min(encoder.layers)
                raise UsageError(f"clip_skip is {clip_skip}, this model allows 0 to {most}")
        per_encoder = {
            name: encode_ids(prompt, tokenizer, Vocabulary(self._words[name]))
            for name, tokenizer in self._tokenizers.items()
        }
        for name, tokens in per_encoder.items():
            self._tables[name].hold(tokens.input_ids)
        parts = [t.input_ids.tobytes() + t.token_weights.tobytes() for t in per_encoder.values()]
        return Tokens(per_encoder, clip_skip, b"%d:" % clip_skip + b"|".join(parts))

    def release(self, tokens: Tokens) -> None:
        """Lets go of the rows that `tokenize` held."""
        for name, each in tokens.per_encoder.items():
            self._tables[name].release(each.input_ids)

    def encode(self, prompts: Sequence[Tokens]) -> list[Context]:
        """Encodes prompts of any lengths in one call per encoder; equal prompts are one Context, now and later."""
        new = list({tokens.key: tokens for tokens in prompts if tokens.key not in self._contexts}.values())
        if new:
            for tokens, context in zip(new, self._encode(new), strict=True):
                self._contexts[tokens.key] = context
        contexts = [self._contexts[tokens.key] for tokens in prompts]
        for tokens in prompts:
            self._contexts.move_to_end(tokens.key)
        while len(self._contexts) > _CONTEXTS:
            self._contexts.popitem(last=False)
        return contexts

    def missing_negative(self, clip_skip: int = 0) -> Tokens | Context:
        """What stands for a negative prompt that was not given."""
        if self.manifest.conditioning.missing_negative is MissingNegative.EMPTY:
            return self.tokenize("", clip_skip)
        encoders = [self.bundle.encoder(name) for name in self.manifest.conditioning.context]
        hidden = np.zeros((encoders[0].length, sum(encoder.hidden_width for encoder in encoders)), np.float32)
        pooled = self.manifest.conditioning.pooled
        width = self.bundle.encoder(pooled).pooled_width if pooled else None
        return Context(hidden, None if width is None else np.zeros(width, np.float32), finite=True)

    def encode_image(self, image: Image) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The VAE posterior of a picture [H, W, 3]: mean and std, both [C, h, w], as the sampler knows latents."""
        out = self.engine("vae_encoder").run({"images": np.ascontiguousarray(image)[None]})
        if not out["finite"].all():
            raise NotFinite("graph 'vae_encoder' gave NaN or infinity for the picture: export it with --precision fp32")
        return out["mean"][0], out["std"][0]

    def decode(self, latents: npt.NDArray[np.float32]) -> tuple[Image, npt.NDArray[np.bool_]]:
        """Latents [B, C, h, w] become pictures uint8 [B, H, W, 3], and whether each is finite [B]."""
        out = self.engine("vae_decoder").run({"latents": latents})
        return out["images"], out["finite"]

    def bind_step(self, rows: int, branches: int, contexts: int, tokens: int, height: int, width: int) -> StepBinding:
        """`denoise_step` at these sizes (B, N, M, T, h, w); the last few are kept, with what was written into them."""
        key = (rows, branches, contexts, tokens, height, width)

        def bind() -> StepBinding:
            sizes: dict[str, int] = dict(zip(("B", "N", "M", "T", "h", "w"), key, strict=True))
            return StepBinding(Loop(self._bind("denoise_step", sizes), self._queue))

        return _recent(self._steps, key, bind)

    def forget_bindings(self) -> None:
        """Lets go of all buffers, where memory may have run out; they are made again when they are asked for."""
        self._steps.clear()
        self._encoders.clear()

    def _bind(self, graph: str, sizes: Mapping[str, int], **arrays: Array) -> Binding:
        engine = self.engine(graph)
        shapes = {
            name: [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes]
            for name, spec in engine.inputs.items()
            if name not in arrays
        }
        return engine.bind(shapes, arrays)

    def _bind_encoder(self, encoder: Encoder, rows: int) -> Binding:
        """A text encoder over its table, which lies where the engine reads it."""

        def bind() -> Binding:
            sizes = {"B": rows, "T": encoder.length}
            return self._bind(encoder.graph, sizes, embedding_table=self._tables[encoder.graph].array)

        return _recent(self._encoders, (encoder.graph, rows), bind)

    def _encode(self, prompts: Sequence[Tokens]) -> list[Context]:
        """One call per encoder over the chunks of all prompts; then the encoders' columns are put side by side."""
        states: dict[str, list[npt.NDArray[np.float32]]] = {}
        pooled: list[npt.NDArray[np.float32]] | None = None
        finite = np.ones(len(prompts), np.bool_)
        for encoder in self.manifest.encoders:
            each = [tokens.per_encoder[encoder.graph] for tokens in prompts]
            counts = [len(tokens.input_ids) for tokens in each]
            layers = [encoder.default_layer - tokens.clip_skip for tokens in prompts]
            feeds: dict[str, NumpyArray] = {
                "input_ids": np.concatenate([tokens.input_ids for tokens in each]),
                "token_weights": np.concatenate([tokens.token_weights for tokens in each]),
                "layer": np.repeat(np.array(layers, np.int64), counts),
            }
            binding = self._bind_encoder(encoder, sum(counts))
            if "eos_index" in binding.inputs:
                feeds["eos_index"] = np.concatenate([tokens.eos_index for tokens in each])
            for name, value in feeds.items():
                binding.inputs[name].write(..., value)
            binding.run()
            out = {name: value.numpy().copy() for name, value in binding.outputs.items()}
            first = np.cumsum([0, *counts[:-1]])
            finite &= np.logical_and.reduceat(out["finite"], first)
            chunks = np.split(out["hidden_states"], first[1:])
            states[encoder.graph] = [chunk.reshape(-1, chunk.shape[-1]) for chunk in chunks]
            if encoder.graph == self.manifest.conditioning.pooled:
                pooled = list(out["pooled"][first])  # of the first chunk, as A1111 does
        contexts = []
        for i in range(len(prompts)):
            columns = [states[name][i] for name in self.manifest.conditioning.context]
            length = math.lcm(*(len(column) for column in columns))
            hidden = np.concatenate([np.tile(column, (length // len(column), 1)) for column in columns], axis=1)
            contexts.append(Context(hidden, None if pooled is None else pooled[i], bool(finite[i])))
        return contexts


def _recent(kept: OrderedDict[Key, Value], key: Key, make: Callable[[], Value]) -> Value:
    """What is kept under the key, made where it is not; only the last few asked for are kept."""
    if key not in kept:
        kept[key] = make()
    kept.move_to_end(key)
    while len(kept) > _BINDINGS:
        kept.popitem(last=False)
    return kept[key]


def _base_table(path: Path) -> NumpyArray:
    """[V, D]; bfloat16 as its bits, as engines take it."""
    try:
        [(name, tensor)] = safetensors.deserialize(path.read_bytes())
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[tensor["dtype"]]
        if name != "embedding_table":
            raise KeyError(name)
        return np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise BundleError(
            f"{path} holds no embedding_table ({error}): export the model again with ti-export"
        ) from error
