#!/usr/bin/env python3
"""Did it work, compared with what, and how sure are we? The rows of the paper's Tables 1 and 4-6, for runs of soar.py.

    python eval.py runs/tiny-0 runs/tiny-0-learnability     the main rows of two runs with the same hard set
    python eval.py runs/math-0 runs/math-1 --seeds 2        two teacher seeds, two students each
    python eval.py runs/tiny-* --methods all --plot         every row, and the curves as a PNG
    python eval.py runs/math_test-0 --dataset olympiad      transfer: SOAR never saw this data set
    python eval.py --benchmark                              speed, see section 7

A method is a way to get a student: train a fresh copy of the base model on something, or take what SOAR has left in a run
folder. Every student is measured by pass@k on the held-out half of the fail@128 problems. A run folder is a teacher seed;
which rows it can fill depends on how it was made (--reward learnability, --no-promotion, or neither of them).

Contents: 1 Settings, 2 Measures, 3 Run folders, 4 Students, 5 Tables, 6 Curves, 7 Benchmark, 8 Main.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import random
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

import soar
from soar import KS, RIGHT, Config, Meter, Policy, Problem, UserError, option


# ======== 1. Settings: which rows, how many students, how long? =======================================================

# name: (what it is, the kind of run that it needs; "any": of runs with the same hard set only the first is asked)
METHODS = {
    "base": ("the base model", "any"),
    "hard-only": ("a fresh student on the hard train set", "any"),
    "hard-only-4x": ("the same with groups four times as large", "any"),
    "hard-only-equal": (
        "the same with as many completions as all students of the run together",
        "grounded",
    ),
    "ps": ("the promoted student as it is", "grounded"),
    "pq": ("a fresh student on the promotion questions and the hard train set", "grounded"),
    "pq-well-posed": ("PQ with the well-posed promotion questions only (tiny world)", "grounded"),
    "pq-correct": (
        "PQ with the promotion questions that have a right answer only (tiny world)",
        "grounded",
    ),
    "grounded-t": (
        "a fresh student on questions of the trained teacher and the hard train set",
        "grounded",
    ),
    "no-promotion": ("the same with the teacher of a --no-promotion run", "no-promotion"),
    "intrinsic-t": ("the same with the teacher of a --reward learnability run", "learnability"),
    "base-t": ("the same with the untrained teacher", "any"),
    "upper": (
        "the same with curated problems: --curated, or right answers to easy sheets in the tiny world",
        "any",
    ),
    "solver": ("the trained teacher as a solver", "grounded"),
}
MAIN = {  # what is measured unless --methods says otherwise, as far as the runs have it
    "tiny": "base,hard-only-equal,ps,pq,grounded-t,base-t,intrinsic-t",
    "real": "base,hard-only,ps,pq",
}
ONCE = (
    "base",
    "ps",
    "solver",
    "hard-only-equal",
)  # --seeds does not count: nothing is trained, or it takes too long
# Percent, pass@1, 4, 8, 16, 32 (paper, Tables 1 and 4-6); printed in brackets beside ours.
PAPER = {
    "math": {
        "base": "0.3 1.0 2.0 3.9 7.5",
        "hard-only": "0.5 1.7 3.2 5.7 9.6",
        "hard-only-4x": "1.4 3.9 6.1 8.9 12.4",
        "pq": "1.7 5.3 8.5 13.0 18.9",
        "ps": "1.0 3.8 6.8 11.5 18.1",
        "grounded-t": "1.6 5.1 8.4 13.1 19.1",
        "intrinsic-t": "1.0 3.3 5.7 9.2 14.1",
        "solver": "0.3 1.1 2.2 4.4 8.3",
        "upper": "2.7 7.6 11.5 16.4 22.0",
    },
    "harp": {
        "base": "0.2 0.9 1.7 3.4 6.4",
        "hard-only": "0.4 1.4 2.6 4.7 8.2",
        "pq": "0.7 2.5 4.5 7.7 12.3",
        "ps": "0.6 2.1 3.9 7.0 11.8",
        "grounded-t": "0.5 2.0 3.8 6.7 11.2",
        "intrinsic-t": "0.4 1.6 3.1 5.6 9.6",
        "upper": "1.7 5.1 8.1 11.7 16.2",
    },
    "olympiad": {
        "base": "0.2 0.8 1.6 3.1 5.8",
        "hard-only": "0.3 1.1 2.1 3.9 6.9",
        "pq": "0.5 1.9 3.6 6.4 10.6",
        "ps": "0.6 2.1 3.7 6.2 9.9",
        "upper": "0.9 3.2 5.6 8.8 13.1",
    },
}  # PQ and PS: of a MATH run


@dataclass
class Settings:
    # --- What to measure
    methods: str = option(
        "", "comma-separated, or all; empty: the main ones, as far as the runs have them"
    )
    dataset: str = option(
        "", "the hard set that fresh students train and all are tested on; empty: the run's own"
    )
    seeds: int = option(
        0, "students of each method in each run folder; 0: 5 in the tiny world, else 1"
    )
    seed: int = option(0, "the first of them")
    samples: int = option(32, "completions a problem behind pass@k (paper: 32)")
    points: int = option(0, "measurements during a fresh student's training; 0: at most 20")
    # --- Fresh students
    steps: int = option(0, "RLOO steps (paper: 1500); 0: no longer than the run; tiny: 20")
    warmup: int = option(20, "steps of linear warm-up, except in a curriculum (Table 3)")
    mix: str = option(
        "auto",
        "curriculum: synthetic, then hard; mixed: both throughout; auto: mixed on harp and olympiad (paper)",
    )
    synthetic_steps: int = option(
        0, "of a curriculum; 0: 64 (paper, MATH), but with the tiny world's 20 steps all"
    )
    questions: int = option(128, "drawn from a teacher (paper)")
    curated: str = option("", "FILE.jsonl of problems for --methods upper")
    # --- Diversity and output
    embedder: str = option(
        "",
        "hub id or folder of the model whose hidden states compare questions; empty: the base model",
    )
    out: str = option("", "folder for eval.json, eval.md and eval.png; empty: the first run folder")
    plot: bool = option(False, "write the curves (needs matplotlib)")
    # --- This machine (empty or 0: as the run was made)
    device: str = option("", "cuda, cpu, ...")
    processes: int = option(
        0, "share the students among so many; 0: on CPUs as many as there are cores, on GPUs one"
    )
    threads: int = option(0, "torch's CPU threads in each process")
    sample_tokens: int = option(0, "tokens of prompts and completions sampled side by side")
    micro_tokens: int = option(0, "padded tokens in one backward pass")


def parse_settings(argv: list[str]) -> tuple[list[str], list[str], Settings]:
    """Command line -> (run folders, methods, Settings). Raises UserError."""
    rows = "\n".join(f"  {name:16}{what}" for name, (what, _) in METHODS.items())
    parser = argparse.ArgumentParser(
        usage="python eval.py RUN [RUN ...] [flags], or python eval.py --benchmark [flags]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{__doc__.splitlines()[0]}\nMethods:\n{rows}",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that soar.py has written")
    flags = soar.parse_flags(
        parser,
        Settings,
        {
            "methods": "What to measure",
            "steps": "Fresh students",
            "embedder": "Diversity and output",
            "device": "This machine (empty or 0: as the run was made)",
        },
        argv,
    )
    runs, s = flags.pop("runs"), Settings(**flags)
    methods = [name.strip() for name in s.methods.split(",") if name.strip()]
    if s.methods == "all":
        methods = list(METHODS)
    unknown = ",".join(name for name in methods if name not in METHODS)
    for bad, sentence in (
        (s.questions < 1, "--questions must be at least 1"),
        (
            min(s.seeds, s.steps, s.points, s.warmup, s.synthetic_steps) < 0,
            "--seeds, --steps, --points, --warmup and --synthetic-steps must be at least 0",
        ),
        (
            s.samples < max(KS),
            f"pass@{max(KS)} needs at least {max(KS)} samples a problem; --samples is {s.samples}",
        ),
        (
            min(s.processes, s.threads, s.sample_tokens, s.micro_tokens) < 0,
            "--processes, --threads, --sample-tokens and --micro-tokens must be at least 0",
        ),
        (s.threads > 4 * os.cpu_count(), "--threads is more than four for each core"),
        (
            s.mix not in ("auto", "curriculum", "mixed"),
            "--mix must be one of auto, curriculum, mixed",
        ),
        (unknown, f"--methods {unknown} does not exist; choose from {', '.join(METHODS)}, or all"),
        (
            s.plot and not importlib.util.find_spec("matplotlib"),
            "--plot needs matplotlib: pip install matplotlib",
        ),
    ):
        if bad:
            raise UserError(sentence)
    return runs, methods, s


# ======== 2. Measures: what is one number, and how far may it be off? =================================================
# A student is {"points": its measurements, "reward": [S] mean reward of each training step, "rollouts": completions that it
# was trained on}; a measurement is {"step", "right": [problems], how many of --samples answers to each test problem are}.


def chosen_step(rewards: list[float], window: int = 25, flat: float = 0.15) -> int:
    """The paper's checkpoint choice: where the training reward stops rising. [S] mean rewards -> a step in 0..S.

    Smooth with a centred moving average, take slopes; the first step after the steepest where the slope is under 15 % of the
    steepest. (The paper's "first step" taken literally is step 0 of a curve that starts slowly.) A flat curve: step 0.

    >>> chosen_step([float(min(step, 50)) for step in range(100)]), chosen_step([10.0] * 100)   # a rise of 50 steps; none
    (59, 0)
    """
    if len(rewards) < 2:
        return len(rewards)
    half = window // 2
    smooth = np.array(
        [np.mean(rewards[max(0, s - half) : s + half + 1]) for s in range(len(rewards))]
    )  # [S]
    slopes = np.gradient(smooth)  # [S], reward a step
    if slopes.max() <= 1e-9:
        return 0  # it never rises
    steepest = int(slopes.argmax())
    below = np.flatnonzero(slopes[steepest:] < flat * slopes.max())
    return steepest + int(below[0]) if len(below) else len(rewards)


def chosen_points(student: dict, dataset: str) -> list[dict]:
    """The measurements that count: from the paper's choice to 200 steps later (OlympiadBench: step 50); or the next one."""
    first = 50 if dataset == "olympiad" else chosen_step(student["reward"])
    last = first if dataset == "olympiad" else first + 200
    later = [point for point in student["points"] if point["step"] >= first] or student["points"][
        -1:
    ]
    return [point for point in later if point["step"] <= last] or later[:1]


def nested(values) -> dict:
    """[teacher seeds R][student seeds N] -> mean, SD over all of them, SD of the teachers' means, their number.

    >>> nested([[0.1, 0.3], [0.5, 0.7]])["mean"], round(nested([[0.1, 0.3], [0.5, 0.7]])["sd_teachers"], 4)
    (0.4, 0.2828)
    """
    flat = np.concatenate([np.asarray(row, float) for row in values])
    sd = lambda x: float(np.std(x, ddof=1)) if len(x) > 1 else None
    return {
        "mean": float(flat.mean()),
        "sd": sd(flat),
        "sd_teachers": sd([np.mean(row) for row in values]),
        "n": len(flat),
    }


def bootstrap(per_problem: list[np.ndarray], draws: int = 1000) -> list[float]:
    """95 % interval of the mean when problems are drawn anew: [R] arrays [problems], resampled within each run."""
    rng = np.random.default_rng(0)
    means = [
        values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
        for values in per_problem
    ]  # [R][draws]
    return np.percentile(np.mean(means, 0), [2.5, 97.5]).tolist()


def vendi(embeddings: np.ndarray) -> float:
    """Vendi score, the effective number of different items. [n, D]; exp(-sum l ln l), l the eigenvalues of (cosines / n).

    >>> round(vendi(np.ones((5, 3))), 6), round(vendi(np.eye(5)), 6)       # the same five times; five that share nothing
    (1.0, 5.0)
    """
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)  # [n, D]
    eigenvalues = np.linalg.eigvalsh(unit @ unit.T / len(unit))  # [n], of sum 1
    positive = eigenvalues[eigenvalues > 0]  # 0 ln 0 = 0, and rounding leaves some below
    return float(np.exp(-(positive * np.log(positive)).sum()))


def judge(problem: Problem) -> tuple[bool, bool]:
    """(well-posed, right) of a tiny-world problem, exactly: all its items have known numbers; all answers are right."""
    items = re.findall(r"= (\d)([*+])(\d)", problem.question)
    if soar.worksheet(["".join(item) for item in items]) != problem.question:
        return False, False
    values = [int(x) * int(y) if sign == "*" else int(x) + int(y) for x, sign, y in items]
    return True, soar.answers_equal(problem.answer, soar.worksheet(values))


def majority_agrees(boxes: list[str | None], answer: str) -> bool:
    """Whether the most frequent answer (None: a solution without a box, which has no vote) is the given one."""
    votes = [box for box in boxes if box is not None]
    support = [
        sum(soar.answers_equal(vote, other) for other in votes) for vote in votes
    ]  # by value, not spelling
    return bool(votes) and soar.answers_equal(votes[int(np.argmax(support))], answer)


# ======== 3. Run folders: what has SOAR left there? ===================================================================


@dataclass
class Run:
    folder: Path
    config: Config
    policy: Policy  # the base model, live
    train: list[Problem]  # the halves of the hard set
    test: list[Problem]  # no student sees this one
    log: list[dict]  # a row an outer step
    report: dict  # report.json: another one if the run was made again
    promotion_questions: list[Problem]  # D_best


def kind_of(config: Config) -> str:
    """grounded, no-promotion or learnability."""
    return (
        "learnability"
        if config.reward == "learnability"
        else "grounded"
        if config.promotion
        else "no-promotion"
    )


def read_rows(path: Path) -> list[dict]:
    """The rows of log.jsonl or questions.jsonl. Raises UserError."""
    with soar.reading(path, "put a copy back, or make the run again"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        needed = {"step", "promotion" if path.name == "log.jsonl" else "question"}
        soar.require(rows and all(needed <= row.keys() for row in rows))
    return rows


def read_report(folder: Path) -> dict:
    """report.json of a run. Raises UserError."""
    path = folder / "report.json"
    with soar.reading(path, "if another version of soar.py has made it, make the run again"):
        report = json.loads(path.read_text(encoding="utf-8"))
        soar.require(
            {"hard_set", "steps", "promotions", "promotion_questions", "weights"} <= report.keys()
        )
    return report


def read_config(folder: Path, settings: Settings) -> Config:
    """The run's flags, with this machine's in their place. Raises UserError where there is no finished run."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no run folder of soar.py (it has no config.json)")
    if not (folder / "report.json").is_file():
        raise UserError(
            f"the run in {folder} is not finished: continue it with soar.py --resume and its flags"
        )
    names = ("device", "threads", "sample_tokens", "micro_tokens")
    machine = {name: getattr(settings, name) for name in names if getattr(settings, name)}
    return replace(soar.saved_config(folder), **machine, processes=settings.processes)


def student_rollouts(run: Run) -> int:
    """Completions that all students of the run sampled: training, and greedy measurements on the reward questions."""
    total, promotions, questions = 0, 0, min(run.config.reward_questions, len(run.train))
    for row in run.log:
        total += soar.student_completions(run.config, promotions, questions)
        promotions += bool(row["promotion"])
    return total


def not_among(problems: list[Problem], others: list[Problem]) -> list[Problem]:
    """The problems that the others do not hold, in whatever dress."""
    known = {soar.same_wording(problem.question) for problem in others}
    return [problem for problem in problems if soar.same_wording(problem.question) not in known]


def open_run(folder: Path, config: Config, settings: Settings) -> Run:
    """Load the base model, filter (cached) and split the hard set. Raises UserError."""
    policy, pool = soar.prepare(config, Meter())
    left_out = ""
    if settings.dataset not in (
        "",
        config.dataset,
    ):  # transfer: without what SOAR has seen, in whatever dress
        config = replace(config, dataset=settings.dataset)
        other = soar.load_problems(config.dataset, config.cache)
        pool = not_among(other, pool)
        left_out = f"; {len(other) - len(pool)} problems of its own pool left out"  # MATH's test split and HARP share 123
        soar.check_context(policy, pool, config)
        if not pool:
            raise UserError(
                f"all problems of --dataset {settings.dataset} are known from the run in {folder}"
            )
    report = read_report(folder)
    train, test = soar.split_hard(soar.hard_problems(policy, pool, config), config)
    if not left_out and report["hard_set"] != soar.fingerprint(train, test):
        raise UserError(
            f"the hard problems are no longer those of the run in {folder}: the file of problems, the prompt or the "
            "model has changed, or --device is of another kind; what SOAR trained on might be among the tests"
        )
    promoted = folder / "promotion_questions.jsonl"
    questions = soar.read_jsonl(str(promoted)) if promoted.exists() else []
    log = read_rows(folder / "log.jsonl")
    promotions = sum(bool(row["promotion"]) for row in log)
    found = {"steps": len(log), "promotions": promotions, "promotion_questions": len(questions)}
    if any(report[name] != count for name, count in found.items()):
        raise UserError(
            f"the files in {folder} do not belong together ({found} beside report.json); put copies back, or "
            "make the run again"
        )
    run = Run(folder, config, policy, train, test, log, report, questions)
    print(
        f"{folder}: {kind_of(config)}, {len(train)} hard train and {len(test)} hard test problems{left_out}; "
        f"its students sampled {student_rollouts(run):,} completions",
        flush=True,
    )
    return run


def weights_folder(run: Run, name: str) -> str:
    """The folder of "teacher" or "student"; "" for the base model, which is also the student where none was promoted."""
    if name == "teacher" or name == "student" and any(row["promotion"] for row in run.log):
        return str(
            (run.folder / name).resolve()
        )  # a whole path, so that it is never taken for a hub id
    return ""


def saved_weights(folder: str, config: Config, key: str) -> list[torch.Tensor]:
    """What the run has saved in its folder "teacher" or "student". Raises UserError if it is something else by now."""
    weights = soar.snapshot(soar.load_model(folder, config)[0])
    if soar.weights_key(weights) != key:
        raise UserError(
            f"{folder} is not what the run has saved there; put a copy back, or make the run again"
        )
    return weights


def load_weights(run: Run, name: str) -> None:
    """The live model becomes the "teacher", the "student" or the "base" model. Raises UserError."""
    soar.restore(run.policy.model, run.policy.base)
    if folder := weights_folder(run, name):
        soar.restore(
            run.policy.model, saved_weights(folder, run.config, run.report["weights"][name])
        )


def remembered_path(run: Run, name: str, depends_on: tuple) -> Path:
    """In the run folder's eval/, under a name made of all that the result depends on."""
    return run.folder / "eval" / f"{name}-{soar.fingerprint(run.report, *depends_on)}.json"


def remembered(run: Run, name: str, depends_on: tuple, work):
    """work(), made once. Raises UserError."""
    path = remembered_path(run, name, depends_on)
    if not path.exists():
        soar.write_json(path, work())
    with soar.reading(path, "delete it, and it is made again"):
        return json.loads(path.read_text(encoding="utf-8"))


# ======== 4. Students: what does each train on, and how good does it get? =============================================


def curated_problems(run: Run, settings: Settings) -> list[Problem]:
    """The problems of --curated without those of the test set. Raises UserError."""
    given = soar.read_jsonl(settings.curated)
    kept = not_among(given, run.test)
    if len(kept) < len(given):
        print(
            f"{settings.curated}: {len(given) - len(kept)} of {len(given)} problems are test problems and are left out"
        )
    if not kept:
        raise UserError(f"{settings.curated} holds nothing but test problems")
    return kept


def synthetic_problems(run: Run, method: str, seed: int, settings: Settings) -> list[Problem]:
    """What a method's student trains on beside the hard train set: [] for most. Raises UserError."""
    if method == "pq":
        return run.promotion_questions
    if method in ("pq-well-posed", "pq-correct"):
        return [
            problem for problem in run.promotion_questions if judge(problem)[method == "pq-correct"]
        ]
    if method == "upper" and settings.curated:
        return curated_problems(run, settings)
    if method == "upper":  # all single products of the tiny world
        return [Problem(f"a= {x}*{y}", f"a= {x * y}") for x in range(4, 10) for y in range(4, 10)]
    if method not in ("grounded-t", "no-promotion", "intrinsic-t", "base-t"):
        return []

    def ask_teacher():
        load_weights(run, "base" if method == "base-t" else "teacher")
        generator = soar.seeded(run.config.seed, "eval questions", method, seed)
        return [
            vars(problem)
            for problem in soar.propose(run.policy, settings.questions, run.config, generator)[1]
        ]

    return [
        Problem(**row)
        for row in remembered(run, f"questions-{method}-{seed}", (settings.questions,), ask_teacher)
    ]


def sized(settings: Settings, run: Run) -> Settings:
    """The settings with --seeds, --steps, --synthetic-steps and --points filled in where they were left open.

    In the tiny world students get 20 steps on the problems alone. After the paper's schedule (here --steps 200) all
    that got off the plateau are near 100 %, and no teacher's problems look better than another's.

    Elsewhere the paper's 1,500 steps a student would take days on the card that made a short run in an
    afternoon. So base, Hard-Only, PS and PQ together sample no more than all students of such a run
    (without promotions, and paid by progress: the same for every kind of run, whose rows are
    compared). Measurements on the test set take about a quarter of it.
    """
    if run.config.dataset == "tiny":
        steps = settings.steps or 20
        synthetic_steps = settings.synthetic_steps or (64 if settings.steps else steps)
        return replace(
            settings,
            steps=steps,
            synthetic_steps=synthetic_steps,
            points=settings.points or 1,
            seeds=settings.seeds or 5,
        )
    settings = replace(
        settings, seeds=settings.seeds or 1, synthetic_steps=settings.synthetic_steps or 64
    )
    config = replace(run.config, reward="grounded")
    questions = min(config.reward_questions, len(run.train))
    sampled = config.steps * soar.student_completions(config, 0, questions)
    measurement = len(run.test) * settings.samples
    left = sampled // 2 - measurement  # for one fresh student; base and PS are measured once each
    points = settings.points or max(1, min(20, left // 4 // measurement - 1))  # one more at step 0
    if settings.steps:
        return replace(settings, points=points)
    steps = (left - (points + 1) * measurement) // (config.student_batch * config.student_group)
    steps = max(points, min(1500, steps))
    synthetic_steps = min(settings.synthetic_steps, steps // 2)
    return replace(settings, steps=steps, points=points, synthetic_steps=synthetic_steps)


def schedule(
    run: Run, method: str, synthetic: list[Problem], settings: Settings, key: tuple
) -> tuple[list, Config]:
    """(batches of a fresh student, its Config). Curriculum: synthetic problems, then hard ones; mixed: both, shuffled."""
    config, order = run.config, soar.seeded(*key, "order")
    mixed = (
        settings.mix == "mixed" or settings.mix == "auto" and config.dataset in ("harp", "olympiad")
    )
    curriculum = bool(synthetic) and not mixed  # it crashes on HARP and OlympiadBench (paper)
    group = config.student_group * (4 if method == "hard-only-4x" else 1)  # 4 x 32 = 128 (paper)
    steps = settings.steps
    if method == "hard-only-equal":
        steps = math.ceil(student_rollouts(run) / (config.student_batch * group))
    first = min(settings.synthetic_steps, steps) if curriculum else 0
    batches = soar.batches_of(synthetic, first, config.student_batch, order)
    batches += soar.batches_of(
        run.train if curriculum else synthetic + run.train,
        steps - first,
        config.student_batch,
        order,
    )
    return batches, replace(
        config, student_group=group, student_warmup=0 if curriculum else settings.warmup
    )


@dataclass
class Order:
    """A student that is to be made and measured; its result is kept at `path`."""

    path: Path
    weights: str  # a folder to start from, or "" for the base model
    weights_key: str  # fingerprint of what must be in it
    batches: list  # what it trains on; [] for nothing
    config: Config
    key: tuple  # names it; all its luck is a function of this
    cost: int  # completions to sample


def order(run: Run, method: str, seed: int, settings: Settings) -> Order:
    """What makes one student of a method. Raises UserError."""
    key = ("eval", run.config.seed, method.removesuffix("-equal"), seed)
    as_it_is = {"base": "base", "ps": "student", "solver": "teacher"}.get(method)
    batches, config, weights = [], run.config, ""
    if as_it_is:
        weights = weights_folder(run, as_it_is)
    else:
        synthetic = synthetic_problems(run, method, seed, settings)
        batches, config = schedule(run, method, synthetic, settings, key)
    flags = {name: value for name, value in vars(config).items() if name not in soar.RESUMABLE}
    flags |= {"samples": settings.samples, "points": settings.points}
    path = remembered_path(run, f"{method}-{seed}", (flags, run.train, run.test, batches))
    measuring = len(run.test) * settings.samples
    cost = (
        len(batches) * config.student_batch * config.student_group
        + (settings.points if batches else 1) * measuring
    )
    weights_key = run.report["weights"][as_it_is] if weights else ""
    return Order(path, weights, weights_key, batches, config, key, cost)


def make_students(run: Run, methods: list[str], settings: Settings) -> dict[str, list[dict]]:
    """{method: its students, measured (see section 2)}. What is not remembered is made now, by all processes."""
    orders = {}
    for method in methods:
        for seed in range(1 if method in ONCE else settings.seeds):
            orders[method, seed] = order(run, method, settings.seed + seed, settings)
    missing = sorted(
        (one for one in orders.values() if not one.path.exists()), key=lambda one: -one.cost
    )
    run.policy.meter.expect(sum(one.cost for one in missing), f"the students of {run.folder}")
    costs = [one.cost for one in missing]
    jobs = [(one,) for one in missing]
    results = soar.share(run.policy, make_student, (run.test, settings), jobs, costs=costs)
    for one, result in zip(missing, results):
        soar.write_json(one.path, result)
        one.path.with_suffix(".pt").unlink(missing_ok=True)
    students = {method: [] for method in methods}
    for (method, _), one in orders.items():
        with soar.reading(one.path, "delete it, and this student is made again"):
            student = json.loads(one.path.read_text(encoding="utf-8"))
            soar.require(student.keys() == {"points", "reward", "rollouts"})
            students[method].append(student)
    return students


def make_student(policy: Policy, test: list[Problem], settings: Settings, one: Order) -> dict:
    """The live model as a student, trained (if it has batches) and measured --points times on the way.

    Each measurement leaves a checkpoint, from which an interrupted student goes on.
    """
    model, path, count = policy.model, one.path.with_suffix(".pt"), 1 + len(policy.workers)
    soar.restore(model, policy.base)
    if one.weights:
        soar.restore(model, saved_weights(one.weights, one.config, one.weights_key))
    steps, completions = len(one.batches), one.config.student_batch * one.config.student_group
    moments, result = None, {"points": [], "reward": [], "rollouts": steps * completions}
    if path.exists():
        with soar.reading(path, "delete it and this student starts again"):
            weights, moments, result = torch.load(
                path, weights_only=True, map_location=model.device
            ).values()
            soar.restore(model, weights)
    stops = {math.ceil(steps * i / settings.points) for i in range(1, settings.points + 1)}

    def measure(step):
        moment = (step,) if steps else ()
        generator = soar.seeded(*one.key, *moment, "measure")
        right = soar.right_counts(
            policy, test, settings.samples, one.config, generator
        )  # [problems]
        result["points"].append({"step": step, "right": right})
        policy.meter.advance(
            count * len(test) * settings.samples
        )  # the others have done about as much

    def after_step(step, figures):
        bar.update()
        result["reward"].append(figures["reward"])
        policy.meter.advance(count * completions)
        if step + 1 in stops:
            measure(step + 1)
            state = {"weights": soar.snapshot(model), "moments": moments, "result": result}
            soar.write_atomically(path, lambda file: torch.save(state, file))

    if not result["points"]:
        measure(0)
    if not steps:
        return result
    moments = moments or soar.adamw_state(model)
    done = len(result["reward"])
    with tqdm(
        total=steps, initial=done, desc=path.stem.rsplit("-", 1)[0], disable=None, leave=False
    ) as bar:
        for step in range(done, steps):
            lr = soar.learning_rate(one.config.student_lr, step, steps, one.config.student_warmup)
            batch, key = one.batches[step], (*one.key, step)
            after_step(step, soar.student_step(policy, batch, moments, lr, one.config, key))
    return result


@torch.inference_mode()
def embed(run: Run, settings: Settings, problems: list[Problem]) -> np.ndarray:
    """Questions -> [problems, D]: mean-pooled last hidden states of the base model, or of --embedder. Raises UserError."""
    load_weights(run, "base")
    model, tokenizer = run.policy.model, run.policy.tokenizer
    if settings.embedder:
        model, tokenizer = soar.load_model(settings.embedder, run.config, trained=False)
    rows = []
    for problem in problems:  # one at a time: no padding to leave out of the mean
        ids = torch.tensor([tokenizer(problem.question).input_ids], device=model.device)  # [1, T]
        rows.append(
            model.base_model(input_ids=ids).last_hidden_state[0].float().mean(0).cpu().numpy()
        )  # [D]
    return np.stack(rows)


def about_problems(run: Run, method: str, settings: Settings) -> dict:
    """Diversity and correctness (real problems: a vote's) of a method's synthetic problems; {} where it has none."""
    problems, n = synthetic_problems(run, method, settings.seed, settings), settings.samples

    def work():
        rng, embeddings = (
            np.random.default_rng(0),
            embed(run, settings, problems),
        )  # [problems, D]; the base model is live
        draws = [
            vendi(embeddings[rng.integers(len(problems), size=len(problems))]) for _ in range(100)
        ]  # (paper)
        about = {"questions": len(problems), "vendi": float(np.mean(draws))}
        if run.config.dataset == "tiny":
            well_posed, right = np.mean([judge(problem) for problem in problems], 0).tolist()
            return (
                about | {"well-posed": well_posed, "correct": right} | soar.topic_shares(problems)
            )
        rollouts, _ = soar.solve(
            run.policy, problems, n, run.config, soar.seeded(run.config.seed, "majority")
        )
        boxes = [soar.extract_boxed(rollout.text) for rollout in rollouts]  # [problems * n]
        agree = [
            majority_agrees(boxes[i * n : (i + 1) * n], problem.answer)
            for i, problem in enumerate(problems)
        ]
        return about | {"agrees with the base model's majority vote": float(np.mean(agree))}

    return (
        remembered(run, f"about-{method}", (problems, settings.embedder, n), work)
        if problems
        else {}
    )


def diversity_curve(run: Run, settings: Settings) -> dict:
    """{outer step: Vendi score of (at most) the first 128 questions}, for some 20 of the steps."""
    rows, curve = read_rows(run.folder / "questions.jsonl"), {}
    for step in range(0, run.config.steps, math.ceil(run.config.steps / 20)):
        asked = [Problem(row["question"], "") for row in rows if row["step"] == step]
        curve[step] = vendi(embed(run, settings, asked[:128]))
    return curve


# ======== 5. Tables: how do the numbers become readable? ==============================================================


def summary(students: list[list[dict]], dataset: str, samples: int) -> dict:
    """[R][N] students of a method -> its entry in eval.json: at the paper's choice, at the last step, the curves."""

    def rates(points):  # -> [K, problems], mean over the points
        each = [
            [[soar.pass_at_k(samples, right, k) for right in point["right"]] for k in KS]
            for point in points
        ]
        return np.mean(each, 0)

    def table(choose):
        runs = [
            np.array([rates(choose(one)) for one in row]) for row in students
        ]  # [R] arrays [N, K, problems]
        return {
            f"pass@{k}": nested([run[:, i].mean(1) for run in runs])
            | {"interval": bootstrap([run[:, i].mean(0) for run in runs])}
            for i, k in enumerate(KS)
        }

    everyone, columns = sum(students, []), ["step", *(f"pass@{k}" for k in KS)]
    row = lambda point: dict(zip(columns, [point["step"], *rates([point]).mean(1).tolist()]))
    return table(lambda one: chosen_points(one, dataset)) | {
        "last": table(lambda one: one["points"][-1:]),
        "rollouts": max(one["rollouts"] for one in everyone),
        "curves": [[row(point) for point in one["points"]] for one in everyone],
    }


def methods_table(methods: dict, about: dict, dataset: str) -> dict:
    """eval.json's "methods" and "questions" -> {label: {column: cell}}: percent, mean ± SD, the paper's figure in brackets;
    then what the synthetic problems are like."""
    rows = {}
    for name, entry in methods.items():
        rows[name] = measured_cells(entry)
        for k, figure in zip(KS, PAPER.get(dataset, {}).get(name, "").split()):
            rows[name][f"pass@{k}"] += f" [{figure}]"
        for column in ("vendi", "well-posed", "correct"):
            if column in about.get(name, {}):
                rows[name][column] = question_cell(column, about[name][column])
        if entry["rollouts"] and entry["last"]["pass@1"] != entry["pass@1"]:
            rows[f"{name}, last step"] = measured_cells(entry["last"])
    return rows


def measured_cells(entry: dict) -> dict[str, str]:
    """n and pass@k of a method, in percent."""
    cells = {"n": str(entry["pass@1"]["n"])}
    for column in [f"pass@{k}" for k in KS]:
        cells[column] = f"{100 * entry[column]['mean']:.1f}"
        if entry[column]["sd"] is not None:
            cells[column] += f" ± {100 * entry[column]['sd']:.1f}"
    return cells


def question_cell(column: str, figure: dict) -> str:
    return f"{figure['mean']:.1f}" if column in ("vendi", "questions") else f"{figure['mean']:.0%}"


def markdown(corner: str, rows: dict) -> str:
    """{label: {column: cell}} -> a Markdown table whose columns are aligned, so that it can also be read on a screen."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[corner, *columns]] + [
        [label, *(row.get(column, "") for column in columns)] for label, row in rows.items()
    ]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


# ======== 6. Curves: what happens on the way? (--plot, needs matplotlib) ==============================================


def draw(axis, curves: list, color, label: str, line: str = "-") -> None:
    """Each curve (x, y) as a thin line, their mean as a thick one. Where nothing was trained: one dotted line across."""
    grid = curves[0][0]
    mean = np.mean([np.interp(grid, x, y) for x, y in curves], 0)
    if len(grid) == 1:
        axis.axhline(mean[0], linestyle=":", color=color, linewidth=2, label=label)
        return
    for x, y in curves:
        axis.plot(x, y, line, color=color, linewidth=0.6, alpha=0.5)
    axis.plot(grid, mean, line, color=color, linewidth=2, label=label)


def plot_teachers(topics, reward, diversity, kind: str, color: str, runs: list[dict]) -> None:
    """The runs of one kind. x is what their students sampled: a learnability step costs a tenth of a grounded one."""
    spent = lambda run, steps: [(step + 1) / len(run["log"]) * run["rollouts"] for step in steps]
    xs = [spent(run, range(len(run["log"]))) for run in runs]
    series = lambda figure: [(x, [figure(row) for row in run["log"]]) for x, run in zip(xs, runs)]
    draw(
        diversity,
        [(spent(run, run["diversity"]), list(run["diversity"].values())) for run in runs],
        color,
        kind,
    )
    if "topics" in runs[0]["log"][0]:
        for topic, line in zip(soar.TOPICS, ("-", ":", "--")):
            draw(
                topics,
                series(lambda row: 100 * row["topics"][topic]),
                color,
                f"{kind}: {topic}",
                line,
            )
    if kind != "learnability":  # whose reward is another quantity
        draw(reward, series(lambda row: row["reward"]), color, kind)
        for x, run in zip(xs, runs):
            up = [i for i, row in enumerate(run["log"]) if row["promotion"]]
            reward.plot([x[i] for i in up], [run["log"][i]["reward"] for i in up], "^", color=color)


def plot(path: Path, students: dict, runs: list[dict], samples: int) -> None:
    """Four panels: students during training, topics, the teacher's reward with its promotions, diversity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((curves, topics), (reward, diversity)) = pyplot.subplots(
        2, 2, figsize=(11, 7.5), layout="constrained"
    )
    spent = lambda one: [
        point["step"] / max(1, len(one["reward"])) * one["rollouts"] for point in one["points"]
    ]
    right = lambda one: [
        100 / samples * np.mean(point["right"]) for point in one["points"]
    ]  # pass@1
    colors = pyplot.cm.tab20.colors  # dark and light in turn
    for color, (method, rows) in zip(colors[::2] + colors[1::2], students.items()):
        draw(curves, [(spent(one), right(one)) for one in sum(rows, [])], color, method)
    for kind, color in {
        "grounded": "tab:blue",
        "no-promotion": "tab:gray",
        "learnability": "tab:red",
    }.items():
        if group := [run for run in runs if run["kind"] == kind]:
            plot_teachers(topics, reward, diversity, kind, color, group)
    curves.set_xscale("symlog", linthresh=1000)
    curves.set_xticks([0, 1e3, 1e4, 1e5])
    topics.set_ylim(0)
    for axis, title, unit in (
        (curves, "Students during their training", "pass@1 on the hard test set, %"),
        (topics, "What the teachers write", "% of the problems"),
        (reward, "The teacher's reward, and promotions (triangles)", "mean R"),
        (diversity, "Diversity of a step's questions", "Vendi score"),
    ):
        axis.set(title=title, xlabel="completions sampled by students", ylabel=unit)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


# ======== 7. Benchmark: where does the time go, and is soar.py's sampler worth its lines? =============================

SHAPES = {  # vocabulary, width, MLP width, layers, heads, key/value heads of Qwen2.5-0.5B and -1.5B and of Llama-3.2-3B
    "random-0.5b": (151936, 896, 4864, 24, 14, 2),
    "random-1.5b": (151936, 1536, 8960, 28, 12, 2),
    "random-3b": (128256, 3072, 8192, 28, 24, 8),
}


@dataclass
class Benchmark:
    # --- Benchmark: one process; all ways get the same model, prompts and limits, and take turns; medians
    benchmark: bool = option(False, "measure speed instead of runs")
    parts: str = option(
        "sampling,update,step",
        "what to time; the update's memory on a CPU shows only where it runs alone",
    )
    model: str = option(
        "tiny",
        "tiny, a hub id, a folder, or random-0.5b, random-1.5b, random-3b: only their shapes, no download",
    )
    prompts: int = option(8, "distinct prompts")
    samples: int = option(32, "completions of each")
    tokens: int = option(200, "new tokens at most (tiny: 24)")
    repeats: int = option(3, "turns")
    threads: int = option(1, "torch's CPU threads")
    micro_tokens: int = option(4096, "padded tokens in one backward pass (tiny: 1024)")
    out: str = option("", "folder for benchmark.json; empty: none is written")


def clock() -> float:
    """Wall seconds on a GPU; on a CPU the seconds of this process, which other programs disturb less."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def race(ways: dict, repeats: int, device) -> dict:
    """{name: way(turn) -> tokens made}, who take turns -> {name: tokens/s, how many times faster soar.py is, peak GB}.

    On a GPU turn 0 only warms up. On a CPU the peak can only grow, so the small ways come first.
    """
    speeds, peaks = {name: [] for name in ways}, {}
    for turn in range(0 if device.type == "cuda" else 1, repeats + 1):
        for name, way in ways.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start, tokens = clock(), way(turn)
            if turn:
                speeds[name].append(tokens / (clock() - start))
            peaks.setdefault(name, soar.peak_memory_gb(device))
    ours = np.array(speeds["soar.py"])  # [repeats]
    return {
        name: {
            "tokens/s": np.median(row),
            "soar.py is faster by": np.median(ours / row),
            "peak GB": peaks[name],
        }
        for name, row in speeds.items()
    }


def benchmark_sampler(
    policy: Policy, prompts: list[list[int]], flags: Benchmark, config: Config
) -> dict:
    """Useful tokens (up to EOS) a second, against transformers' generate without any filter; on a GPU also the roofline."""
    model, n, limit, T = policy.model, flags.samples, config.student_tokens, max(map(len, prompts))
    ids = torch.tensor(
        [[0] * (T - len(p)) + p for p in prompts], device=model.device
    )  # [P, T], padded on the left
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    eos, lengths = torch.tensor(sorted(soar.eos_ids(model)), device=model.device), []

    def ours(turn):
        draw = torch.rand(len(prompts) * n, limit, generator=soar.seeded("benchmark", turn)).to(
            model.device
        )
        lengths.append(soar.generate(model, prompts, n, limit, 1.0, draw)[1])  # [P*n]
        return lengths[-1].sum().item()

    def theirs(turn, cache=None):
        torch.manual_seed(turn)
        new = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            pad_token_id=0,
            num_return_sequences=n,
            max_new_tokens=limit,
            cache_implementation=cache,
        )[:, T:]  # [P*n, limit]
        ended = torch.isin(new, eos).int()
        return (ended.cumsum(1) - ended == 0).sum().item()  # tokens with no EOS before them

    result = race(
        {
            "soar.py": ours,
            "generate, dynamic cache": theirs,
            "generate, static cache": partial(theirs, cache="static"),
        },
        flags.repeats,
        model.device,
    )
    result["soar.py"]["ended early"] = (lengths[-1] < limit).double().mean().item()
    if model.device.type == "cuda":
        bound = roofline(model, mask.sum(1).repeat_interleave(n), lengths[-1])
        result["soar.py"]["of the roofline"] = result["soar.py"]["tokens/s"] / bound
    return result


def roofline(model, prompts, lengths) -> float:
    """Tokens/s of a sampler that only reads: all weights at each step, each row's cache. [B], [B] lengths in tokens."""
    x, c = torch.zeros(1 << 30, dtype=torch.uint8, device=model.device), model.config
    y, start = x.clone(), clock()
    for _ in range(10):
        y.copy_(x)
    bandwidth = 20 * x.nbytes / (clock() - start)  # bytes/s: a copy reads and writes
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    cache = (
        2 * c.num_hidden_layers * c.num_key_value_heads * head * model.dtype.itemsize
    )  # bytes a token
    read = (
        sum(p.nbytes for p in model.parameters()) * lengths.max()
        + cache * (lengths * (prompts + lengths / 2)).sum()
    )
    return (lengths.sum() * bandwidth / read).item()


def full_logprobs(model, rollouts: list, temperature: float):
    """What completion_logprobs avoids: logits [B, T, V] of all positions at once."""
    texts = [torch.tensor(r.prompt + r.completion) for r in rollouts]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(model.device)  # [B, T]
    logprobs = (model(input_ids=ids).logits.float() / temperature).log_softmax(-1)[
        :, :-1
    ]  # [B, T - 1, V]
    logprobs = logprobs.gather(-1, ids[:, 1:, None])[..., 0]  # [B, T - 1]
    return torch.stack(
        [
            row[len(r.prompt) - 1 : len(text) - 1].sum()
            for row, r, text in zip(logprobs, rollouts, texts)
        ]
    )


def benchmark_update(
    policy: Policy, prompts: list[list[int]], flags: Benchmark, config: Config
) -> dict:
    """Trained tokens a second and peak memory, on made-up completions."""
    rng, state, device = random.Random(0), soar.adamw_state(policy.model), policy.model.device
    words = lambda: rng.choices(
        range(3, 100), k=rng.randint(config.student_tokens // 4, config.student_tokens)
    )
    rollouts = [
        soar.Rollout(prompt, words(), "", False) for prompt in prompts for _ in range(flags.samples)
    ]

    def update(turn, part=rollouts, logprobs=soar.completion_logprobs):
        with mock.patch.object(soar, "completion_logprobs", logprobs):
            rounding = soar.seeded("benchmark", turn, device=device)
            soar.policy_update(policy, part, torch.ones(len(part)), state, 1e-6, config, rounding)
        return sum(len(rollout.completion) for rollout in part)

    return race(
        {
            "soar.py, a quarter of the group": partial(update, part=rollouts[::4]),
            "soar.py": update,
            "full logits": partial(update, logprobs=full_logprobs),
        },
        flags.repeats,
        device,
    )


def benchmark_step(policy: Policy, problems: list[Problem], config: Config) -> dict:
    """Seconds of one outer step by phase. Rewards and proposals are made up unless tiny: there would be none."""
    rng = random.Random(0)
    made_up = {
        "student_reward": lambda text, gold: rng.choice((0.0, RIGHT)),
        "parse_problem": lambda text: problems[0],
    }
    state = soar.State(policy.base, soar.adamw_state(policy.model), policy.base)
    with (
        contextlib.nullcontext() if config.model == "tiny" else mock.patch.multiple(soar, **made_up)
    ):
        policy.meter("other")
        policy.meter.seconds.clear()
        soar.outer_step(policy, problems, state, config)
        policy.meter("other")
    total = sum(policy.meter.seconds.values())
    return {
        phase: {"seconds": spent, "share": spent / total}
        for phase, spent in policy.meter.seconds.most_common()
    }


def benchmark_policy(flags: Benchmark, config: Config, problems: list[Problem]) -> Policy:
    """What is timed. A random model speaks the tiny world's language; unless tiny, half of the completions end early.

    The real EOS never comes from random weights, and hardly ever after such prompts. So random ids become EOS that are
    together ln(2) / limit of what the model samples.
    """
    path = soar.tiny_base_model(config) if flags.model in ("tiny", *SHAPES) else flags.model
    policy = soar.load_policy(path, config, Meter())
    if flags.model in SHAPES:
        from transformers import LlamaConfig, LlamaForCausalLM

        names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
        shape = LlamaConfig(**dict(zip(names, SHAPES[flags.model])), tie_word_embeddings=True)
        with policy.model.device:
            policy.model = LlamaForCausalLM(shape).to(policy.model.dtype).eval()
        policy.base = soar.snapshot(policy.model)
    if flags.model != "tiny":
        policy.model.generation_config.eos_token_id, target = (
            [-1],
            math.log(2) / config.student_tokens,
        )
        rollouts, _ = soar.solve(policy, problems, 4, config, soar.seeded("calibrate"))
        tokens = torch.tensor(sum([rollout.completion for rollout in rollouts], []))
        ids = torch.randperm(policy.model.config.vocab_size, generator=soar.seeded("eos"))
        share = torch.bincount(tokens, minlength=len(ids))[ids] / len(tokens)
        ids, share = ids[share < target / 4], share[share < target / 4]
        policy.model.generation_config.eos_token_id = ids[share.cumsum(0) < target].tolist()
    return policy


def benchmark(flags: Benchmark) -> None:
    """A table for each of --parts. Raises UserError."""
    if unknown := set(flags.parts.split(",")) - {"sampling", "update", "step"}:
        raise UserError(
            f"--parts {','.join(unknown)} does not exist; choose from sampling, update, step"
        )
    torch.set_num_threads(flags.threads)
    world, rng, config, result = (
        soar.make_world(0),
        random.Random(0),
        Config(**soar.PRESETS["tiny"], tau=math.inf),
        {},
    )
    problems = [Problem(*soar.textbook_exercise(world, rng)) for _ in range(flags.prompts)]
    hard = soar.hard_worksheets(world, 64, 0)
    if flags.model != "tiny":  # three hard sheets make a prompt of about 100 tokens
        problems = hard = [
            Problem(" ".join(p.question for p in hard[i : i + 3]), "a= 1")
            for i in range(flags.prompts)
        ]
        config = replace(
            config,
            model=flags.model,
            temperature=1.0,
            kl=0.0,
            teacher_group=2,
            repeats=1,
            inner_steps=2,
            n=flags.prompts,
            student_batch=flags.prompts,
            student_group=flags.samples,
            student_tokens=flags.tokens,
            teacher_tokens=flags.tokens,
            micro_tokens=flags.micro_tokens,
        )
    policy = benchmark_policy(flags, config, problems)
    prompts = [policy.student_prompt(problem) for problem in problems]
    for part in flags.parts.split(","):
        if part == "step":
            rows = benchmark_step(policy, hard, config)
        else:
            rows = (benchmark_sampler if part == "sampling" else benchmark_update)(
                policy, prompts, flags, config
            )
        result[part] = rows
        cells = {
            name: {column: f"{value:.3g}" for column, value in row.items()}
            for name, row in rows.items()
        }
        print("\n" + markdown(part, cells), flush=True)
    if flags.out:
        soar.write_json(Path(flags.out) / "benchmark.json", result | {"flags": asdict(flags)})


# ======== 8. Main: in which order does it happen? =====================================================================


def check_comparable(folders: list[Path], configs: list[Config]) -> None:
    """A mean over runs is one of the same thing, made independently. Raises UserError."""
    seen = {}
    for folder, config in zip(folders, configs):
        made_by = replace(config, **{name: getattr(Config, name) for name in soar.RESUMABLE})
        if made_by in seen.values():
            twin = next(name for name, other in seen.items() if other == made_by)
            raise UserError(f"{folder} is the same run as {twin}, flag by flag; give each run once")
        seen[folder] = made_by
    alike = {
        folder: replace(config, seed=0, data_seed=0, reward="grounded", promotion=True, steps=0)
        for folder, config in seen.items()
    }
    for folder, config in alike.items():
        other = [
            soar.flag(name)
            for name, value in vars(config).items()
            if value != getattr(alike[folders[0]], name)
        ]
        if other:
            raise UserError(
                f"{folder} and {folders[0]} were made with different flags ({', '.join(other)}), so their mean says "
                "nothing; evaluate them one after the other"
            )


def evaluate(folders: list[Path], methods: list[str], settings: Settings) -> None:
    """Everything, from the run folders to eval.json. Raises UserError, for what does not fit together at once."""
    configs = [read_config(folder, settings) for folder in folders]
    own, kinds = {config.dataset for config in configs}, {"any", *map(kind_of, configs)}
    dataset = settings.dataset or configs[0].dataset
    if len(own) > 1:
        raise UserError("the runs are of different data sets; evaluate them one data set at a time")
    if {dataset} != own and "tiny" in {dataset, *own}:
        raise UserError(
            f"--dataset {dataset} does not fit runs of {configs[0].dataset}: the tiny model knows nothing else"
        )
    if "upper" in methods and not settings.curated and own != {"tiny"}:
        raise UserError("--methods upper needs curated problems: --curated FILE.jsonl")
    if settings.curated:
        soar.read_jsonl(settings.curated)  # so that a mistake in it shows now
    check_comparable(folders, configs)
    if (
        own != {"tiny"}
        and settings.methods != "all"
        and {"pq-well-posed", "pq-correct"} & set(methods)
    ):
        raise UserError(
            "whether a problem is well-posed or correct is known in the tiny world only; leave these methods out"
        )
    if own != {"tiny"}:
        methods = [method for method in methods if method not in ("pq-well-posed", "pq-correct")]
    needs = lambda method: METHODS[method][1]
    if not methods:
        main = MAIN["tiny" if own == {"tiny"} else "real"].split(",")
        methods = [method for method in main if needs(method) in kinds]
    missing = [method for method in methods if needs(method) not in kinds]
    if missing and settings.methods != "all":
        raise UserError(
            f"--methods {missing[0]} needs a run of the kind {needs(missing[0])}; add one, or leave it out"
        )
    students, questions, runs, seen = {}, {}, [], set()  # students: {method: [R][N]}
    with contextlib.ExitStack() as processes:
        others = None
        for folder, config in zip(folders, configs):
            run = open_run(folder, config, settings)
            settings = sized(settings, run)  # the first run decides for all: one table, one length
            if others is None:  # started once, for all run folders
                processes.enter_context(
                    soar.workers(run.policy, config, len(methods) * settings.seeds)
                )
                others = run.policy.workers
            run.policy.workers = others
            hard_set = soar.fingerprint(run.train, run.test, config.model)
            mine = [
                method
                for method in methods
                if needs(method) == kind_of(config)
                or needs(method) == "any"
                and hard_set not in seen
            ]
            for method, row in make_students(run, mine, settings).items():
                students.setdefault(method, []).append(row)
                if method in ("ps", "pq") and not run.promotion_questions:
                    print(
                        f"{folder}: nobody was promoted, so here {method} is "
                        + (
                            "the base model"
                            if method == "ps"
                            else "a student without promotion questions"
                        )
                    )
                if about := about_problems(run, method, settings):
                    questions.setdefault(method, []).append(about)
            seen.add(hard_set)
            runs.append(
                {
                    "folder": str(folder),
                    "kind": kind_of(config),
                    "rollouts": student_rollouts(run),
                    "log": run.log,
                    "diversity": diversity_curve(run, settings) if settings.plot else {},
                }
            )
    write_results(students, questions, runs, dataset, settings)


HOW_TO_READ = """
1. Self-made problems lift the model off its plateau: ps and pq against base and hard-only-equal.
2. Progress as the reward keeps a teacher useful and diverse: grounded-t against base-t and intrinsic-t, and their Vendi scores.
3. Structure counts more than correctness: the share of correct answers beside pass@1."""


def write_results(
    students: dict, questions: dict, runs: list[dict], dataset: str, settings: Settings
) -> None:
    """eval.json, eval.md (which is also printed) and, with --plot, eval.png."""
    out = Path(settings.out or runs[0]["folder"])
    methods = {m: summary(students[m], dataset, settings.samples) for m in METHODS if m in students}
    about = {
        m: {name: nested([[row[name]] for row in rows]) for name in rows[0]}
        for m, rows in questions.items()
    }
    text = markdown("method", methods_table(methods, about, dataset))
    if about:
        rows = {
            m: {column: question_cell(column, x) for column, x in row.items()}
            for m, row in about.items()
        }
        text += "\n\n" + markdown("problems of", rows)
    soar.write_json(
        out / "eval.json",
        {
            "settings": asdict(settings),
            "dataset": dataset,
            "methods": methods,
            "questions": about,
            "runs": [{name: run[name] for name in ("folder", "kind", "rollouts")} for run in runs],
        },
    )
    soar.write_text(out / "eval.md", text + "\n")
    if settings.plot:
        plot(out / "eval.png", students, runs, settings.samples)
    print(
        f"\nPercent of the hard test problems of {dataset}, mean ± SD over runs and seeds [the paper's figure]; of the problems\n"
        f"trained on: their diversity (Vendi score), the well-posed ones, those with a right answer\n\n{text}"
    )
    if dataset == "tiny":
        print(HOW_TO_READ)
    print(f"\nwritten: {out}/eval.json, {out}/eval.md" + f", {out}/eval.png" * settings.plot)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    soar.prepare_screen()

    def work():
        if soar.serve_torchrun():
            return None
        if "--benchmark" in argv:
            parser = argparse.ArgumentParser(
                usage="python eval.py --benchmark [flags]", allow_abbrev=False
            )
            flags = Benchmark(
                **soar.parse_flags(
                    parser,
                    Benchmark,
                    {
                        "benchmark": "Benchmark: one process; all ways get the same model, prompts and limits, and take turns; medians"
                    },
                    argv,
                )
            )
            if (
                min(
                    flags.prompts,
                    flags.samples,
                    flags.tokens,
                    flags.repeats,
                    flags.threads,
                    flags.micro_tokens,
                )
                < 1
            ):
                raise UserError("all numbers of the benchmark must be at least 1")
            soar.quiet_libraries()
            return benchmark(flags)
        runs, methods, settings = parse_settings(argv)
        soar.quiet_libraries()
        folders = list(map(Path, runs))
        with contextlib.ExitStack() as claims:  # two evaluations of one run would mix their files
            for folder in folders:
                read_config(folder, settings)  # no lock in a folder that is no run
            for folder in sorted(
                {Path(folder).resolve() for folder in [*folders, settings.out or folders[0]]}
            ):
                claims.enter_context(soar.claim(folder))
            evaluate(folders, methods, settings)

    return soar.exit_code("eval", work, Meter(), ["python", "eval.py", *argv])


if __name__ == "__main__":
    sys.exit(main())
