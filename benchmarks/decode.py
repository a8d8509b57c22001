"""Write the speed results that the README shows: benchmarks/results/decode-<model>.json, one per model.

    python benchmarks/decode.py                                  # tiny and gemma3-1b
    python benchmarks/decode.py gemma3-4b --rounds 3
    python benchmarks/decode.py gemma3-1b --peer llama.cpp=PATH --peer 'ik_llama.cpp=PATH -rtr 1' --gguf FILE
    python benchmarks/decode.py gemma3-1b --peer 'OpenVINO=PYTHON benchmarks/openvino_bench.py -m FOLDER'

The machine should be otherwise idle. Each result carries its provenance and the bandwidth read around it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers.utils import logging

from unicorn_backend import bench, models

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=["tiny", "gemma3-1b"], help=", ".join(("tiny", *models.CONFIGS)))
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--also", action="append", default=[], metavar="RECIPE", help="a further recipe of our own")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=LLAMA_BENCH")
    parser.add_argument("--gguf", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    RESULTS.mkdir(exist_ok=True)
    peers = [bench.Peer.parse(spec, args.gguf) for spec in args.peer]
    for name in args.models:
        work = bench.Workload(name, args.prompt_tokens, args.new_tokens, args.rounds, also=tuple(args.also))
        result = bench.bench(work, peers=peers)
        path = RESULTS / f"decode-{Path(name).name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(bench.report(result), f"\n-> {path.relative_to(RESULTS.parents[1])}\n")


if __name__ == "__main__":
    main()
