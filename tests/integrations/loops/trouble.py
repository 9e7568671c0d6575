# ruff: noqa: T201 - scripts print
"""Ranks with a cycler each and nothing else, the last of which makes trouble; prints how it ends as a line of JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from tiny import POLICY, trace, wrapped

from regimewrap import RegimeCycler
from regimewrap.errors import SyncError

trouble = sys.argv[1]
dist.init_process_group("gloo", timeout=timedelta(seconds=3))
me = dist.get_rank()
makes_trouble = me == dist.get_world_size() - 1
if makes_trouble and trouble == "another policy":
    cycler = RegimeCycler(wrapped(policy=POLICY.replace(cycle={"strategy": {"decay": 0.5}})))
elif makes_trouble and trouble == "another model":
    cycler = RegimeCycler(wrapped("functions"))
else:
    cycler = RegimeCycler(wrapped())
out: dict[str, object] = {}
started = time.monotonic()
try:
    if makes_trouble and trouble == "loads alone":
        cycler.load_state_dict(json.loads(sys.argv[2]))
    if makes_trouble and trouble == "does not check":
        time.sleep(60)
    if trouble in ("another policy", "another model", "does not check"):
        cycler.check_sync()
    for update in range(12):
        if makes_trouble and update == 7:
            if trouble == "comes late":
                time.sleep(1)
            if trouble == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if trouble == "is stuck":
                time.sleep(60)
        if trouble == "does not step":
            dist.all_reduce(torch.ones(100))  # as DDP does in each update
            if makes_trouble:
                continue
        cycler.step(1.0 + me)
    cycler.check_sync()
    out["trace"] = trace(cycler)
except SyncError as error:
    out["error"] = str(error)
out["updates"], out["seconds"] = cycler.updates, time.monotonic() - started
print(json.dumps(out))
