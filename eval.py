#!/usr/bin/env python3
"""Did it work, compared with what, and how sure are we? The rows of the paper's Tables 1 and 4-6.

    python eval.py runs/tiny-0 runs/tiny-0-learnability   the main rows of two runs of soar.py
    python eval.py runs/math-0 runs/math-1 --seeds 2      two teacher seeds, two students of each
    python eval.py runs/tiny-* --methods all --plot       every row, and the curves as a PNG
    python eval.py runs/math_test-0 --dataset olympiad    transfer: SOAR never saw this data set
    python eval.py --benchmark                            is soar.py's sampler worth its lines?

A method is a way to get a student: train a fresh copy of the base model on something, or take what
SOAR has left in a run folder. Every student is measured by pass@k on the held-out half of the hard
problems. A run folder is a teacher seed, and which rows it can fill depends on how it was made
(--reward learnability, --no-promotion, or neither of them).

What is measured, and why it can be believed:
    1 Methods, 2 Students, 3 Measures, 4 The teacher's problems, 5 Tables
What that runs on, in any order:
    6 Run folders, 7 Training, 8 Curves, 9 The sampler's speed, 10 Flags and main
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import soar
from soar import KS, Config, Meter, Policy, Problem, UserError, option


# ======== 1. Methods: with what is SOAR compared? =================================================

# Three questions, and the rows that answer them. Do self-made problems lift the model off its
# plateau? Then ps and pq must beat base, and they must beat hard-only too, which has no problems
# but the hard ones; hard-only-equal has as much training as all of SOAR's students together, so
# that it cannot be the amount. Is measured progress the right pay? Then the teacher's problems
# (grounded-t) must beat those of the untrained teacher (base-t), and of one that was paid for
# problems of medium difficulty (intrinsic-t). Must problems have right answers? See pq-correct.

# name: (what it is, the kind of run that it needs)
# "any": of all runs with the same hard set only the first is asked, since all would say the same.
METHODS = {
    "base": ("the base model", "any"),
    "hard-only": ("a fresh student on the hard train set", "any"),
    "hard-only-4x": ("the same with groups four times as large", "any"),
    "hard-only-equal": ("the same, as many completions as all students of the run", "grounded"),
    "ps": ("the promoted student as it is", "grounded"),
    "pq": ("a fresh student on the promotion questions and the hard train set", "grounded"),
    "pq-well-posed": ("PQ, with well-posed questions only (tiny world)", "grounded"),
    "pq-correct": ("PQ, with questions whose answer is right only (tiny world)", "grounded"),
    "grounded-t": ("PQ, with questions of the trained teacher", "grounded"),
    "no-promotion": ("PQ, with questions of a --no-promotion run's teacher", "no-promotion"),
    "intrinsic-t": ("PQ, with questions of a --reward learnability run's teacher", "learnability"),
    "base-t": ("PQ, with questions of the untrained teacher", "any"),
    "upper": ("PQ, with --curated problems (tiny world: single products)", "any"),
    "solver": ("the trained teacher as a solver", "grounded"),
}
# Without --methods: these, as far as the runs have them.
MAIN_TINY = ("base", "hard-only-equal", "ps", "pq", "grounded-t", "base-t", "intrinsic-t")
MAIN_REAL = ("base", "hard-only", "ps", "pq")

AS_IT_IS = {"base": "base", "ps": "student", "solver": "teacher"}  # nothing is trained
BY_TEACHER = {  # whose questions
    "grounded-t": "teacher",
    "no-promotion": "teacher",
    "intrinsic-t": "teacher",
    "base-t": "base",
}
TINY_ONLY = ("pq-well-posed", "pq-correct")  # nobody can judge real problems exactly
ONCE = (*AS_IT_IS, "hard-only-equal")  # whatever --seeds says: it would be the same, or too long


@dataclass
class Settings:
    # --- What to measure
    methods: str = option("", "comma-separated, or all; empty: the main ones that the runs have")
    dataset: str = option(
        "", "the hard set that fresh students train and all are tested on; empty: the run's own"
    )
    seeds: int = option(0, "students of each method and run; 0: 5 in the tiny world, else 1")
    seed: int = option(0, "the first of them")
    samples: int = option(32, "completions a problem behind pass@k (paper: 32), at least so many")
    points: int = option(0, "measurements during a fresh student's training; 0: at most 20")
    # --- Fresh students
    steps: int = option(0, "RLOO steps (paper: 1500); 0: no longer than the run; tiny: 20")
    warmup: int = option(20, "steps of linear warm-up, except in a curriculum (Table 3)")
    mix: str = option(
        "auto",
        "curriculum: synthetic, then hard; mixed: both throughout; "
        "auto: mixed on harp and olympiad (paper)",
    )
    synthetic_steps: int = option(
        0, "of a curriculum; 0: 64 (paper, MATH), but all where the tiny world's --steps is 0"
    )
    questions: int = option(128, "drawn from a teacher (paper)")
    curated: str = option("", "FILE.jsonl of problems for --methods upper")
    # --- Diversity and output
    embedder: str = option(
        "", "hub id or folder of the model that compares questions; empty: the base model"
    )
    out: str = option("", "folder for eval.json, eval.md and eval.png; empty: the first run folder")
    plot: bool = option(False, "write the curves (needs matplotlib)")
    # --- This machine (empty or 0: as the run was made)
    device: str = option("", "cuda, cpu, ...")
    processes: int = option(0, "share the students among so many; 0: CPU cores, or one on GPUs")
    threads: int = option(0, "torch's CPU threads in each process")
    sample_tokens: int = option(0, "tokens of prompts and completions sampled side by side")
    micro_tokens: int = option(0, "padded tokens in one backward pass")


# ======== 2. Students: what does each train on, and for how long? =================================

# All fresh students start from the base model and get the same number of steps, whatever the
# method; only their problems differ. With synthetic problems there are two ways. A curriculum has
# some steps on them alone, then on hard problems alone, as on MATH. Where training crashes when the
# data changes (HARP and OlympiadBench, says the paper), both are mixed throughout.
#
# No problem of the test half may get into training. The run keeps a fingerprint of its split, which
# section 6 compares; and what people give by --curated is searched for test problems here.


def synthetic_problems(
    run: Run,
    method: str,
    seed: int,
    settings: Settings,
) -> list[Problem]:
    """What a method's student trains on beside the hard train set: [] for most."""
    if method == "pq":
        return run.promotion_questions
    if method == "pq-well-posed":
        return [problem for problem in run.promotion_questions if judge(problem)[0]]
    if method == "pq-correct":
        return [problem for problem in run.promotion_questions if judge(problem)[1]]
    if method == "upper":
        return curated_problems(run, settings)
    if method in BY_TEACHER:
        return teacher_problems(run, method, seed, settings)
    return []


def curated_problems(run: Run, settings: Settings) -> list[Problem]:
    """--curated without the problems of the test set, in whatever dress; in the tiny world, where
    none are given, all single products with right answers. Raises UserError."""
    if not settings.curated:
        products = []
        for x in range(4, 10):
            products += [Problem(f"a= {x}*{y}", f"a= {x * y}") for y in range(4, 10)]
        return products
    given = soar.read_jsonl(settings.curated)
    kept = not_among(given, run.test)
    if len(kept) < len(given):
        lost = f"{len(given) - len(kept)} of {len(given)} problems"
        print(f"{settings.curated}: {lost} are test problems and are left out")
    if not kept:
        raise UserError(f"{settings.curated} holds nothing but test problems")
    return kept


def teacher_problems(
    run: Run,
    method: str,
    seed: int,
    settings: Settings,
) -> list[Problem]:
    """--questions problems that a trained or untrained teacher writes; each seed has its own."""

    def ask() -> list[dict]:
        load_weights(run.policy, run.config, *saved_weights(run, BY_TEACHER[method]))
        generator = soar.seeded(run.config.seed, "eval questions", method, seed)
        problems = soar.propose(run.policy, settings.questions, run.config, generator)[1]
        return [vars(problem) for problem in problems]

    rows = remembered(run, f"questions-{method}-{seed}", (settings.questions,), ask)
    return [Problem(**row) for row in rows]


# Hard-Only has nothing to put before the hard problems, so --mix does not concern it. Its two
# variants ask whether it failed for lack of attempts: larger groups are more chances of a first
# success in each step, more steps are more chances in all.


def schedule(
    run: Run,
    method: str,
    synthetic: list[Problem],
    settings: Settings,
    key: tuple,
) -> tuple[list, Config]:
    """(the batches of a fresh student in their order, its Config)."""
    mixed = settings.mix == "mixed"
    if settings.mix == "auto":
        mixed = run.config.dataset in ("harp", "olympiad")
    config = replace(run.config, student_warmup=settings.warmup)
    if method == "hard-only-4x":
        config.student_group *= 4  # 4 x 32 = 128 (paper)
    steps = settings.steps
    if method == "hard-only-equal":
        a_step = config.student_batch * config.student_group
        steps = math.ceil(student_rollouts(run) / a_step)
    order = soar.seeded(*key, "order")
    size = config.student_batch
    if mixed or not synthetic:
        return soar.batches_of(synthetic + run.train, steps, size, order), config
    config.student_warmup = 0  # of a curriculum (Table 3)
    first = min(settings.synthetic_steps, steps)
    batches = soar.batches_of(synthetic, first, size, order)
    return batches + soar.batches_of(run.train, steps - first, size, order), config


def student_rollouts(run: Run) -> int:
    """Completions that all students of the run sampled: in training, and greedily on Q_R."""
    questions = min(run.config.reward_questions, len(run.train))
    total = promotions = 0
    for row in run.log:
        total += soar.student_completions(run.config, promotions, questions)
        promotions += bool(row["promotion"])
    return total


def sized(settings: Settings, run: Run) -> Settings:
    """The settings, with numbers where --seeds, --steps, --synthetic-steps, --points were 0.

    In the tiny world students get 20 steps on the problems alone. After the paper's schedule (here
    --steps 200) all that got off the plateau are near 100 %, and no teacher's problems look better
    than another's.

    Elsewhere the paper's 1,500 steps a student would take days on the card that made a short run in
    an afternoon. So base, Hard-Only, PS and PQ together sample no more than all students of such a
    run (without promotions, and paid by progress: the same for every kind of run, whose rows are
    compared). Measurements on the test set take about a quarter of it.
    """
    s = replace(settings)
    if run.config.dataset == "tiny":
        s.synthetic_steps = s.synthetic_steps or (64 if s.steps else 20)
        s.steps = s.steps or 20
        s.points = s.points or 1
        s.seeds = s.seeds or 5
        return s
    s.seeds = s.seeds or 1
    s.synthetic_steps = s.synthetic_steps or 64
    config = replace(run.config, reward="grounded")
    questions = min(config.reward_questions, len(run.train))
    sampled = config.steps * soar.student_completions(config, 0, questions)
    measurement = len(run.test) * s.samples
    left = sampled // 2 - measurement  # for one fresh student; base and PS are measured once each
    s.points = s.points or max(1, min(20, left // 4 // measurement - 1))  # and one before step 0
    if not s.steps:
        left -= (s.points + 1) * measurement
        steps = left // (config.student_batch * config.student_group)
        s.steps = max(s.points, min(1500, steps))
        s.synthetic_steps = min(s.synthetic_steps, s.steps // 2)
    return s


# ======== 3. Measures: what is one number, and how far may it be off? =============================

# A student leaves {"points": its measurements, "reward": [steps] mean reward of each training step,
# "rollouts": completions that it was trained on}. A measurement is {"step", "right": [problems]},
# where right says how many of --samples answers to each test problem are right.
#
# Which of a student's measurements counts? Not the best one: the test set must not choose. The
# paper looks at the training reward, finds the step where it stops rising, and takes the mean over
# the next 200 steps. Then there is a spread over students and over teachers, and an interval over
# problems: they answer different questions (another seed? other problems?), so both are given.


def chosen_step(rewards: list[float], window: int = 25, flat: float = 0.15) -> int:
    """The paper's checkpoint choice, where the training reward stops rising -> a step in 0..steps.

    Smooth the rewards [steps] with a centred moving average and take slopes; it is the first step
    after the steepest one where the slope is under 15 % of the steepest. (The paper's "first step"
    taken literally is step 0 of a curve that starts slowly.) A flat curve: step 0.

    >>> chosen_step([min(step, 50) for step in range(100)])  # a rise of 50 steps
    59
    >>> chosen_step([10.0] * 100)
    0
    """
    if len(rewards) < 2:
        return len(rewards)
    half = window // 2
    smooth = []  # [steps]
    for step in range(len(rewards)):
        smooth.append(np.mean(rewards[max(0, step - half) : step + half + 1]))
    slopes = np.gradient(smooth)  # [steps], reward a step
    if slopes.max() <= 1e-9:
        return 0  # it never rises
    steepest = int(slopes.argmax())
    for step in range(steepest, len(rewards)):
        if slopes[step] < flat * slopes.max():
            return step
    return len(rewards)


def chosen_points(student: dict, dataset: str) -> list[dict]:
    """The measurements that count: from the paper's choice to 200 steps later (OlympiadBench: at
    step 50). Where none is in there the next one, or the last."""
    first = chosen_step(student["reward"])
    last = first + 200
    if dataset == "olympiad":
        first = last = 50
    points = student["points"]
    later = [point for point in points if point["step"] >= first] or points[-1:]
    return [point for point in later if point["step"] <= last] or later[:1]


def pass_rates(points: list[dict], samples: int) -> np.ndarray:
    """pass@k of each test problem, on average over the measurements [K, problems]."""
    right = np.array([point["right"] for point in points])  # [points, problems]
    rates = []
    for k in KS:
        chance = np.array([soar.pass_at_k(samples, c, k) for c in range(samples + 1)])
        rates.append(chance[right].mean(0))
    return np.array(rates)


def nested(values: list) -> dict:
    """[R teacher seeds][N student seeds] -> mean, SD over all, SD of the teachers' means, number.

    >>> figures = nested([[0.1, 0.3], [0.5, 0.7]])
    >>> figures["mean"], round(figures["sd_teachers"], 4)
    (0.4, 0.2828)
    """
    flat = np.concatenate([np.asarray(row, float) for row in values])
    return {
        "mean": float(flat.mean()),
        "sd": deviation(flat),
        "sd_teachers": deviation([np.mean(row) for row in values]),
        "n": len(flat),
    }


def deviation(values: list) -> float | None:
    """The sample standard deviation; None, and not 0, where one value says nothing about it."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def bootstrap(per_problem: list[np.ndarray], draws: int = 1000) -> list[float]:
    """95 % interval of the mean over R arrays [problems] if the problems were drawn anew.

    Problems are drawn with replacement, within each run. Fewer hard problems, a wider interval.
    """
    rng = np.random.default_rng(0)
    means = []  # [R][draws]
    for values in per_problem:
        drawn = rng.integers(len(values), size=(draws, len(values)))
        means.append(values[drawn].mean(1))
    return np.percentile(np.mean(means, 0), [2.5, 97.5]).tolist()


# ======== 4. The teacher's problems: are they different, and are they right? ======================

# The paper's second and third claims are about the problems themselves. A teacher that is paid for
# its student's progress stays diverse, one that is paid for medium difficulty collapses to a few
# kinds: the Vendi score counts how many different ones there really are. And problems with wrong
# answers still teach, as long as they are well-posed. In the tiny world both can be computed. On
# real problems nobody here knows the truth; there is only a majority vote of the base model, which
# is often wrong itself, so the table says "agrees with", and never "correct".
#
# The Vendi score depends on what embeds the questions, so compare it within one table only. The
# paper has 34.9 for the untrained teacher, 32.0 for SOAR's on MATH and 10.8 for Intrinsic-T.


def about_problems(run: Run, method: str, settings: Settings) -> dict:
    """Figures of a method's synthetic problems: diversity, correctness; {} where it has none."""
    problems = synthetic_problems(run, method, settings.seed, settings)
    n = len(problems)
    samples = settings.samples

    def study() -> dict:
        embeddings = embed(run, settings, problems)  # [n, D]
        rng = np.random.default_rng(0)
        scores = [vendi(embeddings[rng.integers(n, size=n)]) for _ in range(100)]  # (paper)
        about = {"questions": n, "vendi": float(np.mean(scores))}
        if run.config.dataset == "tiny":
            verdicts = [judge(problem) for problem in problems]
            about["well-posed"], about["correct"] = np.mean(verdicts, 0).tolist()
            return about | soar.topic_shares(problems)
        load_weights(run.policy, run.config)
        generator = soar.seeded(run.config.seed, "majority")
        rollouts = soar.solve(run.policy, problems, samples, run.config, generator)[0]
        boxes = [soar.extract_boxed(rollout.text) for rollout in rollouts]  # [n * samples]
        agree = []
        for problem in problems:
            agree.append(majority_agrees(boxes[:samples], problem.answer))
            boxes = boxes[samples:]
        return about | {"agrees with the base model's majority vote": float(np.mean(agree))}

    if not problems:
        return {}
    return remembered(run, f"about-{method}", (problems, settings.embedder, samples), study)


def vendi(embeddings: np.ndarray) -> float:
    """Vendi score of n items [n, D]: the effective number of different ones.

    exp(-sum l ln l), where l are the eigenvalues of (cosines / n): the exponential of an entropy.

    >>> round(vendi(np.ones((5, 3))), 6), round(vendi(np.eye(5)), 6)  # all the same; nothing shared
    (1.0, 5.0)
    """
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)  # [n, D]
    eigenvalues = np.linalg.eigvalsh(unit @ unit.T / len(unit))  # [n], of sum 1
    positive = eigenvalues[eigenvalues > 0]  # 0 ln 0 = 0, and rounding leaves some below
    return float(np.exp(-(positive * np.log(positive)).sum()))


@torch.inference_mode()
def embed(run: Run, settings: Settings, problems: list[Problem]) -> np.ndarray:
    """Questions -> [problems, D], the mean of the last hidden states of the base model, or of
    --embedder. Raises UserError. (The paper takes a model made for this, of 8B weights.)"""
    load_weights(run.policy, run.config)
    model, tokenizer = run.policy.model, run.policy.tokenizer
    if settings.embedder:
        model, tokenizer = soar.load_model(settings.embedder, run.config, trained=False)
    rows = []
    for problem in problems:  # one at a time: no padding to leave out of the mean
        ids = torch.tensor([tokenizer(problem.question).input_ids], device=model.device)  # [1, T]
        states = model.base_model(input_ids=ids).last_hidden_state[0]  # [T, D]
        rows.append(states.float().mean(0).cpu().numpy())
    return np.stack(rows)


def judge(problem: Problem) -> tuple[bool, bool]:
    """(well-posed, right) of a tiny-world problem, exactly.

    Well-posed: a worksheet whose items all have known numbers. Right: so are all its answers.
    """
    items = re.findall(r"= (\d)([*+])(\d)", problem.question)
    if soar.worksheet(["".join(item) for item in items]) != problem.question:
        return False, False
    values = []
    for x, sign, y in items:
        values.append(int(x) * int(y) if sign == "*" else int(x) + int(y))
    return True, soar.answers_equal(problem.answer, soar.worksheet(values))


def majority_agrees(boxes: list[str | None], answer: str) -> bool:
    """Whether the most frequent of some answers is the given one.

    Answers are counted by value, not by spelling. A solution without a box (None) has no vote.
    """
    votes = [box for box in boxes if box is not None]
    if not votes:
        return False
    support = []
    for vote in votes:
        support.append(sum(soar.answers_equal(vote, other) for other in votes))
    return soar.answers_equal(votes[int(np.argmax(support))], answer)


# ======== 5. Tables: how do the numbers become readable? ==========================================

# Two tables: what the methods' students can do, and what the problems are like that they trained
# on. A trained student has two rows if they differ, at the paper's choice and at its last step. In
# brackets stand the figures of the paper, which are of another model and other problems: see
# whether the ORDER of the methods is the same. eval.json has more than the tables: the intervals,
# the spread over teachers alone, and each student's curve.
#
# One method of the paper, SeRL, has no counterpart here. Its figures stand in a row of their own,
# so that nobody has to look them up.

# Percent, pass@1, 4, 8, 16, 32 (paper, Tables 1 and 4-6); PQ and PS on olympiad: of a MATH run.
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
        "SeRL, step 100": "0.5 2.1 4.0 7.3 12.4",  # another method, which is not implemented here
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
}
COLUMNS = [f"pass@{k}" for k in KS]
LEGEND = """mean ± SD over runs and seeds [the paper's figure];
of the problems trained on: their diversity (Vendi score), the well-posed ones, those with a right
answer"""
HOW_TO_READ = """
1. Self-made problems lift the model off its plateau: ps and pq against base and hard-only-equal.
2. Progress as the reward keeps a teacher useful and diverse: grounded-t against base-t and
   intrinsic-t, and their Vendi scores.
3. Structure counts more than correctness: the share of correct answers beside pass@1."""


def summary(students: list[list[dict]], dataset: str, samples: int) -> dict:
    """[R][N] students of a method -> its entry in eval.json."""
    entry = pass_table(students, lambda student: chosen_points(student, dataset), samples)
    entry["last"] = pass_table(students, lambda student: student["points"][-1:], samples)
    everyone = sum(students, [])
    entry["rollouts"] = max(student["rollouts"] for student in everyone)
    entry["curves"] = []
    for student in everyone:
        curve = []
        for point in student["points"]:
            means = pass_rates([point], samples).mean(1).tolist()
            curve.append({"step": point["step"]} | dict(zip(COLUMNS, means)))
        entry["curves"].append(curve)
    return entry


def pass_table(students: list[list[dict]], choose: Callable, samples: int) -> dict:
    """{pass@k: mean, spread, interval}; choose(student) -> the measurements that count."""
    runs = []  # R arrays [N, K, problems]
    for row in students:
        runs.append(np.array([pass_rates(choose(student), samples) for student in row]))
    table = {}
    for i, column in enumerate(COLUMNS):
        table[column] = nested([rates[:, i].mean(1) for rates in runs])
        table[column]["interval"] = bootstrap([rates[:, i].mean(0) for rates in runs])
    return table


def methods_table(methods: dict, about: dict, dataset: str) -> dict:
    """eval.json's "methods", and the cells about their problems -> {label: {column: cell}}.

    What only the paper has gets a row of its own, with nothing but the figures in brackets.
    """
    paper = PAPER.get(dataset, {})
    rows = {}
    for name, entry in methods.items():
        rows[name] = measured_cells(entry)
        for column, figure in zip(COLUMNS, paper.get(name, "").split()):
            rows[name][column] += f" [{figure}]"
        for column in ("vendi", "well-posed", "correct"):
            if column in about.get(name, {}):
                rows[name][column] = about[name][column]
        if entry["rollouts"] and entry["last"]["pass@1"] != entry["pass@1"]:
            rows[f"{name}, last step"] = measured_cells(entry["last"])
    for name, figures in paper.items():
        if name not in METHODS:
            rows[name] = dict(zip(COLUMNS, [f"[{figure}]" for figure in figures.split()]))
    return rows


def measured_cells(entry: dict) -> dict[str, str]:
    """n, the number of students, and pass@k of a method in percent: mean ± SD."""
    cells = {"n": str(entry["pass@1"]["n"])}
    for column in COLUMNS:
        figure = entry[column]
        cells[column] = f"{100 * figure['mean']:.1f}"
        if figure["sd"] is not None:
            cells[column] += f" ± {100 * figure['sd']:.1f}"
    return cells


def question_cell(column: str, figure: dict) -> str:
    """A mean count, or a mean share in percent."""
    if column in ("vendi", "questions"):
        return f"{figure['mean']:.1f}"
    return f"{figure['mean']:.0%}"


def markdown(corner: str, rows: dict) -> str:
    """{label: {column: cell}} -> a Markdown table, aligned so that a screen can show it, too."""
    columns = []
    for row in rows.values():
        columns += [column for column in row if column not in columns]
    lines = [[corner, *columns]]
    for label, row in rows.items():
        lines.append([label, *(row.get(column, "") for column in columns)])
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    text = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def write_results(
    students: dict,
    questions: dict,
    runs: list[dict],
    teachers: list[dict],
    dataset: str,
    settings: Settings,
) -> None:
    """eval.json, eval.md (which is also printed) and, with --plot, eval.png.

    students {method: [R][N]} and questions {method: [R] figures} become means over runs.
    """
    methods = {}
    for name in METHODS:
        if name in students:
            methods[name] = summary(students[name], dataset, settings.samples)
    about = {}
    cells = {}
    for name, rows in questions.items():
        about[name] = {column: nested([[row[column]] for row in rows]) for column in rows[0]}
        cells[name] = {column: question_cell(column, x) for column, x in about[name].items()}
    text = markdown("method", methods_table(methods, cells, dataset))
    if cells:
        text += "\n\n" + markdown("problems of", cells)
    result = {
        "settings": asdict(settings),
        "dataset": dataset,
        "methods": methods,
        "questions": about,
        "runs": runs,
    }
    out = Path(settings.out or runs[0]["folder"])
    soar.write_json(out / "eval.json", result)
    soar.write_text(out / "eval.md", text + "\n")
    written = f"written: {out}/eval.json, {out}/eval.md"
    if settings.plot:
        plot(out / "eval.png", students, teachers, settings.samples)
        written += f", {out}/eval.png"
    print(f"\nPercent of the hard test problems of {dataset}, {LEGEND}\n\n{text}")
    if dataset == "tiny":
        print(HOW_TO_READ)
    print(f"\n{written}")


# ======== 6. Run folders: what has SOAR left there, and is it still what it was? ==================

# A wrong row looks like a right one. So whatever could put one method's student under another
# method's name is checked before anything is measured: a hard set that is split in another way than
# in the run (what was trained on would be among the tests), weights that were replaced, files that
# contradict each other, a run that was not finished. Each ends with one sentence.
#
# Students take long, so each is kept in the run folder's eval/, under a name that is a fingerprint
# of all it depends on. The same command goes on where it stopped; another one makes another file.


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
    """The kind of a run: grounded, no-promotion or learnability."""
    if config.reward == "learnability":
        return "learnability"
    return "grounded" if config.promotion else "no-promotion"


def read_config(folder: Path, settings: Settings) -> Config:
    """The run's flags, with this machine's in their place. Raises UserError where it is no run."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no run folder of soar.py (it has no config.json)")
    if not (folder / "report.json").is_file():
        raise UserError(
            f"the run in {folder} is not finished: continue it with soar.py --resume and its flags"
        )
    config = replace(soar.saved_config(folder), processes=settings.processes)
    for name in ("device", "threads", "sample_tokens", "micro_tokens"):
        if getattr(settings, name):
            setattr(config, name, getattr(settings, name))
    return config


def read_rows(path: Path, needed: set[str]) -> list[dict]:
    """The rows of a .jsonl file of the run; each must have the needed names. Raises UserError."""
    with soar.reading(path, "put a copy back, or make the run again"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        soar.require(rows and all(needed <= row.keys() for row in rows))
    return rows


def read_json(path: Path, advice: str, needed: tuple = ()) -> dict | list:
    """What a .json file holds; the needed names must be in it. Raises UserError with the advice."""
    with soar.reading(path, advice):
        value = json.loads(path.read_text(encoding="utf-8"))
        soar.require(all(name in value for name in needed))
    return value


def not_among(problems: list[Problem], others: list[Problem]) -> list[Problem]:
    """The problems that the others do not hold, in whatever dress (spaces, case, markup)."""
    known = {soar.same_wording(problem.question) for problem in others}
    return [problem for problem in problems if soar.same_wording(problem.question) not in known]


def open_run(folder: Path, config: Config, settings: Settings) -> Run:
    """Load the base model, filter (cached) and split the hard set. Raises UserError."""
    policy, pool = soar.prepare(config, Meter())
    own = config.dataset
    left_out = ""
    if settings.dataset not in ("", own):
        config = replace(config, dataset=settings.dataset)
        given = soar.load_problems(config.dataset, config.cache)
        pool = not_among(given, pool)  # MATH's test split and HARP share 123 problems
        left_out = f"; {len(given) - len(pool)} problems of its own pool left out"
        if not pool:
            raise UserError(f"the run in {folder} knows all problems of --dataset {config.dataset}")
        soar.check_context(policy, pool, config)
    train, test = soar.split_hard(soar.hard_problems(policy, pool, config), config)
    needed = ("hard_set", "steps", "promotions", "promotion_questions", "weights")
    advice = "if another version of soar.py has made it, make the run again"
    report = read_json(folder / "report.json", advice, needed)
    if config.dataset == own and report["hard_set"] != soar.fingerprint(train, test):
        raise UserError(
            f"the hard problems are no longer those of the run in {folder}, so what SOAR trained "
            "on might be among the tests: the file of problems, the prompt or the model has "
            "changed, or --device is of another kind"
        )
    promoted = folder / "promotion_questions.jsonl"
    questions = soar.read_jsonl(str(promoted)) if promoted.exists() else []
    log = read_rows(folder / "log.jsonl", {"step", "promotion"})
    promotions = sum(bool(row["promotion"]) for row in log)
    found = {"steps": len(log), "promotions": promotions, "promotion_questions": len(questions)}
    if not found.items() <= report.items():
        raise UserError(
            f"the files in {folder} do not belong together ({found} beside report.json); "
            "put copies back, or make the run again"
        )
    run = Run(folder, config, policy, train, test, log, report, questions)
    print(
        f"{folder}: {kind_of(config)}, {len(train)} hard train and {len(test)} hard test problems"
        f"{left_out}; its students sampled {student_rollouts(run):,} completions",
        flush=True,
    )
    return run


def check_comparable(folders: list[Path], configs: list[Config]) -> None:
    """A mean over runs is one of the same thing, made independently. Raises UserError."""
    free = ("seed", "data_seed", "reward", "promotion", "steps")  # may differ between rows
    seen = []
    for folder, config in zip(folders, configs):
        flags = made_with(config)
        for other, other_flags in seen:
            differing = [name for name in flags if flags[name] != other_flags[name]]
            if not differing:
                raise UserError(f"{folder} and {other} are the same run; give each run once")
            wrong = [soar.flag(name) for name in differing if name not in free]
            if wrong:
                raise UserError(
                    f"{folder} and {other} were made with different flags ({', '.join(wrong)}), so "
                    "their mean says nothing; evaluate them one after the other"
                )
        seen.append((folder, flags))


def made_with(config: Config) -> dict:
    """The flags that a result can depend on: not where it was made, nor on how many processes."""
    return {name: value for name, value in vars(config).items() if name not in soar.RESUMABLE}


def saved_weights(run: Run, name: str) -> tuple[str, str]:
    """(folder, fingerprint) of a run's "teacher" or "student", for load_weights; ("", "") for the
    "base" model, which is also the student where none was promoted."""
    if name == "base" or name == "student" and not run.report["promotions"]:
        return "", ""
    folder = (run.folder / name).resolve()  # a whole path is never taken for a hub id
    return str(folder), run.report["weights"][name]


def load_weights(
    policy: Policy,
    config: Config,
    folder: str = "",
    key: str = "",
) -> None:
    """The live model gets the weights in a folder, or the base model's. Raises UserError where
    they are not those that the run has saved there, whose fingerprint is the key."""
    weights = policy.base
    if folder:
        weights = soar.snapshot(soar.load_model(folder, config)[0])
        if soar.weights_key(weights) != key:
            advice = "put a copy back, or make the run again"
            raise UserError(f"{folder} is not what the run has saved there; {advice}")
    soar.restore(policy.model, weights)


def remembered_path(run: Run, name: str, depends_on: tuple) -> Path:
    """In the run folder's eval/, under a name made of all that the result depends on."""
    return run.folder / "eval" / f"{name}-{soar.fingerprint(run.report, *depends_on)}.json"


def remembered(
    run: Run,
    name: str,
    depends_on: tuple,
    make: Callable,
) -> dict | list:
    """make(), called once and then read. Raises UserError."""
    path = remembered_path(run, name, depends_on)
    if not path.exists():
        soar.write_json(path, make())
    return read_json(path, "delete it, and it is made again")


# ======== 7. Training: who makes the students, and what if somebody pulls the plug? ===============

# Students do not need each other, so they are jobs for all processes, the long ones first. All
# randomness of a student is a function of its key, and so no process and no order can change it.
# Each measurement leaves a checkpoint beside the result that is to come; an interrupted student
# goes on from there and ends with the same numbers: the optimizer's moments are in the checkpoint,
# and the batches are drawn before the first step, all at once.
#
# Why not soar.py's train_student? It knows no checkpoints and no stops for measurements, since its
# students take a few steps only. One step, student_step, is the same for both.


@dataclass
class Job:
    """A student that is to be made and measured; its result is kept at `path`."""

    path: Path
    weights: tuple[str, str]  # what it starts from: see saved_weights
    batches: list  # what it trains on; [] for nothing
    test: list[Problem]
    config: Config
    settings: Settings
    key: tuple  # names it; all its randomness is a function of this
    cost: int  # completions to sample


def student_job(
    run: Run,
    method: str,
    seed: int,
    settings: Settings,
) -> Job:
    """What makes one student of a method. Raises UserError."""
    # hard-only-equal is hard-only that goes on for longer: the same randomness.
    key = ("eval", run.config.seed, method.removesuffix("-equal"), seed)
    config = run.config
    batches = []
    measurements = 1
    weights = saved_weights(run, AS_IT_IS.get(method, "base"))
    if method not in AS_IT_IS:
        synthetic = synthetic_problems(run, method, seed, settings)
        batches, config = schedule(run, method, synthetic, settings, key)
        measurements = settings.points
    flags = made_with(config) | {"samples": settings.samples, "points": settings.points}
    path = remembered_path(run, f"{method}-{seed}", (flags, run.train, run.test, batches))
    cost = len(batches) * config.student_batch * config.student_group
    cost += measurements * len(run.test) * settings.samples
    return Job(path, weights, batches, run.test, config, settings, key, cost)


def make_students(run: Run, methods: list[str], settings: Settings) -> dict[str, list[dict]]:
    """{method: its students, measured (section 3)}. What is not remembered is made now."""
    jobs = {}
    for method in methods:
        seeds = range(1 if method in ONCE else settings.seeds)
        jobs[method] = [student_job(run, method, settings.seed + i, settings) for i in seeds]
    missing = [job for job in sum(jobs.values(), []) if not job.path.exists()]
    missing.sort(key=lambda job: -job.cost)
    costs = [job.cost for job in missing]
    share = sum(costs) // (1 + len(run.policy.workers))  # the others do about as much as this one
    run.policy.meter.expect(share, f"the students of {run.folder}")
    arguments = [(job,) for job in missing]
    results = soar.share(run.policy, make_student, (), arguments, costs=costs)
    for job, student in zip(missing, results):
        soar.write_json(job.path, student)
        job.path.with_suffix(".pt").unlink(missing_ok=True)
    advice = "delete it, and this student is made again"
    needed = ("points", "reward", "rollouts")
    students = {}
    for method, its_jobs in jobs.items():
        students[method] = [read_json(job.path, advice, needed) for job in its_jobs]
    return students


def make_student(policy: Policy, job: Job) -> dict:
    """The live model as a student, trained (if it has batches) and measured on the way."""
    model = policy.model
    config = job.config
    load_weights(policy, config, *job.weights)
    steps = len(job.batches)
    a_step = config.student_batch * config.student_group
    moments = None
    result = {"points": [], "reward": [], "rollouts": steps * a_step}
    path = job.path.with_suffix(".pt")
    if path.exists():
        with soar.reading(path, "delete it and this student starts again"):
            state = torch.load(path, weights_only=True, map_location=model.device)
            soar.restore(model, state["weights"])
            moments = state["moments"]
            result = state["result"]
    if not result["points"]:
        result["points"].append(measure(policy, job, 0))
    if not steps:
        return result
    moments = moments or soar.adamw_state(model)
    points = job.settings.points
    stops = {math.ceil(steps * i / points) for i in range(1, points + 1)}
    done = len(result["reward"])
    title = job.path.stem.rsplit("-", 1)[0]
    bar = tqdm(range(done, steps), title, initial=done, total=steps, disable=None, leave=False)
    for step in bar:
        lr = soar.learning_rate(config.student_lr, step, steps, config.student_warmup)
        key = (*job.key, step)
        figures = soar.student_step(policy, job.batches[step], moments, lr, config, key)
        result["reward"].append(figures["reward"])
        policy.meter.advance(a_step)
        if step + 1 in stops:
            result["points"].append(measure(policy, job, step + 1))
            state = {"weights": soar.snapshot(model), "moments": moments, "result": result}
            soar.write_atomically(path, lambda file: torch.save(state, file))
    return result


def measure(policy: Policy, job: Job, step: int) -> dict:
    """A measurement of the live model after so many steps: {"step", "right": [problems]}."""
    moment = (step,) if job.batches else ()
    generator = soar.seeded(*job.key, *moment, "measure")
    samples = job.settings.samples
    right = soar.right_counts(policy, job.test, samples, job.config, generator)
    policy.meter.advance(len(job.test) * samples)
    return {"step": step, "right": right}


# ======== 8. Curves: what happens on the way? (--plot, needs matplotlib) ==========================

# Four panels with one x-axis: completions that students have sampled. Steps would be unfair, since
# a step of a learnability run costs a tenth of a grounded one. Thin lines are single runs and
# students, thick ones their means; where single lines lie far from the mean, the mean says little.
# What is not trained has no curve, but a dotted line across. The triangles are promotions: look
# there for the drop of the reward, which is a gain over a better baseline from then on.


def plot(
    path: Path,
    students: dict,
    teachers: list[dict],
    samples: int,
) -> None:
    """Students during training, topics, the teacher's reward with its promotions, diversity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    learning, topics, reward, diversity = axes.flat
    colors = pyplot.cm.tab20.colors  # dark and light in turn
    for color, (method, rows) in zip(colors[::2] + colors[1::2], students.items()):
        curves = [student_curve(student, samples) for student in sum(rows, [])]
        draw(learning, curves, color, method)
    colors = {"grounded": "tab:blue", "no-promotion": "tab:gray", "learnability": "tab:red"}
    for kind, color in colors.items():
        curves = [teacher for teacher in teachers if teacher["kind"] == kind]
        if not curves:
            continue
        draw(diversity, [curve["diversity"] for curve in curves], color, kind)
        for topic, line in zip(soar.TOPICS, ("-", ":", "--")):
            if topic in curves[0]:
                draw(topics, [curve[topic] for curve in curves], color, f"{kind}: {topic}", line)
        if kind != "learnability":  # whose reward is another quantity
            draw(reward, [curve["reward"] for curve in curves], color, kind)
            for curve in curves:
                reward.plot(*curve["promotions"], "^", color=color)
    learning.set_xscale("symlog", linthresh=1000)
    learning.set_xticks([0, 1e3, 1e4, 1e5])
    topics.set_ylim(0)
    for axis, title, unit in (
        (learning, "Students during their training", "pass@1 on the hard test set, %"),
        (topics, "What the teachers write", "% of the problems"),
        (reward, "The teacher's reward, and promotions (triangles)", "mean R"),
        (diversity, "Diversity of a step's questions", "Vendi score"),
    ):
        axis.set(title=title, xlabel="completions sampled by students", ylabel=unit)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def student_curve(student: dict, samples: int) -> tuple[list, list]:
    """(completions, pass@1 in percent) of a student's measurements."""
    a_step = student["rollouts"] / max(1, len(student["reward"]))
    x = [point["step"] * a_step for point in student["points"]]
    y = [100 / samples * np.mean(point["right"]) for point in student["points"]]
    return x, y


def teacher_curves(run: Run, settings: Settings) -> dict:
    """{"kind": of the run, what: (completions, its values)}."""
    log = run.log
    a_step = student_rollouts(run) / len(log)
    x = [(i + 1) * a_step for i in range(len(log))]
    rewards = [row["reward"] for row in log]
    promoted = [i for i, row in enumerate(log) if row["promotion"]]
    steps, scores = diversity_curve(run, settings)
    curves = {
        "kind": kind_of(run.config),
        "reward": (x, rewards),
        "promotions": ([x[i] for i in promoted], [rewards[i] for i in promoted]),
        "diversity": ([x[step] for step in steps], scores),
    }
    for topic in log[0].get("topics", ()):
        curves[topic] = (x, [100 * row["topics"][topic] for row in log])
    return curves


def diversity_curve(run: Run, settings: Settings) -> tuple[range, list[float]]:
    """(some 20 of the outer steps, the Vendi score of their questions, of 128 at most)."""
    rows = read_rows(run.folder / "questions.jsonl", {"step", "question"})
    steps = range(0, run.config.steps, math.ceil(run.config.steps / 20))
    asked = []  # [steps][questions]
    for step in steps:
        questions = [Problem(row["question"], "") for row in rows if row["step"] == step]
        asked.append(questions[:128])
    embeddings = embed(run, settings, sum(asked, []))  # at once: an --embedder is loaded once
    ends = np.cumsum([len(questions) for questions in asked])
    return steps, [vendi(part) for part in np.split(embeddings, ends[:-1])]


def draw(
    axis: object,
    curves: list[tuple],
    color: object,
    label: str,
    line: str = "-",
) -> None:
    """Each curve (x, y) as a thin line, their mean as a thick one; where nothing was trained, one
    dotted line across. Runs have other x; the mean is taken at those of the first."""
    grid = curves[0][0]
    mean = np.mean([np.interp(grid, x, y) for x, y in curves], 0)
    if len(grid) == 1:
        axis.axhline(mean[0], linestyle=":", color=color, linewidth=2, label=label)
        return
    for x, y in curves:
        axis.plot(x, y, line, color=color, linewidth=0.6, alpha=0.5)
    axis.plot(grid, mean, line, color=color, linewidth=2, label=label)


# ======== 9. The sampler's speed: is it worth its lines? ==========================================

# soar.py has a sampler of its own, because what is sampled must be exactly what is trained: no
# filter, and EOS is an action. Whether it is also faster than transformers' generate() is measured
# here. It reads a prompt once for all its completions, and a completion that has ended leaves the
# batch. So the gain is large where lengths differ, and the table says how many ended early. All
# three ways get the same model, prompts and limits, and take turns in one process, so that what
# disturbs one disturbs all. Each samples its own completions, of the same distribution; so it is
# tokens a second that are compared, and tokens behind an end do not count.


@dataclass
class Benchmark:
    # --- Benchmark
    benchmark: bool = option(False, "measure the sampler's speed instead of runs")
    model: str = option("tiny", "tiny, a hub id or a folder")
    prompts: int = option(8, "distinct prompts")
    samples: int = option(32, "completions of each")
    tokens: int = option(24, "new tokens at most")
    repeats: int = option(3, "turns, of which the median is shown")


def benchmark(flags: Benchmark) -> None:
    """Useful tokens (up to EOS) a second, against transformers' generate. Raises UserError."""
    torch.set_num_threads(1)
    config = Config(**soar.PRESETS["tiny"] | {"model": flags.model, "kl": 0.0})
    path = soar.tiny_base_model(config) if flags.model == "tiny" else flags.model
    policy = soar.load_policy(path, config, Meter())
    world = soar.make_world(0)
    rng = random.Random(0)
    prompts = []
    for _ in range(flags.prompts):
        problem = Problem(*soar.textbook_exercise(world, rng))
        prompts.append(policy.student_prompt(problem))
    ways = {
        "soar.py": sample_ours,
        "generate, dynamic cache": sample_theirs,
        "generate, static cache": partial(sample_theirs, cache="static"),
    }
    # On a CPU the seconds of this process, which other programs disturb less.
    on_cpu = policy.model.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    speeds = {name: [] for name in ways}
    early = {}
    for turn in range(flags.repeats + 1):
        for name, way in ways.items():
            start = clock()
            lengths = way(policy.model, prompts, turn, flags)
            early[name] = (lengths < flags.tokens).double().mean().item()  # a GPU is waited for
            if turn:  # turn 0 warms up
                speeds[name].append(lengths.sum().item() / (clock() - start))
    rows = {}
    for name, speed in speeds.items():
        ratio = np.median(np.divide(speeds["soar.py"], speed))  # turn by turn
        rows[name] = {
            "tokens/s": f"{np.median(speed):.3g}",
            "soar.py is faster by": f"{ratio:.3g}",
            "ended early": f"{early[name]:.0%}",
        }
    print("\n" + markdown("sampling", rows))


def sample_ours(
    model: nn.Module,
    prompts: list[list[int]],
    turn: int,
    flags: Benchmark,
) -> Tensor:
    """Lengths of the completions [prompts * samples], up to and including EOS."""
    shape = (len(prompts) * flags.samples, flags.tokens)
    uniforms = torch.rand(shape, generator=soar.seeded("benchmark", turn)).to(model.device)
    return soar.generate(model, prompts, flags.samples, flags.tokens, 1.0, uniforms)[1]


def sample_theirs(
    model: nn.Module,
    prompts: list[list[int]],
    turn: int,
    flags: Benchmark,
    cache: str | None = None,
) -> Tensor:
    """As sample_ours, by transformers' generate(), from the same distribution: without a filter."""
    T = max(map(len, prompts))
    padding = [T - len(prompt) for prompt in prompts]  # on the left
    ids = [[0] * pad + prompt for pad, prompt in zip(padding, prompts)]
    mask = [[0] * pad + [1] * (T - pad) for pad in padding]
    torch.manual_seed(turn)
    tokens = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        do_sample=True,
        top_k=0,
        pad_token_id=0,
        num_return_sequences=flags.samples,
        max_new_tokens=flags.tokens,
        cache_implementation=cache,
    )
    ends = torch.tensor(sorted(soar.eos_ids(model)), device=model.device)
    ended = torch.isin(tokens[:, T:], ends).int()
    return (ended.cumsum(1) - ended == 0).sum(1)  # tokens with no EOS before them


# ======== 10. Flags and main: in which order does it happen? ======================================

# Mistakes are found before anything is loaded, since loading takes minutes on a large model. Then
# the run folders are locked, because two evaluations of one run would mix their files, and opened
# one after the other. The first one decides how long students train, for all of them: rows of one
# table must have the same length. Of runs that share a hard set, as a grounded and a learnability
# run of one --data-seed do, only the first makes the rows that depend on nothing else ("any"): the
# same base model would otherwise be counted twice, and make a spread look smaller than it is.

# The fields that open a group of flags in --help.
FLAG_GROUPS = {
    "methods": "What to measure",
    "steps": "Fresh students",
    "embedder": "Diversity and output",
    "device": "This machine (empty or 0: as the run was made)",
}
LEAST = {"questions": 1, "samples": max(KS), "seed": -math.inf}  # any other number: 0


def parse_settings(argv: list[str]) -> tuple[list[str], list[str], Settings]:
    """Command line -> (run folders, methods, Settings). Raises UserError."""
    rows = [f"  {name:16}{what}" for name, (what, _) in METHODS.items()]
    parser = argparse.ArgumentParser(
        usage="python eval.py RUN [RUN ...] [flags], or python eval.py --benchmark [flags]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="\n".join([__doc__.splitlines()[0], "Methods:", *rows]),
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that soar.py has written")
    flags = soar.parse_flags(parser, Settings, FLAG_GROUPS, argv)
    runs = flags.pop("runs")
    settings = Settings(**flags)
    soar.check_numbers(settings, LEAST, 0)
    if settings.mix not in ("auto", "curriculum", "mixed"):
        raise UserError("--mix must be one of auto, curriculum, mixed")
    if settings.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    if settings.methods == "all":
        return runs, list(METHODS), settings
    methods = [name for name in settings.methods.replace(" ", "").split(",") if name]
    for name in methods:
        if name not in METHODS:
            known = ", ".join(METHODS)
            raise UserError(f"--methods {name} does not exist; choose from {known}, or all")
    return runs, methods, settings


def choose_methods(methods: list[str], configs: list[Config], settings: Settings) -> list[str]:
    """Those that can be measured: of the given ones all, or UserError says which one cannot; of
    --methods all, and of the main ones, as many as the runs have."""
    own = {config.dataset for config in configs}
    if len(own) > 1:
        raise UserError("the runs are of different data sets; evaluate them one data set at a time")
    tiny = own == {"tiny"}
    if settings.dataset not in ("", *own) and (tiny or settings.dataset == "tiny"):
        raise UserError(
            f"--dataset {settings.dataset} does not fit runs of {own.pop()}: "
            "the tiny model knows nothing else"
        )
    if settings.curated:
        soar.read_jsonl(settings.curated)  # so that a mistake in it shows now
    elif "upper" in methods and not tiny:
        raise UserError("--methods upper needs curated problems: --curated FILE.jsonl")
    kinds = {"any", *map(kind_of, configs)}
    chosen = []
    for method in methods or (MAIN_TINY if tiny else MAIN_REAL):
        needs = METHODS[method][1]
        reason = ""
        if needs not in kinds:
            reason = f"needs a run of the kind {needs}; add one, or leave it out"
        if method in TINY_ONLY and not tiny:
            reason = "is known in the tiny world only; leave it out"
        if not reason:
            chosen.append(method)
        elif methods and settings.methods != "all":
            raise UserError(f"--methods {method} {reason}")
    return chosen


def evaluate(folders: list[Path], methods: list[str], settings: Settings) -> None:
    """Everything, from the run folders to eval.json. Raises UserError."""
    configs = [read_config(folder, settings) for folder in folders]
    methods = choose_methods(methods, configs, settings)
    check_comparable(folders, configs)
    out = Path(settings.out or folders[0])
    with contextlib.ExitStack() as locks:
        for folder in sorted({folder.resolve() for folder in (*folders, out)}):
            locks.enter_context(soar.claim(folder))
        fill_tables(folders, configs, methods, settings)


def fill_tables(
    folders: list[Path],
    configs: list[Config],
    methods: list[str],
    settings: Settings,
) -> None:
    """Makes each method's students in each run that can fill its row, and writes the tables."""
    students = {}  # {method: [R][N]}
    questions = {}  # {method: [R] figures of its problems}
    runs = []  # for eval.json
    teachers = []  # for --plot
    hard_sets = set()
    first = open_run(folders[0], configs[0], settings)
    settings = sized(settings, first)  # the first run decides for all: one table, one length
    with soar.workers(first.policy, configs[0], len(methods) * settings.seeds):
        for folder, config in zip(folders, configs):
            run = open_run(folder, config, settings) if runs else first
            run.policy.workers = first.policy.workers  # started once, for all run folders
            fillable = {kind_of(config)}
            hard_set = soar.fingerprint(run.train, run.test, config.model)
            if hard_set not in hard_sets:
                hard_sets.add(hard_set)
                fillable.add("any")
            mine = [method for method in methods if METHODS[method][1] in fillable]
            if not run.promotion_questions and {"ps", "pq"} & set(mine):
                print(
                    f"{folder}: nobody was promoted, so here ps is the base model, "
                    "and pq a student without promotion questions"
                )
            for method, row in make_students(run, mine, settings).items():
                students.setdefault(method, []).append(row)
                about = about_problems(run, method, settings)
                if about:
                    questions.setdefault(method, []).append(about)
            rollouts = student_rollouts(run)
            runs.append({"folder": str(folder), "kind": kind_of(config), "rollouts": rollouts})
            if settings.plot:
                teachers.append(teacher_curves(run, settings))
    write_results(students, questions, runs, teachers, first.config.dataset, settings)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 2 after a mistake of the user, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    soar.prepare_screen()

    def work() -> None:
        if soar.serve_torchrun():
            return
        if "--benchmark" not in argv:
            runs, methods, settings = parse_settings(argv)
            soar.quiet_libraries()
            evaluate([Path(run) for run in runs], methods, settings)
            return
        usage = "python eval.py --benchmark [flags]"
        parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False)
        flags = Benchmark(**soar.parse_flags(parser, Benchmark, {}, argv))
        soar.check_numbers(flags, {}, 1)
        soar.quiet_libraries()
        benchmark(flags)

    return soar.exit_code("eval", work, Meter(), ["python", "eval.py", *argv])


if __name__ == "__main__":
    sys.exit(main())
