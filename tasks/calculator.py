"""A calculator in the loop: a response calls it, reads the result and continues. docs/tools.md explains the loop.

    <calc>76 - 65 * 95</calc>         sampled: the policy writes a call
    <result>-6099</result>            given: the calculator's text, never trained on
    </think> ...                      sampled again

`Calculator` adds the calculator to any task of questions: `class MyTask(Calculator, Gsm8kTask)`. The arithmetic task
with it is `--task calculator` (math_task.py).

A call is parsed and computed in exact fractions by the parser of expressions.py. Its length, depth and time are
bounded, and no code of a response runs. An error is a result, too: `<result>error: division by zero</result>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from data_types import Problem, Reward, Turn
from tasks.expressions import ExpressionError, evaluate_expression
from tasks.rewards import ANSWER_CLOSE, ANSWER_OPEN
from tasks.task_base import QuestionTask

CALL_OPEN, CALL_CLOSE, RESULT_OPEN, RESULT_CLOSE = "<calc>", "</calc>", "<result>", "</result>"
ERROR = "error: "
MAX_ERROR_CHARS = 60  # a long error would use up the room of the response
CALL_REQUEST = (
    f" You have a calculator for + - * / and parentheses. To use it while you think, write for example "
    f"{CALL_OPEN}12 + 7 * 3{CALL_CLOSE}. The result follows: {RESULT_OPEN}33{RESULT_CLOSE}."
)


@dataclass(kw_only=True)
class Calculator(QuestionTask):
    """Adds the calculator to a task of questions.

    Parts of the reward besides those of the task: calls (number of calls that were answered), call_errors (those whose
    result is an error), forged (1.0 if the policy wrote a `<result>` itself, else 0). Only prices reward them.
    """

    call_price: float = 0.0  # taken from the reward for each answered call
    forged_price: float = 0.0  # taken from the reward of a response with a result that the policy wrote itself

    stop_strings: ClassVar[tuple[str, ...]] = (CALL_CLOSE,)

    def problem_from(self, question: str, answer: Any) -> Problem:
        """The task's problem. The full style explains the calculator at the end of the question."""
        problem = super().problem_from(question, answer)
        if self.prompt_style == "short":
            return problem
        *earlier, last = problem.messages
        return replace(problem, messages=[*earlier, {**last, "content": last["content"] + CALL_REQUEST}])

    def respond(self, problem: Problem, text_so_far: str) -> str | None:
        """The result of the last call. None, the end of the response, for a call inside the answer tags: the answer is
        the policy's own."""
        if text_so_far.rfind(ANSWER_OPEN) > text_so_far.rfind(ANSWER_CLOSE):
            return None
        before = text_so_far.rpartition(CALL_CLOSE)[0]
        opening, closing = before.rfind(CALL_OPEN), before.rfind(CALL_CLOSE)
        if opening <= closing:  # both are -1 if the text has only this closing tag
            return result(f"{ERROR}no {CALL_OPEN} before {CALL_CLOSE}")
        return calculate(before[opening + len(CALL_OPEN) :])

    def reward_turns(self, problem: Problem, turns: Sequence[Turn]) -> Reward:
        """The reward of the whole text, minus the prices."""
        reward = super().reward_turns(problem, turns)
        given = [turn.text for turn in turns if turn.given]
        parts = {
            "calls": float(len(given)),
            "call_errors": float(sum(text.startswith(RESULT_OPEN + ERROR) for text in given)),
            "forged": float(any(RESULT_OPEN in turn.text for turn in turns if not turn.given)),
        }
        price = self.call_price * parts["calls"] + self.forged_price * parts["forged"]
        return Reward(reward.total - price, {**reward.parts, **parts})


def calculate(expression: str) -> str:
    """The observation of a call: the exact value, such as 7/2, or the reason why there is none."""
    try:
        return result(str(evaluate_expression(expression)[0]))
    except ExpressionError as error:
        return result(f"{ERROR}{error}"[:MAX_ERROR_CHARS])


def result(text: str) -> str:
    """An observation. It ends its line, so the next turn begins with a new one."""
    return f"{RESULT_OPEN}{text}{RESULT_CLOSE}\n"
