"""Stage 3 for continuous control, online: decode latent actions while playing, with PPO (4.3, 6.1).

As decode_online_ppo.py, with a Gaussian over continuous actions: the latent policy's convolutions
are frozen; a decoder is fitted on the agent's own transitions as the IDM labels them (SL), and on
the same features a head learns from rewards (RL). The mean of the Gaussian is the decoder's action
plus the head's. The head starts at 0, so at first the decoder's action counts in full; their
average, the counterpart of Procgen's averaged logits, would halve it.

reads   runs/<game>/latent_policy.pt, and for rl_sl latent_dynamics.pt (the IDM)
writes  runs/<game>/decode_online_<method>.npz: env_steps, returns, episodes [T], and mean_return of
        the Gaussian's mean after training; .png, .csv

at 64x64      python -m continuous_control.decode_dmc_online --game cheetah_run
on a CPU      python -m continuous_control.decode_dmc_online --game cheetah_run
                  --env-steps 400_000 --log-every-steps 16_000
"""

import copy
from dataclasses import dataclass
from typing import Literal

import common  # before torch
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from collect_data import compute_gae
from decode_online_ppo import label_transitions, load_networks

from continuous_control.collect_dmc import (
    ControlEnvs,
    check_minibatches,
    pick_renderer,
    pop_ended,
    ppo_update,
)
from continuous_control.decode_dmc import RegressionDecoder, fit, play, r2


@dataclass
class Args(common.RunArgs):
    game: Literal["cheetah_run", "walker_walk"] = "cheetah_run"
    """Task of the suite; the later stages' --game."""
    resume: bool = False
    """Continue the run that was stopped; its environments start new episodes."""
    log_every_steps: int = 50_000
    """Environment steps between points of the curve and saved states."""

    method: Literal["rl_sl", "rl"] = "rl_sl"
    """rl_sl: decoder and RL head; rl: RL head alone."""
    env_steps: int = 4_000_000
    """Steps of the suite (Procgen, A.4); a repeated action counts as several."""
    num_envs: int = 16
    """Environments that step together."""
    rollout_steps: int = 128
    """Actions in each environment between updates."""
    minibatches: int = 8
    """Minibatches per epoch."""
    epochs: int = 10
    """Passes over a rollout."""
    lr: float = 5e-4
    """Learning rate of Adam at the start; it falls to 0 linearly."""
    start_std: float = 0.6
    """Std of the Gaussian at the start; it is learned."""
    gamma: float = 0.99
    """Discount."""
    gae_lambda: float = 0.95
    """Lambda of generalized advantage estimation."""
    clip: float = 0.2
    """Clips the probability ratio."""
    max_grad_norm: float = 0.5
    """Clips the gradient's norm."""

    refit_until: float = 0.5
    """Fraction of env_steps until which each rollout ends with a fit of the decoder, from scratch
    on all transitions so far."""
    decoder_steps: int = 1000
    """Updates of each fit."""
    decoder_lr: float = 1e-3
    """Learning rate of Adam for the decoder; it falls to 0 linearly."""
    batch_size: int = 128
    """Transitions per update of the decoder."""
    episodes: int = 16
    """Episodes of the Gaussian's mean after training, at once."""


class OnlinePolicy(nn.Module):
    """What PPO trains: a copy of the layer after the frozen convolutions (hidden), heads of action
    and value, and the std of actions.
    """

    def __init__(self, hidden, num_actions, start_std):
        super().__init__()
        self.hidden = copy.deepcopy(hidden).requires_grad_(True)
        self.action = nn.Linear(hidden.out_features, num_actions)
        self.value = nn.Linear(hidden.out_features, 1)
        nn.init.zeros_(self.action.weight)
        nn.init.orthogonal_(self.value.weight, 1.0)
        nn.init.zeros_(self.action.bias)
        nn.init.zeros_(self.value.bias)
        log_std = torch.full((num_actions,), start_std).log()
        self.log_std = nn.Parameter(log_std)

    def forward(self, features, decoded):
        """features (B, F), the decoder's actions (B, A) -> distribution of (B, A), value (B,)"""
        h = F.relu(self.hidden(features))  # (B, 256)
        mean = decoded + self.action(h)
        std = self.log_std.exp()
        distribution = torch.distributions.Normal(mean, std, validate_args=False)
        return distribution, self.value(h)[:, 0]


class OnlineDecoder:
    """The decoder and the transitions that it is fitted on: all of the agent's own, as the IDM
    labels them. num_refits: the first updates, each of which ends with a fit; 0 for rl.
    """

    def __init__(self, idm, z_dim, num_actions, num_refits, args, device):
        self.idm = idm
        self.num_refits = num_refits
        self.args = args
        self.decoder = RegressionDecoder(z_dim, num_actions).to(device)
        last = self.decoder.layers[-1]
        nn.init.zeros_(last.weight)  # no action until the first fit
        nn.init.zeros_(last.bias)
        self.r2 = float("nan")
        self.z = torch.zeros(0, z_dim, dtype=torch.half, device=device)
        self.actions = torch.zeros(0, num_actions, device=device)

    def __call__(self, z):
        """z (B, Z) -> actions (B, A)"""
        return self.decoder(z).clamp(-1, 1)

    def learn(self, update, rollout, generator):
        """Takes in the rollout of this update, and fits the decoder from scratch."""
        if update > self.num_refits:
            return
        z, actions = label_transitions(
            self.idm,
            rollout["frames"],
            rollout["first"],
            rollout["actions"].clamp(-1, 1),  # as the environments clip them
        )
        self.r2 = r2(self.decoder, z, actions)  # on transitions that it was not fitted on
        self.z = torch.cat([self.z, z.half()])
        self.actions = torch.cat([self.actions, actions])
        for layer in self.decoder.layers[::2]:
            layer.reset_parameters()
        z = self.z.float()
        self.decoder.mean.copy_(z.mean(0))
        self.decoder.std.copy_(z.std(0) + 1e-6)
        fit(
            self.decoder,
            lambda batch: z[batch],
            self.actions,
            steps=self.args.decoder_steps,
            batch_size=self.args.batch_size,
            lr=self.args.decoder_lr,
            generator=generator,
        )
        if update == self.num_refits:  # releases their memory
            self.z = self.z[:0].clone()
            self.actions = self.actions[:0].clone()

    def state_dict(self):
        decoder = self.decoder.state_dict()
        return dict(decoder=decoder, r2=self.r2, z=self.z, actions=self.actions)

    def load_state_dict(self, saved):
        self.decoder.load_state_dict(saved["decoder"])
        self.r2 = saved["r2"]
        self.z = saved["z"].to(self.z.device)
        self.actions = saved["actions"].to(self.z.device)


def new_rollout(args, context, frame_size, num_features, num_actions, device):
    """Storage of a rollout: T actions in B environments. frames and first begin with the k frames
    before the rollout and end with the frame after it; values end with the value of that frame.
    """
    T, B, S = args.rollout_steps, args.num_envs, frame_size
    num_frames = context + T + 1

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=device)

    return dict(
        frames=zeros(num_frames, B, S, S, 3, dtype=torch.uint8),
        first=~zeros(num_frames, B, dtype=torch.bool),  # True
        features=zeros(T, B, num_features),
        decoded=zeros(T, B, num_actions),
        actions=zeros(T, B, num_actions),
        logprobs=zeros(T, B),
        rewards=zeros(T, B),
        values=zeros(T + 1, B),
    )


@torch.no_grad()
def play_rollout(rollout, envs, encode, policy, normalize_rewards, gamma):
    """Plays T actions and writes them into the storage. encode: frames uint8 (B, S, S, 3) ->
    features (B, F) and the decoder's actions (B, A), which all epochs of PPO use.
    """
    T = len(rollout["actions"])
    frames = rollout["frames"]
    first = rollout["first"]
    now = len(frames) - T - 1  # k, the row of the first frame to act on
    # the last k + 1 frames of the rollout before are the first ones of this rollout
    frames[: now + 1] = frames[T:].clone()
    first[: now + 1] = first[T:].clone()
    for t in range(T):
        # sample an action given o_t; the environments clip it
        features, decoded = encode(frames[now + t])
        distribution, value = policy(features, decoded)
        action = distribution.sample()
        logprob = distribution.log_prob(action).sum(-1)
        # o_{t+1}; where an episode has ended, the first frame of the next one
        obs, reward, done = envs.step(action.cpu().numpy())
        reward = torch.from_numpy(normalize_rewards(reward, done)).to(value.device)
        done = torch.from_numpy(done).to(value.device)
        # Time ended the episode: what would have followed still counts. Its last frame is not
        # rendered; the one before stands for it.
        reward += gamma * value * done
        rollout["features"][t] = features
        rollout["decoded"][t] = decoded
        rollout["actions"][t] = action
        rollout["logprobs"][t] = logprob
        rollout["rewards"][t] = reward
        rollout["values"][t] = value
        frames[now + t + 1] = torch.from_numpy(obs)
        first[now + t + 1] = done
    _, value = policy(*encode(frames[-1]))
    rollout["values"][T] = value


def learn_from_rewards(policy, optimizer, rollout, args):
    """PPO on a rollout; returns the last loss."""
    T = len(rollout["actions"])
    advantages, targets = compute_gae(
        rollout["rewards"],
        rollout["values"],
        rollout["first"][-T:],  # where the next frame opens an episode, one has ended
        args.gamma,
        args.gae_lambda,
    )
    steps = dict(
        features=rollout["features"],
        decoded=rollout["decoded"],
        actions=rollout["actions"],
        logprobs=rollout["logprobs"],
        advantages=advantages,
        targets=targets,
    )
    return ppo_update(policy, optimizer, steps, ["features", "decoded"], args)


def save_results(output, args, recording, curve):
    settings = dict(recording=recording, args=vars(args))
    common.save_npz(f"{output}.npz", settings, **curve)
    returns = np.array(curve["returns"])[:, None]  # of one seed
    common.plot_returns(
        f"{output}.png",
        title=f"{args.game}: latent policy decoded online, 1 seed",
        xlabel="environment steps",
        curves={args.method: (curve["env_steps"], returns)},
        references={
            "expert": recording["expert_return"],
            "random actions": recording["random_return"],
            "mean action after training": curve["mean_return"],
        },
    )


def main(args):
    device = common.pick_device(args)
    check_minibatches(args)
    pick_renderer()
    torch.manual_seed(args.seed)
    output = args.runs_dir / args.game / f"decode_online_{args.method}"

    # --- networks: the latent policy and the IDM stay as they are
    checkpoint, latent_policy, idm = load_networks(output.parent, args, device)
    recording = checkpoint["recording"]
    common.lock(output)
    seed = common.derive_seed(args.seed, "decode dmc online")
    envs = ControlEnvs(recording, args.num_envs, seed)
    rollout_size = args.num_envs * args.rollout_steps * recording["action_repeat"]
    num_updates = max(1, args.env_steps // rollout_size)
    num_refits = 0
    if args.method == "rl_sl":
        num_refits = int(args.refit_until * num_updates)
        if num_refits == 0:
            common.fail(f"--refit-until {args.refit_until} is before the end of the first update")
    policy = OnlinePolicy(latent_policy.hidden, envs.num_actions, args.start_std).to(device)
    z_dim = checkpoint["config"]["z_dim"]
    decoder = OnlineDecoder(idm, z_dim, envs.num_actions, num_refits, args, device)
    optimizer = torch.optim.Adam(policy.parameters(), args.lr, eps=1e-5, fused=True)

    def encode(obs):
        features = latent_policy.features(obs)
        return features, decoder(latent_policy.latent(features))

    # --- storage
    normalize_rewards = common.RewardNormalizer(args.num_envs, args.gamma)
    generator = torch.Generator().manual_seed(args.seed)
    sizes = (checkpoint["context"], recording["frame_size"], latent_policy.cnn.num_features)
    rollout = new_rollout(args, *sizes, envs.num_actions, device)
    rollout["frames"][-1] = torch.from_numpy(envs.obs)

    # --- training
    print(f"stage 3, online: {args.method} on {args.game}, {num_updates:,} updates on {device}")
    log = common.MetricsLog(f"{output}.csv", num_updates * rollout_size, "step")
    resumable = dict(policy=policy, optimizer=optimizer, decoder=decoder, generator=generator)
    resumable |= dict(normalize_rewards=normalize_rewards, log=log)
    curve = dict(env_steps=[], returns=[], episodes=[])
    made_from = common.fingerprint(latent_policy)
    start, saved = common.load_state(f"{output}_state.pt", args, resumable, made_from)
    curve = saved.get("curve", curve)
    normalize_rewards.discounted[:] = 0  # episodes start again
    for update in range(start // rollout_size + 1, num_updates + 1):
        # play T steps of each environment
        play_rollout(rollout, envs, encode, policy, normalize_rewards, args.gamma)
        # RL
        optimizer.param_groups[0]["lr"] = args.lr * (1 - (update - 1) / num_updates)
        loss = learn_from_rewards(policy, optimizer, rollout, args)
        # SL: all transitions so far are what the decoder is fitted on
        decoder.learn(update, rollout, generator)
        log.bar.update(rollout_size)

        # log, save
        env_step = update * rollout_size
        if env_step % args.log_every_steps < rollout_size or update == num_updates:
            common.check_finite(env_step, f"{output}.npz", policy)
            mean_return, episodes = pop_ended(envs)
            curve["env_steps"].append(env_step)
            curve["returns"].append(mean_return)
            curve["episodes"].append(episodes)
            point = {name: values[-1] for name, values in curve.items()}
            std = policy.log_std.exp().mean()
            log.write(**point, std=std, loss=loss, decoder_r2=decoder.r2)
            state = dict(made_from=made_from, curve=curve)
            common.save_state(f"{output}_state.pt", args, env_step, resumable, **state)
    log.bar.close()
    envs.close()

    # --- the Gaussian's mean plays whole episodes
    def mean_action(obs):
        distribution, _ = policy(*encode(obs))
        return distribution.mean

    curve["mean_return"] = play(mean_action, recording, args, device)
    save_results(output, args, recording, curve)
    print(f"{args.method}: return of the mean action {curve['mean_return']:.1f}")
    print(f"results: {output}.npz, .png and .csv")
    common.print_next("-m continuous_control.visualize_dmc", args)


if __name__ == "__main__":
    common.run(main, Args)
