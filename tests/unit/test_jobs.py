"""One probe or training as a job, and the rehearsal before it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commandline import caller
from logs import make_log, two_task_grams
from reconmtl.choices import Decided, decide, split_method
from reconmtl.errors import PlanError, ReconError, UnknownNameError
from reconmtl.jobs import Job, choose_plan, do, rehearse
from reconmtl.plan import Plan
from reconmtl.runs import Run
from reconmtl.settings import METHODS, PLANS, Settings


@pytest.fixture
def decided() -> Decided:
    return decide(Settings(problem="planted", epochs=1, accelerator="cpu", k=2))


def test_a_method_is_what_is_trained_and_how_its_layers_are_chosen() -> None:
    assert split_method("single") == ("single", None) and split_method("joint") == ("joint", None)
    for plan in PLANS:
        assert split_method(plan) == split_method(f"joint+{plan}") == ("joint", plan)
    for wrong in ("jont", "joint+", "+recon", "recon+joint", "joint+recn", "", "joint+recon+recon"):
        with pytest.raises(UnknownNameError, match="Unknown method"):
            split_method(wrong)
    with pytest.raises(UnknownNameError, match="shares nothing"):
        split_method("single+recon")
    assert decide(Settings(problem="planted", methods=("joint+recon", "recon"))).methods == ("recon",)
    assert all(split_method(m) for m in METHODS)


def test_jobs_of_one_log_leave_runs_with_the_plans_of_their_methods(decided: Decided, tmp_path: Path) -> None:
    log = tmp_path / "log"
    probe = Job(decided, "probe", 0, str(log), accelerator="cpu")
    assert not probe.finished
    do(probe)
    assert probe.finished
    for method in ("recon", "random", "joint"):
        job = Job(decided, method, 3, str(tmp_path / method), log=str(log), accelerator="cpu")
        do(job)
        assert job.finished
    runs = {m: Run.load(tmp_path / m / "seed3") for m in ("recon", "random", "joint")}
    assert runs["joint"].plan is None and runs["recon"].plan is not None and runs["random"].plan is not None
    assert set(runs["recon"].plan.layers) == {"blocks.1", "blocks.4"}
    assert runs["random"].plan.chosen == {"by": "random_layers", "k": 2, "seed": 3}
    assert runs["joint"].log is not None and runs["joint"].config["seed"] == 3


def test_every_way_of_choosing_splits_as_many_layers(decided: Decided) -> None:
    log = make_log(two_task_grams([[0.5, -0.5, -0.5, 0.1], [0.5, -0.5, 0.5, 0.1]]))
    log.types["l2"] = "LayerNorm"
    expected: dict[str, Any] = {
        "recon": ["l1", "l2"],
        "smallest": ["l0", "l1"],
        "first": ["l0", "l1"],
        "last": ["l2", "l3"],
        "norms": ["l2"],
    }
    for by, layers in expected.items():
        assert list(choose_plan(decided, log, by, 0).layers) == layers
    assert choose_plan(decided, log, "random", 5) == Plan.random_layers(log, 2, seed=5)
    assert len(choose_plan(replace(decided, k=None), log, "recon", 0)) == 2  # half of them
    with pytest.raises(PlanError, match="from 1 to 4"):
        choose_plan(replace(decided, k=5), log, "norms", 0)


def test_the_rehearsal_finds_what_would_fail_later_and_leaves_the_random_state(decided: Decided) -> None:
    before = torch.get_rng_state()
    rehearse(decided, Plan(tasks=["plus", "minus"], layers=["blocks.1"]))
    assert torch.equal(torch.get_rng_state(), before)
    for plan, complaint in (
        (Plan(tasks=["plus", "other"], layers=["blocks.1"]), "other"),
        (Plan(tasks=["plus", "minus"], layers=["blokcs.1"]), "blokcs"),
    ):
        with pytest.raises(ReconError, match=complaint):
            rehearse(decided, plan)
    with pytest.raises(PlanError, match="from 1 to 6"):
        rehearse(replace(decided, k=7))


SPARSE = """
from torch.utils.data import Dataset
from reconmtl.problems import planted


class Half(Dataset):
    def __init__(self, of, task):
        self.of, self.task = of, task

    def __len__(self):
        return len(self.of)

    def __getitem__(self, i):
        x, y = self.of[i]
        return x, {t: v for t, v in y.items() if t != self.task}


def make():
    problem = planted.make()
    return problem.replace(test=Half(problem.test, "minus"), val=Half(problem.test, "plus"))


def nothing():
    problem = make()
    return problem.replace(train=Half(problem.train, "plus"))
"""


def test_tasks_without_targets_are_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say = caller(tmp_path, monkeypatch, capsys)
    (tmp_path / "sparse.py").write_text(SPARSE)
    for command in (("run",), ("fit",), ("probe",), ("sweep", "--problems")):
        k = () if command[0] in ("fit", "probe") else ("--k", "7")
        said = say(*command, "sparse.py:make", *k, "--epochs", "2", "--seeds", "0")
        assert said.code == 2 and not (tmp_path / "runs").exists()
        for piece in ("No sample of test has a target for ['minus']", "No sample of val has a target for ['plus']"):
            assert said.err.count(piece) == 1, said.err
        assert not k or "K = 7 layers cannot be chosen" in said.err  # together with what else is wrong
        assert "No sample of train has a target for ['plus']" in say(*command, "sparse.py:nothing").err
    checked = say("check", "sparse.py:make")
    assert checked.code == 2 and "task 'minus': no target in test" in checked.out


def test_a_smoke_test_need_not_meet_every_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say = caller(tmp_path, monkeypatch, capsys)
    rare = SPARSE.replace("if t != self.task}", "if t != self.task or i > 100}")
    (tmp_path / "sparse.py").write_text(rare)
    said = say("fit", "sparse.py:make", "--fast-dev-run", "--json")
    assert said.code == 0 and said.json["rows"][0]["metrics"]["minus"]["mse"]["mean"] is None
