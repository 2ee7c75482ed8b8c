"""Stage 3, offline: decode latent actions with a few labelled frames (paper, 4.3, 6.2, Figure 4).

For each number of labels N and each seed, an action decoder is fitted on N pairs of the IDM's z_t
and the true action, and plays on top of the frozen latent policy: action = decoder(policy(o_t)).
A control plays beside them, the blind policy: it draws actions with the expert's frequencies.

reads   runs/<game>/latent_policy.pt, {train,test}/latents_NNN.npz,
        data/<game>/{train,test}/frames_NNN.npz, labels_NNN.npz
writes  runs/<game>/decode_offline.npz, .png, .pt (the first decoder for each N), .gif

paper scale   python decode_offline.py --game bigfish
on a CPU      python decode_offline.py --game miner --labels 16 64 256 1024 --decoder-seeds 3
"""

from dataclasses import dataclass

import common  # before torch
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

TEST_FRAMES = 4096  # held-out frames on which decoders are judged
BLIND_POLICIES = 4  # the blind policy plays as many episodes as four decoders


@dataclass
class Args(common.RunArgs):
    labels: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """Numbers of labelled frames, N (Figure 4)."""
    decoder_seeds: int = 5
    """Decoders for each N, each with frames of its own (the paper: 3 seeds)."""
    decoder_steps: int = 500
    """Updates of a decoder; many more overfit a few hundred labels (docs/lessons.md)."""
    decoder_batch_size: int = 128
    """Labelled frames per update."""
    decoder_lr: float = 1e-3
    """Learning rate of Adam for the decoder (official code, online)."""
    label_smoothing: float = 0.05
    """Of the decoder's cross entropy (official code, online)."""
    episodes: int = 64
    """Episodes that each decoder plays."""
    envs_per_decoder: int = 8
    """Games that each decoder plays at once; each has an equal quota of --episodes, rounded up."""
    capture_video: bool = False
    """Write an animation (.gif) of the agent in eight games."""


# --- networks -------------------------------------------------------------------------------------
# Copies of train_latent_dynamics.py and train_latent_bc.py; tests/test_copies.py keeps them equal.


class ResidualBlock(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x):
        h = self.conv1(F.relu(x))  # (B, hidden, S, S)
        return x + self.conv2(F.relu(h))  # (B, C, S, S)


class ImpalaCNN(nn.Sequential):
    """IMPALA's CNN (Espeholt et al. 2018): (B, C, S, S) -> (B, 32 * multiplier * (S / 8)^2)"""

    def __init__(self, in_channels, frame_size, multiplier):
        layers = []
        for base_channels in (16, 32, 32):
            channels = int(base_channels * multiplier)
            layers += [
                nn.Conv2d(in_channels, channels, 3, padding=1),
                nn.MaxPool2d(3, 2, 1),
                ResidualBlock(channels, channels),
                ResidualBlock(channels, channels),
            ]
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
        """uint8 (B, S, S, 3) -> the convolutions' output (B, F), which stage 3 keeps frozen"""
        return self.cnn(common.to_input(obs[:, None]))

    def latent(self, features):
        """(B, F) -> z (B, Z)"""
        h = F.relu(self.hidden(features))  # (B, 256)
        return self.mean + self.std * self.head(h)

    def forward(self, obs):
        """uint8 (B, S, S, 3) -> z (B, Z)"""
        return self.latent(self.features(obs))


class ActionDecoder(nn.Module):
    """Latent action -> logits of true actions; hidden layers of 192, 128, 64 (official code)."""

    def __init__(self, z_dim):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(z_dim, 192),
            nn.ReLU(),
            nn.Linear(192, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, common.NUM_ACTIONS),
        )
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


def load_policy(run, game, device):
    """The content of latent_policy.pt, and its policy, frozen."""
    checkpoint = common.load_checkpoint(run / "latent_policy.pt", "latent_policy", game)
    policy = LatentPolicy(**checkpoint["config"])
    policy.load_state_dict(checkpoint["policy"])
    policy.to(device, memory_format=torch.channels_last).eval()
    return checkpoint, policy.requires_grad_(False)


def load_labelled(args, context, device, dynamics_id):
    """Frames whose labels can be used: a FrameStore, the z_t (N, Z) and true actions int64 (N,) of
    what it has in memory.
    """
    train = common.FrameStore(args, "train", context, device, dynamics_id)
    most = max(args.labels)
    if len(train.rows) < most:
        common.fail(f"{len(train.rows)} labelled rows of {train.folder} are in memory, not {most}")
    actions = common.true_actions(train, train.rows)
    return train, train.z_at(train.rows), torch.from_numpy(actions).long()


def draw_labels(num_rows, count, args, number):
    """The rows that decoder `number` has labels of, int64 (count,); a smaller count gives a prefix
    of the same rows.
    """
    generator = torch.Generator().manual_seed(common.derive_seed(args.seed, f"labels {number}"))
    return torch.randperm(num_rows, generator=generator)[:count]


def load_held_out(args, context, device, dynamics_id):
    """o_t uint8 (N, S, S, 3), z_t (N, Z) and distinct true actions int64 (N,) of test frames."""
    test = common.FrameStore(args, "test", context, device, dynamics_id)
    rows = test.draw(TEST_FRAMES)
    actions = common.distinct_actions(args.game)[common.true_actions(test, rows)]
    return test.frames_at(rows), test.z_at(rows), torch.from_numpy(actions).to(device)


def judge(logits, true_actions, game):
    """Accuracy [D] of D logits (N, 15) on actions (N,), those of equal effect merged."""
    distinct = torch.from_numpy(common.distinct_actions(game)).to(true_actions.device)
    guesses = distinct[torch.stack(logits).argmax(-1)]  # (D, N)
    return (guesses == true_actions).float().mean(1).cpu().numpy()


def fit_decoders(z, actions, args, device):
    """--decoder-seeds decoders for each number of labels, in this order."""
    mean = z.mean(0)  # of all rows, as latents need no labels
    std = z.std(0) + 1e-6
    decoders = []
    for count in args.labels:
        for number in range(args.decoder_seeds):
            fit_seed = common.derive_seed(args.seed, f"fit {count} {number}")
            generator = torch.Generator().manual_seed(fit_seed)
            torch.manual_seed(fit_seed)  # of the decoder's first weights
            rows = draw_labels(len(z), count, args, number)
            decoder = ActionDecoder(z.shape[1])
            decoder.mean.copy_(mean)
            decoder.std.copy_(std)
            decoder.to(device)
            fit_decoder(decoder, z[rows].to(device), actions[rows].to(device), args, generator)
            decoders.append(decoder.requires_grad_(False))
    return decoders


def play(compute_logits, num_policies, recording, args, device):
    """Mean returns [num_policies]. compute_logits: frames uint8 (num_policies * n, S, S, 3) ->
    logits (num_policies * n, 15), of which policy i computes the i-th part for its own n games.
    """
    act = common.make_player(
        compute_logits, device, common.derive_seed(args.seed, "sample actions")
    )
    seed = common.derive_seed(args.seed, "decode offline")
    envs = common.ProcgenEnvs(recording, num_policies * args.envs_per_decoder, seed)
    quota = -(-args.episodes // args.envs_per_decoder)
    return common.play_episodes(envs, act, quota).reshape(num_policies, -1).mean(1)


def main(args):
    device = common.pick_device(args)
    common.check_game(args.game)
    torch.manual_seed(args.seed)
    run = args.runs_dir / args.game
    output = run / "decode_offline.npz"
    checkpoint, policy = load_policy(run, args.game, device)
    recording = checkpoint["recording"]
    dynamics_id = checkpoint["dynamics_id"]
    common.lock(output)

    # --- data: labelled rows, and held-out frames
    context = checkpoint["context"]
    train, z, actions = load_labelled(args, context, device, dynamics_id)
    del train  # its frames are not needed
    test_obs, test_z, test_actions = load_held_out(args, context, device, dynamics_id)
    print(
        f"stage 3, offline: {len(args.labels)} x {args.decoder_seeds} decoders of {args.game} on "
        f"{device}, {args.episodes} episodes each"
    )

    # --- fit, and judge on held-out frames: decoder(z_t), decoder(policy(o_t))
    decoders = fit_decoders(z, actions, args, device)
    shape = (len(args.labels), args.decoder_seeds)
    predicted_z = torch.cat([policy(obs) for obs in test_obs.split(512)])
    accuracy = judge([decoder(test_z) for decoder in decoders], test_actions, args.game)
    policy_accuracy = judge([decoder(predicted_z) for decoder in decoders], test_actions, args.game)

    # --- play: the policy's forward pass is shared, then each decoder has its own games
    def compute_logits(obs):
        parts = policy(obs).chunk(len(decoders))
        return torch.cat([decoder(part) for decoder, part in zip(decoders, parts)])

    returns = play(compute_logits, len(decoders), recording, args, device)

    # --- the blind policy: the expert's frequencies of actions, whatever the frame
    frequencies = torch.bincount(actions, minlength=common.NUM_ACTIONS) / len(actions)
    blind_logits = frequencies.log().to(device)  # (15,)

    def compute_blind_logits(obs):
        return blind_logits.expand(len(obs), -1)

    blind_returns = play(compute_blind_logits, BLIND_POLICIES, recording, args, device)
    results = dict(
        labels=np.array(args.labels),
        returns=returns.reshape(shape),
        accuracy=accuracy.reshape(shape),
        policy_accuracy=policy_accuracy.reshape(shape),
        blind_return=blind_returns.mean(),
        random_return=recording["random_return"],
        expert_return=recording["expert_return"],
    )

    # --- save, then print
    settings = dict(recording=recording, args=vars(args), dynamics_id=dynamics_id)
    common.save_npz(output, settings, **results)
    common.save_checkpoint(
        run / "decode_offline.pt",
        kind="decode_offline",
        game=args.game,
        recording=recording,
        dynamics_id=dynamics_id,
        labels=list(args.labels),
        decoders=[decoder.state_dict() for decoder in decoders[:: args.decoder_seeds]],
    )
    references = {name: results[f"{name}_return"] for name in ("expert", "random", "blind")}
    common.plot_returns(
        run / "decode_offline.png",
        title=f"{args.game}, decoded offline: mean and std of {args.decoder_seeds} decoders",
        xlabel="labelled frames",
        curves={"LAPO: decoder on the latent policy": (args.labels, results["returns"])},
        references=references,
    )
    if args.capture_video:
        decoder = decoders[-args.decoder_seeds]  # the first one of the last number of labels
        act = common.make_player(lambda obs: decoder(policy(obs)), device, args.seed)
        common.capture_video(run / "decode_offline.gif", recording, act, args.seed)
    print("  labels     return          normalized  accuracy from z  accuracy from o_t")
    for i, count in enumerate(args.labels):
        mean = results["returns"][i].mean()
        std = results["returns"][i].std(ddof=min(1, args.decoder_seeds - 1))
        normalized = common.normalize_return(mean, references["random"], references["expert"])
        print(
            f"{count:8} {mean:10.2f} +- {std:5.2f} {normalized:11.2f} "
            f"{results['accuracy'][i].mean():16.3f} {results['policy_accuracy'][i].mean():18.3f}"
        )
    print("mean returns:", ", ".join(f"{name} {value:.2f}" for name, value in references.items()))
    print(f"results: {output}, .png and .pt")
    common.print_next("decode_online_ppo.py", args)


if __name__ == "__main__":
    common.run(main, Args)
