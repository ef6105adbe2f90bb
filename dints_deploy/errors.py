"""The one tree of errors, each with a stable reason code that scripts and the operator's runbook can rely on.

DintsError            something failed                         exit code 1
├── UsageError        the command was called wrongly           exit code 2
├── ScanRefused       the scan is not what the entry accepts   exit code 3
├── EntryError        a zoo entry is damaged or not allowed    exit code 1
├── EngineError       an inference engine failed               exit code 1
├── OutputError       a result could not be written            exit code 1
├── ServiceError      the daemon cannot start, or go on        exit code 1
├── WorkerError       a worker process ended, hung or grew     exit code 1
├── IntakeRefused     the daemon did not take an object        exit code 1
├── DeliveryError     a destination did not take a result      exit code 1
└── DatasetError      a training or evaluation dataset is bad  exit code 1

A message is one sentence: what was expected, what was found, what to do.
"""

from __future__ import annotations

from typing import ClassVar, Final

REASONS: Final[dict[str, str]] = {
    # usage
    "usage": "the command line does not make sense as given",
    "extra-missing": "an optional part of the software is not installed",
    "entry-unknown": "no zoo entry has this name",
    "entry-ambiguous": "several entries accept this scan, or the zoo has none with weights: name one with --model",
    "entry-exists": "an entry of this name is already there",
    "entry-has-no-weights": "the entry is a recipe: it has a genotype but no trained network",
    # the daemon: configuration
    "config-invalid": "the configuration does not follow its schema, or names a file that is not there",
    "config-exists": "there is a configuration already where one was to be written",
    "config-rights": "others could change the configuration, or read a key or token",
    # the daemon: intake
    "intake-disk": "the data folder has less room than the configuration keeps free, or holds more than its quota",
    "intake-too-large": "an object is larger than the listener accepts",
    "intake-unreadable": "an object's header is damaged, or lacks what identifies it",
    "intake-mismatch": "an object is of another class or instance than the request said",
    "intake-unsettled": "a file of a watched folder is still being written, or was changed while it was read",
    "intake-conflict": "another object of the same SOPInstanceUID came first; both are kept, the first one counts",
    # the daemon: its store and audit trail
    "daemon-running": "another daemon works on this data folder",
    "daemon-thread": "a part of the daemon ended that must not end",
    "store-corrupt": "the database is damaged",
    "store-newer": "the database was written by a newer version of the software",
    "store-failed": "the database cannot be opened or written",
    "audit-broken": "the audit trail is cut, changed, or does not continue what the database and the anchor know",
    # the daemon: jobs and workers
    "job-unknown": "no job has this identifier, or several begin like it",
    "job-state": "the job is not in a state in which this can be done",
    "operator": "an operator did it by hand",
    "object-damaged": "a stored object is missing, or is not the bytes that were received",
    "objects-expired": "objects of the study were removed by the retention policy",
    "destination-unknown": "the configuration no longer names the destination",
    "worker-start": "no worker process could be started",
    "worker-crashed": "the worker process ended before it answered",
    "worker-hung": "the worker process gave no sign of life, or the job took longer than allowed",
    "worker-memory": "the worker process needed more memory than allowed",
    "worker-failed": "the worker met a fault of the software",
    # the daemon: delivery
    "delivery-unreachable": "no connection to the destination",
    "delivery-tls": "the destination's certificate, or ours, was not accepted",
    "delivery-rejected": "the destination does not accept associations or requests from us",
    "delivery-unsupported": "the destination takes no objects of this class",
    "delivery-refused": "the destination answered that it did not store the object",
    "delivery-aborted": "the destination broke off the transfer",
    "delivery-timeout": "the destination did not answer in time",
    "delivery-uncommitted": "the destination did not commit to keep the object",
    "delivery-unready": "a stored result, a certificate or a token cannot be read any more",
    "delivery-folder": "the folder of the destination cannot be written",
    "delivery-conflict": "another file of the same name lies at the destination",
    # the file of a scan
    "scan-missing": "the file does not exist or cannot be read",
    "scan-empty": "the file has no bytes",
    "scan-format": "the file is not a NIfTI image",
    "scan-truncated": "the file ends before its voxels do",
    "scan-gzip": "the compressed stream is damaged",
    "scan-too-large": "the header claims, or the stream unpacks to, more than the limit",
    "scan-dimensions": "the image is not a 3-D volume (or 4-D with channels)",
    "scan-datatype": "the voxel type is not a real number",
    "scan-affine": "the header's geometry is missing, singular or contradictory",
    # the content of a scan
    "scan-nonfinite": "the voxels hold NaN or infinity",
    "scan-constant": "all voxels have the same value",
    "scan-looks-like-labels": "the voxels look like a label image, not like a scan",
    "scan-channels": "the number or the names of the channels are not the entry's",
    "frame-mismatch": "the channels of one case lie on different grids",
    "series-none": "no series of the study is one that the entry takes",
    "series-ambiguous": "several series of the study are ones that the entry takes",
    "series-rule": "the series is not one that the entry's rules allow",
    "scan-no-entry": "no entry of the zoo accepts this scan",
    "scan-modality": "the scan's modality is not one that the entry accepts",
    "scan-extent": "the scan's physical size is outside what the entry accepts",
    "scan-spacing": "the scan's voxel spacing is outside what the entry accepts",
    "scan-shape": "an axis of the scan has fewer voxels than the entry accepts",
    # DICOM: files
    "dicom-no-images": "no file there holds an image plane",
    "dicom-not-a-file": "a link, device or pipe stands where a regular file was expected",
    "dicom-not-dicom": "the file is not a DICOM file (PS3.10)",
    "dicom-corrupt": "the header of the DICOM file is damaged",
    "dicom-archive": "the zip is damaged, nested, encrypted, holds links, or names a path outside itself",
    "dicom-too-large": "a file, an archive or a header claims more than the limit",
    "dicom-copied-file": "the same instance lies there twice; the second copy is left out",
    "dicom-no-uid": "the files carry no SeriesInstanceUID",
    "dicom-duplicate-uid": "two different instances carry the same SOPInstanceUID",
    # DICOM: the series
    "dicom-sop-class": "the objects are not images of slices",
    "dicom-localizer": "the series is, or holds, a localizer",
    "dicom-mosaic": "each image is a mosaic of many slices",
    "dicom-several-volumes": "the series holds several volumes (time points, echoes, b-values, stacks)",
    "dicom-lossy": "the pixels went through lossy compression",
    # DICOM: geometry
    "dicom-attribute": "an attribute that must be there is missing or has an impossible value",
    "dicom-orientation": "the orientation is missing, or its cosines are not two orthogonal unit vectors",
    "dicom-spacing": "the pixel spacing is missing or not positive",
    "dicom-position": "a slice has no position in the patient",
    "dicom-non-square": "the pixels are not square",
    "dicom-mixed-frame": "the slices do not share one frame of reference",
    "dicom-mixed-matrix": "the slices differ in rows or columns",
    "dicom-mixed-orientation": "the slices differ in orientation",
    "dicom-mixed-spacing": "the slices differ in pixel spacing",
    "dicom-mixed-pixels": "the slices differ in photometric interpretation or samples",
    "dicom-mixed-bits": "the slices differ in bits or sign of their pixels",
    "dicom-too-few-slices": "the series has fewer slices than a volume needs",
    "dicom-duplicate-position": "several slices lie at the same position",
    "dicom-missing-slice": "slices are missing: a step is a multiple of the others",
    "dicom-uneven-steps": "the steps between slices are uneven",
    "dicom-tilt": "the stack is sheared: the line through the slices is not the slices' normal",
    "dicom-skew": "the slices are shifted against each other without a common direction",
    "dicom-tilt-tag": "the gantry tilt that the header claims is not that of the positions",
    "dicom-slice-gap": "the slices are thinner or thicker than the step between them",
    "dicom-instance-gap": "the instance numbers have gaps where the positions have none",
    # DICOM: pixels
    "dicom-syntax": "the transfer syntax is unknown, or no decoder for it is installed",
    "dicom-decoder": "no process to decode compressed pixels could be started",
    "dicom-truncated": "the file ends before its pixels do",
    "dicom-pixels": "the pixel data cannot be decoded, or is not what the header says",
    "dicom-excess-pixels": "the pixel data is longer than rows, columns and frames say",
    "dicom-photometric": "the pixels are not grey values",
    "dicom-monochrome1": "the grey values are stored inverted (MONOCHROME1)",
    "dicom-rescale": "the rescale slope or intercept is missing, zero or not a number",
    "dicom-rescale-type": "the values of a CT are no Hounsfield units but a map of another quantity",
    "dicom-rescale-varies": "each slice has its own rescale slope or intercept",
    "dicom-modality-lut": "the values go through a modality look-up table",
    "dicom-padding": "padded pixels are part of the image",
    # zoo entries
    "entry-missing-file": "a file that the entry names, or must have, is missing",
    "entry-invalid": "a file of the entry does not follow its schema",
    "entry-path": "the entry names a path outside its own folder, or a link",
    "entry-checksum": "a file differs from its checksum",
    "entry-onnx": "the ONNX file is damaged, uses external data or a custom domain, or is not the entry's network",
    "no-certificate": "this precision, engine or plan has no parity certificate for these weights",
    "certificate-invalid": "the certificate was changed by hand, is damaged, or was sealed with another key",
    "certificate-stale": "the certificate or plan is of another machine, GPU or engine version",
    "artefact-damaged": "the network or plan made at export is missing, cut or not the one its certificate names",
    "state-permissions": "others than the owner could change or read what lies in the state folder",
    # engines
    "engine-missing": "the engine's package is not installed",
    "engine-failed": "the engine could not load or run the network",
    "engine-output": "the engine returned values that are not finite or of the wrong shape",
    "engine-memory": "the engine ran out of memory",
    "memory-limit": "the run cannot fit the memory limit",
    # outputs
    "output-unwritable": "the output folder or file cannot be written",
    "output-object": "a DICOM object cannot be made of this source",
    "disk-full": "no space is left where the output goes",
    "output-selfcheck": "a written result did not read back as the mask that was computed",
    # workshop
    "dataset-invalid": "the dataset does not follow the Medical Segmentation Decathlon layout",
    "case-invalid": "a training or evaluation case is not usable",
    "fold-unknown": "the fold does not exist",
    "cases-seen": "the entry was trained on these cases: its score on them would be no measurement",
    "fetch-failed": "a dataset could not be downloaded, or is not what was published",
    "genotype-invalid": "the genotype is not a feasible network of its search space",
    "recipe-invalid": "the recipe or run configuration does not follow its schema",
    "run-mismatch": "the run folder belongs to another configuration",
    "checkpoint-invalid": "the checkpoint is damaged",
    "training-diverged": "the loss or a gradient of a training or search is not a finite number",
    "parity-failed": "the exported network differs from the trained one by more than the threshold",
}
"""Every reason code, and what it means. Codes are stable: scripts and the runbook depend on them."""


class DintsError(Exception):
    """Say what failed in one sentence, with a stable reason code from `REASONS`."""

    exit_code: ClassVar[int] = 1

    def __init__(self, code: str, message: str) -> None:
        if code not in REASONS:
            raise KeyError(f"reason code {code!r} is not in dints_deploy.errors.REASONS: add it there")
        super().__init__(message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class UsageError(DintsError):
    """The command was called wrongly; the same call never works."""

    exit_code = 2


class ScanRefused(DintsError):  # noqa: N818  the word the operator reads: a refusal is an answer, not a fault
    """The scan is not what the entry accepts; the reason code says why."""

    exit_code = 3


class EntryError(DintsError):
    """A zoo entry is damaged, incomplete or not allowed."""


class EngineError(DintsError):
    """An inference engine is missing or failed."""


class OutputError(DintsError):
    """A result could not be written; no partial file is left."""


class ServiceError(DintsError):
    """The daemon cannot start or go on; somebody must look at it."""


class WorkerError(DintsError):
    """A worker process ended, hung or grew beyond its limit while it had a job."""


class IntakeRefused(DintsError):  # noqa: N818  an answer to the sender, not a fault
    """An object was not taken; nothing of it is kept, and the sender is told."""


class DeliveryError(DintsError):
    """A destination did not take a result; `retryable` says whether a later attempt can help."""

    def __init__(self, code: str, message: str, *, retryable: bool) -> None:
        super().__init__(code, message)
        self.retryable = retryable


class DatasetError(DintsError):
    """A dataset, recipe, genotype or run folder of the workshop is not usable."""
