"""The workshop: search, retrain, evaluate, export and publish DiNTS networks. Needs torch and MONAI."""

# First of all, before torch and MONAI: MONAI loads ONNX Runtime, and the appliance forbids that to report its use.
import dints_deploy  # noqa: F401
