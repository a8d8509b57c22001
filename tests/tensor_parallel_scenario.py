"""Run in two processes by `test_tensor_parallel.py`: `tp_plan="auto"`, quantized, compiled; each writes what it got.

python -m torch.distributed.run --standalone --nproc_per_node 2 tests/tensor_parallel_scenario.py MODEL RESULT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

PROMPT = torch.randint(3, 500, (1, 9), generator=torch.Generator().manual_seed(1))


def run(model: Any) -> dict[str, Any]:
    """Greedy tokens of the compiled model, its packed weights, the ops of its decode step."""
    import unicorn_backend

    compiled = torch.compile(model, backend="unicorn")
    tokens = compiled.generate(PROMPT, max_new_tokens=6, do_sample=False)
    plan = unicorn_backend.explain(model).plans[-1]
    packed = {name: tensor for name, tensor in model.named_buffers() if ".weight_" in name}
    return {"tokens": tokens, "packed": packed, "kinds": [step.kind for step in plan.steps], "left": plan.left}


def main() -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, tp_plan="auto").eval()
    result = run(model)
    try:
        model.save_pretrained(sys.argv[2] + "-saved")
    except ValueError as error:
        result["save"] = str(error)
    torch.save(result, f"{sys.argv[2]}.{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
