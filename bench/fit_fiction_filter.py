"""Measure how well prose fiction is told from other books, and fit the weights anew, on texts that a person has labelled.

    python bench/fit_fiction_filter.py LABELLED        LABELLED/fiction/*.txt and LABELLED/other/*.txt, raw text in lines

Prints precision and recall of `prep/filters.py` as it stands, which texts it gets wrong, precision and recall of weights
fitted in ten-fold cross-validation, and the weights fitted to all.
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from prep.common import BadInput, run
from prep.filters import BIAS, FICTION, WEIGHTS, figures


def report(name: str, taken: np.ndarray, fiction: np.ndarray) -> None:
    right = (taken & fiction).sum()
    print(f"{name}: precision {right / max(1, taken.sum()):.3f}, recall {right / max(1, fiction.sum()):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    paths = [*sorted(args.folder.glob("fiction/*.txt")), *sorted(args.folder.glob("other/*.txt"))]
    if not paths:
        raise BadInput(f"no fiction/*.txt and other/*.txt in {args.folder}")
    fiction = np.array([path.parent.name == "fiction" for path in paths])
    table = np.array([list(figures(path.read_text(encoding="utf-8", errors="replace")).values()) for path in paths])
    scores = table @ np.array(list(WEIGHTS.values())) + BIAS
    print(f"{fiction.sum()} of fiction, {(~fiction).sum()} others")
    report(f"as it stands (above {FICTION})", scores >= FICTION, fiction)
    for i in np.flatnonzero((scores >= FICTION) != fiction):
        print(f"    wrong: {paths[i].parent.name}/{paths[i].name} {scores[i]:.2f}")
    if fiction.all() or not fiction.any():
        return
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = StratifiedKFold(10, shuffle=True, random_state=0)
    unseen = cross_val_predict(model, table, fiction, cv=folds, method="decision_function")
    for limit in (0.0, FICTION):
        report(f"fitted to nine tenths, measured on the tenth (above {limit:g})", unseen >= limit, fiction)
    scaler, regression = model.fit(table, fiction).steps[0][1], model.steps[1][1]
    weights = regression.coef_[0] / scaler.scale_
    bias = regression.intercept_[0] - (weights * scaler.mean_).sum()
    print({name: round(float(w), 2) for name, w in zip(WEIGHTS, weights, strict=True)}, f"bias {bias:.1f}")


if __name__ == "__main__":
    run(main)
