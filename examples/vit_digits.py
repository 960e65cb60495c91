"""Fine-tunes a ViT with Hydra adapters in a plain PyTorch loop: ``python examples/vit_digits.py``

The images are scikit-learn's 1,797 scanned digits. No pretrained model comes with this example, so a small ViT stands
in for one: all of it learns the digits 0 to 4, is then frozen, and adapters and a new head learn the digits 5 to 9.
``--base FOLDER`` takes a local Hugging Face ViT instead; ``--method`` compares ways to fine-tune.

Checked, with exit status 1 where it is not so: the adapter file gives a fresh base the predictions of the trained
model, merging keeps them, and a training resumed in its middle ends with the bits of one that never stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, logging

import hydra_kernels as hk

HEAD = "classifier"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a local Hugging Face folder with a ViT")
    parser.add_argument("--out", type=Path, default=Path("out/vit_digits"), help="for all files, the stand-in's too")
    methods = ("hydra", "lora", "seqlora", "head", "full")
    parser.add_argument("--method", nargs="+", choices=methods, default=["hydra"], help="head and full: no adapters")
    parser.add_argument(
        "--targets", nargs="+", default=["mlp.fc1", "mlp.fc2"], help="ends of the names of layers to adapt"
    )
    parser.add_argument("--rank", type=int, default=8, help="hydra gives half of it to each branch")
    parser.add_argument("--dropout", type=float, default=0.1, help="on the adapters' bottleneck")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3, help="a third of it where the whole model trains")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="a checkpoint of the same options: go on from there")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU; the stand-in is too small for more")
    parser.add_argument("--quick", action="store_true", help="two epochs: does all of it run?")
    args = parser.parse_args()
    if args.resume and len(args.method) > 1:
        parser.error("--resume goes on with one method")
    if args.quick:
        args.epochs, args.out = 2, args.out / "quick"
    return args


def digits(classes: range, config: ViTConfig, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, channels, size, size] from -1 to 1 and labels from 0: to train on, then (every fourth) to test on."""
    data = load_digits()
    chosen = (data.target >= classes.start) & (data.target < classes.stop)
    grey = torch.from_numpy(data.images[chosen]).float()[:, None] / 8 - 1
    enlarged = F.interpolate(grey, size=(config.image_size, config.image_size), mode="bilinear")
    images = enlarged.expand(-1, config.num_channels, -1, -1).to(device)
    labels = torch.from_numpy(data.target[chosen]).long().to(device) - classes.start
    test = torch.arange(len(labels)) % 4 == 3
    return images[~test], labels[~test], images[test], labels[test]


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [n, classes] in evaluation mode; the model is left in the mode that it was in."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(pixel_values=batch).logits for batch in images.split(256)])
    model.train(training)
    return logits


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (predict(model, images).argmax(-1) == labels).float().mean().item()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Training:
    """A model, its optimizer and schedule, and how far they have come. ``state`` is all that a resumed run needs.

    The order of the images needs no state of its own: it follows from the seed and the number of the epoch.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace, name: str) -> None:
        self.model, self.images, self.labels, self.name = model.train(), images, labels, name
        self.batch_size, self.seed, self.losses = args.batch_size, args.seed, []
        self.epoch_steps = len(labels) // args.batch_size
        self.steps = args.epochs * self.epoch_steps
        lr = args.lr / 3 if name in ("full", "stand-in") else args.lr
        self.optimizer = torch.optim.AdamW(trainable(model).values(), lr=lr, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=lr, total_steps=self.steps)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, number = divmod(step, self.epoch_steps)
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(1000 * self.seed + epoch))
        chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
        return self.images[chosen], self.labels[chosen]

    def run(self, until: int) -> None:
        done = len(self.losses)
        for step in track(range(done, until), f"{self.name}, steps {done} to {until}"):
            images, labels = self.batch(step)
            loss = F.cross_entropy(self.model(pixel_values=images).logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.losses.append(loss.item())

    def state(self) -> dict[str, Any]:
        return {
            "parameters": {name: p.detach() for name, p in trainable(self.model).items()},  # not the frozen base
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generators": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],  # dropout draws from them
            "losses": self.losses,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in trainable(self.model).items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["generators"][0])
        torch.cuda.set_rng_state_all(state["generators"][1:])
        self.losses = list(state["losses"])


def train_stand_in(folder: Path, args: argparse.Namespace) -> None:
    """Puts a small ViT, all of which has learned the digits 0 to 4, into folder."""
    torch.manual_seed(args.seed)
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_channels=1,
        num_labels=5,
    )
    model = ViTForImageClassification(config).to(args.device)
    images, labels, test_images, test_labels = digits(range(5), config, args.device)
    training = Training(model, images, labels, args, "stand-in")
    training.run(training.steps)
    print(f"stand-in for a pretrained model: accuracy {accuracy(model, test_images, test_labels):.3f} on digits 0 to 4")
    model.save_pretrained(folder)


def make_model(base: Path, method: str, args: argparse.Namespace) -> nn.Module:
    """The base with a new head, and what the method trains."""
    torch.manual_seed(args.seed)
    model = ViTForImageClassification.from_pretrained(
        base, num_labels=5, ignore_mismatched_sizes=True, local_files_only=True
    )
    model.classifier.reset_parameters()
    if method == "head":
        model.vit.requires_grad_(False)
    elif method != "full":
        ranks = {"r_a": args.rank // 2, "r_b": args.rank - args.rank // 2} if method == "hydra" else {"r": args.rank}
        hk.inject(model, args.targets, method=method, dropout=args.dropout, **ranks)
        hk.mark_only_adapters_trainable(model, keep=[HEAD])
    return model.to(args.device)


def check_adapters(path: Path, fresh: nn.Module, trained: Tensor, images: Tensor) -> bool:
    """Whether the adapters in a file give a fresh base the trained model's logits, and a merged one its classes."""
    hk.load_adapters(fresh, path)
    loaded = predict(fresh, images)
    merged = predict(hk.merge_and_unload(fresh.eval()), images)
    difference = (merged - trained).abs().max().item()
    same_logits, same_classes = torch.equal(loaded, trained), torch.equal(merged.argmax(-1), trained.argmax(-1))
    print(f"{path}, {path.stat().st_size:,} bytes, into a fresh base: logits equal bit for bit: {same_logits}")
    print(f"merged: the same class for all {len(images)} test images: {same_classes}; logits within {difference:.1e}")
    return same_logits and same_classes and difference <= 1e-4 * trained.abs().max().item()


def same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return one == other


def main() -> int:
    args = arguments()
    matplotlib.use("Agg")  # files only
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base = args.base or args.out / "base"
    if not (base / "config.json").is_file():
        train_stand_in(base, args)
    config = ViTConfig.from_pretrained(base, local_files_only=True)
    images, labels, test_images, test_labels = digits(range(5, 10), config, args.device)
    table = Table("method", "trained parameters", "accuracy before", "and after", title="digits 5 to 9")
    figure, axes = plt.subplots(layout="constrained")
    passed = True
    for method in args.method:
        folder = args.out / method
        folder.mkdir(parents=True, exist_ok=True)
        training = Training(make_model(base, method, args), images, labels, args, method)
        before = accuracy(training.model, test_images, test_labels)
        middle = training.steps // 2 + 1  # within an epoch
        if args.resume:
            training.load_state(torch.load(args.resume, map_location="cpu"))
        else:
            training.run(middle)
            torch.save(training.state(), folder / "middle.pt")
        training.run(training.steps)
        torch.save(training.state(), folder / "last.pt")
        after = accuracy(training.model, test_images, test_labels)
        trained_parameters = sum(p.numel() for p in trainable(training.model).values())
        table.add_row(method, f"{trained_parameters:,}", f"{before:.3f}", f"{after:.3f}")
        axes.plot(range(1, args.epochs + 1), torch.tensor(training.losses).view(args.epochs, -1).mean(1), label=method)

        if not args.resume:
            resumed = Training(make_model(base, method, args), images, labels, args, method)
            resumed.load_state(torch.load(folder / "middle.pt", map_location="cpu"))
            resumed.run(resumed.steps)
            same = same_bits(resumed.state(), training.state())
            size = (folder / "middle.pt").stat().st_size
            print(f"{method}, resumed at step {middle} of {training.steps} ({size:,} bytes): the same bits: {same}")
            passed &= same
        if method not in ("head", "full"):
            hk.save_adapters(training.model, folder / "adapters.safetensors", include=[HEAD])
            trained = predict(training.model, test_images)
            fresh = make_model(base, method, args)
            passed &= check_adapters(folder / "adapters.safetensors", fresh, trained, test_images)
    Console().print(table)
    axes.set(xlabel="epoch", ylabel="mean loss", yscale="log")
    axes.legend()
    figure.savefig(args.out / "loss.png", dpi=150)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
