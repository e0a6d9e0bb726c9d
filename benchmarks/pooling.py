"""How much the ways of counting depth, normals and classes differ, on drawn rooms and a briefly trained network.

    python benchmarks/pooling.py

Per image: a number per image, averaged over images, as the paper's code. Per pixel: all pixels of the test set
together. The last column is torchmetrics' metric of the same name on the pixels that count.
"""

import torch
from torchmetrics import JaccardIndex, MeanAbsoluteError, MeanAbsolutePercentageError
from torchmetrics.classification import MulticlassAccuracy

import reconmtl as rm
from reconmtl.evaluation import Machine
from reconmtl.metrics import DepthError, MeanIoU, NormalError, PixelAccuracy
from reconmtl.problems import scenes
from reconmtl.problems.rooms import CLASSES


def main() -> None:
    """Train, evaluate in every way, print a table."""
    torch.set_num_threads(1)
    problem = scenes.make(width=8, images=160, held_out=96)
    (run,) = rm.fit(problem, epochs=4, machine=Machine(accelerator="cpu"))
    model = run.model()
    with torch.no_grad():
        parts = [problem.test.batch(at) for at in torch.arange(96).split(16)]
        outputs = [model(x) for x, _ in parts]
    output = {t: torch.cat([o[t] for o in outputs]) for t in problem.task_names}
    target = {t: torch.cat([y[t] for _, y in parts]) for t in problem.task_names}

    def number(metric: object, task: str) -> str:
        metric.update(output[task], target[task])  # type: ignore[attr-defined]
        return f"{float(metric.compute()):.4g}"  # type: ignore[attr-defined]

    def theirs(metric: object, task: str, keep: torch.Tensor | None = None, scale: float = 1.0) -> str:
        y, x = target[task], output[task]
        metric.update(*((x.argmax(1), y) if keep is None else (x[keep], y[keep])))  # type: ignore[attr-defined]
        return f"{scale * float(metric.compute()):.4g}"  # type: ignore[attr-defined]

    n = len(CLASSES)
    known = target["depth"] > 0
    classes = {"num_classes": n, "ignore_index": -1}
    rows = [
        (
            "mIoU (%)",
            "",
            number(MeanIoU(n), "semantic"),
            theirs(JaccardIndex("multiclass", **classes), "semantic", None, 100),
        ),
        (
            "pixel accuracy (%)",
            "",
            number(PixelAccuracy(n), "semantic"),
            theirs(MulticlassAccuracy(average="micro", **classes), "semantic", None, 100),
        ),
    ]
    for kind, other in (("abs", MeanAbsoluteError()), ("rel", MeanAbsolutePercentageError())):
        both = [number(DepthError(kind, pool=p), "depth") for p in ("image", "pixel")]  # type: ignore[arg-type]
        rows.append((f"depth, {kind}", *both, theirs(other, "depth", known)))  # type: ignore[arg-type]
    for kind in ("mean", "median", 11.25, 22.5, 30.0):
        both = [number(NormalError(kind, pool=p), "normal") for p in ("image", "pixel")]  # type: ignore[arg-type]
        rows.append((f"normals, {kind}", *both, ""))
    print("| metric | per image | per pixel | torchmetrics |\n|---|---:|---:|---:|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
