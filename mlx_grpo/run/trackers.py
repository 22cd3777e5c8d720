"""Trackers: TensorBoard, Weights & Biases, Trackio and SwanLab.

Each takes scalars(values, update), completions(columns, rows, update) and close(failed). Their files go under
the run's directory, and each goes on with the run it had after a resume, by the id in the run's file
tracker_id.
"""

import importlib.util
import json
import math
import os
import sys
import time
import uuid
from pathlib import Path

import numpy as np

from mlx_grpo.errors import RunError, UserError
from mlx_grpo.run.text import escaped, question_text, shortened


def numbers(record: dict) -> dict[str, float]:
    """The numeric fields of a log record; an interval as NAME/low and NAME/high."""
    flat = {}
    for name, value in record.items():
        pairs = (
            zip((f"{name}/low", f"{name}/high"), value)
            if isinstance(value, (list, tuple))
            else [(name, value)]
        )
        flat |= {n: float(v) for n, v in pairs if isinstance(v, (int, float)) and math.isfinite(v)}
    flat.pop("update", None)  # the x axis
    return flat


class TensorBoard:
    """Event files in RUN/tensorboard: `tensorboard --logdir outputs` shows all runs.

    A resumed run writes another file there, and TensorBoard drops what the stopped run had beyond the
    checkpoint.
    """

    def __init__(self, run_dir: Path, config: dict, run_id: str, update: int, resumed: bool):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.Event, self.scalar, self.text = event_pb2.Event, scalar_pb, text_pb
        self.writer = EventFileWriter(str(run_dir / "tensorboard"))
        # The second START that a reader meets, and each later one, drops the points from its step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.writer.add_event(event_pb2.Event(wall_time=time.time(), step=update + 1, session_log=start))
        self.add(self.text("config", self.code(json.dumps(config, indent=2))), update)

    @staticmethod
    def code(text: str) -> str:
        """Text as a Markdown code block: TensorBoard would drop <answer> as unknown HTML otherwise."""
        return "\n".join("    " + line for line in text.splitlines())

    def add(self, summary, update: int) -> None:
        self.writer.add_event(self.Event(wall_time=time.time(), step=update, summary=summary))
        self.writer.flush()

    def scalars(self, values, update):
        summary = None
        for name, value in values.items():
            one = self.scalar(name, value)
            summary = one if summary is None else (summary.MergeFrom(one), summary)[1]
        self.add(summary, update)

    def completions(self, columns, rows, update):
        cells = [columns, *([self.code(str(cell)) for cell in row] for row in rows)]
        self.add(self.text("completions", np.array(cells, dtype=object)), update)

    def close(self, failed):
        self.writer.close()


class Wandb:
    """Weights & Biases, in RUN/wandb and on its server.

    WANDB_MODE=offline stays on this machine, for `wandb sync` later. A resumed run keeps its id, so that the
    server (or the sync) joins the parts. `update` is an x axis of its own: W&B's step may not go back, as a
    resume from an earlier checkpoint does.
    """

    def __init__(self, run_dir: Path, config: dict, run_id: str, update: int, resumed: bool):
        import wandb

        self.Table = wandb.Table
        # Its own capture of the terminal would record every frame of the live display.
        settings = wandb.Settings(console="off", quiet=True)
        project = os.environ.get("WANDB_PROJECT", "mlx-grpo")
        self.run = wandb.init(
            project=project,
            name=run_dir.name,
            id=run_id,
            resume="allow",
            dir=run_dir,
            config=config,
            settings=settings,
        )
        self.run.define_metric("update")
        self.run.define_metric("*", step_metric="update")

    def scalars(self, values, update):
        self.run.log({**values, "update": update})

    def completions(self, columns, rows, update):
        table = self.Table(columns=columns, data=rows, allow_mixed_types=True)  # a reward may be none
        self.run.log({"completions": table, "update": update})

    def close(self, failed):
        self.run.finish(exit_code=int(failed))


class Trackio:
    """Trackio, a database in RUN/trackio: `TRACKIO_DIR=RUN/trackio trackio show`. A TRACKIO_DIR or
    TRACKIO_SPACE_ID of the user's wins. A resumed run goes on under its name."""

    def __init__(self, run_dir: Path, config: dict, run_id: str, update: int, resumed: bool):
        os.environ.setdefault("TRACKIO_DIR", str(run_dir / "trackio"))  # read when it is imported
        import trackio

        self.Table, self.finish = trackio.Table, trackio.finish
        project = os.environ.get("TRACKIO_PROJECT", "mlx-grpo")
        self.run = trackio.init(
            project=project,
            name=f"{run_dir.name}-{run_id}",
            config=config,
            resume="allow" if resumed else "never",
        )

    def scalars(self, values, update):
        self.run.log(dict(values), step=update)

    def completions(self, columns, rows, update):
        self.run.log({"completions": self.Table(columns=columns, data=rows)}, step=update)

    def close(self, failed):
        self.finish()


class SwanLab:
    """SwanLab, in RUN/swanlog and on its server; SWANLAB_MODE=offline or local stays on this machine.

    A resumed run keeps its id, by which the server joins the parts; offline each part is a run of its own.
    """

    def __init__(self, run_dir: Path, config: dict, run_id: str, update: int, resumed: bool):
        import swanlab

        self.swanlab = swanlab
        settings = swanlab.Settings(terminal=swanlab.Settings.Terminal(proxy_type="none"))  # as with W&B
        # SwanLab up to 0.7 reads SWANLAB_PROJ_NAME.
        named = [os.environ.get(name) for name in ("SWANLAB_PROJECT_NAME", "SWANLAB_PROJ_NAME")]
        self.run = swanlab.init(
            project=next(filter(None, named), "mlx-grpo"), name=run_dir.name, id=run_id, resume="allow",
            log_dir=str(run_dir / "swanlog"), config=config, settings=settings,
        )  # fmt: skip

    def scalars(self, values, update):
        self.run.log(values, step=update)

    def completions(self, columns, rows, update):
        cells = [["" if cell is None else cell for cell in row] for row in rows]
        self.run.log({"completions": self.swanlab.echarts.Table().add(columns, cells)}, step=update)

    def close(self, failed):
        self.run.finish(*(("crashed", "the run failed") if failed else ("success",)))


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "swanlab": SwanLab}


def check_trackers(names: list[str]) -> None:
    """Raise UserError for trackers whose package is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        # Without an origin it is a folder such as wandb/, which its runs leave behind.
        if spec is None or spec.origin is None:
            raise UserError(
                f"report_to: {name} is not installed; install it with uv sync --extra trackers, or uv pip "
                f"install {name}"
            )


class Trackers:
    """The trackers of a run, [(name, tracker)].

    One that fails is named once and let go: training does not depend on it.

    with trackers:  closes them at the end, as failed after an exception
    """

    def __init__(self, members: list[tuple] = ()):
        self.members = list(members)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close(failed=kind is not None)

    def scalars(self, values: dict[str, float], update: int) -> None:
        self.each("scalars", values, update)

    def completions(self, records: list[dict]) -> None:
        """A table of completions.jsonl's records, all of one update."""
        rewards = records[0]["rewards"]
        columns = ["update", "prompt", "answer", "completion", *rewards, "finish_reason", "length"]

        def texts(record: dict) -> list[str]:
            """Its three texts, where halves of surrogate pairs, which are no UTF-8, become question marks."""
            raw = (question_text(record["prompt"]), str(record["answer"]), record["completion"])
            return [text.encode("utf-8", "replace").decode() for text in raw]

        rows = [
            [r["update"], *texts(r), *r["rewards"].values(), r["finish_reason"], r["length"]] for r in records
        ]
        self.each("completions", columns, rows, records[0]["update"])

    def close(self, failed: bool) -> None:
        self.each("close", failed)
        self.members = []

    def each(self, method: str, *arguments) -> None:
        for name, tracker in list(self.members):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # other people's code, disks and networks
                self.members.remove((name, tracker))
                print(
                    f"Warning: {name} failed and is left out from here on: {reason(error)}", file=sys.stderr
                )


def start_trackers(names: list[str], run_dir: Path, config: dict, update: int) -> Trackers:
    """Open the named trackers for a run. update: those done before.

    Raises RunError where one does not start.
    """
    run_dir = run_dir.resolve()
    id_file = run_dir / "tracker_id"
    resumed = id_file.is_file()
    if names and not resumed:
        id_file.write_text(uuid.uuid4().hex[:12])
    trackers = Trackers()
    for name in dict.fromkeys(names):
        try:
            trackers.members.append(
                (name, TRACKERS[name](run_dir, config, id_file.read_text(), update, resumed))
            )
        except Exception as error:  # as above; now somebody is still there to mend it
            trackers.close(failed=True)
            offline = f"set {name.upper()}_MODE=offline, " if name in ("wandb", "swanlab") else ""
            raise RunError(
                f"Cannot start tracker {name}: {reason(error)}; mend that, {offline}or leave it out of "
                "report_to"
            ) from None
    return trackers


def reason(error: Exception) -> str:
    """An error on one line."""
    return shortened(escaped(" ".join(str(error).split())).rstrip(".") or type(error).__name__, 300)
