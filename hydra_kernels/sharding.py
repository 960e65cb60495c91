"""Tensors that FSDP2 or tensor parallelism has sharded over processes (DTensor): to detect, gather and fill them.

And `tensors_in`: the tensors in what a module returns.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .weights import Packed


def is_sharded(t: object) -> bool:
    """Whether t is a DTensor. Does not import the class, which takes a second: until then no tensor is one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def mesh_dimensions(t: Tensor) -> int:
    """How many dimensions the mesh has that t is sharded over, 0 where it is whole."""
    return _dtensor(t).device_mesh.ndim if is_sharded(t) else 0


def gathered(t: Tensor) -> Tensor:
    """The whole of t: where it is sharded a collective, which every rank of its mesh must call."""
    return _dtensor(t).full_tensor() if is_sharded(t) else t


def whole(operand: Any) -> Any:
    """A tensor `gathered` and without its graph, a quantised weight also dense; anything else as it is."""
    if isinstance(operand, Packed):
        ready = operand.ready()
        return ready._replace(tensors=tuple(map(gathered, ready.tensors))).value()
    return gathered(operand.detach()) if isinstance(operand, Tensor) else operand


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copies value, the whole tensor on every rank, into target; no rank talks to another."""
    if is_sharded(target):
        from torch.distributed.tensor import Replicate, distribute_tensor

        mesh, value = _dtensor(target).device_mesh, value.to(target.device, target.dtype)
        whole = distribute_tensor(value, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
        value = whole.redistribute(placements=_dtensor(target).placements)
    target.copy_(value)


def is_writer(tensors: Iterable[Tensor]) -> bool:
    """Whether this process writes what was gathered: the first one of the mesh, or each where nothing is sharded."""
    meshes = [_dtensor(t).device_mesh for t in tensors if is_sharded(t)]
    return not meshes or not any(meshes[0].get_coordinate() or ())


def _dtensor(t: Tensor) -> Any:
    return t


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in what a module returns, also within mappings, lists, tuples and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from tensors_in(getattr(output, field.name))
