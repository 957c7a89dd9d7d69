"""Where each file of a pair lies. Paths are inside the pair, POSIX and relative."""

from __future__ import annotations

MANIFEST_NAME = "dovetail.json"
TARGET, DRAFTER = PARTS = ("target", "drafter")  # the folders

IR_GRAPH, IR_WEIGHTS, TOKENIZER = "openvino_model.xml", "openvino_model.bin", "tokenizer.json"  # names in a folder
TARGET_GRAPH, TARGET_WEIGHTS, TARGET_TOKENIZER = TARGET_FILES = tuple(
    f"{TARGET}/{name}" for name in (IR_GRAPH, IR_WEIGHTS, TOKENIZER)
)  # a pair without one of these has no target

CALIBRATION_NAME = "calibration.json"
DRAFTER_CALIBRATION = f"{DRAFTER}/{CALIBRATION_NAME}"
DEVICES = ("cuda", "cpu")  # a drafter has a graph for each
DATA_SUFFIX = ".data"  # of the file beside a graph that holds its weights
