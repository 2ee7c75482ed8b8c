"""Metrics and pictures of latent actions (paper, section 6.3, Figures 1 and 5).

Do they match the true actions, and what does each of them do? All on held-out episodes. True
actions are used to report, never to learn; without label files (own videos), k-means clusters of
the quantized latents take their place.

reads   runs/<game>/latent_dynamics.pt, {train,test}/latents_NNN.npz,
        data/<game>/{train,test,random}/frames_NNN.npz and labels_NNN.npz, if there
writes  runs/<game>/latents.npz (metrics), latents.png (map), latents_frames.png (with frames),
        fdm.png (predictions for each action), film.png, film.gif (open-loop rollouts)

paper scale   python visualize_latents.py --game bigfish
on a CPU      python visualize_latents.py --game miner --points 2048 --supervised-steps 500
"""

import warnings
from dataclasses import asdict, dataclass
from typing import Literal

import common  # before torch
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.animation import PillowWriter
from matplotlib.offsetbox import AnnotationBbox, OffsetImage, TextArea, VPacker
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from train_latent_dynamics import FDM, IDM, EMAVectorQuantizer, NoQuantizer
from train_latent_dynamics import in_batches, linear_probe, perplexity

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ACTION_COLORS = np.array(  # in the order of common.ACTIONS
    "#3454d1 #17a2b8 #3aa655 #7b3fbf #a6a6a6 #c9a400 #e83fb8 #e0202c #f5821f "
    "#000000 #8c5a2b #5c6b2f #c8a27a #5a2a2a #2f5d62".split()
)


@dataclass
class Args(common.RunArgs):
    points: int = 4096
    """Windows of each split: held-out ones to plot, and others to fit the probes on."""
    projection: Literal["umap", "tsne", "pca"] = "umap"
    """How latents are mapped to two dimensions (the paper: UMAP)."""
    supervised_steps: int = 3000
    """Updates of an IDM trained on true actions, an upper bound for the probes; 0 leaves it out."""


# --- metrics, maps, rollouts ----------------------------------------------------------------------


@torch.enable_grad()
def train_supervised(idm, store, steps, batch_size=128):
    """On true actions: an upper bound to report, used for nothing else."""
    actions = torch.from_numpy(common.true_actions_to_report_on(store, store.rows))
    optimizer = torch.optim.Adam(idm.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    bar = common.progress_bar(steps, "step", "supervised IDM")
    for _ in range(steps):
        i = torch.randint(len(actions), (batch_size,))
        loss = F.cross_entropy(idm(store.windows_at(store.rows[i])), actions[i].to(store.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update()
    bar.close()


def knn_purity(z, actions, k=10):
    """Fraction of the k nearest neighbours of each z [N, Z] with its action [N], and by chance."""
    neighbours = NearestNeighbors(n_neighbors=k).fit(z).kneighbors(return_distance=False)  # [N, k]
    counts = np.bincount(actions)
    chance = (counts * (counts - 1)).sum() / (len(actions) * (len(actions) - 1))
    return float((actions[neighbours] == actions[:, None]).mean()), float(chance)


def code_metrics(codes, codebooks, embeddings):
    """codes [N, C * P] -> perplexity of the positions, and fraction of the embeddings in use"""
    books = np.split(codes, codebooks, axis=1)
    used = sum(len(np.unique(book)) for book in books) / (codebooks * embeddings)
    each = [perplexity(position, embeddings) for position in codes.T]
    return dict(perplexity_mean=float(np.mean(each)), perplexity_min=min(each), codes_used=used)


def fdm_mse(fdm, windows, latents):
    """mse of the FDM with latents {name: (N, Z)} on windows (N, k + 2, S, S, 3), and of copying."""
    copied, target = (common.to_input(windows[:, i, None]) for i in (-2, -1))
    mse = dict(fdm_mse_copy=F.mse_loss(copied, target).item())
    for name, z in latents.items():
        predicted = in_batches(fdm, windows[:, :-1], z)
        mse[f"fdm_mse_{name}"] = F.mse_loss(predicted, target).item()
    return mse


def project(z, method, seed):
    """z [N, Z] -> [N, 2], and the method: t-SNE if UMAP fails (numba needs a cache)."""
    try:
        if method == "umap":
            from umap import UMAP

            # PCA as start: UMAP's own (eigenvectors) failed where many latents are equal
            umap = UMAP(min(15, len(z) - 1), init="pca", n_jobs=1, random_state=seed)
            return umap.fit_transform(z), method
    except Exception as error:
        print(f"UMAP fails here, t-SNE takes its place: {error!a:.200}")
    if method == "pca":
        return PCA(2, random_state=seed).fit_transform(z), method
    return TSNE(perplexity=min(30.0, (len(z) - 1) / 3), random_state=seed).fit_transform(z), "tsne"


def medoids(z_q, num_clusters, seed):
    """k-means of z_q [N, Z], largest cluster first: the row nearest to each mean, int [M], and the
    cluster of each row, int [N]. A row, as the FDM never saw a mean; M: at most the distinct rows.
    """
    fitted = KMeans(num_clusters, n_init=4, random_state=seed).fit(z_q)
    ids, cluster, counts = np.unique(fitted.labels_, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    cluster = np.argsort(order)[cluster]
    distance = fitted.transform(z_q)[:, ids[order]]  # [N, M]
    distance[cluster[:, None] != np.arange(len(ids))] = np.inf
    return distance.argmin(0), cluster


def rollout(fdm, past, z_q, steps):
    """Open loop with one latent: past uint8 (B, k + 1, S, S, 3) -> uint8 (B, 1 + steps, S, S, 3)"""
    frames = [past[:, -1]]
    for _ in range(steps):
        predicted = fdm(past, z_q).clamp(-0.5, 0.5).permute(0, 2, 3, 1)  # (B, S, S, 3)
        frames.append(((predicted + 0.5) * 255).round().to(torch.uint8))  # as all frames it saw
        past = torch.cat([past[:, 1:], frames[-1][:, None]], 1)
    return torch.stack(frames, 1)


# --- pictures. group [N]: the distinct true action of each latent, or its cluster -----------------


def save_figure(figure, path):
    with common.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)


def plot_map(path, xy, group, names, title, windows=None, rows=np.arange(0)):
    """xy [N, 2], coloured by group, with o_t and o_{t+1} of at most 12 rows around it."""
    figure = plt.figure(figsize=(15, 12) if len(rows) else (11, 8))
    axes = figure.add_axes((0.2, 0.18, 0.6, 0.58) if len(rows) else (0.02, 0.02, 0.76, 0.87))
    order = np.random.default_rng(0).permutation(len(xy))  # no group lies on top of the others
    size, colors = np.clip(70_000 / len(xy), 6, 40), ACTION_COLORS[group]
    axes.scatter(*xy[order].T, c=colors[order], s=size, alpha=0.75, linewidths=0)
    axes.set(xticks=[], yticks=[])
    places = [(x, y) for y in (-0.16, 1.16) for x in np.linspace(-0.18, 1.18, 4)]
    places = np.array(places + [(x, y) for x in (-0.18, 1.18) for y in (0.28, 0.72)])
    at = (xy[rows] - xy.min(0)) / (np.ptp(xy, axis=0) + 1e-9)  # [M, 2]
    distance = np.linalg.norm(at[:, None] - places, axis=-1)
    for i, place in zip(*linear_sum_assignment(distance)):  # the shortest lines do not cross
        row = rows[i]
        now, after = windows[row, -2:].cpu().numpy()
        picture = np.hstack([now, np.full_like(now[:, :1], 255), after])
        picture = OffsetImage(picture, zoom=84 / len(picture), interpolation="nearest")
        text = TextArea(f"{i + 1}: {names[group[row]]}", textprops=dict(size=14))
        box = VPacker(children=[text, picture], align="center", pad=0, sep=4)
        style = dict(arrowprops=dict(arrowstyle="-"), bboxprops=dict(ec=colors[row], lw=3))
        where = xy[row], places[place], "data", "axes fraction"
        axes.add_artist(AnnotationBbox(box, *where, **style))
        axes.plot(*xy[row], "o", markersize=9, color=colors[row], markeredgecolor="black")
    fractions = np.bincount(group) / len(group)
    for g in np.argsort(-fractions, kind="stable")[: (fractions > 0).sum()]:
        axes.scatter([], [], color=ACTION_COLORS[g], s=80, label=f"{fractions[g]:.1%}  {names[g]}")
    if not len(rows):
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=13)
    figure.suptitle(title, fontsize=16)
    save_figure(figure, path)


def panels(images, titles, labels, title, inches=1.75):
    """Figure of images [R, C, S, S, 3]; titles: of the first panels; labels: of the rows."""
    rows, columns = images.shape[:2]
    size = (inches * columns + 1.5, inches * rows + 1.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
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
    """Windows of the four most frequent groups: o_t, o_{t+1}, the prediction, and predictions with
    the latents of six groups, group_z_q (G, Z). windows uint8 (N, k + 2, S, S, 3), z_q (N, Z).
    """
    shown = [g for g in np.argsort(-np.bincount(group), kind="stable")[:6] if g in group]
    change = (windows[:, -1].float() - windows[:, -2]).square().mean((1, 2, 3)).cpu().numpy()
    order = np.argsort(change)  # shown: the upper quartile of a group, where something changes
    rows = [x[len(x) * 3 // 4] for x in (order[group[order] == g] for g in shown[:4])]
    past = windows[rows, :-1]
    now, after = (common.to_input(windows[rows, i, None]) for i in (-2, -1))
    given = torch.stack([fdm(past, group_z_q[[g] * len(rows)]) for g in shown])  # (G, R, 3, S, S)
    frames = torch.stack([now, after, fdm(past, z_q[rows]), *given])  # (3 + G, R, 3, S, S)
    # the FDM's mistakes are the same for every latent, so predictions are compared to each other
    changes = torch.cat([2 * (frames[:3] - now), 4 * (given - given.mean(0))])
    images = torch.stack([frames, changes], 2).permute(1, 2, 0, 4, 5, 3)  # (R, 2, 3 + G, S, S, 3)
    images = (images.flatten(0, 1) + 0.5).clamp(0, 1).cpu().numpy()
    titles = ["$o_t$", "$o_{t+1}$", "FDM, own z", *(f"FDM, z of\n{names[g]}" for g in shown)]
    labels = [text for g in shown[:4] for text in (names[g], "change")]
    figure = panels(images, titles, labels, title)
    for i in range(len(rows)):  # the true one
        figure.axes[2 * i * len(titles) + 3 + i].spines[:].set(color="#e0202c", linewidth=4)
    save_figure(figure, path)


def plot_film(run, frames, names, title):
    """film.png and film.gif: frames uint8 [M, T, S, S, 3], with names [M]."""
    titles = ["$o_t$", *(f"+{step}" for step in range(2, frames.shape[1], 2))]
    save_figure(panels(frames[:, ::2], titles, names, title, 1.2), run / "film.png")
    frames = np.pad(frames, ((0, -len(frames) % 4), *[(0, 0)] * 4), constant_values=255)
    figure = panels(frames[:, 0].reshape(-1, 4, *frames.shape[2:]), names, [], title)
    writer = PillowWriter(fps=5)
    with writer.saving(figure, run / ".part.gif", dpi=80):
        for step in range(frames.shape[1]):
            for ax, film in zip(figure.axes, frames):
                ax.images[0].set_data(film[step])
            figure.suptitle(f"{title}\nstep {step}", fontsize=14)
            writer.grab_frame()
    (run / ".part.gif").replace(run / "film.gif")
    plt.close(figure)


def print_results(run, game, metrics):
    """Metrics by their names in latents.npz, then the returns of the other stages, if any."""
    line, bounds = "{:36}{:10.4g}  {}", "random {random_return:.2f}, expert {expert_return:.2f}"
    for name, value in metrics.items():
        print(f"{name:36}{value:10.4g}")
    for path in run.glob("decode_offline.npz"):
        offline = common.load_npz(path)
        if "blind_return" in offline:  # not if only baselines/label_efficiency.py was run
            print(line.format("return of the blind policy", float(offline["blind_return"]), ""))
        labels = offline["labels"]
        for name in (name for name in offline if name.startswith("returns")):
            values = np.broadcast_to(offline[name], (len(labels), offline[name].shape[-1]))
            for count, x in zip(labels, values):  # methods: baselines/label_efficiency.py
                method = f"return, {name[8:] or 'lapo'}, {count} labels"
                std = x.std(ddof=min(1, len(x) - 1))
                print(line.format(method, x.mean(), f"std {std:.2f}"))
    for path in sorted(run.glob("decode_online_*.npz")):
        online = common.load_npz(path, ("env_steps", "returns"))
        name = f"return, {online['env_steps'][-1]:,} steps online"
        beside = f"{path.stem[14:]}, {bounds.format(**online['settings'])}"
        print(line.format(name, online["returns"][-1], beside))


@torch.no_grad()
def main(args):
    device = common.pick_device(args.device)
    torch.manual_seed(args.seed)
    warnings.filterwarnings("ignore", module="sklearn")  # the MLP's number of passes is fixed
    data, run = args.data_dir / args.game, args.runs_dir / args.game

    # --- networks
    saved = common.load_checkpoint(run / "latent_dynamics.pt", "latent_dynamics", args.game)
    vq_sizes, z_dim, stamp = saved["vq_sizes"], saved["z_dim"], saved["fingerprint"]
    size, k = saved["frame_size"], saved["context"]
    idm, untrained, supervised = (
        IDM(size, k, saved["multiplier"], outputs) for outputs in (z_dim, z_dim, 15)
    )
    fdm = FDM(size, k, z_dim, saved["fdm_width"], saved["predict_change"])
    quantizer = EMAVectorQuantizer(*vq_sizes, decay=1.0) if vq_sizes else NoQuantizer()
    for name, module in dict(idm=idm, fdm=fdm, quantizer=quantizer).items():
        module.load_state_dict(saved[name])
    for module in (idm, untrained, supervised, fdm, quantizer):
        module.to(device, memory_format=torch.channels_last).eval()
    _, method = project(np.random.rand(40, 4), args.projection, args.seed)  # early: may fail

    # --- data: windows, z (stage 1 writes none of random play), true actions or None
    splits = {}
    for split in (["random"] if (data / "random").exists() else []) + ["test", "train"]:
        latents = stamp if split != "random" else None
        store = common.FrameStore(args, split, k, device, latents)
        if store.frame_size != size:
            common.fail(f"stage 1 was trained on frames of {size} pixels, not {store.frame_size}")
        rows = store.draw(args.points).sort()[0]
        rows = rows.unique() if split == "test" else rows  # no latent is its own neighbour
        windows = store.windows_at(rows)
        z = (store.z_at(rows) if latents else in_batches(idm, windows)).cpu().numpy()
        splits[split] = windows, z, common.true_actions_to_report_on(store, rows)
    windows, z, group = splits["test"]
    if group is not None and group.dtype.kind == "f":
        common.fail("actions are continuous: python -m continuous_control.visualize_dmc")
    labelled, n = splits["train"][2] is not None and group is not None, len(z)
    if n < 50:
        common.fail(f"{data / 'test'} and --points give {n} windows, at least 50 are needed")
    print(f"{n:,} latents of {args.game} on {device}, {'with' if labelled else 'no'} true actions")

    # --- probes, each beside the majority class and z of an untrained IDM
    pairs, metrics = {}, {}
    if "random" in splits and splits["random"][2] is not None:  # as in stage 1
        cut = len(splits["random"][1]) * 3 // 4
        pairs["random_"] = zip(*((x[:cut], x[cut:]) for x in splits["random"]))
    if labelled:
        pairs[""] = splits["train"], splits["test"]
    for prefix, (fit, test) in pairs.items():
        probe = linear_probe(*fit[1:], *test[1:])
        metrics[f"{prefix}probe"], metrics[f"{prefix}majority"] = probe
        fit_z, test_z = (in_batches(untrained, x[0]).cpu().numpy() for x in (fit, test))
        metrics[f"{prefix}probe_untrained"], _ = linear_probe(fit_z, fit[2], test_z, test[2])

    # --- groups of latents, and a latent for each: clusters or true actions
    z_q, _, codes = quantizer(torch.from_numpy(z).to(device))  # (N, Z), (N, C * P)
    latents = dict(true=z_q, zeroed=0 * z_q, shuffled=z_q[torch.randperm(n)])
    medoid, cluster = medoids(z_q.cpu().numpy(), 12, args.seed)
    if labelled:
        kind, names, (_, train_z, a) = "true action", common.ACTIONS, splits["train"]
        mlp = MLPClassifier((256,), max_iter=30, random_state=args.seed)
        metrics["mlp_probe"] = make_pipeline(StandardScaler(), mlp).fit(train_z, a).score(z, group)
        if args.supervised_steps > 0:
            train_supervised(supervised, store, args.supervised_steps)  # store: the last, "train"
            guesses = in_batches(supervised, windows).argmax(1).cpu().numpy()
            metrics["supervised"] = (guesses == group).mean()
        metrics["knn_purity"], metrics["knn_chance"] = knn_purity(z, group)
        metrics["silhouette"] = silhouette_score(z, group)
        # the mean of z, quantized: the FDM saw nothing between the codes
        means = [train_z[a == i].mean(0) if i in a else train_z.mean(0) for i in range(15)]
        group_z_q = quantizer(torch.from_numpy(np.stack(means)).to(device))[0]  # (15, Z)
        latents["mean_of_action"] = group_z_q[group]
    else:
        kind, names = "k-means cluster", [f"cluster {i + 1}" for i in range(12)]
        group, group_z_q = cluster, z_q[medoid]
    if vq_sizes:
        metrics |= code_metrics(codes.cpu().numpy(), vq_sizes[0], vq_sizes[2])
    metrics |= fdm_mse(fdm, windows, latents)

    # --- save, draw, print
    xy, method = project(z, method, args.seed)
    settings = dict(grad_step=saved["grad_step"], vq=bool(vq_sizes), labelled=labelled)
    settings = saved["settings"] | asdict(args) | settings | dict(projection=method)
    metrics_and_group = metrics | {"action" if labelled else "cluster": group}
    common.save_npz(run / "latents.npz", settings, xy=xy, **metrics_and_group)
    title = f"{args.game}: {n:,} held-out latents by {kind} ({method})"
    note = "linear probe {probe:.2f}, majority {majority:.2f}, untrained IDM {probe_untrained:.2f}"
    note = note.format(**metrics) if labelled else "without true actions"
    plot_map(run / "latents.png", xy, group, names, f"{title}\n{note}")
    title += "\n$o_t$ and $o_{t+1}$ in the middle of k-means clusters, largest first"
    plot_map(run / "latents_frames.png", xy, group, names, title, windows, medoid)
    title = f"{args.game}: predictions with a typical latent of each {kind}; red: the true one\n"
    title += "change: minus $o_t$ (×2); on the right: minus the mean of these predictions (×4)"
    plot_fdm(run / "fdm.png", fdm, windows, z_q, group_z_q, group, names, title)
    texts = []
    for i in range(len(medoid)):
        x = np.bincount(group[cluster == i]) / n
        texts.append(f"{i + 1}: {x.sum():.0%} of z")
        texts[i] += f"\n{x.max() / x.sum():.0%} {names[x.argmax()]}" if labelled else ""
    film = rollout(fdm, windows[[medoid[0]] * len(medoid), :-1], z_q[medoid], 15).cpu().numpy()
    plot_film(run, film, texts, f"{args.game}: open-loop rollouts of the FDM, each with one latent")
    print_results(run, args.game, metrics)
    print(f"in {run}: latents.npz, latents.png, latents_frames.png, fdm.png, film.png, film.gif")


if __name__ == "__main__":
    main(tyro.cli(Args))
