#!/usr/bin/env bash
# Under FSDP2, what is written into a parameter after a forward works at once, and is lost when the state is read.
#
# Expected: after `with torch.no_grad(): model(batch)` a model is as it was before. Writing into its parameters then (an
#   average of weights, a clipped norm, a reset head) holds, and state_dict() only reads.
# Versions: torch 2.13.0, CPU (gloo, one process), Python 3.11.
# Behaviour: by default fully_shard leaves the root's own parameters whole after a forward, for the backward to come. In
#   evaluation none comes. model[0].weight is then a plain Parameter, no DTensor, and no view of the shard. The next
#   forward uses what was written there; state_dict() drops it and yields the shards, so the file that is saved has the
#   old values, and the model has them again too.
# Seen (2026-11-30): "Parameter after a forward; written: 0.0 in the model, 3.0 in its state, then 3.0 in the model".
# For our users: save_adapters, to_lora and merged_tensors call state_dict() first, so they read the shards always
#   (hydra_kernels/checkpoint.py). Write into parameters after model.reshard(), which gives the DTensors back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" numpy
cat > "$folder/edit.py" <<'PY'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = nn.Sequential(nn.Linear(3, 1, bias=False))
nn.init.ones_(model[0].weight)
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
x = torch.ones(1, 3)
with torch.no_grad():
    model(x)
    kind = type(model[0].weight).__name__
    model[0].weight.zero_()
    written = model(x).item()
    state = model.state_dict()["0.weight"].full_tensor().sum().item()
    again = model(x).item()

    model.reshard()
    model[0].weight.zero_()  # this one holds
    assert model.state_dict()["0.weight"].full_tensor().sum().item() == model(x).item() == 0
print(f"{kind} after a forward; written: {written} in the model, {state} in its state, then {again} in the model")
dist.destroy_process_group()
PY
said=$("$folder/venv/bin/python" "$folder/edit.py")
echo "$said"
[ "$said" = "Parameter after a forward; written: 0.0 in the model, 3.0 in its state, then 3.0 in the model" ]
