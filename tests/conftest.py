import contextlib
import os
import time

import hypothesis
import pytest
import torch

import triton_tied.packing
from triton_tied.autotune import choices
from triton_tied.dispatch import HAS_TRITON, INTERPRETED

# There are no kernels without Triton.
collect_ignore = (
    [] if HAS_TRITON else ["autotune", "inspection", "kernels", "operators", "cli/test_tune.py"]
)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=60, print_blob=True)
# On a GPU each example of another shape may compile kernels, which takes seconds.
hypothesis.settings.register_profile("gpu", deadline=None, max_examples=10, print_blob=True)
hypothesis.settings.load_profile("gpu" if torch.cuda.is_available() else "ci")


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    if not INTERPRETED:
        yield
        return
    import interpreter_shortcuts

    with pytest.MonkeyPatch.context() as patch:
        interpreter_shortcuts.take(patch)
        yield


@pytest.fixture(autouse=True)
def fresh_random_data():
    """Another seed each time; a failure names it, and TRITON_TIED_SEED repeats it."""
    seed = int(os.environ.get("TRITON_TIED_SEED", torch.seed() % 2**32))
    torch.manual_seed(seed)
    print(f"TRITON_TIED_SEED={seed}")


@pytest.fixture(autouse=True)
def nothing_remembered():
    """What was decided for calls of other tests, which may have changed the rules."""
    choices.forget_all()
    yield
    choices.forget_all()


@pytest.fixture
def absent_h200(monkeypatch, tmp_path):
    """Every device is an H200 that is not there, with empty tables of its own, a compiler that
    finds no fault, and a stopwatch that must not be touched."""
    from stand_ins import GPU, ORIGIN

    from triton_tied.autotune import disk_cache, gpus, trial, tuned_configs, tuning
    from triton_tied.kernels import launch

    def never(*arguments):
        raise AssertionError("timed")

    monkeypatch.setenv("TRITON_TIED_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(disk_cache, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(gpus, "of_device", lambda device: GPU)
    monkeypatch.setattr(tuned_configs, "origin_of", lambda device: ORIGIN)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(trial, "race_on", never)
    monkeypatch.setattr(tuning, "compile_candidates", lambda *arguments: None)
    monkeypatch.setattr(launch, "fault", lambda call, config: None)
    tuned_configs.forget()
    yield ORIGIN
    tuned_configs.forget()


@pytest.fixture
def timed(absent_h200, monkeypatch):
    """Replaces the timing: the fourth prediction wins, or the last. Lists the problems."""
    from triton_tied.autotune import trial
    from triton_tied.autotune.race import Outcome

    seen = []

    def race_on(device, problem, shortlist, budget_s, progress):
        seen.append(problem)
        time.sleep(0.02)  # while other threads come
        configs = [candidate.config for candidate in shortlist.candidates]
        return Outcome({configs[:4][-1]: 10.0, configs[0]: 12.0})

    monkeypatch.setattr(trial, "race_on", race_on)
    return seen


@pytest.fixture
def shares_of_time(absent_h200, monkeypatch):
    """Replaces the timing, and the clock: the first problem takes a second, each other one all that
    it is given. Lists what each was given."""
    from triton_tied.autotune import trial, tuning
    from triton_tied.autotune.race import Outcome

    clock, shares = [0.0], []

    def race_on(device, problem, shortlist, budget_s, progress):
        shares.append(budget_s)
        clock[0] += 1.0 if len(shares) == 1 else budget_s
        return Outcome({shortlist.untimed: 1.0})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(trial, "race_on", race_on)
    return shares


@pytest.fixture
def no_folder(absent_h200, monkeypatch, tmp_path):
    """A cache directory that cannot be made, even by root."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_TIED_CACHE_DIR", str(tmp_path / "file" / "cache"))


@pytest.fixture
def benchmark_mode():
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield


@pytest.fixture
def convolution_precision():
    """PyTorch's setting for float32 convolutions, put back at the end."""
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    yield setting
    setting.fp32_precision = before


# The interpreted kernels expand none: there one serves.
@pytest.fixture(params=["gathered", "written", "in blocks"][: 1 if INTERPRETED else 3])
def expansion(request, monkeypatch):
    """All ways in which a weight is expanded, whatever its size."""
    if request.param != "gathered":
        monkeypatch.setattr(triton_tied.packing, "_MAX_GATHERED", 0)
        monkeypatch.setattr(triton_tied.packing, "_MAX_CHANNELS_AT_ONCE", 0)
    if request.param == "in blocks":
        monkeypatch.setattr(triton_tied.packing, "_MAX_GATHERED_CENTRE", 0)
        monkeypatch.setattr(triton_tied.packing, "_BLOCK", 2)
    return request.param


@pytest.fixture
def one_config():
    """Where the kernels run, they take the same configs for all images: only then are results the
    same to the bit."""
    with contextlib.ExitStack() as stack:
        if INTERPRETED:
            from triton_tied.autotune import select
            from triton_tied.kernels import configs

            stack.enter_context(
                select.using(
                    conv=configs.ConvConfig((1, 8, 8), 16, 16),
                    weight_grad=configs.WeightGradConfig((1, 4, 8), 16, 16),
                )
            )
        yield
