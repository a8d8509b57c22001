"""Which architectures are fused, what is left and why, and whether the result is right: small random models.

    python benchmarks/models.py                       # the list below -> benchmarks/results/models.json
    python benchmarks/models.py glm4 olmo2            # any model types of transformers, printed; --write adds them
    python benchmarks/models.py gemma3n --set num_hidden_layers=6

Each model is built from its configuration class with small sizes and at least one layer of every kind, quantized by
recipe "default", run by torch eagerly, then compiled. Compared are greedy tokens (bf16) and the prompt's logits.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import logging
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import unicorn_backend
from unicorn_backend import measure

RESULTS = Path(__file__).parent / "results" / "models.json"
PROMPT, NEW = 21, 8
TYPES = (
    "gemma gemma2 gemma3_text gemma3n_text gemma4_text llama llama4_text mistral ministral ministral3 mixtral "
    "qwen2 qwen2_moe qwen3 qwen3_moe qwen3_5_text qwen3_next phi phi3 phimoe granite granitemoe smollm3 olmo "
    "olmo2 olmo3 olmoe glm glm4 glm4_moe stablelm cohere cohere2 starcoder2 nemotron arcee helium exaone4 "
    "ernie4_5 seed_oss hunyuan_v1_dense gpt_oss deepseek_v3 lfm2 gpt2 gpt_neox gptj falcon opt bloom mamba mamba2"
).split()
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size": 128,
    "hidden_size_per_layer_input": 32,
    "intermediate_size": 256,
    "intermediate_size_mlp": 256,
    "ffn_dim": 256,
    "n_inner": 256,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "expert_ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 32,
    "sliding_window": 16,
    "max_position_embeddings": 512,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "qk_head_dim": 64,
    "v_head_dim": 32,
    "laurel_rank": 16,
    "num_kv_shared_layers": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "word_embed_proj_dim": 128,
    "rotary_dim": 16,
    "block_ff_dim": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ALWAYS = ("head_dim", "num_key_value_heads")  # None means: computed, from sizes that are others here
SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 32, "n_groups": 1, "state_size": 16},
}


def small_config(model_type: str, given: dict[str, Any]) -> Any:
    """A configuration of `model_type` with small sizes, and one layer of each kind that the full one has."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type)
    if hasattr(default, "text_config"):
        return AutoConfig.for_model(model_type, text_config=small_config(default.text_config.model_type, given))
    values = default.to_dict()
    layers = values.get(default.attribute_map.get("num_hidden_layers", "num_hidden_layers"), 2)
    lists = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == layers and layers > 2}
    kinds = list(zip(*lists.values(), strict=True)) if lists else []
    chosen = sorted(kinds.index(kind) for kind in set(kinds)) or [0, 1]
    chosen = chosen[:6] if len(chosen) > 1 else chosen * 2
    known = values.keys() | default.attribute_map.keys()
    small = {k: v for k, v in SIZES.items() if k in known and (k in ALWAYS or values.get(k) not in (None, 0))}
    small["num_hidden_layers"] = len(chosen)
    for key, value in lists.items():
        size = SIZES.get(key)
        small[key] = [value[i] if size is None else size for i in chosen]
    return AutoConfig.for_model(model_type, **small | SPECIAL.get(model_type, {}) | given)


def build(config: Any, dtype: torch.dtype) -> Any:
    """Random weights of unit gain, so that every part of the model shows in its logits."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
    return model.to(dtype)


def examine(model_type: str, given: dict[str, Any]) -> dict[str, Any]:
    """One row: what is matched, what is left, whether tokens and logits are those of torch on the same weights."""
    row: dict[str, Any] = {"model": model_type}
    config = small_config(model_type, given)
    row |= _compare(build(copy.deepcopy(config), torch.bfloat16))
    if row["tokens"] != "equal":  # bf16 rounds all along the way: fp32 tells rounding from an error
        again = _compare(build(copy.deepcopy(config), torch.float32))
        row |= {"tokens_fp32": again["tokens"], "logits_error_fp32": again["logits_error"]}
    return row


def _compare(model: Any) -> dict[str, Any]:
    unicorn_backend.quantize(model)
    ids = torch.randint(3, 500, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        want, want_tokens = model(ids).logits.float(), model.generate(ids, **settings)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="unicorn")
        got, tokens = compiled(ids).logits.float(), compiled.generate(ids, **settings)
        verdict = _tokens(model, compiled, want_tokens[0], tokens[0])
    plans = unicorn_backend.explain(model).plans
    main = max(plans, key=lambda plan: len(plan.steps), default=None)
    return {
        "graphs": len(plans),
        "taken": dict(Counter(step.kind for plan in (main,) if plan for step in plan.steps)),
        "left": [[*key, count] for key, count in _left(main).items()],
        "notes": sorted({plan.note for plan in plans if plan.note}),
        "tokens": verdict,
        "logits_error": float((got - want).pow(2).mean() / want.var()),
    }


def _tokens(eager: Any, compiled: Any, want: Any, got: Any) -> str:
    """ "equal"; "near tie" if the first other token was as good within 4 times what the logits differ by; "differ"."""
    if torch.equal(want, got):
        return "equal"
    first = int((want != got).nonzero()[0])
    left, right = (run(want[None, :first]).logits[0, -1].float() for run in (eager, compiled))
    margin, error = left[want[first]] - left[got[first]], (left - right).square().mean().sqrt()
    return "near tie" if margin <= 4 * error else "differ"


def _left(plan: Any) -> Counter[tuple[str, str]]:
    return Counter((left.kind, left.reason) for left in (plan.left if plan else ()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types of transformers; none: the list of this file, into JSON")
    parser.add_argument("--write", action="store_true", help="put these model types into the JSON, beside the others")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a value of the configuration")
    arguments = parser.parse_args()
    given = {key: _literal(value) for key, _, value in (item.partition("=") for item in arguments.set)}
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows: dict[str, dict[str, Any]] = {}
    if arguments.types and arguments.write and RESULTS.exists():
        rows = {row["model"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    for model_type in arguments.types or TYPES:
        began = time.perf_counter()
        try:
            row = examine(model_type, given)
        except Exception as error:  # the point of this script is to find them: shown, and counted below
            row = {"model": model_type, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            if arguments.types:
                traceback.print_exc()
        torch._dynamo.reset()
        rows[model_type] = row
        print(f"{time.perf_counter() - began:5.1f} s", json.dumps(row), flush=True)
        if arguments.write or not arguments.types:
            result = {"rows": [*rows.values()], "provenance": measure.provenance()}
            RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    main()
