"""The `qwenlib` command: list, params, run, report, chat, cards.

Exit codes of `run`: 0 done, 1 a check or stage failed, 2 bad parameters, 3 something in the
environment is missing, 130 interrupted. Messages go to stderr; the last line on stdout is JSON.
"""

from __future__ import annotations

import json
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
) -> None:
    """Run one chapter (with the missing ones it needs) or all; unchanged ones are skipped."""
    began = time.perf_counter()
    from qwenlib.batch import params, runner

    try:
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
    from qwenlib.batch import report

    try:
        results = runner.execute(
            plan,
            runner.Progress(),
            force,
            lambda name: report.update(plan.run_dir, plan.graph, name),
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
    raise typer.Exit(code)


def _print_plan(plan: Any) -> None:
    from rich.table import Table

    from qwenlib.batch import runner

    console, summary = _console(), {}
    for step, action, resources in runner.dry_run(plan):
        chapter = step.resolved.chapter
        table = Table("setting", "value", "from", "meaning", title=f"{step.name} · {chapter.title}")
        helps = {**{k: p.help for k, p in runner.params.table(step.name).items()}, **chapter.help}
        for name, value in step.resolved.params.items():
            table.add_row(name, repr(value), step.resolved.origin[name], helps.get(name, ""))
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
    model_dir: Annotated[
        Path, typer.Argument(help="A model folder, e.g. runs/default/08_sft/model")
    ],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Talk to a model folder; one line a turn, an empty line or Ctrl-D ends."""
    try:
        from qwenlib.notebook import seed_everything

        where = seed_everything(seed, device)
        from qwenlib.generation import generate
        from qwenlib.model.checkpoint import load_pretrained
        from qwenlib.tokenizer import Tokenizer
        from qwenlib.tokenizer.chat import encode_chat

        model = load_pretrained(model_dir, device=where)
        tokenizer = Tokenizer.from_pretrained(model_dir)
    except (OSError, ValueError) as error:
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
        answer = generate(
            model, [ids], max_new_tokens, temperature=temperature, seed=seed, eos_ids=stops
        ).completions[0]
        reply = tokenizer.decode([i for i in answer if i not in stops])
        print(reply, flush=True)
        messages.append({"role": "assistant", "content": reply})


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
