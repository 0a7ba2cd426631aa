"""One question, from its first request to an accepted trace or a rejection: pure, so that it can be played again.

`label_trace` is a generator of requests. Playing the journal's replies into it restores where a question stood when
a run was stopped, to the letter; an asynchronous run, a batch file and a test drive the same generator.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from memreason.core.labelling import LabelRecipe
from memreason.core.trace import Trace
from memreason.label.checks import Draft, problems_of
from memreason.label.prompting import Prompts
from memreason.label.protocols import PROTOCOLS
from memreason.label.request import Failed, Reply, Request, content_of

__all__ = ["Labelling", "Outcome", "Right", "label_trace"]

Right = Callable[[Trace], bool]  # whether a trace's prediction equals its gold answer
Complaint = tuple[str | None, str]  # what the teacher wrote, what is wrong with it


@dataclass(frozen=True)
class Outcome:
    """What became of a question. `history` names what failed: purpose, checks, reasons, and the reply.

    `failed` is no verdict: the servers gave no reply, and the next run asks again.
    """

    status: Literal["accepted", "rejected", "failed"]
    trace: Trace | None = None
    history: tuple[dict[str, Any], ...] = ()


Labelling = Generator[Request, Reply, Outcome]


@dataclass
class _Conversation:
    """What was said of earlier replies, purpose by purpose."""

    purposes: tuple[str, ...]
    complaints: dict[str, list[Complaint]] = field(default_factory=dict)
    replies: dict[str, str | None] = field(default_factory=dict)

    def ask(self, request: Request) -> Request:
        """The request with its earlier replies and what was wrong with them."""
        said, complaints = list[dict[str, str]](), self.complaints.get(request.purpose, ())
        for content, reason in complaints:
            said += [{"role": "assistant", "content": content}] if content else []
            said.append({"role": "user", "content": f"This cannot be used: {reason}. Write the whole reply again."})
        return replace(request, messages=(*request.messages, *said), turn=len(complaints))

    def complain(self, purpose: str, content: str | None, reason: str) -> None:
        """A later purpose starts afresh: what was said of it belongs to an earlier reply of this one."""
        self.complaints.setdefault(purpose, []).append((content, reason))
        for later in self.purposes[self.purposes.index(purpose) + 1 :]:
            self.complaints.pop(later, None)


def label_trace(trace: Trace, recipe: LabelRecipe, prompts: Prompts, right: Right) -> Labelling:
    """Yield requests, take replies, return the outcome. A failure is told to the teacher, `attempts` times at most."""
    protocol = PROTOCOLS[recipe.protocol]
    conversation, history = _Conversation(protocol.purposes), list[dict[str, Any]]()
    while len(history) < recipe.attempts:
        purpose = protocol.purposes[0]
        try:
            talk = protocol.talk(trace, prompts)
            request = next(talk)
            while True:
                purpose = request.purpose
                reply = yield conversation.ask(request)
                conversation.replies[purpose] = reply.content
                request = talk.send(content_of(reply, request))
        except StopIteration as done:
            draft: Draft = done.value
            found = problems_of(draft, recipe.checks) + _answer(draft, recipe, right)
            if not found:
                meta: dict[str, Any] = {"protocol": recipe.protocol, "teacher": recipe.teacher.model}
                meta |= {"prompts": prompts.version, "sample": recipe.sample}
                meta |= {"failures": len(history), "left_out": draft.left_out}
                return Outcome("accepted", draft.trace(label=meta), tuple(history))
            purpose = protocol.to_blame(found[0][0])
            reasons = "; ".join(reason for _, reason in found)
            _enter(history, conversation, purpose, [name for name, _ in found], reasons)
        except Failed as failure:
            _enter(history, conversation, purpose, [failure.name], failure.reason)
            if failure.name == "no_lines":  # nothing that a teacher could mend
                break
    return Outcome("rejected", None, tuple(history))


def _answer(draft: Draft, recipe: LabelRecipe, right: Right) -> list[tuple[str, str]]:
    if "answer" in recipe.checks.skip or right(replace(draft.trace(), prediction=draft.answer)):
        return []
    hint = "" if recipe.protocol == "self" else f", the right one is {draft.question.answer!r}"
    return [("answer", f"the answer is {draft.answer!r}{hint}")]


def _enter(
    history: list[dict[str, Any]], conversation: _Conversation, purpose: str, checks: list[str], reasons: str
) -> None:
    content = conversation.replies.get(purpose)
    history.append({"purpose": purpose, "checks": checks, "reasons": reasons, "reply": content})
    conversation.complain(purpose, content, reasons)
