"""Data: train a PPO expert on a DeepMind Control task and record its play (paper, A.3).

The expert reads the true state; stages 1 and 2 get the rendered frames alone.
What is recorded is the policy's mean plus noise: with the mean alone, the frame would determine the
action, and memory of poses could take the place of seeing what the action did. The noise, before
actions are clipped, is a label of its own: it is independent of all frames up to o_t, so a probe of
it measures what z holds of the action itself. A small third split records uniformly random actions,
on which stage 1 probes its latent actions.

reads   continuous_control/experts/<game>_x<action-repeat>.pt, if it is there
writes  otherwise that and its learning curve, .csv; data/<game>/{train,test,random}/frames_NNN.npz,
        labels_NNN.npz: action float32 [N, A] in [-1, 1], taken at that frame, reward float32 [N],
        noise float32 [N, A], added to the mean action before clipping (random: the action)

at 64x64      python -m continuous_control.collect_dmc --game cheetah_run
on a CPU      python -m continuous_control.collect_dmc --game cheetah_run --frame-size 32
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
    expert_only: bool = False
    """Train the expert, record nothing."""
    resume: bool = False
    """Continue the expert's training that was stopped; its environments start new episodes."""

    action_repeat: Literal[1, 2, 4] = 4
    """Steps of the suite for each action and frame; the paper's is unknown. With 1 (0.01 s), an
    action moves the cheetah by a fraction of a pixel (PlaNet: cheetah 4, walker 2)."""
    train_episodes: int = 256
    """Episodes of 1,000 / action-repeat frames for training."""
    test_episodes: int = 16
    """Episodes of other starting states, for evaluation."""
    random_episodes: int = 32
    """Episodes of uniformly random actions."""
    frame_size: Literal[64, 32, 16] = 64
    """Side of the frames in pixels; below 64 (the paper's), means of blocks."""
    plain: bool = True
    """No shadows, no reflections: three to five times faster to render without a GPU."""
    gray_stack: bool = True
    """The last three frames, in gray, are the channels of each recorded frame (o_t is the third),
    as one frame alone shows no velocity; --no-gray-stack: one frame in color (the paper's)."""
    mean_action: bool = True
    """Record the policy's mean; --no-mean-action samples the policy."""
    noise: float = 0.4
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

    def __post_init__(self):
        common.check_flags(self)


# --- environments ---------------------------------------------------------------------------------


def pick_renderer():
    """Sets MUJOCO_GL to a renderer that works here without a display; before dm_control loads."""
    os.environ["DISABLE_RENDER_THREAD_OFFLOADING"] = "1"  # its thread outlives failed runs noisily
    probe = "from dm_control import suite; suite.load('cheetah', 'run').physics.render(64, 64)"
    names = [os.environ["MUJOCO_GL"]] if "MUJOCO_GL" in os.environ else ["egl", "osmesa"]
    for name in names:
        environment = os.environ | dict(MUJOCO_GL=name)
        command = [sys.executable, "-c", probe]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return
    reason = (run.stderr.strip() or f"exit status {run.returncode}").splitlines()[-1]
    hint = f"({reason}); see continuous_control/README.md"
    common.fail(f"the suite cannot draw here with {' or '.join(names)} {hint}")


class ControlEnvs:
    """`num_envs` environments of a task that step together, with the interface of ProcgenEnvs.

    recording: game, frame_size (0: nothing is rendered, obs are the states), plain, gray_stack,
    action_repeat, episode_steps.
    states: float32 [B, D], the suite's own observations. obs: uint8 [B, S, S, 3], the frames.
    final_states: float32 [B, D], the last states of the episodes that ended with this step.
    finished: (env, episodic return) of each episode that ended; the caller empties it.
    """

    def __init__(self, recording, num_envs, seed):
        from absl import logging
        from dm_control import suite  # after pick_renderer()

        logging.set_verbosity("error")  # mujoco deprecates what the suite's models use
        self.num_envs = num_envs
        self.frame_size = recording["frame_size"]
        self.action_repeat = recording["action_repeat"]
        self.gray_stack = recording["gray_stack"]
        self.finished = []
        self._returns = np.zeros(num_envs)
        domain, task, seconds = TASKS[recording["game"]]
        time_limit = (recording["episode_steps"] - 0.5) * seconds  # safe from rounding
        self.envs = []
        for i in range(num_envs):
            random = np.random.RandomState(common.derive_seed(seed, i))
            env = suite.load(domain, task, dict(random=random, time_limit=time_limit))
            model = env.physics.model
            model.vis.global_.offwidth = 64
            model.vis.global_.offheight = 64
            if recording["plain"]:
                model.vis.quality.shadowsize = 0
                model.mat_reflectance[:] = 0
            self.envs.append(env)
        self.num_actions = self.envs[0].action_spec().shape[0]
        self.states = np.stack([self._state(env.reset()) for env in self.envs])
        self.obs = np.zeros((num_envs, self.frame_size, self.frame_size, 3), np.uint8)
        self._render(np.ones(num_envs, bool))

    def _state(self, time_step):
        parts = [np.ravel(part) for part in time_step.observation.values()]
        return np.concatenate(parts, dtype=np.float32)

    def _render(self, first):
        """Sets obs; first: bool [B], True where an episode starts."""
        if self.frame_size == 0:
            self.obs = self.states
            return
        # camera 0 follows the body from the side
        frames = np.stack([env.physics.render(64, 64, camera_id=0) for env in self.envs])
        frames = common.shrink(frames, self.frame_size)
        if self.gray_stack:
            gray = frames.mean(-1, keepdims=True).round().astype(np.uint8)  # [B, S, S, 1]
            # the last two frames of the episode; its first frame stands for those before it
            past = np.where(first[:, None, None, None], gray, self.obs[..., 1:])
            frames = np.concatenate([past, gray], -1)
        self.obs = frames

    def step(self, actions):
        """actions float [B, A] -> obs uint8 [B, S, S, 3], reward float32 [B], done bool [B].

        Where done, an episode has ended with this reward, and obs opens the next one.
        """
        reward = np.zeros(self.num_envs, np.float32)
        actions = actions.clip(-1, 1)
        for _ in range(self.action_repeat):  # divides an episode's length
            steps = [env.step(action) for env, action in zip(self.envs, actions)]
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


def pop_ended(envs):
    """Mean return and number of the episodes that ended since the last call. Those that end are the
    short ones: mean_return() is fair.
    """
    returns = [episode_return for _, episode_return in envs.finished]
    envs.finished.clear()
    return float(np.mean(returns)) if returns else float("nan"), len(returns)


def mean_return(recording, act, num_episodes, seed):
    """Of whole episodes, all at once; act: obs uint8 [B, S, S, 3], or states float32 [B, D] if the
    recording's frame_size is 0 -> actions float [B, A].
    """
    envs = ControlEnvs(recording, num_episodes, seed)
    returns = common.play_episodes(envs, act, 1)
    envs.close()
    return returns.mean().item()


# --- expert ---------------------------------------------------------------------------------------


def orthogonal(inputs, outputs, gain):
    """A linear layer with orthogonal weights and biases of 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ExpertPolicy(nn.Module):
    """Gaussian actor and critic on the true state, which is standardized by running averages."""

    def __init__(self, state_dim, num_actions, hidden):
        super().__init__()
        self.actor = nn.Sequential(
            orthogonal(state_dim, hidden, 2**0.5),
            nn.Tanh(),
            orthogonal(hidden, hidden, 2**0.5),
            nn.Tanh(),
            orthogonal(hidden, num_actions, 0.01),
        )
        self.critic = nn.Sequential(
            orthogonal(state_dim, hidden, 2**0.5),
            nn.Tanh(),
            orthogonal(hidden, hidden, 2**0.5),
            nn.Tanh(),
            orthogonal(hidden, 1, 1.0),
        )
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


def ppo_loss(distribution, values, batch, args):
    """PPO's loss (Schulman et al. 2017) on a minibatch. distribution of actions (B, A), values
    (B,); batch: actions (B, A), and logprobs of the rollout, advantages, targets, all (B,).
    """
    logprobs = distribution.log_prob(batch["actions"]).sum(-1)
    ratio = (logprobs - batch["logprobs"]).exp()
    # the policy gains nothing from a ratio beyond the clip
    advantages = batch["advantages"]
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped_ratio = ratio.clamp(1 - args.clip, 1 + args.clip)
    policy_loss = -torch.min(advantages * ratio, advantages * clipped_ratio).mean()
    value_loss = (values - batch["targets"]).pow(2).mean()
    return policy_loss + 0.5 * value_loss


def ppo_update(policy, optimizer, rollout, inputs, args):
    """Epochs of minibatches over a rollout: what ppo_loss() needs, and what the policy sees, of
    which `inputs` are the names; all (T, B, ...). Returns the last loss.
    """
    steps = {name: x.flatten(0, 1) for name, x in rollout.items()}
    num_steps = len(steps["actions"])
    for _ in range(args.epochs):
        order = torch.randperm(num_steps, device=steps["actions"].device)
        for rows in order.tensor_split(args.minibatches):
            batch = {name: x[rows] for name, x in steps.items()}
            distribution, values = policy(*[batch[name] for name in inputs])
            loss = ppo_loss(distribution, values, batch, args)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            optimizer.step()
    return loss


def check_minibatches(args):
    if args.num_envs * args.rollout_steps // args.minibatches < 2:
        common.fail(f"--minibatches {args.minibatches} leaves less than 2 steps in each")


def train_expert(args, recording, path):
    """Trains an ExpertPolicy with PPO on states; writes it to `path`."""
    check_minibatches(args)
    common.lock(path)
    T, B = args.rollout_steps, args.num_envs
    seed = common.derive_seed(args.seed, "expert")
    envs = ControlEnvs(recording | dict(frame_size=0), B, seed)
    D, A = envs.states.shape[1], envs.num_actions
    config = dict(state_dim=D, num_actions=A, hidden=args.hidden)
    policy = ExpertPolicy(**config)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.expert_lr, eps=1e-5, fused=True)
    normalize_rewards = common.RewardNormalizer(B, args.gamma)

    # a rollout: T steps of B environments
    states = torch.zeros((T, B, D))
    actions = torch.zeros((T, B, A))
    logprobs = torch.zeros((T, B))
    rewards = torch.zeros((T, B))
    dones = torch.zeros((T, B))
    values = torch.zeros((T + 1, B))  # the last row: of the state after the rollout

    rollout_size = T * B * args.action_repeat  # in steps of the suite
    num_updates = max(1, args.expert_steps // rollout_size)
    state_path = path.with_name(f"{path.stem}_state.pt")
    log = common.MetricsLog(path.with_suffix(".csv"), num_updates * rollout_size, "step")
    resumable = dict(policy=policy, optimizer=optimizer)
    resumable |= dict(normalize_rewards=normalize_rewards, log=log)
    start, _ = common.load_state(state_path, args, resumable)
    normalize_rewards.discounted[:] = 0  # episodes start again
    for update in range(start // rollout_size + 1, num_updates + 1):
        # play: sample an action from pi(state), step the environments, scale the reward
        with torch.no_grad():
            for t in range(T):
                states[t] = torch.from_numpy(envs.states)
                distribution, values[t] = policy(states[t])
                actions[t] = distribution.sample()
                logprobs[t] = distribution.log_prob(actions[t]).sum(-1)
                _, reward, done = envs.step(actions[t].numpy())
                rewards[t] = torch.from_numpy(normalize_rewards(reward, done))
                dones[t] = torch.from_numpy(done)
                if done.any():  # time ended the episode: what would have followed still counts
                    _, final_value = policy(torch.from_numpy(envs.final_states))
                    rewards[t] += args.gamma * final_value * dones[t]
            _, values[T] = policy(torch.from_numpy(envs.states))

        # learn: advantages of these actions, then epochs of minibatches
        optimizer.param_groups[0]["lr"] = args.expert_lr * (1 - (update - 1) / num_updates)
        advantages, targets = compute_gae(rewards, values, dones, args.gamma, args.gae_lambda)
        rollout = dict(states=states, actions=actions, logprobs=logprobs)
        rollout |= dict(advantages=advantages, targets=targets)
        loss = ppo_update(policy, optimizer, rollout, ["states"], args)
        # running means of all states so far, after the update: logprobs were made with these
        seen = states.flatten(0, 1)
        policy.mean.lerp_(seen.mean(0), 1 / update)
        policy.square.lerp_(seen.square().mean(0), 1 / update)
        log.bar.update(rollout_size)

        # log, save
        env_step = update * rollout_size
        if update % 20 == 0 or update == num_updates:
            common.check_finite(env_step, path, policy)
            train_return, _ = pop_ended(envs)
            std = policy.log_std.exp().mean()
            log.write(env_step=env_step, mean_return=train_return, std=std, loss=loss)
            if update < num_updates:
                common.save_state(state_path, args, env_step, resumable)
    log.bar.close()
    common.save_checkpoint(
        path,
        kind="dmc_expert",
        game=args.game,
        env_step=env_step,
        mean_return=train_return,
        recording=recording,
        config=config,
        policy=policy.state_dict(),
    )
    state_path.unlink(missing_ok=True)
    envs.close()


def load_expert(args, recording):
    """An ExpertPolicy; it is trained first if there is none."""
    path = args.experts_dir / f"{args.game}_x{args.action_repeat}.pt"
    if not path.exists():
        print(f"expert: PPO on {args.game} for {args.expert_steps:,} steps, to {path}")
        train_expert(args, recording, path)
    expert = common.load_checkpoint(path, "dmc_expert", args.game)
    policy = ExpertPolicy(**expert["config"])
    policy.load_state_dict(expert["policy"])
    print(f"expert: {path}, trained for {expert['env_step']:,} steps")
    return policy.requires_grad_(False)


# --- recording ------------------------------------------------------------------------------------


@torch.no_grad()
def record_shard(shard, folder, recording, policy):
    """Records the B episodes of a shard, which step together; policy None: random actions.

    shard: its number and B. Returns the episodes' returns, float32 [B].
    """
    number, B = shard
    seed = common.derive_seed(recording["seed"], f"{recording['split']} {number}")
    generator = torch.Generator().manual_seed(common.derive_seed(seed, "actions"))
    envs = ControlEnvs(recording, B, seed)
    T = recording["episode_steps"] // recording["action_repeat"]
    A = envs.num_actions
    obs = np.zeros((B, T, *envs.obs.shape[1:]), np.uint8)
    first = np.zeros((B, T), bool)
    first[:, 0] = True
    action = np.zeros((B, T, A), np.float32)
    noise = np.zeros((B, T, A), np.float32)
    reward = np.zeros((B, T), np.float32)
    for t in range(T):
        obs[:, t] = envs.obs
        if policy is None:  # uniform actions; all of them is noise
            noise[:, t] = 2 * torch.rand((B, A), generator=generator) - 1
            action[:, t] = noise[:, t]
        else:
            # the mean action or a sample of the policy, plus noise
            distribution, _ = policy(torch.from_numpy(envs.states))
            unit_sample, unit_noise = torch.randn((2, B, A), generator=generator)
            noisy = distribution.mean + recording["noise"] * unit_noise
            if not recording["mean_action"]:
                noisy = noisy + distribution.stddev * unit_sample
            noise[:, t] = noisy - distribution.mean
            action[:, t] = noisy.clamp(-1, 1)
        _, reward[:, t], _ = envs.step(action[:, t])
    envs.close()
    frames = dict(obs=obs, first=first)
    labels = dict(action=action, reward=reward, noise=noise)
    for name, arrays in dict(frames=frames, labels=labels).items():
        arrays = {key: x.reshape(B * T, *x.shape[2:]) for key, x in arrays.items()}
        common.save_npz(folder / f"{name}_{number:03d}.npz", recording, **arrays)
    return reward.sum(1)


def record(recording, policy, num_episodes, folder):
    """Records whole episodes, EPISODES_PER_SHARD in a shard, a shard on each core; the files do not
    depend on the number of cores. The folder appears when complete.
    """
    starts = range(0, num_episodes, EPISODES_PER_SHARD)
    shards = [(i, min(EPISODES_PER_SHARD, num_episodes - x)) for i, x in enumerate(starts)]
    bar = common.progress_bar(num_episodes, "episode", folder.name)
    returns = []
    with common.new_folder(folder) as part:
        # the workers of a DataLoader record; on one core, this process does
        arguments = dict(folder=part, recording=recording, policy=policy)
        options = dict(collate_fn=functools.partial(record_shard, **arguments))
        workers = min(common.NUM_CORES, len(shards))
        if workers > 1:  # forked workers would share this process's EGL display
            options |= dict(num_workers=workers, multiprocessing_context="spawn")
        for shard_returns in torch.utils.data.DataLoader(shards, batch_size=None, **options):
            returns += list(shard_returns)
            bar.update(len(shard_returns))
    bar.close()
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    mean = np.mean(returns)
    print(f"{folder.name}: {num_episodes} episodes, mean return {mean:.1f}, {size:,.0f} MB")


def main(args):
    sizes = dict(train=args.train_episodes, test=args.test_episodes, random=args.random_episodes)
    folders = {split: args.data_dir / args.game / split for split in sizes}
    for folder in folders.values():
        if folder.exists() and not args.expert_only:
            common.fail(f"{folder} is there already; remove it, or choose another --data-dir")
    pick_renderer()
    torch.manual_seed(args.seed)
    recording = dict(
        game=args.game,
        plain=args.plain,
        gray_stack=args.gray_stack,
        action_repeat=args.action_repeat,
        episode_steps=EPISODE_STEPS,
    )
    policy = load_expert(args, recording)
    if args.expert_only:
        return

    # --- mean returns of the expert, without noise, and of random actions go into the files
    def act(states):
        distribution, _ = policy(torch.from_numpy(states))
        return distribution.mean.numpy()

    rng = np.random.default_rng(args.seed)

    def act_randomly(states):
        return rng.uniform(-1, 1, (len(states), len(policy.log_std)))

    for name, player in dict(expert=act, random=act_randomly).items():
        seed = common.derive_seed(args.seed, name)
        unseen = recording | dict(frame_size=0)
        recording[f"{name}_return"] = mean_return(unseen, player, EPISODES_PER_SHARD, seed)
        print(f"mean return, {name}: {recording[f'{name}_return']:.1f}")

    # --- record
    recording |= dict(
        frame_size=args.frame_size,
        seed=args.seed,
        noise=args.noise,
        mean_action=args.mean_action,
        expert=common.fingerprint(policy),
    )
    for split, folder in folders.items():
        player = None if split == "random" else policy
        record(recording | dict(split=split), player, sizes[split], folder)
    common.print_next("train_latent_dynamics.py", args, "--no-vq")


if __name__ == "__main__":
    common.run(main, Args)
