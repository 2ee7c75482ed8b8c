"""What stands beside LAPO in decode_offline.py: cloning the labels alone, VPT style, LAPO+. On toys whose actions are known."""

import json

import numpy as np
import pytest
import torch
from conftest import toy_video

import common
import decode_offline as offline


def places_video(count, seed):
    """Frames uint8 [N, 16, 16, 3] and the action that each calls for: in which of 15 places the bright square is.

    Noise, and a square of another colour at random, so that a few frames do not tell what to look at.
    """
    rng = np.random.default_rng(seed)
    obs = rng.integers(0, 120, (count, 16, 16, 3), dtype=np.uint8)
    action = rng.integers(0, 15, count)
    for frame, place in zip(obs, action):
        for square, colour in ((rng.integers(0, 16), (0, 0, 255)), (place, (255, 255, 0))):
            y, x = 4 * (square // 4) + rng.integers(0, 2), 4 * (square % 4) + rng.integers(0, 2)
            frame[y : y + 3, x : x + 3] = colour
    return torch.from_numpy(obs), torch.from_numpy(action)


def new_policies(count):
    torch.manual_seed(0)
    return [offline.ActionPolicy(16, 0.25) for _ in range(count)]


def share_right(network, inputs, actions):
    return float((offline.in_batches(network, inputs.numpy(), "cpu").argmax(1) == actions).float().mean())


def test_an_action_policy_is_the_latent_policy_with_15_outputs():
    networks = offline.ActionPolicy(64, 1), offline.LatentPolicy(64, 1, 15)
    shapes = [{name: weight.shape for name, weight in network.state_dict().items()} for network in networks]
    assert shapes[0] == shapes[1]
    assert offline.ActionPolicy(16, 0.25)(torch.zeros(2, 16, 16, 3, dtype=torch.uint8)).shape == (2, 15)


def test_cloning_many_labels_finds_the_action_and_cloning_16_does_not():
    obs, actions = places_video(2048, seed=1)
    policies = new_policies(2)
    batches = offline.labelled_batches(obs[None], actions[None], torch.tensor([16, 2048]), 64, "cpu", seed=0)
    offline.train(policies, batches, 250, 3e-3, 0.05, "bc")
    few, many = (share_right(policy, *places_video(500, seed=2)) for policy in policies)
    assert few < 0.4 and many > 0.95, (few, many)


def test_an_idm_with_enough_labels_tells_what_one_frame_cannot():
    """In the toy video actions are random: only the change between two frames tells them."""

    def windows(episodes, seed):
        obs, first, action, _ = toy_video(episodes, 16, seed, frame_size=16, grid=4)
        rows = np.flatnonzero(common.valid_windows(first, 1))
        return torch.from_numpy(obs[rows[:, None] + np.arange(-1, 2)]), torch.from_numpy(action[rows]).long()

    train_windows, actions = windows(150, seed=1)
    torch.manual_seed(0)
    idms = [offline.IDM(16, 1, 0.5, 15) for _ in range(2)]
    batches = offline.labelled_batches(train_windows[None], actions[None], torch.tensor([16, len(actions)]), 64, "cpu", seed=0)
    offline.train(idms, batches, 300, 3e-3, 0.05, "idm")
    test_windows, test_actions = windows(30, seed=2)
    few, many = (share_right(idm, test_windows, test_actions) for idm in idms)
    assert few < 0.6 and many > 0.9, (few, many)


class FakeStore:
    """Windows of the places video; z_t is the action's row of `centres`, as a perfect IDM could have it."""

    context = 1

    def __init__(self, centres):
        self.centres, self.generator = centres, torch.Generator().manual_seed(0)
        self.obs, self.actions = places_video(2048, seed=1)

    def sample_windows(self, batch):
        rows = torch.randint(len(self.obs), (batch,), generator=self.generator)
        after = torch.full_like(self.obs[rows], 7) + self.actions[rows, None, None, None].to(torch.uint8)  # tells the action
        return torch.stack([torch.zeros_like(after), self.obs[rows], after], 1)

    def sample_latents(self, batch):
        rows = torch.randint(len(self.obs), (batch,), generator=self.generator)
        return self.obs[rows], self.centres[self.actions[rows]]


class PerfectIDM(torch.nn.Module):
    """Reads the action off o_{t+1}; `shift` makes one that calls all actions by another name."""

    def __init__(self, shift=0):
        super().__init__()
        self.shift = shift

    def forward(self, windows):
        assert windows.shape[1:] == (3, 16, 16, 3)
        return 20.0 * torch.nn.functional.one_hot((windows[:, 2, 0, 0, 0].long() - 7 + self.shift) % 15, 15)


def test_vpt_clones_what_its_own_idm_says():
    policies = new_policies(2)
    batches = offline.vpt_batches(FakeStore(torch.zeros(15, 1)), [PerfectIDM(), PerfectIDM(shift=1)], 64)
    offline.train(policies, batches, 250, 3e-3, 0.0, "vpt")
    obs, actions = places_video(500, seed=2)
    assert share_right(policies[0], obs, actions) > 0.95
    assert share_right(policies[1], obs, (actions + 1) % 15) > 0.95


def test_lapo_plus_clones_what_its_own_decoder_says():
    torch.manual_seed(1)
    centres = torch.randn(15, 8)
    actions = torch.arange(15).repeat(2, 20)
    bank = offline.DecoderBank([offline.ActionDecoder(8) for _ in range(2)])
    wrong = torch.stack([actions[0], (actions[1] + 1) % 15])  # the second was taught all actions by another name
    generator = torch.Generator().manual_seed(0)
    offline.fit_decoders(bank, centres[actions], wrong, torch.tensor([300, 300]), 200, 64, 3e-3, 0.05, generator)
    policies = new_policies(2)
    offline.train(policies, offline.lapo_plus_batches(FakeStore(centres), bank, 64), 250, 3e-3, 0.0, "lapo_plus")
    obs, true = places_video(500, seed=2)
    assert share_right(policies[0], obs, true) > 0.95
    assert share_right(policies[1], obs, (true + 1) % 15) > 0.95


def test_soft_labels_are_probabilities_without_gradients():
    labels = offline.soft_labels(new_policies(1)[0], torch.zeros(3, 16, 16, 3, dtype=torch.uint8))
    assert not labels.requires_grad
    torch.testing.assert_close(labels.sum(1), torch.ones(3))
    bank = offline.DecoderBank([offline.ActionDecoder(8) for _ in range(2)])
    _, labels = next(next(offline.lapo_plus_batches(FakeStore(torch.randn(15, 8)), bank, 4)))
    assert labels.shape == (4, 15) and not labels.requires_grad


def test_networks_trained_in_step_end_as_each_alone():
    obs, actions = places_video(100, seed=1)
    obs, actions, num_labels = obs.view(2, 50, 16, 16, 3), actions.view(2, 50), torch.tensor([8, 8, 50, 50])
    together = new_policies(4)
    offline.train(together, offline.labelled_batches(obs, actions, num_labels, 16, "cpu", seed=0), 5, 1e-3, 0.05, "all")
    batches = offline.labelled_batches(obs, actions, num_labels, 16, "cpu", seed=0)
    recorded = [list(next(batches)) for _ in range(5)]
    for d, alone in enumerate(new_policies(4)):
        optimizer = torch.optim.Adam(alone.parameters())
        for step, batch in enumerate(recorded):
            optimizer.param_groups[0]["lr"] = 1e-3 * np.interp(step, [0, 5 / 60, 5], [0.01, 1, 0])
            optimizer.zero_grad()
            frames, target = batch[d]
            torch.nn.functional.cross_entropy(alone(frames), target, label_smoothing=0.05).backward()
            optimizer.step()
        for one, other in zip(alone.parameters(), together[d].parameters()):
            torch.testing.assert_close(one, other)


def test_each_network_sees_its_own_seeds_first_labels():
    frames = torch.arange(2 * 50).view(2, 50, 1)  # tells its seed and row
    batches = offline.labelled_batches(frames, frames[..., 0], torch.tensor([8, 8, 50, 50]), 16, "cpu", seed=0)
    seen = [set() for _ in range(4)]
    for _, batch in zip(range(40), batches):
        for network, (inputs, target) in enumerate(batch):
            assert len(inputs) == min(16, (8, 8, 50, 50)[network]) and torch.equal(inputs[:, 0], target)
            seen[network] |= set(target.tolist())
    assert seen == [set(range(8)), set(range(50, 58)), set(range(50)), set(range(50, 100))]


@pytest.fixture
def shards(tmp_path):
    """Two shards whose pixels and actions tell shard and row, with latents of context 2."""
    settings = json.dumps(dict(game="maze", start_level=0, num_levels=0, seed=0))
    for shard in range(2):
        obs = np.broadcast_to((100 * shard + np.arange(40, dtype=np.uint8))[:, None, None, None], (40, 16, 16, 3))
        first = np.arange(40) % 13 == 0
        common.save_npz(tmp_path / f"frames_{shard:03d}.npz", obs=obs, first=first, settings=settings)
        action = (np.arange(40) % 15).astype(np.uint8)
        common.save_npz(tmp_path / f"labels_{shard:03d}.npz", action=action, reward=np.zeros(40, np.float32), expert_return=1.0)
        valid = common.valid_windows(first, 2)
        z = (100 * shard + np.arange(40))[:, None].astype(np.float16)
        common.save_npz(tmp_path / f"latents_{shard:03d}.npz", z=z, codes=np.zeros((40, 1), np.uint8), valid=valid, dynamics="abc")
    return tmp_path


def test_windows_belong_to_the_labelled_rows(shards):
    z, actions, places = offline.load_labelled(shards, shards, "maze", "abc", 50, seed=3)
    windows = offline.load_windows(shards, "maze", 2, 16, places)
    assert windows.shape == (50, 4, 16, 16, 3) and set(places[:, 0]) == {0, 1}
    assert np.array_equal(windows[:, :, 0, 0, 0], z + np.array([-2, -1, 0, 1]))  # o_{t-2} .. o_{t+1}
    assert np.array_equal(actions, places[:, 1] % 15)


def test_windows_of_other_frames_are_one_line(shards):
    *_, places = offline.load_labelled(shards, shards, "maze", "abc", 50, seed=3)
    with pytest.raises(SystemExit, match="made from other frames than .*_000.npz; make them anew with: python train"):
        offline.load_windows(shards, "maze", 2, 32, places)
    frames = dict(np.load(shards / "frames_001.npz"))
    for change in (dict(first=frames["first"] | (np.arange(40) == 20)), dict(obs=frames["obs"][:30], first=frames["first"][:30])):
        common.save_npz(shards / "frames_001.npz", **(frames | change))
        with pytest.raises(SystemExit, match="made from other frames than .*frames_001.npz"):
            offline.load_windows(shards, "maze", 2, 16, places)


@pytest.mark.parametrize(
    "flags, line",
    [
        (dict(methods=()), "--methods is empty"),
        (dict(labelled_steps=-1), "--labelled-steps -1 must be a finite number, above 0"),
        (dict(clone_steps=0), "--clone-steps 0 must be a finite number, above 0"),
        (dict(clone_batch_size=0), "--clone-batch-size 0 must be a finite number, above 0"),
        (dict(clone_lr=-1e-3), "--clone-lr -0.001 must be a finite number, above 0"),
    ],
)
def test_flags_that_cannot_work_are_one_line(flags, line):
    with pytest.raises(SystemExit, match="^error: " + line) as error:
        offline.main(offline.Args(game="maze", **flags))
    assert len(str(error.value).splitlines()) == 1
