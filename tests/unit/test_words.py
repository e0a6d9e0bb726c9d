"""Numbers and lists in sentences."""

import math

from reconmtl.reporting.words import common, fitting, listed, minus, percent, plural, shortened


def test_words() -> None:
    assert (plural(1, "layer"), plural(1200, "layer")) == ("1 layer", "1,200 layers")
    assert listed(["a"]) == "a" and listed(["a", "b"]) == "a and b" and listed(list("abcde")) == "a, b, c and 2 more"
    assert listed([]) == "none"
    assert percent(0.1234) == "12.3\u00a0%" and percent(math.nan) == "n/a"
    assert minus("single-task -0.1 layer-2 (-3)") == "single-task \u22120.1 layer-2 (\u22123)"


def test_long_names_keep_both_ends_and_lose_what_all_share() -> None:
    names = [f"model.encoder.layers.{i}.{'x' * 60}.dense" for i in range(12)]
    assert common(names) == "model.encoder.layers."
    short = shortened(names, most=20)
    assert short[3] == "3.xxxx\u2026xxxxxxx.dense" and len(set(short)) == 12
    assert max(map(len, short)) == 20
    assert common(["a.b", "a.c"]) == "a." and common(["a", "a.c"]) == "" and common(["a.b"]) == common([]) == ""
    assert shortened(["conv1", "layer1.bn"]) == ["conv1", "layer1.bn"]
    assert fitting(["conv1"])[0].text == "<bdi>conv1</bdi>"
    assert fitting(["x" * 20])[0].text.count("<bdi") == 2
