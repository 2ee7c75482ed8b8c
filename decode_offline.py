"""Stage 3, offline: decode latent actions with a few labelled frames (paper, 4.3, 6.2, Figure 4).

For each number of labels N and each seed, an action decoder is fitted on N pairs of the IDM's z_t
and the true action, and plays on top of the frozen latent policy: action = decoder(policy(o_t)).
Beside them plays a blind policy, the control: it draws actions with the expert's frequencies.

reads   runs/<game>/latent_policy.pt, {train,test}/latents_NNN.npz,
        data/<game>/{train,test}/frames_NNN.npz, labels_NNN.npz
writes  runs/<game>/decode_offline.npz, decode_offline.png

paper scale   python decode_offline.py --game bigfish
on a CPU      python decode_offline.py --game miner --labels 16 64 256 1024 --decoder-seeds 3
"""

from dataclasses import asdict, dataclass

import common  # before torch
import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Args(common.RunArgs):
    labels: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """Numbers of labelled frames, N (Figure 4)."""
    decoder_seeds: int = 5
    """Decoders for each N, each with frames of its own (the paper: 3 seeds)."""
    decoder_steps: int = 500
    """Updates of a decoder; many more overfit a few hundred labels (results/LOG.md)."""
    decoder_batch_size: int = 128
    """Labelled frames per update."""
    decoder_lr: float = 1e-3
    """Learning rate of Adam for the decoder (official code, online)."""
    label_smoothing: float = 0.05
    """Of the decoder's cross entropy (official code, online)."""
    episodes: int = 64
    """Episodes that each decoder plays."""
    envs_per_decoder: int = 8
    """Games that each decoder plays at once; each game has an equal quota of its episodes."""


# --- networks -------------------------------------------------------------------------------------
# Copies of train_latent_dynamics.py and train_latent_bc.py; tests/test_copies.py keeps them equal.


class ResidualBlock(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))  # (B, C, S, S)


class ImpalaCNN(nn.Sequential):
    """IMPALA's CNN (Espeholt et al. 2018): (B, C, S, S) -> (B, 32 * multiplier * (S / 8)^2)"""

    def __init__(self, in_channels, frame_size, multiplier):
        layers = []
        for channels in (int(16 * multiplier), int(32 * multiplier), int(32 * multiplier)):
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.MaxPool2d(3, 2, 1)]
            layers += [ResidualBlock(channels, channels), ResidualBlock(channels, channels)]
            in_channels = channels
        super().__init__(*layers, nn.ReLU(), nn.Flatten())
        self.num_features = channels * (frame_size // 8) ** 2


class LatentPolicy(nn.Module):
    """pi(o_t) -> z_t (3,681,920 parameters at the paper's sizes)."""

    def __init__(self, frame_size, multiplier, z_dim):
        super().__init__()
        self.cnn = ImpalaCNN(3, frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.head = nn.Linear(256, z_dim)
        self.register_buffer("mean", torch.zeros(z_dim))  # of z, for --standardize
        self.register_buffer("std", torch.ones(z_dim))

    def features(self, obs):
        """uint8 (B, S, S, 3) -> the convolutions' output (B, F)"""
        return self.cnn(common.to_input(obs[:, None]))

    def latent(self, features):
        """(B, F) -> z (B, Z)"""
        return self.mean + self.std * self.head(F.relu(self.hidden(features)))

    def forward(self, obs):
        """uint8 (B, S, S, 3) -> z (B, Z)"""
        return self.latent(self.features(obs))


class ActionDecoder(nn.Module):
    """Latent action -> logits of true actions; hidden layers of 192, 128, 64 (official code)."""

    def __init__(self, z_dim):
        super().__init__()
        layers, sizes = [], (z_dim, 192, 128, 64)
        for i, o in zip(sizes, sizes[1:]):
            layers += [nn.Linear(i, o), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(64, common.NUM_ACTIONS))
        self.register_buffer("mean", torch.zeros(z_dim))  # z is standardized (not in official code)
        self.register_buffer("std", torch.ones(z_dim))

    def forward(self, z):
        """z (B, Z) -> logits (B, 15)"""
        return self.layers((z - self.mean) / self.std)


# --- decoding -------------------------------------------------------------------------------------


def fit_decoder(decoder, z, actions, args, generator):
    """Fits a decoder on z (N, Z) and true actions int64 (N,)."""
    optimizer = torch.optim.Adam(decoder.parameters(), lr=args.decoder_lr)
    for _ in range(args.decoder_steps):
        rows = torch.randint(len(z), (args.decoder_batch_size,), generator=generator)
        logits = decoder(z[rows])
        loss = F.cross_entropy(logits, actions[rows], label_smoothing=args.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def sample_actions(logits, generator):
    """logits (B, A) -> actions int64 (B,), drawn from the softmax."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def labelled_shards(frames_dir, at_most=16):
    """Paths of shards from all over the folder, whose rows can be labelled."""
    paths = common.list_shards(frames_dir)
    return [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, at_most).astype(int))]


def load_labelled(frames_dir, latents_dir, dynamics):
    """z float32 (n, Z) and true actions int64 (n,) of all valid rows of labelled_shards()."""
    z, actions = [], []
    for path in labelled_shards(frames_dir):
        shard_z, valid = common.read_latents(path, latents_dir, dynamics)
        z.append(shard_z[valid])
        actions.append(common.read_actions(path)[valid])
    z, actions = np.concatenate(z), np.concatenate(actions)
    return torch.from_numpy(z).float(), torch.from_numpy(actions).long()


def plot(path, title, xlabel, curves, references):
    """Figures 3 and 4 of one game: curves {name: (x [L], returns [L, seeds])}, references {name:
    return}.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    for color, (name, (x, returns)) in enumerate(curves.items()):
        mean, std = returns.mean(1), returns.std(1, ddof=min(1, returns.shape[1] - 1))
        axes.plot(x, mean, ".-", color=f"C{color}", label=name)
        axes.fill_between(x, mean - std, mean + std, color=f"C{color}", alpha=0.2, linewidth=0)
    for (name, value), style in zip(references.items(), ("--", ":", "-.")):
        axes.axhline(value, color="black", linestyle=style, label=f"{name} ({value:.2f})")
    axes.set(xlabel=xlabel, ylabel="mean episodic return", title=title)
    if xlabel == "labelled frames":
        axes.set_xscale("log", base=2)
    else:
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    with common.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def main(args):
    device = common.pick_device(args.device)
    common.check_game(args.game)
    torch.manual_seed(args.seed)
    if min(args.labels) < 1:
        common.fail(f"--labels {min(args.labels)}: a decoder needs at least one")
    data, run = args.data_dir / args.game, args.runs_dir / args.game
    checkpoint = common.load_checkpoint(run / "latent_policy.pt", "latent_policy", args.game)
    z_dim, settings = checkpoint["z_dim"], checkpoint["settings"]
    policy = LatentPolicy(checkpoint["frame_size"], checkpoint["multiplier"], z_dim)
    policy.load_state_dict(checkpoint["policy"])
    policy.to(device, memory_format=torch.channels_last).eval()
    stamp = checkpoint["dynamics"]
    random_return, expert_return = settings["random_return"], settings["expert_return"]
    results, kept = run / "decode_offline.npz", {}
    saved = settings | asdict(args) | dict(labels=[*args.labels], dynamics=stamp)
    if results.exists():  # what baselines/label_efficiency.py added to results of this run stays
        old = common.load_npz(results)
        was = old.pop("settings")
        if all(was.get(name) == saved[name] for name in ("labels", "seed", "dynamics")):
            kept, saved = old, was | saved

    # --- data: labelled rows, and held-out frames o_t, z_t and true actions
    z, actions = load_labelled(data / "train", run / "train", stamp)
    if len(z) < max(args.labels):
        common.fail(f"{data / 'train'} has {len(z)} labelled rows, fewer than {max(args.labels)}")
    frequencies = np.bincount(actions, minlength=common.NUM_ACTIONS) / len(actions)
    test = common.FrameStore(args, "test", checkpoint["context"], device, stamp)
    rows = test.draw(4096)
    test_z, test_actions = test.z_at(rows), common.true_actions_to_report_on(test, rows)
    if test_actions is None:
        common.fail(f"{test.folder} lacks labels_NNN.npz, on which decoders are judged")
    with torch.no_grad():
        predicted_z = torch.cat([policy(obs) for obs in test.frames_at(rows).split(512)])

    # --- a decoder for each number of labels and each seed; more labels contain the fewer ones
    print(
        f"stage 3, offline: {len(args.labels)} x {args.decoder_seeds} decoders of {args.game} on "
        f"{device}, {args.episodes} episodes each"
    )
    distinct = torch.from_numpy(common.distinct_actions(args.game)).to(device)
    shape, decoders = (len(args.labels), args.decoder_seeds), []
    accuracy, policy_accuracy = np.zeros(shape), np.zeros(shape)
    for i, seed in np.ndindex(shape):
        generator = torch.Generator().manual_seed(common.derive_seed(args.seed, f"labels {seed}"))
        rows = torch.randperm(len(z), generator=generator)[: args.labels[i]]
        decoder = ActionDecoder(z_dim)
        decoder.mean.copy_(z.mean(0))  # latents need no labels, so the statistics are of all rows
        decoder.std.copy_(z.std(0) + 1e-6)
        decoder.to(device)
        fit_decoder(decoder, z[rows].to(device), actions[rows].to(device), args, generator)
        decoders.append(decoder)
        with torch.no_grad():
            for result, latents in ((accuracy, test_z), (policy_accuracy, predicted_z)):
                guesses = distinct[decoder(latents).argmax(1)].cpu().numpy()
                result[i, seed] = (guesses == test_actions).mean()

    # --- play: all decoders share one vectorized environment and the policy's forward pass
    generator = torch.Generator(device).manual_seed(args.seed)
    rng, quota = np.random.default_rng(args.seed), -(-args.episodes // args.envs_per_decoder)

    def act(obs):
        latents = policy(torch.from_numpy(obs).to(device)).chunk(len(decoders))
        logits = torch.cat([decoder(part) for decoder, part in zip(decoders, latents)])
        return sample_actions(logits, generator).cpu().numpy()

    def act_blindly(obs):
        return rng.choice(common.NUM_ACTIONS, size=len(obs), p=frequencies)

    num_envs = len(decoders) * args.envs_per_decoder
    env_seed = common.derive_seed(args.seed, "decode offline")
    envs = common.ProcgenEnvs(settings, num_envs, env_seed)
    returns = common.evaluate(envs, act, quota).reshape(*shape, -1).mean(-1)
    envs = common.ProcgenEnvs(settings, 64, env_seed)
    blind_return = common.evaluate(envs, act_blindly, 4).mean()

    # --- save first, then print
    common.save_npz(
        results, saved, **kept | dict(
            labels=np.array(args.labels), returns=returns, accuracy=accuracy,
            policy_accuracy=policy_accuracy, blind_return=blind_return,
            random_return=random_return, expert_return=expert_return,
        ),
    )  # fmt: skip
    references = {"expert": expert_return, "random policy": random_return}
    references["blind policy"] = blind_return
    title = f"{args.game}, decoded offline: mean and std of {args.decoder_seeds} decoders"
    curves = {"LAPO: decoder on the latent policy": (args.labels, returns)}
    plot(run / "decode_offline.png", title, "labelled frames", curves, references)
    print("  labels     return          normalized  accuracy from z  accuracy from o_t")
    for i, count in enumerate(args.labels):
        mean, std = returns[i].mean(), returns[i].std(ddof=min(1, args.decoder_seeds - 1))
        normalized = common.normalize_return(mean, random_return, expert_return)
        print(
            f"{count:8} {mean:10.2f} +- {std:5.2f} {normalized:11.2f} {accuracy[i].mean():16.3f} "
            f"{policy_accuracy[i].mean():18.3f}"
        )
    print(", ".join(f"{name} {value:.2f}" for name, value in references.items()))
    print(f"results: {results} and .png")
    common.print_next(f"decode_online_ppo.py --game {args.game}", args)


if __name__ == "__main__":
    main(tyro.cli(Args))
