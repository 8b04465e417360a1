"""Which columns of a table are classes, and in which order: by their numbers where they are numbered."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

NO_CLASSES = frozenset({
    "index", "idx", "level_0", "unnamed:_0", "id", "ids", "row", "row_id", "row_number", "number", "nr", "no.", "#",
    "rank", "image", "image_id", "image_index", "img", "img_id", "imageid", "path", "image_path", "file",
    "file_name", "filename", "filepath", "name", "sample", "sample_id", "instance", "instance_id", "example",
    "example_id", "uid", "uuid", "key", "pred", "preds", "predicted", "prediction", "predictions", "predicted_class",
    "predicted_label", "pred_class", "pred_label", "class_pred", "label_pred", "y_pred", "yhat", "y_hat", "argmax",
    "top1", "top_1", "conf", "confidence", "confidences", "certainty", "uncertainty", "entropy", "margin", "max",
    "max_prob", "max_probability", "max_logit", "score", "scores", "prob", "probs", "probability", "probabilities",
    "logit", "logits", "msp", "target", "targets", "truth", "ground_truth", "groundtruth", "gt", "y_true", "y_test",
    "true_class", "true_label", "true_labels", "label_true", "class", "class_id", "class_index", "class_name",
    "classes", "labels", "label_id", "label_index", "label_name", "correct", "is_correct", "hit", "accuracy", "loss",
    "nll", "split", "fold", "subset", "epoch", "seed", "timestamp",
})  # fmt: skip
"""Names of columns, in lower case and with `_` for spaces, that hold something else than the scores of a class."""
SCORES_OF_ONE = frozenset(["score", "scores", "prob", "probs", "probability", "probabilities", "logit", "logits"])
"""Those that may name the one column of a problem of two classes."""
ROWS = 10
"""With fewer rows, numbers may look like something else by chance."""


def classes_of(columns: Mapping[str, np.ndarray], labels: np.ndarray) -> tuple[list[str], int]:
    """Return the names of the columns in the order of the classes, and the number of the first class.

    Parameters
    ----------
    columns : by name, as in the file, all but that of the labels: (row) numbers.
    labels : (row).

    Raises
    ------
    ValueError
        With the column that is no class, or what numbers of columns and labels could mean.
    """
    names = list(columns)
    for name in names:
        plain = re.sub(r"[\s\-]+", "_", name.strip().lower())
        if plain in NO_CLASSES and not (len(names) == 1 and plain in SCORES_OF_ONE):
            raise ValueError(f"column {name!r} holds no scores of a class: leave it out, or rename it if it is a class")
    if len(labels) >= ROWS:
        _check_values(columns, labels)
    return _by_number(names, labels)


def _check_values(columns: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
    """Refuse a column that only counts the rows, or repeats the labels, the predictions or the largest score."""
    values = np.stack(list(columns.values()), axis=1) if columns else np.empty((len(labels), 0))
    for at, (name, own) in enumerate(columns.items()):
        others = np.delete(values, at, axis=1)
        what = ""
        if (np.diff(own) == 1).all() and own[0] == int(own[0]):
            what = "counts the rows"
        elif others.shape[1] > 1 and np.ptp(own) > 0:
            if (own == labels).all():
                what = "repeats the labels"
            elif (own == others.argmax(1)).all():
                what = "is the number of the largest of the others"
            elif (own == others.max(1)).all():
                what = "is the largest of the others"
        if what:
            raise ValueError(f"column {name!r} {what} in every row, so it is no class: leave it out")


def _by_number(names: list[str], labels: np.ndarray) -> tuple[list[str], int]:
    parts = {name: re.fullmatch(r"(.*?)[\s_\-.:]*?(\d+)(?:\.0+)?", name.strip()) for name in names}
    numbers = {name: int(part[2]) for name, part in parts.items() if part}
    prefixes = {part[1] for part in parts.values() if part}
    if len(names) < 2 or len(numbers) < 2 or len(prefixes) > 1:
        return names, 0
    order = sorted(numbers, key=numbers.__getitem__)
    found = [numbers[name] for name in order]
    other = next((name for name in names if name not in numbers), None)
    whole = found == list(range(found[0], found[0] + len(found))) and found[0] in (0, 1)
    if other is not None:
        if whole and found[0] == 0:
            raise ValueError(
                f"columns {order[0]!r} to {order[-1]!r} are the numbers of classes, and {other!r} is none: leave it "
                f"out, or name all classes"
            )
        return names, 0
    if not whole:
        if prefixes == {""}:
            raise ValueError(
                f"the columns are numbered {', '.join(map(str, found[:8]))}{', ...' if len(found) > 8 else ''}; "
                f"expected every number from 0 to {len(found) - 1}, the classes that labels name"
            )
        return names, 0
    if found[0] == 0 or not len(labels) or labels.min() < 1:
        return order, 0
    if labels.max() == found[-1]:
        return order, 1
    raise ValueError(
        f"the columns are numbered 1 to {found[-1]}, and labels go from {labels.min():g} to {labels.max():g}: label 1 "
        f"may be column {order[0]!r} or, if classes count from 0, column {order[1]!r}: number the columns from 0"
    )
