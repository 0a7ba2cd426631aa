"""What goes on beside the steps: a word on a warm-up that never ends, stopping cleanly, and the bar."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from memreason.core.errors import ProcessError

__all__ = ["Bar", "StopCleanly", "Warmup"]

log = logging.getLogger("memreason")


class Warmup(TrainerCallback):  # type: ignore[misc]
    """Says when the epochs end before the warm-up does. A `max_steps` is given on purpose."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        warmup, steps = args.get_warmup_steps(state.max_steps), state.max_steps
        if args.max_steps <= 0 and warmup >= steps and state.is_world_process_zero:
            rate = f"the learning rate never reaches {args.learning_rate:g}"
            log.warning("train.warmup_steps is %d, but there are %d steps: %s", warmup, steps, rate)


class StopCleanly(TrainerCallback):  # type: ignore[misc]
    """The first Ctrl-C (or SIGTERM) ends after this step with a checkpoint; the second at once."""

    stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():  # only the main thread can be told of signals
            signals = ()
        previous = {number: signal.signal(number, self._note) for number in signals}
        try:
            yield
        except ProcessError:  # the launcher ends this process as well, which must be able to say why first
            previous.pop(signal.SIGTERM, None)
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        if PartialState().is_main_process:
            print("\nStopping after this step; press Ctrl-C again to stop at once.", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if PartialState().num_processes > 1:  # all stop at the same step, or the others wait for ever
            self.stopped = any(gather_object([self.stopped]))
        if self.stopped:
            # An epoch that is complete is saved and evaluated at its end.
            control.should_save = control.should_save or not float(state.epoch).is_integer()
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopped:
            control.should_save = True
            control.should_evaluate = control.should_evaluate and float(state.epoch).is_integer()


class Bar(ProgressCallback):  # type: ignore[misc]
    """Steps, rate and time left, with the loss behind them instead of a line for each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and logs:
            shown = {name: logs[name] for name in ("loss", "eval_acc") if name in logs}
            self.training_bar.set_postfix({name: f"{float(value):.3f}" for name, value in shown.items()})
