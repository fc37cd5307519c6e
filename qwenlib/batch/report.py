"""The report of a run folder: one self-contained page, and each executed notebook as HTML."""

from __future__ import annotations

import base64
import json
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qwenlib import stages
from qwenlib.batch import graph as graph_

WORDS = {
    "done": "done", "failed": "failed", "running": "running", "interrupted": "interrupted",
    "preempted": "preempted", "missing": "not run",
}  # fmt: skip


def update(run_dir: Path, graph: Mapping[str, stages.Chapter], name: str) -> None:
    """Refresh the page after stage `name`; a problem here is reported and never stops a run."""
    try:
        export_notebook(run_dir / name)
        _write_page(run_dir, graph)
    except Exception as error:
        print(f"the report could not be written: {error}", file=sys.stderr)


def write(run_dir: Path, graph: Mapping[str, stages.Chapter]) -> Path:
    """Write `index.html` and the notebooks' HTML for every stage found; returns the page."""
    for name in graph:
        export_notebook(run_dir / name)
    return _write_page(run_dir, graph)


def export_notebook(stage_dir: Path) -> Path | None:
    """`notebook.ipynb` as `notebook.html` (made only when it is missing or older)."""
    source, target = stage_dir / "notebook.ipynb", stage_dir / "notebook.html"
    if not source.is_file():
        return None
    if target.is_file() and target.stat().st_mtime >= source.stat().st_mtime:
        return target
    import nbformat
    from nbconvert import HTMLExporter

    content = nbformat.read(source, as_version=4)
    exporter = HTMLExporter(template_name="lab")
    html, _ = exporter.from_notebook_node(content, resources={"metadata": {"name": stage_dir.name}})
    temporary = target.with_suffix(".tmp")
    temporary.write_text(html)
    os.replace(temporary, target)
    return target


def status_of(stage_dir: Path) -> str:
    """done, failed, running, interrupted, preempted or missing, from a stage folder's records."""
    recorded = (stages.read_json(stage_dir / "results.json") or {}).get("status")
    note = stages.read_json(stage_dir / "started.json")
    if recorded not in (None, "preempted") or not note:
        return recorded or "missing"
    mark = note.get("pid_started")
    alive = mark is not None and stages.process_started(note["pid"]) == mark
    return "running" if alive else recorded or "interrupted"


# ---------------------------------------------------------------- the page


def _write_page(run_dir: Path, graph: Mapping[str, stages.Chapter]) -> Path:
    found = {name: stages.read_json(run_dir / name / "results.json") for name in graph}
    status = {name: status_of(run_dir / name) for name in graph}
    body = [
        _head(run_dir, found, status),
        _chain(graph, status),
        _overview(graph, found, status),
        *(_stage(run_dir / name, graph[name], found[name], status[name]) for name in graph),
    ]
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(run_dir.name)} · qwenlib</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    target = run_dir / "index.html"
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(page)
    os.replace(temporary, target)
    return target


def _head(
    run_dir: Path, found: Mapping[str, dict[str, Any] | None], status: Mapping[str, str]
) -> str:
    results = [result for result in found.values() if result]
    done = sum(value == "done" for value in status.values())
    checks = [check for result in results for check in result.get("checks", [])]
    passed = sum(check["passed"] for check in checks)
    facts = [
        ("stages", f"{done} of {len(status)} done"),
        ("checks", f"{passed} of {len(checks)} hold"),
        ("time", _duration(sum(result["seconds"] for result in results))),
        ("memory", _memory(max((r.get("peak_memory_mb") or 0 for r in results), default=0))),
        ("profile", ", ".join(sorted({result["profile"] for result in results})) or "-"),
        ("seed", ", ".join(sorted({str(r["parameters"]["seed"]) for r in results})) or "-"),
    ]
    machine = next((r["environment"] for r in reversed(results) if "environment" in r), None)
    line = ""
    if machine:
        versions = " · ".join(f"{k} {v}" for k, v in machine["versions"].items())
        line = (
            f"{machine['device']} · {machine['threads']} threads · Python {machine['python']} · "
            f"revision {machine['git']}<br>{escape(versions)}"
        )
    tiles = "".join(f"<div><b>{escape(v)}</b><span>{k}</span></div>" for k, v in facts)
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        f"<header><p class='kicker'>The Qwen2.5 report, run step by step</p>"
        f"<h1>Run “{escape(run_dir.name)}”</h1><div class='tiles'>{tiles}</div>"
        f"<p class='small'>{line}<br>Page written {written}.</p></header>"
    )


def _chain(graph: Mapping[str, stages.Chapter], status: Mapping[str, str]) -> str:
    """The stage graph as inline SVG; each box links to its section."""
    levels = graph_.columns(graph)
    if not levels:
        return ""
    wide, high, gap_x, gap_y = 106, 54, 20, 16
    tallest = max(map(len, levels))
    place = {}
    for x, level in enumerate(levels):
        top = (tallest - len(level)) * (high + gap_y)
        for y, name in enumerate(level):
            place[name] = (4 + x * (wide + gap_x), 4 + top + y * (high + gap_y))
    parts = []
    for name, (x, y) in place.items():
        for need in graph_.direct_needs(graph, name):
            x0, y0 = place[need][0] + wide, place[need][1] + high / 2
            x1, y1, middle = x - 5, y + high / 2, (x0 + x) / 2
            parts.append(
                f"<path d='M{x0} {y0} C{middle} {y0} {middle} {y1} {x1} {y1}' class='edge' "
                "marker-end='url(#tip)'/>"
            )
    for name, (x, y) in place.items():
        colour = graph_.STATUS_COLOURS[status[name]]
        lines = textwrap.wrap(graph[name].title, 17, max_lines=2, placeholder=" …")
        first = y + (36 if len(lines) == 1 else 31)
        title = "".join(
            f"<text x='{x + wide / 2}' y='{first + 13 * i}'>{escape(line)}</text>"
            for i, line in enumerate(lines)
        )
        parts.append(
            f"<a href='#{name}'><rect x='{x}' y='{y}' width='{wide}' height='{high}' rx='8' "
            f"style='stroke:{colour}' class='box {status[name]}'/>"
            f"<text x='{x + wide / 2}' y='{y + 17}' class='number'>{name[:2]}</text>{title}</a>"
        )
    width = 8 + len(levels) * (wide + gap_x) - gap_x
    height = 8 + tallest * (high + gap_y) - gap_y
    return (
        "<section><h2>The chain</h2><p>An arrow means: hands its result on to. "
        "Click a box for its section.</p>"
        f"<div class='wide'><svg viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        "role='img' aria-label='stage graph'><defs><marker id='tip' viewBox='0 0 8 8' refX='6' "
        "refY='4' markerWidth='7' markerHeight='7' orient='auto'><path d='M0 0 L8 4 L0 8 z' "
        f"class='tip'/></marker></defs>{''.join(parts)}</svg></div></section>"
    )


def _overview(
    graph: Mapping[str, stages.Chapter],
    found: Mapping[str, dict[str, Any] | None],
    status: Mapping[str, str],
) -> str:
    rows = []
    for name, chapter in graph.items():
        result = found[name] or {}
        numbers = [
            f"{escape(key.replace('_', ' '))} <b>{escape(_number(value))}</b>"
            for key, value in _flat(result.get("metrics", {}))
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ][:3]
        seconds = _duration(result["seconds"]) if result else ""
        notebook = f"<a href='{name}/notebook.html'>notebook</a>" if result else ""
        rows.append(
            f"<tr><td><a href='#{name}'>{name[:2]} · {escape(chapter.title)}</a></td>"
            f"<td>{_badge(status[name])}</td><td class='r'>{seconds}</td>"
            f"<td>{' · '.join(numbers)}</td><td>{notebook}</td></tr>"
        )
    return (
        "<section><h2>At a glance</h2><table class='plain'><thead><tr><th>stage</th><th></th>"
        "<th class='r'>time</th><th>first numbers</th><th></th></tr></thead><tbody>"
        f"{''.join(rows)}</tbody></table></section>"
    )


def _stage(
    stage_dir: Path, chapter: stages.Chapter, result: dict[str, Any] | None, status: str
) -> str:
    top = (
        f"<section id='{chapter.name}' class='stage'><h2><span>{chapter.name[:2]}</span>"
        f"{escape(chapter.title)} {_badge(status)}</h2>"
    )
    if result is None:
        command = f"qwenlib run {chapter.name} --run-dir …"
        return top + f"<p>No result here yet: <code>{command}</code></p></section>"
    link = ""
    if (stage_dir / "notebook.html").is_file():
        link = f" · <a href='{chapter.name}/notebook.html'>executed notebook</a>"
    facts = f"{_duration(result['seconds'])} · profile {result['profile']}"
    if result.get("peak_memory_mb"):
        facts += f" · peak memory {_memory(result['peak_memory_mb'])}"
    parts = [top, f"<p class='small'>{escape(facts)}{link}</p>"]
    if result.get("error"):
        parts.append(f"<p class='error'>{escape(result['error'])}</p>")
    key, figures = result.get("key_figure"), result.get("figures", [])
    key = key or (figures[0] if figures else None)
    parts.append("<div class='two'>")
    parts.append(_picture(stage_dir, key))
    parts.append(
        f"<div>{_metrics(result.get('metrics', {}))}{_checks(result['checks'])}</div></div>"
    )
    parts.append(_compare(result.get("compare", [])))
    others = [name for name in figures if name != key]
    if others:
        pictures = "".join(_picture(stage_dir, name) for name in others)
        parts.append(
            f"<details><summary>{len(others)} more figure{'s' * (len(others) > 1)}</summary>"
            f"<div class='gallery'>{pictures}</div></details>"
        )
    parts.append(_settings(result))
    parts.append("</section>")
    return "".join(parts)


def _picture(stage_dir: Path, name: str | None) -> str:
    path = stage_dir / "figures" / f"{name}.png"
    if name is None or not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    title = escape(name.replace("_", " "))
    return f"<figure><img alt='{title}' src='data:image/png;base64,{data}'></figure>"


def _metrics(metrics: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(key.replace('_', ' '))}</td>"
        f"<td class='r'>{escape(_number(value))}</td></tr>"
        for key, value in _flat(metrics)
    )
    return f"<h3>Numbers</h3><table class='plain'>{rows}</table>" if rows else ""


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    if not checks:
        return ""
    lines = []
    for check in checks:
        kind = "yes" if check["passed"] else "no" if check["enforced"] else "open"
        mark = {"yes": "✓", "no": "✗", "open": "○"}[kind]
        lines.append(
            f"<li class='{kind}'><b>{mark}</b> {escape(check['name'].replace('_', ' '))}"
            f"<span>{escape(check['text'])}</span></li>"
        )
    return f"<h3>Checks</h3><ul class='checks'>{''.join(lines)}</ul>"


def _compare(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    lines = "".join(
        f"<tr><td>{escape(str(row['quantity']))}</td><td>{escape(_number(row['report']))}</td>"
        f"<td>{escape(_number(row['here']))}</td><td>{escape(str(row['why']))}</td></tr>"
        for row in rows
    )
    return (
        "<h3>Report versus here</h3><table class='plain compare'><thead><tr><th></th>"
        "<th>report</th><th>here</th><th>why they differ</th></tr></thead>"
        f"<tbody>{lines}</tbody></table>"
    )


def _settings(result: Mapping[str, Any]) -> str:
    origin = result.get("parameters_from", {})
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(repr(value))}</code></td>"
        f"<td>{escape(origin.get(name, ''))}</td></tr>"
        for name, value in result.get("parameters", {}).items()
    )
    files = "".join(
        f"<tr><td>{escape(path)}</td><td class='r'>{entry['bytes'] / 1e3:,.1f} KB</td>"
        f"<td><code>{entry.get('sha256', '')[:12]}</code></td></tr>"
        for path, entry in result.get("outputs", {}).items()
    )
    made = f"<h3>Files handed on</h3><table class='plain'>{files}</table>" if files else ""
    return (
        "<details><summary>Settings and files</summary><h3>Settings</h3>"
        f"<table class='plain'>{rows}</table>{made}</details>"
    )


def _badge(status: str) -> str:
    return f"<em class='badge {status}'>{WORDS[status]}</em>"


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Metrics in order, nested ones as `outer · inner`."""
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key} · ")
        else:
            yield f"{prefix}{key}", value


def _number(value: Any) -> str:
    if isinstance(value, bool) or isinstance(value, str):
        return str(value)
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _memory(megabytes: float) -> str:
    return f"{megabytes / 1e3:.1f} GB" if megabytes >= 1e3 else f"{megabytes:.0f} MB"


CSS = """
:root { --ink:#1d2733; --soft:#5c6875; --line:#e3e7ec; --paper:#fff; --back:#f4f6f8;
  --blue:#0072b2 }
* { box-sizing:border-box }
body { margin:0; background:var(--back); color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif }
main { max-width:1080px; margin:0 auto; padding:28px 20px 80px }
a { color:var(--blue); text-decoration:none } a:hover { text-decoration:underline }
h1 { font-size:2.1rem; margin:.1em 0 .6em; letter-spacing:-.02em }
h2 { font-size:1.3rem; margin:0 0 .5em } h3 { font-size:.95rem; margin:1.3em 0 .4em }
code { font:.88em ui-monospace,Menlo,Consolas,monospace }
.kicker { color:var(--blue); font-weight:600; margin:0 }
.small { color:var(--soft); font-size:.86rem }
section { background:var(--paper); border:1px solid var(--line); border-radius:12px;
  padding:22px 26px; margin:20px 0; scroll-margin-top:12px }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(130px,1fr)); gap:10px }
.tiles div { background:var(--paper); border:1px solid var(--line); border-radius:10px;
  padding:10px 14px }
.tiles b { display:block; font-size:1.08rem } .tiles span { color:var(--soft); font-size:.82rem }
.wide { overflow-x:auto }
.wide svg { max-width:100%; height:auto }
svg .edge { fill:none; stroke:#9aa5b1; stroke-width:1.5 } svg .tip { fill:#9aa5b1 }
svg .box { fill:#fff; stroke-width:2 } svg .box.missing { stroke-dasharray:4 3 }
svg a:hover .box { fill:#eef5fa }
svg text { font:11px system-ui,sans-serif; text-anchor:middle; fill:var(--ink) }
svg .number { font-weight:700; font-size:12px; fill:var(--soft) }
.stage h2 span { display:inline-block; color:#fff; background:var(--ink); border-radius:6px;
  font-size:.9rem; padding:2px 8px; margin-right:10px; vertical-align:2px }
.badge { font-style:normal; font-size:.75rem; font-weight:600; border-radius:99px; padding:2px 10px;
  background:#e8ecf0; color:#45505c; white-space:nowrap; vertical-align:2px }
.badge.done { background:#dcf3ea; color:#00664a }
.badge.failed { background:#fbe3d6; color:#a03d00 }
.badge.running, .badge.interrupted, .badge.preempted { background:#fdf0d4; color:#855a00 }
.error { background:#fdf1ea; border-left:4px solid #d55e00; padding:10px 14px;
  font:.86rem ui-monospace,Menlo,Consolas,monospace; white-space:pre-wrap }
.two { display:grid; grid-template-columns:minmax(0,1.25fr) minmax(0,1fr); gap:28px }
.two > div:only-child { grid-column:1 / -1 } .two h3:first-child { margin-top:0 }
@media (max-width:800px) { .two { grid-template-columns:1fr } section { padding:16px } }
figure { margin:0 } img { max-width:100%; height:auto; border-radius:6px }
.gallery { display:grid; grid-template-columns:repeat(auto-fit,minmax(360px,1fr)); gap:18px }
table.plain { border-collapse:collapse; width:100%; font-size:.9rem }
.plain td, .plain th { border-bottom:1px solid var(--line); padding:5px 10px 5px 0; text-align:left;
  vertical-align:top } .plain th { color:var(--soft); font-weight:600; font-size:.8rem }
.plain .r { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap;
  padding-right:24px }
.compare td:nth-child(2), .compare td:nth-child(3) { font-weight:600; min-width:6em }
.checks { list-style:none; margin:0; padding:0; font-size:.9rem } .checks li { padding:3px 0 }
.checks span { display:block; color:var(--soft); font-size:.84rem; margin-left:1.5em }
.checks b { display:inline-block; width:1.2em }
.yes b { color:#009e73 } .no b { color:#d55e00 } .open b { color:#8a8a8a }
details { margin-top:16px } summary { cursor:pointer; color:var(--blue); font-size:.9rem }
@media print { body { background:#fff } section { break-inside:avoid; border:0 } }
"""
