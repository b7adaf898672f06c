"""What all contract tests share: one full run of every technique, made when the first test asks for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from contract.registry import Technique
from contract.small_run import SAVED_AT, Run, resumable


@dataclass(frozen=True)
class Trained:
    """A finished run and the checkpoint that it wrote on its way. Tests share it: they look, they do not touch."""

    run: Run
    checkpoint: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Technique], Trained]:
    """Gives a technique's finished run; made once."""
    finished: dict[str, Trained] = {}

    def get(technique: Technique) -> Trained:
        if technique.name not in finished:
            folder = tmp_path_factory.mktemp("trained")
            run = Run(technique, **resumable(folder)).fit()
            finished[technique.name] = Trained(run, next(folder.glob(f"*step={SAVED_AT}.ckpt")))
        return finished[technique.name]

    return get
