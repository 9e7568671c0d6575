"""Train one PyTorch network across many activation budgets.

``wrap`` puts one shared top-k gate behind the chosen activations of a model, ``RegimeCycler`` moves its keep ratio from
the training loop, ``sweep`` shows what the network can do at each budget, and ``unwrap`` leaves nothing behind.
"""

from regimewrap._version import __version__
from regimewrap.calibration import Calibration, calibrate
from regimewrap.compression import compressed_activations
from regimewrap.cycle_state import Regime
from regimewrap.cycler import RegimeCycler
from regimewrap.errors import RegimewrapError
from regimewrap.gate import TopKGate, at_keep_ratio, gate_of
from regimewrap.policy import CyclePolicy, GatePolicy, RegimePolicy, SitePolicy
from regimewrap.rewrite.insert import insert_gates
from regimewrap.sweep import Sweep, recalibrate_batchnorm, sweep
from regimewrap.telemetry import watch
from regimewrap.verify import verify
from regimewrap.wrap import plan, unwrap, wrap

__all__ = [
    "Calibration",
    "CyclePolicy",
    "GatePolicy",
    "Regime",
    "RegimeCycler",
    "RegimePolicy",
    "RegimewrapError",
    "SitePolicy",
    "Sweep",
    "TopKGate",
    "__version__",
    "at_keep_ratio",
    "calibrate",
    "compressed_activations",
    "gate_of",
    "insert_gates",
    "plan",
    "recalibrate_batchnorm",
    "sweep",
    "unwrap",
    "verify",
    "watch",
    "wrap",
]
