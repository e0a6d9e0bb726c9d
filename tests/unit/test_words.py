"""Numbers and lists in sentences."""

import math

from reconmtl.reporting.words import listed, minus, percent, plural


def test_words() -> None:
    assert (plural(1, "layer"), plural(1200, "layer")) == ("1 layer", "1,200 layers")
    assert listed(["a"]) == "a" and listed(["a", "b"]) == "a and b" and listed(list("abcde")) == "a, b, c and 2 more"
    assert listed([]) == "none"
    assert percent(0.1234) == "12.3\u00a0%" and percent(math.nan) == "n/a"
    assert minus("single-task -0.1 layer-2 (-3)") == "single-task \u22120.1 layer-2 (\u22123)"
