"""The `qwenlib` command: list, params, run, report, chat, verify, plan, bench, train-tokenizer,
cards.

Exit codes of `run`: 0 done, 1 a check or stage failed, 2 bad parameters, 3 something in the
environment is missing, 75 preempted (the same command goes on), 130 interrupted. Messages go to
stderr; the last line on stdout is JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from qwenlib import stages

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The Qwen2.5 technical report as notebooks you can run.",
)

RunDir = Annotated[str | None, typer.Option("--run-dir", help="Run folder [runs/default].")]


def main() -> None:
    """Entry point of the console script."""
    from qwenlib.notebook import die_with_runner

    die_with_runner()  # when a notebook's kernel started this command
    app()


def _console() -> Console:
    from rich.console import Console

    # A pipe or a log has no width; 80 columns would break words of the tables.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def _stop(code: int, message: str, **more: Any) -> NoReturn:
    """Explain on stderr, close stdout with a JSON line, leave with this exit code."""
    typer.secho(f"error: {message}", err=True, fg="red")
    print(json.dumps({"ok": False, "error": message, **more}, ensure_ascii=False), flush=True)
    raise typer.Exit(code)


@app.command("list")
def list_(run_dir: RunDir = None) -> None:
    """Chapters, what they need, and their state in a run folder."""
    from rich.table import Table

    from qwenlib.batch import graph

    folder = stages.resolve_run_dir(run_dir or "runs/default")
    table = Table("chapter", "title", "needs", f"state in {run_dir or 'runs/default'}")
    for name, chapter in graph.chapters().items():
        results = stages.read_json(folder / name / "results.json") or {}
        status = results.get("status", "not run")
        if status == "done":
            status = "done" if stages.finished(folder, name) else "files missing"
            status += f" ({results['profile']}, {results['seconds']:.0f} s)"
        needs = " ".join(need[:2] for need in chapter.needs) or "-"
        table.add_row(name, chapter.title, needs, status)
    _console().print(table)


@app.command("params")
def params_(chapter: Annotated[str, typer.Argument(help="8, 08 or 08_sft")]) -> None:
    """The typed parameters of a chapter and what each profile sets."""
    from rich.table import Table

    from qwenlib.batch import graph, params

    try:
        name = graph.find(chapter)
        rows, tables = params.table(name), stages.load_chapter(name).tables
    except stages.ParameterError as error:
        _stop(2, str(error))
    except params.EnvironmentProblem as error:
        _stop(3, str(error))
    table = Table("parameter", "type", "default", "tiny", "small", "full", "meaning", title=name)
    for row in rows.values():
        values = [str(tables[key].get(row.name, "")) for key in ("tiny", "small", "full")]
        default = "the profile's" if row.default is None else repr(row.default)
        table.add_row(row.name, str(row.type), default, *values, row.help)
    _console().print(table)


@app.command()
def run(
    chapter: Annotated[str, typer.Argument(help="8, 08, 08_sft, or all")],
    param: Annotated[
        list[str] | None, typer.Option("-p", "--param", metavar="NAME=VALUE", help="Repeatable.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="YAML file of parameters; -p wins.")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="tiny, small or full.")] = None,
    run_dir: RunDir = None,
    seed: Annotated[int | None, typer.Option(help="Every random choice follows from it.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print settings and resources; change nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Run again even when nothing has changed.")
    ] = False,
    grace: Annotated[
        float,
        typer.Option(min=1, help="Seconds to save in, after a SIGTERM or SIGUSR1."),
    ] = 25.0,
    requeue: Annotated[
        bool, typer.Option("--requeue", help="Under Slurm: once saved, queue this job again.")
    ] = False,
) -> None:
    """Run one chapter (with the missing ones it needs) or all; unchanged ones are skipped."""
    began = time.perf_counter()
    from qwenlib.batch import params, runner, signals

    try:
        job = signals.slurm_job() if requeue and not dry_run else ""
        texts = params.parse_assignments(param or [])
        values = params.read_file(file) if file else {}
        for name, value in {"profile": profile, "run_dir": run_dir, "seed": seed}.items():
            if value is None:
                continue
            if name in texts and texts[name] != str(value):
                raise stages.ParameterError(f"{name!r} is given twice: -p and its own option")
            texts[name] = str(value)
        plan = runner.make_plan(chapter, params.Given(values, texts))
    except stages.ParameterError as error:
        _stop(2, str(error), stages={})
    except params.EnvironmentProblem as error:
        _stop(3, str(error), stages={})
    if dry_run:
        _print_plan(plan)
        return
    from concurrent.futures import ThreadPoolExecutor

    from qwenlib.batch import report

    try:
        # A stage's page is written while the next stage starts; the block waits for the last one.
        with ThreadPoolExecutor(1) as writer:
            results = runner.execute(
                plan,
                runner.Progress(),
                force,
                lambda name: writer.submit(report.update, plan.run_dir, plan.graph, name),
                grace,
            )
    except params.EnvironmentProblem as error:
        _stop(3, str(error), stages={})
    code = runner.exit_code(results)
    typer.secho(f"report: {plan.run_dir / 'index.html'}", err=True)
    line = {
        "ok": code == 0,
        "seconds": round(time.perf_counter() - began, 2),
        "stages": {name: result.as_json() for name, result in results.items()},
    }
    print(json.dumps(line, ensure_ascii=False), flush=True)
    if job and code == signals.EXIT_CODE:
        # The last thing of all: Slurm ends the job when it queues it again.
        if problem := signals.requeue(job):
            typer.secho(f"error: {problem}", err=True, fg="red")
    raise typer.Exit(code)


def _print_plan(plan: Any) -> None:
    from rich.table import Table

    from qwenlib.batch import runner

    console, summary = _console(), {}
    for step, action, resources in runner.dry_run(plan):
        chapter = step.resolved.chapter
        table = Table("setting", "value", "from", "meaning", title=f"{step.name} · {chapter.title}")
        meaning = step.resolved.meanings(runner.params.table(step.name))
        for name, value in step.resolved.params.items():
            table.add_row(name, repr(value), step.resolved.origin[name], meaning[name])
        console.print(table)
        asks = ", ".join(
            f"{value} {unit}".strip()
            for key, unit in (("devices", ""), ("memory_gb", "GB memory"), ("hours", "hours"))
            if (value := resources.get(key)) is not None
        )
        console.print(f"  asks for: {asks or 'no estimate'}\n  would: {action}\n")
        summary[step.name] = {
            "status": "planned", "action": action, "resources": dict(resources), "metrics": {},
        }  # fmt: skip
    print(json.dumps({"ok": True, "dry_run": True, "seconds": 0.0, "stages": summary}), flush=True)


@app.command()
def report(
    run_dir: Annotated[str, typer.Argument(help="Run folder.")],
) -> None:
    """Write <run_dir>/index.html, one page about all its stages."""
    from qwenlib.batch import graph
    from qwenlib.batch import report as report_

    folder = stages.resolve_run_dir(run_dir)
    if not folder.is_dir():
        _stop(2, f"no run folder {run_dir}")
    print(report_.write(folder, graph.chapters()))


@app.command()
def chat(
    source: Annotated[
        str, typer.Argument(help="Model folder, .gguf file, hub id owner/name, or smollm2-135m.")
    ],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep so many likeliest tokens; 0: all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Talk to a model; one line a turn, an empty line or Ctrl-D ends, Ctrl-C cuts an answer."""
    from qwenlib.assets import AssetError

    try:
        from qwenlib.notebook import seed_everything

        where = seed_everything(seed, device)
        from qwenlib.generation import Sampling, stream, stream_text
        from qwenlib.model.checkpoint import load_pretrained
        from qwenlib.tokenizer import Tokenizer
        from qwenlib.tokenizer.chat import encode_chat

        options = {
            "temperature": temperature, "top_p": top_p, "top_k": top_k,
            "repetition_penalty": repetition_penalty,
        }  # fmt: skip
        Sampling(**options)  # refuses nonsense before the weights are read
        model = load_pretrained(source, device=where)
        tokenizer = Tokenizer.from_pretrained(source)
    except (OSError, ValueError, AssetError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(2) from None
    messages = [{"role": "system", "content": system}] if system else []
    stops = (tokenizer.eos_token_id, tokenizer.end_of_text_id)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        ids, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
        tokens = stream(model, ids, max_new_tokens, seed=seed, eos_ids=stops, **options)
        parts: list[str] = []
        try:
            for part in stream_text(tokenizer, tokens, hidden=stops):
                print(part, end="", flush=True)
                parts.append(part)
        except KeyboardInterrupt:
            pass  # what has been said stays said
        print(flush=True)
        messages.append({"role": "assistant", "content": "".join(parts)})


@app.command()
def verify(
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder, .gguf file, hub id or name; none: all shapes."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and tokens drawn.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print nothing but JSON.")] = False,
) -> None:
    """Compare with transformers: logits, paddings, packing, gradients, layer by layer.

    Without a model: the shapes of all releases, scaled down, with redrawn parameters. Exit code 1
    when a case differs by more than its tolerance.
    """
    from qwenlib.assets import AssetError
    from qwenlib.evaluation.verify import battery, model_cases

    cases = []
    try:
        for case in battery(seed) if model is None else model_cases(model, seed):
            cases.append(case)
            mark = "ok " if case.passed else "OFF"
            typer.secho(
                f"{mark} {case.difference:9.2e} of {case.tolerance:.0e}  {case.name}",
                err=True, fg=None if case.passed else "red",
            )  # fmt: skip
    except (OSError, ValueError, AssetError) as error:
        _stop(2, str(error))
    failed = [case for case in cases if not case.passed]
    if not json_:
        _print_layers(failed[0] if failed else max(cases, key=lambda case: len(case.layers)))
    worst = max((case.difference for case in cases if case.tolerance), default=0.0)
    line = {
        "cases": len(cases), "failed": [case.name for case in failed], "max_abs_diff": worst,
        "first": {case.name: case.first for case in failed},
    }  # fmt: skip
    print(json.dumps(line, ensure_ascii=False), flush=True)
    raise typer.Exit(1 if failed else 0)


def _print_layers(case: Any) -> None:
    from rich.table import Table

    table = Table("block", "relative difference", title=case.name)
    for name, value in case.layers.items():
        table.add_row(name, f"{value:.1e}", style="red" if not value <= case.tolerance else None)
    _console().print(table)
    if case.first:
        _console().print(f"first block that diverges: {case.first}")


@app.command("plan")
def plan_(
    model: Annotated[
        str | None, typer.Argument(help="A preset (7b, moe-a2.7b, report-72b) or a model folder.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="The same, as an option.")] = None,
    mode: Annotated[str, typer.Option(help="train or serve.")] = "train",
    gpu: Annotated[str | None, typer.Option(help="GPU type (default h100-sxm).")] = None,
    gpus: Annotated[int | None, typer.Option(help="How many (default train 8, serve 1).")] = None,
    utilisation: Annotated[
        float | None, typer.Option(help="Share of peak FLOP/s (default 0.4).")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Dollars a GPU-hour (default 2).")] = None,
    tokens: Annotated[
        float | None,
        typer.Option(help="train: tokens in all, e.g. 18e12 (default 20 a parameter)."),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="train: tokens (default 4096).")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(help="train: rows a pass (default 1).")] = None,
    global_batch: Annotated[
        int | None, typer.Option(help="train: rows a step (default one micro-batch a replica).")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="train: tokens a step, in place of --global-batch.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="train: mixed, bf16 or fp32 (default mixed).")
    ] = None,
    sharding: Annotated[
        str | None, typer.Option(help="train: none, zero1, fsdp (default fsdp).")
    ] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="train: degree (default 1).")] = None,
    checkpointing: Annotated[
        str | None, typer.Option(help="train: none, selective or full (default none).")
    ] = None,
    kernels: Annotated[
        str | None, typer.Option(help="train: fused, or reference as in PyTorch (default fused).")
    ] = None,
    loss_chunk: Annotated[
        int | None,
        typer.Option(help="train: tokens a chunk of the loss; 0: all at once (default 0)."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="serve: conversations at once (default 1).")
    ] = None,
    prompt_length: Annotated[int | None, typer.Option(help="serve: tokens (default 1024).")] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="serve: tokens written (default 256).")
    ] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="serve: prompt tokens in a block at once (default 8192).")
    ] = None,
    bandwidth_utilisation: Annotated[
        float | None, typer.Option(help="serve: share of peak bandwidth (default 0.6).")
    ] = None,
    only_json: Annotated[bool, typer.Option("--json", help="Print the JSON line alone.")] = False,
) -> None:
    """What training or serving a model takes: memory by kind, FLOPs, days, cost. Nothing runs."""
    given = {name: value for name, value in locals().items() if value is not None}
    for name in ("model", "preset", "mode", "batch_tokens", "only_json"):
        given.pop(name, None)
    if (model is None) == (preset is None):
        _stop(2, "give one model: a preset such as 7b or report-72b, or a folder")
    from qwenlib.model import planner

    try:
        if batch_tokens is not None:
            length = sequence_length or planner.Training.sequence_length
            given["global_batch"], rest = divmod(batch_tokens, length)
            if rest or mode != "train" or global_batch is not None:
                raise ValueError(
                    f"--batch-tokens {batch_tokens} stands for --global-batch of mode train, in "
                    f"rows of {length} tokens"
                )
        costs = planner.plan(model or preset, mode, **given)
    except (OSError, ValueError) as error:
        _stop(2, str(error))
    line = costs.as_json()
    if not only_json:
        _print_costs(line)
    print(json.dumps({"ok": True, "mode": mode, **line}, ensure_ascii=False), flush=True)


def _print_costs(costs: dict[str, Any]) -> None:
    from rich.table import Table

    def number(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return str(value)
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"

    settings, memory = costs["settings"], dict(costs["memory_bytes"])
    console, assumed = _console(), settings["assumed"]
    table = Table("setting", "value", "assumed" if assumed else "", title=settings["model"])
    for name, value in settings.items():
        if name not in ("model", "assumed"):
            table.add_row(name, number(value), assumed.get(name, ""))
    console.print(table)
    total, capacity = memory.pop("total") / 1e9, costs["gpu_memory_bytes"] / 1e9
    table = Table("memory on one GPU", "GB", show_footer=True)
    table.columns[0].footer = "total (the larger of logits and working)"
    table.columns[1].footer = f"{total:,.2f}"
    for kind, size in memory.items():
        if size:
            table.add_row(kind, f"{size / 1e9:,.2f}")
    console.print(table)
    console.print(f"  {'fits' if costs['fits'] else 'DOES NOT FIT'} in {capacity:,.0f} GB\n")
    table = Table("cost", "value")
    for name, value in costs.items():
        if name not in ("settings", "memory_bytes", "gpu_memory_bytes", "fits"):
            parts = value if isinstance(value, dict) else {"": value}
            for part, part_value in parts.items():
                label = f"{name} {part}".strip().replace("_", " ")
                table.add_row(label.replace("cost", "dollars"), number(part_value))
    console.print(table)


@app.command("bench")
def bench_(
    what: Annotated[str, typer.Argument(help="generate, forward, train or tokenizer")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    name: Annotated[str, typer.Option(help="Only cases with this in their name.")] = "",
    rounds: Annotated[int, typer.Option(help="Timed rounds of a case, both sides each.")] = 9,
    threads: Annotated[int | None, typer.Option(help="CPU threads [all cores].")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Our speed against the usual library's with the same output; above 1 ours is faster."""
    from qwenlib import bench

    def tell(line: str) -> None:
        typer.secho(line, err=True)

    try:
        if what == "tokenizer":
            if dtype != "float32" or device == "cuda":
                raise ValueError("bench tokenizer runs on the CPU: leave out --dtype and --device")
            device = "cpu"
        if what == "train" and dtype != "float32":
            raise ValueError("bench train keeps fp32 weights; its cases name their products' dtype")
        report = bench.run(
            bench.select(what, name), rounds=rounds, threads=threads, dtype=dtype, device=device,
            tell=tell,
        )  # fmt: skip
    except ValueError as error:
        _stop(2, str(error))
    if as_json:
        print(json.dumps(report.as_json(), ensure_ascii=False), flush=True)
    else:
        _print_bench(report)
    raise typer.Exit(1 if report.refused else 0)


def _print_bench(report: Any) -> None:
    from rich.table import Table

    from qwenlib.bench.runner import rate

    title = f"{report.device}, {report.dtype}, {report.threads} threads; ratio > 1: ours is faster"
    table = Table("case", "what", "ours", "peer", "unit", "ratio", "95 %", "against", title=title)
    memory = any("ours_mb" in row for row in report.rows)
    if memory:
        table.add_column("peak MB: ours")
        table.add_column("peer")
    for row in report.rows:
        peaks = [f"{row[key]:,.0f}" for key in ("ours_mb", "peer_mb")] if memory else []
        table.add_row(
            row["name"], row["about"], rate(row["ours"]), rate(row["peer"]), row["unit"],
            f"{row['ratio']:.2f}", f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
            row["peer_name"], *peaks,
        )  # fmt: skip
    _console().print(table)


def _check_folder(folder: Path) -> None:
    """Raise before the work and not after it when a folder cannot be written."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, {folder} cannot be a folder")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{there} cannot be written")


@app.command("train-tokenizer")
def train_tokenizer(
    files: Annotated[
        list[Path], typer.Argument(help="Texts: .txt (one text a file), .jsonl[.gz], .parquet.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Rows, 22 control tokens included.")] = 16384,
    column: Annotated[str, typer.Option(help="Of .jsonl and .parquet: the texts.")] = "text",
    workers: Annotated[int | None, typer.Option(help="Processes that count [all cores].")] = None,
    memory_mb: Annotated[
        int | None,
        typer.Option(help="Bound for tables; the rarest pre-tokens may be left out [no bound]."),
    ] = None,
    min_count: Annotated[int, typer.Option(help="A merged pair occurs so often at least.")] = 2,
    state: Annotated[
        Path | None, typer.Option(help="Folder from which the same command goes on when killed.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a tokenizer in --out.")] = False,
) -> None:
    """Train a byte-level BPE tokenizer; writes a Hugging Face folder and tokenizer.tiktoken."""
    import warnings

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from qwenlib.machine import cores
    from qwenlib.tokenizer import Tokenizer, train_bpe
    from qwenlib.tokenizer.text_files import check_files, read_texts

    began = time.perf_counter()
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    try:
        if (out / "tokenizer.json").exists() and not overwrite:
            raise ValueError(f"{out} holds a tokenizer: give --overwrite or another folder")
        if state is not None and state.resolve() == out.resolve():
            raise ValueError(f"--state and --out are both {out}: give two folders")
        _check_folder(out)
        check_files(files)
        with (
            warnings.catch_warnings(record=True) as caught,
            Progress(*columns, console=Console(stderr=True), transient=True) as bar,
        ):
            warnings.simplefilter("always")
            task = bar.add_task("reading", total=None)

            def tell(phase: str, done: int, total: int | None) -> None:
                label = f"read {done / 1e6:,.0f} MB" if phase == "read" else f"merges {done:,}"
                bar.update(task, completed=done, total=total, description=label)

            merges = train_bpe(
                read_texts(files, column), vocab_size, tell, min_count,
                workers=cores() if workers is None else workers, memory_mb=memory_mb,
                state_dir=state,
            )  # fmt: skip
        notes = [str(warning.message) for warning in caught]
        tokenizer = Tokenizer.from_merges(merges)
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save_tiktoken(out / "tokenizer.tiktoken")
        tokenizer.save_pretrained(out)
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        _stop(2, str(error))
    except KeyboardInterrupt:
        again = "; the same command goes on from here" if state else ""
        _stop(130, f"interrupted{again}")
    for note in notes:
        typer.secho(f"warning: {note}", err=True, fg="yellow")
    line = {
        "ok": True, "folder": str(out), "vocab_size": tokenizer.vocab_size, "merges": len(merges),
        "seconds": round(time.perf_counter() - began, 2), "warnings": notes,
    }  # fmt: skip
    print(json.dumps(line, ensure_ascii=False), flush=True)


@app.command()
def cards(
    cards_dir: Annotated[Path | None, typer.Option(help="Folder of the data cards.")] = None,
) -> None:
    """Check the data cards against the registry, the notebooks and the profiles."""
    from qwenlib.batch.cards import check_cards

    try:
        notebooks = stages.notebooks_dir()
        folder = cards_dir or notebooks.parent / "data_cards"
        problems = check_cards(folder, notebooks, stages.profiles_dir())
    except FileNotFoundError as error:
        _stop(3, str(error))
    for problem in problems:
        typer.secho(str(problem), err=True, fg="red")
    count = len([path for path in folder.glob("*.md") if path.name != "README.md"])
    print(json.dumps({"ok": not problems, "cards": count, "problems": len(problems)}))
    raise typer.Exit(1 if problems else 0)
