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
from rich.console import Console
from transformers.utils import logging as transformers_logging

import unicorn_backend
from unicorn_backend import bench as benchmark
from unicorn_backend import chat as terminal
from unicorn_backend import demo as demonstration
from unicorn_backend import doctor as examination
from unicorn_backend import hub, models, picture, table
from unicorn_backend.errors import CheckFailedError, OptionError, UnicornError
from unicorn_backend.generation.conversation import Conversation
from unicorn_backend.generation.engine import Engine
from unicorn_backend.generation.live import stream_answer
from unicorn_backend.generation.request import Result, Settings
from unicorn_backend.options import Options
from unicorn_backend.options import api_key as environment_api_key
from unicorn_backend.partition import calibration
from unicorn_backend.quantize import evaluate, stream
from unicorn_backend.quantize import verify as verification
from unicorn_backend.quantize.quality import WINDOW
from unicorn_backend.timing import timed

EXPLAIN_TOKENS = 8
"""`explain` runs one prompt of this length and one decode step, so that it shows both graphs."""

MEASURED_STEPS = 16
"""Tokens that `explain --measure` generates: a decode step's time is the median of so many."""

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
Kv = Annotated[str, typer.Option("--kv", help="Keys and values: model (the model's dtype) or int8 (half the memory).")]
Devices = Annotated[
    list[str] | None, typer.Option("--device", help="Beside the CPU: vulkan, vulkan:780M, npu; repeat.")
]
Policy = Annotated[str, typer.Option("--policy", help="When a device gets a region: speed, power or fixed.")]
MinTop1 = Annotated[
    float, typer.Option("--min-top1", min=0.0, max=1.0, help="Exit with 1 if a smaller share of tokens stays first.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="At most so many tokens per answer.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")]
Speculate = Annotated[
    bool, typer.Option("--speculate", help="Check drafts of repeated text, several tokens per step; same output.")
]
AssistantModel = Annotated[
    str, typer.Option("--assistant", metavar="MODEL", help="A smaller model that drafts too; implies --speculate.")
]
Monitor = Annotated[bool, typer.Option("--monitor", help="A live line of tokens/s, GB/s and memory.")]
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
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from the standard input.")],
    model: Model = "tiny",
    recipe: Recipe = "default",
    kv: Kv = "model",
    device: Devices = None,
    policy: Policy = "speed",
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    speculate: Speculate = False,
    assistant: AssistantModel = "",
    monitor: Monitor = False,
    as_json: AsJson = False,
) -> None:
    """Continue PROMPT; the text appears as it is generated, and at the end its speed (on stderr).

    Examples: `unicorn run "The film is a"`, `unicorn run --chat -m google/gemma-3-4b-it "What is a unicorn?"`,
    `unicorn run --speculate - < letter.txt`, `unicorn run --device vulkan --policy power "The film is a"`,
    `unicorn run --chat -m google/gemma-3-27b-it --assistant google/gemma-3-1b-it "What is a unicorn?"`
    """
    engine = Engine(model, _options(recipe, device, policy, kv), assistant=assistant or None)
    text = sys.stdin.read() if prompt == "-" else prompt
    if chat:
        ids = engine.encode_rendered(engine.render([{"role": "user", "content": text}]))
    else:
        ids = engine.encode(text)
    settings = Settings(max_new_tokens, temperature, seed=seed, speculate=speculate or bool(assistant))
    if chat:
        settings = engine.for_chat(settings)
    if as_json:
        report = run_report(engine.generate(ids, settings))
        typer.echo(json.dumps({"prompt": prompt, **report, "placements": engine.placements()}))
        return
    if not chat:
        typer.echo(text, nl=False)
    console = Console(highlight=False)
    result = stream_answer(console, lambda **show: engine.generate(ids, settings, **show), engine.meter_line, monitor)
    for line in (engine.summary(result), *engine.placements()):
        typer.echo(line, err=True)


def run_report(result: Result) -> dict[str, Any]:
    """A generation as JSON."""
    return {
        "text": result.text,
        "tokens": len(result.ids),
        "finish": result.finish,
        "first_token_s": result.first_token_s,
        "tokens_per_second": result.tokens_per_second,
        "model_calls": result.calls,
        "drafted": result.drafted,
        "accepted": result.accepted,
    }


@app.command("chat")
def chat_command(
    model: Model = "tiny",
    recipe: Recipe = "default",
    kv: Kv = "model",
    device: Devices = None,
    policy: Policy = "speed",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    seed: Annotated[int | None, typer.Option(help="Seed of each answer; random without.")] = None,
    speculate: Speculate = False,
    assistant: AssistantModel = "",
    monitor: Monitor = False,
) -> None:
    """Talk with a model in the terminal. /help lists the commands; Ctrl-C stops an answer.

    A turn computes only its new tokens: those of the turns before are kept. Lines may come from a pipe.

    Examples: `unicorn chat`, `unicorn chat -m google/gemma-3-4b-it --system "Answer in one sentence."`,
    `unicorn chat --device vulkan`
    """
    engine = Engine(model, _options(recipe, device, policy, kv), assistant=assistant or None)
    settings = Settings(max_new_tokens, temperature, seed=seed, speculate=speculate or bool(assistant))
    conversation = Conversation(engine, settings)
    conversation.system(system)
    console = Console(highlight=False)
    console.print(f"{engine.name}, context {engine.context} tokens; /help lists the commands", style="dim")
    terminal.chat(conversation, console, monitor)


@app.command()
def serve(
    model: Model = "tiny",
    recipe: Recipe = "default",
    kv: Kv = "model",
    device: Devices = None,
    policy: Policy = "speed",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str, typer.Option(help="Name of the model for clients; the last part of --model without.")] = "",
    api_key: Annotated[str, typer.Option(help="What clients must send; UNICORN_API_KEY without.")] = "",
    batch: Annotated[
        int, typer.Option(min=0, help="Requests decoded together; 1 for one after another, 0 for what pays here.")
    ] = 0,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; the next gets 503.")] = 64,
    per_client: Annotated[int, typer.Option(min=1, help="Requests of one client at a time; the next gets 429.")] = 16,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request; a larger one gets 413.")] = 1 << 20,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer whose request names no limit.")] = 1024,
    prefix_mb: Annotated[int, typer.Option(min=0, help="Keys and values kept between requests.")] = 1024,
    speculate: Speculate = False,
    assistant: AssistantModel = "",
    monitor: Monitor = False,
) -> None:
    """Serve a model with the OpenAI API: chat completions, completions, models; /metrics, /health and a stats page.

    Requests that run together share each reading of the weights; a prompt computes only what no earlier one had.
    Needs the extra `serve`.

    Examples: `unicorn serve`, `unicorn serve -m google/gemma-3-4b-it --port 8080 --api-key secret --speculate`,
    `unicorn serve --device vulkan --device npu --policy power`
    """
    try:
        from unicorn_backend.server import run as server
    except ModuleNotFoundError as error:
        raise OptionError(f"serve needs {error.name}: pip install 'unicorn-backend[serve]'") from error
    options = _options(recipe, device, policy, kv)
    engine = Engine(model, options, prefix_bytes=prefix_mb << 20, assistant=assistant or None)
    limits = server.Limits(queue, batch, per_client, max_body, max_tokens)
    server.serve(
        engine, host, port, limits, api_key or environment_api_key(), speculate or bool(assistant), name, monitor
    )


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: versions, kernels, CPU, memory and its bandwidth, GPU, NPU, each with its fix.

    Exit code 1 if something fails; what is only slower or unused is a warning.

    Examples: `unicorn doctor`, `unicorn doctor --json`
    """
    checks = examination.examine()
    if as_json:
        typer.echo(json.dumps(examination.to_json(checks), indent=2))
    else:
        Console(highlight=False).print(examination.as_table(checks))
    if failed := [check.name for check in checks if check.status == "fail"]:
        raise CheckFailedError(f"not ready: {', '.join(failed)}")
    if not as_json:
        typer.echo('ready: try `unicorn run "The film is a"`')


@app.command()
def calibrate(as_json: AsJson = False) -> None:
    """Measure what this machine takes for each kind of work, for placement and for what `explain` predicts.

    Some 30 seconds; the machine should have nothing else to do. Kept in the cache directory for this CPU, number of
    threads and version; running it again replaces it.

    Examples: `unicorn calibrate`, `OMP_NUM_THREADS=4 unicorn calibrate --json`
    """
    result = calibration.calibrate()
    typer.echo(json.dumps(result.to_dict(), indent=1) if as_json else str(result))


@app.command()
def download(
    model: Annotated[str, typer.Argument(help="Hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder to write; the Hugging Face cache without.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files and their sizes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a model from the Hugging Face hub. An interrupted download goes on where it stopped.

    Only what the model needs is fetched: safetensors, configuration, tokenizer.

    Examples: `unicorn download google/gemma-3-1b-it`, `unicorn download google/gemma-3-4b-it --to gemma --dry-run`
    """
    result = hub.download(model, revision, to, dry_run)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
    else:
        typer.echo(str(result))


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint written by `unicorn quantize`.")],
    repository: Annotated[str, typer.Option("--repo", help="Hub id to write to, such as me/gemma-3-4b-unicorn.")],
    yes: Annotated[bool, typer.Option("--yes", help="Really upload; without it the files are only listed.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a quantized checkpoint and show what would be uploaded to the hub; with --yes upload it.

    The base model's licence holds for what is made from it.

    Examples: `unicorn publish gemma-3-4b-unicorn --repo me/gemma-3-4b-unicorn`
    """
    result = hub.publish(folder, repository, upload=yes, private=not public)
    typer.echo(json.dumps(dataclasses.asdict(result)) if as_json else str(result))


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Local folder, hub id, or tiny.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    recipe: Recipe = "default",
    rule: Annotated[
        list[str] | None, typer.Option("--rule", metavar="REGEX=SCHEME", help="Scheme of matching modules; repeat.")
    ] = None,
    format: Annotated[str, typer.Option(help="unicorn, gguf or compressed-tensors.")] = "unicorn",
    calibration: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to run SRC on, to scale columns and weigh errors by. SRC must fit in RAM."),
    ] = None,
    outlier_bits: Annotated[
        float,
        typer.Option(
            "--outliers",
            metavar="BITS",
            help="Bits per weight to spend on what suffers most; with --calibration.",
        ),
    ] = 0.0,
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
        calibration=calibration,
        outlier_bits=outlier_bits,
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
def explain(
    model: Model = "tiny",
    recipe: Recipe = "default",
    measure: Annotated[
        int, typer.Option("--measure", min=0, metavar="TOKENS", help="Also time the regions, after such a prompt.")
    ] = 0,
    device: Devices = None,
    policy: Policy = "speed",
    plot: Annotated[Path | None, typer.Option(help="Also draw it here, .png or .svg (extra `plot`).")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the backend takes of a model, where, for how long by prediction, and what it leaves and why.

    Examples: `unicorn explain -m google/gemma-3-4b-it`, `unicorn explain -m gemma3-1b --measure 128 --plot plan.svg`,
    `unicorn explain --device vulkan --policy power`
    """
    options = _options(recipe, device, policy)
    compiled: Any = torch.compile(models.load(model), backend="unicorn", options=options)

    def generate(tokens: int, new: int) -> None:
        ids = models.sample_ids(tokens, model)
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        compiled.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    generate(EXPLAIN_TOKENS, 2)
    if measure:
        with timed(compiled):
            generate(measure, MEASURED_STEPS)
    explanation = unicorn_backend.explain(compiled)
    if plot is not None:
        picture.draw(explanation, plot)
    typer.echo(explanation.to_json() if as_json else str(explanation))


@app.command()
def bench(
    model: Model = "tiny",
    recipe: Recipe = "default",
    also: Annotated[list[str] | None, typer.Option(metavar="RECIPE", help="A further recipe; repeat.")] = None,
    device: Devices = None,
    policy: Policy = "speed",
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=0, help="0 leaves torch's choice.")] = 0,
    eager: Annotated[bool, typer.Option("--eager/--no-eager", help="Compare with eager bf16.")] = True,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LLAMA_BENCH", help="Compare with a program, which may bring its model: -m; repeat."),
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="Model file of the peers that have no -m.")] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Also first token and decode after a prompt of so many; repeat.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="OLD NEW", help="Measure nothing; compare two JSON files.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure tokens per second next to the memory ceiling and to eager bf16, interleaved.

    Examples: `unicorn bench`, `unicorn bench -m gemma3-1b -p 512 -n 128 --output 1b.json`,
    `unicorn bench --context 512 --context 2000`, `unicorn bench --device vulkan --policy fixed`,
    `unicorn bench --compare before.json after.json`,
    `unicorn bench -m gemma3-1b --peer llama.cpp=./llama-bench --gguf gemma-3-1b-q4_0.gguf`,
    `unicorn bench -m gemma3-1b --peer 'OpenVINO=PYTHON benchmarks/openvino_bench.py -m FOLDER'`
    """
    if compare is not None:
        changes = benchmark.compare(*map(benchmark.load_result, compare))
        typer.echo(json.dumps(changes, indent=2) if as_json else benchmark.compare_report(changes))
        return
    if threads:
        torch.set_num_threads(threads)
    options = _options(recipe, device, policy)
    sizes = prompt_tokens, new_tokens, rounds
    work = benchmark.Workload(model, *sizes, options, tuple(context or ()), tuple(also or ()))
    result = benchmark.bench(work, eager=eager, peers=[benchmark.Peer.parse(spec, gguf) for spec in peer or ()])
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(result, indent=2) if as_json else benchmark.report(result))


def _options(recipe: str, device: list[str] | None, policy: str, kv: str = "model") -> dict[str, Any]:
    """Of `torch.compile(options=)`, checked before anything is loaded."""
    options = {"recipe": recipe, "devices": ("cpu", *(device or ())), "policy": policy, "kv": kv}
    Options.parse(options)
    return options


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
