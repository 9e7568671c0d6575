from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from regimewrap.recipes.study.spec import Study

if TYPE_CHECKING:
    from collections.abc import Callable

    from regimewrap.recipes.study.cells import Cell

TINY = {
    "name": "tiny",
    "arms": ["dense", "weight-decay"],
    "seeds": 2,
    "budgets": [1.0, 0.1],
    "tasks": {
        "text": {
            "kind": "characters",
            "layers": 1,
            "width": 32,
            "context": 16,
            "training": {"steps": 4, "batch_size": 4, "optimizer": "adamw", "lr": 0.003},
        },
        "digits": {
            "kind": "images",
            "data": "digits",
            "train_samples": 40,
            "training": {"steps": 4, "batch_size": 10, "lr": 0.05},
        },
    },
}


@pytest.fixture
def study() -> Study:
    return Study.model_validate(TINY)


@pytest.fixture
def digits(study: Study) -> Study:
    return study.replace(tasks={"digits": study.tasks["digits"]})


def figures_of(cell: Cell, accuracy: float = 0.5) -> dict[str, Any]:
    """Figures such as a training leaves, without one."""
    by_budget = {f"{budget:g}": accuracy for budget in cell.budgets}
    return {"accuracy": by_budget, "nll": dict.fromkeys(by_budget, 1 - accuracy), "ece": dict.fromkeys(by_budget, 0.1)}


class Done:
    def __init__(self, answer: Callable[[], str]) -> None:
        self._answer = answer

    def done(self) -> bool:
        return True

    def result(self) -> str:
        return self._answer()


class Here:
    """An executor that makes cells at once, with ``maker`` in place of a training, and counts them."""

    def __init__(self, maker: Callable[[Cell, Any], dict[str, Any]] = lambda cell, _: figures_of(cell)) -> None:
        self.made: list[Cell] = []
        self._maker = maker

    def submit(self, function: Callable[..., str], cell: Cell, folder: str, data: str | None) -> Done:
        def maker(cell: Cell, data: Any) -> dict[str, Any]:
            self.made.append(cell)
            return self._maker(cell, data)

        return Done(lambda: function(cell, folder, data, maker))
