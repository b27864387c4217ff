"""The lock of a folder in a bucket."""

import json
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from bucket import READ_ONLY, bucket

from effjax.core.storage import storage, write_text
from effjax.study import lease
from effjax.study.lock import FolderInUse, FolderLock

FOLDER = "gs://my-bucket/run"
LOCK = "my-bucket/run/.lock"
OTHER = {"pid": 1, "host": "node7", "since": "then", "started": "1", "renewed": 0}


@pytest.fixture
def objects(monkeypatch):
    for name, seconds in (("RENEW", 0.05), ("LEASE", 0.4), ("SETTLE", 0.1)):
        monkeypatch.setattr(lease, name, seconds)
    with bucket() as found:
        yield found


def test_it_is_held_renewed_and_released(objects):
    with FolderLock(FOLDER):
        held = json.loads(objects[LOCK])
        assert (held["pid"], held["host"]) == (os.getpid(), socket.gethostname())
        with pytest.raises(FolderInUse, match=f"in use by process {os.getpid()}"), FolderLock(FOLDER):
            pass
        time.sleep(0.3)
        assert json.loads(objects[LOCK])["renewed"] > held["renewed"]
    assert objects == {}


def test_another_host_that_renews_is_refused(objects):
    ended = threading.Event()

    def renew():
        count = 0
        while not ended.wait(0.05) and count < 40:
            count += 1
            write_text(f"{FOLDER}/.lock", json.dumps({**OTHER, "renewed": count}))

    write_text(f"{FOLDER}/.lock", json.dumps(OTHER))
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(FolderInUse, match="process 1 on node7 since then"):
            FolderLock(FOLDER, say=lambda note: None).__enter__()
    finally:
        ended.set()
        thread.join()
    assert json.loads(objects[LOCK])["host"] == "node7"


@pytest.mark.parametrize("content", [json.dumps(OTHER), "", "[]"])
def test_another_host_that_is_gone_is_taken_over(objects, content):
    write_text(f"{FOLDER}/.lock", content)
    notes, began = [], time.monotonic()
    with FolderLock(FOLDER, say=notes.append):
        assert json.loads(objects[LOCK])["pid"] == os.getpid()
        assert time.monotonic() - began > 0.4
    assert "which is gone" in notes[-1]
    assert objects == {}


def test_of_two_that_take_over_one_wins(objects):
    write_text(f"{FOLDER}/.lock", json.dumps(OTHER))
    path, outcomes, go = storage(f"{FOLDER}/.lock"), [], threading.Barrier(2)

    def refuse(holder):
        raise FolderInUse("refused", holder)

    def take(pid):
        mine = {"pid": pid, "host": f"node{pid}", "since": "now", "started": "2"}
        one = lease.Lease(path, mine, gone=lambda _: None, refuse=refuse, say=lambda _: None)
        go.wait()
        try:
            one.take()
            outcomes.append(one)
        except FolderInUse:
            outcomes.append(None)

    threads = [threading.Thread(target=take, args=(pid,)) for pid in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = filter(None, outcomes)
    assert len(outcomes) == 2
    assert winner.release()


def test_one_who_is_overtaken_while_taking_over_is_refused(objects, monkeypatch):
    write_text(f"{FOLDER}/.lock", json.dumps(OTHER))

    def sleep(seconds):
        if seconds == lease.SETTLE:
            write_text(f"{FOLDER}/.lock", json.dumps({**OTHER, "pid": 7}))
        time.sleep(seconds)

    monkeypatch.setattr(os, "kill", lambda pid, number: None)
    monkeypatch.setattr(lease, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    with pytest.raises(FolderInUse, match="process 7 on node7"), FolderLock(FOLDER, say=lambda note: None):
        pass
    assert json.loads(objects[LOCK])["pid"] == 7


def test_a_lock_that_was_taken_over_stops_the_run_and_is_left_to_its_holder(objects, monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    with FolderLock(FOLDER, say=lambda note: None):
        write_text(f"{FOLDER}/.lock", json.dumps(OTHER))
        time.sleep(0.3)
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert json.loads(objects[LOCK])["host"] == "node7"


def test_a_bucket_without_rights_is_named(objects):
    READ_ONLY.set()
    with pytest.raises(ValueError, match=r"--out gs://my-bucket/run cannot be written \(Forbidden: .*your rights"):
        FolderLock(FOLDER).__enter__()
