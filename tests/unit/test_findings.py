from reconmtl.findings import Checked, CheckedLayer, Finding


def test_a_check_prints_faults_first_and_long_reasons_below_the_table() -> None:
    layers = (
        CheckedLayer("a", "Linear", 1000, ("x", "y"), True),
        CheckedLayer("b", "Linear", 5, ("x",), False, "only x reaches it"),
        CheckedLayer("c", "Odd", 7, ("x", "y"), False, "a reason that is far too long for a cell of a table"),
    )
    findings = (Finding("model", "wrong"), Finding("train", "odd", "warning"))
    checked = Checked("p", ("x", "y"), findings, {"train": {"x": 8, "y": 3}}, {"train": 8}, layers)
    text = str(checked).splitlines()
    assert text[:4] == [
        "p: 1 fault, 1 warning.",
        "✗ model: wrong",
        "! train: odd",
        "train: looked at 8 samples; targets are there for y on 3.",
    ]
    assert "- c: a reason that is far too long for a cell of a table" in text
    assert text[-1] == "1 layer with 1,000 parameters can be split."
    assert [f.about for f in checked.faults] == ["model"]
    assert not checked.ok
    assert Checked("p", ("x",), (Finding("train", "odd", "warning"),)).ok
