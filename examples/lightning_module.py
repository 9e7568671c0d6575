"""regimewrap in Lightning's trainer. Twenty seconds on one core, most of it for importing Lightning.

Needs ``pip install -e '.[lightning]'`` in a checkout. The data is generated.
``python examples/lightning_module.py`` runs it.
"""

from __future__ import annotations

import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from regimewrap.integrations.lightning import RegimeCallback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import regimewrap

EPOCHS, SAMPLES, BATCH = 10, 1024, 16


class Regression(LightningModule):
    """Knows nothing of regimewrap."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Return the loss."""
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.02)


def main() -> None:
    """Train, then see what the network can do at each budget."""
    warnings.filterwarnings("ignore", module="lightning")
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 16)
    y = x.sin().sum(1, keepdim=True)
    regime = RegimeCallback("loss-reset")  # scaled to the trainer's run
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    module, loader = Regression(), DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True)
    Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[regime], **quiet).fit(module, loader)

    for decision in regime.cycler.history[:: len(regime.cycler.history) // 10]:
        print(f"update {decision.step}: keep ratio {decision.keep_ratio:.2f}, {decision.event}")
    print(regimewrap.sweep(module, lambda net: -nn.functional.mse_loss(net.net(x), y).item(), (1.0, 0.5, 0.2, 0.1)))


if __name__ == "__main__":
    main()
