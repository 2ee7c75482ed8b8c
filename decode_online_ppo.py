"""Stage 3, online: decode latent actions while playing, with PPO (paper, sections 4.3 and 6.1, Figure 3).

The latent policy's convolutions stay frozen. On top of them two sets of logits are averaged: a decoder turns the policy's
latent action into true actions, fitted on the agent's own transitions as the IDM labels them (SL), and a new action head
learns from rewards (RL). The decoder soon gives a crude policy; RL can then take it past the expert that was filmed.

--method rl drops the decoder; --method scratch is the baseline, PPO on a new network with nothing learned from video;
--method ilpo is the other baseline (A.5): as rl_sl, with ILPO's latent policy and labels by ILPO's generator.

reads   runs/<game>/latent_policy.pt, runs/<game>/latent_dynamics.pt (IDM only); ilpo: runs/<game>/ilpo.pt; scratch: neither
writes  runs/<game>/decode_online_<method>.npz, .pt, .png (all methods that the folder holds) and .csv

paper scale   python decode_online_ppo.py --game bigfish
CPU sized     python decode_online_ppo.py --game coinrun --env-steps 300_000 --hidden-lr-ramp 50_000 100_000 0.1 \\
                  --log-every-steps 20_000
"""

import copy
import json
from dataclasses import asdict, dataclass
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
    checkpoint_minutes: float = 5
    """Minutes between two writes of the whole state, from which --resume goes on."""
    resume: bool = False
    """Go on with the run that was stopped or killed, or start where none was; one that is finished stays as it is."""
    compile: bool = True
    """On a GPU, compile the networks (torch.compile with CUDA graphs); left aside on a CPU, where it takes minutes, and under torchrun."""
    vq: bool = True
    """Quantise the latent actions; --no-vq is the paper's ablation (A.2), whose runs go to <runs-dir>/<game>_no_vq."""
    log_every_steps: int = 50_000
    """Environment steps between points of the curve; each is the mean of all episodes that ended since the last."""

    method: Literal["rl_sl", "rl", "scratch", "ilpo"] = "rl_sl"
    """rl_sl: LAPO, decoder and RL head; rl: RL head alone on the latent policy; scratch: PPO on a new network; ilpo: ILPO's."""
    env_steps: int = 4_000_000
    """Environment steps (A.4)."""
    num_envs: int = 64
    """Games that step together."""
    minibatches: int = 8
    """Minibatches an epoch."""
    epochs: int = 3
    """Passes over a rollout."""
    gamma: float = 0.999
    """Discount."""
    gae_lambda: float = 0.95
    """Generalised advantage estimation."""
    clip: float = 0.2
    """Clips both the probability ratio and the value's change."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Clips the gradient's norm."""

    head_rollout_steps: int = 64
    """rl_sl, rl, ilpo: steps of each game between two updates (official code)."""
    head_entropy_coef: float = 0.0025
    """rl_sl, rl, ilpo: weight of the entropy bonus (official code)."""
    head_lr: float = 0.01
    """rl_sl, rl, ilpo: Adam's learning rate (A.4); each part takes a share of it that ramps up, then falls to 0 at the end."""
    action_lr_ramp: tuple[int, int, float] = (35_000, 50_000, 0.25)
    """rl_sl, rl, ilpo: step where the action head's share leaves 0, step where it peaks, and its peak (official code)."""
    value_lr_ramp: tuple[int, int, float] = (25_000, 50_000, 0.25)
    """rl_sl, rl, ilpo: the same for the value head (official code)."""
    hidden_lr_ramp: tuple[int, int, float] = (50_000, 200_000, 0.1)
    """rl_sl, rl, ilpo: the same for the layer before the two heads (official code)."""

    refit_from: int = 10_000
    """rl_sl, ilpo: steps before the decoder's first fit; every fit starts anew, on all transitions so far (official code)."""
    refit_each_until: int = 50_000
    """rl_sl, ilpo: steps until which it is refitted after each update (official code)."""
    refit_every: int = 20
    """rl_sl, ilpo: updates between two refits after that (official code)."""
    refit_until: int = 400_000
    """rl_sl, ilpo: steps after which the decoder stays as it is, and the IDM or generator rests (official code)."""
    refit_epochs: int = 3
    """rl_sl, ilpo: passes over the transitions (official code)."""
    refit_batch_size: int = 512
    """rl_sl, ilpo: transitions an update of the decoder (official code)."""
    decoder_lr: float = 1e-3
    """Adam's learning rate for the decoder (official code, online)."""
    label_smoothing: float = 0.05
    """Of the decoder's cross entropy (official code, online)."""

    scratch_rollout_steps: int = 256
    """scratch: steps of each game between two updates (Cobbe et al.)."""
    scratch_entropy_coef: float = 0.01
    """scratch: weight of the entropy bonus (Cobbe et al.)."""
    scratch_lr: float = 5e-4
    """scratch: Adam's learning rate, constant (A.4)."""
    scratch_multiplier: float = 4
    """scratch: multiplies IMPALA's channels. The paper does not tell; 4 is the latent policy's, so that only weights differ."""
    scratch_frame_size: Literal[64, 32, 16] = 64
    """scratch: side of the frames in pixels; the others take this, levels and sizes from latent_policy.pt or ilpo.pt."""
    scratch_start_level: int = 0
    """scratch: first level of the game."""
    scratch_num_levels: int = 0
    """scratch: number of levels; 0 means all of them (the paper's)."""


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


class OnlinePolicy(nn.Module):
    """What PPO trains: the layer after the convolutions, an action head and a value head; from scratch, also a CNN.

    The layer is a copy, because the latent policy keeps its own, frozen, for the decoder's sake.
    """

    def __init__(self, hidden, decoder_share, cnn=None):
        super().__init__()
        self.cnn, self.hidden, self.decoder_share = cnn, copy.deepcopy(hidden), decoder_share
        self.action = nn.Linear(hidden.out_features, common.NUM_ACTIONS)
        self.value = nn.Linear(hidden.out_features, 1)
        nn.init.zeros_(self.action.weight)  # has no say until rewards give it one
        nn.init.orthogonal_(self.value.weight, 1.0)
        nn.init.zeros_(self.action.bias)
        nn.init.zeros_(self.value.bias)

    def forward(self, x, decoded):
        """features (B, F), or frames uint8 (B, S, S, 3), and the decoder's logits (B, 15) -> logits (B, 15), value (B,)"""
        if self.cnn is not None:
            x = self.cnn(to_input(x[:, None]))
        h = F.relu(self.hidden(x))  # (B, 256)
        return (1 - self.decoder_share) * self.action(h) + self.decoder_share * decoded, self.value(h)[:, 0]


# --- PPO -----------------------------------------------------------------------------------------------------------


class RewardNormalizer:
    """Divides rewards by the running standard deviation of the discounted return, then clips them to +-10.

    As OpenAI's VecNormalize, which Cobbe et al. used: the sum restarts where an episode ends, the mean is not subtracted.
    """

    def __init__(self, num_envs, gamma):
        self.gamma = gamma
        self.statistics = common.RunningMeanStd(shape=())
        self.discounted = np.zeros(num_envs)

    def __call__(self, rewards, firsts):
        """rewards float (T, B) and firsts bool (T, B) of the same observations, step by step -> float32 (T, B)"""
        normalized = np.empty(rewards.shape, np.float32)
        for t, (reward, first) in enumerate(zip(rewards, firsts)):
            self.discounted = self.discounted * self.gamma + reward
            self.statistics.update(self.discounted)
            self.discounted[first] = 0.0
            normalized[t] = np.clip(reward / np.sqrt(self.statistics.var + 1e-8), -10, 10)
        return normalized

    def state_dict(self):
        statistics = {name: float(value) for name, value in vars(self.statistics).items()}  # mean, var and count
        return dict(statistics=statistics, discounted=torch.from_numpy(self.discounted.copy()))

    def load_state_dict(self, saved):
        vars(self.statistics).update(saved["statistics"])
        self.discounted = saved["discounted"].numpy()


def compute_gae(rewards, values, firsts, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016).

    rewards (T, B): what the action at t earned. values (T + 1, B) and firsts (T + 1, B) of the frames; no value or
    advantage crosses an episode's end. Returns advantages (T, B) and the value targets (T, B).
    """
    advantages, advantage = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        alive = 1.0 - firsts[t + 1].float()
        delta = rewards[t] + gamma * values[t + 1] * alive - values[t]
        advantages[t] = advantage = delta + gamma * gae_lambda * alive * advantage
    return advantages, advantages + values[:-1]


def ppo_loss(logits, value, action, old_logprob, old_value, advantage, target, clip, value_coef, entropy_coef):
    """PPO's clipped loss (Schulman et al. 2017) on one minibatch, all (B,) but logits (B, A); value clipped as well.

    Returns the loss and a dict of detached figures.
    """
    distribution = torch.distributions.Categorical(logits=logits, validate_args=False)
    log_ratio = distribution.log_prob(action) - old_logprob
    ratio = log_ratio.exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    policy_loss = -torch.min(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
    clipped_value = old_value + (value - old_value).clamp(-clip, clip)
    value_loss = 0.5 * torch.max((value - target) ** 2, (clipped_value - target) ** 2).mean()
    entropy = distribution.entropy().mean()
    loss = policy_loss + value_coef * value_loss - entropy_coef * entropy
    figures = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy, kl=(ratio - 1 - log_ratio).mean())
    return loss, {name: figure.detach() for name, figure in figures.items()}


def sample_actions(logits, generator):
    """logits (B, A) -> actions int64 (B,), drawn from the softmax."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def encode(latent_policy, obs):
    """uint8 (B, S, S, 3) -> frozen features (B, F), which never change: once a frame is enough for all epochs"""
    return latent_policy.cnn(to_input(obs[:, None]))


def learning_rate(env_step, ramp, lr, end):
    """0 until ramp[0], up to ramp[2] * lr at ramp[1], down to 0 at `end`; linear between."""
    return float(np.interp(env_step, (ramp[0], ramp[1], end), (0.0, ramp[2] * lr, 0.0)))


# --- the decoder ---------------------------------------------------------------------------------------------------


def decoder_input(latent_policy, features, generator):
    """frozen features (B, F) -> z of the latent policy (B, Z); for ILPO, E(o_t) and one-hot z (B, 256 + K)"""
    latents = latent_policy.head(F.relu(latent_policy.hidden(features)))
    if isinstance(latent_policy, LatentPolicy):
        return latents
    # z is drawn from pi, because the decoder is fitted on one-hot z: the probabilities would be an input it never saw
    return beside_embedding(latent_policy, features, sample_actions(latents, generator))


def refit_updates(updates, steps_per_update, refit_from, each_until, every, until):
    """The updates, counted from 1, after which the decoder is fitted anew, as a list."""
    steps = {update: update * steps_per_update for update in range(1, updates + 1)}
    return [
        update for update, step in steps.items()
        if refit_from <= step <= each_until or (each_until < step <= until and update % every == 0)
    ]  # fmt: skip


@torch.no_grad()
def label_transitions(labeller, frames, firsts, actions, batch_size=512):
    """z (M, Z) of a rollout's transitions by the IDM or NearestLatent, and the actions (M,) taken at their middle frames o_t.

    frames uint8 (k + T + 1, B, S, S, 3) and firsts bool (k + T + 1, B): k frames from before the rollout, the T frames that
    actions (T, B) were taken at, and the one after them. Windows o_{t-k} .. o_{t+1} that cross an episode's end are left out.
    """
    length = len(frames) - len(actions) + 1  # k + 2 frames a window
    episode = firsts.long().cumsum(0)
    within = episode[length - 1 :] == episode[: 1 - length]  # (T, B): whether the window lies in one episode
    # all windows are labelled, in batches of one size, for which cuDNN has to choose kernels once
    t, b = torch.ones_like(within).nonzero(as_tuple=True)  # t: a window's first row, and its step
    rows = t[:, None] + torch.arange(length, device=t.device)
    z = [labeller(frames[some_rows, some_b[:, None]]) for some_rows, some_b in zip(rows.split(batch_size), b.split(batch_size))]
    return torch.cat(z)[within.flatten()], actions[within]


def fit_decoder(z, action, epochs, batch_size, lr, label_smoothing, generator, standardize=True):
    """A new ActionDecoder fitted on z (N, Z) and action (N,).

    standardize: not for one-hot latents, where one that was never seen has no spread to divide by.
    """
    decoder = ActionDecoder(z.shape[1]).to(z.device)
    if standardize:
        decoder.mean.copy_(z.float().mean(0)), decoder.std.copy_(z.float().std(0) + 1e-6)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=lr, fused=True)
    for _ in range(epochs):
        for rows in torch.randperm(len(z), generator=generator, device=z.device).split(batch_size):
            loss = F.cross_entropy(decoder(z[rows].float()), action[rows], label_smoothing=label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return decoder


# --- files ---------------------------------------------------------------------------------------------------------


def load_networks(run, game, with_idm):
    """The checkpoint of stage 2 (a dict with the sizes), the LatentPolicy in it, and the IDM of stage 1 or None."""
    made_by = f"python train_latent_bc.py --game {game}"
    checkpoint = common.load_checkpoint(run / "latent_policy.pt", "latent_policy", game, made_by)
    latent_policy = LatentPolicy(checkpoint["frame_size"], checkpoint["multiplier"], checkpoint["z_dim"])
    checkpoint.fill(latent_policy, "model")
    if not with_idm:
        return checkpoint, latent_policy, None
    path, theirs = run / "latent_dynamics.pt", run / "latent_policy.pt"
    dynamics = common.load_checkpoint(path, "latent_dynamics", game, f"python train_latent_dynamics.py --game {game}")
    sizes = dict(frame_size=dynamics["frame_size"], context=dynamics["context"], z_dim=len(dynamics["idm"]["head.bias"]))
    for name, size in sizes.items():
        if size != checkpoint[name]:
            common.fail(f"{path} has {name} {size}, but {theirs} {checkpoint[name]}; make the latter anew with: {made_by}")
    if dynamics["fingerprint"] != checkpoint["dynamics"]:
        common.fail(f"{theirs} imitates another run of stage 1 than {path}; make the former anew with: {made_by}")
    idm = IDM(multiplier=dynamics["multiplier"], **sizes)
    dynamics.fill(idm, "idm")
    return checkpoint, latent_policy, idm


def plot_curves(to, run, game, random_return, expert_return):
    """Figure 3 for one game: every method's curve that the folder `run` holds, as a PNG."""
    names = dict(rl_sl="LAPO, RL and SL", rl="LAPO, RL without SL", scratch="PPO from scratch", ilpo="ILPO")
    figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    for color, (method, name) in enumerate(names.items()):
        path = run / f"decode_online_{method}.npz"
        if path.exists():
            made_by = f"python decode_online_ppo.py --game {game} --method {method}"
            curve = common.load_npz(path, ("env_steps", "returns", "settings"), made_by)
            settings = json.loads(str(curve["settings"]))
            on = f"{settings['num_levels'] or 'all'} levels, {settings['frame_size']}x{settings['frame_size']}"
            axes.plot(curve["env_steps"], curve["returns"], ".-", color=f"C{color}", label=f"{name} ({on}, 1 seed)")
    axes.axhline(expert_return, color="black", linestyle="--", label=f"expert ({expert_return:.2f})")
    axes.axhline(random_return, color="gray", linestyle=":", label=f"random policy ({random_return:.2f})")
    axes.set(xlabel="environment steps", ylabel="mean episodic return", title=f"{game}: latent policy decoded online")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    with common.atomic_write(to) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


# --- ILPO, for --method ilpo alone; LAPO needs nothing from here to main() -------------------------------------------


class DiscreteLatentPolicy(nn.Module):
    """pi(z | o_t) over K discrete latents, from an encoder E(o_t): the convolutions and the layer after them."""

    def __init__(self, frame_size, multiplier, latents):
        super().__init__()
        self.cnn = ImpalaCNN(3, frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.head = nn.Linear(256, latents)

    def forward(self, obs):
        """uint8 (B, S, S, 3) -> logits of pi (B, K)"""
        return self.head(F.relu(self.hidden(self.cnn(to_input(obs[:, None])))))


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


class NearestLatent(nn.Module):
    """In the IDM's place for ILPO: tells a transition's latent as the one whose prediction comes nearest to o_{t+1}.

    Edwards et al. compare embeddings of the frames; here pixels are compared, as in the loss that the generator was trained on.
    """

    def __init__(self, latent_policy, generator):
        super().__init__()
        self.latent_policy, self.generator = latent_policy, generator

    def forward(self, windows):
        """uint8 (B, k + 2, S, S, 3) -> E(o_t) and one-hot z (B, 256 + K)"""
        z = nearest_latents(self.generator, windows, self.latent_policy.head.out_features)
        return beside_embedding(self.latent_policy, encode(self.latent_policy, windows[:, -2]), z)


def predict_all(generator, past, latents):
    """What each latent would lead to: past uint8 (B, k + 1, S, S, 3) -> o_{t+1} (B, K, 3, S, S), K passes for each window."""
    z = torch.eye(latents, device=past.device).repeat(len(past), 1)  # (B * K, K): every latent beside every window
    return generator(past.repeat_interleave(latents, 0), z).unflatten(0, (len(past), latents))


def squared_errors(predicted, windows):
    """predicted (B, K, 3, S, S), windows uint8 (B, k + 2, S, S, 3) -> each latent's mean squared error in o_{t+1} (B, K)"""
    return (predicted - to_input(windows[:, -1:])[:, None]).pow(2).mean((2, 3, 4))


@torch.no_grad()
def nearest_latents(generator, windows, latents, batch_size=64):
    """uint8 (B, k + 2, S, S, 3) -> the latent whose prediction comes nearest to o_{t+1}, int64 (B,); a few windows at a time"""
    parts = windows.split(batch_size)
    return torch.cat([squared_errors(predict_all(generator, part[:, :-1], latents), part).argmin(1) for part in parts])


def beside_embedding(latent_policy, features, z):
    """What ILPO's decoder takes: frozen features (B, F) and z int64 (B,) -> E(o_t) and one-hot z (B, 256 + K)

    Edwards et al. give E(o_t) to their remapping network too, and with reason: nothing makes a latent mean the same action in
    every state.
    """
    embedding = F.relu(latent_policy.hidden(features))
    return torch.cat([embedding, F.one_hot(z, latent_policy.head.out_features)], 1)


def load_ilpo(run, game):
    """ILPO's checkpoint (a dict with the sizes), the latent policy in it, and what labels transitions with its generator."""
    checkpoint = common.load_checkpoint(run / "ilpo.pt", "ilpo", game, f"python train_ilpo.py --game {game}")
    frame_size, latents = checkpoint["frame_size"], checkpoint["latents"]
    latent_policy = DiscreteLatentPolicy(frame_size, checkpoint["multiplier"], latents)
    checkpoint.fill(latent_policy, "policy")
    generator = FDM(frame_size, checkpoint["context"], latents, checkpoint["fdm_width"], predict_change=True)
    checkpoint.fill(generator, "generator")
    checkpoint["z_dim"] = latent_policy.hidden.out_features + latents  # of what its decoder takes
    return checkpoint, latent_policy, NearestLatent(latent_policy, generator.eval())


def main(args):
    ramps = ("action_lr_ramp", "value_lr_ramp", "hidden_lr_ramp")
    levels, weights = ("scratch_start_level", "scratch_num_levels"), ("value_coef", "head_entropy_coef", "scratch_entropy_coef")
    common.check_flags(args, zero=(*ramps, *levels, *weights, "refit_from"), shares=("gamma", "gae_lambda", "label_smoothing"))
    device = common.pick_device(args.device)
    common.seed_everything(args.seed)
    data, run = args.data_dir / args.game, common.run_folder(args.runs_dir, args.game, args.vq)
    scratch = args.method == "scratch"
    if args.method == "ilpo" and not args.vq:
        common.fail("--method ilpo has no quantiser to leave out; run it without --no-vq")
    t, b = args.scratch_rollout_steps if scratch else args.head_rollout_steps, args.num_envs
    if t * b % args.minibatches or t * b // args.minibatches < 2:
        common.fail(f"a rollout of {b} games x {t} steps does not divide into --minibatches {args.minibatches} of 2 or more")
    updates = max(1, args.env_steps // (t * b))
    run_state = common.RunState(run, f"decode_online_{args.method}", args)
    if run_state.finished(run / f"decode_online_{args.method}.npz"):
        return

    # --- networks
    latent_policy = labeller = decoder = None  # labeller: LAPO's IDM or ILPO's generator, tells z
    context, refits = 0, []
    if scratch:
        sizes = {name: getattr(args, f"scratch_{name}") for name in ("frame_size", "start_level", "num_levels", "multiplier")}
        cnn = ImpalaCNN(3, sizes["frame_size"], sizes["multiplier"])
        policy = OnlinePolicy(nn.Linear(cnn.num_features, 256), decoder_share=0.0, cnn=cnn)
        groups, entropy_coef = [dict(params=policy.parameters(), lr=args.scratch_lr)], args.scratch_entropy_coef
    else:
        if args.method == "ilpo":
            checkpoint, latent_policy, labeller = load_ilpo(run, args.game)
        else:
            checkpoint, latent_policy, labeller = load_networks(run, args.game, with_idm=args.method == "rl_sl")
        sizes = {name: checkpoint[name] for name in ("frame_size", "start_level", "num_levels", "multiplier", "z_dim")}
        policy = OnlinePolicy(latent_policy.hidden, decoder_share=0.5 if labeller else 0.0)
        latent_policy.to(device, memory_format=torch.channels_last)
        # the ramps give the decoder time to become a policy worth improving; `rl` follows the same, so that the decoder is
        # all that differs
        groups, entropy_coef = [], args.head_entropy_coef
        for part in ("action", "value", "hidden"):
            ramp = getattr(args, f"{part}_lr_ramp")
            if not 0 <= ramp[0] < ramp[1] < args.env_steps:
                common.fail(f"--{part}-lr-ramp {ramp[0]} {ramp[1]} must rise, and end before --env-steps {args.env_steps}")
            groups.append(dict(params=getattr(policy, part).parameters(), lr=0.0, ramp=ramp))
    if labeller:
        labeller.to(device, memory_format=torch.channels_last)
        context = checkpoint["context"]
        refits = refit_updates(updates, t * b, args.refit_from, args.refit_each_until, args.refit_every, args.refit_until)
        if not refits:
            common.fail(f"the decoder would never be fitted in {updates} updates of {t * b} steps; see --refit-from, --refit-until")
    policy.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    compile = common.compiles(args, device)
    encode_frames = common.compiled(lambda frames: encode(latent_policy, frames), compile)
    forward = common.compiled(policy.forward, compile)
    minibatch_loss = common.compiled(
        lambda x, decoded, *rest: ppo_loss(*policy(x, decoded), *rest, args.clip, args.value_coef, entropy_coef), compile
    )

    # --- games
    seed = common.derive_seed(args.seed, "decode online")
    envs = common.HalvedEnvs(args.game, b, seed, sizes["start_level"], sizes["num_levels"], sizes["frame_size"])
    generator = torch.Generator(device).manual_seed(seed)
    normalize_rewards = RewardNormalizer(b, args.gamma)
    random_return = common.random_return(args.game, args.seed, sizes["start_level"], sizes["num_levels"])
    labels = sorted((data / "train").glob("labels_*.npz"))  # they tell how well their expert played; else the paper's is taken
    expert_return = float(common.read_labels(labels[0], args.game)["expert_return"]) if labels else common.RETURNS[args.game][1]

    # --- buffers; a rollout's last row is the frame that the next one starts from
    size = sizes["frame_size"]
    frames = torch.zeros(context + t + 1, b, size, size, 3, dtype=torch.uint8, device=device)  # the labelled windows reach k back
    if scratch:
        inputs = frames  # what PPO's network takes
    else:
        inputs = torch.zeros(t + 1, b, latent_policy.cnn.num_features, device=device)
    # zeros until the first fit: while the action head has no say either, the agent then acts uniformly at random (the
    # official code asks a decoder with random weights, which comes near to that)
    decoded = torch.zeros(t + 1, b, common.NUM_ACTIONS, device=device)
    logits = torch.zeros(t + 1, b, common.NUM_ACTIONS, device=device)
    values = torch.zeros(t + 1, b, device=device)
    actions = torch.zeros(t, b, dtype=torch.long, device=device)
    # these go to the device with the whole rollout
    rewards, firsts = np.zeros((t + 1, b), np.float32), np.zeros((context + t + 1, b), bool)
    decoder_figures = {}
    if labeller:
        z_seen = torch.zeros(refits[-1] * t * b, sizes["z_dim"], dtype=torch.float16, device=device)
        action_seen = torch.zeros(refits[-1] * t * b, dtype=torch.long, device=device)
        seen, decoder_figures["decoder_accuracy"] = 0, float("nan")
    print(
        f"stage 3, online: {args.method} on {args.game}, {updates:,} updates of {b} games x {t} steps on {device}; PPO trains "
        f"{sum(p.numel() for p in policy.parameters()):,} parameters; a rollout takes "
        f"{(inputs.nbytes + (0 if scratch else frames.nbytes)) / 1e6:.0f} MB"
        + (f"; the decoder is fitted {len(refits)} times, last after {len(z_seen):,} steps" if labeller else "")
    )

    # --- training
    env_steps, returns, episodes = [], [], []
    settings = json.dumps(asdict(args) | sizes, default=str)
    output = run / f"decode_online_{args.method}"
    log = common.MetricsLog(f"{output}.csv", updates * t * b, "step")
    parts = dict(policy=policy, optimizer=optimizer, envs=envs, generator=generator, normalize_rewards=normalize_rewards, log=log)
    if saved := run_state.values:
        env_steps, returns, episodes, decoder_figures = saved["env_steps"], saved["returns"], saved["episodes"], saved["decoder_figures"]
        frames[t : t + context], firsts[t : t + context] = saved["frames"], saved["firsts"].numpy()
        if saved["decoder"]:
            decoder = ActionDecoder(sizes["z_dim"]).to(device)
            decoder.load_state_dict(saved["decoder"])
        if saved["seen"] is None:
            labeller = z_seen = action_seen = None
        else:
            seen = len(saved["seen"][0])
            z_seen[:seen], action_seen[:seen] = saved["seen"]
    run_state.load(parts)  # the random numbers too, so nothing may draw any between here and the loop
    for update in range(run_state.step // (t * b) + 1, updates + 1):
        frames[:context], firsts[:context] = frames[t : t + context].clone(), firsts[t : t + context].copy()
        with torch.no_grad():
            for step in range(t + 1):
                now = context + step
                for games, half in envs.halves:
                    reward, obs, first = games.observe()
                    frames[now, half] = common.to_device(obs, device)
                    if not scratch:
                        inputs[step, half] = encode_frames(frames[now, half])
                    if decoder:
                        decoded[step, half] = decoder(decoder_input(latent_policy, inputs[step, half], generator))
                    logits[step, half], values[step, half] = forward(inputs[step, half], decoded[step, half])
                    if step < t:
                        actions[step, half] = sample_actions(logits[step, half], generator)
                        games.act(actions[step, half].cpu().numpy())  # these step while we turn to the other half
                    rewards[step, half], firsts[now, half] = reward, first  # the reward of the action before
        logprobs = logits[:-1].log_softmax(-1).gather(-1, actions[..., None])[..., 0]
        normalized, ends = (common.to_device(x, device) for x in (normalize_rewards(rewards[1:], firsts[context + 1 :]), firsts))
        advantages, targets = compute_gae(normalized, values, ends[context:], args.gamma, args.gae_lambda)

        env_step = update * t * b
        if not scratch:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(env_step, group["ramp"], args.head_lr, args.env_steps)
        flat = [x.flatten(0, 1) for x in (inputs[:-1], decoded[:-1], actions, logprobs, values[:-1], advantages, targets)]
        for _ in range(args.epochs):
            for rows in torch.randperm(t * b, generator=generator, device=device).chunk(args.minibatches):
                optimizer.zero_grad()  # before a compiled forward pass, which takes the memory of the last gradients
                loss, figures = minibatch_loss(*(x[rows] for x in flat))
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
                optimizer.step()
        figures = {name: figure.clone() for name, figure in figures.items()}  # the next rollout may overwrite them

        if labeller:
            z, action = label_transitions(labeller, frames, ends, actions)
            if decoder:  # it has not seen these
                decoder_figures["decoder_accuracy"] = (decoder(z).argmax(-1) == action).float().mean()
            z_seen[seen : seen + len(z)], action_seen[seen : seen + len(z)] = z, action
            seen += len(z)
            if update in refits:
                decoder = fit_decoder(
                    z_seen[:seen], action_seen[:seen], args.refit_epochs, args.refit_batch_size, args.decoder_lr,
                    args.label_smoothing, generator, args.method != "ilpo",
                )  # fmt: skip
            if update == refits[-1]:  # that was the last fit: what labels, and what it labelled, can go
                labeller = z_seen = action_seen = None

        common.check_finite(env_step, f"{output}.pt", policy)
        log.bar.update(t * b)
        if env_step // args.log_every_steps > (env_step - t * b) // args.log_every_steps or update == updates:
            finished = [episode_return for _, episode_return in envs.take_finished()]
            env_steps.append(env_step)
            returns.append(float(np.mean(finished)) if finished else float("nan"))
            episodes.append(len(finished))
            log.write(env_step=env_step, mean_return=returns[-1], episodes=episodes[-1], **figures, **decoder_figures)
            common.save_npz(
                f"{output}.npz", env_steps=np.array(env_steps), returns=np.array(returns), episodes=np.array(episodes),
                random_return=random_return, expert_return=expert_return, settings=settings,
            )  # fmt: skip
            common.save_checkpoint(
                f"{output}.pt", kind="decode_online", game=args.game, method=args.method, env_step=env_step, **sizes,
                policy=policy.state_dict(), latent_policy=latent_policy and latent_policy.state_dict(),
                decoder=decoder and decoder.state_dict(),
            )  # fmt: skip
            plot_curves(f"{output}.png", run, args.game, random_return, expert_return)
        if run_state.due():
            run_state.save(
                env_step, parts, env_steps=env_steps, returns=returns, episodes=episodes, decoder_figures=decoder_figures,
                frames=frames[t : t + context].clone(), firsts=torch.from_numpy(firsts[t : t + context].copy()),
                decoder=decoder and decoder.state_dict(), seen=(z_seen[:seen].clone(), action_seen[:seen].clone()) if labeller else None,
            )  # fmt: skip
    log.bar.close()
    run_state.finish()
    normalized = common.normalize_return(returns[-1], random_return, expert_return)
    print(
        f"{args.method}: mean return {returns[-1]:.2f} over the last {episodes[-1]} episodes, normalised {normalized:.2f} "
        f"(random policy {random_return:.2f}, expert {expert_return:.2f})\n"
        f"results: {output}.npz, .pt, .png and .csv\nnext: python visualize_latents.py --game {args.game}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
