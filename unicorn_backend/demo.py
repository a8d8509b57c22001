"""`make demo`: the whole job on the embedded model, and a short table of what it cost and what it kept."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import torch

import unicorn_backend
from unicorn_backend import bench, measure, models, table
from unicorn_backend.quantize.quality import compare

PROMPT = "The film is a"
QUALITY_TOKENS = 8192


def demo(rounds: int = 3, new_tokens: int = 64) -> dict[str, Any]:
    """Quantize, compile, generate, compare, measure. Prints nothing; `report` shows what it returns."""
    original, tokenizer = models.load(), models.load_tokenizer()
    model = copy.deepcopy(original)
    start = time.perf_counter()
    unicorn_backend.quantize(model)
    quantize_s = time.perf_counter() - start

    compiled: Any = torch.compile(model, backend="unicorn")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    start = time.perf_counter()
    output = compiled.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    first_generate_s = time.perf_counter() - start
    return {
        "bytes_before": measure.model_bytes(original),
        "bytes_after": measure.model_bytes(model),
        "quantize_s": quantize_s,
        "first_generate_s": first_generate_s,
        "text": tokenizer.decode(output[0], skip_special_tokens=True),
        "quality": dataclasses.asdict(compare(compiled, original, models.sample_ids(QUALITY_TOKENS))),
        "speed": bench.bench(bench.Workload(new_tokens=new_tokens, rounds=rounds)),
    }


def report(result: dict[str, Any]) -> str:
    """The result as a short table for people."""
    before, after, quality = result["bytes_before"], result["bytes_after"], result["quality"]
    ours, eager = result["speed"]["systems"]
    kl, top1 = quality["kl_mean"], quality["top1"]
    rows = [
        ("weights", table.size(before), table.size(after), f"{after / before:.0%}"),
        ("decode, tok/s", *_medians(eager, ours, "decode")),
        ("prefill, tok/s", *_medians(eager, ours, "prefill")),
        ("read per token", *(table.size(sum(row["bytes_per_token"].values())) for row in (eager, ours)), ""),
        ("read, GB/s", f"{eager['gbps']:.1f}", f"{ours['gbps']:.1f}", ""),
        ("  of memory bandwidth", f"{eager['bandwidth_share']:.0%}", f"{ours['bandwidth_share']:.0%}", "(c)"),
        ("KL divergence, nats", "", f"{kl:.5f}", f"± {quality['kl_mean_se']:.5f}"),
        ("same top-1 token", "", f"{top1:.1%}", f"± {quality['top1_se']:.1%}"),
        ("perplexity", f"{quality['perplexity_reference']:.1f}", f"{quality['perplexity']:.1f}", ""),
    ]
    speed = result["speed"]
    lines = (
        "tiny-gemma3, the embedded trained model of 7M parameters (it writes English-looking nonsense):",
        f"  {result['text']!r}",
        "",
        table.text(("", "eager bf16", "unicorn", ""), rows),
        "",
        f"quantized in {result['quantize_s']:.2f} s; first generate (compiles) {result['first_generate_s']:.1f} s",
        f"speed: medians of {speed['rounds']} interleaved rounds, prompt {speed['prompt_tokens']}, "
        f"{speed['new_tokens']} new tokens, {speed['provenance']['threads']} threads",
        f"fidelity: {quality['tokens']} tokens of WikiText-2 test; ± is one standard error",
        f"(c) of {speed['bandwidth']['ceiling_gbps']:.1f} GB/s measured; this model lives in cache, so the share says "
        "little: per-call overhead bounds it",
    )
    return "\n".join(lines)


def _medians(eager: dict[str, Any], ours: dict[str, Any], phase: str) -> tuple[str, str, str]:
    key = f"{phase}_tok_s"
    return f"{eager[key]['median']:.0f}", f"{ours[key]['median']:.0f}", f"{ours[f'{phase}_ratio']:.2f}x"
