"""Draws the paper's Figures 3, 4, 5, A.2 and A.5 from our runs: python results/plot_figures.py

reads   results/paper/*.csv, and <runs-dir>/<variant>/seed_<n>/<game>/, where the variants are
          lapo       decode_offline.npz, decode_online_rl_sl.npz, decode_online_rl.npz, latents.npz
          no_vq      decode_online_rl.npz, latents.npz: stage 1 without vector quantization
          ilpo       decode_online_rl.npz, train_ilpo.csv: the paper's baseline
          scratch    expert.csv: PPO from scratch
          untrained  decode_offline.npz: the same chain on an untrained IDM
writes  <output-dir>/figure_{3,3_games,4,5,a2,a5}.png; a figure without a run is not written

Normalized returns are 0 for the random policy and 1 for the expert: the paper's two at its scale
(64x64, all levels), else those that collect_data.py measured for the run. Curves are means over
seeds, and where a title says so, over the games that have all of its curves; bands are the sample
std over seeds.
"""

import csv
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # before torch
import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from visualize_latents import ACTION_COLORS, save_figure

PAPER_SCALE = "64x64, all levels"
PROBES = ("random_probe", "random_probe_untrained", "random_majority")  # of latents.npz
SHOW_PROBES = "{:.2f} (untrained IDM {:.2f}, majority {:.2f})"


@dataclass
class Args:
    runs_dir: Path = Path("runs")
    """Runs are in <runs-dir>/<variant>/seed_<n>/<game>."""
    output_dir: Path | None = None
    """Figures go there; <runs-dir>/figures if not given."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds that each game should have (the paper: 3); others are not read."""


COLUMNS = {  # arrays of a .npz or columns of a .csv that must be there; x and y of curves
    "decode_offline.npz": ("labels",),  # label_efficiency.py can be run without decode_offline.py
    "decode_online_rl_sl.npz": ("env_steps", "returns"),
    "decode_online_rl.npz": ("env_steps", "returns"),
    "latents.npz": ("xy", "action", "probe"),  # probe: action holds true actions
    "expert.csv": ("env_step", "mean_return"),
    "train_ilpo.csv": ("grad_step", "perplexity", "policy_entropy"),
}


class Series(NamedTuple):
    label: str
    color: str
    file: str  # <variant>/<file>
    y: str = "returns"


ONLINE = dict(  # named as in results/paper
    lapo_rl_sl=Series("LAPO: RL and SL", "C0", "lapo/decode_online_rl_sl.npz"),
    lapo_rl_no_sl=Series("RL, no SL", "C1", "lapo/decode_online_rl.npz"),
    lapo_rl_no_sl_no_vq=Series("RL, no SL, no VQ", "C2", "no_vq/decode_online_rl.npz"),
    ppo_scratch=Series("PPO from scratch", "C3", "scratch/expert.csv", "mean_return"),
    ppo_from_ilpo=Series("ILPO", "C4", "ilpo/decode_online_rl.npz"),
)
OFFLINE = dict(
    offline=Series("LAPO, decoded offline", "C0", "lapo/decode_offline.npz"),
    untrained=Series("the same, untrained IDM", "C5", "untrained/decode_offline.npz"),
    bc=Series("cloning the same labels", "C1", "lapo/decode_offline.npz", "returns_bc"),
    vpt=Series("VPT, the same labels", "C2", "lapo/decode_offline.npz", "returns_vpt"),
    lapo_plus=Series("LAPO+", "C9", "lapo/decode_offline.npz", "returns_lapo_plus"),
    bc_all=Series("cloning all true labels", "C6", "lapo/decode_offline.npz", "returns_bc_all"),
    blind=Series("blind policy", "C7", "lapo/decode_offline.npz", "blind_return"),
)
CONTROLS = ("untrained", "bc", "blind")  # what decoding with as many labels has to beat
SERIES = ONLINE | OFFLINE
LATENTS = [f"{variant}/latents.npz" for variant in ("lapo", "no_vq")]
ILPO = ["ilpo/decode_online_rl.npz", "ilpo/train_ilpo.csv"]
FILES = [*dict.fromkeys([*(s.file for s in SERIES.values()), *LATENTS, *ILPO])]


# --- runs -----------------------------------------------------------------------------------------


def read_file(path, game, seed):
    """Columns of a .csv; arrays of a .npz, its scale and ends (random and expert return)."""
    with common.reading(path):
        keys = COLUMNS[path.name]
        if path.suffix == ".csv":
            rows = list(csv.DictReader(path.read_text().splitlines()))
            columns = np.array([[float(row[key]) for key in keys] for row in rows]).T
            return dict(zip(keys, columns, strict=True))
        with np.load(path, allow_pickle=False) as file:
            run = {key: file[key] for key in file.files}
        settings, _ = json.loads(str(run["settings"])), [run[key] for key in keys]
        found, size = (settings["game"], settings["seed"]), settings["frame_size"]
        scale = f"{size}x{size}, {settings['num_levels'] or 'all'} levels"
        scale += ", plain pictures" if settings.get("plain") else ""
        ends = settings["random_return"], settings["expert_return"]
    if found != (game, seed):
        common.fail(f"{path} was made with --game {found[0]} --seed {found[1]}")
    ends = common.GAMES[game][:2] if scale == PAPER_SCALE else ends
    return run | dict(settings=settings, scale=scale, ends=ends)


def is_there(path):
    """Whether a file exists and, if it is a .csv, has a row below its header."""
    return path.exists() and (path.suffix != ".csv" or path.read_text().count("\n") > 1)


def read_runs(folder, seeds):
    """{(<variant>/<file>, game, seed): run}, and {game: {"seed 1, 2": [missing files]}}."""
    runs, missing, first = {}, {game: {} for game in common.GAMES}, {}
    for game, file in ((game, file) for game in common.GAMES for file in FILES):
        paths = {seed: folder / file.replace("/", f"/seed_{seed}/{game}/") for seed in seeds}
        absent = ", ".join(str(seed) for seed in seeds if not is_there(paths[seed]))
        missing[game].setdefault(f"seed {absent}", []).extend([file] if absent else [])
        for seed in filter(lambda seed: is_there(paths[seed]), seeds):
            run = runs[file, game, seed] = read_file(paths[seed], game, seed)
            for key in (game, "any game") if "scale" in run else ():
                scale, path = first.setdefault(key, (run["scale"], paths[seed]))
                if run["scale"] != scale and (key == game or PAPER_SCALE in (run["scale"], scale)):
                    common.fail(f"{path} has {scale}, but {paths[seed]} has {run['scale']}")
    for (file, game, seed), run in list(runs.items()):
        others = [r for key, r in runs.items() if key[1] == game and "settings" in r]
        if not others:
            missing[game][f"this game (needed for {file})"] = ["any .npz"]
            del runs[file, game, seed]
        elif "settings" not in run:  # a .csv is normalized as the other files of its game
            run |= dict(scale=others[0]["scale"], ends=np.mean([r["ends"] for r in others], 0))
        elif run.get("env_steps", [math.inf])[-1] < 0.95 * run["settings"].get("env_steps", 0):
            missing[game][f"seed {seed} after step {run['env_steps'][-1]:,}"] = [file]
    return runs, missing


def read_paper():
    """{name: {game or "aggregate": [2, P]}}: x and return; aggregates are normalized."""
    paper = {}
    for name, x in dict(offline="labels", online="env_steps").items():
        path = Path(__file__).parent / "paper" / f"paper_{name}.csv"
        for row in csv.DictReader(path.read_text().splitlines()):
            points = paper.setdefault(row.get("method", name), {}).setdefault(row["game"], [])
            points.append((float(row[x]), float(row["return"])))
    return {name: {game: np.array(p).T for game, p in of.items()} for name, of in paper.items()}


def interpolate(grid, x, y):
    """y at `grid`, NaN beyond its ends; points without a finished episode (NaN) are left out."""
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    return np.interp(grid, x, y, left=np.nan, right=np.nan) if len(x) else np.nan * grid


def over_games(by_game):
    """{game: {seed: [2, X]}} -> mean [2, X] over seeds and games, and its std [2, X] over seeds."""
    # seeds of different games are independent, so variances add up; one seed has none (NaN)
    y = [np.stack(list(by_seed.values())) for by_seed in by_game.values()]
    variances = [part.var(0, ddof=1) if len(part) > 1 else part[0] * np.nan for part in y]
    return np.mean([part.mean(0) for part in y], 0), np.sqrt(np.sum(variances, 0)) / len(y)


class Results:
    """curves {series: {game: {seed: [2, X]}}}: return and normalized return at x[series] [X]."""

    def __init__(self, runs):
        self.runs, self.paper, self.curves = runs, read_paper(), {}
        self.scales = {game: run["scale"] for (_, game, _), run in runs.items()}
        self.at_paper_scale = PAPER_SCALE in self.scales.values()
        ends = [run["env_steps"][-1] for run in runs.values() if "env_steps" in run]
        ends = ends or [run["env_step"][-1] for run in runs.values() if "env_step" in run] or [1]
        steps = np.linspace(0, max(ends), 101)[1:]
        if self.at_paper_scale:
            steps = np.arange(50_000, 3_900_001, 50_000)  # the paper's curves end at 3.92M
        labels = np.unique([n for run in runs.values() for n in run.get("labels", ())])
        self.x = dict.fromkeys(ONLINE, steps) | dict.fromkeys(OFFLINE, labels)
        for name, s in SERIES.items():
            for (file, game, seed), run in runs.items():
                if file == s.file and s.y in run:
                    x, y = run[COLUMNS[file.split("/")[1]][0]], run[s.y]
                    if name in OFFLINE:  # decoders share a run's latents, so they are not seeds
                        y = np.broadcast_to(y.mean(-1) if y.ndim else y, x.shape)
                    y = interpolate(self.x[name], x, y)
                    both = np.stack([y, common.normalize_return(y, *run["ends"])])
                    self.curves.setdefault(name, {}).setdefault(game, {})[seed] = both

    def games(self, *files):
        return [g for g in self.scales if any(k[0] in files and k[1] == g for k in self.runs)]

    def point(self, name, games):
        """x, mean and std [2] over games at the labels nearest to 256, or the last step."""
        mean, std = over_games({game: self.curves[name][game] for game in games})
        ratio = self.x[name] / (256 if name in OFFLINE else self.x[name][-1])
        i = np.argmin(np.where(np.isnan(mean[1]), np.inf, np.abs(np.log(ratio))))
        return self.x[name][i], mean[:, i], std[:, i]


# --- figures --------------------------------------------------------------------------------------


def plot(path, text, results, games, panels):
    """panels: [(function, its arguments after axes and results)]; one legend for all of them."""
    columns = math.ceil(math.sqrt(len(panels)))
    rows, width, legend = math.ceil(len(panels) / columns), max(9.5, 5 * columns), {}
    figure = plt.figure(figsize=(width, max(5.5, 4.2 * rows) + 1.5), layout="constrained")
    for i, (draw, *arguments) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        draw(axes, results, *arguments)
        legend |= dict(zip(*axes.get_legend_handles_labels()[::-1]))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=int(width / 4))
    scales = ";\n".join(sorted({results.scales[game] for game in games}))
    scale = f"{'paper' if results.at_paper_scale else 'laptop'} scale: {scales}"
    figure.suptitle(f"{text}\n{scale}", fontsize=13)
    save_figure(figure, path)
    print(f"figure: {path}")


def draw_curves(axes, results, names, game=None):
    """Returns of a game, or normalized returns over games, against steps or numbers of labels."""
    row, dashes = (0 if game else 1), ("--" if results.at_paper_scale else ":")
    games, title = [game], f"{game} ({results.scales.get(game)})"
    if not game:  # those that have all curves, otherwise means would be of different games
        drawn = [results.curves[name] for name in names if name in results.curves]
        games = [g for g in results.scales if all(g in by_game for by_game in drawn)]
        title = f"mean of {', '.join(games) if len(games) < 5 else f'{len(games)} games'}"
    if not games:
        games, title = [*results.scales], "means, each over its own games"
    for name in names:
        s, x, ours = SERIES[name], results.x[name], results.curves.get(name, {})
        shown, note = {g: ours[g] for g in ours if g in games}, f"{s.label}: the paper's"
        if shown:
            mean, std = (y[row] for y in over_games(shown))
            runs = ours if game else shown  # panels of single games share a legend
            note = f"{s.label} ({len(runs)} games, {sum(map(len, runs.values()))} runs)"
            axes.plot(x, mean, color=s.color, linewidth=2, label=note)
            axes.fill_between(x, mean - std, mean + std, color=s.color, alpha=0.2, linewidth=0)
        theirs = results.paper.get(name, {}).get(game or "aggregate")
        if theirs is not None and (results.at_paper_scale or not game):
            axes.plot(*theirs, dashes, color=s.color, linewidth=1.2, label=None if ours else note)
            note = f"the paper's ({PAPER_SCALE}; mean: 16 games)"
            axes.plot([], [], dashes, color="black", linewidth=1.2, label=note)
    axes.set_xlim(x[0], x[-1])
    ends = [run["ends"] for key, run in results.runs.items() if key[1] == game] or [(0, 1)]
    axes.axhline(np.mean(ends, 0)[0], color="gray", linestyle=":", label="random policy")
    axes.axhline(np.mean(ends, 0)[1], color="black", linewidth=1, label="expert")
    axes.set_title(title)
    axes.set_ylabel("mean episodic return" if game else "normalized return")
    axes.set_xlabel("labelled frames" if "offline" in names else "environment steps")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    if "offline" in names:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        scratch = [g for g in results.curves.get("ppo_scratch", ()) if g in games]
        for end in [results.point("ppo_scratch", scratch)[1][row]] if scratch else []:
            axes.axhline(end, color="C3", linestyle="-.", label="PPO from scratch, at its end")


def probes(results, file, game):
    """[3]: PROBES of a latents.npz, means over seeds; NaN where unknown."""
    runs = [run for key, run in results.runs.items() if key[:2] == (file, game)] or [{}]
    return np.mean([[float(run.get(name, np.nan)) for name in PROBES] for run in runs], 0)


def draw_latents(axes, results, file, game):
    """Map of the first seed's latents, colored by true action; equivalent actions are merged."""
    run = next(run for key, run in results.runs.items() if key[:2] == (file, game))
    actions = run["action"]
    axes.scatter(*run["xy"].T, s=5, c=ACTION_COLORS[actions], linewidths=0)
    for action in np.unique(actions):
        axes.scatter([], [], s=60, color=ACTION_COLORS[action], label=common.ACTIONS[action])
    axes.set(xticks=[], yticks=[], title=f"{game}, seed {run['settings']['seed']} ({run['scale']})")
    axes.set_xlabel("probe on random play: " + SHOW_PROBES.format(*probes(results, file, game)))


def draw_training(axes, results, column):
    """A column of train_ilpo.csv, a line for each run."""
    for (_, game, seed), run in results.runs.items():
        if column in run:
            axes.plot(run["grad_step"], run[column], label=f"ILPO: {game}, seed {seed}")
    axes.set(xlabel="gradient steps", ylabel=column.replace("_", " "), title="ILPO's training")
    top = max(1, axes.get_ylim()[1])
    axes.set_ylim(-0.05 * top, 1.05 * top)


def print_tables(results):
    print("\nprobe: true action from z on random play; return +- std over seeds [normalized] @ x")
    table = [["", "scale", "probe", *(SERIES[name].label for name in results.curves)]]
    for game, scale in results.scales.items():
        table.append([game, scale, SHOW_PROBES.format(*probes(results, LATENTS[0], game))])
        for name, curve in results.curves.items():
            x, y, std = results.point(name, [game]) if game in curve else (0, None, None)
            table[-1] += [f"{y[0]:.2f} +- {std[0]:.2f} [{y[1]:.2f}] @{x:,.0f}" if x else "-"]
    for row in zip(*table):  # a column for each game
        print("".join(cell.ljust(42) for cell in row))
    print("\nclaim | the paper, 16 games | ours, games that have all of a row, normalized | agrees")
    for claim, names, least in (
        ("expert recovered online (>= 0.95)", ["lapo_rl_sl"], 0.95),
        ("RL+SL > RL > RL no VQ > scratch", [*ONLINE][:4], -math.inf),
        ("scratch >= ILPO", ["ppo_scratch", "ppo_from_ilpo"], -math.inf),
        ("offline with 256 labels >= scratch", ["offline", "ppo_scratch"], -math.inf),
        *((f"offline > {SERIES[name].label}", ["offline", name], -math.inf) for name in CONTROLS),
    ):
        there = [name for name in names if name in results.curves]
        games = [g for g in results.scales if there and all(g in results.curves[n] for n in there)]
        if games and len(there) >= min(2, len(names)):
            curves = [results.paper[name]["aggregate"] for name in there if name in results.paper]
            paper = [f"{np.interp(256 if x[0] < 256 else 4e6, x, y):.2f}" for x, y in curves]
            points = [results.point(name, games) for name in there]
            ours = [f"{mean[1]:.2f} +- {std[1]:.2f} @{x:,.0f}" for x, mean, std in points]
            y = [mean[1] for _, mean, _ in points]
            agrees = "yes" if y[0] >= least and y == sorted(y)[::-1] else "no"
            if len(there) < len(names):
                agrees += f" (only {' and '.join(there)})"
            print(" | ".join([claim, ", ".join(paper), ", ".join(ours), str(len(games)), agrees]))
    values = [probes(results, LATENTS[0], game) for game in results.games(LATENTS[0])]
    if values:
        y, n = SHOW_PROBES.format(*np.mean(values, 0)), sum(v[0] > max(v[1:]) for v in values)
        print(f"latents tell actions apart | - | probe {y} | {len(values)} | {n} games")


def main(args):
    runs, missing = read_runs(args.runs_dir, args.seeds)
    if not runs:
        common.fail(f"no run in {args.runs_dir}/<variant>/seed_<n>/<game>, so nothing is written")
    results, out = Results(runs), args.output_dir or args.runs_dir / "figures"
    online, offline = (results.games(*[s.file for s in of.values()]) for of in (ONLINE, OFFLINE))
    lapo, no_vq, ilpo = (results.games(file) for file in (*LATENTS, ILPO[0]))
    compared = ("lapo_rl_sl", "ppo_scratch", "ppo_from_ilpo")
    figure_4 = [(draw_curves, OFFLINE, game) for game in [None, *offline]]
    a5 = [(draw_curves, compared, game) for game in [None, *ilpo]]
    a5 += [(draw_training, column) for column in ("perplexity", "policy_entropy")]
    for name, text, games, panels in (
        ("3", "Figure 3: latent policies decoded online", online, [(draw_curves, ONLINE)]),
        ("3_games", "Figure 3, by game", online, [(draw_curves, ONLINE, g) for g in online]),
        ("4", "Figure 4: decoded offline", offline, figure_4),
        ("5", "Figure 5: latent actions", lapo, [(draw_latents, LATENTS[0], g) for g in lapo]),
        ("a2", "Figure A.2: without VQ", no_vq, [(draw_latents, LATENTS[1], g) for g in no_vq]),
        ("a5", "Figure A.5: ILPO, decoded online, and its training", results.games(*ILPO), a5),
    ):
        if games:
            plot(out / f"figure_{name}.png", text, results, games, panels)
    print_tables(results)
    print("\nno run:", ", ".join(game for game in missing if game not in results.scales) or "-")
    for game in results.scales:
        lacks = [f"{', '.join(names)} of {s}" for s, names in missing[game].items() if names]
        print(f"{game}: missing {'; '.join(lacks) or 'nothing'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
