"""Sources of models: hub ids, against a stand-in for the hub's cache in its client's layout; single files in the layout
of published checkpoints."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from oneword.engines.errors import FileError, OnewordError, UsageError
from oneword.export.source import COMPONENTS, digest_directory, find_model, hub_files, load_folder, load_source
from tests.original_layout import original_layout

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds owner/tiny at one commit, its branch main; the hub is unreachable."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for number, file in enumerate(path for path in tiny_model_dir.rglob("*") if path.is_file()):
        blob, link = repository / "blobs" / f"{number:040x}", snapshot / file.relative_to(tiny_model_dir)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize("model", ["owner/tiny", "owner/tiny@main", f"owner/tiny@{COMMIT}"])
def test_a_hub_id_is_the_model_in_the_cache_at_one_commit(cache: Path, tiny_model_dir: Path, model: str) -> None:
    source = load_source(model)
    assert (source.path, source.revision) == (cache, COMMIT)
    assert source.digest == digest_directory(tiny_model_dir)


@pytest.mark.parametrize("model", ["owner/other", "owner/tiny@v2"])
def test_a_model_in_neither_hub_nor_cache_is_reported_on_one_line(cache: Path, model: str) -> None:
    message = f"{model} could not be downloaded from the Hub .*: give a local diffusers"
    with pytest.raises(FileError, match=message) as caught:
        find_model(model)
    assert "\n" not in str(caught.value)


class Hub(BaseHTTPRequestHandler):
    """The addresses of the Hub that its client requests for a repository owner/tiny of the files in `folder`."""

    folder: Path
    requested: list[str]
    environment: dict[str, str]
    """Of a process that uses it."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*") if file.is_file()}
        if path == f"/api/models/owner/tiny/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0"} for name, file in files.items()
            ]
            self.answer(json.dumps(tree).encode())
        elif path in ("/api/models/owner/tiny", *(f"/api/models/owner/tiny/revision/{r}" for r in ("main", COMMIT))):
            info = {"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self.answer(json.dumps(info).encode())
        elif (name := path.removeprefix(f"/owner/tiny/resolve/{COMMIT}/")) in files:
            self.requested.append(name)
            self.answer(files[name].read_bytes())
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", hashlib.sha1(body).hexdigest())
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Prints nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[type[Hub]]:
    """Serves tmp_path/repository."""
    handler = type("TheHub", (Hub,), {"folder": tmp_path / "repository", "requested": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        handler.environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        yield handler
        server.shutdown()
        thread.join()


def digest_of_owner_tiny(hub: type[Hub]) -> subprocess.CompletedProcess[str]:
    """What another process prints that finds the model in the hub."""
    code = "from oneword.export.source import *; print(digest_directory(find_model('owner/tiny')[0]))"
    line = [sys.executable, "-c", code]
    return subprocess.run(line, env=hub.environment, capture_output=True, text=True, timeout=120)


def test_a_hub_model_is_downloaded_and_found_without_a_network(hub: type[Hub], tiny_model_dir: Path) -> None:
    shutil.copytree(tiny_model_dir, hub.folder)
    (hub.folder / "README.md").write_text("A file that is not downloaded.")
    assert digest_of_owner_tiny(hub).stdout.strip() == digest_directory(tiny_model_dir)
    assert set(hub.requested) == {p.relative_to(tiny_model_dir).as_posix() for p in tiny_model_dir.rglob("*.*")}
    for address in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):  # a port that nothing listens on
        hub.environment |= address
        assert digest_of_owner_tiny(hub).stdout.strip() == digest_directory(tiny_model_dir)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"_class_name": "PixArtSigmaPipeline"},
            "owner/tiny is a PixArtSigmaPipeline, which needs a mask of the prompt",
        ),
        (None, "owner/tiny has no model_index.json: give the hub id of a model in diffusers' format"),
    ],
)
def test_an_unsupported_hub_model_is_refused_before_its_weights_are_downloaded(
    hub: type[Hub], tiny_model_dir: Path, index: dict[str, str] | None, message: str
) -> None:
    shutil.copytree(tiny_model_dir, hub.folder)
    (hub.folder / "model_index.json").unlink()
    if index:
        (hub.folder / "model_index.json").write_text(json.dumps(index))

    assert f"UsageError: {message}" in digest_of_owner_tiny(hub).stderr
    assert set(hub.requested) == ({"model_index.json"} if index else set())


def test_a_hub_model_with_only_pickles_is_refused(cache: Path) -> None:
    weights = cache / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(OnewordError, match="pickles are not read"):
        load_source("owner/tiny")


def test_a_hub_model_that_is_not_in_diffusers_format_is_named(cache: Path) -> None:
    (cache / "model_index.json").unlink()
    with pytest.raises(UsageError, match=r"owner/tiny has no model_index\.json: give the hub id of a model"):
        find_model("owner/tiny")


def test_only_the_files_in_use_are_downloaded_from_a_repository() -> None:
    stable_diffusion = [
        "README.md", "model_index.json", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt",
        "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
        "safety_checker/model.safetensors", "safety_checker/config.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors", "unet/onnx/model.safetensors",
    ]  # fmt: skip
    assert sorted(hub_files(stable_diffusion)) == [
        "model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer/vocab.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors",
    ]  # fmt: skip


def test_sharded_weights_of_a_variant_are_downloaded_completely() -> None:
    shards = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert hub_files([*shards, "unet/diffusion_pytorch_model.safetensors.index.fp16.json"])[1:] == shards


@pytest.mark.parametrize("json", [True, False])
def test_a_tokenizers_sentencepiece_file_is_downloaded_if_there_is_no_other_form(json: bool) -> None:
    configs = ["tokenizer_2/tokenizer_config.json", *(["tokenizer_2/tokenizer.json"] if json else [])]
    files = hub_files(["model_index.json", *configs, "tokenizer_2/spiece.model"])
    assert files == ["model_index.json", *configs, *([] if json else ["tokenizer_2/spiece.model"])]


def test_a_tokenizer_of_a_sentencepiece_file_has_its_ids(tmp_path: Path) -> None:
    text = ["a photo of a toy in the snow", "a painting of the sun over the sea", "two cats and a dog"]
    with (tmp_path / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=file,
            vocab_size=26,
            minloglevel=2,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
        )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    tokenizer = load_folder(tmp_path, "T5Tokenizer", COMPONENTS["T5Tokenizer"], torch.float32)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))

    for prompt in (*text, "a toy dog over the sea", "zebra"):
        assert tokenizer(prompt).input_ids == [*reference.encode(prompt), reference.eos_id()]


@pytest.mark.parametrize("left", [[], ["vocab.json"], ["merges.txt"]])
def test_a_tokenizer_without_a_vocabulary_is_refused(tiny_model_dir: Path, tmp_path: Path, left: list[str]) -> None:
    """transformers would make one whose only tokens are the special ones."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    for name in {"tokenizer.json", "vocab.json", "merges.txt"} - set(left):
        (model / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(
        FileError, match=r"tokenizer has no vocabulary \(tokenizer\.json, vocab\.json and merges\.txt, "
    ):
        load_source(model)


def test_weights_that_are_not_used_do_not_change_the_digest(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Others may download another variant into the hub's cache while a word is learned."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    before = digest_directory(model)
    (weights,) = (model / "unet").glob("*.safetensors")
    shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
    assert digest_directory(model) == before
    weights.write_bytes(weights.read_bytes() + b"!")
    assert digest_directory(model) != before


def test_a_single_file_matches_the_model_it_was_made_from(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = load_source(tiny_model_dir)
    checkpoint = tmp_path / "tiny.safetensors"
    save_file(original_layout(directory), checkpoint)
    config = tmp_path / "config"
    shutil.copytree(tiny_model_dir, config, ignore=shutil.ignore_patterns("*.safetensors"))

    source = load_source(checkpoint, config=config)

    assert (source.name, source.pipeline) == ("tiny.safetensors", "StableDiffusionPipeline")
    for ours, theirs in (
        (source.unet, directory.unet),
        (source.vae, directory.vae),
        (source.text_encoders["text_encoder"], directory.text_encoders["text_encoder"]),
    ):
        expected = dict(theirs.named_parameters())
        assert dict(ours.named_parameters()).keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in ours.named_parameters())
    assert source.digest != directory.digest


def test_the_weights_of_a_single_files_config_are_neither_read_nor_hashed(tiny_model_dir: Path, tmp_path: Path) -> None:
    weights = original_layout(load_source(tiny_model_dir))
    checkpoint, config = tmp_path / "tiny.safetensors", tmp_path / "config"
    save_file(weights, checkpoint)
    shutil.copytree(tiny_model_dir, config, ignore=shutil.ignore_patterns("*.safetensors"))
    assert load_source(checkpoint, config=config).digest == load_source(checkpoint, config=tiny_model_dir).digest
    save_file({name: weight for name, weight in weights.items() if "cond_stage_model" not in name}, checkpoint)
    with pytest.raises(FileError, match=r"CLIPTextModel.*: give a matching --config"):
        load_source(checkpoint, config=tiny_model_dir)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias", "has no weights .*layers.1.mlp.fc1"),
        ("model.diffusion_model.input_blocks.0.0.bias", "cannot be loaded as a StableDiffusionPipeline"),
    ],
)
def test_a_single_file_in_which_a_weight_is_missing_is_refused(
    tiny_model_dir: Path, tmp_path: Path, lost: str, message: str
) -> None:
    weights = original_layout(load_source(tiny_model_dir))
    del weights[lost]
    save_file(weights, tmp_path / "tiny.safetensors")
    with pytest.raises(FileError, match=rf"tiny\.safetensors {message}"):
        load_source(tmp_path / "tiny.safetensors", config=tiny_model_dir)


def test_a_single_file_whose_config_has_no_vocabulary_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    config, checkpoint = tmp_path / "config", tmp_path / "tiny.safetensors"
    shutil.copytree(tiny_model_dir, config, ignore=shutil.ignore_patterns("tokenizer.json", "vocab.json"))
    save_file({"weight": torch.ones(3)}, checkpoint)
    with pytest.raises(FileError, match=r"config/tokenizer has no vocabulary \(tokenizer\.json, "):
        load_source(checkpoint, config=config)


@pytest.mark.parametrize("tiny_flux_dir", ["dev"], indirect=True)
def test_a_single_file_of_a_model_with_t5_is_refused(tiny_sd3_dir: Path, tiny_flux_dir: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "large.safetensors"
    save_file({"weight": torch.ones(3)}, checkpoint)
    for config, pipeline in ((tiny_sd3_dir, "StableDiffusion3Pipeline"), (tiny_flux_dir, "FluxPipeline")):
        message = (
            rf"large\.safetensors is a single file of a {pipeline}, whose text encoders are not read from one: "
            "single files are for models with a UNet, give a diffusers directory or a hub id"
        )
        for dtype in (torch.float32, torch.float16):
            with pytest.raises(UsageError, match=message) as caught:
                load_source(checkpoint, dtype, config=config)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("model.ckpt", True, r"model\.ckpt is not a \.safetensors file: pickles are not read, convert"),
        ("model.safetensors", False, r"model\.safetensors is a single file: give --config, a diffusers directory"),
        ("model.safetensors", True, r"model\.safetensors cannot be loaded as a StableDiffusionPipeline"),
    ],
)
def test_a_single_file_that_cannot_be_used_is_reported_on_one_line(
    tiny_model_dir: Path, tmp_path: Path, name: str, config: bool, message: str
) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / name)
    with pytest.raises(OnewordError, match=message) as caught:
        load_source(tmp_path / name, config=tiny_model_dir if config else None)
    assert "\n" not in str(caught.value)
