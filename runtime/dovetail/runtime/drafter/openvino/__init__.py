"""The drafter on Intel GPUs, by OpenVINO."""
