"""Tuning: who times what, and where winners are kept; no GPU is asked."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from stand_ins import DEVICE, GPU, ORIGIN, OTHER, PROBLEM, others

from triton_tied.autotune import disk_cache, select, trial, tuning
from triton_tied.autotune.cost_model import floor_us
from triton_tied.autotune.disk_cache import Entry
from triton_tied.autotune.problem import problems_of_layer
from triton_tied.autotune.race import Outcome
from triton_tied.autotune.shortlist import make_shortlist
from triton_tied.autotune.tuned_configs import config_for

pytestmark = pytest.mark.usefixtures("absent_h200")


def test_a_choice_made_meanwhile_by_another_process_is_taken(timed):
    theirs, _ = others()
    config_for(PROBLEM, DEVICE)  # reads the table while it is empty
    disk_cache.save(disk_cache.path_of(ORIGIN), ORIGIN, {PROBLEM.key: Entry(theirs, 1.0, 2.0, 3.0)})
    assert tuning.tune_problem(PROBLEM, DEVICE).winner == theirs and not timed
    assert tuning.tune_problem(PROBLEM, DEVICE, again=True).winner != theirs and timed


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("folder", [True, False])
def test_threads_agree_and_time_once(timed, folder, request):
    if not folder:  # then there is no lock on disk either
        request.getfixturevalue("no_folder")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(tuning.tune_problem(PROBLEM, DEVICE).winner))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1 and timed == [PROBLEM]


@pytest.mark.filterwarnings("always")
def test_without_a_folder_winners_are_kept_in_memory(timed, no_folder):
    with pytest.warns(UserWarning, match="cannot be locked") as warned:
        winner = select.choose(PROBLEM, DEVICE, times=True)
        select.choose(OTHER, DEVICE, times=True)
        assert select.choose(PROBLEM, DEVICE, times=True) == winner
    assert timed == [PROBLEM, OTHER]
    assert winner == make_shortlist(PROBLEM, GPU).candidates[3].config
    assert config_for(PROBLEM, DEVICE) == winner
    assert any("for this process only" in str(w.message) for w in warned)


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("text", ["", '{"somebody": "else\'s"}', "[" * 100_000])
def test_a_foreign_file_in_the_way_is_left_alone(timed, text):
    path = disk_cache.path_of(ORIGIN)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match="not a table"):
        winner = select.choose(PROBLEM, DEVICE, times=True)
        select.choose(OTHER, DEVICE, times=True)
        assert select.choose(PROBLEM, DEVICE, times=True) == winner
    assert timed == [PROBLEM, OTHER] and path.read_text() == text


def test_what_failed_is_not_timed_again(monkeypatch):
    seen = []

    def race_on(device, problem, *_):
        seen.append(problem)
        if problem == PROBLEM:
            return Outcome({})
        return Outcome({make_shortlist(problem, GPU).untimed: 1.0})

    monkeypatch.setattr(trial, "race_on", race_on)
    for problem in (PROBLEM, OTHER, PROBLEM):
        select.choose(problem, DEVICE, times=True)
    assert seen == [PROBLEM, OTHER]
    assert tuning.tune_problem(PROBLEM, DEVICE).winner is None and seen[2:] == [PROBLEM]


RANK = """
import sys, time, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from stand_ins import DEVICE, GPU, ORIGIN, PROBLEM
from triton_tied.autotune import gpus, select, trial, tuned_configs
from triton_tied.autotune.race import Outcome

rank, folder = int(sys.argv[1]), Path({folder!r})

def race_on(device, problem, shortlist, budget_s, progress):
    # What the GPU waits for: a collective, which all ranks must have reached.
    (folder / str(rank)).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)
    return Outcome({{shortlist.candidates[rank].config: 1.0}})

trial.race_on = race_on
gpus.of_device = lambda device: GPU
tuned_configs.origin_of = lambda device: ORIGIN
print(select.choose(PROBLEM, DEVICE, times=True))
"""


def test_processes_agree_though_each_waits_for_the_other_while_it_times(tmp_path):
    code = RANK.format(
        tests=os.path.dirname(os.path.dirname(__file__)), folder=str(tmp_path / "reached")
    )
    (tmp_path / "reached").mkdir()
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    chosen = {rank.communicate(timeout=120)[0] for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert len(chosen) == 1 and "Config" in chosen.pop()


def test_tuning_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="expected a GPU to time on, but got device='cuda'"):
        tuning.tune([PROBLEM])


def test_reports_tell_before_and_after(timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (report,) = tuning.tune([PROBLEM], device=DEVICE)
    assert (report.before, report.after) == (12.0, 10.0)
    assert report.floor == floor_us(PROBLEM, GPU) and not report.failures
    left = make_shortlist(PROBLEM, GPU).candidates
    assert [(c.config, c.predicted_us) for c in report.candidates] == list(left)
    medians = [c.median_us for c in report.candidates]
    assert medians == [12.0, None, None, 10.0] + [None] * (len(left) - 4)


def test_budget_is_for_all_problems_together(shares_of_time):
    tuning.tune(problems_of_layer(PROBLEM), device=DEVICE, budget_s=9)
    assert shares_of_time == [9 / 2, 8]
