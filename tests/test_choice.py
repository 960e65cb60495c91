"""The choice: every reason that it gives, at and beside its thresholds, and that what the user fixed stays fixed."""

import pytest
import torch

from hydra_kernels.choice import Choice, choose

F32 = torch.float32


@pytest.mark.parametrize(
    ("M", "K", "N", "r_a", "r_b", "dtype", "form"),
    [
        (1600, 3072, 768, 8, 8, torch.float32, "composed"),
        (1600, 3072, 768, 8, 8, torch.float64, "composed"),
        (1600, 3072, 768, 8, 8, torch.bfloat16, "kept"),
        (1600, 3072, 768, 8, 8, torch.float16, "kept"),
        (1600, 3072, 768, 16, 0, torch.bfloat16, "composed"),
        (1228, 3072, 768, 8, 8, torch.float32, "kept"),
        (1229, 3072, 768, 8, 8, torch.float32, "composed"),
        (307, 768, 3072, 8, 8, torch.float32, "kept"),
        (308, 768, 3072, 8, 8, torch.float32, "composed"),
        (1023, 128, 128, 8, 8, torch.float32, "kept"),
        (1024, 128, 128, 8, 8, torch.float32, "composed"),
        (1600, 3072, 768, 0, 16, torch.float32, "kept"),
        (1600, 768, 3072, 0, 16, torch.float32, "composed"),
        (1600, 768, 768, 0, 16, torch.float32, "composed"),
        (16, 4096, 4096, 16, 0, torch.float32, "composed"),
    ],
)
def test_form(M, K, N, r_a, r_b, dtype, form):
    assert choose(M, K, N, r_a, r_b, dtype) == Choice("aten", form)


@pytest.mark.parametrize("backend", ["triton", "hybrid"])
def test_the_triton_kernels_compose_at_any_size_and_dtype(backend):
    assert choose(16, 4096, 4096, 8, 8, torch.bfloat16, backend=backend) == Choice(backend, "composed")
    assert choose(16, 4096, 4096, 8, 8, F32, form="kept", backend=backend) == Choice(backend, "kept")  # refused later


def test_what_the_user_fixed_stays_fixed():
    assert choose(16, 4096, 4096, 8, 8, F32, form="composed") == Choice("aten", "composed")
    assert choose(8192, 64, 64, 8, 8, F32, form="kept") == Choice("aten", "kept")
    assert choose(8192, 64, 64, 8, 0, F32, form="kept") == Choice("aten", "composed")
    assert choose(8192, 64, 64, 8, 8, F32, backend="aten").backend == "aten"
