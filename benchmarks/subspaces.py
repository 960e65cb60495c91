"""The paper's analysis on a trained Hydra model (Fig. 3 and 4). ``python -m benchmarks.subspaces``

Which directions of W0 the branches use: the subspace similarity (Eq. 14) of A_down, and of B_down W0, with W0; a random
A_down has max(i, j) / K, and a random B_down shows what W0 alone does to B_down W0. And what the branches put out for
the [CLS] token: their t-SNE, and how alike they are to the frozen branch (linear CKA, Kornblith et al. 2019: 1 where
one is the other turned and scaled).
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
from benchmarks.tables import Stored, environment_note, markdown, svg
from benchmarks.timing import Environment
from hydra_kernels.analysis import subspace_similarity
from hydra_kernels.model import adapted_layers

RATE, SHOWN = 1e-2, 300  # learning rate; images in the t-SNE
BRANCHES = ("pretrained", "parallel", "sequential")
MATRICES = {"A": "A_down", "BW0": "B_down W0"}


class SubspaceRow(TypedDict):
    """One adapted layer of one trained model."""

    data: str
    seed: int
    layer: str
    K: int
    N: int
    # Matrix -> i - 1 -> j - 1: Eq. 14 with W0.
    similarity: dict[str, list[list[float]]]
    # Branch -> linear CKA of its [CLS] outputs with the frozen branch's.
    cka: dict[str, float]
    # Branch -> image -> the coordinates of its [CLS] output, in one t-SNE; of the last layer alone, else empty.
    tsne: dict[str, list[list[float]]]
    labels: list[int]
    accuracy: float
    dry: bool


def cka(X: Tensor, Y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features [n, p] and [n, q] of the same n inputs; 0 to 1."""
    X, Y = (features.double() - features.double().mean(0) for features in (X, Y))
    return ((X.T @ Y).norm() ** 2 / ((X.T @ X).norm() * (Y.T @ Y).norm())).item()


def branch_outputs(model: nn.Module, pixels: Tensor) -> dict[str, dict[str, Tensor]]:
    """Layer -> branch -> [CLS] outputs [n, N]."""
    found: dict[str, dict[str, Tensor]] = {}
    layers = adapted_layers(model)

    def keep(name: str, x: Tensor) -> None:
        found[name] = {branch: h[:, 0].detach() for branch, h in layers[name].branches(x)._asdict().items()}

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
    rank = min(X.shape)
    return [
        [round(subspace_similarity(X, W0, i, j), 4) for j in range(1, min(W0.shape) + 1)] for i in range(1, rank + 1)
    ]


def run(data: Path | None, device: torch.device, scale: Scale, seed: int, dry: bool) -> list[SubspaceRow]:
    """Trains one Hydra model, adapters in the MLP, and looks at each of its layers."""
    pictures = images.load(data)
    base = learning.backbone(pictures, scale, 0, device)
    parts = learning.split(pictures, scale, seed, device)
    model = learning.adapt(base, "hydra", "mlp", "auto", torch.float32, seed)
    trained = learning.fine_tune(model, parts, scale, RATE, seed)
    pixels, labels = (part[:: max(1, len(parts.test[1]) // SHOWN)][:SHOWN] for part in parts.test)
    outputs = branch_outputs(model, pixels)
    rows, random = [], torch.Generator().manual_seed(seed)
    for name, layer in adapted_layers(model).items():
        W0, A, B = (t.detach().double().cpu() for t in (layer.weight, layer.A_down, layer.B_down))
        last = name == list(outputs)[-1]
        rows.append(
            SubspaceRow(
                data=pictures.name,
                seed=seed,
                layer=name,
                K=layer.in_features,
                N=layer.out_features,
                similarity={
                    "A": similarities(A, W0),
                    "BW0": similarities(B @ W0, W0),
                    "random": similarities(torch.randn(B.shape, generator=random, dtype=B.dtype) @ W0, W0),
                },
                cka={b: round(cka(outputs[name][b], outputs[name]["pretrained"]), 4) for b in BRANCHES[1:]},
                tsne=tsne(outputs[name], seed) if last else {},
                labels=(labels + learning.CLASSES).tolist() if last else [],
                accuracy=round(trained.test, 4),
                dry=dry,
            )
        )
    return rows


def subspace_markdown(environment: Environment, rows: Sequence[SubspaceRow]) -> str:
    """Per layer: similarity to the top directions of W0, and the branches' likeness to the frozen one."""
    headings = ["layer", "A with W0", "random A", "B W0 with W0", "random B"]
    headings += ["CKA parallel, frozen", "CKA sequential, frozen"]
    cells = []
    for row in rows:
        r = len(row["similarity"]["A"])
        j = max(1, row["N"] // 8)
        own, frozen, by_chance = (f"{row['similarity'][m][-1][j - 1]:.3f}" for m in ("A", "BW0", "random"))
        likeness = [f"{row['cka'][branch]:.3f}" for branch in BRANCHES[1:]]
        cells.append([row["layer"], own, f"{max(r, j) / row['K']:.3f}", frozen, by_chance, *likeness])
    first = rows[0]
    means = [statistics.mean(float(line[i]) for line in cells) for i in range(1, 5)]
    parallel, sequential = (statistics.mean(row["cka"][branch] for row in rows) for branch in BRANCHES[1:])
    sentence = (
        f"Similarity of all of A's directions with the top {max(1, first['N'] // 8)} of W0's {first['N']}: "
        f"{means[0]:.3f} in the mean, {means[1]:.3f} for a random A; of B W0's {means[2]:.3f}, {means[3]:.3f} for a "
        f"random B. Alike to the frozen branch's [CLS] outputs: {parallel:.3f} the parallel branch, "
        f"{sequential:.3f} the sequential one."
    )
    note = (
        f"{environment_note(environment)} {first['data']}, seed {first['seed']}, test accuracy "
        f"{100 * first['accuracy']:.1f} %."
    )
    return f"{markdown(headings, cells)}\n\n{sentence}\n\n{note}"


def subspace_block(stored: Sequence[Stored]) -> str:
    """What stands between the markers."""
    return "\n\n".join(subspace_markdown(result.environment, result.rows) for result in stored)


def subspace_chart(environment: Environment, rows: Sequence[SubspaceRow]) -> str:
    """Fig. 3 of the last layer, i against j as in the paper, and Fig. 4: the three branches, and their classes."""
    last = rows[-1]
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, (matrix, name) in zip(axes[0], MATRICES.items(), strict=True):
        shown = axis.imshow(last["similarity"][matrix], aspect="auto", vmin=0, vmax=1, cmap="viridis", origin="lower")
        axis.set(title=f"{name} with W0 (Eq. 14), {last['layer']}", xlabel="j, directions of W0", ylabel="i")
        axis.set_yticks(range(len(last["similarity"][matrix])), range(1, len(last["similarity"][matrix]) + 1))
        figure.colorbar(shown, ax=axis)
    for branch, colour in zip(BRANCHES, ("tab:gray", "tab:blue", "tab:red"), strict=True):
        x, y = zip(*last["tsne"][branch], strict=True)
        axes[1, 0].scatter(x, y, s=5, color=colour, label=branch)
        axes[1, 1].scatter(x, y, s=5, c=last["labels"], cmap="tab10", vmin=0, vmax=9)
    axes[1, 0].set_title("[CLS] outputs of the branches, t-SNE")
    axes[1, 0].legend(fontsize=8)
    axes[1, 1].set_title("the same, coloured by class")
    for axis in axes[1]:
        axis.set(xticks=[], yticks=[])
    return svg(figure, "subspaces")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.subspaces", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; scikit-learn's digits by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the result (default: out)")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model: does it run at all")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(1)  # the model is too small for more
    try:
        scale = TINY if options.dry_run else Scale()
        rows = run(options.data, device, scale, options.seed, options.dry_run)
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
