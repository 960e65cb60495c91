"""How often torch.compile compiles: as often as for plain layers, whatever lengths and scales come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import hydra_kernels as hk
from hydra_kernels import functional
from hydra_kernels.choose import explain

from .test_compile import ROUTES, fresh_compiler, rows, same, slow_if, step  # noqa: F401
from .test_layers import trained

# On either side of every threshold of the choice: 0.4 K, N and 2^24 multiply-adds for each layer of a block.
LENGTHS = (3, 1, 50, 90, 130, 300, 450, 700, 1200, 3000, 5, 2)


class Block(nn.Module):
    """The linear layers of a transformer block with grouped queries."""

    def __init__(self, linear, device: str) -> None:
        super().__init__()
        self.q, self.kv = linear(256, 256, device=device), linear(256, 64, device=device)
        self.up, self.down = linear(256, 1024, device=device), linear(1024, 256, device=device)

    def forward(self, x: Tensor) -> Tensor:
        x = self.q(x) + self.kv(x).repeat(1, 4)
        return x + self.down(self.up(x).relu())


def graphs(block: nn.Module, device: str, lengths=LENGTHS) -> int:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for M in lengths:
        compiled(torch.randn(M, 256, device=device, requires_grad=True)).sum().backward()
    return counter.frame_count


def layer(**options):
    def linear(K: int, N: int, device: str) -> nn.Module:
        return hk.HydraLinear(K, N, r_a=2, r_b=2, device=device, **options)

    return linear


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("auto", "cpu"),
        pytest.param("aten", "cpu", marks=slow_if(True)),
        pytest.param("sm_90", "meta", marks=slow_if(True)),
    ],
)
def test_new_lengths_compile_as_often_as_plain_layers(backend, device, monkeypatch):
    """sm_90 without a card: its choice of backends, over tensors without data."""
    if backend == "sm_90":
        there = explain._machine("sm_90")
        monkeypatch.setattr(functional, "here", torch.compiler.assume_constant_result(lambda device: there))
        backend = "auto"
    plain = graphs(Block(nn.Linear, device), device)
    assert graphs(Block(layer(backend=backend), device), device) <= plain


TEN = (0.5, 1.0, 0.25, 2.0, -1.0, 0.3, 1.5, 4.0, 0.125, 7.0)


@pytest.mark.parametrize(
    ("backend", "form"),
    [pytest.param(*route, marks=slow_if(route[1] != "composed")) for route in ROUTES],
)
def test_ten_scales_are_two_graphs(backend, form):
    """A constant scale that changes is an input of the graph, for operators as for what is traced."""
    layer = trained(hk.HydraLinear(13, 11, r_a=2, r_b=3, form=form, backend=backend))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for scale in TEN:
        layer.scale_a, layer.scale_b = scale, 0.5 * scale
        same(step(compiled, layer, rows(7)), step(layer, layer, rows(7)))
    assert counter.frame_count <= 2


OWN = [0.1 * i for i in range(1, 13)]


def blocks(scales, backend: str = "auto") -> nn.Sequential:
    layers = [trained(hk.HydraLinear(13, 13, r_a=2, r_b=2, backend=backend, scale_a=s, scale_b=s)) for s in scales]
    return nn.Sequential(*layers)


@pytest.mark.slow
def test_blocks_with_scales_of_their_own_are_as_many_graphs_as_equal_ones():
    def graphs_of(scales) -> int:
        torch.compiler.reset()
        model, counter = blocks(scales), CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        for factor in (1.0, 0.5):
            for layer in model:
                layer.scale_a *= factor
            compiled(rows(7)).sum().backward()
        return counter.frame_count

    assert graphs_of(OWN[:3]) <= graphs_of([0.5] * 3)


# torch looks at the gradient of each block's input.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=slow_if(True))])
def test_blocks_that_are_compiled_one_by_one_share_graphs(backend):
    """torch binds the first value of an attribute, and only a second one tells it that the number varies."""
    counter, model = CompileCounterWithBackend("aot_eager"), blocks(OWN, backend)
    for block in model:
        block.compile(fullgraph=True, backend=counter)
    model(rows(7)).sum().backward()
    assert counter.frame_count <= 2
