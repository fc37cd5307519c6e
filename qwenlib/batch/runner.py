"""Strict papermill runner: everything is checked before a kernel starts, nothing runs twice.

A stage is skipped when its `results.json` says done under the same fingerprint (parameters,
notebook, library, inputs), so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenlib import machine, stages
from qwenlib.batch import graph as graph_
from qwenlib.batch import params
from qwenlib.batch.kernels import KernelParent
from qwenlib.batch.params import EnvironmentProblem, Given
from qwenlib.batch.signals import EXIT_CODE, GRACE, Notice

# Settings of the caller that stages built on the way share with the one that was asked for.
SHARED = ("profile", "seed", "device", "run_dir", "wandb_mode", "missing_input")
BEAT = 20.0  # seconds between progress lines when the terminal cannot redraw


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage of a plan: its settings, and the values its notebook is given."""

    name: str
    resolved: stages.Resolved
    given: dict[str, Any]
    asked: bool  # False: only here because another stage needs it


@dataclasses.dataclass(frozen=True)
class Plan:
    """Stages to run, in order, with everything validated."""

    run_dir: Path
    steps: tuple[Step, ...]
    graph: Mapping[str, stages.Chapter]


@dataclasses.dataclass
class Result:
    """How a stage ended: done, failed, blocked, preempted or interrupted."""

    status: str
    seconds: float = 0.0
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    skipped: bool = False
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        line: dict[str, Any] = {
            "status": self.status, "seconds": round(self.seconds, 2), "metrics": self.metrics,
        }  # fmt: skip
        if self.skipped:
            line["skipped"] = True
        if self.error:
            line["error"] = self.error
        return line


def make_plan(target: str, given: Given) -> Plan:
    """Validate a request for one chapter (`8`, `08`, `08_sft`) or `all`; starts nothing.

    Raises ParameterError for a bad chapter or parameter and EnvironmentProblem for a missing
    notebook.
    """
    graph = graph_.chapters()
    if not graph:
        raise EnvironmentProblem(
            f"no chapter has both a profile ({stages.profiles_dir()}) and a notebook; "
            "set QWENLIB_NOTEBOOKS to the notebooks folder of the repository"
        )
    ordered = graph_.order(graph)
    if target == "all":
        params.refuse_unknown(given, ordered)
        wanted = dict.fromkeys(ordered, given)
    else:
        name = graph_.find(target, graph)
        params.refuse_unknown(given, [name])
        wanted = {name: given}
        for need in graph_.ancestors(graph, name):
            wanted[need] = given.only(SHARED)
    steps, run_dirs = [], set()
    for name in ordered:
        if name in wanted:
            resolved, typed = params.resolve(name, wanted[name])
            asked = target == "all" or name == graph_.find(target, graph)
            steps.append(Step(name, resolved, typed, asked))
            run_dirs.add(resolved.params["run_dir"])
    if len(run_dirs) != 1:
        raise stages.ParameterError(
            f"the chapters have different run folders {sorted(run_dirs)}; give --run-dir"
        )
    run_dir = stages.resolve_run_dir(run_dirs.pop())
    if target != "all":
        # A stage that is only needed runs when it, or something it needs, is missing.
        missing: set[str] = set()
        for step in steps:
            if stages.finished(run_dir, step.name) is None:
                missing.add(step.name)
        last = next(step for step in steps if step.asked)
        needed = {last.name} | _needed(graph, stages.needs(last.resolved, run_dir), missing)
        steps = [step for step in steps if step.name in needed]
    return Plan(run_dir, tuple(steps), graph)


def _needed(
    graph: Mapping[str, stages.Chapter], needs: Sequence[str], missing: set[str]
) -> set[str]:
    """Missing stages among `needs` and on the way to them; a finished one hides what it needed."""
    found: set[str] = set()
    for need in needs:
        if need in missing and need not in found:
            found |= {need} | _needed(graph, graph[need].needs, missing)
    return found


def state(plan: Plan, step: Step) -> tuple[bool, str]:
    """Whether a stage can be skipped, and why (not); raises nothing for missing inputs."""
    results = stages.finished(plan.run_dir, step.name)
    try:
        fingerprint, parts = stages.fingerprint(step.resolved, plan.run_dir)
    except stages.MissingInput as error:
        return False, str(error)
    if results is None:
        stage_dir = plan.run_dir / step.name
        begun = stages.read_json(stage_dir / "started.json") or {}
        old = stages.read_json(stage_dir / "results.json") or {}
        if begun.get("fingerprint") != fingerprint:
            return False, "not run yet"
        return False, {"failed": "failed before", "done": "files missing"}.get(
            old.get("status"), "was interrupted, goes on"
        )
    if results["fingerprint"] == fingerprint:
        return True, "unchanged"
    return False, stages.what_changed(results.get("fingerprint_parts"), parts)


def execute(
    plan: Plan,
    progress: Progress,
    force: bool = False,
    after_stage: Callable[[str], None] = lambda name: None,
    grace: float = GRACE,
) -> dict[str, Result]:
    """Run the stages of a plan; a failure blocks only the stages that need the failed one.

    On SIGINT the kernel is ended and the stage counts as interrupted; on SIGTERM or SIGUSR1 it has
    `grace` seconds to save (see `Notice`) and counts as preempted. The rest is left for the next
    call.
    """
    results: dict[str, Result] = {}
    with _kernel_environment(), KernelParent() as parent, Notice(parent, grace) as notice:
        for number, step in enumerate(plan.steps, 1):
            if notice.number:
                results[step.name] = Result("preempted", error="not begun")
                progress.stage_end(step.name, "preempted", 0.0, "not begun")
                break
            failed = [
                need
                for need in stages.needs(step.resolved, plan.run_dir)
                if need in results and results[need].status != "done"
            ]
            if failed:
                text = f"needs {', '.join(failed)}"
                results[step.name] = Result("blocked", error=text)
                progress.stage_end(step.name, "blocked", 0.0, text)
                continue
            try:
                results[step.name] = _run_step(
                    plan, step, force and step.asked, progress, number, parent, notice
                )
            except KeyboardInterrupt:
                results[step.name] = Result("interrupted", error="interrupted")
                progress.stage_end(step.name, "interrupted", 0.0, "run again to go on")
                break
            after_stage(step.name)
            if results[step.name].status == "preempted":
                break
    return results


def _run_step(
    plan: Plan, step: Step, force: bool, progress: Progress, number: int, parent: KernelParent,
    notice: Notice,
) -> Result:  # fmt: skip
    stage_dir = plan.run_dir / step.name
    stage_dir.mkdir(parents=True, exist_ok=True)
    with _only_writer(stage_dir, step.name):
        unchanged, reason = state(plan, step)
        if unchanged and not force:
            old = stages.finished(plan.run_dir, step.name)
            progress.stage_end(step.name, "done", old["seconds"], "unchanged, skipped")
            return Result("done", old["seconds"], old["metrics"], skipped=True)
        if force:
            stages.set_aside(plan.run_dir, step.name)
        began = time.perf_counter()
        progress.stage_start(step.name, number, len(plan.steps), "forced" if force else reason)
        parent.start()
        try:
            _papermill(step, stage_dir / "notebook.ipynb", progress, parent)
        except _Failed as failure:
            if failure.died and notice.number:
                failure = _Failed(str(notice), "", "preempted")
            seconds = time.perf_counter() - began
            _record_failure(plan, step, failure, seconds)
            progress.stage_end(step.name, failure.status, seconds, str(failure))
            return Result(failure.status, seconds, error=failure.short)
        results = stages.finished(plan.run_dir, step.name)
        seconds = time.perf_counter() - began
        if results is None:
            failure = _Failed("the notebook ended without run.finish(...)", "")
            _record_failure(plan, step, failure, seconds)
            progress.stage_end(step.name, "failed", seconds, failure.short)
            return Result("failed", seconds, error=failure.short)
        progress.stage_end(step.name, "done", seconds, _some(results["metrics"]))
        return Result("done", results["seconds"], results["metrics"])


def _some(metrics: Mapping[str, Any]) -> str:
    """The first three numbers of a stage, for its progress line."""
    numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
    return ", ".join(f"{k} {v:.4g}" for k, v in list(numbers.items())[:3])


class _Failed(Exception):
    """A notebook that did not reach its end: `short` for tables, `str()` with the cell."""

    def __init__(self, short: str, detail: str, status: str = "failed", died: bool = False):
        super().__init__(f"{short}\n{detail}".rstrip())
        self.short, self.status, self.died = short, status, died


def _papermill(step: Step, output: Path, progress: Progress, parent: KernelParent) -> None:
    try:
        import papermill
        from jupyter_client.kernelspec import NoSuchKernel
        from nbclient.exceptions import DeadKernelError
        from papermill.engines import NBClientEngine, papermill_engines
    except ImportError as error:
        raise EnvironmentProblem(
            f"{error}; install the notebook packages:  pip install 'qwenlib[notebooks]'"
        ) from None

    class Engine(NBClientEngine):
        """papermill's own engine; tells the progress display about each cell, saves less often."""

        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
            cells = nb_man.nb.cells
            headings, heading = [], ""
            for cell in cells:
                if cell.cell_type == "markdown":
                    found = re.findall(r"^#+ +(.+)$", cell.source, re.M)
                    heading = found[-1] if found else heading
                headings.append(heading)
            plain_start, plain_complete = nb_man.cell_start, nb_man.cell_complete

            def cell_start(cell, cell_index=None, **more):
                progress.cell(step.name, cell_index + 1, len(cells), headings[cell_index])
                with saving(nb_man, cell.cell_type == "code"):
                    plain_start(cell, cell_index, **more)

            def cell_complete(cell, cell_index=None, **more):
                with saving(nb_man, False):
                    plain_complete(cell, cell_index, **more)

            nb_man.cell_start, nb_man.cell_complete = cell_start, cell_complete
            return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)

    @contextlib.contextmanager
    def saving(nb_man, wanted):
        """papermill writes the file before and after every cell; before each code cell will do."""
        path = nb_man.output_path
        nb_man.output_path = path if wanted else None
        try:
            yield
        finally:
            nb_man.output_path = path

    papermill_engines.register("qwenlib", Engine)
    try:
        papermill.execute_notebook(
            params.notebook_path(step.name),
            output,
            parameters=step.given,
            engine_name="qwenlib",
            kernel_name="python3",
            language="python",
            progress_bar=False,
            kernel_manager_class=parent.manager_class(),
            start_timeout=180,
            autosave_cell_every=10,
            request_save_on_cell_execute=True,
            extra_arguments=["--log-level=50"],  # the kernel's own notes; cell output is kept
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == "Preempted":  # the training loop's own
            raise _Failed(error.evalue, "", "preempted") from None
        # papermill counts the cell of injected values; the reader looks at the executed file.
        excerpt = "\n".join("    " + line for line in error.source.strip().splitlines()[:12])
        detail = f"  cell {error.cell_index + 1} of {output}:\n{excerpt}"
        short = f"cell {error.cell_index + 1}: {error.ename}: {error.evalue}".strip(": ")
        raise _Failed(short, detail) from None
    except DeadKernelError:
        text = "the kernel died (often: out of memory)"
        raise _Failed(text, f"  see {output}", died=True) from None
    except NoSuchKernel as error:
        raise EnvironmentProblem(f"{error}; install it:  pip install ipykernel") from None
    except RuntimeError as error:  # the kernel did not come up
        raise _Failed(f"the kernel did not start: {error}", "", died=True) from None


def _record_failure(plan: Plan, step: Step, failure: _Failed, seconds: float) -> None:
    """Say in results.json how the stage ended, keeping what the notebook recorded itself."""
    path = plan.run_dir / step.name / "results.json"
    recorded = stages.read_json(path) or {}
    note = stages.read_json(path.with_name("started.json")) or {}
    if failure.status == "preempted" and note.get("runner") != os.getpid():
        return  # it had not begun: what lies there is an earlier run's
    base = {
        "stage": step.name, "title": step.resolved.chapter.title, "metrics": {}, "checks": [],
        "compare": [], "figures": [], "key_figure": None, "profile": step.resolved.profile,
        "parameters": step.resolved.params,
    }  # fmt: skip
    stages.write_json(
        path,
        base | recorded
        | {"status": failure.status, "error": failure.short, "seconds": round(seconds, 2)},
    )  # fmt: skip


# ---------------------------------------------------------------- processes


@contextlib.contextmanager
def _only_writer(stage_dir: Path, name: str) -> Iterator[None]:
    """Hold the stage folder; ends a kernel that outlived its killed runner.

    Raises EnvironmentProblem while another runner works in it.
    """
    with (stage_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EnvironmentProblem(
                f"another qwenlib run is working on {name} in {stage_dir.parent}; wait for it, "
                "stop it, or choose another --run-dir"
            ) from None
        _end_leftover_kernel(stage_dir)
        yield


def _end_leftover_kernel(stage_dir: Path) -> None:
    """Kill the kernel noted in `started.json` when the runner that owned it is gone."""
    note = stages.read_json(stage_dir / "started.json") or {}
    if "runner" not in note or note.get("host") != socket.gethostname():
        return
    pid = note["pid"]
    if note.get("pid_started") is None or stages.process_started(pid) != note["pid_started"]:
        return
    if stages.process_started(note["runner"]) == note["runner_started"]:
        return  # its runner lives and has left this stage: the kernel is already closing
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for _ in range(100):
        if stages.process_started(pid) != note["pid_started"]:
            return
        time.sleep(0.05)
    raise EnvironmentProblem(f"process {pid} still writes to {stage_dir} and does not end")


@contextlib.contextmanager
def _kernel_environment() -> Iterator[None]:
    """Environment of the kernels: deterministic hashing, one thread count, our package."""
    old = dict(os.environ)
    os.environ["PYTHONHASHSEED"] = "0"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["WANDB_SILENT"] = "true"
    os.environ["QWENLIB_RUNNER_PID"] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(machine.cores()))
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a warning on Python 3.11+
    paths = [str(stages.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(old)


# ---------------------------------------------------------------- progress


class Progress:
    """Progress on stderr: a live line in a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self._live: Any = None
        self._beat: Any = None
        self._now = ""

    def stage_start(self, name: str, number: int, total: int, reason: str) -> None:
        self.console.print(
            f"[bold]{number}/{total} {name}[/bold]  [dim]{reason}[/dim]", soft_wrap=True
        )
        self._began = time.monotonic()
        self._now = "starting the kernel"
        if sys.stderr.isatty():
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._live = Bar(
                SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"),
                TimeElapsedColumn(), console=self.console, transient=True,
            )  # fmt: skip
            self._task = self._live.add_task(self._now, total=None)
            self._live.start()
        else:
            import threading

            self._beat = threading.Event()
            threading.Thread(target=self._beats, args=(self._beat, name), daemon=True).start()

    def _beats(self, stop: Any, name: str) -> None:
        while not stop.wait(BEAT):
            print(
                f"    {name}  {self._now}  {time.monotonic() - self._began:.0f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def cell(self, name: str, index: int, total: int, heading: str) -> None:
        self._now = f"cell {index}/{total} · {heading}"
        if self._live:
            from rich.markup import escape

            self._live.update(
                self._task, completed=index - 1, total=total, description=escape(self._now)
            )

    def stage_end(self, name: str, status: str, seconds: float, text: str) -> None:
        if self._live:
            self._live.stop()
        if self._beat:
            self._beat.set()
        self._live = self._beat = None
        mark, colour = {
            "done": ("✓", "green"), "blocked": ("–", "yellow"), "preempted": ("–", "yellow"),
        }.get(status, ("✗", "red"))  # fmt: skip
        from rich.markup import escape

        line = f"  [{colour}]{mark} {name}[/{colour}] {status} {seconds:.1f} s"
        self.console.print(f"{line}  [dim]{escape(text)}[/dim]", soft_wrap=True)


def exit_code(results: Mapping[str, Result]) -> int:
    """0 when every stage is done, 1 otherwise (130 after an interrupt, 75 when preempted)."""
    ends = {result.status for result in results.values()}
    if ends & {"interrupted", "preempted"}:
        return 130 if "interrupted" in ends else EXIT_CODE
    return 0 if all(result.status == "done" for result in results.values()) else 1


def dry_run(plan: Plan) -> Sequence[tuple[Step, str, Mapping[str, Any]]]:
    """For each stage: the step, what would happen, and the resources its profile asks for."""
    rows = []
    will_run: set[str] = set()
    for step in plan.steps:
        unchanged, reason = state(plan, step)
        rerun = will_run & set(stages.needs(step.resolved, plan.run_dir))
        if rerun:
            unchanged, reason = False, f"after {', '.join(sorted(rerun))}"
        if not unchanged:
            will_run.add(step.name)
        resources = step.resolved.chapter.resources
        profile = step.resolved.profile
        what = resources.get(profile) or resources.get("tiny" if profile == "smoke" else "", {})
        rows.append((step, "skip (unchanged)" if unchanged else f"run ({reason})", what))
    return rows
