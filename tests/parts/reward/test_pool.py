"""The pool against answers that hang, crash, flood and hide; and that nothing is left of it afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from atropos_exp.errors import UserError
from atropos_exp.parts.reward.exact import Exact
from atropos_exp.parts.reward.math_verify import MathVerify
from atropos_exp.parts.reward.pool import RewardPool
from atropos_exp.types import Prompt, RewardFailure
from tests.helpers.paths import ROOT
from tests.helpers.processes import is_alive
from tests.parts.reward import misbehaving

PROMPT = Prompt(
    prompt_id="p/0", data_source="p", text="1+1=", token_ids=np.arange(64, dtype=np.int32), ground_truth="2"
)
TIMEOUT = 1.0


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    """One for all: no test may leave it unusable for the next."""
    with make_pool() as made:
        made.score([])  # loaded: the tests below measure time
        yield made


def make_pool(name: str = "Obedient") -> RewardPool:
    reward = getattr(misbehaving, name)()
    return RewardPool(reward, num_workers=2, timeout_seconds=TIMEOUT, memory_bytes=64 << 20)


def score(pool: RewardPool, *answers: str) -> list[float | str]:
    results = pool.score([(answer, PROMPT) for answer in answers])
    return [result.reason if isinstance(result, RewardFailure) else result for result in results]


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "condition not met in time"
        time.sleep(0.02)


def test_scores_come_in_order(pool: RewardPool) -> None:
    answers = ["x" * (index % 97) for index in range(1000)]
    assert score(pool, *answers) == [float(index % 97) for index in range(1000)]
    assert score(pool) == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("raise value", "error:ValueError"),
        ("raise exit", "error:SystemExit"),
        ("raise interrupt", "error:KeyboardInterrupt"),
        ("recurse", "error:RecursionError"),
        ("give none", "error:TypeError"),
        ("give text", "error:ValueError"),
        ("give nan", "non_finite"),
        ("give -inf", "non_finite"),
        ("exit", "crashed"),
        ("segfault", "crashed"),
        ("hog", "error:MemoryError"),
    ],
)
def test_a_failure_costs_its_own_answer_only(pool: RewardPool, answer: str, reason: str) -> None:
    answers = ["a", answer, *"bcdefgh", answer, "ijk"]
    expected = [reason if one == answer else float(len(one)) for one in answers]
    assert score(pool, *answers) == expected
    assert score(pool, "again") == [5.0]


@pytest.mark.parametrize("answer", ["loop", "sleep 60", "regex", "thread"])
def test_a_hang_ends_at_its_time_limit(pool: RewardPool, answer: str) -> None:
    start = time.monotonic()
    many = ["a"] * 200
    assert score(pool, *many[:100], answer, *many[100:]) == [1.0] * 100 + ["timeout"] + [1.0] * 100
    assert TIMEOUT <= time.monotonic() - start < TIMEOUT + 4


def test_hangs_side_by_side_and_behind_one_another(pool: RewardPool) -> None:
    start = time.monotonic()
    assert score(pool, *["loop"] * 4, "ok") == ["timeout"] * 4 + [2.0]
    assert 2 * TIMEOUT <= time.monotonic() - start < 2 * TIMEOUT + 4  # two workers, two each


def test_the_limit_is_per_answer(pool: RewardPool) -> None:
    slow = f"sleep {0.4 * TIMEOUT}"
    assert score(pool, *[slow] * 8) == [1.0] * 8  # 1.6 limits of work for each of two workers


def test_a_stubborn_process_and_its_children_are_killed(pool: RewardPool, tmp_path: Path) -> None:
    assert score(pool, f"stubborn {tmp_path / 'pids'}", "ok") == ["timeout", 2.0]
    worker, child = map(int, (tmp_path / "pids").read_text().split())
    wait_until(lambda: not is_alive(worker) and not is_alive(child))


def test_a_flood_of_output_goes_nowhere(pool: RewardPool, capfd: pytest.CaptureFixture[str]) -> None:
    assert score(pool, "flood", "ok") == [1.0, 2.0]
    assert capfd.readouterr() == ("", "")


def test_an_alarm_of_one_answer_does_not_hit_the_next(pool: RewardPool) -> None:
    assert score(pool, *["alarm"] * 2, *["sleep 0.5"] * 2) == [1.0] * 4


def test_secrets_stay_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DATABASE_URL", "SSH_AUTH_SOCK", "MY_OWN"]
    for name in names:
        monkeypatch.setenv(name, "secret")
    with make_pool() as pool:
        assert score(pool, *(f"environment {name}" for name in names)) == [0.0] * len(names)
        assert score(pool, "environment PATH") == [1.0]


def test_workers_are_reused_and_replaced_only_after_a_kill(pool: RewardPool) -> None:
    before = set(score(pool, *["process"] * 50))
    assert len(before) <= 2
    assert set(score(pool, *["process"] * 50)) <= before
    score(pool, "exit", "exit")
    assert not set(score(pool, *["process"] * 50)) & before


def test_an_error_of_the_user_ends_the_call_and_leaves_a_working_pool(pool: RewardPool) -> None:
    with pytest.raises(UserError, match="xxxxxxxxx"):
        score(pool, "a", "raise user", "sleep 0.5")
    assert score(pool, "abc") == [3.0]


def test_idle_workers_and_even_the_template_may_be_killed(pool: RewardPool) -> None:
    (worker,) = score(pool, "process")
    os.kill(int(worker), signal.SIGKILL)
    wait_until(lambda: not is_alive(int(worker)))
    assert score(pool, *["abc"] * 9) == [3.0] * 9
    (template,), workers = score(pool, "template"), set(score(pool, *["process"] * 40))
    os.kill(int(template), signal.SIGKILL)
    wait_until(lambda: not any(is_alive(int(worker)) for worker in workers))  # the kernel sees to it
    assert score(pool, *["abc"] * 9) == [3.0] * 9


def test_losing_the_template_in_the_middle_loses_no_answer(pool: RewardPool) -> None:
    (template,) = score(pool, "template")
    before = pool.num_rescored
    # Long answers, killed in the middle of one: between two short ones nothing would be lost, and nothing shown.
    threading.Timer(0.75, os.kill, (int(template), signal.SIGKILL)).start()
    assert score(pool, *["sleep 0.5"] * 8) == [1.0] * 8
    assert 1 <= pool.num_rescored - before <= 2  # the ones that were being scored


@pytest.mark.parametrize(("kills", "result"), [(1, 2.0), (2, "crashed")])
def test_an_answer_whose_worker_is_killed_is_scored_once_more(tmp_path: Path, kills: int, result: float | str) -> None:
    with RewardPool(misbehaving.Obedient(), num_workers=2, timeout_seconds=60.0) as pool:
        killer = threading.Thread(target=kill_who_signs, args=(tmp_path / "signed", kills))
        killer.start()
        assert score(pool, "a", f"sign {kills} {tmp_path / 'signed'}", "bcd") == [1.0, result, 3.0]
        killer.join()
        assert pool.num_rescored == 1


def kill_who_signs(path: Path, times: int) -> None:
    """Kill the first `times` processes that write their ids to `path`."""
    for number in range(times):
        wait_until(lambda number=number: path.exists() and path.read_text().count("\n") > number)
        os.kill(int(path.read_text().splitlines()[number]), signal.SIGKILL)


def test_a_timeout_is_not_tried_again(pool: RewardPool) -> None:
    before = pool.num_rescored
    start = time.monotonic()
    assert score(pool, "sleep 60") == ["timeout"]
    assert pool.num_rescored == before and time.monotonic() - start >= TIMEOUT


def test_a_reward_whose_loading_is_killed_is_loaded_again() -> None:
    def kill_twice() -> None:
        last = 0
        for _ in range(2):
            wait_until(lambda last=last: pool._template.pid != last)
            last = pool._template.pid
            os.kill(last, signal.SIGKILL)

    with make_pool("SlowToLoad") as pool:
        killer = threading.Thread(target=kill_twice)
        killer.start()
        assert score(pool, "abc") == [3.0]
        killer.join()


def test_signals_to_the_whole_job_leave_scoring_alone(pool: RewardPool) -> None:
    processes = {int(process) for process in score(pool, *["template", "process"] * 20)}
    for process in processes:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(process, number)
    assert set(score(pool, *["template", "process"] * 20)) <= processes
    assert all(is_alive(process) for process in processes)


def test_several_threads_share_a_pool(pool: RewardPool) -> None:
    results: dict[int, list[float | str]] = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: score(pool, *["x" * n] * 50)})) for n in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [float(n)] * 50 for n in range(1, 5)}


def test_closing_ends_every_process() -> None:
    with make_pool() as pool:
        processes = {int(p) for p in score(pool, *["process", "template"] * 20)}
        assert all(is_alive(process) for process in processes)
    wait_until(lambda: not any(is_alive(process) for process in processes))
    pool.close()  # a second time does no harm


def test_kill_nine_of_the_run_leaves_no_process(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import sys, threading, time
        sys.path[:0] = [{str(ROOT)!r}]
        import numpy as np
        from tests.parts.reward import misbehaving
        from atropos_exp.parts.reward.pool import RewardPool
        from atropos_exp.types import Prompt
        prompt = Prompt(prompt_id="p", data_source="p", text="", token_ids=np.zeros(1, np.int32), ground_truth="2")
        pool = RewardPool(misbehaving.Obedient(), num_workers=2, timeout_seconds=600.0)
        print(*map(int, pool.score([("template", prompt), ("process", prompt)])), flush=True)
        pool.score([({f"stubborn {tmp_path / 'pids'}"!r}, prompt), ("regex", prompt)])
        """
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        processes = [int(word) for word in run.stdout.readline().split()]
        wait_until(lambda: len((tmp_path / "pids").read_text().split()) == 2 if (tmp_path / "pids").exists() else False)
    finally:
        run.kill()
        run.communicate()
    processes += [int(word) for word in (tmp_path / "pids").read_text().split()]
    wait_until(lambda: not any(is_alive(process) for process in processes))


@pytest.mark.parametrize(
    ("name", "message"),
    [("Unloadable", "Unloadable cannot be loaded.*no module named warp_drive"), ("CrashingAtLoad", "it crashed")],
)
def test_a_reward_that_cannot_be_loaded_is_the_users_error(name: str, message: str) -> None:
    with make_pool(name) as pool, pytest.raises(UserError, match=message):
        score(pool, "a")


def test_a_reward_that_cannot_be_sent_is_the_users_error() -> None:
    with pytest.raises(UserError, match="cannot be sent"):
        RewardPool(lambda answer, prompt: 1.0, num_workers=1, timeout_seconds=1.0)


def test_a_mathematical_bomb_costs_its_own_answer_only() -> None:
    reward = MathVerify(float_rounding=6, require_boxed=False, num_workers=1, timeout_seconds=1.5)
    answers = ["\\boxed{\\frac12}", "\\boxed{10^{10^{10}}}", "0.5", "\\boxed{2}"]
    one = replace(PROMPT, ground_truth="1/2")
    with RewardPool(reward, num_workers=1, timeout_seconds=1.5) as pool:
        assert pool.score([(answer, one) for answer in answers]) == [1.0, RewardFailure(reason="timeout"), 1.0, 0.0]


def test_half_a_thousand_answers_take_milliseconds() -> None:
    reward = Exact(extract=None, last_line=False, ignore_case=False, num_workers=2, timeout_seconds=5.0)
    items = [("2" if index % 2 else "no", PROMPT) for index in range(512)]
    with RewardPool(reward, num_workers=2, timeout_seconds=5.0) as pool:
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            assert sum(score for score in pool.score(items) if isinstance(score, float)) == 256
            seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.06, seconds  # about 0.01 on idle cores; the tests may share theirs


def test_the_worker_imports_no_framework() -> None:
    loaded = "sorted({'torch', 'verl', 'sympy', 'hydra'} & set(sys.modules))"
    code = f"import atropos_exp.parts.reward.worker, sys; print({loaded})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
