"""What the process that others are forked from loads: all that a cell needs, so that none of them loads it again.

A network is wrapped and run once, forwards and in one thread: threads would not survive the fork.
"""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import nn

from regimewrap import at_keep_ratio, unwrap, wrap
from regimewrap.recipes.study import cells as cells

with contextlib.suppress(ImportError):
    import sklearn.datasets
    import sklearn.model_selection  # noqa: F401 - loaded, not used

torch.set_num_threads(1)
with warnings.catch_warnings(), torch.no_grad():
    warnings.simplefilter("ignore")
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)  # loads torch's compiler
    _model = wrap(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)), "mixed")
    with at_keep_ratio(_model, 0.5):
        _model(torch.ones(2, 4))
    unwrap(_model)
