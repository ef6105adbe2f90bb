"""What needs a GPU: plans, their certificates, and that every engine gives the CPU's logits.

Run by `make test-gpu` in an environment with the [gpu] extra; elsewhere each test is skipped and says why.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dints_deploy.catalog.catalog import LoadedEntry, load_entry
from dints_deploy.errors import DintsError, EngineError
from dints_deploy.runtime.certificate import Target, install, read_artefact, read_certificate
from dints_deploy.runtime.certified import choose_networks, find_certificate
from dints_deploy.runtime.engine import installed
from dints_deploy.runtime.export import Made, export, proofs_of
from tests.tiny_entry import run_cli

pytestmark = pytest.mark.gpu
DEVICE = "cuda:0"
TRT = "tensorrt"


def missing(engine: str) -> str:
    """Return why an engine cannot run on this machine; empty where it can."""
    if not installed(engine):
        return f"the package of {engine} is not installed"
    from dints_deploy.runtime.cuda import describe_gpu

    try:
        describe_gpu(DEVICE)
    except DintsError as error:
        return str(error)
    if engine != TRT:
        import onnxruntime

        provider = "TensorrtExecutionProvider" if engine == "onnx-trt" else "CUDAExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            return f"this ONNX Runtime has no {provider}"
    return ""


def needs(engine: str) -> None:
    if reason := missing(engine):
        pytest.skip(reason)


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedEntry:
    monkeypatch.setenv("DINTS_STATE", str(tmp_path / "state"))
    return load_entry("hippocampus")


def exported(entry: LoadedEntry, engine: str, precision: str) -> Made:
    """Return a form of the entry's network; its limits were kept, or export would have raised."""
    target = Target(engine=engine, precision=precision, device=DEVICE)
    [made] = export(entry.spec, proofs_of(entry), target)
    return made


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("engine", [TRT, "onnx", "onnx-trt"])
def test_each_precision_keeps_the_entrys_limits_on_the_gpu(entry: LoadedEntry, engine: str, precision: str) -> None:
    needs(engine)
    made = exported(entry, engine, precision)
    assert (made.certificate.comparison.engine, made.certificate.comparison.device) == (engine, DEVICE)
    install(made.certificate, made.artefact)
    chosen, networks, _ = choose_networks(entry, windows=9, engine=engine, precision=precision, device=DEVICE)
    session = chosen.open(networks[0], window=entry.spec.window, batch=1, precision=precision, why="a test")
    assert session.info.device == DEVICE


def test_with_two_batches_under_way_each_handle_gives_its_own_result(entry: LoadedEntry) -> None:
    needs(TRT)
    [proof] = proofs_of(entry)
    made = exported(entry, TRT, "fp32")
    install(made.certificate, made.artefact)
    chosen, networks, _ = choose_networks(entry, windows=9, engine=TRT, device=DEVICE)
    for batch in (1, 2, 4):
        session = chosen.open(networks[0], window=entry.spec.window, batch=batch, precision="fp32", why="a test")
        several = [np.roll(proof.windows[:1], n, axis=2).repeat(batch, axis=0) for n in range(5)]
        alone = [session.result(session.submit(one)) for one in several]
        waiting: list[Any] = [session.submit(several[0])]
        found = []
        for one in several[1:]:
            waiting.append(session.submit(one))
            found.append(session.result(waiting.pop(0)))
        found.append(session.result(waiting.pop()))
        for logits, reference in zip(found, alone, strict=True):
            np.testing.assert_array_equal(logits, reference)
        assert session.memory_bytes() > 0


def test_a_batch_of_another_size_is_refused(entry: LoadedEntry) -> None:
    needs(TRT)
    made = exported(entry, TRT, "fp32")
    install(made.certificate, made.artefact)
    chosen, networks, _ = choose_networks(entry, windows=9, engine=TRT, device=DEVICE)
    session = chosen.open(networks[0], window=entry.spec.window, batch=1, precision="fp32", why="a test")
    with pytest.raises(EngineError) as caught:
        session.submit(np.zeros((3, 1, *entry.spec.window), np.float32))
    assert caught.value.code == "engine-failed"
    with pytest.raises(EngineError):
        chosen.open(networks[0], window=entry.spec.window, batch=64, precision="fp32", why="beyond the profile")


@pytest.mark.parametrize("other", ["gpu", "version"])
def test_a_plan_of_another_gpu_or_version_is_refused(entry: LoadedEntry, other: str) -> None:
    needs(TRT)
    made = exported(entry, TRT, "fp16")
    certificate = made.certificate
    if other == "gpu":
        certificate = certificate.model_copy(update={"machine": "NVIDIA Other; compute capability 7.0"})
    else:
        comparison = certificate.comparison.model_copy(update={"version": "10.0.0"})
        certificate = certificate.model_copy(update={"comparison": comparison})
    install(certificate, made.artefact)
    with pytest.raises(EngineError) as caught:
        choose_networks(entry, windows=9, engine=TRT, precision="fp16", device=DEVICE)
    assert caught.value.code == "certificate-stale"


def test_a_damaged_plan_never_reaches_tensorrt(entry: LoadedEntry) -> None:
    needs(TRT)
    made = exported(entry, TRT, "fp16")
    path = install(made.certificate, made.artefact)
    [plan] = path.parent.glob("*.plan")
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(EngineError) as caught:
        read_artefact(read_certificate(path))
    assert caught.value.code == "artefact-damaged"


def test_the_timings_of_kernels_are_kept_for_the_next_build(entry: LoadedEntry, tmp_path: Path) -> None:
    needs(TRT)
    exported(entry, TRT, "fp16")
    [cache] = (tmp_path / "state" / "engines").glob("timing-*.cache")
    assert cache.stat().st_size > 0
    shutil.copyfile(cache, tmp_path / "kept")
    exported(entry, TRT, "fp16")
    assert cache.exists()


def test_auto_takes_the_plan_where_there_is_one(entry: LoadedEntry) -> None:
    needs(TRT)
    without, _, _ = choose_networks(entry, windows=9, device=DEVICE)
    assert without.name == "onnx"
    made = exported(entry, TRT, "fp32")
    install(made.certificate, made.artefact)
    chosen, _, why = choose_networks(entry, windows=9, device=DEVICE)
    assert chosen.name == TRT
    assert "certified on this machine" in why
    [member] = entry.spec.members
    assert find_certificate(entry, member, Target(engine=TRT, precision="fp32", device=DEVICE)).artefact_sha256


def test_a_scan_gets_the_labels_of_the_cpu(entry: LoadedEntry, tmp_path: Path, data: Path) -> None:
    needs(TRT)
    from dints_deploy.imaging.nifti import read_nifti

    made = exported(entry, TRT, "fp32")
    install(made.certificate, made.artefact)
    scan = data / "Task04_Hippocampus" / "imagesTr" / "hippocampus_038.nii.gz"
    for name, words in (("cpu", ["--engine", "openvino"]), ("gpu", ["--engine", TRT, "--device", DEVICE])):
        assert run_cli("segment", scan, "--model", "hippocampus", *words, "-o", tmp_path / f"{name}.nii.gz").code == 0
    cpu, gpu = (read_nifti(tmp_path / f"{name}.nii.gz").data for name in ("cpu", "gpu"))
    assert (cpu == gpu).mean() >= 0.9999
