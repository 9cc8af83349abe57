"""The ``skinfast`` command: a thin layer that turns options into calls and results into lines."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import skinfast
from skinfast.commands import audit, calibrate, explain, gradient_flow
from skinfast.errors import SkinfastError

_Subparsers = Any

_MENDS = {
    errno.ENOSPC: "; free space on that disk and try again",
    errno.EACCES: "; choose a folder you may write to",
    errno.EPERM: "; choose a folder you may write to",
    errno.EROFS: "; choose a folder you may write to",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 1 on a failed check, 2 on bad input, 130 on an interrupt."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options)
    except SkinfastError as error:
        return _complain(str(error), 2)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        mend = _MENDS.get(error.errno or 0, "")
        return _complain(f"{where}{error.strerror or error}{mend}", 2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return _complain("out of memory; lower --batch-size or --image-size", 2)
    except KeyboardInterrupt:
        return _complain("interrupted; a run that has finished an epoch goes on with --resume", 130)


def _complain(message: str, code: int) -> int:
    print(f"skinfast: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skinfast", description="Train skin-lesion classifiers on HAM10000, fast."
    )
    parser.add_argument("--version", action="version", version=f"skinfast {skinfast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_train, _add_evaluate, _add_predict):
        add(commands)
    for command in (calibrate, explain, audit, gradient_flow):
        command.add(commands)
    for add in (_add_bench, _add_selfcheck, _add_info):
        add(commands)
    return parser


def _add(commands: _Subparsers, name: str, run: Any, help: str, example: str) -> Any:
    command = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example: {example}",
    )
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print the figures as JSON")
    return command


# --- train ----------------------------------------------------------------------------------------


def _add_train(commands: _Subparsers) -> None:
    from skinfast.training.config import TrainConfig, option

    command = _add(
        commands,
        "train",
        _train,
        "train a classifier and write a run folder with its report",
        "skinfast train --model cnn --data data/ham10000 --epochs 30 --output runs/cnn",
    )
    command.add_argument("--output", required=True, metavar="DIR", help="the run folder to make")
    command.add_argument("--resume", action="store_true", help="go on with the run in --output")
    for setting in dataclasses.fields(TrainConfig):
        choices, help = setting.metadata["choices"], setting.metadata["help"]
        # No defaults here: TrainConfig holds them, and --resume must know what was given.
        if setting.type == "bool":
            command.add_argument(
                option(setting.name),
                action="store_true",
                default=argparse.SUPPRESS,
                help=help,
            )
            continue
        kind = {"int": int, "float": float, "str": str}[str(setting.type)]
        command.add_argument(
            option(setting.name),
            type=kind,
            choices=choices,
            default=argparse.SUPPRESS,
            metavar=None if choices else setting.name.upper(),
            help=f"{help} (default: {setting.default})",
        )


def _train(options: argparse.Namespace) -> int:
    from skinfast.evaluation import write_result
    from skinfast.report import write_report
    from skinfast.training import TrainConfig, prepare, train
    from skinfast.training.run_folder import RunFolder

    names = {setting.name for setting in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    if options.resume:
        config = TrainConfig.load(RunFolder(options.output).config_file).continued_by(given)
    else:
        config = TrainConfig(**given)
        RunFolder(options.output).check_new()
    problem = prepare(config)
    _note(
        f"{config.model} on {problem.device}: {len(problem.train_indices)} training and "
        f"{len(problem.split.test)} test images of {config.image_size}x{config.image_size}"
    )
    for image_id, reason in problem.dataset.skipped:
        _note(f"skipped {image_id}: {reason}")
    train(config, options.output, resume=options.resume, problem=problem, on_epoch=_note_epoch)
    result = write_result(options.output, problem)
    report = write_report(options.output)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _print_metrics(result)
        print(f"report: {report}")
    return 0


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _note_epoch(epoch: dict[str, Any]) -> None:
    _note(
        f"epoch {epoch['epoch']}: train loss {epoch['train_loss']:.4f} "
        f"accuracy {epoch['train_accuracy']:.4f}, test loss {epoch['test_loss']:.4f} "
        f"accuracy {epoch['test_accuracy']:.4f}, {epoch['seconds']:.1f} s, "
        f"{epoch['images_per_second']:.0f} images/s"
    )


def _print_metrics(result: dict[str, Any]) -> None:
    print(f"{'class':<8}{'recall':>8}{'precision':>11}{'F1':>8}{'AUC':>8}{'support':>9}")
    for row in result["per_class"]:
        auc = f"{row['auc']:8.3f}" if row["auc"] is not None else f"{'-':>8}"
        print(
            f"{row['name']:<8}{row['recall']:8.3f}{row['precision']:11.3f}{row['f1']:8.3f}{auc}"
            f"{row['support']:9d}"
        )
    auc = f"{result['auc_macro']:.4f}" if result["auc_macro"] is not None else "-"
    print(
        f"accuracy {result['accuracy']:.4f} (always the commonest class: "
        f"{result['majority_accuracy']:.4f}), balanced accuracy {result['balanced_accuracy']:.4f}\n"
        f"F1 weighted {result['f1_weighted']:.4f}, macro {result['f1_macro']:.4f}; precision macro "
        f"{result['precision_macro']:.4f}; AUC macro {auc}"
    )
    for line in calibrate.calibration_lines(result):
        print(line)


# --- evaluate, predict ----------------------------------------------------------------------------


def _add_evaluate(commands: _Subparsers) -> None:
    command = _add(
        commands,
        "evaluate",
        _evaluate,
        "measure a trained run on its test images, or on other data",
        "skinfast evaluate runs/cnn --data data/ham10000",
    )
    command.add_argument("directory", metavar="RUN", help="the folder of a finished run")
    command.add_argument("--data", help="another data folder (default: the one of the run)")
    command.add_argument("--device", help="another device (default: the one of the run)")


def _evaluate(options: argparse.Namespace) -> int:
    from skinfast.evaluation import evaluate_run

    metrics, _, _ = evaluate_run(options.directory, data=options.data, device=options.device)
    if options.json:
        print(json.dumps(metrics, indent=2))
    else:
        _print_metrics(metrics)
    return 0


def _add_predict(commands: _Subparsers) -> None:
    command = _add(
        commands,
        "predict",
        _predict,
        "classify image files with a trained run (not a diagnostic device)",
        "skinfast predict runs/cnn lesion.jpg",
    )
    command.add_argument("directory", metavar="RUN", help="the folder of a finished run")
    command.add_argument("images", metavar="IMAGE", nargs="+", help="JPEG or PNG files")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def _predict(options: argparse.Namespace) -> int:
    from skinfast.data import CLASS_NAMES
    from skinfast.evaluation import predict

    predictions = predict(options.directory, options.images, options.device)
    if options.json:
        print(json.dumps(predictions, indent=2))
        return 0
    for prediction in predictions:
        name = prediction["class"]
        print(
            f"{prediction['image']}: {name} ({CLASS_NAMES.get(name, name)}), "
            f"probability {prediction['probability']:.3f}"
        )
    _note(calibrate.note_on_probabilities(options.directory, predictions[0]["temperature"]))
    return 0


# --- bench ----------------------------------------------------------------------------------------


def _add_bench(commands: _Subparsers) -> None:
    command = _add(
        commands,
        "bench",
        _bench,
        "time models or ops side by side with PyTorch (needs a checkout)",
        "skinfast bench cnn --quick",
    )
    command.add_argument(
        "what", nargs="?", default="models", help="models (default), ops, one model or one op"
    )
    command.add_argument("--quick", action="store_true", help="a short look")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--output", metavar="FILE", help="write JSON here and a plot beside it")


def _bench(options: argparse.Namespace) -> int:
    import os
    import subprocess
    from pathlib import Path

    from skinfast.models import MODELS

    root = Path(skinfast.__file__).resolve().parents[1]
    if not (root / "bench" / "harness.py").is_file():
        raise SkinfastError(
            "the benchmarks are not part of an installed package; run this in a checkout of the "
            "repository, after `pip install --editable .` there"
        )
    ops = sorted(p.stem.removeprefix("bench_") for p in (root / "bench/ops").glob("bench_*.py"))
    script, selection = {
        "models": ("bench_models.py", []),
        "ops": ("bench_ops.py", []),
        **{name: ("bench_models.py", ["--model", name]) for name in MODELS},
        **{name: ("bench_ops.py", [name]) for name in ops},
    }.get(options.what, (None, []))
    if script is None:
        names = ", ".join(["models", "ops", *MODELS, *ops])
        raise SkinfastError(f"there is no benchmark {options.what!r}; choose one of {names}")
    command = [sys.executable, str(root / "bench" / script), *selection, "--device", options.device]
    command += [f"--{flag}" for flag in ("quick", "json") if getattr(options, flag)]
    command += ["--output", options.output] if options.output else []
    # The package that is running is the one that is measured.
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode


# --- selfcheck, info ------------------------------------------------------------------------------


def _add_selfcheck(commands: _Subparsers) -> None:
    command = _add(
        commands,
        "selfcheck",
        _selfcheck,
        "hold every op and model of this installation against pure PyTorch",
        "skinfast selfcheck --output selfcheck.json",
    )
    command.add_argument("--output", metavar="FILE", help="write the results as JSON as well")


def _selfcheck(options: argparse.Namespace) -> int:
    from skinfast.environment import environment
    from skinfast.files import atomic_write_text

    checks = skinfast.selfcheck()
    failed = [check for check in checks if not check.passed]
    text = json.dumps(
        {
            "passed": not failed,
            "checks": [{**dataclasses.asdict(check), "passed": check.passed} for check in checks],
            "environment": environment(),
        },
        indent=2,
    )
    if options.output:
        atomic_write_text(options.output, text + "\n")
    if options.json:
        print(text)
    else:
        print(f"{'subject':<26}{'device':<8}{'dtype':<10}{'calls':>6}  result")
        for check in checks:
            result = "equal" if check.passed else f"DIFFERS: {check.failure}"
            print(
                f"{check.subject:<26}{check.device:<8}{check.dtype:<10}{check.calls:>6}  {result}"
            )
        print(f"{len(checks) - len(failed)} of {len(checks)} checks passed")
    return 1 if failed else 0


def _add_info(commands: _Subparsers) -> None:
    _add(commands, "info", _info, "print what is installed and what it runs on", "skinfast info")


def _info(options: argparse.Namespace) -> int:
    from skinfast.environment import environment

    facts = environment()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            print(f"{name.replace('_', ' ') + ':':<22}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
