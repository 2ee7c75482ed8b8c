r"""Stage 3, online: decode latent actions while playing, with PPO (paper, 4.3, 6.1, Figure 3).

The latent policy's convolutions are frozen. Two sets of logits on top of them are averaged: those
of a decoder, fitted on the agent's own transitions as the IDM labels them (SL), and those of an
action head that learns from rewards (RL). --method rl is the ablation without the decoder; with
--runs-dir of baselines/train_ilpo.py, it is the paper's ILPO baseline.

reads   runs/<game>/latent_policy.pt, and for rl_sl latent_dynamics.pt (the IDM)
writes  runs/<game>/decode_online_<method>.npz, .pt, .png, .csv and .gif

paper scale   python decode_online_ppo.py --game bigfish
on a CPU      python decode_online_ppo.py --game miner --env-steps 300_000 \
                  --log-every-steps 50_000 --eval-episodes 16 --hidden-lr-ramp 50_000 100_000 0.1
"""

import copy
from dataclasses import dataclass
from typing import Literal

import common  # before torch
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Args(common.RunArgs):
    resume: bool = False
    """Continue the run that was stopped, or start one if there is none."""
    log_every_steps: int = 100_000
    """Environment steps between evaluations, points of the curve and saved states. Where episodes
    last 1,000 steps, an evaluation of 64 games plays 64,000 steps more."""
    eval_episodes: int = 64
    """Episodes of an evaluation, one in each of as many games."""
    capture_video: bool = False
    """Write an animation (.gif) of the agent in eight games."""

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

    refit_start: int = 10_000
    """Steps before the decoder's first fit; each fit starts from scratch, on all transitions so far
    (official code, as all of these)."""
    refit_dense_until: int = 50_000
    """Steps until which it is refitted after each update."""
    refit_interval: int = 20
    """Updates between refits after that."""
    refit_stop: int = 400_000
    """Steps after which the decoder stays as it is."""
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


class IDM(nn.Module):
    """z_t = IDM(o_{t-k} .. o_{t+1}), before quantization."""

    def __init__(self, frame_size, context, multiplier, z_dim):
        super().__init__()
        self.cnn = ImpalaCNN(3 * (context + 2), frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.head = nn.Linear(256, z_dim)

    def forward(self, windows):
        """uint8 (B, k + 2, S, S, 3) -> z (B, Z)"""
        x = common.to_input(windows)  # (B, 3 (k + 2), S, S)
        h = F.relu(self.hidden(self.cnn(x)))  # (B, 256)
        return self.head(h)


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


class OnlinePolicy(nn.Module):
    """What PPO trains: a copy of the layer after the frozen convolutions, an action head and a
    value head. The decoder's input still comes from the latent policy's own, frozen layer.
    """

    def __init__(self, hidden, with_decoder):
        super().__init__()
        self.hidden = copy.deepcopy(hidden).requires_grad_(True)
        self.with_decoder = with_decoder
        self.action_head = nn.Linear(hidden.out_features, common.NUM_ACTIONS)
        self.value_head = nn.Linear(hidden.out_features, 1)
        nn.init.zeros_(self.action_head.weight)  # no influence until rewards give it one
        nn.init.orthogonal_(self.value_head.weight, 1.0)
        nn.init.zeros_(self.action_head.bias)
        nn.init.zeros_(self.value_head.bias)

    def parameter_groups(self, args):
        """For Adam: each layer, and the ramp of its learning rate."""
        return [
            dict(params=self.action_head.parameters(), ramp=args.action_lr_ramp),
            dict(params=self.value_head.parameters(), ramp=args.value_lr_ramp),
            dict(params=self.hidden.parameters(), ramp=args.hidden_lr_ramp),
        ]

    def forward(self, features, decoder_logits):
        """features (B, F), the decoder's logits (B, 15) -> logits (B, 15), value (B,)"""
        h = F.relu(self.hidden(features))  # (B, 256)
        logits = self.action_head(h)
        if self.with_decoder:  # the mean of both (official code)
            logits = (logits + decoder_logits) / 2
        return logits, self.value_head(h)[:, 0]


# --- PPO: compute_gae() and ppo_loss() are copies of collect_data.py ------------------------------


def compute_gae(rewards, values, dones, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016): rewards (T, B) and dones (T, B) of
    the actions at t, values (T + 1, B) of the frames -> advantages (T, B), value targets (T, B).
    """
    advantages = torch.zeros_like(rewards)
    advantage = 0.0
    for t in reversed(range(len(rewards))):
        alive = 1.0 - dones[t].float()
        delta = rewards[t] + gamma * values[t + 1] * alive - values[t]
        advantage = delta + gamma * gae_lambda * alive * advantage
        advantages[t] = advantage
    return advantages, advantages + values[:-1]


def ppo_loss(logits, values, batch, args):
    """PPO's loss (Schulman et al. 2017) on a minibatch, and metrics. logits (B, A), values (B,);
    batch: actions, logprobs and values of the rollout, advantages, targets, all (B,). The value is
    clipped as well.
    """
    distribution = torch.distributions.Categorical(logits=logits, validate_args=False)
    log_ratio = distribution.log_prob(batch["actions"]) - batch["logprobs"]
    ratio = log_ratio.exp()
    # the policy gains nothing from a ratio beyond the clip
    advantages = batch["advantages"]
    std = advantages.std() + 1e-8
    advantages = (advantages - advantages.mean()) / std
    clipped_ratio = ratio.clamp(1 - args.clip, 1 + args.clip)
    policy_loss = -torch.min(advantages * ratio, advantages * clipped_ratio).mean()
    # the change of the value is clipped as well; the larger loss counts
    change = (values - batch["values"]).clamp(-args.clip, args.clip)
    squared = (values - batch["targets"]) ** 2
    clipped_squared = (batch["values"] + change - batch["targets"]) ** 2
    value_loss = 0.5 * torch.max(squared, clipped_squared).mean()
    entropy = distribution.entropy().mean()
    loss = policy_loss + args.value_coef * value_loss - args.entropy_coef * entropy
    metrics = dict(
        policy_loss=policy_loss,
        value_loss=value_loss,
        entropy=entropy,
        kl=(ratio - 1 - log_ratio).mean(),
    )
    return loss, metrics


def ppo_update(policy, optimizer, rollout, args, generator):
    """Epochs of minibatches over a rollout, see new_rollout(). Returns the metrics of the last
    minibatch.
    """
    T = len(rollout["actions"])
    dones = rollout["first"][-T:]  # where the next frame opens an episode, one has ended
    advantages, targets = compute_gae(
        rollout["rewards"], rollout["values"], dones, args.gamma, args.gae_lambda
    )
    steps = dict(
        features=rollout["features"].flatten(0, 1),
        decoder_logits=rollout["decoder_logits"].flatten(0, 1),
        actions=rollout["actions"].flatten(),
        logprobs=rollout["logprobs"].flatten(),
        values=rollout["values"][:T].flatten(),
        advantages=advantages.flatten(),
        targets=targets.flatten(),
    )
    num_steps = T * args.num_envs
    for _ in range(args.epochs):
        order = torch.randperm(num_steps, generator=generator, device=generator.device)
        for rows in order.tensor_split(args.minibatches):
            batch = {name: x[rows] for name, x in steps.items()}
            logits, values = policy(batch["features"], batch["decoder_logits"])
            loss, metrics = ppo_loss(logits, values, batch, args)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            optimizer.step()
    return metrics


def learning_rate(env_step, ramp, lr, end):
    """0 until ramp[0], up to ramp[2] * lr at ramp[1], down to 0 at `end`; linear between."""
    start, top, peak = ramp
    steps = (start, top, end)
    rates = (0.0, peak * lr, 0.0)
    return float(np.interp(env_step, steps, rates))


def set_learning_rates(optimizer, env_step, args):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(env_step, group["ramp"], args.lr, args.env_steps)


# --- the decoder ----------------------------------------------------------------------------------


@torch.no_grad()
def label_transitions(idm, frames, first, actions, batch_size=512):
    """z (M, Z) of a rollout's windows within an episode, and the actions (M,) taken at their o_t.

    frames uint8 (k + T + 1, B, S, S, 3), first bool (k + T + 1, B): k frames before the rollout,
    the T frames at which actions (T, B) were taken, and the one after.
    """
    T = len(actions)
    length = len(frames) - T + 1  # k + 2 frames in a window
    episode = first.long().cumsum(0)
    inside = episode[length - 1 :] == episode[: 1 - length]  # (T, B): first and last frame agree
    step, env = inside.nonzero(as_tuple=True)  # (M,), (M,)
    rows = step[:, None] + torch.arange(length, device=step.device)  # (M, k + 2)
    z = []
    for some_rows, some_envs in zip(rows.split(batch_size), env.split(batch_size)):
        z.append(idm(frames[some_rows, some_envs[:, None]]))
    return torch.cat(z), actions[step, env]


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


class OnlineDecoder:
    """The supervised half (SL): an ActionDecoder, and the transitions that it is fitted on. These
    are all of the agent's own until --refit-stop, as the IDM labels them.
    """

    def __init__(self, idm, z_dim, args, device):
        self.idm = idm
        self.args = args
        self.network = ActionDecoder(z_dim).to(device)
        last = self.network.layers[-1]
        nn.init.zeros_(last.weight)  # uniform before the first fit (official code: unfitted)
        nn.init.zeros_(last.bias)
        self.distinct = torch.from_numpy(common.distinct_actions(args.game)).to(device)
        self.accuracy = float("nan")
        self.z = torch.zeros(0, z_dim, dtype=torch.half, device=device)
        self.actions = torch.zeros(0, dtype=torch.long, device=device)

    def __call__(self, z):
        """z (B, Z) -> logits (B, 15)"""
        return self.network(z)

    def learn(self, env_step, rollout, generator):
        """Labels the rollout that ended at env_step, and refits the decoder if it is due."""
        args = self.args
        if args.method == "rl" or env_step > args.refit_stop:  # the decoder stays as it is
            self.accuracy = float("nan")
            return
        z, actions = label_transitions(
            self.idm, rollout["frames"], rollout["first"], rollout["actions"]
        )
        # accuracy on transitions that it was not fitted on, actions of equal effect merged; before
        # the first fit, of a constant guess
        guesses = self.network(z).argmax(1)
        right = self.distinct[guesses] == self.distinct[actions]
        self.accuracy = right.float().mean().item()
        self.z = torch.cat([self.z, z.half()])
        self.actions = torch.cat([self.actions, actions])
        update = env_step // (args.num_envs * args.rollout_steps)
        interval = 1 if env_step <= args.refit_dense_until else args.refit_interval
        if env_step >= args.refit_start and update % interval == 0:
            fit_decoder(self.network, self.z, self.actions, args, generator)

    def state_dict(self):
        return dict(
            network=self.network.state_dict(),
            accuracy=self.accuracy,
            z=self.z,
            actions=self.actions,
        )

    def load_state_dict(self, saved):
        self.network.load_state_dict(saved["network"])
        self.accuracy = saved["accuracy"]
        self.z = saved["z"].to(self.z.device)
        self.actions = saved["actions"].to(self.z.device)


# --- training -------------------------------------------------------------------------------------


def load_networks(run, args, device):
    """The content of latent_policy.pt, and frozen: its policy and, for rl_sl, stage 1's IDM."""
    checkpoint = common.load_checkpoint(run / "latent_policy.pt", "latent_policy", args.game)
    latent_policy = LatentPolicy(**checkpoint["config"])
    latent_policy.load_state_dict(checkpoint["policy"])
    latent_policy.requires_grad_(False)
    latent_policy.to(device, memory_format=torch.channels_last)
    if args.method == "rl":
        return checkpoint, latent_policy, None
    path = run / "latent_dynamics.pt"
    dynamics = common.load_checkpoint(path, "latent_dynamics", args.game)
    if dynamics["dynamics_id"] != checkpoint["dynamics_id"]:
        common.fail(f"{path} is of another run of stage 1 than latent_policy.pt; run stage 2")
    idm = IDM(**dynamics["config"]["idm"])
    idm.load_state_dict(dynamics["idm"])
    return checkpoint, latent_policy, idm.to(device, memory_format=torch.channels_last)


def new_rollout(args, checkpoint, num_features, device):
    """Storage of a rollout: T steps of B games. frames and first begin with the k frames before the
    rollout and end with the frame after it, from which the next rollout starts. first is True at
    the beginning: no window reaches back before the first rollout. values end with that frame's.
    """
    T, B, S = args.rollout_steps, args.num_envs, checkpoint["config"]["frame_size"]
    num_frames = checkpoint["context"] + T + 1
    return dict(
        frames=torch.zeros((num_frames, B, S, S, 3), dtype=torch.uint8, device=device),
        first=torch.ones((num_frames, B), dtype=torch.bool, device=device),
        features=torch.zeros((T, B, num_features), device=device),
        decoder_logits=torch.zeros((T, B, common.NUM_ACTIONS), device=device),
        actions=torch.zeros((T, B), dtype=torch.long, device=device),
        logprobs=torch.zeros((T, B), device=device),
        rewards=torch.zeros((T, B), device=device),
        values=torch.zeros((T + 1, B), device=device),
    )


@torch.no_grad()
def play_rollout(rollout, envs, frozen_forward, policy, normalize_rewards, generator):
    """Plays T steps and writes them into the storage. frozen_forward: frames uint8 (B, S, S, 3) ->
    features (B, F) and the decoder's logits (B, 15), which all epochs of PPO use.
    """
    T = len(rollout["actions"])
    context = len(rollout["frames"]) - T - 1  # k: row k holds the first frame to act on
    # the last k + 1 frames of the rollout before are the first ones of this rollout
    for name in ("frames", "first"):
        rollout[name][: context + 1] = rollout[name][T:].clone()
    for t in range(T):
        # sample an action given o_t
        features, decoder_logits = frozen_forward(rollout["frames"][context + t])
        logits, rollout["values"][t] = policy(features, decoder_logits)
        action = common.sample_actions(logits, generator)
        rollout["features"][t] = features
        rollout["decoder_logits"][t] = decoder_logits
        rollout["actions"][t] = action
        logprobs = logits.log_softmax(-1)  # (B, 15)
        rollout["logprobs"][t] = logprobs.gather(1, action[:, None])[:, 0]
        # o_{t+1}; where an episode has ended, the first frame of the next one
        obs, reward, done = envs.step(action.cpu().numpy())
        rollout["frames"][context + t + 1] = torch.from_numpy(obs)
        rollout["first"][context + t + 1] = torch.from_numpy(done)
        rollout["rewards"][t] = torch.from_numpy(normalize_rewards(reward, done))
    features, decoder_logits = frozen_forward(rollout["frames"][-1])
    _, rollout["values"][T] = policy(features, decoder_logits)


def check_schedules(args):
    """Ends the run on flags that cannot work."""
    ramps = dict(action=args.action_lr_ramp, value=args.value_lr_ramp, hidden=args.hidden_lr_ramp)
    for layer, ramp in ramps.items():
        if not ramp[0] < ramp[1] < args.env_steps:
            common.fail(f"--{layer}-lr-ramp {ramp} must rise, and peak before --env-steps")
    if args.num_envs * args.rollout_steps // args.minibatches < 2:
        common.fail(f"--minibatches {args.minibatches} leaves less than 2 steps in each")
    if args.method == "rl_sl" and args.refit_start > min(args.refit_stop, args.env_steps):
        common.fail(f"--refit-start {args.refit_start}: later than --refit-stop or --env-steps")


def save_results(output, args, checkpoint, curve, policy, latent_policy, decoder):
    """The curve (.npz, .png) and the agent (.pt)."""
    recording = checkpoint["recording"]
    # resume=False: an interrupted run writes the same bytes
    settings = dict(recording=recording, args=vars(args) | dict(resume=False))
    common.save_npz(f"{output}.npz", settings, **curve)
    common.save_checkpoint(
        f"{output}.pt",
        kind="decode_online",
        game=args.game,
        recording=recording,
        config=checkpoint["config"],
        policy=policy.state_dict(),
        latent_policy=latent_policy.state_dict(),
        decoder=decoder.network.state_dict(),
    )
    returns = np.mean(curve["eval_returns"], 1)
    common.plot_returns(
        f"{output}.png",
        title=f"{args.game}: latent policy decoded online, 1 seed",
        xlabel="environment steps",
        curves={
            f"{args.method}, {args.eval_episodes} episodes": (curve["env_steps"], returns[:, None])
        },
        references={name: recording[f"{name}_return"] for name in ("expert", "random")},
    )


def main(args):
    device = common.pick_device(args)
    torch.manual_seed(args.seed)
    check_schedules(args)
    output = args.runs_dir / args.game / f"decode_online_{args.method}"

    # --- networks: the latent policy and the IDM stay as they are
    checkpoint, latent_policy, idm = load_networks(output.parent, args, device)
    recording = checkpoint["recording"]
    context = checkpoint["context"]
    z_dim = checkpoint["config"]["z_dim"]
    policy = OnlinePolicy(latent_policy.hidden, args.method == "rl_sl").to(device)
    decoder = OnlineDecoder(idm, z_dim, args, device)
    optimizer = torch.optim.Adam(policy.parameter_groups(args), lr=0.0, fused=True)
    common.lock(output)

    # --- games and storage
    seed = common.derive_seed(args.seed, "decode online")
    eval_seed = common.derive_seed(args.seed, "evaluation actions")
    envs = common.ProcgenEnvs(recording, args.num_envs, seed)
    generator = torch.Generator(device).manual_seed(seed)
    normalize_rewards = common.RewardNormalizer(args.num_envs, args.gamma)
    rollout = new_rollout(args, checkpoint, latent_policy.cnn.num_features, device)
    rollout["frames"][-1] = torch.from_numpy(envs.obs)

    def frozen_forward(obs):
        features = latent_policy.features(obs)
        return features, decoder(latent_policy.latent(features))

    def compute_logits(obs):
        features, decoder_logits = frozen_forward(obs)
        logits, _ = policy(features, decoder_logits)
        return logits

    # --- training
    rollout_size = args.num_envs * args.rollout_steps
    num_updates = max(1, args.env_steps // rollout_size)
    print(f"stage 3, online: {args.method} on {args.game}, {num_updates:,} updates on {device}")
    log = common.MetricsLog(f"{output}.csv", num_updates * rollout_size, "step")
    resumable = dict(policy=policy, optimizer=optimizer, decoder=decoder, envs=envs)
    resumable |= dict(generator=generator, normalize_rewards=normalize_rewards, log=log)
    curve = dict(env_steps=[], eval_returns=[])
    made_from = common.fingerprint(latent_policy)
    start, saved = common.load_state(f"{output}_state.pt", args, resumable, made_from)
    if saved:
        curve = saved["curve"]
        rollout["frames"][-context - 1 :] = saved["frames"].to(device)
        rollout["first"][-context - 1 :] = saved["first"].to(device)
    for update in range(start // rollout_size + 1, num_updates + 1):
        # play T steps of each game
        play_rollout(rollout, envs, frozen_forward, policy, normalize_rewards, generator)
        # RL: PPO, at the learning rates of the step at which this rollout began (official code).
        # Until step 25,000 all are 0: PPO runs but changes no weight, and only the decoder learns
        set_learning_rates(optimizer, (update - 1) * rollout_size, args)
        metrics = ppo_update(policy, optimizer, rollout, args, generator)
        # SL: the IDM labels these transitions, the decoder is refitted on all so far
        env_step = update * rollout_size
        decoder.learn(env_step, rollout, generator)
        log.bar.update(rollout_size)

        # at the first update past each multiple of --log-every-steps: evaluate on whole episodes
        if env_step % args.log_every_steps < rollout_size or update == num_updates:
            common.check_finite(env_step, f"{output}.pt", policy)
            act = common.make_player(compute_logits, device, eval_seed)
            eval_returns = common.evaluation_returns(recording, act, args)
            metrics["eval_return"] = eval_returns.mean()
            metrics["decoder_accuracy"] = decoder.accuracy
            log.write(env_step=env_step, **metrics)
            curve["env_steps"].append(env_step)
            curve["eval_returns"].append(eval_returns.tolist())
            save_results(output, args, checkpoint, curve, policy, latent_policy, decoder)
            common.save_state(
                f"{output}_state.pt",
                args,
                env_step,
                resumable,
                made_from=made_from,
                curve=curve,
                frames=rollout["frames"][-context - 1 :].clone(),
                first=rollout["first"][-context - 1 :].clone(),
            )
    log.bar.close()
    if args.capture_video:
        act = common.make_player(compute_logits, device, eval_seed)
        common.capture_video(f"{output}.gif", recording, act, args.seed)
    mean_return = np.mean(curve["eval_returns"][-1])
    print(f"{args.method}: mean return {mean_return:.2f}; {output}.npz, .pt, .png and .csv")


if __name__ == "__main__":
    common.run(main, Args)
