"""`lowbit-lightning export`: the stock Trainer and torch.optim.AdamW go on where SoloAdamW stopped."""

from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from lowbit_lightning.__main__ import main
from lowbit_lightning.callbacks import QuantizeOptimizerStates
from lowbit_lightning.commands import export
from lowbit_lightning.optim import SoloAdamW

BITS = {"bits": [4, 2], "min_numel": 0, "overrides": {"embed*": {"bits": [8, 8]}, "narrow*": {"bits": [32, 2]}}}
SOLO = {"class_path": "lowbit_lightning.optim.SoloAdamW", "init_args": BITS}


class Module(LightningModule):
    """Learns to map 64 numbers to random vectors, with an AdamW, two groups and a schedule of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 64)
        self.narrow = nn.Linear(64, 72)
        self.head = nn.Linear(72, 64)
        self.register_buffer("targets", torch.randn(64, 64))
        self.losses: list[float] = []
        self.rates: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        output = self.head(self.narrow(self.embed(batch)).relu())
        return nn.functional.mse_loss(output, self.targets[batch])  # type: ignore[index]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.embed.parameters(), "weight_decay": 0.0}, {"params": self.head.parameters()}]
        groups += [{"params": self.narrow.parameters(), "lr": 5e-3}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), foreach=False)
        schedule = LinearLR(optimizer, 1.0, 0.1, 60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.arange(64), batch_size=16)  # type: ignore[arg-type]


def fit(module: LightningModule, *callbacks: Callback, epochs: int, ckpt_path: Path | None = None) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module")
def solo(tmp_path_factory: pytest.TempPathFactory) -> tuple[SoloAdamW, Path]:
    """The optimizer of a run of ten epochs, and the checkpoint at its end."""
    trainer = fit(Module(), QuantizeOptimizerStates(SOLO), epochs=10)
    path = tmp_path_factory.mktemp("solo") / "solo.ckpt"
    trainer.save_checkpoint(path)
    assert isinstance(trainer.optimizers[0], SoloAdamW)
    return trainer.optimizers[0], path


def changed(checkpoint: Path, change: Any) -> str:
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, "changed.ckpt")
    return "changed.ckpt"


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["export", *arguments]) == 2
    return capsys.readouterr().err


def test_stock_trainer_and_adamw_go_on_from_it(solo: tuple[SoloAdamW, Path]) -> None:
    optimizer, checkpoint = solo
    assert main(["export", str(checkpoint), "-o", "out.ckpt"]) == 0
    module = Module()
    trainer = fit(module, epochs=10, ckpt_path=Path("out.ckpt"))  # the run is over: it loads and ends
    adamw = trainer.optimizers[0]
    assert type(adamw) is torch.optim.AdamW
    for (_, _, solos), (name, param) in zip(
        optimizer.named_params(),
        [(n, p) for part in ("embed", "head", "narrow") for n, p in getattr(module, part).named_parameters()],
        strict=True,
    ):
        assert torch.equal(solos, param), name
        expected = optimizer.dequantized_state(solos) | {"step": torch.tensor(40.0)}
        assert adamw.state[param].keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(adamw.state[param][key], value), (name, key)
            assert adamw.state[param][key].dtype == torch.float32


def test_going_on_with_adamw_is_as_good_as_going_on_with_solo(solo: tuple[SoloAdamW, Path]) -> None:
    _, checkpoint = solo
    assert main(["export", str(checkpoint), "-o", "out.ckpt"]) == 0
    with_solo, with_adamw = Module(), Module()
    fit(with_solo, QuantizeOptimizerStates(SOLO), epochs=15, ckpt_path=checkpoint)
    fit(with_adamw, epochs=15, ckpt_path=Path("out.ckpt"))
    assert with_adamw.rates == with_solo.rates
    assert with_adamw.losses == pytest.approx(with_solo.losses, rel=0.05)
    assert sum(with_adamw.losses[-4:]) < 0.9 * sum(with_adamw.losses[:4])


def test_groups_are_those_of_adamw(solo: tuple[SoloAdamW, Path]) -> None:
    _, checkpoint = solo
    assert main(["export", str(checkpoint), "-o", "out.ckpt"]) == 0
    (exported,) = torch.load("out.ckpt", weights_only=True)["optimizer_states"]
    adamw = Module().configure_optimizers()["optimizer"]
    expected = adamw.state_dict()["param_groups"][0].keys() | {"param_names"}
    assert [group.keys() for group in exported["param_groups"]] == [expected] * 3
    assert [(group["weight_decay"], group["betas"], group["foreach"]) for group in exported["param_groups"]] == [
        (0.0, (0.8, 0.95), False), (0.01, (0.8, 0.95), False), (0.01, (0.8, 0.95), False)
    ]  # fmt: skip


def test_all_else_in_the_checkpoint_stays(solo: tuple[SoloAdamW, Path]) -> None:
    _, checkpoint = solo
    assert main(["export", str(checkpoint), "-o", "out.ckpt"]) == 0
    before, after = (torch.load(path, weights_only=True) for path in (checkpoint, "out.ckpt"))
    assert list(before) == list(after)
    for name, value in before["state_dict"].items():
        assert torch.equal(value, after["state_dict"][name])
    for key in before.keys() - {"state_dict", "optimizer_states"}:
        assert before[key] == after[key], key


def test_default_name_is_beside_the_checkpoint_and_a_folder_is_a_place(
    solo: tuple[SoloAdamW, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, checkpoint = solo
    Path("folder").mkdir()
    assert main(["export", str(checkpoint), "-o", "folder"]) == 0
    assert capsys.readouterr().out.startswith("folder/solo-adamw.ckpt\n")
    Path("mine.ckpt").write_bytes(checkpoint.read_bytes())
    assert main(["export", "mine.ckpt"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "mine.ckpt", "mine-adamw.ckpt"}


def test_a_file_that_is_there_is_replaced_only_with_force(
    solo: tuple[SoloAdamW, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, checkpoint = solo
    Path("out.ckpt").write_text("my work")
    assert "--force" in complaint([str(checkpoint), "-o", "out.ckpt"], capsys)
    assert Path("out.ckpt").read_text() == "my work"
    assert main(["export", str(checkpoint), "-o", "out.ckpt", "--force"]) == 0
    assert "optimizer_states" in torch.load("out.ckpt", weights_only=True)


def test_progress_is_shown(
    solo: tuple[SoloAdamW, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "_PROGRESS_SECONDS", 0.0)
    assert main(["export", str(solo[1]), "-o", "out.ckpt"]) == 0
    assert "[export] 5 of 5 tensors" in capsys.readouterr().err


def test_what_cannot_be_exported_is_named_with_the_remedy(
    solo: tuple[SoloAdamW, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = solo[1].read_bytes()
    Path("sharded").mkdir()
    Path("torn.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": {}}, "loop.ckpt")
    for name, expected in {
        "missing.ckpt": "does not exist",
        "sharded": "save_distributed_checkpoint: false",
        "torn.ckpt": "torn",
        "loop.ckpt": "adamw_state_dict(optimizer)",
    }.items():
        message = complaint([name], capsys)
        assert repr(name) in message
        assert expected in message
    assert "'nowhere'" in complaint([str(solo[1]), "-o", "nowhere/out.ckpt"], capsys)


def test_a_checkpoint_without_quantized_states_says_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Module(), epochs=1).save_checkpoint("fp32.ckpt")
    assert "it has exp_avg, exp_avg_sq, step" in complaint(["fp32.ckpt"], capsys)


def test_a_missing_weight_is_named(solo: tuple[SoloAdamW, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name = changed(solo[1], lambda content: content["state_dict"].pop("head.weight"))
    assert "'head.weight'" in complaint([name], capsys)


def test_states_without_names_are_refused_with_a_remedy_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    class Unnamed(Module):
        """What a stock LightningCLI does with `optimizer:`."""

        def configure_optimizers(self) -> Any:
            return SoloAdamW(self.parameters(), min_numel=0)

    fit(Unnamed(), epochs=1).save_checkpoint("unnamed.ckpt")
    assert "with the callback QuantizeOptimizerStates" in complaint(["unnamed.ckpt"], capsys)
    remedy = QuantizeOptimizerStates({"init_args": {"min_numel": 0}})
    fit(Unnamed(), remedy, epochs=2, ckpt_path=Path("unnamed.ckpt")).save_checkpoint("named.ckpt")
    assert main(["export", "named.ckpt"]) == 0


def test_objects_are_loaded_only_on_trust(solo: tuple[SoloAdamW, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name = changed(solo[1], lambda content: content.update(hyper_parameters={"folder": PosixPath("data")}))
    assert "--trust" in complaint([name], capsys)
    assert main(["export", name, "--trust"]) == 0
