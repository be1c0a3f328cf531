"""A model that is ready to run: tokenizers, embedding tables and engines behind `tokenize`, `encode` and `decode`.

Each engine is opened once: when it is needed, or before that in the background. Loading a concept only writes rows of a
table. Not covered: which pictures are denoised together (`oneword.runtime.scheduler`).
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from oneword.engines.engine import Engine, HostStream, NumpyArray, Stream
from oneword.engines.errors import BundleError, ConceptError, NotFinite, UsageError
from oneword.engines.open import Backend, EngineOptions, open_engine, stream_of
from oneword.runtime.backends import AUTO, choose_backend
from oneword.runtime.batched import CALLS, BatchedGraph
from oneword.runtime.bundle import PLANS, Bundle, Encoder, Manifest, MissingNegative
from oneword.runtime.concept import Concept, Vectors, load_concept
from oneword.runtime.contexts import EncodedPrompt, Insertion, insertions_of
from oneword.runtime.images import preview_image
from oneword.runtime.profiles import DEFAULT_LIMITS, graph_ranges
from oneword.runtime.prompt import Chunks, Tokenizer, Vocabulary, encode_ids
from oneword.runtime.request import Image
from oneword.runtime.reuse_cache import ReuseCache
from oneword.runtime.samplers import COLUMNS
from oneword.runtime.table import DEFAULT_CAPACITY, EmbeddingTable, base_table

_CACHED_PROMPTS: Final = 512
_CACHED_PICTURES: Final = 64
_CACHED_BYTES: Final = 256 << 20


@dataclass(frozen=True, eq=False)
class TokenizedPrompt:
    """A prompt as ids and weights for every encoder, with the learned words that it uses."""

    per_encoder: Mapping[str, Chunks]
    clip_skip: int
    key: bytes
    """Equal keys mean equal contexts: a word enters the key by its vectors, not by its name."""
    of_layer: bool = False
    """Whether it is the prompt with one cross-attention layer's rows."""
    layered: "tuple[TokenizedPrompt, ...]" = ()
    """The prompt with each cross-attention layer's rows, if a word has rows for each layer."""

    @property
    def chunks(self) -> int:
        """The number of chunks for the first text encoder."""
        return len(next(iter(self.per_encoder.values())).input_ids)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The learned words in the prompt."""
        return next(iter(self.per_encoder.values())).concepts

    @property
    def precise_words(self) -> list[Concept]:
        """The learned words with output vectors, once for each encoder that these are for."""
        return [c for name, chunks in self.per_encoder.items() for c in chunks.concepts if name in c.out]


class Model:
    """One model, ready to encode prompts, denoise and decode. Not thread-safe."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizers: Mapping[str, Tokenizer],
        tables: Mapping[str, NumpyArray],
        open_graph: Callable[[str], Engine],
        stream: Stream | None = None,
        capacity: int = DEFAULT_CAPACITY,
    ) -> None:
        """`tables` are the encoders' base tables [V, D]; `capacity` is as for `Model.open`, which most callers should
        use."""
        refuse_unsupported(manifest)
        self.manifest = manifest
        self.stream = HostStream() if stream is None else stream
        self.opened: dict[str, float] = {}
        """Seconds it took to open each engine, in the order of opening."""
        self.backend_reason: str = ""
        """Why `auto` chose this backend; empty if it was named."""
        self.encoded_chunks = 0
        """Chunks of prompts that the first text encoder has encoded so far; those in the cache count once."""
        self.encoding_seconds = 0.0
        """Time spent on encoding prompts so far."""
        self._open_graph = open_graph
        self._engines: dict[str, Engine] = {}
        self._ahead: dict[str, Future[Engine]] = {}
        self._batched: dict[str, BatchedGraph] = {}
        self._contexts: ReuseCache[EncodedPrompt] = ReuseCache(_CACHED_PROMPTS, _CACHED_BYTES)
        self._posteriors: ReuseCache[npt.NDArray[np.float32]] = ReuseCache(_CACHED_PICTURES, _CACHED_BYTES)
        self._zeros: EncodedPrompt | None = None
        self._words: dict[str, Concept] = {}
        self._tokenizers = dict(tokenizers)
        self._tables = {name: EmbeddingTable(table, capacity, self.stream.put) for name, table in tables.items()}

    @classmethod
    def open(
        cls,
        path: str | Path,
        backend: Backend | str = AUTO,
        *,
        concepts: Iterable[str | Path | Concept] = (),
        threads: int | None = None,
        capacity: int | None = None,
    ) -> Self:
        """Opens the bundle at `path`, and loads `concepts`.

        `backend` is one of Backend, or "auto" for the fastest that is installed and has what it needs. `threads` is the
        number of CPU threads. `capacity` is the number of learned vectors in an encoder's table at the same time; more
        can be loaded.

        Raises UsageError if there is no bundle, no such backend or no file of a word, BundleError if the bundle is
        broken, ConceptError.
        """
        bundle = Bundle.open(path)
        chosen, reason = choose_backend(bundle, backend)
        words = [concept if isinstance(concept, Concept) else load_concept(Path(concept)) for concept in concepts]
        rows = sum(max(map(len, word.vectors.values())) for word in words)

        def open_graph(name: str) -> Engine:
            ranges = graph_ranges(bundle.manifest, name, DEFAULT_LIMITS)
            options = EngineOptions(threads, bundle.path / PLANS, ranges)
            bundle.check_unchanged()  # before plans are built from it
            engine = open_engine(chosen, name, bundle.graph(name), bundle.path, options)
            bundle.check_unchanged()  # it was not replaced meanwhile
            return engine

        encoders = bundle.manifest.encoders
        model = cls(
            bundle.manifest,
            {encoder.graph: Tokenizer.read(bundle.file(encoder.tokenizer), encoder) for encoder in encoders},
            {encoder.graph: base_table(bundle.file(encoder.table)) for encoder in encoders},
            open_graph,
            stream_of(chosen),
            max(DEFAULT_CAPACITY, rows) if capacity is None else capacity,
        )
        model.backend_reason = reason
        for word in words:
            model.load(word)
        return model

    @property
    def name(self) -> str:
        """The model's name: the last part of its weights' id."""
        return Path(self.manifest.source.id).name

    @property
    def words(self) -> tuple[str, ...]:
        """The learned words that are loaded."""
        return tuple(self._words)

    @property
    def resident(self) -> int:
        """Learned words whose rows are in the embedding tables now."""
        return max(table.resident for table in self._tables.values())

    @property
    def gpu_mib(self) -> int | None:
        """MiB of GPU memory in use by all processes; None without a GPU."""
        used = self.stream.memory_in_use()
        return None if used is None else used >> 20

    def engine(self, name: str) -> Engine:
        """The engine of a graph, opened at the first call. Waits for one that is being opened in the background."""
        if name not in self._engines:
            ahead = self._ahead.pop(name, None)
            self._engines[name] = self._timed_open(name) if ahead is None else ahead.result()
        return self._engines[name]

    def open_ahead(self, names: Iterable[str]) -> None:
        """Starts to open these engines in the background, in order; an error appears when the engine is needed. Call
        `stop_opening` when they are no longer needed.

        Only on the host: engines of a device share its stream and are opened when they are needed.
        """
        new = [name for name in names if name not in self._engines and name not in self._ahead]
        if self.stream.depth == 0 and new:
            executor = ThreadPoolExecutor(1, "oneword-open")
            self._ahead |= {name: executor.submit(self._timed_open, name) for name in new}
            executor.shutdown(wait=False)

    def stop_opening(self) -> None:
        """Cancels the opens that are still waiting, which would keep the process from ending. Those engines are opened
        when they are needed; the one that is being opened is not interrupted."""
        self._ahead = {name: future for name, future in self._ahead.items() if not future.cancel()}

    def _timed_open(self, name: str) -> Engine:
        start = time.perf_counter()
        engine = self._open_graph(name)
        self.opened[name] = time.perf_counter() - start
        return engine

    def load(self, concept: Concept) -> None:
        """Loads a word: from now on prompts can use it. Its rows are written when a prompt first does.

        Raises ConceptError if the word was learned for another model, or if a word with its name is loaded.
        """
        if concept.token in self._words:
            raise ConceptError(f"{concept.token!r} is already loaded: unload it first")
        self._check(concept)
        self._words[concept.token] = concept

    def unload(self, token: str) -> None:
        """Unloads a word; prompts that wait to be encoded keep it. Raises UsageError if it is not loaded."""
        if token not in self._words:
            similar = ", ".join(Vocabulary(self._words).near(token)) or "none"
            raise UsageError(f"no word {token!r} is loaded, similar words: {similar}")
        del self._words[token]

    def _check(self, concept: Concept) -> None:
        """Raises ConceptError for a word that this model cannot use."""
        check_fits(concept, self.manifest)
        for name, table in self._tables.items():
            if (count := len(concept.vectors.get(name, ()))) > table.capacity:
                raise ConceptError(
                    f"{concept.token!r} has {count} vectors, the embedding table has room for {table.capacity}: "
                    f"open the model with capacity={count}"
                )

    def tokenize(self, prompt: str, clip_skip: int = 0, words: Mapping[str, Concept] | None = None) -> TokenizedPrompt:
        """Splits a prompt at learned words: those in `words`, by token, or by default those that are loaded.

        Raises UsageError for an unknown word and for output vectors of another layer than `clip_skip` leaves,
        ConceptError for one of `words` that was learned for another model.
        """
        for concept in () if words is None else words.values():
            self._check(concept)
        vocabulary = Vocabulary(self._words if words is None else words, ignore_case=True)
        chunks = {name: encode_ids(prompt, tokenizer, vocabulary, name) for name, tokenizer in self._tokenizers.items()}
        tokens = _tokenized(chunks, clip_skip)
        for concept in tokens.concepts:
            check_clip_skip(concept, self.manifest, clip_skip)
        for name, table in self._tables.items():
            table.check(_vectors([tokens], name))
        return self.evened([tokens])[0]

    def evened(self, prompts: Sequence[TokenizedPrompt]) -> list[TokenizedPrompt]:
        """The prompts with contexts of equal length, if contexts may not be repeated: every encoder of a block gets as
        many chunks as the longest prompt has in that block, the additional ones empty."""
        if self.manifest.conditioning.repeatable:
            return [*prompts]
        counts = {
            name: max(len(prompt.per_encoder[other].input_ids) for prompt in prompts for other in block)
            for block in self.manifest.conditioning.context
            for name in block
        }
        return [
            _tokenized(
                {
                    name: chunks.extended(counts.get(name, len(chunks.input_ids)), self._tokenizers[name])
                    for name, chunks in prompt.per_encoder.items()
                },
                prompt.clip_skip,
            )
            for prompt in prompts
        ]

    def context_length(self, tokens: TokenizedPrompt) -> int:
        """T of the prompt's context."""
        conditioning = self.manifest.conditioning
        return conditioning.zero_tokens + sum(
            math.lcm(*(tokens.per_encoder[name].input_ids.size for name in block)) for block in conditioning.context
        )

    def encode(
        self, prompts: Sequence[TokenizedPrompt], layers: Mapping[bytes, EncodedPrompt] | None = None
    ) -> list[EncodedPrompt]:
        """Encodes prompts of any lengths. Equal prompts share one EncodedPrompt, also across calls (cached).

        `layers` has prompts of single layers that earlier calls have encoded, by key; they are cached as part of the
        whole prompt only.
        """
        distinct = {tokens.key: tokens for tokens in prompts}
        contexts = {key: context for key in distinct if (context := self._contexts.get(key)) is not None}
        new = [tokens for key, tokens in distinct.items() if key not in contexts]
        encoded = dict(layers or {})
        parts = {part.key: part for tokens in new for part in (*tokens.layered, tokens)}
        missing = [part for key, part in parts.items() if key not in encoded]
        for together in self._groups(missing):
            start = time.perf_counter()
            try:
                encoded |= zip((tokens.key for tokens in together), self._encode(together), strict=True)
                self.encoded_chunks += sum(tokens.chunks for tokens in together)
            finally:  # what fails takes time too
                self.encoding_seconds += time.perf_counter() - start
        for tokens in new:
            pooled = encoded[tokens.key].pooled  # one for all layers
            layered = tuple(replace(encoded[prompt.key], pooled=pooled) for prompt in tokens.layered)
            finite = all(prompt.finite for prompt in (encoded[tokens.key], *layered))
            contexts[tokens.key] = replace(encoded[tokens.key], layered=layered, finite=finite)
            if not tokens.of_layer:
                self._contexts.put(tokens.key, contexts[tokens.key])
        return [contexts[tokens.key] for tokens in prompts]

    def cached(self, prompts: Iterable[TokenizedPrompt]) -> dict[TokenizedPrompt, EncodedPrompt]:
        """The prompts that need not be encoded, as earlier calls of `encode` returned them."""
        contexts = {prompt: self._contexts.get(prompt.key) for prompt in prompts}
        return {prompt: context for prompt, context in contexts.items() if context is not None}

    def is_cached(self, prompt: TokenizedPrompt) -> bool:
        """Whether the prompt need not be encoded."""
        return prompt.key in self._contexts

    def missing_negative(self, clip_skip: int = 0) -> TokenizedPrompt | EncodedPrompt:
        """The replacement of a missing negative prompt: the empty prompt, or zeros."""
        if self.manifest.conditioning.missing_negative is MissingNegative.EMPTY:
            return self.tokenize("", clip_skip)
        if self._zeros is None:
            length = sum(
                max(self.manifest.encoder(name).length for name in block)
                for block in self.manifest.conditioning.context
            )
            hidden = np.zeros((length, self.manifest.context_width), np.float32)
            pooled = np.zeros(self.manifest.pooled_width, np.float32) if self.manifest.conditioning.pooled else None
            self._zeros = EncodedPrompt(hidden, pooled, finite=True, weight_scale={})
        return self._zeros

    def encode_image(self, image: Image) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The VAE posterior of a picture [H, W, 3]: mean and std, both [C, h, w], in the sampler's space. Cached by the
        pixels, and read-only."""
        key = image.shape, hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
        posterior = self._posteriors.get(key)
        if posterior is None:
            posterior = self._encode_image(image)
            posterior.flags.writeable = False
            self._posteriors.put(key, posterior)
        return posterior[0], posterior[1]

    def _encode_image(self, image: Image) -> npt.NDArray[np.float32]:
        """Mean and std [2, C, h, w]."""
        height, width, _ = image.shape
        factor = self.manifest.vae.factor
        out = self._graph("vae_encoder")({"images": image[None]}, {"h": height // factor, "w": width // factor})
        if not out["finite"].all():
            raise NotFinite("graph 'vae_encoder' produced NaN or infinity: export the model with --precision fp32")
        return np.concatenate([out["mean"], out["std"]])

    def decode(self, latents: npt.NDArray[np.float32], draft: bool = False) -> tuple[Image, npt.NDArray[np.bool_]]:
        """Decodes latents [B, C, h, w] to pictures uint8 [B, H, W, 3]; also returns whether each is finite [B].

        `draft` decodes with the bundle's preview decoder, which it must have.
        """
        _, _, h, w = latents.shape
        factor = self.manifest.vae.factor
        graph = self._graph("vae_preview" if draft else "vae_decoder")
        out = graph({"latents": latents}, {"H": h * factor, "W": w * factor})
        return out["images"], out["finite"]

    def preview(self, denoised: npt.NDArray[np.float32]) -> Image | None:
        """A picture of latents [C, h, w] without the decoder: [H, W, 3] by the bundle's preview decoder, else a small
        one [h, w, 3] by its linear map; None if it has neither. Raises NotFinite."""
        if self.manifest.has_preview_decoder:
            images, finite = self.decode(denoised[None], draft=True)
            if not finite.all():
                raise NotFinite("graph 'vae_preview' produced NaN or infinity: export it with --precision fp32")
            image: Image = images[0]
            return image
        return None if self.manifest.preview is None else preview_image(self.manifest.preview, denoised)

    def warm(self, width: int, height: int) -> None:
        """Runs the encoders and the decoders at every call size, for pictures of this size, and compiles them for these
        shapes if the engine benefits. Raises EngineError."""
        channels, factor = self.manifest.vae.latent_channels, self.manifest.vae.factor
        for count in CALLS:
            self._encode([self.tokenize("")] * count)
            latents = np.zeros((count, channels, height // factor, width // factor), np.float32)
            for draft in (False, True) if self.manifest.has_preview_decoder else (False,):
                self.decode(latents, draft)
        if "vae_encoder" in self.manifest.graphs:
            self._encode_image(np.zeros((height, width, 3), np.uint8))
        for graph in self._batched.values():
            graph.specialize()

    def forget_bindings(self) -> None:
        """Releases the buffers of encoders and decoders after memory ran out; they are rebuilt when needed."""
        self._batched.clear()

    def _graph(self, name: str) -> BatchedGraph:
        if name not in self._batched:
            fixed = {"embedding_table": self._tables[name].array} if name in self._tables else {}
            self._batched[name] = BatchedGraph(self.engine(name), fixed)
        return self._batched[name]

    def _groups(self, prompts: Iterable[TokenizedPrompt]) -> Iterator[list[TokenizedPrompt]]:
        """The prompts in groups whose words fit into the embedding tables together."""
        group: list[TokenizedPrompt] = []
        for prompt in prompts:
            if group and not all(table.fits(_vectors([*group, prompt], name)) for name, table in self._tables.items()):
                yield group
                group = []
            group.append(prompt)
        if group:
            yield group

    def _encode(self, prompts: Sequence[TokenizedPrompt]) -> list[EncodedPrompt]:
        """Runs each encoder on the chunks of all prompts, then joins the outputs prompt by prompt."""
        encoded = [
            self._encode_with(encoder, [prompt.per_encoder[encoder.graph] for prompt in prompts], prompts)
            for encoder in self.manifest.encoders
        ]
        return [
            self._joined(prompt, {e.graph: out[i] for e, out in zip(self.manifest.encoders, encoded, strict=True)})
            for i, prompt in enumerate(prompts)
        ]

    def _encode_with(
        self, encoder: Encoder, chunks: Sequence[Chunks], prompts: Sequence[TokenizedPrompt]
    ) -> list[dict[str, NumpyArray]]:
        """The graph's outputs for each prompt, [chunks, ...]."""
        counts = [len(part.input_ids) for part in chunks]
        table = self._tables[encoder.graph]
        rows = table.place(_vectors(prompts, encoder.graph))
        input_ids = np.concatenate(
            [part.placed(rows[c.identity] for c in part.concepts if c.identity in rows) for part in chunks]
        )
        table.look_up(input_ids)
        feeds: dict[str, NumpyArray] = {"input_ids": input_ids}
        if encoder.hidden_width is not None and encoder.weighs_tokens:
            feeds["token_weights"] = np.concatenate([part.token_weights for part in chunks])
        if encoder.default_layer is not None:
            layers = [encoder.default_layer - tokens.clip_skip for tokens in prompts]
            feeds["layer"] = np.repeat(np.array(layers, np.int64), counts)
        if encoder.pooled_width is not None or encoder.masks_padding:
            feeds["eos_index"] = np.concatenate([part.eos_index for part in chunks])
        out = self._graph(encoder.graph)(feeds)
        ends = np.cumsum(counts)
        parts = [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]
        return [{name: values[part] for name, values in out.items()} for part in parts]

    def _joined(self, prompt: TokenizedPrompt, encoded: Mapping[str, Mapping[str, NumpyArray]]) -> EncodedPrompt:
        """One prompt's context, as `Conditioning.context` describes it, padded with zeros to D."""
        conditioning = self.manifest.conditioning
        blocks: list[NumpyArray] = []
        insertions: list[Insertion] = []
        for block in conditioning.context:
            columns = [np.concatenate([*encoded[name]["hidden_states"]]) for name in block]
            length = math.lcm(*(len(column) for column in columns))
            first_row, first_column = sum(map(len, blocks)), 0
            for name, column in zip(block, columns, strict=True):
                place = slice(first_column, first_column + column.shape[1])
                chunks = prompt.per_encoder[name]
                scale = encoded[name].get("weight_scale", np.ones(len(chunks.input_ids), np.float32))
                insertions += insertions_of(chunks, name, scale, first_row, place, length // len(column))
                first_column = place.stop
            hidden = np.concatenate([np.tile(column, (length // len(column), 1)) for column in columns], axis=1)
            blocks.append(np.pad(hidden, ((0, 0), (0, self.manifest.context_width - hidden.shape[1]))))
        blocks.append(np.zeros((conditioning.zero_tokens, self.manifest.context_width), np.float32))
        pooled = [encoded[name]["pooled"][0] for name in conditioning.pooled]  # of the first chunk, as in A1111
        return EncodedPrompt(
            hidden_states=np.concatenate(blocks),
            pooled=np.concatenate(pooled) if pooled else None,
            finite=all(bool(out["finite"].all()) for out in encoded.values()),
            weight_scale={
                name: np.array(out["weight_scale"]) for name, out in encoded.items() if "weight_scale" in out
            },
            mask=self._mask(prompt),
            insertions=tuple(insertions),
        )

    def _mask(self, prompt: TokenizedPrompt) -> npt.NDArray[np.float32] | None:
        """[chunks * T] of a prompt's context, None if the denoiser has no mask."""
        conditioning = self.manifest.conditioning
        if conditioning.attended_padding is None:
            return None
        blocks = []
        for block in conditioning.context:
            attended = [prompt.per_encoder[name].attended(conditioning.attended_padding).ravel() for name in block]
            length = math.lcm(*map(len, attended))
            blocks.append(np.maximum.reduce([np.tile(part, length // len(part)) for part in attended]))
        return np.concatenate([*blocks, np.ones(conditioning.zero_tokens, bool)]).astype(np.float32)


def check_fits(concept: Concept, manifest: Manifest) -> None:
    """Raises ConceptError for a word that was learned for another model."""
    widths = {encoder.graph: encoder.width for encoder in manifest.encoders}
    required = {encoder.graph for encoder in manifest.encoders if not encoder.word_optional}
    unused = concept.vectors.keys() - widths.keys()
    if required - concept.vectors.keys() or (unused and not manifest.conditioning.zero_tokens):
        optional = "".join(f", and {name} optionally" for name in sorted(widths.keys() - required))
        raise ConceptError(
            f"{concept.token!r} has vectors for {', '.join(sorted(concept.vectors))}, "
            f"this model's encoders are {', '.join(sorted(required))}{optional}: learn the word for this model"
        )
    for name in concept.vectors.keys() & widths.keys():
        if (width := concept.vectors[name].shape[1]) != widths[name]:
            raise ConceptError(
                f"{concept.token!r} has vectors of width {width}, {name} takes width {widths[name]}: "
                "learn the word for this model"
            )
    for name in concept.out.keys() & widths.keys():
        _check_out(concept, manifest, name)
    if concept.by_layer and len(concept.by_layer) != manifest.layers:
        raise ConceptError(
            f"{concept.token!r} has rows for {len(concept.by_layer)} cross-attention layers, this model has "
            f"{manifest.layers}: learn the word for this model"
        )


def _check_out(concept: Concept, manifest: Manifest, name: str) -> None:
    """Raises ConceptError for output vectors that this model cannot use."""
    encoder, word = manifest.encoder(name), f"{concept.token!r} has output vectors"
    _, layers, _, width = concept.out[name].shape
    layer = concept.encoder_layers.get(name)
    if all(name not in block for block in manifest.conditioning.context):
        raise ConceptError(f"{word} for {name}, of which this model uses no states: use ti-concept convert --rows-only")
    if width != encoder.hidden_width:
        raise ConceptError(
            f"{word} of width {width}, the states of {name} have width {encoder.hidden_width}: learn the word for this "
            "model"
        )
    if layers not in (1, manifest.layers):
        raise ConceptError(
            f"{word} for {layers} cross-attention layers, this model has {manifest.layers}: learn the word for this "
            "model"
        )
    if concept.values_only and not manifest.conditioning.repeatable:
        raise ConceptError(
            f"{word} for values only, but this model's keys and values share their states (joint attention): learn the "
            "word for this model"
        )
    if layer is not None and layer not in (encoder.layers or ()):
        raise ConceptError(
            f"{word} of layer {layer} of {name}, which has {len(encoder.layers)} to choose from: learn the word for "
            "this model"
        )


def check_clip_skip(concept: Concept, manifest: Manifest, clip_skip: int) -> None:
    """Raises UsageError for output vectors that were learned at another layer than a prompt with `clip_skip` reads."""
    for name in concept.out:
        encoder = next((encoder for encoder in manifest.encoders if encoder.graph == name), None)
        if encoder is None or encoder.default_layer is None:
            continue
        layer, read = concept.encoder_layers.get(name, encoder.default_layer), encoder.default_layer - clip_skip
        if layer != read:
            skip = encoder.default_layer - layer
            fix = f"use clip_skip {skip}" if skip >= 0 else "learn the word again"
            raise UsageError(
                f"{concept.token!r} has output vectors of layer {layer} of {name}, clip_skip {clip_skip} reads layer "
                f"{read}: {fix}"
            )


def refuse_unsupported(manifest: Manifest) -> None:
    """Raises BundleError for features that format 2 can express but this version cannot run."""
    if set(manifest.columns) - set(COLUMNS):
        raise BundleError(
            f"the bundle has the columns {', '.join(manifest.columns)}, which this oneword cannot run: "
            "install a newer version"
        )


def _tokenized(chunks: Mapping[str, Chunks], clip_skip: int) -> TokenizedPrompt:
    parts = [part.input_ids.tobytes() + part.token_weights.tobytes() for part in chunks.values()]
    tokens = TokenizedPrompt(chunks, clip_skip, b"")
    identities = ",".join(concept.identity for concept in tokens.concepts)
    key = f"{clip_skip}:{identities}:".encode() + b"|".join(parts)
    layers = max((len(concept.by_layer) for concept in tokens.concepts), default=0)
    by_layer = [{name: part.at_layer(layer) for name, part in chunks.items()} for layer in range(layers)]
    layered = tuple(replace(_tokenized(parts, clip_skip), of_layer=True) for parts in by_layer)
    return replace(tokens, key=key, layered=layered)


def _vectors(prompts: Iterable[TokenizedPrompt], encoder: str) -> dict[str, Vectors]:
    """The vectors [n, D] of every word in the prompts, by the word's identity."""
    return {
        concept.identity: concept.vectors[encoder]
        for prompt in prompts
        for concept in prompt.concepts
        if encoder in concept.vectors
    }
