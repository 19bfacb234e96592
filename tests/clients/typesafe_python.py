"""TypeSafe's library for Python: System One."""

import typesafe_sdk as typesafe
from report import RANDOM, equal, feature

client = typesafe.TypeSafeClient(api_key="none", base_url=RANDOM, model="random", compression=False)
QUESTIONS = {
    "content": typesafe.Noul(instructions="Is the customer content?"),
    "team": typesafe.Choice(instructions="Which team?", criteria={"delivery": None, "billing": "money"}),
    "upset": typesafe.Score(instructions="How upset?", criteria=["calm", "annoyed", "angry"]),
}


@feature("decisions")
def _():
    answer = client.system_one(state="The parcel was late.", questions=QUESTIONS)
    equal(0 <= answer.nouls["content"].noul <= 1, True)
    equal(answer.choices["team"].choice in ("delivery", "billing"), True)
    equal(round(sum(answer.choices["team"].probabilities.values()), 6), 1.0)
    equal(0 <= answer.scores["upset"].score <= 2, True)


@feature("error")
def _():
    try:
        client.system_one(state="a", questions=QUESTIONS, model="other")
    except typesafe.TypeSafeNotFoundError:
        return
    raise AssertionError("no error")
