"""Prints the Markdown tables of our results from their summary tables, or writes them in place.

A table stands between two marks, the first of which names a folder of results/, what to print and
options: `<!-- table: laptop_plain offline -->` and `<!-- end -->`. Kinds and their options:
    claims GAME ...     claims of the paper, its numbers on these games at the same steps, and ours
    verdicts GAME ...   the paper's claims alone, without the values of each seed
    offline             returns against labels, by seed
    decoders LABELS ... mean and std over the decoders of each seed
    online STEP ...     returns at these steps, by seed (at the nearest point within a fifth)
    stages STEP ...     probe of stage 1 at these updates; FDM and latent policy at their ends
    variants LABELS ... all variants at the end of stages 1, 2 and 3, by seed
    pairs               pairs of directions that a linear probe of z tells apart, by seed
    summary LABELS ...  LAPO, its best control and its ceiling, mean and std over seeds
Those of continuous_control: continuous_control/plot_results.py.

python -m extras.write_tables            # prints them; --write changes the Markdown files
"""

import re
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import tyro
from continuous_control import plot_results

from extras import plot_figures
from extras.plot_figures import OFFLINE, ONLINE, Series, select

RESULTS = Path(__file__).resolve().parents[1] / "results"
MARKS = re.compile(r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
REFERENCES = [
    Series("random policy", "", "lapo", "random", None),
    Series("expert", "", "lapo", "expert", None),
]
CONTROLS = ("untrained", "bc", "blind")
RECOVERED = 0.95  # of the expert's normalized return
# claim, series, series that it should exceed (or "expert"), steps or labels
CLAIMS = [  # of the paper
    (f"RL and SL reach {RECOVERED} of the expert", "rl_sl", "expert", 131_072),
    (f"RL and SL reach {RECOVERED} of the expert", "rl_sl", "expert", 524_288),
    ("RL and SL exceed RL alone", "rl_sl", "rl", 131_072),
    ("RL and SL exceed RL alone", "rl_sl", "rl", 524_288),
    ("VQ helps RL alone", "rl", "no_vq", 131_072),
    ("VQ helps RL alone", "rl", "no_vq", 524_288),
    ("VQ helps decoding offline", "decoder", "no_vq_decoder", 256),
    ("RL and SL exceed PPO from scratch", "rl_sl", "scratch", 524_288),
    ("PPO from scratch exceeds ILPO", "scratch", "ilpo", 524_288),
]
CONTROL_CLAIMS = [  # that a result means something
    ("LAPO exceeds the blind policy", "decoder", "blind", 16),
    ("LAPO exceeds the blind policy", "decoder", "blind", 256),
    ("LAPO exceeds cloning the same labels", "decoder", "bc", 256),
    ("LAPO exceeds an untrained IDM", "decoder", "untrained", 256),
]


@dataclass
class Args:
    files: tuple[Path, ...] = (
        Path("README.md"),
        Path("results/README.md"),
        Path("results/tables.md"),
        Path("results/continuous_control/README.md"),
        Path("continuous_control/README.md"),
    )
    """Markdown files with marks."""
    write: bool = False
    """Write the tables into the files."""


def markdown(header, rows):
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def by_seed(values, digits=2):
    """{seed: value} -> '7.52, 3.82, 6.53', one number where all are equal, and the seeds' numbers
    where the first ones are missing.
    """
    seeds = sorted(values)
    numbers = [f"{values[seed]:.{digits}f}" for seed in seeds]
    if len(set(numbers)) == 1 and len(numbers) > 1:
        return f"{numbers[0]} (each)"
    if seeds and seeds != list(range(1, len(seeds) + 1)):
        numbers[-1] += f" (seed {', '.join(map(str, seeds))})"
    return ", ".join(numbers)


def mean_and_std(values, digits=1, unit="seed"):
    """{seed: value} -> '6.0 ± 1.9', the sample std; of one seed '6.0 (1 seed)'."""
    if not values:
        return ""
    numbers = list(values.values())
    if len(numbers) == 1:
        return f"{numbers[0]:.{digits}f} (1 {unit})"
    if len(set(numbers)) == 1:  # the same number for all seeds: of one recording, or the paper's
        return f"{numbers[0]:.{digits}f}"
    seeds = "" if len(numbers) > 2 else f" ({len(numbers)} {unit}s)"
    return f"{np.mean(numbers):.{digits}f} ± {np.std(numbers, ddof=1):.{digits}f}{seeds}"


def at(curve, x):
    """{seed: value} at x, or at the nearest point within a fifth of it."""
    values = {}
    for seed, points in curve.items():
        known = [key for key in points if key is None or abs(key - x) <= x / 5]
        if known:
            nearest = min(known, key=lambda key: abs((key or x) - x))
            values[seed] = points[nearest]
    return values


def offline(folder):
    returns = plot_figures.Returns(folder / "returns.csv")
    rows = select(returns.rows, method="decoder")
    labels = sorted({row["labels"] for row in rows})
    lines = []
    for game in returns.games:
        for series in [*OFFLINE.values(), *REFERENCES]:
            curve = returns.curve(series, game)
            if not curve:
                continue
            cells = [by_seed(at(curve, x)) if series.x else "" for x in labels]
            single = "" if series.x else by_seed(at(curve, 0))
            lines.append([f"{game}, {series.label}", *cells, single])
    header = ["return by seed, with labels:", *[f"{x:,.0f}" for x in labels], "all, or none"]
    return header, lines


def online(folder, *steps):
    returns = plot_figures.Returns(folder / "returns.csv")
    series = list(ONLINE.values())
    known = {(s.variant, s.method) for s in series}
    for row in returns.rows:
        pair = (row["variant"], row["method"])
        if row["env_steps"] > 0 and pair not in known:
            known.add(pair)
            label = {s.method: s.label for s in ONLINE.values()}[row["method"]]
            series.append(Series(f"{label} (`{row['variant']}`)", "", *pair, "env_steps"))
    lines = []
    for game in returns.games:
        for s in series:
            curve = returns.curve(s, game)
            if curve:
                cells = [by_seed(at(curve, int(step))) for step in steps]
                lines.append([f"{game}, {s.label}", *cells])
    return ["return by seed, after steps:", *[f"{int(x):,}" for x in steps]], lines


def decoders(folder, *labels):
    returns = plot_figures.Returns(folder / "returns.csv")
    lines = []
    for game in returns.games:
        for series in OFFLINE.values():
            rows = select(returns.rows, variant=series.variant, method=series.method, game=game)
            for seed in sorted({row["seed"] for row in rows if series.x}):
                cells = []
                for x in labels:
                    of_seed = select(rows, seed=seed, labels=int(x))
                    values = {row["decoder"]: row["mean_return"] for row in of_seed}
                    cells.append(mean_and_std(values, unit="decoder"))
                lines.append([f"{game}, {series.label}, seed {seed:.0f}", *cells])
    return ["mean ± std over decoders, with labels:", *labels], lines


def last_values(rows, column):
    """{seed: value of the column in the last row}"""
    return {int(row["seed"]): row[column] for row in rows}


def stages(folder, *steps):
    stage_1 = plot_figures.read_stage_1(folder)
    path = folder / "stage_2.csv"
    stage_2 = plot_figures.read_table(path) if path.exists() else []
    lines = []
    for game in sorted({row["game"] for row in stage_1}):
        for variant in sorted({row["variant"] for row in select(stage_1, game=game)}):
            rows = select(stage_1, game=game, variant=variant)
            if max(row["grad_step"] for row in rows) == 0:
                continue  # an untrained IDM; the row of step 0 of lapo is one, too
            cells = []
            for step in steps:
                cells.append(by_seed(last_values(select(rows, grad_step=int(step)), "probe")))
            mse, copy = last_values(rows, "test_mse"), last_values(rows, "copy_mse")
            policy = select(stage_2, game=game, variant=variant)
            cells += [
                by_seed(last_values(rows, "majority")),
                by_seed(last_values([r for r in rows if "supervised" in r], "supervised")),
                by_seed({seed: mse[seed] / copy[seed] for seed in mse}, 3),
                by_seed(last_values(policy, "variance_explained")),
            ]
            lines.append([f"{game}, {variant}", *cells])
    header = ["probe on random play, after updates:", *[f"{int(step):,}" for step in steps]]
    header += ["majority class", "supervised IDM", "FDM's mse / copying's"]
    header += ["variance of z explained by the policy"]
    # a folder without supervised IDMs, or without stage 2, lacks these columns
    filled = [i for i in range(len(header)) if any(line[i] for line in lines)]
    return [header[i] for i in filled], [[line[i] for i in filled] for line in lines]


def variants(folder, *labels):
    """A row for each game and variant: stage 1, stage 2 and returns of decoders, by seed."""
    returns = plot_figures.Returns(folder / "returns.csv")
    stage_1 = plot_figures.read_table(folder / "stage_1.csv")
    stage_2 = plot_figures.read_table(folder / "stage_2.csv")
    lines = []
    for game, variant in dict.fromkeys((row["game"], row["variant"]) for row in stage_1):
        rows = select(stage_1, game=game, variant=variant)
        mse, copy = last_values(rows, "test_mse"), last_values(rows, "copy_mse")
        policy = select(stage_2, game=game, variant=variant)
        curve = returns.curve(Series("", "", variant, "decoder", "labels"), game)
        lines.append(
            [
                f"{game}, {variant}",
                by_seed(last_values(rows, "probe")),
                by_seed({seed: mse[seed] / copy[seed] for seed in mse}, 3),
                by_seed(last_values(policy, "variance_explained")),
                *[by_seed(at(curve, int(count))) for count in labels],
            ]
        )
    header = ["by seed", "probe on random play", "FDM's mse / copying's"]
    header += ["variance of z explained by the policy"]
    return [*header, *[f"return, {count} labels" for count in labels]], lines


def pairs(folder):
    """A row for each game and variant: accuracy of a probe of z for each pair of directions."""
    rows = plot_figures.read_table(folder / "action_pairs.csv")
    names = list(dict.fromkeys(row["actions"] for row in rows))
    lines = []
    for game, variant in dict.fromkeys((row["game"], row["variant"]) for row in rows):
        chosen = select(rows, game=game, variant=variant)
        cells = [by_seed(last_values(select(chosen, actions=name), "accuracy")) for name in names]
        lines.append([f"{game}, {variant}", *cells])
    return ["accuracy of a probe of z, by seed", *names], lines


def summary(folder, *labels):
    """The front table: LAPO and, with the most labels, the best of its controls. The header has the
    number of seeds, and a cell has it where it differs.
    """
    returns = plot_figures.Returns(folder / "returns.csv")
    header = ["mean return ± std over seeds"]
    lines = {}
    for game in returns.games:
        decoded = returns.curve(OFFLINE["decoder"], game)
        count = f" ({len(decoded)} seed{'s' if len(decoded) > 1 else ''})"
        header.append(game + count)

        def cell(values):
            return mean_and_std(values).removesuffix(count)

        random_policy, expert = (returns.curve(reference, game) for reference in REFERENCES)
        lines.setdefault("random policy", []).append(cell(at(random_policy, 0)))
        controls = {}
        for name in CONTROLS:
            values = at(returns.curve(OFFLINE[name], game), int(labels[-1]))
            if values:
                controls[OFFLINE[name].label.removeprefix("LAPO, ")] = values
        controls["random policy"] = at(random_policy, 0)
        best = max(controls, key=lambda name: np.mean(list(controls[name].values())))
        best_cell = f"{cell(controls[best])} ({best})"
        lines.setdefault(f"best control, {labels[-1]} labels", []).append(best_cell)
        for number in labels:
            name = f"**LAPO, {number} labels**"
            lines.setdefault(name, []).append(cell(at(decoded, int(number))))
        online = returns.curve(ONLINE["rl_sl"], game)
        last = max((step for points in online.values() for step in points), default=0)
        played = f"{cell(at(online, last))} after {last:,.0f} steps" if last else ""
        lines.setdefault("LAPO online (RL and SL), no labels", []).append(played)
        ceiling = at(returns.curve(OFFLINE["bc_all"], game), 0)
        lines.setdefault("cloning all true labels", []).append(cell(ceiling))
        lines.setdefault("expert", []).append(cell(at(expert, 0)))
    rows = [[label, *cells] for label, cells in lines.items() if any(cells)]
    return header, rows


def normalized_runs(returns, series, games, x):
    """{(game, seed): normalized return at x}"""
    runs = {}
    for game in games:
        for seed, value in at(returns.curve(series, game), x).items():
            runs[game, seed] = returns.normalize(value, game)
    return runs


def compare(folder, games, listed):
    """A row for each claim of the list whose runs are there."""
    returns = plot_figures.Returns(folder / "returns.csv")
    lines = []
    for claim, name, other, x in listed:
        needed = [(ONLINE | OFFLINE)[key] for key in (name, other) if key != "expert"]
        if set(games) - set(returns.games_with(needed)):
            continue  # not run
        paper, means, runs = [], [], []
        for key in (name, other):
            if key == "expert":
                runs.append({run: RECOVERED for run in runs[0]})
                continue
            series = (ONLINE | OFFLINE)[key]
            grid, curve = [x], [np.nan]
            if series.paper:
                grid, curve = plot_figures.paper_curve(series.paper, games)
            paper.append(f"{np.interp(x, grid, curve):.2f}".replace("nan", "-"))
            means.append(at(returns.mean_over_games(series, games), x))
            runs.append(normalized_runs(returns, series, games, x))
        # compare the seeds that both sides have
        shared = set.intersection(*[set(mean) for mean in means])
        means = [{seed: mean[seed] for seed in shared} for mean in means]
        ours = [mean_and_std(mean, 2) for mean in means]
        seeds = [by_seed(mean) for mean in means]
        both = [run for run in runs[0] if run in runs[1]]
        held = sum(runs[0][run] > runs[1][run] for run in both)
        x = f"{x:,} {'steps' if name in ONLINE else 'labels'}"
        compared = [" vs ".join(column) for column in (paper, ours, seeds)]
        lines.append([claim, x, *compared, f"{held} of {len(both)}"])
    header = [f"claim ({', '.join(games)})", "at", "the paper, same games", "here", "by seed"]
    return [*header, "runs in which it holds"], lines


def claims(folder, *games):
    """The paper's claims, and that LAPO exceeds its controls."""
    header, lines = compare(folder, games, CLAIMS)
    _, controls = compare(folder, games, CONTROL_CLAIMS)
    return header, lines + claim_on_loss(folder, games) + controls


def verdicts(folder, *games):
    """The paper's claims for the front page."""
    header, lines = compare(folder, games, CLAIMS)
    lines += claim_on_loss(folder, games)
    seeds = header.index("by seed")
    short, *rows = [line[:seeds] + line[seeds + 1 :] for line in (header, *lines)]
    return short, rows


def claim_on_loss(folder, games):
    """A.2: without VQ, the FDM's loss is lower. A line, or none if there is no run without VQ."""
    rows = plot_figures.read_table(folder / "stage_1.csv")
    ratios = {}
    for game in games:
        quantized = last_values(select(rows, variant="lapo", game=game), "test_mse")
        free = last_values(select(rows, variant="no_vq", game=game), "test_mse")
        for seed in free:
            ratios.setdefault(seed, []).append(free[seed] / quantized[seed])
    if not ratios:
        return []
    means = {seed: np.mean(values) for seed, values in ratios.items()}
    every = [ratio for values in ratios.values() for ratio in values]
    held = f"{sum(ratio < 1 for ratio in every)} of {len(every)}"
    claim = "the FDM's mse is lower without VQ (ratio to the mse with VQ)"
    return [[claim, "end of stage 1", "below 1", mean_and_std(means, 2), by_seed(means), held]]


KINDS = dict(
    claims=claims,
    verdicts=verdicts,
    offline=offline,
    decoders=decoders,
    online=online,
    stages=stages,
    variants=variants,
    pairs=pairs,
    summary=summary,
)


def table(mark):
    """The lines of the table that a mark asks for."""
    folder, kind, *options = mark.split()
    kinds = plot_results.TABLES if folder == "continuous_control" else KINDS
    if kind not in kinds:
        common.fail(f"'{mark}' asks for none of {', '.join(kinds)}")
    where = RESULTS / folder
    if not where.is_dir():
        common.fail(f"'{mark}' names {where}, which is no folder")
    header, rows = kinds[kind](where, *options)
    return markdown(header, rows)


def replace_tables(text):
    """The text with each table between marks as it should be."""

    def replacement(match):
        opening, mark, _, closing = match.groups()
        return opening + "\n".join(table(mark)) + "\n" + closing

    return MARKS.sub(replacement, text)


def main(args):
    for path in args.files:
        text = path.read_text()
        for _, mark, _, _ in MARKS.findall(text):
            print(f"\n{path}: {mark}", *table(mark), sep="\n")
        if args.write:
            with common.atomic_write(path) as temporary:
                temporary.write_text(replace_tables(text))


if __name__ == "__main__":
    main(tyro.cli(Args))
