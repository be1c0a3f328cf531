"""The miniature's training, each stage for a second: its time limit, its state and its output."""

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from oneword.engines.errors import UsageError
from oneword.export.source import find_model, load_source
from oneword.train import compute
from oneword.train.miniature import training, world

SECOND = 1 / 60


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> training.Stages:
    """Stages with a work folder in which each stage has run for a second."""
    work = tmp_path_factory.mktemp("training")
    stages = training.Stages(
        work, vae_minutes=SECOND, judge_minutes=SECOND, unet_minutes=SECOND, pictures=150, batch=8, part=4
    )
    training.train(stages, lambda _: None)
    return stages


def state(stages: training.Stages, stage: str) -> Any:
    return torch.load(stages.work / f"{stage}.pt", weights_only=True)


def test_a_stage_ends_after_its_minutes_and_resumes_with_more(stages: training.Stages) -> None:
    before = state(stages, "judge")
    training.train_judge(stages, lambda _: None)  # no minutes remain: nothing changes
    again = state(stages, "judge")
    minutes = before["spent"] / 60 + SECOND
    started = time.monotonic()
    training.train_judge(replace(stages, judge_minutes=minutes), lambda _: None)
    elapsed = time.monotonic() - started
    longer = state(stages, "judge")

    assert before["step"] >= 1
    assert again["step"] == before["step"]
    assert longer["step"] > before["step"]
    assert minutes * 60 <= longer["spent"] <= before["spent"] + elapsed  # minutes are the total over all runs


def test_the_output_is_a_model_with_a_measured_quality(stages: training.Stages, tmp_path: Path) -> None:
    training.export(stages, tmp_path / "model")
    source = load_source(tmp_path / "model")
    vae, judge = training.quality(tmp_path / "model")

    assert source.unet.config.sample_size == world.SIZE // 8
    saved = torch.load(next(stages.work.glob("latents-*-scale.pt")), weights_only=True)
    assert source.vae.config.scaling_factor == pytest.approx(saved["scale"])
    assert re.fullmatch(r"VAE: [\d.]+ dB round trip", vae)
    assert re.match(r"judge: .*shape [\d.]+%", judge)


def test_a_vae_trained_further_needs_new_latents(stages: training.Stages, tmp_path: Path) -> None:
    stages = replace(stages, work=Path(shutil.copytree(stages.work, tmp_path / "work")))
    minutes = state(stages, "vae")["spent"] / 60 + SECOND
    training.train_vae(replace(stages, vae_minutes=minutes), lambda _: None)

    with pytest.raises(UsageError, match="the UNet has not been trained on this VAE, run it with more --unet-minutes"):
        training.export(stages, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_stage_resumes_with_the_given_rate(stages: training.Stages, tmp_path: Path) -> None:
    stages = replace(stages, work=Path(shutil.copytree(stages.work, tmp_path / "work")), unet_rate=4e-4)
    minutes = state(stages, "unet")["spent"] / 60 + SECOND
    training.train_unet(replace(stages, unet_minutes=minutes), lambda _: None)
    rates = [saved["param_groups"][0]["initial_lr"] for saved in state(stages, "unet")["optimisers"]]
    assert rates == pytest.approx([6e-4, 6e-4, 4e-4])  # two Muons, at 1.5 times AdamW's rate


@pytest.mark.parametrize("fast", [False, True])
def test_a_cpu_computes_in_bfloat16_only_if_it_multiplies_it(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "has_fast_bf16", lambda: fast)
    with training._autocast("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype is (torch.bfloat16 if fast else torch.float32)


def test_parts_that_do_not_fill_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a batch of 10 in parts of 4: give a multiple of the part"):
        training.Stages(tmp_path, batch=10, part=4)
    with pytest.raises(UsageError, match="threads is 0"):
        training.Stages(tmp_path, threads=0)


def test_zero_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pictures is 0: give at least 1"):
        training.Stages(tmp_path, pictures=0)


def warm(work: Path, **minutes: float) -> training.Stages:
    """Stages that start from the weights that ship, with no minutes unless given."""
    defaults = {"vae_minutes": 0.0, "judge_minutes": 0.0, "unet_minutes": 0.0}
    return training.Stages(
        work, **{**defaults, **minutes}, pictures=20, batch=8, part=4, start_from=find_model("miniature")[0]
    )


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a diffusers directory, by model and name."""
    return {f"{path.parent.name}.{k}": v for path in folder.rglob("*.safetensors") for k, v in load_file(path).items()}


def test_shipped_weights_without_further_training_are_written_unchanged(tmp_path: Path) -> None:
    stages = warm(tmp_path / "work")
    stages.work.mkdir()
    training.train(stages, lambda _: None)
    training.export(stages, tmp_path / "model")

    shipped = find_model("miniature")[0]
    before, after = weights(shipped), weights(tmp_path / "model")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    scales = [AutoencoderKL.load_config(folder / "vae")["scaling_factor"] for folder in (shipped, tmp_path / "model")]
    assert scales[0] == scales[1] != 1


def test_further_training_starts_from_shipped_weights_and_leaves_the_encoder_unchanged(tmp_path: Path) -> None:
    stages = warm(tmp_path / "work", vae_minutes=SECOND, unet_minutes=SECOND)
    stages.work.mkdir()
    training.train(stages, lambda _: None)
    training.export(stages, tmp_path / "model")

    before, after = weights(find_model("miniature")[0]), weights(tmp_path / "model")
    moved = {name: (after[name].float() - before[name].float()).norm() / before[name].float().norm() for name in before}
    changes = {
        part: [d for name, d in moved.items() if name.startswith(part)]
        for part in ("vae.encoder", "vae.decoder", "unet")
    }
    assert max(changes["vae.encoder"]) == 0
    assert 0 < max(changes["vae.decoder"]) < 0.2  # random weights would be about 1.4 away
    assert 0 < max(changes["unet"]) < 0.2


def test_starting_from_another_architecture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "new_vae", lambda: AutoencoderKL(block_out_channels=(32,)))
    with pytest.raises(UsageError, match=r"vae has another architecture than training\.py"):
        training.train_vae(warm(tmp_path, vae_minutes=SECOND), lambda _: None)


def test_a_stage_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no vae\.pt: train that stage first, or give --start-from MODEL"):
        training.train_unet(training.Stages(tmp_path), lambda _: None)


def test_plain_attention_predicts_what_the_fused_kernels_predict() -> None:
    """Equal up to float32 rounding."""
    folder = find_model("miniature")[0]
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    torch.manual_seed(0)
    ids, latents, t = torch.randint(500, (4, 32)), torch.randn(4, 12, 8, 8), torch.tensor([10, 400, 700, 990])
    with torch.no_grad():
        fused = unet(latents, t, text_encoder(ids)[0]).sample
        training.attend_plainly(text_encoder, unet)
        plain = unet(latents, t, text_encoder(ids)[0]).sample
    assert fused.std() > 0.3
    torch.testing.assert_close(plain, fused, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_workers_take_the_same_steps_as_one_process(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: five steps of PyTorch's Muon, which computes in bfloat16, and AdamW on the mean over all pictures."""
    monkeypatch.setattr(compute, "has_fast_bf16", lambda: True)
    torch.manual_seed(0)
    x, y = torch.randn(12, 6), torch.randn(12, 5)
    ours, theirs = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    start = [p.detach().clone() for p in theirs.parameters()]

    def loss(models: Any, count: int) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return 50 * (models[0](x[:count]) - y[:count]).square().mean()  # large enough that the gradient is clipped

    matrices, optimisers = training.new_optimisers([ours], 1e-2)
    stages = training.Stages(tmp_path, threads=threads)
    with training.Workers([ours], loss, (2, 4, 6), matrices, optimisers, stages) as workers:
        values = [workers.step(0.5) for _ in range(5)]

    expected = []
    muon = torch.optim.Muon(
        [p for p in theirs.parameters() if p.ndim == 2], 0.5 * 1.5e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([p for p in theirs.parameters() if p.ndim == 1], 0.5 * 1e-2, weight_decay=0.01)
    for _ in range(5):
        total = sum(loss([theirs], count) * count / 12 for count in (2, 4, 6))
        theirs.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        muon.step()
        adamw.step()
        expected.append(total.item())
    assert values == pytest.approx(expected, rel=1e-3)
    for p, reference, first in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        assert (reference - first).abs().max() > 0.01
        torch.testing.assert_close(p.detach(), reference.detach(), atol=1e-3, rtol=0)
