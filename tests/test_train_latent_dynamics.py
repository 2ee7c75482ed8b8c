"""Stage 1: the quantiser, the networks, and the stage as a whole on the toy video."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import toy_video

import common
import train_latent_dynamics as stage1
from train_latent_dynamics import FDM, IDM, EMAVectorQuantizer, conv_beside_constant_planes


def naive_quantizer(quantizer, z):
    """Nearest embeddings and the moving averages, one piece at a time: z_q, codes, count, total."""
    c, e, p = quantizer.shape
    embeddings = quantizer.embedding.shape[1]
    z_q, codes = torch.zeros_like(z), torch.zeros(len(z), c * p, dtype=torch.long)
    uses, sums = torch.zeros(c, embeddings), torch.zeros(c, embeddings, e)
    for b in range(len(z)):
        grid = z[b].view(c * e, p)
        grid_q = torch.zeros_like(grid)
        for book in range(c):
            for position in range(p):
                piece = grid[book * e : (book + 1) * e, position]
                code = int(((quantizer.embedding[book] - piece) ** 2).sum(1).argmin())
                grid_q[book * e : (book + 1) * e, position] = quantizer.embedding[book, code]
                codes[b, book * p + position] = code
                uses[book, code] += 1
                sums[book, code] += piece
        z_q[b] = grid_q.flatten()
    d = quantizer.decay
    return z_q, codes, d * quantizer.count + (1 - d) * uses, d * quantizer.total + (1 - d) * sums


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    quantizer = EMAVectorQuantizer(codebooks=2, positions=4, embeddings=8, embedding_dim=3, decay=0.9)
    quantizer.count.copy_(torch.rand(2, 8) + 5)  # well used, so that no code is dead
    quantizer.total.copy_(torch.randn(2, 8, 3) * quantizer.count[..., None])
    quantizer.embedding.copy_(quantizer.total / quantizer.count[..., None])
    return quantizer


def test_quantizer_equals_a_naive_loop(quantizer):
    z = torch.randn(16, 24)
    z_q, codes, count, total = naive_quantizer(quantizer, z)
    out, commitment, out_codes = quantizer(z)
    torch.testing.assert_close(out, z_q)  # by the codebook before its update
    assert torch.equal(out_codes, codes)
    torch.testing.assert_close(commitment, ((z - z_q) ** 2).mean())
    torch.testing.assert_close(quantizer.count, count)
    torch.testing.assert_close(quantizer.total, total)
    torch.testing.assert_close(quantizer.embedding, total / count[..., None])


def test_codes_lead_back_to_the_quantized_latent(quantizer):
    quantizer.eval()
    before = quantizer.embedding.clone()
    z_q, _, codes = quantizer(torch.randn(10, 24))
    torch.testing.assert_close(quantizer.lookup(codes.to(torch.uint8)), z_q)
    assert torch.equal(quantizer(z_q)[2], codes)  # an embedding is its own nearest
    assert torch.equal(quantizer.embedding, before)  # nothing is learned while evaluating


def test_positions_share_a_codebook(quantizer):
    quantizer.eval()
    z = torch.randn(5, 24)
    order = torch.tensor([2, 0, 3, 1])
    swapped = z.view(5, 6, 4)[:, :, order].flatten(1)
    codes, swapped_codes = quantizer(z)[2].view(5, 2, 4), quantizer(swapped)[2].view(5, 2, 4)
    assert torch.equal(codes[:, :, order], swapped_codes)


def test_gradients_pass_straight_through(quantizer):
    z = torch.randn(4, 24, requires_grad=True)
    upstream = torch.randn(4, 24)
    (quantizer(z)[0] * upstream).sum().backward()
    torch.testing.assert_close(z.grad, upstream)
    z.grad = None
    z_q, commitment, _ = quantizer.eval()(z)
    commitment.backward()
    torch.testing.assert_close(z.grad, 2 * (z - z_q).detach() / z.numel())  # pulls z to its embedding, which stands still


def test_the_first_updates_leave_the_codes_where_the_latents_are():
    torch.manual_seed(0)
    quantizer = EMAVectorQuantizer(2, 4, 64, 16, 0.999)
    for _ in range(50):
        quantizer(0.05 * torch.randn(128, 128))
    # with counts that start at 0 beside sums that do not, codes jump to thousands here
    assert quantizer.embedding.abs().max() < 0.5
    codes = quantizer(0.05 * torch.randn(128, 128))[2]
    assert len(codes[:, :4].unique()) > 32 and len(codes[:, 4:].unique()) > 32


def test_a_dead_code_restarts_on_a_piece_of_the_batch(quantizer):
    quantizer.count[0, 3] = 1e-3
    quantizer.total[0, 3] = 1e-3 * 100
    quantizer.embedding[0, 3] = 100.0  # so far off that nothing chooses it
    z = torch.randn(16, 24)
    quantizer(z)
    pieces = z.view(16, 2, 3, 4)[:, 0].transpose(1, 2).reshape(-1, 3)
    assert quantizer.count[0, 3] == 16 * 4 / 8  # its fair share of a batch
    assert (pieces == quantizer.embedding[0, 3]).all(1).any()
    torch.testing.assert_close(quantizer.embedding[0, 3], quantizer.total[0, 3] / 8)


@pytest.mark.parametrize("size", [2, 3, 4, 16])
def test_the_tile_equals_constant_planes(size):
    torch.manual_seed(size)
    conv = torch.nn.Conv2d(6 + 5, 7, 3, padding=1).double()
    x = torch.randn(2, 6, size, size, dtype=torch.double, requires_grad=True)
    z = torch.randn(2, 5, dtype=torch.double, requires_grad=True)
    upstream = torch.randn(2, 7, size, size, dtype=torch.double)

    def gradients(out):
        return torch.autograd.grad((out * upstream).sum(), [x, z, conv.weight, conv.bias])

    plain = conv(torch.cat([x, z[:, :, None, None].expand(-1, -1, size, size)], 1))
    tiled = conv_beside_constant_planes(conv, x, z)
    torch.testing.assert_close(tiled, plain)
    for a, b in zip(gradients(tiled), gradients(plain)):
        torch.testing.assert_close(a, b)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_networks_have_the_papers_size():
    assert count(IDM(64, 1, 4, 128)) == 3_685_376
    assert count(FDM(64, 1, 128, 24, predict_change=False)) == 7_814_139
    assert count(IDM(64, 2, 4, 128)) == 3_685_376 + 3 * 64 * 9  # one more frame for the first convolution


@pytest.mark.parametrize("size", [64, 32, 16])
@pytest.mark.parametrize("context", [1, 3])
def test_the_fdm_predicts_a_frame_and_hears_the_latent(size, context):
    torch.manual_seed(0)
    fdm = FDM(size, context, 8, 4, predict_change=False).eval()
    past = torch.randint(0, 256, (2, context + 1, size, size, 3), dtype=torch.uint8)
    prediction = fdm(past, torch.zeros(2, 8))
    assert prediction.shape == (2, 3, size, size) and prediction.abs().max() <= 0.5
    changed = fdm(past, torch.tensor([[0.0] * 8, [5.0] * 8]))
    torch.testing.assert_close(changed[0], prediction[0])
    assert not torch.allclose(changed[1], prediction[1])


def test_an_fdm_that_predicts_change_starts_from_none():
    past = torch.randint(0, 256, (2, 3, 16, 16, 3), dtype=torch.uint8)
    fdm = FDM(16, 2, 8, 4, predict_change=True).eval()
    torch.testing.assert_close(fdm(past, torch.randn(2, 8)), stage1.to_input(past[:, -1:]))
    torch.nn.init.constant_(fdm.last[-1].bias, 0.25)
    torch.testing.assert_close(fdm(past, torch.randn(2, 8)), stage1.to_input(past[:, -1:]) + 0.25)


def test_frames_are_stacked_in_time_and_centred():
    frames = torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8)
    frames[0, 1, 2, 3] = torch.tensor([255, 0, 51], dtype=torch.uint8)
    out = stage1.to_input(frames)
    assert out.shape == (1, 6, 4, 4) and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out[0, :, 2, 3], torch.tensor([-0.5, -0.5, -0.5, 0.5, -0.5, -0.3]))


def test_the_loss_teaches_the_idm_through_the_quantizer():
    torch.manual_seed(0)
    idm, quantizer, fdm = IDM(16, 1, 0.25, 24), EMAVectorQuantizer(2, 4, 8, 3, 0.9), FDM(16, 1, 24, 4, predict_change=False)
    windows = torch.randint(0, 256, (6, 3, 16, 16, 3), dtype=torch.uint8)
    quantizer.eval()
    loss, error, commitment = stage1.dynamics_loss(idm, quantizer, fdm, windows, 0.05)
    torch.testing.assert_close(loss, error + 0.05 * commitment)
    z_q = quantizer(idm(windows))[0]
    torch.testing.assert_close(error, F.mse_loss(fdm(windows[:, :2], z_q), stage1.to_input(windows[:, 2:])))
    error.backward()
    assert idm.head.weight.grad.abs().sum() > 0


def write_split(folder, seed, game="maze"):
    obs, first, action, reward = toy_video(episodes=8, length=20, seed=seed, frame_size=16)
    for shard in range(2):
        rows = slice(80 * shard, 80 * (shard + 1))
        settings = json.dumps(dict(game=game, start_level=0, num_levels=0, seed=seed))
        common.save_npz(folder / f"frames_{shard:03d}.npz", obs=obs[rows], first=first[rows], settings=settings)
        common.save_npz(folder / f"labels_{shard:03d}.npz", action=action[rows], reward=reward[rows], expert_return=1.0)


def train(root, context=1, labels=True, vq=True):
    """Stage 1 on a tiny toy video under `root`; returns the checkpoint."""
    for split, seed in (("train", 0), ("test", 1)):
        write_split(root / "data/maze" / split, seed)
    if not labels:
        for path in (root / "data").rglob("labels_*.npz"):
            path.unlink()
    stage1.main(
        stage1.Args(
            game="maze", device="cpu", data_dir=root / "data", runs_dir=root / "runs", eval_every=2, eval_windows=64, context=context,
            embeddings=8, embedding_dim=3, multiplier=0.25, fdm_width=4, grad_steps=4, batch_size=8, vq=vq,
        )
    )  # fmt: skip
    run = common.run_folder(root / "runs", "maze", vq)
    return common.load_checkpoint(run / "latent_dynamics.pt", "latent_dynamics", "maze", "")


@pytest.mark.parametrize("context", [1, 2, 3])
def test_latents_lie_row_for_row_beside_their_frames(tmp_path, context):
    checkpoint = train(tmp_path, context)
    idm, quantizer = IDM(16, checkpoint["context"], 0.25, 24).eval(), EMAVectorQuantizer(2, 4, 8, 3, 0.9).eval()
    idm.load_state_dict(checkpoint["idm"]), quantizer.load_state_dict(checkpoint["quantizer"])
    for path in common.list_shards(tmp_path / "data/maze/test", "frames", ""):
        obs, first, _ = common.read_frames(path, "maze")
        z, codes, valid = common.read_latents(path, tmp_path / "runs/maze/test", "maze", checkpoint["fingerprint"])
        assert z.dtype == np.float16 and codes.dtype == np.uint8 and z.shape == (80, 24) and codes.shape == (80, 8)
        assert valid.sum() == 4 * (20 - 1 - context)  # 4 episodes of 20 frames, less the ends that no window fits
        for i in range(80):
            if not valid[i]:
                assert not z[i].any() and not codes[i].any()
            else:
                with torch.no_grad():
                    own = idm(torch.from_numpy(obs[i - context : i + 2])[None])
                torch.testing.assert_close(torch.from_numpy(z[i]).float(), own[0], atol=2e-3, rtol=2e-3)
                assert torch.equal(quantizer(own)[2][0], torch.from_numpy(codes[i]).long())


def test_without_quantisation_the_fdm_is_told_z_itself(tmp_path):
    checkpoint = train(tmp_path, vq=False)
    assert not (tmp_path / "runs/maze").exists()  # a run with quantisation that lies there stays as it is
    assert not checkpoint["vq"] and not checkpoint["quantizer"]
    path = common.list_shards(tmp_path / "data/maze/test", "frames", "")[0]
    z, codes, valid = common.read_latents(path, tmp_path / "runs/maze_no_vq/test", "maze", checkpoint["fingerprint"])
    assert z.shape == (80, 24) and codes.shape == (80, 0) and z[valid].any()
    columns = (tmp_path / "runs/maze_no_vq/train_latent_dynamics.csv").read_text().splitlines()[0].split(",")
    assert "test_error" in columns and not [column for column in columns if "perplexity" in column]

    x = torch.randn(5, 24, requires_grad=True)
    z_q, commitment, codes = stage1.NoQuantizer()(x)
    assert torch.equal(z_q, x) and commitment == 0 and codes.shape == (5, 0)


def test_labels_are_read_to_report_and_never_to_learn(tmp_path):
    with_labels, without = train(tmp_path / "with"), train(tmp_path / "without", labels=False)
    for part in ("idm", "quantizer", "fdm"):
        for name, weight in with_labels[part].items():
            assert torch.equal(weight, without[part][name]), name
    columns = [
        (tmp_path / which / "runs/maze/train_latent_dynamics.csv").read_text().splitlines()[0].split(",") for which in ("with", "without")
    ]
    assert set(columns[0]) - set(columns[1]) == {"probe", "majority"}


def test_probe_is_scored_on_held_out_rows():
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 3, 600)
    z = np.eye(3)[actions] + 0.1 * rng.normal(size=(600, 3))
    accuracy, majority = stage1.probe_accuracy(z[:300], actions[:300], z[300:], actions[300:])
    assert accuracy > 0.99
    assert majority == np.mean(actions[300:] == np.bincount(actions[:300]).argmax())
    noise, _ = stage1.probe_accuracy(rng.normal(size=(300, 3)), actions[:300], rng.normal(size=(300, 3)), actions[300:])
    assert noise < 0.45


def test_report_measures_error_copy_and_codes(tmp_path):
    torch.manual_seed(0)
    windows = torch.randint(0, 256, (20, 3, 16, 16, 3), dtype=torch.uint8)
    idm, quantizer, fdm = IDM(16, 1, 0.25, 24), EMAVectorQuantizer(2, 4, 8, 3, 0.9), FDM(16, 1, 24, 4, predict_change=False)
    with torch.no_grad():
        quantizer.embedding[1] = quantizer.embedding[1, :1]  # all the same: the first wins, so one code of eight is in use
    figures = stage1.report(idm, quantizer, fdm, (windows, None), (windows, None), batch_size=7)
    frames = windows.numpy() / 255 - 0.5
    assert float(figures["copy_error"]) == pytest.approx(((frames[:, 2] - frames[:, 1]) ** 2).mean(), rel=1e-5)
    assert figures["perplexity_1"] == pytest.approx(1) and figures["codes_used_1"] == pytest.approx(1 / 8)
    with torch.no_grad():
        z_q = quantizer.eval()(idm(windows))[0]
        error = ((fdm.eval()(windows[:, :2], z_q) - stage1.to_input(windows[:, 2:])) ** 2).mean()
    assert float(figures["test_error"]) == pytest.approx(float(error), rel=1e-4)


def one_update(loss_of, precision):
    """Loss, gradients and the quantiser's state after one update of small networks, always from the same start."""
    torch.manual_seed(0)
    windows = torch.randint(0, 256, (8, 3, 16, 16, 3), dtype=torch.uint8)
    idm, quantizer, fdm = IDM(16, 1, 0.25, 24), EMAVectorQuantizer(2, 4, 8, 3, 0.9), FDM(16, 1, 24, 4, predict_change=False)
    quantizer.count.fill_(100)  # no code is dead: those restart at random
    with common.autocast(precision, torch.device("cpu")):
        loss, _, _ = loss_of(idm, quantizer, fdm, windows, 0.05)
    loss.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in [*idm.parameters(), *fdm.parameters()]])
    return loss.detach(), gradient, quantizer.state_dict()


def test_a_compiled_update_is_the_same():
    """Captured as one graph, without a break; what a GPU's code generator makes of the graph takes minutes on a CPU."""
    compiled = torch.compile(stage1.dynamics_loss, backend="aot_eager", fullgraph=True)
    loss, gradient, quantizer = one_update(stage1.dynamics_loss, "fp32")
    compiled_loss, compiled_gradient, compiled_quantizer = one_update(compiled, "fp32")
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-3, atol=1e-6)
    for name, state in quantizer.items():
        torch.testing.assert_close(compiled_quantizer[name], state)


def test_an_update_in_bfloat16_is_nearly_the_same_and_keeps_the_codebooks_in_float32():
    loss, gradient, _ = one_update(stage1.dynamics_loss, "fp32")
    bf16_loss, bf16_gradient, quantizer = one_update(stage1.dynamics_loss, "bf16")
    assert bf16_loss != loss and float(bf16_loss) == pytest.approx(float(loss), rel=0.02)
    assert F.cosine_similarity(bf16_gradient, gradient, dim=0) > 0.98
    assert all(state.dtype == torch.float32 for state in quantizer.values())
