"""Metrics and pictures of latent actions (paper, section 6.3, Figures 1 and 5).

Do they match the true actions, and what does each of them do? All on held-out episodes. True
actions are used to report, never to learn; without label files (own videos), k-means clusters of
the quantized latents take their place.

reads   runs/<game>/latent_dynamics.pt, {train,test}/latents_NNN.npz,
        data/<game>/{train,test,random}/frames_NNN.npz and labels_NNN.npz, if there
writes  runs/<game>/latents_metrics.npz, latents.png (map, and frames of the clusters' middles),
        fdm.png (the FDM's predictions with the latents of each action)

paper scale   python visualize_latents.py --game bigfish
on a CPU      python visualize_latents.py --game miner --points 2048
"""

import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import common  # before torch
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from train_latent_dynamics import PROBE_FIT, build_models, in_batches, linear_probe

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ACTION_COLORS = np.array(  # in the order of common.ACTIONS
    "#3454d1 #17a2b8 #3aa655 #7b3fbf #a6a6a6 #c9a400 #e83fb8 #e0202c #f5821f "
    "#000000 #8c5a2b #5c6b2f #c8a27a #5a2a2a #2f5d62".split()
)
NUM_CLUSTERS = 12


@dataclass
class Args(common.RunArgs):
    points: int = 4096
    """Windows of each split: held-out ones to plot, and others to fit the probes on."""
    projection: Literal["umap", "pca"] = "umap"
    """How latents are mapped to two dimensions (the paper: UMAP)."""


class Split(NamedTuple):
    store: common.FrameStore
    windows: torch.Tensor  # uint8 (N, k + 2, S, S, 3)
    z: np.ndarray  # float32 [N, Z], before quantization
    actions: np.ndarray  # distinct true actions int [N], or None

    def rows(self, some):
        return self._replace(
            windows=self.windows[some],
            z=self.z[some],
            actions=self.actions[some],
        )


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


def probe_metrics(prefix, fit, test, untrained):
    """Linear probes of z and of an untrained IDM's z, fitted on one Split, tested on the other."""
    probe, majority = linear_probe(fit.z, fit.actions, test.z, test.actions)
    fit_z = in_batches(untrained, fit.windows).cpu().numpy()
    test_z = in_batches(untrained, test.windows).cpu().numpy()
    probe_untrained, _ = linear_probe(fit_z, fit.actions, test_z, test.actions)
    return {
        f"{prefix}probe": probe,
        f"{prefix}majority": majority,
        f"{prefix}probe_untrained": probe_untrained,
    }


def mean_latents(split):
    """float32 [15, Z]: the mean z of each action; the mean of all for one that does not occur."""
    means = np.tile(split.z.mean(0), (common.NUM_ACTIONS, 1))
    for action in np.unique(split.actions):
        means[action] = split.z[split.actions == action].mean(0)
    return means


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


def medoids(z_q, num_clusters, seed):
    """k-means of z_q [N, Z], largest cluster first: the row nearest to each mean, int [M], and the
    cluster of each row, int [N]. M is at most the number of distinct rows. Means themselves are of
    no use: the FDM was trained on quantized latents alone.
    """
    fitted = KMeans(num_clusters, n_init=4, random_state=seed).fit(z_q)
    distance = fitted.transform(z_q)  # [N, M]
    ids, counts = np.unique(fitted.labels_, return_counts=True)
    by_size = ids[np.argsort(-counts, kind="stable")]
    middle = np.zeros(len(ids), int)
    cluster = np.zeros(len(z_q), int)
    for number, label in enumerate(by_size):
        members = np.flatnonzero(fitted.labels_ == label)
        middle[number] = members[distance[members, label].argmin()]
        cluster[members] = number
    return middle, cluster


# --- pictures. group [N]: the distinct true action of each latent, or its cluster -----------------


def plot_map(path, xy, group, names, title, windows, rows):
    """Left: xy [N, 2], coloured by group. Right: o_t and o_{t+1} of some rows, int [M], which are
    numbered on the left. windows: uint8 [N, k + 2, S, S, 3].
    """
    figure = plt.figure(figsize=(17, 8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[10, 7])
    axes = left.subplots()
    order = np.random.default_rng(0).permutation(len(xy))  # no group lies on top of the others
    axes.scatter(
        xy[order, 0],
        xy[order, 1],
        c=ACTION_COLORS[group[order]],
        s=12,
        alpha=0.75,
        linewidths=0,
    )
    axes.set(xticks=[], yticks=[], title=title)
    fractions = np.bincount(group, minlength=len(names)) / len(group)
    for g in np.argsort(-fractions, kind="stable"):
        if fractions[g] > 0:
            label = f"{fractions[g]:.1%}  {names[g]}"
            axes.scatter(
                [],
                [],
                color=ACTION_COLORS[g],
                s=80,
                label=label,
            )
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize=12,
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


def panels(images, titles, labels, title, inches=1.75):
    """Figure of images [R, C, S, S, 3]; titles: of the first panels; labels: of the rows."""
    rows, columns = images.shape[:2]
    size = (inches * columns + 1.5, inches * rows + 1.5)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=size,
        layout="constrained",
        squeeze=False,
    )
    for place, ax in np.ndenumerate(axes):
        ax.imshow(images[place], interpolation="nearest")
        ax.set(xticks=[], yticks=[])
    for ax, text in zip(axes.flat, titles):
        ax.set_title(text, fontsize=13)
    for ax, text in zip(axes[:, 0], labels):
        ax.set_ylabel(text, fontsize=13)
    figure.suptitle(title, fontsize=16)
    return figure


def plot_fdm(path, fdm, windows, z_q, group_z_q, group, names, title):
    """One window of each of the four most frequent groups: o_t, o_{t+1}, the prediction with its
    own latent, and the predictions with the latents of up to six groups, group_z_q (G, Z). Below:
    differences from o_t, and from the mean of the latter predictions. windows uint8 (N, k + 2, S,
    S, 3), z_q (N, Z).
    """
    counts = np.bincount(group)
    frequent = np.argsort(-counts, kind="stable")[:6]
    frequent = [g for g in frequent if g in group]
    change = windows[:, -1].float() - windows[:, -2]
    change = change.square().mean((1, 2, 3)).cpu().numpy()  # [N]
    rows = []
    for g in frequent[:4]:  # a window in which much changes: the upper quartile of the group
        members = np.flatnonzero(group == g)
        by_change = members[np.argsort(change[members])]
        rows.append(by_change[len(members) * 3 // 4])
    past = windows[rows, :-1]
    o_t = common.to_input(windows[rows, -2:-1])
    o_next = common.to_input(windows[rows, -1:])
    own = fdm(past, z_q[rows])
    given = []
    for g in frequent:
        given.append(fdm(past, group_z_q[[g] * len(rows)]))
    given = torch.stack(given)  # (G, R, 3, S, S)
    frames = torch.stack([o_t, o_next, own])  # (3, R, 3, S, S)
    upper = torch.cat([frames, given])  # (3 + G, R, 3, S, S)
    changes = 2 * (frames - o_t)
    differences = 4 * (given - given.mean(0))
    lower = torch.cat([changes, differences])
    images = torch.stack([upper, lower], 2)  # (3 + G, R, 2, 3, S, S)
    images = images.permute(1, 2, 0, 4, 5, 3)  # (R, 2, 3 + G, S, S, 3)
    images = images.flatten(0, 1)
    images = (images + 0.5).clamp(0, 1).cpu().numpy()
    titles = ["$o_t$", "$o_{t+1}$", "FDM, own z", *(f"FDM, z of\n{names[g]}" for g in frequent)]
    labels = []
    for g in frequent[:4]:
        labels += [names[g], "change"]
    common.save_figure(panels(images, titles, labels, title), path)


# --- main -----------------------------------------------------------------------------------------


def load_split(args, split, saved, idm, device):
    """`points` windows of a split; stage 1 has written no latents of random play."""
    config = saved["config"]["idm"]
    dynamics_id = None if split == "random" else saved["dynamics_id"]
    store = common.FrameStore(args, split, config["context"], device, dynamics_id)
    if store.frame_size != config["frame_size"]:
        sizes = f"{config['frame_size']} pixels, not {store.frame_size}"
        common.fail(f"stage 1 was trained on frames of {sizes}")
    rows = store.draw(args.points).sort()[0]
    if split == "test":
        rows = rows.unique()  # no latent is plotted twice
    windows = store.windows_at(rows)
    z = in_batches(idm, windows) if dynamics_id is None else store.z_at(rows)
    actions = common.true_actions_to_report_on(store, rows)
    if actions is not None and actions.dtype.kind == "f":
        common.fail("actions are continuous: python -m continuous_control.visualize_dmc")
    return Split(store, windows, z.cpu().numpy(), actions)


@torch.no_grad()
def main(args):
    device = common.pick_device(args)
    torch.manual_seed(args.seed)
    warnings.filterwarnings("ignore", module="sklearn")  # fewer distinct latents than clusters
    run = args.runs_dir / args.game
    common.lock(run / "latents_metrics.npz")

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
    # --- data
    train = load_split(args, "train", saved, idm, device)
    test = load_split(args, "test", saved, idm, device)
    num_points = len(test.z)
    if num_points < 50:
        common.fail(f"{test.store.folder} gives {num_points} windows, at least 50 are needed")
    labelled = train.actions is not None and test.actions is not None
    print(f"{num_points:,} latents of {args.game} on {device}, true actions: {labelled}")

    # --- probes, each beside the majority class and z of an untrained IDM
    metrics = {}
    if (args.data_dir / args.game / "random").exists():  # as in stage 1
        random_play = load_split(args, "random", saved, idm, device)
        if random_play.actions is not None:
            split = int(PROBE_FIT * len(random_play.z))
            fit = random_play.rows(slice(None, split))
            rest = random_play.rows(slice(split, None))
            metrics |= probe_metrics("random_", fit, rest, untrained)
    if labelled:
        metrics |= probe_metrics("", train, test, untrained)

    # --- groups of latents, and a latent for each: true actions, or clusters
    z_q, _, _ = quantizer(torch.from_numpy(test.z).to(device))  # (N, Z)
    shuffled = z_q[torch.randperm(num_points)]
    latents = dict(true=z_q, zeroed=0 * z_q, shuffled=shuffled)
    middle, cluster = medoids(z_q.cpu().numpy(), NUM_CLUSTERS, args.seed)
    if labelled:
        kind = "true action"
        names = [f"action {i}" for i in range(common.NUM_ACTIONS)]
        if args.game in common.GAMES:
            names = common.ACTIONS
        group = test.actions
        means = torch.from_numpy(mean_latents(train)).to(device)
        group_z_q, _, _ = quantizer(means)  # (15, Z): the FDM saw nothing between the codes
        latents["mean_of_action"] = group_z_q[group]
    else:
        kind = "k-means cluster"
        names = [f"cluster {i + 1}" for i in range(NUM_CLUSTERS)]
        group = cluster
        group_z_q = z_q[middle]
    metrics |= fdm_mse(fdm, test.windows, latents)

    # --- save, draw, print
    settings = dict(
        recording=saved["recording"],
        args=vars(args),
        grad_step=saved["grad_step"],
    )
    xy = project(test.z, args.projection, args.seed)
    arrays = dict(xy=xy, group=group)
    common.save_npz(run / "latents_metrics.npz", settings, **metrics, **arrays)
    title = f"{args.game}: {num_points:,} held-out latents by {kind} ({args.projection})"
    plot_map(run / "latents.png", xy, group, names, title, test.windows.cpu().numpy(), middle)
    title = f"{args.game}: predictions with a typical latent of each {kind}\n"
    title += "second rows: difference from $o_t$ (left), from the mean prediction (right)"
    plot_fdm(run / "fdm.png", fdm, test.windows, z_q, group_z_q, group, names, title)
    for name, value in metrics.items():
        print(f"{name:36}{value:10.4g}")
    print(f"in {run}: latents_metrics.npz, latents.png, fdm.png")


if __name__ == "__main__":
    common.run(main, Args)
