"""A small real model and text, so that everything runs offline; the README.md beside each tells its origin."""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
CALIBRATION = FOLDER / "text" / "calibration.txt"
HELDOUT = FOLDER / "text" / "heldout.txt"
CHATS = FOLDER / "text" / "chats.jsonl"
LANGUAGES = ("en", "ar", "el", "es", "fi", "fr", "he", "hi", "ja", "ko", "pl", "ru", "sw", "th", "tr", "vi", "zh")
"""Codes of ISO 639, of the texts that are called multilingual-en and so on; `multilingual` is all of them."""
TEXTS = {
    "heldout": HELDOUT,
    **{f"multilingual-{code}": FOLDER / "text" / "multilingual" / f"{code}.txt" for code in LANGUAGES},
}
"""Texts to measure on, by name."""
