"""Training: resuming, reproducibility, the run folder under failure."""

import dataclasses
import errno
import json
import shutil
import subprocess

import pytest
import torch

from skinfast.data import DeviceBatches
from skinfast.errors import SkinfastError
from skinfast.evaluation import write_result
from skinfast.training import TrainConfig, load_model, prepare, train
from skinfast.training.run_folder import RunFolder


@pytest.fixture
def config(small_data):
    return TrainConfig(data=str(small_data), image_size=32, epochs=3, batch_size=16, device="cpu")


def weights_of(run):
    return {name: t.clone() for name, t in load_model(run.model_file)[0].state_dict().items()}


def contents(run):
    return {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("model", ["cnn", "logistic-regression"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_run_equals_an_uninterrupted_one(config, tmp_path, model, precision):
    config = dataclasses.replace(config, model=model, precision=precision, augment=True)
    whole = train(config, tmp_path / "whole")

    class StopError(Exception):
        pass

    def stop(epoch):
        if epoch["epoch"] == 2:
            raise StopError

    with pytest.raises(StopError):  # after the metrics of epoch 2, before its checkpoint
        train(config, tmp_path / "halves", on_epoch=stop)
    halves = train(config, tmp_path / "halves", resume=True)
    assert_equal(weights_of(whole), weights_of(halves))
    assert [e["epoch"] for e in halves.read_metrics(3)] == [1, 2, 3]
    for one, other in zip(whole.read_metrics(3), halves.read_metrics(3), strict=True):
        assert one["test_loss"] == other["test_loss"]


def test_resnet50_trains_and_resumes(config, tmp_path):
    config = dataclasses.replace(config, model="resnet50", epochs=1)
    whole = train(dataclasses.replace(config, epochs=2), tmp_path / "whole")
    train(config, tmp_path / "run")
    run = train(dataclasses.replace(config, epochs=2), tmp_path / "run", resume=True)
    assert_equal(weights_of(whole), weights_of(run))


def test_a_last_batch_of_one_image_is_left_out(config, tmp_path):
    config = dataclasses.replace(config, model="resnet50", batch_size=17, epochs=1)
    problem = prepare(config)
    assert len(problem.train_indices) % 17 == 1
    assert [len(labels) for _, labels in problem.train_batches()] == [17] * 5
    train(config, tmp_path / "run", problem=problem)


@pytest.mark.parametrize(
    ("model", "backend", "in_memory"),
    [
        ("cnn", "skinfast", (0, 1, 2, 3)),
        ("cnn", "torch", (0, 1, 2, 3)),
        ("logistic-regression", "skinfast", (0, 1, 2, 3)),
        ("resnet50", "skinfast", (0, 2, 3, 1)),
        ("resnet50", "torch", (0, 2, 3, 1)),
    ],
)
def test_batches_are_stored_as_the_model_takes_them(config, model, backend, in_memory):
    problem = prepare(dataclasses.replace(config, model=model, backend=backend))
    for batches in (problem.train_batches(), problem.test_batches()):
        images, _ = next(iter(batches))
        assert images.permute(in_memory).is_contiguous()


@pytest.mark.parametrize("model", ["cnn", "logistic-regression", "resnet50"])
def test_images_that_come_in_bfloat16_change_nothing(config, tmp_path, monkeypatch, model):
    config = dataclasses.replace(config, model=model, precision="bfloat16", epochs=1)
    problem = prepare(config)
    problem = dataclasses.replace(problem, train_indices=problem.train_indices[:32])
    (images, _), _ = problem.train_batches()
    assert (images.dtype == torch.bfloat16) == (model != "logistic-regression")
    lowered = train(config, tmp_path / "lowered", problem=problem)
    monkeypatch.setattr(type(problem), "_train_dtype", lambda self: torch.float32)
    plain = train(config, tmp_path / "plain", problem=problem)
    assert_equal(weights_of(lowered), weights_of(plain))


def test_two_runs_are_equal_and_another_seed_is_not(config, tmp_path):
    config = dataclasses.replace(config, epochs=1)
    first, second = (weights_of(train(config, tmp_path / name)) for name in "ab")
    assert_equal(first, second)
    other = weights_of(train(dataclasses.replace(config, seed=1), tmp_path / "c"))
    assert any(not torch.equal(t, other[n]) for n, t in first.items())


def test_cudnn_is_deterministic_while_training(config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    during = []
    train(config, tmp_path / "run", on_epoch=lambda _: during.append(cudnn_is_deterministic()))
    assert during == [True] * config.epochs and not cudnn_is_deterministic()


def cudnn_is_deterministic():
    return torch.backends.cudnn.deterministic


def test_backends_follow_the_same_curve(config, tmp_path):
    losses = [
        train(dataclasses.replace(config, backend=backend), tmp_path / backend).read_metrics(3)
        for backend in ("skinfast", "torch")
    ]
    for ours, theirs in zip(*losses, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


@pytest.mark.parametrize("sampling", ["none", "under", "over", "both"])
@pytest.mark.parametrize("split", ["image", "lesion"])
def test_every_sampling_and_split_trains(config, tmp_path, sampling, split):
    config = dataclasses.replace(
        config, epochs=1, sampling=sampling, split=split, class_weights=True, label_smoothing=0.1
    )
    problem = prepare(config)
    assert not set(problem.train_indices) & set(problem.split.test)
    train(config, tmp_path / "run", problem=problem)


def test_metrics_lines_are_json_with_all_keys(config, tmp_path):
    run = train(config, tmp_path / "run")
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[0].keys() == {
        "epoch",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "learning_rate",
        "seconds",
        "images_per_second",
        "processes",
    }


def _poisoned(iterate):
    def iterate_with_infinity(self):
        for images, labels in iterate(self):
            yield images * float("inf"), labels

    return iterate_with_infinity


def test_diverging_run_says_so_and_keeps_the_checkpoint_before(config, tmp_path, monkeypatch):
    run = train(dataclasses.replace(config, epochs=1), tmp_path / "run")
    before = run.checkpoint_file.read_bytes()
    monkeypatch.setattr(DeviceBatches, "__iter__", _poisoned(DeviceBatches.__iter__))
    with pytest.raises(SkinfastError, match="the loss is not finite after epoch 2; lower --lr"):
        train(config, tmp_path / "run", resume=True)
    assert run.checkpoint_file.read_bytes() == before
    assert json.loads(run.metrics_file.read_text().splitlines()[-1])["train_loss"] is None


def test_the_commit_is_that_of_the_code_that_began_to_train(config, tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    package = checkout / "skinfast" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("as it began")
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init"], ["add", "."], ["commit", "-m", "As it began"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    monkeypatch.setattr("skinfast.__file__", str(package))
    config = dataclasses.replace(config, model="logistic-regression", epochs=1)
    train(config, tmp_path / "run", on_epoch=lambda epoch: package.write_text("edited since"))
    commit = write_result(tmp_path / "run")["environment"]["commit"]
    assert commit == head.stdout.strip()


def test_existing_folder_is_refused_and_left_alone(config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SkinfastError, match="exists; choose another --output, or continue it"):
        train(config, folder)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_folder_of_a_run_that_was_killed_as_it_began_is_new(config, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:  # which leaves no time to tidy up
        killed.setattr("pathlib.Path.replace", die)
        killed.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            run.create(config)
    (leftover,) = run.directory.iterdir()
    assert leftover.name.startswith(".config.json.")
    run.create(config)
    assert TrainConfig.load(run.config_file) == config
    with pytest.raises(SkinfastError, match="exists; choose another --output"):
        run.create(config)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.tmp").write_text("mine")
    with pytest.raises(SkinfastError, match="exists; choose another --output"):
        RunFolder(tmp_path / "own").create(config)


def test_full_disk_while_saving_keeps_the_checkpoint_before(config, tmp_path, monkeypatch):
    run = train(dataclasses.replace(config, epochs=1), tmp_path / "run")
    before = run.checkpoint_file.read_bytes()

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(config, tmp_path / "run", resume=True)
    assert run.checkpoint_file.read_bytes() == before
    assert [p.name for p in run.checkpoint_file.parent.iterdir()] == ["state.pt"]


def test_torch_reports_a_full_disk_as_runtime_error_and_we_as_oserror(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.checkpoint_file.parent.mkdir()

    def full(state, path):
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="could not be written"):
        run.save_checkpoint({})


def test_resume_with_fewer_epochs_than_done_is_refused(config, tmp_path):
    run = train(config, tmp_path / "run")
    before = run.config_file.read_text()
    with pytest.raises(SkinfastError, match="has finished 3 epochs already; give --epochs 3"):
        train(dataclasses.replace(config, epochs=1), tmp_path / "run", resume=True)
    assert run.config_file.read_text() == before


def test_results_of_a_finished_run_do_not_outlive_its_extension(config, tmp_path):
    config = dataclasses.replace(config, model="logistic-regression", epochs=1)
    run = train(config, tmp_path / "run")
    for file in run.result_files:
        file.write_text("of one epoch")
    before = contents(run)
    longer = dataclasses.replace(config, epochs=3)
    with pytest.raises(SkinfastError, match="was started with --lr"):
        train(dataclasses.replace(longer, lr=0.5), run.directory, resume=True)
    metrics = run.metrics_file.read_bytes()
    run.metrics_file.write_text("{")
    with pytest.raises(SkinfastError, match=r"metrics\.jsonl cannot be read"):
        train(longer, run.directory, resume=True)
    run.metrics_file.write_bytes(metrics)
    train(config, run.directory, resume=True)  # which has nothing to do
    assert contents(run) == before

    class StopError(Exception):
        pass

    def stop(epoch):
        raise StopError

    with pytest.raises(StopError):
        train(longer, run.directory, resume=True, on_epoch=stop)
    assert not any(file.exists() for file in run.result_files)
    assert before.keys() - contents(run).keys() == set(run.result_files)


def test_resume_of_a_finished_run_without_checkpoint_is_refused(config, tmp_path):
    config = dataclasses.replace(config, model="logistic-regression", epochs=1)
    run = train(config, tmp_path / "run")
    shutil.rmtree(run.checkpoint_file.parent)  # as skinfast.experiments does
    before = contents(run)
    for epochs in (1, 2):
        with pytest.raises(SkinfastError, match="run holds a finished run without its checkpoint"):
            train(dataclasses.replace(config, epochs=epochs), tmp_path / "run", resume=True)
    assert contents(run) == before


def test_resume_as_another_run_is_refused(config, tmp_path):
    train(dataclasses.replace(config, epochs=1), tmp_path / "run")
    with pytest.raises(SkinfastError, match=r"was started with --lr 0\.001, not 0\.5"):
        train(dataclasses.replace(config, lr=0.5), tmp_path / "run", resume=True)


@pytest.mark.parametrize("kept", [0, 10, 1000, -100])
def test_cut_off_checkpoint_is_refused(config, tmp_path, kept):
    run = train(dataclasses.replace(config, epochs=1), tmp_path / "run")
    content = run.checkpoint_file.read_bytes()
    run.checkpoint_file.write_bytes(content[:kept])
    with pytest.raises(SkinfastError, match=r"state.pt is cut off or broken; start again"):
        train(config, tmp_path / "run", resume=True)


def test_checkpoint_of_another_model_is_refused(config, tmp_path):
    run = train(dataclasses.replace(config, epochs=1), tmp_path / "run")
    other = dataclasses.replace(config, model="logistic-regression")
    foreign = train(dataclasses.replace(other, epochs=1), tmp_path / "other")
    shutil.copy(foreign.checkpoint_file, run.checkpoint_file)
    with pytest.raises(SkinfastError, match="holds a logistic-regression, not a cnn"):
        train(config, tmp_path / "run", resume=True)


def test_foreign_checkpoint_is_refused(config, tmp_path):
    run = train(dataclasses.replace(config, epochs=1), tmp_path / "run")
    torch.save({"weights": torch.ones(3)}, run.checkpoint_file)
    with pytest.raises(SkinfastError, match="is no checkpoint of skinfast"):
        train(config, tmp_path / "run", resume=True)


def test_changed_data_is_refused_on_resume(config, tmp_path, small_data):
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    config = dataclasses.replace(config, data=str(data))
    train(dataclasses.replace(config, epochs=1), tmp_path / "run")
    metadata = data / "HAM10000_metadata.csv"
    metadata.write_text(metadata.read_text().replace("ISIC_nv059,nv", "ISIC_nv059,mel"))
    with pytest.raises(SkinfastError, match="have changed since the run began"):
        train(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize("kept", [0, 4, 100, -50])
def test_cut_off_model_is_refused(config, tmp_path, kept):
    run = train(dataclasses.replace(config, epochs=1), tmp_path / "run")
    run.model_file.write_bytes(run.model_file.read_bytes()[:kept])
    with pytest.raises(SkinfastError, match=r"model.safetensors is cut off or broken"):
        load_model(run.model_file)


def test_model_without_description_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(SkinfastError, match="was not written by skinfast"):
        load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "--epochs is 0; it needs to be at least 1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"batch_size": 1, "model": "resnet50"}, "--batch-size is 1, but resnet50 normalises"),
        ({"image_size": 7}, "--image-size is 7; it needs to be from 8 to 1024"),
        ({"image_size": 23}, "--image-size is 23, but the CNN's three pools need at least 24; ch"),
        ({"lr": float("inf")}, "--lr is inf; it needs to be a finite float"),
        ({"data": 5}, "--data is 5; it needs to be str"),
        ({"epochs": 4.5}, "--epochs is 4.5; it needs to be int"),
        ({"class_weights": "no"}, "--class-weights is 'no'; it needs to be bool"),
        ({"lr": -1.0}, "--lr is -1.0; it needs to be above 0"),
        ({"beta2": 1.0}, "--beta2 is 1.0"),
        ({"label_smoothing": 1.0}, "--label-smoothing is 1.0"),
        ({"seed": -1}, "--seed is -1"),
        ({"model": "vgg"}, "--model is 'vgg'; choose one of resnet50, cnn"),
        ({"split": "patient"}, "--split is 'patient'"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(SkinfastError, match=message):
        TrainConfig(**setting)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"models": "cnn"}', '{"epochs": "three"}'])
def test_broken_config_file_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SkinfastError, match=r"config\.json"):
        TrainConfig.load(tmp_path / "config.json")


def test_continued_by_allows_more_epochs_and_nothing_that_makes_another_run():
    config = TrainConfig()
    assert config.continued_by({"epochs": 50, "model": "cnn"}).epochs == 50
    with pytest.raises(SkinfastError, match=r"was started with --lr 0\.001, not 0\.1"):
        config.continued_by({"lr": 0.1})
