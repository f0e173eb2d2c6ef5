"""Rows with Hugging Face models, random weights, and peft's adapters. The packages are imported when a row is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dyntune import errors
from tests.objective.zoo import classes, made
from tests.obstacles.problem import Problem, Row

__all__ = ["LANGUAGE_ROWS"]

VOCABULARY, WIDTH = 13, 8


def gpt2(**options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 8}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    return GPT2LMHeadModel(GPT2Config(**sizes, **(quiet | options))).train()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 12, "max_position_embeddings": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False)).train()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 12, "max_position_embeddings": 8}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes, **layers, **quiet)).train()


def encoding(**more: torch.Tensor) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding({"input_ids": classes(3, 6, high=VOCABULARY), **more})


def causal_term(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The shifted loss, written out: the model's own goes through float32."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def class_term(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"])


def causal(
    make: Callable[[], nn.Module], prepare: Callable[[nn.Module], Any] = lambda model: None, **more: Any
) -> Problem:
    """A BatchEncoding whose labels are partly ignored; the loss is the one that the model puts into its output."""
    labels = classes(3, 6, high=VOCABULARY)
    labels[0, 3:] = -100
    model = made(make)
    prepare(model)
    return Problem(model=model, batches=encoding(labels=labels), term=causal_term, **more)


def classified() -> Problem:
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return Problem(model=made(bert), batches=encoding(attention_mask=mask, labels=classes(3)), term=class_term)


def checkpointing(*, reentrant: bool) -> Callable[[nn.Module], Any]:
    arguments = {"use_reentrant": reentrant}
    return lambda model: model.activation_checkpointing_enable(arguments)  # type: ignore[operator]


def unchecked(twin: nn.Module) -> nn.Module:
    twin.activation_checkpointing_disable()  # type: ignore[operator]
    return twin


def adapted(store: Callable[[nn.Module], Any] = lambda model: None) -> Problem:
    """LoRA on the attention of GPT-2: its base is frozen."""
    from peft import LoraConfig, get_peft_model

    def make() -> nn.Module:
        config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        return get_peft_model(gpt2(), config).train()

    return causal(make, store)


def store_base(model: nn.Module) -> None:
    """As a base that was loaded in bfloat16: the adapters stay float32."""
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()


def row(name: str, make: Callable[[], Problem], **expected: Any) -> Row:
    # Llama's normalisation goes through float32 whatever the model's dtype, the oracle's included.
    return Row(name=name, group="Hugging Face", build=make, **expected)


LANGUAGE_ROWS = [
    row("GPT-2, BatchEncoding and ModelOutput", lambda: causal(gpt2)),
    row("GPT-2, dropout", lambda: causal(lambda: gpt2(resid_pdrop=0.2, attn_pdrop=0.2)), random=True),
    row("Llama", lambda: causal(llama)),
    row("Llama, bfloat16", lambda: causal(llama, nn.Module.bfloat16), note="through a float32 copy"),
    row("BERT, attention_mask", classified),
    row("GPT-2, gradient checkpointing", lambda: causal(gpt2, checkpointing(reentrant=False))),
    row(
        "GPT-2, gradient checkpointing, reentrant",
        lambda: causal(gpt2, checkpointing(reentrant=True), exact=unchecked),
        error=errors.HVPUnsupportedError,
        fix=r'gradient_checkpointing_kwargs=\{"use_reentrant": False\}',
    ),
    row("GPT-2, LoRA adapters (peft)", adapted, note="the adapters' block"),
    row(
        "GPT-2, LoRA adapters on a bfloat16 base",
        lambda: adapted(store_base),
        note="through a float32 copy of the base",
    ),
]
