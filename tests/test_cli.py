import errno
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lowbit_lightning import checkpoints, configs
from lowbit_lightning.__main__ import main
from lowbit_lightning.callbacks import MemoryLedger
from lowbit_lightning.cli import LowBitCLI
from lowbit_lightning.errors import CheckpointError, InvalidArgumentError

pytestmark = [
    # Tiny runs: shorter than the logging interval, and their data needs no worker processes.
    # Lightning calls an API that jsonargparse has renamed.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # Lightning uses a class that torch has deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class LateModel(BoringModel):
    """Creates its weights in configure_model and has no configure_optimizers, as a module made for FSDP2 would."""

    configure_optimizers = LightningModule.configure_optimizers  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        del self.layer

    def configure_model(self) -> None:
        self.layer = torch.nn.Linear(32, 2)
        self.LayerNorm = torch.nn.LayerNorm(2)
        self.frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
        self.tied = self.layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.layer(x))


class BitsPerByteModel(BoringModel):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log_dict({"val_loss": 1.88, "val_bits_per_byte": 2.7134})


class Interrupter(Callback):
    def on_train_batch_end(self, *args: object) -> None:
        raise KeyboardInterrupt


class DiskFiller(Callback):
    """Fills the disk while a checkpoint is written: the third write fails."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        def write(file: checkpoints._ErrorKeepingFile, data: bytes) -> int:
            file.error = OSError(errno.ENOSPC, "No space left on device")
            raise file.error

        checkpoints._ErrorKeepingFile.write = write  # type: ignore[method-assign, assignment]


TRAINER = {
    "max_steps": 2,
    "limit_train_batches": 2,
    "limit_val_batches": 1,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}
BORING = "lightning.pytorch.demos.boring_classes"


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A configuration that trains; the working folder is ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    return {
        "model": {"class_path": f"{BORING}.BoringModel"},
        "data": {"class_path": f"{BORING}.BoringDataModule"},
        "trainer": dict(TRAINER),
    }


def write(config: object, name: str = "run.yaml") -> str:
    Path(name).write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return name


def instantiate(config: dict[str, object], *more: str) -> LowBitCLI:
    """The CLI without running its verb; ``fit`` is the only verb that binds an optimizer."""
    return LowBitCLI(["--config", write(config), *more], run=False)


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def optimizer_of(config: dict[str, object], *more: str) -> tuple[LowBitCLI, torch.optim.Optimizer]:
    cli = instantiate(config, *more)
    cli.trainer.fit(cli.model, cli.datamodule)
    return cli, cli.trainer.optimizers[0]


@pytest.fixture
def late(complete: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """``complete`` with :class:`LateModel`, under a name that can be imported."""
    module = types.ModuleType("my_models")
    for cls in (LateModel, BitsPerByteModel, Interrupter, DiskFiller):
        monkeypatch.setattr(cls, "__module__", "my_models")
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "my_models", module)
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}}
    trainer = {**TRAINER, "logger": False, "enable_checkpointing": False}
    return {**complete, "trainer": trainer, "model": {"class_path": class_path(LateModel)}, "optimizer": adamw}


# The late optimizer


def test_optimizer_is_built_from_names_after_configure_model(late: dict[str, object]) -> None:
    _, optimizer = optimizer_of(late)
    assert isinstance(optimizer, torch.optim.AdamW)
    decay, exempt = optimizer.param_groups
    assert (decay["param_names"], decay["weight_decay"]) == (["layer.weight"], 0.1)
    assert exempt["param_names"] == ["layer.bias", "LayerNorm.weight", "LayerNorm.bias"]
    assert exempt["weight_decay"] == 0.0


def test_no_decay_is_overridable(late: dict[str, object]) -> None:
    _, optimizer = optimizer_of({**late, "no_decay": ["LAYER.*"]})
    decay, exempt = optimizer.param_groups
    assert decay["param_names"] == ["LayerNorm.weight", "LayerNorm.bias"]
    assert exempt["param_names"] == ["layer.weight", "layer.bias"]


def test_optimizer_without_weight_decay_has_one_group(late: dict[str, object]) -> None:
    _, optimizer = optimizer_of({**late, "optimizer": {"class_path": "torch.optim.Rprop"}})
    assert len(optimizer.param_groups) == 1


def test_scheduler_steps_every_step_and_gets_its_total_steps(late: dict[str, object]) -> None:
    scheduler = {"class_path": "WarmupCosine", "init_args": {"warmup_steps": 1}}
    cli, _ = optimizer_of({**late, "lr_scheduler": scheduler})
    configured = cli.trainer.lr_scheduler_configs[0]
    assert configured.interval == "step"
    assert configured.scheduler.last_epoch == 2
    # At the end of the run the cosine has reached its floor, a tenth.
    assert configured.scheduler.get_last_lr() == pytest.approx([0.001, 0.001])


def test_given_total_steps_are_kept(late: dict[str, object]) -> None:
    scheduler = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 1.0, "total_steps": 9}}
    cli, _ = optimizer_of({**late, "lr_scheduler": scheduler})
    assert cli.trainer.lr_scheduler_configs[0].scheduler.total_steps == 9


def test_endless_run_asks_for_total_steps(late: dict[str, object]) -> None:
    endless = {**TRAINER, "max_steps": -1, "max_epochs": -1, "logger": False, "enable_checkpointing": False}
    with pytest.raises(InvalidArgumentError, match=r"lr_scheduler\.init_args\.total_steps.*max_steps"):
        optimizer_of({**late, "trainer": endless, "lr_scheduler": {"class_path": "WarmupCosine"}})


def test_plateau_scheduler_follows_its_metric(late: dict[str, object]) -> None:
    plateau = {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau", "init_args": {"monitor": "val_loss"}}
    model = {"class_path": class_path(BitsPerByteModel)}
    cli, _ = optimizer_of({**late, "model": model, "lr_scheduler": plateau})
    configured = cli.trainer.lr_scheduler_configs[0]
    assert (configured.monitor, configured.interval) == ("val_loss", "epoch")
    assert configured.scheduler.best == pytest.approx(1.88)


def test_module_keeps_its_own_optimizer(complete: dict[str, object]) -> None:
    cli = instantiate(complete)
    assert "configure_optimizers" not in vars(cli.model)


def test_no_optimizer_anywhere_names_the_remedy(late: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    del late["optimizer"]
    assert main(["fit", "-c", write(late)]) == 2
    message = capsys.readouterr().err
    assert "LateModel" in message
    assert "--optimizer SoloAdamW --optimizer.lr" in message
    assert "optimizer:" in message


def test_scheduler_without_optimizer_is_an_error(
    complete: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", write({**complete, "lr_scheduler": {"class_path": "WarmupCosine"}})]) == 2
    assert "lr_scheduler" in capsys.readouterr().err


# A whole run


def test_fit_ends_with_the_summary_and_can_be_repeated(
    late: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = {
        **TRAINER,
        "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "version": 0}},
    }
    config = {**late, "model": {"class_path": class_path(BitsPerByteModel)}, "trainer": trainer}
    for _ in range(2):  # the second time its folder exists
        assert main(["fit", "-c", write(config)]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-1] == "validation bits per byte: 2.71"
    text = "\n".join(lines[-6:])
    assert re.search(r"trained +BitsPerByteModel on BoringDataModule, 66 trainable parameters, 2 steps in", text)
    assert "AdamW, states 536 B (fp32 AdamW: 528 B)" in text
    assert "tensorboard --logdir runs/lightning_logs" in text
    checkpoint = re.search(r"checkpoint +(\S+)", text)
    assert checkpoint
    assert Path(checkpoint[1]).is_file()
    assert yaml.safe_load(Path("runs/lightning_logs/version_0/config.yaml").read_text())["optimizer"]


def test_logger_is_tensorboard_by_default(complete: dict[str, object]) -> None:
    assert type(instantiate(complete).trainer.logger).__name__ == "TensorBoardLogger"


def test_memory_ledger_is_added_once(complete: dict[str, object]) -> None:
    def ledgers(cli: LowBitCLI) -> int:
        return sum(isinstance(callback, MemoryLedger) for callback in cli.trainer.callbacks)

    assert ledgers(instantiate(complete)) == 1
    own = {**TRAINER, "callbacks": [{"class_path": "lowbit_lightning.callbacks.MemoryLedger"}]}
    assert ledgers(instantiate({**complete, "trainer": own})) == 1


def test_same_seed_gives_the_same_weights(complete: dict[str, object]) -> None:
    first, second = (instantiate(complete).model.layer.weight for _ in range(2))
    assert torch.equal(first, second)


def test_printed_configuration_round_trips(late: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    late["lr_scheduler"] = {"class_path": "WarmupCosine"}
    printed = []
    for name in (write(late), "printed.yaml"):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "-c", name, "--print_config"])
        assert stop.value.code == 0
        printed.append(capsys.readouterr().out)
        write(printed[-1], "printed.yaml")
    assert printed[0] == printed[1]
    assert "class_path: torch.optim.AdamW" in printed[0]


def test_interrupted_run_exits_with_130(late: dict[str, object]) -> None:
    late["trainer"] = {**TRAINER, "logger": False, "callbacks": [{"class_path": class_path(Interrupter)}]}
    assert main(["fit", "-c", write(late)]) == 130


def test_other_verbs_need_no_optimizer(late: dict[str, object]) -> None:
    del late["optimizer"]
    assert main(["validate", "-c", write(late)]) == 0


# Checkpoints


def test_full_disk_leaves_no_part_of_a_checkpoint(
    late: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints._ErrorKeepingFile, "write", checkpoints._ErrorKeepingFile.write)
    late["trainer"] = {**TRAINER, "logger": False, "callbacks": [{"class_path": class_path(DiskFiller)}]}
    assert main(["fit", "-c", write(late)]) == 2
    message = capsys.readouterr().err
    assert "no space left on the disk" in message
    assert ".ckpt" in message
    assert list(Path("checkpoints").iterdir()) == []


def test_failed_save_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    checkpoints.AtomicCheckpointIO().save_checkpoint({"step": torch.tensor(1)}, path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as failed:
        checkpoints.AtomicCheckpointIO().save_checkpoint({"step": torch.tensor(2)}, path)
    assert failed.value.filename == str(path)
    assert torch.load(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole checkpoint of a BoringModel after two steps."""
    path = tmp_path_factory.mktemp("checkpoint") / "whole.ckpt"
    trainer = Trainer(**{**TRAINER, "logger": False, "enable_checkpointing": False})
    trainer.fit(BoringModel(), BoringDataModule())
    trainer.save_checkpoint(path)
    return path.read_bytes()


def test_resuming_from_a_whole_checkpoint_works(complete: dict[str, object], checkpoint: bytes) -> None:
    Path("whole.ckpt").write_bytes(checkpoint)
    assert main(["fit", "-c", write(complete), "--trainer.max_steps=3", "--ckpt_path=whole.ckpt"]) == 0


# The resumed run has a folder of its own, and Lightning says what that means for the best checkpoints.
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_last_is_the_newest_of_the_earlier_runs(complete: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    saver = {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}}
    run = write({**complete, "trainer": {**TRAINER, "callbacks": [saver]}})
    assert main(["fit", "-c", run]) == 0
    assert main(["fit", "-c", run, "--trainer.max_steps=3", "--ckpt_path=last"]) == 0
    restored = Path("lightning_logs/version_0/checkpoints/last.ckpt").resolve()
    assert f"Restored all states from the checkpoint at {restored}" in caplog.text
    assert torch.load("lightning_logs/version_1/checkpoints/last.ckpt")["global_step"] == 3


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_trusted_is_the_newest_whole_one_of_the_earlier_runs(
    complete: dict[str, object], checkpoint: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    run = write(complete)
    folders = [Path(f"lightning_logs/version_{version}/checkpoints") for version in (0, 1)]
    for version, folder in enumerate(folders):
        folder.mkdir(parents=True)
        path = folder / "last-trusted.ckpt"
        path.write_bytes(checkpoint if version == 0 else checkpoint[:-100])  # the newer one is torn
        os.utime(path, (version, version))
    with pytest.warns(UserWarning, match=r"torn.*left out"):
        assert main(["fit", "-c", run, "--trainer.max_steps=3", "--ckpt_path=trusted"]) == 0
    assert f"Continuing from {Path('lightning_logs/version_0/checkpoints/last-trusted.ckpt').resolve()}" in caplog.text


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_trusted_where_there_is_none_is_an_error(
    complete: dict[str, object], verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "-c", write(complete), "--ckpt_path", "trusted"]) == 2
    assert "--ckpt_path trusted: there is no last-trusted.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_torn_checkpoint_is_named_before_training(
    complete: dict[str, object], checkpoint: bytes, kept: float, capsys: pytest.CaptureFixture[str]
) -> None:
    size = int(kept if kept >= 1 else kept * len(checkpoint))
    Path("torn.ckpt").write_bytes(checkpoint[:size])
    assert main(["fit", "-c", write(complete), "--ckpt_path", "torn.ckpt"]) == 2
    message = capsys.readouterr().err
    assert "'torn.ckpt'" in message
    assert "torn" in message.replace("torn.ckpt", "")
    assert "without --ckpt_path" in message


def test_missing_checkpoint_is_named_with_its_neighbours(
    complete: dict[str, object], checkpoint: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("whole.ckpt").write_bytes(checkpoint)
    assert main(["fit", "-c", write(complete), "--ckpt_path", "hole.ckpt"]) == 2
    message = capsys.readouterr().err
    assert "'hole.ckpt' does not exist" in message
    assert "whole.ckpt" in message


def test_weights_alone_are_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of a Lightning run"):
        checkpoints.check_readable(tmp_path / "weights.pt")


def test_objects_in_a_checkpoint_need_consent(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {}, "pytorch-lightning_version": "2.6", "x": types.SimpleNamespace()}, tmp_path / "a.ckpt"
    )
    with pytest.raises(CheckpointError, match="--weights_only=false"):
        checkpoints.check_readable(tmp_path / "a.ckpt")
    checkpoints.check_readable(tmp_path / "a.ckpt", weights_only=False)


def test_folder_that_is_no_distributed_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="without a distributed checkpoint"):
        checkpoints.check_readable(tmp_path)


def test_saved_model_that_no_longer_exists(
    complete: dict[str, object], checkpoint: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("old.ckpt").write_bytes(checkpoint)
    content = torch.load("old.ckpt")
    torch.save({**content, "hyper_parameters": {"_class_path": "no.such.Model"}}, "old.ckpt")
    assert main(["fit", "-c", write(complete), "--ckpt_path=old.ckpt"]) == 2
    message = capsys.readouterr().err
    assert "'old.ckpt' was saved with hyper-parameters" in message
    assert "no.such.Model" in message


# Names of shipped configurations


@pytest.mark.parametrize("arguments", [["--config", "tiny"], ["-c", "tiny"], ["--config=tiny"], ["-c=tiny"]])
def test_shipped_configuration_is_found_by_name(
    complete: dict[str, object], arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "recipes").mkdir()
    write({**complete, "seed_everything": 7}, "recipes/tiny.yaml")
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "__init__.py"))
    assert LowBitCLI(arguments, run=False).config["seed_everything"] == 7


def test_a_folder_of_its_name_does_not_hide_a_configuration(
    complete: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "shipped" / "recipes").mkdir(parents=True)
    write(complete, "shipped/recipes/tiny.yaml")
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "shipped" / "__init__.py"))
    Path("tiny").mkdir()  # as a logger makes that is called like the recipe
    assert isinstance(LowBitCLI(["-c", "tiny"], run=False).model, BoringModel)


def test_existing_file_wins_over_a_name(complete: dict[str, object]) -> None:
    write(complete, "quickstart")
    assert isinstance(LowBitCLI(["-c", "quickstart"], run=False).model, BoringModel)


def test_unknown_name_offers_the_closest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/quickstart.yaml").write_text("# The first run")
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "__init__.py"))
    assert main(["fit", "--config", "quikstart"]) == 2
    message = capsys.readouterr().err
    assert "'quikstart'" in message
    assert "Did you mean quickstart?" in message
    assert "lowbit-lightning list" in message


# Mistakes in a configuration: each names the key, the value, the file and line, and the remedy

MISTAKES = {
    "unknown key": (
        "optimiser:\n  class_path: torch.optim.SGD",
        ["line 1", "unknown key optimiser", "mean optimizer?"],
    ),
    "unknown trainer key": ("trainer:\n  max_step: 2", ["line 2", "trainer.max_step = 2", "mean trainer.max_steps?"]),
    "wrong type": ("trainer:\n  max_steps: many", ["line 2", "trainer.max_steps", "a whole number", "'many'"]),
    "unknown class": ("optimizer: torch.optim.AdamV", ["line 1", "no class AdamV", "mean torch.optim.Adam"]),
    "unknown short name": ("optimizer:\n  class_path: SoloAdamV", ["line 2", "SoloAdamV", "mean SoloAdamW?"]),
    "unknown module": (
        "optimizer:\n  class_path: lowbit_lightning.optimm.SoloAdamW",
        ["line 2", "cannot import lowbit_lightning.optimm", "mean lowbit_lightning.optim"],
    ),
    "unknown argument": (
        "optimizer:\n  class_path: torch.optim.SGD\n  init_args:\n    momentun: 1",
        ["line 4", "optimizer.init_args.momentun = 1", "torch.optim.SGD does not take", "mean momentum?"],
    ),
    "wrong argument type": (
        "optimizer:\n  class_path: torch.optim.SGD\n  init_args:\n    lr: fast",
        ["line 4", "optimizer.init_args.lr", "a number", "'fast'"],
    ),
    "unknown callback": (
        "trainer:\n  callbacks+:\n    - class_path: lightning.pytorch.callbacks.EarlyStoping",
        ["line 3", "trainer.callbacks[0]", "mean lightning.pytorch.callbacks.EarlyStopping?"],
    ),
    "callback without its argument": (
        "trainer:\n  callbacks:\n    - class_path: EarlyStopping",
        ["line 3", "EarlyStopping needs monitor"],
    ),
    "wrong type in a callback": (
        "trainer:\n  callbacks:\n    - class_path: EarlyStopping\n      init_args: {monitor: a, patience: three}",
        ["line 4", "trainer.callbacks[0].init_args.patience", "a whole number", "'three'"],
    ),
    "not a callback": (
        "trainer:\n  callbacks:\n    - class_path: torch.nn.Linear",
        ["line 3", "torch.nn.Linear is not a Callback"],
    ),
    "other class tree, model": (
        "model:\n  class_path: pytorch_lightning.demos.boring_classes.BoringModel",
        ["line 2", "pytorch_lightning.demos.boring_classes.BoringModel", "import lightning.pytorch instead of"],
    ),
    "other class tree, data": (
        "data:\n  class_path: pytorch_lightning.demos.boring_classes.BoringDataModule",
        ["line 2", "pytorch_lightning.demos.boring_classes.BoringDataModule", "import lightning.pytorch instead of"],
    ),
    "other class tree, callback": (
        "trainer:\n  callbacks:\n    - class_path: pytorch_lightning.callbacks.Timer",
        ["line 3", "pytorch_lightning.callbacks.Timer", "import lightning.pytorch instead of"],
    ),
    "no YAML": ("model: [\n", ["bad.yaml, line 2 is not YAML"]),
    "no keys": ("hello", ["bad.yaml must hold keys"]),
    "empty": ("", ["bad.yaml is empty"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_explained(complete: dict[str, object], mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = MISTAKES[mistake]
    assert main(["fit", "-c", write(complete), "-c", write(text, "bad.yaml")]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert "bad.yaml" in output.err
    assert [part for part in expected if part.lower() not in output.err.lower()] == [], output.err
    assert output.err.count("\n") == 1
    assert "usage:" not in output.out + output.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trainer.max_stepz=3"], ["the command line", "trainer.max_stepz = 3", "mean trainer.max_steps?"]),
        (["--trainer.max_steps", "abc"], ["the command line", "trainer.max_steps", "'abc'"]),
        (["--optimizer", "SGDD"], ["the command line", "SGDD", "mean SGD?"]),
        (["--optimizer.lr", "1"], ["the command line", "optimizer.lr = 1", "choose a class first"]),
        (["stray"], ["unexpected argument 'stray'"]),
        (["-c", "four_bit", "--trainer.plugins.weight=fp5"], ["trainer.plugins.weight", "'mxfp4', got 'fp5'"]),
    ],
)
def test_mistake_on_the_command_line_is_explained(
    complete: dict[str, object], arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", write(complete), *arguments]) == 2
    message = capsys.readouterr().err
    assert [part for part in expected if part not in message] == [], message


def test_no_model_says_where_a_complete_run_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 2
    message = capsys.readouterr().err
    assert "`model:` is missing" in message
    assert "--config quickstart" in message


def test_own_class_on_the_other_tree_is_named(
    complete: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pytorch_lightning

    module = types.ModuleType("my_old_code")
    module.MyModel = type("MyModel", (pytorch_lightning.LightningModule,), {"__module__": "my_old_code"})
    monkeypatch.setitem(sys.modules, "my_old_code", module)
    complete["model"] = {"class_path": "my_old_code.MyModel"}
    assert main(["fit", "-c", write(complete)]) == 2
    message = capsys.readouterr().err
    assert "my_old_code.MyModel is built on `pytorch_lightning`" in message
    assert "Import lightning.pytorch instead of pytorch_lightning" in message


def test_options_between_configurations_do_not_hide_them(
    complete: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write("trainer:\n  max_step: 2\n", "bad.yaml")
    assert main(["fit", "--trainer.max_time", "-1", "-c", write(complete), "--trainer.logger=false", "-c", bad]) == 2
    assert "bad.yaml, line 2" in capsys.readouterr().err


def test_a_module_of_the_other_class_tree_on_the_command_line(
    complete: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    name = "pytorch_lightning.demos.boring_classes.BoringModel"
    assert main(["fit", "-c", write(complete), "--model", name]) == 2
    assert f"{name} is built on `pytorch_lightning`" in capsys.readouterr().err


def test_a_config_file_of_the_users_is_never_replaced(complete: dict[str, object]) -> None:
    own = Path("config.yaml")
    write({**complete, "trainer": {**complete["trainer"], "logger": False}}, "config.yaml")  # type: ignore[dict-item]
    own.write_text("# mine\n" + own.read_text())
    before = own.read_text()
    assert main(["fit", "-c", "config.yaml"]) in (None, 0)
    assert own.read_text() == before


def test_last_without_an_earlier_run_is_an_error_outside_fit(
    complete: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", "-c", write(complete), "--ckpt_path", "last"]) == 2
    assert "--ckpt_path last: there is no last.ckpt" in capsys.readouterr().err


def test_the_remedy_for_no_optimizer_works(late: dict[str, object]) -> None:
    del late["optimizer"]
    assert main(["fit", "-c", write(late), "--optimizer", "SoloAdamW", "--optimizer.lr", "0.001"]) in (None, 0)


def test_of_a_callback_given_twice_the_later_one_counts(complete: dict[str, object]) -> None:
    ledgers = [
        {"class_path": "lowbit_lightning.callbacks.MemoryLedger", "init_args": {"every_n_steps": steps}}
        for steps in (7, 9)
    ]
    cli = instantiate({**complete, "trainer": {**complete["trainer"], "callbacks": ledgers}})  # type: ignore[dict-item]
    kept = [callback.every_n_steps for callback in cli.trainer.callbacks if type(callback).__name__ == "MemoryLedger"]
    assert kept == [9]


def test_a_scheduler_without_a_length_goes_on_after_every_epoch(late: dict[str, object]) -> None:
    scheduler = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}}
    cli, _ = optimizer_of({**late, "lr_scheduler": scheduler})
    assert cli.trainer.lr_scheduler_configs[0].interval == "epoch"


@pytest.mark.parametrize(
    ("optimizer", "strategy", "named"),
    [
        ("lowbit_lightning.optim.FZOO", "auto", "takes no gradients"),
        ("torch.optim.AdamW", "forward_only", "needs gradients"),
    ],
)
def test_optimizer_and_strategy_are_compared_before_anything_is_moved(
    late: dict[str, object], optimizer: str, strategy: str, named: str
) -> None:
    late["optimizer"] = {"class_path": optimizer, "init_args": {"lr": 0.1}}
    with pytest.raises(InvalidArgumentError, match=named):
        instantiate(late, "--trainer.strategy", strategy)


def test_an_optimizer_that_a_callback_replaces_is_left_to_the_strategy(complete: dict[str, object]) -> None:
    callback = "lowbit_lightning.callbacks.QuantizeOptimizerStates"
    complete["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}
    complete["trainer"] = {**TRAINER, "strategy": "forward_only", "callbacks": [{"class_path": callback}]}
    assert instantiate(complete).trainer.strategy is not None
