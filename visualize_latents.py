"""Metrics and pictures of latent actions (paper, section 6.3, Figures 1 and 5).

What does each latent action do, and does it match a true action? All on held-out episodes. True
actions only color and name the latents; without label files (own videos), k-means clusters of the
quantized latents take their place. Stage 1's CSV has the accuracy of a linear probe of z.

reads   runs/<game>/latent_dynamics.pt, test/latents_NNN.npz,
        data/<game>/test/frames_NNN.npz and labels_NNN.npz, if there
writes  runs/<game>/latents_metrics.npz, latents.png (map, and frames of the clusters' middles)

paper scale   python visualize_latents.py --game bigfish
on a CPU      python visualize_latents.py --game miner --points 2048
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import common  # before torch
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from train_latent_dynamics import build_models, in_batches

ACTION_COLORS = np.array(  # in the order of common.ACTIONS
    "#3454d1 #17a2b8 #3aa655 #7b3fbf #a6a6a6 #c9a400 #e83fb8 #e0202c #f5821f "
    "#000000 #8c5a2b #5c6b2f #c8a27a #5a2a2a #2f5d62".split()
)
NUM_CLUSTERS = 12


@dataclass
class Args(common.RunArgs):
    points: int = 4096
    """Held-out windows whose latents are plotted."""
    projection: Literal["umap", "pca"] = "umap"
    """How latents are mapped to two dimensions (the paper: UMAP)."""


# --- metrics --------------------------------------------------------------------------------------


def fdm_mse(fdm, windows, latents):
    """mse of the FDM with latents {name: (N, Z)} on windows (N, k + 2, S, S, 3), and of copying."""
    o_t = common.to_input(windows[:, -2:-1])
    target = common.to_input(windows[:, -1:])
    mse = dict(fdm_mse_copy=F.mse_loss(o_t, target).item())
    for name, z in latents.items():
        predicted = in_batches(fdm, windows[:, :-1], z)
        mse[f"fdm_mse_{name}"] = F.mse_loss(predicted, target).item()
    return mse


def project(z, method, seed):
    """z [N, Z] -> [N, 2]"""
    # UMAP cannot place points that are exactly equal
    rng = np.random.default_rng(seed)
    z = z + 1e-3 * z.std() * rng.normal(size=z.shape)
    if method == "umap":
        from umap import UMAP  # here: it takes seconds to import

        # PCA as start: UMAP's own (eigenvectors) failed where many latents are nearly equal
        return UMAP(init="pca", n_jobs=1, random_state=seed).fit_transform(z)
    return PCA(2, random_state=seed).fit_transform(z)


def find_clusters(z_q, num_clusters, seed):
    """k-means of z_q [N, Z]: the cluster of each row, int [N]; cluster 0 is the largest."""
    label = KMeans(num_clusters, n_init=4, random_state=seed).fit_predict(z_q)
    by_size = np.argsort(-np.bincount(label), kind="stable")  # labels, largest cluster first
    return np.argsort(by_size)[label]


def medoids(z_q, group):
    """{group: the row of z_q [N, Z] nearest to the mean of its group}. Means themselves are of no
    use: the FDM was trained on quantized latents alone.
    """
    rows = {}
    for g in np.unique(group):
        members = np.flatnonzero(group == g)
        distance = np.linalg.norm(z_q[members] - z_q[members].mean(0), axis=1)
        rows[g] = members[distance.argmin()]
    return rows


# --- the map. group [N]: the distinct true action of each latent, or its cluster ------------------


def plot_map(path, xy, group, names, title, windows, rows):
    """Left: xy [N, 2], coloured by group. Right: o_t and o_{t+1} of some rows, int [M], which are
    numbered on the left. windows: uint8 [N, k + 2, S, S, 3].
    """
    figure = plt.figure(figsize=(17, 8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[10, 7])
    axes = left.subplots()
    axes.set(xticks=[], yticks=[], title=title)
    counts = np.bincount(group, minlength=len(names))
    for g in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]:
        label = f"{counts[g] / len(group):.1%}  {names[g]}"
        axes.scatter(*xy[group == g].T, s=12, alpha=0.75, color=ACTION_COLORS[g], label=label)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize=12,
        markerscale=2.5,
    )
    places = right.subplots(4, 3, squeeze=False).flat
    for number, (ax, row) in enumerate(zip(places, rows), 1):
        axes.annotate(
            str(number),
            xy[row],
            fontsize=18,
            weight="bold",
        )
        o_t, o_next = windows[row, -2], windows[row, -1]
        gap = np.full_like(o_t[:, :2], 255)
        ax.imshow(np.hstack([o_t, gap, o_next]), interpolation="nearest")
        ax.set_title(f"{number}: {names[group[row]]}", color=ACTION_COLORS[group[row]])
    for ax in right.axes:
        ax.set_axis_off()
    right.suptitle("$o_t$ and $o_{t+1}$ in the middle of k-means clusters, largest first")
    common.save_figure(figure, path)


# --- main -----------------------------------------------------------------------------------------


@torch.no_grad()
def main(args):
    device = common.pick_device(args)
    torch.manual_seed(args.seed)
    warnings.filterwarnings("ignore", module="sklearn")  # fewer distinct latents than clusters
    run = args.runs_dir / args.game
    common.lock(run / "latents_metrics.npz")

    # --- networks
    saved = common.load_checkpoint(run / "latent_dynamics.pt", "latent_dynamics", args.game)
    _, quantizer, fdm = build_models(saved["config"], device)
    quantizer.load_state_dict(saved["quantizer"])
    fdm.load_state_dict(saved["fdm"])
    quantizer.eval()
    fdm.eval()

    # --- data
    context = saved["config"]["idm"]["context"]
    store = common.FrameStore(args, "test", context, device, saved["dynamics_id"])
    rows = store.draw(args.points).unique()  # no latent is plotted twice
    if len(rows) < 50:
        common.fail(f"{store.folder} gives {len(rows)} windows, at least 50 are needed")
    windows = store.windows_at(rows)  # (N, k + 2, S, S, 3)
    z = store.z_at(rows)  # (N, Z)
    z_q, _, _ = quantizer(z)  # (N, Z)
    actions = common.true_actions_to_report_on(store, rows)
    if actions is not None and actions.dtype.kind == "f":
        common.fail("actions are continuous: python -m continuous_control.visualize_dmc")
    labelled = actions is not None
    print(f"{len(rows):,} latents of {args.game} on {device}, true actions: {labelled}")

    # --- groups of latents: true actions, or clusters
    cluster = find_clusters(z_q.cpu().numpy(), NUM_CLUSTERS, args.seed)
    kind = "k-means cluster"
    group = cluster
    names = [f"cluster {i + 1}" for i in range(NUM_CLUSTERS)]
    if labelled:
        kind = "true action"
        group = actions
        names = [f"action {i}" for i in range(common.NUM_ACTIONS)]
        if args.game in common.GAMES:
            names = common.ACTIONS

    # --- does the FDM use the latents? mse with the true, no and another window's latent
    shuffled = z_q[torch.randperm(len(z_q))]
    latents = dict(true=z_q, zeroed=0 * z_q, shuffled=shuffled)
    metrics = fdm_mse(fdm, windows, latents)

    # --- save, draw, print
    settings = dict(
        recording=saved["recording"],
        args=vars(args),
        grad_step=saved["grad_step"],
    )
    xy = project(z.cpu().numpy(), args.projection, args.seed)
    arrays = dict(xy=xy, group=group)
    common.save_npz(run / "latents_metrics.npz", settings, **metrics, **arrays)
    title = f"{args.game}: {len(rows):,} held-out latents by {kind} ({args.projection})"
    middles = list(medoids(z_q.cpu().numpy(), cluster).values())
    plot_map(run / "latents.png", xy, group, names, title, windows.cpu().numpy(), middles)
    for name, value in metrics.items():
        print(f"{name:36}{value:10.4g}")
    print(f"in {run}: latents_metrics.npz, latents.png")
    common.print_next("-m extras.rollouts", args)


if __name__ == "__main__":
    common.run(main, Args)
