"""Record a finished run: benchmarks/results/*.json, and the tables in README.md and RESULTS.md.

    python tools/record_results.py walk runs/walkthrough     # the walk: times and metrics
    python tools/record_results.py seeds runs/seed0 runs/seed1 runs/seed2   # GRPO, several seeds
    python tools/record_results.py bench [generate.json forward.json]   # speed; no file: run it
    python tools/record_results.py tables                    # tables again from the records

Every number in README.md and RESULTS.md comes from these records; a test compares them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "results"
PICTURES = {"11_grpo": "grpo_curves", "07_context_extension": "passkey_map"}


def read(run_dir: Path, stage: str) -> dict:
    """One stage's results.json; exits when the stage is not done."""
    path = run_dir / stage / "results.json"
    if not path.is_file():
        sys.exit(f"{path} is missing; run `make walkthrough` first")
    results = json.loads(path.read_text())
    if results["status"] != "done":
        sys.exit(f"{stage} in {run_dir} is {results['status']}, not done")
    return results


def short(results: dict) -> dict:
    """What a record keeps of a stage."""
    keys = ("title", "profile", "seconds", "peak_memory_mb", "metrics", "environment", "finished")
    return {key: results[key] for key in keys} | {"seed": results["parameters"]["seed"]}


def record_walk(run_dir: Path) -> None:
    """All chapters of a run, and the pictures that README shows."""
    chapters = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    record = {chapter: short(read(run_dir, chapter)) for chapter in chapters}
    write("walk_tiny.json", record)
    for stage, figure in PICTURES.items():
        shutil.copy(run_dir / stage / "figures" / f"{figure}.png", RECORDS / f"{figure}.png")


def record_seeds(run_dirs: list[Path]) -> None:
    """Chapter 11 of several runs."""
    write("grpo_seeds.json", [short(read(run_dir, "11_grpo")) for run_dir in run_dirs])


def record_bench(files: list[Path]) -> None:
    """The reports of `qwenlib bench ... --json` of one machine, as one; runs all without files.

    Training has a record of its own, beside that of the other kinds.
    """
    if files:
        reports = [json.loads(path.read_text()) for path in files]
    else:
        reports = []
        for kind in ("forward", "generate", "tokenizer", "train"):
            command = [sys.executable, "-m", "qwenlib", "bench", kind, "--json"]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"qwenlib bench {kind} ended with {done.returncode}")
            reports.append(json.loads(done.stdout.splitlines()[-1]))
    loops = [report for report in reports if report.get("kind") == "train"]
    others = [report for report in reports if report not in loops]
    joined = [(name, join_bench(few)) for name, few in (("bench", others), ("train", loops)) if few]
    for name, record in joined:
        write(f"{name}_{'cpu' if record['device'] == 'cpu' else 'gpu'}.json", record)


def join_bench(reports: list[dict]) -> dict:
    """One report of several; exits when they differ in anything that speed depends on."""
    record = dict(reports[0], rows=[], skipped={}, versions=dict(reports[0]["versions"]))
    for report in reports:
        for key in ("device", "dtype", "threads", "platform"):
            if report[key] != record[key]:
                sys.exit(f"the reports differ in {key}: {record[key]} and {report[key]}")
        for name, version in report["versions"].items():
            if record["versions"].setdefault(name, version) != version:
                sys.exit(f"the reports differ in the version of {name}")
        if report["refused"]:
            sys.exit(f"outputs differ, so nothing is recorded: {report['refused']}")
        record["rows"] += report["rows"]
        record["skipped"] |= report["skipped"]
    return record


def write(name: str, record: object) -> None:
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / name).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def load(name: str) -> object | None:
    path = RECORDS / name
    return json.loads(path.read_text()) if path.is_file() else None


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def chapter_table(walk: dict) -> list[str]:
    """README: chapters with their measured time and memory."""
    lines = ["| notebook | what it ends with | time (`tiny`) | memory |", "|---|---|---|---|"]
    for chapter, row in walk.items():
        memory = f"{row['peak_memory_mb'] / 1000:.1f} GB"
        lines.append(
            f"| [{chapter}](notebooks/{chapter}.ipynb) | {ENDS[chapter]} | "
            f"{row['seconds']:.0f} s | {memory} |"
        )
    total = sum(row["seconds"] for row in walk.values())
    return [*lines, f"| all | | {total / 60:.1f} min | |"]


ENDS = {
    "00_start_here": "a map of the report and of this machine",
    "01_architecture": "Table 1 to the last parameter; logits equal to transformers'",
    "02_tokenizer": "a byte-level BPE trained here, beside the real vocabulary",
    "03_mixture_of_experts": "experts cut from a dense model: who visits whom, how evenly",
    "04_pretraining_data": "filtered, deduplicated, decontaminated token shards",
    "05_scaling_laws": "laws with intervals, on public runs and on our own sweep",
    "06_pretraining": "a loss curve that the law predicted",
    "07_context_extension": "a passkey map: base change and YaRN",
    "08_sft": "a model that takes turns and shows its work",
    "10_dpo": "pairs ordered by the implicit reward",
    "11_grpo": "a rising reward curve",
    "12_evaluation": "all models on the same questions, with intervals",
}


def key_numbers(walk: dict) -> list[str]:
    """README and RESULTS: what the walk measured, one row a claim."""
    m = {chapter: row["metrics"] for chapter, row in walk.items()}
    pre, ext, sft = m["06_pretraining"], m["07_context_extension"], m["08_sft"]
    dpo, grpo = m["10_dpo"], m["11_grpo"]
    return [
        "| measured in the walk (`tiny`, seed 0) | value |",
        "|---|---|",
        f"| held-out loss after pretraining, and chapter 05's prediction | "
        f"{pre['held_out_loss']:.3f}, {pre['predicted_loss']:.3f} "
        f"({percent(pre['prediction_error'])} off) |",
        f"| pass keys found at 4× the training length, without and with the extension | "
        f"{percent(ext['passkey_without'])}, {percent(ext['passkey_with'])} |",
        f"| exact match on held-out questions, before and after SFT | "
        f"{percent(pre['base_exact_match'])}, {percent(sft['exact_match'])} |",
        f"| held-out pairs that DPO's implicit reward orders | "
        f"{percent(dpo['implicit_accuracy'])} |",
        f"| held-out pass@1 before and after GRPO | "
        f"{percent(grpo['pass@1_before'])}, {percent(grpo['pass@1'])} |",
    ]


def seed_table(seeds: list[dict]) -> list[str]:
    """RESULTS: GRPO's gain in several seeds."""
    lines = ["| seed | pass@1 before | pass@1 after | gain (points) | 95 % interval |",
             "|---|---|---|---|---|"]  # fmt: skip
    for row in seeds:
        m = row["metrics"]
        lines.append(
            f"| {row['seed']} | {percent(m['pass@1_before'])} | {percent(m['pass@1'])} | "
            f"{m['gain_points']:+.1f} | {m['gain_low']:+.1f} to {m['gain_high']:+.1f} |"
        )
    return lines


def bench_table(record: dict) -> list[str]:
    """RESULTS: rates of both sides and their ratio, one row a case."""
    from qwenlib.bench.runner import rate

    names = ("torch", "transformers", "tokenizers", "gigatoken")
    versions = ", ".join(f"{n} {record['versions'][n]}" for n in names if n in record["versions"])
    lines = [
        f"{record['platform']}, {record['device']}, {record['threads']} threads, "
        f"{record['dtype']}; {versions}.",
        "",
        "| case | what | ours | peer | unit | ours / peer | 95 % interval | peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        interval = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        lines.append(
            f"| {row['name']} | {row['about']} | {rate(row['ours'])} | {rate(row['peer'])} | "
            f"{row['unit']} | {row['ratio']:.2f} | {interval} | {row['peer_name']} |"
        )
    for row in record["rows"]:
        if "bandwidth_fraction" in row:
            lines += ["", f"{row['name']} reads its weights at "
                      f"{percent(row['bandwidth_fraction'])} of the {record['bandwidth_gb_s']:.0f} "
                      "GB/s of a large copy."]  # fmt: skip
    for name, reason in record["skipped"].items():
        lines += ["", f"Not measured: {name} ({reason})."]
    return lines


def train_table(record: dict) -> list[str]:
    """RESULTS: tokens a second and peak memory of both loops, one row a case."""
    from qwenlib.bench.runner import rate

    names = ("torch", "transformers", "accelerate")
    versions = ", ".join(f"{n} {record['versions'][n]}" for n in names)
    lines = [
        f"{record['platform']}, {record['device']}, {record['threads']} threads; {versions}.",
        "",
        "| case | what | ours, tokens/s | Trainer | ours / Trainer | 95 % interval "
        "| ours, peak MB | Trainer | its setting |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        setting = row["peer_name"].partition(", ")[2]
        lines.append(
            f"| {row['name']} | {row['about']} | {rate(row['ours'])} | {rate(row['peer'])} | "
            f"{row['ratio']:.2f} | {row['ratio_low']:.2f} to {row['ratio_high']:.2f} | "
            f"{row['ours_mb']:,.0f} | {row['peer_mb']:,.0f} | {setting} |"
        )
    return lines


def device_line(walk: dict) -> list[str]:
    """RESULTS: where and with what the walk ran."""
    facts = walk["11_grpo"]["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [
        f"Device: {facts['device']}, {facts['threads']} threads, {facts['platform']}; Python "
        f"{facts['python']}; {versions}; revision `{facts['git']}`; {walk['11_grpo']['finished']}."
    ]


def stage_metrics(walk: dict) -> list[str]:
    """RESULTS: every scalar metric of every stage."""
    lines = ["| stage | metric | value |", "|---|---|---|"]
    for chapter, row in walk.items():
        for name, value in flatten(row["metrics"]):
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"| {chapter} | {name} | {text} |")
    return lines


def flatten(metrics: dict, prefix: str = "") -> list[tuple[str, object]]:
    rows = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{name} / ")
        elif isinstance(value, (int, float, str, bool)) or value is None:
            rows.append((prefix + name, value))
    return rows


def tables() -> dict[str, list[str]]:
    """Marker -> lines, for every record that exists."""
    walk, seeds = load("walk_tiny.json"), load("grpo_seeds.json")
    out = {}
    if walk:
        out |= {
            "chapters": chapter_table(walk),
            "numbers": key_numbers(walk),
            "device": device_line(walk),
            "metrics": stage_metrics(walk),
        }
    if seeds:
        out["seeds"] = seed_table(seeds)
    for place, suffix in (("cpu", ""), ("gpu", "-gpu")):
        if record := load(f"bench_{place}.json"):
            out[f"bench{suffix}"] = bench_table(record)
        if record := load(f"train_{place}.json"):
            out[f"train{suffix}"] = train_table(record)
    return out


def filled(text: str) -> str:
    """`text` with every marked block replaced by its table."""
    for name, lines in tables().items():
        block = "\n".join([f"<!-- {name}: begin -->", *lines, f"<!-- {name}: end -->"])
        pattern = rf"<!-- {name}: begin -->.*?<!-- {name}: end -->"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("walk", "seeds", "bench", "tables"))
    parser.add_argument("run_dirs", nargs="*", type=Path, help="run folders; bench: JSON files")
    arguments = parser.parse_args()
    if arguments.what == "walk":
        if len(arguments.run_dirs) != 1:
            parser.error("walk takes one run folder")
        record_walk(arguments.run_dirs[0])
    elif arguments.what == "seeds":
        record_seeds(arguments.run_dirs)
    elif arguments.what == "bench":
        record_bench(arguments.run_dirs)
    for name in ("README.md", "RESULTS.md"):
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
