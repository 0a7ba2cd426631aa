"""memreason: fine-tune open LLMs so that every line of an answer says whether it is memory or reason."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# name -> where it lives; imported when first used, so that `import memreason` stays light.
_PUBLIC = {
    "Checkpoint": "memreason.finetune.checkpoint",
    "Codec": "memreason.encode.codec",
    "DataError": "memreason.core.errors",
    "LabelRecipe": "memreason.core.labelling",
    "MemreasonError": "memreason.core.errors",
    "Question": "memreason.core.trace",
    "Recipe": "memreason.core.recipe",
    "Score": "memreason.measure.score",
    "ScriptedTeacher": "memreason.label.scripted",
    "Step": "memreason.core.trace",
    "TokenScheme": "memreason.encode.scheme",
    "Trace": "memreason.core.trace",
    "add_rows": "memreason.encode.vocab",
    "add_tokens": "memreason.encode.vocab",
    "answer_questions": "memreason.generate.answer",
    "ask": "memreason.pipeline",
    "calibrate": "memreason.outside",
    "compare": "memreason.comparing",
    "evaluate": "memreason.pipeline",
    "export": "memreason.exports",
    "faults": "memreason.inside",
    "import_checkpoint": "memreason.finetune.imported",
    "import_published": "memreason.data.published",
    "label_questions": "memreason.labels",
    "load_checkpoint": "memreason.finetune.checkpoint",
    "load_comparison": "memreason.core.comparison",
    "load_label_recipe": "memreason.core.labelling",
    "load_recipe": "memreason.core.recipe",
    "make_atlas": "memreason.data.atlas",
    "probe": "memreason.inside",
    "read_traces": "memreason.core.files",
    "retrieval_curve": "memreason.outside",
    "run": "memreason.pipeline",
    "score": "memreason.measure.score",
    "serving": "memreason.label.scripted",
    "summarise": "memreason.measure.stats",
    "train": "memreason.pipeline",
    "write_report": "memreason.pages",
    "write_traces": "memreason.core.files",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'memreason' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
