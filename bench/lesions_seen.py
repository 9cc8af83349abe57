"""Two models on a split by image: on images of lesions that train as well, and on the others.

skinfast reproduce --data data/ham10000 --output OUT --preset best --split image
python bench/lesions_seen.py OUT/runs/best/split-by-image/64x64/{resnet50,cnn}/seed-0
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import numpy as np
import numpy.typing as npt
from report import run

from skinfast.errors import SkinfastError
from skinfast.evaluation.bootstrap import Answers, difference, estimates
from skinfast.experiments.runs import read_outcome
from skinfast.experiments.tables import MODEL_TITLES, markdown_table, with_interval
from skinfast.training import prepare


def chosen(answers: Answers, mask: npt.NDArray[np.bool_]) -> Answers:
    """Those of the images where the mask is true."""
    fields = (getattr(answers, field.name) for field in dataclasses.fields(answers))
    return Answers(*(values[mask] for values in fields))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs=2, metavar="RUN", help="a finished run's folder")
    outcomes = [read_outcome(folder) for folder in parser.parse_args().runs]
    answers = {MODEL_TITLES[outcome.config.model]: outcome.answers for outcome in outcomes}
    if len(answers) < 2:
        raise SkinfastError("the two runs are of one model; give runs of two")
    one, other = answers
    if not np.array_equal(answers[one].image_ids, answers[other].image_ids):
        raise SkinfastError("the runs have other test images; give two of one split and seed")
    problem = prepare(outcomes[0].config)
    if problem.dataset.lesion_ids is None:
        raise SkinfastError("the runs' data do not say which images show one lesion")
    trained = np.asarray(problem.dataset.lesion_ids)[problem.train_indices]
    seen = np.isin(answers[one].lesion_ids, trained)
    rows = []
    for title, mask in (("train as well", seen), ("do not train", ~seen)):
        if not mask.any():
            continue
        measured, drawn = estimates({name: [chosen(a, mask)] for name, a in answers.items()})
        lead = difference(measured[one], measured[other], drawn[one], drawn[other])
        accuracies = [with_interval(measured[name]["accuracy"]) for name in (one, other)]
        rows.append(
            [title, f"{mask.sum():,}", *accuracies, with_interval(lead["accuracy"], signed=True)]
        )
    head = ["accuracy on test images of lesions that", "images", one, other, f"{one} less {other}"]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    sys.exit(run(main))
