"""The paper's figures, ours beside the paper's (Figures 3, 4 and 5, A.1, A.2, A.5).

Draws what lies in results/, and says which games and seeds are missing. The layout is that of runs/, a folder for each seed:

    results/<game>/seed_<n>/          decode_offline.npz, decode_online_<method>.npz, latents.npz, train_ilpo.csv
    results/<game>_no_vq/seed_<n>/    decode_online_rl.npz, latents.npz, of runs with --no-vq (A.2)
    results/paper/                    paper_online.csv, paper_offline.csv: the paper's curves, read off its figures

so that a finished run gets there with: mkdir -p results/bigfish/seed_1 && cp runs/bigfish/*.{npz,csv} results/bigfish/seed_1
Only runs at the paper's scale are drawn: all levels, 64x64, online all 4M steps. Others (a toy run, one that was killed, a file
in the folder of another seed or of the ablation) are left out with a line that says why. Other folders are left alone.

A curve of ours is the mean over seeds, its band the sample standard deviation; there is none with one seed. In decode_offline.npz
the decoders of a run are averaged first: they share their latents, so their spread says little about another run's.
Aggregates are means over games of the normalised return (0 random policy, 1 the paper's expert). Seeds of different games have
nothing to do with each other, so the variance of that mean is the sum of the games' variances over the square of their number.
Beside each of ours stand the paper's mean over the same games, from its games' curves, and its own aggregate of 16 games.

reads   results/
writes  <output-dir>/figure_3.png, figure_3_games.png, figure_4.png, figure_a1.png, figure_5.png, figure_a2.png, figure_a5.png;
        a figure of which no run is there is not written

usage   python plot_figures.py
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

import common


@dataclass
class Args:
    results_dir: Path = Path("results")
    """Where the runs lie, as the layout above has it."""
    output_dir: Path = Path("results/figures")
    """Where the figures go."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds that each game should have (the paper: three); those that lack are named, others are left alone."""


# --- what there is to draw -----------------------------------------------------------------------------------------


class Series(NamedTuple):
    """One curve of Figure 3, 4 or A.5."""

    label: str
    suffix: str  # of the game's folder
    file: str
    paper: str  # its name in results/paper/
    color: str


OFFLINE = Series("LAPO, decoded offline", "", "decode_offline.npz", "offline", "C0")
ONLINE = {
    "rl_sl": Series("LAPO, RL and SL", "", "decode_online_rl_sl.npz", "lapo_rl_sl", "C0"),
    "rl": Series("RL, no SL", "", "decode_online_rl.npz", "lapo_rl_no_sl", "C1"),
    "rl_no_vq": Series("RL, no SL, no VQ", "_no_vq", "decode_online_rl.npz", "lapo_rl_no_sl_no_vq", "C2"),
    "scratch": Series("PPO from scratch", "", "decode_online_scratch.npz", "ppo_scratch", "C3"),
    "ilpo": Series("ILPO", "", "decode_online_ilpo.npz", "ppo_from_ilpo", "C4"),
}
ALL = [OFFLINE, *ONLINE.values()]
EXPECTED = {suffix: [*(s.file for s in ALL if s.suffix == suffix), "latents.npz"] for suffix in ("", "_no_vq")}

LABELS = 2 ** np.arange(4, 14)  # Figure 4
# Online curves come to common steps by linear interpolation. The paper's are known from 0.1M to 3.92M steps.
STEPS = np.arange(50_000, 3_900_001, 50_000)
ENV_STEPS = 4_000_000


# --- reading -------------------------------------------------------------------------------------------------------


def made_by(game, suffix, seed, file):
    """The command that makes a file of results/ (in runs/)."""
    name = Path(file).stem
    script, method = ("decode_online_ppo", f" --method {name[14:]}") if name.startswith("decode_online") else (name, "")
    script = dict(latents="visualize_latents").get(script, script)
    return f"python {script}.py --game {game} --seed {seed}{method}{' --no-vq' if suffix else ''}"


def why_not_the_papers(settings, suffix, seed, env_steps=None):
    """Why a file with these settings (a dict) does not belong in the paper's panels, in words; None if it does.

    env_steps: of an online run, the last step it reached.
    """
    if not {"num_levels", "frame_size", "vq", "seed"} <= settings.keys():
        return "its settings tell not all of levels, frame size, VQ and seed (it comes from an older version)"
    if settings["num_levels"] != 0 or settings["frame_size"] != 64:
        side = settings["frame_size"]
        return f"toy scale ({settings['num_levels'] or 'all'} levels, {side}x{side}; the paper: all levels, 64x64)"
    if settings["vq"] != (suffix == ""):
        return f"it was made {'with' if settings['vq'] else 'without'} VQ"
    if settings["seed"] != seed:
        return f"it was made with seed {settings['seed']}"
    if env_steps is not None and env_steps < 0.95 * ENV_STEPS:
        return f"it ends after {env_steps:,} of {ENV_STEPS:,} steps"
    return None


def load(folder, game, suffix, seed, file, keys, left_out):
    """The arrays `keys` of a file of one seed, as a dict; None if it is not there, or not the paper's (then left_out grows).

    A damaged file, or one of another game, ends the run.
    """
    path = folder / f"{game}{suffix}" / f"seed_{seed}" / file
    if not path.exists():
        return None
    command = made_by(game, suffix, seed, file)
    arrays = common.load_npz(path, (*keys, "settings"), command)
    try:
        settings = json.loads(str(arrays["settings"]))
        of = settings["game"]
    except (ValueError, TypeError, KeyError):
        common.fail(f"{path} has settings that cannot be read; make it anew with: {command}")
    if of != game:
        common.fail(f"{path} is of '{of}', not of '{game}'; make it anew with: {command}")
    reason = why_not_the_papers(settings, suffix, seed, arrays["env_steps"][-1] if "env_steps" in keys else None)
    if reason:
        left_out[path] = reason
        return None
    return arrays


def on_grid(grid, x, y):
    """y over x, linearly interpolated at `grid`; NaN beyond its ends. Points without a value (no episode ended) do not count."""
    known = ~np.isnan(y)
    return np.interp(grid, np.asarray(x)[known], np.asarray(y)[known], left=np.nan, right=np.nan)


def at_labels(labels, y):
    """y [L] of `labels` [L], at LABELS; NaN where there is none."""
    return np.array([y[labels == count][0] if count in labels else np.nan for count in LABELS])


def read_curves(folder, seeds, left_out):
    """Ours: ({series: {game: {seed: returns float [X]}}}, {game: the mean return of our expert, where known}).

    X: LABELS offline, STEPS online. Games and series without a run are not in it. left_out: {path: why}, grows.
    """
    curves, experts = {}, {}
    for series in ALL:
        x = "labels" if series is OFFLINE else "env_steps"
        for game in common.RETURNS:
            for seed in seeds:
                run = load(folder, game, series.suffix, seed, series.file, (x, "returns", "expert_return"), left_out)
                if run:
                    y = at_labels(run[x], run["returns"].mean(1)) if series is OFFLINE else on_grid(STEPS, run[x], run["returns"])
                    curves.setdefault(series, {}).setdefault(game, {})[seed] = y
                    experts[game] = float(run["expert_return"])
    return curves, experts


def read_paper(folder):
    """The paper's: {series: {game or "aggregate": (x [P], return [P])}}, aggregates normalised."""
    points = {}
    for name, x in (("offline", "labels"), ("online", "env_steps")):
        path = folder / "paper" / f"paper_{name}.csv"
        try:
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    points.setdefault((row.get("method", name), row["game"]), []).append((float(row[x]), float(row["return"])))
        except FileNotFoundError:
            common.fail(f"{path} is missing; it comes with this project")
        except (KeyError, ValueError, TypeError) as error:
            common.fail(f"{path} is damaged ({type(error).__name__}); it comes with this project")
    paper = {s: {game: tuple(np.array(p).T) for (name, game), p in points.items() if name == s.paper} for s in ALL}
    if not all("aggregate" in games for games in paper.values()):
        common.fail(f"{folder / 'paper'} lacks an aggregate curve; its files come with this project")
    return paper


def read_ilpo_training(folder, runs):
    """The train_ilpo.csv of the `runs` {game: {seed: ...}}: {game: {seed: table with a field for each column}}."""
    training = {}
    for game, by_seed in runs.items():
        for seed in by_seed:
            path = folder / game / f"seed_{seed}" / "train_ilpo.csv"
            if path.exists():
                try:
                    table = np.genfromtxt(path, delimiter=",", names=True, ndmin=1)
                    table[["grad_step", "perplexity", "policy_entropy"]]
                except (ValueError, KeyError) as error:
                    command = made_by(game, "", seed, path.name)
                    common.fail(f"{path} is damaged ({type(error).__name__}); make it anew with: {command}")
                training.setdefault(game, {})[seed] = table
    return training


# --- means over seeds and games ------------------------------------------------------------------------------------


def over_seeds(by_seed):
    """{seed: float [X]} -> mean [X] and sample standard deviation [X], which is NaN for one seed"""
    y = np.stack(list(by_seed.values()))
    return y.mean(0), y.std(0, ddof=1) if len(y) > 1 else np.full(y.shape[1], np.nan)


def over_games(by_game):
    """{game: {seed: returns [X]}} -> mean [X] and standard deviation [X] of the normalised return averaged over the games.

    The deviation is NaN while a game has one seed, and both are where a game has no value.
    """
    means, deviations = [], []
    for game, by_seed in by_game.items():
        mean, deviation = over_seeds({seed: common.normalize_return(y, *common.RETURNS[game]) for seed, y in by_seed.items()})
        means.append(mean), deviations.append(deviation)
    return np.mean(means, 0), np.sqrt(np.square(deviations).sum(0)) / len(means)


def paper_over_games(paper_of_series, games, grid):
    """The paper's mean normalised return [X] at `grid` over these games, from its games' curves; None if it lacks one."""
    if not games or not set(games) <= paper_of_series.keys():
        return None
    return np.mean([common.normalize_return(on_grid(grid, *paper_of_series[game]), *common.RETURNS[game]) for game in games], 0)


# --- figures -------------------------------------------------------------------------------------------------------


def save_figure(figure, path):
    with common.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)


def count_seeds(by_game):
    """'3 seeds', or '1 to 3 seeds' where games, or curves, differ."""
    least, most = min(map(len, by_game.values())), max(map(len, by_game.values()))
    return f"{least} seed{'s' if least > 1 else ''}" if least == most else f"{least} to {most} seeds"


def draw(axes, x, mean, std, color, label):
    """Our curve with its band."""
    known = ~np.isnan(mean)
    axes.plot(x[known], mean[known], color=color, linewidth=2.2, label=label)
    axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)


def say_none(axes):
    style = dict(ha="center", va="center", fontsize=14, color="#b00020", bbox=dict(facecolor="white", edgecolor="none", alpha=0.8))
    axes.text(0.5, 0.5, "no run of ours", transform=axes.transAxes, **style)


def set_x(axes, offline):
    """The axis of labelled frames, or of environment steps."""
    if offline:
        axes.set_xscale("log", base=2)
        axes.set_xlim(LABELS[0] / 1.2, LABELS[-1] * 1.2)
        axes.set_xticks(LABELS[::2], [f"{count:,}" for count in LABELS[::2]])
    else:
        axes.set_xlim(0, ENV_STEPS)
        axes.set_xticks(np.arange(5) * 1_000_000, ["0", *(f"{n}M" for n in range(1, 5))])
    axes.tick_params(labelsize=12)


def draw_game(axes, game, series, curves, paper, expert_return):
    """The panel of one game: returns of each of `series`, ours and the paper's, with expert and random policy."""
    grid = LABELS if series == [OFFLINE] else STEPS
    for s in series:
        ours = curves.get(s, {}).get(game)
        if ours:
            draw(axes, grid, *over_seeds(ours), s.color, s.label)
        if game in paper[s]:
            axes.plot(*paper[s][game], "--", color=s.color, linewidth=1.1)
    axes.axhline(common.RETURNS[game][1], color="black", linestyle="--", linewidth=1)
    if expert_return is not None:
        axes.axhline(expert_return, color="black", linewidth=1.2)
    axes.axhline(common.RETURNS[game][0], color="gray", linestyle=":", linewidth=1.5)
    set_x(axes, series == [OFFLINE])
    there = {s: curves[s][game] for s in series if game in curves.get(s, {})}
    axes.set_title(f"{game} ({count_seeds(there)})" if there else game, fontsize=14)
    if not there:
        say_none(axes)


def line_legend(figure, series):
    """What colours and line styles mean in the panels of games, below them."""
    lines = [plt.Line2D([], [], color=s.color, linewidth=2.2, label=s.label) for s in series]
    lines += [plt.Line2D([], [], color="#555555", linewidth=2.2, label="ours, mean over seeds (band: std)")]
    lines += [plt.Line2D([], [], color="#555555", linewidth=1.1, linestyle="--", label="the paper's")]
    lines += [plt.Line2D([], [], color="black", linewidth=1.2, label="our expert")]
    lines += [plt.Line2D([], [], color="black", linewidth=1, linestyle="--", label="the paper's expert")]
    lines += [plt.Line2D([], [], color="gray", linewidth=1.5, linestyle=":", label="random policy")]
    figure.legend(handles=lines, loc="outside lower center", ncols=5, fontsize=13, frameon=False)


def plot_games(path, series, curves, paper, experts, title, x_label):
    """A panel for each of the 16 games."""
    figure, axes = plt.subplots(4, 4, figsize=(17, 14), layout="constrained")
    for ax, game in zip(axes.flat, common.RETURNS):
        draw_game(ax, game, series, curves, paper, experts.get(game))
    for ax in axes[-1]:
        ax.set_xlabel(x_label, fontsize=14)
    for ax in axes[:, 0]:
        ax.set_ylabel("mean episodic return", fontsize=14)
    figure.suptitle(title, fontsize=18)
    line_legend(figure, series)
    save_figure(figure, path)


def draw_aggregate(axes, series, curves, paper):
    """Normalised returns over games: ours, the paper's over the same games (dashed), the paper's over all 16 (dotted)."""
    offline = series == [OFFLINE]
    grid = LABELS if offline else STEPS
    for s in series:
        ours = curves.get(s, {})
        if ours:
            label = f"{s.label}: ours, {len(ours)} game{'s' if len(ours) > 1 else ''}, {count_seeds(ours)}"
            draw(axes, grid, *over_games(ours), s.color, label)
            same_games = paper_over_games(paper[s], ours, grid)
            if same_games is not None:
                axes.plot(grid, same_games, "--", color=s.color, linewidth=1.1, label="    the paper's, the same games")
        own = f"the paper's, 16 games{'' if ours else ' (none of ours)'}"
        axes.plot(*paper[s]["aggregate"], ":", color=s.color, linewidth=1.6, label=f"    {own}" if ours else f"{s.label}: {own}")
    if offline:
        scratch = ONLINE["scratch"]
        label = f"{scratch.label}, 4M steps (the paper's)"
        axes.axhline(paper[scratch]["aggregate"][1][-1], color=scratch.color, linestyle="-.", linewidth=1.1, label=label)
    axes.axhline(1, color="black", linestyle="--", linewidth=1, label="the paper's expert (1)")
    axes.axhline(0, color="gray", linestyle=":", linewidth=1.5, label="random policy (0)")
    axes.fill_between([], [], [], color="gray", alpha=0.3, label="std over seeds, where each game has 2")
    axes.set_ylim(bottom=min(-0.04, axes.get_ylim()[0]))
    set_x(axes, offline)
    axes.set_ylabel("normalised mean episodic return", fontsize=14)
    axes.set_xlabel("labelled frames" if offline else "environment steps", fontsize=14)


def plot_aggregate(path, series, curves, paper, title):
    figure, axes = plt.subplots(figsize=(12.5, 6.5), layout="constrained")
    draw_aggregate(axes, series, curves, paper)
    axes.set_title(title, fontsize=16)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=12.5, frameon=False)
    save_figure(figure, path)


def scatter_latents(axes, xy, actions, size):
    """Dots of `size` square points at xy [N, 2], coloured by action [N]."""
    order = np.random.default_rng(0).permutation(len(xy))  # so that no action lies on top of the others
    axes.scatter(*xy[order].T, c=np.array(common.ACTION_COLORS)[actions[order]], s=size, alpha=0.75, linewidths=0)
    axes.set_xticks([]), axes.set_yticks([])


def plot_latents_grid(path, latents, title):
    """Figure 5: latents {game: {seed: arrays}}, the first seed's scatter of each of the 16 games."""
    figure, axes = plt.subplots(4, 4, figsize=(15, 16.5), layout="constrained")
    used = set()
    for ax, game in zip(axes.flat, common.RETURNS):
        ax.set_title(game, fontsize=15)
        ax.set_xticks([]), ax.set_yticks([])
        if game not in latents:
            say_none(ax)
            continue
        seed, arrays = next(iter(latents[game].items()))
        scatter_latents(ax, arrays["xy"], arrays["distinct_action"], 4)
        used |= set(arrays["distinct_action"].tolist())
        ax.set_title(f"{game}, seed {seed}", fontsize=15)
        note = f"linear probe {arrays['linear'][1]:.2f} (majority class {arrays['majority'][1]:.2f})"
        ax.set_xlabel(f"{len(arrays['xy']):,} latents\n{note}", fontsize=12)
    dots = dict(marker="o", markersize=10, linestyle="")
    handles = [plt.Line2D([], [], color=common.ACTION_COLORS[a], label=common.ACTIONS[a], **dots) for a in sorted(used)]
    style = dict(ncols=9, fontsize=14, title="true action, equivalent ones merged", title_fontsize=14, frameon=False)
    figure.legend(handles=handles, loc="outside lower center", **style)
    figure.suptitle(title, fontsize=18)
    save_figure(figure, path)


def plot_ilpo(path, curves, paper, experts, training):
    """A.5: online decoding from ILPO beside LAPO and PPO from scratch, and how many of its latents are in use."""
    series = [ONLINE["rl_sl"], ONLINE["scratch"], ONLINE["ilpo"]]
    games = list(curves.get(ONLINE["ilpo"], {}))
    panels = 1 + len(games) + (2 if training else 0)
    columns = min(4, panels)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 4.6 * rows + 2.2), layout="constrained", squeeze=False)
    axes, spare = axes.flat[:panels], axes.flat[panels:]
    draw_aggregate(axes[0], series, {s: {g: curves.get(s, {})[g] for g in games if g in curves.get(s, {})} for s in series}, paper)
    axes[0].set_title("over these games; dotted: the paper's 16", fontsize=14)
    for ax, game in zip(axes[1:], games):
        draw_game(ax, game, series, curves, paper, experts.get(game))
        ax.set_xlabel("environment steps", fontsize=14)
        ax.set_ylabel("mean episodic return", fontsize=14)
    names = dict(perplexity="perplexity of the nearest z", policy_entropy="entropy of π (nats)")
    for ax, (column, name) in zip(axes[1 + len(games) :], names.items()):
        for color, (game, by_seed) in enumerate(training.items()):
            for i, table in enumerate(by_seed.values()):
                ax.plot(table["grad_step"], table[column], color=f"C{color}", label=None if i else f"{game} ({len(by_seed)} seeds)")
        ax.set_xlabel("gradient steps", fontsize=14)
        ax.set_ylabel(name, fontsize=14)
        ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        ax.tick_params(labelsize=12)
        ax.set_title("ILPO's training, a line for each seed", fontsize=14)
        ax.legend(fontsize=12)
    for ax in spare:
        ax.remove()
    figure.suptitle(f"ILPO, decoded online (A.5): {len(games)} of {len(common.RETURNS)} games have a run", fontsize=16)
    line_legend(figure, series)
    save_figure(figure, path)


# --- words ---------------------------------------------------------------------------------------------------------


def missing_lines(folder, seeds, left_out):
    """One line for each game and seed that lacks something, naming it."""
    lines = []
    for suffix, files in EXPECTED.items():
        for game in common.RETURNS:
            lacks = {}
            for seed in seeds:
                run = folder / f"{game}{suffix}" / f"seed_{seed}"
                lacks[seed] = [file for file in files if not (run / file).exists() or run / file in left_out]
            if all(lacks[seed] == files for seed in seeds):
                lines.append(f"missing: {game}{suffix}, all seeds: everything")
            else:
                names = {seed: "everything" if lacks[seed] == files else ", ".join(lacks[seed]) for seed in seeds if lacks[seed]}
                lines += [f"missing: {game}{suffix}, seed {seed}: {of_seed}" for seed, of_seed in names.items()]
    return lines


def cell(mean_and_std, count, theirs, i):
    """'7.00 ± 2.83 (2) | 6.50': point i of our curve, of how many, and of the paper's; '-' where there is none (None)."""
    ours = "-"
    if mean_and_std:
        mean, std = mean_and_std[0][i], mean_and_std[1][i]
        ours = f"{mean:.2f}" + ("" if np.isnan(std) else f" ± {std:.2f}") + f" ({count})"
    return f"{ours} | " + ("-" if theirs is None else f"{theirs[i]:.2f}")


def print_table(curves, paper):
    """The games of which a run is there, then the aggregates: returns with 256 labels, and after 3.9M steps."""
    print("\nours ± std (seeds) | the paper's; offline with 256 labels, online after 3.9M steps. Below: normalised, (games)")
    print(f"{'':11}" + "".join(f"{'offline' if s is OFFLINE else s.label:>27}" for s in ALL))
    for name in [*common.RETURNS, "same games", "16 games"]:
        cells = []
        for s in ALL:
            ours, theirs = curves.get(s, {}), paper[s]
            grid, i = (LABELS, list(LABELS).index(256)) if s is OFFLINE else (STEPS, -1)
            if name == "same games":
                cells.append(cell(over_games(ours) if ours else None, len(ours), paper_over_games(theirs, ours, grid), i))
            elif name == "16 games":
                cells.append(cell(None, 0, on_grid(grid, *theirs["aggregate"]), i))
            else:
                by_seed = ours.get(name)
                of_paper = on_grid(grid, *theirs[name]) if name in theirs else None
                cells.append(cell(by_seed and over_seeds(by_seed), by_seed and len(by_seed), of_paper, i))
        if name not in common.RETURNS or not all(text.startswith("-") for text in cells):
            print(f"{name:11}" + "".join(f"{text:>27}" for text in cells))


def main(args):
    folder, left_out = args.results_dir, {}
    if not folder.is_dir():
        common.fail(f"{folder} is not there; see --help for what lies in it")
    curves, experts = read_curves(folder, args.seeds, left_out)
    paper = read_paper(folder)
    latents = {}
    for suffix in EXPECTED:
        for game in common.RETURNS:
            for seed in args.seeds:
                arrays = load(folder, game, suffix, seed, "latents.npz", ("xy", "distinct_action", "linear", "majority"), left_out)
                if arrays:
                    latents.setdefault(suffix, {}).setdefault(game, {})[seed] = arrays
    training = read_ilpo_training(folder, curves.get(ONLINE["ilpo"], {}))

    out, figure_3 = args.output_dir, [ONLINE[method] for method in ("rl_sl", "rl", "rl_no_vq", "scratch")]
    drawn = []
    if any(series in curves for series in ONLINE.values()):
        drawn += ["figure_3.png", "figure_3_games.png"]
        title = "Figure 3: latent policies decoded online"
        plot_aggregate(out / drawn[-2], list(ONLINE.values()), curves, paper, f"{title}, over games")
        plot_games(out / drawn[-1], figure_3, curves, paper, experts, title, "environment steps")
    if OFFLINE in curves:
        drawn += ["figure_4.png", "figure_a1.png"]
        plot_aggregate(out / drawn[-2], [OFFLINE], curves, paper, "Figure 4: latent policies decoded offline, over games")
        plot_games(out / drawn[-1], [OFFLINE], curves, paper, experts, "A.1: latent policies decoded offline", "labelled frames")
    for suffix, name in {"": "figure_5.png", "_no_vq": "figure_a2.png"}.items():
        if suffix in latents:
            drawn.append(name)
            without = ", without vector quantisation" if suffix else ""
            title = f"{'A.2' if suffix else 'Figure 5'}: latent actions in two dimensions, by true action{without}"
            plot_latents_grid(out / name, latents[suffix], title)
    if ONLINE["ilpo"] in curves:
        drawn.append("figure_a5.png")
        plot_ilpo(out / drawn[-1], curves, paper, experts, training)

    print_table(curves, paper)
    print(f"\nfigures in {out}: {', '.join(drawn)}" if drawn else "no figure: no run of the paper's scale is there")
    for path, reason in left_out.items():
        print(f"left out: {path}: {reason}")
    known = {f"{game}{suffix}" for game in common.RETURNS for suffix in EXPECTED} | {"paper", args.output_dir.name}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in known:
            print(f"left out: {path}: not called <game> or <game>_no_vq")
    print("\n".join(missing_lines(folder, args.seeds, left_out)) or "nothing is missing")


if __name__ == "__main__":
    main(tyro.cli(Args))
