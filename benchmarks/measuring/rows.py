"""What one row of each stored result holds. Times are in seconds and memory in bytes unless a name says otherwise."""

from __future__ import annotations

from typing import Any, TypedDict

from hydra_kernels.choose.tune import Tuned


class Table4Row(TypedDict):
    """One method of Table 4. Every ratio is to naive LoRA; ``None`` where a method has no such figure."""

    model: str
    weights: str
    # Images or sequences of a step, in how many micro-batches, and whether activations were recomputed.
    batch: int
    accumulation: int
    checkpointing: bool
    # Pixels of a side, or tokens of a sequence.
    image_size: int | None
    sequence: int | None
    data: str
    dtype: str
    mode: str
    method: str
    # [r_a, r_b]
    ranks: list[int] | None
    # What holds the frozen weights of the adapted layers: "none" for themselves, or a quantisation of `bases`.
    base: str
    # PEFT's, of its LoRA, accelerated or not; the other methods of a run drop nothing.
    lora_dropout: float
    # Trainable parameters without the head's, and the head's.
    trainable: int
    head: int
    # Seconds for 50,000 images or sequences; quartiles of the steps, scaled likewise. Projected: not a whole epoch of
    # the paper's run.
    sec_per_epoch: float
    q1: float
    q3: float
    projected: bool
    paper_sec_per_epoch: float | None
    # Counted steps, and the seconds of each.
    steps: int
    step_seconds: list[float]
    # Of one token without gradients, each sample; None where it was not measured.
    token_seconds: list[float] | None
    # Median and quartiles over the paired steps.
    ratio: float | None
    ratio_q1: float | None
    ratio_q3: float | None
    paper_ratio: float | None
    # Parameters and the optimizer's state, what is kept for the backward, and the first with the step's peak above it.
    held_bytes: int | None
    saved_bytes: int | None
    peak_bytes: int
    # Ours against naive: the largest differences of all steps, with lora_dropout of one that dropped nothing, and what
    # was allowed.
    parity: dict[str, Any] | None
    dry: bool


class LayerRow(TypedDict):
    """One phase of one method on one layer, or why the method could not run (``unavailable``; its figures are None)."""

    # x is [M, K], the weight [N, K].
    M: int
    K: int
    N: int
    # The method's own ranks, 0 and 0 for the frozen layer, and those of the Hydra layer that it is measured beside.
    r_a: int
    r_b: int
    hydra: list[int]
    # "cpu" or "cuda"; the environment has its name.
    device: str
    # Equal to that Hydra layer's in "rank" (r_a + r_b), in "parameters" (the nearest), in "both"; None: frozen.
    pair: str | None
    dtype: str
    mode: str
    # "forward", "backward" or "step".
    phase: str
    method: str
    # Of ours, what ran; the form is followed by "sweep" where the backward was `native`'s one sweep.
    backend: str | None
    form: str | None
    # Microseconds of one call over the rounds, each the mean of ``calls`` calls.
    median_us: float | None
    q1_us: float | None
    q3_us: float | None
    # On a GPU, the least that a composed step can take at the measured ceilings (benchmarks.roofline).
    floor_us: float | None
    runs: int
    calls: int
    # lora_dropout of PEFT's LoRA and of ours; the other methods of a run drop nothing.
    dropout: float
    # Whether the frozen layer has b0.
    bias: bool
    trainable: int
    # [q1, median, q3] of the paired rounds over other methods, "@parameters": over the one of equal parameters.
    over: dict[str, list[float]]
    # Of a step: kept for the backward, and the peak above what was there before it.
    saved_bytes: int | None
    peak_bytes: int | None
    # The largest difference from the naive layer, nothing dropped, and what was allowed.
    parity: dict[str, Any] | None
    unavailable: str | None
    dry: bool


class SweepRow(TypedDict):
    """A step of our Hydra in both forms at one shape, x [M, K], weight [N, K]."""

    M: int
    K: int
    N: int
    r_a: int
    r_b: int
    device: str
    dtype: str
    mode: str
    backend: str
    # Medians of a call, in microseconds.
    composed_us: float
    kept_us: float
    # Composed over kept in paired rounds: [q1, median, q3].
    over: list[float]
    runs: int
    # The form that the package chooses here.
    chosen: str
    dry: bool


class CandidateRow(TypedDict):
    """One phase of one way to run a step at one shape, x [M, K], weight [N, K], and what was predicted of it."""

    M: int
    K: int
    N: int
    r_a: int
    r_b: int
    # What the ways are compared for; a way is named as in `benchmarks.roofline`.
    question: str
    way: str
    # The way that runs today.
    instead_of: str
    dtype: str
    # Whether the frozen layer has b0.
    bias: bool
    # "forward", "backward" or "step".
    phase: str
    # Microseconds of a call over the rounds, each the mean of ``calls`` calls.
    median_us: float
    q1_us: float
    q3_us: float
    # [q1, median, q3] of the paired rounds over the frozen layer and over ``instead_of``.
    over: dict[str, list[float]]
    # Of a step.
    predicted_us: float | None
    predicted_over: dict[str, float] | None
    # The largest difference from the naive layer, and what was allowed; None: frozen.
    parity: dict[str, Any] | None
    runs: int
    calls: int
    dry: bool


class CeilingRow(TypedDict):
    """What the device reaches in one large operation."""

    # "copy" or "product"; of products "tf32" is fp32 data.
    what: str
    dtype: str
    # Over the median time of a call, and over the third and the first quartile of the times.
    value: float
    q1: float
    q3: float
    # "GB/s", of bytes read and written, or "TFLOP/s".
    unit: str
    # Of one call.
    bytes_or_operations: int
    runs: int
    dry: bool


class StageRow(TypedDict):
    """One stage of a run on a GPU (benchmarks.gpu)."""

    stage: str
    # "ok", "skipped", or "FAILED" and why.
    status: str
    # What it took in all, and what it could have taken.
    seconds: float
    limit: float
    # Kernels and rivals that were to be compiled before its clock started, that were, and how long that took.
    planned: int
    compiled: int
    compile_seconds: float
    # Names of the kernels that Triton compiled afterwards.
    late: list[str]
    dry: bool


# One shape, its winner, medians of a step, and what failed there.
TuneRow = TypedDict("TuneRow", {**Tuned.__annotations__, "dry": bool})


class HostRow(TypedDict):
    """Host time of an eager step (forward and backward) of one method, x [M, K], weight [N, K]."""

    M: int
    K: int
    N: int
    r_a: int
    r_b: int
    dtype: str
    device: str
    method: str
    # Of ours.
    backend: str | None
    # Microseconds of a step over the rounds, each the mean of ``calls`` steps.
    host_us: float
    q1_us: float
    q3_us: float
    # [q1, median, q3] of the paired rounds over other methods.
    over: dict[str, list[float]]
    runs: int
    calls: int
    dry: bool


class LearnRow(TypedDict):
    """One fine-tuning run: classes learned from a few images (or definitions) each, by adapters and a new head."""

    # equal: naive beside ours from equal seeds; search: of the learning rate; claim: at the rate that the search chose.
    experiment: str
    data: str
    # "mlp", "attention" or "both", "none" of a head alone; naive, again (naive, each batch in another order), ours, or
    # once (plain torch, the sum rounded once), then the kind.
    position: str
    method: str
    # Of ours, what ran.
    backend: str | None
    form: str | None
    trainable: int
    head: int
    dtype: str
    rate: float
    seed: int
    # Images or texts to train on, and of the test.
    images: int
    tested: int
    # Of every step; not kept of a search, nor of the claim on digits.
    losses: list[float]
    # Shares of right answers. A search does not look at the test (that on digits did, and nobody reads it).
    validation: float
    test: float | None
    dry: bool


class RoundingRow(TypedDict):
    """One backend at one size of the update: median and quartiles over seeds of the share of the signal kept."""

    backend: str
    dtype: str
    # Whether the layer has a bias b0.
    bias: bool
    # |delta| / |y0|
    ratio: float
    kept: float
    q1: float
    q3: float
    interpreted: bool
    M: int
    K: int
    N: int
    r_a: int
    r_b: int
    dry: bool


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


class RooflineRow(TypedDict):
    """A predicted step. ``kernels``: [name, bytes, operations, microseconds] of each launch."""

    M: int
    K: int
    N: int
    r_a: int
    r_b: int
    dtype: str
    method: str
    tflops: float
    gigabytes_per_second: float
    l2_megabytes: float
    launch_us: float
    gemm_efficiency: float
    bytes: int
    operations: int
    launches: int
    predicted_us: float
    over_frozen: float
    kernels: list[list[Any]]
