"""OpenVINO GenAI behind llama-bench's options and JSON, so that `--peer` runs it in the same rounds.

It needs its own Python (`pip install openvino-genai optimum-intel nncf "transformers<5"`) and a model:

    python -c "from unicorn_backend.models.random import random_model as m; m('gemma3-1b').save_pretrained('hf')"
    optimum-cli export openvino -m hf --task text-generation-with-past --weight-format int4 --sym --group-size 64 FOLDER
    unicorn bench -m gemma3-1b --peer 'OpenVINO=THAT/bin/python benchmarks/openvino_bench.py -m FOLDER'

As in llama-bench, a prompt and a generation (after one token) are measured apart, each after a run that warms up. The
times are those at which tokens reach a streamer, decoding greedily from token ids: no tokenizer takes part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai


class Clock(genai.StreamerBase):
    """When each token came."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, token: int | list[int]) -> Any:
        self.times += [time.perf_counter()] * (len(token) if isinstance(token, list) else 1)
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", type=Path, required=True, metavar="FOLDER", help="exported model")
    parser.add_argument("-p", type=int, default=512, metavar="TOKENS", help="prompt; 0 measures none")
    parser.add_argument("-n", type=int, default=128, metavar="TOKENS", help="generation; 0 measures none")
    parser.add_argument("-t", type=int, default=2, metavar="THREADS")
    parser.add_argument("-r", type=int, default=5, metavar="REPETITIONS")
    parser.add_argument("-o", choices=["json"], default="json")
    parser.add_argument("--group", type=int, default=64, help="activations per scale: DYNAMIC_QUANTIZATION_GROUP_SIZE")
    args = parser.parse_args()
    pipeline = genai.LLMPipeline(
        args.m, "CPU", INFERENCE_NUM_THREADS=args.t, DYNAMIC_QUANTIZATION_GROUP_SIZE=args.group
    )
    sizes = [(args.p, 0)] * bool(args.p) + [(0, args.n)] * bool(args.n)
    facts = {"engine": ov.get_version(), "model": args.m.name, "threads": args.t}
    rows = [{**facts, "n_prompt": p, "n_gen": n, **_measure(pipeline, p, n, args.r)} for p, n in sizes]
    print(json.dumps(rows, indent=1))


def _measure(pipeline: Any, prompt: int, new: int, repetitions: int) -> dict[str, Any]:
    """Tokens per second of a prompt of `prompt` tokens, or of `new` tokens after a prompt of one."""
    speeds = [_speed(pipeline, prompt, new) for _ in range(1 + repetitions)][1:]
    return {"avg_ts": statistics.mean(speeds), "samples_ts": speeds}


def _speed(pipeline: Any, prompt: int, new: int) -> float:
    ids = np.random.default_rng().integers(3, 200, (1, prompt or 1))  # new ones each time: no cached prefix is hit
    clock, start = Clock(), time.perf_counter()
    pipeline.generate(ov.Tensor(ids), max_new_tokens=new + 1, ignore_eos=True, streamer=clock)
    assert len(clock.times) == new + 1, f"{len(clock.times)} tokens came, not {new + 1}"
    if not new:
        return prompt / (clock.times[0] - start)
    return new / (clock.times[-1] - clock.times[0])


if __name__ == "__main__":
    main()
