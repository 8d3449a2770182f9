"""What the beginning of a text, mostly one bos_token, does to the perplexity of embedded models.

    .venv/bin/python benchmarks/beginnings.py
    .venv/bin/python benchmarks/beginnings.py --samples 1 --seq-len 16    # seconds, once unpacked

Each line is one model that is installed, in float32, on windows of news that begin as its tokenizer
begins a text, and on the same windows without this beginning, whose first token of text is then not
predicted. Where the tokenizer begins no text, both are the same. Nothing is asserted.
"""

import argparse

from pruning_utils import data, embedded, evaluation, models, runtime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    asked = parser.parse_args()
    runtime.setup(0)
    print(f"XSum, {asked.samples} windows of {asked.seq_len} tokens, float32")
    for name in embedded.MODELS:
        try:
            model, tokenizer = models.load_model(name, dtype="float32")
        except ModuleNotFoundError as error:
            print(f"{name:>12}: not installed ({error})")
            continue
        prefix = data.text_prefix(tokenizer)
        whole = data.evaluation_windows(tokenizer, asked.samples, asked.seq_len)
        found = evaluation.perplexity(model, whole)
        if not prefix:
            print(f"{name:>12}: {found:.2f} both ways: its tokenizer puts nothing before a text")
            continue
        begun = "".join(tokenizer.convert_ids_to_tokens(prefix))
        without = evaluation.perplexity(model, whole[:, len(prefix) :])
        print(f"{name:>12}: {found:.2f} with {begun}, {without:.2f} without")


if __name__ == "__main__":
    main()
