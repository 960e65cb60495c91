"""A training under transformers' Trainer, on one process or on many."""

from __future__ import annotations

import os
import tempfile

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification, Trainer, TrainingArguments

import hydra_kernels as hk

TARGETS = ["query", "value", "output.dense"]


def adapted(peft: bool) -> nn.Module:
    """A small RoBERTa with adapters, none of them zero."""
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model: nn.Module = RobertaForSequenceClassification(config)
    if peft:
        from peft import get_peft_model

        from hydra_kernels.peft import HydraConfig

        model = get_peft_model(model, HydraConfig(r_a=2, r_b=3, target_modules=TARGETS, modules_to_save=["classifier"]))
    else:
        hk.inject(model, TARGETS, r_a=2, r_b=3)
        hk.mark_only_adapters_trainable(model, keep=["classifier"])
    for name, parameter in model.named_parameters():
        if name.endswith(("A_up", "B_up")):
            nn.init.normal_(parameter, std=0.3)
    return model


def train(batch: int, peft: bool) -> tuple[list[float], dict[str, np.ndarray]]:
    """The loss of every step, and how far each parameter went, of a training with so many rows a process and step."""
    # As torchrun would set them; accelerate then finds the group that is there already.
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": "0"}
    model = adapted(peft)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(2)
    data = [{"input_ids": torch.randint(3, 50, (8,)), "labels": i % 2} for i in range(32)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=6,
            per_device_train_batch_size=batch,
            average_tokens_across_devices=False,  # it is for losses that are sums over tokens
            optim="sgd",
            learning_rate=0.1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
    assert trainer.accelerator.num_processes == world
    AcceleratorState._reset_state(reset_partial_state=True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: (p.detach() - start[name]).numpy() for name, p in model.named_parameters()}
