"""Prune a sentence encoder while sentence-transformers loads it, and compare the embeddings.

    python examples/encoder_embeddings.py MODEL [--sparsity 0.5] [--method best] [--output DIR]

MODEL is a folder or a Hub id. Half of the sentences of the text calibrate; the other half is
embedded by the dense and by the sparse encoder. Needs `pip install sentence-transformers`.
"""

import argparse
import re
import tempfile
from pathlib import Path

from sentence_transformers import SentenceTransformer

from hf_sparse import SparseConfig

TEXT = Path(__file__).parent / "data" / "evaluation.txt"


def sentences(path: Path, count: int) -> list[str]:
    """The first `count` sentences of at least 40 characters."""
    found = re.split(r"(?<=[.!?])\s+", path.read_text().replace("\0", " "))
    return [" ".join(sentence.split()) for sentence in found if len(sentence) >= 40][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune a sentence encoder.")
    parser.add_argument("model")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--method", default="best")
    parser.add_argument("--sentences", type=int, default=600)
    parser.add_argument("--output", type=Path, help="keep the sparse encoder here")
    given = parser.parse_args()

    every = sentences(TEXT, given.sentences)
    calibration, others = every[::2], every[1::2]
    config = SparseConfig(
        sparsity=given.sparsity, method=given.method, dataset=calibration,
        num_samples=len(calibration), seq_len=128, batch_size=16,
    )  # fmt: skip
    dense = SentenceTransformer(given.model)
    pruned = SentenceTransformer(given.model, model_kwargs={"quantization_config": config})
    with tempfile.TemporaryDirectory() as temporary:
        pruned.save(str(given.output or temporary))
        sparse = SentenceTransformer(str(given.output or temporary))
    embedded = [encoder.encode(others, convert_to_tensor=True) for encoder in (dense, sparse)]
    cosine = (embedded[0] * embedded[1]).sum(dim=1).mean()  # embeddings are of length 1
    nearest = [(e @ e.T).fill_diagonal_(-1).argmax(dim=1) for e in embedded]
    same = (nearest[0] == nearest[1]).float().mean()
    size = [sum(t.nbytes for t in e.state_dict().values()) / 1e6 for e in (dense, sparse)]
    print(
        f"{given.method}, {given.sparsity:.0%}: mean cosine with the dense embeddings {cosine:.3f}"
    )
    print(f"nearest of {len(others)} sentences the same for {same:.0%} of them")
    print(f"{size[0]:.1f} MB dense, {size[1]:.1f} MB sparse, vocabulary included")


if __name__ == "__main__":
    main()
