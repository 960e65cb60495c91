"""The models of Table 4 as data: how each is built, what it learns from, and which of its layers get adapters.

All have random weights and no dropout, which would give every method masks of its own and leave nothing to compare. On
a CPU the larger ones are smaller, and their names say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.measuring import images
from benchmarks.measuring.images import Images
from benchmarks.measuring.methods import Ranks

PAPER_MODEL = "ViT-B/32"
# Tokens that are drawn start here: below are RoBERTa's start and padding.
FIRST_TOKEN = 2


@dataclass(frozen=True)
class Size:
    """How large a model is: its name, the batch of a step, what it changes of the config, the tokens of a sequence."""

    name: str
    batch: int
    config: Mapping[str, Any]
    # None for images.
    length: int | None = None


@dataclass(frozen=True)
class Model:
    network: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    # Of every size.
    settings: Mapping[str, Any]
    gpu: Size
    cpu: Size
    dry: Size
    # A regular expression that the names of the adapted layers match.
    target: str
    head: str
    ranks: Mapping[str, Ranks]
    adapter_bias: bool

    def size(self, device: torch.device, dry: bool) -> Size:
        return self.dry if dry else self.cpu if device.type == "cpu" else self.gpu


VIT = {"num_labels": 10}
ROBERTA = {"num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "use_cache": False}
ROBERTA |= {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
# Few words: the rows of an embedding say nothing about linear layers, and full tuning would train them all.
LLAMA = {"vocab_size": 1024, "use_cache": False}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}


def llama(hidden: int, layers: int, heads: int) -> dict[str, int]:
    """Llama 3's proportions: an MLP 3.5 times as wide, and a key and value head for every four heads."""
    return {
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
    }


MODELS = {
    # The paper's Table 4. With adapter biases these ranks give its parameter counts: 0.21 M for SeqLoRA and Hydra,
    # 0.19 M of 0.22 M for LoRA.
    "vit-b/32": Model(
        network=ViTForImageClassification,
        config=ViTConfig,
        settings={"patch_size": 32, **VIT},
        gpu=Size(PAPER_MODEL, 128, {}),
        cpu=Size(PAPER_MODEL, 32, {}),
        dry=Size("ViT 2x32/32", 8, TINY),
        target=r".*\.mlp\.fc2",
        head="classifier",
        ranks={"lora": Ranks(4, 0), "seqlora": Ranks(0, 11), "hydra": Ranks(3, 3)},
        adapter_bias=True,
    ),
    # Here and below the ranks of LoRA and SeqLoRA are those whose parameters come nearest to Hydra's.
    "vit-l/16": Model(
        network=ViTForImageClassification,
        config=ViTConfig,
        settings={"patch_size": 16, **VIT},
        gpu=Size("ViT-L/16", 128, {**VIT_L, "num_hidden_layers": 24}),
        cpu=Size("ViT-L/16, 4 of 24 layers, smaller", 8, {**VIT_L, "num_hidden_layers": 4}),
        dry=Size("ViT 2x32/16", 8, {**TINY, "intermediate_size": 128, "image_size": 64}),
        target=r".*\.mlp\.fc2",
        head="classifier",
        ranks={"lora": Ranks(11, 0), "seqlora": Ranks(0, 28), "hydra": Ranks(8, 8)},
        adapter_bias=False,
    ),
    # The paper's GLUE runs as its authors' code has them: Hydra on the last linear layer of every MLP block, parallel
    # rank 4, sequential rank 8, no adapter biases, sequences of 512 tokens; MNLI's three classes.
    "roberta-base": Model(
        network=RobertaForSequenceClassification,
        config=RobertaConfig,
        settings=ROBERTA,
        gpu=Size("RoBERTa-base", 16, {}, length=512),
        cpu=Size("RoBERTa-base, 6 of 12 layers, smaller", 4, {"num_hidden_layers": 6}, length=512),
        dry=Size("RoBERTa 2x32", 8, {**TINY, "intermediate_size": 128, "vocab_size": 100}, length=16),
        target=r".*\.layer\.\d+\.output\.dense",
        head="classifier",
        ranks={"lora": Ranks(7, 0), "seqlora": Ranks(0, 18), "hydra": Ranks(4, 8)},
        adapter_bias=False,
    ),
    # Adapters on all linear layers but the head, as language models are fine-tuned; it learns the next token.
    "llama": Model(
        network=LlamaForCausalLM,
        config=LlamaConfig,
        settings=LLAMA,
        gpu=Size("Llama-shaped, 4 layers of 4096/14336", 4, llama(4096, layers=4, heads=32), length=2048),
        cpu=Size("Llama-shaped, 2 layers of 1024/3584, smaller", 4, llama(1024, layers=2, heads=16), length=512),
        dry=Size("Llama-shaped, 2 layers of 32/112", 8, llama(32, layers=2, heads=4), length=16),
        target=r"model\.layers\..*_proj",
        head="lm_head",
        ranks={"lora": Ranks(33, 0), "seqlora": Ranks(0, 31), "hydra": Ranks(16, 16)},
        adapter_bias=False,
    ),
}


@dataclass(frozen=True)
class Pictures:
    """Images and their labels, enlarged to ``size`` x ``size``."""

    images: Images
    size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.images.name

    def batches(self, batch_size: int, total: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``total`` images; the last batch holds what is left."""
        for indices in images.index_batches(len(self.images.labels), batch_size, total, seed):
            yield self.images.batch(indices, self.size, self.device, self.dtype)


@dataclass(frozen=True)
class Tokens:
    """Random sequences [n, length], with a class each or, where ``classes`` is None, the token after each token."""

    vocabulary: int
    length: int
    classes: int | None
    device: torch.device
    name: str = "random tokens"

    def batches(self, batch_size: int, total: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``total`` sequences; the last batch holds what is left."""
        generator = torch.Generator().manual_seed(seed)
        for given in range(0, total, batch_size):
            count = min(batch_size, total - given)
            shape = (count, self.length + (self.classes is None))
            tokens = torch.randint(FIRST_TOKEN, self.vocabulary, shape, generator=generator).to(self.device)
            if self.classes is None:
                yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            else:
                yield tokens, torch.randint(self.classes, (count,), generator=generator).to(self.device)


def build(model: Model, size: Size, checkpoint: Path | None = None) -> PreTrainedModel:
    """The network with random weights, in fp32, or a ViT with those of a local checkpoint, which has its own size."""
    if checkpoint is None:
        return model.network(model.config(**{**model.settings, **size.config}))
    if model.network is not ViTForImageClassification:
        raise ValueError(f"checkpoint is {checkpoint}, which only a ViT reads: the other models have random weights")
    if not checkpoint.is_dir():
        raise ValueError(f"checkpoint: {checkpoint} is no local folder")
    # A head of another number of classes is replaced by a new one, as fine-tuning does.
    return ViTForImageClassification.from_pretrained(
        checkpoint, local_files_only=True, **VIT, ignore_mismatched_sizes=True, dtype=torch.float32
    )


def checkpoint_activations(network: PreTrainedModel, dropout: bool = False) -> None:
    """Keeps of each of the network's layers its input alone, until the backward: transformers' own, in place."""
    # Without dropout there is no state of random numbers to restore, which a CUDA graph could not.
    network.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": dropout})
    # Only a reentrant checkpoint needs embeddings that require gradients; frozen ones need none.
    network.disable_input_require_grads()


def name_of(size: Size, network: PreTrainedModel, checkpoint: Path | None) -> str:
    """As printed: the size's own, or what a checkpoint turned out to be."""
    if checkpoint is None:
        return size.name
    config = network.config
    shape = (config.hidden_size, config.num_hidden_layers, config.patch_size)
    known = {(768, 12, 32): PAPER_MODEL, (1024, 24, 16): "ViT-L/16"}
    return known.get(shape, f"ViT {config.num_hidden_layers}x{config.hidden_size}/{config.patch_size}")


def source(
    network: PreTrainedModel, size: Size, folder: Path | None, device: torch.device, dtype: torch.dtype
) -> Pictures | Tokens:
    """What the network learns from: images, of ``folder`` or the digits, or random tokens."""
    config = network.config
    if size.length is None:
        return Pictures(images.load(folder), config.image_size, device, dtype)
    if folder is not None:
        raise ValueError(f"data is {folder}, but the model reads text, which is random tokens")
    classes = None if isinstance(network, LlamaForCausalLM) else config.num_labels
    return Tokens(config.vocab_size, size.length, classes, device)
