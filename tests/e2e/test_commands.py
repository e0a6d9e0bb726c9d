"""What each command does and says; the steps one by one lead where the whole leads."""

from pathlib import Path

import pytest

from commandline import QUICK, Say, caller
from reconmtl.architectures import ARCHITECTURES
from reconmtl.balancers import BALANCERS
from reconmtl.plan import Plan


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    return caller(tmp_path, monkeypatch, capsys)


# Step by step, and at once. -------------------------------------------------------------------------------------------


def test_the_steps_one_by_one_lead_where_run_leads(say: Say) -> None:
    whole = say("run", *QUICK, "--seeds", "0", "1", "--k", "2", "--methods", "single", "recon", "--jobs", "1", "--json")
    assert whole.code == 0
    assert say("check", "planted", "--json").json["ok"] is True
    probed = say("probe", *QUICK, "--out", "mine", "--json")
    assert probed.json["steps"] == 16 and len(probed.json["layers"]) == 6
    ranked = say("rank", probed.json["log"], "--severity", "-0.1", "--top", "2", "-o", "mine/plan.json", "--json").json
    assert {layer["name"] for layer in ranked["layers"][:2]} == {"blocks.1", "blocks.4"}
    assert Plan.load("mine/plan.json") == Plan.load("runs/planted-default/plan.json")
    for method, more in (("joint", ("--plan", "mine/plan.json")), ("single", ())):
        words = ("--method", method, *more, "--seeds", "0", "1", "--jobs", "1", "--out", f"mine/{method}")
        assert say("fit", "planted", "--epochs", "4", "--accelerator", "cpu", *words).code == 0
    compared = say("compare", "mine/single", "mine/joint", "--json").json
    for one, other in zip(whole.json["rows"], compared["rows"], strict=True):
        assert one["label"] == other["label"] and one["seeds"] == other["seeds"] == [0, 1]
        for name in ("metrics", "delta_m", "megabytes", "conflict_share"):  # all but the time
            assert one[name] == other[name]
    table = say("compare", "runs", "mine", "--against", "single-task")
    assert "Left out" in table.out and "is there already" in table.out  # the two are the same runs


def test_compare_prints_every_format_from_the_same_rows(say: Say) -> None:
    assert say("fit", *QUICK[:3], "--fast-dev-run", "--seeds", "0", "--out", "short").code == 0
    assert say("fit", *QUICK[:3], "--seeds", "0", "1", "--jobs", "1", "--out", "long").code == 0
    said = say("compare", "long", "short", "--baseline", "joint")
    assert "| joint " in said.out and "Left out" in said.out and "epochs 1 instead of 4" in said.out
    for name, start in (("csv", "method,"), ("latex", r"\begin{tabular}"), ("json", "{")):
        assert say("compare", "long", "--format", name).out.startswith(start)
    assert say("compare", "long", "--json").json["rows"][0]["seeds"] == [0, 1]
    (Path("long") / "seed1" / "result.json").write_text("{")
    (Path("long") / "seed0" / "result.json").unlink()
    said = say("compare", "long", "short")
    assert said.code == 0 and "not finished" in said.out and "seed1" in said.out  # the rest can be seen all the same
    said = say("compare", "nowhere", "long/seed1/nothing")
    assert said.code == 2 and "nowhere is no folder" in said.err and "nothing is no folder" in said.err


def test_rank_says_what_is_missing_and_a_budget_or_control_can_be_chosen(say: Say) -> None:
    assert say("probe", *QUICK, "--seeds", "0", "1", "--jobs", "1", "--out", "p", "--json").json["steps"] == 32
    both = say("rank", "p/seed0/log", "p/seed1/log", "--json").json
    assert both["layers"] == say("rank", "p/log", "--json").json["layers"] and both["plan"] is None
    plan = say("rank", "p/log", "--budget-mb", "0.00004", "--json").json["plan"]
    assert len(plan["layers"]) == 1 and plan["chosen"]["by"] == "conflict"  # 8 parameters are 0.00003 MB
    assert say("rank", "p/log", "--by", "random", "--top", "3", "--seed", "7", "--json").json["plan"]["chosen"] == {
        "by": "random_layers",
        "k": 3,
        "seed": 7,
    }
    assert "splits 2 of 6 layers and adds 16 parameters" in say("rank", "p/log", "--top", "2").out
    said = say("rank", "p/lgo", "--severity", "1", "--top", "2", "--budget-mb", "1", "-o", "plan.json")
    assert said.code == 2 and not Path("plan.json").exists()
    for piece in ("p/lgo", "S = 1.0", "give one of them"):
        assert piece in said.err


def test_a_probe_with_a_null_makes_rank_sample_what_chance_gives(say: Say) -> None:
    assert say("probe", *QUICK, "--out", "plain").code == say("probe", *QUICK, "--null", "--out", "p").code == 0
    plain, found = (say("rank", f"{name}/log", "--json").json["layers"] for name in ("plain", "p"))
    assert [layer["score"] for layer in plain] == [layer["score"] for layer in found]
    assert [layer["chance"] for layer in plain] != [layer["chance"] for layer in found]
    assert all(0 < layer["p"] <= 1 and abs(layer["beyond"]) <= 1 for layer in found)
    said = say("rank", "p/log", "--top", "2").out
    assert "by chance (%)" in said and "halves of batches" in said
    assert "halves of batches" not in say("rank", "plain/log").out


def test_fit_refuses_what_cannot_be_trained_before_anything_is_made(say: Say) -> None:
    Plan(tasks=["plus", "minus"], layers=["blokcs.1"]).save("wrong.json")
    Plan(tasks=["plus", "other"], layers=["blocks.1"]).save("tasks.json")
    for words, pieces in (
        (("--plan", "wrong.json"), ["blokcs.1"]),
        (("--plan", "tasks.json"), ["['plus', 'other']", "['plus', 'minus']"]),
        (("--method", "single", "--plan", "wrong.json"), ["--plan does not apply"]),
        (("--method", "jont", "--plan", "none.json", "--epochs", "0"), ["Nearest: 'joint'", "none.json", "epochs = 0"]),
    ):
        said = say("fit", "planted", "--out", "out", *words)
        assert said.code == 2 and all(piece in said.err for piece in pieces), said.err
        assert not Path("out").exists()
    assert say("fit", *QUICK[:3], "--seeds", "0", "--out", "out").code == 0
    again = say("fit", *QUICK[:3], "--seeds", "0", "--method", "single", "--out", "out", "--resume")
    assert again.code == 2 and "other settings" in again.err  # not passed off as what was asked for


def test_check_lists_the_faults_of_a_problem_and_the_layers_that_can_be_split(say: Say) -> None:
    assert "blocks.4" in say("check", "planted").out
    Path("mine.py").write_text(
        "from reconmtl.problems import planted\nfrom reconmtl.problem import Task\n"
        "def make():\n    p = planted.make()\n"
        "    return p.replace(tasks=[*p.tasks, Task('third', loss=planted.summed_error)])\n"
    )
    said = say("check", "mine.py:make")
    assert said.code == 2 and "third" in said.out
    assert say("check", "mine.py:make", "--json").json["ok"] is False
    assert say("check", "planted", "--width", "3").code == 2


def test_ls_lists_the_ready_problems(say: Say) -> None:
    said = say("ls")
    assert said.code == 0
    assert "--preset demo: width 8, data mini, 8 epochs (2 probed)" in said.out
    assert "--preset paper: width 64, data full, 120 epochs (30 probed), batch 256, K = 25" in said.out
    assert {"multifashion", "planted"} <= {entry["name"] for entry in say("ls", "--json").json}


# Every method. --------------------------------------------------------------------------------------------------------

FEW = ("cagrad:c=0.4", "mmoe", "bmtas:epochs=1")
MANY = sorted(
    {*BALANCERS, *ARCHITECTURES, "single", "rotograd:scale=false"} - {"krum", "trimmed-mean", "mmoe", "bmtas"}
)
LAYERS = {"mmoe": "experts.0.0.0", "cross-stitch": "networks.digit.1.0.conv1"}


@pytest.mark.parametrize("method", [*FEW, *(pytest.param(m, marks=pytest.mark.slow) for m in MANY)])
def test_every_method_fits_the_mini_set_with_and_without_a_plan(method: str, say: Say) -> None:
    pytest.importorskip("torchjd")
    words = ("fit", "multifashion", "--method", method, "--width", "2", "--accelerator", "cpu", "--fast-dev-run")
    Plan(tasks=("digit", "fashion"), layers=[LAYERS.get(method, "layer1.0.conv1")]).save("plan.json")
    plain = say(*words, "--out", "plain", "--json")
    assert plain.code == 0, plain.err
    split = say(*words, "--out", "split", "--plan", "plan.json", "--json")
    if method == "single":
        assert split.code == 2
        assert "shares nothing" in split.err
        return
    assert split.code == 0, split.err
    (before,), (after,) = (said.json["rows"] for said in (plain, split))
    assert after["label"].startswith(before["label"] + " w/ ")
    assert after["megabytes"] >= before["megabytes"] * (1 if "bmtas" in method else 1 + 1e-9)


@pytest.mark.slow
def test_the_sweep_file_of_table_1_makes_every_row(say: Say) -> None:
    pytest.importorskip("torchjd")
    path = Path(__file__).parents[2] / "examples" / "table1.yaml"
    said = say("sweep", str(path), "--fast-dev-run", "--accelerator", "cpu", "--jobs", "1", "--width", "2", "--json")
    assert said.code == 0, said.err
    assert said.json["failures"] == []
    rows = {row["label"] for row in said.json["studies"]["multifashion"]["rows"]}
    names = ["RotoGrad (m=100)", "BMTAS (epochs=2)", "joint", "MGDA", "PCGrad", "GradDrop", "CAGrad (c=0.2)", "MMoE"]
    assert {"single-task", *names, *(f"{n} w/ Recon" for n in names)} == rows
