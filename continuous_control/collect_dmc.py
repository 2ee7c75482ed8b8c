"""Data: train a PPO expert on a DeepMind Control task and record its play (paper, A.3).

The expert reads the true state; stages 1 and 2 get the rendered frames alone.
What is recorded is the policy's mean plus a little noise: with the mean alone, the frame would
determine the action, and memory of poses could take the place of seeing what the action did. The
noise, before actions are clipped, is a label of its own: it is independent of all frames up to o_t,
so a probe of it measures what z holds of the action itself. A small third split records uniformly
random actions, on which stage 1 probes its latent actions.

reads   continuous_control/experts/<game>_x<action-repeat>.pt, if it is there
writes  otherwise that and its learning curve, .csv; data/<game>/{train,test,random}/frames_NNN.npz,
        labels_NNN.npz: action float32 [N, A] in [-1, 1], taken at that frame, reward float32 [N],
        noise float32 [N, A], added to the mean action before clipping (random: the action)

at 64x64      python -m continuous_control.collect_dmc --game cheetah_run
on a CPU      python -m continuous_control.collect_dmc --game cheetah_run --plain --gray-stack
                  --frame-size 32 --action-repeat 4 --noise 0.4 --train-episodes 256
                  --test-episodes 16 --random-episodes 32
"""

import contextlib
import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common  # before torch
import numpy as np
import torch
import torch.nn as nn
import tyro
from collect_data import compute_gae

with contextlib.suppress(ImportError):  # torch without CUDA has none
    import triton  # noqa: F401  it crashes where the renderer's LLVM has loaded before it

# domain, task, seconds of a step
TASKS = {"cheetah_run": ("cheetah", "run", 0.01), "walker_walk": ("walker", "walk", 0.025)}
EPISODE_STEPS = 1000  # of the suite, whatever the action repeat; only time ends an episode
EPISODES_PER_SHARD = 16


@dataclass
class Args:
    game: Literal["cheetah_run", "walker_walk"] = "cheetah_run"
    """Task of the suite; the later stages' --game."""
    seed: int = 1
    """Seeds networks, samples and the games themselves."""
    data_dir: Path = Path("data")
    """Frames and labels are in <data-dir>/<game>."""
    experts_dir: Path = Path("continuous_control/experts")
    """An expert <experts-dir>/<game>_x<action-repeat>.pt is used if there, not trained again."""
    resume: bool = False
    """Continue the expert's training that was stopped; its environments start new episodes."""
    overwrite: bool = False
    """Replace frames that are there."""

    action_repeat: Literal[1, 2, 4] = 1
    """Steps of the suite for each action and frame; the paper's is unknown. With 1 (0.01 s), an
    action moves the cheetah by a fraction of a pixel (PlaNet: cheetah 4, walker 2)."""
    train_episodes: int = 512
    """Episodes of 1,000 / action-repeat frames for training; 0 trains the expert only."""
    test_episodes: int = 32
    """Episodes of other starting states, for evaluation."""
    random_episodes: int = 32
    """Episodes of uniformly random actions."""
    frame_size: Literal[64, 32, 16] = 64
    """Side of the frames in pixels; below 64 (the paper's), means of blocks."""
    plain: bool = False
    """No shadows, no reflections: three to five times faster to render without a GPU."""
    gray_stack: bool = False
    """The last three frames, in gray, are the channels of each recorded frame (o_t is the third),
    as one frame alone shows no velocity; not in the paper."""
    mean_action: bool = True
    """Record the policy's mean; --no-mean-action samples the policy."""
    noise: float = 0.2
    """Std of the Gaussian noise on recorded actions, whose range is -1 to 1."""

    expert_steps: int = 8_000_000
    """Steps of the suite for PPO; a repeated action counts as several."""
    num_envs: int = 32
    """Environments that step together."""
    rollout_steps: int = 256
    """Steps of each environment between updates."""
    minibatches: int = 8
    """Minibatches per epoch."""
    epochs: int = 10
    """Passes over a rollout."""
    hidden: int = 128
    """Units of the expert's two hidden layers."""
    expert_lr: float = 5e-4
    """Learning rate of Adam at the start; it falls to 0 linearly."""
    gamma: float = 0.99
    """Discount."""
    gae_lambda: float = 0.95
    """Lambda of generalized advantage estimation."""
    clip: float = 0.2
    """Clips the probability ratio."""
    max_grad_norm: float = 0.5
    """Clips the gradient's norm."""


# --- environments ---------------------------------------------------------------------------------


def pick_renderer():
    """Sets MUJOCO_GL to a renderer that works here without a display; before dm_control loads."""
    os.environ["DISABLE_RENDER_THREAD_OFFLOADING"] = "1"  # its thread outlives failed runs noisily
    probe = "from dm_control import suite; suite.load('cheetah', 'run').physics.render(64, 64)"
    names = [os.environ["MUJOCO_GL"]] if "MUJOCO_GL" in os.environ else ["egl", "osmesa"]
    for name in names:
        command, settings = [sys.executable, "-c", probe], os.environ | dict(MUJOCO_GL=name)
        run = subprocess.run(command, env=settings, capture_output=True, text=True)
        if run.returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return
    reason = (run.stderr.strip() or f"exit status {run.returncode}").splitlines()[-1]
    hint = f"({reason}); see continuous_control/README.md"
    common.fail(f"the suite cannot draw here with {' or '.join(names)} {hint}")


class ControlEnvs:
    """`num_envs` environments of a task that step together, with the interface of ProcgenEnvs.

    settings: a dict with game, frame_size (0: nothing is rendered, obs are the states), plain and,
    if wanted, action_repeat, gray_stack and episode_steps.
    states: float32 [B, D], the suite's own observations. obs: uint8 [B, S, S, 3], the frames.
    final_states: float32 [B, D], the last states of the episodes that ended with this step.
    """

    def __init__(self, settings, num_envs, seed):
        from absl import logging
        from dm_control import suite  # after pick_renderer()

        logging.set_verbosity("error")  # mujoco deprecates what the suite's models use
        self.num_envs, self.frame_size = num_envs, settings["frame_size"]
        self.action_repeat = settings.get("action_repeat", 1)
        self.gray_stack = settings.get("gray_stack", False)
        self.envs, self.finished, self._returns = [], [], np.zeros(num_envs)
        *names, seconds = TASKS[settings["game"]]
        episode_steps = settings.get("episode_steps", EPISODE_STEPS)
        for i in range(num_envs):
            task = dict(random=np.random.RandomState(common.derive_seed(seed, i)))
            task["time_limit"] = (episode_steps - 0.5) * seconds  # safe from rounding
            self.envs.append(suite.load(*names, task))
            model = self.envs[-1].physics.model
            model.vis.global_.offwidth = model.vis.global_.offheight = 64
            if settings["plain"]:
                model.vis.quality.shadowsize, model.mat_reflectance[:] = 0, 0
        self.num_actions = self.envs[0].action_spec().shape[0]
        self.states = np.stack([self._state(env.reset()) for env in self.envs])
        self.obs = np.zeros((num_envs, self.frame_size, self.frame_size, 3), np.uint8)
        self._render(np.ones(num_envs, bool))

    def _state(self, time_step):
        return np.concatenate([np.ravel(x) for x in time_step.observation.values()], dtype="f4")

    def _render(self, first):
        """Sets obs; first: bool [B], True where an episode starts."""
        if not self.frame_size:
            self.obs = self.states
            return
        # camera 0 follows the body from the side
        frames = np.stack([env.physics.render(64, 64, camera_id=0) for env in self.envs])
        frames = common.shrink(frames, self.frame_size)
        if self.gray_stack:
            gray = frames.mean(-1, keepdims=True).round().astype(np.uint8)
            past = np.where(first[:, None, None, None], gray, self.obs[..., 1:])
            frames = np.concatenate([past, gray], -1)
        self.obs = frames

    def step(self, actions):
        """actions float [B, A] -> obs uint8 [B, S, S, 3], reward float32 [B], done bool [B].

        Where done, an episode has ended with this reward, and obs opens the next one.
        """
        reward = np.zeros(self.num_envs, np.float32)
        for _ in range(self.action_repeat):  # divides an episode's length
            steps = [env.step(action) for env, action in zip(self.envs, actions.clip(-1, 1))]
            reward += np.array([step.reward for step in steps], np.float32)
        done = np.array([step.last() for step in steps])
        self.states = np.stack([self._state(step) for step in steps])
        self.final_states = self.states.copy()
        self._returns += reward
        for env in np.flatnonzero(done):
            self.finished.append((int(env), float(self._returns[env])))
            self._returns[env] = 0
            self.states[env] = self._state(self.envs[env].reset())
        self._render(done)
        return self.obs, reward, done

    def close(self):
        for env in self.envs:
            env.physics.free()


# --- expert ---------------------------------------------------------------------------------------


class ExpertPolicy(nn.Module):
    """Gaussian actor and critic on the true state, which is standardized by running averages."""

    def __init__(self, state_dim, num_actions, hidden):
        super().__init__()

        def mlp(outputs, gain):
            sizes, layers = (state_dim, hidden, hidden, outputs), []
            for i, o in zip(sizes, sizes[1:]):
                layers += [nn.Linear(i, o), nn.Tanh()]
                nn.init.orthogonal_(layers[-2].weight, gain if o == outputs else 2**0.5)
                nn.init.zeros_(layers[-2].bias)
            return nn.Sequential(*layers[:-1])

        self.actor, self.critic = mlp(num_actions, 0.01), mlp(1, 1.0)
        self.log_std = nn.Parameter(torch.full((num_actions,), -0.5))
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("square", torch.ones(state_dim))  # mean of squares

    def forward(self, states):
        """float32 (B, D) -> distribution of actions (B, A), value (B,)"""
        std = (self.square - self.mean**2).clamp(min=1e-6).sqrt()
        x = ((states - self.mean) / std).clamp(-10, 10)
        mean = self.actor(x)
        distribution = torch.distributions.Normal(mean, self.log_std.exp(), validate_args=False)
        return distribution, self.critic(x)[:, 0]


def ppo_update(policy, optimizer, inputs, steps, args):
    """Epochs of minibatches of PPO (Schulman et al. 2017). inputs: what the policy sees, steps:
    actions (T, B, A), logprobs, advantages, value targets (T, B). Returns the last loss.
    """
    inputs, steps = ([x.flatten(0, 1) for x in part] for part in (inputs, steps))
    for _ in range(args.epochs):
        order = torch.randperm(len(steps[0]), device=steps[0].device)
        for rows in order.chunk(args.minibatches):
            distribution, value = policy(*(x[rows] for x in inputs))
            action, old_logprob, advantage, target = (x[rows] for x in steps)
            ratio = (distribution.log_prob(action).sum(-1) - old_logprob).exp()
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            clipped = advantage * ratio.clamp(1 - args.clip, 1 + args.clip)
            policy_loss = -torch.min(advantage * ratio, clipped).mean()
            loss = policy_loss + 0.5 * (value - target).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            optimizer.step()
    return loss


def train_expert(args, settings, path):
    """Trains an ExpertPolicy with PPO on states; writes it to `path`."""
    t, b = args.rollout_steps, args.num_envs
    envs = ControlEnvs(settings | dict(frame_size=0), b, common.derive_seed(args.seed, "expert"))
    dim, num_actions = envs.states.shape[1], envs.num_actions
    policy = ExpertPolicy(dim, num_actions, args.hidden)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.expert_lr, eps=1e-5, fused=True)
    normalize_rewards = common.RewardNormalizer(b, args.gamma)
    states, actions = torch.zeros(t, b, dim), torch.zeros(t, b, num_actions)
    logprobs, rewards, dones, values = *torch.zeros(3, t, b), torch.zeros(t + 1, b)
    batch = t * b * args.action_repeat
    updates, saved = max(1, args.expert_steps // batch), path.with_name(f"{path.stem}_state.pt")
    parts = dict(policy=policy, optimizer=optimizer, normalize_rewards=normalize_rewards)
    start, _ = common.load_state(saved, args, parts)
    normalize_rewards.discounted[:] = 0  # episodes start again
    log = common.MetricsLog(path.with_suffix(".csv"), updates * batch, "step", start)
    for update in range(start // batch + 1, updates + 1):
        optimizer.param_groups[0]["lr"] = args.expert_lr * (1 - (update - 1) / updates)
        with torch.no_grad():
            for step in range(t):
                states[step] = torch.from_numpy(envs.states)
                distribution, values[step] = policy(states[step])
                actions[step] = distribution.sample()
                logprobs[step] = distribution.log_prob(actions[step]).sum(-1)
                _, reward, done = envs.step(actions[step].numpy())
                rewards[step] = torch.from_numpy(normalize_rewards(reward, done))
                dones[step] = torch.from_numpy(done)
                if done.any():  # time ended the episode: what would have followed still counts
                    final_value = policy(torch.from_numpy(envs.final_states))[1]
                    rewards[step] += args.gamma * final_value * dones[step]
            values[t] = policy(torch.from_numpy(envs.states))[1]
        advantages, targets = compute_gae(rewards, values, dones, args.gamma, args.gae_lambda)
        rollout = actions, logprobs, advantages, targets
        loss = ppo_update(policy, optimizer, [states], rollout, args)
        # running means of all states so far, after the update: old_logprob was made with these
        flat = states.flatten(0, 1)
        policy.mean.lerp_(flat.mean(0), 1 / update)
        policy.square.lerp_(flat.square().mean(0), 1 / update)
        log.bar.update(batch)
        if update % 20 == 0 or update == updates:
            common.check_finite(update * batch, path, policy)
            mean_return = np.mean([episode_return for _, episode_return in envs.finished] or np.nan)
            envs.finished.clear()
            metrics = dict(mean_return=float(mean_return), std=policy.log_std.exp().mean())
            log.write(env_step=update * batch, **metrics, loss=loss)
            if update < updates:
                common.save_state(saved, args, update * batch, parts)
    log.bar.close()
    common.save_checkpoint(
        path, kind="dmc_expert", game=args.game, env_step=updates * batch,
        mean_return=metrics["mean_return"], sizes=(dim, num_actions, args.hidden),
        policy=policy.state_dict(),
    )  # fmt: skip
    saved.unlink(missing_ok=True)
    envs.close()


# --- recording ------------------------------------------------------------------------------------


@torch.no_grad()
def record_shard(shard, folder, settings, policy):
    """Records the B episodes of a shard, which step together; policy None: random actions.

    shard: its number and B. Returns the episodes' returns, float32 [B].
    """
    number, b = shard
    seed = common.derive_seed(settings["seed"], f"{settings['split']} {number}")
    generator = torch.Generator().manual_seed(common.derive_seed(seed, "actions"))
    envs, columns = ControlEnvs(settings, b, seed), []
    for step in range(settings["episode_steps"] // settings["action_repeat"]):
        if policy is None:
            action = noise = 2 * torch.rand(b, envs.num_actions, generator=generator) - 1
        else:
            distribution = policy(torch.from_numpy(envs.states))[0]
            unit = torch.randn(2, b, envs.num_actions, generator=generator)
            sampled = distribution.stddev * unit[0] * (not settings["mean_action"])
            action = distribution.mean + sampled + settings["noise"] * unit[1]
            action, noise = action.clamp(-1, 1), action - distribution.mean
        obs, first, action = envs.obs, np.full(b, step == 0), action.numpy()
        columns.append((obs, first, action, noise.numpy(), envs.step(action)[1]))
    envs.close()
    arrays = (np.stack(x, 1) for x in zip(*columns))  # [B, T, ..]
    obs, first, action, noise, reward = (x.reshape(-1, *x.shape[2:]) for x in arrays)
    labels = dict(action=action, reward=reward, noise=noise)
    common.save_npz(folder / f"frames_{number:03d}.npz", settings, obs=obs, first=first)
    common.save_npz(folder / f"labels_{number:03d}.npz", settings, **labels)
    return reward.reshape(b, -1).sum(1)


def record(settings, policy, num_episodes, folder, overwrite):
    """Records whole episodes, EPISODES_PER_SHARD in a shard, a shard on each core; the files do not
    depend on the number of cores. The folder appears when complete.
    """
    bar, returns = common.progress_bar(num_episodes, "episode", folder.name), []
    starts = range(0, num_episodes, EPISODES_PER_SHARD)
    shards = [(i, min(EPISODES_PER_SHARD, num_episodes - x)) for i, x in enumerate(starts)]
    workers = min(common.NUM_CORES, len(shards))
    options = dict(num_workers=workers if workers > 1 else 0)
    if workers > 1:  # forked processes would share this one's EGL display
        options |= dict(multiprocessing_context="spawn", worker_init_fn=common.die_with_parent)
    with common.new_folder(folder, overwrite) as part:
        arguments = dict(folder=part, settings=settings, policy=policy)
        options["collate_fn"] = functools.partial(record_shard, **arguments)
        for shard_returns in torch.utils.data.DataLoader(shards, None, **options):
            returns += list(shard_returns)
            bar.update(len(shard_returns))
    bar.close()
    mean, size = np.mean(returns), sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{folder.name}: {num_episodes} episodes, mean return {mean:.1f}, {size:,.0f} MB")


def main(args):
    counts = dict(train=args.train_episodes, test=args.test_episodes, random=args.random_episodes)
    folders = {split: args.data_dir / args.game / split for split in counts if counts[split]}
    for folder in folders.values() if args.train_episodes else ():
        if folder.exists() and not args.overwrite:
            common.fail(f"{folder} is there already; --overwrite replaces it")
    pick_renderer()
    torch.manual_seed(args.seed)
    names = ("game", "plain", "action_repeat", "gray_stack")
    settings = {name: getattr(args, name) for name in names} | dict(episode_steps=EPISODE_STEPS)
    path = args.experts_dir / f"{args.game}_x{args.action_repeat}.pt"
    if not path.exists():
        print(f"expert: PPO on {args.game} for {args.expert_steps:,} steps, to {path}")
        train_expert(args, settings, path)
    expert = common.load_checkpoint(path, "dmc_expert", args.game)
    policy = ExpertPolicy(*expert["sizes"])
    policy.load_state_dict(expert["policy"])

    # the returns of the expert, without noise, and of random actions go into the files
    players = dict(
        expert=lambda states: policy(torch.from_numpy(states))[0].mean.numpy(),
        random=lambda states: 2 * torch.rand(len(states), expert["sizes"][1]).numpy() - 1,
    )
    for name, player in players.items():
        seed = common.derive_seed(args.seed, name)
        envs = ControlEnvs(settings | dict(frame_size=0), EPISODES_PER_SHARD, seed)
        settings[f"{name}_return"] = common.evaluate(envs, player, 1).mean().item()
        envs.close()
    returns = "expert {expert_return:.1f}, random actions {random_return:.1f}".format(**settings)
    print(f"expert: {path}, {expert['env_step']:,} steps; mean returns: {returns}")
    settings |= dict(frame_size=args.frame_size, seed=args.seed, noise=args.noise)
    settings |= dict(mean_action=args.mean_action, expert=common.fingerprint(policy))
    for split, folder in folders.items() if args.train_episodes else ():
        player = None if split == "random" else policy
        record(settings | dict(split=split), player, counts[split], folder, args.overwrite)
    common.print_next(f"train_latent_dynamics.py --game {args.game}", args)


if __name__ == "__main__":
    main(tyro.cli(Args))
