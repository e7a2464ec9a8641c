"""A small real model and text, so that everything runs offline; the README.md beside each tells its origin."""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
CALIBRATION = FOLDER / "text" / "calibration.txt"
HELDOUT = FOLDER / "text" / "heldout.txt"
CHATS = FOLDER / "text" / "chats.jsonl"
