"""What a run of Table 4 is told: its command line, as settings that are checked, and the name of its file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measuring import bases, methods, models, modes
from benchmarks.measuring.bases import QUANTISED_RANKS
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.models import Model, Size

# Images of CIFAR-10's epoch; as many sequences of a model of text.
EPOCH = 50_000
DEFAULT_MODEL = "vit-b/32"
# fp32 is multiplied in full, tf32 is fp32 multiplied as a GPU does with that setting.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
# A PEFT script, and what proves it: the naive method, and in bf16 PEFT under autocast, which is as exact as ours.
PEFT_METHODS = {
    "fp32": ("naive_lora", "peft_lora", "accelerated_lora"),
    "bf16": ("naive_lora", "peft_lora", "autocast_lora", "accelerated_lora"),
}
# Over a quantised base: QLoRA of PEFT's, the same accelerated, and Hydra.
QUANTISED_METHODS = {
    "fp32": ("naive_lora", "naive_hydra", "ours_hydra", "peft_lora", "accelerated_lora"),
    "bf16": ("naive_lora", "naive_hydra", "ours_hydra", "peft_lora", "autocast_lora", "accelerated_lora"),
}
PEFT_RANKS = {"lora": Ranks(16, 0)}


@dataclass(frozen=True)
class Settings:
    model: Model
    size: Size
    device: torch.device
    dtype: str
    mode: str
    batch_size: int
    # Micro-batches of a step, and whether activations are recomputed in the backward instead of kept.
    accumulation: int
    checkpointing: bool
    # What the frozen weights of the adapted layers are quantised to.
    base: str
    # PEFT's, of its LoRA, accelerated or not.
    lora_dropout: float
    steps: int
    methods: tuple[str, ...]
    ranks: Mapping[str, Ranks]
    data: Path | None
    checkpoint: Path | None
    seed: int
    full: bool
    dry: bool
    # Seconds after which no further round starts, None for no limit.
    time_limit: float | None

    def __post_init__(self) -> None:
        modes.check(self.mode, self.device, self.dry)
        if self.model.adapter_bias and not set(methods.OF_PEFT).isdisjoint(self.methods):
            raise ValueError("methods: PEFT's LoRA has no adapter biases, which the naive methods of this model train")
        if "autocast_lora" in self.methods and self.dtype != "bf16":
            raise ValueError(f"methods: autocast_lora is autocast to bf16, over a model of bf16; dtype is {self.dtype}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora-dropout is {self.lora_dropout:g}, expected at least 0 and less than 1")
        if self.lora_dropout and (self.mode != "eager" or "peft_lora" not in self.methods):
            raise ValueError("lora-dropout: it is PEFT's, so it needs peft_lora among the methods, and mode eager")
        if self.base != "none" and not {"full_tuning"}.isdisjoint(self.methods):
            raise ValueError(f"methods: full_tuning trains all weights, which base {self.base} has quantised")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation is {self.accumulation}, expected a divisor of the batch, {self.batch_size}")
        if self.mode != "eager" and self.full and EPOCH % self.batch_size:
            raise ValueError(
                f"batch-size is {self.batch_size}, which leaves the epoch a smaller last batch, but a model has one "
                f"batch size in mode {self.mode}: expected a divisor of {EPOCH:,}"
            )


def ranks_option(text: str | None, default: Mapping[str, Ranks]) -> dict[str, Ranks]:
    """``hydra=3+3,lora=4`` as ranks by kind; a kind that is not named keeps its default."""
    ranks = dict(default)
    for item in text.split(",") if text is not None else ():
        kind, _, widths = item.partition("=")
        parts = widths.split("+")
        if kind not in ranks or len(parts) != (2 if kind == "hydra" else 1) or not all(map(str.isdecimal, parts)):
            raise ValueError(f"ranks: {item!r}, expected hydra=A+B, lora=R or seqlora=R")
        first, last = int(parts[0]), int(parts[-1])
        if min(first, last) < 1:
            raise ValueError(f"ranks: {item!r}, expected ranks of 1 and more")
        ranks[kind] = Ranks(first if kind != "seqlora" else 0, last if kind != "lora" else 0)
    return ranks


def default_ranks(model: Model, names: Sequence[str]) -> Mapping[str, Ranks]:
    """The model's own; of a PEFT script, PEFT's."""
    if names in QUANTISED_METHODS.values():
        return {**model.ranks, **QUANTISED_RANKS}
    return {**model.ranks, **PEFT_RANKS} if names in PEFT_METHODS.values() else model.ranks


def methods_option(text: str) -> tuple[str, ...]:
    """Names with commas between, as a tuple in the table's order; ours come with the naive they are compared with."""
    names = text.split(",")
    for name in names:
        if name not in methods.MODEL_METHODS:
            raise ValueError(f"methods: {name!r}, expected some of {','.join(methods.MODEL_METHODS)}")
        if (partner := methods.naive_of(name)) and partner not in names:
            raise ValueError(f"methods: {name} needs {partner}, which every step of it is compared with")
    return tuple(name for name in methods.MODEL_METHODS if name in names)


def settings_of(arguments: Sequence[str] | None) -> tuple[Settings, Path]:
    """The command line as settings and the folder for the results; ValueError names a bad option."""
    about = "The paper's Table 4, of ViT-B/32 and of models of today: what a step costs."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table4", description=about)
    parser.add_argument(
        "--model",
        choices=models.MODELS,
        default=DEFAULT_MODEL,
        help="with random weights; on a CPU smaller, by its name",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the whole model")
    parser.add_argument("--mode", choices=modes.MODES, default="eager")
    parser.add_argument("--batch-size", type=int, help="images or sequences of a step; the model's own without it")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches that a step's batch is split into")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward")
    parser.add_argument("--steps", type=int, help="counted rounds: 50 on a GPU, 10 on a CPU")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--methods", default=",".join(methods.METHODS), help=f"also {', '.join(methods.OF_PEFT)}")
    parser.add_argument(
        "--base", choices=bases.BASES, default="none", help="quantise the frozen weights: nf4 or int8 of bitsandbytes"
    )
    chosen.add_argument("--peft", action="store_true", help="PEFT's LoRA 16, and the same accelerated")
    parser.add_argument("--lora-dropout", type=float, default=0.0, help=f"of {', '.join(methods.OF_PEFT)}")
    parser.add_argument("--ranks", help="hydra=A+B,lora=R,seqlora=R, or some of them; the model's own without it")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 as distributed; scikit-learn's digits without it")
    parser.add_argument("--checkpoint", type=Path, help="local folder of a ViT checkpoint; random weights without it")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="a whole epoch, 50,000 images, with every method")
    parser.add_argument(
        "--dry", action="store_true", help="a tiny model, to see that everything runs; publishes nothing"
    )
    parser.add_argument(
        "--time-limit", type=float, help="seconds after which no round starts: on a CPU 230 unless --full"
    )
    options = parser.parse_args(arguments)
    if options.full and options.steps is not None:
        raise ValueError(f"steps is {options.steps}, but --full sets them: a whole epoch")
    device = modes.device_option(options.device)
    on_cpu = device.type == "cpu"
    model = models.MODELS[options.model]
    size = model.size(device, options.dry)
    batch_size = options.batch_size if options.batch_size is not None else size.batch
    steps = options.steps if options.steps is not None else 10 if on_cpu else 50
    if options.peft and options.dtype not in PEFT_METHODS:
        raise ValueError(f"peft: expected one of {', '.join(PEFT_METHODS)} as dtype, got {options.dtype}")
    names = PEFT_METHODS[options.dtype] if options.peft else methods_option(options.methods)
    if options.base != "none":
        if model.adapter_bias or options.peft or options.methods != ",".join(methods.METHODS):
            raise ValueError(f"base: {options.base} has methods of its own, for models without adapter biases")
        if options.dtype not in QUANTISED_METHODS:
            raise ValueError(f"base: expected one of {', '.join(QUANTISED_METHODS)} as dtype, got {options.dtype}")
        names = QUANTISED_METHODS[options.dtype]
    for name, value in (("batch-size", batch_size), ("accumulation", options.accumulation), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected 1 or more")
    settings = Settings(
        model=model,
        size=size,
        device=device,
        dtype=options.dtype,
        mode=options.mode,
        batch_size=batch_size,
        accumulation=options.accumulation,
        checkpointing=options.checkpointing,
        steps=math.ceil(EPOCH / batch_size) if options.full else steps,
        base=options.base,
        lora_dropout=options.lora_dropout,
        methods=names,
        ranks=ranks_option(options.ranks, default_ranks(model, names)),
        data=options.data,
        checkpoint=options.checkpoint,
        seed=options.seed,
        full=options.full,
        dry=options.dry,
        time_limit=230.0 if options.time_limit is None and on_cpu and not options.full else options.time_limit,
    )
    return settings, options.out


def file_name(settings: Settings) -> str:
    """A file of its own for each model, device, dtype, mode and option; ViT-B/32 is not named, a PEFT script is."""
    option = next(option for option, model in models.MODELS.items() if model is settings.model)
    benchmark = "table4" if option == DEFAULT_MODEL else f"table4-{option.replace('/', '-')}"
    benchmark += f"-{settings.base}" if settings.base != "none" else ""
    benchmark += "-peft" if settings.methods in PEFT_METHODS.values() else ""
    name = modes.file_name(benchmark, settings.device, settings.dtype, settings.mode, settings.dry)
    options = f"-accumulation{settings.accumulation}" if settings.accumulation > 1 else ""
    options += "-checkpointing" if settings.checkpointing else ""
    options += "".join(
        f"-{kind}{'+'.join(str(rank) for rank in ranks if rank)}"
        for kind, ranks in settings.ranks.items()
        if ranks != default_ranks(settings.model, settings.methods)[kind]
    )
    options += f"-dropout{settings.lora_dropout:g}" if settings.lora_dropout else ""
    return name.replace(".json", f"{options}.json")
