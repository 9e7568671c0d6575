"""Train one PyTorch network across many activation budgets.

``wrap`` puts one shared top-k gate behind the chosen activations of a model, ``RegimeCycler`` moves its keep ratio from
the training loop, ``sweep`` shows what the network can do at each budget, and ``unwrap`` takes every gate off again.
"""

import regimewrap._command  # noqa: F401 - before torch, whose import takes seconds
from regimewrap.cycle.cycler import RegimeCycler
from regimewrap.cycle.state import Regime
from regimewrap.errors import RegimewrapError
from regimewrap.gate.find import gate_of, is_wrapped
from regimewrap.gate.gate import TopKGate, at_keep_ratio
from regimewrap.measure.sweep import Sweep, recalibrate_batchnorm, sweep
from regimewrap.measure.telemetry import watch
from regimewrap.measure.verify import verify
from regimewrap.policy.policy import CyclePolicy, GatePolicy, RegimePolicy, SitePolicy
from regimewrap.rewrite.insert import insert_gates
from regimewrap.serve.calibration import Calibration, calibrate
from regimewrap.serve.served import Served
from regimewrap.serve.serving import serve
from regimewrap.wrap import plan, unwrap, wrap

#: The version, in one place; pyproject.toml reads it from here.
__version__ = "0.2.0"

__all__ = [
    "Calibration",
    "CyclePolicy",
    "GatePolicy",
    "Regime",
    "RegimeCycler",
    "RegimePolicy",
    "RegimewrapError",
    "Served",
    "SitePolicy",
    "Sweep",
    "TopKGate",
    "__version__",
    "at_keep_ratio",
    "calibrate",
    "gate_of",
    "insert_gates",
    "is_wrapped",
    "plan",
    "recalibrate_batchnorm",
    "serve",
    "sweep",
    "unwrap",
    "verify",
    "watch",
    "wrap",
]
