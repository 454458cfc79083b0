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


def pictures(notebook: Path) -> list[bytes]:
    """PNGs of the tagged cells, in order."""
    nb = nbformat.read(notebook, as_version=4)
    NotebookClient(nb, timeout=600, resources={"metadata": {"path": str(HERE)}}).execute()
    tagged = [cell for cell in nb.cells if "figure" in cell.metadata.get("tags", [])]
    data = [output.get("data", {}) for cell in tagged for output in cell.outputs]
    return [base64.b64decode(x["image/png"]) for x in data if "image/png" in x]


def main(names: list[str]) -> None:
    folder = HERE / "figures"
    folder.mkdir(exist_ok=True)
    for notebook in sorted(HERE.glob("*.ipynb")):
        if names and notebook.stem not in names:
            continue
        for i, png in enumerate(pictures(notebook)):
            path = folder / f"{notebook.stem}{f'_{i + 1}' if i else ''}.png"
            colors = Image.open(io.BytesIO(png)).convert("RGB").quantize(128)
            colors.save(path, optimize=True)
            print(f"{path.relative_to(HERE)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
