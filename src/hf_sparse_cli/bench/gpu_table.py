"""What `hf-sparse bench gpu` found, as files: a table for people, JSON for machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def table(found: dict[str, Any]) -> str:
    """The products as a table, the rest as it is."""
    lines = [f"{found['machine']}; copies move {found['copy_bandwidth'] / 1e12:.2f} TB/s", ""]
    products = [*found.get("decode", ()), *found.get("prefill", ())]
    if products:
        lines += [
            "| way | shape | sparsity | M | us | cuBLAS bf16, us | ratio | bytes | of copy |",
            "|---" * 9 + "|",
        ]
    for p in products:
        rows, columns = p["shape"]
        lines.append(
            f"| {p['what']} | {rows}x{columns} | {p['sparsity']:.0%} | {p['tokens']} | "
            f"{p['seconds'] * 1e6:.1f} | {p['dense_seconds'] * 1e6:.1f} | {p['ratio']:.2f} | "
            f"{p['bytes_ratio']:.3f} | {p['bandwidth']:.2f} |"
        )
    lines += [
        f"{part}: {json.dumps(found[part])}"
        for part in found
        if part not in ("machine", "copy_bandwidth", "decode", "prefill")
    ]
    return "\n".join(lines) + "\n"


def write(folder: Path | None, found: dict[str, Any]) -> str:
    """Write gpu.json and gpu.md into a folder, if there is one, and return the table."""
    text = table(found)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(found, indent=1))
        (folder / "gpu.md").write_text(text)
    return text
