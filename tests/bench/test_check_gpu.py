"""check_gpu: limits, failures, hangs and kills leave a record; a rehearsal runs its stages."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

from skinfast.testing import devices

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "bench" / "gpu"


@pytest.fixture
def gpu(monkeypatch):
    """The modules of bench/gpu, which find each other as scripts do."""
    monkeypatch.syspath_prepend(str(GPU))
    import figures
    import runner
    import stages

    yield type("Gpu", (), {"figures": figures, "runner": runner, "stages": stages})
    for name in ("check", "figures", "kernel_times", "runner", "stages", "summary", "tools"):
        sys.modules.pop(name, None)


def python(code):
    return [sys.executable, "-c", code]


def record_of(folder):
    return json.loads((folder / "check_gpu.json").read_text())


def by_name(folder):
    return {stage["name"]: stage for stage in record_of(folder)["stages"]}


def run(gpu, folder, *stages, seconds=60.0):
    return gpu.runner.Runner(folder, {"device": "none"}, seconds).run(stages)


def test_a_failing_stage_leaves_the_others(gpu, tmp_path):
    code = run(
        gpu,
        tmp_path,
        gpu.runner.Stage("bad", python("import sys; print('why'); sys.exit(3)"), 20),
        gpu.runner.Stage("good", python("print('done')"), 20, lambda: {"rows": 7}),
        gpu.runner.Stage("dependent", python("print()"), 20, needs=["good", "bad"]),
        gpu.runner.Stage("absent", ["/no/such/program"], 20),
        gpu.runner.Stage("left out", [], 20, reason="there is no GPU"),
    )
    assert code == 1
    stages = by_name(tmp_path)
    assert (stages["bad"]["status"], stages["bad"]["reason"]) == ("failed", "exit code 3: why")
    assert (stages["good"]["status"], stages["good"]["figures"]) == ("passed", {"rows": 7})
    assert stages["dependent"]["reason"] == "needs bad, which did not pass"
    assert stages["absent"]["reason"].startswith("the command did not start")
    assert stages["left out"]["reason"] == "there is no GPU"
    assert "| bad | failed | 0 | exit code 3: why |" in (tmp_path / "check_gpu.md").read_text()
    assert (tmp_path / "good.log").read_text() == "done\n"


def test_a_hanging_stage_ends_at_its_limit_with_all_that_it_started(gpu, tmp_path):
    child = "import time; time.sleep(600)"
    hang = f"""
import signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
process = subprocess.Popen([sys.executable, "-c", {child!r}])
print(process.pid, flush=True)
time.sleep(600)
"""
    gpu.runner.GRACE_SECONDS = 0.3
    code = run(
        gpu,
        tmp_path,
        gpu.runner.Stage("hang", python(hang), 1.5, lambda: {"rows": 2}),
        gpu.runner.Stage("after", python("print()"), 20),
    )
    stages = by_name(tmp_path)
    assert code == 1
    assert (stages["hang"]["status"], stages["after"]["status"]) == ("out of time", "passed")
    assert stages["hang"]["figures"] == {"rows": 2}
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int((tmp_path / "hang.log").read_text()), 0)
            if _zombie(int((tmp_path / "hang.log").read_text())):
                raise ProcessLookupError
            time.sleep(0.05)


def _zombie(pid):
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"


def test_a_bench_that_is_cut_short_is_no_failure(gpu, tmp_path):
    slow = python("import time; time.sleep(600)")
    read = {"rows": 1}.copy
    stages = [gpu.runner.Stage("bench", slow, 0.5, read, cut_short=True)]
    stages += [gpu.runner.Stage("after", python("print()"), 20, needs=["bench"])]
    assert run(gpu, tmp_path, *stages) == 0
    assert by_name(tmp_path)["after"]["status"] == "passed"


def test_a_bench_that_is_cut_short_before_its_first_row_makes_the_run_incomplete(gpu, tmp_path):
    slow = python("import time; time.sleep(600)")
    stages = [gpu.runner.Stage("bench", slow, 0.5, cut_short=True)]
    stages += [gpu.runner.Stage("after", python("print()"), 20, needs=["bench"])]
    assert run(gpu, tmp_path, *stages) == gpu.runner.INCOMPLETE
    assert by_name(tmp_path)["after"]["reason"] == "needs bench, which did not pass"
    lines = (tmp_path / "check_gpu.md").read_text().splitlines()
    assert lines[2] == "**Incomplete: there was not time enough for bench.**"


def test_pytest_leaves_its_results_at_the_limit(gpu, tmp_path):
    test = tmp_path / "test_some.py"
    test.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)\n")
    junit = tmp_path / "x.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    read = partial(gpu.figures.of_pytest, junit)
    stage = gpu.runner.Stage("tests", [*command, str(test)], 6, read)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as behind a shell's "&"
    try:
        assert run(gpu, tmp_path, stage) == gpu.runner.FAILED
    finally:
        signal.signal(signal.SIGINT, ignored)
    tests = by_name(tmp_path)["tests"]
    assert tests["status"] == "out of time" and tests["figures"]["tests"] >= 1


def test_the_whole_run_keeps_its_limit(gpu, tmp_path):
    slow = python("import time; time.sleep(600)")
    gpu.runner.GRACE_SECONDS = 0.2
    started = time.monotonic()
    code = run(
        gpu,
        tmp_path,
        gpu.runner.Stage("long", slow, 600, {"rows": 1}.copy, cut_short=True),
        gpu.runner.Stage("late", slow, 600),
        seconds=6.0,
    )
    assert time.monotonic() - started < 9
    stages = by_name(tmp_path)
    assert stages["long"]["status"] == "out of time"
    late = {"status": "no time", "reason": "the stages before took it all"}
    assert stages["late"] | late == stages["late"]
    assert code == gpu.runner.INCOMPLETE
    assert "not time enough for late." in (tmp_path / "check_gpu.md").read_text()


def test_a_commit_that_is_not_known_is_said_to_be(gpu, tmp_path):
    gpu.runner.Runner(tmp_path, {"device": "none", "commit": "unknown"}, 60).run([])
    lines = (tmp_path / "check_gpu.md").read_text().splitlines()
    assert lines[2].startswith("**Of an unknown commit: no git checkout")


def test_a_stage_that_is_not_possible_here_is_skipped_with_its_word(gpu, tmp_path):
    said = python("import sys; print('ncu was not found'); sys.exit(77)")
    assert run(gpu, tmp_path, gpu.runner.Stage("ncu", said, 20)) == 0
    assert by_name(tmp_path)["ncu"]["reason"] == "ncu was not found"


def test_figures_that_cannot_be_read_are_said_to_be_missing(gpu, tmp_path):
    def read():
        raise ValueError("the calls did not come to their end")

    run(gpu, tmp_path, gpu.runner.Stage("x", python("print()"), 20, read))
    assert by_name(tmp_path)["x"]["unread"] == "ValueError: the calls did not come to their end"
    assert "did not come to their end" in (tmp_path / "check_gpu.md").read_text()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, "running"), (15, "interrupted")])
def test_a_kill_leaves_what_was_done(gpu, tmp_path, number, status):
    program = f"""
import sys
sys.path.insert(0, {str(GPU)!r})
from pathlib import Path
from runner import Runner, Stage
python = lambda code: [sys.executable, "-c", code]
slow = python("import time; time.sleep(20)")
stages = [Stage("first", python("print()"), 20), Stage("second", slow, 20)]
sys.exit(Runner(Path({str(tmp_path)!r}), {{}}, 60).run(stages))
"""
    process = subprocess.Popen(python(program))
    while "second" not in (by_name(tmp_path) if (tmp_path / "check_gpu.json").exists() else {}):
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) == (130 if number == 15 else -number)
    stages = by_name(tmp_path)
    assert (stages["first"]["status"], stages["second"]["status"]) == ("passed", status)


def test_an_interrupt_between_a_command_and_its_figures_is_recorded(gpu, tmp_path):
    def read():
        raise KeyboardInterrupt

    assert run(gpu, tmp_path, gpu.runner.Stage("x", python("print()"), 20, read)) == 130
    assert by_name(tmp_path)["x"]["status"] == "interrupted"


# --- figures --------------------------------------------------------------------------------------


def test_figures_of_pytest(gpu, tmp_path):
    test = tmp_path / "test_some.py"
    test.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='needs a GPU')\ndef test_c(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    subprocess.run([*command, f"--junitxml={tmp_path / 'x.xml'}"], cwd=tmp_path, check=False)
    figures = gpu.figures.of_pytest(tmp_path / "x.xml")
    assert [figures[k] for k in ("tests", "failures", "errors", "skipped")] == [3, 1, 0, 1]
    assert figures["failed"] == [{"test": "test_some::test_b", "message": "assert 1 == 2"}]
    assert figures["left out"] == [{"test": "test_c", "reason": "needs a GPU"}]


def test_figures_of_a_sanitizer(gpu, tmp_path):
    log = tmp_path / "memcheck.log"
    log.write_text(
        "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
        "=========     at skinfast::add_relu_kernel\n12 calls of 3 ops\n"
        "========= ERROR SUMMARY: 5 errors\n"
    )
    figures = gpu.figures.of_sanitizer(log)
    assert (figures["errors"], figures["calls"], figures["ops"]) == (5, 12, 3)
    assert figures["complaints"] == [{"line": "Invalid __global__ read of size 4 bytes"}]
    log.write_text("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n")
    with pytest.raises(ValueError, match="did not come to their end"):
        gpu.figures.of_sanitizer(log)


def test_figures_of_ncu_are_of_the_costliest_launch_of_each_kernel(gpu, tmp_path):
    log = tmp_path / "ncu.log"
    titles = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    rows = [
        '"0","adam_kernel","gpu__time_duration.sum","ns","2,500.00"',
        '"1","void skinfast::adam_kernel<0>(int)","gpu__time_duration.sum","us","4.5"',
        '"1","void skinfast::adam_kernel<0>(int)","dram__bytes.sum","Mbyte","7"',
    ]
    log.write_text("\n".join(["==PROF== Connected", titles, *rows]) + "\n")
    (kernel,) = gpu.figures.of_ncu(log)["kernels"]
    assert kernel == {"kernel": "adam_kernel", "microseconds": 4.5, "megabytes": 7.0}
    log.write_text("==PROF== Connected\n")
    with pytest.raises(ValueError, match="ncu measured no kernel"):
        gpu.figures.of_ncu(log)


@pytest.mark.parametrize(
    "name",
    [
        "void skinfast::(anonymous namespace)::x_kernel<float, 4>(float*)",
        "void skinfast::<unnamed>::x_kernel<skinfast::<unnamed>::Pass, 4>(float*)",
        "skinfast::<unnamed>::x_kernel(int)",
        "x_kernel",
        "skinfast::x_kernel(int)",
    ],
)
def test_a_kernels_own_name(gpu, name):
    assert gpu.figures.base_name(name) == "x_kernel"


# --- NVIDIA's tools, in whose place a program says what it was asked ------------------------------


@pytest.fixture
def ask_tool(tmp_path, monkeypatch):
    """The arguments that a script gives to a tool, whose options are those of ``help_text``."""

    def ask(tool, script, *arguments, help_text="", code=0):
        program = tmp_path / tool
        program.write_text(
            f"#!{sys.executable}\nimport json, sys\n"
            f"if '--help' in sys.argv: sys.exit(print({help_text!r}))\n"
            f"print(json.dumps(sys.argv[1:])); sys.exit({code})\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        command = [sys.executable, str(GPU / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    return ask


@pytest.mark.parametrize("option", ["--kernel-regex", "--kernel-name"])
def test_a_sanitizer_watches_our_kernels_and_only_what_they_do(ask_tool, option):
    asked = ask_tool(
        "compute-sanitizer", "sanitize.py", "racecheck", "add_relu",
        help_text=f"  {option} arg", code=99,
    )  # fmt: skip
    program = asked.index(sys.executable)
    assert list(zip(asked[:program:2], asked[1:program:2], strict=True)) == [
        ("--tool", "racecheck"),
        ("--error-exitcode", "99"),
        ("--report-api-errors", "no"),
        ("--launch-timeout", "0"),
        ("--print-limit", "20"),
        (option, "kns=skinfast"),
    ]
    assert asked[program + 1 :] == [str(GPU / "small_shapes.py"), "add_relu"]


def test_the_profiler_is_asked_for_whole_names(ask_tool, tmp_path):
    times = [("apply_kernel", 7.0), ("adam_kernel", 9.0), ("unseen_kernel", None)]
    rows = [{"kernel": name, "microseconds": value} for name, value in times]
    (tmp_path / "times.json").write_text(json.dumps({"kernels": rows}))
    asked = ask_tool("ncu", "profile_kernels.py", tmp_path / "times.json")
    kind, pattern = asked[asked.index("--kernel-name") + 1].split(":", 1)
    assert kind == "regex"
    for name in ("adam_kernel", "skinfast::apply_kernel", "void skinfast::apply_kernel<Pass>(int)"):
        assert re.search(pattern, name), name
    for name in ("evaluation_kernel", "other_adam_kernel", "apply_kernel_rows"):
        assert not re.search(pattern, name), name
    assert asked[asked.index("--print-units") + 1] == "base"
    assert asked[asked.index("--kernels") + 1 :] == ["adam_kernel", "apply_kernel"]


def test_a_kernel_meets_a_cache_that_was_evicted_by_reading(gpu, monkeypatch):
    """What was written would be written back while the kernel that is timed runs."""
    import kernel_times

    made = []
    evict = type("Evict", (), {"sum": lambda self: made.append("read")})()
    monkeypatch.setattr(torch, "ones", lambda *shape, device: evict)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: nullcontext())
    monkeypatch.setattr(kernel_times, "trace_of", lambda profile: [])
    kernel = type("Kernel", (), {"build": lambda self, *_: lambda: made.append("call")})()
    kernel_times.measure(None, kernel, torch.device("cuda"), 2)
    assert made[3:] == ["read", "call"] * 2


# --- the script -----------------------------------------------------------------------------------


def check_gpu(*arguments, **environment):
    return subprocess.run(
        ["bash", "bench/check_gpu.sh", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = check_gpu("--output", tmp_path / "x")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("check_gpu: torch finds no GPU here; run this on a machine with one")
    assert not (tmp_path / "x").exists()


def test_a_stage_that_does_not_exist_is_refused(tmp_path):
    done = check_gpu("--output", tmp_path, "--rehearse", "--only", "tset")
    assert done.returncode == 2
    assert "no stage 'tset'; there are tests, memcheck" in done.stderr


def test_data_that_is_not_there_is_refused(tmp_path):
    done = check_gpu("--output", tmp_path / "x", "--rehearse", "--data", "/nowhere")
    assert done.returncode == 2
    assert done.stderr == "check_gpu: there is no /nowhere; --data needs HAM10000\n"
    assert not (tmp_path / "x").exists()


def test_a_rehearsal_runs_the_stages(tmp_path):
    only = [a for name in ("tests", "memcheck", "ops", "ncu") for a in ("--only", name)]
    done = check_gpu("--output", tmp_path, "--rehearse", "--commit", "abc", *only)
    assert done.returncode == 0, done.stdout + done.stderr
    record = record_of(tmp_path)
    assert (record["commit"], record["rehearsal"]) == ("abc", True)
    stages = by_name(tmp_path)
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "tests": "passed",
        "memcheck": "passed",
        "ops": "passed",
        "ncu": "skipped",
    }
    assert stages["tests"]["figures"]["tests"] >= 7
    assert stages["memcheck"]["figures"]["ops"] == 1
    assert stages["ops"]["figures"]["rows"][0]["times as fast"] > 0
    assert "a rehearsal on the CPU, no result of a GPU" in (tmp_path / "check_gpu.md").read_text()


@pytest.mark.parametrize(
    ("capability", "architecture"), [((8, 0), "8.0"), ((9, 0), "9.0a"), ((12, 0), "12.0a")]
)
def test_the_build_is_for_the_gpu_that_is_there(gpu, tmp_path, capability, architecture):
    build, *others = gpu.stages.stages(gpu.stages.Settings(tmp_path, capability, False))
    assert build.environment == {"SKINFAST_CUDA": "ON", "TORCH_CUDA_ARCH_LIST": architecture}
    assert all("build" in stage.needs for stage in others)


def test_the_limits_before_the_epochs_fit_the_run_and_the_epochs_have_the_rest(gpu, tmp_path):
    import check

    data = tmp_path / "ham"
    chosen = gpu.stages.stages(gpu.stages.Settings(tmp_path, (9, 0), False, data))
    *before, epoch, compiled = chosen
    endings = gpu.runner.GRACE_SECONDS * (len(gpu.runner.ENDINGS) - 1)
    assert sum(stage.limit for stage in before) + endings <= check.SECONDS
    assert epoch.limit == compiled.limit == float("inf")
    assert [stage.name for stage in (epoch, compiled)] == ["epoch", "epoch_compiled"]
    assert "--compile" in compiled.command and "--compile" not in epoch.command
    for stage in (epoch, compiled):
        assert stage.command[stage.command.index("--data") + 1] == str(data)


def test_a_stage_finds_this_checkout_first_and_what_pythonpath_had(gpu, monkeypatch):
    import check

    monkeypatch.setenv("PYTHONPATH", "/one:/two")
    assert check.environment()["PYTHONPATH"] == f"{ROOT}:/one:/two"
    monkeypatch.delenv("PYTHONPATH")
    assert check.environment()["PYTHONPATH"] == str(ROOT)


def test_the_tests_of_a_gpu_are_chosen(gpu, tmp_path):
    chosen = gpu.stages.stages(gpu.stages.Settings(tmp_path, (9, 0), False))
    (tests,) = [stage for stage in chosen if stage.name == "tests"]
    wanted = tests.command[tests.command.index("-k") + 1]
    files = ["tests/ops/test_conv2d_tensor_core.py", "tests/cuda/test_cuda_large_tensors.py"]
    command = [sys.executable, "-m", "pytest", "--collect-only", *files]
    counts = [
        subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
        .stdout.splitlines()[-1].split(" in ")[0]
        for more in ([], ["-k", wanted])
    ]  # fmt: skip
    assert counts[0] == counts[1] and "tests collected" in counts[0]


@pytest.mark.skipif("cuda" in devices(), reason="they would run")
@pytest.mark.parametrize("name", ["kernel_times", "ops", "epoch", "epoch_compiled"])
def test_the_benches_take_the_options_that_they_are_given_on_a_gpu(gpu, tmp_path, name):
    chosen = gpu.stages.stages(gpu.stages.Settings(tmp_path, (9, 0), False))
    (stage,) = [stage for stage in chosen if stage.name == name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(stage.command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "bench: --device is cuda, but torch finds no GPU; use --device cpu\n"
