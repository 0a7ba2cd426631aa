"""The verbs that look inside a trained run: whose fault a wrong answer is, what its blocks and memory lines control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from memreason.core.errors import ModelError, RecipeError, TaskError
from memreason.core.files import (
    read_json,
    read_jsonl,
    read_traces,
    settings_hash,
    write_json,
    write_jsonl,
    write_traces,
)
from memreason.core.labelling import LabelRecipe
from memreason.core.stages import EvalRecipe
from memreason.core.trace import MEMORY, REASON, Question, Trace
from memreason.data.tasks import Splits, load_eval, load_splits
from memreason.finetune.checkpoint import Checkpoint, checkpoint_for, load_checkpoint
from memreason.finetune.step_types import with_step_types
from memreason.generate.answer import read_samples
from memreason.generate.engines import generate
from memreason.generate.onward import begun_ids, continue_traces
from memreason.label.teacher import Teacher
from memreason.measure.attribute import Attribution, attribute, can_check
from memreason.measure.counterfactual import (
    INTERVENTIONS,
    Gold,
    Lines,
    Search,
    attribute_by_trying,
    begin,
    effects,
    gold_lines,
)
from memreason.measure.flows import Array, write_arrays
from memreason.measure.judge import attribute_by_judge
from memreason.measure.kinds import by_words, kind_reader, reader_accuracy
from memreason.measure.look import Closeup, close_up, overview
from memreason.measure.probe import PROBES, Begun, Case, begun, cases_of, probe_table
from memreason.measure.ways import fault_lines, faults_of, read_ways
from memreason.pipeline import evaluate
from memreason.report.console import note
from memreason.retrieve.outside import open_retriever, outside
from memreason.retrieve.passage import Passage, sentence_for

__all__ = ["attention", "closeup", "faults", "probe"]


def faults(
    path: Path | str,
    *,
    settings: EvalRecipe | None = None,
    base: str | None = None,
    checkpoint: Checkpoint | None = None,
    counterfactual: bool = False,
    gold: Gold | None = None,
    search: Search | None = None,
    judge: LabelRecipe | None = None,
    teacher: Teacher | None = None,
) -> dict[str, Any]:
    """Whose fault each wrong answer of an evaluation is, by every way that is open. Evaluates first what is not yet.

    Exactly, where facts are known (atlas). With `counterfactual` each question is answered anew with other memory lines
    given; `gold` says where true ones come from (None: what is there), `search` finds those to be "retrieved" (None: in
    the settings' corpus). With `judge` a model reads every wrong trace: the recipe's, or a `teacher` of one's own.
    Writes faults.jsonl (a line for each question: verdict and evidence) and faults.json beside the samples; ways that
    were gone before for the same samples, and are not now, stay in them.
    Raises TaskError where facts are not known and no other way is given.
    """
    loaded = checkpoint or checkpoint_for(settings, path, base=base)
    used, data = settings or loaded.recipe.eval, loaded.recipe.data
    task = used.task or data.task
    asked = load_eval(task, used.split, data, used.n, seed=used.seed)
    exact = all(can_check(trace.question) for trace in asked)
    if not (exact or counterfactual or judge):
        raise TaskError(f"{task}: lines can be checked exactly on atlas only. Give --counterfactual, or --judge MODEL.")
    source, lines = gold_lines(asked, gold, search or _searching(used.corpus)) if counterfactual else (None, {})
    folder = Path(evaluate(path, settings=used, base=base, checkpoint=loaded)["folder"])
    made = _first(read_traces(folder / "samples.jsonl"))
    told = any(kind in (MEMORY, REASON) for trace in made for step in trace.steps for kind in step.kinds)
    read = [trace if told else by_words(trace) for trace in made] if exact else []
    ways: dict[str, list[Attribution]] = {"exact": [attribute(trace) for trace in read]} if exact else {}
    table: dict[str, Any] = {"task": task, "split": used.split, "folder": str(folder)}
    if source:
        tried = _interventions(loaded, made, lines, used, folder)
        ways["counterfactual"] = attribute_by_trying(made, source, lines, tried)
        table["counterfactual"] = {"gold": source, **effects(made, lines, tried)}
    if judge and PartialState().is_main_process:
        journal = folder / f"judge-{settings_hash({'model': judge.teacher.model})}.sqlite"
        ways["judge"], table["judge"] = attribute_by_judge(made, judge, journal, teacher=teacher)
    return _write_faults(folder, made, ways, table)


def _searching(corpus: str | None) -> Search | None:
    """A search of a corpus that gives lines: of a long passage the sentence that is closest to the question."""

    def search(queries: Sequence[str], k: int) -> list[list[Passage]]:
        assert corpus is not None
        found = zip(queries, open_retriever(corpus).search(queries, k), strict=True)
        return [[replace(one, text=sentence_for(one.text, query)) for one in row] for query, row in found]

    return search if corpus else None


def _first(samples: Sequence[Trace]) -> list[Trace]:
    """Of several samples of a question the first."""
    once: dict[str, Trace] = {}
    for trace in samples:
        once.setdefault(trace.question.id, trace)
    return list(once.values())


def _write_faults(
    folder: Path, made: Sequence[Trace], ways: Mapping[str, Sequence[Attribution]], about: dict[str, Any]
) -> dict[str, Any]:
    samples = settings_hash({"samples": [trace.to_json() for trace in made]})
    earlier, told = _earlier(folder, made, samples)
    every = {**earlier, **ways}
    kept = {name: told[name] for name in earlier if name in told}
    table = {**faults_of(every), **kept, **about, "samples": samples}
    if PartialState().is_main_process:
        write_jsonl(folder / "faults.jsonl", fault_lines(every))
        write_json(folder / "faults.json", table)
    return table


def _earlier(folder: Path, made: Sequence[Trace], samples: str) -> tuple[dict[str, list[Attribution]], dict[str, Any]]:
    """The ways that were gone before for these very samples, and the table that tells of them."""
    path = folder / "faults.json"
    told: dict[str, Any] = read_json(path) if path.is_file() else {}
    if told.get("samples") != samples:  # of other traces, or of a version that did not say
        return {}, {}
    return read_ways([line for _, line in read_jsonl(folder / "faults.jsonl")], made), told


def _interventions(
    loaded: Checkpoint, made: Sequence[Trace], gold: Lines, settings: EvalRecipe, folder: Path
) -> dict[str, list[Trace]]:
    """What the traces become with other memory lines."""
    tried = {}
    for name in INTERVENTIONS:
        begun = begin(name, made, gold)
        ids = {trace.question.id: begun_ids(loaded.codec, trace) for trace in begun}
        tried[name] = _continued(name, loaded, [trace.question for trace in begun], ids, settings, folder)
    return tried


def _continued(
    name: str,
    loaded: Checkpoint,
    questions: Sequence[Question],
    ids: Mapping[str, list[int]],
    settings: EvalRecipe,
    folder: Path,
) -> list[Trace]:
    """What the questions' traces become behind these ids (by question id). Kept, by what was given, once it is whole:
    two verbs that give the same generate it once."""
    path = folder / f"given-{name}-{settings_hash(ids)}.jsonl"
    if questions and not path.is_file():
        state = PartialState()
        mine = questions[state.process_index :: state.num_processes]
        made = list(tqdm(continue_traces(loaded.model, loaded.codec, mine, ids, settings), name, len(mine)))
        whole = gather_object(made) if state.num_processes > 1 else made
        order = {question.id: number for number, question in enumerate(questions)}
        if state.is_main_process:
            write_traces(path, sorted(whole, key=lambda trace: order[trace.question.id]))
        state.wait_for_everyone()
    return read_traces(path) if questions else []


def probe(
    path: Path | str,
    *,
    settings: EvalRecipe | None = None,
    base: str | None = None,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Any]:
    """Whether blocks control what a line becomes, and whether answers follow the memory lines: interventions on every
    question of an evaluation (measure/probe.py). Evaluates first what is not yet.

    One batched run an intervention, kept beside the samples once it is whole. Writes probe.json there.
    Raises ModelError for a scheme whose lines carry no blocks.
    """
    loaded = checkpoint or checkpoint_for(settings, path, base=base)
    if loaded.codec.scheme.placement != "each_step" or not loaded.codec.scheme.n_special:
        raise ModelError(f"{path}: its lines carry no blocks of their kinds, so there is nothing to probe")
    results = evaluate(path, settings=settings, base=base, checkpoint=loaded)
    folder, data = Path(results["folder"]), loaded.recipe.data
    used = EvalRecipe(**results["settings"])
    gold = load_eval(results["task"], used.split, data, used.n, seed=used.seed)
    cases = cases_of(_first(read_traces(folder / "samples.jsonl")), {trace.question.id: trace for trace in gold})
    tried = {name: _probed(name, loaded, cases, used, folder) for name in PROBES}
    labelled = _labelled(loaded) if results["task"] != "atlas" else None
    kind_of = kind_reader(labelled.train if labelled else ())
    table = {**probe_table(tried, kind_of), "task": results["task"], "split": results["split"], "folder": str(folder)}
    if labelled:
        table["kind_reader"] = reader_accuracy(kind_of, labelled.validation)
    if PartialState().is_main_process:
        write_json(folder / "probe.json", table)
    return table


def _labelled(loaded: Checkpoint) -> Splits:
    """What the run was trained on, with the kinds that it was trained on."""
    recipe, run = loaded.recipe, loaded.folder.parent
    return with_step_types(recipe, load_splits(recipe.data), loaded.codec.scheme, run, note)


def _probed(
    name: str, loaded: Checkpoint, cases: Sequence[Case], settings: EvalRecipe, folder: Path
) -> dict[str, tuple[Begun, Trace]]:
    """What was given to each question, and the trace that came of it."""
    given = begun(name, loaded.codec, cases)
    asked = [case.made.question for case in cases if case.made.question.id in given]
    made = _continued(name, loaded, asked, {key: one.ids for key, one in given.items()}, settings, folder)
    return {trace.question.id: (given[trace.question.id], trace) for trace in made}


def attention(
    path: Path | str,
    *,
    settings: EvalRecipe | None = None,
    base: str | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[dict[str, Any], dict[str, Array]]:
    """What looks at what: attention between question, blocks, memory, reason and answer of an evaluation's traces,
    right against wrong. Evaluates first what is not yet.

    Writes attention.json (means over layers and heads, with intervals over questions) and attention.npz (every layer
    and head) beside the samples, and returns what is in them. Raises ModelError for a model that cannot be looked at.
    """
    loaded = checkpoint or load_checkpoint(path, base=base)
    results = evaluate(path, settings=settings, base=base, checkpoint=loaded)
    folder = Path(results["folder"])
    table, arrays = overview(loaded.model, loaded.codec, read_samples(folder))
    table |= {"task": results["task"], "split": results["split"], "folder": str(folder)}
    if PartialState().is_main_process:
        write_json(folder / "attention.json", table)
        write_arrays(folder / "attention.npz", arrays)
    return table, arrays


def closeup(
    path: Path | str,
    question: str = "",
    *,
    choices: Sequence[str] = (),
    question_id: str = "",
    layers: Sequence[int] = (),
    heads: Sequence[int] = (),
    settings: EvalRecipe | None = None,
    base: str | None = None,
    checkpoint: Checkpoint | None = None,
) -> Closeup:
    """Attention inside one trace: of a question of the user's own, or, by its id, of one that was evaluated.

    `layers` and `heads` choose the maps (measure/look.py). Raises RecipeError for an id or a head that does not exist.
    """
    loaded = checkpoint or load_checkpoint(path, base=base)
    used = settings or loaded.recipe.eval
    if question_id:
        folder = Path(evaluate(path, settings=used, base=base, checkpoint=loaded)["folder"])
        line = next((line for line in read_samples(folder) if line["id"] == question_id), None)
        if line is None:
            raise RecipeError(f"--id {question_id}: {folder / 'samples.jsonl'} has no such question", "attention")
        asked, ids = Trace.from_json(line).question, line["ids"]
    else:
        asked = Question(question, "?", loaded.recipe.data.task, choices=tuple(choices) or None)
        once = used.model_copy(update={"n_samples": 1, "ray": None})
        engine = outside(once, loaded.folder).engine
        ((made,),) = generate(loaded.model, loaded.codec, [asked], once, engine=engine)
        ids = made.ids
    return close_up(loaded.model, loaded.codec, asked, ids, layers=layers, heads=heads)
