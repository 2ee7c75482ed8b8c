"""Metrics and pictures of the latent actions of continuous control (A.3, section 6.3).

How well does a linear probe of z predict each true action, on held-out episodes and on random play,
beside an untrained IDM and one trained on true actions? How well the noise on the expert's actions,
of which the frames before say nothing? What does the FDM predict where z is moved along its
principal directions? True actions are for metrics only.

reads   runs/<game>/latent_dynamics.pt, data/<game>/{train,test,random}/frames_NNN.npz,
        labels_NNN.npz
writes  runs/<game>/latents_metrics.npz, latents.png (maps), film.png, film.gif (rollouts)

at 64x64      python -m continuous_control.visualize_dmc --game cheetah_run
on a CPU      python -m continuous_control.visualize_dmc --game cheetah_run --supervised-steps 1000
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import common  # before torch
import matplotlib
import numpy as np
import torch
from extras.rollouts import plot_film, rollout
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from train_latent_dynamics import IDM, PROBE_FIT, build_models, in_batches
from visualize_latents import fdm_mse, project

from continuous_control.decode_dmc import fit, read_labels

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ACTUATORS = dict(  # in the order of the suite's models
    cheetah_run="back thigh, back shin, back foot, front thigh, front shin, front foot",
    walker_walk="right hip, right knee, right ankle, left hip, left knee, left ankle",
)
PUSH = 2.0  # standard deviations by which z is moved along a direction


@dataclass
class Args(common.RunArgs):
    game: Literal["cheetah_run", "walker_walk"] = "cheetah_run"
    """Task of the suite; the later stages' --game."""

    points: int = 4096
    """Windows of each split: held-out ones to plot, and others to fit the probes on."""
    projection: Literal["umap", "pca"] = "umap"
    """How latents are mapped to two dimensions (the paper: UMAP)."""
    supervised_steps: int = 3000
    """Updates of an IDM trained on true actions, an upper bound for the probes; 0 leaves it out."""


class Split(NamedTuple):
    store: common.FrameStore
    windows: torch.Tensor  # uint8 (N, k + 2, S, S, 3)
    actions: np.ndarray  # float32 [N, A]
    noise: np.ndarray | None  # float32 [N, A]: what was added to the expert's mean action


def load_split(args, split, context, device):
    store = common.FrameStore(args, split, context, device)
    rows = store.draw(args.points).unique()
    actions = common.true_actions_to_report_on(store, rows)
    if actions is None:
        common.fail(f"{store.folder} has no labels, and these metrics need true actions")
    noise = read_labels(store, "noise")
    if noise is not None:
        noise = noise[rows].numpy()
    return Split(store, store.windows_at(rows), actions, noise)


# --- metrics --------------------------------------------------------------------------------------


def probe_each(z, actions, test_z, test_actions):
    """R^2 [A] of a linear regression of each action's dimension."""
    probe = make_pipeline(StandardScaler(), Ridge()).fit(z, actions)
    return r2_score(test_actions, probe.predict(test_z), multioutput="raw_values")


def probe_metrics(name, idm, train, test, random):
    """R^2 [A] of probes of this IDM's z: of the true actions, of the noise on them, and of random
    actions, for which the probe is fitted on the first part of the split.
    """
    train_z = in_batches(idm, train.windows).cpu().numpy()
    test_z = in_batches(idm, test.windows).cpu().numpy()
    z = in_batches(idm, random.windows).cpu().numpy()
    end = int(PROBE_FIT * len(z))
    metrics = {
        f"random_{name}": probe_each(z[:end], random.actions[:end], z[end:], random.actions[end:]),
        name: probe_each(train_z, train.actions, test_z, test.actions),
    }
    if train.noise is not None and train.noise.any():
        metrics[f"noise_{name}"] = probe_each(train_z, train.noise, test_z, test.noise)
    return metrics


@torch.enable_grad()
def train_supervised(idm, store, args):
    """On true actions: an upper bound to report, used for nothing else."""
    fit(
        idm,
        lambda batch: store.windows_at(store.rows[batch]),
        torch.from_numpy(common.true_actions_to_report_on(store, store.rows)),
        steps=args.supervised_steps,
        batch_size=128,
        lr=1e-3,
        generator=torch.Generator().manual_seed(args.seed),
    )


# --- pictures -------------------------------------------------------------------------------------


def plot_maps(path, maps, actions, names, scores, title):
    """maps {name: [N, 2]} as rows, coloured by the three dimensions of actions [N, A] that are best
    read from z as columns.
    """
    shown = np.argsort(-scores)[:3]
    size = dict(figsize=(14, 9), layout="constrained")
    figure, axes = plt.subplots(len(maps), len(shown), **size)
    for row, (map_name, xy) in enumerate(maps.items()):
        axes[row, 0].set_ylabel(map_name, fontsize=13)
        for column, dim in enumerate(shown):
            ax = axes[row, column]
            style = dict(cmap="coolwarm", vmin=-1, vmax=1, s=7, linewidths=0)
            points = ax.scatter(*xy.T, c=actions[:, dim], **style)
            ax.set(xticks=[], yticks=[])
    for column, dim in enumerate(shown):
        title_above = f"{names[dim]}: linear R² {scores[dim]:.2f}"
        axes[0, column].set_title(title_above, fontsize=13)
    figure.colorbar(points, ax=axes, label="true action", shrink=0.6)
    figure.suptitle(title, fontsize=16)
    common.save_figure(figure, path)


def pushed(z, quantizer, device):
    """z [N, Z] -> the mean latent moved by +- PUSH standard deviations along each of the three
    largest principal directions, then quantized as the FDM knows it: (6, Z), and their names.
    """
    pca = PCA(3).fit(z)
    latents = []
    names = []
    for i in range(3):
        std = pca.explained_variance_[i] ** 0.5
        for push in (-PUSH, PUSH):
            latents.append(pca.mean_ + push * std * pca.components_[i])
            names.append(f"direction {i + 1}\n{push:+g} std")
    moved = torch.tensor(np.array(latents), dtype=torch.float32, device=device)
    z_q, _, _ = quantizer(moved)
    return z_q, names


@torch.no_grad()
def main(args):
    device = common.pick_device(args)
    torch.manual_seed(args.seed)
    run = args.runs_dir / args.game
    names = ACTUATORS[args.game].split(", ")

    # --- networks
    saved = common.load_checkpoint(run / "latent_dynamics.pt", "latent_dynamics", args.game)
    config = saved["config"]
    idm, quantizer, fdm = build_models(config, device)
    untrained, _, _ = build_models(config, device)
    idm.load_state_dict(saved["idm"])
    quantizer.load_state_dict(saved["quantizer"])
    fdm.load_state_dict(saved["fdm"])
    for module in (idm, quantizer, fdm, untrained):
        module.eval()

    # --- data: windows and true actions of each split
    context = config["idm"]["context"]
    train = load_split(args, "train", context, device)
    test = load_split(args, "test", context, device)
    random = load_split(args, "random", context, device)
    common.lock(run / "latents_metrics.npz")

    # --- probes: R^2 of each dimension, beside an untrained IDM and one trained on true actions
    metrics = probe_metrics("probe", idm, train, test, random)
    metrics |= probe_metrics("probe_untrained", untrained, train, test, random)
    if args.supervised_steps > 0:
        supervised = IDM(**config["idm"] | dict(z_dim=len(names)))
        supervised.to(device, memory_format=torch.channels_last)
        train_supervised(supervised, train.store, args)
        guesses = in_batches(supervised, test.windows).cpu().numpy()
        metrics["supervised"] = r2_score(test.actions, guesses, multioutput="raw_values")
    z = in_batches(idm, test.windows)
    z_q, _, _ = quantizer(z)
    latents = dict(
        true=z_q,
        zeroed=0 * z_q,
        shuffled=z_q[torch.randperm(len(z_q))],
    )
    mse = fdm_mse(fdm, test.windows, latents)

    # --- save, draw, print
    z = z.cpu().numpy()
    xy = project(z, args.projection, args.seed)
    settings = dict(recording=saved["recording"], args=vars(args), grad_step=saved["grad_step"])
    arrays = dict(xy=xy, action=test.actions)
    common.save_npz(run / "latents_metrics.npz", settings, **metrics, **mse, **arrays)
    title = f"{args.game}: {len(z):,} held-out latents, coloured by true actions"
    maps = {args.projection: xy, "principal components 1, 2": PCA(2).fit_transform(z)}
    plot_maps(run / "latents.png", maps, test.actions, names, metrics["probe"], title)
    moved_z_q, film_names = pushed(z, quantizer, device)
    start = [len(test.windows) // 2] * len(moved_z_q)  # the same frames for each
    past = test.windows[start, :-1]
    frames = rollout(fdm, past, moved_z_q, steps=15).cpu().numpy()
    title = f"{args.game}: open-loop rollouts of the FDM, z pushed from its mean"
    plot_film(run, frames, film_names, title)
    print(f"{'R^2':24}" + "".join(f"{name:>13}" for name in [*names, "mean"]))
    for name, values in metrics.items():
        print(f"{name:24}" + "".join(f"{value:13.2f}" for value in [*values, values.mean()]))
    print(", ".join(f"{name} {value:.3g}" for name, value in mse.items()))
    print(f"in {run}: latents_metrics.npz, latents.png, film.png, film.gif")


if __name__ == "__main__":
    common.run(main, Args)
