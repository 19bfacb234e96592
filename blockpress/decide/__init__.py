"""Typed decisions: questions about a text, answered by probabilities that are read off a canvas.

    questions  typed questions: yes or no, one of several options, a level of a scale
    form       what the model is shown, and the canvas that it is read from: everything pinned but the answers' slots
    answers    from the log-probabilities of the options to probabilities, confidence and label mass
    wire       the bodies of OpenAI's /v1/decisions and of TypeSafe's /v1/systemone

Invariant: nothing here knows the network; `lm/decide.py` runs it.
Run it:  python -m pytest tests/decide
"""

from blockpress.decide.answers import ChoiceAnswer, Decision, DecisionUsage, ScoreAnswer, YesNoAnswer
from blockpress.decide.questions import Choice, Score, YesNo

__all__ = ["Choice", "ChoiceAnswer", "Decision", "DecisionUsage", "Score", "ScoreAnswer", "YesNo", "YesNoAnswer"]
