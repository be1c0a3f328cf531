"""`ti-concept`: shows, checks and converts embedding files. A thin skin over `oneword.runtime.layouts`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from oneword.engines.errors import ConceptError, FileError, UsageError, counted, one_line
from oneword.runtime.commands import (
    HELP,
    PATH,
    json_option,
    print_json,
    refuse_file,
    require_folder_of,
    run_command,
    token_name,
    version_option,
)
from oneword.runtime.concept import Concept, save_concept, token_from_stem
from oneword.runtime.layouts import FoundConcept, paired, read_concepts
from oneword.runtime.refine import PROVENANCE_KEY, Refinement


@click.group(name="ti-concept", no_args_is_help=False, context_settings=HELP)
@version_option
def command() -> None:
    """Show, check and convert embedding files: .safetensors, .pt, .bin, A1111's pictures, folders, LoRAs."""


@command.command()
@click.argument("files", metavar="FILE...", type=PATH, nargs=-1, required=True)
@json_option
def show(files: tuple[Path, ...], as_json: bool) -> None:
    """Print every word in the files: its token, layout, vectors and provenance."""
    described = [_described(path, concept) for path in files for concept in read_concepts(path)]
    if as_json:
        print_json(described)
        return
    for word in described:
        click.echo(_printable(f"{word['token']}  ({word['layout']}, {word['file']})"))
        for encoder, facts in word["vectors"].items():
            norms = ", ".join(f"{norm:.3g}" for norm in facts["norms"][:8]) + (", ..." if facts["count"] > 8 else "")
            click.echo(f"  {encoder}: {facts['count']} x {facts['width']}, norms {norms}")
        for encoder, facts in word["layer_rows"].items():
            click.echo(f"  {encoder}, rows of layers: {facts['layers']} layers x {facts['count']} x {facts['width']}")
        for encoder, facts in word["out"].items():
            low, high = facts["norms"]
            click.echo(
                f"  {encoder}, output: {facts['stages']} stages x {facts['layers']} layers x {facts['count']} x "
                f"{facts['width']}, norms {low:.3g} to {high:.3g}"
                + (", for values only" if word["values_only"] else "")
                + (f", of the encoder's layer {facts['encoder_layer']}" if facts["encoder_layer"] else "")
            )
        for key, value in _summarized(word["provenance"]).items():
            click.echo(_printable(f"  {key}: {value}"))


@command.command()
@click.argument("files", metavar="FILE...", type=PATH, nargs=-1, required=True)
@json_option
def check(files: tuple[Path, ...], as_json: bool) -> None:
    """Report for every file whether it is safe to load, or why not. Exits 1 if any is refused."""
    results = [_checked(path) for path in files]
    if as_json:
        print_json(results)
    else:
        for result in results:
            line = f"ok       {result['file']}" if result["ok"] else f"refused  {result['reason']}"
            click.echo(_printable(line))
    if not all(result["ok"] for result in results):
        raise click.exceptions.Exit(1)


@command.command()
@click.argument("files", metavar="FILE", type=PATH, nargs=-1, required=True)
@click.argument("out", type=PATH)
@click.option("--token", type=token_name, metavar="NAME", help="New name of the word.")
@click.option("--rows-only", is_flag=True, help="Leave out vectors for layers.")
@json_option
def convert(files: tuple[Path, ...], out: Path, token: str | None, rows_only: bool, as_json: bool) -> None:
    """Write FILE's word as safetensors that ti-run, ComfyUI, diffusers and A1111 read.

    A word with vectors for layers is refused by diffusers and A1111: leave these out with --rows-only. OUT is a
    .safetensors file, or a folder if FILE holds several words. Two FILEs of one word, as diffusers writes them for
    SDXL, are merged into one.
    """
    if len(files) > 2:
        raise UsageError(f"{len(files)} files are too many to convert: give one, or two that are a pair for SDXL")
    words = [word for path in files for word in read_concepts(path, token)]
    concepts = [paired(words)] if len(files) == 2 else [word.concept for word in words]
    if token is not None and len(concepts) > 1:
        raise UsageError(f"--token {token!r} for {len(concepts)} words: convert them without it")
    if rows_only:
        concepts = [concept.rows_only() for concept in concepts]
    targets = _targets(concepts, out)
    for target in targets:
        if target.exists():
            raise UsageError(f"{target} exists: the last argument is the file to write, choose a new name")
    for concept, target in zip(concepts, targets, strict=True):
        save_concept(concept, target)
    if as_json:
        print_json([{"token": c.token, "file": str(t)} for c, t in zip(concepts, targets, strict=True)])
    else:
        for concept, target in zip(concepts, targets, strict=True):
            click.echo(f"{concept.token} -> {target}")


def _targets(concepts: list[Concept], out: Path) -> list[Path]:
    if out.suffix.lower() == ".safetensors":
        if len(concepts) != 1:
            raise UsageError(f"{len(concepts)} words do not fit into the file {out}: pass a folder")
        require_folder_of("OUT", out)
        return [out]
    if out.suffix and not out.is_dir():
        raise UsageError(f"{out} is neither a .safetensors file, the only layout that is written, nor a folder")
    refuse_file("OUT", out)
    names = [token_from_stem(concept.token.strip("<>") + ".x") for concept in concepts]
    names = [c.token if names.count(name) > 1 else name for c, name in zip(concepts, names, strict=True)]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"two words are named {', '.join(sorted(repeated))}: rename one in the file that has them")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot create the folder {out}: {error.strerror}") from error
    return [out / f"{name}.safetensors" for name in names]


def _described(path: Path, word: FoundConcept) -> dict[str, Any]:
    return {
        "file": str(path),
        "layout": word.layout,
        "token": word.concept.token,
        "vectors": {
            encoder: {
                "count": len(rows),
                "width": rows.shape[1],
                "norms": [round(float(norm), 6) for norm in np.linalg.norm(rows, axis=1)],
            }
            for encoder, rows in word.concept.vectors.items()
        },
        "out": {encoder: _described_out(word.concept, encoder) for encoder in word.concept.out},
        "layer_rows": {
            encoder: dict(zip(("layers", "count", "width"), rows.shape, strict=True))
            for encoder, rows in word.concept.layer_rows.items()
        },
        "values_only": word.concept.values_only,
        "provenance": dict(word.concept.provenance),
    }


def _summarized(provenance: Mapping[str, str]) -> dict[str, str]:
    """The provenance with the state of a refinement, hundreds of characters of JSON, in a few words."""
    if PROVENANCE_KEY not in provenance:
        return {**provenance}
    try:
        state = Refinement.from_json(provenance[PROVENANCE_KEY])
    except (UsageError, ConceptError):
        return {**provenance, PROVENANCE_KEY: "cannot be read by this version"}
    summary = f"{counted(len(state.rounds), 'round')}, {counted(len(state.aspects), 'aspect')}"
    return {**provenance, PROVENANCE_KEY: summary}


def _described_out(concept: Concept, encoder: str) -> dict[str, Any]:
    stages, layers, count, width = concept.out[encoder].shape
    norms = np.linalg.norm(concept.out[encoder], axis=-1)
    return {
        "stages": stages,
        "layers": layers,
        "count": count,
        "width": width,
        "norms": [round(float(norms.min()), 6), round(float(norms.max()), 6)],
        "encoder_layer": concept.encoder_layers.get(encoder),
    }


def _printable(text: str) -> str:
    """Replaces control characters that a terminal would obey: a file's metadata is untrusted."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _checked(path: Path) -> dict[str, Any]:
    try:
        words = read_concepts(path)
    except (ConceptError, UsageError) as error:
        return {"file": str(path), "ok": False, "reason": one_line(error, limit=None)}
    except Exception as error:  # a file that this does not foresee must not hide the results of the others
        reason = f"{path} cannot be read ({type(error).__name__}): {one_line(error)}"
        return {"file": str(path), "ok": False, "reason": reason}
    return {"file": str(path), "ok": True, "tokens": [word.concept.token for word in words]}


def main() -> None:
    """The console script."""
    run_command(command, "ti-concept")


if __name__ == "__main__":
    main()
