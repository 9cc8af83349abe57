"""The ``skinfast`` command: a thin layer that turns options into calls and results into lines.

One file a command, which offers ``add(commands)``; ``shared`` has what they print alike.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

import skinfast
from skinfast.cli import (
    audit,
    bench,
    calibrate,
    cross_validate,
    evaluate,
    explain,
    gradient_flow,
    imbalance,
    info,
    predict,
    reproduce,
    selfcheck,
    train,
)
from skinfast.errors import SkinfastError

#: In the order of ``skinfast --help``; each offers ``add``.
_COMMANDS = (
    train,
    evaluate,
    predict,
    calibrate,
    explain,
    audit,
    gradient_flow,
    reproduce,
    cross_validate,
    imbalance,
    bench,
    selfcheck,
    info,
)

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
        _check_processes(options)
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
        if not _is_out_of_memory(error):
            raise
        return _complain("out of memory; lower --batch-size or --image-size", 2)
    except KeyboardInterrupt:
        return _complain(
            "interrupted; a run that has finished an epoch goes on with --resume, an experiment "
            "with the same command again",
            130,
        )


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether there was too little of it; an illegal memory access, say, is a bug to show."""
    import torch

    said = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "out of memory" in said
        or "can't allocate memory" in said  # torch's allocator of the CPU
    )


def _check_processes(options: argparse.Namespace) -> None:
    """Refuse a command that several processes cannot share; one of them tells.

    Raises:
        SkinfastError: torchrun started it.
    """
    from skinfast.environment import started_with_others

    if started_with_others() and not options.in_several_processes:
        if os.environ["RANK"] != "0":
            sys.exit(2)
        raise SkinfastError("only `skinfast train` runs in several processes; leave torchrun out")


def _complain(message: str, code: int) -> int:
    print(f"skinfast: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skinfast", description="Train skin-lesion classifiers on HAM10000, fast."
    )
    parser.add_argument("--version", action="version", version=f"skinfast {skinfast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser
