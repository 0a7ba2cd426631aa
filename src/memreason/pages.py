"""The pages of trained runs as functions. Whatever is heavy is imported when it is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memreason.core.errors import MemreasonError, RecipeError
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Trace, question_id
from memreason.data.tasks import load_eval
from memreason.report.console import figures, note

if TYPE_CHECKING:
    from memreason.finetune.checkpoint import Checkpoint

__all__ = ["needs_server", "serve", "write_report"]

LIMIT = 64  # requests that may be open at once
NO_DATA: dict[str, Any] = {"runs": [], "traces": []}


def write_report(
    paths: Path | str | Sequence[Path | str],
    *,
    out: Path | str | None = None,
    csv: Path | str | None = None,
    json: Path | str | None = None,
) -> Path:
    """One self-contained page of a run, a checkpoint or an evaluation, or of several beside one another; its path.

    Without `out` it is report.html in the run, of several in the working directory. `csv` and `json` take the same
    data: a row a trace, and all of it. Raises CheckpointError for a path without an evaluation.
    """
    from memreason.core.files import write_json, write_text
    from memreason.report.gather import gather
    from memreason.report.page import page
    from memreason.report.table import csv_text

    many = [paths] if isinstance(paths, Path | str) else list(paths)
    if not many:
        raise RecipeError("a run is needed: memreason report RUN", "report")
    data = gather(many)
    target = Path(out or (Path(many[0]) if len(many) == 1 else Path()) / "report.html")
    write_text(target, page(data))
    if csv:
        write_text(csv, csv_text(data))
    if json:
        write_json(json, data)
    return target


def needs_server() -> None:
    """Raises RecipeError where the packages of the server are missing."""
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise RecipeError(f"{' and '.join(missing)} not installed: pip install 'memreason[serve]'", "serve")


def serve(
    path: Path | str,
    *,
    settings: EvalRecipe | None = None,
    base: str | None = None,
    checkpoint: Checkpoint | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    limit: int = LIMIT,
) -> None:
    """The report of a run, live, until a signal comes: ask, change a memory line, run from there, keep corrections.

    Answers are those of `settings` (None: the recipe's), memory from outside included, `limit` requests open at a
    time. With settings.corpus, lines found there are offered too. Raises RecipeError where it cannot listen at host
    and port (0: any free one), or does not know when a line is unsure.
    """
    needs_server()
    import torch

    from memreason.finetune.checkpoint import load_checkpoint
    from memreason.generate.decode import decode
    from memreason.retrieve.outside import outside
    from memreason.serve.app import Service, make_app
    from memreason.serve.guard import Guard, policy
    from memreason.serve.live import Live
    from memreason.serve.run import address, is_loopback, listen, make_server, run

    loaded = checkpoint or load_checkpoint(path, base=base)
    settings, folder = settings or loaded.recipe.eval, _folder(loaded)
    engine, memory = outside(settings, loaded.folder)
    said = _memory_said(settings, memory.get("unsure_below"))
    task, (page, data) = settings.task or loaded.recipe.data.task, _page(path, loaded.folder, folder, said)
    listener, port = listen(host, port)
    if torch.cuda.is_available() and not getattr(loaded.model, "is_quantized", False):
        loaded.model.to("cuda")
    live = Live(loaded.model, loaded.codec, settings, limit=limit, engine=engine or decode)
    shown = [EvalRecipe(**one["settings"]) for run in data["runs"] for one in run["evaluations"]]
    known = _known(task, [*shown, settings], loaded)
    service = Service(live, page, folder / "corrections.jsonl", task, data["traces"], known, _search(settings))
    server = make_server(Guard(make_app(service), host, port, policy(page)), live)
    if not is_loopback(host):
        note(f"{host}: whoever reaches this address can ask and read, there is no login")
    told = [("memory lines", said)] if said else []
    figures("", [("open", address(host, port)), ("corrections", str(service.corrections)), *told, ("stop", "Ctrl-C")])
    run(server, live, listener)


def _folder(loaded: Checkpoint) -> Path:
    """The run of a checkpoint; itself where it lies alone."""
    parent = loaded.folder.parent
    return parent if (parent / "manifest.json").is_file() else loaded.folder


def _memory_said(settings: EvalRecipe, threshold: float | None) -> str:
    """Where memory lines come from, in words; empty where the model recalls them."""
    if settings.memory == "recall":
        return ""
    which = "all" if threshold is None else f"those of less probability than {math.exp(threshold):.2f}"
    place = "before" if settings.retrieved == "precedes" else "in place of"
    return f"{which}: what is found in {settings.corpus} stands {place} the model's own"


def _page(path: Path | str, checkpoint: Path, folder: Path, memory: str) -> tuple[str, dict[str, Any]]:
    """The report, live, and its data; of a run that was never evaluated a page to ask on, and no data."""
    from memreason.core.errors import CheckpointError
    from memreason.report.gather import flagged_below, gather
    from memreason.report.page import page
    from memreason.report.templates import render

    try:
        found = gather([path])
    except CheckpointError:
        embedded = {"unsure": [flagged_below(checkpoint)["below"]], "memory": memory, "traces": []}
        values = {"name": folder.resolve().name, "path": str(path), "embedded": embedded}
        return render("live.html.j2", values), NO_DATA
    return page({**found, "live": True, "memory": memory}), found


def _known(task: str, asked: Sequence[EvalRecipe], loaded: Checkpoint) -> Mapping[str, Trace]:
    """Labelled traces of the questions that these settings ask, by question id; none where they cannot be had."""
    known: dict[str, Trace] = {}
    for one in asked:
        name = one.task or loaded.recipe.data.task
        try:
            traces = load_eval(name, one.split, loaded.recipe.data, one.n, seed=one.seed)
        except MemreasonError as error:
            note(f"gold lines of {name} / {one.split} are not offered: {error}")
            continue
        known |= {question_id(task, trace.question.text, trace.question.choices): trace for trace in traces}
    return known


def _search(settings: EvalRecipe) -> Any:
    if not settings.corpus:
        return None
    from memreason.retrieve.outside import open_retriever
    from memreason.retrieve.passage import searching

    return searching(open_retriever(settings.corpus))
