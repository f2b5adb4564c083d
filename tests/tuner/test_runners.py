"""One contract for every runner, in process and in a child; and what only a child survives."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.tuner.test_search import study

from ditune import miniature
from ditune.db.errors import EvaluationFault, UsageFault
from ditune.db.policy import Handoff, MaskCache, Policy
from ditune.db.records import Job, Origin, Trial
from ditune.db.store import Store
from ditune.tuner.child import Child, Limits, own_bytes
from ditune.tuner.devices import device_name
from ditune.tuner.evaluate import Evaluator
from ditune.tuner.here import Here
from ditune.tuner.quality import parse_constraints
from ditune.tuner.source import load_origin
from ditune.tuner.verdict import trial_of
from ditune.tuner.worker import Worker

STEPS = 12
FLOORS = parse_constraints("psnr>=20,psnr_worst>=12")
CALL: dict[str, int | float | str] = {
    "height": 32,
    "width": 32,
    "num_frames": 12,
    "num_inference_steps": STEPS,
    "guidance_scale": 6.0,
}
EVERY_OTHER = Policy(cache=MaskCache(actions=("full", "step") * (STEPS // 2)))
ALMOST_NOTHING = Policy(cache=MaskCache(actions=("full", "step", "step", "step") * (STEPS // 4)))


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Origin:
    folder = tmp_path_factory.mktemp("model")
    miniature.load("small").save_pretrained(folder)
    return Origin(model=str(folder), call=CALL)


@pytest.fixture(scope="module")
def child(origin: Origin) -> Iterator[Child]:
    found = Child(origin)
    yield found
    found.close()


Evaluate = Callable[[Job], Trial]


@pytest.fixture(params=["here", "child", "worker"])
def evaluate(request: pytest.FixtureRequest, origin: Origin, tmp_path: Path) -> Iterator[Evaluate]:
    """Return what makes a trial of a job: in this process, in a child, or by way of the queue."""
    if request.param == "child":
        child: Child = request.getfixturevalue("child")
        yield lambda job: trial_of(job, child.run(job), 1.0)
        return
    source = load_origin(origin)

    def here(job: Job) -> Here:
        return Here(Evaluator(source, job.constraints))

    if request.param == "here":
        yield lambda job: trial_of(job, here(job).run(job), 1.0)
        return
    with Store.open(str(tmp_path / "ditune.db")) as store:
        store.save_study(study())

        def queued(job: Job) -> Trial:
            store.jobs.put(job)
            assert Worker(store.jobs, job.study, here(job)).step()
            found = store.trial(job.uuid)
            assert found is not None
            return found

        yield queued


def job(policy: Policy, floors: str = "psnr>=20,psnr_worst>=12", limit_s: float = 600.0) -> Job:
    """Return a job on two prompts."""
    return Job(
        uuid="u",
        study="study-1",
        number=0,
        source="search",
        policy=policy,
        constraints=parse_constraints(floors),
        prompts=("a red 3 growing", "a blue 7 moving left"),
        seeds=(1, 2),
        pairs=1,
        limit_s=limit_s,
    )


# --- the contract ----------------------------------------------------------------------------


def test_a_policy_gives_its_quality_and_speed(evaluate: Evaluate) -> None:
    asked = job(EVERY_OTHER)
    trial = evaluate(asked)
    assert (asked.uuid, asked.number, "complete") == (trial.uuid, trial.number, trial.state)
    assert {"psnr", "psnr_worst"} == set(trial.quality) == set(trial.violation)
    assert 15.0 < trial.quality["psnr"].worst <= trial.quality["psnr"].mean < 99.0
    assert trial.quality["psnr"].n == 2
    assert trial.speedup is not None and trial.speedup > 0.0
    assert trial.work_ratio == pytest.approx(2.0, rel=0.1)
    assert trial.pairs == 1
    assert trial.videos is not None and trial.work_ratio is not None
    # two tuned ones and the plain one of the pair; the others only where they are not known yet
    assert trial.videos % 1.0 == pytest.approx(2.0 / trial.work_ratio % 1.0)
    assert 2.0 <= trial.videos <= 4.0 + 1e-9


def test_the_plain_pipeline_is_known_without_running_it_against_itself(evaluate: Evaluate) -> None:
    trial = evaluate(job(Policy()))
    assert trial.quality["psnr"].worst == 100.0
    assert (trial.speedup, trial.work_ratio, trial.feasible) == (1.0, 1.0, True)


def test_what_is_hopeless_is_given_up(evaluate: Evaluate) -> None:
    trial = evaluate(job(ALMOST_NOTHING, "psnr_worst>=60"))
    assert (trial.state, trial.quality["psnr_worst"].n) == ("rejected", 1)
    assert "below 60" in str(trial.reason)


def test_what_the_pipeline_cannot_run_misses_every_floor(evaluate: Evaluate) -> None:
    trial = evaluate(job(Policy(handoff=Handoff(sigma=0.5))))
    assert "hands over to a small model and none was given" in str(trial.reason)
    assert (trial.state, trial.speedup) == ("rejected", 1.0)
    assert trial.videos is not None and trial.videos >= 2.0  # it ran plainly, on both prompts
    assert trial.violation == {"psnr": 1.0, "psnr_worst": 1.0}


def test_devices_have_the_same_name_for_all(origin: Origin, child: Child) -> None:
    here = Here(Evaluator(load_origin(origin), FLOORS))
    assert here.device == child.device == device_name(torch.device("cpu"))


# --- only a child ----------------------------------------------------------------------------


def test_a_child_that_hangs_is_killed_and_replaced(child: Child) -> None:
    assert child.run(job(Policy())).values
    assert child._process is not None
    hung = child._process.pid
    os.kill(hung, signal.SIGSTOP)
    with pytest.raises(EvaluationFault, match="took longer than 1 s"):
        child.run(job(EVERY_OTHER, limit_s=1.0))
    assert not Path(f"/proc/{hung}").exists()
    assert child.run(job(Policy())).values
    assert child._process.pid != hung


def test_a_child_that_dies_is_replaced(child: Child) -> None:
    assert child.run(job(Policy())).values
    assert child._process is not None
    os.kill(child._process.pid, signal.SIGSEGV)
    with pytest.raises(EvaluationFault, match="ended by SIGSEGV"):
        child.run(job(EVERY_OTHER))
    assert child.run(job(Policy())).values


def test_too_much_memory_is_an_answer_about_the_policy(child: Child) -> None:
    assert child.run(job(Policy())).values
    assert child._process is not None
    child._limits = Limits(host_bytes=own_bytes(child._process.pid) // 2)
    os.kill(child._process.pid, signal.SIGSTOP)  # so that it is looked at before it answers
    try:
        assert "needs more memory" in child.run(job(EVERY_OTHER)).unfit
        child._limits = Limits()
        assert child.run(job(Policy())).values
        child._limits = Limits(host_bytes=1)
        os.kill(child._process.pid, signal.SIGSTOP)
        with pytest.raises(EvaluationFault, match="the plain pipeline does not run"):
            child.run(job(Policy()))
    finally:
        child._limits = Limits()


def test_a_pipeline_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageFault, match="no model folder"):
        Child(Origin(model=str(tmp_path / "nothing")))
    with pytest.raises(UsageFault, match="without a name"):
        Child(Origin())


def test_a_device_that_is_not_there_is_refused(origin: Origin) -> None:
    with pytest.raises(UsageFault, match="cannot be moved to cuda:99"):
        load_origin(origin, "cuda:99")


PARENT = """
import sys
from ditune.db.records import Origin
from ditune.tuner.child import Child
child = Child(Origin.model_validate_json(sys.argv[1]))
print(child._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's help")
def test_a_child_never_outlives_its_parent(origin: Origin) -> None:
    src = Path(__file__).resolve().parents[2] / "src"
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, origin.model_dump_json()],
        env={**os.environ, "PYTHONPATH": str(src)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        gone = os.pidfd_open(pid)
        os.kill(pid, signal.SIGSTOP)  # as good as in the middle of a generation
        parent.kill()
    ready, _, _ = select.select([gone], [], [], 60.0)
    os.close(gone)
    assert ready
