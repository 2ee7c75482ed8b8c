"""Draws the paper's Figures 3, 4 and A.5, and the probe of stage 1, from tables of our runs.

reads   <results-dir>/returns.csv, stage_1.csv, ilpo.csv (extras/summarize.py), results/paper/*.csv
writes  <results-dir>/figures/figure_3.png, figure_3_games.png, figure_4.png, figure_a5.png,
        probe.png; a figure without a run is not written

Returns are normalized: 0 for the random policy, 1 for the expert that was recorded; the paper's by
its own expert. Lines are means over seeds, bands the sample std over seeds. A panel of several
games holds the games that have all of its curves, and each seed's mean over these. The paper's
curve beside ours is of the same games.

python -m extras.plot_figures --results-dir results/laptop_plain
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common
import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAPER = Path(__file__).resolve().parents[1] / "results/paper"
TEXT = ("variant", "actions", "game", "scale", "method", "kind")  # columns that are not numbers


@dataclass
class Args:
    results_dir: Path = Path("results/laptop_plain")
    """The folder of the tables; figures go to <results-dir>/figures."""


class Series(NamedTuple):
    label: str
    color: str
    variant: str
    method: str
    x: str | None  # column of x; None: one return, whatever the number of labels
    paper: str | None = None  # its name in results/paper


ONLINE = {
    "rl_sl": Series("LAPO: RL and SL", "C0", "lapo", "rl_sl", "env_steps", "lapo_rl_sl"),
    "rl": Series("RL alone", "C1", "lapo", "rl", "env_steps", "lapo_rl_no_sl"),
    "no_vq": Series("RL alone, no VQ", "C2", "no_vq", "rl", "env_steps"),
    "scratch": Series("PPO from scratch", "C3", "scratch", "scratch", "env_steps", "ppo_scratch"),
    "ilpo": Series("ILPO", "C4", "ilpo", "rl", "env_steps"),
}
OFFLINE = {
    "decoder": Series("LAPO, decoded offline", "C0", "lapo", "decoder", "labels", "offline"),
    "untrained": Series("LAPO, untrained IDM", "C5", "untrained", "decoder", "labels"),
    "no_vq_decoder": Series("LAPO, no VQ", "C3", "no_vq", "decoder", "labels"),
    "bc": Series("cloning the same labels", "C1", "lapo", "bc", "labels"),
    "vpt": Series("VPT, the same labels", "C2", "lapo", "vpt", "labels"),
    "lapo_plus": Series("LAPO+, the same labels", "C9", "lapo", "lapo_plus", "labels"),
    "bc_all": Series("cloning all true labels", "C6", "lapo", "bc_all", None),
    "blind": Series("blind policy", "C7", "lapo", "blind", None),
}


# --- tables ---------------------------------------------------------------------------------------


def read_table(path):
    """Rows of a table as dicts: text, and floats (NaN where a cell is empty)."""
    if not path.exists():
        common.fail(f"{path} is missing; python -m extras.summarize writes it")
    rows = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name not in TEXT:
                    row[name] = float(value or "nan")
            rows.append(row)
    return rows


def read_stage_1(folder):
    """Rows of stage_1.csv; supervised: the last accuracy of the supervised IDM of the same game and
    seed, where there is one.
    """
    ceilings = {}
    if (folder / "supervised_idm.csv").exists():
        for row in read_table(folder / "supervised_idm.csv"):
            ceilings[row["game"], row["seed"]] = row["accuracy"]
    rows = read_table(folder / "stage_1.csv")
    for row in rows:
        run = row["game"], row["seed"]
        if run in ceilings:
            row["supervised"] = ceilings[run]
    return rows


def select(rows, **wanted):
    """The rows whose columns have these values."""
    found = rows
    for name, value in wanted.items():
        found = [row for row in found if row[name] == value]
    return found


def points(rows, x):
    """{x: mean return}, over decoders; x names a column, or is None."""
    by_x = {}
    for row in rows:
        key = row[x] if x else None
        by_x.setdefault(key, []).append(row["mean_return"])
    return {key: np.mean(returns) for key, returns in by_x.items()}


class Returns:
    """The rows of returns.csv, as normalized curves."""

    def __init__(self, path):
        self.rows = read_table(path)
        self.games = sorted({row["game"] for row in self.rows})

    def normalize(self, value, game):
        """By the mean returns of the random policy and of the expert over LAPO's runs, or over all
        runs if there are none of LAPO; controls repeat them.
        """
        ends = []
        for reference in ("random", "expert"):
            found = select(self.rows, game=game, method=reference)
            found = select(found, variant="lapo") or found
            if not found:
                common.fail(f"no run of {game} says what the {reference} policy returns")
            ends.append(np.mean([row["mean_return"] for row in found]))
        return common.normalize_return(value, *ends)

    def curve(self, series, game):
        """{seed: {x: return}}, of whole episodes in equal quotas where there are any, otherwise of
        training episodes that ended.
        """
        rows = select(self.rows, variant=series.variant, method=series.method, game=game)
        seeds = {}
        for seed in sorted({row["seed"] for row in rows}):
            ended = select(rows, seed=seed)
            quota = select(ended, kind="quota")
            seeds[int(seed)] = points(quota or ended, series.x)
        return seeds

    def games_with(self, all_series):
        """The games that have a curve of each of these series."""
        return [game for game in self.games if all(self.curve(s, game) for s in all_series)]

    def mean_over_games(self, series, games):
        """{seed: {x: normalized return}} of the seeds and x that all games have."""
        values = {}
        for game in games:
            for seed, curve in self.curve(series, game).items():
                of_seed = values.setdefault(seed, {})
                for x, mean_return in curve.items():
                    of_seed.setdefault(x, []).append(self.normalize(mean_return, game))
        means = {}
        for seed, curve in sorted(values.items()):
            for x, y in curve.items():
                if len(y) == len(games):
                    means.setdefault(seed, {})[x] = np.mean(y)
        return means


def stack(by_seed):
    """{seed: {x: y}} -> the x that all seeds have, and y [seeds, X]"""
    curves = list(by_seed.values())
    x = [key for key in curves[0] if all(key in curve for curve in curves)]
    y = [[curve[key] for key in x] for curve in curves]
    return x, np.array(y)


def paper_curve(name, games):
    """x and normalized return [P] of the paper's curve, a mean over these games."""
    file = "paper_offline.csv" if name == "offline" else "paper_online.csv"
    x = "labels" if name == "offline" else "env_steps"
    with open(PAPER / file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    curves = []
    if name != "offline":
        rows = select(rows, method=name)
    for game in games:
        of_game = select(rows, game=game)
        steps = np.array([float(row[x]) for row in of_game])
        returns = np.array([float(row["return"]) for row in of_game])
        ends = common.GAMES[game]
        curves.append(common.normalize_return(returns, ends.random_return, ends.expert_return))
    return steps, np.mean(curves, 0)


# --- figures --------------------------------------------------------------------------------------


def plot_band(axes, x, mean, std, color, line, label):
    """A line of means and a band of one std around it."""
    axes.plot(x, mean, line, marker=".", color=color, label=label)
    band = dict(color=color, alpha=0.15, linewidth=0)
    axes.fill_between(x, mean - std, mean + std, **band)


def draw_curves(axes, returns, all_series, games):
    """Normalized returns over games against steps or labels, and the paper's of the same games."""
    last, seeds = 0, set()
    for series in all_series:
        x, y = stack(returns.mean_over_games(series, games))
        seeds.add(len(y))
        if not series.x:
            style = dict(color=series.color, linestyle="-.")
            axes.axhline(y.mean(), label=series.label, **style)
            continue
        last = max(last, x[-1])
        std = y.std(0, ddof=1) if len(y) > 1 else np.nan
        plot_band(axes, x, y.mean(0), std, series.color, "-", series.label)
    for series in all_series:
        if series.paper:
            x, y = paper_curve(series.paper, games)
            shown = np.append(x[x < last], last)  # up to where ours ends
            label = f"the paper, same games: {series.label}"
            line = dict(color=series.color, linewidth=2, label=label)
            axes.plot(shown, np.interp(shown, x, y), ":", **line)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.axhline(1, color="black", linewidth=0.8)
    count = max(seeds) if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    unit = "seed" if count == 1 else "seeds"
    axes.set(title=f"{', '.join(games)}: {count} {unit}", ylabel="normalized return")
    if all_series[0].x == "labels":
        axes.set_xscale("log", base=2)
        axes.set_xlabel("labelled frames")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    else:
        axes.set_xlabel("environment steps")
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))


def draw_seeds(axes, rows, columns):
    """Columns {name: line style} of training metrics against updates, a line for each seed."""
    for seed in sorted({row["seed"] for row in rows}):
        of_seed = select(rows, seed=seed)
        steps = [row["grad_step"] for row in of_seed]
        for column, style in columns.items():
            y = [row.get(column, np.nan) for row in of_seed]
            label = f"{column.replace('_', ' ')}, seed {seed:.0f}"
            axes.plot(steps, y, style, color=f"C{seed:.0f}", label=label)


def new_figure(panels, title, sharey=False):
    """A figure and its axes, one for each panel."""
    columns = math.ceil(math.sqrt(panels))
    rows = math.ceil(panels / columns)
    size = (max(8, 5 * columns), 4 * rows + 2)
    options = dict(layout="constrained", squeeze=False, sharey=sharey)
    figure, axes = plt.subplots(rows, columns, figsize=size, **options)
    for unused in axes.flat[panels:]:
        unused.remove()
    figure.suptitle(title)
    return figure, list(axes.flat[:panels])


def finish(figure, path):
    """One legend below all panels; saves the figure."""
    legend = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles))
    columns = 2 if len(figure.axes) == 1 else 3
    where = dict(loc="outside lower center", ncols=columns)
    figure.legend(legend.values(), legend.keys(), **where)
    common.save_figure(figure, path)
    print(f"figure: {path}")


def plot_comparison(returns, path, title, all_series, by_game):
    """One panel: the mean over the games that have all curves. by_game: a panel for each game."""
    present = [s for s in all_series if returns.games_with([s])]
    # references may lack some of the games; they are left out of the mean then
    groups = [returns.games_with([s for s in present if s.x])]
    if by_game:
        groups = [[game] for game in returns.games]
    panels = []
    for games in groups:
        drawn = [s for s in present if returns.mean_over_games(s, games)]
        if any(s.x for s in drawn):
            panels.append((drawn, games))
    if not panels:
        return
    scales, ended = set(), False
    for series in present:
        rows = select(returns.rows, variant=series.variant, method=series.method)
        scales |= {row["scale"] for row in rows if row["scale"]}
        ended |= not select(rows, kind="quota")
    title += f"\npictures: {', '.join(sorted(scales))}; 0: random policy, 1: expert"
    title += "; training episodes that ended (survivors)" if ended else ""
    figure, axes = new_figure(len(panels), title, sharey=True)
    for panel_axes, (drawn, games) in zip(axes, panels):
        draw_curves(panel_axes, returns, drawn, games)
    finish(figure, path)


def plot_training(path, title, rows, variant, columns, ylabel):
    """A panel for each game with columns of a table of training metrics, all on one scale."""
    games = sorted({row["game"] for row in select(rows, variant=variant)})
    if games:
        figure, axes = new_figure(len(games), title, sharey=True)
        for panel_axes, game in zip(axes, games):
            draw_seeds(panel_axes, select(rows, variant=variant, game=game), columns)
            panel_axes.set(title=game, xlabel="gradient steps", ylabel=ylabel)
        finish(figure, path)


def main(args):
    figures = args.results_dir / "figures"
    stage_1 = read_stage_1(args.results_dir)
    of_lapo = select(stage_1, variant="lapo")
    if (args.results_dir / "returns.csv").exists():
        returns = Returns(args.results_dir / "returns.csv")
        title = "Figure 3: latent policies decoded online"
        online = list(ONLINE.values())
        plot_comparison(returns, figures / "figure_3.png", title, online, by_game=False)
        plot_comparison(returns, figures / "figure_3_games.png", title, online, by_game=True)
        title = "Figure 4: latent policies decoded offline"
        offline = list(OFFLINE.values())
        plot_comparison(returns, figures / "figure_4.png", title, offline, by_game=True)
        of_lapo = select(returns.rows, variant="lapo")
    # tables of stage 1 had no scale at first
    scale = f"{', '.join(sorted({row.get('scale', '') for row in of_lapo}))} pictures"
    title = f"Stage 1, random play: a linear probe of z (solid), majority class (dotted)\n{scale}"
    columns = {"probe": ".-", "majority": ":"}
    if any("supervised" in row for row in stage_1):
        columns["supervised"] = "--"
        title = title.replace("(dotted)", "(dotted), supervised IDM (dashed)")
    plot_training(figures / "probe.png", title, stage_1, "lapo", columns, "accuracy")
    if (args.results_dir / "ilpo.csv").exists():
        ilpo = read_table(args.results_dir / "ilpo.csv")
        title = f"Figure A.5: ILPO, its policy (solid) and the nearest latents (dashed)\n{scale}"
        columns = {"policy_perplexity": ".-", "perplexity": "--"}
        path = figures / "figure_a5.png"
        plot_training(path, title, ilpo, "ilpo", columns, "latents in use (perplexity)")


if __name__ == "__main__":
    main(tyro.cli(Args))
