"""The benchmark: it takes the settings that it says, and counts what is done between the warm-up and the end."""

import benchmark
import pytest
import torch


@pytest.mark.parametrize("stage", benchmark.STAGES)
def test_paper_settings_are_the_defaults_of_the_script(stage, tmp_path):
    script, _, _ = benchmark.STAGES[stage]
    found = benchmark.settings_of(benchmark.Args(settings="paper", device="cpu"), stage, tmp_path)
    of_the_benchmark = {"device", "data_dir", "runs_dir", "experts_dir", "test_frames", *benchmark.STAGES[stage][2]}
    changed = {name for name, value in vars(script.Args()).items() if getattr(found, name) != value}
    assert changed <= of_the_benchmark


def test_demo_settings_are_those_of_the_makefile(tmp_path):
    found = benchmark.settings_of(benchmark.Args(settings="demo", device="cpu"), "stage 1", tmp_path)
    assert (found.game, found.batch_size, found.multiplier, found.fdm_width, found.vq_decay) == ("coinrun", 64, 0.5, 8, 0.99)
    eager = benchmark.settings_of(benchmark.Args(settings="demo", device="cpu"), "stage 1", tmp_path, "eager fp32")
    assert (eager.precision, eager.compile) == ("fp32", False) and (found.precision, found.compile) == ("auto", True)


def test_work_is_counted_from_the_warm_up_to_the_end(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    watch = benchmark.Watch(torch.device("cpu"), seconds=10, every=4)

    def work(seconds):
        now[0] += seconds

    updates = 0
    with pytest.raises(benchmark.TimeIsUp):
        step, half = watch.counted(work, lambda *_: 8), watch.timed("half", work)
        while True:
            updates += 1
            half(0.5), step(0.5)
    # rounds of four updates, 4 seconds each; two are the warm-up, the third round after it passes 10 seconds
    assert updates == 4 * (2 + 3)
    assert watch.units == 8 * 4 * 3 and watch.end - watch.start == pytest.approx(12)
    assert watch.parts["half"] == pytest.approx(6)


def test_an_unknown_stage_is_one_line():
    with pytest.raises(SystemExit, match="no stage is called 'stage 9'; there are 'expert', "):
        benchmark.main(benchmark.Args(stages=("stage 9",), device="cpu"))
