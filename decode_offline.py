"""Stage 3, offline: decode latent actions with a few labelled frames (paper, sections 4.3 and 6.2, Figure 4).

For each number of labels and each seed, an action decoder is fitted on (z_t of the IDM, true action), then plays on top of
the frozen latent policy. All decoders are fitted at once and play at once, sharing the policy's forward pass.

reads   runs/<game>/latent_policy.pt, runs/<game>/{train,test}/latents_NNN.npz, data/<game>/{train,test}/labels_NNN.npz
writes  runs/<game>/decode_offline.npz, runs/<game>/decode_offline.png

paper scale   python decode_offline.py --game bigfish
CPU sized     python decode_offline.py --game coinrun --labels 16 64 256 1024 --decoder-seeds 3 --episodes 32
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import functional_call, stack_module_state, vmap

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

    labels: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """Numbers of labelled frames (Figure 4)."""
    decoder_seeds: int = 5
    """Decoders for each number of labels; each seed draws its own frames (the paper has 3)."""
    decoder_steps: int = 500
    """Updates of each decoder; many more overfit a few hundred labels (results/LOG.md)."""
    decoder_batch_size: int = 128
    """Labelled frames an update."""
    decoder_lr: float = 1e-3
    """Adam's learning rate for the decoder (official code, online)."""
    label_smoothing: float = 0.05
    """Of the decoder's cross entropy (official code, online)."""
    episodes: int = 64
    """Episodes that each decoder plays."""
    envs_per_decoder: int = 8
    """Games that each decoder plays at once; each finishes its share of the episodes."""


# --- networks --------------------------------------------------------------------------------------------------------


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


class LatentPolicy(nn.Module):
    """pi(o_t) -> z_t: an IMPALA-CNN that imitates the latent actions (3,681,920 parameters at paper settings)."""

    def __init__(self, frame_size, multiplier, z_dim):
        super().__init__()
        self.cnn = ImpalaCNN(3, frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.head = nn.Linear(256, z_dim)

    def forward(self, obs):
        """uint8 (B, S, S, 3) -> z (B, Z)"""
        return self.head(F.relu(self.hidden(self.cnn(to_input(obs[:, None])))))


class ActionDecoder(nn.Module):
    """Latent action -> logits of the true actions; hidden layers of 192, 128, 64 (official code)."""

    def __init__(self, z_dim):
        super().__init__()
        sizes = (z_dim, 192, 128, 64)
        layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(64, common.NUM_ACTIONS))
        self.register_buffer("mean", torch.zeros(z_dim))  # z is standardised with the statistics of the latents it was fitted on
        self.register_buffer("std", torch.ones(z_dim))

    def forward(self, z):
        """z (B, Z) -> logits (B, 15)"""
        return self.layers((z - self.mean) / self.std)


# --- decoders, many at once ------------------------------------------------------------------------------------------


class DecoderBank:
    """D action decoders with their weights stacked, so that one call runs them all: z (D, B, Z) -> logits (D, B, 15)."""

    def __init__(self, decoders):
        self.parameters, self.buffers = stack_module_state(decoders)
        self.apply = vmap(lambda parameters, buffers, z: functional_call(decoders[0], (parameters, buffers), (z,)))

    def __call__(self, z):
        return self.apply(self.parameters, self.buffers, z)


def fit_decoders(bank, z, actions, num_labels, steps, batch_size, lr, label_smoothing, generator):
    """Fits decoder d on its first num_labels[d] rows of z (D, N, Z) and actions (D, N), all decoders in step.

    The sum of the decoders' losses keeps them apart: no weight of one enters the loss of another, and Adam works weight
    by weight.
    """
    optimizer = torch.optim.Adam(bank.parameters.values(), lr=lr)
    which = torch.arange(len(z), device=z.device)[:, None]
    for _ in common.track(range(steps), "step", "fit decoders"):
        rows = (torch.rand(len(z), batch_size, device=z.device, generator=generator) * num_labels[:, None]).long()
        logits = bank(z[which, rows])  # (D, B, 15)
        loss = F.cross_entropy(logits.flatten(0, 1), actions[which, rows].flatten(), label_smoothing=label_smoothing) * len(z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def sample_actions(logits, generator):
    """logits (B, A) -> actions int64 (B,), drawn from the softmax."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def load_labelled(split_dir, latents_dir, game, count, seed, max_shards=16):
    """`count` valid rows of a split, in random order: z float32 [n, Z], action int64 [n].

    From at most `max_shards` shards spread over the split, so that a small sweep does not read every latent there is.
    """
    paths = common.list_shards(split_dir, "labels", f"python collect_data.py --game {game}")
    paths = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, max_shards).astype(int))]
    z, actions = [], []
    for path in paths:
        shard_z, _, valid = common.read_latents(path, latents_dir, game)
        z.append(shard_z[valid])
        actions.append(common.read_labels(path, game)["action"][valid])
    order = np.random.default_rng(seed).permutation(sum(map(len, z)))[:count]
    return np.concatenate(z)[order].astype(np.float32), np.concatenate(actions)[order].astype(np.int64)


def plot(path, game, labels, returns, random_return, expert_return):
    """Figure 4 for one game: returns float [L, seeds] against labels int [L]."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    mean, std = returns.mean(1), returns.std(1)
    axes.plot(labels, mean, "o-", label=f"LAPO, mean and std of {returns.shape[1]} decoders")
    axes.fill_between(labels, mean - std, mean + std, alpha=0.2)
    axes.axhline(expert_return, color="black", linestyle="--", label=f"expert ({expert_return:.2f})")
    axes.axhline(random_return, color="gray", linestyle=":", label=f"random policy ({random_return:.2f})")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="labelled frames", ylabel="mean episodic return", title=f"{game}: latent policy decoded offline")
    axes.legend(loc="lower right")
    with common.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def main(args):
    common.check_game(args.game)
    device = common.pick_device(args.device)
    common.seed_everything(args.seed)
    data, run = args.data_dir / args.game, args.runs_dir / args.game
    made_by = f"python train_latent_bc.py --game {args.game}"
    checkpoint = common.load_checkpoint(run / "latent_policy.pt", "latent_policy", args.game, made_by)
    policy = LatentPolicy(checkpoint["frame_size"], checkpoint["multiplier"], checkpoint["z_dim"])
    policy.load_state_dict(checkpoint["model"])
    policy = policy.to(device, memory_format=torch.channels_last).eval()

    # each seed draws its own labelled frames; a larger number of labels contains the smaller ones
    most = max(args.labels)
    drawn = [load_labelled(data / "train", run / "train", args.game, most, args.seed + s) for s in range(args.decoder_seeds)]
    if len(drawn[0][0]) < most:
        common.fail(f"{data / 'train'} has {len(drawn[0][0])} usable labels in the shards drawn from, fewer than --labels {most}")
    z, actions = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*drawn))  # (seeds, N, Z), (seeds, N)
    test_z, test_actions = load_labelled(data / "test", run / "test", args.game, 4096, args.seed)
    random_return = common.random_return(args.game, args.seed, checkpoint["start_level"], checkpoint["num_levels"])
    shard = common.list_shards(data / "train", "labels", f"python collect_data.py --game {args.game}")[0]
    expert_return = float(common.read_labels(shard, args.game)["expert_return"])

    decoders = [ActionDecoder(checkpoint["z_dim"]) for _ in range(len(args.labels) * args.decoder_seeds)]
    for decoder in decoders:  # latents need no labels, so their statistics come from more than the N labelled ones
        decoder.mean.copy_(z.flatten(0, 1).mean(0)), decoder.std.copy_(z.flatten(0, 1).std(0) + 1e-6)
    bank = DecoderBank([decoder.to(device) for decoder in decoders])
    num_envs = len(decoders) * args.envs_per_decoder
    quota = -(-args.episodes // args.envs_per_decoder)
    print(
        f"stage 3, offline: {len(args.labels)} numbers of labels x {args.decoder_seeds} seeds on {device}, "
        f"then {quota * args.envs_per_decoder} episodes of {args.game} each in {num_envs} games at once"
    )
    generator = torch.Generator(device).manual_seed(args.seed)
    num_labels = torch.tensor(args.labels, device=device).repeat_interleave(args.decoder_seeds)  # (D,)
    z, actions = z.repeat(len(args.labels), 1, 1), actions.repeat(len(args.labels), 1)  # (D, N, Z), (D, N)
    fit_decoders(
        bank, z, actions, num_labels, args.decoder_steps, args.decoder_batch_size, args.decoder_lr, args.label_smoothing, generator
    )  # fmt: skip

    def act(obs):
        latents = policy(torch.from_numpy(obs).to(device))  # (D * envs_per_decoder, Z)
        logits = bank(latents.view(len(decoders), args.envs_per_decoder, -1))
        return sample_actions(logits.flatten(0, 1), generator).cpu()

    envs = common.ProcgenEnvs(
        args.game, num_envs, common.derive_seed(args.seed, "decode offline"),
        checkpoint["start_level"], checkpoint["num_levels"], checkpoint["frame_size"],
    )  # fmt: skip
    returns = common.evaluate(envs, act, quota).reshape(len(args.labels), args.decoder_seeds, -1).mean(-1)  # (L, seeds)
    with torch.no_grad():
        predicted = bank(torch.from_numpy(test_z).to(device).expand(len(decoders), -1, -1)).argmax(-1).cpu().numpy()
    accuracy = (predicted == test_actions).mean(-1).reshape(len(args.labels), args.decoder_seeds)

    print(f"{'labels':>8} {'return':>15} {'normalised':>11} {'held-out accuracy':>18}")
    for count, of_count, correct in zip(args.labels, returns, accuracy):
        normalized = common.normalize_return(of_count.mean(), random_return, expert_return)
        print(f"{count:>8} {of_count.mean():>8.2f} ± {of_count.std():<4.2f} {normalized:>11.2f} {correct.mean():>18.3f}")
    print(f"random policy {random_return:.2f}, expert {expert_return:.2f}")
    common.save_npz(
        run / "decode_offline.npz", labels=np.array(args.labels), returns=returns, accuracy=accuracy,
        random_return=random_return, expert_return=expert_return, settings=json.dumps(asdict(args), default=str),
    )  # fmt: skip
    plot(run / "decode_offline.png", args.game, args.labels, returns, random_return, expert_return)
    print(f"results: {run / 'decode_offline.npz'} and .png\nnext: python decode_online_ppo.py --game {args.game}")


if __name__ == "__main__":
    main(tyro.cli(Args))
