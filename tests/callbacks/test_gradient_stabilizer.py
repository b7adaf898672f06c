"""GradientStabilizer: Stable-SPAM in front of any optimizer, in its right place, exactly resumed, honest at start."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callbacks.guarded_run import SNAPSHOT, BadBatches, Net, fit, guard, monitor
from callbacks.small_run import Case, assert_exact, plain
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from lowbit_lightning.callbacks import ExactResume, GradientStabilizer, SpikeGuard, SpikeInjector, SpikeMonitor
from lowbit_lightning.callbacks.gradient_stabilizer import MomentumReset
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import FZOO, SoloAdamW, StableSPAM

STABLE_SPAM: list[str | dict[str, Any]] = ["ada_clip", "ada_gn", {"momentum_reset": {"every_n_steps": 7}}]


class Noise(pl.Callback):
    """Gradients of a test's choice: of many magnitudes, with spikes, the same in every run."""

    def __init__(self, change: Any = lambda grads, step: None) -> None:
        self.change = change
        self.step = 0
        self.seen: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        generator = torch.Generator().manual_seed(self.step)
        grads = []
        for param in pl_module.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            if self.step % 6 == 5:
                param.grad.view(-1)[0] *= 100
            grads.append(param.grad)
        self.change(grads, self.step)
        self.step += 1
        self.seen.append([grad.clone() for grad in grads])


class After(pl.Callback):
    """Notes the gradients that the optimizer gets."""

    def __init__(self) -> None:
        self.grads: list[list[Tensor | None]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        self.grads.append([None if param.grad is None else param.grad.clone() for param in params])


def weights(trainer: pl.Trainer) -> Tensor:
    return torch.cat([param.detach().flatten().double() for param in trainer.lightning_module.parameters()])


def statistics(stabilizer: GradientStabilizer, rule: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = stabilizer.state_dict()["rules"][rule]
    return found


def test_in_front_of_adamw_it_is_stable_spam() -> None:
    adamw = Net(lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-2, weight_decay=0.1))
    whole = Net(lambda named: StableSPAM(named, lr=1e-2, weight_decay=0.1, reset_interval=7))
    start = torch.cat([param.detach().flatten().double() for param in adamw.parameters()])
    by_callback = weights(fit(Noise(), GradientStabilizer(STABLE_SPAM), net=adamw, max_steps=25))
    by_optimizer = weights(fit(Noise(), net=whole, max_steps=25))
    assert not torch.allclose(by_callback, start, atol=1e-2)
    assert torch.allclose(by_callback, by_optimizer, rtol=0, atol=1e-5)
    bare = Net(lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-2, weight_decay=0.1))
    assert not torch.allclose(weights(fit(Noise(), net=bare, max_steps=25)), by_optimizer, atol=1e-3)


def test_default_rules_are_stable_spams() -> None:
    assert list(GradientStabilizer().rules) == ["ada_clip", "ada_gn", "momentum_reset"]
    assert GradientStabilizer().describe_technique() == [
        (
            "GradientStabilizer",
            "all gradients",
            "ada_clip (γ 0.999), ada_gn (γ 0.7/0.9), momentum_reset (every 1000 steps)",
        )
    ]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # a killed run's, on purpose
def test_resume_in_mid_epoch_is_bit_exact(tmp_path: Path) -> None:
    def rules() -> list[str | dict[str, Any]]:
        return [*STABLE_SPAM, {"zclip": {"warmup_steps": 4}}, {"ada_gc": {"warmup_steps": 4}}]

    assert_exact(
        Case(plain(), save_every=3, kill_after=13, callbacks=(ExactResume, lambda: GradientStabilizer(rules()))),
        tmp_path,
    )


@pytest.mark.parametrize("first", ["stabilizer", "guard"])
def test_a_step_that_the_guard_leaves_out_reaches_no_average(first: str) -> None:
    callbacks: list[pl.Callback] = [monitor(), guard("skip")]
    stabilizer = GradientStabilizer(STABLE_SPAM)
    callbacks.insert(0 if first == "stabilizer" else 2, stabilizer)
    trainer = fit(*callbacks, BadBatches(11), max_steps=20)
    kinds = [type(one) for one in trainer.callbacks]
    places = [kinds.index(kind) for kind in (BadBatches, SpikeMonitor, SpikeGuard, GradientStabilizer)]
    assert places == sorted(places)
    assert stabilizer.state_dict()["nonfinite"] == 0
    assert {row[0] for row in statistics(stabilizer, "ada_clip").values()} == {19.0}
    assert statistics(stabilizer, "momentum_reset") == {"0": 19}


def test_a_monitor_sees_gradients_before_they_are_stabilized() -> None:
    trainer = fit(GradientStabilizer(["ada_gn"]), monitor(), max_steps=2, log_every_n_steps=1)
    assert [type(one) for one in trainer.callbacks[:2]] == [SpikeMonitor, GradientStabilizer]
    metrics = trainer.callback_metrics
    assert metrics["spike/grad_norm"] == pytest.approx(float(metrics["stabilizer/norm_before"]), rel=1e-5)
    assert metrics["stabilizer/norm_after"] == pytest.approx(6**0.5, rel=0.2)  # of six tensors


def test_rollback_brings_the_averages_back() -> None:
    def run(*faults: pl.Callback) -> dict[str, Any]:
        stabilizer = GradientStabilizer(STABLE_SPAM)
        fit(*faults, stabilizer)
        return stabilizer.state_dict()

    clean = run()
    rolled_back = run(monitor(), guard("rollback", data="replay", snapshot=SNAPSHOT), BadBatches(21))
    assert rolled_back == clean


def test_scalars_say_what_was_done() -> None:
    trainer = fit(Noise(), GradientStabilizer(STABLE_SPAM), max_steps=12, log_every_n_steps=6)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("stabilizer")}
    # In the last six steps only the last one has spikes; in 100 times the magnitude all tensors exceed their average.
    assert metrics["stabilizer/clipped_share"] >= 1 / 6
    assert metrics["stabilizer/norm_before"] > 50
    assert metrics["stabilizer/norm_after"] < 6**0.5 * 1.5
    assert metrics["stabilizer/resets"] == 1
    assert metrics["stabilizer/nonfinite"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, SoloAdamW])
def test_nonfinite_gradient_stops_its_tensor_only_and_is_counted(kind: Any, value: float) -> None:
    def spoil(grads: list[Tensor], step: int) -> None:
        if step == 3:
            grads[0].view(-1)[5] = value

    class Weights(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[list[Tensor]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.seen.append([param.detach().clone() for param in pl_module.parameters()])

    record, stabilizer = Weights(), GradientStabilizer(STABLE_SPAM)
    net = Net(lambda named: kind([p for _, p in named], lr=1e-2))
    fit(Noise(spoil), stabilizer, record, net=net, max_steps=6)
    before, hit, later = record.seen[2], record.seen[3], record.seen[4]
    assert [torch.equal(one, other) for one, other in zip(before, hit, strict=True)] == [True] + [False] * 5
    assert not torch.equal(hit[0], later[0])
    assert all(bool(tensor.isfinite().all()) for tensor in record.seen[-1])
    assert stabilizer.state_dict()["nonfinite"] == 1
    assert [row[0] for row in statistics(stabilizer, "ada_clip").values()] == [5.0] + [6.0] * 5


def test_accumulated_batches_are_one_step_of_the_averages() -> None:
    stabilizer = GradientStabilizer(STABLE_SPAM)
    fit(stabilizer, accumulate_grad_batches=4, max_epochs=2)
    assert {row[0] for row in statistics(stabilizer, "ada_gn").values()} == {8.0}


def test_gradients_are_stabilized_after_the_scaler_took_its_factor_off() -> None:
    scaled, after = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 8.0)), After()
    stabilizer = GradientStabilizer([{"ada_clip": {"gamma": 0.9}}])
    fit(stabilizer, after, plugins=scaled, max_steps=4)
    plainly = GradientStabilizer([{"ada_clip": {"gamma": 0.9}}])
    fit(plainly, plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 1.0)), max_steps=4)
    for one, other in zip(*(statistics(each, "ada_clip").values() for each in (stabilizer, plainly)), strict=True):
        assert one == pytest.approx(other, rel=0.2)
    assert all(grad is not None for grads in after.grads for grad in grads)


def test_an_overflow_is_left_to_the_scaler() -> None:
    class Overflows(pl.Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 2:
                next(pl_module.parameters()).grad.view(-1)[0] = math.inf

    scaler = torch.amp.GradScaler("cpu", 8.0)
    stabilizer = GradientStabilizer(STABLE_SPAM)
    trainer = fit(Overflows(), stabilizer, plugins=MixedPrecision("16-mixed", "cpu", scaler), max_steps=5)
    assert scaler.get_scale() == 4.0
    assert bool(weights(trainer).isfinite().all())
    assert stabilizer.state_dict()["nonfinite"] == 1


def test_bf16_parameters_keep_fp32_averages() -> None:
    stabilizer = GradientStabilizer(["ada_clip", {"ada_gn": {"gamma2": 0.99999}}])
    fit(stabilizer, precision="bf16-true", max_steps=30)
    for count, mean, square in statistics(stabilizer, "ada_gn").values():
        assert count == 30
        assert 0 < mean / math.sqrt(square / (1 - 0.99999**count)) < 1.5


class Adversaries(Net):
    """Two optimizers that are stepped by hand, one of them every other time."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for index, optimizer in enumerate(self.optimizers()):  # type: ignore[arg-type]
            if index and batch_idx % 2:
                continue
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.layers[0].parameters()), torch.optim.AdamW(self.layers[3].parameters())]


def test_manual_optimizers_have_averages_and_clocks_of_their_own() -> None:
    stabilizer = GradientStabilizer([{"zclip": {"warmup_steps": 2}}, *STABLE_SPAM])
    trainer = fit(stabilizer, net=Adversaries(), max_epochs=1, log_every_n_steps=16)
    assert statistics(stabilizer, "momentum_reset") == {"0": 16, "1": 8}
    assert [row[0] for row in statistics(stabilizer, "zclip").values()] == [16.0, 8.0]
    counts = {name: row[0] for name, row in statistics(stabilizer, "ada_gn").items()}
    assert counts == {"layers.0.weight": 16.0, "layers.0.bias": 16.0, "layers.3.weight": 8.0, "layers.3.bias": 8.0}
    assert {"stabilizer/norm_after_0", "stabilizer/norm_after_1"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize(("rule", "told"), [("ada_gn", True), ("ada_clip", False)])
def test_clipping_without_an_effect_is_told_at_the_start(
    rule: str, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        fit(GradientStabilizer([rule]), max_steps=1, gradient_clip_val=1.0)
    assert ("gradient_clip_val=1.0 has no useful effect after ada_gn" in caplog.text) == told


def test_an_optimizer_without_momentum_is_told_of() -> None:
    net = Net(lambda named: torch.optim.SGD([p for _, p in named], lr=0.01))
    stabilizer = GradientStabilizer([{"momentum_reset": {"every_n_steps": 2}}])
    with pytest.warns(UserWarning, match="momentum_reset has nothing to reset: SGD keeps no averages"):
        fit(stabilizer, net=net, max_steps=6)
    assert stabilizer.resets == 0


def test_momentum_is_reset_after_every_full_interval() -> None:
    rule = MomentumReset(3)
    assert [step for step in range(1, 12) if rule.is_due("0")] == [4, 7, 10]


def test_flat_parameters_are_refused() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(InvalidArgumentError, match=r"FSDPStrategy hides parameters.*ModelParallelStrategy"):
        GradientStabilizer().on_fit_start(trainer, Net())


def test_an_optimizer_without_gradients_is_refused() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy._optimizers = [FZOO(Net().parameters())]
    with pytest.raises(InvalidArgumentError, match="FZOO, which computes no gradients"):
        GradientStabilizer().on_fit_start(trainer, Net())


def test_an_optimizer_that_unscales_by_itself_is_refused() -> None:
    net = Net(lambda named: torch.optim.AdamW([p for _, p in named], fused=True))
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 8.0))
    with pytest.raises(InvalidArgumentError, match=r"fused AdamW.*set fused=False, or use bf16-mixed"):
        fit(GradientStabilizer(), net=net, plugins=scaled, max_steps=1)


def test_sparse_gradients_are_refused() -> None:
    class Sparse(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            weight = pl_module.layers[0].weight
            weight.grad = weight.grad.to_sparse()

    with pytest.raises(InvalidArgumentError, match=r"'layers\.0\.weight' is sparse.*sparse=False"):
        fit(Sparse(), GradientStabilizer(), max_steps=1)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "at least one of ada_clip"),
        (["adaclip"], "there is no 'adaclip'; choose from ada_clip, ada_gn, zclip, ada_gc, spam_clip, momentum_reset"),
        (["ada_gn", {"ada_gn": {}}], "'ada_gn' is there twice"),
        ([{"ada_clip": {"gama": 0.9}}], "ada_clip has no setting 'gama'; it has gamma"),
        ([{"ada_clip": 0.9}], "ada_clip=0.9 is no mapping of settings, such as {'gamma': 0.999}"),
        ([{"ada_clip": {"gamma": "high"}}], "ada_clip.gamma='high' is not a number"),
        ([{"ada_clip": {"gamma": 1.0}}], "ada_clip.gamma=1.0 is out of range"),
        ([{"momentum_reset": {"every_n_steps": 0}}], "momentum_reset.every_n_steps=0 is out of range"),
        ([{"momentum_reset": {"every_n_steps": 1.5}}], "momentum_reset.every_n_steps=1.5 is not an integer"),
        ([{"ada_gc": {"beta": None}}], "ada_gc.beta=None is not a number"),
    ],
)
def test_bad_rules_are_named(rules: list[str | dict[str, Any]], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        GradientStabilizer(rules)


def test_a_limit_may_be_left_out() -> None:
    assert GradientStabilizer([{"zclip": {"max_norm": None}}]).describe_technique()[0][2] == "zclip (z > 2.5)"


def test_an_injected_spike_comes_before_the_stabilizer() -> None:
    stabilizer = GradientStabilizer(["ada_clip"])
    trainer = fit(stabilizer, SpikeInjector(step=3, kind="nan_grad"), max_steps=5)
    assert type(trainer.callbacks[0]) is SpikeInjector
    assert stabilizer.state_dict()["nonfinite"] > 0
    assert bool(weights(trainer).isfinite().all())
