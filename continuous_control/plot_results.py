"""Plots and tabulates returns over seeds of continuous control (A.3): decoded offline, against
labels, and online, against steps.

reads   <results-dir>/returns.csv, stage_1.csv: tables of extras/summarize.py; variants may be
        <setting>/<variant>, a setting being what differs in frames and machine, such as h200_64
writes  <results-dir>/figures/<setting>_<task>.png, <task>_online.png

python -m continuous_control.plot_results

extras/write_tables.py prints the same numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common
import matplotlib
import numpy as np
import tyro
from extras.plot_figures import plot_band, read_table, select

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Variant(NamedTuple):
    label: str
    color: str
    line: str


VARIANTS = {  # decoders are fitted on the policy and scale actions (--match-std) unless said
    "wide_match": Variant("LAPO, wider IDM and FDM", "C6", "-"),
    "lapo_match": Variant("LAPO", "C3", "-"),
    "untrained_match": Variant("untrained IDM", "C3", ":"),
    "vq_match": Variant("LAPO with VQ", "C2", "-"),
    "context_2": Variant("LAPO, context 2", "C8", "-"),
    "context_3": Variant("LAPO, context 3", "C9", "-"),
    "cloning_match": Variant("cloning the labelled frames alone", "C7", "--"),
    "lapo_policy": Variant("LAPO, actions not scaled", "C1", "-"),
    "untrained_policy": Variant("untrained IDM, actions not scaled", "C1", ":"),
    "vq_policy": Variant("LAPO with VQ, actions not scaled", "C2", "--"),
    "lapo_idm": Variant("LAPO, decoder on z_t (the paper)", "C0", "-"),
    "untrained_idm": Variant("untrained IDM, decoder on z_t", "C0", ":"),
    "cloning": Variant("cloning, actions not scaled", "C5", "--"),
    "cloning_all": Variant("cloning all true actions", "C4", "-."),
}
ONLINE = {  # variant and method
    ("lapo_match", "rl_sl"): Variant("RL and SL", "C3", "-"),
    ("lapo_match", "rl"): Variant("RL alone", "C0", "-"),
    ("untrained_match", "rl_sl"): Variant("RL and SL, untrained IDM", "C3", ":"),
}
DECODED = ("decoder", "bc", "bc_all")  # methods


@dataclass
class Args:
    results_dir: Path = Path("results/continuous_control")
    """The folder of the tables; figures go to <results-dir>/figures."""


def read(path):
    """Rows of a table; the setting, '' if there is none, is a column of its own."""
    rows = read_table(path)
    for row in rows:
        row["setting"], _, row["variant"] = row["variant"].rpartition("/")
    return rows


def mean_and_std(by_seed):
    """[seeds, decoders] -> mean and sample std over seeds; of one seed, over decoders or clones;
    NaN where there is one in all.
    """
    values = by_seed[0]
    if len(by_seed) > 1:
        values = [np.mean(decoders) for decoders in by_seed]
    std = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return np.mean(values), std


def decoded(rows, setting, variant, task):
    """{labels: [seeds, decoders]} of a variant, and how many these are, as '3 x 8'."""
    cells = {}
    for row in select(rows, setting=setting, variant=variant, game=task):
        if row["method"] in DECODED:
            seeds = cells.setdefault(row["labels"], {})
            seeds.setdefault(row["seed"], []).append(row["mean_return"])
    count = ""
    for labels, seeds in cells.items():
        cells[labels] = list(seeds.values())
        count = f"{len(seeds)} x {len(cells[labels][0])}"
    return cells, count


def online_runs(rows, variant, method, task):
    """Curves of a method: env steps [T] and returns [seeds, T] of the training episodes, and the
    return of the mean action after training, by seed.
    """
    rows = select(rows, variant=variant, method=method, game=task)
    curves = {}
    for row in select(rows, kind="ended"):
        if row["episodes"] > 0:  # otherwise no episode has ended since the point before
            curves.setdefault(row["seed"], {})[row["env_steps"]] = row["mean_return"]
    steps = [list(curve) for curve in curves.values()]
    if any(other != steps[0] for other in steps):
        common.fail(f"{variant}: the seeds' runs of {method} differ in steps")
    returns = np.array([list(curve.values()) for curve in curves.values()])
    after = [row["mean_return"] for row in select(rows, kind="quota")]
    return np.array(steps[0] if steps else []), returns, after


# --- tables ---------------------------------------------------------------------------------------


def show(by_seed):
    mean, std = mean_and_std(by_seed)
    return f"{mean:.0f}" if np.isnan(std) else f"{mean:.0f} ± {std:.0f}"


def offline_table(folder, setting, task):
    """Returns of a setting against labels, a row for each variant."""
    rows = read(folder / "returns.csv")
    found = {name: decoded(rows, setting, name, task) for name in VARIANTS}
    labels = set()
    for cells, _ in found.values():
        labels |= {x for x in cells if x > 0}
    labels = sorted(labels)
    lines = []
    for name, (cells, count) in found.items():
        shown = [show(cells[x]) if x in cells else "" for x in labels]
        if count and not any(shown):  # clones of all labels
            shown[-1] = f"{show(next(iter(cells.values())))} (all labels)"
        if count:
            lines.append([f"{VARIANTS[name].label} ({count})", *shown])
    for name in ("expert", "random", "mean_action"):
        found = select(rows, setting=setting, game=task, method=name)
        values = sorted({f"{row['mean_return']:.0f}" for row in found}, key=float)
        text = values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"
        blank = [""] * (len(labels) - 1)
        lines.append([name.replace("_", " "), text, *blank])
    header = [f"{task}, {setting}: return (seeds x decoders), with labels:"]
    return header + [f"{x:,.0f}" for x in labels], lines


def probe_table(folder, setting):
    """R^2 of the probe on random play at the end of stage 1, by seed."""
    rows = select(read(folder / "stage_1.csv"), setting=setting)
    tasks = sorted({row["game"] for row in rows})
    lines = []
    for name, variant in VARIANTS.items():
        cells = []
        for task in tasks:
            last = {}
            for row in select(rows, variant=name, game=task):
                last[row["seed"]] = f"{row['probe']:.2f}"
            cells.append(", ".join(last.values()))
        if any(cells):
            lines.append([variant.label, *cells])
    return [f"{setting}: R² of the probe on random play, by seed", *tasks], lines


def online_table(folder, task):
    """Returns in quarters of the steps, and of the mean action after training."""
    rows = read(folder / "returns.csv")
    ended = select(rows, game=task, kind="ended")
    ends = max(row["env_steps"] for row in ended) * np.arange(5) / 4
    lines = []
    for (name, method), variant in ONLINE.items():
        steps, returns, after = online_runs(rows, name, method, task)
        if len(returns) == 0:
            continue
        cells = []
        for start, end in zip(ends, ends[1:]):
            quarter = returns[:, (steps > start) & (steps <= end)]
            cells.append(show(list(quarter)))
        cells.append(show([[value] for value in after]))
        lines.append([f"{variant.label} ({len(returns)} seeds)", *cells])
    header = ["return in steps", *[f"to {end / 1000:.0f}k" for end in ends[1:]]]
    return [*header, "mean action after training"], lines


TABLES = dict(offline=offline_table, probe=probe_table, online=online_table)


# --- figures --------------------------------------------------------------------------------------


def finish(figure, axes, rows, path, title):
    """Horizontal lines at the returns of the expert and of random actions, labels, the file."""
    for name, style in (("expert", "--"), ("random", ":")):
        value = np.mean([row["mean_return"] for row in select(rows, method=name)])
        axes.axhline(value, color="black", linestyle=style, label=f"{name} ({value:.0f})")
    scales = sorted({row["scale"] for row in rows} - {""})
    title += f"\nmean and std over seeds, {', '.join(scales)} pictures"
    axes.set(ylabel="mean episodic return", title=title)
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    common.save_figure(figure, path)
    print(f"figure: {path}")


def plot_offline(rows, setting, task, path):
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    for name, variant in VARIANTS.items():
        cells, count = decoded(rows, setting, name, task)
        if not cells:
            continue
        labels = sorted(cells)
        spread = np.array([mean_and_std(cells[x]) for x in labels])  # [L, 2]
        mean, std = spread.T
        label = f"{variant.label} ({count})"
        if name == "cloning_all":
            style = dict(color=variant.color, linestyle=variant.line)
            axes.axhline(mean[0], label=label, **style)
        else:
            plot_band(axes, labels, mean, std, variant.color, variant.line, label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("labelled frames; in brackets: seeds x decoders (std of one seed: over these)")
    rows = select(rows, setting=setting, game=task)
    finish(figure, axes, rows, path, f"{task}, decoded offline ({setting})")


def plot_online(rows, task, path):
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for (name, method), variant in ONLINE.items():
        steps, returns, _ = online_runs(rows, name, method, task)
        if len(returns) > 0:
            std = returns.std(0, ddof=1) if len(returns) > 1 else np.nan
            label = f"{variant.label} ({len(returns)} seeds)"
            plot_band(axes, steps, returns.mean(0), std, variant.color, variant.line, label)
    axes.set_xlabel("environment steps")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    setting = select(rows, game=task, kind="ended")[0]["setting"]
    rows = select(rows, game=task, setting=setting)
    finish(figure, axes, rows, path, f"{task}, decoded online")


def main(args):
    rows = read(args.results_dir / "returns.csv")
    figures = args.results_dir / "figures"
    offline, online = set(), set()
    for row in rows:
        if (row["variant"], row["method"]) in ONLINE:
            online.add(row["game"])
        elif row["variant"] in VARIANTS and row["method"] in DECODED:
            offline.add((row["setting"], row["game"]))
    for setting, task in sorted(offline):
        name = f"{setting}_{task}" if setting else task
        plot_offline(rows, setting, task, figures / f"{name}.png")
    for task in sorted(online):
        plot_online(rows, task, figures / f"{task}_online.png")
    if not offline and not online:
        common.fail(f"{args.results_dir} has no variant of {', '.join(VARIANTS)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
