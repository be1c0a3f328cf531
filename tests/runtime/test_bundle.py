"""A bundle is opened only if it is complete and unchanged."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from oneword.engines.errors import BundleError, FileError, OnewordError, UsageError
from oneword.engines.graph import DType, Graph, Precision, Provider, TensorSpec, Weights, graph_digest
from oneword.engines.plans import PlanCache, PlanKey
from oneword.runtime.bundle import (
    VERIFIED,
    Bundle,
    Conditioning,
    Defaults,
    Encoder,
    Manifest,
    MissingNegative,
    Preview,
    Provenance,
    Vae,
    write_bundle,
)


def fill(folder: Path) -> Manifest:
    graphs = {}
    for name in ("text_encoder", "denoise_step", "vae_decoder"):
        (folder / f"{name}.onnx").write_bytes(name.encode())
        (folder / f"{name}.data").write_bytes(b"weights of " + name.encode())
        files = (f"{name}.onnx", f"{name}.data")
        spec = TensorSpec("x", DType.FLOAT32, ("B", 4))
        graphs[name] = Graph(files, graph_digest(folder, files), Precision.FP32, (spec,), ())
    (folder / "table.safetensors").write_bytes(b"table")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    encoder = Encoder(
        graph="text_encoder",
        table="table.safetensors",
        tokenizer="tokenizer",
        vocab_size=10,
        width=4,
        hidden_width=4,
        length=8,
        bos_id=8,
        eos_id=9,
        pad_id=9,
        layers=(1, 2),
        default_layer=2,
    )
    return Manifest(
        source=Provenance("somewhere", "0" * 64),
        graphs=graphs,
        encoders=(encoder,),
        conditioning=Conditioning((("text_encoder",),)),
        columns=("t", "sample", "denoised"),
        scheduler={"_class_name": "DDIMScheduler", "beta_start": 0.1},
        vae=Vae(scale=1.0, shift=0.0, factor=8, latent_channels=4),
        defaults=Defaults(width=64, height=64),
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", fill).path


def edit(bundle: Path, change: Callable[[dict[str, object]], object]) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    change(manifest)
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def test_an_opened_bundle_has_the_manifest_that_was_written(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest

    assert set(manifest.files) == {
        *(f"{g}.{s}" for g in ("text_encoder", "denoise_step", "vae_decoder") for s in ("onnx", "data")),
        "table.safetensors",
        "tokenizer/tokenizer.json",
    }
    assert manifest.scheduler["_class_name"] == "DDIMScheduler"
    assert manifest.graphs["denoise_step"].inputs == (TensorSpec("x", DType.FLOAT32, ("B", 4)),)


def fill_with_a_copy(folder: Path) -> Manifest:
    """As `fill`, with a copy of denoise_step for ONNX Runtime."""
    manifest = fill(folder)
    (folder / "denoise_step.cpu.onnx").write_bytes(b"fused")
    graph = msgspec.structs.replace(manifest.graphs["denoise_step"], fused={Provider.CPU: "denoise_step.cpu.onnx"})
    return msgspec.structs.replace(manifest, graphs={**manifest.graphs, "denoise_step": graph})


def test_a_copy_for_onnxruntime_is_hashed_but_not_part_of_its_graphs_digest(bundle: Path, tmp_path: Path) -> None:
    copied = write_bundle(tmp_path / "copied", fill_with_a_copy).manifest

    assert "denoise_step.cpu.onnx" in copied.files
    assert copied.graphs["denoise_step"].digest == Bundle.open(bundle).manifest.graphs["denoise_step"].digest
    assert copied.graphs["denoise_step"].onnx_for(Provider.CPU) == "denoise_step.cpu.onnx"
    assert copied.graphs["denoise_step"].onnx_for(Provider.CUDA) == "denoise_step.onnx"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"FUSED"), r"denoise_step\.cpu\.onnx has changed since it was exported"),
        (lambda path: path.unlink(), r"denoise_step\.cpu\.onnx is missing"),
        (lambda path: os.link(path, path.parents[1] / "second"), r"denoise_step\.cpu\.onnx is hard-linked"),
    ],
)
def test_a_bundle_whose_copy_was_changed_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    path = write_bundle(tmp_path / "bundle", fill_with_a_copy).path
    damage(path / "denoise_step.cpu.onnx")

    with pytest.raises(BundleError, match=message):
        Bundle.open(path)


def test_a_bundle_whose_copy_is_not_hashed_is_refused(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle", fill_with_a_copy).path
    edit(path, lambda manifest: manifest["files"].pop("denoise_step.cpu.onnx"))  # type: ignore[attr-defined]

    with pytest.raises(BundleError, match=r"denoise_step\.cpu\.onnx is not among the hashed files"):
        Bundle.open(path)


@pytest.mark.parametrize("key", ["fused", "weights"])
def test_a_bundle_from_before_there_were_copies_and_int8_weights_is_opened(bundle: Path, key: str) -> None:
    edit(bundle, lambda manifest: [graph.pop(key) for graph in manifest["graphs"].values()])  # type: ignore[attr-defined]

    for graph in Bundle.open(bundle).manifest.graphs.values():
        assert {graph.onnx_for(provider) for provider in Provider} == {graph.files[0]}
        assert graph.weights is Weights.FLOAT


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> Manifest:
        (folder / "half.onnx").write_bytes(b"half")
        raise FileError("disk full")

    with pytest.raises(FileError, match="disk full"):
        write_bundle(tmp_path / "bundle", fails)

    assert list(tmp_path.iterdir()) == []


def test_an_older_bundle_is_replaced_and_its_plans_are_kept(bundle: Path) -> None:
    older = json.loads((bundle / "bundle.json").read_text())
    (bundle / "plans" / "rtx-sm89").mkdir(parents=True)
    (bundle / "plans" / "rtx-sm89" / "a.plan").write_bytes(b"plan")

    def fill_with_another_table(folder: Path) -> Manifest:
        manifest = fill(folder)
        (folder / "table.safetensors").write_bytes(b"another table")
        return manifest

    write_bundle(bundle, fill_with_another_table)

    assert json.loads((bundle / "bundle.json").read_text())["files"] != older["files"]
    assert (bundle / "plans" / "rtx-sm89" / "a.plan").read_bytes() == b"plan"
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_bundle_that_was_replaced_or_removed_is_noticed(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    opened.check_unchanged()

    def fill_with_another_table(folder: Path) -> Manifest:
        manifest = fill(folder)
        (folder / "table.safetensors").write_bytes(b"another table")
        return manifest

    write_bundle(bundle, fill_with_another_table)
    with pytest.raises(BundleError, match="was replaced or removed after it was opened: open it again"):
        opened.check_unchanged()
    write_bundle(bundle, fill)
    opened.check_unchanged()  # the same bundle again
    shutil.rmtree(bundle)
    with pytest.raises(BundleError, match="was replaced or removed after it was opened: open it again"):
        opened.check_unchanged()


def test_plans_of_changed_graphs_are_deleted_with_the_older_bundle(bundle: Path) -> None:
    def fill_with_another_decoder(folder: Path) -> Manifest:
        manifest = fill(folder)
        (folder / "vae_decoder.data").write_bytes(b"weights of another decoder")
        graph = manifest.graphs["vae_decoder"]
        changed = msgspec.structs.replace(graph, digest=graph_digest(folder, graph.files))
        return msgspec.structs.replace(manifest, graphs={**manifest.graphs, "vae_decoder": changed})

    graphs = Bundle.open(bundle).manifest.graphs
    cache = PlanCache(bundle / "plans" / "openvino")
    keys = {name: PlanKey(graph.digest, "openvino", "1", "any", graph.precision, {}) for name, graph in graphs.items()}
    for name, key in keys.items():
        cache.load_or_build(key, name.encode)

    write_bundle(bundle, fill_with_another_decoder)

    assert {name: cache.load(key) for name, key in keys.items()} == {
        "text_encoder": b"text_encoder",
        "denoise_step": b"denoise_step",
        "vae_decoder": None,
    }
    assert len([*cache.folder.glob("*.plan")]) == 2


@pytest.mark.parametrize("stray", ["notes.txt", "tokenizer/extra.json", "weights.data"])
def test_a_bundle_with_a_foreign_file_is_neither_opened_nor_replaced(bundle: Path, stray: str) -> None:
    (bundle / stray).write_text("mine")

    with pytest.raises(BundleError, match=f"{stray} is not part of the bundle but could pass for it: move it"):
        Bundle.open(bundle)
    with pytest.raises(UsageError, match=f"holds {stray}, which is not part of the bundle: move it, or choose"):
        write_bundle(bundle, fill)
    assert (bundle / stray).read_text() == "mine"


def test_a_tokenizer_that_was_not_hashed_is_refused(bundle: Path) -> None:
    edit(bundle, lambda m: m["files"].pop("tokenizer/tokenizer.json"))  # type: ignore[attr-defined]

    with pytest.raises(BundleError, match=r"tokenizer/tokenizer.json is not among the hashed files"):
        Bundle.open(bundle)


def test_a_folder_that_is_a_link_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bundle / "more").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(BundleError, match="more is not part of the bundle"):
        Bundle.open(bundle)


def test_every_user_may_read_a_bundle_even_if_its_files_were_written_as_private(tmp_path: Path) -> None:
    def private(folder: Path) -> Manifest:
        manifest = fill(folder)
        for path in folder.rglob("*.*"):
            path.chmod(0o600)
        return manifest

    bundle = write_bundle(tmp_path / "bundle", private).path
    os.utime(bundle / "table.safetensors", ns=(1, 1))
    Bundle.open(bundle)  # hashes again, and remembers

    assert {path.stat().st_mode & 0o777 for path in bundle.rglob("*") if path.is_file()} == {0o644}


def test_a_file_that_cannot_be_read_is_one_line_of_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from oneword.runtime import bundle as module

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", path)

    os.utime(bundle / "table.safetensors", ns=(1, 1))
    monkeypatch.setattr(module, "file_digest", refuse)
    with pytest.raises(FileError, match=r"cannot read .*table.safetensors: Permission denied"):
        Bundle.open(bundle)


def test_a_file_that_changes_while_it_is_hashed_is_hashed_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from oneword.runtime import bundle as module

    table, real = bundle / "table.safetensors", module.file_digest

    def changed_meanwhile(path: Path) -> str:
        digest = real(path)
        if path.name == table.name:
            table.write_bytes(b"other")
        return digest

    os.utime(table, ns=(1, 1))
    monkeypatch.setattr(module, "file_digest", changed_meanwhile)
    Bundle.open(bundle)
    monkeypatch.setattr(module, "file_digest", real)
    with pytest.raises(BundleError, match=r"table.safetensors has changed"):
        Bundle.open(bundle)


def test_a_folder_that_is_not_a_bundle_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(UsageError, match="is not a bundle: choose a new folder"):
        write_bundle(tmp_path / "photos", fill)
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.png"]


@pytest.mark.parametrize(
    "manifest",
    ['{"name": "webpack bundle"}', '{"format_version": 1}', '{"format_version": 2, "files": [1]}', "[]", "{", ""],
)
def test_a_folder_with_another_programs_bundle_json_is_not_replaced(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "bundle.json").write_text(manifest)
    (tmp_path / "site" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a bundle: choose a new folder"):
        write_bundle(tmp_path / "site", fill)
    assert sorted(p.name for p in (tmp_path / "site").iterdir()) == ["bundle.json", "thesis.txt"]


def test_a_bundle_of_another_format_with_a_foreign_file_is_not_replaced(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest.update(format_version=1))
    (bundle / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds thesis.txt, which is not part of the bundle: move it"):
        write_bundle(bundle, fill)


def test_a_mount_point_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(UsageError, match=r"volume is a mount point, which cannot be replaced: choose a folder in it"):
        write_bundle(tmp_path / "volume", lambda folder: pytest.fail("it was made"))


def killed(bundle: Path, renames: int) -> None:
    """Writes a bundle in a process that is killed instead of its next rename, after so many."""
    if (child := os.fork()) == 0:
        done, rename = iter(range(renames)), os.rename
        os.rename = lambda *paths: os._exit(9) if next(done, None) is None else rename(*paths)  # type: ignore[assignment]
        write_bundle(bundle, fill)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_the_next_export_mends_what_a_killed_one_left(bundle: Path, renames: int) -> None:
    (bundle / "plans").mkdir()
    (bundle / "plans" / "mine.plan").write_bytes(b"plan")
    killed(bundle, renames)
    assert bundle.exists() == (renames != 1)
    assert len(list(bundle.parent.iterdir())) == 2

    def fails(folder: Path) -> Manifest:
        raise FileError("disk full")

    with pytest.raises(FileError, match="disk full"):
        write_bundle(bundle, fails)
    Bundle.open(bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
    write_bundle(bundle, fill)
    assert (bundle / "plans" / "mine.plan").read_bytes() == b"plan"


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_what_is_left_of_a_bundle_with_a_longer_name_is_left_alone(tmp_path: Path, renames: int) -> None:
    longer = write_bundle(tmp_path / "sd1.5", fill).path
    (longer / "plans").mkdir()
    killed(longer, renames)
    before = sorted(path.name for path in tmp_path.iterdir())
    for _ in range(2):
        write_bundle(tmp_path / "sd1", fill)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "sd1") == before


def test_what_another_host_writes_is_left_alone(bundle: Path) -> None:
    other = bundle.with_name(".bundle.another_host-abcdefgh.partial")
    other.mkdir()
    write_bundle(bundle, fill)
    assert sorted(path.name for path in bundle.parent.iterdir()) == [other.name, "bundle"]


def test_a_bundle_is_written_where_folders_cannot_be_locked(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    killed(bundle, 0)
    monkeypatch.setattr("fcntl.flock", refuse)
    write_bundle(bundle, fill)
    assert len(list(bundle.parent.iterdir())) == 2  # the other process may be alive


def test_a_bundle_that_another_process_writes_is_left_alone(bundle: Path) -> None:
    def fill_beside_another(folder: Path) -> Manifest:
        write_bundle(bundle, fill)
        return fill(folder)

    write_bundle(bundle, fill_beside_another)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_an_older_bundle_is_put_back_if_the_new_one_cannot_be_moved(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(FileError, match=r"cannot write the bundle .*: No space left on device"):
        write_bundle(bundle, fill)
    monkeypatch.undo()
    Bundle.open(bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    "name", ["denoise_step.onnx", "denoise_step.data", "table.safetensors", "tokenizer/tokenizer.json"]
)
def test_a_changed_file_is_named_in_the_error(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(BundleError, match=f"{name} has changed since it was exported"):
        Bundle.open(bundle)


def test_a_missing_file_is_named_in_the_error(bundle: Path) -> None:
    (bundle / "denoise_step.data").unlink()

    with pytest.raises(BundleError, match=r"denoise_step.data is missing: the bundle is incomplete"):
        Bundle.open(bundle)


def test_hard_linked_weights_are_refused(bundle: Path, tmp_path: Path) -> None:
    os.link(bundle / "denoise_step.data", tmp_path / "elsewhere")

    with pytest.raises(BundleError, match=r"denoise_step.data is hard-linked"):
        Bundle.open(bundle)


def test_a_link_that_leaves_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "table.safetensors").rename(tmp_path / "table.safetensors")
    (bundle / "table.safetensors").symlink_to(tmp_path / "table.safetensors")

    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.open(bundle)


def test_a_link_to_itself_is_one_line_of_error(bundle: Path) -> None:
    (bundle / "table.safetensors").unlink()
    (bundle / "table.safetensors").symlink_to("table.safetensors")

    with pytest.raises(FileError, match=r"^cannot read .*table.safetensors: Too many levels of symbolic links$"):
        Bundle.open(bundle)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_not_a_file_is_refused(bundle: Path, make: Callable[[Path], None]) -> None:
    """A pipe would be read forever; a folder has several names, like a file that is hard-linked."""
    (bundle / "table.safetensors").unlink()
    make(bundle / "table.safetensors")

    with pytest.raises(BundleError, match=r"table.safetensors is not a file: copy or export the bundle again$"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..\\b", "C:/x", ""])
def test_a_path_that_leaves_the_bundle_is_refused(bundle: Path, name: str) -> None:
    edit(bundle, lambda m: m["files"].update({name: "0" * 64}))  # type: ignore[attr-defined]

    with pytest.raises(BundleError, match="which is outside it"):
        Bundle.open(bundle)


def test_a_file_is_hashed_once_and_again_only_if_it_changes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def recorded(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    from oneword.runtime import bundle as module

    real = module.file_digest
    monkeypatch.setattr(module, "file_digest", recorded)

    Bundle.open(bundle)
    assert hashed == []
    os.utime(bundle / "table.safetensors", ns=(1, 1))
    Bundle.open(bundle)
    Bundle.open(bundle)
    assert hashed == ["table.safetensors"]


def test_a_bundle_whose_list_of_hashed_files_is_damaged_is_hashed_again(bundle: Path) -> None:
    (bundle / VERIFIED).write_bytes(b'{"\xff": ["a"]}')

    assert Bundle.open(bundle).manifest.files


def test_the_error_for_a_folder_that_is_not_a_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a bundle \(no bundle.json\): make one with ti-export"):
        Bundle.open(tmp_path)


def test_an_unknown_key_or_another_version_is_refused(bundle: Path) -> None:
    edit(bundle, lambda m: m.update(colour="red"))
    with pytest.raises(BundleError, match="unknown field `colour`"):
        Bundle.open(bundle)

    edit(bundle, lambda m: m.update(format_version=99))
    with pytest.raises(BundleError, match="format version 99, this oneword reads 2"):
        Bundle.open(bundle)


def test_a_bundle_of_format_1_is_refused_with_the_command_that_exports_it_again(bundle: Path) -> None:
    def to_format_1(manifest: dict[str, Any]) -> None:
        manifest["format_version"] = 1
        manifest["encoders"][0]["tokenizer_kind"] = "clip"
        manifest["conditioning"]["context"] = ["text_encoder"]
        del manifest["columns"]

    edit(bundle, to_format_1)
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    assert str(caught.value) == (
        f"{bundle / 'bundle.json'} has format version 1, this oneword reads 2: "
        f"export the model again with ti-export MODEL {bundle}"
    )
    assert write_bundle(bundle, fill).manifest.format_version == 2  # and that command can replace it


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vae", "factor", 0),
        ("vae", "latent_channels", 2**31),
        ("defaults", "width", -64),
        ("defaults", "steps", 0),
        ("defaults", "guidance_scale", 1e9),
        ("encoders", "length", 2**31),
        ("encoders", "eos_id", -1),
    ],
)
def test_numbers_that_no_model_has_are_refused(bundle: Path, section: str, key: str, value: float) -> None:
    def change(manifest: dict[str, Any]) -> None:
        part = manifest[section]
        (part[0] if isinstance(part, list) else part)[key] = value

    edit(bundle, change)
    with pytest.raises(BundleError, match=rf"is not a valid manifest \(Expected `.*{key}"):
        Bundle.open(bundle)


def test_swapped_graphs_are_detected(bundle: Path) -> None:
    def swap(manifest: dict[str, object]) -> None:
        graphs = manifest["graphs"]
        assert isinstance(graphs, dict)
        graphs["vae_decoder"]["files"] = graphs["denoise_step"]["files"]

    edit(bundle, swap)
    with pytest.raises(BundleError, match=r"graph 'vae_decoder' .* does not match its digest"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": [["text_encoder"], ["text_encoder_3"]]}, "conditions on 'text_encoder_3', which is not one of"),
        ({"context": []}, "has no context, or a block of it without encoders"),
        ({"context": [["text_encoder"], []]}, "has no context, or a block of it without encoders"),
        ({"pooled": ["text_encoder"]}, "pools an encoder that does not pool"),
        (
            {"time_ids": ["crop_top", "aesthetics"]},
            "has the time id 'aesthetics', but each must be one of original_height, ",
        ),
        ({"missing_negative": "nothing"}, "is not a valid manifest"),
        ({"width": 1}, "has a block of encoders that is wider than its context"),
        ({"zero_tokens": -1}, "is not a valid manifest"),
        ({"attended_padding": 1}, "has attended_padding without a context_mask, or the reverse"),
    ],
)
def test_a_conditioning_that_the_bundle_cannot_provide_is_refused(
    bundle: Path, change: dict[str, Any], message: str
) -> None:
    edit(bundle, lambda m: m["conditioning"].update(change))  # type: ignore[attr-defined]
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


def test_blocks_of_encoders_widths_and_a_preview_survive_the_disk(tmp_path: Path) -> None:
    def two(folder: Path) -> Manifest:
        manifest = fill(folder)
        [first] = manifest.encoders
        second = msgspec.structs.replace(first, graph="vae_decoder", hidden_width=6, pooled_width=3)  # any graph
        conditioning = Conditioning(
            context=(("text_encoder", "vae_decoder"), ("vae_decoder",)),
            pooled=("vae_decoder",),
            missing_negative=MissingNegative.ZEROS,
            repeatable=False,
        )
        preview = Preview(((0.1, 0.2, 0.3),) * 4, (0.5, 0.5, 0.5))
        return msgspec.structs.replace(
            manifest,
            encoders=(first, second),
            conditioning=conditioning,
            preview=preview,
            size_multiple=16,
            max_side=96,
        )

    written = write_bundle(tmp_path / "two", two).manifest
    opened = Bundle.open(tmp_path / "two").manifest
    assert opened == written
    assert (opened.context_width, opened.pooled_width) == (4 + 6, 3)
    assert opened.preview == Preview(((0.1, 0.2, 0.3),) * 4, (0.5, 0.5, 0.5))
    assert (opened.size_multiple, opened.max_side, opened.conditioning.repeatable) == (16, 96, False)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_manifest_opens_or_is_named_in_an_error_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder, original = (tmp_path_factory.getbasetemp() / name for name in ("fuzzed", "original.json"))
    if not folder.exists():
        write_bundle(folder, fill)
        (folder / "bundle.json").rename(original)  # outside: a bundle with a foreign file is refused unread
    text = original.read_bytes()
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 40)))
    (folder / "bundle.json").write_bytes(text[:start] + data.draw(st.binary(max_size=8)) + text[stop:])

    opened, message = None, ""
    try:
        opened = Bundle.open(folder)
    except OnewordError as error:
        message = str(error)
    if opened is None:
        assert str(folder) in message
    else:
        assert set(opened.manifest.graphs) <= {path.stem for path in folder.glob("*.onnx")}
