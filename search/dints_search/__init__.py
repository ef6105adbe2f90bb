"""The workshop: search, retrain, evaluate, export and publish DiNTS networks. Needs torch and MONAI."""
