"""Runs the notebooks and writes their main figures, the pictures of the cells tagged `figure`, to `notebooks/figures/`.

    python notebooks/figures.py                 # all, some minutes
    python notebooks/figures.py 01_quickstart   # or some; needs `pip install -e ".[notebooks]"`

The notebooks themselves are not written to.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent


def executed(path: Path) -> nbformat.NotebookNode:
    nb = nbformat.read(path, as_version=4)
    return NotebookClient(nb, timeout=600, resources={"metadata": {"path": str(HERE)}}).execute()


def write(nb: nbformat.NotebookNode, name: str, folder: Path) -> None:
    """The pictures of the tagged cells in order, in 128 colours: name.png, name_2.png, …"""
    tagged = [cell for cell in nb.cells if "figure" in cell.metadata.get("tags", [])]
    data = [output.get("data", {}) for cell in tagged for output in cell.outputs]
    pngs = [base64.b64decode(x["image/png"]) for x in data if "image/png" in x]
    for i, png in enumerate(pngs, 1):
        path = folder / f"{name}{f'_{i}' if i > 1 else ''}.png"
        Image.open(io.BytesIO(png)).convert("RGB").quantize(128).save(path, optimize=True)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


def main(names: list[str]) -> None:
    folder = HERE / "figures"
    folder.mkdir(exist_ok=True)
    for path in sorted(HERE.glob("*.ipynb")):
        if not names or path.stem in names:
            write(executed(path), path.stem, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
