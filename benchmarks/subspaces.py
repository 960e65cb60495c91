"""The paper's analysis on trained Hydra models (Fig. 3 and 4). ``python -m benchmarks.subspaces``

Which directions of W0 the branches use: the subspace similarity (Eq. 14) of A_down, and of B_down W0, with W0, beside
that of random ones: a random A_down has max(i, j) / K in the mean, and a random B_down shows what W0 alone does to
B_down W0. And what the branches put out for the [CLS] token: their t-SNE, and how alike they are to the frozen branch
(linear CKA, Kornblith et al. 2019: 1 where one is the other turned and scaled), beside random adapters' on the same
inputs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.learning import training
from benchmarks.learning.training import TINY, Scale
from benchmarks.measuring import images, timing
from benchmarks.measuring.rows import SubspaceRow
from benchmarks.rendering.subspaces import BRANCHES, subspace_markdown
from benchmarks.rendering.tables import Stored
from hydra_kernels.analysis import subspace_similarity
from hydra_kernels.model import adapted_layers

RATE = 3e-2  # what the search of benchmarks.learn chose for Hydra in the MLP
SHOWN = 300  # images of the CKA and the t-SNE


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
        training.logits_of(model.eval(), pixels)
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
    base = training.backbone(pictures, scale, 0, device)
    rows = []
    for seed in range(seeds):
        parts = training.split(pictures, scale, seed, device)
        model = training.adapt(base, "hydra", "mlp", "auto", torch.float32, seed)
        trained = training.fine_tune(model, parts, scale, RATE, seed)
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
                    labels=(labels + training.CLASSES).tolist() if shown else [],
                    accuracy=round(trained.test, 4),
                    dry=dry,
                )
            )
    return rows


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
    print(subspace_markdown(Stored(path, environment, rows)))
    print(f"Stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
