"""Stage 3, online: decode latent actions while playing, with PPO (paper, 4.3, 6.1, Figure 3).

The latent policy's convolutions are frozen. Two sets of logits on top of them are averaged: those
of a decoder, fitted on the agent's own transitions as the IDM labels them (SL), and those of an
action head that learns from rewards (RL). --method rl is the ablation without the decoder; with the
folder of baselines/train_ilpo.py, it is the paper's ILPO baseline.

reads   runs/<game>/latent_policy.pt, and for rl_sl latent_dynamics.pt (the IDM)
writes  runs/<game>/decode_online_<method>.npz, .pt, .png (all methods in the folder) and .csv

paper scale   python decode_online_ppo.py --game bigfish
on a CPU      python decode_online_ppo.py --game miner --env-steps 300_000 --log-every-steps 20_000
                  --hidden-lr-ramp 50_000 100_000 0.1
"""

import copy
from dataclasses import asdict, dataclass
from typing import Literal

import common  # before torch
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from decode_offline import plot


@dataclass
class Args(common.RunArgs):
    resume: bool = False
    """Continue the run that was stopped, or start one if there is none."""
    log_every_steps: int = 50_000
    """Environment steps between points of the curve, checkpoints and saved states."""

    method: Literal["rl_sl", "rl"] = "rl_sl"
    """rl_sl: decoder and RL head; rl: RL head alone."""
    env_steps: int = 4_000_000
    """Environment steps (A.4)."""
    num_envs: int = 64
    """Games that step together."""
    rollout_steps: int = 64
    """Steps of each game between updates (official code)."""
    minibatches: int = 8
    """Minibatches per epoch."""
    epochs: int = 3
    """Passes over a rollout."""
    gamma: float = 0.999
    """Discount."""
    gae_lambda: float = 0.95
    """Lambda of generalized advantage estimation."""
    clip: float = 0.2
    """Clips the probability ratio and the value's change."""
    entropy_coef: float = 0.0025
    """Weight of the entropy bonus (official code)."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Clips the gradient's norm."""
    lr: float = 0.01
    """Learning rate of Adam (section 5), of which each part takes a fraction, see below."""
    action_lr_ramp: tuple[int, int, float] = (35_000, 50_000, 0.25)
    """(start, top, peak): the learning rate of the action head is 0 until step `start`, rises to
    peak * lr at step `top` and falls to 0 at --env-steps (official code)."""
    value_lr_ramp: tuple[int, int, float] = (25_000, 50_000, 0.25)
    """The same for the value head (official code)."""
    hidden_lr_ramp: tuple[int, int, float] = (50_000, 200_000, 0.1)
    """The same for the layer before both heads (official code)."""

    refit_from: int = 10_000
    """Steps before the decoder's first fit; each fit starts from scratch, on all transitions so far
    (official code, as all of these)."""
    refit_each_until: int = 50_000
    """Steps until which it is refitted after each update."""
    refit_every: int = 20
    """Updates between refits after that."""
    refit_until: int = 400_000
    """Steps after which the decoder stays as it is, and the IDM is no longer needed."""
    refit_epochs: int = 3
    """Passes over the transitions."""
    refit_batch_size: int = 512
    """Transitions per update of the decoder."""
    decoder_lr: float = 1e-3
    """Learning rate of Adam for the decoder (official code, online)."""
    label_smoothing: float = 0.05
    """Of the decoder's cross entropy (official code, online)."""


# --- networks -------------------------------------------------------------------------------------
# Copies of the earlier stages' scripts; tests/test_copies.py keeps them equal.


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


class IDM(nn.Module):
    """z_t = IDM(o_{t-k} .. o_{t+1}), before quantization."""

    def __init__(self, frame_size, context, multiplier, z_dim):
        super().__init__()
        self.cnn = ImpalaCNN(3 * (context + 2), frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.head = nn.Linear(256, z_dim)

    def forward(self, windows):
        """uint8 (B, k + 2, S, S, 3) -> z (B, Z)"""
        return self.head(F.relu(self.hidden(self.cnn(common.to_input(windows)))))


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


class OnlinePolicy(nn.Module):
    """What PPO trains: a copy of the layer after the frozen convolutions (the decoder is fed by the
    latent policy's own), an action head and a value head.
    """

    def __init__(self, hidden, with_decoder):
        super().__init__()
        self.hidden, self.with_decoder = copy.deepcopy(hidden), with_decoder
        self.action = nn.Linear(hidden.out_features, common.NUM_ACTIONS)
        self.value = nn.Linear(hidden.out_features, 1)
        nn.init.zeros_(self.action.weight)  # no influence until rewards give it one
        nn.init.orthogonal_(self.value.weight, 1.0)
        nn.init.zeros_(self.action.bias)
        nn.init.zeros_(self.value.bias)

    def forward(self, features, decoded):
        """features (B, F), the decoder's logits (B, 15) -> logits (B, 15), value (B,)"""
        h = F.relu(self.hidden(features))  # (B, 256)
        logits = (self.action(h) + decoded) / 2 if self.with_decoder else self.action(h)
        return logits, self.value(h)[:, 0]


# --- PPO: copies of collect_data.py ---------------------------------------------------------------


def compute_gae(rewards, values, dones, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016): rewards (T, B) and dones (T, B) of
    the actions at t, values (T + 1, B) of the frames -> advantages (T, B), value targets (T, B).
    """
    advantages, advantage = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        alive = 1.0 - dones[t].float()
        delta = rewards[t] + gamma * values[t + 1] * alive - values[t]
        advantages[t] = advantage = delta + gamma * gae_lambda * alive * advantage
    return advantages, advantages + values[:-1]


def ppo_loss(logits, value, action, old_logprob, old_value, advantage, target, args):
    """PPO's loss (Schulman et al. 2017) on a minibatch, all (B,) but logits (B, A), and metrics.
    The value is clipped as well.
    """
    distribution = torch.distributions.Categorical(logits=logits, validate_args=False)
    log_ratio = distribution.log_prob(action) - old_logprob
    ratio = log_ratio.exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = advantage * ratio.clamp(1 - args.clip, 1 + args.clip)
    policy_loss = -torch.min(advantage * ratio, clipped).mean()
    clipped_value = old_value + (value - old_value).clamp(-args.clip, args.clip)
    value_loss = 0.5 * torch.max((value - target) ** 2, (clipped_value - target) ** 2).mean()
    entropy = distribution.entropy().mean()
    loss = policy_loss + args.value_coef * value_loss - args.entropy_coef * entropy
    kl = (ratio - 1 - log_ratio).mean()
    return loss, dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy, kl=kl)


def ppo_update(policy, optimizer, inputs, steps, args, generator):
    """Epochs of minibatches. inputs: what the policy sees, steps: action .. target of ppo_loss(),
    all (T, B, ..). Returns the metrics of the last minibatch.
    """
    inputs, steps = ([x.flatten(0, 1) for x in part] for part in (inputs, steps))
    for _ in range(args.epochs):
        permutation = torch.randperm(len(steps[0]), generator=generator, device=generator.device)
        for rows in permutation.chunk(args.minibatches):
            outputs = policy(*(x[rows] for x in inputs))
            loss, metrics = ppo_loss(*outputs, *(x[rows] for x in steps), args)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            optimizer.step()
    return metrics


def sample_actions(logits, generator):
    """logits (B, A) -> actions int64 (B,), drawn from the softmax."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def learning_rate(env_step, ramp, lr, end):
    """0 until ramp[0], up to ramp[2] * lr at ramp[1], down to 0 at `end`; linear between."""
    return float(np.interp(env_step, (ramp[0], ramp[1], end), (0.0, ramp[2] * lr, 0.0)))


# --- the decoder ----------------------------------------------------------------------------------


def refit_is_due(update, args):
    """Whether the decoder is fitted after this update, counted from 1."""
    step = update * args.num_envs * args.rollout_steps
    every = 1 if step <= args.refit_each_until else args.refit_every
    return args.refit_from <= step <= args.refit_until and update % every == 0


@torch.no_grad()
def label_transitions(idm, frames, firsts, actions, batch_size=512):
    """z (M, Z) of a rollout's windows within an episode, and the actions (M,) taken at their o_t.

    frames uint8 (k + T + 1, B, S, S, 3), firsts bool (k + T + 1, B): k frames before the rollout,
    the T frames at which actions (T, B) were taken, and the one after.
    """
    length = len(frames) - len(actions) + 1  # k + 2 frames in a window
    episode = firsts.long().cumsum(0)
    inside = episode[length - 1 :] == episode[: 1 - length]  # (T, B): first and last frame agree
    t, b = inside.nonzero(as_tuple=True)
    rows = t[:, None] + torch.arange(length, device=t.device)  # (M, k + 2)
    parts = zip(rows.split(batch_size), b.split(batch_size))
    z = [idm(frames[some_rows, some_b[:, None]]) for some_rows, some_b in parts]
    return torch.cat(z), actions[t, b]


def fit_decoder(decoder, z, actions, args, generator):
    """Fits the decoder from scratch on z (N, Z) and actions (N,)."""
    for layer in decoder.layers[::2]:
        layer.reset_parameters()
    decoder.mean.copy_(z.float().mean(0))
    decoder.std.copy_(z.float().std(0) + 1e-6)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=args.decoder_lr, fused=True)
    for _ in range(args.refit_epochs):
        order = torch.randperm(len(z), generator=generator, device=z.device)
        for rows in order.split(args.refit_batch_size):
            logits = decoder(z[rows].float())
            loss = F.cross_entropy(logits, actions[rows], label_smoothing=args.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


# --- training -------------------------------------------------------------------------------------


def load_networks(run, game, device, with_idm):
    """The content of latent_policy.pt, and frozen: its policy and stage 1's IDM, or None."""
    saved = common.load_checkpoint(run / "latent_policy.pt", "latent_policy", game)
    latent_policy = LatentPolicy(saved["frame_size"], saved["multiplier"], saved["z_dim"])
    latent_policy.load_state_dict(saved["policy"])
    latent_policy.to(device, memory_format=torch.channels_last).requires_grad_(False)
    if not with_idm:
        return saved, latent_policy, None
    path = run / "latent_dynamics.pt"
    dynamics = common.load_checkpoint(path, "latent_dynamics", game)
    if dynamics["fingerprint"] != saved["dynamics"]:
        common.fail(f"{path} is of another run of stage 1 than latent_policy.pt; run stage 2")
    idm = IDM(saved["frame_size"], saved["context"], dynamics["multiplier"], saved["z_dim"])
    idm.load_state_dict(dynamics["idm"])
    return saved, latent_policy, idm.to(device, memory_format=torch.channels_last)


def plot_all_methods(run, game, path, settings):
    """Plots the curves of all methods in the folder, beside the returns of expert and random."""
    references = {x: settings[f"{x}_return"] for x in ("expert", "random")}
    curves = {}
    for file in sorted(run.glob("decode_online_*.npz")):
        curve = common.load_npz(file, ("env_steps", "returns"))
        curves[file.stem[14:]] = curve["env_steps"], curve["returns"][:, None]
    title = f"{game}: latent policy decoded online, 1 seed"
    plot(path, title, "environment steps", curves, references)


def main(args):
    device = common.pick_device(args.device)
    torch.manual_seed(args.seed)
    run, t, b = args.runs_dir / args.game, args.rollout_steps, args.num_envs
    updates, with_decoder = max(1, args.env_steps // (t * b)), args.method == "rl_sl"
    ramps = {part: getattr(args, f"{part}_lr_ramp") for part in ("action", "value", "hidden")}
    for part, ramp in ramps.items():
        if not ramp[0] < ramp[1] < args.env_steps:
            common.fail(f"--{part}-lr-ramp {ramp} must rise, and peak before --env-steps")
    refits = [update for update in range(1, updates + 1) if refit_is_due(update, args)]
    if with_decoder and not refits:
        common.fail(f"no update ends between --refit-from {args.refit_from} and --refit-until")

    # --- networks
    checkpoint, latent_policy, idm = load_networks(run, args.game, device, with_decoder)
    settings, k, z_dim = (checkpoint[name] for name in ("settings", "context", "z_dim"))
    policy = OnlinePolicy(latent_policy.hidden, with_decoder).requires_grad_(True).to(device)
    decoder = ActionDecoder(z_dim).to(device)
    parameters = [dict(params=getattr(policy, part).parameters(), lr=0.0) for part in ramps]
    optimizer = torch.optim.Adam(parameters, fused=True)

    # --- games, the frames so far, and all transitions until the decoder's last fit
    seed = common.derive_seed(args.seed, "decode online")
    envs = common.ProcgenEnvs(settings, b, seed)
    generator = torch.Generator(device).manual_seed(seed)
    normalize_rewards = common.RewardNormalizer(b, args.gamma)
    distinct = torch.from_numpy(common.distinct_actions(args.game)).to(device)
    obs = torch.from_numpy(envs.obs).to(device)
    frames = torch.stack([torch.zeros_like(obs)] * k + [obs])  # (k + 1, B, S, S, 3)
    firsts = torch.ones(k + 1, b, dtype=torch.bool, device=device)
    z_seen = torch.zeros(0, z_dim, dtype=torch.half, device=device)
    actions_seen = torch.zeros(0, dtype=torch.long, device=device)
    # until the first fit: the agent starts uniformly random (official code: an unfitted decoder)
    not_decoded = torch.zeros(b, common.NUM_ACTIONS, device=device)

    @torch.no_grad()
    def look(obs, fitted):
        """Encodes frames, once for all epochs: features (B, F), and what the heads make of them."""
        features = latent_policy.features(obs)
        decoded = decoder(latent_policy.latent(features)) if fitted else not_decoded
        return features, decoded, *policy(features, decoded)

    # --- training
    output = run / f"decode_online_{args.method}"
    fits = f"; {len(refits)} fits of the decoder" if with_decoder else ""
    print(f"stage 3, online: {args.method} on {args.game}, {updates:,} updates on {device}{fits}")
    parts = dict(policy=policy, optimizer=optimizer, decoder=decoder, envs=envs)
    parts |= dict(generator=generator, normalize_rewards=normalize_rewards)
    curve, decoder_accuracy = dict(env_steps=[], returns=[], episodes=[]), float("nan")
    stamp = common.fingerprint(latent_policy)
    start, saved = common.load_state(f"{output}_state.pt", args, parts, stamp)
    if saved:
        curve, decoder_accuracy = saved["curve"], saved["decoder_accuracy"]
        names = ("frames", "firsts", "z_seen", "actions_seen")
        frames, firsts, z_seen, actions_seen = (saved[name].to(device) for name in names)
    log = common.MetricsLog(f"{output}.csv", updates * t * b, "step", start)
    for update in range(start // (t * b) + 1, updates + 1):
        fitted = with_decoder and update > refits[0]
        # k frames from before the rollout, T frames, and the one that the next rollout starts from
        frames, firsts, steps = [*frames[-k - 1 :]], [*firsts[-k - 1 :]], []
        for _ in range(t):
            features, decoded, logits, value = look(frames[-1], fitted)
            action = sample_actions(logits, generator)
            logprob = logits.log_softmax(-1).gather(1, action[:, None])[:, 0]
            obs, reward, done = envs.step(action.cpu().numpy())
            reward = torch.from_numpy(normalize_rewards(reward, done)).to(device)
            steps.append((features, decoded, action, logprob, value, reward))
            frames.append(torch.from_numpy(obs).to(device))
            firsts.append(torch.from_numpy(done).to(device))
        features, decoded, actions, logprobs, values, rewards = map(torch.stack, zip(*steps))
        frames, firsts = torch.stack(frames), torch.stack(firsts)  # (k + T + 1, B, ..)
        all_values = torch.cat([values, look(frames[-1], fitted)[3][None]])  # (T + 1, B)
        dones = firsts[k + 1 :]  # the frame after the last of an episode opens the next
        advantages, targets = compute_gae(rewards, all_values, dones, args.gamma, args.gae_lambda)

        # the learning rate is that of the step before the rollout (official code)
        for group, ramp in zip(optimizer.param_groups, ramps.values()):
            group["lr"] = learning_rate((update - 1) * t * b, ramp, args.lr, args.env_steps)
        rollout = actions, logprobs, values, advantages, targets
        metrics = ppo_update(policy, optimizer, [features, decoded], rollout, args, generator)

        if with_decoder and update <= refits[-1]:
            z, taken = label_transitions(idm, frames, firsts, actions)
            if fitted:  # on transitions that it was not fitted on, actions of equal effect merged
                right = distinct[decoder(z).argmax(1)] == distinct[taken]
                decoder_accuracy = right.float().mean().item()
            z_seen, actions_seen = torch.cat([z_seen, z.half()]), torch.cat([actions_seen, taken])
            if update in refits:
                fit_decoder(decoder, z_seen, actions_seen, args, generator)
            if update == refits[-1]:  # releases their memory
                z_seen, actions_seen = z_seen[:0].clone(), actions_seen[:0].clone()
        log.bar.update(t * b)

        env_step, every = update * t * b, args.log_every_steps
        if env_step // every > (env_step - t * b) // every or update == updates:
            common.check_finite(env_step, f"{output}.pt", policy)
            returns = [episode_return for _, episode_return in envs.finished]
            envs.finished.clear()
            mean_return = float(np.mean(returns)) if returns else float("nan")
            point = dict(env_steps=env_step, returns=mean_return, episodes=len(returns))
            curve = {name: [*curve[name], value] for name, value in point.items()}
            log.write(**point, **metrics, decoder_accuracy=decoder_accuracy)
            # resume=False: with and without an interruption, the same bytes
            common.save_npz(f"{output}.npz", settings | asdict(args) | dict(resume=False), **curve)
            plot_all_methods(run, args.game, f"{output}.png", settings)
            common.save_state(
                f"{output}_state.pt", args, env_step, parts, made_from=stamp, curve=curve,
                decoder_accuracy=decoder_accuracy, frames=frames[-k - 1 :].clone(),
                firsts=firsts[-k - 1 :].clone(), z_seen=z_seen, actions_seen=actions_seen,
            )  # fmt: skip
            common.save_checkpoint(
                f"{output}.pt", kind="decode_online", game=args.game, env_step=env_step,
                settings=settings, frame_size=checkpoint["frame_size"],
                multiplier=checkpoint["multiplier"], z_dim=z_dim, policy=policy.state_dict(),
                latent_policy=latent_policy.state_dict(),
                decoder=decoder.state_dict() if with_decoder else None,
            )  # fmt: skip
    log.bar.close()
    print(f"{args.method}: mean return {curve['returns'][-1]:.2f}; {output}.npz, .pt, .png, .csv")
    if (run / "latent_dynamics.pt").exists():  # not in ILPO's folder
        common.print_next(f"visualize_latents.py --game {args.game}", args)


if __name__ == "__main__":
    main(tyro.cli(Args))
