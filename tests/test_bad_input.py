"""A wrong call is refused before anything is computed: by the argument, what it was, and what was expected."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hydra_kernels as hk

M, K, N, R_A, R_B = 5, 13, 11, 2, 3
INF, NAN = float("inf"), float("nan")
BACKENDS = "auto, reference, aten, native, hybrid, triton"


def arguments() -> dict:
    return {
        "x": torch.randn(M, K),
        "weight": torch.randn(N, K),
        "bias": torch.randn(N),
        "A_down": torch.randn(R_A, K),
        "A_up": torch.randn(N, R_A),
        "B_down": torch.randn(R_B, N),
        "B_up": torch.randn(N, R_B),
        "A_down_bias": torch.randn(R_A),
        "A_up_bias": torch.randn(N),
        "B_down_bias": torch.randn(R_B),
        "B_up_bias": torch.randn(N),
    }


class Nothing(TorchDispatchMode):
    """Fails on any computation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"computed {func} before the input was refused")


meta = torch.empty(0, device="meta")
# No operand may be a tensor without elements in memory at strides; a Triton or C++ kernel would look for them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch calls them a prototype
    NESTED, JAGGED = (
        torch.nested.nested_tensor([torch.zeros(3, K), torch.zeros(2, K)], layout=layout)
        for layout in (torch.strided, torch.jagged)
    )
CALLS = [
    # changes, error, what the message must contain
    ({"x": [1.0]}, TypeError, "x: expected a Tensor, got list"),
    ({"x": torch.randn(M, K + 1)}, ValueError, "x: expected shape [*, 13] for a weight of shape [11, 13], got [5, 14]"),
    ({"x": torch.tensor(1.0)}, ValueError, "x: expected shape [*, 13] for a weight of shape [11, 13], got []"),
    (
        {"x": torch.ones(M, K, dtype=torch.int64)},
        TypeError,
        "x: expected torch.float32, the dtype of weight, got torch.int64",
    ),
    ({"x": torch.ones(M, K, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
    ({"x": NESTED}, TypeError, "x: expected a dense tensor, got a nested one; pass t.values() of a jagged tensor t"),
    ({"x": JAGGED}, TypeError, "x: expected a dense tensor, got a nested one; pass t.values() of a jagged tensor t"),
    ({"x": torch.ones(M, K).to_sparse()}, TypeError, "x: expected a dense tensor, got one of layout torch.sparse_coo"),
    ({"x": torch._efficientzerotensor((M, K))}, TypeError, "x: expected a tensor with elements in memory, got a Zero"),
    ({"weight": torch.ones(N, K).to_mkldnn()}, TypeError, "weight: expected a dense tensor, got one of layout"),
    ({"weight": torch._efficientzerotensor((N, K))}, TypeError, "weight: expected a tensor with elements in memory"),
    ({"bias": torch._efficientzerotensor((N,))}, TypeError, "bias: expected a tensor with elements in memory"),
    ({"A_down": torch.ones(R_A, K).to_sparse()}, TypeError, "A_down: expected a dense tensor"),
    ({"B_up": torch._efficientzerotensor((N, R_B))}, TypeError, "B_up: expected a tensor with elements in memory"),
    ({"scale_a": torch._efficientzerotensor(())}, TypeError, "scale_a: expected a tensor with elements in memory"),
    (
        {"x": torch.randn(M, K, dtype=torch.float64)},
        TypeError,
        "x: expected torch.float32, the dtype of weight, got torch.float64",
    ),
    (
        {"x": torch.randn(M, K, dtype=torch.bfloat16)},
        TypeError,
        "x: expected torch.float32, the dtype of weight, got torch.bfloat16",
    ),
    (
        {"x": torch.empty(M, K, device="meta")},
        ValueError,
        "x: expected a tensor on cpu, where weight is, got one on meta",
    ),
    (
        {"weight": torch.ones(N, K, dtype=torch.int64)},
        TypeError,
        "weight: expected one of torch.float64, torch.float32",
    ),
    ({"weight": None}, TypeError, "weight: expected a Tensor, got NoneType"),
    ({"weight": torch.randn(N)}, ValueError, "weight: expected shape [N, K], got [11]"),
    ({"weight": nn.Parameter(torch.randn(N, K))}, ValueError, "weight: it requires grad, but W0 is frozen"),
    ({"bias": torch.randn(N + 1)}, ValueError, "bias: expected shape [11], got [12]"),
    ({"bias": torch.randn(N, 1)}, ValueError, "bias: expected shape [11], got [11, 1]"),
    ({"bias": torch.randn(N).half()}, TypeError, "bias: expected torch.float32, got torch.float16"),
    ({"bias": 0.0}, TypeError, "bias: expected a Tensor, got float"),
    ({"A_down": None}, ValueError, "A_up: it is given, but A_down is None"),
    ({"A_up": None}, ValueError, "A_down: it is given, but A_up is None"),
    ({"B_down": None}, ValueError, "B_up: it is given, but B_down is None"),
    ({"B_up": None}, ValueError, "B_down: it is given, but B_up is None"),
    ({"A_down": None, "A_up": None, "A_up_bias": None}, ValueError, "A_down_bias: it is given, but A_down is None"),
    ({"B_down": None, "B_up": None, "B_down_bias": None}, ValueError, "B_up_bias: it is given, but B_down is None"),
    ({"A_down": torch.randn(R_A, N)}, ValueError, "A_down: expected shape [2, 13], got [2, 11]"),
    ({"A_down": torch.randn(())}, ValueError, "A_down: expected shape [r >= 1, 13] or None, got []"),
    (
        {"A_down": torch.randn(0, K), "A_up": torch.randn(N, 0)},
        ValueError,
        "A_down: expected shape [r >= 1, 13] or None",
    ),
    ({"A_down": "no"}, TypeError, "A_down: expected a Tensor, got str"),
    ({"A_up": torch.randn(N, R_A + 1)}, ValueError, "A_up: expected shape [11, 2], got [11, 3]"),
    ({"A_up": torch.randn(R_A, N)}, ValueError, "A_up: expected shape [11, 2], got [2, 11]"),
    ({"A_up": torch.randn(N, R_A).double()}, TypeError, "A_up: expected torch.float32, got torch.float64"),
    ({"A_up": torch.empty(N, R_A, device="meta")}, ValueError, "A_up: expected a tensor on cpu, got one on meta"),
    ({"B_down": torch.randn(R_B, K)}, ValueError, "B_down: expected shape [3, 11], got [3, 13]"),
    ({"B_up": torch.randn(N, R_B + 1)}, ValueError, "B_up: expected shape [11, 3], got [11, 4]"),
    ({"A_down_bias": torch.randn(N)}, ValueError, "A_down_bias: expected shape [2], got [11]"),
    ({"A_up_bias": torch.randn(R_A)}, ValueError, "A_up_bias: expected shape [11], got [2]"),
    ({"B_down_bias": torch.randn(R_A)}, ValueError, "B_down_bias: expected shape [3], got [2]"),
    ({"B_up_bias": torch.randn(N).half()}, TypeError, "B_up_bias: expected torch.float32, got torch.float16"),
    ({"scale_a": NAN}, ValueError, "scale_a: expected a finite number, got nan"),
    ({"scale_a": 10**400}, ValueError, "scale_a: expected a number in the range of float64, got a larger integer"),
    ({"scale_b": -INF}, ValueError, "scale_b: expected a finite number, got -inf"),
    ({"scale_a": "2"}, TypeError, "scale_a: expected a number or a 0-dimensional tensor, got str"),
    ({"scale_b": True}, TypeError, "scale_b: expected a number or a 0-dimensional tensor, got bool"),
    ({"scale_a": torch.ones(1)}, ValueError, "scale_a: expected shape [], got [1]"),
    ({"scale_b": torch.tensor(1)}, TypeError, "scale_b: expected torch.float64 or torch.float32"),
    ({"scale_b": torch.empty((), device="meta")}, ValueError, "scale_b: expected a tensor on cpu, got one on meta"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a number in [0, 1), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a number in [0, 1), got -0.1"),
    ({"dropout_p": NAN}, ValueError, "dropout_p: expected a number in [0, 1), got nan"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p: expected a number in [0, 1), got str"),
    ({"mask": torch.ones(M, R_A)}, ValueError, "mask: expected shape [5, 5], got [5, 2]"),
    ({"mask": torch.ones(M, R_A + R_B, dtype=torch.bool)}, TypeError, "mask: expected torch.float32, got torch.bool"),
    ({"mask": torch.ones(M, R_A + R_B).requires_grad_()}, ValueError, "mask: it requires grad"),
    ({"mask": [[1.0]]}, TypeError, "mask: expected a Tensor, got list"),
    ({"input_dropout_p": 1.0}, ValueError, "input_dropout_p: expected a number in [0, 1), got 1.0"),
    ({"input_dropout_p": None}, TypeError, "input_dropout_p: expected a number in [0, 1), got NoneType"),
    ({"input_mask": torch.ones(M, R_A)}, ValueError, "input_mask: expected shape [5, 13], got [5, 2]"),
    ({"input_mask": torch.ones(M, K, dtype=torch.bool)}, TypeError, "input_mask: expected torch.float32, got torch.b"),
    ({"input_mask": torch.ones(M, K).requires_grad_()}, ValueError, "input_mask: it requires grad"),
    ({"input_mask": torch.ones(M, K).half()}, TypeError, "input_mask: expected torch.float32, got torch.float16"),
    ({"form": "fast"}, ValueError, "form: expected one of auto, composed, kept, effective, got 'fast'"),
    ({"backend": "cuda"}, ValueError, f"backend: expected one of {BACKENDS}, got 'cuda'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), CALLS, ids=[message[:60] for _, _, message in CALLS])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_wrong_call_is_refused(changes, error, message, backend):
    options = {"backend": backend, **arguments(), **changes}
    with Nothing(), pytest.raises(error, match=re.escape(message)):
        hk.hydra_linear(**options)


def test_the_arguments_of_these_tests_are_right_but_for_the_change():
    assert hk.hydra_linear(**arguments()).shape == (M, N)


@pytest.mark.parametrize("backend", ["aten", "hybrid", "reference"])
def test_a_gradient_without_elements_in_memory_is_zeros(backend):
    leaves = {name: v.requires_grad_(name != "weight") for name, v in arguments().items()}
    h = hk.hydra_linear(**leaves, backend=backend)
    wanted = [v for v in leaves.values() if v.requires_grad]
    for v, grad in zip(wanted, torch.autograd.grad(h, wanted, torch._efficientzerotensor((M, N))), strict=True):
        assert torch.equal(grad + 0, torch.zeros_like(v))


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_a_low_precision_base_takes_its_own_dtype_and_fp32_adapters_only(low):
    base = {name: v.to(low) for name, v in arguments().items()}
    adapters = {name for name in base if name[0] in "AB"}
    assert hk.hydra_linear(**base).dtype == low
    assert hk.hydra_linear(**{n: v.float() if n in adapters else v for n, v in base.items()}).dtype == low
    other = torch.float16 if low == torch.bfloat16 else torch.bfloat16
    for wrong in (other, torch.float64):
        with pytest.raises(TypeError, match=f"A_down: expected {low} or torch.float32, got {wrong}"):
            hk.hydra_linear(**{n: v.to(wrong) if n in adapters else v for n, v in base.items()})


CONSTRUCTIONS = [
    ({"in_features": 0}, ValueError, "in_features: expected an integer >= 1, got 0"),
    ({"out_features": 2.0}, TypeError, "out_features: expected an integer >= 1, got float"),
    ({"r_a": -1}, ValueError, "r_a: expected an integer >= 0, got -1"),
    ({"r_b": True}, TypeError, "r_b: expected an integer >= 0, got bool"),
    ({"dropout": 1}, ValueError, "dropout: expected a number in [0, 1), got 1"),
    ({"input_dropout": -0.5}, ValueError, "input_dropout: expected a number in [0, 1), got -0.5"),
    ({"input_dropout": 0.5, "r_a": 0}, ValueError, "input_dropout: expected 0 with r_a = 0"),
    ({"scale_a": NAN}, ValueError, "scale_a: expected a finite number, got nan"),
    ({"scale_b": None}, TypeError, "scale_b: expected a number, got NoneType"),
    ({"scale_b": -(10**400)}, ValueError, "scale_b: expected a number in the range of float64, got a larger"),
    ({"init_std": 10**400}, ValueError, "init_std: expected a number in the range of float64, got a larger integer"),
    ({"scale_b": torch.ones(())}, TypeError, "scale_b: expected a number, got Tensor"),
    ({"dtype": torch.int8}, TypeError, "dtype: expected one of torch.float64"),
    ({"adapter_dtype": torch.float64}, ValueError, "adapter_dtype: expected None, or torch.float32 over"),
    ({"adapter_dtype": torch.bfloat16}, ValueError, "got torch.bfloat16 over a base in torch.float32"),
    (
        {"dtype": torch.float64, "adapter_dtype": torch.float32},
        ValueError,
        "got torch.float32 over a base in torch.float64",
    ),
    ({"init_std": -1.0}, ValueError, "init_std: expected None or a number >= 0, got -1.0"),
    ({"init_std": NAN}, ValueError, "init_std: expected a finite number, got nan"),
    ({"init_std": True}, TypeError, "init_std: expected None or a number, got bool"),
    ({"adapter_bias": "no"}, TypeError, "adapter_bias: expected True or False, got 'no'"),
    ({"learnable_scale": 0}, TypeError, "learnable_scale: expected True or False, got 0"),
    ({"form": "composd"}, ValueError, "form: expected one of auto, composed, kept, effective, got 'composd'"),
    ({"backend": "tritn"}, ValueError, f"backend: expected one of {BACKENDS}, got 'tritn'"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), CONSTRUCTIONS, ids=[message[:60] for _, _, message in CONSTRUCTIONS]
)
def test_a_wrong_construction_is_refused(changes, error, message):
    with Nothing(), pytest.raises(error, match=re.escape(message)):
        hk.HydraLinear(**{"in_features": 3, "out_features": 4, **changes})


def test_a_layer_names_its_argument_too():
    layer = hk.HydraLinear(13, 11)
    with pytest.raises(ValueError, match=re.escape("x: expected shape [*, 13]")):
        layer(torch.randn(2, 12))
    with pytest.raises(ValueError, match=re.escape("x: expected shape [*, 13]")):
        layer.branches(torch.randn(2, 12))
    layer.eval().merge()
    with pytest.raises(TypeError, match=re.escape("x: expected torch.float32, the dtype of weight, got torch.float64")):
        layer(torch.randn(2, 13, dtype=torch.float64))
    layer.disable_adapters()
    with pytest.raises(TypeError, match=re.escape("x: expected a Tensor, got int")):
        layer(3)


def test_one_branch_has_one_dtype():
    low = {name: v.bfloat16() for name, v in arguments().items()}
    with pytest.raises(TypeError, match=r"A_up: expected torch.bfloat16, got torch.float32"):
        hk.hydra_linear(**{**low, "A_up": low["A_up"].float()})


def test_a_weight_that_was_unfrozen_is_refused():
    layer = hk.HydraLinear(13, 11)
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="weight: it requires grad"):
        layer(torch.randn(2, 13))


@pytest.mark.parametrize("kind", [hk.LoRALinear, hk.SeqLoRALinear])
def test_ranks_of_a_single_branch_have_one_name(kind):
    for other in ("r_a", "r_b", "scale_a", "scale_b"):
        with pytest.raises(TypeError, match=other):
            kind(3, 4, **{other: 2})
    with pytest.raises(ValueError, match=r"^r: expected an integer >= 0, got -2"):
        kind(3, 4, r=-2)
    with pytest.raises(ValueError, match=r"^scale: expected a finite number, got nan"):
        kind(3, 4, scale=NAN)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torch_jit_script_is_refused_by_name_and_what_it_can_compile_is_said():
    for model in (hk.HydraLinear(3, 4), nn.Sequential(nn.Linear(3, 3), hk.LoRALinear(3, 4))):
        with pytest.raises(TypeError, match=r"torch.jit.script cannot compile adapted layers; use torch.compile"):
            torch.jit.script(model)


def test_the_package_contains_no_assert():
    import ast
    from pathlib import Path

    for path in Path(hk.__file__).parent.rglob("*.py"):
        assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)], path
