"""Whatever a name holds, it stays text."""

import json
import re

from reconmtl.reporting.markup import data_block, escaped, join, tag


def test_escaping() -> None:
    assert tag("p", "<", tag("b", "&"), None, ["x", tag("i")], cls='"', data_tip=None, hidden=True).text == (
        '<p class="&quot;" hidden>&lt;<b>&amp;</b>x<i></i></p>'
    )
    assert escaped("\ud800<\x00") == "\ufffd&lt;\ufffd"
    block = data_block("d", {"</script>": "<!--&"}).text
    assert block.count("<") == 2 and json.loads(re.sub(r"<[^>]+>", "", block)) == {"</script>": "<!--&"}
    assert join("a", [None, tag("br")]).text == "a<br>"
