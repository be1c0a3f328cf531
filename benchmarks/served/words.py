"""Sections of the serving benchmark about words: replaced under load, and very many of them."""

import asyncio
import os
import random
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import numpy as np

from benchmarks.served.changes import PROMPT, read_journal
from benchmarks.served.load import Answer, client_of, percentile, plain_call, send
from benchmarks.served.process import Engine, Server, Setup, quoted, random_words
from benchmarks.served.results import Result
from benchmarks.served.speed import kept_pictures
from oneword.runtime.concept import Concept, concept_bytes
from oneword.serve.keys import Tenant
from oneword.serve.store import WordRecord, WordStore, _blob_path, _name_path, blob_of
from oneword.serve.words import Words

_SWAPPED: Final = 4
_POOL: Final = 100
"""Prompts without a swapped word; with those of the swapped ones in between, they fit into the cache of 512."""
_PER_TENANT: Final = 1000
_LOOKUP_MS: Final = 5.0
_STORE_MS: Final = 50.0


def swaps(setup: Setup) -> Result:
    """Words that are replaced while pictures are made with them."""
    count, versions = setup.count(10_000, 20), setup.count(100, 4)
    result = Result(
        "swaps",
        "Words replaced under load",
        f"{_SWAPPED} words are replaced {count:,} times, one PUT after the other, each time by one of {versions} "
        "versions, while eight clients request pictures of four steps: half of them with such a word, the others with "
        f"one of {_POOL} prompts without. Every picture with a word is compared to its versions', made alone: "
        "it is crossed unless it is that of a version that its word had between the request and the answer. Then the "
        "same traffic without replacements.",
    )
    tokens = [f"<s{number}>" for number in range(_SWAPPED)]
    made = random_words(
        setup.bundle, [f"<s{index % _SWAPPED}v{index // _SWAPPED}>" for index in range(_SWAPPED * versions)]
    )
    with Engine(setup, made) as engine:
        requests = [{**_SETTINGS, "prompt": _prompt(word.token), "seed": 1} for word in made]
        pictures = kept_pictures(setup, engine, "swaps", requests)
    alone = np.stack(pictures).astype(np.int16).reshape(versions, _SWAPPED, -1)
    rates = []
    for swapped in (count, 0):
        journal = setup.work / "swaps" / f"journal-{time.time_ns()}"
        journal.parent.mkdir(parents=True, exist_ok=True)
        first = [Concept(token, word.vectors) for token, word in zip(tokens, made[:_SWAPPED], strict=True)]
        with Server(setup, "swaps", changes={"journal": str(journal)}, words=first) as server:
            run = Swapping(setup, server, tokens, made, swapped, seconds=setup.seconds(60, 4))
            asyncio.run(run.run())
        cached = read_journal(journal, PROMPT)
        plain = cached[(cached[:, 0] >= run.start) & (cached[:, 2] == 0), 1]
        rates.append(float(plain.mean()))
        if swapped:
            result.add("words replaced", run.puts)
            result.add("pictures with such a word meanwhile", len(run.answers))
            result.add("requests and replacements that failed", run.failed, 0)
            result.add("pictures of a wrong version or word", sum(run.crossed(*item, alone) for item in run.answers), 0)
            result.add("PUT of a word, ms, p50", 1e3 * percentile(run.put_seconds, 50))
            result.add("PUT of a word, ms, p99", 1e3 * percentile(run.put_seconds, 99))
    result.add("other prompts found in the cache, with replacements, %", 100 * rates[0])
    result.add("the same without, %", 100 * rates[1])
    result.add("difference, %", 100 * abs(rates[0] - rates[1]), 1)
    return result


def store(setup: Setup) -> Result:
    """Very many words: lookups in memory, in a folder, and in S3."""
    count, resident = setup.count(1_000_000, 2000), setup.count(100_000, 200)
    lookups = setup.count(20_000, 100)
    result = Result(
        "store",
        "Many words",
        f"`Words` without a server: {count:,} words of {count // _PER_TENANT:,} tenants in a folder, {resident:,} of "
        f"them in memory; {lookups:,} prompts with a word, one after the other. A word in memory still costs a read of "
        "its name's file, since another server may have replaced it. The files were written or read before, so the "
        "operating system may have them in memory. S3 is moto's server on this machine, on the other core.",
    )
    path = _filled(setup, count)
    asyncio.run(_looked_up(setup, result, path, count, resident, lookups))
    with _s3(setup) as url:
        asyncio.run(_looked_up_in_s3(setup, result, url))
    return result


_SETTINGS: Final[dict[str, Any]] = {"steps": 4, "guidance_scale": 1.0}


def _prompt(token: str) -> str:
    return f"a photo of a {token} in the snow"


class Swapping:
    """Traffic with words that are replaced meanwhile."""

    def __init__(
        self, setup: Setup, server: Server, tokens: Sequence[str], made: Sequence[Concept], swaps: int, seconds: float
    ) -> None:
        """Replaces words so often; never for `seconds` if that is 0."""
        self._setup, self._server, self._tokens, self._seconds = setup, server, tokens, seconds
        self._files = [concept_bytes(Concept(tokens[i % len(tokens)], word.vectors)) for i, word in enumerate(made)]
        self._swaps = swaps
        self.start = 0.0
        self.puts = self.failed = 0
        self.put_seconds: list[float] = []
        self.answers: list[tuple[int, Answer]] = []
        """With the number of their word."""
        self._history: list[list[tuple[float, float, int]]] = [[(0.0, 0.0, 0)] for _ in tokens]
        """By word: when a version was sent and acknowledged."""
        self._end = False

    async def run(self) -> None:
        """Runs it all."""
        async with client_of(self._server.url) as client:
            for number in range(_POOL):
                await send(client, plain_call(f"a photo of a red ring {number}", **_SETTINGS))
            self.start = time.monotonic()
            loops = [asyncio.ensure_future(self._draw(client, seed)) for seed in range(8)]
            if self._swaps:
                await self._swap(client)
            else:
                await asyncio.sleep(self._seconds)
            self._end = True
            await asyncio.gather(*loops)

    async def _swap(self, client: httpx.AsyncClient) -> None:
        rng, words = random.Random(5), len(self._tokens)
        for number in range(self._swaps):
            if number % 1000 == 0:
                self._setup.log(f"swaps: {number} of {self._swaps}")
            word, version = number % words, rng.randrange(len(self._files) // words)
            sent = time.monotonic()
            self._history[word].append((sent, float("inf"), version))
            path = f"/v1/words/{quoted(self._tokens[word])}"
            response = await client.put(path, content=self._files[version * words + word])
            self._history[word][-1] = (sent, time.monotonic(), version)
            self.put_seconds.append(time.monotonic() - sent)
            self.puts += 1
            self.failed += response.status_code != 200

    async def _draw(self, client: httpx.AsyncClient, seed: int) -> None:
        rng = random.Random(seed)
        while not self._end:
            if rng.random() < 0.5:
                prompt = f"a photo of a red ring {rng.randrange(_POOL)}"
                answer = await send(client, plain_call(prompt, **_SETTINGS), keep=False)
            else:
                word = rng.randrange(len(self._tokens))
                answer = await send(client, plain_call(_prompt(self._tokens[word]), seed=1, **_SETTINGS))
                if answer.status == 200:
                    self.answers.append((word, answer))
            self.failed += answer.status != 200

    def crossed(self, word: int, answer: Answer, alone: np.ndarray) -> bool:
        """Whether a picture is of no version that its word had while it was requested. `alone` is [V, W, pixels]."""
        history = self._history[word]
        before = max(i for i, (_, acknowledged, _) in enumerate(history) if acknowledged <= answer.sent)
        allowed = {version for sent, _, version in history[before:] if sent <= answer.received}
        picture = answer.pictures[0].astype(np.int16).reshape(-1)
        return not any(int(np.abs(alone[version, word] - picture).max()) <= 1 for version in allowed)


def _concept(number: int) -> Concept:
    """Word `number`: of one vector, unlike all others."""
    vector = np.random.default_rng(number).normal(0, 0.03, (1, 128)).astype(np.float32)
    return Concept(f"<w{number}>", {"text_encoder": vector})


def _tenant(number: int) -> Tenant:
    return Tenant(f"tenant {number // _PER_TENANT}")


def _filled(setup: Setup, count: int) -> Path:
    """A store with so many words, written as `WordStore.put` does but without locks and syncs. It is kept."""
    path = setup.work / "store" / f"words-{count}"
    done = path / "complete"
    if done.exists():
        return path
    shutil.rmtree(path, ignore_errors=True)
    WordStore(str(path))
    folders = set[Path]()
    for number in range(count):
        if number % 100_000 == 0:
            setup.log(f"store: wrote {number} of {count}")
        concept, tenant = _concept(number), _tenant(number)
        data = blob_of(concept)
        record = WordRecord(
            token=concept.token,
            identity=concept.identity,
            provenance={},
            generation=1,
            created=0.0,
            bytes=len(data),
            vectors={"text_encoder": 1},
        )
        parts = (
            (path / _blob_path(record.identity), data),
            (path / _name_path(tenant.name, concept.token), msgspec.json.encode(record)),
        )
        for file, content in parts:
            if file.parent not in folders:
                file.parent.mkdir(parents=True, exist_ok=True)
                folders.add(file.parent)
            file.write_bytes(content)
    done.touch()
    return path


async def _timed(words: Words, numbers: Sequence[int]) -> list[float]:
    """Milliseconds to look up the word of each prompt."""
    times = []
    for number in numbers:
        start = time.perf_counter()
        found = await words.resolve(_tenant(number), [_prompt(f"<w{number}>")], False)
        times.append(1e3 * (time.perf_counter() - start))
        if len(found) != 1:
            raise RuntimeError(f"word {number} was not found")
    return times


async def _looked_up(setup: Setup, result: Result, path: Path, count: int, resident: int, lookups: int) -> None:
    from oneword.serve.keys import LOCAL

    words = Words(WordStore(str(path)), resident=resident)
    memory, rng = _resident_mb(), random.Random(0)
    for first in range(0, resident, 64):
        numbers = range(first, min(first + 64, resident))
        await asyncio.gather(*(words.resolve(_tenant(i), [_prompt(f"<w{i}>")], False) for i in numbers))
    result.add("memory of the words that are resident, MB", _resident_mb() - memory)
    setup.log(f"store: {resident} words are in memory")
    warm = await _timed(words, [rng.randrange(resident) for _ in range(lookups)])
    cold = await _timed(words, [rng.randrange(resident, count) for _ in range(lookups)])
    result.add("lookup, in memory, ms, p50", percentile(warm, 50))
    result.add("lookup, in memory, ms, p99", percentile(warm, 99), _LOOKUP_MS)
    result.add("lookup, from the folder, ms, p50", percentile(cold, 50))
    result.add("lookup, from the folder, ms, p99", percentile(cold, 99), _STORE_MS)
    puts = []
    for number in range(setup.count(500, 10)):
        start = time.perf_counter()
        await words.put(LOCAL, _concept(count + number))
        puts.append(1e3 * (time.perf_counter() - start))
    result.add("put into the folder, ms, p50", percentile(puts, 50))
    result.add("put into the folder, ms, p99", percentile(puts, 99))
    for number in range(len(puts)):
        await words.delete(LOCAL, f"<w{count + number}>")
    words.close()


async def _looked_up_in_s3(setup: Setup, result: Result, url: str) -> None:
    count = setup.count(500, 10)
    words = Words(WordStore(url))
    puts = []
    for number in range(count):
        start = time.perf_counter()
        await words.put(_tenant(number), _concept(number))
        puts.append(1e3 * (time.perf_counter() - start))
    warm = await _timed(words, range(count))
    words.close()
    words = Words(WordStore(url))  # which has nothing in memory
    cold = await _timed(words, range(count))
    words.close()
    for title, times in (("put into S3", puts), ("lookup, in memory", warm), ("lookup, from S3", cold)):
        name = "lookup with S3, in memory" if title == "lookup, in memory" else title
        result.add(f"{name}, ms, p50", percentile(times, 50))
        result.add(f"{name}, ms, p99", percentile(times, 99))


@contextmanager
def _s3(setup: Setup) -> Iterator[str]:
    """The URL of an empty store on moto's S3 server, and the environment that leads to it."""
    import boto3  # type: ignore[import-untyped]

    script = "import sys; from moto.server import ThreadedMotoServer as S; s = S(ip_address='127.0.0.1', port=0, "
    script += "verbose=False); s.start(); print(s.get_host_and_port()[1], flush=True); sys.stdin.read()"
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    before = dict(os.environ)
    try:
        assert process.stdout is not None
        address = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        urllib.request.urlopen(address, timeout=30).close()
        os.environ |= environment | {"AWS_ENDPOINT_URL": address}
        boto3.client("s3").create_bucket(Bucket="words")
        setup.log(f"store: S3 at {address}")
        yield "s3://words/store"
    finally:
        os.environ.clear()
        os.environ |= before
        process.kill()
        process.wait()


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
