"""adamw_state_dict: a loop of one's own goes on with torch.optim.AdamW."""

import torch
from torch import nn

from lowbit_lightning.optim import SoloAdamW, adamw_state_dict


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    loss = torch.zeros(())
    for step in range(steps):
        torch.manual_seed(step)
        inputs = torch.randn(32, 64)
        loss = nn.functional.mse_loss(model(inputs), inputs.roll(1, dims=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_adamw_takes_it_and_goes_on_as_well() -> None:
    model = nn.Linear(64, 64)
    unused = nn.Parameter(torch.ones(64, 64))
    solo = SoloAdamW([*model.parameters(), unused], lr=torch.tensor(1e-2), min_numel=0)
    before = stepped(model, solo, 30)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    adamw = torch.optim.AdamW([*model.parameters(), unused])
    adamw.load_state_dict(adamw_state_dict(solo))
    assert adamw.param_groups[0]["lr"] == 1e-2
    assert unused not in adamw.state
    for param in model.parameters():
        assert adamw.state[param]["step"] == 30
        for key, value in solo.dequantized_state(param).items():
            assert torch.equal(adamw.state[param][key], value)
    with_adamw = stepped(model, adamw, 30)
    model.load_state_dict(weights)
    assert with_adamw < 1.05 * stepped(model, solo, 30) < before


def test_it_shares_no_memory_with_the_optimizer() -> None:
    model = nn.Linear(64, 64)
    solo = SoloAdamW(model.parameters(), min_numel=0, bits=(32, 32))
    stepped(model, solo, 1)
    before = adamw_state_dict(solo)
    copies = {key: value.clone() for key, value in before["state"][0].items()}
    stepped(model, solo, 1)
    for key, value in copies.items():
        assert torch.equal(before["state"][0][key], value), key
