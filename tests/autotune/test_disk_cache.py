"""The table on disk: what is trusted, what is left alone, and several writers at once."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from triton_tied.autotune import disk_cache, gpus
from triton_tied.autotune.candidates import list_of
from triton_tied.autotune.disk_cache import Entry, Origin
from triton_tied.autotune.problem import Problem
from triton_tied.autotune.shortlist import make_shortlist
from triton_tied.geometry import Geometry
from triton_tied.kernels.configs import ConvConfig, WeightGradConfig, as_json
from triton_tied.packing import Layout

ORIGIN = Origin("NVIDIA H200", "9.0", 132, "2.13.0", "3.7.1", "12.8.93")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deeper" / "table.json"


def entry():
    sides = tuple(random.choice([1, 2, 4, 8]) for _ in range(3))
    return Entry(
        ConvConfig(sides, 64, 32, loader="channels_last_descriptor"), random.random(), 2.0, 3.0
    )


def test_what_is_saved_is_loaded(path):
    entries = {
        "conv c64": entry(),
        "weight_grad c64": Entry(WeightGradConfig((1, 1, 64), 64, 64, splits=7), 1.5, 2.5, 0.5),
    }
    disk_cache.save(path, ORIGIN, entries)
    assert disk_cache.load(path, ORIGIN).entries == entries
    text = json.loads(path.read_text())
    assert text["gpu"] == "NVIDIA H200" and text["triton"] == "3.7.1" and text["ptxas"]


def test_saving_adds_and_replaces(path):
    first, second, third = entry(), entry(), entry()
    disk_cache.save(path, ORIGIN, {"conv a": first, "conv b": second})
    disk_cache.save(path, ORIGIN, {"conv b": third})
    assert disk_cache.load(path, ORIGIN).entries == {"conv a": first, "conv b": third}


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": "NVIDIA A100"},
        {"capability": "10.0"},
        {"multiprocessors": 66},
        {"triton": "3.6.0"},
        {"ptxas": "12.9"},
        {"source": "another"},
    ],
)
def test_a_stale_table_is_ignored_and_replaced(path, change, recwarn):
    disk_cache.save(path, replace(ORIGIN, **change), {"conv a": entry()})
    assert disk_cache.load(path, ORIGIN).entries == {}
    fresh = entry()
    disk_cache.save(path, ORIGIN, {"conv b": fresh})
    assert disk_cache.load(path, ORIGIN).entries == {"conv b": fresh}
    assert not recwarn


def test_another_version_of_torch_does_not_matter(path):
    entries = {"conv a": entry()}
    disk_cache.save(path, replace(ORIGIN, torch="2.11.0"), entries)
    assert disk_cache.load(path, ORIGIN).entries == entries


CORRUPT = {
    "empty": "",
    "cut short": '{"format": 1, "gpu": "NVIDIA H',
    "binary": "\x00\x01\x02",
    "a list": "[]",
    "foreign": '{"name": "something else"}',
    "another format": json.dumps({**vars(ORIGIN), "format": 99, "entries": {}, "checked": {}}),
    "a bad row": json.dumps(
        {**vars(ORIGIN), "entries": {"conv a": {"config": {"box": 3}}}, "checked": {}}
    ),
}


def with_row(**changes):
    config = as_json(ConvConfig((1, 8, 8), 64, 32)) | changes.pop("config", {})
    row = {"config": config, "median_us": 1.0, "first_us": None, "predicted_us": 2, **changes}
    return json.dumps({**vars(ORIGIN), "entries": {"conv a": row}, "checked": {}})


CORRUPT |= {
    "nested without end": "[" * 100_000,
    "rows in a list": json.dumps({**vars(ORIGIN), "entries": [], "checked": {}}),
    "no row": json.dumps({**vars(ORIGIN), "entries": {"conv a": None}, "checked": {}}),
    "no time": with_row(median_us="fast"),
    "NaN": with_row(median_us=float("nan")),
    "endless": with_row(predicted_us=float("inf")),
    "before its start": with_row(first_us=-1.0),
    "a yes": with_row(median_us=True),
    "another field": with_row(config={"colour": 1}),
    "words in a box": with_row(config={"box": ["1", "8", "8"]}),
    "an unknown kind": with_row(config={"kind": "fold"}),
    "no box": with_row(config={"box": None}),
    "a fraction": with_row(config={"num_warps": 4.0}),
    "a flag": with_row(config={"num_warps": True}),
    "nothing": with_row(config={"BLOCK_N": 0}),
    "columns that are cut to nothing": with_row(config={"merged": 0}),
    "a list of blocks": with_row(config={"BLOCK_N": [64]}),
}


def test_a_row_of_the_right_types_is_read(path):
    path.parent.mkdir(parents=True)
    path.write_text(with_row())
    read = Entry(ConvConfig((1, 8, 8), 64, 32), 1.0, None, 2.0)
    assert disk_cache.load(path, ORIGIN).entries == {"conv a": read}


@pytest.mark.parametrize("gpu", gpus.KNOWN.values(), ids=gpus.KNOWN)
@pytest.mark.parametrize("kernel", ["conv", "weight_grad"])
def test_whatever_may_win_is_read_as_it_was_written(path, gpu, kernel):
    geometry = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
    problem = Problem(kernel, "bfloat16", Layout(16, (3, 3)), (8, 32, 32), geometry)
    configs = [candidate.config for candidate in list_of(kernel, gpu.target, "bfloat16")]
    configs += [each.config for each in make_shortlist(problem, gpu).candidates]
    entries = {str(number): replace(entry(), config=each) for number, each in enumerate(configs)}
    disk_cache.save(path, ORIGIN, entries)
    assert disk_cache.load(path, ORIGIN).entries == entries


@pytest.mark.parametrize("name", CORRUPT)
def test_what_is_no_table_warns_and_is_left_alone(path, name):
    path.parent.mkdir(parents=True)
    path.write_text(CORRUPT[name])
    with pytest.warns(UserWarning, match="not a table"):
        assert disk_cache.load(path, ORIGIN).entries == {}
    with pytest.raises(FileExistsError, match="not a table"):
        disk_cache.save(path, ORIGIN, {"conv a": entry()})
    assert path.read_text() == CORRUPT[name]


def test_no_table_is_no_entry_and_no_warning(path, recwarn):
    assert disk_cache.load(path, ORIGIN).entries == {}
    assert not recwarn


def test_directory_is_moved_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_TIED_CACHE_DIR", str(tmp_path))
    assert disk_cache.path_of(ORIGIN) == tmp_path / "NVIDIA_H200.json"
    monkeypatch.delenv("TRITON_TIED_CACHE_DIR")
    assert "triton_tied" in str(disk_cache.directory())


def test_a_user_without_a_home_has_no_table_and_no_error(monkeypatch, absent_h200):
    """As in a container that runs under an id which no file of users names."""
    pwd = pytest.importorskip("pwd")

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("TRITON_TIED_CACHE_DIR", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    path = disk_cache.path_of(ORIGIN)
    assert disk_cache.load(path, ORIGIN).entries == {}
    with pytest.raises(OSError):
        disk_cache.save(path, ORIGIN, {"conv a": entry()})
    with pytest.warns(UserWarning, match="TRITON_TIED_CACHE_DIR"), disk_cache.locked(path):
        pass


def test_what_cannot_be_read_is_said_to_be_unreadable(path):
    path.mkdir(parents=True)  # reading it is an error, to root as well
    with pytest.warns(UserWarning, match="cannot be read"):
        assert disk_cache.load(path, ORIGIN).entries == {}


def _add(path, worker, count):
    for i in range(count):
        with disk_cache.locked(path):
            disk_cache.save(path, ORIGIN, {f"conv {worker} {i}": entry()})


def test_two_processes_at_once_lose_nothing(path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(path, worker, 8)) for worker in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    expected = {f"conv {worker} {i}" for worker in range(2) for i in range(8)}
    assert set(disk_cache.load(path, ORIGIN).entries) == expected


def test_threads_lose_nothing(path):
    threads = [threading.Thread(target=_add, args=(path, worker, 5)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(disk_cache.load(path, ORIGIN).entries) == 20


ENDLESS = """
import sys
from pathlib import Path
from triton_tied.autotune import disk_cache
from triton_tied.autotune.disk_cache import Origin
sys.path.insert(0, {tests!r})
from test_disk_cache import ORIGIN, entry
entries = {{f"conv {{i}}": entry() for i in range(300)}}
while True:
    disk_cache.save(Path({path!r}), ORIGIN, entries)
    print("saved", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process by a POSIX signal")
def test_a_writer_that_is_killed_leaves_a_whole_table(path):
    tests = os.path.dirname(__file__)
    code = ENDLESS.format(tests=tests, path=str(path))
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "saved\n"
    time.sleep(random.uniform(0.05, 0.3))
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(disk_cache.load(path, ORIGIN).entries) == 300


def _hold(path, ready):
    with disk_cache.locked(path):
        ready.set()
        time.sleep(60)


@pytest.mark.skipif(os.name != "posix", reason="kills a process by a POSIX signal")
def test_a_lock_dies_with_its_holder(path, recwarn):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(path, ready))
    holder.start()
    assert ready.wait(30)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with disk_cache.locked(path):
        pass
    assert not recwarn


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError("no locks available")])
def test_without_locks_a_warning_says_so_and_work_goes_on(path, monkeypatch, error):
    def refuse():
        raise error

    lock = SimpleNamespace(acquire=refuse, release=lambda: None)
    monkeypatch.setattr(disk_cache.filelock, "FileLock", lambda path: lock)
    with pytest.warns(UserWarning, match="cannot be locked.*TRITON_TIED_CACHE_DIR"):
        _add(path, 0, 1)
    assert len(disk_cache.load(path, ORIGIN).entries) == 1


def test_a_lock_is_given_back_when_work_fails(path):
    with pytest.raises(KeyError), disk_cache.locked(path):
        raise KeyError
    reached = threading.Thread(target=_add, args=(path, 0, 1), daemon=True)
    reached.start()
    reached.join(10)
    assert len(disk_cache.load(path, ORIGIN).entries) == 1


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_table_is_readable_as_other_files_are(path):
    before = os.umask(0o022)
    try:
        disk_cache.save(path, ORIGIN, {"conv a": entry()})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["NVIDIA H200", "../../etc", "a/b\\c: *?", "\u00fc\u4e2d \n", ""])
def test_any_name_of_a_gpu_gives_a_file_in_the_folder(tmp_path, name):
    origin = replace(ORIGIN, gpu=name)
    path = disk_cache.path_of(origin, tmp_path)
    assert path.parent == tmp_path
    entries = {"conv a": entry()}
    disk_cache.save(path, origin, entries)
    assert disk_cache.load(path, origin).entries == entries
