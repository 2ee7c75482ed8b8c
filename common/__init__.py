"""What has one correct answer and teaches nothing about LAPO. No network, loss or schedule lives here; each script holds its own.

procgen_facts  actions, which of them do the same, returns of random and expert
flags          bad input ends a run with one line
devices        device, precision, compilation, seeds, several processes
games          vectorised games, evaluation
files          shards and checkpoints
logs           progress bar, metrics
run_state      runs that can be killed and go on
frame_store    windows drawn from shards that need not fit into memory
"""

from .devices import (  # noqa: F401
    autocast, compiled, compiles, derive_seed, in_threads, leads, num_cores, parallel, pick_device, process,
    process_group, seed_everything, to_device,
)  # fmt: skip
from .files import (  # noqa: F401
    atomic_write, beside, count_rows, fingerprint, list_shards, load_checkpoint, load_npz, npz_bytes, read_frames,
    read_labels, read_latents, run_folder, save_checkpoint, save_npz, write_bytes,
)  # fmt: skip
from .flags import check_flags, check_game, fail  # noqa: F401
from .frame_store import FrameStore, draw_rows, fixed_windows, true_actions_to_report_on, valid_windows  # noqa: F401
from .games import HalvedEnvs, ProcgenEnvs, RunningMeanStd, area_mean, evaluate, random_return  # noqa: F401
from .logs import MetricsLog, check_finite, perplexity, progress_bar, track  # noqa: F401
from .procgen_facts import (  # noqa: F401
    ACTIONS, ACTION_COLORS, EQUIVALENT_ACTIONS, NUM_ACTIONS, RETURNS, distinct_actions, normalize_return,
)  # fmt: skip
from .run_state import Captured, RunState  # noqa: F401
