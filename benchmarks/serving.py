"""A server for many users, measured over HTTP: python -m benchmarks.serving [--only NAME ...] [--write]

Runs the miniature on two cores: `ti-serve` with `--threads 1` on core 0, the load and this process on core 1. Every
section starts its own server, and writes its figures and bars, the machine and the date to build/serving/NAME.json; a
section that fails leaves the file of its last run as it was. `--write` puts what is in these files into
docs/results/serving.md; together with `--only nothing` it measures nothing. Progress goes to standard error; the last
line of the output is one line of JSON.

    overhead     HTTP's milliseconds per picture, and a step's time while HTTP is busy
    batching     eight clients with equal requests: pictures per step
    traffic      mixed requests: beside `--max-rows 1`, and beside batches of whole requests
    partials     turns until the first partial picture
    fidelity     every served picture beside its own, made alone
    switching    the interpreter's switch interval
    overload     ten times as many requests as it can serve
    swaps        words that are replaced 10,000 times under load
    store        1,000,000 words in a folder, 100,000 in memory; words in S3, as moto emulates it
    disconnects  10,000 clients that go away at any time
    slow         500 clients that never read, and 500 that upload slowly
    sigterm      a server that gets a SIGTERM under load
    faults       a killed server, an exception, and a hang in native code, under --supervise, while a word is learned
    soak         memory over 30 minutes, of the server and of one that leaks 1 KB per request

The servers are unmodified but for what `benchmarks.served.changes` does to their process from outside. `--scale 0.02`
shortens everything, to check that it runs. A busy machine makes every time worse: run this on an idle one. Not covered:
how learning slows pictures down, browsers, several machines, GPUs.
"""

import argparse
import json
import os
import re
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.pages import RESULTS, empty_page, markers, write_section
from benchmarks.served import speed, stress, words
from benchmarks.served.process import CORES, LOAD_CORE, Setup
from benchmarks.served.results import Result

SECTIONS: dict[str, Callable[[Setup], Result]] = {
    "overhead": speed.overhead,
    "batching": speed.batching,
    "traffic": speed.traffic,
    "partials": speed.partials,
    "fidelity": speed.fidelity,
    "switching": speed.switching,
    "overload": stress.overload,
    "swaps": words.swaps,
    "store": words.store,
    "disconnects": stress.disconnects,
    "slow": stress.slow,
    "sigterm": stress.sigterm,
    "faults": stress.faults,
    "soak": stress.soak,
}
COMMAND = "python -m benchmarks.serving --write"
PAGE = RESULTS / "serving.md"
NEW_PAGE = empty_page("Serving", "`ti-serve` measured over HTTP, with the miniature on two cores.", "serving")


def main() -> None:
    """Measures the sections, prints their tables, and ends in one line of JSON."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    setup = Setup(_bundle(options), options.work.resolve(), options.engine, options.scale)
    if LOAD_CORE in CORES:
        os.sched_setaffinity(0, {LOAD_CORE})
    failed = {}
    for name in _chosen(options.only):
        setup.log(f"{name} ...")
        start = time.monotonic()
        try:
            result = SECTIONS[name](setup)
        except Exception as error:  # the others are measured nevertheless
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        result.scale, result.engine = options.scale, options.engine
        result.save(options.work)
        setup.log(f"{name}: {time.monotonic() - start:.0f} s, missed: {', '.join(result.missed) or 'nothing'}")
        print(f"\n{result.title}\n\n{result.table()}\n\n{result.extra}", flush=True)
    results = [found for name in SECTIONS if (found := Result.read(options.work, name)) is not None]
    if options.write:
        write_page(results)
    figures = {result.name: {row.title: row.value for row in result.rows} for result in results}
    missed = {result.name: result.missed for result in results if result.missed}
    print(json.dumps({"results": figures, "missed": missed, "failed": failed}))
    raise SystemExit(1 if failed else 0)


def write_page(results: Sequence[Result]) -> None:
    """Writes the sections into the page, each with its date; with its machine and engine too unless all have the same.
    Writes the figure of the mixed traffic beside it.

    Raises SystemExit if a result was measured with --scale, or if a section of the page has no result: it would be
    lost.
    """
    short = [result.name for result in results if result.scale != 1]
    if short:
        raise SystemExit(f"{', '.join(short)} measured with --scale: run them again without it, then write")
    titles = {result.title for result in results}
    lost = [title for title in written_sections() if title not in titles]
    if lost:
        raise SystemExit(
            f"{PAGE} has sections without a file in --work: {', '.join(lost)}. Measure them, or delete them there first"
        )
    origins = list(dict.fromkeys(result.origin for result in results))
    head = (
        f"`ti-serve --threads 1` on one core, the load on the other{'' if origins[1:] else f': {origins[0]}'}. All "
        f"sections are measured and written by this command, one of them with `--only NAME`:\n\n    {COMMAND}"
    )
    terms = "The benchmark's docstring and [Results](README.md#terms) define the terms. Bold: misses its target."
    if missing := [name for name in SECTIONS if name not in {result.name for result in results}]:
        terms += f" **Not measured yet**: {', '.join(missing)}."
    sections = [result.section(origin=len(origins) > 1) for result in results]
    write_section(PAGE, "serving", "\n\n".join([head, terms, *sections]), NEW_PAGE)
    for result in results:
        if result.data:
            from benchmarks.served import plot  # matplotlib, which the load does without

            PAGE.with_suffix(".svg").write_text(plot.answers(result.data))


def written_sections() -> list[str]:
    """The titles of the page's generated sections."""
    begin, end = markers("serving")
    content = PAGE.read_text(encoding="utf-8") if PAGE.exists() else NEW_PAGE
    return re.findall("^## (.+)$", content.partition(begin)[2].partition(end)[0], re.MULTILINE)


def _bundle(options: argparse.Namespace) -> Path:
    if options.bundle is not None:
        return Path(options.bundle).resolve()
    from benchmarks.exported import exported

    return exported("miniature", (options.work / "bundle").resolve())


def _chosen(only: Sequence[str] | None) -> list[str]:
    if only is None:
        return [*SECTIONS]
    return [name for name in SECTIONS if name in only]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, "nothing"], metavar="NAME", help="sections to measure")
    parser.add_argument("--write", action="store_true", help="write docs/results/serving.md")
    parser.add_argument("--bundle", type=Path, help="the miniature, exported [default: exported first]")
    parser.add_argument("--engine", choices=["onnxruntime", "openvino"], default="onnxruntime")
    parser.add_argument("--scale", type=float, default=1.0, help="shortens every section: checks that it runs")
    parser.add_argument(
        "--work", type=Path, default=Path("build/serving"), help="folder for figures, logs and pictures"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
