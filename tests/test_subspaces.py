"""The paper's measures of trained branches, of things that are known, and the page's figures by hand."""

import math
import statistics
from pathlib import Path

import pytest
import torch

import hydra_kernels as hk
from benchmarks import subspaces
from benchmarks.learning import training
from benchmarks.learning.training import TINY
from benchmarks.measuring import images, timing
from benchmarks.measuring.rows import SubspaceRow
from benchmarks.rendering import subspaces as render_subspaces
from benchmarks.rendering.tables import Stored

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return images.digits()


@pytest.fixture(scope="module")
def base(digits):
    return training.backbone(digits, TINY, 0, CPU)


def test_cka_is_the_known_one():
    X = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    # |X'Y|^2 = 4 over |X'X| |Y'Y| = sqrt(8) * 2.
    assert subspaces.cka(X + 7, X[:, :1] - 3) == pytest.approx(0.5**0.5)


def test_cka_knows_rotations_from_noise():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(400, 6, generator=g)
    turned = 3 * X @ torch.linalg.qr(torch.randn(6, 6, generator=g)).Q + 5
    assert subspaces.cka(X, turned) == pytest.approx(1, abs=1e-6)
    assert subspaces.cka(X, torch.randn(400, 6, generator=g)) < 0.1


def test_similarities_are_those_of_the_top_directions():
    W0, X = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.tensor([[0.0, 5.0, 0.0], [1.0, 0.0, 0.0]])
    assert subspaces.similarities(X, W0) == [[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]


def test_random_adapters_have_what_chance_and_w0_give_them():
    g = torch.Generator().manual_seed(0)
    N, K, n, draws = 6, 40, 300, 200
    W0 = torch.randn(N, K, generator=g, dtype=torch.float64)
    W0[0] *= 1e3  # almost all that a B W0 can be
    y0 = torch.randn(n, N, generator=g)
    y0[:, 0] *= 1e3
    seen = {"x": torch.randn(n, K, generator=g), "pretrained": y0}
    similarity, alike = subspaces.by_chance(seen, W0, 1, 1, draws, 0)
    assert [len(set(values)) for values in (similarity["A"], alike["parallel"])] > [draws // 2] * 2
    mean = {name: sum(values) / draws for name, values in {**similarity, **alike}.items()}
    assert mean["A"] == pytest.approx(1 / K, abs=4 * (2 / K**2 / draws) ** 0.5)
    assert mean["BW0"] > 0.98
    assert mean["sequential"] > 0.98
    assert mean["parallel"] < 0.05


def subspace_rows():
    found = []
    for seed, (A, BW0, parallel, sequential) in enumerate([(0.1, 0.5, 0.4, 0.9), (0.3, 0.9, 0.6, 0.7)]):
        found.append(
            SubspaceRow(
                data="digits",
                seed=seed,
                rate=0.03,
                layer="fc2",
                K=384,
                N=96,
                top=12,
                similarity={"A": A, "BW0": BW0},
                random_similarity={"A": [0.05, 0.15], "BW0": [0.2, 0.4]},
                cka={"parallel": parallel, "sequential": sequential},
                random_cka={"parallel": [0.2, 0.2], "sequential": [0.7, 0.9]},
                matrices={},
                tsne={},
                labels=[],
                accuracy=0.8 + 0.02 * seed,
                dry=False,
            )
        )
    return found


def test_the_subspace_table_sets_each_figure_beside_that_of_random_adapters():
    table = render_subspaces.subspace_table(subspace_rows())
    assert table.splitlines()[2] == (
        "| fc2 | 0.20 ± 0.14 | 0.10 ± 0.06 | 0.70 ± 0.28 | 0.30 ± 0.12 | 0.50 ± 0.14 | 0.20 ± 0.00 | "
        "0.80 ± 0.14 | 0.80 ± 0.12 |"
    )
    assert render_subspaces.subspace_sentence(subspace_rows()) == (
        "Similarity of all directions with the top 12 of W0's 96, in the mean: of A 0.20, of a random A 0.10 (0.10 "
        "and 2.00 times above; above every random draw in 1 of 2 layers and seeds); of B W0 0.70, of a random B 0.30 "
        "(0.40 and 2.33 times above; above every random draw in 2 of 2 layers and seeds). CKA with the frozen branch: "
        "parallel 0.50, of random adapters 0.20; sequential 0.80, of random adapters 0.80; the sequential branch "
        "is the more alike in 2 of 2 layers and seeds."
    )
    text = render_subspaces.subspace_markdown(Stored(None, timing.environment(CPU), subspace_rows()))
    assert "digits, 2 seeds at learning rate 0.03, test accuracy 81.0 ± 1.4 %" in text
    assert "over 2 random draws of each seed." in text


@pytest.mark.slow
def test_a_run_looks_at_the_trained_layers_of_every_seed(digits, base):
    rows = subspaces.run(None, CPU, TINY, 2, 2, True)
    assert [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        data = training.split(digits, TINY, row["seed"], CPU)
        model = training.adapt(base, "hydra", "mlp", "auto", torch.float32, row["seed"])
        training.fine_tune(model, data, TINY, subspaces.RATE, row["seed"])
        chosen = [round(i * (len(data.test[1]) - 1) / 299 - 0.5 + 1e-9) for i in range(300)]
        [(name, layer)] = hk.model.adapted_layers(model).items()
        seen = {}
        layer.register_forward_hook(lambda _, inputs, h, seen=seen: seen.update(x=inputs[0][:, 0]))
        with torch.no_grad():
            training.logits_of(model, data.test[0][chosen])
            x, W0, b0 = seen["x"], layer.weight, layer.bias
            y0 = x @ W0.T + b0
            parallel, sequential = x @ layer.A_down.T @ layer.A_up.T, y0 @ layer.B_down.T @ layer.B_up.T
        assert row["layer"] == name
        assert row["cka"]["parallel"] == pytest.approx(subspaces.cka(parallel, y0), abs=2e-3)
        assert row["cka"]["sequential"] == pytest.approx(subspaces.cka(sequential, y0), abs=2e-3)
        top = layer.out_features // 8
        wanted = {"A": layer.A_down, "BW0": layer.B_down @ W0}
        for matrix, X in wanted.items():
            similarity = hk.analysis.subspace_similarity(X, W0, 3, top)
            assert row["similarity"][matrix] == pytest.approx(similarity, abs=1e-4)
            assert (matrix in row["matrices"]) == (row["seed"] == 0)
        assert set(row["labels"]) == (set(range(5, 10)) if row["seed"] == 0 else set())


def test_the_pictures_ticks_stand_in_the_middle_of_their_cells(tmp_path):
    shown = subspace_rows()
    values = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]
    points = {branch: [[0.0, 1.0]] for branch in render_subspaces.BRANCHES}
    shown[0] |= {"matrices": dict.fromkeys(render_subspaces.MATRICES, values), "tsne": points, "labels": [5]}
    figure = render_subspaces.subspace_chart(Stored(tmp_path, timing.environment(CPU), shown))
    images_drawn = [axis.images[0] for axis in figure.axes if axis.images]
    assert len([axis for axis in figure.axes if "Eq. 14" in axis.get_title(loc="left")]) == 3
    assert [list(image.get_extent()) for image in images_drawn[:3]] == [[0.5, 4.5, 0.5, 2.5]] * 3


def test_branch_outputs_are_those_of_the_layers(base):
    model = training.adapt(base, "hydra", "mlp", "auto", torch.float32, 0)
    with torch.no_grad():
        for layer in hk.model.adapted_layers(model).values():
            layer.A_up.normal_()
            layer.B_up.normal_()
    pixels = torch.randn(3, 3, TINY.image_size, TINY.image_size)
    [(name, outputs)] = subspaces.cls_of_branches(model, pixels).items()
    seen = {}
    model.get_submodule(name).register_forward_hook(lambda _, inputs, h: seen.update(h=h[:, 0]))
    with torch.no_grad():
        training.logits_of(model, pixels)
    torch.testing.assert_close(sum(outputs[b] for b in render_subspaces.BRANCHES), seen["h"], rtol=1e-5, atol=1e-5)
    assert math.isfinite(outputs["parallel"].norm())


def test_the_stored_models_say_what_the_page_says():
    _, rows = timing.read_result(Path(subspaces.__file__).parent / "results" / "subspaces-cpu-digits.json", SubspaceRow)

    def mean(of, name):
        return statistics.mean(
            v for row in rows for v in ([row[of][name]] if of in ("similarity", "cka") else row[of][name])
        )

    A, B = ((mean("similarity", name), mean("random_similarity", name)) for name in ("A", "BW0"))
    assert B[0] - B[1] > A[0] - A[1] > 0
    assert A[0] / A[1] > B[0] / B[1] > 1
    trained, random = ([mean(of, b) for b in render_subspaces.BRANCHES[1:]] for of in ("cka", "random_cka"))
    assert trained[0] < trained[1]
    assert random[0] < random[1]
    assert all(a < b for a, b in zip(trained, random, strict=True))
    assert any(row["cka"]["sequential"] < row["cka"]["parallel"] for row in rows)
    assert len({row["seed"] for row in rows}) >= 5
    assert min(len(v) for row in rows for v in row["random_cka"].values()) >= 100
