"""Markdown tables from benchmarks/results, written between markers in README.md and the results page.

    python benchmarks/tables.py            write the tables; print those without a place
    python benchmarks/tables.py --check    fail if a page differs from what the results say
    python benchmarks/tables.py --print    print them only

No figure is typed by hand: a table stands between `<!-- table:NAME:begin -->` and `<!-- table:NAME:end -->`.
Nothing but the standard library and NumPy is needed, so that the check can run without the peers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
DOCUMENTS = HERE.parent / "docs" / "results"
NAMES = ("index", "obstacles", "learning-rate", "monitor", "alarms", "beta2", "heads", "entropy", "calibration")
PAGES = (HERE.parent / "README.md", *(DOCUMENTS / f"{name}.md" for name in NAMES))
RESULTS = HERE / "results"

Record = dict[str, Any]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join([_row(header), _row(rule), *(_row(row) for row in rows)])


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")


def _spread(values: list[float]) -> str:
    """Median (min-max)."""
    median = _digits(float(np.median(values)))
    low, high = _digits(min(values)), _digits(max(values))
    return median if low == high else f"{median} ({low}–{high})"


def _bold_if_dyntune(name: str) -> str:
    return f"**{name}**" if name.startswith("dyntune") else name


def _names(problems: Record, key: Callable[[Record], Iterable[str]]) -> list[str]:
    """Row names in order of first appearance over the problems."""
    return list(dict.fromkeys(name for record in problems.values() for name in key(record)))


def _solver_cell(runs: list[Record]) -> str:
    products = [run["num_products"] for run in runs if run["num_products"] is not None]
    seconds = _spread([run["cpu_seconds"] for run in runs])
    wrong = sum(run["wrong"] for run in runs)
    verdict = f"**wrong {wrong}/{len(runs)}**" if wrong else f"wrong 0/{len(runs)}"
    return f"{_spread(products) if products else 'none'}; {seconds} s; {verdict}"


def _solvers(problems: Record) -> str:
    names = _names(problems, lambda record: sorted({run["solver"] for run in record["runs"]}))
    order = {name: rank for rank, name in enumerate(sorted(names, key=_solver_rank))}
    rows = []
    for name in sorted(names, key=order.__getitem__):
        by_problem = [[run for run in record["runs"] if run["solver"] == name] for record in problems.values()]
        rows.append([_bold_if_dyntune(name), *(_solver_cell(runs) for runs in by_problem)])
    return _table(["products; CPU time; wrong answers", *problems], rows)


def _solver_rank(name: str) -> tuple[bool, bool, str]:
    """dyntune, then peers as they come, then peers tuned with the answer known."""
    return (not name.startswith("dyntune"), "tuned" in name, name)


def _product_cell(times: dict[str, list[float]], name: str) -> str:
    """The multiple of a gradient, round by round, and the time of the median round."""
    if name not in times:
        return "not run"
    ratios = [a / b for a, b in zip(times[name], times["gradient"], strict=True)]
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    milliseconds = _digits(float(np.median(times[name])))
    return f"{median:.2f} ({low:.2f}–{high:.2f}); {milliseconds} ms"


def _products(problems: Record) -> str:
    names = _names(problems, lambda record: record["product_cpu_ms"])
    rows = [
        [_bold_if_dyntune(name), *(_product_cell(r["product_cpu_ms"], name) for r in problems.values())]
        for name in names
    ]
    return _table(["one product, in gradients", *problems], rows)


def _requirements(found: list[Record]) -> str:
    rows = []
    for item in found:
        bound = f"{'≥' if item['at_least'] else '≤'} {item['bound']:g}"
        verdict = "met" if item["met"] else "**not met**"
        rows.append(
            [
                f"{item['text']}, {item['problem']}",
                f"{item['value']:.3g} ({item['low']:.3g}–{item['high']:.3g})",
                bound if item["binding"] else f"({bound})",
                f"{verdict}, interval straddles the bound" if item["low"] < item["bound"] < item["high"] else verdict,
            ]
        )
    return _table(["requirement", "measured (95 % interval)", "bound", "verdict"], rows)


def _problem_list(problems: Record) -> str:
    lines = []
    for name, record in problems.items():
        truth = record["reference"]
        extremes = f"{_digits(truth['lambda_max'])}, second {_digits(truth['lambda_2'])}"
        lines.append(
            f"- `{name}`: {record['description']}; {record['num_parameters']:,} parameters; "
            f"λ_max {extremes}, λ_min {_digits(truth['lambda_min'])}"
        )
    return "\n".join(lines)


def _origin(source: Record) -> str:
    packages = {k: v for k, v in source["versions"].items() if v is not None}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    commit = (source["commit"] or "no commit")[:12] + (" with changes" if source["uncommitted_changes"] else "")
    return f"{source['date'][:10]}, {source['cpu']}, {source['threads']} thread, {commit}; {versions}."


def peers(result: Record) -> str:
    """Everything that benchmarks/peers.py measured."""
    problems = result["problems"]
    parts = [
        "λ_max to within 1 %. Median (min–max) over start vectors; CPU time includes each library's set-up. "
        '"Tuned" knew the answer.',
        _solvers(problems),
        "One Hessian-vector product as a multiple of one gradient: median (quartiles) over rounds.",
        _products(problems),
        _problem_list(problems),
    ]
    if result.get("requirements"):
        parts += ["Requirements on dyntune:", _requirements(result["requirements"])]
    return "\n\n".join([*parts, _origin(result["provenance"])])


def peers_short(result: Record) -> str:
    """The solvers only."""
    note = (
        "λ_max to within 1 %: products, CPU seconds with set-up, wrong answers (off by more than 1 %, claimed or not); "
        'median (min–max) over start vectors, one thread. "Tuned" was given the cheapest setting that is right, which '
        "only someone who knows the answer can choose; dyntune's time includes the proof that nothing larger was "
        "missed."
    )
    return "\n\n".join([note, _solvers(result["problems"]), _origin(result["provenance"])])


def _rate(found: Record) -> str:
    return f"{found['count']} of {found['of']:,} ({100 * found['low']:.3g}–{100 * found['high']:.3g} %)"


def _claims(name: str, found: Record) -> list[str]:
    products = found["products"]
    spent = f"{products['median']:.0f}; {products['quantile_90']:.0f}; {products['most']:.0f}"
    return [name, *(_rate(found[key]) for key in ("converged", "falsely_converged", "bracket_misses")), spent]


def spectra(result: Record) -> str:
    """Everything that benchmarks/spectra.py measured."""
    claims, several = result["claims"], result["several"]
    rows = [_claims(f"{name}", found) for name, found in claims["families"].items()]
    rows += [_claims("**all, k = 1**", claims), _claims("**k = 2 to 6, every end**", several)]
    levels = [
        [f"{found['nominal']:g}", *(_rate(found[key]) for key in ("falsely_converged", "bracket_misses"))]
        for found in result["levels"]
    ]
    return "\n\n".join(
        [
            "Default arguments, float32. Counts with exact 95 % intervals; products as median; 90 % quantile; most.",
            _table(["spectra", "converged", "of these wrong", "bracket misses the truth", "products"], rows),
            "The failure probability is real: what is measured when a larger one is asked for.",
            _table(["nominal failure probability", "converged and wrong", "bracket misses the truth"], levels),
            _origin(result["provenance"]),
        ]
    )


def scale(result: Record) -> str:
    """Everything that benchmarks/scale.py measured."""
    rows = []
    for name, found in result["sizes"].items():
        n = found["num_parameters"]
        cells = [f"{name} ({n:,})", f"{found['gradient_seconds']:.2g} s"]
        for label in ("hessian", "preconditioned"):
            item = found[label]
            value = f"{_digits(item['values'][0])} (to {_digits(item['high'][0])})"
            cells.append(f"{value}; {item['num_products']}; {item['seconds']:.3g} s")
        per_parameter = found["preconditioned"]["peak_gib"] * 2**30 / n
        rows.append([*cells, f"{found['preconditioned']['peak_gib']:.2f} GiB; {per_parameter:.0f} B"])
    header = ["parameters", "one gradient", "λ_max; products; time", "preconditioned; products; time", "peak; each"]
    return "\n\n".join([_table(header, rows), _origin(result["provenance"])])


def sampling(result: Record) -> str:
    """What benchmarks/sampling.py found: coverage by population, then the price."""
    methods = ("halves", "first order", "jackknife")
    rows = []
    for name, population in result["coverage"].items():
        found = population["coverage"]
        cells = [f"{found[m]['rate']:.1%} ({found[m]['low']:.1%} to {found[m]['high']:.1%})" for m in methods]
        wider = [c["halves"]["median_width"] / c["first order"]["median_width"] for c in population["cells"].values()]
        settled = sum(c["statuses"].get("OK", 0) for c in population["cells"].values())
        share = f"{settled / found['halves']['of']:.0%}"
        rows.append([name, f"{population['relative_gap']:.2f}", *cells, f"{_spread(wider)}", share])
    header = [
        "population",
        "relative gap",
        "**halves**",
        "plain ± standard error",
        "jackknife",
        "width, times plain's",
        "OK",
    ]
    price = [
        [
            f"after {item['steps']} {'step' if item['steps'] == 1 else 'steps'}",
            ", ".join(item["quantities"]),
            str(item["products_numerical"]),
            str(item["products_both"]),
        ]
        for item in result["price"]
    ]
    costs = _table(["network of 85,000 parameters", "quantities", "products, numerical", "products, both"], price)
    return "\n\n".join([_table(header, rows), costs, _origin(result["provenance"])])


def _tally(rows: list[Record]) -> str:
    """How often each tool was right, and how often not."""
    verdicts = {
        "right": ("right",),
        "refused with the fix": ("refused",),
        "error": ("error",),
        "wrong with a warning": ("warned",),
        "**silently wrong**": ("wrong",),
    }
    lines = []
    for tool in rows[0]["results"]:
        found = [row["results"][tool] for row in rows]
        counts = [sum(r["verdict"] in kinds for r in found) for kinds in verdicts.values()]
        lines.append([_bold_if_dyntune(tool), *map(str, counts), str(sum(bool(r["moved"]) for r in found))])
    return _table([f"{len(rows)} rows", *verdicts, "left a trace"], lines)


def _obstacle_cell(found: Record) -> str:
    texts = {
        "right": "right",
        "refused": found["error"],
        "error": f"error: {found['error']}",
        "warned": f"warned: {found['detail'].split(';')[0]}",
        "wrong": f"**wrong**: {found['detail']}",
    }
    trace = f" †{', '.join(found['moved'])}" if found["moved"] else ""
    return f"{texts[found['verdict']]}{trace}"


def _obstacle_own_cell(row: Record) -> str:
    """What dyntune did: by which engine, how far off, and how."""
    found = row["results"]["dyntune"]
    parts = [row["method"], found["detail"]] if found["verdict"] == "right" else [_obstacle_cell(found)]
    return "; ".join([*parts, row["note"]] if row["note"] else parts)


def obstacles(result: Record) -> str:
    """Everything that benchmarks/obstacles.py measured."""
    rows = result["rows"]
    parts = [_tally(rows)]
    peers_of = [tool for tool in rows[0]["results"] if tool != "dyntune"]
    for group in dict.fromkeys(row["group"] for row in rows):
        lines = [
            [row["name"], _obstacle_own_cell(row), *(_obstacle_cell(row["results"][tool]) for tool in peers_of)]
            for row in rows
            if row["group"] == group
        ]
        parts += [f"## {group[0].upper()}{group[1:]}", _table([group, "**dyntune**", *peers_of], lines)]
    return "\n\n".join([*parts, _origin(result["provenance"])])


def obstacles_short(result: Record) -> str:
    """The counts only."""
    return "\n\n".join([_tally(result["rows"]), _origin(result["provenance"])])


def _mean(found: Record) -> str:
    return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def learning_rate(result: Record) -> str:
    """What benchmarks/lr/ours.py and benchmarks/lr/baselines.py found on the test half."""
    lines, baselines = [], RESULTS / LR_BASELINES
    summaries = dict(result["summary"])
    if baselines.exists():
        summaries |= json.loads(baselines.read_text())["summary"]["test"]
    for name, found in sorted(summaries.items(), key=lambda item: item[1]["regret"]["mean"]):
        gap = result["suggest_lr_minus"].get(name)
        cells = [_mean(found["regret"]), f"{found['p95']:.2f}", f"{found['worst']:.2f}", str(found["failed"])]
        title = "**suggest_lr**" if name == "suggest_lr" else name
        lines.append([title, *cells, _mean(found["regret_val"]), "" if gap is None else _mean(gap)])
    header = ["rule", "training regret", "95%", "worst", "failed", "validation regret", "suggest_lr minus this"]
    return "\n\n".join([_table(header, lines), *_lr_ranges(result["ranges"]), _origin(result["provenance"])])


def _lr_ranges(found: Record) -> Iterable[str]:
    """What the intervals held, in a table, and the spread between pilots."""
    titles = {
        "range": "`low` to `high` holds the grid's best rate",
        "max_stable_range": "the interval of `max_stable` holds the onset of failure",
        "max_stable_within_2": "`max_stable` within a factor 2 of the onset",
        "constant_within_2": f"{found['best_constant_multiple']:.2g} x the suggestion within a factor 2 of the onset",
        "value_below_onset": "the suggestion lies below the onset",
    }
    rows = [
        [title, f"{found[key]['held']} of {found[key]['of']}", _mean(found[key]["share"])]
        for key, title in titles.items()
    ]
    yield _table(["", "scenarios, first pilot", f"share over {found['pilots']} pilots each"], rows)
    yield (
        f"`max_stable` minus the best constant multiple, share within a factor 2: "
        f"{_mean(found['max_stable_minus_constant'])}. Between pilots the suggestion moves by "
        f"{_mean(found['seed_spread_octaves'])} octaves (standard deviation, mean over scenarios)."
    )


def _percent(value: float, ends: list[float]) -> str:
    """A ratio with its interval, in percent to a tenth; from ten times as much on, as a multiple."""
    if value >= 10:
        return f"{value:.0f} × ({ends[0]:.0f} to {ends[1]:.0f})"
    low, middle, high = (f"{100 * v:.1f}" for v in (ends[0], value, ends[1]))
    return f"{middle}% ({low} to {high})"


def _seconds(value: float) -> str:
    """With its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= scale:
            return f"{_digits(value / scale)} {unit}"
    return f"{_digits(value / 1e-6)} µs"


def monitor_overhead(result: Record) -> str:
    """Everything that benchmarks/monitor_overhead.py measured."""
    rows = []
    for name, found in result["models"].items():
        verdict = "" if found["steady_interval"][0] <= found["allowed"] else ", **above it**"
        clock = found["own_clock"]
        rows.append(
            [
                f"{name} ({found['parameters']:,})",
                _seconds(found["step_seconds"]),
                f"{_percent(found['steady_overhead'], found['steady_interval'])}{verdict}",
                f"{100 * found['allowed']:.1f}%",
                f"{_seconds(found['first_seconds'])}, in {found['first_steps']} steps",
                *(
                    _often(clock["costs"].get(kind), clock["steps_between"][kind])
                    for kind in ("burst", "tensors", "inside", "batch", "largest")
                ),
            ]
        )
    header = [
        "model (parameters)",
        "bare step",
        "steady overhead",
        "budget",
        "first measurements",
        "burst",
        "tensor by tensor",
        "inside",
        "batch sharpness",
        "largest eigenvalue",
    ]
    idle = result["idle"]
    low, high = (1e6 * end for end in idle["interval"])
    hooks = (
        f"Both hooks on a step without any measurement: {1e6 * idle['hooks_seconds']:.1f} µs ({low:.1f} to {high:.1f})."
    )
    return "\n\n".join([_table(header, rows), hooks, _origin(result["provenance"])])


def _often(seconds: float | None, steps: float | None) -> str:
    """What one measurement costs, and how often it is made from then on."""
    if seconds is None:
        return "not measured"
    return f"{_seconds(seconds)}; " + ("not again" if steps is None else f"every {_digits(steps)} steps")


def monitor_peers(result: Record) -> str:
    """What benchmarks/monitor_peers.py measured: the ratios, failures in their place, then what each one records."""
    runs = result["runs"]
    models = list(dict.fromkeys(model for found in runs.values() for model in found))
    rows, failures = [], []
    for name, found in runs.items():
        failed = [f"{model}: {item['failure']}" for model, item in found.items() if "failure" in item]
        failures += [f"- {name}, {text}" for text in failed]
        for period in result["watchers"][name]["periods"] or [1]:
            title = _bold_if_dyntune(name) + (f", every {period:,} steps" if period > 1 else "")
            rows.append([title, *(_peer_cell(found.get(model), str(period)) for model in models)])
    header = ["watched by", *(_with_step(model, runs) for model in models)]
    parts = [_table(header, rows)]
    if failures:
        parts += [f"Failures, {len(failures)} of {sum(map(len, runs.values()))}:", "\n".join(failures)]
    words = []
    for name, found in runs.items():
        version = next((f" {item['version']}" for item in found.values() if "version" in item), "")
        about = result["watchers"][name]
        words.append([f"{_bold_if_dyntune(name)}{version}", about["records"], about["source"]])
    parts += [_table(["", "what can be read afterwards", "attached as in"], words), _origin(result["provenance"])]
    return "\n\n".join(parts)


def _with_step(model: str, runs: Record) -> str:
    """The model and how long its bare step takes, in the median over tools."""
    found = [item["step_seconds"] for models in runs.values() if "step_seconds" in (item := models.get(model, {}))]
    return f"{model}, {_seconds(float(np.median(found)))}" if found else model


def _peer_cell(found: Record | None, period: str) -> str:
    if found is None:
        return "not run"
    if "failure" in found:
        return f"**fails**: {found['failure'].split(':')[0]}"
    cost = found["at"][period]
    return f"{_percent(cost['overhead'], cost['interval'])}; {_seconds(found['first_seconds'])}"


def run_log(result: Record) -> str:
    """What benchmarks/run_log.py measured."""
    titles = {
        "at_once": "each record written at once (the default)",
        "at_once_with_a_nan": "with a NaN among the numbers",
        "buffered_for_a_second": "buffered for a second",
        "in_memory_only": "in memory only",
        "together": "64 steps in one record, per step",
    }
    keys = ("cpu_best", "cpu_median", "wall_best", "wall_median")
    rows = [[titles[case], *(f"{found[key]:.1f}" for key in keys)] for case, found in result["records"].items()]
    memory = result["memory"]
    kept = (
        f"Memory: {memory['bytes_per_number']:.1f} bytes for each number, over {memory['steps']:,} steps; "
        f"on disk {memory['file_bytes_per_step']:.0f} bytes for each step."
    )
    header = ["record of ten numbers, µs", "CPU, best", "CPU, median", "clock, best", "clock, median"]
    return "\n\n".join([_table(header, rows), kept, _origin(result["provenance"])])


def tier2(result: Record) -> str:
    """What benchmarks/tier2.py measured: costs, then accuracy."""
    rows = []
    for model, case in result["cost"].items():
        for name, took in case["measurements"].items():
            low, high = took["of_a_forward_quartiles"]
            ratio = f"{took['of_a_forward']:.2f} ({low:.2f}–{high:.2f})"
            rows.append([f"`{name}`, {model}", _seconds(took["seconds"]), ratio, f"{took['of_a_step']:.2f}"])
    costs = _table(["", "time", "in forward passes (quartiles)", "in training steps"], rows)
    accuracy = [
        [
            f"{row['largest_logit']:.3g}",
            f"{row['smallest_entropy']:.2g}",
            f"{row['entropy_error']:.1g}",
            f"{row['logit_relative_error']:.1g}",
        ]
        for row in result["accuracy"]
    ]
    header = ["largest logit", "smallest entropy, nats", "error of entropy, nats", "relative error of largest logit"]
    return "\n\n".join([costs, _table(header, accuracy), _origin(result["provenance"])])


def signals(result: Record) -> str:
    """What benchmarks/signals.py measured: costs, then the accuracy of the sketch."""
    cases = result["cost"]
    rows = [
        [name, *(f"{100 * case['signals'][name]['of_a_step']:.2g}%" for case in cases), f"{found['of_a_sum']:.2f}"]
        for name, found in cases[0]["signals"].items()
    ]
    header = [
        f"{cases[0]['parameters']:,} parameters",
        *(f"of a step of {case['rows']} rows ({_seconds(case['step_seconds'])})" for case in cases),
        "in sums of the gradients",
    ]
    accuracy = result["accuracy"]
    sketched = [
        [kind, f"{f['deviation']:.4f} ± {f['standard_error_of_deviation']:.4f}", f"{f['predicted']:.4f}"]
        for kind, f in accuracy["kinds"].items()
    ]
    head = [f"sketch of width {accuracy['width']:,}, {accuracy['draws']} seeds", "deviation of a cosine", "predicted"]
    return "\n\n".join([_table(header, rows), _table(head, sketched), _origin(result["provenance"])])


def _alarm_share(found: Record | None) -> str:
    """A share of runs with its interval over cells."""
    if found is None:
        return ""
    low, high = (100 * found[f"cell_{end}"] for end in ("low", "high"))
    return f"{found['count']}/{found['of']}, {100 * found['rate']:.0f}% ({low:.0f} to {high:.0f})"


def _alarm_rate(found: Record | None) -> str:
    """False alarms per 100,000 steps with the exact interval."""
    if found is None:
        return ""
    return f"{found['count']}; {_digits(found['rate'])} ({_digits(found['low'])} to {_digits(found['high'])})"


def _alarm_lead(found: Record | None) -> str:
    if found is None:
        return ""
    return f"{round(found['median'])} ({round(found['cell_low'])} to {round(found['cell_high'])})"


def _alarm_name(row: Record) -> str:
    return f"**dyntune**, {row['severity']}" if row["detector"] == "dyntune" else row["detector"]


def alarms(result: Record) -> str:
    """Every detector as published: what it finds, and how often it finds something where nothing is."""
    shown = [row for row in result["points"] if row["default"] or row.get("budget_of_warning")]
    rows = [
        [
            _alarm_name(row),
            *(_alarm_share(row["detection"][level]) for level in ("severe", "medium", "mild")),
            _alarm_lead(row["lead"]["sudden"]) if "lead" in row else "",
            _alarm_rate(row["healthy"]),
            "" if row["healthy"] is None else _digits(row["healthy"]["upper"]),
            f"{'no' if row['twins'] is None else row['twins']['count']}; {row['before_onset']}",
        ]
        for row in shown
    ]
    header = [
        "detector",
        "severe faults",
        "medium",
        "mild",
        "lead time, steps",
        "false alarms; per 100,000 healthy steps",
        "95% upper limit",
        "others: in twins; before onsets",
    ]
    curves = [
        f"![Share of {level} faults found against false alarms, every detector.](../_static/alarms-{level}.svg)"
        for level in ("severe", "medium")
    ]
    parts = [_alarms_complete(result), _table(header, rows), *curves, *_alarms_ahead(result)]
    parts += [_alarms_causes(shown), _alarms_families(result)]
    return "\n\n".join([*parts, _alarms_sources(result), _origin(result["provenance"])])


def _alarms_complete(result: Record) -> str:
    found = [
        f"{row['judged']:,} of {row['defined']:,} {name} ({row['steps']:,} steps)"
        for name, row in result["complete"].items()
    ]
    left_out = result["not_healthy"]
    tail = f" Left out, since they were not healthy: {', '.join(left_out)}." if left_out else ""
    return f"The {result['half']} half: {'; '.join(found)}.{tail}"


def _alarms_ahead(result: Record) -> Iterable[str]:
    """Paired differences at the same false alarms."""
    levels = [level for level in ("severe", "medium") if any(row["detection"][level] for row in result["points"])]
    for severity, ours in result["ours"].items():
        rows = []
        for name in result["sources"]:
            cells = []
            for level in levels:
                gain = ours["ahead"].get(name, {}).get(level)
                if gain is None:
                    cells += ["no level is as quiet", ""]
                    continue
                low, high = (100 * gain[f"cell_{end}"] for end in ("low", "high"))
                cells.append(f"{100 * gain['detection']:.0f}%")
                cells.append(f"{100 * gain['gain']:+.0f} ({low:+.0f} to {high:+.0f})")
            rows.append([name, *cells])
        header = [f"at no more false alarms than dyntune, {severity}"]
        header += [title for level in levels for title in (level, "dyntune's lead, points")]
        if ours["ahead"]:
            yield _table(header, rows)


def _alarms_causes(shown: list[Record]) -> str:
    """Of all faults, and of those that were detected; detectors that never name the right one are left out."""
    columns = [(name, level) for level in ("severe", "medium") for name in ("top_1", "top_3", "top_1_of_detected")]
    kept = [row for row in shown if any(row[name][level] and row[name][level]["count"] for name, level in columns)]
    rows = [[_alarm_name(row), *(_alarm_share(row[name][level]) for name, level in columns)] for row in kept]
    words = ("cause named first", "among three", "first, of those detected")
    return _table(["detector", *(f"{level}: {word}" for level in ("severe", "medium") for word in words)], rows)


def _alarms_families(result: Record) -> str:
    """Of each generator, what all alarms of dyntune together find."""
    rows = []
    for name, row in result["ours"]["warning"]["families"].items():
        cells = []
        for level in ("severe", "medium", "mild"):
            cell = row.get(level)
            cells.append("" if cell is None else f"{cell['detected']}/{cell['runs']}; {cell['top_1']}, {cell['top_3']}")
        rows.append([name, *cells])
    header = ["generator: detected; cause first, among three", "severe", "medium", "mild"]
    return _table(header, rows)


def _alarms_sources(result: Record) -> str:
    rows = [[name, source, missing] for name, (source, missing) in result["sources"].items()]
    return _table(["rule", "as described in", "what the record does not allow"], rows)


def replays(result: Record) -> str:
    """The first cause with and without replay, and what replay says of healthy windows."""
    rows = [
        [
            severity,
            f"{told['detected']} of {told['runs']}",
            *(
                _alarm_share(told[name])
                for name in ("top_1_alone", "top_1_with_replay", "alone_where_named_by_replay", "named_by_replay")
            ),
            "; ".join(f"{count} {verdict.replace('_', ' ')}" for verdict, count in sorted(told["verdicts"].items())),
        ]
        for severity, told in ((level, result[level]) for level in ("severe", "medium"))
    ]
    header = ["", "detected", "cause named first", "with replay", "where replay names one: alone", "replay", "answers"]
    healthy = result["healthy"]
    verdicts = "; ".join(
        f"{count} {verdict.replace('_', ' ')}" for verdict, count in sorted(healthy["verdicts"].items())
    )
    said = (
        f"In {healthy['runs']} healthy runs, alarms that mean nothing: no cause is named in "
        f"{_alarm_share(healthy['windows'])} of the windows that could be replayed ({verdicts})."
    )
    return "\n\n".join([_table(header, rows), said, _origin(result["provenance"])])


def _nats(found: Record) -> str:
    """A mean cost with its interval, and the dearest."""
    if found["mean"] is None:
        return ""
    ends = "" if found["interval"] is None else " ({:.4f} to {:.4f})".format(*found["interval"])
    return f"{found['mean']:.4f}{ends}"


def _hits(found: Record) -> str:
    if not found["of"]:
        return ""
    low, high = (100 * end for end in found["interval"])
    return f"{found['hits']} of {found['of']} ({low:.0f}–{high:.0f} %)"


def beta2_synthetic(result: Record) -> str:
    """What benchmarks/beta2/synthetic.py measured: costs, coverage, refusals."""
    names = list(result["drift"][0]["cost"])
    laws = [
        f"{law['tau']}, {law['sigma']:g}, {law['kurtosis']:g}, {'one' if law['shared'] else 'each its own'}"
        for law in result["drift"]
    ]
    costs = [
        [said, f"{law['best']:.3f}", *(_nats(law["cost"][name]) for name in names)]
        for said, law in zip(laws, result["drift"], strict=True)
    ]
    held = [
        [said, *(_hits(law[key]) for key in ("identified", "coverage", "coverage_local"))]
        for said, law in zip(laws, result["drift"], strict=True)
    ]
    head = "tau, deviation, kurtosis, variances"
    refused = [[name, _hits(found)] for name, found in result["numbers_where_none_may_be"].items()]
    return "\n\n".join(
        [
            _table([head, "best factor", *names], costs),
            _table([head, "identified", "best within its interval", "best within the local level's"], held),
            _table(["series", "a number was given"], refused),
            _origin(result["provenance"]),
        ]
    )


def beta2_reddi(result: Record) -> str:
    """What benchmarks/beta2/reddi.py measured: distances from the best place, by steepness and learning rate."""
    names = list(result["cells"][0]["fixed"])
    rows = [
        [
            f"{c['steep']:g}",
            f"{c['lr']:g}",
            *(f"{c['fixed'][name][0]:.3f}" for name in names),
            f"{c['suggested']:.6g}",
            f"{c['ours'][0]:.3f} ± {c['ours'][1]:.3f}",
            f"{c['within_memory']:.3g}",
        ]
        for c in result["cells"]
    ]
    head = ["C", "learning rate", *names, "suggested", "at the suggested", "steep slopes in its memory"]
    return "\n\n".join([_table(head, rows), _origin(result["provenance"])])


def _mean_share(row: Record) -> str:
    low, high = (100 * end for end in row["interval"])
    return f"{100 * row['mean']:.2f} % ({low:.2f} to {high:.2f})"


def beta2_judged(result: Record) -> str:
    """What benchmarks/beta2/judge.py found on a half: every rule, the lowest mean regret first."""
    ordered = sorted((item for item in result["rules"].items() if "mean" in item[1]), key=lambda item: item[1]["mean"])
    rest = result["without_bandits"]
    rows = [
        [
            f"**{name}**" if name.startswith("suggest") else name,
            _mean_share(row),
            "" if row.get("worst") is None else f"{100 * row['worst']:.1f} %",
            "" if name not in result["against"] else _mean_share(result["against"][name]),
            "" if name not in rest["rules"] else f"{100 * rest['rules'][name]['mean']:.2f} %",
            "" if name not in rest["against"] else _mean_share(rest["against"][name]),
            str(row.get("diverged", "")),
            "" if "spikes" not in row else f"{row['spikes']:,}",
        ]
        for name, row in ordered
    ]
    bare = f"mean without the bandits, {rest['cells']} cells"
    header = [
        "rule",
        "mean regret",
        "worst, where certain",
        "ours less this",
        bare,
        "ours less this",
        "diverged runs",
        "spikes",
    ]
    seeds = " or ".join(map(str, result["seeds"]))
    said = (
        f"{result['cells']} cells (workload and learning rate) of {result['families']} families, {seeds} paired seeds "
        f"each; noise floor {100 * result['noise_floor']:.2f} %. Rank correlation of the bank's score with the loss: "
        + (
            "none was scored."
            if result["score_and_loss"]["mean"] is None
            else "{mean:.2f} over {cells} cells.".format(**result["score_and_loss"])
        )
    )
    return "\n\n".join([_table(header, rows), said, _origin(result["provenance"])])


def _group_share(row: Record) -> str:
    """A mean share over groups with its interval."""
    if not row.get("groups"):
        return ""
    ends = row["interval"]
    text = f"{100 * row['mean']:.2f} %"
    return text if ends is None else f"{text} ({100 * ends[0]:.2f} to {100 * ends[1]:.2f})"


def _octaves(row: Record) -> str:
    if not row.get("groups"):
        return "no group"
    ends = row["interval"]
    text = f"{row['mean']:.2f}"
    return text if ends is None else f"{text} ({ends[0]:.2f} to {ends[1]:.2f}), {row['groups']} groups"


def heads_judged(result: Record) -> str:
    """What benchmarks/heads/judge.py found on a half."""
    rates, said, regrets, flags = (result[name] for name in ("rates", "verdicts", "regrets", "flags"))
    against = rates["against the group mean"]
    low, high = (100 * end for end in rates["interval"])
    facts = [
        ["groups judged, of all", f"{result['groups']} of {result['of']}"],
        ["seeds of the brute force in them, of all", f"{result['seeds']} of {result['of_seeds']}"],
        ["cells with an observed failing rate; beyond the grid", f"{rates['cells']}; {rates['censored']}"],
        [
            "predicted within a factor 2",
            f"{rates['within a factor 2']} of {rates['cells']} ({low:.0f}–{high:.0f} %)",
        ],
        ["mean error; bias, octaves", f"{rates['log2 error']:.2f}; {rates['bias']:.2f}"],
        ["error less that of the group's own mean, octaves: all groups", _octaves(against["all"]["error"])],
        ["the same where head counts differ", _octaves(against["with an effect"]["error"])],
        ["error of the heads' part less that of none, octaves", _octaves(against["all"]["of the heads' part alone"])],
        [
            "concordance within groups",
            "no pairs" if rates["concordance"] is None else f"{rates['concordance']:.2f} of {rates['pairs']} pairs",
        ],
        [
            "said: equivalent, different, undecided",
            ", ".join(str(said["said"][v]) for v in ("equivalent", "different", "undecided")),
        ],
        ["of those right: equivalent, different", f"{said['right']['equivalent']}, {said['right']['different']}"],
        [
            "observed: within the margin; differ (of those with two seeds)",
            f"{said['observed equal']}; {said['observed an effect']} of {said['with two seeds']}",
        ],
        [
            "hot models flagged; before any training",
            f"{flags['hot flagged']} of {flags['hot']}; {flags['hot flagged before training']}",
        ],
        ["other models flagged", f"{flags['others flagged']} of {flags['others']}"],
    ]
    losses = [
        [f"**{name}**" if name == "suggest_heads" else name, _group_share(row), f"{100 * row['worst']:.1f} %"]
        for name, row in sorted(regrets["regret"].items(), key=lambda item: item[1]["mean"])
    ]
    parts = [_table(["failing rates, verdicts, flags", ""], facts)]
    if losses:
        paired = regrets["suggest_heads minus the default"]
        losses.append(["any number of heads, suggest_lr", _group_share(regrets["any number of heads, suggest_lr"]), ""])
        text = f"{regrets['groups']} groups, three fresh seeds each. `suggest_heads` less 8 heads with `suggest_lr`: "
        text += f"{_group_share(paired['all'])} in all"
        text += "".join(
            f", {_group_share(paired[name])} in the {paired[name]['groups']} {said}"
            for name, said in (("with an effect", "where head counts differ"), ("without", "where none was seen"))
            if paired[name].get("groups")
        )
        parts += [_table(["pair", "mean regret", "worst group"], losses), f"{text}."]
    return "\n\n".join([*parts, _origin(result["provenance"])])


def frozen_lake(result: Record) -> str:
    """What benchmarks/rl/frozen_lake.py measured: edges predicted and observed."""

    def observed(found: Record) -> str:
        if found["observed"] is None:
            return "above the grid"
        return f"{_digits(found['observed'])} ({found['log2_ratio']:+.2f})"

    rows = [
        [
            f"{c['gamma']:g}",
            f"{c['tau']:g}",
            _digits(c["predicted"]),
            observed(c["beside"]),
            observed(c["uniform"]),
            f"{c['ceiling']:.2g}",
        ]
        for c in result["cells"]
    ]
    head = ["discount", "entropy weight", "predicted edge", "observed, from beside (octaves off)"]
    head += ["observed, from the uniform policy", "2 over theory's bound"]
    said = "; ".join(
        f"{name}: {s['within']} of {s['of']} within 0.3 octaves, the worst {s['worst']:.2f}"
        for name, s in (
            ("from beside the maximum", result["summary"]["beside"]),
            ("from the uniform policy", result["summary"]["uniform"]),
        )
    )
    return "\n\n".join([_table(head, rows), f"{said}.", _origin(result["provenance"])])


def inner_loop(result: Record) -> str:
    """What benchmarks/rl/inner_loop.py measured."""
    s = result["summary"]
    rise, far, flips = s["first_rise_ratio"], s["as_collected"], s["flips_above_edge"]
    below = [f"{n} of {of}" for share, (n, of) in s["grows"].items() if float(share) < 1]
    above = [f"{n} of {of}" for share, (n, of) in s["grows"].items() if float(share) > 1]
    rows = [
        [
            "first rise of the loss over 2 / lambda_dir",
            f"{rise['least']:.3f} to {rise['most']:.3f}, {rise['n']} policies",
        ],
        [
            "the same at policies as collected",
            f"{far['least']:.3g} and more, {far['n']} policies; {far['negative']} with negative curvature",
        ],
        ["sign of the top component flips above 2 / lambda_max", f"{flips[0]} of {flips[1]}"],
        ["error of its factor abs(1 - eta lambda), at most", f"{100 * s['factor_error_above_edge']['worst']:.1f} %"],
        ["it grows at 0.5, 0.8, 0.95 of the edge", ", ".join(below)],
        ["it grows at 1.05, 1.2, 1.5 of the edge", ", ".join(above)],
    ]
    return "\n\n".join([_table(["PPO's inner loop on a fixed rollout", ""], rows), _origin(result["provenance"])])


def affine(result: Record) -> str:
    """What benchmarks/rl/affine.py measured."""
    rows = [
        [
            f"{name} (n = {row['n']}, {row['runs']} runs)",
            f"{row['joint']:.0f}",
            *(f"{row['products'][key]:.0f}" for key in ("independent", "warm", "oracle", "oracle, warm")),
            f"1/{1 / row['worst_share']['independent']:.1f}",
            f"{row['within']['largest']} and {row['within']['smallest']} of {row['asked']}",
            f"{100 * row['worst_error']['largest']:.2g} % and {100 * row['worst_error']['smallest']:.2g} %",
            f"{row['bracket_misses']} of {2 * row['asked']}",
        ]
        for name, row in result["summary"].items()
    ]
    head = ["pair", "joint, products", "independent", "warm", "oracle", "oracle, warm", "worst share of independent"]
    head += ["within 0.5 % and 2 %", "worst error", "brackets that miss"]
    shares = [run["share"]["independent"] for run in result["runs"]]
    said = f"{sum(share <= 1 / 8 for share in shares)} of {len(shares)} runs took an eighth of the products or less."
    return "\n\n".join([_table(head, rows), said, _origin(result["provenance"])])


def calibration(result: Record) -> str:
    """What benchmarks/calibration/mnist.py measured."""
    seeds = result["seeds"]
    rows = []
    for name in ("as it is", "suggested", "placebo"):
        mean = {k: float(np.mean([s[name][k] for s in seeds])) for k in ("temperature", "nll", "error", "expected")}
        less = [result["paired"].get(f"{k}, {name} less as it is") for k in ("nll", "error")]
        rows.append(
            [
                f"**{name}**" if name == "suggested" else name,
                f"{mean['temperature']:.2f}",
                *(
                    f"{mean[k]:.3f}" + ("" if d is None else f" ({d[0]:+.3f}: {d[1]:+.3f} to {d[2]:+.3f})")
                    for k, d in zip(("nll", "error"), less, strict=True)
                ),
                f"{mean['expected']:.3f}",
                f"{result['miscalibrated'][name]} of {len(seeds)}",
            ]
        )
    head = ["logits", "temperature", "held-out NLL, nats (less as it is: 95 %)", "smooth error (less as it is: 95 %)"]
    head += ["of perfect calibration", "seeds told from perfect"]
    return "\n\n".join([_table(head, rows), _origin(result["provenance"])])


def ppo_pairs(result: Record) -> str:
    """What benchmarks/rl/suggested.py measured."""
    rows = []
    for env, found in result["envs"].items():
        for name, (alpha, lr) in found["cells"].items():
            scores = found["scores"][name]
            gap = {"best of the grid": "against the best", "defaults": "against the defaults"}.get(name)
            shown = "" if gap is None else "{mean:+.0%} ({low:+.0%} to {high:+.0%})".format(**found[gap])
            rows.append([f"{env}, {name}", f"{alpha:g}", f"{lr:g}", f"{np.mean(scores):.3f}", shown])
    head = [
        "PPO",
        "entropy coefficient",
        "learning rate",
        f"score, {len(scores)} fresh seeds",
        "suggested beside it (95 %)",
    ]
    cost = ", ".join(
        f"{env}: {f['suggested']['steps'] / f['suggested']['steps_of_a_training']:.1f}"
        for env, f in result["envs"].items()
    )
    said = f"Steps of the pilots over those of one training: {cost}."
    return "\n\n".join([_table(head, rows), said, _origin(result["provenance"])])


LR_BASELINES = "../lr/results/baselines.json"
RENDERERS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "peers": ("peers", peers_short),
    "peers-full": ("peers", peers),
    "spectra": ("spectra", spectra),
    "scale": ("scale", scale),
    "sampling": ("sampling", sampling),
    "learning-rate": ("../lr/results/ours", learning_rate),
    "obstacles": ("obstacles", obstacles),
    "monitor-overhead": ("monitor_overhead", monitor_overhead),
    "monitor-peers": ("monitor_peers", monitor_peers),
    "run-log": ("run_log", run_log),
    "tier2": ("tier2", tier2),
    "signals": ("signals", signals),
    "alarms": ("../faults/results/alarms", alarms),
    "replays": ("../faults/results/replays", replays),
    "beta2-reddi": ("../beta2/results/reddi", beta2_reddi),
    "beta2-synthetic": ("../beta2/results/synthetic", beta2_synthetic),
    "beta2-tune": ("../beta2/results/judged-tune", beta2_judged),
    "beta2-test": ("../beta2/results/judged-test", beta2_judged),
    "heads-tune": ("../heads/results/judged-tune", heads_judged),
    "heads-test": ("../heads/results/judged-test", heads_judged),
    "frozen-lake": ("../rl/results/frozen_lake", frozen_lake),
    "inner-loop": ("../rl/results/inner_loop", inner_loop),
    "affine": ("../rl/results/affine", affine),
    "ppo-pairs": ("../rl/results/suggested", ppo_pairs),
    "calibration": ("../calibration/results/mnist", calibration),
    "obstacles-short": ("obstacles", obstacles_short),
}


def rendered() -> dict[str, str]:
    """Every table whose result exists."""
    return {
        name: render(json.loads((RESULTS / f"{source}.json").read_text()))
        for name, (source, render) in RENDERERS.items()
        if (RESULTS / f"{source}.json").exists()
    }


def replaced(text: str, name: str, table: str) -> str | None:
    """`text` with the table between its markers; None where it has no place."""
    begin, end = f"<!-- table:{name}:begin -->", f"<!-- table:{name}:end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        return None
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def main() -> int:
    """Write, check or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="fail if a page is stale")
    mode.add_argument("--print", action="store_true", help="print the tables, change nothing")
    arguments = parser.parse_args()
    tables = rendered()
    homeless = dict(tables)
    stale = []
    for page in PAGES:
        before = after = page.read_text() if page.exists() else ""
        for name, table in tables.items():
            updated = replaced(after, name, table)
            if updated is not None:
                after = updated
                homeless.pop(name, None)
        if after != before:
            stale.append(page.name)
            if not (arguments.check or arguments.print):
                page.write_text(after)
    if arguments.check:
        if stale:
            print(f"{', '.join(stale)}: stale, run python benchmarks/tables.py", file=sys.stderr)
        return int(bool(stale))
    for table in (tables if arguments.print else homeless).values():
        print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
