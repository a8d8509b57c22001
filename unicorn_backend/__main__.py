"""Command line: `unicorn` or `python -m unicorn_backend`.

Exit codes: 0 done; 1 a check failed (`verify`, a threshold of quality); 2 wrong options or input that cannot be
used, with one line on stderr; 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging

import unicorn_backend
from unicorn_backend import bench as benchmark
from unicorn_backend import demo as demonstration
from unicorn_backend import models, table
from unicorn_backend.errors import CheckFailedError, OptionError, UnicornError
from unicorn_backend.quantize import evaluate, stream
from unicorn_backend.quantize import verify as verification
from unicorn_backend.quantize.quality import WINDOW

EXPLAIN_TOKENS = 8
"""`explain` runs one prompt of this length and one decode step, so that it shows both graphs."""

app = typer.Typer(
    name="unicorn",
    help="Run stock Hugging Face language models quantized, through torch.compile.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="Local folder, hub id, tiny, gemma3-1b or gemma3-4b.")]
Recipe = Annotated[str, typer.Option("--recipe", "-r", help="Quantization recipe.")]
MinTop1 = Annotated[
    float, typer.Option("--min-top1", min=0.0, max=1.0, help="Exit with 1 if a smaller share of tokens stays first.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the speed comparison.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Quantize the embedded model, generate with it, and show size, speed and fidelity.

    Example: `unicorn demo`
    """
    result = demonstration.demo(rounds)
    typer.echo(json.dumps(result, indent=2) if as_json else demonstration.report(result))


@app.command()
def run(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Model = "tiny",
    recipe: Recipe = "default",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    as_json: AsJson = False,
) -> None:
    """Continue PROMPT; the text appears as it is generated.

    Examples: `unicorn run "The film is a"`, `unicorn run --chat -m google/gemma-3-4b-it "What is a unicorn?"`
    """
    tokenizer = models.load_tokenizer(model)
    ids = _encode(tokenizer, prompt, chat)
    compiled: Any = torch.compile(models.load(model), backend="unicorn", options={"recipe": recipe})
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
    if not as_json:
        settings["streamer"] = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    torch.manual_seed(seed)
    output = compiled.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
    if as_json:
        text = tokenizer.decode(output, skip_special_tokens=True)
        typer.echo(json.dumps({"prompt": prompt, "text": text, "tokens": len(output)}))


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Local folder, hub id, or tiny.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    recipe: Recipe = "default",
    rule: Annotated[
        list[str] | None, typer.Option("--rule", metavar="REGEX=SCHEME", help="Scheme of matching modules; repeat.")
    ] = None,
    format: Annotated[str, typer.Option(help="unicorn, gguf or compressed-tensors.")] = "unicorn",
    evaluation: Annotated[bool, typer.Option("--eval", help="Compare with SRC afterwards, into the report.")] = False,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text of --eval; a piece of WikiText-2 without.")] = None,
    min_top1: MinTop1 = 0.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a quantized checkpoint that `from_pretrained` loads without repacking.

    It streams: memory holds a few blocks of rows, not the model. The folder appears complete or not at all.

    Examples: `unicorn quantize google/gemma-3-4b-it -o gemma-3-4b-unicorn`,
    `unicorn quantize DIR -o OUT --rule 'layers\\.0\\.=w8c' --rule 'lm_head=float'`
    """
    result = stream.quantize_checkpoint(
        source,
        out,
        recipe,
        rules=_rules(rule or []),
        format=format,
        resume=resume,
        overwrite=overwrite,
        progress=False if as_json else None,
    )
    quality = None
    if evaluation or min_top1 > 0:
        quality = evaluate.evaluate(out, source, text)
        evaluate.add_to_report(out, quality)
        result["quality"] = dataclasses.asdict(quality)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **result}))
    else:
        _print_result(out, recipe, result, quality)
    if quality is not None:
        evaluate.require(quality, min_top1)


def _print_result(out: Path, recipe: str, result: dict[str, Any], quality: Any) -> None:
    totals = result["totals"]
    before, after = totals["bytes_before"], totals["bytes_after"]
    for note in result["notes"]:
        typer.echo(f"note: {note}")
    typer.echo(
        f"{out}: {table.size(before)} -> {table.size(after)} ({after / before:.0%}), recipe {recipe}, "
        f"{totals['seconds']:.1f} s, {totals['gb_per_s']:.2f} GB/s"
    )
    if quality is not None:
        typer.echo(str(quality))


@app.command("eval")
def evaluate_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Quantized checkpoint.")],
    reference: Annotated[str, typer.Option(help="Float checkpoint, hub id, or tiny.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; a piece of WikiText-2 without.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="At most so many tokens of the text.")] = evaluate.TOKENS,
    window: Annotated[int, typer.Option(min=2, help="Tokens per context.")] = WINDOW,
    min_top1: MinTop1 = 0.0,
    as_json: AsJson = False,
) -> None:
    """Compare a quantized checkpoint with its original: KL divergence, same top-1 token, perplexity.

    Each with its standard error.

    Example: `unicorn eval gemma-3-4b-unicorn --reference google/gemma-3-4b-it --text wiki.txt --min-top1 0.95`
    """
    quality = evaluate.evaluate(folder, reference, text, tokens=tokens, window=window)
    typer.echo(json.dumps(dataclasses.asdict(quality)) if as_json else str(quality))
    evaluate.require(quality, min_top1)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint written by `unicorn quantize`.")],
    as_json: AsJson = False,
) -> None:
    """Check every tensor of a quantized checkpoint against the checksums of its report.

    Example: `unicorn verify gemma-3-4b-unicorn`
    """
    problems = verification.verify(folder, progress=not as_json)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "problems": problems}))
    if problems:
        raise CheckFailedError("\n".join(problems))
    if not as_json:
        typer.echo(f"{folder}: every tensor is as it was written")


@app.command()
def explain(model: Model = "tiny", recipe: Recipe = "default", as_json: AsJson = False) -> None:
    """Show what the backend takes of a model, what it leaves to plain torch, and why.

    Example: `unicorn explain -m google/gemma-3-4b-it`
    """
    compiled: Any = torch.compile(models.load(model), backend="unicorn", options={"recipe": recipe})
    ids = models.sample_ids(EXPLAIN_TOKENS, model)
    compiled.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    explanation = unicorn_backend.explain(compiled)
    typer.echo(explanation.to_json() if as_json else str(explanation))


@app.command()
def bench(
    model: Model = "tiny",
    recipe: Recipe = "default",
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=0, help="0 leaves torch's choice.")] = 0,
    eager: Annotated[bool, typer.Option("--eager/--no-eager", help="Compare with eager bf16.")] = True,
    peer: Annotated[
        list[str] | None, typer.Option(metavar="NAME=LLAMA_BENCH", help="Compare with a program; repeat.")
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="Model file of the peers.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure tokens per second next to the memory ceiling and to eager bf16, interleaved.

    Examples: `unicorn bench`, `unicorn bench -m gemma3-1b -p 512 -n 128 --output 1b.json`,
    `unicorn bench -m gemma3-1b --peer llama.cpp=./llama-bench --gguf gemma-3-1b-q4_0.gguf`
    """
    if threads:
        torch.set_num_threads(threads)
    work = benchmark.Workload(model, prompt_tokens, new_tokens, rounds, recipe)
    result = benchmark.bench(work, eager=eager, peers=[benchmark.Peer.parse(spec, gguf) for spec in peer or ()])
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(result, indent=2) if as_json else benchmark.report(result))


def _encode(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids [1, T] of a prompt, as plain text or as the user's turn of a chat."""
    if not chat:
        ids: torch.Tensor = tokenizer(prompt, return_tensors="pt").input_ids
        return ids
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return ids


def _rules(texts: list[str]) -> dict[str, str | None]:
    """`REGEX=SCHEME` of the command line; the last `=` separates."""
    rules: dict[str, str | None] = {}
    for text in texts:
        pattern, equals, scheme = text.rpartition("=")
        if not equals or not pattern:
            raise OptionError(
                f"--rule: got {text!r}, expected REGEX=SCHEME, such as 'down_proj=w8c' or 'lm_head=float'"
            )
        rules[pattern] = scheme
    return rules


def main() -> None:
    """Entry point of the `unicorn` script."""
    transformers_logging.disable_progress_bar()
    try:
        app()
    except UnicornError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1 if isinstance(error, CheckFailedError) else 2)


if __name__ == "__main__":
    main()
