# ruff: noqa: T201 - scripts print
"""Network scope on ranks with data of their own; prints what each rank holds, as a line of JSON."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from tiny import POLICY, bare, sgd
from torch import nn
from torch.nn import functional as F

import regimewrap
from regimewrap import RegimeCycler, gate_of
from regimewrap.errors import SyncError

UPDATES, ABSENT = int(sys.argv[1]), "absent" in sys.argv

calls = 0


def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        return function(*args, **kwargs)

    return call


dist.init_process_group("gloo", timeout=timedelta(seconds=5 if ABSENT else 60))
me = dist.get_rank()
cycle = {"strategy": {"tolerance": 1e9}, "full_share": 0}
policy = POLICY.replace(gate={"scope": "network", "relative_to": "active"}, cycle=cycle)
model = nn.parallel.DistributedDataParallel(regimewrap.wrap(bare("functions"), policy))
cycler, optimizer = RegimeCycler(model), sgd(model)
cycler.check_sync()
if ABSENT:
    if me == 0:
        try:
            cycler.step(1.0)
        except SyncError as error:
            print(error)
    else:
        time.sleep(6)
    sys.exit()
network, thresholds, own = gate_of(model).network, [], []
for update in range(UPDATES):
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1000 * update + me))
    loss = F.mse_loss(model(x), x[:, :1].abs())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    own.append(int(network.counts()[0].nonzero().sum()))  # of the bins that this rank alone has something in
    dist.all_reduce, reduce = counted(dist.all_reduce), dist.all_reduce
    cycler.step(loss)
    dist.all_reduce = reduce
    thresholds.append(network._on(torch.device("cpu")).threshold.item().hex())
state = cycler.state_dict(all_ranks=True)
everyone: list = [None] * dist.get_world_size()
mine = {
    "thresholds": thresholds,
    "own": own,
    "histogram": state["network"],
    "ratio": cycler.keep_ratio.hex(),
    "reductions": calls,
    "decisions": len(cycler.history),
}
dist.all_gather_object(everyone, mine)
if me == 0:
    print(json.dumps(everyone))
dist.barrier()
dist.destroy_process_group()
