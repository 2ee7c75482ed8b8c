r"""Data: train a PPO expert on a Procgen game and record its play as video (paper, section 5).

The expert is PPO as in Cobbe et al. 2020; its sampled actions are recorded. Frames and labels are
different files, so that stages 1 and 2 are action-free by construction. A small third split records
uniformly random actions, on which stage 1 probes its latent actions.

reads   experts/<game>.pt, if it is there
writes  otherwise experts/<game>.pt and runs/<game>/expert.csv; data/<game>/{train,test,random}/
        frames_NNN.npz and labels_NNN.npz

paper scale     python collect_data.py --game bigfish
on a CPU        python collect_data.py --game miner --solver --plain --frame-size 32 \
                    --train-frames 131_072 --test-frames 16_384
                python collect_data.py --game miner --plain --frame-size 32 \
                    --train-frames 262_144 --experts-dir experts/plain_32x32    # a PPO expert
PPO from scratch (6.1)
                python collect_data.py --game bigfish --train-frames 0 --expert-steps 4_000_000 \
                    --expert-multiplier 4 --runs-dir runs/scratch --experts-dir runs/scratch/experts
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common  # before torch
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from experts.solvers import RANDOM_ACTIONS, Solver

EPISODES_PER_GAME = 4  # for the mean returns of expert and random policy


@dataclass
class Args(common.RunArgs):
    resume: bool = False
    """Continue the run that was stopped, or start one if there is none."""
    experts_dir: Path = Path("experts")
    """If <experts-dir>/<game>.pt exists, it is recorded; otherwise it is trained first. One that
    was trained with --plain can play while default pictures are recorded."""

    train_frames: int = 8_000_000
    """Frames to record for training (section 5: about 8M); 0 trains the expert only."""
    test_frames: int = 100_000
    """Frames of other seeds, and of the next levels if --num-levels is set, for evaluation."""
    random_frames: int = 32_768
    """Frames of uniformly random play, on the same levels as the test frames."""
    frame_size: Literal[64, 32, 16] = 64
    """Side of the frames in pixels; below 64 (the paper's), means of blocks."""
    num_levels: int = 0
    """Train frames are of levels 0 .. n - 1, on which later stages play as well, test and random
    frames of the next n; 0 means all levels (the paper's)."""
    plain: bool = False
    """No backgrounds, one theme, monochrome assets: the same games and rules, in plain pictures in
    which actions are a larger part of what changes. For laptops, not in the paper."""
    one_theme: bool = False
    """One theme for each game, with backgrounds and sprites."""
    solver: bool = False
    """Record a solver in place of a PPO expert: maze, heist, miner, plunder, and with --one-theme
    or --plain bigfish. 10 to 50% of its actions are random (experts/solvers.py)."""
    random_play: bool = False
    """Record uniformly random actions in every split; no expert is needed."""

    expert_steps: int = 25_000_000
    """Environment steps of PPO (Cobbe et al.; section 5 says 50M, 6.1 says 25M)."""
    log_every_steps: int = 100_000
    """Environment steps between evaluations, points of the curve and saved states. Where episodes
    last 1,000 steps, an evaluation of 64 games plays 64,000 steps more."""
    eval_episodes: int = 64
    """Episodes of an evaluation, one in each of as many games."""
    expert_multiplier: float = 1
    """Multiplies the expert's IMPALA channels 16, 32, 32 (Cobbe et al.)."""
    num_envs: int = 64
    """Games that step together."""
    rollout_steps: int = 256
    """Steps of each game between updates."""
    minibatches: int = 8
    """Minibatches per epoch."""
    epochs: int = 3
    """Passes over a rollout."""
    expert_lr: float = 5e-4
    """Learning rate of Adam, constant."""
    gamma: float = 0.999
    """Discount."""
    gae_lambda: float = 0.95
    """Lambda of generalized advantage estimation."""
    clip: float = 0.2
    """Clips the probability ratio and the value's change."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Clips the gradient's norm."""


# --- networks -------------------------------------------------------------------------------------
# Copies of train_latent_dynamics.py; tests/test_copies.py keeps them equal.


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


class ExpertPolicy(nn.Module):
    """Actor and critic on one IMPALA-CNN with a hidden layer of 256 (Cobbe et al. 2020)."""

    def __init__(self, frame_size, multiplier):
        super().__init__()
        self.cnn = ImpalaCNN(3, frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.actor = nn.Linear(256, common.NUM_ACTIONS)
        self.critic = nn.Linear(256, 1)
        nn.init.orthogonal_(self.actor.weight, 0.01)  # actions start near uniform
        nn.init.orthogonal_(self.critic.weight, 1.0)
        nn.init.zeros_(self.actor.bias)
        nn.init.zeros_(self.critic.bias)

    def forward(self, obs):
        """uint8 (B, S, S, 3) -> logits (B, 15), value (B,)"""
        x = common.to_input(obs[:, None])  # (B, 3, S, S)
        h = F.relu(self.hidden(self.cnn(x)))  # (B, 256)
        return self.actor(h), self.critic(h)[:, 0]


# --- PPO ------------------------------------------------------------------------------------------


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
    """Epochs of minibatches over a rollout: obs (T, B, S, S, 3) and what ppo_loss() needs (T, B).
    Returns the metrics of the last minibatch.
    """
    steps = {name: x.flatten(0, 1) for name, x in rollout.items()}
    num_steps = len(steps["actions"])
    for _ in range(args.epochs):
        order = torch.randperm(num_steps, generator=generator, device=generator.device)
        for rows in order.tensor_split(args.minibatches):
            batch = {name: x[rows] for name, x in steps.items()}
            logits, values = policy(batch["obs"])
            loss, metrics = ppo_loss(logits, values, batch, args)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            optimizer.step()
    return metrics


# --- the expert -----------------------------------------------------------------------------------


def train_expert(args, settings, device, path):
    """Trains an ExpertPolicy with PPO; writes it, in half precision, to `path`."""
    run = args.runs_dir / args.game
    common.lock(run / "expert.csv")
    common.lock(path)
    policy = ExpertPolicy(args.frame_size, args.expert_multiplier)
    policy.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.expert_lr, eps=1e-5, fused=True)
    seed = common.derive_seed(args.seed, "train expert")
    eval_seed = common.derive_seed(args.seed, "evaluation actions")
    envs = common.ProcgenEnvs(settings, args.num_envs, seed)
    generator = torch.Generator(device).manual_seed(seed)
    normalize_rewards = common.RewardNormalizer(args.num_envs, args.gamma)

    # a rollout: T steps of B games
    T, B, S = args.rollout_steps, args.num_envs, args.frame_size
    obs = torch.zeros((T, B, S, S, 3), dtype=torch.uint8, device=device)
    actions = torch.zeros((T, B), dtype=torch.long, device=device)
    logprobs = torch.zeros((T, B), device=device)
    rewards = torch.zeros((T, B), device=device)
    dones = torch.zeros((T, B), dtype=torch.bool, device=device)
    values = torch.zeros((T + 1, B), device=device)  # the last row: of the frame after the rollout

    num_updates = max(1, args.expert_steps // (T * B))
    log = common.MetricsLog(run / "expert.csv", num_updates * T * B, "step")
    resumable = dict(policy=policy, optimizer=optimizer, envs=envs, generator=generator)
    resumable |= dict(normalize_rewards=normalize_rewards, log=log)
    start, _ = common.load_state(run / "expert_state.pt", args, resumable)
    for update in range(start // (T * B) + 1, num_updates + 1):
        # play: sample an action from pi(o_t), step the games, scale the reward
        with torch.no_grad():
            for t in range(T):
                obs[t] = torch.from_numpy(envs.obs)
                logits, values[t] = policy(obs[t])
                actions[t] = common.sample_actions(logits, generator)
                logprobs[t] = logits.log_softmax(-1).gather(1, actions[t, :, None])[:, 0]
                _, reward, done = envs.step(actions[t].cpu().numpy())
                rewards[t] = torch.from_numpy(normalize_rewards(reward, done))
                dones[t] = torch.from_numpy(done)
            _, values[T] = policy(torch.from_numpy(envs.obs).to(device))

        # learn: advantages of these actions, then epochs of minibatches
        advantages, targets = compute_gae(rewards, values, dones, args.gamma, args.gae_lambda)
        rollout = dict(obs=obs, actions=actions, logprobs=logprobs, values=values[:T])
        rollout |= dict(advantages=advantages, targets=targets)
        metrics = ppo_update(policy, optimizer, rollout, args, generator)
        log.bar.update(T * B)

        # at the first update past each multiple of --log-every-steps: evaluate on whole episodes
        env_step = update * T * B
        if env_step % args.log_every_steps < T * B or update == num_updates:
            common.check_finite(env_step, path, policy)
            act = common.make_player(lambda obs: policy(obs)[0], device, eval_seed)
            metrics["eval_return"] = common.evaluation_returns(settings, act, args).mean()
            log.write(env_step=env_step, **metrics)
            common.save_state(run / "expert_state.pt", args, env_step, resumable)
    log.bar.close()
    common.save_checkpoint(
        path,
        kind="expert",
        game=args.game,
        env_step=num_updates * T * B,
        recording=settings,
        multiplier=args.expert_multiplier,
        policy={name: weight.half() for name, weight in policy.state_dict().items()},
    )


def load_expert(args, settings, device):
    """The expert's policy, and whether it reads plain pictures; it is trained first if there is
    none.
    """
    path = args.experts_dir / f"{args.game}.pt"
    if not path.exists():
        print(f"expert: PPO on {args.game} for {args.expert_steps:,} steps on {device}, to {path}")
        train_expert(args, settings, device, path)
    expert = common.load_checkpoint(path, "expert", args.game)
    for name, value in settings.items():
        found = expert["recording"].get(name)
        reads_plain = name == "plain" and found and args.train_frames > 0
        if found != value and not reads_plain:
            common.fail(f"{path} was trained with {name} {found}, not {value}; see --experts-dir")
    policy = ExpertPolicy(args.frame_size, expert["multiplier"])
    policy.load_state_dict(expert["policy"])
    policy.to(device, memory_format=torch.channels_last).eval()
    print(f"expert: {path}, trained for {expert['env_step']:,} steps")
    return policy, expert["recording"]["plain"]


# --- recording ------------------------------------------------------------------------------------


def play_shards(args, recording, act, reads_plain, num_frames, split):
    """Yields shards of num_envs streams x rollout_steps frames, one stream after the other: two
    dicts, frames and labels, of arrays [N, ...]. act: obs uint8 [B, S, S, 3] -> actions int [B].

    A solver reads plain pictures at 64x64, and an expert may read plain ones, too. Default pictures
    are recorded from a second set of games with the same seed, which take the same actions.
    """
    seed = common.derive_seed(args.seed, split)
    envs = common.ProcgenEnvs(recording, args.num_envs, seed)
    solves = args.solver and split != "random"
    plain_envs = envs
    if reads_plain and split != "random" and not args.plain:
        plain_envs = common.ProcgenEnvs(recording | dict(plain=True), args.num_envs, seed)
    B, S = args.num_envs, args.frame_size
    length = -(-num_frames // B)  # of each stream
    for start in range(0, length, args.rollout_steps):
        T = min(args.rollout_steps, length - start)
        obs = np.zeros((B, T, S, S, 3), np.uint8)
        first = np.zeros((B, T), bool)
        first[:, 0] = True  # a stream starts: its past is in another shard
        action = np.zeros((B, T), np.uint8)
        reward = np.zeros((B, T), np.float32)
        for t in range(T):
            obs[:, t] = envs.obs
            played = act(plain_envs.rendered if solves else plain_envs.obs)
            # a solver that gives up plays RESET, which ends the episode and is no action; its label
            # is NOOP, and no window contains that step
            action[:, t] = np.where(played == common.RESET, common.NOOP, played)
            _, step_reward, done = envs.step(played)
            reward[:, t] = step_reward
            if t + 1 < T:
                first[:, t + 1] = done
            if plain_envs is not envs:
                _, plain_reward, plain_done = plain_envs.step(played)
                if (plain_reward != step_reward).any() or (plain_done != done).any():
                    common.fail(f"{args.game} plays differently in plain pictures; try --one-theme")
        frames = dict(obs=obs.reshape(-1, S, S, 3), first=first.reshape(-1))
        yield frames, dict(action=action.reshape(-1), reward=reward.reshape(-1))


def record(args, recording, act, reads_plain, num_frames, folder):
    """Records shards of frames and labels; the folder appears when it is complete."""
    shards = play_shards(args, recording, act, reads_plain, num_frames, folder.name)
    bar = common.progress_bar(num_frames, "frame", folder.name)
    with common.new_folder(folder) as part:

        def save(numbered_shard):
            number, (frames, labels) = numbered_shard
            common.save_npz(part / f"frames_{number:03d}.npz", recording, **frames)
            common.save_npz(part / f"labels_{number:03d}.npz", recording, **labels)
            return len(frames["first"])

        for saved in common.in_background(save, enumerate(shards)):
            bar.update(saved)
    bar.close()
    print(f"{folder.name}: {bar.n:,} frames in {folder}")


def splits_to_record(args, settings):
    """{split: recording} of the splits that are not there yet."""
    sizes = dict(train=args.train_frames, test=args.test_frames, random=args.random_frames)
    splits = {}
    for split, num_frames in sizes.items():
        if num_frames == 0:
            continue
        recording = settings | dict(
            start_level=0 if split == "train" else args.num_levels,  # the next n; 0: all levels
            split=split,
            seed=args.seed,
            solver=args.solver,
            random_actions=RANDOM_ACTIONS.get(args.game) if args.solver else None,
            random_play=args.random_play,
            num_frames=num_frames,
        )
        folder = args.data_dir / args.game / split
        if not folder.exists():
            splits[split] = recording
            continue
        _, _, found = common.read_frames(common.list_shards(folder)[0], args.game)
        for name, value in recording.items():
            if found.get(name) != value:
                differs = f"{name} {found.get(name)}, not {value}"
                common.fail(f"{folder} was recorded with {differs}; remove it to record it again")
        if not args.resume:  # it may be another expert's
            common.fail(f"{folder} is there already; remove it, or --resume to keep it")
        print(f"{split}: {folder} is complete")
    return splits


def main(args):
    device = common.pick_device(args)
    common.check_game(args.game)
    torch.manual_seed(args.seed)
    if args.num_envs * args.rollout_steps // args.minibatches < 2:
        common.fail(f"--minibatches {args.minibatches} leaves less than 2 steps in each")
    if args.solver and args.random_play:
        common.fail("--solver or --random-play: choose one")
    if (args.solver or args.random_play) and args.train_frames == 0:
        common.fail("--train-frames 0 trains an expert only, without --solver or --random-play")
    settings = dict(
        game=args.game,
        frame_size=args.frame_size,
        num_levels=args.num_levels,
        start_level=0,
        plain=args.plain,
        one_theme=args.one_theme,
    )
    if args.train_frames == 0:
        load_expert(args, settings, device)
        return
    splits = splits_to_record(args, settings)
    if not splits:
        return
    expert, reads_plain = None, args.solver
    if not args.solver and not args.random_play:
        expert, reads_plain = load_expert(args, settings, device)

    def make_act(purpose):
        """obs uint8 [B, S, S, 3] -> actions int [B]; random numbers of its own for each purpose."""
        seed = common.derive_seed(args.seed, f"act {purpose}")
        if purpose == "random" or args.random_play:
            rng = np.random.default_rng(seed)
            return lambda obs: rng.integers(common.NUM_ACTIONS, size=len(obs))
        if args.solver:
            return Solver(args.game, seed)
        return common.make_player(lambda obs: expert(obs)[0], device, seed)

    # --- mean returns of expert and random policy go into the files, for the plots
    def mean_return(purpose):
        view = {}
        if reads_plain and purpose == "expert":
            view = dict(plain=True, frame_size=64 if args.solver else args.frame_size)
        seed = common.derive_seed(args.seed, purpose)
        envs = common.ProcgenEnvs(settings | view, args.num_envs, seed)
        return common.play_episodes(envs, make_act(purpose), EPISODES_PER_GAME).mean().item()

    paper = common.GAMES[args.game]
    returns = dict(random_return=paper.random_return)
    if args.num_levels:  # the paper's number is of all levels
        returns["random_return"] = mean_return("random")
    returns["expert_return"] = returns["random_return"]
    if not args.random_play:
        returns["expert_return"] = mean_return("expert")
    print(
        f"mean return: expert {returns['expert_return']:.2f}, random policy "
        f"{returns['random_return']:.2f}; the paper's expert {paper.expert_return:.2f}"
    )

    # --- record
    args.data_dir.mkdir(parents=True, exist_ok=True)
    for split, recording in splits.items():
        size = recording["num_frames"] * 3 * args.frame_size**2 / 1e9
        free = shutil.disk_usage(args.data_dir).free / 1e9
        warning = "warning: the disk may be too small; " if free < size / 2 else ""
        print(f"{split}: {warning}{size:.2g} GB, on disk 2 to 50 times less; {free:.0f} GB free")
        folder = args.data_dir / args.game / split
        num_frames = recording["num_frames"]
        record(args, recording | returns, make_act(split), reads_plain, num_frames, folder)
    common.print_next("train_latent_dynamics.py", args)


if __name__ == "__main__":
    common.run(main, Args)
