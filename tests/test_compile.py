"""torch.compile traces the layers without a graph break, for fixed and for dynamic sizes, and computes the same."""

import pytest
import torch

import hydra_kernels as hk

from .test_layers import trained


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", ["composed", "kept"])
@pytest.mark.parametrize("options", [{}, {"adapter_bias": True, "learnable_scale": True}, {"scale_a": 0.7}], ids=str)
def test_fullgraph_equals_eager(dynamic, form, options):
    torch._dynamo.reset()
    layer = trained(hk.HydraLinear(13, 11, r_a=2, r_b=3, form=form, dtype=torch.float64, **options))
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (7, 5):
        results = []
        for function in (layer, compiled):
            layer.zero_grad()
            x = torch.linspace(-1, 1, rows * 13, dtype=torch.float64).reshape(rows, 13).requires_grad_()
            h = function(x)
            h.square().sum().backward()
            results.append([h.detach(), x.grad, *(p.grad for p in layer.adapters().values())])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-12, atol=1e-12)
