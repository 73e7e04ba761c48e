"""A plugin for steer: a family of tasks, a metric for it, and a reporter."""

from steer_plugins.plugins import hookimpl

SUBJECTS = ("the sea", "a train", "the moon", "an old door", "rain", "a market")


def brevity(text: str) -> float:
    """1 for no words at all, towards -1 for many."""
    return 2 / (1 + len(text.split()) / 12) - 1


def three_lines(task, reply, run_code):
    """Success: three lines, the subject among them. Measure: how many lines there are."""
    from steer_plugins.bench.tasks import Scored

    lines = [line for line in reply.splitlines() if line.strip()]
    return Scored(float(len(lines) == 3 and task.data["noun"] in reply), {"lines": float(len(lines))})


@hookimpl
def register_metrics(register):
    register("brevity", brevity)


@hookimpl
def register_tasks(register):
    from steer_plugins.bench.tasks import Family, Task

    tasks = tuple(Task(s, f"Write a haiku about {s}.", {"noun": s.split()[-1]}) for s in SUBJECTS)
    register("haiku", Family("haiku", tasks, three_lines, "three lines about the subject", max_tokens=32))


@hookimpl
def register_reporters(register):
    def best_arms(report):
        if report.kind != "control":  # times have no best arm
            return {}
        lines = []
        for trait, part in report.summary["traits"].items():
            for family, found in part["families"].items():
                arms = {arm: values["greedy"]["score"][0] for arm, values in found["arms"].items()}
                lines.append(f"{trait},{family},{max(arms, key=arms.get)}\n")
        return {"best.csv": "".join(lines).encode()}

    register("best", best_arms)
