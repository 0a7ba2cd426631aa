"""Codec: a scheme bound to a tokenizer. A trace to ids, and ids back to a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from memreason.core.errors import CheckpointError, ModelError
from memreason.core.trace import ASSIGNMENT, Question, Step, Trace
from memreason.encode.base import bare_tokenizer, text_fingerprint
from memreason.encode.chat import head_and_rest, start_and_tail
from memreason.encode.demonstrations import Demonstrations
from memreason.encode.free import parse_free
from memreason.encode.lines import Line, read_lines
from memreason.encode.pieces import Piece, Rows, put_together, take_apart
from memreason.encode.scheme import ANSWER, PLANS, PREFIX, TokenScheme

__all__ = ["Codec"]


class Codec:
    """A scheme bound to a tokenizer that holds its tokens: renders traces to ids, parses ids to traces."""

    def __init__(
        self,
        scheme: TokenScheme,
        tokenizer: PreTrainedTokenizerBase,
        demonstrations: Demonstrations | None = None,
    ) -> None:
        """Raises CheckpointError if the tokenizer lacks a token of the scheme or is another one."""
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in scheme.tokens if token not in vocabulary]
        if missing:
            raise CheckpointError(f"the tokenizer lacks {missing} of the token scheme: they do not belong together")
        self.scheme = scheme
        self.demonstrations = demonstrations
        self.tokenizer = tokenizer
        self.text_tokenizer = bare_tokenizer(tokenizer, scheme.tokens)
        fingerprint = text_fingerprint(self.text_tokenizer)
        if scheme.tokenizer and scheme.tokenizer != fingerprint:
            raise CheckpointError(
                f"the token scheme was made for another tokenizer ({scheme.tokenizer}, this one is {fingerprint})"
            )
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-sequence token")
        self.eos_id = int(tokenizer.eos_token_id)
        self.blocks = {name: [vocabulary[token] for token in block] for name, block in scheme.blocks.items()}
        self.separator = self.encode(scheme.block_separator) if scheme.block_separator else []
        self._line_blocks: dict[tuple[str, ...], tuple[int, ...]] = {}
        self._answer_block = self.block(PREFIX, ANSWER)
        self.places = {i: (name, k) for name, block in self.blocks.items() for k, i in enumerate(block)}
        # The planning tokens that part what may be seen (sparse.py): none where attention is not sparse.
        self.parting = frozenset(self.places if scheme.sparse_attention else ())

    @cached_property
    def opening_special_ids(self) -> list[int]:
        """What the tokenizer puts before a text: a BOS, or nothing. In a chat only what its template writes too."""
        ids = list(self.tokenizer("")["input_ids"])
        found = [int(i) for i in ids if i != self.eos_id or i == self.tokenizer.bos_token_id]
        if self.scheme.chat_turn and self._control_ids(self.scheme.around_question[0])[: len(found)] != tuple(found):
            return []
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of a text that a user wrote: never a control token (law 1)."""
        return list(self.encode_batch([text])[0].ids)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """The same for many texts, on all cores and without the interpreter lock. Ids are made when asked for."""
        return self.text_tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    def encode_pieces(self, rows: Iterable[Iterable[Piece]]) -> Rows:
        """Rows of ids, their texts encoded in one call."""
        apart = take_apart(rows)
        return put_together(apart, self.encode_batch(apart.texts))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def block(self, *names: str) -> tuple[int, ...]:
        """Ids of these blocks in a row, the separator (empty unless imported) between their tokens."""
        tokens = [token for name in names for token in self.blocks.get(name, ())]
        return tuple(i for token in tokens for i in (*self.separator, token))[len(self.separator) :]

    def question_ids(self, question: Question) -> list[int]:
        return self._ids(self.question_pieces(question))

    def opening(self) -> list[int]:
        """The block that every trace begins with: given to the model when it generates."""
        return list(self.block(PREFIX))

    def render(self, trace: Trace) -> list[int]:
        """Ids of the trace alone, from the first block to EOS."""
        return self._ids(self.trace_pieces(trace))

    def _ids(self, pieces: Iterable[Piece]) -> list[int]:
        ids: list[int] = self.encode_pieces([pieces]).ids.tolist()
        return ids

    def pieces(self, trace: Trace) -> Iterator[Piece]:
        """What an example is made of: the question, which is masked, and the trace."""
        yield from self.question_pieces(trace.question)
        yield from self.trace_pieces(trace)

    def question_pieces(self, question: Question) -> Iterator[Piece]:
        """The question as the scheme prints it, behind its demonstrations: nothing of it is supervised."""
        yield tuple(self.opening_special_ids), False
        shown = self.demonstrations.of(question) if self.demonstrations else []
        for place, trace in enumerate(shown):
            yield from self._asked_pieces(trace.question, first=not place)
            yield from ((part, False) for part, _ in self._shown_pieces(trace))
        yield from self._asked_pieces(question, first=not shown)

    def _shown_pieces(self, trace: Trace) -> Iterator[Piece]:
        """A whole trace; in a chat its turn ends with what the template writes, which the next question brings."""
        pieces = list(self.trace_pieces(trace))
        return iter(pieces[:-1] if self.scheme.chat_turn else pieces)

    def _asked_pieces(self, question: Question, *, first: bool) -> Iterator[Piece]:
        """One question: a text, or in a chat ids of the template around what the user wrote (law 1)."""
        if not self.scheme.chat_turn:
            yield self.scheme.question_text(question), False
            return
        (start, tail), turn, (head, rest) = self._chat
        if not first:
            start, tail = turn
        yield start, False
        yield tail + self.scheme.message(question) + head, False
        yield rest, False

    @cached_property
    def _chat(self) -> tuple[tuple[tuple[int, ...], str], tuple[tuple[int, ...], str], tuple[str, tuple[int, ...]]]:
        """What the chat template writes before the first question, before a later one, and behind one: ids with
        control tokens, and the text that is read in one with the question.

        A BOS that the template writes too stands in `opening_special_ids`.
        """
        before, behind = self.scheme.around_question
        (start, tail), (turn, again) = (start_and_tail(self.tokenizer, s) for s in (before, self.scheme.chat_turn))
        head, rest = head_and_rest(self.tokenizer, behind)
        ids = self._control_ids(start)[len(self.opening_special_ids) :]
        return (ids, tail), (self._control_ids(turn), again), (head, self._control_ids(rest))

    @cached_property
    def turn_ends(self) -> frozenset[int]:
        """The control token that ends an answer in the chat template: EOS on most bases, on some another one."""
        special = set(self.tokenizer.all_special_ids)
        return frozenset([i for i in self._control_ids(self.scheme.chat_turn) if i in special][:1])

    def said(self, question: Question) -> str:
        """A question as a user of a chat writes it, its instruction included."""
        if not self.scheme.chat_turn:
            return self.scheme.question_text(question).strip()
        return (self.scheme.message(question) + self._chat[2][0]).strip()

    def _control_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text of ours, its control tokens included."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def trace_pieces(self, trace: Trace) -> Iterator[Piece]:
        """What a trace is made of, from the first block to EOS: its texts between the ids of blocks (laws 1, 2, 4)."""
        placement, plan = self.scheme.placement, self.scheme.placement in PLANS
        if placement == "only_at_front":
            yield self.block(PREFIX), True
        if plan:
            yield from ((self._line_block(step.kinds), True) for step in trace.steps)
            yield self._answer_block, True
        if placement != "plan_only":
            yield from self._step_pieces(trace.steps)
        if placement == "each_step":
            yield self._answer_block, True
        yield self.scheme.answer_template.replace("{answer}", trace.answer), True
        yield (self.eos_id,), True

    def _step_pieces(self, steps: Iterable[Step]) -> Iterator[Piece]:
        for step in steps:
            if self.scheme.placement == "each_step":
                yield self._line_block(step.kinds), True
            if self.scheme.words and step.kinds:
                yield self.scheme.words_of(step.kinds), True
            yield self.scheme.line_text(step.text), not step.source  # what was retrieved teaches nothing

    def step_ids(self, steps: Sequence[Step]) -> list[int]:
        """Ids of lines alone, as they stand in a trace."""
        return self._ids(self._step_pieces(steps)) if steps else []

    def _line_block(self, kinds: tuple[str, ...]) -> tuple[int, ...]:
        """The block of a line, made once for all lines of these kinds. Raises ModelError for unknown kinds."""
        if kinds not in self._line_blocks:
            unknown = [kind for kind in kinds if kind not in (*self.scheme.kinds, ASSIGNMENT)]
            if unknown and self.scheme.n_special:
                raise ModelError(f"kinds {unknown} are not in the token scheme, which has {list(self.scheme.kinds)}")
            self._line_blocks[kinds] = self.block(PREFIX, *(kinds or (ASSIGNMENT,)))
        return self._line_blocks[kinds]

    def parse(self, question: Question, ids: Sequence[int]) -> Trace:
        """Read generated ids. Never raises: what fits no trace is named in `faults` (law 3).

        `meta["spans"]` of the trace holds, for each step, [first, last + 1] of its ids, blocks included, and
        `meta["bodies"]` where its text begins behind them.
        """
        if self.scheme.free:
            return parse_free(self, question, ids)
        faults: list[str] = []
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        else:
            faults.append("no end of sequence")
        steps, prediction = self._split_answer(read_lines(self, ids, faults), faults)
        meta = {"spans": [line.span for line in steps], "bodies": [line.body for line in steps]}
        return Trace(question, tuple(line.step() for line in steps), prediction, tuple(dict.fromkeys(faults)), meta)

    def _split_answer(self, lines: list[Line], faults: list[str]) -> tuple[list[Line], str]:
        """The lines of steps, and the prediction. The first answer line ends the trace; what follows it is a fault."""
        lead = self.scheme.answer_lead
        steps: list[Line] = []
        for number, line in enumerate(lines):
            text, tagged = line.text, ANSWER in line.kinds
            if tagged or (not self.blocks.get(ANSWER) and text.startswith(lead)):
                if not text.startswith(lead):
                    faults.append("answer line without its phrase")
                if number != len(lines) - 1:
                    faults.append("text after the answer")
                return steps, text.removeprefix(lead).strip()
            if not text and self.scheme.placement != "plan_only":
                faults.append("empty line")
                continue
            steps.append(line)
        faults.append("no answer line")
        return steps, ""

    def describe(self) -> dict[str, Any]:
        """For manifests: token -> id."""
        return {
            token: i
            for name, block in self.scheme.blocks.items()
            for token, i in zip(block, self.blocks[name], strict=True)
        }
