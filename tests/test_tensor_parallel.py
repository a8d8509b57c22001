"""Two processes that share a model give the tokens of one, with parts of the same packed weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests import tensor_parallel_scenario as scenario

ROOT = Path(__file__).parents[1]


def test_two_processes_give_the_tokens_of_one(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=512,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    model.save_pretrained(tmp_path / "model")
    script = ROOT / "tests" / "tensor_parallel_scenario.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    subprocess.run(
        [*command, str(tmp_path / "model"), str(tmp_path / "result")],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    one = scenario.run(model)
    two = [torch.load(tmp_path / f"result.{rank}", weights_only=False) for rank in (0, 1)]
    for part in two:
        assert torch.equal(part["tokens"], one["tokens"])
        assert [part["kinds"].count(kind) for kind in ("qkv", "attention", "ffn")] == [2, 2, 2] and not part["left"]
        assert "sharded over processes" in part["save"]
    whole, parts = one["packed"], [part["packed"] for part in two]
    layer = "model.layers.1."
    for name, axis in (("self_attn.q_proj", 0), ("self_attn.o_proj", 1), ("mlp.up_proj", 0), ("mlp.down_proj", 1)):
        for tensor in ("weight_packed", "weight_scale"):
            key = f"{layer}{name}.{tensor}"
            shared = axis == 1 and parts[0][key].shape == whole[key].shape  # a scale per row serves all its columns
            got = parts[1][key] if shared else torch.cat([part[key] for part in parts], axis)
            assert torch.equal(got, whole[key]), key
    assert torch.equal(parts[0]["model.embed_tokens.weight_packed"], whole["model.embed_tokens.weight_packed"])
    assert parts[0]["lm_head.weight_packed"].shape[0] * 2 == whole["model.embed_tokens.weight_packed"].shape[0]
