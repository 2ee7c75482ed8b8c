"""Stage 3 for continuous control, online: decode latent actions while playing, with PPO (4.3, 6.1).

As decode_online_ppo.py, with a Gaussian over continuous actions: the latent policy's convolutions
are frozen; a decoder is fitted on the agent's own transitions as the IDM labels them (SL), and on
the same features a head learns from rewards (RL). The mean of the Gaussian is the decoder's action
plus the head's. The head starts at 0, so at first the decoder's action counts in full; their
average, the counterpart of Procgen's averaged logits, would halve it.

reads   runs/<game>/latent_policy.pt, and for rl_sl latent_dynamics.pt (the IDM)
writes  runs/<game>/decode_online_<method>.npz: env_steps, returns, episodes [T], and mean_return of
        the Gaussian's mean after training; .png (all methods in the folder), .csv

at 64x64      python -m continuous_control.decode_dmc_online --game cheetah_run
on a CPU      python -m continuous_control.decode_dmc_online --game cheetah_run
                  --env-steps 400_000 --log-every-steps 20_000    # frames as in collect_dmc.py
"""

from dataclasses import asdict, dataclass
from typing import Literal

import common  # before torch
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from collect_data import compute_gae
from decode_online_ppo import label_transitions, load_networks, plot_all_methods

from continuous_control.collect_dmc import ControlEnvs, pick_renderer, ppo_update
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
        self.hidden = nn.Linear(hidden.in_features, hidden.out_features)
        self.hidden.load_state_dict(hidden.state_dict())
        self.action = nn.Linear(hidden.out_features, num_actions)
        self.value = nn.Linear(hidden.out_features, 1)
        nn.init.zeros_(self.action.weight)
        nn.init.orthogonal_(self.value.weight, 1.0)
        nn.init.zeros_(self.action.bias)
        nn.init.zeros_(self.value.bias)
        self.log_std = nn.Parameter(torch.full((num_actions,), float(np.log(start_std))))

    def forward(self, features, decoded):
        """features (B, F), the decoder's actions (B, A) -> distribution of (B, A), value (B,)"""
        h = F.relu(self.hidden(features))  # (B, 256)
        mean, std = decoded + self.action(h), self.log_std.exp()
        return torch.distributions.Normal(mean, std, validate_args=False), self.value(h)[:, 0]


def main(args):
    device = common.pick_device(args.device)
    pick_renderer()
    torch.manual_seed(args.seed)
    run, t, b = args.runs_dir / args.game, args.rollout_steps, args.num_envs
    with_decoder = args.method == "rl_sl"

    # --- networks
    checkpoint, latent_policy, idm = load_networks(run, args.game, device, with_decoder)
    settings, k, z_dim = (checkpoint[name] for name in ("settings", "context", "z_dim"))
    envs = ControlEnvs(settings, b, common.derive_seed(args.seed, "decode dmc online"))
    policy = OnlinePolicy(latent_policy.hidden, envs.num_actions, args.start_std).to(device)
    decoder = RegressionDecoder(z_dim, envs.num_actions).to(device)
    for x in (decoder.layers[-1].weight, decoder.layers[-1].bias):
        nn.init.zeros_(x)  # no action until the first fit
    optimizer = torch.optim.Adam(policy.parameters(), args.lr, eps=1e-5, fused=True)
    normalize_rewards = common.RewardNormalizer(b, args.gamma)
    generator = torch.Generator().manual_seed(args.seed)

    @torch.no_grad()
    def look(obs):
        """Encodes frames, once for all epochs: features (B, F), and what the heads make of them."""
        features = latent_policy.features(obs)
        decoded = decoder(latent_policy.latent(features)).clamp(-1, 1)
        return features, decoded, *policy(features, decoded)

    # --- training
    output, batch = run / f"decode_online_{args.method}", t * b * settings.get("action_repeat", 1)
    updates = max(1, args.env_steps // batch)
    print(f"stage 3, online: {args.method} on {args.game}, {updates:,} updates on {device}")
    parts = dict(policy=policy, optimizer=optimizer, decoder=decoder, generator=generator)
    parts |= dict(normalize_rewards=normalize_rewards)
    curve, decoder_r2 = dict(env_steps=[], returns=[], episodes=[]), float("nan")
    z_seen, actions_seen = torch.zeros(0, z_dim).half(), torch.zeros(0, envs.num_actions)
    stamp, state = common.fingerprint(latent_policy), f"{output}_state.pt"
    start, saved = common.load_state(state, args, parts, stamp)
    if saved:
        curve, z_seen, actions_seen = (saved[x] for x in ("curve", "z_seen", "actions_seen"))
        normalize_rewards.discounted[:] = 0  # episodes start again
    obs = torch.from_numpy(envs.obs).to(device)
    frames = torch.stack([torch.zeros_like(obs)] * k + [obs])  # (k + 1, B, S, S, 3)
    firsts = torch.ones(k + 1, b, dtype=torch.bool, device=device)
    log = common.MetricsLog(f"{output}.csv", updates * batch, "step", start)
    for update in range(start // batch + 1, updates + 1):
        # k frames from before the rollout, T frames, and the one that the next rollout starts from
        frames, firsts, steps = [*frames[-k - 1 :]], [*firsts[-k - 1 :]], []
        for _ in range(t):
            features, decoded, distribution, value = look(frames[-1])
            action = distribution.sample()  # clipped by the environment
            logprob = distribution.log_prob(action).sum(-1)
            obs, reward, done = envs.step(action.cpu().numpy())
            reward, done = torch.from_numpy(normalize_rewards(reward, done)), torch.from_numpy(done)
            reward, done = reward.to(device), done.to(device)
            # Time ended the episode: what would have followed still counts. Its last frame is not
            # rendered; the one before stands for it.
            reward += args.gamma * value * done
            steps.append((features, decoded, action, logprob, reward, value))
            frames.append(torch.from_numpy(obs).to(device))
            firsts.append(done)
        features, decoded, actions, logprobs, rewards, values = map(torch.stack, zip(*steps))
        frames, firsts = torch.stack(frames), torch.stack(firsts)  # (k + T + 1, B, ..)
        all_values = torch.cat([values, look(frames[-1])[3][None]])  # (T + 1, B)
        dones = firsts[k + 1 :]
        advantages, targets = compute_gae(rewards, all_values, dones, args.gamma, args.gae_lambda)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - (update - 1) / updates)
        rollout = actions, logprobs, advantages, targets
        loss = ppo_update(policy, optimizer, [features, decoded], rollout, args)

        if with_decoder and update <= args.refit_until * updates:
            z, taken = label_transitions(idm, frames, firsts, actions.clamp(-1, 1))
            decoder_r2 = r2(decoder, z, taken.cpu())  # on transitions that it was not fitted on
            z_seen = torch.cat([z_seen, z.half().cpu()])
            actions_seen = torch.cat([actions_seen, taken.cpu()])
            for layer in decoder.layers[::2]:
                layer.reset_parameters()
            decoder.mean.copy_(z_seen.float().mean(0))
            decoder.std.copy_(z_seen.float().std(0) + 1e-6)
            fit(
                decoder, lambda rows: z_seen[rows].float().to(device),
                torch.arange(len(z_seen)), actions_seen,
                args.decoder_steps, args.batch_size, args.decoder_lr, generator,
            )  # fmt: skip
        log.bar.update(batch)

        env_step, every = update * batch, args.log_every_steps
        if env_step // every > (env_step - batch) // every or update == updates:
            common.check_finite(env_step, f"{output}.npz", policy)
            returns = [episode_return for _, episode_return in envs.finished]
            envs.finished.clear()
            mean_return = float(np.mean(returns)) if returns else float("nan")
            point = dict(env_steps=env_step, returns=mean_return, episodes=len(returns))
            curve = {name: [*curve[name], value] for name, value in point.items()}
            std = policy.log_std.exp().mean()
            log.write(**point, std=std, loss=loss, decoder_r2=decoder_r2)
            more = dict(curve=curve, z_seen=z_seen, actions_seen=actions_seen)
            common.save_state(state, args, env_step, parts, made_from=stamp, **more)
    log.bar.close()
    envs.close()
    arrays = curve | dict(mean_return=play(lambda obs: look(obs)[2].mean, settings, args, device))
    common.save_npz(f"{output}.npz", settings | asdict(args) | dict(resume=False), **arrays)
    plot_all_methods(run, args.game, f"{output}.png", settings)
    references = "expert {expert_return:.1f}, random actions {random_return:.1f}".format(**settings)
    print(f"{args.method}: return of the mean action {arrays['mean_return']:.1f} ({references})")
    print(f"results: {output}.npz, .png, .csv")


if __name__ == "__main__":
    main(tyro.cli(Args))
