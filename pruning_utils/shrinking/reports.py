"""The page about a smaller model: one HTML file with its figures inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from pruning_utils import cost_plots, depth_plots
from pruning_utils.shrinking import judgements

STYLE = """
body { font-family: system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } pre { white-space: pre-wrap; background: #f4f4f4; padding: 0.8rem }
table { border-collapse: collapse } td, th { padding: 0.2rem 0.7rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #ccc }
figcaption { color: #444; font-size: 0.9rem }
"""


def report(
    *,
    title: str,
    plan_lines: Sequence[str],
    plan: Mapping,
    history: pd.DataFrame,
    judgement: pd.DataFrame,
    samples: Mapping[str, str],
    prompt: str,
) -> str:
    """The page as HTML, which needs no other file.

    Args:
        title: Of the page.
        plan_lines: The plan in words.
        plan: Of :func:`whole.plan_of`.
        history: Columns ``tokens``, ``split`` and ``loss`` (nats per token); may be empty.
        judgement: Of :func:`judgements.judged`.
        samples: What each model says, by its name.
        prompt: What they were asked.
    """
    word = judgements.overall(judgement["judgement"].tolist())
    sets = {f"removed, by {plan['rule']}": plan["layers"]}
    if plan["runner_up"]:
        sets[f"runner-up, by {plan['runner_up']['rule']}"] = plan["runner_up"]["layers"]
    figures = [
        (
            cost_plots.shares_of_limits(judgements.shares(judgement)),
            "What the smaller model loses, as a share of its limit, with 95 % intervals; a time "
            "counts whole. A measure is fit where its whole interval lies left of 1.",
        ),
        (
            depth_plots.removed_layers(sets, n_layers=plan["n_layers"]),
            "The removed layers, and those that were next."
            if plan["runner_up"]
            else "The removed layers.",
        ),
    ]
    watched = history[history["split"] == "eval"]
    if len(watched):
        shown = watched.assign(panel="validation text", n_dropped=len(plan["layers"]))
        figures.append(
            (
                depth_plots.healing_curves(
                    shown[["panel", "n_dropped", "tokens", "loss"]],
                    unpruned=plan.get("unpruned_validation_loss"),
                ),
                "Loss on validation text while the model healed, and that of the unpruned model.",
            )
        )
    parts = [f"<h1>{html.escape(title)}: {html.escape(word)}</h1>"]
    parts += [_figure(*shown) for shown in figures[:1]]
    parts += ["<h2>Judgement</h2>", _table(judgement)]
    parts += ["<h2>Plan</h2>", f"<pre>{html.escape(chr(10).join(plan_lines))}</pre>"]
    parts += [_figure(*shown) for shown in figures[1:]]
    parts.append(f"<h2>What they say to: {html.escape(prompt)}</h2>")
    for name, text in samples.items():
        parts.append(f"<h3>{html.escape(name)}</h3><pre>{html.escape(text)}</pre>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n{body}\n</html>\n"
    )


def _table(judgement: pd.DataFrame) -> str:
    shown = judgement.rename(columns={"low": "95 % low", "high": "95 % high"})
    return shown.to_html(index=False, float_format="{:.3f}".format, na_rep="", border=0)


def _figure(figure: Figure, caption: str) -> str:
    """A figure with its caption; the caption is its text for those who cannot see it."""
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    encoded = base64.b64encode(png.getvalue()).decode()
    said = html.escape(caption)
    return (
        f'<figure><img alt="{said}" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{said}</figcaption></figure>"
    )
