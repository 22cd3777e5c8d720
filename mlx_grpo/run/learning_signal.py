"""Whether a run has anything to learn from, and what to do where it has not.

A group whose completions all score alike has no advantages, and an update of such groups changes no weight.
The run looks before its first update, watches while it trains, and says so at the end, in the words "No
signal: ..." and "Nothing was learnt: ...".
"""

import numpy as np

from mlx_grpo.answers import read_quantity
from mlx_grpo.run.records import nan_mean
from mlx_grpo.run.text import shortened

CHECKED_PROMPTS = 4  # before the first update
FIRST_FLAT = 5  # updates without signal in a row before it is said
SAID_EVERY = 50  # updates from then until it may be said again
IN_TAGS = {  # built-in rewards that want the answer tags
    "correctness_reward_func", "int_reward_func", "strict_format_reward_func", "soft_format_reward_func",
    "xmlcount_reward_func",
}  # fmt: skip
WANT_NUMBERS = {"correctness_reward_func", "last_number_reward_func"}  # they compare with the gold answer
MOST_PAID = {"correctness_reward_func": 2.0, "last_number_reward_func": 1.0, "math_verify_reward_func": 2.0}


def check_record(groups: list, rewards: np.ndarray, advantages: np.ndarray, names: list[str]) -> dict:
    """What the log says of the completions sampled before the first update. rewards, advantages: (B, G)."""
    each = np.array([completion.rewards for group in groups for completion in group.completions]).T  # (F, N)
    known = [values[~np.isnan(values)] for values in each]
    return {
        "event": "check", "update": 0, "prompts": len(groups), "completions": rewards.size,
        "signal_fraction": float(np.mean(advantages.any(axis=1))), "reward_mean": nan_mean(rewards),
        **{
            f"rewards/{name}": {
                "least": float(values.min()), "mean": float(values.mean()), "greatest": float(values.max()),
                "abstained": int(rewards.size - values.size),
            } if values.size else None
            for name, values in zip(names, known)
        },
    }  # fmt: skip


def check_lines(record: dict, groups: list, rewards: np.ndarray, names: list[str]) -> list[str]:
    """The same for the terminal: each function's least, mean and greatest value, and three completions."""
    telling = round(record["signal_fraction"] * record["prompts"])
    size = record["completions"] // record["prompts"]
    lines = [
        f"check      {record['prompts']} prompts x {size} completions before the first update: in {telling} "
        f"of {record['prompts']} groups ({record['signal_fraction']:.0%}) the rewards tell completions apart"
    ]
    for name in names:
        values = record[f"rewards/{name}"]
        words = "no opinion on any completion"
        if values:
            words = ", ".join(f"{what} {values[what]:.3g}" for what in ("least", "mean", "greatest"))
            words += f", no opinion on {values['abstained']}" if values["abstained"] else ""
        lines.append(f"check      {name}: {words}")
    completions = [completion for group in groups for completion in group.completions]
    totals = rewards.ravel()
    order = np.argsort(np.nan_to_num(totals, nan=-np.inf), kind="stable")
    for label, n in (("best", order[-1]), ("middle", order[len(order) // 2]), ("worst", order[0])):
        scores = ", ".join(f"{name} {score:.3g}" for name, score in zip(names, completions[n].rewards))
        lines.append(f"check      {label} {totals[n]:.3f} ({scores}): {shortened(completions[n].text, 300)}")
    return lines


def no_signal(groups: list, rewards: np.ndarray, names: list[str], golds: list[str], max_tokens: int) -> str:
    """`No signal: ...` of groups without any: what was seen, and what to do, likeliest first.

    rewards: (B, G), NaN where every function abstained; golds: the gold answers of the training rows.
    """
    steps = likely_cures(groups, rewards, names, golds, max_tokens)
    numbered = "; ".join(f"({i}) {step}" for i, step in enumerate(steps, 1))
    seen = f"in none of {len(groups)} groups do the rewards tell completions apart ({scores_seen(rewards)})"
    return f"No signal: {seen}. What to try, most likely first: {numbered}. More: docs/TROUBLESHOOTING.md"


def scores_seen(rewards: np.ndarray) -> str:
    known = rewards[~np.isnan(rewards)]
    if not known.size:
        return "every reward function abstained on every completion"
    if known.min() == known.max():
        return f"every completion scored {known[0]:.3g}"
    return f"each group's scored alike, between {known.min():.3g} and {known.max():.3g}"


def likely_cures(
    groups: list, rewards: np.ndarray, names: list[str], golds: list[str], max_tokens: int
) -> list[str]:
    """What to do where no group has a signal, in the order of likelihood."""
    completions = [completion for group in groups for completion in group.completions]
    known = rewards[~np.isnan(rewards)]
    if not known.size:
        return [
            "look at what makes the reward functions return None: a server that does not answer, an empty "
            "column"
        ]
    if all_right(completions, names):
        return ["every answer is right already: take harder prompts"]
    cures = []
    no_numbers = [gold for gold in golds if read_quantity(str(gold)) is None]
    if WANT_NUMBERS & set(names) and 2 * len(no_numbers) >= len(golds):
        cures.append(
            f"the gold answers do not parse as numbers ({len(no_numbers)} of {len(golds)}; one is "
            f"{shortened(str(no_numbers[0]), 60)!r}): set answer_field to the column with the number, or end "
            "the field in '#### NUMBER'"
        )
    cut = sum(completion.finish_reason == "length" for completion in completions)
    if 2 * cut >= len(completions):
        cures.append(
            f"{cut} of {len(completions)} completions were cut at {max_tokens} tokens: raise "
            "max_completion_length"
        )
    if len({completion.text for group in groups for completion in group.completions}) <= len(groups):
        cures.append("the completions of a prompt are all the same text: raise temperature")
    if known.min() == known.max() and known[0] > 0:
        cures.append(f"if {known[0]:.3g} is all there is to earn, take harder prompts")
    if not any("</answer>" in completion.text.partition("<answer>")[2] for completion in completions):
        wants_tags = bool(IN_TAGS & set(names))
        seen = (
            "no completion has an <answer>"
            if wants_tags
            else "the form that the reward asks for may never be met"
        )
        cures.append(
            f"{seen}: ask for a shorter form in system_prompt, begin it by completion_prefix, or show an "
            "example in the prompt"
        )
    other = ""
    if WANT_NUMBERS & set(names) and "last_number_reward_func" not in names:
        other = ", such as last_number_reward_func"
    cures.append(f"partial credit: a reward with values in between, or one for a part of the task{other}")
    cures.append("an easier slice of the data")
    cures.append("a stronger model")
    return cures


def all_right(completions: list, names: list[str]) -> bool:
    """Whether a built-in reward for the right answer has paid in full for every completion."""
    paid = [i for i, name in enumerate(names) if name in MOST_PAID]
    right = [completion.rewards[i] == MOST_PAID[names[i]] for completion in completions for i in paid]
    return bool(paid) and all(right)


def should_say(state, max_flat_updates: int) -> bool:
    """Whether `No signal: ...` is due: after 5 updates in a row without signal, and at most every 50."""
    enough = min(FIRST_FLAT, max_flat_updates or FIRST_FLAT)
    lately = state.said_no_signal and state.update - state.said_no_signal < SAID_EVERY
    return state.flat_updates >= enough and not lately


def why_stop(state, new_updates: int, config) -> str:
    """Why the run cannot go on after `new_updates` more updates; "" where it can."""
    if state.nan_updates >= config.max_nan_updates:
        return (
            f"NaN gradient encountered: {state.nan_updates} updates in a row; lower learning_rate, raise "
            "clipping (max_grad_norm), or load the model in float32"
        )
    before = max(0, state.flat_updates - new_updates)
    most = config.max_flat_updates
    if most and before // most < state.flat_updates // most:  # a run that is resumed has as many again
        return (
            f"No signal: {state.flat_updates} updates in a row changed nothing (max_flat_updates = {most}; 0 "
            "goes on). The lines above say what to try"
        )
    return ""


def nothing_learnt(state) -> str:
    """`Nothing was learnt: ...` of a run in which no update changed a weight; "" otherwise."""
    if state.changed_updates or not state.update:
        return ""
    reasons = [f"{count} {reason}" for reason, count in state.skipped.items()]
    if others := state.update - sum(state.skipped.values()):
        reasons.append(f"{others} at learning rate 0")
    return (
        f"Nothing was learnt: none of {state.update} updates changed a weight ({', '.join(reasons)}); the "
        "model is as it was. What to try: docs/TROUBLESHOOTING.md, The reward stays at zero"
    )


class SignalWatch:
    """Says to the user and to the log whether a run has anything to learn from.

    rows: the training data; say(text); logs: RunLogs. The counts are the RunState's: a resumed run says no
    more and no less. Its methods take the names of the reward functions, groups, and rewards and advantages
    (B, G).
    """

    def __init__(self, config, rows: list[dict], say, logs):
        self.config, self.say, self.logs = config, say, logs
        self.golds = [row["answer"] for row in rows]

    def no_signal(self, names: list[str], groups: list, rewards: np.ndarray) -> str:
        return no_signal(groups, rewards, names, self.golds, self.config.rollout_tokens)

    def check(self, names: list[str], groups: list, rewards: np.ndarray, advantages: np.ndarray) -> dict:
        """Before the first update: say what a few groups earn. Returns the record of no signal, else {}."""
        record = check_record(groups, rewards, advantages, names)
        lines = check_lines(record, groups, rewards, names)
        if not advantages.any():
            record["message"] = self.no_signal(names, groups, rewards)
            lines.append(record["message"])
        for line in lines:
            self.say(line)
        return record if "message" in record else {}

    def after_updates(self, state, names: list[str], groups: list, rewards: np.ndarray) -> None:
        """After the updates on these groups, where the run has long had no signal."""
        if should_say(state, self.config.max_flat_updates):
            state.said_no_signal = state.update
            message = self.no_signal(names, groups, rewards)
            self.say(message)
            self.logs.add("training_log", {"event": "no_signal", "update": state.update, "message": message})

    def end(self, state) -> None:
        """Where nothing was learnt, the log's last word on the run; the terminal has it by print_outcome."""
        if message := nothing_learnt(state):
            counts = {"changed": state.changed_updates, "skipped": state.skipped}
            record = {"event": "end", "update": state.update, **counts, "message": message}
            self.logs.add("training_log", record)
