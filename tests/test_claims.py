"""Claims: one owner at a time, whoever asks at once; stale ones go to others."""

import os
import threading
import time

import pytest

from fastmem_pl.claims import ClaimFolder
from fastmem_pl.targets import create_whole


@pytest.fixture
def worker(tmp_path):
    def make(name, stale_after=60.0):
        claims = ClaimFolder(tmp_path / "work", name, stale_after)
        claims.open()
        return claims

    return make


def test_each_part_is_taken_once(worker):
    a, b = worker("a"), worker("b")
    assert a._claim(["x", "y"]) == ("x", 1)
    assert b._claim(["x", "y"]) == ("y", 1)
    assert a._claim(["x", "y"]) is None
    assert a.left(["x", "y"]) == {"x": "a", "y": "b"}


def test_what_is_done_is_not_left(worker):
    a, b = worker("a"), worker("b")
    a._claim(["x"])
    a.finish("x")
    assert b._claim(["x"]) is None
    assert b.left(["x"]) == {}
    a.reopen(["x"])
    assert b._claim(["x"]) == ("x", 2)


def test_of_many_that_ask_at_once_one_gets_it(worker):
    workers = [worker(str(i)) for i in range(8)]
    for part in map(str, range(30)):
        barrier, taken = threading.Barrier(len(workers)), []

        def ask(claims, part=part, barrier=barrier, taken=taken):
            barrier.wait()
            if claims._claim([part]):
                taken.append(claims.worker)

        threads = [threading.Thread(target=ask, args=(claims,)) for claims in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1


def test_of_many_that_take_over_at_once_one_gets_it(worker):
    worker("dead")._claim(["x"])
    workers = [worker(str(i), stale_after=0.05) for i in range(6)]
    for claims in workers:
        assert claims._claim(["x"]) is None
    time.sleep(0.1)
    # All have seen it without a sign of life for long enough.
    assert [claims._claim(["x"]) for claims in workers].count(("x", 2)) == 1


def test_signs_of_life_keep_a_claim(worker):
    a, b = worker("a", stale_after=0.3), worker("b", stale_after=0.3)
    with a.taken(["x"]) as taken:
        assert taken == ("x", False)
        for _ in range(8):
            assert b._claim(["x"]) is None
            time.sleep(0.1)
    # Given back at once, as it was not done.
    assert b._claim(["x"]) == ("x", 2)


def test_an_error_gives_the_claim_back(worker):
    a, b = worker("a"), worker("b")
    with pytest.raises(KeyboardInterrupt), a.taken(["x"]):
        raise KeyboardInterrupt
    assert b.left(["x"]) == {"x": ""}
    assert b._claim(["x"]) == ("x", 2)


def test_no_clock_of_another_machine_counts(worker, tmp_path):
    a, b = worker("a"), worker("b", stale_after=0.2)
    a._claim(["x"])
    (claim,) = (tmp_path / "work").glob("x.*.claim")
    for year in (-30, 30):
        # A claim from the past or the future is as fresh as any that is seen for the first time.
        os.utime(claim, (time.time() + year * 3e7,) * 2)
        assert b._claim(["x"]) is None
    time.sleep(0.3)
    assert b._claim(["x"]) == ("x", 2)


def test_a_worker_that_wakes_up_late_gives_nothing_of_others_back(worker):
    slow, quick = worker("slow"), worker("quick", stale_after=0.05)
    with slow.taken(["x"]):
        # Its signs of life stop.
        slow.path = slow.path.with_name("nowhere")
        quick._claim(["x"])
        time.sleep(0.1)
        assert quick._claim(["x"]) == ("x", 2)
        slow.path = quick.path
    assert quick.left(["x"]) == {"x": "quick"}


def test_nobody_sees_a_folder_that_is_being_removed(worker, tmp_path, monkeypatch):
    a = worker("a")
    a._claim(["x"])
    a.finish("x")

    def kill(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastmem_pl.claims.remove_claims", kill)
    # Killed before anything in it is gone.
    with pytest.raises(KeyboardInterrupt):
        a.close()
    assert not (tmp_path / "work").exists()


def test_files_of_others_stay_when_the_folder_goes(worker, tmp_path):
    a = worker("a")
    a._claim(["x"])
    a.agree("session", "1")
    (tmp_path / "work" / "thesis.tex").write_text("mine")
    a.close()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["thesis.tex"]


def test_a_part_is_given_back_by_whoever_holds_it(worker):
    a, b = worker("a"), worker("b")
    with a.taken(["x"]):
        with b.taken(["x"]) as taken:
            assert taken is None
        assert b.left(["x"]) == {"x": "a"}
    with b.taken(["x"]) as taken:
        assert taken == ("x", True)
        b.finish("x")
    with a.taken(["x"]) as taken:
        assert taken is None


def test_all_use_what_the_first_said(worker):
    a, b = worker("a"), worker("b")
    assert a.agree("size", "4") == "4"
    assert b.agree("size", "9") == "4"


def test_a_file_is_created_once_with_its_content(tmp_path, monkeypatch):
    path = tmp_path / "f"
    assert create_whole(path, "one")
    assert not create_whole(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]

    def no_links(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    assert create_whole(tmp_path / "g", "one")
    assert not create_whole(tmp_path / "g", "two")
    assert (tmp_path / "g").read_text() == "one"


def test_a_link_whose_reply_was_lost_counts(tmp_path, monkeypatch):
    link = os.link

    def lost(source, target):
        link(source, target)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr("os.link", lost)
    assert create_whole(tmp_path / "f", "one")
