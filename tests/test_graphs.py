"""What capturing a CUDA graph asks of a step, as far as a machine without a GPU can tell.

Nothing may be read on the host: tensors without data raise where it is. Nothing may be kept from one step to the next.
The rest, the current stream and the replay itself, is checked by ``make gpu``.
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hydra_kernels.backend import aten
from hydra_kernels.backend import triton as steps
from hydra_kernels.backend.interface import Operands
from hydra_kernels.kernels import configs
from hydra_kernels.kernels.configs import Gemm
from hydra_kernels.kernels.launch import Launch

M, K, N, R_A, R_B = 64, 48, 32, 3, 5
SIZES = {"weight": (N, K), "bias": (N,), "A_down": (R_A, K), "A_up": (N, R_A), "B_down": (R_B, N), "B_up": (N, R_B)}
SIZES |= {"A_down_bias": (R_A,), "A_up_bias": (N,), "B_down_bias": (R_B,), "B_up_bias": (N,)}
NEEDS = frozenset({"x", *SIZES, "scale_a", "scale_b"} - {"weight"})


def without_data(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def operands() -> Operands:
    """Everything that a call may have: biases, learnable scales, dropout of both kinds."""
    seed = torch.empty((), dtype=torch.int64, device="meta")
    mask = torch.empty(M, R_A + R_B, dtype=torch.bool, device="meta")
    tensors = {name: without_data(*shape) for name, shape in SIZES.items()}
    scales = {"scale_a": without_data(), "scale_b": without_data(), "mask_scale": 2.0}
    return Operands(**tensors, mask=mask, input_seed=seed, input_p=0.3, **scales)


@pytest.mark.parametrize("form", ["composed", "kept"])
def test_aten_reads_nothing_on_the_host(form):
    h, op, saved = aten.forward(without_data(M, K), operands(), NEEDS, form)
    grads = aten.backward(without_data(M, N), op, saved, NEEDS, form)
    assert h.shape == (M, N)
    assert grads.keys() == NEEDS


@pytest.mark.parametrize("arch", [configs.SM80, configs.SM90, configs.SM100], ids=lambda arch: arch.name)
@pytest.mark.parametrize("fused", [False, True], ids=["hybrid", "triton"])
def test_the_kernels_are_launched_without_reading_anything_on_the_host(fused, arch):
    launches: list[Launch] = []
    h, op, saved = steps.forward(without_data(M, K), operands(), NEEDS, fused, arch, launches.append)
    grads = steps.backward(without_data(M, N), op, saved, NEEDS, fused, arch, launches.append)
    assert h.shape == (M, N)
    assert grads.keys() == NEEDS
    # 3 + 6: triton's first GEMM makes Z too; around cuBLAS Z and dx's mask have passes of their own.
    assert len(launches) == 9
    for launch in launches:
        scales = [v for name, v in launch.arguments.items() if name in ("scale_a", "scale_b") and v is not None]
        assert all(isinstance(scale, Tensor) for scale in scales), "a learnable scale became a number"


def test_reading_on_the_host_would_be_seen():
    with pytest.raises(RuntimeError, match="meta tensors"):
        operands().scale_a.item()


@pytest.mark.parametrize(("current", "entered"), [(0, [1]), (1, [])])
def test_a_launch_goes_to_its_tensors_device(current, entered, monkeypatch):
    """With tensors on cuda:1 the kernel runs under that device; where it is the current one, no guard is paid for."""
    seen, now = [], [current]

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            seen.append(self.index)
            now.append(self.index)

        def __exit__(self, *error: object) -> None:
            now.pop()

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid: tuple[int, ...]):
            return lambda **arguments: ran.append(now[-1])

    ran: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[-1])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
    Launch.of(Kernel(), (1,), Gemm(32, 32, 16, 1, 1), x_ptr=x).run()
    assert ran == [1]
    assert seen == entered
    assert now == [current]
