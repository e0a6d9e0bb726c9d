"""The page of results, from the folders of finished trainings.

`python -m reconmtl.paper.results results/paper docs/experiments.md` writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from reconmtl.files import write_bytes
from reconmtl.paper.experiments import EXPERIMENTS, finished_seeds, page
from reconmtl.paper.trainings import SCALES

ENOUGH = 3
"""An experiment with fewer finished rows says nothing yet."""


def pages(out: Path) -> list[str]:
    """One page per scale and experiment of which enough is finished."""
    found = []
    for scale in SCALES:
        for name, experiment in EXPERIMENTS.items():
            place = experiment.places.get(scale)
            if place is None or not any(out.glob(f"{scale}-{place.problem}*")):
                continue
            setup = experiment.setup(scale, out)
            seeds = finished_seeds(name, setup)
            done = [t for t in experiment.trainings if any(t.finished(setup, s) is not None for s in seeds)]
            if len(done) >= min(ENOUGH, len(experiment.trainings)) and done:
                text = page(name, setup, seeds)
                left = [t.row for t in experiment.trainings if t not in done]
                found.append(text + (f"\n\nNot trained yet: {', '.join(left)}." if left else ""))
    return found


def document(out: Path) -> str:
    """The whole page."""
    head = [
        "# Results of the experiments",
        f"Written by `python -m reconmtl.paper.results {out} docs/experiments.md` from the runs in `{out}`; do not "
        "edit. Each run's folder holds its config, versions, plan, metrics and result. `reconmtl paper ls` lists the "
        "experiments, `reconmtl paper run NAME --seeds 0 1 2` does what is missing of one, `reconmtl paper show NAME` "
        "prints its part of this page. Scale mini is a tenth of the data and a sixtieth of the parameters: signs may "
        "carry over to the paper's scale, sizes do not.",
    ]
    return "\n\n".join([*head, *pages(out), ""])


def _write(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")


def main() -> None:
    """Print the page, or write it to the file named last on the command line."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("results/paper")
    content = document(out)
    if len(sys.argv) > 2:
        write_bytes(sys.argv[2], lambda temporary: _write(temporary, content))
    else:
        print(content)


if __name__ == "__main__":
    main()
