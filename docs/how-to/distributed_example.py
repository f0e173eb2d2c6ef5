"""The largest eigenvalue of the Hessian while several processes train.

torchrun --nproc-per-node 2 distributed_example.py          data parallel
torchrun --nproc-per-node 2 distributed_example.py --fsdp   parameters sharded over the processes
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import dyntune

dist.init_process_group("gloo")  # "nccl" on GPUs
rank, size = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same weights and the same data everywhere ...
model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
inputs = torch.randn(512, 16)
targets = inputs[:, :4].argmax(dim=1)
mine = slice(rank, None, size)  # ... and this process's rows of it
inputs, targets = inputs[mine], targets[mine]

if "--fsdp" in sys.argv:
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer)
    fully_shard(model)
else:
    model = nn.parallel.DistributedDataParallel(model)

criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
team = dyntune.Team(timeout=60.0)  # how long to wait for a process that does not come

for step in range(61):
    if step % 20 == 0:  # on all ranks alike: the step decides, not the clock
        found = dyntune.hessian_eigenvalues(model, (inputs, targets), criterion=criterion, process_group=team)
        if rank == 0:  # the result is the same on all ranks
            value, low, high = float(found), float(found.low[0]), float(found.high[0])
            print(f"step {step:2d}: {value:.3f} ({low:.3f} .. {high:.3f}), {found.num_products} products", flush=True)
    loss = criterion(model(inputs), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

if rank == 0:
    print(found.method)
dist.destroy_process_group()
