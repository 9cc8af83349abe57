"""``skinfast calibrate``."""

from __future__ import annotations

import argparse
import json

from skinfast.cli.shared import Subparsers, add_command, check_seed


def add(commands: Subparsers) -> None:
    command = add_command(
        commands,
        "calibrate",
        _run,
        "fit a run's temperature on half of its test images and measure it on the other half",
        "skinfast calibrate runs/cnn",
    )
    command.add_argument("directory", metavar="RUN", help="the folder of a finished run")
    command.add_argument("--data", help="another data folder (default: the one of the run)")
    command.add_argument("--device", help="another device (default: the one of the run)")
    command.add_argument(
        "--seed", type=int, default=0, help="of the halving and the bootstrap (default: 0)"
    )


def _run(options: argparse.Namespace) -> int:
    from skinfast.evaluation import calibrate_run
    from skinfast.report import write_report
    from skinfast.report.calibration import INTERVAL_COVERAGE

    check_seed(options.seed)
    calibration = calibrate_run(
        options.directory, data=options.data, device=options.device, seed=options.seed
    )
    report = write_report(options.directory)
    if options.json:
        print(json.dumps(calibration, indent=2))
        return 0
    halves = "no lesion in both" if calibration["grouped_by_lesion"] else "lesions not known"
    if "test_images" in calibration:
        print(f"test images: {calibration['test_images']}")
    print(
        f"temperature {calibration['temperature']:.3f}, fitted on {calibration['num_fitted']} of "
        f"the test images and measured on the other {calibration['num_measured']} ({halves})"
    )
    print(f"{'':<20}{'loss':>8}{'calibration error':>19}{'interval':>18}{'confidence':>12}")
    for name, key in (("as trained", "before"), ("with temperature", "after")):
        figures = calibration[key]
        low, high = figures["interval"]
        print(
            f"{name:<20}{figures['loss']:8.4f}{figures['expected_calibration_error']:19.4f}"
            f"{f'{low:.4f} to {high:.4f}':>18}{figures['mean_confidence']:12.4f}"
        )
    print(INTERVAL_COVERAGE)
    after = calibration["after"]
    print(
        f"accuracy on the measured half {after['accuracy']:.4f}; sampling noise alone would show a "
        f"calibration error of {after['expected_if_calibrated']:.4f}"
    )
    if calibration["lesions_shared_with_training"]:
        print(
            f"{calibration['lesions_shared_with_training']} of the test images show a lesion that "
            "also trained the model: these figures flatter; train with --split lesion"
        )
    print(f"report: {report}")
    return 0
