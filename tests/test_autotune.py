"""The order of choice, when timing happens, and what a call costs; no GPU is asked."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

autotune = pytest.importorskip("triton_tied.autotune", reason="there are no kernels without Triton")

import triton_tied as tt  # noqa: E402 (after the check for Triton)
from triton_tied import cli, cost, gpus, table, trial, tuning  # noqa: E402
from triton_tied.candidates import list_of  # noqa: E402
from triton_tied.configs import ConvConfig, WeightGradConfig  # noqa: E402
from triton_tied.geometry import Geometry  # noqa: E402
from triton_tied.packing import Layout  # noqa: E402
from triton_tied.problem import Problem  # noqa: E402
from triton_tied.table import Entry, Origin  # noqa: E402
from triton_tied.tuner import Tuned  # noqa: E402

GPU = gpus.KNOWN["H200"]
DEVICE = torch.device("cuda", 0)
ORIGIN = Origin("NVIDIA H200", "9.0", 132, torch.__version__, "3.7.1", "12.8")
GEOMETRY = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
PROBLEM = Problem("conv", "bfloat16", Layout(64, (3, 3)), (8, 32, 32), GEOMETRY)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A GPU that is not there, a table of its own, and a stopwatch that must not be touched."""
    monkeypatch.setenv("TRITON_TIED_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(gpus, "of_device", lambda device: GPU)
    monkeypatch.setattr(autotune, "origin_of", lambda device: ORIGIN)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def never(*arguments):
        raise AssertionError("timed")

    monkeypatch.setattr(trial, "tune_on", never)
    autotune.forget()
    yield
    autotune.forget()


@pytest.fixture
def benchmark_mode():
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield


@pytest.fixture
def timed(monkeypatch):
    """Replaces the timing: the fourth prediction wins. Lists the problems."""
    seen = []

    def tune_on(device, problem, sieved, budget_s, progress):
        seen.append(problem)
        time.sleep(0.02)  # while other threads come
        configs = [candidate.config for candidate in sieved.candidates]
        return Tuned({configs[3]: 10.0, configs[0]: 12.0})

    monkeypatch.setattr(trial, "tune_on", tune_on)
    return seen


def others(problem=PROBLEM):
    """Two configs that serve the problem, but that the cost model would not take."""
    return [candidate.config for candidate in cost.sieve(problem, GPU).candidates[1:3]]


def store(config, folder=None, problem=PROBLEM):
    path = table.path_of(ORIGIN, folder)
    table.save(path, ORIGIN, {problem.key: Entry(config, 1.0, 2.0, 3.0)})
    autotune.forget()


def test_order_of_choice():
    user, shipped = others()
    assert autotune.config_for(PROBLEM, DEVICE) == cost.sieve(PROBLEM, GPU).candidates[0].config
    store(shipped, table.SHIPPED)
    assert autotune.config_for(PROBLEM, DEVICE) == shipped
    store(user)
    assert autotune.config_for(PROBLEM, DEVICE) == user
    x = torch.zeros(8, 64, 32, 32)
    mine = ConvConfig((1, 1, 32), 16, 16)
    with autotune.using(conv=mine):
        assert autotune.conv_config(x, PROBLEM.layout, GEOMETRY, False) == mine
        assert autotune.weight_grad_config(x, x, PROBLEM.layout, GEOMETRY) != mine
    assert autotune.conv_config(x, PROBLEM.layout, GEOMETRY, False) != mine


def test_an_entry_that_does_not_serve_this_problem_is_not_taken():
    best = autotune.config_for(PROBLEM, DEVICE)
    unknown = ConvConfig((1, 2, 8), 16, 16, num_warps=1)
    store(unknown)  # no candidate, so never compiled
    assert autotune.config_for(PROBLEM, DEVICE) == best
    listed = list_of("weight_grad", GPU.target, "bfloat16")
    strict = (
        next(c.config for c in listed if "ragged_boxes" in c.not_for)
        if any("ragged_boxes" in c.not_for for c in listed)
        else None
    )
    if strict is not None:  # a neighbour of a bucket may need what the tuned one did not
        ragged = Problem(
            "weight_grad", "bfloat16", Layout(64, (3, 3)), (8, 31, 31), GEOMETRY, centre="none"
        )
        store(strict, problem=ragged)
        assert autotune.config_for(ragged, DEVICE) != strict


def test_neighbours_share_an_entry_and_strangers_do_not():
    def key(**changes):
        values = vars(PROBLEM) | changes
        return Problem(**values).key

    assert key(image=(8, 31, 33)) == PROBLEM.key
    assert key(image=(9, 32, 32)) == PROBLEM.key
    different = [
        key(kernel="weight_grad"),
        key(dtype="float16"),
        key(dtype="float32_ieee"),
        key(layout=Layout(128, (3, 3))),
        key(layout=Layout(128, (3, 3), 2)),
        key(layout=Layout(64, (5, 3))),
        key(layout=Layout(64, (3, 3), 1, "skew_adjoint")),
        key(geometry=Geometry((1, 1), ((1, 1), (1, 1)), (2, 1))),
        key(memory="contiguous"),
        key(centre="unpacked"),
        key(aligned=False),
        key(wide=True),
        key(image=(32, 32, 32)),
        key(image=(8, 64, 32)),
    ]
    assert len({PROBLEM.key, *different}) == 1 + len(different)


def test_nothing_is_timed_without_benchmark_mode():
    x = torch.zeros(2, 64, 8, 8)
    assert autotune._find(PROBLEM, DEVICE) == (autotune.config_for(PROBLEM, DEVICE), True)
    first = autotune.conv_config(x, PROBLEM.layout, GEOMETRY, False)
    assert autotune.conv_config(x, PROBLEM.layout, GEOMETRY, False) == first


def test_first_use_is_timed_once_in_benchmark_mode(benchmark_mode, timed):
    config, final = autotune._find(PROBLEM, DEVICE)
    assert final and timed == [PROBLEM]
    assert config == cost.sieve(PROBLEM, GPU).candidates[3].config
    assert autotune._find(PROBLEM, DEVICE) == (config, True)
    autotune.forget()  # as another process would
    assert autotune._find(PROBLEM, DEVICE) == (config, True)
    assert timed == [PROBLEM]
    entry = table.load(table.path_of(ORIGIN), ORIGIN)[PROBLEM.key]
    assert (entry.median_us, entry.first_us) == (10.0, 12.0)
    # From now on the table decides: what another process writes there is taken at the next reading.
    theirs, _ = others()
    table.save(table.path_of(ORIGIN), ORIGIN, {PROBLEM.key: Entry(theirs, 1.0, 2.0, 3.0)})
    autotune._reread()
    assert autotune._find(PROBLEM, DEVICE) == (theirs, True)


def test_nothing_is_timed_in_deterministic_mode(benchmark_mode):
    torch.use_deterministic_algorithms(True)
    try:
        config, final = autotune._find(PROBLEM, DEVICE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert config == autotune.config_for(PROBLEM, DEVICE) and not final


def test_nothing_is_timed_while_a_graph_is_captured(benchmark_mode, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    config, final = autotune._find(PROBLEM, DEVICE)
    assert config == autotune.config_for(PROBLEM, DEVICE) and not final


def test_all_failing_leaves_the_first_choice(benchmark_mode, monkeypatch):
    monkeypatch.setattr(trial, "tune_on", lambda *_: Tuned({}))
    assert autotune._find(PROBLEM, DEVICE) == (autotune.config_for(PROBLEM, DEVICE), True)
    assert not table.path_of(ORIGIN).exists()


def test_a_choice_made_meanwhile_by_another_process_is_taken(timed):
    theirs, _ = others()
    autotune.config_for(PROBLEM, DEVICE)  # reads the table while it is empty
    table.save(table.path_of(ORIGIN), ORIGIN, {PROBLEM.key: Entry(theirs, 1.0, 2.0, 3.0)})
    assert autotune.tune_problem(PROBLEM, DEVICE).winner == theirs and not timed
    assert autotune.tune_problem(PROBLEM, DEVICE, again=True).winner != theirs and timed


def test_a_known_call_is_one_look_up(monkeypatch):
    x = torch.zeros(2, 64, 8, 8)
    first = autotune.conv_config(x, PROBLEM.layout, GEOMETRY, True)
    monkeypatch.setattr(autotune, "describe", None)
    assert autotune.conv_config(x, PROBLEM.layout, GEOMETRY, True) is first


@pytest.fixture
def convolution_precision():
    """PyTorch's setting for float32, put back at the end."""
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    yield setting
    setting.fp32_precision = before


def test_settings_that_change_the_choice_are_part_of_the_look_up(
    monkeypatch, convolution_precision
):
    x = torch.zeros(2, 64, 8, 8)
    seen = []
    describe = autotune.describe

    def spy(*arguments):
        seen.append(describe(*arguments))
        return seen[-1]

    monkeypatch.setattr(autotune, "describe", spy)
    for precision in ("tf32", "ieee", "tf32"):
        convolution_precision.fp32_precision = precision
        autotune.conv_config(x, PROBLEM.layout, GEOMETRY, True)
    assert [problem.dtype for problem in seen] == ["float32", "float32_ieee"]


def test_blocks_hold_on_the_threads_of_the_backward():
    # On a GPU the backward runs on threads that PyTorch starts, outside of Python's contexts.
    x = torch.zeros(8, 64, 32, 32)
    mine, found = WeightGradConfig((1, 1, 64), 64, 64), []

    def backward():
        found.append(autotune.weight_grad_config(x, x, PROBLEM.layout, GEOMETRY))

    with autotune.using(weight_grad=mine), autotune.recording() as seen:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    assert found == [mine] and [problem.kernel for problem in seen] == ["weight_grad"]
    autotune.conv_config(x, PROBLEM.layout, GEOMETRY, False)
    backward()
    assert found[1] != mine and len(seen) == 1


def test_blocks_nest():
    x = torch.zeros(8, 64, 32, 32)
    outer, inner = ConvConfig((1, 1, 32), 16, 16), ConvConfig((1, 1, 32), 32, 16)
    mine = WeightGradConfig((1, 1, 64), 64, 64)

    def choices():
        return (
            autotune.conv_config(x, PROBLEM.layout, GEOMETRY, False),
            autotune.weight_grad_config(x, x, PROBLEM.layout, GEOMETRY),
        )

    with autotune.using(conv=outer, weight_grad=mine):
        with autotune.using(conv=inner):
            assert choices() == (inner, mine)
        assert choices() == (outer, mine)


@pytest.fixture
def no_folder(monkeypatch, tmp_path):
    """A cache directory that cannot be made, even by root."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_TIED_CACHE_DIR", str(tmp_path / "file" / "cache"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("folder", [True, False])
def test_threads_agree_and_time_once(timed, folder, request):
    if not folder:  # then there is no lock on disk either
        request.getfixturevalue("no_folder")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(autotune.tune_problem(PROBLEM, DEVICE).winner))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1 and timed == [PROBLEM]


def test_choosing_without_a_folder_is_silent(no_folder, recwarn):
    assert autotune.config_for(PROBLEM, DEVICE) == cost.sieve(PROBLEM, GPU).untimed
    assert not recwarn


OTHER = Problem("conv", "bfloat16", Layout(128, (3, 3)), (8, 32, 32), GEOMETRY)


@pytest.mark.filterwarnings("always")
def test_without_a_folder_winners_are_kept_in_memory(benchmark_mode, timed, no_folder):
    with pytest.warns(UserWarning, match="cannot be locked") as warned:
        winner, _ = autotune._find(PROBLEM, DEVICE)
        autotune._find(OTHER, DEVICE)
        assert autotune._find(PROBLEM, DEVICE) == (winner, True)
    assert timed == [PROBLEM, OTHER]
    assert winner == cost.sieve(PROBLEM, GPU).candidates[3].config
    assert autotune.config_for(PROBLEM, DEVICE) == winner
    assert any("for this process only" in str(w.message) for w in warned)


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("text", ["", '{"somebody": "else\'s"}', "[" * 100_000])
def test_a_foreign_file_in_the_way_is_left_alone(benchmark_mode, timed, text):
    path = table.path_of(ORIGIN)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match="not a table"):
        winner, _ = autotune._find(PROBLEM, DEVICE)
        autotune._find(OTHER, DEVICE)
        assert autotune._find(PROBLEM, DEVICE) == (winner, True)
    assert timed == [PROBLEM, OTHER] and path.read_text() == text


def test_what_failed_is_not_timed_again(benchmark_mode, monkeypatch):
    seen = []

    def tune_on(device, problem, *_):
        seen.append(problem)
        if problem == PROBLEM:
            return Tuned({})
        return Tuned({cost.sieve(problem, GPU).untimed: 1.0})

    monkeypatch.setattr(trial, "tune_on", tune_on)
    for problem in (PROBLEM, OTHER, PROBLEM):
        autotune._find(problem, DEVICE)
    assert seen == [PROBLEM, OTHER]
    assert autotune.tune_problem(PROBLEM, DEVICE).winner is None and seen[2:] == [PROBLEM]


def test_no_memory_to_time_on_leaves_the_first_choice(benchmark_mode, monkeypatch):
    seen = []

    def tune_on(device, problem, *_):
        seen.append(problem)
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(trial, "tune_on", tune_on)
    for _ in range(2):
        assert autotune._find(PROBLEM, DEVICE) == (autotune.config_for(PROBLEM, DEVICE), True)
    assert seen == [PROBLEM]


def test_threads_may_choose_while_tables_are_read_anew(monkeypatch):
    # Where a look-up finds the table gone that it has just read, this fails at once.
    class Vanishing(dict):
        def __setitem__(self, key, value):
            pass

    monkeypatch.setattr(autotune, "_tables", Vanishing())
    assert autotune.config_for(PROBLEM, DEVICE) == cost.sieve(PROBLEM, GPU).untimed


RANK = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from test_autotune import DEVICE, GPU, ORIGIN, PROBLEM
from triton_tied import autotune, gpus, trial
from triton_tied.tuner import Tuned

def tune_on(device, problem, sieved, budget_s, progress):
    time.sleep(0.5)
    winner = sieved.candidates[int(sys.argv[1])].config
    print("timed", flush=True)
    return Tuned({{winner: 1.0}})

trial.tune_on = tune_on
gpus.of_device = lambda device: GPU
autotune.origin_of = lambda device: ORIGIN
torch.cuda.is_current_stream_capturing = lambda: False
torch.backends.cudnn.benchmark = True
print(autotune._find(PROBLEM, DEVICE))
"""


def test_processes_agree_on_the_choice_of_the_first(tmp_path):
    code = RANK.format(tests=os.path.dirname(__file__))
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    lines = [line for rank in ranks for line in rank.communicate()[0].splitlines()]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert lines.count("timed") == 1
    assert len(lines) == 3 and len(set(lines)) == 2


def model():
    return torch.nn.Sequential(
        tt.TiedConv2d(16, 3, padding=1), tt.TiedConv2d(16, 3, padding=1), tt.TiedConv2d(16, 5)
    )


def test_problems_of_a_model_are_met_forward_and_backward_without_a_gpu():
    net, x = model(), torch.randn(2, 16, 12, 12, requires_grad=True)
    found = tuning.problems_of(lambda: net(x).square().sum().backward())
    met = [(p.kernel, p.layout.kernel_size, p.image[1], p.geometry.padding[0][0]) for p in found]
    assert met == [
        ("conv", (3, 3), 12, 1),  # the second layer's, and both input gradients, are the same
        ("conv", (5, 5), 12, 0),
        ("conv", (5, 5), 8, 4),
        ("weight_grad", (5, 5), 12, 0),
        ("weight_grad", (3, 3), 12, 1),
    ]
    assert not tuning.problems_of(lambda: tt.TiedConv2d(4, 3, stride=2)(torch.randn(1, 4, 9, 9)))


def test_rehearsal_computes_the_reference(monkeypatch):
    net, x = model(), torch.randn(2, 16, 12, 12)
    outputs = []
    tuning.problems_of(lambda: outputs.append(net(x)))
    torch.testing.assert_close(outputs[0], net(x))


def test_tuning_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="expected a GPU to time on, but got device='cuda'"):
        tuning.tune([PROBLEM])


def test_reports_tell_before_and_after(timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (report,) = tuning.tune([PROBLEM], device=DEVICE)
    assert (report.before, report.after) == (12.0, 10.0)
    assert report.floor == cost.floor_us(PROBLEM, GPU) and not report.failures
    left = cost.sieve(PROBLEM, GPU).candidates
    assert [(c.config, c.predicted_us) for c in report.candidates] == list(left)
    medians = [c.median_us for c in report.candidates]
    assert medians == [12.0, None, None, 10.0] + [None] * (len(left) - 4)


def test_budget_is_for_all_problems_together(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    clock, shares = [0.0], []
    monkeypatch.setattr(tuning.time, "monotonic", lambda: clock[0])

    def tune_on(device, problem, sieved, budget_s, progress):
        shares.append(budget_s)
        clock[0] += 1.0 if len(shares) == 1 else budget_s
        return Tuned({sieved.untimed: 1.0})

    monkeypatch.setattr(trial, "tune_on", tune_on)
    tuning.tune(tuning.problems_of_layer(PROBLEM), device=DEVICE, budget_s=9)
    assert shares == [9 / 2, 8]
    shares.clear()
    clock[0] = 0.0
    assert run(capsys, "--shape", "8,96,32,32", "--budget", "9", "--json")[0] == 0
    assert shares == [9 / 3, 8 / 2, 4]


def test_report_as_json_is_what_the_ranking_of_the_cost_model_reads(capsys, timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _, out, _ = run(capsys, "--shape", "8,64,32,32", "--padding", "1", "--json")
    first = json.loads(out)[0]
    assert first["origin"]["gpu"] == "NVIDIA H200" and first["problem"]["kernel"] == "conv"
    left = cost.sieve(timed[0], GPU).candidates
    assert [c["predicted_us"] for c in first["candidates"]] == [c.predicted_us for c in left]
    assert [c["median_us"] for c in first["candidates"][:4]] == [12.0, None, None, 10.0]


@pytest.mark.parametrize("kernel", ["conv", "weight_grad"])
def test_a_trial_leaves_the_random_numbers_of_the_user_alone(kernel):
    before = torch.get_rng_state()
    made = trial.Trial(
        Problem(kernel, "float32", Layout(8, (2, 2)), (1, 4, 4), GEOMETRY, centre="none"), "cpu"
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert made.x.std() > 0.5 and made.packed.std() > 0.5
    assert hasattr(made, "grad") == (kernel == "weight_grad")


TUNE_ON = trial.tune_on  # the tests' machine has another


@pytest.mark.parametrize(("dtype", "wanted"), [("float32", "tf32"), ("float32_ieee", "ieee")])
def test_a_trial_computes_float32_as_the_problem_says(
    monkeypatch, convolution_precision, dtype, wanted
):
    convolution_precision.fp32_precision = "ieee" if wanted == "tf32" else "tf32"
    before = convolution_precision.fp32_precision
    problem = Problem(**vars(PROBLEM) | {"dtype": dtype})
    seen = []

    class Spy:
        run = is_right = fault = None

        def __init__(self, *arguments):
            seen.append(convolution_precision.fp32_precision)

    monkeypatch.setattr(trial, "Trial", Spy)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        trial, "tune", lambda *_, **__: seen.append(convolution_precision.fp32_precision)
    )
    TUNE_ON(DEVICE, problem, cost.sieve(problem, GPU), 1.0, print)
    assert seen == [wanted, wanted]
    assert convolution_precision.fp32_precision == before


def test_summary_tells_before_after_and_the_share_of_the_roofline(capsys, timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status, out, _ = run(capsys, "--shape", "8,64,32,32", "--padding", "1")
    assert status == 0
    line = next(line for line in out.splitlines() if line.startswith("conv 8x64x32x32"))
    share = cost.floor_us(timed[0], GPU) / 10.0
    assert line.split()[-5:] == ["12.0", "10.0", "1.20", f"{share:.0%}", "2/20"]
    monkeypatch.setattr(trial, "tune_on", lambda *_: Tuned({}))
    status, out, _ = run(capsys, "--shape", "8,64,32,32", "--padding", "1", "--again", "--json")
    assert status == 1 and json.loads(out)[0]["after_us"] is None


def run(capsys, *arguments):
    status = cli.main(["tune", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_dry_run_shows_what_would_be_tried_and_why_the_rest_fell(capsys):
    arguments = (
        "--shape",
        "32,128,28,28",
        "--dry-run",
        "--gpu",
        "A100",
        "--symmetry",
        "skew_adjoint",
    )
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and "conv 32x128x28x28 k3x3 p1 skew gathered bfloat16 on A100: floor" in out
    assert "weight_grad" in out and "fell:" in out
    status, out, _ = run(capsys, *arguments, "--json")
    found = json.loads(out)
    assert [set(row) for row in found] == [{"problem", "floor_us", "candidates", "fallen"}] * 3
    assert [row["problem"]["centre"] for row in found] == ["gathered", "unpacked", "none"]
    for row in found:
        assert row["problem"]["layout"]["symmetry"] == "skew_adjoint"
        assert set(row["candidates"][0]) == {"config", "predicted_us"}
        assert all(set(fallen) == {"config", "reason"} for fallen in row["fallen"])
    assert found[0]["fallen"]


def test_dry_run_of_a_model(capsys, monkeypatch, tmp_path):
    (tmp_path / "some_model.py").write_text(
        "import triton_tied as tt\ndef make():\n    return tt.TiedConv2d(24, 3, padding='same')\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = (
        "--model",
        "some_model:make",
        "--input",
        "2,24,20,20",
        "--dry-run",
        "--gpu",
        "H100",
    )
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    assert "conv 2x24x20x20" in out and "weight_grad 2x24x20x20" in out


def test_dry_run_tells_what_is_taken_untimed_where_that_is_not_the_first(capsys):
    arguments = ("--shape", "8,64,32,32", "--dry-run", "--gpu", "H100", "--memory")
    assert "taken if nothing is timed" not in run(capsys, *arguments, "channels_last")[1]
    lines = run(capsys, *arguments, "contiguous")[1].splitlines()
    untimed = next(line for line in lines if "taken if nothing is timed" in line)
    assert "descriptor" in lines[1] and "pointer" in untimed


def test_dry_run_for_amd_multiplies_float32_exactly(capsys):
    arguments = ("--shape", "1,64,8,8", "--dtype", "fp32", "--dry-run", "--gpu", "MI300X")
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and "float32_ieee on MI300X" in out


MODELS = """
import torch, triton_tied as tt
def raises(): raise RuntimeError("two\\nlines")
def narrow(): return tt.TiedConv2d(8, 3)
def dense(): return torch.nn.Conv2d(16, 16, 3)
class Several(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = tt.TiedConv2d(16, 3, padding=1)
    def forward(self, x):
        return {"y": self.conv(x), "x": x, "n": 3}
def frozen(): return Several().requires_grad_(False)
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "odd_models.py").write_text(MODELS)
    (tmp_path / "no_python.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_there:f", "ModuleNotFoundError"),
        ("no_python:f", "SyntaxError"),
        ("odd_models:f", "no attribute 'f'"),
        ("odd_models:torch", "not callable"),
        ("odd_models:raises", "RuntimeError: two lines"),
        ("odd_models:narrow", "to have 8 channels, but got 16"),
        ("odd_models:dense", "ran no tied convolution"),
        (":f", "MODULE:FACTORY"),
    ],
)
def test_models_that_do_not_work_are_told_in_a_line(capsys, models, name, message):
    arguments = ("--model", name, "--input", "1,16,8,8", "--dry-run", "--gpu", "H100")
    status, out, err = run(capsys, *arguments)
    assert status == 2 and not out
    assert message in err and err.startswith("tune: ") and err.count("\n") == 1


@pytest.mark.parametrize(("name", "problems"), [("Several", 3), ("frozen", 2)])
def test_models_may_return_anything(capsys, models, name, problems):
    arguments = ("--input", "1,16,8,8", "--dry-run", "--gpu", "H100", "--json")
    status, out, err = run(capsys, "--model", f"odd_models:{name}", *arguments)
    assert status == 0, err
    assert len(json.loads(out)) == problems


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "much"])
def test_a_budget_is_more_than_nothing(capsys, budget):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tune", "--shape", "1,8,8,8", "--budget", budget])
    assert "expected seconds, more than none" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["1,8,8", "a,8,8,8", "0,8,8,8", "1,-8,8,8", ""])
def test_a_shape_is_four_positive_numbers(capsys, shape):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tune", f"--shape={shape}"])
    assert "expected four positive numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected --shape, --model"),
        (("--dry-run", "--gpu", "H100"), "expected --shape, --model"),
        (("--input", "1,8,8,8"), "which is not given"),
        (("--shape", "1,8,8,8"), "expected a GPU to time on"),
        (("--shape", "1,8,8,8", "--padding", "-1", "--dry-run", "--gpu", "H100"), "negative"),
        (("--shape", "1,8,8,8", "--dilation", "0", "--dry-run", "--gpu", "H100"), "dilation"),
        (("--shape", "1,8,8,8", "--kernel-size", "0", "--dry-run", "--gpu", "H100"), "kernel_size"),
        (("--export", "x.json"), "no entry for NVIDIA H200"),
        (("--shape", "1,8,8,8", "--dry-run", "--gpu", "V100"), "unknown GPU 'V100'"),
        (("--shape", "1,9,8,8", "--groups", "2", "--dry-run", "--gpu", "H100"), "divisible"),
        (("--shape", "1,8,2,2", "--padding", "0", "--dry-run", "--gpu", "H100"), "larger than"),
        (("--shape", "1,8,8,8", "--padding", "full", "--dry-run", "--gpu", "H100"), "full"),
        (("--shape", "1,8,8,8", "--gpu", "H100"), "--gpu names a GPU for --dry-run"),
        (("--model", "nothing", "--input", "1,2,3,4", "--dry-run", "--gpu", "H100"), "MODULE:"),
        (("--import", "missing.json"), "no entry"),
    ],
)
def test_bad_requests_are_refused(capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1


def test_a_table_is_exported_and_imported(capsys, tmp_path, monkeypatch):
    theirs, _ = others()
    store(theirs)
    file = tmp_path / "mine.json"
    assert run(capsys, "--export", str(file))[0] == 0
    monkeypatch.setenv("TRITON_TIED_CACHE_DIR", str(tmp_path / "elsewhere"))
    autotune.forget()
    assert autotune.config_for(PROBLEM, DEVICE) != theirs
    assert run(capsys, "--import", str(file))[0] == 0
    assert autotune.config_for(PROBLEM, DEVICE) == theirs


def test_weight_gradients_are_split_in_the_table_as_tuned():
    problem = tuning.problems_of_layer(PROBLEM)[-1]
    config = cost.sieve(problem, GPU).candidates[0].config
    assert isinstance(config, WeightGradConfig) and problem.kernel == "weight_grad"
    store(config, problem=problem)
    assert autotune.config_for(problem, DEVICE) == config
