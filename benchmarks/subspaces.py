"""The paper's analysis on trained Hydra models (Fig. 3 and 4). ``python -m benchmarks.subspaces``

Which directions of W0 the branches use: the subspace similarity (Eq. 14) of A_down, and of B_down W0, with W0, beside
that of random ones: a random A_down has max(i, j) / K in the mean, and a random B_down shows what W0 alone does to
B_down W0. And what the branches put out for the [CLS] token: their t-SNE, and how alike they are to the frozen branch
(linear CKA, Kornblith et al. 2019: 1 where one is the other turned and scaled), beside random adapters' on the same
inputs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks import images, learning, timing
from benchmarks.learning import TINY, Scale
from benchmarks.render_learn import mean_and_spread
from benchmarks.tables import Stored, environment_note, markdown, svg
from benchmarks.timing import Environment
from hydra_kernels.analysis import subspace_similarity
from hydra_kernels.model import adapted_layers

RATE = 3e-2  # what the search of benchmarks.learn chose for Hydra in the MLP
SHOWN = 300  # images of the CKA and the t-SNE
BRANCHES = ("pretrained", "parallel", "sequential")
MATRICES = {"A": "A_down", "BW0": "B_down W0", "random": "random B_down W0"}


class SubspaceRow(TypedDict):
    """One adapted layer of one trained model, beside random adapters in its place."""

    data: str
    seed: int
    rate: float
    layer: str
    K: int
    N: int
    # j of "similarity": how many of W0's top directions.
    top: int
    # "A", "BW0" -> Eq. 14 of all their directions with the top ones of W0; then that of each random draw.
    similarity: dict[str, float]
    random_similarity: dict[str, list[float]]
    # Branch -> linear CKA of its [CLS] outputs with the frozen branch's; then that of each random draw.
    cka: dict[str, float]
    random_cka: dict[str, list[float]]
    # Of the last layer of the first seed alone, else empty. Matrix -> i - 1 -> j - 1: Eq. 14 with W0.
    matrices: dict[str, list[list[float]]]
    # Branch -> image -> the coordinates of its [CLS] output, in one t-SNE.
    tsne: dict[str, list[list[float]]]
    labels: list[int]
    accuracy: float
    dry: bool


def cka(X: Tensor, Y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features [n, p] and [n, q] of the same n inputs; 0 to 1."""
    X, Y = (features.double() - features.double().mean(0) for features in (X, Y))
    return ((X.T @ Y).norm() ** 2 / ((X.T @ X).norm() * (Y.T @ Y).norm())).item()


def cls_of_branches(model: nn.Module, pixels: Tensor) -> dict[str, dict[str, Tensor]]:
    """Layer -> branch -> [CLS] outputs [n, N], and "x" -> the layer's [CLS] inputs [n, K]."""
    found: dict[str, dict[str, Tensor]] = {}
    layers = adapted_layers(model)

    def keep(name: str, x: Tensor) -> None:
        outputs = {"x": x, **layers[name].branches(x)._asdict()}
        found[name] = {branch: h[:, 0].detach() for branch, h in outputs.items()}

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: keep(name, inputs[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        learning.logits_of(model.eval(), pixels)
    for handle in handles:
        handle.remove()
    return found


def tsne(outputs: dict[str, Tensor], seed: int) -> dict[str, list[list[float]]]:
    """Two coordinates of every output, the branches embedded together."""
    from sklearn.manifold import TSNE

    everything = torch.cat([outputs[branch] for branch in BRANCHES]).double().cpu().numpy()
    perplexity = min(30.0, (len(everything) - 1) / 3)
    placed = TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(everything)
    parts = torch.from_numpy(placed).split(len(outputs["pretrained"]))
    return {
        b: [[round(v, 3) for v in point] for point in part.tolist()] for b, part in zip(BRANCHES, parts, strict=True)
    }


def similarities(X: Tensor, W0: Tensor) -> list[list[float]]:
    """i - 1 -> j - 1: Eq. 14 of X's top i directions with W0's top j, up to the ranks."""
    rank = min(X.shape)
    return [
        [round(subspace_similarity(X, W0, i, j), 4) for j in range(1, min(W0.shape) + 1)] for i in range(1, rank + 1)
    ]


def by_chance(seen: dict[str, Tensor], W0: Tensor, r: int, top: int, draws: int, seed: int) -> tuple[dict, dict]:
    """Of adapters drawn at random in a layer's place: matrix -> similarities, and branch -> CKA, one of each draw.

    ``seen`` has the layer's [CLS] inputs "x" [n, K] and frozen outputs "pretrained" [n, N].
    """
    g = torch.Generator().manual_seed(seed)
    (N, K), x, y0 = W0.shape, *(seen[name].double().cpu() for name in ("x", "pretrained"))
    similarity: dict[str, list[float]] = {"A": [], "BW0": []}
    alike: dict[str, list[float]] = {"parallel": [], "sequential": []}
    for _ in range(draws):
        A, B, A_up, B_up = (torch.randn(s, generator=g, dtype=W0.dtype) for s in ((r, K), (r, N), (N, r), (N, r)))
        similarity["A"].append(round(subspace_similarity(A, W0, r, top), 4))
        similarity["BW0"].append(round(subspace_similarity(B @ W0, W0, r, top), 4))
        alike["parallel"].append(round(cka(x @ A.T @ A_up.T, y0), 4))
        alike["sequential"].append(round(cka(y0 @ B.T @ B_up.T, y0), 4))
    return similarity, alike


def run(data: Path | None, device: torch.device, scale: Scale, seeds: int, draws: int, dry: bool) -> list[SubspaceRow]:
    """Trains a Hydra model of each seed, adapters in the MLP, and looks at each of its layers."""
    pictures = images.load(data)
    base = learning.backbone(pictures, scale, 0, device)
    rows = []
    for seed in range(seeds):
        parts = learning.split(pictures, scale, seed, device)
        model = learning.adapt(base, "hydra", "mlp", "auto", torch.float32, seed)
        trained = learning.fine_tune(model, parts, scale, RATE, seed)
        tested = len(parts.test[1])  # in the order of their classes: every class is shown
        chosen = torch.linspace(0, tested - 1, min(SHOWN, tested)).long()
        pixels, labels = (part[chosen] for part in parts.test)
        seen = cls_of_branches(model, pixels)
        for name, layer in adapted_layers(model).items():
            W0, A, B = (t.detach().double().cpu() for t in (layer.weight, layer.A_down, layer.B_down))
            r, top = layer.r_a, max(1, layer.out_features // 8)
            shown = seed == 0 and name == list(seen)[-1]
            drawn = torch.randn(B.shape, generator=torch.Generator().manual_seed(seed), dtype=B.dtype)
            whole = {"A": A, "BW0": B @ W0, "random": drawn @ W0} if shown else {}
            similarity, alike = by_chance(seen[name], W0, r, top, draws, seed)
            rows.append(
                SubspaceRow(
                    data=pictures.name,
                    seed=seed,
                    rate=RATE,
                    layer=name,
                    K=layer.in_features,
                    N=layer.out_features,
                    top=top,
                    similarity={
                        matrix: round(subspace_similarity(X, W0, r, top), 4)
                        for matrix, X in (("A", A), ("BW0", B @ W0))
                    },
                    random_similarity=similarity,
                    cka={b: round(cka(seen[name][b], seen[name]["pretrained"]), 4) for b in BRANCHES[1:]},
                    random_cka=alike,
                    matrices={matrix: similarities(X, W0) for matrix, X in whole.items()},
                    tsne=tsne(seen[name], seed) if shown else {},
                    labels=(labels + learning.CLASSES).tolist() if shown else [],
                    accuracy=round(trained.test, 4),
                    dry=dry,
                )
            )
    return rows


def subspace_table(rows: Sequence[SubspaceRow]) -> str:
    """Per layer: similarity to the top directions of W0, and the branches' likeness to the frozen one; each beside what
    random adapters have."""
    headings = ["layer", "A with W0", "random A", "B W0 with W0", "random B"]
    headings += ["CKA parallel, frozen", "random adapters", "CKA sequential, frozen", "random adapters"]
    cells = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = [row for row in rows if row["layer"] == layer]
        line = [layer]
        for of, by_chance_of, names in (
            ("similarity", "random_similarity", ("A", "BW0")),
            ("cka", "random_cka", BRANCHES[1:]),
        ):
            for name in names:
                line.append(_spread([row[of][name] for row in own]))  # type: ignore[literal-required]
                line.append(_spread([v for row in own for v in row[by_chance_of][name]]))  # type: ignore[literal-required]
        cells.append(line)
    return markdown(headings, cells)


def _spread(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


def subspace_sentence(rows: Sequence[SubspaceRow]) -> str:
    """The table in the mean, and in how many layers and seeds it holds."""
    count, first = len(rows), rows[0]
    parts = []
    for matrix, name in (("A", "A"), ("BW0", "B W0")):
        own = statistics.mean(row["similarity"][matrix] for row in rows)
        random = statistics.mean(v for row in rows for v in row["random_similarity"][matrix])
        above = sum(row["similarity"][matrix] > max(row["random_similarity"][matrix]) for row in rows)
        parts.append(
            f"of {name} {own:.3f}, of a random {name[0]} {random:.3f} ({own - random:.3f} and {own / random:.1f} times "
            f"above; above every random draw in {above} of {count} layers and seeds)"
        )
    means = [
        statistics.mean(values)
        for branch in BRANCHES[1:]
        for values in ([row["cka"][branch] for row in rows], [v for row in rows for v in row["random_cka"][branch]])
    ]
    ordered = sum(row["cka"]["sequential"] > row["cka"]["parallel"] for row in rows)
    return (
        f"Similarity of all directions with the top {first['top']} of W0's {first['N']}, in the mean: "
        f"{'; '.join(parts)}. CKA with the frozen branch: parallel {means[0]:.3f}, of random adapters {means[1]:.3f}; "
        f"sequential {means[2]:.3f}, of random adapters {means[3]:.3f}; the sequential branch is the more alike in "
        f"{ordered} of {count} layers and seeds."
    )


def subspace_markdown(environment: Environment, rows: Sequence[SubspaceRow]) -> str:
    """The table, what it says, and what a reader must know beside it."""
    first = rows[0]
    accuracies = {row["seed"]: row["accuracy"] for row in rows}
    note = (
        f"{environment_note(environment)} {first['data']}, {len(accuracies)} seeds at learning rate {first['rate']:g}, "
        f"test accuracy {mean_and_spread(list(accuracies.values()))} %; mean ± standard deviation over seeds, and over "
        f"{len(first['random_cka']['parallel'])} random draws of each seed."
    )
    return f"{subspace_table(rows)}\n\n{subspace_sentence(rows)}\n\n{note}"


def subspace_block(stored: Sequence[Stored]) -> str:
    """What stands between the markers."""
    return "\n\n".join(subspace_markdown(result.environment, result.rows) for result in stored)


def subspace_chart(environment: Environment, rows: Sequence[SubspaceRow]) -> str:
    """Fig. 3 of the last layer, i against j as in the paper, and Fig. 4: the three branches, and their classes."""
    [shown] = [row for row in rows if row["matrices"]]
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    places = figure.subplot_mosaic([["A"] * 2 + ["BW0"] * 2 + ["random"] * 2, ["branches"] * 3 + ["classes"] * 3])
    for matrix, name in MATRICES.items():
        values, axis = shown["matrices"][matrix], places[matrix]
        # A cell's middle is its i and j, which count from 1.
        extent = (0.5, len(values[0]) + 0.5, 0.5, len(values) + 0.5)
        image = axis.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="viridis", origin="lower", extent=extent)
        axis.set(title=f"{name} with W0 (Eq. 14)", xlabel=f"j, directions of W0, {shown['layer']}", ylabel="i")
        axis.set_yticks(range(1, len(values) + 1))
        figure.colorbar(image, ax=axis)
    for branch, colour in zip(BRANCHES, ("tab:gray", "tab:blue", "tab:red"), strict=True):
        x, y = zip(*shown["tsne"][branch], strict=True)
        places["branches"].scatter(x, y, s=5, color=colour, label=branch)
        places["classes"].scatter(x, y, s=5, c=shown["labels"], cmap="tab10", vmin=0, vmax=9)
    places["branches"].legend(fontsize=8)
    for place, title in (
        ("branches", "[CLS] outputs of the branches, t-SNE"),
        ("classes", "the same, coloured by class"),
    ):
        places[place].set(title=title, xticks=[], yticks=[])
    return svg(figure, "subspaces")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.subspaces", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; scikit-learn's digits by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=5, help="models to train (default: 5)")
    parser.add_argument("--draws", type=int, default=100, help="of random adapters (default: 100)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the result (default: out)")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model: does it run at all")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(1)  # the model is too small for more
    try:
        if min(options.seeds, options.draws) < 1:
            raise ValueError(f"seeds, draws: expected at least 1, got {options.seeds} and {options.draws}")
        scale, seeds, draws = (TINY, 2, 3) if options.dry_run else (Scale(), options.seeds, options.draws)
        rows = run(options.data, device, scale, seeds, draws, options.dry_run)
    except ValueError as error:
        print(f"subspaces: {error}", file=sys.stderr)
        return 2
    environment = timing.environment(device)
    path = options.out / f"subspaces-{device.type}-{rows[0]['data'].lower()}.json"
    timing.write_result(path, environment, rows, SubspaceRow)
    print(subspace_markdown(environment, rows))
    print(f"Stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
