"""What a peer's own environment runs, `python drivers.py PEER`: the benchmark's work by that program.

The first line of stdin is the work, as JSON. Each further line is one turn (an update or a rollout), answered
by a line with its seconds. While it learns, the driver also asks for rewards and says what it has saved;
peers/__init__.py has the other side.
"""

import json
import math
import os
import sys
import tempfile
import threading
import time


class Session:
    """The work, the turn under way and the line to the benchmark."""

    def __init__(self):
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to the log
        self.work = json.loads(sys.stdin.readline())
        self.prompts = self.work["prompts"]
        self.completions = self.work["completions"]
        self.rows = self.prompts * self.completions
        self.turn = -1
        self.sync = self.no_sync
        threading.Thread(target=self.watch, args=[os.getppid()], daemon=True).start()

    def watch(self, parent: int) -> None:
        """End with the benchmark, however that ends."""
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    def no_sync(self) -> None:
        """Programs whose calls return when their work is done need none."""

    def read(self):
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        return json.loads(line)

    def say(self, answer: dict) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()

    def wait(self) -> None:
        """Wait for the next turn and start its clock."""
        self.read()
        self.turn += 1
        self.rollout = 0.0
        self.tokens = 0
        self.start = time.perf_counter()

    def of_turn(self, name: str, each: int = 1) -> list:
        """This turn's part of a list in the work, with `each` entries a prompt."""
        count = self.prompts * each
        return self.work[name][self.turn * count : (self.turn + 1) * count]

    def lengths(self) -> list[int]:
        """The length at which each row of this turn ends, rows of a prompt together."""
        return self.of_turn("lengths", self.completions)

    def timed(self, function):
        """`function`, with its seconds counted as rollout."""

        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.sync()
            self.rollout += time.perf_counter() - start
            return result

        return wrapper

    def report(self, peak: int) -> None:
        """Answer the turn: seconds by phase, peak memory in bytes, completion tokens."""
        step = time.perf_counter() - self.start
        self.say(
            {
                "rollout": self.rollout,
                "train": step - self.rollout,
                "step": step,
                "peak": peak,
                "tokens": self.tokens,
            }
        )


def alternate(completions, **columns) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


# --- mlx-lm, mlx-lm-lora
# ----------------------------------------------------------------------------------------


def load_mlx(session: Session):
    """MLX, the model and its tokenizer, for which nothing ends a text.

    On CPUs in float32, which MLX multiplies much faster.
    """
    if session.work["blas"]:
        import ctypes

        ctypes.CDLL(session.work["blas"], mode=ctypes.RTLD_GLOBAL)
    import mlx.core as mx
    from mlx_lm import load

    model, tokenizer = load(session.work["model"])
    if not session.work["gpu"]:
        model.set_dtype(mx.float32)
    tokenizer.eos_token_ids = set()
    return mx, model, tokenizer


def mlx_lm(session: Session) -> None:
    mx, model, tokenizer = load_mlx(session)
    from mlx_lm import batch_generate
    from mlx_lm.sample_utils import make_sampler

    generate = session.timed(batch_generate)
    while True:
        session.wait()
        prompts = [ids for ids in session.of_turn("ids") for _ in range(session.completions)]
        found = generate(
            model, tokenizer, prompts, max_tokens=session.lengths(), sampler=make_sampler(1.0),
            return_token_ids=True,
            completion_batch_size=session.rows, prefill_batch_size=session.rows,
        )  # fmt: skip
        session.tokens = sum(map(len, found.token_ids))
        session.report(mx.get_peak_memory())


def mlx_lm_lora(session: Session) -> None:
    mx, model, tokenizer = load_mlx(session)
    import mlx.optimizers as optim
    from mlx_lm_lora.trainer import grpo_trainer

    class Ending(grpo_trainer.BatchGenerator):
        """Ends each row at the length drawn for it."""

        def insert(self, prompts, max_tokens, **kwargs):
            ends = session.lengths()[session.inserted : session.inserted + len(prompts)]
            session.inserted += len(prompts)
            return super().insert(prompts, ends, **kwargs)

    def generate(*args, **kwargs):
        session.inserted = 0
        found = original(*args, **kwargs)
        session.tokens = sum(ids.size for ids in found[0])
        return found

    def batches(**kwargs):
        while True:
            session.wait()
            prompts = session.of_turn("ids")
            fixed = [
                [[1]] * len(prompts),
                session.of_turn("texts"),
                ["1"] * len(prompts),
                [None] * len(prompts),
            ]
            yield prompts, *fixed
            session.report(mx.get_peak_memory())

    original = grpo_trainer.generate_grpo
    grpo_trainer.generate_grpo = session.timed(generate)
    grpo_trainer.BatchGenerator = Ending
    args = grpo_trainer.GRPOTrainingArgs(
        batch_size=session.prompts, iters=10**9, group_size=session.completions,
        max_completion_length=session.work["tokens"],
        beta=0.0, epsilon=0.2, temperature=1.0, top_p=1.0, top_k=0, max_seq_length=32768,
        steps_per_report=10**9, steps_per_save=10**9,
        adapter_file=os.path.join(tempfile.mkdtemp(), "a.safetensors"),
    )  # fmt: skip
    grpo_trainer.train_grpo(
        model, None, tokenizer, optim.Adam(1e-6), [], None, [alternate], args,
        iterate_batches=batches, end_answer_token="",
    )  # fmt: skip


# --- TRL
# --------------------------------------------------------------------------------------------------------


def without_padding(ids: list[int], pad: int, stop_strings: list[str], decode) -> list[int]:
    """A completion as TRL cut it, without the padding that follows a stop string.

    TRL cuts after the first end id and knows of no other end. A row that a stop string ended is padded
    instead, and TRL would train on
    that. Other rows keep their last id: where the pad id is the end id, it is the end that the model wrote.
    """
    if any(stop in decode(ids) for stop in stop_strings):
        while len(ids) > 1 and ids[-1] == pad:
            ids = ids[:-1]
    return ids


class EndingAt:
    """A logits processor that ends each row at its length and nowhere else.

    start: positions before the completions; ends: the end ids, of which the first is written; limit: the
    length at which generate stops.
    """

    def __init__(self, start: int, lengths: list[int], ends: list[int], limit: int):
        self.start = start
        self.lengths = lengths
        self.ends = ends
        self.limit = limit

    def __call__(self, input_ids, scores):
        length = input_ids.shape[1] - self.start + 1  # with the id that is drawn now
        scores[:, self.ends] = -math.inf
        rows = [i for i, n in enumerate(self.lengths) if n == length < self.limit]
        if rows:
            scores[rows] = -math.inf
            scores[rows, self.ends[0]] = 0.0
        return scores


def trl(session: Session) -> None:
    """TRL's trainer as its users run it: float32 weights, on a GPU under bfloat16 autocast."""
    import resource

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    work = session.work
    cuda = torch.cuda.is_available() and work["gpu"]
    if cuda:
        session.sync = torch.cuda.synchronize
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    stop_strings = work["settings"].get("generation_kwargs", {}).get("stop_strings", [])

    class Trainer(GRPOTrainer):
        _generate_and_score_completions = session.timed(GRPOTrainer._generate_and_score_completions)

        def _tokenize_prompts(self, prompts):
            return (
                [work["ids"][int(number)] for number in prompts],
                None,
                {},
            )  # the ids that the other program has

        def _generate_single_turn(self, *args, **kwargs):
            completions, logps = super()._generate_single_turn(*args, **kwargs)
            completions = [
                without_padding(ids, self._tokenizer.pad_token_id, stop_strings, self._tokenizer.decode)
                for ids in completions
            ]
            session.tokens += sum(map(len, completions))
            return completions, logps

    class Pace(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            session.wait()

        def on_step_end(self, args, state, control, **kwargs):
            session.sync()
            session.report(
                torch.cuda.max_memory_allocated()
                if cuda
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            )
            if state.global_step in work.get("save_at", ()):
                save(state.global_step)

    def save(update: int) -> None:
        from safetensors.torch import save_file

        file = os.path.join(work["folder"], f"peer-{update}.safetensors")
        dtype = torch.bfloat16 if cuda else torch.float32
        # Parameters by name, each once: tied ones would be refused.
        save_file(
            {name: p.detach().to(dtype).cpu().contiguous() for name, p in model.named_parameters()}, file
        )
        session.say({"saved": file})

    scored = []

    def reward_function(place: int):
        """The function at this place of the benchmark's list.

        All are scored there when the first is asked.
        """

        def reward(prompts, completion_ids, **columns):
            if place == 0:
                session.say({"rows": list(map(int, prompts)), "ids": completion_ids})
                scored[:] = session.read()
            return scored[place]

        reward.__name__ = f"reward_{place}"
        return reward

    generate = model.generate

    def generate_with(**kwargs):
        if "lengths" in work:
            ending = EndingAt(
                kwargs["input_ids"].shape[1], session.lengths(), trainer.eos_token_ids, work["tokens"]
            )
            kwargs["logits_processor"] = LogitsProcessorList([ending])
        # TRL leaves out the tokenizer, without which stop strings are refused.
        return generate(tokenizer=tokenizer, **kwargs)

    model.generate = generate_with
    settings = {
        "per_device_train_batch_size": session.rows, "max_completion_length": work["tokens"],
        "num_generations": session.completions,
        "bf16": cuda, "gradient_checkpointing": False, "use_cpu": not cuda, "report_to": "none",
        "logging_steps": 10**6,
        "save_strategy": "no", "disable_tqdm": True, "shuffle_dataset": False,
    }  # fmt: skip
    trainer = Trainer(
        model, list(map(reward_function, range(work["rewards"]))) if "rewards" in work else alternate,
        GRPOConfig(tempfile.mkdtemp(), **settings | work["settings"]),
        Dataset.from_list([{"prompt": str(number)} for number in range(len(work["ids"]))]),
        processing_class=tokenizer, callbacks=[Pace()],
    )  # fmt: skip
    trainer.train()


DRIVERS = {"mlx-lm": mlx_lm, "mlx-lm-lora": mlx_lm_lora, "trl": trl}

if __name__ == "__main__":
    DRIVERS[sys.argv[1]](Session())
