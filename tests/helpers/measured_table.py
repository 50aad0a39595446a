"""docs/measurements.md's tables of the real model, and the picture beside them, from measured.json.

Rows of llama.cpp are what its own program printed, and compare with its own dense row alone.
`python tests/helpers/measured_table.py` writes both anew; the picture needs matplotlib.
"""

import re
from pathlib import Path
from statistics import fmean

from hf_sparse.pruning.advice import Measured, measurements

DOCS = Path(__file__).parents[2] / "docs"
HEAD = "| | bytes | perplexity | loss | CPU s | peak, MB |\n|---|---|---|---|---|---|\n"
REFERENCE = "sparsegpt-50"
OTHER_HEAD = "| llama.cpp | bytes | perplexity |\n|---|---|---|\n"


def measured_table() -> str:
    """A row for each setting, fewest bytes last; loss and time are also over the reference's."""
    found = measurements()
    means = {name: _means(row["runs"]) for name, row in found["rows"].items()}
    least, usual = found["dense"], means[REFERENCE]
    lines = [f"| dense, bf16 | 1 | {least:.2f} | | | |"]
    for name, row in sorted(means.items(), key=lambda i: (-i[1]["bytes"], i[1]["perplexity"])):
        loss = round((row["perplexity"] - least) / (usual["perplexity"] - least), 2) + 0.0
        lines.append(
            f"| {label(name)} | {row['bytes']:.3f} | {row['perplexity']:.2f} | {loss:.2f} "
            f"| {row['cpu_seconds']:.0f} | {row['peak_megabytes']:.0f} |"
        )
    return HEAD + "".join(f"{line}\n" for line in lines)


def other_table() -> str:
    """A row for each file type of llama.cpp, fewest bytes last."""
    found = measurements()["llama.cpp"]
    lines = [f"| dense, F16 | 1 | {found['dense']:.2f} |"]
    for name, row in found["rows"].items():
        lines.append(f"| {name} | {row['bytes']:.3f} | {row['perplexity']:.2f} |")
    return OTHER_HEAD + "".join(f"{line}\n" for line in lines)


def label(name: str) -> str:
    """A row's name in words, e.g. "`best`, 50 %, 4 bits"."""
    row = Measured.of(name, [{"bytes": 0, "perplexity": 0}])
    zeros = row.zeros if ":" in row.zeros or not row.zeros else f"{row.zeros} %"
    bits = "" if row.bits == 16 else f"{row.bits} bits"
    return ", ".join(part for part in (row.zeros and f"`{row.method}`", zeros, bits) if part)


def _means(runs) -> dict[str, float]:
    return {key: fmean(run[key] for run in runs) for key in runs[0] if key != "environment"}


def draw(path: Path) -> None:
    """Perplexity over bytes, a kind of setting in each colour; of each amount of zeros and bits the
    best method is named."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis, found = figure.subplots(), measurements()
    rows = {name: Measured.of(name, row["runs"]) for name, row in found["rows"].items()}
    kinds = {"no zeros, fewer bits": [], "zeros, bf16": [], "zeros and fewer bits": []}
    for name, own in rows.items():
        kind = (0 if own.bits < 16 else 3) if not own.zeros else 1 if own.bits == 16 else 2
        alike = [row for row in rows.values() if (row.zeros, row.bits) == (own.zeros, own.bits)]
        least = own.perplexity == min(row.perplexity for row in alike)
        list(kinds.values())[kind].append((own.bytes, own.perplexity, label(name) if least else ""))
    for colour, (kind, points) in enumerate(kinds.items()):
        x, y = [point[0] for point in points], [point[1] for point in points]
        axis.plot(x, y, "o", color=f"C{colour}", label=kind)
        for *place, text in points:
            text = text.replace("`", "")
            axis.annotate(text, place, (4, 4), textcoords="offset points", fontsize=7)
    axis.axhline(found["dense"], color="grey", linewidth=0.8, label="dense, bf16")
    other = found["llama.cpp"]
    places = {name: (row["bytes"], row["perplexity"]) for name, row in other["rows"].items()}
    axis.plot(
        *zip(*places.values(), strict=True), "s", color="C3", label="llama.cpp, other windows"
    )
    for name, place in places.items():
        axis.annotate(name, place, (4, 4), textcoords="offset points", fontsize=7)
    axis.axhline(other["dense"], color="C3", linewidth=0.8, label="its dense, F16")
    axis.margins(x=0.2)
    axis.set_yscale("log")
    axis.set_ylim(top=100)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set(xlabel="bytes of the blocks' weights, over dense bf16", ylabel="perplexity")
    axis.legend(fontsize="small", loc="upper center")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    page = DOCS / "measurements.md"
    text = page.read_text(encoding="utf-8")
    for head, table in ((HEAD, measured_table()), (OTHER_HEAD, other_table())):
        old = re.search(re.escape(head) + r"(?:\|.*\n)*", text)
        text = text.replace(old[0], table)
    page.write_text(text, encoding="utf-8")
    draw(DOCS / "bytes.png")
