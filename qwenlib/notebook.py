"""Start, record and finish one chapter: parameters in, checks, figures and `results.json` out.

A notebook calls `run = start("08_sft", globals())` after its parameters cell and `run.finish(...)`
in its last cell. Everything a stage writes goes to `run.dir` = `<run_dir>/<chapter>/`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import inspect
import io
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenlib import plotting, stages
from qwenlib.machine import cores, peak_memory_mb
from qwenlib.recorder import Recorder, plain

PACKAGES = (
    "torch", "numpy", "transformers", "datasets", "tokenizers", "scikit-learn", "wandb",
    "papermill",
)  # fmt: skip
_REMEMBERED = "_qwenlib_parameters"  # names of the parameters cell, kept for a second start()


class Params:
    """All settings of the stage as attributes: `p.learning_rate`; `dict(p)` also works."""

    def __init__(self, values: Mapping[str, Any]):
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no parameter {name!r}" + stages.nearest(name, self.__dict__))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"parameters are fixed after start(); change {name!r} in its cell")

    def __repr__(self) -> str:
        return f"Params({', '.join(f'{k}={v!r}' for k, v in self.__dict__.items())})"

    def keys(self) -> list[str]:
        return list(self.__dict__)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def start(chapter: str, namespace: dict[str, Any]) -> Run:
    """Validate the parameters cell, seed everything, open the stage folder; returns the `Run`.

    `namespace` is the notebook's `globals()`: the annotated names of the parameters cell are the
    parameters. Missing stages that this one needs are built first (or `missing_input="stop"`).
    Raises ParameterError for a bad parameter and MissingInput for a missing stage.
    """
    annotations = namespace.get("__annotations__", {})
    names = namespace.setdefault(_REMEMBERED, list(annotations))
    types = {}
    for name in names:
        try:
            types[name] = stages.ParameterType.parse(annotations[name])
        except stages.ParameterError as error:
            raise stages.ParameterError(f"parameter {name!r}: {error}") from None
    resolved = stages.resolve(chapter, {name: namespace[name] for name in names}, types)
    die_with_runner()
    run = Run(resolved)
    run._open()
    return run


class Run:
    """One execution of a chapter; made by `start`."""

    def __init__(self, resolved: stages.Resolved):
        self.chapter = resolved.chapter.name
        self.profile = resolved.profile
        self.params = Params(resolved.params)
        self.run_dir = stages.resolve_run_dir(self.params.run_dir)
        self.dir = self.run_dir / self.chapter
        self._resolved = resolved
        self._began = time.perf_counter()
        self._checks: dict[str, dict[str, Any]] = {}
        self._figures: list[str] = []
        self._compare: list[dict[str, Any]] = []

    # ------------------------------------------------------------ start

    def _open(self) -> None:
        self._needs = stages.needs(self._resolved, self.run_dir)
        for need in self._needs:
            self._ensure(need)
        self._began = time.perf_counter()  # time of this stage, without the ones it had to build
        self.device = seed_everything(self.params.seed, self.params.device)
        self._fingerprint, self._parts = stages.fingerprint(self._resolved, self.run_dir)
        self._recorder = Recorder(
            self.dir, wandb_mode=self.params.wandb_mode, identity=self._fingerprint,
            name=f"{self.run_dir.name}/{self.chapter}", config=dict(self.params),
        )  # fmt: skip
        before = stages.read_json(self.dir / "results.json") or {}
        begun = stages.read_json(self.dir / "started.json") or before
        resumed = begun.get("fingerprint") == self._fingerprint
        if begun and not resumed:
            # Nothing of another run may be resumed or handed on.
            stages.set_aside(self.run_dir, self.chapter)
        (self.dir / "figures").mkdir(parents=True, exist_ok=True)
        note = stages.started_note(self._fingerprint, self._parts)
        stages.write_json(self.dir / "started.json", note)
        plotting.style()
        self._print_header(begun, resumed, before.get("status") == "done")

    def _print_header(self, begun: Mapping[str, Any], resumed: bool, done: bool) -> None:
        params, path = self._resolved.params, stages.find_notebook(self.chapter)
        meaning = self._resolved.meanings(stages.notebook_parameters(path) if path else {})
        lines = ["| parameter | value | from | meaning |", "|---|---|---|---|"]
        for name, value in params.items():
            cells = (name, f"`{value!r}`", self._resolved.origin[name], meaning[name])
            lines.append("| " + " | ".join(_escape(cell) for cell in cells) + " |")
        where = f"`{Path(params['run_dir']) / self.chapter}`"
        if begun and not resumed:
            note = f"An earlier run with other settings or source was set aside ({where})."
        elif resumed and not done:
            note = f"Goes on with an interrupted run ({where})."
        else:
            note = f"Writes to {where}."
        facts = self._environment()
        versions = " · ".join(f"{k} {v}" for k, v in facts["versions"].items())
        lines += [
            "",
            f"{note} Seed {params['seed']}, device **{facts['device']}**, {facts['threads']} CPU "
            f"threads, Python {facts['python']}, revision `{facts['git']}`.",
            f"<small>{versions}</small>",
        ]
        _show_markdown("\n".join(lines))

    def _environment(self) -> dict[str, Any]:
        import torch

        device = self.device.type
        if device == "cuda":
            device = f"cuda ({torch.cuda.get_device_name(self.device)})"
        return {
            "device": device,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "git": git_revision(),
            "versions": versions(),
        }

    # ------------------------------------------------------------ inputs

    def input(self, stage: str) -> Path:
        """Folder of a finished earlier stage; builds it or stops when it is missing."""
        needs = self._needs
        if stage in self._resolved.chapter.needs and stage not in needs:
            raise stages.MissingInput(
                f"{self.chapter} does not read {stage} when {', '.join(self._resolved.models)} "
                "is given"
            )
        if stage not in needs:
            raise stages.MissingInput(
                f"{stage!r} is not among the needs of {self.chapter} (its profile file lists "
                f"{', '.join(needs) or 'none'})" + stages.nearest(stage, needs)
            )
        self._ensure(stage)
        return self.run_dir / stage

    def has_input(self, stage: str) -> bool:
        """Whether this run reads `stage`: not where a model named by a parameter stands in."""
        return stage in self._needs

    def model_from(self, stage: str, *names: str) -> str | Path:
        """A model to load: that of the first parameter of `names` that is set, else of `stage`.

        A model named by a parameter comes as a path, hub id or registered name, and with a note
        of the settings that suit it where the profile's are for the walk's own models.
        """
        for name in names or ("base_model",):
            if (value := self.params[name]) is not None:
                print(f"note: {name}={value} stands in for the model of {stage}")
                self._suggest(name)
                return stages.model_source(value)
        return self.input(stage) / "model"

    def _suggest(self, name: str) -> None:
        lower = {
            key: value
            for key, value in self._resolved.chapter.models[name]["suggested"].items()
            if self._resolved.origin[key] != "parameter" and self.params[key] > value
        }
        if lower and self.profile in ("tiny", "smoke"):
            ours = ", ".join(f"{key}={self.params[key]!r}" for key in lower)
            theirs = " ".join(f"-p {key}={value!r}" for key, value in lower.items())
            print(f"note: {ours} of the profile suits models of a million parameters; for one of "
                  f"a hundred million begin with  {theirs}")  # fmt: skip

    def _ensure(self, stage: str) -> None:
        results = stages.finished(self.run_dir, stage)
        if results is None:
            self._build(stage)
        elif results["profile"] != self.profile:
            print(
                f"note: {stage} in {self.params.run_dir} was run under profile "
                f"{results['profile']!r}; this stage runs under {self.profile!r}"
            )

    def _build(self, stage: str) -> None:
        arguments = ["run", stage, "--profile", self.profile, "--seed", str(self.params.seed)]
        arguments += ["--run-dir", str(self.params.run_dir)]
        command = " ".join(["qwenlib", *arguments])
        if self.params.missing_input == "stop":
            raise stages.MissingInput(
                f"{self.chapter} needs {stage}, which is not finished in {self.params.run_dir}. "
                f"Run:  {command}"
            )
        print(f"{self.chapter} needs {stage}, which is missing here; building it:\n  {command}")
        arguments += [
            "-p",
            f"device={self.params.device}",
            "-p",
            f"wandb_mode={self.params.wandb_mode}",
        ]
        env = dict(os.environ, QWENLIB_RUNNER_PID=str(os.getpid()), PYTHONUNBUFFERED="1")
        for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "CLICOLOR"):  # set by ipykernel
            env.pop(name, None)
        env["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(stages.PACKAGE.parent), env.get("PYTHONPATH")])
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "qwenlib", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
        )  # fmt: skip
        last: list[str] = []
        try:
            for line in process.stdout:
                last = [*last[-30:], line]
                if not line.startswith("{"):  # the closing JSON is for programs
                    print("  " + line, end="", flush=True)
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode or stages.finished(self.run_dir, stage) is None:
            raise stages.MissingInput(
                f"building {stage} failed (exit code {process.returncode}); try it alone:  "
                f"{command}\n{''.join(last)}"
            )

    # ------------------------------------------------------------ records

    def check(self, name: str, condition: Any, text: str, quality: bool = False) -> None:
        """Record and print a check; raises AssertionError when it does not hold.

        `quality=True`: about how good a result is; only reported under the `smoke` profile and
        for a model named by a parameter, as its bounds are those of the walk's own models.
        """
        free = "smoke" if self.profile == "smoke" else next(iter(self._resolved.models), None)
        passed, enforced = bool(condition), not (quality and free)
        self._checks[name] = {
            "name": name, "passed": passed, "text": text, "quality": quality, "enforced": enforced,
        }  # fmt: skip
        print(f"{'✓' if passed else '✗' if enforced else '○'} {name}: {text}"
              + ("" if passed or enforced else f"  (not enforced under {free})"))  # fmt: skip
        if enforced and not passed:
            self._write("failed", {}, None, error=f"check {name!r} failed: {text}")
            raise AssertionError(f"check {name!r} failed: {text}")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Append numbers of one step to `metrics.jsonl` and to wandb."""
        self._recorder.log(metrics, step)

    def history(self) -> list[dict[str, Any]]:
        """All rows of `metrics.jsonl` (a half-written last line of a killed run is left out)."""
        return self._recorder.history()

    def figure(self, fig: Any, name: str) -> None:
        """Save a matplotlib figure (or seaborn grid) as `figures/<name>.png`, show and close it."""
        import matplotlib.pyplot as plt

        fig = getattr(fig, "figure", fig)
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
        plt.close(fig)
        png = plotting.small_png(buffer.getvalue())
        path = self.dir / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
        if name not in self._figures:
            self._figures.append(name)
        if _in_ipython():
            from IPython.display import Image, display

            display(Image(data=png, format="png"))

    def compare(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show and record the table "Report versus here"; rows: quantity, report, here, why."""
        columns = ("quantity", "report", "here", "why")
        for row in rows:
            if set(row) != set(columns):
                raise ValueError(f"a row of compare() has the keys {columns}, got {tuple(row)}")
        self._compare = [plain(row) for row in rows]
        lines = ["| | report | here | why they differ |", "|---|---|---|---|"]
        lines += [
            "| " + " | ".join(_escape(_short(row[c])) for c in columns) + " |" for row in rows
        ]
        _show_markdown("\n".join(lines))

    def finish(self, metrics: Mapping[str, Any], key_figure: str | None = None) -> None:
        """Write `results.json` and print one JSON line; the stage counts as done from here on."""
        if key_figure is not None and key_figure not in self._figures:
            raise ValueError(
                f"no figure {key_figure!r}" + stages.nearest(key_figure, self._figures)
            )
        metrics = plain(metrics)
        self._recorder.finish(metrics)
        results = self._write("done", metrics, key_figure)
        line = {
            "ok": True,
            "stage": self.chapter,
            "seconds": results["seconds"],
            "metrics": metrics,
        }
        print(json.dumps(line, ensure_ascii=False))

    def _write(
        self, status: str, metrics: Mapping[str, Any], key_figure: str | None, error: str = ""
    ) -> dict[str, Any]:
        results = {
            "stage": self.chapter,
            "title": self._resolved.chapter.title,
            "status": status,
            "error": error,
            "profile": self.profile,
            "seconds": round(time.perf_counter() - self._began, 2),
            "peak_memory_mb": peak_memory_mb(self.device),
            "metrics": dict(metrics),
            "checks": list(self._checks.values()),
            "compare": self._compare,
            "figures": self._figures,
            "key_figure": key_figure,
            "parameters": plain(dict(self.params)),
            "parameters_from": self._resolved.origin,
            "outputs": stages.outputs(self.dir),
            "fingerprint": self._fingerprint,
            "fingerprint_parts": self._parts,
            "environment": self._environment(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        stages.write_json(self.dir / "results.json", results)
        return results


def show(thing: Any) -> None:
    """Display the library source of a function, class or module, highlighted."""
    thing = inspect.unwrap(thing) if callable(thing) else thing
    lines, first = inspect.getsourcelines(thing)
    path = Path(inspect.getsourcefile(thing))
    with contextlib.suppress(ValueError):
        path = path.relative_to(stages.PACKAGE.parent)
    source = textwrap.dedent("".join(lines)).rstrip()
    _show_markdown(f"`{path}`, line {max(first, 1)}\n\n```python\n{source}\n```")


def seed_everything(seed: int, device: str = "auto") -> Any:
    """Seed python, numpy and torch, fix the thread count; returns the torch.device to use."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    # A sum depends on how many threads it is split over: one count for the whole run.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cores()))
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise stages.ParameterError(
            "parameter 'device': 'cuda' was asked for, but torch sees no GPU "
            f"(torch {torch.__version__}); use device='auto' or install a CUDA build of torch"
        )
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def git_revision() -> str:
    """Short revision of the repository beside the package (`-dirty` when changed), or unknown."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=stages.PACKAGE.parent, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def die_with_runner() -> None:
    """End this process when the one that started it is killed, so that it stops writing."""
    runner = os.environ.get("QWENLIB_RUNNER_PID")
    if runner is not None and int(runner) == os.getppid():
        die_with_parent(int(runner))


def die_with_parent(parent: int) -> None:
    """End this process when `parent`, which started it, is killed (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # prctl(2)
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)


def _in_ipython() -> bool:
    return "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None


def _show_markdown(text: str) -> None:
    if _in_ipython():
        from IPython.display import Markdown, display

        display(Markdown(text))
    else:
        print(text)


def _escape(text: Any) -> str:
    return re.sub(r"\s*\n\s*", " ", str(text)).replace("|", "\\|")


def _short(value: Any) -> str:
    """Four significant digits for a float; everything else as it is."""
    value = value.item() if hasattr(value, "item") else value
    return f"{value:.4g}" if isinstance(value, float) else str(value)
