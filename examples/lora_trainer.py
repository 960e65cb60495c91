"""Fine-tunes a language model with PEFT's LoRA, without and with one line more: ``python examples/lora_trainer.py``

Which of six desks should answer a customer's message? A causal model learns to write the desk's name after it, under
TRL's SFTTrainer where TRL is installed, else under transformers' Trainer. No pretrained model comes with this example:
a small Llama that first learns the messages word by word stands in for one. ``--base FOLDER`` takes yours.

Three runs from the same start: LoRA as PEFT runs it; the same script with the line ``accelerate(model)``; Hydra with
the settings of the LoRA, exported as a LoRA. Checked, with exit status 1 where it is not so: the accelerated model and
PEFT's give the same answers, PEFT loads what was saved and exported, and merging keeps the answers.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    RobertaTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
    set_seed,
)

import hydra_kernels as hk
from hydra_kernels.peft import HydraConfig, accelerate, undo

TRL = importlib.util.find_spec("trl") is not None
Rows = list[dict[str, str]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a local Hugging Face folder: Llama, Qwen, ... with its tokenizer")
    messages = Path(__file__).parent / "data" / "requests.csv"
    parser.add_argument("--data", type=Path, default=messages, help="a CSV file with the columns text and label")
    parser.add_argument("--out", type=Path, default=Path("out/lora_trainer"), help="for all files, the stand-in's too")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the frozen base")
    parser.add_argument("--four-bits", action="store_true", help="QLoRA: the base in bitsandbytes' NF4")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.05, help="lora_dropout")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep activations instead of making them again")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny stand-in and two steps of each: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.out = args.out / "quick"
    return args


def read(path: Path) -> Rows:
    """Messages and the answers that the model is to give, in a fixed random order."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{"prompt": f"{row['text']} ->", "completion": f" {row['label']}"} for row in csv.DictReader(file)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [rows[i] for i in order]


def encode(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """What the Trainer takes: the loss counts the answer alone, and the end after it."""
    encoded = []
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = prompt + answer
        encoded.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer})
    return encoded


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def make_trainer(
    model: torch.nn.Module, rows: Rows, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, **settings: Any
) -> Trainer:
    common = {"output_dir": str(args.out / "training"), "seed": args.seed, "report_to": "none", "save_strategy": "no"}
    common |= {"logging_steps": 1, "lr_scheduler_type": "cosine", "per_device_train_batch_size": args.batch_size}
    common |= {"dataloader_pin_memory": torch.cuda.is_available(), "disable_tqdm": True}
    if TRL:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        settings = {"bf16": False, "activation_checkpointing": False} | settings  # SFTConfig's own are True
        data = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
        trainer = SFTTrainer(model, SFTConfig(**common, **settings), **data)
    else:
        data = {"train_dataset": encode(rows, tokenizer), "data_collator": DataCollatorForSeq2Seq(tokenizer)}
        trainer = Trainer(model, TrainingArguments(**common, **settings), **data)
    trainer.remove_callback(PrinterCallback)  # the losses go into the plot
    return trainer


def train_stand_in(folder: Path, rows: Rows, args: argparse.Namespace) -> None:
    """Puts a small Llama that has learned to go on with the messages, and its tokenizer, into folder."""
    set_seed(args.seed)
    tokenizer = RobertaTokenizer(model_max_length=64)
    texts = [row["prompt"] for row in rows]
    tokenizer = tokenizer.train_new_from_iterator(
        [*texts, *(row["completion"] for row in rows)], 600, show_progress=False
    )
    sizes = (64, 128, 1) if args.quick else (768, 2048, 3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        num_hidden_layers=sizes[2],
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    steps = {"max_steps": 2} if args.quick else {"num_train_epochs": 2}
    plain = [{"prompt": "", "completion": text} for text in texts]
    make_trainer(model, plain, tokenizer, args, learning_rate=5e-4, warmup_steps=0.1, **steps).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_base(folder: Path, args: argparse.Namespace, four_bits: bool = False) -> PreTrainedModel:
    dtype, options = getattr(torch, args.dtype), {}
    if four_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **options)
    if not four_bits:
        return model
    for module in model.modules():
        # Else, on a CPU with AVX512-BF16, bitsandbytes 0.50 repacks weights in evaluation, and then PEFT's own LoRA
        # trains without the gradients of x, in silence. Ours does not mind.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # all other weights in float32


def make_model(method: str, base: Path, args: argparse.Namespace) -> torch.nn.Module:
    """The base with adapters at their start. The script of a LoRA user, with one line more where it is accelerated."""
    set_seed(args.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=args.r, lora_alpha=args.alpha, lora_dropout=args.dropout, target_modules="all-linear"
    )
    if method == "Hydra":
        config = HydraConfig.from_lora_config(config, r_b=args.r)
    model = get_peft_model(make_base(base, args, args.four_bits), config)
    if method == "LoRA, accelerated":
        accelerate(model)  # the one line
    return model


def train(model: torch.nn.Module, rows: Rows, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> Any:
    """The losses of all steps, and their seconds."""
    clock = Clock()
    settings: dict[str, Any] = {"learning_rate": args.lr, "warmup_steps": 0.1, "num_train_epochs": args.epochs}
    if args.quick:
        settings |= {"max_steps": 2}
    if not args.no_checkpointing:
        settings |= {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = make_trainer(model, rows, tokenizer, args, **settings)
    trainer.add_callback(clock)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], clock.seconds


def answers(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits after each message."""
    with torch.no_grad():
        return model.eval()(**batch.to(model.device)).logits[:, -1].float()


def share_right(logits: Tensor, desks: list[int]) -> float:
    return (logits.argmax(-1).cpu() == torch.tensor(desks)).float().mean().item()


def same(what: str, ours: Tensor, theirs: Tensor, args: argparse.Namespace) -> bool:
    """Whether two models give the same logits up to the rounding of the base's dtype."""
    difference = ((ours - theirs).norm() / theirs.norm()).item()
    passed = difference <= (2e-2 if args.dtype == "bfloat16" else 1e-4)
    print(f"{what}: logits differ by {difference:.1e} of their norm: {'the same' if passed else 'NOT THE SAME'}")
    return passed


def merged(model: Any, base: Path, args: argparse.Namespace) -> PreTrainedModel:
    """A plain model. PEFT itself would round what it merges to 4 bits again, which loses most of an adapter."""
    if not args.four_bits:
        return model.merge_and_unload()
    plain = make_base(base, args)
    plain.load_state_dict(dict(hk.merged_tensors(model)))
    return plain


def main() -> int:
    args = arguments()
    matplotlib.use("Agg")  # files only
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = read(args.data)
    train_rows, test_rows = rows[: len(rows) * 4 // 5], rows[len(rows) * 4 // 5 :]
    base = args.base or args.out / "base"
    if not (base / "config.json").is_file():
        train_stand_in(base, train_rows, args)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    tokenizer.padding_side = "left"  # the last position is the one after the message
    batch = tokenizer([row["prompt"] for row in test_rows], return_tensors="pt", padding=True, add_special_tokens=False)
    desks = [next(token for token in row["labels"] if token >= 0) for row in encode(test_rows, tokenizer)]

    table = Table("run", "loss", "right answers", "s/step", "over PEFT")
    figure, axes = plt.subplots(layout="constrained")
    passed, models, seconds = True, {}, {}
    for method in ("LoRA of PEFT", "LoRA, accelerated", "Hydra"):
        model = models[method] = make_model(method, base, args)
        before = share_right(answers(model, batch), desks)
        losses, steps = train(model, train_rows, tokenizer, args)
        right = f"{before:.2f} to {share_right(answers(model, batch), desks):.2f}"
        seconds[method] = statistics.median(steps)
        ends = " to ".join(f"{statistics.mean(part):.2f}" for part in (losses[:5], losses[-5:]))
        ratio = seconds[method] / seconds["LoRA of PEFT"]
        table.add_row(method, ends, right, f"{seconds[method]:.3f}", f"{ratio:.2f}")
        axes.plot(range(1, len(losses) + 1), losses, label=f"{method}: {seconds[method]:.2f} s/step")

    lora, hydra = models["LoRA, accelerated"], models["Hydra"]
    ours, folder = answers(lora, batch), args.out / "lora"
    lora.save_pretrained(folder)
    undo(lora)
    passed &= same("accelerated, and as PEFT runs it", ours, answers(lora, batch), args)
    loaded = PeftModel.from_pretrained(make_base(base, args, args.four_bits), folder)
    passed &= same(f"{folder}, loaded by PEFT", ours, answers(loaded, batch), args)
    passed &= same("merged", ours, answers(merged(loaded, base, args), batch), args)

    ours, folder = answers(hydra, batch), args.out / "hydra-as-lora"
    hk.convert.to_lora(hydra, folder)
    loaded = PeftModel.from_pretrained(make_base(base, args, args.four_bits), folder)
    passed &= same(f"{folder}, the Hydra as a LoRA, loaded by PEFT", ours, answers(loaded, batch), args)
    passed &= same("merged", ours, answers(merged(loaded, base, args), batch), args)

    print("under TRL's SFTTrainer" if TRL else "under transformers' Trainer")
    Console().print(table)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(args.out / "loss.png", dpi=150)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
