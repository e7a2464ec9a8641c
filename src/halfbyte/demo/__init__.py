"""A small real model and text, so that everything runs offline. demo/model/README.md and demo/text/README.md tell their origin."""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
CALIBRATION = FOLDER / "text" / "calibration.txt"
HELDOUT = FOLDER / "text" / "heldout.txt"
CHATS = FOLDER / "text" / "chats.jsonl"
