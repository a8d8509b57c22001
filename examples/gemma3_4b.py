"""Chat with Gemma 3 4B, quantized on the fly. Needs the checkpoint: a local folder or access to the hub.

python examples/gemma3_4b.py --model path/to/gemma-3-4b-it "Why is the sky blue?"
python examples/gemma3_4b.py --tiny        # the embedded model: no download, seconds
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from unicorn_backend.models import TINY

DEFAULT = "google/gemma-3-4b-it"


def main(arguments: Sequence[str] | None = None, default: str = DEFAULT) -> str:
    parser = argparse.ArgumentParser(description=f"Chat with {default}")
    parser.add_argument("prompt", nargs="?", default="Write one sentence about unicorns.")
    parser.add_argument("--model", default=default, help="local folder or hub id")
    parser.add_argument("--tiny", action="store_true", help="use the embedded model")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args(arguments)

    source = str(TINY) if args.tiny else args.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model = torch.compile(model, backend="unicorn")

    chat = [{"role": "user", "content": args.prompt}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    output = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False, streamer=streamer)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
