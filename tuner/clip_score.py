"""CLIP-score: how well frames fit their prompt, by a CLIP model from a folder of yours."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditune.db.errors import UsageFault

FOLDER_VARIABLE = "DITUNE_CLIP"
_FRAMES = 8  # of a video, evenly spread


class ClipScore:
    """Cosine of the embeddings of frames and prompt, mean over eight frames, in [0, 1].

    `$DITUNE_CLIP` names the folder of a CLIP model and its processor; nothing is downloaded.
    Source: CLIPScore (Hessel et al. 2021), without its factor of 2.5.
    """

    name = "clip"
    needs_reference = False

    def prepare(self) -> None:
        """Load the model.

        Raises:
            UsageFault: The variable is not set, or the folder holds no CLIP model.
        """
        _ = self._loaded

    def score(self, video: np.ndarray, reference: np.ndarray | None, prompt: str) -> float:
        """Return the score of a video [frames, height, width, 3] in [0, 1].

        Raises:
            UsageFault: The variable is not set, or the folder holds no CLIP model.
        """
        model, processor = self._loaded
        chosen = np.linspace(0, len(video) - 1, min(_FRAMES, len(video))).round().astype(int)
        frames = list((video[chosen] * 255.0).round().astype(np.uint8))
        given = processor(
            text=[prompt], images=frames, return_tensors="pt", padding=True, truncation=True
        )
        with torch.no_grad():
            seen = model(**given)
        cosines = seen.image_embeds @ seen.text_embeds.T  # both have unit length
        return float(cosines.clamp(min=0.0).mean())

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import CLIPModel, CLIPProcessor

        folder = os.environ.get(FOLDER_VARIABLE)
        if not folder or not (Path(folder) / "config.json").is_file():
            raise UsageFault(
                f"the metric clip needs ${FOLDER_VARIABLE}, the folder of a CLIP model and its "
                f"processor (save_pretrained), and found {folder or 'nothing'}"
            )
        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            return model, CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as fault:
            first = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
            raise UsageFault(f"{folder} holds no CLIP model: {first}") from fault
