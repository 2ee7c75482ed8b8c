"""Plots and tabulates returns over seeds of continuous control (A.3): decoded offline, against
labels, and online, against steps.

reads   <results-dir>/<variant>/seed_<n>/<game>/decode_dmc.npz and decode_online_<method>.npz, the
        runs folders; VARIANTS and ONLINE name the variants
writes  <results-dir>/figures/<game>.png, <game>_online.png; prints the same numbers as tables

python -m continuous_control.plot_results
"""

from dataclasses import dataclass
from pathlib import Path

import common  # before torch
import matplotlib
import numpy as np
import tyro
from visualize_latents import save_figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VARIANTS = {  # folder: name, color, line, ending of the arrays' names
    "lapo_match": ("LAPO, decoder on the policy, std matched", "C3", "-", ""),
    "untrained_match": ("the same, untrained IDM", "C3", ":", ""),
    "wide_match": ("LAPO, wider IDM and FDM, std matched", "C6", "-", ""),
    "vq_match": ("LAPO with VQ, std matched", "C2", "-", ""),
    "cloning_match": ("cloning the labelled frames alone, std matched", "C7", "--", "_bc"),
    "lapo_policy": ("LAPO, decoder on the policy", "C1", "-", ""),
    "untrained_policy": ("the same, untrained IDM", "C1", ":", ""),
    "vq_policy": ("LAPO with VQ, decoder on the policy", "C2", "--", ""),
    "lapo_idm": ("LAPO, decoder on z_t (the paper)", "C0", "-", ""),
    "untrained_idm": ("the same, untrained IDM", "C0", ":", ""),
    "cloning": ("cloning the labelled frames alone", "C5", "--", "_bc"),
    "cloning_all": ("cloning all true actions", "C4", "-.", "_bc_all"),
}
ONLINE = {  # folder, method: name, color, line
    ("lapo_match", "rl_sl"): ("LAPO, RL and SL", "C3", "-"),
    ("lapo_match", "rl"): ("LAPO, RL alone", "C0", "-"),
    ("untrained_match", "rl_sl"): ("RL and SL, untrained IDM", "C3", ":"),
}
ROWS = dict(returns="return", policy_r2="R² from o_t", r2="R² of the decoder")  # array: row


@dataclass
class Args:
    results_dir: Path = Path("results/continuous_control")
    """Runs are in <results-dir>/<variant>/seed_<n>/<game>."""


def read(paths, name):
    """An array of each file, [L, decoders]; files without it are left out."""
    files = [common.load_npz(path) for path in paths]
    return [file[name] for file in files if name in file]


def mean_and_std(seeds):
    """[L, decoders] of each seed -> mean and sample std [L] over seeds; of one seed, over decoders
    (or clones).
    """
    values = np.array([x.mean(1) for x in seeds]) if len(seeds) > 1 else seeds[0].T
    return values.mean(0), values.std(0, ddof=min(1, len(values) - 1))


def plot_references(axes, settings):
    """Horizontal lines at the returns of the expert and of random actions."""
    for name, style in (("expert", "--"), ("random", ":")):
        value = settings[f"{name}_return"]
        axes.axhline(value, color="black", linestyle=style, label=f"{name} ({value:.0f})")


def plot_game(args, game):
    """Writes the figure of one game and prints its table."""
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    lines = {}
    for variant, (label, color, style, ending) in VARIANTS.items():
        paths = sorted(args.results_dir.glob(f"{variant}/seed_*/{game}/decode_dmc.npz"))
        if not paths:
            continue
        labels, settings = common.load_npz(paths[0], ["labels"]).values()
        returns = read(paths, f"returns{ending}")
        mean, std = (np.broadcast_to(x, labels.shape) for x in mean_and_std(returns))  # bc_all: [1]
        count = f"{len(returns)} x {returns[0].shape[1]}"
        axes.plot(labels, mean, style, color=color, marker=".", label=f"{label} ({count})")
        axes.fill_between(labels, mean - std, mean + std, color=color, alpha=0.12, linewidth=0)
        for name, row in ROWS.items():
            row = f"{game}, {row} with {', '.join(map(str, labels))} labels"
            digits = 0 if name == "returns" else 2
            if seeds := read(paths, name + ending):
                cells = [f"{m:.{digits}f} ± {s:.{digits}f}" for m, s in zip(*mean_and_std(seeds))]
                lines.setdefault(row, []).append(f"| {variant} ({count}) | {' | '.join(cells)} |")
    plot_references(axes, settings)
    axes.set_xscale("log", base=2)
    scale = "laptop scale" if settings["frame_size"] < 64 else "64x64"
    title = f"{game}, {scale}, decoded offline: mean and std over seeds"
    axes.set(xlabel="labelled frames", ylabel="mean episodic return", title=title)
    note = "(seeds x decoders or clones; of one seed, std over these)"
    figure.legend(loc="outside lower center", fontsize="small", ncols=2, title=note)
    save_figure(figure, args.results_dir / f"figures/{game}.png")
    for row, cells in lines.items():
        print(f"\n{row}", *cells, sep="\n")


def plot_online(args, game):
    """Writes the figure of decoding online and prints its table."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    print(f"\n{game}, online: return in quarters of the run; of the mean action after it")
    for (variant, method), (label, color, style) in ONLINE.items():
        paths = args.results_dir.glob(f"{variant}/seed_*/{game}/decode_online_{method}.npz")
        if not (files := [common.load_npz(path) for path in sorted(paths)]):
            continue
        if len({file["env_steps"].tobytes() for file in files}) > 1:
            common.fail(f"{variant}/seed_*/{game}: the seeds' runs of {method} differ in steps")
        returns = np.array([file["returns"] for file in files])  # [seeds, T], NaN: no episode ended
        quarters = [np.nanmean(x, 1) for x in np.array_split(returns, 4, 1)]
        row = np.stack([*quarters, [file["mean_return"] for file in files]], 1)[..., None]
        cells = [f"{m:.0f} ± {s:.0f}" for m, s in zip(*mean_and_std(list(row)))]
        print(f"| {label} ({len(files)}) | {' | '.join(cells)} |")
        steps, mean, std = files[0]["env_steps"], *mean_and_std(list(returns[..., None]))
        axes.plot(steps, mean, style, color=color, label=f"{label} ({len(files)})")
        axes.fill_between(steps, mean - std, mean + std, color=color, alpha=0.12, linewidth=0)
        settings = files[0]["settings"]
    plot_references(axes, settings)
    title = f"{game}, decoded online: mean and std over seeds"
    axes.set(xlabel="environment steps", ylabel="mean episodic return", title=title)
    figure.legend(loc="outside lower center", fontsize="small", ncols=2, title="(seeds)")
    save_figure(figure, args.results_dir / f"figures/{game}_online.png")


def main(args):
    offline = [f"{x}/seed_*/*/decode_dmc.npz" for x in VARIANTS]
    online = [f"{x}/seed_*/*/decode_online_{method}.npz" for x, method in ONLINE]
    jobs = [
        (plot, game)
        for plot, patterns in ((plot_game, offline), (plot_online, online))
        for game in sorted({p.parent.name for x in patterns for p in args.results_dir.glob(x)})
    ]
    if not jobs:
        where = f"<variant>/seed_<n>/<game>/decode_dmc.npz, <variant> of {', '.join(VARIANTS)}"
        common.fail(f"{args.results_dir} has no {where}")
    for plot, game in jobs:
        plot(args, game)


if __name__ == "__main__":
    main(tyro.cli(Args))
