"""The page: whole, self-contained, safe against names, and a sentence wherever something is missing."""

import base64
import dataclasses
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import reconmtl as rm
from reconmtl.cli import main
from reconmtl.conflicts import ConflictLog
from reconmtl.errors import RunError
from reconmtl.plan import Plan
from reconmtl.reporting import report
from reconmtl.reporting.material import gather
from reconmtl.reporting.page import page, sections
from reconmtl.reporting.windows import Windows
from reconmtl.runs import Run
from studies import conflict_log, material, network_names, write_study

KEYS = ["comparison", "plan", "conflicts", "scores", "cosines", "training", "chance", "stability"]
EVIL = ["<script>alert(1)</script>", '" onload="alert(2)', "</script><img src=x onerror=alert(3)>", "a&b'c\u202e\x07"]


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag else self.inside

    def handle_data(self, data: str) -> None:
        (self.scripts if self.inside == "script" else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).replace("\u00a0", " ").split())

    def ids(self) -> list[str]:
        return [i for _, a in self.tags if (i := a.get("id"))]

    def conclusions(self) -> int:
        return sum(a.get("class") == "conclusion" for _, a in self.tags)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"), tasks=["seg", "depth", "edges"], layers=network_names(12))


def test_a_study_gives_every_part_with_a_conclusion_and_a_command(study: Path, tmp_path: Path) -> None:
    assert rm.report(study, to=tmp_path / "r.html") == tmp_path / "r.html"
    seen = Page(tmp_path / "r.html")
    assert [i for i in seen.ids() if i in KEYS] == KEYS and {"reading", "reproduce"} <= set(seen.ids())
    assert seen.conclusions() == len(KEYS)
    assert seen.text.count("reconmtl run made.py:up") == len(KEYS)  # the last is how the runs were made
    assert f"reconmtl rank {study}/log --severity 0" in seen.text
    assert f"reconmtl report {study} --to r.html" in seen.text
    assert "4 of 12 shared layers are split" in seen.text
    assert "The largest gain is that of joint w/ Recon" in seen.text
    material = gather(study)
    assert material.log is not None
    for part in sections(material, Windows.of(material.log, severity=material.severity)):
        assert part.body is not None and part.conclusion.endswith(".")


def test_the_page_asks_for_nothing_outside_itself(study: Path, tmp_path: Path) -> None:
    text = report(study, to=tmp_path / "r.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<iframe|<img", text.replace("// ", ""), re.IGNORECASE)
    seen = Page(tmp_path / "r.html")
    assert not any(
        name in ("src", "href") and not str(v).startswith("#") for _, a in seen.tags for name, v in a.items()
    )
    policy = next(a["content"] for t, a in seen.tags if t == "meta" and a.get("http-equiv"))
    program = seen.scripts[-1]
    assert policy is not None and "default-src 'none'" in policy
    assert base64.b64encode(hashlib.sha256(program.encode()).digest()).decode() in policy


def test_the_same_runs_give_the_same_page(study: Path, tmp_path: Path) -> None:
    first = report(study, to=tmp_path / "r.html").read_bytes()
    assert report(study, to=tmp_path / "r.html").read_bytes() == first


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    tasks = ["<b>bold</b>", "x'y", '"onclick="']
    write_study(tmp_path / "s", tasks=tasks, layers=EVIL, steps=20)
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    config["problem"] = EVIL[0]
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    runs = [dataclasses.replace(r, label=f"{r.label} {EVIL[2]}") for r in gather(tmp_path / "s").runs]
    seen = Page(report(runs, to=tmp_path / "r.html"))
    assert [t for t, _ in seen.tags if t in ("img", "b1", "iframe")] == []
    assert [a.get("type") for t, a in seen.tags if t == "script"] == ["application/json", None]
    assert not any(name.startswith("on") for _, a in seen.tags for name in a)
    data = json.loads(seen.scripts[0])
    assert data["layers"] == EVIL and data["tasks"] == tasks  # names with few tasks keep their order
    assert EVIL[0] in seen.text and "<b>bold</b>" in seen.text
    assert "\u202e" not in seen.text and "\x07" not in seen.text


def test_a_log_alone_and_a_run_in_memory_leave_sentences_for_what_is_missing(study: Path, tmp_path: Path) -> None:
    seen = Page(report(study / "log", to=tmp_path / "log.html"))
    assert seen.conclusions() == len(KEYS)
    for said in (
        "There is no comparison. No finished run was given",
        "No plan was found",
        "no cosines before and after",
    ):
        assert said in seen.text
    assert "no evaluations over training, because no finished run was given" in seen.text
    run = Run(
        method="joint",
        label="joint",
        seed=0,
        metrics={"a": {"acc": 1.0}},
        directions={"a": {"acc": "max"}},
        parameters=10,
        seconds=1.0,
        fingerprint="f",
        network="Net",
    )
    bare = Page(report([run], to=tmp_path / "run.html"))
    assert bare.conclusions() == len(KEYS)
    for said in (
        "made from Python",
        "there is no network to draw",
        "No log of gradients was found",
        "the runs were not written to a folder",
        "without a single-task baseline there is no",
        "the ranking's stability is unknown",
    ):
        assert said in bare.text, said
    planned = dataclasses.replace(run, plan=Plan(tasks=["a", "b"], layers=["fc"]), label="joint w/ 1 layer")
    assert "1 layer is split: fc. No log was found" in Page(report(planned, to=tmp_path / "p.html")).text


def test_one_seed_and_one_step_are_said_to_be_few(tmp_path: Path) -> None:
    write_study(tmp_path / "s", tasks=["a", "b"], layers=network_names(6), steps=1, seeds=(3,))
    text = Page(report(tmp_path / "s", to=tmp_path / "r.html")).text
    assert "one seed says nothing about the spread" in text and "with one seed the order may be chance" in text
    assert "no log of at least two measured steps" in text


def test_counted_logs_and_runs_that_cannot_be_compared_are_said(tmp_path: Path) -> None:
    write_study(tmp_path / "s", tasks=["a", "b", "c"], layers=network_names(6), counted=True)
    other = write_study(tmp_path / "o", tasks=["a", "z"], layers=network_names(6))
    text = Page(report(tmp_path / "s", to=tmp_path / "r.html")).text
    assert "Single pairs are known over the whole recording only" in text
    mixed = Page(report([tmp_path / "s", other / "joint"], to=tmp_path / "m.html")).text
    assert "Left out:" in mixed and f"{other}/joint/seed1: metrics" in mixed
    assert "Damaged and left out" not in mixed


def test_what_is_damaged_stands_at_the_top_of_the_page_and_in_what_the_command_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_study(tmp_path / "s", tasks=["a", "b"], layers=network_names(6), seeds=range(30))
    for seed in range(25):
        (folder / "joint" / f"seed{seed}" / "metrics.jsonl").write_text('{"epoch": "x", "test": {}}\n')
    text = Page(report(folder, to=tmp_path / "r.html")).text
    first = f"{folder}/joint/seed0: {folder}/joint/seed0/metrics.jsonl, line 1: field 'epoch' should be a whole number"
    assert "Damaged and left out: 25" in text and first in text and "and 5 more" in text
    assert main(["report", str(folder), "--to", str(tmp_path / "r.html")]) == 0
    assert f"- {first}" in capsys.readouterr().out
    assert main(["report", str(folder), "--to", str(tmp_path / "r.html"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["left_out"]) == 25


def test_a_network_of_a_thousand_layers_stays_readable(tmp_path: Path) -> None:
    log = conflict_log(tasks=["a", "b"], layers=[f"block{i}.fc" for i in range(1000)], steps=12)
    log.save(tmp_path / "log")
    path = report(tmp_path / "log", to=tmp_path / "r.html")
    text = Page(path).text
    assert "120 layers with most conflicts; 880 are left out" in text and "The first 60 of 1,000 layers" in text
    assert path.stat().st_size < 3_000_000


def test_forty_tasks_and_forty_layers_fit_into_three_megabytes(tmp_path: Path) -> None:
    tasks = [f"attribute {i}" for i in range(40)]
    write_study(tmp_path / "s", tasks=tasks, layers=network_names(40), steps=64, seeds=(0,))
    path = report(tmp_path / "s", to=tmp_path / "r.html")
    assert path.stat().st_size < 3_000_000
    assert "acc, mean over 40 tasks" in Page(path).text


def test_faults_are_found_before_anything_is_written(study: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError) as error:
        report([study, tmp_path / "nowhere", tmp_path / "empty"], to=tmp_path / "r.html")
    assert "nowhere" in str(error.value) and "holds no run" in str(error.value)
    with pytest.raises(RunError, match="nothing to report on"):
        report([], to=tmp_path / "r.html")
    with pytest.raises(RunError, match=r"is a folder; give a file .*report\.html"):
        report(study, to=tmp_path)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.slow
def test_any_log_and_any_plan_give_a_page_without_a_word_that_is_no_number() -> None:
    for seed in range(300):
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        tasks = [f"t{k}" for k in range(draw.choice([1, 2, 2, 3, 5, 9, 12]))]
        layers = [f"l{k}" for k in range(draw.choice([0, 1, 2, 7]))]
        gradients = torch.randn(draw.choice([0, 1, 2, 5, 40]), len(layers), len(tasks), 4, generator=generator)
        rows, columns = torch.triu_indices(len(tasks), len(tasks))
        grams = (gradients @ gradients.transpose(-1, -2))[:, :, rows, columns]
        missing = torch.rand(grams.shape, generator=generator) < 0.3
        kinds = (
            grams,
            grams.new_full(grams.shape, torch.nan),
            grams * 0,
            grams.where(~missing, torch.nan),
            grams * 0 + 1,
        )
        sizes, types = dict.fromkeys(layers, draw.choice([0, 3])), dict.fromkeys(layers, "X")
        log = ConflictLog(draw.choice(kinds), tasks=tasks, layers=layers, sizes=sizes, types=types)
        if draw.random() < 0.3 and log.steps and len(tasks) > 1:
            log = log.counted()
        plan = None
        if draw.random() < 0.6:
            groups = [tasks] if draw.random() < 0.2 else [[t] for t in tasks]
            plan = Plan(tasks=tasks, layers=dict.fromkeys([*layers, "elsewhere"][: draw.randint(1, 3)], groups))
        severity = draw.choice([-0.1, 0.0, -0.1234])
        text = page(material(log, plan, severity), Windows.of(log, severity=severity))
        body = re.sub(r"<script.*?</script>|<style>.*?</style>", "", text, flags=re.DOTALL)
        assert not re.search(r"(?<![a-z])(nan|inf)(?![a-z])", body, re.IGNORECASE), seed
