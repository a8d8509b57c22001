"""The engine that tests of generation and of the server share: the embedded model cut to 3 layers."""

from __future__ import annotations

from typing import Any

import torch

LAYERS = 3  # sliding, sliding, full: compiles in half the time of all six


def make_engine(weights: dict[str, torch.Tensor], **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from unicorn_backend import models
    from unicorn_backend.generation.engine import Engine

    config = AutoConfig.from_pretrained(models.TINY, num_hidden_layers=LAYERS)
    config.layer_types = config.layer_types[:LAYERS]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(weights, strict=False)
    return Engine("tiny", options, model=model.eval())
