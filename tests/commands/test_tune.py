"""`tune` on Lightning's small regression: what it finds, writes, keeps when interrupted, and refuses."""

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning.__main__ import main
from lowbit_lightning.commands import tune_passes, tune_search
from lowbit_lightning.commands.tune_journal import Journal
from lowbit_lightning.commands.tune_search import EpsTrial, LrTrial, choose_eps, halve, make_plan
from lowbit_lightning.errors import InvalidArgumentError

pytestmark = [
    # Lightning calls an API that jsonargparse has renamed.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # Tiny runs: shorter than the logging interval, and their data needs no worker processes.
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]

ADAM = {
    "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
    "trainer": {"accelerator": "cpu"},
}
#: Four perturbations and the clean pass: what the least search takes.
LEAST = 6 * 5 + 2 * (5 * 24 + 7)


class Regression(LightningModule):
    """Learns, with dropout and in shuffled batches, so that nothing is the same twice by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Dropout(0.1))
        self.head = torch.nn.Linear(16, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = torch.nn.functional.mse_loss(self.head(self.layers(inputs)), targets)
        self.log("train_loss", loss)
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        inputs = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8, shuffle=True)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_models")
    module.Regression = Regression  # type: ignore[attr-defined]
    monkeypatch.setattr(Regression, "__module__", "my_models")
    monkeypatch.setitem(sys.modules, "my_models", module)


def config(optimizer: str = "FZOO", **settings: Any) -> dict[str, Any]:
    init_args = {"lr": 0.01, "eps": 1e-3} | ({"num_perturbations": 4} if optimizer == "FZOO" else {}) | settings
    return {
        "model": {"class_path": "my_models.Regression"},
        "optimizer": {"class_path": f"lowbit_lightning.optim.{optimizer}", "init_args": init_args},
        "trainer": {
            "accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False, "enable_model_summary": False,
            "limit_val_batches": 0, "strategy": "forward_only",
        },
    }  # fmt: skip


def write(content: dict[str, Any], name: str = "run.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(content))
    return name


def tuned() -> dict[str, float]:
    found: dict[str, float] = yaml.safe_load(Path("tuned.yaml").read_text())["optimizer"]["init_args"]
    return found


@pytest.mark.parametrize("optimizer", ["FZOO", "MeZO"])
def test_overlay_works_on_top_of_the_configuration(optimizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(config(optimizer))
    assert main(["tune", "run.yaml", "--forwards", "400"]) == 0
    text = capsys.readouterr().out
    assert "sigma/eps" in text
    assert "best" in text
    assert "chosen" in text
    assert set(tuned()) == {"lr", "eps"}
    assert not Path("tuned.yaml.progress").exists()
    assert Path("tuned.yaml").read_text().startswith(f"# lr and eps of {optimizer}")
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "run.yaml", "--config", "tuned.yaml", "--print_config"])
    merged = yaml.safe_load(capsys.readouterr().out)["optimizer"]["init_args"]
    assert merged["lr"] == tuned()["lr"]
    if optimizer == "FZOO":
        assert merged["num_perturbations"] == 4, "the configuration's other settings stay"


def test_no_trace_of_callbacks_and_loggers_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    content = config()
    content["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}}
    write(content)
    assert main(["tune", "run.yaml", "--forwards", "400"]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["run.yaml", "tuned.yaml"]
    assert "bytes/parameter" not in capsys.readouterr().out


def test_interrupted_search_says_what_it_knows_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(config())
    assert main(["tune", "run.yaml", "--forwards", "400"]) == 0
    straight = Path("tuned.yaml").read_text()
    passes = count_passes(monkeypatch, stop_after=150)
    arguments = ["tune", "run.yaml", "--forwards", "400", "--force"]
    assert main(arguments) == 130
    printed = capsys.readouterr().out
    assert "chosen" in printed
    assert "The same command goes on" in printed
    assert Path("tuned.yaml").read_text() == straight, "not written before the end"
    done = len(passes)
    count_passes(monkeypatch, passes)
    assert main(arguments) == 0
    assert Path("tuned.yaml").read_text() == straight
    total = make_plan(400, 5).forwards
    assert len(passes) <= total + 5, "passes were made twice"
    assert len(passes) > done


def count_passes(monkeypatch: pytest.MonkeyPatch, passes: list[int] | None = None, stop_after: int = 0) -> list[int]:
    counted = [] if passes is None else passes
    original = Regression.training_step if passes is None else ORIGINAL

    def training_step(self: Regression, batch: Any, batch_idx: int) -> Any:
        if stop_after and len(counted) == stop_after:
            raise KeyboardInterrupt
        counted.append(1)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Regression, "training_step", training_step)
    return counted


ORIGINAL = Regression.training_step


def test_progress_of_other_settings_is_not_taken_up(capsys: pytest.CaptureFixture[str]) -> None:
    write(config())
    Journal(Path("tuned.yaml.progress"), "another configuration").close()
    assert main(["tune", "run.yaml"]) == 2
    assert "tuned.yaml.progress" in capsys.readouterr().err


def test_torn_line_of_a_killed_search_is_dropped() -> None:
    journal = Journal(Path("x.progress"), "one")
    journal.add("a", [1.0, math.inf], [0])
    journal.close()
    with Path("x.progress").open("a") as file:
        file.write('["b", [2.')
    again = Journal(Path("x.progress"), "one")
    assert again.get("a") == ([1.0, math.inf], [0])
    assert len(again) == 1
    again.add("c", [3.0], [])
    again.remove()
    assert not Path("x.progress").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "named"),
    [
        ({}, ["--forwards", str(LEAST - 1)], ["--forwards", "5 forward passes", f"at least {LEAST}"]),
        ({}, ["--forwards", "0"], ["--forwards 0", "at least 1"]),
        ({}, ["--out", "nowhere/tuned.yaml"], ["--out 'nowhere/tuned.yaml'", "create it first"]),
        ({}, ["--out", "run.yaml"], ["--out 'run.yaml' exists", "--force"]),
        ({}, ["--trainer.devices=2", "--trainer.strategy=forward_only_ddp"], ["2 processes", "--trainer.devices=1"]),
        ({}, ["--optimizer.init_args.lr=0"], ["lr is 0"]),
        (ADAM, [], ["no forward-only optimizer", "FZOO or MeZO", "tune CONFIG fzoo"]),
        ({"trainer": {"accelerator": "cpu"}}, [], ["takes no gradients", "forward_only"]),
    ],
)
def test_what_cannot_be_tuned_is_named(
    change: dict[str, Any], arguments: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(config() | change)
    assert main(["tune", "run.yaml", *arguments]) == 2
    message = capsys.readouterr().err
    assert [text for text in named if text not in message] == []
    assert not Path("tuned.yaml").exists()


def test_least_budget_is_enough() -> None:
    assert make_plan(LEAST, 5).forwards == LEAST
    with pytest.raises(InvalidArgumentError, match=f"at least {LEAST}"):
        make_plan(LEAST - 1, 5)


@pytest.mark.parametrize("forwards", [500, 2000, 20000])
@pytest.mark.parametrize("passes", [2, 9])
def test_plan_spends_most_of_the_budget_and_no_more(forwards: int, passes: int) -> None:
    plan = make_plan(forwards, passes)
    assert 0.7 * forwards < plan.forwards <= forwards
    trained = sum(
        passes * count * (steps - before)
        for count, steps, before in zip(tune_search.RUNGS, plan.steps, (0, *plan.steps), strict=False)
    )
    assert trained + 6 * passes * plan.eps_batches + plan.steps[-1] == plan.forwards


def test_eps_is_the_middle_of_the_flat_region() -> None:
    # Rounding on the left, curvature on the right, a jump of a factor of two in one batch of three.
    norms = [[9.0, 9.0, 9.0], [2.0, 2.0, 2.0], [2.02, 2.0, 4.0], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0]]
    trials = [EpsTrial(10.0**i, batch) for i, batch in enumerate(norms)]
    assert choose_eps(trials) is trials[3]
    assert [trial.is_flat for trial in trials] == [False, True, True, True, True, False]


def test_without_a_flat_region_the_steadiest_eps_is_taken_and_not_called_flat() -> None:
    trials = [EpsTrial(10.0**i, [norm]) for i, norm in enumerate([1.0, 9.0, 12.0, 40.0, math.nan, 0.0])]
    chosen = choose_eps(trials)
    assert chosen is trials[2]
    assert not chosen.is_flat


def test_losses_that_never_differ_are_an_error() -> None:
    with pytest.raises(InvalidArgumentError, match="finite and differ"):
        choose_eps([EpsTrial(1.0, [0.0]), EpsTrial(2.0, [0.0])])


def test_halving_keeps_the_best_and_drops_what_diverges() -> None:
    plan, trained = make_plan(2000, 9), []

    def train(trial: LrTrial, steps: int) -> None:
        trained.append((trial.lr, steps))
        loss = math.nan if trial.lr > 5 else abs(trial.lr - 3)
        trial.losses[:] = [loss] * steps

    trials = [LrTrial(float(lr)) for lr in range(8)]
    assert halve(trials, plan, train, lambda step: 10.0).lr == 3.0
    assert len(trained) == 8 + 4 + 2
    assert {lr for lr, steps in trained if steps == plan.steps[-1]} <= {2.0, 3.0, 4.0}
    assert trials[6].diverged
    assert trials[3].change == -10.0


def test_a_loss_is_lower_only_beyond_what_batches_differ_by() -> None:
    def compared(losses: list[float]) -> LrTrial:
        trial = LrTrial(1.0, [9.0, *losses])
        trial.compare([4.0, 2.0, 3.0])
        return trial

    assert compared([3.0, 1.1, 2.0]).is_better
    assert not compared([3.0, 2.9, 2.0]).is_better
    assert not compared([4.0, 2.0, 3.0]).is_better
    assert compared([math.inf, 2.0, 2.0]).change == math.inf


def test_no_gain_at_any_rate_is_an_error_and_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    write(config(lr=1000.0))
    assert main(["tune", "run.yaml", "--forwards", "400"]) == 2
    printed = capsys.readouterr()
    assert "by more than it differs from batch to batch" in printed.err
    assert "±" in printed.out
    assert Path("tuned.yaml.progress").exists(), "more passes go on from these"


def test_trials_see_the_same_batches_and_a_repeated_step_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes differences between learning rates theirs, and an interrupted search the same as a straight one."""
    sums: dict[str, set[float]] = {}
    original = tune_passes._Passes._evaluate

    def evaluate(self: Any, key: str, step: int, others: bool = True) -> None:
        batch = self._batches.of_step(step)
        sums.setdefault(key.split("step ")[1], set()).add(sum(float(inputs.sum()) for inputs, _ in batch))
        original(self, key, step, others)

    monkeypatch.setattr(tune_passes._Passes, "_evaluate", evaluate)
    write(config())
    main(["tune", "run.yaml", "--forwards", "800", "--trainer.accumulate_grad_batches=2"])
    assert len(sums) > 10
    assert {len(found) for found in sums.values()} == {1}
