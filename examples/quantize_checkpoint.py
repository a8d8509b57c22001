"""Quantize once, save, load, generate: the packed checkpoint loads without repacking.

python examples/quantize_checkpoint.py path/to/model out/folder --recipe default
python examples/quantize_checkpoint.py --tiny out/folder
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import unicorn_backend
from unicorn_backend import measure, table
from unicorn_backend.models import TINY


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description="Quantize, save, load, generate")
    parser.add_argument("source", nargs="?", default=str(TINY), help="local folder or hub id")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--tiny", action="store_true", help="use the embedded model")
    parser.add_argument("--recipe", default="default", choices=unicorn_backend.recipes())
    args = parser.parse_args(arguments)
    source = str(TINY) if args.tiny else args.source

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    before = measure.model_bytes(model)
    start = time.perf_counter()
    unicorn_backend.quantize(model, recipe=args.recipe)
    seconds = time.perf_counter() - start
    print(f"{table.size(before)} -> {table.size(measure.model_bytes(model))} in {seconds:.1f} s")
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(source).save_pretrained(args.out)

    tokenizer = AutoTokenizer.from_pretrained(args.out)
    loaded = torch.compile(AutoModelForCausalLM.from_pretrained(args.out), backend="unicorn")
    output = loaded.generate(**tokenizer("The film is a", return_tensors="pt"), max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    print(text)
    return text


if __name__ == "__main__":
    main()
