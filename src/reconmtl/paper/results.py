"""The page of results, from the folders of finished trainings.

`python -m reconmtl.paper.results results/paper docs/experiments.md` writes it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from reconmtl.files import write_text
from reconmtl.paper.answers import answer, by_first_layer, disagreements
from reconmtl.paper.controls import answered
from reconmtl.paper.experiments import EXPERIMENTS, Experiment, draw, embedded, finished_seeds, page
from reconmtl.paper.trainings import SCALES, Scale, Setup

ENOUGH = 3
"""An experiment with fewer finished rows says nothing yet."""


def pages(out: Path, page_file: Path | None = None) -> list[str]:
    """One page per scale and experiment of which enough is finished.

    Args:
        out: The folder of the experiments.
        page_file: The file that the pages are for: their figures are written to `out/figures` and shown on it. None
            draws nothing.
    """
    found = []
    for scale in SCALES:
        for name, experiment, setup, seeds in _begun(out, scale):
            done = [t for t in experiment.trainings if any(t.finished(setup, s) is not None for s in seeds)]
            probed = experiment.recorded is not None and bool(experiment.recorded(setup, seeds))
            if probed or (done and len(done) >= min(ENOUGH, len(experiment.trainings))):
                text = page(name, setup, seeds)
                if page_file is not None:
                    text += embedded(name, draw(name, setup, seeds, out / "figures"), page_file)
                left = [t.row for t in experiment.trainings if t not in done]
                found.append(text + (f"\n\nNot trained yet: {'; '.join(left)}." if left else ""))
    return found


def _begun(out: Path, scale: Scale) -> Iterator[tuple[str, Experiment, Setup, tuple[int, ...]]]:
    """Experiments whose folder is there, with the seeds under which something is finished."""
    for name, experiment in EXPERIMENTS.items():
        place = experiment.places.get(scale)
        if place is not None and any(out.glob(f"{scale}-{place.problem}*")):
            setup = experiment.setup(scale, out, showing=True)
            yield name, experiment, setup, finished_seeds(name, setup)


def findings(out: Path, scale: Scale) -> list[str]:
    """What the runs of a scale say: the central question's answer, and the numbers in which ours differ."""
    told, claims = [], {}
    for name, experiment, setup, seeds in _begun(out, scale):
        if name == "controls" and (text := answer(rows := answered(setup, seeds))):
            head = f"## Does it matter which layers are split? The answer at scale {scale}"
            told.append("\n\n".join([head, text, *([more] if (more := by_first_layer(rows)) else [])]))
        if name.startswith("t") and experiment.claims is not None:
            claims[name] = experiment.claims(setup, seeds)
    if text := disagreements(claims):
        head = f"## Where these results and the paper's disagree, at scale {scale}"
        also = "What disagrees within the paper itself is in [its numbers recomputed](paper.md)."
        told.append("\n\n".join([head, also, text]))
    return told


def document(out: Path, page_file: Path | None = None) -> str:
    """The whole page; see `pages`."""
    head = [
        "# Results of the experiments",
        f"Written by `python -m reconmtl.paper.results {out} docs/experiments.md` from the runs in `{out}`; do not "
        "edit. Each run's folder holds its config, versions, plan, metrics and result. `reconmtl paper ls` lists the "
        "experiments, `reconmtl paper run NAME --seeds 0 1 2` does what is missing of one, `reconmtl paper show NAME` "
        "prints its part of this page, `--figures DIR` draws it. Scale mini is a tenth of the data and a sixtieth of "
        "the parameters: signs may carry over to the paper's scale, sizes do not. Times are wall clock, some with "
        "other work beside them: `f11` compares costs.",
    ]
    said = [text for scale in SCALES for text in findings(out, scale)]
    return "\n\n".join([*head, *said, *pages(out, page_file), ""])


def main() -> None:
    """Print the page, or write it to the file named last on the command line."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("results/paper")
    if len(sys.argv) > 2:
        write_text(sys.argv[2], document(out, Path(sys.argv[2])))
    else:
        print(document(out))


if __name__ == "__main__":
    main()
