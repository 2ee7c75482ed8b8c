"""Stages 2 and 3 offline: the latent policy and the bank of decoders, alone and chained through their files."""

import json

import numpy as np
import pytest
import torch

import collect_data
import common
import decode_offline as offline
import train_latent_bc as bc
import train_latent_dynamics as dynamics


def test_the_latent_policy_has_the_papers_size():
    # the official code's 3,682,177 less the 257 of a value head that it never trains
    assert sum(p.numel() for p in bc.LatentPolicy(64, 4, 128).parameters()) == 3_682_177 - 257


def test_variance_explained_is_zero_for_the_mean_and_one_for_the_truth():
    obs = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    z = np.random.default_rng(1).normal(size=(40, 4)).astype(np.float32)
    by_pixel = {tuple(o[0, 0]): row for o, row in zip(obs, z)}

    class Stub(torch.nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.answer = answer

        def forward(self, batch):
            return torch.from_numpy(np.stack([self.answer(o) for o in batch.numpy()]))

    obs_and_z = torch.from_numpy(obs), torch.from_numpy(z)
    mean = bc.report(Stub(lambda o: z.mean(0)), *obs_and_z, batch_size=16)
    assert float(mean["variance_explained"]) == pytest.approx(0, abs=1e-6)
    truth = bc.report(Stub(lambda o: by_pixel[tuple(o[0, 0])]), *obs_and_z, batch_size=16)
    assert truth["test_error"] == 0 and truth["variance_explained"] == 1


def make_bank(count, z_dim=6):
    torch.manual_seed(3)
    decoders = [offline.ActionDecoder(z_dim) for _ in range(count)]
    return decoders, offline.DecoderBank(decoders)


def test_the_bank_answers_as_each_decoder_alone():
    decoders, bank = make_bank(3)
    decoders[1].mean.fill_(0.5), decoders[1].std.fill_(2.0)
    bank = offline.DecoderBank(decoders)
    z = torch.randn(3, 7, 6)
    for decoder, rows, answer in zip(decoders, z, bank(z)):
        torch.testing.assert_close(decoder(rows), answer)


def fit(bank, z, actions, num_labels, steps=30):
    generator = torch.Generator().manual_seed(0)
    offline.fit_decoders(bank, z, actions, torch.tensor(num_labels), steps, 16, 1e-3, 0.05, generator)
    return {name: weight.detach().clone() for name, weight in bank.parameters.items()}


def test_decoders_fitted_together_do_not_touch_each_other():
    z, actions = torch.randn(2, 50, 6), torch.randint(15, (2, 50))
    before = fit(make_bank(2)[1], z, actions, [50, 50])
    other = z.clone()
    other[1] = torch.randn(50, 6)
    after = fit(make_bank(2)[1], other, actions, [50, 50])
    for name, weight in before.items():
        assert torch.equal(weight[0], after[name][0]), name
        assert not torch.equal(weight[1], after[name][1]), name


def test_a_decoder_sees_no_more_labels_than_its_own():
    z, actions = torch.randn(2, 50, 6), torch.randint(15, (2, 50))
    z[0, 16:] = float("nan")  # a single look at these would spoil every weight
    weights = fit(make_bank(2)[1], z, actions, [16, 50])
    assert all(weight.isfinite().all() for weight in weights.values())


def test_more_labels_decode_better():
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(15, 6, generator=generator)
    actions = torch.randint(15, (1, 2048), generator=generator)
    z = centres[actions] + 0.3 * torch.randn(1, 2048, 6, generator=generator)
    test_actions = torch.randint(15, (1000,), generator=generator)
    test_z = centres[test_actions] + 0.3 * torch.randn(1000, 6, generator=generator)
    bank = make_bank(2)[1]
    fit(bank, z.expand(2, -1, -1), actions.expand(2, -1), [16, 2048], steps=400)
    few, many = (bank(test_z.expand(2, -1, -1)).argmax(-1) == test_actions).float().mean(1)
    assert few < 0.8 and many > 0.9


def test_labelled_rows_are_valid_matched_and_nested(tmp_path):
    rng = np.random.default_rng(0)
    for shard in range(2):
        action = rng.integers(0, 15, 100).astype(np.uint8)
        z = np.repeat(action[:, None], 4, 1).astype(np.float16)  # z tells its action
        valid = rng.random(100) < 0.7
        z[~valid] = 99
        common.save_npz(tmp_path / f"labels_{shard:03d}.npz", action=action, reward=np.zeros(100, np.float32), expert_return=1.0)
        common.save_npz(tmp_path / f"latents_{shard:03d}.npz", z=z, codes=np.zeros((100, 2), np.uint8), valid=valid, dynamics="abc")
    z, actions, places = offline.load_labelled(tmp_path, tmp_path, "maze", "abc", 80, seed=0)
    assert z.shape == (80, 4) and (z[:, 0] == actions).all() and z.max() < 99
    assert places.shape == (80, 2) and len(np.unique(places, axis=0)) == 80 and set(places[:, 0]) == {0, 1}
    fewer, _, _ = offline.load_labelled(tmp_path, tmp_path, "maze", "abc", 20, seed=0)
    assert np.array_equal(fewer, z[:20])
    other, _, _ = offline.load_labelled(tmp_path, tmp_path, "maze", "abc", 80, seed=1)
    assert not np.array_equal(other, z)


@pytest.fixture(scope="module")
def chained(tmp_path_factory):
    """All stages up to stage 2 on real Procgen, at the smallest size that runs."""
    root = tmp_path_factory.mktemp("chain")
    folders = dict(game="coinrun", device="cpu", data_dir=root / "data", runs_dir=root / "runs")
    collect_data.main(
        collect_data.Args(
            **folders, experts_dir=root / "experts", train_frames=2000, test_frames=800, frame_size=16, num_levels=2,
            expert_steps=512, expert_multiplier=0.25, num_envs=8, rollout_steps=64, minibatches=2, epochs=1,
        )
    )  # fmt: skip
    small = dict(multiplier=0.25, batch_size=16, eval_windows=64)
    dynamics.main(dynamics.Args(**folders, **small, fdm_width=4, grad_steps=4, embeddings=8, embedding_dim=4))
    bc.main(bc.Args(**folders, **small, grad_steps=4, eval_every=2, warmup_steps=1))
    return root, folders


def test_stage_2_hands_on_what_stage_3_needs(chained):
    root, _ = chained
    checkpoint = common.load_checkpoint(root / "runs/coinrun/latent_policy.pt", "latent_policy", "coinrun", "")
    sizes = {name: checkpoint[name] for name in ("frame_size", "num_levels", "start_level", "z_dim", "context", "grad_step")}
    assert sizes == dict(frame_size=16, num_levels=2, start_level=0, z_dim=2 * 4 * 4, context=1, grad_step=4)
    bc.LatentPolicy(16, checkpoint["multiplier"], checkpoint["z_dim"]).load_state_dict(checkpoint["model"])
    rows = (root / "runs/coinrun/train_latent_bc.csv").read_text().splitlines()
    assert rows[0].split(",") == ["grad_step", "train_error", "test_error", "variance_explained"] and len(rows) == 3


def test_the_offline_sweep_writes_its_results(chained, monkeypatch):
    root, folders = chained
    sweep = dict(labels=(4, 16), decoder_seeds=2, decoder_steps=3, episodes=2, envs_per_decoder=2)
    offline.main(offline.Args(**folders, **sweep))
    path = root / "runs/coinrun/decode_offline.npz"
    keys = ("labels", "returns", "accuracy", "random_return", "expert_return", "settings")
    result = common.load_npz(path, keys, "")
    assert result["labels"].tolist() == [4, 16] and result["returns"].shape == result["accuracy"].shape == (2, 2)
    assert set(np.unique(result["returns"] * 2)) <= {0, 10, 20}  # an episode of coinrun ends with 0 or 10; each decoder played 2
    settings = json.loads(str(result["settings"]))
    assert settings["labels"] == [4, 16] and (settings["frame_size"], settings["num_levels"]) == (16, 2)
    assert (root / "runs/coinrun/decode_offline.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(common, "random_return", lambda *_: 2.7)  # 256 episodes long; once is enough
    offline.main(offline.Args(**folders, **sweep))  # the same seed plays the same episodes
    assert np.array_equal(common.load_npz(path, ("returns",), "")["returns"], result["returns"])


def test_all_methods_run_side_by_side_and_do_not_change_each_other(chained, monkeypatch):
    monkeypatch.setattr(common, "random_return", lambda *_: 2.7)
    root, folders = chained
    path = root / "runs/coinrun/decode_offline.npz"
    small = dict(labels=(4,), decoder_seeds=2, decoder_steps=3, episodes=1, envs_per_decoder=1)
    small |= dict(labelled_steps=3, clone_steps=2, clone_batch_size=8)

    def sweep(*methods):
        offline.main(offline.Args(**folders, **small, methods=methods))
        return dict(np.load(path, allow_pickle=False))

    both = sweep("lapo_plus", "vpt", "bc", "lapo")
    suffixes = ("", "_bc", "_vpt", "_lapo_plus")
    results = {f"{name}{suffix}" for name in ("returns", "accuracy", "policy_accuracy") for suffix in suffixes} - {"accuracy_bc"}
    assert set(both) == results | {"labels", "random_return", "expert_return", "settings"}
    assert all(both[name].shape == (1, 2) for name in results)
    assert all(0 <= both[name].min() and both[name].max() <= 1 for name in results if "accuracy" in name)
    assert np.array_equal(both["accuracy"], both["accuracy_lapo_plus"])  # one decoder, used in two ways
    for methods in (("lapo",), ("vpt",)):
        alone = sweep(*methods)
        assert all(np.array_equal(alone[name], both[name]) for name in results & set(alone))
        assert (root / "runs/coinrun/decode_offline.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_runs_with_a_longer_context_and_without_quantisation(chained, monkeypatch):
    monkeypatch.setattr(common, "random_return", lambda *_: 2.7)
    root, folders = chained
    small = dict(multiplier=0.25, batch_size=16, eval_windows=64, vq=False)
    dynamics.main(dynamics.Args(**folders, **small, fdm_width=4, grad_steps=2, embeddings=8, embedding_dim=4, context=2))
    bc.main(bc.Args(**folders, **small, grad_steps=2))
    offline.main(
        offline.Args(
            **folders, vq=False, methods=("bc", "vpt", "lapo_plus"), labels=(4,), decoder_seeds=1, decoder_steps=2,
            labelled_steps=2, clone_steps=2, clone_batch_size=8, episodes=1, envs_per_decoder=1,
        )
    )  # fmt: skip
    result = np.load(root / "runs/coinrun_no_vq/decode_offline.npz")
    assert "returns" not in result.files and result["returns_vpt"].shape == result["returns_lapo_plus"].shape == (1, 1)


def test_too_many_labels_and_missing_files_are_one_line(chained, tmp_path):
    root, folders = chained
    with pytest.raises(SystemExit, match="usable labels.*fewer than --labels 100000"):
        offline.main(offline.Args(**folders, labels=(16, 100_000)))
    with pytest.raises(SystemExit, match="latent_policy.pt is missing; make it with: python train_latent_bc.py --game coinrun"):
        offline.main(offline.Args(**(folders | dict(runs_dir=tmp_path))))
    with pytest.raises(SystemExit, match="latent_dynamics.pt is missing; make it with: python train_latent_dynamics.py"):
        bc.main(bc.Args(**(folders | dict(runs_dir=tmp_path))))
