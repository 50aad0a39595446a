"""Models named on the command line: checked before anything is loaded, then loaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .failures import Failure, sentence
from .plain import read_json
from .sections import DATA, MODEL

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel=MODEL)
]
Dtype = Annotated[
    str,
    typer.Option(
        help="What is computed in: auto (the checkpoint's), float32, bfloat16 or float16.",
        rich_help_panel=MODEL,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Where weights go: cpu, cuda, cuda:1, or auto for whatever has room.",
        rich_help_panel=MODEL,
    ),
]
GgufFile = Annotated[
    str | None,
    typer.Option(
        help="The GGUF file of MODEL that holds weights and tokenizer.",
        metavar="NAME",
        rich_help_panel=MODEL,
    ),
]
DATA_HELP = (
    "Text to measure on: a text, JSON, csv or parquet file, or a data set's id on the Hub, e.g. "
    "wikitext2."
)
Split = Annotated[str, typer.Option(help="Split of a Hub data set.", rich_help_panel=DATA)]
Seed = Annotated[int, typer.Option(help="Order of the documents of a file.", rich_help_panel=DATA)]
Prefer = Annotated[
    Literal["auto", "memory", "speed"] | None,
    typer.Option(
        help="What sparse layers are to be on this machine.  [default: the checkpoint's]",
        rich_help_panel=MODEL,
    ),
]
JoinDocuments = Annotated[
    bool,
    typer.Option(
        "--join-documents",
        help="Join all texts with blank lines and cut that, as papers do.",
        rich_help_panel=DATA,
    ),
]


def read_config(model: str, revision: str | None) -> dict[str, Any]:
    """A model's config.json, without loading the model.

    Raises:
        Failure: there is no such model, or no config in it.
    """
    path = Path(model).expanduser()
    if path.is_file():
        more = f", and --gguf-file {path.name}" if path.suffix == ".gguf" else ""
        raise Failure(f"{model} is a file: pass the model's folder or a Hub id{more}")
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise Failure(f"the folder {model} has no config.json: it is no transformers model")
    elif looks_local(model):
        raise Failure(f"there is no folder {model}")
    else:
        file = _download_config(model, revision)
    content = read_json(file, Failure, any_number=True)  # some configs hold an infinity
    if not isinstance(content, dict):
        raise Failure(f"the config.json of {model} holds no object")
    return content


def read_dense_config(model: str, revision: str | None, gguf_file: str | None) -> dict[str, Any]:
    """A model's config.json; of a GGUF file, which has none, an empty one.

    Raises:
        Failure: there is no such model or file, or it can't be read here.
    """
    if gguf_file is None:
        return read_config(model, revision)
    if find_spec("gguf") is None:
        raise Failure("--gguf-file needs the package gguf: pip install gguf")
    path = Path(model).expanduser()
    if (path.is_dir() or looks_local(model)) and not (path / gguf_file).is_file():
        raise Failure(f"there is no file {gguf_file} in the folder {model}")
    return {}


def require_dense(model: str, revision: str | None, gguf_file: str | None) -> None:
    """Raise a Failure unless there is such a model, and it is dense; see `read_dense_config`."""
    method = quantisation(read_dense_config(model, revision, gguf_file))
    if method:
        kind = "sparse already" if method == "hf_sparse" else f"quantised with {method}"
        raise Failure(f"{model} is {kind}: pass the dense model that it was made from")


def require_sparse(model: str, config: Mapping[str, Any]) -> None:
    """Raise a Failure unless the config is that of a checkpoint that hf_sparse wrote."""
    method = quantisation(config)
    if method != "hf_sparse":
        kind = f"quantised with {method}" if method else "dense"
        raise Failure(f"{model} is {kind}, no sparse checkpoint: `hf-sparse prune` makes one")


def quantisation(config: Mapping[str, Any]) -> str | None:
    """The quantisation method that a model's config names."""
    described = config.get("quantization_config")
    return described.get("quant_method") if isinstance(described, Mapping) else None


def load(
    model: str,
    revision: str | None,
    dtype: str,
    device_map: str | None,
    gguf_file: str | None = None,
    prefer: str | None = None,
    **more: Any,
) -> Any:
    """A model, of the kind that its config names, and its tokenizer, or None if it has none.

    That of a GGUF file is a causal language model, and dense.
    """
    import transformers

    import hf_sparse
    from hf_sparse.calibration.tokenizers import find_tokenizer

    check_dtype(dtype)
    settings = {"revision": revision, "dtype": dtype, "device_map": device_map, **more}
    if gguf_file is None:
        auto = _auto_class(transformers.AutoConfig.from_pretrained(model, revision=revision))
    else:
        auto = transformers.AutoModelForCausalLM
        settings |= {"gguf_file": gguf_file, **_unpacked()}
    loaded = auto.from_pretrained(model, **settings)
    if prefer is not None:
        hf_sparse.prefer(loaded, prefer)
    return loaded, find_tokenizer(model, revision, gguf_file)


def _unpacked() -> dict[str, Any]:
    """Dense weights, of a transformers that could keep the blocks of a GGUF file."""
    import transformers

    gguf_config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}


def check_dtype(dtype: str) -> None:
    """Raise a Failure unless torch has a floating-point dtype of that name."""
    import torch

    known = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise Failure(f"--dtype {dtype} is not known: pass auto, float32, bfloat16 or float16")


def _auto_class(config: Any) -> Any:
    """The class whose from_pretrained loads what a config's `architectures` names."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    named = {
        "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSeq2SeqLM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForMaskedLM": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForImageTextToText": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    for name, classes in named.items():
        if classes.get(config.model_type) in (config.architectures or ()):
            return getattr(transformers, name)
    return transformers.AutoModel


def looks_local(name: str) -> bool:
    """Is it no Hub id, or the name of something in a folder that is here?"""
    no_id = name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") > 1
    parent = Path(name).parent
    return no_id or "\\" in name or (parent != Path() and parent.is_dir())


def _download_config(model: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(model, "config.json", revision=revision))
    except huggingface_hub.errors.RemoteEntryNotFoundError:
        raise Failure(
            f"{model} on the Hub has no config.json: it is no transformers model"
        ) from None
    except (OSError, ValueError) as error:
        raise Failure(f"there is no folder {model}, and from the Hub: {sentence(error)}") from error
