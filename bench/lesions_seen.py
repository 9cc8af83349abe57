"""Two models on a split by image: on images of lesions that train as well, and on the others.

skinfast reproduce --data data/ham10000 --output OUT --preset best --split image ...
python bench/lesions_seen.py OUT/runs/best/split-by-image/64x64/{resnet50,cnn}/seed-0
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import numpy.typing as npt

from skinfast.evaluation.bootstrap import Answers, difference, estimates
from skinfast.experiments.runs import read_outcome
from skinfast.training import prepare


def chosen(answers: Answers, mask: npt.NDArray[np.bool_]) -> Answers:
    """Those of the images where the mask is true."""
    fields = (getattr(answers, field.name) for field in dataclasses.fields(answers))
    return Answers(*(values[mask] for values in fields))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs=2, metavar="RUN", help="a finished run's folder")
    folders = parser.parse_args().runs
    outcomes = [read_outcome(folder) for folder in folders]
    answers = {outcome.config.model: outcome.answers for outcome in outcomes}
    if len(answers) < 2:
        parser.error("the runs are of one model; give two")
    one, other = answers
    if not np.array_equal(answers[one].image_ids, answers[other].image_ids):
        parser.error("the runs have other test images; give two of one split and seed")
    problem = prepare(outcomes[0].config)
    trained = np.asarray(problem.dataset.lesion_ids)[np.asarray(problem.train_indices)]
    seen = np.isin(answers[one].lesion_ids, trained)
    print(f"test images of lesions that   images  {one:<9}{other:<9}accuracy of {one} less {other}")
    for title, mask in (("train as well", seen), ("do not train", ~seen)):
        if not mask.any():
            continue
        sets = {name: [chosen(all_of, mask)] for name, all_of in answers.items()}
        measured, drawn = estimates(sets)
        lead = difference(measured[one], measured[other], drawn[one], drawn[other])["accuracy"]
        accuracies = [f"{measured[name]['accuracy'].value:<9.3f}" for name in (one, other)]
        interval = f"{lead.value:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]"
        print(f"{title:<30}{mask.sum():<8}{''.join(accuracies)}{interval}")


if __name__ == "__main__":
    main()
