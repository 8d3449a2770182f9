"""Progress bars: real ones in JupyterLab, text where the driver of the notebooks asks for it."""

import os

if os.environ.get("PRUNING_UTILS_TEXT_BARS"):
    from tqdm import tqdm
else:
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
