"""Looking at latent actions: do they match the true ones, and what does each of them do? (paper, section 6.3 and A.2)

Four answers, all on held-out episodes: a plot of the latents in two dimensions coloured by true action (the paper's
Figure 5), and the same with example frames pinned to its clusters (the idea of Figure 1); figures that judge them without
a plot; a sheet of frames that the FDM pushes by the mean latent of each true action; and a film of what the FDM dreams when
it is told the same latent again and again. True actions serve to report, never to learn a latent.

reads   runs/<game>/latent_dynamics.pt, runs/<game>/{train,test}/latents_NNN.npz,
        data/<game>/{train,test}/frames_NNN.npz and labels_NNN.npz
writes  runs/<game>/latents.png, latents_frames.png, latents.npz, fdm.png, film.png, film.gif

paper scale   python visualize_latents.py --game bigfish
CPU sized     python visualize_latents.py --game coinrun --points 2048 --supervised-steps 300
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.offsetbox import AnnotationBbox, OffsetImage, TextArea, VPacker
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import common


@dataclass
class Args:
    game: str = "bigfish"
    """One of Procgen's 16 games."""
    seed: int = 1
    """Seeds networks, action sampling and the games themselves."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data_dir: Path = Path("data")
    """Frames and labels lie in <data-dir>/<game>."""
    runs_dir: Path = Path("runs")
    """Checkpoints, metrics and plots go to <runs-dir>/<game>."""
    vq: bool = True
    """Quantise the latent actions; --no-vq is the paper's ablation (A.2), whose runs go to <runs-dir>/<game>_no_vq."""

    points: int = 4096
    """Held-out latents to plot and to judge, and as many training latents to fit the probes."""
    projection: Literal["umap", "tsne", "pca"] = "umap"
    """How latents come down to two dimensions (the paper: UMAP)."""
    supervised_steps: int = 3000
    """Updates of the supervised IDM, an upper bound for the probes; 0 leaves it out."""


# --- networks ------------------------------------------------------------------------------------------------------


def to_input(frames):
    """uint8 (B, T, S, S, 3) -> float (B, 3T, S, S) in [-0.5, 0.5], stacked on channels, laid out channels last."""
    b, t, s, _, c = frames.shape
    return frames.permute(0, 2, 3, 1, 4).reshape(b, s, s, t * c).permute(0, 3, 1, 2).float() / 255 - 0.5


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ImpalaCNN(nn.Module):
    """The convolutions of IMPALA (Espeholt et al. 2018): three times conv, max pool, two residual blocks."""

    def __init__(self, in_channels, frame_size, multiplier):
        super().__init__()
        layers = []
        for channels in (int(16 * multiplier), int(32 * multiplier), int(32 * multiplier)):
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
            layers += [ResidualBlock(channels), ResidualBlock(channels)]
            in_channels = channels
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Flatten())
        self.num_features = channels * (frame_size // 8) ** 2

    def forward(self, x):
        return self.layers(x)  # (B, C, S, S) -> (B, 32 * multiplier * (S / 8)^2)


class IDM(nn.Module):
    """z_t = IDM(o_{t-k} .. o_{t+1}), before quantisation."""

    def __init__(self, frame_size, context, multiplier, z_dim):
        super().__init__()
        self.cnn = ImpalaCNN(3 * (context + 2), frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.head = nn.Linear(256, z_dim)

    def forward(self, windows):
        """uint8 (B, k + 2, S, S, 3) -> z (B, Z)"""
        return self.head(F.relu(self.hidden(self.cnn(to_input(windows)))))


class EMAVectorQuantizer(nn.Module):
    """Replaces each piece of z by the nearest embedding; embeddings follow their pieces by moving averages (van den Oord
    et al. 2017, appendix A.1). z is C codebooks x E numbers x P positions; the P positions share their codebook.
    """

    def __init__(self, codebooks, positions, embeddings, embedding_dim, decay):
        super().__init__()
        self.shape, self.decay = (codebooks, embedding_dim, positions), decay
        start = torch.empty(codebooks, embeddings, embedding_dim).uniform_(-5 / embeddings, 5 / embeddings)
        self.register_buffer("embedding", start)  # (C, K, E)
        # counts start at 1, as if each embedding had been seen once where it stands: with counts of 0 (official code) the
        # first update divides by almost nothing and the codes explode
        self.register_buffer("count", torch.ones(codebooks, embeddings))  # (C, K)
        self.register_buffer("total", start.clone())  # (C, K, E); embedding = total / count

    def forward(self, z):
        """z (B, C * E * P) -> z_q like z (gradients pass straight through), commitment loss (), codes int64 (B, C * P)"""
        c, e, p = self.shape
        x = z.float().view(-1, c, e, p).permute(1, 0, 3, 2).reshape(c, -1, e)  # (C, B * P, E)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):  # averages move by thousandths: too fine for bf16
            # by differences: by matrix products, codes that lie close together would drown in TF32's rounding
            distance = torch.cdist(x, self.embedding, compute_mode="donot_use_mm_for_euclid_dist")  # (C, B * P, K)
            codes = distance.argmin(-1)  # (C, B * P)
            nearest = self.embedding.gather(1, codes[..., None].expand_as(x))  # with the codebook before its update
            if self.training:
                self.update(x, codes)
        commitment = F.mse_loss(x, nearest)
        z_q = x + (nearest - x).detach()  # straight-through estimator
        z_q = z_q.view(c, -1, p, e).permute(1, 0, 3, 2).reshape(z.shape)
        return z_q, commitment, codes.view(c, -1, p).transpose(0, 1).flatten(1)

    @torch.no_grad()
    def update(self, x, codes):
        """Moves the averages towards x (C, B * P, E), assigned to codes (C, B * P), and revives dead codes."""
        one_hot = F.one_hot(codes, self.embedding.shape[1]).to(x.dtype)  # (C, B * P, K)
        uses, sums, num_pieces = one_hot.sum(1), one_hot.transpose(1, 2) @ x, x.shape[1]  # (C, K), (C, K, E)
        pieces = x[:, torch.randint(x.shape[1], (self.embedding.shape[1],), device=x.device)]  # (C, K, E)
        if torch.distributed.is_initialized():  # the codebooks of all processes follow the pieces of all, and stay the same
            torch.distributed.all_reduce(uses), torch.distributed.all_reduce(sums)
            torch.distributed.broadcast(pieces, src=0)
            num_pieces *= torch.distributed.get_world_size()
        self.count.lerp_(uses, 1 - self.decay)
        self.total.lerp_(sums, 1 - self.decay)
        # a code used ten times less than its fair share restarts on a random piece of this batch, as if it had that share
        fair = num_pieces / self.embedding.shape[1]
        dead = self.count < 0.1 * fair  # (C, K)
        self.count.copy_(torch.where(dead, fair, self.count))
        self.total.copy_(torch.where(dead[..., None], fair * pieces, self.total))
        self.embedding.copy_(self.total / self.count[..., None])

    def lookup(self, codes):
        """codes (B, C * P) -> z_q (B, C * E * P)"""
        c, e, p = self.shape
        codes = codes.long().view(-1, c, p).transpose(0, 1).reshape(c, -1)  # (C, B * P)
        z_q = self.embedding.gather(1, codes[..., None].expand(-1, -1, e))  # (C, B * P, E)
        return z_q.view(c, -1, p, e).permute(1, 0, 3, 2).flatten(1)


class NoQuantizer(nn.Module):
    """In the quantiser's place without vector quantisation (A.2): z goes to the FDM as it is, and has no codes."""

    def forward(self, z):
        """z (B, Z) -> z, commitment loss (), codes int64 (B, 0)"""
        return z, z.new_zeros(()), torch.zeros(len(z), 0, dtype=torch.long, device=z.device)


def conv_beside_constant_planes(conv, x, z):
    """conv(x stacked with z repeated over the plane), without the planes: x (B, C, S, S), z (B, Z) -> (B, out, S, S)

    A padded 3x3 convolution of a constant plane takes 9 values: four corners, four edges, inside. So a 3x3 plane tells
    them all, for 9 places' work instead of S * S.
    """
    weight_x, weight_z = conv.weight.split([x.shape[1], z.shape[1]], dim=1)
    tile = F.conv2d(z[:, :, None, None].expand(-1, -1, 3, 3), weight_z, padding=1)  # (B, out, 3, 3)
    place = torch.ones(x.shape[2], dtype=torch.long, device=x.device)
    place[0], place[-1] = 0, 2
    return F.conv2d(x, weight_x, conv.bias, padding=1) + tile[:, :, place][:, :, :, place]


class HalfResidual(nn.Module):
    """A residual pair of convolutions with half the channels between them."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class DownBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.residual = HalfResidual(out_channels)

    def forward(self, x, z=None):
        x = self.conv(x) if z is None else conv_beside_constant_planes(self.conv, x, z)
        return F.relu(F.max_pool2d(self.residual(self.norm(x)), 2))  # (B, in, S, S) -> (B, out, S / 2, S / 2)


class UpBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.norm = nn.BatchNorm2d(out_channels)
        self.residual = HalfResidual(out_channels)

    def forward(self, x):
        return F.relu(self.residual(self.norm(self.conv(x))))  # (B, in, S, S) -> (B, out, 2S, 2S)


class FDM(nn.Module):
    """o_{t+1} = FDM(o_{t-k} .. o_t, z_t): a U-Net (Ronneberger et al. 2015) that z enters at the top and at the bottom."""

    def __init__(self, frame_size, context, z_dim, width, predict_change):
        super().__init__()
        self.predict_change = predict_change
        past = 3 * (context + 1)
        depth = frame_size.bit_length() - 2  # down blocks until 2x2 is left: 5 at 64x64
        widths = [width * 2**i for i in range(depth + 1)]  # 24, 48, 96, 192, 384, and 768 at 1x1
        self.down = nn.ModuleList(DownBlock(i, o) for i, o in zip([past + z_dim, *widths], widths[:-1]))
        self.bottom = nn.Conv2d(widths[-2], widths[-1], 2)
        self.up = nn.ModuleList([UpBlock(widths[-1] + z_dim, widths[-2])])
        self.up.extend(UpBlock(2 * i, o) for i, o in zip(widths[-2::-1], [*widths[-3::-1], width]))
        self.last = nn.Sequential(nn.Conv2d(width + past, width, 3, padding=1), HalfResidual(width), nn.ReLU(), nn.Conv2d(width, 3, 1))
        if predict_change:  # starts from "nothing changes"
            nn.init.zeros_(self.last[-1].weight)
            nn.init.zeros_(self.last[-1].bias)

    def forward(self, past, z):
        """past: uint8 (B, k + 1, S, S, 3), z (B, Z) -> o_{t+1} (B, 3, S, S) in [-0.5, 0.5]"""
        past = to_input(past)
        skips = [self.down[0](past, z)]
        for block in self.down[1:]:
            skips.append(block(skips[-1]))
        x = self.up[0](torch.cat([self.bottom(skips[-1]), z[:, :, None, None]], 1))  # (B, 32 width + Z, 1, 1) -> (B, 16 width, 2, 2)
        for block, skip in zip(self.up[1:], reversed(skips)):
            x = block(torch.cat([x, skip], 1))
        x = self.last(torch.cat([x, past], 1))  # (B, 3, S, S)
        return past[:, -3:] + x if self.predict_change else x.tanh() / 2


# --- judging without a plot ----------------------------------------------------------------------------------------


@torch.no_grad()
def in_batches(model, windows, device, batch_size=512):
    """windows uint8 [N, k + 2, S, S, 3] (numpy) -> the model's outputs, float (N, D) on the CPU"""
    return torch.cat([model(part.to(device)).cpu() for part in torch.from_numpy(windows).split(batch_size)])


def accuracies(probabilities, actions, distinct):
    """Share of the true `actions` [N] that is likeliest, and the same where equivalent actions count as one.

    probabilities [N, 15]; those of equivalent actions add up. distinct: see common.distinct_actions().
    """
    merged = probabilities @ np.eye(common.NUM_ACTIONS)[distinct]
    return float((probabilities.argmax(1) == actions).mean()), float((merged.argmax(1) == distinct[actions]).mean())


def probe(classifier, train_z, train_actions, test_z):
    """Fits a classifier of standardised z; returns its probabilities of all actions for test_z, [N, 15]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # probes stop after a fixed number of passes, by design
        fitted = make_pipeline(StandardScaler(), classifier).fit(train_z, train_actions)
    probabilities = np.zeros((len(test_z), common.NUM_ACTIONS))
    probabilities[:, fitted.classes_] = fitted.predict_proba(test_z)  # an action that was not in the training set has none
    return probabilities


def train_supervised_idm(idm, folder, game, context, steps, device, seed, max_shards=8, batch_size=128):
    """Trains `idm` (the latent one's architecture, but 15 outputs) on true actions: how much the frames can tell.

    Frames come from at most `max_shards` shards spread over the folder: 1.6 GB at 64x64.
    """
    paths = common.list_shards(folder, "frames", f"python collect_data.py --game {game}")
    obs, actions, rows, start = [], [], [], 0
    for path in paths[:: -(-len(paths) // max_shards)]:
        shard, first, _ = common.read_frames(path, game)
        obs.append(torch.from_numpy(shard))
        actions.append(torch.from_numpy(common.read_labels(path, game)["action"]).long())
        rows.append(torch.from_numpy(start + np.flatnonzero(common.valid_windows(first, context))))
        start += len(shard)
    obs, actions, rows = torch.cat(obs), torch.cat(actions), torch.cat(rows)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(idm.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in common.track(range(steps), "step", "supervised IDM"):
        t = rows[torch.randint(len(rows), (batch_size,), generator=generator)]
        logits = idm(obs[t[:, None] + torch.arange(-context, 2)].to(device))
        loss = F.cross_entropy(logits, actions[t].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def knn_purity(z, actions, k=10):
    """Share of the k nearest neighbours of each z [N, Z] that have its action [N], and what chance would give."""
    neighbours = NearestNeighbors(n_neighbors=k).fit(z).kneighbors(return_distance=False)  # (N, k), never the point itself
    counts = np.bincount(actions)
    chance = (counts * (counts - 1)).sum() / (len(actions) * (len(actions) - 1))
    return float((actions[neighbours] == actions[:, None]).mean()), float(chance)


def codebook_use(codes, codebooks, embeddings):
    """codes [N, C * P] -> perplexity [C] and share of the embeddings in use [C]"""
    used = np.split(codes, codebooks, axis=1)
    shares = np.stack([np.bincount(book.ravel(), minlength=embeddings) / book.size for book in used])  # (C, K)
    return np.array([common.perplexity(share) for share in shares]), (shares > 0).mean(1)


@torch.no_grad()
def fdm_errors(fdm, windows, z_q, mean_z_q, device, seed, batch_size=512):
    """Mean squared error of the FDM on windows uint8 [N, k + 2, S, S, 3] by what it is told, as a dict.

    z_q (N, Z): the windows' own quantised latents, which are also zeroed and shuffled among the windows. mean_z_q (N, Z):
    the mean latent of each window's true action. copy: no FDM, o_{t+1} = o_t. Pixels lie in [-0.5, 0.5].
    """
    shuffled = z_q[torch.randperm(len(z_q), generator=torch.Generator().manual_seed(seed))]
    told = dict(true=z_q, mean_of_action=mean_z_q, zeroed=torch.zeros_like(z_q), shuffled=shuffled)
    errors = dict.fromkeys([*told, "copy"], 0.0)
    for rows in torch.arange(len(windows)).split(batch_size):
        batch = torch.from_numpy(windows)[rows].to(device)
        target, share = to_input(batch[:, -1:]), len(rows) / len(windows)
        errors["copy"] += float(F.mse_loss(to_input(batch[:, -2:-1]), target)) * share
        for name, z in told.items():
            errors[name] += float(F.mse_loss(fdm(batch[:, :-1], z[rows].to(device)), target)) * share
    return errors


# --- pictures ------------------------------------------------------------------------------------------------------


def project(z, method, seed):
    """z [N, Z] -> float [N, 2]"""
    if method == "umap":
        from umap import UMAP  # compiles for seconds when imported

        # starts from PCA as t-SNE does: its own start, eigenvectors, failed on the demo's miner, where many latents are equal
        return UMAP(n_neighbors=min(15, len(z) - 1), init="pca", random_state=seed, n_jobs=1).fit_transform(z)
    if method == "tsne":
        return TSNE(perplexity=min(30.0, (len(z) - 1) / 3), random_state=seed).fit_transform(z)
    return PCA(2, random_state=seed).fit_transform(z)


def medoids(z_q, num_clusters, seed):
    """k-means of z_q [N, Z]: of each cluster the row nearest to its mean, int [M], and each row's cluster, int [N].

    Largest cluster first. Where few combinations of codes carry most latents, these are the clusters; where hardly one occurs
    twice (8 codes of 64 combine in many ways), or without quantisation, similar ones go together. A real row, because the
    FDM was never told a mean. M is less than num_clusters where z_q has fewer distinct rows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
        fitted = KMeans(num_clusters, n_init=4, random_state=seed).fit(z_q)
    names, cluster, counts = np.unique(fitted.labels_, return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(-counts, kind="stable"))
    distance = fitted.transform(z_q)[:, names[np.argsort(rank)]]  # [N, M]
    cluster = rank[cluster]
    distance[cluster[:, None] != np.arange(len(names))] = np.inf
    return distance.argmin(0), cluster


@torch.no_grad()
def roll_forward(fdm, past, z_q, steps):
    """The FDM fed with its own predictions and, at each step, with the same latent action.

    past uint8 (B, k + 1, S, S, 3), z_q (B, Z) -> uint8 (B, 1 + steps, S, S, 3): o_t, then the predictions. Each is rounded to
    whole pixel values before it is fed back: the FDM has only ever seen such frames.
    """
    frames = [past[:, -1]]
    for _ in range(steps):
        predicted = fdm(past, z_q).clamp(-0.5, 0.5).permute(0, 2, 3, 1)  # (B, S, S, 3)
        frames.append(((predicted + 0.5) * 255).round().to(torch.uint8))
        past = torch.cat([past[:, 1:], frames[-1][:, None]], 1)
    return torch.stack(frames, 1)


def save_figure(figure, path):
    with common.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)


def scatter_latents(axes, xy, actions, size):
    """Dots of `size` square points at xy [N, 2], coloured by action [N]."""
    order = np.random.default_rng(0).permutation(len(xy))  # so that no action lies on top of the others
    axes.scatter(*xy[order].T, c=np.array(common.ACTION_COLORS)[actions[order]], s=size, alpha=0.75, linewidths=0)
    axes.set_xticks([]), axes.set_yticks([])


def plot_latents(path, xy, actions, distinct, title, note):
    """Scatter of xy [N, 2] coloured by true action [N]; equivalent actions share a colour and a line of the legend."""
    figure, axes = plt.subplots(figsize=(11.5, 8), layout="constrained")
    scatter_latents(axes, xy, distinct[actions], float(np.clip(70_000 / len(xy), 6, 40)))
    counts = np.bincount(distinct[actions], minlength=common.NUM_ACTIONS)
    for a in np.argsort(-counts, kind="stable")[: (counts > 0).sum()]:
        others = [common.ACTIONS[b] for b in np.unique(actions) if distinct[b] == a and b != a]
        name = common.ACTIONS[a] + (f"\n(also {', '.join(others)})" if others else "")
        share = f"{counts[a] / len(actions):.0%}" if counts[a] >= 0.01 * len(actions) else "<1%"
        axes.scatter([], [], color=common.ACTION_COLORS[a], s=80, label=f"{share}  {name}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=13, title="true action", title_fontsize=14)
    axes.set_title(title, fontsize=17)
    axes.set_xlabel(note, fontsize=12.5)
    save_figure(figure, path)


def plot_pinned_frames(path, xy, actions, windows, rows, title):
    """The scatter of xy [N, 2] by action [N], with o_t and o_{t+1} of at most 12 `rows` pinned to it.

    windows uint8 [N, k + 2, S, S, 3]. Pins are numbered in the order of `rows` and named by their own true action.
    """
    figure = plt.figure(figsize=(15, 12))
    axes = figure.add_axes((0.2, 0.18, 0.6, 0.58))
    scatter_latents(axes, xy, actions, float(np.clip(70_000 / len(xy), 6, 40)))
    along, side = np.linspace(-0.18, 1.18, 4), (0.28, 0.72)
    slots = np.array([(x, y) for y in (-0.16, 1.16) for x in along] + [(x, y) for x in (-0.18, 1.18) for y in side])
    at = (xy[rows] - xy.min(0)) / np.ptp(xy, axis=0)
    pins, chosen = linear_sum_assignment(np.linalg.norm(at[:, None] - slots, axis=-1))  # of least total length: no two lines cross
    for pin, slot in zip(pins, slots[chosen]):
        row, color = rows[pin], common.ACTION_COLORS[actions[rows[pin]]]
        pair = np.concatenate([windows[row, -2], np.full_like(windows[row, -1, :, :1], 255), windows[row, -1]], 1)
        picture = OffsetImage(pair, zoom=84 / len(pair), interpolation="nearest")
        text = TextArea(f"{pin + 1}: {common.ACTIONS[actions[row]]}", textprops=dict(size=14))
        axes.add_artist(AnnotationBbox(
            VPacker(children=[text, picture], align="center", pad=0, sep=4), xy[row], slot, boxcoords="axes fraction",
            arrowprops=dict(arrowstyle="-", color="#444444", linewidth=1), bboxprops=dict(edgecolor=color, linewidth=3),
        ))  # fmt: skip
        axes.plot(*xy[row], "o", markersize=9, markerfacecolor=color, markeredgecolor="black", markeredgewidth=1.5)
    figure.suptitle(title, fontsize=16)
    save_figure(figure, path)


def plot_film(path, frames, names, title):
    """One row of frames a latent action: frames uint8 [M, T, S, S, 3], names [M]."""
    m, t, side = frames.shape[:3]
    gap = max(1, side // 16)
    cell = side + gap
    sheet = np.pad(frames, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    figure, axes = plt.subplots(figsize=(t + 2.4, m + 1.3), layout="constrained")
    axes.imshow(sheet.transpose(0, 2, 1, 3, 4).reshape(m * cell, t * cell, 3), interpolation="nearest")
    axes.set_xticks(np.arange(t) * cell + side / 2, ["$o_t$", *(f"+{step}" for step in range(1, t))], fontsize=15)
    axes.set_yticks(np.arange(m) * cell + side / 2, names, fontsize=13)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=16)
    save_figure(figure, path)


def save_film_gif(path, frames, names, title, columns=4, frames_per_second=5):
    """The same film moving, again and again: frames uint8 [M, T, S, S, 3], names [M]."""
    rows, last = -(-len(frames) // columns), frames.shape[1] - 1
    size = (2.3 * columns, 2.75 * rows + 0.9)  # inches
    figure, axes = plt.subplots(rows, columns, figsize=size, dpi=80, layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    images = [ax.imshow(film[0], interpolation="nearest") for ax, film in zip(axes.flat, frames)]
    for ax, name in zip(axes.flat, names):
        ax.set_title(name, fontsize=13)
    pictures = []
    for step in range(last + 1):
        figure.suptitle(f"{title}\nstep {step} of {last}", fontsize=14)
        for image, film in zip(images, frames):
            image.set_data(film[step])
        figure.canvas.draw()
        pictures.append(Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert("RGB"))
    plt.close(figure)
    with common.atomic_write(path) as temporary:
        duration = 1000 // frames_per_second  # ms
        pictures[0].save(temporary, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)


@torch.no_grad()
def plot_fdm(path, fdm, windows, z_q, mean_z_q, actions, device, game, num_windows=4, num_actions=6):
    """Held-out windows of the commonest actions: o_t, o_{t+1}, the FDM's guess, and o_t pushed by each action's mean latent.

    Of each action's windows the one is shown whose o_{t+1} differs from its o_t as much as the median of those in which
    anything changes. windows uint8 [N, k + 2, S, S, 3]; z_q (N, Z); mean_z_q (15, Z); actions int [N], equivalent ones merged.
    """
    counts = np.bincount(actions)
    shown = np.argsort(-counts, kind="stable")[: min(num_actions, (counts > 0).sum())]
    change = np.square(windows[:, -1].astype(np.float32) - windows[:, -2]).mean((1, 2, 3))
    rows = []
    for a in shown[:num_windows]:
        by_change = np.flatnonzero(actions == a)[np.argsort(change[actions == a], kind="stable")]
        still = np.searchsorted(change[by_change], 0, side="right")  # how many show no change at all
        rows.append(by_change[min((still + len(by_change)) // 2, len(by_change) - 1)])
    past, now = torch.from_numpy(windows[rows, :-1]).to(device), to_input(torch.from_numpy(windows[rows, -2:-1]))
    pushed = torch.stack([fdm(past, mean_z_q[[a] * len(rows)].to(device)).cpu() for a in shown])  # (A, R, 3, S, S)
    after = to_input(torch.from_numpy(windows[rows, -1:]))
    frames = torch.stack([now, after, fdm(past, z_q[rows].to(device)).cpu(), *pushed])  # (3 + A, R, 3, S, S)
    # what the FDM gets wrong is the same whatever it is told, so pushed frames are compared with each other
    changes = torch.cat([2 * (frames[:3] - now), 4 * (pushed - pushed.mean(0))])
    titles = ["now: $o_t$", "truly next: $o_{t+1}$", "FDM, given\nits own latent"]
    titles += [f"pushed by the\nmean “{common.ACTIONS[a]}”" for a in shown]

    size = (1.75 * len(titles) + 2, 3.5 * len(rows) + 1.9)  # inches
    figure, axes = plt.subplots(2 * len(rows), len(titles), figsize=size, layout="constrained")
    for column, title in enumerate(titles):
        axes[0, column].set_title(title, fontsize=13)
        for row in range(2 * len(rows)):
            ax, picture = axes[row, column], (frames, changes)[row % 2][column, row // 2]
            ax.imshow((picture + 0.5).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            taken = column - 3 == row // 2  # the action that was really taken
            ax.spines[:].set(color="#e0202c" if taken else "#bbbbbb", linewidth=4 if taken else 0.8)
    for row, a in enumerate(shown[:num_windows]):
        axes[2 * row, 0].set_ylabel(f"true action:\n{common.ACTIONS[a]}", fontsize=13)
        axes[2 * row + 1, 0].set_ylabel("change\nsince $o_t$ (×2)", fontsize=11)
        axes[2 * row + 1, 3].set_ylabel(f"against the mean\nof these {len(shown)} (×4)", fontsize=11)
    figure.suptitle(
        f"{game}: what the FDM makes of latent actions, on held-out windows. Right: the same frame pushed by the mean latent of\n"
        "each true action. Red: the action that was really taken; it should look like the true next frame. Grey: no difference.",
        fontsize=14,
    )  # fmt: skip
    save_figure(figure, path)


def print_summary(run, game, figures, errors):
    """One table of what all stages gave; what was not run is left out."""
    untrained, majority = figures["untrained_linear"], figures["majority"]
    error, shuffled = errors["true"] / errors["copy"], errors["shuffled"] / errors["copy"]
    rows = [
        ("true action from z, linear probe", figures["linear"][0], f"majority class {majority[0]:.2f}, untrained IDM {untrained[0]:.2f}"),
        ("  equivalent actions merged", figures["linear"][1], f"majority class {majority[1]:.2f}, untrained IDM {untrained[1]:.2f}"),
        ("FDM's error (1: as large as copying o_t)", error, f"with shuffled latents {shuffled:.2f}"),
    ]
    if (run / "decode_offline.npz").exists():
        keys = ("labels", "returns", "random_return", "expert_return")
        offline = common.load_npz(run / "decode_offline.npz", keys, f"python decode_offline.py --game {game}")
        bounds = f"random {offline['random_return']:.2f}, expert {offline['expert_return']:.2f}"
        for labels, returns in zip(offline["labels"], offline["returns"]):
            spread = f"± {returns.std():.2f} over {len(returns)} decoders"
            rows.append((f"return, decoded with {labels} labels", returns.mean(), f"{spread}; {bounds}"))
    for path in sorted(run.glob("decode_online_*.npz")):
        keys = ("env_steps", "returns", "random_return", "expert_return")
        online = common.load_npz(path, keys, f"python decode_online_ppo.py --game {game}")
        bounds = f"random {online['random_return']:.2f}, expert {online['expert_return']:.2f}"
        rows.append((f"return, {path.stem[14:]} after {online['env_steps'][-1]:,} steps online", online["returns"][-1], bounds))
    print(f"\n{run}, all on held-out episodes or new games")
    for name, figure, beside in rows:
        print(f"  {name:44}{figure:8.2f}   ({beside})")


def main(args):
    common.check_flags(args, zero=("supervised_steps",))
    device = common.pick_device(args.device)
    common.seed_everything(args.seed)
    data, run = args.data_dir / args.game, common.run_folder(args.runs_dir, args.game, args.vq)
    retrain = f"python train_latent_dynamics.py --game {args.game}"

    saved = common.load_checkpoint(run / "latent_dynamics.pt", "latent_dynamics", args.game, retrain)
    context, z_dim = saved["context"], saved["codebooks"] * saved["latents_per_codebook"] * saved["embedding_dim"]
    quantizer = NoQuantizer()
    if saved["vq"]:
        sizes = [saved[name] for name in ("codebooks", "latents_per_codebook", "embeddings", "embedding_dim")]
        quantizer = EMAVectorQuantizer(*sizes, decay=1.0)
    saved.fill(quantizer, "quantizer")
    fdm = FDM(saved["frame_size"], context, z_dim, saved["fdm_width"], saved["predict_change"])
    saved.fill(fdm, "fdm")
    fdm, quantizer = fdm.to(device, memory_format=torch.channels_last).eval(), quantizer.eval()

    z, codes, actions, windows = {}, {}, {}, {}
    for split in ("train", "test"):
        windows[split], where = common.fixed_windows(data / split, args.game, context, args.points, args.seed)
        if windows[split].shape[2] != saved["frame_size"]:
            common.fail(f"{run / 'latent_dynamics.pt'} was trained on another size of frames; make it anew with: {retrain}")
        parts = []
        for path, rows in where.items():
            shard_z, shard_codes, valid = common.read_latents(path, run / split, args.game, saved["fingerprint"])
            action = common.read_labels(path, args.game)["action"]
            if len(valid) != len(action) or not valid[rows].all():
                common.fail(f"{run / split} was made from other frames than lie in {data / split}; make it anew with: {retrain}")
            parts.append((shard_z[rows].astype(np.float32), shard_codes[rows], action[rows].astype(int)))
        z[split], codes[split], actions[split] = map(np.concatenate, zip(*parts))

    distinct = common.distinct_actions(args.game)
    if min(len(z["train"]), len(z["test"])) < 50 or min(len(np.unique(distinct[a])) for a in actions.values()) < 2:
        common.fail(f"{data} has too few windows or only one action; record more with: python collect_data.py --game {args.game}")
    print(f"{len(z['test']):,} held-out latents of {args.game} after {saved['grad_step']:,} updates of stage 1, on {device}")

    # probes and bounds: name -> probabilities of the 15 actions for each held-out window
    share = np.bincount(actions["train"], minlength=common.NUM_ACTIONS) / len(actions["train"])
    untrained = IDM(saved["frame_size"], context, saved["multiplier"], z_dim).to(device, memory_format=torch.channels_last)
    untrained_z = [in_batches(untrained, windows[split], device).numpy() for split in ("train", "test")]
    guesses = dict(
        majority=np.tile(share, (len(z["test"]), 1)),
        untrained_linear=probe(LogisticRegression(C=0.1, max_iter=1000), untrained_z[0], actions["train"], untrained_z[1]),
        linear=probe(LogisticRegression(C=0.1, max_iter=1000), z["train"], actions["train"], z["test"]),
        mlp=probe(MLPClassifier((256,), max_iter=30, random_state=args.seed), z["train"], actions["train"], z["test"]),
    )
    if args.supervised_steps:
        supervised = IDM(saved["frame_size"], context, saved["multiplier"], common.NUM_ACTIONS)
        supervised = supervised.to(device, memory_format=torch.channels_last)
        train_supervised_idm(supervised, data / "train", args.game, context, args.supervised_steps, device, args.seed)
        guesses["supervised"] = in_batches(supervised, windows["test"], device).softmax(-1).numpy()
    figures = {name: accuracies(guess, actions["test"], distinct) for name, guess in guesses.items()}
    merged = distinct[actions["test"]]
    (purity, chance), (merged_purity, merged_chance) = knn_purity(z["test"], actions["test"]), knn_purity(z["test"], merged)
    figures |= dict(knn_purity=(purity, merged_purity), knn_chance=(chance, merged_chance))
    figures["silhouette"] = tuple(float(silhouette_score(z["test"], labels)) for labels in (actions["test"], merged))
    if saved["vq"]:
        figures["perplexity"], figures["codes_used"] = codebook_use(codes["test"], saved["codebooks"], saved["embeddings"])

    # The mean latent of an action is the mean of z put through the quantiser, and not the mean of quantised latents: the
    # FDM was only ever told embeddings, and a mean of them lies between codes, where it was never trained. (Tried on CoinRun,
    # the two drive it equally well.)
    train_merged = distinct[actions["train"]]
    means = np.tile(z["train"].mean(0), (common.NUM_ACTIONS, 1))  # (15, Z); an action that never occurs keeps the mean of all
    for a in np.unique(train_merged):
        means[a] = z["train"][train_merged == a].mean(0)
    mean_z_q = quantizer(torch.from_numpy(means))[0]
    z_q = quantizer(torch.from_numpy(z["test"]))[0]  # (N, Z)
    errors = fdm_errors(fdm, windows["test"], z_q, mean_z_q[merged], device, args.seed)

    names = dict(
        majority="majority class", untrained_linear="linear probe of an untrained IDM's z", linear="linear probe of z",
        mlp="MLP probe of z", supervised=f"IDM trained on true actions, {args.supervised_steps:,} steps",
        knn_chance="10-NN purity of z, by chance", knn_purity="10-NN purity of z", silhouette="silhouette of z",
    )  # fmt: skip
    print(f"\n{'held-out true actions':44}{'all 15':>10}{'distinct':>10}  (the {len(set(distinct))} that differ in {args.game})")
    for name in filter(figures.get, names):
        print(f"{names[name]:44}{figures[name][0]:10.3f}{figures[name][1]:10.3f}")
    print(f"\n{'FDM, mean squared error by what it is told':44}{'error':>10}{'of copy':>10}")
    for name, error in errors.items():
        print(f"{name.replace('_', ' '):44}{error:10.5f}{error / errors['copy']:10.2f}")
    for book, (perplexity, used) in enumerate(zip(figures.get("perplexity", ()), figures.get("codes_used", ()))):
        print(f"codebook {book}: {used:.0%} of {saved['embeddings']} embeddings in use, perplexity {perplexity:.1f}")

    xy = project(z["test"], args.projection, args.seed)
    plot_latents(
        run / "latents.png", xy, actions["test"], distinct,
        f"{args.game}: {len(xy):,} held-out latent actions, {dict(umap='UMAP', tsne='t-SNE', pca='PCA')[args.projection]}",
        f"linear probe {figures['linear'][0]:.2f} (untrained IDM {figures['untrained_linear'][0]:.2f}, majority class "
        f"{figures['majority'][0]:.2f})\nequivalent actions merged: {figures['linear'][1]:.2f} "
        f"({figures['untrained_linear'][1]:.2f}, {figures['majority'][1]:.2f})",
    )  # fmt: skip
    plot_fdm(run / "fdm.png", fdm, windows["test"], z_q, mean_z_q, merged, device, args.game)

    rows, cluster = medoids(z_q.numpy(), 12, args.seed)
    plot_pinned_frames(
        run / "latents_frames.png", xy, merged, windows["test"], rows,
        f"{args.game}: {len(xy):,} held-out latent actions. Pinned: $o_t$ and $o_{{t+1}}$ of the one in the middle of\n"
        f"each of {len(rows)} clusters of what the FDM is told (k-means, largest first), with its true action.",
    )  # fmt: skip
    past = torch.from_numpy(windows["test"][rows[0], :-1]).to(device)  # the middle of the largest cluster: a common situation
    film = roll_forward(fdm, past.expand(len(rows), *past.shape), z_q[rows].to(device), steps=15).cpu().numpy()
    names = []
    for i in range(len(rows)):
        share = np.bincount(merged[cluster == i]) / (cluster == i).sum()
        names.append(f"{i + 1}: {(cluster == i).mean():.0%} of latents\n({share.max():.0%} {common.ACTIONS[share.argmax()]})")
    plot_film(
        run / "film.png", film, names,
        f"{args.game}: the FDM rolled forward from the same frame; in each row it is told one latent action all along, the one in the\n"
        "middle of a cluster (k-means). Beside it: the cluster's share of all held-out latents, and its commonest true action.",
    )  # fmt: skip
    save_film_gif(run / "film.gif", film, names, f"{args.game}: the FDM rolled forward, a panel for each latent action")
    figures |= {f"fdm_error_{name}": error for name, error in errors.items()}
    settings = {name: saved[name] for name in ("game", "vq", "frame_size", "start_level", "num_levels", "grad_step")}
    settings |= dict(projection=args.projection, seed=args.seed, supervised_steps=args.supervised_steps)
    common.save_npz(
        run / "latents.npz", xy=xy.astype(np.float32), action=actions["test"].astype(np.uint8),
        distinct_action=merged.astype(np.uint8), **figures, settings=json.dumps(settings),
    )  # fmt: skip
    print_summary(run, args.game, figures, errors)
    print(f"in {run}: latents.png, latents_frames.png, fdm.png, film.png and film.gif; figures in latents.npz")


if __name__ == "__main__":
    main(tyro.cli(Args))
