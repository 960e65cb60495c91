"""The learning benchmarks: fair runs, honest statistics, and what the paper's measures say of things that are known."""

import json
import math

import pytest
import torch
from matplotlib.figure import Figure  # noqa: F401  (its import warns nowhere else)

import hydra_kernels as hk
from benchmarks import images, learn, learning, render_learn, rounding, subspaces, timing
from benchmarks.learning import TINY
from benchmarks.rows import LearnRow

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(scope="module")
def digits():
    return images.digits()


@pytest.fixture(scope="module")
def base(digits):
    return learning.backbone(digits, TINY, 0, CPU)


def seeds_used():
    """Of the published runs: the final ones and those of the search."""
    settings = learn.Settings(CPU, None, 10, 5, learning.Scale(), 1, False)
    return sorted({job.seed for jobs in (learn.equal_jobs, learn.search_jobs) for job in jobs(settings)})


def test_no_image_of_the_test_is_trained_on_or_searched_with_by_any_seed(digits):
    labels = digits.labels[digits.labels >= 5] - 5
    parts = {seed: learning.indices(labels, 20, seed) for seed in seeds_used()}
    assert len(parts) == 15
    [fixed] = {tuple(part.test.tolist()) for part in parts.values()}
    assert labels[list(fixed)].bincount().tolist() == [n // 2 for n in labels.bincount().tolist()]
    for part in parts.values():
        assert [len(set(own.tolist())) for own in part] == [100, 100, len(fixed)]
        assert len(set(torch.cat(part).tolist())) == 200 + len(fixed)
        assert [labels[own].bincount().tolist() for own in part[:2]] == [[20] * 5] * 2
    assert len({tuple(part.train.tolist()) for part in parts.values()}) == 15


def test_a_split_holds_the_images_of_its_indices(digits):
    parts = learning.split(digits, learning.Scale(), 3, CPU)
    labels = digits.labels[digits.labels >= 5] - 5
    everything = learning.subset(digits, 5, 32, CPU)
    for (pixels, own), chosen in zip(
        (parts.train, parts.validation, parts.test), learning.indices(labels, 20, 3), strict=True
    ):
        assert torch.equal(own, labels[chosen])
        assert torch.equal(pixels, everything[0][chosen])


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match=r"shots: class 0 has 4 images beside the test's, expected 6"):
        learning.indices(torch.arange(5).repeat(8), 3, 0)


def test_batches_show_every_image_once_an_epoch():
    data = torch.zeros(23, 1), torch.zeros(23)
    made = learning.batches(data, 5, 9, torch.Generator().manual_seed(0))
    assert [len(index) for index in made] == [5] * 9
    assert all(len(set(torch.cat(made[start : start + 4]).tolist())) == 20 for start in (0, 4))


@pytest.mark.parametrize("kind", ["lora", "seqlora", "hydra"])
def test_methods_start_from_equal_weights_and_adapt_what_they_should(base, kind):
    naive, ours = (learning.adapt(base, kind, "both", b, torch.float32, 5) for b in ("reference", "auto"))
    assert {n: p.tolist() for n, p in naive.named_parameters()} == {n: p.tolist() for n, p in ours.named_parameters()}
    adapted = set(hk.model.adapted_layers(ours))
    assert adapted == {"vit.layers.0.mlp.fc2", "vit.layers.0.attention.o_proj"}
    trainable = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert all(n.startswith(("classifier", *adapted)) for n in trainable)
    pixels = torch.randn(2, 3, 32, 32)
    frozen = base.vit(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(ours.vit(pixel_values=pixels).last_hidden_state, frozen, rtol=0, atol=0)


def test_parameter_counts_are_equal_within_a_tenth():
    for target, (K, N) in {"mlp.fc2": (384, 96), "attention.o_proj": (96, 96)}.items():
        counts = [r.r_a * (K + N) + r.r_b * 2 * N for r in learning.RANKS[target].values()]
        assert max(counts) <= 1.1 * min(counts)


def test_a_run_learns_and_repeats_bit_for_bit(digits, base):
    scale = learning.Scale(hidden_size=16, layers=1, shots=4, batch=10, steps=150)
    data = learning.split(digits, scale, 0, CPU)

    def run(**options):
        return learning.fine_tune(
            learning.adapt(base, "hydra", "both", "auto", torch.float32, 0), data, scale, 3e-2, 0, **options
        )

    first, again, reordered = run(), run(), run(reordered=True)
    assert first.losses == again.losses
    assert first.losses != reordered.losses
    assert first.losses[:20] == pytest.approx(reordered.losses[:20], rel=1e-4)  # later they drift apart
    assert sum(first.losses[-5:]) < 0.8 * sum(first.losses[:5])
    assert first.head == 16 * 5 + 5
    model, (pixels, labels) = first.model.eval(), data.test
    with torch.no_grad():
        right = (learning.logits_of(model, pixels).argmax(1) == labels).float().mean().item()
    assert first.test == pytest.approx(right)


def test_low_precision_backbones_keep_fp32_adapters_and_heads(base):
    model = learning.adapt(base, "hydra", "mlp", "auto", torch.bfloat16, 0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_rounded_once_is_the_exact_sum_rounded_and_trains(base):
    model = learning.adapt(base, "hydra", "mlp", "reference", torch.bfloat16, 0)
    [layer] = hk.model.adapted_layers(model).values()
    learning.round_once(model)
    [once] = [module for module in model.modules() if isinstance(module, learning.RoundedOnce)]
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in layer.adapters().values():
            p.copy_(0.01 * torch.randn(p.shape, generator=g))
    x = torch.randn(40, 64, generator=g).bfloat16().requires_grad_()
    held = {name: p.detach().bfloat16().double() for name, p in layer.adapters().items()}
    wide = x.detach().double()
    leaves = [t.requires_grad_() for t in (*held.values(), wide)]
    exact = hk.reference.hydra_linear(wide, layer.weight.double(), layer.bias.double(), **held)
    h = once(x)
    assert h.dtype == torch.bfloat16
    assert ((h.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    assert (layer(x).double() - exact).norm() > 1.2 * (h.double() - exact).norm()
    found = torch.autograd.grad(h.float().square().sum() / 2, [*layer.adapters().values(), x])
    wanted = torch.autograd.grad(exact, leaves, h.double())
    for name, own, right in zip((*held, "x"), found, wanted, strict=True):
        assert own.dtype == (torch.bfloat16 if name == "x" else torch.float32)
        assert (own.double() - right).norm() <= (4e-3 if name == "x" else 1e-5) * right.norm(), name


def test_every_form_of_the_cpu_trains_beside_naive(monkeypatch):
    def ours():
        jobs = [job for job in learn.equal_jobs(learn.Settings(CPU, None, 1, 1, TINY, 1, True)) if job.owner == "ours"]
        return [(job.kind, job.backend, job.form) for job in jobs if job.dtype == "fp32"]

    built = learn.here(CPU)._replace(reasons={"native": None})
    monkeypatch.setattr(learn, "here", lambda device: built)
    three = ("kept", "composed", "effective")
    wanted = [("lora", "native", form) for form in three[1:]]
    assert ours() == wanted + [(kind, "native", form) for kind in ("seqlora", "hydra") for form in three]
    monkeypatch.setattr(learn, "here", lambda device: built._replace(reasons={"native": "not built"}))
    wanted = [("lora", "aten", "composed")]
    assert ours() == wanted + [(kind, "aten", form) for kind in ("seqlora", "hydra") for form in three[:2]]


def test_a_row_names_what_ran(base):
    model = learning.adapt(base, "hydra", "both", "aten", torch.float32, 0, "composed")
    assert learning.route(model, TINY) == ("aten", "composed")
    assert {layer.form for layer in hk.model.adapted_layers(model).values()} == {"composed"}
    model = learning.adapt(base, "hydra", "both", "auto", torch.bfloat16, 0)
    assert learning.route(model, TINY) == ("aten", "kept")


def test_the_search_takes_the_rate_of_the_best_validation_accuracy_and_of_ties_the_lowest():
    settings = learn.Settings(CPU, None, 2, 1, TINY, 1, True)
    rows = [
        row(
            experiment="search",
            position=job.position,
            method=f"ours_{job.kind}",
            rate=job.rate,
            validation=0.5,
            test=job.rate,
        )
        for job in learn.search_jobs(settings)
    ]
    rows[2]["validation"] = 0.6  # LoRA in the MLP at the third rate; the test accuracies would choose the last
    rows.reverse()  # the order of the rows decides nothing
    chosen = {(job.position, job.kind): job.rate for job in learn.claim_jobs(rows, settings)}
    assert chosen.pop(("mlp", "lora")) == learn.RATES[2]
    assert set(chosen.values()) == {learn.RATES[0]}
    assert {job.seed for job in learn.claim_jobs(rows, settings)}.isdisjoint(
        job.seed for job in learn.search_jobs(settings)
    )


def row(**given) -> LearnRow:
    filled = LearnRow(
        experiment="claim",
        data="digits",
        position="mlp",
        method="ours_hydra",
        backend=None,
        form=None,
        trainable=10,
        head=5,
        dtype="fp32",
        rate=1e-3,
        seed=0,
        images=100,
        tested=700,
        losses=[],
        validation=0.5,
        test=0.5,
        dry=False,
    )
    return LearnRow(**{**filled, **given})


def test_the_sign_flip_test_is_exact():
    assert render_learn.sign_flip_p([0.0, 0.0]) == 1.0
    assert render_learn.sign_flip_p([1.0] * 10) == 2 / 1024
    assert render_learn.sign_flip_p([3.0, 1.0, -2.0]) == 6 / 8  # |sum| >= 2: all but +-(3 - 1 - 2)


def test_the_verdict_says_where_hydra_loses():
    rows = []
    for position in learning.POSITIONS:
        for seed in range(10):
            rows.append(row(position=position, seed=seed, test=0.8))
            rows.append(row(position=position, seed=seed, test=0.7, method="ours_lora"))
            rows.append(
                row(position=position, seed=seed, test=0.9 if position == "mlp" else 0.8, method="ours_seqlora")
            )
    sentence = render_learn.claim_sentence(rows)
    assert "Hydra wins against LoRA in MLP, LoRA in attention, LoRA in both" in sentence
    assert "loses to SeqLoRA in MLP;" in sentence
    assert "cannot be told from SeqLoRA in attention, SeqLoRA in both" in sentence
    assert "| MLP | SeqLoRA | 10 | 0.001 | 90.00 ± 0.00 | -10.00 ± 0.00 | 0.002 |" in render_learn.claim_table(rows)


def test_the_equal_table_holds_each_distance_beside_its_own():
    rows = []
    for kind in ("lora", "seqlora", "hydra"):
        for seed in range(3):
            for owner, loss, test in (
                ("naive", 1.0 + seed, 0.8),
                ("again", 1.001 + seed, 0.81),
                ("ours", 1.01 + seed, 0.79),
            ):
                rows.append(row(experiment="equal", method=f"{owner}_{kind}", seed=seed, losses=[loss] * 4, test=test))
    table = render_learn.equal_table(rows)
    assert "| LoRA | 80.00 ± 0.00 | 79.00 ± 0.00 | -1.00 ± 0.00 | 1.00 | 1.0e-02 | 1.0e-03 | 1.0e+00 |" in table


@pytest.mark.parametrize("module", [learn, rounding, subspaces], ids=lambda m: m.__name__.rpartition(".")[2])
def test_a_dry_run_stores_a_result_that_reads_back_and_renders(module, tmp_path, capsys):
    assert module.main(["--dry-run", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    schema = {learn: LearnRow, rounding: rounding.RoundingRow, subspaces: subspaces.SubspaceRow}[module]
    environment, rows = timing.read_result(path, schema)
    assert all(r["dry"] for r in rows)
    chart = {learn: render_learn.learn_chart, rounding: rounding.rounding_chart, subspaces: subspaces.subspace_chart}
    assert chart[module](environment, rows) == chart[module](environment, json.loads(json.dumps(rows)))
    assert "Stored in" in capsys.readouterr().out


def test_the_share_of_the_signal_is_one_where_nothing_is_rounded():
    operands = {name: t.double() for name, t in rounding.draw({"M": 16, "K": 12, "N": 20}, 0).items()}
    for ratio in (1e-4, 1e-1):
        assert rounding.kept(operands, "reference", ratio, CPU) == pytest.approx(1.0, rel=1e-6)


def test_a_naive_bf16_layer_loses_small_updates():
    shares = [rounding.kept(rounding.draw({"M": 64, "K": 64, "N": 64}, s), "reference", 1e-3, CPU) for s in range(3)]
    assert max(shares) < 0.7
    assert rounding.kept(rounding.draw({"M": 64, "K": 64, "N": 64}, 0), "reference", 1e-1, CPU) == pytest.approx(
        1, abs=0.02
    )


def test_cka_knows_rotations_from_noise():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(400, 6, generator=g)
    turned = 3 * X @ torch.linalg.qr(torch.randn(6, 6, generator=g)).Q + 5
    assert subspaces.cka(X, turned) == pytest.approx(1, abs=1e-6)
    assert subspaces.cka(X, torch.randn(400, 6, generator=g)) < 0.1


def test_branch_outputs_are_those_of_the_layers(base):
    model = learning.adapt(base, "hydra", "mlp", "auto", torch.float32, 0)
    with torch.no_grad():
        for layer in hk.model.adapted_layers(model).values():
            layer.A_up.normal_()
            layer.B_up.normal_()
    pixels = torch.randn(3, 3, 32, 32)
    [(name, outputs)] = subspaces.branch_outputs(model, pixels).items()
    seen = {}
    model.get_submodule(name).register_forward_hook(lambda _, inputs, h: seen.update(h=h[:, 0]))
    with torch.no_grad():
        learning.logits_of(model, pixels)
    torch.testing.assert_close(sum(outputs.values()), seen["h"], rtol=1e-5, atol=1e-5)
    assert math.isfinite(outputs["parallel"].norm())
