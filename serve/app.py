"""The server as an ASGI app: `build_state` makes its parts, `create_app` puts the routes and the middleware on them.

Not covered: sockets, signals and the watchdog (`oneword.serve.cli`).
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

import oneword
from oneword.engines.errors import OnewordError
from oneword.runtime.bundle import Bundle
from oneword.runtime.concept import Concept
from oneword.runtime.lexicon import Lexicon
from oneword.runtime.model import Model
from oneword.runtime.prompt import Tokenizer, Vocabulary, encode_ids
from oneword.serve import errors, health, info, jobs_api, kept, middleware, openai, refine_api, results, words_api
from oneword.serve.a1111 import routes as a1111
from oneword.serve.errors import ApiError, Conflict
from oneword.serve.files import open_files
from oneword.serve.jobs import Jobs
from oneword.serve.keys import Keys, Tenant
from oneword.serve.learning import check_model
from oneword.serve.metrics import Metrics, PoolMetrics
from oneword.serve.openapi import TAGS, DocumentedApp, error_responses
from oneword.serve.pool import Pool
from oneword.serve.refinements import Refinements
from oneword.serve.results import Results
from oneword.serve.settings import Settings
from oneword.serve.state import State
from oneword.serve.store import WordStore
from oneword.serve.words import Words
from oneword.serve.worker import Worker

PAGE: Final = Path(__file__).parent / "page"
_COLLECT_SECONDS: Final = 300.0
_COUNTED: Final = 256  # prompts whose tokens, and texts whose chunks, were counted
_log = logging.getLogger("oneword.serve")


def build_state(settings: Settings) -> State:
    """The parts of a server; the engine's thread is not started yet. Raises UsageError, FileError."""
    bundle = Bundle.open(settings.bundle)
    manifest = bundle.manifest
    keys = None if settings.keys is None else Keys.read(settings.keys)
    size = manifest.defaults.size

    def open_model() -> Model:
        return Model.open(settings.bundle, settings.engine, threads=settings.threads)

    metrics = Metrics()
    worker = Worker(open_model, max_rows=settings.max_rows, sizes=[size], observer=metrics.turn)
    tokenizers = {e.graph: Tokenizer.read(bundle.file(e.tokenizer), e) for e in manifest.encoders}

    first = manifest.encoders[0].graph

    @functools.lru_cache(_COUNTED)
    def tokens(prompt: str) -> int:
        return len(tokenizers[first].ids(prompt))

    def chunks_with(text: str, words: Mapping[str, Concept]) -> int:
        found = encode_ids(text, tokenizers[first], Vocabulary(words, ignore_case=True), first)
        layers = max((len(rows) for word in found.concepts for rows in word.layer_rows.values()), default=0)
        return len(found.input_ids) * (1 + layers)

    @functools.lru_cache(_COUNTED)
    def chunks_without_words(text: str) -> int:
        return chunks_with(text, {})

    def chunks(text: str, words: Mapping[str, Concept]) -> int:
        return chunks_with(text, words) if words else chunks_without_words(text)

    def knows(piece: str) -> bool:
        return all(tokenizer.knows(piece) for tokenizer in tokenizers.values())

    words = Words(WordStore(settings.words), knows=knows)
    files = open_files(settings.words)
    pool = Pool(worker, manifest, max_wait=settings.max_wait, observer=PoolMetrics(metrics), chunks=chunks)

    async def keep(name: str, concept: Concept, replace: bool) -> None:
        tenant = Tenant(name) if keys is None else keys.named(name)
        try:
            await words.put(tenant, concept, if_absent=not replace)
        except Conflict:
            if (await words.get(tenant, concept.token)).identity != concept.identity:
                raise
            # This job's own, kept by a server that was then killed.

    state = State(
        settings=settings,
        manifest=manifest,
        tokens=tokens,
        keys=keys,
        words=words,
        worker=worker,
        pool=pool,
        results=Results(files),
        refinements=Refinements(files, lambda: Lexicon.read(bundle)),
        metrics=metrics,
        jobs=Jobs(
            settings.words,
            settings.jobs_folder,
            settings.model,
            manifest.source.digest,
            encoders=[encoder.graph for encoder in manifest.encoders],
            keep=keep,
        ),
    )
    _add_gauges(state)
    return state


@contextlib.asynccontextmanager
async def running(state: State) -> AsyncIterator[None]:
    """Starts the parts, the engine's thread among them, and stops them. Raises UsageError for a model that differs."""
    if state.settings.model is not None:
        await check_model(state.settings.model, state.manifest)
    state.worker.start()
    await state.jobs.start()
    collecting = asyncio.create_task(_collect(state))
    try:
        yield
    finally:
        collecting.cancel()
        await state.jobs.stop()
        await state.pool.drain(0)
        await kept.drain(state)
        state.worker.stop(cancel=True)
        state.words.close()
        state.close()


def create_app(state: State) -> FastAPI:
    """The app around these parts. Its lifespan starts and stops them."""
    app = DocumentedApp(
        title="oneword",
        version=oneword.__version__,
        summary="Pictures with learned words: OpenAI's images API, A1111's API, and words that change while it runs.",
        openapi_tags=TAGS,
        docs_url=None,
        redoc_url=None,
        lifespan=lambda _: running(state),
    )
    app.secured = state.keys is not None
    app.state.oneword = state
    for part in (openai, jobs_api, refine_api, words_api, results, info, health, a1111):
        app.include_router(part.router, responses=error_responses())
    app.add_api_route("/", _page, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/static", StaticFiles(directory=PAGE), name="static")
    errors.install(app)
    middleware.install(app, state.settings, state.keys, state.metrics.answered, check=state.pool.check)
    return app


def _add_gauges(state: State) -> None:
    """The metrics that are read when they are requested."""
    pool, worker, words, jobs, gauge = state.pool, state.worker, state.words, state.jobs, state.metrics.gauge
    gauge("queued_seconds", "Estimated seconds of accepted work.", lambda: pool.queued_seconds)
    gauge("rows", "Pictures that are being denoised.", lambda: worker.figures.rows)
    gauge("slots", "Pictures of the model's size that can be denoised together.", lambda: worker.slots)
    gauge("waiting", "Pictures that the engine has not taken up.", lambda: pool.waiting)
    gauge("words_resident", "Learned words in the embedding tables.", lambda: worker.figures.words)
    gauge("words_cached", "Learned words in the server's memory.", lambda: words.resident)
    gauge("words_evicted", "Words that left the server's memory for others, so far.", lambda: words.evictions)
    gauge("jobs_running", "Words that this server is learning.", lambda: jobs.running)
    gauge("jobs_waiting", "Learning jobs in this server's queue.", lambda: jobs.waiting)


async def _page(http: Request) -> Response:
    return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})


async def _collect(state: State) -> None:
    """Deletes expired pictures from time to time."""
    while True:
        try:
            await state.in_thread(state.results.collect)
            await state.jobs.delete_old()
        except (ApiError, OSError, OnewordError):
            _log.warning("expired pictures could not be deleted from the store")
        await asyncio.sleep(_COLLECT_SECONDS)
