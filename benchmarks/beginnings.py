"""What the beginning of a text, mostly one bos_token, does to the perplexity of embedded models.

    .venv/bin/python benchmarks/beginnings.py
    .venv/bin/python benchmarks/beginnings.py --samples 1 --seq-len 16    # seconds, once unpacked

Each line is one model that is installed, in float32, on windows of news that begin as its tokenizer
begins a text, and on the same windows without this beginning. The first token of a window of text
counts neither way, since nothing may stand before it. Where a tokenizer puts nothing before a text,
both are the same. Nothing is asserted.
"""

import argparse

from pruning_utils import data, embedded, evaluation, models, runtime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of text in a window")
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
        n_before = len(prefix)
        whole = data.evaluation_windows(tokenizer, asked.samples, n_before + asked.seq_len)
        begun = evaluation.token_losses(model, whole)[:, n_before:].mean().exp()
        if not prefix:
            print(f"{name:>12}: {begun:.2f} both ways: its tokenizer puts nothing before a text")
            continue
        bare = evaluation.perplexity(model, whole[:, n_before:])
        shown = "".join(tokenizer.convert_ids_to_tokens(prefix))
        print(f"{name:>12}: {begun:.2f} with {shown}, {bare:.2f} without")


if __name__ == "__main__":
    main()
