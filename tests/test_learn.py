"""The learning benchmarks: fair runs, honest statistics, and what the paper's measures say of things that are known."""

import json
import statistics
from pathlib import Path

import pytest
import torch

import hydra_kernels as hk
from benchmarks import learn, rounding, subspaces
from benchmarks.learning import significance, training
from benchmarks.learning.training import TINY
from benchmarks.measuring import images, timing
from benchmarks.measuring.rows import LearnRow, RoundingRow, SubspaceRow
from benchmarks.rendering import learn as render_learn
from benchmarks.rendering import pictures, tables
from benchmarks.rendering import rounding as render_rounding
from benchmarks.rendering import subspaces as render_subspaces
from benchmarks.rendering.learn_chart import learn_chart
from benchmarks.rendering.tables import Stored
from hydra_kernels import extension

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return images.digits()


@pytest.fixture(scope="module")
def base(digits):
    return training.backbone(digits, TINY, 0, CPU)


def seeds_used():
    """Of the published runs: the final ones and those of the search."""
    settings = learn.Settings(CPU, None, 10, 5, training.Scale(), 1, False)
    return sorted({job.seed for jobs in (learn.equal_jobs, learn.search_jobs) for job in jobs(settings)})


def test_no_image_of_the_test_is_trained_on_or_searched_with_by_any_seed(digits):
    labels = digits.labels[digits.labels >= 5] - 5
    parts = {seed: training.indices(labels, 20, seed) for seed in seeds_used()}
    assert len(parts) == 15
    [fixed] = {tuple(part.test.tolist()) for part in parts.values()}
    assert labels[list(fixed)].bincount().tolist() == [n // 2 for n in labels.bincount().tolist()]
    for part in parts.values():
        assert [len(set(own.tolist())) for own in part] == [100, 100, len(fixed)]
        assert len(set(torch.cat(part).tolist())) == 200 + len(fixed)
        assert [labels[own].bincount().tolist() for own in part[:2]] == [[20] * 5] * 2
    assert len({tuple(part.train.tolist()) for part in parts.values()}) == 15


def test_a_split_holds_the_images_of_its_indices(digits):
    parts = training.split(digits, training.Scale(), 3, CPU)
    labels = digits.labels[digits.labels >= 5] - 5
    everything = training.subset(digits, 5, training.Scale().image_size, CPU)
    for (pixels, own), chosen in zip(
        (parts.train, parts.validation, parts.test), training.indices(labels, 20, 3), strict=True
    ):
        assert torch.equal(own, labels[chosen])
        assert torch.equal(pixels, everything[0][chosen])


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match=r"shots: class 0 has 4 examples beside the test's, expected 6"):
        training.indices(torch.arange(5).repeat(8), 3, 0)


def test_batches_show_every_image_once_an_epoch():
    data = torch.zeros(23, 1), torch.zeros(23)
    made = training.batches(data, 5, 9, torch.Generator().manual_seed(0))
    assert [len(index) for index in made] == [5] * 9
    assert all(len(set(torch.cat(made[start : start + 4]).tolist())) == 20 for start in (0, 4))


@pytest.mark.parametrize("kind", ["lora", "seqlora", "hydra"])
def test_methods_start_from_equal_weights_and_adapt_what_they_should(base, kind):
    naive, ours = (training.adapt(base, kind, "both", b, torch.float32, 5) for b in ("reference", "auto"))
    assert {n: p.tolist() for n, p in naive.named_parameters()} == {n: p.tolist() for n, p in ours.named_parameters()}
    adapted = set(hk.model.adapted_layers(ours))
    assert adapted == {"vit.layers.0.mlp.fc2", "vit.layers.0.attention.o_proj"}
    trainable = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert all(n.startswith(("classifier", *adapted)) for n in trainable)
    pixels = torch.randn(2, 3, TINY.image_size, TINY.image_size)
    frozen = base.vit(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(ours.vit(pixel_values=pixels).last_hidden_state, frozen, rtol=0, atol=0)


def test_parameter_counts_are_equal_within_a_tenth():
    for target, (K, N) in {"mlp.fc2": (384, 96), "attention.o_proj": (96, 96)}.items():
        counts = [r.r_a * (K + N) + r.r_b * 2 * N for r in training.RANKS[target].values()]
        assert max(counts) <= 1.1 * min(counts)


def test_a_run_learns_and_repeats_bit_for_bit(digits, base):
    scale = training.Scale(hidden_size=16, layers=1, shots=4, batch=10, steps=150)
    data = training.split(digits, scale, 0, CPU)

    def run(**options):
        return training.fine_tune(
            training.adapt(base, "hydra", "both", "auto", torch.float32, 0), data, scale, 3e-2, 0, **options
        )

    first, again, reordered = run(), run(), run(reordered=True)
    assert first.losses == again.losses
    assert first.losses != reordered.losses
    assert first.losses[:20] == pytest.approx(reordered.losses[:20], rel=1e-4)  # later they drift apart
    assert sum(first.losses[-5:]) < 0.8 * sum(first.losses[:5])
    assert first.head == 16 * 5 + 5
    model, (pixels, labels) = first.model.eval(), data.test
    with torch.no_grad():
        right = (training.logits_of(model, pixels).argmax(1) == labels).float().mean().item()
    assert first.test == pytest.approx(right)


def test_low_precision_backbones_keep_fp32_adapters_and_heads(base):
    model = training.adapt(base, "hydra", "mlp", "auto", torch.bfloat16, 0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_rounded_once_is_the_exact_sum_rounded_and_trains(base):
    model = training.adapt(base, "hydra", "mlp", "reference", torch.bfloat16, 0)
    [layer] = hk.model.adapted_layers(model).values()
    training.round_once(model)
    [once] = [module for module in model.modules() if isinstance(module, training.RoundedOnce)]
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
    model = training.adapt(base, "hydra", "both", "aten", torch.float32, 0, "composed")
    assert training.route(model, TINY.rows) == ("aten", "composed")
    assert {layer.form for layer in hk.model.adapted_layers(model).values()} == {"composed"}
    model = training.adapt(base, "hydra", "both", "auto", torch.bfloat16, 0)
    native = extension.load()
    backend = "native" if native is not None and (native.matrix_units() or native.widened(fp16=False)) else "aten"
    assert training.route(model, TINY.rows) == (backend, "kept")


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


def test_the_sign_flip_tests_are_exact():
    assert significance.sign_flip_p([0.0, 0.0]) == 1.0
    assert significance.sign_flip_p([1.0] * 10) == 2 / 1024
    assert significance.sign_flip_p([3.0, 1.0, -2.0]) == 6 / 8  # |sum| >= 2: all but +-(3 - 1 - 2)
    assert significance.further_p([0.0, 0.0]) == 1.0
    assert significance.further_p([1.0] * 10) == 1 / 1024
    assert significance.further_p([-1.0] * 10) == 1.0
    assert significance.further_p([3.0, 1.0, -2.0]) == 3 / 8  # 6, 4 and 2 itself
    assert significance.further_p([0.1, 0.2, -0.3]) == 5 / 8  # 0 is reached by rounding alone, twice; 0.2, 0.4, 0.6


def test_holms_correction_is_his():
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.6, 0.9]) == [1.0, 1.0]


def test_distances_of_zero_have_a_ratio():
    assert render_learn.ratios([0.0, 0.0, 1e-3, 2e-3], [0.0, 1e-3, 0.0, 1e-3]) == pytest.approx([1.0, 1e-6, 1e6, 2.0])


def test_a_mean_that_rounds_to_zero_has_no_sign():
    assert render_learn.mean_and_spread([-1e-5, 0.0], 2) == "0.00 ± 0.00"


def claims(seeds, tests):
    """Final runs of equal seeds; ``tests``: (position, kind) -> test accuracy, 0.8 where it says nothing."""
    return [
        row(position=position, method=f"ours_{kind}", seed=seed, test=tests.get((position, kind), 0.8))
        for position in training.POSITIONS
        for kind in learn.KINDS
        for seed in range(seeds)
    ]


def test_the_verdict_says_where_hydra_loses():
    rows = claims(10, {("mlp", "seqlora"): 0.9, **{(place, "lora"): 0.7 for place in training.POSITIONS}})
    sentence = render_learn.claim_sentence(rows)
    assert "Hydra wins against LoRA in MLP, LoRA in attention, LoRA in both" in sentence
    assert "loses to SeqLoRA in MLP;" in sentence
    assert "cannot be told from SeqLoRA in attention, SeqLoRA in both" in sentence
    line = "| MLP | SeqLoRA | 10 | 0.001 | 90.0 ± 0.0 | -10.00 ± 0.00 | 0.00195 | 0.0117 |"
    assert line in render_learn.claim_table(rows)
    published = render_learn.claim_block([tables.Stored(None, None, rows)])
    assert (
        "- a small ViT (digits, 10 seeds): it wins 3 of 6 comparisons: it loses to SeqLoRA in MLP; it cannot be"
        in published
    )


def test_the_verdict_is_that_of_the_corrected_p():
    rows = claims(6, {("both", "lora"): 0.7})
    assert "| both | LoRA | 10 | 0.001 | 70.0 ± 0.0 | 10.00 ± 0.00 | 0.0312 | 0.188 |" in render_learn.claim_table(rows)
    assert render_learn.verdicts(rows).keys() == {"open"}


def test_the_search_is_published_with_its_errors_and_the_chosen_rates():
    rows = claims(2, {})
    for claim in rows[::2]:
        for rate, values in ((1e-3, (0.5, 0.7)), (1e-2, (0.4, 0.4))):
            given = {"position": claim["position"], "method": claim["method"], "rate": rate}
            rows += [row(experiment="search", validation=v, test=0.0, seed=i, **given) for i, v in enumerate(values)]
    table = render_learn.search_table(rows)
    assert "| adapters in | method | 0.001 | 0.01 |" in table
    assert table.count("| **60.0 ± 10.0** | 40.0 ± 0.0 |") == 9


def equal_rows(seeds):
    """naive - again is 0.001 in every loss, naive - kept 0.01 and 0.04 in the last seed, naive - composed 0."""
    rows = []
    for kind in learn.KINDS:
        for seed in range(seeds):
            last = seed == seeds - 1
            for owner, form, loss, test in (
                ("naive", None, 1.0, 0.8),
                ("again", None, 1.001, 0.81 if last else 0.8),
                ("ours", "kept", 1.04 if last else 1.01, 0.8 if last else 0.78),
                ("ours", "composed", 1.0, 0.8),
            ):
                given = {"method": f"{owner}_{kind}", "backend": form and "native", "form": form, "seed": seed}
                rows.append(row(experiment="equal", losses=[loss + seed] * 4, test=test + 0.02 * seed**2, **given))
    return rows


def test_the_equal_table_holds_each_distance_beside_its_own():
    table = render_learn.equal_table(equal_rows(3))
    # Accuracies of naive 80, 82 and 88: two seeds are 2 and 6 points apart.
    shared = "1.0e-03 | 1.0e+00"
    assert (
        f"| LoRA | native, kept | 1.0e-02 | {shared} | 10.00 | 40.00 | 0.125 | 83.3 ± 4.2 | 2.00 | 1.00 | 4.00 |"
        in table
    )
    assert (
        f"| Hydra | native, composed | 0.0e+00 | {shared} | 0.00 | 0.00 | 1.00 | 83.3 ± 4.2 | 0.00 | 1.00 | 4.00 |"
        in table
    )
    assert table.count("native, ") == 6


def test_the_equal_sentence_names_what_is_further():
    told = "(10.00 times in the median, p = 0.0156)"
    assert render_learn.equal_sentence(equal_rows(6)) == (
        f"At p < 0.05 the test finds further from naive than naive from itself: LoRA kept {told}, SeqLoRA kept {told}, "
        f"Hydra kept {told}. The largest distance of any run of ours from its naive one is 4.0e-02; the smallest of "
        "two seeds, 1.0e+00, is 25.0 times larger: the first is rounding."
    )
    assert "the test finds no form further. The largest" in render_learn.equal_sentence(equal_rows(3))


def test_the_bf16_table_sets_each_sum_beside_naive_and_fp32():
    rows = []
    for owner, dtype, loss, tests in (
        ("naive", "fp32", 1.0, (0.8, 0.8, 0.8)),
        ("naive", "bf16", 1.2, (0.8, 0.81, 0.82)),
        ("ours", "bf16", 1.1, (0.8, 0.81, 0.82)),
        ("once", "bf16", 1.05, (0.82, 0.82, 0.85)),
    ):
        for seed, test in enumerate(tests):
            ran = {"backend": "aten", "form": "kept"} if owner == "ours" else {}
            given = {"experiment": "equal", "method": f"{owner}_hydra", "dtype": dtype, "losses": [loss] * 3}
            rows.append(row(seed=seed, test=test, **given, **ran))
    assert render_learn.bf16_table(rows).splitlines()[2:] == [
        "| naive, fp32 | 80.0 ± 0.0 | - | - | - | - | - |",
        "| naive, bf16 | 81.0 ± 1.0 | 2.0e-01 | - | - | - | - |",
        "| ours, bf16 (aten, kept) | 81.0 ± 1.0 | 1.0e-01 | 0.00 ± 0.00 | 1.00 | 0.50 | 0.250 |",
        "| rounded once, bf16 | 83.0 ± 1.7 | 5.0e-02 | 2.00 ± 1.00 | 0.250 | 0.25 | 0.250 |",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [learn, rounding, subspaces],
    ids=lambda m: m.__name__.rpartition(".")[2],
)
def test_a_dry_run_stores_a_result_that_reads_back_and_renders(module, tmp_path, capsys):
    assert module.main(["--dry-run", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    schema = {learn: LearnRow, rounding: RoundingRow, subspaces: SubspaceRow}[module]
    environment, rows = timing.read_result(path, schema)
    assert all(r["dry"] for r in rows)
    chart = {
        learn: learn_chart,
        rounding: render_rounding.rounding_chart,
        subspaces: render_subspaces.subspace_chart,
    }
    first, second = (Stored(path, environment, of) for of in (rows, json.loads(json.dumps(rows))))
    assert pictures.svg(chart[module], first) == pictures.svg(chart[module], second)
    assert "Stored in" in capsys.readouterr().out


def test_the_stored_search_chose_the_rate_of_the_subspaces():
    _, rows = timing.read_result(learn_result(), LearnRow)
    assert learn.best_rate(rows, "mlp", "hydra") == subspaces.RATE


def learn_result():
    return Path(learn.__file__).parent / "results" / "learn-cpu-digits.json"


def test_the_stored_runs_are_those_that_the_rules_ask_for():
    _, rows = timing.read_result(learn_result(), LearnRow)
    for position in training.POSITIONS:
        for kind in learn.KINDS:
            runs = render_learn.of(rows, experiment="claim", position=position, method=f"ours_{kind}")
            assert {r["rate"] for r in runs} == {learn.best_rate(rows, position, kind)}
            assert len(runs) >= 10
    equal = render_learn.of(rows, experiment="equal", dtype="fp32")
    assert len({(r["method"], r["form"]) for r in equal if r["form"]}) == 8
    # What docs/learning.md says beside the table: the forms that auto takes, SeqLoRA's loss at
    # the end, and that bf16's sums cannot be told apart.
    auto = {(r["method"], r["form"]) for r in rows if r["experiment"] == "claim"}
    assert auto == {("ours_lora", "composed"), ("ours_seqlora", "kept"), ("ours_hydra", "kept")}
    ends = [
        statistics.median(r["losses"][-1] for r in render_learn.of(equal, method=f"naive_{kind}"))
        for kind in ("seqlora", "lora", "hydra")
    ]
    assert ends[0] > max(ends[1:])
    last = render_learn.bf16_table(rows).splitlines()[-1].split(" | ")
    assert min(float(last[4]), float(last[6].rstrip(" |"))) >= render_learn.SIGNIFICANT
    page = (Path(learn.__file__).parent.parent / "docs" / "results.md").read_text(encoding="utf-8")
    [line] = [line for line in page.splitlines() if line.startswith("- a small ViT (digits, ")]
    for c in render_learn.comparisons(rows):
        where = f"{tables.KINDS[c.kind]} in {render_learn.PLACES[c.position]}"
        lost_or_open = line.partition("it wins against")[0]
        assert (where in lost_or_open) == (c.verdict != "won"), where
