"""Where things are, whatever the working directory: papermill, nbmake and Jupyter each start elsewhere."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"            # chapters and pages, as written
DATA = ROOT / "data"            # corpora and recorded evidence, committed
EVIDENCE = DATA / "evidence"    # rows of the `standard`, `gpu` and `cluster` profiles
BUILD = ROOT / "build"          # everything generated, never committed
