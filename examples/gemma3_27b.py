"""Gemma 3 27B from a checkpoint that is quantized while it loads.

The bf16 checkpoint is 54.86 GB. Quantizing shard by shard keeps one shard and the packed weights in
memory, never the whole model in bf16; `--save` writes the packed checkpoint, which then loads directly.

    python examples/gemma3_27b.py --model path/to/gemma-3-27b-it --save gemma-3-27b-unicorn
    python examples/gemma3_27b.py --model gemma-3-27b-unicorn
    python examples/gemma3_27b.py --tiny       # the embedded model: no download, seconds
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from unicorn_backend.integration.hf_quantizer import UnicornConfig
from unicorn_backend.models import TINY


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description="Quantize Gemma 3 27B while loading it")
    parser.add_argument("prompt", nargs="?", default="The unicorn is")
    parser.add_argument("--model", default="google/gemma-3-27b-it", help="local folder or hub id")
    parser.add_argument("--tiny", action="store_true", help="use the embedded model")
    parser.add_argument("--save", help="also write the quantized checkpoint here")
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args(arguments)

    source = str(TINY) if args.tiny else args.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    stored = getattr(AutoConfig.from_pretrained(source), "quantization_config", None)
    quantization = {} if stored else {"quantization_config": UnicornConfig()}
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", **quantization)
    if args.save:
        model.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)

    model = torch.compile(model, backend="unicorn")
    inputs = tokenizer(args.prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    print(text)
    return text


if __name__ == "__main__":
    main()
