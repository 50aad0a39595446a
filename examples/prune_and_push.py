"""Prune a model, measure it beside the dense one, publish it on the Hub, and load it from there.

    hf auth login
    python examples/prune_and_push.py MODEL you/NAME --calibration FILE --evaluation FILE

MODEL is a folder or a Hub id of a causal language model; FILE holds text, or is the name of a Hub
data set such as wikitext2. The model card is made of what was done and measured here.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparseConfig, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune a model and publish it.")
    parser.add_argument("model")
    parser.add_argument("repository")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--evaluation-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--private", action="store_true")
    given = parser.parse_args()
    config = SparseConfig(
        sparsity=given.sparsity,
        dataset=given.calibration,
        num_samples=given.num_samples,
        seq_len=given.seq_len,
    )
    model = AutoModelForCausalLM.from_pretrained(given.model, quantization_config=config)
    print(model.hf_quantizer.report.summary())
    measured = evaluate(
        model,
        lambda: AutoModelForCausalLM.from_pretrained(given.model),  # gone when it is measured
        AutoTokenizer.from_pretrained(given.model),
        given.evaluation,
        seq_len=given.seq_len,
        num_samples=given.evaluation_samples,
    )
    print(f"dense:  {measured.dense_perplexity}\nsparse: {measured.perplexity}")
    model.hf_quantizer.evaluation = measured
    print(model.push_to_hub(given.repository, private=given.private or None))
    again = AutoModelForCausalLM.from_pretrained(given.repository)
    tokenizer = AutoTokenizer.from_pretrained(given.repository)
    prompt = tokenizer(measured.texts[0].prompt, return_tensors="pt")
    print(tokenizer.decode(again.generate(**prompt, max_new_tokens=24, do_sample=False)[0]))


if __name__ == "__main__":
    main()
