"""The predictions of `benchmarks.roofline` against arithmetic by hand and against what the kernels launch."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from benchmarks.measuring import native_kernels, timing
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.rows import RooflineRow
from benchmarks.measuring.shapes import Shape
from benchmarks.roofline import CARDS, L2, Kernel, Model, predict

FC2, SQUARE, LONG = Shape(6400, 3072, 768), Shape(8192, 4096, 4096), Shape(8192, 14336, 4096)
RANKS = Ranks(8, 8)
GRAPH = Model(CARDS["h200"], l2_bytes=0, launch_us=0.0, gemm_efficiency=0.95)


def by_method(shape: Shape, model: Model = GRAPH, ranks: Ranks = RANKS) -> dict[str, RooflineRow]:
    return {row["method"]: row for row in predict(shape, ranks, "bf16", model)}


@pytest.mark.parametrize("shape", [FC2, SQUARE, Shape(256, 40, 24)], ids=str)
def test_naive_bytes_are_those_of_arithmetic_by_hand(shape):
    M, K, N = shape
    R, r = sum(RANKS), RANKS.r_a
    x, y, W0, b0 = M * K, M * N, N * K, N
    rows = by_method(shape)
    frozen = (x + W0 + b0 + y) + (y + W0 + x)
    assert rows["frozen"]["bytes"] == 2 * frozen

    def branch(v: int, fan_in: int, r: int) -> int:
        """z = v down^T, delta = z up^T; dz = G up, dup = G^T z, ddown = dz^T v, dv = dz down."""
        z, down, up = M * r, r * fan_in, N * r
        forward = (v + down + z) + (z + up + y)
        return forward + (y + up + z) + (y + z + up) + (z + v + down) + (z + down + v)

    # h = y0 + delta, and the sum of the two gradients of v: two read, one written.
    assert rows["naive_lora"]["bytes"] == 2 * (frozen + branch(x, K, R) + 3 * y + 3 * x)
    assert rows["naive_seqlora"]["bytes"] == 2 * (frozen + branch(y, N, R) + 3 * y + 3 * y)
    both = branch(x, K, r) + branch(y, N, r) + 2 * 3 * y + 3 * y + 3 * x
    assert rows["naive_hydra"]["bytes"] == 2 * (frozen + both)
    skinny = {"naive_lora": 3 * R * (K + N), "naive_seqlora": 6 * R * N, "naive_hydra": 3 * r * (K + N) + 6 * r * N}
    for method, columns in skinny.items():
        assert rows[method]["operations"] == 2 * M * (2 * N * K + columns)


@pytest.mark.parametrize(
    ("shape", "hydra", "lora"), [(FC2, 2.260, 1.902), (SQUARE, 1.539, 1.270), (LONG, 1.250, 1.173)], ids=str
)
def test_naive_predictions(shape, hydra, lora):
    """By hand from the bytes above. Autograd's sum of the two parts of dx, 3 M K elements, is 0.36 of that at fc2."""
    rows = by_method(shape)
    assert rows["naive_hydra"]["over_frozen"] == pytest.approx(hydra, abs=1e-3)
    assert rows["naive_lora"]["over_frozen"] == pytest.approx(lora, abs=1e-3)


def test_without_the_sum_of_dx_naive_hydra_is_at_1_90():
    rows = by_method(FC2)
    sum_of_dx = 3 * 2 * FC2.M * FC2.K / (CARDS["h200"].gigabytes * 1e3)
    left = rows["naive_hydra"]["predicted_us"] - sum_of_dx
    assert left / rows["frozen"]["predicted_us"] == pytest.approx(1.90, abs=0.005)


@pytest.mark.parametrize(("shape", "expected"), [(FC2, 1.15), (SQUARE, 1.043), (LONG, 1.032)], ids=str)
def test_the_floor_with_a_gap_for_its_three_launches_more(shape, expected):
    rows = by_method(shape)
    assert (rows["floor"]["launches"], rows["frozen"]["launches"]) == (5, 2)
    over = (rows["floor"]["predicted_us"] + 3 * 2.0) / rows["frozen"]["predicted_us"]
    assert over == pytest.approx(expected, abs=0.005)


def test_ours_is_what_is_launched():
    rows = by_method(FC2)
    names = {
        method: [kernel[0] for kernel in rows[method]["kernels"]] for method in ("triton", "hybrid", "hybrid_once")
    }
    before = ["sum_rows", "compose"]
    after = ["grad_z", "sum_rows", "gemm dx", "sum_rows", "reduce", "through_weight"]
    assert names["triton"] == [*before, "one_pass", *after]
    assert names["hybrid"] == [*before, "down", "addmm", "addmm_", *after]
    assert names["hybrid_once"] == names["triton"]
    M, K, N = FC2
    R, r_b = 16, 8
    moved = [kernel[1] for kernel in rows["triton"]["kernels"]]
    of_C, compose, h, grad_z, dU, dx, dD, reduce, through_weight = moved
    S, Q, T, P = 6, 22, 6, M // 64  # partial sums of C, of dU, of dD, and blocks of rows of grad_z
    parts = 4 * S * r_b * (K + 1)
    assert of_C == 2 * (N * K + r_b * N + N) + parts
    # D, and D above 16 rows with the rest of C; U; d and u in fp32.
    stack = (16 + R) * K
    composed = (R * K + stack + N * R) * 2 + (R + N) * 4
    assert compose == parts + 2 * (N + (R - r_b) * K + N * R) + composed
    assert h == 2 * (M * K + N * K + M * N + M * R + N * R + stack) + 4 * (N + R)
    products = rows["triton"]["kernels"][2][2]
    # Tiles of 128 x 128, for 128 x 256 leave multiprocessors idle: each sums Z's 16 columns and those of the rest anew.
    assert products == 2 * M * K * (N + N // 128 * 32) + 2 * M * N * R
    assert {kernel[0]: kernel[1] for kernel in rows["hybrid"]["kernels"]}["down"] == (
        2 * (M * K + M * R + R * K + r_b * K) + 4 * R
    )
    assert grad_z == 2 * (M * N + N * R + M * R) + 4 * P * R
    assert dU == 2 * (M * N + M * R) + 4 * Q * R * N
    assert dx == 2 * (M * N + N * K + M * K + M * R + R * K)
    assert dD == 2 * (M * K + M * R) + 4 * T * R * K
    written = R * K // 2 + N * R
    blocks = N // 64
    assert reduce == (Q * R * N + P * R + T * R * K + r_b * K + r_b + blocks) * 4 + written * 2
    products = 4 * 22 * r_b * N
    assert through_weight == 4 * (r_b * K + r_b + blocks) + 2 * (N * K + N + r_b * N) + products


def test_the_effective_form_reads_W0_once_a_pass_and_adds_nothing_to_its_products():
    rows = by_method(FC2)
    names = [kernel[0] for kernel in rows["effective"]["kernels"]]
    passes = ["down", "grad_z", "sum_rows", "sum_rows"]
    assert names == ["effective", "addmm", "rebuild", "mm", *passes, "reduce", "through_weight"]
    M, K, N = FC2
    R, r_b = 16, 8
    effective, h, rebuild, dx = rows["effective"]["kernels"][:4]
    D = 2 * (R + r_b) * K
    adapters = 2 * (N * R + (R - r_b) * K + r_b * N + N)
    assert effective[1] == 2 * 2 * N * K + adapters + D + 4 * R + 2 * N
    assert rebuild[1] == 2 * 2 * N * K + 2 * N * R + D
    assert [h[2], dx[2]] == [2 * M * N * K] * 2  # those of the frozen layer
    assert [h[1], dx[1]] == [kernel[1] for kernel in rows["frozen"]["kernels"]]


@pytest.mark.parametrize(
    ("shape", "us"), [(FC2, 12), (Shape(25216, 4096, 1024), 61), (SQUARE, 32), (LONG, 71)], ids=str
)
def test_one_sweep_reads_x_and_G_once(shape, us):
    """By hand: x and G, and little else; it takes the place of four passes, which read each of them twice."""
    rows = by_method(shape)
    (sweep,) = (kernel for kernel in rows["effective_sweep"]["kernels"] if kernel[0] == "sweep")
    least = 2 * shape.M * (shape.K + shape.N)
    assert least < sweep[1] < 1.1 * least
    assert sweep[3] == pytest.approx(us, rel=0.03)
    passes = ("down", "grad_z", "sum_rows")
    spared = sum(kernel[1] for kernel in rows["effective"]["kernels"] if kernel[0] in passes) - sweep[1]
    assert spared == least + 4 * 2 * shape.M * sum(RANKS)  # Z and dZ, each written and read again
    assert rows["effective_sweep"]["launches"] == rows["effective"]["launches"] - 3


def test_natives_sweep_reads_x_and_g_once_in_one_launch():
    """Bytes by hand, beside those of the passes that it stands in for."""
    (M, K, N), R = FC2, 16
    passes, sweep = ({k[0]: k for k in by_method(FC2)[name]["kernels"]} for name in ("native", "native_sweep"))
    assert passes.keys() - sweep.keys() == {"grad_z", "finish dZ", "grad_w"}
    assert sweep.keys() - passes.keys() == {"sm90_sweep"}
    ups, P = 2 * N * R, 16  # ranges of rows
    partials = 4 * (P * R * (K + N) + 128 * R)
    assert sweep["sm90_sweep"][1] == 2 * (M * K + M * N + M * R) + ups + 2 * M * R + partials
    assert sweep["sm90_sweep"][2] == 2 * M * 16 * (K + 2 * N)
    P, Q, S = M // 256, 12, 10
    assert passes["grad_z"][1] == 2 * (M * N + M * R) + ups + 4 * (P * N * R + Q * M * R)
    assert passes["finish dZ"][1] == 4 * Q * M * R + 2 * M * R + 4 * (M // 32) * R
    assert passes["grad_w"][1] == 2 * (M * K + M * R) + 4 * S * R * K
    saved = sum(passes[name][3] for name in ("grad_z", "finish dZ", "grad_w")) - sweep["sm90_sweep"][3]
    assert 2 < saved < 8
    assert "native_sweep" not in by_method(FC2, ranks=Ranks(17, 16))
    assert {8, 16} == {128 // native_kernels.sweep_ranges(LONG, R) for R in (16, 32)}


def test_a_pass_is_repeated_for_further_blocks_of_ranks():
    few, many = by_method(FC2, ranks=Ranks(32, 32)), by_method(FC2, ranks=Ranks(37, 33))
    assert "triton" in few
    assert {"triton", "effective", "effective_sweep"}.isdisjoint(many)
    G = FC2.M * FC2.N * 2
    grad_z = [{kernel[0]: kernel[1] for kernel in rows["hybrid"]["kernels"]}["grad_z"] for rows in (few, many)]
    assert grad_z[1] - grad_z[0] > G


@pytest.mark.parametrize("ranks", [Ranks(8, 0), Ranks(0, 8)], ids=str)
def test_one_branch_alone(ranks):
    rows = by_method(FC2, ranks=ranks)
    kind = "naive_lora" if ranks.r_a else "naive_seqlora"
    assert rows["naive_hydra"]["bytes"] == rows[kind]["bytes"]
    assert 1 < rows["floor"]["over_frozen"] < rows["triton"]["over_frozen"]


def test_slower_memory_and_gaps_cost_what_they_are():
    graph, eager = by_method(FC2), by_method(FC2, GRAPH._replace(launch_us=2.0))
    for method, row in eager.items():
        assert row["predicted_us"] - graph[method]["predicted_us"] == pytest.approx(2 * row["launches"], abs=2e-3)
    slow = by_method(FC2, GRAPH._replace(card=CARDS["h100"]))
    assert slow["naive_hydra"]["over_frozen"] > graph["naive_hydra"]["over_frozen"]


def test_l2_spares_what_it_still_holds():
    a, b, c = (torch.empty(10, dtype=torch.float32, device="meta") for _ in range(3))
    cache = L2(100)
    assert cache.missed(Kernel("first", ((a, 1),), (b,), 0)) == 80
    assert cache.missed(Kernel("second", ((b, 1), (a, 2)), (c,), 0)) == 40
    # b was used longer ago than a, and three do not fit.
    assert cache.missed(Kernel("third", ((c, 1), (a, 1)), (), 0)) == 0
    assert cache.missed(Kernel("fourth", ((b, 1),), (), 0)) == 40
    assert L2(0).missed(Kernel("fifth", ((a, 1), (a, 1)), (), 0)) == 80


@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp32", 4)])
def test_the_floor_by_hand_where_arithmetic_hides_every_activation(dtype, size):
    M, K, N = SQUARE
    frozen, adapters = 4 * M * N * K, 6 * M * 16 * (K + N)
    weight = N * K * size / 3e6
    assert roofline.floor_us(SQUARE, RANKS, dtype, 400, 3000) == pytest.approx((frozen + adapters) / 4e8 + 2 * weight)
    # C and T W0^T belong to the sequential branch.
    assert roofline.floor_us(SQUARE, Ranks(16, 0), dtype, 400, 3000) == pytest.approx((frozen + adapters) / 4e8)
    assert roofline.floor_us(SQUARE, Ranks(0, 0), dtype, 400, 3000) == pytest.approx(frozen / 4e8)


def test_the_floor_of_few_tokens_is_four_reads_of_the_weight_and_the_activations():
    M, K, N = Shape(16, 4096, 4096)
    moved = 2 * (4 * N * K + 2 * M * (K + N) + N)
    grad_z = 2 * M * 16 * 2 * N
    assert roofline.floor_us(Shape(M, K, N), RANKS, "bf16", 800, 4000) == pytest.approx(moved / 4e6 + grad_z / 8e8)


def test_command(tmp_path, capsys):
    path = tmp_path / "roofline.json"
    arguments = ["--shape", "256,64,48", "--ranks", "2+2", "--ranks", "4+8", "--card", "h100", "--json", str(path)]
    assert roofline.main(arguments) == 0
    assert "Predicted, not measured" in capsys.readouterr().out
    _, rows = timing.read_result(path, RooflineRow)
    assert [row["method"] for row in rows] == list(roofline.METHODS) * 2
    assert roofline.main(["--shape", "1,2"]) == 2
    assert "M,K,N" in capsys.readouterr().err
