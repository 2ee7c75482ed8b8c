"""Summarizes run folders in a few tidy tables, from which figures and Markdown tables are made.

reads   <runs-dir>/<variant>/seed_<n>/<game>/, where the variant may be a path, such as h200/no_vq
          decode_offline.npz, label_efficiency_<method>.npz, decode_dmc.npz     decoded with labels
          decode_online_<method>.npz, expert.csv                                learned by playing
          train_latent_dynamics.csv, train_latent_bc.csv, train_ilpo.csv,
          supervised_idm.csv                                                    metrics of training
          latents_metrics.npz, action_pairs.csv                                 of the latents
writes  <output-dir>/returns.csv: a row for each decoder and number of labels, or for each step
        <output-dir>/stage_1.csv, stage_2.csv, ilpo.csv, supervised_idm.csv, latents.csv,
        action_pairs.csv: metrics

Columns of returns.csv: method is decoder, bc, vpt, lapo_plus, bc_all, rl_sl, rl, scratch (PPO), or
a reference: blind, random, expert, mean_action. kind is quota (whole episodes, equally many in each
game slot) or ended (training episodes that ended since the point before). Long curves are thinned.

python -m extras.summarize --runs-dir runs --output-dir results/laptop
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import tyro

MAX_POINTS = 32  # of a curve
RUN = ["variant", "game", "seed"]
RETURNS = "scale method labels env_steps decoder mean_return policy_accuracy episodes kind"
STAGE_1 = "scale grad_step probe majority train_mse test_mse copy_mse perplexity_mean"
STAGE_1 += " perplexity_min"
STAGE_2 = "grad_step variance_explained test_mse"
ILPO = "grad_step map_accuracy majority test_mse copy_mse perplexity policy_perplexity"
ILPO += " policy_entropy"
LATENTS = "random_probe random_probe_untrained random_majority probe probe_untrained majority"
LATENTS += " supervised fdm_mse_copy fdm_mse_true fdm_mse_zeroed fdm_mse_shuffled"
METRICS = {  # file: table and columns
    "train_latent_dynamics.csv": ("stage_1.csv", STAGE_1.split()),
    "train_latent_bc.csv": ("stage_2.csv", STAGE_2.split()),
    "train_ilpo.csv": ("ilpo.csv", ILPO.split()),
    "supervised_idm.csv": ("supervised_idm.csv", ["grad_step", "accuracy"]),
    "action_pairs.csv": ("action_pairs.csv", ["actions", "accuracy", "majority", "windows"]),
}


@dataclass
class Args:
    runs_dir: Path = Path("runs")
    """Runs are in <runs-dir>/<variant>/seed_<n>/<game>."""
    output_dir: Path = Path("runs")
    """Tables go there."""


def thin(rows):
    """At most MAX_POINTS of the rows, evenly spaced, the first and the last among them."""
    picked = np.linspace(0, len(rows) - 1, min(len(rows), MAX_POINTS))
    return [rows[i] for i in picked.round().astype(int)]


def read_csv(path):
    """Rows of a .csv as dicts of strings."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def describe_scale(recording):
    """Frame size, pictures and levels of a recording's settings, such as '32x32 plain'."""
    pictures = "plain" if recording.get("plain") else "default"
    if recording.get("one_theme"):
        pictures = "one theme"
    levels = recording.get("num_levels", 0)
    size = recording["frame_size"]
    return f"{size}x{size} {pictures}" + (f" {levels} levels" if levels else "")


def label_rows(method, file, episodes, ending=""):
    """A row for each decoder and number of labels; ending: of the names of a control's arrays."""
    returns = file[f"returns{ending}"]  # [L, D]
    # R^2 where actions are continuous
    name = "policy_accuracy" if f"policy_accuracy{ending}" in file else "policy_r2"
    accuracy = file[f"{name}{ending}"]
    # clones of all labels have one row, and decode_dmc.npz does not say how many these are
    labels = file["labels"] if len(file["labels"]) == len(returns) else [""]
    rows = []
    for (i, decoder), mean_return in np.ndenumerate(returns):
        row = dict(method=method, labels=labels[i], decoder=decoder + 1, kind="quota")
        row |= dict(mean_return=mean_return, policy_accuracy=accuracy[i, decoder])
        rows.append(row | dict(episodes=episodes))
    return rows


def online_rows(method, file, episodes):
    """Points of the curves of whole episodes at fixed steps, and in continuous control of the
    training episodes that ended.
    """
    rows = []
    if "returns" in file:
        for step, mean_return, count in zip(file["env_steps"], file["returns"], file["episodes"]):
            row = dict(method=method, env_steps=step, mean_return=mean_return)
            rows.append(row | dict(episodes=count, kind="ended"))
    rows = thin(rows)
    played = []
    for step, returns in zip(file["env_steps"], file.get("eval_returns", ())):
        row = dict(method=method, env_steps=step, mean_return=returns.mean())
        played.append(row | dict(episodes=len(returns), kind="quota"))
    if "mean_return" in file:  # continuous control: the mean action, after training
        row = dict(method=method, env_steps=file["env_steps"][-1], kind="quota")
        played.append(row | dict(mean_return=file["mean_return"], episodes=episodes))
    return rows + thin(played)


def scratch_rows(path):
    """PPO from scratch: whole episodes at fixed steps."""
    rows = []
    for point in thin(read_csv(path)):
        row = dict(method="scratch", env_steps=point["env_step"])
        rows.append(row | dict(mean_return=point["eval_return"], kind="quota"))
    return rows


def returns_of_run(folder, game, seed):
    """All rows of returns.csv of one run, without the columns that name the run."""
    rows = []
    scale = ""
    for path in sorted(folder.glob("*.npz")):
        name = path.stem
        if not name.startswith(("decode_", "label_efficiency_")):
            continue
        file = common.load_npz(path)
        args = file["settings"].get("args", file["settings"])
        recording = file["settings"].get("recording", file["settings"])
        if (args["game"], args["seed"]) != (game, seed):
            common.fail(f"{path} was made with --game {args['game']} --seed {args['seed']}")
        if not scale:
            scale = describe_scale(recording)
            for reference in ("random", "expert"):
                mean_return = recording[f"{reference}_return"]
                rows.append(dict(method=reference, mean_return=mean_return, kind="quota"))
        episodes = args.get("episodes", "")
        if name.startswith("label_efficiency_"):
            rows += label_rows(name.removeprefix("label_efficiency_"), file, episodes)
        elif name.startswith("decode_online_"):
            rows += online_rows(name.removeprefix("decode_online_"), file, episodes)
        else:
            for ending, method in (("", "decoder"), ("_bc", "bc"), ("_bc_all", "bc_all")):
                if f"returns{ending}" in file:
                    rows += label_rows(method, file, episodes, ending)
        # of policies that do not look at frames; in a file of online play, mean_return is the run's
        references = {"blind_return": "blind"}
        if name == "decode_dmc":
            references["mean_return"] = "mean_action"
        for array, method in references.items():
            if array in file:
                rows.append(dict(method=method, mean_return=file[array], kind="quota"))
    if (folder / "expert.csv").exists():
        rows += scratch_rows(folder / "expert.csv")
    return [row | dict(scale=scale) for row in rows]


def shorten(value):
    """A number with six significant digits, whole ones in full; '' for NaN; text as it is."""
    try:
        number = float(value)
    except ValueError:
        return value
    if np.isnan(number):
        return ""
    return str(int(number)) if number.is_integer() else f"{number:.6g}"


def write_table(path, columns, rows):
    with common.atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({column: shorten(value) for column, value in row.items()})
    print(f"{path}: {len(rows):,} rows")


def main(args):
    columns = {"returns.csv": RUN + RETURNS.split(), "latents.csv": RUN + LATENTS.split()}
    for table, metrics in METRICS.values():
        columns[table] = RUN + metrics
    tables = {table: [] for table in columns}
    for folder in sorted(args.runs_dir.glob("**/seed_*/*")):
        seed = folder.parent.name.removeprefix("seed_")
        if not folder.is_dir() or not seed.isdigit():
            continue
        variant = folder.parent.parent.relative_to(args.runs_dir).as_posix()
        run = dict(variant=variant, game=folder.name, seed=int(seed))
        found = {"returns.csv": returns_of_run(folder, run["game"], run["seed"])}
        for file, (table, _) in METRICS.items():
            if (folder / file).exists():
                found[table] = thin(read_csv(folder / file))
        if (folder / "latent_dynamics.pt").exists():
            path = folder / "latent_dynamics.pt"
            saved = common.load_checkpoint(path, "latent_dynamics", run["game"])
            run["scale"] = describe_scale(saved["recording"])
        if (folder / "latents_metrics.npz").exists():
            metrics = common.load_npz(folder / "latents_metrics.npz")
            known = [name for name in LATENTS.split() if name in metrics]
            # R^2 of continuous actions has a number for each dimension
            found["latents.csv"] = [{name: np.mean(metrics[name]) for name in known}]
        for table, rows in found.items():
            tables[table] += [run | row for row in rows]
    if not any(tables.values()):
        common.fail(f"{args.runs_dir} has no <variant>/seed_<n>/<game>/ with results")
    for table, rows in tables.items():
        if rows:
            write_table(args.output_dir / table, columns[table], rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
